"""What can be read off each layer, how surely, and does the model use it?"""

from pellucid.probing.amnesic import amnesic
from pellucid.probing.conllu import Treebank
from pellucid.probing.controls import beside_random, control_task, random_twin, selectivity
from pellucid.probing.description import online_code, variational_code
from pellucid.probing.direction import Direction
from pellucid.probing.edges import Training, edge_probing
from pellucid.probing.erasure import Erase, Inlp, Leace, RandomSubspace
from pellucid.probing.examples import Examples, Spans
from pellucid.probing.features import Features, read
from pellucid.probing.linear import LogisticProbe, RidgeProbe
from pellucid.probing.probe import Protocol, balanced, probe
from pellucid.probing.questions import questions, relation_statements, statements
from pellucid.probing.roc import roc
from pellucid.probing.solver import logistic, ridge
from pellucid.probing.structural import structural
from pellucid.probing.traces import ProbeTraces

__all__ = [
    "Direction",
    "Erase",
    "Examples",
    "Features",
    "Inlp",
    "Leace",
    "LogisticProbe",
    "ProbeTraces",
    "Protocol",
    "RandomSubspace",
    "RidgeProbe",
    "Spans",
    "Training",
    "Treebank",
    "amnesic",
    "balanced",
    "beside_random",
    "control_task",
    "edge_probing",
    "logistic",
    "online_code",
    "probe",
    "questions",
    "random_twin",
    "read",
    "relation_statements",
    "ridge",
    "roc",
    "selectivity",
    "statements",
    "structural",
    "variational_code",
]
