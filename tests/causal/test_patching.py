"""Patching equals a slow loop of edited runs, on every kind of grid."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import pellucid
from pellucid import Patch
from pellucid.causal import patching
from pellucid.errors import InputError, SiteError
from pellucid.metrics import logit, logit_difference, probability
from pellucid.results import Result
from pellucid.tasks import Prompts
from tests.zoo import build, tokenizer

CLEAN, CORRUPTED = "The capital of France is", "The capital of Italy is"
PARIS = logit_difference(" Paris", " Rome")


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def slow(model, sites, base, source):
    """One plain run for each site."""
    run = model.run(source, keep=[site.partition("@")[0] for site in sites])
    return [float(model.score(model.run(base, edits=[Patch(site, run)]), PARIS)) for site in sites]


GRIDS = [
    ("layers.*.resid_pre@*", ("layer", "position"), lambda n, p: f"layers.{n}.resid_pre@{p}"),
    ("layers.*.attn.heads.*", ("layer", "head"), lambda n, h: f"layers.{n}.attn.heads.{h}"),
    ("layers.1.mlp.out@*", ("position",), lambda p: f"layers.1.mlp.out@{p}"),
    ("layers.*.attn.heads.1:3.z@-1", ("layer", "head"), lambda n, h: f"layers.{n}.attn.heads.{h}.z@-1"),
    ("layers.0.mlp.neurons.*@2:4", ("neuron",), lambda n: f"layers.0.mlp.neurons.{n}@2:4"),
]


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize(("over", "dims", "name"), GRIDS, ids=[g[0] for g in GRIDS])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_patching_equals_one_edited_run_per_site(family, over, dims, name, denoise):
    model = opened(family)
    result = patching(model, CLEAN, CORRUPTED, over=over, metric=PARIS, denoise=denoise)
    assert result.effect.dims == dims
    where = [result.data[dim].values.tolist() for dim in dims]
    sites = [name(*cell) for cell in np.array(np.meshgrid(*where, indexing="ij")).reshape(len(dims), -1).T.tolist()]
    base, source = (CORRUPTED, CLEAN) if denoise else (CLEAN, CORRUPTED)
    expected = slow(model, sites[:12], base, source)
    np.testing.assert_allclose(result.value.values.ravel()[:12], expected, atol=1e-4)
    clean, corrupted = (float(model.score(model.run(p), PARIS)) for p in (CLEAN, CORRUPTED))
    assert float(result.clean) == pytest.approx(clean, abs=1e-5)
    unpatched, total = (corrupted, clean - corrupted) if denoise else (clean, corrupted - clean)
    np.testing.assert_allclose(result.effect, result.value - unpatched, atol=1e-4)
    np.testing.assert_allclose(result.share, result.effect / total, atol=1e-3)
    assert float(result.total_effect) == pytest.approx(total, abs=1e-5)


def test_the_whole_first_residual_brings_everything_over():
    """Positions that differ carry it all at layer 0; the others nothing."""
    result = patching(opened("gpt2"), CLEAN, CORRUPTED, metric=PARIS)
    np.testing.assert_allclose(result.share.sel(layer=0), [0, 0, 0, 1, 0], atol=1e-4)
    assert [t.strip() for t in result.token.values.tolist()] == ["The", "capital", "of", "France", "is"]


def test_encoder_decoders_are_patched_in_either_stack():
    model = opened("t5")
    result = patching(model, CLEAN, CORRUPTED, over="encoder.layers.*.resid_pre@*", metric=PARIS)
    assert result.effect.dims == ("layer", "position")
    assert result.data.sizes["position"] == 6
    run = model.run(CLEAN, keep="encoder.layers.1.resid_pre")
    expected = model.score(model.run(CORRUPTED, edits=[Patch("encoder.layers.1.resid_pre@3", run)]), PARIS)
    assert float(result.value.sel(layer=1, position=3)) == pytest.approx(float(expected), abs=1e-4)
    cross = patching(model, CLEAN, CORRUPTED, over="decoder.layers.*.cross.heads.*", metric=PARIS)
    assert cross.effect.dims == ("layer", "head")


def pairs(model):
    return Prompts.from_pairs(
        ["The capital of France is", "The city of Italy is", "The capital city in France"],
        ["The capital of Italy is", "The city of France is", "The capital city in Italy"],
        [" Paris", " Rome", " Paris"], [" Rome", " Paris", " Rome"], model.tokenizer,
    )  # fmt: skip


def test_a_task_brings_its_metric_and_spans_and_gives_an_interval_over_prompts():
    model = opened("gpt2")
    task = pairs(model)
    result = patching(model, task, over="layers.*.resid_pre@changed")
    assert result.value.dims == ("layer", "prompt")
    assert result.data.sizes["prompt"] == 3
    np.testing.assert_allclose(result.share.sel(layer=0), 1, atol=1e-3)
    assert (result.low <= result.effect + 1e-9).all()
    assert (result.effect <= result.high + 1e-9).all()
    assert (result.share_low <= result.share + 1e-9).all()
    assert ((result.p > 0) & (result.p <= 1)).all()
    gain = (result.value - result.corrupted).mean("prompt")
    np.testing.assert_allclose(result.effect, gain, atol=1e-6)
    total = (result.clean - result.corrupted).mean("prompt")
    np.testing.assert_allclose(result.share, gain / total, atol=1e-6)
    again = patching(model, task, over="layers.*.resid_pre@changed")
    assert again == result
    alone = patching(model, task[1], over="layers.*.resid_pre@changed")
    np.testing.assert_allclose(alone.value, result.value.isel(prompt=1), atol=1e-4)


def test_every_result_carries_the_total_effect_with_its_interval():
    model = opened("gpt2")
    task = pairs(model)
    result = patching(model, task, over="layers.*.resid_pre@changed", denoise=False)
    total = float((result.corrupted - result.clean).mean())
    assert float(result.total_effect) == pytest.approx(total)
    assert float(result.total_low) <= total <= float(result.total_high)


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize(
    ("family", "over", "expert"),
    [
        ("mixtral", "layers.*.mlp.experts.*", 1),
        ("gemma2", "layers.*.attn.heads.*", 1),
        ("bert", "layers.*.attn.heads.*.k", 1),
    ],
)
def test_experts_post_norms_and_shared_keys_are_patched_like_single_runs(family, over, expert, denoise):
    model = opened(family)
    result = patching(model, CLEAN, CORRUPTED, over=over, metric=PARIS, denoise=denoise)
    base, source = (CORRUPTED, CLEAN) if denoise else (CLEAN, CORRUPTED)
    unit = result.effect.dims[1]
    site = over.replace("layers.*", "layers.1").replace("*", str(expert))
    (expected,) = slow(model, [site], base, source)
    assert float(result.value.sel({"layer": 1, unit: expert})) == pytest.approx(expected, abs=1e-4)


def test_whole_layers_and_named_sets_are_patched_together():
    model = opened("llama")
    layers = patching(model, CLEAN, CORRUPTED, over="layers.*@*", metric=PARIS)
    assert layers.effect.dims == ("layer", "position")
    run = model.run(CLEAN, keep=["layers.1.attn.out", "layers.1.mlp.out"])
    edits = [Patch(f"layers.1.{part}@3", run) for part in ("attn.out", "mlp.out")]
    expected = float(model.score(model.run(CORRUPTED, edits=edits), PARIS))
    assert float(layers.value.sel(layer=1, position=3)) == pytest.approx(expected, abs=1e-4)
    named = patching(
        model,
        CLEAN,
        CORRUPTED,
        over={"both": ["layers.1.attn.out@3", "layers.1.mlp.out@3"]},
        metric=PARIS,
    )
    assert float(named.value.sel(set="both")) == pytest.approx(expected, abs=1e-4)


def test_prompts_that_do_not_align_show_where_they_part():
    with pytest.raises(
        InputError, match=r"pair 0 does not align: clean has 5 tokens and corrupted \d+; from token 3 on"
    ):
        patching(opened("gpt2"), CLEAN, "The capital of Norway is", metric=PARIS)


def test_a_metric_that_does_not_tell_the_prompts_apart_is_an_error():
    with pytest.raises(InputError, match="does not tell them apart"):
        patching(opened("gpt2"), CLEAN, CLEAN, metric=PARIS)


def test_positions_one_by_one_need_prompts_of_one_length():
    model = opened("gpt2")
    with pytest.raises(InputError, match="takes positions one by one, but the prompts have 2 to 5 tokens"):
        patching(model, [CLEAN, "France is"], [CORRUPTED, "Italy is"], metric=PARIS)


def test_what_is_missing_is_said():
    with pytest.raises(InputError, match="clean and corrupted prompts and a metric"):
        patching(opened("gpt2"), CLEAN, metric=PARIS)
    with pytest.raises(SiteError, match="unknown part"):
        patching(opened("gpt2"), CLEAN, CORRUPTED, over="layers.*.resid_prE@*", metric=PARIS)


def test_a_result_comes_back_from_its_file(tmp_path):
    result = patching(opened("gpt2"), CLEAN, CORRUPTED, metric=PARIS)
    assert Result.load(result.save(tmp_path / "patching.zip")) == result


@pytest.mark.slow
def test_in_smollm2_the_name_moves_from_its_token_to_the_last_position(smollm2):
    result = patching(
        smollm2,
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        metric=logit_difference(" Mary", " John"),
    )
    effect = result.share
    name, last = 9, effect.sizes["position"] - 1
    assert (effect.sel(position=name, layer=slice(0, 15)) > 0.9).all()
    assert (effect.sel(position=last, layer=slice(0, 15)) < 0.1).all()
    assert (effect.sel(position=last, layer=slice(26, None)) > 0.9).all()
    assert (effect.sel(position=name, layer=slice(26, None)) < 0.1).all()
    assert (abs(effect.drop_sel(position=[name, last])) < 0.15).all()


def test_several_metrics_share_one_sweep_and_give_what_each_gives_alone(monkeypatch):
    model = opened("gpt2")
    task = pairs(model)
    metrics = {
        "difference": logit_difference([" Paris", " Rome", " Paris"], [" Rome", " Paris", " Rome"]),
        "probability": probability([" Paris", " Rome", " Paris"]),
        "earlier": logit_difference(" Paris", " Rome", position=-2),
        "all logits": lambda logits: logits[:, -1].amax(-1),
    }
    options = {"over": "layers.*.attn.heads.*"}
    swept = []
    sweep = pellucid.Model.sweep
    monkeypatch.setattr(pellucid.Model, "sweep", lambda *a, **o: swept.append(1) or sweep(*a, **o))
    for names in (list(metrics), list(metrics)[:3], ["difference", "earlier"]):
        swept.clear()
        together = patching(model, task, metric={name: metrics[name] for name in names}, **options)
        assert len(swept) == 1
        assert together.effect.dims == ("layer", "head", "metric")
        for name in names:
            alone = patching(model, task, metric=metrics[name], **options)
            for variable in ("effect", "share", "low", "share_high", "clean", "total_effect"):
                np.testing.assert_allclose(together[variable].sel(metric=name), alone[variable], atol=2e-4)
    one = patching(model, CLEAN, CORRUPTED, metric={"a": PARIS, "b": logit(" Paris")}, **options)
    assert one.value.dims == ("layer", "head", "metric")


def test_noising_ranks_the_heads_that_matter_first():
    """An effect is patched minus unpatched in either direction, so `top` lists what matters, not what does nothing (A15)."""
    model = opened("gpt2")
    for denoise in (True, False):
        result = patching(model, CLEAN, CORRUPTED, over="layers.*.attn.heads.*", metric=PARIS, denoise=denoise)
        first = result.top(1).iloc[0]
        assert abs(first["effect"]) == np.abs(result.effect).max()
        assert abs(first["share"]) == np.abs(result.share).max()


def test_a_masked_model_is_read_at_its_mask():
    model = opened("bert")
    mask = model.tokenizer.mask_token
    clean, corrupted = f"The capital of France is {mask} city", f"The capital of Italy is {mask} city"
    result = patching(model, clean, corrupted, over="layers.*.resid_pre@*", metric=PARIS)
    at = model.inputs(clean).stream("").ids[0].tolist().index(model.tokenizer.mask_token_id)
    placed = patching(
        model, clean, corrupted, over="layers.*.resid_pre@*", metric=logit_difference(" Paris", " Rome", position=at)
    )
    np.testing.assert_allclose(result.value, placed.value, atol=1e-6)
    with pytest.raises(InputError, match="answered at different places"):
        patching(model, clean, f"The capital of Italy {mask} is city", metric=PARIS)


def test_a_results_program_gives_it_again():
    model = opened("gpt2")
    for over in ("layers.*.attn.heads.*", ["layers.0.mlp.out", "layers.1.mlp.out"], {"both": ["layers.*.mlp.out"]}):
        result = patching(model, CLEAN, CORRUPTED, over=over, metric=PARIS)
        again = eval(result.provenance.call, {"pl": pellucid, "model": model})
        assert again.allclose(result)
