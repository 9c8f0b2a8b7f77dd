from __future__ import annotations

import copy
import itertools
import math
import warnings

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
from miracle_ban import coders, compress, convert, decode, encode, fit
from miracle_ban.container import parse
from miracle_ban.errors import BudgetError, CodingError, MiracleError, MiracleWarning, MismatchError
from miracle_ban.layers import posteriors, use_mode

QUIET = {"progress": False}
REFINED = {"rounds": 6, "refine_steps": 10, **QUIET}


def mean_state(bnn: nn.Module) -> dict[str, Tensor]:
    """What the encoder holds: the mean weights of every posterior, full shape."""
    with use_mode(bnn, "mean"):
        return {n: p.current().detach().clone() for n, p in posteriors(bnn).items()}


def blurred(bnn: nn.Module, relative_std: float = 1.0) -> nn.Module:
    """Posteriors of less than a bit a weight: quick to code."""
    with torch.no_grad():
        for p in posteriors(bnn).values():
            p.log_std.fill_(math.log(relative_std * float(p.mean.square().mean().sqrt()) + 1e-3))
    return bnn


def decoded(archive, model: nn.Module) -> dict[str, Tensor]:
    """Through the bytes, as a reader gets it."""
    return decode(parse(archive.to_bytes()), model)


@pytest.fixture(scope="module", params=["gprs", "trellis"])
def packaged(request, fitted, batches):
    """The fitted network after packaging with refinement, and its archive."""
    bnn = copy.deepcopy(fitted[0])
    return bnn, encode(bnn, batches, F.cross_entropy, coder=request.param, **REFINED)


def test_the_decoder_gets_exactly_the_encoders_weights(packaged):
    bnn, archive = packaged
    assert helpers.same_state(decoded(archive, helpers.TinyNet()), mean_state(bnn))
    net = helpers.TinyNet()
    net.load_state_dict(decoded(archive, net))
    images, _ = helpers.blobs(100, seed=9)
    with use_mode(bnn.eval(), "mean"), torch.no_grad():
        assert torch.allclose(bnn(images), net(images), atol=1e-5)
    assert all(bool(p.fixed.all()) for p in posteriors(bnn).values())


def test_the_file_keeps_to_its_budget_and_the_network_its_error(packaged, trained_net):
    _, archive = packaged
    assert archive.size_bytes <= helpers.BUDGET
    net = helpers.TinyNet()
    net.load_state_dict(decoded(archive, net))
    assert helpers.error_rate(net) < helpers.error_rate(trained_net) + 0.05


def test_the_account_is_that_of_the_file(packaged):
    _, archive = packaged
    info = archive.info
    data = archive.to_bytes()
    coded = [r for r in archive.records if r.kind == "coded"]
    assert info["file_bytes"] == len(data) == archive.size_bytes
    assert info["blocks"] == sum(len(r.index) if r.rate is None else r.rate.steps for r in coded)
    assert info["index_bits"] == sum(r.bits for r in coded)
    assert info["index_bits"] + info["side_bits"] == 8 * len(data)
    assert info["codeword_bits_per_block"] == pytest.approx(info["index_bits"] / info["blocks"])
    assert info["j_bits_per_block"] == pytest.approx(info["codeword_bits_per_block"] - info["log2_ratio_per_block"])
    assert 1.0 < info["j_bits_per_block"] < 6.0 or archive.coder == "trellis"
    assert 0 < 1.0 - info["log2_ratio_per_block"] / info["codeword_bits_per_block"] < (0.2 if archive.coder == "trellis" else 0.5)
    assert info["seconds"] > 0
    counted = [row["coded"] for row in info["rounds"]]
    assert counted == sorted(counted)


def test_every_block_has_about_the_kl_that_was_asked_for(bnn):
    archive = encode(bnn, block_bits=10.0, **QUIET)
    assert archive.info["kl_bits_per_block"] == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("coder", sorted(set(coders.IDS) - {"rejection", "branch-and-bound-gprs", "branch-and-bound-a-star"}))
def test_every_coder_gives_a_file_that_decodes_to_its_weights(bnn, coder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MiracleWarning)  # the fit was for another coder
        archive = encode(bnn, coder=coder, block_bits=9.0, **QUIET)
    assert parse(archive.to_bytes()).coder == coder
    assert helpers.same_state(decoded(archive, helpers.TinyNet()), mean_state(bnn))
    net = helpers.TinyNet()
    net.load_state_dict(decoded(archive, net))
    assert helpers.error_rate(net) < 0.2


def test_rejection_sampling_works_on_blocks_of_little_divergence():
    bnn = blurred(convert(nn.Linear(12, 4)))
    archive = encode(bnn, coder="rejection", block_bits=2.0, **QUIET)
    assert helpers.same_state(decoded(archive, nn.Linear(12, 4)), mean_state(bnn))


