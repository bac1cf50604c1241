"""What happens to the answer when a part of the model is changed?"""

from pellucid.causal.ablation import ablation
from pellucid.causal.patching import patching

__all__ = ["ablation", "patching"]
