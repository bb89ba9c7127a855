r"""SEA: a linear-cost estimate of the attention map selects the few keys that each query reads exactly.

When to pick it: to turn a pretrained transformer into one of linear cost by distillation, with attention weights that
can be inspected; the number of keys a query reads can be changed later without training.
When not: without a teacher or where training time matters, since the map is learned from dense scores at quadratic
cost; for a state of constant size (exact attention needs every key).

Definition (Lee et al., arXiv 2310.01777, section 3; details that the paper leaves open follow its code). For each head
and query t with n_t visible keys, an estimated map of K scores e_t, and k keys to read on average:

    p_t = softmax(e_t),   m_t = round(H k K / n_t), from 1 to H K
    kept_t = the m_t largest of the H K numbers p_t of all heads together
    pixel(t, j) = floor((j + 1/2) K / n_t - 10^-4), at least 0, for the key of rank j
    P_t = softmax over { j : pixel(t, j) in kept_t } of tau q_t . k_j,   0 if there are none
    o_t = sigmoid(b_t) sigmoid(a_t) P_t V + (1 - sigmoid(b_t)) mean_t
    mean_t = (sum_{j<=t} v_j) / (t + 1),   in noncausal-self sum_j v_j (mean over queries s of p_s)_{pixel(j)}

A layer computes e, a and b from the tokens (`Estimator`). With [pos, v] the values concatenated with codes of their
positions, and c linear attention over these with random features (FAVOR+, arXiv 2009.14794),

    z = gelu(norm(W_e [c, v])),   e = CNN(W_r z) over (query, pixel) with heads as channels,   (a, b) = W_s z

Causal: positions are a learned table; phi(x) = relu(W x d^-1/4) + 10^-3; two dilated convolutions that see queries up
to t, on K / 4 pixels, a 1 x 1 convolution, and norms before and after. Noncausal-self: positions are the identity
matrix, stretched over the row; phi is the softmax kernel; three convolutions, the first of which halves the queries, on
K / 2 pixels.

Distillation (`losses["distillation"]`, the mean over layers), with A the teacher's weights, o^A its head outputs, R(e)
the map of scores e_{pixel(t, j)}, KL the mean over heads and queries (in noncausal-self the sum over heads) and MSE the
mean over pairs or features:

    loss = 0.1 KL(A, softmax R(e)) + MSE + 0.1 KL(A, softmax of all exact scores) + MSE + MSE(o^A, o)

The teacher is `teacher={"weights": (B, H, N, M), "output": (B, H, N, V)}`, right-padded, "output" optional. In training
without a teacher, the layer's own exact weights, without gradient, replace A, and only the first two terms remain
(`self_teacher`). :func:`regard.training.distillation_loss` distils a whole model; ``regard retrofit`` teaches each new
layer the weights and head outputs of the one that it replaces, by itself first and then in the whole model.

| paper | here |
|---|---|
| T_M, predictor length K | `estimate_length` of a layer; the last axis of `estimate` |
| k | `top_k`; the code's default 7, its language models use 64 |
| a, b (scaler) | `row_logit`, `mix_logit` (B, H, N); when omitted, o_t = P_t V |
| nb_factor f | `feature_divisor`: d ln d / f random features |
| k_oversample | `oversample`: more pixels, of whose tokens a regular subset is read |
| causal_batch, k_flatten_dim | `grouping="row"` as above; `query`, `head`, `batch` rank other sets together |

Layout: (B, H, N, D), `estimate` (B, H, N, K); keys and values may have fewer heads. n_t is the query's own number of
keys, never N. The selection is not differentiated: e learns from the distillation and, in noncausal-self, from the
mean.
Cost: only the keys of kept pixels are read. A native kernel reads k + n_t / (H K) keys per query and stores nothing
besides the output, in training too. In PyTorch (float64, and if weights are requested) keys are gathered once that is
less work than masked products over all keys; both work on blocks of queries. `grouping` by heads or maps sorts all
probabilities of a head or map in PyTorch. If n_t exceeds H k K, the one pixel that is kept grows with n_t. The loss
compares the map with all exact scores: one of the seven products of training softmax attention, or four with a teacher;
nothing as wide as the keys is stored except the teacher's weights. The map, its gradient and the sums of its pixels, K
numbers per query each, add to what training stores with softmax. A causal layer estimates 512 queries at a time, and
recomputes them for gradients; most of an estimate is its linear attention, which `feature_divisor=8` makes eight times
cheaper.
State: every key and value and the sum of the values; for a layer also the sums of the linear attention and the last
four rows of each convolution.
Deviations: cross patterns are not in the paper: their estimator is the causal one over the whole memory, with q in
place of v next to c, and their mean is that of the memory. Padded keys are excluded from the linear attention, and
padded queries from the CNN; in the original code they are not. Ties between probabilities, frequent in the causal map,
go to the first pixel. A layer estimates for every query, since its convolutions and their state run over consecutive
queries; functions use one estimate for several queries if `estimate` repeats rows. LoRA, with which the original code
can train the projections, is not part of this mechanism; it applies to any layer's projections.
"""

