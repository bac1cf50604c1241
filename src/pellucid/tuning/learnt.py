"""Objectives that bring parameters of their own: trained with an arm, kept on disk, and tied to the weights they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.tuning.data import Encoded
from pellucid.tuning.objective import Objective

L = TypeVar("L", bound="Learnt")


@dataclass(frozen=True)
class Learnt(Objective):
    """Base of these: a value that `fit` is given, and once begun what an arm learns with it. What was learnt is in `state_` ("tensors", "digest", plain values), empty in the value that is passed to `fit`."""

    state_: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.state_.get("tensors", {}).items() if not name.startswith("fixed.")}

    def beside(self, model: Model, data: Encoded, seed: int) -> dict[str, Tensor]:
        return self.parameters

    def ended(self: L, model: Model) -> L:
        self.state_.update(digest=model.digest)
        return self

    def belongs(self, model: Model) -> None:
        """InputError where it was not fitted, or belongs to other weights."""
        if not self.state_:
            raise InputError(
                f"this {type(self).__name__} was not fitted: take the one in tuned.objectives['objective'], or load one"
            )
        check_weights(model, self.state_.get("digest"), f"the {type(self).__name__}")

    def save(self, path: str | Path) -> Path:
        """One safetensors file: settings, parameters, and the digest of the weights it belongs to."""
        if "digest" not in self.state_:
            raise InputError(
                f"this {type(self).__name__} was not fitted: take the one in tuned.objectives['objective']"
            )
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        plain = {k: v for k, v in self.state_.items() if k != "tensors" and not k.startswith("_")}
        return write_tensors(
            path,
            f"pellucid_{type(self).__name__.lower()}",
            {"settings": settings, "state": plain},
            self.state_["tensors"],
        )

    @classmethod
    def load(cls: type[L], path: str | Path) -> L:
        """What `save` wrote; InputError for another file. Then `check(model)`.

        >>> Bottleneck.load("concepts.safetensors").check(guided.model)
        """
        said = f"is no saved {cls.__name__}"
        with reading_tensors(path, f"pellucid_{cls.__name__.lower()}", said) as (about, tensors):
            made = cls(**about["settings"])
            made.state_.update(about["state"], tensors=tensors)
        return made
