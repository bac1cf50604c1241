"""Objectives in `transformers.Trainer`: its accelerate, schedules, logs, evaluation, checkpoints and resuming, our loss.

The loss is the one of `tuning.fit` (`fit.terms`), with three conventions kept that go wrong without a word elsewhere:

accumulation    a loss of one's own that is a mean is multiplied by the number of accumulated batches for most heads, because the
                Trainer asks the forward's signature, not the loss, whether it was scaled. Here it is said
                (`loss_is_scaled_for_ga = False`), and the cross-entropy is divided by all answers of the accumulated batches
columns         rows travel as their numbers, so none is dropped as unused
no number       with `logging_nan_inf_filter` the log says 0 while every weight becomes NaN: here the run stops before the backward pass,
                or before the step for a gradient

Runs are in evaluation mode, without dropout. One process; with several, gradients would have to be shared in the wrapper's forward.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.tuning.data import Encoded, Rationales
from pellucid.tuning.fit import check_finite, drawn_beside, terms
from pellucid.tuning.objective import NONE, Objective, parts
from pellucid.tuning.parts import choose

BESIDE = "beside.safetensors"  # what objectives train beside the model, in a checkpoint's folder


def trainer(
    model: Model, data: Rationales, objectives: Any, args: Any, *, test: Rationales | None = None, layers: Any = None,
    truncate: int | None = None, base: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """A `transformers.Trainer` that trains a copy of `model` with objectives: `.train()`, `.evaluate()` and the rest are its own.

    `args` are TrainingArguments, `layers` and `truncate` as in `fit`, `base` a subclass of Trainer to build on, `options` what its
    constructor takes besides (callbacks, optimizers). The tuned model is `.tuned`. InputError without accelerate;
    Refused in several processes, and as objectives say.

    >>> trainer(model, data, Consistency("decoy"), TrainingArguments("out")).train()  # doctest: +SKIP
    """
    try:
        import transformers

        base = base or transformers.Trainer
    except ImportError as error:
        raise InputError(f"transformers' Trainer needs accelerate: pip install accelerate ({error})") from None
    if args.world_size > 1 or args.n_gpu > 1:
        raise Refused("tuning.trainer runs in one process on one device: start it with one, or use tuning.fit")
    given = parts(objectives)
    encoded = Encoded(model, data, truncate)
    for each in given:
        each.check(model, encoded)
        if type(each).begun is not Objective.begun:
            raise Refused(
                f"{each.name} is a thing that is kept with what it learnt, and the Trainer has no place for it: use tuning.fit"
            )
    chosen = choose(model, layers)
    seed = int(args.data_seed or args.seed)
    beside = drawn_beside(chosen.model, encoded, given, seed)
    own = {f"{name}/{k}": t for name, each in beside.items() for k, t in each.items()}
    kept = frozenset(
        [*chosen.masks, *(name for each in given if each.weight > 0 for name in each.undecayed(chosen.model))]
    )
    held_out = None if test is None else Encoded(model, test, truncate)
    for each_p in chosen.model.module.parameters():
        each_p.requires_grad_(False)
    for name, p in chosen.parameters.items():
        p.requires_grad_(True)
        if name in chosen.masks:
            p.register_hook(partial(_masked, chosen.masks[name]))

    class Tuning(base):
        loss_is_scaled_for_ga = False
        tuned, tuned_beside = chosen.model, beside
        _at, _part = -1, 0
        _terms: Mapping[str, float] = MappingProxyType({})

        def get_decay_parameter_names(self, module: Any) -> list[str]:
            return [name for name in super().get_decay_parameter_names(module) if name not in kept]

        def create_optimizer(self, *given_model: Any) -> Any:
            fresh = self.optimizer is None
            made = super().create_optimizer(*given_model)
            if fresh and own:
                made.add_param_group({"params": [t.requires_grad_() for t in own.values()], "weight_decay": 0.0})
            return made

        def _save(self, output_dir: Any = None, *more: Any, **kwargs: Any) -> None:
            super()._save(output_dir, *more, **kwargs)
            if own:
                write_tensors(Path(output_dir or self.args.output_dir) / BESIDE, "pellucid_beside", {}, own)

        def _load_from_checkpoint(self, checkpoint: str, *more: Any, **kwargs: Any) -> None:
            super()._load_from_checkpoint(checkpoint, *more, **kwargs)
            if own:
                with reading_tensors(
                    Path(checkpoint) / BESIDE, "pellucid_beside", "is no checkpoint of these objectives"
                ) as (_, found):
                    for name, tensor in own.items():
                        tensor.data.copy_(found[name])

        def compute_loss(
            self, module: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            step = int(self.state.global_step)
            self._part = self._part + 1 if self._at == step else 0
            self._at = step
            batch = encoded.batch(inputs["row"].tolist(), step)
            with self.accelerator.autocast():
                found = terms(chosen.model, encoded, batch, given, seed, step, self._part, beside)
            self._terms = {name: float(value.detach()) for name, value in found.items()}
            check_finite(self._terms, step, chosen.model)
            task = found["task"]
            if num_items_in_batch is not None:
                task = task * (
                    len(batch.answers) / float(num_items_in_batch) * self.current_gradient_accumulation_steps
                )
            loss: Tensor = task + sum(each.weight * found[each.name] for each in given if each.name in found)
            return (loss, None) if return_outputs else loss

        def log(self, logs: dict[str, float], *more: Any, **kwargs: Any) -> None:
            super().log(logs | (dict(self._terms) if "loss" in logs else {}), *more, **kwargs)

        def prediction_step(self, module: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            source = held_out if held_out is not None else encoded
            batch = source.batch(inputs["row"].tolist())
            for each in given:
                batch = each.shown(chosen.model, batch, source, None, beside.get(each.name, NONE))
            with torch.no_grad(), self.accelerator.autocast():
                z = batch.read(chosen.model.run(batch.inputs, edits=batch.edits).logits)
            loss = torch.nn.functional.cross_entropy(z, batch.answers.to(z.device))
            whole = prediction_loss_only or batch.places is not None
            return (loss, None, None) if whole else (loss, z, batch.answers.to(z.device))

    class Stepping(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for t in own.values():
                t.grad = None  # the Trainer clears its module's gradients, not these
            done = (int(state.global_step) + 1) / max(int(state.max_steps), 1)
            for each in given:
                if each.weight > 0:
                    each.after(chosen.model, chosen.parameters, done, seed)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = [p.grad for p in (*chosen.parameters.values(), *own.values()) if p.grad is not None]
            check_finite(
                {"the gradient": float(torch.nn.utils.get_total_norm(grads))}, int(state.global_step), chosen.model
            )
            if own and args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(own.values(), args.max_grad_norm)

    def rows(source: Encoded) -> list[dict[str, int]]:
        return [{"row": i} for i in range(len(source))]

    def collate(items: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        numbers = [item["row"] for item in items]
        counts = [len(encoded.answers(i)) for i in numbers] if max(numbers) < len(encoded) else [1] * len(numbers)
        labels = torch.full(
            (len(numbers), max(counts) + 1), -100
        )  # one more: the Trainer does not count the first of a row
        for b, n in enumerate(counts):
            labels[b, 1 : n + 1] = 1
        return {"row": torch.tensor(numbers), "labels": labels}

    args = copy.copy(args)
    args.remove_unused_columns, args.label_names = False, ["labels"]
    made = Tuning(
        model=chosen.model.module, args=args, train_dataset=rows(encoded),
        eval_dataset=rows(held_out) if held_out is not None else None, data_collator=collate, **options,
    )  # fmt: skip
    made.model_accepts_loss_kwargs = True  # so that it counts the answers of the accumulated batches
    made.add_callback(Stepping())
    return made


def _masked(mask: Tensor, g: Tensor) -> Tensor:
    return g * mask.to(g)
