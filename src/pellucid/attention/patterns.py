"""Where does each head look?

    pattern[layer, head, query, key] = softmax over keys of q . k / sqrt(d_head) (+ mask, position bias)

as the model computes it: every row says how a query's attention is shared out over the keys. Rows sum to 1, except in
families whose softmax has a sink beside the keys. Grouped queries show one pattern per query head. Nothing is computed
anew: what is read is what the proven taps of the model hand out, so soft caps, biases and windows are in it. Attention
that is computed in pieces (local windows, hashes, landmarks) has no such matrix and is refused by name.

The other files of this package work on `Attended`, the patterns (and their gradients) of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.structure import Stack
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.marks import special_ids
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Result
from pellucid.technique import technique


@technique
def patterns(model: Model, prompt: Any, *, decoder: str | None = None, edits: Sequence[Edit] = ()) -> Result:
    """The attention of every head on one prompt.

    One stack: `pattern` [layer, head, query, key]. An encoder-decoder, whose decoder is given `decoder`: `encoder`
    [encoder_layer, encoder_head, source_query, source_key], `decoder` [layer, head, query, key] and `cross` [layer,
    head, query, source_key]. Token texts are coordinates; layers without attention are left out; heads that a layer
    does not have are NaN. Refused where a layer attends in pieces; InputError for several prompts.

    >>> patterns(model, "The capital of France is").sel(layer=3, head=1)
    Where each head looks
    attention patterns: pattern over query 5, key 5...
    """
    inputs = single(model, prompt, decoder)
    found = attended(model, inputs, edits)
    data = xr.Dataset({kind.variable: (kind.dims, found.stacked(kind).numpy()) for kind in found.kinds})
    data = labelled(data, found)
    return Result(data, kind="attention patterns", title="Where each head looks")


# ---- what the rest of the package reads


@dataclass(frozen=True)
class Kind:
    """One kind of attention of a model: self-attention of a stack, or the decoder's attention to the encoder."""

    stack: str
    area: str  # "attn" or "cross"
    layers: tuple[int, ...]

    @property
    def variable(self) -> str:
        return "cross" if self.area == "cross" else self.stack or "pattern"

    @property
    def prefix(self) -> str:
        """Of dimension names: the last stack has the plain ones, an encoder is the source."""
        return "" if self.stack in ("", "decoder") else self.stack + "_"

    @property
    def dims(self) -> tuple[str, str, str, str]:
        layer, head = f"{self.prefix}layer", f"{self.prefix}head"
        return layer, head, *self.tokens

    @property
    def tokens(self) -> tuple[str, str]:
        """Names of the query and the key dimension."""
        if self.area == "cross":
            return "query", "source_key"
        prefix = "source_" if self.stack == "encoder" else self.prefix
        return f"{prefix}query", f"{prefix}key"

    def site(self, layer: int, part: str = "pattern") -> str:
        return f"{self.stack + '.' if self.stack else ''}layers.{layer}.{self.area}.{part}"

    @property
    def streams(self) -> tuple[str, str]:
        """The tokens its queries and its keys are."""
        return self.stack, "encoder" if self.area == "cross" else self.stack


@dataclass(frozen=True, eq=False)
class Attended:
    """The attention of one prompt: per kind and layer a tensor [head, query, key] over real tokens, in float32 at
    least.

    `gradients` is the same for the gradient of a score, where one was asked for.
    """

    kinds: tuple[Kind, ...]
    run: Run
    values: dict[Kind, list[Tensor]]
    gradients: dict[Kind, list[Tensor]] = field(default_factory=dict)

    def stacked(self, kind: Kind) -> Tensor:
        return stacked(self.values[kind])

    def kind(self, variable: str) -> Kind | None:
        return next((k for k in self.kinds if k.variable == variable), None)

    @property
    def main(self) -> Kind:
        """Self-attention of the only or the last stack."""
        return next(k for k in reversed(self.kinds) if k.area == "attn")

    @property
    def paired(self) -> bool:
        """Whether this is an encoder with a decoder that attends to it."""
        return self.kind("cross") is not None and self.kind("encoder") is not None


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """[layer, head, ...] from layers [head, ...]; heads a layer does not have are NaN."""
    most = max(len(x) for x in layers)
    return torch.stack([torch.cat([x, x.new_full((most - len(x), *x.shape[1:]), float("nan"))]) for x in layers])


