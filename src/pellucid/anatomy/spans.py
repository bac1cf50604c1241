"""Where do blocks begin and end in a traced forward pass?

A block is usually one call of one module in a list. Some families write a block into its parent instead: then
it spans from one such call to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from pellucid.anatomy import attending
from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.trace import Call, Trace, Value
from pellucid.anatomy.weights import is_packed


@dataclass(frozen=True, eq=False)
class Span:
    """A block in the trace: the operations from `start` to `end` turn the residual `given` into `made`."""

    first: Call
    given: Value
    made: Value
    start: int
    end: int
    whole: bool = True  # the block is exactly the call `first`


def find_spans(t: Trace) -> tuple[list[list[Span]], list[list[Span]]]:
    """Sequences of blocks in the order they ran, each handing one residual along; and the further residuals
    that the same blocks hand along beside it.
    """
    main = [_spans(t, run) for group in block_calls(t) for run in _runs(group)]
    return main, [beside for spans in main for beside in _beside(spans)]


def block_calls(t: Trace) -> list[list[Call]]:
    """Calls of listed modules that take and return a residual of one shape, by the list they are in."""
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    listed = {child for m in t.root.modules() if isinstance(m, containers) for child in m.children()}

    named = dict(t.root.named_modules())

    def keeps_shape(c: Call) -> bool:
        given, made = c.input, c.output
        if given is None or made is None or given is made or given.shape != made.shape:
            return False
        return given.tensor.ndim >= 3 and (any(p.ndim > 1 for p in c.module.parameters()) or is_packed(c.module))

    def is_block(c: Call) -> bool:
        return c.module in listed and keeps_shape(c)

    groups: dict[str, list[Call]] = {}

    def visit(call: Call) -> None:
        begun: set[str] = set()
        for child in call.children:
            skipped = _listed_between(call.name, child.name, named, listed)
            if is_block(child):
                groups.setdefault(child.name.rpartition(".")[0], []).extend(_unwrapped(child, is_block))
            elif skipped is not None and keeps_shape(child):
                if skipped not in begun:
                    groups.setdefault(skipped.rpartition(".")[0], []).append(child)
                begun.add(skipped)
            else:
                visit(child)

    for root in [c for c in t.calls if c.parent is None]:
        visit(root)
    return _joined([g for g in groups.values() if _is_stack(t, g)])


def _is_stack(t: Trace, calls: list[Call]) -> bool:
    """Whether listed modules are blocks: they attend, or each adds to what it is given."""
    if any(attending.attention_ops(t, c.start, c.end) for c in calls):
        return True
    return all(_adds_up(c, c.input, c.output) for c in calls if c.input is not None and c.output is not None)


def _listed_between(outer: str, inner: str, named: dict[str, nn.Module], listed: set[nn.Module]) -> str | None:
    """A listed module between two nested calls that was never called itself: its parent runs its parts (or
    its forward).
    """
    name = inner.rpartition(".")[0]
    while len(name) > len(outer):
        if named[name] in listed:
            return name
        name = name.rpartition(".")[0]
    return None


def _unwrapped(block: Call, is_block: Callable[[Call], bool]) -> list[Call]:
    """ALBERT's groups only wrap blocks of one class (T5's blocks hold unlike sublayers: those are parts)."""
    inner = [c for c in block.children if is_block(c)]
    alike = len({type(c.module) for c in inner}) == 1
    if alike and inner[0].input is block.input and inner[-1].output is block.output:
        return [b for c in inner for b in _unwrapped(c, is_block)]
    return [block]


def _joined(groups: list[list[Call]]) -> list[list[Call]]:
    """Lists of blocks that hand their residual on to one another are one stack."""
    stacks: list[list[Call]] = []
    for group in groups:
        before = next((s for s in stacks if _hands_over(s[-1], group[0])), None)
        if before is None:
            stacks.append(list(group))
        else:
            before.extend(group)
    return stacks


def _hands_over(a: Call, b: Call) -> bool:
    assert b.input is not None
    return any(v is a.output for v in flow.sources(b.input))


def _runs(calls: list[Call]) -> list[list[Call]]:
    """A list of blocks that is run again from its first block, on something new, starts another stack."""
    runs = [[calls[0]]]
    for a, b in pairwise(calls):
        again = any(b.module is c.module for c in runs[-1])
        if again and not _hands_over(a, b):
            runs.append([])
        runs[-1].append(b)
    return runs


def _spans(t: Trace, calls: list[Call]) -> list[Span]:
    """One span per call; where the parent works on the residual between calls, that work belongs to the block
    before.
    """
    if all(_hands_over(a, b) for a, b in pairwise(calls)):
        return [_whole(c) for c in calls]
    between = [t.ops[a.end : b.start] for a, b in pairwise(calls)]
    spans = []
    for call, after in zip(calls, [*calls[1:], None], strict=True):
        if after is not None:
            assert call.input is not None
            assert after.input is not None
            spans.append(Span(call, call.input, after.input, call.start, after.start, whole=False))
            continue
        last = between[-1]
        tail = t.ops[call.end : call.end + len(last)]
        assert calls[-1].input is not None
        out = next((j for j, op in enumerate(last) if any(v is calls[-1].input for v in op.outputs)), None)
        if out is None or [op.name for op in tail] != [op.name for op in last]:
            spans.append(_whole(call))  # the last one ends otherwise: take the call alone
            continue
        assert call.input is not None
        spans.append(Span(call, call.input, tail[out].outputs[0], call.start, tail[out].index + 1, whole=False))
    return spans


def _whole(call: Call) -> Span:
    """The call as a block: its output, and the input that is added to on the way there."""
    made = call.output
    assert call.input is not None
    assert made is not None
    given = next((v for v in (call.input, *call.inputs.values()) if _adds_up(call, v, made)), call.input)
    return Span(call, given, made, call.start, call.end)


def _adds_up(call: Call, given: Value, made: Value) -> bool:
    return given.shape == made.shape and given is not made and flow.Additive(given, call.start).reaches(made)


def _beside(spans: list[Span]) -> list[list[Span]]:
    """Other outputs of the same calls that are other inputs with something added, all along the stack."""
    first, found = spans[0], []
    for key, made in first.first.outputs.items() if first.whole else ():
        if made is first.made or made.tensor.ndim < 3 or not made.tensor.is_floating_point():
            continue
        others = [v for v in first.first.inputs.values() if v is not first.given and _adds_up(first.first, v, made)]
        stream: list[Span] = []
        for call in (s.first for s in spans):
            out = call.outputs.get(key)
            given = next((v for v in call.inputs.values() if out is not None and _adds_up(call, v, out)), None)
            if given is not None and out is not None:
                stream.append(Span(call, given, out, call.start, call.end))
        if others and len(stream) == len(spans):
            found.append(stream)
    return found
