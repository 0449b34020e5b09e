"""Training steps, epochs and inference of the whole networks (WASPAA 2023).

Ours, as in `qat train`, is compared with the research code's method and with a careful program under `torch.compile`.
All start from the same weights and compute the same values from the same inputs.
"""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.case import FORWARD, STEP, Case, Provider, Results, Run, Suite
from bench.gradients import reference_run, relative_error
from bench.layers import COMPILED, concatenated
from qat.anti_transfer import AntiTransfer
from qat.config import AntiTransferConfig, Experiment, NetworkConfig, TrainingConfig, from_plain
from qat.data.rows import Rows
from qat.models import SpeechClassifier
from qat.models.sizes import Sizes, layer_sizes
from qat.models.vgg import INPUT, POOL_AFTER, VGG16, tap_name
from qat.training.examples import Batch, Examples
from qat.training.loop import train_epoch
from qat.training.objectives import ClassificationObjective
from qat.training.steps import Steps, autocast
from qkernels.runtime.flops import gram_flops

CLASSES, LEARNING_RATE = 4, 1e-5
NO_AT, CACHED = "no AT", "cached targets"
TRAIN, TWIN, EPOCH, LOGITS = "step", "twin forward", "epoch", "logits"
CONTROL = "real-on-embedding"
NETWORKS, PRECISIONS = ("quaternion", "real", CONTROL), ("bf16", "float32", "tf32")
DATA = Path(__file__).parent / "data" / "demo_embeddings.npz"
# Relative errors of a loss, and of features and logits. In float32 cuDNN may use Winograd's algorithm: 1e-5 per layer.
LOSS = {"bf16": 2e-2, "tf32": 2e-3, "float32": 1e-4}
VALUES = {"bf16": 5e-2, "tf32": 5e-3, "float32": 3e-4}
# 1 - cosine of the angle between all gradients, as one vector, and the exact ones; the same for each parameter alone.
# Rounding changes the branch of some ReLUs and max pools. At full width on a CPU this gives, for baseline and ours, up
# to 0.009 and 0.07 in bfloat16, 1e-6 and 1e-4 in float32. The first criterion alone would miss a wrong layer: without
# anti-transfer the last bias holds nine tenths of the quaternion network's squared gradient.
TURN = {"bf16": 2.5e-2, "tf32": 5e-3, "float32": 1e-5}
PART_TURN = {"bf16": 0.25, "tf32": 5e-2, "float32": 2e-3}
# In networks narrower than NARROW a single branch turns the gradients by up to 0.02; in float32 once in 100 runs.
NARROW, NARROW_TURN = 0.2, 5e-2
EPOCH_LOSS = 5e-2
ADAM_BYTES = 28  # per parameter: reads p, g, m, v and writes p, m, v in float32


@dataclass
class Operands:
    """The untrained network, the frozen twin (None without anti-transfer), inputs `[B, ...]` and class numbers `[B]`.

    Providers take copies of the networks, which are collected in `copies`. Inputs of an epoch are on the CPU.
    """

    classifier: SpeechClassifier
    twin: VGG16 | None
    x: Tensor
    targets: Tensor
    device: torch.device
    copies: list[nn.Module] = field(default_factory=list)

    def own_classifier(self) -> SpeechClassifier:
        self.copies.append(own := copy.deepcopy(self.classifier))
        return own

    def own_twin(self) -> VGG16:
        assert self.twin is not None
        self.copies.append(own := copy.deepcopy(self.twin))
        return own


