"""Questions about the graph of a traced forward pass: what is this value a sum of, where did it come from,
who uses it.

Three kinds of operation matter. *Transparent* ones move numbers without changing them (view, transpose,
dropout at inference). *Additive* ones build the residual stream. Everything else makes something new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.trace import CONTRACTIONS, OPAQUE, Call, Op, Value, take
from pellucid.anatomy.weights import is_packed

TRANSPARENT = {
    "view", "reshape", "transpose", "permute", "contiguous", "to", "type", "float", "half", "bfloat16",
    "double", "clone", "dropout", "dropout_", "squeeze", "unsqueeze", "flatten", "unflatten", "type_as",
    "view_as", "swapaxes", "swapdims", "movedim", "t", "__get__", "detach", "reshape_as", "alias", "cpu",
    "expand", "expand_as",
}  # fmt: skip
GUARDS = {
    "clamp",
    "clip",
    "clamp_",
    "nan_to_num",
}  # against overflow: they change nothing where nothing overflows
ADD = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}
MULTIPLY = {
    "mul",
    "mul_",
    "__mul__",
    "__imul__",
    "__rmul__",
    "div",
    "div_",
    "true_divide",
    "__truediv__",
    "multiply",
}
LINEAR = {"linear", "addmm", "matmul", "mm", "__matmul__", "conv1d", "einsum", "bmm", "__rmatmul__"}

SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}  # the second operand gives no numbers
CREATED = {
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "zeros",
    "ones",
    "full",
}

Coefficient = float | Tensor


def passes(op: Op) -> bool:
    """Whether the operation only moves its (first) input's numbers around, all of them, heads and tokens
    staying whole.
    """
    if not op.inputs or not op.outputs or op.outputs[0].tensor.numel() != op.inputs[0].tensor.numel():
        return False
    if op.name in GUARDS:
        return torch.equal(op.outputs[0].tensor, op.inputs[0].tensor)
    return op.name in TRANSPARENT or (op.name == "__getitem__" and plain_index(op.args[1]))


def plain_index(index: Any) -> bool:
    """Slices and None keep the order of what they keep; tensors and lists may permute it."""
    items = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, (slice, int)) for i in items)


def constant(value: Value, depth: int = 8) -> bool:
    """Whether the value is made from parameters and numbers only, so that it is the same for every input."""
    if value.fixed:
        return True
    op = value.producer
    if op is None or depth == 0:
        return False
    if op.name in CREATED:
        return True
    return bool(op.inputs) and all(
        constant(v, depth - 1) for v in (op.inputs[:1] if op.name in SHAPED_LIKE else op.inputs)
    )


def parametric(value: Value) -> bool:
    """Whether the value is made from parameters, though which of them may depend on the input (chosen
    experts).
    """
    op = value.producer
    chosen = op is not None and op.name in TRANSPARENT | {"__getitem__", "index_select"} and bool(op.inputs)
    return constant(value) or (chosen and op is not None and parametric(op.inputs[0]))


def number(op: Op) -> float | None:
    """The plain number among the operands of a binary operation."""
    for arg in (*op.args[:2], *(op.kwargs.get(k) for k in ("other", "input"))):
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return float(arg)
    return None


def factor(op: Op) -> tuple[Value, Coefficient] | None:
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
        return a, _scalar(1 / b.tensor.detach() if invert else b.tensor.detach())
    if constant(a) and not invert:
        return b, _scalar(a.tensor.detach())
    return None


def _scalar(x: Tensor) -> Coefficient:
    return float(x) if x.numel() == 1 else x


def sources(value: Value) -> Iterator[Value]:
    """The value and what it was before transparent operations, nearest first."""
    yield value
    while value.producer is not None and passes(value.producer):
        value = value.producer.inputs[0]
        yield value


def is_norm(call: Call) -> bool:
    """A norm by what it does: one input, vectors as parameters, an output that forgets the input's size."""
    if call.norm is None:
        call.norm = _forgets_size(call)
    return call.norm


