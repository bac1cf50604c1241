"""Workers on a Ray cluster (extra `ray`): actors of their own, wherever there is room."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from pellucid.errors import InputError, at_least
from pellucid.workers.lanes import Died, Reply
from pellucid.workers.pool import Pool


class Ray(Pool):
    """`workers` Ray actors, by default as many as the cluster has room for with these `resources` (of one actor, as
    `ray.remote` takes them: num_cpus, num_gpus ...).

    `address` is a running cluster ("auto": the one of this machine); without it one is started here. A worker opens the model
    from where it was opened here: a hub id, or a folder that every node sees. InputError where Ray is not installed, or where
    nobody answers at the address.

    >>> pl.Ray(4, address="auto", resources={"num_gpus": 1})  # needs a cluster  # doctest: +SKIP
    """

    def __init__(
        self, workers: int | None = None, *, address: str | None = None, resources: dict[str, Any] | None = None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("Ray is not installed: pip install 'pellucid[ray]'") from error
        if workers is not None:
            at_least(1, workers=workers)
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                said = str(error).splitlines()[0][:150]
                raise InputError(f"no Ray cluster answers at {address!r}: {said}") from error
        self.resources = {"num_cpus": 1, **(resources or {})}
        self.address = address
        n = workers or _room(ray.cluster_resources(), self.resources)
        device = "cuda" if self.resources.get("num_gpus") else None
        super().__init__(
            [ActorLane(self.resources) for _ in range(n)], [device] * n, int(self.resources["num_cpus"]) or 1
        )

    def __repr__(self) -> str:
        return f"pl.Ray({len(self.lanes)}, address={self.address!r}, resources={self.resources!r})"


def _room(has: dict[str, float], one: dict[str, Any]) -> int:
    each = [
        has.get({"num_cpus": "CPU", "num_gpus": "GPU"}[k], 0) // v for k, v in one.items() if k.startswith("num_") and v
    ]
    if not each or min(each) < 1:
        raise InputError(
            f"the cluster has no room for one worker with {one}: it has {has.get('CPU', 0):.0f} CPUs and {has.get('GPU', 0):.0f} GPUs"
        )
    return int(min(each))


class ActorLane:
    """One actor. Files go through the object store, once for each folder."""

    def __init__(self, resources: dict[str, Any]) -> None:
        self.at, self.resources = "", resources
        self.actor: Any = None
        self._sent: tuple[str, dict[str, Any]] = ("", {})

    def ask(self, request: dict[str, Any], folder: Path) -> Reply:
        import ray

        self.actor = self.actor or ray.remote(**self.resources)(_Actor).remote()
        if self._sent[0] != str(folder):
            self._sent = str(folder), {f.name: ray.put(f.read_bytes()) for f in sorted(folder.iterdir())}
        try:
            found: Any = ray.get(self.actor.answer.remote(request, list(self._sent[1]), *self._sent[1].values()))
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            self.stop()
            raise Died(" ".join(str(error).split())[:200]) from error
        about, tensors = found
        return about, tensors

    def stop(self) -> None:
        import ray

        if self.actor is not None and ray.is_initialized():
            ray.kill(self.actor)
        self.actor, self.at = None, ""


class _Actor:
    """What runs there."""

    def __init__(self) -> None:
        from pellucid.workers.worker import Worker

        self.worker, self.job, self.folder = Worker(), "", tempfile.TemporaryDirectory()

    def answer(
        self, request: dict[str, Any], names: list[str], *files: bytes
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if request["job"] != self.job:
            for name, body in zip(names, files, strict=True):
                (Path(self.folder.name) / name).write_bytes(body)
            self.job = request["job"]
        return self.worker.answer({**request, "folder": self.folder.name})
