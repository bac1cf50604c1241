"""Models broken on purpose after they were built: the proof that the damage touches fails, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.modeling_utils import AttentionInterface

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import open_module
from tests.zoo import build, inputs


def opened(module: nn.Module) -> Anatomy:
    given = inputs(module)
    dtype = next(module.parameters()).dtype
    return open_module(
        module, {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items() if v is not False}
    )


def failing(module: nn.Module) -> set[str]:
    return {p.name for p in opened(module).proofs if p.holds is False}


def layer(module: nn.Module, i: int = 0) -> Any:
    return module.model.layers[i]


def wrong_scale(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: 1.1 * F.linear(x, linear.weight, linear.bias)


def an_output_projection_with_a_wrong_scale(m: nn.Module) -> None:
    o_proj = layer(m).self_attn.o_proj
    o_proj.forward = wrong_scale(o_proj)


def a_down_projection_with_a_wrong_scale(m: nn.Module) -> None:
    down = layer(m).mlp.down_proj
    down.forward = wrong_scale(down)


def heads_flipped_before_the_projection(m: nn.Module) -> None:
    layer(m, 1).self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (4, -1)).flip(2).flatten(2),)
    )


def heads_reordered_before_the_projection(m: nn.Module) -> None:
    layer(m).self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (4, -1))[:, :, [1, 0, 2, 3]].flatten(2),)
    )


def something_hidden_added_to_the_residual(m: nn.Module) -> None:
    block, forward = layer(m), layer(m).forward
    block.forward = lambda x, **kw: forward(x, **kw) + torch.from_numpy(np.tanh(x.detach().numpy()))


def a_lm_head_with_a_wrong_scale(m: nn.Module) -> None:
    m.lm_head.forward = wrong_scale(m.lm_head)


class Wrapped(nn.Module):
    """A head that adds something of its own to the logits."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.sum(-1, keepdim=True).tanh()


def a_wrapped_lm_head(m: nn.Module) -> None:
    m.lm_head = Wrapped(m.lm_head)


def an_attention_that_ignores_its_pattern(m: nn.Module) -> None:
    m.config._attn_implementation = "mean_of_values"


def mean_of_values(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return v.mean(2, keepdim=True).expand_as(q).transpose(1, 2).contiguous(), None


def an_mlp_that_looks_at_other_positions(m: nn.Module) -> None:
    layer(m).mlp.register_forward_pre_hook(lambda _, args: (args[0].flip(1),))


SABOTAGES = [
    (an_output_projection_with_a_wrong_scale, "projection"),
    (a_down_projection_with_a_wrong_scale, "neurons"),
    (heads_flipped_before_the_projection, "heads"),
    (heads_reordered_before_the_projection, "heads"),
    (something_hidden_added_to_the_residual, "residual"),
    (a_lm_head_with_a_wrong_scale, "unembedding"),
    (a_wrapped_lm_head, "unembedding"),
    (an_attention_that_ignores_its_pattern, "attention"),
    (an_mlp_that_looks_at_other_positions, "position-wise"),
]


@pytest.fixture(autouse=True)
def broken_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "mean_of_values", mean_of_values)
    monkeypatch.setitem(ExpertsInterface._global_mapping, "too_loud", too_loud)


def too_loud(module: nn.Module, *args: Any) -> Tensor:
    return 1.1 * grouped_mm_experts_forward(module, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("sabotage", "proof"), SABOTAGES, ids=[s.__name__ for s, _ in SABOTAGES])
def test_the_proof_that_the_damage_touches_fails_and_no_other(
    sabotage: Callable[[nn.Module], None], proof: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and sabotage is something_hidden_added_to_the_residual:
        pytest.skip("numpy has no bfloat16")
    module = build("llama", dtype=dtype)
    assert failing(module) == set()
    sabotage(module)
    assert failing(module) == {proof}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_queries_that_leak_from_head_to_head_fail_the_reads_proof_alone_and_are_read_no_more(
    dtype: torch.dtype,
) -> None:
    def leak(
        _: nn.Module, __: Any, q: Tensor
    ) -> Tensor:  # [batch, position, head, e], by a way no torch function shows
        return q + torch.from_numpy(0.2 * np.roll(q.detach().float().numpy(), 1, 2)).to(q.dtype)

    module = build("qwen3", dtype=dtype)
    assert failing(module) == set()
    layer(module).self_attn.q_norm.register_forward_hook(leak)
    anatomy = opened(module)
    assert {p.name for p in anatomy.proofs if p.holds is False} == {"reads"}
    first, second = anatomy.stacks[0].blocks
    assert "the proof 'reads' failed" in first.unread["attn.q"]
    assert {"attn.k", "attn.v"} <= set(first.reads)
    assert {"attn.q", "attn.k", "attn.v"} <= set(second.reads)


def test_a_tap_inside_an_adapter_which_goes_on_reading_the_old_values_fails_the_values_proof_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False, r=2)
    module = peft.get_peft_model(build("llama"), config).eval()
    assert open_module(module).complete
    monkeypatch.setattr(
        "pellucid.anatomy.discovery.composed", lambda t: set()
    )  # the layer inside is taken for the whole
    anatomy = open_module(module)
    assert {p.name for p in anatomy.proofs if p.holds is False} == {"values"}
    assert "the proof 'values' failed" in anatomy.stacks[0].blocks[0].refused["attn.z_out"]


def test_experts_that_write_too_loudly_fail_the_experts_proof_alone() -> None:
    module = build("mixtral")
    assert failing(module) == set()
    module.config._experts_implementation = "too_loud"
    assert failing(module) == {"experts"}


class BertNorm(nn.Module):
    """Its name says norm; it is none."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def test_a_norm_replaced_by_a_squashing_function_fails_the_residual_of_a_post_norm_family() -> None:
    module = build("bert")
    assert failing(module) == set()
    module.bert.encoder.layer[0].output.LayerNorm = BertNorm()
    assert "residual" in failing(module)


def test_a_final_norm_that_only_scales_is_no_norm_whatever_its_class_is_called() -> None:
    class ScaleNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = build("llama")
    assert opened(module).head.norm is not None
    module.model.norm = ScaleNorm()
    anatomy = opened(module)
    assert anatomy.complete
    assert anatomy.head.norm is None


def test_what_rests_on_a_failed_proof_is_refused_in_that_block_only() -> None:
    module = build("llama")
    an_output_projection_with_a_wrong_scale(module)
    first, second = opened(module).stacks[0].blocks
    assert "attn.z_out" not in first.taps
    assert "projection" in first.refused["attn.z_out"]
    assert {"attn.z", "attn.pattern", "mlp.neurons"} <= set(first.taps)
    assert {"attn.z_out", "attn.z", "attn.pattern", "mlp.neurons"} <= set(second.taps)


def test_a_head_that_also_reads_the_embeddings_fails_the_unembedding() -> None:
    module, seen = build("bert"), {}
    module.bert.embeddings.register_forward_hook(lambda m, args, out: seen.update(x=out))
    module.cls.predictions.transform.register_forward_hook(lambda m, args, out: out + seen["x"])
    assert failing(module) == {"unembedding"}


def test_a_model_without_logits_has_no_head_to_prove() -> None:
    base = build("bert").bert
    proofs = {p.name: p for p in opened(base).proofs}
    assert proofs["unembedding"].holds is None
    assert proofs["residual"].holds
