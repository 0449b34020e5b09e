"""A training that stops being finite says where, keeps what there was, and goes on with a lower rate."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor, nn

from qat.config import Experiment, TrainingConfig, to_plain
from qat.data.rows import Rows
from qat.results.record import read_result
from qat.training import distributed, loop
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from qat.training.data import Spectrograms
from qat.training.examples import Examples
from qat.training.nonfinite import first_finding
from qat.training.objectives import ClassificationObjective, Losses
from qat.training.steps import Steps
from tests.qat.training.trainings import same, trained

CPU = torch.device("cpu")
FILES = [f"clip-{n}.wav" for n in range(10)]


class Line(nn.Module):
    """A loss of two layers; ``reaches`` may make the gradient of the second infinite from one sample on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.overflows: Tensor | None = None

    def forward(self, inputs: Tensor, targets: Tensor) -> Losses:
        y = self.second(self.first(inputs))
        total = y.square().mean()
        if self.overflows is not None and (inputs == self.overflows).any():
            total = total + _InfiniteGradient.apply(self.second.weight)
        return Losses(total, {"square": total.detach()}, y.detach())


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return torch.full(context.shape, torch.inf)


def line(rng: np.random.Generator, **settings: Any) -> tuple[Line, Steps]:
    inputs = torch.from_numpy(rng.normal(size=(10, 2))).float()
    rows = {"inputs": Rows(inputs, CPU), "targets": Rows(torch.zeros(10), CPU)}
    model = Line()
    return model, Steps(model, Examples(rows), TrainingConfig(lr=0.1, batch=4, **settings), CPU, training=True)


def epoch(steps: Steps) -> Any:
    return first_finding(steps, FILES, lambda: loop.train_epoch(steps, torch.arange(10), 0))


def test_a_finite_epoch_has_no_finding_and_trains_as_always(rng: np.random.Generator) -> None:
    (one, watched), (other, steps) = line(rng), line(rng)
    other.load_state_dict(one.state_dict())
    steps.examples = watched.examples
    assert epoch(watched) is None
    loop.train_epoch(steps, torch.arange(10), 0)
    assert same(one.state_dict(), other.state_dict())
    assert watched.examples.rows.keys() == {"inputs", "targets"}


def test_a_sample_that_is_not_finite_is_named_alone(rng: np.random.Generator) -> None:
    _, steps = line(rng)
    bad = int(rng.integers(10))
    steps.examples.rows["inputs"].source[bad, 1] = torch.nan  # type: ignore[index]
    step, place, text = epoch(steps)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(steps.config.seed * 1_000_003)).tolist()
    assert (step, place, text) == (order.index(bad) // 4 + 1, 0, f"the input is not finite, of clip-{bad}.wav")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_infinite_gradient_of_a_finite_loss_is_the_first_parameters(rng: np.random.Generator, clip: Any) -> None:
    model, steps = line(rng, clip=clip)
    bad = int(rng.integers(10))
    model.overflows = steps.examples.rows["inputs"].source[bad, 0].clone()  # type: ignore[index]
    step, place, text = epoch(steps)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(steps.config.seed * 1_000_003)).tolist()
    batch = order[4 * (step - 1) :][:4]
    assert bad in batch
    assert place == 2
    assert text.startswith("the gradient of second.weight, of a finite loss, is not finite, of ")
    assert text.endswith(" and 1 more") == (len(batch) == 4)
    assert all(f"clip-{n}.wav" in text for n in batch[:3])


def test_weights_that_a_step_throws_out_are_told_from_losses(rng: np.random.Generator) -> None:
    model, steps = line(rng)
    for group in steps.optimizer.param_groups:
        group["lr"] = 1e39  # infinite in float32
    assert epoch(steps)[:2] == (1, 3)
    model, steps = line(rng)
    with torch.no_grad():
        model.second.weight.fill_(1e30)
        model.first.weight.fill_(1e30)
    step, place, text = epoch(steps)
    assert (step, place) == (1, 1)
    assert text.startswith("the output of second, where all weights are finite (up to 1e+30), is not finite, of ")


