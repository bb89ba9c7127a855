"""Early exits: the decision of each rule, the sums of halting units, and the state kept for a token that has left."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_checks import check_comes_back_from_disk, made, read_in_pieces
from torch import nn

from regard import create_layer, get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Pattern, Unsupported
from regard.engines.cache import KeyValueState, WindowState
from regard.models import LanguageModel, exit_layers, set_exit_rule
from regard.models.exit_rules import ExitRule, Leaving

HALTING = {"exits": (1, 2, 3), "exit_rule": "halting:0.05"}


def classifier(stack: dict) -> nn.Module:
    return made("encoder", plan="linear", num_layers=4, features=None, vocab_size=11, stack=stack)


def language_model(plan: str = "softmax", **stack) -> LanguageModel:
    return made("language model", plan=plan, num_layers=4, stack=stack)


def let_them_differ(model: nn.Module) -> nn.Module:
    """Randomise halting units, so that tokens stop at different layers."""
    for unit in model.exits:
        nn.init.normal_(unit.linear.weight, std=1.5)
    return model


def at_each_exit(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits at each exit and after the last layer."""
    result = model.train()(ids)
    model.eval()
    return [logits.detach() for _, logits in result.extras["exits"]] + [result.output.detach()]


def expected_exits(rule: str, logits: list[torch.Tensor]) -> list[int]:
    """The definitions, one sequence at a time: the number of the exit at which each one leaves."""
    name, _, value = rule.partition(":")
    found = []
    for row in range(len(logits[0])):
        said, repeated, left = None, 0, len(logits) - 1
        for number, each in enumerate(logits[:-1]):
            p = each[row].softmax(-1)
            repeated = repeated + 1 if said == int(p.argmax()) else 0
            said = int(p.argmax())
            measured = {"entropy": -float(value) < float((p * p.log()).sum()), "patience": repeated >= float(value)}
            measured |= {"confidence": float(p.max()) >= float(value), "layer": number + 1 >= float(value)}
            if measured[name]:
                left = number
                break
        found.append(left)
    return found


@pytest.mark.parametrize("rule", ["entropy", "patience:1", "patience:2", "confidence", "layer:2"])
@pytest.mark.parametrize("heads", ["shared", "own"])
def test_sequences_leave_where_the_definition_says_and_are_read_there(rule, heads):
    model, ids = classifier({"exits": (1, 2, 3), "exit_heads": heads}), torch.randint(11, (24, 7))
    for parameter in model.head.parameters():
        parameter.data *= 4  # so that rows have different answers
    logits = at_each_exit(model, ids)
    if rule in ("entropy", "confidence"):  # a threshold between two rows at the second exit
        p = logits[1].softmax(-1)
        middle = (torch.special.entr(p).sum(-1) if rule == "entropy" else p.amax(-1)).sort().values[11:13].mean()
        rule = f"{rule}:{float(middle)}"
    set_exit_rule(model, rule)
    found, expected = model(ids), expected_exits(rule, logits)
    assert [layer - 1 for layer in found.extras["exit_layer"].tolist()] == expected
    assert len(set(expected)) > 1 or rule.startswith("layer")
    picked = torch.stack([logits[number][row] for row, number in enumerate(expected)])
    torch.testing.assert_close(found.output, picked)


@pytest.mark.parametrize("rule", ["entropy:2.3", "patience:1", "layer:3"])
def test_each_token_of_a_language_model_leaves_by_the_rule_whether_it_is_stepped_or_read_whole(rule):
    model, ids = language_model("gated_linear", exits=(1, 2, 3)), torch.randint(11, (2, 12))
    logits = [each.flatten(0, 1) for each in at_each_exit(model, ids)]
    set_exit_rule(model, rule)
    with exit_layers(model) as whole:
        found = model(ids)
    expected = expected_exits(rule, logits)
    assert (whole[0] - 1).tolist() == expected
    torch.testing.assert_close(found.output.flatten(0, 1)[0], logits[expected[0]][0])
    with exit_layers(model) as stepped:
        torch.testing.assert_close(read_in_pieces(model, ids, 1)[0], found.output)
    assert torch.equal(torch.stack(stepped, 1).flatten(), whole[0])


