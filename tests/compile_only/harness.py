"""Compiles recorded launches for GPUs that are not there, and reads what the machine code uses.

Triton's own wheel brings ptxas and cuobjdump. A launch is specialised by Triton's own launcher, which
looks at nothing of a tensor but its type and address.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from qkernels.runtime.recording import Launch
from tests.compile_only.machine_code import Code

# Shared memory that a block may use, which Triton does not check; the tiles of sm_80 serve sm_86, sm_89 and sm_120 too.
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_MEMORY_COLUMNS = 512  # sm_100; above it Triton emits a bare trap
PTX_MMA = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
SASS_MMA = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop of products, read from the PTX: ptxas may unroll it.

    Args:
        mma: tensor-core instructions.
        waits: of each wait for the tensor core (`wgmma.wait_group`) how many products may still run.
        fences: `fence.proxy` and `membar`; the only use of one is to let the tensor core see what copies wrote.
        copies: bytes of each asynchronous copy of a thread.
        loads: plain loads from global memory.
        stores: stores to shared memory, of an operand that was in registers.
        stages: iterations for which there is shared memory, 1 where nothing is copied ahead.
    """

    mma: int
    waits: tuple[int, ...]
    fences: int
    copies: tuple[int, ...]
    loads: int
    stores: int
    stages: int


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs of its GPU. To disassemble it takes 0.4 s, and is done for what is asked.

    Args:
        folder: of kernel.ptx and kernel.cubin.
        ptx: text that machine code is made from. Which operations the tensor core does, Triton decides there.
        ptxas: assembler of the architecture.
        stack: bytes of memory of a thread.
        loops: the innermost ones that hold products.
    """

    folder: Path
    ptx: str
    ptxas: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    loops: tuple[Loop, ...]

    @cached_property
    def sass(self) -> str:
        """The machine code."""
        return _run(knobs.nvidia.cuobjdump.path, "-sass", self.folder / "kernel.cubin")

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What ptxas notes on loops of products."""
        wanted = re.search(r"\.target (\w+)", self.ptx)
        assert wanted
        again = ("-v", self.folder / "kernel.ptx", "-o", self.folder / "again.cubin")
        return tuple(sorted(set(re.findall(r"C75\d\d", _run(self.ptxas, f"-arch={wanted[1]}", *again)))))

    @property
    def spills(self) -> int:
        """Loads and stores of a thread's own memory: without a stack there is none."""
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass)) if self.stack else 0

    @property
    def trap(self) -> bool:
        """Whether it is nothing but a trap."""
        return "trap;" in self.ptx and not PTX_MMA.search(self.ptx)

    @property
    def waits(self) -> int:
        """For the tensor core, in the whole kernel."""
        return self.ptx.count("wgmma.wait_group")

    @property
    def mma(self) -> int:
        """Tensor-core instructions of the machine code."""
        return len(SASS_MMA.findall(self.sass))

    @property
    def instructions(self) -> int:
        """Of the whole kernel."""
        return sum(1 for line in Code.of_sass(self.sass).lines if line != "NOP")

    @property
    def step_instructions(self) -> int:
        """Of an iteration of the largest loop of products; without one, of a product."""
        return _step_instructions(Code.of_sass(self.sass), max((loop.mma for loop in self.loops), default=1))

    def problems(
        self, arch: int, tensor_cores: bool, stages: int = 0, copy_bytes: int = 16, gated: bool = False
    ) -> list[str]:
        """Why the kernel must not ship.

        Args:
            tensor_cores: it must use them.
            stages: its loops must copy operands so many iterations ahead, and run products without waiting; 0 asks for
                nothing of this.
            copy_bytes: the narrowest copy that is allowed.
            gated: the first operand is changed in registers. On sm_90 its product is started in pieces then, two or
                four by Triton's version, and each waits for one before, not for itself.
        """
        found = []
        if self.stack or self.spills:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} local loads and stores")
        if self.shared > SHARED_BYTES[arch]:
            found.append(f"{self.shared} bytes of shared memory, more than {SHARED_BYTES[arch]}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS or self.trap:
            found.append(f"{self.tensor_memory} columns of tensor memory, trap: {self.trap}")
        if tensor_cores and not PTX_MMA.search(self.ptx):
            found.append("no tensor-core instruction")
        # Without a loop a product is waited for once, where its sum is used, which ptxas notes too.
        if self.loops and self.notes:
            found.append(f"ptxas notes {', '.join(self.notes)}")
        if stages:
            found += self.serialised(arch, stages, copy_bytes, gated)
        return found

    def serialised(self, arch: int, stages: int, copy_bytes: int = 16, gated: bool = False) -> Iterator[str]:
        """What the loops of products wait for."""
        if arch == 90 and not gated and self.waits > 2:
            yield f"waits {self.waits} times for the tensor core"
        for loop in self.loops:
            if arch == 90 and (0 in loop.waits or (len(loop.waits) > 1 and not gated)):
                yield f"an iteration waits for the tensor core, until so many products are left: {loop.waits}"
            if loop.fences > 1 + gated:
                yield f"{loop.fences} fences an iteration"
            if loop.stores or loop.loads:
                yield f"{loop.loads} plain loads and {loop.stores} stores to shared memory an iteration"
            if narrow := [size for size in loop.copies if size < copy_bytes]:
                yield f"{len(narrow)} of {len(loop.copies)} copies an iteration have {min(narrow)} bytes"
            if loop.stages != stages:
                yield f"a pipeline of {loop.stages} stages instead of {stages}"


class _Address:
    """What Triton's launcher looks at in a tensor."""

    def __init__(self, x: torch.Tensor, aligned: bool) -> None:
        self.dtype = x.dtype
        self._at = x.element_size() * (x.storage_offset() if aligned else 1)

    def data_ptr(self) -> int:
        return int(self._at)


def _addressed(value: Any, aligned: bool) -> Any:
    """With addresses for the tensors of an argument, which may be a (named) tuple of tuples."""
    if isinstance(value, torch.Tensor):
        return _Address(value, aligned)
    if isinstance(value, tuple):
        inner = [_addressed(part, aligned) for part in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return value


def compile_launch(launch: Launch, arch: int, folder: Path, aligned: bool = True) -> Usage:
    """Compiles for sm_`arch`; a new folder in `folder` takes the files.

    Args:
        aligned: memory begins at multiples of 16 bytes, and views of it where they do; otherwise no tensor does.
    """
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    given = {name: _addressed(value, aligned) for name, value in launch.arguments.items()} | launch.options
    bound, specialised, options = bind(**given)
    _, *source = launch.kernel._pack_args(backend, given, bound, specialised, options)
    compiled = triton.compile(ASTSource(launch.kernel, *source), target=target, options=launch.options)
    ptx, own = compiled.asm["ptx"], Path(tempfile.mkdtemp(dir=folder))
    (own / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    (own / "kernel.ptx").write_text(ptx)
    resources = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", own / "kernel.cubin")
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    return Usage(
        folder=own,
        ptx=ptx,
        ptxas=get_ptxas(arch).path,
        registers=found["REG"],
        stack=found["STACK"] + found["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        loops=tuple(_loop(lines) for lines in Code.of_ptx(ptx).loops(PTX_MMA)),
    )


def _loop(lines: list[str]) -> Loop:
    text = "\n".join(lines)
    groups, left = text.count("cp.async.commit_group"), re.findall(r"cp\.async\.wait_group\s+(\d+)", text)
    # A wait leaves so many groups on their way; one iteration's have arrived, and another's are asked for behind it.
    ahead = min(map(int, left)) // groups + 2 if groups and left else 1
    return Loop(
        mma=len(PTX_MMA.findall(text)),
        waits=tuple(int(n) for n in re.findall(r"wgmma\.wait_group\S*\s+(\d+)", text)),
        fences=len(re.findall(r"\bfence\.proxy|\bmembar", text)),
        copies=tuple(int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\.[^;]*\],\s*(\w+)", text)),
        loads=len(re.findall(r"\bld\.global", text)),
        stores=len(re.findall(r"\b(?:st\.shared|stmatrix)", text)),
        stages=ahead,
    )


def _step_instructions(sass: Code, mma: int) -> int:
    """In machine code, of as many products as an iteration has, however often ptxas unrolled the loop."""
    loops = [*sass.loops(SASS_MMA), sass.lines] if SASS_MMA.search("\n".join(sass.lines)) else []
    counted = [(sum(1 for line in loop if SASS_MMA.search(line)), len(loop)) for loop in loops]
    products, size = max(counted[:-1] or counted, default=(1, 0))
    return round(size * mma / products)


def _run(tool: object, *arguments: object) -> str:
    done = subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
