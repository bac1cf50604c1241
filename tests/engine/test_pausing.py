"""Long work pauses between its passes, where others may run, and can be ended there without a trace."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import pellucid as pl
from pellucid.engine.pausing import Moment, pause, progress, quiet, sharing
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"


class Enough(BaseException):
    pass


@pytest.fixture(scope="module")
def model() -> pl.Model:
    module = build("llama")
    return pl.load(module, tokenizer=tokenizer(module))


def variants(model: pl.Model) -> list[pl.Ablate]:
    return [pl.Ablate(site) for site in model.sites("layers.*.attn.heads.*")]


METRIC = pl.metrics.logit_difference(5, 6)


def test_a_pause_without_a_listener_is_nothing() -> None:
    assert pause(1, 2) is None


def test_a_sweep_tells_how_far_it_is_and_is_the_same_with_runs_in_its_pauses(model: pl.Model) -> None:
    moments: list[Moment] = []

    def listener(moment: Moment) -> None:
        moments.append(moment)
        assert not moment.busy
        with sharing(None), torch.enable_grad():
            model.run("Paris is in Italy", keep="layers.*.resid_post", edits=[pl.Scale("layers.0.mlp.out", 3.0)])

    alone = model.sweep(PROMPT, variants(model), METRIC, memory=1)
    with sharing(listener):
        shared = model.sweep(PROMPT, variants(model), METRIC, memory=1)
    assert torch.equal(alone.values, shared.values)
    assert [m.done for m in moments] == list(range(8)) and {m.total for m in moments} == {8}


def test_batches_are_smaller_where_others_wait(model: pl.Model) -> None:
    alone = model.plan(PROMPT, variants(model), METRIC).memory
    with sharing(lambda moment: None):
        assert model.plan(PROMPT, variants(model), METRIC).memory < alone
    assert model.plan(PROMPT, variants(model), METRIC).memory == alone


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_sweep_that_is_ended_goes_on_where_it_stopped(model: pl.Model, after: int) -> None:
    def listener(moment: Moment) -> None:
        if (moment.done or 0) >= after:
            raise Enough

    plan = model.plan(PROMPT, variants(model), METRIC, memory=1)
    with sharing(listener), pytest.raises(Enough):
        plan.run()
    assert int(plan.done.sum()) == after
    assert torch.equal(plan.run().values, model.sweep(PROMPT, variants(model), METRIC, memory=1).values)


def test_generating_can_be_ended_at_every_token_and_leaves_no_hook(model: pl.Model) -> None:
    edits = [pl.Scale("layers.0.attn.heads.1", 2.0)]
    text = model.generate(PROMPT, edits=edits, max_new_tokens=5).text
    seen: list[Moment] = []

    def listener(moment: Moment) -> None:
        seen.append(moment)
        if len(seen) == 2:
            raise Enough

    with sharing(listener), pytest.raises(Enough):
        model.generate(PROMPT, edits=edits, max_new_tokens=5)
    assert seen == [Moment(busy=True)] * 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert model.generate(PROMPT, edits=edits, max_new_tokens=5).text == text


def test_edge_attribution_and_integrated_gradients_are_the_same_with_runs_in_their_pauses(model: pl.Model) -> None:
    def scores() -> torch.Tensor:
        return pl.circuits.edge_attribution(model, PROMPT, METRIC, how="zero", method="eap-ig-inputs", steps=3).tensor

    def shares() -> torch.Tensor:
        return torch.tensor(
            pl.attribution.integrated_gradients(model, PROMPT, METRIC, steps=400).values
        )  # more than one batch

    for work in (scores, shares):
        before, count = work(), [0]

        def listener(moment: Moment, count: list[int] = count) -> None:
            count[0] += 1
            assert not moment.busy
            with sharing(None), torch.no_grad():
                model.run("Paris is in Italy")

        with sharing(listener):
            after = work()
        assert torch.equal(before, after)
        assert count[0]


def test_progress_pauses_before_each_item_and_after_each_step() -> None:
    moments: list[Moment] = []
    with sharing(moments.append):
        assert list(progress("abc", "letters")) == ["a", "b", "c"]
        with progress(what="runs", total=5, done=1) as bar:
            bar.step(3)
    assert moments == [Moment(0, 3), Moment(1, 3), Moment(2, 3), Moment(4, 5)]


@pytest.mark.parametrize(
    ("where", "shown"), [("terminal", True), ("notebook", True), ("pipe", False), ("quiet", False)]
)
def test_bars_show_in_terminals_and_notebooks_unless_it_is_quiet(where: str, shown: bool, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return where in ("terminal", "quiet")

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    if where == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    if where == "quiet":
        with quiet():
            bar = progress(range(3), "items")
    else:
        bar = progress(range(3), "items")
    assert bar.bar.disable is not shown
    assert list(bar) == [0, 1, 2]
