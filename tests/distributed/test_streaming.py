"""Attention to keys and values in a file, a chunk at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import close, qkv, refused

from regard.distributed import attend_million


class Watched:
    """An array that records how many tokens each read asked for."""

    def __init__(self, array):
        self.array, self.shape, self.read, self.watch = array, array.shape, [], lambda: None

    def __getitem__(self, index):
        found = self.array[index]
        self.read.append(found.shape[2])
        self.watch()
        return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "q_chunk", "kv_chunk"), [(7, 50, 3, 8), (50, 50, 16, 9), (5, 5, 9, 9), (3, 20, 1, 1)]
)
def test_chunks_of_a_file_give_what_the_whole_gives(n, m, q_chunk, kv_chunk, causal, tmp_path):
    inputs, files = qkv(n, m, heads=4, groups=2, dim=6, value_dim=5), []
    for name in "kv":
        np.save(tmp_path / f"{name}.npy", inputs[name].numpy())
        files.append(Watched(np.load(tmp_path / f"{name}.npy", mmap_mode="r")))
    found = attend_million(inputs["q"], *files, q_chunk=q_chunk, kv_chunk=kv_chunk, causal=causal)
    visible = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
    close(found, torch.nn.functional.scaled_dot_product_attention(*inputs.values(), visible, enable_gqa=True))
    for file in files:
        assert max(file.read) <= kv_chunk
        assert sum(file.read) <= m * -(-n // q_chunk)


def anonymous_bytes():
    """Memory of this process that is not backed by a file."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_is_that_of_some_chunks_and_not_that_of_the_file(tmp_path):
    np.save(tmp_path / "file.npy", np.random.default_rng().standard_normal((1, 2, 120_000, 32), dtype=np.float32))
    file, q, used = Watched(np.load(tmp_path / "file.npy", mmap_mode="r")), torch.randn(1, 2, 16, 32), []
    first = file[:, :, :4096]
    attend_million(q, first, first, kv_chunk=4096)  # one-time allocations
    file.watch = lambda: used.append(anonymous_bytes())
    before = anonymous_bytes()
    attend_million(q, file, file, kv_chunk=4096)
    assert len(used) == 60 and max(used) - before < 8 << 20 < file.array.nbytes / 3


def test_shapes_that_do_not_fit_are_refused_in_words():
    q, k, v = qkv(4, 6).values()
    refused("4 axes", attend_million, q[0], k, v)
    refused("a divisor of H", attend_million, q, k[:, :, :5], v)
    refused("4 queries as the last of 3", attend_million, q, k[:, :, :3], v[:, :, :3], causal=True)
    refused("kv_chunk=0", attend_million, q, k, v, kv_chunk=0)
