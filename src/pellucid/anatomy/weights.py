"""Linear maps of a model as plain matrices, whatever class, orientation or quantisation holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear_map(module: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    """The map x -> x @ W + b of a linear-like module for inputs of size `width`: W [in, out] and b [out] or None.

    Floating-point weights are read off; quantised or offloaded ones are found by calling the module on the identity.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    readable = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta
    if readable and isinstance(weight, Tensor):
        conv1d = type(module).__name__ == "Conv1D"  # transformers' GPT-2 layer keeps [in, out]
        matrix = weight if conv1d or (not isinstance(module, nn.Linear) and weight.shape[1] != width) else weight.T
        if matrix.shape[0] == width:
            return matrix, bias
    device = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), torch.device("cpu"))
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    with torch.no_grad():
        eye = torch.eye(width, device=device, dtype=floats[0] if floats else torch.float32)
        zero = module(torch.zeros_like(eye[:1]))
        return module(eye) - zero, zero[0]
