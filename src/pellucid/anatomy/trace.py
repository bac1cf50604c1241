"""One forward pass, written down: which module called what, and which value flowed into which operation.

Discovery reads everything it needs off this graph: additions make the residual stream, softmax between two
contractions makes attention, the linear map that receives z is the output projection, and so on. No family is
known by name. Values are identified by the tensor object; an in-place operation starts a new value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pellucid.anatomy.interfaces import listening

SELF = "self"
OPAQUE = "opaque"  # what a module does by other means than torch functions (custom kernels, quantised products)
# Called in the course of an operation but carrying no data of their own.
SILENT = {
    "size",
    "dim",
    "numel",
    "is_floating_point",
    "__len__",
    "is_contiguous",
    "stride",
    "get_device",
    "item",
}


@dataclass(eq=False, slots=True)
class Value:
    """A tensor as it was at one moment of the pass."""

    tensor: Tensor
    producer: Op | None = None
    consumers: list[Op] = field(default_factory=list)
    made_by: list[Call] = field(default_factory=list)  # module calls that returned it, innermost first
    read_by: list[Call] = field(default_factory=list)  # module calls that received it, outermost first
    fixed: bool = False  # a parameter or buffer: the same for every input

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


@dataclass(eq=False, slots=True)
class Op:
    """One torch function call, or one call of the attention or experts interface."""

    index: int
    name: str
    call: Call | None
    inputs: list[Value]
    outputs: list[Value]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    func: Any = None
    ordinal: int = 0  # how many contractions and softmaxes its module call had made, this one included
    nth: int = 0  # how many operations of this name its module call had made, this one included


@dataclass(eq=False, slots=True)
class Call:
    """One call of one module; `nth` counts the calls of that module, for layers that share weights."""

    name: str
    module: nn.Module
    parent: Call | None
    nth: int
    start: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[int | str, Value] = field(default_factory=dict)
    outputs: dict[int | str, Value] = field(default_factory=dict)
    children: list[Call] = field(default_factory=list)
    end: int = -1
    contractions: int = 0
    made: Counter[str] = field(default_factory=Counter)  # operations by name
    norm: bool | None = None  # whether it normalises, once somebody asked
    linear: bool | None = None  # whether an opaque one is linear

    @property
    def input(self) -> Value | None:
        """The hidden state it received: the first floating-point tensor, `hidden_states` first among
        keywords.
        """
        first = self.inputs.get(0)
        if first is not None and first.tensor.is_floating_point():
            return first
        named = self.inputs.get("hidden_states")
        if named is not None:
            return named
        return next((v for v in self.inputs.values() if v.tensor.is_floating_point()), None)

    @property
    def output(self) -> Value | None:
        return next((v for v in self.outputs.values() if v.tensor.is_floating_point()), None)

    def walk(self) -> Iterator[Call]:
        yield self
        for child in self.children:
            yield from child.walk()

    def inside(self, other: Call) -> bool:
        return other.start <= self.start and (self.end <= other.end)


CONTRACTIONS = {"matmul", "bmm", "__matmul__", "baddbmm", "einsum", "mm", "__rmatmul__"}
SOFTMAXES = {"softmax", "_softmax"}
# Modules that are an operation in a coat: what they do counts as done by the module around them.
UNFRAMED = {"Dropout", "StableDropout", "Softmax", "Identity"}


def counts(name: str) -> bool:
    """Whether an operation has an ordinal among the contractions: nothing else can shift that count."""
    return name in CONTRACTIONS or name in SOFTMAXES or name == "scaled_dot_product_attention"


def in_place(name: str) -> bool:
    """Whether the operation changes its first operand."""
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "__iadd__",
        "__isub__",
        "__imul__",
        "__setitem__",
    )


class Trace(TorchFunctionMode):
    """Use as a context around a forward pass; afterwards `calls`, `ops` and `value_of` hold the graph."""

    def __init__(self, root: nn.Module, closed: Collection[nn.Module] = ()) -> None:
        """`closed` are modules whose inside is not looked at: what they make, they make at once."""
        super().__init__()
        self.root, self.closed = root, frozenset(closed)
        inner = {m for whole in closed for m in whole.modules() if m is not whole}
        self.names = {m: n for n, m in root.named_modules() if m not in inner}
        self._shut = 0  # how many closed modules are running
        self.calls: list[Call] = []
        self.ops: list[Op] = []
        self._now: dict[int, Value] = {}
        self._keep: list[Any] = []  # keeps tensor objects alive, so that an id is never used twice
        self._stack: list[Call] = []
        self._times: dict[nn.Module, int] = {}
        self.lengths: set[int] = set()  # of the token sequences that went in
        self._fixed = {id(t) for t in (*root.parameters(), *root.buffers())}

    # ---- values

    def value_of(self, tensor: Tensor) -> Value:
        value = self._now.get(id(tensor))
        if value is None:
            fixed = id(tensor) in self._fixed or isinstance(tensor, nn.Parameter)  # offloaded weights come as new ones
            value = self._now[id(tensor)] = Value(tensor, fixed=fixed)
            self._keep.append(tensor)
        return value

    def _fresh(self, tensor: Tensor, op: Op) -> Value:
        value = self._now[id(tensor)] = Value(tensor, producer=op)
        self._keep.append(tensor)
        return value

    def record(
        self,
        name: str,
        inputs: Any,
        outputs: Any,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
        func: Any = None,
    ) -> Op | None:
        given = [self.value_of(t) for t in tensors(inputs)]
        known = {id(v.tensor) for v in given}
        results = list(tensors(args[:1])) if name == "__setitem__" else list(tensors(outputs))
        if not in_place(name):
            results = [t for t in results if id(t) not in known]  # handed back as it was: the same value
        if not results:
            return None
        call = self._stack[-1] if self._stack else None
        op = Op(len(self.ops), name, call, given, [], args, dict(kwargs or {}), func)
        if call is not None:
            op.ordinal, op.nth = call.contractions, call.made[name]
        for value in given:
            value.consumers.append(op)
        op.outputs = [self._fresh(t, op) for t in results]
        self.ops.append(op)
        return op

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._shut:
            return func(*args, **kwargs)
        if self._stack:
            self._stack[-1].made[name] += 1
            self._stack[-1].contractions += counts(name)
        result = func(*args, **kwargs)
        if name not in SILENT:
            self.record(name, (args, kwargs), result, args, kwargs, func)
        return result

    # ---- modules

    def _pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nth = self._times.get(module, 0)
        self._times[module] = nth + 1
        parent = self._stack[-1] if self._stack else None
        call = Call(self.names[module], module, parent, nth, len(self.ops), args, dict(kwargs))
        for key, tensor in arguments(args, kwargs):
            value = call.inputs[key] = self.value_of(tensor)
            value.read_by.append(call)
        if parent is not None:
            parent.children.append(call)
        self.calls.append(call)
        self._stack.append(call)
        self._shut += module in self.closed

    def _post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._stack[-1]
        self._shut -= module in self.closed
        for _, tensor in results(output):
            if id(tensor) not in self._now and not self.value_of(tensor).fixed:  # a kernel that torch functions hide
                self.record(OPAQUE, (args, kwargs), tensor, args, kwargs)
        self._stack.pop()
        call.end = len(self.ops)
        for key, tensor in results(output):
            value = call.outputs[key] = self.value_of(tensor)
            value.made_by.append(call)

    # ---- the two interfaces

    def attention(self, native: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        with torch._C.DisableTorchFunction():
            z, pattern = native(module, q, k, v, mask, **kw)
        self.record("attention", (q, k, v), z, (module, q, k, v, mask), kw)
        return z, pattern

    def experts(
        self,
        native: Any,
        module: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        given = (hidden_states, top_k_index, top_k_weights)
        with torch._C.DisableTorchFunction():
            out: Tensor = native(module, *given)
        self.record("experts", given, out, (module, *given))
        return out

    def __enter__(self) -> Trace:
        framed = [m for m in self.names if type(m).__name__ not in UNFRAMED]
        self._hooks = [m.register_forward_pre_hook(self._pre, with_kwargs=True) for m in framed]
        self._hooks += [m.register_forward_hook(self._post, with_kwargs=True) for m in framed]
        self._listening = listening(self)
        self._listening.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._listening.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()


# ---- tensors inside arguments and results


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int | str, Tensor]]:
    """The tensors among a call's own arguments (not those inside containers), by position or keyword."""
    yield from ((i, value) for i, value in enumerate(args) if isinstance(value, Tensor))
    yield from ((name, value) for name, value in kwargs.items() if isinstance(value, Tensor))


def results(output: Any) -> Iterator[tuple[int | str, Tensor]]:
    """The tensors a module returned: itself under `self`, or by index or key of a tuple or model output."""
    if isinstance(output, Tensor):
        yield SELF, output
    elif isinstance(output, Mapping):
        yield from ((str(k), v) for k, v in output.items() if isinstance(v, Tensor))
    elif isinstance(output, (tuple, list)):
        yield from ((i, v) for i, v in enumerate(output) if isinstance(v, Tensor))


def take(output: Any, key: int | str) -> Tensor:
    """The tensor of `output` under a key that `results` gave."""
    return output if key == SELF else output[key]


def put(output: Any, key: int | str, tensor: Tensor) -> Any:
    """`output` with that tensor replaced; the container is copied, never changed in place."""
    if key == SELF:
        return tensor
    if isinstance(output, Mapping):
        return type(output)(**{**output, key: tensor})
    items = [tensor if i == key else item for i, item in enumerate(output)]
    if hasattr(output, "_fields"):
        return type(output)(*items)
    return type(output)(items)
