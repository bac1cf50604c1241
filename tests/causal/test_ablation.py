"""Ablation equals a slow loop of edited runs, whatever removing means."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import pellucid
from pellucid import Ablate
from pellucid.causal import ablation
from pellucid.errors import InputError
from pellucid.metrics import logit, logit_difference
from pellucid.results import Result
from tests.zoo import build, tokenizer

PROMPTS = ["The capital of France is", "The city of Italy is", "a store in France"]
PARIS = logit_difference(" Paris", " Rome")


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "mixtral"])
def test_ablation_equals_one_edited_run_per_site(family, how):
    model = opened(family)
    prompts = PROMPTS[:2]
    result = ablation(model, prompts, how=how, metric=PARIS, seed=3)
    clean = model.score(model.run(prompts), PARIS).detach()
    for layer in result["layer"].values.tolist():
        for head in result["head"].values.tolist():
            edit = Ablate(f"layers.{layer}.attn.heads.{head}", how, seed=3)
            expected = model.score(model.run(prompts, edits=[edit]), PARIS).detach()
            here = result.sel(layer=layer, head=head)
            np.testing.assert_allclose(here.value, expected, atol=1e-4)
            assert float(here.effect) == pytest.approx(float((expected - clean).mean()), abs=1e-4)
            assert float(here.low) <= float(here.effect) <= float(here.high)


ZEROED = [  # what an ablation by zero must equal: these weights of the family's own module set to zero
    ("llama", "layers.*.attn.heads.*", lambda m, n, h: columns(m.model.layers[n].self_attn.o_proj, h, 4)),
    ("gemma2", "layers.*.attn.heads.*", lambda m, n, h: columns(m.model.layers[n].self_attn.o_proj, h, 4)),
    ("bert", "layers.*.attn.heads.*", lambda m, n, h: columns(m.bert.encoder.layer[n].attention.output.dense, h, 4)),
    ("bert", "layers.*.mlp.neurons.3:6", lambda m, n, i: m.bert.encoder.layer[n].output.dense.weight[:, i]),
    ("t5", "encoder.layers.*.attn.heads.*", lambda m, n, h: columns(m.encoder.block[n].layer[0].SelfAttention.o, h, 4)),
    ("t5", "decoder.layers.*.attn.heads.*", lambda m, n, h: columns(m.decoder.block[n].layer[0].SelfAttention.o, h, 4)),
    ("t5", "decoder.layers.*.cross.heads.*", lambda m, n, h: columns(m.decoder.block[n].layer[1].EncDecAttention.o, h, 4)),
    ("mixtral", "layers.*.mlp.experts.*", lambda m, n, e: m.model.layers[n].mlp.experts.down_proj[e]),
    ("qwen3_moe", "layers.*.mlp.experts.*", lambda m, n, e: m.model.layers[n].mlp.experts.down_proj[e]),
    ("mixtral", "layers.*.attn.heads.*", lambda m, n, h: columns(m.model.layers[n].self_attn.o_proj, h, 4)),
]  # fmt: skip


def columns(projection, head, heads):
    width = projection.weight.shape[1] // heads
    return projection.weight[:, head * width : (head + 1) * width]


def without(module, weights, ids):
    """The module's own logits with these weights at zero for the while."""
    with torch.no_grad():
        old = [w.clone() for w in weights]
        for w in weights:
            w.zero_()
        logits = module(**ids).logits
        for w, before in zip(weights, old, strict=True):
            w.copy_(before)
    return logits


