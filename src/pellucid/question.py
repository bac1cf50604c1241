"""What is asked of a model? Prompts, where their answer is read, what it is, its rival, and one number for it.

Every technique asks here, so that no two of them read one prompt at different places. What logits mean is a fact about
the model (`pellucid.anatomy.answering`); from it and the prompt follows the kind of question:

    next token          read at the last token (before marks that the tokenizer itself puts at the end)
    first token         of an encoder-decoder whose decoder was given nothing; after `decoder=` it is the next token
    masked token        read at the mask; a prompt of such a model has exactly one
    class, value        of the whole text
    label               of one word: `label("B-LOC", word="Paris")`
    span                a stretch of the prompt, scored as extractive question answering does:
                        its first token's start logit + its last token's end logit
    continuation        each token that follows the prompt after those before it
    reading             a number inside the model: a neuron, or a direction, at one position
    similarity          of the text's vector to a second text's, of a model without a head: their cosine
    vectors             none: a model without a head answers only to these, a metric or a reading

The number is the answer's logit, less that of its rival; or any metric. Which of them is asked changes what is found: a
probability saturates, a logit also counts what speaks for every other answer, a difference of logits asks what
distinguishes two answers. Without a target the model's own prediction is asked about, and is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit
from pellucid.engine.generation import Generated
from pellucid.engine.given import is_id
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import special_ids, trailing_marks
from pellucid.engine.places import Kind, answer_position, kind_of
from pellucid.engine.run import Run
from pellucid.errors import InputError, listed, one_of
from pellucid.metrics import BoundMetric, Metric, class_logit, logit, logit_difference
from pellucid.model import Model
from pellucid.tasks import Prompts
from pellucid.tasks.tokens import answer_ids, covering, encode, single_id
from pellucid.technique import settle

Of = Literal["log_probability", "probability", "logit"]
LONGEST = 30  # tokens of a predicted span


# ---- targets that are more than an answer


@dataclass(frozen=True)
class Continuation:
    """What `continuation` makes: the tokens that follow the prompt, each an output of its own."""

    text: str | tuple[int, ...] | None = None
    max_new_tokens: int = 20
    of: Of = "log_probability"


@dataclass(frozen=True, eq=False)
class Reading:
    """What `reading` makes: a number read inside the model."""

    site: Site
    direction: Tensor | None = None


@dataclass(frozen=True)
class Label:
    """What `label` makes: a label at one word of a token classifier."""

    name: str | int | None
    word: int | str


def continuation(
    text: str | Sequence[int] | Generated | None = None, *, max_new_tokens: int = 20, of: Of = "log_probability"
) -> Continuation:
    """A target: each token of `text` (by default of what the model itself says greedily) after those before it.

    Token ids, or what `model.generate` gave for one prompt, are asked about as they are.
    `of` says which number of a token is asked about: its "log_probability" in nats, its "probability" or its "logit".
    InputError for an unknown one.

    >>> continuation(" Paris, the capital of France").of
    'log_probability'
    """
    one_of(of, Of, "of=")
    if isinstance(text, Generated):
        if len(text) != 1:
            raise InputError(
                f"{len(text)} answers were generated, and a continuation is one: continuation(generated.ids(0))"
            )
        text = text.ids()
    if text is not None and not isinstance(text, str):
        text = tuple(listed("the continuation", text, "a text, or token ids"))
        if not all(is_id(i) or (isinstance(i, Tensor) and not i.ndim and not i.is_floating_point()) for i in text):
            raise InputError(f"the continuation is {text!r}: expected a text, or token ids")
        text = tuple(int(i) for i in text)
    if text is not None and not text:
        raise InputError("the continuation is empty: give its text, or leave it out for what the model says itself")
    return Continuation(text, max_new_tokens, of)


def reading(site: Site | str, direction: Any = None) -> Reading:
    """A target: the value of a unit at one position, or the scalar product with a direction of the values there.

    >>> str(reading("layers.3.mlp.neurons.7@-1").site)
    'layers.3.mlp.neurons.7@-1'
    """
    if direction is None:
        return Reading(Site.parse(site))
    try:
        vector = torch.as_tensor(direction)
    except (TypeError, ValueError, RuntimeError):
        vector = torch.zeros(())
    if vector.ndim != 1 or vector.is_complex():
        raise InputError(f"direction={direction!r}: expected a vector, as wide as the site")
    return Reading(Site.parse(site), vector)


def label(name: str | int | None = None, *, word: int | str) -> Label:
    """A target for token classifiers: a label (by default the predicted one) at a token, or at a word as it stands in
    the prompt: at its first token, where such models are trained to have the word's label.

    >>> label("B-LOC", word="Paris")
    Label(name='B-LOC', word='Paris')
    """
    return Label(name, word)


@dataclass(frozen=True)
class EveryClass:
    """What `every_class` makes: all classes at once, each an output of its own."""

    word: int | str | None = None


def every_class(*, word: int | str | None = None) -> EveryClass:
    """A target for classifiers: the logit of every class of the text (or of every label at a `word`), each an output of
    its own, named as the config names it.

    >>> every_class(word="Paris")
    EveryClass(word='Paris')
    """
    return EveryClass(word)


@dataclass(frozen=True)
class Similar:
    """What `similarity` makes: how similar the prompt's vector is to that of another text."""

    text: str
    pooling: str | None = None


