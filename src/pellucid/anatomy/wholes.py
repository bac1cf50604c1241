"""Which modules are to be taken whole: one linear map from outside, whatever they do inside?

An adapted layer is a module around the layer it adapts, which reads the same input once more for its low-rank addition
(LoRA, DoRA), or scales what goes in or comes out (IA3); a quantised layer holds packed integers and multiplies by a
kernel of its own. Both are linear in their one input, and that is how they are found: by form in a traced pass, then by
value. The trace is taken again with these modules closed, so that what enters one is read by nothing beside it, and
its weights are what the module does, with its addition (`weights.linear_map`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.trace import SELF, Call, Trace, Value


def composed(t: Trace) -> set[nn.Module]:
    """The outermost modules of a traced pass that are one linear layer and what stands around it."""
    found: set[nn.Module] = set()
    for call in t.calls:  # outer calls come before inner ones
        inside = any(outer.module in found for outer in _around(call))
        if call.children and not inside and _around_a_layer(call) and _linear_by_token(call):
            found.add(call.module)
    return found


def _around(call: Call) -> Iterator[Call]:
    while call.parent is not None:
        call = call.parent
        yield call


def _around_a_layer(call: Call) -> bool:
    """Whether one module inside takes the only input and adds, up to factors, to what is returned; and the input itself
    does not (that would be a residual connection).
    """
    given, made = call.inputs.get(0), call.outputs.get(SELF)
    floats = [v for v in (*call.inputs.values(), *call.outputs.values()) if v.tensor.is_floating_point()]
    if given is None or made is None or given is made or len(floats) != 2 or given.shape[:-1] != made.shape[:-1]:
        return False
    terms = list(_terms(made))
    layers = [
        c for c in call.walk() if not c.children and c is not call and c.output is not None and c.input is not None
    ]
    return given not in terms and any(c.output in terms and given in _before(c.input) for c in layers)  # type: ignore[arg-type]


def _before(value: Value) -> Iterator[Value]:
    """The value and what it was before moves and constant factors."""
    while True:
        for v in flow.sources(value):
            yield v
        scaled = flow.factor(v.producer) if v.producer is not None else None
        if scaled is None:
            return
        value = scaled[0]


def _terms(value: Value) -> Iterator[Value]:
    """What a value is a sum of, with every sum on the way."""
    queue = [value]
    while queue:
        for v in _before(queue.pop()):
            yield v
        if v.producer is not None and v.producer.name in flow.ADD:
            queue += [x for _, x in flow.signed(v.producer)]


def _linear_by_token(call: Call) -> bool:
    """Whether the module's output is linear in its input, and every token's depends on that token alone."""
    if not flow.acts_linearly(call):
        return False
    x, f = flow.as_function(call)
    other = x.clone().flatten(0, -2)
    other[1:] = 0
    apart, made = f(other.view_as(x)).flatten(0, -2)[0], f(x).flatten(0, -2)[0]
    return float((apart - made).abs().max()) <= flow.additivity(call.module) * float(made.abs().max())
