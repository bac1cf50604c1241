"""What excites each neuron, over a whole corpus?

The texts stream through the model once. Of every unit (each neuron of the sites, each channel of a residual, each direction
or feature read there) are kept its k largest activations with their places, mean, standard deviation and share of positive
activations over all tokens, and its activations at one uniform sample of tokens, which all units share: from it come
quantiles, a histogram, samples from quantile bins, and correlations between units. Contexts are cut from the tokens, which
are kept, too. Memory does not grow with the corpus (the tokens go to disk where a `path` is given).

With a path the harvest can be interrupted at any time and goes on after the last segment of about 32,000 tokens; what comes
out is the same to the last bit. Texts are run in batches of like length; padding and special tokens are not counted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.changed import check_weights
from pellucid.corpus import CONTEXT, SEGMENT, Corpus, Place, Row, by_length, inputs, longest, segments
from pellucid.engine.checkpoint import fingerprint
from pellucid.engine.marks import special_ids
from pellucid.engine.pausing import progress
from pellucid.engine.run import stream_of
from pellucid.engine.sweep import Where, current
from pellucid.engine.watching import together, watch
from pellucid.errors import InputError, Refused, at_least, listed, nearest
from pellucid.model import Model
from pellucid.neurons.dictionaries import saelens
from pellucid.neurons.dictionaries.dictionary import Dictionary
from pellucid.neurons.shelf import Shelf, place, where
from pellucid.neurons.tally import Sampler, Tally
from pellucid.technique import technique
from pellucid.workers.errand import Errand, Tensors, Values, Work, done, heard, told

INDEX, VERSION = "harvest.json", 2
TOKENS = 2048  # run at once
NONE = fingerprint(None)  # of a site's own units


@dataclass(frozen=True, eq=False)
class Units:
    """Functions of the values at a site, each a unit: directions [unit, d] (or one, [d]) that values are projected on, or a
    callable from values [token, ...] (the site's dimensions) to activations [token, unit], a `Dictionary` say.

    >>> Units("layers.3.resid_post", torch.eye(4)[:2], name="axes").activations(torch.ones(1, 4))
    tensor([[1., 1.]])
    """

    site: str
    read: Tensor | Callable[[Tensor], Tensor] | None = None  # None: the site's own units
    name: str = ""

    def __repr__(self) -> str:
        read = f"directions {list(self.read.shape)}" if isinstance(self.read, Tensor) else self.read
        more = "".join(f", {part}" for part in (read, self.name and f"name={self.name!r}") if part)
        return f"Units({self.site!r}{more})"

    @property
    def label(self) -> str:
        return self.name or self.site

    def activations(self, values: Tensor) -> Tensor:
        """[token, unit] float32 on the CPU."""
        tokens = len(values)
        if isinstance(self.read, Tensor):
            directions, values = self.read.to(values).view(-1, self.read.shape[-1]), values.flatten(1)
            if directions.shape[1] != values.shape[1]:
                raise InputError(
                    f"{self.label!r} has directions of {directions.shape[1]} numbers, {self.site!r} of {values.shape[1]}"
                )
            values = values @ directions.T
        elif self.read is not None:
            values = self.read(values)
        if not isinstance(values, Tensor) or values.ndim < 1 or len(values) != tokens:
            raise InputError(
                f"{self.label!r} must give activations [token, unit] for {tokens} tokens, not {getattr(values, 'shape', values)}"
            )
        return values.reshape(len(values), -1).float().cpu()


Sites = str | Units | Sequence[str | Units]


class Moment(NamedTuple):
    """One token of the corpus, with a unit's activation there."""

    value: float
    prompt: int
    position: int


@dataclass(frozen=True)
class Plan:
    """How a harvest was made; one that continues must be made alike."""

    digest: str
    labels: tuple[str, ...]
    sites: tuple[str, ...]
    readers: tuple[str, ...]  # a fingerprint of each
    top: int
    sample: int
    context: int
    skip: int
    seed: int
    model: str = ""


@dataclass(eq=False)
class Harvest:
    """What was kept, by site or by the name of `Units`: `tallies`, the `shelf` of tokens, and the `sampler`'s places.

    A unit is named as neurons are: `layers.3.mlp.neurons.17`, or `NAME.17` for units of your own.
    """

    plan: Plan
    tallies: dict[str, Tally]
    sampler: Sampler
    shelf: Shelf
    readers: dict[str, Units]
    count: int = 0  # tokens
    read: Place = field(default_factory=Place)  # how far the corpus was read

    def __repr__(self) -> str:
        units = sum(len(tally.top) for tally in self.tallies.values())
        of = f" of {self.plan.model}" if self.plan.model else ""
        return (
            f"<Harvest{of}: {units} units at {len(self.tallies)} sites, {self.read.texts} texts, {self.count} tokens>"
        )

    @property
    def names(self) -> list[str]:
        return list(self.tallies)

    def tally(self, name: str) -> Tally:
        """InputError for a site that was not harvested."""
        if name not in self.tallies:
            raise InputError(f"{name!r} was not harvested{nearest(name, self.tallies)}")
        return self.tallies[name]

    def find(self, unit: str) -> tuple[str, int]:
        """The site (or name) and the number of a unit. InputError if it was not harvested."""
        unit = str(unit)
        if unit in self.tallies and len(self.tallies[unit].top) == 1:
            return unit, 0
        name, _, number = unit.rpartition(".")
        tally = self.tally(name if number.isdigit() else unit)
        if not number.isdigit() or int(number) >= len(tally.top):
            raise InputError(
                f"{unit!r} is no unit of this harvest: write {name or unit}.N, N from 0 to {len(tally.top) - 1}"
            )
        return name, int(number)

    # ---- one unit

    def top(self, unit: str) -> list[Moment]:
        """The largest activations, largest first."""
        name, n = self.find(unit)
        tally = self.tallies[name]
        found = tally.places[n] >= 0
        return _moments(tally.top[n][found], tally.places[n][found])

    def sampled(self, unit: str) -> list[Moment]:
        """The activations at the uniform sample of tokens, in the order of the corpus."""
        name, n = self.find(unit)
        places, values = self.sample(name)
        order = places.argsort()
        return _moments(values[order, n], places[order])

    def binned(self, unit: str, edges: Sequence[float] = (0, 0.5, 0.9, 0.99, 1), each: int = 4) -> list[list[Moment]]:
        """At most `each` moments of the uniform sample from every bin between two quantiles, lowest bin first.

        Within a bin they stand in the order in which they were drawn, so the first ones are a uniform sample of the bin.
        """
        name, n = self.find(unit)
        places, values = self.sample(name)
        x = values[:, n]
        ranks = torch.empty(len(x), dtype=torch.float64)
        ranks[x.argsort(stable=True)] = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        bins = [(ranks >= low) & (ranks < high) for low, high in pairwise(edges)]
        return [_moments(x[inside][:each], places[inside][:each]) for inside in bins]

    def histogram(self, unit: str, bins: int = 40) -> tuple[Tensor, Tensor]:
        """Edges [bins + 1] and counts [bins] over all tokens: exact among the largest k, beneath them the sample's share."""
        name, n = self.find(unit)
        tally, (_, x) = self.tallies[name], self.sample(name)
        x, top = x[:, n], tally.top[n][tally.places[n] >= 0]
        edges = torch.linspace(float(min(x.min(), top.min())), float(top.max()), bins + 1)
        below = x[x < top.min()]
        scale = (self.count - len(top)) / max(1, len(below))
        ends = edges.clone()
        ends[-1] = torch.inf
        counts = [
            torch.bincount((torch.bucketize(y, ends, right=True) - 1).clamp(0, bins - 1), minlength=bins)
            for y in (below, top)
        ]
        return edges, counts[0] * scale + counts[1]

    # ---- all units of a site

    def sample(self, name: str) -> tuple[Tensor, Tensor]:
        """Places [sample] and activations [sample, unit] of the uniform sample, in the order in which they were drawn."""
        order = self.sampler.keys.argsort(stable=True)[: min(self.count, len(self.sampler.keys))]
        return self.sampler.places[order], self.tally(name).sample[order]

    def mean(self, name: str) -> Tensor:
        """[unit] over all tokens."""
        return self.tally(name).mean

    def std(self, name: str) -> Tensor:
        """[unit] over all tokens."""
        return self.tally(name).std

    def positive(self, name: str) -> Tensor:
        """[unit] the share of tokens with a positive activation."""
        return self.tally(name).positive / self.count

    def quantiles(self, name: str, q: Sequence[float]) -> Tensor:
        """[quantile, unit] of the uniform sample, with linear interpolation."""
        if not all(0 <= each <= 1 for each in q):
            raise InputError(f"quantiles {list(q)}: expected numbers from 0 to 1")
        return self.sample(name)[1].quantile(torch.tensor(q, dtype=torch.float32), dim=0)

    def coactivation(self, unit: str, name: str | None = None) -> Tensor:
        """[unit] correlation of one unit with all units of its site (or of `name`) over the sample; NaN for constants."""
        own, n = self.find(unit)
        x, y = self.sample(own)[1][:, n].double(), self.sample(name or own)[1].double()
        x, y = x - x.mean(), y - y.mean(0)
        return ((x @ y) / (x.norm() * y.norm(dim=0))).float()

    # ---- contexts

    def tokens(self, prompt: int) -> list[int]:
        """The token ids of a prompt."""
        return self.shelf.row(prompt)

    def check(self, model: Model) -> None:
        """InputError if the harvest is of other weights."""
        check_weights(model, self.plan.digest, "this harvest")

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write the folder `harvest(path=...)` writes, from a harvest in memory. InputError if it exists."""
        folder = Path(path)
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{str(path)!r} is not empty: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write_units(folder, self.readers)
        shelf = Shelf(folder)
        for first, end in zip(self.shelf.firsts, [*self.shelf.firsts[1:], len(self.shelf)], strict=True):
            rows = range(first, end)
            shelf.append({name: [self.shelf.row(i, name) for i in rows] for name in ("given", "read")})
        replace(self, shelf=shelf)._write()
        return folder

    def _write(self) -> None:
        """The state counts once the index names it, and the index is replaced in one step."""
        folder = self.shelf.folder
        assert folder is not None
        number = len(self.shelf.firsts)
        state = {
            f"{i}/{key}": value for i, tally in enumerate(self.tallies.values()) for key, value in tally.state.items()
        }
        state |= {"keys": self.sampler.keys, "places": self.sampler.places}
        save_file(state, str(folder / f"state-{number:05d}.safetensors"))
        about = {"pellucid-harvest": VERSION, **asdict(self.plan), "count": self.count}
        about |= {"firsts": self.shelf.firsts, "prompts": len(self.shelf), "read": asdict(self.read)}
        part = folder / (INDEX + ".part")
        part.write_text(json.dumps(about, indent=1))
        part.replace(folder / INDEX)
        for old in folder.glob("state-*.safetensors"):
            if old.name != f"state-{number:05d}.safetensors":
                old.unlink()

    @classmethod
    @technique
    def load(cls, path: str | Path, units: Sequence[Units] = ()) -> Harvest:
        """What was harvested into a folder; `check(model)` says whether it belongs to a model.

        Directions and dictionaries come back with it. Other functions do not: where their activations are to be computed
        again, give those `units` as they were. InputError if it is no harvest, or for other units.
        """
        made = cls._read(Path(path))
        given = {u.label: u for u in units}
        for i, (label, site) in enumerate(zip(made.plan.labels, made.plan.sites, strict=True)):
            own = given.get(label)
            if own is not None and fingerprint(own.read) != made.plan.readers[i]:
                raise InputError(f"{label!r} was harvested with another function or other directions than those given")
            made.readers[label] = own or Units(site, _read_units(Path(path), i, made.plan.readers[i]), label)
        return made

    @classmethod
    def _read(cls, folder: Path) -> Harvest:
        """Without its readers."""
        try:
            about = json.loads((folder / INDEX).read_text())
            if (version := about.pop("pellucid-harvest")) != VERSION:
                raise InputError(
                    f"{str(folder)!r} was written by another version of pellucid ({version}): harvest again"
                )
            count, firsts, prompts, read = (about.pop(key) for key in ("count", "firsts", "prompts", "read"))
            stated: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
            plan = Plan(**stated)
            state = load_file(str(folder / f"state-{len(firsts):05d}.safetensors"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(folder)!r} is no harvest: expected a folder with a readable {INDEX}") from error
        tallies = {
            label: Tally(**{key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{i}/")})
            for i, label in enumerate(plan.labels)
        }
        sampler = Sampler(state["keys"], state["places"], plan.seed)
        return cls(plan, tallies, sampler, Shelf(folder, firsts, prompts), {}, count, Place(**read))


@technique
def harvest(
    model: Model,
    texts: Any,
    sites: Sites = "layers.*.mlp.neurons",
    *,
    path: str | Path | None = None,
    top: int = 20,
    sample: int = 1024,
    context: int | None = None,
    skip: int = 0,
    batch_tokens: int = TOKENS,
    seed: int = 0,
    on: Where | None = None,
) -> Harvest:
    """Run the texts once and keep of every unit what `Harvest` says.

    `texts` are what `pl.Corpus` takes, or one: strings, token ids, pairs (source, target) for an encoder-decoder, rows of
    `datasets`, a file of lines, in a list or as they come. One of more than `context` tokens (256, or what the model holds)
    is read in several rows, "prompts" of the harvest, unless a Corpus says otherwise. `sites` are sites of one stack (with `*`), or `Units`:
    directions or features read at a site. `top` is k, `sample` the size of the uniform sample, drawn by `seed`; the first
    `skip` tokens of each row do not count (a decoder's first token is often a sink with activations of its own). Up to
    `batch_tokens` tokens are run at once. With a `path` (a folder) the harvest is kept on disk and an interrupted one
    continues. `on` (or `with pl.on(...)`): where segments are read (`pl.Processes(2)`, `pl.Ray(8)`); what comes out is the same to the
    last bit, and units must be sites, directions or dictionaries there. InputError for sites of several stacks or without positions, for a folder that holds another harvest, and for
    texts that are none, by their number.

    >>> found = harvest(model, texts, "layers.*.mlp.neurons", path="neurons")
    >>> found.top("layers.3.mlp.neurons.17")[0]
    Moment(value=..., prompt=..., position=...)
    """
    context = min(CONTEXT, longest(model)) if context is None else context
    at_least(1, top=top, sample=sample, context=context, batch_tokens=batch_tokens)
    at_least(0, skip=skip)
    corpus = Corpus.of(texts, context=context, packed=False, long="windows")
    readers = _readers(model, sites)
    for units in readers.values():
        if isinstance(units.read, Dictionary):
            units.read.check(model)
    plan = Plan(
        model.digest, tuple(readers), tuple(u.site for u in readers.values()),
        tuple(fingerprint(u.read) for u in readers.values()), top, sample, corpus.context or context, skip, seed, model.name,
    )  # fmt: skip
    made = _begin(plan, readers, None if path is None else Path(path))
    size = len(corpus.texts) if hasattr(corpus.texts, "__len__") else None
    coming = segments(corpus.rows(model, after=made.read), SEGMENT)
    with progress[Any](what="texts harvested", total=size, done=made.read.texts) as bar:
        where = on or current()
        counted = partial(_here, bar=bar) if where is None else partial(_away, on=where, bar=bar)
        for segment, rows in counted(model, made, coming, batch_tokens):
            order = made.sampler.sort()  # as it is whoever counted, and in which batches
            for tally in made.tallies.values():
                tally.sample = tally.sample[order]
            _put_away(made.shelf, segment, rows)
            made.read = segment[-1].place
            if path is not None:
                made._write()
    if not made.count:
        raise InputError("no token was counted: give texts of more tokens than are skipped")
    return made


Segments = Iterator[tuple[list[Row], dict[int, list[int]]]]  # rows, and the tokens that each was read as


def _here(model: Model, made: Harvest, coming: Iterator[list[Row]], tokens: int, bar: Any = None) -> Segments:
    """Every segment once it is counted in."""
    special = special_ids(model.tokenizer)
    for segment in coming:
        rows: dict[int, list[int]] = {}
        for group in by_length(segment, tokens):
            rows |= _run(model, made, group, special)
            if bar is not None:
                bar.step(len(group))
        for tally in made.tallies.values():
            tally.close()
        yield segment, rows


def _away(model: Model, made: Harvest, coming: Iterator[list[Row]], tokens: int, on: Where, bar: Any) -> Segments:
    """The same, counted by workers."""
    waiting: list[list[Row]] = []

    def pieces() -> Iterator[list[Any]]:
        for segment in coming:
            waiting.append(segment)
            yield [[row.number, list(row.ids), row.decoder] for row in segment]

    errand = Errand(model, "neurons.harvest:Counted", lambda: _said(made, tokens))
    for _, found in done(errand, pieces(), on):
        about, parts = heard(found.pop("about")), dict[str, Tensors]()
        for name, value in found.items():
            label, _, key = name.partition("/")
            parts.setdefault(label, {})[key] = value
        own = parts.pop("sampler", {})
        if parts:
            taken = made.sampler.offer(own["keys"], own["places"])
            for i, name in enumerate(made.readers):
                if name not in made.tallies:
                    made.tallies[name] = Tally.empty(len(parts[str(i)]["mean"]), made.plan.top, made.plan.sample)
                made.tallies[name].take(parts[str(i)], taken)
        made.count += about["count"]
        bar.step(len(waiting[0]))
        yield waiting.pop(0), {int(number): ids for number, ids in about["rows"].items()}


def _said(made: Harvest, tokens: int) -> Values:
    """What a worker is told. Refused for units that are a function."""
    tensors: Tensors = {}
    dictionaries: dict[str, str] = {}
    for i, units in enumerate(made.readers.values()):
        if isinstance(units.read, Tensor):
            tensors[f"{i}"] = units.read.detach().cpu().contiguous()
        elif isinstance(units.read, Dictionary):
            with tempfile.TemporaryDirectory() as folder:
                kept = units.read.save(Path(folder))
                dictionaries[str(i)] = (kept / saelens.CONFIG).read_text()
                tensors |= {f"{i}/{name}": x.clone() for name, x in load_file(str(kept / saelens.WEIGHTS)).items()}
        elif units.read is not None:
            raise Refused(
                f"{units.label!r} is a function of your own, which workers do not have: give directions or a Dictionary, or harvest here"
            )
    return {"plan": asdict(made.plan), "tokens": tokens, "dictionaries": dictionaries}, tensors


class Counted(Work):
    """What one segment adds to a harvest; a piece is its rows."""

    errand = "harvest of units"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.model, self.tokens, self.readers = model, about["tokens"], dict[str, Units]()
        plan: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["plan"].items()}
        self.plan = Plan(**plan)
        for i, (label, site) in enumerate(zip(self.plan.labels, self.plan.sites, strict=True)):
            read: Any = tensors.get(str(i))
            if settings := about["dictionaries"].get(str(i)):
                with tempfile.TemporaryDirectory() as folder:
                    own = {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{i}/")}
                    save_file(own, str(Path(folder) / saelens.WEIGHTS))
                    (Path(folder) / saelens.CONFIG).write_text(settings)
                    read = Dictionary.load(folder)
            self.readers[label] = Units(site, read, label)

    def __call__(self, piece: Sequence[Any]) -> Tensors:
        segment = [Row(number, tuple(ids), 0, decoder) for number, ids, decoder in piece]
        made = Harvest(self.plan, {}, Sampler.empty(self.plan.sample, self.plan.seed), Shelf(), self.readers)
        ((_, rows),) = _here(self.model, made, iter([segment]), self.tokens)
        used = made.sampler.places >= 0
        found = {"about": told({"count": made.count, "rows": rows})}
        if made.count:
            found |= {"sampler/keys": made.sampler.keys[used], "sampler/places": made.sampler.places[used]}
        for i, tally in enumerate(made.tallies.values()):
            own = {**tally.state, "sample": tally.sample[used]}
            found |= {f"{i}/{name}": value.contiguous() for name, value in own.items()}
        return found


def _readers(model: Model, sites: Sites) -> dict[str, Units]:
    """Units by name, one for each concrete site."""
    found: dict[str, Units] = {}
    for given in [sites] if isinstance(sites, (str, Units)) else listed("sites", sites, "addresses of units"):
        units = given if isinstance(given, Units) else Units(given)
        concrete = model.sites(units.site)
        for site in concrete:
            if "position" not in site.dims or site.at is not None:
                raise InputError(f"{str(site)!r} has no value at every token: name a site with positions, without '@'")
            name = units.name if len(concrete) == 1 else f"{units.name}.{site}" if units.name else ""
            one = Units(str(site), units.read, name)
            if one.label in found:
                raise InputError(f"{one.label!r} is named twice: give Units a name of their own")
            found[one.label] = one
    if not found:
        raise InputError("there are no sites to harvest: name some, such as layers.*.mlp.neurons")
    if len({Site.parse(u.site).stack for u in found.values()}) > 1:
        raise InputError("these sites are of several stacks, which read different tokens: harvest them one by one")
    return found


def _begin(plan: Plan, readers: dict[str, Units], folder: Path | None) -> Harvest:
    if folder is None or not (folder / INDEX).exists():
        if folder is not None:
            if folder.is_file():
                raise InputError(f"{str(folder)!r} is a file: a harvest is kept in a folder")
            folder.mkdir(parents=True, exist_ok=True)
            _write_units(folder, readers)
        return Harvest(plan, {}, Sampler.empty(plan.sample, plan.seed), Shelf(folder), readers)
    made = Harvest._read(folder)
    differ = [key for key, value in asdict(plan).items() if key != "model" and value != getattr(made.plan, key)]
    if differ:
        raise InputError(f"{str(folder)!r} holds another harvest (other {', '.join(differ)}): use another folder")
    made.readers = readers
    return made


def _write_units(folder: Path, readers: Mapping[str, Units]) -> None:
    """The readers that can be kept: directions and dictionaries."""
    for i, units in enumerate(readers.values()):
        if isinstance(units.read, Dictionary):
            units.read.save(folder / f"units-{i}")
        elif isinstance(units.read, Tensor):
            save_file({"directions": units.read.detach().cpu().contiguous()}, str(folder / f"units-{i}.safetensors"))


def _read_units(folder: Path, i: int, known: str) -> Tensor | Callable[[Tensor], Tensor] | None:
    if known == NONE:
        return None
    if (folder / f"units-{i}").exists():
        return Dictionary.load(folder / f"units-{i}")
    if (file := folder / f"units-{i}.safetensors").exists():
        return load_file(str(file))["directions"]
    return _lost


def _lost(values: Tensor) -> Tensor:
    raise InputError("this harvest has units of its own: give their function to Harvest.load(path, units=[...])")


def _run(model: Model, made: Harvest, group: Sequence[Row], special: frozenset[int]) -> dict[int, list[int]]:
    """Count one batch in; returns the tokens each prompt was read as."""
    given = inputs(model, group)
    sites = {name: Site.parse(u.site) for name, u in made.readers.items()}
    stream = stream_of(given, next(iter(sites.values())))
    ids, real = stream.ids.cpu(), stream.mask.bool().cpu()
    rows = {row.number: ids[i][real[i]].tolist() for i, row in enumerate(group)}
    columns = torch.arange(ids.shape[1])
    position = columns - stream.starts.cpu()[:, None]
    counted = real & (position >= made.plan.skip)
    if special:
        counted &= ~torch.isin(ids, torch.tensor(sorted(special)))
    chosen = counted.flatten().nonzero()[:, 0]
    if not len(chosen):
        return rows
    number = torch.tensor([row.number for row in group])[:, None]
    places = place(number.expand_as(position), position).flatten()[chosen]
    drawn = torch.zeros(ids.shape, dtype=torch.float64)
    for i, row in enumerate(group):
        drawn[i, real[i]] = made.sampler.draws(row.number, len(rows[row.number]))
    taken = made.sampler.offer(drawn.flatten()[chosen], places)
    everything = bool(counted.all())

    def counter(name: str) -> Callable[[Tensor], None]:
        def count(values: Tensor) -> None:
            flat = values.flatten(0, 1)
            block = made.readers[name].activations(flat if everything else flat[chosen.to(flat.device)])
            if name not in made.tallies:
                made.tallies[name] = Tally.empty(block.shape[1], made.plan.top, made.plan.sample)
            made.tallies[name].add(block, places, taken)

        return count

    watch(model.anatomy, given, together({name: counter(name) for name in sites}, sites))
    made.tallies = {name: made.tallies[name] for name in made.readers}  # as asked for, not as the blocks came
    made.count += len(chosen)
    return rows


def _put_away(shelf: Shelf, segment: Sequence[Row], rows: Mapping[int, list[int]]) -> None:
    given = [row.ids for row in segment]
    seen = [rows.get(row.number, []) for row in segment]
    alike = all(list(a) == b for a, b in zip(given, seen, strict=True))
    shelf.append({"given": given} if alike else {"given": given, "read": seen})


def _moments(values: Tensor, places: Tensor) -> list[Moment]:
    prompts, positions = where(places)
    return [Moment(*each) for each in zip(values.tolist(), prompts.tolist(), positions.tolist(), strict=True)]
