"""The report: one page that needs no network, hides nothing a prompt may contain, and whose snippets run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.tasks.world import LANDMARKS
from pellucid.views import counterfactual
from pellucid.views.counterfactual import unrelated
from pellucid.views.evidence import Evidence, Foreign
from pellucid.views.question import ask
from pellucid.views.report import Report, _page, build
from pellucid.views.schema import Attention, Table
from pellucid.views.sections import origin, trust
from tests.zoo import build as tiny
from tests.zoo import tokenizer

PROMPT = "The capital of France is"


def opened(model_type: str) -> pl.Model:
    module = tiny(model_type)
    return pl.load(module, tokenizer=tokenizer(module))


@pytest.fixture(scope="module")
def llama() -> pl.Model:
    return opened("llama")


@pytest.fixture(scope="module")
def report(llama: pl.Model) -> Report:
    return build(llama, PROMPT, counterfactual="The capital of Italy is")


def test_the_page_asks_no_network_for_anything(report: Report) -> None:
    markup = re.sub(r"<script.*?</script>", "", report.html, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?!#|data:)[^"'\s>]""", markup)
    assert not re.findall(r"@import|fetch\(|XMLHttpRequest|WebSocket", report.html)
    assert re.search(r"default-src (?:'|&#39;|&#x27;)none", report.html)


def test_a_local_model_is_named_without_its_folder(tmp_path: Path) -> None:
    llama = opened("llama")
    llama.module.save_pretrained(tmp_path / "my-model")  # type: ignore[operator]
    model = pl.load(str(tmp_path / "my-model"), tokenizer=llama.tokenizer)
    question = ask(model, PROMPT, None, None, 5)
    made = _page(question, [origin.origin(question, [])])
    assert str(tmp_path) not in made and "my-model" in made


def test_every_section_answers_or_says_why_it_cannot(report: Report) -> None:
    assert [s.id for s in report.sections][:4] == ["answer", "words", "layers", "patches"]
    assert all(s.figure or s.views or "Not available" in str(s.lead) for s in report.sections)
    assert 3 <= len(report.findings) <= 11


