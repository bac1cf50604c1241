"""The model as a function of its token embeddings: what gradient methods differentiate and integrate.

The embedding module's output is replaced where it is made, so that nothing else about the forward pass changes:
this serves families that take no `inputs_embeds`, and encoder-decoders whose stacks share an embedding. Positions
and segments stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.opening import main_output
from pellucid.anatomy.sites import TOKENS as SITE_DIMS
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.attribution.case import Case
from pellucid.engine.locate import locate
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused

ROWS_OF_TOKENS = 1024  # tokens in one batch


class Embedded:
    """Runs a case with its token embeddings [row, position, d] replaced, many versions in one batch."""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.lengths = case, case.model, case.lengths
        sites = (Site("embed.tokens", stack=name) for name in case.streams)
        self.taps = [locate(self.model.anatomy, site).tap for site in sites]
        self.modules: list[Any] = [self.model.module.get_submodule(tap.module) for tap in self.taps]
        parts = [self._look_up(m, s.ids) for m, s in zip(self.modules, case.streams.values(), strict=True)]
        if len({part.shape[-1] for part in parts}) > 1:
            raise Refused(
                f"{self.model.name} embeds source and target tokens in widths that differ: attribute one token"
            )
        self.values = torch.cat(parts, 1)  # [1, position, d] of the prompt itself

    def _look_up(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = module(ids)
        return made

    def embed(self, ids: Tensor) -> Tensor:
        """[1, position, d] of token ids [position], one for each credited position."""
        parts = ids.split(self.case.lengths)
        return torch.cat([self._look_up(m, part[None]) for m, part in zip(self.modules, parts, strict=True)], 1)

    @cached_property
    def mean(self) -> Tensor:
        """[1, position, d], the mean over the vocabulary, as the embedding hands tokens out (some families scale them)."""
        means = []
        for module, length in zip(self.modules, self.case.lengths, strict=True):
            ids = torch.arange(len(module.weight), device=module.weight.device)
            total = torch.stack([self._look_up(module, part[None]).double().sum(1)[0] for part in ids.split(8192)])
            means.append((total.sum(0) / len(ids)).to(self.values.dtype).expand(length, -1))
        return torch.cat(means)[None]

    # ---- running

    def run(self, embeddings: Tensor, handlers: dict[Tap, Handler] | None = None, **forward: Any) -> Any:
        """The model's output for embeddings [row, position, d]."""
        rows = len(embeddings)
        moved = dict(zip(self.taps, embeddings.split(self.lengths, dim=1), strict=True))
        handlers = {**(handlers or {}), **{tap: partial(_instead, part) for tap, part in moved.items()}}
        tensors = {
            k: v.repeat_interleave(rows, 0) if isinstance(v, Tensor) and v.ndim and len(v) == 1 else v
            for k, v in self.case.inputs.tensors.items()
        }
        with Wiretap(self.model.module, handlers, rows):
            return self.model.module(**{**tensors, **uncached(self.model.module), **forward})

    def met(self, taps: list[Tap], embeddings: Tensor) -> dict[Tap, Tensor]:
        """What is met at taps when the model runs on these embeddings."""
        kept: dict[Tap, Tensor] = {}
        with torch.no_grad():
            self.run(embeddings, {tap: partial(kept.__setitem__, tap) for tap in taps})
        return kept

    def scores(self, embeddings: Tensor) -> Tensor:
        """[row, output] of the target, differentiable; where the last positions are read, only those are unembedded."""
        case = self.case
        if case.question.site is not None:
            return self._at_site(embeddings)
        stream = case.inputs.stream("")
        mask = stream.mask.expand(len(embeddings), -1)
        forward, read = self._forward
        return case.question.read(main_output(self.run(embeddings, **forward)), mask[:, -read:] if read else mask)

    @cached_property
    def _forward(self) -> tuple[dict[str, Any], int]:
        return spared(self.case)

    def _at_site(self, embeddings: Tensor) -> Tensor:
        site = self.case.question.site
        assert site is not None
        tap, kept = locate(self.model.anatomy, site.whole).tap, dict[Tap, Tensor]()
        self.run(embeddings, {tap: partial(kept.__setitem__, tap)})
        return self.case.read(Run(self.model.anatomy, self.case.inputs, None, kept, [site.whole]).tensor(site))

    def batches(self, rows: int) -> int:
        """How many rows to run at once."""
        return max(1, min(rows, ROWS_OF_TOKENS // self.values.shape[1]))

    def gradients(
        self, embeddings: Tensor, reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient
    ) -> tuple[Tensor, Tensor]:
        """The targets [row, output] and their gradients [row, output, position, d], all from one forward pass; `reduce`
        is applied to that of each output, [row, position, d]. Refused without a gradient."""
        with torch.enable_grad(), ExitStack() as hooks:
            embeddings = embeddings.detach().requires_grad_()
            blind: list[str] = self.model.memo("what stops gradients", list)  # the first such module; "" for none
            if not blind:
                self._watch(hooks, blind)
            scores = self.scores(embeddings)
            blind.append("")
            if blind[0] or not scores.requires_grad:
                where = f" (it ends at {blind[0]!r})" if blind[0] else ""
                raise Refused(
                    f"no gradient reaches the embeddings of {self.model.name}{where}: its weights are quantised, or the "
                    "target counts; use a method that only runs the model: occlusion, shapley, kernel_shap or lime"
                )
            found = []
            for o in range(scores.shape[1]):
                more = o + 1 < scores.shape[1]
                (gradient,) = torch.autograd.grad(scores[:, o].sum(), embeddings, retain_graph=more, allow_unused=True)
                found.append(reduce(torch.zeros_like(embeddings) if gradient is None else gradient))
        return scores.detach(), torch.stack(found, 1)

    def _watch(self, hooks: ExitStack, blind: list[str]) -> None:
        """Quantised layers let no gradient through while residual connections around them do: look for such layers."""

        def hook(name: str, module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
            if _cuts(module, args[0] if args else None, made):
                blind.append(name)

        for name, module in self.model.module.named_modules():
            hooks.callback(module.register_forward_hook(partial(hook, name)).remove)


class Inside(Embedded):
    """The same from further up: the model as a function of what is met at one site, such as layers.3.resid_pre.

    Only the stream of that site moves; `place` is where its positions are among the credited ones."""

    def __init__(self, embedded: Embedded, site: Site | str) -> None:
        self.case, self.model = embedded.case, embedded.model
        sites = self.model.sites(site)
        if len(sites) != 1 or sites[0].dims != SITE_DIMS or sites[0].at is not None or sites[0] != sites[0].whole:
            raise InputError(
                f"site={str(site)!r} must name one place where every position has a vector of the residual stream's width, "
                "such as 'layers.3.resid_pre'"
            )
        spot, streams = locate(self.model.anatomy, sites[0]), list(self.case.streams)
        if spot.stream not in streams:
            raise InputError(
                f"site={str(site)!r} is in the {spot.stream}, but credit goes to the {' and '.join(streams)}"
            )
        before = self.case.lengths[: streams.index(spot.stream)]
        self.lengths = [self.case.lengths[len(before)]]
        self.place = slice(sum(before), sum(before) + self.lengths[0])
        self.taps = [spot.tap]
        self.values = self.of(embedded, embedded.values)

    def of(self, embedded: Embedded, embeddings: Tensor) -> Tensor:
        """[1, position, d] what is met here when the model runs on these embeddings."""
        return embedded.met(self.taps, embeddings)[self.taps[0]]


def spared(case: Case) -> tuple[dict[str, Any], int]:
    """Arguments that spare the model work nobody reads, and how many positions are unembedded (0: all)."""
    accepted = inspect.signature(case.model.module.forward).parameters
    forward: dict[str, Any] = uncached(case.model.module)
    bound = case.question.metric
    last = "logits_to_keep" in accepted and bound is not None and bound.positions and max(bound.positions) < 0
    if bound is None or not last or case.inputs.stream("").padded:
        return forward, 0
    read = -min(bound.positions or (-1,))
    return {**forward, "logits_to_keep": read}, read


def uncached(module: Any) -> dict[str, Any]:
    """What tells a model not to keep keys and values for later."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def _cuts(module: nn.Module, x: Any, made: Any) -> bool:
    """Whether a module's output, unlike its input, has lost the gradient: weights that are whole numbers, or packed."""
    if not (isinstance(x, Tensor) and isinstance(made, Tensor) and x.requires_grad and made.is_floating_point()):
        return False
    if made.shape[:-1] != x.shape[:-1] or not torch.is_grad_enabled():
        return False
    if made.grad_fn is not None:
        return "NotImplemented" in made.grad_fn.name()
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(t.ndim > 1 and not t.is_floating_point() for t in held)


def _instead(new: Tensor, old: Tensor) -> Tensor:
    return new.clone()  # the model may work on it in place
