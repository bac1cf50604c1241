"""A comparison ranks methods by what is known, goes on where it stopped, and says no more than the numbers do."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest

from pellucid.attribution import exact_shapley, gradient_x_input, occlusion
from pellucid.attribution.evaluation import compare, faithfulness
from pellucid.attribution.evaluation.agreement import prefer
from pellucid.attribution.evaluation.page import page
from pellucid.attribution.evaluation.truth import answer, programmed, sentence
from pellucid.errors import InputError, Refused
from pellucid.metrics import logit
from pellucid.results import Result
from pellucid.statistics import spearman
from tests.attribution.evaluation.models import PROMPT, TEXTS, opened

METHODS = {"shapley": exact_shapley, "occlusion": occlusion}

WITH_TARGET = [{"text": text, "target": logit(" Paris")} for text in TEXTS]  # read at the end, also by BERT


def texts(rule, n):
    rng = np.random.default_rng(0)
    return [
        {"text": text, "label": answer(rule), "rationale": [text.split()[p] for p in places]}
        for text, places in (sentence(rule, rng) for _ in range(n))
    ]


def test_on_a_model_whose_reasons_are_known_the_method_that_finds_them_is_preferred():
    """Of a disjunction met twice, leave-one-out sees nothing, gradients neither; Shapley values see both."""
    found = compare(programmed("disjunction"), texts("disjunction", 8), methods={**METHODS, "GxI": gradient_x_input})
    assert found.data.attrs["preferred"] == "shapley"
    assert found.data.attrs["sentence"].startswith("Prefer shapley on this model: its faithfulness is ")
    assert float(found.value.sel(technique="shapley", metric="average precision")) == 1
    assert float(found.value.sel(technique="occlusion", metric="average precision")) == pytest.approx(0.2)
    assert float(found.difference_low.sel(technique="random")) > 0
    assert found.technique.values.tolist() == ["shapley", "occlusion", "GxI", "random"]


def test_values_are_those_of_the_single_measures():
    model = opened("gpt2")
    found = compare(model, TEXTS[:5], methods=METHODS, metrics=["comprehensiveness", "infidelity"])
    alone = faithfulness(model, TEXTS[2], occlusion(model, TEXTS[2]), metrics=["comprehensiveness", "infidelity"])
    for metric in ("comprehensiveness", "infidelity"):
        mine = found.each.sel(example=2, technique="occlusion", metric=metric)
        assert float(mine) == pytest.approx(float(alone.value.sel(metric=metric)[0]), abs=1e-6)
    a, b = occlusion(model, PROMPT).values, exact_shapley(model, PROMPT).values
    one = compare(model, [PROMPT], methods=METHODS)
    assert float(one.agreement.sel(measure="spearman", technique="occlusion", other="shapley")) == pytest.approx(
        spearman(a, b)
    )
    assert "too few to prefer" in one.data.attrs["sentence"]
    assert float(one.cost.sel(technique="random")) == 0
    assert float(one.cost.sel(technique="occlusion")) == float(occlusion(model, PROMPT).evaluations)


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path):
    model, file, calls = opened("gpt2"), tmp_path / "rows.jsonl", []

    def counted(*args, **options):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return occlusion(*args, **options)

    methods = {"counted": counted}
    with pytest.raises(KeyboardInterrupt):
        compare(model, TEXTS[:5], methods=methods, checkpoint=file)
    with file.open("a") as rows:
        rows.write('{"example": 2, "method": "coun')  # as a kill in the middle of writing leaves it
    found = compare(model, TEXTS[:5], methods=methods, checkpoint=file)
    assert calls == [*TEXTS[:3], *TEXTS[2:5]]
    assert found.allclose(compare(model, TEXTS[:5], methods={"counted": occlusion}))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 1 + 5 * 2
    calls.clear()
    compare(model, TEXTS[:5], methods=methods, checkpoint=file)
    assert calls == []


def test_rows_of_another_question_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    compare(opened("gpt2"), TEXTS[:1], methods=METHODS, checkpoint=file)
    for other in ({"players": "word"}, {"replacement": "mean"}, {"metrics": ["deletion"]}):
        with pytest.raises(InputError, match="rows of another question"):
            compare(opened("gpt2"), TEXTS[:1], methods=METHODS, checkpoint=file, **other)
    with pytest.raises(InputError, match="other model"):
        compare(opened("bert"), TEXTS[:1], methods=METHODS, checkpoint=file)


def test_more_examples_and_methods_go_on_with_the_rows_that_are_there(tmp_path):
    file, calls = tmp_path / "rows.jsonl", []

    def counted(*args, **options):
        calls.append(args[1])
        return np.arange(len(args[1].split()), dtype=float)  # bare scores will do

    compare(opened("gpt2"), TEXTS[:1], methods={"occlusion": occlusion}, checkpoint=file)
    compare(opened("gpt2"), TEXTS[:1], methods={"counted": counted}, checkpoint=file)
    found = compare(opened("gpt2"), [TEXTS[4], TEXTS[0]], methods={"counted": counted}, checkpoint=file)
    assert calls == [TEXTS[0], TEXTS[4]]
    assert float(found.cost.sel(technique="counted")) == 0


def test_a_refused_method_is_left_out_and_named_with_its_reason():
    def refuses(model, prompt, target=None, *, against=None, players="token"):
        raise Refused("not for this family")

    found = compare(opened("gpt2"), TEXTS[:2], methods={"occlusion": occlusion, "no": refuses})
    assert json.loads(found.data.attrs["refused"]) == {"no": "not for this family"}
    assert found.technique.values.tolist() == ["occlusion", "random"]
    with pytest.raises(InputError, match="every method was refused; no: not for this family"):
        compare(opened("gpt2"), TEXTS[:2], methods={"no": refuses})


@pytest.mark.parametrize("replacement", ["mean", "remove", "resample"])
def test_every_way_of_taking_tokens_away_can_be_compared(replacement):
    found = compare(
        opened("gpt2"), TEXTS[:3], methods={"occlusion": occlusion}, metrics=["sufficiency"], replacement=replacement,
        players="word",
    )  # fmt: skip
    assert replacement in found.data.attrs["replacement"]
    assert np.isfinite(found.value.values).all()


def test_costly_metrics_are_there_when_asked_for():
    asked = ["soft sufficiency", "soft comprehensiveness", "max-sensitivity"]
    found = compare(opened("bert"), WITH_TARGET[:2], methods={"occlusion": occlusion}, metrics=asked)
    assert found.metric.values.tolist() == [
        "faithfulness",
        "soft comprehensiveness",
        "soft sufficiency",
        "max-sensitivity",
    ]
    assert float(found.value.sel(technique="occlusion", metric="max-sensitivity")) > 0
    assert np.isnan(float(found.value.sel(technique="random", metric="max-sensitivity")))


def clearly(n, *rises):
    """Values [example, method] that differ by `rises` with little noise."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 1)) + np.array(rises) + 0.01 * rng.standard_normal((n, len(rises)))


