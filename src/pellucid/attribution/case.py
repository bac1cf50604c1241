"""One prompt, what is asked of the model, and the tokens that may get credit for the answer.

Every attribution method starts from a `Case`. Tokens are counted over the credited streams one after another: the
prompt's; in an encoder-decoder the source's, and behind them, for a continuation, those the decoder was given. Special
tokens (not `<unk>`, which stands for a word) keep their place and get no credit unless asked for: a model has hardly
ever read a text without them, so there is no sense in which they are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.heads import reads_both_ends
from pellucid.engine.edits import Ablate, Edit
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.marks import special_ids
from pellucid.engine.writing import check_unconditional
from pellucid.errors import InputError
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.question import Question, pieces
from pellucid.results import Result


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt on a model, what is asked about it, and the credited streams by the name of their stack."""

    question: Question
    streams: dict[str, Stream]
    keep_special: bool = True
    edits: tuple[Edit, ...] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        prompt: Any,
        target: Any = None,
        *,
        against: Answers | None = None,
        decoder: str | None = None,
        keep_special: bool = True,
        edits: Sequence[Edit] = (),
    ) -> Case:
        """Ask one prompt about a target (see `pellucid.question`), of the model under edits. InputError as `Question.of`
        says, or for an edit that takes its values from the other rows of a batch: they are versions of one prompt here.
        """
        edits = tuple(model.resolved(edits))
        for edit in edits:
            check_unconditional([edit])
            if isinstance(edit, Ablate) and edit.how != "zero" and edit.reference is None:
                raise InputError(
                    f"{edit!r} takes its values from the batch at hand, which here holds versions of one prompt: give it "
                    "reference=, a run or prompts"
                )
        question = Question.of(model, prompt, target, against=against, decoder=decoder, edits=edits)
        inputs = question.inputs
        if "inputs_embeds" in inputs.tensors:
            raise InputError(
                "the prompt was given as embeddings, and credit is given to tokens: give its text or ids, or read and change "
                "values with model.run(prompt, grad_of=metric, keep=['embed'])"
            )
        if len(inputs) != 1:
            raise InputError(f"this takes one prompt at a time, got {len(inputs)}: call it once for each")
        streams = {"": inputs.stream("")}
        if "decoder" in inputs.streams:
            both = question.kind == "continuation" or (decoder is None and reads_both_ends(model.module))
            credited = ("encoder", "decoder") if both else ("encoder",)
            streams = {name: inputs.streams[name] for name in credited}
        return cls(question, streams, keep_special, edits)

    @property
    def model(self) -> Model:
        return self.question.model

    @property
    def inputs(self) -> Inputs:
        return self.question.inputs

    @cached_property
    def lengths(self) -> list[int]:
        return [stream.ids.shape[1] for stream in self.streams.values()]

    @cached_property
    def ids(self) -> Tensor:
        """[position] of all credited streams."""
        return torch.cat([stream.ids[0] for stream in self.streams.values()])

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text each token adds to those before it."""
        return tuple(text for stream in self.streams.values() for text in pieces(self.model, stream.ids[0]))

    @cached_property
    def special(self) -> np.ndarray:
        """[position] tokens that are no text: marks (see `engine.marks`), padding, and the one a decoder starts with."""
        known = special_ids(self.model.tokenizer)
        found = [[int(i) in known for i in stream.ids[0]] for stream in self.streams.values()]
        for (name, stream), row in zip(self.streams.items(), found, strict=True):
            row[:] = [s or not m for s, m in zip(row, stream.mask[0].bool().tolist(), strict=True)]
            row[0] = row[0] or name == "decoder"
        return np.array([s for row in found for s in row])

    @cached_property
    def fixed(self) -> np.ndarray:
        """[position] tokens that are never absent: padding always, special ones if `keep_special`."""
        if self.keep_special:
            return self.special
        return np.concatenate([~stream.mask[0].bool().cpu().numpy() for stream in self.streams.values()])

    @cached_property
    def visible(self) -> np.ndarray:
        """[output, position] False where a token comes too late to matter: in a continuation, behind what predicts."""
        seen = np.ones((len(self.question.outputs), len(self.tokens)), bool)
        bound = self.question.metric
        if bound is not None and bound.outputs is not None and bound.positions is not None:
            last = "" if "" in self.streams else "decoder"
            if self.model.anatomy.stacks[-1].causal and last in self.streams and len(bound.positions) == bound.outputs:
                for row, at in zip(seen, bound.positions, strict=True):
                    row[len(row) + at + 1 :] = False
        return seen

    def split(self, values: Tensor) -> list[Tensor]:
        """Values [..., position, d] of all streams, stream by stream."""
        return list(values.split(self.lengths, dim=-2))

    def read(self, found: Any) -> Tensor:
        """[row, output] of the target, from the logits or from the values at its site."""
        mask = self.inputs.stream("").mask.expand(len(found), -1)
        return self.question.read(found, mask)

    # ---- results

    @property
    def _asked(self) -> dict[str, str]:
        q = self.question
        told = {"answer": " / ".join(a.text for a in q.answers), "against": " / ".join(a.text for a in q.against)}
        return {"attributed": q.name, **{name: text for name, text in told.items() if text}}

    def result(
        self,
        title: str,
        variables: dict[str, Any],
        *,
        coords: dict[str, Any] | None = None,
        attrs: dict[str, Any] | None = None,
        labels: Sequence[str] | None = None,
    ) -> Result:
        """A labelled result. `variables` are scalars, [output], [player] or [output, player] (arrays or tensors),
        or (dimensions, array); the players are the tokens, or what `labels` names. A single target has no dimension
        `output`; one row that could be of either is of the outputs."""
        dim = "position" if labels is None else "player"
        labels = self.tokens if labels is None else labels
        kept: dict[str, Any] = {dim: range(len(labels)), "token" if dim == "position" else "text": (dim, list(labels))}
        if dim == "position":
            kept["special"] = (dim, self.special)
            if len(self.streams) > 1 or "encoder" in self.streams:
                names = {"encoder": "source", "decoder": "target"}
                kept["stream"] = (
                    dim,
                    [names[n] for n, size in zip(self.streams, self.lengths, strict=True) for _ in range(size)],
                )
        if not self.question.single:
            kept["output"] = range(len(self.question.outputs))
            kept["output_token"] = ("output", list(self.question.outputs))
        data = xr.Dataset(
            {name: self._labelled(value, dim, len(labels)) for name, value in variables.items()},
            coords={**kept, **(coords or {})},
            attrs={**self._asked, **(attrs or {})},
        )
        return Result(data, kind="attribution", title=title)

    def _labelled(self, value: Any, dim: str, players: int) -> Any:
        if isinstance(value, tuple):  # the caller named the dimensions
            return value
        if isinstance(value, Tensor):  # numpy has no bfloat16
            value = value.detach().cpu()
            value = value.float() if value.dtype == torch.bfloat16 else value
        array = np.asarray(value)
        if array.ndim == 0:
            return array.item()
        outputs = len(self.question.outputs)
        if array.shape == (outputs, players):
            return (dim, array[0]) if self.question.single else (("output", dim), array)
        if array.shape == (outputs,):
            return array[0].item() if self.question.single else ("output", array)
        return (dim, array)
