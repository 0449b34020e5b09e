from dataclasses import replace

import pytest
import torch

from qat import anti_transfer
from qat.anti_transfer import AntiTransfer
from qat.config import AntiTransferConfig, NetworkConfig, from_plain
from qat.models import VGG16, tap_name
from qat.training.objectives import ClassificationObjective, SpeechClassifier
from qkernels import anti_transfer_loss, gram_cosine
from qkernels.nn import AntiTransferLoss

TINY = NetworkConfig(width=0.05, init="he", dropout=0.0)
POSITIONS = ["relu", "pre-relu", "slice", "pool5"]


def squared_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equation 1 as it is written: vectorised Gram matrices of every sample."""
    values = []
    for x, y in zip(a.flatten(2).double(), b.flatten(2).double(), strict=True):
        g, h = (x @ x.T).flatten(), (y @ y.T).flatten()
        values.append((g @ h / (g.norm() * h.norm())) ** 2)
    return torch.stack(values).mean()


def computed(config: AntiTransferConfig, net: VGG16, twin: VGG16, x: torch.Tensor):
    """Loss and similarities from one forward pass."""
    term = AntiTransfer(config, twin)
    return term.total(net(x, term(x))[1])


@pytest.fixture
def nets() -> tuple[VGG16, VGG16, torch.Tensor]:
    torch.manual_seed(3)
    return VGG16(TINY, 4), VGG16(TINY, 7), torch.rand(3, 4, 64, 64)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer", [1, 2, 7, 13])
def test_loss_is_equation_1_at_the_named_features(nets, layer, position):
    net, twin, x = nets
    tap = tap_name(layer, position)
    loss, logged = computed(AntiTransferConfig(layers=[layer], beta=0.7, position=position), net, twin, x)
    expected = squared_cosine(net.features_at(x, [tap])[tap], twin.features_at(x, [tap])[tap])
    assert loss.item() == pytest.approx(0.7 * expected.item(), rel=1e-5)
    assert logged[f"similarity_{layer}"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("domain", ["quaternion", "real-on-embedding"])
@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_are_those_of_the_plain_loss_added_to_the_total(domain, position):
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
    logits, made = net(x, term(x))
    (torch.nn.functional.cross_entropy(logits, y) + term.total(made)[0]).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_several_layers_are_summed_with_their_betas_and_gradient_stays_below_the_deepest(nets):
    net, twin, x = nets
    loss, logged = computed(AntiTransferConfig(layers=[7, 2], beta=[0.5, 3.0]), net, twin, x)
    expected = 0.5 * logged["similarity_7"].item() + 3 * logged["similarity_2"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    reached = [conv.weight.grad is not None and bool(conv.weight.grad.any()) for conv in net.convs]
    assert reached == [True] * 7 + [False] * 6


def test_the_slice_convention_at_layer_1_is_the_baseline_in_disguise(nets):
    net, twin, x = nets
    loss, _ = computed(AntiTransferConfig(layers=[1], position="slice"), net, twin, x.requires_grad_(False))
    assert loss.item() == pytest.approx(1.0, rel=1e-6)
    assert not loss.requires_grad


def test_twin_is_frozen_in_eval_mode_and_never_gets_a_gradient(nets):
    net, twin, x = nets
    term = AntiTransfer(AntiTransferConfig(layers=[13]), twin).train()
    assert not any(module.training for module in twin.modules())
    term.total(net(x, term(x))[1])[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in twin.parameters())
    assert net.convs[0].weight.grad.any()


def test_beta_0_only_monitors(nets):
    net, twin, x = nets
    loss, logged = computed(AntiTransferConfig(layers=[13], beta=0.0), net, twin, x)
    assert loss.item() == 0
    assert not loss.requires_grad
    assert logged["similarity_13"].item() > 0


def test_folded_rowwise_is_weighted_by_beta_squared(nets):
    net, twin, x = nets
    values = [
        computed(AntiTransferConfig(layers=[7], beta=beta, semantics="folded-rowwise"), net, twin, x)[0].item()
        for beta in (1.0, 3.0)
    ]
    assert values[1] == pytest.approx(9 * values[0], rel=1e-5)


def test_clamp_of_folded_rowwise_reaches_the_loss(nets):
    """Where row norms are about 1e-8, clamping each or their product makes a difference."""
    net, twin, x = nets
    tiny = 1e-3 * net.features_at(x, ["relu7"])["relu7"]
    values = []
    for clamp in ("each", "product"):
        config = AntiTransferConfig(layers=[7], semantics="folded-rowwise", clamp=clamp)
        values.append(AntiTransfer(config, twin)(x)["relu7"](tiny)[1].item())
        frozen = twin.features_at(x, ["relu7"])["relu7"]
        expected = anti_transfer_loss(tiny, frozen, semantics="folded-rowwise", clamp=clamp)
        assert values[-1] == pytest.approx(expected.item(), rel=1e-6)
    assert values[0] != pytest.approx(values[1], rel=0.01)


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("gram", ["channel", "position", "batch"])
def test_gram_and_centring_reach_the_loss(nets, gram, centred, beta):
    net, twin, x = nets
    config = AntiTransferConfig(layers=[9], beta=beta, gram=gram, centred=centred)
    loss, logged = computed(config, net, twin, x)
    a, b = (network.features_at(x, ["relu9"])["relu9"] for network in (net, twin))
    expected = gram_cosine(a, b, gram=gram, centred=centred).square().mean().item()
    assert logged["similarity_9"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(beta * expected, rel=1e-5)


@pytest.mark.parametrize("distance", ["cos_squared", "mse_sigmoid"])
@pytest.mark.parametrize("aggregation", ["gram", "none", "mean", "sum", "max", "mul_comp", "pairwise"])
def test_aggregation_and_distance_reach_the_loss_and_its_gradient(nets, aggregation, distance):
    net, twin, x = nets
    x = 0.1 * x  # at larger distances the sigmoid is flat
    config = AntiTransferConfig(layers=[5], beta=0.5, aggregation=aggregation, distance=distance)
    loss, _ = computed(config, net, twin, x)
    a, b = (network.features_at(x, ["relu5"])["relu5"] for network in (net, twin))
    expected = AntiTransferLoss(aggregation=aggregation, distance=distance)(a, b)
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    loss.backward()
    assert net.convs[4].weight.grad.any()


def test_stochastic_pairwise_is_drawn_anew_each_time(nets):
    net, twin, x = nets
    config = AntiTransferConfig(layers=[5], aggregation="stochastic_pairwise")
    torch.manual_seed(0)
    drawn = [computed(config, net, twin, x)[0].item() for _ in range(6)]
    torch.manual_seed(0)
    assert drawn == [computed(config, net, twin, x)[0].item() for _ in range(6)]
    assert len(set(drawn)) > 1


def test_total_loss_is_equation_2_and_its_parts_are_told_apart():
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


def test_minimising_the_term_lowers_the_similarity():
    torch.manual_seed(0)
    twin = VGG16(TINY, 4)
    net = VGG16(TINY, 4)
    net.load_state_dict(twin.state_dict())
    with torch.no_grad():  # at equality the loss is at its maximum, where the gradient is zero
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
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


def step(term: AntiTransfer, net: VGG16, x: torch.Tensor, remembered: dict[str, torch.Tensor] | None = None):
    """The loss and the gradient of the first convolution."""
    net.zero_grad()
    loss, _ = term.total(net(x, term(x, remembered))[1])
    loss.backward()
    return loss.detach(), net.convs[0].weight.grad.clone()


WIDE = replace(TINY, width=0.0625)  # 32 channels of 16 positions at layer 13: Gram matrices would take more memory


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        ({"layers": [2, 9], "beta": [1.0, 0.5]}, True),
        ({"layers": [2], "centred": True}, True),
        ({"layers": [13], "gram": "position"}, True),
        ({"layers": [13]}, False),
        ({"layers": [2], "gram": "position"}, False),
        ({"layers": [7], "gram": "batch", "centred": True}, None),
        ({"layers": [7], "semantics": "folded-rowwise"}, None),
        ({"layers": [7], "aggregation": "max", "distance": "mse_sigmoid"}, None),
    ],
)
def test_what_is_remembered_is_what_the_twin_gives(settings, packed):
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
        f"{tap}_{part}" for part in (("values",) if packed is None else ("values", "stats")) for tap in known.layers
    ]
    assert tables.keys() == set(named)
    values = [table.pick(numbers[:1]) for name, table in tables.items() if name.endswith("values")]
    assert [value.dim() == 2 for value in values] == [bool(packed)] * len(values)
    for samples in (torch.tensor([11, 0, 3, 8]), torch.tensor([7, 10]), torch.tensor([8, 3, 4, 0])):
        remembered = {name: table.fetch(samples) for name, table in tables.items()}
        loss, gradient = step(known, net, inputs(samples), remembered)
        expected, expected_gradient = step(running, net, inputs(samples))
        if packed:
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                gradient, expected_gradient, rtol=1e-4, atol=1e-5 * expected_gradient.abs().max()
            )
        else:
            assert torch.equal(loss, expected)
            assert torch.equal(gradient, expected_gradient)
    with pytest.raises(AssertionError, match="the twin is given up"):
        known(data[:2])
    unknown = {name: table.fetch(torch.tensor([0, 5])) for name, table in tables.items()}
    assert step(known, net, data[:2], unknown)[0].isnan()


def test_a_larger_cache_than_allowed_lies_on_the_host(monkeypatch):
    asked = []
    made = anti_transfer.empty_rows

    def spying(like, count, device):
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


def test_settings_saved_before_there_were_these_options_still_load():
    old = {"twin": "runs/voice", "layers": [2], "beta": 1.0, "position": "relu", "semantics": "paper", "clamp": "each"}
    config = from_plain(AntiTransferConfig, old | {"random_twin": False})
    assert config == AntiTransferConfig(twin=config.twin)
    assert (config.gram, config.centred, config.aggregation, config.distance) == (
        "channel",
        False,
        "gram",
        "cos_squared",
    )


@pytest.mark.parametrize(
    ("settings", "mixing"),
    [
        ({}, None),
        ({"gram": "position", "centred": True}, None),
        ({"gram": "batch"}, "gram batch"),
        ({"semantics": "folded-rowwise"}, "semantics folded-rowwise"),
        ({"aggregation": "stochastic_pairwise"}, "aggregation stochastic_pairwise"),
        ({"distance": "mse_sigmoid"}, "distance mse_sigmoid"),
    ],
)
def test_losses_that_mix_the_samples_of_a_batch_are_known(nets, settings, mixing):
    """They alone are something else than the mean of the losses of single samples."""
    net, twin, x = nets
    config = AntiTransferConfig(layers=[9], **settings)
    assert config.mixing == mixing
    torch.manual_seed(0)
    whole = computed(config, net, twin, x)[0]
    singles = torch.stack([computed(config, net, twin, x[n : n + 1])[0] for n in range(len(x))]).mean()
    assert (abs(whole.item() - singles.item()) < 1e-5 * abs(whole.item())) == (mixing is None)
