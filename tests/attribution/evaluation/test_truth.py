"""The programmed classifiers follow their rules, and methods find the responsible tokens where theory says they do."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from pellucid.attribution import exact_shapley, integrated_gradients, occlusion, saliency
from pellucid.attribution.evaluation import known_truth
from pellucid.attribution.evaluation.truth import FILLERS, MARKERS, RULES, answer, programmed, sentence

TRUE = {
    "marker": lambda a, b: a,
    "conjunction": lambda a, b: a and b,
    "disjunction": lambda a, b: a or b,
    "exclusive": lambda a, b: a != b,
}


@pytest.mark.parametrize("rule", RULES)
def test_each_classifier_follows_its_rule_wherever_the_markers_stand(rule):
    model, rng = programmed(rule), np.random.default_rng(0)
    for a, b, _ in itertools.product([False, True], [False, True], range(5)):
        words = [*rng.choice(FILLERS, 8), *([MARKERS[0]] if a else []), *([MARKERS[1]] if b else [])]
        rng.shuffle(words)
        with torch.no_grad():
            logits = model.run(" ".join(words)).logits[0]
        expected = [0.0, 4.0] if TRUE[rule](a, b) else [4.0, 0.0]
        np.testing.assert_allclose(logits, expected, atol=0.05)


@pytest.mark.parametrize("rule", RULES)
def test_a_text_has_its_class_and_its_responsible_words(rule):
    text, places = sentence(rule, np.random.default_rng(3))
    words = text.split()
    assert sorted(words[p] for p in places) == sorted(MARKERS[:1] if rule == "marker" else MARKERS)
    with torch.no_grad():
        assert int(programmed(rule).run(text).logits.argmax()) == answer(rule)


def test_methods_find_the_truth_where_theory_says_they_do():
    methods = {"shapley": exact_shapley, "occlusion": occlusion, "saliency": saliency}
    found = known_truth(methods, texts=4).value.sel(measure="average precision")
    whole = partial(integrated_gradients, keep_first=False)  # here the first token is a word like the others
    smooth = known_truth({"IG": whole}, rules=RULES[:3], texts=2).value

    def score(rule, method):
        return float(found.sel(rule=rule, technique=method))

    for rule in ("marker", "conjunction", "disjunction"):
        assert score(rule, "shapley") == 1
        assert float(smooth.sel(rule=rule, technique="IG", measure="average precision")) == 1
    assert score("conjunction", "occlusion") == 1
    assert score("disjunction", "occlusion") == pytest.approx(0.2)  # either would do: nothing is missed
    assert score("conjunction", "saliency") == pytest.approx(0.2)  # settled: no gradient
    assert score("exclusive", "shapley") == pytest.approx(0.2)
    assert score("exclusive", "occlusion") == 1
    assert found.sel(technique="random").mean() < 0.6
