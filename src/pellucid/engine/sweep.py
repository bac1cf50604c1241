"""A sweep is a query: score this input under each of these many sets of edits. The planner chooses how.

Rungs, cheapest first; a family uses the first one that reproduces plain runs on it (checked once, on the probe):

    packed, suffix   variants join one growing batch of tokens at their first edited block and position
    packed           the same, all positions (encoders, and wherever attention looks ahead)
    stubbed          rows of one batch through the model's forward, blocks before the first edit skipped
    batched          rows of one batch through the whole forward
    single           one run after another
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pellucid.anatomy.proofs import TOLERANCE
from pellucid.anatomy.structure import Anatomy, Stack
from pellucid.anatomy.weights import linear_map
from pellucid.engine.edits import Ablate, Edit, Replace
from pellucid.engine.inputs import Inputs
from pellucid.engine.packed import Packed, Variant
from pellucid.engine.recording import Recording, record
from pellucid.engine.run import execute, written
from pellucid.engine.stubbed import run_rows
from pellucid.errors import InputError, Refused

RUNGS = ("packed, suffix", "packed", "stubbed", "batched", "single")
# Bytes a batch of variants may take beyond the model. On a CPU small batches that stay in the cache are fastest.
MEMORY = {"cpu": 80 << 20}
MEMORY_ELSEWHERE = 2 << 30


def default_memory(anatomy: Anatomy) -> int:
    device = next((p.device.type for p in anatomy.module.parameters()), "cpu")
    return MEMORY.get(device, MEMORY_ELSEWHERE)


class Reader:
    """What the metric reads, from residuals or from logits: positions, and rows of the vocabulary."""

    def __init__(self, anatomy: Anatomy, inputs: Inputs, bound: Any) -> None:
        self.anatomy, self.bound = anatomy, bound
        self.stream = inputs.stream("")
        positions = bound.positions
        lengths, starts = self.stream.lengths, self.stream.starts
        if positions is None:
            self.columns = torch.arange(self.stream.ids.shape[1]).expand(len(inputs), -1)
        else:
            shortest = int(lengths.min())
            if not all(-shortest <= p < shortest for p in positions):
                raise InputError(f"the metric reads positions {positions}, but a prompt has {shortest} tokens")
            where = [starts + (p if p >= 0 else lengths + p) for p in positions]
            self.columns = torch.stack(where, 1)

    def from_logits(self, logits: Tensor) -> Tensor:
        """[batch] from the whole logits [batch, position, vocabulary] (or [batch, classes])."""
        if logits.ndim == 3 and not self.bound.classes:
            rows = torch.arange(len(logits), device=logits.device)[:, None]
            kept = logits.shape[1] - self.stream.ids.shape[1]  # negative where only the last ones were unembedded
            logits = logits[rows, self.columns.to(logits.device) + kept]
            if self.bound.tokens is not None:
                index = self.bound.tokens.to(logits.device)[:, None].expand(len(logits), logits.shape[1], -1)
                logits = logits.gather(2, index)
        return self.bound(logits)

    def pick(self, hidden: Tensor, start: int, clean: Tensor) -> Tensor:
        """The residuals [batch, n, d] at the positions read, from a variant's columns `start`.. and else the clean run."""
        columns = self.columns.to(hidden.device)
        rows = torch.arange(len(columns), device=hidden.device)[:, None]
        picked = hidden[rows, (columns - start).clamp_min(0)]
        if start and bool((columns < start).any()):
            picked = torch.where((columns < start)[..., None], clean[rows, columns], picked)
        return picked

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [variant, batch, n, k] from residuals [variant, batch, n, d]: only the vocabulary rows that are read."""
        head = self.anatomy.head
        assert head is not None
        x = hidden.flatten(0, 1)
        for step in head.steps[: head.after - 1]:
            x = step(x)
        tokens = self.bound.tokens
        elementwise = all(name in ("mul", "div", "tanh") for name in head.names[head.after :])
        if tokens is None or not elementwise:
            logits = x
            for step in head.steps[head.after - 1 :]:
                logits = step(logits)
            logits = logits.unflatten(0, hidden.shape[:2])
            if tokens is None:
                return logits
            return logits.gather(3, tokens.to(x.device)[None, :, None].expand(*hidden.shape[:3], -1))
        weight, bias = linear_map(self.anatomy.module.get_submodule(head.unembed), x.shape[-1])
        tokens = tokens.to(x.device)
        rows = weight.T[tokens].to(x.dtype)  # [batch or 1, k, d]
        logits = torch.einsum("vbnd,bkd->vbnk", x.unflatten(0, hidden.shape[:2]), rows.expand(hidden.shape[1], -1, -1))
        if bias is not None:
            logits = logits + bias[tokens][None, :, None]
        for step in head.steps[head.after :]:
            logits = step(logits)
        return logits


@dataclass(eq=False)
class Sweep:
    """Scores of every variant: `values` [variant, batch] (NaN where interrupted) and `clean` [batch]."""

    values: Tensor
    clean: Tensor
    plan: Plan

    @property
    def done(self) -> Tensor:
        return ~torch.isnan(self.values).any(1)

    def __repr__(self) -> str:
        return f"<Sweep of {len(self.values)} variants, {int(self.done.sum())} done; {self.plan.rung}>"


@dataclass(eq=False)
class Plan:
    """How a sweep will be executed. `explain()` says it in words; `run()` does it, and continues where it stopped."""

    anatomy: Anatomy
    inputs: Inputs
    bound: Any
    variants: list[Variant]
    rung: str
    why: str
    memory: int
    checkpoint: Path | None = None
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.full((len(self.variants), len(self.inputs)), float("nan"))
        self.reader = Reader(self.anatomy, self.inputs, self.bound)
        self.stack: Stack = self.anatomy.stacks[-1]

    # ---- what it costs

    @property
    def cost(self) -> float:
        """Estimated cost in plain forward passes of the same inputs, by parameters touched."""
        head, body = self._parameters()
        layers, length = len(self.stack.blocks), self.inputs.stream("").ids.shape[1]
        total = 1.0
        for v in self.variants:
            if self.rung.startswith("packed"):
                blocks = (layers - v.layer) / layers * (length - v.start) / length
                total += body * blocks + (head / length if self.bound.tokens is None else 0.0)
            elif self.rung == "stubbed":
                total += body * (layers - v.layer) / layers + head
            else:
                total += 1.0
        return total

    def _parameters(self) -> tuple[float, float]:
        """The shares of the unembedding and of the blocks in one forward pass."""
        module = self.anatomy.module
        body = sum(p.numel() for b in self.stack.blocks for p in module.get_submodule(b.module).parameters())
        name = self.anatomy.head.unembed if self.anatomy.head is not None else None
        head = sum(p.numel() for p in module.get_submodule(name).parameters()) if name else 0
        return head / (head + body), body / (head + body)

    def explain(self) -> str:
        """The plan in words, with its estimated cost beside running every variant from the start."""
        n, chunks = len(self.variants), len(list(self.chunks()))
        lines = [
            f"{n} variants of {len(self.inputs)} prompt(s), {self.inputs.stream('').ids.shape[1]} tokens each",
            f"executor: {self.rung} ({self.why})",
            f"batches: {chunks} within {self.memory / 2**20:.0f} MiB",
            f"cost: about {self.cost:.1f} plain forward passes instead of {n}",
        ]
        if self.rung.startswith("packed"):
            rows = "all vocabulary rows" if self.bound.tokens is None else f"{self.bound.tokens.shape[1]} vocabulary rows"
            lines.append(f"unembedded: {self.reader.columns.shape[1]} position(s), {rows}")
        return "\n".join(lines)

    # ---- doing it

    def run(self, progress: bool = True) -> Sweep:
        """Execute what is not done yet. Interrupting (Ctrl-C) keeps finished batches on the plan and in the checkpoint."""
        self._resume()
        with torch.no_grad():
            recording = self._record()
            clean = self._clean(recording)
            todo = [chunk for chunk in self.chunks() if torch.isnan(self.values[[v.index for v in chunk]]).any()]
            bar = tqdm(total=len(self.variants), unit="run", disable=not progress or not sys.stderr.isatty())
            bar.update(len(self.variants) - sum(map(len, todo)))
            try:
                for chunk in todo:
                    for variant, score in self._scores(chunk, recording):
                        self.values[variant.index] = score.cpu().float()
                    bar.update(len(chunk))
                    self._save(clean)
            finally:
                bar.close()
        return Sweep(self.values, clean, self)

    def _record(self) -> Recording | None:
        if self.rung in ("batched", "single"):
            return None
        return record(self.anatomy, self.stack, self.inputs, **self._forward())

    def _forward(self) -> dict[str, Any]:
        """Arguments that spare the model work nobody reads."""
        options: dict[str, Any] = {}
        accepted = inspect.signature(self.anatomy.module.forward).parameters
        if "use_cache" in accepted:
            options["use_cache"] = False
        positions, padded = self.bound.positions, self.inputs.stream("").padded
        if "logits_to_keep" in accepted and positions is not None and max(positions) < 0 and not padded:
            options["logits_to_keep"] = -min(positions)
        return options

    def _clean(self, recording: Recording | None) -> Tensor:
        if recording is None:
            return self.reader.from_logits(execute(self.anatomy, self.inputs).logits)
        return self.reader.from_logits(recording.logits)

    def _scores(self, chunk: list[Variant], recording: Recording | None) -> Iterator[tuple[Variant, Tensor]]:
        if self.rung.startswith("packed"):
            assert recording is not None
            done = list(Packed(self.anatomy, self.inputs, recording).final(chunk))
            picked = torch.stack([self.reader.pick(h, v.start, recording.final) for v, h in done])
            for (variant, _), logits in zip(done, self.reader.unembed(picked), strict=True):
                yield variant, self.bound(logits)
        else:
            logits = run_rows(self.anatomy, self.inputs, chunk, recording, **self._forward())
            for variant, rows in zip(chunk, logits, strict=True):
                yield variant, self.reader.from_logits(rows)

    def chunks(self) -> Iterator[list[Variant]]:
        """Batches within the memory budget; stubbed rows must enter at the same block."""
        if self.rung == "single":
            yield from ([v] for v in self.variants)
            return
        ordered = sorted(self.variants, key=lambda v: (v.layer, v.start, v.index))
        rows, length = self.inputs.stream("").ids.shape
        per_token = self._bytes_per_token()
        batch: list[Variant] = []
        used = 0.0
        for v in ordered:
            tokens = rows * (length - v.start)
            apart = self.rung == "stubbed" and batch and batch[0].layer != v.layer
            if batch and (apart or used + tokens * per_token > self.memory):
                yield batch
                batch, used = [], 0.0
            batch.append(v)
            used += tokens * per_token
        if batch:
            yield batch

    def _bytes_per_token(self) -> float:
        block = self.stack.blocks[0]
        heads = sum(a.heads for a in block.attentions.values())
        length = self.inputs.stream("").ids.shape[1]
        width = 12 * self.stack.d_model + 3 * block.sizes.get("neuron", 4 * self.stack.d_model) + 3 * heads * length
        if not self.rung.startswith("packed"):
            width += 2 * getattr(self.anatomy.module.config, "vocab_size", 0)
        return 4.0 * width

    # ---- keeping what is done

    def _key(self) -> str:
        sites = [[str(w.spot.site) for w in v.writers] for v in self.variants]
        kinds = [[type(w.edit).__name__ for w in v.writers] for v in self.variants]
        return json.dumps([sites, kinds, self.inputs.stream("").ids.tolist(), self.bound.name])

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        import numpy as np

        with np.load(self.checkpoint, allow_pickle=False) as saved:
            if str(saved["key"]) != self._key():
                raise InputError(f"{self.checkpoint} holds another sweep: delete it or name another file")
            self.values = torch.tensor(saved["values"])

    def _save(self, clean: Tensor) -> None:
        if self.checkpoint is not None:
            import numpy as np

            part = self.checkpoint.with_suffix(".part.npz")
            np.savez(part, key=self._key(), values=self.values.numpy(), clean=clean.cpu().numpy())
            part.replace(self.checkpoint)


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
    prepared = [prepare(anatomy, inputs, i, v) for i, v in enumerate(variants)]
    allowed, reasons = certified(anatomy)
    usable, why = "single", ""
    for candidate in RUNGS:
        if rung is not None and candidate != rung:
            continue
        why = reasons.get(candidate, "") or _unfit(candidate, anatomy, prepared, bound)
        if not why:
            usable = candidate
            break
    if rung is not None and usable != rung:
        raise Refused(f"the executor {rung!r} does not serve this sweep: {why}")
    skipped = [f"{r}: {reasons.get(r) or _unfit(r, anatomy, prepared, bound)}" for r in RUNGS[: RUNGS.index(usable)]]
    if usable != "packed, suffix":
        for v in prepared:
            v.start = 0
    why = "; ".join(s for s in skipped if s) or "equal to plain runs on this model"
    return Plan(anatomy, inputs, bound, prepared, usable, why, memory or default_memory(anatomy), Path(checkpoint) if checkpoint else None)


def prepare(anatomy: Anatomy, inputs: Inputs, index: int, edits: Edit | Sequence[Edit]) -> Variant:
    """Place a variant's edits and find its first edited block and column."""
    writers = written(anatomy, [edits] if isinstance(edits, Edit) else list(edits))
    last = anatomy.stacks[-1]
    layer, start = len(last.blocks), inputs.stream("").ids.shape[1]
    for w in writers:
        site = w.spot.site
        inside = site.stack == last.name and (site.layer is not None or site.part == "embed")
        layer = min(layer, (site.layer or 0) if inside else -1)
        columns = inputs.stream(site.stack).find(site.at)
        whole = isinstance(w.edit, Ablate) and w.edit.how != "zero" and w.edit.reference is None
        start = min(start, 0 if columns is None or whole else int(columns.min()))
    return Variant(index, writers, layer if writers else 0, start)


