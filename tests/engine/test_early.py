"""A run that ends at the last wanted site gives what a whole run gives, and computes nothing after it."""

from __future__ import annotations

import pytest
import torch

import pellucid
from pellucid.engine.watching import run_until
from tests.zoo import build, tokenizer

PROMPTS = ["the cat sat on the mat", "a dog"]


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("gpt2", ["layers.0.resid_post", "layers.0.mlp.neurons"]),
        ("llama", ["layers.0.resid_mid", "layers.1.attn.z"]),
        ("bert", ["layers.0.attn.pattern", "layers.1.resid_post"]),
        ("t5", ["encoder.layers.0.resid_post"]),
    ],
)
def test_an_early_end_keeps_what_a_whole_run_keeps(family, sites):
    module = build(family)
    model = pellucid.load(module, tokenizer=tokenizer(module))
    inputs = model.inputs(PROMPTS)
    short, whole = run_until(model.anatomy, inputs, sites), model.run(inputs, keep=sites)
    for site in sites:
        torch.testing.assert_close(short.tensor(site), whole.tensor(site), rtol=1e-4, atol=1e-5)


def test_what_comes_after_is_not_computed_and_nothing_is_left_on_the_model():
    module = build("gpt2")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    before = model.run(PROMPTS).logits
    called = []
    hook = module.transformer.h[1].register_forward_hook(lambda *_: called.append(1))
    run_until(model.anatomy, model.inputs(PROMPTS), ["layers.0.resid_post"])
    hook.remove()
    assert not called
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    torch.testing.assert_close(model.run(PROMPTS).logits, before, rtol=0, atol=0)
