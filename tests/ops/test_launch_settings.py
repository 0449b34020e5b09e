"""The choice of form, tile and splits: pure functions, so that a machine without a GPU can check them."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from qkernels.ops.hamilton_conv import config
from qkernels.ops.hamilton_conv.config import Plan, Problem, Tile, algorithm_of, cost, plan, triton_form, whole_splits
from qkernels.runtime.precision import precision_of, switched
from qkernels.runtime.recording import record

PRECISIONS = ("half", "tf32", "ieee")
# What the kernels have; `qkernels.tune` asks for tf32x3, too.
OPTIONS = [("signed", precision) for precision in PRECISIONS] + [("q8", "ieee")]
MEASURED = [*OPTIONS, ("signed", "tf32x3"), ("q8", "tf32x3")]
ARCHS = tuple(config.TILES)
# Quaternion channels of input and output, side of the map: the 13 convolutions of the full quaternion VGG16, of which
# those in POOLED have a pool behind them.
CONVS = [
    (1, 16, 64), (16, 16, 64), (16, 32, 32), (32, 32, 32), (32, 64, 16), (64, 64, 16), (64, 64, 16),
    (64, 128, 8), (128, 128, 8), (128, 128, 8), (128, 128, 4), (128, 128, 4), (128, 128, 4),
]  # fmt: skip
POOLED = (2, 4, 7, 10, 13)
all_options = pytest.mark.parametrize(("form", "precision"), OPTIONS, ids=map("-".join, OPTIONS))


def forget() -> None:
    """Plans and tables are remembered; a test changes what they come from."""
    config._table.cache_clear()
    config._best.cache_clear()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty folder in place of the committed measurements; the cache forgets it afterwards."""
    monkeypatch.setenv("QKERNELS_TABLES", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_form_without_a_measurement(tables: Any) -> None:
    """Accurate float32 of some channels is q8, all else signed."""
    for arch, positions in itertools.product(ARCHS, (1, 9, 121)):
        for p, q in ((128, 128), (16, 512), (512, 16)):
            forms = [triton_form(p, q, positions, precision, arch) for precision in PRECISIONS]
            assert forms == ["signed", "signed", "q8"]
        for p, q in ((15, 128), (128, 15), (1, 1)):
            assert {triton_form(p, q, positions, precision, arch) for precision in PRECISIONS} == {"signed"}


def test_how(tables: Any) -> None:
    """A form and a precision; a form that the kernels do not have for it is refused."""
    for precision in PRECISIONS:
        form = triton_form(64, 64, 9, precision, 90)
        assert algorithm_of("auto", 64, 64, 9, precision, 90) == f"{form}-{precision}"
        assert algorithm_of("signed", 64, 64, 9, precision, 90) == f"signed-{precision}"
        with pytest.raises(ValueError, match="form 'dense' is plain PyTorch's"):
            algorithm_of("dense", 64, 64, 9, precision, 90)
    assert algorithm_of("q8", 1, 1, 1, "ieee", 90) == "q8-ieee"
    for precision in ("half", "tf32"):
        with pytest.raises(ValueError, match=r"form 'q8' .* is for float32 operands without TF32"):
            algorithm_of("q8", 64, 64, 9, precision, 90)


def convolutions(batch: Any) -> Any:
    """Number of the layer, its product, and how large that is."""
    for n, (q, p, side) in enumerate(CONVS, 1):
        pixels = batch * side * side
        yield n, "forward", Problem("gather", pixels, p, q, 9, epilogue=n in POOLED)
        if n > 1:
            yield n, "dx", Problem("gather", pixels, q, p, 9)
        yield n, "dw", Problem("dw", pixels, p, q, 9)


def problems() -> Any:
    for batch in (1, 20, 256):
        yield from (problem for *_, problem in convolutions(batch))
    for rows, (k, n) in itertools.product((1, 20), ((512, 1024), (1024, 1024), (1024, 1))):
        yield Problem("gather", rows, n, k, 1)
        yield Problem("dw", rows, n, k, 1)
    yield Problem("gather", 20, 1024, 128, 4)  # the flattened maps of the first linear layer
    yield Problem("gather", 77, 3, 5, 121, 6)
    yield Problem("gather", 77, 3, 5, 4, 2, 6)


@pytest.mark.parametrize("arch", ARCHS)
@all_options
def test_plans_are_of_the_architectures_own_tiles(arch: int, form: str, precision: str, tables: Any) -> None:
    for problem in problems():
        option = plan(problem, form, precision, arch, 132)
        assert (option.form, option.precision) == (form, precision)
        asked = "flat" if problem.flat(form, option.tile) else form
        assert option.tile in [Tile(*numbers) for numbers in config.TILES[arch][problem.kernel, asked, precision]]
        assert option.splits <= min(problem.steps(form, option.tile), config.MOST_SPLITS)
        assert option == plan(problem, form, precision, arch, 132)


sizes = st.sampled_from([*range(1, 20), 31, 32, 33, 63, 64, 65, 128, 1000, 4096])


@hypothesis.given(
    st.sampled_from(ARCHS),
    st.sampled_from(MEASURED),
    st.sampled_from([("gather", False), ("gather", True), ("dw", False)]),
    st.one_of(st.integers(1, 4096), st.sampled_from([2**20, config.MOST_TICKETS * 128 + 1, 2**31 - 1024])),
    sizes,
    sizes,
    st.sampled_from([1, 2, 9, 25, 121]),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([1, 4, 6]),
)
@hypothesis.settings(max_examples=200)
def test_every_product_has_plans(
    arch: int, option: Any, kernel: Any, pixels: Any, n: Any, k: Any, positions: Any, groups: Any, phases: Any
) -> None:
    """Whatever its size: none of a split without a step, nor of more tiles with splits than there are tickets."""
    problem = Problem(kernel[0], pixels, n, k, positions, groups, phases, kernel[1])
    options = list(config.candidates(problem, *option, arch))
    assert options
    for each in options:
        tiles, steps = problem.tiles(each.form, each.tile), problem.steps(each.form, each.tile)
        assert tiles >= 1
        assert 1 <= each.splits <= max(steps, 1)
        assert each.splits == 1 or tiles <= config.MOST_TICKETS
        assert (steps + 1) * each.splits < 2**31
        assert not (problem.epilogue and each.form == "signed" and each.tile.n == 64)


def test_tickets_are_counted() -> None:
    """A launch of as many tiles as there are tickets may share its sums, of one more not."""
    tile = config.tiles("gather", "signed", "half", 90)[-1]
    for extra in (0, 1):
        problem = Problem("gather", tile.m * (config.MOST_TICKETS + extra), tile.n, 128, 9)
        assert problem.tiles("signed", tile) == config.MOST_TICKETS + extra
        with config.force(Plan("signed", "half", tile, 2)):
            assert plan(problem, "signed", "half", 90, 132).splits == 2 - extra


def test_few_pixels_share_their_sums_and_many_do_not(tables: Any) -> None:
    for option in OPTIONS:
        splits = [plan(Problem("gather", pixels, 128, 128, 9), *option, 90, 132).splits for pixels in (16, 2**20)]
        assert splits[0] > 1
        assert splits[1] == 1


@all_options
def test_no_deep_layer_leaves_a_quarter_of_the_gpu_idle(form: str, precision: str, tables: Any) -> None:
    """At the paper's batch, on an H100; but for a few of 26, for which no plan with more programs, split or not, is
    about as fast: weight gradients of few pixels, whose sums are too short to be shared, and one layer of 32 channels.
    """
    idle = []
    for n, name, problem in convolutions(20):
        option = plan(problem, form, precision, 90, 132)
        if n < 5 or problem.tiles(form, option.tile) * option.splits >= 0.75 * 132:
            continue
        idle.append((n, name))
        for other in config.candidates(problem, form, precision, 90):
            if problem.tiles(form, other.tile) * other.splits >= 0.75 * 132:
                times = [cost(problem, each, 90, 132).total for each in (option, other)]
                assert times[1] > (1 + config.MODEL_ERROR) * times[0], (n, name, option, other)
    assert len(idle) <= 4, idle


@all_options
def test_parts_of_sums_take_no_tenth_of_the_time(form: str, precision: str, tables: Any) -> None:
    for n, name, problem in convolutions(256):
        option = plan(problem, form, precision, 90, 132)
        assert cost(problem, option, 90, 132).parts < 0.1, (n, name, option)


@pytest.mark.parametrize("arch", ARCHS)
@all_options
def test_chosen_plan_is_among_the_fastest(arch: int, form: str, precision: str, tables: Any) -> None:
    for problem in problems():
        chosen = cost(problem, plan(problem, form, precision, arch, 132), arch, 132).total
        options = config.candidates(problem, form, precision, arch)
        fastest = min(cost(problem, option, arch, 132).total for option in options)
        assert fastest <= chosen <= (1 + config.MODEL_ERROR) * fastest


@pytest.mark.parametrize("arch", ARCHS)
@all_options
def test_model_of_the_time(arch: int, form: str, precision: str, tables: Any) -> None:
    """More multiprocessors, or less to compute, never take longer; a share is a share."""
    for problem in problems():
        for option in itertools.islice(config.candidates(problem, form, precision, arch), 0, None, 7):
            costs = [cost(problem, option, arch, multiprocessors) for multiprocessors in (1, 50, 132, 133, 10_000)]
            totals = [each.total for each in costs]
            assert totals == sorted(totals, reverse=True)
            each = costs[2]
            assert each.bound in ("products", "loads", "latency")
            assert 0 <= each.parts < 1
            assert (each.parts > 0) == (option.splits > 1)
            assert each.residents >= 1
            assert each.shared * each.residents <= config.SHARED_BYTES[arch] or each.residents == 1
            larger = dataclasses.replace(problem, pixels=2 * problem.pixels)
            assert cost(larger, option, arch, 132).total >= each.total


def test_what_a_step_waits_for() -> None:
    """Full blocks of a fast GPU wait for memory, those of float32 without tensor cores for products, a single one of
    few stages for itself.
    """
    problem = Problem("gather", 2**20, 128, 128, 9)
    bounds = [
        cost(problem, Plan("signed", precision, Tile(m, n, k, warps, stages, registers), 1), 90, 132).bound
        for precision, m, n, k, warps, stages, registers in (
            ("half", 64, 16, 64, 4, 4, 64),
            ("ieee", 64, 16, 64, 4, 2, 64),
            ("half", 16, 16, 16, 8, 1, 255),
        )
    ]
    assert bounds == ["loads", "products", "latency"]


def test_registers_and_shared_memory_limit_the_programs_of_a_multiprocessor() -> None:
    problem = Problem("gather", 2**20, 128, 128, 9)

    def residents(**settings: Any) -> Any:
        tile = Tile(**{"m": 16, "n": 16, "k": 16, "warps": 4, "stages": 1, "registers": 255} | settings)
        return cost(problem, Plan("signed", "half", tile, 1), 90, 132).residents

    assert residents() == 65536 // (128 * 256)
    assert residents(registers=128) == 4
    assert residents(registers=122) == 4  # in units of 8
    assert residents(registers=32, warps=1) == 32
    # (64 + 64) x 64 x 2 bytes a stage, of 228 KiB, and 1 KiB for each program.
    assert residents(registers=32, m=64, k=64, stages=4) == 3


@pytest.mark.parametrize(
    ("arch", "known"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80), (75, 80)]
)
def test_architecture_without_tiles_takes_those_of_the_next_lower_one(arch: int, known: int, tables: Any) -> None:
    problem = Problem("gather", 1280, 128, 128, 9)
    assert plan(problem, "signed", "half", arch, 108) == plan(problem, "signed", "half", known, 108)


