"""Inner linear maps as modules: the same outputs, and the modules see what the maps multiply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import miracle_ban
from miracle_ban import reconstruct
from miracle_ban.exposed import exposed
from miracle_ban.layers import posteriors, use_mode
from miracle_ban.reconstruct import Reconstruction

RECURRENT = {
    "gru": (lambda: nn.GRU(3, 4, 2, batch_first=True), (5, 7, 3)),
    "lstm both ways": (lambda: nn.LSTM(3, 4, 2, bidirectional=True), (7, 5, 3)),
    "rnn of relu": (lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False), (7, 5, 3)),
    "rnn, one example": (lambda: nn.RNN(3, 4), (7, 3)),
    "projected lstm": (lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True), (7, 5, 3)),
    "projected lstm without biases": (lambda: nn.LSTM(3, 4, proj_size=2, bias=False), (7, 3)),
}


def converted(make) -> nn.Module:
    torch.manual_seed(0)
    return miracle_ban.convert(make().eval(), per_unit=True).eval()


def seen(view: nn.Module, inputs: tuple) -> dict[str, Tensor]:
    """What each module with a weight of its own was called on."""
    found: dict[str, Tensor] = {}
    for name, module in view.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
    with use_mode(view, "mean"), torch.no_grad():
        view(*inputs)
    return found


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_compute_the_same_and_show_every_map(name):
    make, shape = RECURRENT[name]
    model, x = converted(make), torch.randn(shape)
    view = exposed(model, x)
    with use_mode(model, "mean"), torch.no_grad():
        wanted, found = model(x), view(x)
    assert torch.equal(wanted[0], found[0])
    assert {n.removeprefix("maps.") for n in seen(view, (x,))} == {n for n in posteriors(model) if n.startswith("weight")}
    assert posteriors(view) == posteriors(model)  # the same objects


@pytest.mark.parametrize("start", [False, True])
def test_a_recurrent_layers_maps_see_its_inputs_and_its_states_one_step_before(start):
    model = converted(lambda: nn.RNN(3, 4, 2, batch_first=True, bidirectional=True))
    x = torch.randn(5, 7, 3)
    state = torch.randn(4, 5, 4) if start else None
    view = exposed(model, x)
    with use_mode(view, "mean"), torch.no_grad():
        outputs, _ = view(x, state)
        own = seen(view, (x, state))
        both = []
        for suffix in ("l1", "l1_reverse"):
            into, back = (view.maps[f"weight_{kind}_{suffix}"](own[f"maps.weight_{kind}_{suffix}"]) for kind in ("ih", "hh"))
            both.append(torch.tanh(into + back))
    again = torch.cat([both[0], both[1].flip(0)], -1).transpose(0, 1)
    assert torch.allclose(again, outputs, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_a_projected_lstms_maps_see_what_they_multiply(bias):
    model = converted(lambda: nn.LSTM(3, 4, 2, proj_size=2, bias=bias))
    x = torch.randn(7, 5, 3)
    view = exposed(model, x)
    with use_mode(view, "mean"), torch.no_grad():
        outputs, _ = view(x)
        own = seen(view, (x,))
        assert torch.allclose(view.maps["weight_hr_l1"](own["maps.weight_hr_l1"]), outputs, atol=1e-6)
        assert torch.equal(own["maps.weight_hh_l1"][1:], outputs[:-1])


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_to_keys_of_another_size_computes_the_same_and_shows_its_projections(batch_first):
    model = converted(lambda: Unpacking(nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=batch_first)))
    x, keys, values = (torch.randn(5, 5, size) for size in (8, 6, 4))
    keys, values = (v[:, :3] if batch_first else v[:3] for v in (keys, values))
    view = exposed(model, (x, keys, values))
    assert view is not model
    with use_mode(view, "mean"), torch.no_grad():
        for a, b in zip(model((x, keys, values)), view((x, keys, values)), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        own = seen(view, ((x, keys, values),))
    for name, multiplied in zip("qkv", (x, keys, values), strict=True):
        assert torch.equal(own[f"net.maps.{name}_proj_weight"], multiplied)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_computes_the_same_and_shows_its_projections(batch_first):
    model = converted(lambda: Unpacking(nn.MultiheadAttention(8, 2, batch_first=batch_first)))
    x, other = torch.randn(5, 5, 8), torch.randn(5, 5, 8)
    other = other[:, :4] if batch_first else other[:4]
    for inputs in ((x, x, x), (x, other, other)):
        view = exposed(model, inputs)
        with use_mode(view, "mean"), torch.no_grad():
            wanted, found = model(inputs), view(inputs)
            own = seen(view, (inputs,))
            projected = view.net.into(own["net.into"]).unflatten(1, (3, 8))
            maps = zip(inputs, model.net.in_proj_weight.chunk(3), model.net.in_proj_bias.chunk(3), strict=True)
            straight = [F.linear(y if batch_first else y.transpose(0, 1), w, b) for y, w, b in maps]
        for a, b in zip(wanted, found, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        assert set(own) == {"net.into", "net.out_of"}
        for k, y in enumerate(straight):
            assert torch.allclose(projected[:, k, :, : y.shape[1]].mT, y, atol=1e-6)


class Unpacking(nn.Module):
    """A network of several inputs, taken as one tuple."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.net(*inputs)


