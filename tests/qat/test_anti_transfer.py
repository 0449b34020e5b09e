import inspect
import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from qat import anti_transfer
from qat.anti_transfer import AntiTransfer
from qat.cli import build_parser
from qat.config import AntiTransferConfig, Experiment, NetworkConfig, from_plain, to_plain
from qat.models import VGG16, SpeechClassifier, tap_name
from qat.training.objectives import ClassificationObjective
from qkernels import anti_transfer_loss
from qkernels.losses import CKA, LOSSES, CosSquared, FoldedRowwise, GramChannel, GramPosition, Loss, MseSigmoid

TINY = NetworkConfig(width=0.05, init="he", dropout=0.0)
EVERY = [kind(*values) for kind in LOSSES.values() for values in itertools.product(*kind.options().values())]
POSITIONS = ["relu", "pre-relu", "slice", "pool5"]


def squared_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equation 1 as it is written: vectorised Gram matrices of every sample."""
    values = []
    for x, y in zip(a.flatten(2).double(), b.flatten(2).double(), strict=True):
        g, h = (x @ x.T).flatten(), (y @ y.T).flatten()
        values.append((g @ h / (g.norm() * h.norm())) ** 2)
    return torch.stack(values).mean()


def computed(config: AntiTransferConfig, net: VGG16, twin: VGG16, x: torch.Tensor) -> Any:
    """Loss and similarities from one forward pass."""
    term = AntiTransfer(config, twin)
    return term.total(net(x, term(x))[1])


@pytest.fixture
def nets() -> tuple[VGG16, VGG16, torch.Tensor]:
    torch.manual_seed(3)
    return VGG16(TINY, 4), VGG16(TINY, 7), torch.rand(3, 4, 64, 64)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer", [1, 2, 7, 13])
def test_loss_is_equation_1_at_the_named_features(nets: Any, layer: int, position: str) -> None:
    net, twin, x = nets
    tap = tap_name(layer, position)
    loss, logged = computed(AntiTransferConfig(layers=[layer], beta=0.7, position=position), net, twin, x)
    expected = squared_cosine(net.features_at(x, [tap])[tap], twin.features_at(x, [tap])[tap])
    assert loss.item() == pytest.approx(0.7 * expected.item(), rel=1e-5)
    assert logged[f"similarity_{layer}"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("domain", ["quaternion", "real-on-embedding"])
@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_are_those_of_the_plain_loss_added_to_the_total(domain: str, position: str) -> None:
    """Layer 2 lies in front of a pool, layer 5 does not; in float64, where rounding hides nothing."""
    torch.manual_seed(3)
    net, twin = (VGG16(replace(TINY, domain=domain), 4).double() for _ in range(2))
    x, y = torch.rand(3, 4, 64, 64, dtype=torch.double), torch.tensor([0, 3, 1])
    layers, betas = ([2], [0.7]) if position == "pool5" else ([2, 5], [0.7, 0.3])
    taps = [tap_name(layer, position) for layer in layers]
    logits, features = net(x, dict.fromkeys(taps, lambda features: (features, features)))
    frozen = twin.features_at(x, taps)
    plain = [beta * squared_cosine(features[tap], frozen[tap].detach()) for tap, beta in zip(taps, betas, strict=True)]
    (torch.nn.functional.cross_entropy(logits, y) + sum(plain)).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    term = AntiTransfer(AntiTransferConfig(layers=layers, beta=betas, position=position), twin)
    logits, tapped = net(x, term(x))
    (torch.nn.functional.cross_entropy(logits, y) + term.total(tapped)[0]).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_several_layers_are_summed_with_their_betas_and_gradient_stays_below_the_deepest(nets: Any) -> None:
    net, twin, x = nets
    loss, logged = computed(AntiTransferConfig(layers=[7, 2], beta=[0.5, 3.0]), net, twin, x)
    expected = 0.5 * logged["similarity_7"].item() + 3 * logged["similarity_2"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    reached = [conv.weight.grad is not None and bool(conv.weight.grad.any()) for conv in net.convs]
    assert reached == [True] * 7 + [False] * 6


def test_the_slice_convention_at_layer_1_is_the_baseline_in_disguise(nets: Any) -> None:
    net, twin, x = nets
    loss, _ = computed(AntiTransferConfig(layers=[1], position="slice"), net, twin, x.requires_grad_(False))
    assert loss.item() == pytest.approx(1.0, rel=1e-6)
    assert not loss.requires_grad


def test_twin_is_frozen_in_eval_mode_and_never_gets_a_gradient(nets: Any) -> None:
    net, twin, x = nets
    term = AntiTransfer(AntiTransferConfig(layers=[13]), twin).train()
    assert not any(module.training for module in twin.modules())
    term.total(net(x, term(x))[1])[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in twin.parameters())
    assert net.convs[0].weight.grad.any()


def test_beta_0_only_monitors(nets: Any) -> None:
    net, twin, x = nets
    loss, logged = computed(AntiTransferConfig(layers=[13], beta=0.0), net, twin, x)
    assert loss.item() == 0
    assert not loss.requires_grad
    assert logged["similarity_13"].item() > 0


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_every_loss_and_its_gradient_reach_the_network(nets: Any, loss: Loss) -> None:
    net, twin, x = nets
    x = 0.1 * x  # at larger distances the sigmoid is flat
    a, b = (network.features_at(x, ["relu5"])["relu5"] for network in (net, twin))
    torch.manual_seed(1)
    expected = anti_transfer_loss(a, b, loss=loss).item()
    for beta in (0.0, 0.5):
        torch.manual_seed(1)
        total, logged = computed(AntiTransferConfig(layers=[5], beta=beta, loss=loss), net, twin, x)
        assert logged["similarity_5"].item() == pytest.approx(expected, rel=1e-5)
        # The released code applies beta twice.
        weight = beta**2 if loss.name == "folded-rowwise" else beta
        assert total.item() == pytest.approx(weight * expected, rel=1e-5)
        assert total.requires_grad == bool(beta)
    total.backward()
    assert net.convs[4].weight.grad.any()


def test_clamp_of_folded_rowwise_reaches_the_loss(nets: Any) -> None:
    """Where row norms are about 1e-8, clamping each or their product makes a difference."""
    net, twin, x = nets
    tiny = 1e-3 * net.features_at(x, ["relu7"])["relu7"]
    values = []
    for clamp in ("each", "product"):
        config = AntiTransferConfig(layers=[7], loss=FoldedRowwise(clamp))
        values.append(AntiTransfer(config, twin)(x)["relu7"](tiny)[1].item())
        frozen = twin.features_at(x, ["relu7"])["relu7"]
        assert values[-1] == pytest.approx(anti_transfer_loss(tiny, frozen, loss=config.loss).item(), rel=1e-6)
    assert values[0] != pytest.approx(values[1], rel=0.01)


def test_stochastic_pairwise_is_drawn_anew_each_time(nets: Any) -> None:
    net, twin, x = nets
    config = AntiTransferConfig(layers=[5], loss=CosSquared("stochastic_pairwise"))
    torch.manual_seed(0)
    drawn = [computed(config, net, twin, x)[0].item() for _ in range(6)]
    torch.manual_seed(0)
    assert drawn == [computed(config, net, twin, x)[0].item() for _ in range(6)]
    assert len(set(drawn)) > 1


def test_total_loss_is_equation_2_and_its_parts_are_told_apart() -> None:
    torch.manual_seed(1)
    classifier = SpeechClassifier(TINY, 4)
    twin = VGG16(TINY, 4)
    objective = ClassificationObjective(
        classifier, AntiTransfer(AntiTransferConfig(layers=[7], beta=2.0), twin), embedded=True, multi_label=False
    )
    x, y = torch.rand(3, 4, 64, 64), torch.tensor([0, 3, 1])
    losses = objective(x, y)
    cross_entropy = torch.nn.functional.cross_entropy(classifier.net(x)[0], y)
    features = classifier.net.features_at(x, ["relu7"])["relu7"]
    expected = 2.0 * squared_cosine(features, twin.features_at(x, ["relu7"])["relu7"])
    assert losses.parts["cross_entropy"].item() == pytest.approx(cross_entropy.item())
    assert losses.parts["anti_transfer"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.total.item() == pytest.approx(cross_entropy.item() + expected.item(), rel=1e-5)


def test_minimising_the_term_lowers_the_similarity() -> None:
    torch.manual_seed(0)
    twin = VGG16(TINY, 4)
    net = VGG16(TINY, 4)
    net.load_state_dict(twin.state_dict())
    with torch.no_grad():  # at equality the loss is at its maximum, where the gradient is zero
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    term = AntiTransfer(AntiTransferConfig(layers=[5]), twin)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.rand(4, 4, 64, 64)
    history = []
    for _ in range(15):
        loss, _ = term.total(net(x, term(x))[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 0.8
    assert history[-1] < 0.5 * history[0]


def step(term: AntiTransfer, net: VGG16, x: torch.Tensor, remembered: dict[str, torch.Tensor] | None = None) -> Any:
    """The loss and the gradient of the first convolution."""
    net.zero_grad()
    loss, _ = term.total(net(x, term(x, remembered))[1])
    loss.backward()
    first: Any = net.convs[0]
    return loss.detach(), first.weight.grad.clone()


WIDE = replace(TINY, width=0.0625)  # 32 channels of 16 positions at layer 13: Gram matrices would take more memory


@pytest.mark.parametrize(
    ("settings", "triangles"),
    [
        ({"layers": [2, 9], "beta": [1.0, 0.5]}, True),
        ({"layers": [2], "loss": GramChannel(centred=True)}, True),
        ({"layers": [13], "loss": GramPosition()}, True),
        ({"layers": [13]}, False),
        ({"layers": [2], "loss": GramPosition()}, False),
        ({"layers": [7], "loss": CKA()}, None),
        ({"layers": [7], "loss": FoldedRowwise()}, None),
        ({"layers": [7], "loss": MseSigmoid("max")}, None),
    ],
)
def test_what_is_remembered_is_what_the_twin_gives(settings: Any, triangles: bool | None) -> None:
    """Features to the bit; Gram matrices, summed in another order, to 1e-6."""
    torch.manual_seed(5)
    net, twin, data = VGG16(WIDE, 4), VGG16(WIDE, 7), torch.rand(9, 4, 64, 64)
    config = AntiTransferConfig(**settings)
    known, running = AntiTransfer(config, twin), AntiTransfer(config, twin)
    numbers = torch.tensor([8, 3, 4, 0, 7, 2, 11, 10])  # 1, 5, 6 and 9 are in no part
    source = dict(zip(numbers.tolist(), data, strict=False))

    def inputs(samples: torch.Tensor) -> torch.Tensor:
        return torch.stack([source[n] for n in samples.tolist()])

    tables = known.remember(inputs, numbers, batch=4)
    assert known.twin is None
    assert all(table.resident for table in tables.values())
    named = [
        f"{tap}_{part}" for part in (("values",) if triangles is None else ("values", "stats")) for tap in known.layers
    ]
    assert tables.keys() == set(named)
    values = [table.pick(numbers[:1]) for name, table in tables.items() if name.endswith("values")]
    assert [value.dim() == 2 for value in values] == [bool(triangles)] * len(values)
    for samples in (torch.tensor([11, 0, 3, 8]), torch.tensor([7, 10]), torch.tensor([8, 3, 4, 0])):
        remembered = {name: table.fetch(samples) for name, table in tables.items()}
        loss, gradient = step(known, net, inputs(samples), remembered)
        expected, expected_gradient = step(running, net, inputs(samples))
        if triangles:
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                gradient, expected_gradient, rtol=1e-4, atol=1e-5 * expected_gradient.abs().max()
            )
        else:
            assert torch.equal(loss, expected)
            assert torch.equal(gradient, expected_gradient)
    with pytest.raises(AssertionError, match="the twin is dropped"):
        known(data[:2])
    unknown = {name: table.fetch(torch.tensor([0, 5])) for name, table in tables.items()}
    assert step(known, net, data[:2], unknown)[0].isnan()


def test_a_larger_cache_than_allowed_lies_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    made = anti_transfer.empty_rows

    def spying(like: Any, count: Any, device: Any) -> Any:
        asked.append((tuple(like.shape[1:]), device))
        return made(like, count, device)

    monkeypatch.setattr(anti_transfer, "empty_rows", spying)
    # Layers 1 and 2 keep 10 numbers each of float32 a sample; layer 1's features alone would be 64 KiB.
    rows = torch.arange(2**20 // (2 * 40) + 1)
    for limit, samples in ((1, rows[:-1]), (1, rows), (0, rows[:2])):
        config = AntiTransferConfig(layers=[1, 2], cache_mib=limit)
        term = AntiTransfer(config, VGG16(replace(TINY, width=0.01), 2))
        monkeypatch.setattr(term, "_features", lambda inputs: dict.fromkeys(("relu1", "relu2"), inputs))
        term.remember(lambda samples: torch.ones(len(samples), 4, 3, 3), samples, batch=4096)
    assert asked == 2 * [((10,), None)] + 4 * [((10,), torch.device("cpu"))]


OLD = {
    "semantics": "paper",
    "clamp": "each",
    "gram": "channel",
    "centred": False,
    "aggregation": "gram",
    "distance": "cos_squared",
}
"""The fields that there were in place of ``loss``, with their defaults."""


def as_saved_before(loss: Loss) -> dict[str, object]:
    """What version 0.1 called a loss."""
    if isinstance(loss, FoldedRowwise):
        return {"semantics": "folded-rowwise", "clamp": loss.clamp}
    if isinstance(loss, CosSquared | MseSigmoid):
        return {"aggregation": loss.aggregation, "distance": loss.name.replace("-", "_")}
    return dict(zip(("gram", "centred"), loss.gram, strict=True))


SAVED_BEFORE = [loss for loss in EVERY if loss.gram or isinstance(loss, FoldedRowwise | CosSquared | MseSigmoid)]


@pytest.mark.parametrize("loss", SAVED_BEFORE, ids=repr)
def test_settings_are_read_back_as_they_are_and_were_saved(loss: Loss) -> None:
    config = AntiTransferConfig(layers=[2, 5], beta=[1.0, 0.5], loss=loss, random_twin=True)
    plain = json.loads(json.dumps(to_plain(config)))
    assert from_plain(AntiTransferConfig, plain) == config
    named = {name: value for name, value in plain.items() if name != "loss"}
    assert from_plain(AntiTransferConfig, named | OLD | as_saved_before(loss)) == config
    # Before there were Gram matrices of other rows than channels, and other aggregations, those fields were missing.
    changed = {name: value for name, value in as_saved_before(loss).items() if value != OLD[name]}
    assert from_plain(AntiTransferConfig, named | {"semantics": "paper", "clamp": "each"} | changed) == config


def test_settings_of_no_loss_are_refused_by_name() -> None:
    for settings, message in (
        ({"loss": "median"}, "loss must be one of 'gram-channel', .*; got 'median'"),
        ({"loss": {"name": "cka", "clamp": "each"}}, "clamp: 'each' must be an option of loss 'cka'"),
        ({"loss": "cka", "semantics": "paper"}, "unknown setting semantics"),
        ({"gram": "row"}, "loss must be one of .*; got .*'gram-row'"),
        ({"distance": "cosine"}, "loss must be one of .*; got .*'cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_plain(AntiTransferConfig, settings)


def test_the_help_names_every_loss_and_its_options() -> None:
    text = inspect.getdoc(AntiTransferConfig)
    for kind in LOSSES.values():
        for word in (kind.name, *(str(v) for values in kind.options().values() for v in values if v is not False)):
            assert re.search(rf"\b{word}\b", text.replace("true", "True")), word


def test_every_loss_is_parsed_from_files_and_the_command_line() -> None:
    parser, _ = build_parser()
    for loss in EVERY:
        text = loss.plain() if isinstance(loss.plain(), str) else yaml.safe_dump(loss.plain(), default_flow_style=True)
        options = parser.instantiate(parser.parse_args(["train", "--out", "x", f"--anti_transfer.loss={text}"]))
        assert options.train.anti_transfer == AntiTransferConfig(loss=loss)
        assert from_plain(Experiment, {"anti_transfer": {"loss": loss.plain()}}).anti_transfer.loss == loss


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cca", "loss must be one of .*; got 'cca'"),
        ("null", "loss must be one of .*; got None"),
        ("[cka", r"loss must be one of .*; got '\[cka'"),
        ("{name: cka, clamp: each}", "clamp: 'each' must be an option of loss 'cka', which has none"),
        ("{name: folded-rowwise, clamp: both}", "clamp of loss .* must be one of 'each', 'product'; got 'both'"),
    ],
)
def test_bad_losses_are_refused_in_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser()[0].parse_args(["train", "--out", "x", f"--anti_transfer.loss={text}"])
    error = capsys.readouterr().err
    assert re.search(f'"anti_transfer.loss": .*{message}', error)
    assert error.count("\n") == 1
