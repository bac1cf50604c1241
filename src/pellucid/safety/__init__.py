"""What a model believes, monitors and gates while it speaks, steering with its price, abstention, auditors, the loop that mends."""

from pellucid.probing.direction import Direction
from pellucid.safety.abstention import abstain, answered_right
from pellucid.safety.auditors import audit
from pellucid.safety.calibrating import calibrate, conversation_scores, evaluate
from pellucid.safety.contrast import Contrast, vector
from pellucid.safety.failures import Failure, trace_failure
from pellucid.safety.fitting import fit_monitor
from pellucid.safety.formats import export_gguf, import_vectors, in_weights
from pellucid.safety.gates import Cascade, compare_stages
from pellucid.safety.guarding import Alarm
from pellucid.safety.honesty import Pressure, honesty
from pellucid.safety.improving import Improved, improve
from pellucid.safety.inspect import inspect_model, inspect_solver
from pellucid.safety.learnt import LearntEdit
from pellucid.safety.mending import Mitigation
from pellucid.safety.monitors import ABSTAIN, Feature, Monitor, Words, load_monitor
from pellucid.safety.readers import ConceptReader
from pellucid.safety.rules import Rule, ema, k_of
from pellucid.safety.semantic import ConfidenceProbe, semantic_entropy
from pellucid.safety.shifts import SHIFTS
from pellucid.safety.statements import Statements
from pellucid.safety.strengths import load_prices, prices, strengths
from pellucid.safety.thresholds import Threshold, needed, threshold
from pellucid.safety.uncertainty import confidence, doubt
from pellucid.safety.vector import Vector, ablate_direction, condition, load_vectors, save_vectors, steer

__all__ = [
    "ABSTAIN",
    "SHIFTS",
    "Alarm",
    "Cascade",
    "ConceptReader",
    "ConfidenceProbe",
    "Contrast",
    "Direction",
    "Failure",
    "Feature",
    "Improved",
    "LearntEdit",
    "Mitigation",
    "Monitor",
    "Pressure",
    "Rule",
    "Statements",
    "Threshold",
    "Vector",
    "Words",
    "ablate_direction",
    "abstain",
    "answered_right",
    "audit",
    "calibrate",
    "compare_stages",
    "condition",
    "confidence",
    "conversation_scores",
    "doubt",
    "ema",
    "evaluate",
    "export_gguf",
    "fit_monitor",
    "honesty",
    "import_vectors",
    "improve",
    "in_weights",
    "inspect_model",
    "inspect_solver",
    "k_of",
    "load_monitor",
    "load_prices",
    "load_vectors",
    "needed",
    "prices",
    "save_vectors",
    "semantic_entropy",
    "steer",
    "strengths",
    "threshold",
    "trace_failure",
    "vector",
]
