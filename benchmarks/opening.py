"""What does it cost to open a model, and what does a run hold on to?

    python -m benchmarks.opening [gguf] [memory] [forwards] [--source DIR]

gguf      CPU seconds of `pl.load` of SmolLM2's GGUF file, the first time (nothing cached) and the second, each in a process
          of its own that has imported torch and transformers before.
memory    Bytes of tensors alive after `model.run(prompt of 225 tokens, keep=one vector)`, less those alive after the plain
          forward pass under no_grad, in sizes of the vector: one token's, and all tokens'.
forwards  Passes through the blocks while tiny models are opened (calls of blocks, divided by their number). `--source` counts
          another checkout's: `git worktree add /tmp/then 927d621`, then `--source /tmp/then/src`.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GGUF = """
import sys, time, torch, transformers, pellucid
from transformers import modeling_gguf_pytorch_utils
torch.set_num_threads(1)
start = time.process_time()
with pellucid.quiet():
    pellucid.load(sys.argv[1])
print(f"{time.process_time() - start:.1f}")
"""
FORWARDS = """
import sys, torch, pellucid
from tests.zoo import build, tokenizer
for family in sys.argv[1:]:
    module = build(family)
    counts = []
    for name, part in module.named_modules():
        if name.rpartition(".")[2].isdigit() and ".layers." in f".{name}." or name.rpartition(".")[0].endswith((".h", ".block", ".layer")):
            if name.rpartition(".")[2].isdigit() and not any(name.startswith(f"{other}.") for other, _ in counts):
                count = [0]
                part.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
                counts.append((name, count))
    pellucid.load(module, tokenizer=tokenizer(module))
    print(f"  {family:12} {sum(c[0] for _, c in counts) / len(counts):5.1f}", flush=True)
"""
FAMILIES = ("gpt2", "llama", "falcon", "bert", "t5", "mixtral")


def alone(program: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done.stdout if not done.returncode else done.stdout + done.stderr[-2000:]


def gguf() -> None:
    from scripts.demo_model import smollm2

    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second"):
            print(f"gguf, {name} time: {alone(GGUF, str(smollm2()), PELLUCID_CACHE=cache).strip()} CPU s", flush=True)


def alive() -> int:
    """Bytes of all storages that some tensor holds."""
    import torch

    gc.collect()
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and each.layout is torch.strided:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def memory() -> None:
    import torch

    import pellucid as pl
    from benchmarks.workloads import SHAPES, tokenizer

    shape = SHAPES["smollm2"]
    model = pl.load(shape.model(), tokenizer=tokenizer(shape.vocabulary))
    ids = shape.tokens(1, 225, 1)
    kept: Any = model.run(ids, keep="layers.14.resid_post@-1")  # what a model remembers of itself is made now
    del kept
    before = alive()
    with torch.no_grad():
        kept = model.module(input_ids=ids, use_cache=False).logits
    plain = alive() - before
    print(f"memory: a plain forward of 225 tokens keeps {plain / 1e6:.2f} MB")
    width = model.module.config.hidden_size * 4
    for site, size in (("layers.14.resid_post@-1", width), ("layers.14.resid_post", 225 * width)):
        kept = None
        kept = model.run(ids, keep=site)
        more = alive() - before - plain
        print(f"  kept {site}: {more} bytes more, {more / size:.2f} times its {size} bytes")
        kept = None
        kept = model.run(ids, keep=site, logits=False)
        print(f"  without logits: {(alive() - before) / size:.2f} times it", flush=True)
    del kept


def forwards(source: str | None) -> None:
    where = {"PYTHONPATH": os.pathsep.join([source or "src", str(Path(__file__).parent.parent)])}
    print(f"forwards while opened, {source or 'here'}:")
    print(alone(FORWARDS, *FAMILIES, **where))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["gguf", "memory", "forwards"])
    parser.add_argument("--source")
    options = parser.parse_args()
    if "gguf" in options.what:
        gguf()
    if "memory" in options.what:
        memory()
    if "forwards" in options.what:
        forwards(options.source)


if __name__ == "__main__":
    main()
