"""PyTorch's TF32 switches before, in and after `switched`, however a user has set them; prints what differs.

Each setting is tried in a process of its own, forked from this one: what nobody has set cannot be made so again.
"""

import itertools
import os
import sys
import traceback
from typing import Any

import torch

from qkernels.runtime.precision import precision_of, switched

BACKENDS = torch.backends
LEVELS = [
    (BACKENDS, "fp32_precision"),
    (BACKENDS.cudnn, "fp32_precision"),
    (BACKENDS.cudnn.conv, "fp32_precision"),
    (BACKENDS.cuda.matmul, "fp32_precision"),
]
OLD = [(BACKENDS.cudnn, "allow_tf32"), (BACKENDS.cuda.matmul, "allow_tf32")]
SETTINGS = [
    *itertools.product(LEVELS, ("tf32", "ieee")),
    *itertools.product(OLD, (True, False)),
    ((BACKENDS, "fp32_precision"), "bf16"),
    ((BACKENDS.cudnn.conv, "fp32_precision"), "none"),
]


def read() -> Any:
    """All that either API tells; the old one raises where the new one was used."""
    values = [getattr(*each) for each in (*LEVELS, (BACKENDS.cudnn.rnn, "fp32_precision"))]
    for old in (*(lambda each=each: getattr(*each) for each in OLD), torch.get_float32_matmul_precision):
        try:
            values.append(old())
        except RuntimeError:
            values.append("raises")
    return values


def behaviour() -> Any:
    """What is read now, and once an upper level is set to something else: who follows it, and who does not."""
    readings = [read()]
    for place in (BACKENDS, BACKENDS.cudnn):
        for value in ("none", "ieee", "tf32"):
            place.fp32_precision = value
            readings.append(read())
    return readings


def precisions() -> Any:
    return {precision_of(torch.float32, operation) for operation in ("conv", "matmul")}


def after(settings: Any, precision: str) -> Any:
    for (place, name), value in settings:
        setattr(place, name, value)
    if precision:
        before = precisions()
        with switched(precision):
            assert precisions() == {"tf32" if precision == "tf32" else "ieee"}
            with switched("tf32"):
                assert precisions() == {"tf32"}
            assert precisions() == {"tf32" if precision == "tf32" else "ieee"}
        assert precisions() == before
    return behaviour()


def forked(*arguments: Any) -> Any:
    """`repr` of what `after` returns, or its traceback."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = repr(after(*arguments))
        except BaseException:
            result = traceback.format_exc()
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return result


def main() -> None:
    tried = 0
    for count in (0, 1, 2):
        for settings in itertools.permutations(SETTINGS, count):
            expected = forked(settings, None)
            assert "Traceback" not in expected, expected
            for precision in ("tf32", "float32"):
                tried += 1
                if (found := forked(settings, precision)) != expected:
                    names = [f"{place}.{name} = {value}" for (place, name), value in settings]
                    print("after", names, precision, found, "instead of", expected)
    print(f"{tried} tried", file=sys.stderr)


if __name__ == "__main__":
    main()
