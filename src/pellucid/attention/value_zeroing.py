"""What does a token's representation lose if one token has nothing to give in a layer?

The values of token j are set to zero in all heads of one layer, its attention weights staying as they are, and the
representations after the whole layer (its MLP and norms included) are compared (Mohebbi et al. 2023):

    distance[layer, i, j] = 1 - cos(x_i, x_i without v_j)         share[layer, i, j] = distance / sum over j

Attention weights say where a head looks; this says what a layer mixes in, whatever its values, output projection, residual
and MLP make of it. Within one layer only: what earlier layers mixed in is in the values already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pellucid.attention.patterns import Kind, attended, labelled, single, stacked
from pellucid.engine.edits import Edit, Place, brought
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.engine.watching import run_until
from pellucid.errors import at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@dataclass(frozen=True, eq=False, repr=False)
class OneEach(Edit):
    """Row b of the batch has nothing at position `keys[b]`: one prompt, many times over, without another token each time."""

    keys: Tensor

    def new(self, x: Tensor, place: Place) -> Tensor:
        gone = brought(place.positions, x) == self.keys.to(x.device)[:, None]
        return x.masked_fill(gone.reshape(*gone.shape, *[1] * (x.ndim - 2)), 0.0)


@technique
def value_zeroing(
    model: Model, prompt: Any, *, decoder: str | None = None, edits: Sequence[Edit] = (), batch: int = 32
) -> Result:
    """How much each layer mixes every token into every other, on one prompt.

    Gives `distance` and `share` [layer, query, key]; of an encoder-decoder also `..._encoder` [encoder_layer, source_query,
    source_key] and `..._cross` [layer, query, source_key]. A row of `share` sums to 1, and is 0 where nothing is mixed in.
    About half a forward pass for each layer and token, `batch` rows at a time. Raises as `patterns` does; Refused where a
    layer's values are not known.

    >>> value_zeroing(model, "The capital of France is").sel(layer=3).share
    <xarray.DataArray 'share' (query: 5, key: 5)>...
    """
    at_least(1, batch=batch)
    inputs = single(model, prompt, decoder)
    found = attended(model, inputs, edits)
    variables: dict[str, Any] = {}
    layers = [(kind, row) for kind in found.kinds for row in range(len(kind.layers))]
    made: dict[Kind, list[Tensor]] = {kind: [] for kind in found.kinds}
    for kind, row in progress(layers, "value zeroing, layers"):
        seen = found.values[kind][row].amax(0) > 0  # nobody looks at the future: rounding is no mixing
        made[kind].append(_distances(model, inputs, kind, kind.layers[row], edits, batch) * seen)
    for kind, distances in made.items():
        end = "" if kind == found.main else f"_{kind.variable}"
        distance = stacked([d[None] for d in distances])[:, 0]
        share = distance / distance.sum(-1, keepdim=True).clamp_min(1e-12)
        variables[f"share{end}"] = ((kind.dims[0], *kind.tokens), share.numpy())  # first: what a person looks at
        variables[f"distance{end}"] = ((kind.dims[0], *kind.tokens), distance.numpy())
    data = labelled(xr.Dataset(variables), found)
    return Result(data, kind="value zeroing", title="What each layer mixes in from where")


def _distances(model: Model, inputs: Inputs, kind: Kind, layer: int, edits: Sequence[Edit], batch: int) -> Tensor:
    """[query, key] of one layer, on the real tokens."""
    queries, keys = (inputs.stream(name) for name in kind.streams)
    stack = f"{kind.stack}." if kind.stack else ""
    after, value = f"{stack}layers.{layer}.resid_post", kind.site(layer, "v")
    rows = slice(int(queries.starts[0]), int(queries.starts[0]) + int(queries.lengths[0]))
    plain = _after(model, inputs, after, edits)[0, rows]
    columns = []
    for some in torch.arange(int(keys.lengths[0])).split(batch):
        changed = _after(model, inputs.repeated(len(some)), after, [*edits, OneEach(value, some)])[:, rows]
        columns.append(1 - torch.cosine_similarity(plain[None], changed, dim=-1))
    return torch.cat(columns).T.clamp_min(0).float().cpu()


def _after(model: Model, inputs: Inputs, site: str, edits: Sequence[Edit]) -> Tensor:
    """The residual [batch, position, d_model] after a layer, in float64, of a pass that goes no further than it must."""
    return run_until(model.anatomy, inputs, [site], model.resolved(edits)).tensor(site).double()
