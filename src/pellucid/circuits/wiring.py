"""Where on an unmodified module does each reader take the residual stream in, and how does each source write
to it?

A reader's input can be changed without touching what others read:

    query, key, value of a head   its own columns of the projection's output are computed anew from the
                                  changed stream, through the block's own norm and weights; what follows
                                  (rotary, norms) runs natively
    MLP                           the input of its norm (or of the MLP itself where that shares the
                                  attention's norm)
    logits                        the last residual

Which columns belong to which head is found, not assumed: in a batch with one row per head, the gradient of
head h of row h with respect to the projection's output is nonzero on exactly its columns.
`pellucid.circuits.execution.wire` then proves the wiring on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.structure import Anatomy, Attention, Block, Tap
from pellucid.anatomy.weights import linear_map
from pellucid.anatomy.wiretap import Wiretap
from pellucid.circuits.graph import Embedding, Graph, sequential
from pellucid.engine.frozen import freeze, linearised
from pellucid.engine.stubbed import grow
from pellucid.errors import Refused
from pellucid.model import Model

PLAIN = Layout(TOKENS, TOKENS)


@dataclass(eq=False)
class Norm:
    """What stands between the residual stream and a projection: a norm, whose Jacobian is known in closed
    form.

    norm(x) = gain * c * s + offset,  c = x or x - mean(x),  s = 1 / sqrt(mean(c^2) + eps)
    J^T g   = P(s * gain * g - s^3 * c * mean(c * gain * g)),  P subtracts the mean where c does
    """

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    def pull(self, x: Tensor, g: Tensor) -> Tensor:
        """J^T g at x [batch, position, d] for gradients g [n, batch, position, d]."""
        frozen = freeze(self.module, x)
        if frozen is None:
            return _vjp(self.module, x, g)
        scale = frozen.scale.to(x.dtype)
        c = (x - x.mean(-1, keepdim=True) if frozen.centred else x) * scale
        g = g * frozen.gain.to(x.dtype)
        g -= c * (torch.einsum("nbtd,btd->nbt", g, c) / x.shape[-1])[..., None]
        if frozen.centred:
            g -= g.mean(-1, keepdim=True)
        return g.mul_(scale)


def _vjp(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    with torch.enable_grad():
        wide = x.expand(g.shape).detach().requires_grad_()
        (out,) = torch.autograd.grad(module(wide), wide, g)
    return out


@dataclass(eq=False)
class Reading:
    """A tensor some readers are computed into: the output of a projection, the input of an MLP, or the last
    residual.

    `columns` [reader, e] says which columns of it each reader owns; None: it belongs to one reader alone.
    `early`: the readers read the residual the block was given, and not the tensor at hand.
    """

    tap: Tap
    layer: int
    readers: list[int]
    feeds: int
    early: bool
    prefix: Norm | None = None
    projection: nn.Module | None = None
    columns: Tensor | None = None
    width: int = 0  # d_model
    _cached: tuple[Any, Tensor, Tensor | None] | None = None

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The readers' own columns of the projection: W [reader, d, e] and b [reader, e]; renewed when
        weights change."""
        assert self.projection is not None
        assert self.columns is not None
        stamp = [(p.data_ptr(), p._version) for p in self.projection.parameters()]
        if self._cached is None or self._cached[0] != stamp:
            weight, bias = linear_map(self.projection, self.width)
            own = weight.detach()[:, self.columns].transpose(0, 1).contiguous()
            self._cached = (stamp, own, None if bias is None else bias.detach()[self.columns])
        return self._cached[1:]

    def value(self, x: Tensor, native: Tensor) -> Tensor:
        """`native` as it is when the readers read x [reader, batch, position, d]."""
        if self.prefix is not None:
            x = self.prefix(x)
        if self.columns is None:
            return x[0]
        weight, bias = self.weights()
        made = torch.einsum("nbtd,nde->btne", x, weight.to(x.dtype))
        out = native.clone()
        out[..., self.columns] = (made if bias is None else made + bias).to(out.dtype)
        return out

    def only(self, wanted: Sequence[int]) -> Reading:
        """The same for some of its readers (positions in `readers`)."""
        if self.columns is None or len(wanted) == len(self.readers):
            return self
        weight, bias = self.weights()
        stamp = self._cached[0] if self._cached else None
        index = list(wanted)
        cached = (stamp, weight[index], None if bias is None else bias[index])
        return Reading(
            self.tap, self.layer, [self.readers[i] for i in index], self.feeds, self.early, self.prefix,
            self.projection, self.columns[index], self.width, cached,
        )  # fmt: skip

    def pull(self, g: Tensor, resid: Tensor) -> Tensor:
        """The gradient [reader, batch, position, d] at what each reader reads, from that of `native`."""
        if self.columns is None:
            g = g[None]
        else:
            g = torch.einsum("btne,nde->nbtd", g[..., self.columns], self.weights()[0].to(g.dtype))
        return g if self.prefix is None else self.prefix.pull(resid, g)


