"""The clean run, written down so that others can start in its middle: what each block and each attention was given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from pellucid.anatomy.interfaces import listening
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import running, uncompiled
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Stack
from pellucid.anatomy.trace import take
from pellucid.engine.inputs import Inputs
from pellucid.errors import Refused


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
    inputs: Inputs
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

    # Hooks look at the thread first: while another thread puts hooks up, torch may call one without its kwargs.

    def before(self, module: nn.Module, *given: Any) -> None:
        if threading.get_ident() == self.owner and len(self.calls) < len(self.stack.blocks):
            args, kwargs = given
            key = self.stack.blocks[len(self.calls)].taps["resid_pre"].key
            hidden = args[key] if isinstance(key, int) else kwargs[key]
            self.calls.append(BlockCall(args, dict(kwargs), hidden.clone(), None))
            self.inside = True

    def after(self, module: nn.Module, *given: Any) -> None:
        if threading.get_ident() == self.owner:
            self.calls[-1].output = given[-1]
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
        with running(anatomy.module), uncompiled(anatomy.module), listening(recorder):
            output = anatomy.module(**{**inputs.tensors, **forward})
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(stack, inputs, recorder.calls, output)


Path = tuple[Any, ...]  # of an argument: block, position or name, and keys inside containers
Axes = tuple[int | None, int]  # where an argument has the batch (None: nowhere) and the positions


class Shapes:
    """Which axes of the blocks' arguments are the batch and the positions, learnt from recordings of two sizes.

    One recording cannot tell: a batch of 11 prompts of 11 tokens has both in one number.
    """

    def __init__(self, one: Recording, other: Recording) -> None:
        self.axes: dict[Path, Axes | None] = {}
        rows, lengths, *elsewhere = zip(_sizes(one), _sizes(other), strict=True)
        shapes = dict(_tensors(other))
        for path, x in _tensors(one):
            found: dict[str, list[int]] = {"batch": [], "length": [], "odd": []}
            for axis, pair in enumerate(zip(x.shape, shapes[path].shape, strict=True)):
                if pair[0] != pair[1] and pair not in elsewhere:
                    kind = "batch" if pair == rows else "length" if pair == lengths else "odd"
                    found[kind].append(axis)
            if found["odd"] or len(found["batch"]) > 1:
                raise Refused(
                    f"{path[1]!r}, which its blocks are given, has an axis that is neither batch nor position"
                )
            self.axes[path] = None
            if len(found["length"]) == 1:  # two: a mask or bias, which attention gets as recorded
                (length,) = found["length"]
                broadcast = [length - 1] if length and x.shape[length - 1] == 1 else [None]
                self.axes[path] = (*found["batch"], *broadcast)[0], length

    def cut(self, value: Any, path: Path, look_up: Callable[[Tensor, int | None, int], Tensor]) -> Any:
        """An argument for packed tokens: what has positions is looked up, caches are left out."""
        if isinstance(value, Tensor):
            axes = self.axes.get(path)
            return value if axes is None else look_up(value, *axes)
        if isinstance(value, Cache):
            return None
        if isinstance(value, Mapping):
            return {k: self.cut(v, (*path, k), look_up) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)([self.cut(v, (*path, i), look_up) for i, v in enumerate(value)])
        return value


def _sizes(recording: Recording) -> tuple[int, ...]:
    """Batch and length of the recorded stack, then the lengths of the other streams."""
    own = recording.inputs.stream(recording.stack.name)
    return (*own.ids.shape, *(s.ids.shape[1] for s in recording.inputs.streams.values() if s is not own))


def _tensors(recording: Recording) -> Iterator[tuple[Path, Tensor]]:
    for layer, call in enumerate(recording.calls):
        for name, value in (*enumerate(call.args), *call.kwargs.items()):
            yield from _leaves(value, (layer, name))


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _leaves(v, (*path, k))
    elif isinstance(value, (tuple, list)):
        for i, v in enumerate(value):
            yield from _leaves(v, (*path, i))
