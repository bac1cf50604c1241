"""The search for inputs: its slopes are those of one-hot tokens, its values those of plain runs, its texts readable."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pellucid
from pellucid.errors import InputError, Refused
from pellucid.neurons.harvest import Units
from pellucid.neurons.objective import Objective
from pellucid.neurons.search import Exchanges, activating_inputs
from pellucid.neurons.vocabulary import Vocabulary
from pellucid.results import Result
from tests.zoo import build, tokenizer

FEW = Exchanges(top=8, trials=6)
UNIT = "layers.1.mlp.neurons.5"


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def unit_of(model, unit=UNIT):
    return f"{model.anatomy.stacks[0].prefix}{unit}"


def searched(family, **options):
    model = opened(family)
    options = {"length": 5, "steps": 4, "restarts": 2, "exchanges": FEW} | options
    return model, activating_inputs(model, unit_of(model), **options)


@pytest.mark.parametrize("fluency", [0.0, 0.7])
def test_slopes_are_those_of_the_objective_in_one_hot_tokens(fluency):
    model = opened("gpt2")
    vocabulary = Vocabulary.of(model)
    aim = Objective(model, UNIT, vocabulary, fluency)
    aim.spread = 0.3
    rows = vocabulary.draw(3, 6, torch.Generator().manual_seed(0))
    table = model.module.get_input_embeddings().weight
    one_hot = F.one_hot(rows, len(table)).float().requires_grad_()
    met = []
    hook = model.module.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda m, args: met.append(args[0]))
    logits = model.module(inputs_embeds=one_hot @ table).logits
    hook.remove()
    objective = met[0][:, -1, 5] + fluency * 0.3 * (logits[:, :-1].log_softmax(-1) * one_hot[:, 1:]).sum(-1).mean(1)
    (slope,) = torch.autograd.grad(objective.sum(), one_hot)
    torch.testing.assert_close(aim.estimates(rows), slope[..., vocabulary.allowed], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(aim.value(aim.score(rows)), objective.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bert", "t5"])
def test_what_is_reported_is_what_a_plain_run_of_the_text_gives(family):
    model, found = searched(family)
    for text, tokens, activation in zip(found.text.values, found.tokens.values, found.activation.values, strict=True):
        run = model.run(text, keep=[unit_of(model)])
        stream = run.stream(model.sites(unit_of(model))[0])
        values = run.tensor(unit_of(model))[0].detach()
        inside = torch.isin(stream.ids[0], torch.tensor(model.tokenizer.all_special_ids), invert=True)
        assert stream.ids[0][inside].tolist() == tokens.tolist()
        expected = values[inside][-1] if family in ("gpt2", "llama", "gemma2") else values[inside].max()
        assert activation == pytest.approx(float(expected), abs=1e-5)


def test_cross_entropy_is_that_of_the_text_under_the_model():
    model, found = searched("llama", fluency=0.5)
    ids = torch.from_numpy(found.tokens.values)
    logits = model.run(ids).logits.detach()
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(found.nats, nats, atol=1e-5)
    np.testing.assert_allclose(found.objective, found.activation - 0.5 * float(found.spread) * found.nats, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_climb_never_goes_down_and_the_controls_start_where_it_started(family):
    _, found = searched(family, steps=6)
    path = found.path.values
    assert (np.diff(path, axis=1) >= 0).all()
    assert path[:, -1].tolist() == found.objective.values.tolist() == sorted(path[:, -1], reverse=True)
    assert float(found.control_objective.sel(control="blind exchanges")) >= path[:, 0].max() - 1e-6


def test_where_the_unit_is_linear_in_the_embeddings_one_exchange_finds_the_best_token():
    model = opened("llama")
    direction = torch.randn(model.anatomy.stacks[0].d_model, generator=torch.Generator().manual_seed(3))
    found = activating_inputs(
        model, Units("layers.0.resid_pre", direction), length=1, steps=1, restarts=1,
        exchanges=Exchanges(top=1, trials=4),
    )  # fmt: skip
    vocabulary = Vocabulary.of(model)
    able = vocabulary.allowed[vocabulary.survive(vocabulary.allowed[:, None])]
    scores = model.module.get_input_embeddings().weight.detach() @ direction
    assert len(able) > 20
    top = vocabulary.allowed[scores[vocabulary.allowed].argmax()]
    if top in able:
        assert found.tokens.values[0, 0] == int(top)
    assert float(found.activation[0]) <= float(scores[able].max()) + 1e-5


def test_a_direction_a_function_and_a_number_name_the_same_unit():
    model = opened("gpt2")
    whole, direction = "layers.0.mlp.neurons", torch.zeros(model.anatomy.stacks[0].blocks[0].sizes["neuron"])
    direction[7] = 1.0
    options = {"length": 4, "steps": 2, "restarts": 2, "exchanges": FEW}
    one = activating_inputs(model, "layers.0.mlp.neurons.7", **options)
    for unit in (Units(whole, direction), (Units(whole, lambda x: x), 7), (Units(whole), 7)):
        assert activating_inputs(model, unit, **options).data.identical(one.data)


def test_a_seed_gives_the_same_texts_again():
    assert searched("gpt2", seed=3)[1] == searched("gpt2", seed=3)[1]
    assert searched("gpt2", seed=4)[1] != searched("gpt2", seed=3)[1]


def test_ids_that_are_no_text_are_searched_only_when_asked():
    model = opened("gpt2")
    options = {"length": 6, "steps": 2, "restarts": 2}
    free = activating_inputs(model, UNIT, exchanges=Exchanges(8, 6, readable=False), **options)
    assert free.tokens.shape == (2, 6)
    bare = copy.copy(model)
    bare.tokenizer = None
    with pytest.raises(InputError, match="without a tokenizer"):
        activating_inputs(bare, UNIT, exchanges=FEW, **options)
    assert activating_inputs(bare, UNIT, exchanges=Exchanges(8, 6, False), **options).text.values[0].startswith("#")


def test_the_corpus_control_is_its_largest_context_and_that_context_cut():
    corpus = ["The capital of France is Paris", "Mary and John went to the store", "he gave a drink to Mary and John"]
    model, found = searched("gpt2", texts=corpus)
    values = [model.run(text, keep=[UNIT]).tensor(UNIT)[0].detach() for text in corpus]
    assert float(found.control_activation.sel(control="corpus")) == pytest.approx(
        max(float(v[1:].max()) for v in values), abs=1e-5
    )
    text = str(found.control_text.sel(control="corpus, same length").values)
    assert len(model.inputs(text).stream("").ids[0]) == 5
    again = model.run(text, keep=[UNIT]).tensor(UNIT)[0, -1].detach()
    assert float(found.control_activation.sel(control="corpus, same length")) == pytest.approx(float(again), abs=1e-5)


def test_an_interrupted_search_returns_what_it_has():
    model = opened("gpt2")
    calls = []

    def unit(x):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return x[:, 5]

    found = activating_inputs(model, Units("layers.1.mlp.neurons", unit), length=5, steps=20, restarts=2, exchanges=FEW)
    assert found.data.attrs["interrupted"]
    assert 1 < found.data.sizes["step"] < 20
    assert found.data.sizes["control"] == 0


def test_bad_questions_are_one_clear_error():
    options = {"length": 4, "steps": 1, "restarts": 1}
    with pytest.raises(InputError, match="name one unit of it"):
        activating_inputs(opened("gpt2"), "layers.0.mlp.neurons", **options)
    with pytest.raises(InputError, match="must name one unit"):
        activating_inputs(opened("gpt2"), "layers.*.mlp.neurons.3", **options)
    with pytest.raises(InputError, match="gives a text no likelihood"):
        activating_inputs(opened("bert"), UNIT, fluency=1.0, **options)
    with pytest.raises(InputError, match="the text goes into the encoder"):
        activating_inputs(opened("t5"), "decoder.layers.0.mlp.neurons.3", **options)
    with pytest.raises(InputError, match="length=0: expected at least 1"):
        activating_inputs(opened("gpt2"), UNIT, length=0)
    one = activating_inputs(opened("gpt2"), UNIT, length=1, steps=1, restarts=1, fluency=1.0)
    assert float(one.nats[0]) == 0  # nothing foretells the first token
    with pytest.raises(Refused, match="no gradient reaches"):
        activating_inputs(opened("gpt2"), Units("layers.0.mlp.neurons", lambda x: x[:, 0].detach()), **options)


def test_on_a_trained_model_gradients_find_more_than_blind_exchanges_and_random_texts(smollm2):
    found = activating_inputs(
        smollm2, "layers.3.mlp.neurons.1000", length=6, steps=8, restarts=2,
        exchanges=Exchanges(trials=24),
    )  # fmt: skip
    controls = found.control_objective
    assert float(found.objective[0]) > 1.3 * float(controls.max())
    ids = smollm2.inputs(str(found.text[0].values)).stream("").ids[0]
    assert ids.tolist() == found.tokens.values[0].tolist()


def test_with_a_corpus_the_search_begins_at_its_best_contexts_and_ends_no_lower():
    corpus = ["The capital of France is Paris", "Mary and John went to the store", "he gave a drink to Mary and John"]
    _, found = searched("gpt2", texts=corpus, restarts=3)
    assert float(found.objective[0]) >= float(found.control_objective.sel(control="corpus, same length"))
    assert float(found.path[:, 0].max()) >= float(found.control_objective.sel(control="corpus, same length")) - 1e-6


def test_a_result_is_kept_and_read_again(tmp_path):
    _, found = searched("gpt2", texts=["The capital of France is Paris"], length=4)
    assert Result.load(found.save(tmp_path / "found.zip")) == found
