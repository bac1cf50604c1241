"""One block called by itself.

What the rest of the model would hand it besides its residual (masks, position embeddings) is recorded from a
forward pass of a prompt, or of dummy tokens of the same batch and length. A block that does not repeat its
recorded call is refused, and so is one whose other arguments depend on the tokens where no prompt is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import differentiable, running, uncached
from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.anatomy.structure import Block, Stack, Tap
from pellucid.anatomy.trace import take
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.inputs import Inputs
from pellucid.engine.recording import BlockCall, record
from pellucid.errors import InputError, PellucidError, Refused


class Alone:
    """Calls single blocks of a stack; the arguments of the last batch and length are kept."""

    def __init__(self, anatomy: Anatomy, stack: Stack, read: Any) -> None:
        self.anatomy, self.stack, self.read = anatomy, stack, read
        self._last: tuple[tuple[int, int] | None, list[BlockCall]] = (None, [])

    def calls(self, batch: int, length: int, prompt: Any = None) -> list[BlockCall]:
        """Every block's recorded call for residuals of this size."""
        with running(self.anatomy.module):
            if prompt is not None:
                return self._fitting(self.recorded(self.read(prompt)), batch, length)
            if self._last[0] != (batch, length):
                self._last = ((batch, length), self._record(batch, length))
            return self._last[1]

    def _record(self, batch: int, length: int) -> list[BlockCall]:
        first, second = (self._fitting(self.dummy(batch, length, shift), batch, length) for shift in (0, 5))
        for block, a, b in zip(self.stack.blocks, first, second, strict=True):
            name = differs(self.others(block, a), self.others(block, b))
            if name is not None:
                raise Refused(
                    f"layer {block.index} also reads {name!r}, which depends on the tokens: say which with "
                    ".run(resid, prompt=...)"
                )
        return first

    def _fitting(self, calls: list[BlockCall], batch: int, length: int) -> list[BlockCall]:
        layout = self.stack.blocks[0].taps["resid_pre"].layout
        found = tuple(layout.read(calls[0].hidden, batch).shape[:2])
        if found != (batch, length):
            raise InputError(
                f"the residuals are [{batch}, {length}, d_model], but the prompt gives {list(found)}: give "
                "the prompt they come from"
            )
        return calls

    def dummy(self, batch: int, length: int, shift: int = 0) -> list[BlockCall]:
        """Every block's call on the probe's tokens, repeated or cut to this size and shifted."""
        own = "decoder" if self.stack.name == "decoder" else ""
        made: dict[str, Any] = {}
        for name, value in self.anatomy.inputs.items():
            if isinstance(value, Tensor) and value.ndim:
                value = value[torch.arange(batch) % len(value)]
                if value.ndim > 1:
                    columns = torch.arange(length if name.startswith(own) else value.shape[1])
                    value = value[:, (columns + shift) % value.shape[1]]
            made[name] = value
        try:
            return self.recorded(Inputs(made, {}, ()))
        except PellucidError:
            raise
        except Exception as e:  # not every family runs on any number of tokens
            raise Refused(
                f"this model does not run on {batch} x {length} dummy tokens ({type(e).__name__}): name the prompt"
            ) from e

    def recorded(self, inputs: Inputs) -> list[BlockCall]:
        """Every block's call in a run of these inputs; Refused where a block alone does not repeat its own."""
        broken = next((b for b in self.stack.blocks if not b.whole), None)
        if broken is not None:
            raise Refused(f"layer {broken.index} of this model is no module of its own, so it cannot be called alone")
        calls = record(self.anatomy, self.stack, inputs, **uncached(self.anatomy.module)).calls
        for block, call in zip(self.stack.blocks, calls, strict=True):  # caches remember: they are left out
            call.args = tuple(None if isinstance(a, Cache) else a for a in call.args)
            call.kwargs = {k: None if isinstance(v, Cache) else v for k, v in call.kwargs.items()}
            rows, enter = len(inputs.tensors["input_ids"]), block.taps["resid_pre"]
            again = self.call(block, enter.layout.read(call.hidden, rows), call)
            if error(again, self.output(block, call, rows)) > TOLERANCE.get(again.dtype, 4e-2):
                raise Refused(f"layer {block.index} called alone does not repeat what it did in the model")
        return calls

    def call(self, block: Block, resid: Tensor, call: BlockCall, handlers: dict[Tap, Handler] | None = None) -> Tensor:
        """The block's new residual from `resid` [batch, position, d_model], with handlers on taps inside it.

        Taps are counted from the block's start: see `within`. A graph is kept where the residual requires grad.
        """
        self.anatomy.check()
        enter, leave = block.taps["resid_pre"], block.taps["resid_post"]
        native = enter.layout.write(resid)
        args = tuple(native if i == enter.key else a for i, a in enumerate(call.args))
        kwargs = {k: native if k == enter.key else v for k, v in call.kwargs.items()}
        with (
            differentiable(self.anatomy.module, resid.requires_grad),
            Wiretap(self.anatomy.module, handlers or {}, len(resid)),
        ):
            output = self.module(block)(*args, **kwargs)
        return leave.layout.read(take(output, leave.key), len(resid))

    def others(self, block: Block, call: BlockCall) -> dict[int | str, Any]:
        """What the block is given besides its residual."""
        key = block.taps["resid_pre"].key
        given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        return {k: v for k, v in given if k != key}

    def output(self, block: Block, call: BlockCall, rows: int) -> Tensor:
        """The residual [batch, position, d_model] that a recorded call gave."""
        leave = block.taps["resid_post"]
        return leave.layout.read(take(call.output, leave.key), rows)

    def module(self, block: Block) -> nn.Module:
        return self.anatomy.module.get_submodule(block.module)


def within(block: Block, tap: Tap) -> Tap:
    """The tap as it is met when the block alone is called: layers that share modules start counting anew."""
    mine = sorted({t.nth for t in block.taps.values() if t.module == tap.module})
    return replace(tap, nth=mine.index(tap.nth) if tap.nth in mine else 0)


def differs(a: Any, b: Any, name: str = "") -> str | None:
    """The name of the first tensor in which two trees differ."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
        return None if same else name
    items: Any = a.items() if isinstance(a, Mapping) else enumerate(a) if isinstance(a, (tuple, list)) else ()
    for key, value in items:
        found = differs(value, b[key], name or str(key))
        if found is not None:
            return found
    return None
