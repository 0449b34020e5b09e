"""Compiles recorded launches for GPUs that are not there, and reads what the machine code uses.

Triton says where its ptxas and cuobjdump are. A launch is specialised as Triton's launcher would do it: an integer of
1 is a constant, integers and addresses divisible by 16 are known to be, but for those that a kernel excepts.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from qkernels.ops._launch import Launch

# Shared memory that a block may use, which Triton does not check; the tiles of sm_80 serve sm_86, sm_89 and sm_120 too.
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}
TENSOR_MEMORY_COLUMNS = 512  # sm_100; above it Triton emits a bare trap
MMA = {80: ("HMMA",), 90: ("HMMA", "HGMMA"), 100: ("HMMA", "UTC")}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
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
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float) and not parameter.is_constexpr:
            signature[name] = "fp32"
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    cubin, ptx = folder / "kernel.cubin", folder / "kernel.ptx"
    cubin.write_bytes(compiled.asm["cubin"])
    ptx.write_text(compiled.asm["ptx"])
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    usage, sass = _run(cuobjdump, "--dump-resource-usage", cubin), _run(cuobjdump, "-sass", cubin)
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert target
    notes = _run(get_ptxas(arch).path, f"-arch={target[1]}", "-v", ptx, "-o", folder / "again.cubin")
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


def _run(tool: str, *arguments: object) -> str:
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
