"""How sure is the model of its answer, told from inside? One number for each question, higher for surer.

    max_probability   of the likeliest answer
    entropy           minus the entropy of the answers, in nats
    margin            the likeliest answer's probability less the second's
    agreement         the share of layers whose first choice, through the model's own head, is the final one
    oscillation       minus how often the first choice changes from layer to layer
    contrast          minus the largest Jensen-Shannon divergence between the last layer and one of the upper half: what DoLa
                      (Chuang et al. 2023) chooses its layer by

The last three read the stack with the logit lens; on SmolLM2 they are at chance or upside down (benchmarks/safety_monitors.py),
which is why the plain ones stand first. A fitted `ConfidenceProbe`, a function of (model, prompts), and numbers of your own
are scores too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.corpus import read_each
from pellucid.engine.pausing import progress
from pellucid.engine.run import Run
from pellucid.errors import InputError, at_least, nearest
from pellucid.lenses.lens import last_residual, unembed
from pellucid.model import Model
from pellucid.question import Question
from pellucid.safety.calibrating import several
from pellucid.safety.monitors import ABSTAIN, Monitor

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {  # of probabilities [..., answer]
    "max_probability": lambda p: p.amax(-1),
    "entropy": lambda p: torch.special.xlogy(p, p).sum(-1),
    "margin": lambda p: p.topk(2, -1).values.diff(dim=-1)[..., 0].neg(),
}


def _oscillation(p: Tensor) -> Tensor:
    first = p.argmax(-1)
    return -(first[1:] != first[:-1]).sum(0).double()


def _contrast(p: Tensor) -> Tensor:
    upper, last = p[(len(p) - 1) // 2 : -1], p[-1]
    middle = (upper + last) / 2
    h = PLAIN["entropy"]
    return -((h(upper) + h(last)) / 2 - h(middle)).amax(0)


LAYERED: dict[str, Callable[[Tensor], Tensor]] = {  # of probabilities [layer, prompt, answer], the model's own last
    "agreement": lambda p: (p.argmax(-1) == p[-1].argmax(-1)).double().mean(0),
    "oscillation": _oscillation,
    "contrast": _contrast,
}
SCORES = (*PLAIN, *LAYERED)


def asked(model: Model, prompts: Sequence[Any], target: Any, decoder: Any, batch: int) -> list[tuple[Question, slice]]:
    """The questions, in batches of prompts that are answered at one place."""
    at_least(1, batch=batch)
    read_each(model, list(prompts))
    one, *more = model.anatomy.stacks
    width = batch if one.causal and not more and model.paddable else 1  # masks stand at different places
    parts = [slice(i, min(i + width, len(prompts))) for i in range(0, len(prompts), width)]

    def of(given: Any, part: slice) -> Any:
        return given if given is None or isinstance(given, str) else list(given)[part]

    return [
        (Question.of(model, list(prompts)[part], of(target, part), decoder=of(decoder, part)), part)
        for part in progress(parts, "questions read")
    ]


def at_answer(question: Question, run: Run, site: str) -> Tensor:
    """[prompt, d] a residual where the question is answered; InputError where that is no single token."""
    if question.position is None:
        raise InputError(f"{question.model.name} answers for a whole text, and {site!r} is read at one token")
    stream, values = run.inputs.stream(""), run.tensor(site)
    at = (stream.starts + torch.as_tensor(question.position) % stream.lengths).to(values.device)
    return values[torch.arange(len(values), device=values.device), at]


def _probabilities(question: Question, z: Tensor) -> Tensor:
    p = question.probabilities(z.double() if z.dtype != torch.float64 else z)
    if question.model.anatomy.answering.independent:
        raise InputError(f"several classes of {question.model.name} may hold at once, so it has no likeliest answer")
    return p


def _scored(model: Model, question: Question, score: str) -> Tensor:
    stack = model.anatomy.stacks[-1]
    sites = [f"{stack.prefix}layers.{i}.resid_post" for i in range(len(stack.blocks) - 1)] if score in LAYERED else []
    run = model.run(question.inputs, keep=sites)
    final = _probabilities(question, question.rows(run))
    if score in LAYERED and not sites:
        raise InputError(f"{model.name} has one layer: {score!r} compares several")
    if score in PLAIN:
        return PLAIN[score](final)
    rows = [_probabilities(question, unembed(model, at_answer(question, run, s)[:, None])[:, 0]) for s in sites]
    return LAYERED[score](torch.stack([*rows, final]))


@torch.no_grad()
def confidence(
    model: Model,
    prompts: Sequence[Any],
    score: Any = "max_probability",
    *,
    decoder: Any = None,
    batch: int = 8,
) -> np.ndarray:
    """[prompt] how sure the model is of its answer, by a score: a name, something fitted, a function, or the numbers.

    Prompts are answered where every method here answers them: at the last token, at the mask, as a class. InputError for a
    model that gives no choice between answers (vectors, a number, spans), and for an unknown score.
    """
    prompts = several("prompts", prompts)
    if hasattr(score, "confidence"):
        found = score.confidence(model, prompts, decoder=decoder, batch=batch)
    elif isinstance(score, str):
        if score not in SCORES:
            raise InputError(f"no score {score!r}{nearest(score, SCORES)}")
        parts = [
            _scored(model, question, score).double().cpu()
            for question, _ in asked(model, prompts, None, decoder, batch)
        ]
        found = torch.cat(parts).numpy()
    else:
        found = score(model, prompts) if callable(score) else score
    try:
        found = np.asarray(found, dtype=float)
    except (TypeError, ValueError):
        raise InputError(
            f"score={score!r:.80}: expected a name, something fitted, a function, or a number for each question"
        ) from None
    if found.shape != (len(prompts),) or np.isnan(found).any():
        raise InputError(
            f"a score gave {list(found.shape)} numbers for {len(prompts)} questions: expected one for each, none missing"
        )
    return found


@dataclass(frozen=True, eq=False)
class Doubt:
    """Reads minus the largest probability of the next token, off the last residual through the model's own head."""

    model: Model

    @property
    def site(self) -> str:
        return last_residual(self.model)

    def __call__(self, values: Tensor) -> Tensor:
        z = unembed(self.model, values.to(next(self.model.module.parameters()).dtype)[:, None])[:, 0]
        return -z.double().softmax(-1).amax(-1)


def doubt(model: Model, threshold: float | None = None, *, rule: str = "first", then: Any = None) -> Monitor:
    """A monitor that fires where the largest probability of the (first) answer token is below -`threshold`, and says
    "I am not sure." by default.

    >>> model.generate(prompt, monitors=doubt(model, -0.3)).text
    'I am not sure.'
    """
    return Monitor(
        Doubt(model), rule, "answer", threshold, ABSTAIN if then is None else then, "doubt", digest=model.digest
    )
