"""What a model believes, monitors and gates while it speaks, steering with its price, and the loop that mends."""

from pellucid.safety.contrast import Contrast, vector
from pellucid.safety.readers import ConceptReader
from pellucid.safety.statements import Statements
from pellucid.safety.vector import Vector, ablate_direction, condition, load_vectors, save_vectors, steer

__all__ = [
    "ConceptReader",
    "Contrast",
    "Statements",
    "Vector",
    "ablate_direction",
    "condition",
    "load_vectors",
    "save_vectors",
    "steer",
    "vector",
]
