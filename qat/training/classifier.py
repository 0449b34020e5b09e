"""Training of a classifier: of emotions with or without anti-transfer, of speakers, of words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from qat.config import Experiment
from qat.data.rows import Rows
from qat.files import replacing, write_json
from qat.models import SpeechClassifier
from qat.models.layers import placed
from qat.training import distributed
from qat.training.data import LABEL_COLUMN, Data, class_targets, load_data
from qat.training.embeddings import stored_embeddings
from qat.training.metrics import Metrics, metrics_for, probabilities
from qat.training.objectives import ClassificationObjective
from qat.training.pretrained import Pretrained
from qat.training.run import open_run, parameter_count
from qat.training.steps import precision


def train_classifier(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    name: str | None = None,
    profile: bool = False,
    strict: bool = False,
) -> Metrics:
    """Train, evaluate and record one classifier.

    Args:
        experiment: all settings.
        folder: run folder. It gets ``experiment.yaml``, ``split.json``, ``model.safetensors`` (self-contained:
            encoder, network, classes, normalisation), ``last.safetensors``, ``metrics.csv``, ``tensorboard/``,
            ``predictions.csv`` and, at the very end, ``result.json``.
        resume: continue an interrupted run of the same experiment, or return the result of a finished one.
        quiet: no progress bars.
        name: name of the run in reports; runs that differ only in their seed share it. The folder's name by default.
        profile: profile some steps: ``trace*.json`` and ``profile.txt`` in the folder, see
            :class:`qat.training.profile.Profile`.
        strict: a file of the corpus that cannot be used is an error; otherwise it is left out.

    Returns:
        The content of ``result.json``: metrics of every part, epochs, times, memory, versions; ``problems`` are the
        files that were left out.

    Raises:
        ValueError: the settings, the corpus, a checkpoint or the folder do not fit.
    """
    with open_run(experiment, folder, resume=resume, quiet=quiet, name=name, profile=profile) as (run, finished):
        if finished is not None:
            return finished
        device, training = run.device, experiment.training
        pretrained = Pretrained.load(experiment)
        data = load_data(experiment, quiet=quiet, strict=strict)
        classes, targets = class_targets(data.index, data.parts, experiment.task)
        classes = _output_names(classes, experiment)

        torch.manual_seed(training.seed)
        classifier = placed(pretrained.classifier(classes), device)
        inputs, embedded = _network_inputs(classifier, data, experiment, device, quiet)
        anti_transfer = pretrained.anti_transfer()
        objective = ClassificationObjective(
            classifier,
            None if anti_transfer is None else placed(anti_transfer, device),
            embedded=embedded,
            multi_label=experiment.multi_label,
        )
        rows = {"inputs": inputs, "targets": Rows(targets.to(device), device)}
        constant = data.spectrograms.placing is None and (embedded or classifier.encoder is None)
        if anti_transfer is not None and experiment.anti_transfer.cache and constant:
            with precision(training.precision, device):
                rows |= anti_transfer.remember(inputs.fetch, torch.tensor(data.used), training.batch)

        about = {"kind": "classifier", "classes": classes}
        metrics_of = metrics_for(experiment, classes)
        result, outputs = run.train(objective, classifier, data, data.examples(**rows), metrics_of, about)
        result["parameters"] = parameter_count(classifier.net)
        if distributed.rank() == 0:
            _write_predictions(folder / "predictions.csv", data, outputs, classes, experiment)
            write_json(folder / "result.json", result)
        return result


def _output_names(classes: list[str], experiment: Experiment) -> list[str]:
    """The names of a network's outputs: the classes, then unused ones up to ``network.outputs``."""
    outputs = experiment.network.outputs
    if outputs is None:
        return classes
    if experiment.multi_label:
        raise ValueError(f"network.outputs: {outputs} must be absent with task {experiment.task}")
    if outputs < len(classes):
        raise ValueError(f"network.outputs: {outputs} must be at least {len(classes)}, the number of classes")
    return [*classes, *(f"unused-{n}" for n in range(len(classes) + 1, outputs + 1))]


def _network_inputs(
    classifier: SpeechClassifier, data: Data, experiment: Experiment, device: torch.device, quiet: bool
) -> tuple[Rows, bool]:
    """Inputs of the objective, and whether they are embeddings, which are computed once if the encoder is frozen."""
    network, training = classifier.config, experiment.training
    frozen = network.embeds and network.rhemo_mode == "frozen"
    if network.embedding_scale != "none" and not frozen:
        raise ValueError(
            f"network.embedding_scale: {network.embedding_scale!r} needs an embedding and network.rhemo_mode 'frozen'"
        )
    stored = stored_embeddings(classifier, data.spectrograms, experiment.cache, device, quiet=quiet)
    embedded = stored is not None

    def embed(numbers: Tensor) -> Tensor:
        return stored(numbers) if stored else classifier.eval().embed(data.spectrograms(numbers).to(device)).cpu()

    if network.embedding_scale != "none":
        blocks = torch.tensor(data.parts["train"]).split(64)
        classifier.embedding_scale.copy_(_scale(map(embed, blocks), network.embedding_scale))
    scale = classifier.embedding_scale.cpu()

    def read(numbers: Tensor) -> Tensor:
        return stored(numbers) / scale if stored else data.spectrograms.rows(numbers)

    # Autocast would round the same inputs in every step.
    rounded = training.precision == "bf16" and (embedded or classifier.encoder is None)
    dtype = torch.bfloat16 if rounded else None
    return Rows.within(read, data.used, device, training.data_mib, dtype), embedded


def _scale(embeddings: Iterable[Tensor], kind: str) -> Tensor:
    """The maximum, or the root mean square, of all blocks."""
    if kind == "max":
        return torch.stack([block.amax() for block in embeddings]).amax()
    squares = [(block.square().sum(dtype=torch.float64), block.numel()) for block in embeddings]
    return (torch.stack([total for total, _ in squares]).sum() / sum(count for _, count in squares)).sqrt()


def _write_predictions(
    path: Path, data: Data, outputs: dict[str, Tensor], classes: list[str], experiment: Experiment
) -> None:
    tables = []
    for part, logits in outputs.items():
        samples = data.index.iloc[data.parts[part]].reset_index(drop=True)
        columns = [name for name in ("path", "cut", "start", "speaker", "text") if name in samples]
        table = samples[columns].assign(label=samples[LABEL_COLUMN[experiment.task]])
        table.insert(0, "part", part)
        if not experiment.multi_label:
            table["predicted"] = [classes[k] for k in logits.argmax(1)]
        p = pd.DataFrame(probabilities(logits, experiment).numpy(), columns=[f"p_{name}" for name in classes])
        tables.append(pd.concat([table, p], axis=1))
    with replacing(path) as draft:
        pd.concat(tables).to_csv(draft, index=False, float_format="%.6g")
