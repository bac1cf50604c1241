"""What does the model answer when tokens are absent, and what does absent mean?

    v(S) = target of the prompt with the players in S present and all others absent

Faithfulness is measured by taking tokens away, and its verdict depends on how that is done. The ways here answer the
same question, `absence(...)(present [n, player]) -> [n, output]`:

    "mask", "pad", "mean", "zero", any token    put in the place of every absent token (`pellucid.attribution.game`)
    "resample"   other tokens that could stand there: draws of a model that fills gaps, or of reference prompts
    "remove"     the absent tokens are cut out: those behind them move up, and the prompt is shorter

Masked and padded prompts keep every position but look like nothing the model was trained on; removal keeps to real
words but moves positions and breaks the grammar; resampling stays nearest to real text and says what the answer is on
average (input marginalisation, Kim et al. 2020), at the price of several runs for each coalition.

What fills the gaps of "resample" is, by `reference`: a list of prompts (the tokens at the same places of one drawn at
random: they ignore what is present); a masked language model with the same vocabulary (gaps are filled in PASSES random
groups, each given the text and the groups before it); or a causal model, by default the one that is asked if it can
fill, (gaps are filled from left to right and see only what stands before them).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Wiretap
from pellucid.attribution.baseline import WITHOUT, Baseline
from pellucid.attribution.case import Case
from pellucid.attribution.filling import Filler, beginning
from pellucid.attribution.game import Coalitions, Game
from pellucid.attribution.path import ROWS_OF_TOKENS, Embedded
from pellucid.attribution.players import Players
from pellucid.engine.marks import special_ids
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.tasks.tokens import encode


def absence(
    case: Case,
    players: Any = "token",
    how: Any = None,
    *,
    reference: Model | Sequence[str] | None = None,
    draws: int = 4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Absence:
    """v(S) of a case under one way of taking tokens away; by default that of the baselines ("mask" where the tokenizer
    has one, else "pad", else "mean").

    `reference`, `draws` and `seed` are those of "resample" (see above). InputError or Refused where the way is not
    defined for this model or target.
    """
    players = players if isinstance(players, Players) else Players.of(case, players)
    if isinstance(how, str) and how in WITHOUT and checkpoint is not None:
        raise InputError(f"checkpoint= keeps runs of prompts with something in a token's place, not of {how!r}")
    if isinstance(how, str) and how == "remove":
        return Removed(case, players, "remove")
    if not isinstance(how, str) or how != "resample":
        embedded = Embedded(case)
        baseline = Baseline.of(embedded, how)
        return Replaced(
            case, players, baseline.name, games=[Game(case, players, baseline.name, baseline, embedded, checkpoint)]
        )
    if draws < 1:
        raise InputError(f"{draws} draws: expected at least 1")
    if isinstance(reference, Sequence):
        return Replaced(
            case, players, "resample from reference prompts", games=_drawn(case, players, reference, draws, seed)
        )
    filler = Filler(case, case.model if reference is None else reference)
    return Filled(case, players, f"resample from {filler.model.name}", filler=filler, draws=draws, seed=seed)


@dataclass(eq=False)
class Absence(Coalitions):
    """`absent(present [n, player])` gives v(S) [n, output], every distinct coalition run once; `evaluations` counts the
    rows the model ran, `name` says how tokens were taken away."""

    def vectors(self, present: Tensor) -> Tensor:
        """[n, d] what enters the middle block, its mean over the positions: where these prompts lie in the model."""
        return self._vectors(present.bool().cpu(), middle(self.case))

    def missing(self, present: Tensor) -> Tensor:
        """[n, position] the tokens absent in coalitions [n, player]."""
        gone = torch.zeros(len(present), len(self.case.tokens), dtype=torch.bool)
        for player, group in enumerate(self.players.members):
            gone[:, list(group)] = ~present[:, player, None]
        return gone

    def _vectors(self, present: Tensor, tap: Tap) -> Tensor:
        raise NotImplementedError


def middle(case: Case) -> Tap:
    """Where the stack that reads the prompt hands its residual to its middle block. Refused where it has none."""
    name = next(iter(case.streams))
    stack = next((s for s in case.model.anatomy.stacks if s.name == name), case.model.anatomy.stacks[0])
    tap = stack.blocks[len(stack.blocks) // 2].taps.get("resid_pre") if stack.blocks else None
    if tap is None:
        raise Refused(f"{case.model.name} has no residual stream to compare prompts in")
    return tap


# ---- something else in the place of the absent tokens


@dataclass(eq=False)
class Replaced(Absence):
    """The mean over games, each with a baseline of its own."""

    games: list[Game] = field(default_factory=list)

    def _run(self, present: Tensor) -> Tensor:
        before = sum(game.evaluations for game in self.games)
        made = torch.stack([game(present) for game in self.games]).mean(0)
        self.evaluations += sum(game.evaluations for game in self.games) - before
        return made

    def _vectors(self, present: Tensor, tap: Tap) -> Tensor:
        game = self.games[0]
        gone = self.missing(present).to(game.baseline.values.device)[..., None]
        return _entering(game.embedded, tap, torch.where(gone, game.baseline.values, game.embedded.values))


def _entering(embedded: Embedded, tap: Tap, embeddings: Tensor) -> Tensor:
    parts = embeddings.split(embedded.batches(len(embeddings)))
    return torch.cat([embedded.met([tap], part)[tap].float().mean(1).cpu() for part in parts])


def _drawn(case: Case, players: Players, prompts: Sequence[str], draws: int, seed: int) -> list[Game]:
    """Games whose absent tokens come from other prompts: from a random place of each, going on until all are filled."""
    if not prompts:
        raise InputError("no reference prompts were given to draw tokens from")
    known = special_ids(case.model.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    rows = [[i for i in _ids(case.model, prompt) if i not in known] for prompt in prompts]
    rows = [row for row in rows if row]
    if not rows:
        raise InputError("the reference prompts have no tokens but special ones")
    embedded, games = Embedded(case), []
    for _ in range(draws):
        row = rows[int(torch.randint(len(rows), (1,), generator=generator))]
        first = int(torch.randint(len(row), (1,), generator=generator))
        ids = torch.tensor([row[(first + i) % len(row)] for i in range(len(case.ids))])
        start = Baseline.of(embedded, ids)
        games.append(Game(case, players, start.name, start, embedded))
    return games


def _ids(model: Model, prompt: Any) -> list[int]:
    return (
        encode(model.tokenizer, prompt)[0] if isinstance(prompt, str) and model.tokenizer is not None else list(prompt)
    )


@dataclass(eq=False)
class Filled(Absence):
    """The mean over draws of a model that fills the gaps."""

    filler: Filler = field(kw_only=True)
    draws: int = 4
    seed: int = 0

    def _filled(self, present: Tensor, draws: int) -> Tensor:
        """[n * draws, position] token ids."""
        gone = self.missing(present).repeat_interleave(draws, 0)
        own = [zlib.crc32(row.numpy().tobytes()) for row in present]  # filled alike whenever a coalition comes
        seeds = [key + self.seed + draw for key in own for draw in range(draws)]
        return self.filler.fill(self.case.ids.cpu().expand(len(gone), -1), gone, seeds)

    def _run(self, present: Tensor) -> Tensor:
        before = self.filler.evaluations
        ids, made = self._filled(present, self.draws), []
        for part in ids.split(self.filler.embedded.batches(len(ids))):
            with torch.no_grad():
                made.append(self.filler.embedded.scores(self._embed(part)).double().cpu())
        self.evaluations += len(ids) + self.filler.evaluations - before
        return torch.cat(made).unflatten(0, (len(present), self.draws)).mean(1)

    def _embed(self, ids: Tensor) -> Tensor:
        return torch.cat([self.filler.embedded.embed(row.to(self.case.ids)) for row in ids])

    def _vectors(self, present: Tensor, tap: Tap) -> Tensor:
        return _entering(self.filler.embedded, tap, self._embed(self._filled(present, 1)))


# ---- the absent tokens cut out


@dataclass(eq=False)
class Removed(Absence):
    """Shorter prompts, run in batches of equal length. A prompt with nothing left is the token that begins a text."""

    def __post_init__(self) -> None:
        if not self.case.question.single or self.case.question.metric is None or len(self.case.streams) > 1:
            raise Refused(
                "tokens cannot be cut out under a continuation or the reading of a site, whose positions would move: "
                "choose 'mask', 'pad', 'mean' or 'resample'"
            )
        if self.case.edits:
            raise Refused(
                "under edits tokens cannot be cut out, as what the edits hold for would move: choose 'mask', 'pad', 'mean' or "
                "'resample'"
            )
        if self.case.inputs.stream("").padded:
            raise Refused("tokens cannot be cut out of a padded prompt: give it without padding")

    def _run(self, present: Tensor) -> Tensor:
        made = torch.zeros(len(present), 1, dtype=torch.float64)
        bound = self.case.question.metric
        assert bound is not None
        for rows, kept, positions in self._batches(present):
            with torch.no_grad():
                logits = main_output(self._forward(kept))
            made[rows, 0] = replace(bound, positions=positions).score(logits).double().cpu()
            self.evaluations += len(rows)
        return made

    def _vectors(self, present: Tensor, tap: Tap) -> Tensor:
        made: dict[int, Tensor] = {}
        for rows, kept, _ in self._batches(present):
            met: list[Tensor] = []
            with torch.no_grad(), Wiretap(self.case.model.module, {tap: met.append}, len(rows)):
                self._forward(kept)
            made |= dict(zip(rows, met[0].float().mean(1).cpu(), strict=True))
        return torch.stack([made[i] for i in range(len(present))])

    def _batches(self, present: Tensor) -> Iterator[tuple[list[int], list[list[int]], tuple[int, ...] | None]]:
        """Coalitions of one length whose answer is read at the same places: their rows, the columns kept, the places."""
        groups: dict[tuple[Any, ...], list[tuple[int, list[int]]]] = {}
        for row, gone in enumerate(self.missing(present)):
            kept = (~gone).nonzero().flatten().tolist()
            groups.setdefault((len(kept), self._moved(kept)), []).append((row, kept))
        for (length, positions), members in groups.items():
            size = max(1, ROWS_OF_TOKENS // max(1, length))
            for start in range(0, len(members), size):
                part = members[start : start + size]
                yield [row for row, _ in part], [kept for _, kept in part], positions

    def _moved(self, kept: list[int]) -> tuple[int, ...] | None:
        """Where the answer stands now; places counted from the end, and those of a decoder, do not move. Where the token
        read is gone itself, the one behind it is read, or the last."""
        positions = getattr(self.case.question.metric, "positions", None)
        if positions is None or "encoder" in self.case.streams:
            return positions
        return tuple(
            max(p, -max(1, len(kept))) if p < 0 else max(0, min(sum(i < p for i in kept), len(kept) - 1))
            for p in positions
        )

    def _forward(self, kept: list[list[int]]) -> Any:
        length, columns = len(self.case.tokens), torch.tensor(kept, device=self.case.ids.device)
        tensors: dict[str, Any] = {}
        for name, value in self.case.inputs.tensors.items():
            if not isinstance(value, Tensor) or not value.ndim or len(value) != 1:
                tensors[name] = value
            elif value.shape[1:2] == (length,) and not name.startswith("decoder_"):
                tensors[name] = (
                    value[0, columns] if columns.shape[1] else self._nothing(name, value).expand(len(kept), -1)
                )
            else:
                tensors[name] = value.repeat_interleave(len(kept), 0)
        return self.case.model.module(**tensors)

    def _nothing(self, name: str, value: Tensor) -> Tensor:
        if name != "input_ids":
            return value[:, :1]
        return value.new_tensor([[beginning(self.case.model)]])
