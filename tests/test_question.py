"""What is asked is decided in one place: where an answer is read, what it is, its rival, and one number for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.attribution import continuation, reading, saliency
from pellucid.attribution.case import Case
from pellucid.engine.places import answer_position
from pellucid.errors import InputError
from pellucid.metrics import class_logit, class_probability, kl_divergence, log_odds, logit
from pellucid.question import Question, label
from tests.attribution.hand import PROMPT, classifier, opened, token
from tests.zoo import build, tokenizer
from tests.zoo.build import Entry

MASKED = "The capital of <mask> is Paris"


def bert(kind, **config):
    """A tiny BERT with a head."""
    module = build(Entry("bert", f"BertFor{kind}" if kind else "BertModel", "head"), **config)
    return pl.load(module, tokenizer=tokenizer(module))


def asked(question):
    """The question's number for its prompts, [row]."""
    run = question.model.run(question.inputs)
    return question.read(run.logits.detach(), run.inputs.stream("").mask)[:, 0]


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
    for each in (logit(" France"), logit(" France", position=at)):  # a metric that names no place is asked there too
        torch.testing.assert_close(value(Case.of(model, prompt, each)), z[at, [token(model, "France")]])
    with pytest.raises(InputError, match="2 mask tokens"):
        Case.of(model, "The <mask> of <mask>", logit(" France"))


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


# ---- every kind


