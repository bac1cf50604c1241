"""Description length, in bits: a slow prequential code, ends that are known, and labels that cannot be compressed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pellucid.errors import InputError
from pellucid.probing import online_code, variational_code
from tests.probing.trees import drawn


def test_the_online_code_is_the_uniform_block_and_the_losses_of_probes_of_all_before_in_bits():
    features, examples = drawn(texts=40)
    fractions, n, k = (0.1, 0.4, 1.0), len(examples), 3
    found = online_code(features, examples, fractions=fractions, l2=(5.0,), seeds=1, seed=7)
    order = np.random.default_rng(7).permutation(n)
    x = features.of(examples, 2).numpy().astype(float)
    x = ((x - x.mean(0)) / np.sqrt(np.sort(x.var(0))[(x.shape[1] - 1) // 2]))[order]
    x = np.concatenate([x, np.ones((n, 1))], 1)  # the intercept has the same prior as every weight
    y = examples.targets[order]
    bits = round(0.1 * n) * math.log2(k)
    for start, stop in ((round(0.1 * n), round(0.4 * n)), (round(0.4 * n), n)):
        fit = LogisticRegression(C=1 / 5.0, fit_intercept=False, tol=1e-9, max_iter=5000).fit(x[:start], y[:start])
        bits += -fit.predict_log_proba(x[start:stop])[np.arange(stop - start), y[start:stop]].sum() / math.log(2)
    assert float(found.bits[2]) == pytest.approx(bits, rel=2e-3)
    assert float(found["uniform"]) == pytest.approx(n * math.log2(3))
    assert found.curve.values[2, 0] == pytest.approx(math.log2(3))


def test_both_codes_compress_what_is_there_and_not_what_is_not():
    features, examples = drawn(texts=120)
    online = online_code(features, examples, seeds=2)
    variational = variational_code(features, examples, steps=400)
    for code in (online, variational):
        nothing, there, strongly = code.compression.values
        assert nothing < 1.02
        assert 1.3 < there < strongly
        assert (code.control_compression.values < 1.05).all()
    assert (online.low.values <= online.bits.values).all() and (online.bits.values <= online.high.values).all()
    np.testing.assert_allclose(variational.bits, variational.data_bits + variational.model_bits)


def test_fractions_that_make_no_blocks_are_refused():
    features, examples = drawn(texts=10)
    with pytest.raises(InputError, match="no blocks"):
        online_code(features, examples, fractions=(1.0,))
