"""A pair of prompts gets the same effects alone and beside longer ones, whichever side the padding is on."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pellucid import Model, load
from pellucid.causal import ablation, mediation, patching, path_patching
from pellucid.errors import InputError
from pellucid.metrics import logit_difference
from pellucid.tasks import Prompts
from tests.zoo import build, tokenizer

METRIC = logit_difference(7, 9)
CLEAN = ["The city of Paris", "The capital of France is in the", "Mary went to Italy and"]
CORRUPTED = ["The store of Rome", "The city of Italy is in the", "John went to Paris and"]
QUIET: dict[str, Any] = {"metric": METRIC}


@cache
def opened(family: str) -> Model:
    module = build(family)
    return load(module, tokenizer=tokenizer(module))


def padded(model: Model, texts: list[str], left: bool) -> Any:
    """Token ids and mask, padded by hand."""
    rows = [model.tokenizer(t)["input_ids"] for t in texts]
    longest = max(map(len, rows))
    fill = [(longest - len(row)) * [0] for row in rows]
    ids = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
        for f, row in zip(fill, rows, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("over", ["layers.*.attn.heads.*", "layers.*.resid_pre@-1", "layers.*.mlp.out@1:3", "layers.*"])
def test_patching_and_ablation_in_a_padded_batch(family: str, over: str, left: bool) -> None:
    model = opened(family)
    clean, corrupted = (padded(model, texts, left) for texts in (CLEAN, CORRUPTED))
    for denoise in (True, False):
        together = patching(model, clean, corrupted, over=over, denoise=denoise, **QUIET)
        for i, (c, d) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
            alone = patching(model, c, d, over=over, denoise=denoise, **QUIET)
            np.testing.assert_allclose(together.value.isel(prompt=i), alone.value, atol=1e-4)
    together = ablation(model, clean, over=over, how="position_mean", reference=corrupted, **QUIET)
    for i, c in enumerate(CLEAN):
        run = model.run(
            corrupted, keep=["layers.*.attn.z_out", "layers.*.mlp.out", "layers.*.attn.out", "layers.*.resid_pre"]
        )
        alone = ablation(model, c, over=over, how="position_mean", reference=run, **QUIET)
        np.testing.assert_allclose(together.value.isel(prompt=i), alone.value, atol=1e-4)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("direct", [False, True])
def test_paths_in_a_padded_batch(direct: bool, left: bool) -> None:
    model = opened("llama")
    options: dict[str, Any] = {
        "over": "layers.0.attn.heads.*", "receivers": ["layers.1.attn.heads.2.k", "layers.1.mlp.out@-1"],
        "direct": direct, **QUIET,
    }  # fmt: skip
    together = path_patching(model, *(padded(model, texts, left) for texts in (CLEAN, CORRUPTED)), **options)
    alone = [path_patching(model, c, d, **options).effect for c, d in zip(CLEAN, CORRUPTED, strict=True)]
    np.testing.assert_allclose(together.effect, np.mean(alone, 0), atol=2e-6)
    assert abs(together.effect).max() > 1e-4


def test_mediation_in_a_padded_batch() -> None:
    model = opened("llama")
    pairs = Prompts.from_pairs(CLEAN, CORRUPTED, [" he"] * 3, [" Mary"] * 3, model.tokenizer)
    sets: list[Any] = [
        "layers.*.attn.heads.*",
        "layers.0.mlp.neurons.0:4@-1",
        {"layer": ["layers.0.attn.out", "layers.0.mlp.out"]},
    ]
    for over in sets:
        together = mediation(model, pairs, over=over)
        alone = [mediation(model, pairs[i], over=over) for i in range(3)]
        for name in ("nie", "nde", "total_effect"):
            np.testing.assert_allclose(together[name], np.mean([a[name] for a in alone], 0), atol=1e-5)


def test_sides_that_are_padded_differently_are_refused() -> None:
    model = opened("llama")
    with pytest.raises(InputError, match="padded differently"):
        path_patching(
            model, padded(model, CLEAN, True), padded(model, CORRUPTED, False), over="layers.0.attn.heads.*",
            receivers="layers.1.mlp.out", **QUIET,
        )  # fmt: skip
