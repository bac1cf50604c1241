"""Every rule of relevance propagation is the closed form of its paper, keeps what it is given, and leaves no trace."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from pellucid.attribution.relevance_rules import Rules, opaque, scalar_modules

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def share(function, *inputs, module=None, relevance=None, **options):
    """The relevance that `relevance` (random by default) of function(*inputs) hands to each input; and to constants."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.enable_grad(), Rules(module or nn.Module(), {"": torch.zeros(1, 1)}, **options) as rules:
        y = function(*leaves)
    relevance = draw(*y.shape, seed=9) if relevance is None else relevance
    found = torch.autograd.grad(y, [*leaves, *rules.constants], relevance / y.detach(), allow_unused=True)
    shares = [
        torch.zeros_like(x) if g is None else x.detach() * g
        for x, g in zip([*leaves, *rules.constants], found, strict=True)
    ]
    assert not rules.uncovered
    return relevance, shares[: len(leaves)], sum((s.sum() for s in shares[len(leaves) :]), torch.zeros((), dtype=D))


def test_a_linear_map_shares_by_contribution_and_the_bias_keeps_its_own():
    layer, x = nn.Linear(5, 3, dtype=D), draw(4, 5)
    r, (mine,), bias = share(layer, x)
    y = layer(x).detach()
    expected = torch.stack(
        [sum(x[:, i] * layer.weight[j, i] / y[:, j] * r[:, j] for j in range(3)) for i in range(5)], 1
    )
    assert torch.allclose(mine, expected)
    assert torch.allclose(bias, (layer.bias / y * r).sum())


def test_epsilon_lets_small_outputs_keep_their_relevance():
    layer, x = nn.Linear(5, 3, bias=False, dtype=D), draw(4, 5)
    r, (mine,), _ = share(layer, x, epsilon=0.1)
    y = layer(x).detach()
    assert torch.allclose(mine, x * ((r / (y + 0.1 * y.sign())) @ layer.weight))


def test_factors_of_a_product_get_equal_parts():
    a, b, c = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    r, shares, _ = share(torch.mul, a, b)
    assert all(torch.allclose(s, r / 2) for s in shares)
    r, shares, _ = share(lambda *x: torch.einsum("ij,ij,ij->ij", *x), a, b, c)
    assert all(torch.allclose(s, r / 3) for s in shares)


def test_a_product_of_matrices_gives_each_half_by_contribution():
    a, v = draw(2, 3, 4), draw(2, 4, 5, seed=1)
    r, (of_a, of_v), _ = share(torch.matmul, a, v)
    z = a @ v
    assert torch.allclose(of_a, torch.einsum("bqk,bke,bqe->bqk", a, v, r / z) / 2)
    assert torch.allclose(of_v, torch.einsum("bqk,bke,bqe->bke", a, v, r / z) / 2)


def test_softmax_follows_the_taylor_rule():
    x = draw(3, 6)
    r, (mine,), _ = share(lambda z: torch.softmax(z, -1), x)
    assert torch.allclose(mine, x * (r - x.softmax(-1) * r.sum(-1, keepdim=True)))


def test_held_softmax_leaves_all_relevance_to_the_values():
    q, k, v = draw(1, 2, 4, 3), draw(1, 2, 4, 3, seed=1), draw(1, 2, 4, 3, seed=2)
    r, (of_q, of_k, of_v), _ = share(F.scaled_dot_product_attention, q, k, v, hold_softmax=True)
    assert not of_q.any() and not of_k.any()
    assert torch.allclose(of_v.sum(), r.sum())


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_has_the_relevance_of_the_same_attention_written_out(causal):
    q, k, v = draw(1, 2, 4, 3), draw(1, 2, 4, 3, seed=1), draw(1, 2, 4, 3, seed=2)
    allowed = torch.ones(4, 4).tril().bool() if causal else torch.ones(4, 4).bool()

    def written_out(q, k, v):
        scores = (q @ k.transpose(-1, -2) / 3**0.5).masked_fill(~allowed, float("-inf"))
        return torch.softmax(scores, -1) @ v

    _, fused, _ = share(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal), q, k, v)
    _, slow, _ = share(written_out, q, k, v)
    assert all(torch.allclose(a, b) for a, b in zip(fused, slow, strict=True))


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, F.relu, torch.abs, torch.square, F.elu, F.mish])
def test_functions_of_one_number_hand_everything_on(function):
    x = draw(3, 5)
    x[0, 0] = 0.7
    r, (mine,), bias = share(function, x)
    assert torch.allclose(mine[function(x) != 0], r[function(x) != 0]) and not bias


def test_what_a_function_makes_of_zero_is_a_bias():
    x = draw(3, 5)
    r, (mine,), bias = share(torch.sigmoid, x)
    assert torch.allclose(mine, r * (x.sigmoid() - 0.5) / x.sigmoid())
    assert torch.allclose(bias, (r * 0.5 / x.sigmoid()).sum())


def test_a_function_at_zero_takes_its_slope_there():
    x = torch.zeros(1, dtype=D, requires_grad=True)
    with Rules(nn.Module(), {"": torch.zeros(1, 1)}):
        y = F.gelu(x)
    assert torch.allclose(torch.autograd.grad(y, x)[0], torch.tensor([0.5], dtype=D))


