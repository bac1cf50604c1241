"""One worker, seen from here: asked, it answers; if it dies, another one takes its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any, Protocol

from safetensors.torch import load
from torch import Tensor

HOME = Path(__file__).parents[2]
Reply = tuple[dict[str, Any], dict[str, Tensor]]


class Died(Exception):
    """The worker is gone; the message is the last that it said."""


class Lane(Protocol):
    """Where one request after another is answered."""

    at: str  # the job it has begun

    def ask(self, request: dict[str, Any], folder: Path) -> Reply:
        """The answer to a request about what lies in a folder. Died where the worker is no more."""

    def stop(self) -> None:
        """End the worker; the next request starts another."""


class ProcessLane:
    """A process of this machine."""

    def __init__(self) -> None:
        self.at = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def ask(self, request: dict[str, Any], folder: Path) -> Reply:
        process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({**request, "folder": str(folder)}).encode() + b"\n")
            process.stdin.flush()
            head = process.stdout.readline()
            about = json.loads(head)
            body = process.stdout.read(about["bytes"])
            if len(body) < about["bytes"]:
                raise ValueError
        except (OSError, ValueError) as error:
            said = self._last_words()
            self.stop()
            raise Died(said) from error
        return about, load(body) if body else {}

    def _start(self) -> subprocess.Popen[bytes]:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the worker)
        command = [sys.executable, "-m", "pellucid.workers.worker"]
        path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))  # this pellucid, wherever it is
        env = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=env
        )
        weakref.finalize(self, self.process.kill)
        return self.process

    def _last_words(self) -> str:
        if self._said is None:
            return ""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.at = None, ""
