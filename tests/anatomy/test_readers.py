"""What reads the stream: the columns on the map are those a slow search finds, one column of a projection at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import open_module
from pellucid.anatomy.structure import Reads, Tap
from pellucid.anatomy.wiretap import Wiretap, tapped
from tests.zoo import build, inputs


def opened(kind: str, **options: Any) -> Anatomy:
    module = build(kind, **options)
    return open_module(module, inputs(module))


def forward(anatomy: Anatomy) -> Any:
    with torch.no_grad():
        return anatomy.module(**anatomy.inputs)


def changing(anatomy: Anatomy, tap: Tap, column: int, watched: Tap) -> list[int]:
    """The heads or neurons that one changed column of what is met at a tap changes."""
    before, _ = tapped(anatomy.module, {watched}, 2, lambda: forward(anatomy))
    met: list[torch.Tensor] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, :, column] += 10
        x[1, :, column] -= 10
        return x

    with Wiretap(anatomy.module, {tap: change, watched: met.append}, 2):
        forward(anatomy)
    moved = (met[0] - before[watched]).abs().flatten(3).amax((0, 1, 3)) if met[0].ndim > 3 else None
    moved = (met[0] - before[watched]).abs().amax((0, 1)) if moved is None else moved
    return (moved > 1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "phi3", "persimmon", "opt", "qwen3_5_text"]
)
def test_columns_are_those_that_change_the_unit_and_no_other(kind: str) -> None:
    anatomy = opened(kind)
    block = anatomy.stacks[0].blocks[-1]
    ports = [p for p in ("attn.q", "attn.k", "attn.v", "mlp.neurons") if p in block.taps]
    assert ports
    for port in ports:
        for reads in block.reads[port]:
            assert reads.columns is not None
            owners = {int(c): u for u, row in enumerate(reads.columns) for c in row}
            for column in list(owners)[:: max(1, len(owners) // 9)]:
                assert changing(anatomy, reads.tap, column, block.taps[port]) == [owners[column]]
            others = sorted(set(range(1 + max(owners))) - set(owners))[:3]
            if port != "mlp.neurons":  # the other half of a fused gate feeds the same neurons
                assert all(changing(anatomy, reads.tap, column, block.taps[port]) == [] for column in others)


def test_the_gate_comes_first_whatever_the_modules_are_called() -> None:
    module = build("llama")
    for layer in module.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
        layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x))
    anatomy = open_module(module, inputs(module))
    gate, up = anatomy.stacks[0].blocks[0].reads["mlp.neurons"]
    assert gate.modules == ("model.layers.0.mlp.up_proj",)
    assert up.modules == ("model.layers.0.mlp.gate_proj",)


def whole(anatomy: Anatomy, part: str, stack: int = 0) -> Reads:
    (reads,) = anatomy.stacks[stack].blocks[0].reads[part]
    return reads


def test_a_part_reads_the_stream_through_its_own_module_or_a_norm_that_others_share() -> None:
    llama, falcon, bert = opened("llama"), opened("falcon"), opened("bert")
    assert whole(llama, "mlp").tap.module.endswith("post_attention_layernorm")
    assert not whole(llama, "mlp").norm
    shared = whole(falcon, "mlp")
    assert (shared.tap.module, shared.norm) == ("transformer.h.0.mlp", "transformer.h.0.input_layernorm")
    assert whole(bert, "mlp").stream.module.endswith("attention.output.LayerNorm")
    assert all(r.alone for r in (whole(llama, "mlp"), shared, whole(bert, "mlp")))


def test_a_bottleneck_and_a_factor_on_the_way_are_told() -> None:
    latent = whole(opened("deepseek_v3"), "attn.q")
    assert [name.rpartition(".")[2] for name in latent.modules] == ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    assert whole(opened("falcon_h1"), "attn.q").scale != 1.0
    assert "another projection" in opened("deepseek_v3").stacks[0].blocks[0].unread["attn.k"]


def test_cross_attention_reads_the_end_of_the_encoder() -> None:
    anatomy = opened("t5")
    keys = whole(anatomy, "cross.k", 1)
    assert keys.stream == anatomy.stacks[0].blocks[-1].taps["resid_post"]
    assert keys.norm == "encoder.final_layer_norm"


def test_columns_are_found_in_half_precision() -> None:
    full, half = opened("gpt2"), opened("gpt2", dtype=torch.bfloat16)
    for part, reads in full.stacks[0].blocks[0].reads.items():
        for one, other in zip(reads, half.stacks[0].blocks[0].reads[part], strict=True):
            assert one.columns is None or torch.equal(one.columns, other.columns)
