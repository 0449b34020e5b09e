import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

import qkernels
from qat.config import NetworkConfig, RHEmoConfig
from qat.models import VGG16, RHEmo, SpeechClassifier, tap_name
from qat.models.rhemo import _MaxPool
from qat.models.vgg import POOL_AFTER
from qat.training.objectives import RHEmoObjective
from qkernels.functional import PackedWeight

TABLE = {  # method, table 1.3 and item 9.24
    ("quaternion", False): {4: 9_998_020, 5: 10_002_117, 7: 10_010_311, 8: 10_014_408, 1000: 14_078_632},
    ("quaternion", True): {4: 33_590_980, 5: 33_595_077, 7: 33_603_271, 8: 33_607_368, 1000: 37_671_592},
    ("real", False): {4: 165_733_060, 5: 165_737_157, 7: 165_745_351, 8: 165_749_448, 1000: 169_813_672},
    ("real", True): {4: 134_275_780, 5: 134_279_877, 7: 134_288_071, 8: 134_292_168, 1000: 138_356_392},
    ("real-on-embedding", False): {4: 39_905_668},
}
TINY = NetworkConfig(width=0.01, init="he", dropout=0.0)


def keep(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return features, features


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("domain", "adaptive_pool"), TABLE)
def test_parameter_counts_to_the_unit(domain: Any, adaptive_pool: Any) -> None:
    for classes, expected in TABLE[domain, adaptive_pool].items():
        with torch.device("meta"):
            net = VGG16(NetworkConfig(domain=domain, adaptive_pool=adaptive_pool), classes)
        assert parameters(net) == expected


def test_feature_parameters_per_layer() -> None:
    with torch.device("meta"):
        quat, real = (VGG16(NetworkConfig(domain=d), 4) for d in ("quaternion", "real"))
    assert [parameters(c) for c in quat.convs][:5] == [640, 9280, 18_560, 36_992, 73_984]
    assert parameters(quat.convs) == 3_681_984
    assert parameters(real.convs) == 14_713_536


def test_rhemo_parameter_counts() -> None:
    with torch.device("meta"):
        model = RHEmo()
    assert [parameters(m) for m in model.children()] == [256, 130, 134_283_272]


