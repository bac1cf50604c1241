"""Attention in a traced forward pass: calls of the interface, or a softmax that stands between two
contractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pellucid.anatomy import dataflow as flow
from pellucid.anatomy.layout import HEADS, PATTERN, Layout, recognise
from pellucid.anatomy.structure import Attention, Tap
from pellucid.anatomy.trace import CONTRACTIONS, SOFTMAXES, Call, Op, Trace, Value

FUSED = "scaled_dot_product_attention"
Found = tuple[Attention, dict[str, Tap]]


def attention_ops(t: Trace, start: int, end: int) -> list[Op]:
    """The attention operations among those numbered from `start` to `end`, in order."""
    ops = t.ops[start:end]
    return [op for op in ops if op.name in ("attention", FUSED) or contraction_pair(op) is not None]


def contraction_pair(softmax: Op) -> tuple[Op, Op] | None:
    """For an attention softmax: QK^T before it and PV after it."""
    if softmax.name not in SOFTMAXES or softmax.outputs[0].tensor.ndim < 3:
        return None
    qk = next((op for op in _upstream(softmax.inputs[0]) if contracts(op)), None)
    pv = next((op for op in _downstream(softmax.outputs[0]) if contracts(op)), None)
    return None if qk is None or pv is None else (qk, pv)


def compared(op: Op) -> list[tuple[Value, Value]]:
    """What an attention compares with what: queries with keys, and with relative positions where there are
    any.
    """
    if op.name in ("attention", FUSED):
        return [(op.inputs[0], op.inputs[1])]
    return [(o.inputs[-2], o.inputs[-1]) for o in _upstream(op.inputs[0]) if contracts(o)]


def output_of(op: Op) -> Value:
    """z, the value-weighted sum before the output projection."""
    if op.name in ("attention", FUSED):
        return op.outputs[0]
    pair = contraction_pair(op)
    assert pair is not None
    return pair[1].outputs[0]


def compares(op: Op) -> dict[str, tuple[Value, bool]]:
    """The queries, keys and values of one attention, and whether its taps meet them transposed."""
    if op.name in ("attention", FUSED):
        return {port: (value, False) for port, value in zip("qkv", op.inputs[:3], strict=True)}
    pair = contraction_pair(op)
    assert pair is not None
    qk, pv = pair
    return {"q": (qk.inputs[-2], False), "k": (qk.inputs[-1], qk.name != "einsum"), "v": (pv.inputs[-1], False)}


def where(t: Trace, op: Op) -> str:
    """The module that attends."""
    return t.names[op.args[0]] if op.name == "attention" else op.call.name if op.call is not None else "?"


def two_sided(op: Op) -> bool:
    """A contraction of two values of the pass."""
    return op.name in CONTRACTIONS and len(op.inputs) >= 2 and not any(map(flow.parametric, op.inputs[-2:]))


def contracts(op: Op) -> bool:
    """A contraction that may be QK^T or PV: of values of the pass, or with learned queries (latents)."""
    a, b = op.inputs[-2:] if op.name in CONTRACTIONS and len(op.inputs) >= 2 else (None, None)
    return a is not None and b is not None and min(a.tensor.ndim, b.tensor.ndim) > 2 and not (
        flow.parametric(a) and flow.parametric(b)
    )  # fmt: skip


def _upstream(value: Value, reach: int = 60) -> Iterator[Op]:
    queue = [value]
    for _ in range(reach):
        if not queue:
            return
        v = queue.pop(0)
        if v.producer is None:
            continue
        yield v.producer
        if not contracts(v.producer) and flow.weight_of(v.producer) is None:
            queue += [i for i in v.producer.inputs if 2 * i.tensor.numel() >= v.tensor.numel()]


def _downstream(value: Value, reach: int = 60) -> Iterator[Op]:
    queue = [value]
    for _ in range(reach):
        if not queue:
            return
        for op in queue.pop(0).consumers:
            yield op
            if not contracts(op) and flow.weight_of(op) is None:
                queue += [o for o in op.outputs if 2 * o.tensor.numel() >= value.tensor.numel()]


def describe(t: Trace, op: Op, part: str, batch: int) -> Found | None:
    """The attention behind `op` and the taps of q, k, v, scores, pattern and z; None if it is laid out in
    pieces.
    """
    if op.name == "attention":
        return _from_interface(t, op, part)
    return _from_fused(op, part) if op.name == FUSED else _from_operators(op, part, batch)


def describe_pieces(t: Trace, op: Op, part: str) -> Attention:
    """An attention that is computed in windows or streams; how many heads it has is read off its output
    projection.
    """
    nth = op.call.nth if op.call is not None else 0
    return Attention(part, where(t, op), nth, "pieces", 0, 0, 0, 0)


def with_heads(a: Attention, given: Value) -> Attention:
    """The heads are the last two dimensions that are merged into what the output projection reads."""
    for v in flow.sources(given):
        if v.tensor.ndim > 2 and v.shape[-1] < given.shape[-1] == v.shape[-2] * v.shape[-1]:
            h, e = v.shape[-2:]
            return replace(a, heads=h, kv_heads=h, d_head=e, d_value=e)
    return a


def _from_interface(t: Trace, op: Op, part: str) -> Found:
    module = t.names[op.args[0]]
    # shared layers are called many times
    nth = sum(o.name == "attention" and o.args[0] is op.args[0] for o in t.ops[: op.index])
    q, k, v = (value.tensor for value in op.inputs[:3])
    taps = {f"{part}.{p}": Tap(module, p, Layout("b h p e", HEADS), nth=nth) for p in "qkv"}
    taps[f"{part}.z"] = Tap(module, "z", Layout(HEADS, HEADS), nth=nth)
    for p in ("scores", "pattern"):
        taps[f"{part}.{p}"] = Tap(module, p, Layout(PATTERN, PATTERN), nth=nth)
    return Attention(part, module, nth, "interface", q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]), taps


def _from_fused(op: Op, part: str) -> Found | None:
    """A direct call of torch's fused attention is all three operations in one."""
    q, k, v = (value.tensor for value in op.inputs[:3])
    if op.call is None or q.ndim != 4:
        return None
    ops = (op.ordinal,) * 3
    heads = Layout("b h p e", HEADS)
    layouts = dict.fromkeys("qkvz", heads) | {p: Layout(PATTERN, PATTERN) for p in ("scores", "pattern")}
    module, nth = op.call.name, op.call.nth
    taps = {f"{part}.{p}": Tap(module, p, layout, nth=nth, ops=ops) for p, layout in layouts.items()}
    return Attention(part, module, nth, "operators", q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]), taps


