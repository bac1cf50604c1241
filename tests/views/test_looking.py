"""Attention views: every stack of a model, nothing but the smallest weights lost, heads named by what they measurably do."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import pellucid as pl
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import looking
from pellucid.views import schema as s
from pellucid.views.documents import document
from tests.zoo import build as tiny
from tests.zoo import tokenizer

PROMPT = "The capital of France is"


def opened(model_type: str) -> pl.Model:
    module = tiny(model_type)
    return pl.load(module, tokenizer=tokenizer(module))


def patterns(values: np.ndarray) -> Result:
    dims = ("layer", "head", "query", "key")
    data = xr.DataArray(values, {d: range(n) for d, n in zip(dims, values.shape, strict=True)}, dims, "pattern")
    return Result(data, kind="attention patterns")


def causal(layers: int, heads: int, n: int, sharp: float, seed: int = 0) -> np.ndarray:
    logits = sharp * np.random.default_rng(seed).normal(size=(layers, heads, n, n))
    logits = np.where(np.tril(np.ones((n, n), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def unpacked(stack: s.Looking) -> np.ndarray:
    """[head, query, key] as the page reads it."""
    if stack.pattern is not None:
        return stack.pattern.array()
    assert stack.rows is not None
    counts = stack.rows.counts.array()
    out = np.zeros((len(stack.heads), len(stack.queries), len(stack.keys)))
    heads, queries = (np.repeat(i.ravel(), counts.ravel()) for i in np.indices(counts.shape))
    out[heads, queries, stack.rows.keys.array()] = stack.rows.weights.array()
    return out


@pytest.mark.parametrize(("n", "sharp"), [(9, 1.0), (400, 1.0), (400, 4.0)])
def test_a_pattern_loses_nothing_but_what_lies_below_its_floor(n: int, sharp: float) -> None:
    values = causal(3, 4, n, sharp)
    (stack,) = looking.attention(patterns(values)).stacks
    floor = stack.rows.floor if stack.rows is not None else 0.0
    assert (stack.rows is None) == (values.size <= looking.DENSE) and stack.left_out == 0
    read, truth = unpacked(stack), values.reshape(-1, n, n)
    np.testing.assert_allclose(read, np.where(truth >= floor, truth, 0.0), atol=0.5001 / 255 + 1e-7)


def test_the_patterns_of_a_long_prompt_stay_small_whatever_the_heads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "DENSE", 2_000)
    monkeypatch.setattr(looking, "ENTRIES", 3_000)
    values = causal(3, 4, 100, 0.1)  # nearly even: what is hardest to leave out
    (stack,) = looking.attention(patterns(values), first=(0, 2)).stacks
    assert stack.rows is not None and len(stack.rows.keys.array()) <= 3_000
    assert stack.left_out == 12 - len(stack.heads) > 0
    asked = stack.heads[stack.first]
    assert (asked.layer, asked.head) == (0, 2)


def test_of_too_many_heads_those_that_look_at_one_place_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "DENSE", 4 * 60 * 60)
    monkeypatch.setattr(looking, "ENTRIES", 1_000)
    values = np.full((2, 4, 60, 60), 1 / 60, np.float32)
    values[0] = np.eye(60)[0]
    (stack,) = looking.attention(patterns(values)).stacks
    assert {h.layer for h in stack.heads} == {1} and stack.left_out == 4


def test_an_encoder_decoder_shows_its_three_attentions_each_with_its_rollout() -> None:
    model = opened("t5")
    found = pl.attention.patterns(model, PROMPT, decoder="Paris is")
    shown = pl.views.attention(
        found,
        pl.attention.rollout(model, PROMPT, decoder="Paris is"),
        pl.attention.flow(model, PROMPT, decoder="Paris is", queries=-1),
    )
    assert isinstance(shown.data, s.Attention)
    stacks = {stack.name: stack for stack in shown.data.stacks}
    assert list(stacks) == ["decoder to encoder", "encoder", "decoder"]
    cross = stacks["decoder to encoder"]
    assert cross.heads[0].component == "decoder.layers.0.cross.heads.0"
    assert len(cross.queries) < len(cross.keys) == len(stacks["encoder"].queries)
    np.testing.assert_allclose(unpacked(cross), found["cross"].values.reshape(unpacked(cross).shape), atol=2e-3)
    assert [f.name for f in cross.flows] == ["rollout", "rollout of even attention", "flow"]
    flow = cross.flows[2].values.array()
    assert np.isnan(flow[:-1]).all() and np.isfinite(flow[-1]).all()  # asked of the last query only
    assert [f.name for f in stacks["encoder"].flows] == ["rollout", "rollout of even attention"]


def test_rollout_of_another_prompt_is_refused() -> None:
    model = opened("llama")
    with pytest.raises(InputError, match="other tokens"):
        pl.views.attention(pl.attention.patterns(model, PROMPT), pl.attention.rollout(model, "When Mary went to the"))


def summaries(**scores: list[list[float]]) -> Result:
    data = xr.Dataset(
        {name: (("layer", "head"), np.array(v)) for name, v in scores.items()}
        | {f"{name}_chance": ("layer", np.full(len(v), 0.05)) for name, v in scores.items()},
        coords={"layer": range(1), "head": range(4)},
    )
    return Result(data, kind="head summaries")


def test_a_head_is_called_after_what_it_does_far_above_chance() -> None:
    found = summaries(induction=[[0.9, 0.1, 0.4, 0.0]], duplicate=[[0.5, 0.0, 0.6, 0.0]], first=[[0.9, 0.2, 0.9, 0.8]])
    assert looking.roles_of(found) == {(0, 0): "induction", (0, 2): "duplicate token", (0, 3): "first token"}
    chance = found.data.assign(first_chance=("layer", [0.9]))
    assert (0, 3) not in looking.roles_of(Result(chance, kind="head summaries"))


def test_roles_and_rollout_stand_beside_the_heads_of_a_decoder() -> None:
    model = opened("llama")
    found = pl.attention.patterns(model, PROMPT)
    named = summaries(induction=[[0.9, 0.1, 0.0, 0.0]])
    (stack,) = pl.views.attention(found, pl.attention.rollout(model, PROMPT), named).data.stacks  # type: ignore[union-attr]
    assert {(h.layer, h.head): h.role for h in stack.heads if h.role} == {(0, 0): "induction"}
    assert [f.name for f in stack.flows] == ["rollout", "rollout of even attention"]


def test_rollout_by_itself_is_shown_layer_by_layer() -> None:
    shown = document(pl.attention.rollout(opened("llama"), PROMPT)).data
    assert isinstance(shown, s.Attention) and len(shown.stacks) == 1
    assert shown.stacks[0].heads[0].component == "layers.0"