def similarity(text: str, *, pooling: str | None = None) -> Similar:
    """A target for sentence embeddings: the cosine of the prompt's vector and that of `text`, which is held as it is.

    `pooling` says how a text's token vectors become one: "mean", "cls" (the first), "lasttoken", "max" or "weightedmean"
    (by place: 1, 2, ...); by default what the model's directory says (sentence-transformers' `modules.json`), else "mean".
    All tokens count, marks too, as they do there. InputError for an empty text or an unknown pooling.

    >>> similarity("Paris is in France")
    Similar(text='Paris is in France', pooling=None)
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{text!r} is no text to be similar to: give one, such as similarity('Paris is in France')")
    if pooling is not None and not (isinstance(pooling, str) and pooling in POOLED):
        raise InputError(f"pooling={pooling!r}: expected one of {', '.join(POOLED)}")
    return Similar(text, pooling)


def _weighted(h: Tensor) -> Tensor:
    places = torch.arange(1, h.shape[1] + 1, dtype=h.dtype, device=h.device)
    return (h * places[:, None]).sum(1) / places.sum()


POOLED: dict[str, Callable[[Tensor], Tensor]] = {  # [row, position, d] -> [row, d]
    "mean": lambda h: h.mean(1),
    "mean_sqrt_len": lambda h: h.mean(1),  # another length, in the same direction
    "cls": lambda h: h[:, 0],
    "lasttoken": lambda h: h[:, -1],
    "max": lambda h: h.amax(1),
    "weightedmean": _weighted,
}


# ---- the question


@dataclass(frozen=True)
class Answer:
    """One prompt's answer: its text, and its token or class (several: alternatives; of a span its first and last token)."""

    ids: tuple[int, ...]
    text: str
    probability: float | None = None

    @property
    def id(self) -> int:
        return self.ids[0]


