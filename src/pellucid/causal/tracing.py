"""Where is a fact recalled? Blur the subject, then restore single states of the clean run and see if the answer returns.

Causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"):

    clean        p(answer | prompt)
    corrupted    the same with noise N(0, (3 sigma)^2) added to the embeddings of the subject's tokens, 10 samples;
                 sigma is the standard deviation of the model's token embeddings over `reference` texts
    restored     the corrupted run with one state (layer, position) set to its value in the clean run; for attention and
                 MLP outputs the 10 layers from layer - 5 to layer + 4, as a single one is too little to bring the fact back

    total effect = clean - corrupted        indirect effect = restored - corrupted

As in the released code, noise is added to what the embedding module gives, before position embeddings and norms. The code
takes sigma from the subjects of its data set; here it comes from the prompts themselves unless `reference` is given.
Over several prompts, positions are gathered by their role as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import beside, numbers
from pellucid.causal.embeddings import check_embeddings, embed, first_stream, from_embeddings
from pellucid.causal.grid import described
from pellucid.engine.edits import Edit, Patch
from pellucid.engine.given import is_id
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run
from pellucid.errors import InputError, at_least, listed
from pellucid.metrics import Answers, BoundMetric, Metric, placed, probability
from pellucid.model import Model
from pellucid.question import Question, spelled
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.tasks import Prompts
from pellucid.technique import settle, settling, technique

ROLES = ("first subject", "middle subject", "last subject", "first further", "further", "last")
Case = tuple[str, int, int, int]  # part, centre layer, position, window


@technique
def tracing(
    model: Model,
    prompt: Any,
    target: Answers | None = None,
    *,
    subject: str | Sequence[str] | tuple[int, int],
    parts: Sequence[str] = ("resid_post", "attn.out", "mlp.out"),
    window: int = 10,
    noise: float = 3.0,
    draws: int = 10,
    metric: Callable[[Answers], Metric] = probability,
    reference: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """The indirect effect of every layer and position, for the residual and for windows of attention and MLP outputs.

    `prompt` is one prompt, several, or `tasks.Prompts`; `subject` its words (one text per prompt), its tokens (start, stop),
    or the name of a span of the task. `target` is by default the model's own prediction (at the mask of a
    masked model). For one prompt gives `effect`
    [part, layer, position] with its interval over `draws` of the noise; for several their average [part, layer, role],
    with the interval over prompts and `each` prompt's own [prompt, part, layer, role]. Also `share` of the total effect,
    `clean` and `corrupted` of every prompt, `total_effect` with its interval. With `checkpoint`, a path, what is done is
    kept in files that begin with it, one a prompt, and an interrupted trace goes on there.

    >>> tracing(model, "The Eiffel Tower is located in the city of", " Paris", subject="Eiffel Tower", draws=2)
    What brings back ' Paris'
    causal tracing: effect, low, high, ... over part 3, layer 10, position 10, prompt 1...
    """
    at_least(1, window=window, draws=draws)
    layers = len(model.anatomy.stacks[0].blocks)

    def cases(question: _Question, alone: bool) -> list[Case]:
        # roles begin with the subject: what stands before it is only of interest in a picture of one prompt
        columns = range(0 if alone else question.span[0], question.length)
        return [(p, layer, at, _width(p, window)) for p in parts for layer in range(layers) for at in columns]

    asked = (model, prompt, target, subject, parts, noise, draws, metric, reference, seed, checkpoint)
    found, sigma = _traced(*asked, cases)
    questions = [noised.question for noised, _ in found]
    effects = [change.reshape(len(parts), layers, -1, draws) for _, change in found]
    coords: dict[str, Any] = {"part": list(parts), "layer": range(layers)}
    if len(found) == 1:
        labels, span = list(first_stream(questions[0].inputs).labels[0]), questions[0].span
        where = ["subject" if span[0] <= i < span[1] else "" for i in range(len(labels))]
        coords |= {"position": range(len(labels)), "token": ("position", labels), "in_subject": ("position", where)}
        dim, drawn = "position", np.moveaxis(effects[0], -1, 0)
        title = f"What brings back {spelled(model, questions[0].target)}"
    else:
        coords["role"] = list(ROLES)
        dim, title = "role", f"What brings back {len(found)} facts"
        drawn = np.stack([_by_role(q, effect.mean(-1)) for q, effect in zip(questions, effects, strict=True)])
    variables = _described(drawn, ("part", "layer", dim), [noised for noised, _ in found], seed)
    data = xr.Dataset(variables, coords, {"sigma": sigma, "metric": found[0][0].metric.name})
    return Result(data, kind="causal tracing", title=title)


@technique
def window_curve(
    model: Model,
    prompt: Any,
    target: Answers | None = None,
    *,
    subject: str | Sequence[str] | tuple[int, int],
    part: str = "mlp.out",
    positions: int | None = None,
    windows: Iterable[int] = (1, 2, 4, 6, 8, 10, 15, 20),
    noise: float = 3.0,
    draws: int = 10,
    metric: Callable[[Answers], Metric] = probability,
    reference: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """How much the picture owes to the window: the indirect effect [window, layer] at one position of each prompt.

    `positions` names it, by default the subject's last token. Prompts, intervals and the rest as for `tracing`.
    """
    widths, layers = list(windows), len(model.anatomy.stacks[0].blocks)

    def cases(question: _Question, alone: bool) -> list[Case]:
        return [(part, layer, question.read(positions), width) for width in widths for layer in range(layers)]

    asked = (model, prompt, target, subject, [part], noise, draws, metric, reference, seed, checkpoint)
    found, sigma = _traced(*asked, cases)
    effects = [change.reshape(len(widths), layers, draws) for _, change in found]
    drawn = np.moveaxis(effects[0], -1, 0) if len(found) == 1 else np.stack([e.mean(-1) for e in effects])
    variables = _described(drawn, ("window", "layer"), [noised for noised, _ in found], seed)
    at = [noised.question.read(positions) for noised, _ in found]
    where = "the subject's last token" if positions is None else positions
    attributes = {"part": part, "position": at, "sigma": sigma}
    data = xr.Dataset(variables, {"window": widths, "layer": range(layers)}, attributes)
    return Result(data, kind="window curve", title=f"{part} at {where} in windows of layers")


def _traced(
    model: Model,
    prompt: Any,
    target: Any,
    subject: Any,
    parts: Sequence[str],
    noise: float,
    draws: int,
    metric: Any,
    reference: Any,
    seed: int,
    checkpoint: str | Path | None,
    cases: Callable[[_Question, bool], list[Case]],
) -> tuple[list[tuple[_Noised, np.ndarray]], float]:
    """Every prompt and the change [case, draw] that restoring each of its cases makes; and sigma."""
    questions = list(_questions(model, prompt, target, subject))
    settle(target=[q.target for q in questions])
    sigma = _sigma(model, reference, questions)
    found = []
    for i, question in enumerate(questions):
        noised = _Noised.of(model, question, parts, metric, noise * sigma, draws, seed + i)
        edits = [[*noised.noise, *noised.edits(*case)] for case in cases(question, len(questions) == 1)]
        swept = model.sweep(noised.rows, edits, noised.metric, checkpoint=beside(checkpoint, i))
        found.append((noised, numbers(swept.values) - numbers(noised.corrupted)))
    return found, sigma


# ---- what is asked


@dataclass(frozen=True, eq=False)
class _Question:
    """One prompt, its answer, and the tokens [start, stop) of its subject."""

    inputs: Inputs
    target: Answers
    span: tuple[int, int]

    @property
    def length(self) -> int:
        return int(first_stream(self.inputs).ids.shape[1])

    def read(self, position: int | None) -> int:
        """A position counted from the start; by default the subject's last."""
        return self.span[1] - 1 if position is None else range(self.length)[position]


