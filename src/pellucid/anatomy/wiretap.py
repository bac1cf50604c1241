"""Meeting tensors during a forward pass: handlers on taps, put up for one run in one thread and taken down
after it.

A handler gets the tensor in canonical order and returns a replacement, or None to leave it as it is. Modules
carry our hooks only while the run lasts, the hooks answer only to the thread that put them up, and attention
runs its native fused kernel unless somebody wants its scores or pattern.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pellucid.anatomy.experts import EXPERT_PORTS, routed
from pellucid.anatomy.interfaces import listening
from pellucid.anatomy.modes import uncompiled
from pellucid.anatomy.structure import ATTENTION_PORTS, Tap
from pellucid.anatomy.trace import CONTRACTIONS, UNFRAMED, counts, in_place, put, results, take
from pellucid.errors import Refused

Handler = Callable[[Tensor], Tensor | None]


class Wiretap:
    """Context manager that installs `handlers` on `root` for the calling thread. `met` collects the taps that
    fired.

    A pass begins where `runs` is called: `root` itself, or the part of it that a loop calls instead (generation of a model
    inside an adapter's). `on_forward` hears of it with its keyword arguments.
    """

    def __init__(
        self,
        root: nn.Module,
        handlers: dict[Tap, Handler],
        batch: int,
        on_forward: Callable[[dict[str, Any]], None] | None = None,
        runs: nn.Module | None = None,
    ) -> None:
        self.root, self.handlers, self.batch, self.on_forward = root, handlers, batch, on_forward
        self.runs = root if runs is None else runs
        self.met: set[Tap] = set()
        self._owner: int | None = threading.get_ident()
        self._times: dict[tuple[str, str], int] = {}
        self._attention: dict[nn.Module, dict[tuple[int, str], Tap]] = {}
        self._experts: dict[nn.Module, dict[tuple[int, str, int | None], Tap]] = {}
        self._unseen: Callable[[], Any] = nullcontext  # what runs inside an interface does not count as an operation
        self._stack = ExitStack()

    # ---- going up and coming down

    def __enter__(self) -> Wiretap:
        modules = dict(self.root.named_modules())
        plain: dict[tuple[str, str], list[Tap]] = {}
        by_operators: dict[str, list[Tap]] = {}
        for tap in self.handlers:
            if tap.port in ("in", "out"):
                plain.setdefault((tap.module, tap.port), []).append(tap)
            elif tap.ops is not None:
                by_operators.setdefault(tap.module, []).append(tap)
            elif tap.port in EXPERT_PORTS:
                self._experts.setdefault(modules[tap.module], {})[tap.nth, tap.port, tap.unit] = tap
            else:
                self._attention.setdefault(modules[tap.module], {})[tap.nth, tap.port] = tap
        try:
            self._stack.enter_context(uncompiled(self.root))
            self._hook(self.runs.register_forward_pre_hook(self._restart, with_kwargs=True))
            for (name, port), taps in plain.items():
                if port == "in":
                    self._hook(modules[name].register_forward_pre_hook(self._before(name, taps), with_kwargs=True))
                else:
                    self._hook(modules[name].register_forward_hook(self._after(name, taps), with_kwargs=True))
            if self._attention or self._experts or by_operators:
                self._stack.enter_context(listening(self))
            if by_operators:
                operators = self._stack.enter_context(OperatorTap(self, modules, by_operators))
                self._unseen = operators.apart
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def _hook(self, handle: RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """What the module is asked in here is not met: somebody runs it in between."""
        owner, self._owner = self._owner, None
        try:
            yield
        finally:
            self._owner = owner

    # ---- module inputs and outputs
    # Hooks look at the thread first: in another one torch may call a hook that was just taken down, without kwargs.

    def _restart(self, module: nn.Module, *given: Any) -> None:
        if threading.get_ident() == self._owner:
            self._times.clear()
            if self.on_forward is not None:
                self.on_forward(given[1])

    def nth(self, name: str, port: str) -> int:
        n = self._times.get((name, port), 0)
        self._times[name, port] = n + 1
        return n

    def meet(self, tap: Tap, tensor: Tensor) -> Tensor:
        """Show a native tensor to its handler and return what the model goes on with."""
        self.met.add(tap)
        with torch._C.DisableTorchFunction(), self.asleep():  # a module that a handler calls is not met
            new = self.handlers[tap](tap.layout.read(tensor, self.batch))
            if new is None:
                return tensor
            made = tap.layout.write(new).to(tensor.dtype)
            # kernels of quantised layers read memory as it was laid out, whatever the strides say
            return made.contiguous() if tensor.is_contiguous() else made

    def _before(self, name: str, taps: list[Tap]) -> Any:
        def hook(module: nn.Module, *given: Any) -> Any:
            if threading.get_ident() != self._owner:
                return None
            args, kwargs = given
            n = self.nth(name, "in")
            changed = False
            for tap in taps:
                if tap.nth != n:
                    continue
                old = args[tap.key] if isinstance(tap.key, int) else kwargs[tap.key]
                new = self.meet(tap, old)
                if new is not old:
                    changed = True
                    if isinstance(tap.key, int):
                        args = (*args[: tap.key], new, *args[tap.key + 1 :])
                    else:
                        kwargs = {**kwargs, tap.key: new}
            return (args, kwargs) if changed else None

        return hook

    def _after(self, name: str, taps: list[Tap]) -> Any:
        def hook(module: nn.Module, *given: Any) -> Any:
            if threading.get_ident() != self._owner:
                return None
            output = given[-1]
            n = self.nth(name, "out")
            changed = False
            for tap in taps:
                if tap.nth != n:
                    continue
                old = take(output, tap.key)
                new = self.meet(tap, old)
                if new is not old:
                    changed = True
                    output = put(output, tap.key, new)
            return output if changed else None

        return hook

    # ---- attention through the interface

    def attention(
        self,
        native: Callable[..., Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        **kw: Any,
    ) -> tuple[Tensor, Tensor | None]:
        taps = self._attention.get(module) if self._owner is not None else None
        if taps is None:
            with self._unseen():
                return native(module, q, k, v, mask, **kw)
        n = self.nth(f"{id(module)}", "attention")

        def meet(port: str, x: Tensor) -> Tensor:
            tap = taps.get((n, port))
            return x if tap is None else self.meet(tap, x)

        q, k, v = meet("q", q), meet("k", k), meet("v", v)
        with self._unseen():
            if (n, "scores") in taps or (n, "pattern") in taps:
                z, pattern = explicit_attention(module, q, k, v, mask, meet, **kw)
            else:
                z, pattern = native(module, q, k, v, mask, **kw)
        return meet("z", z), pattern

    # ---- experts through the interface

    def experts(
        self,
        native: Callable[..., Any],
        module: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        taps = self._experts.get(module) if self._owner is not None else None
        if taps is None:
            with self._unseen():
                return native(module, hidden_states, top_k_index, top_k_weights)
        n = self.nth(f"{id(module)}", "experts")

        def meet(port: str, unit: int | None, x: Tensor) -> Tensor:
            tap = taps.get((n, port, unit))
            return x if tap is None else self.meet(tap, x)

        wanted = {unit for nth, _, unit in taps if nth == n and unit is not None}
        with self._unseen():
            return routed(module, hidden_states, top_k_index, top_k_weights, meet, wanted)


def explicit_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    meet: Callable[[str, Tensor], Tensor],
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling) v, step by step: softcap, bias, mask, sinks; softmax in float32 (float64 if
    given).

    Shapes: q [batch, head, query, e], k and v [batch, kv_head, key, e]; returns z [batch, query, head, e] and
    the pattern [batch, head, query, key].
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    lowest = torch.finfo(scores.dtype).min
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(mask, Tensor):
        if mask.ndim != 4:
            raise Refused(
                f"scores and patterns need a 4-D attention mask, but this attention gives {mask.ndim}-D; "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )
        mask = mask[..., : k.shape[-2]]
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    elif causal and scores.shape[-2] > 1:  # no mask means causal, aligned to the upper left as the fused kernel does
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, lowest)
    scores = meet("scores", scores)
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    sink = next((s for s in (s_aux, sinks, getattr(module, "sinks", None)) if s is not None), None)
    if sink is None:
        pattern = torch.softmax(scores, -1, dtype=wide)
    else:
        column = sink.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], 1) if sink.ndim == 1 else sink
        pattern = torch.softmax(torch.cat([scores, column.to(scores.dtype)], -1), -1, dtype=wide)[..., :-1]
    pattern = meet("pattern", pattern.to(v.dtype))
    if dropout and module.training:
        pattern = F.dropout(pattern, dropout)
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


_COUNTED = "contractions and softmaxes"


class OperatorTap(TorchFunctionMode):
    """The same ports for families with attention code of their own: the n-th contraction of the module is
    QK^T, ...
    """

    def __init__(self, wire: Wiretap, modules: dict[str, nn.Module], taps: dict[str, list[Tap]]) -> None:
        super().__init__()
        self.wire, self.modules, self.taps = wire, modules, taps
        # tapped module (None: another), which call of it, operations so far
        self._frames: list[tuple[str | None, int, Counter[str]]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> OperatorTap:
        inner = (m for name in self.taps for m in self.modules[name].modules())
        watched: dict[nn.Module, str | None] = {m: None for m in inner if type(m).__name__ not in UNFRAMED}
        watched |= {self.modules[name]: name for name in self.taps}
        for module, name in watched.items():
            self._hooks.append(module.register_forward_pre_hook(self._push(name)))
            self._hooks.append(module.register_forward_hook(self._pop, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Operations in here are nobody's (other modes of torch still see them)."""
        self._frames.append((None, 0, Counter()))
        try:
            yield
        finally:
            self._frames.pop()

    def _push(self, name: str | None) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == self.wire._owner:
                nth = 0 if name is None else self.wire.nth(name, "operators")
                self._frames.append((name, nth, Counter()))

        return hook

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self.wire._owner and self._frames:
            self._frames.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self._frames:
            return func(*args, **kwargs)
        module, nth, done = self._frames[-1]
        done[name] += 1
        done[_COUNTED] += counts(name)
        taps = () if module is None else self.taps.get(module, ())
        mine = [t for t in taps if t.nth == nth and t.ops is not None]
        for tap in mine:
            if tap.port == "op" and tap.key == name and tap.ops == (done[name],):
                return self._any(tap, func, args, kwargs)
        step = done[_COUNTED]
        attending = [t for t in mine if t.port != "op"] if counts(name) else []
        here = [t for t in attending if t.ops is not None and step in t.ops]
        if not here:
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._fused({t.port: t for t in here}, func, args, kwargs)
        step = here[0].ops.index(step)  # type: ignore[union-attr]
        known = (("q", "k"), ("scores", "pattern"), ("v", "z"))[step]
        ports = {t.port: t for t in here if t.port in known}

        def meet(port: str, x: Tensor) -> Tensor:
            return self.wire.meet(ports[port], x) if port in ports else x

        if step == 1:
            args, kwargs = _replace(name, args, kwargs, lambda xs: [meet("scores", xs[0])])
            return meet("pattern", func(*args, **kwargs))
        turned = name != "einsum"
        if step == 0:
            keys = (lambda x: meet("k", x.transpose(-1, -2)).transpose(-1, -2)) if turned else (lambda x: meet("k", x))
            args, kwargs = _replace(name, args, kwargs, lambda xs: [meet("q", xs[0]), keys(xs[1])])
            return func(*args, **kwargs)
        args, kwargs = _replace(name, args, kwargs, lambda xs: [xs[0], meet("v", xs[1])])
        return meet("z", func(*args, **kwargs))

    def _any(self, tap: Tap, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The result of any operation; one that works in place keeps working in place."""
        old = func(*args, **kwargs)
        old = args[0] if old is None else old  # x[i] = y returns nothing: it made x
        new = self.wire.meet(tap, old)
        return old if new is old else old.copy_(new) if in_place(str(tap.key)) else new

    def _fused(self, mine: dict[str, Tap], func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """torch's fused attention: step by step only if its scores or pattern are wanted."""

        def meet(port: str, x: Tensor) -> Tensor:
            return self.wire.meet(mine[port], x) if port in mine else x

        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, port in (("query", "q"), ("key", "k"), ("value", "v")):
            given[name] = meet(port, given[name])
        if "scores" not in mine and "pattern" not in mine:
            return meet("z", func(**given))
        z, _ = explicit_attention(
            self.wire.root, given["query"], given["key"], given["value"], given.get("attn_mask"), meet,
            scaling=given.get("scale"), is_causal=bool(given.get("is_causal")),
        )  # fmt: skip
        return meet("z", z.transpose(1, 2))


def _replace(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], change: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with its operands changed, whatever the calling convention of the operation."""
    if name == "einsum" and isinstance(args[1], (list, tuple)):
        return (args[0], tuple(change(list(args[1])))), kwargs
    if name == "baddbmm" and "batch1" in kwargs:
        a, b = change([kwargs["batch1"], kwargs["batch2"]])
        return args, {**kwargs, "batch1": a, "batch2": b}
    if not args:
        return args, {**kwargs, "input": change([kwargs["input"]])[0]}
    first = 1 if name in ("einsum", "baddbmm") else 0
    n = 2 if name in CONTRACTIONS else 1
    new = change(list(args[first : first + n]))
    return (*args[:first], *new, *args[first + n :]), kwargs


def tapped(
    root: nn.Module, taps: Iterable[Tap], batch: int, forward: Callable[[], Any]
) -> tuple[dict[Tap, Tensor], Any]:
    """Run `forward` and return the canonical tensors met at `taps` (detached copies) and its output."""
    kept: dict[Tap, Tensor] = {}

    def keeper(tap: Tap) -> Handler:
        def keep(x: Tensor) -> None:
            kept[tap] = x.detach().clone()

        return keep

    with torch.no_grad(), Wiretap(root, {t: keeper(t) for t in taps}, batch):
        output = forward()
    return kept, output


__all__ = ["ATTENTION_PORTS", "OperatorTap", "Wiretap", "explicit_attention", "results", "tapped"]
