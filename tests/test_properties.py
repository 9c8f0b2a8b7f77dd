"""What must hold whatever goes in: every pair of ways there and back, from bits to whole networks.

Pieces of the format have theirs in their own files (`test_bits`, `test_randomness`, `test_blocks`, `test_trellis`, `test_coders`,
`test_container`); here are the pairs that join them. `pytest --hypothesis-profile=long` tries forty times as many.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
import warnings
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import miracle_ban
from miracle_ban import checkpoint, coders, compress, convert, decode, encode, kl, load, save
from miracle_ban.bits import BitReader, BitWriter, HuffmanTable, parse_bytes
from miracle_ban.cli import main
from miracle_ban.container import octaves, parse
from miracle_ban.convert import conversion, drop_units
from miracle_ban.errors import BudgetError, MiracleWarning, MismatchError, UnsupportedModelError
from miracle_ban.layers import posteriors, use_mode
from miracle_ban.objective import Steering
from miracle_ban.sources import load_checkpoint

QUIET = {"progress": False}
seeds = st.integers(0, (1 << 64) - 1)
bits_of_any_width = st.integers(1, 80).flatmap(lambda n: st.tuples(st.just("number"), st.integers(0, (1 << n) - 1), st.just(n)))
EXAMPLES = settings().max_examples / 100  # 1 of the profile "fixed"


def tries(number: int) -> settings:
    """So many examples, more under a longer profile."""
    return settings(max_examples=math.ceil(EXAMPLES * number))


# --- bits ---


@tries(100)
@given(
    st.lists(
        bits_of_any_width
        | st.tuples(st.just("golomb"), st.integers(0, (1 << 62) - 1), st.integers(0, 20))
        | st.tuples(st.just("bytes"), st.binary(max_size=9), st.just(0))
        | st.tuples(st.just("symbols"), st.lists(st.integers(1, 1 << 50), min_size=1, max_size=9), st.just(0)),
        max_size=12,
    )
)
def test_whatever_was_written_in_whatever_order_is_read_in_that_order(parts):
    out = BitWriter()
    for kind, value, how in parts:
        if kind == "number":
            out.write(value, how)
        elif kind == "golomb":
            out.write_golomb(value, how)
        elif kind == "bytes":
            out.align()
            out.write_bytes(value)
        else:  # the code of indices: octaves by a table that goes ahead of them, the rest raw
            index = np.array(value)
            octave = octaves(index)
            table = HuffmanTable.fit(octave)
            table.write(out)
            table.encode(out, octave)
            out.write_many(index - (np.int64(1) << octave), octave)
    source = BitReader(out.to_bytes())
    for kind, value, how in parts:
        if kind == "number":
            assert source.read(how) == value
        elif kind == "golomb":
            assert source.read_golomb(how) == value
        elif kind == "bytes":
            source.align()
            assert source.read_bytes(len(value), "x") == value
        else:
            octave = HuffmanTable.read(source).decode(source, len(value))
            assert (source.read_many(octave, "x") + (np.int64(1) << octave)).tolist() == value
    assert source.position == out.length


@tries(100)
@given(st.integers(1, 10**12), st.sampled_from(["", "B", "b", " bytes", " Bytes"]), st.sampled_from(["", " ", "\t"]))
def test_a_number_of_bytes_is_read_as_it_is_written(size, unit, space):
    assert parse_bytes(size) == parse_bytes(f"{space}{size}{unit}{space}") == parse_bytes(f"{size:_}{unit}") == size


@tries(100)
@given(
    st.integers(1, 10**6),
    st.sampled_from([("kB", 3), ("MB", 6), ("GB", 9)]),
    st.integers(0, 3),
    st.sampled_from([str.lower, str.upper, str]),
)
def test_a_decimal_of_a_unit_is_exact(value, unit, places, case):
    name, power = unit
    text = f"{value // 10**places}.{value % 10**places:0{places}d}" if places else str(value)
    assert parse_bytes(f"{text} {case(name)}") == value * 10 ** (power - places)


# --- networks of any kind ---


class Last(nn.Module):
    """The outputs of a recurrent layer without its state."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def norm_in_use(norm: nn.Module) -> nn.Module:
    """A norm as training leaves it: weights, biases and statistics of its own; some scales negative."""
    with torch.no_grad():
        for t in (norm.weight, norm.bias):
            t.copy_(torch.randn(t.shape))
        if getattr(norm, "running_var", None) is not None:
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape))
            norm.running_var.copy_(torch.rand(norm.running_var.shape) + 0.1)
            norm.num_batches_tracked.fill_(17)
    return norm


