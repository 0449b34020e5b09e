"""A training of captured steps is, bit for bit, the training of the same steps without."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.anti_transfer import AntiTransfer
from qat.config import AntiTransferConfig, NetworkConfig, RHEmoConfig, TrainingConfig
from qat.data.rows import Rows
from qat.data.spectrogram import word_offsets
from qat.models import VGG16, RHEmo, SpeechClassifier
from qat.models.layers import placed
from qat.training import loop
from qat.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from qat.training.examples import Examples
from qat.training.objectives import ClassificationObjective, Losses, RHEmoObjective
from qat.training.profile import Profile
from qat.training.steps import WARM, Steps, precision

# In training and in validation batches of 12, 12, 12 and 9 samples.
SAMPLES, PART, BATCH, CLASSES, EPOCHS = 50, 45, 12, 4, WARM + 3


@dataclass(frozen=True)
class Setting:
    """A training.

    Args:
        name: of the test.
        network: of the classifier; None trains RH-Emo.
        training: settings.
        layers: of anti-transfer.
        remembered: targets are computed before: on the device, or on the host with a cache of 0 MiB.
        resident: inputs are kept on the device.
        words: inputs are words, placed anew in every epoch.
    """

    name: str
    network: NetworkConfig | None = field(default_factory=lambda: NetworkConfig(width=1 / 4))
    training: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    remembered: int | None = None
    resident: bool = True
    words: bool = False

    def __str__(self) -> str:
        return self.name


# One width, so that few kernels are compiled.
SETTINGS = [
    Setting("plain"),
    Setting("twin at 2", layers=(2,)),
    Setting("bf16, twin at 13", training={"precision": "bf16"}, layers=(13,)),
    Setting("bf16, targets at 2 and 7", training={"precision": "bf16"}, layers=(2, 7), remembered=256),
    Setting("targets at 13", layers=(13,), remembered=256),
    Setting("targets on the host", layers=(7,), remembered=0),
    Setting("inputs on the host", resident=False),
    Setting("clipped, decayed", training={"clip": 0.1, "weight_decay": 1e-2}),
    Setting("tf32, real on embedding", NetworkConfig("real-on-embedding", 1 / 4), {"precision": "tf32"}, (2,)),
    Setting("bf16, real", NetworkConfig("real", 1 / 8), {"precision": "bf16"}, (2,)),
    Setting("words", words=True),
    Setting("words on the host, bf16", training={"precision": "bf16"}, resident=False, words=True),
    Setting("trainable encoder", NetworkConfig(width=1 / 4, rhemo_mode="trainable")),
    Setting("RH-Emo", None),
    Setting("RH-Emo, bf16", None, {"precision": "bf16"}),
]


def steps_of(setting: Setting, device: torch.device, capture: bool) -> Steps:
    torch.manual_seed(1)
    config = TrainingConfig(**{"lr": 1e-3, "batch": BATCH, "capture": capture, **setting.training})
    network = setting.network
    embedded = network is not None and network.embeds and not setting.words and network.rhemo_mode == "frozen"
    shape = (170, 129) if setting.words else (4, 64, 64) if embedded else (1, 512, 128)
    x = torch.rand(SAMPLES, *shape)
    mib = 4096 if setting.resident else 0
    rows = {"inputs": Rows.within(lambda numbers: x[numbers], range(SAMPLES), device, mib)}
    objective: RHEmoObjective | ClassificationObjective
    if network is None:
        targets = torch.randint(2, (SAMPLES, 4)).float()
        targets[::3, 1] = torch.nan
        objective = RHEmoObjective(placed(RHEmo(RHEmoConfig(width=1 / 32)), device), RHEmoConfig(beta=0.01))
    else:
        targets = torch.randint(CLASSES, (SAMPLES,))
        classifier = placed(SpeechClassifier(network, CLASSES), device)
        term = None
        if setting.layers:
            settings = AntiTransferConfig(
                random_twin=True, layers=list(setting.layers), cache_mib=setting.remembered or 0
            )
            term = placed(AntiTransfer(settings, VGG16(network, 2)), device)
            if setting.remembered is not None:
                with precision(config.precision, device):
                    rows |= term.remember(rows["inputs"].fetch, torch.arange(SAMPLES), BATCH)
        objective = ClassificationObjective(classifier, term, embedded=embedded, multi_label=False)
    rows["targets"] = Rows(targets.to(device), device)
    offsets = None
    if setting.words:
        offsets = lambda count, generator: word_offsets(count, "sample" if generator else "centre", generator)  # noqa: E731
    return Steps(objective, Examples(rows, offsets), config, device, training=True)


def trained(steps: Steps, epochs: Iterable[int] = range(EPOCHS)) -> list[Any]:
    """All that a training gives, with another learning rate from the last epoch but one on."""
    numbers = torch.arange(SAMPLES)
    found: list[Any] = []
    for epoch in epochs:
        if epoch == EPOCHS - 2:
            steps.optimizer.param_groups[0]["lr"].fill_(1e-4)
        found.append(loop.train_epoch(steps, numbers[:PART], epoch))
        sums, outputs, targets = loop.evaluate(steps, numbers[-PART:])
        found += [sums, outputs.tolist(), targets.nan_to_num(-1).tolist()]
    return found


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_captured_steps_are_the_same_training(
    setting: Setting, device: torch.device, deterministic: None, caplog: pytest.LogCaptureFixture
) -> None:
    captured, plain = (steps_of(setting, device, capture) for capture in (True, False))
    with caplog.at_level(logging.WARNING):
        assert trained(captured) == trained(plain)
    assert "no CUDA graph" not in caplog.text
    assert len(captured.graphs._captured) == 4  # whole and short batches, training and evaluation
    for (name, one), other in zip(
        captured.objective.state_dict().items(), plain.objective.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_step_that_asks_the_device_runs_uncaptured(
    device: torch.device, deterministic: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asking(objective: ClassificationObjective, inputs: torch.Tensor, targets: torch.Tensor) -> Losses:
        losses = ClassificationObjective.forward(objective, inputs, targets)
        return Losses(losses.total * (2.0 if losses.total.item() > 0 else 1.0), losses.parts, losses.outputs)

    found = []
    for capture in (True, False):
        steps = steps_of(SETTINGS[0], device, capture)
        monkeypatch.setattr(type(steps.objective), "__call__", asking)
        with caplog.at_level(logging.WARNING):
            found.append(trained(steps))
        monkeypatch.undo()
    assert found[0] == found[1]
    assert caplog.text.count("no CUDA graph can hold these steps") == 1


def test_two_trainings_in_one_process_do_not_disturb_each_other(device: torch.device, deterministic: None) -> None:
    alone = trained(steps_of(SETTINGS[0], device, True))
    first, second = (steps_of(SETTINGS[0], device, True) for _ in range(2))
    numbers = torch.arange(SAMPLES)
    losses = []
    for epoch in range(EPOCHS - 2):
        losses.append(loop.train_epoch(first, numbers[:PART], epoch))
        loop.train_epoch(second, numbers[-PART:], epoch)
    assert losses == alone[: 4 * (EPOCHS - 2) : 4]


@pytest.mark.parametrize("setting", [SETTINGS[0], *SETTINGS[-5:]], ids=str)
def test_a_resumed_training_is_the_same(
    setting: Setting, device: torch.device, deterministic: None, tmp_path: Path
) -> None:
    """From the state on disk: the first steps then run uncaptured again."""
    whole, broken, resumed = (steps_of(setting, device, True) for _ in range(3))
    expected = trained(whole)
    first = trained(broken, range(EPOCHS - 1))
    save_checkpoint(tmp_path / "state.safetensors", broken.objective.state_dict(), {"kind": "training"})
    save_checkpoint(tmp_path / "adam.safetensors", optimizer_tensors(broken.optimizer), {"kind": "training"})
    load_checkpoint(tmp_path / "state.safetensors", "training").load_into(resumed.objective)
    load_optimizer(resumed.optimizer, load_checkpoint(tmp_path / "adam.safetensors", "training").tensors)
    resumed.optimizer.param_groups[0]["lr"].fill_(1e-4)
    assert first + trained(resumed, [EPOCHS - 1]) == expected


def test_a_training_that_is_profiled_is_the_same(device: torch.device, deterministic: None, tmp_path: Path) -> None:
    whole_batches = Setting("batches of 5", training={"batch": 5})
    plain, profiled = (steps_of(whole_batches, device, True) for _ in range(2))
    with Profile(profiled, tmp_path):
        found = trained(profiled)
    assert found == trained(plain)
    text = (tmp_path / "profile.txt").read_text()
    assert text.count("the GPU computes") == 2
    assert all(f"\n{phase} " in text for phase in ("gather", "forward", "backward", "optimiser"))
