"""The bars of editing facts, each beside its control, on SmolLM2-135M-Instruct.

    python benchmarks/facts.py --data DIR [--moments FILE] [part ...]     parts: moments rome memit spare batch sequence; all by default

DIR holds relations_lre, ud_ewt and imdb_counterfactual as their repositories lay them out. `--moments` keeps the second moments
between calls. Facts are those of three relations that the model knows and answers in one token; new answers are drawn from
the same relation (seed 1). One thread, fixed seeds. Costs are CPU times as multiples of a plain forward over the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from pellucid.surgery import Fact, KeyCovariance, Search, edit, scoreboard
from pellucid.surgery.answers import measured
from pellucid.surgery.editing import written_contexts
from scripts.demo_model import smollm2

RELATIONS = {
    "country_capital_city": (
        "The capital of {} is",
        "The capital city of {} is",
        "{} has its seat of government in the city of",
    ),
    "country_language": ("People in {} speak", "The official language of {} is", "The language spoken in {} is"),
    "landmark_in_country": (
        "{} is in the country of",
        "{} is located in the country of",
        "The landmark {} is in the country of",
    ),
}
WANTED = {"country_capital_city": 12, "country_language": 8, "landmark_in_country": 4}
LAYER, LAYERS, TOKENS, STEPS = 6, (3, 4, 5, 6), 16_384, 15


def bar(name: str, value: float, said: str, holds: bool, control: str = "") -> None:
    print(
        f"{'reached' if holds else 'MISSED '}  {name}: {value:.3f} (bar {said}){'; ' + control if control else ''}",
        flush=True,
    )


def said(title: str, result: Any) -> None:
    print(f"\n{title}\n{result.data['value'].to_pandas().round(3).dropna(how='all').to_string()}", flush=True)


class Bench:
    def __init__(self, data: Path, moments: Path | None, facts: int) -> None:
        self.data, self.file = data, moments
        self.model = pl.load(str(smollm2()))
        self.known = self._known()
        self.facts = self._facts({k: max(1, n * facts // 24) for k, n in WANTED.items()})
        self.contexts = written_contexts(self.model, 2, seed=0)
        self._covariance: KeyCovariance | None = None

    def texts(self) -> list[str]:
        """Sentences of UD English (six a text) and IMDB reviews in turn."""
        lines = next((self.data / "ud_ewt").glob("*train.conllu")).read_text(encoding="utf-8").splitlines()
        ud = [line[9:].strip() for line in lines if line.startswith("# text = ")]
        table = (
            sorted((self.data / "imdb_counterfactual").rglob("*train*.tsv"))[0].read_text(encoding="utf-8").splitlines()
        )
        reviews = [re.sub(r"<[^>]+>", " ", max(row.split("\t"), key=len).strip().strip('"')) for row in table[1:]]
        joined = [" ".join(ud[i : i + 6]) for i in range(0, len(ud), 6)]
        return [text for pair in zip(joined, reviews, strict=False) for text in pair]

    # ---- facts

    def _known(self) -> dict[str, dict[str, str]]:
        """Relation -> subject -> answer, of what the model says by itself in one token."""
        found: dict[str, dict[str, str]] = {}
        for name, (prompt, *_) in RELATIONS.items():
            rows = json.loads((self.data / f"relations_lre/data/factual/{name}.json").read_text())["samples"][:40]
            pairs = [(prompt.format(r["subject"]), " " + r["object"]) for r in rows]
            short = [i for i, (_, a) in enumerate(pairs) if len(self.model.tokenizer(a)["input_ids"]) == 1]
            exact = measured(self.model, [pairs[i] for i in short]).exact
            found[name] = {rows[i]["subject"]: pairs[i][1] for i, e in zip(short, exact, strict=True) if e}
        print({k: len(v) for k, v in found.items()}, flush=True)
        return found

    def _facts(self, wanted: dict[str, int], neighbours: int = 4) -> list[Fact]:
        draw, made = random.Random(1), []
        edited = {
            k: set(draw.sample(sorted(v), min(wanted.get(k, 0), len(v) // 2 + len(v) // 4)))
            for k, v in self.known.items()
        }
        for name, (prompt, *others) in RELATIONS.items():
            answers = sorted(set(self.known[name].values()))
            free = sorted(set(self.known[name]) - edited[name])
            for subject in sorted(edited[name]):
                true = self.known[name][subject]
                beside = [
                    (prompt.format(s), self.known[name][s]) for s in draw.sample(free, min(neighbours, len(free)))
                ]
                same = [
                    (RELATIONS[r][0].format(subject), self.known[r][subject])
                    for r in RELATIONS
                    if r != name and subject in self.known[r] and subject not in edited[r]
                ]
                new = draw.choice([a for a in answers if a != true])
                made.append(Fact(prompt, subject, new, true, [p.format(subject) for p in others], beside, same))
        return made

    def covariance(self) -> KeyCovariance:
        if self._covariance is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._covariance = KeyCovariance(layers=LAYERS).fit(
                    self.model, self.texts(), tokens=TOKENS, checkpoint=self.file
                )
        return self._covariance

    def _forward(self, shape: tuple[int, int]) -> float:
        ids = torch.randint(100, 40_000, shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.model.module(ids)
            begun = time.process_time()
            self.model.module(ids)
        return time.process_time() - begun

    # ---- bars 9 and 18

    def moments(self) -> None:
        layers, tokens = tuple(range(2, 15)), 2048  # cost does not depend on how many tokens there are
        forward = self._forward((8, 256))
        begun = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KeyCovariance(layers=layers).fit(self.model, self.texts(), tokens=tokens)
        cost = (time.process_time() - begun) / forward
        bar("18 second moments of 13 layers, in forwards of the same tokens", cost, "<= 1.0", cost <= 1.0)
        c = self.covariance()
        one = self.edited()
        found = c.adequacy({str(LAYER): one.values.keys}).data.sel(memory=str(LAYER))
        whole, halves = float(found.whole), float(found.halves)
        bar("9 split-half cosine of u, of all the text", whole, ">= .85", whole >= 0.85,
            f"{halves:.3f} between two halves of {TOKENS // 2:,} tokens; condition {float(found.condition):.0f}")  # fmt: skip

    # ---- bars 2, 3, 8, 17

    def edited(self) -> Any:
        if not hasattr(self, "_edited"):
            begun = time.process_time()
            self._edited = edit(
                self.model, self.facts, "emmet", covariance=self.covariance(), layers=LAYER, contexts=self.contexts,
                search=Search(steps=STEPS),
            )  # fmt: skip
            print(f"{len(self.facts)} facts, {time.process_time() - begun:.0f} CPU s: {self._edited}", flush=True)
            print(
                f"steps {len(self._edited.values.history) - 1}, |delta| / |h| {self._edited.values.delta.norm(dim=1).div(self._edited.values.h).mean():.2f}"
            )
        return self._edited

    def rome(self) -> None:
        before = {n: p.clone() for n, p in self.model.module.named_parameters() if f"layers.{LAYER}." in n}
        alone = self.edited().alone()[:20]
        one = alone[0]
        memory = one.values.memory[0]
        moved = (memory.weight(one.model) - memory.weight(self.model)) @ one.values.keys[0]
        error = float((moved - one.values.delta[0]).norm() / one.values.delta[0].norm())
        bar("2 W' k* = v*, relative error", error, "<= 1e-4", error <= 1e-4)
        bits = all(torch.equal(p, before[n]) for n, p in self.model.module.named_parameters() if n in before)
        bar("3 undo is bit for bit", float(bits and one.undo() is self.model), "1", bits)
        found = scoreboard(
            alone, self.texts()[-6:], controls=("without C", "random keys"), max_new_tokens=0, tokens=400
        )
        said(f"ROME, {len(alone)} facts, each alone, layer {LAYER}: " + found.title, found)
        print(
            found.data.low.sel(model="edited").to_pandas().round(2).to_dict(),
            found.data.high.sel(model="edited").to_pandas().round(2).to_dict(),
        )
        at = found.data.value.sel
        off = float(at(measure="neighbourhood", model="without C"))
        for number, measure, least in (("8", "score", 0.92), ("8", "efficacy", 1.0), ("8", "neighbourhood", 0.83)):
            x = float(at(measure=measure, model="edited"))
            bar(
                f"{number} ROME {measure}",
                x,
                f">= {least}",
                x >= least - 1e-9,
                f"{float(at(measure=measure, model='without C')):.3f} without C",
            )
        lost = float(at(measure="neighbourhood", model="edited")) - off
        bar("8 neighbourhood lost without C", lost, ">= .20", lost >= 0.2)
        kl = float(at(measure="text KL", model="edited"))
        bar("8 text KL", kl, "<= .005", kl <= 0.005, f"{float(at(measure='text KL', model='without C')):.4f} without C")

    def values(self) -> None:
        from pellucid.surgery.editing import _essence, _prompts
        from pellucid.surgery.keys import about, memories
        from pellucid.surgery.values import find_values

        facts = self.facts[:10]
        rows, _ = _prompts(self.model, facts, self.contexts, 0)
        others = [about(self.model, f, i, t) for t in _essence(self.model, None) for i, f in enumerate(facts)]
        every = [*rows, *others]
        length = max(len(r.ids) for r in every)
        ids = torch.zeros(len(every), length, dtype=torch.long)
        for i, r in enumerate(every):
            ids[i, : len(r.ids)] = torch.tensor(r.ids)
        mask = (ids != 0).long()
        for p in self.model.module.parameters():
            p.requires_grad_(False)
        delta = torch.zeros(576, requires_grad=True)

        def naive() -> float:
            hook = self.model.module.model.layers[LAYER].mlp.register_forward_hook(lambda m, a, out: out + delta)
            begun = time.process_time()
            self.model.module(ids, attention_mask=mask).logits.log_softmax(-1)[:, -1].sum().backward()
            hook.remove()
            return time.process_time() - begun

        naive()
        plain = naive()
        begun = time.process_time()
        find_values(self.model, memories(self.model, LAYER, rows), rows, others, Search(steps=STEPS, enough=1.0))
        cost = (time.process_time() - begun) / (STEPS * plain)
        bar("17 values of 10 facts, share of naive forward and backward passes", cost, "<= .6", cost <= 0.6,
            f"{int(mask.sum())} tokens, naive step {plain:.1f} CPU s")  # fmt: skip

    # ---- bar 10

    def memit(self) -> None:
        values, texts = self.edited().values, self.texts()[-6:]
        options: dict[str, Any] = {"layers": LAYERS, "contexts": self.contexts, "values": values}
        for title, how, more in (
            ("MEMIT, penalty chosen on the model", "memit", {}),
            ("MEMIT, the papers' 15,000", "memit", {"penalty": 15_000.0}),
            ("MEMIT without C", "memit", {"covariance": "off"}),
            ("AlphaEdit", "alphaedit", {}),
        ):
            made = edit(self.model, self.facts, how, **{"covariance": self.covariance(), **options, **more})
            found = scoreboard(made, texts, controls=(), max_new_tokens=0, tokens=400)
            at = found.data.value.sel(model="edited")
            print(f"\n{title}: penalties {made.result.data.attrs['penalty']}")
            said(found.title, found)
            if title.startswith("MEMIT, penalty"):
                for measure, least in (("efficacy", 0.95), ("paraphrase", 0.9), ("neighbourhood kept", 0.8)):
                    x = float(at.sel(measure=measure))
                    bar(f"10 MEMIT {measure}", x, f">= {least}", x >= least)
                kl, near = float(at.sel(measure="text KL")), float(at.sel(measure="neighbourhood KL"))
                bar("10 text KL", kl, "<= .02", kl <= 0.02)
                bar("10 neighbours' KL", near, "<= .25", near <= 0.25)
                print("broken:", found.data.attrs["broken"])

    # ---- what lowers the damage to the same subject

    def spare(self) -> None:
        facts = [f for f in self.facts if f.same_subject][:8]
        texts = self.texts()[-6:]
        essence = ("{} is a", "{} is known for its", "The culture of {} is", "Most people in {} are")
        for title, more in (
            ("as it is", {}),
            ("four essence prompts, weight 1", {"essence": essence, "search": Search(steps=STEPS, kl=1.0)}),
            ("keys of the subject elsewhere held", {"hold": essence}),
            ("both", {"essence": essence, "search": Search(steps=STEPS, kl=1.0), "hold": essence}),
        ):
            options = {
                "covariance": self.covariance(),
                "contexts": self.contexts,
                "search": Search(steps=STEPS),
                **more,
            }
            made = edit(self.model, facts, "emmet", layers=LAYER, **options)
            said(f"spare: {title}", scoreboard(made, texts, controls=(), max_new_tokens=0, tokens=400))

    # ---- curves

    def batch(self, n: int = 100) -> None:
        facts = self._facts(
            {"country_capital_city": 60, "country_language": 40, "landmark_in_country": 40}, neighbours=2
        )[:n]
        print(f"\nbatch of {len(facts)} facts")
        made = edit(
            self.model,
            facts,
            "memit",
            layers=LAYERS,
            covariance=self.covariance(),
            contexts=(),
            search=Search(steps=12),
        )
        options: dict[str, Any] = {"layers": LAYERS, "contexts": (), "covariance": self.covariance()}
        for count in (1, 10, 30, 100):
            some = list(range(min(count, len(facts))))
            v = made.values
            part = type(v)(
                [v.memory[i] for i in some],
                [],
                v.keys[some],
                v.delta[some],
                v.h[some],
                v.history[:, some],
                v.routed[:0],
            )
            for how in ("memit", "alphaedit"):
                one = edit(self.model, [facts[i] for i in some], how, values=part, **options)
                row = scoreboard(one, self.texts()[-3:], controls=(), max_new_tokens=0, tokens=200).data.value.sel(
                    model="edited"
                )
                print(
                    len(some),
                    how,
                    {str(m.measure.values): round(float(m), 3) for m in row if not np.isnan(m)},
                    flush=True,
                )

    def sequence(self, n: int = 50, each: int = 10) -> None:
        """One after another in steps of `each` with the keys of earlier edits held, and without."""
        facts = self._facts(
            {"country_capital_city": 30, "country_language": 20, "landmark_in_country": 10}, neighbours=2
        )[:n]
        for held in (True, False):
            model, last = self.model, None
            for start in range(0, len(facts), each):
                part = facts[start : start + each]
                last = edit(
                    model, part, "memit", layers=LAYER, covariance=self.covariance(), contexts=(), search=Search(steps=12), after=last,
                )  # fmt: skip
                if not held:
                    last.keys.clear()
                model = last.model
                done = facts[: start + each]
                exact = measured(model, [(f.asked, f.new) for f in done]).exact.mean()
                beside = measured(model, [p for f in done for p in f.neighbours]).exact.mean()
                print(
                    f"after {len(done)} edits, earlier keys {'held' if held else 'not held'}: said {exact:.2f}, neighbours kept {beside:.2f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("part", nargs="*", default=["values", "moments", "rome", "memit", "spare", "batch", "sequence"])
    parser.add_argument("--facts", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.data, given.moments, given.facts)
    with pl.quiet():
        for part in given.part:
            getattr(bench, part)()


if __name__ == "__main__":
    main()
