"""What do single neurons hold, and which words name them?"""

from pellucid.neurons import dictionaries
from pellucid.neurons.clustering import UnitClusters, UnitVectors, unit_clusters
from pellucid.neurons.compositional import Beam, Concepts, Formula, compositional, fires
from pellucid.neurons.contexts import activations, apart
from pellucid.neurons.effects import logit_effects
from pellucid.neurons.excerpts import Context, UnitContexts, read_contexts
from pellucid.neurons.harvest import Harvest, Moment, Units, harvest
from pellucid.neurons.judges import CallableJudge, Judge, ModelJudge, StatisticalJudge
from pellucid.neurons.knowledge import chosen, knowledge_attribution, knowledge_effect, knowledge_neurons
from pellucid.neurons.naming import ModelExplainer, describe
from pellucid.neurons.pages import neuron_page
from pellucid.neurons.scoring import random_directions, score_descriptions
from pellucid.neurons.search import Exchanges, activating_inputs
from pellucid.neurons.selectivity import neuron_selectivity
from pellucid.neurons.statistical import Description, StatisticalExplainer
from pellucid.neurons.superposition import crowding, dimensionality, interference, toy_model
from pellucid.neurons.weights import input_weights, output_weights

__all__ = [
    "Beam",
    "CallableJudge",
    "Concepts",
    "Context",
    "Description",
    "Exchanges",
    "Formula",
    "Harvest",
    "Judge",
    "ModelExplainer",
    "ModelJudge",
    "Moment",
    "StatisticalExplainer",
    "StatisticalJudge",
    "UnitClusters",
    "UnitContexts",
    "UnitVectors",
    "Units",
    "activating_inputs",
    "activations",
    "apart",
    "chosen",
    "compositional",
    "crowding",
    "describe",
    "dictionaries",
    "dimensionality",
    "fires",
    "harvest",
    "input_weights",
    "interference",
    "knowledge_attribution",
    "knowledge_effect",
    "knowledge_neurons",
    "logit_effects",
    "neuron_page",
    "neuron_selectivity",
    "output_weights",
    "random_directions",
    "read_contexts",
    "score_descriptions",
    "toy_model",
    "unit_clusters",
]
