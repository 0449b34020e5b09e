"""One experiment from its settings to a finished run folder: train, evaluate, predict, and RH-Emo's pretraining."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor, nn

import qat
from qat.anti_transfer import AntiTransfer
from qat.config import AnyExperiment, CorpusConfig, Experiment, RHEmoExperiment, from_plain, to_plain
from qat.data.audio import load_audio
from qat.data.rows import Rows
from qat.data.spectrogram import Normalisation, cut, place_words, to_input, word_offsets
from qat.data.store import prepare
from qat.files import replacing, write_json, write_text
from qat.models import VGG16, RHEmo, RHEmoEncoder
from qat.models.layers import placed
from qat.training import distributed
from qat.training.checkpoint import Checkpoint, check_run, load_checkpoint
from qat.training.data import (
    LABEL_COLUMN,
    Data,
    Spectrograms,
    class_targets,
    labelled,
    load_data,
    read_corpus,
    rhemo_targets,
)
from qat.training.embeddings import embeddings
from qat.training.examples import Examples
from qat.training.loop import evaluate, fit, peak_memory
from qat.training.metrics import classification_metrics, presence_metrics
from qat.training.objectives import TERMS, ClassificationObjective, RHEmoObjective, SpeechClassifier
from qat.training.profile import Profile
from qat.training.steps import Steps, precision

Metrics = dict[str, Any]


def train_classifier(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    name: str | None = None,
    profile: bool = False,
) -> Metrics:
    """Train, evaluate and record one classifier.

    Args:
        experiment: everything that is set.
        folder: run folder. It gets ``experiment.yaml``, ``split.json``, ``model.safetensors`` (self-contained:
            encoder, network, classes, normalisation), ``last.safetensors``, ``metrics.csv``, ``tensorboard/``,
            ``predictions.csv`` and, at the very end, ``result.json``.
        resume: go on where an interrupted run of the same experiment stopped; a finished one is returned as it is.
        quiet: no progress bars.
        name: what reports call the run; runs that differ only in their seed share it. The folder's name by default.
        profile: find out where a step's time goes: ``trace*.json`` and ``profile.txt`` in the folder, see
            :class:`qat.training.profile.Profile`.

    Returns:
        What ``result.json`` holds: metrics of every part, epochs, times, memory, versions.

    Raises:
        ValueError: anything wrong with the settings, the corpus, a checkpoint or the folder.
    """
    with _run_folder(experiment, folder, resume) as (device, finished):
        if finished is not None:
            return finished
        pretrained = _Pretrained.load(experiment)
        data = load_data(experiment, _normalisation(experiment), quiet=quiet)
        classes, targets = class_targets(data.index, data.parts, experiment.task)
        classes = _outputs(classes, experiment)
        torch.manual_seed(experiment.training.seed)
        classifier = placed(pretrained.classifier(classes), device)
        inputs, embedded = _network_inputs(classifier, data, experiment, device, quiet)
        anti_transfer = pretrained.anti_transfer()
        objective = ClassificationObjective(
            classifier,
            None if anti_transfer is None else placed(anti_transfer, device),
            embedded=embedded,
            multi_label=_multi_label(experiment),
        )
        rows = {"inputs": inputs, "targets": Rows(targets.to(device), device)}
        constant = data.spectrograms.placing is None and (embedded or classifier.encoder is None)
        if anti_transfer is not None and experiment.anti_transfer.cache and constant:
            with precision(experiment.training.precision, device):
                rows |= anti_transfer.remember(inputs.fetch, torch.tensor(data.used), experiment.training.batch)
        record = {"kind": "classifier", "classes": classes}
        run = _Run(experiment, folder, name or folder.name, data, record, device, quiet, profile)
        judge = _judge(experiment, classes)
        result, outputs = run.execute(objective, classifier, _examples(rows, data.spectrograms), judge, resume)
        result["parameters"] = _count(classifier.net)
        if distributed.rank() == 0:
            _write_predictions(folder / "predictions.csv", data, outputs, classes, experiment)
            write_json(folder / "result.json", result)
        return result


def pretrain_rhemo(
    experiment: RHEmoExperiment,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    name: str | None = None,
    profile: bool = False,
) -> Metrics:
    """Train one stage of RH-Emo; stage 2 starts from stage 1 by ``training.initial``.

    Beside the losses the result gives, per part, ``constant`` (the reconstruction loss of the best constant predictor)
    and ``live_channels`` (embedding channels, of four, whose deviation is over 1 % of the largest one's).

    Args, Raises: as :func:`train_classifier`.
    """
    with _run_folder(experiment, folder, resume) as (device, finished):
        if finished is not None:
            return finished
        _one_process("RH-Emo, whose batch norm mixes the samples of a batch,")
        torch.manual_seed(experiment.training.seed)
        model = RHEmo(experiment.rhemo)
        if experiment.training.initial is not None:
            first = load_checkpoint(experiment.training.initial, "rhemo")
            _same_inputs(experiment, first, "training.initial")
            first.load_into(model)
        data = load_data(experiment, experiment.normalisation, quiet=quiet)
        targets = rhemo_targets(data.index)
        annotated = [name for name, known in zip(TERMS, ~targets[data.used].isnan().all(0), strict=True) if known]
        objective = RHEmoObjective(placed(model, device), experiment.rhemo, annotated)
        run = _Run(experiment, folder, name or folder.name, data, {"kind": "rhemo"}, device, quiet, profile)
        rows = {
            "inputs": Rows.within(data.spectrograms.rows, data.used, device, experiment.training.data_mib),
            "targets": Rows(targets.to(device), device),
        }
        examples = _examples(rows, data.spectrograms)
        result, _ = run.execute(objective, model, examples, lambda outputs, targets: {}, resume)
        for part, indices in data.parts.items():
            result["parts"][part] |= _embedding_health(model, data.spectrograms, torch.tensor(indices), device)
        result["parameters"] = _count(model)
        if distributed.rank() == 0:
            write_json(folder / "result.json", result)
        return result


def evaluate_run(
    run: Path, corpus: CorpusConfig | None = None, *, device: str = "auto", quiet: bool = False
) -> Metrics:
    """Judge a trained classifier on its own parts, or on every labelled clip of another corpus.

    Args:
        run: run folder or checkpoint.
        corpus: another corpus with the same labels; by default the parts that the run was split into.
        device: as in :class:`qat.config.TrainingConfig`.
        quiet: no progress bar.

    Returns:
        Metrics by part; the only part is called ``all`` for another corpus.
    """
    checkpoint = load_checkpoint(run, "classifier")
    experiment, normalisation = _settings(checkpoint)
    with distributed.process_group(device) as where:
        if corpus is None:
            data = load_data(experiment, normalisation.kind, trained=checkpoint, quiet=quiet)
        else:
            manifest = labelled(read_corpus(corpus), experiment.task)
            store = prepare(manifest, experiment.features, experiment.cache, progress=not quiet)
            spectrograms = Spectrograms.of(store, normalisation, experiment)
            data = Data(store.index, {"all": list(range(len(store)))}, spectrograms)
        classes, targets = class_targets(data.index, data.parts, experiment.task, checkpoint.record["classes"])
        objective = ClassificationObjective(
            placed(load_classifier(checkpoint), where), None, embedded=False, multi_label=_multi_label(experiment)
        )
        # Every sample is seen once: nothing is won by keeping it on the device.
        rows = {"inputs": Rows(data.spectrograms.rows, where), "targets": Rows(targets.to(where), where)}
        examples, judge = _examples(rows, data.spectrograms), _judge(experiment, classes)
        steps = Steps(objective, examples, experiment.training, where, training=False)
        return {part: _judged(steps, torch.tensor(indices), judge)[0] for part, indices in data.parts.items()}


def predict(run: Path, files: list[Path], *, device: str = "cpu") -> pd.DataFrame:
    """Classify audio files with a trained classifier.

    Args:
        run: run folder or checkpoint.
        files: what :func:`qat.data.audio.load_audio` reads; a file of several cuts gets their mean probability.
        device: where to compute.

    Returns:
        One row per file: ``path``, ``predicted``, then the probability of every class.

    Raises:
        ValueError: a file is missing, unreadable, silent or shorter than one window.
    """
    checkpoint = load_checkpoint(run, "classifier")
    experiment, normalisation = _settings(checkpoint)
    where = distributed.device_of(device)
    classifier = load_classifier(checkpoint).eval().to(where)
    classes = checkpoint.record["classes"]
    rows = []
    with torch.no_grad(), precision(experiment.training.precision, where):
        for path in files:
            audio = load_audio(path, experiment.features.sample_rate)
            cuts = normalisation(cut(audio, experiment.features))
            word = experiment.features.cut == "word"
            x = place_words(cuts, word_offsets(len(cuts), "centre")) if word else to_input(cuts)
            p = _probabilities(classifier(x.to(where)).float(), experiment).mean(0)
            chosen = {"path": str(path), "predicted": classes[int(p.argmax())]}
            rows.append(chosen | dict(zip(classes, p.tolist(), strict=True)))
    return pd.DataFrame(rows)


def load_classifier(checkpoint: Checkpoint) -> SpeechClassifier:
    """The trained classifier of a checkpoint, encoder included."""
    network = _settings(checkpoint)[0].network
    classifier = SpeechClassifier(network, len(checkpoint.record["classes"]))
    checkpoint.load_into(classifier)
    return classifier


@dataclass(frozen=True)
class _Run:
    """What the two kinds of training share: fit, reload the best state, judge every part, collect the result."""

    experiment: AnyExperiment
    folder: Path
    name: str
    data: Data
    record: dict[str, Any]
    device: torch.device
    quiet: bool
    profile: bool

    def execute(
        self,
        objective: nn.Module,
        state: nn.Module,
        examples: Examples,
        judge: Callable[[Tensor, Tensor], Metrics],
        resume: bool,
    ) -> tuple[Metrics, dict[str, Tensor]]:
        parts, training = self.data.parts, self.experiment.training
        files = {part: self.data.index["path"].iloc[rows].unique().tolist() for part, rows in parts.items()}
        record = self.record | {
            "experiment": to_plain(self.experiment),
            "normalisation": to_plain(self.data.spectrograms.normalisation),
            "files": files,
        }
        # A run that is resumed wrote these already; `fit` is yet to find out whether its recordings are the same.
        if distributed.rank() == 0 and not (self.folder / "last.safetensors").is_file():
            write_json(self.folder / "split.json", files)
            write_text(self.folder / "experiment.yaml", yaml.safe_dump(record["experiment"], sort_keys=False))
        steps = Steps(objective, examples, training, self.device, training=True)
        numbers = {part: torch.tensor(rows) for part, rows in parts.items()}
        profiled = self.profile and distributed.rank() == 0
        with Profile(steps, self.folder) if profiled else contextlib.nullcontext():
            history = fit(
                steps,
                state,
                numbers["train"],
                numbers["validation"],
                self.folder,
                record,
                lambda outputs, targets: {k: v for k, v in judge(outputs, targets).items() if isinstance(v, float)},
                resume=resume,
                title=self.name,
                quiet=self.quiet,
            )
        kept = load_checkpoint(self.folder / "model.safetensors", record["kind"])
        kept.load_into(state)
        metrics, outputs = {}, {}
        # What an objective draws in evaluation must not depend on whether the run was resumed.
        torch.manual_seed(training.seed)
        for part, samples in numbers.items():
            metrics[part], outputs[part] = _judged(steps, samples, judge)
        seconds = [row["seconds"] for row in history]
        result = {
            "kind": record["kind"],
            "name": self.name,
            "seed": training.seed,
            "experiment": record["experiment"],
            "classes": record.get("classes", []),
            "parts": metrics,
            "epochs": len(history),
            "kept_epoch": kept.record["epoch"],
            "seconds": sum(seconds),
            "seconds_per_epoch": sum(seconds) / len(seconds),
            "peak_memory": peak_memory(self.device),
            "device": distributed.device_name(self.device),
            "processes": distributed.world_size(),
            "versions": {"qat": qat.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        return result, outputs


@contextlib.contextmanager
def _run_folder(experiment: AnyExperiment, folder: Path, resume: bool) -> Iterator[tuple[torch.device, Metrics | None]]:
    """The device to train on, and the result if this very experiment is finished already."""
    check_run(folder, experiment)
    finished = folder / "result.json"
    if finished.is_file():
        if not resume:
            raise ValueError(f"{folder}: holds a finished run; choose another folder, or delete this one")
        result = json.loads(finished.read_text())
    elif (folder / "last.safetensors").is_file() and not resume:
        raise ValueError(f"{folder}: holds an interrupted run; resume it, choose another folder, or delete this one")
    else:
        result = None
    with (
        _algorithms(experiment.training.deterministic),
        distributed.process_group(experiment.training.device) as device,
    ):
        yield device, result


@contextlib.contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms, or the fastest that cuDNN finds."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled: Any = torch.utils.deterministic
    filling, filled.fill_uninitialized_memory = filled.fill_uninitialized_memory, False
    searched, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, not deterministic
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which it reads when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = searched
        filled.fill_uninitialized_memory = filling


def _settings(checkpoint: Checkpoint) -> tuple[Experiment, Normalisation]:
    record = checkpoint.record
    return from_plain(Experiment, record["experiment"]), Normalisation(**record["normalisation"])


def _normalisation(experiment: AnyExperiment) -> str:
    if isinstance(experiment, Experiment) and experiment.normalisation == "paper":
        return "max" if experiment.network.embeds else "standard"
    return experiment.normalisation


def _multi_label(experiment: Experiment) -> bool:
    return experiment.task == "word-presence"


@dataclass(frozen=True)
class _Pretrained:
    """The checkpoints that a training builds on, found to fit before anything expensive starts."""

    experiment: Experiment
    rhemo: Checkpoint | None
    initial: Checkpoint | None
    twin: Checkpoint | None

    @classmethod
    def load(cls, experiment: Experiment) -> _Pretrained:
        """Read and check them.

        Raises:
            ValueError: one is missing, of another kind or network, or was trained on other inputs.
        """
        network, at = experiment.network, experiment.anti_transfer
        if network.rhemo_mode == "batch-statistics":
            _one_process("network.rhemo_mode batch-statistics, which mixes the samples of a batch,")
        if not at.loss.per_sample:
            _one_process(f"anti_transfer.loss {at.loss.name}, which mixes the samples of a batch,")
        if network.embeds and network.rhemo is None:
            raise ValueError(f"network.rhemo: the {network.domain} network needs a pretrained RH-Emo; none is named")
        found = cls(
            experiment,
            load_checkpoint(network.rhemo, "rhemo") if network.embeds and network.rhemo else None,
            load_checkpoint(experiment.training.initial, "classifier") if experiment.training.initial else None,
            load_checkpoint(at.twin, "classifier") if at.twin else None,
        )
        if found.rhemo is not None:
            _same_inputs(experiment, found.rhemo, "network.rhemo")
        for checkpoint, setting in ((found.initial, "training.initial"), (found.twin, "anti_transfer.twin")):
            if checkpoint is not None:
                found._check_network(checkpoint, setting)
        return found

    def classifier(self, classes: list[str]) -> SpeechClassifier:
        """A new classifier with RH-Emo's encoder, and the VGG16 weights of ``training.initial`` if that is set."""
        classifier = SpeechClassifier(self.experiment.network, len(classes))
        if classifier.encoder is not None and self.rhemo is not None:
            self.rhemo.load_into(classifier.encoder, "encoder")
        if self.initial is not None:
            source = self._vgg(self.initial)
            if self.initial.record["classes"] != classes or self.experiment.training.initial_head == "new":
                source.classifier[-1] = classifier.net.classifier[-1]
            classifier.net.load_state_dict(source.state_dict())
            if classifier.encoder is not None and self._trains_encoder(self.initial):
                self.initial.load_into(classifier.encoder, "encoder")
        return classifier

    def anti_transfer(self) -> AntiTransfer | None:
        """The anti-transfer term, if there is a twin."""
        config = self.experiment.anti_transfer
        if config.random_twin:
            return AntiTransfer(config, VGG16(self.experiment.network, num_classes=2))
        return None if self.twin is None else AntiTransfer(config, self._vgg(self.twin))

    def _trains_encoder(self, checkpoint: Checkpoint) -> bool:
        """Whether RH-Emo was trained along there, and is here."""
        modes = {self.experiment.network.rhemo_mode, _settings(checkpoint)[0].network.rhemo_mode}
        return modes == {"trainable"}

    def _vgg(self, checkpoint: Checkpoint) -> VGG16:
        net = VGG16(self.experiment.network, len(checkpoint.record["classes"]))
        checkpoint.load_into(net, "net")
        return net

    def _check_network(self, checkpoint: Checkpoint, setting: str) -> None:
        own, other = self.experiment.network, _settings(checkpoint)[0].network
        for field in ("domain", "width", "adaptive_pool"):
            if getattr(own, field) != getattr(other, field):
                raise ValueError(
                    f"{setting}: {checkpoint.path} has network.{field} {getattr(other, field)}, "
                    f"this experiment has {getattr(own, field)}; they must be equal"
                )
        _same_inputs(self.experiment, checkpoint, setting)
        if self.rhemo is None or "trainable" in (own.rhemo_mode, other.rhemo_mode):
            return
        theirs, ours = checkpoint.part("encoder"), self.rhemo.part("encoder")
        for name, _ in RHEmoEncoder().named_parameters():
            if not torch.equal(theirs[name], ours[name]):
                raise ValueError(f"{setting}: {checkpoint.path} was trained on the embedding of another RH-Emo")


def _same_inputs(experiment: AnyExperiment, checkpoint: Checkpoint, setting: str) -> None:
    """All stages must hear alike: only the cut may differ (words are shorter), and the fitted statistics."""
    own = to_plain(experiment.features) | {"normalisation": _normalisation(experiment)}
    record = checkpoint.record
    other = record["experiment"]["features"] | {"normalisation": record["normalisation"]["kind"]}
    for field, value in own.items():
        if field != "cut" and value != other[field]:
            raise ValueError(
                f"{setting}: {checkpoint.path} was trained with {field} {other[field]}, this experiment has {value}; "
                "they must be equal"
            )


def _one_process(what: str) -> None:
    if distributed.world_size() > 1:
        raise ValueError(f"{what} is trained by one process only; run it without torchrun")


def _examples(rows: dict[str, Rows], spectrograms: Spectrograms) -> Examples:
    """Samples whose inputs are embeddings or spectrograms, or words that are yet to be placed."""
    return Examples(rows, None if spectrograms.placing is None else spectrograms.offsets)


def _network_inputs(
    classifier: SpeechClassifier, data: Data, experiment: Experiment, device: torch.device, quiet: bool
) -> tuple[Rows, bool]:
    """What the objective is fed: embeddings computed once where nothing changes them, else spectrograms."""
    network, training = classifier.config, experiment.training
    frozen = network.embeds and network.rhemo_mode == "frozen"
    if network.embedding_scale != "none" and not frozen:
        raise ValueError(
            f"network.embedding_scale: {network.embedding_scale!r} needs an embedding and network.rhemo_mode 'frozen'"
        )
    read, embedded = data.spectrograms.rows, frozen and data.spectrograms.placing is None
    if embedded:
        assert classifier.encoder is not None
        known = embeddings(classifier.encoder, data.spectrograms, experiment.cache, device, quiet=quiet)
        scale = classifier.embedding_scale
        read = lambda numbers: known(numbers) / scale.cpu()  # noqa: E731
    else:
        known = lambda numbers: classifier.eval().embed(data.spectrograms(numbers).to(device)).cpu()  # noqa: E731
    if network.embedding_scale != "none":
        blocks = torch.tensor(data.parts["train"]).split(64)
        classifier.embedding_scale.copy_(_scale(map(known, blocks), network.embedding_scale))
    # What autocast would round in every step is kept rounded.
    rounded = training.precision == "bf16" and (embedded or classifier.encoder is None)
    dtype = torch.bfloat16 if rounded else None
    return Rows.within(read, data.used, device, training.data_mib, dtype), embedded


def _scale(embeddings: Iterable[Tensor], kind: str) -> Tensor:
    """The maximum, or the root mean square, of all blocks."""
    if kind == "max":
        return torch.stack([block.amax() for block in embeddings]).amax()
    squares = [(block.square().sum(dtype=torch.float64), block.numel()) for block in embeddings]
    return (torch.stack([total for total, _ in squares]).sum() / sum(count for _, count in squares)).sqrt()


def _outputs(classes: list[str], experiment: Experiment) -> list[str]:
    """The names of all outputs of a network."""
    outputs = experiment.network.outputs
    if outputs is None:
        return classes
    if _multi_label(experiment):
        raise ValueError(f"network.outputs: {outputs} must be absent with task {experiment.task}")
    if outputs < len(classes):
        raise ValueError(f"network.outputs: {outputs} must be at least {len(classes)}, the number of classes")
    return [*classes, *(f"unused-{n}" for n in range(len(classes) + 1, outputs + 1))]


def _judge(experiment: Experiment, classes: list[str]) -> Callable[[Tensor, Tensor], Metrics]:
    metrics = presence_metrics if _multi_label(experiment) else classification_metrics
    batch = experiment.training.batch if experiment.training.accuracy == "batches" else None
    return lambda outputs, targets: metrics(outputs, targets, classes, batch)


def _judged(steps: Steps, samples: Tensor, judge: Callable[[Tensor, Tensor], Metrics]) -> tuple[Metrics, Tensor]:
    losses, outputs, targets = evaluate(steps, samples)
    return losses | judge(outputs, targets), outputs


def _probabilities(logits: Tensor, experiment: Experiment) -> Tensor:
    return logits.sigmoid() if _multi_label(experiment) else logits.softmax(1)


def _write_predictions(
    path: Path, data: Data, outputs: dict[str, Tensor], classes: list[str], experiment: Experiment
) -> None:
    tables = []
    for part, logits in outputs.items():
        rows = data.index.iloc[data.parts[part]].reset_index(drop=True)
        columns = [name for name in ("path", "cut", "start", "speaker", "text") if name in rows]
        table = rows[columns].assign(label=rows[LABEL_COLUMN[experiment.task]])
        table.insert(0, "part", part)
        if not _multi_label(experiment):
            table["predicted"] = [classes[k] for k in logits.argmax(1)]
        p = pd.DataFrame(_probabilities(logits, experiment).numpy(), columns=[f"p_{name}" for name in classes])
        tables.append(pd.concat([table, p], axis=1))
    with replacing(path) as draft:
        pd.concat(tables).to_csv(draft, index=False, float_format="%.6g")


def _embedding_health(model: RHEmo, spectrograms: Spectrograms, samples: Tensor, device: torch.device) -> Metrics:
    """How much the autoencoder does: the loss of the best constant, and the embedding channels that carry anything."""
    pixels, embeddings = [], []
    model.eval()
    with torch.no_grad():
        for numbers in samples.split(64):
            x = spectrograms(numbers).to(device).clamp(0, 1)
            pixels.append(x.double().mean((1, 2, 3)).cpu())
            embeddings.append(model.encoder(x).cpu())
    mean = torch.cat(pixels).mean()
    constant = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    deviation = torch.cat(embeddings).transpose(0, 1).flatten(1).std(1)
    return {"constant": constant.item(), "live_channels": int((deviation > 0.01 * deviation.max()).sum())}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
