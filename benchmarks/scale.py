"""What does scale cost? Random weights, one thread, process CPU time. Every number is printed as it comes.

    python -m benchmarks.scale growth 20 135   opening, a run, sweeps, EAP at these sizes (20, 135, 350, 1100 million parameters)
    python -m benchmarks.scale tokens          the same sweep at 16 to 2,048 tokens
    python -m benchmarks.scale prompts         1 to 1,000 prompts: ablation, patching, EAP, harvest
    python -m benchmarks.scale memory 135 128  peaks (of torch's allocator, and of the process) beside what `plan.explain()` and `model.memory` say
    python -m benchmarks.scale workers         180 patches and 270 heads over Processes(2) and Ray(2), one worker killed
    python -m benchmarks.scale harvest         two writers killed ten times; throughput; reading
    python -m benchmarks.scale stored          reading alone, of a store of 330 MB

The unit of a sweep is the machine's limit: the same number of token-layers through the bare blocks (no planner, no edits), as one
growing batch or in batches of the planner's size, whichever is quicker.
"""

# ruff: noqa: B023, C408 (lambdas are called where they are made)

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pellucid as pl
from benchmarks.clock import allocated, cpu
from pellucid import store as stores
from pellucid.store import ActivationStore, store_activations

SHAPES = {  # millions of parameters -> a Llama's shape
    "20": dict(vocab_size=49152, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4),
    "135": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
    "350": dict(vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5),
    "1100": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
}  # fmt: skip
TOKENS = 15
METRIC = pl.metrics.logit_difference(3, 5)


def folder(size: str) -> Path:
    """A checkpoint of that shape, made once."""
    made = Path(tempfile.gettempdir()) / f"pellucid-scale-{size}"
    if not (made / "config.json").exists():
        torch.manual_seed(0)
        if size == "gpt2":
            GPT2LMHeadModel(GPT2Config()).save_pretrained(made)
        else:
            config = LlamaConfig(**SHAPES[size], max_position_embeddings=4096, tie_word_embeddings=size != "1100")
            LlamaForCausalLM(config).save_pretrained(made)
    return made


def ids(n: int, prompts: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1000, (prompts, n), generator=torch.Generator().manual_seed(seed))


def say(*words: Any) -> None:
    print(*(f"{w:.4g}" if isinstance(w, float) else w for w in words), flush=True)


def ratio(work: Callable[[], Any], plain: Callable[[], Any], times: int = 3) -> float:
    """The median of what `work` takes, in `plain` before and after it."""
    plain()
    found = []
    for _ in range(times):
        before, spent, after = cpu(plain), cpu(work), cpu(plain)
        found.append(spent / ((before + after) / 2))
    return median(found)


