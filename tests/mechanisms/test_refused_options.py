"""Options that are out of range or incompatible are refused by name before anything is computed."""

from __future__ import annotations

import dataclasses
import math

import pytest
from support import refused

from regard import get_mechanism
from regard.catalogue import list_mechanisms

INFINITE, NAN = math.inf, math.nan
ALONE = {
    "aaren": {"forget": [0.0, 1.5], "query_tokens": [0], "noncausal": ["first"], "scan": ["fast"]},
    "abc": {"slots": [0]},
    "agent": {"num_agents": [0], "agent_source": ["mean"], "second_scale_exponent": [0.0], "dwc": ["all"]}
    | {"conv_stride": [3], "bias_grid": [(3, 3)]},
    "bidirectional_mamba": dict.fromkeys(("combine", "convolution", "norm"), ("diagonal",))
    | dict.fromkeys(("copies", "d_state", "dt_rank", "expand", "chunk_size"), (0,))
    | {"scan": ["diagonal", "strided"], "shared": [("B",)], "conv_width": [-1], "dt_init": [(0.1, 0.01)]}
    | {"window": [(2, 2)]},
    "bigbird": {"block": [0]} | dict.fromkeys(("random_blocks", "neighbours", "first_blocks", "last_blocks"), (-1,)),
    "block_sparse": {"layout": ["diagonal"], "block_size": [0], "global_blocks": [-1], "neighbours": [-1]}
    | {"density": [1.5, NAN], "softcap": [0.0], "visible": [[[True]]]},
    "clipped_softmax": {"gamma": [0.1, -INFINITE, NAN], "zeta": [0.9, INFINITE], "length": [0], "warmup": [-1.0]}
    | {"alpha": [2.0]},
    "complex_rotary": {"position": ["alibi"], "base": [1.0, INFINITE], "score_scale": ["sqrt"], "delta": ["random"]},
    "cosformer": {"length": [0], "eps": [0.0, NAN, INFINITE]},
    "delta_rule": {"feature_map": ["exp"], "norm": ["max", "sum"], "eps": [0.0], "gate": ["diagonal"]},
    "diagonal": {"block": [0], "activation": ["gelu"], "output_norm": ["batch"], "form": ["dilated"]},
    "differential": {"lambda_init": [-0.1, 1.0, NAN]},
    "flow_attention": {"phi": ["exp"], "clamp": [(1.0, -1.0), (1.0,)], "temperature": [0.0], "eps": [0.0, -1.0]},
    "funnel": {"blocks": [0], "layers": [0], "pool": ["min"], "norm_eps": [0.0]},
    "gated_linear": {"feature_map": ["cosine"], "gate": ["dense"], "gate_rank": [0], "clamp_min": [0.1, NAN]}
    | {"gate_normalizer": [0.0]},
    "gated_softmax": {"predictor": ["conv"], "initial_gate": [0.0, 1.0, NAN], "fine_tune": [True]}
    | {"initial_std": [-0.1, INFINITE]},
    "kernelized_rpe": {"feature_map": ["silu", "tanh"], "eps": [0.0, INFINITE], "method": ["dense"]}
    | {"offsets": ["rotary"], "features": [0], "redraw": [-1], "max_offset": [0, (3, 0), (3, 3, 3)]},
    "landmark": dict.fromkeys(("block", "top_k", "cache_blocks"), (0,))
    | {"group_dropout": [1.0], "softmax": ["soft"], "position_jump": [-1], "miss_share": [1.5], "miss_cutoff": [-0.1]},
    "lara": {"landmarks": [0], "noise": [-1.0, NAN, INFINITE]},
    "large_kernel": {"gating": ["dot"], "kernel": [0], "dilation": [0], "without": [("gate",)]},
    "latent": dict.fromkeys(("latent_dim", "content_dim", "query_latent_dim"), (0,)),
    "linear": {"feature_map": ["cosine"]},
    "linformer": {"length": [0], "projected": [0], "sharing": ["layerwise"]},
    "local": {"form": ["dilated"], "window": [0], "block": [0], "lookback": [-1]},
    "long_short": dict.fromkeys(("window", "landmarks", "segment", "rank"), (0,)) | {"norm_eps": [0.0]},
    "longformer": {"window": [0], "dilation": [0, ()], "global_tokens": [-1]},
    "low_rank_pooling": {"slots": [0], "rank": [0], "context": ["mode"], "eps": [0.0]},
    "mamba": {"dt_rank": [0]},
    "mamba2": {"skip_kind": ["all"]},
    "mlstm": {"forget_gate": ["tanh"], "gate_cap": [0.0, NAN]},
    "moba": {"block_size": [0], "top": [0]},
    "norm_linear": {"feature_map": ["tanh"], "output_norm": ["batch"]},
    "nystrom": {"landmarks": [0], "iterations": [0], "convolution": [4, -3]},
    "performer": {"kernel": ["cosine"], "num_features": [0], "feature_eps": [-1e-4], "eps": [NAN], "redraw": [-1]}
    | {"least_denominator": [INFINITE]},
    "positional_attention": {"encoding": ["rotary"], "max_length": [0], "encoding_dim": [0], "key_width": ["head"]}
    | {"content_heads": [-1]},
    "probsparse": {"factor": [0]},
    "reformer": {"chunk": [0], "lookback": [-1], "rounds": [0], "buckets": [0, 5], "eps": [0.0]},
    "routing": {"window": [0], "clusters": [0], "decay": [1.5, -0.1], "local_heads": [-1]},
    "rwkv7": {"eps": [0.0], "gate_rank": [0]},
    "s4d": {"d_state": [0, 5], "init": ["real"], "discretization": ["euler"], "dt_init": [(0.0, 0.1), (0.2, 0.1)]},
    "sea": {"top_k": [0], "oversample": [0.5, INFINITE], "grouping": ["rows"], "estimator": ["mlp"], "kernel": ["elu"]}
    | {"jitter": [1.5], "feature_divisor": [0.0], "redraw_every": [-1], "length": [0]},
    "selective_temperature": {"q_temperature": ["all"], "k_temperature": [""], "v_temperature": ["tok"]}
    | {"token_features": ["x"], "hidden": [4], "position_form": ["log"], "position_granularity": ["token"]}
    | {"position_start": [INFINITE, NAN]},
    "sigmoid": dict.fromkeys(("activation", "norm", "schedule"), ("other",))
    | {"window": [(-1, None), (1,)], "length": [0], "sigmoid_bias": [(0.0, NAN)]},
    "sinkhorn": {"block": [0], "temperature": [0.0], "iterations": [-1], "sortcut": [0]},
    "softmax": {"softcap": [0.0, -1.0, INFINITE, NAN], "window": [(-1, 0), (1,), (None, -2)]},
    "sparse_strided": {"layout": ["random"], "stride": [0], "combine": ["alternate"], "head_columns": [True]},
    "stochastic_subsampling": {"noise": ["gaussian"], "sigma": [INFINITE]},
    "token_parameter": dict.fromkeys(("num_tokens", "num_layers", "top_k"), (0,)),
    "transformer_xl": {"segment": [0], "memory": [-1], "clamp": [-1]},
    "universal_rpe": {"max_distance": [0, (1, 0)]},
}
TOGETHER = [
    ("aaren", {"forget": 0.9, "scan": "global_shift"}, "global_shift"),
    ("agent", {"agent_bias": "all"}, "bias_grid"),
    ("agent", {"agent_bias": "block", "bias_grid": (3, 3)}, "bias_grid"),
    ("agent", {"agent_source": "conv", "conv_stride": 0}, "conv_stride"),
    *(("bidirectional_mamba", {"scan": "windows", "window": sides}, "window") for sides in ((0, 2), (2, 2, 2))),
    ("bidirectional_mamba", {"scan": "cascade", "convolution": "grid", "conv_width": 3, "copies": 2}, "cascade"),
    ("bidirectional_mamba", {"scan": "cascade", "convolution": "path"}, "cascade"),
    ("bidirectional_mamba", {"convolution": "grid", "conv_width": 4}, "conv_width"),
    *(
        ("block_sparse", {"layout": "user", "visible": table}, "visible")
        for table in ([[True], [True, False]], [[0.5, 1.0]], [True, False], [], "full")
    ),
    ("clipped_softmax", {"alpha": -1.0, "length": 8}, "alpha"),
    *(("clipped_softmax", {"gamma": -0.1, other: 2}, other) for other in ("length", "alpha")),
    ("combiner", {"factorization": "axial"}, "try axial_"),
    ("combiner", {"segment": 0}, "segment >= 1"),
    ("combiner", {"pool": "gelu"}, "identity, relu, deepset"),
    ("combiner", {"reduce": "min"}, "max, mean, sum"),
    ("combiner", {"row_keys": "sum"}, "wsum"),
    ("combiner", {"factorization": "axial_rowmajor", "reduce": "sum"}, "pools nothing"),
    ("combiner", {"share_pool": True}, "pool='deepset'"),
    ("combiner", {"factorization": "logn", "exclude_self_segment": True}, "fixed, axial_rowmajor"),
    ("compressive", {"segment": 6}, "try segment=8"),
    ("compressive", {"memory": 34}, "try memory=36"),
    ("compressive", {"memory": 16}, "memory >= 32"),
    ("compressive", {"compressed": 0}, "compressed >= 1"),
    ("compressive", {"ratio": 0}, "ratio >= 1"),
    ("compressive", {"compression": "men"}, "try mean"),
    ("compressive", {"clamp": -1}, "clamp >= 0"),
    ("core_context", {"group": 0}, "group >= 1"),
    ("core_context", {"window": -1}, "window >= 0"),
    ("core_context", {"pool": "min"}, "cca, mean, max"),
    ("core_context", {"pool_query": "first"}, "last, mean"),
    ("core_context", {"pool_keys": "rope"}, "post_rope, pre_rope"),
    ("core_context", {"fusion": "sum"}, "joint, gated"),
    ("core_context", {"pool": "max", "pool_query": "mean"}, "pool='cca'"),
    ("core_context", {"pool": "mean", "share_gqa": True}, "pool='cca'"),
    ("delta_rule", {"norm": "sum", "feature_map": "silu"}, "norm"),
    ("delta_rule", {"use_beta": False, "allow_negative_eigenvalues": True}, "use_beta"),
    ("delta_rule", {"use_beta": False, "vector_beta": True}, "use_beta"),
    ("delta_rule", {"gated": True, "gate": "fixed"}, "fixed"),
    ("funnel", {"truncate": True, "separate_first": False}, "separate_first"),
    ("kernelized_rpe", {"max_offset": (3, 3), "offsets": "alibi"}, "max_offset"),
    ("kernelized_rpe", {"max_offset": 16, "offsets": "bucketed"}, "max_offset"),
    ("landmark", {"selection": "max_over_blocks", "top_k": 2}, "selection"),
    ("landmark", {"selection": "max_over_heads"}, "selection='max_over_heads' with top_k=None"),
    ("landmark", {"offload": "cpu"}, "offload='cpu' with top_k=None"),
    ("landmark", {"offload": "nowhere", "top_k": 2}, "offload='nowhere'.*try offload='memory'"),
    ("landmark", {"offload": "cpu", "top_k": 2, "selection": "per_token_and_head"}, "offload='cpu' with"),
    ("landmark", {"offload": "cpu", "top_k": 2, "selection": "max_over_heads"}, "offload='cpu' with"),
    ("large_kernel", {"kernel": 10, "dilation": 3}, "no centre"),
    ("large_kernel", {"without": ("depthwise", "dilated")}, "no tokens mix"),
    *(("linear", {"feature_map": name}, "denominator may vanish") for name in ("silu", "identity")),
    *(("linear", {"eps": eps}, "a finite eps > 0") for eps in (0.0, -1e-6, NAN, INFINITE)),
    ("long_short", {"normalize_first": True, "dual_norm": False}, "without norms"),
    ("longformer", {"window": 5}, "window=6"),
    ("low_rank_pooling", {"norm": "head"}, "try heads"),
    ("norm_linear", {"feature_map": "plain_elu", "denominator": True}, "denominator=False"),
    ("norm_linear", {"feature_map": "silu", "denominator": True}, "may vanish"),
    ("selective_temperature", {"position_start": -0.1, "position_form": "linear"}, "position_start"),
    ("selective_temperature", {"hidden": 0, "token_features": "tokens"}, "hidden"),
    ("selective_temperature", {"share_heads": True, "token_features": "tokens"}, "share_heads"),
    ("sigmoid", {"length": 4, "sigmoid_bias": -1.0}, "length"),
    ("sigmoid", {"schedule": "position", "length": 4}, "schedule"),
    ("sigmoid", {"schedule": "position", "sigmoid_bias": 0.0}, "schedule"),
    ("sigmoid", {"norm": "seq", "length": 4}, "norm"),
    ("sigmoid", {"norm": "sqrt", "learn_bias": True}, "norm"),
    ("sigmoid", {"norm": "seq", "schedule": "position"}, "norm"),
    *(("sparse_strided", {"layout": "fixed", "stride": 4, "columns": columns}, "columns") for columns in (0, 5)),
    *(("stochastic_subsampling", {"ratio": ratio}, "0 < ratio <= 1") for ratio in (0.0, 1.5, NAN)),
    ("stochastic_subsampling", {"mode": "locally"}, "try local"),
    ("stochastic_subsampling", {"window": 0}, "window >= 1"),
    ("stochastic_subsampling", {"sigma": -1.0}, "sigma >= 0"),
    ("stochastic_subsampling", {"neighbours": -1}, "neighbours >= 0"),
    ("stochastic_subsampling", {"finetune": 1.1}, "finetune <= 1"),
    ("stochastic_subsampling", {"anneal": True}, "anneal with steps"),
    ("stochastic_subsampling", {"per_head": True, "mode": "local"}, "per_head"),
    ("stochastic_subsampling", {"host_window": 4, "mode": "local"}, "host_window"),
    ("stochastic_subsampling", {"steps": 0}, "steps >= 1"),
    ("synthesizer", {"kinds": ()}, "different ones of dense"),
    ("synthesizer", {"kinds": "fourier"}, "factorised_random"),
    ("synthesizer", {"kinds": ("dense", "dense")}, "different ones of dense"),
    ("synthesizer", {"length": 0}, "length >= 1"),
    ("synthesizer", {"rank": 0}, "rank >= 1"),
    ("token_parameter", {"theta": "gelu"}, "try l2_norm_gelu"),
    ("token_parameter", {"tau_mode": "fix"}, "try fixed"),
    ("token_parameter", {"eps": 0.0}, "eps > 0"),
    ("universal_rpe", {"factors": "learned"}, "unique"),
    ("universal_rpe", {"start": "zeros"}, "ones"),
    ("universal_rpe", {"activation": "exp"}, "softplus"),
    ("universal_rpe", {"max_distance": (1, 2, 3)}, "int, int"),
    ("universal_rpe", {"max_distance": (1, 2), "factors": "bucketed"}, "rows, columns"),
    ("universal_rpe", {"factors": "bucketed", "num_buckets": 7}, "an even number"),
    ("universal_rpe", {"factors": "bucketed", "num_buckets": 64, "max_distance": 30}, "max_distance >= 33"),
]
CASES = [(n, {o: value}, o) for n, options in ALONE.items() for o, values in options.items() for value in values]


@pytest.mark.parametrize(("name", "options", "words"), CASES + TOGETHER, ids=str)
def test_options_out_of_range_or_that_do_not_go_together_are_refused(name, options, words):
    refused(words, get_mechanism(name).options, **options)


@pytest.mark.parametrize("name", list_mechanisms())
def test_numbers_are_finite(name):
    card = get_mechanism(name)
    for field in dataclasses.fields(card.config):
        for value in (NAN, INFINITE, -INFINITE) if "float" in field.type.replace("tuple[float", "") else ():
            refused(field.name, card.options, **{field.name: value})


@pytest.mark.parametrize("name", list_mechanisms())
def test_lists_are_the_tuples_that_they_stand_for(name):
    """JSON stores tuples as lists, and so do the configurations of saved models."""
    card = get_mechanism(name)
    for variant in card.variants.values():
        options = {o: value for o, value in variant.items() if o in card.option_types.hints}
        listed = {o: list(value) if isinstance(value, tuple) else value for o, value in options.items()}
        assert card.options(**listed) == card.options(**options)
