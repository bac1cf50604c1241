"""Edits in a file: what was done to a model, to be done again tomorrow or by somebody else.

One safetensors file: the tensors, and beside them as JSON each edit's class, site and plain values. A run among the
sources is kept as its token ids, which the model runs again. Functions are not kept: nothing in the file is code.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.changed import Weighted, check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit
from pellucid.errors import InputError

KEY = "pellucid_edits"


def save_edits(edits: Edit | Sequence[Edit], path: str | Path, *, model: Weighted | None = None) -> Path:
    """Write edits to a safetensors file; returns its path. With `model`, the file is tied to that model's weights.

    InputError, and nothing written, for an edit that holds a function (`Replace`, `when=`) or an object of its own.

    >>> import torch, tempfile, pellucid as pl
    >>> file = pl.save_edits(pl.Steer("layers.3.resid_post", torch.ones(4), 2.0), f"{tempfile.mkdtemp()}/steer.safetensors")
    >>> pl.load_edits(file)[0].strength
    2.0
    """
    tensors: dict[str, Tensor] = {}
    kept = packed([edits] if isinstance(edits, Edit) else edits, tensors)
    return write_tensors(path, KEY, {"edits": kept, "digest": model.digest if model else ""}, tensors)


def packed(edits: Sequence[Edit], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Edits as JSON; their tensors go to `tensors`."""
    kept: list[dict[str, Any]] = []
    for edit in edits:
        if not isinstance(edit, Edit):
            raise InputError(f"{edit!r} is no edit: expected some, such as [pl.Ablate('layers.0.mlp.out')]")
        values = {}
        for each in fields(edit):
            value = getattr(edit, each.name)
            if each.init and each.name != "site" and value is not None:
                values[each.name] = _plain(edit, each.name, value, tensors)
        kind = f"{type(edit).__module__.removeprefix('pellucid.')}:{type(edit).__qualname__}"
        kept.append({"kind": kind, "site": str(edit.site), "values": values})
    return kept


def unpacked(kept: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Edit]:
    """The edits that `packed` wrote down."""
    return [_made(each, tensors) for each in kept]


def load_edits(path: str | Path, *, model: Weighted | None = None) -> list[Edit]:
    """The edits that `save_edits` wrote, for `model.run(..., edits=)`.

    InputError if the file is none, or is tied to other weights than those of `model`. Edits of a file that is tied to weights
    are refused by models of others also when they are used.
    """
    with reading_tensors(path, KEY, "holds no edits: expected a file that pl.save_edits wrote") as (kept, tensors):
        made = unpacked(kept["edits"], tensors)
    if model is not None:
        check_weights(model, kept["digest"], f"what {str(path)!r} holds")
    for edit in made:
        object.__setattr__(edit, "_digest", kept["digest"])
    return made


def _plain(edit: Edit, name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """A field's value as JSON; tensors go to `tensors` under a number."""
    if isinstance(value, (Tensor, np.ndarray)):
        key = str(len(tensors))
        tensors[key] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        return {"tensor": key}
    if hasattr(value, "everywhere") and not getattr(value, "edits", True) and len(value.inputs.streams) == 1:
        stream = value.inputs.stream("")  # a run of plain prompts
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(stream.ids, stream.mask, strict=True)]
        return {"ids": rows if len(rows) > 1 else rows[0]}
    if isinstance(value, (list, tuple)):
        return [_plain(edit, name, each, tensors) for each in value]
    if isinstance(value, (str, int, float)):
        return value
    raise InputError(
        f"{edit!r} cannot be saved: {name}= holds a {type(value).__name__}; expected numbers, text, tensors, prompts, or "
        "runs of prompts without edits"
    )


def _made(kept: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    module, name = kept["kind"].split(":")
    kind = getattr(importlib.import_module(f"pellucid.{module}"), name)
    if not (isinstance(kind, type) and issubclass(kind, Edit)):
        raise TypeError(kept["kind"])
    return kind(kept["site"], **{key: _value(value, tensors) for key, value in kept["values"].items()})


def _value(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else value["ids"]
    return tuple(_value(each, tensors) for each in value) if isinstance(value, list) else value
