"""What does a report ask? `pellucid.question` says what kind of answer there is and where it is read; a report adds what it
compares: the answer with another one, and the prompt with a second one on which that other answer is right (the
counterfactual). Every section of a report asks about the same one.
"""

from __future__ import annotations

import re
import shlex
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pellucid import metrics
from pellucid.causal.contrast import check_aligned
from pellucid.engine.given import Pair
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.places import Kind, answer_position, kind_of
from pellucid.engine.run import Run
from pellucid.errors import InputError, PellucidError
from pellucid.model import Model
from pellucid.question import Answer, label, pieces, similarity
from pellucid.question import Question as Asked
from pellucid.tasks.tokens import answer_ids, single_id
from pellucid.views.markup import quoted

P = TypeVar("P", str, Pair, str | Pair)
KINDS = ("next token", "first token", "masked token", "class", "vectors")  # what the workbench can be about
ALONE = ("class", "value", "span")  # answers that are measured by their own logit, with no rival
WRITTEN = 12  # tokens a decoder writes to be looked at
WORK = 10_000  # tokens that one set of runs may read in all before a report takes less


@dataclass(frozen=True)
class Option(Answer):
    """One possible answer, with its probability."""

    probability: float = 0.0


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt and what is measured on it; `position` is where the answer is read, counted on real tokens."""

    model: Model
    prompt: str | Pair
    kind: Kind
    inputs: Inputs
    position: int
    run: Run  # of the intact model
    options: list[Option]  # the likeliest first
    target: Option | None
    against: Option | None = None
    counterfactual: str | Pair | None = None
    other_options: list[Option] = field(default_factory=list)  # on the counterfactual
    scores: tuple[float, ...] = ()  # the metric on the prompt and, if there is one, on the counterfactual
    made: str = ""  # how the counterfactual was made, if pellucid made it
    searched: bool = False  # and that it was chosen because it changes the answer
    notes: tuple[str, ...] = ()
    asked: Asked | None = None  # as the methods ask it, where a word or a span is part of the question
    beside: str = ""  # the text that a sentence's vector is compared with

    @property
    def text(self) -> str:
        """The prompt to be shown: of a pair both texts."""
        return f"{self.prompt.first} / {self.prompt.second}" if isinstance(self.prompt, Pair) else self.prompt

    @property
    def source(self) -> Stream:
        """The tokens of the prompt (in an encoder-decoder: what the encoder reads)."""
        return self.inputs.streams.get("encoder", self.inputs.stream(""))

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.source.labels[0]

    @property
    def changed(self) -> list[int]:
        """Positions at which the counterfactual has another token."""
        if self.counterfactual is None:
            return []
        other = self.model.inputs(self.counterfactual)
        theirs = other.streams.get("encoder", other.stream("")).ids[0]
        return (self.source.ids[0] != theirs).nonzero().flatten().tolist()

    @property
    def answered(self) -> tuple[str, ...]:
        """The tokens of the stack that answers: in an encoder-decoder its start token, else the prompt."""
        return self.inputs.stream("").labels[0]

    @cached_property
    def written(self) -> str | None:
        """What the decoder of an encoder-decoder writes, so that it and its attention to the source have tokens to show."""
        if self.kind != "first token":
            return None
        with suppress(PellucidError, RuntimeError, NotImplementedError):
            return self.model.generate(self.prompt, max_new_tokens=WRITTEN).text.strip() or None
        return None

    @property
    def prefix(self) -> str:
        """Of the sites that read the prompt."""
        return self.model.anatomy.stacks[0].prefix

    @cached_property
    def last_first(self) -> int:
        """The position of the answer counted from the end, as most people write it."""
        return self.position - len(self.answered)

    @cached_property
    def at(self) -> str:
        """Where parts are switched off: everywhere, or in a long prompt at the answer's position only, which is cheaper."""
        stack = self.model.anatomy.stacks[-1]
        heads = sum(a.heads for block in stack.blocks for a in block.attentions.values())
        long = max(heads, len(stack.blocks)) * len(self.tokens) > WORK
        return f"@{self.last_first}" if long and len(self.inputs.streams) == 1 else ""

    def position_in(self, logits: Tensor) -> int:
        """The column of the answer in `logits` of this prompt or of one of equal length."""
        return logits.shape[1] + self.last_first

    @property
    def metric(self) -> Any:
        """What the answer is measured by; see `metric_code`."""
        if self.beside:
            return Asked.of(self.model, self.inputs, similarity(self.beside)).metric
        if self.target is None:
            return Similarity(self.run)
        if self.kind in ("class", "value"):
            return metrics.class_logit(self.target.id)
        if self.kind == "span":
            return Asked.of(self.model, self.inputs, list(self.target.ids)).metric
        if self.against is None:
            return metrics.logit(self.word(self.target), position=self.last_first)
        return metrics.logit_difference(self.word(self.target), self.word(self.against), position=self.last_first)

    @property
    def metric_code(self) -> str:
        if self.beside:
            return f"metric = pl.question.Question.of(model, prompt, pl.attribution.similarity({self.beside!r})).metric"
        if self.target is None:
            return "metric = pl.views.question.Similarity(model.run(prompt))"
        if self.kind in ("class", "value"):
            return f"metric = pl.metrics.class_logit({self.target.id})"
        if self.kind == "span":
            return f"metric = pl.question.Question.of(model, prompt, {list(self.target.ids)}).metric"
        where = "" if self.last_first == -1 else f", position={self.last_first}"
        if self.against is None:
            return f"metric = pl.metrics.logit({self.word(self.target)!r}{where})"
        return f"metric = pl.metrics.logit_difference({self.word(self.target)!r}, {self.word(self.against)!r}{where})"

    @property
    def metric_name(self) -> str:
        if self.beside:
            return f"similarity to {quoted(self.beside)}"
        if self.target is None:
            return "similarity to the intact output"
        named = {"class": "logit", "value": "number it gives", "span": "logit of its start and end"}
        return named.get(self.kind, "logit" if self.against is None else "logit difference")

    @property
    def measured(self) -> str:
        """What is measured, with the answer and its rival."""
        if self.target is None or self.against is None or self.kind in ALONE:
            return self.metric_name
        return f"{self.metric_name} {quoted(self.target.text)} − {quoted(self.against.text)}"

    def word(self, answer: Option | None) -> str | int:
        """The text of an answer where the metric finds its token by it, else its id."""
        assert answer is not None
        if self.kind == "label":
            return answer.text if answer.text in self.model.anatomy.answering.names.values() else answer.id
        return answer.text if _ids(self.model, answer.text) == {answer.text: answer.id} else answer.id

    def lacks(self, section: str) -> str:
        """Why a section cannot be asked for with this kind of answer; empty where it can."""
        if section in ("layers", "direct") and self.kind in ("vectors", *ALONE):
            given = {"vectors": "gives vectors", "value": "gives a number", "span": "chooses a stretch of the prompt"}
            what = f"{given.get(self.kind, 'chooses a class from one place')}, not words"
            return f"the method reads states as words, and this model {what}"
        if section in ("layers", "direct") and self.against is None:
            return "the method compares an answer with another one, and this model has a single one"
        return ""

    # ---- as code

    def code(self, *lines: str) -> str:
        """A Python program of its own that opens the model and runs `lines`."""
        return "\n".join(
            ["import pellucid as pl", "", f"model = {self.model.opened}", f"prompt = {_code(self.prompt)}", *lines]
        )

    @property
    def shell(self) -> str | None:
        """The command that makes this report again."""
        if not self.model.named:
            return None
        pair = [self.prompt.first, "--second", self.prompt.second] if isinstance(self.prompt, Pair) else [self.prompt]
        words = ["pellucid", "report", self.model.name, *pair]
        if task := re.search(r"task='([\w-]+)'", self.model.opened):
            words += ["--task", task[1]]
        if self.counterfactual is not None:
            other = self.counterfactual
            words += ["--counterfactual", other.first if isinstance(other, Pair) else other]
        if self.target is not None and self.kind not in ("class", "value"):
            words += ["--target", self.target.text]
        if self.kind == "label":
            words += ["--word", self.answered[self.position].strip()]
        return " ".join(_shell_word(w) for w in words)