@pytest.mark.parametrize(("domain", "shape"), [("quaternion", (4, 64, 64)), ("real", (1, 512, 128))])
def test_feature_shapes(domain: str, shape: tuple[int, int, int]) -> None:
    net = VGG16(NetworkConfig(domain=domain, width=0.01, init="he"), 4)
    taps = ["input", *(f"relu{n}" for n in range(1, 14)), *(f"pool{n}" for n in range(1, 6))]
    logits, tapped = net(torch.rand(2, *shape), dict.fromkeys(taps, keep))
    assert logits.shape == (2, 4)
    pools = [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for n, halvings in enumerate(pools, 1):
        assert tapped[f"relu{n}"].shape[2:] == (shape[1] >> halvings, shape[2] >> halvings)
    assert tapped["pool5"].shape[2:] == (shape[1] // 32, shape[2] // 32)


def test_tap_names_follow_the_conventions_of_paper_and_codes() -> None:
    assert [tap_name(n, "relu") for n in (1, 2, 13)] == ["relu1", "relu2", "relu13"]
    assert [tap_name(n, "slice") for n in range(1, 14)] == (
        [
            "input",
            "relu1",
            "pool1",
            "relu3",
            "pool2",
            "relu5",
            "relu6",
            "pool3",
            "relu8",
            "relu9",
            "pool4",
            "relu11",
            "relu12",
        ]
    )
    assert {tap_name(n, "pool5") for n in range(1, 14)} == {"pool5"}
    for layer in (0, 14):
        with pytest.raises(ValueError, match="convolutions 1 to 13"):
            tap_name(layer, "relu")


def test_taps_are_the_values_that_the_forward_pass_goes_through() -> None:
    torch.manual_seed(0)
    net = VGG16(TINY, 3).eval()
    x = torch.rand(2, 4, 64, 64)
    _, tapped = net(x, dict.fromkeys(["conv2", "relu2", "pool1", "relu3"], keep))
    torch.testing.assert_close(tapped["conv2"].relu(), tapped["relu2"])
    torch.testing.assert_close(torch.nn.functional.max_pool2d(tapped["relu2"], 2), tapped["pool1"])
    assert (tapped["conv2"] < 0).any()
    plain, _ = net(x)
    with_taps, _ = net(x, {"conv2": keep})
    torch.testing.assert_close(plain, with_taps)


@pytest.mark.parametrize("domain", ["quaternion", "real-on-embedding"])
def test_what_a_tap_returns_feeds_the_next_layer(domain: str) -> None:
    """All but a map in front of a fused pool, whose pooled map is computed beside it."""
    torch.manual_seed(0)
    net = VGG16(replace(TINY, domain=domain), 3).eval()
    x = torch.rand(2, 4, 64, 64)
    plain, _ = net(x)
    names = [
        "input",
        *(f"{kind}{n}" for kind in ("conv", "relu") for n in range(1, 14)),
        *(f"pool{n}" for n in range(1, 6)),
    ]
    unread = [name for name in names if torch.equal(net(x, {name: lambda f: (torch.zeros_like(f), f)})[0], plain)]
    assert unread == ([f"relu{n}" for n in POOL_AFTER] if domain == "quaternion" else [])


def test_nothing_deeper_than_the_tap_is_computed() -> None:
    net = VGG16(TINY, 3)
    ran = []
    run = net._layers.run
    net._layers = replace(net._layers, run=lambda conv, *args: ran.append(conv) or run(conv, *args))
    net.features_at(torch.rand(1, 4, 64, 64), ["relu5", "relu2"])
    assert len(ran) == 5
    ran.clear()
    net.features_at(torch.rand(1, 4, 64, 64), ["pool2"])
    assert len(ran) == 4
    ran.clear()
    net.features_at(torch.rand(1, 4, 64, 64), ["input"])
    assert ran == []


class Packs:
    """Stands in for the packing of a network's weights: notes how often, and what its layers are given."""

    def __init__(self, net: Any) -> None:
        self.made, self.given = [], []
        self._layers = net._layers
        net._layers = replace(net._layers, packed=self.packed, run=self.run, run_hidden=self.run_hidden)

    def packed(self, modules: Any, maps: Any, x: torch.Tensor) -> Any:
        self.made.append([PackedWeight(object(), object(), "") for _ in modules])
        return self.made[-1]

    def run(
        self, module: Any, x: torch.Tensor, activation: Any, pool: bool = False, tap: bool = False, link: Any = None
    ) -> Any:
        self.given.append(link.packed)
        return self._layers.run(module, x, activation, pool, tap, link._replace(packed=None))

    def run_hidden(self, module: Any, x: torch.Tensor, dropout: Any, link: Any, dtype: torch.dtype = None) -> Any:
        self.given.append(link.packed)
        return self._layers.run_hidden(module, x, dropout, link._replace(packed=None), dtype)


def test_weights_are_packed_once_a_pass_and_those_of_a_frozen_network_once() -> None:
    """On a GPU, for which the meta device stands."""
    net, x = VGG16(TINY, 3).to("meta"), torch.rand(1, 4, 64, 64, device="meta")
    packs = Packs(net)

    def run() -> None:
        net.features_at(x, ["relu13"])

    run()
    with torch.no_grad():  # a CUDA graph of an evaluation packs the weights that training changes
        run()
    assert [len(made) for made in packs.made] == [13, 13]
    assert packs.given == packs.made[0] + packs.made[1]

    net.requires_grad_(False)
    packs.made.clear()
    packs.given.clear()
    run()
    run()
    assert len(packs.made) == 1
    assert packs.given == 2 * packs.made[0]
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    run()
    assert len(packs.made) == 2
    run()
    assert len(packs.made) == 2
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    run()
    assert len(packs.made) == 3
    # Whatever a recorded step reads is never freed.
    assert [packed for _, packed in net._kept.values()] == packs.made


def test_on_a_cpu_the_weights_of_a_frozen_network_are_packed_until_they_change() -> None:
    net, x = VGG16(TINY, 3), torch.rand(1, 4, 64, 64)
    packs = Packs(net)
    net(x)
    with torch.no_grad():  # Adam's one kernel changes weights but not their versions
        net(x)
    assert len(packs.made) == 2
    net.requires_grad_(False)
    packs.made.clear()
    net(x)
    net(x)
    assert len(packs.made) == 1
    net.convs[3].get_parameter("weight").add_(1)
    net(x)
    assert len(packs.made) == 2
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        assert len(packs.made) == 3
        with torch.autocast("cpu", torch.float16):  # another of the half types
            net(x)
        assert len(packs.made) == 4
    assert [packed for _, packed in net._kept.values()] == packs.made[-1:]  # one copy of the weights, not more


@pytest.mark.parametrize("width", [1 / 16, 1 / 2])  # of which the second has layers in both forms
def test_packed_weights_change_no_bit_on_a_cpu(width: float) -> None:
    torch.manual_seed(0)
    net, x = VGG16(replace(TINY, width=width), 3).eval(), torch.rand(2, 4, 64, 64)
    with_gradients = net(x)[0].detach()
    with torch.no_grad():
        assert torch.equal(net(x)[0], with_gradients)
    adam = torch.optim.Adam(net.parameters(), 1e-2, fused=True)
    net(x)[0].sum().backward()
    adam.step()
    with torch.no_grad():
        trained = net(x)[0]
    assert torch.equal(net(x)[0], trained)
    assert not torch.equal(trained, with_gradients)
    net.requires_grad_(False)
    for _ in range(2):
        assert torch.equal(net(x)[0], trained)
    assert len(net._kept) == 1
    assert not copy.deepcopy(net)._kept
    net.convs[3].get_parameter("weight").mul_(2)
    changed = net(x)[0]
    assert not torch.equal(changed, trained)
    net.convs[4].get_parameter("weight").data = net.convs[4].get_parameter("weight") * 2
    assert not torch.equal(net(x)[0], changed)
    with torch.inference_mode():
        net(x)
    (dx,) = torch.autograd.grad(net(x.requires_grad_())[0].sum(), x)
    assert dx.any()


def test_what_is_frozen_or_not_reached_has_no_gradient() -> None:
    net, x = VGG16(TINY, 3), torch.rand(1, 4, 64, 64)
    _, tapped = net(x, {"relu2": keep})
    tapped["relu2"].sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        f"convs.{n}.{name}" for n in (0, 1) for name in ("weight", "bias")
    }
    for conv in net.convs[:10]:
        conv.requires_grad_(False)
    _, tapped = net(x, {name: keep for name in ("relu1", "relu11")})
    assert [tapped[name].requires_grad for name in ("relu1", "relu11")] == [False, True]


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_layers_of_both_forms_are_the_references(frozen: bool) -> None:
    """At this width the first hidden layer has the form q8 and the second is dense."""
    torch.manual_seed(0)
    net, x = VGG16(NetworkConfig(width=1 / 8, adaptive_pool=True, dropout=0.0), 3), torch.rand(2, 4, 64, 64)
    net.requires_grad_(not frozen)
    operands = [x.requires_grad_()] if frozen else list(net.parameters())
    actual = torch.autograd.grad(net(x)[0].square().sum(), operands)
    with qkernels.set_backend("reference"):
        exact = torch.autograd.grad(net(x)[0].square().sum(), operands)
    for gradient, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


def test_networks_are_mapped_and_take_inference_tensors() -> None:
    x = torch.rand(3, 2, 4, 64, 64)
    with torch.inference_mode():
        made = VGG16(TINY, 3).requires_grad_(False).eval()
        assert torch.equal(made(x[0])[0], made(x[0])[0])
    net = VGG16(TINY, 3).eval()
    mapped = torch.vmap(lambda one: net(one)[0])(x)
    torch.testing.assert_close(mapped, torch.stack([net(one)[0] for one in x]))


@pytest.mark.parametrize("forms", list(itertools.product(["dense", "q8"], repeat=3)))
def test_layers_of_any_forms_follow_each_other(forms: tuple[str, ...]) -> None:
    """The mask of a ReLU is applied by one of two neighbours, whichever forms they have."""
    torch.manual_seed(0)
    net, x = VGG16(TINY, 3).eval(), torch.rand(2, 4, 64, 64)
    exact = torch.autograd.grad(net(x)[0].square().sum(), list(net.parameters()))
    layers, turns = net._layers, itertools.cycle(forms)

    def in_turn(function: Any) -> Any:
        def layer(*args: Any) -> Any:
            with qkernels.set_form(next(turns)):
                return function(*args)

        return layer

    def packed(modules: Any, maps: Any, x: torch.Tensor) -> Any:
        with qkernels.set_form("dense"):
            real = layers.packed(modules, maps, x)
        return [own if form == "dense" else None for own, form in zip(real, itertools.cycle(forms), strict=False)]

    net._layers = replace(layers, run=in_turn(layers.run), run_hidden=in_turn(layers.run_hidden), packed=packed)
    for actual, truth in zip(torch.autograd.grad(net(x)[0].square().sum(), list(net.parameters())), exact, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


def test_only_what_a_feature_needs_is_packed() -> None:
    net = VGG16(TINY, 3).requires_grad_(False)
    packs = Packs(net)
    for name, convs in (("relu5", 5), ("conv2", 2), ("pool2", 4)):
        packs.made.clear()
        packs.given.clear()
        for _ in range(2):
            net.features_at(torch.rand(1, 4, 64, 64), [name])
        assert [len(made) for made in packs.made] == [convs]
        assert packs.given == 2 * packs.made[0]
    packs.made.clear()
    net.features_at(torch.rand(1, 4, 64, 64), ["input"])
    assert packs.made == [[]]


@pytest.mark.parametrize("name", ["conv3", "relu3", "pool2", "relu13", "pool5"])
def test_masks_that_move_between_layers_change_no_gradient(name: str) -> None:
    """Wherever a tap cuts the chain; the reference, which masks at each layer, agrees."""
    torch.manual_seed(0)
    net, x = VGG16(TINY, 3).double(), torch.rand(2, 4, 64, 64, dtype=torch.float64)
    gradients = []
    for backend in ("auto", "reference"):
        with qkernels.set_backend(backend):
            logits, tapped = net(x, {name: keep})
            # Not a square: its gradient would be 0 where the features are, masked or not.
            loss = logits.square().sum() + (tapped[name] - 1).square().sum()
            gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for actual, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, exact)


def test_dropped_init_option_is_refused_for_quaternions() -> None:
    with pytest.raises(ValueError, match="'pytorch' must be 'default' or 'he' in the quaternion domain"):
        NetworkConfig(init="pytorch")


def test_he_keeps_activations_alive_where_glorot_lets_them_die() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 4, 64, 64)
    rms = {}
    for init in ("default", "he"):
        tapped = VGG16(NetworkConfig(width=0.25, init=init), 2).features_at(x, ["relu13"])
        rms[init] = tapped["relu13"].square().mean().sqrt().item()
    assert rms["he"] > 30 * rms["default"] > 0