@dataclass(frozen=True, eq=False)
class Question:
    """Prompts and one number for their answer. The only place that decides any of this.

    `position` is the token at which it is read, counted on the real tokens of the last stream (None: not at one token).
    `answers` has one entry for each prompt, predicted ones too; it is empty where a metric or a site is read. `metric`
    is bound; None where a site is read. `outputs` says what the numbers are of: ("",) for a single one.
    """

    model: Model
    inputs: Inputs
    kind: Kind
    name: str
    position: int | None = None
    answers: tuple[Answer, ...] = ()
    against: tuple[Answer, ...] = ()
    metric: BoundMetric | None = None
    outputs: tuple[str, ...] = ("",)
    site: Site | None = None
    _direction: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, model: Model, prompt: Any, target: Any = None, *, against: Any = None, decoder: Any = None,
        edits: Sequence[Edit] = (), run: Run | None = None,
    ) -> Question:  # fmt: skip
        """Bind a target to prompts (texts, ids, tensors, a task's `Prompts`).

        `target` is an answer (a token, a class by name or number, a span's text), one for all prompts or a list with
        one for each; a metric; a `continuation`, a `reading` or a `label`. By default it is what a task's prompts ask,
        else what the model predicts (under `edits`; of `run`, where these prompts were run before). InputError where there is no such answer, no single place to read it, or `against`
        beside a target that compares by itself.
        """
        target, against = (x.tolist() if hasattr(x, "tolist") else x for x in (target, against))
        spans = None
        if isinstance(prompt, Prompts):
            target = prompt.metric() if target is None else target
            prompt, spans = prompt.clean, prompt.spans
        inputs = model.inputs(prompt, decoder=decoder, spans=spans)
        if against is not None and not (target is None or _is_answer(target) or isinstance(target, Label)):
            raise InputError("against= goes with a target token; a metric says itself what it compares")
        if isinstance(target, Continuation | Reading) and len(inputs) != 1:
            raise InputError(f"{target!r:.60} is asked of one prompt at a time, got {len(inputs)}")
        if isinstance(target, Continuation):
            return _continued(model, inputs, target, decoder, edits)
        if isinstance(target, Reading):
            return _reading(model, inputs, target)
        if isinstance(target, Similar):
            return _similar(model, inputs, target)
        kind = kind_of(model, inputs)
        if isinstance(target, EveryClass):
            return _every_class(model, inputs, kind, target)
        if not (target is None or _is_answer(target) or isinstance(target, Label)):
            bound = model.bind(target, len(inputs), inputs)
            return cls(model, inputs, kind, bound.name, metric=bound)
        return _answered(model, inputs, kind, target, against, edits, run)

    # ---- one number

    @property
    def single(self) -> bool:
        return self.outputs == ("",)

    def read(self, found: Tensor, mask: Tensor) -> Tensor:
        """[row, output] from the logits [row, position, vocab] (or [row, classes]) with the mask of the stream they
        belong to, or from the values at `site` [row, ...]."""
        if self.metric is None:
            x = found if self._direction is None else found @ self._direction.to(found)
            return x.reshape(len(x), -1)
        made = self.metric.score(found, mask)
        return made[:, None] if self.metric.outputs is None else made

    # ---- the whole prediction

    def rows(self, run: Run) -> Tensor:
        """The logits the answer is read from: [prompt, vocabulary or class]; of a span [prompt, position, 2]."""
        z = run.logits
        if self.position is None or self.kind == "span":
            return z
        stream = run.inputs.stream("")
        at = (stream.starts + torch.as_tensor(self.position) % stream.lengths).to(z.device)
        return z[torch.arange(len(z), device=z.device), at]

    def probabilities(self, z: Tensor) -> Tensor:
        """From the logits it is read from (see `rows`), over the last dimension: [prompt, answer]; where every class holds
        or not by itself [prompt, class, (no, yes)]; of a span [prompt, (start, end), position].

        InputError where the model predicts no distribution: vectors, or a value.
        """
        if self.kind in ("vectors", "value", "continuation", "reading", "similarity"):
            given = {"vectors": "vectors", "value": "a number"}.get(self.kind, f"a {self.kind}")
            raise InputError(f"{self.model.name} gives {given} here, not a choice between answers")
        z = z if z.dtype == torch.float64 else z.float()
        if self.kind == "span":
            return z.transpose(1, 2).softmax(-1)
        if self.model.anatomy.answering.independent:
            return torch.stack([(-z).sigmoid(), z.sigmoid()], -1)
        return z.softmax(-1)

    def distribution(self, run: Run) -> Tensor:
        """The prediction of a run as `probabilities`, on the CPU; padding is no answer."""
        z = self.rows(run)
        if self.kind == "span":
            z = z.masked_fill(~run.inputs.stream("").mask.bool().to(z.device)[..., None], -torch.inf)
        return self.probabilities(z).cpu()

    def whole(self, name: str, function: Callable[[Tensor], Tensor]) -> BoundMetric:
        """A metric of the whole prediction: `function` of `rows` [prompt, ...], to one number for each prompt."""
        if self.position is None:
            return BoundMetric(name, None, None, function, classes=self.kind == "class")
        return BoundMetric(name, (self.position,), None, lambda z: function(z[:, 0]))

    def likeliest(self, run: Run, top: int = 1) -> list[list[Answer]]:
        """For each prompt the most probable answers, first one first."""
        if self.kind == "span":
            return [[span] for span in _spans(self.model, run)]
        p = self.distribution(run).detach()
        p = p[..., 1] if self.model.anatomy.answering.independent else p
        best = p.topk(min(top, p.shape[-1]))
        return [
            [Answer((int(i),), answer_text(self.model, self.kind, int(i)), float(v)) for v, i in zip(*row, strict=True)]
            for row in zip(best.values, best.indices, strict=True)
        ]


