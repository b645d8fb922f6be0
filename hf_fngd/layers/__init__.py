"""Layer types, one file each behind one registry, and which layers of a model are taken."""

from hf_fngd.layers import conv1d, convolution, embedding, linear, norm, table

__all__ = ["conv1d", "convolution", "embedding", "linear", "norm", "table"]