def _forgets_size(call: Call) -> bool:
    given, made = call.input, call.output
    if given is None or made is None or given is made or given.shape != made.shape:
        return False
    if any(v.tensor.is_floating_point() for v in call.inputs.values() if v is not given):
        return False
    if any(p.ndim > 1 for p in call.module.parameters()):
        return False
    key = next(k for k, v in call.inputs.items() if v is given)
    out_key = next(k for k, v in call.outputs.items() if v is made)
    x = given.tensor.detach()
    x = x * (8 / x.float().pow(2).mean().sqrt().clamp_min(1e-6)).to(x.dtype)
    with torch.no_grad():
        once, twice = (run_with(call.module, call.args, call.kwargs, key, x * k, out_key).float() for k in (1, 2))
    varies = float(once.std()) > 1e-6
    return varies and float((once - twice).abs().max()) <= 2e-2 * float(once.abs().max())


def run_with(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: int | str,
    x: Tensor,
    out_key: int | str,
) -> Tensor:
    """Call a traced module again with one argument replaced (in the precision and place it was given)."""
    x = x.to(args[key] if isinstance(key, int) else kwargs[key])
    args = tuple(x if i == key else a for i, a in enumerate(args))
    return take(module(*args, **{k: (x if k == key else v) for k, v in kwargs.items()}), out_key)


def norm_of(value: Value) -> Call | None:
    """The norm call that returned this value."""
    return next((c for c in value.made_by if c.input is not value and is_norm(c)), None)


@dataclass
class Additive:
    """What a residual value is made of, walking back through additions (and norms, in post-norm families) to
    `start`.
    """

    start: Value
    first_op: int

    def __post_init__(self) -> None:
        self._reaches: dict[int, bool] = {}

    def reaches(self, value: Value) -> bool:
        """Whether the block's input arrives here through additions, factors and norms of such sums."""
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
        added = op.name in ADD and len(op.inputs) == 2 and any(self.reaches(v) for v in op.inputs)
        return added or self.carried(value) is not None

    def carried(self, value: Value) -> Value | None:
        """The residual state that is multiplied by weights of the pass on its way here: a mask, or weights
        that mix parallel residual streams.
        """
        op = value.producer
        if op is None or op.index < self.first_op or op.name not in MULTIPLY | CONTRACTIONS or len(op.inputs) != 2:
            return None
        for state, weights in (op.inputs, op.inputs[::-1]):
            small = weights.tensor.numel() < state.tensor.numel() == value.tensor.numel()
            if small and not constant(weights) and self.reaches(state) and not self.reaches(weights):
                return state
        return None

    def stream(self, value: Value) -> set[int]:
        """The residual values on the way from the start to `value` (ids), norms of sums included."""
        found: set[int] = set()
        queue = [value]
        while queue:
            v = queue.pop()
            if id(v) in found or not self.reaches(v):
                continue
            found.add(id(v))
            norm, op = norm_of(v), v.producer
            if norm is not None and norm.start >= self.first_op and norm.input is not None:
                queue.append(norm.input)
            elif v is not self.start and op is not None:
                queue += op.inputs
        return found

    def leaf(self, value: Value) -> bool:
        whole = value is self.start or norm_of(value) is not None or not self.reaches(value)
        return whole or self.carried(value) is not None

    def terms(self, value: Value) -> list[tuple[Coefficient, Value]]:
        """`value` as a sum of coefficients times values: the start, norms of sums, contributions and
        constants.

        A sum with contributions that is scaled channel by channel is not opened: it stays a state of its own.
        """
        if self.leaf(value):
            return [(1.0, value)]
        op = value.producer
        assert op is not None
        if passes(op):
            return self.terms(op.inputs[0])
        scaled = factor(op)
        if scaled is not None:
            inner = self.shallow(scaled[0]) if isinstance(scaled[1], Tensor) else self.terms(scaled[0])
            return [(c * scaled[1], v) for c, v in inner]
        return [(c * s, leaf) for s, v in signed(op) for c, leaf in self.terms(v)]

    def shallow(self, value: Value) -> list[tuple[Coefficient, Value]]:
        """The terms of a sum of states and constants; a sum with contributions of its own is one term."""
        op = value.producer
        if self.leaf(value) or op is None:
            return [(1.0, value)]
        if passes(op):
            return self.shallow(op.inputs[0])
        if op.name not in ADD or not all(constant(v) or self.reaches(v) for v in op.inputs):
            return [(1.0, value)]
        return [(c * s, leaf) for s, v in signed(op) for c, leaf in ([(1.0, v)] if constant(v) else self.shallow(v))]


