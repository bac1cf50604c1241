"""What logits mean, which head a checkpoint has, and where the question is asked: A5, A6, A7, B3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pellucid as pl
from pellucid.errors import InputError, LoadError, PellucidError
from tests.zoo import build, tokenizer

from .cases import CLEAN, DIFFERENCE, close, opened


def bert(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    module = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**build("bert").config.to_dict() | config))
    with torch.no_grad():  # fresh heads have zero biases
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


def load(module: Any) -> pl.Model:
    return pl.load(module, tokenizer=tokenizer(build("bert")))


IDS = torch.tensor([tokenizer(build("bert"))(CLEAN)["input_ids"]])


def native(module: Any) -> Any:
    with torch.no_grad():
        return module(input_ids=IDS)


def test_a_base_model_has_no_answers() -> None:
    """A5: hidden coordinates are no tokens."""
    torch.manual_seed(0)
    model = pl.load(transformers.GPT2Model(build("gpt2").config).eval(), tokenizer=tokenizer())
    for metric in (pl.metrics.logit(" Paris"), pl.metrics.logit(96)):
        with pytest.raises(InputError):
            model.score(model.run(CLEAN), metric)
        with pytest.raises(InputError):
            pl.causal.ablation(model, CLEAN, over="layers.0.mlp.out", metric=metric)


def test_independent_labels_have_probabilities_of_a_sigmoid() -> None:
    """A5: `problem_type` says that each label holds or not by itself."""
    module = bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification")
    model = load(module)
    wanted = native(module).logits[0].sigmoid()
    for n in range(3):
        assert float(model.score(model.run(CLEAN), pl.metrics.class_probability(n))) == pytest.approx(
            float(wanted[n]), abs=1e-5
        )


def test_a_single_label_is_a_value_with_an_attribution() -> None:
    """A5: one number is neither certain nor without cause."""
    module = bert("SequenceClassification", num_labels=1)
    model = load(module)
    data = pl.attribution.occlusion(model, CLEAN, baseline="mask").data
    absent = IDS.clone()
    absent[0, 3] = 3
    with torch.no_grad():
        wanted = float(module(IDS).logits[0, 0] - module(absent).logits[0, 0])
    assert float(data["attribution"][3]) == pytest.approx(wanted, abs=1e-5) and abs(wanted) > 1e-6


def test_labels_are_asked_at_a_word() -> None:
    """A5: a token classifier is not asked about the label of its last mark."""
    module = bert("TokenClassification", num_labels=4)
    model = load(module)
    with pytest.raises(InputError):
        pl.attribution.saliency(model, CLEAN)
    result = pl.attribution.gradient_x_input(model, CLEAN, pl.attribution.label(2, word="Paris"))
    at = tokenizer(build("bert")).convert_ids_to_tokens(IDS[0].tolist()).index("▁Paris")
    assert float(result.data["score"]) == pytest.approx(float(native(module).logits[0, at, 2]), abs=1e-4)


def test_spans_have_a_start_and_an_end() -> None:
    """A5: extractive answers are scored by their first token's start and their last token's end."""
    module = bert("QuestionAnswering")
    model = load(module)
    out = native(module)
    names = tokenizer(build("bert")).convert_ids_to_tokens(IDS[0].tolist())
    first, last = names.index("▁Paris"), names.index("▁is")
    data = pl.attribution.saliency(model, CLEAN, "Paris is").data
    wanted = float(out.start_logits[0, first] + out.end_logits[0, last])
    assert float(data["score"]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "kind", ["TokenClassification", "QuestionAnswering", "NextSentencePrediction", "SequenceClassification"]
)
def test_a_checkpoint_is_opened_with_its_trained_head(kind: str, tmp_path: Path) -> None:
    """A6: the class the config names, with its weights, or LoadError that names the head."""
    module = bert(kind)
    module.save_pretrained(tmp_path)
    tokenizer(build("bert")).save_pretrained(tmp_path)
    try:
        model = pl.load(str(tmp_path))
    except LoadError as error:
        assert kind in str(error)
        return
    assert type(model.module).__name__ == f"BertFor{kind}"
    assert close(model.module(input_ids=IDS)[0], native(module)[0])


def test_the_question_is_asked_where_the_answer_is() -> None:
    """A7: tracing of a masked model reads the mask."""
    model = opened("bert")
    text = "The city of Paris is in <mask>"
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        z = model.module(ids).logits[0]
    mask = ids[0].tolist().index(3)
    data = pl.causal.ablation(model, text, over="layers.0.mlp.out", metric=pl.metrics.logit(7)).data
    assert float(data["clean"]) == pytest.approx(float(z[mask, 7]), abs=1e-4)
    traced = pl.causal.tracing(model, text, subject="Paris", draws=2)
    said = str(traced.provenance.arguments.get("target", "")) + str(traced.data.attrs) + str(traced.data.coords)
    assert model.tokenizer.decode([int(z[mask].argmax())]).strip() in said


def test_two_masks_and_no_head_are_refused_alike() -> None:
    """A7: by attention as by attribution."""
    for ask in (pl.attribution.saliency, pl.attention.attention_gradient):
        with pytest.raises(InputError):
            ask(opened("bert"), "The <mask> of <mask> is")
        with pytest.raises(InputError):
            ask(pl.load(transformers.BertModel(build("bert").config).eval(), tokenizer=tokenizer(build("bert"))), CLEAN)


def classifier(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = build({"Bart": "bart", "GPT2": "gpt2", "Llama": "llama"}[name]).config
    for key, value in config.items():
        setattr(made, key, value)
    return getattr(transformers, f"{name}ForSequenceClassification")(made).eval()


@pytest.mark.parametrize(
    ("name", "config"), [("Bart", {}), ("GPT2", {"pad_token_id": None}), ("Llama", {"pad_token_id": None})]
)
def test_classifiers_of_every_family_open(name: str, config: dict[str, Any]) -> None:
    """B3: an encoder-decoder's classifier, and those without a padding token."""
    module = classifier(name, **config)
    words = tokenizer(build("bart")) if name == "Bart" else tokenizer()
    model = pl.load(module, tokenizer=words)
    with torch.no_grad():
        wanted = module(torch.tensor([words(CLEAN)["input_ids"]])).logits[0, 1]
    assert float(model.score(model.run(CLEAN), pl.metrics.class_logit(1))) == pytest.approx(float(wanted), abs=1e-4)


def test_what_cannot_be_opened_is_named() -> None:
    """B3: what the user's forward raises in discovery does not escape."""
    assert isinstance(DIFFERENCE, object)
    for source in (bert("MultipleChoice"), torch.nn.Linear(3, 3), transformers.BertConfig(), object(), 3):
        try:
            model = pl.load(source, tokenizer=tokenizer())
        except PellucidError as error:
            assert str(error)
        else:
            assert model.anatomy.stacks


def test_a_pipeline_is_opened() -> None:
    """B3: what people already hold."""
    module = build("gpt2")
    made = transformers.pipeline("text-generation", model=module, tokenizer=tokenizer(), device="cpu")
    assert close(pl.load(made).run(CLEAN).logits, opened("gpt2").run(CLEAN).logits)
