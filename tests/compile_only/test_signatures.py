"""Kernels take named operands: a call that can be read, and checked against what is called."""

import inspect
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from qkernels.ops.folded_rowwise import kernels as folded
from qkernels.ops.gram_cosine import kernels as gram

MOST_OF_A_KERNEL, MOST_OF_A_FUNCTION = 40, 12


@pytest.mark.parametrize("module", [gram, folded], ids=["gram", "folded"])
def test_few_arguments(module: Any) -> None:
    sizes = {
        name: len(function.arg_names)
        for name, function in inspect.getmembers(module, lambda value: isinstance(value, JITFunction))
    }
    assert len(sizes) > 5
    for name, size in sizes.items():
        assert size <= (MOST_OF_A_KERNEL if name.endswith("_kernel") else MOST_OF_A_FUNCTION), name
