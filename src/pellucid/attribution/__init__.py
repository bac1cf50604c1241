"""Which input tokens does the answer rest on, and how far is an answer to that to be trusted?

Every method is called alike, `method(model, prompt, target, against=..., players=...)`; `METHODS` has them by name.
"""

from pellucid.attribution import evaluation
from pellucid.attribution.deeplift import deeplift
from pellucid.attribution.expected_gradients import expected_gradients
from pellucid.attribution.gradient_x_input import gradient_x_input
from pellucid.attribution.integrated_gradients import integrated_gradients
from pellucid.attribution.kernel_shap import kernel_shap
from pellucid.attribution.lime import lime
from pellucid.attribution.methods import METHODS
from pellucid.attribution.occlusion import occlusion
from pellucid.attribution.owen import owen, partition
from pellucid.attribution.relevance import relevance_propagation
from pellucid.attribution.saliency import saliency
from pellucid.attribution.shapley import exact_shapley, shapley
from pellucid.attribution.smoothgrad import smoothgrad
from pellucid.question import continuation, label, reading

__all__ = [
    "METHODS",
    "continuation",
    "deeplift",
    "evaluation",
    "exact_shapley",
    "expected_gradients",
    "gradient_x_input",
    "integrated_gradients",
    "kernel_shap",
    "label",
    "lime",
    "occlusion",
    "owen",
    "partition",
    "reading",
    "relevance_propagation",
    "saliency",
    "shapley",
    "smoothgrad",
]
