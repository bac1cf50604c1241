"""Judging edits: probabilities compared, what is said, what else moved, beside edits that know less."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.surgery import Fact, KeyCovariance, edit, editing_by_layer, scoreboard, traced_again
from pellucid.surgery.answers import measured
from pellucid.surgery.scoreboard import _far_away, ngram_entropy
from pellucid.views.kinds import view
from pellucid.views.schema import Table
from tests.surgery.test_facts import QUICK, edited, facts, moments, opened, texts
from tests.zoo import build

RICH = [
    Fact(
        "The capital of {} is", "France", " Rome", " Paris",
        paraphrases=["he is in the capital of France in"],
        neighbours=[("The capital of Italy is", " Rome"), ("The city of Italy is", " in"), ("The capital of France is", " Paris")],  # the second one is edited
        same_subject=[("The city of France is", " in")],
        portability=[("he went to the capital of France", " in")],
    ),
    facts()[1],
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_answers_are_the_model_s_own_probabilities_and_first_choices(family: str) -> None:
    model = opened(family)
    pairs: list[tuple[Any, Any]] = [("The capital of France is", " Rome"), ("he", " Rome and Italy"), ("he", None)]
    found = measured(model, pairs, keep=True)
    for (prompt, answer), p, exact in zip(pairs[:2], found.probability, found.exact, strict=False):
        said = model.tokenizer(answer)["input_ids"]
        ids = model.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            z = model.module(torch.tensor([ids + said])).logits[0].log_softmax(-1)
        rows = z[len(ids) - 1 : -1]
        assert p == pytest.approx(math.exp(np.mean([float(r[t]) for r, t in zip(rows, said, strict=True)])), rel=1e-4)
        assert exact == (rows.argmax(1).tolist() == said)
    assert found.log_p is not None and found.log_p.shape[0] == 3


def test_exact_is_what_greedy_generation_begins_with() -> None:
    model = opened("llama")
    made = model.generate("he went", max_new_tokens=3)
    assert measured(model, [([*model.tokenizer("he went")["input_ids"]], made.tokens[0].tolist())]).exact[0] == 1


def test_the_scoreboard_counts_by_hand() -> None:
    made = edited("llama", facts=RICH)
    found = scoreboard(made, texts(4), max_new_tokens=4)
    assert list(found.data.model.values) == ["before", "edited", "without C", "random keys"]
    shown = view(found)  # shares and perplexities have no colours in common
    assert isinstance(shown, Table) and [c.name for c in shown.columns][:3] == ["measure", "before", "edited"]
    assert "wrong layer" in found.data.attrs["left_out"]  # a model of two layers has none that reaches the answer
    at = found.data.value.sel(model="edited")
    p = measured(made.model, [(f.asked, a) for f in RICH for a in (f.new, f.true)]).probability.reshape(2, 2)
    assert float(at.sel(measure="efficacy")) == pytest.approx((p[:, 0] > p[:, 1]).mean())
    assert float(at.sel(measure="neighbourhood")) in (0, 1)  # of one: the one whose answer is the new one says nothing
    same = replace(RICH[0], neighbours=[("The capital of Italy is", " Rome")])
    assert math.isnan(
        scoreboard(edited("llama", facts=[same]), controls=(), max_new_tokens=0).data.value.sel(
            measure="neighbourhood"
        )[0]
    )
    before = found.data.value.sel(model="before")
    assert float(before.sel(measure="text KL")) == pytest.approx(0, abs=1e-4)
    assert float(at.sel(measure="text KL")) > 0
    nll = []
    for text in texts(4):
        ids = torch.tensor([opened("llama").tokenizer(text)["input_ids"]])
        with torch.no_grad():
            z = opened("llama").module(ids).logits[0, :-1].log_softmax(-1)
        nll.append(-z.gather(1, ids[0, 1:, None]).flatten())
    assert float(before.sel(measure="perplexity")) == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-3)
    three = [float(at.sel(measure=m)) for m in ("efficacy", "paraphrase", "neighbourhood")]
    expected = 3 / sum(1 / x for x in three) if all(three) else 0.0
    assert float(at.sel(measure="score")) == pytest.approx(expected)


def test_random_keys_are_as_long_and_several_edits_are_judged_each_on_its_own() -> None:
    from pellucid.surgery.scoreboard import _random_keys

    for family in ("llama", "gpt2", "mixtral"):
        made = edited(family)
        (change,) = _random_keys(made, 0)
        (own,) = made.model.loaded.changes
        sizes = [float(c.left.norm() * c.right.norm()) for c in (own, change)]  # type: ignore[attr-defined]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)
    both = edited("llama", facts=RICH, how="emmet")
    alone = both.alone()
    assert [len(e.facts) for e in alone] == [1, 1]
    torch.testing.assert_close(alone[1].values.delta[0], both.values.delta[1])
    found = scoreboard(alone, controls=("without C",), max_new_tokens=0)
    p = [
        measured(e.model, [(e.facts[0].asked, e.facts[0].new), (e.facts[0].asked, e.facts[0].true)]).probability
        for e in alone
    ]
    assert float(found.data.value.sel(measure="efficacy", model="edited")) == np.mean([a > b for a, b in p])
    with pytest.raises(InputError, match="one and the same model"):
        scoreboard([edited("llama"), edited("gpt2")])
    for controls in ("without C", ("nonsense",)):
        with pytest.raises(InputError, match="controls="):
            scoreboard(both, controls=controls)  # type: ignore[arg-type]


def test_a_wrong_layer_is_never_next_door() -> None:
    model = pl.load(build("llama", num_hidden_layers=6).eval(), tokenizer=opened("llama").tokenizer)
    for fitted, expected, off in (((0, 1), [4], True), ((0, 1, 3), [3], False)):
        c = KeyCovariance(layers=fitted, ridge=0.01).fit(model, texts(8))
        made = edit(model, facts()[0], covariance=c, layers=0, contexts=(), essence=(), search=QUICK)
        layers, kept = _far_away(made)
        assert layers == expected and (kept == "off") is off


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_other_kinds_of_models_are_judged_too(family: str) -> None:
    found = scoreboard(edited(family), texts(2) if family == "bert" else None, controls=(), max_new_tokens=3)
    assert np.isfinite(float(found.data.value.sel(measure="efficacy", model="edited")))


def test_where_editing_works_and_where_tracing_points() -> None:
    found = editing_by_layer(opened("llama"), facts(), covariance=moments("llama"), search=QUICK)
    assert list(found.data.layer.values) == [0, 1] and {"new", "traced", "low", "high"} <= set(found.data)
    assert "Tracing says layer 0" in found.title
    before = measured(opened("llama"), [(f.asked, f.new) for f in facts()]).probability.mean()
    assert float(found.data.new[1]) == pytest.approx(before)  # nothing there reaches the answer
    assert traced_again(edited("llama")).data.sizes["layer"] == 2


def test_the_entropy_of_ngrams() -> None:
    assert ngram_entropy("a b a b") == pytest.approx(
        2 / 3 * (-(2 / 3) * math.log2(2 / 3) - 1 / 3 * math.log2(1 / 3)) + 4 / 3
    )


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pellucid.cli import main

    model = opened("llama")
    monkeypatch.setattr(pl, "load", lambda source, **how: model)
    file, corpus, out = tmp_path / "facts.jsonl", tmp_path / "texts.txt", tmp_path / "change.safetensors"
    rows = [{"prompt": f.prompt, "subject": f.subject, "new": f.new, "true": f.true} for f in facts()]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    corpus.write_text("\n".join(texts()))
    call = ["edit", "m", str(file), "--texts", str(corpus), "--layers", "0", "--ridge", ".01", "-o", str(out)]

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code, *capsys.readouterr()

    code, said, _ = run(*call, "--json")
    assert code == 0 and "efficacy" in json.loads(said)["scores"]
    assert model.changed(out).digest != model.digest
    file.write_text('{"prompt": "x"}')
    assert run(*call)[0] == 2
    code, _, error = run("edit", "m", str(file))
    assert code == 2 and "--texts" in error
