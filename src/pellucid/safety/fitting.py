"""What is a monitor to read, if all one has are conversations in which the thing happens and others in which it does not?

A logistic direction on the residuals of the very tokens that the monitor will read. A probe of the prompt is no monitor of
answers: its scale moves from the one to the other (benchmarks/safety_monitors.py shows it beside this one), so what is read
and what was fitted are one here. All tokens of a conversation have its label, and its tokens stand together in the folds by
which the regularisation is chosen.

Beside it stand readers of the same text (groups of characters) and of its form (length, words, marks), in the same folds of whole
conversations: where one does as well, the title says so first, for such a monitor says what the text says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.direction import Direction
from pellucid.probing.linear import STRENGTHS, LogisticProbe
from pellucid.results import Result
from pellucid.safety.calibrating import several, traces
from pellucid.safety.guarding import Seen
from pellucid.safety.judging import as_well, form_scores, judged, text_scores
from pellucid.safety.monitors import Monitor, Monitored, Reads
from pellucid.safety.rules import Rule, ema
from pellucid.technique import technique

LEAST = 4  # conversations of each kind
FOLDS = 3


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
            last = seen.on(self.reads)
            for row in np.flatnonzero(last.any(1)):
                state.setdefault("texts", {})[int(row)] = seen.text(
                    self.reads, int(row), int(np.flatnonzero(last[row])[-1])
                )
        nothing = np.full(seen.prompt.shape, np.nan)
        return nothing, nothing


def token_values(
    model: Model, prompts: Sequence[Any], site: str, *, reads: Reads = "answer", replies: Sequence[str] | None = None,
    max_new_tokens: int = 40, batch: int = 8,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """[token, d] what a monitor at a site reads in these conversations, and [token] which conversation each is of."""
    return _read(model, prompts, site, reads, replies, max_new_tokens, batch)[:2]


def _read(
    model: Model,
    prompts: Sequence[Any],
    site: str,
    reads: Reads,
    replies: Sequence[str] | None,
    tokens: int,
    batch: int,
) -> tuple[Tensor, np.ndarray, list[str]]:
    """The same, and the text that was read of each conversation."""
    states: list[dict[str, Any]] = []
    for _ in traces(model, _Collect(site, reads), prompts, replies, tokens, batch, states):
        pass
    cells = torch.cat([cell for state in states for cell in state.get("cells", [])])
    rows = [np.concatenate(state["rows"]) + i * batch for i, state in enumerate(states) if "rows" in state]
    texts = [
        state.get("texts", {}).get(i % batch, "") for i, state in ((i, states[i // batch]) for i in range(len(prompts)))
    ]
    return cells, np.concatenate(rows), texts


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
    default, and `then` what is done. `monitor.fitted` says how well it tells apart conversations of folds it was not fitted on, beside
    readers of the text alone and of its form. `calibrate` sets its threshold, on conversations that are not among these. InputError for fewer than four
    conversations of either kind, and for one that is in both.

    >>> monitor = fit_monitor(model, prompts, labels, site="layers.14.resid_post")
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
    x, rows, texts = _read(model, prompts, site, reads, replies, max_new_tokens, batch)
    rule = Rule.of(ema(0.3) if rule is None else rule)
    direction = _direction(site, x, truth[rows], rows, seed)
    found = _beside(site, x, rows, texts, truth, rule, seed, name, model.name)
    return Monitor(direction, rule, reads, then=then, name=name, digest=model.digest, fitted=found)


def _direction(site: str, x: Tensor, labels: np.ndarray, rows: np.ndarray, seed: int) -> Direction:
    probe = LogisticProbe(STRENGTHS, 3, seed).fit(x, labels, rows)
    no, yes = 0, 1  # its classes are in order
    vector, offset = (part[..., yes] - part[..., no] for part in (probe.weight_, probe.bias_))
    return Direction(site, vector.float(), float(offset))


def _beside(
    site: str,
    x: Tensor,
    rows: np.ndarray,
    texts: list[str],
    truth: np.ndarray,
    rule: Rule,
    seed: int,
    name: str,
    on: str,
) -> Result:
    """Over `row` the `area` by which conversations of a fold are told apart that was not fitted on, with its interval."""
    rng = np.random.default_rng(seed)
    fold = np.zeros(len(truth), dtype=int)
    for kind in (True, False):  # both kinds in every fold
        fold[rng.permutation(np.flatnonzero(truth == kind))] = np.arange((truth == kind).sum()) % FOLDS
    scores = {k: np.zeros(len(truth)) for k in ("monitor", "text", "form")}
    for f in range(FOLDS):
        out, inside = np.flatnonzero(fold == f), fold != f
        mine = inside[rows]
        read = _direction(site, x[torch.from_numpy(mine)], truth[rows][mine], rows[mine], seed)
        scores["monitor"][out] = [_largest(read, x[torch.from_numpy(rows == i)], rule) for i in out]
        for row, by in (("text", text_scores), ("form", form_scores)):
            with suppress(ValueError):  # no text that has anything to read, as one of only marks
                scores[row][out] = by(
                    [texts[i] for i in np.flatnonzero(inside)], truth[inside], [texts[i] for i in out]
                )
    found = {k: judged(v[None], truth, fold, np.zeros((2, 0), dtype=int), np.arange(len(truth)), seed=seed) for k, v in scores.items()}  # fmt: skip
    own = found["monitor"]
    controls = {k: v["area"] for k, v in found.items() if k != "monitor"}
    title = as_well(own["area"], controls) + f"{name} at {site} of {on}: area {own['area']:.2f} [{own['low']:.2f}, {own['high']:.2f}] on conversations it was not fitted on"  # fmt: skip
    columns = {k: ("row", np.array([v[k] for v in found.values()])) for k in ("area", "low", "high")}
    data = xr.Dataset({**columns, "text_read": ("conversation", np.array(texts, dtype=str))}, {"row": list(found)})
    return Result(data, kind="monitor fit", title=title)


def _largest(read: Direction, x: Tensor, rule: Rule) -> float:
    """The largest statistic of one conversation's tokens [token, d]."""
    scores = read(x).double().numpy()[None]
    found = rule.follow({}, scores, np.ones(scores.shape, dtype=bool))
    return float(np.fmax.reduce(found[np.isfinite(found)], initial=-1e9))
