"""What does a change cost? Ordinary text and neighbouring abilities, and the text that was written under it.

    kl           mean over tokens of ordinary text (all but the first) of KL(next token before, next token after), nats
    top1         share of these tokens that the model predicts first
    each task    share of its prompts whose metric is above 0: the right answer before the wrong one

    perplexity   exp of the mean, over texts that were written, of their mean negative log-likelihood per token, under the plain model
                 after the same prompt. Greedy text has a low one by construction, and repetition a lower one: so beside it stands
    repetition   1 - distinct / all, over runs of three tokens of a text

KL on text alone hides what an edit takes from abilities that text seldom needs: name those that lie beside what is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.causal.contrast import Asked, ask
from pellucid.engine.edits import Edit
from pellucid.engine.generation import Generated
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import pause
from pellucid.errors import InputError
from pellucid.model import Model

TOKENS = 2000  # of ordinary text, at most


@dataclass(frozen=True, eq=False)
class Meter:
    """Ordinary texts with what the plain model says of them, and tasks by name; called with edits, or a changed model, it measures."""

    model: Model
    batches: tuple[tuple[Inputs, Tensor], ...]  # inputs, log-probabilities [batch, position, vocabulary]
    tasks: Mapping[str, Asked]

    @classmethod
    def of(
        cls, model: Model, texts: Sequence[Any] = (), tasks: Mapping[str, Any] | None = None, batch: int = 8
    ) -> Meter:
        """`tasks` are `pl.tasks.Prompts` by name, or pairs (prompts, metric). InputError for too many tokens of text, or no next token."""
        if (
            model.anatomy.answering.meaning != "tokens"
            or not model.anatomy.stacks[-1].causal
            or len(model.anatomy.stacks) > 1
        ):
            raise InputError(
                f"{model.name} does not predict the next token of a text: a price is measured on those that do"
            )
        asked = {
            name: ask(model, *(task if isinstance(task, tuple) else (task,))) for name, task in (tasks or {}).items()
        }
        made = [model.inputs(list(texts[i : i + batch])) for i in range(0, len(texts), batch)]
        if (n := sum(int(x.stream("").lengths.sum()) for x in made)) > TOKENS:
            raise InputError(
                f"the texts have {n} tokens, whose distributions are kept: give at most {TOKENS}, such as some sentences"
            )
        return cls(model, tuple((x, _log_p(model, x)) for x in made), asked)

    def __call__(self, edits: Sequence[Edit] = (), model: Model | None = None) -> dict[str, float]:
        """The measures by name, of the model under edits."""
        model = model or self.model
        kl, right, n = 0.0, 0.0, 0
        for inputs, before in self.batches:
            pause()
            after = _log_p(model, inputs, edits)
            stream = inputs.stream("")
            columns = torch.arange(after.shape[1], device=after.device)
            inside = stream.mask.bool().to(after.device) & (columns > stream.starts.to(after.device)[:, None])
            kl += float((before.exp() * (before - after)).sum(-1)[inside].sum())
            right += float((after[:, :-1].argmax(-1) == stream.ids[:, 1:].to(after.device))[inside[:, 1:]].sum())
            n += int(inside.sum())
        made = {"kl": kl / n, "top1": right / n} if n else {}
        for name, asked in self.tasks.items():
            made[name] = float((asked.score(model, model.run(asked.inputs, edits=edits)) > 0).mean())
        return made


def _log_p(model: Model, inputs: Inputs, edits: Sequence[Edit] = ()) -> Tensor:
    return model.run(inputs, edits=edits).logits.float().log_softmax(-1)


def written(model: Model, made: Generated) -> dict[str, np.ndarray]:
    """Of every text that was written: `nll` per token under the plain `model` after its prompt, and `repetition`; NaN for none."""
    stream = made.inputs.stream("")  # type: ignore[union-attr]
    prompts = [ids[real.bool()].tolist() for ids, real in zip(stream.ids, stream.mask, strict=True)]
    answers = [made.ids(row) for row in range(len(made))]
    inputs = model.inputs([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
    log_p, own = _log_p(model, inputs), inputs.stream("")
    nll = np.full(len(made), np.nan)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if answer:
            at = int(own.starts[row]) + len(prompt)
            told = log_p[row, at - 1 : at - 1 + len(answer)].gather(
                1, torch.tensor(answer, device=log_p.device)[:, None]
            )
            nll[row] = -float(told.mean())
    return {"nll": nll, "repetition": np.array([repetition(a) for a in answers])}


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """1 - distinct / all runs of n tokens; 0 where there is none.

    >>> repetition([1, 2, 3, 1, 2, 3, 1])
    0.4
    """
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
