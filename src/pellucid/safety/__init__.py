"""What a model believes, monitors and gates while it speaks, steering with its price, and the loop that mends."""

from pellucid.safety.contrast import Contrast, vector
from pellucid.safety.formats import export_gguf, import_vectors, in_weights
from pellucid.safety.learnt import LearntEdit
from pellucid.safety.strengths import strengths
from pellucid.safety.vector import Vector, ablate_direction, condition, load_vectors, save_vectors, steer

__all__ = [
    "Contrast",
    "LearntEdit",
    "Vector",
    "ablate_direction",
    "condition",
    "export_gguf",
    "import_vectors",
    "in_weights",
    "load_vectors",
    "save_vectors",
    "steer",
    "strengths",
    "vector",
]
