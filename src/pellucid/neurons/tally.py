"""What is kept of every unit while a corpus streams by: its largest activations, its moments, and a uniform sample.

Three things in memory that does not grow with the corpus:

* the k largest activations of each unit and where they were. A block of tokens is compared with each unit's k-th best so far;
  only what is larger is merged, which soon is next to nothing (k tokens in all that were seen), so no block is sorted;
* the number of tokens, and for each unit the mean of its activations, the sum of their squared deviations from it, and how
  many were positive. Slices are joined as in Chan, Golub and LeVeque 1979: sums of squares less the squared mean would lose
  the spread of a unit whose mean is large. They are joined to those of a segment, and segments to the whole, so that a segment
  that was counted elsewhere makes the same numbers;
* one uniform sample of tokens, with the activations of *all* units there: each token draws a number by its place in the
  corpus and the seed, and those with the smallest numbers are kept. Quantiles, histograms, samples from quantile bins and
  correlations between any two units are read from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

SLICE = 128  # tokens looked at together: a block this size stays in the processor's cache


@dataclass(eq=False)
class Sampler:
    """Which tokens are in the uniform sample: a number `keys` drawn for each, and their `places` (-1: none yet)."""

    keys: Tensor  # [sample] float64
    places: Tensor  # [sample] int64
    seed: int

    @classmethod
    def empty(cls, size: int, seed: int) -> Sampler:
        return cls(torch.full((size,), torch.inf, dtype=torch.float64), torch.full((size,), -1), seed)

    def draws(self, prompt: int, length: int) -> Tensor:
        """[length] the numbers of a prompt's tokens, whatever batch it is in."""
        return torch.from_numpy(np.random.default_rng((self.seed, prompt)).random(length))

    def offer(self, keys: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Take tokens in; returns which of them are now in the sample, and the slots they were given."""
        size = len(self.keys)
        kept = torch.cat([self.keys, keys]).argsort(stable=True)[:size]
        new = kept[kept >= size] - size
        stays = torch.zeros(size, dtype=torch.bool)
        stays[kept[kept < size]] = True
        slots = (~stays).nonzero()[:, 0]
        self.keys[slots], self.places[slots] = keys[new], places[new]
        return new, slots

    def sort(self) -> Tensor:
        """Smallest numbers first; returns where each was."""
        self.keys, order = self.keys.sort(stable=True)
        self.places = self.places[order]
        return order


@dataclass(eq=False)
class Moments:
    """How many tokens, and of each unit the mean, the sum of squared deviations from it, and how many were positive; float64."""

    count: Tensor
    mean: Tensor
    deviations: Tensor
    positive: Tensor

    def join(self, count: float | Tensor, mean: Tensor, deviations: Tensor, positive: Tensor) -> None:
        """Take those of further tokens in."""
        more = mean - self.mean
        self.deviations += deviations + more * more * (self.count * count / (self.count + count))
        self.count += count
        self.mean += more * (count / self.count)
        self.positive += positive


@dataclass(eq=False)
class Tally:
    """What is kept of the units read at one site. Moments of a segment count when it is closed."""

    top: Tensor  # [unit, k] float32, largest first; -inf where fewer tokens were seen
    places: Tensor  # [unit, k] int64; -1 likewise
    count: Tensor  # [] float64: tokens
    mean: Tensor  # [unit] float64
    deviations: Tensor  # [unit] float64: the sum over tokens of (activation - mean)^2
    positive: Tensor  # [unit] float64: tokens
    sample: Tensor  # [sample, unit] float32
    open: Moments | None = field(default=None, init=False, repr=False)  # those of a segment

    @classmethod
    def empty(cls, units: int, k: int, sample: int) -> Tally:
        mean, deviations, positive = torch.zeros(3, units, dtype=torch.float64).unbind()
        top, places = torch.full((units, k), -torch.inf), torch.full((units, k), -1)
        count = torch.zeros((), dtype=torch.float64)
        return cls(top, places, count, mean, deviations, positive, torch.full((sample, units), torch.nan))

    def add(self, block: Tensor, places: Tensor, taken: tuple[Tensor, Tensor]) -> None:
        """A block [token, unit] of float32 with the tokens' places; `taken` are the rows and slots of the sample."""
        rows, slots = taken
        self.sample[slots] = block[rows]
        ones = torch.ones(SLICE)
        if self.open is None:
            self.open = Moments(
                torch.zeros_like(self.count), *torch.zeros(3, len(self.mean), dtype=torch.float64).unbind()
            )
        for x, at in zip(block.split(SLICE), places.split(SLICE), strict=True):
            self._join(self.open, x, ones[: len(x)])
            self._merge(x, at)

    def close(self) -> None:
        """The segment that was counted is over."""
        if self.open is not None:
            Moments.join(self, *vars(self.open).values())  # type: ignore[arg-type]
            self.open = None

    def take(self, part: Mapping[str, Tensor], taken: tuple[Tensor, Tensor]) -> None:
        """A closed segment's `state`, counted elsewhere."""
        self.sample[taken[1]] = part["sample"][taken[0]]
        self._best(torch.arange(len(self.top)), part["top"], part["places"])
        Moments.join(self, *(part[name] for name in ("count", "mean", "deviations", "positive")))  # type: ignore[arg-type]

    @property
    def state(self) -> dict[str, Tensor]:
        """What is kept, by name; `Tally(**state)`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def _join(self, moments: Moments, x: Tensor, one: Tensor) -> None:
        """The moments of a slice [token, unit], joined. `one` [token] holds ones: a product adds faster."""
        n, positive = len(x), one @ (x > 0).float()
        middle = (one @ x) / n
        x = x - middle
        rest = (one @ x).double()  # not 0 where float32 could not say the mean
        moments.join(n, middle + rest / n, one @ x.square_() - rest * rest / n, positive)

    def _merge(self, x: Tensor, places: Tensor) -> None:
        """Of equal activations those met first are kept."""
        threshold = self.top[:, -1]
        units = (x.amax(0) > threshold).nonzero()[:, 0]
        if not len(units):
            return
        unit, row = (x[:, units] > threshold[units]).T.nonzero().unbind(1)  # unit by unit, in the order of the text
        counts = torch.bincount(unit, minlength=len(units))
        column = torch.arange(len(unit)) - (counts.cumsum(0) - counts)[unit]
        values = torch.full((len(units), int(counts.max())), -torch.inf)
        where = torch.full(values.shape, -1)
        values[unit, column], where[unit, column] = x[row, units[unit]], places[row]
        self._best(units, values, where)

    def _best(self, units: Tensor, values: Tensor, where: Tensor) -> None:
        """The largest of those that some units have and of `values` [unit, n], met later at `where`."""
        values, where = torch.cat([self.top[units], values], 1), torch.cat([self.places[units], where], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        k = self.top.shape[1]
        self.top[units], self.places[units] = values[:, :k], where.gather(1, order[:, :k])

    @property
    def std(self) -> Tensor:
        """[unit] the standard deviation of all tokens (divided by their number)."""
        return (self.deviations / self.count).clamp_min(0).sqrt()