@dataclass(frozen=True, eq=False)
class Similarity:
    """How similar the mean of a run's vectors is to that of an intact run of one prompt: their cosine [row]."""

    intact: Run

    def __call__(self, output: Tensor) -> Tensor:
        intact, mean = self.intact.logits[0].mean(0), output.mean(1)
        return mean @ intact / (mean.norm(dim=1) * intact.norm())


def _code(prompt: str | Pair) -> str:
    return f"pl.Pair({prompt.first!r}, {prompt.second!r})" if isinstance(prompt, Pair) else repr(prompt)


def _shell_word(word: str) -> str:
    return word if word.startswith("--") else shlex.quote(word)


# ---- asking


def ask(
    model: Model,
    prompt: str | Pair,
    target: str | None,
    counterfactual: str | Pair | None,
    top: int,
    word: str | int | None = None,
) -> Question:
    """Run the prompt (and the counterfactual) and settle what is measured. InputError where they do not fit."""
    prompt, note = with_mask(model, prompt)
    inputs = model.inputs(prompt)
    asked = asked_of(model, inputs)
    if (asked.kind == "label") != (word is not None):
        raise InputError(
            f"{model.name} labels every word: name one, word='Paris' (--word Paris)"
            if asked.kind == "label"
            else f"{model.name} does not label words: leave word= out"
        )
    if word is not None:
        asked = Asked.of(model, inputs, label(word=word))
    with torch.no_grad():
        run = model.run(inputs)
    options = likeliest(asked, run, max(top, 2))
    chosen = options[0] if options else None
    if target is not None and asked.kind != "vectors":
        chosen, more = _chosen(asked, run, target)
        note = (*note, *more)
    note = (*note, *(f"How it was opened: {each}." for each in model.loaded.notes))
    position = chosen.ids[0] if asked.kind == "span" and chosen else place(asked)
    question = Question(model, prompt, asked.kind, inputs, position, run, options, chosen, notes=note, asked=asked)
    if target is not None and asked.kind == "vectors":
        question = replace(question, beside=similarity(target).text)
    return against(question, counterfactual, top)


