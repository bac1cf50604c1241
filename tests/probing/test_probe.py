"""Probes by layer: they find what is there and nothing where nothing is; controls, intervals and splits are honest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pellucid.errors import InputError
from pellucid.probing import (
    Examples,
    Features,
    Protocol,
    Spans,
    balanced,
    beside_random,
    control_task,
    probe,
    random_twin,
    selectivity,
)
from pellucid.probing.splits import Scores, folds, held_out
from pellucid.results import Result
from tests.probing.trees import drawn, tiny


@pytest.mark.parametrize("k", [2, 3, 7])
def test_folds_hold_whole_groups_and_are_of_like_size(k):
    groups = np.random.default_rng(0).integers(40, size=500)
    fold = folds(groups, k, seed=3)
    assert all(len(set(fold[groups == g])) == 1 for g in groups)
    assert np.bincount(fold).min() > 0.7 * 500 / k
    assert (folds(groups, k, seed=3) == fold).all()
    assert (folds(groups, k, seed=4) != fold).any()


def test_too_few_groups_are_refused():
    with pytest.raises(InputError, match="cannot make 3 folds"):
        folds([0, 0, 1], 3)
    with pytest.raises(InputError, match="at most 0.5"):
        held_out([0, 1, 2], 0.9, 0)


def test_the_bootstrap_resamples_whole_groups():
    groups = np.repeat(np.arange(50), 10)
    value = np.repeat(np.random.default_rng(0).random(50) < 0.5, 10).astype(float)
    clustered, single = (
        float(high[0] - low[0])
        for low, high in (Scores(value[None, None], g).interval() for g in (groups, np.arange(500)))
    )
    assert clustered == pytest.approx(np.sqrt(10) * single, rel=0.15)


def test_a_probe_finds_what_is_there_where_it_is():
    features, examples = drawn()
    found = probe(features, examples, protocol=Protocol(seeds=2))
    accuracy = found.accuracy.values
    assert accuracy[0] < 0.5 < 0.8 < accuracy[1] < accuracy[2]
    assert found.low.values[0] < 1 / 3 + 0.1
    assert (found.low.values <= accuracy).all() and (accuracy <= found.high.values).all()
    assert found.loss.values[2] < 0.5 < 1.4 < found.loss.values[0] < 1.8  # log2 3 = 1.58 bits are all there are
    assert found.layer.values.tolist() == [-1, 0, 1]


def test_a_regression_probe_explains_the_share_that_is_there(tmp_path):
    features, examples = drawn()
    target = features.values[1, :, 3].numpy() + np.random.default_rng(0).normal(size=len(examples))
    found = probe(features, examples.relabelled(target.astype(float)), protocol=Protocol(seeds=2))
    assert found.r2.values[1] == pytest.approx(0.5, abs=0.12)
    assert abs(found.r2.values[0]) < 0.15
    assert Result.load(found.save(tmp_path / "probe.zip")) == found


def test_word_types_leak_unless_they_are_held_out():
    """Labels are one per word type and each type has a fixed vector: on unseen types nothing can be known."""
    rng = np.random.default_rng(0)
    spans = Spans.words([[f"w{rng.integers(30)}" for _ in range(6)] for _ in range(80)])
    examples = Examples(spans, ["x"] * len(spans))
    types, each = np.unique(examples.types, return_inverse=True)
    examples = examples.relabelled(np.array(["a", "b"])[rng.integers(2, size=len(types))][each])
    vectors = torch.tensor(rng.normal(size=(len(types), 40)), dtype=torch.float32)
    features = Features(vectors[each][None], ("embed",), spans, "drawn", None, "mean")
    by_text = probe(features, examples, protocol=Protocol(seeds=2))
    by_type = probe(features, examples, protocol=Protocol(by="type", seeds=4))
    assert by_text.accuracy.item() > 0.95
    assert by_type.accuracy.item() < 0.75


def test_a_control_task_keeps_frequencies_and_gives_each_type_one_label():
    _, examples = drawn(texts=400)
    examples = examples.relabelled(np.where(np.arange(len(examples)) % 4, "often", "seldom"))
    control = control_task(examples, seed=1)
    for word in set(examples.types):
        assert len(set(control.labels[examples.types == word])) == 1
    share = np.mean([(control_task(examples, s).labels == "often").mean() for s in range(60)])
    assert share == pytest.approx(0.75, abs=0.05)


def test_selectivity_is_high_for_what_is_encoded_and_none_for_what_is_not():
    drawn_, examples = drawn(texts=120)
    features = replace(drawn_, values=drawn_.values[[2, 0]], sites=drawn_.sites[:2])
    found = selectivity(features, examples, protocol=Protocol(seeds=2))
    assert found.selectivity.values[0] > 0.35
    assert found.low.values[0] > 0
    assert abs(found.selectivity.values[1]) < 0.2
    with pytest.raises(InputError, match="types that are held out"):
        selectivity(features, examples, protocol=Protocol(by="type"))


def test_a_random_twin_has_the_same_weights_in_another_order_and_leaves_the_model_alone():
    model = tiny()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    twin = random_twin(model, keep_embeddings=True)
    for name, weight in model.module.state_dict().items():
        assert torch.equal(weight, before[name])
        other = twin.module.state_dict()[name]
        torch.testing.assert_close(weight.flatten().sort().values, other.flatten().sort().values)
        assert torch.equal(weight, other) == (weight.ndim == 1 or "embed_tokens" in name)


def test_probes_stand_beside_those_of_random_weights():
    examples = Examples(Spans.words([f"the {w} of {w} he" for w in "abcdefghijkl" * 3]), ["x", "y", "x", "z", "z"] * 36)
    found = beside_random(tiny(), examples, protocol=Protocol(seeds=1))
    assert found.main.dims == ("layer",)
    np.testing.assert_allclose(found.gain, found.accuracy - found.random)


def test_balanced_examples_have_every_class_equally_often():
    _, examples = drawn()
    labels = np.where(np.arange(len(examples)) % 5, "a", "b")
    same = balanced(examples.relabelled(labels))
    assert np.unique(same.labels, return_counts=True)[1].tolist() == [60, 60]
