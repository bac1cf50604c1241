"""A monitor at work: it reads each step of one generation, fires in single rows, acts, and keeps its trace.

What is read in step i belongs to the token from which the step's token is chosen: in step 0 the last of the prompt, later
the one written before. So a monitor that fires in step i has its way before token i is written, and over an answer there
are as many readings as tokens; the last token written is read by nobody. Each monitor acts once in a row, at its first
firing, and not while the row is being given a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit
from pellucid.engine.generation import Generated
from pellucid.engine.steps import Action, Redirect, Say, Step, Stop, Watch
from pellucid.errors import InputError, PellucidError
from pellucid.results import Result
from pellucid.technique import of_generation

if TYPE_CHECKING:
    from pellucid.model import Model


@dataclass(eq=False)
class Seen:
    """New positions, from a step or from texts that are there: `prompt`, `answer` [row, position] which are of what;
    `values(site)` [row, position, ...]; `foreign(site)` [row, position] real ones of a site with positions of its own, else
    None; `text(reads, row, position)` what stands up to there."""

    prompt: np.ndarray
    answer: np.ndarray
    values: Callable[[Site], Tensor]
    foreign: Callable[[Site], np.ndarray | None]
    text: Callable[[str, int, int], str]

    def on(self, reads: str) -> np.ndarray:
        """[row, position] those a monitor counts that reads the "prompt", the "answer" or the "exchange"."""
        return {"prompt": self.prompt, "answer": self.answer}.get(reads, self.prompt | self.answer)


class Watching(Protocol):
    """What a guard asks of its monitor."""

    name: str
    then: Any

    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def level(self) -> float: ...
    def follow(self, state: dict[str, Any], seen: Seen) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Alarm:
    """What a human is told: which monitor fired in which `row` before which `token` (counted from 0), its `statistic` and
    `level`, and the texts so far."""

    monitor: str
    row: int
    token: int
    statistic: float
    level: float
    prompt: str
    text: str


@dataclass(eq=False)
class Trace:
    """What was read in one step: [row, position] scores and statistic; [row] who went on."""

    scores: np.ndarray
    statistic: np.ndarray
    ran: np.ndarray


@dataclass(eq=False)
class Guard:
    """A monitor in one generation. `trace` has an entry for each step; `acted` [row]: the step, the statistic, what
    was done, and the text that took the answer's place."""

    monitor: Watching
    model: Model
    trace: list[Trace] = field(default_factory=list)
    acted: dict[int, tuple[int, float, str, str | None]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.monitor.sites, self.look, self.monitor.name)
        then = self.monitor.then
        edits = [then] if isinstance(then, Edit) else list(then) if isinstance(then, list | tuple) else None
        self._then = then if edits is None else Redirect(edits, beside=True)

    def look(self, step: Step) -> dict[int, Action]:
        """Read a step; gives what is done to which rows."""
        running = step.running.cpu().numpy()
        scores, statistic = self.monitor.follow(self.state, self._seen(step, running))
        self.trace.append(Trace(scores, statistic, running))
        now = statistic[:, -1]
        step.record(torch.from_numpy(np.where(running, now, np.nan)))
        above = np.where(np.isnan(statistic), -np.inf, statistic)
        fired = running & ~step.given.cpu().numpy() & (above > self.monitor.level).any(1)
        actions: dict[int, Action] = {}
        for row in np.flatnonzero(fired).tolist():
            if row not in self.acted:
                self._act(step, row, float(above[row].max()), actions)
        return actions

    def _act(self, step: Step, row: int, value: float, actions: dict[int, Action]) -> None:
        then, monitor = self._then, self.monitor
        if callable(then) and not isinstance(then, Action):
            prompt, text = (
                _decoded(self.model, x) for x in (step.prompt[row][step.mask[row].bool()], step.tokens[row])
            )
            then = then(Alarm(monitor.name, row, step.index, value, monitor.level, prompt, text))
            then = Say(then) if isinstance(then, str) else then
            if then is not None and not isinstance(then, Action):
                raise InputError(
                    f"whom {monitor.name!r} asked said {then!r}: expected None, a text, pl.Stop, pl.Say or pl.Redirect"
                )
        if then is not None:
            reason = f"{monitor.name}: {value:.3g} above {monitor.level:.3g}"
            actions[row] = replace(then, reason=reason) if isinstance(then, Stop | Say) and not then.reason else then
        instead = then.text if isinstance(then, Say) and then.then == "end" and isinstance(then.text, str) else None
        done = type(then).__name__.lower() if then is not None else "recorded"
        self.acted[row] = step.index, value, done, instead

    def _seen(self, step: Step, running: np.ndarray) -> Seen:
        first = step.index == 0
        prompt = step.mask.bool().cpu().numpy() & running[:, None] if first else np.zeros((len(running), 1), dtype=bool)
        answer = np.zeros_like(prompt)
        answer[:, -1] = running

        def foreign(site: Site) -> np.ndarray | None:
            real = step.real(site)
            if step._found(site)[1] is None:
                return None
            return real.cpu().numpy() & running[:, None] & first

        def text(reads: str, row: int, position: int) -> str:
            asked = step.prompt[row][step.mask[row].bool()], step.tokens[row]
            return said_up_to(self.model, reads, *asked)

        return Seen(prompt, answer, step.new, foreign, text)

    @classmethod
    def told(cls, guards: Sequence[Guard], generated: Generated) -> Result:
        return firings(guards, generated)


