"""Meeting tensors during a pass: nothing is left behind, nobody else sees it, and our attention is the native
one.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import open_module
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Wiretap, explicit_attention, tapped
from pellucid.errors import Refused
from tests.zoo import build, inputs


def opened(model_type: str) -> tuple[nn.Module, dict[str, Any], Anatomy]:
    module = build(model_type)
    given = inputs(module)
    return module, given, open_module(module, given)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def registries() -> tuple[Any, Any]:
    return AttentionInterface.get_interface, ExpertsInterface.get_interface


@pytest.mark.parametrize("model_type", ["llama", "bloom", "mixtral", "hy_v4"])
def test_nothing_is_left_behind_after_an_exception_in_a_handler(model_type: str) -> None:
    module, given, anatomy = opened(model_type)
    block, before = anatomy.stacks[0].blocks[1], registries()
    native = module(**given).logits

    class Stop(Exception): ...

    def stop(x: Tensor) -> None:
        raise Stop

    taps = [replace(t, unit=0) if t.port.startswith("expert") else t for t in block.taps.values()]
    for tap in taps:
        with pytest.raises(Stop), Wiretap(module, {tap: stop}, 2):
            module(**given)
    assert hooks(module) == 0
    assert registries() == before
    assert torch.equal(module(**given).logits, native)


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_another_thread_runs_the_same_model_without_seeing_the_edits(model_type: str) -> None:
    module, given, anatomy = opened(model_type)
    native = module(**given).logits.detach()
    block = anatomy.stacks[0].blocks[0]
    seen: dict[str, Tensor] = {}

    def elsewhere(x: Tensor) -> Tensor:
        if "other" not in seen:
            thread = threading.Thread(target=lambda: seen.update(other=module(**given).logits.detach()))
            thread.start()
            thread.join()
        return torch.zeros_like(x)

    with Wiretap(module, {block.taps["attn.pattern"]: elsewhere, block.taps["mlp.out"]: torch.zeros_like}, 2):
        edited = module(**given).logits.detach()
    assert torch.equal(seen["other"], native)
    assert not torch.allclose(edited, native, atol=1e-3)


class Attending(nn.Module):
    """What an attention function may ask its module for."""

    num_key_value_groups, is_causal = 2, True


MASKS = {
    "none": None,
    "boolean": torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.3,
    "additive": torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_explicit_attention_is_the_fused_one(mask: Tensor | None, scaling: float | None) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask | torch.eye(5, dtype=torch.bool)
    native, _ = sdpa_attention_forward(Attending(), q, k, v, mask, scaling=scaling)
    z, pattern = explicit_attention(Attending(), q, k, v, mask, lambda _, x: x, scaling=scaling)
    torch.testing.assert_close(z, native)
    assert pattern.shape == (2, 4, 5, 5)


def test_explicit_attention_with_longer_keys_is_aligned_like_the_fused_one() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    native, _ = sdpa_attention_forward(Attending(), q, k, v, None, is_causal=True)
    torch.testing.assert_close(
        explicit_attention(Attending(), q, k, v, None, lambda _, x: x, is_causal=True)[0], native
    )


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2", "t5", "umt5", "modernbert", "deepseek_v3"])
def test_explicit_attention_is_the_native_one_with_sinks_caps_biases_and_windows(model_type: str) -> None:
    module, given, anatomy = opened(model_type)
    native = module(**given).logits
    taps = {t for s in anatomy.stacks for b in s.blocks for p, t in b.taps.items() if p.endswith(".pattern")}
    assert taps
    _, output = tapped(module, taps, 2, lambda: module(**given))
    torch.testing.assert_close(output.logits, native, atol=1e-5, rtol=1e-5)


def test_a_mask_that_is_no_table_of_queries_by_keys_is_refused_with_advice() -> None:
    q = torch.randn(2, 4, 5, 8)
    with pytest.raises(Refused, match="sdpa"):
        explicit_attention(Attending(), q, q, q, torch.ones(2, 5), lambda _, x: x)


def test_an_operation_can_be_met_and_replaced_where_no_module_returns_it() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += 1
            return y * 3

    module, layout = Doubling(), Layout(TOKENS, TOKENS)
    first, second = (Tap("", "op", layout, "mul", ops=(n,)) for n in (1, 2))
    in_place = Tap("", "op", layout, "add_", ops=(1,))
    x, met = torch.ones(2, 3, 4), []

    def spy(y: Tensor) -> Tensor:
        met.append(float(y[0, 0, 0]))
        return torch.zeros_like(y)

    with Wiretap(module, {first: lambda y: met.append(float(y[0, 0, 0])), in_place: spy}, 2):
        assert torch.equal(module(x), torch.zeros(2, 3, 4))
    assert met == [2.0, 3.0]
    with Wiretap(module, {second: lambda y: -y}, 2):
        assert torch.equal(module(x), torch.full((2, 3, 4), -9.0))


def test_gradients_flow_through_an_edit() -> None:
    module, given, anatomy = opened("llama")
    shift = torch.zeros(32, requires_grad=True)
    tap = anatomy.stacks[0].blocks[0].taps["resid_post"]
    with Wiretap(module, {tap: lambda x: x + shift}, 2):
        module(**given).logits[:, -1, 0].sum().backward()
    assert shift.grad is not None
    assert float(shift.grad.abs().max()) > 0
