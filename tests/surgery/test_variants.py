"""Variants side by side are the variants' own models, routes are slow loops over tokens, and a planted gate is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.changed import Added
from pellucid.errors import InputError, Refused
from pellucid.surgery import Gate, chosen_variants, ensemble
from tests.surgery.test_arranging import opened
from tests.surgery.test_stitch import TEXTS


def changed(model: pl.Model, seed: int, layer: int = 1) -> pl.Model:
    """Another version of one layer."""
    block = model.anatomy.stacks[-1].blocks[layer]
    name = next(n for n, p in model.module.named_parameters() if n.startswith(block.module + ".") and p.ndim == 2)
    p = dict(model.module.named_parameters())[name]
    generator = torch.Generator().manual_seed(seed)
    return model.changed(
        Added(name, torch.randn(p.shape[0], 2, generator=generator), torch.randn(2, p.shape[1], generator=generator))
    )


def loss(model: pl.Model, text: str, edits: tuple = ()) -> torch.Tensor:
    run = model.run(text, edits=edits)
    return -run.logits[0, :-1].log_softmax(-1).gather(1, run.inputs.stream("").ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "falcon", "gptj"])
def test_each_variant_alone_is_its_model_and_the_mean_is_a_run_with_the_mean_put_in(family: str) -> None:
    model = opened(family)
    variants = {"a": changed(model, 1), "b": changed(model, 2), "model": model}
    found = ensemble(model, variants, pl.Corpus(TEXTS[:2], packed=False), layers=[1, 2], draws=1)
    for name, each in variants.items():
        truth = torch.cat([loss(each, text) for text in TEXTS[:2]]).mean()
        assert float(found.data.nll.sel(route=name)) == pytest.approx(float(truth), abs=2e-5)
    lost = []
    for text in TEXTS[:2]:
        states = [m.run(text, keep=["layers.2.resid_post"]).tensor("layers.2.resid_post") for m in variants.values()]
        lost.append(loss(model, text, (pl.Patch("layers.2.resid_post", torch.stack(states).mean(0)),)))
    assert float(found.data.nll.sel(route="mean")) == pytest.approx(float(torch.cat(lost).mean()), abs=2e-5)
    assert (
        float(found.data.nll.sel(route="oracle per token")) <= float(found.data.nll.sel(route="oracle per text")) + 1e-9
    )
    np.testing.assert_allclose(found.data.taken[:-2].sum("variant"), 1)


def test_confidence_takes_the_lower_entropy_after_the_next_block_token_by_token() -> None:
    model = opened("llama")
    variants = {"a": changed(model, 1), "b": changed(model, 2)}
    found = chosen_variants(model, variants, TEXTS[0], layers=1)
    ids = model.inputs(TEXTS[0]).tensors["input_ids"]
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (3, 0)),
    }
    assert (chosen_variants(model, variants, padded, layers=1).data.chosen == found.data.chosen).all()
    states = [m.run(TEXTS[0], keep=["layers.1.resid_post"]).tensor("layers.1.resid_post") for m in variants.values()]
    entropy = []
    for state in states:
        after = model.run(
            TEXTS[0], edits=[pl.Patch("layers.1.resid_post", state)], keep=["layers.2.resid_post"]
        ).tensor("layers.2.resid_post")
        p = pl.lenses.unembed(model, after)[0].softmax(-1)
        entropy.append(-(p * p.log()).sum(-1))
    chosen = torch.stack(entropy).argmin(0)
    assert found.data.chosen.values.tolist() == chosen.tolist() and 0 < int(chosen.sum()) < len(chosen)
    mixed = torch.where(chosen[None, :, None] == 0, *states)
    np.testing.assert_allclose(
        found.data.nll[:-1], loss(model, TEXTS[0], (pl.Patch("layers.1.resid_post", mixed),)).detach(), atol=2e-5
    )
    assert "<" in found._repr_html_()


def test_a_gate_learns_what_its_texts_show_stands_beside_chance_and_is_kept(tmp_path: Path) -> None:
    model = opened("gpt2")
    variants = {"a": changed(model, 1), "b": changed(model, 2)}
    gate = Gate(penalty=0.01).fit(model, variants, TEXTS, layers=1)
    assert gate.right_ > 0.7
    found = ensemble(model, variants, TEXTS, layers=1, gate=gate, tokens=300)
    assert float(found.data.gain.sel(route="gate")) > 0 and float(found.data.gain.sel(route="random")) == 0
    assert 0 < float(found.data.taken.sel(route="gate", variant="a")) < 1
    kept = Gate.load(gate.save(tmp_path / "gate.safetensors"))
    kept.check(model, variants)
    assert torch.equal(kept.scores(torch.ones(2, 32)), gate.scores(torch.ones(2, 32))) and kept.right_ == gate.right_
    with pytest.raises(InputError, match="is no Gate"):
        Gate.load(Path(__file__))
    with pytest.raises(InputError, match="not fitted"):
        Gate().save(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="chooses between"):
        gate.check(model, {"b": variants["b"], "a": variants["a"]})
    with pytest.raises(InputError, match="other weights"):
        gate.check(variants["a"], variants)


def test_what_cannot_stand_side_by_side_is_refused() -> None:
    model = opened("llama")
    a, b = changed(model, 1), changed(model, 2)
    for said, work in {
        "two or more": lambda: ensemble(model, {"a": a}, TEXTS, layers=1),
        "differs outside": lambda: ensemble(model, {"a": a, "b": changed(model, 3, layer=2)}, TEXTS, layers=1),
        "own after them": lambda: ensemble(model, {"a": a, "b": b}, TEXTS, layers=[2, 3]),
        "expected neighbours": lambda: ensemble(model, {"a": a, "b": b}, TEXTS, layers=[0, 2]),
        "needs gate": lambda: ensemble(model, {"a": a, "b": b}, TEXTS, layers=1, routes=["gate"]),
        "needs gate=Gate": lambda: ensemble(model, {"a": a, "b": b}, TEXTS, layers=1, gate="mine"),  # type: ignore[arg-type]
        "layers=..:": lambda: ensemble(model, {"a": a, "b": b}, TEXTS, layers=[]),
        "chooses nothing": lambda: chosen_variants(model, {"a": a, "b": b}, "The", layers=1, route="mean"),
    }.items():
        with pytest.raises(InputError, match=said):
            work()
    kinds = opened("gemma3_text")  # a sliding and a full layer that changed places would be given each other's masks
    with pytest.raises(Refused, match="layer_types"):
        ensemble(kinds, {"a": kinds, "b": pl.surgery.swap(kinds, 0, 1)}, TEXTS, layers=[0, 1])
    with pytest.raises(Refused, match="one is a"):
        ensemble(model, {"a": a, "b": opened("gpt2")}, TEXTS, layers=1)
    for family in ("bert", "t5"):
        other = opened(family)
        with pytest.raises(Refused, match="left to right"):
            ensemble(other, {"a": other, "b": other}, TEXTS, layers=1)
