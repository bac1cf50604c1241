"""Concepts of texts, and the edit through which nothing else goes on.

h is the mean of a text's values at a layer (of a causal stack that of the tokens so far), layer-normalised to length 1; every token's values become

    l = W h + a        z = sigma(l), or hard 1[l > 0] with the gradient of sigma          the concepts
    x' = mean + spread (base + sum_k (z_k - 1/2) v_k + U D h)                              all that later layers see; D h is the residual channel

in units of how far texts are apart at the layer, so that one learning rate fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from pellucid.engine.edits import Edit, Place
from pellucid.errors import InputError, nearest
from pellucid.tuning.data import Batch, Encoded, Rationales


@dataclass(frozen=True, eq=False, repr=False)
class Narrow(Edit):
    """Values that leave through a bottleneck. `known` [row, concept] are concepts put in by hand (NaN: the model's own), `rest` what the
    residual channel holds instead of its own values."""

    of: Any  # a Bottleneck
    known: Tensor | None = None
    rest: Tensor | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    def new(self, x: Tensor, place: Place) -> Tensor:
        p = {name: v.to(x.device) for name, v in self.of.state_["tensors"].items()}
        real = (place.positions < place.stream.lengths[:, None]).to(x.device)[..., None]
        wide = x.float() * real
        if self.seen.get("causal") is not None:
            h = wide.cumsum(1) / real.float().cumsum(1).clamp_min(1)
        else:
            h = (wide.sum(1) / real.float().sum(1))[:, None]
        h = layer_norm(h, h.shape[-1:]) / h.shape[-1] ** 0.5
        logits = h @ p["head.concepts"].T + p["head.bias"]
        z = self.of.said_as(logits)
        self.seen.update(logits=logits, narrow=h)
        if self.known is not None:
            known = self.known.to(x.device)[:, None]
            z = torch.where(known.isnan(), z, known.nan_to_num())
        new = p["head.base"] + (z - 0.5) @ p["head.out"]
        if self.of.residual:
            rest = h @ p["head.down"].T
            self.seen["rest"] = rest
            new = new + (rest if self.rest is None else self.rest.to(rest).expand_as(rest)) @ p["head.up"]
        return (p["fixed.mean"] + p["fixed.spread"] * new).expand(x.shape).to(x.dtype)


def truth_of(data: Rationales, concepts: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """The names and [text, concept] 1, 0 or NaN. InputError for an unknown one, and one that holds always or never."""
    names = list(data.properties) if concepts is None else list(concepts)
    if not names:
        raise InputError("the data names no concepts: Rationales(..., properties={'praise': [True, False, ...]})")
    for name in names:
        if name not in data.properties:
            raise InputError(f"the data has no concept {name!r}{nearest(name, data.properties)}")
    try:
        found = np.array([[np.nan if v is None else float(v) for v in data.properties[name]] for name in names]).T
    except (TypeError, ValueError):
        raise InputError(
            "concepts hold (True) or do not (False), or are not known (None): found something else"
        ) from None
    for name, values in zip(names, found.T, strict=True):
        known = values[~np.isnan(values)]
        if not np.isin(known, (0, 1)).all():
            raise InputError(f"the concept {name!r} has values besides true and false: expected one of these, or None")
        if len(set(known.tolist())) < 2:
            raise InputError(f"the concept {name!r} is alike in all texts: there is nothing to learn from")
    return names, found


def where_read(values: Tensor, batch: Batch, data: Encoded) -> Tensor:
    """[row, ...] of [row, position, ...] at the last token of each prompt, or what there is one of."""
    if values.shape[1] == 1:
        return values[:, 0]
    last = torch.tensor([data.lengths[i] - 1 for i in batch.rows], device=values.device)
    return values[torch.arange(len(values), device=values.device), last]
