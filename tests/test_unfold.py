"""BatchNorms that were folded get statistics again: the same in evaluation, alike in training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
from miracle_ban import MiracleError, harden, unfold
from miracle_ban.coders import Trellis


class Normed(nn.Module):
    """BatchNorms after a convolution, after an addition, where nothing could take them up, and after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc, self.bn3 = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(x + self.conv2(x)))
        return self.bn3(self.fc(x.mean((2, 3))))


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return 2.0 * torch.randn(512, 2, 6, 6) + 1.0


@pytest.fixture
def loaded(images, tmp_path) -> nn.Module:
    """Through a file, from which BatchNorms come without statistics."""
    torch.manual_seed(0)
    net = Normed()
    for norm in (net.bn1, net.bn2, net.bn3):
        nn.init.uniform_(norm.weight, 0.2, 3.0)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        for _ in range(60):
            net(images[torch.randperm(512)[:128]])
    archive = miracle_ban.compress(net.eval(), inputs=images, budget=400, coder=Trellis(memory=8), progress=False)
    miracle_ban.save(archive, tmp_path / "net.mban")
    return miracle_ban.load(tmp_path / "net.mban", Normed()).eval()


@torch.no_grad()
def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean() / a.var())


@torch.no_grad()
def test_a_loaded_network_is_the_same_in_evaluation_and_alike_in_training(loaded, images):
    before = loaded(images)
    assert difference(before, copy.deepcopy(loaded).train()(images)) > 0.1
    assert unfold(loaded, images) is loaded
    assert not loaded.training
    assert difference(before, loaded(images)) < 1e-9
    assert difference(before, copy.deepcopy(loaded).train()(images)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions(loaded, images, dtype):
    loaded, images = loaded.to(dtype), images.to(dtype)
    before = loaded(images)
    unfold(loaded.train(), [(images[:256], None), (images[256:], None)])
    assert loaded.training
    assert loaded.bn1.running_var.dtype == dtype
    assert difference(before.float(), loaded.eval()(images).float()) < 1e-4


def test_norms_with_statistics_of_their_own_stay(loaded, images):
    loaded.bn2.running_mean.fill_(0.5)
    kept = copy.deepcopy(loaded.bn2.state_dict())
    unfold(loaded, images)
    assert all(torch.equal(v, kept[name]) for name, v in loaded.bn2.state_dict().items())
    assert not torch.equal(loaded.bn1.running_var, torch.ones(6))


def test_a_network_without_norms_stays(images):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False))
    before = copy.deepcopy(net.state_dict())
    assert all(torch.equal(v, before[name]) for name, v in unfold(net, images).state_dict().items())


def test_hardening_begins_with_the_network_that_the_file_holds(loaded, images):
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in images.split(128)]
    hardly = lambda model: torch.optim.SGD(model.parameters(), 1e-9)  # noqa: E731
    hardened, _ = harden(loaded, batches, F.cross_entropy, bits=1e5, epochs=1, optimizer=hardly, progress=False)
    with torch.no_grad():
        assert difference(loaded(images), hardened(images)) < 1e-3
        assert torch.equal(loaded.bn1.running_var, torch.ones(6))  # the caller's own


def test_errors_say_what_is_wrong(loaded, images):
    with pytest.raises(MiracleError, match="holds no batch"):
        unfold(loaded, [])
    with pytest.raises(MiracleError, match="do not go through Normed"):
        unfold(loaded.train(), images[:, :1])
    assert loaded.training
