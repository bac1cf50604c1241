"""Attention in a traced forward pass: calls of the interface, or a softmax that stands between two contractions."""

from __future__ import annotations

from collections.abc import Iterator

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import HEADS, PATTERN, Layout, recognise
from pellucid.anatomy.structure import Attention, Tap
from pellucid.anatomy.trace import CONTRACTIONS, SOFTMAXES, Call, Op, Trace, Value


FUSED = "scaled_dot_product_attention"


def attention_ops(t: Trace, call: Call) -> list[Op]:
    """The attention operations that ran inside a module call, in order."""
    ops = t.ops[call.start : call.end]
    return [op for op in ops if op.name == "attention"] or [
        op for op in ops if op.name == FUSED or contraction_pair(op) is not None
    ]


def contraction_pair(softmax: Op) -> tuple[Op, Op] | None:
    """For an attention softmax: QK^T before it and PV after it."""
    if softmax.name not in SOFTMAXES or softmax.outputs[0].tensor.ndim < 3:
        return None
    qk = next((op for op in _upstream(softmax.inputs[0]) if _two_sided(op)), None)
    pv = next((op for op in _downstream(softmax.outputs[0]) if _two_sided(op)), None)
    if qk is None or pv is None or not (qk.call is softmax.call is pv.call):
        return None
    return qk, pv


def key_of(op: Op) -> Value:
    """The keys an attention operation reads."""
    if op.name in ("attention", FUSED):
        return op.inputs[1]
    pair = contraction_pair(op)
    assert pair is not None
    return pair[0].inputs[-1]


def output_of(op: Op) -> Value:
    """z, the value-weighted sum before the output projection."""
    if op.name in ("attention", FUSED):
        return op.outputs[0]
    pair = contraction_pair(op)
    assert pair is not None
    return pair[1].outputs[0]


def _two_sided(op: Op) -> bool:
    return op.name in CONTRACTIONS and len(op.inputs) >= 2 and not any(flow.constant(v) for v in op.inputs[-2:])


def _upstream(value: Value, reach: int = 60) -> Iterator[Op]:
    queue = [value]
    for _ in range(reach):
        if not queue:
            return
        v = queue.pop(0)
        if v.producer is None:
            continue
        yield v.producer
        if not _two_sided(v.producer):
            queue += [i for i in v.producer.inputs if i.tensor.numel() >= v.tensor.numel()]


def _downstream(value: Value, reach: int = 60) -> Iterator[Op]:
    queue = [value]
    for _ in range(reach):
        if not queue:
            return
        for op in queue.pop(0).consumers:
            yield op
            if not _two_sided(op):
                queue += [o for o in op.outputs if o.tensor.numel() >= value.tensor.numel()]


def describe(t: Trace, op: Op, part: str, nth: int, batch: int) -> tuple[Attention, dict[str, Tap]] | str:
    """The attention behind `op` and its taps, or why it cannot be tapped."""
    if op.name == "attention":
        found: tuple[Attention, dict[str, Tap]] | str = _from_interface(t, op, part, nth)
    elif op.name == FUSED:
        found = _from_fused(op, part)
    else:
        found = _from_operators(op, part, batch)
    if isinstance(found, str):
        return found
    attention, taps = found
    projection = flow.projection_of(output_of(op))
    if projection is None or projection[0].call is None:
        return attention, taps
    linear, exact = projection
    call = linear.call
    assert call is not None
    width = attention.heads * attention.d_value
    if call.input is None or flow.weight_of(linear) is None or call.input.shape[-1] != width or call.children:
        return attention, taps
    positions = width and call.input.tensor.numel() // (batch * width)
    layout = recognise(tuple(call.input.shape), HEADS, b=batch, p=positions, h=attention.heads, e=attention.d_value)
    if layout is None:
        return attention, taps
    key = next(k for k, v in call.inputs.items() if v is call.input)
    taps[f"{part}.z_out"] = Tap(call.name, "in", layout, key, call.nth)
    return _with(attention, o_proj=call.name, gated=not exact), taps


