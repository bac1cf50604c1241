"""Every kind of head, through every kind of technique: right by transformers alone, or refused by name."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import pellucid as pl
from pellucid.attribution import every_class, similarity
from pellucid.cli import app
from pellucid.errors import InputError, LoadError, PellucidError
from pellucid.metrics import class_logit, class_probability, log_probability, probability
from pellucid.question import Label, Question, label
from pellucid.views.report import build as report
from pellucid.workbench.answers import answer, passed
from tests.zoo import build, tokenizer
from tests.zoo.build import Entry

PROMPT, MASKED = "The capital of France is Paris", "The capital of <mask> is Paris"
NAMES = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
SEVERAL = NAMES | {"problem_type": "multi_label_classification"}
NUMBER = {"num_labels": 1, "problem_type": "regression"}

# kind of head -> model type, class, config, prompt, target, the kind of question, whether a lens can read it
HEADS = {
    "next token": ("gpt2", "GPT2LMHeadModel", {}, PROMPT, " Rome", "next token", True),
    "masked token": ("bert", "BertForMaskedLM", {}, MASKED, " Rome", "masked token", True),
    "two heads": ("bert", "BertForPreTraining", {}, MASKED, " Rome", "masked token", True),
    "class": ("bert", "BertForSequenceClassification", NAMES, PROMPT, "good", "class", False),
    "several classes": ("bert", "BertForSequenceClassification", SEVERAL, PROMPT, "good", "class", False),
    "one class": ("bert", "BertForSequenceClassification", {"num_labels": 1}, PROMPT, 0, "class", False),
    "regression": ("bert", "BertForSequenceClassification", NUMBER, PROMPT, None, "value", False),
    "decoder's class": ("gpt2", "GPT2ForSequenceClassification", NAMES | {"pad_token_id": None}, PROMPT, "good", "class", False),
    "label": ("bert", "BertForTokenClassification", NAMES, PROMPT, label("good", word="France"), "label", True),
    "replaced": ("electra", "ElectraForPreTraining", {}, PROMPT, label("replaced", word="France"), "label", False),
    "span": ("bert", "BertForQuestionAnswering", {}, PROMPT, "France", "span", False),
    "choice": ("bert", "BertForMultipleChoice", {}, PROMPT, None, "value", False),
    "next sentence": ("bert", "BertForNextSentencePrediction", {}, PROMPT, "is next", "class", False),
    "class of both ends": ("bart", "BartForSequenceClassification", NAMES, PROMPT, "good", "class", False),
    "class of both ends, relative": ("t5", "T5ForSequenceClassification", NAMES, PROMPT, "good", "class", False),
    "span of both ends": ("bart", "BartForQuestionAnswering", {}, PROMPT, "France", "span", False),
    "sentence embedding": ("bert", "BertModel", {}, PROMPT, similarity("Rome is in Italy"), "similarity", False),
}  # fmt: skip
EVERY = pytest.mark.parametrize("head", HEADS)


@cache
def opened(head):
    kind, name, config, *_ = HEADS[head]
    module = build(Entry(kind, name, "head"), **config)
    return pl.load(module, tokenizer=tokenizer(module))


@cache
def native(head):
    """The very class, outside of pellucid."""
    kind, name, config, *_ = HEADS[head]
    return build(Entry(kind, name, "head"), **config)


def by_hand(head, ids):
    """The number asked about, from transformers alone, for one row of ids as the tokenizer gives them."""
    _, _, _, prompt, target, kind, _ = HEADS[head]
    words, module = opened(head).tokenizer, native(head)
    given = {"input_ids": torch.tensor([ids])}
    with torch.no_grad():
        if head == "choice":
            return float(module(input_ids=given["input_ids"][None]).logits[0, 0])
        out = module(**given)
        if head == "sentence embedding":
            other = module(**words(target.text, return_tensors="pt"))
            pooled = [each.last_hidden_state.mean(1) for each in (out, other)]
            return float(torch.cosine_similarity(*pooled)[0])
    france = words(PROMPT)["input_ids"].index(words.convert_tokens_to_ids("▁France"))
    if kind == "span":
        return float(out.start_logits[0, france] + out.end_logits[0, france])
    z = out.prediction_logits if head == "two heads" else out.logits
    if kind == "label":
        return float(z[0, france] if head == "replaced" else z[0, france, 2])
    if kind in ("next token", "masked token"):
        at = -1 if kind == "next token" else words(prompt)["input_ids"].index(words.mask_token_id)
        return float(z[0, at, words.convert_tokens_to_ids("▁Rome")])
    return float(z[0, {"good": 2, "is next": 0}.get(target, 0)])


def asked(head):
    *_, prompt, target, _, _ = HEADS[head]
    return opened(head), prompt, target


@EVERY
def test_the_number_is_the_one_transformers_gives(head):
    model, prompt, target = asked(head)
    question = Question.of(model, prompt, target)
    assert question.kind == HEADS[head][5]
    run = model.run(question.inputs)
    found = float(question.read(run.logits.detach(), run.inputs.stream("").mask)[0, 0])
    assert found == pytest.approx(by_hand(head, model.tokenizer(prompt)["input_ids"]), abs=1e-5)


@EVERY
def test_occlusion_is_the_change_of_the_changed_text(head):
    model, prompt, target = asked(head)
    found = pl.attribution.occlusion(model, prompt, target, baseline="unk")
    ids = model.tokenizer(prompt)["input_ids"]
    at = ids.index(model.tokenizer.convert_tokens_to_ids("▁capital"))
    if "both ends" in head:  # the decoder is given the text too, moved by one: each end has a player of its own
        assert list(np.unique(found.data["stream"])) == ["source", "target"]
        said = found.data["token"].values.tolist()
        assert said[at] == said[len(ids) + at + 1] == " capital"
        return
    changed = [*ids[:at], model.tokenizer.unk_token_id, *ids[at + 1 :]]
    assert float(found.values[at]) == pytest.approx(by_hand(head, ids) - by_hand(head, changed), abs=1e-5)


@EVERY
def test_saliency_and_attention_ask_the_same_question(head):
    model, prompt, target = asked(head)
    for ask in (pl.attribution.saliency, pl.attention.attention_gradient):
        found = ask(model, prompt, target)
        assert np.isfinite(found.values).all()
        assert np.abs(found.values).max() > 0
        assert found.data.attrs.get("answer", "") in (
            "",
            " / ".join(a.text for a in Question.of(model, prompt, target).answers),
        )
    assert np.isfinite(pl.attention.rollout(model, prompt).values).all()


@EVERY
def test_ablation_is_what_a_hook_on_the_native_module_does(head):
    model, prompt, target = asked(head)
    question = Question.of(model, prompt, target)
    stack = model.anatomy.stacks[-1]
    found = pl.causal.ablation(
        model, prompt, metric=question.metric if target is None else target, over=f"{stack.prefix}layers.0.mlp.out"
    )
    tap = stack.blocks[0].taps["mlp.out"]
    part = native(head).get_submodule(tap.module)
    ids = model.tokenizer(prompt)["input_ids"]
    before = by_hand(head, ids)
    if head == "sentence embedding":  # the second text is read as it is
        return
    hook = part.register_forward_hook(lambda module, given, made: torch.zeros_like(made))
    try:
        assert float(found["effect"]) == pytest.approx(by_hand(head, ids) - before, abs=1e-5)
    finally:
        hook.remove()


@EVERY
def test_a_circuit_is_scored_by_the_same_number(head):
    model, prompt, target = asked(head)
    metric = Question.of(model, prompt).metric if target is None else target
    other = "The city of <mask> is Paris" if "<mask>" in prompt else "The city of France is Paris"
    try:
        scores = pl.circuits.edge_attribution(model, prompt, metric, how="resample", reference=other)
    except PellucidError as error:
        assert str(error)
        assert len(model.anatomy.stacks) > 1 or not model.anatomy.complete  # encoder-decoders have no graph
        return
    assert np.nanmax(np.abs(scores.result.values)) > 0


def test_padded_prompts_have_the_similarity_they_have_alone():
    model, texts = opened("sentence embedding"), [PROMPT, "Rome is in Italy and Paris is in France"]
    both = pl.causal.ablation(model, texts, metric=similarity("Rome"), over="layers.*.mlp.out")
    for i, text in enumerate(texts):
        alone = pl.causal.ablation(model, text, metric=similarity("Rome"), over="layers.*.mlp.out")
        of_one = (both["value"] - both["clean"]).values[:, i]
        np.testing.assert_allclose(of_one, alone["effect"].values, atol=1e-5)
    with pytest.raises(InputError, match="'effect' is of all 2 prompts together"):
        both[0]
    with pytest.raises(InputError, match="at different places of these prompts"):
        pl.causal.ablation(opened("label"), texts, metric=label("good", word="France"))


def test_an_answer_of_several_tokens_is_patched_and_has_a_circuit():
    model, other = opened("next token"), PROMPT.replace("France", "Italy")
    answer = pl.attribution.continuation(" Rome is", of="log_probability")
    found = pl.causal.patching(model, PROMPT, other, metric=answer, over="layers.*.mlp.out")
    ids = model.tokenizer(" Rome is", add_special_tokens=False)["input_ids"]
    rows = [[*model.tokenizer(text)["input_ids"], *ids] for text in (PROMPT, other)]

    def said(edits=()):
        z = model.run(torch.tensor([rows[1]]), edits=edits).logits[0].detach().log_softmax(-1)
        return float(sum(z[i - len(ids) - 1, t] for i, t in enumerate(ids)))

    clean = model.run(torch.tensor([rows[0]]), keep="layers.0.mlp.out")["layers.0.mlp.out"]
    edit = pl.Patch("layers.0.mlp.out", torch.as_tensor(np.asarray(clean)))
    assert float(found["effect"][0]) == pytest.approx(said([edit]) - said(), abs=1e-5)
    scores = pl.circuits.edge_attribution(model, PROMPT, answer, how="resample", reference=other)
    assert np.nanmax(np.abs(scores.result.values)) > 0
    with pytest.raises(InputError, match="ask it alone"):
        pl.causal.ablation(model, PROMPT, metric={"whole": answer})
    with pytest.raises(InputError, match="is read inside the model"):
        pl.causal.ablation(model, PROMPT, metric=pl.attribution.reading("layers.0.mlp.neurons.1@-1"))


def test_a_reference_is_compared_where_prompts_are_answered():
    model = opened("masked token")
    at = model.tokenizer(MASKED)["input_ids"].index(model.tokenizer.mask_token_id)
    bound = model.bind(pl.metrics.kl_divergence(model.run(MASKED).logits[:, at]), 1, model.inputs(MASKED))
    assert bound.positions == (at,)
    assert float(model.score(model.run(MASKED), bound)[0]) == pytest.approx(0.0, abs=1e-6)


def test_every_class_at_once_is_each_by_itself():
    for head, word, name in (("class", None, "good"), ("several classes", None, "fair"), ("label", "France", "bad")):
        model = opened(head)
        every = pl.attribution.occlusion(model, PROMPT, every_class(word=word))
        assert every.data["output"].size == 3
        one = name if word is None else label(name, word=word)
        row = every.values[["bad", "fair", "good"].index(name)]
        np.testing.assert_allclose(row, pl.attribution.occlusion(model, PROMPT, one).values, atol=1e-6)
        slopes = pl.attribution.integrated_gradients(model, PROMPT, every_class(word=word)).values
        np.testing.assert_allclose(slopes[0], pl.attribution.integrated_gradients(
            model, PROMPT, "bad" if word is None else label("bad", word=word)).values, atol=1e-5)  # fmt: skip
        question = Question.of(model, PROMPT, one)
        grid = pl.causal.ablation(model, PROMPT, over="layers.*.mlp.out", metric={
            n: Question.of(model, PROMPT, n if word is None else label(n, word=word)).metric for n in ("bad", "fair", "good")})  # fmt: skip
        alone = pl.causal.ablation(model, PROMPT, over="layers.*.mlp.out", metric=question.metric)
        np.testing.assert_allclose(grid["effect"].sel(metric=name).values, alone["effect"].values, atol=1e-6)
    with pytest.raises(InputError, match="labels words: name"):
        Question.of(opened("label"), PROMPT, every_class())
    with pytest.raises(InputError, match="has no classes"):
        Question.of(opened("span"), PROMPT, every_class())


@EVERY
def test_a_lens_reads_it_or_says_why_not(head):
    model, prompt, _ = asked(head)
    if HEADS[head][6]:
        found = pl.lenses.logit_lens(model, prompt)
        assert np.isfinite(found["probability"].values).all()
    else:
        with pytest.raises(PellucidError, match=r"lens|head"):
            pl.lenses.logit_lens(model, prompt)


@EVERY
def test_the_report_names_the_answer_as_its_kind_does(head):
    model, prompt, target = asked(head)
    options = {"word": target.word, "target": target.name} if isinstance(target, Label) else {}
    if isinstance(target, str):
        options = {"target": target}
    made = report(model, prompt, **options)
    assert made.sections[0].finding
    name = (
        target.name
        if isinstance(target, Label)
        else target
        if isinstance(target, str)
        else "score"
        if head == "choice"
        else ""
    )
    assert name.strip() in made.html


def test_what_a_kind_needs_or_has_not_is_said_by_the_report():
    with pytest.raises(InputError, match="labels every word: name one"):
        report(opened("label"), PROMPT)
    with pytest.raises(InputError, match="does not label words"):
        report(opened("class"), PROMPT, word="France")
    with pytest.raises(InputError, match="it gives a number"):
        report(opened("regression"), PROMPT, target="good")


def test_a_pair_is_reported_as_both_of_its_texts(tmp_path):
    model = opened("next sentence")
    made = report(
        model, pl.Pair("The capital of France", "is Paris"), target="is next", counterfactual="The capital of Italy"
    )
    assert "The capital of France / is Paris" in made.html
    ids = model.tokenizer("The capital of France", "is Paris", return_tensors="pt")
    with torch.no_grad():
        p = float(
            native("next sentence")(**{k: v for k, v in ids.items() if k != "offset_mapping"})
            .logits.softmax(-1)[0]
            .max()
        )
    assert f"{100 * p:.0f}%" in made.sections[0].finding
    native("next sentence").save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "report.html"
    words = ["report", str(tmp_path / "model"), "The capital of France", "--second", "is Paris", "-o", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "The capital of France / is Paris" in out.read_text()


def test_what_the_checkpoint_left_out_is_in_the_repr(tmp_path):
    native("label").save_pretrained(tmp_path / "model")
    tokenizer(native("label")).save_pretrained(tmp_path / "model")
    model = pl.load(tmp_path / "model", task="base")
    assert "BertModel has no place for these weights: classifier.bias" in repr(model)
    assert "has no place for these weights" in report(model, PROMPT).html
    done = CliRunner().invoke(app, ["anatomy", str(tmp_path / "model"), "--task", "base"])
    assert "note: BertModel has no place for these weights" in done.stderr


def test_a_directory_and_the_command_line_explain_the_trained_head(tmp_path):
    native("label").save_pretrained(tmp_path / "model")
    tokenizer(native("label")).save_pretrained(tmp_path / "model")
    model = pl.load(tmp_path / "model")
    assert type(model.module).__name__ == "BertForTokenClassification"
    torch.testing.assert_close(model.run(PROMPT).logits, opened("label").run(PROMPT).logits)
    out = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "model"), PROMPT, "--word", "France", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "Of all words" in done.output
    assert "France" in out.read_text()


def test_the_probability_of_a_label_that_holds_by_itself_is_a_sigmoid():
    model = opened("replaced")
    run = model.run(PROMPT)
    found = float(model.score(run, probability(0, position=3))[0])
    assert found == pytest.approx(float(run.logits[0, 3, 0].sigmoid()))
    with pytest.raises(InputError, match="hold each by itself"):
        model.score(run, log_probability(0, position=3))


# ---- choices, ends, padding


def test_a_choice_is_a_row_with_its_question_and_its_score():
    model, module = opened("choice"), native("choice")
    rows = [[3, 10, 11, 12], [3, 10, 11, 13], [3, 10, 11, 14]]
    with torch.no_grad():
        wanted = module(input_ids=torch.tensor([rows])).logits[0]  # three choices of one question
    found = model.score(model.run(torch.tensor(rows)), class_logit("score"))
    torch.testing.assert_close(found.detach(), wanted)
    assert type(model.module).__mro__[1] is type(module)  # the user's module is as it was
    assert module(input_ids=torch.tensor([rows])).logits.shape == (1, 3)
    with pytest.raises(InputError, match="gives a number, not the probability"):
        model.bind(class_probability(0))


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_classifier_without_a_padding_token_takes_several_rows_as_it_takes_one(kind):
    module = build(Entry(kind[:5].lower().removesuffix("f").replace("gpt2f", "gpt2"), kind, "head"), pad_token_id=None)
    model = pl.load(module, tokenizer=tokenizer(module))
    assert module.config.pad_token_id is None
    rows = torch.tensor([[3, 10, 11, 12], [5, 20, 21, 22]])
    with torch.no_grad():
        wanted = torch.cat([module(input_ids=row[None]).logits for row in rows])
        with pytest.raises(ValueError, match="no padding token"):
            module(input_ids=rows)
    torch.testing.assert_close(model.run(rows).logits.detach(), wanted)
    with pytest.raises(PellucidError):  # its padding could not be told from text
        model.run([[3, 10, 11, 12], [5, 20]])


def test_an_encoder_decoder_reads_the_text_at_both_ends_as_its_forward_gives_it():
    for head in ("class of both ends", "class of both ends, relative", "span of both ends"):
        model = opened(head)
        inputs = model.inputs([PROMPT, "The capital is Rome"])
        for row, text in enumerate([PROMPT, "The capital is Rome"]):
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                out = native(head)(input_ids=ids)
            n, run = ids.shape[1], model.run(inputs)
            if "span" in head:
                torch.testing.assert_close(run.logits[row, :n, 0].detach(), out.start_logits[0], atol=1e-5, rtol=1e-5)
            else:
                torch.testing.assert_close(run.logits[row].detach(), out.logits[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="reads a text at its end mark"):
        opened("class of both ends").run(torch.tensor([[10, 11, 12]]))


# ---- sentence embeddings


def test_similarity_is_that_of_the_pooled_vectors(minilm):
    a, b = "A cat sits on the mat.", "A kitten lies on a rug."
    words, module = minilm.tokenizer, minilm.module
    with torch.no_grad():
        x, y = (module(**words(t, return_tensors="pt")).last_hidden_state for t in (a, b))
    for pooling, pool in {None: lambda h: h.mean(1), "cls": lambda h: h[:, 0], "max": lambda h: h.amax(1)}.items():
        question = Question.of(minilm, a, similarity(b, pooling=pooling))
        run = minilm.run(a)
        found = float(question.read(run.logits.detach(), run.inputs.stream("").mask)[0, 0])
        assert found == pytest.approx(float(torch.cosine_similarity(pool(x), pool(y))[0]), abs=1e-5)
    cat = pl.attribution.occlusion(minilm, a, similarity(b))
    words_of = dict(zip(cat.data["token"].values.tolist(), cat.values.tolist(), strict=True))
    assert max(words_of, key=words_of.get).strip() in ("cat", "mat", "sits")
    with pytest.raises(InputError, match="gives answers"):
        Question.of(opened("class"), PROMPT, similarity(b))
    with pytest.raises(InputError, match="expected one of mean"):
        similarity(b, pooling="sum")


# ---- what cannot be opened, and what can


def test_a_pipeline_opens_as_its_model():
    module = native("class")
    model = pl.load(transformers.pipeline("text-classification", model=module, tokenizer=tokenizer(module)))
    assert (model.module, model.opened) == (module, "pl.load(pipeline)")
    torch.testing.assert_close(model.run(PROMPT).logits, opened("class").run(PROMPT).logits)


def test_a_vision_language_model_opens_from_its_directory_with_its_head(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=16),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=97, max_position_embeddings=64),
        image_token_index=96,
    )
    module = transformers.LlavaForConditionalGeneration(config).eval()
    module.save_pretrained(tmp_path)
    tokenizer(module).save_pretrained(tmp_path)
    model, ids = pl.load(tmp_path), torch.tensor([[5, 6, 7, 8]])
    assert (type(model.module), model.loaded.notes) == (type(module), ())
    with torch.no_grad():
        torch.testing.assert_close(model.run(ids).logits, module(input_ids=ids).logits)


def test_what_a_forward_raises_while_it_is_opened_is_one_line():
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=20, decoder_ffn_dim=20, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
    )  # fmt: skip
    module = transformers.WhisperForConditionalGeneration(config).eval()
    with pytest.raises(
        LoadError, match=r"WhisperForConditionalGeneration does not run on the probe.*pass probe="
    ) as caught:
        pl.load(module, tokenizer=tokenizer())
    assert "\n" not in str(caught.value)
    probe = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(5, 90, (2, 7))}
    assert pl.load(module, tokenizer=tokenizer(), probe=probe).anatomy.answering.meaning == "tokens"


# ---- the workbench


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("regression", "gives a number, LABEL_0"), ("choice", "gives a number, score"), ("span", "The likeliest span is"),
        ("span of both ends", "The likeliest span is"), ("label", "France"), ("replaced", "% replaced"), ("class", ""),
    ],
)  # fmt: skip
def test_the_workbench_says_what_is_no_choice_among_answers_in_words(head, says):
    asked = passed(opened(head), PROMPT)
    assert says in asked.note
    answers = answer(asked).top
    assert [each.token for each in answers] == ([] if says else sorted(("bad", "fair", "good"), key=lambda n: -dict(
        zip(("bad", "fair", "good"), asked.run.logits[0].tolist(), strict=True))[n]))  # fmt: skip
