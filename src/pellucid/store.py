"""Activations of a corpus on disk: safetensors shards and one journal, written as a stream by one or several writers, read by rows.

A row is one real token of one prompt. A shard counts once the journal has its line, which is written last; so storing may be
killed at any moment: finished shards stay, and storing the same texts again into the same folder goes on behind them, to the
same bits. Which tokens go into which shard depends on the texts alone, not on who writes or how often that was interrupted.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.corpus import Corpus, Place, Row, batches, inputs
from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.engine.pausing import pause, progress
from pellucid.engine.run import Run
from pellucid.engine.sweep import Where, current
from pellucid.engine.watching import run_until
from pellucid.errors import InputError, PellucidError, Refused, nearest
from pellucid.model import Model
from pellucid.workers.errand import Errand, Tensors, Work, done

INDEX, VERSION = "index.jsonl", 2
COLUMNS = ("tokens", "prompts", "positions")
WINDOW = 16  # shards in memory at once, where rows are shuffled
SHARE_SEED = 7919  # parts the draws of a sample from other draws by the same seed


@dataclass
class Shard:
    """One file: how many rows it holds and the prompts [first, last) they come from.

    `errors` are, of every site that is kept as int8, the sums of squares of what was lost and of what was there, and the largest
    share lost of one row.
    """

    file: str
    rows: int
    first: int
    last: int
    place: dict[str, Any] = field(default_factory=dict)  # how far the texts were read
    errors: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Index:
    """What a store holds and of which model."""

    sites: list[str]
    digest: str
    dtype: str
    corpus: dict[str, Any] = field(default_factory=dict)  # how its texts were cut
    shards: list[Shard] = field(default_factory=list)

    @property
    def place(self) -> dict[str, Any]:
        """How far the texts were read."""
        return self.shards[-1].place if self.shards else {}

    @property
    def head(self) -> dict[str, Any]:
        about = {"sites": self.sites, "digest": self.digest, "dtype": self.dtype, "corpus": self.corpus}
        return {"pellucid-store": VERSION, **about}


class ActivationStore:
    """A folder of activations: `store[site]` gives all rows, `store.rows(site, index)` some, `store.batches(site, n)` a stream in
    order, `store.shuffled(site, n)` one in random order.

    Every site's rows are [rows, ...] with the dimensions of the site after batch and position; `tokens`, `prompts` and
    `positions` say where each row comes from. Rows that are kept as int8 come back as float32; `error(site)` is what that lost.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.index, _ = _read_index(self.path)
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"{str(path)!r} is no activation store: expected a folder with a readable {INDEX}"
            ) from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(s.rows for s in self.index.shards))

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
        """Some rows of a site, in the order asked for, reading only the pages they lie on."""
        name = self._name(site)
        wanted = torch.as_tensor(rows, dtype=torch.long)
        if not len(wanted):
            raise InputError("no rows were asked for")
        if not (int(wanted.min()) >= 0 and int(wanted.max()) < len(self)):
            raise InputError(
                f"rows {int(wanted.min())} to {int(wanted.max())} were asked for; the store has {len(self)}"
            )
        ends = torch.tensor(self._ends)
        which = torch.searchsorted(ends, wanted, right=True)
        out: Tensor | None = None
        for number in which.unique().tolist():
            here = (which == number).nonzero()[:, 0]
            shard = self.index.shards[number]
            values = self._read(shard, name, wanted[here] - (self._ends[number] - shard.rows))
            out = values.new_empty(len(wanted), *values.shape[1:]) if out is None else out
            out[here] = values
        assert out is not None
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

    def shuffled(
        self, sites: str | Site | Sequence[str | Site], size: int, *, seed: int = 0, window: int = WINDOW
    ) -> Iterator[Any]:
        """Every row once in random order, `size` at a time (the last may be smaller): shards in random order, read from end to end,
        and the rows of `window` of them mixed. The order depends on the seed alone. Of several sites: tuples, row by row alike.

        >>> next(store.shuffled("layers.3.resid_post", 64, seed=1)).shape
        torch.Size([64, 32])
        """
        several = not isinstance(sites, str | Site)
        names = [self._name(sites)] if isinstance(sites, str | Site) else [self._name(site) for site in sites]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.index.shards), generator=generator).tolist()
        rest: list[Tensor] | None = None
        for i in range(0, len(order), window):
            values = [self._window(name, order[i : i + window]) for name in names]
            mixed = torch.randperm(len(values[0]), generator=generator)
            whole = len(mixed) + (0 if rest is None else len(rest[0]))
            taken = 0
            if rest is not None:  # what was left over comes first
                taken = min(len(mixed), size - len(rest[0]))
                rest = [torch.cat([r, v[mixed[:taken]]]) for r, v in zip(rest, values, strict=True)]
                if len(rest[0]) < size:
                    continue
                yield tuple(rest) if several else rest[0]
                whole -= size
            ends = taken + whole - whole % size
            for rows in mixed[taken:ends].split(size) if ends > taken else ():
                found = [v.index_select(0, rows) for v in values]
                yield tuple(found) if several else found[0]
            rest = [v[mixed[ends:]] for v in values] if ends < len(mixed) else None
        if rest is not None and len(rest[0]):
            yield tuple(rest) if several else rest[0]

    def shards(self, site: str | Site, numbers: Sequence[int]) -> Tensor:
        """All rows of some shards, in the order asked for."""
        return torch.cat([self._read(self.index.shards[n], self._name(site)) for n in numbers])

    def error(self, site: str | Site) -> tuple[float, float]:
        """What int8 lost: the root of the mean square of what was lost over that of what was there, of all rows, and of the worst row. Rows
        with a few huge values (the first token of many models) lose most: do not take statistics of those from int8. (0, 0) elsewhere.
        """
        each = [s.errors[self._name(site)] for s in self.index.shards if s.errors]
        if not each:
            return 0.0, 0.0
        lost, there = (sum(e[i] for e in each) for i in (0, 1))
        return (lost / max(there, 1e-300)) ** 0.5, max(e[2] for e in each)

    def _shards(self, name: str) -> Iterator[Tensor]:
        return (self._read(s, name) for s in self.index.shards)

    def _read(self, shard: Shard, name: str, rows: Tensor | None = None) -> Tensor:
        with safe_open(str(self.path / shard.file), framework="pt") as f:
            values: Tensor = f.get_tensor(name)
            scale = f.get_tensor(name + SCALE) if values.dtype == torch.int8 else None
        if rows is not None:
            values, scale = values[rows], None if scale is None else scale[rows]
        return values if scale is None else values.float() * scale.view(-1, *[1] * (values.ndim - 1))

    def _window(self, name: str, numbers: Sequence[int]) -> Tensor:
        """All rows of some shards, read from end to end into one piece of memory: a map would fetch them page by page."""
        shards = [self.index.shards[n] for n in numbers]
        with safe_open(str(self.path / shards[0].file), framework="pt") as f:
            like: Tensor = f.get_tensor(name)
        if like.dtype == torch.int8:
            return torch.cat([self._read(shard, name) for shard in shards])
        made = torch.empty(sum(s.rows for s in shards), *like.shape[1:], dtype=like.dtype)
        bytes_of: Any = made.view(-1).view(torch.uint8).numpy()
        room, at = memoryview(bytes_of), 0
        for shard in shards:
            with (self.path / shard.file).open("rb", buffering=0) as file:
                size = int.from_bytes(file.read(8), "little")
                first, end = json.loads(file.read(size))[name]["data_offsets"]
                file.seek(8 + size + first)
                while first < end:
                    read = file.readinto(room[at : at + end - first])
                    if not read:
                        raise InputError(
                            f"{shard.file} of the store {str(self.path)!r} is shorter than it says: store it again"
                        )
                    first, at = first + read, at + read
        return made

    def _name(self, site: str | Site) -> str:
        name = str(site)
        known = [*self.index.sites, *COLUMNS]
        if name not in known:
            name = str(Site.parse(name))
        if name not in known:
            raise InputError(f"the store does not hold {name!r}{nearest(name, known)}")
        return name


