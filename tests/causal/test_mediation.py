"""Mediation equals its definition computed with plain hooks; concentration, interaction and mitigation on known cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from pellucid import Model, load
from pellucid.causal.mediation import concentration, interaction, mediation
from pellucid.causal.mitigation import mitigating_edits, mitigation, perplexity
from pellucid.causal.professions import profession_prompts, read_professions
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.tasks import Prompts
from tests.tasks.tokenizers import tokenizer as trained
from tests.zoo import build, tokenizer

EVENTS = [
    "went to the store",
    "gave the drink to Paris",
    "is in the city",
    "is in Rome",
    "went to Italy",
    "gave a drink",
]


@pytest.fixture(scope="module")
def gpt2() -> Model:
    module = build("gpt2", layers=3)
    return load(module, tokenizer=tokenizer(module))


def pairs(model: Model, n: int = 6) -> Prompts:
    clean = [f"When Mary {event} and" for event in EVENTS[:n]]
    corrupted = [text.replace("Mary", "John") for text in clean]
    return Prompts.from_pairs(clean, corrupted, [" he"] * n, [" Mary"] * n, model.tokenizer)


def odds(model: Model, text: str) -> Tensor:
    """y = p(" Mary") / p(" he"), from the family's own forward."""
    right, wrong = (model.tokenizer.convert_tokens_to_ids(t) for t in ("▁he", "▁Mary"))
    p = model.module(model.inputs(text).tensors["input_ids"]).logits[0, -1].softmax(-1)
    return p[wrong] / p[right]


