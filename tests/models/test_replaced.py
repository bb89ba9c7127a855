"""Replaced tokens: the generator's inputs and training, the encoder's task, and the model that is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.models import ReplacedTokenConfig, ReplacedTokenModel, from_pretrained, save_pretrained
from regard.models.replaced import _drawn
from regard.tasks import create_task
from regard.training import TrainConfig, train

MASK = 11


def model(**options) -> ReplacedTokenModel:
    given = {"dim": 16, "num_heads": 2, "plan": "linear", "num_layers": 1, **options}
    return ReplacedTokenModel(ReplacedTokenConfig(MASK + 1, **given)).double().train()


def seen_by(module: nn.Module) -> list[torch.Tensor]:
    """A list that collects the inputs of a module's future calls."""
    seen: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    return seen


def context(seed: int = 0, **more) -> Context:
    return Context(generator=torch.Generator().manual_seed(seed), **more)


def test_a_share_is_masked_for_the_generator_whose_draws_stand_there_for_the_encoder():
    made, ids = model(share=0.3), torch.randint(MASK, (40, 50))
    masked, replaced = seen_by(made.generator), seen_by(made.discriminator)
    found = made(ids, context=context())
    hidden = masked[0] == MASK
    assert hidden.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(masked[0][~hidden], ids[~hidden]) and torch.equal(replaced[0][~hidden], ids[~hidden])
    assert (replaced[0] != ids).any() and replaced[0].max() < MASK
    answers = made.generator(masked[0]).output[hidden]
    total, count = found.losses["generator"]
    torch.testing.assert_close(total, nn.functional.cross_entropy(answers, ids[hidden], reduction="sum"))
    assert count == hidden.sum()
    said = made.discriminator(replaced[0]).output
    torch.testing.assert_close(found.output, torch.where((replaced[0] != ids)[..., None], -said, said))


def test_no_gradient_goes_from_what_is_told_of_draws_to_the_generator():
    made, ids = model(), torch.randint(MASK, (4, 12))
    made(ids, context=context()).output.sum().backward()
    own = {name for name, p in made.generator.named_parameters() if not name.startswith("embedding.0.")}
    assert own and all(dict(made.generator.named_parameters())[name].grad is None for name in own)


def test_padding_is_neither_masked_nor_counted():
    made, ids = model(share=1.0), torch.randint(MASK, (3, 8))
    valid = torch.arange(8) < torch.tensor([[8], [3], [1]])
    assert made(ids, context=context(mask=Mask(valid=valid))).losses["generator"][1] == 12


def test_draws_have_the_probabilities_of_the_answers():
    logits = torch.randn(5)
    counts = torch.bincount(_drawn(logits.expand(40000, 5), torch.Generator().manual_seed(3)), minlength=5) / 40000
    torch.testing.assert_close(counts, logits.softmax(-1), atol=0.012, rtol=0)


def test_the_generator_is_small_and_has_the_table_of_the_encoder():
    made = model(dim=64, generator=0.25)
    assert made.generator.config.dim == 16 and made.discriminator.config.dim == 64
    assert made.generator.embedding[0] is made.discriminator.embedding


def test_what_is_kept_is_the_encoder_alone_and_a_run_goes_on_with_both(tmp_path):
    made, ids = model().eval(), torch.randint(MASK, (2, 9))
    for kept in (made, made.discriminator):
        save_pretrained(kept, tmp_path)
        found = from_pretrained(tmp_path)
        assert type(found) is type(kept) and torch.equal(found(ids).output, made(ids).output)
    save_pretrained(made, tmp_path)
    for name, tensor in from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text("".join(f"{i % 10}abcdefgh" for i in range(900)))
    return str(path)


def test_held_out_windows_are_replaced_once_and_a_perfect_answer_costs_nothing(alphabet):
    task = create_task("replaced", data=alphabet, length=48, evaluation_items=8, share=0.4)
    plain = create_task("text", data=alphabet, length=48, evaluation_items=8)
    batch, whole = next(iter(task.evaluation_batches(8))), next(iter(plain.evaluation_batches(8)))
    assert torch.equal(batch.targets == 1, batch.inputs != whole.inputs)
    sure = 60.0 * (2 * batch.targets[..., None] - 1).double()
    bits, tokens = task.score(sure, batch)
    assert bits.sum().item() < 1e-9 and tokens.tolist() == [48.0] * len(tokens)
    assert [x.sum().item() for x in task.figures(sure, batch)["found"]] == [batch.targets.sum()] * 2
    p = task.baseline.score
    rate = float(torch.cat([b.targets for b in task.evaluation_batches(3)]).double().mean())
    assert 0 < rate < 0.15  # the neighbours almost always determine a letter
    assert p == pytest.approx(-rate * math.log2(rate) - (1 - rate) * math.log2(1 - rate))
    assert not task.training_batch(0, 0, 4).targets.any()


def test_generator_and_encoder_learn_together(alphabet):
    task = create_task("replaced", data=alphabet, length=48, evaluation_items=8)
    made = ReplacedTokenModel(ReplacedTokenConfig(task.vocab_size, dim=32, num_heads=2, num_layers=1, plan="softmax"))
    history = train(made, task, TrainConfig(steps=60, batch_size=8, learning_rate=1e-2, measure_memory=False))
    first, last = history.curve[0], history.curve[-1]
    assert last.auxiliary < 0.5 * first.auxiliary and last.loss < first.loss


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0}, "share"),
        ({"generator": 1.5}, "generator"),
        ({"stack": {"exits": (1,)}, "num_layers": 2}, "exits"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        model(**options)