def peak(work: Callable[[], Any]) -> float:
    """Bytes beyond what was there, at the most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    made = work()
    found = _status("VmHWM") - before
    del made
    return found


def _status(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return float(line.split()[1]) * 1024


# ---- the machine's limit


def limit(model: pl.Model, given: torch.Tensor, plan: Any, repeats: int = 1) -> Callable[[], None]:
    """The token-layers of a plan through the bare blocks: rows of as many tokens as the prompt has."""
    blocks = [model.module.get_submodule(b.module) for b in model.anatomy.stacks[-1].blocks]
    calls: list[Any] = []
    handles = [b.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for b in blocks]
    with torch.no_grad():
        model.module(given, use_cache=False)
    for handle in handles:
        handle.remove()
    length, rows = given.shape[1], len(given)

    def growing(chunks: list[Any]) -> None:
        with torch.no_grad():
            for chunk in chunks:
                for layer, block in enumerate(blocks):
                    tokens = sum(rows * (length - v.start) for v in chunk if v.layer <= layer)
                    if not tokens:
                        continue
                    args, kwargs = calls[layer]
                    kwargs = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "past_key_values")}
                    x = args[0][:1].expand(max(1, round(tokens / length)), -1, -1).contiguous()
                    block(x, *args[1:], **kwargs)

    whole, parts = [plan.variants], list(plan.chunks(plan.variants))
    quick = min((whole, parts), key=lambda chunks: cpu(lambda: growing(chunks)))
    return lambda: growing(quick)


def patches(model: pl.Model, given: torch.Tensor, layers: Any = None, positions: Any = None) -> list[Any]:
    n = len(model.anatomy.stacks[-1].blocks)
    other = model.run(ids(given.shape[1], len(given), 1), keep="layers.*.resid_pre")
    return [
        pl.Patch(f"layers.{i}.resid_pre@{p}", other)
        for i in (range(n) if layers is None else layers)
        for p in (range(given.shape[1]) if positions is None else positions)
    ]


def _forward(module: Any, given: torch.Tensor) -> float:
    """Seconds of CPU of a plain one."""
    with torch.no_grad():
        module(given)
        return median(cpu(lambda: module(given)) for _ in range(5))


def growth(*sizes: str) -> None:
    for size in sizes:
        _growth(size)


def _growth(size: str) -> None:
    path, given = folder(size), ids(TOKENS)
    opened = cpu(lambda: AutoModelForCausalLM.from_pretrained(path))
    module = AutoModelForCausalLM.from_pretrained(path).eval()

    forward = _forward(module, given)
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    say(f"size {size}: {millions:.0f} M parameters, a forward of {TOKENS} tokens {forward * 1e3:.0f} ms of CPU")
    del module
    held: list[pl.Model] = []
    took = cpu(lambda: held.append(pl.load(path, tokenizer=False)))
    say("  opening, beyond from_pretrained, in forwards", (took - opened) / forward)
    model = held[0]

    def own() -> None:
        with torch.no_grad():
            model.module(given, use_cache=False)

    say("  a run with nothing kept, in forwards", ratio(lambda: model.run(given), own, 7))
    variants = patches(model, given)
    plan = model.plan(given, variants, METRIC)
    plan.run()
    bare = limit(model, given, plan)
    spent = [
        (cpu(bare), cpu(lambda: model.sweep(given, variants, METRIC)), cpu(bare), cpu(own))
        for _ in range(1 if millions > 1000 else 3)
    ]
    share = median(s / ((a + b) / 2) for a, s, b, _ in spent)
    say(f"  {len(variants)} patches: share of the limit", share, "in forwards", median(s / f for _, s, _, f in spent),
        "of the limit with the run without edits", median(s / ((a + b) / 2 + f) for a, s, b, f in spent))  # fmt: skip
    heads = [pl.Ablate(site) for site in map(str, model.sites("layers.*.attn.heads.*"))]
    plan = model.plan(given, heads, METRIC)
    bare = limit(model, given, plan)
    spent = [(cpu(bare), cpu(lambda: model.sweep(given, heads, METRIC)), cpu(bare), cpu(own)) for _ in range(2)]
    share = median(s / ((a + b) / 2) for a, s, b, _ in spent)
    say(f"  {len(heads)} heads off: share of the limit", share, "in forwards", median(s / f for _, s, _, f in spent),
        "of the limit with the run without edits", median(s / ((a + b) / 2 + f) for a, s, b, f in spent))  # fmt: skip
    edges(model, given)


def edges(model: pl.Model, given: torch.Tensor) -> None:
    """EAP beside one forward and backward of the prompts, without weights' gradients, and beside that and the forward of the others."""
    other = ids(given.shape[1], len(given), 1)
    embed = model.module.get_input_embeddings()
    for p in model.module.parameters():
        p.requires_grad_(False)

    def backward() -> None:
        x = embed(given).detach().requires_grad_()
        with torch.enable_grad():
            z = model.module(inputs_embeds=x, use_cache=False).logits[:, -1]
            (z[:, 3] - z[:, 5]).sum().backward()

    def both() -> None:
        with torch.no_grad():
            model.module(other, use_cache=False, logits_to_keep=1)
        backward()

    def eap() -> Any:
        return pl.circuits.edge_attribution(model, given, METRIC, how="resample", reference=other)

    eap()
    say("  EAP, in a forward and backward", ratio(eap, backward), "with the forward of the corrupted", ratio(eap, both))


