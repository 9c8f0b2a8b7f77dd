"""Networks as users give them: wrapped, with extra state, with what a hook computed."""

from __future__ import annotations

import threading

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miracle_ban import compress, convert, decode, harden, load, rescale, save
from miracle_ban.errors import MiracleWarning, MismatchError, UnsupportedModelError
from miracle_ban.network import copied, tensors, unwrapped

QUIET = {"progress": False}
WRAPPERS = [nn.DataParallel, lambda net: torch.compile(net, backend="eager"), lambda net: nn.DataParallel(torch.compile(net))]


class WithExtraState(nn.Module):
    """A network that keeps something that is no tensor."""

    def __init__(self, calls: int):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.calls = calls

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_is_wrapped_is_unwrapped(wrap):
    net = helpers.TinyNet()
    assert unwrapped(wrap(net)) is net is unwrapped(net)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_file_loads_into_a_network_in_its_wrapper(packaged, wrap, tmp_path):
    save(packaged, tmp_path / "net.mban")
    plain = load(tmp_path / "net.mban", helpers.TinyNet())
    inner = helpers.TinyNet()
    wrapped = wrap(inner)
    assert load(tmp_path / "net.mban", wrapped) is wrapped
    assert helpers.same_state(inner.state_dict(), plain.state_dict())
    assert helpers.same_state(decode(packaged, wrapped), plain.state_dict())
    with pytest.raises(MismatchError, match="Linear"):
        load(tmp_path / "net.mban", nn.DataParallel(nn.Linear(3, 2)))


@pytest.mark.parametrize("wrap", WRAPPERS[:2])
def test_every_way_takes_a_network_in_its_wrapper(packaged, trained_net, batches, wrap):
    """And does with it what it does with the network inside."""
    for net in (trained_net, wrap(trained_net)):
        files = [
            rescale(packaged, net, batches, epochs=1, **QUIET),
            compress(net, inputs=batches, budget=helpers.PACKAGED, coder="gprs", **QUIET),
        ]
        hardened, _ = harden(net, batches, F.cross_entropy, bits=300.0, epochs=1, **QUIET)
        found = [*(file.to_bytes() for file in files), helpers.digest(hardened.state_dict())]
        if net is trained_net:
            wanted = found
    assert found == wanted
    assert isinstance(hardened, helpers.TinyNet)


def test_extra_state_that_is_no_tensor_stays_with_each_network(tmp_path):
    torch.manual_seed(0)
    net = WithExtraState(1)
    assert list(tensors(net)) == ["layer.weight", "layer.bias"]
    with pytest.warns(MiracleWarning, match="_extra_state is no tensor and is not stored"):
        archive = compress(net, budget=200, **QUIET)
    save(archive, tmp_path / "net.mban")
    fresh = load(tmp_path / "net.mban", WithExtraState(2))
    assert (net.calls, fresh.calls) == (1, 2)
    assert (fresh.layer.weight - net.layer.weight).abs().max() < 0.02


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_copy_has_no_graph_and_computes_hooked_weights_itself():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    net[0].register_buffer("sum", net[0].weight_v.sum())
    x = torch.randn(5, 4)
    wanted = net(x)
    copy = copied(net)
    assert [w.is_leaf for w in (net[0].weight, net[0].sum, copy[0].weight, copy[0].sum)] == [False, False, True, True]
    assert copy(x).equal(wanted)
    with torch.no_grad():
        copy[0].weight_g.mul_(2.0)
        copy[1].bias.add_(1.0)
    assert net(x).equal(wanted)
    assert not copy(x).equal(wanted)


def test_what_cannot_be_copied_is_said():
    net = nn.Linear(3, 2)
    net.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match=r"cannot be copied.*locks"):
        copied(net)


class WithoutStatistics(nn.Module):
    """A BatchNorm that needs a batch in evaluation, too, beside one that does not."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.layer = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(self.first(self.norm(x)))


@pytest.mark.parametrize("make", [WithoutStatistics, lambda: nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 3))], ids=["norm", "no units"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_odd_networks_need_no_inputs(make):
    torch.manual_seed(0)
    net = make().eval()
    x = torch.randn(16, 8)
    archive = compress(net, budget=200, **QUIET)
    fresh = make().eval()
    fresh.load_state_dict(decode(archive, fresh))
    with torch.no_grad():
        assert (fresh(x) - net(x)).abs().max() < 0.05
    assert convert(fresh) is not fresh


@pytest.mark.filterwarnings("ignore:no random input fits")
def test_a_network_without_parameters_is_refused_by_compress_too():
    with pytest.raises(UnsupportedModelError, match="no floating-point parameter"):
        compress(nn.ReLU(), budget=200, **QUIET)
