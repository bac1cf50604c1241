"""The head: the way from the last residual to the logits, as steps that can be run on any residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import STREAMS, TOKENS, Layout, recognise
from pellucid.anatomy.paths import Step, find_path, replay
from pellucid.anatomy.structure import Head, Tap
from pellucid.anatomy.trace import OPAQUE, Call, Trace, Value


def find_head(t: Trace, last: Value, after: int, logits: Tensor, layout: Layout, batch: int) -> Head | None:
    """Follow the last residual through modules and operations until the logits are reached."""
    for target, chosen in _targets(t.value_of(logits)):
        width = target.shape[-1]
        path = find_path(last, target, after, shut=lambda call: _hides_unembedding(t, call, width))  # noqa: B023
        if (
            path is not None and layout.canonical == STREAMS
        ):  # the head reads parallel streams as they are laid out
            path = (Step("streams", layout.write, last), *path)
        if path is not None and _shape(path, layout.read(last.tensor, batch)) == target.shape:
            break
    else:
        return None
    linear = [
        i for i, s in enumerate(path) if _is_unembedding(s, width, last if i == 0 else path[i - 1].made)
    ]
    if not linear:
        return None
    norm = next((s.call for s in path[: linear[-1]] if s.call is not None and flow.is_norm(s.call)), None)
    tap = None
    if norm is not None and norm.output is not None:
        shape = tuple(norm.output.shape)
        form = recognise(
            shape, TOKENS, b=batch, p=norm.output.tensor.numel() // (batch * shape[-1]), d=shape[-1]
        )
        if form is not None:
            tap = Tap(
                norm.name, "out", form, next(k for k, v in norm.outputs.items() if v is norm.output), norm.nth
            )
    call = path[linear[-1]].call
    return Head(
        tuple(s.run for s in path),
        tuple(s.name for s in path),
        tap,
        call.name if call else "",
        linear[-1] + 1,
        chosen,
    )


def _shape(path: tuple[Step, ...], x: Tensor) -> torch.Size:
    with torch.no_grad():
        for step in path:
            x = step.run(x)
    return x.shape


def _targets(logits: Value) -> Iterator[tuple[Value, Callable[[Tensor], Tensor] | None]]:
    """The logits, and what they were before they were moved or only some positions were chosen (as
    classifiers do).
    """
    value, chosen = logits, None
    yield value, chosen
    while value.producer is not None and (
        value.producer.name == "__getitem__" or flow.passes(value.producer)
    ):
        op, value = value.producer, value.producer.inputs[0]
        chosen = _then(replay([op], value), chosen)
        yield value, chosen


def _then(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    return first if second is None else lambda x: second(first(x))


def _hides_unembedding(t: Trace, call: Call, width: int) -> bool:
    """Whether a module does the unembedding and more: it is opened, so that the unembedding is a step of its
    own.
    """
    if _is_linear_module(call, width):
        return False
    return any(
        op.outputs[0].shape[-1:] == (width,) and flow.is_linear(op) for op in t.ops[call.start : call.end]
    )


def _is_unembedding(step: Step, width: int, given: Value) -> bool:
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
    plain = weight is not None and weight.ndim == 2 and width in weight.shape
    return not call.children and (
        plain or (made is not None and made.call is call and made.name == OPAQUE and flow.is_linear(made))
    )