class Given:
    """A guard that is there, as a monitor of one generation: who watches it reads it while it works."""

    def __init__(self, guard: Guard) -> None:
        self.begin = lambda model: guard


def said_up_to(model: Model, reads: str, prompt: Tensor, answer: Tensor) -> str:
    """The text that a reader of words is given."""
    parts = {"prompt": [prompt], "answer": [answer]}.get(reads, [prompt, answer])
    return "".join(_decoded(model, part) for part in parts)


def _decoded(model: Model, ids: Tensor) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    return str(model.tokenizer.decode(ids.tolist(), skip_special_tokens=True))


_NOT = (-1, 0.0, "", None)


def firings(guards: Sequence[Guard], generated: Generated) -> Result:
    """Dims (prompt, monitor, step): `statistic`, `score` and `fired`; step 0 is the prompt's last token, those before it
    are negative. `threshold` [monitor]; `acted` [prompt, monitor] the step in which it did, -1 where it did not, and `done`."""
    written = generated.tokens.shape[1]
    wide = [g.trace[0].statistic.shape[1] if np.isfinite(g.trace[0].statistic[:, :-1]).any() else 1 for g in guards]
    before = max(wide) - 1
    shape = (len(generated), len(guards), before + written)
    score, statistic = np.full(shape, np.nan), np.full(shape, np.nan)
    for m, guard in enumerate(guards):
        seen = np.stack([t.ran for t in guard.trace], 1)
        more = seen.sum(1) - generated.lengths.cpu().numpy()  # the step in which a row is stopped writes nothing
        missed = (more < 0) | (more > np.array([why == "watcher" for why in generated.ended]))
        if missed.any():  # once seen in others' hooks: a monitor that is not asked at every token says nothing about it
            raise PellucidError(
                f"{guard.monitor.name!r} was asked {seen.sum(1).tolist()} times for {generated.lengths.tolist()} tokens"
            )
        first = guard.trace[0]
        for made, parts in ((score, [t.scores for t in guard.trace]), (statistic, [t.statistic for t in guard.trace])):
            made[:, m, before + 1 - min(wide[m], first.scores.shape[1]) : before + 1] = parts[0][:, -wide[m] :]
            for i, part in enumerate(parts[1:], 1):
                made[:, m, before + i] = np.where(guard.trace[i].ran, part[:, -1], np.nan)
    statistic[~np.isfinite(statistic)] = np.nan  # fewer than k tokens so far
    names = _apart([g.monitor.name for g in guards])
    levels = np.array([g.monitor.level for g in guards])
    acted = np.array([[g.acted.get(row, _NOT)[0] for g in guards] for row in range(len(generated))])
    done = [[g.acted.get(row, _NOT)[2] for g in guards] for row in range(len(generated))]
    steps = range(-before, written)
    shown = [_shown(guards, generated, row) for row in range(len(generated))]
    data = xr.Dataset(
        {
            "statistic": (("prompt", "monitor", "step"), statistic, {"unit": "score"}),
            "score": (("prompt", "monitor", "step"), score),
            "fired": (("prompt", "monitor", "step"), np.where(np.isnan(statistic), -np.inf, statistic) > levels[:, None]),
            "threshold": ("monitor", levels),
            "acted": (("prompt", "monitor"), acted),
            "done": (("prompt", "monitor"), np.array(done, dtype=str).reshape(acted.shape)),
        },
        coords={
            "monitor": names, "step": list(steps),
            "token": (("prompt", "step"), _tokens(generated, before)),
            "ended": ("prompt", list(generated.ended)), "because": ("prompt", list(generated.because)),
            "shown": ("prompt", shown),
        },
    )  # fmt: skip
    return Result(
        data, kind="monitor trace", title=_title(names, acted, done),
        provenance=of_generation(generated, "firings"),
    )  # fmt: skip


def _apart(names: list[str]) -> list[str]:
    return [f"{n} {names[: i + 1].count(n)}" if n in names[:i] else n for i, n in enumerate(names)]


def _tokens(generated: Generated, before: int) -> np.ndarray:
    """[prompt, step] the token that is read in a step."""
    made = np.full((len(generated), before + generated.tokens.shape[1]), "", dtype=object)
    stream = generated.inputs.stream("") if generated.inputs is not None else None
    for row, labels in enumerate(generated.labels):
        if stream is not None:
            own = stream.labels[row][-before - 1 :]
            made[row, before + 1 - len(own) : before + 1] = own
        made[row, before + 1 : before + 1 + len(labels)] = labels[: made.shape[1] - before - 1]
    return made.astype(str)


def _shown(guards: Sequence[Guard], generated: Generated, row: int) -> str:
    """What a reader should see: a safe completion alone, and whole, where one took the answer's place."""
    said = [(g.acted[row][0], g.acted[row][3]) for g in guards if row in g.acted and g.acted[row][2] in ("say", "stop")]
    text = min(said, key=lambda each: each[0])[1] if said else None
    return generated.texts[row] if text is None else text


def _title(names: list[str], acted: np.ndarray, done: list[list[str]]) -> str:
    if not (acted >= 0).any():
        return f"{', '.join(names)}: no alarm"
    if len(acted) == 1:
        each = [f"{n} fired at token {t} ({d})" for n, t, d in zip(names, acted[0], done[0], strict=True) if t >= 0]
        return "; ".join(each)
    return "; ".join(
        f"{n} fired in {int((acted[:, m] >= 0).sum())} of {len(acted)} answers" for m, n in enumerate(names)
    )