def signed(op: Op) -> list[tuple[float, Value]]:
    """The operands of an addition or subtraction with their signs."""
    second = (-1.0 if "sub" in op.name else 1.0) * float(op.kwargs.get("alpha", 1.0))
    return list(zip((1.0, second), op.inputs[:2], strict=False))


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


def made_by_module(value: Value, inside: Callable[[Call], bool]) -> tuple[Call, Coefficient, Value] | None:
    """The outermost of the calls that are `inside` which returned `value` up to a constant factor, and that
    factor.
    """
    coefficient: Coefficient = 1.0
    while True:
        for v in sources(value):
            calls = [c for c in v.made_by if inside(c)]
            if calls:
                return calls[-1], coefficient, v
            value = v
        scaled = factor(value.producer) if value.producer is not None else None
        if scaled is None:
            return None
        value, coefficient = scaled[0], coefficient * scaled[1]


def weight_of(op: Op) -> Value | None:
    """The constant matrix of a linear operation (one per group of channels, if there are groups)."""
    if op.name not in LINEAR:
        return None
    found = [v for v in op.inputs if constant(v) and v.tensor.ndim in (2, 3)]
    return found[0] if len(found) == 1 else None


def is_linear(op: Op) -> bool:
    """Whether the operation is a linear map with weights of its own, also one that only its module's calls
    show.
    """
    if op.name != OPAQUE or op.call is None:
        return weight_of(op) is not None
    if op.call.linear is None:
        op.call.linear = not op.call.children and acts_linearly(op.call)
    return op.call.linear


def acts_linearly(call: Call) -> bool:
    """Whether a call's output is linear in its input (with a bias), tried on the values of the pass."""
    given, made = call.input, call.output
    if given is None or made is None or given.shape[:-1] != made.shape[:-1] or given.tensor.ndim < 2:
        return False
    x, f = as_function(call)
    y = x.flip(0) if x.shape[0] > 1 else x.flip(1)
    apart, together = f(x) + f(y) - f(torch.zeros_like(x)), f(x + y)
    return float((apart - together).abs().max()) <= additivity(call.module) * float(together.abs().max())


def additivity(module: nn.Module) -> float:
    """How far from additive a linear module may be, relative to what it makes: more where weights are packed, as some
    kernels then round what they are given to eight bits as well.
    """
    return 5e-2 if is_packed(module) else 2e-2


def as_function(call: Call) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a call was given, and its module as a function of that."""
    given, made = call.input, call.output
    keys = (
        next(k for k, v in call.inputs.items() if v is given),
        next(k for k, v in call.outputs.items() if v is made),
    )

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            return run_with(call.module, call.args, call.kwargs, keys[0], x, keys[1]).float()

    assert given is not None
    return given.tensor.detach(), f


def projection_of(value: Value) -> tuple[Op, bool] | None:
    """The first linear map downstream of `value`, and whether the way there is transparent (nothing in
    between).
    """
    queue: list[tuple[Value, bool]] = [(value, True)]
    seen: set[int] = set()
    while queue:
        v, exact = queue.pop(0)
        if id(v) in seen:
            continue
        seen.add(id(v))
        for op in v.consumers:
            if is_linear(op):
                return op, exact
            if len(seen) < 60:
                queue.extend((o, exact and passes(op)) for o in op.outputs)
    return None


def linear_before(value: Value, first_op: int) -> Op | None:
    """The last linear map (or mixture of experts) that `value` was computed by, through norms, factors and
    biases.
    """
    queue, seen = [value], 0
    while queue and seen < 80:
        v = queue.pop(0)
        seen += 1
        op = v.producer
        if op is None or op.index < first_op:
            continue
        if is_linear(op) or op.name == "experts":
            return op
        queue.extend(i for i in op.inputs if i.tensor.numel() == v.tensor.numel() or i.shape[-1:] == v.shape[-1:])
    return None
