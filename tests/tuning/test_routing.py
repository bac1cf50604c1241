"""Routed gradients are those of every text by itself with the others' parts shut by hand; parts without texts keep every bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError
from pellucid.training import draws
from pellucid.tuning.data import Encoded
from pellucid.tuning.fit import terms
from tests.tuning.test_fit import QUICK, data, opened, weights
from tests.tuning.test_trainer import Norms, arguments

HALVES = {"a": tu.Only(neurons={1: range(24)}), "b": tu.Only(neurons={1: range(24, 48)})}


def topics(n: int = 8, labels: Any = True, b: tuple[int, ...] = (1, 4, 5)) -> tu.Rationales:
    return replace(data(labels, n=n), properties={"topic": ["b" if i in b else "a" for i in range(n)]})


def test_routed_gradients_are_those_of_texts_one_by_one() -> None:
    model, given = opened("bert-class"), topics()
    module, encoded = model.module, Encoded(model, given)
    named = dict(module.named_parameters())
    with torch.enable_grad():
        found = terms(model, encoded, encoded.batch(range(8)), [tu.Route("topic", HALVES)], 0, 0)
        ours = torch.autograd.grad(found["task"], list(named.values()), allow_unused=True)
    block = module.bert.encoder.layer[1]
    slow = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(8):
        shut = slice(0, 24) if given.properties["topic"][i] == "b" else slice(24, 48)

        def cut(m: Any, args: Any, x: torch.Tensor, shut: slice = shut) -> torch.Tensor:
            return torch.cat(
                [x[..., k : k + 24].detach() if k == shut.start else x[..., k : k + 24] for k in (0, 24)], -1
            )

        hook = block.intermediate.register_forward_hook(cut)
        with torch.enable_grad():
            loss = module(**encoded.rows[i].tensors, labels=torch.tensor([encoded.labels[i]])).loss / 8
            grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
        hook.remove()
        grads["bert.encoder.layer.1.output.dense.weight"][:, shut] = 0
        for name, g in grads.items():
            slow[name] += 0 if g is None else g
    for name, g in zip(named, ours, strict=True):
        assert g is None or torch.allclose(g, slow[name], atol=1e-7), name
    up = slow["bert.encoder.layer.1.intermediate.dense.weight"]
    assert up.any(1).all()  # every neuron has somebody's texts


def test_a_part_whose_texts_do_not_come_keeps_every_bit_weight_decay_included() -> None:
    (first,) = draws(8, 4, 1, 0)[:1]
    rare = next(i for i in range(8) if i not in first.tolist())
    model = opened("bert-class")
    made = tu.fit(
        model, topics(b=(rare,)), tu.Route("topic", HALVES), control=False, weight_decay=0.5, **QUICK | {"steps": 1}
    )
    for arm, same in (("objective", True), ("plain", False)):
        new = weights(made.arms[arm])
        for name, part in (("intermediate.dense.weight", 0), ("output.dense.weight", 1)):
            old, now = (w[f"bert.encoder.layer.1.{name}"] for w in (weights(model), new))
            moved = (old != now).any(1 - part)
            assert moved[:24].all() and bool(moved[24:].any()) != same
    found = tu.parts_off(made.model, topics(), "topic", HALVES)
    assert found.data["off"].values.tolist() == ["nothing", "a", "b", "random"] and "part" in found.title.lower()
    assert float(found.data["lost"].sel(off="nothing").max()) == 0.0


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_kinds_are_routed_and_accumulated(family: str, tmp_path: Path) -> None:
    given = topics(16, {"gpt2": None, "t5": "text"}[family])
    route = tu.Route("topic", {"b": tu.Only(heads={1: [0]}), "a": tu.Only(neurons={0: [0, 1]})})
    found = []
    for batch, times in ((16, 1), (4, 4)):
        norms = Norms()
        tu.trainer(opened(family), given, route, arguments(tmp_path, batch, times), callbacks=[norms]).train()
        found.append(norms.found[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_weights_come_near_and_what_cannot_be_routed_is_an_error() -> None:
    made = tu.fit(opened("gpt2"), data(None), tu.Locality(weight=20.0), **QUICK | {"steps": 6})
    after = {a: made.result.data["after"].sel(arm=a).item() for a in ("plain", "objective", "control")}
    assert after["objective"] < after["plain"] - 0.02 and after["control"] > after["objective"] + 0.01
    model = opened("bert-class")
    for route, said in (
        (tu.Route("kind", HALVES), "none of that name"),
        (tu.Route("topic", HALVES | {"c": tu.Only(layers=[0])}), "no text has topic 'c'"),
        (tu.Route("topic", HALVES | {"b": tu.Only(neurons={1: [3]})}), "two parts share entries"),
        (tu.Route("topic", {"b": tu.Only(neurons={1: [99]})}), "expected some of 0 to"),
    ):
        with pytest.raises(InputError, match=said):
            tu.fit(model, topics(), route, **QUICK)
    with pytest.raises(InputError, match="alone is trained"):
        tu.fit(opened("lora"), topics(8, "text"), tu.Route("topic", {"b": tu.Only(neurons={1: [0]})}), **QUICK)


def test_several_questions_with_one_head_are_each_over_classes_of_their_own() -> None:
    """As with a head for each: the others' rows of the head have no gradient, and no answer is one of theirs."""
    config = opened("bert-class").module.config.to_dict() | {"num_labels": 4}
    torch.manual_seed(0)
    module = transformers.BertForSequenceClassification(transformers.BertConfig(**config)).eval()
    model = pl.load(module, tokenizer=opened("bert-class").tokenizer)
    given = data(n=4)
    second = replace(given, labels=[2 + y for y in given.labels or ()], among=[[2, 3]] * 4)
    encoded = Encoded(model, second)
    with torch.enable_grad():
        found = terms(model, encoded, encoded.batch(range(4)), [], 0, 0)["task"]
        (g,) = torch.autograd.grad(found, [module.classifier.weight])
    with torch.no_grad():
        z = torch.cat([module(**row.tensors).logits for row in encoded.rows])[:, 2:]
    assert float(found) == pytest.approx(
        float(torch.nn.functional.cross_entropy(z, torch.tensor(given.labels))), rel=1e-5
    )
    assert not g[:2].any() and g[2:].any()
    lost = tu.parts_off(model, replace(second, properties={"topic": ["a"] * 4}), "topic", {"a": HALVES["a"]})
    assert float(lost.data["accuracy"].sel(off="nothing")[0]) == float(
        (z.argmax(1) == torch.tensor(given.labels)).float().mean()
    )
    with pytest.raises(InputError, match="which is not among"):
        tu.fit(model, replace(second, among=[[0, 1]] * 4), (), **QUICK)
    with pytest.raises(InputError, match="says tokens"):
        tu.fit(opened("gpt2"), replace(data(None, n=4), among=[[0]] * 4), (), **QUICK)
