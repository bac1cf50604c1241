"""An answer that is watched while it is written: monitors that may stop or replace it, steering with its price beside it.

Monitors and vectors are files named on the command line; the page only chooses among them. Each token is told as soon as the next
one is begun, with what every monitor read before it was written; the end says why the answer ended, what a reader is shown, the
view of the firings, and the perplexity of what was written under the model as it is, without steering.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pellucid.engine.generation import Generated
from pellucid.engine.given import Chat as Conversation
from pellucid.engine.limits import claimed
from pellucid.engine.steps import Redirect, Say, Step, Stop, Watch
from pellucid.errors import InputError, PellucidError
from pellucid.model import Model
from pellucid.safety.formats import import_vectors
from pellucid.safety.guarding import Given, Guard
from pellucid.safety.monitors import Monitored, load_monitor
from pellucid.safety.price import written
from pellucid.safety.strengths import load_prices
from pellucid.safety.vector import Vector
from pellucid.views.documents import document
from pellucid.views.question import short_name
from pellucid.workbench.answers import generates
from pellucid.workbench.messages import (
    Acted,
    ChatCard,
    ChatEnd,
    ChatRequest,
    ChatStep,
    MonitorCard,
    Price,
    Problem,
    VectorCard,
)

Tell = Callable[[ChatStep], None]


class Files:
    """What the command line named: every file belongs to the models that take it, and to one at least."""

    def __init__(self, monitors: Sequence[str | Path] = (), vectors: Sequence[str | Path] = ()) -> None:
        self.monitors, self.vectors = list(monitors), list(vectors)

    def sorted(self, models: Sequence[Model]) -> list[Chat]:
        """The chat of each model. The error of the last model that would not take a file none of them takes."""
        made = [Chat(model) for model in models]
        for paths, take in ((self.monitors, Chat.add_monitor), (self.vectors, Chat.add_vectors)):
            for path in paths:
                refused: PellucidError | None = None
                taken = 0
                for chat in made:
                    try:
                        take(chat, path)
                        taken += 1
                    except PellucidError as error:
                        refused = error
                if not taken and refused is not None:
                    raise refused
        return made


class Chat:
    """One model that answers under monitors. Everything but `card` runs in the thread of the model's worker."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.monitors: dict[str, Monitored] = {}
        self.vectors: dict[str, Vector] = {}
        self.prices: dict[str, tuple[str, list[Price]]] = {}
        tokenizer: Any = model.tokenizer
        self.template = bool(getattr(tokenizer, "chat_template", None))
        self.refused = _refused(model)

    def add_monitor(self, path: str | Path) -> None:
        """InputError (or Refused) where this model cannot generate, or the file belongs to other weights."""
        self._generates()
        found = load_monitor(self.model, path)
        self.monitors[_free(found.name, self.monitors)] = found

    def add_vectors(self, path: str | Path) -> None:
        """As `add_monitor`, for a file of vectors, ours or others' (`safety.import_vectors`)."""
        self._generates()
        found, prices = import_vectors(self.model, path), load_prices(path)
        for vector in found:
            name = vector.name or Path(path).stem
            name = name if len(found) == 1 else f"{name} at {vector.site}"
            name = _free(name, self.vectors)
            self.vectors[name] = vector
            rows = [msgspec.convert(row, Price) for row in prices.get("rows", []) if row["site"] == vector.site]
            self.prices[name] = str(prices.get("judge", "")), rows

    def _generates(self) -> None:
        if self.refused:
            raise InputError(self.refused)

    @property
    def card(self) -> ChatCard:
        return ChatCard(
            refused=self.refused, template=self.template,
            monitors=[_monitor_card(name, each) for name, each in self.monitors.items()],
            vectors=[VectorCard(name=name, site=v.site, judge=self.prices[name][0], prices=self.prices[name][1]) for name, v in self.vectors.items()],
        )  # fmt: skip

    def check(self, asked: ChatRequest) -> None:
        """InputError for what cannot be answered, before anything is run."""
        self._generates()
        for kind, names, known in (("monitor", asked.monitors, self.monitors), ("vector", [asked.vector] if asked.vector else [], self.vectors)):  # fmt: skip
            missing = next((name for name in names if name not in known), None)
            if missing is not None:
                raise InputError(f"there is no {kind} {missing!r} here: name its file when the workbench is started")
        if not asked.turns or not asked.turns[-1].content:
            raise InputError("there is nothing to answer: write something first")
        if asked.chat and not self.template:
            raise InputError(
                f"{short_name(self.model)} has no chat template: its tokenizer says no form for turns; choose continuation"
            )

    def answer(self, asked: ChatRequest, tell: Tell) -> ChatEnd:
        """Write the answer; `tell` hears of every token."""
        self.check(asked)
        names = list(dict.fromkeys(asked.monitors))
        guards = [self.monitors[name].begin(self.model) for name in names]
        vector = self.vectors[asked.vector] if asked.vector and asked.strength else None
        edits = [] if vector is None else [vector.edit(asked.strength)]
        said = [{"role": turn.role, "content": turn.content} for turn in asked.turns]
        prompt: Any = Conversation(said) if asked.chat else "".join(turn.content for turn in asked.turns)
        inputs = self.model.inputs(prompt)
        holds = claimed(self.model.module, "encoder" if "encoder" in inputs.streams else "")
        left = asked.max_new_tokens
        if holds is not None and len(self.model.anatomy.stacks) == 1:
            length = int(inputs.stream("").lengths[0])
            if length >= holds:
                raise InputError(
                    f"this has {length} tokens but the model's context holds {holds}: begin a new conversation, or write less"
                )
            left = min(left, holds - length)
        telling = Telling(self.model, guards, tell)
        made = self.model.generate(
            prompt, edits=edits, when=Watch((), telling.look, "page"), monitors=[Given(guard) for guard in guards],
            max_new_tokens=left, temperature=asked.temperature, seed=asked.seed,
        )  # fmt: skip
        telling.rest(made)
        return self._end(made, guards, names, telling.said)

    def _end(self, made: Generated, guards: Sequence[Guard], names: Sequence[str], said: Callable[[list[int]], tuple[str, str]]) -> ChatEnd:  # fmt: skip
        shown, view, (text, instead) = made.text, None, said(made.ids(0))
        replaced = bool(instead)
        if guards:
            firings = made.firings
            shown, view = str(firings.shown.values[0]), document(firings)
        nll = repeated = None
        if len(self.model.anatomy.stacks) == 1 and int(made.lengths[0]):
            price = written(self.model, made)
            nll, repeated = float(price["nll"][0]), float(price["repetition"][0])
        acted = [
            Acted(monitor=name, token=guard.acted[0][0], statistic=guard.acted[0][1], threshold=guard.monitor.level, does=guard.acted[0][2])
            for name, guard in zip(names, guards, strict=True) if 0 in guard.acted
        ]  # fmt: skip
        return ChatEnd(
            text=text, shown=shown, replaced=replaced, ended=made.ended[0], acted=sorted(acted, key=lambda each: each.token),
            tokens=int(made.lengths[0]), document=view, repetition=repeated,
            perplexity=None if nll is None or not math.isfinite(nll) else math.exp(nll),
        )  # fmt: skip


