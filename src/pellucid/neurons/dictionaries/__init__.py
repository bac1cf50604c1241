"""Which directions does a site write in, when there are more of them than dimensions?"""

from pellucid.neurons.dictionaries.dictionary import Dictionary
from pellucid.neurons.dictionaries.functions import Gated, JumpReLU, ReLU, TopK
from pellucid.neurons.dictionaries.objectives import BatchTopKLoss, GatedLoss, JumpReLULoss, L1Loss, TopKLoss
from pellucid.neurons.dictionaries.quality import dictionary_quality, untrained
from pellucid.neurons.dictionaries.rows import Stream
from pellucid.neurons.dictionaries.training import SparseAutoencoder

__all__ = [
    "BatchTopKLoss",
    "Dictionary",
    "Gated",
    "GatedLoss",
    "JumpReLU",
    "JumpReLULoss",
    "L1Loss",
    "ReLU",
    "SparseAutoencoder",
    "Stream",
    "TopK",
    "TopKLoss",
    "dictionary_quality",
    "untrained",
]
