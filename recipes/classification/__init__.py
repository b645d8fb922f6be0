"""The parts of `recipes/text_classification.py`, one file a purpose; what other recipes on texts need is in `text`."""
