"""The lowest version of each thing pellucid needs, as pip takes it; with --names only the names."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

EXTRAS = ("gguf", "adapters", "data")  # what the core suite opens beside plain models
TESTS = ("captum",)

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
optional = project["optional-dependencies"]
wanted = project["dependencies"] + [line for extra in EXTRAS for line in optional[extra]]
wanted += [line for line in optional["test"] if line.startswith(TESTS)]
for line in dict.fromkeys(wanted):
    name, version = line.split("#")[0].split(">=")
    print(name if "--names" in sys.argv else f"{name}=={version}")