class Net(nn.Module):
    """A random stack of layers: `start` on images, vectors or tokens, then `steps`; the same for the same seed.

    Args:
        start: "image", "vector" or "tokens".
        steps: names of layers; those that do not fit the start are left out.
        seed: of the weights.
        tied: for tokens, the output layer has the embedding's weights.
        odd: buffers of all dtypes.
        held: which layers do not train.
        dtype: of all floating-point tensors, those of `odd` apart.
    """

    def __init__(self, start: str, steps: tuple[str, ...], seed: int, tied: bool, odd: bool, held: int, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.start = dtype, start
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(*self._layers(start, steps, tied))
            self.to(dtype)
        for i, layer in enumerate(self.layers):
            layer.requires_grad_(not held >> i & 1)
        if odd:
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
            self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=dtype), requires_grad=False)
            for i, t in enumerate(
                (
                    torch.tensor([[True, False]]), torch.tensor(-(1 << 60)), torch.arange(4, dtype=torch.int16), torch.tensor([1 + 2j]),
                    torch.zeros(2, 0, dtype=torch.uint8), torch.tensor([0.1], dtype=torch.bfloat16), torch.tensor(0.1).double(),
                )
            ):  # fmt: skip
                self.register_buffer(f"odd_{i}é", t)

    @staticmethod
    def _layers(start: str, steps: tuple[str, ...], tied: bool) -> list[nn.Module]:
        width = 4
        made: list[nn.Module] = {"image": [nn.Conv2d(2, width, 3)], "vector": [nn.Linear(5, width)], "tokens": [nn.Embedding(7, width)]}[
            start
        ]
        for step in steps:
            if step == "activation":
                made.append(nn.PReLU() if width % 2 else nn.Tanh())
            elif step == "dense" and start != "image":
                made.append(nn.Linear(width, width + 1, bias=width % 2 == 0))
                width += 1
            elif step == "dense":
                made.append(nn.Conv2d(width, 2 * width, 2, groups=2 if width % 2 == 0 else 1, bias=width % 3 == 0))
                width *= 2
            elif step == "norm":
                kinds = {"image": nn.BatchNorm2d, "vector": nn.BatchNorm1d, "tokens": nn.LayerNorm}
                made.append(norm_in_use(kinds[start](width)))
            elif step == "other norm" and start == "image":
                made.append(norm_in_use(nn.GroupNorm(1, width)))
            elif step == "transposed" and start == "image":
                made.append(nn.ConvTranspose2d(width, 3, 2))
                width = 3
            elif step == "recurrent" and start == "tokens":
                made.append(Last((nn.LSTM, nn.GRU, nn.RNN)[width % 3](width, width, batch_first=True)))
        if start == "image":
            made.append(nn.Flatten())
            return made
        if start == "tokens" and tied and width == 4:
            made.append(nn.Linear(4, 7))
            made[-1].weight = made[0].weight
        else:
            made.append(nn.Linear(width, 3))
        return made

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.start == "tokens":
            return torch.randint(0, 7, (3, 5), generator=generator)
        return torch.randn((3, 2, 7, 7) if self.start == "image" else (3, 5), generator=generator).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


STEPS = ("activation", "dense", "norm", "other norm", "transposed", "recurrent")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
plans = st.tuples(
    st.sampled_from(["image", "vector", "tokens"]), st.lists(st.sampled_from(STEPS), max_size=4).map(tuple), st.integers(0, 99),
    st.booleans(), st.booleans(), st.integers(0, 63), st.sampled_from(DTYPES),
)  # fmt: skip
exact_plans = plans.map(lambda plan: (*plan[:-1], torch.float64))
options = st.fixed_dictionaries({"per_unit": st.booleans(), "fold": st.booleans(), "local": st.booleans()})


