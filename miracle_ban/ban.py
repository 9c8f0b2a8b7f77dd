"""Bayesian attention (Tetelman 2021, "Bayesian attention networks for data compression"): posteriors that depend on context.

A context is a set of inputs s. An encoder gives its latent z by a product of experts, q(z|s); a decoder says how likely each
training example is in that context, and so how important (equation 12); the posterior given z is the prior times the
evidence of all examples, each to the power of its importance (equations 18 and 20). Here the evidence is Gaussian, so natural
parameters add:

    precision(z)        = precision_prior + t(z) * evidence precision
    precision(z)*mean(z) =                  t(z) * evidence precision * evidence mean,         t(z) = gate(z) * sum_m attention_m(z) share_m

Attention moves the evidence between M learned prototypes, groups of training examples; gates, one for each unit, let it shrink.
A hidden unit's gate is 0 or 1, in training at random with a learned chance (straight-through, Bengio et al. 2013, arXiv
1308.3432): what a context does not need falls back to the prior, is silent and costs nothing. The prior never depends on z: a file
that was packaged for a context needs no context to decode. With one prototype, open gates and importance 1 all is the plain
beta-ELBO. Equation numbers are the paper's. Leans on `network`, `layers`, `convert`, `inputs`
and `teaching`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .convert import conversion, drop_units
from .errors import MiracleError, MismatchError
from .inputs import batches_of
from .layers import Law, Posterior, example_gradients, loss_at, posteriors, use_mode
from .network import copied
from .teaching import are_scores, class_shift, mean_network

Contexts = Callable[[Any], Tensor]  # targets -> bool [n]: which examples of a batch belong to the context that was drawn

_NEGLIGIBLE = 0.02  # importance under which an example is left out of the forward pass
_FIRST_SPREAD = 3.0  # of the experts' means over what torch's initialisation gives: z must be heard above its noise
_OPEN = 0.9  # chance of being open that the gates start with
_BOUNDS = (0.02, 0.98)  # of that chance in training: a gate that never moves cannot be learned
_CONTEXT_EXAMPLES = 2048  # of a context are looked at for its z


class Subsets:
    """Draws contexts: random sets of groups, all groups now and then.

    Args:
        groups: targets -> integer group of each example `[n]`; default the targets themselves, classes.
        everything: share of steps on the context of all groups.
        excluded: sets of groups that are never drawn.
    """

    def __init__(
        self, groups: Callable[[Any], Tensor] | None = None, *, everything: float = 0.2, excluded: Collection[Collection[int]] = ()
    ):
        self.groups, self.everything = groups, everything
        self.excluded = {frozenset(e) for e in excluded}

    def __call__(self, targets: Any) -> Tensor:
        """Members of a new context, bool `[n]`.

        Raises:
            MiracleError: the groups are not one integer for each example.
        """
        group = self.groups(targets) if self.groups else targets
        if not isinstance(group, Tensor) or group.dim() != 1 or group.is_floating_point():
            raise MiracleError(
                "contexts are sets of classes, but the targets are not classes: give BayesianAttention(contexts=Subsets(groups))"
            )
        present = group.unique()
        if float(torch.rand((), device="cpu")) < self.everything and frozenset(present.tolist()) not in self.excluded:
            return torch.ones_like(group, dtype=torch.bool)
        for _ in range(100):
            size = int(torch.randint(1, max(2, len(present)), (), device="cpu"))
            chosen = present[torch.randperm(len(present), device="cpu")[:size]]
            if frozenset(chosen.tolist()) not in self.excluded:
                return torch.isin(group, chosen)
        raise MiracleError("every set of groups is excluded: no context is left to train on")


def importance(log_density: Tensor) -> Tensor:
    """Equation 12: rho_i = n rho(s_i|z) / sum_j rho(s_j|z), mean one, shape `[n]`, from log rho(s_i|z) up to a constant."""
    return len(log_density) * log_density.softmax(0)


def product_of_experts(mean: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian proportional to N(0, I) times one factor for each row: mean and standard deviation `[d]` of `[n, d]`."""
    total = 1.0 + precision.sum(0)
    return (precision * mean).sum(0) / total, total.rsqrt()


