"""A second device without a card: tensors that say they live on another device, though their values are on the host.

What a card would refuse is refused: mixing with tensors of the host (but for numbers), `numpy()`. What a card would wait for is
counted: `synchronisations` are reads of a value from the host (`item`, `tolist`, `bool`, shapes that depend on values) and
moves to it. Inside `there()` the name `DEVICE` means this device, in factories and moves.

    with there() as counts:
        model = pl.load(moved(module), tokenizer=tokenizer)
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cpu:1")  # torch compares it as another device, and needs no driver for it
COUNTS: Counter[str] = Counter()
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
         aten.masked_select.default, aten.unique_dim.default, aten._unique2.default}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MADE = (torch.tensor, torch.as_tensor, torch.from_numpy)


def away(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device) == DEVICE


class Away(Tensor):
    """A tensor of the other device; `held` are its values, on the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        strided = (
            {} if held.layout != torch.strided else {"strides": held.stride(), "storage_offset": held.storage_offset()}
        )
        made = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, layout=torch.strided, device=DEVICE,
                                             requires_grad=held.requires_grad, **strided)  # fmt: skip
        made.held = held.detach()
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Away({self.held})"

    def tolist(self) -> Any:
        COUNTS["synchronisations"] += 1
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor that is elsewhere has no numpy(): bring it to the host first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (aten._to_copy.default, aten.copy_.default):
            return _moved(function, args, kwargs)
        COUNTS["synchronisations"] += function in WAITS
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        strangers = [t for t in given if not isinstance(t, Away) and t.ndim and t.numel()]
        if strangers and not (function in INDEXING and isinstance(args[0], Away)):
            shapes = [(tuple(t.shape), str(t.device)) for t in given]
            raise RuntimeError(f"Expected all tensors to be on the same device, but {function} was given {shapes}")
        if away(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(_host, args), **tree_map(_host, kwargs))
        if function is aten._local_scalar_dense.default:
            return found
        own = {id(t.held): t for t in given if isinstance(t, Away)}  # what is written in place stays who it is
        return tree_map(lambda x: x if not isinstance(x, Tensor) else own[id(x)] if id(x) in own else Away(x), found)


def _host(x: Any) -> Any:
    return x.held if isinstance(x, Away) else x


def _moved(function: Any, args: Any, kwargs: Any) -> Any:
    if function is aten.copy_.default:
        to, source = args[:2]
        if isinstance(source, Away) and not isinstance(to, Away):
            COUNTS["synchronisations"] += 1
        function(_host(to), _host(source), *args[2:])
        return to
    target = kwargs.pop("device", None)
    (x,) = args
    made = function(_host(x), **kwargs)
    if away(target) or (target is None and isinstance(x, Away)):
        return Away(made)
    COUNTS["synchronisations"] += isinstance(x, Away)
    return made


class _Factories(TorchDispatchMode):
    """`torch.zeros(..., device=DEVICE)` and moves of the host's tensors make tensors that are away."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not away(kwargs.get("device")) or any(isinstance(t, Away) for t in tree_iter((args, kwargs))):
            return function(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        return tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, function(*args, **kwargs))


class _Made(TorchFunctionMode):
    """`torch.tensor(..., device=DEVICE)`, which forgets the number of a host's device; and `.cpu()`, which thinks it is there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in MADE and away(kwargs.get("device")) and not isinstance(args[0], Away):
            kwargs.pop("device")
            return Away(function(*args, **kwargs))
        if function is Tensor.new_tensor and isinstance(args[0], Away):
            return Away(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        if function is Tensor.cpu and isinstance(args[0], Away):
            return args[0].to("cpu")
        return function(*args, **kwargs)


@contextmanager
def there() -> Iterator[Counter[str]]:
    """While this lasts the other device is there, in threads that are started too; gives what is counted, from nothing."""
    COUNTS.clear()
    native = threading.Thread.run

    def run(thread: threading.Thread) -> None:  # torch's modes are a thread's own
        with _Factories(), _Made():
            native(thread)

    threading.Thread.run = run  # type: ignore[method-assign]
    try:
        with _Factories(), _Made():
            yield COUNTS
    finally:
        threading.Thread.run = native  # type: ignore[method-assign]


def moved(module: nn.Module) -> nn.Module:
    """The module with its weights away, in place."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                made.setdefault(id(p), nn.Parameter(Away(p.detach().clone()), p.requires_grad))
                part._parameters[name] = made[id(p)]
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = made.setdefault(id(b), Away(b.clone()))
    return module
