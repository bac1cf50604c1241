"""Which technique on layers works on which family, tried on tiny models: fills and checks the table in docs/surgery.md.

    python -m benchmarks.surgery_families [llama gpt2 ...]           print it (of some families)
    python -m benchmarks.surgery_families --write                    write it into docs/surgery.md
    python -m benchmarks.surgery_families --check [llama ...]        fail where the docs say otherwise

A second table is of one family (Llama) under conditions: prompts padded on the left, bfloat16, LoRA, packed weights, no tokenizer.
Random weights of four layers: what is tried is whether a technique runs through or says in words why it does not. That its numbers
are right is for tests/surgery, on the same models.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pellucid as pl
from pellucid.errors import PellucidError, Refused
from tests.zoo import build, tokenizer

DOCS = Path(__file__).parent.parent / "docs" / "surgery.md"
HARD = "<!-- conditions: python -m benchmarks.surgery_families --write -->", "<!-- end of conditions -->"
MARKS = "<!-- families: python -m benchmarks.surgery_families --write -->", "<!-- end of families -->"
FAMILIES = {"llama": "Llama", "gpt2": "GPT-2", "gemma3_text": "Gemma 3", "mixtral": "Mixtral", "falcon": "Falcon", "gptj": "GPT-J", "t5": "T5", "bert": "BERT"}  # fmt: skip
TEXTS = ["the cat sat on the mat and looked at the dog", "a bird flew over the house and the city", "When Mary and John went to the store"] * 4  # fmt: skip
A, B = "the cat sat on the mat", "the dog sat on the mat"
CONDITIONS = ("left padding", "bfloat16", "LoRA", "8 bits", "no tokenizer")


@dataclass
class Given:
    """What a technique is given: texts, a pair (or pairs) of prompts, several prompts, one, and what an encoder-decoder needs."""

    texts: Any
    a: Any
    b: Any
    several: Any
    one: Any
    options: dict[str, Any]

    @property
    def corpus(self) -> Any:
        return pl.Corpus(self.texts[:3], packed=False)


def changed(model: pl.Model, seed: int, layer: int = 1) -> pl.Model:
    """A variant that differs in one layer; in two, which have changed places, where weights are packed."""
    inside = f"{model.anatomy.stacks[-1].blocks[layer].module}."
    keep = [n for n, _ in model.module.named_parameters() if not n.startswith(inside)]
    try:
        return pl.controls.shuffled(model, keep=keep, seed=seed)
    except Refused:
        return model if seed == 1 else pl.surgery.swap(model, layer, layer + 1)


def techniques() -> dict[str, Callable[[pl.Model, Given], Any]]:
    """By name."""
    s = pl.surgery
    head: Any = pl.metrics.logit_difference(3, 5)
    policy = s.Exit("margin", 0.01, layers=(1, 2))

    def two(model: pl.Model) -> dict[str, pl.Model]:
        return {"a": changed(model, 1), "b": changed(model, 2)}

    def gate(m: pl.Model, g: Given) -> None:
        both, like = two(m), {"layers": slice(1, 3), "tokens": 200}
        fitted = s.Gate(tokens=200).fit(m, both, g.texts, layers=slice(1, 3))
        s.ensemble(m, both, g.texts, gate=fitted, **like)
        s.chosen_variants(m, both, g.one, layers=slice(1, 3), route="gate", gate=fitted)

    def head_of(m: pl.Model, g: Given) -> None:
        fitted = s.ExitHead(layers=(1, 2), tokens=200).fit(m, g.texts)
        s.exits(m, g.corpus, s.Exit("head", 0.5, (1, 2), head=fitted))

    return {
        "remove": lambda m, g: s.remove(m, 2, **g.options).run(g.several, **decoded(g)),
        "repeat": lambda m, g: s.repeat(m, 2, **g.options).run(g.several, **decoded(g)),
        "swap": lambda m, g: s.swap(m, 1, 2, **g.options).run(g.several, **decoded(g)),
        "reorder": lambda m, g: s.reorder(m, [0, 3, 2, 1], **g.options).run(g.several, **decoded(g)),
        "parallel": lambda m, g: s.parallel(m, slice(1, 3), **g.options).run(g.several, **decoded(g)),
        "remix, take": lambda m, g: (s.take(m, changed(m, 2), 1, **g.options), s.remix({"a": m, "b": changed(m, 2)}, [("a", 0, 1), ("b", 1, 2), ("a", 2, 4)], **g.options)),
        "layer_importance": lambda m, g: s.layer_importance(m, g.corpus, {"prompts": (g.several, head)}, parts=["layer", "attn", "mlp"]),
        "removal": lambda m, g: s.removal(m, g.corpus, {"prompts": (g.several, head)}, most=2, draws=2),
        "splice": lambda m, g: s.splice(m, g.a, g.b, positions={"last": -1}, metric=head, **decoded(g)),
        "similarity": lambda m, g: s.similarity(m, m, g.texts),
        "stitching": lambda m, g: s.stitching(m, m, g.texts, after=[1], into=[2], kinds=["identity", "orthogonal", "ridge"], controls=["tokens"], tokens=60, held_out=30),
        "exits": lambda m, g: s.exits(m, g.corpus, [policy]),
        "calibrate": lambda m, g: s.calibrate(m, g.corpus, policy),
        "ExitHead": head_of,
        "generate_early": lambda m, g: s.generate_early(m, g.one, policy, max_new_tokens=3),
        "generate_early (a batch)": lambda m, g: s.generate_early(m, g.several, policy, max_new_tokens=3),
        "draft_and_verify": lambda m, g: s.draft_and_verify(m, g.one, layers=2, ahead=2, max_new_tokens=3),
        "ensemble, Gate": gate,
        "save_changes": lambda m, g: _saved(s.remove(m, 2, **g.options), False),
        "save_pretrained": lambda m, g: _saved(s.remove(m, 2, **g.options), True),
    }  # fmt: skip


def decoded(given: Given) -> dict[str, Any]:
    return {"decoder": "the"} if given.options else {}


def _saved(model: pl.Model, whole: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not whole:
            made = model.base.changed(model.save_changes(f"{folder}/change.safetensors"))  # type: ignore[union-attr]
            assert made.digest == model.digest
            return
        try:
            model.module.save_pretrained(f"{folder}/whole")
        except RuntimeError as e:  # torchao's tensors, which transformers did not pack itself
            raise Refused("transformers does not write weights that it did not pack itself") from e


def tried(family: str) -> dict[str, str]:
    """What each technique says on a tiny model of a family: "yes", or the refusal."""
    module = build(family, layers=4)
    model = pl.load(module, tokenizer=tokenizer(module))
    options = {"stack": model.anatomy.stacks[-1].name} if len(model.anatomy.stacks) > 1 else {}
    return said_by(model, Given(TEXTS, A, B, [A, TEXTS[1]], A, options))


def under(condition: str) -> dict[str, str]:
    """The same on a tiny Llama under one condition."""
    module = build("llama", layers=4, dtype=torch.bfloat16 if condition == "bfloat16" else torch.float32)
    words, given = tokenizer(module), Given(TEXTS, A, B, [A, TEXTS[1]], A, {})
    if condition == "left padding":
        given = replace(
            given,
            a=left(words, [A, TEXTS[2]]),
            b=left(words, [B, TEXTS[0]]),
            several=left(words, [A, TEXTS[1]]),
            one={k: torch.nn.functional.pad(v, (3, 0)) for k, v in left(words, [A]).items()},
        )
    if condition == "LoRA":
        import peft

        torch.manual_seed(1)
        module = peft.get_peft_model(
            module, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        ).eval()
    if condition == "8 bits":
        from torchao import quantization

        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    if condition == "no tokenizer":
        texts = [words(t)["input_ids"] for t in TEXTS]
        given = Given(
            texts,
            words(A)["input_ids"],
            words(B)["input_ids"],
            [words(A)["input_ids"], texts[1]],
            words(A)["input_ids"],
            {},
        )
    return said_by(pl.load(module, tokenizer=None if condition == "no tokenizer" else words), given)


def left(words: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [words(t)["input_ids"] for t in texts]
    width = max(map(len, rows))
    return {"input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]), "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])}  # fmt: skip


def said_by(model: pl.Model, given: Given) -> dict[str, str]:
    found = {}
    for name, work in techniques().items():
        try:
            work(model, given)
            found[name] = "yes"
        except PellucidError as refused:  # anything else is a fault, and is raised
            why = str(refused).split(";")[0].split(" (")[0].replace(f"{model.name} ", "").strip().rstrip(".")
            found[name] = why[0].lower() + why[1:]
    return found


def table(found: dict[str, dict[str, str]]) -> str:
    """Families or conditions side by side; refusals as notes below."""
    notes: list[str] = []

    def cell(said: str) -> str:
        if said == "yes":
            return said
        if said not in notes:
            notes.append(said)
        return f"no ({notes.index(said) + 1})"

    rows = [
        f"| `{name.replace(', ', '`, `')}` | " + " | ".join(cell(found[f][name]) for f in found) + " |"
        for name in techniques()
    ]
    head = ["| | " + " | ".join(FAMILIES.get(f, f) for f in found) + " |", "|---" * (len(found) + 1) + "|"]
    return "\n".join([*head, *rows, "", *(f"({i}) {note}." for i, note in enumerate(notes, 1))])


def read(text: str, marks: tuple[str, str] = MARKS) -> dict[str, dict[str, str]]:
    """What the docs say, by family (or condition) and technique."""
    body = text.split(marks[0])[1].split(marks[1])[0].strip().splitlines()
    notes = dict(line[1:].rstrip(".").split(") ", 1) for line in body if line.startswith("("))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in body if line.startswith("|")]
    names = {v: k for k, v in FAMILIES.items()}
    found: dict[str, dict[str, str]] = {names.get(f, f): {} for f in rows[0][1:]}
    for row in rows[2:]:
        for family, said in zip(found, row[1:], strict=True):
            found[family][row[0].replace("`", "")] = "yes" if said == "yes" else notes[said[4:-1]]
    return found


def main(args: list[str]) -> int:
    chosen = [a for a in args if a in (*FAMILIES, *CONDITIONS)] or [*FAMILIES, *CONDITIONS]
    tables: dict[tuple[str, str], dict[str, dict[str, str]]] = {MARKS: {}, HARD: {}}
    for name in chosen:
        with pl.quiet():
            marks, work = (MARKS, tried) if name in FAMILIES else (HARD, under)
            tables[marks][name] = work(name)
        print(name, {k: v for k, v in tables[marks][name].items() if v != "yes"}, flush=True)
    text, wrong = DOCS.read_text(), []
    for marks, found in tables.items():
        if not found:
            continue
        if "--check" in args:
            said = read(text, marks)
            wrong += [(f, k, v, said[f].get(k)) for f in found for k, v in found[f].items() if said[f].get(k) != v]
        print(table(found))
        before, after = text.split(marks[0])[0], text.split(marks[1])[1]
        text = f"{before}{marks[0]}\n{table(found)}\n{marks[1]}{after}"
    if "--check" in args:
        print(wrong or "as the docs say")
    if "--write" in args:
        DOCS.write_text(text)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
