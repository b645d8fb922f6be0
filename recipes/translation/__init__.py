"""The parts of `recipes/translate.py`: one file a purpose."""