class Telling:
    """Who hears of each token: asked before the monitors are, so that their reading of the step before is complete."""

    def __init__(self, model: Model, guards: Sequence[Guard], tell: Tell) -> None:
        self.model, self.guards, self.tell, self.told = model, guards, tell, 0

    def look(self, step: Step) -> None:
        if step.index:
            self._say(step.index - 1, step.tokens[0].tolist())

    def rest(self, made: Generated) -> None:
        """The last step, and the one in which a monitor stopped what had not been written yet."""
        ids = made.ids(0)
        steps = max([len(ids), *(len(guard.trace) for guard in self.guards)])
        for step in range(self.told, steps):
            self._say(step, ids)

    def said(self, ids: list[int]) -> tuple[str, str]:
        """What was written, and what a monitor says instead of it from where it fired on."""
        tokenizer: Any = self.model.tokenizer
        given = min(((g.acted[0][0], g.acted[0][3]) for g in self.guards if 0 in g.acted and g.acted[0][3] is not None), default=None)  # fmt: skip
        text = tokenizer.decode(ids if given is None else ids[: given[0]], skip_special_tokens=True)
        return text, "" if given is None or given[0] >= len(ids) else given[1] or ""

    def _say(self, step: int, ids: list[int]) -> None:
        tokenizer: Any = self.model.tokenizer
        wrote = tokenizer.decode([ids[step]]) if step < len(ids) else ""
        values = [float(g.trace[step].statistic[0, -1]) if step < len(g.trace) else math.nan for g in self.guards]
        fired = [
            bool((np.nan_to_num(g.trace[step].statistic[0], nan=-np.inf) > g.monitor.level).any())
            if step < len(g.trace) and g.trace[step].ran[0] else False
            for g in self.guards
        ]  # fmt: skip
        text, instead = self.said(ids[: step + 1])
        self.tell(ChatStep(
            step=step, token=wrote, text=text, instead=instead,
            statistic=[v if math.isfinite(v) else None for v in values], fired=fired,
        ))  # fmt: skip
        self.told = step + 1