def _is_answer(target: Any) -> bool:
    return isinstance(target, str | int | Sequence)


def measured(model: Model, inputs: Inputs, target: Any) -> Any:
    """A target as a metric of these prompts, for methods that change a model and score it; a metric is given back as it is.

    An answer is its logit (a span's: of its start and end), a label that at its word, a similarity the cosine. InputError
    for a reading, which is no metric, and a continuation, whose prompts are longer.
    """
    if isinstance(target, Reading | Continuation):
        what = "is read inside the model" if isinstance(target, Reading) else "lengthens its prompt"
        raise InputError(f"{target!r:.60} {what}: here an answer, a label, a similarity or a metric is asked")
    if isinstance(target, bool) or not isinstance(target, str | int | Label | EveryClass | Similar):
        return target
    return Question.of(model, inputs, target).metric


def together(question: Question, target: Continuation) -> BoundMetric:
    """One number for a whole continuation: the sum of its tokens' log-probabilities or logits, the product of probabilities."""
    assert question.metric is not None
    join = torch.prod if target.of == "probability" else torch.sum
    return replace(
        question.metric, name=question.name, function=partial(_joined, question.metric.function, join), outputs=None
    )


def _joined(each: Callable[[Tensor], Tensor], join: Callable[..., Tensor], logits: Tensor) -> Tensor:
    return join(each(logits), dim=1)


def extremes(scores: Tensor, top: int) -> dict[str, Tensor]:
    """What scores [..., vocabulary] raise and lower most: `raised` and `lowered` [..., top], the strongest first, with
    `raised_token` and `lowered_token`.

    >>> extremes(torch.tensor([1.0, -3.0, 2.0]), 1)["lowered_token"]
    tensor([1])
    """
    found: dict[str, Tensor] = {}
    for name, largest in (("raised", True), ("lowered", False)):
        found[name], found[f"{name}_token"] = scores.topk(min(top, scores.shape[-1]), -1, largest=largest)
    return found


def answer_text(model: Model, kind: Kind, number: int) -> str:
    """A token's text, or a class's name."""
    if kind in ("class", "label", "value"):
        return model.anatomy.answering.names.get(number, str(number))
    if model.tokenizer is None:
        return f"#{number}"
    return str(model.tokenizer.decode([number], clean_up_tokenization_spaces=False))


def spelled(model: Model, target: Any) -> str:
    """Answers as a title says them: in quotes, a number as the token or class that it stands for."""
    kind: Kind = "next token" if model.anatomy.answering.meaning == "tokens" else "class"
    each = target if isinstance(target, list | tuple) else [target]
    texts = [a if isinstance(a, str) else answer_text(model, kind, int(a)) for a in each]
    return ", ".join(dict.fromkeys(map(repr, texts)))


# ---- answers of each kind


