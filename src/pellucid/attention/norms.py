"""How much does each token really contribute, when the size of what is attended to is counted too?

A head does not pass on its weights but weighted vectors. With v_j the value of token j (biases included) and W_O the
head's rows of the output projection, its output is the sum over j of alpha_ij v_j W_O, so the contribution of j to i is

    norm[head, i, j] = | alpha_ij v_j W_O |         (Kobayashi et al. 2020)

`together` is the norm of the sum over heads, where heads may cancel. A token can have all the attention of a head and
no contribution: the separators of encoders, whose values are small, are the known case. The bias of the output
projection belongs to no token and is left out; a norm or factor behind the projection is not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.anatomy.weights import linear_map
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

    >>> norm_weighted(model, "The capital of France is").sel(layer=0).together  # doctest: +SKIP
    """
    inputs = single(model, prompt, decoder)
    of = kinds(model.anatomy)
    values = [kind.site(layer, "v") for kind in of for layer in kind.layers]
    found = attended(model, inputs, edits, keep=values)
    variables: dict[str, Any] = {}
    for kind in of:
        name = "" if kind == found.main else kind.variable
        heads, together = [], []
        for layer, pattern in zip(kind.layers, found.values[kind], strict=True):
            v = found.run.tensor(kind.site(layer, "v"))[0]
            stream = inputs.stream(kind.streams[1])
            v = v.narrow(0, int(stream.starts[0]), int(stream.lengths[0])).to(pattern)
            carried = carries(model, kind, layer, v)
            heads.append(pattern * carried.norm(dim=-1)[:, None])
            together.append(summed(pattern, carried))
        variables[name or "norm"] = (kind.dims, stacked(heads).numpy())
        variables[f"{name}_together".strip("_")] = ((kind.dims[0], *kind.tokens), torch.stack(together).numpy())
    order = sorted(variables, key=lambda name: name not in ("norm", "together"))
    data = labelled(xr.Dataset({name: variables[name] for name in order}), found)
    return Result(data, kind="norm-weighted attention", title="How much each head carries from where")


def carries(model: Model, kind: Kind, layer: int, v: Tensor) -> Tensor:
    """[head, key, d_model] what each head writes if all its attention is on that key; v [key, kv_head, e]."""
    block = block_of(model.anatomy, Site.parse(kind.site(layer)))
    attention = block.attentions[kind.area]
    why = block.refused.get(f"{kind.area}.heads.out")
    if attention.gated:
        why = why or "a gate or norm lies between z and the output projection"
    if why is not None or attention.o_proj is None or attention.linear is None:
        why = why or "its heads do not write to the residual independently"
        raise Refused(f"norm-weighted attention is refused on this model: {kind.site(layer, 'out')!r}: {why}")
    h, e = attention.heads, attention.d_value
    weight, _ = linear_map(model.module.get_submodule(attention.o_proj), attention.linear.shape)
    rows = weight[: h * e].detach().to(v).unflatten(0, (h, e))
    return torch.einsum("khe,hed->hkd", v.repeat_interleave(h // v.shape[1], 1), rows)


def summed(pattern: Tensor, carried: Tensor) -> Tensor:
    """[query, key] the norm of the sum over heads, by the inner products of what heads carry from one key."""
    gram = torch.einsum("hkd,gkd->khg", carried, carried)
    return torch.einsum("hqk,khg,gqk->qk", pattern, gram, pattern).clamp_min(0).sqrt()
