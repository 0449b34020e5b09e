"""Quaternion layers and the anti-transfer loss for PyTorch.

>>> import torch, qkernels
>>> layer = qkernels.nn.QuaternionConv2d(4, 8, 3, padding=1, activation="relu")
>>> layer(torch.rand(1, 4, 16, 16)).shape
torch.Size([1, 8, 16, 16])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkernels import init, losses, nn, reference
    from qkernels.functional import (
        GramTarget,
        PackedWeight,
        anti_transfer_loss,
        anti_transfer_tap,
        gram_cosine,
        gram_target,
        hamilton_conv2d,
        hamilton_conv_transpose2d,
        hamilton_linear,
        linear_cka,
        pack_weights,
    )
    from qkernels.runtime import backend_of, form_of, set_backend, set_form

__all__ = [
    "GramTarget",
    "PackedWeight",
    "anti_transfer_loss",
    "anti_transfer_tap",
    "backend_of",
    "form_of",
    "gram_cosine",
    "gram_target",
    "hamilton_conv2d",
    "hamilton_conv_transpose2d",
    "hamilton_linear",
    "init",
    "linear_cka",
    "losses",
    "nn",
    "pack_weights",
    "reference",
    "set_backend",
    "set_form",
]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, and PyTorch with it, which `qkernels.losses` does not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("init", "losses", "nn", "reference"):
        return importlib.import_module(f"{__name__}.{name}")
    home = "runtime" if name.startswith(("set_", "backend_", "form_")) else "functional"
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value
