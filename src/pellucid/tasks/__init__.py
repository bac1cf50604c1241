"""Prompts with answers and counterfactuals, aligned for any tokenizer: one task, one file.

Each task is a plain function: tokenizer first, then `n`, `seed` and its options; it returns `Prompts` (random tokens, which are no text, are ids).
"""

from pellucid.tasks.agreement import subject_verb_agreement
from pellucid.tasks.comparison import greater_than
from pellucid.tasks.ioi import indirect_objects
from pellucid.tasks.professions import gendered_professions
from pellucid.tasks.prompts import Draft, Prompts, assemble
from pellucid.tasks.repetition import repeated_tokens
from pellucid.tasks.world import RELATIONS, capitals, facts

__all__ = [
    "RELATIONS",
    "Draft",
    "Prompts",
    "assemble",
    "capitals",
    "facts",
    "gendered_professions",
    "greater_than",
    "indirect_objects",
    "repeated_tokens",
    "subject_verb_agreement",
]
