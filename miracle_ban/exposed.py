"""The linear maps inside attention and recurrent layers as modules of their own, so that what goes into them can be measured.

`nn.MultiheadAttention`, torchvision's windowed attention, `nn.LSTM`, `nn.GRU` and `nn.RNN` keep the weights of several linear maps and
multiply by them where no module is called. Here these are modules that are called on what the maps multiply.
Leans on `layers`, `measure`, `network` and torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import MiracleError
from .layers import Posterior, drawing_class, posteriors, use_mode
from .measure import through
from .network import evaluating

_SAME = 1e-6  # squared difference of outputs, relative


def exposed(model: nn.Module, example: Any) -> nn.Module:
    """A network that computes the same with the same posteriors, its inner linear maps being modules.

    Args:
        model: from `convert`; left alone, and given back where it has no such maps, or uses them in other ways than torch does.
        example: a batch of inputs.

    Returns:
        A view: it shares all tensors with `model`. A module of it whose posteriors those of its maps are, too, names them in `doubled`.
    """
    if not any(_exposing(m) for m in model.modules()):
        return model
    shared: dict[int, Any] = {id(p): p for p in posteriors(model).values()}
    shared |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, shared)
    for module in list(view.modules()):
        expose = _exposing(module)
        if expose is not None:
            expose(module)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else it may hand all its weights to one fused kernel
    return view if _compute_alike(model, view, example) else model


@torch.no_grad()
def _compute_alike(model: nn.Module, view: nn.Module, example: Any) -> bool:
    """A network may read a layer's weights, or call it, in ways that nothing here knows of."""
    outputs = []
    for net in (model, view):
        try:
            with evaluating(net), use_mode(net, "mean"):
                outputs.append([t for t in tree_leaves(through(net, example)) if isinstance(t, Tensor) and t.is_floating_point()])
        except MiracleError:
            return False
    shapes = [[t.shape for t in found] for found in outputs]
    return shapes[0] == shapes[1] and all(bool((a - b).square().sum() <= _SAME * a.square().sum()) for a, b in zip(*outputs, strict=True))


def _exposing(module: nn.Module) -> Callable[[Any], None] | None:
    """What exposes the maps inside a module, if it has any."""
    last = getattr(module, "out_proj", getattr(module, "proj", None))
    if isinstance(last, nn.Linear) and isinstance(module, nn.MultiheadAttention):
        return _expose_attention
    windows = any(c.__name__ == "ShiftedWindowAttention" and c.__module__.startswith("torchvision.") for c in type(module).__mro__)
    if isinstance(last, nn.Linear) and windows:
        return _expose_windows
    if isinstance(module, nn.RNNBase) and "posterior" in module._modules:
        return _expose_recurrence
    return None


def _held(module: nn.Module) -> dict[str, Any]:
    return dict(module.posterior.named_children()) if "posterior" in module._modules else {}  # type: ignore[operator,union-attr]


def _become(module: nn.Module, kind: type) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (kind, cls), {})


def _with_posteriors(layer: nn.Module, weight: Posterior, bias: Posterior | None) -> nn.Module:
    """A layer that computes with these; it has no bias where that has no posterior."""
    held = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    layer._parameters.clear()
    if bias is None:
        layer.register_parameter("bias", None)
    layer.posterior = nn.ModuleDict(held)
    layer.__class__ = drawing_class(type(layer), tuple(held))
    return layer


def _linear(kind: type[nn.Linear], weight: Posterior, bias: Posterior | None) -> nn.Module:
    rows, columns = weight.full_shape
    return _with_posteriors(kind(columns, rows, device="meta"), weight, bias)


