"""Modes a module is in for a moment: evaluation, and run as it is written rather than compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_inside: list[Any] = []  # one entry for each run of a compiled module; the first holds what restores torch's stance


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """If the module or a part of it was compiled, `torch.compile` stands aside, in all threads, while this lasts.

    Compiled code does not call hooks that came after it.
    """
    if not any(m._compiled_call_impl is not None for m in module.modules()):
        yield
        return
    with _lock:
        _inside.append(None if _inside else contextlib.ExitStack())
        if len(_inside) == 1:
            _inside[0].enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            if len(_inside) == 1:
                _inside.pop().close()
            else:
                _inside.pop()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule is in its own mode again."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
