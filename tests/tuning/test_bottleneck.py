"""Concepts as a bottleneck: only they go on, in every kind of model; leaks and an unused layer are found by name."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError, Refused
from pellucid.tuning.concepts import Narrow
from pellucid.tuning.data import Encoded
from pellucid.tuning.leaks import measures
from tests.tuning.test_fit import KINDS, QUICK, data, equal, opened, weights
from tests.zoo import build, tokenizer


def told(family: str, n: int = 8) -> tu.Rationales:
    """The first concept is the label; the second is length."""
    given = data("text" if family == "gpt2" else KINDS[family], n=n)
    he, long = [t.startswith("he") for t in given.texts], [" and " in t for t in given.texts]
    return dataclasses.replace(given, properties={"he": he, "long": long})


@pytest.mark.parametrize("family", KINDS)
def test_only_concepts_go_on_in_every_kind_of_model(family: str, tmp_path: Path) -> None:
    model, given = opened(family), told(family)
    before = weights(model)
    made = tu.fit(model, given, tu.Bottleneck(kind="joint", mix=0.5), control=False, **QUICK)
    assert equal(before, weights(model)) and not made.changed
    learnt: Any = made.objectives["objective"][0]
    encoded = Encoded(made.model, given)
    batch = encoded.batch(range(8))
    held = torch.zeros(8, 2)
    same = [batch.read(made.model.run(b.inputs, edits=[learnt.narrow(made.model, held)]).logits)
            for b in (batch, batch.with_ids(batch.ids.where(~batch.content, batch.ids.flip(0))))]  # fmt: skip
    assert torch.equal(*same)  # whatever the words, only the concepts count
    other = batch.read(made.model.run(batch.inputs, edits=[learnt.narrow(made.model, torch.eye(2)[[0] * 8])]).logits)
    assert not torch.equal(same[0], other)
    # saved, loaded, and tied to its weights
    loaded = tu.Bottleneck.load(learnt.save(tmp_path / "concepts.safetensors"))
    loaded.check(made.model)
    assert loaded.names == learnt.names == ["he", "long"]
    a, b = (made.model.run(batch.inputs, edits=e.edits(made.model)).logits for e in (learnt, loaded))
    assert torch.equal(a, b)
    if family != "lora":  # whose adapters are no changes of the weights alone
        again, edits = tu.load_tuned(model, made.save(tmp_path / "tuned"))
        assert torch.equal(again.run(batch.inputs, edits=edits).logits, a)
    with pytest.raises(InputError, match="belongs to other weights"):
        loaded.check(model)
    with pytest.raises(InputError, match="belongs to other weights"):
        model.run(batch.inputs, edits=loaded.edits(model))


def test_the_edit_is_its_formula_under_padding_on_either_side() -> None:
    model = opened("bert-class")
    encoded = Encoded(model, told("bert-class"))
    learnt: Any = tu.Bottleneck(hard=False, residual=3).begun(model, encoded, 0)
    learnt.parameters["head.concepts"].normal_(generator=torch.Generator().manual_seed(1))
    batch, p = encoded.batch(range(4)), learnt.state_["tensors"]
    edit = learnt.narrow(model)
    run = model.run(batch.inputs, keep=["layers.1.resid_post"], edits=[edit])
    clean = model.run(batch.inputs, keep=["layers.1.resid_post"])
    for b in range(4):
        n = int(batch.inputs.stream("").lengths[b])
        h = clean.tensor("layers.1.resid_post")[b, :n].mean(0)
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() / len(h) ** 0.5
        z = 1 / (1 + torch.exp(-(p["head.concepts"] @ h + p["head.bias"])))
        new = p["fixed.mean"] + p["fixed.spread"] * (
            p["head.base"] + (z - 0.5) @ p["head.out"] + (p["head.down"] @ h) @ p["head.up"]
        )
        assert torch.allclose(run.tensor("layers.1.resid_post")[b, :n], new.expand(n, -1), atol=1e-5)
    module = build("llama")
    decoder = pl.load(module, tokenizer=tokenizer(module))
    learnt = tu.Bottleneck().begun(decoder, Encoded(decoder, told("lora")), 0)
    texts = ["he is in Rome", "Mary is in Paris and"]
    left = decoder.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    alone = [decoder.run(t, edits=learnt.edits(decoder)).logits[0, -1] for t in texts]
    together = decoder.run(dict(left), edits=learnt.edits(decoder)).logits[:, -1]
    assert torch.allclose(torch.stack(alone), together, atol=1e-4)


@cache
def fitted() -> tu.Tuned:
    return tu.fit(opened("bert-class"), told("bert-class", 16), tu.Bottleneck(kind="joint", residual=2), control=False,
                  **QUICK | {"steps": 15, "batch": 16})  # fmt: skip


def by_construction(residual: bool) -> tuple[pl.Model, Any, Encoded]:
    """Concept `he` drives the answer, or the residual does (and the concepts do nothing)."""
    model, own = fitted().model, fitted().objectives["objective"][0]
    learnt: Any = dataclasses.replace(own)
    learnt.state_.update(own.state_, tensors=dict(own.state_["tensors"]))
    name = "head.out" if residual else "head.up"
    learnt.state_["tensors"][name] = torch.zeros_like(learnt.parameters[name])
    return model, learnt, Encoded(model, told("bert-class", 16))


def test_what_carries_the_answer_is_found() -> None:
    model, learnt, encoded = by_construction(residual=True)
    found = measures(model, learnt, encoded, encoded, 0)
    assert found["concepts_at_mean"] == found["accuracy"] == found["with_true"] == found["with_another_texts"]
    assert found["ceiling"] == 1.0 and found["concept_auc"] > 0.9
    model, learnt, encoded = by_construction(residual=False)
    found = measures(model, learnt, encoded, encoded, 0)
    assert found["residual_at_mean"] == found["accuracy"]


def frame(**measured: tuple[float, float]) -> Any:
    import xarray as xr

    return xr.Dataset({"measured": (("arm", "measure"), np.array([*zip(*measured.values(), strict=True)]))},
                      {"arm": ["objective", "control"], "measure": list(measured)})  # fmt: skip


def test_unused_concepts_and_leaks_are_said_first() -> None:
    b = tu.Bottleneck(residual=8)
    said = b.said(frame(accuracy=(0.73, 0.75), concepts_at_mean=(0.74, 0.75), residual_at_mean=(0.5, 0.48), with_true=(0.72, 0.75),
                        with_another_texts=(0.73, 0.75), concept_auc=(0.94, 0.53), ceiling=(0.69, 0.69)), 1200)  # fmt: skip
    assert said[0].startswith("the concepts are not used: shuffled concepts do as well (0.75 against 0.73)")
    said = tu.Bottleneck().said(frame(accuracy=(0.785, 0.5), concepts_at_mean=(0.5, 0.5), with_true=(0.38, 0.5), with_another_texts=(0.45, 0.5),
                                      concept_auc=(0.42, 0.5), ceiling=(0.69, 0.69)), 1200)  # fmt: skip
    assert (
        said[0].startswith("it leaks: told the true concepts, accuracy falls from 0.79 to 0.38")
        and "more than true" in said[1]
    )


def test_interventions_and_their_control() -> None:
    model, learnt, _ = by_construction(residual=False)
    given = told("bert-class", 16)
    plain = tu.interventions(model, given, learnt)
    broken = tu.interventions(model, given, learnt, flipped=["he"], share=0.5, order=["he"])
    assert plain.data["accuracy"].dims == ("source", "known") and plain.data.sizes["known"] == 3
    rises = broken.data["accuracy"].sel(source="true").values
    assert rises[-1] >= rises[0] and (plain.data["low"] <= plain.data["accuracy"]).all()
    for wrong, words in {"order": "sideways", "flipped": ["hee"]}.items():
        with pytest.raises(InputError, match="expected 'random'|no concept 'hee'.*he"):
            tu.interventions(model, given, learnt, **{wrong: words})


def test_bad_input_of_bottlenecks() -> None:
    model, given = opened("bert-class"), told("bert-class")
    same = dataclasses.replace(given, properties={"he": [True] * 8})
    for error, match, objective, texts in [
        (InputError, "names no concepts", tu.Bottleneck(), data()),
        (InputError, "no concept 'hee'", tu.Bottleneck(["hee"]), given),
        (InputError, "alike in all texts", tu.Bottleneck(), same),
        (
            InputError,
            "besides true and false",
            tu.Bottleneck(),
            dataclasses.replace(given, properties={"he": [2, 0] * 4}),
        ),
        (pl.errors.SiteError, "layers", tu.Bottleneck(layer=9), given),
        (Refused, "task='classification'", tu.Bottleneck(), None),
    ]:
        with pytest.raises(error, match=match):
            tu.fit(model if texts is not None else opened("bert"), texts or given, objective, **QUICK)
    with pytest.raises(InputError, match="of kind='joint' only"):
        tu.Bottleneck(mix=0.5)
    with pytest.raises(InputError, match="was not fitted"):
        tu.Bottleneck(["he"]).edits(model)
    with pytest.raises(InputError, match="was not tuned with a Bottleneck"):
        tu.interventions(model, given, tu.fit(model, given, (), **QUICK))


def test_bfloat16_unknown_concepts_and_an_interrupted_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = pl.load(build("gpt2", dtype=torch.bfloat16), tokenizer=tokenizer(None))
    given = told("gpt2")
    given = dataclasses.replace(given, properties=given.properties | {"long": [None, *given.properties["long"][1:]]})
    made = tu.fit(half, given, tu.Bottleneck(residual=2), control=False, **QUICK)
    assert np.isfinite(float(made.result.data["measured"].sel(arm="objective", measure="concept_auc")))
    whole = tu.fit(opened("bert-class"), told("bert-class"), tu.Bottleneck(), control=False, **QUICK)
    own, calls = tu.Bottleneck.loss, 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(tu.Bottleneck, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tu.fit(opened("bert-class"), told("bert-class"), tu.Bottleneck(), control=False, checkpoint=tmp_path, **QUICK)
    monkeypatch.undo()
    again = tu.fit(
        opened("bert-class"), told("bert-class"), tu.Bottleneck(), control=False, checkpoint=tmp_path, **QUICK
    )
    assert equal(weights(whole.model), weights(again.model))
    a, b = (dict(each.objectives["objective"][0].parameters) for each in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert isinstance(again.edits[0], Narrow)
