"""What a worker does: it opens a model, begins an errand, and does the pieces it is told to.

As a process of its own (`python -m pellucid.workers.worker`) it is asked on standard input and answers on standard output: a
line of JSON each, then as many bytes of safetensors as the line says. Nothing is pickled, and the asking program is not
imported anew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import process_time
from typing import Any

import torch
import transformers
from safetensors.torch import save
from torch import Tensor

from pellucid.anatomy.modes import running
from pellucid.engine.pausing import quiet
from pellucid.engine.sweep import Wrong
from pellucid.errors import PellucidError
from pellucid.model import Model
from pellucid.workers import job
from pellucid.workers.errand import Work, begin

Reply = tuple[dict[str, Any], dict[str, Tensor]]


class Worker:
    """Keeps the model it opened last, and the errand it is at."""

    def __init__(self) -> None:
        self._model: tuple[str, Model] | None = None
        self._work: tuple[str, Work] | None = None

    def answer(self, request: dict[str, Any]) -> Reply:
        """The answer to a request, with the CPU seconds it took; an error of ours is an answer too."""
        begun = process_time()
        try:
            with quiet():
                about, tensors = getattr(self, request["do"])(request)
            return {**about, "seconds": process_time() - begun}, tensors
        except Wrong as error:
            return {"wrong": str(error)}, {}
        except (PellucidError, MemoryError) as error:
            return {"error": str(error), "kind": type(error).__name__}, {}
        except RuntimeError as error:
            if not _of_memory(error):
                raise
            doing = {"open": "the model", "begin": "a run without edits", "run": "a piece of this work"}[request["do"]]
            where = f" on {request['device']}" if request.get("device") else ""
            return {
                "error": f"there is no memory{where} for {doing} ({str(error).splitlines()[0][:120]})",
                "kind": "PellucidError",
            }, {}

    def open(self, request: dict[str, Any]) -> Reply:
        """Open the model, if it is not the one that is open."""
        torch.set_num_threads(request["threads"])
        key = json.dumps([request["recipe"], request["device"]], sort_keys=True)
        if self._model is None or self._model[0] != key:
            self._model = self._work = None  # its memory first
            self._model = key, job.opened(request["recipe"], Path(request["folder"]), request["device"])
        return {"torch": torch.__version__, "transformers": transformers.__version__}, {}

    def begin(self, request: dict[str, Any]) -> Reply:
        """Read an errand; what is compared before its first piece."""
        assert self._model is not None
        model = self._model[1]
        self._work = None
        name, about, tensors = job.read(Path(request["folder"]) / job.FILE)
        with running(model.module):
            work = begin(name, model, about, tensors)
            first = work.first()
        self._work = request["job"], work
        return {}, first

    def run(self, request: dict[str, Any]) -> Reply:
        """What one piece gives."""
        assert self._model is not None and self._work is not None and self._work[0] == request["job"]
        with running(self._model[1].module):
            return {}, self._work[1](request["piece"])


def _of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def main() -> None:
    # What libraries print goes to the errors: the answers have the channel to themselves.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin.buffer:
        about, tensors = worker.answer(json.loads(line))
        body = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}) if tensors else b""
        answers.write(json.dumps({**about, "bytes": len(body)}).encode() + b"\n" + body)
        answers.flush()


if __name__ == "__main__":
    main()
