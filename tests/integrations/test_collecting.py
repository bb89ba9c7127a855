"""Auxiliary losses, schedules and random draws of swapped modules are passed by a context around the call, not by modules."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import ids, llama
from torch import nn

import regard
from regard import Unsupported
from regard.integrations import collect_losses

pytest.importorskip("transformers")
pytest.importorskip("regard.integrations.transformers")


def swapped(mechanism, **options):
    model = llama()
    regard.swap(model, mechanism, **options)
    return model


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_losses_are_added_over_modules_and_calls_and_named_by_path():
    model, tokens = swapped("mixture_of_heads"), ids()
    with collect_losses(model) as one:
        model(tokens)
    with collect_losses(model) as two:
        model(tokens[:1])
        model(tokens[1:])
    assert list(one.by_module) == [f"model.layers.{i}.self_attn" for i in range(2)]
    total, count = one.losses["load_balance"]
    parts = [losses["load_balance"] for losses in one.by_module.values()]
    torch.testing.assert_close(total, sum(part for part, _ in parts))
    assert count == sum(count for _, count in parts)
    assert set(two.losses) == {"load_balance"}
    torch.testing.assert_close(one.total({"load_balance": 3.0}), 3 * total / count)
    one.total().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "merge.logits.routed" in n)


def test_nothing_is_collected_outside_a_block_or_of_another_model():
    model, other, tokens = swapped("mixture_of_heads"), swapped("mixture_of_heads"), ids()
    with collect_losses(model) as outer:
        with collect_losses(other) as inner:
            other(tokens)
        assert inner.losses and not outer.losses
        other(tokens)
        assert not outer.losses
        model(tokens)
    before = dict(outer.losses)
    model(tokens)
    assert outer.losses == before
    with collect_losses(swapped("linear")) as none:
        model(tokens)
    assert float(none.total()) == 0.0


def test_threads_collect_what_is_theirs():
    model, meeting = swapped("mixture_of_heads"), threading.Barrier(2)

    def meet(*_):
        meeting.wait(timeout=60)

    inside = model.model.layers[1].self_attn.v_proj.register_forward_hook(meet)

    def run(tokens):
        with torch.no_grad(), collect_losses(model) as collected:
            model(tokens)
        return collected.losses["load_balance"][0]

    texts = ids(), ids()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, texts))
    inside.remove()
    for tokens, loss in zip(texts, found, strict=True):
        torch.testing.assert_close(loss, run(tokens))


def test_activation_checkpointing_collects_once_with_the_same_gradients_or_is_refused():
    model, tokens = swapped("mixture_of_heads").train(), ids()
    found = []
    for options in (None, {"use_reentrant": False}):
        if options is not None:
            model.activation_checkpointing_enable(options)
        model.zero_grad()
        with collect_losses(model) as collected:
            loss = model(tokens, labels=tokens).loss
            (loss + collected.total({"load_balance": 1.0})).backward()
        found.append((collected.losses["load_balance"], {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0])
    model.activation_checkpointing_enable({"use_reentrant": True})
    with collect_losses(model), pytest.raises(Unsupported, match="without gradients, as in reentrant"):
        model(inputs_embeds=torch.randn(1, 5, 32, requires_grad=True))


def test_a_schedule_follows_the_progress_that_the_block_is_told():
    model = swapped("stochastic_subsampling", ratio=0.25, steps=100).train()
    tokens = ids()
    with pytest.raises(Unsupported, match="without context"):
        model(tokens)
    model.config.attention_dropout = 0.0
    outputs = []
    for progress in (100, 0, 0):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad(), collect_losses(model, progress=progress, generator=generator):
            outputs.append(model(tokens, use_cache=False).logits)
    assert torch.equal(outputs[1], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_mechanisms_that_draw_in_training_draw_in_swapped_models_too():
    model, x = encoder(dropout=0.0), torch.randn(2, 12, 16)
    regard.swap(model, "stochastic_subsampling", ratio=0.25)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", ["linear", "softmax"])
def test_dropout_is_of_weights_or_else_of_the_outputs_of_heads(name):
    module = nn.ModuleList([nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True)])
    regard.swap(module, name)
    x = torch.randn(2, 9, 16)

    def run():
        return module[0](x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    dropped = torch.stack([run() for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    module.eval()
    assert (dropped.mean(0) - run()).abs().max() < 0.35 * run().abs().max()


def test_weights_are_kept_where_they_are_wanted():
    model, tokens = llama(attn_implementation="regard:softmax"), ids()
    with torch.no_grad(), collect_losses(model, want=frozenset({"weights"})) as collected:
        model(tokens)
    expected = llama(attn_implementation="eager")
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = expected(tokens, output_attentions=True).attentions
    for found, weights in zip(collected.extras.values(), maps, strict=True):
        torch.testing.assert_close(found["weights"], weights, atol=1e-6, rtol=1e-5)
        assert found["output"].shape == (3, 4, 9, 8)
