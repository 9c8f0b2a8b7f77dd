"""Posteriors from trained weights and unlabelled inputs, layer by layer: what is not coded yet makes up for what is.

A layer's outputs are to stay what they were in the float network. With its inputs x in the float network and x' in the network as
it is coded so far, weights W and W', the squared error of the outputs is

    E |W x - W' x'|^2  =  tr(W' H W'^T) - 2 tr(W C W'^T) + const,      H = E x' x'^T,  C = E x x'^T  (means removed: the bias takes them)

for one unit a Gaussian log-likelihood. Errors of several units do more or less to the outputs of the whole network together than each
alone, so it is lam tr(G E) in place of lam tr(E), with E the matrix of these errors and G the curvature of the network's outputs in the
layer's (`measure.worth`; Martens and Grosse 2015, arXiv 1503.05671, and for rounding Tseng et al. 2025, arXiv 2505.22988). Under the prior
N(0, s^2) the best means are the solution of a ridge regression, in which the weights already coded stand at their decoded values. It is
solved again after each part of a layer: optimal brain surgery (Hassibi and Stork 1993) for a random code, as GPTQ is for rounding (Frantar
et al. 2023, arXiv 2210.17323); C in place of H makes up for the layers before as well. Noise in a weight that all others answer costs lam /
((G^-1)_uu (H^-1)_ii) (Hassibi and Stork, equation 5; here with the prior's ridge in both), less than lam G_uu H_ii; so the variances are
one over that and 1 / s^2, and a layer whose weights can repair each other gets fewer bits. Of the means that share stays in H and C that
the bias, in its own few bits, is going to leave; how many it needs for what it has to take a rehearsal shows.
`sensitivity` says how much the outputs of a layer may err, and weights of no layer.
The linear maps inside attention and recurrent layers are layers here, too (`exposed`), recurrent ones with their states one step before as
inputs; those depend on the layer's own weights, so they are measured again after each part, unless units are going to be scaled.
Least squares from inputs that carry much noise shrink a layer's outputs, and layer after layer that adds up. So where there are few
bits a weight each unit is scaled, once its layer is coded, until its outputs vary as they did in the float network (`gains`).
Leans on `sensitivity`, `passes`, `priors`, `measure`, `exposed`, `layers`, `convert` and torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import measure
from .bits import NATS_PER_BIT
from .convert import conversion
from .exposed import StateMap, exposed
from .layers import Posterior, posteriors
from .passes import Passes
from .priors import DROP_BELOW_BITS, LEAST, SAMPLE, WIDER, Sampled, match_kl, set_posterior, share_of_means, widening
from .sensitivity import DAMPING, Sensitivity, diagonals, is_full

# bits a weight; by hand: at 0.75 scaling took a ResNet-56 from 86.6 to 91.9 %, at 1.2 a ResNet-20's score error rose by a fifth
_SCALED_BELOW = 0.9
_LARGEST_GAIN, _LARGEST_GAIN_HARDENED = 2.0, 64.0  # of a unit whose outputs are too small, or too large
_LARGEST_PART_OF_KL = 1.5  # that a tensor may have in the rehearsal
_LARGEST_PART_OF_BIASES = 0.5  # of all bits
# of H, relative to its diagonal (so that the unit of an input hardly matters), where inputs are states in place of `DAMPING`, and to the
# mean of that
_DAMPING_OF_STATES, _FLOOR = 0.1, 0.01
_FIRST_STEPS, _STEPS = 30, 8  # of conjugate gradients: from the trained weights, from the solution before
_TIMES_MEASURED = 16  # at most, of a layer whose inputs depend on its own weights
_MEMORY = 16.0  # bits


@dataclass
class _Regression:
    """Of one layer, in parts that do not interact."""

    h: Tensor  # [parts, inputs, inputs]
    goal: Tensor  # W C, [parts, rows, inputs]
    curvature: Tensor  # of the outputs, [parts or 1, rows, rows], or [parts or 1, rows, 1] if it is diagonal
    worth: Tensor  # of a weight: the curvature of the error when all the others make up for it, [parts, rows, inputs]
    coded: int = 0  # weights, when it was measured


class Reconstruction:
    """Sets the posteriors of a converted network before it is coded, and again while it is.

    Args:
        model: from `convert`, not trained since: its means are the float network's weights.
        batches: inputs, each something that the model takes; may be empty, then nothing is measured.
        noise: variance of the noise that weights may get, over the mean square of their unit's, `[units, inputs]` of each parameter that
            it is known of, from `harden`; then only its scale is left to be found, and how the inputs of a layer share it.
    """

    def __init__(self, model: nn.Module, batches: list[Any], noise: Mapping[str, Tensor] | None = None):
        self.model = model = exposed(model, batches[0]) if batches else model
        self.batches, self.noise = batches, noise or {}
        self.float = copy.deepcopy(model).eval() if batches else model  # without inputs nothing is held against it
        self._passes, self._float_passes = Passes(model, batches), Passes(self.float, batches)
        self.sensitivity = Sensitivity(self.float, batches, self.noise)
        self.trained, self.owner = self.sensitivity.trained, self.sensitivity.owner
        self.lam = 1.0
        self.memory = _MEMORY
        self.scaled = False  # whether units are scaled once their layer is coded
        self.kl_bits: dict[str, float] = {}  # that each tensor is going to have when it is coded
        self.most: dict[str, Tensor] = {}  # mean square of a unit's means over its prior's variance, where the noise was known before
        self._regressions: dict[str, _Regression] = {}

    @torch.no_grad()
    def allocate(self, kl_bits: float) -> None:
        """Set all posteriors and priors so that their KL is `kl_bits` and every weight of a layer adds the same share of noise."""
        held = {name: p for name, p in posteriors(self.model).items() if p.mean.numel()}
        for p in held.values():
            p.per_unit = p.mean.dim() > 1

        precision, prior = self.sensitivity.precision, self.sensitivity.prior
        corrected = {name: name in self.owner and p.mean.dim() > 1 for name, p in held.items()}
        sampled = {
            name: Sampled(p, self.trained[name], precision[name], prior.get(name), corrected=corrected[name])
            for name, p in held.items() if p.mean.numel() > SAMPLE
        }  # fmt: skip
        small = [name for name in held if name not in sampled]

        def put(lam: float, names: Iterable[str]) -> None:
            for name in names:
                set_posterior(held[name], self.trained[name], lam * precision[name], prior.get(name), corrected=corrected[name])

        def spent(lam: float) -> float:
            put(lam, small)
            return (sum(float(held[name].kl()) for name in small) + sum(v.kl(lam) for v in sampled.values())) / NATS_PER_BIT

        low, high = 1e-6, 1e12
        while high / low > 1.0001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if spent(middle) > kl_bits else (middle, high)
        put(low, held)
        self.lam = low

    @torch.no_grad()
    def plan(self, kl_bits: float, *, memory: float = _MEMORY, seed: int = 0, rehearsed: bool = True) -> None:
        """`allocate`, then find what KL each tensor has when its turn comes: a rehearsal with plain draws instead of a code.

        The less a layer's inputs are worth by then, the less its weights are: later layers take fewer bits than before coding.

        Args:
            kl_bits: of all tensors.
            memory: bits that are chosen together, in the code to come.
            seed: of the rehearsal's draws.
            rehearsed: else the KL is that of `allocate`.
        """
        self.memory = memory
        self.scaled = bool(self.noise) or kl_bits < _SCALED_BELOW * sum(int(w.count_nonzero()) for w in self.trained.values())
        self.allocate(kl_bits)
        if self.noise:
            self._widen()
            self.allocate(kl_bits)
            self.most = {name: WIDER * share_of_means(posteriors(self.model)[name]) for name in self.sensitivity.prior}
        if self.noise or not rehearsed:
            self.kl_bits = {name: float(p.kl()) / NATS_PER_BIT for name, p in posteriors(self.model).items()}
            return
        before = {name: float(p.kl()) for name, p in posteriors(self.model).items()}
        real = self.model, self._passes
        self.model = copy.deepcopy(self.model)
        self._passes = Passes(self.model, self.batches)
        generator = torch.Generator().manual_seed(seed)
        part, biases = {}, {}
        held = posteriors(self.model)
        for name in (entry.name for entry in conversion(self.model).of_kind("coded")):  # in the order in which they are coded
            p = held[name]
            self.begin(name, None)
            if p.mean.dim() == 1 and name in self.owner:  # what it makes up for counts, however small it was itself
                biases[name] = float(p.kl()) / NATS_PER_BIT
            else:
                part[name] = min(float(p.kl()) / max(before[name], LEAST), _LARGEST_PART_OF_KL)
            noise = torch.randn(p.mean.shape, generator=generator, dtype=torch.float32, device="cpu").to(p.mean)
            p.fix(torch.arange(p.mean.numel(), device=p.mean.device), (p.mean + p.log_std.exp() * noise).flatten())
            gains = self.gains(name)
            if gains is not None:
                p.value.mul_(gains.reshape(-1, *[1] * (p.mean.dim() - 1)))
        self.model, self._passes = real
        together = sum(biases.values())
        share = min(1.0, _LARGEST_PART_OF_BIASES * kl_bits / max(together, LEAST))
        kept = sum(v * before[name] for name, v in part.items()) / max(sum(before.values()), LEAST)
        self.allocate((kl_bits - share * together) / max(kept, LEAST))
        held = posteriors(self.model)
        self.kl_bits = {name: v * float(held[name].kl()) / NATS_PER_BIT for name, v in part.items()}
        self.kl_bits |= {name: share * bits for name, bits in biases.items()}

    def _widen(self) -> None:
        """Make the priors as wide as suits the candidates of a code that chooses `memory` bits together."""
        for name, prior in self.sensitivity.prior.items():
            p = posteriors(self.model)[name]
            bits = p.kl_per_weight().flatten(1).mean(1) / NATS_PER_BIT
            coded = bits > DROP_BELOW_BITS
            if coded.any():
                size = (p.mean.square() + (2.0 * p.log_std).exp()) / prior
                worth = (self.sensitivity.precision[name] * prior).expand_as(size)
                size, worth = size[coded].flatten(1), worth[coded].flatten(1)
                prior[coded] *= widening(size, worth, self.memory / float(bits[coded].mean())).reshape(-1, *[1] * (prior.dim() - 1))

    @torch.no_grad()
    def unshrink(self) -> None:
        """Put the means of the weights that will be solved for back to the float network's, now that their KL is known."""
        for name, p in posteriors(self.model).items():
            if name in self.owner:
                p.mean.copy_(torch.where(p.fixed, p.mean, self.trained[name]))

    @torch.no_grad()
    def begin(self, name: str, kl_bits: float | None) -> None:
        """Before the first weight of a tensor is coded: what it should be now that others are.

        Its KL is to be `kl_bits`; if that is None, what noise at the present `lam` asks for.
        """
        module = self.owner.get(name)
        if module is None:
            return
        p, layer = posteriors(self.model)[name], self.float.get_submodule(module)
        if p.mean.dim() == 1:
            p.mean.add_((self.sensitivity.moments[module][0] - self._output_moments(module)[0]).to(p.mean))
            precision = (self.lam * self.sensitivity.by_channel(module)).to(p.mean)
            square = p.mean.square().mean() + LEAST  # what it makes up for may be larger than what it was
            kl_bits = float((1.0 + square * precision).log2().sum()) / 2.0 if kl_bits is None else kl_bits
            told = -math.expm1(-2.0 * kl_bits * NATS_PER_BIT / len(p.mean))  # of the variance, by that many bits
            factor = widening(p.mean.square()[None] / square, precision[None], self.memory * len(p.mean) / max(kl_bits, LEAST))
            p.freeze_prior((factor * told * square + LEAST).sqrt())
            p.mean.mul_(told)
            match_kl(p, precision, kl_bits)
            return
        trained = measure.parts(layer, self.trained[name])
        h, c = self._damped_products(module)
        g = self.lam * self.sensitivity.curvature[module]
        coded = ~measure.parts(layer, p.fixed.to(p.mean)).bool()  # a dropped unit's prior is next to nothing
        ridge = float(self._prior_ridge(p, layer)[coded].median()) if coded.any() else 0.0
        of_inputs = _alone(h, ridge / float(diagonals(g).mean()))
        of_units = _alone(g, ridge / float(h.diagonal(dim1=1, dim2=2).mean())) if is_full(g) else diagonals(g)
        self._regressions = {name: _Regression(h, trained @ c, g, of_units[:, :, None] * of_inputs[:, None, :])}
        self._solve(name, kl_bits, _FIRST_STEPS)
        if name in self.most:  # a unit whose means became too large for its bits is coded smaller; `gains` makes it larger again
            factor = (self.most[name] / (share_of_means(p) + LEAST)).sqrt().clamp_max(1.0).reshape(-1, *[1] * (p.mean.dim() - 1))
            self._regressions[name].goal.mul_(measure.parts(layer, factor.expand_as(p.mean)))
            p.mean.mul_(torch.where(p.fixed, 1.0, factor))
            self._solve(name, kl_bits, _STEPS)

    @torch.no_grad()
    def update(self, name: str, kl_bits: float) -> None:
        """After some of a tensor's weights are coded: the others make up for it; their KL is to be `kl_bits`."""
        if name in self._regressions and kl_bits > 0:
            layer, r = self.float.get_submodule(self.owner[name]), self._regressions[name]
            if isinstance(layer, StateMap) and not self.scaled:  # else states are too small as yet
                coded = int(posteriors(self.model)[name].fixed.sum())
                if (coded - r.coded) * _TIMES_MEASURED >= r.goal.numel():
                    r.coded = coded
                    r.h, c = self._damped_products(self.owner[name])
                    r.goal = measure.parts(layer, self.trained[name]) @ c
            self._solve(name, kl_bits, _STEPS)

    def _solve(self, name: str, kl_bits: float | None, steps: int) -> None:
        p, layer, r = posteriors(self.model)[name], self.float.get_submodule(self.owner[name]), self._regressions[name]
        free = measure.parts(layer, (~p.fixed).to(p.mean))
        fixed, mean = measure.parts(layer, p.value) * (1 - free), measure.parts(layer, p.mean) * free
        ridge = self._prior_ridge(p, layer)
        diagonal = diagonals(r.curvature)[:, :, None] * r.h.diagonal(dim1=1, dim2=2)[:, None, :] + ridge
        mean = _conjugate_gradients(lambda m: (_through(r.curvature, m @ r.h) + ridge * m) * free,
                                    _through(r.curvature, r.goal - fixed @ r.h) * free, mean, diagonal, steps,
                                    axes=(1, 2) if is_full(r.curvature) else (2,))  # fmt: skip
        p.mean.copy_(torch.where(p.fixed, p.mean, measure.joined(layer, mean, p.mean.shape)))
        match_kl(p, measure.joined(layer, r.worth.expand_as(mean), p.mean.shape), kl_bits)

    @staticmethod
    def _prior_ridge(p: Posterior, layer: nn.Module) -> Tensor:
        """The prior's precision, `[parts, rows, inputs]`."""
        assert p.prior_std is not None
        return 1.0 / measure.parts(layer, p.prior_std.square().expand_as(p.mean))

    @torch.no_grad()
    def _left_of_shifts(self, module: str) -> float:
        """Of a shift of all of a layer's outputs, squared, what its bias is going to leave in its few bits; 1 where there is none."""
        held = posteriors(self.model)
        places = {module, dict(conversion(self.model).folded).get(module)}
        for name, owner in self.owner.items():
            p = held[name]
            if owner in places and p.mean.dim() == 1 and len(p.mean):
                bits = self.kl_bits.get(name, float(p.kl()) / NATS_PER_BIT)
                return float(2.0 ** (-2.0 * bits / len(p.mean)))
        return 1.0

    def _damped_products(self, module: str) -> tuple[Tensor, Tensor]:
        """H and C with the same added to both, as if weights cost something by themselves."""
        h, c = self._products(module, self._left_of_shifts(module))
        variance = h.diagonal(dim1=1, dim2=2)
        share = _DAMPING_OF_STATES if isinstance(self.float.get_submodule(module), StateMap) else DAMPING
        damping = torch.diag_embed(share * variance + _FLOOR * variance.mean(1, keepdim=True) + LEAST)
        return h + damping, c + damping

    def _products(self, module: str, left: float) -> tuple[Tensor, Tensor]:
        """H and C of a layer, `[parts, inputs, inputs]`, with what is `left` of the products of means."""
        layer = self.float.get_submodule(module)
        generator = torch.Generator().manual_seed(0)
        h: Any = 0.0
        c: Any = 0.0
        mean: Any = 0.0
        mean_float: Any = 0.0
        count = 0
        for pair in zip(*(passes.called(module, output=False) for passes in (self._float_passes, self._passes)), strict=True):
            x_float, x = measure.rows(layer, list(pair), len(self.batches), generator)
            count += x.shape[1]
            h, c = h + x.mT @ x, c + x_float.mT @ x
            mean, mean_float = mean + x.sum(1), mean_float + x_float.sum(1)
        h, c, mean, mean_float = (v / count for v in (h, c, mean, mean_float))
        repaired = (1.0 - left) * mean[:, None, :]
        return h - mean[:, :, None] * repaired, c - mean_float[:, :, None] * repaired

    @torch.no_grad()
    def gains(self, name: str) -> Tensor | None:
        """After a layer is coded: by what its units are too small, `[units]`; None where they stay as they are."""
        module = self.owner.get(name) if self.scaled else None
        if module is None or posteriors(self.model)[name].mean.dim() == 1:
            return None
        wanted, found = self.sensitivity.moments[module][1], self._output_moments(module)[1]
        largest = _LARGEST_GAIN_HARDENED if self.noise else _LARGEST_GAIN
        return ((wanted + LEAST) / (found + LEAST)).sqrt().clamp(1.0 / largest, largest)

    def _output_moments(self, module: str) -> tuple[Tensor, Tensor]:
        """Mean and variance of a module's outputs in the network as it is coded so far, by channel."""
        sums = measure.Sums()
        for output in self._passes.called(module, output=True):
            sums.add(measure.channels(self.model.get_submodule(module), output))
        return sums.moments()


