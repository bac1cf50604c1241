"""Printed programs of causal techniques and circuits that tests/test_reproduced.py does not try."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pellucid as pl
from pellucid import causal, circuits
from pellucid.circuits import Circuit
from pellucid.results import Result
from pellucid.tasks import Prompts
from tests.causal.programs import PROGRAM, TASK, both_alike
from tests.test_technique import again
from tests.zoo import build, tokenizer

CLEAN = ["The capital of France is", "The city of Italy is", "The store of Rome is", "Mary went to Italy and"]
CORRUPTED = ["The capital of Italy is", "The city of France is", "The store of Paris is", "John went to Italy and"]
METRIC = pl.metrics.logit_difference(" Paris", " Rome")


@cache
def model() -> pl.Model:
    module = build("gpt2", layers=2)
    return pl.load(module, tokenizer=tokenizer(module))


def pairs() -> Prompts:
    return Prompts.from_pairs(CLEAN, CORRUPTED, [" he"] * 4, [" Mary"] * 4, model().tokenizer)


def scores(**options: Any) -> circuits.EdgeScores:
    return circuits.edge_attribution(model(), CLEAN, METRIC, how="resample", reference=CORRUPTED, **options)


CALLS: dict[str, Callable[[], Any]] = {
    "sets and several metrics": lambda: causal.patching(
        model(), CLEAN, CORRUPTED, metric={"d": METRIC, "l": pl.metrics.logit(7)}, over={"a": "layers.*.attn.out"}
    ),
    "mitigation": lambda: causal.mitigation(model(), pairs(), CLEAN, sizes=(1,), draws=1),
    "by parts": lambda: scores(split=circuits.Split("parts")).result,
    "hypothesis": lambda: circuits.test(model(), ["0.1"], CLEAN, METRIC, how="zero", draws=1, greedy=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_results_program_gives_it_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CALLS[name]()
    assert not result.provenance.free.keys() - {"module", "tokenizer"}
    found = again(result, tmp_path, monkeypatch, module=model().module, tokenizer=model().tokenizer)
    assert found.allclose(result, atol=1e-6)
    assert found.provenance.call == result.provenance.call


def test_circuits_and_masks_know_how_they_were_found() -> None:
    names = {"pl": pl, "model": model()}
    cut = circuits.acdc(model(), CLEAN, METRIC, threshold=0.05, how="zero")
    pruned = circuits.Pruning(steps=3).fit(model(), CLEAN, METRIC, how="zero").circuit_
    for circuit in (cut, pruned, scores().circuit(fraction=0.1), scores().above(0.01)):
        found = eval(circuit.provenance.call, dict(names))
        assert isinstance(found, Circuit)
        assert found.on.equal(circuit.on)


def test_programs_of_the_user_are_names_in_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = both_alike()
    names = {name: function for name, (_, function) in PROGRAM.variables.items()} | {"decode": TASK.decode}
    search = causal.DistributedAlignment(TASK, "same", "layers.0.resid_post@-1", pairs=20, epochs=1, placebos=False)
    results: list[Result] = [
        causal.interchange(known, TASK, {"same": "layers.0.attn.heads.0@-1"}, pairs=20),
        causal.alignment_search(known, TASK, "same", over="layers.*.mlp.out@-1", pairs=20),
        search.fit(known).result_,
    ]
    for result in results:
        found = again(result, tmp_path, monkeypatch, module=known.module, tokenizer=known.tokenizer, **names)
        assert found.allclose(result, atol=1e-6)
