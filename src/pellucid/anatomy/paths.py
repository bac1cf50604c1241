"""The way from one value of a traced pass to another, as steps that can be run again on any tensor.

Used for the head (last residual to logits) and for what stands between a projection and the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.trace import Call, Op, Value, in_place


@dataclass(frozen=True)
class Step:
    """One module call or operation: its name ("" for mere moves), how to run it, and what it made in the
    trace.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    made: Value
    call: Call | None = None


def find_path(
    value: Value,
    target: Value,
    after: int,
    probe: bool = False,
    shut: Callable[[Call], bool] = lambda call: False,
) -> tuple[Step, ...] | None:
    """The steps from `value` to `target` among operations that ran from number `after` on.

    Every step is a function of its one input and parameters, and mere moves are left out: it runs on any
    tensor. With `probe`, a step may also be a product with a value of the pass (a gate), and moves are steps:
    it runs on the probe. Calls that are `shut` are no steps, what they do inside may be.
    """
    seen: set[int] = set()

    def search(v: Value, depth: int) -> tuple[Step, ...] | None:
        if v is target:
            return ()
        if depth == 0 or id(v) in seen:
            return None
        seen.add(id(v))
        for step in next_steps(v, after, probe):
            if step.call is not None and shut(step.call):
                continue
            rest = search(step.made, depth - 1)
            if rest is not None:
                return (step, *rest) if step.name or probe else rest
        return None

    return search(value, 40)


def next_steps(value: Value, after: int, probe: bool) -> Iterator[Step]:
    """Ways onward from a value: innermost modules first, then single operations."""
    for call in reversed(value.read_by):
        made = call.output
        if call.start >= after and made is not None and made is not value and _alone(call, value):
            yield Step(call.name, _module_step(call, value), made, call)
    for op in value.consumers:
        if op.index < after or len(op.outputs) != 1 or op.func is None or op.name == "__setitem__":
            continue
        out = op.outputs[0]
        others = [v for v in op.inputs if v is not value]
        if flow.passes(op):
            yield Step("", replay([op], value), out)
        elif op.name == "__getitem__" and op.inputs[0] is value and flow.plain_index(op.args[1]):
            columns = out.shape[:-1] == value.shape[:-1]
            yield (Step("columns", _columns_step(op), out) if columns else Step("positions", replay([op], value), out))
        elif all(flow.constant(v) for v in others) and (flow.weight_of(op) is not None or out.shape == value.shape):
            yield Step(op.name, replay([op], value), out)
        elif probe and op.name in flow.MULTIPLY:
            yield Step("gate", replay([op], value), out)
    yield from _joins(value, after)


def _joins(value: Value, after: int, reach: int = 12) -> Iterator[Step]:
    """Code that branches and meets again: an activation written out, several unembeddings stacked."""
    known, ops = {id(value)}, []
    for op in sorted({o.index: o for o in _following(value, after, reach)}.values(), key=lambda o: o.index):
        if op.func is None or op.name == "__setitem__" or len(op.outputs) != 1:
            continue
        if not all(id(v) in known or flow.constant(v) for v in op.inputs):
            continue
        known.add(id(op.outputs[0]))
        ops.append(op)
        if sum(id(v) in known for v in op.inputs) > 1:
            yield Step(op.name, replay(ops, value), op.outputs[0])
            return


def _following(value: Value, after: int, reach: int) -> Iterator[Op]:
    queue = [value]
    while queue:
        for op in queue.pop().consumers:
            if after <= op.index < value.consumers[0].index + reach:
                yield op
                queue += op.outputs


def _alone(call: Call, value: Value) -> bool:
    """Whether the module's result depends on nothing of the pass but this one input, handed in or reached
    otherwise.
    """
    made = call.output
    assert made is not None
    inner = flow.ancestors(made, lambda v: v is value or flow.constant(v) or not v.tensor.is_floating_point())
    for op in inner:
        if op.index < call.start:
            return False
        outer = [v for v in op.inputs if v is not value and v.producer is None and not v.fixed]
        if any(v.tensor.is_floating_point() for v in outer):
            return False
    return True


# What steps close over lives as long as the map, so it must not lead back into the graph of the trace.


def _columns_step(op: Op) -> Callable[[Tensor], Tensor]:
    index = op.args[1]
    last = index[-1] if isinstance(index, tuple) else index
    return lambda x: x[..., last]


def _module_step(call: Call, value: Value) -> Callable[[Tensor], Tensor]:
    key = next(k for k, v in call.inputs.items() if v is value)
    out_key = next(k for k, v in call.outputs.items() if v is call.output)
    module, args, kwargs = call.module, call.args, call.kwargs
    return lambda x: flow.run_with(module, args, kwargs, key, x, out_key)


def replay(ops: list[Op], value: Value) -> Callable[[Tensor], Tensor]:
    """The same operations in order with another tensor in place of `value`."""
    places = {id(value.tensor): 0}  # tensors of the trace -> what takes their place: the input, then each result
    dtype, device, parts = value.tensor.dtype, value.tensor.device, []
    for op in ops:
        parts.append((op.func, _recipe((op.args, op.kwargs), op, dict(places)), in_place(op.name)))
        places[id(op.outputs[0].tensor)] = len(parts)

    def step(x: Tensor) -> Tensor:
        made = [x.to(device, dtype)]
        for func, recipe, changes in parts:
            args, kwargs = recipe([m.clone() for m in made] if changes else made)
            made.append(func(*args, **kwargs))
        return made[-1]

    return step


def _recipe(tree: Any, op: Op, places: dict[int, int]) -> Callable[[list[Tensor]], Any]:
    """How to build an operation's arguments again: some places filled anew, constants recomputed from today's
    parameters (weights may be edited); any other value stays as it was in the trace."""
    if isinstance(tree, (tuple, list)):
        parts, kind = [_recipe(item, op, places) for item in tree], type(tree)
        return lambda made: kind(part(made) for part in parts)
    if isinstance(tree, dict):
        named = {k: _recipe(v, op, places) for k, v in tree.items()}
        return lambda made: {k: part(made) for k, part in named.items()}
    if not isinstance(tree, Tensor):
        return lambda made: tree
    if id(tree) in places:
        place = places[id(tree)]
        return lambda made: made[place]
    value = next((v for v in op.inputs if v.tensor is tree), None)
    maker = value.producer if value is not None else None
    if value is None or value.fixed or maker is None or maker.func is None or not flow.constant(value):
        return lambda made: tree
    func, again = maker.func, _recipe((maker.args, maker.kwargs), maker, {})
    index = next(i for i, v in enumerate(maker.outputs) if v is value)

    def constant(made: list[Tensor]) -> Tensor:
        args, kwargs = again([])
        out = func(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[index]

    return constant
