"""Every sweeping method goes on where it was interrupted, gives the same, and shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pellucid import Model, load
from pellucid.causal import (
    ablation,
    alignment_search,
    edge_ablation,
    mediation,
    patching,
    path_patching,
    tracing,
    window_curve,
)
from pellucid.engine import pausing
from pellucid.engine.sweep import Plan
from pellucid.metrics import logit_difference
from pellucid.results import Result
from pellucid.tasks import Prompts
from tests.causal.programs import TASK, both_alike
from tests.zoo import build, tokenizer

METRIC = logit_difference(7, 9)
CLEAN, CORRUPTED = "The capital of France is", "The capital of Italy is"


@cache
def gpt2() -> Model:
    module = build("gpt2")
    return load(module, tokenizer=tokenizer(module))


def pairs() -> Prompts:
    return Prompts.from_pairs([CLEAN], [CORRUPTED], [" Paris"], [" Rome"], gpt2().tokenizer)


METHODS: dict[str, Callable[..., Result]] = {
    "ablation": lambda **o: ablation(gpt2(), CLEAN, metric=METRIC, **o),
    "patching": lambda **o: patching(gpt2(), CLEAN, CORRUPTED, metric=METRIC, **o),
    "path patching": lambda **o: path_patching(
        gpt2(), CLEAN, CORRUPTED, over="layers.0.attn.heads.*", receivers="layers.1.mlp.out", metric=METRIC, **o
    ),
    "edge ablation": lambda **o: edge_ablation(
        gpt2(), CLEAN, over="layers.0.attn.heads.*", receivers="layers.1.mlp.out", how="zero", metric=METRIC, **o
    ),
    "mediation": lambda **o: mediation(gpt2(), pairs(), **o),
    "tracing": lambda **o: tracing(gpt2(), [CLEAN, CORRUPTED], 7, subject="The capital", draws=2, **o),
    "window curve": lambda **o: window_curve(gpt2(), [CLEAN, CORRUPTED], 7, subject="The capital", draws=2, **o),
    "alignment search": lambda **o: alignment_search(both_alike(), TASK, "same", pairs=20, **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_method_goes_on_from_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    whole = method()
    execute, chunks = Plan._execute, Plan.chunks
    left = [3]

    def one_by_one(self: Plan, variants: Any) -> Any:
        return ([v] for chunk in chunks(self, variants) for v in chunk)

    def interrupted(self: Plan, chunk: list[Any]) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return execute(self, chunk)

    monkeypatch.setattr(Plan, "chunks", one_by_one)
    monkeypatch.setattr(Plan, "_execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method(checkpoint=tmp_path / "kept")
    assert list(tmp_path.iterdir())
    left[0] = 10_000
    assert method(checkpoint=tmp_path / "kept").allclose(whole, atol=1e-5)
    resumed = 10_000 - left[0]
    left[0] = 10_000
    method()
    assert 10_000 - left[0] == resumed + 3  # what was done is not done again


@pytest.mark.parametrize("name", METHODS)
def test_progress_is_shown_on_a_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(pausing, "DELAY", 0.0)
    METHODS[name]()
    assert "runs: " in capsys.readouterr().err
