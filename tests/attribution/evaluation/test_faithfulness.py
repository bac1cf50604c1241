"""Faithfulness figures equal Captum's, ERASER's and AIX360's definitions written out, and mean what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from pellucid.attribution import integrated_gradients
from pellucid.attribution.absence import absence
from pellucid.attribution.case import Case
from pellucid.attribution.evaluation import faithfulness
from pellucid.attribution.evaluation.faithfulness import METRICS, Infidelity, counts, curve, measure
from pellucid.attribution.evaluation.sensitivity import max_sensitivity
from pellucid.attribution.evaluation.soft import soft, unit
from pellucid.errors import InputError
from pellucid.metrics import probability
from pellucid.results import Result
from tests.attribution.evaluation.models import PROMPT, Formula, additive, case_of, opened

WEIGHTS = st.lists(st.floats(-3, 3, width=16), min_size=2, max_size=9)


def rough(here):
    """A game that is not additive."""
    return float(np.tanh(here @ np.arange(1, len(here) + 1)) + here[0] * here[-1])


def eraser(model, ids, words, scores, shares, keep, pad):
    """Comprehensiveness or sufficiency, the slow way: one changed prompt after another."""
    n, order = len(words), sorted(range(len(words)), key=lambda i: -scores[i])

    def v(present):
        row = [t if i not in words or present[words.index(i)] else pad for i, t in enumerate(ids)]
        with torch.no_grad():
            given = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            return float(model.score(model.run(given), probability(" Paris")))

    ks = sorted({max(1, math.ceil(share * n)) for share in shares})
    lost = []
    for k in ks:
        chosen = set(order[:k])
        lost.append(v([True] * n) - v([(i in chosen) == keep for i in range(n)]))
    return sum(lost) / len(lost)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_comprehensiveness_and_sufficiency_equal_erasers_written_out(family):
    model, case = opened(family), case_of(family, probability(" Paris"))
    words = [i for i, fixed in enumerate(case.fixed) if not fixed]
    scores = np.random.default_rng(0).standard_normal(len(words))
    found = measure(absence(case, how="pad"), {"s": scores}, [METRICS["comprehensiveness"], METRICS["sufficiency"]])[
        "s"
    ]
    shares, ids = (0.01, 0.05, 0.1, 0.2, 0.5), case.ids.tolist()
    pad = model.tokenizer.pad_token_id
    assert found["comprehensiveness"] == pytest.approx(eraser(model, ids, words, scores, shares, False, pad), abs=1e-6)
    assert found["sufficiency"] == pytest.approx(eraser(model, ids, words, scores, shares, True, pad), abs=1e-6)


def test_a_threshold_that_gives_the_same_k_is_counted_once():
    assert counts(5).tolist() == [1, 3]
    assert counts(200).tolist() == [2, 10, 20, 40, 100]
    assert curve(4).tolist() == [0, 1, 2, 3, 4]
    assert len(curve(128)) == 11


@pytest.mark.parametrize("scaled", [False, True])
def test_infidelity_equals_captums(scaled):
    n = 7
    scores = np.random.default_rng(3).standard_normal(n)
    metric = Infidelity(samples=40, scaled=scaled, seed=5)
    mine = measure(Formula(rough, n), {"s": scores}, [metric])["s"]["infidelity"]
    absent = torch.from_numpy(~metric.coalitions(scores)).double()
    captum = infidelity(
        lambda here: torch.tensor([rough(row.numpy()) for row in here], dtype=torch.float64),
        lambda here: (absent, here - absent),
        torch.ones(1, n, dtype=torch.float64),
        torch.from_numpy(scores)[None],
        n_perturb_samples=40,
        normalize=scaled,
    )
    assert mine == pytest.approx(float(captum), abs=1e-9)


def test_monotonicity_is_one_where_aix360_says_yes():
    def aix360(formula, scores):
        here, order, seen = np.zeros(len(scores)), np.argsort(scores), []
        for i in order:
            here[i] = 1
            seen.append(formula(here))
        return bool((np.diff(seen) >= 0).all())

    weights = np.array([1.0, 2.0, -1.0, 0.5])
    for scores in (weights, np.array([4.0, 3.0, 1.0, 2.0]), -weights):
        share = measure(additive(weights), {"s": scores}, [METRICS["monotonicity"]])["s"]["monotonicity"]
        # the first step, from nothing to the least important player, is counted here and not there
        first = weights[np.argsort(scores, kind="stable")[0]] >= 0
        assert (share == 1) == (aix360(lambda h: weights @ h, scores) and first)


@given(WEIGHTS)
@settings(max_examples=40, deadline=None)
def test_the_true_weights_of_an_additive_game_are_faithful_and_no_scores_are_more_so(weights):
    weights = np.array(weights)
    others = {f"o{i}": np.random.default_rng(i).standard_normal(len(weights)) for i in range(4)}
    found = measure(additive(weights), {"true": weights, **others}, list(METRICS.values()))
    unscaled = measure(additive(weights), {"true": weights}, [Infidelity(scaled=False)])["true"]["infidelity"]
    assert unscaled == pytest.approx(0, abs=1e-9)
    assert found["true"]["infidelity"] == pytest.approx(0, abs=1e-9)
    for name in others:
        for metric, sign in (("comprehensiveness", 1), ("sufficiency", -1), ("deletion", -1), ("insertion", 1)):
            assert sign * found["true"][metric] >= sign * found[name][metric] - 1e-9
    if len(np.unique(weights)) == len(weights):
        assert found["true"]["leave-one-out"] == pytest.approx(1)


def test_leave_one_out_is_spearmans_correlation_with_single_removals():
    scores = np.random.default_rng(0).standard_normal(6)
    game = Formula(rough, 6)
    lost = [rough(np.ones(6)) - rough(1.0 - np.eye(6)[i]) for i in range(6)]
    mine = measure(game, {"s": scores}, [METRICS["leave-one-out"]])["s"]["leave-one-out"]
    assert mine == pytest.approx(stats.spearmanr(scores, lost).statistic)


def test_areas_are_trapezoids_of_the_curves():
    scores = np.arange(6.0)
    found = faithfulness(opened("gpt2"), PROMPT, np.arange(5.0), " Paris", replacement="pad", metrics=["deletion"])
    area = integrate.trapezoid(found.deletion.values[0], found.share.values)
    assert float(found.value[0, 0]) == pytest.approx(area)
    assert found.deletion.values[0, 0] == pytest.approx(float(found.score))
    assert found.deletion.values[0, -1] == pytest.approx(float(found.baseline_score))
    game = additive(np.ones(6))
    assert measure(game, {"s": scores}, [METRICS["insertion"]])["s"]["insertion"] == pytest.approx(3.0)


def test_soft_figures_equal_the_definition_written_out():
    """Scores of 0 and 1 leave nothing to chance: dimensions are then kept or dropped whole."""
    model = opened("bert")
    case = Case.of(model, PROMPT, probability(" Paris"))
    world = absence(case, how="pad")
    if float(world.all - world.none) <= 0:
        case = Case.of(model, PROMPT, lambda z: -z[:, -1].softmax(-1)[:, 10])
        world = absence(case, how="pad")
    scores = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    present = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]])
    values, errors = soft(world, {"s": scores}, draws=5)["s"]
    (kept, dropped), whole, nothing = world(present)[:, 0].tolist(), float(world.all), float(world.none)
    s0 = 1 - max(0, whole - nothing)
    assert values["soft sufficiency"] == pytest.approx((1 - max(0, whole - kept) - s0) / (1 - s0), abs=1e-3)
    assert values["soft comprehensiveness"] == pytest.approx(max(0, whole - dropped) / (1 - s0), abs=1e-3)
    assert errors["soft sufficiency"] == pytest.approx(0, abs=1e-6)


def test_soft_figures_are_undefined_where_there_is_nothing_to_explain():
    model = opened("gpt2")
    case = Case.of(model, PROMPT, lambda z: z.new_zeros(len(z)))
    values, _ = soft(absence(case, how="pad"), {"s": np.arange(5.0)})["s"]
    assert all(math.isnan(v) for v in values.values())
    assert unit(np.ones(3)).tolist() == [0.5] * 3


def test_max_sensitivity_equals_captums_for_the_same_moves():
    """Gradient times input, on a prompt whose tokens are all different; Captum is given our noise."""
    model = opened("gpt2", tie_word_embeddings=False)
    case = Case.of(model, PROMPT, " Paris")
    module, ids = model.module, case.ids
    table = module.get_input_embeddings()
    answer = model.tokenizer.convert_tokens_to_ids("▁Paris")

    def explain(embeddings):
        with torch.enable_grad():
            embeddings = embeddings.detach().requires_grad_()
            score = module(inputs_embeds=embeddings).logits[:, -1, answer].sum()
            return (torch.autograd.grad(score, embeddings)[0] * embeddings).sum(-1).detach()

    def method(model, prompt, target=None, *, against=None, players="token"):
        return explain(table(ids[None]))[0].numpy()

    mine = max_sensitivity(model, PROMPT, method, " Paris", radius=0.1, draws=4, seed=2)
    own = table.weight.detach()[ids]
    generator = torch.Generator().manual_seed(2)
    unique, reach = ids.unique(), 0.1 * float(own.square().mean().sqrt())
    moves = []
    for _ in range(4):
        noise = (torch.rand(len(unique), own.shape[1], generator=generator) * 2 - 1) * reach
        moves.append(noise[torch.searchsorted(unique, ids)])
    given = iter(moves)
    captum = sensitivity_max(
        lambda x: (explain(x[0] if isinstance(x, tuple) else x),),  # a bare tensor it would take for a tuple of rows
        own[None],
        perturb_func=lambda x: torch.stack([next(given) for _ in x]) + x,
        n_perturb_samples=4,
        norm_ord="fro",
        max_examples_per_batch=1,
    )
    assert mine == pytest.approx(float(captum), rel=1e-4)
    assert model.module.get_input_embeddings() is table


def test_sensitivity_leaves_the_weights_even_if_the_method_fails():
    model = opened("gpt2")
    before = model.module.get_input_embeddings().weight
    calls = iter([np.arange(5.0)])
    with pytest.raises(StopIteration):
        max_sensitivity(model, PROMPT, lambda *a, **k: next(calls), " Paris")
    assert model.module.get_input_embeddings().weight is before
    assert model.module.lm_head.weight is before
    steady = max_sensitivity(model, PROMPT, lambda *a, **k: np.arange(5.0), " Paris")
    assert steady == 0
    with pytest.raises(InputError, match="all scores are zero"):
        max_sensitivity(model, PROMPT, lambda *a, **k: np.zeros(5), " Paris")


def test_one_call_measures_results_and_bare_numbers_side_by_side(tmp_path):
    model = opened("gpt2")
    shares = integrated_gradients(model, PROMPT, " Paris", baseline="pad")
    found = faithfulness(model, PROMPT, {"IG": shares, "order": np.arange(5.0)}, " Paris", replacement="pad")
    assert found.value.dims == ("technique", "metric")
    assert found.metric.values.tolist()[-2:] == ["soft comprehensiveness", "soft sufficiency"]
    assert dict(zip(found.metric.values, found.better.values, strict=True))["sufficiency"] == "less"
    words = faithfulness(model, PROMPT, shares, " Paris", players="word", metrics=["insertion"])
    assert words.value.shape == (1, 1)
    assert Result.load(found.save(tmp_path / "f.zip")) == found


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (np.zeros(3), {}, r"the scores are \[3\]: expected one for each of 5"),
        (np.full(5, np.nan), {}, "not all finite"),
        (np.zeros(5), {"metrics": ["faithfulnes"]}, "unknown metric"),
    ],
)
def test_bad_arguments_are_one_clear_error(scores, options, message):
    with pytest.raises(InputError, match=message):
        faithfulness(opened("gpt2"), PROMPT, scores, " Paris", **options)
