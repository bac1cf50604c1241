"""Which input tokens does the answer rest on?"""

from pellucid.attribution.integrated_gradients import integrated_gradients

__all__ = ["integrated_gradients"]
