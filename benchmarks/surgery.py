"""Layers of SmolLM2 as parts: what files keep, who needs which layer, which layers can go, what snapshots' layers mix.

    python -m benchmarks.surgery [files|importance|removal|hybrids|variants ...] [--texts paired.tsv] [--treebank train.conllu]

The bars of section 6 of the evidence on surgery that the room `layers` carries (4, 5, 6, 11, 15, 16), each beside its control.
CPU time of one thread; a plain forward is one run of the same texts by the module itself. `--texts` is a file of lines
`label <tab> text`, `--treebank` one of CoNLL-U, whose sentences are joined to texts of a second kind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import pellucid as pl
from benchmarks.surgery_states import PAIRED, reviews
from pellucid.changed import Added, Copied
from pellucid.statistics import interval
from pellucid.surgery import Recipe, layer_importance, parallel, remix, removal, remove, reorder, repeat, swap, take
from scripts.demo_model import smollm2

TREEBANK = "/work/shared/data/ud_ewt/en_ewt-ud-train.conllu"
LAYERS = 30


def cpu(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    made = work()
    return made, time.process_time() - start


def sentences(path: str, n: int, skip: int = 0) -> list[str]:
    said = [line[9:] for line in Path(path).read_text().splitlines() if line.startswith("# text = ")]
    joined = [" ".join(said[i : i + 12]) for i in range(0, len(said), 12)]
    return joined[skip : skip + n]


def capabilities(model: pl.Model, n: int = 12) -> dict[str, Any]:
    words = model.tokenizer
    twice = pl.tasks.repeated_tokens(words, n)
    return {
        "capitals": pl.tasks.capitals(words, n),
        "agreement": pl.tasks.subject_verb_agreement(words, n),
        "indirect objects": pl.tasks.indirect_objects(words, n),
        "years": pl.tasks.greater_than(words, n),
        "repetition": (twice[:, :-1].tolist(), pl.metrics.log_probability([int(i) for i in twice[:, -1]])),
    }


def ids(model: pl.Model) -> dict[str, torch.Tensor]:
    return dict(model.tokenizer("The capital of France is Paris, and the capital of Italy", return_tensors="pt"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


IDS: dict[str, torch.Tensor] = {}


def handed(model: pl.Model) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the first block is given: the residual, and the rest without a cache."""
    kept: list[Any] = []
    hook = model.module.model.layers[0].register_forward_pre_hook(lambda _, *a: kept.append(a), with_kwargs=True)
    logits(model.module)
    hook.remove()
    args, given = kept[0]
    x = args[0] if args else given["hidden_states"]
    kept_out = {k: None if isinstance(v, transformers.Cache) else v for k, v in given.items() if k != "hidden_states"}
    return x, kept_out | {"use_cache": False}


# ---- bars 4, 5, 6


