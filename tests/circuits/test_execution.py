"""A circuit run is what one gets by giving every reader its own residual stream, by hand and slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.causal.contrast import ask
from pellucid.circuits import Circuit, Runner, wire
from pellucid.errors import InputError
from pellucid.model import Model

from .programs import random_model

PARTS: dict[str, Any] = {  # how to reach the norms and the MLP of two families
    "gpt2": lambda m: ([(b.ln_2, b.mlp) for b in m.transformer.h], m.transformer.ln_f, m.lm_head),
    "llama": lambda m: (
        [(b.post_attention_layernorm, b.mlp) for b in m.model.layers],
        m.model.norm,
        m.lm_head,
    ),
}
FAMILIES = [
    "gpt2",
    "llama",
    "gpt_neox",
    "gptj",
    "falcon",
    "gemma2",
    "qwen3",
    "bloom",
    "opt",
    "mixtral",
    "granite",
]


def prompts(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 60, (2, 7), generator=generator) for _ in "ab")  # type: ignore[return-value]


def first_logits(logits: Tensor) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1, 9]


def messages(model: Model, ids: Tensor) -> list[Tensor]:
    """Every source's message, read off an ordinary run site by site."""
    graph = wire(model).graph
    run = model.run(ids, keep=["embed", "layers.*.attn.heads.*.out", "layers.*.mlp.out"])
    sites = ["embed", *(s.name + ".out" for s in graph.sources[1:])]
    return [run.tensor(site).detach() for site in sites]


def slow_logits(model: Model, ids: Tensor, other: Tensor, on: Tensor, kind: str) -> Tensor:
    """One reader at a time: its own sum of messages, its own pass."""
    graph = wire(model).graph
    theirs, own = messages(model, other), [model.run(ids, keep="embed").tensor("embed").detach()]
    mlps, norm, head = PARTS[kind](model.module)
    resid = own[0]

    def heard(reader: str) -> Tensor:
        r = graph.reader(reader)
        off = [s for s in range(graph.readers[r].feeds) if not on[s, r]]
        return resid + sum((theirs[s] - own[s] for s in off), torch.zeros_like(resid))

    for layer, (before, mlp) in enumerate(mlps):
        attention = f"layers.{layer}.attn"
        edits = [pl.Patch(f"layers.{layer}.resid_pre", resid)]
        heads = model.anatomy.stacks[0].blocks[layer].attentions["attn"].heads
        for port in "qkv":
            for h in range(heads):
                site = f"{attention}.heads.{h}.{port}"
                moved = pl.Patch(f"layers.{layer}.resid_pre", heard(f"{layer}.{h}.{port}"))
                edits.append(pl.Patch(site, model.run(ids, edits=[moved], keep=[site]).tensor(site).detach()))
        run = model.run(ids, edits=edits, keep=[f"{attention}.out", f"{attention}.heads.*.out"])
        own += [run.tensor(f"{attention}.heads.{h}.out").detach() for h in range(heads)]
        resid = resid + run.tensor(f"{attention}.out").detach()
        with torch.no_grad():
            own.append(mlp(before(heard(f"m{layer}"))))
        resid = resid + own[-1]
    with torch.no_grad():
        return head(norm(heard("logits")))