@dataclass(frozen=True, kw_only=True)
class NetworkCase(Case):
    """A work of a whole network.

    "step" is forward, backward and Adam; its parts are "forward" (to the loss), "forward+backward", and "twin forward",
    which is in all of them. "epoch" is all steps with the loading of samples; "logits" is inference.

    Args:
        width: width of the network, as in `NetworkConfig`.
        samples: number of samples of an epoch.
    """

    width: float = 1.0
    samples: int = 0

    @property
    def config(self) -> NetworkConfig:
        return NetworkConfig(domain=self.network, width=self.width)  # type: ignore[arg-type]

    @property
    def at(self) -> int:
        """The layer of anti-transfer; 0 for none."""
        return int(self.layer.split()[-1]) if self.layer.startswith("AT") else 0

    @property
    def shape(self) -> str:
        return " x ".join(str(size) for size in (self.samples or self.batch, *INPUT[self.network]))

    @property
    def energy(self) -> bool:
        return self.work in (TRAIN, LOGITS)

    @property
    def flops(self) -> int:
        """Operations in layers and Gram matrices, including the target's even if it is cached (less than 1 % of a
        step)."""
        forward, backward, tapped = self._passes
        flops = sum(layer.flops for layer in forward) + sum(2 * layer.flops for layer in backward)
        flops -= sum(layer.flops for layer in backward[:1])  # the first layer's input has no gradient
        if tapped:
            flops += sum(gram_flops(*tapped.features)[: 2 if backward else 1])
        return (self.samples or self.batch) * flops

    @property
    def bytes(self) -> int:
        """Each layer reads its operands and writes its results once per pass, in the case's type; Adam works in
        float32.

        Forward reads x, w and writes y. Backward reads dy, x, w and writes dx, dw. The loss reads both features, with
        its gradient twice, and writes one gradient.
        """
        forward, backward, tapped = self._passes
        samples, steps = self.samples or self.batch, math.ceil(self.samples / self.batch) or 1
        elements = sum(samples * (s.inputs + s.outputs) + steps * s.weights for s in forward)
        elements += sum(samples * (2 * s.inputs + s.outputs) + 2 * steps * s.weights for s in backward)
        elements -= samples * sum(s.inputs for s in backward[:1])  # the first layer's input has no gradient
        elements += samples * (5 if backward else 2) * tapped.outputs if tapped else 0
        adam = ADAM_BYTES * steps * sum(s.weights for s in backward) if self.work in (TRAIN, EPOCH) else 0
        return elements * self.dtype.itemsize + adam

    @property
    def _passes(self) -> tuple[list[Sizes], list[Sizes], Sizes | None]:
        """The layers of the forward pass, those of the backward pass, and the layer of anti-transfer."""
        sizes = layer_sizes(self.config, CLASSES)
        if self.work == TWIN:
            return sizes[: self.at], [], None
        twin = [] if self.variant == CACHED or self.work == EPOCH else sizes[: self.at]
        return sizes + twin, [] if self.work in (FORWARD, LOGITS) else sizes, sizes[self.at - 1] if self.at else None

    def autocast(self, device: torch.device) -> torch.autocast:
        return autocast(self.precision, device)

    def operands(self, device: torch.device) -> Operands:
        """Random networks and inputs, the same in each call; embeddings are non-negative, those of an epoch the
        demo's."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(1)
            classifier = SpeechClassifier(self.config, CLASSES)
            twin = VGG16(self.config, CLASSES) if self.at else None
            x, targets = torch.randn(self.batch, *INPUT[self.network]), torch.randint(CLASSES, (self.batch,))
        x = x if self.network == "real" else x.abs()
        if self.work == EPOCH:
            x, targets = demo_embeddings(self.samples)
        return Operands(classifier, twin, x, targets, device)

    @contextlib.contextmanager
    def checking(self, operands: Operands) -> Iterator[None]:
        """Sets dropout rates to 0, since a training loop would turn training mode on again."""
        modules = itertools.chain.from_iterable(network.modules() for network in operands.copies)
        rates = {module: module.p for module in modules if isinstance(module, nn.Dropout) and module.training}
        try:
            for module in rates:
                module.p = 0.0
            yield
        finally:
            for module, rate in rates.items():
                module.p = rate

    def check(self, provider: Provider, operands: Operands, results: Results) -> tuple[float, float]:
        """Loss, logits or frozen features, and gradients, against plain PyTorch from the initial weights.

        An epoch's mean loss is compared with that of the untrained network; 50 steps at this learning rate lower it by
        0.2 % without anti-transfer and by 1.1 % with it.
        """
        (value, *gradients), (exact, *exact_gradients) = results, reference(self, operands)
        assert len(gradients) == len(exact_gradients), f"{provider.name}: gradients of every parameter, and no others"
        error, bounds = relative_error(value, exact), VALUES if exact.dim() else LOSS
        worst = (error / (EPOCH_LOSS if self.work == EPOCH else bounds[self.precision]), error)
        if not gradients:
            return worst
        narrow = self.width < NARROW
        allowed, part = (NARROW_TURN,) * 2 if narrow else (TURN[self.precision], PART_TURN[self.precision])
        return max(worst, *turns(gradients, exact_gradients, allowed, part))

    def tiny(self) -> "NetworkCase":
        return replace(self, batch=2, precision="float32", width=1 / 16, samples=min(self.samples, 5))


def turns(
    gradients: Sequence[Tensor], exact: Sequence[Tensor], allowed: float, part: float
) -> Iterator[tuple[float, float]]:
    """Errors, as multiples of the tolerance and as they are, of each parameter's gradient and of all as one vector.

    Two errors are computed: one minus the cosine, with the tolerance `part` for each gradient and `allowed` for all;
    and the relative error of the length, which may be as large as the allowed angle in radians.
    """
    pairs = ((x.flatten().double(), y.flatten().double()) for x, y in zip(gradients, exact, strict=True))
    products = torch.stack([torch.stack([x @ y, x @ x, y @ y]) for x, y in pairs])
    bounds = [part] * len(gradients) + [allowed]
    for bound, sums in zip(bounds, [*products.tolist(), products.sum(0).tolist()], strict=True):
        product, square, exact_square = sums
        if square == exact_square == 0:
            continue  # of a layer after one whose ReLUs are all off
        length = (square * exact_square) ** 0.5
        turn, stretch = (1 - product / length, abs((square / exact_square) ** 0.5 - 1)) if length else (1.0, 1.0)
        yield (turn / bound, turn) if math.isfinite(turn) else (math.inf, math.inf)
        yield stretch / (2 * bound) ** 0.5, stretch


def demo_embeddings(samples: int) -> tuple[Tensor, Tensor]:
    """Embeddings `[samples, 4, 64, 64]` in [0, 1] and emotions `[samples]` of 128 clips, repeated as needed.

    The clips are from the training part of `qat demo` (synthesised speech, seed 1), the embeddings from its RH-Emo,
    divided by their maximum and rounded to steps of 1/255. After `make demo` they were written by
    `prepare(Path("runs/demo-synthetic/runs/ADDRESS"), DATA)`, where ADDRESS is that of "baseline" in `plan.csv`.
    """
    with np.load(DATA) as file:
        embeddings, labels = (torch.from_numpy(file[name]) for name in ("embeddings", "labels"))
    rows = torch.arange(samples) % len(labels)
    return embeddings[rows].float() / 255, labels[rows]


def prepare(run: Path, out: Path) -> None:
    """Write the file that `demo_embeddings` reads, from a run of `qat demo`; to be called where the demo was
    started."""
    from qat.training.checkpoint import load_checkpoint
    from qat.training.data import class_targets, load_data
    from qat.training.inference import load_classifier

    checkpoint = load_checkpoint(run, "classifier")
    experiment = from_plain(Experiment, checkpoint.record["experiment"])
    data = load_data(experiment, trained=checkpoint, quiet=True)
    train = torch.tensor(data.parts["train"])
    clips = train[torch.linspace(0, len(train) - 1, 128).long()]
    _, targets = class_targets(data.index, data.parts, experiment.task)
    with torch.no_grad():
        x = load_classifier(checkpoint).eval().embed(data.spectrograms(clips, None))
    np.savez_compressed(out, embeddings=(255 * x / x.max()).round().byte().numpy(), labels=targets[clips].numpy())


def plain(net: VGG16, x: Tensor, tap: int = 0, *, stop: bool = False) -> list[Tensor]:
    """A VGG16 in plain PyTorch; in every call the weights of `net` are expanded to real ones.

    Returns:
        The features after the ReLU of convolution `tap`, unless that is 0; then the logits, unless `stop`.
    """

    def weight_of(layer: Any) -> Tensor:
        return concatenated(layer.weight) if layer.weight.dim() % 2 else layer.weight

    outputs = []
    for n, conv in enumerate(net.convs, 1):
        x = F.relu(F.conv2d(x, weight_of(conv), conv.bias, padding=1))  # type: ignore[arg-type]
        if n == tap:
            outputs.append(x)
            if stop:
                return outputs
        if n in POOL_AFTER:
            x = F.max_pool2d(x, 2)
    x = x.flatten(1)
    *hidden, head = net.classifier
    for layer in hidden:
        if hasattr(layer, "weight"):
            x = F.relu(F.linear(x, weight_of(layer), layer.bias))  # type: ignore[arg-type]
        elif isinstance(layer, nn.Dropout):
            x = layer(x)
    return [*outputs, F.linear(x, weight_of(head), head.bias)]  # type: ignore[arg-type]


def plain_loss(net: VGG16, twin: VGG16 | None, x: Tensor, targets: Tensor, at: int, *, careful: bool = True) -> Tensor:
    """Cross-entropy and anti-transfer at a layer by the definition, with Gram matrices in memory.

    If not careful, it is computed as in the research code: features in another forward pass, and the twin's with
    gradients of its parameters, which are not used.
    """
    *features, logits = plain(net, x, at)
    loss = F.cross_entropy(logits, targets)
    if twin is None:
        return loss
    if not careful:
        features = plain(net, x, at, stop=True)
    with torch.set_grad_enabled(not careful):
        features += plain(twin, x, at, stop=True)
    trained, frozen = (torch.bmm(f.flatten(2), f.flatten(2).mT).flatten(1) for f in features)
    return loss + F.cosine_similarity(trained, frozen, eps=0.0).square().mean()


def reference(case: NetworkCase, operands: Operands) -> Results:
    """The exact results, without dropout; of an epoch, the mean loss of the untrained network.

    In float64 for narrow networks. In float32 for wide ones, where float64 convolutions would take longer than the
    timed runs; its error is at most a tenth of the tolerance.
    """
    wide = torch.float64 if case.width < NARROW else torch.float32
    net, twin = (copy.deepcopy(network) for network in (operands.classifier.net, operands.twin))
    assert net is not None
    net, twin = net.to(wide).eval(), twin.to(wide) if twin else None
    with reference_run():
        if case.work == EPOCH:
            with torch.no_grad():
                batches = zip(operands.x.split(case.batch), operands.targets.split(case.batch), strict=True)
                there = ((x.to(operands.device, wide), targets.to(operands.device)) for x, targets in batches)
                losses = [len(x) * plain_loss(net, twin, x, targets, case.at) for x, targets in there]
                return (torch.stack(losses).sum() / case.samples,)
        x = operands.x.to(wide)
        if case.work in (TWIN, LOGITS):
            with torch.no_grad():
                return tuple(plain(twin, x, case.at, stop=True) if twin else plain(net, x))
        loss = plain_loss(net, twin, x, operands.targets, case.at)
        gradients = () if case.work == FORWARD else torch.autograd.grad(loss, list(net.parameters()))
        return loss.detach(), *gradients


def _training(case: NetworkCase, net: nn.Module, loss: Callable[[], Tensor], fused: bool) -> Run:
    """A run of a training step or of its parts that can be captured in a CUDA graph."""
    device = next(net.parameters()).device
    cuda = device.type == "cuda"
    adam = torch.optim.Adam(net.parameters(), LEARNING_RATE, fused=fused or None, capturable=cuda)

    def run() -> Results:
        net.zero_grad(set_to_none=True)
        with case.autocast(device):
            value = loss()
        if case.work == FORWARD:
            return (value.detach(),)
        value.backward()
        if case.work == TRAIN:
            adam.step()
        return value.detach(), *_gradients(net)

    return run


def _gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def _inference(case: NetworkCase, net: nn.Module, function: Callable[[], Tensor], gradients: bool = False) -> Run:
    """A run of a function that returns logits or features."""
    device = next(net.eval().parameters()).device

    def run() -> Results:
        with torch.set_grad_enabled(gradients), case.autocast(device):
            return (function().detach(),)

    return run


def _nhwc(x: Tensor) -> Tensor:
    """x in NHWC; `contiguous` would not give its strides to maps of one channel."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def _ours_layout(x: Tensor) -> Tensor:
    """x in NHWC on a GPU, else as it is."""
    return _nhwc(x) if x.is_cuda else x


