"""Samples on the device or read from the host, steps, and what surrounds them in a training."""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.anti_transfer import AntiTransfer
from qat.cli import main
from qat.config import AntiTransferConfig, Experiment, NetworkConfig, RHEmoConfig, TrainingConfig
from qat.data import rows as rows_module
from qat.data.manifest import Manifest
from qat.data.rows import Rows, empty_rows
from qat.models import VGG16, RHEmo, RHEmoEncoder, SpeechClassifier
from qat.training import embeddings as embeddings_module
from qat.training import loop
from qat.training import profile as profile_module
from qat.training import steps as steps_module
from qat.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from qat.training.classifier import train_classifier
from qat.training.data import load_data
from qat.training.examples import Batch, Examples, batches
from qat.training.inference import evaluate_run
from qat.training.objectives import ClassificationObjective, Losses, RHEmoObjective
from qat.training.profile import COUNT, Profile
from qat.training.rhemo import pretrain_rhemo
from qat.training.steps import WARM, Graphs, Steps
from qkernels.losses import FoldedRowwise, GramChannel

CPU, ELSEWHERE = torch.device("cpu"), torch.device("cpu:0")  # two names of one device stand for two devices


def changed(experiment: Experiment, **settings: Any) -> Any:
    return replace(experiment, training=replace(experiment.training, **settings))


def trained_weights(folder: Path) -> Any:
    return load_checkpoint(folder, "classifier").tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shape", [(3,), (5, 7), (4, 6, 2)])
def test_rows_are_the_same_wherever_they_lie(shape: tuple[int, ...]) -> None:
    values = torch.rand(9, *shape)
    asked = []

    def read(numbers: Any) -> Any:
        asked.append(numbers.tolist())
        return values[numbers]

    size = 9 * values[:1].nbytes / 2**20
    there, host = Rows.within(read, range(9), CPU, size), Rows.within(read, range(9), CPU, 0.99 * size)
    assert (there.resident, host.resident) == (True, False)
    asked.clear()
    numbers = torch.tensor([8, 0, 0, 3])
    assert torch.equal(there.pick(numbers), values[numbers])
    assert torch.equal(there.fetch(numbers), values[numbers])
    assert asked == []
    assert torch.equal(host.fetch(numbers), values[numbers])
    assert asked == [[8, 0, 0, 3]]
    elsewhere = Rows(values, ELSEWHERE)
    assert not elsewhere.resident
    assert torch.equal(elsewhere.read(numbers), values[numbers])


def test_rows_that_nobody_asks_for_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", 2)
    asked = []

    def read(numbers: Any) -> Any:
        asked.append(numbers.tolist())
        return numbers[:, None].double()

    table = Rows.within(read, [7, 2, 5], CPU, 1, torch.bfloat16)
    assert asked == [[2], [2, 5], [7]]
    assert table.pick(torch.tensor([5, 7])).tolist() == [[5], [7]]
    assert table.pick(torch.tensor([5])).dtype == torch.bfloat16
    assert table.pick(torch.tensor([3])).isnan().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_keep_their_layout(layout: torch.memory_format) -> None:
    features = torch.rand(5, 8, 6, 6).contiguous(memory_format=layout)
    table = empty_rows(features[:2], 5)
    table[:] = features
    got = Rows(table, CPU).pick(torch.tensor([4, 1, 1]))
    assert torch.equal(got, features[[4, 1, 1]])
    assert got.is_contiguous(memory_format=layout)


def test_batches_are_the_samples_in_order_and_processes_share_them() -> None:
    known = Examples({"inputs": Rows(torch.arange(10.0), CPU), "targets": Rows(torch.arange(10) % 3, CPU)})
    order = torch.tensor([3, 1, 4, 9, 5, 2, 6])
    whole = [known.gather(b.loaded) for b in batches(known, order, 3, CPU)]
    assert [b["inputs"].tolist() for b in whole] == [[3, 1, 4], [9, 5, 2], [6]]
    assert [b["targets"].tolist() for b in whole] == [[0, 1, 1], [0, 2, 2], [0]]
    shares = [list(batches(known, order, 3, CPU, shared=(rank, 2))) for rank in (0, 1)]
    assert [[b.loaded["numbers"].tolist() for b in share] for share in shares] == [
        [[3, 4], [9, 2], [6]],
        [[1], [5], [6]],  # nothing is left of the last batch: it gets another's, with weight 0
    ]
    assert [[(b.samples, b.whole) for b in share] for share in shares] == [
        [(2, 3), (2, 3), (1, 1)],
        [(1, 3), (1, 3), (0, 1)],
    ]


