"""What is a lens? A map from what stands in the residual stream at a site into the basis the model's own head reads.

    logits = unembed(translate(site, x))

No lens at all is the logit lens; a fitted one is affine (`Affine`: tuned, future). Everything that reads with a
lens takes any object with `translate` and `check`, and asks here which sites, layers and positions there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.frozen import linearised
from pellucid.anatomy.modes import accepted_by
from pellucid.anatomy.sites import Position, Site
from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused, listed
from pellucid.model import Model
from pellucid.tasks.tokens import single_id, texts
from pellucid.technique import technique

Layers = int | slice | Sequence[int] | None
Positions = Position | Sequence[int] | slice
EMBED = -1  # the `layer` of what enters the first block; its `site` says "embed"


class Lens(Protocol):
    """What a lens must do."""

    def translate(self, site: str, x: Tensor) -> Tensor:
        """Values [..., d] met at a site, in the basis of the last residual."""
        ...

    def check(self, model: Model) -> None:
        """InputError if it does not belong to this model's weights."""
        ...


@dataclass(eq=False)
class Affine:
    """A lens of one affine map for each site: x + A x + b, or A x + b where it is not `residual`. Other sites are left alone."""

    biases_: dict[str, Tensor] = field(init=False, repr=False)  # site -> b [d]
    weights_: dict[str, Tensor] = field(init=False, repr=False)  # site -> A [d, d]; none: only b
    digest_: str = field(init=False, repr=False)
    losses_: list[list[float]] = field(init=False, repr=False)
    residual = True

    def translate(self, site: str, x: Tensor) -> Tensor:
        """Values [..., d] met at a site, in the basis of the last residual; as they are at a site that was not fitted."""
        if site not in self.biases_:
            return x
        moved = x @ self.weights_[site].to(x).T if site in self.weights_ else torch.zeros_like(x)
        return (x + moved if self.residual else moved) + self.biases_[site].to(x)

    def check(self, model: Model) -> None:
        """InputError if the lens is not fitted, or was fitted on other weights."""
        name = type(self).__name__
        if not hasattr(self, "digest_"):
            raise InputError(f"this lens is not fitted: call fit(model, texts) or {name}.load(path)")
        check_weights(model, self.digest_, "this lens")

    # ---- files

    @property
    def settings(self) -> dict[str, Any]:
        """What it is made with."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the weights' digest."""
        tensors = {f"b/{k}": v for k, v in self.biases_.items()} | {f"A/{k}": v for k, v in self.weights_.items()}
        about = {"kind": type(self).__name__, "settings": self.settings, "digest": self.digest_, "losses": self.losses_}
        return write_tensors(path, "pellucid_lens", about, tensors)

    @classmethod
    @technique
    def load(cls, path: str | Path) -> Self:
        """A lens that was saved; `check(model)` says whether it belongs to a model. InputError if the file is none."""
        said = f"is no {cls.__name__}: expected a file that {cls.__name__}.save wrote"
        with reading_tensors(path, "pellucid_lens", said) as (about, kept):
            if about["kind"] != cls.__name__:
                raise ValueError(about["kind"])
            lens = cls(**about["settings"])
        lens.weights_, lens.biases_ = ({k[2:]: v for k, v in kept.items() if k.startswith(g)} for g in ("A/", "b/"))
        lens.digest_, lens.losses_ = about["digest"], about["losses"]
        return lens


def unembed(model: Model, resid: Tensor) -> Tensor:
    """Logits [batch, position, vocabulary] of residuals [batch, position, d_model], by the model's own head.

    Every step between the last block and the logits is run: norms, transforms, scaling, soft-capping. Refused
    where the proof `unembedding` does not hold.
    """
    head = model.anatomy.head
    if head is None or "head" in model.anatomy.refusals:
        why = model.anatomy.refusals.get("head", "this model has no head that reads its last residual")
        raise Refused(f"{model.name} cannot be read through its head: {why}")
    for step in head.steps:
        resid = step(resid)
    return resid


def answer_texts(model: Model, ids: Any) -> np.ndarray:
    """What the numbers of logits stand for, in the shape of `ids`: tokens as text, or labels by name."""
    answering = model.anatomy.answering
    if answering.meaning == "tokens":
        return texts(model.tokenizer, ids)
    numbers = np.asarray(ids, dtype=int)
    named = [answering.names.get(i, f"#{i}") for i in numbers.ravel().tolist()]
    return np.array(named, dtype=object).reshape(numbers.shape)


def answer_id(model: Model, answer: str | int) -> int:
    """The number of a token, or of a label, among the logits."""
    answering = model.anatomy.answering
    if answering.meaning == "tokens":
        return single_id(model.tokenizer, answer)
    return int(answering.numbers(answer))


def logits(model: Model, x: Tensor, site: str = "", lens: Lens | None = None) -> Tensor:
    """[row, vocabulary] float32, of values [row, d] met at a site, through the lens (none: as they are) and the head."""
    like = next(p for p in model.module.parameters() if p.is_floating_point())
    moved = x if lens is None else lens.translate(site, x.float())
    return unembed(model, moved[None].to(like.dtype))[0].float()


