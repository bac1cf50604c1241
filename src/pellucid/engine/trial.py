"""Which rungs of a sweep reproduce plain runs on a model? Found out by trying, once per model.

A rung that does not give the numbers of plain runs on the probe is not used on the model. What passes there might still
not hold for longer inputs (experts with a capacity, sparse attention), so the first batch of a sweep over inputs of a
new size is checked against a plain run too, and what came of it is kept here.
"""

from __future__ import annotations

from functools import cached_property
from math import inf

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import running
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.anatomy.structure import Stack
from pellucid.engine.edits import Edit, Replace
from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.engine.recording import Shapes, record
from pellucid.engine.run import execute
from pellucid.engine.rungs import LADDER, Job, Rung, prepare
from pellucid.errors import PellucidError, Refused

Sizes = tuple[tuple[int, int, bool], ...]  # batch, length and whether it is padded, of each stream


def certified(anatomy: Anatomy) -> Trial:
    """What is known about the rungs on this model."""
    return anatomy.memo("rungs", lambda: Trial(anatomy))


def deviation(got: Tensor, truth: Tensor, slack: float = 1.0) -> str:
    """How far `got` is off, if that is more than the dtype explains."""
    if got.shape != truth.shape:
        return f"gives {list(got.shape)} where plain runs give {list(truth.shape)}"
    worst = float((got - truth).abs().max()) / max(1.0, float(truth.abs().max()))
    allowed = TOLERANCE.get(truth.dtype, 4e-2)
    return "" if worst <= max(allowed, min(4e-2, slack * allowed)) else f"differs from plain runs by {worst:.1e}"


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


class _AllLogits:
    """The metric of the trial: the logits themselves."""

    name, positions, tokens, classes, outputs = "trial", None, None, False, None

    def __call__(self, logits: Tensor) -> Tensor:
        return logits


class Trial:
    """What is known about the rungs on one model: each is tried on the probe when it is first asked about."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._refused = {LADDER[-1].name: ""}  # it is the plain run itself
        self._settled: dict[tuple[str, Sizes], str] = {}  # why not on inputs of these sizes; "" if it was right on them

    def refused(self, rung: Rung) -> str:
        """Why a rung is not used on this model; empty if it is."""
        if rung.name not in self._refused:
            with running(self.anatomy.module):
                try:
                    self._refused[rung.name] = rung.unsuited(self.anatomy) or self._try(rung)
                except Refused as error:
                    self._refused[rung.name] = str(error)
                except Exception as error:
                    self._refused[rung.name] = f"the trial failed ({told(error)})"
        return self._refused[rung.name]

    def settled(self, rung: Rung, inputs: Inputs) -> str | None:
        """What a check against a plain run on inputs of these sizes said: "" if it was right; None if there was none."""
        return "" if rung is LADDER[-1] else self._settled.get((rung.name, _sizes(inputs)))

    def settle(self, rung: Rung, inputs: Inputs, wrong: str) -> None:
        self._settled[rung.name, _sizes(inputs)] = wrong

    def _try(self, rung: Rung) -> str:
        inputs, variants, truth = self._truth
        prepared = [prepare(self.anatomy, inputs, i, v) for i, v in enumerate(variants)]
        job = self._job(inputs)
        made = {
            v.index: logits
            for batch in rung.batches(job, prepared, inf)
            for v, logits in zip(batch, rung.run(job, batch), strict=True)
        }
        return deviation(torch.stack([made[i] for i in range(len(variants))]), truth)

    def _job(self, inputs: Inputs) -> Job:
        return Job(self.anatomy, inputs, _AllLogits(), lambda: self.shapes)

    @cached_property
    def _truth(self) -> tuple[Inputs, list[Edit], Tensor]:
        """The probe, edits of it, and the logits of plain runs under each."""
        inputs = read_inputs(self.anatomy.module, None, self.anatomy.inputs)
        tried = {v: _tried(self.anatomy, inputs, v) for v in _variants(self.anatomy.stacks[-1])}
        found = {v: logits for v, logits in tried.items() if logits is not None}
        return inputs, list(found), torch.stack(list(found.values()))

    @cached_property
    def shapes(self) -> Shapes:
        """Which axes of the blocks' arguments are what, from recordings of the probe and of a probe of another size,
        both padded so that masks are there too. Refused where that cannot be told."""
        recordings = []
        for extra, cut in ((0, 0), (1, 2)):
            tensors = dict(self.anatomy.inputs)
            for name in ("input_ids", "decoder_input_ids"):
                if name in tensors:
                    ids = tensors[name]
                    ids = torch.cat([ids, ids[:extra]])
                    tensors[name] = ids[:, : ids.shape[1] - cut - (cut > 0 and name == "input_ids")]
            mask = torch.ones_like(tensors["input_ids"])
            mask[-1, -1] = 0
            tensors["attention_mask"] = mask
            job = self._job(read_inputs(self.anatomy.module, None, tensors))
            recordings.append(record(self.anatomy, job.stack, job.inputs, **job.forward))
        return Shapes(*recordings)


def _sizes(inputs: Inputs) -> Sizes:
    return tuple((s.ids.shape[0], s.ids.shape[1], s.padded) for s in inputs.streams.values())


def _tried(anatomy: Anatomy, inputs: Inputs, edit: Edit) -> Tensor | None:
    try:
        return execute(anatomy, inputs, edits=[edit]).logits
    except PellucidError:  # a family may refuse some edits
        return None


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
