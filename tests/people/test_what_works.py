"""What people found right and must stay (D), and progress (B12)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import pellucid as pl
from pellucid.engine import pausing
from tests.matrix.hand import FAMILIES
from tests.zoo import inputs

from .cases import CLEAN, DIFFERENCE, LONG, OTHER, close, opened


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_native_ones(family: str) -> None:
    """D: to the bit, without edits and with everything kept."""
    model = opened(family)
    given = inputs(model.module)
    with torch.no_grad():
        wanted = model.module(**given).logits
    assert torch.equal(model.run(given).logits, wanted)
    stack = "decoder." if len(model.anatomy.stacks) > 1 else ""
    assert close(model.run(given, keep=[f"{stack}layers.*.resid_post"]).logits, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bloom", "gemma3_text", "t5"])
def test_a_batch_generates_what_each_prompt_generates(family: str) -> None:
    """D: padded generation is the single one, which is transformers' own."""
    model = opened(family)
    both = model.generate([CLEAN, LONG], max_new_tokens=5, temperature=0.0)
    for i, text in enumerate((CLEAN, LONG)):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        native = model.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )[0]
        said = (native if family == "t5" else native[ids.shape[1] :]).tolist()
        said = said[1:] if family == "t5" else said
        assert both.ids(i) == [t for t in said if t != 0][: len(both.ids(i))] and both.ids(i)


def test_nothing_is_left_behind() -> None:
    """D: no hooks, no modes, no changed attention after a run under edits that fails and one that does not."""
    module = opened("llama").module
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in module.modules()]
    config = module.config._attn_implementation
    opened("llama").run(CLEAN, edits=[pl.Ablate("layers.0.attn.heads.1")])
    with pytest.raises(ZeroDivisionError):
        opened("llama").run(CLEAN, edits=[pl.Replace("layers.0.mlp.out", lambda x: 1 / 0)])
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in module.modules()]
    assert module.config._attn_implementation == config


def test_occlusion_is_its_definition() -> None:
    """D: by transformers alone."""
    model = opened("gpt2")
    ids = model.tokenizer(CLEAN)["input_ids"]
    the = model.tokenizer(" the")["input_ids"][0]
    data = pl.attribution.occlusion(model, CLEAN, 7, baseline=" the").data
    with torch.no_grad():
        score = model.module(torch.tensor([ids])).logits[0, -1, 7]
        rows = torch.tensor([[*ids[:i], the, *ids[i + 1 :]] for i in range(len(ids))])
        wanted = score - model.module(rows).logits[:, -1, 7]
    assert close(data["attribution"].values, wanted)


@pytest.mark.parametrize(
    "work",
    [
        lambda model: pl.attribution.integrated_gradients(model, CLEAN, 7, steps=8, baseline=" the"),
        lambda model: pl.circuits.exact_patching(model, CLEAN, DIFFERENCE, how="zero"),
        lambda model: pl.causal.patching(model, CLEAN, OTHER, metric=DIFFERENCE),
    ],
    ids=["integrated gradients", "exact patching", "patching"],
)
def test_long_work_shows_a_bar(work: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """B12: after a second (here at once), and none when silenced."""
    monkeypatch.setattr(pausing, "DELAY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(opened("gpt2"))
    assert ":" in capsys.readouterr().err
    with pl.quiet():
        work(opened("gpt2"))
    assert not capsys.readouterr().err
