"""What do single neurons hold, and which words name them?"""

from pellucid.neurons.knowledge import chosen, knowledge_attribution, knowledge_effect, knowledge_neurons

__all__ = ["chosen", "knowledge_attribution", "knowledge_effect", "knowledge_neurons"]
