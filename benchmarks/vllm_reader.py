"""How near is what `pl.VLLM` reads, edits and writes to what transformers computes? In an environment with vLLM (scripts/vllm.sh makes one):

    VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1 python -m benchmarks.vllm_reader llama qwen3 gpt2 llama/transformers [FOLDER ...]

Tiny random weights by family, or a model in a folder (SmolLM2, say); `/transformers` asks for that back end. For each: the largest
relative error of a token at any site and in the logits, under edits (beside how far these move the logits), the tokens written under three
edits, and CPU seconds of storing a corpus here and there.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import pellucid as pl
from pellucid.errors import Refused
from pellucid.store import store_activations
from pellucid.workers.vllm import PARTS

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=32),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32),
    "gpt2": lambda: GPT2Config(vocab_size=256, n_embd=128, n_layer=3, n_head=4, n_positions=256),
}


def off(there: torch.Tensor, here: torch.Tensor) -> float:
    a, b = there.float(), here.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def folder(name: str, where: Path) -> Path:
    if name not in CONFIGS:
        return Path(name)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    made.save_pretrained(where / name)
    return where / name


def edits(layers: int, width: int, scale: float) -> dict[str, Any]:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1)) * scale
    last, middle = layers - 1, layers // 2
    return {
        "add": pl.Steer(f"layers.{middle}.resid_post", vector, 0.7),
        "add at the end": pl.Steer("layers.0.resid_pre@-1", vector),
        "scale": pl.Scale(f"layers.{middle}.attn.out", 2.5),
        "zero": pl.Ablate("layers.0.mlp.out"),
        "set at two": pl.Patch(f"layers.{middle}.resid_mid@1:3", vector),
        "project out": pl.ProjectOut("layers.*.resid_post", vector),
        "all but the first": pl.Steer("layers.0.attn.out", vector, tokens="1:"),
        "clamp": pl.Clamp(f"layers.{last}.resid_post", vector, 2.0),
        "turn": pl.Rotate("embed", vector, 20),
        "last norm": pl.Steer("final_norm", vector),
    }


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        for asked in names:
            name, _, modules = (
                asked.removesuffix("/transformers"),
                "",
                "transformers" if asked.endswith("/transformers") else "auto",
            )
            model = pl.load(folder(name, Path(made)), tokenizer=False, dtype=torch.float32)
            print(f"## {asked}: {model}", flush=True)
            started = time.process_time()
            with pl.VLLM(modules=modules, max_model_len=128, max_num_batched_tokens=128, max_num_seqs=16) as fast:
                engine = fast.open(model)
                print(
                    f"opened in {time.process_time() - started:.1f} CPU s; not read {len(engine.unlike)}, not edited {len(engine.uneditable)}"
                )
                compare(model, fast, Path(made))


def compare(model: Any, fast: Any, where: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(5, 250, (n,), generator=draw).tolist() for n in (17, 40, 3, 25, 8)]
    keep = ["embed", "final_norm", *(f"layers.*.{part}" for part in PARTS)]
    here, there = model.run(rows, keep=keep), model.run(rows, keep=keep, on=fast)
    real = here.inputs.stream("").mask.bool()
    worst = max(off(there.tensor(s)[real], here.tensor(s)[real]) for s in there.sites)
    print(f"sites {len(there.sites)}: {worst:.1e}; logits {off(there.logits[real], here.logits[real]):.1e}", flush=True)
    stack = model.anatomy.stacks[-1]
    length = float(here.tensor(f"layers.{len(stack.blocks) // 2}.resid_post")[real].norm(dim=-1).median())
    asked = edits(len(stack.blocks), stack.d_model, length / stack.d_model**0.5)
    for name, edit in asked.items():
        try:
            a, b = model.run(rows, edits=edit), model.run(rows, edits=edit, on=fast)
        except Refused as why:
            print(f"  {name}: refused: {why}", flush=True)
            continue
        print(
            f"  {name}: {off(b.logits[real], a.logits[real]):.1e} (moves {off(a.logits[real], here.logits[real]):.2g})",
            flush=True,
        )
    some = [asked["add"], asked["add at the end"], asked["all but the first"]]
    a, b = (model.generate(rows, max_new_tokens=8, edits=some, on=on) for on in (None, fast))
    same = sum(a.ids(i) == b.ids(i) for i in range(len(rows)))
    print(f"written under three edits: {same} of {len(rows)} rows the same", flush=True)
    corpus = [torch.randint(5, 250, (100,), generator=draw).tolist() for _ in range(24)]
    for label, on in (("here", None), ("vLLM", fast)):
        started = time.process_time()
        store_activations(model, corpus, ["layers.1.resid_post"], where / f"{id(model)}-{label}", batch=12, on=on)
        print(f"2,400 tokens stored, {label}: {time.process_time() - started:.2f} CPU s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
