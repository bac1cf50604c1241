"""Is it starting to ...? A reader of what happens inside, a rule over tokens, a threshold, and what is done then.

    monitor = Monitor(reader, rule=ema(.3), reads="answer", threshold=tau, then=pl.Stop())
    model.generate(prompts, monitors=[monitor]).firings

A reader is anything with a `site` and `__call__(values [..., d]) -> [...]`, higher for more of it: a fitted one, a
`Direction`, a dictionary's `Feature`, a function (with `site=`), the address of a neuron (its own value), or `Words`, which
reads the text. Of several readers the mean counts. `reads` says which tokens count: the "prompt", the "answer" (the tokens
that an answer's tokens are chosen from, the prompt's last one first), or the "exchange", both.

What is done: None (record), `pl.Stop()`, `pl.Say(text)` (a safe completion, or "I am not sure."), `pl.Redirect(edits)`, an
edit or a list of them (steer, ablate: beside those the row has), or a function of the `Alarm` (a human), which returns one of
these or None. A monitor belongs to the weights it was calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit
from pellucid.engine.locate import locate, spots
from pellucid.engine.saved import packed, unpacked
from pellucid.engine.steps import Action, Redirect, Say, Stop
from pellucid.errors import InputError, among
from pellucid.model import Model
from pellucid.neurons.dictionaries import Dictionary
from pellucid.probing.direction import Direction
from pellucid.results import Result
from pellucid.safety.guarding import Guard, Seen
from pellucid.safety.rules import Rule
from pellucid.safety.thresholds import Threshold

Reads = Literal["prompt", "answer", "exchange"]
KEY = "pellucid_monitor"
ABSTAIN = Say("I am not sure.")

# ---- readers


@dataclass(frozen=True, eq=False)
class Feature:
    """Reads the activation of one of a dictionary's features."""

    dictionary: Dictionary
    index: int

    @property
    def site(self) -> str:
        return self.dictionary.site

    def __call__(self, values: Tensor) -> Tensor:
        return self.dictionary.encode(values)[..., self.index]


@dataclass(frozen=True, eq=False)
class Words:
    """Reads the text: `function` is given a list of texts, and returns a score for each. It has no site."""

    function: Callable[[list[str]], Any]


@dataclass(frozen=True, eq=False)
class _At:
    """A function at a site; without one, the value of the unit itself."""

    site: str
    function: Callable[[Tensor], Tensor] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        return values if self.function is None else self.function(values)


def _reader(given: Any, site: str | None) -> Any:
    if isinstance(given, str | Site):
        return _At(str(given))
    if isinstance(given, Words):
        return given
    own = site or getattr(given, "site", None) or getattr(given, "site_", None)
    if not callable(given) or own is None:
        raise InputError(
            f"{given!r} is no reader: expected a site and a call, as Direction(site, vector), or a function with site="
        )
    return given if own == getattr(given, "site", None) else _At(str(own), given)


# ---- monitors


