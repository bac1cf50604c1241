"""Workers without processes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pellucid.workers import Pool
from pellucid.workers.lanes import Died, Reply
from pellucid.workers.worker import Worker

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


class InProcess:
    """A worker without a process, which can be told to die, or to answer something else."""

    def __init__(self) -> None:
        self.at, self.worker, self.asked, self.dying = "", Worker(), [], 0
        self.says: dict[str, Any] = {}

    def ask(self, request: dict[str, Any], folder: Path) -> Reply:
        self.asked.append(request)
        if request["do"] == "run" and self.dying:
            self.dying -= 1
            self.stop()
            raise Died("Killed")
        about, tensors = self.worker.answer({**request, "folder": str(folder)})
        return {**about, **self.says}, tensors

    def stop(self) -> None:
        self.at, self.worker = "", Worker()


def pool(n: int = 2) -> Pool:
    return Pool([InProcess() for _ in range(n)], [None] * n, 1)
