"""The parts of `recipes/compare.py`: one file a purpose."""
