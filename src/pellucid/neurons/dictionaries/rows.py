"""Activations as mixed batches of rows: from a tensor, from an activation store, or straight from a running model.

Neighbouring tokens of a text are alike, and so are the gradients they give; training wants rows of many texts in each
batch. A tensor is mixed as a whole; shards of a store are visited in random order and mixed `WINDOW` at a time; a
stream is mixed in blocks of about the same size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.corpus import Corpus, inputs, longest
from pellucid.corpus import batches as row_batches
from pellucid.engine.watching import run_until
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.store import ActivationStore

CONTEXT = 128  # tokens in a row
WINDOW = 16  # shards in memory at once
BLOCK = 65_536  # rows of a stream mixed at once

Block = tuple[Tensor, Tensor]  # what is read [rows, d_in] and what is to be written [rows, d_out]


@dataclass(frozen=True, eq=False)
class Stream:
    """Activations of texts at some sites (one to read, or one to read and one to write), as the model gives them.

    `texts` are what `pl.Corpus` takes, or one, in rows of `context` tokens (128, or what
    the model holds). They are run `batch` rows at a time, anew in every
    pass over them, so an iterator that ends is refused.
    """

    model: Model
    texts: Any
    sites: Sequence[str]
    context: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        if isinstance(self.corpus.texts, Iterator):
            raise InputError(
                "these texts can be read only once, but training reads them many times: give a list or a Path"
            )

    def __repr__(self) -> str:
        return f"<Stream of {self.corpus!r} through {self.model.name} at {', '.join(self.sites)}>"

    @property
    def corpus(self) -> Corpus:
        return Corpus.of(self.texts, context=self.context or min(CONTEXT, longest(self.model)), long="windows")

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in row_batches(self.corpus.rows(self.model), self.batch):
            run = run_until(self.model.anatomy, inputs(self.model, rows), self.sites)
            found = (run.everywhere(Site.parse(site)) for site in self.sites)
            yield tuple(values[real].float() for values, real in found)


def blocks(data: Any, site: str, writes: str, generator: torch.Generator) -> Iterator[Block]:
    """One pass over the data in large pieces, in random order where they can be had in any."""
    if isinstance(data, Tensor):
        yield _pair((data,))
    elif isinstance(data, ActivationStore):
        order = torch.randperm(len(data.index.shards), generator=generator).tolist()
        for i in range(0, len(order), WINDOW):
            yield _pair(tuple(data.shards(s, order[i : i + WINDOW]) for s in dict.fromkeys((site, writes))))
    elif isinstance(data, tuple):
        yield _pair(data)
    elif isinstance(data, Iterable) and not isinstance(data, Iterator):  # it is read many times
        yield from _gathered(data)
    else:
        raise InputError(
            f"rows come from a tensor [rows, d], a pair of them, an ActivationStore or a Stream, not {type(data).__name__}"
        )


def batches(
    data: Any, site: str, writes: str, size: int, limit: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in mixed batches of `size` rows no longer than `limit`; a last smaller one is left out."""
    rest: Block | None = None
    for x, y in blocks(data, site, writes, generator):
        short = x.float().norm(dim=1) <= limit
        kept = (x[short], y[short]) if y is not x else (x[short],) * 2
        if rest is not None:
            kept = (torch.cat([rest[0], kept[0]]), torch.cat([rest[1], kept[1]]))
        order = torch.randperm(len(kept[0]), generator=generator)
        whole = len(order) - len(order) % size
        for rows in order[:whole].split(size) if whole else ():
            batch = kept[0][rows].float()
            yield batch, batch if site == writes else kept[1][rows].float()
        rest = kept[0][order[whole:]], kept[1][order[whole:]]


def _gathered(data: Iterable[Any]) -> Iterator[Block]:
    held: list[Block] = []
    for piece in data:
        held.append(_pair(piece if isinstance(piece, tuple) else (piece,)))
        if sum(len(x) for x, _ in held) >= BLOCK:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(held: list[Block]) -> Block:
    return torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])


def _pair(given: tuple[Any, ...]) -> Block:
    x, y = given[0], given[-1]
    if not all(isinstance(t, Tensor) and t.ndim == 2 and len(t) == len(x) for t in given) or len(given) > 2:
        shapes = ", ".join(str(list(getattr(t, "shape", []))) for t in given)
        raise InputError(f"expected rows [rows, d], of one site or of a pair of sites: got {shapes}")
    return x, y
