"""How sure it is, what is wrong among the answers it would give, and what is promised about that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import safety as sf
from pellucid.errors import InputError
from pellucid.lenses.lens import unembed
from pellucid.safety.abstention import answered_right, aurc, curve, set_threshold
from pellucid.safety.uncertainty import LAYERED, SCORES
from tests.engine.hand import PROMPTS, opened

ENTROPY = torch.distributions.Categorical


def asked_by_hand(family: str, prompt: str) -> torch.Tensor:
    """[layer, vocabulary] probabilities at the place of the answer, the model's own last."""
    model = opened(family)
    stack = model.anatomy.stacks[-1]
    sites = [f"{stack.prefix}layers.{i}.resid_post" for i in range(len(stack.blocks) - 1)]
    run = model.run(prompt, keep=sites)
    ids = run.inputs.stream("").ids[0].tolist()
    at = ids.index(model.tokenizer.mask_token_id) if family == "bert" else len(ids) - 1
    rows = [unembed(model, run.tensor(site)[:, at : at + 1])[0, 0] for site in sites]
    return torch.stack([*rows, run.logits[0, at]]).double().softmax(-1).detach()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2", "t5", "bert"])
def test_scores_are_what_they_say_in_a_batch_and_alone(family: str) -> None:
    model = opened(family)
    prompts = [p + " <mask>" if family == "bert" else p for p in PROMPTS]
    if family == "bert":
        prompts = [p.replace("<mask>", model.tokenizer.mask_token) for p in prompts]
    layers = [asked_by_hand(family, p) for p in prompts]
    final = [x[-1] for x in layers]
    first = [x.argmax(-1).tolist() for x in layers]
    wanted = {
        "max_probability": [float(p.max()) for p in final],
        "entropy": [-float(ENTROPY(probs=p).entropy()) for p in final],
        "margin": [float(p.sort().values[-1] - p.sort().values[-2]) for p in final],
        "agreement": [sum(i == row[-1] for i in row) / len(row) for row in first],
        "oscillation": [-float(sum(a != b for a, b in zip(row[1:], row[:-1], strict=True))) for row in first],
        "contrast": [-max(js(p, x[-1]) for p in x[(len(x) - 1) // 2 : -1]) for x in layers],
    }
    assert set(wanted) == set(SCORES)
    for name, values in wanted.items():
        assert np.allclose(sf.confidence(model, prompts, name), values, atol=1e-5), name


def js(p: torch.Tensor, q: torch.Tensor) -> float:
    m = (p + q) / 2
    return float(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)


def test_a_model_that_gives_no_choice_is_refused() -> None:
    for wrong, what in (
        (("max_probabilty",), "max_probability"),
        ((lambda model, prompts: [1.0],), "one for each"),
        (([np.nan] * 3,), "none missing"),
    ):
        with pytest.raises(InputError, match=what):
            sf.confidence(opened("llama"), PROMPTS, *wrong)
    with pytest.raises(InputError, match="a list"):
        sf.confidence(opened("llama"), "one")
    assert sf.confidence(opened("llama"), PROMPTS, [1, 2, 3]).tolist() == [1.0, 2.0, 3.0]


# ---- curves


def test_the_curve_and_its_area_are_those_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    sure, right = rng.normal(size=40), rng.random(40) < 0.6
    wrong = ~right[np.argsort(-sure)]
    risks = np.cumsum(wrong) / np.arange(1, 41)
    once = np.ones((1, 40))
    assert np.isclose(aurc(sure, right, once)[0], risks.mean())
    assert np.allclose(curve(sure, right, once)[0], risks[1::2])
    twice = np.concatenate([sure, sure]), np.concatenate([right, right])
    assert np.allclose(curve(sure, right, 2 * once), curve(*twice, np.ones((1, 80))))
    assert np.isclose(aurc(np.zeros(40), right, once)[0], 1 - right.mean())  # all alike: the error itself


@pytest.mark.parametrize(("promise", "most"), [("average", None), ("confidence", 0.05)])
def test_risk_control_keeps_its_promise_over_simulated_sets(promise: str, most: float | None) -> None:
    rng, risk, found = np.random.default_rng(0), 0.1, []
    for _ in range(400):
        sure = rng.random(300)
        right = rng.random(300) < sure**0.3
        level = set_threshold(sure, right, risk, promise, 0.95)  # type: ignore[arg-type]
        s = np.linspace(0, 1, 2_001)
        wrong = (1 - s**0.3) * (s >= level)
        found.append(wrong.mean() if promise == "average" else wrong.sum() / max(1, (s >= level).sum()))
    if most is None:
        assert np.mean(found) <= risk + 0.002 and np.mean(found) > 0.8 * risk
    else:
        assert np.mean(np.array(found) > risk) <= most and np.mean(found) > 0


def test_equal_scores_are_answered_together_or_not_at_all() -> None:
    sure, right = np.array([0.9] * 30 + [0.5] * 10), np.array([True] * 30 + [True, False] * 5)
    assert set_threshold(sure, right, 0.1, "average", 0.95) == 0.9
    assert set_threshold(sure, right, 0.15, "average", 0.95) == 0.5
    assert set_threshold(sure, ~right, 0.1, "average", 0.95) == np.inf


def questions(n: int = 60) -> list[list[int]]:
    return torch.randint(5, 97, (n, 5), generator=torch.Generator().manual_seed(2)).tolist()


def test_abstaining_tells_what_is_right_and_at_what_price() -> None:
    model, prompts = opened("gpt2"), questions()
    said = model.run(prompts).logits[:, -1].argmax(-1)
    target = [int(i) if n % 3 else (int(i) + 1) % 97 for n, i in enumerate(said)]
    assert answered_right(model, prompts, target).tolist() == [bool(n % 3) for n in range(60)]
    found = sf.abstain(
        model,
        prompts,
        target,
        score=[float(n % 3 > 0) + n / 1e3 for n in range(60)],
        risk=0.2,
        draws=20,
        topics=[n // 6 for n in range(60)],
    )
    assert float(found["area"]) == 1.0 and np.isclose(float(found["aurc"]), float(found["optimal_aurc"]))
    assert np.allclose(found["risk"], found["optimal_risk"]) and 0 < float(found["held_out_risk"]) <= 0.3
    assert float(sf.abstain(model, prompts, target, draws=5)["area"]) < 0.9
    with pytest.raises(InputError, match="all 60 answers are right"):
        sf.abstain(model, prompts, said.tolist())
    with pytest.raises(InputError, match="risk="):
        sf.abstain(model, prompts, target, risk=2.0)


# ---- asking again, and the probe


def test_semantic_entropy_counts_meanings() -> None:
    model = opened("llama")
    assert sf.semantic_entropy(
        model, PROMPTS[:2], draws=4, same=lambda a, b: True, max_new_tokens=2
    ).entropy.values.tolist() == [0.0, 0.0]
    found = sf.semantic_entropy(model, PROMPTS[:2], draws=4, same=lambda a, b: False, max_new_tokens=2)
    assert np.allclose(found.entropy, np.log(4)) and found.meanings.values.tolist() == [4, 4]
    own = sf.semantic_entropy(model, PROMPTS[:1], draws=6, max_new_tokens=1)
    counts = np.unique(own.meaning.values[0], return_counts=True)[1] / 6
    assert np.isclose(float(own.entropy[0]), -(counts * np.log(counts)).sum())


def test_the_probe_of_being_right_is_judged_with_topics_held_out(tmp_path: Path) -> None:
    model, prompts = opened("gpt2"), questions(60)
    topics = [p[0] % 6 for p in prompts]
    by_topic = [t < 3 for t in topics]  # its trap: only the topic tells
    trap = sf.ConfidenceProbe("layers.0.resid_post", folds=3, draws=2).fit(model, prompts, by_topic, topics=topics)
    assert float(trap.result_["leaking"]) > float(trap.result_["area"]) and "shuffled" in trap.result_.data
    x = model.run(prompts, keep="layers.1.resid_post").tensor("layers.1.resid_post")[:, -1]
    right = (x[:, 3] > x[:, 3].median()).tolist()
    probe = sf.ConfidenceProbe(folds=3, draws=2).fit(model, prompts[:40], right[:40], topics=topics[:40])
    with pytest.raises(InputError, match="fitted on"):
        sf.confidence(model, prompts, probe)
    told = sf.confidence(model, prompts[40:], probe)
    assert np.mean((told > 0) == np.array(right[40:])) > 0.7
    again = sf.ConfidenceProbe.load(probe.save(tmp_path / "probe.safetensors"))
    assert np.allclose(sf.confidence(model, prompts[40:], again), told, atol=1e-5)
    with pytest.raises(InputError, match="other weights"):
        again.check(opened("llama"))
    made = model.generate(prompts[40:], max_new_tokens=2, monitors=sf.Monitor(again, "first", threshold=0.0))
    assert np.allclose(made.firings.statistic.values[:, 0, 0], told, atol=1e-4)
    with pytest.raises(InputError, match="4 of each"):
        probe.fit(model, prompts, [True] * 58 + [False] * 2)
    with pytest.raises(InputError, match="topics for 3 folds"):
        probe.fit(model, prompts, right, topics=[0] * 60)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_not_being_sure_is_a_monitor(family: str) -> None:
    model = opened(family)
    sure = sf.confidence(model, PROMPTS)
    level = float(np.sort(sure)[:2].mean())  # the least sure alone is below
    made = model.generate(PROMPTS, max_new_tokens=8, monitors=sf.doubt(model, -level))
    silent = [shown == "I am not sure." for shown in made.firings.shown.values]
    assert silent == (sure < level).tolist() and np.allclose(-made.firings.statistic.values[:, 0, 0], sure, atol=1e-5)


def test_layered_scores_need_a_head() -> None:
    assert set(LAYERED) < set(SCORES)
    with pytest.raises(pl.errors.PellucidError):
        sf.confidence(pl.load(opened("bert").module.bert, tokenizer=opened("bert").tokenizer), ["a"])
