"""Write the schema of the views, and the messages of the workbench, for those who read them: JSON Schema and TypeScript,
under web/src.

python scripts/view_types.py            write them
python scripts/view_types.py --check    fail if they are not what the schema says
"""

from __future__ import annotations

import json
import sys
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import msgspec

from pellucid.views.kinds import KINDS
from pellucid.views.schema import Document
from pellucid.workbench import messages

WEB = Path(__file__).resolve().parents[1] / "web" / "src"


def schema() -> dict[str, Any]:
    (top, data), parts = msgspec.json.schema_components(
        [Document, reduce(or_, (kind.schema for kind in KINDS))], schema_hook=_any_view, ref_template="#/$defs/{name}"
    )
    parts["Document"]["properties"]["data"] = data  # any kind there is
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": dict(sorted(parts.items()))}


def _any_view(kind: type) -> dict[str, Any]:
    return {"type": "object"}


def typescript(found: dict[str, Any]) -> str:
    lines = ["// Made by scripts/view_types.py from src/pellucid/views/schema.py. Do not edit.", ""]
    views = [p["$ref"].rsplit("/", 1)[1] for p in found["$defs"]["Document"]["properties"]["data"]["anyOf"]]
    for name, entry in found["$defs"].items():
        if entry.get("description") and name in [*views, "Document", "Numbers"]:
            lines.append(f"/** {entry['description'].splitlines()[0]} */")
        needed = set(entry.get("required", ()))
        lines.append(f"export interface {name} {{")
        for key, value in entry["properties"].items():
            own = "const" in value or value.get("enum") == ["kind"]
            label = key if key.isidentifier() else json.dumps(key)
            lines.append(f"  {label}{'' if key in needed or own else '?'}: {of(value)};")
        lines += ["}", ""]
    lines += [f"export type View = {' | '.join(views)};", f"export const VERSION = {found['$defs']['Document']['properties']['pellucid-view']['enum'][0]};", ""]  # fmt: skip
    return "\n".join(lines)


def messages_typescript() -> str:
    """The messages between the workbench's page and its server; views in them are documents."""
    kinds = [
        k
        for k in vars(messages).values()
        if isinstance(k, type) and issubclass(k, messages.Message) and k is not messages.Message
    ]
    _, parts = msgspec.json.schema_components(kinds, schema_hook=_any_view, ref_template="#/$defs/{name}")
    lines = [
        "// Made by scripts/view_types.py from src/pellucid/workbench/messages.py. Do not edit.", "",
        'import type { Document } from "../schema";', "",
    ]  # fmt: skip
    sent = {k.__name__ for k in kinds if k.__name__.endswith("Request")} | {
        "Edit",
        "State",
        "Pane",
        "Selection",
        "Workspace",
    }
    for kind in kinds:
        entry = parts[kind.__name__]
        needed = set(entry.get("required", ())) if kind.__name__ in sent else set(entry["properties"])
        lines.append(f"/** {' '.join((entry.get('description') or '').split())} */")
        lines.append(f"export interface {kind.__name__} {{")
        lines += [f"  {key}{'' if key in needed else '?'}: {of(value)};" for key, value in entry["properties"].items()]
        lines += ["}", ""]
    return "\n".join(lines)


def of(value: dict[str, Any]) -> str:
    """The TypeScript type of a piece of JSON Schema."""
    if "$ref" in value:
        return value["$ref"].rsplit("/", 1)[1]
    if "enum" in value:
        return " | ".join(json.dumps(v) for v in value["enum"])
    if "anyOf" in value:
        return " | ".join(of(v) for v in value["anyOf"])
    if "type" not in value:
        return "unknown"
    kind = value["type"]
    if kind == "object":
        return f"Record<string, {of(value.get('additionalProperties') or {})}>"
    if isinstance(kind, list):
        return " | ".join(of({"type": k}) for k in kind)
    if kind == "array":
        inner = of(value["items"])
        return f"({inner})[]" if "|" in inner else f"{inner}[]"
    return {"integer": "number", "number": "number", "string": "string", "boolean": "boolean", "null": "null"}[kind]


def files() -> dict[Path, str]:
    found = schema()
    return {
        WEB / "schema.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        WEB / "schema.ts": typescript(found),
        WEB / "workbench" / "messages.ts": messages_typescript(),
    }


def main() -> None:
    stale = [path.name for path, text in files().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python scripts/view_types.py" if stale else 0)
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