def test_attention_within_windows_computes_the_same_and_shows_its_projections():
    model = converted(lambda: torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [3, 3], num_classes=4))
    x = torch.randn(2, 3, 16, 16)
    view = exposed(model, x)
    with use_mode(model, "mean"), torch.no_grad():
        assert torch.allclose(model(x), view(x), atol=1e-5)
    assert {n for n in seen(view, (x,)) if ".attn." in n} == {f"features.{k}.0.attn.{own}" for k in (1, 3) for own in ("qkv", "out_of")}


def test_a_transformer_computes_the_same_without_its_fused_kernel():
    model = converted(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    x = torch.randn(3, 5, 8)
    with use_mode(model, "mean"), torch.no_grad():
        assert torch.allclose(model(x), exposed(model, x)(x), atol=1e-5)


def test_a_network_without_such_maps_is_given_back():
    model = converted(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert exposed(model, torch.randn(5, 3)) is model


def test_attention_that_is_not_coded_computes_the_same():
    model = miracle_ban.convert(Both(), where=lambda _, module: not isinstance(module, nn.MultiheadAttention))
    x = torch.randn(3, 5, 8)
    view = exposed(model, x)
    assert view is not model
    with use_mode(view, "mean"), torch.no_grad():
        assert torch.allclose(view(x), model(x), atol=1e-6)


class Both(nn.Module):
    """Attention to the inputs themselves and a recurrent layer with projected states."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.states = nn.MultiheadAttention(8, 2), nn.LSTM(8, 6, proj_size=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.states(self.attention(x, x, x)[0])[0]


class Straight(nn.Module):
    """Attention whose last projection is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.attention.out_proj.weight)


class Renamed(nn.GRU):
    """A recurrent layer that is called in its own way."""

    def forward(self, x: Tensor, times: int) -> Tensor:  # type: ignore[override]
        return super().forward(x.repeat(times, 1, 1))[0]


class Twice(nn.Module):
    """What calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.states = Renamed(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.states(x, times=2)


@pytest.mark.parametrize("net", [Straight(), Twice()])
def test_layers_that_are_used_in_other_ways_are_left_alone(net):
    model = miracle_ban.convert(net)
    assert exposed(model, torch.randn(3, 5, 8)) is model


@pytest.mark.parametrize(
    ("make", "size"),
    [(RECURRENT["gru"][0], 3), (RECURRENT["projected lstm"][0], 3), (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8)],
)
def test_every_matrix_is_solved_for(make, size):
    model = converted(lambda: First(make()))
    own = Reconstruction(model, [torch.randn(4, 6, size)])
    assert {n for n, p in posteriors(model).items() if p.mean.dim() > 1} <= set(own.owner)
    own.kl_bits = dict.fromkeys(posteriors(model), 50.0)
    assert all(
        own._left_of_shifts(module) < 1.0
        for name, module in own.owner.items()
        if "weight" in name and "norm" not in name and "_hr" not in name
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_states_are_measured_again_after_some_of_their_weights_are_coded(scaled):
    model = converted(lambda: First(nn.GRU(3, 4, batch_first=True)))
    own = Reconstruction(model, [torch.randn(64, 6, 3)])
    own.allocate(400.0)
    own.scaled = scaled  # then states are too small until their layer is coded
    for name in ("net.weight_ih_l0", "net.weight_hh_l0"):
        p = posteriors(model)[name]
        own.begin(name, 100.0)
        before = own._regressions[name].h
        p.fix(torch.arange(20), 2.0 * p.mean.detach().flatten()[:20])
        now, _ = own._damped_products(own.owner[name])
        assert torch.allclose(now, before) == ("ih" in name)
        own.update(name, 50.0)
        assert torch.equal(own._regressions[name].h, before if scaled else now)


class First(nn.Module):
    """The first of a network's outputs, if it has several."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y[0] if isinstance(y, tuple) else y


class Over(nn.Module):
    """Attention to the inputs themselves, or the states of two recurrent layers; then their mean over time."""

    def __init__(self, inner: nn.Module, size: int):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 4]` of `[n, time, size]`."""
        y, _ = self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return self.out(y.mean(1))


@pytest.mark.parametrize("name", ["recurrent", "attention"])
def test_trained_networks_err_less_when_their_inner_maps_are_solved_for(name, monkeypatch):
    torch.manual_seed(0)
    size = 16
    inner = nn.LSTM(size, size, batch_first=True) if name == "recurrent" else nn.MultiheadAttention(size, 2, batch_first=True)
    net = Over(inner, size)
    shapes, noise = torch.randn(4, 10, size), torch.randn(4, size)

    def drawn(number: int) -> tuple[Tensor, Tensor]:
        classes = torch.randint(4, (number,))
        return shapes[classes] + torch.randn(number, 10, 4) @ noise, classes

    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        x, classes = drawn(64)
        optimizer.zero_grad()
        F.cross_entropy(net(x), classes).backward()
        optimizer.step()
    net.eval()
    inputs, others = drawn(512)[0], drawn(512)[0]
    budget = round(1.5 * sum(p.numel() for p in net.parameters()) / 8)
    coder = miracle_ban.coders.get("trellis", memory=8)

    def error() -> float:
        """Of three codes: one is good or bad luck by a factor of three."""
        errors = []
        for seed in range(3):
            archive = miracle_ban.compress(net, inputs=inputs, budget=budget, coder=coder, seed=seed, progress=False)
            with torch.no_grad():
                wanted = net(others)
                found = torch.func.functional_call(net, miracle_ban.decode(archive), (others,))
                errors.append(float((found - wanted).square().mean() / wanted.var()))
        return sum(errors)

    solved = error()
    monkeypatch.setattr(reconstruct, "exposed", lambda model, _: model)
    assert solved < 0.6 * error()
