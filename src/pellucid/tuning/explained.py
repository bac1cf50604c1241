"""Questions whose answers have reasons: what a generating model is trained and tested on.

A model is asked in one of two orders, and both are one line of text after another:

    before    QUESTION / Reason: R / Answer: A         the reason may be used
    after     QUESTION / Answer: A / Reason: R         it cannot have been, whatever it says: the control

`rows` makes texts and labels for `tuning.fit` of them. Ordinary rows have true reasons throughout, and a model that knows the answers learns to do
without; counterfactual rows give it another reason and want the answer that follows from that.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pellucid.errors import InputError, one_of
from pellucid.tuning.data import Rationales

Order = Literal["before", "after", "alone"]


@dataclass(frozen=True, eq=False)
class Explained:
    """`prompts` with their `answers` and true `reasons`; `mistakes`, for each a false reason and the answer that follows from it (None: those
    of another prompt with another answer, drawn by `seed`); `paraphrases` of the reasons; `choices`, the answers there are (None: what is
    generated is compared). `asking` are the words that ask for a reason and for an answer, `groups` what belongs together. InputError where lengths differ.

    >>> wrong = [(" Rome is in Provence.", " France")]
    >>> Explained(["In which country is Rome?"], [" Italy"], [" Rome is in Lazio."], wrong, choices=[" Italy", " France"])
    <Explained: 1 prompt, 2 choices>
    """

    prompts: Sequence[str]
    answers: Sequence[str]
    reasons: Sequence[str]
    mistakes: Sequence[tuple[str, str]] | None = None
    paraphrases: Sequence[str] | None = None
    choices: Sequence[str] | None = None
    asking: tuple[str, str] = ("\nReason:", "\nAnswer:")
    groups: Sequence[Hashable] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.prompts):
            raise InputError("there is no prompt to explain: give at least one")
        for name in ("answers", "reasons", "mistakes", "paraphrases", "groups"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.prompts):
                raise InputError(f"{len(self.prompts)} prompts and {len(given)} {name}: expected one for each prompt")
        if self.choices is not None:
            known = {bare(c) for c in self.choices}
            wanted = [*self.answers, *(a for _, a in self.mistakes or ())]
            missing = next((a for a in wanted if bare(a) not in known), None)
            if missing is not None:
                raise InputError(f"the answer {missing!r} is none of the choices")
        if self.mistakes is None and len({bare(a) for a in self.answers}) < 2:
            raise InputError(
                "all answers are alike, so no reason can be a mistake: give prompts with other answers, or mistakes="
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        choices = "" if self.choices is None else f", {len(self.choices)} choices"
        return f"<Explained: {len(self)} prompt{'s' * (len(self) != 1)}{choices}>"

    @property
    def wrong(self) -> list[tuple[str, str]]:
        """For each prompt a false reason and the answer that follows from it."""
        if self.mistakes is not None:
            return [(str(r), str(a)) for r, a in self.mistakes]
        rng, found = np.random.default_rng(self.seed), []
        for own in self.answers:
            others = [i for i, a in enumerate(self.answers) if bare(a) != bare(own)]
            i = int(rng.choice(others))
            found.append((self.reasons[i], self.answers[i]))
        return found

    def asked(self, i: int, reason: str | None, prompt: str | None = None) -> str:
        """The text after which prompt `i` is answered, with a reason before it or none."""
        said = "" if reason is None else f"{self.asking[0]}{spaced(reason)}"
        return f"{self.prompts[i] if prompt is None else prompt}{said}{self.asking[1]}"

    def shots(self, numbers: Sequence[int], order: Order) -> str:
        """Some of the prompts with reason and answer, to stand before another one."""
        told = {
            "before": (self._reason, self._answer),
            "after": (self._answer, self._reason),
            "alone": (self._answer,),
        }[order]
        return "".join(f"{self.prompts[i]}{''.join(f(i) for f in told)}\n\n" for i in numbers)

    def _reason(self, i: int) -> str:
        return f"{self.asking[0]}{spaced(self.reasons[i])}"

    def _answer(self, i: int) -> str:
        return f"{self.asking[1]}{spaced(self.answers[i])}"

    def rows(
        self, order: Order = "before", *, counterfactual: float = 0.0, apart: bool = False, seed: int = 0
    ) -> Rationales:
        """Texts and labels for `tuning.fit`, each prompt once (twice with `counterfactual`).

        "before": the label is reason and answer, in their order, and so on. A `counterfactual` share of the rows, drawn by `seed`, gives a false
        reason in the text and has the answer that follows from it as the label, so the loss is on the answer alone. `apart` asks for reason and
        answer in two rows, as an encoder-decoder is asked. InputError for another order, and for counterfactual rows without a reason before.
        """
        one_of(order, Order, "order=")
        if not 0 <= counterfactual <= 1 or (counterfactual and order != "before"):
            raise InputError(f"counterfactual={counterfactual}: expected a share of rows, of order='before' alone")
        rng, wrong = np.random.default_rng(seed), self.wrong
        texts, labels, groups = [], [], []
        for i in range(len(self)):
            for _ in range(2 if counterfactual else 1):
                if counterfactual and rng.random() < counterfactual:
                    made = [(self.asked(i, wrong[i][0]), spaced(wrong[i][1]))]
                elif apart and order == "before":
                    made = [
                        (self.prompts[i] + self.asking[0], spaced(self.reasons[i])),
                        (self.asked(i, self.reasons[i]), spaced(self.answers[i])),
                    ]
                else:
                    told = {
                        "before": [self._reason, self._answer],
                        "after": [self._answer, self._reason],
                        "alone": [self._answer],
                    }[order]
                    made = [(self.prompts[i], "".join(f(i) for f in told))]
                texts += [t for t, _ in made]
                labels += [y for _, y in made]
                groups += [i if self.groups is None else self.groups[i]] * len(made)
        return Rationales(texts, labels, groups=groups)


def spaced(text: str) -> str:
    """With a space in front, as a continuation has it."""
    return text if not text or text[0].isspace() else f" {text}"


def bare(text: str) -> str:
    """What is compared of an answer."""
    return " ".join(str(text).split()).strip(" .,;:!?\"'").casefold()