def blurred(bnn: nn.Module, relative_std: float = 1.0) -> nn.Module:
    """Posteriors of less than a bit a weight: quick to code."""
    with torch.no_grad():
        for p in posteriors(bnn).values():
            if p.mean.numel():
                p.log_std.fill_(math.log(relative_std * float(p.mean.square().mean().sqrt()) + 1e-3))
    return bnn


@tries(60)
@given(exact_plans, options)
def test_a_converted_network_computes_what_the_network_does(plan, how):
    """BatchNorms folded or not, in 64 bits; and the network is left alone."""
    net = Net(*plan).eval()
    before = helpers.weight_state(net)
    bnn = convert(net, **how).eval()
    with torch.no_grad(), use_mode(bnn, "mean"):
        assert torch.allclose(bnn(net.inputs()), net(net.inputs()), rtol=1e-9, atol=1e-9)
    assert helpers.same_state(net.state_dict(), before)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in Net(*plan).parameters()]
    with torch.no_grad():
        drawn = bnn.train()(net.inputs())
    assert bool(torch.isfinite(drawn).all())
    assert not torch.equal(drawn, net(net.inputs()))


@tries(30)
@given(plans, options)
def test_converting_twice_is_converting_once(plan, how):
    net = Net(*plan)
    bnn, again = convert(net, **how), convert(net, **how)
    assert helpers.same_state(bnn.state_dict(), again.state_dict())
    assert str(conversion(bnn)) == str(conversion(again))
    with pytest.raises(UnsupportedModelError, match="already converted"):
        convert(bnn)
    names = {e.name: e.kind for e in conversion(bnn).entries}
    assert list(names) == list(net.state_dict())
    assert {n for n, kind in names.items() if kind == "coded"} == set(posteriors(bnn))


@tries(60)
@given(plans, options, st.integers(0, 1 << 30), st.floats(-6, 3), st.booleans())
def test_no_divergence_is_negative(plan, how, seed, spread, given_prior):
    """However posteriors and priors lie; 1e-5 nats a weight is what float32 may lose."""
    bnn = convert(Net(*plan), **how)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in posteriors(bnn).values():
            p.log_std.copy_(spread * torch.rand(p.log_std.shape, generator=generator))
            if given_prior:
                p.freeze_prior(torch.tensor(spread).exp())
            by_hand = p.kl_per_weight().double().sum()
            assert float(p.kl()) == pytest.approx(float(by_hand), rel=1e-4, abs=1e-4)
    total, weights = float(kl(bnn).detach()), sum(p.mean.numel() for p in posteriors(bnn).values())
    assert math.isfinite(total)
    assert total >= -1e-5 * weights
    assert kl(bnn).shape == ()


CODERS = sorted(coders.IDS.keys() - {"branch-and-bound-gprs", "branch-and-bound-a-star", "rejection"})
QUICK = {"gprs": coders.get("gprs"), "trellis": coders.get("trellis", memory=8)}


