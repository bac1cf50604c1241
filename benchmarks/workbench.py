"""How soon does the workbench answer? Typing, sliding, a long prompt, and typing while a job runs, on SmolLM2-135M.

    python -m benchmarks.workbench [--data TEXT]

Times are of the server, from the request as bytes to the reply as bytes, beside a plain forward pass of the same prompt
in the same process just before, on one thread. `--data` is a text file for the long prompt; without one, words are repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

import pellucid as pl

sys.path.insert(0, str(Path(__file__).parents[1]))
from pellucid.workbench.app import create
from pellucid.workbench.guard import Door
from pellucid.workbench.hub import Hub
from scripts.demo_model import smollm2

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
WORDS = "The committee of the city said that the river near the old bridge had risen again during the night and "


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = work()
    return 1e3 * (time.perf_counter() - start), made


class Bench:
    """A workbench with one model, asked as its page asks."""

    def __init__(self, model: pl.Model, folder: Path) -> None:
        self.model, self.hub = model, Hub([model])
        app = create(self.hub, Door("t", 80), folder)
        self.page = TestClient(app, base_url="http://localhost", headers={"X-Pellucid-Token": "t"})

    def plain(self, prompt: str) -> float:
        inputs = self.model.inputs(prompt)
        with torch.no_grad():
            return min(timed(lambda: self.model.module(**inputs.tensors))[0] for _ in range(2))

    def live(self, prompt: str, **more: Any) -> tuple[float, Any]:
        body = {"tab": "t", "pane": "a", "model": "0", "prompt": prompt, **more}
        return timed(lambda: self.page.post("/api/live", json=body))

    def view(self, name: str, prompt: str, **more: Any) -> tuple[float, Any]:
        body = {"tab": "t", "pane": "a", "model": "0", "view": name, "prompt": prompt, **more}
        return timed(lambda: self.page.post("/api/view", json=body))


def typing(bench: Bench) -> None:
    bench.live("When"), bench.plain(TEXT)
    words, beyond = TEXT.split(), []
    for n in range(2, len(words) + 1):
        prompt = " ".join(words[:n])
        forward = bench.plain(prompt)
        whole, found = bench.live(prompt)
        own = found.json()["milliseconds"]["forward"]
        beyond.append(whole - own)
        print(
            f"  {n:2} words: plain pass {forward:4.0f} ms, its own pass {own:4.0f} ms, answered after {whole:4.0f} ms, {len(found.content) / 1e3:.0f} kB"
        )
    print(f"  beyond its pass: median {statistics.median(beyond):.0f} ms, at most {max(beyond):.0f} ms")


def sliding(bench: Bench) -> None:
    edit = {"component": "layers.20.resid_post", "kind": "steer"}
    bench.live(TEXT, other=OTHER, edits=[edit])
    times = [bench.live(TEXT, other=OTHER, edits=[{**edit, "strength": k / 2}])[0] for k in range(1, 9)]
    print(
        f"  plain pass {bench.plain(TEXT):.0f} ms; a step of the slider median {statistics.median(times):.0f} ms, without the grid",
        end=" ",
    )
    times = [bench.live(TEXT, other=OTHER, lens=False, edits=[{**edit, "strength": k / 3}])[0] for k in range(1, 9)]
    print(f"{statistics.median(times):.0f} ms")


def long(bench: Bench, text: str) -> None:
    ids = bench.model.tokenizer(text)["input_ids"][:512]
    prompt = bench.model.tokenizer.decode(ids)
    forward = bench.plain(prompt)
    whole, found = bench.live(prompt)
    asked = 1
    first = len(found.json()["lens"]["data"]["positions"])
    rest = []
    while found.json()["more"]:
        more, found = bench.live(prompt)
        rest.append(more)
        asked += 1
    columns, size = len(found.json()["lens"]["data"]["positions"]), len(found.content)
    print(f"  {len(found.json()['tokens'])} tokens: plain pass {forward:.0f} ms; first answer {whole:.0f} ms with {first} columns, "
          f"{columns} after {asked} requests of {statistics.median(rest or [0]):.0f} ms; {size / 1e3:.0f} kB")  # fmt: skip
    whole, found = bench.live(prompt + " the")
    print(f"  one word more: {whole:.0f} ms, of which its pass {found.json()['milliseconds']['forward']:.0f} ms")
    for name, options in (("attention", {}), ("contributions", {}), ("heads", {}), ("neurons", {}), ("neuron", {"component": "layers.20.mlp.neurons.7"}), ("tokens", {})):  # fmt: skip
        whole, found = bench.view(name, prompt, options=options)
        print(
            f"  {name}: {whole / 1e3:.1f} s, {len(found.content) / 1e6:.2f} MB{'' if found.status_code == 200 else ' ' + found.text}"
        )


def beside_a_job(bench: Bench) -> None:
    alone = statistics.median(bench.live(f"{TEXT} {w}", tab="alone")[0] for w in ("a", "the", "an", "her", "his"))
    id = bench.page.post(
        "/api/jobs", json={"tab": "t", "model": "0", "kind": "patching", "prompt": TEXT, "other": OTHER}
    ).json()["id"]
    times, waits = [], []
    while (job := bench.page.get(f"/api/jobs/{id}").json())["state"] in ("queued", "running"):
        whole, found = bench.live(f"{TEXT} {len(times)}", tab="typing")
        times.append(whole)
        waits.append(found.json()["milliseconds"]["queue"])
    print(f"  alone {alone:.0f} ms; while {job['total']} patches ran in {job['seconds']:.1f} s: {len(times)} answers, median "
          f"{statistics.median(times):.0f} ms, waiting for the job median {statistics.median(waits):.0f}, at most {max(waits):.0f} ms")  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path)
    data = arguments.parse_args().data
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pl.load(smollm2()), Path(folder))
        print("typing, word by word")
        typing(bench)
        print("a slider, 14 tokens")
        sliding(bench)
        print("typing while a job runs")
        beside_a_job(bench)
        print("a long prompt")
        long(bench, WORDS * 40 if data is None else data.read_text(encoding="utf-8"))
        bench.hub.close()


if __name__ == "__main__":
    main()
