"""Layers that a network can do without."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miracle_ban import MiracleError, compress, decode
from miracle_ban.coders import Trellis
from miracle_ban.harden import harden
from miracle_ban.spare import drop_layers


class Residual(nn.Module):
    """Three blocks on a trunk; the second one adds next to nothing."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.into = nn.Linear(6, width)
        self.outer = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(3))
        self.inner = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(F.relu(inner(x)))
        return self.head(x)


@pytest.fixture
def residual() -> Residual:
    torch.manual_seed(3)
    net = Residual()
    net.outer[1].weight.data.mul_(1e-3)
    return net


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 6, generator=generator) for _ in range(3)]


def weights(net: nn.Module) -> int:
    return sum(int((p != 0).sum()) for p in net.parameters() if p.dim() > 1)


def test_the_block_that_matters_least_goes_with_what_only_it_reads(residual):
    before = copy.deepcopy(residual.state_dict())
    lighter, dropped = drop_layers(residual.train(), inputs(), most=weights(residual) - 129, progress=False)
    assert set(dropped) == {"outer.1", "inner.1"}
    assert weights(lighter) == weights(residual) - 2 * 8 * 16
    assert lighter.training
    assert lighter.inner[0].training
    assert all(torch.equal(v, before[k]) for k, v in residual.state_dict().items())
    changed = {k for k, v in lighter.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"outer.1.weight", "inner.1.weight"}
    assert all(p.requires_grad for p in lighter.parameters())


def test_what_nobody_reads_any_more_goes_along(residual):
    residual.inner[1].bias.data.zero_()  # either is as good as the other then, and outer is the first in the network
    _lighter, dropped = drop_layers(residual, inputs(), most=weights(residual) - 1, progress=False)
    assert dropped == ["outer.1", "inner.1"]


def test_no_layer_is_dropped_that_all_lean_on(residual):
    lighter, dropped = drop_layers(residual, inputs(), most=0, progress=False)
    assert {"into", "head"}.isdisjoint(dropped)
    with torch.no_grad():
        x = torch.cat(inputs())
        wanted = residual(x)
        assert (lighter(x) - wanted).square().mean() <= 0.5 * (wanted - wanted.mean(0)).square().mean()
    chain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert drop_layers(chain, inputs(), most=0, progress=False)[1] == []


def test_inputs_that_do_not_fit_are_named(residual):
    with pytest.raises(MiracleError, match=r"shape \(4, 7\)"):
        drop_layers(residual, [torch.randn(4, 7)], most=0, progress=False)


def test_enough_is_enough(residual):
    assert drop_layers(residual, inputs(), most=weights(residual), progress=False)[1] == []


def test_tied_weights_stay(residual):
    residual.outer[1].weight = residual.outer[2].weight
    residual.outer[2].weight.data.mul_(1e-3)
    assert {"outer.1", "outer.2"}.isdisjoint(drop_layers(residual, inputs(), most=0, progress=False)[1])


def test_outputs_that_cannot_be_compared_leave_all_layers(residual):
    class Named(Residual):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": super().forward(x)}

    assert drop_layers(Named(), inputs(), most=0, progress=False)[1] == []
    assert drop_layers(residual, [], most=0, progress=False)[1] == []


def test_hardening_leaves_dropped_units_at_zero(residual):
    lighter, _ = drop_layers(residual, inputs(), most=weights(residual) - 129, progress=False)
    lighter.inner[0].weight.data[3] = 0.0
    data = [(x, torch.arange(32) % 3) for x in inputs()]
    hardened, _ = harden(lighter, data, F.cross_entropy, noise=0.1, epochs=3, progress=False)
    for name in ("inner.1", "outer.1"):
        assert not hardened.get_submodule(name).weight.any()
    alive = hardened.inner[0].weight.any(1)
    assert alive.sum() == 15
    assert not alive[3]
    assert not torch.equal(hardened.inner[0].weight[0], lighter.inner[0].weight[0])


def test_compress_drops_layers_where_hardening_would_leave_few_bits_to_each_weight():
    torch.manual_seed(3)
    net = Residual(32)
    net.outer[1].weight.data.mul_(1e-3)
    net.inner[1].bias.data.zero_()
    data = [(x, torch.arange(32) % 3) for x in inputs()]
    for budget, number in ((1700, 2), (1900, 0)):
        options = {"budget": budget, "epochs": 2, "hardened": True, "package_first": True, "coder": Trellis(memory=8)}
        archive = compress(net, data, F.cross_entropy, progress=False, **options)
        dropped = archive.info["harden"]["dropped"]
        assert dropped == ["outer.1", "inner.1"][:number]
        assert len(archive.to_bytes()) <= budget
        state = decode(archive, Residual(32))
        assert {n for n, w in state.items() if w.dim() > 1 and not w.any()} >= {f"{n}.weight" for n in dropped}


def test_compress_drops_only_what_is_to_be_coded(residual):
    data = [(x, torch.arange(32) % 3) for x in inputs()]
    archive = compress(residual, data, F.cross_entropy, budget=2500, epochs=1, hardened=True, package_first=True,
                       where=lambda name, _: "1" not in name, coder=Trellis(memory=8), progress=False)  # fmt: skip
    assert archive.info["harden"]["dropped"] == []
