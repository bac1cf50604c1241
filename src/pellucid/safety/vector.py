"""A direction in the residual stream, with what its strength is counted in: how is a model pushed along it, or kept off it?

With u the direction (length 1), h the values of a token at the site, and n the mean length of h over tokens but the first:

    add        h + c n u                                 repeng, CAA (Rimsky et al. 2024), with c in units of n
    norm_kept  the same, brought back to the length of h
    project    h - (h.u) u                               directional ablation (Arditi et al. 2024)
    scale      h + (c - 1) (h.u) u                       c < 1 dampens, c > 1 amplifies
    clamp      h with h.u = c n
    angular    h turned towards u by arctan c, its length kept: as far as `add` turns what stands across u

The first token of a text is outside: in many models it is an attention sink, its residual a hundred times longer than
others. With it in the mean a strength would mean another thing, and a direction that is projected out of it takes the sink and with it the
model (`Vector.sink` says how much of it lies on u). Added is by default from the last token of the prompt on ("-1:"; repeng and
llama.cpp: at every token, the first too), projected out at all tokens but the first ("1:").
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Clamp, Condition, Edit, ProjectOut, Rotate, Steer, left_aligned
from pellucid.engine.locate import stack_of
from pellucid.engine.steps import Step, Watch
from pellucid.errors import InputError, one_of
from pellucid.model import Model
from pellucid.probing.direction import Direction
from pellucid.safety.thresholds import Threshold

Form = Literal["add", "norm_kept", "project", "scale", "clamp", "angular"]
Pool = Literal["last", "mean"]
SINK = 0.1  # share of the first token's residual on a direction from which on projecting it out there is warned of
KEY = "pellucid_vectors"
_WRITES = re.compile(r"(attn|cross|mixer|mlp)(#\d+)?\.out|resid_post")


class Reader(Protocol):
    """What reads values at one site: a `Vector`, a probe, a fitted reader; higher means more of it."""

    @property
    def site(self) -> str: ...

    def __call__(self, values: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Vector(Direction):
    """A direction [d] of length 1 at a site, which is also a reader: called with values [..., d] it gives their part along it.

    unit: the mean length of the values there, without first tokens; first [d]: the mean first residual, each at length 1;
    digest: of the weights it belongs to, "" where it is tied to none.
    """

    offset: float = field(default=0.0, init=False)
    states: None = field(default=None, init=False)
    unit: float = 1.0
    first: Tensor | None = None
    digest: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if Site.parse(self.site).at is not None:
            raise InputError(
                f"{self.site!r}: a vector belongs to a site, so leave '@' out and say tokens= of its edits"
            )
        d = torch.as_tensor(self.vector).detach().float().cpu()
        if d.ndim != 1 or not bool(d.isfinite().all()) or not float(d.norm()) > 0:
            raise InputError(
                f"the direction at {self.site!r} is {list(d.shape)}: expected [d] finite numbers, not all 0"
            )
        object.__setattr__(self, "vector", d / d.norm())

    def __repr__(self) -> str:
        named = f"{self.name}, " if self.name else ""
        return f"<Vector {named}{self.site}, {len(self.direction)} wide, unit {self.unit:.4g}>"

    def __neg__(self) -> Vector:
        return replace(self, vector=-self.direction, name=f"-{self.name}" if self.name else "")

    @property
    def sink(self) -> float:
        """The share of the first token's residual that lies on the direction, |cosine|; NaN where it was not seen."""
        if self.first is None:
            return math.nan
        return float((self.direction @ torch.nn.functional.normalize(self.first.float(), dim=0)).abs())

    def spared(self) -> Vector:
        """The direction without its part along the first token's residual: what also a change of weights may project out."""
        if self.first is None:
            raise InputError(f"what the first token holds at {self.site!r} is not known: make the vector from prompts")
        s = torch.nn.functional.normalize(self.first.float(), dim=0)
        return replace(self, vector=self.direction - (self.direction @ s) * s)

    def check(self, model: Model) -> None:
        """InputError where it belongs to other weights."""
        check_weights(model, self.digest, f"the vector at {self.site}")

    def edit(
        self, strength: float = 0.15, *, form: Form = "add", tokens: str | None = None, when: Condition | None = None
    ) -> Edit:
        """The edit for `model.run` and `model.generate`; forms, the unit of `strength` and default `tokens` as the module says.

        `when` is asked while generating, a `condition(...)` for example. InputError for an unknown form, and for a
        condition that is read behind the site, where the prompt's last token would be missed.

        >>> Vector("layers.3.resid_post", torch.ones(4), unit=10.0).edit(0.3).strength
        3.0
        """
        return steer([self], strength, form=form, tokens=tokens, when=when)[0]


