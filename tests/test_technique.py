"""The printed program of a call gives its numbers again, whatever it was called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import pellucid as pl
from pellucid.results import Result
from pellucid.technique import Program, made, settle, technique
from tests.zoo import build, tokenizer


@pytest.fixture(scope="module")
def model() -> pl.Model:
    module = build("gpt2", layers=2)
    return pl.load(module, tokenizer=tokenizer(module))


@technique
def total(
    model: Any, prompt: Any, vector: Any = None, *, scale: float = 1.0, over: Any = None, seed: int = 0
) -> Result:
    """Stands for any technique: it sees all it is given."""
    score = 0.0 if vector is None else float(torch.as_tensor(vector).double().sum())
    return Result(xr.DataArray(score * scale), kind="total")


@technique
def guessed(prompt: str, target: str | None = None) -> Result:
    settle(target=" Paris")
    return Result(xr.DataArray(1.0), kind="guess")


@dataclass(eq=False)
class Fitted:
    width: int
    rate: float = 0.5
    mean_: Any = field(default=None, init=False)

    @technique
    def fit(self, values: Any) -> Fitted:
        self.mean_ = torch.as_tensor(values).double().mean() * self.width
        return self

    @technique
    def evaluate(self, factor: float) -> Result:
        return Result(xr.DataArray(float(self.mean_) * factor), kind="evaluated")


@technique
def halves(x: float) -> tuple[Result, Result]:
    return Result(xr.DataArray(x / 2), kind="half"), Result(xr.DataArray(-x / 2), kind="half")


def again(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> Result:
    """What the program of the saved result gives."""
    monkeypatch.chdir(tmp_path)
    result.save("result.zip")
    space: dict[str, Any] = dict(names)
    exec(Result.load("result.zip").provenance.code(), space)
    assert isinstance(space["result"], Result)
    return space["result"]


CALLS = {
    "plain": lambda m: total(m, "The city", [1.0, 2.0], scale=3.0),
    "a small tensor": lambda m: total(m, "The city", torch.tensor([1.5, 2.0])),
    "a tensor": lambda m: total(m, "The city", torch.arange(40) / 7),
    "bfloat16": lambda m: total(m, "The city", torch.randn(40).to(torch.bfloat16)),
    "an array": lambda m: total(m, "The city", np.linspace(0, 1, 9)),
    "a long list": lambda m: total(m, ["The city of Paris"] * 300, [float(i) for i in range(900)]),
    "infinity": lambda m: total(m, "The city", [1.0], scale=float("inf")),
    "metrics": lambda m: total(m, "The city", [1], over=pl.metrics.logit_difference(" Paris", " Rome", position=-2)),
    "a divergence": lambda m: total(m, "The city", [1], over=pl.metrics.kl_divergence(m.run("The city").logits[0, -1])),
    "edits": lambda m: total(m, "The city", [1], over=[pl.Ablate("layers.*.attn.heads.0", "mean"), pl.Steer("layers.0.resid_post@-1", torch.ones(9))]),
    "inputs": lambda m: total(m, m.inputs("The city"), [2]),
    "a run": lambda m: total(m, "The city", [2], over=pl.Patch("layers.0.attn.z", m.run("The town", keep="layers.0.attn.z"))),
    "ranges and slices": lambda m: total(m, "The city", list(range(3)), over=(slice(1, None), range(4), {3, 1})),
    "a task": lambda m: total(m, pl.tasks.Prompts.from_pairs(["The city of Paris"], ["The city of Rome"], [" Paris"], [" Rome"], m.tokenizer), [3]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_program_of_a_saved_result_gives_it_again(
    name: str, model: pl.Model, tmp_path: Path, monkeypatch: Any
) -> None:
    result = CALLS[name](model)
    found = again(result, tmp_path, monkeypatch, module=model.module, tokenizer=model.tokenizer)
    assert found.allclose(result, atol=0.0)
    assert found.provenance.call == result.provenance.call
    assert found.provenance.digest == result.provenance.digest


def test_a_run_is_written_with_its_edits_and_one_of_another_model_is_left_open(model: pl.Model) -> None:
    edited = model.run("The town", keep="layers.0.attn.z", edits=[pl.Scale("layers.0.resid_pre", 3.0)])
    written = total(model, "The city", [2], over=pl.Patch("layers.0.attn.z", edited)).provenance.call
    again = eval(made_of(written), {"pl": pl, "model": model})
    assert torch.equal(again.tensor("layers.0.attn.z"), edited.tensor("layers.0.attn.z"))
    other = pl.load(build("gpt2", layers=2, seed=1), tokenizer=model.tokenizer).run("The town", keep="layers.0.attn.z")
    assert total(model, "The city", [2], over=pl.Patch("layers.0.attn.z", other)).provenance.free == {
        "source": "the Run you gave"
    }


def made_of(call: str) -> str:
    """The run within the printed patch."""
    start = call.index("model.run(")
    depth = 0
    for i in range(start, len(call)):
        depth += {"(": 1, ")": -1}.get(call[i], 0)
        if depth == 0 and call[i] == ")":
            return call[start : i + 1]
    raise AssertionError(call)


def test_different_questions_have_different_provenance(model: pl.Model) -> None:
    one, two = (total(model, "Hi", over=pl.metrics.logit_difference(*pair)) for pair in ((" a", " b"), (" b", " a")))
    assert one != two
    assert one == total(model, "Hi", over=pl.metrics.logit_difference(" a", " b"))


def test_a_fitted_thing_is_written_as_the_call_that_fitted_it(tmp_path: Path, monkeypatch: Any) -> None:
    fitted = Fitted(3).fit(torch.arange(20.0))
    result = fitted.evaluate(2.0)
    assert result.provenance.call == f"importlib.import_module({__name__!r}).Fitted(width=3).fit({made(fitted).call.split('fit(')[1]}.evaluate(2.0)"  # type: ignore[union-attr]  # fmt: skip
    assert again(result, tmp_path, monkeypatch) == result
    assert (
        "width=3" in fitted.fit([1.0]).evaluate(1.0).provenance.call
    )  # fitted anew: from the settings, not from the first fit


def test_each_of_several_results_has_its_own_place(tmp_path: Path, monkeypatch: Any) -> None:
    for result in halves(3.0):
        assert again(result, tmp_path, monkeypatch) == result


def test_what_was_left_open_is_recorded() -> None:
    assert guessed("Hi").provenance.arguments["target"] == " Paris"
    assert guessed("Hi", " Rome").provenance.arguments["target"] == " Rome"


def test_calls_inside_a_recorded_call_are_part_of_it() -> None:
    @technique
    def outer(prompt: str) -> Result:
        return guessed(prompt)

    result = outer("Hi")
    assert result.provenance.method.endswith("outer")
    assert result.provenance.inputs == ["Hi"]


def test_what_has_no_text_is_a_name_that_the_program_explains(model: pl.Model) -> None:
    result = total(model, "Hi", over=lambda logits: logits[:, -1, 0])
    assert "over=over" in result.provenance.call
    assert "# over: a function of yours" in result.provenance.code()


def test_a_wrong_call_fails_as_python_has_it(model: pl.Model) -> None:
    with pytest.raises(TypeError, match=r"^total\(\): missing a required argument: 'prompt'"):
        total(model)  # type: ignore[call-arg]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.integers())
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(plain)
def test_plain_values_are_written_as_python_reads_them(value: Any) -> None:
    program = Program()
    assert eval(program.write(value, "value"), {"given": program.given}) == value
    assert not program.free
