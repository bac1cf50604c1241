"""Readers of internals in trainers that are not ours: trl's SFT, DPO, reward and policy trainers, and any of transformers.

    loss of the trainer + sum of weight * penalty       penalties are ProbePenalty, read in the passes that the trainer itself makes

The trainer makes its own batches and its own loss; states are read where its passes go through the site, with their gradients,
so nothing is computed twice. A trainer that divides its loss by accumulated batches itself gets the penalty divided too, so
that a penalty weighs the same however the batch is split. Reference models and evaluation pass through unread.

Where a policy is rewarded for text (GRPO, RLOO), `reward` is the other form: a number for each completion, no gradient through the
reader. Published work finds that gradients through a reader buy activations that hide, and rewards change the text: say which, and
ask `evasion` of what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.wiretap import Wiretap
from pellucid.engine.locate import locate
from pellucid.errors import InputError, Refused
from pellucid.model import Model, load
from pellucid.tuning.internals import ProbePenalty, mean, scored
from pellucid.tuning.objective import parts


def with_internals(base: Any, penalties: Any) -> Any:
    """A subclass of a trainer class (`trl.SFTTrainer`, `trl.DPOTrainer`, `transformers.Trainer`) whose loss has the penalties added.

    `penalties` are ProbePenalty values; with `where="completion"` they read the tokens that the trainer marks as completion (its
    `completion_mask`, or labels that are not -100), else all that are no padding. InputError for other objectives, whose batches are
    `tuning.trainer`'s; Refused for packed rows, where texts have no bounds.

    >>> with_internals(trl.SFTTrainer, ProbePenalty(reader))(model, args=args, train_dataset=rows).train()  # needs minutes  # doctest: +SKIP
    """
    given: list[ProbePenalty] = []
    for each in parts(penalties):
        if not isinstance(each, ProbePenalty) or each.where not in (None, "completion"):
            raise InputError(
                f"{each!r}: expected ProbePenalty values (where=None or 'completion'): another trainer's batches have no spans; use tuning.trainer"
            )
        given += [each] if each.weight > 0 else []

    class Internal(base):
        _opened: Model | None = None
        _terms: Mapping[str, float] = MappingProxyType({})

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            def theirs() -> Any:
                return super(Internal, self).compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
                )

            if not given or not torch.is_grad_enabled():
                return theirs()
            if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
                raise Refused(
                    "rows are packed, so a text's states cannot be told apart: set packing=False and padding_free=False"
                )
            if self._opened is None:
                module = self.accelerator.unwrap_model(self.model)
                with torch.random.fork_rng():
                    self._opened = load(module, tokenizer=getattr(self, "processing_class", None))
            masks = {None: _mask(inputs), "completion": _mask(inputs, True)}
            found, met = _reading(self._opened, given, theirs)
            loss = found[0] if return_outputs else found
            terms = {}
            for k, each in enumerate(given):
                if not met[k]:
                    raise InputError(
                        f"no pass of {base.__name__} went through {each.reader.site!r}: is it of the model that is trained?"
                    )
                terms[f"{each.name} {k}" if len(given) > 1 else each.name] = torch.stack(
                    [_cost(each, x, masks[each.where]) for x in met[k]]
                ).mean()
            self._terms = {name: float(value.detach()) for name, value in terms.items()}
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:
                counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                scaled = counted or self.compute_loss_func is not None
            times = self.current_gradient_accumulation_steps if scaled else 1
            loss = loss + sum(each.weight * value for each, value in zip(given, terms.values(), strict=True)) / times
            return (loss, found[1]) if return_outputs else loss

        def log(self, logs: dict[str, float], *more: Any, **more_kwargs: Any) -> None:
            super().log(logs | (dict(self._terms) if "loss" in logs else {}), *more, **more_kwargs)

    Internal.__name__ = f"{base.__name__}WithInternals"
    return Internal


def _reading(model: Model, given: Sequence[ProbePenalty], forward: Callable[[], Any]) -> tuple[Any, list[list[Tensor]]]:
    """What a forward gives, and the states [row, position, d] with gradients that its passes had at each reader's site."""
    met: list[list[Tensor]] = [[] for _ in given]
    taps: dict[Any, list[int]] = {}
    for k, each in enumerate(given):
        (site,) = each.sites(model)
        taps.setdefault(locate(model.anatomy, site).tap, []).append(k)

    def handler(which: list[int]) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if x.requires_grad:
                for k in which:
                    met[k].append(x)

        return see

    with Wiretap(model.module, {tap: handler(which) for tap, which in taps.items()}, 1):
        return forward(), met


def _mask(inputs: Mapping[str, Any], completion: bool = False) -> Tensor | None:
    mask = inputs.get("attention_mask")
    if mask is None and isinstance(inputs.get("input_ids"), Tensor):
        mask = torch.ones_like(inputs["input_ids"])
    if not completion:
        return mask
    if inputs.get("completion_mask") is not None:
        return inputs["completion_mask"] * mask
    return (inputs["labels"] != -100).long() if isinstance(inputs.get("labels"), Tensor) else None


def _cost(penalty: ProbePenalty, x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != x.shape[:2]:
        told = None if mask is None else list(mask.shape)
        raise Refused(
            f"{penalty.name}: states are {list(x.shape[:2])} and the trainer's mask is {told}: expected one mark for each token"
        )
    return scored(penalty.reader(mean(x, mask.to(x.device))).float(), penalty.form).mean()


def reward(model: Model, reader: Any, *, sign: float = 1.0) -> Callable[..., list[float]]:
    """A reward function as trl's policy trainers take them (`reward_funcs=`): `sign` times a reader's score, mean over each completion's
    tokens, read in `model` (the policy itself, or a fixed copy that the policy cannot hide from by moving its own states).

    >>> trl.GRPOTrainer(module, reward_funcs=[reward(model, reader)], args=args, train_dataset=rows)  # needs minutes  # doctest: +SKIP
    """
    (site,) = ProbePenalty(reader).sites(model)

    @torch.no_grad()
    def internal(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        made = []
        for prompt, completion in zip(prompts, completions, strict=True):
            whole = prompt + completion if isinstance(prompt, str) else [*prompt, *completion]
            inputs = model.inputs([whole])
            x = model.run(inputs, keep=[site]).tensor(site)
            first = min(int(model.inputs([prompt]).stream("").lengths[0]), x.shape[1] - 1)
            made.append(sign * float(reader(x[:, first:].mean(1)).float()))
        return made

    internal.__name__ = f"reward of {reader.site}"
    return internal
