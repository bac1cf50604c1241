"""Methods that only run the model: the axioms on games whose truth is known, and equality with Captum's on tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations as orders

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import FeatureAblation, KernelShap, LimeBase, Occlusion, ShapleyValues, ShapleyValueSampling
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attribution import (
    METHODS,
    continuation,
    exact_shapley,
    kernel_shap,
    lime,
    occlusion,
    owen,
    partition,
    shapley,
)
from pellucid.attribution.absence import absence
from pellucid.attribution.case import Case
from pellucid.attribution.game import Game
from pellucid.attribution.lime import draw as lime_draw
from pellucid.attribution.lime import fit, kernel
from pellucid.attribution.owen import _order, grouped, halved, leaves, split
from pellucid.attribution.players import Players
from pellucid.attribution.shapley import _all, coalitions, draw, exact, marginals, solve
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.hand import PROMPT, classifier, opened, run_ids, token

TEXT = "It is so. The capital of Italy"


@dataclass
class Known:
    """A game of n players given by the values of all coalitions [2^n, output]."""

    table: torch.Tensor
    evaluations: int = 0

    @property
    def players(self):
        return range(int(np.log2(len(self.table))))

    def __call__(self, present):
        self.evaluations += len(present)
        return self.table[(present.long() * 2 ** torch.arange(present.shape[1])).sum(1)]


def slowly(game):
    """Shapley values over every order, one by one: [output, player]."""
    n = len(game.players)
    total = torch.zeros(game.table.shape[1], n).double()
    every = list(orders(range(n)))
    for order in every:
        present = torch.zeros(n)
        for i in order:
            before = game(present[None])[0]
            present[i] = 1
            total[:, i] += game(present[None])[0] - before
    return total / len(every)


def slowly_owen(game, tree):
    """Owen values over every order that keeps groups together."""

    def all_orders(node):
        if isinstance(node, int):
            return [[node]]
        made = []
        for order in orders(range(len(node))):
            rows = [[]]
            for i in order:
                rows = [row + more for row in rows for more in all_orders(node[i])]
            made += rows
        return made

    found = [marginals(game, torch.tensor([order]))[0] for order in all_orders(tree)]
    return torch.stack(found).mean(0)


def estimates(game):
    """Every estimator of the Shapley value, given enough to be exact: name -> [output, player]."""
    n = len(game.players)
    present, weights = _all(n)
    values = game(torch.cat([torch.ones(1, n), torch.zeros(1, n), present]))
    every = torch.tensor(list(orders(range(n))))
    seen = torch.ones(values.shape[1], n, dtype=torch.bool)
    yield "exact", exact(game(coalitions(n)), n)
    yield "orders", marginals(game, every).mean(0)
    yield "kernel", solve(present, values[2:] - values[1], weights[None], values[0] - values[1], seen)[0]


numbers = st.floats(-5, 5, allow_nan=False)
games = st.integers(2, 4).flatmap(
    lambda n: st.lists(st.tuples(numbers, numbers), min_size=2**n, max_size=2**n).map(
        lambda t: Known(torch.tensor(t).double())
    )
)


@given(games)
@settings(max_examples=40, deadline=None)
def test_every_estimator_is_the_shapley_value_and_adds_up(game):
    truth = slowly(game)
    for _, found in estimates(game):
        torch.testing.assert_close(found, truth, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(found.sum(1), game.table[-1] - game.table[0], atol=1e-8, rtol=1e-8)


@given(games, games, numbers, numbers)
@settings(max_examples=25, deadline=None)
def test_values_are_linear_in_the_game(one, other, a, b):
    if len(one.table) != len(other.table):
        return
    for (_, x), (_, y), (_, z) in zip(
        estimates(one), estimates(other), estimates(Known(a * one.table + b * other.table)), strict=True
    ):
        torch.testing.assert_close(z, a * x + b * y, atol=1e-7, rtol=1e-7)


@given(games, st.data())
@settings(max_examples=25, deadline=None)
def test_a_dummy_gets_nothing_and_equals_get_the_same(game, data):
    n = len(game.players)
    i, j = data.draw(st.permutations(range(n)))[:2]
    members = coalitions(n)
    dummy = Known(game.table[[int(s) & ~(1 << i) for s in range(2**n)]])
    swapped = [int(s) ^ ((1 << i) | (1 << j)) if members[s, i] != members[s, j] else int(s) for s in range(2**n)]
    alike = Known((game.table + game.table[swapped]) / 2)
    for (_, without), (_, same) in zip(estimates(dummy), estimates(alike), strict=True):
        assert without[:, i].abs().max() < 1e-8
        torch.testing.assert_close(same[:, i], same[:, j], atol=1e-8, rtol=1e-8)


@given(games, st.data())
@settings(max_examples=25, deadline=None)
def test_owen_values_are_those_of_the_orders_that_keep_groups_together(game, data):
    n = len(game.players)
    cut = data.draw(st.integers(1, n - 1))
    for tree in (halved(range(n)), (tuple(range(cut)), tuple(range(cut, n)))):
        truth = slowly_owen(game, tree)
        rng = np.random.default_rng(0)
        many = marginals(game, torch.tensor([_order(tree, rng) for _ in range(4)]))
        torch.testing.assert_close(many.sum(2), (game.table[-1] - game.table[0]).expand(4, -1), atol=1e-8, rtol=1e-8)
        if tree == halved(range(n)):
            found, shared = split(Known(game.table), tree, 10**6)
            torch.testing.assert_close(found, truth, atol=1e-8, rtol=1e-8)
            assert not shared.any()
            some, shared = split(Known(game.table), tree, 4)
            torch.testing.assert_close(some.sum(1), game.table[-1] - game.table[0], atol=1e-8, rtol=1e-8)


def test_sampled_orders_of_a_hierarchy_average_to_the_owen_value():
    game = Known(torch.randn(32, 1, generator=torch.Generator().manual_seed(0)).double())
    tree = ((0, 1, 2), (3, 4))
    rng = np.random.default_rng(1)
    drawn = marginals(game, torch.tensor([_order(tree, rng) for _ in range(3000)]))
    error = drawn.std(0) / len(drawn) ** 0.5
    assert (drawn.mean(0) - slowly_owen(game, tree)).abs().le(4.5 * error + 1e-9).all()


@pytest.mark.parametrize("permutations", [6, 40])
def test_shapleys_standard_error_covers_the_truth(permutations):
    model = opened("gpt2")
    truth = exact_shapley(model, TEXT, " Paris")
    off = []
    for seed in range(12):
        found = shapley(model, TEXT, " Paris", draws=permutations, seed=seed)
        assert float(found.attribution.sum()) == pytest.approx(float(found.score - found.baseline_score), abs=1e-6)
        off.append((found.values - truth.values) / found.error.values)
    assert 0.3 < np.sqrt(np.nanmean(np.clip(off, -6, 6) ** 2)) < 2.5


def test_kernel_shaps_constraint_is_exact_and_its_error_covers_the_truth():
    model = opened("llama")
    prompt = TEXT + " is Rome"
    with pytest.raises(InputError, match="at least"):
        kernel_shap(model, prompt, " Paris", draws=10)
    truth = shapley(model, prompt, " Paris", draws=200)
    found = kernel_shap(model, prompt, " Paris", draws=128, seed=1)
    assert float(found.attribution.sum()) == pytest.approx(float(found.score - found.baseline_score), abs=1e-9)
    assert (np.abs(found.values - truth.values) < 5 * np.hypot(found.error.values, truth.error.values) + 1e-6).all()


def test_eliminating_the_constraint_is_the_limit_of_a_large_weight():
    rng = np.random.default_rng(0)
    present = draw(6, 60, rng)
    values = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)).double()
    rise = torch.tensor([1.3]).double()
    found = solve(present, values, torch.ones(1, 60).double(), rise, torch.ones(1, 6, dtype=torch.bool))[0, 0]
    x = torch.cat([present, torch.ones(1, 6)]).double()
    y, w = torch.cat([values[:, 0], rise]), torch.tensor([1.0] * 60 + [1e9]).double()
    slow = torch.linalg.lstsq(x * w.sqrt()[:, None], (y * w.sqrt())[:, None]).solution[:, 0]
    torch.testing.assert_close(found, slow, atol=1e-6, rtol=1e-6)


# ---- beside Captum


def forward(model, answer):
    """Captum's forward function of token ids [row, position]."""
    if answer == "good":
        return lambda ids: run_ids(model, ids)[:, 2]
    return lambda ids: run_ids(model, ids)[:, -1, token(model, answer)]


