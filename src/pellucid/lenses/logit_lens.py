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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.anatomy.sites import Position, Site
from pellucid.engine.inputs import Stream
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks.tokens import single_id, texts

if TYPE_CHECKING:
    from pellucid.lenses.tuned_lens import TunedLens

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


def unembed(model: Model, resid: Tensor) -> Tensor:
    """Logits [batch, position, vocabulary] of residuals [batch, position, d_model], by the model's own head.

    Every step between the last block and the logits is run: norms, transforms, scaling, soft-capping. Refused
    where the proof `unembedding` does not hold.
    """
    head = model.anatomy.head
    if head is None or "head" in model.anatomy.refusals:
        why = model.anatomy.refusals.get("head", "this model has no head that reads its last residual")
        raise Refused(f"{model.name} cannot be read through its head: {why}")
    for step in head.steps:
        resid = step(resid)
    return resid


@torch.no_grad()
def logit_lens(
    model: Model,
    prompt: Any,
    *,
    top: int = 5,
    targets: Sequence[str | int] | str | None = None,
    sites: str | Sequence[str] = ("embed", "layers.*.resid_post"),
    positions: Position = None,
    target: str | Sequence[str] | None = None,
    through: TunedLens | None = None,
) -> Result:
    """Read the residual stream at `sites` (of the last stack) through the model's own head.

    Gives, over layer x position (and `prompt` first, for several): `probability` and `top_token` of the `top`
    likeliest tokens; `rank`, 0 being the top, and `log_probability` of the token the model itself ends up
    with (`prediction`); `kl`, KL(model || layer), `entropy`, and `surprise`, -log p of the token that really
    comes next (NaN where none does, and in models that look ahead), in nats; for `targets`, `target_rank` and
    `target_log_probability`. The layer of what enters the first block is "embed". `positions` narrows as `@` does
    in sites; positions are counted on each prompt's own tokens, those past the end of a shorter prompt are NaN.
    `target` is the decoder's text in an encoder-decoder. `through` is a fitted `TunedLens`. One layer's logits are
    held at a time.

    >>> lens = logit_lens(model, "The Eiffel Tower is located in the city of")  # doctest: +SKIP
    >>> lens.sel(layer=25, position=9).top_token  # doctest: +SKIP
    """
    inputs = model.inputs(prompt, decoder=target)
    names = lens_sites(model, sites)
    if through is not None:
        through.check(model)
    last = f"{model.anatomy.stacks[-1].prefix}layers.{len(model.anatomy.stacks[-1].blocks) - 1}.resid_post"
    run = model.run(inputs, keep=[*names, last])
    stream = inputs.stream("")
    columns, real = _columns(stream, positions)
    _check(model, run, last, columns, stream)
    ids = _target_ids(model, targets)
    asked = Asked(_following(model, stream, columns).flatten(), ids, min(top, run.logits.shape[-1]))
    rows = _rows(model, run, names, columns, real, asked, through)

    made: dict[str, Any] = {}
    for name, extra in READ.items():
        flat = torch.stack([row[name] for row in rows], 1)  # [prompt * position, layer, ...]
        values = flat.unflatten(0, tuple(real.shape)).movedim(2, 1).cpu().numpy()
        values = _texts(model, values, real) if name == "top_token" else values
        made[name] = (("prompt", "layer", "position", *extra), values)
    final = run.logits[torch.arange(len(inputs))[:, None], columns].argmax(-1)[:, None, :]
    made["prediction"] = (("prompt", "position"), _texts(model, final.cpu().numpy(), real)[:, 0])
    data = xr.Dataset(
        made,
        coords={
            "layer": np.array([_layer(s) for s in names], dtype=object),
            "site": ("layer", names),
            "position": _position_labels(stream, columns, real),
            "token": (("prompt", "position"), _tokens(stream, columns, real)),
            "target": texts(model.tokenizer, ids).tolist(),
        },
    )
    data = data if ids else data.drop_dims("target")
    data = data.isel(prompt=0) if len(inputs) == 1 else data
    provenance = Provenance(
        "logit_lens", model.name, digest=model.digest, inputs=list(inputs.texts),
        arguments={"top": top, "targets": targets, "sites": sites, "positions": positions, "target": target,
                   "through": None if through is None else f"tuned lens, {len(through.losses)} steps"},
    )  # fmt: skip
    kind = "logit lens" if through is None else "tuned lens"
    return Result(data, kind=kind, title=f"{kind.capitalize()} of {model.name}", provenance=provenance)


