"""Removing an edge equals what the circuit runner, which works quite differently, finds for the same edge."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import Model, circuits, load
from pellucid.causal import edge_ablation, path_patching
from pellucid.errors import InputError
from pellucid.metrics import logit_difference
from tests.zoo import build, tokenizer

METRIC = logit_difference(7, 9)


@cache
def opened(family: str, layers: int = 3) -> Model:
    module = build(family, layers=layers)
    return load(module, tokenizer=tokenizer(module))


def ids(seed: int, n: int = 3) -> Tensor:
    return torch.randint(5, 97, (n, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "mixtral"])
def test_an_edge_removed_equals_the_circuit_without_it(family: str, how: Any) -> None:
    model = opened(family)
    edges = {
        ("embed", "layers.1.mlp.out"): "embed -> layers.1.mlp",
        ("layers.0.attn.heads.1", "layers.1.mlp.out"): "layers.0.attn.heads.1 -> layers.1.mlp",
        ("layers.0.mlp.out", "layers.2.attn.heads.3.q"): "layers.0.mlp -> layers.2.attn.heads.3.q",
        ("layers.1.attn.heads.0", "layers.2.resid_post"): "layers.1.attn.heads.0 -> logits",
    }
    exact = circuits.exact_patching(model, ids(0), METRIC, how=how, reference=ids(1), edges=list(edges.values()))
    for (sender, receiver), name in edges.items():
        found = edge_ablation(model, ids(0), over=sender, receivers=receiver, how=how, reference=ids(1), metric=METRIC)
        there = exact.each[(slice(None), *exact.graph.edge(name))]
        assert found.effect.item() == pytest.approx(there.mean().item(), abs=2e-6), name
        np.testing.assert_allclose(found["value"].values.ravel() - found.clean.values, there, atol=2e-6)


def test_an_edge_resampled_from_the_other_prompts_is_a_patched_path() -> None:
    model = opened("llama")
    clean, corrupted = ids(0, 1), ids(1, 1)
    senders, receivers = "layers.0:2.attn.heads.*", "layers.2.attn.heads.1"
    options: dict[str, Any] = {"over": senders, "receivers": receivers, "metric": METRIC}
    found = edge_ablation(model, clean, how="resample", reference=corrupted, **options)
    patched = path_patching(model, clean, corrupted, denoise=False, **options)
    np.testing.assert_allclose(found.effect.values.ravel(), patched.effect.values.ravel(), atol=2e-6)


def test_what_comes_later_is_no_sender_and_all_edges_to_a_receiver_can_go_together() -> None:
    model = opened("gpt2")
    found = edge_ablation(
        model, ids(0), over=["embed", "layers.*.attn.heads.*", "layers.*.mlp.out"],
        receivers=["layers.0.mlp.out", "layers.2.resid_post"], how="zero", metric=METRIC,
    )  # fmt: skip
    assert found.effect.dims == ("site", "receiver")
    assert np.isnan(found.effect.sel(site="layers.0.mlp.out", receiver="layers.0.mlp.out"))
    assert np.isnan(found.effect.sel(site="layers.1.attn.heads.0", receiver="layers.0.mlp.out"))
    assert found.effect.sel(receiver="layers.2.resid_post").notnull().all()
    ends = [found[f"total_{name}"].item() for name in ("low", "effect", "high")]
    assert ends == sorted(ends)
    assert found["total_effect"].item() == pytest.approx(float((found.corrupted - found.clean).mean()))
    # the last residual has lost all but the biases: no prompt is told from another
    alone = edge_ablation(
        model, ids(0), over=["embed", "layers.*.attn.heads.*", "layers.*.mlp.out"],
        receivers="layers.2.resid_post", how="zero", metric=METRIC,
    )  # fmt: skip
    np.testing.assert_allclose(alone.corrupted, alone.corrupted[0], atol=1e-5)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_cross_attention_and_encoders_have_edges_too(how: Any) -> None:
    model = opened("t5", 2)
    text, reference = "The capital of France", ["The city of Italy is", "The store of Rome is a"]
    options: dict[str, Any] = {"how": how, "reference": reference, "metric": METRIC}
    inside = edge_ablation(
        model, text, over="encoder.layers.0.attn.heads.*", receivers="encoder.layers.1.mlp.out", **options
    )
    across = edge_ablation(
        model, text, over="decoder.layers.0.cross.heads.*", receivers="decoder.layers.1.mlp.out", **options
    )
    for found in (inside, across):
        assert found.effect.dims == ("head", "receiver")
        assert found.effect.shape == (4, 1)
        assert np.isfinite(found.effect.values).all()
        assert abs(found.effect.values).max() > 0
    bert = opened("bert", 2)
    mask = edge_ablation(bert, text, over="layers.0.attn.heads.*", receivers="layers.1.attn.heads.*.v", **options)
    assert mask.effect.shape == (4, 4)
    assert abs(mask.effect.values).max() > 0


def test_a_prompt_alone_and_in_a_padded_batch_loses_the_same() -> None:
    model = opened("llama")
    prompts, reference = ["The city of Paris", "The capital of France is in the"], "The store of Italy is in the city"
    options: dict[str, Any] = {
        "over": "layers.0.attn.heads.*", "receivers": ["layers.1.mlp.out", "layers.2.attn.heads.0.k"],
        "how": "position_mean", "reference": reference, "metric": METRIC,
    }  # fmt: skip
    both = edge_ablation(model, prompts, **options)
    alone = [edge_ablation(model, prompt, **options).effect for prompt in prompts]
    np.testing.assert_allclose(both.effect, np.mean(alone, 0), atol=2e-6)


def test_what_cannot_send_is_refused_and_a_metric_is_asked_for() -> None:
    model = opened("gpt2")
    with pytest.raises(InputError, match="cannot send: name heads"):
        edge_ablation(
            model, ids(0), over="layers.0.mlp.neurons.3", receivers="layers.1.mlp.out", how="zero", metric=METRIC
        )
    with pytest.raises(InputError, match="needs a metric"):
        edge_ablation(model, ids(0), over="embed", receivers="layers.1.mlp.out", how="zero")
    with pytest.raises(InputError, match="comes before"):
        edge_ablation(model, ids(0), over="layers.1.mlp.out", receivers="layers.0.mlp.out", how="zero", metric=METRIC)