def files(model: pl.Model, texts: list[str], options: Any) -> None:
    IDS.update(ids(model))
    clean = logits(model.module)
    checkpoint = sum(t.numel() * t.element_size() for t in model.module.state_dict().values())
    generator = torch.Generator().manual_seed(0)

    def fact(layer: int) -> Added:
        name, (d, n) = f"model.layers.{layer}.mlp.down_proj.weight", (576, 1536)
        left, right = (torch.randn(*shape, generator=generator) / 20 for shape in ((d, 1), (1, n)))
        return Added(name, left, right)

    other = model.changed([fact(i) for i in range(10, 14)])
    changed = {
        "edited (20 rank-one changes)": model.changed([fact(4 + i % 5) for i in range(20)]),
        "pruned": remove(model, [13, 17]),
        "repeated": repeat(model, slice(14, 16)),
        "swapped": swap(model, 12, 13),
        "remixed": remix({"a": model, "b": other}, [("a", 0, 10), ("b", 10, 14), ("a", 16, 30)]),
        "side by side": parallel(model, slice(14, 16)),
    }
    print("\nbar 4, 5: | model | change file, part of the checkpoint | made again | save_pretrained, plain transformers | cached = recomputed | undone |")  # fmt: skip
    for name, made in changed.items():
        with tempfile.TemporaryDirectory() as folder:
            file = made.save_changes(f"{folder}/change.safetensors")
            size = file.stat().st_size / checkpoint
            again = torch.equal(logits(model.changed(file).module), logits(made.module))
            try:
                made.module.save_pretrained(f"{folder}/whole")
                opened = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/whole")
                whole = f"{float((logits(opened) - logits(made.module)).abs().max()):.0e}"
            except pl.errors.Refused as refused:
                whole = f"refused ({str(refused)[:40]} ...)"
            said = [made.generate(IDS, max_new_tokens=8, scores=True, use_cache=c).scores for c in (True, False)]
            gap = float((said[0] - said[1]).abs().max())
        undone = torch.equal(logits(made.undo().module), clean)
        print(f"| {name} | {size:.3%} | {again} | {whole} | {gap:.0e} | {undone} |", flush=True)
    orders: dict[str, list[Any]] = {"reversed middle": [*range(10), *reversed(range(10, 20)), *range(20, 30)], "removed": [i for i in range(30) if i != 17]}  # fmt: skip
    for name, order in orders.items():
        made = reorder(model, order)
        x, given = handed(model)
        with torch.no_grad():
            for i in order:
                out = model.module.model.layers[i](x, **given)
                x = out[0] if isinstance(out, tuple) else out
            hand = model.module.lm_head(model.module.model.norm(x))
        print(f"bar 5: {name}: {float((hand - logits(made.module)).abs().max()):.0e} from a loop by hand")
    same = remix({"a": model, "b": model}, Recipe((("a", 0, 12), ("b", 12, 30))))
    print("bar 6: a remix with itself", torch.equal(logits(same.module), clean), "; a swap twice", torch.equal(logits(swap(swap(model, 5, 20), 5, 20).module), clean), "; layers taken and given back", torch.equal(logits(take(take(model, other, slice(8, 14)), model, slice(8, 14)).module), clean), flush=True)  # fmt: skip


# ---- bars 11, 16


def importance(model: pl.Model, texts: list[str], options: Any) -> None:
    corpus = pl.Corpus(texts, packed=False, context=96)
    tasks = capabilities(model, options.prompts)
    rows = pl.surgery.importance.rows_of(model, corpus, 96, options.text, 2)
    asked = [pl.causal.contrast.ask(model, *(t if isinstance(t, tuple) else (t, None))).inputs for t in tasks.values()]

    def plain() -> None:
        with torch.no_grad():
            for each in (*rows, *asked):
                model.module(**each.tensors, use_cache=False)

    plain()
    before = cpu(plain)[1]
    found, spent = cpu(lambda: layer_importance(model, corpus, tasks, tokens=options.text))
    forward = (before + cpu(plain)[1]) / 2
    print(f"\nbar 16: 30 removals with {len(tasks)} capabilities: {spent / forward:.1f} plain forwards of the same rows (bar 18; run one by one 30); {forward:.1f} CPU s a forward")  # fmt: skip
    data = found.sel(part="layer").data
    print(found.title)
    print(
        "| layer | text loss | kept | "
        + " | ".join(tasks)
        + " | influence | sink |\n"
        + "|---" * (len(tasks) + 5)
        + "|"
    )
    for i in range(LAYERS):
        at = data.sel(layer=i)
        lost = " | ".join(f"{float(x):+.2f} of {float(c):.2f}" for x, c in zip(at["effect"].values, at["clean"].values, strict=True))  # fmt: skip
        print(f"| {i} | {float(at['loss']):+.2f} [{float(at['low']):.2f}, {float(at['high']):.2f}] | {float(at['kept']):.2f} | {lost} | {float(at['estimated'][0]):.3f} | {float(at['sink']):.1f} |")  # fmt: skip
    loss, influence = data["loss"].values, data["estimated"].values[0]
    order, by_influence = np.argsort(-loss), np.argsort(-influence)
    print(f"bar 11: layer 11 is number {list(order).index(11) + 1} by loss and {list(by_influence).index(11) + 1} by influence; sinks named: {data.attrs['sinks']}")  # fmt: skip
    print("needed by a capability and not by text (p < .05 / 30):", data.attrs["specific"])
    named = {"repetition": 16, "capitals": 23}
    for name, layer in named.items():
        at = data.sel(layer=layer, capability=name)
        print(f"bar 11: without {layer} {name} {float(at['effect']):+.2f} of {float(at['clean']):.2f}, text {float(at['loss']):+.2f} nats; z beyond text {float(at['specific']):+.2f} [{float(at['specific_low']):.2f}, {float(at['specific_high']):.2f}]")  # fmt: skip
    print(f"bar 11: layer 17 {loss[17]:+.3f} nats")
    inner = slice(2, 28)
    for name, values, agreement in zip(data["estimate"].values, data["estimated"].values, data["agreement"].values, strict=True):  # fmt: skip
        print(f"bar 11: {name}: Spearman with the loss {agreement:.2f}; in layers 2 to 27 {pl.statistics.spearman(values[inner], loss[inner]):.2f}")  # fmt: skip


