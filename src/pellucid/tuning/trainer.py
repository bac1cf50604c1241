"""Objectives in `transformers.Trainer`: its accelerate, schedules, logs, evaluation, checkpoints and resuming, our loss.

The loss is the one of `tuning.fit` (`fit.terms`), with three conventions kept that go wrong without a word elsewhere:

accumulation    a loss of one's own that is a mean is multiplied by the number of accumulated batches for most heads, because the
                Trainer asks the forward's signature, not the loss, whether it was scaled. Here it is said
                (`loss_is_scaled_for_ga = False`), and the cross-entropy is divided by all answers of the accumulated batches
columns         rows travel as their numbers, so none is dropped as unused
no number       with `logging_nan_inf_filter` the log says 0 while every weight becomes NaN: here the run stops, and the weights are put
                back to those of the last step at which loss and gradient were numbers

Runs are in evaluation mode, without dropout. One process; with several, gradients would have to be shared in the wrapper's forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.tuning.data import Encoded, Rationales
from pellucid.tuning.fit import COPIED, Good, check_finite, drawn_beside, terms
from pellucid.tuning.objective import NONE, parts
from pellucid.tuning.parts import choose

BESIDE = "beside.safetensors"  # what objectives train beside the model, in a checkpoint's folder


def trainer(
    model: Model, data: Rationales, objectives: Any, args: Any, *, test: Rationales | None = None, layers: Any = None,
    head_learning_rate: float | None = None, truncate: int | None = None, base: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """A `transformers.Trainer` that trains a copy of `model` with objectives: `.train()`, `.evaluate()` and the rest are its own.

    `args` are TrainingArguments, `layers`, `head_learning_rate` and `truncate` as in `fit`, `base` a subclass of Trainer to build on, `options` what
    its constructor takes besides (callbacks, optimizers). The tuned model is `.tuned`; `.tuned_objectives` are the objectives with what they learnt
    (a `Bottleneck`, a `Select`: `save`, `check(model)`), and `.tuned_edits()` what the model is run under. InputError without accelerate; Refused in
    several processes, and as objectives say.

    >>> made = trainer(model, data, Consistency("decoy"), TrainingArguments("out"))
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
    chosen = choose(model, layers)
    seed = int(args.data_seed or args.seed)
    given = tuple(each.begun(chosen.model, encoded, seed) if each.weight > 0 else each for each in given)
    beside = drawn_beside(chosen.model, encoded, given, seed)
    own = {f"{name}/{k}": t for name, each in beside.items() for k, t in each.items()}
    kept = frozenset(
        [*chosen.masks, *(name for each in given if each.weight > 0 for name in each.undecayed(chosen.model))]
    )
    good = Good(chosen.parameters | own)
    held_out = None if test is None else Encoded(model, test, truncate)
    for each_p in chosen.model.module.parameters():
        each_p.requires_grad_(False)
    for name, p in chosen.parameters.items():
        p.requires_grad_(True)
        if name in chosen.masks:
            p.register_hook(partial(_masked, chosen.masks[name]))

    class Tuning(base):
        loss_is_scaled_for_ga = False
        tuned, tuned_beside, tuned_objectives = chosen.model, beside, given
        _at, _part = -1, 0
        _terms: Mapping[str, float] = MappingProxyType({})

        def get_decay_parameter_names(self, module: Any) -> list[str]:
            return [name for name in super().get_decay_parameter_names(module) if name not in kept]

        def create_optimizer(self, *given_model: Any) -> Any:
            fresh = self.optimizer is None
            made = super().create_optimizer(*given_model)
            if fresh:
                rate = self.args.learning_rate if head_learning_rate is None else head_learning_rate
                heads = {id(p) for name, p in chosen.parameters.items() if name in chosen.head}
                for group in list(made.param_groups) if heads and head_learning_rate is not None else ():
                    theirs = [p for p in group["params"] if id(p) in heads]
                    group["params"] = [p for p in group["params"] if id(p) not in heads]
                    if theirs:
                        made.add_param_group({**group, "params": theirs, "lr": rate})
                for copied in (True, False):
                    ours = [t.requires_grad_() for name, t in own.items() if (COPIED in name) == copied]
                    if ours:
                        at = self.args.learning_rate if copied else rate
                        made.add_param_group({"params": ours, "weight_decay": 0.0, "lr": at, "beside": True})
            return made

        def tuned_edits(self) -> tuple[Edit, ...]:
            active = [each for each in given if each.weight > 0]
            return tuple(e for each in active for e in each.edits(chosen.model, beside.get(each.name, NONE)))

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
            check_finite(self._terms, step, chosen.model, good)
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
        rates: Sequence[float] = ()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for each in given:
                if each.weight > 0:
                    each.ended(chosen.model)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
            for t in own.values():
                t.grad = None  # the Trainer clears its module's gradients, not these
            done = (int(state.global_step) + 1) / max(int(state.max_steps), 1)
            for each in given:
                if each.weight > 0:
                    each.after(chosen.model, chosen.parameters, done, seed)

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            self.rates = [group["lr"] for group in optimizer.param_groups]
            pace = math.prod(each.pace(int(state.global_step)) for each in given if each.weight > 0)
            for group in optimizer.param_groups:
                group["lr"] *= 1.0 if group.get("beside") else pace
            grads = [p.grad for p in (*chosen.parameters.values(), *own.values()) if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            check_finite({"the gradient": norm}, int(state.global_step), chosen.model, good)
            good.keep()
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