@dataclass(eq=False)
class Writing:
    """How the sources of one attention or MLP are read off (at `tap`; `first` is the index of the first of
    them), and where what they add together enters the stream (`adds`, times `coefficient`)."""

    tap: Tap
    adds: Tap
    first: int
    layer: int
    coefficient: float | Tensor
    attention: Attention | None = None
    projection: nn.Module | None = None

    @property
    def count(self) -> int:
        return 1 if self.attention is None else self.attention.heads

    def messages(self, x: Tensor) -> Tensor:
        """[source, batch, position, d] from what is met at the tap."""
        if self.attention is None:
            return (x * self.coefficient)[None]
        assert self.projection is not None
        heads, e = x.shape[-2:]
        weight, bias = linear_map(self.projection, heads * e)
        weight = weight.detach().to(x.dtype)
        parts = torch.einsum("bthe,hed->hbtd", x, weight.unflatten(0, (heads, e)))
        path = self.attention.path
        if path is not None and path.steps:  # a norm after the attention: its scale is held at this run's value
            whole = parts.sum(0) if bias is None else parts.sum(0) + bias
            frozen, _ = linearised(path.steps, path.names, whole.detach())
            parts = frozen(parts) - frozen(torch.zeros_like(parts[0]))
        return parts if isinstance(self.coefficient, float) and self.coefficient == 1.0 else parts * self.coefficient


@dataclass(eq=False)
class Wiring:
    """Every place a pass has to be met at: readings and writings in the order of the pass."""

    model: Model
    graph: Graph
    embeds: list[Tap]
    entries: list[Tap]  # the residual given to each block
    readings: list[Reading]
    writings: list[Writing]
    final: Reading = field(init=False)

    def __post_init__(self) -> None:
        self.final = self.readings[-1]


def find_wiring(model: Model, embedding: Embedding) -> Wiring:
    """The wiring of a model, not proven yet. Refused with the reason where a reader has no input of its
    own."""
    anatomy = model.anatomy
    Graph.of(anatomy)  # refuses before anything runs
    blocks = anatomy.stacks[0].blocks
    calls = _Calls(model.module, anatomy)
    parts = _embedding_parts(model, calls, blocks[0]) if embedding == "parts" else {}
    graph = Graph.of(anatomy, embedding, parts)
    readings: list[Reading] = []
    writings: list[Writing] = []
    first = max(1, len(parts))
    for block in blocks:
        terms = {t.source: t.coefficient for t in block.states[0].terms}
        readings += _attention_readings(graph, calls, block)
        attention = block.attentions["attn"]
        if attention.o_proj is None or attention.path is None:
            raise Refused(f"the heads of layer {block.index} do not write to the residual independently")
        o_proj = model.module.get_submodule(attention.o_proj)
        tap = block.taps["attn.z_out"]
        writings.append(Writing(tap, block.taps["attn.out"], first, block.index, terms["attn.out"], attention, o_proj))
        first += attention.heads
        if "mlp.out" in block.taps:
            readings.append(_mlp_reading(graph, calls, block, readings[-1]))
            writings.append(Writing(block.taps["mlp.out"], block.taps["mlp.out"], first, block.index, terms["mlp.out"]))
            first += 1
    last = len(graph.readers) - 1
    readings.append(Reading(blocks[-1].taps["resid_post"], len(blocks), [last], first, early=False))
    embeds = [Tap(name, "out", PLAIN) for name in parts.values()] or [blocks[0].taps["resid_pre"]]
    entries = [b.taps["resid_pre"] for b in blocks]
    return Wiring(model, graph, embeds, entries, readings, writings)


