"""The losses of an epoch are means over samples: a short last batch counts by its samples."""

import torch
from torch import Tensor, nn

from qat.config import TrainingConfig
from qat.data.rows import Rows
from qat.training import loop
from qat.training.examples import Examples
from qat.training.objectives import Losses
from qat.training.steps import Steps

CPU = torch.device("cpu")


class MeanOfInputs(nn.Module):
    """A loss that is the mean of its batch, whatever is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor, targets: Tensor) -> Losses:
        mean = inputs.mean()
        return Losses(mean + 0 * self.weight, {"double": 2 * mean}, inputs)


def test_a_short_last_batch_counts_by_its_samples() -> None:
    """Batches of 2, 2 and 1 of the samples 1, 2, 3, 4 and 10: (1 + 2 + 3 + 4 + 10) / 5 = 4, in any order."""
    inputs = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    examples = Examples({"inputs": Rows(inputs, CPU), "targets": Rows(torch.zeros(5), CPU)})
    steps = Steps(MeanOfInputs(), examples, TrainingConfig(lr=0.1, batch=2), CPU, training=True)
    expected = {"total": 4.0, "double": 8.0}
    for epoch in range(2):
        assert loop.train_epoch(steps, torch.arange(5), epoch) == expected
        losses, _, _ = loop.evaluate(steps, torch.arange(5))
        assert losses == expected
