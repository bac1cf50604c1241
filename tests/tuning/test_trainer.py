"""In `transformers.Trainer` the same loss, the same gradients under accumulation, and the same numbers after resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pellucid import tuning as tu
from pellucid.errors import InputError
from pellucid.tuning.data import Encoded
from tests.tuning.test_fit import KINDS, data, equal, opened, weights

OBJECTIVES = [tu.Consistency("rationale", by="random", weight=3.0), tu.RightReasons("decoy", weight=1.0)]


class Norms(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        )


def arguments(path: Path, batch: int, times: int, **more: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(path), per_device_train_batch_size=batch, gradient_accumulation_steps=times, max_grad_norm=0.0, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, **{"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-2} | more,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["bert-class", "gpt2", "t5"])
def test_four_times_four_is_one_of_sixteen(family: str, tmp_path: Path) -> None:
    """Without drawing: what an objective draws belongs to its pass."""
    objective = tu.Consistency("rationale", by="Rome", weight=3.0)
    found = []
    for batch, times in ((16, 1), (4, 4)):
        norms = Norms()
        tu.trainer(
            opened(family),
            data(KINDS[family], n=16),
            [objective, OBJECTIVES[1]],
            arguments(tmp_path, batch, times),
            callbacks=[norms],
        ).train()
        found.append(norms.found[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6 if family != "t5" else 1e-5)


def resumed(made: Callable[..., Any], path: Path) -> tuple[Any, Any]:
    """`made(folder, **arguments)` is a trainer: trained at once, and from the checkpoint after two of its steps, it ends with the same weights."""
    whole, part = made(path / "a"), made(path / "b", save_strategy="steps", save_steps=2)
    whole.train()
    part.train()
    again = made(path / "b")
    again.train(resume_from_checkpoint=str(path / "b" / "checkpoint-2"))
    assert equal(weights(whole.tuned), weights(again.tuned))
    return whole, again


def test_it_resumes_to_the_same_numbers_and_evaluates(tmp_path: Path) -> None:
    given, before = data(n=8), weights(opened("bert-class"))

    def made(path: Path, **more: Any) -> Any:
        return tu.trainer(
            opened("bert-class"), given, OBJECTIVES, arguments(path, 4, 1, max_steps=4, **more), test=given
        )

    whole, again = resumed(made, tmp_path)
    assert equal(before, weights(opened("bert-class"))) and not equal(before, weights(whole.tuned))
    assert again.evaluate()["eval_loss"] > 0 and {"task", "Consistency(rationale)"} <= set(whole.state.log_history[0])


def test_no_number_stops_it_and_heads_alone_are_trained(tmp_path: Path) -> None:
    class Broken(tu.Objective):
        def loss(self, seen: Any, generator: Any) -> Any:
            return seen.logits.sum() * float("nan" if seen.batch.step == 1 else 1)

    with pytest.raises(tu.Diverged, match="Broken is nan at step 1"):
        tu.trainer(opened("bert-class"), data(), Broken(), arguments(tmp_path, 4, 1, max_steps=3)).train()
    made = tu.trainer(
        opened("bert-class"),
        data(),
        OBJECTIVES,
        arguments(tmp_path, 4, 1, weight_decay=0.5),
        layers=tu.Only(heads={0: [1]}, head=False),
    )
    made.train()
    moved = {k: v != weights(made.tuned)[k] for k, v in weights(opened("bert-class")).items()}
    moved = {k: v for k, v in moved.items() if v.any()}
    assert moved and all("layer.0.attention" in k for k in moved)
    assert not moved["bert.encoder.layer.0.attention.self.value.weight"][: 32 // 4].any()


def test_in_mixed_precision_weights_stay_whole_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    half = tu.trainer(
        opened("bert-class"), data(), OBJECTIVES, arguments(tmp_path / "half", 4, 1, max_steps=2, bf16=True)
    )
    half.train()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in half.tuned.module.parameters())
    assert half.state.log_history[0]["loss"] > 0 and not equal(weights(half.tuned), weights(opened("bert-class")))

    class Stopped(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = tu.trainer(opened("bert-class"), data(), OBJECTIVES, arguments(tmp_path / "whole", 4, 1, max_steps=4))
    whole.train()
    part = tu.trainer(
        opened("bert-class"), data(), OBJECTIVES, arguments(tmp_path / "part", 4, 1, **options), callbacks=[Stopped()]
    )
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = tu.trainer(opened("bert-class"), data(), OBJECTIVES, arguments(tmp_path / "part", 4, 1, **options))
    again.train(resume_from_checkpoint=True)
    assert equal(weights(whole.tuned), weights(again.tuned))


def test_what_diverges_leaves_the_last_good_weights(tmp_path: Path) -> None:
    class Broken(tu.Objective):
        def loss(self, seen: Any, generator: Any) -> Any:
            return seen.logits.sum() * float("nan" if seen.batch.step == 2 else 1)

    def made(steps: int, objective: Any, **more: Any) -> Any:
        args = arguments(tmp_path, 4, 1, max_steps=steps, lr_scheduler_type="constant", **more)
        return tu.trainer(opened("bert-class"), data(n=16), objective, args)

    with pytest.raises(tu.Diverged) as caught:
        made(3, Broken()).train()
    one = made(1, Broken())
    one.train()
    assert equal(weights(caught.value.model), weights(one.tuned))  # those of step 1, at which all were numbers
    with pytest.raises(tu.Diverged, match="is nan at step 1") as caught:  # weights that one step threw far away
        made(3, tu.Consistency("decoy"), learning_rate=1e30).train()
    assert equal(weights(caught.value.model), weights(opened("bert-class")))


@pytest.mark.parametrize("kind", ["concepts", "selection"])
def test_what_learns_beside_the_model_is_trained_kept_resumed_and_tied_to_its_weights(
    kind: str, tmp_path: Path
) -> None:
    given = dataclasses.replace(data(n=8), properties={"long": [" and " in t for t in data(n=8).texts]})
    asked: Any = (
        tu.Bottleneck(residual=1) if kind == "concepts" else tu.Select(warm=1, share=0.4, teach="rationale", slower=0.5)
    )

    def made(path: Path, **more: Any) -> Any:
        args = arguments(path, 4, 1, max_steps=4, lr_scheduler_type="constant", **more)
        return tu.trainer(opened("bert-class"), given, asked, args, test=given, head_learning_rate=2e-2)

    whole, again = resumed(made, tmp_path)
    own, back = (each.tuned_objectives[0] for each in (whole, again))
    assert all(torch.equal(t, back.parameters[name]) for name, t in own.parameters.items())
    loaded = type(asked).load(own.save(tmp_path / "kept.safetensors"))
    loaded.check(whole.tuned)
    with pytest.raises(InputError, match="belongs to other weights"):
        loaded.check(opened("bert-class"))
    assert whole.evaluate()["eval_loss"] > 0
    fresh = {n: t.clone() for n, t in asked.begun(opened("bert-class"), Encoded(opened("bert-class"), given), 42).parameters.items()}  # fmt: skip
    moved = {n: float((t.detach() - fresh[n]).abs().max()) for n, t in own.parameters.items()}
    if kind == "concepts":
        assert len(whole.tuned_edits()) == 1 and moved["head.concepts"] > 0.01
    else:  # its score learns at the head's rate, its copied block at the model's
        assert moved["head.score"] > 0.03 and 0.005 < max(v for n, v in moved.items() if "copied" in n) < 0.05
