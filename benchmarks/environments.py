"""An environment for each peer: created by one call, reused as long as its requirements stay the same."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
ENVS = HERE / ".envs"
# Plain torch brings gigabytes of CUDA libraries on Linux; as in the Makefile, TORCH can name a CPU build.
TORCH = shlex.split(os.environ.get("TORCH", "torch==2.13.0"))


class NotInstallable(Exception):
    """A peer that cannot be had; the message is the first line of the reason."""


@dataclass(frozen=True)
class Environment:
    """Packages to install beside torch and transformers, then data packages without their dependencies."""

    name: str
    packages: tuple[str, ...]
    data: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return ENVS / self.name / "bin" / "python"

    def ready(self) -> Path:
        """The environment's interpreter; NotInstallable with pip's first complaint."""
        marker = ENVS / self.name / "installed.txt"
        pins = _pins()
        wanted = "\n".join([*TORCH, *pins, *self.packages, *self.data])
        if marker.exists() and marker.read_text() == wanted:
            return self.python
        print(f"making the environment {self.name} ...", flush=True)
        shutil.rmtree(ENVS / self.name, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", ENVS / self.name], check=True)
        try:
            self._pip("--dry-run", "--no-deps", *self.packages)  # is it there at all?
            constraints = ENVS / "pins.txt"
            constraints.write_text("\n".join(pins))
            self._pip(*TORCH)
            self._pip("--constraint", str(constraints), "transformers", *self.packages)
            if self.data:
                self._pip("--no-deps", *self.data)
        except NotInstallable:
            shutil.rmtree(ENVS / self.name)
            raise
        marker.write_text(wanted)
        return self.python

    def _pip(self, *arguments: str) -> None:
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            raise NotInstallable((errors or done.stderr.splitlines() or ["pip failed"])[0])


def _pins() -> list[str]:
    """torch and transformers as the project pins them: the same for everybody."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.split("==")[0] in ("torch", "transformers")]
