"""A harvest is the same whoever writes it and however often it is killed; what breaks is said, and what is done stays."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pellucid as pl
from pellucid import store as stores
from pellucid.errors import InputError, PellucidError, Refused
from pellucid.neurons import Units
from pellucid.neurons.dictionaries import Dictionary, ReLU
from pellucid.store import INDEX, ActivationStore, store_activations
from tests.workers.lanes import InProcess, pool

SITES = ["layers.*.resid_post", "layers.1.mlp.neurons"]
TEXTS = [torch.randint(97, (3 + i % 9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(60)]


def same(a: ActivationStore, b: ActivationStore) -> bool:
    files = sorted(f.name for f in a.path.iterdir())
    return (
        a.index == b.index
        and files == sorted(f.name for f in b.path.iterdir())
        and all((a.path / name).read_bytes() == (b.path / name).read_bytes() for name in files)
    )


def stored(model: pl.Model, path: Path, **options: Any) -> ActivationStore:
    return store_activations(model, TEXTS, SITES, path, **{"batch": 4, "shard_rows": 40, **options})


def test_several_writers_store_what_one_does(model: pl.Model, tmp_path: Path) -> None:
    one, two = stored(model, tmp_path / "one"), stored(model, tmp_path / "two", on=pool())
    assert len(one.index.shards) > 6
    assert same(one, two)
    with pl.on(pool(3)):
        assert same(one, stored(model, tmp_path / "three"))


def test_a_writer_that_does_not_see_the_folder_sends_what_it_has(model: pl.Model, tmp_path: Path) -> None:
    class Elsewhere(InProcess):
        def ask(self, request: dict[str, Any], folder: Path) -> Any:
            if self.worker._work is not None and request["do"] == "run":
                self.worker._work[1].about["path"] = "/nowhere"  # type: ignore[attr-defined]
            return super().ask(request, folder)

    two = pool()
    two.lanes = [Elsewhere(), Elsewhere()]
    assert same(stored(model, tmp_path / "one"), stored(model, tmp_path / "two", on=two))


def test_a_harvest_killed_ten_times_ends_as_one_that_was_not(model: pl.Model, tmp_path: Path) -> None:
    whole = stored(model, tmp_path / "whole")
    begun = time.monotonic()
    stored(model, tmp_path / "timed")
    lasts = time.monotonic() - begun
    rng, kills = random.Random(0), 0
    for turn in range(200):
        child = os.fork()
        if not child:  # a process that is killed at any moment
            torch.set_num_threads(1)
            stored(model, tmp_path / "killed", dtype=torch.float16)
            os._exit(0)
        time.sleep(lasts * rng.random() * (0.3 if turn < 20 else 2))
        os.kill(child, signal.SIGKILL)
        kills += bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if kills >= 10:
            break
    assert kills >= 10
    assert same(whole, stored(model, tmp_path / "killed"))


def test_what_excites_units_is_the_same_whoever_counts(model: pl.Model, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules["pellucid.neurons.harvest"], "SEGMENT", 60)
    torch.manual_seed(0)
    own = Dictionary(
        torch.randn(32, 40), torch.randn(40), torch.randn(40, 32), torch.zeros(32), ReLU(), "layers.1.resid_post"
    )
    read = [
        "layers.*.mlp.neurons",
        Units("layers.0.resid_post", torch.randn(3, 32), "axes"),
        Units("layers.1.resid_post", own, "features"),
    ]
    options: dict[str, Any] = {"top": 5, "sample": 30, "skip": 1, "batch_tokens": 40}
    here, two = pl.neurons.harvest(model, TEXTS, read, **options), pool()
    there = pl.neurons.harvest(model, TEXTS, read, on=two, path=tmp_path / "kept", **options)
    with pl.on(pool(3)):
        again = pl.neurons.harvest(model, TEXTS[:20], read, path=tmp_path / "begun", **options)
        again = pl.neurons.harvest(model, TEXTS, read, path=tmp_path / "begun", **options)
    assert sum(r["do"] == "run" for lane in two.lanes for r in lane.asked) > 4  # type: ignore[attr-defined]
    for made in (there, pl.neurons.Harvest.load(tmp_path / "kept")):
        assert (made.count, made.names, made.read) == (here.count, here.names, here.read)
        for name in here.names:
            assert all(
                torch.equal(a, b)
                for a, b in zip(here.tally(name).state.values(), made.tally(name).state.values(), strict=True)
            )
            assert all(torch.equal(a, b) for a, b in zip(here.sample(name), made.sample(name), strict=True))
        assert [made.tokens(i) for i in range(60)] == [here.tokens(i) for i in range(60)]
    assert again.count == here.count
    assert torch.equal(again.tally("axes").places, here.tally("axes").places)
    assert torch.allclose(again.mean("axes"), here.mean("axes"))  # it was cut elsewhere
    with pytest.raises(Refused, match="a function of your own"):
        pl.neurons.harvest(model, TEXTS, Units("layers.0.resid_post", torch.sin, "waves"), on=two, **options)


def test_a_line_that_was_being_written_does_not_count(model: pl.Model, tmp_path: Path) -> None:
    whole = stored(model, tmp_path / "whole")
    torn = stored(model, tmp_path / "torn")
    raw = (torn.path / INDEX).read_bytes()
    for end in (1, len(raw) // 3, len(raw) // 2, len(raw) - 1):
        (torn.path / INDEX).write_bytes(raw[:end])
        assert same(whole, stored(model, tmp_path / "torn"))


def test_a_full_disk_is_one_error_and_what_is_stored_stays(
    model: pl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stored(model, tmp_path / "whole")
    native, written = stores.save_file, []

    def full(tensors: Any, path: str) -> None:
        written.append(path)
        if len(written) > 3:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        native(tensors, path)

    for name, on in (("here", None), ("there", pool())):
        written.clear()
        with monkeypatch.context() as patched:
            patched.setattr(stores, "save_file", full)
            with pytest.raises(PellucidError, match="disk of .* is full. Finished shards are kept"):
                stored(model, tmp_path / name, on=on)
        kept = ActivationStore(tmp_path / name)
        assert 1 <= len(kept.index.shards) <= 3
        assert not list(kept.path.glob("*.part"))
        assert same(whole, stored(model, tmp_path / name))


def test_int8_says_what_it_loses_and_a_sample_does_not_depend_on_batches(model: pl.Model, tmp_path: Path) -> None:
    exact = stored(model, tmp_path / "exact", dtype=torch.float32)
    narrow = stored(model, tmp_path / "narrow", dtype=torch.int8, on=pool())
    for site in exact.sites:
        lost = (narrow[site] - exact[site]).norm(dim=1) / exact[site].norm(dim=1)
        overall = float((narrow[site] - exact[site]).norm() / exact[site].norm())
        assert narrow.error(site) == pytest.approx((overall, float(lost.max())), rel=1e-4)
        assert 0 < overall < 0.01
        assert torch.equal(narrow.rows(site, [5, 0, len(narrow) - 1]), narrow[site][[5, 0, len(narrow) - 1]])
    assert exact.error(exact.sites[0]) == (0.0, 0.0)
    few = stored(model, tmp_path / "few", sample=0.3, seed=1)
    assert 0.2 < len(few) / len(exact) < 0.4
    again = stored(model, tmp_path / "again", sample=0.3, seed=1, batch=7)
    assert torch.equal(few.tokens, again.tokens)
    places = {
        (p, i): row
        for row, (p, i) in enumerate(zip(exact["prompts"].tolist(), exact["positions"].tolist(), strict=True))
    }
    rows = [places[p, i] for p, i in zip(few["prompts"].tolist(), few["positions"].tolist(), strict=True)]
    torch.testing.assert_close(few[few.sites[0]].float(), exact.rows(few.sites[0], rows), atol=5e-3, rtol=5e-3)
    with pytest.raises(InputError, match="sample=1.5"):
        stored(model, tmp_path / "no", sample=1.5)
    with pytest.raises(InputError, match="not as torch.int64"):
        stored(model, tmp_path / "no", dtype=torch.int64)


def test_shuffled_rows_come_once_each_and_sites_stay_together(model: pl.Model, tmp_path: Path) -> None:
    store = stored(model, tmp_path)
    site = store.sites[0]
    for size, window in ((7, 2), (64, 1), (1000, 16), (5, 16)):
        pairs = list(store.shuffled([site, "positions"], size, seed=3, window=window))
        assert all(len(x) == size for x, _ in pairs[:-1])
        values, positions = (torch.cat(each) for each in zip(*pairs, strict=True))
        assert torch.equal(positions.sort().values, store["positions"].sort().values)
        key = torch.linspace(1, 2, values.shape[1], dtype=torch.float64)
        a, b = (
            ((x.double() @ key) + 1e4 * p).sort().values
            for x, p in ((values, positions), (store[site], store["positions"]))
        )
        assert torch.equal(a, b)
        assert not torch.equal(values, store[site])
    again = torch.cat(list(store.shuffled(site, 7, seed=3, window=2)))
    assert torch.equal(again, torch.cat([x for x, _ in store.shuffled([site, "tokens"], 7, seed=3, window=2)]))


def test_a_store_of_a_hundred_million_rows_opens_at_once(tmp_path: Path) -> None:
    index = stores.Index(["embed"], "0", "int8")
    rows, count = 20_000, 5_000
    size = 2 * rows  # a sparse file: one byte a row, and its token
    head = f'{{"embed":{{"dtype":"U8","shape":[{rows},1],"data_offsets":[0,{rows}]}},"tokens":{{"dtype":"U8","shape":[{rows}],"data_offsets":[{rows},{size}]}}}}'.encode()  # fmt: skip
    place = {"texts": 1, "used": 0, "rows": 1, "tokens": rows, "digest": "0" * 64}
    lines = [index.head, *(vars(stores.Shard(stores._file(i), rows, i, i + 1, place)) for i in range(count))]
    import json

    (tmp_path / INDEX).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in (0, 77, count - 1):
        with (tmp_path / stores._file(i)).open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + size)
    begun = time.process_time()
    store = ActivationStore(tmp_path)
    assert len(store) == 100_000_000
    found = store.rows("embed", [99_999_999, 5, 77 * rows + 3])
    assert time.process_time() - begun < 1
    assert found.tolist() == [[0], [0], [0]]
