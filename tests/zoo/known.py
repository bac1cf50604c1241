"""Which proofs cannot hold on which model types, and why?

`LACKS` says what a family does not have at all. `KNOWN_FAILURES` says what pellucid cannot prove, and what in
the architecture is in the way; the tests demand exactly these failures, so that a regression breaks them and
an improvement has to be written down.
"""

from __future__ import annotations

# State spaces, recurrences, Fourier mixing.
_NO_ATTENTION = {"falcon_mamba", "fnet", "mamba", "mamba2", "rwkv", "xlstm"}
_NO_MLP = {"falcon_mamba", "mamba", "mamba2"}
_ONLY_EXPERTS = """
aria_text cohere2_moe deepseek_v4 flex_olmo gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe
inkling_text inkling2_text kolibri1 mellum minimax minimax_m2 minimax_m3_vl_text mistral4 mixtral olmoe phimoe
qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text solar_open zaya
"""

# proof -> the model types that have nothing it could be about
LACKS: dict[str, set[str]] = {
    "attention": _NO_ATTENTION,
    "projection": _NO_ATTENTION,
    "ablation": _NO_ATTENTION,
    "neurons": _NO_MLP | set(_ONLY_EXPERTS.split()),
}

_GENERIC_HEAD = (
    "the head uses an operation between the last residual and the unembedding that is not recognised"
)
_FUSED_HEAD = "the unembedding is a product of two weights joined in the head, no module's own"
_NO_SOFTMAX = "attention is approximated without a softmax over keys"
_STREAMS = "hyper-connections: every block mixes several residual streams"
_XLM = {
    "residual": "the model's own loop multiplies the residual by the padding mask; blocks are no modules",
    "chain": "as residual",
    "neurons": "as residual",
    "unembedding": "as residual",
}
_CODEBOOKS = {"opens": "several rows of codebook tokens make one sequence"}
_QWEN4 = {"residual": _STREAMS}

# model type -> proof ("opens" when it cannot be opened at all) -> what is in the way
KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "blt": {"chain": "cross-attention to patches acts between the blocks of the local models"},
    "canine": {"unembedding": "the classifier reads a pooled state through a tanh layer"},
    "convbert": {
        "projection": "attention and a convolution enter the output projection side by side",
        "ablation": "as projection",
    },
    "deepseek_v4": {
        "residual": _STREAMS,
        "projection": "the output projection is low-rank, by groups of heads",
        "ablation": "as projection",
        "unembedding": "the streams are merged before the unembedding",
    },
    "doge": {"residual": "a learned vector scales every channel of the residual"},
    "esm": {"unembedding": _GENERIC_HEAD},
    "flaubert": _XLM,
    "gemma3n_text": {
        "residual": "every block predicts and corrects four residual streams (AltUp)",
        "neurons": "as residual",
        "unembedding": "the streams are merged before the unembedding",
    },
    "gpt_neox_japanese": {"residual": "the last block adds its MLP's output in the block itself"},
    "granitemoehybrid": {
        "residual": "experts and the shared MLP are summed in the block itself",
        "neurons": "as residual",
    },
    "hrm_text": {"chain": "two recurrent modules hand each other sums of their states"},
    "hy_v4": {
        "residual": _STREAMS,
        "neurons": "as residual",
        "unembedding": "the streams are merged before it",
    },
    "ibert": {"opens": "blocks pass pairs of a quantised tensor and its scale"},
    "inkling2_text": {
        "residual": "the residual starts anew at block boundaries, blocks attend to the earlier ones",
        "unembedding": "as residual",
    },
    "jetmoe": {
        "projection": "experts project queries and outputs of attention",
        "ablation": "as projection",
        "neurons": "experts in a layout of their own",
    },
    "longformer": {"opens": "windows of keys: the scores are no query-by-key matrix"},
    "mobilebert": {
        "neurons": "four feed-forward networks in a bottleneck, inside the block",
        "unembedding": _FUSED_HEAD,
    },
    "mra": dict.fromkeys(("attention", "projection", "ablation"), _NO_SOFTMAX),
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
    "neomme": {"unembedding": _GENERIC_HEAD},
    "pegasus_x": {
        "residual": "staggered blocks cut the attention's output to length in the block itself",
        "ablation": "global tokens share the output projection",
    },
    "perceiver": {"unembedding": "the logits are read by a decoder's cross-attention"},
    "prophetnet": {
        "projection": "several predicting streams lie side by side in the decoder's residual",
        "unembedding": "as projection",
    },
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        **dict.fromkeys(("attention", "projection", "ablation"), _NO_SOFTMAX),
        "unembedding": "two reversible residual streams are joined before the unembedding",
    },
    "squeezebert": {"opens": "blocks carry channels before positions"},
    "xlm": _XLM,
    "xlnet": {"residual": "the attention's output projection and residual are in one function"},
    "xmod": {"residual": "the adapter of the language is applied in the block itself, by rows"},
    "yoso": dict.fromkeys(("attention", "projection", "ablation"), _NO_SOFTMAX),
    "zamba": {"neurons": "the MLP belongs to a block shared between layers, inside the layer"},
    "zamba2": {"neurons": "the MLP belongs to a block shared between layers, inside the layer"},
    "zaya": {"residual": "learned vectors scale and shift the residual and every contribution"},
}
