"""How much does each token really contribute, when the size of what is attended to is counted too?

A head does not pass on its weights but weighted vectors. With v_j the value of token j (biases included) and W_O the
head's rows of the output projection, its output is the sum over j of alpha_ij v_j W_O, so the contribution of j to i is

    norm[head, i, j] = | alpha_ij v_j W_O |         (Kobayashi et al. 2020)

`together` is the norm of the sum over heads, where heads may cancel. A token can have all the attention of a head and
no contribution: the separators of encoders, whose values are small, are the known case. The bias of the output
projection belongs to no token and is left out. A factor or norm behind the projection is applied, so that norms are those
of what reaches the stream; the scale of a norm is the one that it has at that query in this run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.anatomy.writers import Writer
from pellucid.attention.patterns import Kind, attended, kinds, labelled, single, stacked
from pellucid.engine.edits import Edit
from pellucid.engine.locate import block_of
from pellucid.errors import Refused
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def norm_weighted(model: Model, prompt: Any, *, decoder: str | None = None, edits: Sequence[Edit] = ()) -> Result:
    """Norms of what every head carries from every key to every query, on one prompt.

    Dimensions and names are those of `patterns` (`pattern` is called `norm` here), in the units of the residual stream;
    with `..._together` [layer, query, key] for all heads of a layer. Refused where heads do not write to the residual
    independently (a gate or norm before the output projection).

    >>> norm_weighted(model, "The capital of France is").sel(layer=0).together
    <xarray.DataArray 'together' (query: 5, key: 5)>...
    """
    inputs = single(model, prompt, decoder)
    of = kinds(model.anatomy)
    values = [kind.site(layer, port) for kind in of for layer in kind.layers for port in ("v", "z_out")]
    found = attended(model, inputs, edits, keep=values)
    variables: dict[str, Any] = {}
    for kind in of:
        name = "" if kind == found.main else kind.variable
        heads, together = [], []
        for layer, pattern in zip(kind.layers, found.values[kind], strict=True):
            v = found.run.tensor(kind.site(layer, "v"))[0]
            stream = inputs.stream(kind.streams[1])
            v = v.narrow(0, int(stream.starts[0]), int(stream.lengths[0])).to(pattern)
            queries = inputs.stream(kind.streams[0])
            z_out = found.run.tensor(kind.site(layer, "z_out"))[:1]
            z_out = z_out.narrow(1, int(queries.starts[0]), int(queries.lengths[0])).to(pattern)
            norms, sums = carried_norms(model, kind, layer, v, pattern, z_out)
            heads.append(norms)
            together.append(sums)
        variables[name or "norm"] = (kind.dims, stacked(heads).numpy())
        variables[f"{name}_together".strip("_")] = ((kind.dims[0], *kind.tokens), torch.stack(together).numpy())
    order = sorted(variables, key=lambda name: name not in ("norm", "together"))
    data = labelled(xr.Dataset({name: variables[name] for name in order}), found)
    return Result(data, kind="norm-weighted attention", title="How much each head carries from where")


def carried_norms(
    model: Model, kind: Kind, layer: int, v: Tensor, pattern: Tensor, z_out: Tensor
) -> tuple[Tensor, Tensor]:
    """[head, query, key] the norms, and [query, key] those of the sums over heads; v [key, kv_head, e], z_out [1, query,
    head, e]."""
    block = block_of(model.anatomy, Site.parse(kind.site(layer)))
    gated = "a gate or norm lies between z and the output projection" if block.attentions[kind.area].gated else ""
    try:
        if gated:
            raise Refused(gated)
        writer = Writer.of(model.module, block, kind.area)
    except Refused as why:
        raise Refused(f"norm-weighted attention is refused on this model: {kind.site(layer, 'out')!r}: {why}") from None
    rows = writer.weight()[0][: writer.units].to(v)
    made = torch.einsum("khe,hed->hkd", v.repeat_interleave(writer.units // v.shape[1], 1), rows)
    if not writer.held:
        carried = writer.reached(z_out[:, :1], made)
        return pattern * carried.norm(dim=-1)[:, None], summed(pattern, carried)
    norms, sums = [], []
    for q in range(z_out.shape[1]):
        carried = writer.reached(z_out[:, q : q + 1], made)
        norms.append(pattern[:, q] * carried.norm(dim=-1))
        sums.append(summed(pattern[:, q : q + 1], carried)[0])
    return torch.stack(norms, 1), torch.stack(sums)


def summed(pattern: Tensor, carried: Tensor) -> Tensor:
    """[query, key] the norm of the sum over heads, by the inner products of what heads carry from one key."""
    gram = torch.einsum("hkd,gkd->khg", carried, carried)
    return torch.einsum("hqk,khg,gqk->qk", pattern, gram, pattern).clamp_min(0).sqrt()
