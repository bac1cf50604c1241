"""The zoo: every text model type of the installed transformers, tiny, with random weights."""

from .build import Entry, build, entry, model_types
from .inputs import inputs
from .quirks import NOT_IN_BFLOAT16, UNBUILDABLE
from .tokenizer import tokenizer

__all__ = ["NOT_IN_BFLOAT16", "UNBUILDABLE", "Entry", "build", "entry", "inputs", "model_types", "tokenizer"]