def training(
    case: NetworkCase, classifier: SpeechClassifier, twin: VGG16 | None, inputs: Rows, targets: Rows, samples: Tensor
) -> tuple[ClassificationObjective, Examples, TrainingConfig]:
    """The objective of `qat train` for a case, its arguments by sample (of `samples`), and the settings of its steps.

    If the case has cached targets, the twin computes them here.
    """
    rows, anti_transfer = {"inputs": inputs, "targets": targets}, None
    if twin is not None:
        anti_transfer = AntiTransfer(AntiTransferConfig(random_twin=True, layers=[case.at]), twin)
        if case.variant == CACHED or case.work == EPOCH:
            with case.autocast(inputs.device):
                rows |= anti_transfer.remember(inputs.fetch, samples, case.batch)
    objective = ClassificationObjective(classifier, anti_transfer, embedded=True, multi_label=False).train()
    config = TrainingConfig(lr=LEARNING_RATE, batch=case.batch, precision=case.precision)  # type: ignore[arg-type]
    return objective, Examples(rows), config


def _training_of(case: NetworkCase, operands: Operands) -> tuple[ClassificationObjective, Examples, TrainingConfig]:
    device, samples, x = operands.device, torch.arange(len(operands.x)), operands.x.cpu()
    inputs = Rows.within(lambda numbers: x[numbers], samples.tolist(), device, math.inf)
    targets, twin = Rows(operands.targets.to(device), device), operands.own_twin() if case.at else None
    return training(case, operands.own_classifier(), twin, inputs, targets, samples)


