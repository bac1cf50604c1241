"""What does a reader hear in place of a message that is switched off?

The true circuit depends on this choice, so it is made by the user, never implied:

    "resample"        the same source's message on the aligned corrupted prompt (or on another prompt of the
                      batch)
    "mean"            its mean over all positions of the reference prompts
    "position_mean"   its mean over the reference prompts at each position
    "zero"            nothing
    "roll"            its message one position earlier in the same prompt; the first position (often a BOS)
                      keeps its own, and the second hears the last

EAP-IG's released code gives every source the same vector under its `mean`; here each source has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pellucid.causal.contrast import Asked
from pellucid.circuits.passing import Listener, forward
from pellucid.circuits.wiring import Wiring
from pellucid.engine.inputs import Inputs, Stream
from pellucid.errors import InputError, one_of

How = Literal["resample", "mean", "position_mean", "zero", "roll"]


class Recorder(Listener):
    """Keeps every message, [source, batch, position, d] with `width` positions, or minus those already there."""

    def __init__(self, sources: int, width: int, minus: Tensor | None = None) -> None:
        self.sources, self.width = sources, width
        self.messages, self.subtract = minus, minus is not None

    def wrote(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            self._keep(first, messages())

    def _keep(self, first: int, messages: Tensor) -> None:
        n, batch, length, d = messages.shape
        if self.messages is None:
            self.messages = messages.new_zeros(self.sources, batch, self.width, d)
        part = self.messages[first : first + n, :, :length]
        if self.subtract:
            part -= messages
        else:
            part.copy_(messages)


def messages_of(wiring: Wiring, inputs: Inputs) -> Tensor:
    """What every source writes on these prompts: [source, batch, position, d], as long as the longest stack."""
    recorder = Recorder(len(wiring.base.sources), wiring.width(inputs))
    with torch.no_grad():
        forward(wiring, inputs, recorder, whole=False)
    assert recorder.messages is not None
    return recorder.messages


def alternatives(wiring: Wiring, inputs: Inputs, how: How, reference: Inputs | None = None, seed: int = 0) -> Tensor:
    """The messages [source, batch, position, d] that replace those of `inputs`.

    `reference`: the corrupted prompts for "resample" (one for each prompt, of equal length), the prompts
    averaged over for the means; by default the inputs themselves, for "resample" in another order drawn by
    `seed`.
    """
    one_of(how, How, "cannot switch edges off by ")
    batch, width = len(inputs), wiring.width(inputs)
    if how == "zero":
        d = wiring.model.anatomy.stacks[0].d_model
        like = next(p for p in wiring.model.module.parameters() if p.is_floating_point())
        return like.new_zeros(()).expand(len(wiring.base.sources), batch, width, d)
    if how == "roll":
        messages = messages_of(wiring, inputs)
        for stack, span in wiring.spans().items():
            own = messages[span, :, : wiring.length(inputs, stack)]
            own.copy_(own.gather(2, _before(inputs.stream(stack), own.device)[None, ..., None].expand_as(own)))
        return messages
    if how == "resample":
        return _resampled(wiring, inputs, reference, seed)
    return _means(wiring, inputs, how, reference)


def _means(wiring: Wiring, inputs: Inputs, how: How, reference: Inputs | None) -> Tensor:
    reference = inputs if reference is None else reference
    width = wiring.width(inputs)
    messages = messages_of(wiring, reference)
    parts = [
        _mean(messages[span], reference.stream(stack), width, inputs.stream(stack), how)
        for stack, span in wiring.spans().items()
    ]
    return torch.cat(parts)


def means_of(wiring: Wiring, question: Asked, how: How) -> Tensor | None:
    """The messages [source, batch or 1, position, d] that replace those of all prompts, where these are means; None elsewhere."""
    if how not in ("mean", "position_mean"):
        return None
    made = _means(wiring, question.inputs, how, question.reference)
    return made[:, :1] if how == "mean" or not any(s.padded for s in question.inputs.streams.values()) else made


def _before(stream: Stream, device: torch.device) -> Tensor:
    """[batch, position] the column of the token before; the first real token's own, and for the second the last one's."""
    columns = torch.arange(stream.ids.shape[1], device=device)
    start, length = (x.to(device)[:, None] for x in (stream.starts, stream.lengths))
    place = columns - start
    last = start + length - 1
    before = torch.where(place == 1, last, columns - 1)
    return torch.where((place >= 1) & (place < length), before, columns)


def partners(inputs: Inputs, reference: Inputs | None, seed: int) -> Inputs:
    """The prompts that are heard instead, one for each: those given, or the prompts in another order."""
    if reference is not None:
        return reference
    batch = len(inputs)
    if batch < 2:
        raise InputError("resampling needs corrupted prompts, or several prompts to draw from")
    shift = int(torch.randint(1, batch, (), generator=torch.Generator().manual_seed(seed)))
    return inputs.rows([(i + shift) % batch for i in range(batch)])


def _resampled(wiring: Wiring, inputs: Inputs, reference: Inputs | None, seed: int) -> Tensor:
    reference = partners(inputs, reference, seed)
    for stack in wiring.stages:
        ours, theirs = inputs.stream(stack), reference.stream(stack)
        if theirs.ids.shape != ours.ids.shape or not torch.equal(theirs.mask, ours.mask):
            raise InputError(
                f"the corrupted prompts have {theirs.lengths.tolist()} tokens and the clean ones "
                f"{ours.lengths.tolist()}: "
                "expected one corrupted prompt of equal length for each; or switch off by another ablation"
            )
    return messages_of(wiring, reference)


def _mean(messages: Tensor, stream: Stream, width: int, ours: Stream, how: How) -> Tensor:
    """[source, batch, width, d] for our prompts from messages [source, row, position, d] of others, over real tokens: at
    each position counted from a row's first real token, whichever side the padding is on.
    """
    n, rows, _, d = messages.shape
    messages = messages[:, :, : stream.mask.shape[1]]
    batch, device = len(ours.ids), messages.device
    if how == "mean":
        return messages[:, stream.mask.bool()].mean(1)[:, None, None].expand(n, batch, width, d)
    longest, needed = int(stream.lengths.max()), int(ours.lengths.max())
    if longest < needed:
        raise InputError(f"the reference prompts have {longest} tokens, fewer than the {needed} of the prompts")
    index = torch.arange(longest, device=device)
    columns = (stream.starts.to(device)[:, None] + index).clamp(max=messages.shape[2] - 1)
    weight = (index < stream.lengths.to(device)[:, None]).to(messages)[None, :, :, None]
    aligned = messages.gather(2, columns[None, ..., None].expand(n, rows, longest, d))
    mean = (aligned * weight).sum(1) / weight.sum(1)
    place = torch.arange(width, device=device) - ours.starts.to(device)[:, None]
    real = (place >= 0) & (place < ours.lengths.to(device)[:, None])
    return mean[:, place.clamp(0, longest - 1)] * real[None, ..., None].to(mean)