def test_several_prompts_have_an_answer_each_and_predicted_ones_are_recorded():
    model, prompts = opened("gpt2"), [PROMPT, "The capital", "Mary gave"]
    z = [model.run(p).logits[0, -1].detach() for p in prompts]
    found = Question.of(model, prompts)
    assert [a.id for a in found.answers] == [int(x.argmax()) for x in z]
    torch.testing.assert_close(asked(found), torch.stack([x.max() for x in z]), atol=1e-5, rtol=1e-5)
    said = Question.of(model, prompts, [" Paris", " Rome", " John"], against=" the")
    words = [token(model, w) for w in ("Paris", "Rome", "John")]
    expected = [x[w] - x[token(model, "the")] for x, w in zip(z, words, strict=True)]
    torch.testing.assert_close(asked(said), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert [a.id for a in said.against] == [token(model, "the")] * 3


def test_an_encoder_decoder_is_asked_for_its_first_token_or_the_next_after_what_its_decoder_was_given():
    model = opened("t5")
    first, later = Question.of(model, PROMPT), Question.of(model, PROMPT, decoder="Rome is")
    assert (first.kind, later.kind) == ("first token", "next token")
    z = model.run(PROMPT, decoder="Rome is").logits[0, -1].detach()
    assert later.answers[0].id == int(z.argmax())


def test_a_masked_model_is_read_at_its_mask_alone():
    model = opened("bert")
    found = Question.of(model, MASKED)
    z = model.run(MASKED).logits[0, 5].detach()  # <s> The capital of, a space of its own, <mask>
    assert (found.kind, found.position, found.answers[0].id) == ("masked token", 5, int(z.argmax()))
    assert answer_position(model, model.inputs(["The <mask>", "The capital of <mask>"])) == -2  # before </s> in both
    with pytest.raises(InputError, match="no mask tokens"):
        Question.of(model, PROMPT)
    with pytest.raises(InputError, match="different places"):
        Question.of(model, ["The <mask> of France", "The capital of <mask>"])
    assert Question.of(model, PROMPT, logit(" Paris")).metric.positions == (-1,)  # a metric says itself where


def test_independent_classes_each_have_a_probability_of_their_own():
    model = bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification")
    run = model.run(PROMPT)
    z = run.logits[0].detach()
    question = Question.of(model, PROMPT)
    torch.testing.assert_close(question.distribution(run)[0, :, 1].detach(), z.sigmoid())
    assert float(model.score(run, class_probability(1))[0]) == pytest.approx(float(z[1].sigmoid()))
    best = question.likeliest(run, 3)[0]
    assert [a.id for a in best] == z.argsort(descending=True).tolist()
    assert best[0].probability == pytest.approx(float(z.max().sigmoid()))


def test_one_class_is_a_yes_or_no_and_has_a_gradient():
    model = bert("SequenceClassification", num_labels=1)
    run = model.run(PROMPT)
    p = float(model.score(run, class_probability(0))[0])
    assert p == pytest.approx(float(run.logits[0, 0].sigmoid()))
    assert p < 0.999
    assert (saliency(model, PROMPT, class_probability(0)).values[1:-1] > 0).all()


def test_a_regression_is_a_number_without_rival_or_probability():
    model = bert("SequenceClassification", num_labels=1, problem_type="regression")
    found = Question.of(model, PROMPT)
    assert (found.kind, float(asked(found))) == ("value", pytest.approx(float(model.run(PROMPT).logits[0, 0])))
    with pytest.raises(InputError, match="has no rival"):
        Question.of(model, PROMPT, against=0)
    with pytest.raises(InputError, match="gives a number here, not a choice"):
        found.distribution(model.run(PROMPT))
    with pytest.raises(InputError, match="not the probability of a class"):
        model.bind(class_probability(0))


def test_a_token_classifier_is_asked_for_the_label_of_a_word():
    names = {0: "O", 1: "B-LOC", 2: "I-LOC"}
    model = bert("TokenClassification", num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    z = model.run(PROMPT).logits[0].detach()
    row = model.inputs(PROMPT).stream("").ids[0].tolist()
    at = row.index(token(model, "France"))
    torch.testing.assert_close(asked(Question.of(model, PROMPT, label("B-LOC", word="France"))), z[[at], 1])
    contrast = Question.of(model, PROMPT, label("B-LOC", word=at), against="O")
    torch.testing.assert_close(asked(contrast), z[[at], 1] - z[[at], 0])
    assert Question.of(model, PROMPT, label(word="France")).answers[0].text == names[int(z[at].argmax())]
    given = Question.of(model, [row], label("B-LOC", word="France"))  # ids have no text of their own
    assert given.position == at
    with pytest.raises(InputError, match="labels every word: name one"):
        Question.of(model, PROMPT, "B-LOC")
    for use in (lambda m: Question.of(model, PROMPT, m), lambda m: pl.causal.ablation(model, PROMPT, metric=m)):
        use(logit("B-LOC", position=at))
        with pytest.raises(InputError, match="say where logit is read"):  # not at the last token, which is a mark
            use(logit("B-LOC"))
    with pytest.raises(InputError, match="does not label words"):
        Question.of(classifier(), PROMPT, label("good", word=1))
    with pytest.raises(InputError, match="is no class"):
        model.bind(logit(" Paris"))


def test_a_reader_of_spans_is_asked_for_a_stretch_of_its_prompt():
    model = bert("QuestionAnswering")
    prompt = "The capital of France is Paris"
    with torch.no_grad():
        out = model.module(**model.inputs(prompt).tensors)
    start, end = out.start_logits[0], out.end_logits[0]
    row = model.inputs(prompt).stream("").ids[0].tolist()
    a, b = row.index(token(model, "capital")), row.index(token(model, "France"))
    torch.testing.assert_close(asked(Question.of(model, prompt, "capital of France")), (start[a] + end[b])[None])
    found = Question.of(model, prompt)
    pairs = [(float(start[i] + end[j]), (i, j)) for i in range(len(row)) for j in range(i, len(row))]
    assert found.answers[0].ids == max(pairs)[1]
    rival = Question.of(model, prompt, "capital of France", against="Paris")
    n = row.index(token(model, "Paris"))
    torch.testing.assert_close(asked(rival), (start[a] + end[b] - start[n] - end[n])[None])
    p = found.distribution(model.run(prompt))
    torch.testing.assert_close(p[0].detach(), torch.stack([start.softmax(0), end.softmax(0)]))
    with pytest.raises(InputError, match="is not in the prompt"):
        Question.of(model, prompt, "Berlin")


# ---- what a model does not answer


@pytest.mark.parametrize("metric", [logit(" Paris"), class_logit(0), kl_divergence(torch.zeros(97)), log_odds(5)])
def test_a_headless_model_answers_to_no_metric_of_answers(metric):
    model = bert("")
    with pytest.raises(InputError, match="gives vectors"):
        model.bind(metric)
    with pytest.raises(InputError, match="gives vectors"):
        model.sweep(PROMPT, [pl.Scale("layers.0.mlp.out", 0.0)], metric)


@pytest.mark.parametrize("ask", [pl.attention.attention_gradient, pl.attribution.saliency, pl.attention.relevance])
def test_attention_and_attribution_refuse_the_same_questions(ask):
    with pytest.raises(InputError, match="gives vectors, not answers"):
        ask(bert(""), PROMPT)
    with pytest.raises(InputError, match="2 mask tokens"):
        ask(opened("bert"), "The <mask> of <mask>")
    with pytest.raises(InputError, match="5 is no class"):
        ask(classifier(), PROMPT, 5)
    with pytest.raises(InputError, match="unknown to this model"):
        ask(opened("gpt2"), PROMPT, 10**6)
    assert ask(classifier(), PROMPT, "good").data.equals(ask(classifier(), PROMPT, 2).data)


@pytest.mark.parametrize("wrong", [class_logit(0), class_probability(0)])
def test_tokens_and_classes_are_not_taken_for_one_another(wrong):
    with pytest.raises(InputError, match="no classes of the whole text"):
        opened("gpt2").bind(wrong)
    with pytest.raises(InputError, match="use class_logit"):
        classifier().bind(logit(1))
    with pytest.raises(InputError, match="5 is no class"):
        classifier().bind(class_logit(5))
    assert classifier().bind(class_logit("good")).score(torch.eye(3)[[2]]).tolist() == [1.0]


def test_a_predicted_answer_is_in_the_record():
    model = opened("gpt2")
    found = saliency(model, PROMPT)
    said = Question.of(model, PROMPT).answers[0]
    assert found.provenance.arguments["target"] in (said.text, said.id)
    assert found.data.attrs["answer"] == said.text
    assert saliency(classifier(), PROMPT).provenance.arguments["target"] in ("bad", "fair", "good")


def test_score_and_sweep_read_where_the_prompt_is_answered():
    model = opened("bert")
    run = model.run(MASKED)
    z = run.logits[0].detach()
    paris = token(model, "Paris")
    assert model.score(run, logit(" Paris")).tolist() == z[[5], paris].tolist()  # the mask
    assert model.score(run, logit(" Paris", position=-1)).tolist() == z[[-1], paris].tolist()
    swept = model.sweep(MASKED, [pl.Scale("layers.0.mlp.out", 1.0)], logit(" Paris"))
    torch.testing.assert_close(swept.clean, z[[5], paris].to(swept.clean))
    with pytest.raises(InputError, match="say where logit is read"):
        bert("TokenClassification").sweep(PROMPT, [pl.Scale("layers.0.mlp.out", 1.0)], logit(0))
