"""Attaching to a model, its forward and backward passes, and the micro-batches of an optimizer step."""