@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "gelu_fast", "laplace", "relu2"])
def test_an_activation_written_in_several_operators_is_one_function(name):
    module, x = nn.Sequential(ACT2FN[name]).double(), draw(3, 5)
    at_zero = float(module(torch.zeros(1, dtype=D)))
    r, (mine,), _ = share(module, x, module=module)
    y = module(x)
    assert list(scalar_modules(module)) == [module[0]]
    assert torch.allclose(mine[y != 0], (r * (y - at_zero) / y)[y != 0])


def test_only_functions_of_one_number_are_taken_for_such():
    parts = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Softmax(-1), nn.Dropout(), nn.GELU(), nn.Embedding(5, 5))
    assert list(scalar_modules(parts.eval())) == [parts[4]]


def test_norms_divide_by_a_held_size():
    x, weight, bias = draw(3, 8), draw(8, seed=1), draw(8, seed=2)
    r, (mine,), kept = share(lambda z: F.layer_norm(z, (8,), weight, bias), x)
    y, scale = F.layer_norm(x, (8,), weight, bias), (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    centre = torch.eye(8, dtype=D) - 1 / 8
    assert torch.allclose(mine, x * ((r / y * weight * scale) @ centre))
    assert torch.allclose(kept, (r / y * bias).sum())
    r, (mine,), _ = share(lambda z: F.rms_norm(z, (8,), weight), x)
    assert torch.allclose(mine, r)
    r, (mine,), _ = share(lambda z: weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)), x)
    assert torch.allclose(mine, r)
    r, (mine,), _ = share(lambda z: F.normalize(z, dim=-1), x)
    assert torch.allclose(mine, r)


def test_a_denominator_is_held():
    a, b = draw(3, 4), draw(3, 4, seed=1)
    r, (above, below), _ = share(torch.div, a, b)
    assert torch.allclose(above, r) and not below.any()


KEEPING = {
    "addition": (lambda a, b: a + 2 * b - 1.5, 2),
    "in place": (lambda a, b: (a * 1).add_(b).mul_(b), 2),
    "linear with active weights": (lambda a, b: F.linear(a, b), 2),
    "addmm": (lambda a, b: torch.addmm(draw(4, 4, seed=5), a, b), 2),
    "baddbmm": (lambda a, b: torch.baddbmm(a[None], a[None], b[None]), 2),
    "join": (lambda a, b: torch.cat([a, draw(4, 4, seed=5), b * a]), 2),
    "gated unit": (lambda a: F.glu(a), 1),
    "group norm": (lambda a: F.group_norm(a, 2, draw(4, seed=6), draw(4, seed=7)), 1),
    "convolution": (lambda a: F.conv1d(a[None], draw(3, 4, 2, seed=6), draw(3, seed=7)), 1),
    "power": (lambda a: a**3 + a.pow(2), 1),
    "softplus": (lambda a: F.softplus(a) * a, 1),
    "attention with bias": (lambda a, b: F.scaled_dot_product_attention(a[None], b[None], a[None], attn_mask=b), 2),
}


@pytest.mark.parametrize("name", KEEPING)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_is_lost_or_made(name, seed):
    function, n = KEEPING[name]
    inputs = [draw(4, 4, seed=seed + i) for i in range(n)]
    r, shares, bias = share(function, *inputs, hold_softmax=True)
    everything = sum(s.abs().sum() for s in shares) + bias.abs()  # constants are float32
    assert abs(sum(s.sum() for s in shares) + bias - r.sum()) < 1e-6 * everything


def test_an_operator_without_a_rule_is_noted():
    x = draw(3).requires_grad_()
    with Rules(nn.Module(), {"": torch.zeros(1, 1)}) as rules:
        torch.sin(x) + torch.zeros_like(x)
        torch.round(x)
    assert rules.uncovered == {"sin", "round"}


def test_a_backward_of_its_own_is_found():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = draw(3).requires_grad_()
    with Rules(nn.Module(), {"": torch.zeros(1, 1)}):
        y = F.gelu(Doubled.apply(F.gelu(x)))
    assert opaque(y) == {"Doubled"}


def test_rules_hold_in_their_own_thread_and_nothing_stays_behind():
    module = nn.Sequential(nn.LayerNorm(6), ACT2FN["gelu_new"]).double()
    x, found = draw(2, 6).requires_grad_(), {}

    def native(name):
        found[name] = torch.autograd.grad(module(x).square().sum(), x)[0]

    native("before")
    with Rules(module, {"": torch.zeros(1, 1)}):
        other = threading.Thread(target=native, args=("meanwhile",))
        other.start(), other.join()
        native("inside")
    native("after")
    assert torch.equal(found["before"], found["meanwhile"]) and torch.equal(found["before"], found["after"])
    assert not torch.allclose(found["before"], found["inside"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_failing_forward_leaves_gradients_enabled():
    class Fails(nn.Module):
        broken = False

        def forward(self, x):
            if self.broken:
                raise ValueError("broken")
            return torch.tanh(x)

    module, x = nn.Sequential(Fails()).double(), draw(3).requires_grad_()
    assert list(scalar_modules(module)) == [module[0]]
    module[0].broken = True
    with pytest.raises(ValueError, match="broken"), torch.enable_grad(), Rules(module, {"": torch.zeros(1, 1)}):
        module(x)
    assert torch.is_grad_enabled()
