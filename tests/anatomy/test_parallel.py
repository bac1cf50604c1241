"""A model split over two processes is the model: every proof holds, edits land on their shards, gradients are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import pellucid as pl
from pellucid.errors import LoadError, Refused

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
PROGRAM = Path(__file__).with_name("parallel_program.py")


def saved(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    else:
        MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)).save_pretrained(folder)
    return folder


@pytest.mark.matrix  # with the families: two more processes, and as many imports
def test_two_processes_prove_and_compute_what_one_does(tmp_path: Path) -> None:
    folders = [str(saved(tmp_path / family, family)) for family in ("llama", "mixtral")]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(PROGRAM.parents[2] / "src"), str(PROGRAM.parents[2])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), *folders], env=env, capture_output=True, text=True, timeout=400, check=False
    )
    for folder in folders:
        two = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank*.json"))]
        assert sorted(each["rank"] for each in two) == [0, 1], done.stderr[-2000:]
        for each in two:
            assert each["share"] < 0.52  # of the weights; norms are in both
            assert all(there == here for here, there, _ in each["proofs"].values()), each["proofs"]
            assert all(isinstance(off, float) and off < 1e-5 for off in each["compared"].values()), each["compared"]
        assert two[0]["compared"] == pytest.approx(two[1]["compared"], abs=1e-9)


def test_a_plan_needs_processes_and_a_family_that_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LoadError, match="torchrun --nproc-per-node 2"):
        pl.load(folder, tokenizer=False, tp_plan="auto")
    with pytest.raises(LoadError, match="expected 'auto'"):
        pl.load(folder, tokenizer=False, tp_plan=2)
    with pytest.raises(LoadError, match="leave out device and device_map"):
        pl.load(folder, tokenizer=False, tp_plan="auto", device="cpu")
    module = LlamaForCausalLM(LlamaConfig(**TINY))
    with pytest.raises(LoadError, match="a module in memory is used as it is"):
        pl.load(module, tp_plan="auto")


def test_a_model_between_memory_and_disk_computes_what_it_does_in_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    where = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    whole, spread = pl.load(folder, tokenizer=False), pl.load(folder, tokenizer=False, device_map=where)
    assert any(p.is_meta for p in spread.module.parameters())
    assert [p.holds for p in spread.anatomy.proofs] == [p.holds for p in whole.anatomy.proofs]
    ids, other = torch.randint(97, (2, 2, 7), generator=torch.Generator().manual_seed(1)).unbind()
    metric = pl.metrics.logit_difference(3, 5)
    edits = [pl.Ablate("layers.1.attn.heads.2"), pl.Scale("layers.1.mlp.neurons.3", 2.0)]
    heads = [pl.Ablate(f"layers.{i}.attn.heads.{h}") for i in range(2) for h in range(4)]
    for ask in (
        lambda m: m.run(ids).logits,
        lambda m: m.run(ids, edits=edits).logits,
        lambda m: m.run(ids, keep=["layers.1.attn.heads.1.out"]).tensor("layers.1.attn.heads.1.out"),
        lambda m: m.run(ids, keep=["layers.*.resid_post"], grad_of=metric).grad("layers.0.resid_post"),
        lambda m: m.run(ids, keep=["layers.0.resid_post"], logits=False).tensor("layers.0.resid_post"),
        lambda m: m.sweep(ids, heads, metric).values,
        lambda m: pl.circuits.edge_attribution(m, ids, metric, how="resample", reference=other).each,
    ):
        torch.testing.assert_close(ask(spread), ask(whole), atol=1e-6, rtol=1e-6)
    with pytest.raises(Refused, match="offloaded; load the model without device_map"):
        spread.changed(pl.changed.Added("model.layers.1.mlp.down_proj.weight", torch.ones(32, 1), torch.ones(1, 64)))
    with pytest.raises(Refused, match="workers cannot open .*device_map= is no plain value"), pl.Processes(1) as one:
        spread.sweep(ids, heads, metric, on=one)
