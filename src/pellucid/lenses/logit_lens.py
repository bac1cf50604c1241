"""What would the model answer if it stopped after each layer?

The residual stream after every block is read through the model's own head, its final norm and unembedding:

    logits[layer] = unembed(final_norm(resid[layer]))

(nostalgebraist, 2020). Early rows are read with a head that was trained for the last one, so a token that
does not show may still be there in another basis: `through` a fitted tuned lens, each layer is first translated
into that of the last. The last row must be the model's own logits; this is checked, and the lens refuses where
it is not so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Stream
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused, at_least
from pellucid.lenses.lens import (
    Lens,
    Positions,
    answer_id,
    answer_texts,
    columns,
    last_residual,
    layer_coords,
    lens_sites,
    logits,
    unembed,
)
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

CELLS = 1 << 24  # numbers of one layer's logits held at a time

# What is read at every layer and position, and the dimension it has beyond those.
READ: dict[str, tuple[str, ...]] = {
    "probability": ("top",),
    "top_token": ("top",),
    "rank": (),
    "log_probability": (),
    "kl": (),
    "entropy": (),
    "surprise": (),
    "target_rank": ("target",),
    "target_log_probability": ("target",),
}


@technique
@torch.no_grad()
def logit_lens(
    model: Model,
    prompt: Any,
    *,
    top: int = 5,
    targets: Sequence[str | int] | str | None = None,
    sites: str | Sequence[str] = ("embed", "layers.*.resid_post"),
    positions: Positions = None,
    decoder: str | Sequence[str] | None = None,
    through: Lens | None = None,
    edits: Sequence[Edit] = (),
) -> Result:
    """Read the residual stream at `sites` (of the last stack) through the model's own head.

    Gives, over layer x position (and `prompt` first, for several): `probability` and `top_token` of the `top`
    likeliest tokens; `rank`, 0 being the top, and `log_probability` of the token the model itself ends up
    with (`prediction`); `kl`, KL(model || layer), `entropy`, and `surprise`, -log p of the token that really
    comes next (NaN where none does, and in models that look ahead), in nats; for `targets`, `target_rank` and
    `target_log_probability`. The layer of what enters the first block is -1, its `site` "embed". `positions` are a number, a
    list or slice of them, a span's name or a token in quotes; they are counted on each prompt's own tokens, those past
    the end of a shorter prompt are NaN. `decoder` is the decoder's text in an encoder-decoder. `through` is a fitted lens
    (`TunedLens`, `FutureLens.at(0)`). Under `edits`, layers and predictions are those of the edited run. One layer's logits
    are held at a time.

    >>> lens = logit_lens(model, "The Eiffel Tower is located in the city of")
    >>> lens.sel(layer=20, position=9).top_token
    <xarray.DataArray 'top_token' (top: 5)>...
    """
    at_least(1, top=top)
    inputs = model.inputs(prompt, decoder=decoder)
    names = lens_sites(model, sites)
    if through is not None:
        through.check(model)
    run = model.run(inputs, keep=[*names, last_residual(model)], edits=edits)
    stream = inputs.stream("")
    at, real = columns(stream, positions)
    _check(model, run, at, stream)
    given = [targets] if isinstance(targets, str) else targets or []
    ids = [answer_id(model, t) for t in given]
    asked = Asked(_following(model, stream, at).flatten(), ids, min(top, run.logits.shape[-1]))
    rows = _rows(model, run, names, at, real, asked, through)

    made: dict[str, Any] = {}
    for name, extra in READ.items():
        flat = torch.stack([row[name] for row in rows], 1)  # [prompt * position, layer, ...]
        values = flat.unflatten(0, tuple(real.shape)).movedim(2, 1).cpu().numpy()
        values = _texts(model, values, real) if name == "top_token" else values
        made[name] = (("prompt", "layer", "position", *extra), values)
    final = run.logits[torch.arange(len(inputs))[:, None], at].argmax(-1)[:, None, :]
    made["prediction"] = (("prompt", "position"), _texts(model, final.cpu().numpy(), real)[:, 0])
    data = xr.Dataset(
        made,
        coords={
            **layer_coords(names),
            "position": _position_labels(stream, at, real),
            "token": (("prompt", "position"), _tokens(stream, at, real)),
            "target": answer_texts(model, ids).tolist(),
        },
    )
    data = data if ids else data.drop_dims("target")
    data = data.isel(prompt=0) if len(inputs) == 1 else data
    kind = "logit lens" if through is None else "tuned lens"
    return Result(data, kind=kind, title=f"{kind.capitalize()} of {model.name}")


@technique
def prediction_depth(lens: Result) -> Result:
    """From which row of a lens result on is every layer's first choice the model's own? [prompt?, position], 0 the first row.

    (Baldock et al. 2021; read with lenses by Belrose et al. 2023.) Hard examples are decided late.
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


