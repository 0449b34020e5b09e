"""Metrics of a classifier, from torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.config import Experiment

Metrics = dict[str, Any]
MetricsOf = Callable[[Tensor, Tensor], Metrics]
"""``(outputs, targets) -> metrics`` of a part."""


def metrics_for(experiment: Experiment, classes: list[str]) -> MetricsOf:
    """The metrics of an experiment's task."""
    metrics = presence_metrics if experiment.multi_label else classification_metrics
    batch = experiment.training.batch if experiment.training.accuracy == "batches" else None
    return lambda logits, targets: metrics(logits, targets, classes, batch)


def probabilities(logits: Tensor, experiment: Experiment) -> Tensor:
    """Probability of every class `[n, K]`; of labels that may occur together, each by itself."""
    return logits.sigmoid() if experiment.multi_label else logits.softmax(1)


def classification_metrics(logits: Tensor, targets: Tensor, classes: list[str], batch: int | None = None) -> Metrics:
    """Weighted accuracy, unweighted accuracy, macro F1 and confusion matrix over samples.

    Args:
        logits: `[n, K]`.
        targets: class indices `[n]`.
        classes: names of the K outputs; some may occur in no target.
        batch: if set, accuracy is the mean accuracy of consecutive batches of this size.

    Returns:
        ``accuracy`` (WA: share of correct samples), ``uar`` (UA: mean recall over the classes that occur in
        ``targets``), ``macro_f1`` (over the outputs that are targets or answers), ``confusion`` (rows true, columns
        predicted) and ``samples``.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score

    confusion = multiclass_confusion_matrix(logits, targets, num_classes=len(classes))
    support = confusion.sum(1)
    recall = confusion.diag()[support > 0] / support[support > 0]
    return {
        "accuracy": _share(logits.argmax(1) == targets, batch),
        "uar": recall.mean().item(),
        "macro_f1": multiclass_f1_score(logits, targets, num_classes=len(classes), average="macro").item(),
        "confusion": confusion.tolist(),
        "samples": len(targets),
    }


def presence_metrics(logits: Tensor, targets: Tensor, classes: list[str], batch: int | None = None) -> Metrics:
    """Mean average precision and macro F1 of a multi-label task.

    Args:
        logits: `[n, V]`.
        targets: zeros and ones `[n, V]`.
        classes: names of the V labels.
        batch: as in :func:`classification_metrics`.

    Returns:
        ``accuracy`` (share of correct yes/no answers), ``average_precision`` (mean over the labels that occur),
        ``macro_f1`` at probability 0.5, and ``samples``.
    """
    from torchmetrics.functional.classification import binary_average_precision, multilabel_f1_score

    truth, scores = targets.long(), logits.sigmoid()
    occurring = truth.any(0).nonzero().flatten().tolist()
    precision = [binary_average_precision(scores[:, k], truth[:, k]) for k in occurring]
    return {
        "accuracy": _share((logits > 0) == truth.bool(), batch),
        "average_precision": torch.tensor(precision).mean().item(),
        "macro_f1": multilabel_f1_score(scores, truth, num_labels=len(classes)).item(),
        "samples": len(targets),
    }


def _share(correct: Tensor, batch: int | None) -> float:
    """Share of true values of `[n]` or `[n, V]`, as a mean over batches if ``batch`` is set."""
    shares = [part.float().mean() for part in correct.split(batch or len(correct))]
    return torch.stack(shares).mean().item()
