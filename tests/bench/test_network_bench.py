"""The whole networks' benchmark: its providers, checks and counts, in tiny cases on a CPU."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import network
from bench.case import FORWARD, STEP
from bench.gradients import relative_error
from bench.network import CACHED, EPOCHS, INFERENCE, NETWORKS, STEPS, TRAIN, TWIN
from qat.config import NetworkConfig
from qat.models.sizes import layer_sizes
from qkernels.runtime.flops import gram_flops

CPU = torch.device("cpu")
SUITES = {"step": STEPS, "inference": INFERENCE, "epoch": EPOCHS}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Two cost more than they give where maps are this small, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distinct(suite: Any) -> Any:
    """Tiny cases, one for each set of names that is left of them."""
    return list({(c.network, c.layer, c.variant, c.work): c.tiny() for c in suite.cases}.values())


def tiny(name: Any, at: int = 0, work: Any = TRAIN, variant: str = "") -> Any:
    return next(
        case.tiny()
        for case in STEPS.cases
        if (case.network, case.at, case.work, case.variant) == (name, at, work, variant)
    )


def provider(name: Any, suite: Any = STEPS) -> Any:
    return next(provider for provider in suite.providers if provider.name == name)


def checked(case: Any, operands: Any, chosen: Any) -> Any:
    run = chosen.build(case, operands)
    with case.checking(operands):
        return run()


EAGER = [
    pytest.param(case, chosen, id=f"{case} {chosen.name}")
    for suite in SUITES.values()
    for case in distinct(suite)
    if case.at != 7  # nothing that 2 and 13, whose Gram matrices have other forms, do not have
    for chosen in suite.providers
    if chosen.fits(case) and chosen.name != "torch.compile"
]


@pytest.mark.parametrize(("case", "chosen"), EAGER)
def test_providers_are_right(case: Any, chosen: Any) -> None:
    operands = case.operands(CPU)
    results = checked(case, operands, chosen)
    count = 1 + len(list(operands.classifier.net.parameters())) if case.work in (TRAIN, STEP) else 1
    assert len(results) == count
    assert case.check(chosen, operands, results)[0] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("case", [tiny("quaternion"), tiny("quaternion", 2), distinct(INFERENCE)[0]], ids=str)
@pytest.mark.timeout(1200)
def test_the_compiled_program_is_right(case: Any) -> None:
    operands, compiled = case.operands(CPU), provider("torch.compile")
    assert case.check(compiled, operands, checked(case, operands, compiled))[0] <= 1


def test_bfloat16_is_right_within_its_own_bounds() -> None:
    case = replace(tiny("quaternion", 13), width=0.25, batch=4, precision="bf16")
    operands = case.operands(CPU)
    for chosen in STEPS.providers[:2]:
        results = checked(case, operands, chosen)
        assert case.check(chosen, operands, results)[1] > 1e-6  # it is bfloat16
        assert case.check(chosen, operands, results)[0] <= 1


def _scaled(number: Any, factor: Any) -> Any:
    return lambda results: tuple(factor * x if n == number else x for n, x in enumerate(results))


WRONG = {
    "loss": _scaled(0, 1.001),
    "one layer's gradient": _scaled(9, 2.0),
    "one layer's gradient, absent": _scaled(9, 0.0),
    "one layer's gradient, turned": _scaled(9, -1.0),
    "the last bias's gradient": _scaled(-1 % 33, 1.5),
    "all gradients": lambda results: (results[0], *(1.4 * x for x in results[1:])),
    "loss, not a number": _scaled(0, torch.nan),
    "gradient, not a number": _scaled(20, torch.nan),
    "gradient, infinite": _scaled(20, torch.inf),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("width", [1 / 16, 0.25])
def test_wrong_results_are_refused(wrong: Any, width: Any) -> None:
    case = replace(tiny("quaternion", 2), width=width)
    operands, ours = case.operands(CPU), provider("ours")
    results = tuple(x.clone() for x in checked(case, operands, ours))
    assert case.check(ours, operands, results)[0] <= 1
    assert case.check(ours, operands, wrong(results))[0] > 1


def test_a_gradient_too_few_is_an_error() -> None:
    case = tiny("real-on-embedding")
    operands, ours = case.operands(CPU), provider("ours")
    with pytest.raises(AssertionError, match="gradients of every parameter"):
        case.check(ours, operands, checked(case, operands, ours)[:-1])


@pytest.mark.parametrize("work", [FORWARD, TRAIN])
def test_anti_transfer_with_another_weight_is_refused(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny("real-on-embedding", 2, work)
    operands, ours = case.operands(CPU), provider("ours")
    config = network.AntiTransferConfig
    monkeypatch.setattr(network, "AntiTransferConfig", lambda **options: config(**options, beta=1.01))
    assert case.check(ours, operands, checked(case, operands, ours))[0] > 1


@pytest.mark.parametrize("case", [tiny("quaternion", 7, TWIN), distinct(INFERENCE)[0]], ids=str)
def test_wrong_values_are_refused(case: Any) -> None:
    operands, ours = case.operands(CPU), provider("ours")
    (values,) = checked(case, operands, ours)
    for wrong in (1.001 * values, values.flip(0), torch.full_like(values, torch.nan)):
        assert case.check(ours, operands, (wrong,))[0] > 1


def test_an_epoch_of_other_data_or_a_part_of_it_is_refused() -> None:
    case = distinct(EPOCHS)[0]
    operands, ours = case.operands(CPU), provider("ours", EPOCHS)
    (loss,) = checked(case, operands, ours)
    assert case.check(ours, operands, (0.8 * loss,))[0] > 1  # four batches of five


def test_an_allowed_turn_and_the_same_length_are_right_and_no_more() -> None:
    exact = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    turned = [torch.tensor([0.8, 0.6]), torch.tensor([0.0, 3.0])]  # by 0.2, all of it by 0.02
    excess, errors = zip(*network.turns(turned, exact, 0.04, 0.4), strict=True)
    assert errors == pytest.approx([0.2, 0, 0, 0, 0.02, 0], abs=1e-6)
    assert excess == pytest.approx([0.5, 0, 0, 0, 0.5, 0], abs=1e-6)
    longer = [1.2 * x for x in exact]
    assert [error for _, error in network.turns(longer, exact, 0.04, 0.4)] == pytest.approx([0, 0.2] * 3, abs=1e-6)
    assert max(excess for excess, _ in network.turns(longer, exact, 0.02, 0.4)) == pytest.approx(1)
    nothing = [torch.zeros(2), exact[1]]
    assert max(network.turns(nothing, exact, 2, 0.4))[0] == pytest.approx(2.5)
    assert max(network.turns(exact, nothing, 2, 0.4))[0] == pytest.approx(2.5)
    assert max(network.turns(nothing, nothing, 2, 0.4))[0] == 0


def dropouts(operands: Any) -> Any:
    return [m for made in operands.copies for m in made.modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", ["ours", "research style"])
def test_dropout_is_there_when_timed_and_not_when_checked(
    suite: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = distinct(SUITES[suite])[0]
    operands = case.operands(CPU)
    run = provider(name, SUITES[suite]).build(case, operands)
    seen, dropout = [], torch.nn.functional.dropout

    def seeing(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        seen.append(p if training else 0.0)
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", seeing)
    with case.checking(operands):
        run()
    assert set(seen) <= {0.0}  # our layers leave out what does nothing
    seen.clear()
    run()
    assert set(seen) - {0.0} == (set() if suite == "inference" else {0.5})


def test_dropout_comes_back_after_an_error() -> None:
    case = tiny("real-on-embedding")
    operands = case.operands(CPU)
    provider("ours").build(case, operands)
    with pytest.raises(KeyboardInterrupt), case.checking(operands):
        raise KeyboardInterrupt
    assert {module.p for module in dropouts(operands)} == {0.5}


@pytest.mark.parametrize(
    "case", [tiny("quaternion", 2), tiny("quaternion", 2, variant=CACHED), distinct(EPOCHS)[1]], ids=str
)
def test_copies_are_trained_and_operands_are_not(case: Any) -> None:
    operands, suite = case.operands(CPU), SUITES[case.suite]
    before = {name: value.clone() for name, value in operands.classifier.state_dict().items()}
    twin = {name: value.clone() for name, value in operands.twin.state_dict().items()}
    for chosen in suite.providers[:2]:
        if chosen.fits(case):
            checked(case, operands, chosen)
    assert all(torch.equal(before[name], value) for name, value in operands.classifier.state_dict().items())
    assert all(torch.equal(twin[name], value) for name, value in operands.twin.state_dict().items())
    assert all(p.grad is None for made in (operands.classifier, operands.twin) for p in made.parameters())
    for made in operands.copies:
        if isinstance(made, network.VGG16):
            assert all(torch.equal(twin[name], value) for name, value in made.state_dict().items())
        else:
            moved = {
                name: (value - before[name]).abs().max() for name, value in made.net.state_dict(prefix="net.").items()
            }
            # Adam's first steps are the learning rate long.
            assert all(0.1 * network.LEARNING_RATE < distance < 1e-3 for distance in moved.values()), moved


@pytest.mark.parametrize("case", [tiny("quaternion", 2, STEP), tiny("quaternion", 0, FORWARD)], ids=str)
def test_parts_of_a_step_train_nothing(case: Any) -> None:
    operands = case.operands(CPU)
    for chosen in STEPS.providers[:2]:
        checked(case, operands, chosen)
    before = operands.classifier.state_dict()
    for made in operands.copies:
        if not isinstance(made, network.VGG16):
            assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_operands_are_the_same_each_time_and_draw_nothing_of_others() -> None:
    case = tiny("quaternion", 2)
    torch.manual_seed(3)
    first, drawn = case.operands(CPU), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    second = case.operands(CPU)
    assert torch.equal(first.x, second.x)
    assert (first.x >= 0).all()
    assert torch.equal(first.classifier.net.convs[0].weight, second.classifier.net.convs[0].weight)
    assert not torch.equal(first.twin.convs[0].weight, first.classifier.net.convs[0].weight)


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._overloadpacket.__name__)
        return function(*args, **kwargs or {})


def dispatched(case: Any, name: Any) -> Any:
    operands = case.operands(CPU)
    run = provider(name).build(case, operands)
    with Operators() as operators:
        run()
    return operators.names


def test_the_research_style_computes_what_it_is_said_to() -> None:
    expected = {("ours", ""): (20, 13), ("ours", CACHED): (13, 13), ("research style", ""): (27, 27)}
    for (name, variant), (forward, backward) in expected.items():
        names = dispatched(tiny("real-on-embedding", 7, STEP, variant), name)
        # The careless backward goes through 6 layers of the trained network twice, and through the twin's 7.
        assert (names.count("convolution"), names.count("convolution_backward")) == (forward, backward)
    assert dispatched(tiny("real-on-embedding", 0, STEP), "research style").count("convolution") == 13


def test_the_compiled_program_is_careful() -> None:
    operands = tiny("real-on-embedding", 7).operands(CPU)
    with Operators() as operators:
        network.plain_loss(operands.classifier.net, operands.twin, operands.x, operands.targets, 7).backward()
    assert [operators.names.count(name) for name in ("convolution", "convolution_backward")] == [20, 13]


@pytest.mark.parametrize("name", ["ours", "research style"])
def test_gradients_of_the_trained_network_do_not_pile_up(name: str) -> None:
    case = tiny("quaternion", 2, STEP)
    operands = case.operands(CPU)
    run = provider(name).build(case, operands)
    with case.checking(operands):
        once = [gradient.clone() for gradient in run()]
        for first, second in zip(once, run(), strict=True):
            torch.testing.assert_close(first, second)


def test_the_research_style_piles_up_gradients_of_the_twin() -> None:
    case = tiny("quaternion", 7)
    operands = case.operands(CPU)
    ours, research = (provider(name).build(case, operands) for name in ("ours", "research style"))
    twins = [made for made in operands.copies if isinstance(made, network.VGG16)]
    with case.checking(operands):
        ours(), research()
        weight: Any = twins[1].convs[6].weight
        once = weight.grad.clone()
        research()
    assert once.norm() > 0
    assert relative_error(twins[1].convs[6].weight.grad, 2 * once) < 0.1  # weights have moved a little
    assert twins[1].convs[7].weight.grad is None
    assert all(p.grad is None for p in twins[0].parameters())


def test_weights_are_put_together_in_every_forward_pass() -> None:
    names = dispatched(tiny("quaternion", 2, FORWARD), "research style")
    assert names.count("cat") == 5 * (13 + 2 + 2 + 2)  # layers, those to the tap twice more, two of the classifier


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", ["ours", "research style"])
def test_the_host_waits_for_nothing_in_a_step(name: str, at: int) -> None:
    """Neither reads a value nor takes one along; Adam on a CPU does, and is another on a GPU."""
    names = dispatched(tiny("quaternion", at, STEP), name)
    assert not {"_local_scalar_dense", "nonzero", "_pin_memory", "lift_fresh"} & set(names)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("work", [FORWARD, STEP, TRAIN])
def test_flops_are_those_of_the_layers(name: Any, work: Any) -> None:
    case = tiny(name, 0, work)
    run = provider("research style").build(case, case.operands(CPU))
    with FlopCounterMode(display=False) as counter:
        run()
    assert case.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_of_anti_transfer_are_the_twins_and_the_losss(name: Any) -> None:
    operands = tiny(name, 7).operands(CPU)
    run = provider("ours").build(tiny(name, 7, TWIN), operands) if name != "quaternion" else None
    research = provider("research style").build(tiny(name, 7, TWIN), operands)
    with FlopCounterMode(display=False) as counter:
        (features,) = (run or research)()
    twin = counter.get_total_flops()
    loss = [2 * flops for flops in gram_flops(features.shape[1], features[0, 0].numel())]
    assert tiny(name, 7, TWIN).flops == twin
    assert tiny(name, 7).flops == tiny(name).flops + twin + sum(loss)
    assert tiny(name, 7, FORWARD).flops == tiny(name, 0, FORWARD).flops + twin + loss[0]
    assert tiny(name, 7, variant=CACHED).flops == tiny(name).flops + sum(loss)


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_are_those_of_the_layers(name: Any) -> None:
    case = tiny(name, 2)
    net = case.operands(CPU).classifier.net
    moved = {"x": [], "y": []}

    def note(module: Any, args: Any, output: Any) -> None:
        moved["x"].append(args[0].numel())
        moved["y"].append(output.numel())

    plain = tiny("real" if name == "real" else "real-on-embedding").operands(CPU)
    for layer in [*plain.classifier.net.convs, *plain.classifier.net.classifier]:
        if hasattr(layer, "weight"):
            layer.register_forward_hook(note)
    plain.classifier.net(plain.x)
    x, y, weights = sum(moved["x"]), sum(moved["y"]), sum(p.numel() for p in net.parameters())
    assert tiny(name, 0, FORWARD).bytes == 4 * (x + weights + y)
    backward = 2 * x - moved["x"][0] + y + 2 * weights
    assert tiny(name, 0, STEP).bytes == 4 * (x + weights + y + backward)
    assert tiny(name).bytes == tiny(name, 0, STEP).bytes + 28 * weights
    assert 2 * replace(tiny(name, 0, STEP), precision="bf16").bytes == tiny(name, 0, STEP).bytes
    features, tapped = moved["y"][1], sum(moved["x"][:2]) + sum(moved["y"][:2])
    first = sum(p.numel() for layer in net.convs[:2] for p in layer.parameters())
    assert tiny(name, 2, TWIN).bytes == 4 * (tapped + first)
    assert tiny(name, 2, FORWARD).bytes == tiny(name, 0, FORWARD).bytes + 4 * (tapped + first + 2 * features)
    assert tiny(name, 2, STEP, CACHED).bytes == tiny(name, 0, STEP).bytes + 4 * 5 * features


def test_an_epoch_is_its_steps() -> None:
    case = replace(tiny("quaternion"), batch=20)
    epoch = replace(EPOCHS.cases[0].tiny(), samples=1000, batch=20)
    assert epoch.flops == 50 * case.flops
    assert epoch.bytes == 50 * case.bytes
    assert replace(epoch, samples=981).bytes > 49 * case.bytes


def test_flops_of_the_paper() -> None:
    full = next(case for case in STEPS.cases if (case.network, case.at, case.work) == ("quaternion", 0, FORWARD))
    assert full.flops == pytest.approx(20 * 2 * (1.255e9 + 2048 * 4096 + 4096**2), rel=1e-3)
    networks = [NetworkConfig(domain=domain) for domain in ("quaternion", "real", "real-on-embedding")]
    weights = [sum(layer.weights for layer in layer_sizes(config, 4)) for config in networks]
    assert weights == [9_998_020, 165_733_060, 39_905_668]


def test_suites_are_in_the_order_of_their_value() -> None:
    for suite in SUITES.values():
        assert len({(str(case), case.modes) for case in suite.cases}) == len(suite.cases)
        assert [case.rank for case in suite.cases] == sorted(case.rank for case in suite.cases)
        assert all(any(chosen.fits(case) and chosen.ours for chosen in suite.providers) for case in suite.cases)
    first = [(case.network, case.layer) for case in STEPS.cases if case.rank == 0]
    layers = ("no AT", "AT at layer 2", "AT at layer 13")
    assert set(first) == {(name, layer) for name in ("quaternion", "real") for layer in layers}
    assert {(c.precision, c.work, c.variant) for c in STEPS.cases if c.rank == 0} == {("bf16", TRAIN, "")}
    assert {case.work for case in STEPS.cases if case.precision != "bf16"} == {TRAIN}
    assert not [case for case in STEPS.cases if case.work == TWIN and (case.variant or not case.at)]
    fitting = {(case.at, case.precision) for case in STEPS.cases if provider("torch.compile").fits(case)}
    assert fitting == {(at, precision) for at in (0, 2, 13) for precision in ("bf16", "float32")}
    assert [str(case) for case in INFERENCE.cases if provider("torch.compile").fits(case)] == [
        "inference: quaternion, whole network, against torch.compile, batch 20, bf16, logits"
    ]
    assert all(case.modes == ("eager",) for case in EPOCHS.cases)


def test_embeddings_of_the_demo_repeat() -> None:
    x, labels = network.demo_embeddings(200)
    assert x.shape == (200, 4, 64, 64)
    assert (x.min().item(), x.max().item()) == (0, 1)
    assert torch.equal(x[:72], x[128:])
    assert torch.equal(labels[:72], labels[128:])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert len({row.numpy().tobytes() for row in x[:128]}) == 128
    assert network.DATA.stat().st_size < 1e6


ABSENT = ("soundfile", "soxr", "jsonargparse", "submitit", "tensorboard", "speechbrain", "espeakng_loader",
          "torchaudio", "torchmetrics", "jinja2", "matplotlib", "pandas", "sklearn")  # fmt: skip


def test_nothing_is_needed_that_a_gpu_machine_may_lack() -> None:
    script = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
import bench.__main__, bench.compare, bench.gpu_tests, bench.test_bench, qkernels.runtime.__main__, torch
from bench.network import EPOCHS, INFERENCE, STEPS
for suite in (EPOCHS, INFERENCE, STEPS):
    case = suite.cases[1].tiny()
    for provider in suite.providers[:2]:
        if provider.fits(case):
            provider.build(case, case.operands(torch.device("cpu")))()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