@tries(40)
@given(plans, options, seeds, st.sampled_from(CODERS), st.booleans())
def test_any_network_comes_back_from_its_file_as_the_encoder_left_it(plan, how, seed, coder, names):
    """convert, encode, save, open, load: the decoder's weights are those that the encoder holds, bit for bit."""
    net = Net(*plan)
    if coder == "minimal-random":
        coder = coders.get(coder, choice="best")
    bnn = blurred(convert(net, **how))
    archive = encode(bnn, coder=QUICK.get(coder, coder), seed=seed, names=names, block_bits=7.0, **QUIET)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.mban"
        assert save(archive, path) == path.stat().st_size == archive.info["file_bytes"]
        fresh = load(path, Net(*plan[:2], plan[2] + 1, *plan[3:]))  # other weights than these
        opened = miracle_ban.open(path)
        if names:
            assert helpers.same_state(load(path), fresh.state_dict())
        data = path.read_bytes()
    assert opened.to_bytes() == data == archive.to_bytes()
    state, was = fresh.state_dict(), net.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {n: (t.dtype, t.shape) for n, t in was.items()}
    with use_mode(bnn, "mean"):
        for name, p in posteriors(bnn).items():
            assert bool(p.fixed.all())
            assert torch.equal(state[name], p.current().to(state[name].dtype)), name
    kinds = {e.name: e.kind for e in conversion(bnn).entries}
    for name, t in was.items():
        if kinds[name] == "raw" and not name.endswith(("running_mean", "running_var")):
            assert helpers.tensor_bytes(state[name]) == helpers.tensor_bytes(t), name
    some = list(state)[:: max(1, len(state) // 3)]
    whole = decode(opened, fresh)
    assert all(torch.equal(opened[name], whole[name]) for name in reversed(some))
    with pytest.raises(MismatchError):
        decode(opened, nn.Linear(3, 4))


@tries(10)
@given(exact_plans, st.sampled_from(sorted(QUICK)), seeds)
def test_a_decoded_network_can_be_compressed_again(plan, coder, seed):
    """What comes out of a file is a network like any other: converting it keeps it to the last bit but those of folding."""
    archive = encode(blurred(convert(Net(*plan))), coder=QUICK[coder], seed=seed, **QUIET)
    net = Net(*plan).eval()
    net.load_state_dict(decode(archive, net))
    bnn = convert(net).eval()
    with torch.no_grad(), use_mode(bnn, "mean"):
        assert torch.allclose(bnn(net.inputs()), net(net.inputs()), rtol=1e-9, atol=1e-9)
    again = encode(blurred(bnn), coder=QUICK[coder], seed=seed, **QUIET)
    assert [(r.kind, r.shape, r.dtype) for r in again.records] == [(r.kind, r.shape, r.dtype) for r in archive.records]


# --- budgets ---


@tries(5)
@given(plans, st.integers(60, 400), st.sampled_from(sorted(QUICK)), seeds, st.booleans())
def test_a_file_is_no_larger_than_its_budget_or_says_so(plan, budget, coder, seed, with_inputs):
    net = Net(*plan)
    how = {"inputs": [net.inputs()]} if with_inputs else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MiracleWarning)
        try:
            archive = compress(net, budget=budget, coder=QUICK[coder], seed=seed, **how, **QUIET)
        except BudgetError:
            assert budget < 330  # the header, prior scales and raw tensors of the largest of these
            return
    over = [w for w in said if "over the budget" in str(w.message)]
    size = len(archive.to_bytes())
    assert size == archive.info["file_bytes"]
    assert bool(over) == (size > budget)
    assert not (over and coder == "trellis")
    assert helpers.same_state(decode(parse(archive.to_bytes()), net), decode(archive, net))


@tries(100)
@given(
    st.floats(1e-6, 1e4), st.floats(0.001, 0.5), st.floats(0, 8), st.lists(st.tuples(st.floats(0, 1e12), st.floats(0, 1e12)), max_size=20)
)
def test_beta_stays_within_its_bounds_and_its_gain(beta, gain, response, course):
    steering = Steering(beta, gain=gain, response=response)
    for value, target in course:
        before = steering.beta
        used = steering.update(value, target)
        assert 1e-6 <= steering.beta <= 1e4
        assert abs(math.log(steering.beta / before)) <= gain + 1e-9
        assert steering.beta / 8.001 <= used <= steering.beta * 8.001
        assert (steering.beta >= before) or value < target
        assert (steering.beta <= before) or value > target


# --- checkpoints ---

tensors = st.tuples(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.uint8, torch.complex64]),
    st.integers(0, 99),
)
contents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9) | tensors.map(lambda t: tensor_of(*t)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def tensor_of(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return (drawn > 0) if dtype == torch.bool else drawn.abs().to(dtype)


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and helpers.tensor_bytes(a) == helpers.tensor_bytes(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@tries(30)
@given(contents)
def test_a_checkpoint_is_read_as_it_was_written(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        assert checkpoint.read(path, stage="fit", expected={}) is None
        whole = {"stage": "fit", "settings": {"a": 1}, "content": content}
        checkpoint.write(path, whole)
        assert equal(checkpoint.read(path, stage="fit", expected={"a": 1}), whole)
        assert os.listdir(folder) == ["state"]


@tries(15)
@given(plans, options, st.integers(0, 1 << 30))
def test_posteriors_go_into_a_checkpoint_and_into_another_copy_whole(plan, how, seed):
    """Also those that lost units and those that are fixed in part."""
    net = Net(*plan)
    bnn, other = convert(net, **how), convert(Net(*plan[:2], plan[2] + 1, *plan[3:]), **how)
    generator = torch.Generator().manual_seed(seed)
    for link in conversion(bnn).links:
        units = posteriors(bnn)[f"{link.producer}.weight"].kept[0]
        drop_units(bnn, link, torch.randperm(units, generator=generator)[: max(1, units // 2)])
    for p in posteriors(bnn).values():
        some = torch.randperm(p.mean.numel(), generator=generator)[: p.mean.numel() // 3]
        p.fix(some, torch.randn(len(some), generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(Path(folder) / "state", {"settings": {}, "stage": "fit", "own": checkpoint.model_state(bnn)})
        saved = checkpoint.read(Path(folder) / "state", stage="fit", expected={})
    checkpoint.restore_model(other, saved["own"])
    assert equal(checkpoint.model_state(other)["posteriors"], checkpoint.model_state(bnn)["posteriors"])
    assert torch.equal(kl(other), kl(bnn))


# --- state dicts and safetensors ---

names = st.lists(st.text("abcé.漢_0", min_size=1, max_size=6).filter(lambda n: all(n.split("."))), min_size=1, max_size=5, unique=True)


@st.composite
def state_dicts(draw) -> dict[str, Tensor]:
    """Tensors of any dtype that safetensors has, at least one of floats; no name is a part of another's path."""
    found: dict[str, Tensor] = {}
    for name in draw(names):
        if not any(f"{n}.".startswith(f"{name}.") or f"{name}.".startswith(f"{n}.") for n in found):
            found[name] = tensor_of(*draw(tensors))
    found["weight"] = tensor_of([3, 4], draw(st.sampled_from(DTYPES)), 1)
    return found


@tries(6)
@given(state_dicts(), seeds)
def test_safetensors_go_in_and_come_out(state, seed):
    """A state dict from a file, through `compress`, to a file by the command line: names, dtypes and shapes stay, integers exact."""
    with tempfile.TemporaryDirectory() as folder:
        before, packed, after = (Path(folder) / name for name in ("net.safetensors", "net.mban", "out.safetensors"))
        save_file(state, before)
        given_back = load_checkpoint(before)
        assert equal(dict(sorted(given_back.items())), dict(sorted(state.items())))
        archive = compress(given_back, budget=1000, seed=seed, coder=QUICK["trellis"], **QUIET)
        assert save(archive, packed) <= 1000
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["decode", str(packed), "-o", str(after)]) == 0
        out = load_file(after)
        assert equal(dict(sorted(out.items())), dict(sorted(load(packed).items())))
    assert {n: (t.dtype, t.shape) for n, t in out.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    for name, t in state.items():
        if not t.is_floating_point():
            assert equal(out[name], t), name


@tries(30)
@given(st.text(min_size=1, max_size=8).filter(lambda n: "." not in n and not hasattr(nn.Module, n)))
def test_any_name_is_stored_or_refused_before_any_work(name):
    net = nn.Module()
    net.register_parameter(name, nn.Parameter(torch.ones(2)))
    try:
        archive = encode(blurred(convert(net)), names=True, **QUIET)
    except MismatchError:
        assert any(c in "\n\r" or 0xD800 <= ord(c) < 0xE000 for c in name), name
        return
    assert list(decode(parse(archive.to_bytes()))) == [name]