def test_a_layer_keeps_keys_and_values_of_the_hidden_state_with_which_a_token_left():
    model, ids = language_model(exits=(1,), exit_rule="layer:1"), torch.randint(11, (1, 6))
    state = model(ids, context=Context(want=frozenset({"state"}))).state
    left = model.blocks[0](model.embedding(ids), context=Context()).output
    for block, kept in zip(model.blocks[1:], state.layers[1:], strict=True):
        own = block(left, context=Context(want=frozenset({"state"}))).state
        torch.testing.assert_close(kept.mechanism.k, own.mechanism.k)
        torch.testing.assert_close(kept.mechanism.v, own.mechanism.v)


@pytest.mark.parametrize("rule", ["entropy:0", "patience:9"])
def test_a_rule_that_never_holds_is_the_whole_model(rule):
    model, ids = language_model(exits=(1, 2)), torch.randint(11, (3, 7))
    tokens, logits = model.generate(ids, 8), model(ids).output
    set_exit_rule(model, rule)
    assert torch.equal(model.generate(ids, 8), tokens)
    torch.testing.assert_close(model(ids).output, logits)


def test_a_rule_that_always_holds_is_a_model_of_the_first_layers():
    model, ids = language_model(exits=(2,), exit_rule="layer:1"), torch.randint(11, (3, 7))
    nn.init.normal_(model.exits[0].norm.weight)
    first = LanguageModel(
        dataclasses.replace(model.config, plan=model.config.plan[:2], num_layers=2, stack={})
    ).double()
    first.load_state_dict(model.state_dict(), strict=False)
    first.norm.load_state_dict(model.exits[0].norm.state_dict())
    torch.testing.assert_close(model(ids).output, first.eval()(ids).output)
    assert torch.equal(model.generate(ids, 9), first.generate(ids, 9))


def test_layers_that_a_token_did_not_pass_project_its_keys_and_values_and_no_more():
    model, ids = language_model(exits=(1,), exit_rule="layer:1"), torch.randint(11, (2, 6))
    ran: list[tuple[int, str]] = []
    for number, block in enumerate(model.blocks):
        parts = {"query": block.mixer.query, "key": block.mixer.key, "value": block.mixer.value}
        parts |= {"output": block.mixer.output, "feed forward": block.feed_forward}
        for name, part in parts.items():
            part.register_forward_hook(lambda *_, called=(number, name): ran.append(called))
    model.generate(ids, 4)
    assert {name for number, name in ran if number > 0} == {"key", "value"}
    assert [called for called in ran if called[0] == 0].count((0, "feed forward")) == 4
    ran.clear()
    set_exit_rule(model, "entropy:0")  # no token leaves
    model.generate(ids, 4)
    assert ran.count((3, "output")) == 4


def test_rows_that_have_left_wait_for_those_that_go_on():
    model, ids = language_model(exits=(1, 2, 3)), torch.randint(11, (6, 5))
    logits = [each.flatten(0, 1) for each in at_each_exit(model, ids)]
    middle = float(logits[1].softmax(-1).amax(-1).median())
    set_exit_rule(model, f"confidence:{middle}")
    whole = model(ids)
    assert len(whole.extras["exit_layer"].unique()) > 2
    with exit_layers(model) as stepped:
        torch.testing.assert_close(read_in_pieces(model, ids, 1)[0], whole.output)
    assert torch.equal(torch.stack(stepped).view(5, 6).T, whole.extras["exit_layer"])
    alone = torch.cat([read_in_pieces(model, row[None], 1)[0] for row in ids])
    torch.testing.assert_close(alone, whole.output)


