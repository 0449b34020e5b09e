"""Launch settings of the Gram cosine's kernels: pure functions, which a machine without a GPU can check."""

import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from qkernels.ops.gram_cosine import config
from qkernels.ops.gram_cosine.config import mode_of, pairs_of, plan, workspace_size

# Channels and positions of the layers of the quaternion and of the real network.
QUATERNION = [(64, 4096), (128, 1024), (256, 256), (512, 64), (512, 16)]
REAL = [(64, 65536), (128, 16384), (256, 4096), (512, 1024), (512, 256)]
ARCHS = tuple(config.BACKWARD)


def test_modes() -> None:
    assert [mode_of(*sizes) for sizes in QUATERNION] == ["stored", "stored", "direct", "dual", "dual"]
    assert [mode_of(*sizes) for sizes in REAL] == ["stored", "stored", "direct", "direct", "dual"]
    assert [mode_of(512, 300, triangles) for triangles in (False, True)] == ["dual", "direct"]
    assert mode_of(16, 8, triangles=True) == "stored"


@pytest.mark.parametrize(("shapes", "limit"), [(QUATERNION, 3e6), (REAL, 11e6)], ids=["quaternion", "real"])
@pytest.mark.parametrize(("half", "arch"), [*itertools.product([True, False], ARCHS)])
def test_memory_beside_features_at_batch_20(shapes: Any, limit: float, half: Any, arch: int) -> None:
    """Parts of Gram matrices, what is kept of them, and the sums of all programs."""
    for rows, columns in shapes:
        option = plan(20, rows, columns, half, arch, 132)
        size = math.prod(workspace_size(rows, columns, 20, False, False, arch))
        if option.mode == "stored":
            size += 2 * 20 * pairs_of(rows, option.block) * option.splits * (option.block**2 + 1)
        else:
            blocks = -(-min(rows, columns) // option.block)
            size += 20 * 6 * (blocks**2 + 2 * pairs_of(min(rows, columns), option.block))
        assert 4 * size <= limit
        if rows > config.STORED_ROWS:
            assert 4 * size < 4 * 20 * 512 * 16  # far less than a matrix per sample


@hypothesis.given(
    st.integers(1, 300),
    st.integers(1, 3000),
    st.integers(1, 70_000),
    st.booleans(),
    st.sampled_from(ARCHS),
    st.booleans(),
)
def test_no_program_is_without_a_step(
    items: Any, rows: Any, columns: Any, half: Any, arch: int, triangles: Any
) -> None:
    option = plan(items, rows, columns, half, arch, 132, triangles)
    m, k = (columns, rows) if option.mode == "dual" else (rows, columns)
    assert option.block == option.forward.m
    assert 1 <= option.splits <= -(-k // option.forward.k)
    assert 1 <= option.column_splits <= -(-k // option.backward.c)
    assert pairs_of(m, option.block) * option.splits <= config.MOST_PARTS or option.mode != "stored"
    assert (
        option.backward.n >= m
        or option.backward == config.BACKWARD[arch][option.mode, "half" if half else "single"][-1]
    )


@pytest.mark.parametrize(
    ("arch", "known"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80), (75, 80)]
)
def test_architecture_without_tiles_takes_those_of_the_next_lower_one(arch: int, known: int) -> None:
    for sizes, half in itertools.product(QUATERNION, (True, False)):
        assert plan(20, *sizes, half, arch, 108) == plan(20, *sizes, half, known, 108)


def test_few_samples_share_their_sums_and_many_do_not() -> None:
    assert [plan(items, 64, 4096, True, 90, 132).splits for items in (1, 256)] == [64, 1]
    assert plan(1, 512, 64, True, 90, 132).column_splits > plan(256, 512, 64, True, 90, 132).column_splits
