"""The views of monitors, steering and beliefs hold the numbers of their results, the chosen point among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import pellucid as pl
from pellucid import safety as sf
from pellucid.results import Result
from pellucid.safety.calibrating import judged
from pellucid.safety.thresholds import threshold
from pellucid.views import document
from pellucid.views import schema as s
from tests.engine.hand import PROMPTS, opened


def shown(result: Result, kind: type) -> s.Document:
    made = document(result)
    assert isinstance(made.data, kind)
    assert s.Document.read(made.json()).title == made.title
    made._repr_html_()
    return made


def test_several_prompts_fire_in_a_grid_of_what_is_above_the_threshold() -> None:
    model = opened("llama")
    read = sf.Direction(
        "layers.1.resid_post",
        torch.randn(model.anatomy.stacks[-1].d_model, generator=torch.Generator().manual_seed(4)),
    )
    quiet = model.generate(PROMPTS, max_new_tokens=4, monitors=sf.Monitor(read))
    tau = float(np.nanmedian(quiet.firings.statistic.values))
    made = model.generate(
        PROMPTS, max_new_tokens=4, monitors=[sf.Monitor(read, threshold=tau), sf.Monitor(read, name="b")]
    )
    found = shown(made.firings, s.Grid)
    grid = found.data
    assert isinstance(grid, s.Grid) and found.lead == ""
    assert [p.name for p in grid.planes] == ["monitor", "b"] and len(grid.rows.labels) == len(PROMPTS)
    mine = made.firings.statistic.values
    assert np.allclose(grid.planes[0].values.array(), mine[:, 0] - tau, equal_nan=True, atol=1e-5)
    assert np.allclose(grid.planes[1].values.array(), mine[:, 1], equal_nan=True, atol=1e-5)
    told = {f.name: f.value for f in grid.facts}
    assert told["b"] == "no alarm" and "recorded" in told["monitor"]
    shown(made.firings.sel(prompt=0), s.Curves)


def test_an_evaluation_is_its_roc_curve_with_the_point_the_threshold_chose() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([False, True], 60)
    scores = rng.normal(size=120) + 1.5 * truth
    tau = threshold(rng.normal(size=99), 0.05)
    monitor = sf.Monitor(sf.Direction("layers.0.resid_post", torch.ones(4)), threshold=tau)
    sources = ["plain", "shouted"] * 60
    found = judged(monitor, scores, truth, sources, 0, "m")
    curves = shown(found, s.Curves).data
    assert isinstance(curves, s.Curves)
    roc = pl.probing.roc(scores, truth)
    assert np.allclose(curves.lines[0].x.array(), roc.false_positive.values)
    assert np.allclose(curves.lines[0].y.array(), roc.true_positive.values)
    point = curves.lines[1]
    assert np.allclose([point.x.array()[0], point.y.array()[0]], [(scores[~truth] > tau.value).mean(), (scores[truth] > tau.value).mean()])  # fmt: skip
    assert [line.name.split(":")[0].split(", ")[-1] for line in curves.lines[2:-1]] == ["plain", "shouted"]
    assert curves.lines[-1].name == "chance"
    alone = judged(monitor, scores[~truth], truth[~truth], sources[:60], 0, "m")  # no curve where nothing should fire
    assert [line.name for line in shown(alone, s.Curves).data.lines] == ["chance"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("chosen", [True, False])
def test_a_sweep_is_effect_against_price_with_the_chosen_cell(chosen: bool) -> None:
    dims = ("site", "strength", "direction")
    shape = (2, 2, 3)
    effect = np.arange(12.0).reshape(shape)
    data = xr.Dataset(
        {"effect": (dims, effect), "perplexity": (dims, 2 + effect), "base_perplexity": 2.0},
        {"site": ["layers.1.resid_post", "layers.2.resid_post"], "strength": [0.1, 0.2], "direction": ["vector", "-vector", "random 1"]},
        {"judge": "sentiment"},
    )  # fmt: skip
    if chosen:
        test = {f"test_{n}": ("direction", np.array([1.0, 2.0, 3.0])) for n in ("effect", "low", "high")}
        data = data.assign(chosen_site="layers.1.resid_post", chosen_strength=0.2, chosen_direction="-vector", **test)
    curves = shown(Result(data, kind="strengths", title="t"), s.Curves).data
    assert isinstance(curves, s.Curves) and curves.y.name == "effect on sentiment"
    first = curves.lines[0]
    site = 0 if chosen else 1
    assert first.name == f"vector at layers.{site + 1}.resid_post"
    assert np.allclose(first.y.array(), [0, *effect[site, :, 0]])
    assert np.allclose(first.x.array(), [1, *(1 + effect[site, :, 0] / 2)])
    assert [line.name for line in curves.lines if line.dashed] == [f"random 1 at layers.{site + 1}.resid_post"]
    last = curves.lines[-1]
    assert last.name.startswith("chosen") == chosen
    if chosen:
        assert (float(last.x.array()[0]), float(last.y.array()[0])) == (1 + effect[0, 1, 1] / 2, effect[0, 1, 1])


def test_beliefs_stand_against_answers_under_each_pressure() -> None:
    rows = {k: ("pressure", np.array(v)) for k, v in {"says": [1.0, 0.3], "believes": [0.9, 0.2]}.items()}
    ends = {
        f"{k}_{e}": ("pressure", rows[k][1] + d)
        for k in ("says", "believes")
        for e, d in (("low", -0.1), ("high", 0.1))
    }
    data = xr.Dataset(rows | ends, {"pressure": ["plain", "claim"]})
    curves = shown(Result(data, kind="honesty", title="t"), s.Curves).data
    assert isinstance(curves, s.Curves) and curves.x.labels == ("plain", "claim")
    assert [line.y.array().tolist() for line in curves.lines] == [pytest.approx([1.0, 0.3]), pytest.approx([0.9, 0.2])]


def test_a_selective_curve_is_drawn_beside_the_one_of_a_score_that_knows() -> None:
    model = opened("llama")
    prompts = [p for p in PROMPTS for _ in range(4)]
    own = [int(model.run(p).logits[0, -1].argmax()) for p in prompts]
    target = [i if n % 2 else (i + 1) % 30 for n, i in enumerate(own)]
    found = sf.abstain(model, prompts, target, score=np.linspace(0, 1, len(prompts)), risk=0.5)
    curves = shown(found, s.Curves).data
    assert isinstance(curves, s.Curves) and {"risk", "optimal_risk", "random_risk"} <= {
        line.name for line in curves.lines
    }
