"""The head: the way from the last residual to the logits, as steps that can be run on any residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import TOKENS, recognise
from pellucid.anatomy.structure import Head, Tap
from pellucid.anatomy.trace import Call, Op, Trace, Value

Step = tuple[str, Callable[[Tensor], Tensor], Value, Call | None]


def find_head(t: Trace, last: Call, logits: Tensor, batch: int) -> Head | None:
    """Follow the last block's output through modules and elementwise operations until the logits are reached."""
    target = t.value_of(logits)
    assert last.output is not None
    path = _search(last.output, target, last.end, set())
    if path is None:
        return None
    linear = [i for i, (_, _, v, c) in enumerate(path) if c is not None and _weight(c, v, logits.shape[-1])]
    if not linear:
        return None
    norm = next((c for _, _, _, c in path[: linear[-1]] if c is not None and flow.is_norm(c)), None)
    tap = None
    if norm is not None and norm.output is not None:
        positions = norm.output.tensor.numel() // (batch * norm.output.shape[-1])
        layout = recognise(tuple(norm.output.shape), TOKENS, b=batch, p=positions, d=norm.output.shape[-1])
        if layout is not None:
            key = next(k for k, v in norm.outputs.items() if v is norm.output)
            tap = Tap(norm.name, "out", layout, key, norm.nth)
    call = path[linear[-1]][3]
    assert call is not None
    return Head(tuple(s[1] for s in path), tuple(s[0] for s in path), tap, call.name, linear[-1] + 1)


def _weight(call: Call, out: Value, width: int) -> bool:
    weight = getattr(call.module, "weight", None)
    return weight is not None and weight.ndim == 2 and width in weight.shape and out.shape[-1] == width


def _search(value: Value, target: Value, after: int, seen: set[int], depth: int = 0) -> list[Step] | None:
    if value is target:
        return []
    if depth > 40 or id(value) in seen:
        return None
    seen.add(id(value))
    for name, step, out, call in _next_steps(value, after):
        rest = _search(out, target, after, seen, depth + 1)
        if rest is not None:
            return [*([(name, step, out, call)] if name else []), *rest]
    return None


def _next_steps(value: Value, after: int) -> Iterator[Step]:
    """Ways onward from a value: innermost modules first, then single operations; moves have no name."""
    for call in reversed(value.read_by):
        if call.start >= after and call.input is value and call.output is not None and call.output is not value:
            alone = sum(v.tensor.is_floating_point() for v in call.inputs.values()) == 1
            if alone and call.output.shape[:-1] == value.shape[:-1]:
                yield call.name, _module_step(call), call.output, call
    for op in value.consumers:
        if op.index < after or not op.outputs:
            continue
        out = op.outputs[0]
        others = [v for v in op.inputs if v is not value]
        if flow.passes(op) or (op.name == "__getitem__" and op.inputs[0] is value):
            step = _slice_step(op) if out.shape[-1] != value.shape[-1] and out.tensor.ndim == value.tensor.ndim else None
            yield ("slice" if step else ""), step or _identity, out, None
        elif op.func is not None and out.shape == value.shape and all(flow.constant(v) for v in others):
            yield op.name, _op_step(op, value), out, None


def _identity(x: Tensor) -> Tensor:
    return x


def _slice_step(op: Op) -> Callable[[Tensor], Tensor]:
    width = op.outputs[0].shape[-1]
    return lambda x: x[..., :width]


def _module_step(call: Call) -> Callable[[Tensor], Tensor]:
    key = next(k for k, v in call.inputs.items() if v is call.input)
    out_key = next(k for k, v in call.outputs.items() if v is call.output)

    def step(x: Tensor) -> Tensor:
        from pellucid.anatomy.trace import take

        args = [x if i == key else a for i, a in enumerate(call.args)]
        kwargs = {k: (x if k == key else v) for k, v in call.kwargs.items()}
        return take(call.module(*args, **kwargs), out_key)

    return step


def _op_step(op: Op, value: Value) -> Callable[[Tensor], Tensor]:
    """The same elementwise operation on another tensor."""

    def replaced(tree: Any, x: Tensor) -> Any:
        if isinstance(tree, (tuple, list)):
            return type(tree)(replaced(i, x) for i in tree)
        if isinstance(tree, dict):
            return {k: replaced(v, x) for k, v in tree.items()}
        return x if tree is value.tensor else tree

    def step(x: Tensor) -> Tensor:
        if op.name.endswith("_") and not op.name.endswith("__"):
            x = x.clone()
        return op.func(*replaced(op.args, x), **replaced(op.kwargs, x))

    return step
