"""The sparse form of a top-k code is the dense one, its hand-written gradients are those of autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.neurons.dictionaries import sparse
from pellucid.neurons.dictionaries.functions import TopK
from pellucid.neurons.dictionaries.objectives import GatedLoss, JumpReLULoss, L1Loss, TopKLoss


def parameters(rows, d_in, d_out, features, seed):
    g = torch.Generator().manual_seed(seed)
    p = {
        "encoder": torch.randn(features, d_in, generator=g),
        "encoder_bias": torch.randn(features, generator=g),
        "decoder": torch.nn.functional.normalize(torch.randn(features, d_out, generator=g), dim=1),
        "decoder_bias": torch.randn(d_out, generator=g),
    }
    x, y = torch.randn(rows, d_in, generator=g), torch.randn(rows, d_out, generator=g)
    return {k: v.double().requires_grad_() for k, v in p.items()}, x.double(), y.double()


sizes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(2, 12), st.integers(0, 999))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 5), st.booleans())
def test_a_top_k_step_has_the_gradients_of_the_dense_form(size, k, some_dead):
    p, x, y = parameters(*size)
    d_out, features = y.shape[1], len(p["encoder"])
    dead = torch.arange(0, features, 2) if some_dead else torch.arange(0)
    found = TopKLoss(k, aux=2).step(p, x, y, dead, 1.0, torch.float64)
    grads = {name: value.grad.clone() for name, value in p.items()}

    u = x @ p["encoder"].T + p["encoder_bias"]
    e = y - TopK(k)(u) @ p["decoder"] - p["decoder_bias"]
    loss = e.pow(2).sum(1).mean() / d_out
    if some_dead:
        held = e.detach()
        rest = held - TopK(2)(u[:, dead]) @ p["decoder"][dead]
        loss = loss + rest.pow(2).sum() / held.pow(2).sum() / 32
    dense = torch.autograd.grad(loss, list(p.values()))
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, expected in zip(p, dense, strict=True):
        torch.testing.assert_close(grads[name], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.on, (TopK(k)(u) > 0).sum(0))


def test_the_products_without_a_sampled_matrix_product_are_the_same(monkeypatch):
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(7, generator=g)[:3].sort().values for _ in range(5)])
    a, b = torch.randn(5, 4, generator=g), torch.randn(7, 4, generator=g)
    expected = torch.stack([b[i] @ row for i, row in zip(index, a, strict=True)])
    torch.testing.assert_close(sparse.dots(index, a, b), expected)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(sparse, "CHUNK", 24)  # two rows at a time
    torch.testing.assert_close(sparse.dots(index, a, b), expected)


def test_a_scan_in_bfloat16_still_gives_float32_values():
    p, x, _ = parameters(50, 16, 16, 64, 0)
    x, encoder, bias = x.float(), p["encoder"].detach().float(), p["encoder_bias"].detach().float()
    code = sparse.encode(x, encoder, bias, 4, scan=torch.bfloat16)
    torch.testing.assert_close(code.u, (x @ encoder.T + bias).gather(1, code.index))
    exact = sparse.encode(x, encoder, bias, 4)
    assert (code.index == exact.index).float().mean() > 0.9


def test_jumprelu_thresholds_have_the_gradient_of_the_paper():
    p, x, y = parameters(60, 4, 4, 6, 1)
    objective = JumpReLULoss(weight=0.7, bandwidth=0.8, start=0.5)
    p["log_threshold"] = objective.own(6)["log_threshold"].double().requires_grad_()
    objective.step(p, x, y, torch.arange(0), 1.0, torch.float32)
    with torch.no_grad():
        u, theta = x @ p["encoder"].T + p["encoder_bias"], p["log_threshold"].exp()
        f = u * (u > theta)
        by_f = 2 * (f @ p["decoder"] + p["decoder_bias"] - y) @ p["decoder"].T / y.numel()
        near = ((u - theta).abs() <= 0.4).double() / 0.8
        by_theta = -(by_f * theta * near + 0.7 / y.numel() * near).sum(0)
        torch.testing.assert_close(p["log_threshold"].grad, by_theta * theta)
        torch.testing.assert_close(p["encoder_bias"].grad, (by_f * (u > theta)).sum(0))


def test_the_gated_form_is_the_papers_with_its_two_biases():
    g = torch.Generator().manual_seed(2)
    x, w, r, b_gate, b_mag = (torch.randn(s, generator=g) for s in ((40, 5), (5, 8), (8,), (8,), (8,)))
    paper = ((x @ w + b_gate) > 0) * (x @ (w * r.exp()) + b_mag).relu()
    p = {"rescale": r, "shift": b_mag - b_gate * r.exp()}
    ours = GatedLoss().activation(p, 1.0)(x @ w + b_gate)
    torch.testing.assert_close(ours, paper, rtol=1e-5, atol=1e-5)


def test_the_price_of_an_l1_code_is_its_sum():
    p, x, y = parameters(30, 4, 9, 6, 3)
    free = L1Loss(0.0).step(p, x, y, torch.arange(0), 1.0, torch.float32).loss
    half = L1Loss(0.5).step(p, x, y, torch.arange(0), 0.5, torch.float32).loss
    f = (x @ p["encoder"].T + p["encoder_bias"]).relu()
    assert half - free == pytest.approx(float(0.25 * f.detach().sum() / 30 / 3), rel=1e-6)
