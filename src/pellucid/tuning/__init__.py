"""Models trained so that their reasons can be read, with the price and the control beside the promise."""

from pellucid.tuning.attending import Attend, AttentionEntropy, NeuronL1
from pellucid.tuning.bottleneck import Bottleneck, interventions
from pellucid.tuning.data import Rationales
from pellucid.tuning.fit import Diverged, Tuned, fit
from pellucid.tuning.frontier import frontier
from pellucid.tuning.heads import classifier
from pellucid.tuning.internals import Direction, ProbePenalty, direction, evasion
from pellucid.tuning.objective import Objective
from pellucid.tuning.parts import Only
from pellucid.tuning.reasons import Augment, Consistency, RightReasons
from pellucid.tuning.select import Select
from pellucid.tuning.sparse import Largest, Sparse, SparseAttention, TopNeurons, entmax15, sparsemax, sparsity
from pellucid.tuning.trainer import trainer

__all__ = [
    "Attend",
    "AttentionEntropy",
    "Augment",
    "Bottleneck",
    "Consistency",
    "Direction",
    "Diverged",
    "Largest",
    "NeuronL1",
    "Objective",
    "Only",
    "ProbePenalty",
    "Rationales",
    "RightReasons",
    "Select",
    "Sparse",
    "SparseAttention",
    "TopNeurons",
    "Tuned",
    "classifier",
    "direction",
    "entmax15",
    "evasion",
    "fit",
    "frontier",
    "interventions",
    "sparsemax",
    "sparsity",
    "trainer",
]
