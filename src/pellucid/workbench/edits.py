"""What a reader does to a part of the model, from the page's words to the engine's edits.

    zero, mean       the part says nothing, or what it says on average over the prompt's tokens
    scale            the part times `strength`
    steer            plus strength * v, v = the part on the other prompt - the part on this one, both where the answer is
                     read (or at `position`): at strength 1 there the part is what it is on the other prompt; the control
                     is a random direction of the same norm
    patch            the part's values on the other prompt, at the same positions

A head is changed before its output projection; `layers.5` is all that the layer adds to the residual stream, and the
residual stream after it where something is put in or added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.grid import CONTRIBUTIONS
from pellucid.engine import edits as engine
from pellucid.engine.locate import block_of
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.views.naming import site_of
from pellucid.workbench.answers import Memory, Passed
from pellucid.workbench.messages import Edit, LiveRequest

LAYER = re.compile(r"((\w+\.)?layers\.-?\d+)")
NO_OTHER = "steering along a contrast and patching need a second prompt; give one"
NO_DIRECTION = "{!r} has no direction to steer in; steer what a head or layer says"
SITES = 2000  # one edit may name through a pattern


@dataclass(frozen=True)
class Asked:
    """An edit with the sites its component stands for."""

    edit: Edit
    sites: list[Site]

    @property
    def reads_prompt(self) -> bool:
        return self.edit.kind in ("mean", "steer")

    @property
    def wholes(self) -> list[str]:
        return list(dict.fromkeys(str(site.whole) for site in self.sites))


def asked(model: Model, edits: Sequence[Edit]) -> list[Asked]:
    """Those edits that are on. SiteError or Refused for a component the model does not have."""
    return [Asked(edit, sites_of(model, edit)) for edit in edits if edit.on]


def sites_of(model: Model, edit: Edit) -> list[Site]:
    name = site_of(edit.component.strip())
    if "@" in name:
        raise InputError(f"{edit.component!r} names its position itself; give the position apart from the component")
    if not LAYER.fullmatch(name):
        found = model.sites(name)
    elif edit.kind in ("steer", "patch"):
        found = model.sites(f"{name}.resid_post")
    else:
        start = model.sites(f"{name}.resid_pre")[0]
        taps = block_of(model.anatomy, start).taps
        found = [site for part in CONTRIBUTIONS if part in taps for site in model.sites(f"{name}.{part}")]
    if not 0 < len(found) <= SITES:
        raise InputError(f"{edit.component!r} names {len(found)} parts of the model; name one, or at most {SITES}")
    return found


def check(model: Model, edit: Edit, prompt: str, other: str | None) -> None:
    """Whether an edit can be made, before it is. SiteError, Refused or InputError, as making it would raise."""
    for site in sites_of(model, edit):
        if edit.kind == "steer" and site.dims[-1] == "key":
            raise InputError(NO_DIRECTION.format(str(site)))
    if not other and (edit.kind == "patch" or (edit.kind == "steer" and edit.direction == "contrast")):
        raise InputError(NO_OTHER)
    if edit.position is not None and prompt.strip():
        inputs = model.inputs(prompt)
        length = len(inputs.streams.get("encoder", inputs.stream("")).labels[0])
        if not -length <= edit.position < length:
            raise InputError(f"position {edit.position} is outside the prompt, which has {length} tokens")


def ready(found: Sequence[Asked], memory: Memory, prompt: str, other: str | None) -> list[engine.Edit]:
    """The engine's edits, the runs they read from taken from memory.

    InputError where a direction or patch is wanted without a second prompt.
    """
    clean = memory.of(prompt, [site for each in found if each.reads_prompt for site in each.wholes])

    def second() -> Passed:
        if not other:
            raise InputError(NO_OTHER)
        return memory.of(other, [site for each in found for site in each.wholes])

    return [_made(each.edit, site, clean, second) for each in found for site in each.sites]


def _made(edit: Edit, site: Site, prompt: Passed, other: Callable[[], Passed]) -> engine.Edit:
    at = site if edit.position is None else site.at_position(edit.position)
    if edit.kind == "zero":
        return engine.Ablate(at)
    if edit.kind == "mean":
        return engine.Ablate(at, "mean", reference=prompt.run)
    if edit.kind == "scale":
        return engine.Scale(at, edit.strength)
    if edit.kind == "patch":
        return engine.Patch(at, other().run, source_at=edit.position)
    return engine.Steer(at, direction(edit, site, prompt, other), edit.strength)


def direction(edit: Edit, site: Site, prompt: Passed, other: Callable[[], Passed]) -> Tensor:
    """What a steered site is moved by at strength 1; the random one has the norm of the contrast, or without a second
    prompt that of the site itself."""
    own = _at(prompt, site, edit.position)
    if edit.direction == "contrast":
        return _at(other(), site, edit.position) - own
    try:
        norm = (_at(other(), site, edit.position) - own).norm()
    except InputError:
        norm = own.norm()
    drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(edit.seed)).to(own)
    return drawn * norm / drawn.norm().clamp_min(1e-12)


def _at(passed: Passed, site: Site, position: int | None) -> Tensor:
    """The site's value at a position of a run, by default where the answer is read."""
    if site.dims[-1] == "key":
        raise InputError(NO_DIRECTION.format(str(site)))
    stream = passed.run.stream(site)
    if position is None:
        answered = stream is passed.inputs.stream("") and passed.kind != "class"
        position = passed.position if answered else -1
    return passed.run.tensor(site.at_position(position))[0].squeeze(0)