SCALE = ".scale"


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
    sample: float | None = None,
    seed: int = 0,
    on: Where | None = None,
) -> ActivationStore:
    """Run texts as far as the last of some sites (of one stack) and keep their activations for every real token, or for the share
    `sample` of them, each token drawn by itself (`seed`).

    `texts` are read one a row (see `Corpus`, which also says what to do with long ones: here they are refused). Values are
    stored as `dtype`: a floating-point one, or torch.int8 with one scale for each row (`store.error(site)` says what that loses).
    `compute` lets the model's products run in a smaller one (autocast), such as bfloat16. A shard ends with the batch that brings
    it to `shard_rows` tokens. `on`: several writers (`pl.Processes(2)`, `pl.Ray(8)`), which write where they see the folder and send
    their shards here where they do not; what is stored is the same. InputError if the
    folder holds activations of other sites, another model, or of texts that did not begin like these; PellucidError where the disk
    is full: finished shards stay.

    >>> store_activations(model, texts, ["layers.15.resid_post"], "store", dtype=torch.int8).sites
    ['layers.15.resid_post']
    """
    names = [str(s) for pattern in sites for s in model.sites(pattern)]
    if not (dtype.is_floating_point or dtype == torch.int8):
        raise InputError(f"activations are kept as floating-point numbers or as torch.int8, not as {dtype}")
    if sample is not None and not 0 < sample <= 1:
        raise InputError(f"sample={sample}: expected the share of tokens that is kept, above 0 and at most 1")
    given, folder = Corpus.of(texts, packed=False, long="refuse"), Path(path)
    about: dict[str, Any] = {"context": given.context, "packed": given.packed, "long": given.long, "batch": batch}
    about |= {"shard_rows": shard_rows} | ({} if sample is None else {"sample": sample, "seed": seed})
    there: Any = on or current()
    if hasattr(there, "execute"):  # its rounding is another: a store has one reader
        if compute is not None:
            raise Refused(f"{there!r} computes in the model's dtype: leave compute= out")
        about |= {"reader": there.name}
    index = _continue(folder, Index(names, model.digest, str(dtype).removeprefix("torch."), about))
    told: dict[str, Any] = {
        "sites": names,
        "dtype": index.dtype,
        "path": str(folder.resolve()),
        "sample": sample,
        "seed": seed,
    }
    told |= {
        "compute": None if compute is None else str(compute).removeprefix("torch."),
        "mark": f"writing-{uuid4().hex}",
    }
    errand = Errand(model, "store:Shards", lambda: (told, {}))
    waiting: list[
        tuple[int, int, Place]
    ] = []  # of pieces that are out: rows of the corpus, its last row, how far it was read

    def pieces() -> Iterator[dict[str, Any]]:
        rows = batches(given.rows(model, after=Place(**index.place)), batch)
        for number, groups in enumerate(_shards(rows, shard_rows), len(index.shards)):
            last = groups[-1][-1]
            waiting.append((sum(map(len, groups)), last.number + 1, last.place))
            yield {
                "number": number,
                "batches": [[[r.number, list(r.ids), r.decoder] for r in group] for group in groups],
            }

    with _marked(folder, told["mark"]), progress[None](what="prompts stored") as bar, full_disk(folder):
        for piece, found in done(errand, pieces(), on):
            count, last, place = waiting.pop(0)
            file = _file(piece["number"])
            if "tokens" in found:  # a worker that does not see the folder
                _write(folder / file, {k: v for k, v in found.items() if not k.startswith("/")})
            errors = {name: found[f"/{name}"].tolist() for name in names if f"/{name}" in found}
            first = index.shards[-1].last if index.shards else 0
            shard = Shard(file, int(found["/rows"]), first, last, asdict(place), errors)
            _append(folder, asdict(shard))
            index.shards.append(shard)
            bar.step(count)
    if not index.shards:
        raise InputError("there is no text whose activations could be stored: give some")
    return ActivationStore(path)


