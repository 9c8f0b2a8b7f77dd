"""Fixed seeds, one thread, and the small things that several test files need."""

from __future__ import annotations

import copy
import os

import helpers
import hypothesis
import pytest
import torch
import torch.nn.functional as F

import miracle_ban
from miracle_ban.coders import Trellis
from miracle_ban.container import Archive
from miracle_ban.train import FitReport

quiet = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, **quiet)
hypothesis.settings.register_profile("long", max_examples=4000, **quiet)  # pytest --hypothesis-profile=long: others at each run
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew, from tests/make_golden.py")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # for the fixtures of sessions and modules, which come before those of functions
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: two that share two cores wait for each other
    if config.getoption("--update-golden") and not hasattr(config, "workerinput"):
        import make_golden

        make_golden.write()


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same torch generator, one thread and float32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches of the blob task."""
    images, labels = helpers.blobs(512, seed=0)
    return list(zip(images.split(64), labels.split(64), strict=True))


@pytest.fixture(scope="session")
def trained_net(batches) -> helpers.TinyNet:
    """A convolutional network trained on the blobs; copy it before changing it."""
    torch.manual_seed(0)
    net = helpers.TinyNet()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(12):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net


@pytest.fixture(scope="session")
def fitted(trained_net, batches) -> tuple[torch.nn.Module, FitReport]:
    """A converted network fitted to `helpers.BUDGET`, and its report."""
    bnn = miracle_ban.convert(trained_net)
    report = miracle_ban.fit(bnn, batches, F.cross_entropy, budget=helpers.BUDGET, epochs=60, progress=False)
    return bnn, report


@pytest.fixture(scope="session")
def packaged(trained_net, batches) -> Archive:
    """The blob network at half a bit a weight, one frame."""
    return miracle_ban.compress(trained_net, inputs=batches, budget=helpers.PACKAGED, coder=Trellis(memory=8), progress=False)


@pytest.fixture
def bnn(fitted) -> torch.nn.Module:
    """An own copy of the fitted network."""
    return copy.deepcopy(fitted[0])
