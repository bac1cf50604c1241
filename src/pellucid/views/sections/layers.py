"""When does the answer appear? The logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.lenses import logit_lens
from pellucid.views.counterfactual import unrelated
from pellucid.views.evidence import Evidence
from pellucid.views.forms import lens
from pellucid.views.markup import Html, percent, quoted, tag
from pellucid.views.page import Section
from pellucid.views.question import Question
from pellucid.views.schema import Document

WIDEST = 64  # tokens
TITLE = "When does the answer appear?"


def layers(question: Question, top: int, evidence: Evidence) -> Section:
    assert question.target is not None and question.against is not None
    window = Window.of(question.answered, question.position)
    targets = [question.word(question.target), question.word(question.against)]
    found = logit_lens(question.model, question.inputs, top=top, targets=targets, positions=window.selector)
    names = ["embed" if layer == -1 else str(layer) for layer in found["layer"].values]
    rank = found["target_rank"].values  # [layer, position, target]
    at = window.positions.index(question.position)
    likely = np.exp(found["target_log_probability"].values[:, at])  # [layer, target]
    settled = _settled(rank[:, at, 0])
    if settled is not None:
        evidence.settled, evidence.leads = names[settled], _elsewhere(question, targets, settled)
    lead = (
        "The model’s state after every layer, read as if it were the last: through the final norm and the unembedding (logit lens). Each cell shows the "
        "best guess for what follows that token; outlined where it is what the model ends up with. Click a cell to pin its word and follow it."
    )
    return Section(
        "layers", "The layers", TITLE, lead, window.note(len(question.answered)) or "", (Document(title="Logit lens", data=lens(found)),),
        care="early layers were never trained to be read this way, so a blank there is no proof that the answer is absent. "
        f"The last row was checked against the model’s own output. {_control(question, evidence)}",
        finding=_finding(names, rank[:, at, 0], likely[:, 0], said_of(question)), results=(found,),
    )  # fmt: skip


def _elsewhere(question: Question, targets: list[str | int], settled: int) -> dict[str, list[bool]]:
    """Whether the answer is the top guess there from that layer on as well, on prompts that should not lead to it."""
    prompts: dict[str, Any] = {f"unrelated prompt {i + 1}": p for i, p in enumerate(unrelated(question))}
    if question.counterfactual is not None:
        prompts["the counterfactual"] = question.counterfactual
    found = {}
    for name, prompt in prompts.items():
        rank = logit_lens(question.model, prompt, top=1, targets=targets, positions=question.last_first)[
            "target_rank"
        ].values
        found[name] = (rank[settled:, 0, 0] == 0).tolist()
    return found


def _control(question: Question, evidence: Evidence) -> str:
    if not evidence.leads:
        return ""
    where = [name for name, leads in evidence.leads.items() if any(leads)]
    said = f"on {', '.join(where)} too" if where else "on none of them"
    return f"Control: the same lens on {len(evidence.leads)} other prompts of this length shows {said_of(question)} first {said}."


def said_of(question: Question) -> str:
    assert question.target is not None
    return quoted(question.target.text)


def _finding(names: list[str], rank: np.ndarray, likely: np.ndarray, said: str) -> str:
    """From which layer on the answer leads for good."""
    if rank[-1] != 0:
        best = int(rank.argmin())
        return f"{said} never ends up as the top guess; {_after(names[best])} it comes closest, with {_before(rank[best])}."
    first = _settled(rank)
    assert first is not None
    if first == 0:
        return f"{said} is the top guess from the embedding on."
    return (
        f"{said} becomes the top guess after layer {names[first]} ({percent(float(likely[first]))}; the last layer is {names[-1]}) and stays it; "
        f"{_after(names[first - 1])} there {'were' if rank[first - 1] > 1 else 'was'} {_before(rank[first - 1])}."
    )


def _before(rank: float) -> str:
    return f"{int(rank)} words likelier" if rank > 1 else "one word likelier"


def _settled(rank: np.ndarray) -> int | None:
    """The first layer from which on the rank stays 0; None where it does not end there."""
    return len(rank) - int(np.argmin(np.append(rank[::-1] == 0, False))) if rank[-1] == 0 else None


def _after(layer: str) -> str:
    return "in the embedding" if layer == "embed" else f"after layer {layer}"


@dataclass(frozen=True)
class Window:
    """Which part of a long prompt is shown: positions `start` to `stop` of `length`, which end near where the answer is read.

    >>> Window.of("abc", 2).selector
    >>> Window.of("x" * 100, 99).selector
    slice(36, 100, None)
    >>> Window.of("x" * 100, 80).positions[0]
    20
    """

    start: int
    stop: int
    length: int

    @classmethod
    def of(cls, tokens: Sequence[str], answer: int) -> Window:
        stop = min(len(tokens), max(answer + 4, WIDEST))
        return cls(max(0, stop - WIDEST), stop, len(tokens))

    @property
    def positions(self) -> list[int]:
        return list(range(self.start, self.stop))

    @property
    def selector(self) -> slice | None:
        return None if self.stop - self.start == self.length else slice(self.start, self.stop)

    def note(self, length: int) -> Html | None:
        if self.selector is None:
            return None
        return tag("p", f"Shown are tokens {self.start} to {self.stop - 1} of {length}.", class_="note")
