"""Generation: transformers' own `generate`, under edits and watched.

Sampling options are those of transformers' GenerationConfig by their names, and transformers draws the tokens: with the
same seed they are the same. What is not given is what the checkpoint's generation config says, and after it transformers'
defaults (where `top_k` is 50). Greedy unless something is given that asks for sampling.

An edit without positions acts on every token, those generated included; one with positions acts on the prompt (where
-1 is the prompt's last token). A kept site without positions is kept for every token written (`pellucid.engine.steps`
says which position that is), one with positions for the prompt. Rows end one by one; a row's tokens are those it has alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import running
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.anatomy.sites import Site
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.limits import exceeded
from pellucid.engine.marks import special_ids
from pellucid.engine.run import Run
from pellucid.engine.sampling import Draws, Stops, Writer, number
from pellucid.engine.steps import Guard, Watch
from pellucid.engine.watched import Choosing, Follower, Written
from pellucid.errors import InputError, PellucidError, Refused

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# ---- what was generated


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated for each row (prompt, or sample of a prompt). Prints as the (first) text.

    texts: without marks, and without the prompt. tokens [row, step]: padding behind a row's end. lengths [row].
    log_probabilities [row, step]: of each token under the model as it ran, before temperature and filters, in nats; NaN
    behind the end. ended: "eos", "stop", "length" or "watcher", and `because` which stop or watcher. What was kept: by its
    site, `generated["layers.5.resid_post"]`, labelled, or `generated.tensor(site)`. scores [row, step, vocabulary]: the
    logits each token was chosen from, where asked for. fired [row, step]: by name, where a condition held or a watcher acted.
    records [row, step, ...]: by name, what watchers recorded.
    """

    texts: tuple[str, ...]
    tokens: Tensor
    prompts: tuple[str, ...]
    lengths: Tensor
    log_probabilities: Tensor
    ended: tuple[str, ...]
    because: tuple[str, ...]
    fired: Mapping[str, Tensor] = field(default_factory=dict)
    records: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Inputs | None = None
    steps: Run | None = field(default=None, repr=False)  # what was kept, with the tokens written as its positions
    prompt: Run | None = field(default=None, repr=False)  # what was kept of the prompt
    call: Mapping[str, Any] = field(default_factory=dict, repr=False)  # what `generate` was asked
    model: Any = field(default=None, repr=False)  # and who was
    guards: tuple[Guard, ...] = field(default=(), repr=False)  # the monitors that were on

    @property
    def text(self) -> str:
        return self.texts[0]

    def __str__(self) -> str:
        return self.text

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, row: int = 0) -> list[int]:
        """The tokens a row wrote."""
        return [int(i) for i in self.tokens[row, : int(self.lengths[row])]]

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """The text of every token written, as decoding it alone gives it."""
        return self.steps.inputs.stream("").labels if self.steps is not None else ()

    @property
    def scores(self) -> Tensor:
        if self.steps is None or self.steps.output is None:
            raise InputError("the scores were not kept: ask for them with model.generate(..., scores=True)")
        return self.steps.logits

    @property
    def firings(self) -> Any:
        """What the monitors read at every token, and when they fired: a `Result`, for each prompt over monitor and step."""
        if not self.guards:
            raise InputError("no monitor was on: model.generate(..., monitors=[pl.safety.Monitor(...)])")
        return type(self.guards[0]).told(self.guards, self)

    def _run(self, site: Site | str) -> Run:
        assert self.steps is not None and self.prompt is not None
        site = Site.parse(site)
        kept = {str(s.whole) for s in self.steps.sites}
        of_prompt = site.at is not None or (
            str(site.whole) not in kept and any(s.whole == site.whole for s in self.prompt.sites)
        )
        return self.prompt if of_prompt else self.steps

    def tensor(self, site: Site | str) -> Tensor:
        """The values kept at a site, its position dimension the steps; of a site with '@' (or of the encoder) the prompt's."""
        return self._run(site).tensor(site)

    def __getitem__(self, site: Site | str) -> xr.DataArray:
        """The same as an xarray; its `step` dimension has the token that each step wrote."""
        run = self._run(site)
        data = run[site]
        if run is not self.steps:
            return data
        data = data.rename(
            {d: "step" for d in ("position", "query") if d in data.dims and data.sizes[d] == self.tokens.shape[1]}
        )
        data = data.drop_vars([c for c in ("token", "query_token") if c in data.coords])
        labels = self.steps.stream(Site.parse(site)).labels
        texts = [[*row, *[""] * (self.tokens.shape[1] - len(row))] for row in labels]
        return data.assign_coords(token=(("batch", "step"), texts)) if len(texts) == data.sizes["batch"] else data

    @property
    def result(self) -> Any:
        """All of this as a `Result`: it is saved, and its program generates it again."""
        return importlib.import_module("pellucid.technique").generation(
            self
        )  # which stands above, and is known by name

    def save(self, path: str | Path) -> Path:
        """Write one zip file, `pl.results.Result.load(path)` reads it: `result` with everything that was kept."""
        return self.result.save(path)

    def to_frame(self) -> pd.DataFrame:
        """A row for each token written: prompt, row, step, token, id, log_probability, and what fired and was recorded (single
        numbers)."""
        import pandas as pd

        labels = self.labels
        beside = {f"{name} fired": x for name, x in self.fired.items()}
        beside |= {name: x for name, x in self.records.items() if x.ndim == 2}
        rows = []
        for row in range(len(self)):
            for step, (i, text) in enumerate(zip(self.ids(row), labels[row], strict=True)):
                said = {name: x[row, step].item() for name, x in beside.items()}
                known = {"row": row, "step": step, "token": text, "id": i}
                rows.append({**known, "log_probability": float(self.log_probabilities[row, step]), **said})
        return pd.DataFrame(rows, columns=None if rows else ["row", "step", "token", "id", "log_probability"])


