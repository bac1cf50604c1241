"""Linear maps of a model as plain matrices, whatever class, orientation or quantisation holds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


ROWS = 256  # of the identity, put in at a time


def linear_map(module: nn.Module, width: int | tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """The map x -> x @ W + b of a linear-like module for inputs of size `width`: W [in, out] and b [out] or
    None.

    Floating-point weights are read off; quantised, adapted, offloaded or grouped ones (then `width` is the shape of
    one token's input) are found by calling the module on the identity, and are what it does as a whole.
    """
    shape = (width,) if isinstance(width, int) else width
    width = math.prod(shape)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    plain = type(weight) in (Tensor, nn.Parameter) and next(module.children(), None) is None
    readable = plain and weight is not None and weight.is_floating_point() and not weight.is_meta
    if readable and isinstance(module, nn.Conv1d) and module.groups == 1 and module.kernel_size == (1,):
        return module.weight[:, :, 0].T, bias
    if readable and isinstance(weight, Tensor) and weight.ndim == 2:
        conv1d = type(module).__name__ == "Conv1D"  # transformers' GPT-2 layer keeps [in, out]
        matrix = weight if conv1d or (not isinstance(module, nn.Linear) and weight.shape[1] != width) else weight.T
        if matrix.shape[0] == width:
            return matrix, bias
    device = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), torch.device("cpu"))
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    call = module if not isinstance(module, nn.Conv1d) else lambda x: module(x.mT).mT  # channels come second there
    with torch.no_grad():
        eye = torch.eye(width, device=device, dtype=floats[0] if floats else torch.float32).view(1, width, *shape)
        zero = call(torch.zeros_like(eye[:, :1])).flatten(2)
        made = [call(rows).flatten(2) - zero for rows in eye.split(ROWS, 1)]
        return torch.cat(made, 1)[0], zero[0, 0]