@hypothesis.given(st.integers(1, 10_000), st.integers(1, 300))
def test_no_split_is_empty(steps: int, splits: int) -> None:
    """As the kernels share the steps out."""
    number = whole_splits(steps, splits)
    assert 1 <= number <= min(steps, splits)
    edges = [split * steps // number for split in range(number + 1)]
    assert edges[0] == 0
    assert edges[-1] == steps
    assert all(first < last for first, last in itertools.pairwise(edges))


def test_sum_without_a_step_has_one_split() -> None:
    assert whole_splits(0, 4) == 1


def test_programs_and_steps() -> None:
    """Counted by hand: 33 pixels in tiles of 16, 5 channels in tiles of 4, 3 summed under 6 positions, 4 phases."""
    gather, dw = (Problem(kernel, 33, 5, 3, 6, 2, 4) for kernel in ("gather", "dw"))

    def counts(problem: Any, form: str, *tile: Any) -> Any:
        return problem.tiles(form, Tile(*tile, 4, 1)), problem.steps(form, Tile(*tile, 4, 1))

    assert counts(gather, "q8", 16, 4, 2) == (3 * 2 * 2 * 4, 6 * 2)
    assert counts(gather, "signed", 16, 4, 2) == (3 * 2 * 2 * 4, 4 * 6 * 2)
    # 4 components of 3 channels of 6 positions are 72 pairs, where a block has room for more than 3 channels.
    assert counts(gather, "signed", 16, 4, 16) == (3 * 2 * 2 * 4, 5)
    assert counts(gather, "signed", 16, 4, 3) == (3 * 2 * 2 * 4, 4 * 6)
    # Blocks of channels at each of 6 positions, or of the 18 pairs of both; and one program for the bias.
    assert counts(dw, "q8", 2, 4, 2) == (2 * (12 + 1) * 2 * 4, 17)
    assert counts(dw, "signed", 2, 4, 4) == (2 * (5 + 1) * 2 * 4, 17)
    # Many channels are taken in blocks, the last of which is not full.
    assert counts(Problem("gather", 33, 5, 40, 6), "signed", 16, 4, 32) == (3 * 2, 4 * 6 * 2)


def test_measured_form_and_plan_come_first(tables: Any) -> None:
    """And a measured number of splits is cut to the steps of the problem at hand, which has other pixels."""
    problem, option = Problem("dw", 1000, 64, 64, 9), Plan("signed", "half", Tile(64, 16, 16, 4, 4), 16)
    modelled = plan(problem, "signed", "half", 90, 132)
    tile = [option.tile.m, option.tile.n, option.tile.k, option.tile.warps, option.tile.stages]
    row = {
        "problem": list(problem.key),
        "form": "signed",
        "asked": "half",
        "precision": "half",
        "tile": tile,
        "splits": 16,
    }
    form = {"precision": "ieee", "p": 64, "q": 64, "positions": 9, "form": "signed"}
    (tables / "sm_90.json").write_text(json.dumps({"forms": [form], "plans": [row]}))
    forget()
    assert triton_form(64, 64, 9, "ieee", 90) == "signed"
    assert triton_form(64, 64, 1, "ieee", 90) == "q8"
    assert triton_form(64, 64, 9, "ieee", 100) == "q8"
    assert plan(problem, "signed", "half", 90, 132) == option
    assert plan(Problem("dw", 513, 64, 64, 9), "signed", "half", 90, 132) == Plan("signed", "half", option.tile, 9)
    assert plan(problem, "signed", "half", 80, 132) != option
    assert plan(problem, "signed", "ieee", 90, 132).precision == "ieee"
    (tables / "sm_90.json").unlink()
    forget()
    assert plan(problem, "signed", "half", 90, 132) == modelled


def test_measured_tile_that_would_spill_with_an_epilogue_is_not_taken_there(tables: Any) -> None:
    problem = Problem("gather", 1280, 64, 64, 9)
    row = {"problem": list(problem.key), "form": "signed", "asked": "half", "precision": "half",
           "tile": [128, 64, 64, 8, 3], "splits": 1}  # fmt: skip
    (tables / "sm_90.json").write_text(json.dumps({"forms": [], "plans": [row]}))
    forget()
    assert plan(problem, "signed", "half", 90, 132).tile == Tile(128, 64, 64, 8, 3)
    assert plan(dataclasses.replace(problem, epilogue=True), "signed", "half", 90, 132).tile.n < 64


@pytest.mark.parametrize(("fused", "large"), [("nothing", True), ("dropout", False), ("pool", False)])
def test_no_launch_with_dropout_or_a_pool_takes_a_tile_that_would_spill(fused: str, large: bool, tables: Any) -> None:
    """Of few channels and many pixels, for which the largest tiles are."""
    pytest.importorskip("triton")
    from qkernels.ops.hamilton_conv import launch

    x, w = (
        torch.empty(2**14, 64, 2, 2, dtype=torch.bfloat16, device="meta"),
        torch.empty(4, 128, 16, 1, 1, device="meta"),
    )
    seed = torch.empty(1, dtype=torch.int64, device="meta") if fused == "dropout" else None
    window, epilogue = (1, 1, 0, 0, 1, 1, 1), launch.Epilogue(seed=seed, scale=2.0 if fused == "dropout" else 1.0)
    with record(90) as recording:
        (launch.forward_pool if fused == "pool" else launch.forward)(x, w, window, "signed-half", epilogue)
    (main,) = [entry for entry in recording.launches if entry.kernel.__name__ == "_hamilton_conv_kernel"]
    how, options = main.arguments["META"], main.options
    tile = Tile(how.BLOCK_M, how.BLOCK_N, how.BLOCK_K, options["num_warps"], options["num_stages"])
    assert [name for name in ("dropout", "pool") if getattr(how, name.upper())] == [fused] * (fused != "nothing")
    assert config.leaves_registers(tile) != large


@pytest.mark.parametrize("n", range(11))
def test_what_is_tuned_is_what_is_launched(n: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is looked up by what it was written for."""
    pytest.importorskip("triton")
    from qkernels import tune

    asked = []

    def first(problem: Any, form: str, precision: str, arch: int, multiprocessors: Any) -> Any:
        asked.append((problem, form, precision))
        return next(config.candidates(problem, form, precision, arch))

    monkeypatch.setattr(config, "plan", first)
    layer = tune.LAYERS[n]
    layer = layer._replace(channels_in=min(layer.channels_in, 64), channels_out=min(layer.channels_out, 64))
    with record(90):
        for product in tune.products(layer, 3, torch.bfloat16, "cpu"):
            asked.clear()
            assert product.run("signed-half", None).shape == product.exact.shape
            assert asked == [(product.problem, "signed", "half")]
    assert len(tune.LAYERS) == 11


def test_forced_plan_is_the_plan() -> None:
    """But that no split is empty."""
    option, problem = Plan("signed", "half", Tile(16, 16, 16, 4, 1), 5), Problem("gather", 64, 32, 32, 9)
    with config.force(option):
        assert plan(problem, "q8", "ieee", 90, 132) == option
        few = dataclasses.replace(problem, k=1, positions=4)  # 16 pairs, one step
        assert plan(few, "q8", "ieee", 90, 132) == dataclasses.replace(option, splits=1)
    assert plan(problem, "q8", "ieee", 90, 132).form == "q8"


def test_half_types_follow_no_switch() -> None:
    for precision in ("tf32", "float32"):
        with switched(precision):
            assert {precision_of(dtype, "conv") for dtype in (torch.float16, torch.bfloat16)} == {"half"}


def test_precision_follows_pytorchs_switches_and_leaves_them_as_they_were() -> None:
    """Set by either API, at each level, in any order: nothing raises, and the user finds what he has left."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("switches.py")], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, ""), (done.stdout + done.stderr)[-5000:]
    assert "394 tried" in done.stderr