def _questions(model: Model, prompt: Any, target: Any, subject: Any) -> Iterable[_Question]:
    spans: Sequence[Any] | None = None
    if isinstance(prompt, Prompts):
        if isinstance(subject, str) and subject in prompt.spans:
            spans = prompt.spans[subject]
        target = [each if isinstance(each, str) else [each] for each in prompt.answers] if target is None else target
        prompt = prompt.clean
    prompts = [prompt] if isinstance(prompt, str) else listed("prompt", prompt, "a text, or several")
    if not prompts:
        raise InputError("no prompt was given: expected a text, or several")
    targets = target if isinstance(target, list | tuple) else [target] * len(prompts)
    subjects = spans or (
        [subject] * len(prompts)
        if isinstance(subject, str | tuple)
        else listed("subject", subject, "a text of the prompt, a span (first, last + 1), or one for each prompt")
    )
    if not len(prompts) == len(targets) == len(subjects):
        raise InputError(
            f"{len(prompts)} prompts, {len(targets)} targets and {len(subjects)} subjects: give one of each per prompt"
        )
    for text, right, about in zip(prompts, targets, subjects, strict=True):
        inputs = model.inputs(text)
        if isinstance(about, tuple) and not (len(about) == 2 and all(map(is_id, about))):
            raise InputError(f"subject={about!r:.80}: expected a text of the prompt, or a span (first, last + 1)")
        tokens = range(*about) if isinstance(about, tuple) else first_stream(inputs).named(about, 0)
        with settling({}):  # one of several: they are settled together
            right = Question.of(model, inputs).answers[0].id if right is None else right
        yield _Question(inputs, right, (tokens.start, tokens.stop))


