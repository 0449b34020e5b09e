import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, recall_score

from qat.training.metrics import classification_metrics, metrics_for, presence_metrics, probabilities
from qat.training.stopping import best_epoch, should_stop


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(1, 20))
def test_standard_rule_waits_exactly_patience_epochs(losses: Any, patience: Any) -> None:
    best = losses.index(min(losses))
    assert best_epoch(losses) == best
    assert should_stop(losses, patience) == (len(losses) - 1 - best >= patience)


def test_nan_is_never_the_best() -> None:
    nan = float("nan")
    assert best_epoch([nan, 2.0, nan, 1.0, nan]) == 3
    assert best_epoch([nan, nan]) == 0


def test_reference_window() -> None:
    """From epoch index patience + 1 on, if the oldest of the last patience - 1 losses is their minimum."""
    patience = 4
    assert not should_stop([0.0, 1.0, 2.0, 3.0, 4.0], patience, "reference-window")
    assert should_stop([0.0, 5.0, 5.0, 1.0, 2.0, 3.0], patience, "reference-window")
    assert not should_stop([0.0, 5.0, 5.0, 2.0, 1.0, 3.0], patience, "reference-window")


def test_classification_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng()
    truth = np.concatenate([np.arange(4), rng.integers(0, 4, 60)])
    logits = rng.normal(size=(64, 4))
    predicted = logits.argmax(1)
    metrics = classification_metrics(torch.tensor(logits), torch.tensor(truth), list("abcd"))
    assert metrics["accuracy"] == pytest.approx((truth == predicted).mean())
    assert metrics["uar"] == pytest.approx(recall_score(truth, predicted, average="macro"))
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert metrics["confusion"] == confusion_matrix(truth, predicted).tolist()
    assert metrics["samples"] == 64


def test_accuracy_of_batches_gives_a_short_last_one_more_weight() -> None:
    """Three batches of 4, 4 and 1: the last sample alone is a third of the mean."""
    rng = np.random.default_rng()
    truth, logits = rng.integers(0, 3, 9), rng.normal(size=(9, 3))
    right = (logits.argmax(1) == truth).astype(float)
    metrics = classification_metrics(torch.tensor(logits), torch.tensor(truth), list("abc"), batch=4)
    assert metrics["accuracy"] == pytest.approx((right[:4].mean() + right[4:8].mean() + right[8]) / 3)
    plain = classification_metrics(torch.tensor(logits), torch.tensor(truth), list("abc"))
    assert plain["accuracy"] == pytest.approx(right.mean())
    assert {name: metrics[name] for name in metrics if name != "accuracy"} == {
        name: plain[name] for name in plain if name != "accuracy"
    }
    truth, logits = rng.integers(0, 2, (5, 3)), rng.normal(size=(5, 3))
    right = ((logits > 0) == truth).mean(1)
    targets = torch.tensor(truth, dtype=torch.float32)
    metrics = presence_metrics(torch.tensor(logits), targets, list("abc"), batch=2)
    assert metrics["accuracy"] == pytest.approx((right[:2].mean() + right[2:4].mean() + right[4]) / 3)


def test_an_answer_that_is_no_class_is_wrong() -> None:
    """Six samples of two classes; outputs 2 and 3 are none, and two samples are answered with them."""
    logits = torch.eye(4)[[0, 2, 0, 1, 3, 0]]
    metrics = classification_metrics(logits, torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b", "unused-3", "unused-4"])
    assert metrics["confusion"] == [[2, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert metrics["uar"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_unweighted_accuracy_is_over_the_classes_that_occur() -> None:
    logits = torch.eye(3)[[0, 0, 1]]
    assert classification_metrics(logits, torch.tensor([0, 0, 0]), list("abc"))["uar"] == pytest.approx(2 / 3)
    logits = torch.eye(3)[[0, 0, 1, 1]]  # of the second class one sample alone, which is answered right
    assert classification_metrics(logits, torch.tensor([0, 0, 0, 1]), list("abc"))["uar"] == pytest.approx(5 / 6)


def test_presence_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng()
    truth = rng.integers(0, 2, (50, 3))
    truth[0], truth[1] = 1, 0
    logits = rng.normal(size=(50, 3))
    metrics = presence_metrics(torch.tensor(logits), torch.tensor(truth, dtype=torch.float32), list("abc"))
    assert metrics["accuracy"] == pytest.approx(((logits > 0) == truth).mean())
    assert metrics["average_precision"] == pytest.approx(
        average_precision_score(truth, logits, average="macro"), rel=1e-4
    )
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, logits > 0, average="macro"), rel=1e-4)
    assert metrics["samples"] == 50


@pytest.mark.parametrize("accuracy", ["samples", "batches"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_an_experiments_metrics_are_those_of_its_task(multi_label: bool, accuracy: str) -> None:
    experiment: Any = SimpleNamespace(multi_label=multi_label, training=SimpleNamespace(batch=4, accuracy=accuracy))
    logits, classes, batch = torch.randn(9, 3), list("abc"), 4 if accuracy == "batches" else None
    if multi_label:
        targets = (torch.randn(9, 3) > 0).float()
        targets[0], targets[1] = 1, 0
        expected, shares = presence_metrics(logits, targets, classes, batch), torch.sigmoid(logits)
    else:
        targets = torch.randint(3, (9,))
        expected, shares = classification_metrics(logits, targets, classes, batch), torch.softmax(logits, 1)
    assert metrics_for(experiment, classes)(logits, targets) == expected
    assert torch.equal(probabilities(logits, experiment), shares)


def test_a_logit_of_zero_is_a_no() -> None:
    """At probability 0.5, of which torchmetrics says no too."""
    metrics = presence_metrics(torch.zeros(2, 2), torch.tensor([[0, 1], [1, 0]]), list("ab"))
    assert metrics["accuracy"] == 0.5
    assert presence_metrics(torch.zeros(2, 2), torch.zeros(2, 2), list("ab"))["accuracy"] == 1


def test_labels_that_do_not_occur_have_no_precision(recwarn: pytest.WarningsRecorder) -> None:
    truth = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    logits = torch.tensor([[2.0, 1, 5], [1, 3, 5], [3, -1, 5]])
    first, second = 1.0, (1 / 1 + 2 / 3) / 2  # of the second label, the last sample has the least score
    assert presence_metrics(logits, truth, list("abc"))["average_precision"] == pytest.approx((first + second) / 2)
    assert math.isnan(presence_metrics(logits, 0 * truth, list("abc"))["average_precision"])
    assert not recwarn.list
