"""`python -m qkernels.runtime`: a description of the machine for bug reports; --check: which kernels are right."""

import argparse
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qkernels import runtime

# Exit codes of --check.
ALL_RIGHT, NOT_ALL_RIGHT, CANNOT_RUN = 0, 1, 2


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver_version() -> str:
    """Version of NVIDIA's driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "not found"
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return version[0] if version else "unknown"


def compiler() -> str:
    """The C compiler that Triton would use to build its launchers."""
    named = os.environ.get("CC")
    path = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if path:
        return f"ok, {path}"
    problem = f"CC={named} is not there" if named else "no gcc or clang"
    return (
        f"missing: {problem}, and without one Triton cannot launch a kernel; install one (apt-get install gcc, conda "
        "install -c conda-forge gcc, on a cluster: module load gcc), or name it in CC"
    )


def python_headers() -> str:
    """Python's headers, which that compiler includes."""
    # As in Triton: Debian's own scheme names a folder without headers.
    scheme = sysconfig.get_default_scheme()
    folder = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if (folder / "Python.h").is_file():
        return f"ok, {folder}"
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return (
        f"missing: no {folder / 'Python.h'}, and without it Triton cannot launch a kernel; install {package} (apt-get) "
        f"or {package}el (dnf), or take a Python of conda or uv, which brings it"
    )


def triton_cache() -> str:
    """The folder of Triton's compiled kernels."""
    named = os.environ.get("TRITON_CACHE_DIR")
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # as Triton, also where nobody has a home
    folder = Path(named) if named else Path(home, ".triton", "cache")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    remedy = "name another folder in TRITON_CACHE_DIR"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        if os.statvfs(existing).f_flag & os.ST_NOEXEC:
            return f"unusable: nothing can be executed in {existing}, a file system mounted with noexec; {remedy}"
    except OSError as error:
        return f"unusable: nothing can be written in {existing} ({error.strerror}), for {folder}; {remedy}"
    return f"ok, {folder}"


def report() -> dict[str, str]:
    """Versions, processors, settings, and the requirements of Triton, as printed."""
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
        "driver": driver_version(),
        "gpus": ", ".join(gpus) or "none",
        "C compiler": compiler(),
        "Python headers": python_headers(),
        "Triton cache": triton_cache(),
        "QKERNELS_BACKEND": os.environ.get("QKERNELS_BACKEND", "not set"),
        **dict(zip(("backend", "form"), runtime.settings(), strict=True)),
    }


def check(path: Path | None = None, select: Callable[[str], bool] = lambda name: True) -> int:
    """Prints which kernels are right on this machine, writes it to `path`, and returns the exit code.

    Args:
        path: JSON file to write, `{"environment": {...}, "kernels": {name: "right" or the fault}}`.
        select: whether a check, given its name, is run.
    """
    if reason := obstacle():
        print(f"the kernels cannot run: {reason}", flush=True)
        return CANNOT_RUN
    from qkernels.runtime import check as checks

    environment, start = report(), time.monotonic()
    say = functools.partial(print, flush=True)
    verdicts = checks.run(say, select)
    say(checks.summary(verdicts, time.monotonic() - start))
    try:
        if path:
            checks.write(path, environment, verdicts)
    except OSError as error:
        say(f"the verdicts cannot be written to {path}: {error.strerror}")
        return CANNOT_RUN
    return ALL_RIGHT if set(verdicts.values()) <= {checks.RIGHT} else NOT_ALL_RIGHT


def obstacle() -> str | None:
    """The reason why no kernel can run here, if any."""
    place = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    reason = runtime._obstacle(place)
    if reason and runtime.HAS_TRITON and not place.is_cuda:
        return "PyTorch sees no GPU; with TRITON_INTERPRET=1 they are checked in Triton's interpreter, on a CPU"
    return reason


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m qkernels.runtime", description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="check every kernel against float64 on this GPU; exit code 0: all are right, 1: not, 2: none can run",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: JSON file for the verdicts")
    options = parser.parse_args(arguments)
    if options.json and not options.check:
        parser.error("--json needs --check")
    for key, value in report().items():
        print(f"{key:17} {value}", flush=True)
    return check(options.json) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