def test_words_are_placed_as_drawn_for_the_whole_batch() -> None:
    """Where a process's words lie must not depend on how many processes there are."""

    def offsets(count: Any, generator: torch.Generator) -> Any:
        return torch.randint(340, (count,), generator=generator)

    words = torch.rand(6, 170, 129)
    known = Examples({"inputs": Rows(words, CPU), "targets": Rows(torch.zeros(6), CPU)}, offsets)

    def made(shared: Any) -> Any:
        drawn = batches(known, torch.arange(6), 4, CPU, torch.Generator().manual_seed(3), shared)
        return [known.gather(batch.loaded)["inputs"] for batch in drawn]

    whole, first, second = made((0, 1)), made((0, 2)), made((1, 2))
    for batch, one, other in zip(whole, first, second, strict=True):
        assert torch.equal(batch[0::2], one)
        assert torch.equal(batch[1::2], other)


class Line(nn.Module):
    """y = a x, with dropout that shows in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.asked = 0

    def forward(self, inputs: Any, targets: Any) -> Any:
        self.asked += 1
        outputs = nn.functional.dropout(inputs * self.a, 0.5, self.training)
        total = (outputs.sum(1) - targets).square().mean()
        return Losses(total, {"half": total.detach() / 2}, outputs.detach())


def line_steps(**settings: Any) -> Steps:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    known = {"inputs": torch.rand(10, 2, generator=generator), "targets": torch.rand(10, generator=generator)}
    examples = Examples({name: Rows(value, CPU) for name, value in known.items()})
    config = TrainingConfig(**{"lr": 0.1, "batch": 4, **settings})
    return Steps(Line(), examples, config, CPU, training=True)


# What PyTorch warns of, word by word, and where it says that it does; the first, of itself, only once a process.
PROTOTYPE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations "
    "(Triggered internally at /pytorch/torch/csrc/cuda/Module.cpp:1003.)"
)
SYNCHRONIZING = (
    "called a synchronizing CUDA operation (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:159.)"
)


class SyncDebugMode:
    """PyTorch's, with its own notice that it is a prototype; where this build has none, with the same words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modes: list[str] = []
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode: str) -> None:
        self.modes.append(mode)
        if (real := getattr(torch._C, "_cuda_set_sync_debug_mode", None)) is None:
            warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)
            return
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        try:
            real(("default", "warn").index(mode))
        finally:
            torch.set_warn_always(always)

    def wait(self, *_: Any) -> None:
        """What an operation does that lets the host wait."""
        if self.modes[-1:] == ["warn"]:
            warnings.warn(SYNCHRONIZING, UserWarning, stacklevel=2)


