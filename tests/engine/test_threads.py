"""Threads share a model without seeing each other's edits, whatever each of them does with it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid
from pellucid import Ablate, Replace, Scale, metrics
from tests.engine.hand import PROMPTS, call, ids, opened
from tests.zoo import build, tokenizer


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads take turns every few microseconds instead of every five milliseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(*jobs: Callable[[], Any], rounds: int = 20) -> list[list[Any]]:
    """Every job's results, each in a thread of its own and repeated; the first error is raised."""
    results: list[list[Any]] = [[] for _ in jobs]
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def work(job: Callable[[], Any], into: list[Any]) -> None:
        try:
            barrier.wait()
            for _ in range(rounds):
                into.append(job())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("family", ["llama", "gptj", "mixtral", "bert"])
def test_two_threads_run_with_different_edits_at_once(family: str) -> None:
    model, tensors = opened(family), call(family)
    edits: list[Any] = [[Ablate("layers.0.attn.heads.1")], [Scale("layers.1.attn.pattern", 0.5)], []]
    jobs = [lambda e=e: model.run(tensors, edits=e, keep=["layers.1.attn.q"]) for e in edits]
    wanted = [job() for job in jobs]
    for want, made in zip(wanted, at_once(*jobs), strict=True):
        for run in made:
            assert torch.equal(run.logits, want.logits)
            assert torch.equal(run.tensor("layers.1.attn.q"), want.tensor("layers.1.attn.q"))


def test_a_plain_forward_of_another_thread_never_meets_a_hook_that_comes_or_goes() -> None:
    model, tokens = opened("llama"), ids()
    with torch.no_grad():
        native = model.module(tokens).logits

        def plain() -> Tensor:
            with torch.no_grad():
                return model.module(tokens).logits

        edited = [Scale("layers.*.resid_post", 0.5), Scale("layers.*.attn.out", 2.0), Scale("layers.*.attn.q", 2.0)]
        outputs, _ = at_once(plain, lambda: model.run(tokens, edits=edited), rounds=150)
    assert all(torch.equal(output, native) for output in outputs)


def test_a_plain_forward_inside_a_run_is_plain() -> None:
    """In another thread: the run is held in the middle of an edit while it happens."""
    model, tokens = opened("llama"), ids()
    native, made = model.module(tokens).logits, []

    def function(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: made.append(model.module(tokens).logits))
        thread.start()
        thread.join()
        return x * 2

    run = model.run(tokens, edits=[Replace("layers.0.attn.pattern", function)])
    assert torch.equal(made[0], native)
    assert torch.equal(run.logits, model.run(tokens, edits=[Scale("layers.0.attn.pattern", 2.0)]).logits)


def test_sweeps_run_beside_runs_and_generation() -> None:
    for family in ("llama", "gptj"):
        model, tokens = opened(family), ids()
        variants = [Ablate(f"layers.{layer}.attn.heads.{h}") for layer in range(2) for h in range(4)]
        edits = [Scale("layers.0.mlp.out", 2.0)]
        jobs: list[Callable[[], Tensor]] = [
            lambda: model.sweep(tokens, variants, metrics.logit(7)).values,
            lambda: model.sweep(tokens, variants, metrics.logit(9), executor="stubbed").values,
            lambda: model.run(tokens, edits=edits).logits,
            lambda: model.generate(PROMPTS, edits=edits, max_new_tokens=4, temperature=0.5, seed=3).tokens,
        ]
        wanted = [job() for job in jobs]
        for want, made in zip(wanted, at_once(*jobs, rounds=4), strict=True):
            assert all(torch.equal(want, got) for got in made)


@pytest.mark.parametrize("port", ["resid_pre", "resid_post"])
def test_a_hook_that_is_taken_down_while_another_thread_is_about_to_call_it_does_no_harm(port: str) -> None:
    """torch calls the hooks it found when the module was called, and forgets at once which of them want kwargs."""
    module = build("llama")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    block, tokens = module.model.layers[0], ids()
    native = module(tokens).logits
    inside, ended = threading.Event(), threading.Event()
    made: list[Tensor] = []

    def mine(*_: Any) -> None:
        if threading.current_thread() is other:
            inside.set()
            ended.wait(10)

    hook = block.register_forward_pre_hook(mine) if port == "resid_pre" else block.register_forward_hook(mine)
    other = threading.Thread(target=lambda: made.append(module(tokens).logits))

    def function(x: Tensor) -> Tensor:
        other.start()
        inside.wait(10)  # the other thread now stands before our hook
        return x

    model.run(tokens, edits=[Replace("layers.1.resid_post", function), Scale(f"layers.0.{port}", 2.0)])
    ended.set()
    other.join()
    hook.remove()
    assert torch.equal(made[0], native)
