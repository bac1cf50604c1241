"""In which ways may the variants of a sweep be run on this model? Found out by trying, once per model.

Rungs, cheapest first:

    packed, suffix   variants join one growing batch of tokens at their first edited block and position
    packed           the same, all positions (encoders, and wherever attention looks ahead)
    stubbed          rows of one batch through the model's forward, blocks before the first edit skipped
    batched          rows of one batch through the whole forward
    single           one run after another

A rung that does not reproduce plain runs on the probe is not used on the model. What passes there might still not hold
for longer inputs (experts with a capacity, sparse attention), so the first batch of a sweep over inputs of a new size
is checked against a plain run too.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.modes import evaluating
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.anatomy.structure import Anatomy, Stack
from pellucid.engine.edits import Ablate, Edit, Replace
from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.engine.packed import Packed, Variant
from pellucid.engine.reading import Reader
from pellucid.engine.recording import Recording, Shapes, record
from pellucid.engine.run import check_unconditional, execute, written
from pellucid.engine.stubbed import run_rows
from pellucid.errors import PellucidError, Refused

RUNGS = ("packed, suffix", "packed", "stubbed", "batched", "single")


@dataclass(eq=False)
class Executor:
    """Runs variants on inputs and gives the logits that a metric reads, [batch, n, k] (or [batch, classes])."""

    anatomy: Anatomy
    inputs: Inputs
    bound: Any
    shapes: Shapes | None = None

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.anatomy, self.inputs, self.bound)

    @cached_property
    def recording(self) -> Recording:
        return record(self.anatomy, self.anatomy.stacks[-1], self.inputs, **self.forward)

    def forget(self) -> None:
        """Let go of the recorded run, which holds what every block was given."""
        self.__dict__.pop("recording", None)

    @cached_property
    def forward(self) -> dict[str, Any]:
        """Arguments that spare the model work nobody reads."""
        options: dict[str, Any] = {}
        accepted = inspect.signature(self.anatomy.module.forward).parameters
        if "use_cache" in accepted:
            options["use_cache"] = False
        positions = self.bound.positions
        if "logits_to_keep" in accepted and positions and max(positions) < 0 and not self.inputs.stream("").padded:
            options["logits_to_keep"] = -min(positions)
        return options

    def clean(self, rung: str) -> Tensor:
        logits = execute(self.anatomy, self.inputs).logits if rung in ("batched", "single") else self.recording.logits
        return self.reader.read(logits)

    def plain(self, variant: Variant) -> Tensor:
        """The whole forward pass, of one variant."""
        return self.reader.read(run_rows(self.anatomy, self.inputs, [variant], None)[0])

    def run(self, rung: str, variants: Sequence[Variant]) -> list[Tensor]:
        """The logits read of each variant; on the rung "stubbed" they enter at the earliest one's block."""
        if rung.startswith("packed"):
            assert self.shapes is not None
            done = dict(Packed(self.anatomy, self.inputs, self.recording, self.shapes).final(variants))
            picked = [self.reader.pick(done[v], v.start, self.recording.final) for v in variants]
            return list(self.reader.unembed(torch.stack(picked)))
        recording = self.recording if rung == "stubbed" else None
        return [
            self.reader.read(rows) for rows in run_rows(self.anatomy, self.inputs, variants, recording, **self.forward)
        ]


def certified(anatomy: Anatomy) -> Rungs:
    """What is known about the rungs on this model."""
    return anatomy.memo("rungs", lambda: Rungs(anatomy))


def deviation(got: Tensor, truth: Tensor, slack: float = 1.0) -> str:
    """How far `got` is off, if that is more than the dtype explains."""
    if got.shape != truth.shape:
        return f"gives {list(got.shape)} where plain runs give {list(truth.shape)}"
    worst = float((got - truth).abs().max()) / max(1.0, float(truth.abs().max()))
    allowed = TOLERANCE.get(truth.dtype, 4e-2)
    return "" if worst <= max(allowed, min(4e-2, slack * allowed)) else f"differs from plain runs by {worst:.1e}"


