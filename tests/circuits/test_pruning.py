"""Learnt masks keep what the program needs and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pellucid.circuits import Split
from pellucid.circuits.pruning import Pruning
from pellucid.errors import InputError

from .programs import LENGTH, PREVIOUS_TOKEN_EDGES, VOCABULARY, previous_token


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(3))
    answer = ids[:, -2:-1]
    return {
        "model": previous_token(),
        "prompts": ids,
        "metric": lambda logits: logits[:, -1].gather(1, answer)[:, 0],
    }


def test_masks_over_edges_keep_the_programs_edges(program: dict[str, Any]) -> None:
    weights = {n: p.clone() for n, p in program["model"].module.named_parameters()}
    found = Pruning(strength=1.0, steps=150).fit(**program, how="zero", split=Split("parts"))
    assert set(found.circuit_.edges) == PREVIOUS_TOKEN_EDGES
    assert found.losses_[-1] < found.losses_[0]
    assert all(torch.equal(p, weights[n]) for n, p in program["model"].module.named_parameters())


def test_sigmoid_masks_keep_no_edge_that_the_program_does_not_have(program: dict[str, Any]) -> None:
    """A fraction of a message is enough for a saturated attention, so some edges of the program may sink
    below one half."""
    found = Pruning("sigmoid", strength=1.0, steps=150).fit(**program, how="zero", split=Split("parts"))
    assert {"embed.tokens -> layers.0.attn.heads.1.v", "layers.0.attn.heads.1 -> logits"} <= set(found.circuit_.edges)
    assert set(found.circuit_.edges) <= PREVIOUS_TOKEN_EDGES


def test_masks_over_nodes_keep_the_programs_head(program: dict[str, Any]) -> None:
    found = Pruning(unit="node", strength=1.0, steps=150).fit(**program, how="zero", split=Split("parts"))
    assert found.circuit_.pruned().heads == ["layers.0.attn.heads.1"]


def test_an_unknown_mask_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="expected one of hard-concrete, sigmoid"):
        Pruning("topk")  # type: ignore[arg-type]
