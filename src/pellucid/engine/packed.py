"""Many edited runs as one growing batch of tokens, on the family's own blocks.

Every operation of a block but attention works on each position alone, so the tokens of many variants can be packed
into one row, [1, tokens, d]. A variant joins at the first block it edits, with the clean residual, and where attention
is causal only with the positions from its first edited one on. In attention the variants stand apart again: their
queries meet their own keys behind the clean run's keys of the positions they skip, under the clean run's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.interfaces import listening
from pellucid.anatomy.layout import HEADS, PATTERN, Layout
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.structure import Block, Stack, Tap
from pellucid.anatomy.trace import take
from pellucid.anatomy.wiretap import Wiretap, explicit_attention
from pellucid.engine.inputs import Inputs
from pellucid.engine.recording import AttentionCall, Recording, Shapes
from pellucid.engine.writing import Window, Written
from pellucid.errors import SiteError

FEW, SHORT, WASTE = 2, 64, 3  # groups, columns, and times its tokens, up to which a batch attends as whole rows


@dataclass(frozen=True, eq=False)
class Variant:
    """One set of edits, where it enters (block) and from which column on it differs from the clean run."""

    index: int
    writers: list[Written]
    layer: int
    start: int


@dataclass(eq=False)
class Group:
    """The variants that start at the same column: hidden [variants, batch, length - start, d]."""

    start: int
    variants: list[Variant]
    hidden: Tensor


class PackedPass(Wiretap):
    """Runs variants through the stack's blocks. `shapes` says which block arguments are per position."""

    def __init__(self, anatomy: Anatomy, inputs: Inputs, recording: Recording, shapes: Shapes) -> None:
        self.inputs, self.recording, self.shapes = inputs, recording, shapes
        self.stack_map: Stack = recording.stack
        self.rows, self.length = inputs.stream(recording.stack.name).ids.shape
        blocks = self.stack_map.blocks
        self.modules = {b.module: anatomy.module.get_submodule(b.module) for b in blocks}
        self.masks: dict[tuple[int, torch.device], Tensor] = {}  # of causal attention that was given none, by start
        self.parts = {anatomy.module.get_submodule(a.module): a.part for b in blocks for a in b.attentions.values()}
        super().__init__(anatomy.module, {}, batch=1)

    # ---- the pass

    def final(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Tensor]]:
        """Each variant with its last residual [batch, length - start, d]."""
        self.writers: dict[Tap, list[tuple[Variant, Written]]] = {}
        for v in variants:
            for w in v.writers:
                for tap in w.taps:
                    self.writers.setdefault(tap, []).append((v, w))
        self.handlers = {tap: self._handler(tap) for tap in self.writers}
        self.groups: list[Group] = []
        with self:
            for layer, block in enumerate(self.stack_map.blocks):
                self._join(layer, [v for v in variants if v.layer == layer])
                if self.groups:
                    self._block(layer, block)
        missed = next((writers[0][1] for tap, writers in self.writers.items() if tap not in self.met), None)
        if missed is not None:
            raise SiteError(f"the edit on {str(missed.spot.site)!r} never fired: the run did not pass through it")
        groups, self.groups, self.handlers = self.groups, [], {}  # a handler knows this pass: none may hold its tensors
        for group in groups:
            yield from zip(group.variants, group.hidden, strict=True)

    def _join(self, layer: int, new: list[Variant]) -> None:
        hidden = self.recording.calls[layer].hidden
        for start in sorted({v.start for v in new}):
            joining = [v for v in new if v.start == start]
            rows = hidden[:, start:].expand(len(joining), -1, -1, -1)
            group = next((g for g in self.groups if g.start == start), None)
            if group is None:
                self.groups.append(Group(start, joining, rows))
            else:
                group.variants += joining
                group.hidden = torch.cat([group.hidden.to(rows.device), rows])

    def _block(self, layer: int, block: Block) -> None:
        self.block, self.attended = block, 0
        self.times: dict[tuple[str, str], int] = {}
        self.spans: dict[Variant, slice] = {}
        at = 0
        self.slices: list[slice] = []
        for group in self.groups:
            size = self.rows * (self.length - group.start)
            self.slices.append(slice(at, at + size * len(group.variants)))
            for v in group.variants:
                self.spans[v] = slice(at, at + size)
                at += size
        call = self.recording.calls[layer]
        packed = torch.cat([g.hidden.reshape(-1, g.hidden.shape[-1]).to(call.hidden.device) for g in self.groups])[None]
        row, column = self._coordinates(packed.device)
        self.columns = column
        key = block.taps["resid_pre"].key

        def look_up(x: Tensor, batch: int | None, length: int) -> Tensor:
            return _per_token(x, batch, length, row, column)

        args = tuple(packed if i == key else self.shapes.cut(a, (layer, i), look_up) for i, a in enumerate(call.args))
        kwargs = {k: packed if k == key else self.shapes.cut(v, (layer, k), look_up) for k, v in call.kwargs.items()}
        self.attention_calls = call.attention
        output = take(self.modules[block.module](*args, **kwargs), block.taps["resid_post"].key)
        for group, where in zip(self.groups, self.slices, strict=True):
            group.hidden = output[0, where].view(len(group.variants), self.rows, self.length - group.start, -1)

    def _coordinates(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The batch row and the column of every packed token."""
        rows, columns = [], []
        for g in self.groups:
            n = self.length - g.start
            column = torch.arange(g.start, self.length, device=device)
            columns.append(column.repeat(len(g.variants) * self.rows))
            row = torch.arange(self.rows, device=device).repeat_interleave(n)
            rows.append(row.repeat(len(g.variants)))
        return torch.cat(rows), torch.cat(columns)

    # ---- edits

    def nth(self, name: str, port: str) -> int:
        """Which call of a module this is in a whole forward pass: shared blocks call it once in every earlier call."""
        n = self.times.get((name, port), 0)
        self.times[name, port] = n + 1
        return self.block.nth + n

    def _handler(self, tap: Tap) -> Callable[[Tensor], Tensor | None]:
        def handler(x: Tensor) -> Tensor | None:
            x = x.clone()
            for v, w in self.writers[tap]:
                where = self.spans.get(v)
                if where is not None:
                    part = x[0, where].unflatten(0, (self.rows, self.length - v.start))
                    made = w.meet(tap, part, Window.on(self.inputs, w.spot, v.start), inside=True)
                    if made is not part:
                        x[0, where] = made.flatten(0, 1)
            return x

        return handler

    # ---- attention

    def __enter__(self) -> PackedPass:
        super().__enter__()
        self._stack.enter_context(listening(self))
        return self

    def attention(
        self, native: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        recorded = self.attention_calls[self.attended]
        self.attended += 1
        name = self.parts[module]
        taps = {p: self.block.taps.get(f"{name}.{p}") for p in ("q", "k", "v", "scores", "pattern", "z")}
        kw = {key: value for key, value in kw.items() if not isinstance(value, Tensor)}
        kw |= {key: value for key, value in recorded.kwargs.items() if isinstance(value, Tensor)}
        cross = name.startswith("cross")
        if not cross and not any(tap in self.writers for tap in taps.values() if tap is not None) and self._alike:
            return self._at_once(native, module, q, k, v, recorded, kw), None
        made = []
        for group, where in zip(self.groups, self.slices, strict=True):
            keys, values = (
                (self._repeat(recorded.k, group), self._repeat(recorded.v, group))
                if cross
                else (self._rows(k, where, group), self._rows(v, where, group))
            )
            z = self._attend(
                native, module, group, self._rows(q, where, group), keys, values, recorded, taps, kw, cross
            )
            made.append(z.reshape(1, -1, *z.shape[2:]))
        return torch.cat(made, 1), None

    @property
    def _alike(self) -> bool:
        """Whether short variants that begin in many places are quicker together, each with all its columns."""
        tokens, rows = self.slices[-1].stop, self.rows * sum(len(group.variants) for group in self.groups)
        return len(self.groups) > FEW and self.length <= SHORT and rows * self.length <= WASTE * tokens

    def _at_once(
        self, native: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        recorded: AttentionCall, kw: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """All variants as rows of all columns: the clean run's keys, and queries of nothing, where a variant has not begun."""
        every = Group(0, [variant for group in self.groups for variant in group.variants], q)
        rows, at = [], 0
        for group in self.groups:
            n = len(group.variants) * self.rows
            rows.append(torch.arange(at, at + n, device=q.device).repeat_interleave(self.length - group.start))
            at += n
        row, column = torch.cat(rows), self.columns.to(q.device)

        def spread(x: Tensor, into: Tensor) -> Tensor:
            into[row, :, column] = x[0].transpose(0, 1)
            return into

        queries = spread(q, q.new_zeros(at, q.shape[1], self.length, q.shape[3]))
        n = len(every.variants)  # more than one, so that what is repeated is a copy
        keys, values = (spread(x, clean.repeat(n, 1, 1, 1)) for x, clean in ((k, recorded.k), (v, recorded.v)))
        kw = {key: self._from(value, every) if isinstance(value, Tensor) else value for key, value in kw.items()}
        mask = self._from(recorded.mask, every) if isinstance(recorded.mask, Tensor) else recorded.mask
        z: Tensor = native(module, queries, keys, values, mask, **kw)[0]
        return z[row, column][None]

    def _rows(self, x: Tensor, where: slice, group: Group) -> Tensor:
        """[1, head, tokens, e] -> [variants * batch, head, length - start, e]"""
        return x[0, :, where].unflatten(1, (-1, self.length - group.start)).transpose(0, 1)

    def _repeat(self, x: Tensor, group: Group, view: bool = False) -> Tensor:
        """Once for every variant; a view where one prompt's can be, and it is read only once."""
        n = len(group.variants)
        if n == 1:
            return x
        return x.expand(n, *x.shape[1:]) if view and len(x) == 1 else x.repeat(n, *[1] * (x.ndim - 1))

    def _attend(
        self, native: Callable[..., Any], module: nn.Module, group: Group, q: Tensor, k: Tensor, v: Tensor,
        recorded: AttentionCall, taps: dict[str, Tap | None], kw: dict[str, Any], cross: bool,
    ) -> Tensor:  # fmt: skip
        start = group.start

        def meet(port: str, x: Tensor) -> Tensor:
            """Show [variants * batch, ...] to the edits of this group's variants on that port."""
            tap = taps[port]
            if tap is None or tap not in self.writers:
                return x
            self.met.add(tap)
            mine = {id(variant): i for i, variant in enumerate(group.variants)}
            here = [(mine[id(owner)], w) for owner, w in self.writers[tap] if id(owner) in mine]
            if not here:
                return x
            x = x.clone()
            layout = Layout("b h p e", HEADS) if port in "qkv" else PLAIN[port]
            for i, w in here:
                rows = slice(i * self.rows, (i + 1) * self.rows)
                window = Window.on(self.inputs, w.spot, 0 if cross and port in "kv" else start)
                x[rows] = layout.write(w.meet(tap, layout.read(x[rows], self.rows), window))
            return x

        q, k, v = meet("q", q), meet("k", k), meet("v", v)
        if start and not cross:
            k = torch.cat([self._repeat(recorded.k[:, :, :start], group, view=True), k], 2)
            v = torch.cat([self._repeat(recorded.v[:, :, :start], group, view=True), v], 2)
        kw = {key: self._from(value, group) if isinstance(value, Tensor) else value for key, value in kw.items()}
        mask = recorded.mask
        if isinstance(mask, Tensor):
            mask = self._from(mask, group)
        elif start and not cross and q.shape[2] > 1:
            causal = kw.get("is_causal")
            if getattr(module, "is_causal", True) if causal is None else causal:
                if (start, q.device) not in self.masks:
                    size = (q.shape[2], k.shape[2])
                    self.masks[start, q.device] = torch.ones(size, dtype=torch.bool, device=q.device).tril(start)[
                        None, None
                    ]
                mask = self.masks[start, q.device]
        edited = [taps[p] for p in ("scores", "pattern")]
        if any(t in self.writers for t in edited if t is not None):
            z, _ = explicit_attention(module, q, k, v, mask, meet, **kw)
        else:
            z, _ = native(module, q, k, v, mask, **kw)
        return meet("z", z)

    def _from(self, x: Tensor, group: Group) -> Tensor:
        """A mask or bias [batch or 1, head or 1, query, key] from the group's start on, for all its variants."""
        if x.ndim == 4 and x.shape[2] == self.length:
            x = x[:, :, group.start :]
        return self._repeat(x, group) if x.ndim == 4 and len(x) == self.rows > 1 else x


def _per_token(x: Tensor, batch: int | None, length: int, row: Tensor, column: Tensor) -> Tensor:
    """Values by batch row (if there is an axis for it) and column, looked up for every packed token."""
    row, column = row.to(x.device), column.to(x.device)
    if batch is None:
        return x.index_select(length, column)
    x = x.movedim((batch, length), (0, 1))
    x = x[row if len(x) > 1 else 0, column][None]
    return x.movedim((0, 1), (batch, length))


PLAIN = {"z": Layout(HEADS, HEADS), "scores": Layout(PATTERN, PATTERN), "pattern": Layout(PATTERN, PATTERN)}
