"""Embeddings of tokens and positions are sites: what they hand out can be kept and edited, or is refused by name."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.errors import Refused
from tests.zoo import build, tokenizer


def opened(kind: str) -> pl.Model:
    module = build(kind)
    return pl.load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt", "llama", "gemma", "t5", "bart", "mamba"])
def test_another_tokens_vector_stands_for_that_token(kind: str) -> None:
    model = opened(kind)
    inputs, ids = model.inputs("The capital of Peru is"), model.inputs("The city of Rome is")
    site = f"{model.anatomy.stacks[0].prefix}embed.tokens"
    vectors = model.run(ids, keep=[site]).tensor(site)
    n = min(vectors.shape[1], model.run(inputs, keep=[site]).tensor(site).shape[1])
    mixed = {k: v.clone() for k, v in inputs.tensors.items()}
    mixed["input_ids"][:, 1:n] = ids.tensors["input_ids"][:, 1:n]
    wanted = model.run(model.inputs(mixed)).logits
    patch = pl.Patch(f"{site}@1:{n}", vectors[:, 1:n])
    torch.testing.assert_close(model.run(inputs, edits=[patch]).logits, wanted)
    variants = [[patch], [pl.Ablate(f"{site}@1")]]
    metric = pl.metrics.as_metric(lambda logits: logits[:, -1, 5])
    swept = model.sweep(inputs, variants, metric).values
    plain = [float(model.run(inputs, edits=each).logits[0, -1, 5].detach()) for each in variants]
    torch.testing.assert_close(torch.as_tensor(swept).flatten().float(), torch.tensor(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt", "bart"])
def test_positions_are_those_of_the_table_for_every_prompt(kind: str) -> None:
    model = opened(kind)
    site = f"{model.anatomy.stacks[0].prefix}embed.positions"
    inputs = model.inputs(["The city of Rome", "Rome of The city"])
    run = model.run(inputs, keep=[site])
    made = run.tensor(site)
    assert made.shape == (2, inputs.streams[model.anatomy.stacks[0].name].ids.shape[1], made.shape[2])
    torch.testing.assert_close(made[0], made[1])
    moved = model.run(inputs, edits=[pl.Patch(f"{site}@1", made[:1, 2:3].expand(2, -1, -1))])
    assert not torch.allclose(moved.logits, run.logits)
    torch.testing.assert_close(model.run(inputs, edits=[pl.Patch(site, made)]).logits, run.logits)


def test_a_model_without_position_embeddings_says_so() -> None:
    with pytest.raises(Refused, match="does not look its input positions up"):
        opened("llama").run("The capital", keep=["embed.positions"])


def test_tracing_serves_models_that_take_no_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("gpt2")
    options = {"subject": "capital", "target": 19, "parts": ["mlp.out"], "window": 2, "draws": 2}
    native = pl.causal.tracing(model, "The capital of", **options)
    forward = type(model.module).forward

    def without(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, past_key_values=None):
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    monkeypatch.setattr(type(model.module), "forward", without)
    again = pl.causal.tracing(model, "The capital of", **options)
    torch.testing.assert_close(
        torch.tensor(again["effect"].values), torch.tensor(native["effect"].values), rtol=1e-3, atol=1e-6
    )
