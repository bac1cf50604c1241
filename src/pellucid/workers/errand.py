"""Work on a model that is begun once and done in pieces, here or by workers: a sweep's batches, a corpus's shards, circuits.

    errand = Errand(model, "store:Shards", lambda: (about, tensors))
    for piece, found in done(errand, pieces):        # in the order of the pieces, wherever they are done
        ...

Whoever has such work writes one class, `Work`, and no loop over workers. A piece is JSON, what it gives are tensors; both depend
on nothing but the errand and the piece, so that numbers do not depend on how many workers there are.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pellucid.anatomy.modes import running
from pellucid.engine.inputs import read_inputs
from pellucid.engine.run import execute
from pellucid.engine.sweep import Where, current
from pellucid.model import Model

Tensors = dict[str, Tensor]


class Work:
    """What is begun, here or by a worker, from an errand's values; then asked for pieces."""

    errand: ClassVar[str]  # what it is called in errors

    model: Model

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def first(self) -> Tensors:
        """A run that is made here and by every worker before its first piece, and compared: by default the probe's logits."""
        anatomy = self.model.anatomy
        with torch.no_grad():
            return {"clean": execute(anatomy, read_inputs(anatomy.module, None, anatomy.inputs)).logits}

    def __call__(self, piece: Any) -> Tensors:
        raise NotImplementedError


Values = tuple[Mapping[str, Any], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Errand:
    """Work as values: the model, the name of a `Work` in pellucid, and what it is begun from (JSON and tensors)."""

    model: Model
    work: str
    values: Callable[[], Values]  # asked where it travels; Refused for what cannot
    local: Work | None = None  # what does it here, where that is begun already
    expected: Tensors | None = None  # what `first` gives here, where that is known

    def begin(self) -> Work:
        return self.local or begin(self.work, self.model, *self.values())

    @property
    def here(self) -> Tensors:
        """What `first` gives in this process."""
        if self.expected is not None:
            return self.expected
        with running(self.model.module):
            return self.begin().first()


def begin(name: str, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Work:
    """The work of that name, "store:Shards" say. TypeError for a name that is no `Work` of pellucid."""
    module, _, which = name.partition(":")
    found = getattr(importlib.import_module(f"pellucid.{module}"), which, None)
    if not (isinstance(found, type) and issubclass(found, Work)):
        raise TypeError(name)
    return found(model, about, tensors)


def told(value: Any) -> Tensor:
    """JSON as a tensor of bytes, for work that finds more than numbers.

    >>> heard(told({"a": [1, None]}))
    {'a': [1, None]}
    """
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def heard(value: Tensor) -> Any:
    return json.loads(value.numpy().tobytes())


def plain(*values: Any) -> bool:
    """Whether these are values that JSON gives back as they were."""
    try:
        return bool(json.loads(json.dumps(values)) == list(values))
    except (TypeError, ValueError):
        return False


def done(errand: Errand, pieces: Iterable[Any], on: Where | None = None) -> Iterator[tuple[Any, Tensors]]:
    """Every piece with what was found, in their order. Pieces are taken as they are needed, a few more than there are workers."""
    where = on or current()
    if where is None or not hasattr(where, "spread"):
        work = errand.begin()
        for piece in pieces:
            with running(errand.model.module):
                found = work(piece)
            yield piece, found
        return
    held: dict[int, tuple[Any, Tensors]] = {}
    following = 0
    for number, piece, found in where.spread(errand, pieces, ahead=True):
        held[number] = piece, found
        while following in held:
            yield held.pop(following)
            following += 1
