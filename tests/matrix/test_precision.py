"""Every public technique in bfloat16 and float16, by the calls of tests/test_reproduced.py: near what float32 gives, or refused by name.

Near: |half - float32| <= share |largest value| + step, the rounding of logits of about 1 that went through two blocks; what is divided
by a whole effect of a tenth or so has eight such steps. What counts decisions (ranks, order, which neuron, a p-value) may turn on one step:
it must be there, and a number wherever float32 has one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import PellucidError
from pellucid.results import Result
from tests import test_reproduced as known
from tests.test_elsewhere import MADE
from tests.test_fuzz import ugly
from tests.tuning import test_fit
from tests.zoo import build, tokenizer

pytestmark = pytest.mark.matrix
NEAR = {torch.bfloat16: (0.05, 0.02), torch.float16: (0.01, 0.006)}  # (share, step)
REFUSED = {(torch.bfloat16, "attribution.deeplift"): "rounding to bfloat16"}
DIVIDED = re.compile(r"share|signed|sized|random|needed|normalised|control$")
DECIDED = re.compile(r"p$|rank|agreement|concordance|spearman|cost$")
COUNTED = {  # what of them is an order, a choice or a count; None stands for all
    "attention.head_relations": r"uas",
    "attention.attention_correlation": None,
    "attribution.evaluation.faithfulness": r"value",  # with a rank correlation
    "surgery.ensemble": r"taken",
    "surgery.similarity": None,  # shared nearest neighbours
    "causal.attribution_patching": r"exact|estimated|missed",  # of the sites that it ranks first
    "causal.concentration": None,
    "circuits.judge": r"low|high|control",
    "lenses.FutureLens.score": r"precision|low|high",
    "neurons.knowledge_effect": r"effect",  # the most active neurons
    "neurons.knowledge_neurons": None,
    "neurons.neuron_selectivity": None,
    "neurons.neuron_page": r"count",  # of a histogram
    "neurons.unit_clusters": None,
    "neurons.dictionaries.dictionary_quality": r"recovered|low|high",  # divided by a loss of nearly 0
}


def in_dtype(module: Any, dtype: torch.dtype, words: Any) -> pl.Model:
    twin = type(module)(module.config)
    twin.load_state_dict(module.state_dict())
    return pl.load(twin.eval().to(dtype), tokenizer=words)


@cache
def half(dtype: torch.dtype, family: str, layers: int = 2) -> pl.Model:
    return in_dtype(build(family, layers=layers), dtype, tokenizer(build(family)))


@cache
def half_fitted(dtype: torch.dtype, name: str) -> pl.Model:
    return in_dtype(TRAINED(name).module, dtype, TRAINED(name).tokenizer)


TRAINED = test_fit.opened


@cache
def at_home(name: str) -> Result:
    made = known.CALLS[name]()
    return getattr(made, "result", made)


@pytest.fixture(params=NEAR, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    for fitted in MADE:
        fitted.cache_clear()


def unlike(half: Any, exact: Any, share: float, step: float, decided: bool) -> str | None:
    """What is wrong with an array beside the one of float32."""
    a, b = np.asarray(half), np.asarray(exact)
    if b.dtype.kind != "f":
        return None if a.dtype.kind == b.dtype.kind else f"{a.dtype} is not {b.dtype}"
    if decided:  # another neuron or cluster may be found
        return "no number" if np.isnan(a).mean() > np.isnan(b).mean() else None
    if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
        return f"{a.shape} {np.isfinite(a).sum()} numbers, {b.shape} {np.isfinite(b).sum()} in float32"
    there = np.isfinite(b)
    if not there.any():
        return None
    off, allowed = np.abs(a[there] - b[there]).max(), share * np.abs(b[there]).max() + step
    return None if off <= allowed else f"off by {off:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("name", known.CALLS)
def test_a_technique_gives_in_half_precision_what_it_gives_in_float32(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pl.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = at_home(name).data
        for fitted in MADE:
            fitted.cache_clear()
        monkeypatch.setattr(known, "opened", lambda *given: half(dtype, *given))
        monkeypatch.setattr(test_fit, "opened", lambda *given: half_fitted(dtype, *given))
        words = REFUSED.get((dtype, name))
        try:
            made = known.CALLS[name]()
        except PellucidError as error:
            assert words is not None and words in str(error) and not ugly(str(error)), str(error)
            return
    assert words is None, f"not refused any more: {words}"
    found = getattr(made, "result", made).data
    wrong = {}
    for variable in getattr(exact, "data_vars", {"": exact}):
        a, b = (x[variable] if variable else x for x in (found, exact))
        share, step = NEAR[dtype]
        counted = DECIDED.match(variable) or (name in COUNTED and re.match(COUNTED[name] or "", variable))
        if fault := unlike(a, b, share, step * (8 if DIVIDED.match(variable) else 1), bool(counted)):
            wrong[variable] = fault
    assert not wrong, wrong
