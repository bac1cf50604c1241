"""One peer on one model, in the peer's own environment: runs its tasks, checks them, writes a line for each.

Values are checked against plain hooks on the same weights (kept in a file, found by the weights' digest).
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import argparse
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Records = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A piece of work as any peer does it, and what it is compared with."""

    work: Callable[[Any], Iterator[Any]]  # a peer -> pieces of the result
    plain: Callable[[], Any]  # what one unit of cost is
    unedited: Callable[[], Any] | None = None  # the same result without edits
    sweep: bool = False


class Bench:
    """The tasks of one model, the plain module and the reference values."""

    def __init__(self, shape: Any, layers: list[int], references: Path) -> None:
        from workloads import TOKENS

        self.shape, self.layers, self.references = shape, layers, references
        self.module = shape.model()
        self.clean, self.corrupted = shape.tokens(1, TOKENS, 1), shape.tokens(1, TOKENS, 2)

    @cached_property
    def digest(self) -> str:
        sha = hashlib.sha256()
        for parameter in self.module.parameters():
            sha.update(parameter.detach().numpy().tobytes())
        return sha.hexdigest()[:16]

    def task(self, name: str) -> Task:
        import torch
        from workloads import KEPT_TOKENS, NEW_TOKENS, PROMPTS, STEERED_LAYER, TOKENS

        module, shape, layers = self.module, self.shape, self.layers
        if name == "patch":
            return Task(
                lambda peer: peer.patch(self.clean, self.corrupted, layers),
                lambda: module(self.corrupted),
                lambda: shape.metric(module(self.corrupted)),
                sweep=True,
            )
        if name == "ablate":
            prompts = shape.tokens(PROMPTS, TOKENS, 3)
            return Task(
                lambda peer: peer.ablate(prompts, layers),
                lambda: module(prompts),
                lambda: shape.metric(module(prompts)),
                sweep=True,
            )
        if name == "generate":
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            width = module.config.hidden_size
            vector = 0.5 * torch.randn(width, generator=torch.Generator().manual_seed(4))
            steer = (self.clean, STEERED_LAYER, vector)
            return Task(
                lambda peer: _once(lambda: peer.steer(*steer, **options)[-NEW_TOKENS:].float()),
                lambda: module.generate(self.clean, **options),
                lambda: module.generate(self.clean, **options)[0, -NEW_TOKENS:].float(),
            )
        ids = shape.tokens(1, KEPT_TOKENS, 5)
        method = {"keep": "keep", "plain": "forward"}[name]
        return Task(lambda peer: _once(lambda: getattr(peer, method)(ids)), lambda: module(ids))

    def reference(self, name: str) -> dict[str, Any]:
        """The values of plain hooks, from this machine's last run of them if there was one."""
        import torch
        from peers.hooks import Peer

        if not self.file(name).exists():
            here, self.layers = self.layers, sampled(self.shape.layers)
            task = self.task(name)
            self.remember(name, collect(task, task.work(Peer(self.module, None, self.shape)), self.layers))
            self.layers = here
        return torch.load(self.file(name))

    def remember(self, name: str, values: dict[str, Any]) -> None:
        import torch

        self.references.mkdir(parents=True, exist_ok=True)
        torch.save(values, self.file(name))

    def file(self, name: str) -> Path:
        return self.references / f"{self.shape.name}-{name}-{self.digest}.pt"

    def check(self, name: str, task: Task, values: dict[str, Any]) -> dict[str, Any]:
        """The largest error, and how far the edits moved the values, both relative to the largest value."""
        import torch

        expected = self.reference(name)
        both = {k: (values[k].flatten(), expected[k].flatten()) for k in expected.keys() & values.keys()}
        error = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in both.values()]).max())
        missing = sorted(expected.keys() - values.keys()) if name == "keep" else []
        checked: dict[str, Any] = {"error": error, "compared": sum(len(a) for a, _ in both.values())}
        if task.unedited is not None:
            plain, got = task.unedited().flatten(), torch.cat([a for a, _ in both.values()])
            checked["effect"] = float((got.view(-1, len(plain)) - plain).abs().max() / plain.abs().max())
        kinds = sorted({site.split(".", 2)[-1] for site in missing})
        return checked | {"missing": kinds}


def sampled(layers: int) -> list[int]:
    """All layers, or of a deep model six, evenly spaced, the first and the last included."""
    return [round(i * (layers - 1) / 5) for i in range(6)] if layers > 12 else list(range(layers))


def collect(task: Task, pieces: Any, layers: list[int]) -> dict[str, Any]:
    """Pieces of a result by name: a row for each layer of a sweep, the kept tensors, or the one tensor."""
    if task.sweep:
        import torch

        whole = torch.cat([piece.flatten() for piece in pieces])
        return {str(layer): row for layer, row in zip(layers, whole.chunk(len(layers)), strict=True)}
    (piece,) = pieces
    return piece if isinstance(piece, dict) else {"": piece}


def _once(work: Callable[[], Any]) -> Iterator[Any]:
    yield work()


def run(peer: str, shape_name: str, tasks: list[str], repetitions: int, references: Path) -> Records:
    import torch
    from measuring import measure
    from workloads import SHAPES, tokenizer

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _quiet()
    shape = SHAPES[shape_name]
    kind = importlib.import_module(f"peers.{peer}").Peer
    layers = list(range(shape.layers)) if kind.every_layer else sampled(shape.layers)
    bench = Bench(shape, layers, references)
    module = shape.model() if kind.in_place else bench.module
    theirs = kind(module, tokenizer(shape.vocabulary), shape)
    for name in tasks:
        record: dict[str, Any] = {"peer": peer, "shape": shape_name, "task": name}
        try:
            task = bench.task(name)
            effort = (repetitions, 20.0, 2) if task.sweep else (4 * repetitions, 8.0, 1)
            timing, pieces = measure(lambda task=task: task.work(theirs), task.plain, *effort)
            record |= asdict(timing)
            if task.sweep:  # the layers left out cost what the others do
                scale = shape.layers / len(layers)
                record |= {key: scale * record[key] for key in ("cost", "low", "high")}
                record |= {"layers": len(layers), "of_layers": shape.layers}
                record["runs"] = shape.layers * (shape.heads if name == "ablate" else bench.clean.shape[1])
            values = collect(task, pieces, layers)
            if peer == "hooks":
                bench.remember(name, values)
            record |= bench.check(name, task, values) | {"note": kind.note}
        except Exception as error:
            record["failed"] = _first_line(error)
        yield record


def start(peer: str) -> Records:
    """CPU seconds to import the peer once torch and transformers are there, and to wrap GPT-2 small."""
    from workloads import SHAPES, tokenizer

    _quiet()
    shape = SHAPES["gpt2"]
    module, words = shape.model(), tokenizer(shape.vocabulary)
    before = time.process_time()
    peer_module = importlib.import_module(f"peers.{peer}")
    imported = time.process_time()
    peer_module.Peer(module, words, shape)
    wrapped = time.process_time()
    times = {"import": imported - before, "wrap": wrapped - imported}
    yield {"peer": peer, "shape": "gpt2", "task": "start"} | times


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer")
    parser.add_argument("shape")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--reps", type=int, required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.tasks == ["start"]:
        records = start(given.peer)
    else:
        records = run(given.peer, given.shape, given.tasks, given.reps, given.references)
    with given.out.open("a") as out:
        for record in records:
            print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