def _ours(case: NetworkCase, operands: Operands) -> Run:
    """What `qat train` computes."""
    if case.work == LOGITS:
        net, x = operands.own_classifier().net.requires_grad_(False), _ours_layout(operands.x)
        return _inference(case, net, lambda: net(x)[0])
    if case.work == TWIN:
        twin, name, x = operands.own_twin(), tap_name(case.at, "relu"), _ours_layout(operands.x)
        return _inference(case, twin, lambda: twin.features_at(x, [name])[name])
    objective, examples, config = _training_of(case, operands)
    numbers = {"numbers": torch.arange(case.batch, device=operands.device)}
    net = objective.classifier.net
    if case.work != TRAIN:
        return _training(case, net, lambda: objective(**examples.gather(numbers)).total, fused=True)
    steps = Steps(objective, examples, replace(config, capture=False), operands.device, training=True)
    batch = Batch(numbers, case.batch, case.batch)
    return lambda: (steps.train(batch), *_gradients(net))


def _plain_run(case: NetworkCase, operands: Operands, careful: bool, nhwc: bool = False) -> Run:
    """`plain` and `plain_loss` in the style of the research code, with the paper's loss; or careful and compiled."""
    nhwc = nhwc or (careful and operands.x.is_cuda)
    x, targets = _nhwc(operands.x) if nhwc else operands.x, operands.targets
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False) if careful else lambda function: function
    twin = operands.own_twin().requires_grad_(not careful) if case.at else None
    if case.work == TWIN:
        assert twin is not None
        return _inference(case, twin, lambda: plain(twin, x, case.at, stop=True)[0], gradients=not careful)
    net = operands.own_classifier().net
    if case.work == LOGITS:
        logits = compiled(lambda x: plain(net, x)[0])
        return _inference(case, net, lambda: logits(x))
    loss = compiled(lambda x, targets: plain_loss(net, twin, x, targets, case.at, careful=careful))
    return _training(case, net.train(), lambda: loss(x, targets), fused=careful)


