"""All methods by their names."""

from collections.abc import Callable

from pellucid.attribution.deeplift import deeplift
from pellucid.attribution.expected_gradients import expected_gradients
from pellucid.attribution.integrated_gradients import integrated_gradients
from pellucid.attribution.lime import lime
from pellucid.attribution.occlusion import occlusion
from pellucid.attribution.owen import owen, partition
from pellucid.attribution.relevance import relevance_propagation
from pellucid.attribution.saliency import gradient_x_input, saliency, smoothgrad
from pellucid.attribution.shapley import exact_shapley, kernel_shap, shapley
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
