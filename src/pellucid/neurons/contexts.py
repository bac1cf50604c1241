"""The places where a unit fires, and places where it mostly does not, as text with its activation at every token.

A harvest knows where a unit's largest activations are and holds one uniform sample of tokens for all units, not what the
tokens around gave: those prompts are run again, each once for all units asked about, and a window is cut around each place.
About half of the prompts are for explaining, the other half for judging explanations; which half a prompt is in depends on
the seed alone, so that it is the same for all units: what describes one unit has not seen the texts on which another is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.corpus import Row, by_length, inputs
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import special_ids
from pellucid.engine.run import stream_of
from pellucid.engine.watching import together, watch
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.neurons.harvest import TOKENS, Harvest, Moment
from pellucid.neurons.shelf import where
from pellucid.technique import technique


@dataclass(frozen=True, eq=False)
class Context:
    """A stretch of text: its `tokens`, and a unit's `activations` [token], NaN at tokens that do not count (special ones)."""

    tokens: tuple[str, ...]
    activations: np.ndarray

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            raise InputError(f"{len(self.tokens)} tokens have {len(self.activations)} activations: expected one each")

    def __repr__(self) -> str:
        return f"<Context of {len(self.tokens)} tokens: {self.text[:60]!r}>"

    @property
    def counted(self) -> np.ndarray:
        """[token]"""
        return ~np.isnan(self.activations)

    def above(self, level: float) -> np.ndarray:
        """[token] where the unit is active."""
        return np.nan_to_num(self.activations, nan=-np.inf) > level

    @property
    def text(self) -> str:
        return self.marked(np.zeros(len(self.tokens), dtype=bool))

    def marked(self, where: np.ndarray, left: str = "<<", right: str = ">>") -> str:
        """The text with some tokens between marks.

        >>> Context((" the", " cat"), np.zeros(2)).marked(np.array([False, True]))
        ' the <<cat>>'
        >>> Context(("play", "##ing", "cat"), np.zeros(3)).text
        'playing cat'
        """
        spaced = any(token[:1].isspace() for token in self.tokens)  # else pieces of words are marked instead
        made = ""
        for i, (token, mark) in enumerate(zip(self.tokens, where, strict=True)):
            word = token.lstrip() or token
            space = token[: len(token) - len(word)]
            if not spaced:
                space = " " if i and not word.startswith("##") else ""
                word = word.removeprefix("##")
            made += f"{space}{left}{word}{right}" if mark else space + word
        return made


@dataclass(frozen=True, eq=False)
class UnitContexts:
    """What there is to say about a unit: contexts to explain it from, `shown`, and to judge by, `held_out`.

    A token is active if its activation is above `level`.
    """

    unit: str
    level: float
    shown: tuple[Context, ...]
    held_out: tuple[Context, ...]

    def __repr__(self) -> str:
        return f"<UnitContexts of {self.unit}: {len(self.shown)} shown, {len(self.held_out)} held out>"


