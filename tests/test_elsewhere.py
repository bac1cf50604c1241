"""Every public technique on a model that lives on another device gives what it gives at home; and how often it waits for it.

Vectors and positions of the user's own are on the host; results come back there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from tests import test_reproduced as known
from tests.elsewhere import COUNTS, DEVICE, moved, there
from tests.zoo import build, tokenizer

MADE = [
    f for f in vars(known).values() if hasattr(f, "cache_clear") and f is not known.opened
]  # fitted once, with the model


@cache
def abroad(family: str, layers: int = 2) -> pl.Model:
    module = build(family, layers=layers)
    return pl.load(moved(module), tokenizer=tokenizer(module))


@pytest.mark.parametrize("name", known.CALLS)
def test_a_technique_gives_elsewhere_what_it_gives_at_home(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pl.quiet():
        home = known.CALLS[name]()
        for fitted in MADE:
            fitted.cache_clear()
        monkeypatch.setattr(known, "opened", abroad)
        try:
            with there():
                far = known.CALLS[name]()
        finally:
            for fitted in MADE:
                fitted.cache_clear()
    there_, here = (getattr(x, "result", x).data for x in (far, home))
    for variable in getattr(here, "data_vars", {"": here}):
        if (name, variable) == ("tuning.frontier", "cost"):  # CPU time
            continue
        a, b = (np.asarray(x[variable] if variable else x) for x in (there_, here))
        if b.dtype.kind == "f":
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=variable)
        else:
            np.testing.assert_array_equal(a, b, err_msg=variable)


EDITS: dict[str, Any] = {
    "a vector": lambda i, run: pl.Steer("layers.1.resid_pre", torch.randn(32), float(i)),
    "a vector at a place": lambda i, run: pl.Steer(f"layers.1.resid_pre@{i % 4}", torch.randn(32), float(i)),
    "a mean": lambda i, run: pl.Ablate(f"layers.{i % 2}.mlp.out", "mean"),
    "a mean over prompts": lambda i, run: pl.Ablate(f"layers.{i % 2}.mlp.out", "position_mean"),
    "another prompt": lambda i, run: pl.Ablate(f"layers.{i % 2}.attn.heads.1.z@{i % 4}", "resample", seed=i),
    "another run": lambda i, run: pl.Patch(f"layers.{i % 2}.mlp.out@{i % 3}", run),
    "another run's pattern": lambda i, run: pl.Patch(f"layers.{i % 2}.attn.heads.1.pattern", run),
}


@pytest.mark.parametrize(
    "prompts", [["The capital of France is"] * 2, ["The capital of France is", "The city of Rome"]]
)
@pytest.mark.parametrize("name", EDITS)
def test_a_sweep_waits_as_often_for_many_variants_as_for_few(name: str, prompts: list[str]) -> None:
    def waits(variants: int) -> int:
        with there():
            model = abroad("llama")
            run = model.run(prompts, keep=["layers.*.mlp.out", "layers.*.attn.heads.1.pattern"])
            edits = [EDITS[name](i, run) for i in range(variants)]
            model.plan(prompts, edits, pl.metrics.logit(7)).run()  # the rungs are tried once
            COUNTS.clear()
            model.plan(prompts, edits, pl.metrics.logit(7)).run()
            return COUNTS["synchronisations"]

    assert waits(16) == waits(6)


def test_a_generated_token_waits_as_often_with_a_steering_vector_as_without() -> None:
    def per_token(**options: Any) -> float:
        counted = []
        for n in (4, 12):
            with there():
                model = abroad("llama")
                model.generate("The capital of France is", max_new_tokens=n, min_new_tokens=n, **options)
                COUNTS.clear()
                model.generate("The capital of France is", max_new_tokens=n, min_new_tokens=n, **options)
                counted.append(COUNTS["synchronisations"])
        return (counted[1] - counted[0]) / 8

    steered = per_token(edits=[pl.Steer("layers.1.resid_pre", torch.ones(32))])
    assert steered == per_token()


def test_a_runs_values_are_away_and_its_labels_at_home() -> None:
    with there():
        run = abroad("llama").run("The capital of France is", keep="layers.0.resid_post")
        assert run.tensor("layers.0.resid_post").device == DEVICE == run.logits.device
        assert run["layers.0.resid_post"].values.shape[0] == 1
        with pytest.raises(RuntimeError, match="same device"):
            run.logits + torch.ones(3, run.logits.shape[1], 1)