# ---- one layer at a time


@dataclass(frozen=True, eq=False)
class Asked:
    """What is read of a layer's logits: the `top` likeliest, the `targets`, and the token that follows [cell] (-1: none)."""

    following: Tensor
    targets: list[int]
    top: int


def _rows(
    model: Model, run: Run, sites: list[str], columns: Tensor, real: Tensor, asked: Asked, through: TunedLens | None
) -> list[dict[str, Tensor]]:
    """For every site what its logits say at each of the prompt x position cells; NaN where no token is."""
    picked = torch.arange(len(columns), device=columns.device)[:, None]
    final = run.logits[picked, columns].flatten(0, 1)
    missing = ~real.flatten()
    rows = []
    for site in sites:
        resid = run.tensor(site)[picked, columns].flatten(0, 1)
        if through is not None:
            resid = through.translate(site, resid.float()).to(resid.dtype)
        parts = [
            _read(unembed(model, resid[part][None])[0], final[part], asked.following[part], asked)
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
    return torch.where(inside, stream.ids[rows, after], -1)


def _check(model: Model, run: Run, last: str, columns: Tensor, stream: Stream) -> None:
    """The last residual must give the model's own logits; checked at the last column of every prompt."""
    if run.logits.shape[:2] != stream.ids.shape or run.tensor(last).shape[:2] != stream.ids.shape:
        raise Refused(f"{model.name} has not one residual and one row of logits for every token: no lens fits")
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    made = unembed(model, run.tensor(last)[rows, columns[:, -1:]])
    gap = error(made, run.logits[rows, columns[:, -1:]])
    if gap > 3 * TOLERANCE.get(run.logits.dtype, 4e-2):
        raise Refused(f"the last residual read through the head differs from the model's logits by {gap:.1e}")


# ---- sites, positions, labels


def lens_sites(model: Model, sites: str | Sequence[str]) -> list[str]:
    """The residuals, or what is added to them, that patterns name on the last stack. InputError for others."""
    patterns = [sites] if isinstance(sites, str) else list(sites)
    prefix = model.anatomy.stacks[-1].prefix
    found = [
        site
        for pattern in patterns
        for site in model.sites(pattern if pattern.startswith(prefix) else prefix + pattern)
    ]
    for site in found:
        if site.dims != ("batch", "position", "d_model") or site.at is not None:
            raise InputError(
                f"{str(site)!r} is no residual at every position; the lens reads sites such as layers.*.resid_post"
            )
    return [str(site) for site in found]


def _layer(site: str) -> int | str:
    layer = Site.parse(site).layer
    assert layer is None or isinstance(layer, int)
    return "embed" if layer is None else layer


def _columns(stream: Stream, positions: Position) -> tuple[Tensor, Tensor]:
    """The columns [prompt, position] to read, and which of them hold a token."""
    found = stream.find(positions)
    if found is not None:
        return found, torch.ones_like(found, dtype=torch.bool)
    index = torch.arange(int(stream.lengths.max()), device=stream.ids.device)
    real = index < stream.lengths[:, None]
    return (stream.starts[:, None] + index).clamp(max=stream.ids.shape[1] - 1), real


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


def _target_ids(model: Model, targets: Sequence[str | int] | str | None) -> list[int]:
    if targets is None:
        return []
    return [single_id(model.tokenizer, t) for t in ([targets] if isinstance(targets, str) else targets)]


def _texts(model: Model, ids: np.ndarray, real: Tensor) -> np.ndarray:
    """Token ids [prompt, layer, position, ...] as text; empty where no token was read."""
    made = texts(model.tokenizer, ids)
    missing = ~real.cpu().numpy().reshape(len(real), 1, -1, *[1] * (ids.ndim - 3))
    made[np.broadcast_to(missing, ids.shape)] = ""
    return made
