"""Where does the model look, and does that say why it answers as it does?"""

from pellucid.attention.adversarial import adversarial_attention, edits
from pellucid.attention.correlation import attention_correlation
from pellucid.attention.dependencies import head_relations
from pellucid.attention.diagnostic import attention_diagnostic
from pellucid.attention.erasure import attention_erasure
from pellucid.attention.flow import flow
from pellucid.attention.gradients import attention_gradient, gradient_weighted, relevance
from pellucid.attention.heads import head_clusters, head_summaries
from pellucid.attention.norms import norm_weighted
from pellucid.attention.patterns import patterns
from pellucid.attention.permutation import permuted_attention
from pellucid.attention.retraining import adversarial_training, uniform_attention
from pellucid.attention.rollout import rollout
from pellucid.attention.value_zeroing import value_zeroing

__all__ = [
    "adversarial_attention",
    "adversarial_training",
    "attention_correlation",
    "attention_diagnostic",
    "attention_erasure",
    "attention_gradient",
    "edits",
    "flow",
    "gradient_weighted",
    "head_clusters",
    "head_relations",
    "head_summaries",
    "norm_weighted",
    "patterns",
    "permuted_attention",
    "relevance",
    "rollout",
    "uniform_attention",
    "value_zeroing",
]