def _with(a: Attention, o_proj: str, gated: bool) -> Attention:
    from dataclasses import replace

    return replace(a, o_proj=o_proj, gated=gated)


def _from_interface(t: Trace, op: Op, part: str, nth: int) -> tuple[Attention, dict[str, Tap]]:
    module = t.names[op.args[0]]
    q, k, v = (value.tensor for value in op.inputs[:3])
    taps = {f"{part}.{p}": Tap(module, p, Layout("b h p e", HEADS), nth=nth) for p in "qkv"}
    taps[f"{part}.z"] = Tap(module, "z", Layout(HEADS, HEADS), nth=nth)
    for p in ("scores", "pattern"):
        taps[f"{part}.{p}"] = Tap(module, p, Layout(PATTERN, PATTERN), nth=nth)
    return (
        Attention(part, module, nth, "interface", q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], None, False),
        taps,
    )


def _from_fused(op: Op, part: str) -> tuple[Attention, dict[str, Tap]] | str:
    """A direct call of torch's fused attention is all three operations in one."""
    q, k, v = (value.tensor for value in op.inputs[:3])
    if op.call is None or q.ndim != 4:
        return "the fused attention of this family is laid out in an unknown order"
    ops = (op.ordinal,) * 3
    heads = Layout("b h p e", HEADS)
    layouts = {p: heads for p in "qkvz"} | {p: Layout(PATTERN, PATTERN) for p in ("scores", "pattern")}
    taps = {f"{part}.{p}": Tap(op.call.name, p, layout, nth=op.call.nth, ops=ops) for p, layout in layouts.items()}
    attention = Attention(
        part, op.call.name, op.call.nth, "operators", q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], None, False
    )
    return attention, taps


def _from_operators(op: Op, part: str, batch: int) -> tuple[Attention, dict[str, Tap]] | str:
    pair = contraction_pair(op)
    assert pair is not None and op.call is not None
    qk, pv = pair
    scores, z = op.outputs[0], pv.outputs[0]
    p, k = scores.shape[-2:]
    heads = scores.shape[1] if scores.tensor.ndim == 4 else scores.shape[0] // batch
    if scores.tensor.ndim == 4 and scores.shape[-1] != scores.shape[-2] and qk.name == "einsum":
        p, k = scores.shape[-2:]
    pattern = recognise(tuple(scores.shape), PATTERN, b=batch, p=p, h=heads, k=k)
    d_value = z.tensor.numel() // (batch * heads * p)
    d_head = qk.inputs[-2].tensor.numel() // (batch * heads * p)
    layouts = {
        "q": _head_layout(qk.inputs[-2], batch, p, heads, d_head, transposed=False),
        "k": _head_layout(qk.inputs[-1], batch, k, heads, d_head, transposed=qk.name != "einsum"),
        "v": _head_layout(pv.inputs[-1], batch, k, heads, d_value, transposed=False),
        "z": recognise(tuple(z.shape), HEADS, b=batch, p=p, h=heads, e=d_value),
        "scores": pattern,
        "pattern": pattern,
    }
    if layouts["z"] is None or pattern is None:
        return "the attention of this family is laid out in an unknown order"
    ops = (qk.ordinal, op.ordinal, pv.ordinal)
    taps = {
        f"{part}.{port}": Tap(op.call.name, port, layout, nth=op.call.nth, ops=ops)
        for port, layout in layouts.items()
        if layout is not None
    }
    shared = layouts["k"]
    kv_heads = dict(shared.sizes)["h"] if shared is not None else heads
    return Attention(part, op.call.name, op.call.nth, "operators", heads, kv_heads, d_head, d_value, None, False), taps


def _head_layout(value: Value, batch: int, positions: int, heads: int, width: int, transposed: bool) -> Layout | None:
    shape = list(value.shape)
    if transposed:  # the operand is K^T; the tap hands out K
        shape[-1], shape[-2] = shape[-2], shape[-1]
    own = max(1, value.tensor.numel() // (batch * positions * width))  # fewer than `heads` when they are shared
    return recognise(tuple(shape), HEADS, b=batch, p=positions, h=own, e=width)
