"""The vectors that the backward lens reads make the gradient that training sees, and their words are those of the head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.errors import InputError, Refused
from pellucid.lenses import backward_lens
from tests.lenses.test_tuned_lens import PROMPT, opened

DOWN = {"llama": ("model.layers.{}.mlp.down_proj", False), "gpt2": ("transformer.h.{}.mlp.c_proj", True)}


@pytest.mark.parametrize("family", DOWN)
def test_shares_and_sizes_are_those_of_the_weights_own_gradient(family: str) -> None:
    model = opened(family)
    found = backward_lens(model, PROMPT, 17, top=4)
    ids = model.inputs(PROMPT).tensors
    name, turned = DOWN[family]
    for layer in found.layer.values:
        down = model.module.get_submodule(name.format(layer))
        seen: dict[str, torch.Tensor] = {}

        def look(_, given, out, seen=seen):
            seen["neurons"] = given[0]
            out.retain_grad()
            seen["out"] = out

        hook = down.register_forward_hook(look)
        loss = -model.module(**ids).logits[0, -1].log_softmax(-1)[17]
        model.module.zero_grad()
        loss.backward()
        hook.remove()
        delta, neurons = seen["out"].grad[0], seen["neurons"][0].detach()
        weight = down.weight.grad if turned else down.weight.grad.T
        torch.testing.assert_close(neurons.T @ delta, weight, rtol=1e-3, atol=1e-7)
        here = found.sel(layer=int(layer)).data
        np.testing.assert_allclose(here["size"], delta.norm(dim=-1), rtol=1e-3, atol=1e-8)
        share = neurons.norm(dim=-1) * delta.norm(dim=-1)
        np.testing.assert_allclose(here["share"], share / share.sum(), rtol=1e-3, atol=1e-6)
        if family == "llama":
            norm, last = (
                model.module.model.norm,
                model.run(PROMPT, keep=["layers.1.resid_post"]).tensor("layers.1.resid_post")[0, -1],
            )
            scale = (last.pow(2).mean() + norm.variance_epsilon).rsqrt()
            said = (-delta * scale * norm.weight) @ model.module.lm_head.weight.T
            best = said.topk(4, -1)
            np.testing.assert_allclose(here["raised"], best.values.detach(), rtol=1e-3, atol=1e-7)
            words = [[model.tokenizer.decode([i]) for i in row] for row in best.indices.tolist()]
            assert here["raised_token"].values.tolist() == words
            np.testing.assert_array_equal(here["target_rank"], (said > said[:, [17]]).sum(-1))
    model.module.zero_grad()


def test_at_the_last_layer_a_step_teaches_the_target() -> None:
    """There delta is the error of the prediction seen through the head: the target is what is raised most."""
    for family in ("llama", "gpt2", "bert", "gemma2"):
        model = opened(family)
        if family == "bert":
            with pytest.raises((InputError, Refused)):  # no mask in the prompt
                backward_lens(model, PROMPT, 17)
            continue
        found = backward_lens(model, PROMPT, 17, layers=-1)
        assert int(found.target_rank.values[0, -1]) == 0, family
        assert "position" in found.raised.dims and found.raised.sizes["top"] == 5


def test_bad_questions() -> None:
    model = opened("gpt2")
    for prompt, options, what in [
        ([PROMPT, "One two three"], {}, "one prompt"),
        (PROMPT, {"top": 0}, "at least 1"),
        (PROMPT, {"layers": 9}, "layers=9"),
    ]:
        with pytest.raises(InputError, match=what):
            backward_lens(model, prompt, 17, **options)
