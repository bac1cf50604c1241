"""The smallest substitutions: found where they are known, minimal by exhaustive search, and real text."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pellucid import Model, load
from pellucid.causal.counterfactual import Search, counterfactual
from pellucid.errors import InputError
from tests.zoo import build, model_types, tokenizer

PROMPT = "The capital of France is"


def opened(family: str) -> Model:
    module = build(family)
    return load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_found_flips_the_prediction_and_nothing_less_does(family: str) -> None:
    model = opened(family)
    result = counterfactual(model, PROMPT, max_changes=3, within="0:4")
    text = str(result.text.values[0])
    before, after = (int(model.run(t).logits[0, -1].argmax()) for t in (PROMPT, text))
    assert before != after
    assert model.tokenizer.decode([after]) == str(result.after.values[0])
    assert result.corrupted.item() < 0 < result.clean.item()
    old, new = (model.inputs(t).stream("").ids[0] for t in (PROMPT, text))
    changed = (old != new).nonzero().flatten().tolist()
    assert len(changed) == result.changes.item() == str(result.substitutions.values[0]).count("->")
    for i in changed if len(changed) > 1 else []:
        less = new.clone()
        less[i] = old[i]
        assert int(model.run(less[None]).logits[0, -1].argmax()) == before


def test_one_substitution_is_found_wherever_exhaustive_search_finds_one() -> None:
    model = opened("gpt2")
    for text in (PROMPT, "Mary and John went to the store", "The city of Rome"):
        search = Search.of(model, text, None, "1:3", -1)
        start = search.inputs.stream("").ids[0]
        rows = []
        for i, token in product(search.free, range(97)):
            if search.allowed(int(start[i]))[token]:
                rows.append(start.clone().index_fill_(0, torch.tensor(i), token))
        possible = any(m < 0 and search.stable(r) for m, r in zip(search.margins(rows), rows, strict=True))
        found = search.smallest(1, 97, 4)
        assert (found is not None) == possible


def test_a_classifier_is_flipped_to_the_class_asked_for() -> None:
    entry = next(e for e in model_types(all_classes=True) if e.class_name == "BertForSequenceClassification")
    module = build(entry, num_labels=3)
    model = load(module, tokenizer=tokenizer(module))
    before = int(model.run(PROMPT).logits[0].argmax())
    for target in {0, 1, 2} - {before}:
        result = counterfactual(model, PROMPT, target=target, max_changes=4)
        if result.changes.item() > 0:
            logits = model.run(str(result.text.values[0])).logits[0]
            assert logits[target] > logits[before]
    with pytest.raises(InputError, match="already"):
        counterfactual(model, PROMPT, target=before)


def test_nothing_is_returned_where_nothing_may_flip_and_several_prompts_come_with_an_interval() -> None:
    model = opened("gpt2")
    module = model.module
    with torch.no_grad():
        module.lm_head.weight = torch.nn.Parameter(torch.zeros_like(module.lm_head.weight))
        module.transformer.ln_f.bias.zero_()
        module.lm_head.weight[5] = 0.0
    model = load(module, tokenizer=model.tokenizer)
    stuck = counterfactual(model, PROMPT, max_changes=1)
    assert stuck.text.values[0] == ""
    assert torch.isnan(torch.tensor(stuck.changes.item()))
    several = counterfactual(opened("gpt2"), [PROMPT, "The city of Rome is"], max_changes=2)
    assert several.changes.shape == (2,)
    assert several.random_flips.values.max() <= 1
    assert several["total_low"].item() <= several["total_effect"].item() <= several["total_high"].item()