# ---- generating


def loop_of(module: nn.Module) -> Any:
    """The part of a model whose forward its `generate` calls: itself, or what an adapter or a compiler is wrapped around."""
    loops = (m for m in module.modules() if isinstance(m, GenerationMixin) and m.can_generate())
    found = next(loops, None)
    if found is None or not hasattr(module, "generate"):
        raise InputError(f"a {type(module).__name__} does not generate text: open a causal or encoder-decoder model")
    return found


def ends_of(module: nn.Module, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that end a row, and what stands behind its end."""
    config = loop_of(module).generation_config
    eos = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or ())
    pad = config.pad_token_id
    pad = pad if pad is not None else getattr(tokenizer, "pad_token_id", None)
    return eos, int(pad if pad is not None else eos[0] if eos else 0)


def generate(
    anatomy: Anatomy,
    tokenizer: Any,
    inputs: Inputs,
    options: dict[str, Any],
    *,
    edits: Sequence[Edit] = (),
    keep: Sequence[Site | str] = (),
    when: Sequence[Watch] = (),
    scores: bool = False,
    stop: Any = (),
    stream: Any = None,
    seed: int = 0,
    use_cache: bool = True,
    resolve: Callable[[Sequence[Edit]], list[Edit]] = list,
    call: Mapping[str, Any] | None = None,
) -> Generated:
    """Continue each row of the inputs; `options` are those of `sampling`."""
    module, runs = anatomy.module, loop_of(anatomy.module)
    width = inputs.stream("").ids.shape[1]
    number("seed", seed, 0, 2**63, whole=True)
    vocabulary = getattr(runs.config.get_text_config(), "vocab_size", None)
    stops = Stops.of(stop, tokenizer, vocabulary)
    _check_room(anatomy, width, options["max_new_tokens"])
    eos, pad = ends_of(module, tokenizer)

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise InputError("this model was opened without a tokenizer: give a row token ids, not a text")
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    _check_loop(anatomy, runs, use_cache)
    follower = Follower(anatomy, runs, inputs, keep, edits, when, encode, resolve)
    draws = Draws(seed)
    if options.get("num_beams", 1) != 1:
        told = {**options, "use_cache": use_cache, "pad_token_id": pad}
        asked = {"keep=": keep, "when=": when, "scores=": scores, "stop=": stop, "stream=": stream}
        return _beams(follower, tokenizer, inputs, told, asked, draws, eos, call or {})
    page = _Page(follower, tokenizer, stops, eos, pad, options["max_new_tokens"], scores, _listener(stream))

    def note(tokens: Tensor) -> Tensor:
        draws.fall()
        return page.note(tokens)

    told = {
        "num_beams": 1, **options, "use_cache": use_cache, "pad_token_id": pad, "return_dict_in_generate": False,
        "prefill_chunk_size": None, "prompt_lookup_num_tokens": None, "disable_compile": True,
        "logits_processor": LogitsProcessorList([Choosing(follower, draws.rise)]),
        "stopping_criteria": StoppingCriteriaList([Written(note)]),
    }  # fmt: skip
    tensors = {k: v for k, v in inputs.tensors.items() if k != "position_ids"}  # generate counts positions itself
    try:
        with running(module), follower:
            module.generate(**tensors, **told)
    except Exception as error:
        if isinstance(error, PellucidError) or error is follower.failed or follower.steps:
            raise
        raise InputError(f"transformers does not generate from this: {' '.join(str(error).split())[:300]}") from error
    finally:
        draws.fall()
    return page.close(inputs, call or {})


def _check_loop(anatomy: Anatomy, runs: Any, use_cache: bool) -> None:
    """Refused where a loop that calls an inner module leaves out what the outer one adds, as a prefix that is not handed on."""
    module = anatomy.module

    def agrees() -> bool:
        row = {k: v[:1] if isinstance(v, Tensor) else v for k, v in anatomy.inputs.items()}
        row = {k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "decoder_input_ids")}
        with running(module):
            told = {
                "do_sample": False,
                "num_beams": 1,
                "output_logits": True,
                "return_dict_in_generate": True,
                "use_cache": use_cache,
            }
            made = module.generate(**row, max_new_tokens=3, **told)
            given = made.sequences[:, :-1]
            if "decoder_input_ids" in row or getattr(runs.config, "is_encoder_decoder", False):
                row["decoder_input_ids"] = given
            else:
                row = {"input_ids": given, "attention_mask": torch.ones_like(given)}
            wanted, got = main_output(module(**row))[:, -len(made.logits) :].float(), torch.stack(made.logits, 1)
        allowed = TOLERANCE.get(next(module.parameters()).dtype, 4e-2) * max(1.0, float(wanted.abs().max()))
        return float((wanted - got.to(wanted.device)).abs().max()) <= allowed

    if runs is not module and not anatomy.memo(("its loop computes what it computes", use_cache), agrees):
        raise Refused(
            f"generating calls the {type(runs).__name__} inside, which does not compute what this {type(module).__name__} does: what the "
            f"adapter adds is lost on the way (use_cache={use_cache})"
        )


def _beams(
    follower: Follower,
    tokenizer: Any,
    inputs: Inputs,
    options: dict[str, Any],
    asked: Mapping[str, Any],
    draws: Draws,
    eos: list[int],
    call: Mapping[str, Any],
) -> Generated:
    """Beam search. A row of it jumps from beam to beam, so nothing can be watched; edits that hold in every row are right."""
    number("num_beams", options["num_beams"], 1, whole=True)
    beams, anatomy = options["num_beams"], follower.anatomy
    wrong = next((name for name, value in asked.items() if value), None)
    wrong = wrong or next(
        ("an edit with a condition" for held in follower.held.values() if held.watch is not None), None
    )
    wrong = wrong or ("edits of an encoder-decoder" if follower.held and "decoder" in inputs.streams else None)
    if wrong is not None:
        raise Refused(f"{wrong} cannot be had with beams, whose rows change places at every step: leave num_beams= out")
    spread = inputs.rows([i for i in range(len(inputs)) for _ in range(beams)])
    edits = [held.edit for held in follower.held.values()]
    follower = Follower(anatomy, follower.runs, spread, (), edits, (), follower.encode, follower.resolve)
    follower.beams = True

    def note(tokens: Tensor) -> Tensor:
        draws.fall()
        return torch.zeros_like(tokens, dtype=torch.bool)

    told = {
        **options, "return_dict_in_generate": True, "output_logits": True, "disable_compile": True,
        "logits_processor": LogitsProcessorList([Choosing(follower, draws.rise)]),
        "stopping_criteria": StoppingCriteriaList([Written(note)]),
    }  # fmt: skip
    module = anatomy.module
    tensors = {k: v for k, v in inputs.tensors.items() if k != "position_ids"}
    try:
        with running(module), follower:
            made = module.generate(**tensors, **told)
    finally:
        draws.fall()
    follower.finish(follower.steps)
    tokens = made.sequences[:, inputs.stream("").ids.shape[1] :]
    found = follower.runs.compute_transition_scores(
        made.sequences, made.logits, made.beam_indices, normalize_logits=True
    )  # type: ignore[operator]
    wrote = made.beam_indices[:, : tokens.shape[1]] >= 0
    last = tokens.gather(1, (wrote.sum(1, keepdim=True) - 1).clamp_min(0))[:, 0].tolist()
    ended = tuple("eos" if i in eos else "length" for i in last)
    rows = inputs.rows([i for i in range(len(inputs)) for _ in range(len(tokens) // len(inputs))])
    found = found[:, : tokens.shape[1]].masked_fill(~wrote, torch.nan)
    return _told(
        follower,
        tokenizer,
        rows,
        tokens,
        wrote,
        log_probabilities=found,
        ended=ended,
        because=("",) * len(tokens),
        call=call,
    )


def _told(
    follower: Follower,
    tokenizer: Any,
    inputs: Inputs,
    tokens: Tensor,
    wrote: Tensor,
    scores: Tensor | None = None,
    **found: Any,
) -> Generated:
    """What was written, with the tokens of the answer as the positions of what was kept."""
    kept = follower.gathered(), [s.site for s in follower.kept_steps]
    prompt = Run(follower.anatomy, inputs, None, follower.kept, [s.site for s in follower.kept_prompt])
    return decoded(follower.anatomy, tokenizer, inputs, tokens, wrote, scores, kept, prompt=prompt, **found)


def decoded(
    anatomy: Anatomy,
    tokenizer: Any,
    inputs: Inputs,
    tokens: Tensor,
    wrote: Tensor,
    scores: Tensor | None = None,
    kept: tuple[Any, list[Site]] = ({}, []),
    **found: Any,
) -> Generated:
    """Tokens [row, step], and which of them were written, with their texts."""
    lengths = wrote.sum(1)
    ids = [row[: int(k)].tolist() for row, k in zip(tokens, lengths, strict=True)]
    names = {i: f"#{i}" if tokenizer is None else _token(tokenizer, i) for row in ids for i in row}
    labels = tuple(tuple(names[i] for i in row) for row in ids)
    said = map(" ".join, labels) if tokenizer is None else tokenizer.batch_decode(ids, skip_special_tokens=True)
    texts, answer = tuple(said), Stream(tokens, wrote.long(), labels)
    streams = {name: answer if s is inputs.stream("") else s for name, s in inputs.streams.items()}
    written = Inputs({"input_ids": tokens}, streams, texts)
    return Generated(
        texts, tokens, inputs.texts, lengths, inputs=inputs, steps=Run(anatomy, written, scores, *kept), **found
    )


def _check_room(anatomy: Anatomy, width: int, new: int) -> None:
    """InputError where prompt and answer are longer than the model holds. The last token written is not read any more."""
    holds = exceeded(anatomy.module, width + new - 1, anatomy.stacks[-1].name)
    if holds is not None:
        raise InputError(
            f"{width} tokens and {new} new ones need {width + new - 1} positions, and this model holds {holds}: "
            + (f"give max_new_tokens={holds + 1 - width} at most, or " if width <= holds else "")
            + "a shorter prompt, model.inputs(prompt, truncate='left')"
        )


def _listener(stream: Any) -> Callable[[str, int], None] | None:
    if stream is None or stream is False:
        return None
    if stream is True:
        return lambda text, row: print(text, end="", flush=True)
    if not callable(stream):
        raise InputError(f"stream={stream!r}: expected True, or a function of a new piece of text and its row")
    return stream


class _Page:
    """What is written, row by row, and why each row ends."""

    def __init__(
        self,
        follower: Follower,
        tokenizer: Any,
        stops: Stops,
        eos: list[int],
        pad: int,
        most: int,
        scores: bool,
        listener: Any,
    ) -> None:
        self.follower, self.tokenizer, self.stops, self.listener = follower, tokenizer, stops, listener
        self.most, self.pad, self.keep_scores = most, pad, scores
        rows, device = follower.rows, follower.device
        self.ends = torch.tensor([*eos, *stops.ids], device=device)
        self.eos = set(eos)
        self.log_probabilities: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.wrote: list[Tensor] = []
        self.ended = ["length"] * rows
        self.because = [""] * rows
        reads = bool(stops.texts or stops.patterns)
        self.read = [Writer(tokenizer) for _ in range(rows)] if reads else []
        heard = listener is not None
        self.heard = (
            [Writer(tokenizer, special_ids(tokenizer)) for _ in range(rows)] if heard and tokenizer is not None else []
        )

    def note(self, tokens: Tensor) -> Tensor:
        """Take this step's tokens [row]; gives [row] which have ended."""
        follower = self.follower
        if follower.logits is None:  # the loop called something else
            raise PellucidError(f"the passes of this generation are not those of {type(follower.runs).__name__}")
        ended_here = follower.stopped
        wrote, said = follower.written(tokens, self.pad)
        logits = follower.logits.to(tokens.device)
        chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
        self.log_probabilities.append(chosen.masked_fill(~wrote, torch.nan))
        if self.keep_scores:
            self.scores.append(follower.logits.clone())
        self.wrote.append(wrote)
        over = ended_here.clone()
        if len(self.ends):
            over |= wrote & torch.isin(tokens, self.ends)
        if said:
            over[said] = True
        texts = self._texts(tokens, wrote) if self.read or self.listener is not None else {}
        for row in texts:
            over[row] = True
        newly = over & follower.running
        if bool(newly.any()):
            for row in newly.nonzero().flatten().tolist():
                token = int(tokens[row])
                if bool(ended_here[row]) or row in said:
                    self.ended[row], self.because[row] = "watcher", follower.because.get(row, "")
                elif token in self.eos:
                    self.ended[row] = "eos"
                else:
                    self.ended[row], self.because[row] = "stop", texts.get(row, f"token {token}")
                follower.queues.pop(row, None)
        follower.running = follower.running & ~over
        return ~follower.running

    def _texts(self, tokens: Tensor, wrote: Tensor) -> dict[int, str]:
        """Hand new text on; rows whose text has come to a stop, and which."""
        found = {}
        for row, (token, ok) in enumerate(zip(tokens.tolist(), wrote.tolist(), strict=True)):
            if not ok:
                continue
            if self.listener is not None:
                piece = self.heard[row].add(token) if self.heard else f"#{token} "
                if piece:
                    self.listener(piece, row)
            if self.read:
                piece = self.read[row].add(token)
                stop = self.stops.found(self.read[row].text, len(piece))
                if stop is not None:
                    found[row] = stop
        return found

    def close(self, inputs: Inputs, call: Mapping[str, Any]) -> Generated:
        follower = self.follower
        n = len(follower.tokens)
        follower.finish(n)
        names = follower.names()
        none = torch.zeros_like(follower.running)
        fired = {
            name: torch.stack([*(said := follower.fired.get(key, [])), *[none] * (n - len(said))], 1)
            for key, name in names.items()
        }
        records = {
            name: made for key, name in names.items() if (made := _recorded(follower.records.get(key, []))) is not None
        }
        return _told(
            follower,
            self.tokenizer,
            inputs,
            torch.stack(follower.tokens, 1),
            torch.stack(self.wrote, 1),
            torch.stack(self.scores, 1) if self.keep_scores else None,
            log_probabilities=torch.stack(self.log_probabilities, 1),
            ended=tuple(self.ended),
            because=tuple(self.because),
            fired=fired,
            records=records,
            call=call,
        )


def _token(tokenizer: Any, i: int) -> str:
    return str(tokenizer.decode([i], clean_up_tokenization_spaces=False))


def _recorded(values: Sequence[Tensor | None]) -> Tensor | None:
    """[row, step, ...], NaN where a step recorded nothing."""
    known = next((v for v in values if v is not None), None)
    if known is None:
        return None
    if any(v is not None and v.shape != known.shape for v in values):
        raise InputError("a watcher recorded values of different shapes: record as many numbers at every step")
    wide = known.float() if not known.is_floating_point() else known
    return torch.stack([torch.full_like(wide, torch.nan) if v is None else v.to(wide) for v in values], 1)
