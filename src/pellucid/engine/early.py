"""A forward pass that ends at the last site that is wanted: what comes after is not computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Anatomy, Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run, Session


class _Enough(BaseException):
    """Everything wanted has been met; it never leaves this file. No Exception: a family's own code must not catch it."""


def run_until(anatomy: Anatomy, inputs: Inputs, keep: Iterable[Site | str]) -> Run:
    """A run without edits and gradients that kept some sites and stopped there; it has no logits."""
    session = Session(anatomy, inputs, keep)
    pass_until(anatomy, inputs, session.handlers())
    return Run(anatomy, inputs, None, session.kept, session.sites)


def pass_until(anatomy: Anatomy, inputs: Inputs, handlers: Mapping[Tap, Handler], *, whole: bool = False) -> set[Tap]:
    """Run until every handler has been called, without gradients; gives the taps that were met.

    The pass goes to its end where it is to be `whole`, or where modules are moved between devices by hooks that must.
    """
    met: set[Tap] = set()
    whole = whole or any(hasattr(module, "_hf_hook") for module in anatomy.module.modules())

    def heard(tap: Tap, handler: Handler) -> Handler:
        def handle(x: Tensor) -> None:
            handler(x)
            met.add(tap)
            if not whole and len(met) == len(handlers):
                raise _Enough

        return handle

    wrapped = {tap: heard(tap, handler) for tap, handler in handlers.items()}
    with torch.no_grad(), Wiretap(anatomy.module, wrapped, len(inputs)), suppress(_Enough):
        anatomy.module(**inputs.tensors)
    return met