def kinds(anatomy: Anatomy) -> tuple[Kind, ...]:
    """The kinds of attention a model has. Refused if it has none, or one that is computed in pieces."""
    found: list[Kind] = []
    for stack in anatomy.stacks:
        for area in ("attn", "cross"):
            layers = tuple(b.index for b in stack.blocks if area in b.attentions)
            _check_whole(stack, area)
            if layers:
                found.append(Kind(stack.name, area, layers))
    if not any(kind.area == "attn" for kind in found):
        raise Refused("attention patterns are refused on this model: none of its layers attends")
    return tuple(found)


def _check_whole(stack: Stack, area: str) -> None:
    for block in stack.blocks:
        if area in block.attentions and f"{area}.pattern" not in block.taps:
            why = block.refused.get(f"{area}.pattern") or block.refused.get(area) or "it attends in pieces"
            name = f"{stack.prefix}layers.{block.index}.{area}"
            raise Refused(
                f"attention patterns are refused on this model: {name} ({block.attentions[area].module}): {why}"
            )


def single(model: Model, prompt: Any, decoder: str | None = None) -> Inputs:
    """One prompt as inputs; InputError for several."""
    inputs = model.inputs(prompt, decoder=decoder)
    if len(inputs) != 1:
        raise InputError(f"attention is read one prompt at a time, got {len(inputs)}: call it once for each")
    return inputs


def asked(model: Model, prompt: Any, target: Any = None, against: Any = None, decoder: str | None = None) -> Question:
    """The question about one prompt; InputError for several."""
    return Question.of(model, single(model, prompt, decoder), target, against=against)


def attended(
    model: Model, inputs: Inputs, edits: Sequence[Edit] = (), grad_of: Any = None, keep: Sequence[str] = ()
) -> Attended:
    """Run one prompt and read all its patterns, and with `grad_of` (a metric) their gradients; `keep` is kept too."""
    of = kinds(model.anatomy)
    sites = [kind.site(layer) for kind in of for layer in kind.layers]
    with torch.set_grad_enabled(grad_of is not None):
        run = model.run(inputs, keep=[*sites, *keep], edits=edits, grad_of=grad_of)
    read = {k: [real(run.tensor(k.site(i)), inputs, k) for i in k.layers] for k in of}
    slopes = {k: [real(run.grad(k.site(i)), inputs, k) for i in k.layers] for k in of} if grad_of is not None else {}
    return Attended(of, run, read, slopes)


def real(pattern: Tensor, inputs: Inputs, kind: Kind) -> Tensor:
    """[head, query, key] of the first prompt's real tokens, from [batch, head, query, key]; on the CPU, as all here."""
    x = pattern[0].detach().cpu()
    x = x if x.dtype == torch.float64 else x.float()
    for axis, name in enumerate(kind.streams, start=1):
        stream = inputs.stream(name)
        if x.shape[axis] != stream.ids.shape[1]:
            what = ("queries", "keys")[axis - 1]
            raise Refused(
                f"{kind.site(kind.layers[0])!r} has {x.shape[axis]} {what} for {stream.ids.shape[1]} tokens: "
                "they cannot be told apart"
            )
        x = x.narrow(axis, int(stream.starts[0]), int(stream.lengths[0]))
    return x


def labelled(data: xr.Dataset, found: Attended, queries: Sequence[int] | None = None) -> xr.Dataset:
    """The dataset with layer numbers and token texts as coordinates of the dimensions it has in full.

    `queries` are those of the last stack it holds, all by default.
    """
    coords: dict[str, Any] = {}
    for kind in found.kinds:
        layer, head, query, key = kind.dims
        coords[layer] = list(kind.layers)
        coords[head] = range(max(len(x) for x in found.values[kind]))
        for dim, name in zip((query, key), kind.streams, strict=True):
            labels = texts(found.run.inputs.stream(name))
            chosen = range(len(labels)) if dim != "query" or queries is None else queries
            coords[dim] = list(chosen)
            coords[f"{dim}_token"] = (dim, [labels[i] for i in chosen])
    here = {}
    for name, value in coords.items():
        dim, values = value if isinstance(value, tuple) else (name, value)
        if data.sizes.get(dim) == len(values):
            here[name] = value
    return data.assign_coords(here)


def texts(stream: Stream) -> list[str]:
    return list(stream.labels[0])


def visible(layers: Sequence[Tensor]) -> list[Tensor]:
    """Per layer [query, key]: whether any head can look there (what is masked is exactly 0 for all)."""
    return [(x > 0).any(0) for x in layers]


def special(model: Model, stream: Stream) -> np.ndarray:
    """[position] the marks of the first prompt, padding left out."""
    ids = stream.ids[0][stream.mask[0].bool()].cpu().numpy()
    return np.isin(ids, list(special_ids(model.tokenizer)))
