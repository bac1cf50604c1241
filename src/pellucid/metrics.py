"""What is one number for how a model answers?

A metric is a value such as `logit_difference(" Paris", " Rome")`. Bound to a tokenizer and a batch, it says
which positions and which rows of the vocabulary it reads, so that an engine unembeds nothing else, and maps
those logits to one number per prompt, differentiably (but for `rank` and `top1_agreement`, which count).

In the formulas z is the logits at the position read, p = softmax(z), log the natural logarithm, A and W the
sets of right and wrong answer tokens. Answers are ids, or texts as they stand in running text, mostly with a
space:

    " Paris" or 3681                  one token, for every prompt
    [" Paris", " Rome"]               one token per prompt
    [[" he", " she"], [" it"]]        several alternatives per prompt; [[" he", " she"]] for every prompt

`position` counts the real tokens of each prompt. A metric that names none is read where its prompts are answered: at the
last token, before marks that the tokenizer itself puts at the end, or at the mask (see `pellucid.question`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.answering import Answering
from pellucid.engine.inputs import Inputs
from pellucid.engine.places import Asked, answer_position, kind_of
from pellucid.errors import InputError, checked
from pellucid.tasks.tokens import answer_ids, single_id

Token = str | int
Answers = Token | Sequence[Token | Sequence[Token]]


@dataclass(frozen=True, eq=False)
class BoundMetric:
    """A metric that knows its token ids.

    positions: those it reads, counted on each prompt's real (non padding) tokens, negatives from the end;
        None = all of them as they lie in the batch, padding included.
    tokens: [batch or 1, k] vocabulary rows it reads; None = the whole vocabulary.
    function: logits [batch, n_positions, k or vocab] -> [batch], or [batch, outputs].
    classes: it reads a classifier, and function maps logits [batch, classes] -> [batch].
    outputs: how many numbers it gives per prompt; None = one, without a dimension of its own.
    size: how many answers a model must have for those it names.
    """

    name: str
    positions: tuple[int, ...] | None
    tokens: Tensor | None
    function: Callable[[Tensor], Tensor]
    classes: bool = False
    outputs: int | None = None
    size: int = 0

    def __post_init__(self) -> None:
        if self.positions is not None:  # numpy's integers would print as such
            object.__setattr__(self, "positions", tuple(map(index, self.positions)))

    def bind(self, tokenizer: Any, batch: int) -> BoundMetric:
        """Itself: a bound metric is a metric too."""
        return self

    def __call__(self, logits: Tensor) -> Tensor:
        """The score of each prompt from exactly the logits it reads. InputError if the shapes disagree."""
        positions = "position" if self.positions is None else len(self.positions)
        rows = "vocab" if self.tokens is None else self.tokens.shape[1]
        read = ["batch", "classes"] if self.classes else ["batch", positions, rows]
        own = not self.classes and self.positions is None and self.tokens is None  # a function that takes any
        fits = all(isinstance(a, str) or a == b for a, b in zip(read, logits.shape, strict=False))
        if not own and (logits.ndim != len(read) or not fits):
            raise InputError(f"{self.name} reads {read} of the logits, got {list(logits.shape)}")
        scores = self.function(logits if logits.dtype == torch.float64 else logits.float())
        if not isinstance(scores, Tensor):
            raise InputError(f"{self.name} gave {scores!r}: expected a tensor with one number for each prompt")
        expected = (len(logits),) if self.outputs is None else (len(logits), self.outputs)
        if scores.shape != expected:
            raise InputError(
                f"{self.name} gave {list(scores.shape)} for {len(logits)} prompts: expected {list(expected)}"
            )
        return scores

    def each(self, several: Sequence[Tensor]) -> Tensor:
        """The scores of several batches of the same prompts, [variant, batch] or [variant, batch, outputs], as calling it for each
        gives them; a formula of a few logits is worked out for all at once."""
        if self.sets is None or self.tokens is None:
            return torch.stack([self(logits) for logits in several])
        formula, sets = self.sets
        n, batch = len(several), len(several[0])
        rows = [TokenSets(*(x if len(x) == 1 else x.repeat(n, 1) for x in (own.ids, own.real))) for own in sets]
        return replace(self, function=partial(apply_formula, formula, rows))(torch.cat([*several])).view(n, batch)

    def score(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The score from the complete logits of a model, [batch, position, vocab] or [batch, classes].

        attention_mask [batch, position] is 1 on real tokens, on whichever side they are padded; default: all.
        """
        return self(self.read(logits, attention_mask))

    def read(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits it reads, of the complete ones."""
        if self.positions is not None and logits.ndim == 3:
            mask = torch.ones(logits.shape[:2]) if attention_mask is None else attention_mask
            real = [row.nonzero().flatten() for row in mask.to(logits.device)]
            shortest = min(map(len, real))
            if not all(-shortest <= position < shortest for position in self.positions):
                raise InputError(f"{self.name} reads {self.positions}, but a prompt has {shortest} tokens")
            index = torch.stack([row[list(self.positions)] for row in real])
            logits = logits[torch.arange(len(logits))[:, None], index]
        if self.tokens is not None:
            rows = self.tokens.to(logits.device)[:, None]
            logits = logits.gather(2, rows.expand(*logits.shape[:2], -1))
        return logits

    @property
    def sets(self) -> tuple[Callable[..., Tensor], list[TokenSets]] | None:
        """The formula and the answers of a metric of this file that is values alone; None for any other function."""
        function = self.function
        if not (isinstance(function, partial) and function.func is apply_formula and not function.keywords):
            return None
        formula, sets = function.args
        return (formula, sets) if formula.__module__ == __name__ else None

    def rows(self, index: Sequence[int]) -> BoundMetric | None:
        """The same for some of the prompts; None where it is a function that may know them all."""
        if self.sets is None:
            return None
        formula, sets = self.sets

        def cut(x: Tensor) -> Tensor:
            return x if len(x) == 1 else x[list(index)]

        own = [TokenSets(cut(each.ids), cut(each.real)) for each in sets]
        tokens = None if self.tokens is None else cut(self.tokens)
        return replace(self, tokens=tokens, function=partial(apply_formula, formula, own))


@runtime_checkable
class Metric(Protocol):
    """Anything with a name that binds to a tokenizer and a batch size."""

    @property
    def name(self) -> str: ...

    def bind(self, tokenizer: Any, batch: int) -> BoundMetric: ...


# -- scores of answers -----------------------------------------------------------------------------------


@checked
def logit(answer: Answers, *, position: int | None = None) -> Metric:
    """mean over A of z_a."""
    return AnswerMetric("logit", _mean, (answer,), position, reads_all=False)


@checked
def logit_difference(answer: Answers, wrong: Answers, *, position: int | None = None) -> Metric:
    """mean over A of z_a - mean over W of z_w. With one token each it equals log(p_a / p_w).

    >>> logit_difference(2, [[0, 1]]).bind(None, batch=1).score(torch.tensor([[[1.0, 3.0, 5.0]]]))
    tensor([3.])
    """
    return AnswerMetric("logit_difference", _mean_difference, (answer, wrong), position, reads_all=False)


@checked
def probability(answer: Answers, *, position: int | None = None) -> Metric:
    """P(A) = sum over A of p_a."""
    return AnswerMetric("probability", _probability, (answer,), position)


@checked
def probability_difference(answer: Answers, wrong: Answers, *, position: int | None = None) -> Metric:
    """P(A) - P(W)."""
    return AnswerMetric("probability_difference", _probability_difference, (answer, wrong), position)


@checked
def log_probability(answer: Answers, *, position: int | None = None) -> Metric:
    """log P(A), in nats."""
    return AnswerMetric("log_probability", _log_probability, (answer,), position)


@checked
def cross_entropy(answer: Answers, *, position: int | None = None) -> Metric:
    """-log P(A), in nats: the loss of a model that should answer A."""
    return AnswerMetric("cross_entropy", _cross_entropy, (answer,), position)


@checked
def log_odds(answer: Answers, *, position: int | None = None) -> Metric:
    """log(P(A) / (1 - P(A))), in nats, without the cancellation in 1 - P(A)."""
    return AnswerMetric("log_odds", _log_odds, (answer,), position)


@checked
def rank(answer: Answers, *, position: int | None = None) -> Metric:
    """How many tokens have a larger logit than the best of A: 0 is the top. A count, without gradient.

    >>> rank(0).bind(None, batch=1).score(torch.tensor([[[1.0, 3.0, 5.0]]]))
    tensor([2.])
    """
    return AnswerMetric("rank", _rank, (answer,), position)


def class_logit(label: Answers) -> Metric:
    """mean over A of z_a for a classifier, whose logits are [batch, classes]; A are class numbers."""
    return AnswerMetric("class_logit", _mean, (label,), classes=True)


def class_probability(label: Answers) -> Metric:
    """P(A) for a classifier, whose logits are [batch, classes]; A are class numbers.

    Bound by a model whose classes each hold or not by themselves (`problem_type` "multi_label_classification", or one
    class) it is the mean over A of sigmoid(z_a).
    """
    return AnswerMetric("class_probability", _probability, (label,), classes=True)


def meant(metric: Metric, model: str, answering: Answering) -> Metric:
    """The metric as this model's logits are meant: classes by name as numbers, and independent ones by sigmoid.

    InputError where it reads other logits than the model gives.
    """
    if isinstance(metric, BoundMetric):
        return metric
    classes = isinstance(metric, AnswerMetric) and metric.classes
    answering.check(model, metric.name, classes, True, 0)
    if not isinstance(metric, AnswerMetric) or answering.meaning == "tokens":
        return metric
    formula = metric.formula
    if classes and formula is _probability and answering.meaning == "value":
        raise InputError(f"{model} gives a number, not the probability of a class: use class_logit(0)")
    if answering.independent and formula not in (_mean, _mean_difference, _rank):
        if formula is not _probability:
            raise InputError(
                f"{metric.name} compares classes that exclude each other, and those of {model} hold each by itself: use a "
                "logit, or probability (a sigmoid here)"
            )
        formula = _each_probability
    return replace(metric, answers=answering.numbers(metric.answers), formula=formula)


def placed(model: Asked, inputs: Inputs, metric: Any) -> Any:
    """A metric that names no position, at the place where these prompts are answered: at the mask, before final marks.

    InputError where that is no single place. A prompt without a mask is read at its end, as the metric says.
    """
    if isinstance(metric, SequenceMetric):
        metric.check_appended(model.tokenizer, inputs)
    if isinstance(metric, ReferenceMetric) and isinstance(metric.positions, str):
        if model.anatomy.answering.meaning != "tokens":
            return metric
        position = answer_position(model, inputs)
        return metric if position is None else replace(metric, positions=(position,))
    if not isinstance(metric, AnswerMetric) or metric.position is not None or metric.classes:
        return metric
    if model.anatomy.answering.meaning in ("vectors", "class", "value"):
        return metric  # which `meant` refuses
    kind, mask = kind_of(model, inputs), getattr(model.tokenizer, "mask_token_id", None)
    if kind in ("label", "span"):
        raise InputError(
            f"{model.name} answers at every token: say where {metric.name} is read, such as position=3 (0 is the first)"
        )
    if kind == "masked token" and mask is not None and not (inputs.stream("").ids == mask).any():
        return metric  # without a known mask the end is no place to ask at: `answer_position` refuses
    position = answer_position(model, inputs)
    return metric if position is None else replace(metric, position=position)


@dataclass(frozen=True, eq=False)
class TokenSets:
    """One set of tokens per prompt: ids [batch or 1, k], and real, False where ids only repeats its first."""

    ids: Tensor
    real: Tensor

    @classmethod
    def of(cls, ids: list[list[int]]) -> TokenSets:
        width = max(map(len, ids))
        padded = [each + each[:1] * (width - len(each)) for each in ids]
        real = [[i < len(each) for i in range(width)] for each in ids]
        return cls(torch.tensor(padded), torch.tensor(real))

    def like(self, z: Tensor) -> TokenSets:
        """On the device of z [batch, vocab], one row for each of its rows."""
        return TokenSets(*(each.to(z.device).expand(len(z), -1) for each in (self.ids, self.real)))

    def mean(self, z: Tensor) -> Tensor:
        return z.gather(1, self.ids).masked_fill(~self.real, 0.0).sum(1) / self.real.sum(1)

    def logsumexp(self, z: Tensor) -> Tensor:
        return z.gather(1, self.ids).masked_fill(~self.real, -math.inf).logsumexp(1)


@dataclass(frozen=True)
class AnswerMetric:
    """`formula`(z [batch, vocab], one `TokenSets` per entry of `answers`) -> [batch].

    Unless it `reads_all` of the vocabulary, it is given the answers' columns only.
    """

    name: str
    formula: Callable[..., Tensor]
    answers: tuple[Answers, ...]
    position: int | None = None
    reads_all: bool = True
    classes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", _frozen(self.answers))

    def __repr__(self) -> str:
        words = [*map(repr, self.answers), *([f"position={self.position}"] if self.position is not None else [])]
        return f"pl.metrics.{self.name}({', '.join(words)})"

    def bind(self, tokenizer: Any, batch: int) -> BoundMetric:
        """InputError if an answer is not a single known token, or there is not one entry per prompt."""
        sets = [TokenSets.of(each) for each in self.ids(tokenizer, batch)]
        numbers, last = [each.ids for each in sets], -1 if self.position is None else self.position
        positions, tokens = None if self.classes else (last,), None
        if not (self.reads_all or self.classes):
            rows = max(len(each.ids) for each in sets)
            tokens = torch.cat([each.ids.expand(rows, -1) for each in sets], 1)
            columns = torch.arange(tokens.shape[1])[None].split([each.ids.shape[1] for each in sets], 1)
            sets = [TokenSets(column, each.real) for column, each in zip(columns, sets, strict=True)]
        size = 1 + max(int(each.max()) for each in numbers)
        return BoundMetric(
            self.name, positions, tokens, partial(apply_formula, self.formula, sets), self.classes, size=size
        )

    def ids(self, tokenizer: Any, batch: int) -> list[list[list[int]]]:
        """[answer][prompt, or one for all][alternative] token ids or class numbers. InputError as `bind`."""
        return [self._ids(each, tokenizer, batch) for each in self.answers]

    def _ids(self, answers: Answers, tokenizer: Any, batch: int) -> list[list[int]]:
        find = _class if self.classes else partial(single_id, tokenizer)
        entries = [each if isinstance(each, tuple) else (each,) for each in _per_prompt(answers, batch)]
        if not all(entries):
            raise InputError(f"{self.name}: a prompt has an empty list of answers; give it at least one")
        return [list(dict.fromkeys(map(find, each))) for each in entries]


def apply_formula(formula: Callable[..., Tensor], sets: list[TokenSets], logits: Tensor) -> Tensor:
    z = logits if logits.ndim == 2 else logits[:, 0]
    return formula(z, *(each.like(z) for each in sets))


def _mean(z: Tensor, a: TokenSets) -> Tensor:
    return a.mean(z)


def _mean_difference(z: Tensor, a: TokenSets, w: TokenSets) -> Tensor:
    return a.mean(z) - w.mean(z)


def _log_probability(z: Tensor, a: TokenSets) -> Tensor:
    return a.logsumexp(z) - z.logsumexp(1)


def _cross_entropy(z: Tensor, a: TokenSets) -> Tensor:
    return -_log_probability(z, a)


def _probability(z: Tensor, a: TokenSets) -> Tensor:
    return _log_probability(z, a).exp()


def _each_probability(z: Tensor, a: TokenSets) -> Tensor:
    return a.mean(z.sigmoid())


def _probability_difference(z: Tensor, a: TokenSets, w: TokenSets) -> Tensor:
    return _probability(z, a) - _probability(z, w)


def _log_odds(z: Tensor, a: TokenSets) -> Tensor:
    return a.logsumexp(z) - z.scatter(1, a.ids, -math.inf).logsumexp(1)


def _rank(z: Tensor, a: TokenSets) -> Tensor:
    best = z.gather(1, a.ids).amax(1, keepdim=True)
    return (z > best).sum(1).to(z.dtype)


# -- distances from reference logits ---------------------------------------------------------------------

Direction = Literal["reference||model", "model||reference"]
Places = Sequence[int] | Literal["answer"] | None


@checked
def kl_divergence(reference: Any, *, positions: Places = "answer", direction: Direction = "reference||model") -> Metric:
    """KL(r || p) = sum_v r_v (log r_v - log p_v), in nats, r = softmax(reference); its mean over positions.

    direction: "model||reference" gives KL(p || r).
    reference: logits [batch or 1, n_positions, vocab], for one position also [batch or 1, vocab] or [vocab];
        they are held constant.
    positions: those read; by default where the prompts are answered (the end, the mask); None reads all, padded ones too,
        so name the positions of a padded batch.

    >>> kl_divergence(torch.zeros(3)).bind(None, batch=1).score(torch.ones(1, 4, 3))
    tensor([0.])
    """
    if direction not in ("reference||model", "model||reference"):
        raise InputError(f"direction {direction!r}: expected 'reference||model' or 'model||reference'")
    formula = _kl if direction == "reference||model" else _reverse_kl
    return ReferenceMetric("kl_divergence", formula, reference, positions)


def js_divergence(reference: Any, *, positions: Places = "answer") -> Metric:
    """KL(r || m) / 2 + KL(p || m) / 2 with m = (r + p) / 2, in nats, 0 to log 2. Else as `kl_divergence`."""
    return ReferenceMetric("js_divergence", _js, reference, positions)


def total_variation(reference: Any, *, positions: Places = "answer") -> Metric:
    """sum_v |r_v - p_v| / 2, from 0 to 1. Else as `kl_divergence`."""
    return ReferenceMetric("total_variation", _total_variation, reference, positions)


def top1_agreement(reference: Any, *, positions: Places = "answer") -> Metric:
    """The share of positions where argmax p = argmax r, without gradient. Else as `kl_divergence`."""
    return ReferenceMetric("top1_agreement", _agreement, reference, positions)


@dataclass(frozen=True, eq=False)
class ReferenceMetric:
    """The mean over positions of `formula`(log r, log p), both [batch, n_positions, vocab]."""

    name: str
    formula: Callable[[Tensor, Tensor], Tensor]
    reference: Any
    positions: Places

    def __post_init__(self) -> None:
        """Positions as plain numbers, whatever held them. InputError for what names none."""
        given = self.positions
        if given is None or (isinstance(given, str) and given == "answer"):
            return
        try:
            object.__setattr__(self, "positions", tuple(map(index, given)))
        except TypeError:
            raise InputError(
                f"{self.name}: positions={given!r:.80}: expected whole numbers, such as (-1,), or None"
            ) from None

    def bind(self, tokenizer: Any, batch: int) -> BoundMetric:
        """InputError if the reference does not have one row per prompt and position read."""
        reference = _numbers(self.name, self.reference)
        positions = (
            (-1,) if isinstance(self.positions, str) else None if self.positions is None else tuple(self.positions)
        )
        if reference.ndim < 3:
            reference = reference.reshape(-1, 1, reference.shape[-1])
        read = reference.shape[1] if positions is None else len(positions)
        if reference.ndim != 3 or len(reference) not in (1, batch) or reference.shape[1] != read:
            raise InputError(
                f"{self.name}: the reference is {list(reference.shape)}, expected [{batch} or 1, {read}, "
                "vocab]: slice it to the positions read, e.g. reference[:, [-1]]"
            )
        function = partial(_compare, self.formula, _log_softmax(reference.detach()))
        return BoundMetric(self.name, positions, None, function)


def _numbers(name: str, reference: Any) -> Tensor:
    """Reference logits as a tensor. InputError for what holds none."""
    try:
        found = reference if isinstance(reference, Tensor) else torch.as_tensor(np.asarray(reference))
    except (TypeError, ValueError):
        found = torch.zeros(0)
    if not found.ndim or not found.numel() or found.is_complex():
        raise InputError(
            f"{name}: {reference!r} is no reference: give logits [vocab] or [batch or 1, n_positions, vocab]"
        )
    return found


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities; impossible tokens (logit -inf) stay finite, so that 0 times their logarithm is 0."""
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _compare(formula: Callable[[Tensor, Tensor], Tensor], log_r: Tensor, logits: Tensor) -> Tensor:
    if logits.shape[1:] != log_r.shape[1:]:
        raise InputError(f"the reference is {list(log_r.shape)}, the logits read are {list(logits.shape)}")
    return formula(log_r.to(logits.device), _log_softmax(logits)).mean(1)


def _kl(log_r: Tensor, log_p: Tensor) -> Tensor:
    return (log_r.exp() * (log_r - log_p)).sum(-1)


def _reverse_kl(log_r: Tensor, log_p: Tensor) -> Tensor:
    return _kl(log_p, log_r)


def _js(log_r: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_r, log_p) - math.log(2)
    return (_kl(log_r, log_m) + _kl(log_p, log_m)) / 2


def _total_variation(log_r: Tensor, log_p: Tensor) -> Tensor:
    return (log_r.exp() - log_p.exp()).abs().sum(-1) / 2


def _agreement(log_r: Tensor, log_p: Tensor) -> Tensor:
    return (log_r.argmax(-1) == log_p.argmax(-1)).to(log_p.dtype)


# -- answers of several tokens ---------------------------------------------------------------------------


@checked
def sequence_log_probability(answer: Answers, *, per_token: bool = False) -> Metric:
    """sum_i log p(a_i | prompt, a_1 ... a_{i-1}), in nats, or its mean over the tokens of the answer.

    Teacher forcing: run the prompt *with the answer appended* (`extend`, or `Prompts.teacher_forced()`); read
    are the positions before each answer token. `answer` is one text for all prompts, or one entry per prompt,
    each a text or its list of ids (here a list inside the list is one sequence, not alternatives).

    >>> bound = sequence_log_probability([[1, 0]]).bind(None, batch=1)
    >>> bound.positions  # of the prompt extended by two tokens
    (-3, -2)
    """
    return SequenceMetric("sequence_log_probability", _frozen(answer), per_token)


def extend(prompt: Iterable[int], answer: Iterable[int]) -> list[int]:
    """The ids to run for `sequence_log_probability`. The prompt must not end in a special token such as EOS.

    >>> extend([5, 6], [7, 8])
    [5, 6, 7, 8]
    """
    return [*prompt, *answer]


@dataclass(frozen=True)
class SequenceMetric:
    name: str
    answer: Answers
    per_token: bool = False

    def __repr__(self) -> str:
        return f"pl.metrics.{self.name}({self.answer!r}{', per_token=True' if self.per_token else ''})"

    def bind(self, tokenizer: Any, batch: int) -> BoundMetric:
        """InputError if an answer is empty or there is not one per prompt."""
        ids = [self._ids(each, tokenizer) for each in _per_prompt(self.answer, batch)]
        longest = max(map(len, ids))
        # right-aligned, as the answers are at the ends of their prompts
        targets = TokenSets.of([each[::-1] for each in ids])
        targets = TokenSets(targets.ids.flip(1), targets.real.flip(1))
        positions = tuple(range(-longest - 1, -1))
        return BoundMetric(self.name, positions, None, partial(_sequence, targets, self.per_token))

    def check_appended(self, tokenizer: Any, inputs: Inputs) -> None:
        """Warns where a prompt does not end in its answer, so that other rows than the answer's are read."""
        stream = inputs.stream("")
        answers = [self._ids(each, tokenizer) for each in _per_prompt(self.answer, len(inputs))]
        if "inputs_embeds" in inputs.tensors:
            return
        for row, answer in enumerate(answers * (len(inputs) if len(answers) == 1 else 1)):
            given = stream.ids[row][stream.mask[row].bool()].tolist()
            if given[-len(answer) :] != answer:
                warnings.warn(
                    f"{self.name}: prompt {row} does not end in its answer, so this is no probability of it: append the "
                    "answer to the prompt (pl.metrics.extend), or ask attribution for question.continuation(answer)",
                    stacklevel=4,
                )
                return

    def _ids(self, answer: Any, tokenizer: Any) -> list[int]:
        if isinstance(answer, str):
            return answer_ids(tokenizer, answer)
        ids = list(answer) if isinstance(answer, tuple) else [answer]
        if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise InputError(f"{self.name}: {answer!r} is no answer: give a text or a list of token ids")
        return ids


def _sequence(targets: TokenSets, per_token: bool, logits: Tensor) -> Tensor:
    targets = targets.like(logits)
    log_p = logits.log_softmax(-1).gather(2, targets.ids[..., None])[..., 0]
    total = log_p.masked_fill(~targets.real, 0.0).sum(1)
    return total / targets.real.sum(1) if per_token else total


# -- your own --------------------------------------------------------------------------------------------


def as_metric(metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """`metric` itself, or a metric from any function logits [batch, position, vocab] -> [batch].

    The function is given all logits as they lie in the batch, padding included; a classifier's have no
    position axis.

    >>> as_metric(lambda logits: logits[:, -1].amax(-1)).bind(None, 1).score(torch.eye(3)[None])
    tensor([1.])
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric) and not isinstance(metric, type):
        return BoundMetric(getattr(metric, "__name__", "custom"), None, None, metric)
    raise InputError(f"{metric!r} is no metric: give metrics.logit(' Paris') or a function of the logits")


# -- answers to ids --------------------------------------------------------------------------------------


def _frozen(answers: Any) -> Any:
    """Lists, arrays and tensors as nested tuples."""
    answers = answers.tolist() if hasattr(answers, "tolist") else answers
    if isinstance(answers, str | int) and not isinstance(answers, bool):
        return answers
    if not isinstance(answers, Sequence):
        raise InputError(f"{answers!r} is no answer: give a text such as ' Paris', a token id, or a list of them")
    return tuple(map(_frozen, answers))


def _per_prompt(answers: Answers, batch: int) -> tuple[Any, ...]:
    """One entry for all prompts, or one for each."""
    entries = answers if isinstance(answers, tuple) else (answers,)
    if len(entries) not in (1, batch):
        raise InputError(f"{len(entries)} answers for {batch} prompts: give one each, or one for all")
    return entries


def _class(label: Token) -> int:
    if not isinstance(label, int) or label < 0:
        raise InputError(f"class {label!r}: expected a number, 0 or more (the model's label2id has them)")
    return label
