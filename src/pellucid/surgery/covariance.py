"""Which directions do ordinary texts use as keys? The second moment that says where an edit does least harm.

    C = E[k k^T]        over real tokens of ordinary texts, a mean and not centred, in float64

An edit moves W by (something) u^T with u = C^-1 k: among all changes that give key k its new value it moves the outputs of ordinary
keys least (Meng et al. 2022). Taken from too few tokens C is worse than none: with 2,048 tokens for keys of 1,536 numbers
u has a cosine of .43 with that of 16,384. So it is told how much text there was and how far two halves of it agree, fewer
tokens than twice the width warn, and a C that has no inverse, or one that float32 sums cannot tell (condition beyond 1e6, each neuron
in its own unit), is refused unless a `ridge` is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.corpus import CONTEXT, Corpus, Place, by_length, longest, segments
from pellucid.corpus import inputs as as_inputs
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.pausing import progress
from pellucid.engine.watching import watch
from pellucid.errors import InputError, Refused, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.surgery.keys import Memory
from pellucid.surgery.solvers import Metric, null_space
from pellucid.technique import technique

BATCH = 1024  # tokens run at a time
CONDITION = 1e6  # beyond it the smallest directions are what float32, in which keys are added up, has rounded


@dataclass(eq=False)
class KeyCovariance:
    """The second moments of the keys of some layers (of all experts of a mixture, or of `experts`).

    `ridge` adds that share of the mean diagonal to it. After `fit`: `moments_` [2, n, n] by memory ("6", in a mixture "6.2"
    for expert 2), sums over two halves of the texts; `counts_` [2] tokens in them; `digest_` of the weights; `place_`, how far the
    texts were read, with their digest.

    >>> C = KeyCovariance(layers=(1, 2)).fit(model, texts, tokens=50_000)
    >>> C.save("keys.safetensors")
    PosixPath('keys.safetensors')
    """

    layers: int | Sequence[int] = ()
    experts: Sequence[int] | None = None
    ridge: float = 0.0
    moments_: dict[str, Tensor] = field(init=False, repr=False)
    counts_: dict[str, Tensor] = field(init=False, repr=False)
    digest_: str = field(init=False, repr=False)
    place_: Place = field(init=False, repr=False)
    _roots_: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    _free_: dict[tuple[str, float], Metric] = field(init=False, repr=False, default_factory=dict)

    @technique
    def fit(
        self, model: Model, texts: Any, *, tokens: int = 50_000, checkpoint: str | Path | None = None
    ) -> KeyCovariance:
        """Read at most `tokens` tokens of texts, as `pl.Corpus` reads them; runs end at the last of the layers.

        With a `checkpoint` (a .safetensors file) an interrupted fit goes on where it stopped, one that is complete is read and
        not made again, and one of other weights, layers or texts is refused. InputError without text.
        """
        at_least(0, ridge=self.ridge)
        at_least(1, tokens=tokens)
        layers = [self.layers] if isinstance(self.layers, int) else list(self.layers)
        found = {m.name: m for m in (each for layer in layers for each in self._memories(model, layer))}
        if not found:
            raise InputError("layers=(): expected the numbers of the layers whose keys are wanted")
        self.digest_, self._roots_, self._free_, place = model.digest, {}, {}, None
        self.moments_ = {name: torch.zeros(2, m.width, m.width, dtype=torch.float64) for name, m in found.items()}
        self.counts_ = {name: torch.zeros(2, dtype=torch.float64) for name in found}
        self.place_ = Place()
        if checkpoint is not None and Path(checkpoint).exists():
            kept = type(self).load(checkpoint)
            kept.check(model)
            if kept.moments_.keys() != found.keys():
                raise InputError(
                    f"{str(checkpoint)!r} holds the moments of {', '.join(kept.moments_)}: name another file"
                )
            self.moments_, self.counts_, self.place_ = kept.moments_, kept.counts_, kept.place_
            place = self.place_
        context = min(CONTEXT, longest(model))
        corpus = Corpus.of(texts, packed=False, long="windows", tokens=tokens, context=context)
        with progress[None](what="key covariance", total=corpus.tokens or tokens) as bar:
            bar.step(self.place_.tokens)
            for segment in segments(corpus.rows(model, after=place), 8 * BATCH):
                for number, group in enumerate(by_length(segment, BATCH)):
                    self._read(model, as_inputs(model, group), found, number % 2)
                    bar.step(sum(len(row.ids) for row in group))
                self.place_ = segment[-1].place
                if checkpoint is not None:
                    self.save(checkpoint)
        if not float(sum(c.sum() for c in self.counts_.values())):
            raise InputError("there is no text to take second moments from: give more of it")
        widest = max(m.width for m in found.values())
        least = min(int(c.sum()) for c in self.counts_.values())
        if least < 2 * widest:
            warnings.warn(
                f"{least:,} tokens for keys of {widest:,} numbers are too few for their second moment: give {2 * widest:,} or "
                "more (adequacy() says how far two halves agree)", stacklevel=3,
            )  # fmt: skip
        return self

    def _memories(self, model: Model, layer: int) -> list[Memory]:
        one = Memory.of(model, layer)
        experts = one.block.mlps["mlp"].experts
        if experts is None:
            return [one]
        return [replace(one, expert=e) for e in (self.experts or range(experts.count))]

    def _read(self, model: Model, given: Any, found: dict[str, Memory], half: int) -> None:
        stream = given.streams.get("encoder", given.stream(""))
        real = stream.mask.bool()
        router: dict[int, Tensor] = {}
        seen: dict[Site, Callable[[Tensor], None]] = {}

        def site(memory: Memory, part: str) -> Site:
            return Site.parse(memory.site(part).partition("@")[0])

        def reader(memory: Memory) -> Callable[[Tensor], None]:
            def read(x: Tensor) -> None:
                k = x[real.to(x.device)].float()
                if memory.expert is not None:
                    weight = router[memory.layer][real.to(x.device)][:, memory.expert].float()
                    k = (k * weight[:, None])[weight != 0]
                self.moments_[memory.name][half] += (k.T @ k).double().cpu()
                self.counts_[memory.name][half] += len(k)

            return read

        for memory in found.values():
            if memory.expert is not None:
                seen[site(memory, "mlp.router")] = partial(router.__setitem__, memory.layer)
            part = "mlp.neurons" if memory.expert is None else f"mlp.experts.{memory.expert}.neurons"
            seen[site(memory, part)] = reader(memory)
        watch(model.anatomy, given, seen)

    # ---- use

    def check(self, model: Model) -> None:
        """InputError if it is not fitted, or was fitted on other weights."""
        if not hasattr(self, "digest_"):
            raise InputError("this covariance is not fitted: call fit(model, texts) or KeyCovariance.load(path)")
        check_weights(model, self.digest_, "this moment matrix")

    def matrix(self, memory: str) -> Tensor:
        """C [n, n] of a memory ("6", or "6.2" for expert 2), without ridge."""
        if memory not in self.moments_:
            raise InputError(f"this covariance has no layer {memory}: it was fitted on {', '.join(self.moments_)}")
        return self.moments_[memory].sum(0) / self.counts_[memory].sum().clamp_min(1)

    def solve(self, memory: str, k: Tensor) -> Tensor:
        """C^-1 k for keys [m, n]; one factorisation for each memory. Refused where C has no inverse and there is no ridge."""
        if memory not in self._roots_:
            self._roots_[memory] = self._root(self.matrix(memory), memory)
        return torch.cholesky_solve(k.double().T, self._roots_[memory]).T

    def _root(self, c: Tensor, what: str) -> Tensor:
        c = c + self.ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        size = c.diagonal().clamp_min(1e-300).sqrt()  # one neuron of a sink, however large, makes no other uncertain
        c = c / size / size[:, None]
        root, failed = torch.linalg.cholesky_ex(c)
        condition = float("inf") if int(failed) else _largest(c) * _largest(root, torch.cholesky_solve)
        if not condition < CONDITION:
            raise Refused(
                f"the second moment of layer {what} ({int(self.counts_[what].sum()):,} tokens for {len(c):,} directions, condition "
                f"{condition:.0e}) has no inverse to rely on: fit it on more text, or give a ridge, such as KeyCovariance(ridge=.1)"
            )
        return root * size[:, None]

    def free(self, memory: str, share: float) -> Metric:
        """The projector on the `share` of directions that ordinary keys use least (AlphaEdit's null space), worked out once."""
        if (memory, share) not in self._free_:
            self._free_[memory, share] = null_space(self.matrix(memory), share)
        return self._free_[memory, share]

    def agreement(self, memory: str, k: Tensor) -> float:
        """The mean cosine of u = C^-1 k between the two halves of the text, over keys [m, n]; NaN where a half has no inverse."""
        made = []
        for moment, count in zip(self.moments_[memory], self.counts_[memory], strict=True):
            try:
                root = self._root(moment / count.clamp_min(1), memory)
            except Refused:
                return float("nan")
            made.append(torch.cholesky_solve(k.double().T, root).T)
        return float(torch.cosine_similarity(made[0], made[1], dim=1).mean())

    @technique
    def adequacy(self, keys: dict[str, Tensor] | None = None, *, draws: int = 8, seed: int = 0) -> Result:
        """Was it enough text? Over `memory`: `tokens`, `per_direction` = tokens / width, `condition`, and `halves`, the cosine of
        C^-1 k between two halves of the text, for `keys` [m, n] by memory or `draws` keys drawn as ordinary ones are; `whole` is what
        that says of all of it, 2 h / (1 + h) (Spearman-Brown).
        """
        generator = torch.Generator().manual_seed(seed)
        columns: dict[str, list[float]] = {
            name: [] for name in ("tokens", "per_direction", "condition", "halves", "whole")
        }
        for name in self.moments_:
            c = self.matrix(name)
            values, vectors = torch.linalg.eigh(c)
            noise = torch.randn(draws, len(c), generator=generator, dtype=torch.float64)
            k = (keys or {}).get(name, noise * values.clamp_min(0).sqrt() @ vectors.T)
            count, half = float(self.counts_[name].sum()), self.agreement(name, k)
            row = count, count / len(c), float(values[-1] / values[0].clamp_min(1e-300)), half, 2 * half / (1 + half)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        data = xr.Dataset({k: ("memory", np.array(v)) for k, v in columns.items()}, {"memory": list(self.moments_)})
        poor = [n for n, w in zip(self.moments_, columns["whole"], strict=True) if not w >= 0.85]
        said = f"too little text for {', '.join(poor)}" if poor else "enough text"
        return Result(data, kind="key covariance", title=f"Second moments of keys: {said}")

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the digests of the weights and of the texts."""
        about = {
            "settings": {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "layers"}
            | {"layers": [self.layers] if isinstance(self.layers, int) else list(self.layers)},
            "digest": self.digest_, "place": vars(self.place_),
        }  # fmt: skip
        tensors = {f"C/{k}": v for k, v in self.moments_.items()} | {f"n/{k}": v for k, v in self.counts_.items()}
        return write_tensors(path, "pellucid_keys", about, tensors)

    @classmethod
    @technique
    def load(cls, path: str | Path) -> KeyCovariance:
        """What `save` wrote; `check(model)` says whether it belongs to a model. InputError if the file is none."""
        said = "is no KeyCovariance: expected a file that its save wrote"
        with reading_tensors(path, "pellucid_keys", said) as (about, kept):
            made = cls(**about["settings"])
            made.moments_, made.counts_ = ({k[2:]: v for k, v in kept.items() if k[0] == g} for g in "Cn")
            made.digest_, made.place_ = about["digest"], Place(**about["place"])
        return made


def _largest(matrix: Tensor, apply: Callable[[Tensor, Tensor], Tensor] = lambda x, m: m @ x) -> float:
    """The largest eigenvalue of what a matrix does to a vector, by power iteration."""
    x = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    for _ in range(12):
        x = apply(x / x.norm(), matrix)
    return float(x.norm())
