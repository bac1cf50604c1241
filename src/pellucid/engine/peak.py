"""How much memory will this take? Bytes beyond the weights, known before the work is done at its full size.

The same work is done at three short lengths, and after every operation the bytes of all living tensors are counted. What an
operation leaves alive is a quadratic of the length (values by position, attention's by pairs), so three lengths give every
moment at any length, and the largest moment is the peak. What runs inside one operation is not seen, nor what an allocator
holds back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pellucid.engine.inputs import Inputs, Stream

LENGTHS = (8, 16, 32)
ROWS = 2


class Peak(NamedTuple):
    """Bytes at the most, and of what is left at the end."""

    most: float
    held: float


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that came into being inside, after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.moments = 0, [0]
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs or {})):
            self._meet(x, 0)  # it was there before
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            self._meet(x, 1)
        self.moments.append(self.live)
        return made

    def _meet(self, x: Any, times: int) -> None:
        if not isinstance(x, Tensor) or x.is_sparse or x.is_meta:
            return
        try:
            storage = x.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor that is made of others
            return
        key = storage._cdata
        if key not in self._known:
            size = times * storage.nbytes()
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def counted(work: Callable[[], Any]) -> tuple[list[int], int]:
    """The living bytes after every operation of some work, and at its end, while what it gave is there."""
    living = Living()
    with living:
        made = work()
    end = living.live
    del made
    return living.moments, end


def predicted(
    work: Callable[[Any], Any],
    inputs: Inputs,
    rows: int | None = None,
    least: int = 0,
    before: Callable[[Inputs], Any] = lambda inputs: inputs,
) -> Peak:
    """The peak of `work(before(inputs))` beyond what `before` made, from prompts cut short (`rows` of them; at least `least` tokens)."""
    length, batch = max(s.ids.shape[1] for s in inputs.streams.values()), len(inputs)
    rows = min(batch, ROWS if rows is None else rows)
    lengths = [max(n, least) + n * (least > n) for n in LENGTHS]
    if length <= lengths[-1]:
        given = before(cut(inputs, rows, length))
        moments, end = counted(lambda: work(given))
        return Peak(max(moments) * batch / rows, end * batch / rows)
    found = []
    for n in lengths:
        given = before(cut(inputs, rows, n))
        found.append(counted(lambda given=given: work(given)))  # type: ignore[misc]
    alike = len({len(moments) for moments, _ in found}) == 1
    each = torch.tensor([m if alike else [max(m)] for m, _ in found], dtype=torch.float64)
    ends = torch.tensor([[e] for _, e in found], dtype=torch.float64)
    most, held = (float(_beyond(lengths, x, length).max()) * batch / rows for x in (each, ends))
    return Peak(max(most, held), held)


def _beyond(at: Sequence[int], values: Tensor, length: int) -> Tensor:
    """The quadratic through three values, at another length."""
    weights = []
    for i, own in enumerate(at):
        w = 1.0
        for j, other in enumerate(at):
            w *= (length - other) / (own - other) if i != j else 1.0
        weights.append(w)
    return torch.tensor(weights, dtype=torch.float64) @ values


def cut(inputs: Inputs, rows: int, length: int) -> Inputs:
    """The first prompts, cut to a length (the longest stream, others in proportion), padded where they are."""
    whole = max(s.ids.shape[1] for s in inputs.streams.values())
    if length >= whole and rows == len(inputs):
        return inputs
    widths = {s.ids.shape[1]: max(1, round(s.ids.shape[1] * length / whole)) for s in inputs.streams.values()}

    def narrow(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim or len(x) != len(inputs):
            return x
        return x[:rows, : widths[x.shape[1]]] if x.ndim > 1 and x.shape[1] in widths else x[:rows]

    def short(stream: Stream) -> Stream:
        width = widths[stream.ids.shape[1]]
        mask = torch.ones_like(stream.mask[:rows, :width])
        if stream.padded and width > 1:
            mask[-1, 0 if bool(stream.starts.max()) else -1] = 0
        return Stream(stream.ids[:rows, :width], mask, tuple(labels[:width] for labels in stream.labels[:rows]))

    streams = {name: short(stream) for name, stream in inputs.streams.items()}
    tensors = {name: narrow(x) for name, x in inputs.tensors.items()}
    if "attention_mask" in tensors and isinstance(tensors["attention_mask"], Tensor):
        first = streams.get("encoder", streams.get(""))
        if first is not None and tensors["attention_mask"].shape == first.mask.shape:
            tensors["attention_mask"] = first.mask.to(tensors["attention_mask"])
    return replace(inputs, tensors=tensors, streams=streams, texts=inputs.texts[:rows])


def free(device: torch.device) -> float:
    """Bytes that are free where a model is; infinity where that cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def said(size: float) -> str:
    """
    >>> said(3 << 20), said(5e9)
    ('3 MB', '4.7 GB')
    """
    return f"{size / 2**30:.1f} GB" if size >= 1 << 30 else f"{max(1, round(size / 2**20))} MB"
