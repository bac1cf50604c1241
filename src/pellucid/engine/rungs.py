"""The ways to run the variants of a sweep, cheapest first.

    packed, suffix   variants join one growing batch of tokens at their first edited block and position
    packed           the same, all positions (encoders, and wherever attention looks ahead)
    stubbed          rows of one batch through the model's forward, blocks before the first edit skipped
    batched          rows of one batch through the whole forward
    single           one run after another

Each is a value without a state of its own: what is run, and what was recorded for it, is on the `Job`. Whether a rung
gives the numbers of plain runs is not for it to say: see `pellucid.engine.trial`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import accepted_by, uncached
from pellucid.anatomy.structure import Stack
from pellucid.engine.edits import Ablate, Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.packed import PackedPass, Variant
from pellucid.engine.reading import Reader, Reads
from pellucid.engine.recording import Recording, Shapes, record
from pellucid.engine.run import execute
from pellucid.engine.stubbed import run_rows
from pellucid.engine.writing import check_unconditional, placed


@dataclass(eq=False)
class Job:
    """Inputs of a model, the metric that says which logits of them are read, and the clean run that rungs start from."""

    anatomy: Anatomy
    inputs: Inputs
    metric: Reads
    shapes: Callable[[], Shapes]  # which axes of the blocks' arguments are what; learnt once per model

    @property
    def stack(self) -> Stack:
        return self.anatomy.stacks[-1]

    @property
    def length(self) -> int:
        return self.inputs.stream("").ids.shape[1]

    @property
    def read(self) -> int:
        """How many positions the metric reads."""
        return self.length if self.metric.positions is None else len(self.metric.positions)

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.anatomy, self.inputs, self.metric)

    @cached_property
    def recording(self) -> Recording:
        return record(self.anatomy, self.stack, self.inputs, **self.forward)

    def forget(self) -> None:
        """Let go of the recorded run, which holds what every block was given."""
        self.__dict__.pop("recording", None)

    @cached_property
    def forward(self) -> dict[str, Any]:
        """Arguments that spare the model work nobody reads."""
        options = uncached(self.anatomy.module)
        accepted = accepted_by(self.anatomy.module)
        positions = self.metric.positions
        if "logits_to_keep" in accepted and positions and max(positions) < 0 and not self.inputs.stream("").padded:
            options["logits_to_keep"] = -min(positions)
        return options

    @cached_property
    def shares(self) -> tuple[float, float]:
        """The shares of the unembedding and of the blocks in one forward pass, by parameters."""
        head, blocks = weights(self.anatomy)
        body = sum(blocks)
        return head / max(1, head + body), body / max(1, head + body)

    def plain(self, variant: Variant) -> Tensor:
        """What the metric reads of the whole forward pass of one variant: the truth that rungs are held against."""
        return self.reader.read(run_rows(self.anatomy, self.inputs, [variant], None)[0])


def weights(anatomy: Anatomy) -> tuple[int, list[int]]:
    """How many parameters the unembedding has, and each block of the last stack."""

    def size(name: str | None) -> int:
        return sum(p.numel() for p in anatomy.module.get_submodule(name).parameters()) if name else 0

    return size(anatomy.head.unembed if anatomy.head is not None else None), [
        size(block.module) for block in anatomy.stacks[-1].blocks
    ]


class Rung:
    """One way to run variants: as it stands, one run after another. Each class below spares more than the one above it."""

    name = "single"  # what it is called in `executor=` and in plans
    keeps = False  # whether the clean run stays recorded while variants run

    def unsuited(self, anatomy: Anatomy) -> str:
        """Why the map of a model forbids it; empty if it does not. Half precision might hide that from a trial."""
        return ""

    def unfit(self, job: Job, variants: Sequence[Variant]) -> str:
        """Why these variants, inputs or this metric cannot be run so; empty if they can."""
        return ""

    def batches(self, job: Job, variants: Sequence[Variant], memory: float) -> Iterator[list[Variant]]:
        """The variants, as they are run here, in batches of at most `memory` bytes."""
        batch: list[Variant] = []
        used = 0.0
        for v in sorted(map(self.entering, variants), key=lambda v: (v.layer, v.start, v.index)):
            size = self.room(job, v)
            if batch and (used + size > memory or not self.together(batch[0], v)):
                yield batch
                batch, used = [], 0.0
            batch.append(v)
            used += size
        if batch:
            yield batch

    def entering(self, v: Variant) -> Variant:
        """The variant with the first column that is computed here."""
        return replace(v, start=0)

    def together(self, first: Variant, other: Variant) -> bool:
        """Whether two variants may be in one batch."""
        return False

    def clean(self, job: Job) -> Tensor:
        """The logits that the metric reads without any edit, [batch, n, k] (or [batch, classes])."""
        return job.reader.read(execute(job.anatomy, job.inputs).logits)

    def run(self, job: Job, chunk: Sequence[Variant]) -> list[Tensor]:
        """The same of each variant of one of `batches`."""
        return self._rows(job, chunk, None)

    def _rows(self, job: Job, chunk: Sequence[Variant], recording: Recording | None) -> list[Tensor]:
        logits = run_rows(job.anatomy, job.inputs, chunk, recording, **job.forward)
        return [job.reader.read(rows) for rows in logits]

    def cost(self, job: Job, v: Variant) -> float:
        """At most how much of a plain forward pass a variant takes."""
        return 1.0

    def note(self, job: Job) -> str:
        """What a plan says about it besides."""
        return ""

    def room(self, job: Job, v: Variant) -> float:
        """The bytes that a variant adds to its batch: tensors of a block, and the logits."""
        block, d = job.stack.blocks[0], job.stack.d_model
        heads = sum(a.heads for a in block.attentions.values())
        width = 12 * d + 3 * block.sizes.get("neuron", 4 * d) + 3 * heads * job.length
        answered = not job.metric.classes and job.anatomy.head is not None  # else a few classes, or the residual itself
        logits = self.unembedded(job) if answered else 0
        return 4.0 * len(job.inputs) * ((job.length - v.start) * width + 2 * logits)

    def vocabulary(self, job: Job) -> int:
        return _vocabulary(job)

    def unembedded(self, job: Job) -> int:
        """How many logits are computed of each prompt."""
        return job.forward.get("logits_to_keep", job.length) * _vocabulary(job)


class Batched(Rung):
    """Rows of one batch through the whole forward."""

    name = "batched"

    def unfit(self, job: Job, variants: Sequence[Variant]) -> str:
        return "your own hooks on the model must see every run by itself" if own_hooks(job.anatomy.module) else ""

    def together(self, first: Variant, other: Variant) -> bool:
        return True


class Stubbed(Batched):
    """Rows of one batch, which enter at the block that the first edit of all of them is in."""

    name = "stubbed"
    keeps = True

    def unsuited(self, anatomy: Anatomy) -> str:
        blocks = anatomy.stacks[-1].blocks
        return SHARED if _elsewhere(anatomy.stacks[-1]) or any(b.nth for b in blocks) else ""

    def unfit(self, job: Job, variants: Sequence[Variant]) -> str:
        outside = "an edit lies outside the last stack's blocks" if any(v.layer < 0 for v in variants) else ""
        return super().unfit(job, variants) or outside

    def together(self, first: Variant, other: Variant) -> bool:
        return first.layer == other.layer

    def clean(self, job: Job) -> Tensor:
        return job.reader.read(job.recording.logits)

    def run(self, job: Job, chunk: Sequence[Variant]) -> list[Tensor]:
        return self._rows(job, chunk, job.recording)

    def cost(self, job: Job, v: Variant) -> float:
        head, body = job.shares
        layers = len(job.stack.blocks)
        return body * (layers - v.layer) / layers + head


class Packed(Stubbed):
    """One row of the tokens of all variants, each from its first edited block on; only what is read is unembedded."""

    name = "packed"

    def unsuited(self, anatomy: Anatomy) -> str:
        stack = anatomy.stacks[-1]
        if _elsewhere(stack):
            return SHARED
        if anatomy.head is None or any(p.name == "unembedding" and not p.holds for p in anatomy.proofs):
            return "no proven head"
        if any(a.route != "interface" for b in stack.blocks for a in b.attentions.values()):
            return "attention does not go through the interface"
        if any(t.source.startswith("mixer") for b in stack.blocks for s in b.states for t in s.terms):
            return "something other than attention mixes positions"
        if any(b.unmapped or not b.whole for b in stack.blocks):
            return "its blocks are not modules that can be called, or attend in ways that are not on the map"
        return ""

    def unfit(self, job: Job, variants: Sequence[Variant]) -> str:
        why = super().unfit(job, variants)
        if not why and any(w.spot.site.part == "final_norm" for v in variants for w in v.writers):
            why = "an edit lies outside the last stack's blocks"
        if not why and (job.metric.classes or job.anatomy.head is None):
            why = "the metric does not read logits of the unembedding"
        return why

    def together(self, first: Variant, other: Variant) -> bool:
        return True

    def run(self, job: Job, chunk: Sequence[Variant]) -> list[Tensor]:
        done = dict(PackedPass(job.anatomy, job.inputs, job.recording, job.shapes()).final(chunk))
        picked = [job.reader.pick(done[v], v.start, job.recording.final) for v in chunk]
        return list(job.reader.unembed(torch.stack(picked)))

    def cost(self, job: Job, v: Variant) -> float:
        (head, body), layers = job.shares, len(job.stack.blocks)
        blocks = body * (layers - v.layer) / layers * (job.length - v.start) / job.length
        return blocks + (head * job.read / job.length if job.metric.tokens is None else 0.0)

    def note(self, job: Job) -> str:
        tokens = job.metric.tokens
        rows = "all vocabulary rows" if tokens is None else f"{tokens.shape[1]} vocabulary rows"
        return f"unembedded: {job.read} position{'s' * (job.read > 1)}, {rows}"

    def unembedded(self, job: Job) -> int:
        return job.read * (_vocabulary(job) if job.metric.tokens is None else job.metric.tokens.shape[1])


class Suffix(Packed):
    """Packed, each variant from its first edited position on."""

    name = "packed, suffix"

    def unsuited(self, anatomy: Anatomy) -> str:
        return super().unsuited(anatomy) or ("" if anatomy.stacks[-1].causal else "attention looks ahead")

    def entering(self, v: Variant) -> Variant:
        return v


LADDER: tuple[Rung, ...] = (Suffix(), Packed(), Stubbed(), Batched(), Rung())

SHARED = "its layers share modules, whose calls are counted from the first layer on"


def _elsewhere(stack: Stack) -> bool:
    """Whether a layer has taps in modules that are not its own and are called for other layers too."""
    return any(t.nth and not t.module.startswith(b.module) for b in stack.blocks for t in b.taps.values())


def _vocabulary(job: Job) -> int:
    return getattr(job.anatomy.module.config, "vocab_size", None) or 0


def own_hooks(module: nn.Module) -> bool:
    """Whether the user has hooks on the model: they must see whole forward passes, one for each run."""
    hooks = (h for m in module.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return any(not str(getattr(h, "__module__", "")).startswith("pellucid.") for h in list(hooks))


def prepare(anatomy: Anatomy, inputs: Inputs, index: int, edits: Edit | Sequence[Edit]) -> Variant:
    """Place a variant's edits and find its first edited block (-1: before the last stack) and column."""
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    check_unconditional(edits)
    writers = placed(anatomy, edits)
    last = anatomy.stacks[-1]
    layer = len(last.blocks) if writers else 0
    start = inputs.stream("").ids.shape[1] - 1
    for w in writers:
        site = w.spot.site
        inside = (site.stack or last.name) == last.name and not site.part.startswith("embed.")
        here = int(site.layer or 0) if inside else -1
        layer = min(layer, len(last.blocks) if site.part == "final_norm" else here)
        reads_all = isinstance(w.edit, Ablate) and w.edit.how != "zero" and w.edit.reference is None
        stream = inputs.stream(w.spot.stream)
        columns = None if reads_all or w.spot.stream != last.name else stream.find(site.at)
        if columns is None and not reads_all and w.edit.tokens is not None and w.spot.stream == last.name:
            columns = stream.starts + w.edit.between(stream.lengths)[0]
        start = min(start, 0 if columns is None else int(columns.min()))
    return Variant(index, writers, layer, start)
