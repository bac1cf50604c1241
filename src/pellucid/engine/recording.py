"""The clean run, written down so that others can start in its middle: what each block and each attention was given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.interfaces import listening
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Anatomy, Stack
from pellucid.anatomy.trace import take
from pellucid.engine.inputs import Inputs


@dataclass(eq=False)
class AttentionCall:
    """One call of the attention interface inside a block, as the family made it."""

    k: Tensor
    v: Tensor
    mask: Any
    kwargs: dict[str, Any]


@dataclass(eq=False)
class BlockCall:
    """One call of a block: its arguments (the hidden state among them), its output and the attention calls inside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    output: Any
    attention: list[AttentionCall] = field(default_factory=list)


@dataclass(eq=False)
class Recording:
    """Every block call of one stack during one run, and the logits the run itself gave."""

    stack: Stack
    calls: list[BlockCall]
    output: Any

    @property
    def final(self) -> Tensor:
        """The last residual, as the last block gave it."""
        block = self.stack.blocks[-1]
        return take(self.calls[-1].output, block.taps["resid_post"].key)

    @property
    def logits(self) -> Tensor:
        return main_output(self.output)


class _Recorder:
    def __init__(self, anatomy: Anatomy, stack: Stack) -> None:
        self.stack, self.owner = stack, threading.get_ident()
        self.modules: dict[nn.Module, None] = {anatomy.module.get_submodule(b.module): None for b in stack.blocks}
        self.calls: list[BlockCall] = []
        self.inside = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.owner and len(self.calls) < len(self.stack.blocks):
            key = self.stack.blocks[len(self.calls)].taps["resid_pre"].key
            hidden = args[key] if isinstance(key, int) else kwargs[key]
            self.calls.append(BlockCall(args, dict(kwargs), hidden.clone(), None))
            self.inside = True

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() == self.owner:
            self.calls[-1].output = output
            self.inside = False

    def attention(
        self, native: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> Any:
        if self.inside:
            self.calls[-1].attention.append(AttentionCall(k, v, mask, kw))
        return native(module, q, k, v, mask, **kw)

    def experts(self, native: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return native(module, *args, **kwargs)


def record(anatomy: Anatomy, stack: Stack, inputs: Inputs, **forward: Any) -> Recording:
    """Run the inputs once and write the stack's block calls down."""
    recorder = _Recorder(anatomy, stack)
    hooks = [m.register_forward_pre_hook(recorder.before, with_kwargs=True) for m in recorder.modules]
    hooks += [m.register_forward_hook(recorder.after, with_kwargs=True) for m in recorder.modules]
    try:
        with torch.no_grad(), listening(recorder):
            output = anatomy.module(**inputs.tensors, **forward)
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(stack, recorder.calls, output)
