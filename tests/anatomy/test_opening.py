"""Opening a model proves its map, whatever holds the weights, and leaves the module exactly as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid.anatomy import map as display
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.opening import open_module
from tests.zoo import build, inputs


def opened(module: nn.Module) -> Anatomy:
    return open_module(module, inputs(module))


def holding(anatomy: Anatomy) -> set[str]:
    return {p.name for p in anatomy.proofs if p.holds}


EVERYTHING = {
    "coverage", "taps", "logits", "residual", "chain", "attention", "projection", "neurons", "position-wise", "reads",
    "unembedding", "ablation", "values", "writers",
}  # fmt: skip


def test_the_module_is_left_as_it_was() -> None:
    module = build("llama").train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modules = list(module.modules())
    assert holding(opened(module)) == EVERYTHING
    assert module.training
    assert list(module.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_without_inputs_random_tokens_probe_the_model() -> None:
    for model_type in ("gpt2", "bert", "t5"):
        assert open_module(build(model_type)).complete


@pytest.mark.parametrize(("vocabulary", "context"), [(3, 4), (7, 6), (13, 12)])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_the_probe_keeps_to_a_small_vocabulary_and_a_short_context(
    model_type: str, vocabulary: int, context: int
) -> None:
    limit = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    opened = open_module(build(model_type, vocab_size=vocabulary, **{limit: context}, **special))
    ids = opened.inputs["input_ids"]
    assert ids.shape[1] <= context
    assert int(ids.max()) < vocabulary
    assert opened.complete


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "bert", "t5", "bloom", "deepseek_v3", "hunyuan_v1_moe"])
def test_half_precision_is_proven_too_and_says_where_rounding_drowns_the_claim(
    model_type: str, dtype: torch.dtype
) -> None:
    anatomy = opened(build(model_type, dtype=dtype))
    assert anatomy.complete
    undecided = [p for p in anatomy.proofs if p.holds is None and "does not apply" not in p.detail]
    assert all("float32" in p.detail for p in undecided)


class Int8Linear(nn.Module):
    """Weights as whole numbers; the product is not a torch function, as in a custom kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x @ (self.weight.to(x.dtype) * self.scale[:, None]).T


def test_quantised_layers_are_proven_by_calling_them() -> None:
    module = build("llama")
    for layer in module.model.layers:
        for parent, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("up_proj", "down_proj")),
        ):
            for name in names:
                setattr(parent, name, Int8Linear(getattr(parent, name)))
    assert holding(opened(module)) == EVERYTHING


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model_type", ["llama", "bert", "t5"])
def test_weights_packed_away_by_dynamic_quantisation_are_no_obstacle_to_finding_the_blocks(model_type: str) -> None:
    """Activations are rounded too, so that what is proven of linear maps holds no more: those parts are refused."""
    module = torch.ao.quantization.quantize_dynamic(build(model_type), {nn.Linear}, dtype=torch.qint8)
    anatomy = opened(module)
    assert all(len(stack.blocks) == 2 and "resid_pre" in stack.blocks[0].taps for stack in anatomy.stacks)
    assert {p.name for p in anatomy.proofs if p.holds is False} <= {"projection", "neurons", "unembedding"}


def test_offloaded_weights_are_proven_by_calling_their_modules() -> None:
    accelerate = pytest.importorskip("accelerate")
    module = build("llama")
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in module.model.layers[0].self_attn.o_proj.parameters())
    assert holding(opened(module)) == EVERYTHING
    assert all(p.is_meta for p in module.model.layers[0].self_attn.o_proj.parameters())


@pytest.mark.parametrize(
    ("model_type", "config", "causal"),
    [("gpt2", {}, {"": True}), ("bert", {}, {"": False}), ("t5", {}, {"encoder": False, "decoder": True})],
)
def test_causality_is_probed(model_type: str, config: dict[str, Any], causal: dict[str, bool]) -> None:
    assert {s.name: s.causal for s in opened(build(model_type, **config)).stacks} == causal


# ---- how it looks


def test_the_tree_shows_stacks_parts_proofs_and_refusals() -> None:
    shown = repr(opened(build("jamba")))
    for words in (
        "JambaForCausalLM",
        "layers.0  pre-norm",
        "4 heads on 2 key-value heads",
        "48 neurons",
        "4 experts",
    ):
        assert words in shown
    for words in ("mlp.out = down_proj(neurons)", "norm → lm_head", "✓ residual", "– heads"):
        assert words in shown


def test_blocks_that_are_alike_are_folded_and_others_are_not() -> None:
    data = opened(build("llama", layers=4)).to_dict()
    assert [b["layers"] for b in data["stacks"][0]["blocks"]] == [[0, 1, 2, 3]]
    data = opened(build("jamba", layers=4)).to_dict()
    assert [b["layers"] for b in data["stacks"][0]["blocks"]] == [[0, 2], [1, 3]]


def test_a_failed_proof_stands_out_with_its_reason() -> None:
    module = build("llama")
    module.lm_head.forward = lambda x: 2 * nn.functional.linear(x, module.lm_head.weight)
    anatomy = opened(module)
    assert not anatomy.complete
    assert "✗ unembedding" in repr(anatomy)
    assert "head" in anatomy.refusals


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_tree_fits_narrow_and_wide_terminals(width: int) -> None:
    lines = display.text(opened(build("t5")), width).splitlines()
    assert max(map(len, lines)) <= width


def test_json_holds_the_same_facts() -> None:
    anatomy = opened(build("mixtral"))
    data = json.loads(anatomy.to_json())
    assert data == anatomy.to_dict()
    assert data["stacks"][0]["blocks"][0]["mlp"]["mlp"]["experts"] == 4
    assert {p["name"] for p in data["proofs"]} == {p.name for p in anatomy.proofs}
    assert data["refused"] == anatomy.refusals
