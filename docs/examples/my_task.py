"""PyTorch data sets and a metric of one's own: regard compare --plugin my_task.py --mechanisms softmax,linear"""

import torch
from torch.utils.data import TensorDataset

from regard.tasks import DatasetTask


def waves(count, seed):
    """Noisy waves of 48 points; how many turns do they make, 1 to 8?"""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randint(8, (count,), generator=generator)
    phase, noise = torch.rand(count, 1, generator=generator), torch.randn(count, 48, generator=generator)
    angle = (turns[:, None] + 1) * torch.linspace(0, 1, 48) + phase
    return TensorDataset(((6.283 * angle).sin() + 0.3 * noise)[:, :, None], turns)


def within_one(output, batch):
    """Sum and weight of each item: an answer one turn off counts as right."""
    right = (output.argmax(-1) - batch.targets).abs() <= 1
    return right.double(), torch.ones_like(right, dtype=torch.float64)


TASK = DatasetTask(
    waves(4000, seed=0),
    waves(500, seed=1),
    name="waves",
    objective="classification",
    num_classes=8,
    score=within_one,
    metric="within one turn",
    higher_is_better=True,
)