@pytest.mark.parametrize("kind", PARTS)
def test_a_circuit_run_equals_giving_each_reader_its_own_stream(kind: str) -> None:
    model = random_model(kind)
    ids, other = prompts()
    wiring = wire(model)
    runner = Runner.of(wiring, ask(model, ids, first_logits, other), "resample")
    for seed in range(3):
        on = torch.rand(wiring.graph.possible.shape, generator=torch.Generator().manual_seed(seed)) > 0.2 + 0.3 * seed
        logits = runner.run(on)[1]
        assert logits is not None
        torch.testing.assert_close(logits, slow_logits(model, ids, other, on, kind), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_edge_off_gives_the_corrupted_answer_and_every_edge_on_the_clean_one(kind: str) -> None:
    model = random_model(kind)
    ids, other = prompts()
    graph = wire(model).graph
    runner = Runner.of(wire(model), ask(model, ids, first_logits, other), "resample")
    both = runner.scores(torch.stack([graph.possible, torch.zeros_like(graph.possible)]))
    for score, given in zip(both, (ids, other), strict=True):
        torch.testing.assert_close(score, first_logits(model.run(given).logits.detach()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_many_masks_at_once_and_from_a_late_layer_on_give_what_each_gives_alone(kind: str) -> None:
    model = random_model(kind)
    ids, other = prompts()
    graph = wire(model).graph
    runner = Runner.of(wire(model), ask(model, ids, first_logits, other), "resample")
    late = [r for r, reader in enumerate(graph.readers) if reader.layer >= 1]
    masks = graph.possible.repeat(4, 1, 1)
    for i in range(4):
        masks[i, i, late[i]] = masks[i, 0, -1] = False
    together = runner.scores(masks)
    assert runner.forwards == 3 + 2.0  # recorded: the replacements, and twice the clean run; then one layer of two
    everywhere = masks.double().requires_grad_()  # masks to be learnt run from the first layer
    torch.testing.assert_close(together, runner.scores(everywhere.float()).detach(), atol=1e-5, rtol=1e-4)


def test_a_metric_of_the_answer_needs_no_whole_unembedding() -> None:
    model = random_model("llama")
    ids, other = prompts()
    question = ask(model, ids, pl.metrics.logit_difference(7, 9), other)
    runner = Runner.of(wire(model), question, "zero")
    assert not runner.score.whole
    mask = wire(model).graph.possible.clone()
    mask[0, 3] = False
    whole = Runner.of(wire(model), ask(model, ids, first_logits, other), "zero")
    torch.testing.assert_close(runner.scores(mask), whole.scores(mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_replaces_what_each_prompt_alone_would(side: str) -> None:
    """Padding is no token: "roll" stays among a row's own, and the mean at a position counts from its first token."""
    from pellucid.circuits.ablation import alternatives, messages_of

    model = random_model("llama")
    wiring, (long, other) = wire(model), prompts()
    rows = [long[0].tolist(), other[0].tolist()[:3], other[1].tolist()[:4]]
    width = len(rows[0])

    def padded(row: list[int], fill: int) -> list[int]:
        return [fill] * (width - len(row)) + row if side == "left" else row + [fill] * (width - len(row))

    mask = torch.tensor([padded([1] * len(r), 0) for r in rows])
    batch = model.inputs({"input_ids": torch.tensor([padded(r, 0) for r in rows]), "attention_mask": mask})
    alone = [model.inputs({"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r))}) for r in rows]
    rolled = alternatives(wiring, batch, "roll")
    said = [messages_of(wiring, each)[:, 0] for each in alone]
    meant = alternatives(wiring, batch, "position_mean")
    for b, row in enumerate(rows):
        expected = alternatives(wiring, alone[b], "roll")[:, 0]
        torch.testing.assert_close(rolled[:, b, mask[b].bool()], expected, atol=1e-5, rtol=1e-4)
        for place in range(len(row)):
            mean = torch.stack([s[:, place] for s in said if s.shape[1] > place]).mean(0)
            torch.testing.assert_close(meant[:, b, mask[b].bool()][:, place], mean, atol=1e-5, rtol=1e-4)


def test_ablations_replace_messages_by_what_they_say() -> None:
    from pellucid.circuits.ablation import alternatives, messages_of

    model = random_model("gpt2")
    ids, other = prompts()
    wiring, a, b = wire(model), model.inputs(ids), model.inputs(other)
    theirs = messages_of(wiring, b)
    assert not alternatives(wiring, a, "zero").any()
    torch.testing.assert_close(alternatives(wiring, a, "resample", b), theirs)
    torch.testing.assert_close(alternatives(wiring, a, "mean", b)[3, 1, 4], theirs[3].mean((0, 1)))
    torch.testing.assert_close(alternatives(wiring, a, "position_mean", b)[3, 1, 4], theirs[3, :, 4].mean(0))
    torch.testing.assert_close(alternatives(wiring, a, "roll")[:, :, 2], messages_of(wiring, a)[:, :, 1])
    with pytest.raises(InputError, match="expected one of resample"):
        alternatives(wiring, a, "average")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one corrupted prompt of equal length"):
        alternatives(wiring, a, "resample", model.inputs(other[:, :5]))


def test_the_model_is_left_as_it_was() -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    before = model.run(ids).logits
    runner = Runner.of(wire(model), ask(model, ids, first_logits, other), "resample")
    runner.scores(Circuit.from_edges(wire(model).graph, ["embed -> logits"]).on)
    assert torch.equal(before, model.run(ids).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
