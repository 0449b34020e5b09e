"""The choice of form, tile and splits: pure functions, so that a machine without a GPU can check them."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import config
from qkernels.ops.hamilton_conv.config import FORMS, Plan, Problem, Tile, plan, triton_form, whole_splits

PRECISIONS = ("half", "tf32", "ieee")
ARCHS = tuple(config.TILES)
# Quaternion channels of input and output, side of the map: the layers of the full quaternion VGG16.
VGG = [(1, 16, 64), (16, 16, 64), (16, 32, 32), (32, 32, 32), (32, 64, 16), (64, 64, 16), (64, 128, 8), (128, 128, 8)]


def forget():
    """Plans and tables are remembered; a test changes what they come from."""
    config._table.cache_clear()
    config._best.cache_clear()


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder in place of the committed measurements; the cache forgets it afterwards."""
    monkeypatch.setenv("QKERNELS_TABLES", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_form_without_a_measurement(tables):
    """Few channels of input or output are dense, accurate float32 is q8, the rest q16."""
    for arch, taps in itertools.product(ARCHS, (1, 9, 121)):
        for p, q in ((128, 128), (32, 512), (512, 32)):
            assert [triton_form(p, q, taps, precision, arch) for precision in PRECISIONS] == ["q16", "q16", "q8"]
        for p, q in ((31, 128), (128, 31)):
            assert [triton_form(p, q, taps, precision, arch) for precision in PRECISIONS] == ["dense", "dense", "q8"]
        for p, q in ((15, 128), (128, 15), (1, 1)):
            assert {triton_form(p, q, taps, precision, arch) for precision in PRECISIONS} == {"dense"}


def test_more_channels_never_turn_quaternions_back_into_dense(tables):
    for precision in PRECISIONS:
        dense = [triton_form(n, n, 9, precision, 90) == "dense" for n in (1, 8, 15, 16, 31, 32, 64, 512)]
        assert dense == sorted(dense, reverse=True)


def problems():
    for (q, p, side), batch in itertools.product(VGG, (1, 20, 256)):
        pixels = batch * side * side
        yield Problem("gather", pixels, p, q, 9)
        yield Problem("gather", pixels, q, p, 9)
        yield Problem("dw", pixels, p, q, 9)
    for rows, (k, n) in itertools.product((1, 20), ((512, 1024), (1024, 1024), (1024, 1))):
        yield Problem("gather", rows, n, k, 1)
        yield Problem("dw", rows, n, k, 1)
    yield Problem("gather", 77, 3, 5, 121, 6)


@pytest.mark.parametrize("arch", ARCHS)
def test_plans_are_of_the_architectures_own_tiles(arch, tables):
    for problem, form, precision in itertools.product(problems(), FORMS, PRECISIONS):
        option = plan(problem, form, precision, arch, 132)
        assert (option.form, option.precision) == (form, precision)
        own = config.tiles(problem.kernel, form, precision, arch)
        fitting = [tile for tile in own if not problem.flat(form, tile)]
        assert option.tile in (fitting or [Tile(*numbers) for numbers in config.FLAT_TILES[precision]])
        _, steps = problem.grid(form, option.tile)
        assert option.splits == whole_splits(steps, option.splits) <= config.MOST_SPLITS
        assert option == plan(problem, form, precision, arch, 132)


def test_few_pixels_share_their_sums_and_many_do_not(tables):
    for form in FORMS:
        splits = [plan(Problem("gather", pixels, 128, 128, 9), form, "half", 90, 132).splits for pixels in (16, 2**20)]
        assert splits[0] > 1
        assert splits[1] == 1


@pytest.mark.parametrize(
    ("arch", "known"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80), (75, 80)]
)
def test_architecture_without_tiles_takes_those_of_the_next_lower_one(arch, known, tables):
    problem = Problem("gather", 1280, 128, 128, 9)
    assert plan(problem, "q16", "half", arch, 108) == plan(problem, "q16", "half", known, 108)


