"""Compiles kernels in parallel before they are tested or timed.

Triton compiles a kernel at its first launch, in 1 to 9 s, and caches it on disk for all processes. So recorded launches
(`qkernels.runtime.recording`) are compiled in as many processes as there are cores; the launches themselves then only
load the cached kernels.
"""

import importlib
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from joblib import cpu_count

from qkernels.runtime.recording import Launch

COMPILE_CRASHED = "a compiling process died"


class Spec(NamedTuple):
    """The key of one compilation by Triton: kernel, arguments by position (tensors by their type), launch options."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, int], ...]


def spec_of(launch: Launch) -> Spec:
    """The launch, with each integer replaced by one of the same specialisation: 1, divisible by 16, or other."""
    kernel = launch.kernel
    arguments = tuple(
        _typical(launch.arguments[name], parameter.is_constexpr, not parameter.do_not_specialize)
        for parameter, name in zip(kernel.params, kernel.arg_names, strict=True)
    )
    return Spec(kernel.module, kernel.__name__, arguments, tuple(launch.options.items()))


def _typical(value: Any, constant: bool, specialized: bool) -> Any:
    if constant or value is None:
        return value
    if isinstance(value, tuple):  # a NamedTuple, an operand
        return type(value)(*(_typical(field, False, specialized) for field in value))
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, float):
        return 0.5
    if specialized and value == 1:
        return value
    return (0 if value < 2**31 else 2**32) + (16 if specialized and value % 16 == 0 else 3)


def compile_all(launches: Iterable[Launch], seconds: float | None = None) -> tuple[int, list[str]]:
    """Compile every kernel among `launches` once, for the current GPU, until the time is over.

    Returns:
        The number of kernels and the errors, which are not raised: a broken kernel is reported by its test.
    """
    # Longest first: a Hamilton product takes several times as long as a kernel that adds or copies.
    specs = sorted({spec_of(launch) for launch in launches}, key=lambda spec: -len(str(spec.arguments)))
    if not specs:
        return 0, []
    workers = min(len(specs), cpu_count())
    # Spawned, since CUDA does not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            errors = list(pool.map(_compile, specs, timeout=seconds))
        except RuntimeError as error:  # BrokenProcessPool
            errors = [f"{COMPILE_CRASHED}: {error}"]
        except TimeoutError:
            errors = [f"out of time: not all of {len(specs)} kernels were compiled"]
            workers_left = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers_left:
                worker.kill()
    return len(specs), [error for error in errors if error]


def _compile(spec: Spec) -> str | None:
    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    try:
        kernel.warmup(*map(_mocked, spec.arguments), grid=(1,), **dict(spec.options))
    except Exception as error:  # whatever the compiler raises
        return f"{spec.kernel}: {type(error).__name__}: {error}"
    return None


def _mocked(value: Any) -> Any:
    from triton.runtime.jit import MockTensor

    if isinstance(value, tuple):
        return type(value)(*map(_mocked, value))
    return MockTensor(value) if isinstance(value, torch.dtype) else value
