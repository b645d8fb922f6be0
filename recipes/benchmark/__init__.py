"""What whole steps cost: the models, the optimizers, the measuring, the operations that are expected, the report."""
