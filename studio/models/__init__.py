"""Models behind one interface: where they are, how their parts are addressed, how interventions reach
them."""
