"""Layer types, one file each behind one registry, and which layers of a model are taken."""

from hf_fngd.layers import convolution, embedding, linear, norm, table

__all__ = ["convolution", "embedding", "linear", "norm", "table"]