class FakeGraphs(Graphs):
    """Graphs on a CPU: capturing computes nothing, a replay calls the function again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str | None = None) -> None:
        for name in ("Stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        super().__init__()
        self.sync_debug = SyncDebugMode(monkeypatch)
        self.captured: list[tuple[str, int]] = []
        self.replays = 0

        def captured(function: Callable[..., Any], stream: Any, pool: Any) -> Any:
            if fails is not None:
                raise RuntimeError(fails)
            results: list[torch.Tensor] = []

            def replay() -> None:
                self.replays += 1
                made = function()
                made = list(made) if isinstance(made, tuple) else [made]
                for old, new in zip(results, made, strict=True):
                    old.copy_(new)

            state = torch.get_rng_state()
            copies = [(p, p.detach().clone()) for p in self.parameters]
            sums = self.steps._sums.clone()
            optimizer = json.dumps({}), {p: {k: v.clone() for k, v in s.items()} for p, s in self.adam.state.items()}
            made = function()
            results += [r.detach().clone() for r in (made if isinstance(made, tuple) else [made])]
            torch.set_rng_state(state)
            with torch.no_grad():
                for p, before in copies:
                    p.copy_(before)
                for parameter, s in optimizer[1].items():
                    for k, v in s.items():
                        self.adam.state[parameter][k].copy_(v)
            self.steps._sums.copy_(sums)
            return replay, tuple(results) if isinstance(made, tuple) else results[0]

        monkeypatch.setattr(steps_module, "captured", captured)

    def on_stream(self) -> Any:
        return torch.enable_grad()

    def of(self, steps: Steps) -> "FakeGraphs":
        self.steps, self.adam, self.parameters = steps, steps.optimizer, list(steps.objective.parameters())
        steps.graphs = self
        return self


def epochs(steps: Steps, count: int) -> list[object]:
    numbers = torch.arange(10)
    found: list[object] = []
    for epoch in range(count):
        found.append(loop.train_epoch(steps, numbers, epoch))
        sums, outputs, targets = loop.evaluate(steps, numbers)
        found += [sums, outputs.tolist(), targets.tolist()]
    return found


def test_replayed_steps_are_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4, 4 and 2 in training and in validation: every size, its warm steps, its capture, its replays."""
    plain, replayed = line_steps(clip=0.5), line_steps(clip=0.5)
    graphs = FakeGraphs(monkeypatch).of(replayed)
    count = WARM + 3
    assert epochs(plain, count) == epochs(replayed, count)
    assert torch.equal(plain.objective.a, replayed.objective.a)
    assert len(graphs._captured) == 4
    assert graphs.replays == 2 * (2 * count - WARM) + 2 * (count - WARM)


NO_GRAPH = "training.capture: no CUDA graph can hold these steps, which run uncaptured: "


