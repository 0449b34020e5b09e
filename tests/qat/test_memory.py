"""Freed memory is kept: the next arrays of the same size cost no page faults."""

import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from qat.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def use():
    array = libc.malloc(ctypes.c_size_t(SIZE))
    libc.memset(ctypes.c_void_p(array), 1, ctypes.c_size_t(SIZE))
    libc.free(array)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
SIZE = 40 << 20


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS.replace("SIZE", str(SIZE)), mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_arrays_of_a_size_take_the_same_memory() -> None:
    pages = SIZE // resource.getpagesize()
    assert faults("keep") < pages // 10
    assert faults("default") > 4 * pages  # else the setting has no purpose any more
