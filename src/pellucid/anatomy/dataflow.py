"""Questions about the graph of a traced forward pass: what is this value a sum of, where did it come from, who uses it.

Three kinds of operation matter. *Transparent* ones move numbers without changing them (view, transpose, dropout at
inference). *Additive* ones build the residual stream. Everything else makes something new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pellucid.anatomy.trace import Call, Op, Value

TRANSPARENT = {
    "view", "reshape", "transpose", "permute", "contiguous", "to", "type", "float", "half", "bfloat16", "double",
    "clone", "dropout", "dropout_", "squeeze", "unsqueeze", "flatten", "unflatten", "type_as", "view_as",
    "swapaxes", "swapdims", "movedim", "t", "__get__", "detach", "reshape_as", "alias", "cpu", "expand", "expand_as",
}  # fmt: skip
ADD = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}
MULTIPLY = {"mul", "mul_", "__mul__", "__imul__", "__rmul__", "div", "div_", "true_divide", "__truediv__"}
LINEAR = {"linear", "addmm", "matmul", "mm", "__matmul__", "conv1d", "einsum", "bmm", "__rmatmul__"}


def passes(op: Op) -> bool:
    """Whether the operation only moves its (first) input's numbers around, all of them."""
    if op.name not in TRANSPARENT | {"__getitem__"} or not op.inputs:
        return False
    return op.outputs[0].tensor.numel() == op.inputs[0].tensor.numel()


def constant(value: Value, depth: int = 8) -> bool:
    """Whether the value is made from parameters and numbers only, so that it is the same for every input."""
    if value.fixed:
        return True
    op = value.producer
    return op is not None and depth > 0 and all(constant(v, depth - 1) for v in op.inputs)


def number(op: Op) -> float | None:
    """The plain number among the operands of a binary operation."""
    for arg in (*op.args[:2], *(op.kwargs.get(k) for k in ("other", "input"))):
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return float(arg)
    return None


def factor(op: Op) -> tuple[Value, float | Tensor] | None:
    """For a product with (or quotient by) something constant: the other operand and the factor."""
    if op.name not in MULTIPLY:
        return None
    invert = "div" in op.name
    if len(op.inputs) == 1:
        n = number(op)
        if n is None or (invert and op.args and op.args[0] is not op.inputs[0].tensor):
            return None
        return op.inputs[0], (1 / n if invert else n)
    a, b = op.inputs[:2]
    if constant(b):
        return a, (1 / b.tensor.detach() if invert else b.tensor.detach())
    if constant(a) and not invert:
        return b, a.tensor.detach()
    return None


