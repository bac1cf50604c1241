"""A sweep gives the same numbers wherever it is run; what cannot travel, and what breaks on the way, is said."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import pellucid as pl
from pellucid.errors import InputError, PellucidError, Refused
from pellucid.workers import Pool
from pellucid.workers.job import FILE, read
from pellucid.workers.lanes import HOME, ProcessLane, Reply
from tests.models import minilm_path
from tests.workers.lanes import TINY, InProcess, pool


def question(model: pl.Model, n: int = 9) -> tuple[torch.Tensor, list[Any], Any]:
    ids, other = torch.randint(97, (2, 2, n), generator=torch.Generator().manual_seed(1)).unbind()
    run = model.run(other, keep="layers.*.resid_pre")
    variants: list[Any] = [pl.Ablate(f"layers.{i}.attn.heads.{h}") for i in range(3) for h in range(4)]
    for i in range(3):
        x = run.tensor(f"layers.{i}.resid_pre")
        variants += [[pl.Patch(f"layers.{i}.resid_pre@{p}", x[:, p : p + 1])] for p in range(n)]
    variants += [
        pl.Ablate("layers.1.mlp.out", "resample", reference=other.tolist()),
        [pl.Scale("layers.0.mlp.out", 2.0), pl.Ablate("layers.2.attn.out")],
    ]
    return ids, variants, pl.metrics.logit_difference(3, 5)


def test_workers_give_the_numbers_that_are_found_here(model: pl.Model) -> None:
    ids, variants, metric = question(model)
    here = model.sweep(ids, variants, metric, memory=200_000)
    for workers in (1, 2, 3):
        there = model.sweep(ids, variants, metric, on=pool(workers), memory=200_000)
        assert torch.equal(there.values, here.values)
        assert torch.equal(there.clean, here.clean)
    assert there.done.all()


def test_two_threads_open_models_one_after_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, waits = LlamaForCausalLM.__init__, iter([0.2, 0.6])  # who comes second goes last

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        time.sleep(next(waits))
        native(self, *args, **kwargs)

    tie = PreTrainedModel.tie_weights  # transformers puts another one there meanwhile
    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as threads:
        patched.setattr(LlamaForCausalLM, "__init__", slow)
        list(threads.map(lambda path: pl.load(path, tokenizer=False), [folder] * 2))
    assert PreTrainedModel.tie_weights is tie


def test_a_technique_sweeps_where_the_block_around_it_says(model: pl.Model) -> None:
    ids = torch.randint(97, (1, 7), generator=torch.Generator().manual_seed(2))
    here = pl.causal.ablation(model, ids, over="layers.*.attn.heads.*", metric=pl.metrics.logit_difference(3, 5))
    two = pool()
    with pl.on(two):
        there = pl.causal.ablation(model, ids, over="layers.*.attn.heads.*", metric=pl.metrics.logit_difference(3, 5))
    assert (there.effect.values == here.effect.values).all()
    assert any(each.asked for each in two.lanes)  # type: ignore[attr-defined]


def test_a_changed_model_travels_as_its_changes_and_a_function_as_metric_stays_at_home(model: pl.Model) -> None:
    ids, variants, _ = question(model)
    left = torch.ones(32, 1) / 10
    changed = model.changed(pl.changed.Added("model.layers.1.mlp.down_proj.weight", left, torch.ones(1, 64) / 10))
    here, there = (changed.sweep(ids, variants, lambda z: z[:, -1].logsumexp(-1), on=on) for on in (None, pool()))
    assert torch.equal(there.values, here.values)
    assert not torch.equal(there.values, model.sweep(ids, variants, lambda z: z[:, -1].logsumexp(-1)).values)


def test_padded_prompts_named_places_and_an_encoder_decoder_travel_as_they_are(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    t5 = pl.load(tmp_path)
    given = t5.inputs(["the king of France", "the queen"], decoder=["la", "la"], spans={"who": ["king", "queen"]})
    variants = [
        pl.Ablate(f"encoder.layers.{i}.resid_post@{at}") for i in range(2) for at in ("who", "'the'", "/[kq]\\w+/", -1)
    ]
    variants += [pl.Ablate("decoder.layers.1.cross.heads.0")]
    here, there = (t5.sweep(given, variants, pl.metrics.logit(3), on=on) for on in (None, pool()))
    assert torch.equal(there.values, here.values)


def test_what_a_dead_worker_had_is_done_by_its_successor_once(model: pl.Model) -> None:
    ids, variants, metric = question(model)
    two = pool()
    two.lanes[0].dying = 1  # type: ignore[attr-defined]
    plan = model.plan(ids, variants, metric, memory=200_000)
    there = plan.run(two)
    assert torch.equal(there.values, model.sweep(ids, variants, metric, memory=200_000).values)
    runs = [r["piece"] for lane in two.lanes for r in lane.asked if r["do"] == "run"]  # type: ignore[attr-defined]
    assert sum(map(len, runs)) - len(variants) == max(map(len, (r for r in runs if runs.count(r) > 1)))


def test_a_worker_that_dies_again_and_again_is_an_error_and_what_is_done_is_kept(
    model: pl.Model, tmp_path: Path
) -> None:
    ids, variants, metric = question(model)
    one = pool(1)
    plan = model.plan(ids, variants, metric, memory=200_000, checkpoint=tmp_path / "sweep.npz")
    works = iter([0, *[9] * 9])

    class Dying(InProcess):
        def ask(self, request: dict[str, Any], folder: Path) -> Reply:
            self.dying = next(works, 9) if request["do"] == "run" else 0
            return super().ask(request, folder)

    one.lanes = [Dying()]
    with pytest.raises(PellucidError, match="died 3 times over the same batch: Killed"):
        plan.run(one)
    assert 0 < int(plan.done.sum()) < len(variants)
    again = model.plan(ids, variants, metric, memory=200_000, checkpoint=tmp_path / "sweep.npz").run()
    assert torch.equal(again.values, model.sweep(ids, variants, metric, memory=200_000).values)


def test_an_interrupted_sweep_keeps_what_is_done_and_stops_the_workers(model: pl.Model) -> None:
    ids, variants, metric = question(model)
    plan = model.plan(ids, variants, metric, memory=200_000)

    def interrupt(done: int | None = None, *rest: Any) -> None:
        raise KeyboardInterrupt

    from pellucid.engine.pausing import sharing

    with pytest.raises(KeyboardInterrupt), sharing(lambda moment: interrupt() if moment.done else None):
        plan.run(pool())
    assert 0 < int(plan.done.sum()) < len(variants)
    assert torch.equal(plan.run().values, model.sweep(ids, variants, metric, memory=200_000).values)


def test_what_cannot_travel_is_refused_before_anything_is_done(model: pl.Model) -> None:
    ids, _, metric = question(model)
    with pytest.raises(Refused, match="cannot be run by workers.*holds a function"):
        model.sweep(ids, [pl.Replace("layers.0.mlp.out", lambda x: x)], metric, on=pool())
    own = pl.load(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=97)), tokenizer=False)
    with pytest.raises(Refused, match="in the memory of this process.*save it"):
        own.sweep(ids, [pl.Ablate("layers.0.mlp.out")], metric, on=pool())


def test_other_weights_other_versions_and_other_numbers_are_met_before_the_first_batch(
    folder: Path, tmp_path: Path
) -> None:
    import shutil

    moved = shutil.copytree(folder, tmp_path / "moved")
    model = pl.load(moved, tokenizer=False)
    ids, variants, metric = question(model)
    two = pool()
    two.lanes[0].says = {"transformers": "4.0.0"}  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"a worker has transformers 4\.0\.0"):
        model.sweep(ids, variants, metric, on=two)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)).save_pretrained(moved)
    with pytest.raises(InputError, match="other weights where the worker is"):
        model.sweep(ids, variants, metric, on=pool())
    shutil.rmtree(moved)
    with pytest.raises(PellucidError, match="a worker could not go on"):
        model.sweep(ids, variants, metric, on=pool())


def test_a_rung_that_is_wrong_there_is_not_used(model: pl.Model) -> None:
    ids, variants, metric = question(model)

    class Wrong(InProcess):
        def ask(self, request: dict[str, Any], folder: Path) -> Reply:
            if request["do"] == "run" and "packed" in read(folder / FILE)[1]["rung"]:
                return {"wrong": "differs from plain runs by 1.0e+00"}, {}
            return super().ask(request, folder)

    there = model.sweep(ids, variants, metric, on=Pool([Wrong()], [None], 1))
    assert "packed" not in there.plan.rung.name
    torch.testing.assert_close(there.values, model.sweep(ids, variants, metric).values, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def processes() -> Iterator[pl.Processes]:
    with pl.Processes(2) as two:
        yield two


def test_processes_are_asked_and_answer_and_one_that_is_killed_is_replaced(
    model: pl.Model, processes: pl.Processes
) -> None:
    ids, variants, metric = question(model)
    here = model.sweep(ids, variants, metric)
    assert torch.equal(model.sweep(ids, variants, metric, on=processes).values, here.values)
    lane = processes.lanes[0]
    assert isinstance(lane, ProcessLane) and lane.process is not None
    first = lane.process.pid
    threading.Timer(0.05, os.kill, (first, signal.SIGKILL)).start()
    for _ in range(20):  # until it was killed in the middle of one
        assert torch.equal(model.sweep(ids, variants, metric, on=processes).values, here.values)
        if lane.process is not None and lane.process.pid != first:
            break
    assert lane.process is not None and lane.process.pid != first
    assert processes.seconds["run"] > 0


def test_actors_of_ray_are_asked_and_answer_and_one_that_is_killed_is_replaced(
    model: pl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    ids, variants, metric = question(model)
    here = model.sweep(ids, variants, metric)
    try:
        with pl.Ray(1) as one:
            assert torch.equal(model.sweep(ids, variants, metric, on=one).values, here.values)
            ray.kill(one.lanes[0].actor)  # type: ignore[attr-defined]
            assert torch.equal(model.sweep(ids, variants, metric, on=one).values, here.values)
            with pytest.raises(InputError, match="no room for one worker"):
                pl.Ray(resources={"num_cpus": 4096})
    finally:
        ray.shutdown()
    with pytest.raises(InputError, match="no Ray cluster answers"):
        pl.Ray(address="ray://127.0.0.1:1")