@pytest.mark.parametrize("coder", ["branch-and-bound-gprs", "branch-and-bound-a-star"])
def test_weights_that_carry_many_bits_are_coded_one_by_one(coder):
    bnn = blurred(convert(nn.Linear(12, 4)), 0.05)
    archive = encode(bnn, coder=coder, **QUIET)
    assert [len(r.index) for r in parse(archive.to_bytes()).records] == [48, 4]
    state = decoded(archive, nn.Linear(12, 4))
    assert helpers.same_state(state, mean_state(bnn))


@pytest.mark.parametrize("budget", [150, 180, 205])
def test_the_trellis_meets_its_budget_to_the_byte(bnn, budget):
    archive = encode(bnn, coder="trellis", budget=budget, **QUIET)
    assert budget - 1 <= archive.size_bytes <= budget
    assert helpers.same_state(decoded(archive, helpers.TinyNet()), mean_state(bnn))


def test_the_trellis_takes_no_more_of_a_budget_than_pays(bnn):
    free = encode(copy.deepcopy(bnn), coder="trellis", budget="1 MB", names=False, **QUIET)
    assert free.size_bytes < 400


def test_minimal_random_coding_with_refinement(bnn, batches):
    coder = coders.get("minimal-random", choice="best")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MiracleWarning)
        archive = encode(bnn, batches, F.cross_entropy, coder=coder, block_bits=9.0, **REFINED)
    assert parse(archive.to_bytes()).index_bits == archive.index_bits
    assert helpers.same_state(decoded(archive, helpers.TinyNet()), mean_state(bnn))
    net = helpers.TinyNet()
    net.load_state_dict(decoded(archive, net))
    assert helpers.error_rate(net) < 0.1


def test_the_same_seed_gives_the_same_file_and_leaves_torchs_generator_alone(fitted, batches):
    files = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        files.append(encode(copy.deepcopy(fitted[0]), batches, F.cross_entropy, seed=seed, rounds=3, refine_steps=4, **QUIET).to_bytes())
        assert torch.equal(torch.get_rng_state(), before)
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("seed", [1, (1 << 64) - 1])
def test_every_64_bit_seed_works(bnn, seed):
    archive = encode(bnn, seed=seed, **QUIET)
    assert parse(archive.to_bytes()).seed == seed
    assert helpers.same_state(decoded(archive, helpers.TinyNet()), mean_state(bnn))


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_other_seeds_are_refused(bnn, seed):
    with pytest.raises(MiracleError, match="seed"):
        encode(bnn, seed=seed, **QUIET)


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan"), float("inf")])
def test_rates_that_make_no_sense_are_refused(bnn, rate):
    with pytest.raises(MiracleError, match="learning_rate must be positive"):
        encode(bnn, learning_rate=rate, **QUIET)


def test_names_are_optional(bnn, fitted):
    bare = encode(bnn, names=False, budget="1 MB", **QUIET)
    named = encode(copy.deepcopy(fitted[0]), names=True, budget="1 MB", **QUIET)
    assert parse(bare.to_bytes()).names is False
    again = parse(named.to_bytes())
    assert again.keys() == list(helpers.TinyNet().state_dict())
    assert [r.shape for r in again.records] == [tuple(t.shape) for t in helpers.TinyNet().state_dict().values()]
    assert helpers.same_state(decode(again), decoded(bare, helpers.TinyNet()))
    assert encode(copy.deepcopy(fitted[0]), **QUIET).names is False  # small files leave them out


def test_encoding_a_second_time_is_refused_or_gives_the_same_file():
    bnn = blurred(convert(nn.Linear(4, 4)), 0.6)
    first = encode(bnn, block_bits=4.0, **QUIET)
    assert len(first.records[0].index) > 1
    try:
        again = encode(bnn, block_bits=4.0, **QUIET)
    except MiracleError:
        return
    assert again.to_bytes() == first.to_bytes()
    assert helpers.same_state(decoded(again, nn.Linear(4, 4)), mean_state(bnn))


def test_a_network_that_was_not_fitted_can_be_coded_as_it_is():
    bnn = convert(nn.Linear(5, 3))
    archive = encode(bnn, **QUIET)
    assert helpers.same_state(decoded(archive, nn.Linear(5, 3)), mean_state(bnn))


# --- networks of all kinds, through a file, into a fresh instance ---


