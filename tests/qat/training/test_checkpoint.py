import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qat.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint


def test_round_trip_keeps_every_bit_and_the_record(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    save_checkpoint(tmp_path / "model.safetensors", net.state_dict(), {"kind": "classifier", "classes": ["a", "ü"]})
    other = torch.nn.Linear(3, 2)
    checkpoint = load_checkpoint(tmp_path, "classifier")
    checkpoint.load_into(other)
    assert torch.equal(net.weight, other.weight)
    assert checkpoint.record["classes"] == ["a", "ü"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.nn.Linear(3, 5), "another network: bias is \\(2,\\), this network's is \\(5,\\)"),
        (torch.nn.Linear(3, 2, bias=False), "has unknown \\['bias'\\]"),
        (torch.nn.Sequential(torch.nn.Linear(3, 2)), "lacks \\['0.bias', '0.weight'\\]"),
    ],
)
def test_checkpoint_of_another_network_changes_nothing(tmp_path: Path, other: Any, message: str) -> None:
    save_checkpoint(tmp_path / "model.safetensors", torch.nn.Linear(3, 2).state_dict(), {"kind": "classifier"})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, "classifier").load_into(other)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent", "classifier")
    (tmp_path / "text.safetensors").write_text("hello, this is no checkpoint at all")
    with pytest.raises(ValueError, match=r"text\.safetensors: not a readable"):
        load_checkpoint(tmp_path / "text.safetensors", "classifier")
    save_checkpoint(tmp_path / "r.safetensors", {"w": torch.ones(1)}, {"kind": "rhemo"})
    with pytest.raises(ValueError, match="of kind 'rhemo', but 'classifier' is needed"):
        load_checkpoint(tmp_path / "r.safetensors", "classifier")