def against(question: Question, counterfactual: str | Pair | None, top: int, made: str = "") -> Question:
    """The question with a counterfactual, whose own answer (else the runner-up) is what the answer is compared with."""
    model, other, logits = question.model, [], None
    if counterfactual is not None:
        if isinstance(question.prompt, Pair) and isinstance(counterfactual, str):  # in the place of the first text
            counterfactual = replace(question.prompt, first=counterfactual)
        counterfactual, _ = with_mask(model, counterfactual)
        inputs = model.inputs(counterfactual)
        check_aligned(question.inputs, inputs)
        if counterfactual == question.prompt:
            raise InputError("the counterfactual is the prompt itself: give one on which another answer is right")
        with torch.no_grad():
            run = model.run(inputs)
        asked = asked_of(model, inputs)
        if question.kind == "label":
            asked = replace(asked, position=question.position)
        logits, other = run.logits, likeliest(asked, run, max(top, 2))
    chosen = question.target
    rival = next((o for o in [*other[:1], *question.options] if chosen and o.ids != chosen.ids), None)
    question = replace(question, against=rival, counterfactual=counterfactual, other_options=other, made=made)
    if question.target is not None and rival is None and question.kind not in (*ALONE, "label"):  # a vocabulary of one
        raise InputError("this model has a single answer, so there is nothing to compare it with")
    metric, mask = model.bind(question.metric), question.inputs.stream("").mask
    both = [question.run.logits, *([] if logits is None else [logits])]
    return replace(question, scores=tuple(float(metric.score(each, mask)[0]) for each in both))


def asked_of(model: Model, inputs: Inputs) -> Asked:
    """What these prompts ask, with no answer chosen yet."""
    kind = kind_of(model, inputs)
    return Asked(model, inputs, kind, kind, answer_position(model, inputs))


