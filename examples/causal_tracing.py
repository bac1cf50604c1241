"""Where does SmolLM2 keep a fact? Traces the Eiffel Tower, then averages over facts that the model knows.

    python examples/causal_tracing.py [--data FOLDER] [--facts 12] [--samples 10] [--subject TEXT] [--keep PATH]

The first part prints the trace of one prompt, its strongest sites for three ways to name the subject, and the window
curves. The second averages over facts by the role of each token, as Meng et al. (2022) do; --data FOLDER takes the facts
of relations_lre/data/factual there, else they are those of pellucid.tasks. A fact counts as known where the model's first
choice is the answer's only token and it gives it at least a fifth of its probability. --keep names files to continue from.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import pellucid
from pellucid import Model
from pellucid.causal import tracing, window_curve
from pellucid.results import Result
from pellucid.tasks import RELATIONS
from pellucid.tasks.tokens import answer_ids

PROMPT, ANSWER = "The Eiffel Tower is located in the city of", " Paris"
SUBJECTS = ("The Eiffel Tower", "Eiffel Tower", "Eiffel")
Fact = tuple[str, str, str]  # prompt, subject, answer


# ---- one fact


def strongest(result: Result, part: str) -> str:
    effect = result.effect.sel(part=part)
    layer, position = np.unravel_index(int(effect.values.argmax()), effect.shape)
    at = {"part": part, "layer": layer, "position": position}
    low, high = (float(result[name].sel(at)) for name in ("low", "high"))
    token = str(result.token.values[position])
    return f"{part:10} layer {layer:2}, token {token!r}: {float(effect[layer, position]):.3f} [{low:.3f}, {high:.3f}]"


def picture(result: Result, part: str, across: str = "token") -> str:
    """Layers down, tokens or roles across, the share of the total effect in percent."""
    share = (100 * result.share.sel(part=part)).fillna(0).round().astype(int)
    head = "      " + " ".join(f"{str(t).strip()[:13]:>13}" for t in result[across].values)
    rows = [f"{layer:5} " + " ".join(f"{int(x):13}" for x in row) for layer, row in enumerate(share.values)]
    return "\n".join([f"{part}, % of the total effect", head, *rows])


def curve(result: Result) -> str:
    """The largest effect over layers for every window."""
    lines = [result.title]
    for window in result.window.values:
        row = result.sel(window=window)
        layer = int(row.effect.values.argmax())
        low, high = (float(row[end][layer]) for end in ("low", "high"))
        lines.append(f"  {int(window):3} -> {float(row.effect[layer]):.3f} [{low:.3f}, {high:.3f}] (layer {layer})")
    return "\n".join(lines)


def the_tower(model: Model, subjects: tuple[str, ...], samples: int) -> None:
    for i, subject in enumerate(subjects):
        parts = ("mlp.out", "attn.out") if i else ("resid_post", "mlp.out", "attn.out")
        result = tracing(model, PROMPT, ANSWER, subject=subject, draws=samples, parts=parts)
        numbers = (result["clean"].item(), result["corrupted"].item(), result["total_effect"].item())
        print(f"subject {subject!r}: p({ANSWER!r}) clean {numbers[0]:.3f}, corrupted {numbers[1]:.3f}, "
              f"total effect {numbers[2]:.3f}")  # fmt: skip
        for part in parts:
            print("  " + strongest(result, part))
        if i == 0:
            print("\n" + "\n\n".join(picture(result, part) for part in parts) + "\n")
            effect = result.effect.sel(part="mlp.out")
            inside = result.in_subject.values == "subject"
            peak = int(np.where(inside, effect.max("layer"), -np.inf).argmax())
            last = len(inside) - 1
            for part, at in (("mlp.out", None), ("mlp.out", peak), ("attn.out", last)):
                print(
                    curve(window_curve(model, PROMPT, ANSWER, subject=subject, part=part, positions=at, draws=samples))
                )
            print()


# ---- many facts


def asked(data: Path | None, rng: random.Random) -> Iterator[list[Fact]]:
    """For every relation its facts in random order."""
    relations: list[tuple[str, list[tuple[str, str]]]] = []
    if data is None:
        relations = [(r.template.replace("{subject}", "{}"), r.pairs) for r in RELATIONS.values()]
    for path in sorted((data / "relations_lre/data/factual").glob("*.json")) if data else []:
        relation = json.loads(path.read_text(encoding="utf-8"))
        template = (relation["prompt_templates_zs"] or relation["prompt_templates"])[0]
        relations.append((template, [(s["subject"], s["object"]) for s in relation["samples"]]))
    for template, pairs in relations:
        facts = [(template.replace("{}", subject), subject, f" {answer}") for subject, answer in pairs]
        yield rng.sample(facts, len(facts))


def known(model: Model, facts: list[Fact], most: int) -> list[Fact]:
    """At most so many facts that the model knows, with subjects of two tokens or more, no two with one answer."""
    facts = [f for f in facts if len(answer_ids(model.tokenizer, f[2])) == 1
             and len(answer_ids(model.tokenizer, f" {f[1]}")) > 1][:48]  # fmt: skip
    chosen: dict[str, Fact] = {}
    for fact in facts:
        p = model.run(fact[0]).logits[0, -1].detach().softmax(-1)
        right = answer_ids(model.tokenizer, fact[2])[0]
        if int(p.argmax()) == right and float(p[right]) >= 0.2 and len(chosen) < most:
            chosen.setdefault(fact[2], fact)
    return list(chosen.values())


def average(model: Model, known: list[Fact], n: int, samples: int, keep: Path | None) -> None:
    """The first n facts; the noise is measured on all that are known."""
    reference, facts = [fact[0] for fact in known], known[:n]
    print(f"{len(facts)} facts:")
    for prompt, subject, answer in facts:
        print(f"  {prompt.replace(subject, f'[{subject}]', 1)}{answer}")
    prompts, subjects, answers = (list(column) for column in zip(*facts, strict=True))
    files = [None if keep is None else Path(f"{keep}.{name}") for name in ("trace", "mlp", "attention")]
    result = tracing(model, prompts, answers, subject=subjects, draws=samples, parts=("mlp.out", "attn.out"),
                     reference=reference, checkpoint=files[0])  # fmt: skip
    ends = [result[name].item() for name in ("total_effect", "total_low", "total_high")]
    print("clean {:.3f}, corrupted {:.3f}, total effect {:.3f} [{:.3f}, {:.3f}]".format(
        float(result.clean.mean()), float(result.corrupted.mean()), *ends))  # fmt: skip
    for part in ("mlp.out", "attn.out"):
        print("\n" + picture(result, part, "role"))
        print(f"{part}: strongest layer of every role; of the layer that is strongest in every other fact, in the rest")
        for role in result.role.values:
            print("  " + of_role(result, part, str(role)))
    for part, at, path in (("mlp.out", None, files[1]), ("attn.out", -1, files[2])):
        print(curve(window_curve(model, prompts, answers, subject=subjects, part=part, positions=at, draws=samples,
                                 reference=reference, windows=(1, 3, 5, 10, 15), checkpoint=path)))  # fmt: skip


def of_role(result: Result, part: str, role: str) -> str:
    here = result.sel(part=part, role=role)
    each = here["each"].dropna("prompt", how="any").values
    if len(each) < 4:
        return f"{role}: in {len(each)} facts only"
    layer, chosen = int(here.effect.values.argmax()), int(each[::2].mean(0).argmax())
    low, high = float(here.low[layer]), float(here.high[layer])
    return (f"{role:14} layer {layer:2}: {float(here.effect[layer]):+.3f} [{low:+.3f}, {high:+.3f}]; "
            f"held out, layer {chosen:2}: {each[1::2, chosen].mean():+.3f} ({len(each)} facts)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--subject")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pellucid.load(options.model or smollm2())
    the_tower(model, (options.subject,) if options.subject else SUBJECTS, options.samples)
    groups = list(asked(options.data, random.Random(0)))
    found = [fact for facts in groups for fact in known(model, facts, 3 if options.data else options.facts)]
    if len(found) >= 2:
        average(model, random.Random(0).sample(found, len(found)), options.facts, options.samples, options.keep)


if __name__ == "__main__":
    main()
