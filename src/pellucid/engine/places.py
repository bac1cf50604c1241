"""Where is a prompt's answer read? At its end, at the mask, or nowhere: of the whole text.

What logits mean is a fact about the model (`pellucid.anatomy.answering`); from it and the prompt follows the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pellucid.anatomy.map import Anatomy
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import trailing_marks
from pellucid.errors import InputError

Kind = Literal[
    "next token", "first token", "masked token", "class", "value", "label", "span", "continuation", "reading", "vectors",
    "similarity",
]  # fmt: skip


class Asked(Protocol):
    """What this file asks of a `pellucid.model.Model`."""

    tokenizer: Any
    name: str

    @property
    def anatomy(self) -> Anatomy: ...


def kind_of(model: Asked, inputs: Inputs) -> Kind:
    """The kind of question these prompts ask, from what the model's logits mean."""
    answering = model.anatomy.answering
    if answering.meaning != "tokens":
        return answering.meaning
    if "decoder" in inputs.streams:
        return "first token" if inputs.stream("").ids.shape[1] == 1 else "next token"
    return "masked token" if answering.masked and model.anatomy.stacks[-1].causal is False else "next token"


def answer_position(model: Asked, inputs: Inputs) -> int | None:
    """Where these prompts are answered, counted on their real tokens; None for a whole text.

    InputError where a masked model's prompt has not exactly one mask, or prompts are answered at different places.
    """
    kind = kind_of(model, inputs)
    if kind not in ("next token", "first token", "masked token"):
        return None
    stream = inputs.stream("")
    rows = [row[real.bool()].tolist() for row, real in zip(stream.ids, stream.mask, strict=True)]
    if kind == "masked token":
        at = [_mask(model, row) for row in rows]
    else:
        at = [-1 - trailing_marks(model.tokenizer, row) if "decoder" not in inputs.streams else -1 for row in rows]
    if len(set(at)) > 1:  # the same place from the end?
        at = [i - len(row) if i >= 0 else i for i, row in zip(at, rows, strict=True)]
    if len(set(at)) > 1:
        raise InputError(
            "these prompts are answered at different places (masks, marks at the end): ask them one at a time"
        )
    return at[0]


def _mask(model: Asked, ids: Sequence[int]) -> int:
    """The position of the only mask."""
    token = getattr(model.tokenizer, "mask_token_id", None)
    if token is None:
        raise InputError(
            "this model fills in a mask, and its tokenizer has none: give a metric with position=, such as "
            "logit(' a', position=3)"
        )
    found = [i for i, each in enumerate(ids) if each == token]
    if len(found) != 1:
        raise InputError(
            f"the prompt has {len(found) or 'no'} mask tokens, and this model answers at one: write "
            f"{model.tokenizer.mask_token} once, where the answer goes, or give a metric with position=, such as "
            "logit(' a', position=3)"
        )
    return found[0]