def test_an_interrupted_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"w": torch.ones(2)}, {"kind": "classifier"})

    def broken(tensors: Any, file: Any, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("qat.training.checkpoint.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"w": torch.zeros(2)}, {"kind": "classifier"})
    assert torch.equal(load_checkpoint(path, "classifier").tensors["w"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_optimizer_state_continues_exactly() -> None:
    torch.manual_seed(0)
    nets = [torch.nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in nets]
    x = torch.rand(4, 3)

    def step(k: Any) -> None:
        optimizers[k].zero_grad()
        nets[k](x).square().sum().backward()
        optimizers[k].step()

    step(0), step(0)
    nets[1].load_state_dict(nets[0].state_dict())
    load_optimizer(optimizers[1], {k: v.clone() for k, v in optimizer_tensors(optimizers[0]).items()})
    step(0), step(1)
    assert torch.equal(nets[0].weight, nets[1].weight)


def adam_state(size: int) -> tuple[torch.optim.Adam, dict[str, torch.Tensor]]:
    parameter = torch.nn.Parameter(torch.zeros(size))
    optimizer = torch.optim.Adam([parameter], fused=True)
    parameter.grad = torch.ones(size)
    optimizer.step()
    return optimizer, optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.exp_avg": torch.ones(1)}, r"0\.exp_avg must be floating-point of shape \(100,\).* of shape \(1,\)"),
        ({"0.exp_avg_sq": torch.ones(100, dtype=torch.int64)}, r"it is torch\.int64 of shape \(100,\)"),
        ({"0.step": torch.ones(3)}, r"0\.step must be floating-point of shape \(\)"),
        ({"1.exp_avg": torch.ones(100)}, r"'1\.exp_avg' is of none of the 1 parameters"),
        ({"0.momentum": torch.ones(100)}, r"'0\.momentum' is of none"),
        ({"x": torch.ones(100)}, r"'x' is of none"),
    ],
)
def test_a_state_of_another_optimiser_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    """The fused kernel would read and write beyond it."""
    optimizer, tensors = adam_state(100)
    with pytest.raises(ValueError, match=message):
        load_optimizer(optimizer, tensors | change)


def test_a_state_that_lacks_a_part_is_refused() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    del tensors["1.exp_avg_sq"]
    with pytest.raises(ValueError, match=r"1\.exp_avg_sq is missing"):
        load_optimizer(optimizer, tensors)


def test_a_state_that_lacks_a_parameter_is_refused() -> None:
    """Adam would begin with it anew, in silence; a state of none of them is that of a training that has not begun."""
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    for number in range(3):
        some = {name: value for name, value in tensors.items() if not name.startswith(f"{number}.")}
        with pytest.raises(ValueError, match=rf"state of the optimiser: {number}\.exp_avg is missing"):
            load_optimizer(optimizer, some)
    load_optimizer(optimizer, {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_refused(field: str, value: float, rng: np.random.Generator) -> None:
    """But the square of a large gradient is infinite without harm."""
    optimizer, tensors = adam_state(100)
    tensors[f"0.{field}"].view(-1)[rng.integers(tensors[f"0.{field}"].numel())] = value
    if (field, value) == ("exp_avg_sq", torch.inf):
        load_optimizer(optimizer, tensors)
        return
    with pytest.raises(ValueError, match=rf"state of the optimiser: 0\.{field} is not finite"):
        load_optimizer(optimizer, tensors)


def test_weights_that_are_not_finite_or_of_another_type_are_refused(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    for bad, message in (
        (torch.tensor([1.0, torch.nan]), r"m\.safetensors: bias is not finite"),
        (torch.tensor([1, 2]), r"m\.safetensors: bias is torch\.int64, this network's is torch\.float32"),
    ):
        save_checkpoint(tmp_path / "m.safetensors", {"weight": net.weight, "bias": bad}, {"kind": "rhemo"})
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "m.safetensors", "rhemo").load_into(net)


def test_one_bit_of_a_weight_or_of_the_record_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    file = tmp_path / "m.safetensors"
    tensors = {"a": torch.rand(40), "b": torch.rand(3, 4).to(torch.bfloat16), "c": torch.tensor(7), "d": torch.ones(0)}
    record = {"kind": "rhemo", "normalisation": {"maximum": 0.4321}}
    save_checkpoint(file, tensors, record)
    whole = file.read_bytes()
    weights = len(whole) - sum(tensor.nbytes for tensor in tensors.values())
    places = [*rng.integers(weights, len(whole), 8), whole.index(b"4321") + 2]
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"m\.safetensors: not a readable safetensors file: its checksum is wrong"):
            load_checkpoint(file, "rhemo")
    file.write_bytes(whole)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    for changed in ({"e": torch.ones(1)}, {"a": tensors["a"].view(4, 10)}, {"c": torch.tensor(7, dtype=torch.int32)}):
        save_file(tensors | changed, file, metadata=metadata)
        with pytest.raises(ValueError, match="its checksum is wrong"):
            load_checkpoint(file, "rhemo")
    save_file(tensors, file, metadata={"record": json.dumps(record)})  # as versions without checksums wrote it
    loaded = load_checkpoint(file, "rhemo").tensors
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(8)]
    for file in files:
        save_checkpoint(file, {"a": torch.ones(3), "b": torch.zeros(2)}, {"kind": "rhemo", "epoch": 1})
    assert len({file.read_bytes() for file in files}) == 1
    assert load_checkpoint(files[0], "rhemo").record == {"kind": "rhemo", "epoch": 1}


def test_a_full_disk_is_one_error_with_the_file(tmp_path: Path) -> None:
    """safetensors has an exception of its own; the size of a file is limited here, in another process."""
    code = (
        "import resource, signal, sys, pathlib, torch\n"
        "from qat.training.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "save_checkpoint(path, {'w': torch.ones(10)}, {'kind': 'rhemo'})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
        "try: save_checkpoint(path, {'w': torch.zeros(100_000)}, {'kind': 'rhemo'})\n"
        "except OSError as error: print(error)\n"
    )
    path = tmp_path / "last.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"{path}: cannot be written \(.*\); what was there before is unchanged\n", done.stdout)
    assert torch.equal(load_checkpoint(path, "rhemo").tensors["w"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]


@pytest.mark.parametrize("record", ["[1]", "null", '"text"', "{"])
def test_a_record_that_is_no_object_is_named(record: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors", metadata={"record": record})
    with pytest.raises(ValueError, match=r"m\.safetensors: not a readable safetensors file"):
        load_checkpoint(tmp_path / "m.safetensors", "classifier")
