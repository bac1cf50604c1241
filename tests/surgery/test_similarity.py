"""Similarities are their slow formulas, do not see a rotation, and say what unrelated rows give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import pellucid as pl
from pellucid.errors import InputError
from pellucid.surgery import similarity
from pellucid.surgery.similarity import MEASURES, _measures, _Seen, cka, unbiased_cka
from tests.surgery.test_arranging import opened
from tests.surgery.test_stitch import TEXTS, llama, rotated
from tests.zoo import tokenizer


def by_grams(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    n = len(x)
    k, m = x @ x.T, y @ y.T

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        if not unbiased:
            h = np.eye(n) - 1 / n
            return float(np.trace(a @ h @ b @ h))
        a, b = (g - np.diag(np.diag(g)) for g in (a, b))
        one = np.ones(n)
        return float(
            np.trace(a @ b)
            + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ a @ b @ one)
        )

    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_is_its_formula_over_gram_matrices_and_the_unbiased_one_is_zero_for_nothing() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 9))
    y[:, :3] += x[:, :3]
    X, Y = torch.tensor(x), torch.tensor(y)
    assert cka(X, Y) == pytest.approx(by_grams(x, y, False)) and unbiased_cka(X, Y) == pytest.approx(
        by_grams(x, y, True)
    )
    found = [unbiased_cka(*(torch.tensor(rng.normal(size=(30, 20))) for _ in range(2))) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)


def test_canonical_correlations_and_neighbours_are_slow_ones() -> None:
    from sklearn.cross_decomposition import CCA

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 3)), rng.normal(size=(60, 4))
    y[:, 0] += 2 * x[:, 1]
    found = dict(zip(MEASURES, _measures(_Seen(torch.tensor(x), 5, 1.0), _Seen(torch.tensor(y), 5, 1.0)), strict=True))
    u, v = CCA(3, max_iter=5000, tol=1e-12).fit_transform(x, y)
    rho = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(u.T, v.T, strict=True)])
    assert found["svcca"] == pytest.approx(rho.mean(), abs=1e-4)
    unit = u / np.linalg.norm(u, axis=0)
    weight = np.abs(unit.T @ (x - x.mean(0))).sum(1)
    assert found["pwcca"] == pytest.approx((weight * rho).sum() / weight.sum(), abs=1e-3)
    near = []
    for each in (x, y):
        e = each / np.linalg.norm(each, axis=1, keepdims=True)
        s = e @ e.T - 9 * np.eye(60)
        near.append([set(np.argsort(-row)[:5]) for row in s])
    assert found["neighbours"] == pytest.approx(np.mean([len(a & b) / 5 for a, b in zip(*near, strict=True)]))


def test_a_rotated_copy_is_identical_to_every_similarity() -> None:
    model = llama()
    turned, _ = rotated(model)
    found = similarity(model, turned, TEXTS, layers=[0, 2], other_layers=[0, 2], k=5)
    assert found.similarity.dims == ("measure", "layer", "other")
    for i in (0, 2):
        np.testing.assert_allclose(found.data.similarity.sel(layer=i, other=i), 1, atol=1e-3)
    assert (found.data.control.sel(measure="unbiased_cka") < 0.2).all() and int(found.data.rows) > 200
    few = similarity(model, model, TEXTS[:3], k=3)
    assert "svcca" in few.title and "unrelated" in few.title and "<" in few._repr_html_()


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "mixtral", "t5", "bert"])
def test_families_of_any_kind_are_compared(family: str) -> None:
    model = opened(family)
    found = similarity(model, opened("llama"), TEXTS[:4], layers=[0, 1], other_layers=[1], k=2, draws=1)
    assert np.isfinite(found.similarity.values).all() and found.data.sizes["layer"] == 2
    same = similarity(model, model, TEXTS[:2], layers=[1], other_layers=[1], k=2, draws=1)
    np.testing.assert_allclose(same.similarity, 1, atol=1e-6)


def test_too_little_text_is_an_error() -> None:
    model = opened("llama")
    with pytest.raises(InputError, match="neighbours"):
        similarity(model, model, ["the of is"], k=10)
    with pytest.raises(InputError, match="variance"):
        similarity(model, model, TEXTS, variance=0.0)


def test_layers_are_those_of_the_stack_that_reads_the_text() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_decoder_layers=1, num_heads=2,
                      decoder_start_token_id=0)  # fmt: skip
    model = pl.load(T5ForConditionalGeneration(config).eval(), tokenizer=tokenizer(None))
    found = similarity(model, model, TEXTS, layers=[-1], other_layers=[2], k=2, draws=1)
    assert found["layer"].values.tolist() == [2]
    assert found.similarity.sel(measure="cka").item() == pytest.approx(1)
