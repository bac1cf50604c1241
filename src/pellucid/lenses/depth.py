"""From which layer on does the model no longer change its mind?

    prediction depth = the first layer from which on every layer's first choice is the model's own

(Baldock et al. 2021; read with lenses by Belrose et al. 2023). Hard examples are decided late.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.technique import technique


@technique
def prediction_depth(lens: Result) -> Result:
    """[prompt?, position] index of that row of a lens result (`logit_lens`); 0 is its first row, often the embedding.

    NaN past the end of shorter prompts. InputError for another result.
    """
    if lens.kind not in ("logit lens", "tuned lens"):
        raise InputError(f"a prediction depth is read from a lens, not from {lens.kind!r}")
    rank = lens.data["rank"].transpose("layer", ...)
    unlike = (rank.values != 0)[::-1]
    settled = np.where(unlike.any(0), len(unlike) - unlike.argmax(0), 0).astype(
        float
    )  # rows after the last other choice
    settled = np.where(np.isnan(rank.values).any(0), np.nan, settled)
    depth = xr.DataArray(
        settled, dims=rank.dims[1:], name="depth",
        coords={k: v for k, v in lens.data.coords.items() if set(v.dims) <= set(rank.dims[1:]) and k != "target"},
    )  # fmt: skip
    return Result(depth, kind="prediction depth", title=lens.title.replace(lens.kind.capitalize(), "Prediction depth"))