@pytest.mark.parametrize(("family", "answer"), [("gpt2", "Paris"), ("bert", "Paris"), ("classifier", "good")])
def test_values_equal_captums(family, answer):
    model = classifier() if family == "classifier" else opened(family)
    ours = "good" if answer == "good" else logit(" " + answer)
    ids = model.inputs(PROMPT).stream("").ids
    case = Case.of(model, PROMPT, ours)
    mask = model.tokenizer.mask_token_id
    there = torch.where(torch.tensor(case.fixed), ids, mask)
    f = forward(model, answer)
    free = ~case.fixed
    numbered = torch.zeros_like(ids)  # special tokens are one feature that never changes
    numbered[0, free] = torch.arange(1, int(free.sum()) + 1) - (0 if case.fixed.any() else 1)

    ablated = FeatureAblation(f).attribute(ids, there)[0]
    np.testing.assert_allclose(occlusion(model, PROMPT, ours).values, ablated, atol=1e-4)
    slid = Occlusion(f).attribute(ids, (2,), strides=(1,), baselines=there)[0]
    if not case.fixed.any():
        np.testing.assert_allclose(occlusion(model, PROMPT, ours, window=2).values, slid, atol=1e-4)

    truth = exact_shapley(model, PROMPT, ours).values
    np.testing.assert_allclose(ShapleyValues(f).attribute(ids, there, feature_mask=numbered)[0], truth, atol=1e-4)
    np.testing.assert_allclose(kernel_shap(model, PROMPT, ours).values, truth, atol=1e-5)
    torch.manual_seed(0)
    sampled = ShapleyValueSampling(f).attribute(ids, there, feature_mask=numbered, n_samples=60)[0]
    scale = np.abs(truth).max()
    np.testing.assert_allclose(sampled, shapley(model, PROMPT, ours, draws=60).values, atol=0.35 * scale)
    np.random.seed(0)
    theirs = KernelShap(f).attribute(ids, there, feature_mask=numbered, n_samples=300)[0]
    np.testing.assert_allclose(theirs, truth, atol=0.1 * scale + 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_lime_equals_captums_on_the_same_masks_kernel_and_penalty(family):
    model = opened(family)
    case = Case.of(model, PROMPT, logit(" Paris"))
    present = lime_draw(5, 40, 3)
    rows = iter(present)
    ids = case.ids[None]
    f = forward(model, "Paris")

    def put(row, original, **_):
        made = original.clone()
        made[0, torch.tensor(~case.fixed)] = torch.where(
            row[0].bool(), original[0, ~case.fixed], model.tokenizer.mask_token_id
        )
        return made

    base = LimeBase(
        f, SkLearnRidge(alpha=1.0), lambda *a, **k: kernel(a[2], 0.25),
        lambda original, **_: next(rows)[None], True, put, None,
    )  # fmt: skip
    theirs = base.attribute(ids, n_samples=40)[0]
    ours = lime(model, PROMPT, logit(" Paris"), draws=40, seed=3)
    np.testing.assert_allclose(ours.values[~case.fixed], theirs, atol=1e-5)
    assert ours.values[case.fixed].sum() == 0


def test_limes_weights_on_a_linear_model_are_the_models_and_explain_everything():
    present = lime_draw(6, 300, 0)
    slopes = torch.arange(6).double()
    values = (2 + present.double() @ slopes)[:, None]
    found = fit(present, values, kernel(present, 0.25)[None], 1e-9, torch.ones(1, 6, dtype=torch.bool))[0, :, 0]
    torch.testing.assert_close(found, torch.cat([torch.tensor([2.0]).double(), slopes]), atol=1e-5, rtol=1e-5)


def test_limes_interval_holds_its_weight_and_narrows_with_samples():
    model = opened("llama")
    few, many = (lime(model, PROMPT, " Paris", draws=n, seed=1) for n in (20, 300))
    assert (few.low <= few.high).all() and (many.low <= many.attribution + 1e-9).all()
    assert float(many.error.mean()) < float(few.error.mean())
    assert float(many.r2) <= 1


def test_words_that_occur_twice_are_players_of_their_own():
    found = lime(opened("gpt2"), "Mary gave Mary a drink", " John", players="word")
    assert found.text.values.tolist() == ["Mary", "gave", "Mary", "a", "drink"]
    assert found.values[0] != found.values[2]


# ---- on models


@pytest.mark.parametrize(
    "method", ["occlusion", "lime", "kernel_shap", "shapley", "exact_shapley", "owen", "partition"]
)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_tokens_said_later_get_nothing_and_each_output_is_attributed_as_alone(method, family):
    model, f = opened(family), METHODS[method]
    options = {"draws": 400} if method in ("lime", "kernel_shap") else {}
    found = f(model, "of Italy", continuation(" Paris and Rome"), **options)
    outputs, length = found.values.shape
    assert outputs == 3
    for n in range(outputs):
        assert (found.values[n, length - (outputs - 1) + n :] == 0).all()
    if method in ("exact_shapley", "kernel_shap", "occlusion", "partition"):
        first = f(model, "of Italy", continuation(" Paris"), **options).values
        np.testing.assert_allclose(found.values[0, : len(first[0])], first[0], atol=1e-5)


@pytest.mark.parametrize("method", ["kernel_shap", "shapley", "exact_shapley", "owen", "partition"])
@pytest.mark.parametrize("players", ["token", "word", "sentence", ["It is", "capital of Italy"]])
def test_additive_methods_add_up_for_any_players(method, players):
    found = METHODS[method](opened("bert"), TEXT, logit(" Paris"), players=players)
    assert float(found.attribution.sum()) == pytest.approx(float(found.score - found.baseline_score), abs=1e-6)
    assert int(found.evaluations) > 0
    if players == ["It is", "capital of Italy"]:
        assert found.text.values.tolist() == players


def test_the_planner_gives_what_running_each_variant_gives():
    model = opened("gpt2")
    case = Case.of(model, TEXT, " Paris")
    quick, slow = Game.of(case, "word"), Game.of(case, "word")
    assert quick._replaceable
    slow._replaceable = False
    present = lime_draw(len(quick.players), 30, 0)
    torch.testing.assert_close(quick(present), slow(present), atol=1e-5, rtol=1e-5)


def test_hierarchies_are_words_in_sentences_or_given():
    case = Case.of(opened("gpt2"), TEXT, " Paris")
    words = Players.of(case, "word")
    assert grouped(case, words, "sentence") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert grouped(case, words, [[0, 1], [2, 3, [4, 5]], 6, 7]) == ((0, 1), (2, 3, (4, 5)), 6, 7)
    assert sorted(leaves(grouped(case, words, "balanced"))) == list(range(8))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (occlusion, {"window": 2, "stride": 3}, "expected a stride of 1 to the window's size"),
        (lime, {"draws": 1}, "2 draws"),
        (shapley, {"draws": 3}, "an even number"),
        (owen, {"draws": 0}, "an even number"),
        (owen, {"hierarchy": "chapter"}, "unknown hierarchy 'chapter'"),
        (owen, {"hierarchy": [[0, 1], [1, 2]]}, "must name each of the players 0 to 4 once"),
        (partition, {"evaluations": 1}, "at least 2"),
        (exact_shapley, {"prompt": "of the " * 6 + "of the"}, r"14 players have 2\^14 coalitions"),
    ],
)
def test_bad_options_are_one_clear_error(method, options, message):
    with pytest.raises(InputError, match=message):
        method(opened("gpt2"), **{"prompt": PROMPT, "target": " Paris", **options})


