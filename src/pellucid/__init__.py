"""Open any transformer: read, run, edit and watch every part of it.

Importing pellucid loads neither torch nor transformers: a name loads its module when it is first used.

>>> import pellucid as pl
>>> sorted(dir(pl))[:4]
['Ablate', 'Chat', 'Clamp', 'Corpus']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellucid.anatomy.sites import Site as Site
    from pellucid.corpus import Corpus as Corpus
    from pellucid.engine.edits import Ablate as Ablate
    from pellucid.engine.edits import Clamp as Clamp
    from pellucid.engine.edits import Patch as Patch
    from pellucid.engine.edits import ProjectOut as ProjectOut
    from pellucid.engine.edits import Replace as Replace
    from pellucid.engine.edits import Rotate as Rotate
    from pellucid.engine.edits import Scale as Scale
    from pellucid.engine.edits import Steer as Steer
    from pellucid.engine.given import Chat as Chat
    from pellucid.engine.given import Pair as Pair
    from pellucid.engine.inputs import Inputs as Inputs
    from pellucid.engine.pausing import quiet as quiet
    from pellucid.engine.saved import load_edits as load_edits
    from pellucid.engine.saved import save_edits as save_edits
    from pellucid.engine.steps import Redirect as Redirect
    from pellucid.engine.steps import Say as Say
    from pellucid.engine.steps import Stop as Stop
    from pellucid.engine.steps import Watch as Watch
    from pellucid.engine.sweep import on as on
    from pellucid.model import Model as Model
    from pellucid.model import load as load
    from pellucid.workers import VLLM as VLLM
    from pellucid.workers import Devices as Devices
    from pellucid.workers import Here as Here
    from pellucid.workers import Processes as Processes
    from pellucid.workers import Ray as Ray

_HOME = {
    "load": "model",
    "Model": "model",
    "Corpus": "corpus",
    "Chat": "engine.given",
    "Pair": "engine.given",
    "Inputs": "engine.inputs",
    "quiet": "engine.pausing",
    **dict.fromkeys(("load_edits", "save_edits"), "engine.saved"),
    "Site": "anatomy.sites",
    **dict.fromkeys(("Ablate", "Clamp", "Patch", "ProjectOut", "Replace", "Rotate", "Scale", "Steer"), "engine.edits"),
    **dict.fromkeys(("Redirect", "Say", "Stop", "Watch"), "engine.steps"),
    **dict.fromkeys(("VLLM", "Devices", "Here", "Processes", "Ray", "on"), "workers"),
}
_MODULES = (
    "anatomy",
    "attention",
    "attribution",
    "causal",
    "changed",
    "circuits",
    "controls",
    "corpus",
    "engine",
    "errors",
    "lenses",
    "metrics",
    "neurons",
    "probing",
    "results",
    "safety",
    "store",
    "surgery",
    "tasks",
    "tuning",
    "views",
)
__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pellucid.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"pellucid.{_HOME[name]}"), name)
    if name == "__version__":
        from importlib import metadata  # slow to import, and only this name needs it

        try:
            return metadata.version("pellucid")
        except metadata.PackageNotFoundError:  # run from a source tree that was not installed
            return "0+unknown"
    raise AttributeError(f"module 'pellucid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
