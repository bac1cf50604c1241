"""Where in a model can it be read whether a statement holds, and is that more than what knows nothing would read?

One estimator for all of these; with x the values of a statement at one site:

    mean            (mean(x+) - mean(x-)).x                     difference in means (Marks and Tegmark 2023, Li et al. 2023)
    mass_mean       the same through the inverse of the covariance within classes (pseudo-inverse, not shrunk): their mass-mean probe
    lda             the same, shrunk by Ledoit and Wolf
    logistic        L2 by cross-validation
    pca             first right singular vector of the differences x+ - x- of pairs (RepE, Zou et al. 2023)
    pca_centred     the same after their mean, the contrast itself, was subtracted
    ccs, supervised_ccs     `pellucid.safety.ccs`
    mlp, attention          `pellucid.safety.networks`; attention reads all tokens but the first

All is nested: the site is chosen for each test fold by folds among the others, and log odds are calibrated there (Platt), so that what
is said about held-out topics rests on nothing of them. Beside it stand, fitted and asked in the same folds:

    text, form      readers of the text alone (groups of characters) and of what it looks like (length, words, capitals, marks)
    random          directions drawn at the chosen site, each with its better sign
    shuffled        the same reader with the labels of each pair (else topic) drawn by chance; for ccs the members of other pairs
    untrained       the same reader on the model with all weights drawn anew
    planted         for ccs: a speaker drawn for each member and written before it. It is named where it is read instead of the labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.controls import redrawn
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.errors import InputError, among, at_least, listed
from pellucid.model import Model
from pellucid.results import Result
from pellucid.safety import beside, learning
from pellucid.safety.contrast import Seen
from pellucid.safety.judging import as_well, judged, platt
from pellucid.safety.networks import Learnt, empty
from pellucid.safety.statements import Statements, text_of
from pellucid.safety.vector import Pool
from pellucid.technique import technique

Kind = Literal[
    "mean", "mass_mean", "lda", "logistic", "pca", "pca_centred", "ccs", "supervised_ccs", "mlp", "attention"
]  # fmt: skip
CONTROLS = ("text", "form", "random", "shuffled", "untrained", "planted")
KEY = "pellucid_reader"


@dataclass(eq=False)
class ConceptReader:
    """A reader of whether what is said holds: kinds and controls as the module says.

    sites: candidates, by default every block's output of the first stack. pool: the statement's "last" token, or the "mean" of its
    tokens but the first. folds: of whole topics (pairs, where there are fewer than three). erase: nuisances of the statements that are
    taken out first (LEACE, fitted on each training part). draws: of shuffled labels. restarts, steps, learning_rate: of the search.
    After `fit`: `site`, `direction_` [d], `result_`, `layers_`, `trap_` (ccs); called with values [..., d] it gives log odds [...].

    >>> ConceptReader("mean", sites="layers.8:21.resid_post").fit(model, statements).site
    'layers...resid_post'
    """

    kind: Kind = "mean"
    sites: str | Sequence[str] | None = None
    pool: Pool = "last"
    folds: int = 4
    erase: Sequence[str] = ()
    controls: Sequence[str] = CONTROLS
    batch: int = 16
    draws: int = 5
    restarts: int = 10
    steps: int = 1000
    learning_rate: float = 1e-3
    seed: int = 0
    site_: str = field(init=False, repr=False)
    learnt_: dict[str, Learnt] = field(init=False, repr=False)
    digest_: str = field(init=False, repr=False)
    result_: Result = field(init=False, repr=False)
    layers_: Result = field(init=False, repr=False)
    scores_: Result = field(init=False, repr=False)
    trap_: Result | None = field(init=False, repr=False, default=None)
    refused_: str = field(init=False, repr=False, default="")

    # ---- what it is once fitted

    @property
    def site(self) -> str:
        if not hasattr(self, "site_"):
            raise InputError("this reader is not fitted: call fit(model, statements) or ConceptReader.load(path)")
        return self.site_

    @property
    def direction_(self) -> Tensor:
        """[d] along which log odds rise, by their slope. InputError for a network, which has none."""
        return self.learnt_[self.site].direction

    def __call__(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            return self.learnt_[self.site].each(values)

    def at(self, site: str | int) -> ConceptReader:
        """The same at another of its sites (a layer by its number), which was fitted and calibrated too, but not chosen."""
        made = replace(self)
        wanted = [s for s in self.learnt_ if s == str(site) or (isinstance(site, int) and Site.parse(s).layer == site)]
        if len(wanted) != 1:
            raise InputError(f"there is no reader at {site!r}: there are {', '.join(list(self.learnt_)[:12])}")
        made.site_, made.learnt_, made.digest_ = wanted[0], self.learnt_, self.digest_
        return made

    def scores(self, model: Model, prompts: Sequence[Any]) -> Tensor:
        """[prompt] log odds that each holds."""
        self.check(model)
        x, mask = self._read(model, list(prompts), [self.site])
        with torch.no_grad():
            return self.learnt_[self.site](x[0], mask)

    def check(self, model: Model) -> None:
        """InputError if it is not fitted, or was fitted on other weights."""
        check_weights(model, self.digest_ if self.site else None, f"the reader at {self.site}")

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the weights."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        names = list(self.learnt_)
        tensors = {f"{i}.{k}": v for i, s in enumerate(names) for k, v in self.learnt_[s].state_dict().items()}
        about = {"settings": settings, "site": self.site, "sites": names, "digest": self.digest_}
        return write_tensors(path, KEY, about, tensors)

    @classmethod
    def load(cls, path: str | Path) -> ConceptReader:
        """What `save` wrote, without its results; `check(model)` says whether it belongs to a model."""
        with reading_tensors(path, KEY, "is no saved ConceptReader") as (about, kept):
            made = cls(**about["settings"])
            made.site_, made.digest_ = about["site"], about["digest"]
            made.learnt_ = {
                s: empty(
                    made.kind, {k.partition(".")[2]: v for k, v in kept.items() if k.partition(".")[0] == str(i)}, 1
                )
                for i, s in enumerate(about["sites"])
            }
        return made

    # ---- fitting

    @technique
    def fit(
        self, model: Model, statements: Statements, *, test: Statements | Mapping[str, Statements] | None = None
    ) -> ConceptReader:
        """Fit on statements; `test` are further sets that are only asked about (negations, other data), by name.

        `result_` over `set` ("held out" and the tests) and `row` (the reader and its controls): `area` under the ROC curve within folds with
        its 95 % interval `low` to `high` (of controls that are drawn: the range of draws), `pair_accuracy`, and of log odds `accuracy` and
        `calibration_error`; over `nuisance` the pair accuracy with which nuisances are read. `layers_` over `site`: how well it does on
        `validation` folds, the share of pairs or the area, by which the site is chosen. `scores_` over `statement`: the `score` (log odds) of each by the reader
        that did not see its fold, at the `chosen` site, with its `label`, `topic` and `pair`. `trap_` over `run`: how ccs reads the labels and a planted speaker, and its loss.
        InputError for too few statements, one kind only, statements in both parts, kinds that need pairs without them.
        """
        self._check(statements)
        tests = {"test": test} if isinstance(test, Statements) else dict(test or {})
        for name, each in tests.items():
            statements.check_apart(each, name)
        sites = self._sites(model)
        fold = statements.folds(self.folds, self.seed)
        everything = [*statements.prompts, *(p for each in tests.values() for p in each.prompts)]
        x, mask = self._read(model, everything, sites)
        n, parts = len(statements), np.repeat(np.arange(len(tests) + 1), [len(statements), *map(len, tests.values())])
        own, learn = (x[:, :n], mask[:n]), partial(learning.learnt, self)
        nested = learning.nested(self, own, statements, fold)
        chosen, slopes, curve, folded = learning.chosen(nested, statements, fold)
        final, at = learn(own, statements, np.ones(n, dtype=bool)), int(curve.mean(0).argmax())
        for s, one in enumerate(final):
            one.calibrated(*platt(folded[s], statements.labels))
        self.site_, self.digest_ = sites[at], model.digest
        self.learnt_ = dict(zip(sites, final, strict=True))

        plan = [(fold != f, np.flatnonzero(fold == f), chosen[f]) for f in range(int(fold.max()) + 1)]
        plan += [(np.ones(n, dtype=bool), np.flatnonzero(parts == i + 1), at) for i in range(len(tests))]
        rows, self.refused_ = beside.rows(
            self, learn, (x, mask), lambda: self._read(redrawn(model, seed=self.seed), everything, sites)[0],
            statements, [text_of(p) for p in everything],
        )  # fmt: skip
        scores = {name: beside.by_plan(ask, plan, len(parts)) for name, ask in rows.items()}
        own_scores = np.full((1, len(parts)), np.nan)
        for f in range(int(fold.max()) + 1):
            own_scores[0, np.flatnonzero(fold == f)] = nested[f, f][chosen[f], fold == f] * slopes[f][0] + slopes[f][1]
        for i in range(len(tests)):
            own_scores[0, parts == i + 1] = beside.said(final[at], x[at, parts == i + 1], mask[parts == i + 1])
        sets = {"held out": statements, **tests}
        table: dict[str, dict[str, dict[str, float]]] = {}
        for i, (name, each) in enumerate(sets.items()):
            strata = fold if i == 0 else np.zeros(len(each), dtype=int)
            for row, found in {self.kind: own_scores, **scores}.items():
                table.setdefault(name, {})[row] = judged(
                    found[:, parts == i], each.labels, strata, each.couples, each.groups, seed=self.seed,
                    log_odds=row in (self.kind, "text", "form"), either_sign=row == "random",
                )  # fmt: skip
        self.scores_ = Result(
            xr.Dataset(
                {"score": ("statement", own_scores[0, :n]), "label": ("statement", statements.labels)},
                {"topic": ("statement", statements.topics), "pair": ("statement", statements.pairs),
                 "chosen": ("statement", np.array([sites[chosen[f]] for f in fold]))},
            ), kind="reader scores", title=f"Log odds by {self.kind} of {n} statements, each by a reader that did not see its {statements.by}",
        )  # fmt: skip
        instead = {
            name: beside.told_apart(own_scores[0, :n], beside.split(statements, v), fold)
            for name, v in statements.nuisances.items()
        }
        self.layers_ = Result(
            xr.Dataset({"validation": ("site", curve.mean(0)), "low": ("site", curve.min(0)), "high": ("site", curve.max(0))},
                       {"site": sites, "layer": ("site", [s.layer if s.layer is not None else -1 for s in map(Site.parse, sites)])}),
            kind="reader layers", title=f"Where {self.kind} reads it, on validation folds (low, high: among test folds)",
        )  # fmt: skip
        if (
            self.kind.endswith("ccs")
            and "planted" in self.controls
            and all(isinstance(p, str) for p in statements.prompts)
        ):
            planted = statements.planted(self.seed)
            spoken = self._read(model, planted.prompts, sites)[0]
            search = partial(learning.searched, self, seed=self.seed)
            self.trap_ = beside.trap(search, own, spoken, statements, planted, sites, self.site_)
        self.result_ = Result(
            beside.dataset(table, instead), kind="reader", title=self._title(table["held out"], statements, instead)
        )
        return self

    def _check(self, statements: Any) -> None:
        if not isinstance(statements, Statements):
            raise InputError(
                f"statements={statements!r:.60}: expected Statements(prompts, labels) or Statements.paired(...)"
            )
        if not among(self.kind, Kind) or not among(self.pool, Pool):
            raise InputError(f"kind={self.kind!r}, pool={self.pool!r}: expected {get_args(Kind)} and {get_args(Pool)}")
        at_least(1, draws=self.draws, batch=self.batch, restarts=self.restarts, steps=self.steps)
        at_least(3, folds=self.folds)
        unknown = (
            [c for c in self.controls if c not in CONTROLS],
            [e for e in self.erase if e not in statements.nuisances],
        )
        if any(unknown):
            raise InputError(f"controls or nuisances {unknown[0] + unknown[1]} are not known: there are {CONTROLS} and {list(statements.nuisances)}")  # fmt: skip
        if self.erase and self.kind == "attention":
            raise InputError(
                "nothing can be erased for 'attention', which reads many tokens: take a kind that reads one"
            )
        if (self.kind.startswith("pca") or self.kind.endswith("ccs")) and 2 * statements.couples.shape[1] < len(
            statements
        ):
            raise InputError(f"{self.kind!r} needs pairs of a true and a false statement: give Statements.paired(...)")

    def _sites(self, model: Model) -> list[str]:
        given = self.sites if self.sites is not None else f"{model.anatomy.stacks[0].prefix}layers.*.resid_post"
        patterns = [given] if isinstance(given, str) else listed("sites", given, "names of sites")
        return [str(site) for pattern in patterns for site in model.sites(pattern)]

    def _read(self, model: Model, prompts: Sequence[Any], sites: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[site, prompt, vector, d] and which are real [prompt, vector]."""
        if self.kind == "attention":
            return learning.vectors(model, prompts, sites, batch=self.batch)
        found = Seen.of(model, prompts, [Site.parse(s) for s in sites], self.pool, self.batch).values
        return found[:, :, None], torch.ones(len(prompts), 1, dtype=torch.bool)

    def _title(self, rows: Mapping[str, Mapping[str, float]], data: Statements, instead: Mapping[str, float]) -> str:
        own = rows[self.kind]
        others = {k: v["high"] if k in ("random", "shuffled") else v["area"] for k, v in rows.items() if k != self.kind}
        said = (
            as_well(own["area"], others)
            + f"{self.kind} at {self.site_}: area {own['area']:.2f} [{own['low']:.2f}, {own['high']:.2f}]"
        )
        said, pair = f"{said} on {data.by}s held out", own["pair_accuracy"]
        said += "".join(f"; it reads {k!r} ({v:.2f} of pairs)" for k, v in instead.items() if not v < pair)
        said += f"; {self.trap_.title[0].lower()}{self.trap_.title[1:]}" if self.trap_ is not None else ""
        return said
