"""The model as a function of its token embeddings: what gradient methods differentiate and integrate.

The embedding module's output is replaced where it is made, so that nothing else about the forward pass changes:
this serves families that take no `inputs_embeds`, and encoder-decoders whose stacks share an embedding. Positions
and segments stay as they are.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.attribution.case import Case
from pellucid.engine.inputs import Stream
from pellucid.engine.locate import locate
from pellucid.engine.run import Run
from pellucid.errors import Refused

ROWS_OF_TOKENS = 1024  # tokens in one batch


class Embedded:
    """Runs a case with its token embeddings [row, position, d] replaced, many versions in one batch."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model
        found = self._find()
        self.taps = [Tap(name, "out", Layout(TOKENS, TOKENS), nth=nth) for name, nth, _ in found]
        self.modules = [module for _, _, module in found]
        parts = [self._look_up(m, s.ids) for m, s in zip(self.modules, case.streams.values(), strict=True)]
        if len({part.shape[-1] for part in parts}) > 1:
            raise Refused(
                f"{self.model.name} embeds source and target tokens in widths that differ: attribute one token"
            )
        self.values = torch.cat(parts, 1)  # [1, position, d] of the prompt itself

    def _find(self) -> list[tuple[str, int, nn.Embedding]]:
        """For each credited stream the embedding module that is given its tokens, and at which of its calls."""
        module: Any = self.model.module
        calls, given = Counter[str](), list[tuple[str, int, Tensor]]()

        def seen(name: str) -> Callable[[Any, Any], None]:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor):
                    given.append((name, calls[name], args[0]))
                calls[name] += 1

            return hook

        tables = {n: m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
        hooks = [m.register_forward_pre_hook(seen(n)) for n, m in tables.items()]
        try:
            with torch.no_grad():
                self.output = module(**self.case.inputs.tensors)
        finally:
            for hook in hooks:
                hook.remove()
        return [self._of_stream(stream, given, tables) for stream in self.case.streams.values()]

    def _of_stream(
        self, stream: Stream, given: list[tuple[str, int, Tensor]], tables: dict[str, nn.Embedding]
    ) -> tuple[str, int, nn.Embedding]:
        found = [(name, nth) for name, nth, ids in given if torch.equal(ids, stream.ids)]
        if not found:
            raise Refused(f"{self.model.name} does not look its input tokens up in an embedding")
        module: Any = self.model.module
        own = module.get_input_embeddings()
        name, nth = next((f for f in found if tables[f[0]] is own), found[0])
        return name, nth, tables[name]

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
        moved = dict(zip(self.taps, self.case.split(embeddings), strict=True))
        handlers = {**(handlers or {}), **{tap: partial(_instead, part) for tap, part in moved.items()}}
        tensors = {
            k: v.repeat_interleave(rows, 0) if isinstance(v, Tensor) and v.ndim and len(v) == 1 else v
            for k, v in self.case.inputs.tensors.items()
        }
        with Wiretap(self.model.module, handlers, rows):
            return self.model.module(**tensors, **forward)

    def met(self, taps: list[Tap], embeddings: Tensor) -> dict[Tap, Tensor]:
        """What is met at taps when the model runs on these embeddings."""
        kept: dict[Tap, Tensor] = {}
        with torch.no_grad():
            self.run(embeddings, {tap: partial(kept.__setitem__, tap) for tap in taps})
        return kept

    def scores(self, embeddings: Tensor) -> Tensor:
        """[row, output] of the target, differentiable; where the last positions are read, only those are unembedded."""
        case = self.case
        if case.target.site is not None:
            return self._at_site(embeddings)
        stream = case.inputs.stream("")
        mask = stream.mask.expand(len(embeddings), -1)
        forward, read = self._forward
        return case.target.read(main_output(self.run(embeddings, **forward)), mask[:, -read:] if read else mask)

    @cached_property
    def _forward(self) -> tuple[dict[str, Any], int]:
        """Arguments that spare the model work nobody reads, and how many positions are unembedded (0: all)."""
        accepted = inspect.signature(self.model.module.forward).parameters
        forward: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        bound = self.case.target.bound
        assert bound is not None
        last = "logits_to_keep" in accepted and bound.positions and max(bound.positions) < 0
        if not last or self.case.inputs.stream("").padded:
            return forward, 0
        read = -min(bound.positions or (-1,))
        return {**forward, "logits_to_keep": read}, read

    def _at_site(self, embeddings: Tensor) -> Tensor:
        site = self.case.target.site
        assert site is not None
        tap, kept = locate(self.model.anatomy, site.whole).tap, dict[Tap, Tensor]()
        self.run(embeddings, {tap: partial(kept.__setitem__, tap)})
        return self.case.read(Run(self.model.anatomy, self.case.inputs, None, kept, [site.whole]).tensor(site))

    def batches(self, rows: int) -> int:
        """How many rows to run at once."""
        return max(1, min(rows, ROWS_OF_TOKENS // self.values.shape[1]))

    def gradients(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The targets [row, output] and their gradients [row, output, position, d]. Refused without a gradient."""
        with torch.enable_grad():
            embeddings = embeddings.detach().requires_grad_()
            scores = self.scores(embeddings)
            if not scores.requires_grad:
                raise Refused(
                    f"no gradient reaches the embeddings of {self.model.name}: its weights are quantised, or the target "
                    "counts; use a method that only runs the model (occlusion, shapley, lime)"
                )
            found = [
                torch.autograd.grad(scores[:, o].sum(), embeddings, retain_graph=o + 1 < scores.shape[1])[0]
                for o in range(scores.shape[1])
            ]
        return scores.detach(), torch.stack(found, 1)


def _instead(new: Tensor, old: Tensor) -> Tensor:
    return new
