"""A sweep is a query: score this input under each of these many sets of edits. The planner chooses how.

The ways to run variants, cheapest first, are the rungs of `pellucid.engine.rungs`; a sweep takes the first one that
reproduces plain runs on this model and serves these edits and this metric, and goes on with the next where a batch of
it does not agree with a plain run after all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pellucid.anatomy.structure import Anatomy, Stack
from pellucid.engine.checkpoint import Checkpoint, fingerprint
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.packed import Variant
from pellucid.engine.pausing import pause, shared
from pellucid.engine.reading import Reader
from pellucid.engine.rungs import RUNGS, Executor, certified, deviation, own_hooks, prepare, told
from pellucid.errors import InputError, PellucidError, Refused, nearest

# Bytes a batch of variants may take beyond the model. On a CPU small batches that stay in the cache are fastest.
MEMORY = {"cpu": 40 << 20}
MEMORY_ELSEWHERE = 2 << 30
SHARED = 4  # times less where others wait for the model


def default_memory(anatomy: Anatomy) -> int:
    device = next((p.device.type for p in anatomy.module.parameters()), "cpu")
    return MEMORY.get(device, MEMORY_ELSEWHERE) // (SHARED if shared() else 1)


@dataclass(eq=False)
class Sweep:
    """Scores of every variant: `values` [variant, batch] (NaN where interrupted) and `clean` [batch]; a metric of several
    outputs adds them as a last dimension."""

    values: Tensor
    clean: Tensor
    plan: Plan

    @property
    def done(self) -> Tensor:
        """[variant] which were run."""
        return self.plan.done

    def __repr__(self) -> str:
        return f"<Sweep of {len(self.values)} variants, {int(self.done.sum())} done; {self.plan.rung}>"


class _Wrong(Exception):
    """A rung does not give what a plain run gives."""


@dataclass(eq=False)
class Plan:
    """How a sweep will be executed. `explain()` says it in words; `run()` does it, and continues where it stopped."""

    anatomy: Anatomy
    inputs: Inputs
    bound: Any
    variants: list[Variant]
    candidates: Sequence[str]  # rungs, cheapest first
    memory: int
    checkpoint: Checkpoint | None = None
    values: Tensor = field(init=False)
    done: Tensor = field(init=False)
    rung: str = field(init=False)
    reasons: dict[str, str] = field(default_factory=dict)  # rung -> why it cannot be used; "" if it can

    def __post_init__(self) -> None:
        wide = any(p.dtype == torch.float64 for p in self.anatomy.module.parameters())
        outputs = getattr(self.bound, "outputs", None)
        shape = (len(self.variants), len(self.inputs), *(() if outputs is None else (outputs,)))
        self.values = torch.full(shape, float("nan"), dtype=torch.float64 if wide else torch.float32)
        self.done = torch.zeros(shape[0], dtype=torch.bool)
        self.stack: Stack = self.anatomy.stacks[-1]
        self._choose()
        self.executor = Executor(self.anatomy, self.inputs, self.bound, certified(self.anatomy).shapes)

    def _choose(self) -> None:
        """Take the first rung that can be used; Refused where one was asked for that cannot."""
        for rung in self.candidates:
            if rung not in self.reasons:
                self.reasons[rung] = self._unfit(rung) or certified(self.anatomy).refused(rung)
            if not self.reasons[rung]:
                self.rung = rung
                break
        else:
            raise Refused(f"the executor {rung!r} does not serve this sweep: {self.reasons[rung]}")
        if self.rung != "packed, suffix":
            for v in self.variants:
                v.start = 0

    def _unfit(self, rung: str) -> str:
        """Why these variants, inputs or metric cannot use a rung; empty if they can."""
        if rung == "single":
            return ""
        if own_hooks(self.anatomy.module):
            return "your own hooks on the model must see every run by itself"
        beyond = rung.startswith("packed") and any(
            w.spot.site.part == "final_norm" for v in self.variants for w in v.writers
        )
        if rung != "batched" and (beyond or any(v.layer < 0 for v in self.variants)):
            return "an edit lies outside the last stack's blocks"
        if rung.startswith("packed") and (self.bound.classes or self.anatomy.head is None):
            return "the metric does not read logits of the unembedding"
        return certified(self.anatomy).settled.get((rung, *self._sizes), "")

    # ---- what it costs

    @property
    def cost(self) -> float:
        """Estimated cost in plain forward passes of the same inputs, by tokens and parameters touched."""
        head, body = self._shares()
        layers, length = len(self.stack.blocks), self._length
        total = 1.0 if self._checked else 2.0
        for v in self.variants:
            if self.rung.startswith("packed"):
                total += body * (layers - v.layer) / layers * (length - v.start) / length
                total += head * self._read / length if self.bound.tokens is None else 0.0
            elif self.rung == "stubbed":
                total += body * (layers - v.layer) / layers + head
            else:
                total += 1.0
        return total

    def _shares(self) -> tuple[float, float]:
        """The shares of the unembedding and of the blocks in one forward pass."""
        module = self.anatomy.module
        body = sum(p.numel() for b in self.stack.blocks for p in module.get_submodule(b.module).parameters())
        name = self.anatomy.head.unembed if self.anatomy.head is not None else None
        head = sum(p.numel() for p in module.get_submodule(name).parameters()) if name else 0
        return head / max(1, head + body), body / max(1, head + body)

    def explain(self) -> str:
        """The plan in words, with its estimated cost beside running every variant from the start."""
        n, prompts = len(self.variants), len(self.inputs)
        why = "; ".join(f"not {rung}: {reason}" for rung, reason in self.reasons.items() if reason)
        lines = [
            f"{n} variants of {prompts} prompt{'s' * (prompts > 1)}, {self._length} tokens" + " each" * (prompts > 1),
            f"executor: {self.rung} ({why or 'equal to plain runs on this model'})",
            f"batches: {len(list(self.chunks(self.variants)))} within {self.memory / 2**20:.0f} MiB",
            f"cost: at most {self.cost:.1f} plain forward passes instead of {n}, by tokens computed",
        ]
        if self.rung.startswith("packed"):
            rows = (
                "all vocabulary rows" if self.bound.tokens is None else f"{self.bound.tokens.shape[1]} vocabulary rows"
            )
            lines.append(f"unembedded: {self._read} position{'s' * (self._read > 1)}, {rows}")
        return "\n".join(lines)

    @property
    def _length(self) -> int:
        return self.inputs.stream("").ids.shape[1]

    @property
    def _read(self) -> int:
        """How many positions the metric reads."""
        return self._length if self.bound.positions is None else len(self.bound.positions)

    # ---- doing it

    def run(self, progress: bool = True) -> Sweep:
        """Execute what is not done yet. Interrupting (Ctrl-C) keeps finished batches on the plan and in the checkpoint."""
        if self.anatomy.module.training:
            raise Refused("in training mode dropout makes every run another: call model.module.eval() first")
        with (
            torch.no_grad(),
            tqdm(total=len(self.variants), unit="run", disable=not progress or not sys.stderr.isatty()) as bar,
        ):
            clean = self.bound(self.executor.clean(self.rung))
            self._resume(clean)
            while not bool(self.done.all()):
                bar.update(int(self.done.sum()) - bar.n)
                try:
                    for chunk in self.chunks([v for v in self.variants if not self.done[v.index]]):
                        pause(int(self.done.sum()), len(self.variants))
                        self._execute(chunk)
                        bar.update(len(chunk))
                        if self.checkpoint is not None:
                            self.checkpoint.save(self.values, self.done, clean)
                except _Wrong as error:
                    self.reasons[self.rung] = str(error)
                    self._choose()
        self.executor.forget()
        return Sweep(self.values, clean, self)

    def _resume(self, clean: Tensor) -> None:
        saved = self.checkpoint.load(clean) if self.checkpoint is not None else None
        if saved is not None:
            self.values, self.done = saved

    def _execute(self, chunk: list[Variant]) -> None:
        logits = self.logits(chunk) if self._checked else self._run_and_check(chunk)
        for variant, read in zip(chunk, logits, strict=True):
            self.values[variant.index] = self.bound(read).to(self.values)
            self.done[variant.index] = True

    def settle(self) -> None:
        """Go on to the next rung until one agrees with a plain run on inputs of this size."""
        while not self._checked:
            try:
                self._run_and_check(next(self.chunks(self.variants))[:1])
            except _Wrong as error:
                self.reasons[self.rung] = str(error)
                self._choose()

    def logits(self, chunk: list[Variant]) -> list[Tensor]:
        """What the metric reads of each variant of one of `chunks`, on the chosen rung."""
        return self.executor.run(self.rung, chunk)

    def _run_and_check(self, chunk: list[Variant]) -> list[Tensor]:
        """The first batch of this size on this rung: one of its variants is run plainly beside it."""
        truth = self.executor.plain(chunk[0])
        try:
            logits = self.logits(chunk)
            wrong = deviation(logits[0], truth, slack=10)
        except PellucidError:
            raise
        except Exception as error:
            wrong = f"failed on inputs of this size ({told(error)})"
        certified(self.anatomy).settled[self.rung, *self._sizes] = wrong
        if wrong:
            raise _Wrong(wrong)
        return logits

    @property
    def _sizes(self) -> tuple[Any, ...]:
        return tuple((*s.ids.shape, s.padded) for s in self.inputs.streams.values())

    @property
    def _checked(self) -> bool:
        return self.rung == "single" or (self.rung, *self._sizes) in certified(self.anatomy).settled

    def chunks(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """Variants in batches within the memory budget; stubbed rows must enter at the same block."""
        batch: list[Variant] = []
        used = 0.0
        for v in sorted(variants, key=lambda v: (v.layer, v.start, v.index)):
            size = self._bytes(v)
            apart = self.rung == "single" or (self.rung == "stubbed" and batch and batch[0].layer != v.layer)
            if batch and (apart or used + size > self.memory):
                yield batch
                batch, used = [], 0.0
            batch.append(v)
            used += size
        if batch:
            yield batch

    def _bytes(self, v: Variant) -> float:
        """What a variant adds to the memory of its batch: tensors of a block, and the logits."""
        block = self.stack.blocks[0]
        heads = sum(a.heads for a in block.attentions.values())
        width = (
            12 * self.stack.d_model + 3 * block.sizes.get("neuron", 4 * self.stack.d_model) + 3 * heads * self._length
        )
        vocabulary = getattr(self.anatomy.module.config, "vocab_size", None) or 0
        if self.bound.classes or self.anatomy.head is None:
            logits = 0.0  # a few classes, or the residual itself
        elif self.rung.startswith("packed"):
            logits = self._read * (vocabulary if self.bound.tokens is None else self.bound.tokens.shape[1])
        else:
            logits = self.executor.forward.get("logits_to_keep", self._length) * vocabulary
        return 4.0 * len(self.inputs) * ((self._length - v.start) * width + 2 * logits)


def plan_sweep(
    anatomy: Anatomy,
    inputs: Inputs,
    variants: Sequence[Edit | Sequence[Edit]],
    bound: Any,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
    rung: str | None = None,
) -> Plan:
    """Choose the cheapest way that is known to be right for this model, these edits and this metric."""
    if not len(variants):
        raise InputError("a sweep needs at least one variant: give a list of edits (or of lists of edits)")
    if rung is not None and rung not in RUNGS:
        raise InputError(f"there is no executor {rung!r}{nearest(rung, RUNGS)}")
    prepared = [prepare(anatomy, inputs, i, v) for i, v in enumerate(variants)]
    kept = None
    if checkpoint is not None:
        edits = [[(str(w.spot.site), w.edit) for w in v.writers] for v in prepared]
        ids = [(s.ids, s.mask) for s in inputs.streams.values()]
        kept = Checkpoint(Path(checkpoint), fingerprint(edits, ids, bound))
    return Plan(anatomy, inputs, bound, prepared, [rung] if rung else RUNGS, memory or default_memory(anatomy), kept)


__all__ = ["RUNGS", "Plan", "Reader", "Sweep", "plan_sweep"]
