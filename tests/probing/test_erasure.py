"""Erasers: the closed form is exact and the least change, erasing twice is erasing once, and in a model it is an edit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import InputError
from pellucid.probing import Examples, Inlp, Leace, LogisticProbe, RandomSubspace, Spans, amnesic, read
from tests.probing.trees import drawn, tiny


def labelled(seed: int = 0, n: int = 400, d: int = 8, k: int = 3) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    mixing = rng.normal(size=(d, d))
    return torch.tensor((rng.normal(size=(n, d)) + rng.normal(size=(k, d))[y]) @ mixing + 2), y


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_leace_leaves_no_covariance_with_the_labels_is_idempotent_and_has_their_rank(seed, k):
    x, y = labelled(seed, k=k)
    eraser = Leace().fit(x, y)
    erased = eraser.transform(x)
    means = torch.stack([erased[torch.as_tensor(y == c)].mean(0) for c in range(k)])
    assert float((means - erased.mean(0)).abs().max()) < 1e-8
    torch.testing.assert_close(eraser.transform(erased), erased, atol=1e-8, rtol=0)
    torch.testing.assert_close(erased.mean(0), x.mean(0))
    assert eraser.rank == k - 1


def test_leace_is_the_formula_written_out():
    x, y = labelled()
    z = torch.nn.functional.one_hot(torch.tensor(y)).double()
    mean = x.mean(0)
    sigma = torch.cov(x.T, correction=0)
    cross = (x - mean).T @ (z - z.mean(0)) / len(x)
    values, axes = torch.linalg.eigh(sigma)
    w = axes @ torch.diag(values**-0.5) @ axes.T
    u = torch.linalg.svd(w @ cross)[0][:, :2]
    p = torch.eye(8) - torch.linalg.pinv(w) @ u @ u.T @ w
    torch.testing.assert_close(Leace().fit(x, y).transform(x), mean + (x - mean) @ p.T, atol=1e-8, rtol=0)


def test_no_other_projection_that_erases_changes_less():
    x, y = labelled()
    moved = float((Leace().fit(x, y).transform(x) - x).square().sum())
    centred = x - x.mean(0)
    means = torch.stack([centred[torch.as_tensor(y == c)].mean(0) for c in range(3)])
    rows = torch.linalg.svd(means, full_matrices=False)[2][:2]  # the orthogonal projection along the class means
    assert moved < float((centred @ rows.T).square().sum())


def test_collinear_features_are_erased_too():
    x, y = labelled()
    wide = torch.cat([x, x[:, :3] * 2, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    erased = Leace().fit(wide, y).transform(wide)
    means = torch.stack([erased[torch.as_tensor(y == c)].mean(0) for c in range(3)])
    assert float((means - erased.mean(0)).abs().max()) < 1e-7


def test_probes_fall_to_chance_after_leace_and_inlp_but_not_after_a_random_subspace():
    features, examples = drawn(texts=120)
    x, labels, held = features.of(examples, 2), examples.labels, examples.texts % 4 == 0
    score = {}
    for name, eraser in {"leace": Leace(), "inlp": Inlp(), "random": RandomSubspace(2, seed=1)}.items():
        kept = eraser.fit(x[~held], labels[~held]).transform(x)
        score[name] = LogisticProbe().fit(kept[~held], labels[~held]).score(kept[held], labels[held])
    before = LogisticProbe().fit(x[~held], labels[~held]).score(x[held], labels[held])
    assert score["leace"] < 0.45 and score["inlp"] < 0.45
    assert score["random"] > 0.8 * before > 0.7


def test_an_eraser_as_an_edit_does_to_the_run_what_it_does_to_its_features():
    model = tiny()
    examples = Examples(Spans.words(["the city of Rome", "he went home", "a drink"]), list("abcabcabc"))
    site = "layers.0.resid_post"
    x = read(model, examples, sites=site, pool="last").of(examples, 0)
    eraser = Leace().fit(x, examples.labels)
    run = model.run(["the city of Rome", "he went home"], keep=[site], edits=[eraser.edit(site)])
    plain = model.run(["the city of Rome", "he went home"], keep=[site])
    expected = eraser.transform(plain.tensor(site).flatten(0, 1)).view_as(plain.tensor(site))
    real = run.inputs.stream("").mask.bool()
    torch.testing.assert_close(run.tensor(site)[real], expected[real], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="width 16"):
        model.run("he", edits=[eraser.edit("layers.0.mlp.neurons")])


def test_amnesic_probing_tells_a_direction_the_head_reads_from_one_it_does_not():
    """The model's head is made blind to all but two directions of the last residual, which carry label one; label two is
    carried by a direction that nothing reads. Each is erased; only the first changes what is said."""
    model = tiny()
    texts = [" ".join(np.random.default_rng(i).permutation(list("abcdefgh"))[:6]) for i in range(40)]
    spans = Spans.words(texts)
    site = "layers.1.resid_post"
    x = read(model, spans, sites=site, pool="last").values[0]
    with torch.no_grad():
        model.module.lm_head.weight[:, 2:] = 0
    effects = {}
    for name, column in (("read", 0), ("unread", 9)):
        labels = np.where(x[:, column] > x[:, column].median(), "high", "low")
        found = amnesic(model, Examples(spans, labels), site, draws=2)
        effects[name] = found
        assert float(found.probe.sel(eraser="leace")) < float(found["own_probe"]) - 0.1
    assert float(effects["read"].kl.sel(eraser="leace")) > 2 * float(effects["unread"].kl.sel(eraser="leace"))
    assert (effects["read"].low <= effects["read"].kl).all() and (effects["read"].kl <= effects["read"].high).all()


def test_amnesic_probing_asks_for_a_language_model(minilm):
    with pytest.raises(InputError, match="no causal language model"):
        amnesic(minilm, Examples(Spans.words(["a b"]), ["x", "y"]), "layers.0.resid_post")
