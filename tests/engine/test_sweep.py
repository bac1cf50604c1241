"""A sweep gives the numbers of its variants run one by one, whichever way it runs them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid
from pellucid import Ablate, Patch, Replace, Scale, Steer, metrics
from pellucid.engine.edits import Edit
from pellucid.engine.rungs import LADDER, Packed
from pellucid.engine.trial import certified
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from tests.engine.bag import Bag, batches, one_by_one, scores
from tests.engine.hand import PROMPTS, ids, opened
from tests.zoo import Entry, build, tokenizer

# One or two of every kind: what is special about it, and the ways its sweeps may be run.
LONG = " ".join(PROMPTS)
RUNGS = tuple(rung.name for rung in LADDER)
SUFFIX, WHOLE, STUBBED, BATCHED = (RUNGS[i:] for i in range(4))
FAMILIES = {
    "llama": SUFFIX, "gpt2": SUFFIX, "gemma2": SUFFIX, "mistral": SUFFIX, "opt": SUFFIX, "phi": SUFFIX, "cohere": SUFFIX,
    "mixtral": SUFFIX, "gpt_oss": SUFFIX, "deepseek_v3": SUFFIX, "llama4_text": SUFFIX, "t5": SUFFIX, "bart": SUFFIX,
    "bert": WHOLE, "albert": ("packed", "batched", "single"), "modernbert": WHOLE,
    "gptj": STUBBED, "falcon": STUBBED, "bloom": STUBBED, "deberta-v2": STUBBED, "jamba": STUBBED, "zamba2": STUBBED,
    "mamba": STUBBED, "fnet": STUBBED, "xlm": STUBBED, "xlnet": BATCHED, "fsmt": BATCHED,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_executor_gives_the_numbers_of_plain_runs(family: str) -> None:
    model, draw = opened(family), random.Random(family)
    may = [r.name for r in LADDER if not certified(model.anatomy).refused(r)]
    through = (
        all(b.attentions["attn"].route == "interface" for b in model.anatomy.stacks[-1].blocks)
        if family == "gptj"
        else False
    )
    assert tuple(may) == tuple(SUFFIX if through else FAMILIES[family])  # by the version of transformers
    for name, (given, other) in batches(model).items():
        variants = list(Bag(model, given, other, seed=len(name)).variants(10))
        if family == "xlm":
            variants = [v for v in variants if not any("resid_p" in str(e.site) or e.site.part == "embed" for e in v)]
        logits = model.run(given).logits
        which = draw.choice(sorted(scores(logits, given.stream("").padded)))
        metric = scores(logits, False)[which]
        truth = one_by_one(model, given, variants, metric)
        for rung in may:
            try:
                made = model.sweep(given, variants, metric, executor=rung)
            except Refused as error:
                assert "outside the last stack" in str(error) or "inputs of this size" in str(error)
                continue
            error = (made.values - truth).abs().max() / truth.abs().max().clamp_min(1)
            assert float(error) < 1e-4, (name, which, rung)
            assert bool(made.done.all())


def test_a_classifier_is_swept_through_its_class_logits() -> None:
    module = build(Entry("bert", "BertForSequenceClassification", "classification"))
    classifier = pellucid.load(module, tokenizer=tokenizer(module))
    variants: list[Edit] = [Ablate(f"layers.{layer}.attn.heads.{h}") for layer in range(2) for h in range(4)]
    for metric in (metrics.class_logit(1), metrics.class_probability(0)):
        made = classifier.sweep(ids(), variants, metric)
        assert made.plan.rung.name == "stubbed"
        assert torch.allclose(
            made.values, one_by_one(classifier, classifier.inputs(ids()), [[v] for v in variants], metric), atol=1e-5
        )


def test_edits_that_look_at_the_whole_batch_and_variants_without_edits_are_right() -> None:
    model, given = opened("llama"), opened("llama").inputs(PROMPTS)
    variants: list[list[Edit]] = [
        [Ablate("layers.1.resid_pre@-1", "mean")],
        [],
        [Ablate("layers.1.attn.heads.1@-2", "position_mean"), Scale("layers.0.mlp.out@-1", 2.0)],
        [Steer("layers.0.resid_mid@-1", torch.ones(32)), Replace("layers.0.resid_mid@0", lambda x: -x)],
        [Scale("final_norm@-1", 2.0)],
    ]
    for some in (variants, variants[:-1]):
        made = model.sweep(given, some, metrics.logit(7))
        assert torch.allclose(made.values, one_by_one(model, given, some, metrics.logit(7)), atol=1e-5)
    assert torch.allclose(made.values[1], made.clean)


def test_the_planner_takes_the_cheapest_way_and_explains_it() -> None:
    model, variants = (
        opened("llama"),
        [Ablate(f"layers.{layer}.resid_post@{p}") for layer in range(2) for p in range(5)],
    )
    plan = model.plan(PROMPTS[0], variants, metrics.logit_difference(7, 9))
    text = plan.explain()
    assert "10 variants of 1 prompt, 5 tokens\n" in text
    assert "executor: packed, suffix (equal to plain runs on this model)" in text
    assert "unembedded: 1 position, 2 vocabulary rows" in text
    assert "batches: 1 within 40 MiB" in text
    assert plan.cost < 8
    plan.run()
    assert plan.explain().splitlines()[:3] == text.splitlines()[:3]
    slower = opened("bloom").plan(ids(), variants, metrics.logit(7))
    assert "executor: stubbed (not packed, suffix: attention does not go through the interface" in slower.explain()
    outside = opened("t5").plan(PROMPTS, [Scale("encoder.layers.0.resid_post", 2.0)], metrics.logit(7))
    assert "not stubbed: an edit lies outside the last stack's blocks" in outside.explain()


def test_batches_keep_within_the_memory_budget() -> None:
    model = opened("llama")
    variants = [Ablate(f"layers.{layer}.attn.heads.{h}") for layer in range(2) for h in range(4)] * 4
    wanted = model.sweep(PROMPTS, variants, metrics.logit(7))
    for executor in RUNGS:
        plan = model.plan(PROMPTS, variants, metrics.logit(7), memory=300_000, executor=executor)
        chunks = list(plan.chunks(plan.variants))
        assert all(sum(plan.rung.room(plan.job, v) for v in chunk) <= 300_000 or len(chunk) == 1 for chunk in chunks)
        assert len(chunks) > 1
        assert sorted(v.index for chunk in chunks for v in chunk) == list(range(len(variants)))
        assert torch.allclose(plan.run().values, wanted.values, atol=1e-5)


# ---- interruption


class Stop(BaseException):
    """Like a KeyboardInterrupt, which pytest would take for its own."""


class Stopping:
    """Doubles, and stops everything when it has done so twice."""

    made = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.made += 1
        if self.made == 3:
            raise Stop
        return x * 2


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, file = opened("llama"), tmp_path / "sweep.npz"
    stopping = Stopping()
    variants: list[Edit] = [Scale(f"layers.0.attn.heads.{h}", s) for h in range(4) for s in (0.0, 2.0)]
    variants += [Replace("layers.1.resid_pre", stopping)] * 4
    plan = model.plan(PROMPTS[0], variants, metrics.logit(7), memory=1, checkpoint=file)
    with pytest.raises(Stop):
        plan.run()
    assert 0 < int(plan.done.sum()) < len(variants)
    assert torch.isnan(plan.values[~plan.done]).all()
    other = model.plan(PROMPTS[0], variants, metrics.logit(7), memory=1, checkpoint=file)
    before = stopping.made
    finished = other.run()  # another plan, from the file
    assert bool(finished.done.all())
    assert stopping.made - before <= 4
    again = plan.run()  # the same plan, from memory
    assert torch.equal(again.values, finished.values)
    assert torch.allclose(
        again.values, one_by_one(model, model.inputs(PROMPTS[0]), [[v] for v in variants], metrics.logit(7)), atol=1e-5
    )


def test_a_checkpoint_of_another_sweep_is_refused(tmp_path: Path) -> None:
    model, file = opened("llama"), tmp_path / "sweep.npz"
    vector = torch.ones(32)

    def sweep(
        prompt: str = PROMPTS[0], strength: float = 1.0, answer: int = 7, function: Any = torch.neg, **options: Any
    ) -> Tensor:
        edits = [Steer("layers.0.resid_post", vector, strength), Replace("layers.1.resid_pre", lambda x: function(x))]
        return model.sweep(prompt, edits, metrics.logit(answer), checkpoint=file, **options).values

    first = sweep()
    assert torch.equal(sweep(), first)
    for options in ({"prompt": PROMPTS[1]}, {"strength": 2.0}, {"answer": 8}, {"function": torch.abs}):
        with pytest.raises(InputError, match="holds another sweep"):
            sweep(**options)
    vector[3] = 5.0
    with pytest.raises(InputError, match="holds another sweep"):
        sweep()
    vector[3] = 1.0
    twin = build("llama", seed=1)
    other = pellucid.load(twin, tokenizer=tokenizer(twin))
    model = other
    with pytest.raises(InputError, match="or model"):
        sweep()
    file.write_text("not a checkpoint")
    with pytest.raises(InputError, match="no checkpoint of a sweep"):
        sweep()


def test_references_tell_checkpoints_apart(tmp_path: Path) -> None:
    model, file, site = opened("llama"), tmp_path / "sweep", "layers.0.resid_post"
    runs = [model.run(PROMPTS[0].replace("France", name), keep=[site]) for name in ("Italy", "Rome")]
    model.sweep(PROMPTS[0], [Patch(site, runs[0])], metrics.logit(7), checkpoint=file)
    model.sweep(PROMPTS[0], [Patch(site, runs[0])], metrics.logit(7), checkpoint=file)
    with pytest.raises(InputError, match="holds another sweep"):
        model.sweep(PROMPTS[0], [Patch(site, runs[1])], metrics.logit(7), checkpoint=file)


# ---- what is not taken on trust


def test_a_way_that_fails_on_inputs_of_a_new_size_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("llama")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    native = Packed.run

    def spoiled(self: Any, job: Any, chunk: Any) -> list[Tensor]:
        long = job.inputs.stream("").ids.shape[1] > 12
        return [x + 0.1 if long else x for x in native(self, job, chunk)]

    monkeypatch.setattr(Packed, "run", spoiled)
    variants: list[Edit] = [Ablate(f"layers.{layer}.attn.heads.{h}") for layer in range(2) for h in range(4)]
    for prompt, rung in ((PROMPTS[0], "packed, suffix"), (LONG, "stubbed")):
        made = model.sweep(prompt, variants, metrics.logit(7))
        assert made.plan.rung.name == rung
        truth = one_by_one(model, model.inputs(prompt), [[v] for v in variants], metrics.logit(7))
        assert torch.allclose(made.values, truth, atol=1e-5)
    assert "differs from plain runs" in model.plan(LONG, variants, metrics.logit(7)).explain()
    with pytest.raises(Refused, match="does not serve this sweep: differs"):
        model.sweep(LONG, variants, metrics.logit(7), executor="packed")


def test_hooks_of_the_user_see_every_run_by_itself() -> None:
    module = build("llama")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    variants: list[Edit] = [Ablate(f"layers.1.attn.heads.{h}") for h in range(4)]
    plain = model.sweep(ids(), variants, metrics.logit(7)).values
    hook = module.model.layers[0].register_forward_hook(lambda m, a, output: output * 1.5)
    hooked = model.sweep(ids(), variants, metrics.logit(7))
    assert hooked.plan.rung.name == "single"
    assert torch.allclose(
        hooked.values, one_by_one(model, model.inputs(ids()), [[v] for v in variants], metrics.logit(7)), atol=1e-6
    )
    hook.remove()
    assert not torch.allclose(hooked.values, plain, atol=1e-3)
    assert torch.equal(model.sweep(ids(), variants, metrics.logit(7)).values, plain)


def test_errors_of_an_edit_are_the_users_to_see() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    model = opened("llama")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            model.sweep(PROMPTS[2], [Replace("layers.0.mlp.out", broken)], metrics.logit(7))
    assert model.plan(PROMPTS[2], [Ablate("layers.0.mlp.out")], metrics.logit(7)).rung.name == "packed, suffix"
    with pytest.raises(InputError, match="a sweep needs at least one variant"):
        model.sweep(PROMPTS[0], [], metrics.logit(7))
    with pytest.raises(InputError, match="did you mean 'packed'"):
        model.sweep(PROMPTS[0], [[]], metrics.logit(7), executor="packt")


@pytest.mark.slow
def test_a_sweep_of_smollm2_equals_plain_runs_on_a_sample(smollm2: Model) -> None:
    clean, corrupted = "When Mary and John went out, John gave it to", "When Mary and John went out, Mary gave it to"
    source = smollm2.run(clean, keep=["layers.*.resid_pre"])
    n = len(source.inputs.stream("").labels[0])
    variants: list[Edit] = [Patch(f"layers.{layer}.resid_pre@{p}", source) for layer in range(30) for p in range(n)]
    metric = metrics.logit_difference(" Mary", " John")
    made = smollm2.sweep(corrupted, variants, metric)
    assert made.plan.rung.name == "packed, suffix"
    sample = random.Random(0).sample(range(len(variants)), 8)
    truth = one_by_one(smollm2, smollm2.inputs(corrupted), [[variants[i]] for i in sample], metric)
    assert torch.allclose(made.values[sample], truth, atol=1e-3)


def test_a_classifier_has_no_vocabulary_to_make_room_for():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = pellucid.load(BertForSequenceClassification(config).eval(), tokenizer=tokenizer())
    variants = [Ablate(f"layers.0.resid_pre@{i % 5}") for i in range(40)]
    plan = model.plan("Mary went to the store", variants, metrics.class_logit(1), memory=4 << 20)
    assert len(list(plan.chunks(plan.variants))) == 1
