"""What is predicted from short runs is what is counted at full length; what does not fit is said before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import pellucid as pl
from pellucid.engine import sweep as sweeps
from pellucid.engine.peak import counted
from pellucid.engine.peak import said as words
from pellucid.errors import InputError, Refused

METRIC = pl.metrics.logit_difference(3, 5)


def opened(module: Any) -> pl.Model:
    return pl.load(module.eval(), tokenizer=False)


@pytest.fixture(scope="module")
def model() -> pl.Model:
    torch.manual_seed(0)
    return opened(LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)))  # fmt: skip


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["llama", "gpt2, eager", "padded", "bf16"])
@pytest.mark.parametrize("what", ["nothing", "kept", "gradients", "patterns"])
def test_the_peak_of_a_run_is_known_from_short_ones(model: pl.Model, form: str, what: str) -> None:
    given: Any = ids(3, 90)
    if form == "gpt2, eager":
        model = opened(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")))  # fmt: skip
    if form == "padded":
        given = model.inputs([ids(1, 90)[0].tolist(), ids(1, 70)[0].tolist(), ids(1, 9)[0].tolist()])
    if form == "bf16":
        model = opened(LlamaForCausalLM(model.module.config).to(torch.bfloat16))
    options: dict[str, Any] = {
        "nothing": {},
        "kept": {"keep": ["layers.*.resid_post", "layers.*.mlp.neurons", "layers.1.attn.z"]},
        "gradients": {"keep": ["layers.*.resid_post"], "grad_of": METRIC},
        "patterns": {"keep": ["layers.*.attn.pattern"]},
    }[what]
    said = model.memory(given, **options)
    moments, _ = counted(lambda: model.run(given, **options))
    assert said == pytest.approx(max(moments), rel=0.1)


def test_the_peak_of_a_sweep_is_known_before_it_starts(model: pl.Model) -> None:
    given = ids(2, 120)
    heads = [pl.Ablate(f"layers.{i}.attn.heads.{h}") for i in range(3) for h in range(4)]
    for executor in ("packed, suffix", "stubbed", "batched", "single"):
        for memory in (None, 1):
            plan = model.plan(given, heads, METRIC, executor=executor, memory=memory)
            said = plan.peak
            plan.settle()
            plan.job.forget()
            moments, _ = counted(plan.run)
            assert said == pytest.approx(max(moments), rel=0.2), (executor, memory)
    assert f"memory: about {words(said)} beyond" in plan.explain()


def test_a_classifier_and_a_short_prompt_have_a_peak(model: pl.Model) -> None:
    bert = opened(BertForSequenceClassification(BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)))  # fmt: skip
    given = ids(2, 50)
    assert bert.memory(given) == pytest.approx(max(counted(lambda: bert.run(given))[0]), rel=0.1)
    one = ids(1, 3)
    assert model.memory(one) == pytest.approx(max(counted(lambda: model.run(one))[0]), rel=0.1)


def test_what_does_not_fit_is_said_before_it_starts_and_what_would(
    model: pl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = model.plan(ids(8, 60), [pl.Ablate("layers.0.mlp.out")], METRIC)
    runs: list[Any] = []
    peak = plan.peak
    with monkeypatch.context() as patched:
        patched.setattr(sweeps, "free", lambda device: peak / 2.1)
        patched.setattr(type(plan.rung), "run", lambda *given: runs.append(given))
        with pytest.raises(Refused, match="at most 3 of these 8 prompts at a time"):
            plan.run()
        patched.setattr(sweeps, "free", lambda device: peak / 20)
        with pytest.raises(Refused, match="shorter prompts, or a smaller memory="):
            plan.run()
    assert not runs
    assert plan.run().done.all()


def test_kept_values_go_to_the_host_or_to_files(model: pl.Model, tmp_path: Path) -> None:
    sites = ["layers.*.resid_post", "layers.1.attn.heads.2@-1", "layers.1.mlp.neurons"]
    given = ids(2, 9)
    here = model.run(given, keep=sites)
    for where in ("cpu", tmp_path / "kept"):
        there = model.run(given, keep=sites, keep_on=where)
        for site in ("layers.2.resid_post", "layers.1.attn.heads.2@-1", "layers.1.mlp.neurons"):
            assert torch.equal(here.tensor(site), there.tensor(site))
        assert torch.equal(
            model.run(given, keep=sites, keep_on=where, logits=False).tensor(sites[2]), here.tensor(sites[2])
        )
    both = [model.run(given, keep=sites[:1], grad_of=METRIC, keep_on=where) for where in (None, tmp_path / "more")]
    assert torch.equal(both[0].grad("layers.0.resid_post"), both[1].grad("layers.0.resid_post"))
    assert len(list((tmp_path / "kept").iterdir())) > 5
    with pytest.raises(InputError, match="keep_on= takes values out of the graph"):
        model.run(given, keep=sites, grad=True, keep_on="cpu")
