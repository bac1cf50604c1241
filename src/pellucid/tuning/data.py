"""What is a model tuned on? Texts, what is to be answered, and which words are, or must not be, the reasons.

A `Rationales` is texts with labels and named spans. Spans are said as people say them (a text, characters, several of
these, a mask over tokens) and are laid over each model's own tokens by offsets; one that meets no token is an error that
names text, span and the nearest tokens. What is answered follows from the model:

    a classifier of texts          labels are classes, by number or name
    a model that says tokens on    labels are texts that follow the prompt; without labels every next token is learnt
    an encoder-decoder             labels are texts that its decoder says

so that one batch is the same thing for all: inputs, places where logits are read, and what stands there.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.corpus import read_each
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.marks import special_ids, trailing_marks
from pellucid.engine.text_map import TextMap, covering
from pellucid.errors import InputError, Refused, nearest
from pellucid.model import Model

NOT_ASKED = -1e4  # the logit of a class that is not asked about: no probability, and no gradient
Span = Any  # None, a text, (start, stop) characters, a list of these, or a boolean mask over the tokens


@dataclass(frozen=True, eq=False)
class Rationales:
    """`texts`, a label for each (None: the text itself is learnt), and named `spans`, each with one entry for each text.

    An entry is None (nothing), a text (its last occurrence, whole words first), (start, stop) in characters, a list of
    these, or a boolean mask over the text's tokens. Several annotators are several names. `groups` say which texts belong
    together (twins of a pair), for intervals; `properties` what else is known of each text, by name (a topic, whether a
    concept holds). `among` are for each text the classes that its answer is one of (None: all): several questions with one
    head, each over classes of its own. InputError where lengths differ.

    >>> Rationales(["a stone, a fine film"], [1], {"decoy": ["stone"], "rationale": [[(9, 20)]]})
    <Rationales: 1 text, spans decoy, rationale>
    """

    texts: Sequence[str]
    labels: Sequence[Any] | None = None
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    groups: Sequence[Hashable] | None = None
    properties: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    among: Sequence[Sequence[Any] | None] | None = None

    def __post_init__(self) -> None:
        if not len(self.texts):
            raise InputError("there is no text to tune on: give at least one")
        beside = {"labels": self.labels, "groups": self.groups, "among": self.among} | {
            f"spans[{k!r}]": v for k, v in self.spans.items()
        }
        beside |= {f"properties[{k!r}]": v for k, v in self.properties.items()}
        for name, given in beside.items():
            if given is not None and len(given) != len(self.texts):
                raise InputError(
                    f"{len(self.texts)} texts and {len(given)} {name}: expected one for each text (None where there is none)"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        spans = f", spans {', '.join(self.spans)}" if self.spans else ""
        return f"<Rationales: {len(self)} text{'s' * (len(self) != 1)}{spans}>"


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows, padded together, as every objective sees them.

    `masks` are [row, position] by name, `content` the tokens that are text and no mark, both of the stream that the spans
    lie in, `properties` what is known of each row by name. Logits are read at `places` [answer] (column; None: one a row) of rows `owners`
    [answer], where `answers` stand; `asked` [row, class] are the classes that are asked about (None: all). Passes of it are run under `edits`.
    """

    model: Model
    inputs: Inputs
    rows: tuple[int, ...]
    masks: Mapping[str, Tensor]
    content: Tensor
    owners: Tensor
    places: Tensor | None
    answers: Tensor
    step: int = 0
    properties: Mapping[str, list[Any]] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    asked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> Tensor:
        """[row, position] token ids of the stream that the spans lie in."""
        return self.inputs.streams.get("encoder", self.inputs.stream("")).ids

    def with_ids(self, ids: Tensor) -> Batch:
        """The same batch with other tokens in the places of the old ones; what is answered stays."""
        tensors = self.inputs.tensors | {"input_ids": ids}
        name = "encoder" if "encoder" in self.inputs.streams else ""
        stream = replace(self.inputs.streams[name], ids=ids, maps=(), spans={})
        streams = dict(self.inputs.streams) | {name: stream}
        if tensors.get("decoder_input_ids") is not None and self.places is None:  # a classifier that reads at both ends
            from pellucid.anatomy.heads import given_decoder

            tensors["decoder_input_ids"] = given_decoder(self.model.module, ids)
            given = replace(streams["decoder"], ids=tensors["decoder_input_ids"], maps=())
            streams |= {"decoder": given, "": given}
        return replace(self, inputs=Inputs(tensors, streams, self.inputs.texts))

    def read(self, logits: Tensor) -> Tensor:
        """[answer, class or token] in float32 at least; a single logit is of two classes, no and yes; NOT_ASKED in those not asked about."""
        z = logits if self.places is None else logits[self.owners.to(logits.device), self.places.to(logits.device)]
        z = z if z.dtype == torch.float64 else z.float()
        z = torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z
        return z if self.asked is None else torch.where(self.asked.to(z.device), z, NOT_ASKED)

    def by_row(self, values: Tensor) -> Tensor:
        """[row] the mean over a row's answers of values [answer]."""
        if self.places is None:
            return values
        owners = self.owners.to(values.device)
        total = values.new_zeros(len(self)).index_add(0, owners, values)
        return total / torch.bincount(owners, minlength=len(self)).clamp_min(1)


