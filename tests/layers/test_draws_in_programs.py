"""Random numbers of calls in compiled programs."""

import pytest
import torch

from regard.core.draws import normal, uniform
from regard.layers.drop_path import DropPath


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_program_of_any_size_draws_what_eager_code_draws(draw):
    def noisy(x):
        return x + draw(x.shape, None, device=x.device, dtype=torch.float64)

    torch.compiler.reset()
    compiled = torch.compile(noisy, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (4, 7):
        x = torch.randn(2, n, dtype=torch.float64)
        found = []
        for call in (compiled, noisy):
            torch.manual_seed(3)
            found.append(call(x))
        assert torch.equal(*found) and not torch.equal(found[0], x)


def test_a_generator_alone_decides_what_is_drawn():
    for draw in (uniform, normal):
        same = (draw((3, 4), torch.Generator().manual_seed(5), device=torch.device("cpu")) for _ in range(2))
        assert torch.equal(*same)


def test_dropped_paths_compile_for_any_batch():
    torch.compiler.reset()
    layer = DropPath(0.5).train()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (16, 40):
        rows = compiled(torch.ones(batch, 2, 3)).flatten(1)
        assert set(rows.unique().tolist()) == {0.0, 2.0} and bool((rows == rows[:, :1]).all())
