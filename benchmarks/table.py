"""Results as the tables of benchmarks/README.md, between its markers."""

from __future__ import annotations

import re
from typing import Any

from environments import HERE

README = HERE / "README.md"

TASKS = {
    "patch": "residual patching, layers x 15 positions",
    "ablate": "head ablation on 8 prompts",
    "keep": "keep every activation, 1x32",
    "plain": "nothing kept, nothing edited, 1x32",
    "generate": "steered generation of 20 tokens",
    "start": "import and wrap",
}
SHAPES = {
    "gpt2": "GPT-2 small's shape: 12 layers, 12 heads, 124M",
    "smollm2": "SmolLM2-135M's shape: 30 layers, 9 heads sharing 3 keys and values",
    "smollm2-trained": "SmolLM2-135M-Instruct itself",
    "minilm": "MiniLM's shape: an encoder of 6 layers",
}
TARGETS = {"patch": 18.0, "ablate": 50.0, "keep": 1.15, "plain": 1.03, "generate": 1.03}  # on GPT-2's shape
TOLERANCE = 1e-5
NAMES = {
    "pellucid": "**pellucid**",
    "hooks": "plain hooks, one by one",
    "hooks_batched": "plain hooks, batched",
    "transformer_lens": "TransformerLens",
    "nnsight": "nnsight",
    "pyvene": "pyvene",
    "baukit": "baukit",
}


def write_tables(results: dict[str, Any]) -> None:
    text = README.read_text()
    for marker, table in {"results": tables(results), "start": start_table(results)}.items():
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- end {marker} -->)"
        text, found = re.subn(pattern, lambda m, table=table: m[1] + table + m[2], text, flags=re.DOTALL)
        assert found == 1, f"README.md has no markers for {marker}"
    README.write_text(text)


def tables(results: dict[str, Any]) -> str:
    machine = results["machine"]
    out = f"Measured {machine['date']} on {machine['cores']} cores, Python {machine['python']}.\n\n"
    for shape, title in SHAPES.items():
        of_shape = [r for r in results["results"] if r["shape"] == shape and r["task"] != "start"]
        tasks = [t for t in TASKS if any(r["task"] == t for r in of_shape)]
        if not tasks:
            continue
        out += f"### {title}\n\n| |" + "".join(f" {TASKS[t]}{_of(of_shape, t)} |" for t in tasks) + "\n"
        out += "|---|" + "---|" * len(tasks) + "\n"
        for peer in NAMES:
            found = {r["task"]: r for r in of_shape if r["peer"] == peer}
            if not found:
                continue
            cells = [_cell(found.get(t)) for t in tasks]
            out += f"| {_name(results, peer)} |" + "".join(f" {c} |" for c in cells) + "\n"
        if shape == "gpt2":
            out += "| pellucid's target, at most |" + "".join(f" {TARGETS[t]:g} |" for t in tasks) + "\n"
        out += "\n" + "".join(_remarks(of_shape))
    notes = {r["peer"]: r["note"] for r in results["results"] if "note" in r}
    return out + "How they were used:\n\n" + "".join(f"- {_name(results, p)}: {n}\n" for p, n in notes.items())


def start_table(results: dict[str, Any]) -> str:
    out = "| | import, s | wrap, s |\n|---|---|---|\n"
    for r in results["results"]:
        if r["task"] == "start" and r["peer"] != "hooks":
            cells = f"{r['import']:.2f} | {r['wrap']:.2f}" if "import" in r else f"{r['failed']} | "
            out += f"| {_name(results, r['peer'])} | {cells} |\n"
    return out


def _of(records: list[dict[str, Any]], task: str) -> str:
    runs = next((r["runs"] for r in records if r["task"] == task and "runs" in r), None)
    return f" ({runs} runs)" if runs else ""


def _name(results: dict[str, Any], peer: str) -> str:
    name = NAMES[peer]
    version = results["versions"].get(peer)
    return name if peer.startswith("hooks") or version is None else f"{name} {version}"


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if "failed" in record:
        return "failed"
    digits = 1 if record["cost"] >= 10 else 2 if "runs" in record else 3
    off = f"off by {record['error']:.0e}" if record["error"] else "equal"
    off = off if record["error"] <= TOLERANCE else f"**{off}**"
    off = "the reference" if record["peer"] == "hooks" else off
    partly = " †" if record.get("layers") != record.get("of_layers") else ""
    lacking = f", without {', '.join(record['missing'])}" if record["missing"] else ""
    cost, low, high = (f"{record[key]:.{digits}f}" for key in ("cost", "low", "high"))
    return f"{cost}{partly} ({low} to {high}), {off}{lacking}"


def _remarks(records: list[dict[str, Any]]) -> list[str]:
    failed: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if "failed" in r:
            failed.setdefault((r["peer"], r["failed"]), []).append(r["task"])
    lines = [f"{NAMES[p]} failed ({', '.join(t)}): `{why}`\n\n" for (p, why), t in failed.items()]
    sampled = next((r for r in records if r.get("layers") != r.get("of_layers")), None)
    if sampled:
        lines.append(f"† run on {sampled['layers']} of the {sampled['of_layers']} layers, scaled to all.\n\n")
    return lines
