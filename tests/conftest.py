"""For all tests: the seed of their random inputs, and the settings of their property tests."""

import importlib.util
import random
import zlib
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("hypothesis"):  # a GPU machine runs tests/gpu with the packages that it has
    import hypothesis

    # No deadline: on a busy machine an example takes many times as long as on a quiet one.
    hypothesis.settings.register_profile("tests", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the tests' random inputs; without it, a new one in each run")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        from_controller: dict[str, Any] = getattr(config, "workerinput", {})
        config.option.seed = from_controller.get("seed", random.SystemRandom().randrange(2**31))
    config.pluginmanager.register(RandomInputs(config.option.seed))
    if hasattr(config, "workerinput"):  # workers share the cores: with a thread on each, they wait for each other
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Gives all workers of pytest-xdist one seed."""
    node.workerinput["seed"] = node.config.option.seed


@pytest.fixture
def rng(pytestconfig: pytest.Config) -> np.random.Generator:
    """NumPy's generator for a test's random inputs."""
    return np.random.default_rng(pytestconfig.option.seed)


class RandomInputs:
    """Seeds the global generators so that a test draws the same numbers alone as among others, and reports the seed.

    A plugin, since pytest asks no conftest.py below the root about fixtures of the whole session.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.message = f"repeat them with --seed {seed}"

    def pytest_report_header(self) -> str:
        return f"random inputs: {self.message}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        _seed_all(self.seed)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """Gives a fixture that several tests share a seed of its own: which test comes first changes nothing."""
        if fixturedef.scope == "function":
            return (yield)
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        _seed_all(self.seed ^ zlib.crc32(fixturedef.argname.encode()))
        try:
            return (yield)
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed:
            report.sections.append(("random inputs", self.message))
        return report


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
