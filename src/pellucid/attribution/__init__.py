"""Which input tokens does the answer rest on, and how far is an answer to that to be trusted?

Every method is called alike, `method(model, prompt, target, against=..., players=...)`; `METHODS` has them by name.
"""

from pellucid.attribution import evaluation
from pellucid.attribution.deeplift import deeplift
from pellucid.attribution.expected_gradients import expected_gradients
from pellucid.attribution.integrated_gradients import integrated_gradients
from pellucid.attribution.lime import lime
from pellucid.attribution.methods import METHODS
from pellucid.attribution.occlusion import occlusion
from pellucid.attribution.over_corpus import word_importance
from pellucid.attribution.owen import owen, partition
from pellucid.attribution.relevance import relevance_propagation
from pellucid.attribution.saliency import gradient_x_input, saliency, smoothgrad
from pellucid.attribution.shapley import exact_shapley, kernel_shap, shapley
from pellucid.question import continuation, every_class, label, reading, similarity

__all__ = [
    "METHODS",
    "continuation",
    "deeplift",
    "evaluation",
    "every_class",
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
    "similarity",
    "smoothgrad",
    "word_importance",
]
