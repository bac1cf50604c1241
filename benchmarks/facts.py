"""The bars of editing facts, each beside its control, on SmolLM2-135M-Instruct.

    python benchmarks/facts.py --data DIR [--moments FILE] [part ...]     parts: see PARTS; all by default

DIR holds relations_lre, ud_ewt and imdb_counterfactual as their repositories lay them out. `--moments` keeps the second moments
between calls, and beside them values and results, so that a call (`--seconds`) goes on where the last one stopped: name another file when
settings change. Facts are those of three relations that the model knows and answers in one token; new answers are drawn from
the same relation (seed 1). One thread, fixed seeds. Costs are CPU times as multiples of a plain forward over the same tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import json
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from pellucid.errors import Refused
from pellucid.statistics import interval, spearman
from pellucid.surgery import Fact, KeyCovariance, Search, edit, editing_by_layer, scoreboard
from pellucid.surgery.answers import divergence, measured
from pellucid.surgery.editing import _essence, _prompts, _Solver, written_contexts, wrong_layer
from pellucid.surgery.keys import about, keys, memories, subject_row
from pellucid.surgery.scoreboard import _judged
from pellucid.surgery.values import Values, find_values
from scripts.demo_model import smollm2

RELATIONS = {
    "country_capital_city": (
        "The capital of {} is",
        "The capital city of {} is",
        "We know that {} has its seat of government in the city of",
    ),
    "country_language": ("People in {} speak", "The official language of {} is", "The language spoken in {} is"),
    "landmark_in_country": (
        "{} is in the country of",
        "{} is located in the country of",
        "The landmark {} is in the country of",
    ),
}
# What else of a subject the model says is judged: of countries the other relation, of landmarks the continent, which a new country on the
# same continent leaves true.
CONTINENTS = {
    "Europe": "Germany Italy France Ireland Norway Poland Greece Sweden Finland Spain Romania Denmark",
    "Asia": "India Japan Malaysia Israel Indonesia Vietnam Lebanon Pakistan",
    "South America": "Argentina Brazil", "North America": "Canada Mexico",
}  # fmt: skip
CONTINENT = {" " + country: " " + continent for continent, names in CONTINENTS.items() for country in names.split()}
ON = ("{} is on the continent of", "The landmark {} is on the continent of")
WANTED = {"country_capital_city": 7, "country_language": 9, "landmark_in_country": 8}
PARTS = (
    "values", "moments", "adequacy", "rome", "wrong", "null_space", "memit", "spare", "batch", "sequence", "where", "opening", "readme",
)  # fmt: skip
LAYER, LAYERS, TOKENS, STEPS = 6, (3, 4, 5, 6), 16_384, 15


def bar(name: str, value: float, said: str, holds: bool, control: str = "") -> None:
    print(
        f"{'reached' if holds else 'MISSED '}  {name}: {value:.3f} (bar {said}){'; ' + control if control else ''}",
        flush=True,
    )


def table(result: Any) -> dict[str, dict[str, float]]:
    """Model -> measure -> value of a scoreboard."""
    values = result.data["value"].to_pandas().dropna(how="all")
    return {str(model): {str(k): float(v) for k, v in column.items()} for model, column in values.items()}


def means(found: dict[str, tuple[np.ndarray, Any]]) -> dict[str, float]:
    """The means of what a scoreboard judges; of text, over its tokens; with the harmonic score."""
    made = {
        name: float(np.nansum(x) / (groups[1].sum() if isinstance(groups, tuple) else max(1, (~np.isnan(x)).sum())))
        for name, (x, groups) in found.items()
    }
    rates = [made[r] for r in ("efficacy", "paraphrase", "neighbourhood") if r in made]
    return made | {"score": len(rates) / sum(1 / max(r, 1e-9) for r in rates)}


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}")
    for measure, x in found["edited"].items():
        print(f"  {measure:20s} {x:.3f} (before {found['before'].get(measure, float('nan')):.3f})", flush=True)


class Bench:
    def __init__(self, data: Path, moments: Path | None, facts: int, seconds: float) -> None:
        self.data, self.file, self.seconds = data, moments, seconds
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

    def held_out(self) -> list[str]:
        """The first 40 words of the last six texts, which no covariance was fitted on."""
        return [" ".join(text.split()[:40]) for text in self.texts()[-6:]]

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was measured under a name in an earlier call, or now; stops when the CPU seconds of this call are spent."""
        file = self.file.with_suffix(".results.json") if self.file else None
        results = json.loads(file.read_text()) if file and file.exists() else {}
        if name not in results:
            if time.process_time() > self.seconds:
                raise SystemExit(f"{self.seconds:.0f} CPU seconds are spent: call again to go on")
            made = make()
            results = (json.loads(file.read_text()) if file and file.exists() else {}) | {name: made}
            if file:
                file.write_text(json.dumps(results))
        return results[name]

    # ---- facts

    def _known(self) -> dict[str, dict[str, str]]:
        """Relation -> subject -> answer, of what the model says by itself in one token."""
        found: dict[str, dict[str, str]] = {}
        if self.file and (kept := self.file.with_suffix(".known.json")).exists():
            return dict(json.loads(kept.read_text()))
        for name, (prompt, *_) in RELATIONS.items():
            rows = json.loads((self.data / f"relations_lre/data/factual/{name}.json").read_text())["samples"][:600]
            pairs = [(prompt.format(r["subject"]), " " + r["object"]) for r in rows]
            short = [i for i, (_, a) in enumerate(pairs) if len(self.model.tokenizer(a)["input_ids"]) == 1]
            exact = measured(self.model, [pairs[i] for i in short]).exact
            found[name] = {rows[i]["subject"]: pairs[i][1] for i, e in zip(short, exact, strict=True) if e}
        print({k: len(v) for k, v in found.items()}, flush=True)
        if self.file:
            self.file.with_suffix(".known.json").write_text(json.dumps(found))
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

    def adequacy(self) -> None:
        """How many tokens are enough: of more and more text, how far two halves agree on u of the facts' keys, and with u of all of it."""
        name, k = str(LAYER), self.found("values", self.facts[:12], self.contexts, Search(steps=STEPS)).keys
        found: dict[int, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = self.file.with_suffix(".growing") if self.file else Path(folder) / "growing"
            for tokens in (2048, 4096, 8192, 16_384, 32_768, 49_152, 61_440):  # one fit, which goes on
                if (stage := file.with_suffix(f".growing{tokens}.pt")).exists():
                    found[tokens] = torch.load(stage)
                    continue
                c = KeyCovariance(layers=LAYER).fit(self.model, self.texts(), tokens=tokens, checkpoint=file)
                found[tokens] = {"tokens": int(c.counts_[name].sum())}
                for ridge in (0.0, 0.01, 0.1):
                    c.ridge, c._roots_ = ridge, {}
                    found[tokens][f"half {ridge}"] = c.agreement(name, k)
                    with contextlib.suppress(Refused):
                        found[tokens][f"u {ridge}"] = c.solve(name, k)
                torch.save(found[tokens], stage)
        last = found[61_440]["u 0.0"]
        for made in found.values():
            for ridge in (0.0, 0.01, 0.1):
                half, u = made[f"half {ridge}"], made.get(f"u {ridge}", torch.full_like(last, torch.nan))
                with_all = float(torch.cosine_similarity(u, last, dim=1).mean())
                print(
                    f"{made['tokens']:6,} tokens, ridge {ridge}: halves {half:.3f}, with u of all the text {with_all:.3f}",
                    flush=True,
                )
        half = found[61_440]["half 0.0"]
        bar("9 split-half cosine of u, no ridge", half, ">= .85", half >= 0.85, f"{found[61_440]['tokens']:,} tokens")

    # ---- bars 2, 3, 8, 17

    def found(
        self, name: str, facts: list[Fact], contexts: Any, search: Search, essence: Any = None, layer: int = LAYER
    ) -> Values:
        """The values of facts at a layer, kept beside the moments between calls."""
        parts: list[Values] = []
        for start in range(0, len(facts), 12):
            some = facts[start : start + 12]
            file = self.file.with_suffix(f".{name}{start}.pt") if self.file else None
            rows, _ = _prompts(self.model, some, contexts, 0)
            memory = memories(self.model, layer, rows)
            if file is not None and file.exists():
                parts.append(Values(memory, [], **torch.load(file), routed=torch.ones(0)))
                continue
            if time.process_time() > self.seconds:
                raise SystemExit(f"{self.seconds:.0f} CPU seconds are spent: call again to go on")
            begun = time.process_time()
            others = [about(self.model, f, i, t) for t in _essence(self.model, essence) for i, f in enumerate(some)]
            made = find_values(self.model, memory, rows, others, search)
            print(
                f"values of {len(some)} facts: {time.process_time() - begun:.0f} CPU s, {len(made.history) - 1} steps, "
                f"|delta| / |h| {float((made.delta.norm(dim=1) / made.h).mean()):.2f}", flush=True
            )  # fmt: skip
            parts.append(made)
            if file is not None:
                torch.save({k: getattr(made, k) for k in ("keys", "delta", "h", "history")}, file)
        last = torch.stack([part.history[-1, i] for part in parts for i in range(len(part.h))])
        return Values(
            [m for part in parts for m in part.memory], [], torch.cat([x.keys for x in parts]), torch.cat([x.delta for x in parts]),
            torch.cat([x.h for x in parts]), last[None], torch.ones(0),
        )  # fmt: skip

    def edited(self) -> Any:
        if not hasattr(self, "_edited"):
            values = self.found("values", self.facts, self.contexts, Search(steps=STEPS))
            self._edited = edit(
                self.model, self.facts, "emmet", covariance=self.covariance(), layers=LAYER, contexts=self.contexts, values=values
            )  # fmt: skip
        return self._edited

    def twenty(self) -> list[Fact]:
        return [*self.facts[:7], *self.facts[7:14], *self.facts[16:22]][:20]  # 7 capitals, 7 languages, 6 landmarks

    def rome(self) -> None:
        before = {n: p.clone() for n, p in self.model.module.named_parameters() if f"layers.{LAYER}." in n}
        edited, texts = self.edited(), self.held_out()[:3]  # twenty edits are judged on them
        whole = self.kept("rome seen", lambda: self._seen(before))
        bar("2 W' k* = v*, relative error", whole[0], "<= 1e-4", whole[0] <= 1e-4)
        bar("3 undo is bit for bit", whole[1], "1", bool(whole[1]))
        facts = self.twenty()

        def one(f: Fact) -> dict[str, dict[str, float]]:
            alone = edit(
                self.model, f, values=edited.values.one(self.facts.index(f)), **{**edited.settings, "how": "rome"}
            )
            return table(scoreboard(alone, texts, controls=("without C", "random keys"), max_new_tokens=0))

        found = [self.kept(f"rome {f.asked}", lambda f=f: one(f)) for f in facts]

        def mean(measure: str, model: str) -> float:
            return float(np.nanmean([t[model].get(measure, np.nan) for t in found]))

        rates = "efficacy", "paraphrase", "neighbourhood"
        score = {
            m: 3 / sum(1 / max(mean(r, m), 1e-9) for r in rates)
            for m in ("before", "edited", "without C", "random keys")
        }
        print(
            f"\nROME, {len(facts)} facts, each alone, layer {LAYER}: score { ({k: round(v, 3) for k, v in score.items()}) }"
        )
        for measure in found[0]["edited"]:
            if measure != "score":
                low, high = interval(
                    np.array([t["edited"].get(measure, np.nan) for t in found]),
                    0,
                    within=(0, 1 if measure in rates else np.inf),
                )
                shown = [
                    f"{model} {mean(measure, model):.3f}" for model in ("before", "edited", "without C", "random keys")
                ]
                print(f"  {measure:20s} {', '.join(shown)}; edited [{low:.2f}, {high:.2f}]", flush=True)
        bar("8 ROME score", score["edited"], ">= .92", score["edited"] >= 0.92, f"{score['without C']:.3f} without C")
        for measure, least in (("efficacy", 1.0), ("neighbourhood", 0.83)):
            x = mean(measure, "edited")
            bar(f"8 ROME {measure}", x, f">= {least}", x >= least - 1e-9, f"{mean(measure, 'without C'):.3f} without C")
        lost = mean("neighbourhood", "edited") - mean("neighbourhood", "without C")
        bar("8 neighbourhood lost without C", lost, ">= .20", lost >= 0.2)
        kl = mean("text KL", "edited")
        bar("8 text KL", kl, "<= .005", kl <= 0.005, f"{mean('text KL', 'without C'):.4f} without C")

    def _seen(self, before: dict[str, torch.Tensor]) -> tuple[float, float]:
        one = edit(
            self.model, self.facts[0], values=self.edited().values.one(0), **{**self.edited().settings, "how": "rome"}
        )
        memory = one.values.memory[0]
        moved = (memory.weight(one.model) - memory.weight(self.model)) @ one.values.keys[0]
        error = float((moved - one.values.delta[0]).norm() / one.values.delta[0].norm())
        bits = all(torch.equal(p, before[n]) for n, p in self.model.module.named_parameters() if n in before)
        return error, float(bits and one.undo() is self.model)

    def values(self) -> None:
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

    def validation(self) -> list[Fact]:
        """12 facts whose subjects are not edited in any test."""
        prompts = {f.asked for f in self.facts} | {p for f in self.facts for p, _ in f.neighbours}
        draw, facts = random.Random(5), list[Fact]()
        for name, n in (("country_capital_city", 3), ("country_language", 4), ("landmark_in_country", 6)):
            here, (prompt, *others) = self.known[name], RELATIONS[name]
            free = [s for s in sorted(here) if prompt.format(s) not in prompts]
            free += [s for s in sorted(here) if s not in free and not any(f.subject == s for f in self.facts)]
            for s in free[:n] if name != "landmark_in_country" else draw.sample(free, n):
                new = draw.choice([a for a in sorted(set(here.values())) if a != here[s]])
                near = [(prompt.format(o), here[o]) for o in draw.sample([o for o in sorted(here) if o != s], 2)]
                facts.append(Fact(prompt, s, new, here[s], [p.format(s) for p in others], near))
        return facts[:12]

    def null_space(self) -> None:
        """AlphaEdit's share of directions, and of the way, on the facts for validation, in one batch at LAYER."""
        facts = self.validation()
        values = self.found("validation", facts, self.contexts, Search(steps=STEPS))
        memory, before = values.memory[0], None
        for free in (0.6, 0.7, 0.8):
            for share in (0.75, 0.9, 0.97):

                def one(free: float = free, share: float = share) -> dict[str, float]:
                    nonlocal before
                    before = before or _judged(self.model, facts)
                    solver = _Solver("alphaedit", self.covariance(), share, None, free, 1)
                    left, right, _ = solver(memory.name, values.keys, values.delta, None)
                    with self.moved(memory, left @ right):
                        return means(_judged(self.model, facts, before[1])[0])

                found = self.kept(f"null space {free} {share}", one)
                print(
                    f"validation, null space {free}, share {share}: "
                    + ", ".join(f"{k} {v:.3f}" for k, v in found.items()),
                    flush=True,
                )

    def share(self) -> float:
        """The share of the way that MEMIT moves values, chosen on the facts for validation."""
        facts = self.validation()
        found = {}
        for share in (0.8, 0.9, 0.95, 0.98):

            def one(share: float = share) -> dict[str, float]:
                values = self.found("validation", facts, self.contexts, Search(steps=STEPS))
                made = edit(
                    self.model, facts, "memit", covariance=self.covariance(), layers=LAYERS, contexts=self.contexts, values=values, share=share
                )  # fmt: skip
                return means(_judged(made.model, facts)[0])

            found[share] = self.kept(f"validation {share}", one)
            print(
                f"validation, share {share}: "
                + ", ".join(f"{k} {v:.3f}" for k, v in found[share].items() if "KL" not in k),
                flush=True,
            )
        return max(found, key=lambda s: (round(found[s]["score"], 3), -s))

    def doubled(self) -> list[Fact]:
        """Those facts for validation, and the other relation of their countries: two facts of one subject, as three test subjects have."""
        facts, there = self.validation(), {f.asked for f in self.facts}
        draw, capital, language = random.Random(6), self.known["country_capital_city"], self.known["country_language"]
        prompt, *others = RELATIONS["country_language"]
        for s in sorted(set(capital) & set(language)):
            if prompt.format(s) not in there | {f.asked for f in facts}:
                new = draw.choice([a for a in sorted(set(language.values())) if a != language[s]])
                near = [
                    (prompt.format(o), language[o]) for o in draw.sample([o for o in sorted(language) if o != s], 2)
                ]
                facts.append(Fact(prompt, s, new, language[s], [p.format(s) for p in others], near))
        return facts

    def layers(self) -> None:
        """MEMIT's layers and contexts, chosen on `doubled`: of those that keep .8 of neighbours and move text by .02 at most, most paraphrases."""
        facts, texts = self.doubled(), self.held_out()
        print(len(facts), "facts for validation:", [f.asked for f in facts])
        five = written_contexts(self.model, 5, seed=0)
        before: Any = None
        for contexts in (self.contexts, five):
            name = f"doubled{len(contexts)}-"
            values = self.found(name, facts, contexts, Search(steps=STEPS))
            for layers in ((3, 4, 5, 6), (4, 5, 6), (5, 6), (6,)):

                def one(contexts: Any = contexts, layers: Any = layers, values: Values = values) -> dict[str, float]:
                    nonlocal before
                    before = before or _judged(self.model, facts, texts=texts, tokens=2048)
                    made = edit(
                        self.model, facts, "memit", covariance=self.covariance(), layers=layers, contexts=contexts, values=values
                    )  # fmt: skip
                    return means(_judged(made.model, facts, before[1], before[2], texts, 2048)[0])

                found = self.kept(f"layers {name}{layers}", one)
                print(
                    f"{len(contexts)} contexts, layers {layers}: "
                    + ", ".join(f"{k} {v:.3f}" for k, v in found.items()),
                    flush=True,
                )

    def memit(self) -> None:
        print(f"share chosen on other facts: {self.share()}")
        values = self.edited().values
        options: dict[str, Any] = {"layers": LAYERS, "contexts": self.contexts, "values": values}
        for title, how, more in (
            ("MEMIT, penalty chosen on the model", "memit", {}),
            ("MEMIT, share .98", "memit", {"share": 0.98}),
            ("MEMIT without C", "memit", {"covariance": "off"}),
            ("MEMIT, the papers' 15,000", "memit", {"penalty": 15_000.0}),
            ("AlphaEdit", "alphaedit", {}),
            ("AlphaEdit, 60 % of directions (chosen on other facts)", "alphaedit", {"null_space": 0.6}),
            ("MEMIT at layers 5 and 6 (best with two contexts on other facts)", "memit", {"layers": (5, 6)}),
            (
                "MEMIT, five contexts (chosen on other facts)",
                "memit",
                {"contexts": 5},
            ),
        ):

            def one(how: Any = how, more: dict[str, Any] = more) -> dict[str, Any]:
                if more.get("contexts"):
                    five = written_contexts(self.model, 5, seed=0)
                    more = more | {
                        "contexts": five,
                        "values": self.found("five", self.facts, five, Search(steps=STEPS)),
                    }
                made = edit(self.model, self.facts, how, **{"covariance": self.covariance(), **options, **more})
                before, after, broken = self.beside(made)
                return {
                    "before": before,
                    "edited": after,
                    "broken": broken,
                    "penalty": made.result.data.attrs["penalty"],
                }

            found = self.kept(f"memit {title}", one)
            show(f"{title}, {len(self.facts)} facts, penalties {found['penalty']}", found)
            if title.startswith(("MEMIT, penalty", "MEMIT at", "MEMIT, five")):
                at = found["edited"]
                for measure, least in (("efficacy", 0.95), ("paraphrase", 0.9), ("neighbourhood kept", 0.8)):
                    bar(f"10 {title}: {measure}", at[measure], f">= {least}", at[measure] >= least)
                bar("10 text KL", at["text KL"], "<= .02", at["text KL"] <= 0.02)
                bar("10 neighbours' KL", at["neighbourhood KL"], "<= .25", at["neighbourhood KL"] <= 0.25)
                print("broken:", found["broken"])

    def beside(self, made: Any) -> tuple[dict[str, float], dict[str, float], list[str]]:
        """The scoreboard's measures before and after an edit of all facts; what was before is measured once."""
        texts = self.held_out()
        if not hasattr(self, "_before"):
            self._before = _judged(self.model, self.facts, texts=texts, tokens=2048)
        values, plain, text, _ = self._before
        after, _, _, broken = _judged(made.model, self.facts, plain, text, texts, 2048)
        return (*(means(v) for v in (values, after)), broken)

    # ---- what lowers the damage to the same subject

    def landmarks(self, n: int) -> list[Fact]:
        """Landmarks whose continent the model says as well, each given another country of that continent."""
        here, draw = self.known["landmark_in_country"], random.Random(4)
        places = [s for s in sorted(here) if here[s] in CONTINENT]

        def said() -> list[list[float]]:
            return [
                measured(self.model, [(t.format(s), CONTINENT[here[s]]) for s in places]).exact.tolist() for t in ON
            ]

        exact = dict(zip(places, zip(*self.kept("continents", said), strict=True), strict=True))
        chosen = draw.sample([s for s in places if any(exact[s])], n)
        prompt, *others = RELATIONS["landmark_in_country"]
        answers = sorted(set(here.values()) & set(CONTINENT))
        made = []
        for s in chosen:
            same = [(t.format(s), CONTINENT[here[s]]) for t, e in zip(ON, exact[s], strict=True) if e]
            new = draw.choice([a for a in answers if CONTINENT[a] == CONTINENT[here[s]] and a != here[s]])
            near = draw.choice([o for o in sorted(here) if o not in chosen])
            made.append(Fact(prompt, s, new, here[s], [others[0].format(s)], [(prompt.format(near), here[near])], same))
        return made

    def countries(self, n: int) -> list[Fact]:
        """Countries whose capital and language the model says: the capital is edited, the language judged."""
        capital, language = self.known["country_capital_city"], self.known["country_language"]
        prompt, *others = RELATIONS["country_capital_city"]
        draw, made = random.Random(2), []
        for s in sorted(set(capital) & set(language))[:n]:
            new = draw.choice([w for w in sorted(set(capital.values())) if w != capital[s]])
            beside = [(prompt.format(o), a) for o, a in sorted(capital.items()) if o != s][:3]
            same = [(t.format(s), language[s]) for t in RELATIONS["country_language"][:2]]
            made.append(Fact(prompt, s, new, capital[s], [p.format(s) for p in others], beside, same))
        return made

    def spare(self) -> None:
        """Facts of subjects of which another relation is known: it is judged, and never given as it is judged."""
        general, unedited = "It is said that {} is a", dict[Any, Any]()
        for kind, facts, other, near in (
            ("countries", self.countries(8), ("People in {} are", "The culture of {} is", "The name of the king of {} was"),
             ("In {} the language that is spoken is", "Everyone who lives in {} speaks")),
            ("landmarks", self.landmarks(8), ("People who visit {} say that", "The history of {} is", "A picture of {} shows"),
             ("The continent on which {} lies is", "We know that {} lies in")),
        ):  # fmt: skip
            strong = Search(steps=STEPS, kl=1.0)
            for name, title, essence, more in (
                ("", "as it is", None, {}),
                ("-other", "three other essence prompts, weight 1", (*other, general), {"search": strong}),
                ("-near", "essence of the relation itself, weight 1", (*near, general), {"search": strong}),
                ("", "keys of the subject elsewhere held", None, {"hold": (*other, *near)}),
                ("-near", "essence of the relation, and its keys held", (*near, general), {"search": strong, "hold": near}),
            ):  # fmt: skip

                def one(
                    facts: Any = facts, name: str = f"spare-{kind}{name}", essence: Any = essence, more: Any = more
                ) -> dict[str, Any]:
                    values = self.found(name, facts, (), more.get("search", Search(steps=STEPS)), essence)
                    rows = [about(self.model, f, i, t) for t in more.get("hold", ()) for i, f in enumerate(facts)]
                    held = keys(self.model, values.memory, rows)[0] if rows else values.keys[:0]
                    solver, parts = _Solver("emmet", self.covariance(), None, None, 0.8, 1), []
                    for i, f in enumerate(facts):
                        memory, mine = values.memory[i], [j for j, row in enumerate(rows) if row.fact == i]
                        if f.asked not in unedited:
                            unedited[f.asked] = _judged(self.model, [f])
                        before = unedited[f.asked]
                        left, right, _ = solver(
                            memory.name, values.keys[i : i + 1], values.delta[i : i + 1], held[mine] if mine else None
                        )
                        with self.moved(memory, left @ right):
                            after = _judged(self.model, [f], before[1])
                        parts.append((means(before[0]), means(after[0])))
                    return {
                        name: {m: float(np.nanmean([p[j][m] for p in parts if m in p[j]])) for m in parts[0][j]}
                        for j, name in enumerate(("before", "edited"))
                    }

                show(f"spare, {len(facts)} {kind}, each edited alone: {title}", self.kept(f"spare {kind} {title}", one))

    # ---- curves, and the published forms on the same values

    def many(self) -> list[Fact]:
        """7 capitals, 13 languages, and 80 landmarks whose new country is on the same continent."""
        wanted = {"country_capital_city": 7, "country_language": 13}
        facts = [replace(f, paraphrases=f.paraphrases[:1]) for f in self._facts(wanted, neighbours=1)]
        facts = [*facts, *self.landmarks(80)]
        random.Random(3).shuffle(facts)
        return facts[:100]

    def published(self, how: str, k: torch.Tensor, r: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The papers' closed forms with their constants, written naively: keys k [n, m], moves r [d, m], earlier keys [n, p]."""
        n = len(k)
        if how == "ROME without C":  # EasyEdit's default, one fact after another
            total = torch.zeros(len(r), n, dtype=torch.float64)
            for key, move in zip(k.T, r.T, strict=True):
                total += torch.outer(move - total @ key, key) / (key @ key)
            return total
        c = self.covariance().matrix(str(LAYER))
        if how == "MEMIT 15,000":
            return r @ k.T @ torch.linalg.inv(15_000 * c + k @ k.T)
        if not hasattr(self, "_free"):
            values, vectors = torch.linalg.eigh(c)
            self._free = vectors[:, values < 2e-2] @ vectors[:, values < 2e-2].T
            print(f"eigenvalues below 2e-2: {float((values < 2e-2).double().mean()):.0%}")
        p = self._free
        return torch.linalg.solve(p @ (k @ k.T + old @ old.T) + 10 * torch.eye(n, dtype=torch.float64), p @ k @ r.T).T

    @contextlib.contextmanager
    def moved(self, memory: Any, by: torch.Tensor) -> Iterator[None]:
        """The model with a matrix moved in place, which opens no model again, and as it was afterwards."""
        weight = self.model.module.get_parameter(memory.parameter)
        with torch.no_grad():
            kept = weight.clone()
            weight += by.to(weight)
            try:
                yield
            finally:
                weight.copy_(kept)

    def judged(self, facts: list[Fact]) -> list[float]:
        """What is said of the new answers, the paraphrases, the neighbours (not edited) and the same subjects, and text KL."""
        facts = facts[:: -(-len(facts) // 34)]  # at most 34 of them, for what it costs
        kinds = [
            [(f.asked, f.new) for f in facts], [(p, f.new) for f in facts for p in f.paraphrases],
            [p for f in facts for p in f.neighbours], [p for f in facts for p in f.same_subject],
        ]  # fmt: skip
        exact = np.split(
            measured(self.model, [p for k in kinds for p in k]).exact, np.cumsum([len(k) for k in kinds])[:-1]
        )
        kl = divergence(self._plain, measured(self.model, self._ordinary, keep=True)).mean()
        return [float(x) for x in (*(e.mean() if len(e) else np.nan for e in exact), kl)]

    def curve(self, title: str, facts: list[Fact], memory: Any, make: Callable[[], torch.Tensor]) -> None:
        if not hasattr(self, "_ordinary"):
            self._ordinary = [(" ".join(t.split()[:25]), None) for t in self.texts()[-8:]]
            self._plain = measured(self.model, self._ordinary, keep=True)

        def one() -> list[float]:
            with self.moved(memory, make()):
                return self.judged(facts)

        said, paraphrase, near, same, kl = self.kept(f"{title} {len(facts)}", one)
        print(
            f"{len(facts):4d} {title:52s} said {said:.2f}, paraphrase {paraphrase:.2f}, neighbours kept {near:.2f}, "
            f"same subject kept {same:.2f}, text KL {kl:.3f}", flush=True
        )  # fmt: skip

    def batch(self) -> None:
        """The first 10, 30 and 100 of the facts in one batch at LAYER, on the same values."""
        facts = self.many()
        values = self.found("many", facts, (), Search(steps=12))
        memory = values.memory[0]
        for count in (100, 30, 10):
            some, k, r = facts[:count], values.keys[:count], values.delta[:count]
            less = [("memit", 0.75), ("memit", 0.6), ("alphaedit", 0.75), ("alphaedit", 0.6)] if count == 100 else []
            for how, share in (("emmet", None), ("memit", None), ("alphaedit", None), *less):

                def ours(how: Any = how, share: Any = share, k: torch.Tensor = k, r: torch.Tensor = r) -> torch.Tensor:
                    solver = _Solver(how, self.covariance(), share, None, 0.8, 1)
                    left, right, _ = solver(memory.name, k, r, None)
                    return left @ right

                self.curve(f"batch: {how}{f', share {share}' if share else ''}", some, memory, ours)
            for how in ("ROME without C", "MEMIT 15,000", "AlphaEdit, 2e-2 and 10"):
                self.curve(f"batch: {how} (published form)", some, memory,
                           lambda h=how, k=k, r=r: self.published(h, k.T, r.T, k.T[:, :0]))  # fmt: skip

    def sequence(self, n: int = 50) -> None:
        """One after another at LAYER, the values those of the unedited model, with the keys of earlier edits held and not."""
        facts = self.many()[:n]
        values = self.found("many", self.many()[:60], (), Search(steps=12))  # whole portions of 12
        memory = values.memory[0]
        for how, held in (("memit", True), ("memit", False), ("alphaedit", True), ("rome", False)):
            solver = _Solver(how, self.covariance(), None, None, 0.8, 1)

            def ours(k: torch.Tensor, r: torch.Tensor, old: torch.Tensor, solver: Any = solver) -> torch.Tensor:
                left, right, _ = solver(memory.name, k, r, old if len(old) else None)
                return left @ right

            self._one_by_one(f"{how}, earlier keys {'held' if held else 'not held'}", facts, values, ours, held)
        for how in ("ROME without C", "AlphaEdit, 2e-2 and 10"):
            self._one_by_one(
                f"{how} (published form)",
                facts,
                values,
                lambda k, r, old, h=how: self.published(h, k.T, r.T, old.T),
                True,
            )

    def _one_by_one(self, title: str, facts: list[Fact], values: Values, form: Any, held: bool) -> None:
        memory = values.memory[0]
        moved, old = torch.zeros(len(values.delta[0]), memory.width, dtype=torch.float64), values.keys[:0]
        made: dict[int, torch.Tensor] = {}
        for i in range(len(facts)):
            k = values.keys[i : i + 1]
            left = values.delta[i] - moved @ k[0]  # what the edits before have moved counts
            moved = moved + form(k, left[None], old)
            old = torch.cat([old, k]) if held else old
            if i + 1 in (10, len(facts)):
                made[i + 1] = moved
        for count in reversed(made):
            self.curve(f"sequence: {title}", facts[:count], memory, lambda m=made[count]: m)

    # ---- where

    def every(self) -> KeyCovariance:
        """The moments of all layers, which are read from, or kept in, their own file."""
        if not hasattr(self, "_every"):
            file = self.file.with_suffix(".every.safetensors") if self.file else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                c = KeyCovariance(layers=tuple(range(30)))
                self._every = c.fit(self.model, self.texts(), tokens=TOKENS, checkpoint=file)
        return self._every

    def where(self) -> None:
        """Tracing says here, editing works here: all layers, six facts (two of each relation), each layer's own C."""
        facts = [
            replace(f, neighbours=f.neighbours[:2], same_subject=()) for i in (0, 7, 16) for f in self.facts[i : i + 2]
        ]
        options: dict[str, Any] = {"covariance": self.every(), "contexts": (), "search": Search(steps=10)}
        columns: dict[int, dict[str, float]] = {}
        for start in range(0, 30, 3):

            def some(start: int = start) -> dict[str, dict[str, float]]:
                found = editing_by_layer(self.model, facts, layers=range(start, start + 3), **options).data
                return {str(int(i)): {str(k): float(v) for k, v in found.sel(layer=i).items()} for i in found.layer}

            for layer, row in self.kept(f"where {start}", some).items():
                columns[int(layer)] = row
                print(layer, {k: round(v, 2) for k, v in row.items()}, flush=True)
        new, traced = (np.array([row[k] for row in columns.values()]) for k in ("new", "traced"))
        near = np.array([row["neighbourhood"] for row in columns.values()])
        print(
            f"tracing says layer {int(traced.argmax())}, editing works best at {int(new.argmax())}; rank agreement over {len(new)} layers "
            f"{spearman(new, traced):.2f}, of neighbours {spearman(near, traced):.2f}", flush=True
        )  # fmt: skip

    def wrong(self) -> None:
        """The twenty facts of `rome`, each alone, at the layer that `scoreboard` calls wrong, with its own C and without."""
        (layer,) = wrong_layer(self.model, [LAYER])
        facts, texts = self.twenty(), self.held_out()[:3]
        found: dict[str, list[dict[str, float]]] = {"C": [], "off": []}
        values = self.found("wrong", facts, self.contexts, Search(steps=STEPS), layer=layer)
        for i, f in enumerate(facts):

            def one(f: Fact = f, i: int = i) -> dict[str, dict[str, float]]:
                _, plain, text, _ = _judged(self.model, [f], texts=texts, tokens=2048)
                made = {}
                for name, c in (("C", self.every()), ("off", "off")):
                    left, right, _ = _Solver("rome", c, None, None, 0.8, 1)(
                        values.memory[0].name, values.keys[i : i + 1], values.delta[i : i + 1], None
                    )
                    with self.moved(values.memory[0], left @ right):
                        made[name] = means(_judged(self.model, [f], plain, text, texts, 2048)[0])
                return made

            for name, row in self.kept(f"wrong {f.asked}", one).items():
                found[name].append(row)
        for name, rows in found.items():
            mean = {k: float(np.nanmean([row.get(k, np.nan) for row in rows])) for k in rows[0]}
            mean["score"] = 3 / sum(1 / max(mean[k], 1e-9) for k in ("efficacy", "paraphrase", "neighbourhood"))
            print(
                f"layer {layer}, {len(rows)} facts, C {name}: { ({k: round(v, 3) for k, v in mean.items()}) }",
                flush=True,
            )

    # ---- the first token of a text

    def opening(self) -> None:
        """Has a subject a key of its own where it opens the text? And does an edit reach it there?"""
        subjects = sorted(self.known["country_capital_city"])
        prompt, _, other = RELATIONS["country_capital_city"]
        edited = {
            f.subject: k
            for f, k in zip(
                self.facts[:7],
                self.found("values", self.facts[:12], self.contexts, Search(steps=STEPS)).keys[:7],
                strict=True,
            )
        }
        for title, template in (
            ("first token", other.removeprefix("We know that ")),
            ("behind words", other),
            ("its prompt", prompt),
        ):
            rows = [subject_row(self.model, Fact(template, s, " x"), i) for i, s in enumerate(subjects)]
            rows = [replace(r, fact=i) for i, r in enumerate(r for r in rows if title != "first token" or r.at == 0)]
            k, _ = keys(self.model, memories(self.model, LAYER, rows), rows)
            unit = torch.nn.functional.normalize(k, dim=1)
            alike = float((unit @ unit.T).sum() - len(k)) / (len(k) * (len(k) - 1))
            print(f"{title}: cosine of keys between {len(k)} subjects {alike:.2f}", flush=True)
        for title, template in (("first token", other.removeprefix("We know that ")), ("behind words", other)):
            reached, kept = [], []
            for s, own in edited.items():
                row = subject_row(self.model, Fact(template, s, " x"), 0)
                if title == "first token" and row.at:
                    continue
                k, _ = keys(self.model, memories(self.model, LAYER, [row]), [row])
                u = self.covariance().solve(str(LAYER), own[None])[0]
                reached.append(float(u @ k[0] / (u @ own)))
                kept.append(
                    measured(self.model, [(template.format(s), self.known["country_capital_city"][s])]).exact[0]
                )
            print(
                f"{title}: an edit comes with {np.mean(reached):.2f} of its strength; the model itself knows {np.mean(kept):.2f} of the answers",
                flush=True,
            )

    # ---- README's ten lines, with nothing skipped

    def readme(self) -> None:
        text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
        block = (
            text.partition("From a wrong answer to an edited model and back")[2].split("```")[1].removeprefix("python")
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            texts = self.texts()
            Path("texts.txt").write_text("\n".join(t.replace("\n", " ") for t in texts[:100]), encoding="utf-8")
            Path("held_out.txt").write_text("\n".join(t[:400] for t in texts[-4:]), encoding="utf-8")
            names: dict[str, Any] = {"model": self.model}
            for example in doctest.DocTestParser().get_examples(block):
                print(">>>", example.source.split("   #")[0].strip(), flush=True)
                for statement in example.source.split("#")[0].split("; "):
                    try:
                        shown = eval(statement.strip(), names)
                    except SyntaxError:
                        exec(statement.strip(), names)
                        continue
                    print(
                        shown.data["value"].to_pandas().round(2).dropna(how="all")
                        if hasattr(shown, "provenance") and "value" in shown.data
                        else shown,
                        flush=True,
                    )
            assert names["edited"].undo() is self.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("part", nargs="*", default=list(PARTS))
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="CPU seconds, after which a call stops.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.data, given.moments, given.facts, given.seconds)
    with pl.quiet():
        for part in given.part:
            getattr(bench, part)()


if __name__ == "__main__":
    main()
