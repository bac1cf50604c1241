"""Every lens result, saved and read back, prints the program that gives it again."""

from __future__ import annotations

from functools import cache

import pytest
import xarray as xr

import pellucid as pl
from pellucid.lenses import (
    FutureLens,
    TunedLens,
    causal_basis,
    decoder_lens,
    direct_logit_attribution,
    head_lens,
    lens_quality,
    logit_lens,
    patchscope,
    prediction_depth,
)  # fmt: skip
from tests.lenses.test_tuned_lens import HELD_OUT, PROMPT, SMALL, TEXTS, opened
from tests.test_technique import again

EDITS = [pl.Ablate("layers.0.attn.heads.1"), pl.Scale("layers.1.mlp.out", factor=0.5)]
PAIRS = [(a, b) for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]


@cache
def tuned() -> TunedLens:
    return TunedLens(share=0.5, tokens=640, **SMALL).fit(opened("llama"), TEXTS[:10])


@cache
def future() -> FutureLens:
    return FutureLens(ahead=1, tokens=640, **SMALL).fit(opened("llama"), TEXTS[:10])


CALLS = {
    "logit lens": lambda m: logit_lens(m, PROMPT, targets=[" Paris"], positions=[1, -1], edits=EDITS),
    "tuned lens": lambda m: logit_lens(m, PROMPT, through=tuned(), sites="layers.*.resid_post"),
    "future lens": lambda m: future().read(m, PROMPT, edits=EDITS),
    "future lens score": lambda m: future().score(m, HELD_OUT, context=16),
    "quality": lambda m: lens_quality(m, HELD_OUT, tuned(), context=16),
    "head lens": lambda m: head_lens(m, PROMPT, layers=slice(1), positions=-2, edits=EDITS),
    "patchscope": lambda m: patchscope(m, PROMPT, "France", layers=[0], into="Paris is", mapping=tuned()),
    "causal basis": lambda m: causal_basis(m, TEXTS[:2], "layers.0.resid_post", size=1, steps=5, through=tuned()),
    "shares": lambda m: direct_logit_attribution(m, PROMPT, by="head", edits=EDITS),
    "depth": lambda m: prediction_depth(logit_lens(m, PROMPT)),
    "decoder lens": lambda m: decoder_lens(m, PROMPT, max_new_tokens=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_program_of_a_result_gives_it_again(name, tmp_path, monkeypatch):
    model = opened("t5" if name == "decoder lens" else "llama")
    found = CALLS[name](model)
    assert found.provenance.model and found.provenance.digest == model.digest
    made = again(found, tmp_path, monkeypatch, module=model.module, tokenizer=model.tokenizer)
    xr.testing.assert_allclose(xr.merge([made.data]), xr.merge([found.data]), rtol=1e-6)
    assert made.provenance.call == found.provenance.call