def test_seeds_repeat_and_differ():
    for method in (lime, shapley, owen, kernel_shap):
        options = {"draws": 28} if method in (lime, kernel_shap) else {"draws": 2}
        a, b, c = (method(opened("gpt2"), TEXT, " Paris", seed=s, **options) for s in (1, 1, 2))
        assert a.allclose(b, atol=0) and not a.allclose(c, atol=1e-9)


def test_every_method_is_called_alike():
    for method in METHODS.values():
        found = method(opened("gpt2"), PROMPT, " Paris", against=" Rome", players="word")
        assert found.kind == "attribution" and found.provenance.method == method.__name__
        assert found.main.name == "attribution" and found.main.dims == ("player",)


@pytest.mark.parametrize("method", [occlusion, exact_shapley, lime])
@pytest.mark.parametrize("how", ["remove", "resample"])
def test_remove_and_resample_mean_what_they_mean_in_the_evaluation(method, how):
    model = opened("gpt2")
    found = method(model, PROMPT, " Paris", baseline=how)
    world = absence(Case.of(model, PROMPT, " Paris"), how=how)
    assert float(found.baseline_score) == pytest.approx(float(world.none), abs=1e-5)
    assert found.data.attrs["baseline"] == world.name
    if method is occlusion:
        drops = [float(world.all - world(row[None])[0]) for row in 1 - torch.eye(5)]
        np.testing.assert_allclose(found.values, drops, atol=1e-5)


def test_methods_with_a_gradient_refuse_absence_that_is_no_embedding():
    for how in ("remove", "resample"):
        with pytest.raises(InputError, match="puts nothing in a token's place"):
            METHODS["integrated_gradients"](opened("gpt2"), PROMPT, " Paris", baseline=how)
