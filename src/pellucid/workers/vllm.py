"""vLLM as a reader (extra `vllm`): prompts run, generated from and harvested by its engine, at sites that are proven equal first.

    fast = pl.VLLM(gpu_memory_utilization=.8)
    store_activations(model, corpus, ["layers.15.resid_post"], "store", batch=256, on=fast)
    model.generate(prompts, edits=[pl.Steer("layers.15.resid_post", direction)], on=fast)

vLLM has modules of its own: fused projections, a decoder layer that returns two tensors whose sum is the stream, all prompts
packed into one row of tokens. So where a site is met is not told by names: a probe of three lengths is run here and there, and a
site is offered at the module whose values are the ones here (largest relative error of a token at most `tolerance`), and for
edits where an edit of it there gives the logits that it gives here. Whatever was not found equal is refused. Every call counts
its tokens: a hook that was skipped, as compiled graphs skip them, is an error. Nothing is pickled: the engine runs in this
process, and in every process of torchrun where weights are split.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.engine.edits import Ablate, Clamp, Edit, Patch, Place, ProjectOut, Rotate, Scale, Steer
from pellucid.engine.generation import Generated, decoded, ends_of, loop_of
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.locate import Spot, locate, spots
from pellucid.engine.run import Put, Run
from pellucid.engine.sweep import Plan, on
from pellucid.errors import InputError, PellucidError, Refused, SiteError, one_of
from pellucid.model import Model
from pellucid.workers.errand import Errand

Modules = Literal["auto", "vllm", "transformers"]
PARTS = (
    "resid_post",
    "resid_mid",
    "attn.out",
    "mlp.out",
    "resid_pre",
)  # what a block hands on is written before the next reads it
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
OURS: dict[str, Any] = {
    "enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True, "trust_remote_code": False,
    "load_format": "safetensors", "generation_config": "vllm",
}  # fmt: skip
WORDS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
TOKENWISE = (Steer, Scale, ProjectOut, Clamp, Rotate)
DRAWN = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}  # transformers' defaults
SAID = {*DRAWN, "do_sample", "max_new_tokens", "min_new_tokens", "repetition_penalty"}
SILENT = {  # of a generation config: they do not change which token is written
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache", "do_sample",
    "transformers_version", "_from_model_config", "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip
Leaves = dict[Any, Any]  # arguments or results of a module, by place or name


class VLLM:
    """vLLM's engine in this process, for one model. `options` are those of `vllm.LLM` (tensor_parallel_size, max_model_len ...).

    `modules`: vLLM's own, its transformers back end, or the first of the two that proves equal. `tolerance` is the largest
    relative error of a token's values; by default 1e-3 for float32, 1e-2 for float16, 5e-2 for bfloat16. InputError where vLLM
    is not installed; Refused, by name, for what it does not do.

    >>> with pl.VLLM(max_model_len=2048) as fast:  # needs vLLM  # doctest: +SKIP
    ...     run = model.run(prompts, keep=["layers.*.resid_post"], on=fast)
    """

    def __init__(self, *, modules: Modules = "auto", tolerance: float | None = None, **options: Any) -> None:
        one_of(modules, Modules, "modules=")
        ours = next((k for k in options if k in {*OURS, "model", "revision", "dtype", "model_impl", "tokenizer"}), None)
        if ours is not None:
            raise InputError(f"pl.VLLM takes no {ours}=: what it computes must be what the model computes here")
        if find_spec("vllm") is None:
            raise InputError("vLLM is not installed: pip install 'pellucid[vllm]'")
        self.modules, self.tolerance, self.options = modules, tolerance, options
        self.engine: Engine | None = None

    def __repr__(self) -> str:
        said = {"modules": self.modules, "tolerance": self.tolerance, **self.options}
        told = (f"{k}={v!r}" for k, v in said.items() if (k, v) not in (("modules", "auto"), ("tolerance", None)))
        return f"pl.VLLM({', '.join(told)})"

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and give its memory back."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()

    @property
    def name(self) -> str:
        """What read a corpus, as its store says it."""
        return f"vllm {importlib.import_module('vllm').__version__}"

    def execute(
        self,
        model: Model,
        inputs: Inputs,
        keep: Sequence[str | Site],
        edits: Sequence[Edit],
        logits: bool,
        put: Put | None,
    ) -> Run:
        """`model.run` there. Refused for sites and edits that were not proven equal."""
        engine = self.open(model)
        wanted = [spot for k in keep for spot in spots(model.anatomy, k)]
        ports = {spot.tap: engine.port(spot) for spot in wanted}
        found, _ = engine.go(
            _rows(inputs), {*ports.values(), *([TOP] if logits else ())}, engine.written(inputs, edits)
        )
        real = inputs.stream("").mask.bool().cpu()

        def whole(x: Tensor) -> Tensor:
            made = x.new_zeros(*real.shape, x.shape[-1])
            made[real.to(x.device)] = x
            return made

        held = {tap: whole(found[port]) if put is None else put(whole(found[port])) for tap, port in ports.items()}
        output = whole(engine.logits(found[TOP])) if logits else None
        run = Run(model.anatomy, inputs, output, held, [spot.site for spot in wanted])
        run.edits = tuple(edits)
        return run

    def generate(
        self,
        model: Model,
        inputs: Inputs,
        options: Mapping[str, Any],
        edits: Sequence[Edit],
        seed: int,
        call: Mapping[str, Any],
    ) -> Generated:
        """`model.generate` there: the most probable tokens, or draws of its own from the distribution that is drawn from here."""
        engine, asked = self.open(model), _asked(model, options)
        eos, pad = ends_of(model.module, model.tokenizer)
        told = asked | {"stop_token_ids": [i for i in eos if i < model.vocabulary], "ignore_eos": True, "logprobs": 0}
        edited = engine.written(inputs, edits)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _, outputs = engine.go(_rows(inputs), set(), edited, [told] * len(inputs))
        lengths = torch.tensor([len(o.token_ids) for o in outputs])
        tokens = torch.full((len(outputs), int(lengths.max())), pad)
        said = torch.full(tokens.shape, torch.nan)
        for row, o in enumerate(outputs):
            tokens[row, : lengths[row]] = torch.tensor(o.token_ids)
            each = [step[i].logprob for step, i in zip(o.logprobs, o.token_ids, strict=True)]
            said[row, : lengths[row]] = torch.tensor(each)
        wrote = torch.arange(tokens.shape[1]) < lengths[:, None]
        ended = tuple("eos" if o.finish_reason == "stop" else "length" for o in outputs)
        about: dict[str, Any] = {"log_probabilities": said, "ended": ended, "because": ("",) * len(ended), "call": call}
        return decoded(model.anatomy, model.tokenizer, inputs, tokens, wrote, **about)

    def spread(
        self, errand: Errand, pieces: Iterable[Any], ahead: bool = False
    ) -> Iterator[tuple[int, Any, dict[str, Tensor]]]:
        """The shards of `store_activations`, one after the other. Refused for other work."""
        model, work = errand.model, errand.begin()
        if not hasattr(work, "reader"):
            raise Refused(f"pl.VLLM stores activations, runs and generates; it does no {work.errand}: leave on= out")
        self.open(model)
        work.reader = lambda inputs, sites: self.execute(model, inputs, sites, (), False, None)
        for number, piece in enumerate(pieces):
            yield number, piece, work(piece)

    def run(self, plan: Plan, variants: Sequence[Any]) -> Iterator[tuple[list[Any], list[Tensor]]]:
        raise Refused(
            "pl.VLLM stores activations, runs and generates; it does no sweep, whose variants share work: leave on= out"
        )

    def open(self, model: Model) -> Engine:
        """The engine, opened and proven for this model. Refused where vLLM computes something else."""
        if self.engine is not None and self.engine.broken:
            self.close()
        if self.engine is not None:
            if self.engine.digest != model.digest:
                raise Refused(f"{self!r} holds other weights than {model.name} has now: close() it, or make another")
            return self.engine
        source, reasons = _source(model), []
        for modules in ("vllm", "transformers") if self.modules == "auto" else (self.modules,):
            engine = Engine(model, self.tolerance)
            try:
                engine.open({**source, "model_impl": modules}, self.options)
                engine.prove()
            except Refused as why:
                reasons.append(f"{modules}: {why}")
            else:
                self.engine = engine
                return engine
            finally:
                if self.engine is None:
                    engine.close()
        raise Refused(f"vLLM does not compute what {model.name} does here: {'; '.join(reasons)}")


def _source(model: Model) -> dict[str, Any]:
    """What vLLM opens. Refused where that is not what was opened here."""
    said = model.source.get("source")
    if model.base is not None or not isinstance(said, str | os.PathLike) or str(said).endswith(".gguf"):
        raise Refused(
            f"vLLM opens a folder or a hub id, and {model.name} is neither: save it (module.save_pretrained) and open the folder"
        )
    can = getattr(model.module, "can_generate", None)
    if len(model.anatomy.stacks) != 1 or can is None or not can():
        raise Refused(
            f"{model.name} is no causal language model of one stack, which is what vLLM is asked to read here"
        )
    dtype = str(model.loaded.dtype).removeprefix("torch.")
    return {"model": str(said), "revision": model.loaded.revision, "dtype": dtype}


def _rows(inputs: Inputs) -> list[list[int]]:
    """The prompts as token ids. Refused for inputs that are more than that."""
    if more := sorted(set(inputs.tensors) - {"input_ids", "attention_mask", "position_ids"}):
        raise Refused(f"vLLM is given token ids here, and these inputs have {', '.join(more)}")
    stream = inputs.stream("")
    return [row[real].tolist() for row, real in zip(stream.ids.cpu(), stream.mask.bool().cpu(), strict=True)]


def _asked(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `sampling` made, as SamplingParams has it. Refused for what vLLM does otherwise, or not at all."""
    config = loop_of(model.module).generation_config.to_diff_dict()
    both = {k: v for k, v in config.items() if k not in SILENT} | {k: v for k, v in options.items() if v is not None}
    told = {k: v for k, v in both.items() if v is not None}
    if odd := sorted(set(told) - SAID):
        raise Refused(
            f"generating with {odd[0]}= (asked for here, or by the checkpoint) is not had from vLLM: leave on= out"
        )
    made = {"max_tokens": told["max_new_tokens"], "min_tokens": told.get("min_new_tokens", 0)}
    made["repetition_penalty"] = told.get("repetition_penalty", 1.0)
    return made | ({k: told.get(k, v) for k, v in DRAWN.items()} if told["do_sample"] else {"temperature": 0.0})


