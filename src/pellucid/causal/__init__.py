"""What happens to the answer when a part of the model is changed?"""

from pellucid.causal.ablation import ablation
from pellucid.causal.abstraction import CausalModel, Task, alignment_search, interchange
from pellucid.causal.alignment import DistributedAlignment
from pellucid.causal.attribution_patching import attribution_patching
from pellucid.causal.counterfactual import counterfactual
from pellucid.causal.edge_ablation import edge_ablation
from pellucid.causal.mediation import concentration, interaction, mediation
from pellucid.causal.mitigation import mitigating_edits, mitigation
from pellucid.causal.model_difference import model_difference
from pellucid.causal.patching import patching
from pellucid.causal.path_patching import path_patching
from pellucid.causal.professions import profession_prompts
from pellucid.causal.tracing import tracing, window_curve

__all__ = [
    "CausalModel",
    "DistributedAlignment",
    "Task",
    "ablation",
    "alignment_search",
    "attribution_patching",
    "concentration",
    "counterfactual",
    "edge_ablation",
    "interaction",
    "interchange",
    "mediation",
    "mitigating_edits",
    "mitigation",
    "model_difference",
    "patching",
    "path_patching",
    "profession_prompts",
    "tracing",
    "window_curve",
]