def _unfit(rung: str, anatomy: Anatomy, variants: list[Variant], bound: Any) -> str:
    """Why these variants or this metric cannot use a rung; empty if they can."""
    if rung in ("batched", "single"):
        return ""
    if any(not 0 <= v.layer < len(anatomy.stacks[-1].blocks) for v in variants):
        return "an edit lies outside the last stack's blocks"
    if rung == "stubbed":
        return ""
    if any("mlp.experts" in w.spot.site.part or w.spot.site.part == "mlp.router" for v in variants for w in v.writers):
        return "edits of experts see tokens, not prompts"
    if bound.classes or anatomy.head is None:
        return "the metric does not read logits of the unembedding"
    return ""


# ---- which rungs are right for a model


def certified(anatomy: Anatomy) -> tuple[list[str], dict[str, str]]:
    """The rungs that reproduce plain runs on the probe, found once per model, and why the others do not."""
    if anatomy.rungs is None:
        anatomy.rungs = {}
        try:
            inputs, bound, variants, truth = _trial(anatomy)
        except Exception as e:  # a model whose forward takes more than token ids runs one by one
            anatomy.rungs = dict.fromkeys(RUNGS[:-1], f"the trial could not be run ({type(e).__name__})")
            return ["single"], anatomy.rungs
        for rung in RUNGS[:-1]:
            anatomy.rungs[rung] = _check(anatomy, inputs, bound, variants, truth, rung)
    return [r for r in RUNGS if not anatomy.rungs.get(r)], anatomy.rungs


