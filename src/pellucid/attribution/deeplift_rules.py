"""How do differences from a baseline pass through each operator? Multipliers m with  sum of m * (x - x0) = y - y0.

    linear map, sum          its gradient
    function of one number   (f(x) - f(x0)) / (x - x0)                                        (the rescale rule)
    product y = a b          (b + b0) / 2 towards a, (a + a0) / 2 towards b
    softmax                  exp, sum, reciprocal and product, with the shift that both share
    norms                    square, mean, reciprocal root and product

The first two are DeepLIFT's (Shrikumar et al. 2017), which defines no more: attention multiplies activations by one
another, and a softmax in functional form escapes implementations that replace modules, so that what they attribute to
the tokens of a transformer adds up to anything. The rule for products is the Shapley value of a game of two factors, and
is exact; so the whole is. An operator that fits none of these is named in `uncovered`.

`Recorded` notes what every operator is given while the baseline runs, `Rescaled` takes it from there while the prompt runs
through the same operators in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pellucid.anatomy.fingerprint import Memo
from pellucid.anatomy.trace import in_place, tensors
from pellucid.attribution.relevance_operators import CONTRACTIONS, EMPTY, LINEAR, PRODUCTS, SCALAR, SUMS
from pellucid.attribution.relevance_scalars import scalar_modules
from pellucid.errors import Refused

Function = Callable[..., Any]
Pair = tuple[Tensor, Tensor]  # a value of the prompt, and that of the baseline

MULTIPLYING = (PRODUCTS | CONTRACTIONS) - {"tensordot"}
BENT = SCALAR | {
    "abs", "clamp", "clamp_", "clamp_max", "clamp_min", "clip", "hardtanh", "leaky_relu", "leaky_relu_", "relu", "relu6",
    "relu_", "threshold", "exp", "exp_", "exp2", "log", "sqrt", "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "square", "sin", "cos",
}  # fmt: skip
CHOOSING = {"amax", "amin", "max", "min", "maximum", "minimum", "sort", "topk", "prelu", "scatter_reduce", "nan_to_num"}
STRAIGHT = (LINEAR | SUMS | {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}) - BENT - CHOOSING
POWERS = {"pow", "pow_", "__pow__", "__ipow__"}
QUOTIENTS = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__", "__rtruediv__"}
SMALL = 1e-4  # a difference smaller than this, relative to the value, is rounding: the slope is meant


class Recorded(TorchFunctionMode):
    """Notes the tensors that every operator with a rule is given, in order, and so for modules that are a function of one
    number, of several operators perhaps (GELU written out): they are one function."""

    def __init__(self, module: nn.Module, memo: Memo | None = None) -> None:
        super().__init__()
        self.scalars = scalar_modules(module, memo)
        self.calls: list[tuple[str, list[Tensor]]] = []
        self.given: list[Tensor] = []
        self._hooks, self._thread = ExitStack(), threading.get_ident()

    def __enter__(self) -> Recorded:
        _hooked(self.scalars, self._hooks, self._meet)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.close()

    def _meet(self, part: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == self._thread:
            self.given.append(args[0].clone())

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in RULES:
            self.calls.append((name, [t.clone() for t in tensors((args, kwargs or {}))]))  # the model may work in place
        return func(*args, **(kwargs or {}))


class Rescaled(TorchFunctionMode):
    """The same operators with the gradients of the table above. Parameters are constants."""

    def __init__(self, record: Recorded) -> None:
        super().__init__()
        self.calls, self.next, self.given = record.calls, 0, iter(record.given)
        self.scalars = record.scalars
        self.uncovered: set[str] = set()
        self._hooks, self._thread = ExitStack(), threading.get_ident()

    def __enter__(self) -> Rescaled:
        _hooked(self.scalars, self._hooks, self._meet)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.close()

    def _meet(self, part: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if threading.get_ident() != self._thread:
            return None
        there = next(self.given, None)
        if there is None or there.shape != args[0].shape:
            raise Refused("prompt and baseline take different ways through this model: DeepLIFT compares one")
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return None
        with torch._C.DisableTorchFunction():
            return secant(part.forward, (args[0], there))[0]

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__":  # x.shape, or weight.T
            out = func(*args, **kwargs)
            return out.detach() if isinstance(out, Tensor) and isinstance(args[0], nn.Parameter) else out
        args, kwargs = tuple(map(_fixed, args)), {k: _fixed(v) for k, v in kwargs.items()}
        rule = RULES.get(name)
        if rule is not None:
            given, there = list(tensors((args, kwargs))), self._baseline(name)
            if [t.shape for t in given] != [t.shape for t in there]:
                raise Refused(
                    f"prompt and baseline take different ways through this model (at {name}): DeepLIFT compares one"
                )
            if torch.is_grad_enabled() and any(t.requires_grad for t in given):
                return rule(self, func, args, kwargs, {id(t): t0 for t, t0 in zip(given, there, strict=True)})
        out = func(*args, **kwargs)
        known = rule is not None or name in STRAIGHT or name in EMPTY or not torch.is_grad_enabled()
        if not known and any(t.requires_grad for t in tensors((args, kwargs))):
            self.uncovered |= {name} if any(t.is_floating_point() for t in tensors(out)) else set()
        return out

    def _baseline(self, name: str) -> list[Tensor]:
        known, there = self.calls[self.next] if self.next < len(self.calls) else ("", [])
        self.next += 1
        if known != name:
            raise Refused(
                f"prompt and baseline take different ways through this model (at {name}): DeepLIFT compares one"
            )
        return there

    # ---- rules: what an operator makes, from its arguments and the baseline's tensors by those of the prompt

    def bent(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        x = args[0] if args else kwargs.pop("input")
        made = secant(lambda z: func(z.clone(), *args[1:], **kwargs), (x.clone(), there[id(x)]))[0]
        return _into(func, x, made)

    def power(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        if len(args) < 2 or isinstance(args[1], Tensor):
            self.uncovered.add("pow")
            return func(*args, **kwargs)
        return self.bent(func, args, kwargs, there)

    def product(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        moving = [t for t in tensors(args) if t.requires_grad]
        if len(moving) < 2:
            return func(*args, **kwargs)
        pairs = [(t, there[id(t)]) for t in tensors(args)]
        if len(pairs) != 2:
            self.uncovered.add(getattr(func, "__name__", ""))
            return func(*args, **kwargs)
        words = [a for a in args if isinstance(a, str)]  # of an einsum
        name = func.__name__.strip("_")
        plain: Function = torch.mul if name in ("imul", "rmul") else getattr(torch, name, func)
        made = multiplied(lambda a, b: plain(*words, a, b, **kwargs), *((t.clone(), t0) for t, t0 in pairs))[0]
        return _into(func, args[0], made)

    def quotient(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        above, below = args[:2] if not func.__name__.startswith("__r") else args[1::-1]
        if not (isinstance(below, Tensor) and below.requires_grad):
            return func(*args, **kwargs)
        inverse = secant(torch.reciprocal, (below, there[id(below)]))
        if not isinstance(above, Tensor):
            return above * inverse[0]
        return _into(func, above, multiplied(torch.mul, (above.clone(), there[id(above)]), inverse)[0])

    def softmax(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        x = args[0] if args else kwargs.pop("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        made = shares((x, there[id(x)]), dim)[0]
        return made.to(kwargs.get("dtype") or x.dtype)

    def log_softmax(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        x = args[0] if args else kwargs.pop("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        return x - log_sum((x, there[id(x)]), dim, True)[0]

    def logsumexp(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        x, dim = args[0], args[1] if len(args) > 1 else kwargs["dim"]
        return log_sum((x, there[id(x)]), dim, kwargs.get("keepdim", len(args) > 2 and args[2]))[0]

    def affine(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        """linear(x, W, b) and the like, whose weights are constants."""
        moving = [t for t in tensors((args[1:], kwargs)) if t.requires_grad]
        if moving:
            self.uncovered.add(func.__name__)
        return func(*args, **kwargs)

    def added_product(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        """addmm(c, a, b) and baddbmm(c, a, b): beta c + alpha a b."""
        factors = ("batch1", "batch2") if func.__name__ == "baddbmm" else ("mat1", "mat2")
        given = {**dict(zip(("input", *factors), args, strict=False)), **kwargs}
        c, a, b = (given[name] for name in ("input", *factors))
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        if not (a.requires_grad and b.requires_grad):
            return func(*args, **kwargs)
        made = alpha * multiplied(torch.matmul, (a, there[id(a)]), (b, there[id(b)]))[0]
        return made + beta * c if beta else made

    def attention(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        """Fused attention, in its parts."""
        given = {
            **dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)),
            **kwargs,
        }
        q, k, v = ((given[n], there[id(given[n])]) for n in ("query", "key", "value"))
        if given.get("enable_gqa"):
            k, v = (tuple(t.repeat_interleave(q[0].shape[-3] // t.shape[-3], -3) for t in x) for x in (k, v))  # type: ignore[assignment]
        scale = given.get("scale") or q[0].shape[-1] ** -0.5
        scores = multiplied(lambda a, b: a @ b.mT * scale, q, k)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            mask = torch.ones(scores[0].shape[-2:], dtype=torch.bool, device=scores[0].device).tril()
        if mask is not None:
            masks = (mask, there.get(id(mask), mask))
            scores = tuple(
                s.masked_fill(~m, torch.finfo(s.dtype).min) if m.dtype == torch.bool else s + m
                for s, m in zip(scores, masks, strict=True)
            )  # type: ignore[assignment]
        return multiplied(torch.matmul, shares(scores, -1), v)[0]

    def layer_norm(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        given = {**dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)), **kwargs}
        x, dims = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
        centred = tuple(t - t.mean(dims, keepdim=True) for t in (x, there[id(x)]))
        made = normed(centred, dims, given.get("eps", 1e-5))  # type: ignore[arg-type]
        made = made if given.get("weight") is None else made * given["weight"]
        return made if given.get("bias") is None else made + given["bias"]

    def rms_norm(self, func: Function, args: Any, kwargs: Any, there: dict[int, Tensor]) -> Any:
        given = {**dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)), **kwargs}
        x, dims = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
        eps = torch.finfo(x.dtype).eps if given.get("eps") is None else given["eps"]
        made = normed((x, there[id(x)]), dims, eps)
        return made if given.get("weight") is None else made * given["weight"]


RULES: dict[str, Function] = {
    **dict.fromkeys(BENT, Rescaled.bent),
    **dict.fromkeys(POWERS, Rescaled.power),
    **dict.fromkeys(MULTIPLYING, Rescaled.product),
    **dict.fromkeys(QUOTIENTS, Rescaled.quotient),
    **dict.fromkeys(("softmax", "_softmax"), Rescaled.softmax),
    **dict.fromkeys(("linear", "conv1d", "conv2d"), Rescaled.affine),
    **dict.fromkeys(("addmm", "baddbmm"), Rescaled.added_product),
    "log_softmax": Rescaled.log_softmax,
    "logsumexp": Rescaled.logsumexp,
    "scaled_dot_product_attention": Rescaled.attention,
    "layer_norm": Rescaled.layer_norm,
    "rms_norm": Rescaled.rms_norm,
}  # fmt: skip


# ---- on pairs


class Chord(torch.autograd.Function):
    """The value y, exactly, with the gradient `slope` towards x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.saved_tensors[0], None, None