def likeliest(asked: Asked, run: Run, top: int) -> list[Option]:
    """The likeliest answers of a run to one prompt; none where the model does not choose among answers."""
    if asked.kind == "vectors":
        return []
    if asked.kind == "value":
        name = asked.model.anatomy.answering.names.get(0, "the number")
        return [Option((0,), name)]
    return [Option(each.ids, each.text, each.probability or 0.0) for each in asked.likeliest(run, top)[0]]


def read_at(model: Model, prompt: str) -> int:
    """Where the answer to a prompt is read, counted from its end."""
    asked = asked_of(model, model.inputs(prompt))
    return place(asked) - len(asked.inputs.stream("").labels[0])


def place(asked: Asked) -> int:
    """Where the answer is read, counted from the front; what is said of a whole text counts as said at its end."""
    at = -1 if asked.position is None else asked.position
    return at % len(asked.inputs.stream("").labels[0])


def with_mask(model: Model, prompt: P) -> tuple[P, tuple[str, ...]]:
    """A masked model answers at its mask: a prompt without one gets it at the end; a pair is left as it is."""
    if isinstance(prompt, Pair):
        return prompt, ()
    mask = getattr(model.tokenizer, "mask_token", None)
    if not mask or mask in prompt or not prompt.strip() or kind_of(model, model.inputs(prompt)) != "masked token":
        return prompt, ()
    return f"{prompt.rstrip()} {mask}.", (f"This model fills in {mask}, so “ {mask}.” was added to the prompt.",)


def _ids(model: Model, *texts: str) -> dict[str, int]:
    """Those of the texts that are one token of the model, with their ids."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same word after a space: the caller looks at both
        for text in texts:
            with suppress(InputError):
                found[text] = single_id(model.tokenizer, text)
    return found


def _chosen(asked: Asked, run: Run, target: str) -> tuple[Option, tuple[str, ...]]:
    """The target as an answer: the text given, or with a space before it where that is what the model would say."""
    model = asked.model
    if asked.kind == "value":
        raise InputError("this model has no answers to choose a target from: it gives a number; leave --target out")
    if asked.kind == "span":
        found_span = Asked.of(model, asked.inputs, target).answers[0]
        start, end = asked.distribution(run)[0]
        return Option(found_span.ids, target, float(start[found_span.ids[0]] * end[found_span.ids[1]])), ()
    p = asked.distribution(run)[0]
    p = p[:, 1] if p.ndim == 2 else p  # each class by itself
    if asked.kind in ("class", "label"):
        number = model.anatomy.answering.numbers(target)
        return Option((number,), target, float(p[number])), ()
    found = _ids(model, target, " " + target.lstrip(" "))
    if not found:
        ids = answer_ids(model.tokenizer, target)
        if len(ids) == 1:
            single_id(model.tokenizer, target)  # says why
        cut = pieces(model, torch.tensor(ids))
        raise InputError(
            f"{target!r} is {len(ids)} tokens for this model ({' '.join(map(repr, cut))}), and one is explained at a time: "
            f"begin with --target {cut[0]!r}"
        )
    text = max(found, key=lambda each: float(p[found[each]]))
    note = () if text == target else (f"The target {target!r} was read as {text!r}, as it stands in running text.",)
    return Option((found[text],), text, float(p[found[text]])), note


def described(model: Model) -> str:
    """The model in one line: name, layers, heads, width, parameters."""
    stacks = model.anatomy.stacks
    layers = " + ".join(f"{len(s.blocks)} {s.name} layers".replace("  ", " ") for s in stacks)
    heads = next((a.heads for b in stacks[-1].blocks for a in b.attentions.values()), None)
    size = sum(p.numel() for p in model.module.parameters())
    parts = [
        layers,
        f"{heads} heads" if heads else "",
        f"width {stacks[-1].d_model}",
        f"{size / 1e6:,.0f} M parameters",
    ]
    return " · ".join(filter(None, parts))


def short_name(model: Model) -> str:
    """The model's name without the directories above it."""
    path = Path(model.name)
    return path.name if path.is_absolute() or path.suffix == ".gguf" else model.name
