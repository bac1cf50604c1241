"""How fast does the answer change as a token's embedding moves, on average around the prompt?

    g_i = mean over n draws of dF/dx_i (x + e),   e ~ N(0, (noise * (max x - min x))^2),   attribution_i = |g_i|

(Smilkov et al. 2017, who average sizes for pictures in their code and gradients in the formula; we follow the formula.)
The standard error is the jackknife's over the draws; for norms, which are positive even where the mean gradient is zero,
compare the attribution with it before reading anything into small values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.attribution.saliency import Norm, check, free, pooled, size
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def smoothgrad(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    draws: int = 50,
    noise: float = 0.1,
    norm: Norm = "l2",
    players: Any = "token",
    keep_special: bool = True,
    seed: int = 0,
) -> Result:
    """The gradient at each token's embedding, averaged over noisy copies of the prompt.

    The noise's standard deviation is `noise` times the range of the prompt's embedding values; fixed tokens (special
    ones) get none, and no credit. The other options are those of `saliency`. InputError for fewer than two draws or
    noise that is not positive.

    Gives `attribution` and its standard `error` [position] (or [player]; with [output] in front for a continuation),
    and `score`, that of the prompt.

    >>> smoothgrad(model, "The capital of France is", " Paris", draws=20, seed=1).error  # doctest: +SKIP
    """
    check(norm)
    if draws < 2 or noise <= 0:
        raise InputError(f"draws={draws}, noise={noise}: expected at least 2 draws and noise above 0")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    credited, embedded = Players.of(case, players), Embedded(case)
    with torch.no_grad():
        score = embedded.scores(embedded.values)[0]
    gradients = _gradients(embedded, draws, noise, seed)  # [sample, output, position, d]
    total = gradients.double().sum(0)
    values, labels = pooled(case, credited, size(total / draws, norm), norm)
    without = torch.stack(
        [torch.as_tensor(pooled(case, credited, size((total - g) / (draws - 1), norm), norm)[0]) for g in gradients]
    )
    error = ((draws - 1) * (without - without.mean(0)).square().mean(0)).sqrt()
    return case.result(
        f"SmoothGrad ({norm}) of {case.question.name}",
        {"attribution": values, "error": error, "score": score, "gradients": draws, "evaluations": 1},
        labels=labels, attrs={"norm": norm},
    )  # fmt: skip


def _gradients(embedded: Embedded, draws: int, noise: float, seed: int) -> Tensor:
    x, case = embedded.values, embedded.case
    spread = noise * float(x.max() - x.min())
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in torch.arange(draws).split(embedded.batches(draws)):
        drawn = spread * torch.randn(len(rows), *x.shape[1:], generator=generator)
        found.append(free(case, embedded.gradients(x + free(case, drawn.to(x)))[1]))
    return torch.cat(found)
