"""The definitions: plain PyTorch over the structure tensor, in any float type, differentiable by autograd.

They check no argument: `qkernels.functional` does, and computes them under `set_backend("reference")`.
"""

from qkernels.ops.folded_rowwise.reference import folded_rowwise
from qkernels.ops.gram_cosine.reference import gram_cosine
from qkernels.ops.hamilton_conv.reference import hamilton_conv2d, hamilton_conv_transpose2d
from qkernels.ops.hamilton_linear.reference import hamilton_linear

__all__ = ["folded_rowwise", "gram_cosine", "hamilton_conv2d", "hamilton_conv_transpose2d", "hamilton_linear"]