class _Projections(nn.Conv1d):
    """Queries, keys and values from what they are made of, `[n, 3 E, places]`, by weights `[3 E, E]`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight[:, :, None], self.bias, groups=self.groups)


class _Attention:
    """Attention whose projections are the modules `into`, or those in `maps`, and `out_of`."""

    batch_first: bool
    into: nn.Module | None
    maps: nn.ModuleDict
    out_of: nn.Module

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if self.into is not None and not query.is_nested:
            own = [self._channels_in_the_middle(x) for x in (query, key, value)]
            places = torch.arange(max(x.shape[2] for x in own), device=query.device)
            self.into(torch.cat([x[:, :, places % x.shape[2]] for x in own], 1))
        for projection, x in zip(self.maps.values(), (query, key, value), strict=False):
            projection(x)
        attended, weights = super().forward(query, key, value, *args, **options)  # type: ignore[misc]
        return self.out_of(attended), weights

    def _channels_in_the_middle(self, x: Tensor) -> Tensor:
        return x.T[None] if x.dim() == 2 else x.mT if self.batch_first else x.permute(1, 2, 0)


class _WindowedAttention:
    """Attention within windows whose projections are the modules `qkv` and `out_of`."""

    qkv: nn.Module
    out_of: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        self.qkv(x)
        return self.out_of(super().forward(x))  # type: ignore[misc]


def _expose_attention(module: Any) -> None:
    held = _held(module)
    weight, bias = held.get("in_proj_weight"), held.get("in_proj_bias")
    separate = [name for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") if name in held]  # keys of another size
    module.into, module.doubled = None, set(separate)
    module.maps = nn.ModuleDict({name: _linear(nn.Linear, held[name], None) for name in separate})
    if weight is not None:
        size = module.embed_dim
        module.into = _with_posteriors(_Projections(3 * size, 3 * size, 1, groups=3, device="meta"), weight, bias)
        module.doubled = {"in_proj_weight", "in_proj_bias"}
    module.out_of, module.out_proj = module.out_proj, _identity(module.out_proj)
    _become(module, _Attention)


def _expose_windows(module: Any) -> None:
    module.out_of, module.proj = module.proj, _identity(module.proj)
    _become(module, _WindowedAttention)


def _identity(layer: Any) -> nn.Linear:
    """In the place of a layer whose weights are read, not called."""
    identity = nn.Linear(layer.in_features, layer.in_features).to(layer.weight).requires_grad_(False)
    nn.init.eye_(identity.weight)
    nn.init.zeros_(identity.bias)
    return identity


class StateMap(nn.Linear):
    """What a recurrent layer multiplies its states by: other weights here, and other states come in at the next step."""


class _Recurrence:
    """A recurrent layer that shows what its weights multiply to the modules in `maps`, before it computes."""

    maps: nn.ModuleDict

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, Tensor):
            self._show(input, hx)
        return super().forward(input, hx)  # type: ignore[misc]

    def _show(self: Any, inputs: Tensor, state: Any) -> None:
        """Run the layers one by one, with time on the first axis and examples on the second."""
        run = getattr(torch, self.mode.lower())
        x = inputs[:, None] if inputs.dim() == 2 else inputs.transpose(0, 1) if self.batch_first else inputs
        states = state if isinstance(state, tuple) else () if state is None else (state,)
        if inputs.dim() == 2:
            states = tuple(s[:, None] for s in states)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        states = states or tuple(x.new_zeros(len(self._all_weights), x.shape[1], size) for size in sizes)
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            outputs = []
            for k in range(layer * directions, (layer + 1) * directions):
                backwards = k % directions == 1
                own = x.flip(0) if backwards else x
                first = tuple(s[k : k + 1].contiguous() for s in states)
                names = self._all_weights[k]
                weights = [getattr(self, name) for name in names]
                y = run(own, first if len(first) == 2 else first[0], weights, self.bias, 1, 0.0, False, False, False)[0]
                seen = [own, torch.cat([first[0], y[:-1]])]
                if self.proj_size:
                    seen.append(_unprojected(*seen, first[1][0], *weights))
                for name, multiplied in zip((name for name in names if name.startswith("weight")), seen, strict=True):
                    if name in self.maps:
                        self.maps[name](multiplied)
                outputs.append(y.flip(0) if backwards else y)
            x = torch.cat(outputs, -1)


def _unprojected(inputs: Tensor, before: Tensor, cell: Tensor, into: Tensor, back: Tensor, *others: Tensor) -> Tensor:
    """Outputs of an LSTM `[time, n, hidden]` before they are projected, from states one step before (Sak et al. 2014, arXiv 1402.1128)."""
    biases = others[:2] if len(others) == 3 else (None, None)
    gates = F.linear(inputs, into, biases[0]) + F.linear(before, back, biases[1])
    outputs = []
    for i, f, g, o in (step.chunk(4, -1) for step in gates):
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        outputs.append(o.sigmoid() * cell.tanh())
    return torch.stack(outputs)


def _expose_recurrence(module: Any) -> None:
    held = _held(module)
    biases = {name: name.replace("weight", "bias") for name in held if name.startswith("weight")}
    module.maps = nn.ModuleDict()
    for name, bias in biases.items():
        module.maps[name] = _linear(nn.Linear if name.startswith("weight_ih") else StateMap, held[name], held.get(bias))
    module.doubled = {*biases, *biases.values()}
    _become(module, _Recurrence)