# ---- one layer at a time


@dataclass(frozen=True, eq=False)
class Asked:
    """What is read of a layer's logits: the `top` likeliest, the `targets`, and the token that follows [cell] (-1: none)."""

    following: Tensor
    targets: list[int]
    top: int


def _rows(
    model: Model, run: Run, sites: list[str], columns: Tensor, real: Tensor, asked: Asked, through: Lens | None
) -> list[dict[str, Tensor]]:
    """For every site what its logits say at each of the prompt x position cells; NaN where no token is."""
    picked = torch.arange(len(columns), device=columns.device)[:, None]
    final = run.logits[picked, columns].flatten(0, 1)
    missing = ~real.flatten()
    rows = []
    for site in sites:
        resid = run.tensor(site)[picked, columns].flatten(0, 1)
        parts = [
            _read(logits(model, resid[part], site, through), final[part], asked.following[part], asked)
            for part in _parts(*final.shape)
        ]
        row = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        for name, values in row.items():
            if name != "top_token":
                values[missing] = float("nan")
        rows.append(row)
    return rows


def _parts(cells: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, CELLS // vocabulary)
    yield from (slice(i, i + step) for i in range(0, cells, step))


def _read(logits: Tensor, final: Tensor, following: Tensor, asked: Asked) -> dict[str, Tensor]:
    """From one layer's logits and the model's own, both [cell, vocabulary]."""
    log_p, log_final = logits.float().log_softmax(-1), final.float().log_softmax(-1)
    p, likeliest = log_p.exp(), log_p.topk(asked.top, -1)
    targets = torch.tensor(asked.targets, dtype=torch.long, device=final.device)
    wanted = torch.cat([final.argmax(-1, keepdim=True), targets.expand(len(final), -1)], -1)
    log_wanted = log_p.gather(-1, wanted)
    rank = torch.stack([(log_p > one[:, None]).sum(-1) for one in log_wanted.unbind(-1)], -1).float()
    surprise = -log_p.gather(-1, following.clamp_min(0)[:, None])[:, 0]
    return {
        "top_token": likeliest.indices,
        "probability": likeliest.values.exp(),
        "rank": rank[:, 0],
        "log_probability": log_wanted[:, 0],
        "kl": (log_final.exp() * (log_final - log_p).nan_to_num(0.0)).sum(-1),
        "entropy": -(p * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1),
        "surprise": surprise.masked_fill(following < 0, float("nan")),
        "target_rank": rank[:, 1:],
        "target_log_probability": log_wanted[:, 1:],
    }


def _following(model: Model, stream: Stream, columns: Tensor) -> Tensor:
    """[prompt, position] the token that comes next; -1 where none does, or where the model has already seen it."""
    after = (columns + 1).clamp(max=stream.ids.shape[1] - 1)
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    inside = (columns + 1 < (stream.starts + stream.lengths)[:, None]) & bool(model.anatomy.stacks[-1].causal)
    following = stream.ids[rows, after]
    return torch.where(inside.to(following.device), following, -1)


def _check(model: Model, run: Run, columns: Tensor, stream: Stream) -> None:
    """The last residual must give the model's own logits; checked at the last column of every prompt."""
    last = last_residual(model)
    if run.logits.shape[:2] != stream.ids.shape or run.tensor(last).shape[:2] != stream.ids.shape:
        raise Refused(f"{model.name} has not one residual and one row of logits for every token: no lens fits")
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    made = unembed(model, run.tensor(last)[rows, columns[:, -1:]])
    gap = error(made, run.logits[rows, columns[:, -1:]])
    if gap > 3 * TOLERANCE.get(run.logits.dtype, 4e-2):
        raise Refused(f"the last residual read through the head differs from the model's logits by {gap:.1e}")


# ---- labels


def _position_labels(stream: Stream, columns: Tensor, real: Tensor) -> list[int]:
    """Positions counted on the first prompt's tokens (all prompts', if every position is read)."""
    longest = int(real.sum(1).argmax())
    labels: list[int] = (columns - stream.starts[:, None])[longest].tolist()
    return labels


def _tokens(stream: Stream, columns: Tensor, real: Tensor) -> np.ndarray:
    index = (columns - stream.starts[:, None]).tolist()
    rows = [
        [label[i] if ok else "" for i, ok in zip(at, there, strict=True)]
        for label, at, there in zip(stream.labels, index, real.tolist(), strict=True)
    ]
    return np.array(rows, dtype=object)


def _texts(model: Model, ids: np.ndarray, real: Tensor) -> np.ndarray:
    """Numbers of logits [prompt, layer, position, ...] as text; empty where no token was read."""
    made = answer_texts(model, ids)
    missing = ~real.cpu().numpy().reshape(len(real), 1, -1, *[1] * (ids.ndim - 3))
    made[np.broadcast_to(missing, ids.shape)] = ""
    return made
