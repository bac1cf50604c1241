"""Which heads and MLPs, talking to which, make this answer? Find the circuit, run it alone, and judge it."""

from pellucid.circuits.acdc import acdc, acdc_scores
from pellucid.circuits.circuit import Circuit
from pellucid.circuits.curve import faithfulness_curve, stability
from pellucid.circuits.edge_attribution import edge_attribution
from pellucid.circuits.exact import exact_patching
from pellucid.circuits.execution import Runner, wire
from pellucid.circuits.graph import Graph, Split
from pellucid.circuits.judge import judge, test
from pellucid.circuits.pruning import Pruning
from pellucid.circuits.roles import head_roles
from pellucid.circuits.scores import SIZES, EdgeScores

__all__ = [
    "SIZES",
    "Circuit",
    "EdgeScores",
    "Graph",
    "Pruning",
    "Runner",
    "Split",
    "acdc",
    "acdc_scores",
    "edge_attribution",
    "exact_patching",
    "faithfulness_curve",
    "head_roles",
    "judge",
    "stability",
    "test",
    "wire",
]