def _answered(
    model: Model,
    inputs: Inputs,
    kind: Kind,
    target: Any,
    against: Any,
    edits: Sequence[Edit] = (),
    run: Run | None = None,
) -> Question:
    """A logit at its place, less that of the rival. A predicted target is settled, so that the record has it."""
    if kind == "vectors":
        raise InputError(f"{model.name} gives vectors, not answers: name what is asked, a metric or reading(site)")
    if isinstance(target, Label) != (kind == "label"):
        raise InputError(
            f"{model.name} labels every word: name one, such as label('B-LOC', word='Paris')"
            if kind == "label"
            else f"{model.name} does not label words: give an answer of its own, a {kind}"
        )
    if kind == "span":
        return _span(model, inputs, target, against, edits)
    if kind == "value" and against is not None:
        raise InputError(f"{model.name} gives a number, which has no rival: leave against= out")
    position = _word(model, inputs, target.word) if isinstance(target, Label) else answer_position(model, inputs)
    asked = Question(model, inputs, kind, kind, position)
    chosen = target.name if isinstance(target, Label) else target
    if chosen is None:
        with torch.no_grad():
            rows = None if kind == "value" else asked.rows(model.run(inputs, edits=edits) if run is None else run)
            found = [0] if rows is None else rows.argmax(-1).tolist()
        chosen = found[0] if len(set(found)) == 1 else found
        names = [_named(model, kind, i) for i in found]
        said = names[0] if len(set(found)) == 1 else names
        settle(target=said)
    if kind in ("class", "value", "label"):
        numbers = model.anatomy.answering.numbers
        chosen, against = numbers(chosen), None if against is None else numbers(against)
    at = {} if position is None else {"position": position}
    one: Callable[..., Metric] = class_logit if position is None else logit
    asked_of, rival = one(chosen, **at), None if against is None else one(against, **at)
    if position is None and against is not None:
        bound = _class_difference(model.bind(asked_of, len(inputs)), model.bind(one(against), len(inputs)))
    else:
        bound = model.bind(asked_of if rival is None else logit_difference(chosen, against, **at), len(inputs))
    told = [_told(model, inputs, kind, each) for each in (asked_of, rival)]
    return Question(model, inputs, kind, bound.name, position, told[0], told[1], bound)


def _class_difference(chosen: BoundMetric, other: BoundMetric) -> BoundMetric:
    return BoundMetric("class_logit_difference", None, None, lambda z: chosen(z) - other(z), classes=True)


def _told(model: Model, inputs: Inputs, kind: Kind, metric: Any) -> tuple[Answer, ...]:
    """The answers of a bound metric, one for each prompt."""
    if metric is None:
        return ()
    rows = metric.ids(model.tokenizer, len(inputs))[0]
    return tuple(
        Answer(tuple(row), " / ".join(answer_text(model, kind, i) for i in row))
        for row in (rows * len(inputs) if len(rows) == 1 else rows)
    )


