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

from pellucid.engine.edits import Edit, Patch
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.lenses.lens import Affine, Layers, Lens, Positions, layer_numbers, one_column
from pellucid.model import Model
from pellucid.question import answer_position, kind_of
from pellucid.results import Result
from pellucid.tasks.tokens import single_id, texts
from pellucid.technique import technique

NONE = -2  # the `layer` of the control, into which no state was put
IDENTITY = "cat -> cat; 1135 -> 1135; hello -> hello; ?"


@technique
@torch.no_grad()
def patchscope(
    model: Model,
    prompt: Any,
    positions: Positions = -1,
    *,
    layers: Layers = None,
    into: str = IDENTITY,
    into_positions: Positions = -1,
    into_layer: int | None = None,
    into_model: Model | None = None,
    mapping: Lens | Callable[[Tensor], Tensor] | None = None,
    targets: Sequence[str | int] = (),
    top: int = 5,
    max_new_tokens: int = 0,
    edits: Sequence[Edit] = (),
) -> Result:
    """Read the residual after each of `layers` at one position of `prompt` by putting it into the prompt `into`.

    It goes in after block `into_layer` (by default the one it came from, as in the paper's identity patchscope) of
    `into_model` (by default the same), through `mapping` if there is one: a lens, or a function [1, 1, d] -> [1, 1, d'].
    `edits` hold in the run the state is taken from. Gives over `layer`
    `probability` and `top_token` of the `top` likeliest next tokens of the target prompt, `target_rank` and
    `target_log_probability` for `targets`, and with `max_new_tokens` the generated `text`; the control without a state is `layer`
    -2, its `site` "none". InputError where the widths differ and no mapping is given, or a layer does not exist.

    >>> patchscope(model, "The Eiffel Tower", "Tower", max_new_tokens=5)
    Patchscope of LlamaForCausalLM
    patchscope: probability, top_token, text over layer 25, top 5...
    """
    reader = into_model or model
    prefix, into_prefix = model.anatomy.stacks[-1].prefix, reader.anatomy.stacks[-1].prefix
    taken = layer_numbers(model, layers)
    sites = [f"{prefix}layers.{n}.resid_post" for n in taken]
    run = model.run(prompt, keep=sites, edits=edits)
    if len(run.inputs) != 1:
        raise InputError(f"a patchscope reads one prompt at a time, got {len(run.inputs)}")
    column = one_column(run.inputs, positions, "a patchscope")[0]
    at_least(1, top=top)
    asked = reader.inputs(into)
    into_at = int(one_column(asked, into_positions, "a patchscope")[0])
    at = answer_position(reader, asked)  # InputError for a masked model's prompt without its mask
    if at is None:
        raise InputError(f"a patchscope reads tokens, and {reader.name} gives a {kind_of(reader, asked)}")
    if isinstance(mapping, Affine):
        mapping.check(model)
    puts: list[list[Patch]] = []
    for layer, site in zip(taken, sites, strict=True):
        state = run.tensor(site)[:1, column][:, None]
        if mapping is not None:
            state = mapping.translate(site, state) if hasattr(mapping, "translate") else mapping(state)
        put = layer if into_layer is None else into_layer
        puts.append([Patch(f"{into_prefix}layers.{put}.resid_post@{into_at}", _fitting(state, reader))])
    puts.append([])
    ids = [single_id(reader.tokenizer, target) for target in targets]
    rows = [_read(reader.run(into, edits=put).logits[0, at], ids, top) for put in progress(puts, "patchscope")]
    made: dict[str, Any] = {
        "probability": (("layer", "top"), np.array([p.tolist() for p, _, _, _ in rows])),
        "top_token": (("layer", "top"), texts(reader.tokenizer, [best.tolist() for _, best, _, _ in rows])),
    }
    if ids:
        made["target_rank"] = (("layer", "target"), np.array([rank for _, _, rank, _ in rows]))
        made["target_log_probability"] = (("layer", "target"), np.array([log_p for _, _, _, log_p in rows]))
    if max_new_tokens:
        said = [reader.generate(into, edits=put, max_new_tokens=max_new_tokens).text for put in puts]
        made["text"] = ("layer", np.array(said, dtype=object))
    coords: dict[str, Any] = {"layer": [*taken, NONE], "site": ("layer", [*sites, "none"])}
    data = xr.Dataset(
        made, coords=coords | ({"target": texts(reader.tokenizer, ids).tolist()} if ids else {}), attrs={"into": into}
    )
    return Result(data, kind="patchscope", title=f"Patchscope of {model.name}")


def _fitting(state: Tensor, reader: Model) -> Tensor:
    width = reader.anatomy.stacks[-1].d_model
    if state.shape[-1] != width:
        raise InputError(
            f"the state has {state.shape[-1]} numbers but {reader.name} is {width} wide: give mapping=, a function from one to the other"
        )
    return state


def _read(logits: Tensor, ids: list[int], top: int) -> tuple[Tensor, Tensor, list[int], list[float]]:
    log_p = logits.float().log_softmax(-1)
    best = log_p.topk(min(top, len(log_p)))
    ranks = [int((log_p > log_p[i]).sum()) for i in ids]
    return best.values.exp(), best.indices, ranks, [float(log_p[i]) for i in ids]