def test_rhemo_shapes_and_ranges() -> None:
    model = RHEmo(RHEmoConfig(width=0.01)).eval()
    embedding, reconstruction = model(torch.rand(2, 1, 512, 128))
    logits = model.classify(embedding)
    assert embedding.shape == (2, 4, 64, 64)
    assert (embedding >= 0).all()
    assert reconstruction.shape == (2, 1, 512, 128)
    assert (reconstruction > 0).all()
    assert (reconstruction < 1).all()
    assert {name: tuple(v.shape) for name, v in logits.items()} == {
        "emotion": (2, 5),
        "valence": (2, 1),
        "arousal": (2, 1),
        "dominance": (2, 1),
    }


def test_rhemo_heads_read_one_channel_each() -> None:
    torch.manual_seed(0)
    model = RHEmo(RHEmoConfig(width=0.01)).eval()
    embedding, _ = model(torch.rand(2, 1, 512, 128))
    logits = model.classify(embedding)
    for channel, name in enumerate(("emotion", "valence", "arousal", "dominance")):
        torch.testing.assert_close(logits[name], model.heads[name](embedding[:, [channel]]))


def test_rhemo_loss_is_the_published_sum() -> None:
    torch.manual_seed(0)
    model = RHEmo(RHEmoConfig(width=0.01)).eval()
    x, targets = torch.rand(3, 1, 512, 128), torch.tensor([[0, 1, 0, 1], [4, 0, 0, 1], [2, 1, 1, 0]]).float()
    config = RHEmoConfig(beta=0.01, beta_class=1.0, beta_vad=100.0)
    embedding, reconstruction = model(x)
    logits = model.classify(embedding)
    bce = torch.nn.BCELoss()
    expected = bce(reconstruction, x) + 0.01 * (
        torch.nn.CrossEntropyLoss()(logits["emotion"], targets[:, 0].long())
        + 100
        * sum(
            bce(logits[n].sigmoid()[:, 0], targets[:, c]) for c, n in enumerate(("valence", "arousal", "dominance"), 1)
        )
    )
    torch.testing.assert_close(RHEmoObjective(model, config)(x, targets).total, expected)
    stage1 = RHEmoObjective(model, RHEmoConfig(beta=0.0))(x, targets)
    torch.testing.assert_close(stage1.total, bce(reconstruction, x))
    assert set(stage1.parts) == {"reconstruction"}