def steer(
    vectors: Sequence[Vector],
    strengths: float | Sequence[float] = 0.15,
    *,
    form: Form = "add",
    tokens: str | None = None,
    when: Condition | None = None,
) -> list[Edit]:
    """Edits of several vectors at once, one for each site. At one site added vectors add up, and directions that are projected
    out, scaled or clamped are so together: their span, not one after the other. Options as those of `Vector.edit`."""
    one_of(form, Form, "form=")
    given = list(strengths) if isinstance(strengths, Sequence) else [strengths] * len(vectors)
    if len(given) != len(vectors) or not vectors:
        raise InputError(f"{len(given)} strengths for {len(vectors)} vectors: expected one, or one for each")
    sites: dict[str, list[tuple[Vector, float]]] = {}
    for vector, c in zip(vectors, given, strict=True):
        sites.setdefault(vector.site, []).append((vector, float(c)))
    tokens = tokens if tokens is not None else "1:" if form in ("project", "scale") else "-1:"
    _check_order(list(sites), when)
    made = []
    for site, mine in sites.items():
        rows, each = torch.stack([v.direction for v, _ in mine]), [c for _, c in mine]
        sizes = torch.tensor([c * v.unit for v, c in mine])
        where: dict[str, Any] = {"tokens": tokens, "when": when}
        if (form == "angular" and len(each) > 1) or (form == "scale" and len(set(each)) > 1):
            raise InputError(
                f"{len(each)} vectors at {site!r} cannot be steered by {form!r} together: give one, or another form"
            )
        edit: Edit
        if form in ("add", "norm_kept"):
            alone = len(each) == 1
            edit = Steer(
                site, rows[0] if alone else sizes @ rows, float(sizes[0]) if alone else 1.0, form != "add", **where
            )
        elif form == "clamp":
            edit = Clamp(site, rows, sizes, **where)
        elif form == "angular":
            edit = Rotate(site, rows[0], math.degrees(math.atan(each[0])), **where)
        else:
            edit = ProjectOut(site, rows, each[0] if form == "scale" else 0.0, **where)
        made.append(_tied(edit, [v for v, _ in mine]))
    return made


def _tied(edit: Edit, vectors: Sequence[Vector]) -> Edit:
    """The edit, refused by other weights than the vectors'."""
    object.__setattr__(edit, "_digest", next((v.digest for v in vectors if v.digest), ""))
    return edit


def ablate_direction(model: Model, vectors: Vector | Sequence[Vector], *, everywhere: bool = False) -> list[Edit]:
    """Edits that keep directions out of the whole residual stream: projected out of what enters the first block, of every contribution,
    and of every block's output, which is directional ablation (Arditi et al. 2024), all writers projected.

    The first token is left alone; `everywhere` takes it too, with a warning where more than a tenth of it lies on a direction.

    >>> text = model.generate("Hello", edits=ablate_direction(model, contrast.at(14))).text
    """
    given = [vectors] if isinstance(vectors, Vector) else list(vectors)
    if not given or len({Site.parse(v.site).stack for v in given}) > 1:
        raise InputError("give one or more vectors of one stack")
    for vector in given:
        vector.check(model)
        if everywhere and not vector.sink <= SINK:
            share = "an unknown share" if math.isnan(vector.sink) else f"{vector.sink:.2f}"
            warnings.warn(
                f"{share} of the first token's residual lies on this direction; if it is an attention sink, ablating it everywhere destroys "
                "the sink and with it the model: leave everywhere=True out, or take vector.spared()",
                stacklevel=2,
            )
    stack = stack_of(model.anatomy, Site.parse(given[0].site))
    parts = [f"layers.{b.index}.{part}" for b in stack.blocks for part in b.taps if _WRITES.fullmatch(part)]
    rows = torch.stack([v.direction for v in given])
    tokens = ":" if everywhere else "1:"
    return [_tied(ProjectOut(f"{stack.prefix}{site}", rows, tokens=tokens), given) for site in ("embed", *parts)]


