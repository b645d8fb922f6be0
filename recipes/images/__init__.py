"""The parts of `recipes/image_classification.py`: one file a purpose."""
