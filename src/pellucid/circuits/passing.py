"""One forward pass of the unmodified model, met wherever a source writes and wherever a reader reads.

A `Listener` is told every message as it is written and may change what readers read; the passes of this
package (recording messages, collecting gradients, running a circuit) are listeners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pellucid.anatomy.modes import uncached
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Wiretap
from pellucid.circuits.wiring import Reading, Stage, Wiring, Writing
from pellucid.engine.inputs import Inputs
from pellucid.engine.reading import Reader
from pellucid.metrics import BoundMetric

Step = Callable[[Tensor], "Tensor | None"]


class Listener:
    """What happens during a pass: by default nothing."""

    def embed(self, i: int, x: Tensor) -> Tensor | None:
        """An embedding source [batch, position, d] before anybody reads it; a tensor returned replaces it."""
        return None

    def wrote(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        """The sources from `first` on have written; `messages()` gives [source, batch, position, d]."""

    def adds(self, first: int, x: Tensor) -> Tensor | None:
        """The contribution [batch, position, d] of the sources from `first` on; a tensor returned is added
        instead."""
        return None

    def passes(self, stage: Stage, x: Tensor) -> None:
        """The stream of a post-norm model, before the norm at the end of a stage."""

    def reads(self, reading: Reading, native: Tensor, resid: Tensor) -> Tensor | None:
        """What some readers are about to read: `native` at their tap, from the residual `resid`."""
        return None


class _Stop(Exception):
    """The last residual has been read; the unembedding need not run."""


def forward(
    wiring: Wiring,
    inputs: Inputs,
    listener: Listener,
    *,
    whole: bool = True,
    also: Mapping[Tap, Step] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the inputs; returns the last residual as the logits read it and, if `whole`, the logits. `also`:
    more handlers."""
    met: dict[Tap, Tensor] = {}  # streams and neurons that are needed later in the pass
    seen: list[Tensor] = []

    def keep(tap: Tap) -> Callable[[Tensor], None]:
        def meet(x: Tensor) -> None:
            met[tap] = x

        return meet

    def embed(i: int) -> Callable[[Tensor], Tensor | None]:
        width = wiring.length(inputs, wiring.embeds[i][0])

        def meet(x: Tensor) -> Tensor | None:
            new = listener.embed(i, x)
            shown = x if new is None else new
            listener.wrote(wiring.embedding[i], 1, lambda: shown.expand(len(inputs), width, -1)[None])
            return new

        return meet

    def writes(w: Writing) -> Callable[[Tensor], None]:
        return lambda x: listener.wrote(w.first, w.count, lambda: w.messages(x, met.get(w.acts) if w.acts else None))

    def reads(r: Reading) -> Callable[[Tensor], Tensor | None]:
        def meet(x: Tensor) -> Tensor | None:
            new = listener.reads(r, x, x if r.stream is None else met[r.stream])
            if r is wiring.final:
                seen.append(x if new is None else new)
                if not whole:
                    raise _Stop
            return new

        return meet

    steps: list[tuple[Tap, Step]] = [(tap, embed(i)) for i, (_, tap) in enumerate(wiring.embeds)]
    kept = {r.stream for r in wiring.readings} | {w.acts for w in wiring.writings}
    steps += [(t, keep(t)) for t in kept if t is not None]
    steps += [
        (s.before, lambda x, s=s: listener.passes(s, x))  # type: ignore[misc]
        for stages in wiring.stages.values() for s in stages if s.before is not None
    ]  # fmt: skip
    steps += [(w.tap, writes(w)) for w in wiring.writings]
    steps += [(w.adds, lambda x, first=w.first: listener.adds(first, x)) for w in wiring.writings]  # type: ignore[misc]
    steps += [(r.tap, reads(r)) for r in wiring.readings]
    steps += (also or {}).items()
    handlers: dict[Tap, Step] = {}
    for tap, step in steps:
        handlers[tap] = _then(handlers[tap], step) if tap in handlers else step
    logits, module = None, wiring.model.module
    try:
        with Wiretap(module, handlers, len(inputs)):
            logits = main_output(module(**{**uncached(module), **inputs.tensors}))
    except _Stop:
        pass
    return seen[0], logits


def _then(first: Step, second: Step) -> Step:
    def both(x: Tensor) -> Tensor | None:
        made = first(x)
        again = second(x if made is None else made)
        return made if again is None else again

    return both


class Score:
    """A metric of the answer, from as little of the unembedding as it needs."""

    def __init__(self, wiring: Wiring, inputs: Inputs, metric: BoundMetric) -> None:
        anatomy = wiring.model.anatomy
        self.inputs, self.metric, self.reader = inputs, metric, Reader(anatomy, inputs, metric)
        usable = anatomy.head is not None and "head" not in anatomy.refusals
        self.whole = not usable or metric.positions is None or metric.classes  # whether it needs the model's own logits

    def __call__(self, final: Tensor, logits: Tensor | None) -> Tensor:
        """[variant, batch] from the last residuals [variant * batch, position, d] or logits."""
        batch = len(self.inputs)
        if logits is not None:
            parts = logits.unflatten(0, (-1, batch))
            return torch.stack([self.metric.score(each, self.inputs.stream("").mask) for each in parts])
        parts = final.unflatten(0, (-1, batch))
        picked = torch.stack([self.reader.pick(each, 0, each) for each in parts])
        return torch.stack([self.metric(each) for each in self.reader.unembed(picked)])
