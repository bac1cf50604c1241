"""The model a user holds: a loaded module with its tokenizer, its proven anatomy, and every way to run it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import nn

from pellucid.anatomy.fingerprint import Memo
from pellucid.anatomy.loading import Loaded, Task, read
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import differentiable, running
from pellucid.anatomy.opening import open_module
from pellucid.anatomy.sites import Site
from pellucid.changed import Change, applied, check_weights, differences, told
from pellucid.engine.components import Layers
from pellucid.engine.edits import Edit, moving, resolved
from pellucid.engine.generation import Generated, generate, loop_of
from pellucid.engine.given import Truncate
from pellucid.engine.inputs import Inputs, Spans, Stream, beside, left_padded, pad_index, read_inputs, vocabulary
from pellucid.engine.locate import expand
from pellucid.engine.padding import Padding
from pellucid.engine.peak import ROWS, predicted
from pellucid.engine.run import Run, execute, holding
from pellucid.engine.sampling import number, sampling
from pellucid.engine.saved import load_changes, save_changes
from pellucid.engine.steps import Monitored, Watch, guards_of, watchers
from pellucid.engine.sweep import Plan, Sweep, Where, plan_sweep, reader
from pellucid.engine.watching import run_until
from pellucid.errors import InputError, Refused, SiteError, checked, listed
from pellucid.metrics import BoundMetric, Metric, as_metric, meant, placed

T = TypeVar("T")


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    task: Task = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    tp_plan: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    probe: Mapping[str, Any] | None = None,
) -> Model:
    """Open a model: a hub id, a local directory, a `.gguf` file, a pipeline, or a module in memory with its tokenizer.

    `tokenizer` is one, or where to read it; False is none (for token ids). `task` names the head; "auto" follows the checkpoint.
    `dtype` is the checkpoint's own by default (float32 for GGUF), `device` one device, `device_map` transformers' map over
    several, `tp_plan` splits weights over the processes of torchrun, `quantization_config` is transformers' own. `base` is the
    model of an adapter that is kept alone. Pickles and code of the checkpoint's own are read only when asked for by name.
    `probe` are forward arguments to prove the map with, for models that take more than token ids. LoadError says what is
    missing and what to do.
    """
    given = {
        "task": task, "dtype": dtype, "device": device, "device_map": device_map, "tp_plan": tp_plan, "revision": revision, "base": base,
        "quantization_config": quantization_config, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    options: dict[str, Any] = {
        k: v
        for k, v in given.items()
        if v is not None and v is not False and not (k == "task" and isinstance(v, str) and v == "auto")
    }
    model = Model(read(source, tokenizer=tokenizer, **options), probe)
    kept = "module" if isinstance(source, nn.Module) else "pipeline"
    words = [repr(model.name) if model.named else kept, *(f"{k}={v!r}" for k, v in options.items())]
    if tokenizer is not None:
        words.insert(1, f"tokenizer={tokenizer!r}" if isinstance(tokenizer, str) else "tokenizer=tokenizer")
    model.opened = f"pl.load({', '.join(words)})"
    model.source = {"source": source, "tokenizer": tokenizer, "probe": probe, **options}
    return model


@dataclass(frozen=True)
class Components:
    """One stack of a model, by its blocks."""

    layers: Layers


class Model:
    """A model opened: `anatomy` is its proven map; `run`, `generate` and `sweep` are the ways in.

    The module is the user's own and is left as it was.
    """

    def __init__(self, loaded: Loaded, probe: Mapping[str, Any] | None = None, known: Anatomy | None = None) -> None:
        self.loaded = loaded
        self.module, self.tokenizer = loaded.module, loaded.tokenizer
        self.name = loaded.name + (f" + {told(loaded.changes)}" if loaded.changes else "")
        self.opened = "pl.load(module, tokenizer=tokenizer)"  # the expression that opens it, which `load` knows better
        self.source: dict[str, Any] = {}  # what `load` was called with
        self.base: Model | None = None  # the model that `loaded.changes` are made on
        self._steps: tuple[int, ...] = ()  # how many changes were made at a time
        self._open(probe, known)

    def _open(self, probe: Mapping[str, Any] | None, known: Anatomy | None = None) -> None:
        self._anatomy: Anatomy = open_module(self.module, probe, known)
        self._anatomy.memo = Memo(self.loaded.weights)  # which hears of changes that the digest notices
        self._verdicts = Padding(self._anatomy)
        self._stacks: dict[str, Components] = {}

    @property
    def anatomy(self) -> Anatomy:
        """The proven map; found and proven anew where modules were exchanged since (an adapter put in or taken out)."""
        if self._anatomy.outdated:
            self._open(self._anatomy.inputs)
        return self._anatomy

    @property
    def _padding(self) -> Padding:
        """The verdicts on padding of the model as it is now."""
        _ = self.anatomy
        return self._verdicts

    @property
    def named(self) -> bool:
        """Whether it can be opened again by its name; a module in memory cannot."""
        return self.loaded.name != type(self.module).__name__

    @property
    def digest(self) -> str:
        """A fingerprint of the weights as they are now: also after a change in place (see `anatomy.fingerprint`)."""
        return self.loaded.digest

    @property
    def vocabulary(self) -> int:
        """How many tokens it embeds. InputError for a family that embeds tokens in a way of its own."""
        if (size := vocabulary(self.module)) is None:
            raise InputError(f"{self.name} has no table of token embeddings: it has no tokens to draw from")
        return size

    def __repr__(self) -> str:
        stacks = ", ".join(f"{s.name + ' ' if s.name else ''}{len(s.blocks)} layers" for s in self.anatomy.stacks)
        failed = [p.name for p in self.anatomy.proofs if p.holds is False]
        state = f"proofs failed: {', '.join(failed)}" if failed else "proven"
        notes = "".join(f"; {note}" for note in self.loaded.notes)
        return f"<Model {self.name}: {type(self.module).__name__}, {stacks}, d_model {self.anatomy.stacks[-1].d_model}; {state}{notes}>"

    # ---- changed weights

    def changed(self, changes: Change | Iterable[Change] | str | Path) -> Model:
        """This model with changes (`pellucid.changed`), as a model of its own that shares every untouched tensor.

        This one keeps every bit, so it is the undo. The map is found and proven anew where it was touched; a proof that
        fails is named by the new model. InputError or Refused for a change that cannot be made. Of no changes: a twin.
        A file is one that `save_changes` wrote: InputError where it belongs to other weights than this model's.
        """
        if isinstance(changes, str | Path):
            found, digest = load_changes(changes, self)
            made = self.changed(found)
            if made.digest != digest:
                raise InputError(
                    f"the changes in {str(changes)!r} make other weights here ({made.digest[:12]}) than where they were saved "
                    f"({digest[:12]}): numbers drawn from a seed differ between versions of torch"
                )
            return made
        changes = (changes,) if isinstance(changes, Change) else tuple(changes)
        return self._with(changes, (len(changes),))

    def _with(self, changes: tuple[Change, ...], steps: tuple[int, ...]) -> Model:
        loaded = self.loaded.twin(applied(self.module, changes), changes)
        model = Model(loaded, self.anatomy.inputs, self.anatomy)
        model.opened, model.base, model._steps = self.opened, self.base or self, self._steps + steps
        return model

    def save_changes(self, path: str | Path) -> Path:
        """Write what was done to this model as one safetensors file, which `pl.load(...).changed(path)` does again; returns the path.

        The file belongs to the weights of `base`. Changes of low rank stay factors; what they do not say (this model was
        trained since) is kept as whole parameters. InputError, and nothing written, for a model without changes and for one
        that holds a foreign module.

        >>> edited = model.changed(pl.changed.Copied(("model.norm.weight",)))
        >>> edited.save_changes("edit.safetensors")
        PosixPath('edit.safetensors')
        """
        if self.base is None:
            raise InputError(f"{self.name} carries no changes: there is nothing to save")
        return save_changes(self.base, self.loaded.changes, self, path)

    def undo(self, *which: int) -> Model:
        """The model without its last change (all that one call of `changed` made), or without those with these numbers in
        `loaded.changes`: those that stay are made again on `base`, in their order, so every bit is as if it had never been.
        Without any left it is `base` itself. InputError where there is no such change.
        """
        changes, base = self.loaded.changes, self.base
        outside = next((i for i in which if not -len(changes) <= i < len(changes)), None)
        if base is None or outside is not None:
            there = "no changes" if base is None else f"{len(changes)} (numbers 0 to {len(changes) - 1})"
            raise InputError(
                f"{self.name} carries {there}: there is {'nothing' if base is None else f'no change {outside}'} to undo"
            )
        gone = {i % len(changes) for i in which} if which else set(range(len(changes) - self._steps[-1], len(changes)))
        ends = [0, *accumulate(self._steps)]
        left = [[i for i in range(a, b) if i not in gone] for a, b in pairwise(ends)]
        steps = tuple(len(each) for each in left if each)
        return base._with(tuple(changes[i] for each in left for i in each), steps) if steps else base

    def diff(self) -> pd.DataFrame:
        """Which parameters differ from those of `base`, largest first: `relative` |W' - W| / |W| and `largest`, the largest
        difference of one number; NaN where the base has no such parameter. Parameters that only stand elsewhere are the same.
        """
        found = {} if self.base is None else differences(self.base.module, self.module)
        table = pd.DataFrame.from_dict(found, orient="index", columns=["relative", "largest"])
        return table.rename_axis("parameter").sort_values("relative", ascending=False)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Something worked out once about this model under a key, and forgotten when a weight changes."""
        return self.anatomy.memo(key, make)

    # ---- components as sub-models

    @property
    def layers(self) -> Layers:
        """The blocks as sub-models: `model.layers[3]`, `model.layers[2:6]`, `model.layers[5].attn.heads[9]`."""
        if len(self.anatomy.stacks) > 1:
            names = " or ".join(f"model.{s.name}.layers" for s in self.anatomy.stacks)
            raise SiteError(f"this model has {len(self.anatomy.stacks)} stacks: write {names}")
        return self._components("").layers

    @property
    def encoder(self) -> Components:
        """The encoder of an encoder-decoder: `model.encoder.layers[3]`."""
        return self._components("encoder")

    @property
    def decoder(self) -> Components:
        """The decoder of an encoder-decoder: `model.decoder.layers[3]`."""
        return self._components("decoder")

    def _components(self, name: str) -> Components:
        anatomy = self.anatomy
        if name not in self._stacks:
            stack = next((s for s in anatomy.stacks if s.name == name), None)
            if stack is None:
                raise SiteError(f"this model has no {name}: it has one stack, model.layers")
            self._stacks[name] = Components(Layers(anatomy, stack, self.inputs))
        return self._stacks[name]

    # ---- addresses and inputs

    def sites(self, pattern: str | Site) -> list[Site]:
        """The concrete sites a pattern such as `layers.*.attn.heads.*` names on this model."""
        return expand(self.anatomy, pattern)

    def inputs(
        self,
        prompt: Any,
        *,
        decoder: str | Sequence[str] | None = None,
        spans: Spans | None = None,
        truncate: Truncate | None = None,
    ) -> Inputs:
        """Prompts tokenised for this model, with positions that can be named; every method takes them as its prompt.

        `truncate` cuts what is too long: "left" or "right" to what the model holds, a number of tokens, or ("left", 128).
        What a prompt can be: `pellucid.engine.given`. Refused if this model computes something else for the real tokens when
        they are padded as these prompts are.
        """
        with running(self.module):
            made = read_inputs(self.module, self.tokenizer, prompt, decoder=decoder, spans=spans, truncate=truncate)
            return self._padding.fit(made)

    def beside(self, several: Sequence[Inputs], times: Sequence[int]) -> Inputs:
        """Unpadded prompts as one batch, the i-th times[i] times, with the positions their padding needs."""
        return self._padding.fit(beside(several, times, pad_index(self.module, self.tokenizer)))

    def flush(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """Token ids of several lengths as one batch, padded on the left as generating needs it, with the positions this takes."""
        width, pad = max(map(len, rows)), pad_index(self.module, self.tokenizer)
        device = next(self.module.parameters()).device
        ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        stream = Stream(ids, mask, (("",) * width,) * len(rows))
        given = Inputs({"input_ids": ids, "attention_mask": mask}, {"": stream}, ("",) * len(rows))
        with running(self.module):
            return self._padding.fit(given, generating=True)

    @property
    def paddable(self) -> bool:
        """Whether this model computes the same for prompts that are padded on the right."""
        ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1, 0]])
        try:
            self._padding.fit(Inputs({}, {"": Stream(ids, mask, (("",),))}, ("",)))
        except Refused:
            return False
        return True

    # ---- running

    @checked
    def run(
        self,
        prompt: Any,
        *,
        keep: Iterable[str | Site] | str = (),
        edits: Sequence[Edit] = (),
        grad_of: Metric | Any = None,
        grad: bool = False,
        logits: bool = True,
        keep_on: str | torch.device | Path | None = None,
        decoder: str | Sequence[str] | None = None,
        spans: Spans | None = None,
        on: Where | None = None,
    ) -> Run:
        """Run prompts, keeping the tensors at some sites and editing others.

        `grad_of` is a metric: the run then also holds its gradient at every kept site. `decoder` is what the decoder of
        an encoder-decoder is given. Unknown sites, edits that never fire and prompts that do not align are errors.

        A run computes in evaluation mode and keeps no autograd graph. `grad=True` asks for one, to differentiate logits and
        kept values with respect to tensors of yours; so does an edit with a tensor that requires grad, unless gradients are switched off. With
        `logits=False` it ends at the last site that is kept or edited: what comes after is not computed.

        `keep_on` is where kept values go as soon as they are met: a device ("cpu" frees the accelerator), or the Path of a folder, whose
        files they are then. `memory` says what a run will take. `on`: `pl.VLLM()`, whose engine runs it.
        """
        edits, keep, there = _edits(edits), _kept(keep), reader(on)
        put = holding(keep_on)
        if put is not None and grad:
            raise InputError("keep_on= takes values out of the graph that grad=True asks for: leave out one of them")
        if not logits and (grad_of is not None or not keep):
            raise InputError("logits=False ends a run at its last kept site: give keep=, and no grad_of=")
        if there is not None and (grad or grad_of is not None or moving(edits)):
            raise Refused(f"{there!r} computes without gradients: leave on= out")
        with (
            torch.set_grad_enabled(grad or torch.is_grad_enabled()),
            differentiable(self.module, grad or moving(edits)),
        ):
            inputs = self.inputs(prompt, decoder=decoder, spans=spans)
            metric = None if grad_of is None else self.bind(grad_of, len(inputs), inputs)
            edits = self.resolved(edits)
            if there is not None:
                made: Run = there.execute(self, inputs, keep, edits, logits, put)
                return made
            if not logits:
                return run_until(self.anatomy, inputs, keep, edits, grad, put)
            score = None if metric is None else lambda run: self.score(run, metric)
            return execute(self.anatomy, inputs, keep, edits, score, put=put)

    def memory(
        self,
        prompt: Any,
        *,
        keep: Iterable[str | Site] | str = (),
        grad_of: Metric | Any = None,
        decoder: str | Sequence[str] | None = None,
    ) -> int:
        """About how many bytes beyond the weights `run` takes at its peak, known from three short runs (`pellucid.engine.peak`).

        Sites that are kept at some positions count as whole. A sweep's is `plan.peak`.

        >>> round(model.memory(prompt, keep="layers.*.resid_post") / 2**20)  # MiB
        1
        """
        with running(self.module):
            inputs, asked = self.inputs(prompt, decoder=decoder), None
            sites = [replace(s, at=None) for k in _kept(keep) for s in self.sites(k)]
            bound = None if grad_of is None else self.bind(grad_of, len(inputs), inputs)
            few = None if bound is None else bound.rows(range(min(len(inputs), ROWS)))
            rows = None if bound is None or few is not None else len(inputs)

            def work(cut: Inputs) -> Run:
                score = None if bound is None else lambda run: self.score(run, asked)
                return execute(self.anatomy, cut, sites, (), score)

            asked = few if few is not None and len(inputs) > ROWS else bound
            ends = [p + 1 if p >= 0 else -p for p in (() if bound is None else bound.positions or ())]
            return round(predicted(work, inputs, rows, max(ends, default=0)).most)

    @checked
    def generate(
        self,
        prompt: Any,
        *,
        decoder: str | Sequence[str] | None = None,
        edits: Sequence[Edit] = (),
        keep: Iterable[str | Site] | str = (),
        when: Watch | Sequence[Watch] = (),
        monitors: Monitored | Sequence[Monitored] = (),
        scores: bool = False,
        max_new_tokens: int = 40,
        min_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Any = (),
        num_return_sequences: int = 1,
        stream: Any = None,
        seed: int = 0,
        use_cache: bool = True,
        on: Where | None = None,
        **options: Any,
    ) -> Generated:
        """Continue prompts, as transformers does; greedy unless sampling is asked for. `print` the result for its text.

        Sampling options are transformers' own by its names, and further ones of its GenerationConfig are taken as `options`.
        What is not given is what the checkpoint's generation config says, then transformers' default (`top_k` is 50 there:
        `top_k=0` draws from the whole vocabulary). The tokens are those of transformers after `torch.manual_seed(seed)`.

        stop: texts, compiled regular expressions or token ids that end a row; they stay in its text. stream: True prints,
        a function is given each new piece of text and its row. keep: sites, for every token written or, with positions, of
        the prompt. when: `pl.Watch`es, which see each step and may stop, redirect or give a text to single rows. monitors: readers
        with a threshold and an action (`pl.safety`); `generated.firings` is what they saw. An edit
        with a `when=` acts in the rows and steps where that holds. Messages that end with the assistant's are continued.
        An encoder-decoder begins with `decoder`, of one length for all prompts. `on`: `pl.VLLM()`, whose engine writes; what is
        sampled is drawn by it, so it is not what is drawn here.
        """
        edits, keep, there = _edits(edits), _kept(keep), reader(on)
        call = {k: v for k, v in locals().items() if k not in ("self", "options", "stream", "there")} | options
        told = sampling(max_new_tokens, min_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, **options)
        number("num_return_sequences", num_return_sequences, 1, whole=True)
        beams = told.get("num_beams", 1) != 1
        if num_return_sequences > 1 and not told["do_sample"] and not beams:
            raise InputError("num_return_sequences above 1 needs sampling, else all are the same: give a temperature")
        loop_of(self.module)  # whether it generates comes before how its prompts are padded
        with running(self.module):
            inputs = read_inputs(self.module, self.tokenizer, prompt, decoder=decoder)
            inputs = self._padding.fit(left_padded(inputs), generating=True)
        if beams:
            told["num_return_sequences"] = num_return_sequences
        elif num_return_sequences > 1:
            inputs = inputs.rows([i for i in range(len(inputs)) for _ in range(num_return_sequences)])
        if there is not None:
            asked = {
                "keep=": keep,
                "when=": when,
                "monitors=": monitors,
                "scores=": scores,
                "stop=": stop,
                "stream=": stream,
            }
            if name := next((name for name, value in asked.items() if value), None):
                raise Refused(f"{name} is not had while {there!r} generates: leave it out, or on=")
            written: Generated = there.generate(self, inputs, told, self.resolved(edits), seed, call)
            return replace(written, model=self)
        guards = guards_of(monitors, self)
        made = generate(
            self.anatomy,
            self.tokenizer,
            inputs,
            told,
            edits=self.resolved(edits),
            keep=keep,
            when=(*watchers(when), *(guard.watch for guard in guards)),
            scores=scores,
            stop=stop,
            stream=stream,
            seed=seed,
            use_cache=use_cache,
            resolve=self.resolved,
            call=call,
        )
        return replace(made, model=self, guards=guards)

    @checked
    def plan(
        self,
        prompt: Any,
        variants: Sequence[Edit | Sequence[Edit]],
        metric: Metric | Any,
        *,
        decoder: str | Sequence[str] | None = None,
        spans: Spans | None = None,
        memory: int | None = None,
        checkpoint: str | Path | None = None,
        executor: str | None = None,
    ) -> Plan:
        """How a sweep would be run: `plan.explain()` gives its cost in forward passes, `plan.run()` runs it.

        `memory` bounds the bytes a batch may take; `checkpoint` is a file that keeps what is done, so that an
        interrupted sweep continues; `executor` names one of the rungs, `pellucid.engine.rungs.LADDER`.
        """
        with running(self.module):
            return self._plan(prompt, variants, metric, decoder, spans, memory, checkpoint, executor)

    def _plan(
        self,
        prompt: Any,
        variants: Any,
        metric: Any,
        decoder: Any,
        spans: Any,
        memory: Any,
        checkpoint: Any,
        executor: Any,
    ) -> Plan:
        inputs = self.inputs(prompt, decoder=decoder, spans=spans)
        variants = listed("variants", variants, "edits, or lists of edits, one for each variant")
        flat = [[v] if isinstance(v, Edit) else listed("a variant", v, "edits") for v in variants]
        ready = iter(self.resolved([e for v in flat for e in v]))
        variants = [[next(ready) for _ in v] for v in flat]
        return plan_sweep(
            self.anatomy, inputs, variants, self.bind(metric, len(inputs), inputs), memory, checkpoint, executor, self
        )

    def sweep(
        self,
        prompt: Any,
        variants: Sequence[Edit | Sequence[Edit]],
        metric: Metric | Any,
        *,
        on: Where | None = None,
        **options: Any,
    ) -> Sweep:
        """Score the prompts under each of many sets of edits: `.values` [variant, batch], `.clean` [batch].

        Gives the numbers of running them one by one, for a fraction of the cost; options are those of `plan`, and `on`: where
        it is run (`pl.Processes(2)`, `pl.Ray()`; see `pellucid.workers`).
        """
        return self.plan(prompt, variants, metric, **options).run(on)

    def resolved(self, edits: Sequence[Edit]) -> list[Edit]:
        """Edits whose sources are prompts, with those prompts run. InputError for one made for other weights."""
        edits, own = _edits(edits), ""  # its weights are looked at once, not for every edit
        for edit in edits:
            if not isinstance(edit, Edit):
                raise InputError(f"{edit!r} is no edit: give some, such as [pl.Ablate('layers.0.mlp.out')]")
            if edit.digest and edit.digest != (own := own or self.memo("digest", lambda: self.digest)):
                check_weights(self, edit.digest, f"the {type(edit).__name__} at {edit.site}")

        def source(prompts: Any, sites: list[Site]) -> Run:
            return run_until(self.anatomy, self.inputs(prompts), sites)  # nobody reads its logits

        with running(self.module):
            return resolved(self.anatomy, edits, source)

    # ---- metrics

    def bind(self, metric: Metric | Any, batch: int = 1, inputs: Inputs | None = None) -> BoundMetric:
        """The metric with its answers as token ids of this model's vocabulary, or as numbers of its classes; without a
        position of its own it is read where `inputs` are answered (the end, the mask), without these at the end.

        InputError where the model's logits are not what the metric reads: a token of a model without a head, a class
        of one that gives tokens.
        """
        answering = self.anatomy.answering
        asked = as_metric(metric)
        asked = asked if inputs is None else placed(self, inputs, asked)
        made = meant(asked, self.name, answering).bind(self.tokenizer, batch)
        size = made.size if made.tokens is None else max(made.size, int(made.tokens.max()) + 1)
        answering.check(self.name, made.name, made.classes, made.positions is not None, size)
        return made

    def score(self, run: Run, metric: Metric | Any) -> Any:
        """The metric's value for each prompt of a run, [batch]."""
        return self.bind(metric, len(run.inputs), run.inputs).score(run.logits, run.inputs.stream("").mask)


def _edits(edits: Any) -> list[Edit]:
    """The edits a run is asked to make: one, several or none."""
    if edits is None or isinstance(edits, Edit):
        return [edits] if edits else []
    return listed("edits", edits, "a list, such as [pl.Ablate('layers.0.mlp.out')]")


def _kept(keep: Any) -> list[str | Site]:
    """The sites a run is asked to keep: one, several or none."""
    if keep is None or isinstance(keep, str | Site):
        return [keep] if keep else []
    return listed("keep", keep, "addresses of sites, such as ['layers.0.resid_post']")
