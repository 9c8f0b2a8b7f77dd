"""Passes that go on from where the last one got to give what passes from the start give, whatever changes in between."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miracle_ban import convert, measure, passes
from miracle_ban.exposed import exposed
from miracle_ban.layers import posteriors
from miracle_ban.passes import Passes


class Residual(nn.Module):
    """Sums in place, a shortcut of no parameters, a part that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))
        self.norm, self.out = nn.BatchNorm2d(3), nn.Linear(12, 4)

    def forward(self, x):
        y = self.a(x)
        y += x
        z = self.twice(self.twice(F.relu(y)))
        z = self.norm(self.b(z)).add_(y)
        return self.out(F.avg_pool2d(z, 4).flatten(1))


class WithTokens(nn.Module):
    """Parameters of its own, attention, named arguments with defaults."""

    def __init__(self):
        super().__init__()
        self.first, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 8))
        self.into = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 3)

    def forward(self, x, mask=None, scale=2.0):
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), self.into(x)], 1)
        x = self.layer(scale * (x + self.place), src_key_padding_mask=mask)
        return {"logits": self.out(x[:, 0]), "hidden": x}


class Choosing(nn.Module):
    """What it computes depends on what it sees: no graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if float(x.detach().sum()) > -1e9 else x


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 7)), nn.Tanh(), nn.Linear(7, 3)
    )


NETWORKS = {
    "sequential": (sequential, lambda n: torch.randn(n, 6)),
    "residual": (Residual, lambda n: torch.randn(n, 3, 8, 8)),
    "tokens": (WithTokens, lambda n: {"x": torch.randn(n, 5, 5)}),
    "recurrent": (lambda: nn.Sequential(nn.Linear(5, 6), nn.GRU(6, 4, batch_first=True)), lambda n: torch.randn(n, 7, 5)),
    "choosing": (Choosing, lambda n: torch.randn(n, 5)),
}


def made(name: str) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    make, batch = NETWORKS[name]
    batches = [batch(8), batch(8), batch(3)]
    return exposed(convert(make().eval(), per_unit=True), batches[0]), batches


def of_layers(net: nn.Module) -> list[str]:
    return [
        name
        for name, m in net.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)) and "maps" not in name
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_they_give_what_passes_from_the_start_give(name):
    net, batches = made(name)
    own, held, generator = Passes(net, batches), posteriors(net), torch.Generator().manual_seed(0)
    assert (own._graph is not None) == (name != "choosing")
    for step in range(60):
        module = of_layers(net)[
            step % len(of_layers(net)) if step < 30 else int(torch.randint(len(of_layers(net)), (), generator=generator))
        ]
        for output in (False, True):
            try:
                wanted = list(measure.called(net, module, batches, output=output))
            except IndexError:  # shown to nothing
                continue
            for _ in range(2):
                assert all(map(torch.equal, own.called(module, output=output), wanted))
        p = list(held.values())[int(torch.randint(len(held), (), generator=generator))]
        if step % 3 == 0:
            p.mean.mul_(1.1)
        elif step % 3 == 1:
            p.fix(torch.tensor([0]), torch.tensor([0.3]))


@torch.no_grad()
def test_what_comes_before_is_computed_once():
    net, batches = made("sequential")
    count = []
    net[0].register_forward_hook(lambda *_: count.append(1))
    own, p = Passes(net, batches), posteriors(net)
    count.clear()
    for name, tensor in (("0", "0.weight"), ("1", "1.bias"), ("2.1", "2.1.weight"), ("4", "4.weight")):
        for output in (False, True):
            list(own.called(name, output=output))
        p[tensor].mean.add_(0.1)
    assert len(count) == len(batches) * 2  # for what the first layer gives, and once it has changed
    list(own.called("4", output=True))
    assert len(count) == len(batches) * 2
    p["0.weight"].value.add_(1.0)
    list(own.called("4", output=True))
    assert len(count) == len(batches) * 3


def test_inference_mode():
    with torch.inference_mode():
        net, batches = made("sequential")
        own = Passes(net, batches)
        for step in range(3):
            assert all(map(torch.equal, list(own.called("4", output=True)), list(measure.called(net, "4", batches, output=True))))
            posteriors(net)["0.weight"].mean.mul_(1.0 + step)


@torch.no_grad()
def test_large_values_are_not_kept(monkeypatch):
    monkeypatch.setattr(passes, "_LARGEST", 8 * 8 * 4)
    net, batches = made("sequential")
    own = Passes(net, batches)
    list(own.called("4", output=False))
    assert not own._kept
    assert all(map(torch.equal, list(own.called("4", output=True)), list(measure.called(net, "4", batches, output=True))))
