"""What the graph of a traced pass says: sums, factors, norms, constants, and where a value came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.trace import OPAQUE, Trace, Value


class Body(nn.Module):
    """A module with a few parts whose forward is given by the test."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm, self.gain = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.randn(4))
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def traced(forward: Callable[[Any, Tensor], Tensor]) -> tuple[Trace, Value, Value]:
    """The trace, the value that went in and the one that came out."""
    module, x = Body(forward), torch.randn(2, 3, 4)
    with torch.no_grad(), Trace(module) as t:
        out = module(x)
    return t, t.value_of(x), t.value_of(out)


def terms(forward: Callable[[Any, Tensor], Tensor]) -> list[Any]:
    """Coefficients of the input and of everything else in the output."""
    _, given, made = traced(forward)
    return [(c, v is given) for c, v in flow.Additive(given, 0).terms(made)]


def test_a_residual_is_a_sum_of_its_input_and_a_contribution() -> None:
    assert terms(lambda m, x: x + m.linear(x)) == [(1.0, True), (1.0, False)]


def test_factors_signs_and_moves_are_seen_through() -> None:
    assert terms(lambda m, x: (0.5 * x - m.linear(x).view(6, 4).view(2, 3, 4)) * 3) == [
        (1.5, True),
        (-3.0, False),
    ]
    assert terms(lambda m, x: torch.add(x, m.linear(x), alpha=2)) == [(1.0, True), (2.0, False)]


def test_in_place_addition_makes_a_new_value() -> None:
    def forward(m: Body, x: Tensor) -> Tensor:
        x = x.clone()
        x += m.linear(x)
        return x

    assert terms(forward) == [(1.0, True), (1.0, False)]


def test_a_factor_per_channel_keeps_the_sum_with_contributions_whole() -> None:
    _, given, made = traced(lambda m, x: m.gain * (x + m.linear(x)))
    ((coefficient, inner),) = flow.Additive(given, 0).terms(made)
    assert coefficient.shape == (4,)
    assert len(flow.Additive(given, 0).terms(inner)) == 2


def test_a_norm_of_the_sum_is_one_term_and_the_input_still_reaches_it() -> None:
    _, given, made = traced(lambda m, x: m.norm(x + m.linear(x)))
    additive = flow.Additive(given, 0)
    assert additive.reaches(made)
    assert [v for _, v in additive.terms(made)] == [made]
    norm = flow.norm_of(made)
    assert norm is not None
    assert norm.name == "norm"


def test_a_mask_of_the_pass_carries_the_residual() -> None:
    _, given, made = traced(lambda m, x: (x + m.linear(x)) * (x[..., :1] > 0).to(x.dtype))
    additive = flow.Additive(given, 0)
    carried = additive.carried(made)
    assert carried is not None
    assert len(additive.terms(carried)) == 2


def test_what_passes_through_a_linear_map_is_no_residual() -> None:
    _, given, made = traced(lambda m, x: m.linear(x))
    assert not flow.Additive(given, 0).reaches(made)


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class NotANorm(nn.Module):
    """Scales and shifts, like a norm without the division."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@pytest.mark.parametrize(
    ("module", "is_norm"),
    [
        (nn.LayerNorm(4), True),
        (Rms(), True),
        (NotANorm(), False),
        (nn.Tanh(), False),
        (nn.Linear(4, 4), False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_norm_is_known_by_what_it_does(module: nn.Module, is_norm: bool) -> None:
    root = nn.Sequential(module)
    with torch.no_grad(), Trace(root) as t:
        root(torch.randn(2, 3, 4))
    call = next(c for c in t.calls if c.module is module)
    assert flow.is_norm(call) is is_norm


def test_heads_taken_in_another_order_are_not_a_mere_move() -> None:
    t, _, _ = traced(lambda m, x: x[:, :, [1, 0, 2, 3]] + x[:, 0:3])
    first, second = (op for op in t.ops if op.name == "__getitem__")
    assert not flow.passes(first)
    assert flow.passes(second)


def test_constants_come_from_parameters_and_numbers_only() -> None:
    _, _, made = traced(lambda m, x: x * (m.gain.exp() + 1).expand_as(x))
    assert made.producer is not None
    assert [flow.constant(v) for v in made.producer.inputs] == [False, True]


def test_a_kernel_that_torch_functions_do_not_show_is_one_opaque_operation() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return F.linear(x, self.table)

    root, x = nn.Sequential(Hidden(), nn.Tanh()), torch.randn(2, 3, 4)
    with torch.no_grad(), Trace(root) as t:
        root(x)
    assert [op.name for op in t.ops] == [OPAQUE, "tanh"]
    assert flow.is_linear(t.ops[0])
    assert not flow.is_linear(t.ops[1])


def test_tracing_leaves_no_hook_behind_and_changes_no_number() -> None:
    module, x = Body(lambda m, x: m.norm(x + m.linear(x))), torch.randn(2, 3, 4)
    before = module(x)
    with torch.no_grad(), Trace(module):
        during = module(x)
    assert torch.equal(before, during)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
