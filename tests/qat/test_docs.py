"""What the documents name exists."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/from-wav-to-loss.md"
NAMES = sorted(set(re.findall(r"`((?:qat|qkernels)(?:\.\w+)+)`", PAGE.read_text(encoding="utf-8"))))


def resolve(name: str) -> object:
    """The module, class, function or method with this dotted name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            value = getattr(value, attribute)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_way_from_wav_to_loss_exists(name: str) -> None:
    resolve(name)


def test_the_page_names_the_whole_way() -> None:
    assert len(NAMES) > 30
    with pytest.raises(AttributeError):
        resolve("qat.training.loop.no_such_function")
