"""Two models joined at a layer: which can be, and what the receiver loses when another residual is put in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pellucid.corpus import Corpus
from pellucid.engine.edits import Swap
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, Refused
from pellucid.lenses.lens import layer_numbers
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.surgery.aligned import Pair, pairs, residuals


def ends(sender: Model, receiver: Model, after: int, into: int) -> tuple[str, str]:
    """The two sites. Refused for models that do not say the next token of a text from left to right."""
    for model, what in ((sender, "sender"), (receiver, "receiver")):
        stack = model.anatomy.stacks[0]
        if len(model.anatomy.stacks) > 1 or not stack.causal:
            reads = (
                "has two stacks"
                if len(model.anatomy.stacks) > 1
                else "looks ahead, so it has seen the tokens that are asked for"
            )
            raise Refused(f"{model.name} cannot be a {what}: it {reads}; compare such models with surgery.similarity")
    if receiver.anatomy.answering.meaning != "tokens" or receiver.anatomy.head is None:
        raise Refused(f"{receiver.name} cannot be a receiver: it does not say the next token of a text")
    return residuals(sender, layer_numbers(sender, [after])).popitem()[1], residuals(
        receiver, layer_numbers(receiver, [into])
    ).popitem()[1]


def read_pair(sender: Model, receiver: Model, prompt: Any) -> list[Pair]:
    given = [prompt] if isinstance(prompt, str) else prompt
    made = pairs(
        sender, receiver, Corpus(given if isinstance(given[0], str | list | tuple) else [given]), 1 << 30, 1 << 30
    )
    if len(made) != 1:
        raise InputError(f"{len(made)} prompts: a stitched run is of one")
    return made


def measured(
    receiver: Model, test: Sequence[Pair], put: dict[Any, tuple[str, list[Tensor]]]
) -> tuple[dict[Any, np.ndarray], np.ndarray, np.ndarray]:
    """The receiver's nll of each text with other residuals put in, and as it is; and how many tokens that is of."""
    values: dict[Any, list[float]] = {cell: [] for cell in put}
    plain, sizes = [], []
    for i, pair in enumerate(progress(list(test), "stitched")):
        metric, n = nll_of(pair)
        swept = receiver.sweep(pair.receiver, [[Swap(site, moved[i][None])] for site, moved in put.values()], metric)
        for cell, value in zip(values, swept.values.double().cpu().numpy()[:, 0], strict=True):
            values[cell].append(float(value))
        plain.append(float(swept.clean[0]))
        sizes.append(n)
    return {cell: np.array(v) for cell, v in values.items()}, np.array(plain), np.array(sizes, dtype=float)


def nll_of(pair: Pair) -> tuple[BoundMetric, int]:
    """Mean nll of a text's tokens, without those after a position at which the sender has read ahead."""
    n = len(pair)
    ids, seen = pair.receiver.stream("").ids[:, 1:n, None], pair.seen[: n - 1]
    many = int(seen.sum())

    def read(logits: Tensor) -> Tensor:
        said = logits[:, : n - 1].float().log_softmax(-1)
        lost = -said.gather(2, ids.to(said.device).expand(len(said), -1, -1))[..., 0]
        return (lost * seen.to(lost)).sum(1) / max(1, many)

    return BoundMetric("nll", None, None, read), many
