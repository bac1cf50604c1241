"""What does the model answer to this prompt? One pass, kept for a while, read as the report reads it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.edits import Edit
from pellucid.engine.given import read_row
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.limits import claimed
from pellucid.engine.places import Kind
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.question import Question
from pellucid.views.question import KINDS, asked_of, likeliest, place, with_mask
from pellucid.workbench.messages import Answer, AnswerCard, Choice

TOP = 10
KEPT = 1024  # tokens of the runs that are remembered: each holds its logits and perhaps the residual of every layer
TEXTS = 16


@dataclass(frozen=True, eq=False)
class Passed:
    """A prompt after its pass: where its answer is read, and what a masked model's prompt was completed with."""

    run: Run
    asked: Question
    position: int
    kept: frozenset[str]
    note: str = ""

    @property
    def inputs(self) -> Inputs:
        return self.asked.inputs

    @property
    def kind(self) -> Kind:
        """As the report has it: what is no choice among answers counts as vectors."""
        return self.asked.kind if self.asked.kind in KINDS else "vectors"

    @property
    def source(self) -> Stream:
        """The tokens of the prompt (in an encoder-decoder: what the encoder reads)."""
        return self.inputs.streams.get("encoder", self.inputs.stream(""))

    @property
    def logits(self) -> Tensor | None:
        """[vocabulary] (or [class]) where the answer is read; None for a model that gives vectors."""
        if self.kind == "vectors":
            return None
        return self.asked.rows(self.run)[0].float()


def passed(model: Model, prompt: str, keep: Iterable[str] = (), edits: Sequence[Edit] = ()) -> Passed:
    """Run a prompt. InputError for one that is empty or too long: a page that is drawn at every key asks no more of a model
    than its config speaks of, also where it would run on.
    """
    text, notes = with_mask(model, prompt)
    holds = claimed(model.module, "encoder" if len(model.anatomy.stacks) > 1 else "")
    if holds is not None and (length := len(read_row(model.tokenizer, text).ids)) > holds:
        raise InputError(f"the prompt has {length} tokens but the model's context holds {holds}: shorten it")
    inputs = model.inputs(text)
    with torch.no_grad():
        run = model.run(inputs, keep=list(keep), edits=edits)
    asked = asked_of(model, inputs)
    said = [told] if (told := other_answer(asked, run)) else []
    return Passed(run, asked, place(asked), frozenset(keep), " ".join([*notes, *said]))


def other_answer(asked: Question, run: Run) -> str:
    """What a model says that is no choice among a few answers, in words: a number, a span, a label for each word."""
    with torch.no_grad():
        if asked.kind == "value":
            name = asked.model.anatomy.answering.names.get(0, "number")
            return f"The model gives a number, {name}: {float(run.logits[0, 0]):+.3g}."
        if asked.kind == "span":
            span = asked.likeliest(run)[0][0]
            return f"The likeliest span is “{span.text.strip()}” ({span.probability or 0.0:.1%})."
        if asked.kind == "label":
            answering, labels = asked.model.anatomy.answering, run.inputs.stream("").labels[0]
            z = run.logits[0, run.inputs.stream("").mask[0].bool()]
            best: list[Any] = z[:, 0].sigmoid().tolist() if answering.size == 1 else z.argmax(-1).tolist()
            said = [
                f"{v:.0%} {answering.names.get(0, 0)}" if answering.size == 1 else answering.names.get(v, v)
                for v in best
            ]
            pairs = ", ".join(f"{word.strip()} {name}" for word, name in zip(labels, said, strict=True))
            return f"The model labels every word: {pairs}."
    return ""


class Memory:
    """The last few prompts that were run without edits: what a reader slides, steers or pages through asks again."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.question: tuple[Any, Any] = (None, None)  # what the last panel asked, see `panels`
        self._runs: OrderedDict[str, Passed] = OrderedDict()
        self._texts: OrderedDict[tuple[str, int, float, int], str] = OrderedDict()

    def of(self, prompt: str, keep: Iterable[str] = ()) -> Passed:
        """The run, which kept these sites at least."""
        old, wanted = self._runs.pop(prompt, None), frozenset(keep)
        if old is None or not wanted <= old.kept:
            old = passed(self.model, prompt, wanted | (old.kept if old is not None else frozenset()))
        self._runs[prompt] = old
        while len(self._runs) > 2 and sum(len(each.source.labels[0]) for each in self._runs.values()) > KEPT:
            self._runs.popitem(last=False)
        return old

    def generated(self, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        """What the model goes on with; temperature 0 takes the likeliest."""
        key = (prompt, tokens, temperature, seed)
        if key not in self._texts:
            self._texts[key] = generated(self.model, prompt, (), tokens, temperature, seed)
        self._texts.move_to_end(key)
        while len(self._texts) > TEXTS:
            self._texts.popitem(last=False)
        return self._texts[key]


def answers(model: Model) -> AnswerCard:
    """What can be asked about of this model."""
    told = model.anatomy.answering
    if told.meaning == "label" or (told.meaning == "class" and told.size > 1):
        return AnswerCard(kind=told.meaning, names=[told.names.get(i, str(i)) for i in range(told.size)])
    kinds: dict[str, Any] = {"tokens": "word", "span": "span", "vectors": "text"}
    return AnswerCard(kind=kinds.get(told.meaning, ""))


def generates(model: Model) -> bool:
    can = getattr(model.module, "can_generate", None)
    return bool(can and can()) and model.anatomy.stacks[-1].causal is not False


def generated(
    model: Model, prompt: str, edits: Sequence[Edit], tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    if not tokens or not generates(model):
        return ""
    return model.generate(prompt, edits=edits, max_new_tokens=tokens, temperature=temperature, seed=seed).text


def answer(asked: Passed, text: str = "", pair: tuple[int, int] | None = None, temperature: float = 1.0) -> Answer:
    """What a run says; `pair` are the answers (ids) of the prompt and of the other prompt."""
    logits = asked.logits
    if logits is None:
        return Answer(top=[], entropy=0.0, generated=text, difference=None)
    options = likeliest(asked.asked, asked.run, TOP)
    p = (logits / temperature).softmax(-1)
    own = temperature == 1 or asked.kind == "class"  # whose probabilities may be each its own
    top = [Choice(token=o.text, probability=o.probability if own else float(p[o.id]), logit=float(logits[o.id]), id=o.id) for o in options]  # fmt: skip
    entropy = float(-(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum())
    difference = None if pair is None else float(logits[pair[0]] - logits[pair[1]])
    return Answer(top=top, entropy=entropy, generated=text, difference=difference)


def rivals(asked: Passed, other: Passed) -> tuple[int, int]:
    """The likeliest answers to both prompts; where they are one, the runner-up is what the prompt's is compared with.

    InputError where one of them has none.
    """
    first, second = asked.logits, other.logits
    if first is None or second is None or len(first) < 2:
        raise InputError("this model gives vectors, not answers, so two prompts have no answers to compare")
    best = first.topk(2).indices.tolist()
    theirs = int(second.argmax())
    return best[0], theirs if theirs != best[0] else best[1]
