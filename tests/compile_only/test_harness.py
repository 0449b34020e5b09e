"""What the harness reads from machine code, of small products that are known to be good or bad."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from qkernels.runtime.recording import Launch
from tests.compile_only.harness import Usage, compile_launch
from tests.compile_only.machine_code import Code

# All of them compute y [M, N] from a [M, K] and b [K, N] in tiles of M x N.
M, N, K, BLOCK_K = 128, 128, 4096, 64


class Operands(NamedTuple):
    a: Any
    b: Any
    gates: tuple[Any, Any]  # of a and b


class Sizes(NamedTuple):
    rows: int
    steps: int


@dataclass(frozen=True)
class How:
    """Of a product: the tile, the length of a row, which way b lies in memory, and whether each step scales the sum."""

    m: int = M
    n: int = N
    k: int = BLOCK_K
    row: int = K
    transposed: bool = False
    scaled: bool = False


@triton.jit
def _factor(operand, gate, at):
    x = tl.load(operand + at)
    if gate is not None:
        x = tl.where(tl.load(gate + at) > 0, x, 0.0)
    return x


@triton.jit(do_not_specialize=["steps"])
def _product_kernel(operands, y, steps, HOW: tl.constexpr):
    BLOCK_M: tl.constexpr = HOW.m
    BLOCK_N: tl.constexpr = HOW.n
    STRIDE_K: tl.constexpr = 1 if HOW.transposed else HOW.n
    STRIDE_N: tl.constexpr = HOW.row if HOW.transposed else 1
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, HOW.k)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(steps > 0)
    for step in range(steps):
        a = _factor(operands.a, operands.gates[0], m[:, None] * HOW.row + step * HOW.k + k[None, :])
        b = _factor(operands.b, operands.gates[1], (step * HOW.k + k)[:, None] * STRIDE_K + n[None, :] * STRIDE_N)
        acc = tl.dot(a, b, acc)
        if HOW.scaled:
            acc *= 0.5
    tl.store(y + m[:, None] * HOW.n + n[None, :], acc)


@triton.jit
def _flat_kernel(a, b, y, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.load(a + at) + steps
    if b is not None:
        total += tl.load(b + at)
    tl.store(y + at, total)


@triton.jit
def _named_kernel(operands, y, sizes, HOW: tl.constexpr):
    at = tl.arange(0, HOW.n)
    total = tl.load(operands.a + at) + sizes.steps
    if operands.b is not None:
        total += tl.load(operands.b + at)
    tl.store(y + at, total)


def operands(gated: str = "", dtype: torch.dtype = torch.bfloat16) -> Any:
    a, b = torch.empty(M, K, dtype=dtype, device="meta"), torch.empty(K, N, dtype=dtype, device="meta")
    return Operands(a, b, (a if gated == "a" else None, b if gated == "b" else None))


def usage(
    folder: Path,
    arch: int = 90,
    stages: int = 3,
    gated: str = "",
    aligned: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> Usage:
    how = How(k=128 // dtype.itemsize, **settings) if arch in (90, 100) else How(64, 64, 32, **settings)
    y = torch.empty(M, N, device="meta")
    arguments = {"operands": operands(gated, dtype), "y": y, "steps": K // how.k, "HOW": how}
    options = {"num_warps": 8 if arch in (90, 100) else 4, "num_stages": stages}
    return compile_launch(Launch(_product_kernel, (1,), arguments, options), arch, folder, aligned)


def text(found: list[str]) -> str:
    return "; ".join(found)


@pytest.mark.parametrize(("arch", "stages"), [(90, 3), (80, 2), (80, 3), (80, 4), (100, 3), (120, 3)])
def test_a_pipelined_product_passes(arch: int, stages: int, tmp_path: Path) -> None:
    found = usage(tmp_path, arch, stages)
    (loop,) = found.loops
    assert found.problems(arch, tensor_cores=True, stages=stages) == []
    assert loop.waits == ((1,) if arch == 90 else ())
    assert found.waits == (2 if arch == 90 else 0)
    assert loop.copies == (16,) * (8 if arch in (90, 100) else 4)
    assert (loop.loads, loop.stores, loop.stages) == (0, 0, stages)
    assert "instead of" in text(found.problems(arch, tensor_cores=True, stages=stages + 1))
    assert 20 < found.step_instructions < found.instructions
    assert found.mma > 0, "what PTX says of the tensor core is so in machine code"


def test_a_product_in_tf32_needs_both_operands_along_k(tmp_path: Path) -> None:
    """The tensor core reads 4-byte types in no other way: else they are copied by the element."""
    found = usage(tmp_path, dtype=torch.float32, transposed=True)
    assert found.problems(90, tensor_cores=True, stages=3) == []
    found = usage(tmp_path, dtype=torch.float32)
    assert "4 bytes" in text(found.problems(90, tensor_cores=True, stages=3))


def test_a_sum_that_is_used_in_its_iteration_is_waited_for(tmp_path: Path) -> None:
    found = usage(tmp_path, scaled=True)
    assert found.loops[0].waits == (0,)
    assert found.problems(90, tensor_cores=True) == []
    assert "waits for the tensor core" in text(found.problems(90, tensor_cores=True, stages=3))


def test_a_gated_first_operand_is_multiplied_from_registers(tmp_path: Path) -> None:
    """In pieces, of which others run while one is waited for: in two by Triton 3.7, in four by 3.6."""
    found = usage(tmp_path, gated="a")
    assert found.loops[0].stores == 0
    assert found.loops[0].waits in ((1, 1), (3, 3, 3, 3))
    assert "waits" in text(found.problems(90, tensor_cores=True, stages=3))
    assert found.problems(90, tensor_cores=True, stages=3, gated=True) == []
    found = usage(tmp_path, gated="a", scaled=True)
    assert "waits" in text(found.problems(90, tensor_cores=True, stages=3, gated=True))


def test_a_gated_second_operand_goes_through_registers(tmp_path: Path) -> None:
    """The tensor core of sm_90 reads it from shared memory, into which each iteration has to store it again."""
    found = usage(tmp_path, gated="b")
    assert found.loops[0].stores > 0
    assert found.loops[0].fences == 1
    assert "stores to shared memory" in text(found.problems(90, tensor_cores=True, stages=3))


def test_unaligned_operands_are_loaded_by_the_element(tmp_path: Path) -> None:
    found = usage(tmp_path, aligned=False)
    assert found.loops[0].copies == ()
    assert found.loops[0].loads == M * BLOCK_K * 2 // 256
    assert "plain loads" in text(found.problems(90, tensor_cores=True, stages=3))


def test_narrow_copies_are_refused_unless_asked_for(tmp_path: Path) -> None:
    """Rows of an odd number of 8 bytes, which nothing but the shape says."""
    found = usage(tmp_path, row=4100)
    assert set(found.loops[0].copies) == {8, 16}
    assert "8 bytes" in text(found.problems(90, tensor_cores=True, stages=3))
    assert found.problems(90, tensor_cores=True, stages=3, copy_bytes=8) == []


def test_arguments_may_be_named(tmp_path: Path) -> None:
    """And nested, missing and constant; machine code is that of the same arguments one by one."""
    x = torch.empty(1024, device="meta")
    options = {"num_warps": 4, "num_stages": 1}
    for b in (x[1:], None):
        flat = {"a": x, "b": b, "y": x, "steps": 3, "BLOCK": 512}
        named = {"operands": Operands(x, b, (None, None)), "y": x, "sizes": Sizes(1, 3), "HOW": How(n=512)}
        code = []
        for kernel, arguments in ((_flat_kernel, flat), (_named_kernel, named)):
            found = compile_launch(Launch(kernel, (1,), arguments, options), 80, tmp_path)
            code.append(re.findall(r"\b(?:ld|st)\.global\S*", found.ptx))
        assert code[0] == code[1]
        # Where the second operand begins is no multiple of 16 bytes.
        assert [name.partition(".b32")[0] for name in code[0]].count("ld.global") == (4 if b is not None else 0)


PTX = """
.visible .entry _kernel(
	.param .u64 _kernel_param_0
)
{
	.reg .pred 	%p<3>;
	mov.u32 	%r1, 0;
$L__BB0_1:
	bra.uni 	$L__BB0_3;
$L__BB0_2:                              //   in Loop: Header=BB0_3 Depth=2
	{
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r2], %r3;
	@!complete bra.uni waitLoop;
	}
	add.s32 	%r1, %r1, 1;
	@%p2 bra 	$L__BB0_3;
	bra.uni 	$L__BB0_4;
