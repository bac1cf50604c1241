"""What does a unit stand for, in words? Explainers read its contexts and answer.

An explainer is any callable from `UnitContexts` to a `Description` or a text. A description is worth what it predicts on
other contexts: see scoring.

`StatisticalExplainer` counts. Every token of the contexts has features: the word it is, its first and last letters, its
shape, the words before and the word after it. A feature that n tokens have, k of them active, is worth what is sure of its
precision: the lower bound of Wilson's interval for k / n; its lift is that bound over the share of active tokens in the
contexts (where large activations are more frequent than in the corpus). Rules are taken one by one, each time the feature
with the largest (bound x active tokens not yet covered), while its lift is above `lift` and it covers at least two more. The
same rules predict: a token is given the mean activation of the tokens with its best rule, and one without any rule the mean
of such tokens.

`ModelExplainer` asks a local text-generation model, showing it the words the unit is active on and contexts with these words
marked, the most active first (Bills et al. 2023 give activations as numbers from 0 to 10; small models do not use them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.neurons.contexts import Context, UnitContexts
from pellucid.technique import technique

SAYS = {  # how a feature of each kind is put into words; of equally good ones the kind that stands first is taken
    "token": "on {}",
    "phrase": "at the end of {}",
    "after": "after {}",
    "before": "before {}",
    "ending": "on words that end in {}",
    "beginning": "on words that begin with {}",
    "shape": "on {}",
}
Feature = tuple[str, str]  # kind, value


@dataclass(frozen=True)
class Rule:
    """A feature with what it is worth: the share of its tokens that are active, the lower bound of that and its lift, how
    many tokens have it, and their mean activation."""

    kind: str
    value: str
    precision: float
    low: float
    lift: float
    tokens: int
    activation: float


@dataclass(frozen=True)
class Description:
    """What a unit fires on, in words; with `rules`, it also predicts. `rest` is predicted where no rule holds."""

    text: str
    rules: tuple[Rule, ...] = field(default=(), repr=False)
    rest: float = field(default=0.0, repr=False)

    def __str__(self) -> str:
        return self.text

    def predict(self, context: Context) -> np.ndarray:
        """[token] the activations expected by the rules."""
        known = {(r.kind, r.value): r.activation for r in self.rules}
        return np.array(
            [
                max((known[f] for f in features(context, i) if f in known), default=self.rest)
                for i in range(len(context.tokens))
            ]
        )


Explainer = Callable[[UnitContexts], Description | str]


@technique
def describe(contexts: Sequence[UnitContexts], explainer: Explainer | None = None) -> list[Description]:
    """What each unit stands for, from the contexts that are `shown`; by default by counting (`StatisticalExplainer`).

    >>> describe(read_contexts(model, found, units))
    [Description(text='...'), ...]
    """
    _check_contexts(contexts)
    explainer = explainer or StatisticalExplainer()
    made = [explainer(each) for each in progress(contexts, "units described")]
    return as_descriptions(made)


def as_descriptions(given: Sequence[Description | str]) -> list[Description]:
    """Texts as descriptions; InputError for anything else."""
    made = [Description(d) if isinstance(d, str) else d for d in given]
    wrong = next((d for d in made if not isinstance(d, Description)), None)
    if any(not isinstance(d, Description) for d in made):
        raise InputError(f"{wrong!r} is no description: expected a text or a Description")
    return made


def _check_contexts(contexts: Sequence[UnitContexts]) -> None:
    if isinstance(contexts, str) or not all(isinstance(each, UnitContexts) for each in contexts):
        raise InputError("expected the contexts of units, as read_contexts gives them")


@dataclass(frozen=True)
class StatisticalExplainer:
    """Describes a unit by at most `rules` features, each sure (to `confidence`, one-sided) to have a lift above `lift`.

    >>> quiet, loud = (Context(t, np.array(a)) for t, a in (((" a", " dog"), [0, 0.0]), ((" a", " cat"), [0, 1.0])))
    >>> print(StatisticalExplainer()(UnitContexts("u", 0.5, (quiet, loud) * 6, ())))
    fires on "cat"
    """

    rules: int = 6
    lift: float = 2.0
    confidence: float = 0.95

    def __call__(self, contexts: UnitContexts) -> Description:
        shown, level = contexts.shown, contexts.level
        values = np.concatenate([c.activations[c.counted] for c in shown]) if shown else np.zeros(0)
        active = values > level
        have: dict[Feature, list[int]] = {}
        row = 0
        for context in shown:
            for i in np.flatnonzero(context.counted):
                for feature in features(context, int(i)):
                    have.setdefault(feature, []).append(row)
                row += 1
        base = float(active.mean()) if len(active) else 0.0
        z = NormalDist().inv_cdf(self.confidence)
        sure: list[tuple[Feature, np.ndarray, float]] = []
        for feature, rows in have.items():
            at = np.array(rows)
            low = wilson(int(active[at].sum()), len(at), z)
            if active[at].sum() >= 2 and low > self.lift * base:
                sure.append((feature, at, low))
        sure.sort(key=lambda each: (list(SAYS).index(each[0][0]), -len(each[0][1])))  # and the longest ending first
        left, chosen = active.copy(), list[Rule]()
        while sure and len(chosen) < self.rules:
            worth = [low * left[at].sum() for _, at, low in sure]
            (kind, value), at, low = sure[int(np.argmax(worth))]
            if left[at].sum() < 2:
                break
            chosen.append(
                Rule(kind, value, float(active[at].mean()), low, low / base, len(at), float(values[at].mean()))
            )
            left[at] = False
        covered = np.zeros(len(values), dtype=bool)
        for rule in chosen:
            covered[have[rule.kind, rule.value]] = True
        rest = float(values[~covered].mean()) if (~covered).any() else 0.0
        return Description(say(chosen), tuple(chosen), rest)


def wilson(k: int, n: int, z: float) -> float:
    """The lower end of Wilson's interval for a share of k in n.

    >>> round(wilson(8, 10, 1.6449), 3), wilson(0, 5, 1.6449)
    (0.541, 0.0)
    """
    share = k / n
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (share + z * z / (2 * n) - spread) / (1 + z * z / n)) if k else 0.0


def features(context: Context, i: int) -> Iterator[Feature]:
    """What can be said of a token by itself and its neighbours."""
    tokens = context.tokens
    word = plain(tokens[i])
    before = [plain(t) for t in tokens[max(0, i - 2) : i]]
    yield "token", word
    if before:
        yield "phrase", f"{before[-1]} {word}"
        yield "after", before[-1]
    if len(before) == 2:
        yield "after", " ".join(before)
    if i + 1 < len(tokens):
        yield "before", plain(tokens[i + 1])
    if word.isalpha():
        yield from (("ending", f"-{word[-n:]}") for n in (2, 3, 4) if n < len(word))
        yield from (("beginning", f"{word[:n]}-") for n in (2, 3, 4) if n < len(word))
    yield from (("shape", shape) for shape in shapes(tokens, i))


def plain(token: str) -> str:
    """The word a token is or is a piece of; white space by its escape."""
    word = token.strip().removeprefix("##").lower()
    return word or repr(token)[1:-1]


def shapes(tokens: tuple[str, ...], i: int) -> Iterator[str]:
    text = tokens[i].strip()
    if not text:
        yield "white space"
        return
    if any(c.isdigit() for c in text):
        yield "numbers"
    elif not any(c.isalnum() for c in text):
        yield "punctuation"
    elif text.isupper() and len(text) > 1:
        yield "capitals"
    elif text[0].isupper():
        yield "capitalised words"
    spaced = any(t[:1].isspace() for t in tokens)
    follows = i > 0 and spaced and not tokens[i][:1].isspace() and tokens[i - 1][-1:].isalnum()
    if tokens[i].startswith("##") or (follows and text[0].isalnum()):
        yield "pieces inside words"


def say(rules: list[Rule]) -> str:
    """The rules in words, those of a kind together."""
    if not rules:
        return "no word, affix, shape or neighbour stands out"
    kinds = dict.fromkeys(rule.kind for rule in rules)
    parts = []
    for kind in kinds:
        values = [r.value if kind == "shape" else f'"{r.value}"' for r in rules if r.kind == kind]
        parts.append(SAYS[kind].format(", ".join(values)))
    return "fires " + "; ".join(parts)


@dataclass(frozen=True, eq=False)
class ModelExplainer:
    """Asks a model what the words that a unit is active on have in common; by its chat template, where it has one.

    `contexts` is how many contexts are shown with these words marked (0: the words alone), `words` how many words; of the
    answer, of at most `max_new_tokens`, the first line counts. A model of 135M parameters mostly repeats words it was shown:
    compare it with the statistical explainer before you rely on it.
    """

    model: Model
    contexts: int = 8
    words: int = 20
    max_new_tokens: int = 24

    def __call__(self, contexts: UnitContexts) -> Description:
        prompt: Any = self.prompt(contexts)
        if self._template:  # it has written the special tokens already
            prompt = [self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        said = self.model.generate(prompt, max_new_tokens=self.max_new_tokens).text
        return Description(next((line.strip() for line in said.splitlines() if line.strip()), "no answer"))

    @property
    def _template(self) -> bool:
        return bool(getattr(self.model.tokenizer, "chat_template", None))

    def prompt(self, contexts: UnitContexts) -> str:
        """What the model is asked to continue."""
        best = sorted(contexts.shown, key=lambda c: -float(np.nanmax(c.activations, initial=-np.inf)))
        marks = [c.above(contexts.level) for c in best]
        active = [t.strip() for c, m in zip(best, marks, strict=True) for t, on in zip(c.tokens, m, strict=True) if on]
        lines = [f"- {' '.join(c.marked(m).split())}\n" for c, m in zip(best[: self.contexts], marks, strict=False)]
        asked = "In these lines some words are marked.\n" + "".join(lines) if lines else ""
        words = ", ".join([*dict.fromkeys(active)][: self.words])
        asked += f"What do these words have in common? Answer in at most five words: {words}"
        if not self._template:
            return f"{asked}\nAnswer:"
        turn = [{"role": "user", "content": asked}]
        return str(self.model.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
