"""Features are ablated, scaled, set, steered and patched like sites, and what they do not explain stays as it was."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import pellucid
from pellucid.engine.edits import Patch, Replace, Steer
from pellucid.errors import InputError, SiteError
from pellucid.metrics import logit
from pellucid.neurons.dictionaries import Dictionary, ReLU, TopK
from tests.zoo import build, tokenizer

SITE = "layers.0.resid_post"
PROMPTS = ["The cat sat on the mat", "A dog"]


@cache
def opened(family):
    module = build(family)
    return pellucid.load(module, tokenizer=tokenizer(module))


def dictionary(model, site=SITE, writes="", activation=None, features=20, **more):
    g = torch.Generator().manual_seed(0)
    d = model.anatomy.stacks[-1].d_model
    decoder = normalize(torch.randn(features, d, generator=g), dim=1)
    encoder, bias = torch.randn(d, features, generator=g), torch.randn(d, generator=g)
    return Dictionary(encoder, torch.zeros(features), decoder, bias, activation or ReLU(), site, writes, **more)


def at_site(model, edits, prompt=PROMPTS, site=SITE):
    return model.run(prompt, keep=[site], edits=edits).tensor(site).detach()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_changed_feature_moves_the_site_along_its_direction_by_the_change(family):
    model = opened(family)
    d = dictionary(model)
    x = at_site(model, [])
    real = model.inputs(PROMPTS).stream("").mask.bool()[..., None]
    f, way = d.encode(x)[..., [3, 7]], d.decoder[[3, 7]]
    for change, value, new in (
        ("ablate", 0.0, 0 * f),
        ("scale", 3.0, 3 * f),
        ("set", [1.0, 2.0], torch.tensor([1.0, 2.0]).expand_as(f)),
        ("steer", -2.0, f - 2),
    ):
        moved = at_site(model, d.edits([3, 7], change, value))
        torch.testing.assert_close(moved, torch.where(real, x + (new - f) @ way, x), rtol=1e-4, atol=1e-5)


def test_changing_nothing_changes_nothing_and_a_splice_loses_the_error():
    model = opened("gpt2")
    d = dictionary(model, activation=TopK(4))
    x = at_site(model, [], PROMPTS[0])
    torch.testing.assert_close(at_site(model, d.edits(range(20), "scale", 1.0), PROMPTS[0]), x)
    torch.testing.assert_close(at_site(model, d.splice(), PROMPTS[0]), d.decode(d.encode(x)), rtol=1e-4, atol=1e-5)
    everything = at_site(model, d.edits(range(20), "ablate"), PROMPTS[0])
    torch.testing.assert_close(everything, x - d.decode(d.encode(x)) + d.decoder_bias, rtol=1e-4, atol=1e-5)


def test_steering_a_feature_is_steering_by_its_direction():
    model = opened("llama")
    d = dictionary(model)
    ours = model.run(PROMPTS, edits=d.edits(5, "steer", 4.0, positions=-1)).logits
    plain = model.run(PROMPTS, edits=[Steer(f"{SITE}@-1", d.direction(5), 4.0)]).logits
    torch.testing.assert_close(ours, plain)


def test_a_patched_feature_has_the_activation_of_the_other_prompt():
    model = opened("gpt2")
    d = dictionary(model)
    here, there = "The cat sat on the mat", "The dog sat on the hat"
    x, y = at_site(model, [], here), at_site(model, [], there)
    moved = at_site(model, d.patch([1, 2, 9], there), here)
    way = (d.encode(y) - d.encode(x))[..., [1, 2, 9]] @ d.decoder[[1, 2, 9]]
    torch.testing.assert_close(moved, x + way, rtol=1e-4, atol=1e-5)
    kept = model.run(there, keep=[SITE])
    torch.testing.assert_close(at_site(model, d.patch([1, 2, 9], kept), here), moved)
    torch.testing.assert_close(at_site(model, d.patch(range(20), here), here), x)


@pytest.mark.parametrize("reads", ["layers.0.resid_mid", "layers.0.resid_pre"])
def test_a_transcoder_hears_one_site_and_writes_to_the_other(reads):
    model = opened("llama")
    d = dictionary(model, reads, "layers.0.mlp.out")
    run = model.run(PROMPTS[0], keep=[reads, d.writes])
    x, y = run.tensor(reads), run.tensor(d.writes)
    f = d.encode(x)
    torch.testing.assert_close(at_site(model, d.splice(), PROMPTS[0], d.writes), d.decode(f), rtol=1e-4, atol=1e-5)
    off = at_site(model, d.edits([2, 4], "ablate"), PROMPTS[0], d.writes)
    torch.testing.assert_close(off, y - f[..., [2, 4]] @ d.decoder[[2, 4]], rtol=1e-4, atol=1e-5)
    narrow = at_site(model, d.edits(2, "ablate", positions=-1), PROMPTS[0], d.writes)
    torch.testing.assert_close(narrow[:, :-1], y[:, :-1])
    with pytest.raises(InputError, match="read at another site"):
        d.patch(2, PROMPTS[0])


@pytest.mark.parametrize("writes", ["", "layers.1.mlp.out"])
def test_a_sweep_over_features_gives_what_runs_give(writes):
    model = opened("llama")
    d = dictionary(model, "layers.1.resid_mid", writes)
    variants = [d.edits(i, "ablate") for i in range(6)] + [d.splice(), d.edits([1, 2], "steer", 3.0)]
    variants += [d.edits([1, 2], "scale", 3.0, positions=-1), d.edits(3, "set", 3.0, positions="1:3")]
    swept = model.sweep(PROMPTS[0], variants, logit(7)).values[:, 0]
    one_by_one = [model.score(model.run(PROMPTS[0], edits=v), logit(7)).item() for v in variants]
    np.testing.assert_allclose(swept.numpy(), one_by_one, rtol=1e-4, atol=1e-5)


def test_rows_beyond_the_limit_are_left_as_they_are():
    model = opened("gpt2")
    x = at_site(model, [], PROMPTS[0])
    norms = x.norm(dim=-1)
    d = dictionary(model, limit=float(norms.median()))
    beyond = norms > d.limit
    assert 0 < int(beyond.sum()) < beyond.numel()
    for edits in (d.splice(), d.edits(3, "steer", 5.0), d.edits(range(20), "ablate"), d.edits(3, "set", 5.0)):
        moved = at_site(model, edits, PROMPTS[0])
        assert torch.equal(moved[beyond], x[beyond])
        assert not torch.isclose(moved[~beyond], x[~beyond]).all(-1).any()
    assert not d.encode(x)[beyond].any()


def test_features_steer_generation_with_and_without_a_cache():
    model = opened("gpt2")
    d = dictionary(model)
    edits = d.edits(4, "steer", 30.0)
    texts = [model.generate(PROMPTS[0], edits=edits, max_new_tokens=6, use_cache=c).tokens for c in (True, False)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate(PROMPTS[0], max_new_tokens=6).tokens)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_features_of_a_prompt_do_not_depend_on_its_padding(family):
    model = opened(family)
    d = dictionary(model, activation=TopK(3))
    together, alone = d.features(model, PROMPTS), d.features(model, PROMPTS[1])
    row = together.data.isel(batch=1).dropna("position").sel(feature=alone.data.feature)
    np.testing.assert_allclose(row.activation.values, alone.values[0], atol=1e-5)
    assert row.token.values.tolist() == alone.token.values[0].tolist()
    assert (np.nan_to_num(together.values) > 0).sum(-1).max() <= 3
    kept = model.run(PROMPTS, keep=[SITE])
    assert d.features(model, kept).allclose(together)


def test_gradients_flow_through_an_edit():
    model = opened("gpt2")
    d = dictionary(model)
    run = model.run(PROMPTS[0], keep=["layers.0.resid_pre"], edits=d.splice(), grad_of=logit(7))
    assert run.grad("layers.0.resid_pre").abs().sum() > 0


def test_what_cannot_be_done_is_said():
    model = opened("gpt2")
    d = dictionary(model)
    with pytest.raises(InputError, match=r"feature \[20\] is not in this dictionary: expected 0 to 19"):
        d.edits(20)
    with pytest.raises(InputError, match="expected 'ablate', 'scale', 'set' or 'steer'"):
        d.edits(1, "remove")
    with pytest.raises(InputError, match="one for each of 1 features"):
        d.edits(1, "set", [1.0, 2.0])
    with pytest.raises(InputError, match="other weights"):
        dictionary(model, digest="0" * 64).features(model, PROMPTS)
    for edits in (lambda d: d.edits(1), lambda d: d.splice(), lambda d: d.patch(1, PROMPTS[1])):
        strange = edits(dictionary(model, digest="0" * 64))
        for use in (
            lambda e: model.run(PROMPTS[0], edits=e),
            lambda e: model.generate(PROMPTS[0], edits=e, max_new_tokens=1),
            lambda e: model.sweep(PROMPTS[0], [e], logit(7)),
        ):
            with pytest.raises(InputError, match="belongs to other weights"):
                use(strange)
    mine = dictionary(model, digest=model.digest)
    model.run(PROMPTS[0], edits=mine.splice())
    weight = model.module.lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():  # the weights change under the model's hands
        weight.add_(1)
    with pytest.raises(InputError, match="other weights"):
        model.run(PROMPTS[0], edits=mine.splice())
    with torch.no_grad():
        weight.copy_(before)
    model.run(PROMPTS[0], edits=mine.splice())
    wide = Dictionary(torch.ones(5, 3), torch.zeros(3), torch.ones(3, 5), torch.zeros(5), ReLU(), SITE)
    for edits in (wide.edits(1), wide.splice(), wide.edits(0, "steer", 1.0)):
        with pytest.raises(InputError, match="holds 32 numbers, but this dictionary writes 5"):
            model.run(PROMPTS[0], edits=edits)
    with pytest.raises(InputError, match="reads 5 numbers at 'layers.0.resid_post', not 32"):
        wide.features(model, PROMPTS)
    with pytest.raises(SiteError):
        dictionary(model, site="layers.9.resid_post").features(model, PROMPTS)
    with pytest.raises(SiteError, match="vectors at every position"):
        dictionary(model, site="layers.0.attn.z")
    with pytest.raises(InputError, match="reads before it writes"):
        model.run(PROMPTS, edits=dictionary(model, "layers.1.resid_pre", "layers.0.mlp.out").splice())
    with pytest.raises(InputError, match="needs a bias"):
        Dictionary(torch.ones(2, 3), torch.ones(2), torch.ones(3, 2), torch.ones(2), ReLU(), SITE)


def test_edits_at_the_site_a_user_writes_by_hand_agree():
    model = opened("gpt2")
    d = dictionary(model)
    by_hand = [Replace(SITE, lambda x: x + (0 - d.encode(x)[..., [6]]) @ d.decoder[[6]])]
    torch.testing.assert_close(at_site(model, d.edits(6), PROMPTS[0]), at_site(model, by_hand, PROMPTS[0]))
    put = [Patch(SITE, d.decode(d.encode(at_site(model, [], PROMPTS[0])))[0])]
    torch.testing.assert_close(at_site(model, d.splice(), PROMPTS[0]), at_site(model, put, PROMPTS[0]))
