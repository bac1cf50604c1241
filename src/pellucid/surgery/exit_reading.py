"""What policies of early exit meet in a row of text: one run of it, read at every check, and what each policy would have made of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.corpus import Row, inputs
from pellucid.engine.rungs import weights
from pellucid.lenses.lens import Lens, logits
from pellucid.model import Model
from pellucid.surgery.exit_policy import Exit, confidence


@dataclass
class Read:
    """What one policy met in one row: [check, position]."""

    said: Tensor
    nll: Tensor
    sure: Tensor


@dataclass
class Pass:
    """What one row of text gave: of every position that has a next token."""

    final: Tensor  # [position] the model's first choice
    plain: Tensor  # [position] nll
    read: list[Read]
    states: dict[int, Tensor]


@torch.no_grad()
def passed(
    model: Model, row: Row, policies: Sequence[Exit], states: bool = False, at: np.ndarray | None = None
) -> Pass:
    """One run of a row; each lens reads each layer once, whatever the number of policies. Of positions `at`, if given, no others are read."""
    given = inputs(model, [row])
    checked = [p.checked(model) for p in policies]
    names = {i: str(model.sites(f"layers.{i}.resid_post")[0]) for i in sorted({i for each in checked for i in each})}
    final = str(model.sites("layers.-1.resid_post")[0])
    run = model.run(given, keep=[*names.values(), *([final] if at is not None else [])], logits=at is None)
    where: Any = slice(0, len(row.ids) - 1) if at is None else torch.as_tensor(at)
    last = (run.logits[0, where] if at is None else logits(model, run.tensor(final)[0, where], final, None)).float()
    after = given.stream("").ids[0, 1:][where, None].to(last.device)
    found = Pass(last.argmax(-1).cpu(), -last.log_softmax(-1).gather(1, after)[:, 0].cpu(), [], {})
    made: list[list[list[Tensor]]] = [[[], [], []] for _ in policies]
    before: list[Tensor | None] = [None] * len(policies)
    for i, name in names.items():
        x = run.tensor(name)[0, where]
        if states:
            found.states[i] = x.float().cpu()
        seen: dict[int, Tensor] = {}
        for number, policy in enumerate(policies):
            if i not in checked[number]:
                continue
            if id(policy.lens) not in seen:
                seen[id(policy.lens)] = logits(model, x, name, policy.lens)
            z = seen[id(policy.lens)]
            said, nll, sure = made[number]
            said.append(z.argmax(-1).cpu())
            nll.append(-z.log_softmax(-1).gather(1, after)[:, 0].cpu())
            sure.append(confidence(policy.by, z, x, before[number], said, i, policy.head))
            before[number] = x
    empty = torch.zeros(0, len(found.final))
    found.read = [Read(*(torch.stack(each) if each else empty for each in parts)) for parts in made]
    return found


def costs(model: Model) -> tuple[float, int]:
    """One unembedding in blocks, by weights; and how many blocks there are."""
    head, blocks = weights(model.anatomy)
    return head / max(1, sum(blocks) / len(blocks)), len(blocks)


def lens_cost(model: Model, lens: Lens | None) -> float:
    """One translation in blocks, by weights."""
    sizes = [w.numel() for w in getattr(lens, "weights_", {}).values()]
    return max(sizes, default=0) / max(1, weights(model.anatomy)[1][0])


@dataclass
class Judged:
    """[token] of one policy, with the number of the row each comes from."""

    layer: np.ndarray  # blocks run
    agrees: np.ndarray
    added: np.ndarray
    exited: np.ndarray
    checks: np.ndarray
    row: np.ndarray


def judge(passes: Sequence[Pass], number: int, layers: Sequence[int], n: int, threshold: float) -> Judged:
    columns = []
    for row, each in enumerate(passes):
        read = each.read[number]
        hit = read.sure >= threshold
        any_ = hit.any(0) if len(layers) else torch.zeros(len(each.final), dtype=torch.bool)
        first = (
            torch.where(any_, hit.float().argmax(0), len(layers))
            if len(layers)
            else torch.zeros(len(each.final), dtype=torch.long)
        )
        said, nll = torch.cat([read.said.long(), each.final[None]]), torch.cat([read.nll, each.plain[None]])
        depth, pick = torch.tensor([*(i + 1 for i in layers), n]), (first, torch.arange(len(first)))
        columns.append([depth[first], said[pick] == each.final, nll[pick] - each.plain, any_, torch.where(any_, first + 1, len(layers)), torch.full((len(first),), row)])  # fmt: skip
    return Judged(*(torch.cat([c[k].double() for c in columns]).numpy() for k in range(6)))
