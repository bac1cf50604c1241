"""What is lost without a layer is what transformers loses when the layer is really out; the estimates are their formulas."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.statistics import spearman
from pellucid.surgery import layer_importance, remove
from tests.surgery.test_arranging import opened

TEXTS = [
    "the cat sat on the mat and looked at the dog",
    "a bird flew over the house",
    "When Mary and John went to the store",
]


def loss(logits: Tensor, ids: Tensor) -> float:
    return float(-logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gptj", "olmo2", "mixtral"])
def test_a_removed_layer_loses_what_the_shorter_model_loses(family: str) -> None:
    model = opened(family)
    metric = pl.metrics.logit(7)
    found = layer_importance(
        model, pl.Corpus(TEXTS, packed=False), {"seven": (TEXTS[:2], metric)}, parts=["layer", "attn", "mlp"], batch=2
    )
    assert found.loss.dims == ("part", "layer") and found.effect.dims == ("capability", "part", "layer")
    ids = [model.inputs(text).tensors["input_ids"] for text in TEXTS]
    with torch.no_grad():
        plain = [model.module(input_ids=i).logits for i in ids]
        for layer in range(4):
            short = remove(model, layer).module
            made = [short(input_ids=i).logits for i in ids]
            lost = np.mean([loss(m, i) - loss(p, i) for m, p, i in zip(made, plain, ids, strict=True)])
            here = found.sel(part="layer", layer=layer).data
            assert float(here.loss) == pytest.approx(lost, abs=2e-5)
            p, q = (torch.cat([x[0, :-1].log_softmax(-1)[None] for x in [each]])[0] for each in (plain[0], made[0]))
            one = layer_importance(model, pl.Corpus(TEXTS[:1], packed=False)).sel(layer=layer, part="layer").data
            assert float(one.divergence) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-5)
            assert float(one.kept) == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
            seven = np.mean([float(m[0, -1, 7] - c[0, -1, 7]) for m, c in zip(made[:2], plain[:2], strict=True)])
            assert float(here.effect.sel(capability="seven")) == pytest.approx(seven, abs=2e-4)
        for part in ("attn", "mlp"):
            edited = [model.run(i, edits=[pl.Ablate(f"layers.2.{part}.out")]).logits for i in ids]
            lost = np.mean([loss(m, i) - loss(p, i) for m, p, i in zip(edited, plain, ids, strict=True)])
            assert float(found.loss.sel(part=part, layer=2)) == pytest.approx(lost, abs=2e-5)


def test_estimates_are_their_formulas_and_their_agreement_is_said() -> None:
    model = opened("llama")
    found = layer_importance(model, pl.Corpus(TEXTS[:2], packed=False), batch=1)
    values: dict[str, list[list[float]]] = {"block influence": [], "angular distance": [], "relative magnitude": []}
    for text in TEXTS[:2]:
        ids = model.inputs(text).tensors["input_ids"]
        states: list[Tensor] = []
        hooks = [model.module.model.layers[0].register_forward_pre_hook(lambda _, a, s=states: s.append(a[0]))]
        hooks += [
            layer.register_forward_hook(lambda _, __, o, s=states: s.append(o[0] if isinstance(o, tuple) else o))
            for layer in model.module.model.layers
        ]
        with torch.no_grad():
            model.module(input_ids=ids)
        for hook in hooks:
            hook.remove()
        h = [s[0] for s in states]
        cos = [torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(h)]
        values["block influence"].append([float((1 - c).mean()) for c in cos])
        values["angular distance"].append([float(c.arccos().mean() / np.pi) for c in cos])
        values["relative magnitude"].append([float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(h)])  # fmt: skip
    for name, rows in values.items():
        np.testing.assert_allclose(found.estimated.sel(estimate=name), np.mean(rows, 0), rtol=1e-4, atol=1e-6)
        agreement = spearman(np.mean(rows, 0), found.loss.sel(part="layer").values)
        assert float(found.agreement.sel(estimate=name)) == pytest.approx(agreement)
    depth = found.estimated.sel(estimate="prediction depth").values
    lens = pl.lenses.logit_lens(model, TEXTS[0], sites=["layers.0.resid_pre", "layers.*.resid_post"])
    said = lens.top_token.sel(top=0).values if "top" in lens.top_token.coords else lens.top_token.values[..., 0]
    first = (
        layer_importance(model, pl.Corpus(TEXTS[:1], packed=False)).estimated.sel(estimate="prediction depth").values
    )
    settles = [next(i for i in range(5) if all(row[i:] == row[-1])) for row in said.T]
    counted = [settles.count(i + 1) / len(settles) for i in range(4)]
    np.testing.assert_allclose(first, counted, atol=1e-6)
    assert depth.min() >= 0 and depth.sum() <= 1 + 1e-6


def test_a_sink_is_named() -> None:
    model = opened("gpt2")
    direction = torch.zeros(32)
    direction[3] = 1000.0
    bias = model.module.transformer.h[2].mlp.c_proj.bias.detach() + direction
    changed = model.changed(pl.changed.Replaced("transformer.h.2.mlp.c_proj.bias", bias))
    assert layer_importance(changed, TEXTS).data.attrs["sinks"] == [2]
    assert layer_importance(model, TEXTS).data.attrs["sinks"] == []


def test_parts_that_a_layer_lacks_are_nothing_and_bad_questions_one_error() -> None:
    model = opened("llama")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"parts": "layer"}, "expected a list"),
        (model, {"parts": ["head"]}, "expected a list"),
        (model, {"batch": 0}, "at least 1"),
        (model, {"capabilities": ["capitals"]}, "by name"),
        (model, {"capabilities": {"capitals": ("The",)}}, "1 parts"),
        (opened("bert"), {}, "does not predict the next token"),
        (opened("bart"), {}, "does not predict the next token"),
    ]
    for of, options, what in cases:
        with pytest.raises(InputError, match=what):
            layer_importance(of, TEXTS, **options)
    with pytest.raises(InputError, match="two tokens"):
        layer_importance(model, pl.Corpus([[5]], packed=False))
    with pytest.raises(Refused, match="attn"):
        layer_importance(opened("mamba"), TEXTS, parts=["layer", "attn"])
    assert not np.isnan(layer_importance(opened("mamba"), TEXTS).loss).any()
    mixed = layer_importance(opened("jamba"), TEXTS, parts=["attn"]).loss.sel(part="attn").values
    attends = ["attn.out" in b.taps for b in opened("jamba").anatomy.stacks[0].blocks]
    assert np.array_equal(~np.isnan(mixed), attends)