class Mixed(nn.Module):
    """A BatchNorm that folds, one that does not, tied weights, a scalar, an empty parameter, an integer buffer, a list."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.embed = nn.Embedding(5, 6)
        self.fc = nn.Linear(98, 6)
        self.out = nn.Linear(6, 5)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.arange(4, dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.alone(torch.relu(self.norm(self.conv(x)))))
        x = torch.tanh(self.fc(self.up(x).flatten(1))) * self.scale
        return self.out(x + self.embed(self.table[:1].long()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x[:, 0])
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0])
        return self.head(h.mean(1))


@pytest.mark.parametrize(
    ("make", "options"),
    [(Mixed, {}), (Mixed, {"per_unit": True}), (Mixed, {"fold": False}), (Recurrent, {}), (Recurrent, {"per_unit": True}),
     (helpers.TinyNet, {"per_unit": True}), (Mixed, {"where": lambda name, module: isinstance(module, (nn.Linear, nn.Embedding))}),
     (Mixed, {"where": lambda name, module: name == "out"}), (lambda: Mixed().half(), {}), (lambda: Mixed().double(), {})],
    ids=["mixed", "mixed per unit", "mixed unfolded", "recurrent", "recurrent per unit", "tiny per unit", "where", "where one of two tied",
         "half", "double"],
)  # fmt: skip
def test_networks_of_all_kinds_come_back_in_a_fresh_instance(make, options, batches, tmp_path):
    torch.manual_seed(1)
    net = make()
    dtype = next(net.parameters()).dtype
    feed = [(x.double() if dtype == torch.float64 else x, y) for x, y in batches]
    bnn = blurred(convert(net, **options))
    fit(bnn, feed[:4], F.cross_entropy, epochs=1, **QUIET)
    archive = encode(bnn, names=bool(options), **QUIET)
    miracle_ban.save(archive, tmp_path / "net.mban")
    torch.manual_seed(2)
    fresh = miracle_ban.load(tmp_path / "net.mban", make())
    state = fresh.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {n: (t.dtype, t.shape) for n, t in net.state_dict().items()}
    for name, weight in mean_state(bnn).items():
        assert torch.equal(state[name], weight.to(state[name].dtype))
    fresh.eval()
    bnn.eval()
    if dtype == torch.float16:
        return
    with torch.no_grad(), use_mode(bnn, "mean"):
        assert torch.allclose(fresh(feed[0][0]), bnn(feed[0][0]).to(dtype), rtol=1e-2, atol=1e-2)  # raw statistics have 16 bits


def test_integer_buffers_and_large_values_come_back_exactly(tmp_path):
    net = nn.Linear(3, 2)
    net.register_buffer("big", torch.tensor([1 << 60, -(1 << 60)]))
    net.register_buffer("mask", torch.tensor([[True, False]]))
    net.register_buffer("fine", torch.tensor([1.0, 1.0001, 70000.5]))
    net.register_buffer("tiny", torch.tensor([1e-30, 1.0]))
    net.register_buffer("complex", torch.tensor([1 + 2j]))
    net.register_buffer("none", torch.zeros(0, 3))
    net.register_buffer("bytes", torch.arange(256).to(torch.uint8))
    net.register_buffer("brain", torch.tensor([1.5, -3.0], dtype=torch.bfloat16))
    state = decoded(encode(convert(net), **QUIET), copy.deepcopy(net))
    for name in ("big", "mask", "fine", "tiny", "complex", "none", "bytes", "brain"):
        assert torch.equal(state[name], net.state_dict()[name]), name


def test_units_dropped_by_their_prior_scale_cost_nothing(batches):
    bnn = convert(helpers.TinyNet(), per_unit=True)
    with torch.no_grad():
        p = posteriors(bnn)["fc1.weight"]
        p.mean[4:] = 0.0
        p.log_std[4:] = 0.0  # these units are their prior
        p.log_std[:4] -= 3.0
    archive = encode(bnn, **QUIET)
    record = parse(archive.to_bytes()).records[2]
    assert (record.prior_codes[4:] == 0).all()
    assert (record.prior_codes[:4] > 0).all()
    state = decoded(archive, helpers.TinyNet())
    assert bool((state["fc1.weight"][4:] == 0).all())
    assert bool((state["fc1.weight"][:4] != 0).all())
    assert helpers.same_state(state, mean_state(bnn))


# --- interruption ---


class WorkError(Exception):
    pass


def failing_after(calls: int):
    count = itertools.count()

    def loss(out, y):
        if next(count) >= calls:
            raise WorkError
        return F.cross_entropy(out, y)

    return loss


@pytest.mark.parametrize("calls", [0, 17, 41])
@pytest.mark.parametrize("same_object", [False, True])
def test_an_interrupted_packaging_goes_on_to_the_same_file(fitted, packaged, batches, tmp_path, calls, same_object):
    path, coder = tmp_path / "state", packaged[1].coder
    first = copy.deepcopy(fitted[0])
    with pytest.raises(WorkError):
        encode(first, batches, failing_after(calls), checkpoint=path, coder=coder, **REFINED)
    assert path.exists() == (calls >= 10)
    if not path.exists():
        return
    second = first if same_object else copy.deepcopy(fitted[0])
    archive = encode(second, batches, F.cross_entropy, checkpoint=path, coder=coder, **REFINED)
    assert archive.to_bytes() == packaged[1].to_bytes()
    assert helpers.same_state(mean_state(second), mean_state(packaged[0]))
    assert archive.info["rounds"] == packaged[1].info["rounds"]
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_trellis_goes_on_with_the_frames_and_states_it_began_with(fitted, batches, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(WorkError):
        encode(copy.deepcopy(fitted[0]), batches, failing_after(25), coder="trellis", checkpoint=path, **REFINED)
    bnn = copy.deepcopy(fitted[0])
    archive = encode(bnn, batches, F.cross_entropy, coder="trellis", checkpoint=path, **{**REFINED, "rounds": 30})
    assert archive.path.log2_frames == 3
    assert helpers.same_state(decoded(archive, helpers.TinyNet()), mean_state(bnn))


def test_checkpoints_of_other_work_and_damaged_ones_are_refused(fitted, batches, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(WorkError):
        encode(copy.deepcopy(fitted[0]), batches, failing_after(15), checkpoint=path, **REFINED)
    for other in ({"seed": 1}, {"coder": "minimal-random"}, {"block_bits": 5.0}, {"budget": 300}):
        with pytest.raises(CodingError, match="state"):
            encode(copy.deepcopy(fitted[0]), batches, F.cross_entropy, checkpoint=path, **REFINED, **other)
    with pytest.raises(CodingError):
        encode(convert(nn.Linear(3, 2)), budget=helpers.BUDGET, checkpoint=path, **QUIET)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(CodingError, match="state"):
            encode(copy.deepcopy(fitted[0]), batches, F.cross_entropy, checkpoint=path, **REFINED)


# --- budgets and bad input ---


def test_posteriors_too_rich_for_the_budget_are_refused(bnn):
    with pytest.raises(BudgetError, match="raise the budget"):
        encode(bnn, budget=90, **QUIET)


def test_a_budget_smaller_than_the_header_is_refused(bnn):
    with pytest.raises(BudgetError, match="header"):
        encode(bnn, budget=10, **QUIET)


def test_a_file_over_its_budget_is_warned_of(bnn):
    size = encode(copy.deepcopy(bnn), budget="1 MB", names=False, **QUIET).size_bytes
    for less in (0, 10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            archive = encode(copy.deepcopy(bnn), budget=size - less, names=False, **QUIET)
        assert any(issubclass(w.category, MiracleWarning) for w in caught) == (archive.size_bytes > size - less)


def test_a_loss_that_is_not_finite_is_an_error(bnn, batches):
    with pytest.raises(MiracleError, match="loss"):
        encode(bnn, batches, lambda out, y: F.cross_entropy(out, y) * math.nan, **REFINED)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("own", ["mean", "log_std"])
def test_posteriors_that_are_not_finite_are_refused_by_name(bnn, bad, own):
    with torch.no_grad():
        getattr(posteriors(bnn)["fc2.weight"], own)[0, 0] = bad
    with pytest.raises(MiracleError, match=r"fc2\.weight"):
        encode(bnn, **QUIET)


def test_batches_that_run_dry_are_refused(bnn, batches):
    with pytest.raises(MiracleError, match="more than once"):
        encode(bnn, iter(batches), F.cross_entropy, **REFINED)
    with pytest.raises(MiracleError):
        encode(bnn, [], F.cross_entropy, **REFINED)


def test_only_converted_models_can_be_encoded():
    with pytest.raises(MismatchError, match="convert"):
        encode(helpers.TinyNet(), **QUIET)


def test_unknown_coders_are_refused(bnn):
    with pytest.raises(MismatchError, match="no coder"):
        encode(bnn, coder="nonsense", **QUIET)


# --- compress ---


def test_compress_is_the_three_steps_in_one(trained_net, batches, tmp_path):
    before = helpers.weight_state(trained_net)
    options = {"encode_options": {"rounds": 4, "refine_steps": 5}}
    warnings.simplefilter("ignore", MiracleWarning)  # of a few bytes over
    archive = compress(trained_net, batches, F.cross_entropy, budget="180 B", epochs=20, checkpoint=tmp_path / "state", **options, **QUIET)
    assert helpers.same_state(trained_net.state_dict(), before)
    assert archive.size_bytes <= 180
    assert archive.info["fit"]["budget_bytes"] == 180
    assert list(tmp_path.iterdir()) == []
    net = helpers.TinyNet()
    net.load_state_dict(decoded(archive, net))
    assert helpers.error_rate(net) < 0.1
    bnn = convert(trained_net)
    fit(bnn, batches, F.cross_entropy, budget=180, epochs=20, coder="trellis", **QUIET)
    assert encode(bnn, batches, F.cross_entropy, coder="trellis", rounds=4, refine_steps=5, **QUIET).to_bytes() == archive.to_bytes()
