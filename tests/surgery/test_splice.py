"""A splice is a forward pass with a hook that puts another run's residual there; all positions spliced say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError
from pellucid.surgery import splice
from tests.surgery.test_arranging import opened

A = ["The capital of France is in the", "The capital of Italy is in the"]
B = ["The capital of Rome is in the", "The capital of Paris is in the"]
SEVEN = pl.metrics.logit_difference(7, 8)


def by_hand(model: pl.Model, a: str, b: str, depth: int, here: list[int], there: list[int]) -> float:
    """b's run with a's residual before block `depth`, by plain hooks."""
    blocks = [model.module.get_submodule(block.module) for block in model.anatomy.stacks[-1].blocks]
    kept = []

    def hidden(given: tuple, kwargs: dict) -> torch.Tensor:
        return given[0] if given else kwargs["hidden_states"]

    def keep(_: object, given: tuple, kwargs: dict) -> None:
        kept.append(hidden(given, kwargs))

    def put(_: object, given: tuple, kwargs: dict) -> tuple:
        x = hidden(given, kwargs).clone()
        x[:, there] = kept[0][:, here]
        return ((x, *given[1:]), kwargs) if given else (given, {**kwargs, "hidden_states": x})

    logits = None
    for text, hook in ((a, keep), (b, put)):
        handle = blocks[depth].register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            logits = model.module(**model.inputs(text).tensors).logits[0, -1]
        handle.remove()
    assert logits is not None
    return float(logits[7] - logits[8])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "falcon", "gptj"])
def test_a_splice_is_a_hook_at_every_depth_and_set(family: str) -> None:
    model = opened(family)
    found = splice(model, A, B, metric=SEVEN)
    assert found.share.dims == ("set", "depth") and list(found.set.values) == ["changed", "last", "both"]
    assert found.data.sizes["depth"] == 5 and list(found.data.tokens.values) == [1, 1, 2]
    differ = [
        i
        for i, (x, y) in enumerate(
            zip(*(model.inputs(t).stream("").ids[0].tolist() for t in (A[0], B[0])), strict=True)
        )
        if x != y
    ]
    n = model.inputs(A[0]).stream("").ids.shape[1]
    for name, at in {"changed": differ, "last": [n - 1], "both": [*differ, n - 1]}.items():
        for depth in (0, 2):
            made = [by_hand(model, a, b, depth, at, at) for a, b in zip(A, B, strict=True)]
            effect = np.array(made) - found.data.corrupted.values
            here = found.data.sel(set=name, depth=depth)
            assert float(here.effect) == pytest.approx(effect.mean(), abs=2e-4)
            total = found.data.clean.values - found.data.corrupted.values
            assert float(here.share) == pytest.approx(effect.mean() / total.mean(), rel=1e-3, abs=1e-3)
    ends = found.data.share.sel(set="both")
    assert float(ends.isel(depth=0)) == pytest.approx(1, abs=1e-3)  # nothing else differs
    assert float(found.data.share.sel(set="last").isel(depth=-1)) == pytest.approx(1, abs=1e-3)
    assert "control" in found.data and "<" in found._repr_html_()


def test_spans_of_prompts_of_unequal_length_go_together() -> None:
    model = opened("llama")
    a, b = "The capital of France is", "When the capital of Italy is"
    found = splice(model, a, b, positions={"country": (["France"], ["Italy"])}, metric=SEVEN)
    where = [model.inputs(t).stream("").named(w, 0)[0] for t, w in ((a, "France"), (b, "Italy"))]
    made = by_hand(model, a, b, 1, [where[0]], [where[1]])
    assert float(found.data.effect.sel(set="country", depth=1)) == pytest.approx(
        made - float(found.data.corrupted), abs=1e-4
    )
    longer = splice(model, ["The Rome is", "The drink is"], ["The Paris is", "The x is"], metric=SEVEN,
                    positions={"w": (["Rome", "drink"], ["Paris", "x"])})  # fmt: skip
    assert int(longer.data.tokens[0]) == 1
    model.tokenizer.padding_side = "left"
    padded = splice(
        model,
        [a, "in Paris"],
        [b, "he of Rome"],
        positions={"w": (["France", "Paris"], ["Italy", "Rome"])},
        metric=SEVEN,
    )
    model.tokenizer.padding_side = "right"
    one = splice(model, "in Paris", "he of Rome", positions={"w": (["Paris"], ["Rome"])}, metric=SEVEN)
    value = 0.5 * (float(found.data.effect.sel(depth=1)[0]) + float(one.data.effect.sel(depth=1)[0]))
    assert float(padded.data.effect.sel(set="w", depth=1)) == pytest.approx(value, abs=1e-4)


def test_all_positions_say_nothing_and_the_result_says_so() -> None:
    model = opened("gpt2")
    found = splice(model, A, B, positions={"all": "*", "last": -1}, metric=SEVEN, draws=0)
    np.testing.assert_allclose(found.data.share.sel(set="all"), 1, atol=1e-3)
    assert found.data.attrs["says nothing"] == ["all"] and "says nothing" in found.title and "control" not in found.data


def test_encoders_encoder_decoders_and_bad_input() -> None:
    bert = opened("bert")
    masked = ["The capital of France is <mask>", "The capital of Rome is <mask>"]
    found = splice(bert, *masked, metric=SEVEN)
    assert float(found.data.share.sel(set="both")[0]) == pytest.approx(1, abs=1e-3)
    t5 = opened("t5")
    found = splice(t5, A[0], B[0], over="encoder.layers.*.resid_pre", metric=SEVEN, decoder="in")
    assert float(found.data.share.sel(set="changed")[0]) == pytest.approx(1, abs=1e-3)
    model = opened("llama")
    for wrong, said in {
        "two prompts": lambda: splice(model, A),
        "in pairs": lambda: splice(model, A, B[:1]),
        "nothing to bring": lambda: splice(model, A, A, metric=SEVEN, positions=-1),
        "equal length": lambda: splice(model, "The capital", "The", positions="*", metric=SEVEN),
        "name as many": lambda: splice(model, A[0], B[0], positions={"x": ("0:2", "0:3")}, metric=SEVEN),
        "none in the other": lambda: splice(model, A[0], B[0], positions={"x": (["France"], 3)}, metric=SEVEN),
        "one site of each layer": lambda: splice(model, A[0], B[0], over="layers.*.resid_pre@-1", metric=SEVEN),
    }.items():
        with pytest.raises(InputError, match=wrong):
            said()
