"""Norm-weighted attention equals a loop over heads and keys, and its vectors add up to what attention writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.attention import norm_weighted
from pellucid.errors import Refused
from tests.attention.opening import PROMPT, TARGET, opened


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "gemma2"])
def test_norms_equal_a_slow_loop_and_their_vectors_make_the_output(family):
    model = opened(family)
    found = norm_weighted(model, PROMPT)
    run = model.run(
        PROMPT, keep=["layers.*.attn.pattern", "layers.*.attn.v", "layers.*.attn.out", "layers.*.attn.heads.*.out"]
    )
    for layer in range(len(found.layer)):
        attention = model.layers[layer].attn
        w_o = attention.weights.W_O
        pattern = run.tensor(f"layers.{layer}.attn.pattern")[0]
        v = run.tensor(f"layers.{layer}.attn.v")[0]
        group = len(pattern) // v.shape[1]
        carried = torch.stack([
            torch.stack([v[k, h // group] @ w_o[h] for k in range(len(v))]) for h in range(len(pattern))
        ])  # fmt: skip
        # [query, d] what a norm behind the projection does to each part, with the size that the sum has at that query
        behind = torch.ones(len(v), 1)
        if family == "gemma2":
            made = torch.einsum("hqk,hkd->qd", pattern, carried)
            norm = model.module.model.layers[layer].post_attention_layernorm
            behind = (1 + norm.weight) * (made.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        for h in range(len(pattern)):
            for q in range(len(v)):
                for k in range(len(v)):
                    expected = float((pattern[h, q, k] * carried[h, k] * behind[q]).norm())
                    assert float(found.norm[layer, h, q, k]) == pytest.approx(expected, abs=1e-5, rel=1e-4)
        together = torch.einsum("hqk,hkd,qd->qkd", pattern, carried, behind.expand(-1, carried.shape[-1]))
        np.testing.assert_allclose(found.together.values[layer], together.norm(dim=-1).detach(), atol=2e-4)
        written = sum(run.tensor(f"layers.{layer}.attn.heads.{h}.out")[0] for h in range(len(pattern)))
        torch.testing.assert_close(together.sum(1), written, atol=1e-4, rtol=1e-4)


def test_cross_attention_is_in_it():
    found = norm_weighted(opened("bart"), PROMPT, decoder=TARGET)
    assert found.cross.dims == ("layer", "head", "query", "source_key")
    assert found.cross_together.dims == ("layer", "query", "source_key")
    assert (found.norm.values >= 0).all()


def test_heads_may_cancel_but_not_exceed_their_sum():
    found = norm_weighted(opened("gpt2"), PROMPT)
    assert (found.together.values <= found.norm.sum("head").values + 1e-5).all()


def test_a_gate_before_the_output_projection_is_refused():
    with pytest.raises(Refused, match="norm-weighted attention is refused"):
        norm_weighted(opened("qwen3_next"), PROMPT)
