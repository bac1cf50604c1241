"""Activations of a corpus on disk: safetensors shards and one small index, written as a stream, read by rows.

A row is one real token of one prompt. Harvesting can be interrupted at any time: finished shards stay, and harvesting
again into the same folder continues after the last prompt they hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pellucid.anatomy.sites import Site
from pellucid.engine.early import run_until
from pellucid.errors import InputError, nearest

if TYPE_CHECKING:
    from pellucid.engine.run import Run
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


class ActivationStore:
    """A harvested folder: `store[site]` gives all rows, `store.rows(site, index)` some, `store.batches(site, n)` a stream.

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


def harvest(
    model: Model,
    prompts: Sequence[str],
    sites: Sequence[str | Site],
    path: str | Path,
    *,
    batch: int = 16,
    shard_rows: int = 20_000,
    dtype: torch.dtype = torch.float16,
    compute: torch.dtype | None = None,
    progress: bool = True,
) -> ActivationStore:
    """Run the prompts as far as the last of some sites (of one stack) and keep their activations for every real token.

    They are stored as `dtype`; `compute` lets the model's products run in a smaller one (autocast), such as bfloat16.
    InputError if the folder holds activations of other sites or of another model.
    """
    names = [str(s) for pattern in sites for s in model.sites(pattern)]
    index = _continue(Path(path), names, model.digest, str(dtype).removeprefix("torch."))
    first = index.shards[-1].last if index.shards else 0
    pending: dict[str, list[Tensor]] = {}
    held, start = 0, first
    for at in tqdm(range(first, len(prompts), batch), unit="batch", disable=not progress):
        chunk = list(prompts[at : at + batch])
        with torch.autocast(_device(model), compute, enabled=compute is not None):
            run = run_until(model.anatomy, model.inputs(chunk), names)
        for name, values in _rows(run, names, at, dtype).items():
            pending.setdefault(name, []).append(values)
        held += len(pending["tokens"][-1])
        done = at + len(chunk)
        if held >= shard_rows or done == len(prompts):
            _write(Path(path), index, {k: torch.cat(v) for k, v in pending.items()}, start, done)
            pending, held, start = {}, 0, done
    return ActivationStore(path)


def _continue(path: Path, names: list[str], digest: str, dtype: str) -> Index:
    if not (path / INDEX).exists():
        path.mkdir(parents=True, exist_ok=True)
        return Index(names, digest, dtype)
    index = ActivationStore(path).index
    for what, old, new in (
        ("sites", index.sites, names),
        ("a model", index.digest, digest),
        ("dtype", index.dtype, dtype),
    ):
        if old != new:
            raise InputError(
                f"{str(path)!r} was harvested with other {what} ({old!r}, now {new!r}): use another folder"
            )
    return index


def _device(model: Model) -> str:
    return next((p.device.type for p in model.module.parameters()), "cpu")


def _rows(run: Run, names: list[str], first: int, dtype: torch.dtype) -> dict[str, Tensor]:
    stream = run.stream(Site.parse(names[0]))
    real = stream.mask.bool().cpu()
    prompt, position = real.nonzero(as_tuple=True)
    out = {
        "tokens": stream.ids.cpu()[real],
        "prompts": prompt + first,
        "positions": position - stream.starts.cpu()[prompt],
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
