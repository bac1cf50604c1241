"""What does a metric read of a run? Its positions and its rows of the vocabulary, and nothing else is unembedded."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.weights import linear_map
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError

ELEMENTWISE = {"mul", "div", "tanh"}  # what may follow the unembedding when only some rows of it are computed


class Reads(Protocol):
    """What the engine asks of a bound metric: which logits it reads, and its value for each prompt."""

    @property
    def name(self) -> str: ...

    @property
    def positions(self) -> tuple[int, ...] | None:
        """Counted on each prompt's real tokens, negatives from the end; None: all, as they lie in the batch."""

    @property
    def tokens(self) -> Tensor | None:
        """[batch or 1, k] rows of the vocabulary; None: all."""

    @property
    def classes(self) -> bool:
        """Whether it reads a classifier's logits, [batch, classes]."""

    @property
    def outputs(self) -> int | None:
        """How many numbers it gives for each prompt; None: one, without a dimension of its own."""

    def __call__(self, logits: Tensor, /) -> Tensor:
        """[batch] (or [batch, outputs]) from exactly the logits it reads, [batch, positions, tokens]."""


class Reader:
    """Takes what a metric reads from residuals or from logits."""

    def __init__(self, anatomy: Anatomy, inputs: Inputs, metric: Reads) -> None:
        self.anatomy, self.metric = anatomy, metric
        self.stream = inputs.stream("")
        lengths, starts = self.stream.lengths, self.stream.starts
        if metric.positions is None:
            self.columns = torch.arange(self.stream.ids.shape[1], device=starts.device).expand(len(inputs), -1)
        else:
            shortest = int(lengths.min())
            if not all(-shortest <= p < shortest for p in metric.positions):
                raise InputError(f"the metric reads positions {metric.positions}, but a prompt has {shortest} tokens")
            self.columns = torch.stack([starts + (p if p >= 0 else lengths + p) for p in metric.positions], 1)
        self._rows: tuple[Tensor, Tensor | None] | None = None

    def read(self, logits: Tensor) -> Tensor:
        """The logits the metric is given, [batch, n, k], from all of them (or the last ones)."""
        if logits.ndim != 3 or self.metric.classes:
            return logits
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        kept = logits.shape[1] - self.stream.ids.shape[1]  # negative where only the last ones were unembedded
        logits = logits[rows, self.columns.to(logits.device) + kept]
        if self.metric.tokens is None:
            return logits
        index = self.metric.tokens.to(logits.device)[:, None].expand(len(logits), logits.shape[1], -1)
        return logits.gather(2, index)

    def pick(self, hidden: Tensor, start: int, clean: Tensor) -> Tensor:
        """The residuals [batch, n, d] at the positions read, from a variant's columns `start`.. and else the clean run."""
        early = bool((self.columns < start).any())  # asked on the host
        columns = self.columns.to(hidden.device, non_blocking=True)
        rows = torch.arange(len(columns), device=hidden.device)[:, None]
        picked = hidden[rows, (columns - start).clamp_min(0)]
        if early:
            picked = torch.where((columns < start)[..., None], clean[rows, columns], picked)
        return picked

    def unembed(self, hidden: Tensor) -> Tensor:
        """The logits the metric is given, [variant, batch, n, k], from residuals [variant, batch, n, d]."""
        head = self.anatomy.head
        assert head is not None
        x = hidden.flatten(0, 1)
        for step in head.steps[: head.after - 1]:
            x = step(x)
        tokens = self.metric.tokens
        if tokens is None or not head.unembed or not ELEMENTWISE.issuperset(head.names[head.after :]):
            for step in head.steps[head.after - 1 :]:
                x = step(x)
            x = x.unflatten(0, hidden.shape[:2])
            return x if tokens is None else x.gather(3, tokens.to(x.device)[None, :, None].expand(*x.shape[:3], -1))
        rows, bias = self._rows_read(x)
        logits = torch.einsum("vbnd,bkd->vbnk", x.unflatten(0, hidden.shape[:2]), rows.expand(hidden.shape[1], -1, -1))
        if bias is not None:
            logits = logits + bias[:, None]
        for step in head.steps[head.after :]:
            logits = step(logits)
        return logits

    def _rows_read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unembedding's weights [batch or 1, k, d] and biases [batch or 1, k] of the tokens read."""
        if self._rows is None:
            assert self.anatomy.head is not None
            weight, bias = linear_map(self.anatomy.module.get_submodule(self.anatomy.head.unembed), x.shape[-1])
            assert self.metric.tokens is not None
            tokens = self.metric.tokens.to(weight.device)
            self._rows = weight.T[tokens].to(x), None if bias is None else bias[tokens].to(x)
        return self._rows
