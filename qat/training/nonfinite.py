"""Where a training stops being finite: its steps are computed once more, and each is looked at."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.data.rows import Rows
from qat.models import VGG16
from qat.training import distributed
from qat.training.objectives import Losses
from qat.training.steps import Steps

SHOWN = 3
"""Files of a batch that a message names."""


class Finding(NamedTuple):
    """The first thing that is not finite; of several processes' findings the smallest is the first.

    Args:
        step: number of the step in its pass, from 1.
        place: order within the step: 0 input, 1 forward pass, 2 gradient, 3 weight after the step.
        text: what it is, and of which files.
    """

    step: int
    place: int
    text: str


def first_finding(steps: Steps, paths: Sequence[str], passes: Callable[[], object]) -> Finding | None:
    """What ``passes``, which trains or evaluates, first computes that is not finite, over all processes.

    The steps are not captured, and wait for the device: only a training that has failed is looked at.

    Args:
        steps: the training's steps. Weights and optimiser are as before ``passes``, and finite.
        paths: file of every sample.
        passes: computes steps; a :class:`FloatingPointError` that it raises is expected.
    """
    search = _Search(steps, paths)
    with contextlib.suppress(FloatingPointError), search.watching():
        passes()
    findings = [finding for finding in distributed.gather(search.finding) if finding is not None]
    return min(findings, default=None)


class _Search:
    def __init__(self, steps: Steps, paths: Sequence[str]) -> None:
        self.steps, self.paths, self.objective = steps, paths, steps.objective
        self.finding: Finding | None = None
        self.step = 0
        self.numbers = torch.empty(0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks that look at every step; the objective is told the samples' numbers, which the first hook takes."""
        examples, device = self.steps.examples, self.steps.device
        numbers = Rows(torch.arange(len(self.paths), device=device), device)
        self.steps.examples = dataclasses.replace(examples, rows={**examples.rows, "numbers": numbers})
        self.steps.graphs = None  # a replayed graph calls no hook
        with contextlib.ExitStack() as hooks:
            hooks.callback(setattr, self.steps, "examples", examples)
            handles = [self.objective.register_forward_pre_hook(self._before, with_kwargs=True)]
            handles.append(self.objective.register_forward_hook(self._after, with_kwargs=True))
            for name, parameter in self.objective.named_parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_hook(name)))
            if self.steps.optimizer is not None:
                handles.append(self.steps.optimizer.register_step_post_hook(self._after_step))
            for handle in handles:
                hooks.callback(handle.remove)
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.step += 1
        self.numbers = kwargs["numbers"]
        if not _is_finite(kwargs["inputs"]):
            self._found(0, "the input", kwargs["inputs"])
        return args, {name: value for name, value in kwargs.items() if name != "numbers"}

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], losses: Losses) -> None:
        if self.finding is None and not _is_finite(losses.total):
            self._look_inside(kwargs)
            names = [name for name, part in losses.parts.items() if not _is_finite(part)]
            self._found(1, f"the loss {names[0] if names else 'total'}")

    def _look_inside(self, inputs: dict[str, Any]) -> None:
        """Compute the forward pass again, with a look at every layer; it is fused otherwise, so its bits may differ."""
        names = {module: name for name, module in self.objective.named_modules()}
        largest = max(float(p.detach().abs().max()) for p in self.objective.parameters() if p.numel())

        def look(name: str, side: str, value: object) -> None:
            if isinstance(value, Tensor) and not _is_finite(value):
                weights = f"where all weights are finite (up to {largest:.3g})"
                self._found(1, f"the {side} of {name}, {weights},", value)

        def leaf(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            for value in args:
                look(names[module], "input", value)
            look(names[module], "output", output)

        def tapped(net: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # A convolution of VGG16 is a function of its module's weight, which no hook of the module sees.
            x, taps = args[0], dict(args[1] or {}) if len(args) > 1 else {}
            for n in range(len(net.convs)):  # type: ignore[arg-type]
                taps[f"conv{n + 1}"] = tap(f"{names[net]}.convs.{n}", taps.get(f"conv{n + 1}"))
            return x, taps

        def tap(name: str, further: Any) -> Any:
            def noted(features: Tensor) -> tuple[Tensor, Tensor]:
                look(name, "output", features)
                return further(features) if further else (features, features)

            return noted

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for module in names:
                if isinstance(module, VGG16):
                    hooks.callback(module.register_forward_pre_hook(tapped).remove)
                elif next(module.children(), None) is None:
                    hooks.callback(module.register_forward_hook(leaf).remove)
            self.objective.forward(**inputs)

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if self.finding is None and parameter.grad is not None and not _is_finite(parameter.grad):
                self._found(2, f"the gradient of {name}, of a finite loss,")

        return look

    def _after_step(self, *_: Any) -> None:
        if self.finding is None:
            for name, parameter in self.objective.named_parameters():
                if not _is_finite(parameter):
                    self._found(3, f"{name} after the optimiser's step, by a finite gradient,")

    def _found(self, place: int, what: str, value: Tensor | None = None) -> None:
        """Note what is not finite, unless something was before it; ``value`` may tell of which samples ``[b, ...]``."""
        if self.finding is not None:
            return
        numbers = self.numbers
        if value is not None and value.dim() > 0 and len(value) == len(numbers):
            numbers = numbers[~value.isfinite().flatten(1).all(1)]
        files = list(dict.fromkeys(self.paths[n] for n in numbers.tolist()))
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        self.finding = Finding(self.step, place, f"{what} is not finite, of {', '.join(files[:SHOWN])}{more}")
        if distributed.world_size() == 1:  # several processes have to go on together
            raise FloatingPointError


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
