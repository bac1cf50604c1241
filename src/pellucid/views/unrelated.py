"""Which prompts have nothing to do with this one? As many tokens of other texts, special tokens left in their places.

They are the controls of a report: what a method finds on them, or with their states, it does not find because of what this
prompt says.
"""

from __future__ import annotations

from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import special_ids
from pellucid.views.question import Question

TEXTS = (
    "The two of them walked along the river in the evening and talked about the boats that had come in that week.",
    "If the water is too cold for the yeast, the dough will rise slowly, and the bread needs an hour more in the oven.",
    "She opened the old letter again, read it twice, and put it back between the books on the lowest shelf.",
)


def unrelated(question: Question) -> list[Inputs]:
    """One prompt of equal length from each of `TEXTS`."""
    tokenizer, ids = question.model.tokenizer, question.source.ids[0].tolist()
    special = special_ids(tokenizer)
    made = []
    for text in TEXTS:
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        fresh = iter(words * (1 + len(ids) // max(1, len(words))))
        made.append(question.model.inputs([[i if i in special else next(fresh) for i in ids]]))
    return made
