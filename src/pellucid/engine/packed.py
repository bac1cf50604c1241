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
from pellucid.anatomy.structure import Anatomy, Block, Stack, Tap
from pellucid.anatomy.trace import take
from pellucid.anatomy.wiretap import Wiretap, explicit_attention
from pellucid.engine.applying import Window
from pellucid.engine.inputs import Inputs
from pellucid.engine.recording import AttentionCall, Recording
from pellucid.engine.run import Written


@dataclass(eq=False)
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


class Packed(Wiretap):
    """Runs variants through the stack's blocks; `logits_rows` of the result are read by the sweep."""

    def __init__(self, anatomy: Anatomy, inputs: Inputs, recording: Recording) -> None:
        self.anatomy, self.inputs, self.recording = anatomy, inputs, recording
        self.stack_map: Stack = recording.stack
        self.stream = inputs.stream(recording.stack.name)
        self.rows, self.length = self.stream.ids.shape
        self.modules = {b.module: anatomy.module.get_submodule(b.module) for b in self.stack_map.blocks}
        super().__init__(anatomy.module, {}, batch=1)

    # ---- the pass

    def final(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Tensor]]:
        """Each variant with its last residual [batch, length - start, d]."""
        self.handlers = {tap: self._handler(tap) for v in variants for w in v.writers for tap in w.taps}
        self.writers: dict[Tap, list[tuple[Variant, Written]]] = {}
        for v in variants:
            for w in v.writers:
                for tap in w.taps:
                    self.writers.setdefault(tap, []).append((v, w))
        self.groups: list[Group] = []
        with self:
            for layer, block in enumerate(self.stack_map.blocks):
                self._join(layer, [v for v in variants if v.layer == layer])
                if self.groups:
                    self._block(layer, block)
        for group in self.groups:
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
                group.hidden = torch.cat([group.hidden, rows])

    def _block(self, layer: int, block: Block) -> None:
        self.block, self.calls_met = block, 0
        self.spans: dict[Variant, slice] = {}
        at = 0
        self.slices: list[slice] = []
        for group in self.groups:
            size = self.rows * (self.length - group.start)
            self.slices.append(slice(at, at + size * len(group.variants)))
            for v in group.variants:
                self.spans[v] = slice(at, at + size)
                at += size
        packed = torch.cat([g.hidden.reshape(-1, g.hidden.shape[-1]) for g in self.groups])[None]
        self.row, self.column = self._coordinates(packed.device)
        call = self.recording.calls[layer]
        key = block.taps["resid_pre"].key
        args = tuple(packed if i == key else self._cut(a) for i, a in enumerate(call.args))
        kwargs = {k: packed if k == key else self._cut(v, k) for k, v in call.kwargs.items()}
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

    def _cut(self, value: Any, name: str = "") -> Any:
        """A block's argument for packed tokens: per-position tensors are looked up, caches are left out."""
        if name in ("past_key_values", "past_key_value", "layer_past", "cache_params"):
            return None
        if isinstance(value, (tuple, list)):
            return type(value)(self._cut(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 1 and len(value) == self.length:
            return value[self.column]
        if value.ndim in (2, 3) and value.shape[1] == self.length and len(value) in (1, self.rows):
            return value[self.row if len(value) > 1 else 0, self.column][None]
        if value.ndim == 2 and len(value) == self.length:
            return value[self.column]
        return value

    # ---- edits

    def nth(self, name: str, port: str) -> int:
        return self.block.nth

    def _handler(self, tap: Tap) -> Callable[[Tensor], Tensor | None]:
        def handler(x: Tensor) -> Tensor | None:
            old, x = x, x.clone()
            for v, w in self.writers[tap]:
                where = self.spans.get(v)
                if where is not None:
                    part = old[0, where].unflatten(0, (self.rows, self.length - v.start))
                    x[0, where] = w.meet(tap, part, Window(self.stream, offset=v.start)).flatten(0, 1)
            return x

        return handler

    # ---- attention

    def __enter__(self) -> Packed:
        super().__enter__()
        if not self._attention:
            self._stack.enter_context(listening(self))
        return self

    def attention(
        self, native: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        recorded = self.attention_calls[self.calls_met]
        self.calls_met += 1
        name = next(a for a in self.block.attentions.values() if self.root.get_submodule(a.module) is module).part
        taps = {p: self.block.taps.get(f"{name}.{p}") for p in ("q", "k", "v", "scores", "pattern", "z")}
        kw = {key: value for key, value in kw.items() if not isinstance(value, Tensor)}
        kw |= {key: value for key, value in recorded.kwargs.items() if isinstance(value, Tensor)}
        cross = name == "cross"
        made = [
            self._attend(native, module, group, self._rows(q, where, group), *(
                (self._repeat(recorded.k, group), self._repeat(recorded.v, group))
                if cross
                else (self._rows(k, where, group), self._rows(v, where, group))
            ), recorded, taps, kw, cross)
            for group, where in zip(self.groups, self.slices, strict=True)
        ]  # fmt: skip
        return torch.cat([z.reshape(1, -1, *z.shape[2:]) for z in made], 1), None

    def _rows(self, x: Tensor, where: slice, group: Group) -> Tensor:
        """[1, head, tokens, e] -> [variants * batch, head, length - start, e]"""
        return x[0, :, where].unflatten(1, (-1, self.length - group.start)).transpose(0, 1)

    def _repeat(self, x: Tensor, group: Group) -> Tensor:
        n = len(group.variants)
        return x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))

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
            x = x.clone()
            for i, variant in enumerate(group.variants):
                for owner, w in self.writers[tap]:
                    if owner is variant:
                        rows = slice(i * self.rows, (i + 1) * self.rows)
                        window = Window(self.inputs.stream("encoder") if cross and port in "kv" else self.stream)
                        window.offset = 0 if cross and port in "kv" else start
                        layout = Layout("b h p e", HEADS) if port in ("q", "k", "v") else PLAIN[port]
                        x[rows] = layout.write(w.meet(tap, layout.read(x[rows], self.rows), window))
            return x

        q, k, v = meet("q", q), meet("k", k), meet("v", v)
        if start and not cross:
            k = torch.cat([self._repeat(recorded.k[:, :, :start], group), k], 2)
            v = torch.cat([self._repeat(recorded.v[:, :, :start], group), v], 2)
        kw = {key: self._from(value, group) if isinstance(value, Tensor) else value for key, value in kw.items()}
        mask = recorded.mask
        if isinstance(mask, Tensor):
            mask = self._from(mask, group)
        elif start and not cross and q.shape[2] > 1:
            causal = kw.get("is_causal")
            if getattr(module, "is_causal", True) if causal is None else causal:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(start)[None, None]
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


PLAIN = {"z": Layout(HEADS, HEADS), "scores": Layout(PATTERN, PATTERN), "pattern": Layout(PATTERN, PATTERN)}
