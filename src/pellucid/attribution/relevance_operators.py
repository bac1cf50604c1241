"""Which operators obey which rule of relevance propagation? Names of torch functions, as `relevance_rules` reads them."""

from __future__ import annotations

SUMS = {
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "rsub", "subtract",
}  # fmt: skip
PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
CONTRACTIONS = {
    "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "einsum", "outer", "inner", "tensordot",
    "_grouped_mm", "grouped_mm",
}  # fmt: skip
SOFTMAX = {"softmax", "_softmax", "log_softmax"}
# Sizes that norms divide by, decays, weights of recurrences: constants at their value.
HELD = {
    "rsqrt", "reciprocal", "sqrt", "norm", "linalg_norm", "linalg_vector_norm", "std", "var", "exp", "exp2", "log",
    "logsumexp",
}  # fmt: skip
# Functions of one number that bend.
SCALAR = {
    "gelu", "silu", "silu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "softplus", "elu", "elu_", "selu", "celu", "mish",
    "erf", "expm1", "log1p", "logsigmoid", "log_sigmoid", "hardsigmoid", "hardswish", "softsign",
}  # fmt: skip
# Linear in what carries relevance, or linear piece by piece through the origin (relu, abs, max, clamp within its bounds):
# their gradient is the rule.
LINEAR = {
    "abs", "adaptive_avg_pool1d", "adjoint", "alpha_dropout", "amax", "amin", "as_strided", "avg_pool1d", "avg_pool2d",
    "bfloat16", "block_diag", "broadcast_to", "chunk", "clamp", "clamp_", "clamp_max", "clamp_min", "clip", "clone",
    "contiguous", "copy_", "cpu", "cuda", "cumsum", "diag_embed", "diagonal", "diff", "double", "dropout", "dropout_",
    "expand", "expand_as", "fft_fft", "fft_fft2", "fft_fftn", "fft_ifft", "fft_irfft", "fft_rfft", "flatten", "flip",
    "float", "fold", "gather", "half", "hardtanh", "imag", "index_add", "index_add_", "index_copy", "index_copy_",
    "index_fill", "index_fill_", "index_put", "index_put_", "index_select", "leaky_relu", "leaky_relu_", "masked_fill",
    "masked_fill_", "masked_scatter", "masked_scatter_", "masked_select", "max", "maximum", "mean", "min", "minimum",
    "movedim", "narrow", "nan_to_num", "neg", "__neg__", "pad", "permute", "positive", "prelu", "ravel", "real", "relu",
    "relu6", "relu_", "repeat", "repeat_interleave", "requires_grad_", "reshape", "reshape_as", "roll", "scatter",
    "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "select", "__setitem__", "__getitem__", "sort", "split", "split_with_sizes",
    "squeeze", "squeeze_", "sum", "swapaxes", "swapdims", "t", "take", "take_along_dim", "tensor_split", "threshold",
    "tile", "to", "topk", "transpose", "transpose_", "tril", "tril_", "triu", "triu_", "type", "type_as", "unbind",
    "unflatten", "unfold", "unsqueeze", "unsqueeze_", "view", "view_as", "view_as_complex", "view_as_real", "where",
    "zero_",
}  # fmt: skip
# Make a tensor that has the form of another, and nothing of its content; or mean to stop the gradient.
EMPTY = {
    "detach", "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like",
    "rand_like", "randn_like", "zeros_like",
}  # fmt: skip
