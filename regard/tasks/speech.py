"""Speech: the spectrum of spoken digits, given their words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern, Unsupported
from regard.tasks.documents import Paths, one_folder
from regard.tasks.protocol import (
    EVALUATION,
    SPLIT,
    TRAINING,
    Baseline,
    Batch,
    Task,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.voices import HOP, MELS, RATE, WORDS, spoken_digits

if TYPE_CHECKING:
    from jaxtyping import Float

LETTERS = " " + "".join(sorted(set("".join(WORDS))))
LONGEST = max(map(len, WORDS))
CEPSTRA = 13
DECIBELS = 5 / math.log(10) * math.sqrt(2)
"""Factor from a distance between cepstral coefficients of log energies to dB."""
HELD_OUT = 0.1


class SpeechTask(Task):
    """Predict the log-mel frames of spoken digits, all at once, from their words and the speaker (as FastSpeech 2,
    arXiv 2006.04558).

    The memory is the text: a one-hot row for each character and a last one for the speaker. The inputs locate each
    frame: in the longest sound, in this sound, and the length of this sound, which is given. Frames are standardised by
    the training frames. A tenth of the combinations of digits and speaker is held out and, for recordings, every tenth
    take. The score is MCD: the distance between 13 cepstral coefficients in dB, along the best alignment, per generated
    frame. MSD, the same distance for log-mel bands, as a root mean square, is reported too. The baseline is the mean
    frame.

    Args:
        data: a folder of recordings named DIGIT_SPEAKER_TAKE.wav (the free spoken digit dataset); None for four voices
            of espeak-ng.
        length: frames of the longest sound, 8 ms each, 16 to 4096; longer sounds are cut.
        digits: largest number of digits per item, 2 to 8; items have this number or one less.
        evaluation_items: number of held-out items, 1 to 65536.
        seed: seed of the split.
    """

    name = "speech"
    pattern = Pattern.NONCAUSAL_CROSS
    objective = "regression"
    features, num_targets = 3, MELS
    target_features = ()
    metric = "MCD"
    higher_is_better = False

    def __init__(
        self,
        *,
        data: Paths | None = None,
        length: int = 256,
        digits: int = 4,
        evaluation_items: int = 32,
        seed: int = 0,
    ) -> None:
        self.length = check_integer("length", length, 16, 1 << 12)
        self.digits = check_integer("digits", digits, 2, 8)
        items = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        folder = None if data is None else one_folder(data, "recordings")
        self._takes = spoken_digits(None if folder is None else str(folder))
        self._speakers = sorted({speaker for _, speaker in self._takes})
        self._named = f"{len(self._speakers)} voices of espeak-ng" if folder is None else f"recordings in {folder.name}"
        self.memory_features: int = len(LETTERS) + len(self._speakers)
        self.memory_length: int = digits * (LONGEST + 1)
        frames = torch.cat([take for takes in self._takes.values() for take in takes])
        self._mean, self._deviation = frames.mean(0), frames.std(0).clamp(min=1e-3)
        draws = counter_generator(self.seed, 0, EVALUATION)
        chosen: dict[tuple[int, ...], None] = {}
        for _ in range(100 * items):
            if len(chosen) == items:
                break
            chosen[self._phrase(draws, held_out=True)] = None
        if len(chosen) < items:
            raise Unsupported(
                f"evaluation_items={items} of {self.digits} digits",
                supported=f"at most {len(chosen)}",
                nearest="digits=4",
            )
        self._scored = list(chosen)
        self.baseline: Baseline | None = Baseline.of(
            "the mean frame", self, lambda batch: torch.zeros_like(batch.targets)
        )
        self.chance = self.baseline.score

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        draws = counter_generator(seed, step, TRAINING)
        return self._batch([self._phrase(draws, held_out=False) for _ in range(batch_size)], draws)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._batch(self._scored[rows], None)

    def score(self, logits: Float[Tensor, "b n m"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        found = [_warped(*(cepstra(x) for x in pair)) for pair in self._pairs(logits, batch)]
        return DECIBELS * torch.tensor(found, dtype=torch.float64), torch.ones(batch.size, dtype=torch.float64)

    def figures(
        self, output: Float[Tensor, "b n m"], batch: Batch
    ) -> dict[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        found = [_warped(*pair) / math.sqrt(MELS) for pair in self._pairs(output, batch)]
        return {"MSD": (torch.tensor(found, dtype=torch.float64), torch.ones(batch.size, dtype=torch.float64))}

    def describe(self) -> str:
        assert self.baseline is not None
        sample = self._scored[0]
        text = " ".join(WORDS[digit] for digit in sample[1:])
        return "\n".join(
            [
                f"speech: {self.digits - 1} to {self.digits} spoken digits, {self._named}; {MELS} log-mel bands, a frame each "
                f"{1000 * HOP / RATE:.0f} ms, at most {self.length}",
                f"held out: {len(self._scored)} of the {HELD_OUT:.0%} of the phrases that are not trained on",
                f"scored in MCD (dB), lower is better; {self.baseline.name}: {self.baseline.score:.2f}",
                f"sample: {text} ({self._speakers[sample[0]]})",
            ]
        )

    def _phrase(self, draws: np.random.Generator, *, held_out: bool) -> tuple[int, ...]:
        """Draw a speaker and digits."""
        while True:
            count = int(draws.integers(self.digits - 1, self.digits + 1))
            phrase = int(draws.integers(len(self._speakers))), *draws.integers(0, 10, count).tolist()
            number = int("".join(map(str, (*phrase, count))))
            if (counter_generator(self.seed, number, SPLIT).random() < HELD_OUT) == held_out:
                return phrase

    def _batch(self, phrases: list[tuple[int, ...]], draws: np.random.Generator | None) -> Batch:
        rows, n = len(phrases), self.length
        memory = torch.zeros(rows, self.memory_length, self.memory_features)
        memory_valid = torch.zeros(rows, self.memory_length, dtype=torch.bool)
        inputs = torch.zeros(rows, n, self.features)
        targets = torch.full((rows, n, MELS), math.nan)
        valid = torch.zeros(rows, n, dtype=torch.bool)
        for row, (speaker, *digits) in enumerate(phrases):
            text = " ".join(WORDS[digit] for digit in digits)
            memory[row, torch.arange(len(text)), torch.tensor([LETTERS.index(letter) for letter in text])] = 1
            memory[row, len(text), len(LETTERS) + speaker] = 1
            memory_valid[row, : len(text) + 1] = True
            sound = torch.cat([self._take(digit, speaker, draws) for digit in digits])[:n]
            frames = len(sound)
            at = torch.arange(frames)
            inputs[row, :frames] = torch.stack([at / n, at / frames, torch.full((frames,), frames / n)], -1)
            targets[row, :frames] = (sound - self._mean) / self._deviation
            valid[row, :frames] = True
        return Batch(inputs, targets, valid, memory=memory, memory_valid=memory_valid)

    def _take(self, digit: int, speaker: int, draws: np.random.Generator | None) -> Tensor:
        """A recording of a digit; every tenth take is held out if there are that many."""
        takes = self._takes[digit, self._speakers[speaker]]
        scored = takes[::10]
        if draws is None:
            return scored[0]
        training = [take for i, take in enumerate(takes) if i % 10] or takes
        return training[int(draws.integers(len(training)))]

    def _pairs(self, output: Tensor, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and target log-mel frames of each item, without padding."""
        for made, said in zip(output.double(), batch.targets.double(), strict=True):
            frames = int((~said[:, 0].isnan()).sum())
            deviation, mean = self._deviation.double(), self._mean.double()
            yield made[:frames] * deviation + mean, said[:frames] * deviation + mean


