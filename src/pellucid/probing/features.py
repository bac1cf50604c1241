"""What does the model hold at these places, layer by layer?

Each text is run once; the tokens that touch a span are pooled to one vector per site: the first, the last (what a
causal model knows when the word is finished), or their mean. Neither padding nor the order of the texts matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.corpus import Corpus, batches, inputs
from pellucid.engine.limits import exceeded
from pellucid.engine.pausing import progress
from pellucid.engine.run import execute
from pellucid.errors import InputError, one_of
from pellucid.model import Model
from pellucid.probing.examples import Examples, Spans
from pellucid.store import ActivationStore
from pellucid.tasks.tokens import covering, encode
from pellucid.technique import technique

Pool = Literal["first", "last", "mean"]


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """What was read: `values` [layer, span, d] in float32, one layer per site, and of which model."""

    values: Tensor
    sites: tuple[str, ...]
    spans: Spans
    model: str
    digest: str | None
    pool: Pool

    def __repr__(self) -> str:
        sites, spans, d = self.values.shape
        return f"<Features of {spans:,} spans at {sites} sites of {self.model}, {d} wide, {self.pool} of their tokens>"

    @property
    def layers(self) -> list[int]:
        """The layer of each site, -1 for what enters the first block."""
        return [-1 if layer is None else int(str(layer)) for layer in (Site.parse(s).layer for s in self.sites)]

    def of(self, examples: Examples, layer: int) -> Tensor:
        """[n, d] of one layer for some examples; for pairs [n, 3 d], both vectors and their product (Liu et al. 2019)."""
        if examples.spans is not self.spans and examples.spans.where != self.spans.where:
            raise InputError("these examples lie on other spans than those that were read: read(model, examples.spans)")
        first = self.values[layer][torch.as_tensor(examples.first)]
        if examples.second is None:
            return first
        second = self.values[layer][torch.as_tensor(examples.second)]
        return torch.cat([first, second, first * second], 1)


@technique
def read(
    model: Model,
    spans: Spans | Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    batch: int = 32,
    store: ActivationStore | None = None,
) -> Features:
    """Pool the values at `sites` over the tokens of each span; by default what enters the first block and leaves each.

    With a `store`, harvested from the same texts in the same order, nothing is run. InputError for a span no token
    touches, for sites of unequal width, and for a decoder's sites where the text goes into an encoder.

    >>> read(model, Spans.words(["Paris is in France"]), pool="last").values.shape
    torch.Size([3, 4, 32])
    """
    spans = spans.spans if isinstance(spans, Examples) else spans
    one_of(pool, Pool, "cannot pool by ")
    if model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer, which finds the tokens of a span: tokenizer=...")
    names = _sites(model, sites, store)
    rows = [encode(model.tokenizer, text) for text in spans.texts]
    if rows and store is None:  # before anything runs, and not in the middle of it
        most = max(range(len(rows)), key=lambda i: len(rows[i][0]))
        if (holds := exceeded(model.module, len(rows[most][0]), model.anatomy.stacks[0].name)) is not None:
            raise InputError(
                f"text {most} of the spans has {len(rows[most][0])} tokens but the model's context holds {holds}: cut it where a "
                "sentence ends, and give its pieces as texts with their own spans"
            )
    tokens = [_tokens(rows[text][1], spans, i, pool) for i, (text, _, _) in enumerate(spans.where)]
    of_text: dict[int, list[int]] = {}
    for i, (text, _, _) in enumerate(spans.where):
        of_text.setdefault(text, []).append(i)
    out: Tensor | None = None
    chunks = _run(model, [r[0] for r in rows], names, sorted(of_text), batch) if store is None else _stored(
        store, model, [r[0] for r in rows], names, sorted(of_text), batch)  # fmt: skip
    for texts, starts, values in chunks:
        wanted = [(i, starts[text]) for text in texts for i in of_text[text]]
        flat = torch.tensor([start + t for i, start in wanted for t in range(*tokens[i])])
        segment = torch.repeat_interleave(
            torch.arange(len(wanted)), torch.tensor([tokens[i][1] - tokens[i][0] for i, _ in wanted])
        )
        pooled = values.new_zeros(len(names), len(wanted), values.shape[-1]).index_add_(1, segment, values[:, flat])
        out = values.new_empty(len(names), len(spans), values.shape[-1]) if out is None else out
        out[:, [i for i, _ in wanted]] = pooled / torch.bincount(segment)[:, None]
    assert out is not None
    return Features(out, tuple(names), spans, model.name, model.digest, pool)


def features_of(
    source: Model | Features, examples: Examples, sites: str | Sequence[str] | None, pool: Pool
) -> Features:
    """What a method was given to read from: a model, which is read now, or what was read before."""
    return source if isinstance(source, Features) else read(source, examples, sites=sites, pool=pool)


def _sites(model: Model, sites: str | Sequence[str] | None, store: ActivationStore | None) -> list[str]:
    stack = model.anatomy.stacks[0]
    if sites is None and store is not None:
        sites = store.sites
    if sites is None:
        sites = (f"{stack.prefix}embed", f"{stack.prefix}layers.*.resid_post")
    names = [str(s) for pattern in ([sites] if isinstance(sites, str) else sites) for s in model.sites(pattern)]
    for site in map(Site.parse, names):
        if "position" not in site.dims or site.at is not None:
            raise InputError(f"{str(site)!r} has no value at every token: name a site with positions, without '@'")
        if len(model.anatomy.stacks) > 1 and site.stack == "decoder":
            raise InputError(f"{str(site)!r} is the decoder's, but the text goes into the encoder: name its sites")
    return names


def _tokens(offsets: list[tuple[int, int]], spans: Spans, i: int, pool: Pool) -> tuple[int, int]:
    """[first, last + 1) of the tokens that are pooled for a span."""
    _, start, stop = spans.where[i]
    first, last = covering(offsets, start, stop)
    if first == last:
        raise InputError(f"no token touches {spans.surface(i)!r} in {spans.texts[spans.where[i][0]]!r}: leave it out")
    return {"first": (first, first + 1), "last": (last - 1, last), "mean": (first, last)}[pool]


Chunk = tuple[list[int], dict[int, int], Tensor]  # texts, where each begins, values [site, token, d]


def _run(model: Model, ids: list[list[int]], names: list[str], texts: list[int], batch: int) -> Iterator[Chunk]:
    """Texts of like length together. InputError names one that is longer than the model holds."""
    rows = list(Corpus(ids, packed=False).rows(model))
    order = sorted((rows[text] for text in texts), key=lambda row: len(row.ids))
    for group in progress(list(batches(order, batch)), "texts read"):
        chosen = [row.text for row in group]
        with torch.no_grad():
            run = execute(model.anatomy, inputs(model, group), names)
        stream = run.stream(Site.parse(names[0]))
        width = stream.ids.shape[1]
        starts = {text: row * width + int(stream.starts[row]) for row, text in enumerate(chosen)}
        yield chosen, starts, _stacked([run.everywhere(Site.parse(name))[0].flatten(0, 1) for name in names], names)


def _stored(
    store: ActivationStore, model: Model, ids: list[list[int]], names: list[str], texts: list[int], batch: int
) -> Iterator[Chunk]:
    check_weights(model, store.index.digest, f"the store {str(store.path)!r}")
    prompts, tokens = store["prompts"], store.tokens
    counts = torch.bincount(prompts, minlength=len(ids))
    firsts = counts.cumsum(0) - counts
    for at in range(0, len(texts), batch):
        chosen, starts = texts[at : at + batch], {}
        wanted: list[int] = []
        for text in chosen:
            held = range(int(firsts[text]), int(firsts[text] + counts[text]))
            if tokens[held.start : held.stop].tolist() != ids[text]:
                raise InputError(
                    f"prompt {text} of the store {str(store.path)!r} is another text than the spans': harvest spans.texts"
                )
            starts[text] = len(wanted)
            wanted += held
        yield chosen, starts, _stacked([store.rows(name, wanted) for name in names], names)


def _stacked(values: list[Tensor], names: list[str]) -> Tensor:
    """[site, token, d] in float32 on the CPU, where probes are fitted."""
    flat = [v.flatten(1).float().cpu() for v in values]
    if len({v.shape[1] for v in flat}) > 1:
        widths = ", ".join(f"{name} {v.shape[1]}" for name, v in zip(names, flat, strict=True))
        raise InputError(f"sites of unequal width cannot be read together ({widths}): read them apart")
    return torch.stack(flat)
