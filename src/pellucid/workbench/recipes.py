"""The Python that does what the page did: for the corner of each view, and for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.model import Model
from pellucid.workbench.edits import LAYER, sites_of
from pellucid.workbench.messages import Edit, LiveRequest


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