def tokens() -> None:
    model = pl.load(folder("135"), tokenizer=False)
    for n in (16, 64, 256, 1024, 2048):
        given = ids(n)

        def own(given: torch.Tensor = given) -> None:
            with torch.no_grad():
                model.module(given, use_cache=False)

        every = range(0, n, n // 4)
        variants = patches(model, given, range(0, 30, 10), every)
        plan = model.plan(given, variants, METRIC)
        model.sweep(given, variants, METRIC)
        bare = limit(model, given, plan)
        a, s, b, f = cpu(bare), cpu(lambda v=variants, g=given: model.sweep(g, v, METRIC)), cpu(bare), cpu(own)
        say(
            f"{n} tokens, {len(variants)} patches: share of the limit",
            2 * s / (a + b),
            "each in forwards",
            s / f / len(variants),
        )


def prompts(*counts: str) -> None:
    model = pl.load(folder("20"), tokenizer=False)
    heads = [pl.Ablate(site) for site in map(str, model.sites("layers.*.attn.heads.*"))][:16]
    with tempfile.TemporaryDirectory() as made:
        for n in map(int, counts or ("1", "8", "64", "256", "1000")):
            given, other = ids(TOKENS, n), ids(TOKENS, n, 1)

            def own(given: torch.Tensor = given) -> None:
                with torch.no_grad():
                    model.module(given, use_cache=False)

            own()
            plain = cpu(own)
            moved = patches(model, given, [4], range(3))
            for name, work in (
                ("16 heads off", lambda: model.sweep(given, heads, METRIC)),
                ("3 patches", lambda: model.sweep(given, moved, METRIC)),
                ("EAP", lambda: pl.circuits.edge_attribution(model, given, METRIC, how="resample", reference=other)),
                (
                    "harvest",
                    lambda: store_activations(
                        model, given.tolist(), ["layers.4.resid_post"], f"{made}/{n}-{time.time()}"
                    ),
                ),
            ):
                work()
                spent: list[float] = []
                most = peak(lambda: spent.append(cpu(work)))
                say(
                    f"{n} prompts, {name}: ms a prompt",
                    1e3 * spent[0] / n,
                    "in forwards of the batch",
                    spent[0] / plain,
                    "peak MB",
                    most / 2**20,
                )


# ---- memory


def memory(size: str, *lengths: str) -> None:
    model = pl.load(folder(size), tokenizer=False)
    for n in map(int, lengths or ("128", "512")):
        given = ids(n)
        model.run(given)
        sites = ["layers.*.resid_post", "layers.*.attn.z", "layers.*.mlp.neurons"]
        heads = [pl.Ablate(site) for site in map(str, model.sites("layers.*.attn.heads.*"))][:12]

        def own(given: torch.Tensor = given) -> Any:
            with torch.no_grad():
                return model.module(given, use_cache=False)

        plain = peak(own)
        say(f"{size}, {n} tokens: plain forward, MB", plain / 2**20)
        model.sweep(given, heads, METRIC)  # its rungs are certified now
        plan = model.plan(given, heads, METRIC)
        cases = [
            ("nothing kept", lambda: model.run(given), model.memory(given)),
            ("residual, z, neurons", lambda: model.run(given, keep=sites), model.memory(given, keep=sites)),
            ("gradients at residuals", lambda: model.run(given, keep=sites[:1], grad_of=METRIC), model.memory(given, keep=sites[:1], grad_of=METRIC)),
            ("12 heads off", lambda: model.sweep(given, heads, METRIC), plan.peak),
        ]  # fmt: skip
        for name, work, said in cases:
            work()
            found, counted = peak(work), allocated(work)[0]
            say(
                f"  {name}: predicted {said / 2**20:.0f} MB; torch's allocator {counted / 2**20:.0f}, ratio",
                said / counted,
                f"the process grew by {found / 2**20:.0f}, ratio",
                said / found,
            )


# ---- workers


def workers(which: str = "gpt2,135", on: str = "Processes(2),Ray(2)") -> None:
    for size, what in (("gpt2", "180 patches"), ("135", "270 heads off")):
        if size not in which.split(","):
            continue
        model, given = pl.load(folder(size), tokenizer=False), ids(TOKENS)
        if size == "gpt2":
            variants = patches(model, given)
        else:
            variants = [pl.Ablate(site) for site in map(str, model.sites("layers.*.attn.heads.*"))]
        here = model.sweep(given, variants, METRIC)
        alone = median(cpu(lambda m=model, v=variants: m.sweep(given, v, METRIC)) for _ in range(3))
        say(f"{what}, {size}: here {alone:.2f} s of CPU, {len(list(here.plan.chunks(here.plan.variants)))} batches")
        for name, make in (("Processes(2)", lambda: pl.Processes(2)), ("Ray(2)", lambda: pl.Ray(2))):
            if name not in on.split(","):
                continue
            with make() as two:
                two.threads = 1
                there = model.sweep(given, variants, METRIC, on=two)  # opens the model
                say(
                    f"  {name}: largest difference",
                    float((there.values - here.values).abs().max()),
                    "opening",
                    two.seconds["open"] / 2,
                )
                two.seconds.clear()
                spent = cpu(lambda t=two, m=model, v=variants: m.sweep(given, v, METRIC, on=t))
                total = spent + sum(two.seconds.values())
                parts = [x for n, v in two.seconds.items() for x in (f"to {n}", v / alone)]
                say(f"  {name}: total CPU of here", total / alone, "of it in this process", spent / alone, *parts)
                before = sum(two.seconds.values())
                killer = threading.Timer(alone / 4, _kill, (two,))
                killer.start()
                there = model.sweep(given, variants, METRIC, on=two)
                killer.join()
                again = two.seconds["run"]
                say(f"  {name}, a worker killed: largest difference", float((there.values - here.values).abs().max()),
                    "not done", int((~there.done).sum()), "run s", again - before)  # fmt: skip


def _kill(pool: Any) -> None:
    lane = pool.lanes[0]
    if hasattr(lane, "process"):
        os.kill(lane.process.pid, signal.SIGKILL)
    else:
        import ray

        ray.kill(lane.actor)


# ---- harvest

WRITER = """
import sys, torch, pellucid as pl
from benchmarks.scale import texts
from pellucid.store import store_activations
torch.set_num_threads(1)
if __name__ == "__main__":
    model = pl.load(sys.argv[1], tokenizer=False)
    with pl.Processes(2) as two:
        two.threads = 1
        store_activations(model, texts(), ["layers.1.resid_post"], sys.argv[2], batch=32, on=two)
    print("finished")
"""


def texts(count: int = 8000) -> list[list[int]]:
    """2 million tokens in rows of 250."""
    return ids(250, count, 5).tolist()


def tiny() -> Path:
    made = Path(tempfile.gettempdir()) / "pellucid-scale-tiny"
    if not (made / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(made)  # fmt: skip
    return made


def harvest() -> None:
    with tempfile.TemporaryDirectory() as made:
        model, rng, kills = pl.load(tiny(), tokenizer=False), random.Random(0), 0
        begun = time.monotonic()
        whole = store_activations(model, texts(), ["layers.1.resid_post"], f"{made}/whole", batch=32)
        lasts = time.monotonic() - begun
        say(f"2 million tokens here: {len(whole)} rows, {len(whole.index.shards)} shards, {lasts:.0f} s")
        while kills < 10:
            process = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tiny()), f"{made}/killed"], start_new_session=True
            )
            try:
                process.wait(8 + rng.random() * lasts / 4)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                done = ActivationStore(f"{made}/killed") if Path(f"{made}/killed/index.jsonl").exists() else None
                say(f"  kill {kills}: {0 if done is None else len(done.index.shards)} shards stand")
        subprocess.run([sys.executable, "-c", WRITER, str(tiny()), f"{made}/killed"], check=True)
        killed = ActivationStore(f"{made}/killed")
        same = killed.index == whole.index and all(
            (killed.path / s.file).read_bytes() == (whole.path / s.file).read_bytes() for s in whole.index.shards
        )
        say(f"killed {kills} times, two writers: the same bytes: {same}")
        reading(whole)
    throughput()