def kept_by_pairs() -> list[str]:
    """Mechanisms whose state is keys and values, except one that has no state with some options."""
    cards = map(get_mechanism, list_mechanisms(kind="attention", pattern="causal-self"))
    states = KeyValueState, WindowState
    return [card.name for card in cards if card.state in states and card.name != "stochastic_subsampling"]


@pytest.mark.parametrize("name", kept_by_pairs())
def test_what_a_layer_takes_up_is_what_it_has_after_answering(name):
    wanted, card = Context(want=frozenset({"state"})), get_mechanism(name)
    for variant, options in {"": {}, **card.variants}.items():
        if Pattern.CAUSAL_SELF not in card.variant_patterns.get(variant, card.patterns):
            continue
        layer = create_layer(name, 16, 2, **options).double().eval()
        x, y = torch.randn(2, 2, 9, 16, dtype=torch.float64)
        expected, found = layer(x, context=wanted).state, layer.take_up(x, context=wanted)
        if found is None:  # a token's state is more than its key and value
            assert name not in ("softmax", "local", "sigmoid", "clipped_softmax", "differential")
            continue
        for piece in (y[:, :1], y[:, 1:]):
            after = layer(piece, state=expected)
            found, expected = layer.take_up(piece, context=Context(), state=found), after.state
            for key, tensor in expected.tensors().items():
                torch.testing.assert_close(found.tensors()[key], tensor, msg=f"{options}: {key}")
        torch.testing.assert_close(layer(x, state=found).output, layer(x, state=expected).output)