def test_rhemo_leaves_out_what_is_not_annotated() -> None:
    model = RHEmo(RHEmoConfig(width=0.01)).eval()
    x, nan = torch.rand(2, 1, 512, 128), float("nan")
    config = RHEmoConfig(beta=0.01)
    targets = torch.tensor([[0, nan, 1, nan], [1, nan, nan, nan]])
    losses = RHEmoObjective(model, config, ["emotion", "arousal"])(x, targets)
    assert set(losses.parts) == {"reconstruction", "emotion", "arousal"}
    logits = model.classify(model.encoder(x))
    # The second sample has no arousal: the mean is the first's alone.
    arousal = functional.binary_cross_entropy_with_logits(logits["arousal"][:1, 0], torch.ones(1))
    torch.testing.assert_close(losses.parts["arousal"], arousal)
    expected = losses.parts["reconstruction"] + 0.01 * (
        functional.cross_entropy(logits["emotion"], torch.tensor([0, 1])) + 100 * arousal
    )
    torch.testing.assert_close(losses.total, expected)
    nothing = RHEmoObjective(model, config, ["valence"])(x, targets)
    assert nothing.parts["valence"] == 0
    nothing.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["frozen", "batch-statistics", "trainable"])
def test_encoder_modes(mode: str) -> None:
    torch.manual_seed(0)
    classifier = SpeechClassifier(NetworkConfig(width=0.01, rhemo_mode=mode), 3).train()
    x = torch.rand(4, 1, 512, 128)
    together, alone = classifier.embed(x)[:1], classifier.embed(x[:1])
    depends_on_mates = not torch.allclose(together, alone, atol=1e-6)
    assert depends_on_mates == (mode != "frozen")
    assert classifier.embed(x).requires_grad == (mode == "trainable")
    classifier.eval()
    depends_on_mates = not torch.allclose(classifier.embed(x)[:1], classifier.embed(x[:1]), atol=1e-6)
    assert depends_on_mates == (mode == "batch-statistics")


@pytest.mark.parametrize("window", [2, (2, 1), (1, 2)])
def test_pools_by_slices_are_pytorchs(window: Any) -> None:
    """Bit for bit, with NaN, and rows and columns that fill no window; with gradients PyTorch's own pool computes."""
    x = torch.randn(2, 3, 7, 9)
    x[0, 1, 2, 3] = torch.nan
    pool = _MaxPool(window)
    with torch.profiler.profile() as profile:
        torch.testing.assert_close(pool(x), functional.max_pool2d(x, window), rtol=0, atol=0, equal_nan=True)
    assert [event.name for event in profile.events()].count("aten::max_pool2d") == 1
    with torch.profiler.profile() as profile:
        pool(x.requires_grad_()).sum().backward()
    assert [event.name for event in profile.events()].count("aten::max_pool2d") == 1
