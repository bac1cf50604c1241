"""A generation while it runs: what is kept of each step, who is asked about it, and what that does to single rows.

The order within a step: the pass begins; at each site edits are written, then values are kept and shown; an edit's
condition is asked as soon as its sites are there; after the pass the watchers are asked, and only then the token is chosen,
by transformers. Every edit has a history of the rows it held in at each step, so that a column that is computed again
(without a cache, or as a key) is written to exactly as when it was new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.edits import Edit, turned
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import Spot, spots
from pellucid.engine.pausing import pause
from pellucid.engine.run import Session, head_output
from pellucid.engine.steps import Action, Redirect, Say, Step, Stop, Watch, as_actions, as_rows, as_watch
from pellucid.engine.writing import Window, placed
from pellucid.errors import InputError, Refused, SiteError


@dataclass(eq=False)
class Held:
    """An edit in force: on what condition, and in which rows (None: all)."""

    edit: Edit
    watch: Watch | None = None
    rows: Tensor | None = None


class Follower(Session):
    """A session over the passes of one generation.

    `runs` is the module that is called once a step; `encode` makes token ids of a text, `resolve` makes edits ready.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        runs: nn.Module,
        inputs: Inputs,
        keep: Sequence[Site | str],
        edits: Sequence[Edit],
        watches: Sequence[Watch],
        encode: Callable[[str], list[int]],
        resolve: Callable[[Sequence[Edit]], list[Edit]],
    ) -> None:
        super().__init__(anatomy, inputs, (), edits)
        self.anatomy, self.runs, self.encode, self.resolve = anatomy, runs, encode, resolve
        self.stream = inputs.stream("")
        self.device, self.rows = self.stream.ids.device, len(inputs)
        self.ids_name = "decoder_input_ids" if "decoder" in inputs.streams else "input_ids"
        self.history: dict[int, list[Tensor]] = {}
        self.held = {
            id(e): Held(e, None if e.when is None else as_watch(e.when, f"when= of the edit on {str(e.site)!r}"))
            for e in edits
        }
        self.watches = tuple(watches)
        conditions = {id(h.watch): h.watch for h in self.held.values() if h.watch is not None}
        # ---- sites
        wanted = [spot for k in keep for spot in spots(anatomy, k)]
        self.kept_steps = [s for s in wanted if s.site.at is None and inputs.stream(s.stream) is self.stream]
        self.kept_prompt = [s for s in wanted if s not in self.kept_steps]
        self.series: dict[Tap, list[Tensor]] = {s.tap: [] for s in self.kept_steps}
        self.whole = {s.tap for s in self.kept_prompt}
        self.looks: dict[int, list[Spot]] = {
            id(w): [spot for site in w.watched for spot in spots(anatomy, site)]
            for w in (*conditions.values(), *self.watches)
        }
        self.shown: dict[Tap, list[Spot]] = {}
        for spot in (s for each in self.looks.values() for s in each):
            if spot not in self.shown.setdefault(spot.tap, []):
                self.shown[spot.tap].append(spot)
        self.conditions = {key: watch for key, watch in conditions.items() if self.looks[key]}
        # ---- what was seen and said
        self.steps = 0
        self.failed: Exception | None = None  # in what the user asked
        self.beams = False  # whose tokens are not told one by one
        self.values: dict[str, tuple[Tensor, Tensor | None]] = {}  # of this step; of the encoder, for good
        self.answers: dict[int, Tensor] = {}
        self.asked: dict[int, int] = {}
        self.states: dict[int, dict[str, Any]] = {}
        self.fired: dict[int, list[Tensor]] = {}
        self.records: dict[int, list[Tensor | None]] = {}
        # ---- rows
        self.tokens: list[Tensor] = []
        self.running = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        self.stopped = torch.zeros_like(self.running)  # in this step
        self.queues: dict[int, tuple[list[int], Say]] = {}
        self.because: dict[int, str] = {}
        self.logits: Tensor | None = None
        self.wire: Wiretap | None = None
        self.met: set[Tap] = set()
        self.directed: dict[tuple[int, ...], list[Held]] = {}
        self.given: list[Edit] = []  # by whose ids they are known
        self.since: dict[int, int] = {}  # id of an edit that came later -> steps before it

    @property
    def index(self) -> int:
        return max(0, self.steps - 1)

    # ---- going up and coming down

    def __enter__(self) -> Follower:
        self._owner = threading.get_ident()
        self._up()
        # without kwargs: it is called last, after the taps of the module itself
        self._last = self.runs.register_forward_hook(self._after)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._last.remove()
        self._down()

    def _up(self) -> None:
        self.wire = Wiretap(self.anatomy.module, self.handlers(), self.rows, self._begin, self.runs)
        self.wire.__enter__()

    def _down(self) -> None:
        if self.wire is not None:
            self.wire.__exit__(None, None, None)
            self.met |= self.wire.met
            self.wire = None

    # ---- one pass

    def _begin(self, kwargs: dict[str, Any]) -> None:
        """What the model is called with tells which columns it computes."""
        if self.steps != len(self.tokens) and not self.beams:
            raise Refused(
                f"{type(self.runs).__name__} was passed a second time for one token (guidance, an assistant, chunks of the prompt): "
                "what is seen and edited cannot be laid to tokens; switch that off in its generation config"
            )
        ids = kwargs.get(self.ids_name)
        width = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        offset = self.stream.ids.shape[1] + self.steps - width
        if offset < 0 and (self.writing or self.series or self.whole or self.shown):
            raise Refused(
                f"{type(self.runs).__name__} computes {width} positions for {width + offset} tokens of prompt and answer: it adds some of "
                "its own, and what is seen and edited cannot be laid to tokens; generate without keep=, when= and edits="
            )
        for window in self.windows.values():
            if window.stream is self.stream:
                window.width, window.offset = width, offset
        self.steps += 1

    def window(self, spot: Spot) -> Window:
        fresh = (spot.stream, spot.keys) not in self.windows
        window = super().window(spot)
        if fresh:
            window.generating, window.history = window.stream is self.stream, self.history
        return window

    def handlers(self) -> dict[Tap, Handler]:
        # in this order: where two sites are one tensor, what is seen is what was written
        return {
            tap: self._handler(tap) for tap in dict.fromkeys((*self.writing, *self.series, *self.whole, *self.shown))
        }

    def _handler(self, tap: Tap) -> Handler:
        writers = [(w, self.window(w.spot)) for w in self.writing.get(tap, ())]
        shown = [(spot, self.window(spot), str(spot.site)) for spot in self.shown.get(tap, ())]
        kept = next((s for s in self.kept_steps if s.tap == tap), None)
        seen_by = {
            key for key, looks in self.looks.items() if key in self.conditions and any(s.tap == tap for s in looks)
        }
        window = None if kept is None else self.window(kept)

        def handler(x: Tensor) -> Tensor | None:
            old = x
            for w, own in writers:
                self._hold(self.held[id(w.edit)])
                x = w.meet(tap, x, own)
            if kept is not None and window is not None:
                self.series[tap].append(self._new(kept, window, x, last=True).clone())
            if tap in self.whole and self.index == 0 and tap not in self.kept:
                self.kept[tap] = x.clone()
            for spot, own, name in shown:
                self.values[name] = self._shown(spot, own, x)
            for key in seen_by:
                if self.asked.get(key) != self.index and all(str(s.site) in self.values for s in self.looks[key]):
                    self._ask_condition(key)
            return None if x is old else x

        return handler

    def _new(self, spot: Spot, window: Window, x: Tensor, last: bool = False) -> Tensor:
        """The columns of the whole part that this step computes for the first time (or the last one), axes as they are."""
        axis = spot.position_axis
        window = window.of(spot, x.shape[axis])
        prompt = self.stream.ids.shape[1]
        first = prompt - 1 + self.index if self.index or last else 0
        n = prompt if first == 0 and not last else 1
        return x.narrow(axis, first - window.offset, n)

    def _shown(self, spot: Spot, window: Window, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[row, position, ...] of the site's unit, and which positions are real where it is not what is being written."""
        ours = window.stream is self.stream
        axis = spot.position_axis
        queries = x.shape[axis]
        x = self._new(spot, window, x) if ours else x
        if spot.site.port == "heads" and spot.site.part.endswith(".out"):
            x = head_output(self.anatomy, spot.site, x)
        elif spot.unit is not None:
            x = x.select(spot.unit_axis, spot.unit)
            axis -= spot.unit_axis < axis
        x = x.movedim(axis, 1)
        if "key" in spot.site.dims:  # counted from the first real token
            x = turned(x, window.first_key(queries, x.shape[-1]).to(x.device), x.ndim - 1)
        return x.detach().clone(), None if ours else window.stream.mask.bool()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._owner or self.wire is None or self.wire._owner is None:
            return
        logits = output.logits if hasattr(output, "logits") else output[0]
        self.logits = logits[:, -1].detach().float()
        for key in self.conditions:
            if self.asked.get(key) != self.index:  # then all of it is the encoder's
                missed = next((n for s in self.looks[key] if (n := str(s.site)) not in self.values), None)
                self._met(missed)
                self.fired.setdefault(key, []).append(self.answers[key] & self.running)
        for held in self.held.values():
            self._hold(held)

    # ---- asking

    def _met(self, missed: str | None) -> None:
        if missed is not None:
            raise SiteError(f"step {self.index} did not pass through {missed!r}, so there is nothing to watch")

    def _step(self, watch: Watch, logits: Tensor | None = None) -> Step:
        key = id(watch)
        values = {name: self.values[name] for s in self.looks[key] if (name := str(s.site)) in self.values}
        given = torch.zeros_like(self.running)
        if self.queues:
            given[list(self.queues)] = True
        state = self.states.setdefault(key, {})
        return Step(
            self.index,
            self.stream.ids,
            self.stream.mask,
            self.running.clone(),
            given,
            logits,
            state,
            self.tokens,
            values,
        )

    def _call(self, watch: Watch, step: Step) -> Any:
        assert self.wire is not None
        try:
            with self.wire.asleep():
                return watch.function(step)
        except Exception as error:
            self.failed = error
            raise

    def _ask_condition(self, key: int) -> None:
        watch = self.conditions[key]
        said = as_rows(self._call(watch, self._step(watch)), self.running)
        self.answers[key], self.asked[key] = said, self.index
        self.fired.setdefault(key, []).append(said & self.running)

    def _holds(self, held: Held) -> Tensor:
        """[row] where an edit holds now. A condition whose sites are still to come says what it said in the step before."""
        rows = torch.ones_like(self.running) if held.rows is None else held.rows
        if held.watch is None:
            return rows
        key = id(held.watch)
        if key not in self.conditions:  # it watches nothing, and is asked when it is first needed
            if self.asked.get(key) != self.index:
                said = as_rows(self._call(held.watch, self._step(held.watch)), self.running)
                self.answers[key], self.asked[key] = said, self.index
                self.fired.setdefault(key, []).append(said & self.running)
        elif key not in self.answers:
            return torch.zeros_like(rows)
        return rows & self.answers[key]

    def _hold(self, held: Held) -> None:
        """Write down where an edit holds in this step, once."""
        if held.watch is None and held.rows is None:
            return
        log = self.history.setdefault(id(held.edit), [])
        while len(log) <= self.index:
            log.append(self._holds(held))

    def act(self) -> None:
        """Ask the watchers about the step, and do what they say. Of two that decide about a row the first has its way."""
        looks = (s for w in self.watches for s in self.looks[id(w)])
        self._met(next((name for s in looks if (name := str(s.site)) not in self.values), None))
        decided: set[int] = set()
        for watch in self.watches:
            key, step = id(watch), self._step(watch, self.logits)
            records = self.records.setdefault(key, [])
            records.append(None)

            def record(values: Tensor, records: list[Tensor | None] = records) -> None:
                records[-1] = values

            step._record = record
            actions = as_actions(self._call(watch, step), self.rows)
            alive = self.running.tolist()
            actions = {
                row: a for row, a in actions.items() if alive[row] and not (isinstance(a, Say) and row in self.queues)
            }
            fired = torch.zeros_like(self.running)
            if actions:
                fired[list(actions)] = True
            self.fired.setdefault(key, []).append(fired)
            beside = {row for row, a in actions.items() if isinstance(a, Redirect) and a.beside}
            self._do({row: a for row, a in actions.items() if row not in decided or row in beside}, watch)
            decided |= actions.keys() - beside
        self.values = {name: v for name, v in self.values.items() if v[1] is not None}

    def _do(self, actions: dict[int, Action], watch: Watch) -> None:
        for row, action in actions.items():
            reason = getattr(action, "reason", "") or watch.label
            if isinstance(action, Say):
                ids = self.encode(action.text) if isinstance(action.text, str) else [int(i) for i in action.text]
                self.because[row] = reason
                if ids:
                    self.queues[row] = ids, action
                    continue
                if action.then == "go on":
                    continue
            if isinstance(action, Stop | Say):
                self.stopped[row], self.because[row] = True, reason
                self.queues.pop(row, None)
        to: dict[int, tuple[Redirect, list[int]]] = {}
        for row, action in actions.items():
            if isinstance(action, Redirect):
                to.setdefault(id(action), (action, []))[1].append(row)
        for redirect, rows in to.values():
            self._redirect(redirect, rows)

    def _redirect(self, redirect: Redirect, rows: list[int]) -> None:
        mask = torch.zeros_like(self.running)
        mask[rows] = True
        before = [torch.ones_like(mask)] * self.steps
        for held in () if redirect.beside else self.held.values():  # what held so far holds in these rows no longer
            if held.watch is None and held.rows is None:
                self.history[id(held.edit)] = list(before)
            held.rows = (torch.ones_like(mask) if held.rows is None else held.rows) & ~mask
        given = [redirect.edits] if isinstance(redirect.edits, Edit) else [*redirect.edits]
        known = self.directed.get(key := tuple(map(id, given)))  # a watcher may say the same at every step
        if known is None:
            edits = self.resolve(given)
            self.given += given
            at = next((e for e in edits if e.site.at is not None or e.when is not None), None)  # type: ignore[union-attr]
            if at is not None:
                raise InputError(
                    f"a row cannot be redirected to an edit on {str(at.site)!r}: the prompt has been computed, and the condition "
                    "has been decided; leave '@' and when= out"
                )
            known = self.directed[key] = [Held(e, None, torch.zeros_like(mask)) for e in edits]
            for held in known:
                self.held[id(held.edit)], self.since[id(held.edit)] = held, self.steps
                self.history[id(held.edit)] = [torch.zeros_like(mask)] * self.steps
            for w in placed(self.anatomy, edits):
                for tap in w.taps:
                    self.writing.setdefault(tap, []).append(w)
            self._down()
            self._up()
        for held in known:
            assert held.rows is not None
            held.rows = held.rows | mask

    # ---- the token

    def force(self, scores: Tensor) -> Tensor:
        """Scores [row, vocabulary] in which rows that are given a text have one choice."""
        if not self.queues:
            return scores
        scores = scores.clone()
        for row, (ids, _) in self.queues.items():
            if not 0 <= ids[0] < scores.shape[1]:
                raise InputError(f"a row was to be given token {ids[0]}: this model has 0 to {scores.shape[1] - 1}")
            scores[row] = -torch.inf
            scores[row, ids[0]] = 0.0
        return scores

    def written(self, token: Tensor, pad: int) -> tuple[Tensor, list[int]]:
        """Take note of this step's tokens [row]: which rows wrote one, and which of them have now said a text to its end."""
        wrote = self.running & ~self.stopped
        self.tokens.append(torch.where(wrote, token, torch.full_like(token, pad)))
        said = []
        for row, (ids, action) in list(self.queues.items()):
            del ids[0]
            if not ids:
                del self.queues[row]
                said += [row] if action.then == "end" else []
        self.stopped = torch.zeros_like(self.running)
        return wrote, said

    # ---- afterwards

    def finish(self, n: int) -> None:
        """SiteError or Refused where the passes and what was met in them do not fit the `n` tokens written."""
        self._down()
        if self.steps != n:
            raise Refused(
                f"{n} tokens were generated in {self.steps} passes of {type(self.runs).__name__}: which belong to which?"
            )
        for tap, kept in self.series.items():
            if len(kept) != n:
                site = next(str(s.site) for s in self.kept_steps if s.tap == tap)
                raise SiteError(f"{site!r} was to be kept, but {n - len(kept)} of {n} steps did not pass through it")
        for tap, writers in self.writing.items():
            if tap not in self.met and any(self.since.get(id(w.edit), 0) < n for w in writers):
                raise SiteError(
                    f"the edit on {str(writers[0].spot.site)!r} never fired: the run did not pass through it"
                )

    def names(self) -> dict[int, str]:
        """Every watcher and condition by what it is called; several of one name are counted."""
        found: dict[int, str] = {}
        asked = {id(h.watch): h.watch for h in self.held.values() if h.watch is not None}
        for key, watch in {**asked, **{id(w): w for w in self.watches}}.items():
            names, name = set(found.values()), watch.label
            found[key] = (
                name if name not in names else next(f"{name} {i}" for i in range(2, 999) if f"{name} {i}" not in names)
            )
        return found

    def gathered(self) -> dict[Tap, Tensor]:
        """What was kept, its positions the steps. The keys of patterns and scores are those of prompt and answer, counted from
        the row's first real token; behind the last, of shorter rows, nothing."""
        made = {}
        for spot in {s.tap: s for s in self.kept_steps}.values():
            parts, window = self.series[spot.tap], self.window(spot)
            if "key" in spot.site.dims and window.keys is self.stream:
                total = self.stream.ids.shape[1] + len(parts) - 1
                nothing = 0.0 if spot.site.part.endswith(".pattern") else float(torch.finfo(parts[0].dtype).min)
                parts = [_on_columns(x, self.stream.ids.shape[1] + i, total, nothing) for i, x in enumerate(parts)]
            made[spot.tap] = torch.cat(parts, spot.position_axis)
            if "key" in spot.site.dims:
                made[spot.tap] = turned(made[spot.tap], window.keys.starts.to(parts[0].device), parts[0].ndim - 1)
        return made


def _on_columns(x: Tensor, seen: int, total: int, nothing: float) -> Tensor:
    """A query's keys, of which the last belongs to column `seen` - 1 (or which begin at the first column, in a cache of
    fixed size), among `total` columns."""
    keys = x[..., :seen]
    before = seen - keys.shape[-1]
    return torch.nn.functional.pad(keys, (before, total - seen), value=nothing)


class Choosing(LogitsProcessor):
    """Before each token: the watchers are asked, and rows that are given a text have no choice."""

    def __init__(self, follower: Follower, ready: Callable[[], None]) -> None:
        self.follower, self.ready = follower, ready

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(scores) != self.follower.rows:
            raise Refused(
                f"this model writes {len(scores)} rows of tokens for {self.follower.rows} prompts, and its steps cannot be told apart"
            )
        self.follower.act()
        scores = self.follower.force(scores)
        self.ready()
        return scores


class Written(StoppingCriteria):
    """After each token: who has ended. A pause follows, where whoever shares the model may end the work."""

    def __init__(self, note: Callable[[Tensor], Tensor]) -> None:
        self.note = note

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        done = self.note(input_ids[:, -1])
        pause(busy=True)
        return done
