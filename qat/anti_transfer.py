"""Anti-transfer learning: the frozen twin and the loss at the features of chosen layers.

Source: Guizzo et al., "Anti-transfer learning for task invariance in convolutional neural networks for speech
processing", 2021; in the quaternion domain: WASPAA 2023, equations 1 and 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from qat.config import AntiTransferConfig
from qat.data.rows import Rows, empty_rows
from qat.models.vgg import VGG16, Tap, tap_name
from qkernels import GramTarget, anti_transfer_loss, anti_transfer_tap, gram_target

Frozen = Tensor | GramTarget


class AntiTransfer(nn.Module):
    r"""The anti-transfer term of the loss, summed over layers.

    .. math:: L_{AT} = \sum_{s} \beta_s \frac1B \sum_b \cos^2(G_p^{(s,b)}, G_t^{(s,b)})

    The twin (the frozen network of the orthogonal task) is always in eval mode, never has gradients and runs only up
    to the deepest of the layers; after :meth:`remember` it does not run at all. The trained network's features come
    from the forward pass that computes its logits, in which they go through taps::

        logits, tapped = net(x, anti_transfer(x))
        loss, similarities = anti_transfer.total(tapped)

    Args:
        config: layers, weights, position and loss.
        twin: network of the same shape, already holding the orthogonal task's weights.
    """

    def __init__(self, config: AntiTransferConfig, twin: VGG16) -> None:
        super().__init__()
        self.layers = {tap_name(layer, config.position): layer for layer in config.layers}
        self.weights = [config.loss.weight(beta) for beta in config.betas]
        self.config, self.loss = config, config.loss
        self.twin: VGG16 | None = twin.requires_grad_(False).eval()
        self._triangles: dict[str, bool | None] = {}

    def train(self, mode: bool = True) -> AntiTransfer:
        super().train(mode)
        if self.twin is not None:
            self.twin.eval()
        return self

    def remember(self, inputs: Callable[[Tensor], Tensor], samples: Tensor, batch: int) -> dict[str, Rows]:
        """Cache the twin's targets of samples whose inputs never change; from then on they are looked up by number.

        After caching, the twin is dropped, so the cache cannot go stale. It is kept in memory, not on disk.

        All samples are computed here, in the order of ``samples``, not at their first use: the rounding of a
        convolution depends on the size of the batch, so that targets would depend on the epoch in which a run was
        resumed, or on the number of processes.

        Args:
            inputs: inputs of the networks by sample number, ``samples [b] -> [b, ...]``, on the device.
            samples: numbers `[n]` of all samples that :meth:`forward` will need.
            batch: samples at a time.

        Returns:
            Tables by name; :meth:`forward` takes the batch's rows of each. If they exceed ``config.cache_mib``, they
            stay in the host's memory. Rows of other samples are NaN.
        """
        count = max(samples.tolist()) + 1
        tables: dict[str, Tensor] = {}
        for numbers in samples.split(batch):
            targets = {tap: self._target(features) for tap, features in self._features(inputs(numbers)).items()}
            if not tables:
                self._triangles = {
                    tap: t.triangles if isinstance(t, GramTarget) else None for tap, t in targets.items()
                }
                size = count * sum(_values(target)[:1].nbytes for target in targets.values())
                home = torch.device("cpu") if size > self.config.cache_mib * 2**20 else None
                for tap, target in targets.items():
                    tables[f"{tap}_values"] = empty_rows(_values(target), count, home)
                    if isinstance(target, GramTarget):
                        tables[f"{tap}_stats"] = target.stats.new_full((2, count), torch.nan)
            for tap, target in targets.items():
                values, table = _values(target), tables[f"{tap}_values"]
                table[numbers.to(table.device)] = values.to(table.device)
                if isinstance(target, GramTarget):
                    tables[f"{tap}_stats"][:, numbers.to(values.device)] = target.stats
        device = values.device
        self.twin = None
        return {name: Rows(table, device, axis=int(name.endswith("_stats"))) for name, table in tables.items()}

    def forward(self, inputs: Tensor, remembered: Mapping[str, Tensor] | None = None) -> dict[str, Tap]:
        """The taps for the trained network's features, by name; each computes its layer's unweighted loss.

        Args:
            inputs: input of the trained network and of the twin, `[B, ...]`.
            remembered: rows `[B, ...]` of these samples, after :meth:`remember`.
        """
        frozen: Mapping[str, Frozen]
        if self.twin is not None:
            frozen = self._features(inputs)
        else:
            assert remembered, "the twin is dropped: its targets of these samples have to be looked up"
            frozen = {tap: self._recalled(tap, remembered) for tap in self.layers}
        return {tap: self._tap(frozen[tap], weight) for tap, weight in zip(self.layers, self.weights, strict=True)}

    def total(self, tapped: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the taps' losses, and ``{"similarity_<layer>": scalar}``, unweighted, for the log."""
        losses = [tapped[tap] for tap in self.layers]
        # A weight of 0 only monitors: not even a similarity of NaN reaches the total.
        weighted = [
            loss if weight == 1 else weight * loss if weight else torch.zeros_like(loss)
            for weight, loss in zip(self.weights, losses, strict=True)
        ]
        total = functools.reduce(torch.add, weighted)
        names = (f"similarity_{layer}" for layer in self.layers.values())
        return total, {name: loss.detach() for name, loss in zip(names, losses, strict=True)}

    def _features(self, inputs: Tensor) -> dict[str, Tensor]:
        assert self.twin is not None
        with torch.no_grad(), record_function("twin"):
            return self.twin.features_at(inputs, self.layers)

    def _target(self, features: Tensor) -> Frozen:
        """The loss's targets from the twin's features, one per sample."""
        return gram_target(features, loss=self.loss) if self.loss.per_sample else features

    def _recalled(self, tap: str, remembered: Mapping[str, Tensor]) -> Frozen:
        values, triangles = remembered[f"{tap}_values"], self._triangles[tap]
        if triangles is None:
            return values
        return GramTarget(values, remembered[f"{tap}_stats"], triangles, self.loss)

    def _tap(self, frozen: Frozen, weight: float) -> Tap:
        def tap(features: Tensor) -> tuple[Tensor, Tensor]:
            with record_function("loss"):
                if weight:
                    return anti_transfer_tap(features, frozen, loss=self.loss)
                return features, anti_transfer_loss(features.detach(), frozen, loss=self.loss)

        return tap


def _values(frozen: Frozen) -> Tensor:
    return frozen.values if isinstance(frozen, GramTarget) else frozen