def _shards(groups: Iterator[list[Row]], size: int) -> Iterator[list[list[Row]]]:
    """Batches that make a shard: the last one brings it to `size` tokens."""
    held: list[list[Row]] = []
    tokens = 0
    for group in groups:
        held.append(group)
        tokens += sum(len(row.ids) for row in group)
        if tokens >= size:
            yield held
            held, tokens = [], 0
    if held:
        yield held


class Shards(Work):
    """Runs the batches of a shard and writes it, or gives it back where the folder is not seen."""

    errand = "harvest"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.model, self.about, self.names = model, about, list(about["sites"])
        self.reader: Callable[[Inputs, list[str]], Run] = lambda given, sites: run_until(
            model.anatomy, given, sites
        )  # or vLLM's
        self.dtype = getattr(torch, about["dtype"])
        self.compute = None if about["compute"] is None else getattr(torch, about["compute"])

    def first(self) -> Tensors:
        """The probe's values at every site."""
        made = read_inputs(self.model.module, None, self.model.anatomy.inputs)
        run = run_until(self.model.anatomy, made, self.names)
        return {name: run.everywhere(Site.parse(name))[0].contiguous() for name in self.names}

    def __call__(self, piece: Mapping[str, Any]) -> Tensors:
        kept: dict[str, list[Tensor]] = {}
        for group in piece["batches"]:
            pause()
            rows = [Row(number, tuple(ids), 0, decoder) for number, ids, decoder in group]
            with torch.autocast(_device(self.model), self.compute, enabled=self.compute is not None):
                run = self.reader(inputs(self.model, rows), self.names)
            for name, values in self._values(run, rows).items():
                kept.setdefault(name, []).append(values)
        made = {name: torch.cat(parts) for name, parts in kept.items()}
        errors: Tensors = {}
        if self.dtype == torch.int8:
            for name in self.names:
                made[name], made[name + SCALE], errors[f"/{name}"] = narrowed(made[name])
        errors["/rows"] = torch.tensor(len(made["tokens"]))
        folder = Path(self.about["path"])
        if (folder / self.about["mark"]).exists():
            with full_disk(folder):
                _write(folder / _file(piece["number"]), made)
            return errors
        return made | errors

    def _values(self, run: Run, rows: list[Row]) -> Tensors:
        stream = run.stream(Site.parse(self.names[0]))
        real = stream.mask.bool().cpu()
        if self.about["sample"] is not None:
            for i, row in enumerate(rows):
                draw = np.random.default_rng((self.about["seed"], SHARE_SEED, row.number)).random(int(real[i].sum()))
                real[i, real[i].nonzero()[:, 0]] = torch.from_numpy(draw < self.about["sample"])
        row_of, column = real.nonzero(as_tuple=True)
        out = {
            "tokens": stream.ids.cpu()[real],
            "prompts": torch.tensor([r.number for r in rows])[row_of],
            "positions": column - stream.starts.cpu()[row_of],
        }
        kept = torch.float32 if self.dtype == torch.int8 else self.dtype
        for name in self.names:
            values, _ = run.everywhere(Site.parse(name))
            out[name] = values[real.to(values.device)].to(kept).cpu().contiguous()
        return out


