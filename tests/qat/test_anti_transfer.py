import pytest
import torch

from qat.anti_transfer import AntiTransfer
from qat.config import AntiTransferConfig, NetworkConfig
from qat.models import VGG16, tap_name
from qat.training.objectives import ClassificationObjective, SpeechClassifier
from qkernels import anti_transfer_loss

TINY = NetworkConfig(width=0.05, init="he", dropout=0.0)


def squared_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equation 1 as it is written: vectorised Gram matrices of every sample."""
    values = []
    for x, y in zip(a.flatten(2).double(), b.flatten(2).double(), strict=True):
        g, h = (x @ x.T).flatten(), (y @ y.T).flatten()
        values.append((g @ h / (g.norm() * h.norm())) ** 2)
    return torch.stack(values).mean()


@pytest.fixture
def nets() -> tuple[VGG16, VGG16, torch.Tensor]:
    torch.manual_seed(3)
    return VGG16(TINY, 4), VGG16(TINY, 7), torch.rand(3, 4, 64, 64)


@pytest.mark.parametrize("position", ["relu", "pre-relu", "slice", "pool5"])
@pytest.mark.parametrize("layer", [1, 2, 7, 13])
def test_loss_is_equation_1_at_the_named_features(nets, layer, position):
    net, twin, x = nets
    tap = tap_name(layer, position)
    _, features = net(x, [tap])
    loss, logged = AntiTransfer(AntiTransferConfig(layers=[layer], beta=0.7, position=position), twin)(x, features)
    expected = squared_cosine(features[tap], twin.features_at(x, [tap])[tap])
    assert loss.item() == pytest.approx(0.7 * expected.item(), rel=1e-5)
    assert logged[f"similarity_{layer}"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_several_layers_are_summed_and_gradient_stays_below_the_deepest(nets):
    net, twin, x = nets
    config = AntiTransferConfig(layers=[2, 7], beta=1.0)
    _, features = net(x, ["relu2", "relu7"])
    loss, logged = AntiTransfer(config, twin)(x, features)
    assert loss.item() == pytest.approx(logged["similarity_2"].item() + logged["similarity_7"].item(), rel=1e-5)
    loss.backward()
    reached = [conv.weight.grad is not None and bool(conv.weight.grad.any()) for conv in net.convs]
    assert reached == [True] * 7 + [False] * 6


def test_the_slice_convention_at_layer_1_is_the_baseline_in_disguise(nets):
    net, twin, x = nets
    _, features = net(x.requires_grad_(False), ["input"])
    loss, _ = AntiTransfer(AntiTransferConfig(layers=[1], position="slice"), twin)(x, features)
    assert loss.item() == pytest.approx(1.0, rel=1e-6)
    assert not loss.requires_grad


def test_twin_is_frozen_in_eval_mode_and_never_gets_a_gradient(nets):
    net, twin, x = nets
    term = AntiTransfer(AntiTransferConfig(layers=[13]), twin).train()
    assert not any(module.training for module in twin.modules())
    _, features = net(x, term.taps)
    term(x, features)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in twin.parameters())
    assert net.convs[0].weight.grad.any()


def test_beta_0_only_monitors(nets):
    net, twin, x = nets
    term = AntiTransfer(AntiTransferConfig(layers=[13], beta=0.0), twin)
    _, features = net(x, term.taps)
    loss, logged = term(x, features)
    assert loss.item() == 0
    assert not loss.requires_grad
    assert logged["similarity_13"].item() > 0


def test_folded_rowwise_is_weighted_by_beta_squared(nets):
    net, twin, x = nets
    values = {}
    for beta in (1.0, 3.0):
        config = AntiTransferConfig(layers=[7], beta=beta, semantics="folded-rowwise")
        _, features = net(x, ["relu7"])
        values[beta] = AntiTransfer(config, twin)(x, features)[0].item()
    assert values[3.0] == pytest.approx(9 * values[1.0], rel=1e-5)


def test_clamp_of_folded_rowwise_reaches_the_loss(nets):
    """Where row norms are about 1e-8, clamping each or their product makes a difference."""
    net, twin, x = nets
    _, features = net(x, ["relu7"])
    tiny = {"relu7": 1e-3 * features["relu7"]}
    values = []
    for clamp in ("each", "product"):
        config = AntiTransferConfig(layers=[7], semantics="folded-rowwise", clamp=clamp)
        values.append(AntiTransfer(config, twin)(x, tiny)[0].item())
        frozen = twin.features_at(x, ["relu7"])["relu7"]
        expected = anti_transfer_loss(tiny["relu7"], frozen, semantics="folded-rowwise", clamp=clamp)
        assert values[-1] == pytest.approx(expected.item(), rel=1e-6)
    assert values[0] != pytest.approx(values[1], rel=0.01)


def test_total_loss_is_equation_2_and_its_parts_are_told_apart():
    torch.manual_seed(1)
    classifier = SpeechClassifier(TINY, 4)
    twin = VGG16(TINY, 4)
    objective = ClassificationObjective(
        classifier, AntiTransfer(AntiTransferConfig(layers=[7], beta=2.0), twin), embedded=True, multi_label=False
    )
    x, y = torch.rand(3, 4, 64, 64), torch.tensor([0, 3, 1])
    losses = objective(x, y)
    logits, features = classifier.net(x, ["relu7"])
    cross_entropy = torch.nn.functional.cross_entropy(logits, y)
    expected = 2.0 * squared_cosine(features["relu7"], twin.features_at(x, ["relu7"])["relu7"])
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
        loss, _ = term(x, net(x, term.taps)[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 0.8
    assert history[-1] < 0.5 * history[0]
