"""Outlier metrics: known kurtoses, means over sequences, and hooks that watch the right places and leave no trace."""

import math

import pytest
import torch
from torch import nn

from regard.contract import Unsupported
from regard.measurement.outliers import infinity_norm, kurtosis, watch_outliers
from regard.models import LanguageModel, LanguageModelConfig


def model():
    config = LanguageModelConfig(vocab_size=16, dim=16, num_heads=2, plan="softmax", num_layers=2)
    return LanguageModel(config).double().eval()


def tokens(batch, length):
    return torch.randint(16, (batch, length))


def places(module, *calls, outputs=None, valid=None):
    """The metrics measured at each place while the module is called."""
    options = {} if outputs is None else {"outputs": outputs}
    with watch_outliers(module, **options) as metrics:
        metrics.valid = valid
        for call in calls:
            module(call)
    return metrics.places


def of_all(x, valid=None, *, parts=None):
    module = nn.Identity()
    return places(module, *(x.split(parts or len(x))), outputs=lambda name, module: True, valid=valid)[""]


@pytest.mark.parametrize("n", [10, 100, 3000])
def test_one_entry_that_outshines_n_others_has_a_kurtosis_near_n(n):
    x = torch.zeros(2, n, dtype=torch.float64)
    x[:, n // 2] = 7.0
    mu, s = 7 / n, 7 / math.sqrt(n)
    expected = ((n - 1) * mu**4 + (7 - mu) ** 4) / n / (s**4 + 1e-6)
    torch.testing.assert_close(kurtosis(x), torch.full((2,), expected, dtype=torch.float64))
    assert 0.6 * n < expected < n


def test_half_precision_does_not_overflow():
    x = 300 * torch.randn(2, 5000).to(torch.float16)
    torch.testing.assert_close(kurtosis(x), kurtosis(x.double()).float())
    assert kurtosis(x).isfinite().all()


def test_metrics_are_means_over_sequences_whatever_the_batch_size():
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    for found in (of_all(x), of_all(x, parts=[1, 4, 2])):
        assert found.sequences == 7
        assert found.infinity_norm == pytest.approx(float(infinity_norm(x).mean()), rel=1e-6)
        assert found.kurtosis == pytest.approx(float(kurtosis(x).mean()), rel=1e-6)
        assert found.infinity_norm < float(x.abs().max())


def test_padding_does_not_count_when_valid_tokens_are_told():
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    found = of_all(torch.where(valid[..., None], x, torch.nan), valid)
    rows = [x[i, valid[i]] for i in range(2)]
    assert found.sequences == 2
    assert found.infinity_norm == pytest.approx(sum(float(row.abs().max()) for row in rows) / 2)
    assert found.kurtosis == pytest.approx(sum(float(kurtosis(row[None])) for row in rows) / 2)


def test_the_places_of_a_language_model_are_its_feed_forward_outputs_and_both_sides_of_its_norms():
    watched, ids = model(), tokens(3, 10)
    with watch_outliers(watched) as metrics:
        watched(ids)
    names = {name for name, module in watched.named_modules() if type(module).__name__ == "RMSNorm"}
    assert len(names) == 5
    feed_forward = {"blocks.0.feed_forward", "blocks.1.feed_forward"}
    assert set(metrics.places) == names | {f"{name}.input" for name in names} | feed_forward
    expected = float(infinity_norm(watched.embedding(ids).detach()).mean())
    assert metrics.places["blocks.0.mixer_norm.input"].infinity_norm == pytest.approx(expected, rel=1e-5)
    norms = metrics.summary(lambda name: name in names)
    kurtoses = [metrics.places[name].kurtosis for name in names]
    assert norms["max_infinity_norm"] == max(metrics.places[name].infinity_norm for name in names)
    assert norms["mean_kurtosis"] == pytest.approx(sum(kurtoses) / 5)
    assert norms["max_kurtosis"] == max(kurtoses)


def test_norms_of_heads_are_left_out():
    watched = model()
    block = watched.blocks[0]
    watched.blocks[0] = type(block)(
        ("softmax", {"query_key_norm": "rms"}), watched.config, block.mixer.pattern
    ).double()
    assert not any("query_norm" in place for place in places(watched, tokens(2, 6)))


def test_pytorchs_own_encoder_is_measured_in_both_modes():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for training in (True, False):
        found = places(encoder.train(training), torch.randn(2, 5, 8))
        assert set(found) == {"linear2", "norm1", "norm1.input", "norm2", "norm2.input"}


def test_watching_changes_no_output_and_leaves_no_hook_even_after_an_error():
    watched, ids = model(), tokens(2, 6)
    before = watched(ids).output
    with watch_outliers(watched) as metrics:
        assert torch.equal(watched(ids).output, before)
        with pytest.raises(Unsupported), watch_outliers(watched):
            watched(ids + 100)
    seen = metrics.places
    watched(ids)
    assert metrics.places == seen
    assert not any(module._forward_hooks for module in watched.modules())


def test_nothing_to_measure_is_refused():
    with pytest.raises(Unsupported, match="without a norm"), watch_outliers(nn.Linear(2, 2)):
        pass
    with watch_outliers(model()) as metrics, pytest.raises(Unsupported, match="no activations"):
        metrics.summary()
