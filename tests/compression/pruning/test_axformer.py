"""AxFormer's search: its rules, its order, its result, and that the final model is the one that was judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused
from test_cuts import batch, bert, distilbert, encoder, gpt_neox, language_model, llama, open_gpt2, opt, output
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.compression import load_compressed
from regard.compression.layers import run_batch
from regard.compression.pruning import axformer
from regard.compression.pruning.anatomy import Cut, find_host
from regard.compression.pruning.axformer import Found, search
from regard.compression.pruning.masks import masked
from regard.compression.pruning.steps import AxFormer
from regard.compression.sparse import sparsify
from regard.models import from_pretrained
from regard.tasks.protocol import Batch


def items(count: int = 12, batches: int = 2) -> list[Batch]:
    """Batches of two sizes, so that a mean of means differs from the mean."""
    ids, classes = torch.randint(30, (count, 11)), torch.randint(3, (count,))
    border = count - 2 if batches > 1 else count
    return [Batch(ids[:border], classes[:border]), *([Batch(ids[border:], classes[border:])] * (batches > 1))]


def losses_of(model: Any, batches: list[Batch]) -> Tensor:
    return torch.cat([F.cross_entropy(model(b.inputs).output, b.targets, reduction="none") for b in batches]).detach()


@pytest.mark.parametrize("make", [language_model, encoder, llama, bert, open_gpt2, gpt_neox, opt, distilbert])
def test_hard_layers_are_masked_compacted_saved_and_loaded_alike(make, tmp_path):
    model, ids = make(), batch()
    host = find_host(model)
    with masked(host, [Cut(hard=50)] * 4):
        close(output(model, ids), output(model, ids))
    before = output(model, ids)
    cuts = [Cut(hard=3, heads=(1,)), Cut(), Cut(hard=1, feed_forward=True), Cut(attention=True)]
    with masked(host, [Cut(hard=11)] * 4):
        close(output(model, ids), before)
    with masked(host, cuts):
        expected = output(model, ids)
    with masked(host, [Cut(cut.layer, cut.attention, cut.feed_forward, cut.heads) for cut in cuts]):
        assert not torch.allclose(output(model, ids), expected)
    undo = host.compact(cuts)
    close(output(model, ids), expected)
    undo()
    close(output(model, ids), before, 0.0)


def test_hard_layers_of_transformers_take_no_other_attention():
    from regard.serving.transformers import TransformersReader

    model = llama()
    undo = find_host(model).compact([Cut(), Cut(hard=3), Cut(), Cut()])
    for call in (
        lambda: sparsify(model, "streaming:capacity=8"),
        lambda: regard.swap(model, "linear"),
        lambda: TransformersReader(model),
    ):
        refused("hard attention in model.layers.1.self_attn", call)
    undo()
    sparsify(model, "streaming:capacity=8").undo()


def test_a_padded_batch_of_transformers_is_masked_in_hard_layers():
    causal = [(make(), {"use_cache": False}) for make in (llama, open_gpt2, gpt_neox, opt)]
    for model, options in ((bert(), {}), (distilbert(), {}), *causal):
        ids = batch()
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        host = find_host(model)
        with masked(host, [Cut(hard=11)] * 4):
            hard = model(input_ids=ids, attention_mask=mask, **options).logits
        soft = model(input_ids=ids, attention_mask=mask, **options).logits
        rows = slice(None) if soft.ndim == 2 else slice(0, 7)
        close(hard[:, rows].detach(), soft[:, rows].detach())


class Rules(axformer._Search):
    """A search whose losses are given instead of measured."""


def told(step: AxFormer, base: list[float], best: float) -> Any:
    rules = Rules(None, step, [], run_batch, None, [], None, None, frozenset())  # type: ignore[arg-type]
    rules.base, rules.best = torch.tensor(base), best
    return rules


def test_a_change_needs_a_lower_loss_and_a_majority_that_is_not_harmed():
    rules = told(AxFormer(), [1.0, 1.0, 1.0, 1.0], best=0.8)
    assert rules.accepts(0.79, 3)
    assert not rules.accepts(0.79, 2), "two of four are no majority"
    assert not rules.accepts(0.8, 4), "equal is not lower"
    assert told(AxFormer(ties=True), [1.0], 0.8).accepts(0.8, 1)
    one = told(AxFormer(), [1.0], best=1.0)
    assert one.accepts(0.9, 1) and not one.accepts(1.1, 0)
    size = told(AxFormer(focus="size", slack=0.1), [1.0] * 4, best=0.8)
    assert size.accepts(0.87, 0) and not size.accepts(0.89, 4) and not size.accepts(0.81, 4, hard=True)
    assert not told(AxFormer(focus="size", fraction=0.25), [1.0] * 4, best=0.8).accepts(0.8, 1)
    assert not rules.accepts(float("nan"), 4)


def test_what_a_slack_allows_does_not_add_up():
    """The bound is relative to the lowest loss, not to the last one."""
    rules = told(AxFormer(focus="size", slack=0.1), [1.0], best=1.0)
    losses = iter([1.08, 1.15, 0.8, 0.87, 0.89])
    rules.cuts, rules.most, rules.on_trial, rules.remember = [Cut()], 5, lambda *_: None, lambda trial: None
    rules.evaluate = lambda cuts: torch.tensor([next(losses)], dtype=torch.float64)
    assert [rules.attempt("x", 0, attention=True)[0] for _ in range(5)] == [True, False, True, True, False]
    assert rules.best == 0.8


def plain_bert(**sizes: int) -> Any:
    """A BERT without dropout, in float64."""
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).double().eval()


@torch.no_grad()
def test_cuts_do_to_the_layers_what_the_authors_cuts_do():
    found = load("compression_axformer")
    sizes = {"hidden_size": 16, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = plain_bert(**sizes)
    model.encoder.load_state_dict(recorded_state("compression_axformer"))
    second = tuple(range(256, 512))
    cuts = [
        Cut(hard=30, heads=(1, 2)),
        Cut(hard=30, heads=(0,), feed_forward=True),
        Cut(attention=True, neurons=second),
    ]
    with masked(find_host(model), cuts):
        close(model.encoder(found["x"]).last_hidden_state, found["out"])


def test_the_search_makes_the_trials_and_the_cuts_of_the_authors_search(monkeypatch):
    """Losses are those of the whole model plus what the recording says that each cut adds."""
    found = load("compression_axformer")

    def chosen(cuts: list[Cut]) -> Tensor:
        made = torch.zeros(12, 27, dtype=torch.bool)
        for row, cut in zip(made, cuts, strict=True):
            row[0], row[1], row[14] = cut.hard is not None, cut.feed_forward, cut.attention
            row[[2 + n for n in cut.neurons] + [15 + n for n in cut.heads]] = True
        return made

    def evaluate(work: Any, cuts: list[Cut]) -> Tensor:
        return found["losses"] + found["effects"][chosen(cuts)].sum(0)

    monkeypatch.setattr(axformer._Search, "evaluate", evaluate)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 12, "num_attention_heads": 12}
    own = search(find_host(plain_bert(**sizes)), AxFormer(), [])
    close(torch.tensor([own.before, *(trial.loss for trial in own.trials)], dtype=torch.float64), found["trials"])
    assert torch.equal(chosen(own.cuts), found["cuts"])


def looked(model: Any, batches: list[Batch], **options: Any) -> Found:
    return search(find_host(model), AxFormer(**{"groups": 3, "hard": 4} | options), batches)


def test_the_search_goes_in_order_within_its_bound_to_a_loss_that_only_falls():
    model, batches = encoder(num_layers=2, dim=12, num_heads=2), items()
    base = losses_of(model, batches)
    found = looked(model, batches, factor=1e9)
    assert found.before == pytest.approx(float(base.mean())) and found.after <= found.before
    assert found.most == 1 + 2 + 4 + (3 + 2) * 2 >= found.evaluations
    names = [trial.name for trial in found.trials]
    assert names[:3] == ["hard attention in blocks.0", "hard attention in blocks.1", "feed-forward of blocks.1"]
    assert names.index("attention of blocks.1") < names.index("feed-forward of blocks.0")
    taken = [trial.loss for trial in found.trials if trial.taken]
    assert taken == sorted(taken, reverse=True)
    with masked(find_host(model), found.cuts):
        assert float(losses_of(model, batches).mean()) == pytest.approx(found.after)
    close(losses_of(model, batches), base, 0.0)
    again = looked(model, batches, factor=1e9)
    assert again == found
    assert len(looked(model, batches, factor=1.0).trials) < found.most - 1, "no finer search in branches that matter"


@pytest.mark.parametrize("make", [encoder, bert])
def test_kept_activations_change_no_trial_and_save_the_layers_before(make, monkeypatch):
    model: Any = make()
    batches: Any = items() if make is encoder else [{"input_ids": batch(), "labels": torch.tensor([0, 2])}]
    calls: list[int] = []
    for i, layer in enumerate(find_host(model).layers):
        next(layer.module.children()).register_forward_hook(lambda *_, i=i: calls.append(i))
    found = looked(model, batches, factor=1.5, groups=1)
    quick = len(calls)
    calls.clear()
    monkeypatch.setattr(axformer._Prefix, "check", lambda self: setattr(self, "works", False))
    slow = looked(model, batches, factor=1.5, groups=1)
    assert [(t.name, t.taken) for t in slow.trials] == [(t.name, t.taken) for t in found.trials]
    assert [t.loss for t in slow.trials] == pytest.approx([t.loss for t in found.trials])
    assert quick < 0.9 * len(calls)


def test_a_model_whose_layers_do_not_follow_one_another_runs_whole():
    model, batches = encoder(), items()

    def run(model: Any, given: Batch) -> Any:
        seen: list[Tensor] = []
        inside = model.blocks[0].feed_forward.up
        handle = inside.register_forward_hook(lambda module, given, out: seen.append(out.mean()))
        found = run_batch(model, given)
        handle.remove()
        found.output = found.output + (seen[0] if seen else 0) * torch.arange(3)
        return found

    step = AxFormer(groups=2, hard=0, factor=1.0)
    found = search(find_host(model), step, batches, run=run)
    first = found.trials[0]
    with masked(find_host(model), [Cut(), Cut(), Cut(), Cut(feed_forward=True)]):
        expected = torch.cat([F.cross_entropy(run(model, b).output, b.targets, reduction="none") for b in batches])
    assert first.loss == pytest.approx(float(expected.detach().mean()))


def test_a_head_with_noise_in_its_projection_is_taken():
    model, batches = encoder(), items(60)
    with torch.no_grad():
        model.head.weight *= 8
        for given in batches:
            given.targets.copy_(model(given.inputs).output.argmax(-1))
        clean = float(losses_of(model, batches).mean())
        model.blocks[3].mixer.output.weight[:, 4:8] += 20 * torch.randn(16, 4)
    noisy = float(losses_of(model, batches).mean())
    found = looked(model, batches, hard=0, factor=1e9, groups=1)
    assert noisy > 3 * clean and found.after < 0.5 * noisy
    assert found.cuts[3].attention or 1 in found.cuts[3].heads


def test_a_branch_that_adds_nothing_stays_unless_ties_are_taken():
    model, batches = encoder(), items()
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight.zero_()
    name = "feed-forward of blocks.1"
    for ties in (False, True):
        found = looked(model, batches, ties=ties, fraction=0.0, factor=1.0, hard=0)
        (trial,) = [t for t in found.trials if t.name == name]
        assert trial.taken == ties, found.trials


@pytest.mark.parametrize("make", [language_model, llama])
def test_a_search_that_could_take_everything_leaves_a_branch(make):
    model, ids = make(), torch.randint(30, (4, 9))
    data = [Batch(ids, ids)] if make is language_model else [{"input_ids": ids, "labels": ids}]
    small = regard.compress(model, "axformer:focus=size,slack=1e9,groups=1,hard=0", data)
    assert "11 of 11 changes" in small.report.notes[0]
    assert "layers.0: feed-forward, 4 of 4 heads" in small.report.notes[-4].replace("blocks", "layers")


def test_the_loss_is_a_mean_over_items_not_over_batches():
    model, batches = encoder(), items()
    expected = losses_of(model, batches)
    means = torch.stack([losses_of(model, [b]).mean() for b in batches]).mean()
    found = looked(model, batches, hard=0)
    assert found.before == pytest.approx(float(expected.mean())) != pytest.approx(float(means))


def test_size_and_speed_take_more_and_the_larger_branch_first():
    model, batches = encoder(num_layers=2, feed_forward=8), items()
    small = looked(model, batches, focus="size", slack=0.5)
    best = small.before
    for trial in small.trials:
        bound = best if "hard" in trial.name else 1.5 * best
        assert trial.taken == (trial.loss < bound), "what was allowed before does not add up"
        best = min(best, trial.loss) if trial.taken else best
    names = [t.name for t in small.trials if "hard" not in t.name]
    assert names[0] == "attention of blocks.1", "1,024 parameters against 384"
    quick = looked(model, batches, focus="speed")
    assert not any("hard" in t.name for t in quick.trials)


@pytest.mark.parametrize("make", [encoder, bert])
def test_the_recipe_leaves_the_model_that_was_judged(make, tmp_path):
    model: Any = make().float()
    ids, classes = torch.randint(30, (12, 11)), torch.randint(3, (12,))
    data: Any = [Batch(ids, classes)] if make is encoder else [{"input_ids": ids, "labels": classes}]
    before = output(model, ids)
    small = regard.compress(model, "axformer:focus=size,slack=0.2,groups=3,hard=4", data)
    after = output(model, ids)
    assert small.report.bytes_after < small.report.bytes_before
    loss = float(F.cross_entropy(after, classes))
    assert f"to {loss:.3g}"[:6] in small.report.notes[0]
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), ids), after, 1e-6)
    if make is encoder:
        close(output(from_pretrained(tmp_path), ids), after, 1e-6)
    again = make().float()
    before = output(again, ids)
    close(output(regard.compress(again, "axformer:groups=2", data).undo(), ids), before, 0.0)


def test_a_search_that_was_stopped_goes_on_without_trials_it_has_made(tmp_path):
    model, data = encoder().float(), items()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = regard.compress(model, "axformer:groups=3,hard=4", data)
    expected = [*whole.report.notes]
    whole.undo()

    def stop(name: str, done: int, most: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regard.compress(model, "axformer:groups=3,hard=4", data, work=tmp_path, on_layer=stop)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    evaluated: list[int] = []
    evaluate = axformer._Search.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axformer._Search, "evaluate", lambda self, cuts: evaluated.append(1) or evaluate(self, cuts))
        small = regard.compress(model, "axformer:groups=3,hard=4", data, work=tmp_path)
    assert small.report.notes == expected
    refused("another run", regard.compress, encoder().float(), "axformer:groups=3,hard=4", data, work=tmp_path)


def test_what_cannot_be_searched_is_refused():
    model = encoder()
    refused("without data", regard.compress, model.float(), "axformer")
    broken = encoder()
    with torch.no_grad():
        broken.head.weight.fill_(torch.nan)
    refused("finite loss", search, find_host(broken), AxFormer(), items())
    refused("losses of a batch", search, find_host(model), AxFormer(), [(torch.ones(2), 3)])
