"""The search for launch settings, with a clock that the test winds, and the table that it writes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import tune
from qkernels.ops.hamilton_conv import config


@pytest.fixture(autouse=True)
def tiles() -> None:
    """The search forces plans of its own: `config.plan` stays."""


@pytest.fixture
def forget() -> Any:
    yield
    config._table.cache_clear()
    config._best.cache_clear()


def test_search_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Any) -> None:
    """The first option takes 1 ms, each later one more; the third product of q8 is too wrong to be taken."""
    clock = itertools.count(1)
    products = tune.products

    def spoilt(*args: Any) -> Any:
        for product in products(*args):
            yield product._replace(exact=-product.exact) if product.name == "dw" else product

    lines = []
    arguments = ([tune.Layer(8, 8, 1, 1)], [2], ["ieee"], "cpu", lambda call: float(next(clock)), 1, lines.append)
    table = tune.search(*arguments)
    assert table["forms"] == [{"precision": "ieee", "p": 2, "q": 2, "positions": 1, "form": "signed"}]
    assert {(row["form"], row["problem"][0]) for row in table["plans"]} == set(
        itertools.product(("signed", "q8"), ("gather", "dw"))
    )
    assert len(lines) == 3 * len(tune.FORMS["ieee"])
    assert lines[0].startswith("8->8 1x1 on 1x1, batch 2, ieee, forward: signed ieee ")

    assert tune.write(table, tmp_path, 90) == tmp_path / "sm_90.json"
    monkeypatch.setenv("QKERNELS_TABLES", str(tmp_path))
    config._table.cache_clear()
    config._best.cache_clear()
    assert config.triton_form(2, 2, 1, "ieee", 90) == "signed"
    (row,) = [row for row in table["plans"] if (row["form"], row["problem"][0]) == ("q8", "dw")]
    plan = config.plan(config.Problem("dw", 2, 2, 2, 1), "q8", "ieee", 90, 132)
    assert len(row["tile"]) == 5  # registers are the compiler's
    assert (plan.precision, plan.tile) == (row["precision"], config.Tile(*row["tile"]))

    monkeypatch.setattr(tune, "products", spoilt)
    rejected = tune.search(*arguments)
    assert all(row["problem"][0] == "gather" for row in rejected["plans"])
    assert sum("rejected" in line for line in lines) == len(tune.FORMS["ieee"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(["--batch", "20"])
    assert ended.value.code == 2
    assert "PyTorch sees none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--most", "0"])
    assert "--batch and --most must be at least 1" in capsys.readouterr().err
