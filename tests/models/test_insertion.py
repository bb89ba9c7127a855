from __future__ import annotations

import dataclasses
import pickle
import types

import pytest
import torch

from regard.catalogue import get_mechanism, register, unregister
from regard.contract import Context, Mask, Role, Unsupported
from regard.models import LanguageModel, LanguageModelConfig

EVERY = 3
EXTRA = len(Role) - 1


def insert_landmarks(ids, config):
    """One landmark before the first token and one behind each whole block."""
    rows, n = ids.shape
    columns, roles = [torch.zeros(rows, 1, dtype=ids.dtype)], [Role.LANDMARK]
    for start in range(0, n, EVERY):
        block = ids[:, start : start + EVERY]
        columns.append(block)
        roles += [Role.TOKEN] * block.shape[1]
        if block.shape[1] == EVERY:
            columns.append(torch.zeros(rows, 1, dtype=ids.dtype))
            roles.append(Role.LANDMARK)
    return torch.cat(columns, 1), torch.tensor(roles).expand(rows, -1)


@pytest.fixture
def marked():
    softmax = get_mechanism("softmax")
    card = dataclasses.replace(
        softmax, name="marked", aliases=(), prepare=insert_landmarks, honours=softmax.honours | {"roles"}
    )
    yield register(card, types.ModuleType("marked"))
    unregister("marked")


@pytest.fixture
def model(marked):
    config = LanguageModelConfig(vocab_size=9, dim=16, num_heads=2, plan=["marked", "softmax"], tie_embeddings=True)
    return LanguageModel(config).double().eval()


def test_output_is_that_of_the_prepared_sequence_without_the_inserted_tokens(model):
    plain = (
        LanguageModel(LanguageModelConfig(vocab_size=9 + EXTRA, dim=16, num_heads=2, num_layers=2, tie_embeddings=True))
        .double()
        .eval()
    )
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(9, (2, 8))
    prepared, roles = insert_landmarks(ids, None)
    prepared = torch.where(roles == Role.LANDMARK, 9 + Role.LANDMARK - 1, prepared)
    expected = plain(prepared).output[:, (roles == Role.TOKEN)[0], :9]
    torch.testing.assert_close(model(ids).output, expected)


def test_split_and_resume_equals_whole_with_inserted_tokens(model):
    ids = torch.randint(9, (2, 10))
    whole = model(ids).output
    for cut in range(11):
        first = model(ids[:, :cut], context=Context(want=frozenset({"state"})))
        second = model(ids[:, cut:], state=first.state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole)
        assert second.state.length.tolist() == [10, 10]


def test_rows_of_different_length_equal_rows_alone_with_inserted_tokens(model):
    ids = torch.randint(9, (4, 9))
    valid = torch.rand(4, 9) < 0.6
    valid[:, 4] = True
    output = model(ids, context=Context(mask=Mask(valid=valid))).output
    for row in range(4):
        torch.testing.assert_close(output[row][valid[row]], model(ids[row][valid[row]][None]).output[0])


def test_generation_inserts_on_the_way(model):
    ids = torch.randint(9, (3, 4))
    mask = Mask(lengths=torch.tensor([4, 1, 3]))
    assert model.generate(ids, 8, mask=mask).tolist() == model.generate(ids, 8, mask=mask, use_state=False).tolist()


def test_landmark_attention_runs_in_a_hybrid_whose_other_layers_do_not_know_roles():
    plan = [("landmark", {"block": 3}), "linear"]
    model = LanguageModel(LanguageModelConfig(vocab_size=9, dim=16, num_heads=2, plan=plan)).double().eval()
    ids = torch.randint(9, (3, 8))
    mask = Mask(lengths=torch.tensor([8, 1, 5]))
    assert model.generate(ids, 7, mask=mask).tolist() == model.generate(ids, 7, mask=mask, use_state=False).tolist()
    torch.testing.assert_close(model(ids, context=Context(mask=mask)).output[2, :5], model(ids[2:, :5]).output[0])


def test_reading_in_pieces_that_retrieve_all_blocks_equals_reading_whole():
    def build(top_k):
        plan = [("landmark", {"block": 3, "top_k": top_k})] * 2
        return LanguageModel(LanguageModelConfig(vocab_size=9, dim=16, num_heads=2, plan=plan)).double().eval()

    whole, retrieving = build(None), build(9)
    retrieving.load_state_dict(whole.state_dict())
    ids = torch.randint(9, (2, 29))
    for size in (1, 5, 12):
        state, outputs = None, []
        for piece in ids.split(size, 1):
            result = retrieving(piece, context=Context(want=frozenset({"state"})), state=state)
            state, outputs = result.state, [*outputs, result.output]
        torch.testing.assert_close(torch.cat(outputs, 1), whole(ids).output)


def test_what_cannot_go_with_inserted_tokens_is_refused(model):
    ids = torch.randint(9, (1, 4))
    with pytest.raises(Unsupported, match="inserted"):
        model(ids, context=Context(positions=torch.arange(4)[None]))
    with pytest.raises(Unsupported, match="inserted"):
        model(ids, context=Context(mask=Mask(bias=torch.zeros(1, 1, 4, 4))))


def test_a_model_that_inserts_tokens_can_be_pickled():
    model = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan="landmark", num_layers=1)).eval()
    ids = torch.randint(7, (1, 12))
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).output, model(ids).output)
