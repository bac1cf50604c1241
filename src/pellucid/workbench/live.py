"""What follows the typing: the answer, with and without the edits, and the lens grid. One pass for each key stroke.

A prompt that is only edited further is not run again (see `Memory`), so a slider costs one pass as well.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec

from pellucid.engine.edits import Edit
from pellucid.model import Model
from pellucid.question import answer_text
from pellucid.workbench import edits as acting
from pellucid.workbench.answers import Memory, Passed, answer, generated, passed, rivals
from pellucid.workbench.lens import SECONDS, LiveLens
from pellucid.workbench.messages import LiveReply, LiveRequest, Milliseconds

STILL = ("zero", "scale")  # kinds of edits that read nothing of the prompt


class Live:
    """One model, as typing sees it. All of it runs in the thread of the model's worker."""

    def __init__(self, model: Model, seconds: float = SECONDS) -> None:
        self.model, self.seconds = model, seconds
        self.memory, self.lens = Memory(model), LiveLens(model)
        self._last: tuple[bytes, Any] = (b"", None)

    def reply(self, asked: LiveRequest, waited: float = 0.0) -> LiveReply:
        """`waited`: seconds in the queue. PellucidError where the prompt or an edit cannot be used."""
        start = time.perf_counter()
        found = acting.asked(self.model, asked.edits)
        lens = asked.lens and not self.lens.refused
        clean = self.memory.of(asked.prompt, self.lens.sites if lens and not found else ())
        pair = rivals(clean, self.memory.of(asked.other)) if asked.other and clean.logits is not None else None
        engine = acting.ready(found, self.memory, asked.prompt, asked.other)
        shown = self._under(engine, asked, lens) if engine else clean
        forward = time.perf_counter() - start
        document, more, note = None, False, shown.note
        if asked.lens and self.lens.refused:
            note = " ".join(filter(None, (note, self.lens.refused)))
        elif lens and self.lens.fits(shown):
            code = acting.lens_code(self.model, asked, shown.position - len(shown.inputs.stream("").labels[0]))
            document, more = self.lens.document((asked.tab, asked.pane), shown, _still(asked), code, self.seconds)
        drawn = (0.0, 0) if asked.seed is None else (asked.temperature, asked.seed)
        before = answer(clean, self.memory.generated(asked.prompt, asked.generate, *drawn), pair, asked.temperature)
        text = generated(self.model, asked.prompt, engine, asked.generate, *drawn) if engine else ""
        after = answer(shown, text, pair, asked.temperature) if engine else None
        times = Milliseconds(
            queue=1e3 * waited, forward=1e3 * forward, total=1e3 * (waited + time.perf_counter() - start)
        )
        return LiveReply(
            serial=asked.serial, tokens=list(shown.source.labels[0]), clean=before, edited=after, lens=document,
            milliseconds=times, pair=[answer_text(self.model, clean.asked.kind, i) for i in pair or ()], more=more, note=note,
        )  # fmt: skip

    def _under(self, engine: Sequence[Edit], asked: LiveRequest, lens: bool) -> Passed:
        """The edited run; the last one is kept, as the page asks again for the columns that are left."""
        key = msgspec.json.encode([[edit for edit in asked.edits if edit.on], asked.prompt, asked.other, lens])
        if key != self._last[0]:
            self._last = key, passed(self.model, asked.prompt, self.lens.sites if lens else (), engine)
        return self._last[1]


def _still(asked: LiveRequest) -> Hashable:
    """What columns of the grid have in common: the edits and, unless they leave earlier columns as they are while the
    prompt grows, the prompts."""
    on = [edit for edit in asked.edits if edit.on]
    still = all(edit.kind in STILL and (edit.position or 0) >= 0 for edit in on)
    return msgspec.json.encode(on if still else [on, asked.prompt, asked.other])
