"""The only import of torchaudio; other modules import it from here."""

import sys
import types

try:
    import torchaudio
except OSError:
    # With a CPU build of torch, torchaudio 2.11's compiled extension does not find libc10_cuda.so and the whole package
    # fails to import, although only forced_align and rnnt_loss need it. With a stub in its place everything else
    # (transforms, functional, datasets) works.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]  # half-initialised by the failed import
    _stub = types.ModuleType("torchaudio._extension")
    _stub.__path__ = []
    vars(_stub).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=lambda function: function,
    )
    sys.modules["torchaudio._extension"] = _stub
    import torchaudio

__all__ = ["torchaudio"]
