"""States of sequences that are joined into a batch continue as each sequence alone."""

import pytest
import torch

from regard import get_mechanism, list_mechanisms
from regard.contract import Context, Kind, Pattern
from regard.models import LanguageModel, LanguageModelConfig
from regard.serving.states import Held, join

CAUSAL = [
    name
    for name in list_mechanisms(pattern=Pattern.CAUSAL_SELF)
    if get_mechanism(name).kind is not Kind.PROJECTION and get_mechanism(name).state is not None
]


def read(model, ids, state=None):
    with torch.no_grad():
        result = model.features(ids, context=Context(want=frozenset({"state"})), state=state)
    return result.output, result.state


@pytest.mark.parametrize("name", CAUSAL)
def test_joined_states_of_unequal_lengths_go_on_as_each_alone(name):
    model = LanguageModel(LanguageModelConfig(20, dim=16, plan=[name], num_heads=2, feed_forward=0)).double().eval()
    texts = [torch.randint(0, 20, (1, n)) for n in (3, 70, 12)]
    more = torch.randint(0, 20, (3, 4))
    wanted = torch.cat([read(model, torch.cat([x, more[i : i + 1]], 1))[0][:, -4:] for i, x in enumerate(texts)])
    held = Held()
    for i, text in enumerate(texts):
        held.put([i], read(model, text)[1])
    first, state = read(model, more[[2, 0]][:, :2], held.get([2, 0]))  # two rows continue
    held.put([2, 0], state)
    second, state = read(model, more[[1]][:, :2], held.get([1]))
    held.put([1], state)
    rest, _ = read(model, more[:, 2:], held.get([0, 1, 2]))  # all three together
    found = torch.cat([torch.stack([first[1], second[0], first[0]]), rest], 1)
    assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_rows_are_padded_as_their_fields_say():
    from regard.mechanisms.landmark.cache import LandmarkState

    def state(n):
        x = torch.ones(1, 1, n, 2)
        return LandmarkState(x, x, torch.ones(1, n, dtype=torch.bool), torch.tensor([n]), torch.tensor([n]))

    both = join([state(1), state(3)])
    assert both.landmark.tolist() == [[False, False, True], [True] * 3]
    assert both.present().tolist() == both.landmark.tolist() and both.marks is None


def test_states_that_left_are_not_kept():
    held = Held()
    model = LanguageModel(LanguageModelConfig(20, dim=8, plan=["linear"], num_heads=1)).eval()
    all_three = read(model, torch.randint(0, 20, (3, 3)))[1]
    held.put([5, 4, 9], all_three)
    for keys in ([9, 5], [5, 4], [4]):
        rows = torch.tensor([[5, 4, 9].index(key) for key in keys])
        for name, found in held.get(keys).tensors().items():
            assert torch.equal(found, all_three.tensors()[name][rows])
    held.drop(5)
    held.put([4, 9], held.get([4, 9]))
    both = held.nbytes
    held.drop(4)
    held.put([9], held.get([9]))
    assert held.nbytes == both // 2 and 4 not in held and 9 in held
    held.drop(9)
    assert held.nbytes == 0
