"""A span of a model's blocks and the same blocks of its variants: run side by side on one state, made one by a route (`surgery.variants`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from pellucid.anatomy.modes import accepted_by
from pellucid.engine.alone import Alone
from pellucid.engine.inputs import Inputs
from pellucid.engine.recording import BlockCall, record
from pellucid.errors import InputError, Refused
from pellucid.lenses import unembed
from pellucid.lenses.lens import Layers, layer_numbers
from pellucid.model import Model
from pellucid.surgery.remix import check_alike

Route = Literal["mean", "confidence", "gate", "random"]


@dataclass
class Span:
    """The model, the variants of layers `first` to `last`, and how single blocks of each are called."""

    model: Model
    first: int
    last: int
    own: Alone
    others: list[Alone]

    @classmethod
    def of(cls, model: Model, variants: Mapping[str, Model], layers: Layers) -> Span:
        stack = model.anatomy.stacks[-1]
        if len(model.anatomy.stacks) > 1 or not stack.causal or model.anatomy.answering.meaning != "tokens":
            raise Refused(
                f"{model.name} does not say the next token from left to right in one stack: its variants have no loss to compare"
            )
        if broken := next((b for b in stack.blocks if not b.whole or b.nth), None):
            raise Refused(
                f"layer {broken.index} of {model.name} is no module of its own, so no variant can stand beside it"
            )
        span = sorted(set(layer_numbers(model, layers)))
        if span != list(range(span[0], span[-1] + 1)) or span[-1] == len(stack.blocks) - 1:
            raise InputError(f"layers {span}: expected neighbours, with a layer of the model's own after them")
        if len(variants) < 2:
            raise InputError(f"{len(variants)} variants: expected two or more, by name")
        inside = tuple(f"{stack.blocks[i].module}." for i in span)
        ours = dict(model.module.named_parameters())
        for name, other in variants.items():
            check_alike(model, other, name)  # also of kinds: masks and positions are the model's own
            theirs = dict(other.module.named_parameters())
            for key, p in ours.items():
                q = theirs[key]
                if not key.startswith(inside) and p.data_ptr() != q.data_ptr() and not torch.equal(p, q):
                    raise InputError(
                        f"variant {name!r} differs outside layers {span[0]} to {span[-1]}, in {key}: bring in its layers alone, with surgery.remix"
                    )
        make = [Alone(each.anatomy, each.anatomy.stacks[-1], each.inputs) for each in (model, *variants.values())]
        return cls(model, span[0], span[-1], make[0], make[1:])

    def through(self, alone: Alone, x: Tensor, calls: list[BlockCall], first: int, last: int) -> Tensor:
        for block in alone.stack.blocks[first : last + 1]:
            x = alone.call(block, x, calls[block.index])
        return x

    def nll(self, seen: Seen, state: Tensor) -> Tensor:
        """[position - 1] of the text, going on from a state after the span."""
        with torch.no_grad():
            done = self.through(self.own, state, seen.calls, self.last + 1, len(self.own.stack.blocks) - 1)
            said = unembed(self.model, done)[0, :-1].float().log_softmax(-1)
        return -said.gather(1, seen.inputs.stream("").ids[0, 1:, None].to(said.device))[:, 0].cpu()

    def routed(self, seen: Seen, route: str, gate: Any, seed: int) -> tuple[Tensor, Tensor | None]:
        """The state after the span, and which variant each position [1, position] took (None: the average)."""
        states = torch.stack(seen.states)  # [variant, 1, position, d]
        if route == "mean":
            return states.mean(0), None
        if route == "random":
            chosen = torch.randint(len(states), states.shape[1:3], generator=torch.Generator().manual_seed(seed)).to(
                states.device
            )
        elif route == "gate":
            assert gate is not None
            chosen = gate.scores(seen.before).argmax(-1)
        else:
            with torch.no_grad():
                after = [self.through(self.own, s, seen.calls, self.last + 1, self.last + 1) for s in seen.states]
                chosen = torch.stack(
                    [torch.special.entr(unembed(self.model, s).float().softmax(-1)).sum(-1) for s in after]
                ).argmin(0)
        return states.gather(0, chosen[None, ..., None].expand(1, *states.shape[1:]))[0], chosen


@dataclass
class Seen:
    """One text: what the blocks before the span made of it, once, and what each variant made of that."""

    inputs: Inputs
    calls: list[BlockCall]
    before: Tensor
    states: list[Tensor]

    @classmethod
    def of(cls, span: Span, given: Inputs) -> Seen:
        accepted = accepted_by(span.model.module)
        with torch.no_grad():
            options = {k: v for k, v in {"use_cache": False, "logits_to_keep": 1}.items() if k in accepted}
            calls = record(span.model.anatomy, span.own.stack, given, **options).calls
            for call in calls:
                call.args = tuple(None if isinstance(a, Cache) else a for a in call.args)
                call.kwargs = {k: None if isinstance(v, Cache) else v for k, v in call.kwargs.items()}
            tap = span.own.stack.blocks[span.first].taps["resid_pre"]
            before = tap.layout.read(calls[span.first].hidden, len(given))
            states = [span.through(other, before, calls, span.first, span.last) for other in span.others]
        return cls(given, [replace(call, output=None) for call in calls], before, states)
