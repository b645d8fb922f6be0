"""Who is a sample: which rows of the tensors in a model belong to which one, as a probe sees or ids say."""
