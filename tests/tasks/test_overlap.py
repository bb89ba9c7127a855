"""The share of held-out text that also occurs in training text equals that found by counting every string."""

from __future__ import annotations

import numpy as np
import pytest

from regard.tasks import create_task
from regard.tasks import overlap as module
from regard.tasks.overlap import SHINGLE, overlap


def letters(generator, count):
    return generator.integers(97, 123, count, dtype=np.uint8).tobytes()


def strings(text):
    return [text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)]


@pytest.mark.parametrize("block", [1, 64, 1 << 15])
def test_the_share_is_that_of_counting_every_string(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    generator = np.random.default_rng()
    training = [letters(generator, n) for n in (0, 300, 49, 51, 700)]
    held_out = [
        training[1][20:150] + letters(generator, 90),
        training[1][-30:] + training[2] + training[3][:30],  # crosses borders of training texts, which are concatenated
        b"a" * 60 + training[4][:60] + b"a" * 60,
        letters(generator, 49),
        training[4][650:] + b"\n",
    ]
    known = set(strings(b"".join(training)))
    every = [string in known for text in held_out for string in strings(text)]
    found = overlap(training, held_out)
    assert (found.looked_up, found.count) == (len(every), len(every))
    assert 0.2 < np.mean(every) < 0.8
    assert found.share == pytest.approx(np.mean(every))


def test_of_long_text_as_many_strings_are_looked_up_as_is_said(monkeypatch):
    monkeypatch.setattr(module, "LOOKED_UP", 500)
    generator = np.random.default_rng()
    training = letters(generator, 20_000)
    found = overlap([training], [training[:6_000] + letters(generator, 14_000)])
    assert found.share == pytest.approx(0.3, abs=0.01)
    assert "500 looked up of 19,951" in str(found)


def test_texts_shorter_than_a_string_are_not_called_new():
    found = overlap([b"a" * 90], [b"a" * 20] * 9)
    assert "not known" in str(found)
    assert not found.much


def test_a_text_given_twice_is_not_called_new(tmp_path):
    (tmp_path / "a.txt").write_bytes((letters(np.random.default_rng(), 8_000) + b"\n") * 2)
    assert "warning: 100.0% of the held-out text" in create_task("text", data=tmp_path / "a.txt", length=16).describe()