def _through(g: Tensor, m: Tensor) -> Tensor:
    """Curvatures times `[parts, rows, inputs]`."""
    return g @ m if is_full(g) else g * m


def _alone(matrices: Tensor, ridge: float) -> Tensor:
    """Curvature of the error in one weight when all the others make up for it, ridge and all: `[parts, n]`."""
    inverse = _inverse_diagonal(matrices + ridge * torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device))
    return (inverse.reciprocal() - ridge).clamp_min(LEAST)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], goal: Tensor, x: Tensor, diagonal: Tensor, steps: int, *, axes: tuple[int, ...]
) -> Tensor:
    """Solve apply(x) = goal from `x` on; `diagonal` is that of the symmetric positive map, which stays within `axes`."""
    residual = goal - apply(x)
    z = residual / diagonal
    direction, size = z, (residual * z).sum(axes, keepdim=True)
    for _ in range(steps):
        mapped = apply(direction)
        length = size / ((direction * mapped).sum(axes, keepdim=True) + 1e-30)
        x, residual = x + length * direction, residual - length * mapped
        z = residual / diagonal
        before, size = size, (residual * z).sum(axes, keepdim=True)
        direction = z + size / (before + 1e-30) * direction
    return x


def _inverse_diagonal(matrices: Tensor) -> Tensor:
    """Diagonals of the inverses of symmetric matrices; by Cholesky's factors, in half the time, unless rounding left one not positive."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    inverses = torch.linalg.inv(matrices) if failed.any() else torch.cholesky_inverse(factors)
    return inverses.diagonal(dim1=1, dim2=2)
