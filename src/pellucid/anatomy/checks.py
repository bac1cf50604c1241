"""The measuring instruments of the proofs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.experts import routed, written_by
from pellucid.anatomy.parallel import parts_of
from pellucid.anatomy.weights import linear_map
from pellucid.anatomy.wiretap import explicit_attention
from pellucid.errors import Refused

# Largest relative error each dtype is allowed. Eager attention takes its softmax in float32 whatever the model's dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the largest magnitude of `b`."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.dtype == b.dtype and torch.equal(a, b):  # as most are, number for number
        return 0.0
    a, b = a.double(), b.double()
    finite = b.abs() < 1e30  # masked scores and logits are the same on both sides or not compared
    if not bool(finite.all()):
        a, b = a[finite], b[finite]
    return float((a - b).abs().max()) / size(b) if b.numel() else 0.0


class Off(float):
    """An error that may be as large as a module's own rounding (`allowed`) where that is more than a dtype's."""

    allowed: float = 0.0

    @classmethod
    def of(cls, error: float, allowed: float) -> Off:
        made = cls(error)
        made.allowed = min(allowed, COARSEST)
        return made


COARSEST = 5e-2  # no rounding of a quantised module excuses more


def size(x: Tensor) -> float:
    """The largest magnitude (what is smaller than 1e-4 throughout counts as that large: there is nothing to
    compare).
    """
    return max(1e-4, float(x.abs().max()))


def mixture_error(source: Tensor, made: Tensor, streams: int) -> float:
    """How far `made` is, token by token, from a linear combination of the source's streams; both [b, p,
    streams * d].
    """
    x, y = (t.double().unflatten(-1, (streams, -1)) for t in (source, made))
    weights = y @ torch.linalg.pinv(x)
    return error(weights @ x, y)


def spread(x: Tensor) -> Tensor:
    """How much a tensor [b, p, ...] differs from its first position, relative to its size."""
    return (x - x[:1, :1]).abs() / size(x)


class Beside:
    """A listener that runs our attention and our experts beside the native kernels, on the same inputs, and
    compares.

    Nothing adds up from layer to layer here, so rounding cannot hide a difference or flip a router's choice.
    """

    def __init__(self) -> None:
        self.errors: dict[tuple[nn.Module, int], float | str] = {}  # (module, which call of it)
        self._times: Counter[nn.Module] = Counter()

    def key(self, module: nn.Module) -> tuple[nn.Module, int]:
        self._times[module] += 1
        return module, self._times[module] - 1

    def attention(
        self,
        native: Callable[..., Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        **kw: Any,
    ) -> tuple[Tensor, Tensor | None]:
        z, pattern = native(module, q, k, v, mask, **kw)
        key = self.key(module)
        try:
            self.errors[key] = error(explicit_attention(module, q, k, v, mask, lambda _, x: x, **kw)[0], z)
        except Refused as refused:
            self.errors[key] = str(refused)
        return z, pattern

    def experts(
        self,
        native: Callable[..., Any],
        module: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """The native output against the sum of the experts' contributions, and against neurons @ W_down *
        weight.
        """
        out = native(module, hidden_states, top_k_index, top_k_weights)
        sums = {"expert_out": torch.zeros_like(out).view(-1, out.shape[-1])}
        sums["by weights"] = sums["expert_out"].clone()
        router: dict[int, Tensor] = {}

        def meet(port: str, e: int | None, x: Tensor) -> Tensor:
            if e is None:
                router.update(enumerate(x.unbind(1)))
            elif port == "expert_neurons":
                sums["by weights"] += written_by(module, e, x) * router[e][:, None]
            else:
                sums[port] += x
            return x

        ours = routed(module, hidden_states, top_k_index, top_k_weights, meet, set(range(module.num_experts)))
        parts = parts_of(module)
        made, ours = (x if parts is None else parts.summed(x) for x in (out, ours))  # a process returns its share
        self.errors[self.key(module)] = max(error(x.view_as(out), made) for x in (ours, *sums.values()))
        return out


@contextlib.contextmanager
def without_heads(modules: dict[str, nn.Module], heads: dict[str, tuple[int, int, tuple[int, ...]]]) -> Iterator[None]:
    """Output projections with the rows of one head switched off: name -> (head, its width, shape of a token's
    input).

    Plain weights are replaced by zeroed copies. What holds none (quantised, offloaded) has that head's share,
    found by calling it on the identity, taken off its output.
    """
    with contextlib.ExitStack() as stack:
        for name, (h, e, shape) in heads.items():
            module, rows = modules[name], slice(h * e, (h + 1) * e)
            weight = module._parameters.get("weight")
            matrix, _ = linear_map(module, shape)
            if weight is not None and shares_memory(matrix, weight):
                zeroed = weight.detach().clone()
                inputs_first = matrix.stride()[:2] == weight.stride()[:2]
                zeroed[rows if inputs_first else (slice(None), rows)] = 0
                stack.callback(module._parameters.__setitem__, "weight", weight)
                module._parameters["weight"] = nn.Parameter(zeroed, requires_grad=False)
            else:
                share = matrix[rows]
                hook = module.register_forward_hook(lambda m, args, out, r=rows, s=share: less(out, args[0], r, s))
                stack.callback(hook.remove)
        yield


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and not b.is_meta and a.data_ptr() == b.data_ptr()


def less(out: Tensor, given: Tensor, rows: slice, share: Tensor) -> Tensor:
    """A projection's output without the share of some of its inputs."""
    return out - (given.reshape(*out.shape[:2], -1)[..., rows] @ share).view(out.shape)
