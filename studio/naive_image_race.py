"""Fast ways of text-to-image methods beside their slow references (studio/naive_race.py)."""

from __future__ import annotations

from typing import Any

from studio.diffusion_race import PROMPT, drawn
from studio.method_race import LATE, REQUESTS, requested
from studio.naive_race import Row, beside, reference
from studio.planted import Quiet

GUIDANCE = 3.0
SETTINGS = {"guidance": GUIDANCE, "metric": "distance"}


def generate(model: Any, images: int = 8, steps: int = 4) -> list[Row]:
    """Images in one batch, against diffusers' pipeline, one after the other."""
    naive = reference("naive_audit").image
    fast = requested("generate", model, seeds=range(images), steps=steps, **SETTINGS)
    how = f"diffusers' pipeline, {images} images one at a time; {steps} steps"
    slow = lambda: naive(model.pipe, PROMPT, 0, steps, GUIDANCE)  # noqa: E731
    return [beside("generate", fast, slow, images, how)]


def trace_text_encoder(model: Any, steps: int = 2) -> list[Row]:
    """An image a distinct embedding, in batches, against two passes of the encoder and an image a cell."""
    text, image = reference("naive_text_encoder").restored_states, reference("naive_trace").image
    fast = requested("trace-text-encoder", model, steps=steps, **SETTINGS)
    cells = fast().arrays["restored"].values.size + 2
    places = list(model.subject_positions(PROMPT, LATE, None))
    noise = model.pipe.text_encoder.get_input_embeddings().weight[places].detach()
    model.pipe.set_progress_bar_config(disable=True)

    def slow() -> Any:
        states = text(model.pipe, PROMPT, places, noise, 0, places[-1])
        return image(model.pipe, states, 0, steps, GUIDANCE)

    how = f"{cells} cells, for each two passes of the encoder and an image; MLPs, {steps} steps"
    return [beside("trace-text-encoder", fast, slow, cells, how)]


def lens(model: Any, steps: int = 4) -> list[Row]:
    """All layers' images in one batch from one pass, against a pass of the encoder and an image a layer."""
    text, image = reference("naive_text_encoder").layer_states, reference("naive_trace").image
    fast = requested("lens", model, steps=steps, guidance=GUIDANCE)
    layers = len(model.lens(PROMPT).states)
    model.pipe.set_progress_bar_config(disable=True)
    slow = lambda: image(model.pipe, text(model.pipe, PROMPT, 1), 0, steps, GUIDANCE)  # noqa: E731
    how = f"{layers} layers, for each a pass of the encoder and an image; {steps} steps"
    return [beside("lens", fast, slow, layers, how)]


def neurons(model: Any) -> list[Row]:
    """Statistics of every unit from one pass over all prompts, against a pass for every prompt and matrix and
    a dot product a unit."""
    from studio.methods.neurons import NEURON_TEMPLATES, unit_statistics

    naive = reference("naive_neurons").unit_outputs
    layers = [str(s.layer) for s in model.unet_sites(("cross-attention",))]
    passes = 2 * len(NEURON_TEMPLATES) * 2 * len(layers)
    how = f"{passes} passes: {2 * len(NEURON_TEMPLATES)} prompts, keys and values of {len(layers)} layers"
    return [
        beside(
            "neurons",
            lambda: unit_statistics(model, "star", "thing", layers, NEURON_TEMPLATES, "last"),
            lambda: naive(model.pipe, "a photo of star", f"{layers[len(layers) // 2]}.to_k", 4),
            passes,
            how,
        )
    ]


def attribute(model: Any, steps: int = 4) -> list[Row]:
    """One backward pass a step for all matrices, against one for every step and matrix."""
    naive = reference("naive_attribution")
    names = [n for n, p in model.pipe.unet.named_parameters() if ".ff.net." in n and p.dim() == 2]
    terms = naive.erase_terms(model.pipe, PROMPT, "", 0, steps, GUIDANCE)
    how = f"a backward pass for each of {steps} steps and {len(names)} matrices; trajectories are at hand"
    return [
        beside(
            "attribute",
            requested("attribute", model, steps=steps, guidance=GUIDANCE),
            lambda: naive.attributions(model.pipe, terms, names[:1]),
            len(names),
            how,
        )
    ]


def edit(model: Any) -> list[Row]:
    """Keys read in batches and one factor for all matrices, against a prompt at a time and an inverse of d x
    d a matrix."""
    from studio.methods.edit import solve_edit

    naive = reference("naive_edits").unet_edit
    asked = asked_edit(model, 4)
    changes = [(c, [(r, 1.0)]) for c, r in zip(asked.concepts, asked.replacements, strict=True)]
    rest = (asked.params["templates"], asked.params["layers"], False, asked.params["regularization"])
    how = f"a prompt at a time, an inverse a matrix; {2 * len(rest[1])} matrices, {len(changes)} concepts"
    return [
        beside("edit", lambda: solve_edit(model, asked), lambda: naive(model.pipe, changes, *rest), 1, how)
    ]


def asked_edit(model: Any, concepts: int) -> Any:
    """The record of a UCE edit of so many concepts in all layers, before its deltas are solved for."""
    from studio.methods.edit import FORMS
    from studio.methods.edit_request import layer_names, record
    from studio.registry import find_method, parse

    colours, shapes = ("red", "blue", "green", "yellow"), ("star", "moon", "heart", "tree")
    names = [f"{n} {c} {s}" for n in ("one", "two", "big", "small") for c in colours for s in shapes]
    given = {"concept": names[:concepts], "replacement": ["circle"] * concepts, "method": "uce"}
    inputs, params, _ = parse(find_method("edit"), given)
    made = record(model, inputs, params, FORMS["uce"])
    made.params["layers"] = layer_names(model, ("all",))
    return made


def audit(model: Any, steps: int = 2) -> list[Row]:
    """Images before and after in batches, against a copy of the pipeline and an image at a time."""
    from studio.audit import Stack
    from studio.edits import Active, Edit
    from studio.registry import find_method, parse

    naive = reference("naive_audit")
    name = f"unet.{model.unet_sites(('cross-attention',))[0].layer}.to_k.weight"
    weight = model.pipe.unet.get_parameter(name.removeprefix("unet."))
    delta = {name: 0.1 * weight.detach().numpy()}
    method, given = find_method("audit"), {**REQUESTS["audit"].given, **SETTINGS, "steps": steps}
    parsed = parse(method, given, [0])

    def fast() -> Any:
        stack = Stack((Active(Edit(delta, model.fingerprint, ("star",))),))
        return method.run(model, *parsed, None, Quiet(), edits=stack)

    images = drawn(model, fast)
    other = naive.edited(model.pipe, delta)
    slow = lambda: naive.image(other, PROMPT, 0, steps, GUIDANCE)  # noqa: E731
    how = f"diffusers' pipeline, {images} images one at a time; {steps} steps, scores not counted"
    return [beside("audit", fast, slow, images, how)]
