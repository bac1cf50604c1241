"""What does the model answer when only some edges carry their message?

Every reader reads the sum of all messages, where each edge that is off brings its replacement instead:

    input of r = residual + sum over edges s -> r that are off of  (replacement of s - message of s)

Messages are those of the run itself, so a changed head changes what it sends on. The model stays as it is:
the change is made where each reader takes the stream in (`pellucid.circuits.wiring`). Masks may be fractions
between on and off, and gradients flow to them. Several masks run as one batch, from the first layer where an
edge is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pellucid.anatomy.opening import main_output
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.weights import is_packed
from pellucid.anatomy.wiretap import Handler, Wiretap, tapped
from pellucid.causal.contrast import Asked
from pellucid.circuits.ablation import How, Recorder, alternatives, messages_of
from pellucid.circuits.finding import find_wiring
from pellucid.circuits.graph import Split
from pellucid.circuits.nodes import graph_of, places
from pellucid.circuits.passing import Listener, Score, forward
from pellucid.circuits.wiring import Reading, Stage, Wiring
from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.engine.pausing import pause
from pellucid.engine.recording import Recording, record
from pellucid.engine.stubbed import skipping
from pellucid.engine.trial import told
from pellucid.errors import Refused
from pellucid.metrics import as_metric
from pellucid.model import Model

Item = TypeVar("Item")
MEMORY = 400 << 20  # bytes of messages that are held at once


def wire(model: Model, split: Split | None = None) -> Wiring:
    """The wiring of a model, found and proven once: every edge off must give the logits the replacements come
    from.

    Refused with the reason where a reader has no input of its own, or where the proof fails. InputError for
    nodes the model does not have.
    """
    split = split or Split()
    return model.memo(("wiring", split), lambda: _wire(model, split))


def _wire(model: Model, split: Split) -> Wiring:
    graph_of(model.anatomy, split)  # says at once what is wrong with the model's form, or with the split
    try:
        wiring = find_wiring(model, split)
        prove(replace(wiring, base=replace(wiring.base, split=replace(split, positions=()))))
    except Refused:
        raise
    except Exception as error:  # a family whose forward pass takes none of this
        if is_packed(model.module):
            raise Refused(
                "circuits are refused on this model: the kernels of its quantised layers take one prompt's values, not a stack of "
                f"messages ({told(error)}): load it unquantised, or use ablation and patching of whole sites"
            ) from error
        raise Refused(
            f"circuits cannot be wired on this model: a trial run of its probe failed ({told(error)})"
        ) from error
    return wiring


def prove(wiring: Wiring) -> None:
    """On the probe's two prompts: with every edge on, the logits of one; with every edge off, those of the
    other."""
    tensors = wiring.model.anatomy.inputs
    one, other = (read_inputs(wiring.model.module, None, {k: _row(v, i) for k, v in tensors.items()}) for i in (0, 1))
    free = as_metric(lambda logits: logits.flatten(1)[:, 0]).bind(None, 1)
    runner = Runner(wiring, Asked(one, other, free), messages_of(wiring, other))
    on = wiring.graph.possible.to(runner.replacements.dtype)
    with torch.no_grad():
        wanted = [main_output(wiring.model.module(**each.tensors)) for each in (one, other)]
        half = wanted[0].dtype not in (torch.float32, torch.float64)
        tolerance = TOLERANCE.get(wanted[0].dtype, 4e-2) * (
            3 if half else 30
        )  # 30 times that of half is no bound at all
        for mask, want in zip((on, 0 * on), wanted, strict=True):
            made = runner.run(mask)[1]
            assert made is not None
            gap = float((made - want).abs().max() / want.abs().max().clamp_min(1e-6))
            if not gap <= tolerance:
                raise Refused(
                    _rounded(wiring, gap)
                    or "circuits are refused on this model: something besides heads, MLPs and logits reads the "
                    f"residual stream (with {'all' if mask is on else 'no'} edges on, logits are {gap:.1e} off)"
                )
        # half precision: a draw or two may send a token to another expert; the others lie within .03, of 2 to 40 layers
        found = gaps(runner, one, other).float()
        gap = float(found.sort().values[-3 if half else -1]) / float(wanted[0].abs().max().clamp_min(1e-6))
    if not gap <= tolerance:
        raise Refused(
            _rounded(wiring, gap)
            or "circuits are refused on this model: sources with all their edges off are not those sources replaced "
            f"(logits are {gap:.1e} off), so something that circuits do not know reads the stream ({_suspects(wiring)})"
        )


def _rounded(wiring: Wiring, gap: float) -> str:
    """What is said of a model whose quantised layers round what they are given, so that messages do not add up."""
    if not is_packed(wiring.model.module):
        return ""
    return (
        "circuits are refused on this model: its quantised layers round what they are given, so what its parts write does not "
        f"add up to what is read (logits are {gap:.1e} off): load it unquantised, or use ablation and patching of whole sites"
    )


def gaps(runner: Runner, one: Inputs, other: Inputs, draws: int = 8) -> Tensor:
    """[draw] how far logits are apart when random halves of the sources have all their edges off, and when what these
    sources make is put in place where they make it.

    A source is one head, or all heads of an attention whose norm behind the projection acts on them together. Every source
    is in some draws and not in others, so that one that writes at a wrong scale, or is read by something else, shows.
    """
    wiring, base = runner.wiring, runner.wiring.base
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(draws, len(base.sources), generator=generator) < 0.5
    for w in wiring.writings:
        own = slice(w.first, w.first + w.count)
        if w.neurons or (w.writer is not None and w.writer.held):
            chosen[:, own] = chosen[:, w.first, None]
    taps = [tap for _, tap in wiring.embeds] + [w.tap for w in wiring.writings]
    theirs, _ = tapped(wiring.model.module, set(taps), 1, lambda: wiring.model.module(**other.tensors))

    def put(tap: Tap, which: Tensor) -> Handler:  # which [draw, unit]
        def handler(x: Tensor) -> Tensor:
            mine = which.to(x.device).view(draws, *[1] * (x.ndim - 2 if which.shape[1] == 1 else 1), -1)
            mine = mine if which.shape[1] == 1 else mine[..., None]
            x = x.expand(draws, *x.shape[1:])
            units = x.shape[2] if which.shape[1] > 1 else 0
            if units > which.shape[1]:  # what the projection reads beside the heads stays with none of them
                mine = torch.nn.functional.pad(mine, (0, 0, 0, units - which.shape[1]))
            return torch.where(mine, theirs[tap].to(x), x)

        return handler

    handlers = {tap: put(tap, chosen[:, i, None]) for i, (_, tap) in zip(wiring.embedding, wiring.embeds, strict=True)}
    handlers |= {w.tap: put(w.tap, chosen[:, w.first : w.first + max(1, w.heads)]) for w in wiring.writings}
    grown = one.repeated(draws)
    with Wiretap(wiring.model.module, handlers, draws):
        direct = main_output(wiring.model.module(**grown.tensors))
    n = max(1, len(wiring.graph.split.places))
    off = chosen[:, :, None].repeat_interleave(n, 1).expand(-1, -1, wiring.graph.possible.shape[1])
    on = (~off & wiring.graph.possible).to(runner.replacements.dtype)
    made = torch.cat([x for part in on.split(capacity(runner)) if (x := runner.run(part)[1]) is not None])
    return (made - direct).abs().flatten(1).amax(1)


def _suspects(wiring: Wiring) -> str:
    """What may read the stream or write to it beside the graph."""
    gated = [
        b.index for s in wiring.model.anatomy.stacks for b in s.blocks if any(a.gated for a in b.attentions.values())
    ]
    return f"the gates of the attention in layers {', '.join(map(str, gated))}" if gated else "no reader is known"


def _row(value: Any, i: int) -> Any:
    return value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value


class Masked(Listener):
    """Edits what every reader reads. `off` [variant, source, reader, place] is 1 where an edge is off, over the
    nodes without position; runs begin in block `start`."""

    def __init__(self, runner: Runner, off: Tensor, start: int) -> None:
        self.runner, self.off, self.start, self.batch = runner, off, start, len(runner.question.inputs)
        self.wiring, self.replacements = runner.wiring, runner.replacements
        self.base = self.wiring.base
        self.differences: list[tuple[int, Tensor]] = []  # [source, variant, batch, position, d]
        self.totals: dict[tuple[int, int], Any] = {}  # sources from, up to -> the sum of their differences
        self.streams: dict[Stage, Tensor] = {}  # before each norm, [variant, 1, batch, position, d]
        self.learnt = off.requires_grad and torch.is_grad_enabled()
        possible = self.base.possible[..., None] if self.learnt else off.any(0)
        self.cut = possible.any(-1)  # [source, reader]
        self.needed = self.cut.any(1)
        self.first = {i: stage.first for stages in self.wiring.stages.values() for stage in stages
                      for i in range(stage.first, stage.last)}  # fmt: skip
        if start:
            self._begin(len(off))

    def _begin(self, n: int) -> None:
        """What the blocks that are skipped would have written: the clean run's, the same for all variants."""
        for stack, stages in self.wiring.stages.items():
            length = self.wiring.length(self.runner.question.inputs, stack)
            for stage in stages:
                early = [i for i in range(stage.first, stage.last) if self.base.sources[i].depth < self.start]
                if early and bool(self.needed[early].any()):
                    difference = self.runner.differences[early[0] : early[-1] + 1, None, :, :length]
                    self.differences.append((early[0], difference))
                    self.totals[stage.first, early[-1] + 1] = difference.sum(0)
        self.streams |= {s: x[None, None].expand(n, -1, -1, -1, -1) for s, x in self.runner.streams.items()}

    def _add(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        origin = self.first[first]
        total = self.totals.get((origin, first), 0.0)
        if bool(self.needed[first : first + count].any()):
            own = messages().unflatten(1, (-1, self.batch))
            difference = self.replacements[first : first + count, None, :, : own.shape[3]] - own
            self.differences.append((first, difference))
            total = total + difference.sum(0)
        self.totals[origin, first + count] = total

    def wrote(self, first: int, count: int, messages: Callable[[], Tensor]) -> None:
        if not (self.start and self.base.sources[first].depth < self.start):
            self._add(first, count, messages)

    def passes(self, stage: Stage, x: Tensor) -> None:
        if stage.depth >= self.start:
            self.streams[stage] = x.unflatten(0, (-1, 1, self.batch))

    def reads(self, reading: Reading, native: Tensor, resid: Tensor) -> Tensor | None:
        if reading.depth < self.start:
            return None
        cut = self.cut[reading.first : reading.feeds, reading.readers].any(0).tolist()
        if not any(cut):
            return None
        reading = reading.only([i for i, c in enumerate(cut) if c])
        change = self.change(reading)
        return reading.value(resid + change.transpose(0, 1).flatten(1, 2), native)

    def change(self, reading: Reading) -> Tensor:
        """[variant, reader, batch, position, d] how the stream is changed for each reader."""
        found: Tensor | None = None
        for stage in self.wiring.stages[reading.stack]:
            last = min(stage.last, reading.feeds)
            if stage.first >= last:
                break
            part = self._sum(stage.first, last, reading.readers)
            found = part if found is None else found if part is None else found + part
            if found is not None and stage.norm is not None and last == stage.last:
                native = self.streams[stage]
                found = stage.norm(native + found) - stage.norm(native)
        assert found is not None
        return found

    def _sum(self, first: int, last: int, readers: list[int]) -> Tensor | None:
        """[variant, reader, batch, position, d] the sum of differences of the edges that are off, or, where
        those are the many, the sum of all differences minus those of the edges that are on."""
        off = self.off[:, first:last, readers]
        total = self.totals.get((first, last), 0.0)
        many = not self.learnt and float(off.mean()) > 0.5 and isinstance(total, Tensor)
        weight = off - 1 if many else off
        change = total[:, None].expand(len(off), len(readers), -1, -1, -1) if many else None
        for at, difference in self.differences:
            if not first <= at < last:
                continue
            here = weight[:, at - first : at - first + len(difference)]
            difference = difference[: here.shape[1]]
            rows = torch.ones(here.shape[1], dtype=torch.bool) if self.learnt else here.any(0).flatten(1).any(1)
            if not bool(rows.any()):
                continue
            if not bool(rows.all()):
                here, difference = here[:, rows], difference[rows]
            part = self._weighted(here, difference)
            change = part if change is None else change + part
        return change

    def _weighted(self, weight: Tensor, difference: Tensor) -> Tensor:
        """[variant, reader, batch, position, d] from weights [variant, source, reader, place]."""
        if weight.shape[-1] == 1 and difference.shape[1] == 1:
            part = weight[..., 0].mT.flatten(0, 1) @ difference.flatten(1)
            return part.unflatten(0, (len(weight), -1)).unflatten(2, difference.shape[2:])
        if weight.shape[-1] == 1:
            part = weight[..., 0].mT @ difference.flatten(2).transpose(0, 1)
            return part.unflatten(2, difference.shape[2:])
        tokens = weight[..., self.runner.places]  # [variant, source, reader, batch, position]
        return torch.einsum("vsrbt,svbtd->vrbtd", tokens, difference.expand(-1, len(weight), -1, -1, -1))


class _Kept(Recorder):
    """Keeps every message, the stream before every norm, and what every reading was given."""

    def __init__(self, wiring: Wiring, inputs: Inputs) -> None:
        super().__init__(len(wiring.base.sources), wiring.width(inputs))
        self.streams: dict[Stage, Tensor] = {}
        self.heard: dict[Reading, tuple[Tensor, Tensor]] = {}

    def passes(self, stage: Stage, x: Tensor) -> None:
        self.streams[stage] = x

    def reads(self, reading: Reading, native: Tensor, resid: Tensor) -> None:
        self.heard[reading] = (native, resid)


class Runner:
    """Runs circuits on the prompts of a question. `forwards` counts what it cost, in full passes of those prompts: a
    run from block l of L on is (L - l) / L, edges into the logits are unembedded from what is known, and the passes
    that record what replaces messages (1, for means and resampling) and the clean run (2) are counted too."""

    def __init__(self, wiring: Wiring, question: Asked, replacements: Tensor) -> None:
        self.wiring, self.question, self.replacements = wiring, question, replacements
        self.score = Score(wiring, question.inputs, question.metric)
        self.forwards = 0.0
        self.differences: Tensor = replacements  # of the clean messages, once they are needed
        self.streams: dict[Stage, Tensor] = {}
        self.heard: dict[Reading, tuple[Tensor, Tensor]] = {}
        self.places = places(question.inputs, wiring.graph.split.positions)
        self._recording: Recording | None = None

    @classmethod
    def of(cls, wiring: Wiring, question: Asked, how: How, seed: int = 0) -> Runner:
        made = alternatives(wiring, question.inputs, how, question.reference, seed)
        runner = cls(wiring, question, made)
        runner.forwards = 0.0 if how == "zero" else 1.0
        return runner

    def scores(self, on: Tensor) -> Tensor:
        """The metric [variant, batch] under each mask [variant, source, reader] (1 on, 0 off; booleans or
        numbers)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and on.requires_grad):
            return self.score(*self.run(on, whole=self.score.whole))

    def run(self, on: Tensor, whole: bool = True) -> tuple[Tensor, Tensor | None]:
        """The last residual as the logits read it, and the logits, [variant * batch, ...]."""
        on = on if on.ndim == 3 else on[None]
        on = on.to(self.replacements)
        graph = self.wiring.graph
        off = graph.fold((1 - on) * graph.possible.to(on.device))
        grad = torch.is_grad_enabled() and off.requires_grad
        start = 0 if grad else self._start(off)
        self.forwards += len(off) * (graph.depth - start + (self._before if start else 0)) / graph.depth
        pause()
        context = nullcontext()
        if start:
            self._prepare()
            anatomy, skipped = self.wiring.model.anatomy, start - self._before
            context = skipping(anatomy, self._recording, skipped, len(off), len(self.question.inputs))  # type: ignore[assignment]
        with torch.set_grad_enabled(grad), context:
            return forward(self.wiring, self._grown(len(off)), Masked(self, off, start), whole=whole)

    @property
    def _before(self) -> int:
        """How many blocks stand before the last stack; they are always run."""
        return self.wiring.graph.depth - len(self.wiring.model.anatomy.stacks[-1].blocks)

    def _start(self, off: Tensor) -> int:
        """The first block with an edge off into it; blocks before it are as in the clean run. 0 where that is in
        the encoder."""
        cut = off.any(0).any(-1).any(0).tolist()
        readers = self.wiring.base.readers
        depth = min([r.depth for r, c in zip(readers, cut, strict=True) if c], default=len(readers))
        start = min(depth, self.wiring.graph.depth)
        return start if start > self._before else 0

    def _prepare(self) -> None:
        if self._recording is None:
            stack = self.wiring.model.anatomy.stacks[-1]
            self._recording = record(self.wiring.model.anatomy, stack, self.question.inputs)
            kept = _Kept(self.wiring, self.question.inputs)
            with torch.no_grad():
                forward(self.wiring, self.question.inputs, kept, whole=False)
            assert kept.messages is not None
            self.differences = self.replacements - kept.messages
            self.streams, self.heard = kept.streams, kept.heard
            self.forwards += 2

    def silent(self, on: Tensor, reader: int) -> list[int]:
        """The sources whose message to a reader can be cut without changing what the reader computes by one bit,
        while all earlier edges are on: nothing later can change then, and no run is needed to know it."""
        self._prepare()
        graph, n = self.wiring.graph, max(1, len(self.wiring.graph.split.places))
        waiting = on[:, reader].nonzero().flatten().tolist()
        reading = next(r for r in self.wiring.readings if reader // n in r.readers)
        one = reading.only([reading.readers.index(reader // n)]) if reading.columns is not None else reading
        native, resid = self.heard[reading]

        def heard(off: Tensor) -> Tensor:
            masked = Masked(self, graph.fold(off.to(self.replacements)), graph.depth)
            masked.learnt = True  # sums message by message: subtracting from the total would round otherwise
            x = resid[None]
            if bool(off.any()):
                x = (resid + masked.change(one).transpose(0, 1)).flatten(1, 2)
            return one.value(x, native.repeat(len(off), *[1] * (native.ndim - 1))).unflatten(0, (len(off), -1))

        def cut(sources: list[int]) -> Tensor:
            off = ~on & graph.possible
            off[:, [r for r in range(len(graph.readers)) if r != reader]] = False
            off[sources, reader] = True
            return off

        found: list[int] = []
        with torch.no_grad():
            before = heard(cut([])[None])[0]
            for some in chunks(waiting, capacity(self)):
                made = heard(torch.stack([cut([s]) for s in some]))
                found += [s for s, x in zip(some, made, strict=True) if torch.equal(x, before)]
            return found if found and torch.equal(heard(cut(found)[None])[0], before) else []

    def _grown(self, n: int) -> Inputs:
        return self.question.inputs.repeated(n)


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def capacity(runner: Runner, memory: int = MEMORY) -> int:
    """How many masks to run as one batch, so that the messages of all take about `memory` bytes."""
    one = runner.replacements.numel() * runner.replacements.element_size()
    return max(1, min(64, memory // max(1, 2 * one)))
