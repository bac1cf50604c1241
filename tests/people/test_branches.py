"""What is written reaches the stream, and every reader of it is known: A21, A22."""

from __future__ import annotations

import pytest
import torch

from pellucid.causal.contrast import ask
from pellucid.circuits import Circuit
from pellucid.circuits.execution import Runner, wire
from pellucid.errors import Refused
from tests.matrix.hand import FAMILIES

from .cases import CLEAN, DIFFERENCE, close, difference, opened

FAMILIES_WITH_SCALES = ["granite", "cohere", "gemma2", "gemma3_text", "olmo2", "llama"]


@pytest.mark.parametrize("family", FAMILIES_WITH_SCALES)
def test_what_heads_write_sums_to_what_the_attention_adds(family: str) -> None:
    """A21: scales and norms behind the output projection included: the stream after less the stream before."""
    model = opened(family)
    heads = [f"layers.0.attn.heads.{h}.out" for h in range(4)]
    keep = [*heads, "layers.0.attn.out"]
    run = model.run(CLEAN, keep=keep)
    total = sum(run.tensor(h) for h in heads)
    block = model.module.get_submodule("model.layers.0")
    seen = {}
    handles = [
        block.register_forward_hook(lambda m, a, out: seen.update(whole=out[0] if isinstance(out, tuple) else out)),
    ]
    ids = torch.tensor([model.tokenizer(CLEAN)["input_ids"]])
    with torch.no_grad():
        model.module(ids)
        whole = seen["whole"]
        projection = block.get_submodule("self_attn.o_proj")
        quiet = projection.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        mlp = block.get_submodule("mlp")
        handles += [quiet]
        if family in ("cohere",):  # a parallel block: the MLP does not hear the attention
            model.module(ids)
            wanted = whole - seen["whole"]
        else:  # both runs with a silent MLP, so that only the attention differs
            handles.append(mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out)))
            model.module(ids)
            without = seen["whole"]
            quiet.remove()
            model.module(ids)
            wanted = seen["whole"] - without
    for handle in handles:
        handle.remove()
    assert close(run.tensor("layers.0.attn.out"), wanted, 1e-4)
    bias = wanted[0] - total.reshape(wanted[0].shape)  # what no head writes: a bias of the projection
    assert close(bias, bias[:1].expand_as(bias), 1e-4)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "llama", "granite"])
def test_all_edges_of_a_part_are_the_part(family: str) -> None:
    """A22: an MLP with every edge off is that MLP silenced, so no reader of the stream is missing."""
    model = opened(family)
    place = FAMILIES.get(family, FAMILIES["llama"])
    mlp = model.module.get_submodule(f"{place.block(0)}.{place.mlp}")
    handle = mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer(CLEAN)["input_ids"]])
        silent = difference(model.module(ids).logits[0, -1])
        handle.remove()
        whole = difference(model.module(ids).logits[0, -1])
    try:
        wiring = wire(model)
    except Refused as error:
        assert "reads the stream" in str(error) and "gates" in str(error)  # the gate of gated attention, by name
        return
    graph = wiring.graph
    without = Circuit.whole(graph).without(["layers.0.mlp"])
    runner = Runner.of(wiring, ask(model, CLEAN, DIFFERENCE, None), "zero", 0)
    both = runner.scores(torch.stack([graph.possible, without.on]))
    assert [float(both[0]), float(both[1])] == pytest.approx([whole, silent], abs=1e-4)
