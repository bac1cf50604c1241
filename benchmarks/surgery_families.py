"""Which technique on layers works on which family, tried on tiny models: fills and checks the table in docs/surgery.md.

    python -m benchmarks.surgery_families [llama gpt2 ...]           print it (of some families)
    python -m benchmarks.surgery_families --write                    write it into docs/surgery.md
    python -m benchmarks.surgery_families --check [llama ...]        fail where the docs say otherwise

Random weights of four layers: what is tried is whether a technique runs through or says in words why it does not. That its numbers
are right is for tests/surgery, on the same models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pellucid as pl
from pellucid.errors import PellucidError
from tests.zoo import build, tokenizer

DOCS = Path(__file__).parent.parent / "docs" / "surgery.md"
MARKS = "<!-- families: python -m benchmarks.surgery_families --write -->", "<!-- end of families -->"
FAMILIES = {"llama": "Llama", "gpt2": "GPT-2", "gemma3_text": "Gemma 3", "mixtral": "Mixtral", "falcon": "Falcon", "gptj": "GPT-J", "t5": "T5", "bert": "BERT"}  # fmt: skip
TEXTS = ["the cat sat on the mat and looked at the dog", "a bird flew over the house and the city", "When Mary and John went to the store"] * 4  # fmt: skip
A, B = "the cat sat on the mat", "the dog sat on the mat"


def changed(model: pl.Model, seed: int, layer: int = 1) -> pl.Model:
    """A variant that differs in one layer."""
    stack = model.anatomy.stacks[-1]
    inside = f"{stack.blocks[layer].module}."
    return pl.controls.shuffled(
        model, keep=[n for n, _ in model.module.named_parameters() if not n.startswith(inside)], seed=seed
    )


def techniques() -> dict[str, Callable[[pl.Model, dict[str, Any]], Any]]:
    """By name, with what `stack=` and `decoder=` an encoder-decoder needs."""
    s = pl.surgery
    corpus = pl.Corpus(TEXTS[:3], packed=False)
    head: Any = pl.metrics.logit_difference(3, 5)
    policy = s.Exit("margin", 0.01, layers=(1, 2))
    gate = {"layers": 1, "tokens": 200}

    def two(model: pl.Model) -> dict[str, pl.Model]:
        return {"a": changed(model, 1), "b": changed(model, 2)}

    def pair(k: dict[str, Any]) -> dict[str, Any]:
        return {"decoder": "the"} if k else {}

    return {
        "remove": lambda m, k: s.remove(m, 2, **k),
        "repeat": lambda m, k: s.repeat(m, 2, **k),
        "swap": lambda m, k: s.swap(m, 1, 2, **k),
        "reorder": lambda m, k: s.reorder(m, [0, 3, 2, 1], **k),
        "parallel": lambda m, k: s.parallel(m, slice(1, 3), **k),
        "remix, take": lambda m, k: (s.take(m, changed(m, 1), 1, **k), s.remix({"a": m, "b": changed(m, 1)}, [("a", 0, 1), ("b", 1, 2), ("a", 2, 4)], **k)),
        "layer_importance": lambda m, k: s.layer_importance(m, corpus, parts=["layer", "attn", "mlp"]),
        "removal": lambda m, k: s.removal(m, corpus, most=2, draws=2),
        "splice": lambda m, k: s.splice(m, A, B, positions={"last": -1}, metric=head, **pair(k)),
        "similarity": lambda m, k: s.similarity(m, m, TEXTS),
        "stitching": lambda m, k: s.stitching(m, m, TEXTS, after=[1], into=[2], kinds=["identity", "orthogonal", "ridge"], controls=["tokens"], tokens=60, held_out=30),
        "exits": lambda m, k: s.exits(m, corpus, [policy]),
        "calibrate": lambda m, k: s.calibrate(m, corpus, policy),
        "generate_early": lambda m, k: s.generate_early(m, A, policy, max_new_tokens=3),
        "draft_and_verify": lambda m, k: s.draft_and_verify(m, A, layers=2, ahead=2, max_new_tokens=3),
        "ensemble": lambda m, k: s.ensemble(m, two(m), TEXTS, **gate),
        "save_changes, save_pretrained": lambda m, k: _saved(s.remove(m, 2, **k)),
    }  # fmt: skip


def _saved(model: pl.Model) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_changes(f"{folder}/change.safetensors")
        model.module.save_pretrained(f"{folder}/whole")


def tried(family: str) -> dict[str, str]:
    """What each technique says on a tiny model of a family: "yes", or the refusal."""
    module = build(family, layers=4)
    model = pl.load(module, tokenizer=tokenizer(module))
    options = {"stack": model.anatomy.stacks[-1].name} if len(model.anatomy.stacks) > 1 else {}
    found = {}
    for name, work in techniques().items():
        try:
            work(model, options)
            found[name] = "yes"
        except PellucidError as refused:  # anything else is a fault, and is raised
            why = str(refused).split(";")[0].split(" (")[0].replace(f"{model.name} ", "").strip().rstrip(".")
            found[name] = why[0].lower() + why[1:]
    return found


def table(found: dict[str, dict[str, str]]) -> str:
    """Families side by side; refusals as notes below."""
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
    head = ["| | " + " | ".join(FAMILIES[f] for f in found) + " |", "|---" * (len(found) + 1) + "|"]
    return "\n".join([*head, *rows, "", *(f"({i}) {note}." for i, note in enumerate(notes, 1))])


def read(text: str) -> dict[str, dict[str, str]]:
    """What the docs say, by family and technique."""
    body = text.split(MARKS[0])[1].split(MARKS[1])[0].strip().splitlines()
    notes = dict(line[1:].rstrip(".").split(") ", 1) for line in body if line.startswith("("))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in body if line.startswith("|")]
    names = {v: k for k, v in FAMILIES.items()}
    found: dict[str, dict[str, str]] = {names[f]: {} for f in rows[0][1:]}
    for row in rows[2:]:
        for family, said in zip(found, row[1:], strict=True):
            found[family][row[0].replace("`", "")] = "yes" if said == "yes" else notes[said[4:-1]]
    return found


def main(args: list[str]) -> int:
    chosen = [a for a in args if a in FAMILIES] or [*FAMILIES]
    found = {}
    for family in chosen:
        with pl.quiet():
            found[family] = tried(family)
        print(family, {k: v for k, v in found[family].items() if v != "yes"}, flush=True)
    if "--check" in args:
        said = read(DOCS.read_text())
        wrong = [(f, k, v, said[f].get(k)) for f in found for k, v in found[f].items() if said[f].get(k) != v]
        print(wrong or "as the docs say")
        return len(wrong)
    print(table(found))
    if "--write" in args:
        text = DOCS.read_text()
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        DOCS.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
