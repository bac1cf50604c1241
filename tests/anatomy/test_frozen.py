"""A norm with its scale held is the affine map that the textbook formula gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.anatomy.frozen import affine, freeze, linearised
from pellucid.errors import Refused


def layer_norm(x, width):
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    scale = (x.var(-1, keepdim=True, correction=0) + norm.eps).rsqrt()
    return norm, lambda c: norm.weight * (c - c.mean(-1, keepdim=True)) * scale + norm.bias


def rms_norm(x, width):
    norm = nn.RMSNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight)
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return norm, lambda c: norm.weight * c * scale


def scale_norm(x, width):
    norm = lambda x: 3.0 * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)  # noqa: E731
    return norm, lambda c: 3.0 * c / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("kind", [layer_norm, rms_norm, scale_norm])
@given(seed=st.integers(0, 1000), width=st.integers(3, 24))
@settings(max_examples=15, deadline=None)
def test_a_frozen_norm_is_linear_with_the_scale_of_its_point(kind, seed, width):
    torch.manual_seed(seed)
    x, other = torch.randn(2, 5, width), torch.randn(2, 5, width)
    norm, formula = kind(x, width)
    frozen = freeze(norm, x)
    assert frozen is not None
    torch.testing.assert_close(frozen(other), formula(other), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [torch.relu, torch.tanh, nn.GELU(), lambda x: x**2, nn.Softmax(-1)])
def test_what_is_no_norm_is_neither_frozen_nor_called_affine(step):
    x = torch.randn(2, 3, 8)
    assert freeze(step, x) is None
    assert not affine(step, x)
    with pytest.raises(Refused, match="'act' is not linear"):
        linearised([nn.Linear(8, 8), step], ["proj", "act"], x)


@pytest.mark.parametrize("step", [nn.Linear(8, 5), lambda x: x * 0.3 + 1, lambda x: x[..., :4], nn.Identity()])
def test_an_affine_step_is_recognised(step):
    assert affine(step, torch.randn(2, 3, 8))
