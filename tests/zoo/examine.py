"""What does pellucid find in each zoo model? One row of facts per model, made in parallel, crashes included.

A proof may be skipped only where the family lacks what it is about, or has it in a form that is refused by name
(`known.py` lists both). Skipped elsewhere it counts as failed, so that nothing is proven by not looking.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from pellucid.anatomy.opening import open_module

from .build import Entry, build
from .inputs import inputs
from .known import LACKS, ONLY_IN, REFUSED


@dataclass(frozen=True)
class Row:
    """What opening one model told; `failing` has the key "opens" where it could not be opened at all."""

    entry: Entry
    stacks: list[tuple[str, int]] = field(default_factory=list)  # name and number of blocks
    route: str = ""
    holding: dict[str, float | None] = field(default_factory=dict)  # proof -> error
    not_applicable: list[str] = field(default_factory=list)
    failing: dict[str, str] = field(default_factory=dict)  # proof -> what it says
    refused: dict[str, str] = field(default_factory=dict)  # site pattern -> reason


def examine(entry: Entry) -> Row:
    """Build one model, open it, and read its anatomy's proofs off."""
    module = build(entry)
    try:
        anatomy = open_module(module, inputs(module))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Row(entry, failing={"opens": f"{type(error).__name__} in {where.name}: {_one_line(error)}"})
    lacking = [p.name for p in anatomy.proofs if p.holds is None and may_skip(entry.model_type, p.name)]
    return Row(
        entry,
        stacks=[(stack.name, len(stack.blocks)) for stack in anatomy.stacks],
        route=anatomy.route,
        holding={p.name: p.error for p in anatomy.proofs if p.holds},
        not_applicable=lacking,
        failing={p.name: p.detail for p in anatomy.proofs if not p.holds and p.name not in lacking},
        refused=dict(anatomy.refusals),
    )


def may_skip(model_type: str, proof: str) -> bool:
    """Whether the family has nothing the proof could be about, or nothing in a form it could be about."""
    absent = model_type in LACKS.get(proof, ()) or (proof in ONLY_IN and model_type not in ONLY_IN[proof])
    return absent or proof in REFUSED.get(model_type, {})


def examine_all(entries: Iterable[Entry], jobs: int = 2, timeout: float = 120.0) -> Iterator[Row]:
    """Rows in the order they get ready: a process per model, so that a crash or a hang costs one row only."""
    torch.set_num_threads(1)
    waiting = list(entries)[::-1]
    running: dict[Connection, tuple[ForkProcess, Entry, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            entry = waiting.pop()
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=_send_row, args=(entry, sender))
            process.start()
            sender.close()
            running[receiver] = process, entry, time.monotonic() + timeout
        ready = wait(list(running), timeout=1.0)
        for receiver, (process, entry, deadline) in list(running.items()):
            if receiver in ready or time.monotonic() > deadline:
                yield _receive_row(receiver, process, entry, timeout)
                del running[receiver]


def _send_row(entry: Entry, sender: Connection) -> None:
    sender.send(examine(entry))


def _receive_row(receiver: Connection, process: ForkProcess, entry: Entry, timeout: float) -> Row:
    try:
        if receiver.poll():
            return receiver.recv()
        return Row(entry, failing={"opens": f"took longer than {timeout:.0f} s"})
    except EOFError:
        process.join()
        return Row(entry, failing={"opens": f"the process died with exit code {process.exitcode}"})
    finally:
        process.kill()
        process.join()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
