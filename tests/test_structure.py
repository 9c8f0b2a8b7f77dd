from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miracle_ban import convert
from miracle_ban.convert import drop_units
from miracle_ban.layers import posteriors, use_mode
from miracle_ban.structure import Link, trace

LENET_LINKS = (Link("conv1", "conv2", 1), Link("conv2", "fc1", 4), Link("fc1", "fc2", 1))


class LeNet(nn.Module):
    """A small LeNet whose forward is given: 12x12 images."""

    def __init__(self, flatten):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3)
        self.conv2 = nn.Conv2d(3, 5, 2)
        self.fc1 = nn.Linear(20, 6)
        self.fc2 = nn.Linear(6, 4)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.pool(torch.relu(self.conv2(x)))
        x = self.flatten(x)
        return self.fc2(self.relu(self.fc1(x)).contiguous())


FLATTENS = {
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "torch.flatten by name": lambda x: torch.flatten(x, start_dim=1),
    "flatten": lambda x: x.flatten(1),
    "view of size": lambda x: x.view(x.size(0), -1),
    "view of shape": lambda x: x.view(x.shape[0], -1),
    "reshape of size()": lambda x: x.reshape(x.size()[0], -1),
    "reshape of a tuple": lambda x: x.reshape((x.shape[0], -1)),
    "torch.reshape": lambda x: torch.reshape(x, (x.shape[0], -1)),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_links_of_lenet_are_found_however_it_flattens(name):
    assert trace(LeNet(FLATTENS[name])).links == LENET_LINKS


def test_links_of_a_sequential_are_found():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(80, 6), nn.Dropout(), nn.Linear(6, 4)
    )
    assert trace(net).links == (Link("0", "3", 1), Link("3", "5", 16), Link("5", "7", 1))


def test_links_of_nested_modules_have_full_names():
    net = nn.Sequential(nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU()), nn.Sequential(nn.Conv1d(4, 3, 1)))
    assert trace(net).links == (Link("0.0", "1.0", 1),)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(-1, 20),  # may regroup the batch
        lambda x: x.view(20, -1).t(),
        lambda x: torch.flatten(x),
        lambda x: x.flatten(2).mean(2).repeat(1, 4),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),  # the units are no longer the slow axis
        lambda x: F.softmax(x, 1).flatten(1),
        lambda x: x.flatten(1) * 2,
    ],
)
def test_no_link_leads_through_what_may_mix_units(flatten):
    assert Link("conv2", "fc1", 4) not in trace(LeNet(flatten)).links


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + F.relu(self.second(x))
        return self.last(x)


def test_residual_sums_are_not_links():
    assert trace(Residual()).links == ()


class Shared(nn.Module):
    """Whatever `how` does with two linear layers of equal sizes."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.how = how

    def forward(self, x: Tensor):
        return self.how(self, x)


@pytest.mark.parametrize(
    "how",
    [
        lambda s, x: (s.b(s.a(x)), s.a(x)),
        lambda s, x: s.a(F.relu(s.a(x))),
        lambda s, x: s.b(s.b(s.a(x))),
        lambda s, x: (lambda h: s.b(h) + h)(s.a(x)),
        lambda s, x: s.b(x - s.a(x)),
        lambda s, x: s.b(F.layer_norm(s.a(x), (6,))),
    ],
)
def test_units_read_by_more_than_one_layer_are_not_linked(how):
    assert trace(Shared(how)).links == ()


def test_tied_layers_are_not_linked():
    net = Shared(lambda s, x: s.b(F.relu(s.a(x))))
    assert len(trace(net).links) == 1
    net.b.weight = net.a.weight
    assert trace(net).links == ()


def test_grouped_convolutions_are_not_linked():
    assert trace(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3))).links == ()
    assert trace(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4))).links == ()


def test_what_cannot_be_traced_yields_nothing():
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    assert trace(Branching(nn.Linear(3, 3), nn.Linear(3, 3))) == trace(nn.LSTM(3, 3))
    assert trace(Branching(nn.Linear(3, 3), nn.Linear(3, 3))).links == ()


class Remembering(nn.Module):
    """Keeps what it sees, as torchvision's MultiScaleRoIAlign keeps the scales of its first call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale, self.seen = None, []

    def forward(self, x: Tensor) -> Tensor:
        self.scale = x.mean() if self.scale is None else self.scale
        self.seen.append(x)
        self.latest = x
        return self.layer(x) * self.scale