# ---- what is found by running the probe once


@dataclass(eq=False)
class Call:
    name: str
    module: nn.Module
    key: int | str
    given: Tensor
    made: Tensor | None = None


class _Calls:
    """One forward pass of the probe's first row, once per head, with every module call that maps a tensor to
    a tensor."""

    def __init__(self, module: nn.Module, anatomy: Anatomy) -> None:
        blocks = anatomy.stacks[0].blocks
        self.rows = max(b.attentions["attn"].heads for b in blocks)
        inputs = {
            k: grow(v[:1], self.rows, 1) if isinstance(v, Tensor) and v.ndim else v for k, v in anatomy.inputs.items()
        }
        self.calls: list[Call] = []
        self.ports: dict[Tap, Tensor] = {}
        taps = [b.taps[p] for b in blocks for p in ("attn.q", "attn.k", "attn.v", "resid_pre") if p in b.taps]
        hooks: list[Any] = []
        for name, m in module.named_modules():
            hooks.append(m.register_forward_pre_hook(self._before(name), with_kwargs=True))
            hooks.append(m.register_forward_hook(self._after, with_kwargs=True))
        self._open: list[Call | None] = []
        try:
            with torch.enable_grad(), Wiretap(module, {t: self._keep(t) for t in taps}, self.rows):
                module(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        names = [c.name for c in self.calls]
        self.repeated = {n for n in names if names.count(n) > 1}

    def _keep(self, tap: Tap) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            self.ports[tap] = x

        return keep

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            given = [(k, v) for k, v in every if isinstance(v, Tensor)]
            call = Call(name, module, given[0][0], given[0][1]) if given else None
            self._open.append(call)
            if call is not None:
                self.calls.append(call)

        return hook

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._open.pop()
        if call is not None and isinstance(output, Tensor):
            call.made = output

    def within(self, block: Block) -> list[Call]:
        return [c for c in self.calls if c.name.startswith(f"{block.module}.")]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape)


def _resid(calls: _Calls, block: Block) -> Tensor:
    tap = block.taps["resid_pre"]
    if tap.layout != PLAIN or tap not in calls.ports:
        raise Refused(f"circuits need the residual of layer {block.index} as [batch, position, d_model]")
    return calls.ports[tap]


def _attention_readings(graph: Graph, calls: _Calls, block: Block) -> list[Reading]:
    """The projections of one attention, with the columns of every head's query, key and value."""
    resid, here = _resid(calls, block), calls.within(block)
    linear = [
        c for c in here
        if c.made is not None and c.made.requires_grad and c.made.ndim == 3 and not list(c.module.children())
        and not isinstance(c.module, nn.Embedding)
        and getattr(getattr(c.module, "weight", None), "ndim", 0) >= 2
    ]  # fmt: skip
    found: dict[str, Reading] = {}
    taken: dict[str, Tensor] = {}
    feeds = next(r.feeds for r in graph.readers if r.layer == block.index)
    for port in "qkv":
        call, columns = _columns(calls, block, port, linear)
        prefix = _prefix(here, resid, call)
        mine = torch.zeros(call.made.shape[-1], dtype=torch.long)  # type: ignore[union-attr]
        taken[call.name] = taken.get(call.name, mine) + mine.index_fill(0, columns.flatten(), 1)
        readers = [i for i, r in enumerate(graph.readers) if (r.layer, r.kind) == (block.index, port)]
        old = found.get(call.name)
        if old is not None and old.columns is not None and old.columns.shape[1] == columns.shape[1]:
            readers, columns = old.readers + readers, torch.cat([old.columns, columns])
        elif old is not None:
            raise Refused(f"queries, keys and values of layer {block.index} have unequal widths in one projection")
        tap = Tap(call.name, "out", PLAIN)
        found[call.name] = Reading(
            tap, block.index, readers, feeds, True, prefix, call.module, columns, width=resid.shape[-1]
        )
    if any(int(t.max()) > 1 for t in taken.values()) or calls.repeated & set(found):
        raise Refused(f"the heads of layer {block.index} share columns of a projection: their inputs cannot be parted")
    return list(found.values())


