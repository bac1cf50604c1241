"""An adapted model is the model with its weights merged: A1, A2, A23 of the faults people met."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import pellucid as pl
from pellucid.errors import PellucidError
from tests.matrix.hand import DECODER, Hand
from tests.zoo import build, tokenizer

from .cases import CLEAN, DIFFERENCE, close, difference

IDS = tokenizer()(CLEAN)["input_ids"]


def adapted(targets: list[str], **options: Any) -> tuple[Any, Any]:
    """A module with random LoRA, and the same with its weights merged."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    module = peft.get_peft_model(build("llama"), config).eval()
    return module, copy.deepcopy(module).merge_and_unload()


def hand(merged: Any) -> Hand:
    return Hand(DECODER, merged, [IDS], [-1], 4)


def test_a_tapped_value_with_a_second_reader() -> None:
    """A1: the adapter's branch of the output projection reads z too, so an edited head must reach it."""
    module, merged = adapted(["o_proj"])
    model, by_hand = pl.load(module, tokenizer=tokenizer()), hand(merged)
    found = (
        pl.causal.ablation(model, CLEAN, over="layers.*.attn.heads.*", metric=DIFFERENCE).data["value"].values.ravel()
    )
    wanted = [by_hand.difference(0, [by_hand.silence(layer, h)]) for layer in range(2) for h in range(4)]
    assert close(found, wanted)


def test_an_adapter_that_was_put_in_after_opening() -> None:
    """A1: the old map must notice it, or give the adapted model's numbers."""
    module = build("llama")
    model = pl.load(module, tokenizer=tokenizer())
    model.run(CLEAN)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    by_hand = hand(module.eval())
    wanted = by_hand.difference(0, [by_hand.silence(1, 2)])
    try:
        run = model.run(CLEAN, edits=[pl.Ablate("layers.1.attn.heads.2")])
    except PellucidError:
        return
    assert difference(run.logits[0, -1]) == pytest.approx(wanted, abs=1e-4)


def test_bookkeeping_hung_on_a_module_that_is_not_called() -> None:
    """A2: `generate` of a PEFT model calls its inner module; edits act in every step all the same."""
    module, merged = adapted(["q_proj", "v_proj"])
    model, by_hand = pl.load(module, tokenizer=tokenizer()), hand(merged)
    vector = torch.linspace(-2, 2, 32)
    made = model.generate(CLEAN, edits=[pl.Steer("layers.1.resid_post", vector)], max_new_tokens=6, temperature=0.0)
    wanted = by_hand.generated(0, [by_hand.steer(1, vector)], 6)
    assert made.ids(0)[: len(wanted)] == wanted[: len(made.ids(0))]
    assert len(made.ids(0)) == 6 or 2 in made.ids(0)


def test_an_adapter_on_the_embedding_is_part_of_every_token() -> None:
    """A23: what stands for an absent token is that token as the adapted model embeds it."""
    module, merged = adapted(["embed_tokens"])
    model = pl.load(module, tokenizer=tokenizer())
    result = pl.attribution.occlusion(model, CLEAN, 7, baseline=" the")
    the = tokenizer()(" the")["input_ids"]
    ids = torch.tensor([IDS])
    with torch.no_grad():
        score = merged(ids).logits[0, -1, 7]
        wanted = []
        for i in range(len(IDS)):
            absent = ids.clone()
            absent[0, i] = the[0]
            wanted.append(float(score - merged(absent).logits[0, -1, 7]))
    assert close(result.data["attribution"].values, wanted)


def test_prompt_tuning_reads_the_row_of_the_prompt() -> None:
    """A23: the virtual tokens stand before the prompt; the answer is still the last row."""
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    module = peft.get_peft_model(build("llama"), config).eval()
    with torch.no_grad():
        wanted = difference(module(input_ids=torch.tensor([IDS])).logits[0, -1])
    try:
        model = pl.load(module, tokenizer=tokenizer())
        run = model.run(CLEAN)
        score = float(model.score(run, DIFFERENCE))
    except PellucidError:
        return
    assert score == pytest.approx(wanted, abs=1e-4)
