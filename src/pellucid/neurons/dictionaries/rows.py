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
from pellucid.engine.early import run_until
from pellucid.store import ActivationStore
from pellucid.errors import InputError
from pellucid.model import Model

WINDOW = 16  # shards in memory at once
BLOCK = 65_536  # rows of a stream mixed at once

Block = tuple[Tensor, Tensor]  # what is read [rows, d_in] and what is to be written [rows, d_out]


def token_rows(model: Model, texts: Sequence[str], context: int = 128) -> list[list[int]]:
    """Texts as rows of at most `context` tokens, which `model.run` and `store_activations` take as prompts.

    For a causal model they stand behind one another, each ended by the tokenizer's end token, and are cut into rows of
    equal length; for others each text is a row of its own. InputError without a tokenizer or text.
    """
    if isinstance(texts, str) or model.tokenizer is None:
        raise InputError("expected several texts and a model with a tokenizer: give a list of texts")
    if not model.anatomy.stacks[-1].causal or len(model.anatomy.stacks) > 1:
        rows = [model.tokenizer(t, truncation=True, max_length=context)["input_ids"] for t in texts if t.strip()]
    else:
        end = [i for i in (model.tokenizer.eos_token_id,) if i is not None]
        ids = [i for t in texts for i in (*model.tokenizer(t)["input_ids"], *end)]
        rows = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
    if not rows:
        raise InputError(
            f"there is not one row of {context} tokens in these texts: give more text, or a shorter context="
        )
    return rows


@dataclass(frozen=True, eq=False)
class Stream:
    """Activations of texts at some sites (one to read, or one to read and one to write), as the model gives them.

    Texts are cut into rows as by `token_rows` and run `batch` at a time, anew in every pass over them.
    """

    model: Model
    texts: Sequence[str]
    sites: Sequence[str]
    context: int = 128
    batch: int = 8

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rows = token_rows(self.model, self.texts, self.context)
        for i in range(0, len(rows), self.batch):
            run = run_until(self.model.anatomy, self.model.inputs(rows[i : i + self.batch]), self.sites)
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