def times(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    return a * b


def sources(value: Value) -> Iterator[Value]:
    """The value and what it was before transparent operations, nearest first."""
    yield value
    while value.producer is not None and passes(value.producer):
        value = value.producer.inputs[0]
        yield value


def is_norm(call: Call) -> bool:
    """A norm by what it does: same shape in and out, parameters of one dimension only, and a division by a size."""
    if call.input is None or call.output is None or call.input.shape != call.output.shape:
        return False
    if "norm" not in type(call.module).__name__.lower() and not isinstance(call.module, nn.LayerNorm):
        return False
    return all(p.ndim <= 1 for p in call.module.parameters())


def norm_of(value: Value) -> Call | None:
    """The norm call that returned this value."""
    return next((c for c in value.made_by if is_norm(c) and c.input is not value), None)


@dataclass
class Additive:
    """What a residual value is made of, walking back through additions (and norms, in post-norm families) to `start`."""

    start: Value
    first_op: int

    def __post_init__(self) -> None:
        self._reaches: dict[int, bool] = {}

    def reaches(self, value: Value) -> bool:
        """Whether the block's input arrives here through additions, constant factors and norms of such sums."""
        key = id(value)
        if key not in self._reaches:
            self._reaches[key] = False
            self._reaches[key] = self._find(value)
        return self._reaches[key]

    def _find(self, value: Value) -> bool:
        if value is self.start:
            return True
        norm = norm_of(value)
        if norm is not None and norm.start >= self.first_op:
            return norm.input is not None and self.reaches(norm.input)
        op = value.producer
        if op is None or op.index < self.first_op:
            return False
        if passes(op):
            return self.reaches(op.inputs[0])
        scaled = factor(op)
        if scaled is not None:
            return self.reaches(scaled[0])
        return op.name in ADD and any(self.reaches(v) for v in op.inputs)

    def terms(self, value: Value) -> list[tuple[float | Tensor, Value]]:
        """`value` as a sum of coefficients times values: the start, norms of sums, contributions and constants."""
        if value is self.start or norm_of(value) is not None or not self.reaches(value):
            return [(1.0, value)]
        op = value.producer
        assert op is not None
        if passes(op):
            return self.terms(op.inputs[0])
        scaled = factor(op)
        if scaled is not None:
            return [(times(c, scaled[1]), v) for c, v in self.terms(scaled[0])]
        sign = -1.0 if "sub" in op.name else 1.0
        alpha = float(op.kwargs.get("alpha", 1.0))
        out: list[tuple[float | Tensor, Value]] = []
        for i, v in enumerate(op.inputs[:2]):
            out += [(times(c, sign * alpha) if i else c, leaf) for c, leaf in self.terms(v)]
        return out


def ancestors(value: Value, stop: Callable[[Value], bool]) -> Iterator[Op]:
    """Operations the value was computed from, back to values at which `stop` says so."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        v = queue.pop()
        if v.producer is None or stop(v) or id(v.producer) in seen:
            continue
        seen.add(id(v.producer))
        yield v.producer
        queue.extend(v.producer.inputs)


def made_by_module(value: Value, within: Call) -> tuple[Call, float | Tensor, Value] | None:
    """The outermost module call inside `within` that returned `value` (up to a constant factor), and that factor."""
    coefficient: float | Tensor = 1.0
    while True:
        for v in sources(value):
            calls = [c for c in v.made_by if c is not within and c.inside(within)]
            if calls:
                return calls[-1], coefficient, v
            value = v
        scaled = factor(value.producer) if value.producer is not None else None
        if scaled is None:
            return None
        value, coefficient = scaled[0], times(coefficient, scaled[1])


def weight_of(op: Op) -> nn.Parameter | None:
    """The two-dimensional parameter of a linear operation."""
    if op.name not in LINEAR:
        return None
    found = [v for v in op.inputs if constant(v) and v.tensor.ndim == 2]
    if len(found) != 1:
        return None
    return next((w for w in _parameters(found[0])), None)


def _parameters(value: Value) -> Iterator[nn.Parameter]:
    if isinstance(value.tensor, nn.Parameter):
        yield value.tensor
    elif value.producer is not None:
        for v in value.producer.inputs:
            yield from _parameters(v)


def projection_of(value: Value) -> tuple[Op, bool] | None:
    """The first linear map downstream of `value`, and whether the way there is transparent (nothing in between)."""
    queue: list[tuple[Value, bool]] = [(value, True)]
    seen: set[int] = set()
    while queue:
        v, exact = queue.pop(0)
        if id(v) in seen:
            continue
        seen.add(id(v))
        for op in v.consumers:
            if op.name in LINEAR and weight_of(op) is not None:
                return op, exact
            if len(seen) < 60:
                queue.extend((o, exact and passes(op)) for o in op.outputs)
    return None


def linear_before(value: Value, first_op: int) -> Op | None:
    """The last linear map with a weight of its own that `value` was computed by, through norms, factors and biases."""
    queue, seen = [value], 0
    while queue and seen < 80:
        v = queue.pop(0)
        seen += 1
        op = v.producer
        if op is None or op.index < first_op:
            continue
        if op.name in LINEAR and weight_of(op) is not None:
            return op
        queue.extend(i for i in op.inputs if i.tensor.shape == v.tensor.shape or i.tensor.numel() == v.tensor.numel())
    return None


def parameter_count(module: nn.Module) -> int:
    return sum(1 for p in module.parameters() if p.ndim > 1)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
