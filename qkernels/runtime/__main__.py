"""`python -m qkernels.runtime`: what a bug report should say about the machine."""

import importlib.metadata
import os
import platform

import torch

from qkernels import runtime


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Model of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report() -> dict[str, str]:
    """Versions, processors and settings, as printed."""
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return {
        "qat-ser": _version("qat-ser"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda or "not in this build of torch",
        "gpus": ", ".join(gpus) or "none",
        "QKERNELS_BACKEND": os.environ.get("QKERNELS_BACKEND", "not set"),
        "backend": runtime._settings.backend,
        "form": runtime._settings.form,
    }


if __name__ == "__main__":
    for key, value in report().items():
        print(f"{key:17} {value}")
