"""Which proofs cannot hold on which model types, and why?

`LACKS` says what a family does not have at all, `REFUSED` what it has in a form that the map refuses by name, and
`KNOWN_FAILURES` what pellucid cannot prove and what in the architecture is in the way. The tests demand exactly
these, so that a regression breaks them and an improvement has to be written down.
"""

from __future__ import annotations

# State spaces, recurrences, Fourier mixing.
_NO_ATTENTION = {"falcon_mamba", "fnet", "mamba", "mamba2", "rwkv", "xlstm"}
_NO_MLP = {"falcon_mamba", "mamba", "mamba2"}
# Every MLP is a mixture of experts: neurons belong to the experts.
_ONLY_EXPERTS = """
aria_text cohere2_moe deepseek_v4 flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
hunyuan_v1_moe inkling_text kolibri1 lara_mini mellum minimax minimax_m2 minimax_m3_vl_text mistral4 mixtral olmoe phimoe
qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text solar_open zaya
"""

# proof -> the model types that have nothing it could be about
LACKS: dict[str, set[str]] = {
    "attention": _NO_ATTENTION,
    "projection": _NO_ATTENTION,
    "ablation": _NO_ATTENTION,
    "neurons": _NO_MLP | set(_ONLY_EXPERTS.split()),
    "position-wise": _NO_MLP,
    "reads": {"falcon_mamba", "mamba", "mamba2"},
    "values": {"falcon_mamba", "mamba", "mamba2"},
    "writers": {"falcon_mamba", "mamba", "mamba2"},
}

# Proofs about something most families do not have: the types that do.
ONLY_IN: dict[str, set[str]] = {
    # experts called through transformers' interface
    "experts": {
        "afmoe",
        "aria_text",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots1",
        "dots3_note",
        "dots3_note_text",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "hy_v4",
        "inkling_text",
        "jamba",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lara_mini",
        "lfm2_moe",
        "mellum",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl_text",
        "mistral4",
        "mixtral",
        "nemo_speechlm",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "solar_open",
        "zaya",
    },
    # a gate, norm or other operation between z and the output projection
    "heads": {
        "afmoe",
        "axk2",
        "bailing_hybrid",
        "beam",
        "bitnet",
        "canine",
        "deepseek_v4",
        "dots3_note",
        "dots3_note_text",
        "hrm_text",
        "hy_v4",
        "laguna",
        "lfm3",
        "mobilebert",
        "neomme",
        "nystromformer",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "zamba",
        "zamba2",
    },
}

_NO_SOFTMAX = "attention is approximated without a softmax over keys"
_WINDOWS = "windows of keys: the scores are no query-by-key matrix"
_OWN_EXPERTS = "experts run by code of the family's own"
_MIXED = "several residual streams are mixed before they are read"
_GATED = "a gate multiplies, token by token, what heads and neurons make together"
_SHIFTED = "the feed-forward part reads the position before as well"

# model type -> proof -> why the map refuses what the proof would be about
REFUSED: dict[str, dict[str, str]] = {
    "dbrx": dict.fromkeys(("neurons", "position-wise"), _OWN_EXPERTS),
    "deepseek_v4": {
        "reads": "queries and keys come through a bottleneck whose latent heads share",
        "writers": _GATED,
    },
    "diffllama": {"attention": "two softmaxes are subtracted, so no pattern is a distribution over keys"},
    "hy_v4": {"reads": _MIXED, "writers": _GATED},
    "llama4": dict.fromkeys(("neurons", "position-wise"), _OWN_EXPERTS),
    "llama4_text": dict.fromkeys(("neurons", "position-wise"), _OWN_EXPERTS),
    "longformer": {"attention": _WINDOWS},
    "mobilebert": dict.fromkeys(
        ("neurons", "position-wise", "writers"),
        "attention and four feed-forward networks sit in a bottleneck and are added as one",
    ),
    "mra": dict.fromkeys(("attention", "projection", "ablation"), _NO_SOFTMAX),
    "qwen4_exp": {"reads": _MIXED, "writers": _GATED},
    "qwen4_exp_text": {"reads": _MIXED, "writers": _GATED},
    "rwkv": dict.fromkeys(("neurons", "position-wise", "reads", "values", "writers"), _SHIFTED),
    "squeezebert": {"reads": "its projections are convolutions with the channels before the positions"},
    "yoso": dict.fromkeys(("attention", "projection", "ablation"), _NO_SOFTMAX),
    "zamba": dict.fromkeys(
        ("neurons", "position-wise", "reads", "writers"),
        "the shared block adds attention and MLP as one, through a projection of its own",
    ),
    "zamba2": dict.fromkeys(
        ("neurons", "position-wise", "reads", "writers"),
        "the shared block adds attention and MLP as one, through a projection of its own",
    ),
    "zaya": {"reads": "queries, keys and values are convolved over positions"},
}

_ALTUP = "every block predicts and corrects four residual streams (AltUp), contributions are never computed alone"
_EARLIER = "blocks and the head attend over the outputs of all earlier blocks"
_ROUTED = "experts project queries and outputs of attention, routed per token"
_STREAMS = "the output projection is called once per n-gram stream"
_REVERSIBLE = "reversible layers: two residuals, hashed attention, a head that reads both"

# all that is proven of what blocks add; the first is that they add
_PARTS = (
    "residual",
    "attention",
    "projection",
    "ablation",
    "neurons",
    "position-wise",
    "unembedding",
    "reads",
    "values",
    "writers",
)

# model type -> proof ("opens" when it cannot be opened at all) -> what is in the way
KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "gemma3n_text": dict.fromkeys(
        _PARTS,
        _ALTUP,
    ),
    "dory": {"unembedding": "the stack that comes last does not make the residual that the head reads"},
    "inkling2_loop_text": dict.fromkeys(
        _PARTS,
        "looped blocks: " + _EARLIER,
    ),
    "inkling2_text": dict.fromkeys(
        _PARTS,
        _EARLIER,
    ),
    "jetmoe": dict.fromkeys(
        ("projection", "ablation", "neurons", "position-wise", "reads", "values", "writers"), _ROUTED
    ),
    "prophetnet": {"projection": _STREAMS, "unembedding": "logits come from the n-gram streams"},
    "reformer": dict.fromkeys(
        _PARTS[1:],
        _REVERSIBLE,
    ),
    "xlnet": dict.fromkeys(("projection", "ablation"), "the output projection is an einsum with a raw parameter"),
}
