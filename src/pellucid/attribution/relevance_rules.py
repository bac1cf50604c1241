"""How does relevance pass through each operator? Gradient rules, applied while a model runs as it is.

The relevance of a tensor is R(x) = x * G(x), where G is the gradient of the answer with these changes (Achtibat et al.
2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers"):

    linear map, sum          y = W x + b         as it is; the bias keeps its share b * G(y)     (LRP-0)
                             with epsilon        G(y) |y| / (|y| + epsilon) in the place of G(y) (LRP-epsilon)
    product of n activations y = a b (...)       G(y) / n for every factor                       (uniform rule)
    function of one number   y = f(x)            G(x) = G(y) (f(x) - f(0)) / x; f(0) is a bias   (identity rule)
    softmax                  s = softmax(x)      as it is: x_i (R_i - s_i sum R), the paper's Taylor rule
    division                 y = a / b           b is held at its value, as a constant           (norms: identity rule)
    rsqrt, exp, norm, std    y = f(x)            held: scales of norms, decays and weights of recurrences

A norm needs no rule of its own: whichever way it is written, it divides by a held size. Gates (gate * up), attention
(pattern * value, query * key) and routed experts (router weight * expert) are products. Holding what is exponentiated
follows MambaLRP (Jafari et al. 2024). With `hold_softmax` patterns and routers are constants too, which is CP-LRP (Ali
et al. 2022). The paper divides f(x) by x; where f(0) is not zero (sigmoid, softplus) that has a pole, so that f(0) is
a bias here, which is the same for GELU, SiLU, tanh and ReLU.

`Rules` sees every torch function of the thread it is entered in, as a context: modules, classes and other threads stay
as they are. Parameters are constants, so that a tensor needs a gradient if and only if it depends on the tokens. An
operator with no rule that such a tensor passes is noted in `uncovered`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pellucid.anatomy.fingerprint import Memo
from pellucid.anatomy.trace import in_place, tensors
from pellucid.attribution.relevance_operators import CONTRACTIONS, EMPTY, HELD, LINEAR, PRODUCTS, SCALAR, SOFTMAX, SUMS
from pellucid.attribution.relevance_scalars import origin, scalar_modules

Function = Callable[..., Any]
_ZERO = 1e-3  # closer to zero than this, (f(x) - f(0)) / x is rounding: the slope at zero is meant


class Slope(torch.autograd.Function):
    """A value y made without a gradient, with one of `slope` towards x (less its mean over `centred` dimensions), and of
    one towards a constant that is part of y.

    y comes in a list, so that what goes out is y itself and no view of it: models work on it in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: list[Tensor], slope: Tensor, constant: Tensor | None, centred: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.shape, ctx.centred = None if constant is None else constant.shape, centred
        return y[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
        mine = g * ctx.saved_tensors[0]
        if ctx.centred:
            mine = mine - mine.mean(ctx.centred, keepdim=True)
        return mine, None, None, None if ctx.shape is None else g.sum_to_size(ctx.shape), None


def sloped(
    x: Tensor, y: Tensor, slope: Tensor, constant: Tensor | None = None, centred: tuple[int, ...] = ()
) -> Tensor:
    made: Tensor = Slope.apply(x, [y], slope, constant, centred)
    return made


class Rules(TorchFunctionMode):
    """Use as a context around a forward pass. Afterwards `tokens` holds, for each stream of token ids, the embeddings
    looked up for it [position, d], and `constants` what was added that no token made; both are leaves of the graph.
    """

    def __init__(
        self, module: nn.Module, streams: dict[str, Tensor], *, hold_softmax: bool = False, epsilon: float = 0.0,
        memo: Memo | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.memo = Memo(module) if memo is None else memo  # of the module
        self.module, self.streams, self.hold_softmax, self.epsilon = module, streams, hold_softmax, epsilon
        self.tokens: dict[str, list[Tensor]] = {name: [] for name in streams}
        self.constants: list[Tensor] = []
        self.uncovered: set[str] = set()
        self._own, self._device = _input_table(module), next(iter(streams.values())).device
        self._thread = threading.get_ident()
        self._enabled: list[bool] = []
        self._numbers: dict[float, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Rules:
        for part, at in scalar_modules(self.module, self.memo).items():
            self._stack.callback(part.register_forward_pre_hook(self._before).remove)
            self._stack.callback(part.register_forward_hook(self._after(*at), always_call=True).remove)
        super().__enter__()
        return self

    def opaque(self, made: Tensor) -> set[str]:
        """Functions with a backward of their own on the way to a tensor, which no rule saw; looked for once a model."""
        how = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        return self.memo(("opaque functions", how), lambda: opaque(made))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._stack.close()

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # x.shape, or weight.T
            out = func(*args, **kwargs)
            return out.detach() if isinstance(out, Tensor) and isinstance(args[0], nn.Parameter) else out
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        for a in args:
            if isinstance(a, nn.Parameter):
                args = tuple(map(_fixed, args))
                break
        for a in kwargs.values():
            if isinstance(a, nn.Parameter):
                kwargs = {k: _fixed(v) for k, v in kwargs.items()}
                break
        rule = RULES.get(name)
        if rule is not None:
            return rule(self, func, args, kwargs)
        out = func(*args, **kwargs)
        if name not in LINEAR and name not in EMPTY and (factors(args) or factors(kwargs)):
            floats = any(t.is_floating_point() for t in tensors(out))
            self.uncovered |= {name} if floats else set()
        return out

    # ---- what is a leaf

    def constant(self, x: Any) -> Any:
        """An addend: if no token made it, a leaf, so that its share of the relevance can be told."""
        if isinstance(x, float | int):
            return self._number(float(x))
        if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point():
            return x
        leaf = x.detach().requires_grad_()
        self.constants.append(leaf)
        return leaf

    def _number(self, x: float) -> Tensor | float:
        if x and x not in self._numbers:
            self._numbers[x] = torch.tensor(x, device=self._device, requires_grad=True)
            self.constants.append(self._numbers[x])
        return self._numbers.get(x, x)

    def embedding(self, func: Function, args: Any, kwargs: Any) -> Any:
        """A look-up of the tokens of a stream starts the graph. Source and target of one text are told by order."""
        given = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
        ids, weight = given["input"], given["weight"]
        out = func(*args, **kwargs)
        fits = [
            name
            for name, stream in self.streams.items()
            if ids.numel() >= stream.numel() and torch.equal(ids.flatten()[: stream.numel()], stream.flatten())
        ]
        if not fits or (weight.data_ptr() != self._own and _consecutive(ids)):
            return out
        name = next((f for f in fits if not self.tokens[f]), fits[0])
        leaf = out.detach().requires_grad_()
        self.tokens[name].append(leaf)
        return leaf.clone()  # the model may work on it in place

    # ---- rules

    def sum(self, func: Function, args: Any, kwargs: Any) -> Any:
        if factors(args) or factors(kwargs):
            kept = args[:1] if in_place(func.__name__) else ()  # what is changed in place must stay the same tensor
            args = (*kept, *map(self.constant, args[len(kept) :]))
            kwargs = {k: v if k == "alpha" else self.constant(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def join(self, func: Function, args: Any, kwargs: Any) -> Any:
        parts = args[0] if args else kwargs["tensors"]
        if not factors(parts):
            return func(*args, **kwargs)
        parts = [self.constant(_fixed(p)) for p in parts]
        return func(parts, *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})

    def product(self, func: Function, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        n = factors(args) + factors(kwargs)
        if n > 1:
            out.register_hook(lambda g: g / n)
        return out

    def contraction(self, func: Function, args: Any, kwargs: Any) -> Any:
        out = self.product(func, args, kwargs)
        return self.stabilised(out) if self.epsilon and factors(args) + factors(kwargs) == 1 else out

    def affine(self, func: Function, args: Any, kwargs: Any) -> Any:
        """linear(x, W, b), conv1d(x, W, b, ...)"""
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        kwargs = _without(kwargs, "input", "weight", "bias")
        if x.requires_grad and weight.requires_grad:
            x, weight = scaled(x, 0.5), scaled(weight, 0.5)
        elif not (x.requires_grad or weight.requires_grad):
            return func(x, weight, bias, *args[3:], **kwargs)
        return self.stabilised(func(x, weight, self.constant(bias), *args[3:], **kwargs))

    def added_product(self, func: Function, args: Any, kwargs: Any) -> Any:
        """addmm(c, a, b), baddbmm(c, a, b), addcmul(c, a, b)"""
        names = {"addcmul": ("input", "tensor1", "tensor2"), "baddbmm": ("input", "batch1", "batch2")}
        a, b, c = names.get(func.__name__.rstrip("_"), ("input", "mat1", "mat2"))
        given = {**dict(zip((a, b, c), args, strict=False)), **kwargs}
        n = factors((given[b], given[c]))
        if n and not in_place(func.__name__):
            given[a] = self.constant(given[a])
        if n == 2:
            given[b], given[c] = scaled(given[b], 0.5), scaled(given[c], 0.5)
        out = func(given.pop(a), given.pop(b), given.pop(c), **given)
        return self.stabilised(out) if n == 1 else out

    def stabilised(self, y: Tensor) -> Tensor:
        if self.epsilon and y.requires_grad:
            size = y.detach().abs()
            keep = size / (size + self.epsilon)
            y.register_hook(lambda g: g * keep)
        return y

    def held(self, func: Function, args: Any, kwargs: Any) -> Any:
        return func(*map(_still, args), **{k: _still(v) for k, v in kwargs.items()})

    def quotient(self, func: Function, args: Any, kwargs: Any) -> Any:
        """a / b, with b held; `b.__rtruediv__(a)` is a / b too."""
        below = 0 if func.__name__ in ("__rtruediv__", "__rdiv__") else 1
        args = tuple(_still(a) if i == below else a for i, a in enumerate(args))
        return func(*args, **{k: _still(v) if k == "other" else v for k, v in kwargs.items()})

    def solution(self, func: Function, args: Any, kwargs: Any) -> Any:
        """x with A x = b, A held: it divides."""
        return func(args[0].detach(), *args[1:], **kwargs)

    def softmax(self, func: Function, args: Any, kwargs: Any) -> Any:
        return self.held(func, args, kwargs) if self.hold_softmax else func(*args, **kwargs)

    def power(self, func: Function, args: Any, kwargs: Any) -> Any:
        """x ** n: a scale where n is negative, else a function of one number."""
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent", 2)
        if func.__name__ == "__rpow__" or isinstance(exponent, Tensor) or exponent < 0:
            return self.held(func, args, kwargs)
        if exponent == 2 and not in_place(func.__name__):  # as in most norms: x times its value is the rule at once
            return args[0] * args[0].detach()
        return self.scalar(func, args, kwargs)

    def scalar(self, func: Function, args: Any, kwargs: Any) -> Any:
        """A function of one number, at every entry."""
        x = args[0] if args else kwargs["input"]
        if not x.requires_grad:
            return func(*args, **kwargs)
        kwargs = _without(kwargs, "input", "inplace", "out")
        before = x.detach()
        if inplace := func.__name__.endswith("_"):
            before = before.clone()
        with torch.no_grad():
            y = func(before.clone() if inplace else before, *args[1:], **kwargs)
            at_zero, slope = origin(lambda z: func(z, *args[1:], **kwargs), (func, args[1:], tuple(kwargs.items())))
        out = self.secant(x.clone() if inplace else x, y, at_zero, slope)
        return x.copy_(out) if inplace else out

    def secant(self, x: Tensor, y: Tensor, at_zero: float, slope: float) -> Tensor:
        """y = f(x) with the slope of the line from (0, f(0)) to (x, y)."""
        z = x.detach()
        if not at_zero:
            return sloped(x, y, (y / z).nan_to_num_(slope))
        ratio = torch.where(z.abs() < _ZERO, slope, (y - at_zero) / z)
        return sloped(x, y, ratio, self.constant(y.new_tensor(at_zero)))

    def attention(self, func: Function, args: Any, kwargs: Any) -> Any:
        """Fused softmax(q k + mask) v: half goes to v, and of the pattern's half, half to q and half to k."""
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        if self.hold_softmax:
            given |= {n: given[n].detach() for n in ("query", "key", "attn_mask") if given.get(n) is not None}
        q, k, v = given["query"], given["key"], given["value"]
        if q.requires_grad and k.requires_grad:
            given |= {"query": scaled(q, 0.5), "key": scaled(k, 0.5)}
        out = func(
            given.pop("query"), given.pop("key"), given.pop("value"), given.pop("attn_mask", None), *args[4:], **given
        )
        if v.requires_grad and (q.requires_grad or k.requires_grad):
            out.register_hook(lambda g: g / 2)
        return out

    # ---- norms that are one operator

    def layer_norm(self, func: Function, args: Any, kwargs: Any) -> Any:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, shape = given["input"], given["normalized_shape"]
        dims = tuple(range(-len(shape), 0))
        if not x.requires_grad:
            return func(*args, **kwargs)
        weight, bias = given.get("weight"), given.get("bias")
        with torch.no_grad():
            y, _, scale = torch.native_layer_norm(x, shape, weight, bias, given.get("eps", 1e-5))
            scale = scale if weight is None else scale * weight
        return sloped(x, y, scale, self.constant(bias), dims)

    def rms_norm(self, func: Function, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)), **kwargs}
        x, dims = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
        if not x.requires_grad:
            return func(*args, **kwargs)
        eps = torch.finfo(x.dtype).eps if given.get("eps") is None else given["eps"]
        with torch.no_grad():
            y = func(*args, **kwargs)
            scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
            scale = scale if given.get("weight") is None else scale * given["weight"]
        return sloped(x, y, scale)

    def group_norm(self, func: Function, args: Any, kwargs: Any) -> Any:
        names = ("input", "num_groups", "weight", "bias", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, groups, weight = given["input"], given["num_groups"], given.get("weight")
        if not x.requires_grad:
            return func(*args, **kwargs)
        parts = x.unflatten(1, (groups, -1)).flatten(2)
        with torch.no_grad():
            y = func(*args, **kwargs)
            scale = (parts.var(-1, correction=0, keepdim=True) + given.get("eps", 1e-5)).rsqrt().expand_as(parts)
            scale = scale.reshape(x.shape)
            scale = scale if weight is None else scale * weight.view(1, -1, *[1] * (x.ndim - 2))
        centred = (parts - parts.mean(-1, keepdim=True)).reshape(x.shape)
        bias = given.get("bias")
        bias = None if bias is None else bias.view(1, -1, *[1] * (x.ndim - 2))
        return sloped(centred, y, scale, self.constant(bias))

    def normalize(self, func: Function, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if not x.requires_grad:
            return func(*args, **kwargs)
        with torch.no_grad():
            y = func(*args, **kwargs)
        given = {**dict(zip(("input", "p", "dim", "eps"), args, strict=False)), **kwargs}
        size = x.detach().norm(given.get("p", 2.0), given.get("dim", 1), keepdim=True)
        return sloped(x, y, size.clamp_min(given.get("eps", 1e-12)).reciprocal())

    def glu(self, func: Function, args: Any, kwargs: Any) -> Any:
        x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", -1)
        a, b = x.chunk(2, dim)
        return self.product(torch.mul, (a, self.scalar(torch.sigmoid, (b,), {})), {})

    # ---- modules that are a function of one number, of several operators perhaps (GELU written out): one rule for all

    def _before(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            self._enabled.append(torch.is_grad_enabled())
            torch.set_grad_enabled(False)

    def _after(self, at_zero: float, slope: float) -> Function:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != self._thread or not self._enabled:
                return None
            torch.set_grad_enabled(self._enabled.pop())
            if output is None or not factors(args):
                return None
            with torch._C.DisableTorchFunction():
                return self.secant(args[0], output, at_zero, slope)

        return hook


RULES: dict[str, Function] = {
    **dict.fromkeys(SUMS, Rules.sum),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), Rules.join),
    **dict.fromkeys(PRODUCTS, Rules.product),
    **dict.fromkeys(CONTRACTIONS, Rules.contraction),
    **dict.fromkeys(("linear", "conv1d", "conv2d"), Rules.affine),
    **dict.fromkeys(("addmm", "baddbmm", "baddbmm_", "addcmul", "addcmul_"), Rules.added_product),
    **dict.fromkeys(HELD, Rules.held),
    **dict.fromkeys(SOFTMAX, Rules.softmax),
    **dict.fromkeys(SCALAR, Rules.scalar),
    **dict.fromkeys(("pow", "pow_", "__pow__", "__rpow__", "__ipow__", "square"), Rules.power),
    **dict.fromkeys(("div", "div_", "divide", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__", "__rdiv__"), Rules.quotient),
    "embedding": Rules.embedding,
    "scaled_dot_product_attention": Rules.attention,
    "layer_norm": Rules.layer_norm,
    "rms_norm": Rules.rms_norm,
    "group_norm": Rules.group_norm,
    "normalize": Rules.normalize,
    "glu": Rules.glu,
    "linalg_solve_triangular": Rules.solution,
}  # fmt: skip


def factors(tree: Any) -> int:
    """How many tensors among arguments depend on the tokens."""
    n = 0
    for x in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(x, Tensor):
            n += x.requires_grad
        elif isinstance(x, list | tuple):
            n += factors(x)
    return n


def _still(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _fixed(x: Any) -> Any:
    """A parameter as a constant."""
    return x.detach() if isinstance(x, nn.Parameter) else x


def opaque(made: Tensor) -> set[str]:
    """Functions with a backward of their own on the way to this tensor, which no rule saw."""
    queue: list[Any] = [made.grad_fn]
    seen, found = set(queue), set()
    while queue:
        node = queue.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction) and type(node).__name__ != "SlopeBackward":
            found.add(type(node).__name__.removesuffix("Backward"))
        for function, _ in node.next_functions:
            if function is not None and function not in seen:
                seen.add(function)
                queue.append(function)
    return found


def scaled(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times a factor."""
    x = x.view_as(x)
    x.register_hook(lambda g: g * factor)
    return x


def _without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in names}


def _input_table(module: Any) -> int:
    """Where the weight of the model's own token embedding lies in memory."""
    try:
        return int(module.get_input_embeddings().weight.data_ptr())
    except (AttributeError, NotImplementedError):
        return -1


def _consecutive(ids: Tensor) -> bool:
    """Whether these ids look like positions."""
    return bool((ids.flatten().diff() == 1).all())