@pytest.mark.parametrize(("family", "over", "weights"), ZEROED, ids=[f"{z[0]}-{z[1]}" for z in ZEROED])
def test_zeroing_a_part_equals_zeroing_the_weights_it_writes_through(family, over, weights):
    model = opened(family)
    result = ablation(model, PROMPTS[:2], over=over, metric=PARIS)
    inputs = model.inputs(PROMPTS[:2])
    layers, units = (result.data[dim].values.tolist() for dim in result.effect.dims)
    for layer, unit in [(layers[0], units[0]), (layers[-1], units[-1])]:
        expected = PARIS.bind(model.tokenizer, 2).score(
            without(model.module, [weights(model.module, layer, unit)], inputs.tensors), inputs.stream("").mask
        )
        np.testing.assert_allclose(result.value[layers.index(layer), units.index(unit)], expected, atol=1e-4)
    everything = [weights(model.module, layer, unit) for layer in layers for unit in units]
    corrupted = PARIS.bind(model.tokenizer, 2).score(
        without(model.module, everything, inputs.tensors), inputs.stream("").mask
    )
    np.testing.assert_allclose(result.corrupted, corrupted, atol=1e-4)
    total = float((result.corrupted - result.clean).mean())
    assert float(result.total_effect) == pytest.approx(total, abs=1e-6)
    assert float(result.total_low) <= total <= float(result.total_high)


@pytest.mark.parametrize("how", ["mean", "position_mean", "resample"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_head_is_replaced_by_what_it_says_on_the_reference(family, how):
    """By hooks on the family's own projection, over reference prompts of two lengths."""
    model = opened(family)
    prompt, reference = "The city of Rome is", ["The capital of France is in", "The store of Italy is a drink"]
    projection, stack = (
        (model.module.model.layers[1].self_attn.o_proj, "")
        if family == "llama"
        else (model.module.encoder.block[1].layer[0].SelfAttention.o, "encoder.")
    )
    width = projection.weight.shape[1] // 4
    seen, inputs = [], [model.inputs(text).tensors for text in (*reference, prompt)]

    def record(module, args):
        seen.append(args[0][0, :, width : 2 * width].clone())

    def put(new):
        def hook(module, args):
            x = args[0].clone()
            x[:, :, width : 2 * width] = new
            return (x, *args[1:])

        return hook

    with torch.no_grad():
        handle = projection.register_forward_pre_hook(record)
        for tensors in inputs:
            model.module(**tensors)
        handle.remove()
        n = len(seen[2])
        drawn = int(torch.randint(2, (1,), generator=torch.Generator().manual_seed(5)))
        new = {
            "mean": torch.cat(seen[:2]).mean(0),
            "position_mean": torch.stack([seen[0][:n], seen[1][:n]]).mean(0),
            "resample": seen[drawn][:n],
        }[how]
        handle = projection.register_forward_pre_hook(put(new))
        logits = model.module(**inputs[2]).logits
        handle.remove()
    site = f"{stack}layers.1.attn.heads.1"
    result = ablation(model, prompt, over=site, how=how, reference=reference, metric=PARIS, seed=5)
    expected = model.bind(PARIS).score(logits)
    assert float(result.value) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "gptj", "t5"])
def test_a_whole_layer_is_all_that_it_adds_to_the_residual(family):
    model = opened(family)
    prefix = "decoder." if family == "t5" else ""
    result = ablation(model, PROMPTS[:2], over=f"{prefix}layers.*", metric=PARIS)
    assert result.effect.dims == ("layer",)
    parts = {"llama": ["attn.out", "mlp.out"], "t5": ["attn.out", "cross.out", "mlp.out"]}.get(
        family, ["attn.out", "mlp.out"]
    )
    edits = [Ablate(f"{prefix}layers.1.{part}") for part in parts]
    expected = model.score(model.run(PROMPTS[:2], edits=edits), PARIS).detach()
    np.testing.assert_allclose(result.value.sel(layer=1), expected, atol=1e-4)
    if family in ("llama", "gptj"):  # pre-norm: the layer is skipped
        skipped = model.run(
            PROMPTS[:2], edits=[pellucid.Patch("layers.1.resid_post", kept(model, "layers.1.resid_pre"))]
        )
        np.testing.assert_allclose(result.value.sel(layer=1), model.score(skipped, PARIS).detach(), atol=1e-4)


def kept(model, site):
    return model.run(PROMPTS[:2], keep=[site]).tensor(site).detach()


