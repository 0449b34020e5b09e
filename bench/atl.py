"""What the anti-transfer loss costs on a GPU: `python -m bench.atl --out DIR`, started by `make gpu`.

Loss and gradient at every distinct layer of both networks (WASPAA 2023), batch 20, in a CUDA graph, as in timing.py;
the memory that they hold beside both features and the gradient; and what anti-transfer adds to a training step: the
frozen network's forward pass up to the layer, loss and gradient, or with cached targets the last two. A provider whose
result is wrong is given no time. atl.csv and atl_targets.csv are written as the cases finish.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import DTYPES, Results, Run
from bench.gpu import Target, provenance, write
from bench.timing import Clock, GpuClock
from qat.config import NetworkConfig
from qat.models import VGG16, tap_name
from qkernels import anti_transfer_loss, gram_target, reference

BATCH = 20
# Of loss and gradient. A baseline rounds Gram matrices to bfloat16, and its gradient is a small difference: its errors
# are published, not judged as ours are.
TOLERANCE = {"bf16": (1e-5, 2.1e-3), "float32": (1e-5, 1e-4)}
BASELINE_TOLERANCE = (2e-2, 0.5)
WANTED_MEMORY = {"quaternion": 3e6, "real": 11e6}


class Case(NamedTuple):
    """One shape of features. `layers` have it: the first convolution and the last."""

    network: str
    layers: tuple[int, int]
    channels: int
    size: tuple[int, int]
    semantics: str
    precision: str = "bf16"

    def __str__(self) -> str:
        first, last = self.layers
        return f"{self.network}, layers {first}-{last}, {self.semantics}, {self.precision}"


class Row(NamedTuple):
    """One line of atl.csv; times are empty where nothing was timed."""

    network: str
    first_layer: int
    last_layer: int
    channels: int
    height: int
    width: int
    batch: int
    precision: str
    semantics: str
    provider: str
    status: str  # "ok", "REFUSED" by the gate, "smoke": right, and not timed
    loss_error: float
    gradient_error: float
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    memory_bytes: int | None


class Provider(NamedTuple):
    """A way to compute the loss: `build` prepares it from features and frozen features, untimed."""

    name: str
    build: Callable[[Tensor, Tensor, str], Callable[[Tensor], Tensor]]
    tolerance: tuple[float, float] | None = None


_SHAPES = {
    (1, 2): (64, 64, 64),
    (3, 4): (128, 32, 32),
    (5, 7): (256, 16, 16),
    (8, 10): (512, 8, 8),
    (11, 13): (512, 4, 4),
}
CASES = [
    Case(network, layers, channels, (height * tall, width * wide), semantics)
    for network, (tall, wide) in (("quaternion", (1, 1)), ("real", (8, 2)))
    for semantics in ("paper", "folded-rowwise")
    for layers, (channels, height, width) in _SHAPES.items()
] + [Case("quaternion", layers, *shape[:1], shape[1:], "paper", "float32") for layers, shape in _SHAPES.items()]


def _ours(trained: Tensor, frozen: Tensor, semantics: str) -> Callable[[Tensor], Tensor]:
    return lambda a: anti_transfer_loss(a, frozen, semantics=semantics)


def _cached(trained: Tensor, frozen: Tensor, semantics: str) -> Callable[[Tensor], Tensor]:
    target = gram_target(frozen)
    return lambda a: anti_transfer_loss(a, target)


def _materialised(wide: bool) -> Callable[[Tensor, Tensor, str], Callable[[Tensor], Tensor]]:
    """Gram matrices by `bmm`, or those of the whole batch as in the released code, in the features' type or float32."""

    def build(trained: Tensor, frozen: Tensor, semantics: str) -> Callable[[Tensor], Tensor]:
        def loss(a: Tensor) -> Tensor:
            a, b = (a.float(), frozen.float()) if wide else (a, frozen)
            if semantics == "folded-rowwise":
                return reference.folded_rowwise(a, b)
            a_gram, b_gram = (torch.bmm(f, f.mT).float().flatten(1) for f in (a.flatten(2), b.flatten(2)))
            return torch.nn.functional.cosine_similarity(a_gram, b_gram, eps=0.0).square().mean()

        return loss

    return build


PAPER = [Provider("ours", _ours), Provider("ours, cached target", _cached)]
FOLDED = [Provider("ours", _ours)]
BASELINES = [
    Provider("materialised", _materialised(False), BASELINE_TOLERANCE),
    Provider("materialised, float32", _materialised(True), BASELINE_TOLERANCE),
]


def features(case: Case, device: torch.device, batch: int = BATCH) -> list[Tensor]:
    """Post-ReLU maps in NHWC, the frozen one near the trained one."""
    a = torch.randn(batch, case.channels, *case.size, device=device).relu()
    b = (a + 0.5 * torch.randn_like(a)).relu()
    return [x.to(DTYPES[case.precision]).contiguous(memory_format=torch.channels_last) for x in (a, b)]


