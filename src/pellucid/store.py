"""Activations of a corpus on disk: safetensors shards and one small index, written as a stream, read by rows.

A row is one real token of one prompt. Storing can be interrupted at any time: finished shards stay, and storing the same
texts again into the same folder continues after the last prompt they hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.corpus import Corpus, Place, Row, batches, inputs
from pellucid.engine.pausing import progress
from pellucid.engine.run import Run
from pellucid.engine.watching import run_until
from pellucid.errors import InputError, nearest
from pellucid.model import Model

INDEX = "index.json"


@dataclass
class Shard:
    """One file: how many rows it holds and the prompts [first, last) they come from."""

    file: str
    rows: int
    first: int
    last: int


@dataclass
class Index:
    """What a store holds and of which model."""

    sites: list[str]
    digest: str
    dtype: str
    shards: list[Shard] = field(default_factory=list)
    corpus: dict[str, Any] = field(default_factory=dict)  # how its texts were cut
    place: dict[str, Any] = field(default_factory=dict)  # how far they were read


class ActivationStore:
    """A folder of activations: `store[site]` gives all rows, `store.rows(site, index)` some, `store.batches(site, n)` a stream.

    Every site's rows are [rows, ...] with the dimensions of the site after batch and position; `tokens`, `prompts` and
    `positions` say where each row comes from.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            raw = json.loads((self.path / INDEX).read_text())
            self.index = Index(**{**raw, "shards": [Shard(**s) for s in raw["shards"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{str(path)!r} is no activation store: expected a folder with a readable {INDEX}"
            ) from error

    def __len__(self) -> int:
        return sum(s.rows for s in self.index.shards)

    @property
    def sites(self) -> list[str]:
        return self.index.sites

    @property
    def tokens(self) -> Tensor:
        """[rows] token ids."""
        return self["tokens"]

    def __getitem__(self, site: str | Site) -> Tensor:
        return torch.cat(list(self._shards(self._name(site))))

    def rows(self, site: str | Site, rows: Sequence[int] | Tensor) -> Tensor:
        """Some rows of a site, in the order asked for, reading only the shards they lie in."""
        name = self._name(site)
        wanted = torch.as_tensor(rows, dtype=torch.long)
        if len(wanted) and not (int(wanted.min()) >= 0 and int(wanted.max()) < len(self)):
            raise InputError(
                f"rows {int(wanted.min())} to {int(wanted.max())} were asked for; the store has {len(self)}"
            )
        out: Tensor | None = None
        start = 0
        for shard in self.index.shards:
            here = (wanted >= start) & (wanted < start + shard.rows)
            if bool(here.any()):
                values = self._read(shard, name)[wanted[here] - start]
                out = values.new_empty(len(wanted), *values.shape[1:]) if out is None else out
                out[here] = values
            start += shard.rows
        if out is None:
            raise InputError("no rows were asked for")
        return out

    def batches(self, site: str | Site, size: int) -> Iterator[Tensor]:
        """Rows in order, `size` at a time, with one shard in memory."""
        rest: Tensor | None = None
        for values in self._shards(self._name(site)):
            values = values if rest is None else torch.cat([rest, values])
            whole = len(values) - len(values) % size
            yield from values[:whole].split(size)
            rest = values[whole:]
        if rest is not None and len(rest):
            yield rest

    def shards(self, site: str | Site, numbers: Sequence[int]) -> Tensor:
        """All rows of some shards, in the order asked for."""
        return torch.cat([self._read(self.index.shards[n], self._name(site)) for n in numbers])

    def _shards(self, name: str) -> Iterator[Tensor]:
        return (self._read(s, name) for s in self.index.shards)

    def _read(self, shard: Shard, name: str) -> Tensor:
        with safe_open(str(self.path / shard.file), framework="pt") as f:
            return f.get_tensor(name)

    def _name(self, site: str | Site) -> str:
        name = str(site)
        known = [*self.index.sites, "tokens", "prompts", "positions"]
        if name not in known:
            name = str(Site.parse(name))
        if name not in known:
            raise InputError(f"the store does not hold {name!r}{nearest(name, known)}")
        return name


def store_activations(
    model: Model,
    texts: Any,
    sites: Sequence[str | Site],
    path: str | Path,
    *,
    batch: int = 16,
    shard_rows: int = 20_000,
    dtype: torch.dtype = torch.float16,
    compute: torch.dtype | None = None,
) -> ActivationStore:
    """Run texts as far as the last of some sites (of one stack) and keep their activations for every real token.

    `texts` are read one a row (see `Corpus`, which also says what to do with long ones: here they are refused). Values are
    stored as `dtype`; `compute` lets the model's products run in a smaller one (autocast), such as bfloat16. InputError if the
    folder holds activations of other sites, another model, or of texts that did not begin like these.
    """
    names = [str(s) for pattern in sites for s in model.sites(pattern)]
    given = Corpus.of(texts, packed=False, long="refuse")
    about = {"context": given.context, "packed": given.packed, "long": given.long, "batch": batch}
    index = _continue(Path(path), Index(names, model.digest, str(dtype).removeprefix("torch."), corpus=about))
    pending: dict[str, list[Tensor]] = {}
    held = 0

    def keep(rows: list[Row]) -> None:
        first = index.shards[-1].last if index.shards else 0
        values = {name: torch.cat(parts) for name, parts in pending.items()}
        index.place = asdict(rows[-1].place)
        _write(Path(path), index, values, first, rows[-1].number + 1)
        pending.clear()

    rows: list[Row] = []
    for rows in progress(batches(given.rows(model, after=Place(**index.place)), batch), "batches stored"):
        with torch.autocast(_device(model), compute, enabled=compute is not None):
            run = run_until(model.anatomy, inputs(model, rows), names)
        for name, values in _values(run, names, rows, dtype).items():
            pending.setdefault(name, []).append(values)
        held += len(pending["tokens"][-1])
        if held >= shard_rows:
            keep(rows)
            held = 0
    if pending:
        keep(rows)
    if not index.shards:
        raise InputError("there is no text whose activations could be stored: give some")
    return ActivationStore(path)


def _continue(path: Path, new: Index) -> Index:
    if not (path / INDEX).exists():
        path.mkdir(parents=True, exist_ok=True)
        return new
    index = ActivationStore(path).index
    for what, name in (
        ("sites", "sites"),
        ("a model", "digest"),
        ("dtype", "dtype"),
        ("ways to read a corpus", "corpus"),
    ):
        before, now = getattr(index, name), getattr(new, name)
        if before != now:
            raise InputError(
                f"{str(path)!r} was stored with other {what} ({before!r}, now {now!r}): use another folder"
            )
    return index


def _device(model: Model) -> str:
    return next((p.device.type for p in model.module.parameters()), "cpu")


def _values(run: Run, names: list[str], rows: list[Row], dtype: torch.dtype) -> dict[str, Tensor]:
    stream = run.stream(Site.parse(names[0]))
    real = stream.mask.bool().cpu()
    row, column = real.nonzero(as_tuple=True)
    out = {
        "tokens": stream.ids.cpu()[real],
        "prompts": torch.tensor([r.number for r in rows])[row],
        "positions": column - stream.starts.cpu()[row],
    }
    for name in names:
        values, _ = run.everywhere(Site.parse(name))
        out[name] = values.cpu()[real].to(dtype).contiguous()
    return out


def _write(path: Path, index: Index, rows: dict[str, Any], first: int, last: int) -> None:
    """A shard counts only once the index names it, and the index is replaced in one step."""
    file = f"shard-{len(index.shards):05d}.safetensors"
    save_file(rows, str(path / file))
    index.shards.append(Shard(file, len(rows["tokens"]), first, last))
    part = path / (INDEX + ".part")
    part.write_text(json.dumps(asdict(index), indent=1))
    part.replace(path / INDEX)
