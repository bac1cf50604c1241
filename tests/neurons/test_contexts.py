"""Contexts of units: activations are those of plain runs, and what explains a unit never judges one."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import pellucid
from pellucid.errors import InputError
from pellucid.neurons import Units, harvest
from pellucid.neurons.contexts import Context, read_contexts
from tests.zoo import build, tokenizer

TEXTS = [
    "The capital of France is Paris", "Mary and John went to the store", "When he gave a drink to Mary",
    "The city of Rome is in Italy", "he went to the capital", "John gave a drink to the city of Paris", "in France",
    "The store is in Rome and he is in Paris", "When Mary went to Italy", "he is in the store", "and the capital of Italy is Rome",
]  # fmt: skip


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@cache
def found(family, site, skip=0):
    texts = [(text, text) for text in TEXTS] if "decoder" in site else TEXTS
    return harvest(opened(family), texts, site, top=8, sample=32, skip=skip)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("gpt2", "layers.1.mlp.neurons"),
        ("bert", "layers.0.mlp.neurons"),
        ("t5", "encoder.layers.0.mlp.neurons"),
        ("t5", "decoder.layers.1.mlp.neurons"),
    ],
)
def test_activations_are_those_of_a_plain_run_of_the_whole_text(family, site):
    model, made = opened(family), found(family, site)
    (unit,) = read_contexts(model, made, [f"{site}.3"], window=(50, 50))
    assert len(unit.shown) + len(unit.held_out) >= 8
    runs = {}
    for text in TEXTS:
        run = model.run(text, keep=[site], decoder=text if "decoder" in site else None)
        stream = run.stream(model.sites(site)[0])
        special = np.isin(stream.ids[0].numpy(), model.tokenizer.all_special_ids)
        values = run.tensor(site)[0, :, 3].detach().numpy()
        runs[stream.labels[0]] = np.where(special, np.nan, values)
    for context in (*unit.shown, *unit.held_out):
        np.testing.assert_allclose(context.activations, runs[context.tokens], atol=1e-5)


def test_a_window_is_cut_around_the_largest_activation():
    model, site = opened("gpt2"), "layers.1.mlp.neurons"
    made = found("gpt2", site)
    (unit,) = read_contexts(model, made, [f"{site}.5"], random=1, window=(2, 1))
    best = made.top(f"{site}.5")[0]
    labels = model.inputs(TEXTS[best.prompt]).stream("").labels[0]
    cut = labels[max(0, best.position - 2) : best.position + 2]
    (context,) = [c for c in (*unit.shown, *unit.held_out) if c.tokens == cut]
    assert np.nanmax(context.activations) == pytest.approx(best.value, abs=1e-5)


def test_texts_that_explain_one_unit_judge_no_other():
    model, site = opened("gpt2"), "layers.1.mlp.neurons"
    units = read_contexts(model, found("gpt2", site), [f"{site}.{i}" for i in range(6)], window=(50, 50))
    shown = {c.tokens for unit in units for c in unit.shown}
    held_out = {c.tokens for unit in units for c in unit.held_out}
    assert shown and held_out and not shown & held_out


def test_tokens_the_harvest_skipped_do_not_count():
    site = "layers.1.mlp.neurons"
    (unit,) = read_contexts(opened("gpt2"), found("gpt2", site, 2), [f"{site}.0"], window=(50, 50))
    assert all(not c.counted[:2].any() and c.counted[2:].all() for c in (*unit.shown, *unit.held_out))


def test_directions_have_contexts_as_neurons_do():
    model, site = opened("gpt2"), "layers.0.mlp.neurons"
    axis = Units(site, torch.eye(model.anatomy.stacks[0].blocks[0].sizes["neuron"])[[4]], "axis")
    made = harvest(model, TEXTS, [site, axis], top=8, sample=32)
    one, other = read_contexts(model, made, [f"{site}.4", "axis.0"])
    assert one.level == pytest.approx(other.level) and len(one.shown) == len(other.shown)
    for a, b in zip(one.shown, other.shown, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.activations, b.activations, atol=1e-6)


def test_marks_stand_around_words_and_not_around_their_spaces():
    context = Context((" the", " cat", "'s"), np.array([0.0, 2.0, np.nan]))
    assert context.marked(context.above(1.0)) == " the <<cat>>'s"
    assert context.above(-1).tolist() == [True, True, False]
    with pytest.raises(InputError, match="expected one each"):
        Context(("a",), np.zeros(2))


def test_other_weights_and_no_units_are_one_clear_error():
    made = found("gpt2", "layers.1.mlp.neurons")
    with pytest.raises(InputError, match="expected a list of units, at least one"):
        read_contexts(opened("gpt2"), made, [])
    with pytest.raises(InputError, match="belongs to other weights"):
        read_contexts(opened("bert"), made, ["layers.1.mlp.neurons.0"])
