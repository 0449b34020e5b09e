"""Anti-transfer learning: the frozen twin and the loss at the features of chosen layers.

Source: Guizzo et al., "Anti-transfer learning for task invariance in convolutional neural networks for speech
processing", 2021; in the quaternion domain: WASPAA 2023, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qat.config import AntiTransferConfig
from qat.models.vgg import VGG16, Tap, tap_name
from qkernels import GramTarget, anti_transfer_tap, gram_target
from qkernels.nn import AntiTransferLoss

Frozen = Tensor | GramTarget


class AntiTransfer(nn.Module):
    r"""The anti-transfer term of the loss, summed over layers.

    .. math:: L_{AT} = \sum_{s} \beta_s \frac1B \sum_b \cos^2(G_p^{(s,b)}, G_t^{(s,b)})

    The twin (the frozen network of the orthogonal task) is always in eval mode, never has gradients and runs only up
    to the deepest layer asked for; after :meth:`remember` it does not run at all. The trained network's features come
    from the forward pass that makes its logits, in which they go through taps::

        logits, made = net(x, anti_transfer(x))
        loss, similarities = anti_transfer.total(made)

    Args:
        config: layers, weights, position, and what is compared.
        twin: network of the same shape, already holding the orthogonal task's weights.
    """

    def __init__(self, config: AntiTransferConfig, twin: VGG16) -> None:
        super().__init__()
        self.layers = {tap_name(layer, config.position): layer for layer in config.layers}
        # The released code applies beta twice.
        self.weights = [beta**2 if config.semantics == "folded-rowwise" else beta for beta in config.betas]
        self.config = config
        self.loss = AntiTransferLoss(
            semantics=config.semantics,
            clamp=config.clamp,
            gram=config.gram,
            centred=config.centred,
            aggregation=config.aggregation,
            distance=config.distance,
        )
        self.twin: VGG16 | None = twin.requires_grad_(False).eval()
        self._tables: dict[str, _Table] = {}

    def train(self, mode: bool = True) -> AntiTransfer:
        super().train(mode)
        if self.twin is not None:
            self.twin.eval()
        return self

    def remember(self, inputs: Callable[[Tensor], Tensor], samples: Tensor, batch: int) -> None:
        """Compute what the twin gives of samples that are the same each time; from then on it is looked up by number.

        The twin is given up: there are no weights left that what is remembered could differ from, the settings are
        fixed, and the inputs are those of this call, so that nothing stale can be read. It is kept in memory, for as
        long as this object.

        All samples are computed here, in the order given, and not when each is first met: what a convolution makes of a
        sample depends on the size of the batch by a rounding error, and would then depend on the epoch in which a run
        was resumed, or on the number of processes.

        Args:
            inputs: ``samples [b] -> [b, ...]``, what the networks are given, on the device.
            samples: `[n]`, numbers of all samples that :meth:`forward` will be asked for.
            batch: samples at a time.
        """
        self._row = torch.full((int(samples.max()) + 1,), -1)
        self._row[samples] = torch.arange(len(samples))
        for start in range(0, len(samples), batch):
            numbers = samples[start : start + batch]
            targets = {tap: self._target(features) for tap, features in self._features(inputs(numbers)).items()}
            if not self._tables:
                size = len(samples) * sum(_values(target)[:1].nbytes for target in targets.values())
                on_host = size > self.config.cache_mib * 2**20
                self._tables = {tap: _Table(target, len(samples), on_host) for tap, target in targets.items()}
            for tap, target in targets.items():
                self._tables[tap].put(slice(start, start + len(numbers)), target)
        self.twin = None

    def forward(self, inputs: Tensor, samples: Tensor | None = None) -> dict[str, Tap]:
        """What the trained network's features go through, by tap name; each tap makes the layer's unweighted loss.

        Args:
            inputs: what the trained network is given, `[B, ...]`; the twin sees the same.
            samples: `[B]`, on the CPU, the numbers of these samples; needed after :meth:`remember` only.
        """
        frozen: Mapping[str, Frozen]
        if self.twin is not None:
            frozen = self._features(inputs)
        else:
            assert samples is not None, "the twin is given up: samples are known by their numbers only"
            rows = self._row[samples]
            assert (rows >= 0).all(), "a sample that was not remembered"
            frozen = {tap: table.get(rows) for tap, table in self._tables.items()}
        return {tap: self._tap(frozen[tap], weight) for tap, weight in zip(self.layers, self.weights, strict=True)}

    def total(self, made: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of what the taps made, and ``{"similarity_<layer>": scalar}``, unweighted, for the log."""
        losses = [made[tap] for tap in self.layers]
        # A weight of 0 only monitors: not even a similarity of NaN reaches the total.
        weighted = [
            weight * loss if weight else torch.zeros_like(loss)
            for weight, loss in zip(self.weights, losses, strict=True)
        ]
        total = torch.stack(weighted).sum()
        names = (f"similarity_{layer}" for layer in self.layers.values())
        return total, {name: loss.detach() for name, loss in zip(names, losses, strict=True)}

    def _features(self, inputs: Tensor) -> dict[str, Tensor]:
        assert self.twin is not None
        with torch.no_grad():
            return self.twin.features_at(inputs, self.layers)

    def _target(self, features: Tensor) -> Frozen:
        """What the loss needs of the twin's features, sample by sample."""
        if self.config.mixing:
            return features
        return gram_target(features, gram=self.config.gram, centred=self.config.centred)

    def _tap(self, frozen: Frozen, weight: float) -> Tap:
        config = self.config
        if weight and config.is_gram_cosine:
            return lambda features: anti_transfer_tap(features, frozen, gram=config.gram, centred=config.centred)
        return lambda features: (features, self.loss(features if weight else features.detach(), frozen))


