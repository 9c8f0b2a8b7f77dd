"""Tuning of a packaged network: only the bits of the trellis' path change, so the file stays as large as it is.

Every coded weight has a wish, a real number that starts at the weight's decoded value. The loss is computed with the decoded weights and
its gradient moves the wishes (the straight-through estimator: Bengio et al. 2013, arXiv 1308.3432; for weights Courbariaux et al. 2015,
arXiv 1511.00363). Every few steps the path is searched again for one that decodes nearest to the wishes, in windows between
states that stay. A wish is measured in the noise of its tensor's code, the prior's std times 2^-R at R bits a weight (the
distortion-rate function of a Gaussian), so that one learning rate serves biases of eight bits and kernels of one.
Leans on `network`, `load`, `coders.trellis`, `course` and `feed`.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import distributed
from .coders.trellis import Features, StepLaw, emitted_bits, in_turn, search, side_by_side, step_bits, viterbi
from .container import Archive, prior_std, rates, resolve_kept
from .course import Row, check_loss, run, warm_cosine
from .decode import stored_array
from .errors import CodingError, MiracleError
from .feed import Feed
from .load import decode, restore
from .network import copied, unwrapped
from .train import Loss, seeded
from .trellis import RATE_UNIT

LEARNING_RATE = 1.5e-2  # of Adam, in units of the code's noise
STEPS_PER_SEARCH = 40
_WINDOW, _SHIFTS = 4 * RATE_UNIT, 4  # steps that are searched at once; places in turn where windows begin, so that all states get to move
_CALM = 0.02  # of a wish's distance from its weight, after each search
_BETAS = (0.9, 0.99)


@torch.enable_grad()
def tune(
    archive: Archive,
    net: nn.Module,
    batches: Iterable,
    loss: Loss,
    *,
    epochs: float = 10.0,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    sharded: bool | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Archive:
    """Train a packaged network further, inside its file: the size, the rates and the prior scales stay.

    For weights of about a bit each, as of a ResNet-20 in 40,000 bytes. Dropout is off, statistics of norms stay.

    Args:
        archive: of the trellis coder, from `encode`, `compress` or `open`; left alone.
        net: the network that it was made from, or another of its class; its weights do not matter and are left alone.
        batches, loss: as in `fit`.
        epochs: passes over `batches`.
        learning_rate: the largest, in units of the code's noise a step; it rises at first and falls to zero as a cosine.
        seed: of the random numbers that the loader draws.
        sharded: as in `fit`.
        checkpoint: file that keeps the state after every pass; if it exists, tuning resumes from it, to the same file.
        progress: show a progress bar on stderr.

    Returns:
        A new archive; `archive.info["tune"]` has steps, seconds and `history`: step, loss and share of the weights changed.

    Raises:
        CodingError: the archive is of another coder, or the checkpoint belongs to another run.
        MismatchError: the archive was made for another architecture.
        MiracleError: the loss is NaN or infinite.

    Example:
        >>> save(tune(open("net.mban"), net, loader, F.cross_entropy, epochs=20), "better.mban")  # doctest: +SKIP
    """
    started = time.monotonic()
    if archive.path is None:
        raise CodingError(f"tune needs a file of the trellis coder; this one is of {archive.coder!r}: encode(..., coder='trellis')")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise CodingError(f"learning_rate must be positive, not {learning_rate}")
    if not (math.isfinite(epochs) and epochs > 0):
        raise CodingError(f"epochs must be positive, not {epochs}")
    archive = copy.deepcopy(archive)
    weights, model = decode(archive, net), copied(unwrapped(net)).float().eval()
    restore(model, weights)
    device = next(model.parameters()).device
    code = _Code(archive, model)
    with seeded(seed, device):
        feed = Feed(batches, device, sharded=sharded, seed=seed)
    steps = max(1, round(epochs * feed.batches_per_pass))
    settings = {"archive": zlib.crc32(archive.to_bytes()), "steps": steps, "learning_rate": learning_rate, "seed": seed}
    saved = checkpoints.read(Path(checkpoint), stage="tune", expected=settings) if checkpoint is not None else None
    course = _Tuning(code, model, feed, loss, learning_rate, steps)
    with seeded(distributed.own_seed(seed), device):
        history, started = run(
            course, steps, stage="tune", settings=settings, saved=saved, checkpoint=checkpoint, device=device, started=started,
            progress=progress,
        )  # fmt: skip
    distributed.check_same(zlib.crc32(archive.to_bytes()), "checksum of the archive")
    archive.info["tune"] = {"steps": steps, "seconds": time.monotonic() - started, "history": history}
    return archive


class _Tuning:
    """The course of `tune`."""

    def __init__(self, code: _Code, model: nn.Module, feed: Feed, loss: Loss, learning_rate: float, steps: int):
        self.code, self.model, self.feed, self.loss, self.learning_rate, self.steps = code, model, feed, loss, learning_rate, steps
        self.optimizer = torch.optim.Adam([t.wish for t in code.tensors.values()], learning_rate, betas=_BETAS)
        self.step = 0
        self.losses: list[float] = []  # since the last search

    def advance(self) -> Row | None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warm_cosine(self.step / self.steps)
        inputs, targets = self.feed.next()
        value = self.loss(self.model(inputs), targets)
        check_loss(value)
        self.model.zero_grad(set_to_none=True)
        value.backward()
        self.code.take_gradients()
        (measured,) = distributed.mean_gradients(self.optimizer, [float(value.detach())])
        if not math.isfinite(measured):
            raise MiracleError(
                f"the loss became {measured} in tuning, step {self.step}: check the data for NaN, or lower the learning rate"
            )
        self.optimizer.step()
        self.step += 1
        self.losses.append(measured)
        if self.step % STEPS_PER_SEARCH and self.step < self.steps:
            return None
        changed = self.code.search(self.step // STEPS_PER_SEARCH % _SHIFTS)
        self.code.calm()
        row = {"step": self.step, "loss": statistics.fmean(self.losses), "changed": changed}
        self.losses.clear()
        return row

    def words(self, row: Row) -> str:
        return f"loss {row['loss']:.4f}, {row['changed']:.2%} of the weights changed"

    def state(self) -> dict[str, Any]:
        wishes = [t.wish.detach() for t in self.code.tensors.values()]
        return {"step": self.step, "bits": torch.from_numpy(self.code.bits), "wishes": wishes, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.code.restore(state["bits"].numpy(), state["wishes"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass
class _Coded:
    """A coded tensor: `at` are the places of its coded weights in the flattened parameter; `prior`, `noise` and `wish` have one each."""

    parameter: nn.Parameter
    at: Tensor
    prior: Tensor
    noise: float  # relative to the prior
    wish: nn.Parameter


class _Code:
    """The path of an archive and a network that holds what it decodes to.

    Args:
        archive: its path is changed in place.
        model: decoded from it.
    """

    def __init__(self, archive: Archive, model: nn.Module):
        self.archive = archive
        path = archive.path
        assert path is not None
        self.memory = path.memory
        device = next(model.parameters()).device
        self.features = Features(archive.seed, path.memory, device)
        self.rates = {i: r for i, r in rates(archive).items() if r.steps}
        self.bits = np.array(path.bits[: sum(r.bits for r in self.rates.values())], np.uint8)  # a file's end with a byte
        parameters = dict(model.named_parameters())
        live = resolve_kept(archive.records)
        self.tensors: dict[int, _Coded] = {}
        for i, rate in self.rates.items():
            record = archive.records[i]
            parameter = parameters.get(str(record.name))
            if parameter is None:
                raise CodingError(f"tensor {record.name} is no parameter of {type(model).__name__}, so it cannot be tuned")
            place = torch.arange(parameter.numel()).reshape(parameter.shape)[tuple(slice(k) for k in live[i])]
            codes = np.asarray(record.prior_codes)
            prior = torch.from_numpy(prior_std(np.maximum(codes, 1)) * (codes > 0)).float()
            prior = prior.repeat_interleave(place.numel() // len(codes))
            coded = prior > 0
            at, prior = place.flatten()[coded].to(device), prior[coded].to(device)
            noise = 2.0 ** -(rate.rate / RATE_UNIT / rate.width)
            wish = nn.Parameter(parameter.detach().flatten()[at] / (noise * prior))
            self.tensors[i] = _Coded(parameter, at, prior, noise, wish)
        self.pieces: list[tuple[int, int, int, int]] = []  # record number, first step, stop, first bit; in the order of the stream
        bit = 0
        for frame in range(1 << path.log2_frames):
            for i, rate in self.rates.items():
                first, stop = (rate.first_step(f, path.log2_frames) for f in (frame, frame + 1))
                if stop > first:
                    self.pieces.append((i, first, stop, bit))
                    bit += rate.bits_before(stop) - rate.bits_before(first)
        self.edges = np.cumsum([0, *(stop - first for _, first, stop, _ in self.pieces)])

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Give the wishes the gradients of the weights."""
        for t in self.tensors.values():
            gradient = t.parameter.grad
            t.wish.grad = torch.zeros_like(t.wish) if gradient is None else gradient.flatten()[t.at] * (t.noise * t.prior)

    @torch.no_grad()
    def search(self, shift: int) -> float:
        """Lead the path nearer to the wishes, and the network after it; returns the share of the weights that changed."""
        laws = {i: self._law(i) for i in self.rates}
        alike: dict[tuple[int, int], list[int]] = {}  # windows within one piece, by its tensor and where in the rate's unit they begin
        total = int(self.edges[-1])
        inner = list(range(shift * _WINDOW // _SHIFTS, total, _WINDOW))
        for begin, end in zip([0, *inner], [*inner, total], strict=True):
            k = int(np.searchsorted(self.edges, begin, side="right")) - 1
            if end - begin == _WINDOW and end <= self.edges[k + 1]:
                number, first, _, _ = self.pieces[k]
                alike.setdefault((number, (first + begin - int(self.edges[k])) % RATE_UNIT), []).append(begin)
            elif end > begin:
                self._search_mixed(laws, begin, end)
        for (number, _), begins in alike.items():
            self._search_alike(laws[number], begins)
        return self._decode()

    @torch.no_grad()
    def calm(self) -> None:
        """Draw the wishes a little towards what the path decodes to: without it the noise of gradients carries them ever farther."""
        for t in self.tensors.values():
            t.wish.lerp_(t.parameter.flatten()[t.at] / (t.noise * t.prior), _CALM)

    def _law(self, number: int) -> StepLaw:
        """Scores that fall with the squared distance from the wishes: the prior's part of a log ratio is compensated for."""
        t = self.tensors[number]
        mean = t.wish.detach() * (t.noise * t.prior) * (1.0 - t.noise**2)
        return StepLaw(self.features, number, self.rates[number], mean.double(), (t.noise * t.prior).double(), t.prior.double())

    def _search_alike(self, law: StepLaw, begins: list[int]) -> None:
        side = side_by_side(self.memory, _WINDOW)
        for some in (begins[i : i + side] for i in range(0, len(begins), side)):
            firsts, bits = zip(*(self._at(b) for b in some), strict=True)
            lasts = [self._at(b + _WINDOW, end=True)[1] for b in some]
            new_bits = np.array(step_bits(law.rate, firsts[0], firsts[0] + _WINDOW), np.int64)
            found, _ = search(law, list(firsts), _WINDOW, self._states(bits), self._states(lasts))
            for own, first, last in zip(found.T.cpu().numpy(), bits, lasts, strict=True):
                self.bits[first:last] = emitted_bits(own, new_bits)

    def _search_mixed(self, laws: dict[int, StepLaw], begin: int, end: int) -> None:
        run = []
        touched = range(int(np.searchsorted(self.edges, begin, side="right")) - 1, int(np.searchsorted(self.edges, end, side="left")))
        for k in touched:
            number, first, _, _ = self.pieces[k]
            at, until = int(self.edges[k]), int(self.edges[k + 1])
            run.append((laws[number], first + max(begin, at) - at, first + min(end, until) - at))
        new_bits = [k for law, first, stop in run for k in step_bits(law.rate, first, stop)]
        first_bit, last_bit = self._at(begin)[1], self._at(end, end=True)[1]
        free = last_bit == len(self.bits)
        states, _ = viterbi(in_turn(run), new_bits, 1, self.memory, self._states([first_bit]), None if free else self._states([last_bit]))
        self.bits[first_bit:last_bit] = emitted_bits(states[:, 0].cpu().numpy(), np.array(new_bits, np.int64))

    def _at(self, step: int, *, end: bool = False) -> tuple[int, int]:
        """Of a step of the stream, or of the end of the one before it: the step in its tensor, and the bit there."""
        k = int(np.searchsorted(self.edges, step, side="left" if end else "right")) - 1
        number, first, _, bit = self.pieces[k]
        own, rate = first + step - int(self.edges[k]), self.rates[number]
        return own, bit + rate.bits_before(own) - rate.bits_before(first)

    def _states(self, bits: Iterable[int]) -> Tensor:
        """The states before some bits of the stream: the last `memory` bits up to there, zeros before the first."""
        at = np.asarray(bits)[:, None] + np.arange(-self.memory, 0)
        window = np.where(at >= 0, self.bits[np.maximum(at, 0)], 0).astype(np.int64)
        return torch.from_numpy(window @ (1 << np.arange(self.memory - 1, -1, -1, dtype=np.int64)))

    @torch.no_grad()
    def _decode(self) -> float:
        """Put what the path decodes to into the network; returns the share of the weights that changed."""
        assert self.archive.path is not None
        self.archive.path = replace(self.archive.path, bits=self.bits.copy())
        changed = count = 0
        for i, t in self.tensors.items():
            new = torch.from_numpy(np.ascontiguousarray(stored_array(self.archive, i))).flatten().to(t.parameter)
            changed += int((new != t.parameter.flatten()).sum())
            count += len(t.at)
            t.parameter.copy_(new.view_as(t.parameter))
        torch.clear_autocast_cache()  # else a caller's autocast would go on with the weights as they were
        return changed / max(count, 1)

    @torch.no_grad()
    def restore(self, bits: np.ndarray, wishes: list[Tensor]) -> None:
        """Go on from a checkpoint."""
        self.bits = bits
        for t, wish in zip(self.tensors.values(), wishes, strict=True):
            t.wish.copy_(wish)
        self._decode()
