"""What do single neurons hold, and which words name them?"""

from pellucid.neurons import dictionaries
from pellucid.neurons.clustering import UnitClusters, UnitVectors, unit_clusters
from pellucid.neurons.compositional import Beam, Concepts, Formula, compositional
from pellucid.neurons.contexts import Context, UnitContexts, read_contexts
from pellucid.neurons.directions import input_weights, logit_effects, output_weights
from pellucid.neurons.harvest import Harvest, Moment, Units, harvest
from pellucid.neurons.judges import CallableJudge, Judge, ModelJudge, StatisticalJudge
from pellucid.neurons.knowledge import knowledge_attribution, knowledge_effect, knowledge_neurons
from pellucid.neurons.naming import Description, ModelExplainer, StatisticalExplainer, describe
from pellucid.neurons.neuron_page import neuron_page
from pellucid.neurons.neuronpedia import export_neuronpedia
from pellucid.neurons.scoring import random_directions, score_descriptions
from pellucid.neurons.search import Exchanges, activating_inputs
from pellucid.neurons.selectivity import neuron_selectivity
from pellucid.neurons.superposition import crowding, dimensionality, interference, toy_model

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
    "compositional",
    "crowding",
    "describe",
    "dictionaries",
    "dimensionality",
    "export_neuronpedia",
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
