"""Several results in one view: by name, on one scale, and only where they are about the same thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import pellucid as pl
from pellucid.changed import Replaced
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import schema as s
from pellucid.views.documents import document
from tests.zoo import build as tiny
from tests.zoo import tokenizer

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llama() -> pl.Model:
    module = tiny("llama")
    return pl.load(module, tokenizer=tokenizer(module))


def words(values: list[float], texts: list[str]) -> Result:
    data = xr.DataArray(values, {"position": range(3), "token": ("position", texts)}, dims="position", name="a")
    return Result(data, kind="k")


def test_methods_on_one_prompt_stand_side_by_side_with_their_agreement() -> None:
    shown = pl.views.compare({"one": words([1, 2, 3], ["a", "b", "c"]), "two": words([3, 2, 1], ["a", "b", "c"])})
    assert isinstance(shown.data, s.Tokens) and shown.data.comparison[0].value == "-1.00"
    assert "data-pellucid" in shown._repr_html_()
    with pytest.raises(InputError, match="other tokens"):
        pl.views.compare({"one": words([1, 2, 3], ["a", "b", "c"]), "two": words([1, 2, 3], ["a", "b", "d"])})


def test_one_method_before_and_after_a_change_has_one_scale_and_attention_is_shown_by_choice(llama: pl.Model) -> None:
    with torch.no_grad():
        other = llama.changed(Replaced("model.layers.1.mlp.down_proj.weight", torch.zeros(32, 48)))
    models = {"before": llama, "after": other}
    own = {name: pl.attribution.occlusion(m, PROMPT) for name, m in models.items()}
    shown = pl.views.compare(own).data
    largest = max(float(np.abs(r.data["attribution"]).max()) for r in own.values())
    assert isinstance(shown, s.Tokens) and shown.full == pytest.approx(largest)
    several = {"occlusion": own["before"], "gradients": pl.attribution.saliency(llama, PROMPT)}
    assert pl.views.compare(several).data.full is None  # other methods have other units
    looks = pl.views.compare({name: pl.attention.patterns(m, PROMPT) for name, m in models.items()}).data
    assert isinstance(looks, s.Attention) and [each.name for each in looks.stacks] == ["before", "after"]
    with pytest.raises(InputError, match="other tokens"):
        pl.views.compare({"a": pl.attention.patterns(llama, PROMPT), "b": pl.attention.patterns(llama, "When Mary")})


def test_a_frontier_is_a_line_over_the_weights_with_the_others_as_points() -> None:
    numbers = {"accuracy": [1, 0.9, 0.8, 0.5], "low": [1, 0.8, 0.7, 0.4], "high": [1, 1, 0.9, 0.6], "swap_effect": [9, 3, 1, 0],
               "cost": [1, 2, 2, 2], "weight": [0, 1, 10, 10], "untrained": [False, False, False, True]}  # fmt: skip
    points = {"point": ["plain", "weight 1", "weight 10", "control"]}
    data = xr.Dataset({k: ("point", np.asarray(v)) for k, v in numbers.items()}, points)
    shown = document(Result(data, kind="frontier", title="t")).data
    assert isinstance(shown, s.Curves) and [line.name for line in shown.lines] == ["plain", "weights 1, 10"]
    assert (
        shown.lines[1].x.array().tolist() == [3, 1] and shown.lines[1].low is not None and shown.x.name == "swap effect"
    )


def test_logit_and_tuned_lens_share_a_grid_each_with_its_own_numbers(llama: pl.Model) -> None:
    tuned = pl.lenses.TunedLens(share=1.0, tokens=200, context=16).fit(llama, [PROMPT] * 40)
    plain = pl.lenses.logit_lens(llama, PROMPT, top=3, targets=[" Paris"])
    other = pl.lenses.logit_lens(llama, PROMPT, top=3, targets=[" Paris"], through=tuned)
    shown = pl.views.compare({"logit": plain, "tuned": other})
    assert isinstance(shown.data, s.Lens)
    assert [r.name for r in shown.data.readings] == ["logit", "tuned"]
    for reading, result in zip(shown.data.readings, (plain, other), strict=True):
        np.testing.assert_allclose(reading.kl.array(), result["kl"].values, atol=1e-5)  # type: ignore[union-attr]
        np.testing.assert_allclose(reading.followed[0].rank.array(), result["target_rank"].values[..., 0])
    assert {f.name for f in shown.provenance.facts} == {"logit", "tuned"}
    with pytest.raises(InputError, match="other tokens"):
        pl.views.compare({"one": plain, "other": pl.lenses.logit_lens(llama, "When Mary went to the", top=3)})


def test_what_a_fit_leaves_behind_is_a_curve_of_its_training(llama: pl.Model) -> None:
    tuned = pl.lenses.TunedLens(share=1.0, tokens=200, context=16).fit(llama, [PROMPT] * 40)
    shown = document(tuned)
    assert isinstance(shown.data, s.Curves) and shown.data.x.name == "step"
    assert [line.name for line in shown.data.lines] == list(tuned.biases_)
    np.testing.assert_allclose(shown.data.lines[0].y.array(), [step[0] for step in tuned.losses_], rtol=1e-6)


def along(name: str, values: list[float]) -> Result:
    return Result(xr.DataArray(values, {"layer": range(len(values))}, ("layer",), name), kind="curve")


def test_curves_of_several_results_share_a_chart() -> None:
    shown = pl.views.compare({"a": along("accuracy", [0.1, 0.5, 0.9]), "b": along("accuracy", [0.2, 0.4, 0.6])})
    assert isinstance(shown.data, s.Curves) and [line.name for line in shown.data.lines] == ["a", "b"]
    with pytest.raises(InputError, match="other y axes"):
        pl.views.compare({"a": along("accuracy", [0.1, 0.5, 0.9]), "b": along("loss", [0.1, 0.5, 0.9])})


def test_a_chart_of_many_layers_shows_some_from_the_first_to_the_last() -> None:
    losses = xr.DataArray(np.ones((20, 31)), {"step": range(20), "layer": range(31)}, ("step", "layer"), "loss")
    shown = document(Result(losses, kind="training curve")).data
    assert isinstance(shown, s.Curves)
    assert [line.name for line in shown.lines] == [f"layer {i}" for i in (0, 5, 10, 15, 20, 25, 30)]


def test_deletion_curves_run_along_the_share_of_the_words() -> None:
    share = ("step", [0.0, 0.5, 1.0])
    curves = xr.DataArray([[1, 0.5, 0], [1, 0.9, 0]], {"technique": ["a", "b"], "share": share}, ("technique", "step"), "deletion")  # fmt: skip
    shown = document(curves).data
    assert isinstance(shown, s.Curves) and shown.x.name == "share"
    assert [line.name for line in shown.lines] == ["a", "b"]
    np.testing.assert_allclose(shown.lines[1].x.array(), [0, 0.5, 1])


def test_effects_over_the_same_parts_are_planes_of_one_grid(llama: pl.Model) -> None:
    metric = pl.metrics.logit_difference(" the", " of")
    ways = {how: pl.causal.ablation(llama, PROMPT, over="layers.*.attn.heads.*", how=how, metric=metric) for how in ("zero", "mean")}  # fmt: skip
    shown = pl.views.compare(ways).data
    assert isinstance(shown, s.Grid) and [p.name for p in shown.planes] == ["zero", "mean"]
    np.testing.assert_allclose(shown.planes[1].values.array(), ways["mean"]["effect"].values, rtol=1e-5)
    with pytest.raises(InputError, match="cannot stand in one view"):
        pl.views.compare({"grid": ways["zero"], "curve": along("a", [1, 2, 3])})


def test_heads_of_one_role_stand_as_one_box_of_a_circuit(llama: pl.Model) -> None:
    whole = pl.circuits.Circuit.whole(pl.circuits.wire(llama).graph)
    roles = np.full((2, 4), "", dtype="<U12")
    roles[0, 1] = roles[1, 2] = "name mover"
    named = Result(xr.DataArray(roles, {"layer": range(2), "head": range(4)}, ("layer", "head"), "role"), kind="head roles")  # fmt: skip
    shown = pl.views.circuit(whole, named)
    assert isinstance(shown.data, s.Circuit)
    grouped = {node.component for node in shown.data.nodes if node.group == "name mover"}
    assert grouped == {"layers.0.attn.heads.1", "layers.1.attn.heads.2"}
    assert shown.data.scores == document(whole).data.scores  # type: ignore[union-attr]
