"""Does a text fit a description? Judges answer without knowing where the unit fires.

A judge is asked three things of a description: how active the unit will be at every token of a context (`simulate`), how
likely a context is to activate it (`detect`), and how likely the marked tokens of a context are the active ones (`fuzz`). The
last two follow from the first, the largest expected activation and the mean of the marked tokens, unless a judge has better
ways. Any callable from a description's text and the tokens to numbers will do, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pellucid.errors import InputError
from pellucid.metrics import logit_difference
from pellucid.model import Model
from pellucid.neurons.contexts import Context
from pellucid.neurons.naming import Description, plain

Simulate = Callable[[str, Sequence[str]], Any]  # description, tokens -> a number for each token


class Judge:
    """What all judges do; they differ in `simulate`."""

    def simulate(self, description: Description, context: Context) -> np.ndarray:
        """[token] how active the unit is expected to be."""
        raise NotImplementedError

    def detect(self, description: Description, contexts: Sequence[Context]) -> np.ndarray:
        """[context] larger where a context is more likely to activate the unit."""
        return np.array([self.simulate(description, c)[c.counted].max(initial=-np.inf) for c in contexts])

    def fuzz(self, description: Description, marked: Sequence[tuple[Context, np.ndarray]]) -> np.ndarray:
        """[context] larger where the marked tokens [token] are more likely to be the active ones."""
        return np.array([self.simulate(description, c)[where].mean() for c, where in marked])


class StatisticalJudge(Judge):
    """Goes by the rules of a description; one that has none is taken at its words: a token fits if it is one of them, or if
    one begins with the other and both have four letters."""

    def simulate(self, description: Description, context: Context) -> np.ndarray:
        if description.rules:
            return description.predict(context)
        words = {word for word in re.findall(r"\w+", description.text.lower()) if len(word) > 2}
        return np.array([float(_among(plain(token), words)) for token in context.tokens])


def _among(word: str, words: set[str]) -> bool:
    return word in words or (
        len(word) > 3 and any(len(w) > 3 and (w.startswith(word) or word.startswith(w)) for w in words)
    )


@dataclass(frozen=True, eq=False)
class CallableJudge(Judge):
    """A function from a description's text and a context's tokens to a number for each token."""

    function: Simulate

    def simulate(self, description: Description, context: Context) -> np.ndarray:
        values = np.asarray(self.function(description.text, context.tokens), dtype=float)
        if values.shape != (len(context.tokens),):
            raise InputError(f"the judge gave {list(values.shape)} numbers for {len(context.tokens)} tokens")
        return values


@dataclass(frozen=True, eq=False)
class ModelJudge(Judge):
    """Asks a local model, and takes logit(yes) - logit(no): of the whole context to detect, of the marked context to fuzz,
    and of each token marked in turn to simulate (a forward pass per token)."""

    model: Model
    yes: str = " Yes"
    no: str = " No"
    batch: int = 16

    def simulate(self, description: Description, context: Context) -> np.ndarray:
        each = np.eye(len(context.tokens), dtype=bool)
        return self._ask([_question(description, context.marked(one), True) for one in each])

    def detect(self, description: Description, contexts: Sequence[Context]) -> np.ndarray:
        return self._ask([_question(description, c.text, False) for c in contexts])

    def fuzz(self, description: Description, marked: Sequence[tuple[Context, np.ndarray]]) -> np.ndarray:
        return self._ask([_question(description, c.marked(where), True) for c, where in marked])

    @torch.no_grad()
    def _ask(self, prompts: Sequence[str]) -> np.ndarray:
        metric, answers = logit_difference(self.yes, self.no), np.zeros(len(prompts))
        order = np.argsort([len(p) for p in prompts], kind="stable")
        for part in np.split(order, range(self.batch, len(order), self.batch)):
            run = self.model.run([prompts[i] for i in part])
            answers[part] = self.model.score(run, metric).float().cpu().numpy()
        return answers


def _question(description: Description, text: str, marked: bool) -> str:
    asked = "Do the marked words fit" if marked else "Does the text contain"
    return (
        f"Description: {description.text}\nText: {' '.join(text.split())}\nQuestion: {asked} the description?\nAnswer:"
    )


def as_judge(judge: Judge | Simulate | None) -> Judge:
    """A judge as it is, a function as one, None as the statistical one."""
    if judge is None:
        return StatisticalJudge()
    if isinstance(judge, Judge):
        return judge
    if callable(judge):
        return CallableJudge(judge)
    raise InputError(f"{judge!r} is no judge: give a Judge or a function of a text and tokens")