def _sigma(model: Model, reference: Any, questions: Sequence[_Question]) -> float:
    """The standard deviation of token embeddings over all tokens and dimensions of the reference."""
    streams = (
        [first_stream(q.inputs) for q in questions] if reference is None else [first_stream(model.inputs(reference))]
    )
    ids = torch.cat([s.ids[s.mask.bool()] for s in streams])
    return float(embed(model, ids).float().std())


# ---- one prompt, corrupted


@dataclass(frozen=True, eq=False)
class _Noised:
    """A prompt under several draws of noise (one row each), the clean values to restore, and the metric on both."""

    model: Model
    question: _Question
    rows: Inputs
    noise: list[Edit]  # in models that take no embeddings as inputs
    run: Run
    metric: BoundMetric
    clean: Tensor
    corrupted: Tensor

    @classmethod
    def of(
        cls, model: Model, question: _Question, parts: Sequence[str], metric: Any, scale: float, draws: int, seed: int
    ) -> _Noised:
        inputs, (start, stop) = question.inputs, question.span
        if not 0 <= start < stop <= question.length:
            raise InputError(f"the subject's tokens {start}:{stop} are not in the prompt {inputs.texts[0]!r}")
        check_embeddings(model, inputs)
        vectors = embed(model, first_stream(inputs).ids).repeat(draws, 1, 1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(draws, stop - start, vectors.shape[-1], generator=generator) * scale
        vectors[:, start:stop] += drawn.to(vectors.device, vectors.dtype)
        rows, added = from_embeddings(model, inputs.repeated(draws), vectors)
        prefix = model.anatomy.stacks[0].prefix
        with torch.no_grad():
            run = model.run(inputs, keep=[f"{prefix}layers.*.{part}" for part in parts])
            asked = placed(model, inputs, metric(question.target))
            clean, bound = model.score(run, asked), model.bind(asked, draws)
            corrupted = model.score(model.run(rows, edits=added), bound)
        return cls(model, question, rows, added, run, bound, clean, corrupted)

    def edits(self, part: str, layer: int, position: int, window: int) -> list[Edit]:
        """The clean values of a case's layers back in place."""
        stack = self.model.anatomy.stacks[0]
        made: list[Edit] = []
        for i in range(max(0, layer - window // 2), min(len(stack.blocks), layer - (-window // 2))):
            if part in stack.blocks[i].taps:
                site = Site.parse(f"{stack.prefix}layers.{i}.{part}")
                made.append(Patch(site.at_position(position), self.run.tensor(site)[:, position : position + 1]))
        return made


def _width(part: str, window: int) -> int:
    """A residual state carries all that came before: it is restored alone."""
    return 1 if part.startswith("resid") else window


# ---- results


def _by_role(question: _Question, effect: np.ndarray) -> np.ndarray:
    """Effects [part, layer, position from the subject on] averaged over each role's; NaN where a prompt has none."""
    start, stop = 0, question.span[1] - question.span[0]
    n = effect.shape[-1]
    where = {
        "first subject": [start], "middle subject": range(start + 1, stop - 1), "last subject": [stop - 1],
        "first further": range(stop, min(stop + 1, n - 1)), "further": range(stop + 1, n - 1), "last": [n - 1],
    }  # fmt: skip
    none = np.full(effect.shape[:-1], np.nan)
    return np.stack([effect[..., list(where[r])].mean(-1) if len(where[r]) else none for r in ROLES], -1)


def _described(drawn: np.ndarray, dims: tuple[str, ...], noised: Sequence[_Noised], seed: int) -> dict[str, Any]:
    """Means and intervals of effects [draw or prompt, ...], beside the metric's clean and corrupted values.

    A prompt may lack a role (a subject of one token has no middle): each is averaged over the prompts that have it.
    """
    clean = np.array([float(n.clean[0]) for n in noised])
    blurred = np.array([float(n.corrupted.mean()) for n in noised])
    total = clean - (numbers(noised[0].corrupted) if len(noised) == 1 else blurred)
    known = (~np.isnan(drawn)).sum(0)
    effect = np.where(known > 0, np.nansum(drawn, 0) / np.maximum(known, 1), np.nan)
    low, high = interval(drawn, seed)
    made: dict[str, Any] = {"effect": effect, "low": low, "high": high, "share": effect / total.mean()}
    made = {name: (dims, value) for name, value in made.items()}
    if len(noised) > 1:
        made["each"] = (("prompt", *dims), drawn)
    sides = {"clean": ("prompt", clean), "corrupted": ("prompt", blurred)}
    return made | sides | described("total_effect", total, seed, "total_")