# ---- removal sets


def sets(model: pl.Model, texts: list[str], options: Any) -> None:
    tasks = {k: v for k, v in capabilities(model).items() if k in ("capitals", "agreement", "repetition")}
    found, spent = cpu(lambda: removal(model, pl.Corpus(texts, packed=False, context=96), tasks, most=options.most, draws=4, layers=range(2, 28), tokens=options.tokens))  # fmt: skip
    print(f"\n{found.title}\n({spent:.0f} CPU s)")
    data = found.data
    for size in sorted({1, 3, 5, options.most}):
        if size > options.most:
            continue
        print(f"| {size} removed, chosen by | layers | loss | kept | " + " | ".join(tasks) + " | forwards to choose |\n" + "|---" * (len(tasks) + 5) + "|")  # fmt: skip
        for choice in data["choice"].values:
            at = data.sel(choice=choice, removed=size)
            lost = " | ".join(f"{float(x):+.2f}" for x in at["effect"].values)
            print(f"| {choice} | {at['set'].item()} | {float(at['loss']):+.2f} [{float(at['low']):.2f}, {float(at['high']):.2f}] | {float(at['kept']):.2f} | {lost} | {float(at['cost']):.0f} |", flush=True)  # fmt: skip


# ---- bar 15


CHOSEN = range(8, 20)


