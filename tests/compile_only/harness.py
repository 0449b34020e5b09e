"""Compiles recorded launches for GPUs that are not there, and reads what the machine code uses.

Triton's own wheel brings ptxas and cuobjdump. A launch is specialised as Triton's launcher would do it: an integer of
1 is a constant, integers and addresses divisible by 16 are known to be, but for those that a kernel excepts.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkernels.ops._launch import Launch

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that a block may use, which Triton does not check; the tiles of sm_80 serve sm_86, sm_89 and sm_120 too.
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}
TENSOR_MEMORY_COLUMNS = 512  # sm_100; above it Triton emits a bare trap
MMA = {80: ("HMMA",), 90: ("HMMA", "HGMMA"), 100: ("HMMA", "UTC")}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs of its GPU."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    mma: int
    wgmma: int
    trap: bool
    notes: tuple[str, ...]

    def problems(self, arch: int, tensor_cores: bool) -> list[str]:
        """Why the kernel must not ship."""
        found = []
        if self.stack or self.spills:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} local loads and stores")
        if self.shared > SHARED_BYTES[arch]:
            found.append(f"{self.shared} bytes of shared memory, more than {SHARED_BYTES[arch]}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS or self.trap:
            found.append(f"{self.tensor_memory} columns of tensor memory, trap: {self.trap}")
        if tensor_cores and not self.mma:
            found.append("no tensor-core instruction")
        if self.notes:
            found.append(f"ptxas notes {', '.join(self.notes)}")
        return found


def compile_launch(launch: Launch, arch: int, folder: Path) -> Usage:
    """Compiles for sm_`arch`; `folder` takes the intermediate files."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, name) in enumerate(zip(launch.kernel.params, launch.kernel.arg_names, strict=True)):
        special = not parameter.do_not_specialize
        kind = _specialised(launch.arguments[name], (index,), parameter.is_constexpr, special, constants, attributes)
        signature[name] = kind
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    cubin, ptx = folder / "kernel.cubin", folder / "kernel.ptx"
    cubin.write_bytes(compiled.asm["cubin"])
    ptx.write_text(compiled.asm["ptx"])
    usage, sass = _run("cuobjdump", "--dump-resource-usage", cubin), _run("cuobjdump", "-sass", cubin)
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert target
    ptxas = "ptxas-blackwell" if arch >= 100 and (BIN / "ptxas-blackwell").exists() else "ptxas"
    notes = _run(ptxas, f"-arch={target[1]}", "-v", ptx, "-o", folder / "again.cubin")
    mma = sum(len(re.findall(rf"\b{name}\w*", sass)) for name in MMA[arch])
    return Usage(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        mma=mma,
        wgmma=len(re.findall(r"\b(?:HGMMA|UTC\w*MMA)", sass)),
        trap="BPT.TRAP" in sass and not mma,
        notes=tuple(sorted(set(re.findall(r"C75\d\d", notes)))),
    )


def _specialised(value, path, constant, special, constants, attributes):
    """The type of an argument, of a tuple that of each of its fields; notes what is known of its value at this path."""
    if isinstance(value, tuple) and not constant:
        fields = enumerate(value)
        return type(value)(*(_specialised(one, (*path, i), False, special, constants, attributes) for i, one in fields))
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return TYPES[value.dtype]
    if constant or value is None or (special and value == 1 and isinstance(value, int)):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if special and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _run(tool: str, *arguments: object) -> str:
    done = subprocess.run([BIN / tool, *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
