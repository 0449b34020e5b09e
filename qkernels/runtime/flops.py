"""Operations of the operators, which `torch.utils.flop_counter.FlopCounterMode` counts without anybody's doing.

Counted are two for each multiplication of the definition: a Hamilton product has its 16 real ones, as many as a real
layer of the same shape, also in the form q8, which multiplies half as often. So a count depends neither on form nor on
backend, and equals those of `bench`; only the backend "reference", made of PyTorch's operators, adds its expansion of
the weight. As PyTorch's own counts, it leaves out sums, pools and what is done once for each element.
"""

import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from qkernels.ops.gram_cosine.config import sizes
from qkernels.ops.hamilton_conv.reference import conv_output_size

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def gram_flops(rows: int, columns: int) -> tuple[int, int]:
    """Operations in a squared cosine of Gram matrices of F `[rows, columns]`, and in its gradient.

    Only matrix products are counted, by rows or by columns, whichever are fewer. By rows: two symmetric matrices;
    their combination times F for the gradient. By columns: a product of both F and two symmetric products; two products
    with F for the gradient.

    >>> gram_flops(2, 3), gram_flops(8, 2)
    ((36, 24), (160, 128))
    """
    by_rows = 2 * rows * (rows + 1) * columns, 2 * rows**2 * columns
    by_columns = 2 * columns**2 * rows + 2 * columns * (columns + 1) * rows, 4 * columns**2 * rows
    return min(by_rows, by_columns, key=sum)


def folded_flops(rows: int, columns: int) -> tuple[int, int]:
    """The same for the released code's loss, with F `[B C, N]`.

    By columns, rows are multiplied by the three column products, which all contribute to the gradient.
    """
    by_rows = 2 * rows * (rows + 1) * columns, 2 * rows**2 * columns
    square = columns**2 * rows
    by_columns = 8 * square + 2 * columns * (columns + 1) * rows, 12 * square
    return min(by_rows, by_columns, key=sum)


def _hamilton(y: Shape, weight: Shape) -> int:
    """Of the products that make maps or rows of shape `y`, or that a gradient of this shape takes part in."""
    return 2 * math.prod(y) * 4 * math.prod(weight[2:])


def _pooled(x: Shape, weight: Shape, window: Shape) -> int:
    size = conv_output_size(x[2:], weight[3:], window[:2], window[2:4], window[4:6])
    return _hamilton((x[0], 4 * weight[1], *size), weight)


def _gram(a: Shape, triangles: bool, gram: str, which: int) -> int:
    """Of all items; beside triangles of Gram matrices only those of `a` are computed."""
    items, rows, columns = sizes(gram, a[0], a[1], math.prod(a[2:]))
    own = rows * (rows + 1) * columns, 2 * rows**2 * columns
    return items * (own if triangles else gram_flops(rows, columns))[which]


def _folded(features: Shape, which: int) -> int:
    return folded_flops(features[0] * features[1], math.prod(features[2:]))[which]


# By operator: its tensors' shapes, its other arguments, and the shapes of its results.
FORMULAS: dict[str, Callable[..., int]] = {
    "hamilton_conv2d": lambda x, weight, *_, out_shape: _hamilton(out_shape, weight),
    "hamilton_conv2d_pool": lambda x, weight, bias, tiles, tickets, window, *_, out_shape: _pooled(x, weight, window),
    "hamilton_conv2d_dx": lambda dy, weight, *_, out_shape: _hamilton(dy, weight),
    "hamilton_conv2d_dw": lambda dy, *_, out_shape: _hamilton(dy, out_shape[0]),
    "hamilton_linear": lambda x, weight, *_, out_shape: _hamilton(out_shape, weight),
    "hamilton_linear_dx": lambda dy, weight, *_, out_shape: _hamilton(dy, weight),
    "hamilton_linear_dw": lambda dy, *_, out_shape: _hamilton(dy, out_shape[0]),
    "gram_cosine": lambda a, b, stats, triangles, gram, *_, out_shape: _gram(a, triangles, gram, 0),
    "gram_cosine_da": lambda *args, out_shape: _gram(args[4], args[10], args[11], 1),
    "folded_rowwise": lambda trained, *_, out_shape: _folded(trained, 0),
    "folded_rowwise_da": lambda dloss, a, *_, out_shape: _folded(a, 1),
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.qkernels, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas behind the import of PyTorch's counter, which imports Triton: nothing here does."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == COUNTER else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """Registers the formulas of the operators, which are defined, now or when PyTorch's counter is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