class Held:
    """The model's own head with its norm held as it was for one last residual [1, 1, d]."""

    def __init__(self, model: Model, here: Tensor) -> None:
        head = model.anatomy.head
        if head is None or "head" in model.anatomy.refusals:
            raise Refused(
                f"{model.name} cannot be read through its head: {model.anatomy.refusals.get('head', 'it has none')}"
            )
        self.frozen, _ = linearised(head.steps[: head.after], head.names[: head.after], here)
        self.nothing = self.frozen(torch.zeros_like(here))

    def __call__(self, written: Tensor) -> Tensor:
        """[row, vocabulary] changes of the logits by written [row, d]."""
        return (self.frozen(written[:, None].to(self.nothing)) - self.nothing)[:, 0].float()


# ---- sites, layers, positions


def last_residual(model: Model) -> str:
    stack = model.anatomy.stacks[-1]
    return f"{stack.prefix}layers.{len(stack.blocks) - 1}.resid_post"


def lens_sites(model: Model, sites: str | Iterable[str]) -> list[str]:
    """The residuals, or what is added to them, that patterns name on the last stack. InputError for others."""
    patterns = [sites] if isinstance(sites, str) else list(sites)
    prefix = model.anatomy.stacks[-1].prefix
    found = [site for p in patterns for site in model.sites(p if p.startswith(prefix) else prefix + p)]
    for site in found:
        if site.dims != ("batch", "position", "d_model") or site.at is not None:
            raise InputError(
                f"{str(site)!r} is no residual at every position; the lens reads sites such as layers.*.resid_post"
            )
    return [str(site) for site in found]


def layer_coords(sites: Sequence[str]) -> dict[str, Any]:
    """The coordinates of a dimension of sites: `layer`, EMBED where there is none, and `site`."""
    layers = [Site.parse(name).layer for name in sites]
    return {"layer": [EMBED if n is None else n for n in layers], "site": ("layer", list(sites))}


def layer_numbers(model: Model, layers: Layers, stack: int = -1) -> list[int]:
    """The layers of a stack (the last one) that a number, slice or list names, all for None. InputError for others."""
    count = len(model.anatomy.stacks[stack].blocks)
    if layers is None or isinstance(layers, slice):
        wanted = list(range(count)[slice(None) if layers is None else layers])
    else:
        layers = getattr(layers, "tolist", lambda: layers)()  # numpy, torch
        wanted = [layers] if isinstance(layers, int) else listed("layers", layers, f"numbers below {count}")
    if not wanted or isinstance(layers, str) or not all(isinstance(i, int) and -count <= i < count for i in wanted):
        raise InputError(f"layers={layers!r}: expected a number below {count}, a slice or a list of numbers")
    return [i % count for i in wanted]


def selector(positions: Positions) -> Position:
    """Positions as `@` has them in sites: a number, a list or slice of them, a span's name or a token in quotes."""
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise InputError(f"positions={positions!r}: a slice of positions has no step")
        start, stop = ("" if n is None else str(n) for n in (positions.start, positions.stop))
        return f"{start}:{stop}"
    positions = getattr(positions, "tolist", lambda: positions)()  # numpy, torch
    if isinstance(positions, str | int | None):
        return positions
    positions = listed("positions", positions, "numbers, a slice, a span or a token, or None for all")
    if not positions or not all(isinstance(p, int) for p in positions):
        raise InputError(f"positions={positions!r}: expected numbers, a slice, a span or a token, or None for all")
    return positions[0] if len(positions) == 1 else ",".join(map(str, positions))


def columns(stream: Stream, positions: Positions) -> tuple[Tensor, Tensor]:
    """The columns [prompt, position] to read, and which of them hold a token."""
    found = stream.find(selector(positions))
    if found is not None:
        return found, torch.ones_like(found, dtype=torch.bool)
    index = torch.arange(int(stream.lengths.max()))
    real = index < stream.lengths[:, None]
    return (stream.starts[:, None] + index).clamp(max=stream.ids.shape[1] - 1), real


def one_column(inputs: Inputs, positions: Positions, what: str) -> Tensor:
    """[prompt] the column of the one position that is read in each prompt; a bare word is a token. InputError for several."""
    stream = inputs.stream("")
    if isinstance(positions, str) and positions.isalpha() and positions not in stream.spans:
        positions = repr(positions)
    found, _ = columns(stream, positions)
    if positions is None or found.shape[1] != 1:
        raise InputError(f"{what} reads one position, not {positions!r}: give an index or token")
    return found[:, 0]


# ---- runs


def states(model: Model, inputs: Inputs, names: Sequence[str]) -> Run:
    """A run that kept these sites and the last residual, without unembedding more than it must."""
    with torch.no_grad():
        if "logits_to_keep" in accepted_by(model.module):
            inputs = replace(inputs, tensors={**inputs.tensors, "logits_to_keep": 1})
        return model.run(inputs, keep=[*names, last_residual(model)])
