"""What is attributed? One number the model gives for a prompt, or one for every token of a continuation.

A target reads either the logits or the values at a site, and turns them into [row, output]:

    " Paris", 3681            the logit of a token after the last position; of a class in a classifier
    " Paris", against " Rome" the difference of two logits
    a metric                  log_odds(" Paris"), or any function logits -> [row]
    continuation(" Paris.")   the log-probability of each of these tokens after the prompt and those before it
    reading(site, direction)  the value of a neuron, or of a direction, at one position of a site

Which of them is asked changes the ranking of the tokens: a probability saturates, a logit also counts what speaks for
every other answer, a difference of logits asks what distinguishes two answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pellucid.anatomy.opening import LOGITS
from pellucid.anatomy.sites import Site
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.metrics import Answers, BoundMetric, Metric, class_logit, logit, logit_difference
from pellucid.model import Model
from pellucid.tasks.tokens import answer_ids

Of = Literal["log_probability", "probability", "logit"]
_answers: WeakKeyDictionary[Model, int | str] = WeakKeyDictionary()  # so many classes, or "tokens", or "vectors"


@dataclass(frozen=True)
class Continuation:
    """What `continuation` makes: the tokens that follow the prompt, each an output of its own."""

    text: str | None
    max_new_tokens: int
    of: Of


@dataclass(frozen=True, eq=False)
class Reading:
    """What `reading` makes: a number read inside the model."""

    site: Site
    direction: Tensor | None


def continuation(text: str | None = None, *, max_new_tokens: int = 20, of: Of = "log_probability") -> Continuation:
    """A target: each token of `text` (by default of what the model itself says greedily) after those before it.

    `of` says which number of a token is attributed: its "log_probability" in nats, its "probability" or its "logit".
    InputError for an unknown one.

    >>> continuation(" Paris, the capital of France").of
    'log_probability'
    """
    if of not in get_args(Of):
        raise InputError(f"of={of!r}: expected one of {', '.join(get_args(Of))}")
    if text is not None and not text:
        raise InputError("the continuation is empty: give its text, or leave it out for what the model says itself")
    return Continuation(text, max_new_tokens, of)


def reading(site: Site | str, direction: Any = None) -> Reading:
    """A target: the value of a unit at one position, or the scalar product with a direction of the values there.

    >>> str(reading("layers.3.mlp.neurons.7@-1").site)
    'layers.3.mlp.neurons.7@-1'
    """
    return Reading(Site.parse(site), None if direction is None else torch.as_tensor(direction))


@dataclass(frozen=True, eq=False)
class Target:
    """A bound target. `read` maps the logits [row, position, vocab] (or [row, classes]) with the mask of the stream they
    belong to, or the values at `site` [row, ...], to [row, output]."""

    name: str
    outputs: tuple[str, ...]  # what the numbers are of; ("",) for a single one
    read: Callable[[Tensor, Tensor], Tensor]
    bound: BoundMetric | None = None  # of the logits; None where a site is read
    site: Site | None = None

    @property
    def single(self) -> bool:
        return self.outputs == ("",)

    @classmethod
    def of_metric(cls, bound: BoundMetric, outputs: tuple[str, ...] = ("",)) -> Target:
        def read(logits: Tensor, mask: Tensor) -> Tensor:
            made = bound.score(logits, mask)
            return made[:, None] if bound.outputs is None else made

        return cls(bound.name, outputs, read, bound)


def bind(
    model: Model, prompt: Any, target: Any = None, against: Answers | None = None, forced: str | None = None
) -> tuple[Inputs, Target]:
    """The inputs to run for one prompt (a continuation is appended to it) and the target bound to them.

    Without a target the likeliest answer is attributed: the prediction after the last position, or the class. InputError
    for several prompts, a token that is several, or `against` beside a target that compares by itself.
    """
    inputs = model.inputs(prompt, decoder=forced)
    if len(inputs) != 1:
        raise InputError(f"an attribution takes one prompt at a time, got {len(inputs)}: call it once for each")
    if against is not None and not _is_answer(target):
        raise InputError("against= goes with a target token; a metric says itself what it compares")
    if isinstance(target, Continuation):
        return _continued(model, inputs, target, forced)
    if isinstance(target, Reading):
        return inputs, _reading(model, inputs, target)
    if _is_answer(target) or target is None:
        target = _answer(model, inputs, target, against)
    return inputs, Target.of_metric(model.bind(target))


def _is_answer(target: Any) -> bool:
    return isinstance(target, str | int | Sequence)


def _answer(model: Model, inputs: Inputs, target: Answers | None, against: Answers | None) -> Metric:
    """A token's or a class's logit, minus that of another; tokens are read after the last position, or at the mask."""
    if target is None or model not in _answers:
        with torch.no_grad():
            run = model.run(inputs)
        logits = run.logits
        known = any(getattr(run.output, name, None) is not None for name in LOGITS)
        _answers[model] = logits.shape[1] if logits.ndim == 2 else "tokens" if known else "vectors"
    classes = _answers[model]
    if isinstance(classes, int):
        chosen = _class(model, int(logits[0].argmax()) if target is None else target, classes)
        return class_logit(chosen) if against is None else _class_difference(chosen, _class(model, against, classes))
    if classes == "vectors":
        raise InputError(f"{model.name} gives vectors, not answers: name what is attributed, a metric or reading(site)")
    at = _position(model, inputs)
    if target is None:
        stream = inputs.stream("")
        target = int(logits[0, stream.starts[0] + at % int(stream.lengths[0])].argmax())
    return logit(target, position=at) if against is None else logit_difference(target, against, position=at)


def _position(model: Model, inputs: Inputs) -> int:
    """Where a token is answered: at the prompt's mask token if it has one, else at the last position."""
    mask, stream = getattr(model.tokenizer, "mask_token_id", None), inputs.stream("")
    masks = (stream.ids[0, stream.mask[0].bool()] == mask).nonzero().flatten().tolist() if mask is not None else []
    if len(masks) > 1:
        raise InputError(
            f"the prompt has {len(masks)} mask tokens: give a metric with position=, such as logit(' a', position=3)"
        )
    return masks[0] if masks and not model.anatomy.stacks[-1].causal else -1


