"""What does each expert of a mixture do? One routed implementation of the experts interface that can be met
and edited.

    router  [token, expert]  routing weights, zero where an expert was not selected
    neurons of expert e      act(gate) * up, [token, neuron], zero where it was not selected
    out of expert e          router[:, e] * (neurons @ W_down + bias, through the post-expert norm if any)

The result is the sum of `out` over experts. It is used in place of the native kernel only while somebody
listens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.anatomy.parallel import Parts, parts_of, whole
from pellucid.errors import Refused

EXPERT_PORTS = ("router", "expert_neurons", "expert_out")

Meet = Callable[[str, int | None, Tensor], Tensor]  # port, expert, tensor -> the tensor to go on with


@dataclass(frozen=True)
class Experts:
    """The experts of a block: the module the interface dispatches for, and their sizes."""

    module: str
    nth: int
    count: int
    selected: int  # per token
    d_neurons: int


def describe(module: Any, name: str, nth: int, index: Tensor) -> Experts:
    down = module.down_proj
    width = down.shape[1 if module.is_transposed else 2]
    parts = None if hasattr(down, "full_tensor") else parts_of(module)
    return Experts(name, nth, module.num_experts, index.shape[-1], width * (parts.size if parts else 1))


def routed(
    experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, meet: Meet, wanted: set[int]
) -> Tensor:  # fmt: skip
    """Run the experts one by one, handing the router's weights and every wanted expert's tensors to `meet`.

    hidden [..., d_model]; index and weights [token, selected]. An edited router selects anew: the highest
    weights.
    """
    shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
    n, parts = experts.num_experts, parts_of(experts)
    if parts is not None and (experts.has_bias or _normed(experts)):
        raise Refused(
            "experts with a bias or a norm of their own cannot be met where they are split over processes: use device_map"
        )
    router = weights.new_zeros(len(hidden), n + 1)  # one column more: expert-parallel padding points past the end
    router = router.scatter_add(1, index.clamp(max=n), weights)[:, :n]
    if parts is not None:
        router = parts.once(router)
    chosen = torch.zeros_like(router, dtype=torch.bool).scatter(1, index.clamp(max=n - 1), index < n)
    edited = meet("router", None, router)
    if edited is not router:
        router, best = edited, edited.topk(index.shape[-1], -1).indices
        chosen = torch.zeros_like(chosen).scatter(1, best, True) & (router != 0)
    if parts is not None:
        router = parts.heard(router)
    out = torch.zeros_like(hidden)
    for e in sorted(wanted | set(chosen.any(0).nonzero().flatten().tolist())):
        tokens = chosen[:, e].nonzero().flatten()
        neurons = _neurons(experts, e, hidden[tokens])
        if e in wanted:
            spread = _spread(neurons if parts is None else parts.gathered(neurons), tokens, len(hidden))
            neurons = meet("expert_neurons", e, spread)[tokens]
            neurons = neurons if parts is None else parts.own(neurons)
        made = _written(experts, e, neurons) * router[tokens, e, None]
        if e in wanted:
            made = made.to(out.dtype) if parts is None else parts.summed(made.to(out.dtype))
            met = meet("expert_out", e, _spread(made, tokens, len(hidden)))
            out = out + (met if parts is None else parts.shared(met))
        else:
            out = out.index_add(0, tokens, made.to(out.dtype))
    return out.view(shape)


def _spread(rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Rows of the selected tokens among zeros for all tokens."""
    return rows.new_zeros(count, rows.shape[-1]).index_copy(0, tokens, rows)


def neurons_of(experts: Any, e: int, x: Tensor) -> Tensor:
    """The neurons of expert `e` for inputs [token, d_model]."""
    parts = _inside(experts)
    made = _neurons(experts, e, x)
    return made if parts is None else parts.gathered(made)


def written_by(experts: Any, e: int, neurons: Tensor) -> Tensor:
    """What expert `e` writes for neurons [token, neuron], before the routing weight."""
    parts = _inside(experts)
    return _written(experts, e, neurons) if parts is None else parts.summed(_written(experts, e, parts.own(neurons)))


def _inside(experts: Any) -> Parts | None:
    """How experts are split, where their weights are this process's own: inside their forward pass."""
    return None if hasattr(experts.down_proj, "full_tensor") else parts_of(experts)


def _neurons(experts: Any, e: int, x: Tensor) -> Tensor:
    gated = hasattr(experts, "gate_up_proj")
    up = _linear(experts, "gate_up_proj" if gated else "up_proj", e, x)
    return experts._apply_gate(up) if gated else experts.act_fn(up)


def _written(experts: Any, e: int, neurons: Tensor) -> Tensor:
    out = _linear(experts, "down_proj", e, neurons)
    return experts.post_expert_norm(out) if _normed(experts) else out


def _normed(experts: Any) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # transformers says so since 5.20


def _linear(experts: Any, name: str, e: int, x: Tensor) -> Tensor:
    weight = whole(getattr(experts, name))[e]
    bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)
