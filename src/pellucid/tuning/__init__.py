"""Models trained so that their reasons can be read, with the price and the control beside the promise."""

from pellucid.probing.direction import Direction
from pellucid.tuning.attending import Attend, AttentionEntropy, NeuronL1
from pellucid.tuning.bottleneck import Bottleneck
from pellucid.tuning.data import Rationales
from pellucid.tuning.explained import Explained
from pellucid.tuning.fit import Diverged, Tuned, fit, load_tuned
from pellucid.tuning.frontier import frontier
from pellucid.tuning.heads import classifier
from pellucid.tuning.internals import ProbePenalty, direction, evasion
from pellucid.tuning.interventions import interventions
from pellucid.tuning.objective import Objective
from pellucid.tuning.outside import reward, with_internals
from pellucid.tuning.parts import Only
from pellucid.tuning.places import Compared, compare_parts, importance
from pellucid.tuning.properties import ProbeTask, Unlearn
from pellucid.tuning.pruning import SparseWeights, WeightL1, pruned, weight_sparsity, weight_zeros
from pellucid.tuning.reasons import Augment, Consistency, RightReasons
from pellucid.tuning.routing import Locality, Route, parts_off
from pellucid.tuning.select import Select
from pellucid.tuning.sparse import Largest, Sparse, SparseAttention, TopNeurons, entmax15, sparsemax, sparsity
from pellucid.tuning.tested import reason_tests
from pellucid.tuning.trainer import trainer

__all__ = [
    "Attend",
    "AttentionEntropy",
    "Augment",
    "Bottleneck",
    "Compared",
    "Consistency",
    "Direction",
    "Diverged",
    "Explained",
    "Largest",
    "Locality",
    "NeuronL1",
    "Objective",
    "Only",
    "ProbePenalty",
    "ProbeTask",
    "Rationales",
    "RightReasons",
    "Route",
    "Select",
    "Sparse",
    "SparseAttention",
    "SparseWeights",
    "TopNeurons",
    "Tuned",
    "Unlearn",
    "WeightL1",
    "classifier",
    "compare_parts",
    "direction",
    "entmax15",
    "evasion",
    "fit",
    "frontier",
    "importance",
    "interventions",
    "load_tuned",
    "parts_off",
    "pruned",
    "reason_tests",
    "reward",
    "sparsemax",
    "sparsity",
    "trainer",
    "weight_sparsity",
    "weight_zeros",
    "with_internals",
]
