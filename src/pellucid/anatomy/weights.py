"""Linear maps of a model as plain matrices, whatever class, orientation or quantisation holds them."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pellucid.anatomy.fingerprint import state

ROWS = 256  # of the identity, put in at a time


class _Found:
    """Matrices that were found by calling a module, while its state stays; the oldest go when they grow too large."""

    def __init__(self, most: int = 1 << 26) -> None:
        self.most, self.lock = most, threading.Lock()
        self.kept: WeakKeyDictionary[nn.Module, tuple[Hashable, tuple[Tensor, Tensor]]] = WeakKeyDictionary()

    def __call__(self, module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        now = shape, state(module)
        known = self.kept.get(module)
        if known is not None and known[0] == now:
            return known[1]
        found = _by_identity(module, shape)
        with self.lock:
            self.kept.pop(module, None)
            self.kept[module] = now, found
            while sum(w.numel() for _, (w, _) in self.kept.values()) > self.most and len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
        return found


_found = _Found()


def _by_identity(module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """W [in, out] and b [out] from what the module makes of unit vectors. Its hooks are not called: a run may be on."""
    width = math.prod(shape)
    device = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), torch.device("cpu"))
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    call = module.forward if not isinstance(module, nn.Conv1d) else lambda x: module.forward(x.mT).mT  # channels second
    with torch.no_grad():
        eye = torch.eye(width, device=device, dtype=floats[0] if floats else torch.float32).view(1, width, *shape)
        zero = call(torch.zeros_like(eye[:, :1])).flatten(2)
        made = [call(rows).flatten(2) - zero for rows in eye.split(ROWS, 1)]
        return torch.cat(made, 1)[0], zero[0, 0]


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
    return _found(module, shape)
