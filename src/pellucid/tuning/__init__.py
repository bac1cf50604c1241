"""Models trained so that their reasons can be read, with the price and the control beside the promise."""

from pellucid.tuning.data import Rationales
from pellucid.tuning.fit import Diverged, Tuned, fit
from pellucid.tuning.heads import classifier
from pellucid.tuning.objective import Objective
from pellucid.tuning.parts import Only
from pellucid.tuning.reasons import Augment, Consistency, RightReasons

__all__ = [
    "Augment",
    "Consistency",
    "Diverged",
    "Objective",
    "Only",
    "Rationales",
    "RightReasons",
    "Tuned",
    "classifier",
    "fit",
]