@pytest.mark.parametrize("first", ["", "out of memory\nmore"])
def test_what_cannot_be_captured_runs_all_the_same_and_says_why_once(
    first: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the failed capture raises over what failed first."""
    plain, failing = line_steps(), line_steps()
    graphs = FakeGraphs(monkeypatch).of(failing)

    def captured(function: Callable[..., Any], stream: Any, pool: Any) -> None:
        try:
            raise RuntimeError(first)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(steps_module, "captured", captured)
    with caplog.at_level(logging.WARNING):
        assert epochs(plain, WARM + 2) == epochs(failing, WARM + 2)
    assert [r.getMessage() for r in caplog.records] == [NO_GRAPH + ("out of memory" if first else "RuntimeError('')")]
    assert graphs.replays == 0


def test_a_step_for_which_the_host_waits_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, waiting = line_steps(), line_steps()
    graphs = FakeGraphs(monkeypatch, fails="never asked").of(waiting)
    waiting.objective.register_forward_hook(graphs.sync_debug.wait)
    with caplog.at_level(logging.WARNING):
        assert epochs(plain, WARM + 2) == epochs(waiting, WARM + 2)
    assert [r.getMessage() for r in caplog.records] == [NO_GRAPH + "called a synchronizing CUDA operation"]


def test_waits_are_noted_and_other_warnings_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's notice about itself, whose words are like those of a wait, is neither noted nor shown."""
    mode = SyncDebugMode(monkeypatch)
    others = ["something else", "synchronizing CUDA operations are slow"]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with steps_module.synchronisations() as found:
            mode.wait()
            torch._C._warn()  # a test message, through the machinery that the others come through
            for text in others:
                warnings.warn(text, stacklevel=1)
        assert found == ["called a synchronizing CUDA operation"]
        assert mode.modes == ["warn", "default"]
        with steps_module.synchronisations() as found:
            pass
        assert found == []
    first, *rest = [str(warning.message) for warning in shown]
    assert first.startswith("Test message for TORCH_WARN (Triggered internally at ")
    assert rest == others


def test_a_gradient_left_by_a_failed_capture_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, failing = line_steps(), line_steps()
    graphs = FakeGraphs(monkeypatch).of(failing)

    def captured(function: Callable[..., Any], stream: Any, pool: Any) -> None:
        for p in failing.objective.parameters():
            p.grad = torch.full_like(p, 1e6)
        raise RuntimeError("no")

    monkeypatch.setattr(steps_module, "captured", captured)
    assert epochs(plain, WARM + 2) == epochs(failing, WARM + 2)
    assert graphs.replays == 0


@pytest.mark.parametrize("clip", [None, 0.1, 1e3])
def test_steps_are_adams_of_clipped_gradients(clip: float | None) -> None:
    steps, numbers = line_steps(clip=clip, weight_decay=0.1), torch.arange(4)
    inputs, targets = (steps.examples.rows[name].pick(numbers) for name in ("inputs", "targets"))
    objective: Any = steps.objective
    a = objective.a.detach().clone().requires_grad_()
    adam = torch.optim.Adam([a], 0.1, weight_decay=0.1)
    steps.objective.eval()
    for _ in range(4):
        loss = ((inputs * a).sum(1) - targets).square().mean()
        adam.zero_grad()
        loss.backward()
        if clip is not None:
            assert (a.grad.norm() > clip) == (clip < 1)
            a.grad *= min(1.0, clip / a.grad.norm().item())
        adam.step()
        torch.testing.assert_close(steps.train(Batch({"numbers": numbers}, 4, 4)), loss.detach())
    torch.testing.assert_close(steps.objective.a, a)


def test_words_move_in_every_epoch() -> None:
    drawn = []

    def offsets(count: Any, generator: torch.Generator) -> Any:
        drawn.append(None if generator is None else torch.randint(340, (count,), generator=generator).tolist())
        return torch.zeros(count, dtype=torch.long)

    steps = line_steps(batch=10)
    words = Rows(torch.rand(10, 170, 129), CPU)
    steps.examples = Examples({**steps.examples.rows, "inputs": words}, offsets)
    steps.objective.a = nn.Parameter(torch.ones(128))
    steps.objective.forward = lambda inputs, targets: Losses(
        (inputs.mean((1, 2)) * steps.objective.a).sum(), {}, inputs.detach()
    )
    for epoch in (0, 1, 0):
        loop.train_epoch(steps, torch.arange(10), epoch)
    loop.evaluate(steps, torch.arange(10))
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[3] is None


def test_adams_state_is_loaded_in_the_layout_of_the_weights(tmp_path: Path) -> None:
    """Adam in one kernel takes it for granted; a wrong one gives wrong weights, on a GPU an error."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    x = torch.rand(2, 4, 8, 8)

    def stepped(adam: Any) -> None:
        adam.zero_grad()
        conv(x).square().mean().backward()
        adam.step()

    first = torch.optim.Adam(conv.parameters(), 0.1, fused=True)
    stepped(first)
    save_checkpoint(tmp_path / "adam.safetensors", optimizer_tensors(first), {"kind": "training"})
    second = torch.optim.Adam(conv.parameters(), 0.1, fused=True)
    load_optimizer(second, load_checkpoint(tmp_path / "adam.safetensors", "training").tensors)
    before = {name: p.detach().clone() for name, p in conv.named_parameters()}
    stepped(first)
    expected = {name: p.detach().clone() for name, p in conv.named_parameters()}
    with torch.no_grad():
        for name, p in conv.named_parameters():
            p.copy_(before[name])
    stepped(second)
    assert all(torch.equal(p, expected[name]) for name, p in conv.named_parameters())


def test_the_learning_rate_falls_on_a_plateau_and_a_resumed_run_knows(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least fall counts, as does a rate below PyTorch's own limits."""
    losses = iter([1.0, 1.0 - 1e-7, 1.05, 1.05, 0.8, 0.85, 0.85])
    rates = []
    evaluate, train_epoch = loop.evaluate, loop.train_epoch

    def made_up(steps: int, samples: Any) -> Any:
        parts, outputs, targets = evaluate(steps, samples)
        return (parts | {"total": next(losses)} if len(samples) == 7 else parts), outputs, targets

    def watched(steps: int, train: Any, epoch: int) -> Any:
        rates.append(float(steps.optimizer.param_groups[0]["lr"]))
        return train_epoch(steps, train, epoch)

    monkeypatch.setattr(loop, "evaluate", made_up)
    monkeypatch.setattr(loop, "train_epoch", watched)
    run = changed(experiment, epochs=7, lr=1e-9, lr_factor=0.1, lr_patience=2, checkpoint_seconds=0)
    train_classifier(run, tmp_path / "whole", quiet=True)
    assert rates == pytest.approx([1e-9] * 4 + [1e-10] * 3)

    def interrupted(steps: int, train: Any, epoch: int) -> Any:
        if epoch == 5:
            raise KeyboardInterrupt
        return train_epoch(steps, train, epoch)

    losses = iter([1.0, 1.0 - 1e-7, 1.05, 1.05, 0.8])
    monkeypatch.setattr(loop, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(run, tmp_path / "broken", quiet=True)
    losses = iter([0.85, 0.85])
    rates.clear()
    monkeypatch.setattr(loop, "train_epoch", watched)
    train_classifier(run, tmp_path / "broken", resume=True, quiet=True)
    assert rates == pytest.approx([1e-10] * 2)
    assert same(trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "broken"))


@pytest.mark.parametrize("kind", ["embeddings", "spectrograms", "words", "targets of the twin"])
def test_reading_batches_from_the_host_changes_nothing(
    experiment: Experiment, twin: Path, kind: str, tmp_path: Path
) -> None:
    if kind == "spectrograms":
        experiment = replace(experiment, network=replace(experiment.network, domain="real", embedding_scale="none"))
    elif kind == "words":
        experiment = replace(experiment, task="word", features=replace(experiment.features, cut="word"))
    elif kind == "targets of the twin":
        at = replace(experiment.anti_transfer, twin=twin, layers=[2, 13])
        experiment = replace(experiment, anti_transfer=at)
    less = replace(experiment.anti_transfer, cache_mib=0)
    results = [
        train_classifier(run, tmp_path / str(number), quiet=True)["parts"]
        for number, run in enumerate((experiment, replace(changed(experiment, data_mib=0), anti_transfer=less)))
    ]
    assert results[0] == results[1]
    assert same(trained_weights(tmp_path / "0"), trained_weights(tmp_path / "1"))


def test_bfloat16_trains_nearly_the_same_network_with_float32_weights(
    experiment: Experiment, twin: Path, rhemo: Path, tmp_path: Path
) -> None:
    at = replace(experiment.anti_transfer, twin=twin, layers=[7])
    for name in ("float32", "bf16"):
        run = changed(replace(experiment, anti_transfer=at), precision=name)
        train_classifier(run, tmp_path / name, quiet=True)
    first, second = trained_weights(tmp_path / "float32"), trained_weights(tmp_path / "bf16")
    assert {t.dtype for t in second.values()} <= {torch.float32, torch.int64}
    assert not same(first, second)
    a, b = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("float32", "bf16"))
    for column in ("train_total", "train_similarity_7", "validation_total"):
        assert not a[column].equals(b[column])
        torch.testing.assert_close(
            torch.tensor(a[column].to_numpy()), torch.tensor(b[column].to_numpy()), rtol=2e-2, atol=0
        )
    again = evaluate_run(tmp_path / "bf16", device="cpu", quiet=True)
    assert (
        again["test"]["accuracy"]
        == json.loads((tmp_path / "bf16/result.json").read_text())["parts"]["test"]["accuracy"]
    )


