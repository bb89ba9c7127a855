from __future__ import annotations

import dataclasses
import pickle
import types

import pytest
import torch
from model_checks import made, ragged

from regard.catalogue import get_mechanism, register, unregister
from regard.contract import Context, Mask, Role, Unsupported
from regard.models import LanguageModel

EVERY = 3


def insert_landmarks(ids, config):
    """Insert one landmark before the first token and one after each whole block."""
    rows, n = ids.shape
    landmark = torch.zeros(rows, 1, dtype=ids.dtype)
    columns, roles = [landmark], [Role.LANDMARK]
    for place in range(n):
        columns.append(ids[:, place : place + 1])
        roles.append(Role.TOKEN)
        if place % EVERY == EVERY - 1:
            columns.append(landmark)
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


def make_model(plan, vocab_size=9, **options) -> LanguageModel:
    return made("language model", plan=plan, vocab_size=vocab_size, **options)


@pytest.fixture
def model(marked) -> LanguageModel:
    return make_model(["marked", "softmax"], tie_embeddings=True)


def test_output_is_that_of_the_prepared_sequence_without_the_inserted_tokens(model):
    plain = make_model(["softmax"] * 2, vocab_size=9 + len(Role) - 1, tie_embeddings=True)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(9, (2, 8))
    prepared, roles = insert_landmarks(ids, None)
    prepared = torch.where(roles == Role.LANDMARK, 9 + Role.LANDMARK - 1, prepared)
    expected = plain(prepared).output[:, (roles == Role.TOKEN)[0], :9]
    torch.testing.assert_close(model(ids).output, expected)


@pytest.mark.parametrize("name", ["marked", ("landmark", {"block": 3})])
def test_layers_that_insert_run_beside_those_that_do_not_know_roles(marked, name):
    model = make_model([name, "linear"])
    ids = torch.randint(9, (4, 9))
    valid = ragged(ids.shape)
    output = model(ids, context=Context(mask=Mask(valid=valid))).output
    for row in range(4):
        torch.testing.assert_close(output[row][valid[row]], model(ids[row][valid[row]][None]).output[0])
    for beams in (1, 3):
        options = {"mask": Mask(valid=valid), "beams": beams}
        assert torch.equal(model.generate(ids, 8, **options), model.generate(ids, 8, use_state=False, **options))


def test_what_cannot_go_with_inserted_tokens_is_refused(model):
    for context in (Context(positions=torch.arange(4)[None]), Context(mask=Mask(bias=torch.zeros(1, 1, 4, 4)))):
        with pytest.raises(Unsupported, match="inserted"):
            model(torch.randint(9, (1, 4)), context=context)


def test_a_model_that_inserts_tokens_can_be_pickled():
    model, ids = make_model(["landmark"]), torch.randint(9, (1, 12))
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).output, model(ids).output)
