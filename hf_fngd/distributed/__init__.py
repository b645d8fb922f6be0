"""Several processes: what they exchange, tensors that are sharded over them, and environments that are refused."""