def broken_at(monkeypatch: pytest.MonkeyPatch, bad: int, after: int) -> None:
    """From epoch ``after`` on, one step's total is NaN where sample ``bad`` takes part."""
    train_epoch, forward = loop.train_epoch, ClassificationObjective.forward
    now = {"epoch": -1}

    def noting(steps: Steps, train: Tensor, epoch: int) -> Any:
        now["epoch"] = epoch
        return train_epoch(steps, train, epoch)

    def poisoned(objective: Any, inputs: Tensor, targets: Tensor, **rest: Any) -> Losses:
        losses = forward(objective, inputs, targets, **rest)
        if now["epoch"] < after or not objective.training or not (inputs == poison).flatten(1).all(1).any():
            return losses
        return losses._replace(total=losses.total * torch.nan)

    rows = Spectrograms.rows
    poison: Any = None

    def noted(spectrograms: Any, numbers: Tensor) -> Tensor:
        nonlocal poison
        found = rows(spectrograms, numbers)
        if bad in numbers.tolist():
            poison = found[numbers.tolist().index(bad)]
        return found

    monkeypatch.setattr(Spectrograms, "rows", noted)
    monkeypatch.setattr(loop, "train_epoch", noting)
    monkeypatch.setattr(ClassificationObjective, "forward", poisoned)


def real(experiment: Experiment, **settings: Any) -> Experiment:
    network = replace(experiment.network, domain="real", rhemo=None, embedding_scale="none")
    return trained(replace(experiment, network=network), **settings)


