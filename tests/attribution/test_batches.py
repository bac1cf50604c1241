"""Several prompts in one call get what each gets alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from pellucid.attribution import METHODS, continuation, integrated_gradients, occlusion, reading, saliency
from pellucid.attribution.case import Case
from pellucid.attribution.players import Players
from pellucid.engine import lockstep
from pellucid.engine.lockstep import asked, in_step
from pellucid.errors import PellucidError
from pellucid.metrics import logit_difference
from pellucid.results import Result
from tests.attribution.hand import classifier, opened

PROMPTS = ["The capital of France is", "The city of Rome", "He said that the capital of the old country is near the"]
ANSWERS = [" Paris", " Rome", " city"]
FEW = {
    "smoothgrad": {"draws": 4}, "expected_gradients": {"draws": 4}, "integrated_gradients": {"steps": 4, "tolerance": 1e9},
    "lime": {"draws": 30}, "kernel_shap": {"draws": 40}, "shapley": {"draws": 4}, "owen": {"draws": 4},
    "partition": {"evaluations": 30}, "exact_shapley": {"players": "sentence"},
}  # fmt: skip


def same(many: Result, i: int, alone: Result, atol: float = 2e-5) -> None:
    one = many[i]
    assert one.data.sizes == alone.data.sizes and one.title == alone.title and one.data.attrs == alone.data.attrs
    assert set(one.data.variables) == set(alone.data.variables)
    for name, variable in alone.data.variables.items():
        found = one.data[name].variable
        assert found.dims == variable.dims, name
        if variable.dtype.kind in "fiu":
            np.testing.assert_allclose(
                found.values.astype(float), variable.values.astype(float), atol=atol, err_msg=name
            )
        else:
            assert found.values.tolist() == variable.values.tolist(), name


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "mixtral"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_each_prompt_what_it_gets_alone(family, name):
    model, method, options = opened(family), METHODS[name], dict(FEW.get(name, {}))
    if name == "deeplift" and family == "mixtral":
        pytest.skip("routed experts: refused alone and together")
    if name in ("deeplift", "integrated_gradients", "occlusion", "lime"):
        options["baseline"] = "mean"
    prompts = PROMPTS if family != "bert" else [f"{p} <mask>" for p in PROMPTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            alone = [method(model, p, a, **options) for p, a in zip(prompts, ANSWERS, strict=True)]
        except PellucidError as error:  # then so do several
            with pytest.raises(type(error)):
                method(model, prompts, ANSWERS, **options)
            return
        many = method(model, prompts, ANSWERS, **options)
    assert many.main.dims[0] == "prompt" and len(many.prompts) == 3
    for i, one in enumerate(alone):
        same(many, i, one, atol=2e-5 * max(1.0, float(np.abs(one.values).max())))
    if "position" in many.data.dims:
        short = many.data["n_position"].values
        assert np.isnan(many.values[1, short[1] :]).all() and not np.isnan(many.values[1, : short[1]]).any()


def test_forwards_are_shared(monkeypatch):
    model, rows = classifier(), []
    hook = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        saliency(model, PROMPTS, "good")
        assert rows[-1] == 3  # (before it, a prompt padded and alone may have been compared)
        rows.clear()
        occlusion(model, PROMPTS, "good", baseline="mean")
        free = [len(Players.of(Case.of(model, p, "good"))) for p in PROMPTS]
        assert sum(rows) == sum(n + 2 for n in free) and rows[0] > min(free) + 2
    finally:
        hook.remove()


def test_prompts_come_as_lists_ids_tensors_and_tasks():
    model = opened("gpt2")
    texts = saliency(model, PROMPTS, ANSWERS)
    inputs = model.inputs(PROMPTS)
    for given in (
        inputs,
        dict(inputs.tensors),
        [model.inputs(p).stream("").ids[0].tolist() for p in PROMPTS],
    ):
        np.testing.assert_allclose(saliency(model, given, ANSWERS).values, texts.values, atol=1e-6)
    one = saliency(model, PROMPTS[:1], ANSWERS[:1])
    assert one.main.dims == ("prompt", "position")
    assert saliency(model, PROMPTS[0], ANSWERS[0]).main.dims == ("position",)
    np.testing.assert_allclose(one[0].values, saliency(model, PROMPTS[0], ANSWERS[0]).values, atol=1e-6)


def test_targets_rivals_and_metrics_are_one_for_all_or_one_for_each():
    model = opened("gpt2")
    rivals = saliency(model, PROMPTS, ANSWERS, against=" the")
    metric = saliency(model, PROMPTS, logit_difference(ANSWERS, " the"))
    np.testing.assert_allclose(rivals.values, metric.values, atol=1e-6)
    assert [a.strip() for a in rivals.answer.values] == [a.strip() for a in ANSWERS]
    assert rivals.data.attrs["against"].strip() == "the"
    with pytest.raises(PellucidError, match="2 entries in target= for 3 prompts"):
        saliency(model, PROMPTS, ANSWERS[:2])
    site = "layers.1.mlp.neurons.3@-1"
    found = integrated_gradients(model, PROMPTS, reading(site), baseline="mean", steps=3, tolerance=1e9)
    for i, prompt in enumerate(PROMPTS):
        same(found, i, integrated_gradients(model, prompt, reading(site), baseline="mean", steps=3, tolerance=1e9))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_predicted_answers_are_each_prompts_own_and_are_recorded(family):
    model = opened(family)
    many = saliency(model, PROMPTS)
    alone = [saliency(model, p) for p in PROMPTS]
    for i, one in enumerate(alone):
        same(many, i, one)
    assert many.provenance.arguments["target"] == [one.provenance.arguments["target"] for one in alone]


def test_continuations_of_different_lengths_go_through_one_call():
    model = opened("gpt2")
    said = [continuation(" Paris is old"), continuation(" Rome"), continuation(max_new_tokens=2)]
    for method in (saliency, occlusion):
        many = method(model, PROMPTS, said)
        assert many.main.dims == ("prompt", "output", "position")
        for i, (prompt, target) in enumerate(zip(PROMPTS, said, strict=True)):
            alone = method(model, prompt, target)
            if alone.main.ndim == 2:
                same(many, i, alone)


def test_what_came_of_many_is_kept_shown_and_written_as_a_program(tmp_path):
    model = opened("gpt2")
    many = occlusion(model, PROMPTS, ANSWERS, players="word", baseline="mean")
    assert Result.load(many.save(tmp_path / "r.zip")) == many
    assert many.provenance.inputs == PROMPTS and many[2].provenance.call.endswith("[2]")
    assert many.save_html(tmp_path / "r.html").read_text().count("data-pellucid><") == 3
    frame = many.to_frame()
    assert {"prompt", "player", "text", "attribution"} <= set(frame)
    with pytest.raises(IndexError):
        many[3]
    with pytest.raises(PellucidError, match="about one prompt"):
        many[0][0]


def test_an_error_of_one_prompt_is_the_calls_and_says_which(monkeypatch):
    model = opened("gpt2")
    with pytest.raises(PellucidError, match="not in the prompt") as caught:
        occlusion(model, PROMPTS, ANSWERS, players=["capital"], baseline="mean")
    assert any("prompt 1" in note for note in caught.value.__notes__)


def test_calls_in_step_are_answered_together_and_unwound_together():
    sizes, ended = [], []

    def double(items):
        sizes.append(len(items))
        return [2 * item for item in items]

    def call(i):
        try:
            assert not torch.is_grad_enabled()
            return asked(double, i) + (asked(double, 10 * i) if i % 2 else 0)
        finally:
            ended.append(i)

    with torch.no_grad():
        assert in_step([lambda i=i: call(i) for i in range(5)]) == [0, 22, 4, 66, 8]
    assert sizes == [5, 2] and sorted(ended) == [0, 1, 2, 3, 4]

    def fail(items):
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        in_step([lambda: asked(fail, 1), lambda: asked(fail, 2)])
    assert lockstep._own.get() is None