def test_tracing_leaves_nothing_behind():
    net = nn.Sequential(Remembering(), nn.Linear(3, 2))
    seen = net[0].seen
    trace(net)
    assert net[0].scale is None
    assert net[0].seen is seen
    assert seen == []
    assert not hasattr(net[0], "latest")
    assert convert(net)(torch.ones(1, 3)).shape == (1, 2)


def test_foldable_norms_are_found():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    assert trace(net).norms == (("0", "1"), ("4", "5"))
    for norm in (nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3), nn.GroupNorm(3, 3)):
        assert trace(nn.Sequential(nn.Conv2d(1, 3, 3), norm)).norms == ()
    assert trace(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3))).norms == ()
    assert trace(nn.Sequential(nn.ConvTranspose2d(1, 3, 3), nn.BatchNorm2d(3))).norms == ()


# --- dropping ---


def with_units_silenced(net: nn.Module, link: Link, keep: list[int], x: Tensor) -> Tensor:
    """What the original network says when the other units of the link's producer are zero."""
    net = copy.deepcopy(net)
    producer = net.get_submodule(link.producer)

    def silence(module: nn.Module, _: object, out: Tensor) -> Tensor:
        axis = out.dim() - 1 if isinstance(module, nn.Linear) else 1
        alive = torch.zeros(out.shape[axis])
        alive[keep] = 1.0
        return out * alive.reshape([-1 if a == axis else 1 for a in range(out.dim())])

    producer.register_forward_hook(silence)
    return net(x)


LINKED = {
    "lenet": (lambda: LeNet(FLATTENS["torch.flatten"]), (4, 1, 12, 12)),
    "sequential": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(12, 5), nn.SiLU(), nn.Linear(5, 2)),
        (3, 2, 8),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Conv3d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(24, 2)),
        (2, 1, 4, 4, 4),
    ),
    "linear on the last of three axes": (lambda: nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5)), (2, 3, 10)),
    "linear on three axes, flattened": (lambda: nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)), (2, 3, 10)),
    "linear, then a convolution over the other axis": (lambda: nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Conv1d(8, 4, 1)), (2, 8, 10)),
    "linear, then pooling over its units": (lambda: nn.Sequential(nn.Linear(10, 8), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 4)), (2, 10)),
    "weights read elsewhere as well": (
        lambda: Shared(lambda s, x: F.linear(F.linear(F.relu(s.b(F.relu(s.a(x)))), s.b.weight.t()).relu(), s.a.weight.t())),
        (4, 6),
    ),
}


@pytest.mark.parametrize("name", LINKED)
def test_dropping_units_is_the_same_as_zeroing_them(name):
    make, shape = LINKED[name]
    net = make().eval()
    x = torch.randn(shape)
    for link in convert(net).conversion.links:
        bnn = convert(net).eval()
        units = posteriors(bnn)[f"{link.producer}.weight"].kept[0]
        keep = [units - 1, 0] if units > 2 else [units - 1]
        drop_units(bnn, link, torch.tensor(keep))
        with use_mode(bnn, "mean"):
            assert torch.allclose(bnn(x), with_units_silenced(net, link, keep, x), atol=1e-6)


def test_dropping_in_two_linked_layers_at_once():
    net = LeNet(FLATTENS["flatten"]).eval()
    bnn = convert(net).eval()
    assert bnn.conversion.links == LENET_LINKS
    drop_units(bnn, LENET_LINKS[1], torch.tensor([3, 1]))
    drop_units(bnn, LENET_LINKS[0], torch.tensor([2]))
    held = posteriors(bnn)
    assert held["conv2.weight"].kept == (2, 1, 2, 2)
    assert held["conv2.bias"].kept == (2,)
    assert held["fc1.weight"].kept == (6, 8)
    x = torch.randn(2, 1, 12, 12)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv1.weight[:2] = 0
        other.conv1.bias[:2] = 0
        for dead in (0, 2, 4):
            other.conv2.weight[dead] = 0
            other.conv2.bias[dead] = 0
    with use_mode(bnn, "mean"):
        assert torch.allclose(bnn(x), other(x), atol=1e-6)