def secant(f: Function, pair: Pair) -> Pair:
    """f of both, with the slope of the line between them; where they are (nearly) the same, with that of f halfway."""
    x, x0 = pair
    with torch.enable_grad():
        middle = torch.where(x == x0, x, (x + x0) / 2).detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(middle).sum(), middle)
    with torch.no_grad():
        y, y0 = f(x.detach()), f(x0)
        apart = x.detach() - x0
        close = ~(apart.abs() > SMALL * torch.maximum(x.abs(), x0.abs()))
        slope = torch.where(close, slope, (y - y0) / torch.where(close, 1, apart))
    return Chord.apply(x, y, slope.nan_to_num(0.0)), y0


def multiplied(f: Function, a: Pair, b: Pair) -> Pair:
    """f(a, b), linear in each of them."""
    means = [((t + t0) / 2).detach() for t, t0 in (a, b)]
    value, value0 = f(a[0].detach(), b[0].detach()), f(a[1].detach(), b[1].detach())
    along = f(a[0], means[1]) + f(means[0], b[0])
    return Chord.apply(along, value, along.new_ones(())), value0


def shares(pair: Pair, dim: int) -> Pair:
    """The softmax of both."""
    powers = _exponentials(pair, dim)[0]
    inverse = secant(torch.reciprocal, tuple(t.sum(dim, keepdim=True) for t in powers))  # type: ignore[arg-type]
    made, made0 = multiplied(torch.mul, powers, inverse)
    return made.to(pair[0].dtype), made0.to(pair[0].dtype)