def test_the_python_of_every_section_runs(report: Report, llama: pl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.model.load", lambda *args, **kwargs: llama)
    ran = 0
    for section in report.sections:
        if section.program:
            exec(compile(section.program, section.id, "exec"), {"module": llama.module, "tokenizer": llama.tokenizer})
            ran += 1
    assert ran >= 8


def test_what_a_prompt_contains_is_shown_not_run(llama: pl.Model) -> None:
    page = build(llama, "The <script>alert(1)</script> of").html
    assert "<script>alert" not in page
    assert len(re.findall(r"<script(?! type=\"application/json\")", page)) == 1


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_other_kinds_of_model_get_a_page_too(model_type: str) -> None:
    page = build(opened(model_type), PROMPT)
    lacking = [s.id for s in page.sections if "Not available" in str(s.lead)]
    assert set(lacking) <= {"patches", "direct"}  # no counterfactual found; a head behind the last residual
    assert page.html.startswith("<!doctype html>") or page.html.startswith("<!DOCTYPE html>")
    assert page.findings


def test_a_model_without_answers_is_told_about_its_vectors(llama: pl.Model) -> None:
    body = pl.load(llama.module.model, tokenizer=llama.tokenizer)
    found = build(body, PROMPT, counterfactual="The capital of Italy is")
    assert any("vectors" in line for line in found.findings)
    assert {s.id: bool(s.views) for s in found.sections} | {
        "words": True,
        "heads": True,
        "layers": False,
        "direct": False,
    } == {s.id: bool(s.views) for s in found.sections}


def test_every_finding_has_its_section_and_every_claim_its_control(report: Report) -> None:
    trust = next(s for s in report.sections if s.id == "trust").views[0].data
    assert isinstance(trust, Table)
    columns = {c.name: c.texts for c in trust.columns}
    assert set(columns) == {"claim", "what speaks for it", "its control", "verdict"}
    assert set(columns["verdict"] or ()) <= {"solid", "likely", "a hint", "untested"}
    assert trust.rows >= 4
    assert "untested" not in (columns["verdict"] or ())
    agree = next(s for s in report.sections if s.id == "agree")
    assert "Rank correlations" in str(agree.lead)


def test_a_target_of_several_tokens_is_refused_in_the_words_of_the_command_line(llama: pl.Model) -> None:
    with pytest.raises(InputError) as refused:
        build(llama, PROMPT, target="unbelievably long")
    said = str(refused.value)
    assert "tokens for this model" in said and re.search(r"begin with --target '.+'$", said)
    assert "sequence_log_probability" not in said and "(" in said and "\n" not in said


def test_input_that_does_not_fit_is_one_clear_error(llama: pl.Model) -> None:
    with pytest.raises(InputError, match="empty"):
        build(llama, "")
    with pytest.raises(InputError, match="token"):
        build(llama, PROMPT, counterfactual="The capital")


def test_unrelated_prompts_are_as_long_and_keep_special_tokens_in_their_places() -> None:
    for model_type in ("llama", "bert", "t5"):
        question = ask(opened(model_type), PROMPT, None, None, 5)
        ids = question.source.ids[0]
        special = torch.isin(ids, torch.tensor(question.model.tokenizer.all_special_ids))
        for inputs in unrelated(question):
            other = inputs.streams.get("encoder", inputs.stream("")).ids[0]
            assert other.shape == ids.shape and bool((other[special] == ids[special]).all())
            assert int((other == ids).sum()) <= int(special.sum()) + 1
            assert set(inputs.streams) == set(question.inputs.streams)


def test_an_encoder_decoder_is_shown_writing_with_all_three_attentions() -> None:
    model = opened("t5")
    found = build(model, PROMPT)
    data = next(s for s in found.sections if s.id == "looks").views[0].data
    assert isinstance(data, Attention)
    assert [stack.name for stack in data.stacks] == ["decoder to encoder", "encoder", "decoder"]
    said = model.generate(PROMPT, max_new_tokens=12).text.strip()
    assert len(data.stacks[2].queries) > 1 if said else len(data.stacks[2].queries) == 1


def test_a_foreign_state_that_does_as_well_takes_the_trust_away() -> None:
    own = Evidence(restored=1.0, foreign=Foreign(places=4, own=1.0, other=0.9, prompts=3))
    question = SimpleNamespace(searched=False)
    assert trust._patches(question, own).verdict == "a hint"  # type: ignore[arg-type,union-attr]
    apart = Evidence(restored=1.0, foreign=Foreign(places=4, own=1.0, other=0.05, prompts=3))
    assert trust._patches(question, apart).verdict == "solid"  # type: ignore[arg-type,union-attr]
    searched = SimpleNamespace(searched=True)
    assert trust._patches(searched, apart).verdict == "likely"  # type: ignore[arg-type,union-attr]
    demo = Evidence(restored=0.88, foreign=Foreign(places=4, own=0.88, other=0.36, prompts=3))
    assert trust._patches(question, demo).verdict == "a hint"  # type: ignore[arg-type,union-attr]
    read = Evidence(settled="3", leads={"a": [False, True], "b": [True, True]})
    assert trust._layers(read).verdict == "a hint"  # type: ignore[union-attr]


def test_a_question_that_a_relation_knows_is_asked_of_another_subject(smollm2: pl.Model) -> None:
    question = ask(smollm2, "The Eiffel Tower is located in the city of", None, None, 5, None)
    made = counterfactual.make(question)
    assert made is not None and made.known and "whose own answer" in made.how
    other = re.search("replaced by “(.+?)”, whose own answer, “(.+?)”", made.how)
    assert other is not None and other[1] in made.prompt and dict(LANDMARKS)[other[1]] == other[2] != "Paris"
    assert other[2] not in other[1]  # the Sydney Opera House says its answer
    answer = smollm2.run(made.prompt).logits[0, -1].argmax()
    assert other[2].startswith(smollm2.tokenizer.decode([int(answer)]).strip())


def test_the_first_screen_says_how_far_each_finding_can_be_trusted(report: Report) -> None:
    verdicts = {s.id: s.verdict for s in report.sections if s.verdict}
    table = next(s for s in report.sections if s.id == "trust").views[0].data
    assert isinstance(table, Table)
    said = next(c for c in table.columns if c.name == "verdict")
    assert sorted(verdicts.values()) == sorted(said.texts or ()) and {"words", "heads"} <= verdicts.keys()
    first = report.html.partition("</header>")[0]
    assert all(f">{v}</a>" in first for s in report.sections if s.finding and (v := s.verdict))