from __future__ import annotations

import math
from typing import Any

from regard.contract import ALL_PATTERNS, Cost, Kind, Mechanism, Paper, Pattern, Shape, TrainedModel, Waiver
from regard.mechanisms.sea.definition import Config, reference
from regard.mechanisms.sea.forms import SeaState, absorb, chunked, parallel, read
from regard.mechanisms.sea.layer import Estimator, EstimatorState


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: pixels of an estimated row."""
    return {"c": config.estimate_length}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost including the estimator of a causal layer."""
    d, v, pixels = shape.dim_key, shape.dim_value, config.estimate_length
    heads, rows = shape.batch * shape.heads, shape.batch * shape.heads * shape.n
    features = max(1.0, d * math.log(d) / config.feature_divisor)
    ranked = shape.heads * pixels
    read = min(float(shape.m), max(config.top_k, shape.m / ranked))
    encoder = 4 * d * (d + 2 * v) + 4 * d * pixels / 2
    convolutions = 2 * 2 * 9 * pixels / 4 * 4 * shape.heads + 4 * pixels * shape.heads
    query = encoder + convolutions + 2 * features * (d + 2 * (d + v)) + pixels * math.log2(ranked) + 2 * read * (d + v)
    return Cost(
        flops=rows * query,
        memory=rows * 6.0 * pixels,
        state=shape.heads * (shape.m * (d + v) + v + features * (d + v + 1) + 4.0 * pixels),
        step_flops=heads * query,
    )


def in_trained_models(model: TrainedModel) -> dict[str, Any]:
    """The authors' settings for causal language models, with fewer keys for short texts; their others are the defaults."""
    return {"top_k": min(64, max(1, model.length // 8)), "feature_divisor": 8} if model.pattern.causal else {}


MECHANISM = Mechanism(
    name="sea",
    aliases=("sea_attention", "perlin", "estimated_attention_mask"),
    kind=Kind.ATTENTION,
    summary="A linear-cost estimate of the attention map selects the few keys that each query reads exactly.",
    paper=Paper("SEA: Sparse Linear Attention with Estimated Attention Mask", "2310.01777", 2023, 21),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "estimate": "bhnc",
        "row_logit?": "bhn",
        "mix_logit?": "bhn",
    },
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    engine="pixel_attention",
    variants={
        "few keys": {"top_k": 3, "estimate_length": 16, "oversample": 2.0, "row_scale": False},
        "codebook": {"estimator": "codebook", "estimate_length": 32, "jitter": 0.5},
        "joint encoder": {
            "joint_encoder": True,
            "estimate_length": 16,
            "length": 300,
            "feature_divisor": 2.0,
            "redraw_every": 0,
        },
        "cosines": {"kernel": "cosformer", "top_k": 3, "self_teacher": False},
        "by queries": {"grouping": "query", "top_k": 3, "estimate_length": 16},
        "by heads": {"grouping": "head", "top_k": 3, "estimate_length": 16},
        "by maps": {"grouping": "batch", "top_k": 3, "estimate_length": 16},
    },
    variant_patterns={
        "cosines": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "by heads": (Pattern.NONCAUSAL_SELF,),
        "by maps": (Pattern.NONCAUSAL_SELF,),
    },
    state=SeaState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"weights", "teacher"}),
    length="max",
    weights="exact",
    in_trained_models=in_trained_models,
    projection=Estimator,
    waivers=(
        Waiver("layer_lengths", "the size of its estimated map is fixed when the program is compiled"),
        Waiver("layer_gradient", "without a teacher of its own the map learns from none", variants=("cosines",)),
    ),
)

__all__ = [
    "MECHANISM",
    "Config",
    "Estimator",
    "EstimatorState",
    "SeaState",
    "absorb",
    "axis_sizes",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
]