def _named(model: Model, kind: Kind, number: int) -> str | int:
    """A predicted answer as one would write it: by its text or name where that is read as this answer."""
    if kind in ("class", "value", "label"):
        names = model.anatomy.answering.names
        return names[number] if number in names and list(names.values()).count(names[number]) == 1 else number
    text = answer_text(model, kind, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same word after a space
        try:
            return text if model.tokenizer is not None and single_id(model.tokenizer, text) == number else number
        except InputError:
            return number


def _word(model: Model, inputs: Inputs, word: int | str) -> int:
    """The first token of a word, or a position by number or in the words of a site's `@`."""
    if len(inputs) > 1:
        places = {_word(model, inputs.rows([i]), word) for i in range(len(inputs))}
        if len(places) > 1:
            raise InputError(f"word={word!r} is at different places of these prompts: ask them one at a time")
        return places.pop()
    stream = inputs.stream("")
    if isinstance(word, str) and word not in stream.spans and (found := _place(model, inputs, word)):
        return found[0]
    columns = stream.find(word)
    if columns is None or columns.shape[1] != 1:
        raise InputError(f"word={word!r} names several words: a label is asked at one")
    return int(columns[0, 0] - stream.starts[0])


def _place(model: Model, inputs: Inputs, part: str) -> tuple[int, int] | None:
    """The [first, last + 1) tokens of the last occurrence of `part` in the prompt; None where it has none."""
    if model.tokenizer is None or not part.strip():
        return None
    ids, text = _row(inputs, whole=True), inputs.texts[0]
    known, offsets = encode(model.tokenizer, text)
    if known != ids.tolist():  # a prompt that was given as ids
        said = pieces(model, ids)
        ends = list(accumulate(map(len, said)))
        text, offsets = "".join(said), [(end - len(piece), end) for piece, end in zip(said, ends, strict=True)]
    start = text.rfind(part.strip())
    found = covering(offsets, start, start + len(part.strip())) if start >= 0 else (0, 0)
    return found if found != (0, 0) else None


def _row(inputs: Inputs, whole: bool = False) -> Tensor:
    """The tokens of the only prompt in the last stream; `whole`: of the text, which a decoder may be given moved by one."""
    stream = inputs.streams.get("encoder", inputs.stream("")) if whole else inputs.stream("")
    return stream.ids[0, stream.mask[0].bool()]


# ---- a span of the prompt


def _span(model: Model, inputs: Inputs, target: Any, against: Any, edits: Sequence[Edit]) -> Question:
    if len(inputs) != 1:
        raise InputError(f"a span is asked of one prompt at a time, got {len(inputs)}")
    if target is None:
        with torch.no_grad():
            chosen = _spans(model, model.run(inputs, edits=edits))[0]
        settle(target=list(chosen.ids))
    else:
        chosen = _stretch(model, inputs, target)
    other = None if against is None else _stretch(model, inputs, against)
    places = (*chosen.ids, *(other.ids if other else ()))
    bound = BoundMetric("span_logit", places, torch.tensor([[0, 1]]), _start_and_end)
    return Question(model, inputs, "span", bound.name, None, (chosen,), (other,) if other else (), bound)


def _start_and_end(z: Tensor) -> Tensor:
    """[batch] from [batch, (first, last, ...), (start, end)]."""
    scores = z[:, ::2, 0] + z[:, 1::2, 1]
    return scores[:, 0] if scores.shape[1] == 1 else scores[:, 0] - scores[:, 1]


def _spans(model: Model, run: Run) -> list[Answer]:
    """The best stretch of each prompt that is not a mark and not longer than 30 tokens."""
    marks, found = special_ids(model.tokenizer), []
    stream = run.inputs.streams.get("encoder", run.inputs.stream(""))  # a decoder is given the same text, moved by one
    for z, ids, mask in zip(run.logits, stream.ids, stream.mask, strict=True):
        row, z = ids[mask.bool()].tolist(), z[mask.bool().to(z.device)].detach().float().cpu()
        n, text = len(row), torch.tensor([i not in marks for i in row])
        pairs = z[:, None, 0] + z[None, :, 1]
        allowed = torch.ones(n, n, dtype=torch.bool).triu().tril(LONGEST - 1) & text[:, None] & text[None]
        if not bool(allowed.any()):
            raise InputError("the prompt has no tokens that could be an answer, only marks")
        best = int(pairs.masked_fill(~allowed, -torch.inf).argmax())
        first, last = divmod(best, n)
        p = float(z[:, 0].softmax(0)[first] * z[:, 1].softmax(0)[last])
        found.append(Answer((first, last), _said(model, row[first : last + 1]), p))
    return found


def _stretch(model: Model, inputs: Inputs, target: Any) -> Answer:
    """A span by its text (its last occurrence: the question comes before the context), or by its first and last token."""
    if isinstance(target, str):
        found = _place(model, inputs, target)
        if found is None:
            raise InputError(f"{target!r} is not in the prompt: an answer is a stretch of it")
        return Answer((found[0], found[1] - 1), target)
    row, pair = _row(inputs, whole=True), list(target) if isinstance(target, Sequence) else []
    if len(pair) != 2 or not all(isinstance(i, int) for i in pair) or not 0 <= pair[0] <= pair[1] < len(row):
        raise InputError(f"{target!r} is no span: give its text, or the numbers of its first and last token")
    return Answer((pair[0], pair[1]), _said(model, row[pair[0] : pair[1] + 1].tolist()))


def _said(model: Model, ids: Sequence[int]) -> str:
    return f"#{list(ids)}" if model.tokenizer is None else str(model.tokenizer.decode(list(ids)))


# ---- every class at once


def _every_class(model: Model, inputs: Inputs, kind: Kind, target: EveryClass) -> Question:
    answering = model.anatomy.answering
    if kind not in ("class", "label") or (kind == "label") != (target.word is not None):
        needs = (
            "a word, every_class(word='Paris')"
            if kind == "label"
            else f"no classes of its own: it answers with a {kind}"
        )
        needs = "no words: leave word= out" if kind == "class" else needs
        raise InputError(f"{model.name} has {needs}" if kind != "label" else f"{model.name} labels words: name {needs}")
    names = tuple(answering.names.get(i, str(i)) for i in range(answering.size))
    position = None if target.word is None else _word(model, inputs, target.word)
    if position is None:
        bound = BoundMetric("class_logit", None, None, lambda z: z, classes=True, outputs=answering.size)
    else:
        bound = BoundMetric("logit", (position,), None, lambda z: z[:, 0], outputs=answering.size)
    return Question(model, inputs, kind, bound.name, position, (), (), bound, names)


# ---- similarity to a second text


def _similar(model: Model, inputs: Inputs, target: Similar) -> Question:
    if model.anatomy.answering.meaning != "vectors" or "decoder" in inputs.streams:
        raise InputError(
            f"{model.name} gives answers, and similarity is asked of an encoder's vectors: open it with task='base'"
        )
    pooling = target.pooling or model.loaded.pooling or "mean"
    if pooling not in POOLED:
        raise InputError(
            f"{model.name} makes a text's vector by {pooling}, which is not read here: say pooling=, one of "
            f"{', '.join(POOLED)}"
        )
    pool = POOLED[pooling]

    def vector() -> Tensor:
        with torch.no_grad():
            return pool(model.run(model.inputs(target.text)).logits.float())

    other = model.memo(("vector of a text", target.text, pooling), vector)  # one for all prompts of a call
    mask = inputs.stream("").mask.bool()

    def cosine(hidden: Tensor) -> Tensor:
        if bool(mask.all()) or len(hidden) != len(mask):  # unpadded; versions of one prompt
            made = pool(hidden)
        else:
            real = mask.to(hidden.device)
            made = torch.cat([pool(h[None, m]) for h, m in zip(hidden, real, strict=True)])
        return torch.cosine_similarity(made, other.to(hidden), dim=-1)

    bound = BoundMetric(f"similarity ({pooling})", None, None, cosine)
    return Question(model, inputs, "similarity", bound.name, answers=(Answer((), target.text),), metric=bound)


# ---- a continuation


def _continued(model: Model, inputs: Inputs, target: Continuation, decoder: Any, edits: Sequence[Edit]) -> Question:
    """The prompt with the continuation behind it, less the last token, which nothing follows."""
    if decoder is not None:
        raise InputError("a continuation is what the decoder says: give it alone, without decoder=")
    if model.anatomy.answering.meaning != "tokens":
        raise InputError(f"{model.name} says no tokens, so nothing continues the prompt")
    ids = _continuation_ids(model, inputs, target, edits)
    at = tuple(range(-len(ids), 0))
    given = _row(inputs)
    if "decoder" not in inputs.streams:
        given = given[: len(given) - trailing_marks(model.tokenizer, given.tolist())]
    longer = torch.cat([given, given.new_tensor(ids[:-1])])[None]
    if "decoder" in inputs.streams:
        encoder = {k: v for k, v in inputs.tensors.items() if not k.startswith("decoder_")}
        longer_inputs = model.inputs({**encoder, "decoder_input_ids": longer})
    else:
        longer_inputs = model.inputs({"input_ids": longer, "attention_mask": torch.ones_like(longer)})
    outputs = pieces(model, torch.cat([longer[0], longer.new_tensor(ids[-1:])]))[-len(ids) :]
    if "decoder" not in inputs.streams:
        longer_inputs = _typed(inputs, longer_inputs, "".join(outputs[:-1]))
    bound = BoundMetric(target.of, at, None, partial(_of_tokens, torch.tensor(ids), target.of), outputs=len(ids))
    name = f"{target.of} of {''.join(outputs)!r}"
    answers = (Answer(tuple(ids), "".join(outputs)),)
    return Question(model, longer_inputs, "continuation", name, None, answers, (), bound, outputs)


def _typed(inputs: Inputs, longer: Inputs, said: str) -> Inputs:
    """The longer prompt with the text and the spans of the one that was typed."""
    stream, before = longer.stream(""), inputs.stream("")
    if not before.maps or before.maps[0].given is None:
        return longer
    said = inputs.texts[0] + said
    known = replace(stream, spans=before.spans, maps=(replace(stream.maps[0], given=said),))
    return replace(longer, streams={"": known}, texts=(said,))


def _continuation_ids(model: Model, inputs: Inputs, target: Continuation, edits: Sequence[Edit]) -> list[int]:
    if target.text is None:
        made = model.generate(inputs, edits=edits, max_new_tokens=target.max_new_tokens).tokens[0].tolist()
    elif isinstance(target.text, tuple):
        made = list(target.text)
    elif model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer: leave the continuation's text out")
    elif "decoder" in inputs.streams:
        made = model.tokenizer(target.text, add_special_tokens=False)["input_ids"]
    else:
        made = answer_ids(model.tokenizer, target.text)
    if not made:
        raise InputError("the model says nothing after this prompt: give the continuation's text")
    return list(made)


def _of_tokens(ids: Tensor, of: Of, logits: Tensor) -> Tensor:
    """[row, n] from logits [row, n, vocab]."""
    values = logits if of == "logit" else logits.log_softmax(-1)
    read = values.gather(2, ids.to(logits.device)[None, :, None].expand(len(logits), -1, 1))[..., 0]
    return read.exp() if of == "probability" else read


def pieces(model: Model, ids: Tensor) -> tuple[str, ...]:
    """The text each of the token ids [position] adds to those before it, spaces included; a letter of several tokens
    belongs to the last of them."""
    tokenizer, row = model.tokenizer, ids.tolist()
    if tokenizer is None:
        return tuple(f"#{i}" for i in row)
    texts = [tokenizer.decode(row[:n], clean_up_tokenization_spaces=False) for n in range(len(row) + 1)]
    whole = texts[-1]
    texts = [text if whole.startswith(text) else text.rstrip("\ufffd") for text in texts]  # cut within a letter
    return tuple(after[len(before) :] for before, after in pairwise(texts))


# ---- a number inside the model


def _reading(model: Model, inputs: Inputs, target: Reading) -> Question:
    sites = model.sites(target.site)
    if len(sites) != 1:
        raise InputError(f"{str(target.site)!r} names {len(sites)} sites: a reading is of one")
    site, direction = sites[0], target.direction
    with torch.no_grad():
        values = model.run(inputs, keep=[site]).tensor(site)
    size = values.shape[1:] if direction is None or direction.shape != values.shape[-1:] else values.shape[1:-1]
    if size.numel() != 1 or (direction is not None and direction.shape != values.shape[-1:]):
        raise InputError(
            f"{str(site)!r} holds {list(values.shape[1:])} numbers here where one is attributed: name a unit and a "
            "position such as 'layers.3.mlp.neurons.7@-1', or give a direction of the size of the last dimension"
        )
    return Question(model, inputs, "reading", str(site), site=site, _direction=direction)