def reading(store: ActivationStore) -> None:
    files = [store.path / s.file for s in store.index.shards]
    size = sum(f.stat().st_size for f in files)

    def drop() -> None:
        for f in files:
            with f.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def timed(work: Callable[[], Any]) -> float:
        drop()
        begun = time.monotonic()
        work()
        return time.monotonic() - begun

    def through() -> None:
        for f in files:
            with f.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass

    for _ in range(3):
        plain = timed(through)
        begun = time.process_time()
        mixed = timed(lambda: [None for _ in store.shuffled(store.sites[0], 4096)])
        say(f"  (CPU of it {time.process_time() - begun:.2f} s of {mixed:.2f} s)")
        say(
            f"  {size / 2**20:.0f} MB from the disk: from end to end {size / 2**20 / plain:.0f} MB/s, in shuffled batches: share",
            plain / mixed,
        )


def stored() -> None:
    with tempfile.TemporaryDirectory(dir=".") as made:  # not in memory
        path = Path(made)
        index = stores.Index(["x"], "0", "float16")
        lines: list[Any] = [index.head]
        for i in range(16):
            values = torch.randn(20_000, 512, generator=torch.Generator().manual_seed(i)).half()
            stores._write(path / stores._file(i), {"x": values, "tokens": torch.zeros(20_000, dtype=torch.long)})
            lines.append(vars(stores.Shard(stores._file(i), 20_000, i, i + 1)))
        (path / stores.INDEX).write_text("".join(json.dumps(line) + "\n" for line in lines))
        reading(ActivationStore(path))


