"""Roles are read off where heads look, and off what they copy; the view shows what is in the circuit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pellucid.circuits import Circuit, head_roles, wire
from pellucid.circuits.nodes import graph_of
from pellucid.errors import InputError
from pellucid.tasks import indirect_objects
from pellucid.views import document, save_html

from .programs import previous_token, random_model


def test_the_head_written_to_look_back_one_token_is_named_previous_token() -> None:
    model = previous_token()
    roles = head_roles(model, length=2)
    assert roles.role.values.tolist() == [["", "previous token"], ["", ""]]
    assert float(roles.previous.sel(layer=0, head=1)) == pytest.approx(1.0)
    assert float(roles.previous.sel(layer=1, head=0)) == pytest.approx(roles.data.attrs["chance"], rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_copying_is_what_value_and_output_matrices_alone_predict(kind: str) -> None:
    model = random_model(kind)
    words = [" Paris", " Rome", " Mary", " John"]
    copy = head_roles(model, words=words, length=8, top=5).copy
    module, graph = model.module, wire(model).graph
    share = sum(s.kv == 0 for s in graph.sources if s.layer == 0)
    ids = model.inputs(words).stream("").ids[:, -1]
    with torch.no_grad():
        x = model.run(words, keep="layers.0.resid_post").tensor("layers.0.resid_post")[:, -1]
        for head in range(4):
            if kind == "gpt2":
                block, e = module.transformer.h[1], 8
                v = block.attn.c_attn(block.ln_1(x))[:, 2 * 32 + head * e : 2 * 32 + (head + 1) * e]
                logits = module.lm_head(
                    module.transformer.ln_f(v @ block.attn.c_proj.weight[head * e : (head + 1) * e])
                )
            else:
                block = module.model.layers[1]
                e, group = block.self_attn.head_dim, head // share
                v = block.self_attn.v_proj(block.input_layernorm(x))[:, group * e : (group + 1) * e]
                logits = module.lm_head(
                    module.model.norm(v @ block.self_attn.o_proj.weight.T[head * e : (head + 1) * e])
                )
            top = logits.topk(5).indices
            assert float(copy.sel(layer=1, head=head)) == pytest.approx(
                float((top == ids[:, None]).any(1).float().mean())
            )


def test_prompts_without_names_are_refused() -> None:
    model = random_model("gpt2")
    task = indirect_objects.__globals__["Prompts"].from_pairs(
        ["Mary gave"], ["John gave"], [" John"], [" Mary"], model.tokenizer
    )
    with pytest.raises(InputError, match="no span IO, S1, S2"):
        head_roles(model, task, length=8)


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    graph = graph_of(random_model("llama").anatomy)
    made = Circuit.from_edges(graph, ["embed -> 0.1.k", "0.1 -> 1.2.q", "1.2 -> logits"], how="zero")
    made.scores[graph.edge("0.1 -> 1.2.q")] = 2.0
    made.scores[graph.edge("1.2 -> logits")] = -1.0
    return made


def test_the_view_has_each_edge_with_its_sign_and_asks_for_nothing_from_outside(
    circuit: Circuit, tmp_path: Path
) -> None:
    shown = document(circuit).data
    edges = zip(
        shown.sources.array().tolist(), shown.targets.array().tolist(), shown.scores.array().tolist(), strict=True
    )
    found = {(shown.nodes[int(a)].component, shown.nodes[int(b)].component): score for a, b, score in edges}
    assert found["layers.0.attn.heads.1", "layers.1.attn.heads.2"] == 2.0
    assert found["layers.1.attn.heads.2", "logits"] == -1.0
    assert "3 of 82 edges" in shown.about
    assert "switched off by zero" in shown.about
    page = save_html(tmp_path / "circuit.html", circuit, title="<script>x</script>").read_text()
    assert "<script>x" not in page
