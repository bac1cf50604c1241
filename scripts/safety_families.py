"""Which technique of pl.safety is right on which kind of model, and what do the others say? The table of docs/safety.md.

    python scripts/safety_families.py [--write] [--only COLUMN ...]

Every technique is asked on tiny random models about prompts of unequal length, once together (left padding) and once one by one (or by plain
runs of single prompts); a cell says "right" where both agree to the column's tolerance (1e-3 of the largest number; what two orders of
summing round in bfloat16 and in eight bits: .05), and otherwise names the refusal below the table. Nothing else is a result.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import pellucid as pl
from pellucid import safety as sf
from pellucid.errors import PellucidError
from tests.zoo import build, tokenizer

NAMES = ("Paris", "Rome", "Mary", "John", "the dog", "the cat", "the city", "the store")
TRUE = [f"{a} is in {b}" for a in NAMES for b in ("France", "Italy")]
FALSE = [t.replace(" is in ", " is not in ") for t in TRUE]
TOPICS = [f"t{i // 4}" for i in range(16)]
PROMPTS = ["The capital of France is", "Mary went to the store and gave John a drink", "John of Rome", "he went to"] * 4
PROMPTS = [f"{p} {'the ' * (i // 4)}city" for i, p in enumerate(PROMPTS)]
LABELS = [i % 2 == 0 for i in range(16)]
ASKED = [(p, " Paris", " Rome") for p in PROMPTS[:5]]
COLUMNS = (
    "Llama",
    "Gemma 3",
    "Mixtral",
    "GPT-2",
    "T5",
    "BERT",
    "bfloat16",
    "frozen",
    "LoRA",
    "bitsandbytes 8 bit",
    "torchao int8",
)
FAMILIES = dict(zip(COLUMNS, ("llama", "gemma3_text", "mixtral", "gpt2", "t5", "bert"), strict=False))
Made = Any  # numbers, alike however the prompts were put together


@cache
def opened(column: str) -> pl.Model:
    family = FAMILIES.get(column, "llama")
    wide: dict[str, Any] = {"n_positions": 256} if family == "gpt2" else {}
    if column not in FAMILIES:
        wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # what eight bits can be packed into
    module = build(family, layers=3, **wide)
    own = tokenizer(module)
    if column == "bfloat16":
        module = module.to(torch.bfloat16)
    elif column == "frozen":
        module.requires_grad_(False)
    elif column == "LoRA":
        import peft

        module = peft.get_peft_model(
            module, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        )
    elif column not in FAMILIES:
        from transformers import BitsAndBytesConfig, TorchAoConfig

        with tempfile.TemporaryDirectory() as path:
            module.save_pretrained(path)
            own.save_pretrained(path)
            if column.startswith("bits"):
                how: Any = BitsAndBytesConfig(load_in_8bit=True)
            else:
                from torchao.quantization import Int8WeightOnlyConfig

                how = TorchAoConfig(Int8WeightOnlyConfig())
            return pl.load(path, quantization_config=how)
    return pl.load(module, tokenizer=own)


def site(model: pl.Model, layer: int = 1) -> str:
    return f"{model.anatomy.stacks[-1].prefix}layers.{layer}.resid_post"


def direction(model: pl.Model) -> torch.Tensor:
    return torch.randn(model.anatomy.stacks[-1].d_model, generator=torch.Generator().manual_seed(4))


def vector(model: pl.Model) -> sf.Vector:
    return sf.Vector(site(model), direction(model), 2.0, digest=model.digest)


def logits(model: pl.Model, prompts: list[str], edits: Any = ()) -> np.ndarray:
    run = model.run(prompts, edits=list(edits))
    stream = run.inputs.stream("")
    return run.logits[torch.arange(len(prompts)), stream.starts + stream.lengths - 1].detach().float().numpy()


def rows(one: bool, ask: Callable[[list[str]], Any], prompts: list[str] = PROMPTS[:3]) -> np.ndarray:
    """[prompt, ...] asked together, or one by one."""
    return np.concatenate([np.asarray(ask([p])) for p in prompts]) if one else np.asarray(ask(prompts))


def by_reader(kind: Any) -> Callable[[pl.Model, bool], Made]:
    def ask(model: pl.Model, one: bool) -> Made:
        stack = model.anatomy.stacks[0].prefix
        reader = sf.ConceptReader(
            kind, sites=f"{stack}layers.1:3.resid_post", controls=("random", "text"), folds=3, draws=2, restarts=2,
            steps=30, batch=1 if one else 16,
        ).fit(model, sf.Statements.paired(TRUE, FALSE, TOPICS))  # fmt: skip
        return reader.result_["pair_accuracy"].values, *(
            (reader.direction_.numpy(),) if kind in ("mean", "lda") else ()
        )

    return ask


def scores(model: pl.Model, one: bool, **how: Any) -> Made:
    monitor = sf.Monitor(sf.Direction(site(model), direction(model)), sf.ema(0.3), **how)
    kwargs = {"replies": ["he is in Rome", "a drink", "the store and the city"]} if how.get("reads") != "prompt" else {}
    return sf.conversation_scores(model, monitor, PROMPTS[:3], batch=1 if one else 3, **kwargs)


def steered(edits: Callable[[pl.Model], Any]) -> Callable[[pl.Model, bool], Made]:
    return lambda model, one: rows(one, lambda p: logits(model, p, edits(model)))


def watched(model: pl.Model, one: bool) -> Made:
    monitor = sf.Monitor(sf.Direction(site(model), direction(model)), "max", threshold=1e9, then=pl.Stop())

    def ask(prompts: list[str]) -> np.ndarray:
        score = model.generate(prompts, max_new_tokens=2, min_new_tokens=2, monitors=monitor).firings.score.values
        return score[:, 0, -2:-1] if prompts else score

    return rows(one, ask)


def conditioned(model: pl.Model, one: bool) -> Made:
    when = sf.condition(sf.Vector(site(model, 0), direction(model)), 0.0)

    def ask(prompts: list[str]) -> np.ndarray:
        made = model.generate(prompts, edits=[vector(model).edit(0.5, when=when)], max_new_tokens=2)
        return made.fired["condition"][:, 0].float().numpy()

    return rows(one, ask)


def in_weights(model: pl.Model, one: bool) -> Made:
    v = vector(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if one:
            return logits(model, PROMPTS[:3], sf.ablate_direction(model, v, everywhere=True))
    return logits(sf.in_weights(model, v, form="project"), PROMPTS[:3])


def honest(model: pl.Model, one: bool) -> Made:
    found = sf.honesty(model, ASKED, vector(model), batch=1 if one else 8, demonstrations=1)
    return found.said.values.astype(float), found.lens.values


def traced(model: pl.Model, one: bool) -> Made:
    failing = [f"John went {p}" for p in PROMPTS[:8]]
    said = [np.argsort(logits(model, [p])[0])[::-1] for p in failing]
    right, wrong = [int(a[2]) if i % 2 else int(a[0]) for i, a in enumerate(said)], [int(a[1]) for a in said]
    found = sf.trace_failure(
        model, failing, PROMPTS[:8], right, wrong, groups=[i // 2 for i in range(8)], held_out=[2, 3], layers=[1], top=1, exact=1, draws=1
    ).result  # fmt: skip
    if not one:
        return found.preferred.values[:1]
    return np.array([np.mean([(z := logits(model, [failing[i]])[0])[right[i]] > z[wrong[i]] for i in range(4, 8)])])


def swept(model: pl.Model, one: bool) -> Made:
    judge = pl.metrics.logit_difference(" Paris", " Rome")
    prompts = PROMPTS[:8]
    found = sf.strengths(model, vector(model), prompts, judge, strengths=(0.5,), draws=1, max_new_tokens=2)
    if not one:
        return np.array([float(found.base)])
    ids = [model.tokenizer(w, add_special_tokens=False)["input_ids"][-1] for w in (" Paris", " Rome")]
    half = [prompts[i] for i in np.random.default_rng(0).permutation(8)[:4]]
    return np.array([np.mean([(z := logits(model, [p])[0])[ids[0]] - z[ids[1]] for p in half])])


def learnt(model: pl.Model, one: bool) -> Made:
    made = sf.LearntEdit(site(model), rank=2, epochs=2, batch=4).fit(model, PROMPTS[:8], [[9, 12]] * 8)
    return rows(one, lambda p: logits(model, p, [made.edit_]))


def improved(model: pl.Model, one: bool) -> Made:
    def measure(m: pl.Model, prompts: list[str]) -> dict[str, np.ndarray]:
        return {"margin": rows(one, lambda p: logits(m, p)[:, 9], prompts)}

    with tempfile.TemporaryDirectory() as folder:
        found = sf.improve(model, measure, lambda m, *_: m, PROMPTS[:4], PROMPTS[4:8], ledger=folder, rounds=1)
        return found.rounds[0].before.values


def target(model: pl.Model) -> list[int]:
    """What the model does say to every other prompt, and something else to the rest."""
    given, tokens = masked(model), range(int(model.module.config.vocab_size))
    said = {n: sf.answered_right(model, [given[n]] * len(tokens), list(tokens)).argmax() for n in (1, 3)}
    return [int(said.get(n, 9)) for n in range(len(given))]


def masked(model: pl.Model) -> list[str]:
    encoder = len(model.anatomy.stacks) == 1 and not model.anatomy.stacks[0].causal
    return [f"{p} <mask>" for p in PROMPTS] if encoder else PROMPTS


def generated(model: pl.Model, one: bool) -> Made:
    monitor = sf.doubt(model, threshold=0.0)
    found = [
        model.generate(p, max_new_tokens=2, monitors=monitor)
        for p in ([[p] for p in PROMPTS[:3]] if one else [PROMPTS[:3]])
    ]
    return np.array([float(row[~np.isnan(row)][0]) for f in found for row in f.firings.score.values[:, 0]])


def gguf(model: pl.Model, one: bool) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        v = vector(model)
        if one:
            return rows(True, lambda p: logits(model, p, [v.edit(0.5)]))
        (back,) = sf.import_vectors(model, sf.export_gguf(model, [v], Path(folder) / "v.gguf", strength=0.5))
        return rows(False, lambda p: logits(model, p, [back.edit(1.0)]))


TECHNIQUES: dict[str, Callable[[pl.Model, bool], Made]] = {
    "ConceptReader('mean')": by_reader("mean"),
    "ConceptReader('logistic')": by_reader("logistic"),
    "ConceptReader('ccs')": by_reader("ccs"),
    "ConceptReader('attention')": by_reader("attention"),
    "honesty": honest,
    "audit('linear')": lambda m, one: sf.audit(m, PROMPTS, LABELS, split=2, draws=1, batch=1 if one else 8).area.values,
    "audit('transformer')": lambda m, one: sf.audit(m, PROMPTS, LABELS, kind="transformer", split=2, draws=1, batch=1 if one else 8).area.values[:2],
    "monitor of a prompt": lambda m, one: scores(m, one, reads="prompt"),
    "monitor of an answer": lambda m, one: scores(m, one),
    "monitor while generating": watched,
    "fit_monitor": lambda m, one: sf.fit_monitor(m, PROMPTS[:8], LABELS[:8], site=site(m), reads="prompt", batch=1 if one else 8).reader.vector.numpy(),
    "calibrate, evaluate": lambda m, one: sf.evaluate(
        m, sf.calibrate(m, sf.Monitor(sf.Direction(site(m), direction(m)), reads="prompt"), TRUE[:8], alarms=0.2, batch=1 if one else 8),
        PROMPTS, LABELS, shifts=["upper case"], batch=1 if one else 8).score.values,
    "Contrast": lambda m, one: sf.Contrast(sites=site(m), batch=1 if one else 16).fit(m, TRUE, FALSE).at(site(m)).direction.numpy(),
    "LearntEdit": learnt,
    "Vector.edit": steered(lambda m: [vector(m).edit(0.5)]),
    "condition": conditioned,
    "ablate_direction": steered(lambda m: sf.ablate_direction(m, vector(m))),
    "in_weights": in_weights,
    "export_gguf, import_vectors": gguf,
    "strengths": swept,
    "confidence": lambda m, one: sf.confidence(m, masked(m), batch=1 if one else 8),
    "confidence by layers": lambda m, one: sf.confidence(m, masked(m), "contrast", batch=1 if one else 8),
    "abstain": lambda m, one: sf.abstain(m, masked(m), target(m), draws=2, batch=1 if one else 8).sure.values,
    "ConfidenceProbe": lambda m, one: sf.ConfidenceProbe(draws=1, folds=2).fit(m, masked(m), LABELS, topics=TOPICS, batch=1 if one else 8).probe_.weight_.numpy(),
    "doubt": generated,
    "semantic_entropy": lambda m, one: sf.semantic_entropy(m, PROMPTS[:2], draws=2, max_new_tokens=2).entropy.values,
    "trace_failure": traced,
    "improve": improved,
}  # fmt: skip


def cell(name: str, column: str) -> str:
    """ "right", how far off, or the refusal in its own words."""
    model = opened(column)
    wide = 1e-3 if column in FAMILIES or column in ("frozen", "LoRA") else 0.05
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = [TECHNIQUES[name](model, one) for one in (False, True)]
    except PellucidError as why:
        return f"{type(why).__name__}: {why}"
    gap = 0.0
    for a, b in zip(*(m if isinstance(m, tuple) else (m,) for m in made), strict=True):
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any() or np.isinf(a).any():
            return f"WRONG: {a.shape} and {b.shape}, or numbers missing"
        gap = max(gap, float(np.nanmax(np.abs(a - b), initial=0) / max(np.nanmax(np.abs(b), initial=0), 1e-9)))
    return "right" if gap <= wide else f"WRONG: {gap:.2g} apart"


def plain(said: str) -> str:
    return said.replace("|", "\\|").replace("\n", " ")


def earlier(table: str) -> dict[str, dict[str, str]]:
    """What a written table says, refusals in their words."""
    notes = dict(line.split(". ", 1) for line in table.splitlines() if line[:1].isdigit())
    head, _, *rows = [
        [p.strip(" `") for p in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")
    ] or [[], []]
    return {
        row[0]: {
            c: notes[said[4:-1]] if said.startswith("no (") else said for c, said in zip(head[1:], row[1:], strict=True)
        }
        for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(COLUMNS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {name: {} for name in TECHNIQUES}
    with pl.quiet():
        for column in options.only:
            for name in TECHNIQUES:
                try:
                    found[name][column] = cell(name, column)
                except Exception as why:  # what no user should see
                    found[name][column] = f"RAW {type(why).__name__}: {why}"
                if found[name][column] != "right":
                    print(f"{column:20} {name:28} {found[name][column]:.220}", flush=True)
    page = Path(__file__).parents[1] / "docs/safety.md"
    before, _, rest = page.read_text().partition("<!-- families -->\n")
    written, _, after = rest.partition("<!-- /families -->")
    for name, row in earlier(written).items():  # columns that were not asked for stand as they are
        found.setdefault(name, {}).update({c: said for c, said in row.items() if c not in options.only})
    columns = [c for c in COLUMNS if all(c in row for row in found.values())]
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in found.items():
        cells = []
        for column in columns:
            said = row[column]
            if said != "right" and "WRONG" not in said and "RAW" not in said:
                key = plain(said).replace(opened(column).name, "the model").replace("a the model", "the model")
                said = f"no ({notes.setdefault(key, len(notes) + 1)})"
            cells.append(said)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. {key}" for key, i in notes.items())]
    table = "\n".join(lines)
    if not options.write:
        print(table)
        return
    page.write_text(f"{before}<!-- families -->\n{table}\n<!-- /families -->{after}")


if __name__ == "__main__":
    main()