def narrowed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as int8 [rows, ...] with their scales [rows]: x ~ scale * int8; and [sum of squares lost, of squares there, the worst row's
    relative loss].

    >>> narrowed(torch.tensor([[127.0, -1.0], [0.5, 0.25]]))[:2]
    (tensor([[127,  -1],
            [127,  64]], dtype=torch.int8), tensor([1.0000, 0.0039]))
    """
    flat = x.flatten(1).float()
    scale = (flat.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    whole = (flat / scale[:, None]).round().clamp(-127, 127)
    lost, there = (whole * scale[:, None] - flat).double().square().sum(1), flat.double().square().sum(1)
    worst = (lost / there.clamp_min(1e-300)).sqrt().max() if len(x) else lost.sum()
    return whole.to(torch.int8).view(x.shape), scale, torch.stack([lost.sum(), there.sum(), worst])


# ---- files


def _file(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _write(file: Path, tensors: Tensors) -> None:
    """A file that is there as a whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        save_file(tensors, str(part))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _append(folder: Path, line: Mapping[str, Any]) -> None:
    with (folder / INDEX).open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_index(folder: Path) -> tuple[Index, int]:
    """The journal, and how many of its bytes are whole lines: what comes after them was being written when its writer was killed."""
    raw = (folder / INDEX).read_bytes()
    whole = raw.rfind(b"\n") + 1
    head, *lines = [json.loads(line) for line in raw[:whole].splitlines()]
    if head.pop("pellucid-store") != VERSION:
        raise ValueError("another version")
    return Index(**head, shards=[Shard(**line) for line in lines]), whole


def _continue(folder: Path, new: Index) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.part"):
        left.unlink(missing_ok=True)
    if not (folder / INDEX).exists() or b"\n" not in (folder / INDEX).read_bytes()[:1_000_000]:
        with full_disk(folder):
            (folder / INDEX).write_text("")
            _append(folder, new.head)
        return new
    index = ActivationStore(folder).index
    for what, name in (
        ("sites", "sites"),
        ("a model", "digest"),
        ("dtype", "dtype"),
        ("ways to read a corpus", "corpus"),
    ):
        before, now = getattr(index, name), getattr(new, name)
        if before != now:
            raise InputError(
                f"{str(folder)!r} was stored with other {what} ({before!r}, now {now!r}): use another folder"
            )
    with (folder / INDEX).open("r+b") as file:
        file.truncate(_read_index(folder)[1])
    return index


@contextmanager
def _marked(folder: Path, name: str) -> Iterator[None]:
    """A file by which a writer knows that the folder it sees is this one."""
    mark = folder / name
    for left in folder.glob("writing-*"):
        left.unlink(missing_ok=True)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A full disk as one error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        raise PellucidError(
            f"the disk of {str(folder)!r} is full. Finished shards are kept: make room, and store the same texts into the same "
            "folder to go on"
        ) from error


def _device(model: Model) -> str:
    return next((p.device.type for p in model.module.parameters()), "cpu")