def _columns(calls: _Calls, block: Block, port: str, linear: list[Call]) -> tuple[Call, Tensor]:
    """The projection behind a port, and [head, e] its columns of each head."""
    x = calls.ports.get(block.taps.get(f"attn.{port}", block.taps["resid_pre"]))
    what = {"q": "queries", "k": "keys", "v": "values"}[port]
    if x is None or x.ndim != 4:
        raise Refused(f"the {what} of layer {block.index} are not on the map of this model")
    heads = x.shape[2]
    rows = torch.arange(heads, device=x.device)
    own = x[rows, :, rows]  # row h, head h: [head, position, e]
    noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)).to(own) + 0.5
    outputs = [c.made for c in linear if c.made is not None]
    grads = torch.autograd.grad((own * noise).sum(), outputs, allow_unused=True, retain_graph=True)
    resid = _resid(calls, block)
    for call, grad in zip(linear, grads, strict=True):
        if grad is None or call.given.shape != resid.shape:
            continue
        reached = (grad != 0).any(1)[:heads]  # [head, column]
        sizes = reached.sum(1)
        if _prefixed(calls.within(block), resid, call) and int(sizes.min()) == int(sizes.max()) > 0:
            if int(reached.sum(0).max()) == 1:
                return call, reached.nonzero()[:, 1].reshape(heads, -1)
            break
    raise Refused(
        f"the {what} of layer {block.index} are no columns of one projection of the residual (several steps, "
        "or a norm across heads, stand between), so each head's input cannot be changed alone"
    )


def _prefixed(here: list[Call], resid: Tensor, call: Call) -> bool:
    return _same(call.given, resid) or _norm_before(here, resid, call) is not None


def _norm_before(here: list[Call], resid: Tensor, call: Call) -> Call | None:
    return next((c for c in here if _same(c.given, resid) and c.made is not None and _same(c.made, call.given)), None)


def _prefix(here: list[Call], resid: Tensor, call: Call) -> Norm | None:
    norm = None if _same(call.given, resid) else _norm_before(here, resid, call)
    return None if norm is None else Norm(norm.module)


def _mlp_reading(graph: Graph, calls: _Calls, block: Block, attention: Reading) -> Reading:
    """Where the MLP alone can be given another stream."""
    (reader,) = (i for i, r in enumerate(graph.readers) if (r.layer, r.kind) == (block.index, "mlp"))
    feeds = graph.readers[reader].feeds
    if sequential(block):
        tap = block.taps["resid_mid"]
        if tap.port != "in":
            raise Refused(f"the MLP of layer {block.index} has no input of its own to edit")
        return Reading(tap, block.index, [reader], feeds, early=False)
    resid, here = _resid(calls, block), calls.within(block)
    shared = {id(c.given) for c in here if c.name == attention.tap.module}  # what the attention's projections read
    attend = {a.module for a in block.attentions.values()} | {attention.tap.module}
    inner = [c for c in here if not any(f"{m}.".startswith(f"{c.name}.") or c.name.startswith(f"{m}.") for m in attend)]
    for c in inner:
        if _same(c.given, resid) and (c.made is None or id(c.made) not in shared):
            return Reading(Tap(c.name, "in", PLAIN, c.key), block.index, [reader], feeds, early=False)
    for c in inner:
        norm = _norm_before(here, resid, c)
        if norm is not None:
            return Reading(Tap(c.name, "in", PLAIN, c.key), block.index, [reader], feeds, True, Norm(norm.module))
    raise Refused(f"the MLP of layer {block.index} has no input of its own to edit")


def _embedding_parts(model: Model, calls: _Calls, first: Block) -> dict[str, str]:
    """`tokens` and `positions` -> module, where their sum is what enters the first block."""
    tables = [c for c in calls.calls if isinstance(c.module, nn.Embedding) and c.made is not None]
    resid = _resid(calls, first)
    total = sum(c.made for c in tables if c.made is not None) if tables else None
    if len(tables) < 2 or not isinstance(total, Tensor) or not torch.allclose(total.expand_as(resid), resid, atol=1e-5):
        raise Refused("what enters the first block is not a sum of embedding tables: use embedding='whole'")
    words = model.module.get_input_embeddings()  # type: ignore[operator]
    names = [
        "tokens" if c.module is words else "positions" if len(tables) == 2 else c.name.rpartition(".")[2]
        for c in tables
    ]
    return dict(zip(names, (c.name for c in tables), strict=True))
