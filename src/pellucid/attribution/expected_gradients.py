"""How much of the answer does each token account for, measured from many baselines at once?

    attribution_i = E over b, a of  sum over d of (x_i - b_i) * dF/dx_i (b + a (x - b)),   a uniform on [0, 1]

Expected gradients (Erion et al. 2021), also called GradientSHAP (Lundberg and Lee 2017): integrated gradients averaged
over baselines b drawn from a reference set, each draw with one point of its path. No single baseline has to be believed;
the reference set has, and it is stated. The attributions add up to F(x) minus the mean of F(b), up to the sampling
error, which is given for each token and for their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.baseline import sink
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.engine.edits import Edit
from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.tasks.tokens import encode
from pellucid.technique import technique


@technique
@batched
def expected_gradients(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    references: Sequence[str | Sequence[int]] | None = None,
    draws: int = 100,
    players: Any = "token",
    keep_special: bool = True,
    keep_first: bool | None = None,
    seed: int = 0,
) -> Result:
    """Integrated gradients averaged over `draws` random baselines, one gradient each.

    `references` are texts (or token ids) to draw baselines from: a text by chance, and a stretch of it as long as the
    prompt (a shorter text is repeated). Without them baselines are tokens drawn from the vocabulary. The other options
    are those of `integrated_gradients`; fixed tokens (special ones) keep their embedding and get 0. InputError for
    fewer than two draws or an empty reference.

    Gives `attribution` and its standard `error` [position] (or [player]; with [output] in front for a continuation),
    `score`, `baseline_score` (the mean over the drawn baselines), `gap` = sum of attributions - (score -
    baseline_score) and `gap_error`, its standard error.

    >>> expected_gradients(model, prompt, " Paris", references=["Rome is old.", "He likes tea."])
    Expected gradients of logit from 2 reference texts
    attribution: attribution, error, score, baseline_score, gap, gap_error, gradients, evaluations over position 5...
    """
    if draws < 2:
        raise InputError(f"draws={draws}: expected at least 2")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    credited, embedded = Players.of(case, players), Embedded(case)
    generator = torch.Generator().manual_seed(seed)
    ids = draw(case, references, draws, generator)
    at = torch.rand(draws, generator=generator)
    keep = sink(case) if keep_first is None else keep_first
    slopes, below = _slopes(embedded, ids, at, keep)
    with torch.no_grad():
        score = embedded.scores(embedded.values)[0].double().cpu()
    values, labels = credited.pooled(case, slopes)  # [sample, output, player]
    apart = slopes.sum(-1) - (score - below)
    drawn = "tokens of the vocabulary" if references is None else f"{len(references)} reference texts"
    return case.result(
        f"Expected gradients of {case.question.name} from {drawn}",
        {"attribution": values.mean(0), "error": values.std(0, ddof=1) / np.sqrt(draws), "score": score,
         "baseline_score": below.mean(0), "gap": apart.mean(0), "gap_error": apart.std(0) / np.sqrt(draws),
         "gradients": draws, "evaluations": draws + 1},
        labels=labels, attrs={"baseline": drawn, **({"kept": f"{case.tokens[0]!r}, the first token"} if keep and not case.fixed[0] else {})},
    )  # fmt: skip


def _slopes(embedded: Embedded, ids: Tensor, at: Tensor, keep_first: bool) -> tuple[Tensor, Tensor]:
    """[sample, output, position] the way from each baseline times the gradient on it, and [sample, output] the scores of
    the baselines."""
    x, found, below = embedded.values, list[Tensor](), list[Tensor]()
    fixed = torch.tensor(embedded.case.fixed, device=x.device)[:, None]
    fixed[0] |= keep_first
    for rows in torch.arange(len(ids)).split(embedded.batches(len(ids))):
        start = torch.where(fixed, x, torch.cat([embedded.embed(row) for row in ids[rows]]))
        way = x - start
        gradients = embedded.gradients(start + at[rows].to(x)[:, None, None] * way)[1]
        found.append((way[:, None] * gradients).double().sum(-1).cpu())
        with torch.no_grad():
            below.append(embedded.scores(start).double().cpu())
    return torch.cat(found), torch.cat(below)


def draw(
    case: Case, references: Sequence[str | Sequence[int]] | None, draws: int, generator: torch.Generator
) -> Tensor:
    """Token ids [sample, position] of baselines."""
    length = len(case.ids)
    if references is None:
        allowed = torch.tensor(_vocabulary(case))
        drawn = torch.randint(len(allowed), (draws, length), generator=generator)
        return allowed[drawn].to(case.ids)
    texts = [_ids(case, each) for each in references]
    if not texts or not all(texts):
        raise InputError("references must be texts of at least one token: give one or more")
    rows = []
    for which in torch.randint(len(texts), (draws,), generator=generator).tolist():
        text = texts[which]
        last = max(0, len(text) - length)
        first = int(torch.randint(last + 1, (1,), generator=generator))
        rows.append([text[(first + i) % len(text)] for i in range(length)])
    return torch.tensor(rows).to(case.ids)


def _vocabulary(case: Case) -> list[int]:
    """Token ids that are text."""
    return ordinary_ids(case.model.tokenizer, case.model.vocabulary)


def _ids(case: Case, text: Any) -> list[int]:
    if not isinstance(text, str):
        return [int(i) for i in text]
    if case.model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer: give references as token ids")
    return encode(case.model.tokenizer, text, specials=False)[0]
