"""Programs written into weights: patching every edge says what running the program by hand says, and discovery finds
the circuit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pellucid.circuits import Split, acdc, acdc_scores, edge_attribution, exact_patching, wire
from pellucid.circuits.ablation import How

from .programs import Program, induction, pairs, sparse, two_before

PROGRAMS: dict[str, Callable[[], Program]] = {"induction": induction, "two before": two_before, "pairs": pairs}
EDGES = {
    "induction": {
        "embed.positions -> 0.1.q", "embed.positions -> 0.1.k", "embed.tokens -> 0.1.v", "embed.tokens -> 1.2.q",
        "0.1 -> 1.2.k", "embed.tokens -> 1.2.v", "1.2 -> logits",
    },
    "two before": {
        "embed.positions -> 0.0.q", "embed.positions -> 0.0.k", "embed.tokens -> 0.0.v",
        "embed.positions -> 1.1.q", "embed.positions -> 1.1.k", "0.0 -> 1.1.v", "1.1 -> logits",
    },
    "pairs": {
        "embed.positions -> 0.0.q", "embed.positions -> 0.0.k", "embed.tokens -> 0.0.v", "0.0 -> m0",
        "embed.tokens -> m0", "m0 -> logits",
    },
}  # fmt: skip
ABLATIONS: list[How] = ["zero", "mean", "position_mean", "resample"]


def prompts(program: Program, n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, len(program.positions))
    return tuple(torch.randint(0, len(program.tokens), shape, generator=generator) for _ in "ab")  # type: ignore[return-value]


def replacements(program: Program, ids: Tensor, other: Tensor, how: str) -> dict[str, Tensor]:
    own, theirs = (program.run(x)[1] for x in (ids, other))
    made = {
        "zero": lambda s: torch.zeros_like(own[s]),
        "mean": lambda s: theirs[s].mean((0, 1)).expand_as(own[s]),
        "position_mean": lambda s: theirs[s].mean(0).expand_as(own[s]),
        "resample": lambda s: theirs[s],
        "roll": lambda s: torch.cat([own[s][:, :1], own[s][:, 1:].roll(1, 1)], 1),
    }[how]
    return {s: made(s) for s in own}


def by_hand(program: Program, ids: Tensor, other: Tensor, how: str, graph: Any) -> Tensor:
    """[source, reader] the largest change of any logit that one edge makes, after the first position."""
    clean, own = program.run(ids)
    instead = replacements(program, ids, other, how)
    found = torch.zeros(graph.possible.shape, dtype=torch.float64)
    for s, r in graph.edges():
        name = graph.sources[s].name
        if name in own:
            logits, _ = program.run(ids, {(name, graph.readers[r].name): instead[name]})
            found[s, r] = (logits - clean)[:, 1:].abs().amax((1, 2)).mean()
    return found


def gap_from(clean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: -(logits - clean)[:, 1:].abs().amax((1, 2))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_module_does_what_the_program_says(name: str) -> None:
    program = PROGRAMS[name]()
    ids, _ = prompts(program)
    model = program.model()
    logits = model.run(ids).logits
    torch.testing.assert_close(logits, program.run(ids)[0])
    if name == "two before":
        assert torch.equal(logits[:, 2:].argmax(-1), ids[:, :-2])
    if name == "pairs":
        assert torch.equal(logits[:, 1:].argmax(-1), (ids[:, 1:] + ids[:, :-1]) % 3)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("how", [*ABLATIONS, "roll"])
def test_exact_patching_is_the_program_run_by_hand(name: str, how: Any) -> None:
    program = PROGRAMS[name]()
    ids, other = prompts(program)
    model = program.model()
    scores = exact_patching(model, ids, gap_from(program.run(ids)[0]), how=how, reference=other, split=Split("parts"))
    truth = by_hand(program, ids, other, how, scores.graph)
    torch.testing.assert_close(-scores.tensor.double(), truth, atol=1e-5, rtol=1e-5)
    named = {scores.graph.edge(e) for e in EDGES[name]}
    found = {(s, r) for s, r in (truth > 1e-6).nonzero().tolist()}
    assert found <= named
    if how == "zero":
        assert found == named


@pytest.mark.parametrize("seed", range(8))
def test_exact_patching_is_right_on_random_programs_of_any_shape(seed: int) -> None:
    program = sparse(seed)
    ids, other = prompts(program, 5, seed)
    model = program.model()
    for how in (*ABLATIONS, "roll"):
        scores = exact_patching(
            model,
            ids,
            gap_from(program.run(ids)[0]),
            how=how,
            reference=other,
            split=Split("parts"),  # type: ignore[arg-type]
        )
        truth = by_hand(program, ids, other, how, scores.graph)
        torch.testing.assert_close(-scores.tensor.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("how", ABLATIONS)
def test_acdc_ranks_the_programs_edges_first_and_attribution_runs(name: str, how: Any) -> None:
    program = PROGRAMS[name]()
    ids, other = prompts(program)
    model, gap = program.model(), gap_from(program.run(ids)[0])
    options: dict[str, Any] = {"how": how, "reference": other, "split": Split("parts")}
    graph = wire(model, Split("parts")).graph
    true = (by_hand(program, ids, other, how, graph) > 1e-6)[graph.possible]
    thresholds = [1e-4, 1e-2, 1e-1, 1.0]
    found = acdc_scores(thresholds, [acdc(model, ids, gap, threshold=t, **options) for t in thresholds])
    assert roc_auc_score(true, found[graph.possible]) >= (1.0 if how == "zero" else 0.95)
    answer = program.run(ids)[0].argmax(-1, keepdim=True)
    scores = edge_attribution(model, ids, lambda x: x.gather(2, answer)[:, 1:, 0].sum(1), **options)
    assert bool(scores.tensor.isfinite().all())
    assert float(scores.tensor[graph.possible][~true].abs().max()) < 1e-5 or how != "zero"