def measure(case: Case, providers: list[Provider], operands: list[Tensor], clock: Clock | None) -> list[Row]:
    """The rows of a case. Only providers whose results are right reach the clock."""
    a, b = operands
    leaf = a.detach().requires_grad_()
    exact_leaf = a.detach().double().requires_grad_()
    exact = _step(lambda x: anti_transfer_loss(x, b.double(), semantics=case.semantics), exact_leaf)()
    admitted: dict[str, Run] = {}
    checked = []
    for provider in providers:
        run = _step(provider.build(a, b, case.semantics), leaf)
        of_loss, of_gradient = (_error(x, y) for x, y in zip(run(), exact, strict=True))
        allowed = provider.tolerance or TOLERANCE[case.precision]
        if of_loss <= allowed[0] and of_gradient <= allowed[1]:
            admitted[provider.name] = run
        checked.append((provider, of_loss, of_gradient))
    del exact, exact_leaf
    memory = {name: _memory(run, a) for name, run in admitted.items()} if clock else {}
    samples = clock(admitted, "graph") if clock else {}
    rows = []
    for provider, of_loss, of_gradient in checked:
        status = "REFUSED" if provider.name not in admitted else "ok" if clock else "smoke"
        times = samples.get(provider.name)
        deciles = statistics.quantiles(times, n=10, method="inclusive") if times else None
        low, middle, high = (deciles[1], deciles[4], deciles[7]) if deciles else (None, None, None)
        rows.append(
            Row(
                network=case.network,
                first_layer=case.layers[0],
                last_layer=case.layers[1],
                channels=case.channels,
                height=case.size[0],
                width=case.size[1],
                batch=len(a),
                precision=case.precision,
                semantics=case.semantics,
                provider=provider.name,
                status=status,
                loss_error=of_loss,
                gradient_error=of_gradient,
                median_us=middle,
                p20_us=low,
                p80_us=high,
                memory_bytes=memory.get(provider.name),
            )
        )
    return rows