# ---- where a tensor is met


@dataclass(frozen=True)
class Port:
    """A tensor that goes "in" to or comes "out" of a module, or two whose sum it is, by their places or names.

    Where it is two sites, as one block's end and the next one's beginning, the first is turn 0.
    """

    module: str
    side: str
    keys: tuple[Any, ...]
    turn: int = 0

    def read(self, leaves: Leaves) -> Tensor:
        first, *rest = (leaves[k].reshape(-1, leaves[k].shape[-1]) for k in self.keys)
        return first + rest[0] if rest else first

    def write(self, leaves: Leaves, new: Tensor) -> None:
        """Into the first of two, so that their sum is `new`."""
        old = leaves[self.keys[0]]
        rest = [leaves[k].view(old.shape) for k in self.keys[1:]]
        leaves[self.keys[0]] = new.view(old.shape) - rest[0] if rest else new.view(old.shape)

    @property
    def rank(self) -> tuple[int, int]:
        """Results come first, then sums, then arguments, then one of several results; outer modules before inner ones."""
        kinds = (self.side == "out" and self.keys == (0,), len(self.keys) == 2, self.side == "in", True)
        return kinds.index(True), self.module.count(".")


TOP = Port("", "out", (0,))  # what the head reads
Allowed = Callable[[Tensor, Tensor], Tensor]  # rows and positions of tokens: whether an edit is written there
Written = Mapping[Port, list[tuple[Edit, Allowed]]]


