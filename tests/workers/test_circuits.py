"""Circuits on workers: the numbers that are found here; and attributions of many prompts in portions."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import circuits
from pellucid.errors import Refused
from tests.workers.lanes import pool

eap: Any = importlib.import_module("pellucid.circuits.edge_attribution")  # the function has its name
CLEAN, OTHER = torch.randint(97, (2, 4, 7), generator=torch.Generator().manual_seed(3)).unbind()
METRIC = pl.metrics.logit_difference([3, 5, 7, 9], [4, 6, 8, 10])
ASK: dict[str, Any] = {"how": "resample", "reference": OTHER}


def test_edges_are_patched_on_workers_as_here(model: pl.Model) -> None:
    edges = ["embed -> layers.1.attn.heads.2.q", "layers.0.mlp -> logits", "layers.0.attn.heads.1 -> layers.2.mlp", "layers.1.mlp -> logits"]  # fmt: skip
    here, there = (
        _at(on, lambda: circuits.exact_patching(model, CLEAN, METRIC, edges=edges, **ASK)) for on in (None, pool())
    )
    assert torch.equal(here.each, there.each)
    assert bool(here.each.any())
    own = lambda z: z[:, -1].logsumexp(-1)  # noqa: E731 (the metric stays here, so it may be a function)
    here, there = (
        _at(on, lambda: circuits.exact_patching(model, CLEAN, own, edges=edges[:2], **ASK)) for on in (None, pool())
    )
    assert torch.equal(here.each, there.each)


@pytest.mark.parametrize("how", ["resample", "position_mean", "zero"])
def test_edges_are_attributed_in_portions_here_and_on_workers(
    model: pl.Model, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(on: Any = None, metric: Any = METRIC) -> Any:
        return _at(on, lambda: circuits.edge_attribution(model, CLEAN, metric, how=how, reference=OTHER))

    whole = scores()
    monkeypatch.setattr(eap, "_portions", lambda *_: [[0, 1, 2], [3]])
    parts, there = scores(), scores(pool())
    torch.testing.assert_close(parts.each, whole.each, atol=1e-5, rtol=1e-5)
    assert torch.equal(parts.each, there.each)
    with pytest.raises(Refused, match="takes its gradient|take its gradient"):
        scores(pool(), lambda z: z[:, -1].logsumexp(-1))


def test_portions_bound_what_is_held_and_a_metric_of_ones_own_sees_all_prompts(
    model: pl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    native = eap._portions
    monkeypatch.setattr(eap, "_portions", lambda *given: seen.append(native(*given)) or seen[-1])
    monkeypatch.setattr(eap, "MEMORY", 3 * 2 * 4 * 17 * 7 * 32)  # 1 + 3 * (4 + 1) sources and some
    circuits.edge_attribution(model, CLEAN, METRIC, **ASK)
    circuits.edge_attribution(model, CLEAN, lambda z: z[:, -1, 0] - z[:, -1, 1].mean(), **ASK)
    assert seen == [[[0, 1, 2], [3]], [[0, 1, 2, 3]]]


def test_a_verdict_is_the_same_on_workers(model: pl.Model) -> None:
    scores = circuits.edge_attribution(model, CLEAN, METRIC, **ASK)
    curves = [
        _at(on, lambda: circuits.faithfulness_curve(model, scores, CLEAN, METRIC, sizes=(0.1, 0.5), **ASK)).data
        for on in (None, pool())
    ]
    for name in ("signed", "sized", "random"):
        assert np.array_equal(curves[0][name].values, curves[1][name].values)


def _at(on: Any, call: Any) -> Any:
    with pl.on(on):
        return call()
