"""Modes a module is in while it runs: evaluation, without a graph, and as it is written rather than compiled.

What a user has set (training or not, gradients on or off, inference mode, frozen or free weights) is theirs: it never changes
what a run gives, and is as it was when the run is over.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from pellucid.anatomy.fingerprint import parts

_lock = threading.Lock()
_inside_run: ContextVar[bool] = ContextVar("inside_run", default=False)
_evaluating: dict[nn.Module, list[Any]] = {}  # how many runs are inside, and which submodules were in training mode
_inside: list[Any] = []  # one entry for each run of a compiled module; the first holds what restores torch's stance


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """If the module or a part of it was compiled, `torch.compile` stands aside, in all threads, while this lasts.

    Compiled code does not call hooks that came after it.
    """
    if not any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in parts(module)):
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
    """Evaluation mode, in all threads; when the last of them is done every submodule is in its own mode again."""
    with _lock:
        entry = _evaluating.setdefault(module, [0, {}])
        entry[0] += 1
        if entry[0] == 1:
            entry[1] = dict.fromkeys([m for m in parts(module) if m.training], True)
            for m in entry[1]:
                m.training = False
    try:
        yield
    finally:
        with _lock:
            entry[0] -= 1
            if not entry[0]:
                del _evaluating[module]
                for m, training in entry[1].items():
                    m.training = training


@contextlib.contextmanager
def unmixed() -> Iterator[None]:
    """Numbers in the module's own precision: an autocast of the caller is set aside while something is proven."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def running(*modules: nn.Module) -> Iterator[None]:
    """How everything here runs a module: in evaluation mode, and without a graph but where code inside enables gradients.

    Inference mode is left, because what is made in it can never have gradients.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_inside_run.reset, _inside_run.set(True))
        for module in modules:
            stack.enter_context(evaluating(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def differentiable(module: nn.Module, asked: bool) -> Iterator[None]:
    """`running`, with a graph where gradients are on and either what is run asks for them (`asked`: a tensor that requires
    grad) or code of this package turned them on."""
    graph = torch.is_grad_enabled() and (asked or _inside_run.get())
    with running(module), torch.set_grad_enabled(graph):
        yield


def ordinary(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of one that was made in inference mode another one on the same memory, which can have gradients."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=x.dtype, device=x.device)
        return made.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def thaw(module: nn.Module) -> None:
    """Weights that were made in inference mode become ordinary ones on the same memory: their values stay, bit for bit."""
    made: dict[int, Any] = {}  # tied weights stay tied
    for m in module.modules():
        for own in (m._parameters, m._buffers, vars(m)):
            for name, x in list(own.items()):
                if isinstance(x, torch.Tensor) and x.is_inference():
                    if id(x) not in made:
                        new = ordinary(x)
                        made[id(x)] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
                    own[name] = made[id(x)]


def accepted_by(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments that a module's forward names; those of its class where a wrapper was put in its place that only passes
    on what it is given.
    """
    if "forward" in vars(module):
        own = inspect.signature(module.forward).parameters
        if not all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own.values()):
            return own
    return _named(type(module).forward)


@functools.lru_cache(256)
def _named(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return dict(list(inspect.signature(forward).parameters.items())[1:])  # without the module itself


def uncached(module: nn.Module) -> dict[str, Any]:
    """What tells a model not to keep keys and values for a next pass: its output would hold them, a residual's size and more
    for every layer."""
    return {"use_cache": False} if "use_cache" in accepted_by(module) else {}