def test_the_sentence_says_what_the_differences_say():
    names, cost = ["a", "b", "random"], [10.0, 2.0, 0.0]
    best = prefer(names, clearly(20, 1.0, 0.5, 0.0), cost)
    assert (best.method, best.best) == ("a", "a")
    assert "above the next, b" in best.sentence
    assert "10 forward passes" in best.sentence
    assert "b reaches" not in best.sentence  # not for a tenth of the cost
    assert prefer(names, clearly(20, 1.0, 0.5, 0.0), [20.0, 2.0, 0.0]).sentence.endswith(" for 2.")
    assert (
        "b reaches" not in prefer(names, clearly(20, 1.0, 0.0, 0.0), [20.0, 2.0, 0.0]).sentence
    )  # no better than chance
    tied = prefer(
        names, np.stack([clearly(20, 1.0)[:, 0], clearly(20, 1.0)[::-1, 0], clearly(20, -5.0)[:, 0]], 1), cost
    )
    assert tied.method == "b"
    assert tied.sentence.startswith("No difference in faithfulness between ")
    none = prefer(names, clearly(20, 0.0, 0.0, 0.5), cost)
    assert none.method == ""
    assert none.sentence.startswith("Trust none of them here")
    assert prefer(names, clearly(3, 1.0, 0.5, 0.0), cost).method == ""


def test_differences_are_paired():
    """Prompts differ far more than methods do, and still the better method is told apart."""
    rng = np.random.default_rng(1)
    base = 100 * rng.standard_normal(30)
    values = np.stack([base + 1, base + 0.1 * rng.standard_normal(30)], 1)
    assert prefer(["a", "random"], values, [1.0, 0.0]).method == "a"


def test_the_page_is_whole_offline_and_escaped(tmp_path):
    model = opened("gpt2")
    found = compare(model, TEXTS[:5], methods={"<b>": occlusion, "shapley": exact_shapley})
    text = page(found)
    assert text.count("<svg") == text.count("</svg>") == 3
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert "http" not in text
    assert html.escape(found.data.attrs["sentence"]) in text
    assert Result.load(found.save(tmp_path / "c.zip")) == found


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "no examples"),
        ([PROMPT], {"methods": ["oclusion"]}, "unknown method 'oclusion'; did you mean 'occlusion'"),
        ([PROMPT], {"metrics": ["deletions"]}, "unknown metric 'deletions'; did you mean 'deletion'"),
        (["Paris"], {"methods": ["occlusion"]}, "has 1 players: expected two or more"),
        ([{"txt": PROMPT}], {}, "example 1 has no text"),
        ([{"text": PROMPT, "against": " Rome"}], {"methods": ["occlusion"]}, "against= goes with a target"),
    ],
)
def test_bad_arguments_are_one_clear_error(examples, options, message):
    with pytest.raises(InputError, match=message):
        compare(opened("gpt2"), examples, **options)


def test_ten_texts_say_how_strange_altered_ones_are():
    with pytest.warns(UserWarning, match="most prompts lie outside"):
        found = compare(opened("bert"), WITH_TARGET, methods={"occlusion": occlusion}, metrics=[], replacement="pad")
    assert float(found.outside.sel(absent=1.0)) == 1
    assert "lie outside the clean ones" in page(found)
