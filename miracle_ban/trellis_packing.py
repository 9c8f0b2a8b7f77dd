"""Packaging by trellis: one stream of bits through all tensors, coded frame by frame.

How many bits each tensor gets is settled before coding starts, from its KL, so the size of the file is exact from the
beginning. Each tensor's beta is then steered so that what is left of it has the KL that its bits can carry; or, without training
data, each layer's posterior is set anew when its turn comes (`reconstruct`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import distributed, trellis
from .bits import NATS_PER_BIT
from .coders.trellis import OVERLAP, SEGMENT, Features, StepLaw, Trellis, best_path, emitted_bits, in_turn, path_bits, step_bits, viterbi
from .container import Archive, Path, prior_code, prior_std, rates
from .gaussian import Blocks
from .layers import Posterior, posteriors
from .packing import Goal, Packing, gather, live_positions
from .reconstruct import Reconstruction
from .trellis import RATE_UNIT, Rate

_RATE_CODE_BITS = 2  # by which the code of a rate may grow from one to the next
_STEPS_AT_ONCE = 1 << 13  # in one search through several tensors
_LARGEST_LOG2_FRAMES = 12
_CORRECTIONS, _FEWEST_STEPS = 64, 64  # parts that a reconstructed tensor is coded in, and steps in each at least
_LARGE, _CORRECTIONS_OF_LARGE = 1 << 18, 4  # weights; solving for them again takes seconds
_SPARE_BITS = 0.1  # for each unit of a layer: prior codes that change take about as many bits as before
_LARGEST_FACTOR = 1.3  # more bits than that over what the KL asks for buy next to nothing

Piece = tuple[int, int, int]  # record number, first step, stop


class TrellisPacking(Packing):
    """See the module.

    Args:
        model: with its priors frozen.
        archive: its skeleton; the rates are put into it.
        coder: its memory settled.
        budget_bits: of the whole file; None gives each tensor what its KL asks for.
        rounds: frames, rounded to a power of two.
        saved: `state()` of an interrupted packaging.
        reconstruction: sets each tensor's posterior when its turn comes; then there is one frame, and a round is one layer.
    """

    unit = "step"

    def __init__(
        self,
        model: torch.nn.Module,
        archive: Archive,
        coder: Trellis,
        *,
        budget_bits: float | None,
        rounds: int,
        saved: dict[str, Any] | None,
        reconstruction: Reconstruction | None = None,
    ):
        self.archive, self.seed, self.reconstruction = archive, archive.seed, reconstruction
        if saved is not None:
            coder = Trellis(memory=saved["memory"], bits_per_weight=coder.bits_per_weight)
        self.efficiency = coder.efficiency
        held = posteriors(model)
        coded = [i for i, r in enumerate(archive.records) if r.kind == "coded"]
        self.limit_bits = budget_bits
        self.scaled = reconstruction is not None and reconstruction.scaled
        self.candidates: dict[int, np.ndarray] = {}  # of layers that are going to be scaled: values over the prior's std
        self.posterior: dict[int, Posterior] = {i: held[str(archive.records[i].name)] for i in coded}
        self.count = {i: len(self._free(i)) for i in coded}
        frames = 0 if reconstruction else min(round(math.log2(max(rounds, 1))), _LARGEST_LOG2_FRAMES)
        frames = frames if saved is None else saved["log2_frames"]
        self.path = archive.path = Path(coder.memory or 0, frames)
        if saved is None:
            self._allocate(coder, None if budget_bits is None else budget_bits - self._spare_bits())
            if reconstruction is not None:
                reconstruction.unshrink()
        else:
            for i in coded:
                archive.records[i].rate = Rate(*saved["rates"][i])
                archive.records[i].prior_codes = saved["prior_codes"][i].numpy()
        self.rates = rates(archive)
        self.features = Features(self.seed, self.path.memory, next(model.parameters()).device)
        self.total = sum(r.steps for r in self.rates.values())
        self.turns = self._turns()
        self.turn = self.state_before = 0
        self.bits: list[np.ndarray] = []
        self.kl_bits: list[np.ndarray] = []
        self.log2_ratio: list[np.ndarray] = []

    def _allocate(self, coder: Trellis, budget_bits: float | None) -> None:
        """Share the bits of the stream out in proportion to each tensor's KL: equal KL for each bit, one beta for all."""
        records = self.archive.records
        planned = self.reconstruction.kl_bits if self.reconstruction else {}
        with torch.no_grad():
            kl_bits = {i: planned.get(p.name, float(p.kl()) / NATS_PER_BIT) for i, p in self.posterior.items()}
        wanted = {i: coder.rate(self.count[i], kl_bits[i]).bits if coder.bits_per_weight else kl_bits[i] / coder.efficiency
                  for i in kl_bits}  # fmt: skip
        for i, bits in wanted.items():
            records[i].rate = Rate.of(self.count[i], bits)
        if budget_bits is None:
            return
        for _ in range(4):  # the rates themselves take a few bits, more or fewer
            side, total = 8.0 * self.archive.size_bytes, sum(wanted.values())
            factor = min((budget_bits - side) / max(total, 1e-9), _LARGEST_FACTOR)
            for i, bits in wanted.items():
                records[i].rate = Rate.of(self.count[i], bits * factor)
        self._trim(min(budget_bits, side + _LARGEST_FACTOR * total))

    def _spare_bits(self) -> float:
        """Kept free for prior codes that change when their layer is coded (`_rescale_if_coded`)."""
        units = sum(len(self.archive.records[i].prior_codes) for i, p in self.posterior.items() if p.mean.dim() > 1)
        return _SPARE_BITS * units if self.scaled else 0.0

    def _trim(self, budget_bits: float) -> None:
        """Change rates by the smallest steps there are, those of large tensors first, until the file is as large as it may be."""
        records = self.archive.records
        largest_first = sorted(self.posterior, key=lambda i: -self.count[i])
        for _ in range(RATE_UNIT):
            stream = sum(r.bits for r in rates(self.archive).values())
            spare = budget_bits - 8 * self.archive.size_bytes - 8 * -(-stream // 8)
            step, changed = 1 if spare >= 0 else -1, False
            for i in largest_first:
                old = records[i].rate
                assert old is not None
                new = replace(old, rate=old.rate + step)
                cost = new.bits - old.bits + _RATE_CODE_BITS
                inside = RATE_UNIT <= new.rate <= RATE_UNIT * trellis.LARGEST_STEP_BITS
                if inside and (cost <= spare if step > 0 else spare < 0):
                    records[i].rate, spare, changed = new, spare - cost, True
            if not changed:
                break

    def _turns(self) -> list[list[Piece]]:
        """What each round codes, in the order of the stream: a frame, or a layer (a weight and the vectors after it)."""
        frames = self.path.log2_frames
        if not self.reconstruction:
            bounds = {i: [r.first_step(f, frames) for f in range((1 << frames) + 1)] for i, r in self.rates.items()}
            return [[(i, at[f], at[f + 1]) for i, at in bounds.items() if at[f + 1] > at[f]] for f in range(1 << frames)]
        turns: list[list[Piece]] = [[]]
        for i, r in self.rates.items():
            if turns[-1] and self.posterior[i].mean.dim() > 1:
                turns.append([])
            turns[-1] += [(i, 0, r.steps)] if r.steps else []
        return turns

    def _law(self, number: int) -> StepLaw:
        mean, std, prior = (v.to(self.features.device) for v in gather(self.posterior[number], self._free(number)))
        return StepLaw(self.features, number, self.rates[number], mean, std, prior)

    def code_round(self, rounds_left: int) -> None:
        """See `Packing.code_round`: one turn, searched together with the beginning of the next."""
        laws: dict[int, StepLaw] = {}
        pieces = self.turns[self.turn]
        ahead = self.turns[self.turn + 1] if self.turn + 1 < len(self.turns) else []
        while pieces:
            number, first, stop = pieces[0]
            at_once = stop - first
            if self.reconstruction:
                self._reconstruct(number, first)
                laws.pop(number, None)
                parts = _CORRECTIONS if self.count[number] < _LARGE else _CORRECTIONS_OF_LARGE
                at_once = max(-(-self.rates[number].steps // parts), _FEWEST_STEPS)
            if number not in laws:
                laws[number] = self._law(number)
            if min(at_once, stop - first) > 2 * SEGMENT:
                stop = min(stop, first + at_once)
                states, _ = best_path(laws[number], self.state_before, first, stop, distributed.spread)
                self._commit(number, first, states, path_bits(laws[number], states, first))
                pieces = _after(pieces, [(number, first, stop)])
                self._rescale_if_coded(number, pieces)
                continue
            together = _up_to(pieces[:1], at_once) if self.reconstruction else _up_to(pieces, _STEPS_AT_ONCE)
            rest = _after(pieces, together)
            beyond = _up_to(rest + ahead, OVERLAP)
            for i, _, _ in together + beyond:
                if i not in laws:
                    laws[i] = self._law(i)
            self._search(together, beyond, laws)
            pieces = rest
            self._rescale_if_coded(number, pieces)
        self.turn += 1

    def _reconstruct(self, number: int, step: int) -> None:
        """Let what is left of a tensor, from `step` on, make up for what is coded."""
        assert self.reconstruction
        rate = self.rates[number]
        kl_bits = self.efficiency * (rate.bits - rate.bits_before(step))
        p = self.posterior[number]
        (self.reconstruction.update if step else self.reconstruction.begin)(p.name, kl_bits)
        assert p.prior_std is not None
        distributed.synchronise([p.mean, p.log_std, p.prior_std])
        if not step and p.mean.dim() == 1:  # what a bias makes up for may have changed its prior
            self._hold_prior(number, prior_code(p.prior_std.flatten().cpu().numpy()))

    def _hold_prior(self, number: int, codes: np.ndarray) -> torch.Tensor:
        """Change the prior of a tensor; returns its standard deviations, by unit."""
        p, self.archive.records[number].prior_codes = self.posterior[number], codes
        std = torch.from_numpy(prior_std(np.maximum(codes, 1))).reshape(-1, *[1] * (p.mean.dim() - 1))
        p.freeze_prior(std)
        return std

    def _rescale_if_coded(self, number: int, pieces: list[Piece]) -> None:
        """Once nothing of a layer is left among `pieces`, bring its units back to their size in the float network by their prior codes."""
        if self.reconstruction is None or not self.scaled or (pieces and pieces[0][0] == number):
            return
        candidates, p, record = self.candidates.pop(number), self.posterior[number], self.archive.records[number]
        gains = self.reconstruction.gains(p.name)
        if gains is None or len(record.prior_codes) != len(gains):
            return
        distributed.synchronise([gains])
        before = record.prior_codes
        own = prior_code(prior_std(before) * gains.cpu().numpy())
        shift = int(np.median((own.astype(np.int64) - before)[before > 0])) if before.any() else 0
        alike = np.where(before > 0, np.clip(before + np.int64(shift), 1, 255), 0).astype(np.uint8)  # takes no more bits
        record.prior_codes = own
        stream = sum(r.bits for r in self.rates.values())
        if self.limit_bits is not None and 8 * self.archive.size_bytes + 8 * -(-stream // 8) > self.limit_bits:
            record.prior_codes = alike
        std = self._hold_prior(number, record.prior_codes)
        everything = torch.arange(p.mean.numel(), device=p.mean.device)
        p.fix(everything, (torch.from_numpy(candidates).reshape(p.mean.shape) * std.float()).flatten().to(p.mean.device))

    def _search(self, pieces: list[Piece], beyond: list[Piece], laws: dict[int, StepLaw]) -> None:
        """Find the best path through `pieces`, with what follows in view, and commit it."""
        run = pieces + beyond
        edges = np.cumsum([0, *(stop - first for _, first, stop in run)]).tolist()
        new_bits = [k for i, first, stop in run for k in step_bits(self.rates[i], first, stop)]
        scores = in_turn([(laws[i], first, stop) for i, first, stop in run])
        states, _ = viterbi(scores, new_bits, 1, self.path.memory, torch.tensor([self.state_before], device="cpu"), None)
        found = states[:, 0].cpu().numpy()
        for (i, first, _), at, until in zip(pieces, edges[: len(pieces)], edges[1:], strict=False):
            own = found[at:until]
            self._commit(i, first, own, emitted_bits(own, np.array(new_bits[at:until], np.int64)))

    def _free(self, number: int) -> np.ndarray:
        """Positions of the weights that are coded, in the flattened live tensor."""
        return live_positions(self.archive, number, self.posterior[number])

    def _commit(self, number: int, first: int, states: np.ndarray, bits: np.ndarray) -> None:
        """Fix the weights of some steps at what their states stand for."""
        free = self._free(number)
        for i in range(0, len(states), _STEPS_AT_ONCE):
            self._fix(number, first + i, states[i : i + _STEPS_AT_ONCE], free)
        self.bits.append(bits)
        self.state_before = int(states[-1])

    def _fix(self, number: int, first: int, states: np.ndarray, free: np.ndarray) -> None:
        rate, p = self.rates[number], self.posterior[number]
        steps = np.arange(first, first + len(states))
        values = trellis.step_values(self.seed, number, rate, steps, states)
        place = trellis.place(self.seed, number, rate, steps)
        place = np.where(place >= 0, free[place], -1)
        inside = place >= 0
        mean, std, prior = gather(p, place)
        law = Blocks.of(mean, std, prior)
        self.kl_bits.append(law.kl_nats().numpy() / NATS_PER_BIT)
        self.log2_ratio.append(law.log_ratio(torch.from_numpy(np.where(inside, values, 0.0))).numpy() / NATS_PER_BIT)
        if self.scaled:
            self.candidates.setdefault(number, np.zeros(p.mean.numel(), np.float32))[place[inside]] = values[inside]
        weights = values * prior.float().numpy()
        p.fix(torch.from_numpy(place[inside]).to(p.mean.device), torch.from_numpy(weights[inside]))

    @property
    def num_coded(self) -> int:
        """See `Packing.num_coded`."""
        return sum(stop - first for turn in self.turns[: self.turn] for _, first, stop in turn)

    def spent_bits(self) -> float:
        """See `Packing.spent_bits`."""
        return float(sum(len(b) for b in self.bits))

    def goals(self) -> list[Goal]:
        """See `Packing.goals`: for each tensor on its own, whether or not there is a budget."""
        reached = {i: stop for turn in self.turns[: self.turn] for i, _, stop in turn}
        left = {i: r.bits - r.bits_before(reached.get(i, 0)) for i, r in self.rates.items()}
        return [Goal((self.posterior[i].name,), 0.0, self.efficiency * bits) for i, bits in left.items() if bits]

    def finish(self, archive: Archive) -> int:
        """See `Packing.finish`."""
        self.path = archive.path = replace(self.path, bits=np.concatenate([np.zeros(0, np.uint8), *self.bits]))
        return archive.size_bytes

    def account(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Packing.account`."""
        return np.concatenate([np.zeros(0), *self.kl_bits]), np.concatenate([np.zeros(0), *self.log2_ratio])

    def state(self) -> dict[str, Any]:
        """See `Packing.state`."""
        return {
            "rates": {i: (r.count, r.width, r.rate) for i, r in self.rates.items()}, "turn": self.turn,
            "prior_codes": {i: torch.from_numpy(self.archive.records[i].prior_codes) for i in self.posterior},
            "memory": self.path.memory, "log2_frames": self.path.log2_frames,
            "state_before": self.state_before, "bits": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *self.bits])),
            "account": [torch.from_numpy(a) for a in self.account()],
        }  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """See `Packing.restore`."""
        self.turn, self.state_before = saved["turn"], saved["state_before"]
        self.bits = [saved["bits"].numpy()]
        self.kl_bits, self.log2_ratio = ([a.numpy()] for a in saved["account"])


def _up_to(pieces: list[Piece], steps: int) -> list[Piece]:
    """The first `steps` steps of `pieces`."""
    taken: list[Piece] = []
    for number, first, stop in pieces:
        if steps <= 0:
            break
        taken.append((number, first, min(stop, first + steps)))
        steps -= stop - first
    return taken


def _after(pieces: list[Piece], taken: list[Piece]) -> list[Piece]:
    """What `_up_to` left."""
    number, _, reached = taken[-1]
    _, _, stop = pieces[len(taken) - 1]
    cut = [(number, reached, stop)] if reached < stop else []
    return cut + pieces[len(taken) :]
