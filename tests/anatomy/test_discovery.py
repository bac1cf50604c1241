"""What the map must say about families of every form, written down from their modelling code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import open_module
from pellucid.anatomy.structure import Block
from tests.zoo import build, inputs


def opened(model_type: str, **config: Any) -> Anatomy:
    module = build(model_type, **config)
    return open_module(module, inputs(module))


@dataclass(frozen=True)
class Truth:
    """One block as its source code says it is (the last block of the last stack)."""

    model_type: str
    form: str
    heads: tuple[int, int] | None  # query heads, key-value heads
    o_proj: str | None
    down_proj: str | None
    stacks: dict[str, bool] = field(default_factory=lambda: {"": True})  # name -> causal
    path: tuple[str, ...] = ()  # between the output projection and the residual
    gated: bool = False
    width: tuple[int, int] = (8, 8)  # of a query head and of a value head
    parts: frozenset[str] = frozenset({"attn", "mlp"})
    head: tuple[str, ...] = ("norm", "lm_head")


GPT2_HEAD, BERT_HEAD = ("ln_f", "lm_head"), ("dense", "transform_act_fn", "LayerNorm", "decoder")
BOTH = {"encoder": False, "decoder": True}

TRUTHS = [
    Truth("llama", "pre-norm", (4, 2), "self_attn.o_proj", "mlp.down_proj"),
    Truth("gpt2", "pre-norm", (4, 4), "attn.c_proj", "mlp.c_proj", head=GPT2_HEAD),
    Truth("bloom", "pre-norm", (4, 4), "self_attention.dense", "mlp.dense_4h_to_h", head=GPT2_HEAD),
    Truth("gptj", "parallel", (4, 4), "attn.out_proj", "mlp.fc_out", head=GPT2_HEAD),
    Truth("cohere", "parallel", (4, 2), "self_attn.o_proj", "mlp.down_proj", head=("norm", "lm_head", "mul")),
    Truth("bert", "post-norm", (4, 4), "attention.output.dense", "output.dense", {"": False}, head=BERT_HEAD),
    Truth(
        "gemma2", "sandwich", (4, 2), "self_attn.o_proj", "mlp.down_proj", path=("post_attention_layernorm",),
        head=("norm", "lm_head", "div", "tanh", "mul"),
    ),
    Truth("deepseek_v3", "pre-norm", (4, 4), "self_attn.o_proj", None, width=(16, 8)),
    Truth("qwen3_next", "pre-norm", (4, 2), "self_attn.o_proj", None, gated=True),
    Truth(
        "t5", "pre-norm", (4, 4), "layer.0.SelfAttention.o", "layer.2.DenseReluDense.wo", BOTH,
        parts=frozenset({"attn", "cross", "mlp"}), head=("final_layer_norm", "mul", "lm_head"),
    ),
    Truth(
        "bart", "post-norm", (4, 4), "self_attn.out_proj", "fc2", BOTH,
        parts=frozenset({"attn", "cross", "mlp"}), head=("lm_head", "add"),
    ),
    Truth("mamba", "pre-norm", None, None, None, parts=frozenset({"mixer"}), head=("norm_f", "lm_head")),
    Truth("jamba", "pre-norm", (4, 2), "self_attn.o_proj", None, head=("final_layernorm", "lm_head")),
    Truth("squeezebert", "post-norm", (4, 4), None, None, {"": False}, head=BERT_HEAD),
    Truth(
        "deepseek_v4", "streams", (4, 1), None, None, gated=True,
        head=("streams", "hc_head", "norm", "lm_head"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda t: t.model_type)
def test_the_map_says_what_the_modelling_code_says(truth: Truth) -> None:
    config = {"o_groups": 2} if truth.model_type == "deepseek_v4" else {}
    anatomy = opened(truth.model_type, **config)
    block = anatomy.stacks[-1].blocks[-1]
    assert anatomy.complete, [p for p in anatomy.proofs if p.holds is False]
    assert {s.name: s.causal for s in anatomy.stacks} == truth.stacks
    assert all(len(s.blocks) == 2 for s in anatomy.stacks)
    assert block.form == truth.form
    assert {source.partition(".")[0] for source in sources(block)} == truth.parts
    assert anatomy.head is not None
    assert tuple(name.rpartition(".")[2] for name in anatomy.head.names) == truth.head
    if truth.heads is None:
        assert not block.attentions
        assert "attn" in block.refused
        return
    attention = block.attentions["attn"]
    assert (attention.heads, attention.kv_heads) == truth.heads
    assert (attention.d_head, attention.d_value) == truth.width
    assert attention.gated is truth.gated
    if truth.o_proj is not None:
        assert attention.o_proj == f"{block.module}.{truth.o_proj}"
        assert tuple(name.rpartition(".")[2] for name in attention.path.names) == truth.path
    if truth.down_proj is not None:
        assert block.down_proj == f"{block.module}.{truth.down_proj}"


def sources(block: Block) -> set[str]:
    """What the residual is made of, its own states aside."""
    found = {term.source for state in block.states for term in state.terms}
    return {s for s in found if s != "in" and not s.startswith("state")}


def test_granite_multiplies_what_it_adds_and_the_sites_hold_what_is_added() -> None:
    anatomy = opened("granite", residual_multiplier=0.25)
    block = anatomy.stacks[0].blocks[0]
    assert block.taps["attn.out"].layout.scale == 0.25
    assert anatomy.complete


def test_doge_scales_the_residual_channel_by_channel() -> None:
    anatomy = opened("doge")
    first = anatomy.stacks[0].blocks[0].states[0]
    coefficients = {t.source: t.coefficient for t in first.terms}
    assert coefficients["in"].shape == (32,)
    assert coefficients["attn.out"] == 1.0


def test_albert_calls_one_layer_again_and_every_call_is_a_block() -> None:
    blocks = opened("albert").stacks[0].blocks
    assert [b.nth for b in blocks] == [0, 1]
    assert len({b.module for b in blocks}) == 1


def test_a_recurrent_stack_that_starts_over_on_something_new_is_a_new_stack() -> None:
    anatomy = opened("hrm_text")
    assert len(anatomy.stacks) > 2
    assert anatomy.complete
    assert len({(b.module, b.nth) for s in anatomy.stacks for b in s.blocks}) == sum(
        len(s.blocks) for s in anatomy.stacks
    )


def test_blocks_written_into_their_parent_are_found_between_module_calls() -> None:
    anatomy = opened("xlm")
    assert anatomy.complete
    assert not any(b.whole for b in anatomy.stacks[0].blocks)
    assert anatomy.stacks[0].blocks[0].states[-1].terms[0].carried is not None  # the padding mask


def test_two_residual_streams_side_by_side_are_two_stacks() -> None:
    anatomy = opened("lilt")
    assert {s.name: s.d_model for s in anatomy.stacks} == {"stack1": 12, "": 48}
    assert anatomy.complete


def test_parallel_streams_mixed_by_weights_of_the_pass_are_carried() -> None:
    anatomy = opened("deepseek_v4", o_groups=2)
    assert anatomy.stacks[0].d_model == 4 * 32
    assert all(
        t.carried for s in anatomy.stacks[0].blocks[0].states for t in s.terms if t.source.startswith(("in", "state"))
    )


def test_windowed_attention_keeps_its_heads_and_refuses_its_pattern_with_the_reason() -> None:
    anatomy = opened("longformer")
    block = anatomy.stacks[0].blocks[0]
    assert anatomy.complete
    assert {"attn.z_out", "attn.out"} <= set(block.taps)
    assert "pieces" in block.refused["attn.pattern"]


def test_attention_that_feeds_another_mixer_keeps_z_and_refuses_what_a_head_writes() -> None:
    anatomy = opened("zamba")
    block = next(b for b in anatomy.stacks[0].blocks if b.attentions)
    assert anatomy.complete
    assert "attn.z_out" in block.taps
    assert "worked on" in block.refused["attn.heads.out"]


def test_a_module_without_blocks_is_refused_with_what_was_expected() -> None:
    from pellucid.errors import LoadError

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    with pytest.raises(LoadError, match="no stack of blocks was found in Plain"):
        open_module(Plain(), {"x": torch.randn(2, 3, 4)})