def test_rhemo_trains_in_bfloat16(corpus: Manifest, cache: Path, rhemo: Path, tmp_path: Path) -> None:
    from qat.config import RHEmoExperiment, from_plain

    record = load_checkpoint(rhemo, "rhemo").record
    stage1 = from_plain(RHEmoExperiment, record["experiment"])
    stage2 = changed(replace(stage1, rhemo=replace(stage1.rhemo, beta=0.01)), initial=rhemo, precision="bf16", epochs=1)
    result = pretrain_rhemo(stage2, tmp_path / "stage2", quiet=True)
    first = json.loads((rhemo / "result.json").read_text())["parts"]["test"]["reconstruction"]
    assert result["parts"]["test"]["reconstruction"] < 1.1 * first


def test_embeddings_are_computed_once_for_all_trainings(
    experiment: Experiment, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    write = embeddings_module._write
    monkeypatch.setattr(embeddings_module, "_write", lambda *given: asked.append(given) or write(*given))
    fresh = replace(experiment, cache=tmp_path / "cache")
    train_classifier(fresh, tmp_path / "a", quiet=True)
    train_classifier(changed(fresh, seed=2), tmp_path / "b", quiet=True)
    assert len(asked) == 1
    train_classifier(experiment, tmp_path / "c", quiet=True)
    assert same(trained_weights(tmp_path / "a"), trained_weights(tmp_path / "c"))


def test_embeddings_are_those_of_the_encoder_the_spectrograms_and_the_device(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Whatever differs in the call has embeddings of its own, even where all lie in one folder."""
    data = load_data(experiment, quiet=True)
    numbers = torch.tensor([3, 0])

    def embedded(encoder: Any, spectrograms: Any, device: Any = CPU) -> Any:
        read = embeddings_module.embeddings(encoder, spectrograms, tmp_path, device, quiet=True)
        return read(numbers)

    torch.manual_seed(0)
    first, second = RHEmoEncoder(), RHEmoEncoder()
    quieter = replace(data.spectrograms.normalisation, maximum=2 * data.spectrograms.normalisation.maximum)
    others = [
        (first, data.spectrograms),
        (second, data.spectrograms),
        (first, replace(data.spectrograms, normalisation=quieter)),
        (first, replace(data.spectrograms, store=replace(data.spectrograms.store, folder=tmp_path / "copy"))),
    ]
    shutil.copytree(data.spectrograms.store.folder, tmp_path / "copy")
    for count, (encoder, spectrograms) in enumerate(others, 1):
        for _ in range(2):
            with torch.no_grad():
                expected = encoder.eval()(spectrograms(torch.arange(36)))[numbers]
            torch.testing.assert_close(embedded(encoder, spectrograms), expected, rtol=1e-5, atol=1e-6)
            assert len(list(tmp_path.glob("embeddings-*"))) == count
    settings = [json.loads(path.read_text())["device"] for path in tmp_path.glob("embeddings-*/meta.json")]
    assert settings == ["cpu"] * 4


def validating(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Has the validation losses of the next trainings be these."""
    evaluate, epoch = loop.evaluate, loop.train_epoch
    number = [0]

    def noting(steps: int, train: Any, at: Any) -> Any:
        number[0] = at
        return epoch(steps, train, at)

    def made_up(steps: int, samples: Any) -> Any:
        parts, outputs, targets = evaluate(steps, samples)
        return parts | {"total": losses[number[0]]}, outputs, targets

    monkeypatch.setattr(loop, "train_epoch", noting)
    monkeypatch.setattr(loop, "evaluate", made_up)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_disk_does_not_set_the_pace(
    experiment: Experiment, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are written after the first epoch and at the end: that of the best epoch, in between, as it was then."""
    validating(monkeypatch, [3.0, 2.0, 1.0, 2.0, 3.0])
    written = []
    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda path, *rest: written.append(path.name) or save(path, *rest))
    slow = changed(experiment, epochs=5, checkpoint_seconds=1000, keep=keep)
    train_classifier(slow, tmp_path / "run", quiet=True)
    assert written == ["model.safetensors", "last.safetensors"] * 2
    written.clear()
    train_classifier(changed(slow, checkpoint_seconds=0), tmp_path / "each", quiet=True)
    models = 5 if keep == "last" else 3
    assert (written.count("model.safetensors"), written.count("last.safetensors")) == (models, 5)
    assert same(trained_weights(tmp_path / "run"), trained_weights(tmp_path / "each"))
    train_classifier(changed(slow, epochs=models), tmp_path / "until", quiet=True)
    assert same(trained_weights(tmp_path / "run"), trained_weights(tmp_path / "until"))
    assert len(pd.read_csv(tmp_path / "run/metrics.csv")) == 5


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_that_is_interrupted_between_states_goes_on_from_the_last(
    experiment: Experiment, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are there at once; what is kept belongs to the state that the run goes on from."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validating(monkeypatch, [3.0, 2.0, 1.0, 0.5, 3.0])
    run = changed(experiment, epochs=5, checkpoint_seconds=1000, keep=keep)
    train_classifier(run, tmp_path / "whole", quiet=True)
    train_epoch = loop.train_epoch

    def failing(steps: int, train: Any, epoch: int) -> Any:
        if epoch == 3:
            raise KeyboardInterrupt
        return train_epoch(steps, train, epoch)

    monkeypatch.setattr(loop, "train_epoch", failing)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(run, tmp_path / "broken", quiet=True)
    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    assert len(pd.read_csv(tmp_path / "broken/metrics.csv")) == 3
    assert load_checkpoint(tmp_path / "broken", "classifier").record["epoch"] == 0
    history = load_checkpoint(tmp_path / "broken/last.safetensors", "training").record["history"]
    assert len(history) == 1
    elsewhere = changed(run, data_mib=0, capture=False, checkpoint_seconds=0)
    train_classifier(elsewhere, tmp_path / "broken", resume=True, quiet=True)
    assert same(trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "broken"))
    events = EventAccumulator(str(tmp_path / "broken/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/total")] == [0, 1, 2, 3, 4]
    again = train_classifier(run, tmp_path / "broken", resume=True, quiet=True)
    assert again["epochs"] == 5


def test_profile_says_where_a_step_goes_and_changes_nothing(
    experiment: Experiment,
    twin: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    at = replace(experiment.anti_transfer, twin=twin, layers=[2], cache=False)
    # 25 samples: the first epoch's short last batch interrupts the five steps, which are profiled in the second.
    run = changed(replace(experiment, anti_transfer=at), batch=4)
    train_classifier(run, tmp_path / "plain", quiet=True)
    train_classifier(run, tmp_path / "run", quiet=True, profile=True)
    assert same(trained_weights(tmp_path / "plain"), trained_weights(tmp_path / "run"))
    page = (tmp_path / "run/profile.txt").read_text().splitlines()
    assert len(page) < 45
    step = float(page[0].split()[-2])
    shares = {line.split()[0]: line.split() for line in page if line}
    spans = {name: float(shares[name][1]) for name in ("gather", "forward", "twin", "backward", "optimiser")}
    assert 0 < spans["twin"] < spans["forward"]
    total = sum(value for name, value in spans.items() if name != "twin")
    assert 0.5 * step < total < step
    assert sum("convolution" in line for line in page) >= 1
    trace = json.loads((tmp_path / "run/trace.json").read_text())
    assert sum(event.get("name") == "backward" for event in trace["traceEvents"]) == COUNT
    with caplog.at_level(logging.WARNING):
        train_classifier(changed(run, batch=30), tmp_path / "short", quiet=True, profile=True)
    assert f"after the first {WARM} steps there were no {COUNT} consecutive steps of 30 samples" in caplog.text
    assert not (tmp_path / "short/profile.txt").exists()


def test_profile_of_captured_steps_looks_at_both_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = line_steps(batch=2)
    graphs = FakeGraphs(monkeypatch).of(steps)
    replays = []
    with Profile(steps, tmp_path):
        for epoch in range(4):
            loop.train_epoch(steps, torch.arange(10), epoch)
            replays.append(graphs.replays)
    assert replays == [0, 2, 7, 12]  # steps 0-2 are warm, 3-7 profiled, 8 is captured, 9-13 profiled
    text = (tmp_path / "profile.txt").read_text()
    assert text.count("A training step, ") == 2
    assert "captured as a CUDA graph" in text
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json", "trace-captured.json", "profile.txt"}


def test_the_page_of_a_gpu_counts_each_kernel_once() -> None:
    """Beside kernels, the profiler gives spans of phases and of the optimiser on the GPU's time line."""

    def event(key: Any, device: Any, own: Any, total: float = 0.0, count: Any = COUNT, annotation: bool = False) -> Any:
        return SimpleNamespace(
            key=key,
            count=count,
            device_type=SimpleNamespace(name=device),
            is_user_annotation=annotation,
            self_device_time_total=own,
            device_time_total=total,
            self_cpu_time_total=1e6,
            cpu_time_total=1e6,
        )

    events = [
        event("aten::mm", "CPU", 0.0, 400.0),
        event("backward", "CPU", 0.0, 900.0),
        event("backward", "CUDA", 2000.0, 2000.0, annotation=True),
        event("Optimizer.step#Adam.step", "CUDA", 700.0, annotation=True),
        event("gemm", "CUDA", 400.0, count=2 * COUNT),
        event("gemm", "CUDA", 100.0, count=2 * COUNT),
        *(event(f"small {n}", "CUDA", 1.0) for n in range(50)),
    ]
    steps = SimpleNamespace(device=SimpleNamespace(type="cuda"), config=TrainingConfig(precision="bf16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_module, "device_name", lambda device: "A GPU")
        lines = profile_module.page(events, 2e-4, steps, captured=True).splitlines()
    assert lines[0] == "A training step, captured as a CUDA graph: 0.200 ms"
    assert lines[1] == "A GPU; batch 20, bf16; mean of 5 profiled steps"
    found = {" ".join(line.split()[:-3]): line.split()[-3:] for line in lines[3:] if line.endswith("%")}
    assert found["the GPU computes"] == ["0.110", "ms", "55.0%"]
    assert found["backward"] == ["0.180", "ms", "90.0%"]
    assert found["28 others"] == ["0.006", "ms", "2.8%"]
    assert [line.split() for line in lines if line.startswith("gemm")] == [
        ["gemm", "0.080", "ms", "40.0%", "2"],
        ["gemm", "0.020", "ms", "10.0%", "2"],
    ]


def test_the_command_line_profiles(experiment: Experiment, tmp_path: Path) -> None:
    import yaml

    from qat.config import to_plain

    plain = to_plain(changed(experiment, batch=3))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--profile"]) == 0
    assert (tmp_path / "run/profile.txt").is_file()


META = torch.device("meta")


@pytest.mark.parametrize(
    "kind", ["plain", "twin", "targets", "clipped", "presence", "trainable", "words", "folded", "RH-Emo"]
)
def test_a_step_asks_the_device_for_nothing_and_copies_nothing_to_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph could not hold it else. On the meta device values cannot be asked for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(steps_module, "adam", lambda p, *_: torch.optim.SGD([q for q in p if q.requires_grad], 1e-3))
    network = NetworkConfig(width=0.01, rhemo_mode="trainable" if kind == "trainable" else "frozen")
    embedded = kind not in ("trainable", "words", "RH-Emo")
    shape = (4, 64, 64) if embedded else (170, 129) if kind == "words" else (1, 512, 128)
    rows = {"inputs": Rows(torch.empty(9, *shape, device=META), META)}
    targets = torch.zeros(9, dtype=torch.long, device=META)
    if kind == "RH-Emo":
        targets = torch.empty(9, 4, device=META)
        config = RHEmoConfig(width=0.01, beta=0.01)
        objective: Any = RHEmoObjective(RHEmo(config).to(META), config)
    else:
        term = None
        if kind in ("twin", "targets", "folded"):
            loss = FoldedRowwise() if kind == "folded" else GramChannel()
            at = AntiTransferConfig(random_twin=True, layers=[2, 13], loss=loss)
            term = AntiTransfer(at, VGG16(network, 2)).to(META)
            if kind == "targets":
                rows |= term.remember(lambda n: torch.empty(len(n), *shape, device=META), torch.arange(9), 4)
        if kind == "presence":
            targets = torch.empty(9, 5, device=META)
        classifier = SpeechClassifier(network, 5).to(META)
        objective = ClassificationObjective(classifier, term, embedded=embedded, multi_label=kind == "presence")
    rows["targets"] = Rows(targets, META)
    training = TrainingConfig(batch=4, clip=1.0 if kind == "clipped" else None)
    steps = Steps(objective, Examples(rows), training, META, training=True)
    loaded = {"numbers": torch.empty(4, dtype=torch.long, device=META)}
    if kind == "words":
        loaded["offsets"] = torch.empty(4, dtype=torch.long, device=META)
    steps.train(Batch(loaded, 4, 4))  # makes the sums
    for objective_trains, step in ((True, steps.train), (False, steps.evaluate)):
        objective.train(objective_trains)
        with Devices() as devices:
            step(Batch(loaded, 4, 4))
        assert devices.seen == {"meta"}


class Devices(TorchDispatchMode):
    """The devices of all tensors that an operator is given or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                self.seen.add(value.device.type)
        return out
