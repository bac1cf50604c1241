"""The printed program of every causal and circuit technique gives its result again."""

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
BOTH: dict[str, Any] = {"metric": METRIC, "how": "zero"}


@cache
def model() -> pl.Model:
    module = build("gpt2", layers=2)
    return pl.load(module, tokenizer=tokenizer(module))


def pairs() -> Prompts:
    return Prompts.from_pairs(CLEAN, CORRUPTED, [" he"] * 4, [" Mary"] * 4, model().tokenizer)


def scores(**options: Any) -> circuits.EdgeScores:
    return circuits.edge_attribution(model(), CLEAN, METRIC, how="resample", reference=CORRUPTED, **options)


SUBJECT: dict[str, Any] = {"subject": "capital", "draws": 2}
PATHS: dict[str, Any] = {"over": "layers.0.attn.heads.*", "receivers": "layers.1.mlp.out"}
CALLS: dict[str, Callable[[], Any]] = {
    "ablation": lambda: causal.ablation(model(), CLEAN, how="mean", metric=METRIC),
    "patching": lambda: causal.patching(model(), CLEAN, CORRUPTED, metric={"d": METRIC, "l": pl.metrics.logit(7)},
                                        over={"a": "layers.*.attn.out"}),
    "path patching": lambda: causal.path_patching(model(), CLEAN, CORRUPTED, metric=METRIC, **PATHS),
    "edge ablation": lambda: causal.edge_ablation(model(), CLEAN, **PATHS, **BOTH),
    "attribution patching": lambda: causal.attribution_patching(model(), CLEAN, CORRUPTED, metric=METRIC, check=2),
    "mediation": lambda: causal.mediation(model(), pairs()),
    "interaction": lambda: causal.interaction(model(), pairs(), k=2, draws=1),
    "concentration": lambda: causal.concentration(causal.mediation(model(), pairs())),
    "mitigation": lambda: causal.mitigation(model(), pairs(), CLEAN, sizes=(1,), draws=1),
    "tracing": lambda: causal.tracing(model(), CLEAN[0], **SUBJECT),
    "window curve": lambda: causal.window_curve(model(), CLEAN[0], 7, windows=(1, 2), **SUBJECT),
    "counterfactual": lambda: causal.counterfactual(model(), CLEAN[0], max_changes=1, positions="0:3"),
    "exact patching": lambda: circuits.exact_patching(model(), CLEAN, METRIC, how="mean", edges=["embed -> m0"]).result,
    "edge attribution": lambda: scores().result,
    "by parts": lambda: scores(split=circuits.Split("parts")).result,
    "tested": lambda: scores().tested(),
    "judge": lambda: circuits.judge(model(), scores().circuit(20), CLEAN, METRIC, how="zero", draws=1, greedy=1),
    "hypothesis": lambda: circuits.test(model(), ["0.1"], CLEAN, METRIC, how="zero", draws=1, greedy=1),
    "curve": lambda: circuits.faithfulness_curve(model(), scores(), CLEAN, METRIC, how="zero", sizes=(0.1, 1.0)),
    "stability": lambda: circuits.stability(scores(), 10, draws=5),
    "roles": lambda: circuits.head_roles(model(), length=4),
}  # fmt: skip


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