class Monitored:
    """What single monitors and cascades of them have in common."""

    kinds: ClassVar[dict[str, Any]] = {}  # by name, how they are made of what a file holds
    name: str
    threshold: float | Threshold | None
    then: Any
    digest: str

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.__name__] = cls

    @property
    def level(self) -> float:
        """The threshold as a number; without one it is never reached."""
        tau = self.threshold
        return float("inf") if tau is None else tau.value if isinstance(tau, Threshold) else float(tau)

    @property
    def sites(self) -> tuple[Site, ...]:
        raise NotImplementedError

    def check(self, model: Model) -> None:
        """InputError where this belongs to other weights, or reads where this model has nothing that it could read."""
        check_weights(model, self.digest, f"the monitor {self.name!r}")
        for site in self.sites:
            if len(spots(model.anatomy, site)) != 1:
                raise InputError(
                    f"{str(site)!r} is several sites: a reader reads one, and several readers are averaged"
                )

    def begin(self, model: Model) -> Guard:
        """This monitor for one generation (`model.generate(monitors=)` calls it)."""
        self.check(model)
        if self.then is not None and self.threshold is None:
            raise InputError(
                f"{self.name!r} has no threshold, so it would never act: safety.calibrate sets one from benign prompts"
            )
        return Guard(self, model)

    def follow(self, state: dict[str, Any], seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        """The scores and the statistic at new positions, [row, position]; `state` is this monitor's own."""
        raise NotImplementedError

    def kept(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What a file holds of this; tensors go to `tensors`."""
        raise NotImplementedError

    def tie(self, model: Model) -> Any:
        """This monitor, tied to a model's weights (`calibrate` does it)."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with JSON in it, tied to the weights that this was calibrated on (or tied to).

        A reader that is affine in what it reads is kept as its direction; another by its answers at points drawn at random,
        and must be given again. InputError for functions among the actions, and for a monitor that belongs to no weights.
        """
        if not self.digest:
            raise InputError(f"{self.name!r} belongs to no weights yet: calibrate it, or save monitor.tie(model)")
        tensors: dict[str, Tensor] = {}
        about = {"kind": type(self).__name__, "digest": self.digest, **self.kept(tensors)}
        return write_tensors(path, KEY, about, tensors)


@dataclass(frozen=True, eq=False)
class Monitor(Monitored):
    """Readers, a rule, a threshold and what is done; a value (see the module).

    threshold: a number, or what `calibrate` found; None only records. site: for a function that has none.

    >>> Monitor(Direction("layers.3.resid_post", torch.ones(4)), rule="max", threshold=2.0, then=Stop()).level
    2.0
    """

    reader: Any
    rule: Rule | str = "max"
    reads: Reads = "answer"
    threshold: float | Threshold | None = None
    then: Any = None
    name: str = "monitor"
    site: str | None = None
    digest: str = ""
    fitted: Result | None = field(
        default=None, repr=False
    )  # what `fit_monitor` found, beside the text alone; not in a file
    widths: tuple[int, ...] = field(default=(), repr=False)  # how many numbers each site holds, where it is tied
    _readers: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.reader if isinstance(self.reader, list | tuple) else [self.reader]
        object.__setattr__(self, "_readers", tuple(_reader(each, self.site) for each in given))
        object.__setattr__(self, "rule", Rule.of(self.rule))
        object.__setattr__(self, "digest", self.digest or next((d for r in self._readers if (d := _digest(r))), ""))
        words = [isinstance(r, Words) for r in self._readers]
        if not words or (any(words) and not all(words)):
            raise InputError("a monitor has readers of activations or of words: of both make a cascade")
        if not among(self.reads, Reads):
            raise InputError(f"reads={self.reads!r}: expected 'prompt', 'answer' or 'exchange'")
        if isinstance(self.threshold, float | int) and np.isnan(self.threshold):
            raise InputError("the threshold is no number")
        listed = self.then if isinstance(self.then, list | tuple) else [self.then]
        if not all(t is None or isinstance(t, Action | Edit) or callable(t) for t in listed):
            raise InputError(
                f"then={self.then!r}: expected pl.Stop, pl.Say, pl.Redirect, edits, a function of the alarm, or None"
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(Site.parse(r.site) for r in self._readers if not isinstance(r, Words)))

    def check(self, model: Model) -> None:
        super().check(model)
        for site in self.sites:
            if (
                locate(model.anatomy, site).stream == "encoder"
                and len(model.anatomy.stacks) > 1
                and self.reads != "prompt"
            ):
                raise InputError(f"{str(site)!r} is of the encoder, which reads the prompt alone: give reads='prompt'")
        if not self.sites and model.tokenizer is None:
            raise InputError(f"{self.name!r} reads words, and this model was opened without a tokenizer")

    def follow(self, state: dict[str, Any], seen: Seen, on: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        assert isinstance(self.rule, Rule)
        counted = seen.on(self.reads) if on is None else on & seen.on(self.reads)
        own = [seen.foreign(site) for site in self.sites]
        if own and own[0] is not None:  # positions of its own, all in the first step: their last word counts
            inner = self.rule.follow(state, self._scores(seen, own[0]), own[0])
            made = np.full(counted.shape, np.nan)
            made[:, -1] = np.nan if np.isnan(inner).all() else np.fmax.reduce(inner, 1)
            return made, made.copy()
        scores = self._scores(seen, counted)
        return scores, self.rule.follow(state, scores, counted)

    def _scores(self, seen: Seen, on: np.ndarray) -> np.ndarray:
        """[row, position] the mean of the readers where `on`; nothing else is read."""
        made = np.full(on.shape, np.nan)
        if not on.any():
            return made
        found: Any = 0.0
        for reader in self._readers:
            if isinstance(reader, Words):
                said = reader.function([seen.text(self.reads, int(r), int(p)) for r, p in np.argwhere(on)])
                values = torch.as_tensor(said)
            else:
                x = seen.values(Site.parse(reader.site))
                values = torch.as_tensor(reader(x[torch.from_numpy(on).to(x.device)].float()))
            values = values.detach().double().cpu()
            if values.shape != (int(on.sum()),) or bool(values.isnan().any()):
                what = (
                    f"shape {list(values.shape)}" if values.shape != (int(on.sum()),) else "scores that are no numbers"
                )
                raise InputError(
                    f"a reader of {self.name!r} gave {what} for {int(on.sum())} tokens: expected one number for each"
                )
            found = found + values.numpy() / len(self._readers)
        made[on] = found
        return made

    # ---- in a file

    def tie(self, model: Model) -> Monitor:
        self.check(model)
        run = model.run(dict(model.anatomy.inputs), keep=list(self.sites), logits=False) if self.sites else None
        read = [r.site if not isinstance(r, Words) else "" for r in self._readers]
        widths = tuple(int(run.tensor(site).shape[-1]) if run is not None and site else 0 for site in read)
        return replace(self, digest=model.digest, widths=widths)

    def kept(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        about: dict[str, Any] = {"name": self.name, "reads": self.reads, "readers": []}
        if len(self.widths) != len(self._readers):
            raise InputError(f"{self.name!r} belongs to no weights yet: calibrate it, or save monitor.tie(model)")
        about["readers"] = [_kept(r, d, tensors) for r, d in zip(self._readers, self.widths, strict=True)]
        about["rule"] = {f.name: getattr(self.rule, f.name) for f in fields(Rule)}
        about["threshold"] = vars(self.threshold) if isinstance(self.threshold, Threshold) else self.threshold
        return {**about, "then": kept_action(self.name, self.then, tensors)}

    @classmethod
    def made(cls, about: dict[str, Any], tensors: dict[str, Tensor], readers: list[Any]) -> Monitor:
        found = [_made(each, tensors, readers) for each in about["readers"]]
        return cls(found[0] if len(found) == 1 else found, Rule(**about["rule"]), about["reads"],
                   made_threshold(about["threshold"]), made_action(about["then"], tensors), about["name"],
                   digest=about.get("digest", ""), widths=tuple(each.get("d", 0) for each in about["readers"]))  # fmt: skip


def _digest(reader: Any) -> str:
    inner = getattr(reader, "function", None) or getattr(reader, "dictionary", None) or reader
    return str(next((d for n in ("digest", "digest_") if (d := getattr(inner, n, ""))), ""))


def made_threshold(kept: Any) -> float | Threshold | None:
    return Threshold(**kept) if isinstance(kept, dict) else kept


def kept_action(name: str, then: Any, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """What is done, as JSON."""
    if then is None:
        return None
    edits = then.edits if isinstance(then, Redirect) else then
    edits = [edits] if isinstance(edits, Edit) else edits
    if isinstance(edits, list | tuple):
        return {
            "kind": "edits",
            "edits": packed(edits, tensors),
            "redirect": isinstance(then, Redirect) and not then.beside,
        }
    if isinstance(then, Stop | Say):
        return {"kind": type(then).__name__, **vars(then)}
    raise InputError(
        f"{name!r} cannot be saved: what it does is a function; save replace(monitor, then=None), and give it anew"
    )


def made_action(kept: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Any:
    if kept is None:
        return None
    kind, given = kept["kind"], {k: v for k, v in kept.items() if k != "kind"}
    if kind == "edits":
        edits = unpacked(given["edits"], tensors)
        return Redirect(edits) if given["redirect"] else edits
    return {"Stop": Stop, "Say": Say}[kind](**given)


def _points(d: int) -> Tensor:
    return torch.randn(16, d, generator=torch.Generator().manual_seed(0)).double().float()


def _kept(reader: Any, d: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A reader in a file: an affine one as its direction, found by asking; any other as what it says at drawn points."""
    if isinstance(reader, _At) and reader.function is None:
        return {"site": reader.site, "kind": "unit", "d": d}
    if isinstance(reader, Words):
        return {"kind": "words"}
    with torch.no_grad():
        x, offset = _points(d), reader(torch.zeros(1, d)).double()
        said = reader(x).double()
        vector = (reader(torch.eye(d)).double() - offset).cpu()
        affine = torch.allclose(
            x.double() @ vector + offset.cpu(), said.cpu(), rtol=1e-4, atol=1e-4 * float(said.abs().max())
        )
    key = f"reader {len(tensors)}"
    tensors[key] = vector.float() if affine else said.float().cpu()
    kept = {"site": str(reader.site), "kind": "direction" if affine else "given", "tensor": key, "d": d}
    return kept | ({"offset": float(offset)} if affine else {})


def _made(kept: dict[str, Any], tensors: dict[str, Tensor], readers: list[Any]) -> Any:
    if kept["kind"] == "unit":
        return kept["site"]
    if kept["kind"] == "direction":
        return Direction(kept["site"], tensors[kept["tensor"]], kept["offset"])
    if not readers:
        raise InputError(
            "this monitor's reader is no direction, and files hold no code: give load_monitor(model, path, reader=...)"
        )
    reader = readers.pop(0)
    if kept["kind"] == "given":
        said = reader(_points(kept["d"])).detach().float().cpu()
        if str(reader.site) != kept["site"] or not torch.allclose(said, tensors[kept["tensor"]], rtol=1e-3, atol=1e-3):
            raise InputError("the reader that was given is not the one this monitor was saved with: it reads otherwise")
    return reader


def load_monitor(model: Model, path: str | Path, *, reader: Any = None, then: Any = None) -> Any:
    """What `save` wrote, for this model. InputError for other weights, and for a file of anything else.

    `reader` (or several, in order) are those that were no directions; `then` is done instead of what the file says.
    """
    readers: list[Any] = list(reader) if isinstance(reader, Sequence) else [] if reader is None else [reader]
    with reading_tensors(path, KEY, "holds no monitor: expected a file that Monitor.save wrote") as (about, tensors):
        kind, digest = Monitored.kinds[about["kind"]], about["digest"]
    check_weights(model, digest, f"the monitor in {str(path)!r}")
    found = kind.made(about, tensors, readers)
    found.check(model)
    return found if then is None else replace(found, then=then)
