"""A workbench over two tiny models with random weights, for the browser: python -m tests.workbench.serve_tiny FOLDER

Prints its address and serves until its input ends, so that it never outlives the test that started it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pellucid
from pellucid.workbench.chat import Files, Telling
from pellucid.workbench.serving import serve
from tests.workbench.guards import TEMPLATE, files
from tests.zoo.build import build
from tests.zoo.tokenizer import tokenizer


def model(kind: str, seed: int) -> pellucid.Model:
    module = build(kind, seed=seed, max_position_embeddings=1024)
    return pellucid.load(module, tokenizer=tokenizer(module))


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main(folder: Path) -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    models = [model("llama", 0), model("bert", 1)]
    models[0].tokenizer.chat_template = TEMPLATE  # type: ignore[union-attr]
    told = Telling._say

    def slowly(self: Telling, step: int, ids: list[int]) -> None:
        time.sleep(0.05)  # a tiny model writes faster than a page is drawn
        told(self, step, ids)

    Telling._say = slowly  # type: ignore[method-assign]
    guards = Files(*files(models[0], folder / "guards"))
    serve(models, "127.0.0.1", 0, folder, [], False, lambda line: print(line, flush=True), guards)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