def test_a_training_keeps_the_state_before_and_goes_on_with_a_lower_rate(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Written is the first epoch's state only; the failure comes two epochs later."""
    run = real(experiment, epochs=6, patience=6, checkpoint_seconds=1000)
    with pytest.MonkeyPatch.context() as patched:
        broken_at(patched, bad=3, after=3)
        with pytest.raises(
            FloatingPointError, match=r"training loss is nan in epoch 3: in step \d of 4, the loss "
        ) as e:
            train_classifier(run, tmp_path / "run", quiet=True)
    assert "--resume" in str(e.value)
    assert "a lower training.lr than 0.001 may help" in str(e.value)
    assert "\n" not in str(e.value)
    history = load_checkpoint(tmp_path / "run/last.safetensors", "training").value("history")
    assert len(history) == 3
    losses = [row["validation_total"] for row in history]
    assert load_checkpoint(tmp_path / "run", "classifier").value("epoch") == int(np.argmin(losses))
    train_classifier(real(experiment, epochs=3), tmp_path / "three", quiet=True)
    three = load_checkpoint(tmp_path / "three/last.safetensors", "training")
    assert same(load_checkpoint(tmp_path / "run/last.safetensors", "training").tensors, three.tensors)

    lower = trained(run, lr=1e-4)
    with pytest.raises(ValueError, match=r"holds a run with training\.lr 0\.001, and this one has 0\.01"):
        train_classifier(trained(run, lr=1e-2), tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"holds a run with training\.seed"):
        train_classifier(trained(lower, seed=5), tmp_path / "run", resume=True, quiet=True)
    result = train_classifier(lower, tmp_path / "run", resume=True, quiet=True)
    rates = [[0, 1e-3], [3, 1e-4]]
    assert read_result(tmp_path / "run/result.json").rates == json.loads(json.dumps(result["rates"])) == rates
    assert result["experiment"] == yaml.safe_load((tmp_path / "run/experiment.yaml").read_text()) == to_plain(lower)
    assert load_checkpoint(tmp_path / "run/last.safetensors", "training").value("rates") == rates
    assert len(pd.read_csv(tmp_path / "run/metrics.csv")) == 6
    with pytest.raises(ValueError, match="holds a run with"):  # a finished run is what it is
        train_classifier(trained(run, lr=1e-5), tmp_path / "run", resume=True, quiet=True)


def test_a_first_epoch_that_fails_is_located_from_the_initial_weights(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError) as failed:
        train_classifier(trained(experiment, lr=1e18), tmp_path / "run", quiet=True)
    text = str(failed.value)
    assert "loss is nan in epoch 0: in step 2 of 4, the output of classifier.net.convs." in text
    assert ", where all weights are finite (up to 1e+18), is not finite, of " in text
    assert ".wav" in text
    assert not (tmp_path / "run/last.safetensors").exists()
    train_classifier(trained(experiment, lr=1e-3), tmp_path / "run", resume=True, quiet=True)


def test_a_sample_of_the_validation_part_is_named(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Spectrograms.rows
    run = real(experiment, batch=3)
    train_classifier(trained(run, epochs=1), tmp_path / "whole", quiet=True)
    listed = json.loads((tmp_path / "whole/split.json").read_text())["validation"]

    def poisoned(spectrograms: Any, numbers: Tensor) -> Tensor:
        found = rows(spectrograms, numbers)
        where = spectrograms.store.index["path"].iloc[numbers.tolist()].tolist()
        if listed[4] in where:
            found[where.index(listed[4])] = torch.inf
        return found

    monkeypatch.setattr(Spectrograms, "rows", poisoned)
    message = (
        rf"validation loss is nan after epoch 0: in validation batch 2 of 3, the input is not finite, of {listed[4]};"
    )
    with pytest.raises(FloatingPointError, match=message + " leave the file out, or repair it"):
        train_classifier(run, tmp_path / "run", quiet=True)


def test_the_rate_goes_on_from_the_lower_one(rng: np.random.Generator) -> None:
    """The schedule halves it after two epochs without a lower loss."""
    config = TrainingConfig(lr=0.4, lr_factor=0.5, lr_patience=2)
    losses, values = [3.0, 4.0, 4.0, 4.0, 4.0, 4.0], []
    for done in range(len(losses) + 1):
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=config.lr)
        rates = [(0, 0.4), (4, 0.1)]
        values.append(loop._Rate(optimizer, config, [rate for rate in rates if rate[0] <= done], losses[:done]).value)
    assert values == [0.4, 0.4, 0.4, 0.2, 0.1, 0.05, 0.05]


def test_a_rate_that_is_above_what_the_schedule_has_come_to_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    run = real(experiment, epochs=9, patience=9, lr=1e-12, lr_factor=0.01, lr_patience=1, checkpoint_seconds=0)
    with pytest.MonkeyPatch.context() as patched:
        evaluate, losses = loop.evaluate, iter([1.0, 2.0, 3.0])
        patched.setattr(loop, "evaluate", lambda *a: ({"total": next(losses)}, *evaluate(*a)[1:]))
        with pytest.raises(StopIteration):
            train_classifier(run, tmp_path / "run", quiet=True)
    message = r"training\.lr: 1e-13 must be 1e-12, with which .*last\.safetensors was trained, or below 1e-16"
    with pytest.raises(ValueError, match=message):
        train_classifier(trained(run, lr=1e-13), tmp_path / "run", resume=True, quiet=True)


def test_of_two_processes_the_one_that_was_first_is_told(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = real(experiment, batch=10, epochs=1)
    forward, steps = ClassificationObjective.forward, [0]

    def poisoned(objective: ClassificationObjective, inputs: Tensor, targets: Tensor) -> Losses:
        losses = forward(objective, inputs, targets)
        steps[0] += objective.training
        if distributed.rank() == 1 and objective.training and steps[0] % 3 == 2:
            return losses._replace(total=losses.total * torch.nan)
        return losses

    def train(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        try:
            train_classifier(run, tmp_path / "run", quiet=True)
        except FloatingPointError as error:
            (tmp_path / f"run-{rank}.txt").write_text(str(error))

    monkeypatch.setattr(ClassificationObjective, "forward", poisoned)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    processes = [multiprocessing.get_context("fork").Process(target=train, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    texts = {(tmp_path / f"run-{rank}.txt").read_text() for rank in range(2)}
    assert len(texts) == 1
    assert "training loss is nan in epoch 0: in step 2 of 3, the loss total is not finite, of " in texts.pop()