def own_hooks(module: nn.Module) -> bool:
    """Whether the user has hooks on the model: they must see whole forward passes, one for each run."""
    hooks = (h for m in module.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return any(not str(getattr(h, "__module__", "")).startswith("pellucid.") for h in list(hooks))


class _AllLogits:
    """The metric of the trial: the logits themselves."""

    name, positions, tokens, classes = "trial", None, None, False

    def __call__(self, logits: Tensor) -> Tensor:
        return logits


class Rungs:
    """Which rungs reproduce plain runs on the probe of one model; each is tried when it is first asked about."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.shapes: Shapes | None = None
        self.settled: dict[Any, str] = {}  # (rung, sizes of the inputs) -> why not; "" if it was right on them
        self._refused: dict[str, str] = {"single": ""}

    def refused(self, rung: str) -> str:
        """Why a rung is not used on this model; empty if it is."""
        if rung not in self._refused:
            with torch.no_grad(), evaluating(self.anatomy.module):
                try:
                    _fit(self.anatomy, rung)
                    self._refused[rung] = self._try(rung)
                except Refused as error:
                    self._refused[rung] = str(error)
                except Exception as error:
                    self._refused[rung] = f"the trial failed ({told(error)})"
        return self._refused[rung]

    def _try(self, rung: str) -> str:
        inputs, variants, truth = self._truth
        prepared = [prepare(self.anatomy, inputs, i, v) for i, v in enumerate(variants)]
        if rung != "packed, suffix":
            for v in prepared:
                v.start = 0
        if rung.startswith("packed"):
            self.shapes = self.shapes or _learn_shapes(self.anatomy)
        executor = Executor(self.anatomy, inputs, _AllLogits(), self.shapes)
        batches = [prepared]
        if rung == "stubbed":  # a batch enters at one block
            batches = [[v for v in prepared if v.layer == layer] for layer in sorted({v.layer for v in prepared})]
        made = {
            v.index: logits for batch in batches for v, logits in zip(batch, executor.run(rung, batch), strict=True)
        }
        return deviation(torch.stack([made[i] for i in range(len(variants))]), truth)

    @cached_property
    def _truth(self) -> tuple[Inputs, list[Edit], Tensor]:
        """The probe, edits of it, and the logits of plain runs under each."""
        inputs = read_inputs(self.anatomy.module, None, self.anatomy.inputs)
        tried = {v: _tried(self.anatomy, inputs, v) for v in _variants(self.anatomy.stacks[-1])}
        found = {v: logits for v, logits in tried.items() if logits is not None}
        return inputs, list(found), torch.stack(list(found.values()))


def _tried(anatomy: Anatomy, inputs: Inputs, edit: Edit) -> Tensor | None:
    try:
        return execute(anatomy, inputs, edits=[edit]).logits
    except PellucidError:  # a family may refuse some edits
        return None


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _variants(stack: Stack) -> list[Edit]:
    """Strong edits of the residual at the ends and in the middle of the stack, and edits inside attention."""
    last = len(stack.blocks) - 1
    sites = [f"{stack.prefix}layers.{layer}.resid_pre" for layer in sorted({0, last // 2, last})]
    variants: list[Edit] = [
        Replace(site + at, _flipped) for site in sites for at in ("@-3", "")[: 1 + (site == sites[0])]
    ]
    for part in ("attn.heads.0", "attn.heads.0.k@-4"):
        having = [b.index for b in stack.blocks if ("attn.k" if "k@" in part else "attn.z_out") in b.taps]
        variants += [
            Replace(f"{stack.prefix}layers.{layer}.{part}", _flipped) for layer in sorted({*having[:1], *having[-1:]})
        ]
    return variants


def _flipped(x: Tensor) -> Tensor:
    return x.flip(-1) * 1.5


def _fit(anatomy: Anatomy, rung: str) -> None:
    """Refused for what the map already tells; the trial alone might not see it in half precision."""
    stack = anatomy.stacks[-1]
    shared = any(t.nth and not t.module.startswith(b.module) for b in stack.blocks for t in b.taps.values())
    if (rung != "batched" and shared) or (rung == "stubbed" and any(b.nth for b in stack.blocks)):
        raise Refused("its layers share modules, whose calls are counted from the first layer on")
    if not rung.startswith("packed"):
        return
    if anatomy.head is None or any(p.name == "unembedding" and not p.holds for p in anatomy.proofs):
        raise Refused("no proven head")
    if any(a.route != "interface" for b in stack.blocks for a in b.attentions.values()):
        raise Refused("attention does not go through the interface")
    if any(t.source.startswith("mixer") for b in stack.blocks for s in b.states for t in s.terms):
        raise Refused("something other than attention mixes positions")
    if any(b.unmapped or not b.whole for b in stack.blocks):
        raise Refused("its blocks are not modules that can be called, or attend in ways that are not on the map")
    if rung == "packed, suffix" and not stack.causal:
        raise Refused("attention looks ahead")


def _learn_shapes(anatomy: Anatomy) -> Shapes:
    """From recordings of the probe and of a probe of another size, both padded so that masks are there too."""
    recordings = []
    for extra, cut in ((0, 0), (1, 2)):
        tensors = dict(anatomy.inputs)
        for name in ("input_ids", "decoder_input_ids"):
            if name in tensors:
                ids = tensors[name]
                ids = torch.cat([ids, ids[:extra]])
                tensors[name] = ids[:, : ids.shape[1] - cut - (cut > 0 and name == "input_ids")]
        mask = torch.ones_like(tensors["input_ids"])
        mask[-1, -1] = 0
        tensors["attention_mask"] = mask
        inputs = read_inputs(anatomy.module, None, tensors)
        recordings.append(
            record(anatomy, anatomy.stacks[-1], inputs, **Executor(anatomy, inputs, _AllLogits()).forward)
        )
    return Shapes(*recordings)


def prepare(anatomy: Anatomy, inputs: Inputs, index: int, edits: Edit | Sequence[Edit]) -> Variant:
    """Place a variant's edits and find its first edited block (-1: before the last stack) and column."""
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    check_unconditional(edits)
    writers = written(anatomy, edits)
    last = anatomy.stacks[-1]
    layer = len(last.blocks) if writers else 0
    start = inputs.stream("").ids.shape[1] - 1
    for w in writers:
        site = w.spot.site
        inside = (site.stack or last.name) == last.name
        here = int(site.layer or 0) if inside else -1
        layer = min(layer, len(last.blocks) if site.part == "final_norm" else here)
        reads_all = isinstance(w.edit, Ablate) and w.edit.how != "zero" and w.edit.reference is None
        columns = None if reads_all or w.spot.stream != last.name else inputs.stream(w.spot.stream).find(site.at)
        start = min(start, 0 if columns is None else int(columns.min()))
    return Variant(index, writers, layer, start)