# ---- on what condition


def condition(reader: Reader, threshold: float | Threshold, *, pool: Pool = "last") -> Watch:
    """A condition for `when=`: whether a reader's score of the prompt is above a threshold, asked once of each row and kept.

    pool: the prompt's "last" token, or the "mean" score of its tokens but the first. The edit must lie behind the reader's site:
    then it already acts on the last token of the prompt. Answers stand in `generated.fired["condition"]`.

    >>> contrast.at(14).edit(.15, when=condition(harm, 2.5))
    Steer('layers.14.resid_post', vector=<tensor [32]>, strength=..., tokens='-1:', when=Watch(['layers.9.resid_post'], <fires>, name='condition'))
    """
    one_of(pool, Pool, "pool=")
    site, least = str(reader.site), threshold.value if isinstance(threshold, Threshold) else float(threshold)

    def fires(step: Step) -> Tensor:
        if "fires" not in step.state:
            score = reader(left_aligned(step.new(site), real := step.real(site))[0]).float().cpu()
            step.state["fires"] = pooled(score, real.sum(1).cpu(), pool) > least
        kept: Tensor = step.state["fires"]
        return kept

    return Watch(site, fires, name="condition")


def pooled(values: Tensor, lengths: Tensor, pool: Pool) -> Tensor:
    """[row, ...] of values [row, position, ...] whose first real token is in column 0; the first token is in no mean."""
    if pool == "last":
        return values[torch.arange(len(values)), lengths.to(values.device) - 1]
    at = torch.arange(values.shape[1], device=values.device)
    last = lengths.to(values.device)[:, None]
    inside = ((at < last) & ((at > 0) | (last == 1))).to(values.dtype)
    weight = (inside / inside.sum(1, keepdim=True)).reshape(*inside.shape, *[1] * (values.ndim - 2))
    return (values * weight).sum(1)


def _check_order(sites: Sequence[str], when: Condition | None) -> None:
    if not isinstance(when, Watch):
        return
    for read in when.watched:
        for site in map(Site.parse, sites):
            if read.stack != site.stack or not isinstance(read.layer, int) or not isinstance(site.layer, int):
                continue
            if read.layer >= site.layer and read.part == "resid_post":
                raise InputError(
                    f"the condition reads {str(read)!r} and the edit writes {str(site)!r}: when it is known, the prompt's last token has "
                    "passed; read an earlier layer, or steer a later one"
                )


# ---- files


def save_vectors(vectors: Sequence[Vector], path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write vectors to one safetensors file; returns its path."""
    tensors: dict[str, Tensor] = {}
    kept = []
    for i, v in enumerate(vectors):
        tensors[f"{i}.direction"] = v.direction
        tensors |= {} if v.first is None else {f"{i}.first": v.first.float().clone()}
        kept.append({"site": v.site, "unit": v.unit, "digest": v.digest, "name": v.name})
    return write_tensors(path, KEY, {"vectors": kept, **(about or {})}, tensors)


def load_vectors(path: str | Path) -> list[Vector]:
    """The vectors of a file that `save_vectors` (or a `Contrast`) wrote; models of other weights refuse them. InputError where it is none."""
    said = "holds no vectors of pellucid: import_vectors reads other programs' files"
    with reading_tensors(path, KEY, said) as (about, tensors):
        made = [
            Vector(k["site"], tensors[f"{i}.direction"], k["unit"], tensors.get(f"{i}.first"), k["digest"], k["name"])
            for i, k in enumerate(about["vectors"])
        ]
    return made
