"""Edits and changes in a file: what was done to a model, to be done again tomorrow or by somebody else.

One safetensors file: the tensors, and beside them as JSON each edit's (or change's) class and plain values. A run among the
sources of an edit is kept as its token ids, which the model runs again. Functions and modules are not kept: nothing in the file
is code.

Changes are kept as what they are, a change of low rank as its factors, and are tied to the weights they are made on. What the
changes do not say (a changed model that was then trained, or written to) is kept as whole parameters beside them. The digest of
the changed weights is kept too: changes that give other weights when they are made again are refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.changed import Change, Replaced, Weighted, applied, check_weights, same, slots
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit
from pellucid.errors import InputError

KEY, CHANGES = "pellucid_edits", "pellucid_changes"


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
    """Edits as JSON; their tensors go to `tensors`, one that is met again once."""
    kept: list[dict[str, Any]] = []
    met: dict[int, str] = {}
    for edit in edits:
        if not isinstance(edit, Edit):
            raise InputError(f"{edit!r} is no edit: expected some, such as [pl.Ablate('layers.0.mlp.out')]")
        values = {}
        for each in fields(edit):
            value = getattr(edit, each.name)
            if each.init and each.name != "site" and value is not None:
                values[each.name] = _plain(edit, each.name, value, tensors, met)
        kept.append({"kind": _kind(edit), "site": str(edit.site), "values": values})
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


class Based(Weighted, Protocol):
    """A model and its module."""

    module: nn.Module


def save_changes(base: Based, changes: Sequence[Change], changed: Based, path: str | Path) -> Path:
    """Write the changes that make `changed` of `base`; returns the path. See `Model.save_changes`."""
    tensors: dict[str, Tensor] = {}

    def written(change: Change) -> dict[str, Any]:
        if not type(change).__module__.startswith("pellucid."):
            raise InputError(f"{change!r} cannot be saved: its class is no part of pellucid, and a file holds no code")
        values = {name: _plain(change, name, value, tensors) for name, value in change.settings().items()}
        return {"kind": _kind(change), "values": values}

    said = [written(change) for change in changes]
    beyond = [written(change) for change in _beyond(applied(base.module, changes), changed.module)]
    about = {"changes": said, "beyond": beyond, "digest": changed.digest}
    return write_tensors(path, CHANGES, {**about, "base": {"name": base.name, "digest": base.digest}}, tensors)


def load_changes(path: str | Path, base: Weighted) -> tuple[tuple[Change, ...], str]:
    """The changes of a file, for the model they were made on, and the digest of what they make of it."""
    with reading_tensors(path, CHANGES, "holds no changes: expected a file that save_changes wrote") as (kept, tensors):
        made = tuple(_changed(each, tensors) for each in (*kept["changes"], *kept["beyond"]))
        named, digest, ends = kept["base"]["name"], kept["base"]["digest"], kept["digest"]
    if digest != base.digest:
        raise InputError(
            f"what {str(path)!r} holds was made on {named} ({digest[:12]}), and the weights of {base.name} are others "
            f"({base.digest[:12]}): open that model, in the dtype it had"
        )
    return made, ends


def _beyond(said: nn.Module, found: nn.Module) -> Iterator[Replaced]:
    """What a model's parameters are where its changes do not make them so."""
    theirs, ours = slots(said), slots(found)
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())[0]
        raise InputError(
            f"modules were exchanged since this model was made ({odd}): that cannot be told as its changes"
        )
    done: list[Tensor] = []
    for name, slot in ours.items():
        own, other = getattr(*slot), getattr(*theirs[name])
        if not same(own, other) and not any(same(own, each) for each in done) and not torch.equal(own, other.to(own)):
            done.append(own)
            yield Replaced(name, own, ties="together")


def _kind(value: Edit | Change) -> str:
    return f"{type(value).__module__.removeprefix('pellucid.')}:{type(value).__qualname__}"


def _class(kind: str, of: type) -> Any:
    module, name = kind.split(":")
    found = getattr(importlib.import_module(f"pellucid.{module}"), name)
    if not (isinstance(found, type) and issubclass(found, of)):
        raise TypeError(kind)
    return found


def _changed(kept: dict[str, Any], tensors: dict[str, Tensor]) -> Change:
    made: Change = _class(kept["kind"], Change)(**{key: _value(each, tensors) for key, each in kept["values"].items()})
    return made


def _plain(
    edit: Edit | Change, name: str, value: Any, tensors: dict[str, Tensor], met: dict[int, str] | None = None
) -> Any:
    """A field's value as JSON; tensors go to `tensors` under a number, which `met` knows for those that are there."""
    if isinstance(value, (Tensor, np.ndarray)):
        key = (met or {}).get(id(value), str(len(tensors)))
        if key not in tensors:
            tensors[key] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        if met is not None:
            met[id(value)] = key
        return {"tensor": key}
    if hasattr(value, "everywhere") and not getattr(value, "edits", True) and len(value.inputs.streams) == 1:
        stream = value.inputs.stream("")  # a run of plain prompts
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(stream.ids, stream.mask, strict=True)]
        return {"ids": rows if len(rows) > 1 else rows[0]}
    if isinstance(value, (list, tuple)):
        return [_plain(edit, name, each, tensors, met) for each in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    expected = "prompts, or runs of prompts without edits" if isinstance(edit, Edit) else "or lists of them"
    raise InputError(
        f"{edit!r} cannot be saved: {name}= holds a {type(value).__name__}, and a file holds no code; expected numbers, text, "
        f"tensors, {expected}"
    )


def _made(kept: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    values = {key: _value(value, tensors) for key, value in kept["values"].items()}
    made: Edit = _class(kept["kind"], Edit)(kept["site"], **values)
    return made


def _value(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else value["ids"]
    return tuple(_value(each, tensors) for each in value) if isinstance(value, list) else value
