"""Where does a model come from? A hub id, a local directory, a GGUF file, or a module already in memory.

`read` turns any of these into a `Loaded`: the module ready to run, its tokenizer and its identity. Files are
looked at before transformers is asked, so that each thing that can be wrong with them has one error, which
says what to do. Nothing in a checkpoint is executed or unpickled unless the caller asks for it by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file
from transformers.utils import logging as chatter

from pellucid.anatomy import gguf, parallel
from pellucid.anatomy.fingerprint import Fingerprint, unwrapped
from pellucid.anatomy.heads import as_rows
from pellucid.errors import LoadError, among, nearest

Task = Literal[
    "auto", "causal-lm", "masked-lm", "seq2seq-lm", "classification", "token-classification", "question-answering",
    "multiple-choice", "next-sentence", "base",
]  # fmt: skip

# task -> (auto class, its table: model type -> class name). A class in two tables goes to the earlier row.
_HEADS = {
    "causal-lm": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "classification": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "question-answering": ("AutoModelForQuestionAnswering", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    "multiple-choice": ("AutoModelForMultipleChoice", modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
    "next-sentence": (
        "AutoModelForNextSentencePrediction",
        modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    ),
    "base": ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
}

# transformers opens a model under patches of its own classes: a second thread would leave them there, and every model opened
# after that would be another (a tied head without its weight).
_opening = threading.RLock()

# What no connection raises: its class is that of the HTTP client huggingface_hub was built on.
_TRANSPORT: tuple[type[Exception], ...] = (OSError, *hub_errors.HfHubHTTPError.__bases__)


@dataclass(frozen=True)
class Loaded:
    """A model as it was opened: what runs, what splits text for it, and which weights these are.

    `revision` is the commit on the hub, None for a model from elsewhere. `dtype` is what it computes in.
    `notes` says what the caller may not expect: a wrapper set aside, weights of the checkpoint left out.
    `changes` are those made since (`pellucid.changed`). `pooling` is how its directory makes one vector of a text
    (sentence-transformers' `modules.json`): "mean", "cls", "lasttoken", "max"; None where it does not say.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    revision: str | None
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    changes: tuple[Any, ...] = ()
    pooling: str | None = None

    def twin(self, module: nn.Module, changes: tuple[Any, ...]) -> Loaded:
        """The same with a module that shares tensors with this one: what is known of these is not hashed again."""
        made = replace(self, module=module, dtype=_dtype_of(module), changes=self.changes + changes)
        vars(made)["weights"] = Fingerprint(module, known=self.weights)
        return made

    @functools.cached_property
    def weights(self) -> Fingerprint:
        """What knows the weights' digest, and whether they changed."""
        return Fingerprint(self.module)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the weights as they are now (`pellucid.anatomy.fingerprint`)."""
        return self.weights.digest


def read(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    task: Task = "auto",
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantization_config: Any = None,
    tp_plan: Any = None,
    base: str | Path | None = None,
) -> Loaded:
    """Open a hub id, a directory or a `.gguf` file; a module in memory passes through untouched, with the tokenizer of a
    `transformers.pipeline` if it comes in one.

    `tokenizer` is a tokenizer, or where to read one; by default it comes with the model, False is none (for token ids). `task` names the
    head; "auto" follows the checkpoint. `dtype` is the checkpoint's own by default, and float32 for GGUF,
    whose quantised weights are expanded. Only safetensors are read, unless `allow_pickle` is set.
    `quantization_config` is transformers' own: weights are packed as they are read. `tp_plan` ("auto", or transformers' own rules)
    splits the weights over the processes that torchrun started, see `pellucid.anatomy.parallel`. A directory or hub id that holds an
    adapter alone (peft's `adapter_config.json`) opens with its base model, which `base` names if the adapter does not.

    Raises LoadError: one line that says what to do.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> read(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2))).notes[-1]
    'opened without a tokenizer: it takes token ids'
    """
    if not among(task, Task):
        raise LoadError(f"unknown task {task!r}{nearest(task, get_args(Task))}")
    if isinstance(source, transformers.Pipeline):
        tokenizer = source.tokenizer if tokenizer is None else tokenizer
        source = source.model
    if isinstance(source, nn.Module):
        if (task, revision, dtype, device, device_map, quantization_config, tp_plan, base) != ("auto", *[None] * 7):
            raise LoadError("a module in memory is used as it is: task, dtype and the like are for files")
        return _in_memory(source, tokenizer, trust_remote_code)
    if device is not None and device_map is not None:
        raise LoadError("device and device_map contradict each other: pass one of them")

    if tp_plan is not None and (device, device_map) != (None, None):
        raise LoadError("tp_plan puts each process's part on its own device: leave out device and device_map")

    files = _locate(source, revision)
    if files.adapter and tp_plan is not None:
        raise LoadError(f"{files.name!r} is an adapter: tp_plan is for whole models, merge it and open that")
    if files.adapter:
        settings = {
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "quantization_config": quantization_config,
        }
        trusted = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        return _adapted(files, base, tokenizer, task, settings | trusted)
    if base is not None:
        raise LoadError(f"{files.name!r} is a whole model: base= is for an adapter that is kept alone")
    files.check_weights(allow_pickle)
    options = files.options | {"trust_remote_code": trust_remote_code}
    placing = {
        "dtype": _dtype(dtype, default=torch.float32 if files.gguf else "auto"),
        "device_map": device_map,
        "use_safetensors": None if allow_pickle else True,
    } | ({} if quantization_config is None else {"quantization_config": quantization_config})
    if files.gguf:
        files = _expanded(files)
        options = files.options | {"trust_remote_code": trust_remote_code}
    with (
        _opening,
        _one_line_errors(files.name),
        _quiet(),
        gguf.parsed_once() if files.gguf else contextlib.nullcontext(),
    ):
        config = transformers.AutoConfig.from_pretrained(files.where, **options)
        if tokenizer is None:
            tokenizer = _tokenizer(files.where, files.name, **options)
        else:
            tokenizer = _tokenizer(tokenizer, files.name, trust_remote_code=trust_remote_code)
        if tp_plan is not None:
            placing |= parallel.split(_openers(files, config, task, {})[0], config, tp_plan)
        module, notes = _open(files, config, task, options | placing)
        if tp_plan is not None:
            parallel.note(module)
        if files.gguf:
            module = gguf.plain(module)
        if device is not None:
            module = module.to(device)
        pooling = _pooling(files)
    module, notes = as_rows(module.eval()), (*files.notes, *notes)
    return Loaded(module, tokenizer, files.name, files.revision, _dtype_of(module), notes, pooling=pooling)


def _in_memory(module: nn.Module, tokenizer: Any, trust_remote_code: bool) -> Loaded:
    """A module the caller built: nothing is moved, cast or switched."""
    inner = unwrapped(module)
    if getattr(inner, "config", None) is None:
        raise LoadError(
            f"a {type(inner).__name__} has no `config`, which says what its tokens and answers are: expected a model of "
            "transformers; pass the one inside it, or set its config on it"
        )
    _check_prompts(inner)
    notes = []
    if inner is not module:
        wrapper = "torch.compile's wrapper" if hasattr(module, "_orig_mod") else f"the wrapper {type(module).__name__}"
        notes.append(f"{wrapper} is set aside: the module inside it runs")
    if inner.training:
        notes.append(
            "the module is in training mode: it runs in evaluation mode here, and is in its own again afterwards"
        )
    config = getattr(inner, "config", None)
    name = getattr(config, "name_or_path", "") or type(inner).__name__
    if getattr(module, "peft_config", None) or getattr(inner, "peft_config", None):  # that name opens the base alone
        name = type(inner).__name__
    if tokenizer is None or tokenizer is False:
        tokenizer = None
        notes.append("opened without a tokenizer: it takes token ids")
    else:
        with _one_line_errors(name), _quiet():
            tokenizer = _tokenizer(tokenizer, name, trust_remote_code=trust_remote_code)
    revision = getattr(config, "_commit_hash", None)
    return Loaded(as_rows(inner), tokenizer, name, revision, _dtype_of(inner), tuple(notes))


def _check_prompts(module: nn.Module) -> None:
    """LoadError where a wrapper puts learnt prompts or prefixes in front: positions would be counted past the text's."""
    config: Any = getattr(module, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise LoadError(
            f"a {getattr(config.peft_type, 'value', config.peft_type)} adapter puts {config.num_virtual_tokens} virtual tokens "
            "in front, which are in no text, so that positions and answers would be read at wrong tokens: open the model "
            "without it (module.get_base_model()), or an adapter that is in the layers"
        )


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter: packed quantised weights are integers."""
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _dtype(given: str | torch.dtype | None, default: str | torch.dtype) -> str | torch.dtype:
    if given is None:
        return default
    if isinstance(given, torch.dtype) or given == "auto":
        return given
    found = getattr(torch, given, None)
    if not isinstance(found, torch.dtype):
        known = ("float32", "bfloat16", "float16", "float64", "auto")
        raise LoadError(f"unknown dtype {given!r}{nearest(given, known)}")
    return found


# Files: what there is to open, before any of it is read


@dataclass(frozen=True)
class _Files:
    name: str  # as the caller wrote it
    where: str  # what from_pretrained takes: a directory or a hub id
    listing: frozenset[str]
    revision: str | None = None
    gguf: str | None = None  # the file to read, when it is not a transformers checkpoint
    adapter: bool = False  # it holds an adapter of another model, and no model
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What from_pretrained needs to find the same files."""
        named = {"revision": self.revision, "gguf_file": self.gguf}
        return {name: value for name, value in named.items() if value is not None}

    def pick(self) -> _Files:
        """Decide what to read: the checkpoint transformers wrote, or the only GGUF file beside no such."""
        if "config.json" in self.listing:
            return self
        if "adapter_config.json" in self.listing:
            return replace(self, adapter=True)
        ggufs = sorted(f for f in self.listing if f.endswith(".gguf"))
        if not ggufs:
            found = f"found: {_few(self.listing)}"
            raise LoadError(f"{self.name!r} has no config.json, so it is no transformers model ({found})")
        if len(ggufs) > 1:
            raise LoadError(f"{self.name!r} holds {len(ggufs)} GGUF files ({_few(ggufs)}): pass one of them")
        return _gguf(self.name, self.where, ggufs[0], self.revision)

    def check_weights(self, allow_pickle: bool) -> None:
        """Refuse pickled or absent weights before anything is opened."""
        safe = [f for f in self.listing if f.endswith(".safetensors") and not f.startswith("adapter")]
        if safe or self.gguf:
            return
        if not any(f.startswith("pytorch_model") for f in self.listing):
            raise LoadError(f"{self.name!r} holds no weights in safetensors (found: {_few(self.listing)})")
        if not allow_pickle:
            raise LoadError(
                f"{self.name!r} holds its weights only as pickles, which can run code when they are read: "
                "save them as safetensors (save_pretrained does), or pass allow_pickle=True if you trust them"
            )


def _locate(source: str | Path, revision: str | None) -> _Files:
    if not isinstance(source, str | Path):
        raise LoadError(f"{source!r} is no model: give a hub id, a directory, a .gguf file or a module")
    path, name = Path(source).expanduser(), str(source)
    if not path.exists():
        hub_id = isinstance(source, str) and len(path.parts) <= 2 and not name.startswith((".", "/", "~"))
        if hub_id and path.suffix != ".gguf":
            return _on_hub(name, revision).pick()
        raise LoadError(f"no such file or directory: {name!r}{_nearest_models(path)}")
    if revision is not None:
        raise LoadError(f"revision={revision!r} is for models on the hub, and {name!r} is on this disk")
    if path.is_dir():
        return _Files(name, str(path), frozenset(f.name for f in path.iterdir())).pick()
    if path.suffix != ".gguf":
        raise LoadError(f"{name!r} is a file: pass the directory it lies in, or a .gguf file")
    return _gguf(name, str(path.parent), path.name)


def _gguf(name: str, where: str, file: str, revision: str | None = None) -> _Files:
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise LoadError(f"reading {file!r} needs {' and '.join(missing)}: pip install 'pellucid[gguf]'")
    return _Files(name, where, frozenset({file}), revision, file)


def _expanded(files: _Files) -> _Files:
    """The kept copy of a GGUF file, made now where there is none yet; the file itself where none can be kept."""
    with _opening, _one_line_errors(files.name), _quiet():
        path = Path(files.where) / str(files.gguf)
        if not path.exists():
            path = Path(huggingface_hub.hf_hub_download(files.where, str(files.gguf), revision=files.revision))
        folder = gguf.place(path)
        if folder is None:
            return files
        about = gguf.kept(folder)
        if about is None:
            if not gguf.roomy(path, folder):
                return files
            options = {"gguf_file": path.name}
            try:
                with gguf.parsed_once():
                    config = transformers.AutoConfig.from_pretrained(path.parent, **options)
                    tokenizer = _tokenizer(path.parent, files.name, **options)
                    whole = {**options, "trust_remote_code": False, "dtype": torch.float32}
                    module, notes = _open(replace(files, where=str(path.parent)), config, "auto", whole)
            except Exception:  # another head or tokenizer may have been asked for; else it fails again, and is told
                return files
            about = {"notes": notes}
            if not gguf.keep(folder, gguf.plain(module), tokenizer, about):
                return files
        return replace(files, where=str(folder), gguf=None, notes=tuple(about["notes"]))


def _on_hub(name: str, revision: str | None) -> _Files:
    """Ask the hub what the model holds; without a connection, look at the copy in the hub's cache."""
    hint = _nearest_models(Path(name))
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
        return _Files(name, name, frozenset(f.rfilename for f in info.siblings or []), info.sha)
    except hub_errors.GatedRepoError:
        raise LoadError(f"{name!r} is gated: accept its terms on the hub, then `hf auth login`") from None
    except hub_errors.RevisionNotFoundError:
        raise LoadError(f"{name!r} has no revision {revision!r}: no such branch, tag or commit") from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise LoadError(f"{name!r} is neither a directory here nor a model on the hub{hint}") from None
    except _TRANSPORT as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except OSError:
        which = repr(name) if revision is None else f"{name!r} at revision {revision!r}"
        raise LoadError(
            f"{which} is neither a directory here nor in the hub's cache, and the hub cannot be reached ({reason}){hint}"
        ) from None
    return _Files(name, str(folder), frozenset(f.name for f in folder.iterdir()), folder.name)


def _nearest_models(path: Path) -> str:
    """A hint naming the models that lie beside a path that does not exist."""
    parent = next(p for p in path.absolute().parents if p.is_dir())
    with contextlib.suppress(OSError):
        models = [p.name for p in parent.iterdir() if p.suffix == ".gguf" or (p / "config.json").exists()]
        return nearest(path.name, sorted(models))
    return ""


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"


# What transformers is asked, and what it answers


def _open(files: _Files, config: Any, task: Task, options: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    """The module with all of its weights, and notes on what did not match."""
    remote = getattr(config, "auto_map", {}) if options["trust_remote_code"] else {}
    for opener in _openers(files, config, task, remote):
        module, info = opener.from_pretrained(files.where, config=config, output_loading_info=True, **options)
        # A pooler hangs beside a model without a head: nothing in it changes when that is random.
        beside = type(module).__name__ in _names(_HEADS["base"][1].values())
        missing = [key for key in info["missing_keys"] if not (beside and "pooler" in key)]
        if not missing:
            break
    else:
        raise LoadError(
            f"{files.name!r} has no weights for {_few(missing)} of {type(module).__name__}, which would be "
            "random: pass task='base' to open it without a head"
        )
    notes = []
    if info["unexpected_keys"]:
        notes.append(f"{type(module).__name__} has no place for these weights: {_few(info['unexpected_keys'])}")
    if info["missing_keys"]:
        notes.append(f"not in the checkpoint, so random: {_few(info['missing_keys'])}")
    return module, tuple(notes)


# peft's word for what an adapter was trained on -> task
_ADAPTED = {
    "CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "classification", "FEATURE_EXTRACTION": "base",
    "TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering",
}  # fmt: skip


def _adapted(files: _Files, base: str | Path | None, tokenizer: Any, task: Any, options: dict[str, Any]) -> Loaded:
    """An adapter on its base model, each read as it says; the adapter is as it was saved, neither merged nor trained."""
    if importlib.util.find_spec("peft") is None:
        raise LoadError(f"{files.name!r} holds an adapter: pip install 'pellucid[adapters]' to open it")
    import peft

    with _one_line_errors(files.name), _quiet():
        config = peft.PeftConfig.from_pretrained(files.where, revision=files.revision)
    named = base or config.base_model_name_or_path
    if not named:
        raise LoadError(f"{files.name!r} holds an adapter alone and does not say of which model: pass base=...")
    if tokenizer is None and "tokenizer_config.json" in files.listing:
        tokenizer = files.where
    task = _ADAPTED.get(str(getattr(config.task_type, "value", config.task_type)), task) if task == "auto" else task
    try:
        loaded = read(named, tokenizer=tokenizer, task=task, **options)
    except LoadError as error:
        raise LoadError(
            f"{files.name!r} is an adapter of {str(named)!r}, which does not open: {error}; pass base=... to name "
            "that model otherwise"
        ) from None
    with _one_line_errors(files.name), _quiet():
        module = peft.PeftModel.from_pretrained(loaded.module, files.where, revision=files.revision).eval()
    _check_prompts(module)
    notes = (*loaded.notes, f"the adapter {files.name!r} is on {loaded.name!r}")
    return replace(loaded, module=unwrapped(module), name=files.name, revision=files.revision, notes=notes)


def _openers(files: _Files, config: Any, task: Task, remote: Mapping[str, str]) -> list[Any]:
    """What to open it with, in turn: the class of the task asked for, the very class it was saved from, or a guess
    before none."""
    known = [head for head, (auto, table) in _HEADS.items() if auto in remote or config.model_type in table]
    if task != "auto":
        if task not in known:
            raise LoadError(f"a {config.model_type} model has no {task} class{nearest(task, known)}")
        return [_auto(task)]
    saved = (config.architectures or [None])[0]
    own = [head for head in known if _HEADS[head][0] in remote]
    if own:
        return [_auto(own[0])]
    if saved is not None:
        kind = getattr(transformers, saved, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise LoadError(
                f"{files.name!r} was saved from {saved}, which transformers {transformers.__version__} has not: install "
                "one that has it, or pass task='base' to open it without its head"
            )
        return [kind]
    if config.is_encoder_decoder:
        likely = ["seq2seq-lm"]
    elif getattr(config, "is_decoder", False):
        likely = ["causal-lm"]
    else:
        likely = ["masked-lm", "causal-lm"]
    return [_auto(head) for head in [*[head for head in likely if head in known][:1], "base"]]


def _auto(head: str) -> Any:
    return getattr(transformers, _HEADS[head][0])


def _names(values: Iterable[Any]) -> set[str]:
    """The names in a table of transformers, whose entries are names or tuples of some."""
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}


def _pooling(files: _Files) -> str | None:
    """How sentence-transformers makes one vector of a text with this model, from the files it keeps beside it."""
    if "modules.json" not in files.listing:
        return None

    def kept(path: str) -> Any:
        found = cached_file(files.where, path, revision=files.revision)
        return json.loads(Path(str(found)).read_text(encoding="utf-8"))

    parts = [(part["type"].rpartition(".")[2], part["path"]) for part in kept("modules.json")]
    settings = [kept(f"{path}/config.json") for name, path in parts if name == "Pooling"]
    if not settings or any(name not in ("Transformer", "Pooling", "Normalize") for name, _ in parts):
        return ", ".join(name for name, _ in parts)  # which nothing here does
    on = [key.removeprefix("pooling_mode_") for key, value in settings[0].items() if value is True and "_mode_" in key]
    found = [settings[0]["pooling_mode"]] if "pooling_mode" in settings[0] else on
    return " + ".join(str(name).removesuffix("_tokens").removesuffix("_token") for name in found)


def _tokenizer(source: Any, name: str, **options: Any) -> Any:
    """A tokenizer, given or read from a place; None where the caller wants none."""
    if source is False:
        return None
    tokenizer = source
    if isinstance(source, str | Path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise LoadError(
            f"a {type(tokenizer).__name__} is no tokenizer: pass one of transformers, where to read it, or False for a model "
            "that is given token ids"
        )
    # Without tokenizer files transformers makes one that knows its special tokens only.
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, "▁"}:
        raise LoadError(
            f"{name!r} has no tokenizer files: pass tokenizer= the one it was trained with, or False to give token ids"
        )
    return tokenizer


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Whatever transformers and the readers below it raise becomes one LoadError of one line."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text:
            text = "it runs code of its own: read that, then pass trust_remote_code=True"
        raise LoadError(f"cannot open {name!r}: {textwrap.shorten(text, 300)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars (downloads keep theirs) and no load report: `_open` says the same in notes and errors.

    A verbosity the user chose is left alone.
    """
    level, start = chatter.get_verbosity(), tqdm.__init__
    if level == chatter.WARNING:
        chatter.set_verbosity_error()
    tqdm.__init__ = functools.partialmethod(start, disable=True)
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        tqdm.__init__ = start
