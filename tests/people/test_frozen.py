"""Gradients and modes are managed inside: A13, B1, B2, B16."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused
from tests.zoo import build, tokenizer

from .cases import CLEAN, DIFFERENCE, LONG, OTHER, close, opened


def test_a_frozen_model_has_circuits() -> None:
    """B1: the flags of the user's parameters say nothing about what can be differentiated."""
    frozen = pl.load(build("llama").requires_grad_(False), tokenizer=tokenizer())
    with torch.no_grad():
        found = pl.circuits.edge_attribution(frozen, CLEAN, DIFFERENCE, how="zero")
    wanted = pl.circuits.edge_attribution(opened("llama"), CLEAN, DIFFERENCE, how="zero")
    assert close(found.result.data["effect"].fillna(0).values, wanted.result.data["effect"].fillna(0).values)
    assert not any(p.requires_grad for p in frozen.module.parameters())


def test_a_run_keeps_no_graph_unless_asked() -> None:
    """B2: nothing of a run's forward pass lives on in what it gives back."""
    run = opened("llama").run(CLEAN, keep=["layers.0.resid_post"])
    assert run.logits.grad_fn is None and run.tensor("layers.0.resid_post").grad_fn is None
    assert not run.logits.requires_grad


def test_a_kept_selection_does_not_hold_the_rest() -> None:
    """B2: one kept vector is one vector's memory."""
    run = opened("llama").run(CLEAN, keep=["layers.0.resid_post@-1"])
    kept = run.tensor("layers.0.resid_post@-1")
    assert kept.untyped_storage().nbytes() <= 1.2 * kept.numel() * kept.element_size()


def test_training_mode_gives_one_answer_and_comes_back() -> None:
    """A13: dropout is off while running and the user's mode is restored."""
    module = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model = pl.load(module, tokenizer=tokenizer())
    first, second = model.run(CLEAN).logits, model.run(CLEAN).logits
    assert torch.equal(first, second) and module.training
    with torch.no_grad():
        native = module.eval()(torch.tensor([tokenizer()(CLEAN)["input_ids"]])).logits
    assert close(first, native)


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "eap-ig-activations"])
def test_edge_attribution_in_bfloat16(method: str) -> None:
    """B16: every method runs on the usual dtype of checkpoints, and says what the exact model says."""
    half, exact = opened("llama", dtype=torch.bfloat16), opened("llama")
    first, second = (
        torch.as_tensor(
            pl.circuits.edge_attribution(m, CLEAN, DIFFERENCE, how="zero", method=method)
            .result.data["effect"]
            .fillna(0)
            .values
        ).flatten()
        for m in (half, exact)
    )
    assert float(torch.corrcoef(torch.stack([first, second]).double())[0, 1]) > 0.95


def test_a_masked_model_in_bfloat16_is_asked_at_its_mask() -> None:
    """Of the same kind, found by the matrix: in half precision a bidirectional stack was taken for a causal one."""
    masked = "The city <mask> Paris is in France"
    for family in ("bert", "roberta", "bart"):
        anatomy = opened(family, dtype=torch.bfloat16).anatomy
        assert anatomy.stacks[0].causal is False
    model = opened("bert", dtype=torch.bfloat16)
    data = pl.causal.ablation(model, masked, over="layers.0.mlp.out", metric=DIFFERENCE).data
    ids = model.tokenizer(masked)["input_ids"]
    with torch.no_grad():
        z = model.module(torch.tensor([ids])).logits[0, ids.index(3)].double()
    assert float(data["clean"] if "clean" in data else data["unchanged"]) == pytest.approx(float(z[7] - z[9]), abs=1e-6)


def test_a_wrapped_forward_is_opened() -> None:
    """B16: `forward(*args, **kwargs)` by a decorator is no obstacle."""
    module = build("gpt2")
    plain = module.forward

    def forward(*args, **kwargs):
        return plain(*args, **kwargs)

    module.forward = forward
    model = pl.load(module, tokenizer=tokenizer())
    assert close(model.run([CLEAN, LONG]).logits, opened("gpt2").run([CLEAN, LONG]).logits)
    assert OTHER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_of_circuits_proves_something_in_half_precision(dtype: torch.dtype) -> None:
    """Of the kind of A22, found by the matrix: allowed were 1.2 times the logits, so a missing reader passed."""
    with pytest.raises(Refused, match="reads the stream"):
        pl.circuits.edge_attribution(opened("qwen3_next", dtype=dtype), CLEAN, DIFFERENCE, how="zero")
    for family in ("llama", "gemma3_text"):  # gemma's norm ends in `type_as(x)`, which is no second reading of x
        pl.circuits.edge_attribution(opened(family, dtype=dtype), CLEAN, DIFFERENCE, how="zero")


def test_a_patchscope_reads_tokens_where_they_are_answered() -> None:
    """Of the kind of A7, found by the fuzz test: a classifier's classes are no tokens, and a mask is not the end."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    classes = pl.load(BertForSequenceClassification(build("bert").config).eval(), tokenizer=tokenizer(build("bert")))
    for model in (classes, opened("bert")):
        with pytest.raises(InputError):
            pl.lenses.patchscope(model, "Paris is", layers=0, top=1)
