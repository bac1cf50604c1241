"""How far can an attribution be trusted?"""

from pellucid.attribution.absence import absence
from pellucid.attribution.evaluation.agreement import agreement
from pellucid.attribution.evaluation.compare import compare
from pellucid.attribution.evaluation.data import Example, plausibility, read_examples
from pellucid.attribution.evaluation.faithfulness import faithfulness
from pellucid.attribution.evaluation.sanity import (
    implementation_invariance,
    label_randomisation,
    reparametrised,
    target_randomisation,
    weight_randomisation,
)
from pellucid.attribution.evaluation.scores import random_attribution
from pellucid.attribution.evaluation.sensitivity import max_sensitivity
from pellucid.attribution.evaluation.shift import distribution_shift
from pellucid.attribution.evaluation.truth import known_truth

__all__ = [
    "Example",
    "absence",
    "agreement",
    "compare",
    "distribution_shift",
    "faithfulness",
    "implementation_invariance",
    "known_truth",
    "label_randomisation",
    "max_sensitivity",
    "plausibility",
    "random_attribution",
    "read_examples",
    "reparametrised",
    "target_randomisation",
    "weight_randomisation",
]
