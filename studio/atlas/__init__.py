"""The Atlas: a small invented world whose truth is known, and the training of the models that live in it."""