def _step(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Run:
    def run() -> Results:
        value = loss(leaf)
        return value.detach(), *torch.autograd.grad(value, leaf)

    return run


def _error(actual: Tensor, exact: Tensor) -> float:
    error = ((actual.to(exact.dtype) - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


def _memory(run: Run, a: Tensor) -> int:
    """The most that a run holds beside its operands and the gradient."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before - a.numel() * a.element_size()


def frozen_forward(network: str, layer: int, device: torch.device, batch: int = BATCH, width: float = 1.0) -> Run:
    """The twin's forward pass up to a layer, in bfloat16 autocast."""
    net = VGG16(NetworkConfig(domain=network, width=width), 4).to(device).eval()  # type: ignore[arg-type]
    shape = (4, 64, 64) if network == "quaternion" else (1, 512, 128)
    x = torch.rand(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    tap = tap_name(layer, "relu")

    def run() -> Results:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return (net.features_at(x, [tap])[tap],)

    return run


def added(network: str, clock: Clock, rows: list[Row]) -> Iterator[Row]:
    """What anti-transfer adds to a step at each layer: the twin alone, with loss and gradient; with cached targets."""
    runs = {str(layer): frozen_forward(network, layer, torch.device("cuda")) for layer in range(1, 14)}
    for layer, times in clock(runs, "graph").items():
        found = [
            row
            for row in rows
            if row.network == network and row.first_layer <= int(layer) <= row.last_layer
            if (row.semantics, row.precision) == ("paper", "bf16")
        ]
        ours = {row.provider: row.median_us for row in found}
        twin = statistics.median(times)
        totals = {"added: twin's forward": twin}
        if loss := ours.get("ours"):
            totals["added: twin, loss and gradient"] = twin + loss
        if cached := ours.get("ours, cached target"):
            totals["added: cached target"] = cached
        for name, total in totals.items():
            yield found[0]._replace(
                first_layer=int(layer), last_layer=int(layer), provider=name, status="ok", loss_error=0.0,
                gradient_error=0.0, median_us=total, p20_us=None, p80_us=None, memory_bytes=None,
            )  # fmt: skip


def targets(rows: list[Row]) -> list[Target]:
    """The promised figures in the rows."""
    wanted = {"paper": (4.0, 4.0, 4.0, 8.0, 8.0), "folded-rowwise": (3.0, 3.0, 25.0, 150.0, 150.0)}
    found = []
    for semantics, factors in wanted.items():
        for (first, last), factor in zip(_SHAPES, factors, strict=True):
            times = {
                row.provider: row.median_us
                for row in rows
                if (row.network, row.semantics, row.precision) == ("quaternion", semantics, "bf16")
                if (row.first_layer, row.last_layer) == (first, last) and row.median_us
            }
            others = [us for name, us in times.items() if us and name.startswith("materialised")]
            ours = times.get("ours")
            ratio = min(others) / ours if others and ours else None
            found.append(_judged(f"{semantics}, quaternion, layers {first}-{last}: speed-up", factor, ratio, True))
    for network, limit in WANTED_MEMORY.items():
        bytes_ = [row.memory_bytes for row in rows if (row.network, row.semantics) == (network, "paper")
                  and row.provider == "ours" and row.precision == "bf16" and row.memory_bytes is not None]  # fmt: skip
        worst = max(bytes_) / 1e6 if len(bytes_) == len(_SHAPES) else None
        found.append(_judged(f"paper, {network}: most MB beside the features", limit / 1e6, worst, False))
    return found


def _judged(name: str, wanted: float, measured: float | None, more: bool) -> Target:
    text = f"{'>=' if more else '<='} {wanted:.0f}"
    if measured is None:
        return Target(name, text, "", "", "not measured")
    met = measured >= wanted if more else measured <= wanted
    return Target(name, text, f"{measured:.2f}", "", "met" if met else "MISSED")


def smoke() -> Iterator[list[Row]]:
    """Tiny cases on the CPU in float32, checked and not timed."""
    for case in CASES:
        tiny = case._replace(channels=8, size=(4, 3), precision="float32")
        providers = PAPER if case.semantics == "paper" else FOLDED
        yield measure(tiny, providers + BASELINES, features(tiny, torch.device("cpu"), 2), None)
    for network in WANTED_MEMORY:
        frozen_forward(network, 2, torch.device("cpu"), 1, 0.05)()


def _compile(arch: int) -> None:
    from bench.warm import compile_all
    from qkernels.ops import _launch
    from qkernels.ops.gram_cosine import launch
    from qkernels.ops.gram_cosine.config import mode_of

    with _launch.record(arch) as recording:
        for case in CASES:
            if case.semantics != "paper":
                continue  # a few kernels of one size, which the first run compiles
            a = torch.empty(BATCH, case.channels, *case.size, dtype=DTYPES[case.precision], device="meta")
            a = a.contiguous(memory_format=torch.channels_last)
            how = (False, "channel", False, 1.0, True)
            cosine, loss, stats_a, stats_b, work = launch.forward(a, a, None, *how, False)
            launch.gradient(None, loss, None, cosine, a, a, stats_a, stats_b, work, 0, *how)
            if mode_of(case.channels, math.prod(case.size)) != "dual":
                how = (True, *how[1:])
                packed = torch.empty(BATCH, case.channels * (case.channels + 1) // 2, device="meta")
                cosine, loss, stats_a, stats_b, work = launch.forward(a, packed, stats_b, *how, False)
                launch.gradient(None, loss, None, cosine, a, packed, stats_a, stats_b, work, 0, *how)
    count, errors = compile_all(recording.launches)
    print(f"{count} kernels compiled", *errors, sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """Prints every row as it is measured, at the end the targets. Returns 2 without a GPU, 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.atl", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which cases are dropped")
    parser.add_argument("--commit", help="what was measured, where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny cases on the CPU, checked but not timed")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if not options.smoke and not torch.cuda.is_available():
        print("bench.atl needs a CUDA device; --smoke checks everything but the times on a CPU", file=sys.stderr)
        return 2
    extra = provenance(options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []

    def note(new: list[Row]) -> None:
        rows.extend(new)
        for row in new:
            time_ = "" if row.median_us is None else f"{row.median_us:.1f} us"
            memory = "" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.2f} MB"
            layers = f"{row.network} {row.first_layer}-{row.last_layer}"
            what = f"{layers:17} {row.semantics:14} {row.precision:7} {row.provider:30} {row.status:8}"
            print(
                f"{what} errors {row.loss_error:.1e} {row.gradient_error:.1e}  {time_}  {memory}".rstrip(), flush=True
            )
        write(options.out / "atl.csv", rows, extra)
        write(options.out / "atl_targets.csv", targets(rows), extra)

    if options.smoke:
        for new in smoke():
            note(new)
    else:
        clock = GpuClock()
        from qkernels.ops import _launch

        _compile(_launch.arch_of(clock.flushed))
        for case in CASES:
            if time.monotonic() > deadline:
                print(f"dropped, out of budget: {case}", flush=True)
                continue
            providers = PAPER if case.semantics == "paper" else FOLDED
            note(measure(case, providers + BASELINES, features(case, torch.device("cuda")), clock))
        if time.monotonic() < deadline:
            note(list(added("quaternion", clock, rows)))
    for target in targets(rows):
        print(f"{target.target:62} {target.wanted:8} {target.measured:8} {target.verdict}")
    return int(any(row.status == "REFUSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