def test_sets_are_removed_together_and_patterns_side_by_side():
    model = opened("gpt2")
    sets = {"first": "layers.0.attn.heads.*", "a few": ["layers.0.mlp.out", "layers.1.attn.heads.2"]}
    result = ablation(model, PROMPTS, over=sets, how="mean", metric=PARIS)
    assert result.effect.dims == ("set",)
    run = model.run(PROMPTS, keep=["layers.0.mlp.out", "layers.1.attn.z_out"])
    edits = [Ablate(site, "mean", run) for site in sets["a few"]]
    expected = model.score(model.run(PROMPTS, edits=edits), PARIS).detach()
    np.testing.assert_allclose(result.value.sel(set="a few"), expected, atol=1e-4)
    listed = ablation(model, PROMPTS, over=sets["a few"], how="mean", metric=PARIS)
    assert listed["site"].values.tolist() == sets["a few"]
    np.testing.assert_allclose(listed.corrupted, expected, atol=1e-4)


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
def test_a_prompt_alone_and_in_a_padded_batch_loses_the_same(how):
    model = opened("llama")
    reference = "The capital of France is in the city of"
    together = ablation(model, PROMPTS, how=how, reference=reference, metric=PARIS)
    for i, prompt in enumerate(PROMPTS):
        alone = ablation(model, prompt, how=how, reference=reference, metric=PARIS)
        np.testing.assert_allclose(together.value.isel(prompt=i), alone.value, atol=1e-4)


def test_the_reference_may_be_other_prompts_or_a_run_of_them():
    model = opened("gpt2")
    options = {"over": "layers.*.mlp.out", "how": "mean", "metric": PARIS}
    named = ablation(model, PROMPTS[0], reference=PROMPTS[1:], **options)
    run = model.run(PROMPTS[1:], keep="layers.*.mlp.out")
    assert named.allclose(ablation(model, PROMPTS[0], reference=run, **options), atol=1e-6)
    expected = model.run(PROMPTS[0], edits=[Ablate("layers.1.mlp.out", "mean", reference=run)])
    assert float(named.value.sel(layer=1)) == pytest.approx(float(model.score(expected, PARIS)), abs=1e-4)
    assert not named.allclose(ablation(model, PROMPTS[0], **options), atol=1e-4)


def test_blocks_without_the_part_are_empty_cells():
    model = opened("jamba")
    result = ablation(model, PROMPTS[0], over="layers.*.attn.heads.*", metric=PARIS)
    with_attention = [b.index for b in model.anatomy.stacks[0].blocks if "attn.z_out" in b.taps]
    assert result["layer"].values.tolist() == with_attention


def test_several_positions_are_ablated_one_by_one():
    result = ablation(opened("gpt2"), PROMPTS[0], over="layers.0.resid_pre@*", metric=PARIS)
    assert result.effect.dims == ("position",)
    assert result.data.sizes["position"] == 5


def test_a_single_prompt_has_no_interval():
    result = ablation(opened("gpt2"), PROMPTS[0], metric=PARIS)
    assert "low" not in result.data
    assert "prompt" not in result.data.dims


def test_what_is_missing_is_said():
    with pytest.raises(InputError, match="needs a metric"):
        ablation(opened("gpt2"), PROMPTS[0])
    with pytest.raises(InputError, match="cannot ablate by 'noise'"):
        ablation(opened("gpt2"), PROMPTS[0], how="noise", metric=PARIS)
    with pytest.raises(InputError, match="'nothing' names no site"):
        ablation(opened("gpt2"), PROMPTS[0], over={"nothing": [], "mlp": "layers.0.mlp.out"}, metric=PARIS)


def test_a_result_comes_back_from_its_file(tmp_path):
    result = ablation(opened("gpt2"), PROMPTS, metric=PARIS)
    assert Result.load(result.save(tmp_path / "ablation.zip")) == result


@pytest.mark.slow
def test_few_heads_of_smollm2_carry_the_city(smollm2):
    result = ablation(smollm2, "The Eiffel Tower is located in the city of", metric=logit(" Paris"))
    effect = np.sort(abs(result.effect.values).ravel())[::-1]
    assert result.effect.shape == (30, 9)
    assert effect[0] > 1
    assert effect[0] > 5 * np.median(effect)
