"""Work on a GPU recorded once and replayed: in a step of training a small network most of the time goes into starting its kernels.

Leans on torch only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import MiracleWarning

_EAGER_CALLS = 3  # before recording: libraries choose and prepare their kernels


class Recorded:
    """A function from tensors to a tensor, recorded as a CUDA graph in its fourth call and replayed from then on.

    What else the function reads and writes must stay where it is in memory; its gradients do. Calls with tensors of other shapes are
    made as they are, and so are all calls if it cannot be recorded, because it reads what a GPU has not computed yet.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls = function, 0
        self.replay: Callable[[], None] | None = None
        self.layout: list[object] = []
        self.inputs: list[Tensor] = []
        self.output = torch.empty(0)
        self.stream = torch.cuda.Stream()

    def __call__(self, *args: Tensor) -> Tensor:
        """The function's result."""
        layout: list[object] = [(a.shape, a.dtype, a.stride(), a.device) if isinstance(a, Tensor) else type(a) for a in args]
        if self.calls < 0 or not all(isinstance(a, Tensor) and a.is_cuda for a in args):
            return self.function(*args)
        if self.calls < _EAGER_CALLS:
            self.calls = self.calls + 1 if layout == self.layout else 1
            self.layout = layout
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if layout != self.layout:
            return self.function(*args)
        if self.replay is None and not self._record(args):
            return self.function(*args)
        assert self.replay is not None
        for held, given in zip(self.inputs, args, strict=True):
            held.copy_(given)
        self.replay()
        return self.output.clone()

    def _record(self, args: tuple[Tensor, ...]) -> bool:
        self.inputs = [a.clone() for a in args]
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            self.calls = -1
            warnings.warn(f"steps are not recorded as a CUDA graph, and slower: {str(error)[:200]}", MiracleWarning, stacklevel=2)
            return False
        self.replay = graph.replay
        return True