def ponder(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adaptive computation time by its definition, one token at a time: logits, steps and remainder of each."""
    rows, n = ids.shape
    x = model.embedding(ids)
    epsilon = model.config.stack.rule.value
    mean, total = torch.zeros_like(x), x.new_zeros(rows, n)
    steps, rest = torch.zeros(rows, n), x.new_zeros(rows, n)
    halted = torch.zeros(rows, n, dtype=torch.bool)
    for number, block in enumerate(model.blocks):
        x = torch.where(halted[..., None], x, block(x, context=Context()).output)
        last = number == len(model.blocks) - 1
        p = None if last else model.exits[number](x)
        for b in range(rows):
            for i in range(n):
                if halted[b, i]:
                    continue
                steps[b, i] += 1
                if last or total[b, i] + p[b, i] >= 1 - epsilon:
                    rest[b, i] = share = 1 - total[b, i]
                    halted[b, i] = True
                else:
                    share = p[b, i]
                mean[b, i] += share * x[b, i]
                total[b, i] += share
    return model.logits(model.norm(mean)), steps, rest


@pytest.mark.parametrize("training", [False, True])
def test_halting_is_the_mean_of_the_layers_by_probability_and_costs_places_and_rest(training):
    model, ids = let_them_differ(language_model(**HALTING)).train(training), torch.randint(11, (2, 6))
    with exit_layers(model) as seen, torch.no_grad():
        found = model(ids)
        output, steps, rest = ponder(model, ids)
    assert len(steps.unique()) > 1
    torch.testing.assert_close(found.output, output)
    assert torch.equal(seen[0], steps.flatten().long())
    total, count = found.losses["ponder"]
    torch.testing.assert_close(total, (steps + rest).sum())
    assert count == 12


def test_halting_at_the_first_place_is_a_network_of_one_layer_and_begins_as_the_mean_of_all():
    model, ids = language_model(**HALTING), torch.randint(11, (2, 6))
    one = LanguageModel(dataclasses.replace(model.config, plan=model.config.plan[:1], num_layers=1, stack={})).double()
    one.load_state_dict(model.state_dict(), strict=False)
    hidden, x = [], model.embedding(ids)
    for block in model.blocks:
        x = block(x, context=Context()).output
        hidden.append(x)
    torch.testing.assert_close(model(ids).output, model.logits(model.norm(torch.stack(hidden).mean(0))))
    nn.init.constant_(model.exits[0].linear.bias, 50.0)
    torch.testing.assert_close(model(ids).output, one.eval()(ids).output)


def test_halting_does_not_see_padding_and_is_stepped_as_it_is_read(tmp_path):
    model, ids = let_them_differ(language_model("gated_linear", **HALTING)), torch.randint(11, (3, 9))
    whole = model(ids)
    torch.testing.assert_close(read_in_pieces(model, ids, 1)[0], whole.output)
    padded = model(
        nn.functional.pad(ids, (4, 0)), context=Context(mask=Mask(valid=(torch.arange(13) >= 4).expand(3, -1)))
    )
    torch.testing.assert_close(padded.output[:, 4:], whole.output)
    torch.testing.assert_close(padded.losses["ponder"][0], whole.losses["ponder"][0])
    assert padded.losses["ponder"][1] == 27 and not padded.extras["exit_layer"][:, :4].any()
    check_comes_back_from_disk(model, (ids,), tmp_path)


def test_the_loss_of_pondering_lets_tokens_halt_sooner():
    model, ids = language_model(**HALTING), torch.randint(11, (2, 8))
    assert all(not unit.linear.weight.any() for unit in model.exits)
    total, count = model.train()(ids).losses["ponder"]
    (total / count).backward()
    assert all(float(unit.linear.bias.grad) < 0 for unit in model.exits)  # halting sooner leaves a smaller remainder


@pytest.mark.parametrize(
    "rule", ["entropy:-1", "patience:1.5", "patience:0", "confidence:2", "entropy", "halting:1", "layer:inf"]
)
def test_values_that_a_rule_does_not_take_are_refused(rule):
    with pytest.raises(Unsupported, match=f"{rule}.*{rule.partition(':')[0]}:VALUE"):
        ExitRule.read(rule)


def test_rules_that_do_not_fit_a_model_are_refused():
    halting, reading = language_model(**HALTING), language_model(exits=(1,))
    for model, rule, words in (
        (halting, "entropy:0.3", "halting:0"),
        (halting, None, "halting:0"),
        (reading, "halting:0.1", "without halting units"),
        (language_model(), "entropy:0.3", "without exits"),
        (reading, "entropie:0.3", "entropy:0.3"),
    ):
        with pytest.raises(Unsupported, match=words):
            set_exit_rule(model, rule)
    with pytest.raises(Unsupported, match="exit_heads='own'"):
        language_model(exits=(1,), exit_heads="own")
    with pytest.raises(Unsupported, match="halting"):
        classifier({**HALTING, "exit_heads": "own"})


def test_patience_counts_those_that_are_left_alone():
    leaving, said = Leaving(ExitRule.read("patience:1")), torch.eye(3)
    assert leaving.decide(said[[0, 1, 2]], 1).tolist() == [False, False, False]
    assert leaving.decide(said[[0, 2, 2]], 2).tolist() == [True, False, True]
    assert leaving.decide(said[[2]], 3).tolist() == [True]


def test_patience_begins_anew_when_another_class_is_said():
    leaving, said = Leaving(ExitRule.read("patience:2")), torch.eye(2)
    assert [bool(leaving.decide(said[[one]], 1)) for one in (0, 0, 1, 1, 1)] == [False, False, False, False, True]


def test_tokens_of_a_pooled_encoder_halt_alone_and_padding_has_passed_nothing():
    model, ids = let_them_differ(classifier(HALTING)), torch.randint(11, (2, 6))
    with exit_layers(model) as seen:
        found = model(ids, context=Context(mask=Mask(lengths=torch.tensor([6, 2]))))
    passed = found.extras["exit_layer"]
    assert not passed[1, 2:].any() and (passed[0] > 0).all()
    assert len(seen[0]) == 8
    torch.testing.assert_close(model(ids[1:, :2]).output, found.output[1:])