$L__BB0_3:
	@%p1 bra 	$L__BB0_2;
	mma.sync.aligned.m16n8k16 a;
	bra.uni 	$L__BB0_2;
$L__BB0_4:
	@%p2 bra 	$L__BB0_1;
	{
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r2], %r3;
	@!complete bra.uni waitLoop;
	}
	st.global.b32 	[%rd1], %r1;
	ret;
}
"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00 */
                                                            /* 0x01 */
        /*0010*/                   SYNCS.TRYWAIT P0, [UR4] ;   /* 0x00 */
        /*0020*/              @!P0 BRA 0x80 ;   /* 0x00 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;   /* 0x00 */
        /*0040*/                   BRA.U UP0, 0x10 ;   /* 0x00 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;   /* 0x00 */
        /*0060*/                   EXIT ;   /* 0x00 */
        /*0070*/                   BRA 0x70;   /* 0x00 */
        /*0080*/                   SYNCS.TRYWAIT P0, [UR4] ;   /* 0x00 */
        /*0090*/              @!P0 BRA 0x80 ;   /* 0x00 */
        /*00a0*/                   BRA 0x30 ;   /* 0x00 */
"""


def test_a_loop_is_what_leads_back_wherever_it_lies() -> None:
    """A loop has parts in front of its beginning, and behind the end of the kernel."""
    (lines,) = Code.of_ptx(PTX).loops(re.compile(r"mma\.sync"))
    assert [line.split()[0] for line in lines] == [
        "mbarrier.try_wait.parity.shared.b64",
        "@!complete",
        "add.s32",
        "@%p2",
        "@%p1",
        "mma.sync.aligned.m16n8k16",
        "bra.uni",
    ]
    # Two labels have the same name: each jump is to its own.
    assert [len(lines) for lines in Code.of_ptx(PTX).loops(re.compile("try_wait"))] == [2, 2]
    (lines,) = Code.of_sass(SASS).loops(re.compile("HMMA"))
    assert [line.split()[-1] for line in lines] == ["[UR4]", "0x80", "R4", "0x10", "[UR4]", "0x80", "0x30"]
    assert Code.of_sass(SASS).loops(re.compile("HGMMA")) == []
