"""The loop is torch's own step by step, goes on bit for bit, and refuses the file of another fit with what differs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pellucid.engine.pausing import Moment, sharing
from pellucid.errors import InputError
from pellucid.training import Keeper, constant, cosine, draws, linear, train

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.05),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.01),
}


def fresh() -> dict[str, Tensor]:
    return {"w": torch.zeros(3), "b": torch.zeros(())}


def noisy(p: dict[str, Tensor]):
    """A loss with noise of its own, as dropout has."""

    def loss(rows: Tensor, step: int) -> Tensor:
        x = X[rows] * torch.empty_like(X[rows]).bernoulli_(0.8)
        return ((x @ p["w"] + p["b"] - Y[rows]) ** 2).mean()

    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", [constant, linear, cosine])
def test_it_is_the_plain_loop(name, schedule):
    p, q = fresh(), fresh()
    parts = draws(40, 8, 3, seed=1)
    noted = train(p, parts, noisy(p), OPTIMIZERS[name], schedule=schedule, seed=5)
    slow = [q[k].requires_grad_() for k in q]
    rule = OPTIMIZERS[name](slow)
    for i, rows in enumerate(parts):
        rule.param_groups[0]["lr"] = 0.05 * schedule(i / len(parts))
        rule.zero_grad()
        torch.manual_seed((5 << 32) + i)
        loss = noisy(q)(rows, i)
        loss.backward()
        rule.step()
        assert noted[i] == float(loss.detach())
    assert all(torch.equal(p[k], q[k]) for k in p)
    assert not any(v.requires_grad or v.grad is not None for v in p.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("when", ["in a loss", "in a pause"])
def test_an_interrupted_fit_ends_with_the_same_bits(name, when, tmp_path):
    def fitted(keeper, broken=False):
        p, beside = fresh(), {"seen": torch.zeros(())}
        seen: list[int] = []

        def loss(rows, step):
            seen.append(step)
            if broken and when == "in a loss" and step == 7:
                raise KeyboardInterrupt
            return noisy(p)(rows, step)

        def heard(moment: Moment) -> None:
            if broken and when == "in a pause" and moment.done == 7:
                raise KeyboardInterrupt

        with sharing(heard):
            noted = train(p, draws(40, 8, 3), loss, OPTIMIZERS[name], schedule=linear, keeper=keeper, beside=beside,
                          after=lambda step: beside["seen"].add_(1), seed=3)  # fmt: skip
        return p, beside, noted, seen

    keeper = Keeper(tmp_path / "fit.safetensors", {"corpus": "abc"}, every=5)
    with pytest.raises(KeyboardInterrupt):
        fitted(keeper, broken=True)
    p, beside, noted, seen = fitted(keeper)
    q, _, whole, _ = fitted(None)
    assert seen[0] == 7 and noted == whole and float(beside["seen"]) == 15
    assert all(torch.equal(p[k], q[k]) for k in p)
    assert fitted(keeper)[3] == []  # it is done


def test_a_half_done_update_is_not_kept(tmp_path):
    keeper = Keeper(tmp_path / "fit.safetensors", {}, every=4)
    p = fresh()

    def breaks(step):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(p, draws(40, 8, 3), noisy(p), OPTIMIZERS["adam"], keeper=keeper, after=breaks)
    _, about = keeper.load()
    assert len(about["noted"]) == 4


def test_the_file_of_another_fit_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "fit.safetensors"

    def fit(of, epochs=2, p=None):
        p = p or fresh()
        train(p, draws(40, 8, epochs), lambda rows, step: sum((v**2).sum() for v in p.values()) + 1.0,
              OPTIMIZERS["adam"], keeper=Keeper(path, of))  # fmt: skip

    fit({"corpus": "abc", "learning_rate": 1.0})
    with pytest.raises(InputError, match=r"another fit \(corpus was 'abc', is 'xyz'\)"):
        fit({"corpus": "xyz", "learning_rate": 1.0})
    with pytest.raises(InputError, match=r"learning_rate was 1.0, is 0.5; share was None, is 2"):
        fit({"corpus": "abc", "learning_rate": 0.5, "share": 2})
    with pytest.raises(InputError, match="10 steps, now 15"):
        fit({"corpus": "abc", "learning_rate": 1.0}, epochs=3)
    with pytest.raises(InputError, match="other parameters"):
        fit({"corpus": "abc", "learning_rate": 1.0}, p={"other": torch.zeros(2)})
    path.write_text("no tensors")
    with pytest.raises(InputError, match="no checkpoint of a fit"):
        fit({"corpus": "abc", "learning_rate": 1.0})


def test_a_loss_may_set_gradients_itself_and_batches_may_be_a_stream():
    p, q = fresh(), fresh()
    parts = draws(40, 8, 2)

    def own(rows, step):
        loss = noisy(p)(rows, step)
        p["w"].grad, p["b"].grad = torch.autograd.grad(loss, [p["w"], p["b"]])
        return [float(loss.detach()), 1.0]

    noted = train(p, lambda start: iter(parts[start:]), own, OPTIMIZERS["sgd"], steps=len(parts))
    assert [n[0] for n in noted] == train(q, parts, noisy(q), OPTIMIZERS["sgd"])
    assert torch.equal(p["w"], q["w"])
    with pytest.raises(InputError, match="batches for 10 of 12 steps"):
        train(fresh(), lambda start: iter(parts), lambda rows, step: [0.0], OPTIMIZERS["sgd"], steps=12)


@torch.no_grad()
def test_it_trains_under_no_grad_and_leaves_all_else_alone():
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    p = {"w": torch.ones(3)}
    before = torch.get_rng_state()
    train(p, draws(40, 8), lambda rows, step: ((frozen(X[rows]) @ p["w"]) ** 2).mean(), OPTIMIZERS["adam"])
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(p["w"], torch.ones(3)) and frozen.weight.grad is None


def test_a_control_arm_sees_the_same_batches_and_noise():
    seen: dict[str, list[Tensor]] = {"own": [], "control": []}
    for name in seen:
        p = fresh()

        def loss(rows, step, p=p, name=name):
            seen[name].append(torch.cat([rows.float(), torch.rand(1)]))
            return ((X[rows] @ p["w"] - (Y if name == "own" else Y.flip(0))[rows]) ** 2).mean()

        train(p, draws(40, 8, 2, seed=4), loss, OPTIMIZERS["adam"], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_smaller_than_the_rounding_of_16_bits_add_up(dtype, tmp_path):
    """Alone each is lost, and Adam's 1e-8 is zero in float16: the sum of them is what float32 gives, rounded once."""

    def after(p, steps, keeper=None):
        train(p, [0] * 40, lambda _, step: (p["w"] * 3.0).sum() if step < steps else stop(), partial(torch.optim.Adam, lr=1e-4), keeper=keeper)  # fmt: skip
        return p["w"]

    def stop():
        raise KeyboardInterrupt

    exact, plain = after({"w": torch.ones(3)}, 40), {"w": torch.ones(3, dtype=dtype)}
    assert torch.equal(after(plain, 40), exact.to(dtype)) and bool((plain["w"] < 1).all())
    resumed, keeper = {"w": torch.ones(3, dtype=dtype)}, Keeper(tmp_path / "fit.safetensors", {})
    with pytest.raises(KeyboardInterrupt):
        after(resumed, 17, keeper)
    assert torch.equal(after({"w": torch.ones(3, dtype=dtype)}, 40, keeper), plain["w"])


def test_what_is_put_back_by_hand_is_where_the_next_step_of_16_bits_begins():
    p, q = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.ones(2)}
    for each in (p, q):
        train(each, [0] * 4, lambda _, step, w=each["w"]: w.sum(), partial(torch.optim.SGD, lr=0.5), after=lambda step, w=each["w"]: w[:1].fill_(1.0))  # fmt: skip
    assert p["w"].tolist() == q["w"].tolist() == [1.0, -1.0]


def test_a_loss_that_is_no_number_ends_the_fit_by_name():
    p = {"w": torch.ones(2, dtype=torch.float16)}
    with pytest.raises(InputError, match=r"the loss is inf at step 0.*float16 ends at 65504"):
        train(p, [0], lambda _, step: (p["w"] * 60000).sum(), partial(torch.optim.SGD, lr=1.0), what="a fit")
    assert p["w"].tolist() == [1, 1]
    q = {"w": torch.ones(2)}
    with pytest.raises(InputError, match="'w' holds no finite numbers after 1 steps: give a smaller learning rate"):
        train(q, [0], lambda _, step: (q["w"] * 1e20).sum(), partial(torch.optim.SGD, lr=1e30))