@hypothesis.given(st.integers(1, 10_000), st.integers(1, 300))
def test_no_split_is_empty(steps, splits):
    """As the kernels share the steps out."""
    number = whole_splits(steps, splits)
    assert 1 <= number <= min(steps, splits)
    edges = [split * steps // number for split in range(number + 1)]
    assert edges[0] == 0
    assert edges[-1] == steps
    assert all(first < last for first, last in itertools.pairwise(edges))


def test_class_without_a_step_has_one_split():
    assert whole_splits(0, 4) == 1


def test_programs_and_steps():
    """Counted by hand: 33 pixels in tiles of 16, 5 channels in tiles of 4, 3 of 2 summed under 6 taps, 4 classes."""
    gather, dw = (Problem(kernel, 33, 5, 3, 6, classes=4) for kernel in ("gather", "dw"))
    assert gather.grid("q16", Tile(16, 4, 2, 4, 1)) == (3 * 2 * 4, 6 * 2)
    assert gather.grid("q8", Tile(16, 4, 2, 4, 1)) == (3 * 2 * 4, 6 * 2)
    # Dense: 20 real channels, 12 summed; 12 % 8 != 0, so one sum over 72 pairs of tap and channel.
    assert gather.grid("dense", Tile(16, 4, 4, 4, 1)) == (3 * 5 * 4, 6 * 3)
    assert gather.grid("dense", Tile(16, 4, 8, 4, 1)) == (3 * 5 * 4, 9)
    assert dw.grid("q16", Tile(2, 4, 16, 4, 1))[1] == 3


def test_measured_form_and_plan_come_first(tables):
    """And a measured number of splits is cut to the steps of the problem at hand, which has other pixels."""
    problem, option = Problem("dw", 1000, 64, 64, 9), Plan("q16", "half", Tile(64, 32, 32, 4, 3), 20)
    modelled = plan(problem, "q16", "half", 90, 132)
    tile = [option.tile.m, option.tile.n, option.tile.k, option.tile.warps, option.tile.stages]
    row = {
        "problem": list(problem.key),
        "form": "q16",
        "asked": "half",
        "precision": "half",
        "tile": tile,
        "splits": 20,
    }
    form = {"precision": "half", "p": 64, "q": 64, "taps": 9, "form": "q8"}
    (tables / "sm_90.json").write_text(json.dumps({"forms": [form], "plans": [row]}))
    forget()
    assert triton_form(64, 64, 9, "half", 90) == "q8"
    assert triton_form(64, 64, 1, "half", 90) == "q16"
    assert triton_form(64, 64, 9, "half", 100) == "q16"
    assert plan(problem, "q16", "half", 90, 132) == option
    assert plan(Problem("dw", 513, 64, 64, 9), "q16", "half", 90, 132) == Plan("q16", "half", option.tile, 17)
    assert plan(problem, "q16", "half", 80, 132) != option
    assert plan(problem, "q16", "ieee", 90, 132).precision == "ieee"
    (tables / "sm_90.json").unlink()
    forget()
    assert plan(problem, "q16", "half", 90, 132) == modelled


def test_forced_plan_is_the_plan():
    option = Plan("q16", "half", Tile(16, 16, 16, 4, 1), 5)
    with config.force(option):
        assert plan(Problem("gather", 64, 32, 32, 9), "dense", "ieee", 90, 132) == option
    assert plan(Problem("gather", 64, 32, 32, 9), "dense", "ieee", 90, 132).form == "dense"


def test_half_types_follow_no_switch():
    for precision in ("tf32", "float32"):
        with _launch.switched(precision):
            assert {_launch.precision_of(dtype, "conv") for dtype in (torch.float16, torch.bfloat16)} == {"half"}


def test_precision_follows_pytorchs_switches_and_leaves_them_as_they_were():
    """Set by either API, at each level, in any order: nothing raises, and the user finds what he has left."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("switches.py")], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, ""), (done.stdout + done.stderr)[-5000:]
    assert "394 tried" in done.stderr
