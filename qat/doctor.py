"""``qat doctor``: installed parts, and whether they work on this machine; for new users and bug reports."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

NEEDED_FOR = {
    "soundfile": "reading audio",
    "soxr": "resampling",
    "jsonargparse": "the command line",
    "torchmetrics": "metrics",
    "sklearn": "linear probes",
    "matplotlib": "the report",
    "tensorboard": "TensorBoard events",
    "submitit": "sweeps and grids",
    "filelock": "locks",
    "joblib": "worker processes",
    "praatio": "word alignments as TextGrids",
    "espeakng_loader": "the demo corpus",
    "triton": "kernels on NVIDIA GPUs",
}


def examine() -> dict[str, Any]:
    """The environment report of ``qkernels``, then ``ok`` or an error for each part, and on a GPU for the kernels."""
    from qkernels.runtime.__main__ import report as environment

    report: dict[str, Any] = dict(environment())
    for module, purpose in NEEDED_FOR.items():
        report[f"{module} ({purpose})"] = _import(module)
    report["torchaudio (spectrograms)"] = _import("qat.data.torchaudio_import", "torchaudio")
    report["apt-get (corpus fetch)"] = (
        "ok" if shutil.which("apt-get") else "not found; use --from with downloaded packages"
    )
    if report["gpus"] != "none":
        report["kernels (python -m qkernels.runtime --check)"] = _kernels()
    return report


def _kernels() -> str:
    from qkernels.runtime.__main__ import obstacle

    if reason := obstacle():
        return f"cannot run: {reason}"
    from qkernels.runtime import check

    start = time.monotonic()
    verdicts = check.run(lambda line: print(line, file=sys.stderr, flush=True))
    return check.summary(verdicts, time.monotonic() - start)


def _import(module: str, distribution: str | None = None) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation can raise anything, which is what the report shows
        return f"missing: {error}"
    try:
        return f"ok, {version(distribution or module)}"
    except PackageNotFoundError:
        return "ok"