# ---- the same as Python, for the corner of a view and for notebooks


def opening(opened: str) -> list[str]:
    """`opened` is the expression that opens the model."""
    return ["import pellucid as pl", "", f"model = {opened}"]


def edit_lines(edits: Sequence[Edit], other: str | None, model: Model | None = None, answered: int = -1) -> list[str]:
    """`edits = [...]`, with the vectors they need; `answered` is where the answer is read, counted from the end."""
    lines: list[str] = []
    made: list[str] = []
    for edit in edits:
        for site in parts(edit, model) if edit.on else ():
            at = site if edit.position is None else f"{site}@{edit.position}"
            if edit.kind == "steer":
                name = f"v{len(made)}"
                lines += steering(edit, site, name, other, answered)
                made.append(f"pl.Steer({at!r}, {name}, {edit.strength!r})")
            elif edit.kind == "patch":
                where = "" if edit.position is None else f", source_at={edit.position}"
                made.append(f"pl.Patch({at!r}, other{where})")
            elif edit.kind == "scale":
                made.append(f"pl.Scale({at!r}, {edit.strength!r})")
            elif edit.kind == "mean":
                made.append(f'pl.Ablate({at!r}, "mean", reference=prompt)')
            else:
                made.append(f"pl.Ablate({at!r})")
    return [*lines, f"edits = [{', '.join(made)}]"]


def parts(edit: Edit, model: Model | None) -> list[str]:
    """The sites an edit acts on; without the model at hand, those of a layer with an attention and an MLP."""
    if model is not None:
        return [str(site) for site in sites_of(model, edit)]
    if not LAYER.fullmatch(edit.component):
        return [edit.component]
    ends = ("resid_post",) if edit.kind in ("steer", "patch") else ("attn.out", "mlp.out")
    return [f"{edit.component}.{end}" for end in ends]


def steering(edit: Edit, site: str, name: str, other: str | None, answered: int) -> list[str]:
    at = f"{site}@{answered if edit.position is None else edit.position}"
    own = f"model.run(prompt, keep={at!r}).tensor({at!r})[0, 0]"
    contrast = f"model.run(other, keep={at!r}).tensor({at!r})[0, 0] - {own}" if other else own
    if edit.direction == "contrast":
        return [f"{name} = {contrast}"]
    return [
        "import torch",
        f"like = {contrast}",
        f"{name} = torch.randn(like.shape, generator=torch.Generator().manual_seed({edit.seed}))",
        f"{name} = {name} * like.norm() / {name}.norm()",
    ]


def lens_code(model: Model, asked: LiveRequest, answered: int) -> str:
    lines = [*opening(model.opened), f"prompt = {asked.prompt!r}"]
    edited = any(edit.on for edit in asked.edits)
    if edited:
        lines += [f"other = {asked.other!r}"] if asked.other else []
        lines += edit_lines(asked.edits, asked.other, model, answered)
    return "\n".join([*lines, f"pl.lenses.logit_lens(model, prompt{', edits=edits' if edited else ''}).show()"])