def _trial(anatomy: Anatomy) -> tuple[Inputs, Any, list[Edit], Tensor]:
    from pellucid.engine.inputs import read_inputs

    inputs = read_inputs(anatomy.module, None, anatomy.inputs)
    stack = anatomy.stacks[-1]
    variants: list[Edit] = []
    for layer in sorted({0, len(stack.blocks) // 2, len(stack.blocks) - 1}):
        variants.append(Replace(f"{stack.prefix}layers.{layer}.resid_pre@-3", function=lambda x: x.flip(-1)))
        if "attn.z_out" in stack.blocks[layer].taps:
            variants.append(Ablate(f"{stack.prefix}layers.{layer}.attn.heads.0"))
        if "attn.k" in stack.blocks[layer].taps:
            variants.append(Replace(f"{stack.prefix}layers.{layer}.attn.k@-4", function=lambda x: x * 1.5))

    class Whole:
        name, positions, tokens, classes = "trial", (-1, -2), None, False

        def __call__(self, logits: Tensor) -> Tensor:
            return logits

    truth = [Reader(anatomy, inputs, Whole()).from_logits(execute(anatomy, inputs, edits=[v]).logits) for v in variants]
    return inputs, Whole(), variants, torch.stack(truth)


def _check(anatomy: Anatomy, inputs: Inputs, bound: Any, variants: list[Edit], truth: Tensor, rung: str) -> str:
    if rung.startswith("packed"):
        if anatomy.head is None or any(p.name == "unembedding" and not p.holds for p in anatomy.proofs):
            return "no proven head"
        if any(a.route != "interface" for b in anatomy.stacks[-1].blocks for a in b.attentions.values()):
            return "attention does not go through the interface"
    prepared = [prepare(anatomy, inputs, i, v) for i, v in enumerate(variants)]
    if rung != "packed, suffix":
        for v in prepared:
            v.start = 0
    plan = Plan(anatomy, inputs, bound, prepared, rung, "", default_memory(anatomy))
    try:
        with torch.no_grad():
            recording = plan._record()
            made = {v.index: s for chunk in plan.chunks() for v, s in plan._scores(chunk, recording)}
    except Exception as e:
        return f"the trial failed ({type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''})"
    got = torch.stack([made[i] for i in range(len(variants))])
    scale = max(1.0, float(truth.abs().max()))
    worst = float((got - truth).abs().max()) / scale
    return "" if worst <= TOLERANCE.get(truth.dtype, 4e-2) else f"differs from plain runs by {worst:.1e}"