def throughput() -> None:
    """Tokens a CPU second into a store of SmolLM2's shape, with two writers, beside the plain forward of the same batches."""
    model, rows = pl.load(folder("135"), tokenizer=False), ids(128, 64, 7)

    def plain() -> None:
        with torch.no_grad():
            for part in rows.split(16):
                model.module(part, use_cache=False, logits_to_keep=1)

    def body() -> None:
        with torch.no_grad():
            for part in rows.split(16):
                model.module.model(part, use_cache=False)

    plain()
    with tempfile.TemporaryDirectory() as made, pl.Processes(2) as two:
        two.threads = 1
        store_activations(model, rows[:16].tolist(), ["layers.*.resid_post"], f"{made}/warm", on=two, shard_rows=1024)
        for turn, site in enumerate(["layers.29.resid_post", "layers.*.resid_post"] * 2):
            two.seconds.clear()
            a = cpu(plain)
            spent = cpu(
                lambda s=site, t=turn: store_activations(
                    model, rows.tolist(), [s], f"{made}/{t}", on=two, shard_rows=1024
                )
            )
            b = cpu(plain)
            total = spent + two.seconds["run"]
            say(
                f"  harvest of {site} with two writers: share of the plain forward's throughput",
                (a + b) / 2 / total,
                "with opening and first runs",
                (a + b) / 2 / (spent + sum(two.seconds.values())),
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, *more = sys.argv[1:] or ["growth", "20"]
    with pl.quiet():
        globals()[part](*more)
