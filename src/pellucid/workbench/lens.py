"""How can the lens grid keep up with typing? By reading only the columns that are new.

Under a causal mask the residuals of a token do not depend on what follows it, so the columns of a prompt that was
longer or shorter a moment ago still hold as far as the tokens are the same, and so do they under edits that read
nothing of the prompt (zero, scale). The columns that are left are read from the end backwards, where the reader is
looking, until `seconds` have passed; the rest comes when the page asks again. The numbers are those of
`pellucid.lenses.logit_lens`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.errors import PellucidError, Refused
from pellucid.lenses import unembed
from pellucid.lenses.logit_lens import lens_sites
from pellucid.model import Model
from pellucid.views import schema as s
from pellucid.views.schema import Code, Document, Numbers, Origin
from pellucid.workbench.answers import Passed

TOP = 5
SECONDS = 0.06
WIDEST = 64  # columns of the live grid: a longer prompt shows its last ones
ROWS = 96  # unembedded at once
SITES = ("embed", "layers.*.resid_post")
LOWEST, TINY = -1e4, -80.0  # logits, and logits below the largest, that count for nothing
GRIDS = 16  # tabs and panes remembered


@dataclass(frozen=True, eq=False)
class Column:
    """What every layer says at one token: `top` ids and `probability` [layer, top], the rest [layer]."""

    top: np.ndarray
    probability: np.ndarray
    rank: np.ndarray  # of the prediction, as is `log_probability`
    log_probability: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    prediction: int


@dataclass(eq=False)
class Grid:
    """The columns known of one pane, by position, for the tokens and edits they were read under."""

    ids: list[int] = field(default_factory=list)
    edits: Hashable = None
    columns: dict[int, Column] = field(default_factory=dict)

    def moved(self, ids: list[int], edits: Hashable, causal: bool) -> None:
        """Forget the columns that the new tokens make wrong."""
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, self.ids, strict=False)) if a != b), min(len(ids), len(self.ids))
        )
        if edits != self.edits or (not causal and ids != self.ids):
            same = 0
        self.columns = {p: c for p, c in self.columns.items() if p < same}
        self.ids, self.edits = ids, edits


class LiveLens:
    """The lens of one model, for all tabs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sites: list[str] = []
        self.refused = ""
        try:
            if model.anatomy.head is None or "head" in model.anatomy.refusals:
                raise Refused(model.anatomy.refusals.get("head", "it has no head that reads its last residual"))
            self.sites = lens_sites(model, SITES)
        except PellucidError as refusal:
            self.refused = f"No lens on this model: {refusal}"
        self._grids: OrderedDict[Hashable, Grid] = OrderedDict()
        self._words: dict[int, str] = {}
        self._checked = False

    def fits(self, passed: Passed) -> bool:
        """Whether this run has one residual and one row of logits for every token, and they belong together."""
        shape = passed.inputs.stream("").ids.shape
        if self.refused or passed.kind in ("class", "vectors") or passed.run.logits.shape[:2] != shape:
            return False
        if not self._checked:
            last = passed.run.tensor(self.sites[-1])
            gap = error(unembed(self.model, last[:, -1:]), passed.run.logits[:, -1:])
            if gap > 3 * TOLERANCE.get(last.dtype, 4e-2):
                self.refused = (
                    f"No lens on this model: its last residual read through the head misses the logits by {gap:.1e}"
                )
            self._checked = True
        return not self.refused

    @torch.no_grad()
    def document(
        self, who: Hashable, passed: Passed, edits: Hashable, code: str = "", seconds: float = SECONDS
    ) -> tuple[Document, bool]:
        """The grid of a run for a pane, and whether columns are left. `edits` tells apart what columns
        must not share."""
        stream = passed.inputs.stream("")
        ids = stream.ids[0, int(stream.starts[0]) :][: int(stream.lengths[0])].tolist()
        grid = self._grids.pop(who, None) or Grid()
        grid.moved(ids, edits, bool(self.model.anatomy.stacks[-1].causal))
        self._grids[who] = grid
        while len(self._grids) > GRIDS:
            self._grids.popitem(last=False)
        first = max(0, len(ids) - WIDEST)
        left = [p for p in range(len(ids) - 1, first - 1, -1) if p not in grid.columns]
        step, started = max(1, ROWS // len(self.sites)), time.perf_counter()
        while left:
            part, left = left[:step], left[step:]
            grid.columns |= self._read(passed, part, int(stream.starts[0]))
            if time.perf_counter() - started >= seconds:
                break
        shown = [p for p in range(first, len(ids)) if p in grid.columns]
        note = f"The last {len(shown)} of {len(ids)} tokens." if len(shown) < len(ids) else ""
        about = Document(
            title="Logit lens", data=self._view(grid, shown, stream.labels[0]), lead=note, code=Code(python=code),
            provenance=Origin(line=f"logit_lens · {self.model.name}"),
        )  # fmt: skip
        return about, bool(left)

    def _read(self, passed: Passed, positions: list[int], start: int) -> dict[int, Column]:
        at = torch.tensor(positions) + start
        states = torch.stack([passed.run.tensor(site)[0, at] for site in self.sites], 1)  # [column, layer, d]
        logits = unembed(self.model, states.flatten(0, 1)[None])[0].float().unflatten(0, states.shape[:2])
        final = passed.run.logits[0, at].float()
        return {p: column(logits[i], final[i]) for i, p in enumerate(positions)}

    def _view(self, grid: Grid, shown: list[int], labels: tuple[str, ...]) -> s.Lens:
        columns = [grid.columns[p] for p in shown]
        top = np.stack([c.top for c in columns], 1)
        ids, index = np.unique(top, return_inverse=True)
        more = {
            n: Numbers.of(np.stack([getattr(c, n) for c in columns], 1).astype(float))
            for n in ("rank", "kl", "entropy")
        }
        reading = s.Reading(
            name="logit", top=Numbers.of(index.reshape(top.shape)),
            probability=Numbers.of(np.stack([c.probability for c in columns], 1)),
            rank=more["rank"], kl=more["kl"], entropy=more["entropy"], followed=(self._followed(columns),),
        )  # fmt: skip
        layers = ["embed" if site.endswith("embed") else site.split("layers.")[1].split(".")[0] for site in self.sites]
        return s.Lens(
            tokens=tuple(labels[p] for p in shown), positions=tuple(shown), layers=tuple(layers),
            components=tuple(self.sites), words=tuple(self._word(int(i)) for i in ids), readings=(reading,),
            prediction=tuple(self._word(c.prediction) for c in columns),
        )  # fmt: skip

    def _followed(self, columns: list[Column]) -> s.Followed:
        """The last token's prediction through all layers, wherever it is predicted; NaN elsewhere."""
        answer = columns[-1].prediction

        def along(name: str) -> Numbers:
            rows = [getattr(c, name) if c.prediction == answer else np.full(len(self.sites), np.nan) for c in columns]
            return Numbers.of(np.stack(rows, 1).astype(float))

        return s.Followed(word=self._word(answer), rank=along("rank"), log_probability=along("log_probability"))

    def _word(self, token: int) -> str:
        if token not in self._words:
            tokenizer = self.model.tokenizer
            self._words[token] = f"#{token}" if tokenizer is None else str(tokenizer.decode([token]))
        return self._words[token]


def column(logits: Tensor, final: Tensor) -> Column:
    """One token, from what each layer's state is unembedded to [layer, vocabulary] and the model's own logits."""
    logits = logits.clamp_min_(LOWEST)  # 0 times minus infinity would be no number
    log_final = final.clamp_min(LOWEST).log_softmax(-1)
    most, predicted = logits.amax(-1), int(final.argmax())
    weights = (logits - most[:, None]).clamp_min_(TINY).exp_()  # without numbers so small that they are slow
    total = weights.sum(-1)
    size, p_final = most + total.log(), log_final.exp()
    likeliest = logits.topk(min(TOP, logits.shape[-1]), -1)
    found = {
        "top": likeliest.indices, "probability": (likeliest.values - size[:, None]).exp(),
        "rank": (logits > logits[:, predicted, None]).sum(-1), "log_probability": logits[:, predicted] - size, "kl": size - logits @ p_final + p_final @ log_final,
        "entropy": size - torch.linalg.vecdot(weights, logits) / total,
    }  # fmt: skip
    return Column(**{name: values.cpu().numpy() for name, values in found.items()}, prediction=predicted)
