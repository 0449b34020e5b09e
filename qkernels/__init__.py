"""Quaternion layers and the anti-transfer loss for PyTorch.

>>> import torch, qkernels
>>> layer = qkernels.nn.QuaternionConv2d(4, 8, 3, padding=1, activation="relu")
>>> layer(torch.rand(1, 4, 16, 16)).shape
torch.Size([1, 8, 16, 16])
"""

from qkernels import init, nn, reference
from qkernels.functional import (
    anti_transfer_loss,
    gram_cosine,
    hamilton_conv2d,
    hamilton_conv_transpose2d,
    hamilton_linear,
)
from qkernels.runtime import backend_of, form_of, set_backend, set_form

__all__ = [
    "anti_transfer_loss",
    "backend_of",
    "form_of",
    "gram_cosine",
    "hamilton_conv2d",
    "hamilton_conv_transpose2d",
    "hamilton_linear",
    "init",
    "nn",
    "reference",
    "set_backend",
    "set_form",
]
