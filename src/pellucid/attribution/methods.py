"""All methods by their names."""

from collections.abc import Callable

from pellucid.attribution.deeplift import deeplift
from pellucid.attribution.expected_gradients import expected_gradients
from pellucid.attribution.gradient_x_input import gradient_x_input
from pellucid.attribution.integrated_gradients import integrated_gradients
from pellucid.attribution.kernel_shap import kernel_shap
from pellucid.attribution.lime import lime
from pellucid.attribution.occlusion import occlusion
from pellucid.attribution.owen import owen, partition
from pellucid.attribution.relevance import relevance_propagation
from pellucid.attribution.saliency import saliency
from pellucid.attribution.shapley import exact_shapley, shapley
from pellucid.attribution.smoothgrad import smoothgrad
from pellucid.results import Result

METHODS: dict[str, Callable[..., Result]] = {
    "saliency": saliency,
    "gradient_x_input": gradient_x_input,
    "smoothgrad": smoothgrad,
    "integrated_gradients": integrated_gradients,
    "expected_gradients": expected_gradients,
    "deeplift": deeplift,
    "occlusion": occlusion,
    "lime": lime,
    "kernel_shap": kernel_shap,
    "shapley": shapley,
    "exact_shapley": exact_shapley,
    "owen": owen,
    "partition": partition,
    "relevance": relevance_propagation,
}
