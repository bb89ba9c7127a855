"""The growing memory behind caches: returned tensors never change, and appending most tokens copies nothing."""

import copy

import pytest
import torch

from regard.engines.cache import append, append_rows, last_slots, newest


def sequence(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def grown(steps=6, first=10):
    x = sequence(2, 3, first, 4)
    parts, views = [x], []
    for _ in range(steps):
        new = sequence(2, 3, 1, 4)
        parts.append(new)
        x = append(x, new, 2)
        views.append(x)
    return x, parts, views


def test_append_is_concatenation_and_earlier_results_stay():
    x, parts, views = grown()
    assert torch.equal(x, torch.cat(parts, 2))
    for i, view in enumerate(views):
        assert torch.equal(view, torch.cat(parts[: i + 2], 2))


def test_most_steps_copy_nothing():
    _, _, views = grown(steps=100, first=200)
    assert len({view.untyped_storage().data_ptr() for view in views}) <= 3


def test_two_continuations_do_not_overwrite_each_other():
    x, _, _ = grown()
    a, b = sequence(2, 3, 2, 4), sequence(2, 3, 1, 4)
    one, other = append(x, a, 2), append(x, b, 2)
    again = append(one, b, 2)
    assert torch.equal(one, torch.cat([x, a], 2))
    assert torch.equal(other, torch.cat([x, b], 2))
    assert torch.equal(again, torch.cat([x, a, b], 2))


def test_a_cache_that_gives_up_its_oldest_slots_goes_on_in_its_memory_and_stays_small():
    x, places = sequence(2, 3, 50, 4), set()
    whole, views = x, []
    for _ in range(200):
        new = sequence(2, 3, 1, 4)
        whole = torch.cat([whole, new], 2)
        x = newest(append(x, new, 2), 2, 50)
        views.append(x)
        places.add(x.untyped_storage().data_ptr())
        assert x.untyped_storage().nbytes() <= 2 * x.nbytes
    assert len(places) <= 200 // 10
    for t, view in enumerate(views):
        assert torch.equal(view, whole[:, :, t + 1 : t + 51])
    one, other = append(x, new, 2), append(newest(x, 2, 30), new, 2)
    assert torch.equal(one, torch.cat([x, new], 2)) and torch.equal(other, one[:, :, 20:])


def test_copies_grow_on_their_own():
    x, _, _ = grown()
    new = sequence(2, 3, 1, 4)
    for other in (copy.deepcopy(x), x.clone(), x.index_select(0, torch.tensor([1, 0])), x[:1].expand(2, -1, -1, -1)):
        assert torch.equal(append(other, new, 2), torch.cat([other, new], 2))
    assert torch.equal(append(x, new, 2), torch.cat([x, new], 2))


def test_gradients_pass_and_saved_tensors_stay_valid():
    x, _, _ = grown()
    q, new = sequence(2, 3, 1, 4).requires_grad_(), sequence(2, 3, 1, 4)
    score = (q * x).square().sum()  # saves x
    append(x, new, 2)
    score.backward()
    assert torch.allclose(q.grad, (2 * q * x * x).sum(2, keepdim=True))
    new.requires_grad_()
    append(x, new, 2).sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))


def test_inference_mode_and_other_modes_mix():
    with torch.inference_mode():
        x, _, _ = grown()
    new = sequence(2, 3, 1, 4)
    with torch.no_grad():
        assert torch.equal(append(x, new, 2), torch.cat([x, new], 2))
    x, _, _ = grown()
    with torch.inference_mode():
        assert torch.equal(append(x, new, 2), torch.cat([x, new], 2))


def test_what_does_not_fit_is_refused_as_by_concatenation():
    x, _, _ = grown()
    with pytest.raises(RuntimeError):
        append(x, sequence(1, 3, 1, 4), 2)
    assert torch.equal(append(x, x[:, :, :0], 2), x)


def test_rows_that_hold_unequal_numbers_are_continued_each_from_its_end():
    past, new = sequence(3, 2, 4, 5), sequence(3, 2, 3, 5)
    counts, more = torch.tensor([4, 1, 0]), torch.tensor([2, 3, 0])
    found = append_rows(past, counts, new, more)
    assert found.shape[2] == 6
    for row in range(3):
        expected = torch.cat([past[row, :, : counts[row]], new[row, :, : more[row]]], 1)
        assert torch.equal(found[row, :, : expected.shape[1]], expected)
    assert append_rows(past[:, :, :0], counts * 0, new, more * 0).shape == (3, 2, 0, 5)


def test_a_program_keeps_the_last_slots_of_sequences_of_any_length():
    class Kept(torch.nn.Module):
        def forward(self, x):
            return last_slots(x, None, 4, cached=True)

    length = torch.export.Dim("length", min=5, max=1000)
    program = torch.export.export(Kept(), (torch.randn(2, 1, 6, 3),), dynamic_shapes=({2: length},)).module()
    for n in (5, 9, 40):
        x = torch.randn(2, 1, n, 3)
        assert torch.equal(program(x), x[:, :, -4:])
