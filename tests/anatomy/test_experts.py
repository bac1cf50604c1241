"""Mixtures of experts: the router, and every expert's neurons and contribution, can be read and edited."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid.anatomy.opening import open_module
from pellucid.anatomy.structure import Block, Tap
from pellucid.anatomy.wiretap import Wiretap, tapped
from tests.zoo import build, inputs

# Gated or not, with biases or not, transposed or not, a norm after each expert, a gate of their own.
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "qwen3_moe", "minimax_m3_vl_text", "beam"]


def opened(model_type: str) -> tuple[nn.Module, dict[str, Any], Block]:
    module = build(model_type, layers=3 if model_type == "nemotron_h" else 2)
    given = inputs(module)
    blocks = open_module(module, given).stacks[-1].blocks
    return module, given, next(b for b in blocks if b.experts is not None)


def of(block: Block, port: str, expert: int) -> Tap:
    return replace(block.taps[f"mlp.experts.{port}"], unit=expert)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_router_selects_and_what_is_not_selected_is_zero(model_type: str) -> None:
    module, given, block = opened(model_type)
    experts = block.experts
    taps = [
        block.taps["mlp.router"],
        *(of(block, p, e) for p in ("neurons", "out") for e in range(experts.count)),
    ]
    met, _ = tapped(module, taps, 2, lambda: module(**given))
    router = met[block.taps["mlp.router"]]
    assert router.shape == (2, 12, experts.count)
    assert int((router != 0).sum(-1).max()) <= experts.selected
    for e in range(experts.count):
        idle = router[:, :, e] == 0
        for port in ("neurons", "out"):
            assert not met[of(block, port, e)][idle].any()
        assert met[of(block, "neurons", e)].shape == (2, 12, experts.d_neurons)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_switching_an_expert_off_is_zeroing_its_contribution(model_type: str) -> None:
    module, given, block = opened(model_type)
    router, _ = tapped(module, [block.taps["mlp.router"]], 2, lambda: module(**given))
    busiest = int((router[block.taps["mlp.router"]] != 0).sum((0, 1)).argmax())
    with torch.no_grad(), Wiretap(module, {of(block, "out", busiest): torch.zeros_like}, 2):
        switched_off = module(**given).logits
    experts = module.get_submodule(block.experts.module)
    with torch.no_grad():
        experts.down_proj[busiest] = 0
        if experts.has_bias:
            experts.down_proj_bias[busiest] = 0
        by_weights = module(**given).logits
    torch.testing.assert_close(switched_off, by_weights, atol=1e-5, rtol=1e-5)


def test_an_edited_router_selects_anew_from_the_edited_weights() -> None:
    module, given, block = opened("mixtral")
    tap, kept = block.taps["mlp.router"], {}

    def only_the_first_two(x: Tensor) -> Tensor:
        new = torch.zeros_like(x)
        new[..., 0], new[..., 1] = 0.7, 0.3
        return new

    handlers = {tap: only_the_first_two}
    handlers |= {of(block, "out", e): lambda x, e=e: kept.update({e: x.clone()}) for e in range(block.experts.count)}
    with torch.no_grad(), Wiretap(module, handlers, 2):
        module(**given)
    assert all(kept[e].abs().sum(-1).min() > 0 for e in (0, 1))
    assert not kept[2].any()
    assert not kept[3].any()


def test_an_edit_of_an_experts_neurons_changes_only_tokens_that_chose_it() -> None:
    module, given, block = opened("mixtral")
    out = Tap(block.experts.module, "out", block.taps["mlp.router"].layout)
    before, _ = tapped(module, [out, block.taps["mlp.router"]], 2, lambda: module(**given))
    chosen = before[block.taps["mlp.router"]][:, :, 1] != 0
    after: dict[str, Tensor] = {}
    handlers = {of(block, "neurons", 1): lambda x: x + 1, out: lambda x: after.update(x=x.clone())}
    with torch.no_grad(), Wiretap(module, handlers, 2):
        module(**given)
    changed = (after["x"] - before[out]).abs().amax(-1) > 1e-4
    assert torch.equal(changed, chosen)


def test_gradients_reach_the_router_and_an_experts_neurons() -> None:
    module, given, block = opened("mixtral")
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def handler(x: Tensor) -> Tensor:
            kept[name] = x.detach().clone().requires_grad_()
            return kept[name]

        return handler

    router, _ = tapped(module, [block.taps["mlp.router"]], 2, lambda: module(**given))
    busiest = int((router[block.taps["mlp.router"]] != 0).sum((0, 1)).argmax())
    with Wiretap(module, {of(block, "neurons", busiest): keep("neurons")}, 2):
        module(**given).logits[..., 0].sum().backward()
    assert float(kept["neurons"].grad.abs().max()) > 0


@pytest.mark.parametrize("model_type", ["llama4_text", "dbrx", "longcat_flash", "jetmoe"])
def test_experts_with_code_of_their_own_are_refused_by_name(model_type: str) -> None:
    module = build(model_type)
    anatomy = open_module(module, inputs(module))
    assert any("experts" in site and "code of its own" in why for site, why in anatomy.refusals.items())
    assert "mlp.out" in anatomy.stacks[-1].blocks[0].taps