class _Table:
    """What the twin gives at one tap, a row per sample, in the layout of the features.

    Args:
        like: what some samples have.
        rows: how many there will be.
        on_host: keep them in the host's memory, pinned, from which rows are copied while the device computes.
    """

    def __init__(self, like: Frozen, rows: int, on_host: bool) -> None:
        self.device = _values(like).device
        home = torch.device("cpu") if on_host else self.device
        values = _empty_like(_values(like), rows, home, pinned=home != self.device)
        self.kept: Frozen = values
        if isinstance(like, GramTarget):
            self.kept = like._replace(values=values, stats=like.stats.new_empty(2, rows))

    def put(self, rows: slice, frozen: Frozen) -> None:
        _values(self.kept)[rows] = _values(frozen)
        if isinstance(self.kept, GramTarget) and isinstance(frozen, GramTarget):
            self.kept.stats[:, rows] = frozen.stats

    def get(self, rows: Tensor) -> Frozen:
        """These rows `[b]`, on the device."""
        kept, there = _values(self.kept), rows.to(self.device, non_blocking=True)
        if kept.device == self.device:
            values = kept[there]
        else:
            values = _empty_like(kept, len(rows), self.device)
            for value, row in zip(values, rows.tolist(), strict=True):
                value.copy_(kept[row], non_blocking=True)
        if isinstance(self.kept, GramTarget):
            return self.kept._replace(values=values, stats=self.kept.stats[:, there])
        return values


def _values(frozen: Frozen) -> Tensor:
    return frozen.values if isinstance(frozen, GramTarget) else frozen


def _empty_like(values: Tensor, rows: int, device: torch.device, pinned: bool = False) -> Tensor:
    """`rows` rows of the shape, type and layout of those of `values`."""
    plain = values.dim() != 4 or values.is_contiguous() or not values.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if plain else torch.channels_last
    shape = (rows, *values.shape[1:])
    return torch.empty(shape, dtype=values.dtype, device=device, memory_format=layout, pin_memory=pinned)
