"""Is there a subspace of this site that holds the variable, in whatever basis?

Distributed alignment search (Geiger et al. 2024) learns an orthonormal basis R of k directions of a site such that the
interchange of these directions alone,

    x <- x + R R^T (x_source - x),

makes the network answer as the program does under the interchange of a variable (see abstraction.py). The loss is the cross
entropy of the program's answer among all answers the task has. Boundless (Wu et al. 2023): R is a full rotation and k itself
is learned, by a soft mask sigmoid((boundary - i) / T) over its directions, T falling, with a penalty on the boundary; here
the subspace begins at the first direction, so that one boundary suffices, and is counted with a hard mask in the end.

A flexible enough map finds something anywhere. So two placebos are trained in the same way and stand beside the result: on a
model whose weights are shuffled within each tensor (same distributions, nothing learned), and on arbitrary labels (the
expected answers dealt out at random). Both must stay near `chance`, the share of the most frequent answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from pellucid.anatomy.sites import Site
from pellucid.causal.abstraction import Pairs, Task
from pellucid.causal.contrast import numbers
from pellucid.causal.grid import described
from pellucid.changed import check_weights
from pellucid.controls import shuffled
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit, Place, aligned_values
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.training import draws, train


@dataclass(frozen=True, eq=False)
class RotatedSwap(Edit):
    """Some directions of a site take their values from another run: x + ((source - x) R * mask) R^T.

    source: [batch, position, d], position 0 the first real token; rotation: [d, k] orthonormal; mask: [k], 1 where swapped.
    """

    source: Tensor = None  # type: ignore[assignment]
    rotation: Tensor = None  # type: ignore[assignment]
    mask: Tensor | None = None

    def new(self, x: Tensor, place: Place) -> Tensor:
        rows = torch.arange(len(x), device=x.device)[:, None]
        rotation = self.rotation.to(x)
        change = (self.source[rows, place.positions].to(x) - x) @ rotation
        return x + (change if self.mask is None else change * self.mask.to(x)) @ rotation.T


@dataclass
class DistributedAlignment:
    """Finds a subspace of `site` for a variable of the task's program.

    `size` is its number of directions, or None to learn it (boundless, with `penalty` per share of the width). After
    `fit(model)`: `rotation_` [d, size_], `size_`, and `result_` with the held-out `accuracy` and its interval, `changed` (on
    pairs whose output the interchange changes), `floor` (no intervention), `chance`, and both placebos. InputError where the
    site is not one site of vectors.

    >>> DistributedAlignment(task, "same", "layers.0.resid_post@-1", pairs=32, epochs=2).fit(model).result_
    'same' in 1 directions of layers.0.resid_post@-1
    distributed alignment: accuracy, low, high, chance, changed, floor, ...
    """

    task: Task | None
    variable: str
    site: str | Site
    size: int | None = 1
    pairs: int = 512
    epochs: int = 40
    batch: int = 64
    learning_rate: float = 0.05
    penalty: float = 0.3
    placebos: bool = True
    seed: int = 0
    rotation_: Tensor = field(init=False, repr=False)
    digest_: str = field(init=False, repr=False)
    size_: int = field(init=False)
    result_: Result = field(init=False, repr=False)

    @technique
    def fit(self, model: Model) -> DistributedAlignment:
        """Learn the subspace on one half of the pairs and judge it on the other. InputError without a task."""
        if self.task is None:
            raise InputError("an alignment is learnt on a task: DistributedAlignment(task, variable, site)")
        drawn = Pairs.draw(self.task, [self.variable], self.pairs, self.seed)
        train, test = drawn.half(False), drawn.half(True)
        self.rotation_, self.digest_ = self._search(model, train), model.digest
        self.size_ = self.rotation_.shape[1]
        right = self._right(model, test, self.rotation_)
        floor = self._right(model, test, None)
        answers = torch.stack([(test.expected == a).double().mean() for a in self._answers(drawn)])
        columns: dict[str, Any] = described("accuracy", right, self.seed, within=(0, 1)) | {
            "chance": float(answers.max())
        }
        columns |= {"changed": right[test.changed.numpy()].mean(), "floor": floor.mean(), "size": self.size_}
        columns |= described("total_effect", right - floor, self.seed, "total_")
        if self.placebos:
            columns |= self._placebos(model, train, test)
        data = xr.Dataset(columns | {"clean": ("pair", right), "corrupted": ("pair", floor)})
        title = f"{self.variable!r} in {self.size_} directions of {self.site}"
        self.result_ = Result(data, kind="distributed alignment", title=title)
        return self

    def score(self, model: Model, pairs: Pairs) -> float:
        """The interchange-intervention accuracy of the learned subspace on other pairs. InputError for other weights."""
        self.check(model)
        return float(self._right(model, pairs, self.rotation_).mean())

    def swap(self, run: Run) -> Edit:
        """The edit that gives the subspace the values it has in a run that kept the site. For model.run and sweep."""
        return RotatedSwap(self.site, source=aligned_values(run, Site.parse(self.site)), rotation=self.rotation_)

    # ---- files

    def check(self, model: Model) -> None:
        """InputError if it is not fitted, or was fitted on other weights."""
        if not hasattr(self, "digest_"):
            raise InputError("this alignment is not fitted: call fit(model) or DistributedAlignment.load(path)")
        check_weights(model, self.digest_, "this subspace")

    def save(self, path: str | Path) -> Path:
        """The rotation and what it is of, as one safetensors file. The task is a program of the user's: it is not kept."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in ("task", "site")}
        about = {"site": str(self.site), "settings": settings, "digest": self.digest_}
        return write_tensors(path, "pellucid_alignment", about, {"rotation": self.rotation_.cpu()})

    @classmethod
    @technique
    def load(cls, path: str | Path, *, task: Task | None = None) -> DistributedAlignment:
        """A subspace that was saved, for `swap`; with its task also for `score` and `fit`. InputError if the file is none."""
        said = "is no alignment: expected a file that its save wrote"
        with reading_tensors(path, "pellucid_alignment", said) as (about, tensors):
            made, rotation = cls(task, site=about["site"], **about["settings"]), tensors["rotation"]
        made.rotation_, made.size_, made.digest_ = rotation, rotation.shape[1], about["digest"]
        return made

    # ---- search

    def _search(self, model: Model, pairs: Pairs) -> Tensor:
        """The rotation [d, k] that training ends with."""
        base, source = self._sides(model, pairs)
        answers = self._answers(pairs)
        targets = torch.stack([(answers == a).nonzero()[0, 0] for a in pairs.expected]).to(source.device)
        generator = torch.Generator().manual_seed(self.seed)
        d = source.shape[-1]
        k = d if self.size is None else self.size
        if not 0 < k <= d:
            raise InputError(f"size {k} is no number of directions of {str(self.site)!r}, which has {d}")
        free = torch.randn(d, k, generator=generator, dtype=torch.float32).to(source.device)
        boundary = torch.tensor(0.5, device=source.device)
        learned = {"free": free} | ({"boundary": boundary} if self.size is None else {})
        batches = draws(len(base), self.batch, self.epochs, self.seed)

        def loss(drawn: Tensor, step: int) -> Tensor:
            mask = self._mask(boundary, d, 0.1 ** (step / len(batches))) if self.size is None else None
            swapped = self._logits(model, base.rows(drawn.tolist()), source[drawn], torch.linalg.qr(free)[0], mask)
            far = F.cross_entropy(swapped[:, answers], targets[drawn])
            return far + self.penalty * boundary.clamp(0, 1) if self.size is None else far

        adam = partial(torch.optim.Adam, lr=self.learning_rate)
        train(learned, batches, loss, adam, seed=self.seed, what="alignment steps")
        rotation = torch.linalg.qr(free.detach())[0]
        if self.size is None:
            rotation = rotation[:, : max(1, round(float(boundary.detach().clamp(0, 1)) * d))]
        return rotation

    def _mask(self, boundary: Tensor, d: int, temperature: float) -> Tensor:
        """[d] soft membership of each direction; `boundary` is the share of the width that is in."""
        at = (torch.arange(d, device=boundary.device) + 0.5) / d
        return torch.sigmoid((boundary - at) / (0.1 * temperature))

    def _sides(self, model: Model, pairs: Pairs) -> tuple[Inputs, Tensor]:
        """The base prompts, and the source's values at the site [pair, position, d]."""
        site = self._site(model)
        if self.task is None:
            raise InputError("this alignment was loaded without its task: DistributedAlignment.load(path, task=...)")
        base = model.inputs(self.task.prompts(pairs.base))
        with torch.no_grad():
            run = model.run(self.task.prompts(pairs.source), keep=[site])
        values = aligned_values(run, site)
        if values.ndim != 3 or base.stream("").padded:
            raise InputError(f"{str(site)!r} must hold one vector per position, and prompts must have one length")
        return base, values

    def _site(self, model: Model) -> Site:
        found = model.sites(self.site)
        if len(found) != 1:
            raise InputError(
                f"{str(self.site)!r} names {len(found)} sites: distributed alignment searches one at a time"
            )
        return found[0]

    def _logits(
        self, model: Model, base: Inputs, source: Tensor, rotation: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """[row, answer or token] under the interchange; without a rotation as the model is."""
        edits = (
            [] if rotation is None else [RotatedSwap(self._site(model), source=source, rotation=rotation, mask=mask)]
        )
        logits = model.run(base, edits=edits).logits
        return logits if logits.ndim == 2 else logits[:, -1]

    def _answers(self, pairs: Pairs) -> Tensor:
        return torch.cat([pairs.plain, pairs.expected]).unique()

    # ---- judgement

    def _right(self, model: Model, pairs: Pairs, rotation: Tensor | None) -> np.ndarray:
        """[pair] whether the most likely of the task's answers is the expected one."""
        base, source = self._sides(model, pairs)
        answers = self._answers(pairs)
        with torch.no_grad():
            chosen = answers[self._logits(model, base, source, rotation, None)[:, answers].argmax(-1).cpu()]
        return numbers(chosen == pairs.expected)

    def _placebos(self, model: Model, train: Pairs, test: Pairs) -> dict[str, Any]:
        """Held-out accuracy of the same search on a shuffled model, and on arbitrary labels."""
        blank = shuffled(model, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        dealt = [Pairs(p.base, p.source, p.plain, p.expected[torch.randperm(len(p.expected), generator=generator)])
                 for p in (train, test)]  # fmt: skip
        found = {
            "shuffled_model": self._right(blank, test, self._search(blank, train)),
            "arbitrary_labels": self._right(model, dealt[1], self._search(model, dealt[0])),
        }
        columns: dict[str, Any] = {}
        for name, right in found.items():
            columns |= described(name, right, self.seed, f"{name}_", within=(0, 1))
        return columns
