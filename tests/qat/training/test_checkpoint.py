from pathlib import Path
from typing import Any

import pytest
import torch

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