def test_indirect_and_direct_effects_of_a_head_follow_their_definition(gpt2: Model) -> None:
    prompts = pairs(gpt2, 3)
    result = mediation(gpt2, prompts)
    layer, head = 1, 2
    projection, where = gpt2.module.transformer.h[layer].attn.c_proj, slice(head * 8, head * 8 + 8)
    effects: dict[str, list[float]] = {"nie": [], "nde": [], "total": []}
    with torch.no_grad():
        for clean, corrupted in zip(prompts.clean, prompts.corrupted, strict=True):
            seen: list[Tensor] = []
            handle = projection.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].clone()))
            null, total = odds(gpt2, clean), odds(gpt2, corrupted)
            handle.remove()

            def put(source: Tensor) -> Tensor:
                def hook(m: nn.Module, a: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                    x = a[0].clone()
                    x[..., where] = source[..., where]
                    return (x, *a[1:])

                return projection.register_forward_pre_hook(hook)

            handle = put(seen[1])
            effects["nie"].append(float(odds(gpt2, clean) / null - 1))
            handle.remove()
            handle = put(seen[0])
            effects["nde"].append(float(odds(gpt2, corrupted) / null - 1))
            handle.remove()
            effects["total"].append(float(total / null - 1))
    assert result.nie.sel(layer=layer, head=head).item() == pytest.approx(np.mean(effects["nie"]), abs=1e-5)
    assert result.nde.sel(layer=layer, head=head).item() == pytest.approx(np.mean(effects["nde"]), abs=1e-5)
    np.testing.assert_allclose(result.total, effects["total"], atol=1e-5)
    for name in ("nie", "nde"):
        np.testing.assert_allclose(result[f"{name}_value"].sel(layer=layer, head=head), effects[name], atol=1e-5)
    logs = np.log1p(effects["nie"]).mean()
    assert result.log_nie.sel(layer=layer, head=head).item() == pytest.approx(logs, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_goes_through_a_cut_of_the_whole_model_is_the_whole_effect(family: str) -> None:
    module = build(family)
    model = load(module, tokenizer=tokenizer(module))
    result = mediation(model, pairs(model), over=["layers.1.resid_post", "layers.0.resid_pre"])
    total = result["total_effect"].item()
    np.testing.assert_allclose(result.nie, total, atol=1e-5)
    np.testing.assert_allclose(result.nde, 0.0, atol=1e-5)
    assert result["total_low"].item() <= total <= result["total_high"].item()


def test_sets_of_heads_neurons_and_layers_act_together(gpt2: Model) -> None:
    prompts = pairs(gpt2)
    everything = [f"layers.{i}.{part}" for i in range(3) for part in ("attn.heads.*", "mlp.out")]
    sets = {"all": [*everything, "embed"], "neurons of 1": "layers.1.mlp.neurons.*", "mlp 1": "layers.1.mlp.out"}
    result = mediation(gpt2, prompts, over=sets)
    assert result.nie.sel(set="all").item() == pytest.approx(result["total_effect"].item(), abs=1e-5)
    assert result.nie.sel(set="neurons of 1").item() == pytest.approx(result.nie.sel(set="mlp 1").item(), abs=1e-5)


def test_neurons_at_a_named_token_are_mediators_of_their_own(gpt2: Model) -> None:
    result = mediation(gpt2, pairs(gpt2), over="layers.*.mlp.neurons.*@changed")
    assert result.nie.dims == ("layer", "neuron")
    assert abs(result.nie.values).max() > 0


def test_concentration_tells_one_from_all_alike() -> None:
    alike = Result(xr.Dataset({"nie": ("head", np.full(10, 0.3))}), kind="mediation")
    one = Result(xr.Dataset({"nie": ("head", np.array([0.0] * 9 + [-2.0]))}), kind="mediation")
    assert concentration(alike)["effective"].item() == pytest.approx(10)
    assert concentration(alike)["half"].item() == 5
    assert concentration(alike)["gini"].item() == pytest.approx(0, abs=1e-9)
    assert concentration(one)["effective"].item() == pytest.approx(1)
    assert concentration(one)["half"].item() == 1
    assert concentration(one)["gini"].item() == pytest.approx(0.9)


def test_prompts_without_a_task_are_named(gpt2: Model) -> None:
    with pytest.raises(InputError, match="needs a task"):
        mediation(gpt2, "The capital of France is")  # type: ignore[arg-type]


def test_greedy_sets_start_with_the_strongest_and_end_with_all(gpt2: Model) -> None:
    prompts = pairs(gpt2)
    result = interaction(gpt2, prompts, k=12, pool=12, draws=2)
    single = mediation(gpt2, prompts).nie.values
    sign = np.sign(result["total_effect"].item())
    assert result.greedy.values[0] == pytest.approx(sign * (sign * single).max(), abs=1e-6)
    assert result.greedy.values[-1] == pytest.approx(result["together"].item(), abs=1e-5)
    assert result.strongest.values[0] == pytest.approx(result.summed.values[0], abs=1e-6)
    assert (sign * result.greedy.values[:6] >= sign * result.random.values[:6] - 1e-6).all()


def test_editing_every_carrier_removes_the_bias_and_has_a_price(gpt2: Model) -> None:
    texts = ["The city of Paris is in France and Rome is in Italy", "John gave a drink to Mary"]
    prompts = pairs(gpt2)
    result = mitigation(gpt2, prompts, texts, over="layers.*.resid_post", sizes=(1, 3), draws=1)
    assert result.bias.sel(size=3).item() == pytest.approx(0.0, abs=1e-5)
    assert result["bias_before"].item() != 0
    assert result.price.sel(size=3).item() != 0
    losses = []
    for text in texts:
        ids = gpt2.inputs(text).tensors["input_ids"]
        losses.append((float(gpt2.module(ids, labels=ids).loss), ids.shape[1] - 1))
    expected = np.exp(sum(loss * n for loss, n in losses) / sum(n for _, n in losses))
    assert result["perplexity_before"].item() == pytest.approx(expected, rel=1e-5)
    ranked = [str(s) for s in result.mediators.values]
    edits = mitigating_edits(gpt2, prompts[:3], ranked[:1])
    assert perplexity(gpt2, texts, edits) == pytest.approx(result.perplexity.sel(size=1).item(), rel=1e-5)


def test_professions_of_a_file_become_aligned_pairs(tmp_path: Path) -> None:
    path = tmp_path / "professions.json"
    rows = [
        ["nurse", 0.0, -0.9],
        ["mechanic", 0.0, 0.8],
        ["actress", -1.0, -0.5],
        ["singer", 0.0, 0.0],
        ["vice_chair", 0, 0.3],
    ]
    path.write_text(json.dumps(rows))
    assert read_professions(path) == {"nurse": " she", "mechanic": " he", "vice chair": " he"}
    prompts = profession_prompts(trained("byte-bpe"), path, 4, swap="opposite", seed=1)
    for clean, corrupted, answer in zip(prompts.clean, prompts.corrupted, prompts.answers, strict=True):
        named = ("nurse", "mechanic") if answer == " she" else ("mechanic", "nurse")
        assert named[0] in clean
        assert named[1] in corrupted
    with pytest.raises(InputError, match="is no list of professions"):
        read_professions(_written(tmp_path / "bad.json", "[1, 2]"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
