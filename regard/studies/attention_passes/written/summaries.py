"""Mechanisms whose queries read summaries: slots, landmarks and groups, beside near tokens or alone."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract import Tensors
from regard.engines.segments import segment_means
from regard.studies.attention_passes.written.parts import (
    ALL_PAIRS,
    CAUSAL,
    TILES,
    Written,
    beside_slots,
    gathered,
    masked,
    online,
    over_slots,
    slot_scores,
)


def _segments(inputs: Tensors) -> Tensors:
    """Matrices that average segments of queries and of keys."""

    def means(x: Tensor) -> Tensor:
        return segment_means(torch.eye(x.shape[2], dtype=x.dtype)[None, None], 3)[0, 0]

    return {**inputs, "of_queries": means(inputs["q"]), "of_keys": means(inputs["k"])}


def _last_of_groups(inputs: Tensors) -> Tensors:
    """A matrix that picks the last query of each group of 4."""
    tokens = inputs["q"].shape[2]
    last = torch.tensor([*range(3, tokens, 4), *([tokens - 1] if tokens % 4 else [])])
    return {**inputs, "last": torch.eye(tokens, dtype=inputs["q"].dtype)[last]}


def _rows(inputs: Tensors) -> Tensors:
    """Which of the rows of 4 tokens each key is in."""
    row = torch.arange(inputs["k"].shape[2]) // 4
    return {**inputs, "row": torch.nn.functional.one_hot(row).T.to(inputs["k"].dtype)}


GROUPS = f"{ALL_PAIRS}; the table has 16 groups"
SUMMARIES: dict[str, Written] = {
    "low_rank_pooling": Written(
        f"{TILES}inputs: x[m, d], p[e, s, r], q[d, s, r], c[e], temperature[s], scale[]\n"
        "cp[s, r] = c[e] * p[e, s, r]\n"
        "w[s, d] = cp[s, r] * q[d, s, r]\n"
        "raw[s, m] = w[s, d] * x[m, d]\n"
        "F[s, m] = tanh(raw[s, m])\n"
        "square[m] = F[s, m] * F[s, m]\n"
        f"S[s, m] = F[s, m] / max(sqrt(square[m]), 1e-6) * scale[] / temperature[s]{online('s', values='x', width='d')}",
        remark="its heads are the queries",
    ),
    "abc": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], slots_k[e, c], slots_v[f, c], scale[]\noutput: o\n"
        "Sk[c, m] = k[m, e] * slots_k[e, c]\n"
        "Sv[c, m] = v[m, f] * slots_v[f, c]"
        f"{online('c', scores='Sk', values='k', width='e', out='keys')}"
        f"{online('c', scores='Sv', out='values')}"
        f"{slot_scores('c')}{over_slots('c')}",
    ),
    "agent": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], agents[a, e], scale[]\noutput: o\n"
        "asked[a, e] = agents[a, e] * scale[]\n"
        f"S[a, m] = asked[a, e] * k[m, e]{online('a', out='gathered')}"
        f"{slot_scores('a', 'agents')}{over_slots('a', values='gathered')}",
        options={"agent_source": "learned", "num_agents": 3, "dwc": "none"},
        without=("gather_bias", "share_bias"),
        remark="with learned agents; pooled ones are means of queries",
    ),
    "linformer": Written(
        "inputs: q[p, e], k[m, e], v[m, f], e[m, c], f[m, c], scale[]\noutput: o\n"
        "keys[c, e] = e[m, c] * k[m, e]\n"
        "values[c, f] = f[m, c] * v[m, f]\n"
        f"{slot_scores('c')}{over_slots('c')}",
        prepare=lambda inputs: {**inputs, **{name: inputs[name][0, : inputs["k"].shape[2]] for name in "ef"}},
    ),
    "lara": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], of_queries[c, p], of_keys[c, m], scale[]\noutput: o\n"
        "mq[c, e] = of_queries[c, p] * q[p, e]\n"
        "mk[c, e] = of_keys[c, m] * k[m, e]\n"
        "mu[c, e] = mq[c, e] + mk[c, e]\n"
        "mu2[c] = mu[c, e] * mu[c, e]\n"
        "k2[m] = k[m, e] * k[m, e]\n"
        "P[c, m] = mu[c, e] * k[m, e]\n"
        f"S[c, m] = (P[c, m] - k2[m] / 2) * scale[]{online('c', out='values')}"
        "own[c] = valuesmax[c, M1] + log(valuessum[c, M1]) - mu2[c] * scale[] / 2\n"
        f"{slot_scores('c', 'mu')}"
        "B[p, c] = 2 * T[p, c] + own[c]\n"
        f"{over_slots('c', scores='B')}",
        options={"landmarks": 3},
        prepare=_segments,
        remark="as at test time, when nothing is drawn; the means around which it would draw take a traversal of their own",
    ),
    "long_short": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], p[m, c], scale[]\noutput: o\n"
        f"G[c, m] = p[m, c] + 0{gathered('c')}"
        f"{masked('abs(m - floor(p / 4) * 4 - 1.5) < 4')}\n"
        f"T[p, c] = qs[p, e] * keys[c, e]{beside_slots('c')}",
        options={"window": 4, "landmarks": 3},
        without=("k_raw", "v_raw", "norm_weight", "norm_bias"),
        remark=f"without norms of landmarks; {ALL_PAIRS}",
    ),
    "core_context": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], last[c, p], scale[]\noutput: o\n"
        f"{masked('(m >= max(0, floor((p - 2) / 4)) * 4) * (m <= p)')}\n"
        "asking[c, e] = last[c, p] * qs[p, e]\n"
        "A[c, m] = asking[c, e] * k[m, e]\n"
        f"G[c, m] = where(floor(m / 4) == c, A[c, m], -inf){gathered('c')}"
        "B[p, c] = qs[p, e] * keys[c, e]\n"
        f"T[p, c] = where(c < floor((p - 2) / 4), B[p, c], -1e30){beside_slots('c')}",
        CAUSAL,
        options={"group": 4, "window": 3},
        prepare=_last_of_groups,
        remark=GROUPS,
    ),
    "combiner": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], row[c, m], scale[]\noutput: o\n"
        f"{masked('floor(p / 4) == floor(m / 4)')}\n"
        "asking[c, e] = where(floor(p / 4) == c, qs[p, e], -inf) :: reduce(p: max)\n"
        "keys[c, e] = where(row[c, m] > 0, k[m, e], -inf) :: reduce(m: max)\n"
        "A[c, m] = asking[c, e] * k[m, e]\n"
        f"G[c, m] = where(row[c, m] > 0, A[c, m], -inf){online('c', scores='G', out='values')}"
        f"T[p, c] = qs[p, e] * keys[c, e]{beside_slots('c')}",
        options={"segment": 4},
        prepare=_rows,
        remark=GROUPS,
    ),
}
