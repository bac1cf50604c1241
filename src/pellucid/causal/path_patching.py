"""Does A act on B directly, or by way of something else?

Path patching sends a change along chosen edges only (Wang et al. 2022, "Interpretability in the Wild", section 3.1;
Goldowsky-Dill et al. 2023). With x the prompt that is run and x' the other one:

    1. run x with the sender's output taken from x' and every other head (and, if `direct`, every MLP) held at its value
       on x: what reaches the receivers now is the sender's change along direct paths (or paths through MLPs) alone
    2. compute what the receivers make of that input, everything else held
    3. run x with the receivers' outputs set to that; all that follows is free to react

    effect = metric(step 3) - metric(x)

The paper patches a receiver's input. We patch the output that follows from it (same numbers, and exact where query heads
share keys and values: only the named head sees the changed key, not its siblings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Metrics, contrast, numbers
from pellucid.causal.grid import Grid, Over, effects, named
from pellucid.engine.edits import Edit, Replace, Swap, aligned_values, left_aligned
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import block_of, locate
from pellucid.engine.run import Run, stream_of
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

TOKENS_AT_ONCE = 2048  # of senders x prompts x positions in one run
Senders = Sequence[Sequence[Site]]  # sets whose members send together


@technique
def path_patching(
    model: Model,
    clean: Any,
    corrupted: Any = None,
    *,
    over: Over,
    receivers: str | Site | Sequence[str | Site],
    metric: Metrics | Any = None,
    direct: bool = True,
    denoise: bool = True,
    decoder: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """The effect of each sender in `over` on the metric by way of its paths to the receivers (all of them together).

    Senders are heads, `mlp.out`, `embed` or residuals, or sets of them. Receivers are heads (`layers.9.attn.heads.9`, or one
    input of them: `.q .k .v`), `mlp.out` or a residual (the last `resid_post`: paths to the logits); both may name positions.
    `direct=False` lets the change pass through MLPs, as in the paper. By default corrupted prompts are run with clean
    senders, as in `patching`; `denoise=False` is the paper's direction.

    Gives `effect`, its `share` of the total effect, and the rest as `patching` does, over the selectors of `over`.
    `checkpoint` is a file that keeps what is done of step 3.

    >>> path_patching(model, prompts, over="layers.0:9.attn.heads.*", receivers="layers.9.attn.heads.7.q")
    Effect by way of layers.9.attn.heads.7.q
    path patching: effect, low, high, ... over layer 9, head 8, prompt 4...
    """
    asked = contrast(model, clean, corrupted, metric, decoder)
    base, source = asked.sides(denoise)
    grid = Grid.of(model, over, base)
    with torch.no_grad():
        theirs = model.run(source, keep=grid.whole())
    sent = {site: theirs.everywhere(site)[0] for site in grid.whole()}
    paths = Paths.between(model, base, sent, named(model, receivers, base), direct)
    swept = model.sweep(base, paths.variants(grid.groups), asked.metric, checkpoint=checkpoint)
    data = effects(
        grid, asked, numbers(swept.values), numbers(swept.clean), asked.score(model, theirs), seed, denoise=denoise
    )
    return Result(data, kind="path patching", title=f"Effect by way of {receivers}")


@dataclass(frozen=True, eq=False)
class Paths:
    """Everything that is the same for every sender: the intact run, what senders send instead, what is held, and the
    receivers."""

    model: Model
    base: Run
    sent: Mapping[Site, Tensor]  # whole site of a sender -> [prompt, position, ...], as the run has it
    receivers: Sequence[Site]
    held: Sequence[Site]

    @classmethod
    def between(
        cls, model: Model, inputs: Inputs, sent: Mapping[Site, Tensor], receivers: Sequence[Site], direct: bool
    ) -> Paths:
        held = held_sites(model, direct)
        for site in sent:
            if (
                not site.part.endswith((".out", ".z_out", "embed", "resid_pre", "resid_mid", "resid_post"))
                or "experts" in site.part
            ):
                raise InputError(f"{str(site)!r} cannot send: name heads, an mlp.out, the embed or a residual")
        for site in receivers:
            if site.part.endswith(("attn.out", "cross.out")) or site.layer is None:
                raise InputError(
                    f"{str(site)!r} cannot receive: name heads, one of their q, k, v, an mlp.out or a residual"
                )
            area, _, port = site.part.partition(".")
            whole = site.unit is not None and site.at is not None and port not in ("q", "k", "v")
            attention = block_of(model.anatomy, site).attentions.get(area) if whole else None
            if attention is not None and attention.gated:
                raise Refused(
                    f"{str(site)!r} cannot receive at some positions: its attention has a gate that reads the stream too, and is "
                    "followed for whole prompts only; leave '@' out, or name its q, k or v"
                )
        with torch.no_grad():
            base = model.run(inputs, keep=[*held, *(s.whole for s in receivers)])
        return cls(model, base, sent, receivers, held)

    def variants(self, senders: Senders) -> list[list[Edit]]:
        """The edits of step 3 for every sender, or set of senders that act together."""
        size = max(1, TOKENS_AT_ONCE // self.base.inputs.stream("").ids.numel())
        return [edits for i in range(0, len(senders), size) for edits in self.received(senders[i : i + size])]

    def received(self, senders: Senders) -> list[list[Edit]]:
        """Steps 1 and 2: for every set of senders, the edits that put the receivers' new outputs into the run."""
        outputs: dict[Site, tuple[tuple[int, ...] | None, Tensor]] = {}
        ports: dict[tuple[Site, tuple[str, ...]], list[Site]] = {}  # z_out of a layer, which of q, k, v -> receivers
        for site in self.receivers:
            area, _, port = site.part.partition(".")
            if site.unit is None:
                open_ = [] if site.part.startswith("resid") else [site.whole]
                outputs[site] = None, self._sent(senders, [site.whole], open_)[site.whole]
            else:
                wanted: tuple[str, ...] = (port,) if port in ("q", "k", "v") else ("q", "k", "v")
                home = replace(site.whole, part=f"{area}.z_out")
                ports.setdefault((home, wanted), []).append(site)
        for (home, wanted), sites in ports.items():
            if len(wanted) == 3 and all(site.at is None for site in sites):  # the whole head, with all that it reads
                others = [[s for s in group if s.whole != home] for group in senders]  # none sends to its own layer
                z = self._sent(others, [home], [home])[home]
                heads = [locate(self.model.anatomy, replace(s, part=home.part)).unit or 0 for s in sites]
                z = z[:, :, heads]
            else:
                heads, z = self._attended(senders, home, wanted, sites)
            for head, value in zip(heads, z.unbind(2), strict=True):
                # receivers of one head by different ports act together only if named as the whole head
                key = replace(home, unit=head, port="head")
                if key in outputs:
                    raise InputError(
                        f"two receivers are inputs of {str(key)!r}: name the head itself, or one at a time"
                    )
                outputs[key] = (head,), value[:, :, None]
        return [self._edits(outputs, i) for i in range(len(senders))]

    def _edits(self, outputs: dict[Site, tuple[tuple[int, ...] | None, Tensor]], sender: int) -> list[Edit]:
        """The receivers' outputs in this sender's rows, heads of a layer joined in one edit."""
        n = len(self.base.inputs)
        joined: dict[Site, list[tuple[tuple[int, ...], Tensor]]] = {}
        made: list[Edit] = []
        for site, (units, values) in outputs.items():
            mine = values[sender * n : (sender + 1) * n]
            if units is None:
                made.append(Swap(site, mine))
            else:
                joined.setdefault(site.whole, []).append((units, mine))
        for site, parts in joined.items():
            made.append(Swap(site, torch.cat([v for _, v in parts], 2), tuple(u for units, _ in parts for u in units)))
        return made

    # ---- step 1

    def _sent(self, senders: Senders, keep: list[Site], open_: Sequence[Site]) -> dict[Site, Tensor]:
        """What arrives at `keep`, [sender * prompt, position, ...], when all but the senders and `open_` is held."""
        rows = self.base.inputs.repeated(len(senders))
        places: dict[Site, list[tuple[int, Site]]] = {s: [] for s in self.held if s not in open_}
        for i, group in enumerate(senders):
            for sender in group:
                places.setdefault(sender.whole, []).append((i, sender))
        edits = [Replace(site, function=self._sending(site, who, len(senders))) for site, who in places.items()]
        run = self._run(rows, keep, edits)
        return {site: aligned_values(run, site) for site in keep}

    def _sending(self, site: Site, who: list[tuple[int, Site]], count: int) -> Any:
        """The function of a site's live values [sender * prompt, position, ...]: held ones, senders' rows patched."""
        n = len(self.base.inputs)
        held = site in self.held
        base = self.base.everywhere(site)[0] if held else None

        def send(x: Tensor) -> Tensor:
            x = base.repeat(count, *[1] * (x.ndim - 1)) if base is not None else x.clone()
            for i, sender in who:
                part, source = x[i * n : (i + 1) * n], self.sent[site]
                unit = locate(self.model.anatomy, sender).unit
                if unit is not None:
                    part, source = part[:, :, unit], source[:, :, unit]
                columns = stream_of(self.base.inputs, sender).find(sender.at)
                if columns is None:
                    part.copy_(source)
                else:
                    index = torch.arange(n, device=x.device)[:, None], columns
                    part[index] = source[index]
            return x

        return send

    # ---- step 2

    def _attended(
        self, senders: Senders, home: Site, wanted: tuple[str, ...], sites: list[Site]
    ) -> tuple[list[int], Tensor]:
        """New outputs z_out [sender * prompt, position, receiver, e] of a layer's heads, given their new q, k or v."""
        area = home.part.partition(".")[0]
        inputs = {p: replace(home, part=f"{area}.{p}") for p in wanted}
        arrived = self._sent(senders, list(inputs.values()), [])
        rows = self.base.inputs.repeated(len(senders))
        edits: list[Edit] = []
        for site in inputs.values():
            for receiver in sites:
                named = replace(receiver, part=site.part, port="heads")
                unit = locate(self.model.anatomy, named).unit
                assert unit is not None
                edits.append(Swap(replace(site, at=receiver.at), arrived[site][:, :, [unit]], (unit,)))
        run = self._run(rows, [home], edits)
        heads = [locate(self.model.anatomy, replace(s, part=home.part)).unit or 0 for s in sites]
        values, real = run.everywhere(home)
        return heads, left_aligned(values[:, :, heads], real)[0]

    def _run(self, rows: Any, keep: list[Site], edits: Sequence[Edit]) -> Run:
        with torch.no_grad():
            return self.model.run(rows, keep=keep, edits=edits)


def held_sites(model: Model, direct: bool) -> list[Site]:
    """All that is held at its value while a sender acts: heads (or their attention whole), other mixers, MLPs if direct."""
    held = []
    for stack in model.anatomy.stacks:
        for block in stack.blocks:
            for area in {part.partition(".")[0] for part in block.taps}:
                names = [f"{area}.z_out", f"{area}.out"]
                if area.startswith("resid") or (area.startswith("mlp") and not direct):
                    continue
                part = next((name for name in names if name in block.taps), None)
                if part is not None:
                    held.append(Site.parse(f"{stack.prefix}layers.{block.index}.{part}"))
    return held
