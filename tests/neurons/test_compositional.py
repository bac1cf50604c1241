"""Compositional explanations: the batched beam search is the obvious one, and finds formulas that are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import InputError
from pellucid.neurons.compositional import OPERATIONS, Beam, Concepts, Formula, compositional, firings, search
from pellucid.results import Result


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


def everything(concepts, length):
    """Every formula of at most so many concepts."""
    level = [Formula(name) for name in concepts.names]
    yield from level
    for _ in range(length - 1):
        level = [f.then(o, name) for f, o, name in product(level, OPERATIONS, concepts.names)]
        yield from level


def loop(fire, concepts, beam):
    """Mu and Andreas, one unit and one formula at a time."""
    ranked = sorted(((iou(fire, Formula(n).holds(concepts)), Formula(n)) for n in concepts.names), key=lambda x: -x[0])[
        : beam.width
    ]
    best_value, best = ranked[0]
    best_score = best_value
    for extra in range(1, beam.length):
        grown = [f.then(o, n) for _, f in ranked for o in OPERATIONS for n in concepts.names]
        ranked = sorted(((iou(fire, f.holds(concepts)), f) for f in grown), key=lambda x: -x[0])[: beam.width]
        if ranked[0][0] * beam.penalty**extra > best_score + 1e-9:
            best_score, best_value, best = ranked[0][0] * beam.penalty**extra, *ranked[0]
    return best, best_value


def random_case(seed, tokens=60, units=7, names="abcd"):
    rng = np.random.default_rng(seed)
    concepts = Concepts(tuple(names), rng.random((tokens, len(names))) < 0.4)
    return rng.random((tokens, units)) < rng.random(units) * 0.6, concepts


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 6), length=st.integers(1, 4))
def test_the_batched_search_is_the_loop_over_units_and_formulas(seed, width, length):
    firing, concepts = random_case(seed)
    beam = Beam(length, width, 0.97)
    for unit, (formula, value) in enumerate(search(firing, concepts, beam)):
        expected, expected_value = loop(firing[:, unit], concepts, beam)
        assert value == pytest.approx(expected_value, abs=1e-6)
        assert formula == expected
        assert value == pytest.approx(iou(firing[:, unit], formula.holds(concepts)), abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_beam_that_drops_nothing_finds_the_best_of_all_formulas(seed):
    firing, concepts = random_case(seed, units=3, names="abc")
    found = search(firing, concepts, Beam(3, 10_000, 0.9))
    for unit, (formula, value) in enumerate(found):
        best = max(iou(firing[:, unit], f.holds(concepts)) * 0.9 ** (len(f) - 1) for f in everything(concepts, 3))
        assert value * 0.9 ** (len(formula) - 1) == pytest.approx(best, abs=1e-6)


def test_a_unit_that_is_a_formula_is_explained_by_it_and_its_shifted_twin_is_not(tmp_path):
    rng = np.random.default_rng(0)
    concepts = Concepts(("noun", "name", "plural", "verb"), rng.random((4000, 4)) < 0.2)
    truth = Formula("noun").then("OR", "verb").then("AND NOT", "plural")
    firing = np.stack([truth.holds(concepts), rng.random(4000) < 0.1], 1)
    found = compositional(firing, concepts, groups=np.arange(4000) // 20)
    assert (Formula.parse(str(found.formula[0].values), concepts).holds(concepts) == truth.holds(concepts)).all()
    assert float(found.iou[0]) == float(found.held_out[0]) == float(found.low[0]) == 1.0
    assert float(found.control_held_out[0]) < 0.4
    assert float(found.held_out[1]) < 0.2  # a unit that fires at random has no explanation
    assert found.length.values[0] == 3
    assert Result.load(found.save(tmp_path / "found.zip")) == found


def test_formulas_are_longer_only_where_that_pays():
    rng = np.random.default_rng(1)
    concepts = Concepts(("a", "b", "c"), rng.random((1000, 3)) < 0.3)
    firing = concepts.masks[:, :1].copy()
    firing[:3] = ~firing[:3]
    ((formula, _),) = search(firing, concepts, Beam(3, 5, 0.9))
    assert str(formula) == "a"


def test_printing_and_parsing_a_formula_are_inverse():
    concepts = Concepts(("a", "a AND b", "NOT c", "d"), np.zeros((1, 4), dtype=bool))
    for formula in everything(concepts, 3):
        assert str(Formula.parse(str(formula), concepts)) == str(formula)
    with pytest.raises(InputError, match="cannot read the formula"):
        Formula.parse("(a XOR d)", concepts)


def test_a_unit_fires_on_its_largest_activations():
    values = np.arange(200.0).reshape(100, 2)
    assert firings(values, 0.9).sum(0).tolist() == [10, 10]
    assert firings(values, 0.9)[-10:].all()
    assert not firings(np.zeros((50, 1)), 0.9).any()
    concepts = Concepts.of({"even": np.arange(100) % 2 == 0, "late": np.arange(100) > 50})
    given, told = (compositional(x, concepts, quantile=0.9).data for x in (values, firings(values, 0.9)))
    assert given.identical(told) and given.density.values.tolist() == [0.1, 0.1]


def test_labels_make_one_concept_each():
    made = Concepts.labels(["NOUN", "VERB", "", "NOUN"], least=2, prefix="pos=") + Concepts.of({"first": [1, 0, 0, 0]})
    assert made.names == ("pos=NOUN", "first")
    assert made.masks.tolist() == [[True, True], [False, False], [False, False], [True, False]]


def test_units_that_never_fire_and_masks_that_do_not_fit():
    _, concepts = random_case(0)
    silent = compositional(np.zeros((60, 1), dtype=bool), concepts)
    assert float(silent.iou[0]) == float(silent.held_out[0]) == 0
    missing = np.zeros((60, 2))
    missing[7, 1] = np.nan
    for activations, message in (
        (np.zeros((50, 1)), "50 tokens with activations, but 60 with concepts"),
        (np.zeros(60), r"expected numbers or bool \[token, unit\]"),
        (missing, "unit 1 at token 7 is NaN"),
    ):
        with pytest.raises(InputError, match=message):
            compositional(activations, concepts)
    with pytest.raises(InputError, match="expected a share of at least 2"):
        compositional(np.zeros((60, 1), dtype=bool), concepts, groups=np.zeros(60))
    with pytest.raises(InputError, match="two concepts have one name"):
        Concepts(("a", "a"), np.zeros((3, 2), dtype=bool))
    with pytest.raises(InputError, match="length and width of at least 1"):
        Beam(length=0)