@technique
def read_contexts(
    model: Model,
    harvest: Harvest,
    units: Sequence[str],
    *,
    top: int = 40,
    random: int = 60,
    window: tuple[int, int] = (12, 6),
    quantile: float = 0.99,
    seed: int = 0,
) -> list[UnitContexts]:
    """Contexts of units of a harvest: around their `top` largest activations (one a prompt) and around `random` tokens of the
    uniform sample, from `window[0]` tokens before to `window[1]` after.

    The level of a unit is the `quantile` of its activations at the sample. InputError without units or for a harvest of
    other weights.
    """
    if isinstance(units, str) or not units:
        raise InputError("expected a list of units, at least one, such as layers.3.mlp.neurons.17")
    at_least(0, top=top, random=random, window=min(window))
    at_least(1, contexts=top + random)
    found = [harvest.find(unit) for unit in units]
    levels = {name: harvest.quantiles(name, [quantile])[0] for name in dict.fromkeys(name for name, _ in found)}
    prompts, positions = where(harvest.sample(found[0][0])[0][:random])
    drawn = [Moment(0.0, p, i) for p, i in zip(prompts.tolist(), positions.tolist(), strict=True)]
    places = [apart([*harvest.top(unit)[:top], *drawn]) for unit in units]
    every = sorted({moment.prompt for each in places for moment in each})
    values = {p: x.numpy() for p, x in activations(model, harvest, units, every).items()}
    special = special_ids(model.tokenizer)
    tokens, counted = {}, {}
    for p in every:
        ids = harvest.tokens(p)
        tokens[p] = _labels(model, ids)
        counted[p] = np.array([i not in special and at >= harvest.plan.skip for at, i in enumerate(ids)])
    made = []
    for u, (unit, (name, n)) in enumerate(zip(units, found, strict=True)):
        halves: tuple[dict[tuple[str, ...], Context], ...] = ({}, {})
        for _, p, position in places[u]:
            cut = slice(max(0, position - window[0]), position + window[1] + 1)
            context = Context(tokens[p][cut], np.where(counted[p][cut], values[p][cut, u], np.nan))
            half = int(np.random.default_rng((seed, p)).random() < 0.5)
            halves[half].setdefault(context.tokens, context)  # the same words may stand in two prompts
        held_out = [context for words, context in halves[1].items() if words not in halves[0]]
        made.append(UnitContexts(unit, float(levels[name][n]), tuple(halves[0].values()), tuple(held_out)))
    return made


def _labels(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    if model.tokenizer is None:
        return tuple(f"#{i}" for i in ids)
    return tuple(model.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids)


# ---- harvested texts, run again


def activations(model: Model, harvest: Harvest, units: Sequence[str], prompts: Iterable[int]) -> dict[int, Tensor]:
    """[position, unit] float32 of some units at every token of some harvested prompts, by prompt.

    InputError for another model's harvest, units that were not harvested, and functions of your own after loading, where
    they were not given to `Harvest.load`.
    """
    harvest.check(model)
    found = [harvest.find(unit) for unit in units]
    sites = {name: Site.parse(harvest.readers[name].site) for name, _ in found}
    made: dict[int, Tensor] = {}
    for numbers, given in _runs(model, harvest, sorted(set(prompts))):
        real = stream_of(given, next(iter(sites.values()))).mask.bool()
        seen: dict[str, Tensor] = {}
        watch(model.anatomy, given, together({name: _seer(harvest, name, real, seen) for name in sites}, sites))
        rows = torch.stack([seen[name][:, n] for name, n in found], 1)
        made |= dict(zip(numbers, rows.split(real.sum(1).tolist()), strict=True))
    return made


def _seer(harvest: Harvest, name: str, real: Tensor, seen: dict[str, Tensor]) -> Callable[[Tensor], None]:
    def see(values: Tensor) -> None:
        seen[name] = harvest.readers[name].activations(values[real.to(values.device)])

    return see


def _runs(model: Model, harvest: Harvest, prompts: Sequence[int]) -> Iterator[tuple[list[int], Inputs]]:
    """Prompts in batches of like length; one by one where the decoder of an encoder-decoder was read."""
    shelf = harvest.shelf
    alone = [prompt for prompt in prompts if shelf.row(prompt) != shelf.row(prompt, "given")]
    for prompt in alone:
        given = {"input_ids": shelf.row(prompt, "given"), "decoder_input_ids": shelf.row(prompt)}
        yield [prompt], model.inputs({key: torch.tensor([row]) for key, row in given.items()})
    rows = [Row(prompt, tuple(shelf.row(prompt)), prompt) for prompt in prompts if prompt not in alone]
    for group in by_length(rows, TOKENS):
        yield [row.number for row in group], inputs(model, group)


def apart(moments: Iterable[Moment]) -> list[Moment]:
    """Only the first moment of every prompt, so that a page does not show one text many times.

    >>> apart([Moment(3.0, 0, 1), Moment(2.0, 0, 2), Moment(1.0, 4, 0)])
    [Moment(value=3.0, prompt=0, position=1), Moment(value=1.0, prompt=4, position=0)]
    """
    found: dict[int, Moment] = {}
    for moment in moments:
        found.setdefault(moment.prompt, moment)
    return list(found.values())
