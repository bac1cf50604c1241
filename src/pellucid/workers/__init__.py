"""The same call somewhere else: on the processes of this machine, on its devices, on a Ray cluster."""

from pellucid.engine.sweep import on
from pellucid.workers.pool import Devices, Here, Pool, Processes
from pellucid.workers.ray import Ray
from pellucid.workers.vllm import VLLM

__all__ = ["VLLM", "Devices", "Here", "Pool", "Processes", "Ray", "on"]