class Encoded:
    """Data as one model reads it: every row by itself, its masks, and what is answered where."""

    def __init__(self, model: Model, data: Rationales, truncate: int | None = None) -> None:
        if not isinstance(data, Rationales):
            raise InputError(f"expected tuning.Rationales(texts, labels), got a {type(data).__name__}")
        self.model, self.data, told = model, data, model.anatomy.answering
        self.classes = told.meaning == "class"
        paired = len(model.anatomy.stacks) > 1
        if not (self.classes or told.meaning == "tokens") or (told.independent and told.size > 1) or (
            told.masked and not paired and not self.classes
        ):  # fmt: skip
            raise Refused(
                f"{model.name} is tuned neither as a classifier of one class a text nor as a model that says tokens: open it "
                "with task='classification', or make one with tuning.classifier(model, names)"
            )
        if model.tokenizer is None and data.spans:
            raise InputError("this model was opened without a tokenizer, so no span can be laid over its tokens")
        labels = data.labels
        if labels is None and (self.classes or paired):
            raise InputError(
                "labels are missing: a classifier needs classes, an encoder-decoder the texts it is to say"
            )
        self.labels = [told.numbers(_plain(y)) for y in labels] if self.classes and labels is not None else labels
        if data.among is not None and not self.classes:
            raise InputError(f"among= is for classifiers, and {model.name} says tokens")
        self.among: Tensor | None = None
        if data.among is not None and labels is not None and self.labels is not None:
            self.among = torch.zeros(len(data), max(told.size, 2), dtype=torch.bool)
            for i, some in enumerate(data.among):
                own = range(self.among.shape[1]) if some is None else told.numbers([_plain(y) for y in some])
                self.among[i, list(own)] = True
                if not self.among[i, self.labels[i]]:
                    raise InputError(f"the label of text {i} is {labels[i]!r}, which is not among {some}")
        self._shares: dict[tuple[str, ...], float] = {}
        self.cut = 0  # spans that truncation took away
        self.rows: list[Inputs] = []
        self.lengths: list[int] = []  # tokens of the prompt, which a label may follow
        self.positions: dict[str, list[list[int]]] = {name: [] for name in data.spans}
        self.content: list[list[int]] = []
        marks = special_ids(model.tokenizer)
        prompts = read_each(model, list(data.texts), what="text", truncate=truncate)
        for i, (text, prompt) in enumerate(zip(data.texts, prompts, strict=True)):
            stream = prompt.streams.get("encoder", prompt.stream(""))
            self.lengths.append(int(stream.lengths[0]))
            self.rows.append(
                prompt
                if self.classes or labels is None
                else self._answered(prompt, text, labels[i], paired, truncate, i)
            )
            self.content.append([k for k, t in enumerate(stream.ids[0].tolist()) if t not in marks])
            for name, spans in data.spans.items():
                found = self._positions(stream, spans[i], i, name)
                self.positions[name].append([k for k in found if k in self.content[-1]])
        if self.cut:
            import warnings

            warnings.warn(f"truncate={truncate} cut away {self.cut} of the spans of {len(data)} texts", stacklevel=2)

    def __len__(self) -> int:
        return len(self.rows)

    def _answered(self, prompt: Inputs, text: str, label: Any, paired: bool, truncate: int | None, i: int) -> Inputs:
        if not isinstance(label, str) or not label:
            raise InputError(f"label {i} is {label!r}: a model that says tokens is given the text it is to say")
        if paired:
            return self.model.inputs([text], decoder=label, truncate=truncate)
        ids = prompt.stream("").ids[0].tolist()
        ids = ids[: len(ids) - trailing_marks(self.model.tokenizer, ids)]
        self.lengths[-1] = len(ids)
        return self.model.inputs([ids + self.model.tokenizer(label, add_special_tokens=False)["input_ids"]])

    def _positions(self, stream: Stream, span: Span, i: int, name: str) -> list[int]:
        if span is None:
            return []
        n = int(stream.lengths[0])
        if getattr(span, "dtype", None) in (torch.bool, np.dtype(bool)):
            if len(span) != n:
                raise InputError(f"spans[{name!r}] of text {i} is a mask of {len(span)} tokens, and the text has {n}")
            return [k for k in range(n) if span[k]]
        if isinstance(span, list):
            return sorted({k for each in span for k in self._positions(stream, each, i, name)})
        text: TextMap = stream.maps[0]
        if isinstance(span, str):
            characters = text.find(span)
            if characters is None:
                raise InputError(
                    f"spans[{name!r}] of text {i}: {span!r} is not in it{nearest(span, text.text.split())}"
                )
        else:
            try:
                a, b = (int(x) for x in span)
            except (TypeError, ValueError):
                raise InputError(
                    f"spans[{name!r}] of text {i} is {span!r}: expected a text, (start, stop), a list of these or a mask"
                ) from None
            given = str(self.data.texts[i])
            if not 0 <= a < b <= len(given):
                raise InputError(f"spans[{name!r}] of text {i} is characters {a} to {b}, and the text has {len(given)}")
            characters = a, b
        first, last = covering(text.offsets, *characters)
        if first < last:
            return list(range(first, last))
        if characters[0] >= max(stop for _, stop in text.offsets):
            self.cut += 1
            return []
        near = sorted(range(n), key=lambda k: abs(text.offsets[k][0] - characters[0]))[:3]
        shown = ", ".join(f"{stream.labels[0][k]!r} {list(text.offsets[k])}" for k in sorted(near))
        raise InputError(
            f"spans[{name!r}] of text {i}: no token stands for characters {list(characters)} "
            f"({self.data.texts[i][slice(*characters)]!r}); the nearest tokens are {shown}"
        )

    def share(self, names: Sequence[str]) -> float:
        """Of the texts, those in which one of some spans has a token: what a mean over these is divided by, so that a loss weighs
        the same however a batch is split."""
        key = tuple(names)
        if key not in self._shares:
            some = [any(self.positions[name][i] for name in key) for i in range(len(self))]
            self._shares[key] = sum(some) / len(some)
        return self._shares[key]

    def check_spans(self, names: Sequence[str], who: str) -> None:
        """InputError where data lacks a span that an objective names, or has it nowhere."""
        for name in names:
            if name not in self.positions:
                raise InputError(
                    f"{who} asks for the spans {name!r}, and the data has none of that name{nearest(name, self.positions)}"
                )
            if not any(self.positions[name]):
                raise InputError(
                    f"{who} asks for the spans {name!r}, and no text of the data has one: there is nothing to learn from"
                )

    def check_properties(self, names: Sequence[str], who: str) -> None:
        """InputError where data lacks a property that an objective names."""
        for name in names:
            if name not in self.data.properties:
                raise InputError(
                    f"{who} asks for the property {name!r}, and the data has none of that name{nearest(name, self.data.properties)}: "
                    "give Rationales(properties={name: a value for each text})"
                )

    def batch(self, rows: Sequence[int], step: int = 0) -> Batch:
        """Rows padded together."""
        rows = tuple(int(i) for i in rows)
        inputs = self.model.beside([self.rows[i] for i in rows], [1] * len(rows))
        width = inputs.streams.get("encoder", inputs.stream("")).ids.shape[1]

        def mask(positions: Sequence[Sequence[int]]) -> Tensor:
            made = torch.zeros(len(rows), width, dtype=torch.bool)
            for b, i in enumerate(rows):
                made[b, list(positions[i])] = True
            return made

        masks = {name: mask(found) for name, found in self.positions.items()}
        owners, places, answers = self._answers(rows, inputs)
        known = {name: [_plain(values[i]) for i in rows] for name, values in self.data.properties.items()}
        return Batch(
            self.model,
            inputs,
            rows,
            masks,
            mask(self.content),
            owners,
            places,
            answers,
            step,
            known,
            asked=None if self.among is None else self.among[list(rows)],
        )

    def _answers(self, rows: Sequence[int], inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.classes:
            assert self.labels is not None
            return torch.arange(len(rows)), None, torch.tensor([self.labels[i] for i in rows])
        stream, paired = inputs.stream(""), "decoder" in inputs.streams
        owners, places, answers = [], [], []
        for b, i in enumerate(rows):
            first = 0 if paired or self.labels is None else self.lengths[i] - 1
            for place in range(first, int(stream.lengths[b]) - 1):
                owners.append(b)
                places.append(place)
                answers.append(int(stream.ids[b, place + 1]))
        if not owners:
            raise InputError("there is nothing to predict: give texts of two tokens or more, or labels")
        return torch.tensor(owners), torch.tensor(places), torch.tensor(answers)

    def answers(self, row: int) -> list[int]:
        """What is answered in one row."""
        return [int(y) for y in self._answers([row], self.rows[row])[2]]

    @cached_property
    def constant(self) -> float:
        """Mean cross-entropy of the best prediction that is the same for all: that of the answers' frequencies, in nats."""
        counts: dict[int, int] = {}
        for i in range(len(self)):
            for y in self.answers(i):
                counts[y] = counts.get(y, 0) + 1
        p = np.array(list(counts.values())) / sum(counts.values())
        return float(-(p * np.log(p)).sum())


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label
