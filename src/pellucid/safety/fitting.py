"""What is a monitor to read, if all one has are conversations in which the thing happens and others in which it does not?

A logistic direction on the residuals of the very tokens that the monitor will read. A probe of the prompt is no monitor of
answers: its scale moves from the one to the other (benchmarks/safety_monitors.py shows it beside this one), so what is read
and what was fitted are one here. All tokens of a conversation have its label, and its tokens stand together in the folds by
which the regularisation is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.linear import STRENGTHS, LogisticProbe
from pellucid.safety.calibrating import several, traces
from pellucid.safety.guarding import Seen
from pellucid.safety.monitors import Direction, Monitor, Monitored, Reads
from pellucid.safety.rules import Rule, ema
from pellucid.technique import technique

LEAST = 4  # conversations of each kind


@dataclass(frozen=True, eq=False)
class _Collect(Monitored):
    """Keeps what would be read, and says nothing."""

    site: str
    reads: Reads
    name: str = "fit"
    threshold: None = None
    then: None = None
    digest: str = ""

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site.parse(self.site),)

    def follow(self, state: dict[str, Any], seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        own = seen.foreign(self.sites[0])
        on = seen.on(self.reads) if own is None else own
        rows, _ = np.nonzero(on)
        if len(rows):
            values = seen.values(self.sites[0])
            state.setdefault("rows", []).append(rows)
            state.setdefault("cells", []).append(values[torch.from_numpy(on).to(values.device)].float().cpu())
        nothing = np.full(seen.prompt.shape, np.nan)
        return nothing, nothing


def token_values(
    model: Model, prompts: Sequence[Any], site: str, *, reads: Reads = "answer", replies: Sequence[str] | None = None,
    max_new_tokens: int = 40, batch: int = 8,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """[token, d] what a monitor at a site reads in these conversations, and [token] which conversation each is of."""
    states: list[dict[str, Any]] = []
    for _ in traces(model, _Collect(site, reads), prompts, replies, max_new_tokens, batch, states):
        pass
    cells = torch.cat([cell for state in states for cell in state.get("cells", [])])
    rows = [np.concatenate(state["rows"]) + i * batch for i, state in enumerate(states) if "rows" in state]
    return cells, np.concatenate(rows)


@technique
def fit_monitor(
    model: Model,
    prompts: Sequence[Any],
    labels: Sequence[Any],
    *,
    site: str,
    replies: Sequence[str] | None = None,
    reads: Reads = "answer",
    rule: Rule | str | None = None,
    then: Any = None,
    name: str = "monitor",
    max_new_tokens: int = 40,
    batch: int = 8,
    seed: int = 0,
) -> Monitor:
    """A monitor without a threshold yet; `labels` [conversation]: does the thing happen there?

    The score is the log odds (nats) of a logistic probe at the residual (or other vector) at `site`; `rule` is `ema(.3)` by
    default, and `then` what is done. `calibrate` sets its threshold, on conversations that are not among these. InputError for fewer than four
    conversations of either kind, and for one that is in both.

    >>> monitor = fit_monitor(model, prompts, labels, site="layers.14.resid_post")  # doctest: +SKIP
    """
    truth, prompts = np.asarray(labels).astype(bool), several("prompts", prompts)
    if len(truth) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(truth)} labels: give one for each")
    if min(truth.sum(), (~truth).sum()) < LEAST:
        raise InputError(
            f"{int(truth.sum())} conversations where it happens and {int((~truth).sum())} others: expected {LEAST} of each"
        )
    told = list(zip(map(repr, prompts), replies or [""] * len(prompts), strict=True))
    both = {t for t, y in zip(told, truth, strict=True) if y} & {t for t, y in zip(told, truth, strict=True) if not y}
    if both:
        raise InputError(f"{len(both)} conversations are labelled both ways, as {next(iter(both))[0]:.80}")
    x, rows = token_values(
        model, prompts, site, reads=reads, replies=replies, max_new_tokens=max_new_tokens, batch=batch
    )
    probe = LogisticProbe(STRENGTHS, 3, seed).fit(x, truth[rows], rows)
    no, yes = 0, 1  # its classes are in order
    vector, offset = (part[..., yes] - part[..., no] for part in (probe.weight_, probe.bias_))
    direction = Direction(site, vector.float(), float(offset))
    return Monitor(direction, ema(0.3) if rule is None else rule, reads, then=then, name=name, digest=model.digest)