async def streamed(start: Callable[[Tell], asyncio.Future[ChatEnd]], drop: Callable[[], None]) -> AsyncIterator[bytes]:
    """An answer as lines of JSON: its steps, then its end, or what went wrong. Who no longer listens ends it (`drop`)."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[ChatStep | None]()

    def tell(step: ChatStep) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, step)

    def ended(done: asyncio.Future[ChatEnd]) -> None:
        _ = done.cancelled() or done.exception()  # who no longer listens asks for neither
        queue.put_nowait(None)

    future = start(tell)
    future.add_done_callback(ended)
    try:
        while (step := await queue.get()) is not None:
            yield msgspec.json.encode(step) + b"\n"
        yield msgspec.json.encode(_last(future)) + b"\n"
    finally:
        drop()


def _last(future: asyncio.Future[ChatEnd]) -> ChatEnd | Problem:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, PellucidError):
        return Problem(error=" ".join(str(error).split()))
    superseded = type(error).__name__ == "Superseded"
    said = "another answer has taken the place of this one" if superseded else f"something unexpected went wrong ({type(error).__name__})"  # fmt: skip
    return Problem(error=said, superseded=superseded)


def _refused(model: Model) -> str:
    if not generates(model):
        return f"{short_name(model)} writes no text (an encoder, or a model without a head that does), so there is no answer to watch: open a decoder"
    return (
        "" if model.tokenizer is not None else f"{short_name(model)} was opened without a tokenizer, which a chat needs"
    )


def _free(name: str, taken: Any) -> str:
    return name if name not in taken else next(n for i in range(2, 999) if (n := f"{name} {i}") not in taken)


def _monitor_card(name: str, monitor: Any) -> MonitorCard:
    level, rule = monitor.level, getattr(monitor, "rule", None)
    return MonitorCard(
        name=name, threshold=level if math.isfinite(level) else None,
        promise=str(monitor.threshold) if not isinstance(monitor.threshold, float | None) else "",
        reads=str(getattr(monitor, "reads", "exchange")), rule=str(getattr(rule, "kind", "")), does=_does(monitor.then),
        sites=[str(site) for site in monitor.sites],
    )  # fmt: skip


def _does(then: Any) -> str:
    if then is None:
        return "records"
    if isinstance(then, Say):
        return "says something else instead" if then.then == "end" else "says something, then goes on"
    return "stops" if isinstance(then, Stop) else "changes the course" if isinstance(then, Redirect) else "steers"