def add_evidence(prior_precision: Tensor, power: Tensor, precision: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 18 and 20 for Gaussians: mean and precision of the prior N(0, 1/prior_precision) times evidence to a power.

    The evidence is given by its natural parameters, precision and eta = precision * mean. If it widens the prior (negative
    precision) it counts at most once, so that the result stays a distribution.
    """
    power = torch.where(precision < 0, power.clamp(max=1.0), power)
    total = prior_precision + power * precision
    return power * eta / total, total


def correlations(model: nn.Module, loss: Callable, training: tuple[Any, Any], prediction: tuple[Any, Any]) -> Tensor:
    """Right side of equation 17: sum_j sigma_j^2 dl(a_i|s_i)/dw_j dl(a|s)/dw_j at the posterior means, shape `[n]`.

    Args:
        model: a converted model.
        loss: mean nats of outputs and targets.
        training: (inputs, targets) of n training examples.
        prediction: (inputs, targets) of the prediction examples; their mean loss is l(a|s).
    """
    laws = [p.law() for p in posteriors(model).values()]
    means = [law.mean.detach() for law in laws]
    ahead = torch.func.grad(lambda weights: loss_at(model, weights, loss, *prediction))(means)
    moved = [g * (2 * law.log_std.detach()).exp() for g, law in zip(ahead, laws, strict=True)]
    each = example_gradients(model, means, loss, *training)
    return torch.stack([(g * m).flatten(1).sum(1) for g, m in zip(each, moved, strict=True)]).sum(0)


class _Bounded(torch.autograd.Function):
    """Clamp to [0, 1]; gradients that lead back inside pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        outwards = ((x >= 1) & (gradient < 0)) | ((x <= 0) & (gradient > 0))
        return gradient.masked_fill(outwards, 0.0)


class _Prototypes(nn.Module):
    """How one tensor's evidence is shared out over the prototypes, and how far their means lie from the common one.

    Both are so centred that uniform attention gives the tensor's own posterior, exactly.
    """

    def __init__(self, posterior: Posterior, count: int):
        super().__init__()
        self.share = nn.Parameter(0.01 * torch.randn(count, *posterior.kept))
        self.shift = nn.Parameter(torch.zeros(count, *posterior.kept))

    def forward(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Power of the evidence and shift of its mean, live shape, from attention `[M]` with mean one."""
        share = self.share.softmax(0)
        shift = self.shift - (share * self.shift).sum(0)
        weight = attention.reshape(-1, *[1] * (share.dim() - 1)) * share
        power = weight.sum(0)
        return power, (weight * shift).sum(0) / power


class BayesianAttention(nn.Module):
    """Conditions the posteriors of a converted model on context: `fit(model, ..., attention=BayesianAttention(net))`.

    Args:
        features: module from a batch of inputs to features, `[n, ...]`; the trained network itself does well. It is not trained.
        latent: dimensions of z.
        prototypes: M; 1 leaves only gates.
        gated: gates on units.
        contexts: draws the contexts to train on; default `Subsets()`, random sets of classes.
        hidden: width of the own networks.
        thrift: power of 1 / the context's share of the examples that its KL is weighted with in training: 0 for one beta everywhere,
            1 to let a context offer the evidence of its own examples only. More closes more gates, at the general package's cost.
        examples_correlated: training examples of each step for which equation 17 is computed.
        every: steps between such computations.
    """

    general: Tensor
    step: Tensor

    def __init__(
        self,
        features: nn.Module,
        *,
        latent: int = 16,
        prototypes: int = 1,
        gated: bool = True,
        contexts: Contexts | None = None,
        hidden: int = 64,
        thrift: float = 0.0,
        examples_correlated: int = 16,
        every: int = 4,
    ):
        super().__init__()
        if not isinstance(features, nn.Module):
            raise MiracleError(f"features must be the trained network itself, an nn.Module, not a value of type {type(features).__name__}")
        if latent < 1 or prototypes < 1:
            raise MiracleError(f"latent and prototypes must be positive, not {latent} and {prototypes}")
        self.num_prototypes, self.gated, self.thrift, self.contexts = prototypes, gated, thrift, contexts or Subsets()
        self.examples_correlated, self.every, self.hidden, self.latent = examples_correlated, every, hidden, latent
        self.backbone = copied(features).eval().requires_grad_(False)
        self.expert = nn.Sequential(nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))  # mean and log precision
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.register_buffer("general", torch.zeros(latent))  # z of the context of everything
        self.prototype = nn.Parameter(0.1 * torch.randn(prototypes, latent)) if prototypes > 1 else None
        self.shares: nn.ModuleList | None = None
        self.gate_network: nn.Sequential | None = None
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.is_general = False  # whether the latest step was on the context of everything
        self.kl_weight = 1.0  # of the latest step
        self.z = self.general  # of the latest step

    # --- the networks ---------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, inputs: Any) -> None:
        """Build what depends on the model's live units and the inputs' shape. `fit` calls it, after narrowing."""
        if self.shares is not None:
            raise MismatchError("this BayesianAttention belongs to a model already: make a new one for another model")
        links = conversion(model).links
        held = posteriors(model)
        self.units: dict[str, int] = {}  # module -> output units with a gate
        self.hidden_units = {link.producer for link in links}
        self.readers = {f"{link.consumer}.weight": (link.producer, link.multiplicity) for link in links}
        for name, p in held.items():
            module = name.rpartition(".")[0]
            sizes = {q.kept[0] for n, q in held.items() if n.rpartition(".")[0] == module and q.kept}
            if p.mean.dim() > 1 and len(sizes) == 1:  # axis 0 of all its tensors counts the same units
                self.units[module] = p.kept[0]
        device = next(model.parameters()).device
        self.to(device)
        with torch.no_grad():
            self.expert(self.features(inputs))
            last: Any = self.expert[2]
            last.weight[: self.latent].mul_(_FIRST_SPREAD)
        if self.gated:
            self.gate_network = nn.Sequential(
                nn.Linear(self.latent, self.hidden), nn.ReLU(), nn.Linear(self.hidden, sum(self.units.values()))
            ).to(device)
            with torch.no_grad():
                last = self.gate_network[2]
                last.weight.mul_(0.1)
                last.bias.fill_(_OPEN)
        many = self.num_prototypes > 1
        self.shares = nn.ModuleList([_Prototypes(p, self.num_prototypes) for p in held.values()] if many else []).to(device)
        model.__dict__["bayesian_attention"] = self  # not a submodule: containers would call it

    def features(self, inputs: Any) -> Tensor:
        """What the networks of z see of a batch of inputs, `[n, h]`."""
        self.backbone.eval()
        with torch.no_grad():
            found = self.backbone(inputs).flatten(1).float()
        return F.layer_norm(found, found.shape[1:])

    def experts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """One factor of q(z|s) for each input: mean and precision, each `[n, latent]`."""
        mean, log_precision = self.expert(features).chunk(2, 1)
        return mean, log_precision.clamp(-8, 8).exp()

    def encode(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """q(z|s) of a context: mean and standard deviation, each `[latent]`, of a batch of its inputs (eqs 14, 15)."""
        return product_of_experts(*self.experts(self.features(inputs)))

    def log_density(self, seen: Tensor, z: Tensor) -> Tensor:
        """Logarithm of rho(s|z) up to a constant, `[n]`: an exponential family whose statistics are the experts' means, `[n, latent]`."""
        return seen @ (z + self.decoder(z))

    def importance(self, inputs: Any, z: Tensor) -> Tensor:
        """rho_i(z) of a batch of training inputs, `[n]`, mean one (equation 12)."""
        return importance(self.log_density(self.experts(self.features(inputs))[0], z))

    def attention(self, z: Tensor) -> Tensor:
        """alpha_m(z) over the prototypes, `[M]`, mean one."""
        if self.prototype is None:
            return torch.ones(1, device=z.device)
        return importance(self.log_density(self.prototype, z))

    def chances(self, z: Tensor) -> dict[str, Tensor]:
        """Of each module's units being open, `[units]`."""
        if self.gate_network is None:
            return {}
        return dict(zip(self.units, _Bounded.apply(self.gate_network(z)).split(list(self.units.values())), strict=True))

    def gates(self, z: Tensor) -> dict[str, Tensor]:
        """How open the units of each module are, `[units]`: 0 or 1 for hidden units, in between for others."""
        return {m: (c >= 0.5).float() if m in self.hidden_units else c for m, c in self.chances(z).items()}

    # --- posteriors given z ---------------------------------------------------------------------------------------------

    def laws(self, model: nn.Module, z: Tensor, *, relaxed: bool = False) -> dict[str, Law]:
        """Q(w|z) of every tensor (equations 18 and 20).

        Args:
            model: that this belongs to.
            z: `[latent]`.
            relaxed: draw the gates of hidden units, and count a unit's KL by the chance that it is open.
        """
        gates, chance = self.gates(z), {}
        if relaxed:
            chance = self.chances(z)
            for module in (m for m in chance if m in self.hidden_units):  # in their order: the draws follow from the seed
                c = chance[module]
                gates[module] = (torch.rand_like(c) < c.clamp(*_BOUNDS)).float() + c - c.detach()  # gradients pass straight through
        chance = chance or gates
        assert self.shares is not None
        attention, found = self.attention(z), {}
        for number, (name, p) in enumerate(posteriors(model).items()):
            module, ones = name.rpartition(".")[0], [1] * (p.mean.dim() - 1)
            power: Tensor | None
            power, shift = self.shares[number](attention) if len(self.shares) else (None, 0.0)
            share = scale = None
            if module in self.hidden_units and gates:
                share = chance[module].reshape(-1, *ones)
            elif module in gates:
                own = gates[module].reshape(-1, *ones)
                power = own if power is None else power * own
            if name in self.readers and gates:
                producer, multiplicity = self.readers[name]
                scale, open_ = (g[producer].repeat_interleave(multiplicity).reshape(1, -1, *ones[1:]) for g in (gates, chance))
                share = open_ if share is None else share * open_
            mean: Tensor = p.mean
            log_std: Tensor = p.log_std
            if power is not None:
                prior_precision, own_precision = 1.0 / p.group_second_moment(), (-2 * p.log_std).exp()
                evidence = own_precision - prior_precision
                eta = own_precision * p.mean + evidence.clamp_min(0.0) * shift  # at power 1 the posterior's own mean comes out
                mean, precision = add_evidence(prior_precision, power, evidence, eta)
                log_std = -0.5 * precision.log()
            found[name] = Law(mean, log_std, scale, share)
        return found

    def condition(self, model: nn.Module, z: Tensor, *, relaxed: bool = False) -> None:
        """Let every posterior of `model` be the one given z, until told otherwise; `relaxed` as in `laws`."""
        for p, law in zip(posteriors(model).values(), self.laws(model, z, relaxed=relaxed).values(), strict=True):
            p.conditional = law

    # --- training -------------------------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: tuple[Any, Any], loss: Callable, num_examples: int) -> tuple[Tensor, Tensor]:
        """One step: draw a context and its z, leave `model` conditioned on z, and `kl_weight` set.

        Returns the importance-weighted loss, mean over the batch (equations 13 and 24), and the terms of z: the bound on the
        context's likelihood, for each of its inputs (equations 15 and 25; of all `num_examples` training inputs the context has as
        large a share as of the batch), and the cross-correlation with the prediction's loss (equations 17, 19 and 28). In 28 the
        paper leaves out the minus sign that 19 has.
        """
        inputs, targets = batch
        member = self.contexts(targets)
        self.is_general = bool(member.all())
        rows = torch.nonzero(member).squeeze(1)
        if not len(rows):
            raise MiracleError("the context that was drawn has no example in the batch: `contexts` must choose one at least")
        self.kl_weight = (len(member) / len(rows)) ** self.thrift
        rows = rows[torch.randperm(len(rows), device=rows.device)]
        half = max(1, len(rows) // 2)
        context, ahead = rows[:half], rows[half:] if len(rows) > 1 else rows
        seen, precision = self.experts(self.features(inputs))
        mean, std = product_of_experts(seen[context], precision[context])
        z = mean + std * torch.randn_like(std)
        self.z = z.detach()
        log_rho = self.log_density(seen, z).log_softmax(0) + math.log(len(member))
        kl_z = 0.5 * (mean.square() + std.square() - 1.0).sum() - std.log().sum()
        extra = kl_z / (len(rows) / len(member) * num_examples) - log_rho[ahead].mean()
        self.condition(model, z, relaxed=True)
        rho = log_rho.exp()
        self.step += 1
        if self.examples_correlated and int(self.step) % self.every == 0:
            some = torch.randperm(len(member), device=rows.device)[: self.examples_correlated]
            found = correlations(model, loss, (inputs[some], targets[some]), (inputs[ahead], targets[ahead]))
            extra = extra - (found * rho[some]).mean()
        kept = torch.nonzero(rho.detach() > _NEGLIGIBLE).squeeze(1)
        if not len(kept):
            raise MiracleError("the importance of the batch's examples is NaN: lower the learning rate, or check the data for NaN")
        outputs, own = model(inputs[kept]), targets[kept]
        each = torch.func.vmap(lambda o, t: loss(o[None], t[None]))(outputs, own)
        return (rho.detach()[kept] * each).sum() / len(member), extra

    @torch.no_grad()
    def kl_nats(self, model: nn.Module) -> float:
        """KL at the latest step's z, with each hidden unit's gate open or closed as it is in use: what a package has to pay for."""
        self.condition(model, self.z)
        return float(sum(p.kl() for p in posteriors(model).values()))

    @torch.no_grad()
    def settle(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Find z of the context of everything, and leave `model` conditioned on it."""
        self.general.copy_(self.latent_of(batches))
        distributed.synchronise([self.general])
        self.condition(model, self.general)

    # --- use ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latent_of(self, context: Any) -> Tensor:
        """Mean of q(z|s), `[latent]`, of a context: a tensor of inputs, or batches of which the inputs are taken."""
        device = self.general.device
        found = torch.cat([self.features(b.to(device)) for b in batches_of(context, _CONTEXT_EXAMPLES)])
        return product_of_experts(*self.experts(found))[0]

    @torch.no_grad()
    def teacher(self, model: nn.Module, context: Any) -> Callable[[Any], Tensor]:
        """Outputs at the mean of z and of the weights in a context; class scores are corrected by the classes' frequency in it."""
        run = mean_network(self.specialise(model, context, drop=False))
        outputs = torch.cat([run(b.to(self.general.device)) for b in batches_of(context, _CONTEXT_EXAMPLES)])
        shift = class_shift(outputs) if are_scores(outputs) else torch.zeros((), device=outputs.device)
        return lambda inputs: run(inputs) + shift

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """Outputs for a batch that is its own context, at the mean of z and of the weights (the paper's section 4, at its end)."""
        self.condition(model, self.encode(inputs)[0])
        with use_mode(model, "mean"):
            outputs = model(inputs)
        self.condition(model, self.general)
        return outputs

    @torch.no_grad()
    def specialise(self, model: nn.Module, context: Any = None, *, drop: bool = True) -> nn.Module:
        """A copy of `model` for one context, an ordinary converted model.

        Args:
            model: trained by `fit(..., attention=self)`; left alone.
            context: inputs, as in `latent_of`; None for the context of everything.
            drop: leave out the hidden units that the gates close.
        """
        z = self.general if context is None else self.latent_of(context)
        laws = self.laws(model, z)
        net = detached_copy(model)
        for name, p in posteriors(net).items():
            law = laws[name]
            p.mean.copy_(law.mean if law.scale is None else law.mean * law.scale)
            p.log_std.copy_(law.log_std)
        chance = self.chances(z)
        for link in conversion(net).links if chance and drop else ():
            keep = torch.nonzero(chance[link.producer] >= 0.5).squeeze(1)
            if len(keep) < len(chance[link.producer]):
                drop_units(net, link, keep if len(keep) else chance[link.producer].argmax()[None])
        return net


def detached_copy(model: nn.Module) -> nn.Module:
    """A copy of a converted model without its attention, at its unconditional posteriors."""
    held = {p: p.conditional for p in posteriors(model).values()}
    attention = model.__dict__.pop("bayesian_attention", None)
    for p in held:
        p.conditional = None
    try:
        return copied(model)
    finally:
        for p, law in held.items():
            p.conditional = law
        if attention is not None:
            model.__dict__["bayesian_attention"] = attention
