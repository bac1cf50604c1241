"""All that read along a direction are one class, and its control is standardised as it is."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
W = torch.randn(8, generator=torch.Generator().manual_seed(1))


def test_one_class_under_three_names() -> None:
    one = pl.probing.Direction("layers.0.resid_post", W, 0.5)
    assert pl.safety.Direction is pl.tuning.Direction is pl.probing.Direction
    assert torch.allclose(one(X), X @ W + 0.5, atol=1e-5)
    vector = pl.safety.Vector(one.site, W, 2.0)
    assert isinstance(vector, pl.probing.Direction) and torch.allclose(vector(X), X @ W / W.norm(), atol=1e-5)
    assert isinstance(vector.random(), pl.safety.Vector) and vector.random().unit == 2.0
    with pytest.raises(InputError, match=r"\[8\] numbers cannot read 3"):
        vector(X[:, :3])


def test_the_random_one_has_mean_0_and_deviation_1_where_the_reader_has() -> None:
    one = pl.probing.Direction.standardised("layers.0.resid_post", W, X)
    z = X @ W
    for made, wanted in ((one, (z - z.mean()) / z.std()), (one.random(3), None)):
        said = made(X)
        assert abs(float(said.mean())) < 1e-5 and float(said.std()) == pytest.approx(1, abs=1e-5)
        assert wanted is None or torch.allclose(said, wanted, atol=1e-5)
    assert not torch.equal(one.random(3).vector, one.random(4).vector)
    plain = pl.probing.Direction(one.site, W, 0.5).random()
    assert float(plain.vector.norm()) == pytest.approx(float(W.norm()), rel=1e-5) and plain.offset == 0.5
