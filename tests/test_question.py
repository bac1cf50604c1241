"""A target is what the model's logits, or the values at a site, say it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.attribution import continuation, reading
from pellucid.attribution.case import Case
from pellucid.errors import InputError
from pellucid.metrics import log_odds
from tests.attribution.hand import PROMPT, classifier, opened, token


def value(case):
    """The target of the prompt, [output]."""
    run = case.model.run(case.inputs, keep=[case.question.site] if case.question.site else [])
    found = run.tensor(case.question.site) if case.question.site else run.logits
    return case.read(found.detach())[0]


def test_a_token_is_its_logit_after_the_last_position_and_a_contrast_the_difference():
    model = opened("gpt2")
    z = model.run(PROMPT).logits[0, -1].detach()
    paris, rome = token(model, "Paris"), token(model, "Rome")
    torch.testing.assert_close(value(Case.of(model, PROMPT, " Paris")), z[[paris]])
    torch.testing.assert_close(value(Case.of(model, PROMPT, " Paris", against=" Rome")), z[[paris]] - z[[rome]])
    torch.testing.assert_close(value(Case.of(model, PROMPT)), z.max()[None])


def test_a_masked_model_is_asked_at_its_mask():
    model = opened("bert")
    prompt = "The capital of <mask> is Paris"
    z = model.run(prompt).logits[0].detach()
    at = model.inputs(prompt).stream("").ids[0].tolist().index(model.tokenizer.mask_token_id)
    torch.testing.assert_close(value(Case.of(model, prompt, " France")), z[at, [token(model, "France")]])
    with pytest.raises(InputError, match="2 mask tokens"):
        Case.of(model, "The <mask> of <mask>", " France")


def test_a_class_is_named_or_numbered():
    model = classifier()
    z = model.run(PROMPT).logits[0].detach()
    torch.testing.assert_close(value(Case.of(model, PROMPT, "good")), z[[2]])
    torch.testing.assert_close(value(Case.of(model, PROMPT, 0, against="good")), z[[0]] - z[[2]])
    torch.testing.assert_close(value(Case.of(model, PROMPT)), z.max()[None])
    with pytest.raises(InputError, match=r"'great' is no class of this classifier: expected one of 0 \(bad\)"):
        Case.of(model, PROMPT, "great")


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("of", ["log_probability", "probability", "logit"])
def test_a_continuation_is_every_token_after_those_before_it(family, of):
    model = opened(family)
    case = Case.of(model, PROMPT, continuation(" Paris and Rome", of=of))
    given = model.inputs(PROMPT)
    ids = given.stream("").ids
    expected = []
    said = [model.tokenizer.convert_tokens_to_ids(t) for t in ("▁Paris", "▁and", "▁Rome")]
    for each in said:
        tensors = {"decoder_input_ids": ids} if "decoder" in given.streams else {}
        source = given.streams["encoder"].ids if tensors else ids
        with torch.no_grad():
            z = model.module(input_ids=source, **tensors).logits[0, -1]
        y = {"log_probability": z.log_softmax(-1), "probability": z.softmax(-1), "logit": z}[of]
        expected.append(y[each])
        ids = torch.cat([ids, torch.tensor([[each]])], 1)
    torch.testing.assert_close(value(case), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert [t.strip() for t in case.question.outputs] == ["Paris", "and", "Rome"]


def test_what_the_model_says_itself_is_the_default_continuation():
    model = opened("gpt2")
    case = Case.of(model, PROMPT, continuation(max_new_tokens=4))
    said = model.generate(PROMPT, max_new_tokens=4).tokens[0]
    assert len(case.question.outputs) == len(said)
    assert torch.equal(case.inputs.stream("").ids[0, -len(said) + 1 :], said[:-1])


def test_a_reading_is_a_neuron_or_a_direction_at_one_position():
    model = opened("llama")
    kept = model.run(PROMPT, keep=["layers.1.mlp.neurons", "layers.1.resid_post"])
    neuron = kept.tensor("layers.1.mlp.neurons")[0, -1, [7]].detach()
    torch.testing.assert_close(value(Case.of(model, PROMPT, reading("layers.1.mlp.neurons.7@-1"))), neuron)
    direction = torch.randn(32)
    there = kept.tensor("layers.1.resid_post")[0, 2].detach() @ direction
    torch.testing.assert_close(
        value(Case.of(model, PROMPT, reading("layers.1.resid_post@2", direction))), there[None], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(InputError, match="where one is attributed"):
        Case.of(model, PROMPT, reading("layers.1.resid_post@2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "Parisian"}, "is 8 tokens here|tokens here"),
        ({"target": log_odds(" Paris"), "against": " Rome"}, "against= goes with a target token"),
        ({"target": " Paris", "prompt": ""}, "the prompt is empty"),
        ({"target": " Paris", "prompt": ["The", "of"]}, "one prompt at a time, got 2"),
        ({"target": " Paris", "prompt": "is " * 90}, "the model's context holds 64"),
        ({"target": continuation(" Paris"), "decoder": " Rome"}, "only encoder-decoder models take decoder="),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(arguments, message):
    with pytest.raises(InputError, match=message):
        Case.of(opened("gpt2"), **{"prompt": PROMPT, **arguments})


def test_an_unknown_number_or_an_empty_continuation_is_refused():
    with pytest.raises(InputError, match="of='odds'"):
        continuation(" Paris", of="odds")
    with pytest.raises(InputError, match="the continuation is empty"):
        continuation("")


def test_a_model_of_vectors_asks_for_a_metric(minilm):
    with pytest.raises(InputError, match="gives vectors, not answers"):
        Case.of(minilm, PROMPT)
    found = value(Case.of(minilm, PROMPT, lambda hidden: hidden[:, 0, 5]))
    assert np.isfinite(float(found))
