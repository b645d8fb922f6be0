"""The parts of `recipes/step_cost.py`: models, optimizers, the measuring, the operations expected, the report."""
