"""Does the attribution stay the same when the prompt hardly changes?

    max-sensitivity = max over draws of |phi(x + e) - phi(x)| / |phi(x)|,   e uniform in [-radius, radius]

(Yeh et al. 2019). What moves is the embedding of each distinct token of the prompt, by the same e wherever the token
stands; the radius is relative to the root mean square of the prompt's embeddings. Only tokens that are looked up move: an
unembedding tied to the embedding stays as it is. Low is steady; a constant attribution has 0, so that steadiness
alone is no merit. Methods that draw at random show the size of their own noise too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.scores import Method, explain, read_scores
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.errors import InputError
from pellucid.model import Model


def max_sensitivity(
    model: Model,
    prompt: Any,
    method: Method,
    target: Any = None,
    *,
    against: Any = None,
    players: Any = "token",
    radius: float = 0.05,
    draws: int = 5,
    seed: int = 0,
) -> float:
    """The largest relative change of a method's scores [player] over draws (see above). While it runs, the model's
    embedding is another one: use the model for nothing else. InputError if all scores are zero."""
    case = Case.of(model, prompt, target, against=against)
    parts = Players.of(case, players)
    if target is None:  # what is asked stays, whatever the likeliest answer becomes
        target = case.question.metric

    def scores() -> np.ndarray:
        return read_scores(case, parts, explain(method, model, prompt, target, against, players))

    here = scores()
    size = float(np.linalg.norm(here))
    if size == 0:
        raise InputError("all scores are zero: there is no relative change of them")
    embedded, generator = Embedded(case), torch.Generator().manual_seed(seed)
    reach = radius * float(embedded.values.float().square().mean().sqrt())
    changes = []
    for _ in range(draws):
        with moved(embedded, reach, generator):
            changes.append(float(np.linalg.norm(scores() - here)) / size)
    return max(changes)


@contextmanager
def moved(embedded: Embedded, reach: float, generator: torch.Generator) -> Iterator[None]:
    """The embeddings of the prompt's tokens moved; a weight of its own, so that tied weights and the old one stay."""
    tables: dict[int, nn.Embedding] = {id(module): module for module in embedded.modules}
    kept = {key: module.weight for key, module in tables.items()}
    ids = embedded.case.ids.unique().cpu()
    try:
        for module in tables.values():
            module.weight = nn.Parameter(_noisy(module.weight, ids, reach, generator), module.weight.requires_grad)
        yield
    finally:
        for key, module in tables.items():
            module.weight = kept[key]


def _noisy(weight: Tensor, ids: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    noise = (torch.rand(len(ids), weight.shape[1], generator=generator) * 2 - 1) * reach
    new = weight.detach().clone()
    new[ids.to(new.device)] += noise.to(new)
    return new
