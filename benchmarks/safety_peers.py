"""Contrast vectors beside repeng's and steering-vectors': are they equal, and what do they cost?

    python benchmarks/safety_peers.py --data /work/shared/data [--pairs 24]       in an environment with repeng and steering-vectors

Both read the same pairs of chats on SmolLM2-135M-Instruct (`safety_steering.py`'s emotion pairs) at layers 8, 12, 16 and 20, in batches of 8.
Cost is CPU time in plain forward passes over the same batches in this process (`clock.beside`), of making the vectors and of writing 16 tokens with
one. repeng 0.4.0 does not import beside numpy 2 (`np.float_`); the name is put back here by hand.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from benchmarks.clock import beside, cpu
from benchmarks.safety_steering import LAYERS, Bench, chat
from pellucid.safety import Contrast, Vector, export_gguf, import_vectors


def cosine(a: Any, b: Any) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.as_tensor(a).float(), torch.as_tensor(b).float(), dim=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--writing", action="store_true", help="only what a vector costs while writing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.data)
    if given.writing:
        with pl.quiet():
            drawn = torch.randn(bench.model.anatomy.stacks[0].d_model, generator=torch.Generator().manual_seed(0))
            writing(bench.model, bench.model.tokenizer, Vector("layers.12.resid_post", drawn, 159.0), 3 * given.reps)
        return
    model, module, tokenizer = bench.model, bench.model.module, bench.model.tokenizer
    outputs = [o for o in bench.read("repe_facts/data/emotions/all_truncated_outputs.json") if o.strip()]
    begun = outputs[: given.pairs]
    plus, minus = ([chat(f"Pretend you are an extremely {f} person.", o) for o in begun] for f in ("happy", "sad"))
    texts = [t for pair in zip(plus, minus, strict=True) for t in pair]
    sites = [f"layers.{i}.resid_post" for i in LAYERS]

    def plain() -> None:
        with torch.no_grad():
            for i in range(0, len(texts), 8):
                module(**tokenizer(texts[i : i + 8], padding=True, return_tensors="pt"), use_cache=False)

    made: dict[str, Contrast] = {}

    def ours(kind: Any) -> Any:
        def work() -> None:
            made[kind] = Contrast(kind, sites=sites, batch=8).fit(model, plus, minus)

        return work

    with pl.quiet():
        for kind in ("mean", "pca_centred"):
            print(f"pellucid, {kind}: {beside(plain, ours(kind), given.reps)} plain passes", flush=True)
        try:
            from steering_vectors import train_steering_vector
        except ImportError as why:
            print(f"steering-vectors is not installed: {why}")
        else:
            found: list[Any] = []

            def theirs() -> None:
                found.append(
                    train_steering_vector(
                        module, tokenizer, list(zip(plus, minus, strict=True)), layers=list(LAYERS), batch_size=8
                    )
                )

            print(f"steering-vectors: {beside(plain, theirs, given.reps)} plain passes", flush=True)
            for layer in LAYERS:
                v, u = made["mean"].at(layer), found[-1].layer_activations[layer]
                size = float(made["mean"].result_.data["size"].sel(site=v.site)) * v.unit
                print(
                    f"  layer {layer}: cosine with our mean {cosine(v.direction, u):.6f}, length {float(u.norm()):.4f} and {size:.4f}",
                    flush=True,
                )
        try:
            np.float_ = np.float64
            from repeng import ControlModel, ControlVector, DatasetEntry
        except ImportError as why:
            print(f"repeng is not installed: {why}")
            return
        wrapped = ControlModel(module, list(LAYERS))
        entries = [DatasetEntry(a, b) for a, b in zip(plus, minus, strict=True)]
        control: dict[str, Any] = {}

        def trained(method: Any) -> Any:
            def work() -> None:
                control[method] = ControlVector.train(
                    wrapped, tokenizer, entries, method=method, batch_size=8, hidden_layers=list(LAYERS)
                )

            return work

        print(f"repeng, pca_diff: {beside(plain, trained('pca_diff'), given.reps)} plain passes", flush=True)
        for layer in LAYERS:
            v, u = made["pca_centred"].at(layer), control["pca_diff"].directions[layer]
            print(
                f"  layer {layer}: |cosine| with our pca_centred {abs(cosine(v.direction, u)):.6f}, with the mean difference "
                f"{abs(cosine(made['mean'].at(layer).direction, u)):.3f}",
                flush=True,
            )
        wrapped.unwrap()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "theirs.gguf"
            control["pca_diff"].export_gguf(path)
            back = import_vectors(model, path)
            same = [
                torch.equal(
                    b.direction * b.unit,
                    torch.as_tensor(control["pca_diff"].directions[pl.Site.parse(b.site).layer]).float(),
                )
                or float(
                    (
                        b.direction * b.unit
                        - torch.as_tensor(control["pca_diff"].directions[pl.Site.parse(b.site).layer]).float()
                    )
                    .abs()
                    .max()
                )
                for b in back
            ]
            print(f"repeng's GGUF read here, by block: {dict(zip([b.site for b in back], same, strict=True))}")
            path = Path(folder) / "ours.gguf"
            export_gguf(model, list(made["mean"].vectors_.values()), path, strength=0.3)
            read = ControlVector.import_gguf(path).directions
            equal = [
                np.array_equal(read[i], (v.direction * (0.3 * v.unit)).numpy())
                for i, v in ((i, made["mean"].at(i)) for i in LAYERS)
            ]
            print(f"our GGUF read by repeng, bit-equal by layer: {equal}; blocks {sorted(read)}", flush=True)
    writing(model, tokenizer, made["mean"].at(12), 5 * given.reps)


def writing(model: pl.Model, tokenizer: Any, v: Any, rounds: int) -> None:
    """16 tokens with a vector on, in plain generations of the same round; all arms take turns, for one round alone says +-10 %."""
    module = model.module
    ids = tokenizer([chat("Write about your morning.")], return_tensors="pt")
    push = v.direction * 0.15 * v.unit

    def plain() -> None:
        module.generate(**ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)

    def ours() -> None:
        model.generate(ids["input_ids"], max_new_tokens=16, min_new_tokens=16, edits=[v.edit(0.15)])

    def by_hand() -> None:
        layer = module.get_submodule(model.anatomy.stacks[0].blocks[12].module)
        hook = layer.register_forward_hook(lambda m, a, o: (o[0] + push, *o[1:]) if isinstance(o, tuple) else o + push)
        plain()
        hook.remove()

    arms = {"plain": plain, "pellucid, generate": lambda: model.generate(ids["input_ids"], max_new_tokens=16, min_new_tokens=16), "pellucid, a vector on": ours, "a forward hook by hand": by_hand}  # fmt: skip
    try:
        from steering_vectors import SteeringVector
    except ImportError as why:
        print(f"steering-vectors is not installed: {why}")
    else:
        theirs = SteeringVector({12: push}, "decoder_block")

        def applied() -> None:
            with theirs.apply(module, multiplier=1.0):
                plain()

        arms["steering-vectors"] = applied
    try:
        np.float_ = np.float64
        from repeng import ControlModel, ControlVector
    except ImportError as why:
        print(f"repeng is not installed: {why}")
    else:

        def controlled() -> None:
            wrapped = ControlModel(module, [12])
            wrapped.set_control(ControlVector("llama", {12: push.numpy()}), 1.0)
            wrapped.generate(**ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
            wrapped.unwrap()

        arms["repeng"] = controlled
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for each in arms.values():
        each()
    for _ in range(rounds):
        for name, each in arms.items():
            spent[name].append(cpu(each))
    for name, times in spent.items():
        ratios = np.array(times) / np.array(spent["plain"])
        print(f"writing, {name:24} median {np.median(ratios):.3f} [{ratios.min():.2f}, {ratios.max():.2f}], least of each {min(times) / min(spent['plain']):.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
