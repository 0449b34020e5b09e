"""The anti-transfer losses: one closed table, which configuration, functions, modules and tests read.

A loss is a value: its class names the comparison, its fields are its options. To add a loss, add its class here, its
mathematics to `functional.anti_transfer_loss`, its literal version to `tests/ops/literal.py`, and a sentence to the
help of `qat.config.AntiTransferConfig.loss`; the tests run over the table.

>>> loss_of("cka"), loss_of({"name": "folded-rowwise", "clamp": "product"})
(CKA(), FoldedRowwise(clamp='product'))
>>> FoldedRowwise("product").plain()
{'name': 'folded-rowwise', 'clamp': 'product'}

No PyTorch is needed here.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Literal, get_args


class Loss:
    """The base class of the losses.

    Attributes:
        name: its name in files and on the command line.
        summary: a few words for reports.
        per_sample: whether the loss is a mean over samples: then it has a value per sample, processes can share a
            batch, and a `GramTarget` can replace the frozen features; otherwise it has one value per batch.
        rows: the axis whose entries are rows of the Gram matrices, "channel", "position" or "batch"; None for losses
            that are no squared cosine of Gram matrices.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    per_sample: ClassVar[bool] = False
    rows: ClassVar[str | None] = None
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # every class of the table is a dataclass

    def __post_init__(self) -> None:
        for option, allowed in self.options().items():
            value = getattr(self, option)
            if not isinstance(value, type(allowed[0])) or value not in allowed:
                raise ValueError(f"{option} of loss {self.name!r} must be {_one_of(allowed)}; got {told(value)}")

    @classmethod
    def options(cls) -> dict[str, tuple[Any, ...]]:
        """The allowed values of each option."""
        types = {field.name: field.type for field in cls.__dataclass_fields__.values()}
        return {option: (False, True) if each is bool else get_args(each) for option, each in types.items()}

    @property
    def gram(self) -> tuple[str, bool] | None:
        """The options of `gram_cosine`, if the loss is its square."""
        return (self.rows, getattr(self, "centred", False)) if self.rows else None

    @property
    def takes_negative(self) -> bool:
        """Whether the loss is defined for features below 0."""
        return getattr(self, "aggregation", None) != "mul_comp"

    def weight(self, beta: float) -> float:
        """The factor of the loss."""
        return beta

    def plain(self) -> str | dict[str, Any]:
        """The name, or a mapping with the name and the options that are not default, as `loss_of` takes them."""
        changed = self._changed()
        return {"name": self.name, **changed} if changed else self.name

    def __str__(self) -> str:
        changed = (option if value is True else str(value) for option, value in self._changed().items())
        return ", ".join([self.summary, *changed])

    def _changed(self) -> dict[str, Any]:
        """The options that are not default."""
        return {option: value for option, value in vars(self).items() if value != getattr(type(self), option)}


@dataclass(frozen=True)
class GramChannel(Loss):
    """The paper's: the squared cosine of the samples' channel x channel Gram matrices (WASPAA 2023, equation 1)."""

    name = "gram-channel"
    summary = "one cosine per sample"
    rows = "channel"
    per_sample = True
    centred: bool = False


@dataclass(frozen=True)
class GramPosition(Loss):
    """As `GramChannel` with position x position matrices, which no rotation of the channels changes."""

    name = "gram-position"
    summary = "one cosine per sample, over positions"
    rows = "position"
    per_sample = True
    centred: bool = False


@dataclass(frozen=True)
class GramBatch(Loss):
    """The squared cosine of the batch's sample x sample Gram matrices."""

    name = "gram-batch"
    summary = "one cosine per batch, over samples"
    rows = "batch"
    centred = False


@dataclass(frozen=True)
class CKA(Loss):
    """Linear centred kernel alignment of the batch, squared (Kornblith et al. 2019)."""

    name = "cka"
    summary = "one cosine per batch, over samples, centred"
    rows = "batch"
    centred = True


@dataclass(frozen=True)
class FoldedRowwise(Loss):
    """The released code's: the batch folded into the channels, the squared mean of the rows' absolute cosines.

    Args:
        clamp: the lower bound 1e-8 of norms, on "each" of two (PyTorch >= 1.12) or on their "product" (PyTorch 1.7,
            with which the paper's code ran).
    """

    name = "folded-rowwise"
    summary = "batch-folded, row-wise cosine"
    clamp: Literal["each", "product"] = "each"

    def weight(self, beta: float) -> float:
        """The released code applies beta twice."""
        return beta * beta


@dataclass(frozen=True)
class CosSquared(Loss):
    """The research code's: the squared mean of the absolute cosines of aggregated maps, along their last axis.

    Args:
        aggregation: "none"; "mean", "sum" or "max" over the channels; "mul_comp", the product over the channels of
            (x + 1e-10)^0.001, for features >= 0; "pairwise", all pairs of a channel of one map and a channel of the
            other; "stochastic_pairwise", the pairs of a random run of C // B consecutive channels, the same for both
            (one channel for B = 1 and for B > C).
    """

    name = "cos-squared"
    summary = "cosine of maps"
    aggregation: Literal["none", "mean", "sum", "max", "mul_comp", "pairwise", "stochastic_pairwise"] = "none"


@dataclass(frozen=True)
class MseSigmoid(Loss):
    """The research code's: -sigmoid(mean squared difference of aggregated maps), in [-1, -1/2].

    Args:
        aggregation: as in `CosSquared`; or "gram", one matrix F F^T / (B C N) / 0.001 of the batch, F `[B C, N]`.
    """

    name = "mse-sigmoid"
    summary = "squared difference of maps"
    aggregation: Literal["none", "mean", "sum", "max", "mul_comp", "pairwise", "stochastic_pairwise", "gram"] = "none"


_CLASSES: tuple[type[Loss], ...] = (GramChannel, GramPosition, GramBatch, CKA, FoldedRowwise, CosSquared, MseSigmoid)
LOSSES: Mapping[str, type[Loss]] = {loss.name: loss for loss in _CLASSES}
"""The table: the class of every loss, by name."""
_DEFAULTS = {name: loss() for name, loss in LOSSES.items()}


def loss_of(value: object) -> Loss:
    """The loss for a value of the table, a name, or a mapping with `name` and options.

    Raises:
        ValueError: no such loss or option.
    """
    if isinstance(value, _CLASSES):
        return value
    if isinstance(value, str) and value in _DEFAULTS:
        return _DEFAULTS[value]
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"loss must be {_one_of(LOSSES)}, or a mapping of such a name and options; got {told(value)}")
    options = {option: setting for option, setting in value.items() if option != "name"}
    allowed = LOSSES[name].options()
    for option in options.keys() - allowed.keys():
        listed = ", ".join(allowed) or "none"
        raise ValueError(f"{option}: {told(options[option])} must be an option of loss {name!r}, which has {listed}")
    return LOSSES[name](**options)


def told(value: object) -> str:
    """A value in an error message: on one line, and not longer than it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _one_of(allowed: Any) -> str:
    return f"one of {', '.join(map(repr, allowed))}"