def log_sum(pair: Pair, dim: int, keepdim: bool) -> Pair:
    powers, shift = _exponentials(pair, dim)
    made = secant(torch.log, tuple(t.sum(dim, keepdim=True) for t in powers))  # type: ignore[arg-type]
    kept = tuple((t + shift).to(pair[0].dtype) for t in made)
    return kept if keepdim else tuple(t.squeeze(dim) for t in kept)  # type: ignore[return-value]


def _exponentials(pair: Pair, dim: int) -> tuple[Pair, Tensor]:
    """exp of both, less a shift that they share, in double precision."""
    x, x0 = (t.double() for t in pair)
    shift = torch.maximum(x.detach().amax(dim, keepdim=True), x0.amax(dim, keepdim=True))
    return secant(torch.exp, (x - shift, x0 - shift)), shift


def normed(pair: Pair, dims: tuple[int, ...], eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps)"""
    squares = tuple(t.mean(dims, keepdim=True) + eps for t in secant(torch.square, pair))
    return multiplied(torch.mul, pair, secant(torch.rsqrt, squares))[0]  # type: ignore[arg-type]


def _hooked(parts: Iterable[nn.Module], stack: ExitStack, hook: Function) -> None:
    for part in parts:
        stack.callback(part.register_forward_hook(hook).remove)


def _into(func: Function, x: Any, made: Tensor) -> Tensor:
    """What an operator in place leaves behind."""
    if in_place(func.__name__):
        return x.copy_(made)
    return made


def _fixed(x: Any) -> Any:
    """A parameter as a constant."""
    return x.detach() if isinstance(x, nn.Parameter) else x
