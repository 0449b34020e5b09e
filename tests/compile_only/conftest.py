"""Nothing is compiled where Triton is missing (it is for Linux only), or where it interprets."""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
