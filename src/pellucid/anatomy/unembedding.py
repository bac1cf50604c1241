"""The head: the way from the last residual to the logits, as steps that can be run on any residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import STREAMS, TOKENS, Layout, recognise
from pellucid.anatomy.paths import Step, find_path, replay
from pellucid.anatomy.structure import Tap, Unembedding
from pellucid.anatomy.trace import OPAQUE, Call, Trace, Value

Move = Callable[[Tensor], Tensor]


def find_head(t: Trace, last: Value, after: int, logits: Tensor, layout: Layout, batch: int) -> Unembedding | None:
    """Follow the last residual through modules and operations until the logits are reached."""
    # the head may read parallel streams as the family lays them out
    before = (Step("streams", layout.write, last),) if layout.canonical == STREAMS else ()
    for target, chosen in _targets(t.value_of(logits)):
        shut = functools.partial(_hides_unembedding, t, target.shape[-1])
        found = find_path(last, target, after, shut=shut)
        if found is not None and _shape(before + found, layout.read(last.tensor, batch)) == target.shape:
            return _head(before + found, target.shape[-1], chosen, batch)
    return None


def _head(path: tuple[Step, ...], width: int, chosen: Move | None, batch: int) -> Unembedding | None:
    linear = [i for i, step in enumerate(path) if _is_unembedding(step, width)]
    if not linear:
        return None
    norm = next((s.call for s in path[: linear[-1]] if s.call is not None and flow.is_norm(s.call)), None)
    tap = None
    if norm is not None and norm.output is not None:
        made = norm.output
        positions = made.tensor.numel() // (batch * made.shape[-1])
        form = recognise(tuple(made.shape), TOKENS, b=batch, p=positions, d=made.shape[-1])
        key = next(k for k, v in norm.outputs.items() if v is made)
        tap = Tap(norm.name, "out", form, key, norm.nth) if form is not None else None
    call = path[linear[-1]].call
    runs, names = tuple(s.run for s in path), tuple(s.name for s in path)
    return Unembedding(runs, names, tap, call.name if call else "", linear[-1] + 1, chosen)


def _shape(path: tuple[Step, ...], x: Tensor) -> torch.Size:
    with torch.no_grad():
        for step in path:
            x = step.run(x)
    return x.shape


def _targets(logits: Value) -> Iterator[tuple[Value, Move | None]]:
    """The logits, and what they were before they were moved or some positions were chosen."""
    value: Value = logits
    chosen: Move | None = None
    yield value, chosen
    while (op := value.producer) is not None and (op.name == "__getitem__" or flow.passes(op)):
        value = op.inputs[0]
        chosen = _then(replay([op], value), chosen)
        yield value, chosen


def _then(first: Move, second: Move | None) -> Move:
    return first if second is None else lambda x: second(first(x))


def _hides_unembedding(t: Trace, width: int, call: Call) -> bool:
    """Whether a module does the unembedding and more: it is opened, to have the unembedding as a step."""
    if _is_linear_module(call, width):
        return False
    ops = t.ops[call.start : call.end]
    return any(op.outputs[0].shape[-1:] == (width,) and flow.is_linear(op) for op in ops)


def _is_unembedding(step: Step, width: int) -> bool:
    """Whether a step is the linear map onto the vocabulary (or classes)."""
    if step.made.shape[-1] != width:
        return False
    if step.call is not None:
        return _is_linear_module(step.call, width)
    maker = step.made.producer
    several = maker is not None and maker.name in ("stack", "cat")  # one unembedding per codebook
    ops = [v.producer for v in maker.inputs] if several and maker is not None else [maker]
    return all(op is not None and flow.weight_of(op) is not None for op in ops)


def _is_linear_module(call: Call, width: int) -> bool:
    """A module that is one linear map onto `width` outputs."""
    weight = getattr(call.module, "weight", None)
    made = call.output.producer if call.output is not None else None
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and width in weight.shape
    hidden = made is not None and made.call is call and made.name == OPAQUE and flow.is_linear(made)
    return not call.children and (plain or hidden)