def cepstra(frames: Float[Tensor, "n m"]) -> Float[Tensor, "n c"]:
    """Cepstral coefficients 1 to 13 of log-mel frames: their orthonormal cosine transform."""
    places = torch.arange(frames.shape[-1], dtype=frames.dtype) + 0.5
    order = torch.arange(1, CEPSTRA + 1, dtype=frames.dtype)
    waves = (math.pi / frames.shape[-1] * places * order[:, None]).cos() * math.sqrt(2 / frames.shape[-1])
    return frames @ waves.mT


def _warped(made: Tensor, said: Tensor) -> float:
    return warped_distance(torch.cdist(made, said).numpy()) / max(len(made), 1)


def warped_distance(distance: np.ndarray) -> float:
    """The smallest sum of distances (n, m) along a path from the first pair to the last that advances by one in either
    or both (dynamic time warping), computed one diagonal at a time."""
    n, m = distance.shape
    before = last = np.full(n + 1, np.inf)  # sums on the two previous diagonals, by row + 1
    for diagonal in range(n + m - 1):
        rows = np.arange(max(0, diagonal - m + 1), min(n, diagonal + 1))
        best = np.minimum(np.minimum(last[rows], last[rows + 1]), before[rows]) if diagonal else np.zeros(1)
        now = np.full(n + 1, np.inf)
        now[rows + 1] = best + distance[rows, diagonal - rows]
        before, last = last, now
    return float(last[n])
