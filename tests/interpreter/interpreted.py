"""What the tests in Triton's interpreter share: launch settings, a check of memory, errors against float64.

The interpreter runs one program after the other in NumPy, and a step of a kernel costs some 20 ms: shapes are tiny, and
tiles made to measure.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import config
from qkernels.ops.hamilton_conv.config import Plan, Tile

FORMS = ("signed", "q8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Form and precision of a product, and the type of its maps: all that there are.
KINDS = (
    ("signed-ieee", torch.float32),
    ("q8-ieee", torch.float32),
    ("signed-half", torch.float16),
    ("signed-tf32", torch.float32),
    ("signed-half", torch.bfloat16),
)

# Relative Frobenius errors against the exact result of the operands as they are multiplied: one rounding of the result.
# The interpreter cuts float32 off where hardware rounds it to bfloat16 (test_interpreter_cuts_bfloat16_off): an error
# of up to one unit instead of half of one, so twice the bound.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 2 * 2.1e-3}
# The largest error of a single element, in RMS + its size, may be this many times the Frobenius figure.
OF_ONE_ELEMENT = 6
# The figures are root mean squares; an even spread of errors ends at sqrt(3) times that, where all of a few may lie.
# Maps whose padding is wider than their kernel hold the bias in most places: few values, each rounded once.
FEW_ELEMENTS, OF_FEW_ELEMENTS = 100, 3**0.5


class Tiles:
    """Replaces `config.plan`: few programs as large as the problem ("whole"), or several along each axis ("cut").

    Of few channels both have flat tiles and others: "whole" ones are flat where no power of two fits the channels.

    Args:
        monkeypatch: pytest's.

    Attributes:
        style: "whole", "cut" or a `Tile`.
        splits: programs that share one sum, or as many as have a step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.style: str | Tile = "whole"
        self.splits = 1
        monkeypatch.setattr(config, "plan", self.plan)

    def plan(self, problem: config.Problem, form: str, precision: str, arch: int, multiprocessors: int) -> Plan:
        tile = self.style if isinstance(self.style, Tile) else self._tile(problem, form)
        return Plan(form, precision, tile, config.whole_splits(problem.steps(form, tile), self.splits))

    def _tile(self, problem: config.Problem, form: str) -> Tile:
        n, k, pixels = problem.n, problem.k, problem.pixels
        if problem.kernel == "dw" and self.splits > 1:
            # Half the pixels at most: a sum of one step cannot be shared.
            pixels = -(-pixels // (self.splits + 1))
        if self.style == "cut":
            return Tile(_half(pixels, 8 if problem.kernel == "dw" else 16), _half(n, 2), _half(k, 2), 4, 1)
        if form == "signed" and k < 32 and (problem.kernel == "dw" or self.splits == 1):
            # Flat: one step, or one block, for several positions, of a gather for all components too.
            k *= problem.positions * (1 if problem.kernel == "dw" else 4)
        return Tile(_power_of_two(pixels, 16, 512), _power_of_two(n, 4, 64), _power_of_two(k, 4, 64), 4, 1)


def _power_of_two(size: int, least: int, most: int) -> int:
    return min(max(1 << (size - 1).bit_length(), least), most)


def _half(size: int, least: int) -> int:
    """The largest power of two below `size`: two tiles, the second one with a tail."""
    return min(max(1 << max((size - 1).bit_length() - 1, 0), least), 64)


class MemoryCheck:
    """Compute-sanitizer's memcheck and a part of its racecheck, for the interpreter.

    A masked-out element may point anywhere; every other one must lie within one tensor of the launch. Programs of a
    launch run in no order, so none may write what another writes. Atomics may count, but not add floats, which would
    not be deterministic; and counters that the kernels of a layer share are zeros behind each.

    Args:
        monkeypatch: pytest's.

    Attributes:
        launches: so far.
        counted: the launches whose programs counted each other.
        backwards: the last program comes first.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted: list[str] = []
        self.backwards = False
        self.launches = 0
        self.tensors: list[tuple[int, int, str]] = []
        self.written: list[np.ndarray] = []
        self.kernel = ""
        native = interpreter._interpreter
        self._run, self._load, self._store, self._count = _launch.run, native.load, native.store, native.atomic_rmw
        monkeypatch.setattr(_launch, "run", self.run)
        monkeypatch.setattr(interpreter, "_interpreter", self)
        self._place = interpreter.interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", self.place)
        # For each call of a device function Triton makes all of its language interpretable again, a third of the time.
        self.patched: set[tuple[str, ...]] = set()
        self.languages: dict[int, tuple[str, ...]] = {}  # names of Triton's language, by module
        self._patch = interpreter._patch_lang
        monkeypatch.setattr(interpreter, "_patch_lang", self.patch)
        # Whether integers overflow took half of the time, and is told to nobody without the option `debug`.
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        # And a table of all types was made for each use of one.
        self.types: dict[str, np.dtype] = {}
        self._type = interpreter._get_np_dtype
        monkeypatch.setattr(interpreter, "_get_np_dtype", self.type)

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *options: int, **named: int) -> None:
        self.tensors = [(t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in _tensors("", arguments)]
        self.written, self.kernel = [], kernel.fn.__name__
        self.patched.clear()
        self.launches += 1
        self._run(kernel, grid, arguments, *options, **named)
        addresses = np.concatenate(self.written) if self.written else np.zeros(0, np.uint64)
        assert len(np.unique(addresses)) == len(addresses), f"{self.kernel} writes elements twice"
        tickets = arguments.get("ticket_ptr")
        # The Gram cosine's single counter is made, and zeroed, for each call.
        if tickets is not None and tickets.dtype == torch.int32 and tickets.numel() > 1:
            assert not tickets.any(), f"{self.kernel} leaves its counters at {tickets.unique().tolist()}"

    def place(self, *index: int) -> None:
        size = interpreter.interpreter_builder.grid_dim
        self._place(*(n - 1 - i for n, i in zip(size, index, strict=True)) if self.backwards else index)

    def patch(self, function: Callable[..., Any]) -> Any:
        names = function.__globals__
        if (languages := self.languages.get(id(names))) is None:
            languages = tuple(name for name, value in names.items() if value in (tl, tl.core))
            self.languages[id(names)] = languages
        if languages in self.patched:
            return None
        self.patched.add(languages)
        return self._patch(function)

    def type(self, dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in self.types:
            self.types[name] = self._type(dtype)
        return self.types[name]

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        self._check("reads", pointers[mask], np.dtype(dtype).itemsize)
        return self._load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self._check("writes", pointers[mask], value.itemsize)
        self.written.append(pointers[mask].ravel())
        return self._store(pointers, value, mask)

    def atomic_rmw(
        self, op: Callable[..., Any], pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any
    ) -> Any:
        assert value.dtype.kind == "i", f"{self.kernel} adds {value.dtype} in any order"
        self._check("counts", pointers[mask], value.itemsize)
        self.counted.append(self.kernel)
        return self._count(op, pointers, value, mask, order)

    def _check(self, verb: str, addresses: np.ndarray, size: int) -> None:
        if not self.tensors or addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max()) + size
        if not any(start <= first and last <= end for start, end, _ in self.tensors):
            names = [name for start, end, name in self.tensors if start <= int(np.median(addresses)) < end]
            raise AssertionError(f"{self.kernel} {verb} outside of its tensors, near {names or 'none of them'}")


def _tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """All tensors among a kernel's arguments, those of tuples too."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    parts: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return [found for key, part in parts for found in _tensors(f"{name}.{key}".lstrip("."), part)]


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    if x.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def assert_accurate(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Both norms of section 4 of the tolerances: Frobenius, and of a single element."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    error, size = (actual.double() - exact).abs(), exact.norm()
    if exact.unique().numel() < FEW_ELEMENTS:
        tolerance *= OF_FEW_ELEMENTS
    assert error.norm() <= tolerance * size, f"relative error {error.norm() / size:.2e}"
    rms = size / max(exact.numel(), 1) ** 0.5
    worst = (error / (rms + exact.abs()).clamp_min(1e-300)).max() if exact.numel() else torch.zeros(())
    assert worst <= OF_ONE_ELEMENT * tolerance, f"error of one element {worst:.2e}"


def in_nan(x: torch.Tensor) -> torch.Tensor:
    """A copy in the middle of a larger batch of NaN, in dense NHWC and behind a multiple of 16 bytes: read in place."""
    fill = float("nan") if x.is_floating_point() else 3
    batch, channels, *size = x.shape
    larger = torch.full((batch + 5, channels, *size), fill, dtype=x.dtype).to(memory_format=torch.channels_last)
    larger[4:-1] = x
    return larger[4:-1].detach()


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest multiple of 2^-10 of the power of two below, ties away from zero, in float64."""
    mantissa, exponent = torch.frexp(x.double())  # mantissas from 1/2 on
    return torch.ldexp(mantissa.sign() * (mantissa.abs() * 2**11 + 0.5).floor(), exponent - 11)


def cut(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 to a type as the interpreter does it, see test_interpreter_cuts_bfloat16_off."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32).to(dtype) if dtype == torch.bfloat16 else x.to(dtype)


def multiplied(x: torch.Tensor, algorithm: str) -> torch.Tensor:
    """An operand as the products take it, in float64."""
    return to_tf32(x) if algorithm.endswith("tf32") else x.double()
