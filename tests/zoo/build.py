"""How does a test get a tiny random model of any text model type of the installed transformers?

>>> [entry.class_name for entry in model_types() if entry.model_type == "gpt2"]
['GPT2LMHeadModel']
>>> build("gpt2").config.n_embd
32
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .shrink import shrink

WRITTEN_ON = Version("5.24")  # from this version on a missing type is a fault
# In order of preference: a family trained as encoder-decoder or masked model is shown as one.
Kind = Literal["seq2seq-lm", "masked-lm", "causal-lm", "classification"]
_CLASSES: dict[Kind, dict[str, str]] = {
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


@dataclass(frozen=True, order=True)
class Entry:
    """A text model class that transformers' auto classes offer for a model type."""

    model_type: str
    class_name: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.model_type}:{self.class_name}"


@cache
def model_types(*, all_classes: bool = False) -> tuple[Entry, ...]:
    """Every text model type once, sorted, with its language-model class; or every (type, class) pair."""
    chosen: dict[tuple[str, str], Entry] = {}
    for kind in get_args(Kind):
        for model_type, class_name in _CLASSES[kind].items():
            key = (model_type, class_name if all_classes else "")
            chosen.setdefault(key, Entry(model_type, class_name, kind))
    return tuple(sorted(chosen.values()))


def entry(model_type: str) -> Entry:
    """The preferred entry of one model type; a test that wants a type younger than the installed version is skipped."""
    for known in model_types():
        if known.model_type == model_type:
            return known
    if Version(transformers.__version__) < WRITTEN_ON:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    raise LookupError(f"transformers {transformers.__version__} has no text model {model_type!r}")


def build(
    which: Entry | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
    layers: int = 2,
    **config: Any,
) -> PreTrainedModel:
    """A tiny model in eval mode, every weight random; the seed gives the same weights in any dtype.

    `attn` is the attention implementation ("eager", "sdpa"), None the family's own. `layers` is a minimum:
    a family with more kinds of layer gets one of each. Further keywords override fields of the config.
    """
    which = entry(which) if isinstance(which, str) else which
    model_class = getattr(transformers, which.class_name)
    config_class = _config_class(which.model_type, model_class)
    decoder = {"is_decoder": True} if which.kind == "causal-lm" and hasattr(config_class, "is_decoder") else {}
    tiny = config_class(**shrink(config_class, layers) | decoder | config)
    if attn is not None:
        tiny._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = model_class(tiny).eval()
        _perturb(module)
        return module if dtype == torch.float32 else _in_dtype(module, dtype)


def _config_class(model_type: str, model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """The config class of a type, or the one its model asks for: a composite config's text part."""
    config_class, wanted = CONFIG_MAPPING[model_type], model_class.config_class
    return config_class if wanted is None or issubclass(config_class, wanted) else wanted


def _perturb(module: PreTrainedModel) -> None:
    """Fresh models have zero biases and unit norms; noise makes every term of every proof count."""
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}  # tied ones once
    with torch.no_grad():
        for tensor in tensors.values():
            learnt = isinstance(tensor, nn.Parameter) or not tensor.any()  # zero buffers: BART's logit bias
            if tensor.is_floating_point() and learnt:
                tensor.add_(torch.randn_like(tensor), alpha=0.08 if tensor.ndim > 1 else 0.1)


def _in_dtype(module: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model as from_pretrained loads it: tables made in `dtype`, some weights left in float32."""
    twin = type(module)._from_config(module.config, dtype=dtype).eval()
    exact = module._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    weights = module.state_dict()
    for name, tensor in twin.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = weights[name].to(torch.float32 if any(part in name for part in exact) else dtype)
    return twin
