"""Each metric equals its formula written slowly, has the properties its name promises, and has gradients."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

import pellucid as pl
from pellucid import metrics
from pellucid.errors import InputError
from pellucid.metrics import BoundMetric, Metric, as_metric, extend
from tests import zoo
from tests.tasks.tokenizers import tokenizer

VOCAB = 7
rows = arrays(np.float64, (2, VOCAB), elements=st.floats(-20, 20))
settings.register_profile("pellucid", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("pellucid")


def score(metric: Metric, z: np.ndarray | Tensor) -> np.ndarray:
    """The metric of logits z [batch, vocab] that stand at the last of three positions."""
    last = torch.as_tensor(z)
    logits = torch.stack([torch.randn_like(last), torch.randn_like(last), last], 1)
    return metric.bind(None, len(last)).score(logits).numpy()


# metric of the answers {1, 2} against {4}, and the same for one row z, slowly
ANSWERS: dict[str, tuple[Metric, Callable[[np.ndarray], float]]] = {
    "logit": (metrics.logit([[1, 2]]), lambda z: (z[1] + z[2]) / 2),
    "logit_difference": (metrics.logit_difference([[1, 2]], 4), lambda z: (z[1] + z[2]) / 2 - z[4]),
    "probability": (metrics.probability([[1, 2]]), lambda z: softmax(z)[1] + softmax(z)[2]),
    "probability_difference": (
        metrics.probability_difference([[1, 2]], 4),
        lambda z: softmax(z)[1] + softmax(z)[2] - softmax(z)[4],
    ),
    "log_probability": (metrics.log_probability([[1, 2]]), lambda z: math.log(softmax(z)[1] + softmax(z)[2])),
    "cross_entropy": (metrics.cross_entropy([[1, 2]]), lambda z: -math.log(softmax(z)[1] + softmax(z)[2])),
    "log_odds": (
        metrics.log_odds([[1, 2]]),
        lambda z: math.log((softmax(z)[1] + softmax(z)[2]) / sum(softmax(z)[[0, 3, 4, 5, 6]])),
    ),
    "rank": (metrics.rank([[1, 2]]), lambda z: sum(each > max(z[1], z[2]) for each in z)),
}
COUNTS = {"rank"}
DISTANCES = {
    "kl_divergence": lambda r, p: rel_entr(r, p).sum(),
    "js_divergence": lambda r, p: jensenshannon(r, p) ** 2,
    "total_variation": lambda r, p: np.abs(r - p).sum() / 2,
    "top1_agreement": lambda r, p: float(r.argmax() == p.argmax()),
}


@pytest.mark.parametrize("name", ANSWERS)
@given(z=rows)
def test_a_metric_equals_its_formula(name: str, z: np.ndarray) -> None:
    metric, formula = ANSWERS[name]
    assert metric.name == name
    np.testing.assert_allclose(score(metric, z), [formula(row) for row in z], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
@given(z=rows, reference=rows)
def test_a_distance_equals_scipys(name: str, z: np.ndarray, reference: np.ndarray) -> None:
    expected = [DISTANCES[name](softmax(r), softmax(p)) for r, p in zip(reference, z, strict=True)]
    np.testing.assert_allclose(score(getattr(metrics, name)(reference), z), expected, rtol=1e-6, atol=1e-7)


@given(z=rows, shift=st.floats(-20, 20))
def test_all_but_the_raw_logit_ignore_a_constant_added_to_the_logits(z: np.ndarray, shift: float) -> None:
    for name, (metric, _) in ANSWERS.items():
        if name == "logit":
            np.testing.assert_allclose(score(metric, z + shift), score(metric, z) + shift, atol=1e-9)
        elif name not in COUNTS:
            np.testing.assert_allclose(score(metric, z + shift), score(metric, z), atol=1e-9)
    for name in DISTANCES.keys() - {"top1_agreement"}:
        metric = getattr(metrics, name)(z)
        np.testing.assert_allclose(score(metric, z + shift), 0.0, atol=1e-9)


@given(z=rows)
def test_differences_change_sign_when_right_and_wrong_are_swapped(z: np.ndarray) -> None:
    for difference in (metrics.logit_difference, metrics.probability_difference):
        np.testing.assert_array_equal(score(difference(1, 4), z), -score(difference(4, 1), z))
        assert not score(difference(3, 3), z).any()


@given(z=rows)
def test_probability_and_its_logarithms_agree(z: np.ndarray) -> None:
    p = score(metrics.probability([[1, 2]]), z)
    np.testing.assert_allclose(np.log(p), score(metrics.log_probability([[1, 2]]), z), atol=1e-9)
    log_p = log_softmax(z, axis=1)
    np.testing.assert_allclose(score(metrics.logit_difference(1, 4), z), log_p[:, 1] - log_p[:, 4], atol=1e-9)
    rest = score(metrics.probability([[0, 3, 4, 5, 6]]), z)
    np.testing.assert_allclose(np.log(p / rest), score(metrics.log_odds([[1, 2]]), z), atol=1e-9)


def test_log_odds_stay_exact_where_one_minus_p_vanishes() -> None:
    z = torch.zeros(1, VOCAB, dtype=torch.float64)
    z[0, 1] = 60.0  # 1 - p is 0 in floating point
    np.testing.assert_allclose(score(metrics.log_odds(1), z), 60.0 - math.log(VOCAB - 1))


@given(z=rows, reference=rows)
def test_distances_keep_their_bounds(z: np.ndarray, reference: np.ndarray) -> None:
    kl = score(metrics.kl_divergence(reference), z)
    js = score(metrics.js_divergence(reference), z)
    tv = score(metrics.total_variation(reference), z)
    assert (kl >= -1e-12).all()
    assert (tv**2 <= kl / 2 + 1e-9).all()  # Pinsker
    assert ((js >= -1e-12) & (js <= math.log(2) + 1e-12)).all()
    assert ((tv >= 0) & (tv <= 1 + 1e-12)).all()
    np.testing.assert_allclose(js, score(metrics.js_divergence(z), reference), atol=1e-12)
    reverse = metrics.kl_divergence(z, direction="model||reference")
    np.testing.assert_allclose(kl, score(reverse, reference), atol=1e-9)


def test_impossible_tokens_do_not_spoil_a_divergence() -> None:
    z = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    for name in ("kl_divergence", "js_divergence", "total_variation"):
        value = getattr(metrics, name)(torch.tensor([[2.0, 1.0, -math.inf]])).bind(None, 1)(z[:, None])
        assert value.isfinite().all()
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted((ANSWERS.keys() - COUNTS) | (DISTANCES.keys() - {"top1_agreement"})))
def test_gradients_flow_and_equal_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    metric = ANSWERS[name][0] if name in ANSWERS else getattr(metrics, name)(torch.randn(2, VOCAB))
    z = torch.randn(2, 3, VOCAB, dtype=torch.float64, requires_grad=True)
    bound = metric.bind(None, 2)
    assert torch.autograd.gradcheck(bound.score, (z,))
    (gradient,) = torch.autograd.grad(bound.score(z).sum(), z)
    assert gradient[:, -1].any()
    assert not gradient[:, :-1].any()


def test_logit_metrics_read_only_the_answer_rows() -> None:
    bound = metrics.logit_difference([[1, 2], [3]], [4, [5, 6]]).bind(None, 2)
    assert bound.positions == (-1,)
    assert bound.tokens is not None
    assert bound.tokens.tolist() == [[1, 2, 4, 4], [3, 3, 5, 6]]
    z = torch.randn(2, 3, VOCAB)
    expected = torch.stack([z[0, -1, [1, 2]].mean() - z[0, -1, 4], z[1, -1, 3] - z[1, -1, [5, 6]].mean()])
    torch.testing.assert_close(bound(z[:, -1:].gather(2, bound.tokens[:, None])), expected)
    assert metrics.probability(1).bind(None, 2).tokens is None


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_per_prompt_equal_one_prompt_at_a_time(name: str) -> None:
    make = getattr(metrics, name)
    right, wrong = [[1, 2], 3, [5]], [4, [0, 6], 2]
    arguments = [right, wrong] if name.endswith("difference") else [right]
    z = torch.randn(3, 2, VOCAB)
    together = make(*arguments).bind(None, 3).score(z)
    for i in range(3):
        alone = make(*([side[i]] for side in arguments)).bind(None, 1)
        torch.testing.assert_close(alone.score(z[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens_whichever_side_is_padded(side: str) -> None:
    z = [torch.randn(n, VOCAB) for n in (3, 5)]
    pad = torch.full((2, VOCAB), math.nan)
    padded = torch.stack([torch.cat([pad, z[0]] if side == "left" else [z[0], pad]), z[1]])
    real = torch.tensor([1, 1, 1, 0, 0] if side == "right" else [0, 0, 1, 1, 1])
    mask = torch.stack([real, torch.ones(5, dtype=real.dtype)])
    for position in (-1, -3, 0, 2):
        scores = metrics.logit(4, position=position).bind(None, 2).score(padded, mask)
        assert scores.tolist() == [each[position, 4].item() for each in z]
    with pytest.raises(InputError, match=r"reads \(3,\), but a prompt has 3 tokens"):
        metrics.logit(4, position=3).bind(None, 2).score(padded, mask)


def test_a_sequence_is_scored_by_the_chain_rule() -> None:
    answers = [[1, 2, 3], [4], [5, 6]]
    z = torch.randn(3, 6, VOCAB, dtype=torch.float64)
    log_p = z.log_softmax(-1)
    expected = [sum(log_p[b, 5 - len(a) + i, t].item() for i, t in enumerate(a)) for b, a in enumerate(answers)]
    bound = metrics.sequence_log_probability(answers).bind(None, 3)
    assert bound.positions == (-4, -3, -2)
    np.testing.assert_allclose(bound.score(z), expected)
    mean = metrics.sequence_log_probability(answers, per_token=True).bind(None, 3).score(z)
    np.testing.assert_allclose(mean, np.divide(expected, [3, 1, 2]))


def test_a_sequence_of_one_token_is_its_log_probability_before_it() -> None:
    z = torch.randn(2, 4, VOCAB)
    one = metrics.sequence_log_probability([3, 5]).bind(None, 2).score(z)
    torch.testing.assert_close(one, metrics.log_probability([3, 5], position=-2).bind(None, 2).score(z))


def test_a_prompt_extended_by_its_answer_is_what_the_tokenizer_makes_of_both() -> None:
    tok = tokenizer("smollm2")
    prompt, answer = "The capital of Burkina Faso is", " Ouagadougou"
    ids = extend(tok(prompt).input_ids, metrics.answer_ids(tok, answer))
    assert ids == tok(prompt + answer).input_ids
    z = torch.randn(1, len(ids), len(tok))
    expected = sum(z[0, i - 1].log_softmax(0)[ids[i]] for i in range(len(tok(prompt).input_ids), len(ids)))
    torch.testing.assert_close(metrics.sequence_log_probability(answer).bind(tok, 1).score(z)[0], expected)


def test_a_classifier_is_read_by_class_number() -> None:
    z = torch.randn(4, 3)
    torch.testing.assert_close(metrics.class_logit([0, 1, 2, 0]).bind(None, 4).score(z), z[range(4), [0, 1, 2, 0]])
    torch.testing.assert_close(metrics.class_probability(2).bind(None, 4).score(z), z.softmax(1)[:, 2])
    with pytest.raises(InputError, match="expected a number"):
        metrics.class_logit("positive").bind(None, 4)
    with pytest.raises(InputError, match=r"reads \['batch', 'classes'\]"):
        metrics.class_logit(1).bind(None, 4).score(torch.randn(4, 5, 3))


def test_any_function_of_the_logits_is_a_metric() -> None:
    def entropy(logits: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=logits[:, -1]).entropy()

    bound = as_metric(entropy).bind(None, 3)
    assert (bound.name, bound.positions, bound.tokens) == ("entropy", None, None)
    assert bound.score(torch.zeros(3, 2, VOCAB)).tolist() == pytest.approx([math.log(VOCAB)] * 3)
    assert isinstance(as_metric(bound), BoundMetric)
    assert as_metric(metrics.logit(1)) == metrics.logit(1)
    with pytest.raises(InputError, match=r"gave \[3, 2\] for 3 prompts"):
        as_metric(lambda logits: logits[..., 0]).bind(None, 3).score(torch.zeros(3, 2, VOCAB))
    with pytest.raises(InputError, match="is no metric"):
        as_metric(" Paris")  # type: ignore[arg-type]


def test_answers_are_texts_as_the_tokenizer_cuts_them() -> None:
    tok = tokenizer("smollm2")
    bound = metrics.logit_difference(" Paris", [[" Rome", " London"]]).bind(tok, 2)
    assert bound.tokens is not None
    assert tok.convert_ids_to_tokens(bound.tokens[0]) == ["ĠParis", "ĠRome", "ĠLondon"]
    for unusable in (" Ouagadougou", "Copenhagen"):
        with pytest.raises(InputError, match=f"use sequence_log_probability.'{unusable}'"):
            metrics.probability(unusable).bind(tok, 1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: metrics.logit([1, 2, 3]).bind(None, 2), "3 answers for 2 prompts"),
        (lambda: metrics.logit([[], [1]]).bind(None, 2), "an empty list of answers"),
        (lambda: metrics.logit(-1).bind(None, 2), "token id -1 is negative"),
        (lambda: metrics.logit(None), "None is no answer"),  # type: ignore[arg-type]
        (lambda: metrics.sequence_log_probability([[1], []]).bind(None, 2), r"\(\) is no answer"),
        (lambda: metrics.kl_divergence(torch.ones(2, 5, 3)).bind(None, 2), "slice it to the positions read"),
        (lambda: metrics.kl_divergence(torch.ones(4), direction="both"), "direction 'both'"),  # type: ignore[arg-type]
        (
            lambda: metrics.kl_divergence(torch.ones(4)).bind(None, 1).score(torch.ones(1, 2, 3)),
            "the reference is",
        ),
        (lambda: metrics.logit(1).bind(None, 1)(torch.ones(1, 2, 3)), r"reads \['batch', 1, 1\]"),
    ],
)
def test_wrong_use_gets_one_clear_sentence(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_metrics_are_values_that_travel_to_other_processes() -> None:
    metric = metrics.logit_difference([" Paris", " Rome"], [["a", "b"]])
    assert metric == metrics.logit_difference((" Paris", " Rome"), (("a", "b"),))
    assert hash(metric) == hash(pickle.loads(pickle.dumps(metric)))
    z = torch.randn(2, 3, VOCAB)
    for each in (
        *(m for m, _ in ANSWERS.values()),
        metrics.kl_divergence(z[0, 0]),
        metrics.sequence_log_probability(3),
    ):
        bound = each.bind(None, 2)
        assert torch.equal(pickle.loads(pickle.dumps(bound)).score(z), bound.score(z))


def test_half_precision_logits_are_scored_in_single_precision() -> None:
    z = torch.randn(2, 3, VOCAB).bfloat16()
    for metric, _ in ANSWERS.values():
        bound = metric.bind(None, 2)
        assert bound.score(z).dtype == torch.float32
        assert torch.equal(bound.score(z), bound.score(z.float()))


def test_token_ids_may_be_tensors_and_arrays() -> None:
    z = torch.randn(2, 3, VOCAB)
    for ids in (torch.tensor([1, 2]), np.array([1, 2]), [np.int64(1), torch.tensor(2)]):
        assert torch.equal(metrics.logit(ids).bind(None, 2).score(z), z[[0, 1], -1, [1, 2]])


def test_a_sequence_is_asked_for_where_the_prompt_ends_in_it():
    module = zoo.build("llama")
    model = pl.load(module, tokenizer=zoo.tokenizer(module))
    asked = metrics.sequence_log_probability(" Paris Rome")
    with pytest.warns(UserWarning, match="does not end in its answer"):
        model.score(model.run("The capital is"), asked)
    given = model.run(["The capital is Paris Rome", "The Paris Rome"])
    ids = model.inputs("The Paris Rome").stream("").ids
    with torch.no_grad():
        log_p = module(ids).logits[0].log_softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.score(given, asked)
    expected = log_p[0, ids[0, 1]] + log_p[1, ids[0, 2]]
    torch.testing.assert_close(found[1], expected)


def test_a_formula_of_several_variants_is_worked_out_as_for_each() -> None:
    several = [torch.randn(3, 1, 6, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    for metric in (
        metrics.logit_difference([[1, 2], 3, 4], 5).bind(None, 3),
        metrics.logit(4).bind(None, 3),
        metrics.log_probability([1, 2, 3]).bind(None, 3),
    ):
        read = [x[..., : 6 if metric.tokens is None else metric.tokens.shape[1]] for x in several]
        assert torch.equal(metric.each(read), torch.stack([metric(x) for x in read]))
