"""Watching: what is shown is what a run keeps, and the pass ends where nobody looks any more."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.engine.watching import watch
from tests.zoo import build, tokenizer

PROMPTS = ["a b c d e", "f g"]


def opened(family):
    module = build(family)
    return pl.load(module, tokenizer=tokenizer(module))


def watched(model, sites, **options):
    values = {}
    inputs = model.inputs(PROMPTS)
    names = [s for pattern in sites for s in model.sites(pattern)]
    seen = {s: lambda x, s=s: values.__setitem__(str(s), x.clone()) for s in names}
    watch(model.anatomy, inputs, seen, **options)
    return values


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "albert", "gptj", "bloom", "mixtral"])
def test_what_is_shown_is_what_a_run_keeps(family):
    model = opened(family)
    prefix = "encoder." if len(model.anatomy.stacks) > 1 else ""
    parts = [
        "resid_pre",
        "attn.z",
        "attn.heads.1.out",
        "mlp.experts.1.neurons" if family == "mixtral" else "mlp.neurons",
    ]
    sites = [f"{prefix}layers.0.{part}" for part in parts]
    values = watched(model, sites)
    run = model.run(PROMPTS, keep=sites)
    assert len(values) == len(sites)
    for site in sites:
        torch.testing.assert_close(values[str(model.sites(site)[0])], run.everywhere(model.sites(site)[0])[0])


def test_the_pass_ends_with_the_last_site_and_leaves_nothing_behind():
    model = opened("llama")
    called = []
    hook = model.module.model.norm.register_forward_hook(lambda *_: called.append(1))
    before = model.run(PROMPTS).logits
    called.clear()
    watched(model, ["layers.0.mlp.neurons"])
    assert not called
    watched(model, ["layers.0.mlp.neurons"], whole=True)
    assert called
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    torch.testing.assert_close(model.run(PROMPTS).logits, before, atol=0, rtol=0)
