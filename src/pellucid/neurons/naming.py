"""What does a unit stand for, in words? Explainers read its contexts and answer.

An explainer is any callable from `UnitContexts` to a `Description` or a text: the `StatisticalExplainer` counts, the
`ModelExplainer` asks a local text-generation model, showing it the words the unit is active on and contexts with these words
marked, the most active first (Bills et al. 2023 give activations as numbers from 0 to 10; small models do not use them). A
description is worth what it predicts: see scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from pellucid.model import Model
from pellucid.neurons.excerpts import UnitContexts
from pellucid.neurons.statistical import Description, StatisticalExplainer

Explainer = Callable[[UnitContexts], Description | str]


def describe(
    contexts: Sequence[UnitContexts], explainer: Explainer | None = None, *, progress: bool = True
) -> list[Description]:
    """What each unit stands for, from the contexts that are `shown`; by default by counting (`StatisticalExplainer`).

    >>> describe(read_contexts(model, found, units))  # doctest: +SKIP
    """
    explainer = explainer or StatisticalExplainer()
    made = [explainer(each) for each in tqdm(contexts, unit="unit", disable=not progress)]
    return [Description(d) if isinstance(d, str) else d for d in made]


@dataclass(frozen=True, eq=False)
class ModelExplainer:
    """Asks a model what the words that a unit is active on have in common; by its chat template, where it has one.

    `contexts` is how many contexts are shown with these words marked (0: the words alone), `words` how many words,
    `tokens` how long the answer may be: its first line counts. A model of 135M parameters mostly repeats words it was shown:
    compare it with the statistical explainer before you rely on it.
    """

    model: Model
    contexts: int = 8
    words: int = 20
    tokens: int = 24

    def __call__(self, contexts: UnitContexts) -> Description:
        said = self.model.generate(self.prompt(contexts), max_new_tokens=self.tokens).text
        return Description(next((line.strip() for line in said.splitlines() if line.strip()), "no answer"))

    def prompt(self, contexts: UnitContexts) -> str:
        """What the model is asked to continue."""
        best = sorted(contexts.shown, key=lambda c: -float(np.nanmax(c.activations, initial=-np.inf)))
        marks = [c.above(contexts.level) for c in best]
        active = [t.strip() for c, m in zip(best, marks, strict=True) for t, on in zip(c.tokens, m, strict=True) if on]
        lines = [f"- {' '.join(c.marked(m).split())}\n" for c, m in zip(best[: self.contexts], marks, strict=False)]
        asked = "In these lines some words are marked.\n" + "".join(lines) if lines else ""
        words = ", ".join([*dict.fromkeys(active)][: self.words])
        asked += f"What do these words have in common? Answer in at most five words: {words}"
        tokenizer = self.model.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            return f"{asked}\nAnswer:"
        turn = [{"role": "user", "content": asked}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
