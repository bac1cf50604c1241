"""Linear maps of a model as plain matrices, whatever class, orientation or quantisation holds them."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pellucid.anatomy import parallel
from pellucid.anatomy.fingerprint import state

ROWS = 256  # of the identity, put in at a time


def plain(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers as they are: what is written to it is read back from it.

    A class of its own (of another device, of a framework) is asked by writing a few numbers to a small tensor of it; one
    that quantises, keeps its numbers in parts, or cannot be written to, does not give them back.

    >>> plain(torch.zeros(2)), plain(torch.zeros(2, dtype=torch.int8))
    (True, False)
    """
    if type(tensor) in (Tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor.is_floating_point()
    try:
        with torch.no_grad():
            one = tensor.detach()
            numbers = torch.tensor([0.1, -3.7, 1e-3, 2e2]).to(one.dtype)
            written = one.new_empty(4).copy_(numbers)
            return type(written) is type(tensor) and torch.equal(written.cpu(), numbers)
    except Exception:  # whatever such a class raises where it is not made for this
        return False


def packed(module: nn.Module) -> bool:
    """Whether a module without parts holds weights that are no plain floating-point tensors.

    >>> packed(nn.Linear(2, 2)), packed(nn.ReLU())
    (False, False)
    """
    if callable(getattr(module, "weight", None)):  # a method unpacks it
        return True
    if next(module.children(), None) is not None:
        return False
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.ndim]
    return any(t.ndim > 1 and not t.is_floating_point() for t in own) or any(
        type(p) not in (nn.Parameter, Tensor) and not plain(p) for p in module._parameters.values() if p is not None
    )


def is_packed(module: nn.Module) -> bool:
    """Whether a module is packed, or anything inside it."""
    return any(packed(m) for m in module.modules())


def grain(module: nn.Module, width: int | tuple[int, ...]) -> float:
    """How far a quantised module is from linear, relative to what it makes: some kernels round what they are given.

    Measured on random inputs: |f(x) + f(y) - f(0) - f(x + y)|. 0.0 for modules of floating-point weights.
    """
    if not is_packed(module):
        return 0.0
    shape = (width,) if isinstance(width, int) else width
    generator, like = torch.Generator().manual_seed(0), _given_to(module)
    x, y = (torch.randn(1, 16, *shape, generator=generator).to(like) for _ in range(2))
    with torch.no_grad():
        one, other, none, both = (module.forward(t).float() for t in (x, y, torch.zeros_like(x), x + y))
    return float((one + other - none - both).abs().max()) / max(1e-6, float(both.abs().max()))


def lets_gradients_through(module: nn.Module, width: int | tuple[int, ...]) -> bool:
    """Whether the gradient that comes back through a linear module is that of its matrix, tried on random input: kernels
    for inference may have none, and one through a rounding is none of the function.
    """
    shape = (width,) if isinstance(width, int) else width
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, *shape, generator=generator).to(_given_to(module)).requires_grad_()
    weight, _ = linear_map(module, width)
    pull = torch.randn(weight.shape[1], generator=generator).to(weight)
    with torch.enable_grad():
        made = module.forward(x).flatten(2)
        try:
            (found,) = torch.autograd.grad(made, x, pull.to(made).expand_as(made), allow_unused=True)
        except (RuntimeError, NotImplementedError):
            return False
    expected = (weight @ pull).float()
    return found is not None and float((found.flatten(2).float() - expected).abs().max()) < 0.1 * float(
        expected.abs().max()
    )


def _given_to(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype and device a module takes."""
    device = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), torch.device("cpu"))
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    return torch.empty(0, dtype=floats[0] if floats else torch.float32, device=device)


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
    call = module.forward if not isinstance(module, nn.Conv1d) else lambda x: module.forward(x.mT).mT  # channels second
    with torch.no_grad():
        eye = torch.eye(width).to(_given_to(module)).view(1, width, *shape)
        zero = call(torch.zeros_like(eye[:, :1])).flatten(2)
        made = [call(rows).flatten(2) - zero for rows in eye.split(ROWS, 1)]
        return torch.cat(made, 1)[0], zero[0, 0]


def inputs_first(module: nn.Module, shape: int | tuple[int, ...]) -> bool:
    """Whether a linear-like module keeps its weight as [in, out] (GPT-2's Conv1D), not as [out, in]."""
    return linear_map(module, shape)[0].stride() == module.get_parameter("weight").stride()


def linear_map(module: nn.Module, width: int | tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """The map x -> x @ W + b of a linear-like module for inputs of size `width`: W [in, out] and b [out] or
    None.

    Floating-point weights are read off; quantised, adapted, offloaded or grouped ones (then `width` is the shape of
    one token's input) are found by calling the module on the identity, and are what it does as a whole.
    """
    shape = (width,) if isinstance(width, int) else width
    width = math.prod(shape)
    weight, bias = (None if x is None else parallel.whole(x) for x in map(module._parameters.get, ("weight", "bias")))
    whole = weight is not None and next(module.children(), None) is None
    readable = whole and plain(weight) and not weight.is_meta  # type: ignore[arg-type, union-attr]
    if readable and isinstance(module, nn.Conv1d) and module.groups == 1 and module.kernel_size == (1,):
        return weight[:, :, 0].T, bias  # type: ignore[index]
    if readable and isinstance(weight, Tensor) and weight.ndim == 2:
        conv1d = type(module).__name__ == "Conv1D"  # transformers' GPT-2 layer keeps [in, out]
        matrix = weight if conv1d or (not isinstance(module, nn.Linear) and weight.shape[1] != width) else weight.T
        if matrix.shape[0] == width:
            return matrix, bias
    return _found(module, shape)
