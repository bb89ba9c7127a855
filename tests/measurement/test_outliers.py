"""Outlier metrics: known kurtoses, means over sequences, and hooks that see the right places and leave no trace."""

import math

import pytest
import torch
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.measurement.outliers import infinity_norm, kurtosis, watch_outliers
from regard.models import LanguageModel, LanguageModelConfig


def model(**options):
    return LanguageModel(
        LanguageModelConfig(vocab_size=16, dim=16, num_heads=2, plan="softmax", num_layers=2, **options)
    )


def everything(name, module):
    return True


def test_a_normal_distribution_has_kurtosis_3_and_a_uniform_one_9_fifths():
    assert float(kurtosis(torch.randn(1, 1_000_000))) == pytest.approx(3, abs=0.05)
    assert float(kurtosis(torch.rand(1, 1_000_000))) == pytest.approx(1.8, abs=0.02)


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
    whole, split, x = nn.Identity(), nn.Identity(), torch.randn(7, 5, 4, dtype=torch.float64)
    with watch_outliers(whole, outputs=everything) as one, watch_outliers(split, outputs=everything) as other:
        whole(x)
        for part in x.split([1, 4, 2]):
            split(part)
    for metrics in (one, other):
        found = metrics.places[""]
        assert found.sequences == 7
        assert found.infinity_norm == pytest.approx(float(infinity_norm(x).mean()), rel=1e-6)
        assert found.kurtosis == pytest.approx(float(kurtosis(x).mean()), rel=1e-6)
    assert one.places[""].infinity_norm < float(x.abs().max())


def test_padding_does_not_count_when_valid_tokens_are_told():
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    poisoned = torch.where(valid[..., None], x, torch.nan)
    identity = nn.Identity()
    with watch_outliers(identity, outputs=everything) as metrics:
        metrics.valid = valid
        identity(poisoned)
    rows = [x[i, valid[i]] for i in range(2)]
    found = metrics.places[""]
    assert found.sequences == 2
    assert found.infinity_norm == pytest.approx(sum(float(row.abs().max()) for row in rows) / 2)
    assert found.kurtosis == pytest.approx(sum(float(kurtosis(row[None])) for row in rows) / 2)


def test_the_places_of_a_language_model_are_its_feed_forward_outputs_and_both_sides_of_its_norms():
    watched = model().eval()
    ids = torch.randint(16, (3, 10))
    with watch_outliers(watched) as metrics:
        watched(ids)
    names = {name for name, module in watched.named_modules() if type(module).__name__ == "RMSNorm"}
    assert len(names) == 5
    feed_forward = {"blocks.0.feed_forward", "blocks.1.feed_forward"}
    assert set(metrics.places) == names | {f"{name}.input" for name in names} | feed_forward
    assert metrics.places["blocks.0.mixer_norm.input"].infinity_norm == pytest.approx(
        float(infinity_norm(watched.embedding(ids).detach()).mean()), rel=1e-5
    )
    norms = metrics.summary(lambda name: name in names)
    assert norms["max_infinity_norm"] == max(metrics.places[name].infinity_norm for name in names)
    kurtoses = [metrics.places[name].kurtosis for name in names]
    assert norms["mean_kurtosis"] == pytest.approx(sum(kurtoses) / 5)
    assert norms["max_kurtosis"] == max(kurtoses)


def test_an_outlier_in_a_feed_forward_part_is_seen_there_and_downstream():
    watched = model().eval()
    ids = torch.randint(16, (3, 10))
    found = []
    for factor in (1.0, 300.0):
        with torch.no_grad():
            watched.blocks[0].feed_forward.down.weight[3] *= factor
        with watch_outliers(watched) as metrics:
            watched(ids)
        found.append(metrics.places)
    for place in ("blocks.0.feed_forward", "blocks.1.mixer_norm.input"):
        assert found[1][place].infinity_norm > 10 * found[0][place].infinity_norm
        assert found[1][place].kurtosis > 3 * found[0][place].kurtosis
    assert found[1]["blocks.0.mixer_norm"] == found[0]["blocks.0.mixer_norm"]


def test_norms_of_heads_are_left_out():
    watched = model().eval()
    watched.blocks[0] = type(watched.blocks[0])(
        ("softmax", {"query_key_norm": "rms"}), watched.config, watched.blocks[0].mixer.pattern
    )
    with watch_outliers(watched) as metrics:
        watched(torch.randint(16, (2, 6)))
    assert not any("query_norm" in place for place in metrics.places)


def test_pytorchs_own_encoder_is_measured_in_both_modes():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for training in (True, False):
        encoder.train(training)
        with watch_outliers(encoder) as metrics:
            encoder(torch.randn(2, 5, 8))
        assert set(metrics.places) == {"linear2", "norm1", "norm1.input", "norm2", "norm2.input"}


def test_watching_changes_no_output_and_leaves_no_hook_even_after_an_error():
    watched = model().eval()
    ids = torch.randint(16, (2, 6))
    before = watched(ids).output
    with watch_outliers(watched) as metrics:
        assert torch.equal(watched(ids).output, before)
        with pytest.raises(Unsupported), watch_outliers(watched):
            watched(ids + 100)
    seen = metrics.places
    watched(ids)
    assert metrics.places == seen
    assert not any(module._forward_hooks for module in watched.modules())


def test_padded_sequences_of_a_model_are_those_alone():
    watched = model().double().eval()
    ids, lengths = torch.randint(16, (2, 9)), torch.tensor([9, 4])
    with watch_outliers(watched) as metrics:
        metrics.valid = torch.arange(9) < lengths[:, None]
        watched(ids, context=Context(mask=Mask(lengths=lengths)))
    with watch_outliers(watched) as alone:
        for row, length in zip(ids, lengths, strict=True):
            watched(row[None, :length])
    for place, found in metrics.places.items():
        assert found.infinity_norm == pytest.approx(alone.places[place].infinity_norm)
        assert found.kurtosis == pytest.approx(alone.places[place].kurtosis)


def test_nothing_to_measure_is_refused():
    with pytest.raises(Unsupported, match="without a norm"), watch_outliers(nn.Linear(2, 2)):
        pass
    with watch_outliers(model()) as metrics, pytest.raises(Unsupported, match="no activations"):
        metrics.summary()