@dataclass(eq=False)
class Tape:
    """One call of the engine: which rows and positions its packed tokens are, what was met, and how often."""

    known: list[list[int]]
    captured: set[Port] = field(default_factory=set)
    edits: Written = field(default_factory=dict)
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot change)
    width: int = 0  # above 0: whatever is so wide, for every token, is captured
    found: dict[Port, Tensor] = field(default_factory=dict)  # [token, d], one prompt after the other
    met: dict[Port, int] = field(default_factory=dict)  # tokens
    total: int = 0

    def __post_init__(self) -> None:
        self.lengths = torch.tensor([len(row) for row in self.known])
        self.starts = torch.tensor([0, *accumulate(self.lengths.tolist())])

    def step(self, order: Sequence[int], ends: Sequence[int], before: Sequence[int], ids: Tensor | None = None) -> None:
        """A step of the engine: rows as they are packed, where each begins and ends, how many of its tokens were before.

        >>> tape = Tape([[5, 6, 7], [8, 9]])
        >>> tape.step([1, 0], [0, 1, 3], [1, 0], torch.tensor([9, 5, 6]))
        >>> tape.rows, tape.positions
        (tensor([1, 0, 0]), tensor([1, 0, 1]))
        """
        counts = [b - a for a, b in pairwise(ends)]
        self.rows = torch.tensor(order).repeat_interleave(torch.tensor(counts))
        self.positions = torch.cat([torch.arange(c, c + n) for c, n in zip(before, counts, strict=True)])
        self.given = self.positions < self.lengths[self.rows]  # the others were generated
        self.total += len(self.rows)
        places = zip(self.rows[self.given].tolist(), self.positions[self.given].tolist(), strict=True)
        said = torch.tensor([self.known[row][position] for row, position in places], dtype=torch.long)
        if ids is not None and not torch.equal(said, ids[: len(self.rows)].cpu()[self.given].long()):
            raise PellucidError("vLLM's packed tokens are not those of the prompts: this version packs them otherwise")

    def meet(self, module: str, side: str, leaves: Leaves) -> bool:
        """Capture and edit what a hook was given; whether that changed."""
        changed, n = False, len(self.rows)
        ports = {p for p in (*self.captured, *self.edits) if (p.module, p.side) == (module, side)}
        fit = [k for k, v in leaves.items() if self.width and _wide(v, n, self.width)]
        ports |= {Port(module, side, (k,)) for k in fit} | (
            {Port(module, side, (fit[0], fit[1]))} if fit[1:] else set()
        )
        for port in sorted(ports, key=lambda p: (len(p.keys), p.turn)):  # a summand comes before its sum
            if any(leaves.get(key) is None for key in port.keys):
                continue
            x = port.read(leaves)
            self.met[port] = self.met.get(port, 0) + n
            for edit, allowed in self.edits.get(port, ()):
                which = allowed(self.rows, self.positions).nonzero()[:, 0].to(x.device)
                if len(which):
                    old = x[which][None]
                    place: Any = Place(edit.site, None, old, None, None)  # type: ignore[arg-type]
                    x = x.index_copy(0, which, edit.new(old, place)[0].to(x.dtype))
                    port.write(leaves, x)
                    changed = True
            if port in self.captured or port.keys[0] in fit:
                self._capture(port, x)
        return changed

    def _capture(self, port: Port, x: Tensor) -> None:
        if port not in self.found:
            with torch.inference_mode(False):
                self.found[port] = torch.empty(int(self.starts[-1]), x.shape[-1], dtype=x.dtype, device=self.device)
        at = (self.starts[self.rows] + self.positions)[self.given]
        self.found[port][at.to(self.device)] = x[: len(self.rows)][self.given.to(x.device)].to(self.device)

    def check(self) -> None:
        """PellucidError where a hook was skipped."""
        if self.total < int(self.starts[-1]):
            raise PellucidError(
                f"vLLM ran, and our hooks saw {self.total} of {int(self.starts[-1])} tokens: the others came by another way"
            )
        for port in (*self.captured, *self.edits):
            if self.met.get(port, 0) != self.total:
                raise PellucidError(
                    f"the hook on {port.module or 'the model'!r} was met by {self.met.get(port, 0)} of {self.total} tokens, so what is "
                    "read or edited there is not whole (compiled graphs skip hooks)"
                )


