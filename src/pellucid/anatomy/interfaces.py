"""Where transformers hands over attention and experts: the two registries every dispatching family goes through.

`AttentionInterface.get_interface` returns the function a family calls as
`fn(module, query, key, value, mask, **kwargs) -> (z, pattern)`, and `ExpertsInterface.get_interface` the one it
calls as `fn(module, hidden, top_k_index, top_k_weights) -> out`. While a run of ours is active in a thread, both
return a wrapper that tells the run first. Configurations, masks and modules stay untouched, and every other thread
(and this one, once the last run has ended) gets the native functions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.modeling_utils import AttentionInterface


class Listener(Protocol):
    """What a run provides: it is called in place of the native function, which it may call, change or replace."""

    def attention(
        self, native: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]: ...

    def experts(self, native: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...


_lock = threading.Lock()
_listeners: dict[int, list[Listener]] = {}  # thread -> its runs, innermost last
_native = (AttentionInterface.get_interface, ExpertsInterface.get_interface)


def _attention_interface(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Any:
    native = _native[0](self, implementation, default)
    stack = _listeners.get(threading.get_ident())
    if not stack:
        return native
    listener = stack[-1]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *a: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        mask = kw.pop("attention_mask", mask)
        if a:  # gpt_bigcode and friends pass the scaling by position
            kw.update(zip(("scaling", "dropout"), a, strict=False))
        return listener.attention(native, module, query, key, value, mask, **kw)

    return attention


def _experts_interface(self: ExpertsInterface, implementation: str, default: Callable[..., Any]) -> Any:
    native = _native[1](self, implementation, default)
    stack = _listeners.get(threading.get_ident())
    if not stack:
        return native
    listener = stack[-1]
    return lambda module, *a, **kw: listener.experts(native, module, *a, **kw)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear this thread's attention and experts calls; the registries are restored on exit."""
    me = threading.get_ident()
    with _lock:
        if not _listeners:
            AttentionInterface.get_interface = _attention_interface
            ExpertsInterface.get_interface = _experts_interface
        _listeners.setdefault(me, []).append(listener)
    try:
        yield
    finally:
        with _lock:
            _listeners[me].pop()
            if not _listeners[me]:
                del _listeners[me]
            if not _listeners:
                AttentionInterface.get_interface, ExpertsInterface.get_interface = _native
