"""What a model believes, monitors and gates while it speaks, steering with its price, abstention, auditors, the loop that mends."""

from pellucid.safety.calibrating import calibrate, conversation_scores, evaluate
from pellucid.safety.gates import Cascade, compare_stages
from pellucid.safety.guarding import Alarm
from pellucid.safety.monitors import ABSTAIN, Direction, Feature, Monitor, Words, load_monitor
from pellucid.safety.rules import Rule, ema, k_of
from pellucid.safety.thresholds import Threshold, needed, threshold

__all__ = [
    "ABSTAIN", "Alarm", "Cascade", "Direction", "Feature", "Monitor", "Rule", "Threshold", "Words", "calibrate", "compare_stages",
    "conversation_scores", "ema", "evaluate", "k_of", "load_monitor", "needed", "threshold",
]  # fmt: skip