def _wide(value: Any, tokens: int, width: int) -> bool:
    kind = isinstance(value, Tensor) and value.is_floating_point()
    return kind and value.shape[-1:] == (width,) and value.numel() == tokens * width


class Engine:
    """One model in vLLM, and which of its tensors are proven to be those here."""

    def __init__(self, model: Model, tolerance: float | None) -> None:
        self.model, self.digest = model, model.digest
        self.tolerance = TOLERANCE.get(model.loaded.dtype, 5e-2) if tolerance is None else tolerance
        self.ports: dict[Tap, Port] = {}
        self.unlike: dict[Tap, str] = {}
        self.uneditable: dict[Tap, str] = {}
        self.llm: Any = None
        self.broken = False  # by an interrupt or an error within a step

    def open(self, source: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        for name, value in WORDS.items():
            if os.environ.setdefault(name, value) != value and name.startswith(("VLLM_ENABLE", "VLLM_USE")):
                raise InputError(
                    f"{name}={os.environ[name]} in this environment puts vLLM's model where it cannot be read: unset it"
                )
        several = options.get("tensor_parallel_size", 1) > 1
        split = {"distributed_executor_backend": "external_launcher"} if several else {}
        with _as_it_was(self.model.module):
            try:
                self.llm = importlib.import_module("vllm").LLM(**{**source, **OURS, **split, **options})
            except Exception as error:  # whatever its loaders and kernels raise
                raise Refused(f"it does not open there ({' '.join(str(error).split())[:300]})") from error
        worker = self.llm.llm_engine.model_executor.driver_worker
        self.runner = getattr(worker, "worker", worker).model_runner
        self.module: nn.Module = self.runner.get_model()

    def close(self) -> None:
        self.__dict__.clear()
        gc.collect()
        with suppress(ImportError, AttributeError):
            importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()

    # ---- running

    def go(
        self,
        rows: list[list[int]],
        captured: set[Port],
        edits: Written,
        params: Sequence[Mapping[str, Any]] = (),
        search: bool = False,
    ) -> tuple[dict[Port, Tensor], list[Any]]:
        """Run prompts: what was met at some ports, [token, d], one prompt after the other, and what each wrote."""
        device = next(
            (p.device for p in self.model.module.parameters() if p.device.type != "meta"), torch.device("cpu")
        )
        tape = Tape(rows, captured, edits, device, self.model.anatomy.stacks[-1].d_model if search else 0)
        engine, sampling = self.llm.llm_engine, importlib.import_module("vllm").SamplingParams
        names: dict[str, int] = {}
        outputs: dict[int, Any] = {}
        with self._hooked(tape, names):
            try:
                for row, ids in enumerate(rows):
                    told = params[row] if params else {"max_tokens": 1, "temperature": 0.0}
                    try:
                        name = engine.add_request(
                            str(row), {"prompt_token_ids": ids}, sampling(**told, detokenize=False)
                        )
                    except Exception as error:  # of its own kinds
                        said = " ".join(str(error).split())[:200]
                        raise InputError(f"vLLM does not take prompt {row}, of {len(ids)} tokens: {said}") from error
                    names[name] = row
                while engine.has_unfinished_requests():
                    self.broken = True  # until the step is over
                    outputs |= {int(o.request_id): o.outputs[0] for o in engine.step() if o.finished}
                    self.broken = False
            except PellucidError:
                raise
            except Exception as error:
                raise PellucidError(f"vLLM broke off: {' '.join(str(error).split())[:300]}") from error
            finally:
                if left := [str(row) for row in names.values() if row not in outputs]:
                    engine.abort_request(left)
        tape.check()
        # a module that is called more or less than once is no place
        return {p: x for p, x in tape.found.items() if tape.met[p] == tape.total}, [
            outputs[row] for row in range(len(rows))
        ]

    @contextmanager
    def _hooked(self, tape: Tape, names: Mapping[str, int]) -> Iterator[None]:
        modules = dict(self.module.named_modules())

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            batch, ends = self.runner.input_batch, self.runner.query_start_loc.np
            n = batch.num_reqs
            before = batch.num_computed_tokens_cpu[:n].tolist()
            tape.step([names[i] for i in batch.req_ids], ends[: n + 1].tolist(), before, kwargs.get("input_ids"))

        def enter(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                leaves: Leaves = {**dict(enumerate(args)), **kwargs}
                changed = tape.meet(name, "in", leaves)
                return (tuple(leaves[i] for i in range(len(args))), {k: leaves[k] for k in kwargs}) if changed else None

            return hook

        def leave(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                several = isinstance(output, tuple)
                leaves: Leaves = dict(enumerate(output)) if several else {0: output}
                changed = tape.meet(name, "out", leaves)
                return (tuple(leaves.values()) if several else leaves[0]) if changed else None

            return hook

        handles = [self.module.register_forward_pre_hook(begin, with_kwargs=True)]
        try:
            for name in modules if tape.width else {p.module for p in (*tape.captured, *tape.edits)}:
                handles.append(modules[name].register_forward_pre_hook(enter(name), with_kwargs=True))
                handles.append(modules[name].register_forward_hook(leave(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = self.module.compute_logits(hidden.to(next(self.module.parameters()).device))  # type: ignore[operator]
        return made.to(hidden.device)[:, : self.model.vocabulary]

    # ---- what may be asked

    def port(self, spot: Spot) -> Port:
        """Where a site is met there. Refused where that is nowhere."""
        if spot.unit is None and spot.tap in self.ports:
            return self.ports[spot.tap]
        why = f"it offers embed, final_norm and of layers {', '.join(PARTS)}"
        raise Refused(
            f"{str(spot.site)!r} is not read by vLLM: {self.unlike.get(spot.tap, why) if spot.unit is None else why}"
        )

    def written(self, inputs: Inputs, edits: Sequence[Edit]) -> Written:
        """Edits at their ports, with where each holds. Refused for edits that see more than one token, and sites unproven."""
        made: dict[Port, list[tuple[Edit, Allowed]]] = {}
        for edit in edits:
            _check(edit)
            for spot in spots(self.model.anatomy, edit.site):
                port = self.port(spot)
                if why := self.uneditable.get(spot.tap):
                    raise Refused(f"{str(spot.site)!r} is read by vLLM, but not edited: {why}")
                made.setdefault(port, []).append((edit, _allowed(edit, spot.site, inputs.stream(""))))
        return made

    def prove(self) -> None:
        """Find every site by its values, then edit each part. Refused where logits or the last residual are not those here."""
        sites: dict[Tap, Site] = {}
        for pattern in ("embed", "final_norm", *(f"layers.*.{part}" for part in PARTS)):
            with suppress(SiteError, Refused):
                sites |= {spot.tap: spot.site for spot in spots(self.model.anatomy, pattern)}
        rows = self._probe()
        ours, logits = self._here(rows, list(sites.values()), ())
        found, _ = self.go(rows, {TOP}, {}, search=True)
        if off := self._off(self.logits(found[TOP]), logits):
            raise Refused(f"its logits are {off} on the probe")
        ports = sorted(found, key=lambda p: p.rank)
        for tap in sites:
            equal = next((p for p in ports if not self._off(found[p], ours[tap])), None)
            if equal is not None:
                self.ports[tap] = replace(equal, turn=sum(replace(p, turn=0) == equal for p in self.ports.values()))
            else:
                near = min(_error(found[p], ours[tap]) for p in ports)
                self.unlike[tap] = f"none of its tensors is this one on the probe (the nearest is off by {near:.1e})"
        last = locate(self.model.anatomy, Site("resid_post", len(self.model.anatomy.stacks[-1].blocks) - 1)).tap
        if last not in self.ports:
            raise Refused(f"of its last residual stream, {self.unlike.get(last, 'nothing is known')}")
        length: dict[Any, float] = {}  # of the longest thing in a layer, by layer
        for tap, site in sites.items():
            length[site.layer] = max(length.get(site.layer, 0.0), float(ours[tap].float().norm(dim=-1).mean()))
        parts = [
            [(t, s) for t, s in sites.items() if s.part == part and t in self.ports]
            for part in {s.part: 0 for s in sites.values()}
        ]
        if self._edits_differ(rows, [site for part in parts for _, site in part], length, logits):  # which?
            for part in parts:
                if why := self._edits_differ(rows, [site for _, site in part], length, logits):
                    self.uneditable |= {tap: why for tap, _ in part}

    def _edits_differ(
        self, rows: list[list[int]], sites: Sequence[Site], length: Mapping[Any, float], clean: Tensor
    ) -> str:
        """Whether these sites, moved at the second token by half of what is in their layer, give other logits there."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(len(sites), self.model.anatomy.stacks[-1].d_model, generator=generator)
        drawn /= drawn.norm(dim=-1, keepdim=True)
        edits = self.model.resolved(
            [Steer(replace(s, at=1), v, length[s.layer] / 2) for s, v in zip(sites, drawn, strict=True)]
        )
        _, wanted = self._here(rows, (), edits)
        with on(None):
            found, _ = self.go(rows, {TOP}, self.written(self.model.inputs(rows), edits))
        if sites and _error(clean, wanted) < 10 * self.tolerance:
            return "an edit of it does not reach the logits of the probe, so nothing could be compared"
        off = self._off(self.logits(found[TOP]), wanted)
        return off and f"an edit of it there gives logits that are {off}"

    def _probe(self) -> list[list[int]]:
        """Token ids of three lengths, of two tokens at least."""
        ids = self.model.anatomy.inputs["input_ids"]
        row = ids[0][self.model.anatomy.inputs.get("attention_mask", torch.ones_like(ids))[0].bool()].tolist()
        return [row, row[: max(2, len(row) // 2)], row[: max(2, len(row) - 1)]]

    def _here(
        self, rows: list[list[int]], sites: Sequence[Site], edits: Sequence[Edit]
    ) -> tuple[dict[Tap, Tensor], Tensor]:
        """What transformers gives, as `go` has it, each prompt run alone."""
        with on(None):
            runs = [self.model.run([row], keep=sites, edits=edits) for row in rows]
        kept = {locate(self.model.anatomy, s).tap: torch.cat([run.tensor(s)[0] for run in runs]) for s in sites}
        return kept, torch.cat([run.logits[0] for run in runs])

    def _off(self, there: Tensor, here: Tensor) -> str:
        """How far values are from those here, where that is too far."""
        off = _error(there, here)
        return "" if off <= self.tolerance else f"off by {off:.1e} of a token's length, above {self.tolerance:g},"


def _error(there: Tensor, here: Tensor) -> float:
    """The largest relative error of a token."""
    if there.shape != here.shape:
        return float("inf")
    a, b = there.float(), here.float().to(there.device)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)).nan_to_num(float("inf")).max())


def _check(edit: Edit) -> None:
    """Refused for an edit that is not one and the same for each token by itself."""
    named = f"{type(edit).__name__} at {str(edit.site)!r}"
    if edit.when is not None:
        raise Refused(f"{named} has a condition, which vLLM does not ask: leave on= out")
    zero = isinstance(edit, Ablate) and edit.how == "zero"
    if not (zero or isinstance(edit, TOKENWISE) or (isinstance(edit, Patch) and isinstance(edit.source, Tensor))):
        raise Refused(
            f"{named} looks at more than a token by itself: vLLM adds, scales, projects out, clamps, rotates, sets to zero, and sets to "
            "a vector (pl.Patch with a tensor)"
        )
    for f in fields(edit):
        value = getattr(edit, f.name)
        if isinstance(value, Tensor) and value.ndim > 1 + (f.name == "directions"):
            raise Refused(
                f"{named} has another {f.name} for each row or position ({list(value.shape)}): vLLM takes one vector for all"
            )


def _allowed(edit: Edit, site: Site, stream: Stream) -> Allowed:
    """Where an edit holds: positions are those of the prompt; `tokens` and an edit without either go on while generating."""
    columns, named = stream.find(site.at), None
    if columns is not None:
        named = torch.zeros(
            len(stream.lengths), int(stream.lengths.max()) + 1, dtype=torch.bool
        )  # the last is all generated ones
        named[torch.arange(len(named))[:, None], columns - stream.starts[:, None]] = True
    first, end = edit.between(stream.lengths)

    def allowed(rows: Tensor, positions: Tensor) -> Tensor:
        ok = (positions >= first[rows]) & (positions < end[rows])
        return ok if named is None else ok & named[rows, positions.clamp(max=named.shape[1] - 1)]

    return allowed


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """vLLM seeds this process's generators, takes `torch.set_num_threads` away and, for its transformers back end, rewrites the
    classes of the model: afterwards all are as they were."""
    state, numbers, threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    known = {kind: (kind.__bases__, dict(vars(kind))) for kind in {type(m) for m in module.modules()}}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numbers)
            torch.set_num_threads = threads
            for kind, (bases, names) in known.items():
                if kind.__bases__ != bases:
                    kind.__bases__ = bases
                for name in {n for n, v in vars(kind).items() if names.get(n) is not v} - {
                    "__doc__",
                    "__dict__",
                    "__weakref__",
                }:
                    setattr(kind, name, names[name]) if name in names else delattr(kind, name)