def snapshots(model: pl.Model, options: Any) -> tuple[dict[str, pl.Model], dict[str, list[str]]]:
    """Two versions of layers 8 to 19, ten steps on reviews and on a treebank; and 40 texts of each kind: the first 20 were trained on."""
    kinds = {"reviews": reviews(options.texts, 40), "treebank": sentences(options.treebank, 40)}

    def trained(name: str, each: list[str]) -> pl.Model:
        kept = None if options.snapshots is None else Path(options.snapshots) / f"{name}.safetensors"
        if kept is not None and kept.exists():
            return model.changed(kept)
        names = [n for n, _ in model.module.named_parameters() if any(f"layers.{i}." in n for i in CHOSEN)]
        made = model.changed(Copied(tuple(names)))
        made.module.requires_grad_(False)
        weights = [made.module.get_parameter(n).requires_grad_(True) for n in names]
        optimiser = torch.optim.AdamW(weights, lr=3e-4)
        for step in range(10):
            batch = model.inputs(each[2 * step : 2 * step + 2], truncate=64).tensors
            mask = batch["attention_mask"].bool()
            scores = made.module(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
            loss = -scores.gather(2, batch["input_ids"][:, 1:, None])[..., 0][mask[:, 1:] & mask[:, :-1]].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        made.module.requires_grad_(False)
        if kept is not None:
            made.save_changes(kept)
        return made

    return {name: trained(name, each[:20]) for name, each in kinds.items()}, kinds


def variants(model: pl.Model, texts: list[str], options: Any) -> None:
    both, kinds = snapshots(model, options)
    fitted = [
        t for pair in zip(*(each[20 : 20 + options.fitted] for each in kinds.values()), strict=True) for t in pair
    ]
    held = {name: each[-options.held :] for name, each in kinds.items()}
    gate = pl.surgery.Gate(tokens=1500, context=64).fit(model, both, pl.Corpus(fitted, packed=False, long="cut"), layers=list(CHOSEN))  # fmt: skip
    print(f"\nvariants: the gate names the better one in {gate.right_:.2f} of what is at stake in {len(fitted)} texts of its fit", flush=True)  # fmt: skip
    corpus = pl.Corpus([t for each in held.values() for t in each], packed=False, long="cut")
    found = pl.surgery.ensemble(model, both, corpus, layers=list(CHOSEN), gate=gate, context=64, tokens=1024)
    print(found.title)
    for route in found.data["route"].values:
        at = found.data.sel(route=route)
        taken = ", ".join(f"{n} {float(x):.2f}" for n, x in zip(both, at.taken.values, strict=True))
        print(f"| {route} | {float(at.nll):.3f} [{float(at.low):.2f}, {float(at.high):.2f}] | below random {float(at.gain):+.3f} [{float(at.gain_low):.3f}, {float(at.gain_high):.3f}] | {taken} |", flush=True)  # fmt: skip
    for name, each in held.items():
        for route in ("gate", "confidence"):
            chosen = [
                pl.surgery.chosen_variants(
                    model, both, model.inputs(t, truncate=64), layers=list(CHOSEN), route=route, gate=gate
                ).data
                for t in each[:4]
            ]  # type: ignore[arg-type]
            shares = np.mean([float((d.chosen == 0).mean()) for d in chosen])
            print(f"{route}, on {name}: {shares:.2f} of tokens take the variant of reviews", flush=True)
        first = chosen[0]
        print(" ".join(f"{t}{'RT'[int(c)]}" for t, c in zip(first.token.values[:24].tolist(), first.chosen.values[:24].tolist(), strict=True)))  # fmt: skip


def hybrids(model: pl.Model, texts: list[str], options: Any) -> None:
    (a, b), kinds = (lambda made: (made[0].values(), made[1]))(snapshots(model, options))
    chosen, held = CHOSEN, {name: [model.inputs(t, truncate=96) for t in each[-8:]] for name, each in kinds.items()}

    def nll(one: pl.Model) -> np.ndarray:
        rows = []
        for given in (g for each in held.values() for g in each):
            with torch.no_grad():
                scores = one.module(**given.tensors, use_cache=False).logits[0, :-1].log_softmax(-1)
            rows.append(float(-scores.gather(1, given.tensors["input_ids"][0, 1:, None]).mean()))
        return np.array(rows)

    both = {"a": a, "b": b}
    order = [("b" if i in chosen and i % 2 else "a", i) for i in range(LAYERS)]
    neighbour = [*range(10), 11, 10, *range(12, LAYERS)]
    shuffled = pl.controls.shuffled(b, keep=[n for n, _ in b.module.named_parameters() if "layers.10." not in n])
    said = {name: nll(one) for name, one in {
        "base": model, "a": a, "b": b,
        "a 8:14 + b 14:20": remix(both, [("a", 0, 14), ("b", 14, 20), ("a", 20, LAYERS)]),
        "b 8:14 + a 14:20": remix(both, [("a", 0, 8), ("b", 8, 14), ("a", 14, LAYERS)]),
        "alternating": remix(both, Recipe.of(order)),
        "control: b's layer 10 shuffled, in a": take(a, shuffled, 10),
        "control: a with layers 10 and 11 swapped": reorder(a, neighbour),
    }.items()}  # fmt: skip
    parents = (said["a"] + said["b"]) / 2
    print(f"\nbar 15: nats a token, held-out rows ({' + '.join(f'{len(v)} {k}' for k, v in held.items())}); beyond the parents' mean")  # fmt: skip
    half = len(held["reviews"])
    for name, rows in said.items():
        low, high = interval(rows - parents)
        print(f"| {name} | {rows[:half].mean():.3f} | {rows[half:].mean():.3f} | {rows.mean():.3f} | {(rows - parents).mean():+.3f} [{float(low):.3f}, {float(high):.3f}] |", flush=True)  # fmt: skip


BARS = {"files": files, "importance": importance, "removal": sets, "hybrids": hybrids, "variants": variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bars", nargs="*", choices=[[], *BARS])
    parser.add_argument("--texts", default=PAIRED)
    parser.add_argument("--treebank", default=TREEBANK)
    parser.add_argument("--tokens", type=int, default=192, help="of text that chooses and judges removal sets")
    parser.add_argument("--text", type=int, default=2048, help="tokens of text that importance is measured on")
    parser.add_argument("--prompts", type=int, default=12, help="of each capability")
    parser.add_argument("--most", type=int, default=5)
    parser.add_argument("--held", type=int, default=8, help="texts of each kind that variants are judged on")
    parser.add_argument("--fitted", type=int, default=12, help="texts of each kind that the gate is fitted on")
    parser.add_argument("--snapshots", help="a folder that keeps the two trained snapshots of hybrids and variants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = pl.load(smollm2())
    texts = [
        t for pair in zip(reviews(options.texts, 2), sentences(options.treebank, 2, 200), strict=True) for t in pair
    ]
    for bar in options.bars or BARS:
        with pl.quiet():
            BARS[bar](model, texts, options)


if __name__ == "__main__":
    main()
