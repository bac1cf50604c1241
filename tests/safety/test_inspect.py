"""An eval of inspect_ai answers with the tokens of plain transformers, and with monitors on says what fired in each sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pellucid as pl
from pellucid.errors import InputError
from tests.safety.test_steering import fitted, opened

inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed: pip install 'pellucid[inspect]'")
PROMPTS = ["The city of Paris", "Mary and John went to the", "a big dog"]


def run(tmp_path: Path, **how: Any) -> Any:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.scorer import includes

    samples = [Sample(input=p, target="a", metadata={"n": i}) for i, p in enumerate(PROMPTS)]
    given = {"solver": how.pop("solver")} if "solver" in how else {}
    task = Task(dataset=samples, scorer=includes(), config=GenerateConfig(max_tokens=6), **given)
    (log,) = eval(task, log_dir=str(tmp_path / "logs"), display="none", **how)
    assert log.status == "success", log.error
    return log.samples


def plainly(model: pl.Model, prompt: str) -> list[int]:
    inputs = model.inputs(prompt).tensors
    made = model.module.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_are_those_of_transformers_token_by_token(family: str, tmp_path: Path) -> None:
    model = opened(family)
    samples = run(tmp_path, model=pl.safety.inspect_model(model))
    for sample, prompt in zip(samples, PROMPTS, strict=True):
        (record,) = sample.store["pellucid"]
        assert record["tokens"] == plainly(model, prompt) and record["ended"] == "length"
        assert sample.output.stop_reason == "max_tokens" and sample.output.usage.output_tokens == 6


def test_monitors_steering_and_kept_sites_are_on_in_each_sample(tmp_path: Path) -> None:
    model, c = opened("llama"), fitted("llama")
    alarm = pl.safety.Monitor(c.at(1), threshold=-1e9, then=pl.Stop("told to"), name="alarm")
    samples = run(
        tmp_path,
        model=pl.safety.inspect_model(model, monitors=[alarm], keep=["layers.1.resid_post"], folder=tmp_path / "kept"),
    )
    for sample in samples:
        (record,) = sample.store["pellucid"]
        assert (
            record["ended"] == "watcher"
            and any(record["fired"]["alarm"])
            and sample.output.stop_reason == "content_filter"
        )
        assert Path(record["file"]).exists() and "layers.1.resid_post" in pl.results.Result.load(record["file"]).data
    edits = [c.at(1).edit(2.0)]
    solver = pl.safety.inspect_solver(model, edits=lambda state: edits if state.metadata["n"] == 1 else [])
    for i, sample in enumerate(run(tmp_path, solver=solver, model="mockllm/model")):
        expected = model.generate(PROMPTS[i], edits=edits if i == 1 else [], max_new_tokens=256).ids()
        assert sample.store["pellucid"][0]["tokens"] == expected


def test_what_is_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    with pytest.raises(InputError, match="not installed"):
        pl.safety.inspect_model(opened("llama"))
