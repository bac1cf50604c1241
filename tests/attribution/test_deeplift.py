"""DeepLIFT equals Captum's where the rescale rule is all there is, and adds up where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import DeepLift
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.attribution import continuation, deeplift
from pellucid.attribution.deeplift_rules import RULES, Recorded, Rescaled, log_sum, multiplied, secant, shares
from pellucid.errors import Refused
from pellucid.metrics import logit
from tests.attribution.hand import PROMPT, classifier, opened


def multipliers(function, x, x0):
    with torch.no_grad(), Recorded(function if isinstance(function, nn.Module) else nn.Identity()) as record:
        below = function(x0)
    x = x.clone().requires_grad_()
    with Rescaled(record) as rules:
        above = function(x)
    assert not rules.uncovered
    return torch.autograd.grad(above.sum(), x)[0], above.detach(), below


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU])
def test_on_layers_of_one_number_functions_it_is_captums(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), activation(), nn.Linear(9, 5), activation(), nn.Linear(5, 1))
    x, x0 = torch.randn(2, 1, 6)
    found = multipliers(net, x, x0)[0] * (x - x0)
    torch.testing.assert_close(found, DeepLift(net).attribute(x, x0), atol=1e-5, rtol=1e-4)


rows = st.lists(st.floats(-6, 6, allow_nan=False, width=32), min_size=4, max_size=4).map(torch.tensor)


@given(rows, rows, rows, rows)
@settings(max_examples=60, deadline=None)
def test_every_rule_hands_back_the_whole_difference(a, a0, b, b0):
    """Checked on the sum of multiplier times difference, in double precision."""
    pairs = [(t.double().requires_grad_(), t0.double()) for t, t0 in ((a, a0), (b, b0))]
    made = {
        "secant": secant(torch.tanh, pairs[0]),
        "square": secant(torch.square, pairs[0]),
        "product": multiplied(torch.mul, *pairs),
        "softmax": shares(pairs[0], -1),
        "log of a sum": log_sum(pairs[0], -1, False),
    }
    for name, (y, y0) in made.items():
        weights = torch.arange(1, y.numel() + 1).double().reshape(y.shape)
        grads = torch.autograd.grad((weights * y).sum(), [p for p, _ in pairs], allow_unused=True)
        total = sum(
            float((g * (p.detach() - p0)).sum()) for g, (p, p0) in zip(grads, pairs, strict=True) if g is not None
        )
        assert total == pytest.approx(float((weights * (y.detach() - y0)).sum()), abs=2e-6), name


def test_written_out_or_as_one_operator_a_norm_and_an_attention_are_the_same():
    torch.manual_seed(0)
    x, x0 = torch.randn(2, 1, 5, 8)
    w = torch.randn(8)

    def written(t):
        centred = t - t.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * w

    def fused(t):
        return nn.functional.layer_norm(t, (8,), w)

    def attended(t):
        s = t @ t.transpose(-1, -2) / 8**0.5
        s = s.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -1e9)
        return nn.functional.softmax(s, -1) @ t

    def fused_attention(t):
        return nn.functional.scaled_dot_product_attention(t, t, t, is_causal=True)

    for one, other in ((written, fused), (attended, fused_attention)):
        m, above, below = multipliers(one, x, x0)
        n, _, _ = multipliers(other, x, x0)
        assert float((m * (x - x0)).sum()) == pytest.approx(float((above - below).sum()), abs=1e-4)
        assert float((n * (x - x0)).sum()) == pytest.approx(float((above - below).sum()), abs=1e-4)
    torch.testing.assert_close(m, n, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "llama",
        "bert",
        "t5",
        "bart",
        "gemma2",
        "gpt_neox",
        "opt",
        "bloom",
        "distilbert",
        "roberta",
        "qwen3",
        "phi",
    ],
)
@pytest.mark.parametrize("target", [" Paris", continuation(" Paris and")], ids=["token", "continuation"])
def test_attributions_add_up_to_the_change_of_the_score(family, target):
    model = opened(family)
    if target != " Paris" and not model.anatomy.stacks[-1].causal:
        target = logit(" Rome")
    asked = logit(target) if target == " Paris" else target  # at the last token, whatever the model fills in
    found = deeplift(model, PROMPT, asked)
    change = np.atleast_1d(found.score - found.baseline_score)
    assert np.abs(change).max() > 1e-3
    assert np.abs(found.gap).max() < 1e-4 * max(1, np.abs(found.values).sum())
    plain = model.run(PROMPT).logits[0, -1, model.tokenizer.convert_tokens_to_ids("▁Paris")]
    if target == " Paris":
        assert float(found.score) == pytest.approx(float(plain.detach()), abs=1e-4)


def test_classes_and_contrasts_are_attributed_too():
    found = deeplift(classifier(), PROMPT, "good", against="bad")
    assert abs(float(found.gap)) < 1e-5
    assert found.values.any()


def test_experts_that_change_and_operators_without_a_rule_are_refused(monkeypatch):
    with pytest.raises(Refused, match=r"take different ways|has no rule for a part"):
        deeplift(opened("mixtral"), PROMPT, " Paris")
    monkeypatch.delitem(RULES, "softmax")
    with pytest.raises(Refused, match=r"has no rule for a part of .* \(it passes softmax"):
        deeplift(opened("gpt_neox", attn="eager"), PROMPT, " Paris")


def test_nothing_is_left_behind_on_the_model():
    model = opened("gpt2")
    before = model.run(PROMPT).logits
    deeplift(model, PROMPT, " Paris")
    assert torch.equal(model.run(PROMPT).logits, before)
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
