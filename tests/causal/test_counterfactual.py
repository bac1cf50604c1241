"""The smallest substitutions: found where they are known, minimal by exhaustive search, and real text."""

from __future__ import annotations

import copy
from itertools import combinations, product

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import BertForSequenceClassification

from pellucid import Model, load
from pellucid.anatomy.modes import running
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
    result = counterfactual(model, PROMPT, max_changes=3, positions="0:4")
    text = str(result.text.values[0])
    before, after = (int(model.run(t).logits[0, -1].argmax()) for t in (PROMPT, text))
    assert before != after
    assert model.tokenizer.decode([after]) == str(result.after.values[0])
    assert result.corrupted.item() < 0 < result.clean.item()
    old, new = (model.inputs(t).stream("").ids[0] for t in (PROMPT, text))
    changed = (old != new).nonzero().flatten().tolist()
    assert len(changed) == result.changes.item() == str(result.substitutions.values[0]).count("->")
    for less in subsets(old, new):
        assert int(model.run(less[None]).logits[0, -1].argmax()) == before


def subsets(old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    """What is left of the change when some, but not all, of it is taken back."""
    changed = (old != new).nonzero().flatten().tolist()
    kept = (which for n in range(1, len(changed)) for which in combinations(changed, n))
    return [old.clone().index_copy_(0, torch.tensor(which), new[list(which)]) for which in kept]


def test_a_set_that_flips_is_cut_down_until_every_substitution_is_needed() -> None:
    model = opened("gpt2")
    for seed in range(6):
        search = Search.of(model, "The capital city of France is in Italy and Mary went", None, None)
        start = search.inputs.stream("").ids[0]
        drawn = [search._random(start, 6, np.random.default_rng(seed + 100 * i)) for i in range(200)]
        row = next(r for r in drawn if search.margins([r])[0] < 0 and search.stable(r))
        cut = search._taken_back(row, start)
        assert search.margins([cut])[0] < 0
        changed = (cut != start).nonzero().flatten().tolist()
        assert set(changed) <= set((row != start).nonzero().flatten().tolist())
        for i in changed if len(changed) > 1 else []:
            less = cut.clone()
            less[i] = start[i]
            assert search.margins([less])[0] >= 0 or not search.stable(less)


def test_one_substitution_is_found_wherever_exhaustive_search_finds_one() -> None:
    model = opened("gpt2")
    for text in (PROMPT, "Mary and John went to the store", "The city of Rome"):
        search = Search.of(model, text, None, "1:3")
        start = search.inputs.stream("").ids[0]
        rows = []
        for i, token in product(search.free, range(97)):
            if search.allowed(int(start[i]))[token]:
                rows.append(start.clone().index_fill_(0, torch.tensor(i), token))
        possible = any(m < 0 and search.stable(r) for m, r in zip(search.margins(rows), rows, strict=True))
        with running(model.module):  # as inside `counterfactual`
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
            text = str(result.text.values[0])
            logits = model.run(text).logits[0]
            assert logits[target] > logits[before]
            for less in subsets(*(model.inputs(t).stream("").ids[0] for t in (PROMPT, text))):
                logits = model.run(less[None]).logits[0]
                assert logits[before] > logits[target]
    with pytest.raises(InputError, match="already"):
        counterfactual(model, PROMPT, target=before)
    module = build(entry, num_labels=1)
    with pytest.raises(InputError, match="has a single class"):
        counterfactual(load(module, tokenizer=tokenizer(module)), PROMPT)


GOOD = [
    "wonderful",
    "great",
    "lovely",
    "excellent",
    "beautiful",
    "brilliant",
    "charming",
    "superb",
    "delightful",
    "amazing",
]
BAD = ["terrible", "awful", "boring", "dreadful", "ugly", "stupid", "horrible", "poor", "disappointing", "annoying"]


def test_one_word_turns_a_review_on_a_trained_encoder(minilm: Model) -> None:
    """all-MiniLM-L6-v2 with a head that was fitted to tell good words from bad ones."""
    texts = [f"The {thing} was {word}." for word in GOOD + BAD for thing in ("film", "book", "meal")]
    labels = torch.tensor([int(word in GOOD) for word in GOOD + BAD for _ in range(3)])
    config = copy.deepcopy(minilm.module.config)
    module = BertForSequenceClassification(config).eval()
    module.bert.load_state_dict(minilm.module.state_dict(), strict=False)
    with torch.no_grad():
        states = module.bert(**minilm.tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    head = LogisticRegression(C=10.0).fit(states.numpy(), labels.numpy())
    with torch.no_grad():
        module.classifier.weight.copy_(torch.tensor(np.concatenate([-head.coef_, head.coef_]) / 2))
        module.classifier.bias.copy_(torch.tensor(np.concatenate([-head.intercept_, head.intercept_]) / 2))
    model = load(module, tokenizer=minilm.tokenizer)
    review = "The play was fantastic and we stayed to the end."
    assert int(model.run(review).logits[0].argmax()) == 1
    result = counterfactual(model, review)
    assert result.changes.item() == 1
    text = str(result.text.values[0])
    assert int(model.run(text).logits[0].argmax()) == 0
    assert result.random_flips.item() < 0.5
    before, after = (model.tokenizer(t)["input_ids"] for t in (review, text))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@pytest.mark.slow
def test_another_subject_turns_smollm2s_answer(smollm2: Model) -> None:
    prompt = "The capital of France is the city of"
    result = counterfactual(smollm2, prompt, positions="' France'", max_changes=1)
    assert result.before.item() == " Paris"
    assert result.changes.item() == 1
    assert (
        int(smollm2.run(str(result.text.item())).logits[0, -1].argmax()) != smollm2.run(prompt).logits[0, -1].argmax()
    )
    assert result.random_flips.item() > 0.5  # nearly any other subject does: the control says so


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
