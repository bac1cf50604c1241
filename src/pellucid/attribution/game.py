"""What does the model answer when only some of the players are there?

    v(S) = target of the prompt with the players in S in place, and the baseline in the place of all others

Perturbation methods (occlusion, LIME, Shapley values, deletion curves) are questions to this game. Coalitions are runs
of the sweep planner: absent tokens are replaced where the embedded prompt enters the first block, which costs no more
than running the changed prompt, and for a causal model spares the positions before the first absent one. Every
distinct coalition is run once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.structure import Tap
from pellucid.attribution.baseline import Baseline
from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.engine.edits import Edit, Patch
from pellucid.engine.lockstep import in_company
from pellucid.engine.pausing import progress
from pellucid.engine.sweep import current
from pellucid.errors import Refused
from pellucid.results import Result

ROOM = 1e-3  # how far a replaced first residual may be from that of the replaced token, relative to the largest logit


@dataclass(eq=False)
class Coalitions:
    """v(S) [n, output] of coalitions [n, player], every distinct one asked for once; `evaluations` counts what it took,
    `name` says what stands in the place of the absent."""

    case: Case
    players: Players
    name: str
    evaluations: int = field(default=0, init=False)
    _known: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, present: Tensor) -> Tensor:
        present = torch.as_tensor(present).bool().cpu()
        keys = [row.numpy().tobytes() for row in present]
        new = {key: row for key, row in zip(keys, present, strict=True) if key not in self._known}
        if new:
            self._known |= dict(zip(new, self._run(torch.stack(list(new.values()))), strict=True))
        return torch.stack([self._known[key] for key in keys])

    @cached_property
    def all(self) -> Tensor:
        """[output] of the prompt itself."""
        return self(torch.ones(1, len(self.players)))[0]

    @cached_property
    def none(self) -> Tensor:
        """[output] with every player absent."""
        return self(torch.zeros(1, len(self.players)))[0]

    @cached_property
    def seen(self) -> Tensor:
        """[output, player] False for those who come too late to matter."""
        visible = self.case.visible
        return torch.tensor(np.stack([visible[:, list(group)].any(1) for group in self.players.members], 1))

    def _run(self, present: Tensor) -> Tensor:
        """v of distinct coalitions [n, player], as booleans; counts them."""
        raise NotImplementedError

    # ---- results

    def result(self, title: str, variables: dict[str, Any], *, attrs: dict[str, Any] | None = None) -> Result:
        """A result of these questions: `variables` are scalars, [output] or [output, player]; the scores with everybody and with
        nobody, and what it cost, are added."""
        labels = None
        for name, value in variables.items():
            if np.ndim(value) == 2:
                seen = torch.where(self.seen, torch.as_tensor(value), 0.0)
                variables[name], labels = self.players.labelled(self.case, seen)
        return self.case.result(
            title,
            {**variables, "score": self.all, "baseline_score": self.none, "evaluations": self.evaluations},
            labels=labels,
            attrs={"baseline": self.name, "players": self.players.unit, **(attrs or {})},
        )  # fmt: skip


@dataclass(eq=False)
class Game(Coalitions):
    """`game(present)` gives v(S) [n, output] for coalitions [n, player]; `evaluations` counts the runs it took."""

    baseline: Baseline
    embedded: Embedded
    checkpoint: str | Path | None = None
    _asked: int = 0

    @classmethod
    def of(
        cls, case: Case, players: Any = "token", baseline: Any = None, *, checkpoint: str | Path | None = None
    ) -> Game:
        """`checkpoint` is a file that keeps what is done of the first question, so that it continues if interrupted;
        further questions get files of that name with a number."""
        embedded = Embedded(case)
        start = Baseline.of(embedded, baseline)
        return cls(case, Players.of(case, players), start.name, start, embedded, checkpoint)

    def absent(self, present: Tensor) -> list[int]:
        """Token positions absent in one coalition [player]."""
        return [
            i for group, here in zip(self.players.members, present.tolist(), strict=True) if not here for i in group
        ]

    def _run(self, present: Tensor) -> Tensor:
        self.evaluations += len(present)
        edited = bool(self.case.edits)  # an edit may stand where absence is one
        if edited or self._nothing_spared or not self._replaceable:
            return self._rows(present)
        path = self._checkpoint()
        variants = [self._edits(self.absent(row)) for row in present]
        swept = self.case.model.sweep(self.case.inputs, variants, self.case.question.metric, checkpoint=path)
        values = swept.values[:, 0].double()
        return values[:, None] if values.ndim == 1 else values

    @cached_property
    def _nothing_spared(self) -> bool:
        """A classifier that looks ahead reads every position of every layer: then the planner is only asked to resume.
        Prompts in company share batches, which the planner, who knows one prompt, does not; it sends them to workers, where there are some."""
        bound, last = self.case.question.metric, self.case.model.anatomy.stacks[-1]
        alike = in_company() or (bound is not None and bound.classes and not last.causal)
        return self.checkpoint is None and alike and current() is None

    def _checkpoint(self) -> Path | None:
        if self.checkpoint is None:
            return None
        path, self._asked = Path(self.checkpoint), self._asked + 1
        return path if self._asked == 1 else path.with_name(f"{path.name}.{self._asked}")

    def _rows(self, present: Tensor) -> Tensor:
        """In batches through the whole model, where the planner cannot read the target or place the edits."""
        rows, made = self.embedded.batches(len(present)), []
        fixed, own = self.baseline.values, self.embedded.values
        with torch.no_grad(), progress[None](what="runs", total=len(present)) as bar:
            for part in present.split(rows):
                here = torch.ones(len(part), own.shape[1], 1, device=own.device)
                for row, coalition in enumerate(part):
                    here[row, self.absent(coalition)] = 0
                made.append(self.embedded.scores(torch.where(here.bool(), own, fixed)).double().cpu())
                bar.step(len(part))
        return torch.cat(made)

    # ---- absence as an edit of the first residual

    @cached_property
    def _entered(self) -> dict[str, Tensor]:
        """What enters the first block of each credited stack, [position, d], when every player is absent."""
        anatomy = self.case.model.anatomy
        names = {s.name: s.blocks[0].taps.get("resid_pre") for s in anatomy.stacks if s.blocks}
        taps: dict[str, Tap | None] = {name: names.get(name) for name in self.case.streams}
        if None in taps.values():
            return {}
        met = self.embedded.met([tap for tap in taps.values() if tap is not None], self.baseline.values)
        return {name: met[tap][0] for name, tap in taps.items() if tap is not None and tap in met}

    def _edits(self, absent: list[int]) -> list[Edit]:
        edits: list[Edit] = []
        first = 0
        for (name, entered), length in zip(self._entered.items(), self.case.lengths, strict=True):
            here = [i - first for i in absent if first <= i < first + length]
            first += length
            if here:
                site = f"{name}.embed" if name else "embed"
                at = f"{here[0]}" if len(here) == 1 else ",".join(map(str, here))
                edits.append(Patch(f"{site}@{at}", entered[here]))
        return edits

    @cached_property
    def _replaceable(self) -> bool:
        """Whether replacing what enters the first block is what replacing the tokens is: not where an embedding looks
        at its neighbours (or counts positions by the padding token). Tried on every second player."""
        bound = self.case.question.metric
        padded = any(stream.padded for stream in self.case.inputs.streams.values())
        if bound is None or padded or len(self._entered) < len(self.case.streams):
            return False
        if any(len(e) != n for e, n in zip(self._entered.values(), self.case.lengths, strict=True)):
            return False
        half = torch.arange(len(self.players)) % 2 == 0
        if bool(half.all()):
            half[:] = False
        try:
            swept = self.case.model.sweep(self.case.inputs, [self._edits(self.absent(half))], bound)
        except Refused:  # what enters the first block is no output of a module of its own
            return False
        truth = self._rows(half[None])[0]
        return torch.allclose(
            swept.values[0, 0].double().reshape(-1), truth, atol=ROOM * max(1.0, float(truth.abs().max())), rtol=0
        )
