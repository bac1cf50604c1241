"""What does a hidden state say when it is put into another prompt?

    (prompt S, position i, model M, layer l) -> map f -> (prompt T, position i*, model M*, layer l*)

The state is taken from the source run and put in place of a token of a target prompt that makes the model speak about
that token; the run goes on, and what is said is what the state holds (Ghandeharioun et al. 2024). With the target
prompt "cat -> cat; 1135 -> 1135; hello -> hello; ?" it names its token, with "Syria: a country in the Middle East,
Leonardo DiCaprio: an American actor, x" it describes the entity. The logit lens is the case T = S, i* = i, l* = last.
As a control the same target prompt is read without a state in it: what it says then is the prompt's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Patch
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks.tokens import single_id

IDENTITY = "cat -> cat; 1135 -> 1135; hello -> hello; ?"


@torch.no_grad()
def patchscope(
    model: Model,
    prompt: Any,
    position: int | str = -1,
    *,
    layers: str | int = "*",
    into: str = IDENTITY,
    into_position: int | str = -1,
    into_layer: int | None = None,
    into_model: Model | None = None,
    mapping: Callable[[Tensor], Tensor] | None = None,
    targets: Sequence[str | int] = (),
    top: int = 5,
    max_new_tokens: int = 0,
) -> Result:
    """Read the residual after each of `layers` at one position of `prompt` by putting it into the prompt `into`.

    It goes in after block `into_layer` (by default the one it came from, as in the paper's identity patchscope) of
    `into_model` (by default the same), through `mapping` [1, 1, d] -> [1, 1, d'] if there is one. Gives over `layer`
    `probability` and `top_token` of the `top` likeliest next tokens of the target prompt, `target_rank` and
    `target_log_probability` for `targets`, and with `max_new_tokens` the generated `text`; the row "none" is the control
    without a state. InputError where the widths differ and no mapping is given, or a layer does not exist.

    >>> patchscope(model, "The Eiffel Tower", "Tower", max_new_tokens=5)  # doctest: +SKIP
    """
    reader = into_model or model
    prefix, into_prefix = model.anatomy.stacks[-1].prefix, reader.anatomy.stacks[-1].prefix
    sites = model.sites(f"{prefix}layers.{layers}.resid_post")
    taken = [int(site.layer or 0) for site in sites]
    at = position if isinstance(position, int) else repr(position)
    into_at = into_position if isinstance(into_position, int) else repr(into_position)
    run = model.run(prompt, keep=sites)
    if len(run.inputs) != 1:
        raise InputError(f"a patchscope reads one prompt at a time, got {len(run.inputs)}")
    edits: list[list[Patch]] = []
    for layer, site in zip(taken, sites, strict=True):
        state = run.tensor(f"{site}@{at}")
        state = state if mapping is None else mapping(state)
        put = layer if into_layer is None else into_layer
        edits.append([Patch(f"{into_prefix}layers.{put}.resid_post@{into_at}", _fitting(state, reader))])
    edits.append([])
    ids = [single_id(reader.tokenizer, target) for target in targets]
    rows = [_read(reader.run(into, edits=edit).logits[0, -1], ids, top) for edit in edits]
    decode = reader.tokenizer.decode
    made: dict[str, Any] = {
        "probability": (("layer", "top"), np.array([p.tolist() for p, _, _, _ in rows])),
        "top_token": (
            ("layer", "top"),
            np.array([[decode([i]) for i in best.tolist()] for _, best, _, _ in rows], dtype=object),
        ),
    }
    if ids:
        made["target_rank"] = (("layer", "target"), np.array([rank for _, _, rank, _ in rows]))
        made["target_log_probability"] = (("layer", "target"), np.array([log_p for _, _, _, log_p in rows]))
    if max_new_tokens:
        said = [reader.generate(into, edits=edit, max_new_tokens=max_new_tokens).text for edit in edits]
        made["text"] = ("layer", np.array(said, dtype=object))
    coords: dict[str, Any] = {"layer": np.array([*taken, "none"], dtype=object)}
    data = xr.Dataset(
        made, coords=coords | ({"target": [decode([i]) for i in ids]} if ids else {}), attrs={"into": into}
    )
    provenance = Provenance(
        "patchscope", model.name, digest=model.digest, inputs=list(run.inputs.texts),
        arguments={"position": position, "layers": layers, "into": into, "into_position": into_position,
                   "into_layer": into_layer, "into_model": reader.name, "mapping": getattr(mapping, "__name__", mapping)},
    )  # fmt: skip
    return Result(data, kind="patchscope", title=f"Patchscope of {model.name}", provenance=provenance)


def _fitting(state: Tensor, reader: Model) -> Tensor:
    width = reader.anatomy.stacks[-1].d_model
    if state.shape[-1] != width:
        raise InputError(
            f"the state has {state.shape[-1]} numbers but {reader.name} is {width} wide: give mapping=, a function from one to the other"
        )
    return state


def _read(logits: Tensor, ids: list[int], top: int) -> tuple[Tensor, Tensor, list[int], list[float]]:
    log_p = logits.float().log_softmax(-1)
    best = log_p.topk(top)
    ranks = [int((log_p > log_p[i]).sum()) for i in ids]
    return best.values.exp(), best.indices, ranks, [float(log_p[i]) for i in ids]