def _from_operators(op: Op, part: str, batch: int) -> Found | None:
    pair = contraction_pair(op)
    assert pair is not None
    qk, pv = pair
    calls = qk.call, op.call, pv.call
    if None in calls:
        return None
    scores, z = op.outputs[0], pv.outputs[0]
    p, k = scores.shape[-2:]
    heads = scores.shape[1] if scores.tensor.ndim == 4 else scores.shape[0] // batch
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
        return None
    taps: dict[str, Tap] = {}
    steps = {"q": qk, "k": qk, "scores": op, "pattern": op, "v": pv, "z": pv}
    for port, layout in layouts.items():
        call = steps[port].call
        ops = tuple(o.ordinal if o.call is call else 0 for o in (qk, op, pv))
        if layout is not None and call is not None:
            taps[f"{part}.{port}"] = Tap(call.name, port, layout, nth=call.nth, ops=ops)
    shared = layouts["k"]
    kv_heads = dict(shared.sizes)["h"] if shared is not None else heads
    call = op.call
    assert call is not None
    return Attention(part, call.name, call.nth, "operators", heads, kv_heads, d_head, d_value), taps


def _head_layout(value: Value, batch: int, positions: int, heads: int, width: int, transposed: bool) -> Layout | None:
    shape = list(value.shape)
    if transposed:  # the operand is K^T; the tap hands out K
        shape[-1], shape[-2] = shape[-2], shape[-1]
    own = max(1, value.tensor.numel() // (batch * positions * width))  # fewer than `heads` when they are shared
    return recognise(tuple(shape), HEADS, b=batch, p=positions, h=own, e=width)


def projection_input(call: Call, a: Attention, batch: int) -> tuple[Tap | None, tuple[int, ...]]:
    """The tap of z_out, what enters the output projection, split into heads; and one token's shape of it."""
    given = call.input
    width, e = a.heads * a.d_value, a.d_value
    if given is None or not e:
        return None, ()
    shape = tuple(given.shape)
    key = next(k for k, v in call.inputs.items() if v is given)
    if len(shape) == 4 and shape[-2] * shape[-1] == width:  # a projection in groups: of heads, or of parts of a head
        g, w = shape[-2:]
        groups = Layout("b p g (i e)", "b p (g i) e", (("g", g), ("e", e)))
        parts = Layout("b p (h i) e", "b p h (i e)", (("h", a.heads), ("i", e // w)))
        if w % e == 0 or e % w == 0:
            return Tap(call.name, "in", groups if w % e == 0 else parts, key, call.nth), shape[-2:]
    for inputs in (shape[-1], shape[1] if len(shape) == 3 else 0):
        if inputs < width or inputs % e:
            continue
        positions = given.tensor.numel() // (batch * inputs)
        layout = recognise(shape, HEADS, b=batch, p=positions, h=inputs // e, e=e)
        if layout is not None:
            return Tap(call.name, "in", layout, key, call.nth), (inputs,)
    return None, ()