def _our_epoch(case: NetworkCase, operands: Operands) -> Run:
    """The loop of `qat train`: embeddings on the device, the twin's targets computed before the first epoch."""
    objective, examples, config = _training_of(case, operands)
    samples, epochs = torch.arange(case.samples), itertools.count()
    dropout = next(module for module in objective.modules() if isinstance(module, nn.Dropout))

    @functools.cache
    def steps(rate: float) -> Steps:  # a graph keeps the rate of its capture; results are checked at rate 0
        return Steps(objective, examples, replace(config, capture=True), operands.device, training=True)

    def run() -> Results:
        return (torch.tensor(train_epoch(steps(dropout.p), samples, next(epochs))["total"]),)

    return run


def _folded_run(case: NetworkCase, operands: Operands, nhwc: bool) -> Run:
    """A real network with the weights expanded once, in PyTorch's own functions."""
    net, x = operands.own_classifier().net, _nhwc(operands.x) if nhwc else operands.x
    *hidden, head = [layer for layer in net.classifier if hasattr(layer, "weight")]

    def folded(layers: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
        return [(concatenated(layer.weight.detach()), layer.bias) for layer in layers]

    convs, linears = folded(net.convs), folded(hidden)

    def logits() -> Tensor:
        y = x
        for n, (weight, bias) in enumerate(convs, 1):
            y = F.conv2d(y, weight, bias, padding=1).relu_()
            y = F.max_pool2d(y, 2) if n in POOL_AFTER else y
        y = y.flatten(1)
        for weight, bias in linears:
            y = F.linear(y, weight, bias).relu_()
        return F.linear(y, head.weight, head.bias)  # type: ignore[arg-type]

    return _inference(case, net, logits)


def _research_epoch(case: NetworkCase, operands: Operands, nhwc: bool = False) -> Run:
    """PyTorch's loader and the research code's step, which reads the value of the loss each time."""
    device, net = operands.device, operands.own_classifier().net.train()
    twin = operands.own_twin() if case.at else None
    adam = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    loader = DataLoader(TensorDataset(operands.x, operands.targets), case.batch, shuffle=True)
    layout = torch.channels_last if nhwc else torch.preserve_format

    def run() -> Results:
        total = 0.0
        for x, targets in loader:
            adam.zero_grad()
            x = x.to(device, memory_format=layout)
            loss = plain_loss(net, twin, x, targets.to(device), case.at, careful=False)
            loss.backward()
            adam.step()
            total += len(x) * loss.item()
        return (torch.tensor(total / case.samples),)

    return run


def network_case(suite: str, network: str, layer: int | str, precision: str, work: str, **more: Any) -> NetworkCase:
    """A case of a network; the number n of a layer becomes "AT at layer n", 0 "no AT"."""
    if isinstance(layer, int):
        layer = f"AT at layer {layer}" if layer else NO_AT
    fields: dict[str, Any] = {"batch": 20, "modes": ("graph", "eager"), **more}
    return NetworkCase(suite=suite, network=network, layer=layer, precision=precision, work=work, **fields)


def _step_cases() -> Iterator[NetworkCase]:
    """Steps, their parts in bfloat16, and steps against a compiled one (few, since compiling takes long)."""
    for network, precision, layer in itertools.product(NETWORKS, PRECISIONS, (0, 2, 7, 13)):
        for variant in ("", CACHED) if layer else ("",):
            parts = (FORWARD, STEP, *((TWIN,) if layer and not variant else ())) if precision == "bf16" else ()
            for work in (TRAIN, *parts):
                rank = 0 if network != CONTROL and layer in (0, 2, 13) and not variant else 1
                rank += 2 * PRECISIONS.index(precision) + 2 * (work != TRAIN)
                yield network_case("step", network, layer, precision, work, rank=rank, variant=variant)
    for rank, (precision, layer) in enumerate(itertools.product(("bf16", "float32"), (2, 0, 13)), 1):
        yield network_case("step", "quaternion", layer, precision, TRAIN, rank=rank, variant=COMPILED)


def _inference_cases() -> Iterator[NetworkCase]:
    batches, precisions = (20, 1, 256), ("bf16", "tf32", "float32")
    for network, precision, batch in itertools.product(NETWORKS, precisions, batches):
        rank = 1 + (network == CONTROL) + batches.index(batch) + 2 * precisions.index(precision)
        yield network_case("inference", network, "whole network", precision, LOGITS, rank=rank, batch=batch)
    yield network_case("inference", "quaternion", "whole network", "bf16", LOGITS, rank=3, variant=COMPILED)


def _epoch_cases() -> Iterator[NetworkCase]:
    """Epochs of as many samples as the training part of IEMOCAP has."""
    more: dict[str, Any] = {"variant": "3143 samples", "samples": 3143, "modes": ("eager",)}
    names = itertools.product(("bf16", "float32", "tf32"), ("quaternion", "real-on-embedding"), (0, 2))
    for rank, (precision, network, layer) in enumerate(names, 1):
        yield network_case("epoch", network, layer, precision, EPOCH, rank=rank, **more)


def _in_both_layouts(case: NetworkCase) -> bool:
    """Whether baselines also run in NHWC, which on a CPU is faster for some networks."""
    return case.suite == "cpu" and case.variant != CACHED


def _folds(case: NetworkCase) -> bool:
    return case.suite == "cpu" and case.network == "quaternion" and case.work == LOGITS


_research, _IN_NHWC = functools.partial(_plain_run, careful=False), "research style, NHWC"
_PROVIDERS = (
    Provider("ours", _ours),
    Provider("research style", _research, lambda case: case.variant != CACHED),
    Provider(_IN_NHWC, functools.partial(_research, nhwc=True), _in_both_layouts),
    Provider(
        "torch.compile", functools.partial(_plain_run, careful=True), lambda case: case.variant == COMPILED, smoke=False
    ),
    Provider("folded, NCHW", functools.partial(_folded_run, nhwc=False), _folds),
    Provider("folded, NHWC", functools.partial(_folded_run, nhwc=True), _folds),
)
STEPS = Suite.of(_step_cases(), *_PROVIDERS)
INFERENCE = Suite.of(_inference_cases(), *_PROVIDERS)
EPOCHS = Suite.of(
    _epoch_cases(),
    Provider("ours", _our_epoch),
    Provider("research style", _research_epoch),
    Provider(_IN_NHWC, functools.partial(_research_epoch, nhwc=True), _in_both_layouts),
)