def _class(model: Model, label: Answers, classes: int) -> int:
    """A class by its number or its name."""
    names = {str(name): int(number) for number, name in (getattr(model.module.config, "id2label", None) or {}).items()}
    number = names.get(label) if isinstance(label, str) else label
    if not isinstance(number, int) or not 0 <= number < classes:
        known = ", ".join(f"{number} ({name})" for name, number in names.items()) or f"0 to {classes - 1}"
        raise InputError(f"{label!r} is no class of this classifier: expected one of {known}")
    return number


def _class_difference(chosen: int, other: int) -> BoundMetric:
    return BoundMetric("class_logit_difference", None, None, lambda z: z[:, chosen] - z[:, other], classes=True)


def _continued(model: Model, inputs: Inputs, target: Continuation, forced: str | None) -> tuple[Inputs, Target]:
    """The prompt with the continuation behind it, less the last token, which nothing follows."""
    if forced is not None:
        raise InputError("a continuation is what the decoder says: give it alone, without forced=")
    ids = _continuation_ids(model, inputs, target)
    stream = inputs.stream("")
    at = tuple(range(-len(ids), 0))
    longer = torch.cat([stream.ids[0, stream.mask[0].bool()], stream.ids.new_tensor(ids[:-1])])[None]
    if "decoder" in inputs.streams:
        encoder = {k: v for k, v in inputs.tensors.items() if not k.startswith("decoder_")}
        longer_inputs = model.inputs({**encoder, "decoder_input_ids": longer})
    else:
        longer_inputs = model.inputs({"input_ids": longer, "attention_mask": torch.ones_like(longer)})
    outputs = pieces(model, torch.cat([longer[0], longer.new_tensor(ids[-1:])]))[-len(ids) :]
    bound = BoundMetric(target.of, at, None, partial(_of_tokens, torch.tensor(ids), target.of), outputs=len(ids))
    return longer_inputs, replace(Target.of_metric(bound, outputs), name=f"{target.of} of {''.join(outputs)!r}")


def _continuation_ids(model: Model, inputs: Inputs, target: Continuation) -> list[int]:
    if target.text is None:
        made = model.generate(inputs, max_new_tokens=target.max_new_tokens).tokens[0].tolist()
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


def _reading(model: Model, inputs: Inputs, target: Reading) -> Target:
    sites = model.sites(target.site)
    if len(sites) != 1:
        raise InputError(f"{str(target.site)!r} names {len(sites)} sites: a reading is of one")
    site = sites[0]
    with torch.no_grad():
        values = model.run(inputs, keep=[site]).tensor(site)
    direction = target.direction

    def read(x: Tensor, mask: Tensor) -> Tensor:
        if direction is not None:
            x = x @ direction.to(x)
        return x.reshape(len(x), -1)

    size = values.shape[1:] if direction is None or direction.shape != values.shape[-1:] else values.shape[1:-1]
    if size.numel() != 1:
        raise InputError(
            f"{str(site)!r} holds {list(values.shape[1:])} numbers here where one is attributed: name a unit and a "
            "position such as 'layers.3.mlp.neurons.7@-1', or give a direction of the size of the last dimension"
        )
    return Target(str(site), ("",), read, site=site)


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
