"""A property learnt along is easier to read, an unlearnt one harder for the old reader; a new one says what that is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import tuning as tu
from pellucid.errors import InputError
from pellucid.tuning.data import Encoded
from pellucid.tuning.objective import Pass
from tests.tuning.test_fit import KINDS, QUICK, data, opened
from tests.tuning.test_trainer import arguments, resumed

SITE = "layers.1.resid_post"


def paris(n: int = 16, labels: Any = True) -> tu.Rationales:
    """Whether a text speaks of Paris or Rome; None for the last."""
    given = data(labels, n=n)
    holds: list[Any] = ["Paris" in t or "Rome" in t for t in given.texts]
    return replace(given, properties={"named": [*holds[:-1], None]})


def values(made: tu.Tuned) -> dict[str, float]:
    found = made.result.data["after"]
    return {a: float(found.sel(arm=a)[0]) for a in found["arm"].values.tolist()}


def test_a_property_is_learnt_along_and_its_reader_kept() -> None:
    made = tu.fit(
        opened("bert-class"), paris(), tu.ProbeTask("named", SITE, weight=3.0), **QUICK | {"steps": 15, "batch": 8}
    )
    found = values(made)
    assert found["objective"] < min(0.55, found["control"]) and torch.isnan(torch.tensor(found["plain"]))
    own = made.beside["objective"]["ProbeTask(named)"]
    assert own["weight"].shape == (32,) and not made.beside["plain"]
    objective, encoded = tu.ProbeTask("named", SITE), Encoded(made.model, paris())
    batch = encoded.batch(range(16))
    with torch.no_grad():
        seen = Pass(made.model, batch, encoded, keep=objective.sites(made.model), beside=made.beside["objective"])
        x = seen.run.tensor(SITE)
        total, n = 0.0, {True: 0, False: 0}
        holds = paris().properties["named"][:-1]
        for h in holds:
            n[h] += 1
        for b, h in enumerate(holds):
            length = int(batch.inputs.stream("").lengths[b])
            v = x[b, :length].mean(0)
            v = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
            z = float(v @ own["weight"] + own["bias"])
            total += 0.5 / n[h] * float(torch.nn.functional.softplus(torch.tensor(-z if h else z)))
        assert float(objective.loss(seen, torch.Generator())) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("how", ["reversal", "means"])
def test_a_property_is_unlearnt_through_a_turned_gradient(how: str) -> None:
    model, given = opened("bert-class"), paris()
    objective = tu.Unlearn("named", SITE, how=how, weight=1.0)  # type: ignore[arg-type]
    encoded = Encoded(model, given)
    own = {objective.name: {k: t.requires_grad_() for k, t in objective.beside(model, encoded, 0).items()}}
    weight = model.module.bert.encoder.layer[0].output.dense.weight
    with torch.enable_grad():
        seen = Pass(model, encoded.batch(range(16)), encoded, keep=objective.sites(model), beside=own)
        ours = torch.autograd.grad(objective.loss(seen, torch.Generator()), [weight, *own[objective.name].values()])
        if how == "reversal":  # the model's gradient is the task's with its sign turned, the reader's is the task's own
            task = tu.ProbeTask("named", SITE)
            seen = Pass(
                model,
                encoded.batch(range(16)),
                encoded,
                keep=task.sites(model),
                beside={task.name: own[objective.name]},
            )
            theirs = torch.autograd.grad(task.loss(seen, torch.Generator()), [weight, *own[objective.name].values()])
            assert torch.allclose(ours[0], -theirs[0]) and all(
                torch.allclose(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True)
            )
    made = tu.fit(model, given, objective, **QUICK | {"steps": 10, "batch": 8})
    assert "control" in made.arms and not made.changed


@pytest.mark.parametrize("family", ["gpt2", "lora", "t5"])
def test_other_kinds_of_models(family: str) -> None:
    stack = opened(family).anatomy.stacks[0].name
    site = f"{stack + '.' if stack else ''}{SITE}"
    given = paris(8, KINDS[family])
    reader = tu.direction(opened(family), given, [bool(v) for v in given.properties["named"]], site)
    objectives = [
        tu.ProbeTask("named", site), tu.Unlearn("named", site), tu.ProbePenalty(reader, form="raise", where="rationale")
    ]  # fmt: skip
    made = tu.fit(opened(family), given, objectives, control=False, **QUICK)
    assert torch.isfinite(torch.tensor(made.result.data["after"].sel(arm="objective").values)).all()


def test_a_reward_raises_what_a_reader_sees_where_it_is_told_to_look() -> None:
    model, given = opened("bert-class"), paris()
    reader = tu.direction(model, given, [bool(v) for v in given.properties["named"]], SITE)
    options = QUICK | {"steps": 10, "batch": 8}
    up, down = (
        values(tu.fit(model, given, tu.ProbePenalty(reader, form=form, where="rationale", weight=2.0), **options)) for form in ("raise", "lower")  # type: ignore[arg-type]
    )  # fmt: skip
    assert up["objective"] < min(up["plain"], up["control"]) and down["objective"] < min(down["plain"], down["control"])
    with pytest.raises(InputError, match="expected one of square"):
        tu.ProbePenalty(reader, form="up")  # type: ignore[arg-type]


def test_the_trainer_keeps_the_reader_in_its_checkpoints(tmp_path: Path) -> None:
    def made(path: Path, **more: Any) -> Any:
        return tu.trainer(
            opened("bert-class"), paris(8), tu.ProbeTask("named", SITE), arguments(path, 4, 1, max_steps=4, **more)
        )

    whole, again = resumed(made, tmp_path)
    own, back = (each.tuned_beside["ProbeTask(named)"]["weight"] for each in (whole, again))
    assert torch.equal(own, back) and own.abs().max() > 0.01


def test_what_is_no_property_is_an_error() -> None:
    model = opened("bert-class")
    for objective, given, said in (
        (tu.ProbeTask("colour", SITE), paris(), "none of that name"),
        (tu.ProbeTask("named", "layers.*.resid_post"), paris(), "is 2 sites"),
        (tu.ProbeTask("named", SITE), replace(paris(), properties={"named": [True] * 16}), "both kinds"),
        (
            tu.ProbeTask("named", SITE),
            replace(paris(), properties={"named": ["a", "b"] * 8}),
            "expected True, False or None",
        ),
    ):
        with pytest.raises(InputError, match=said):
            tu.fit(model, given, objective, **QUICK)
