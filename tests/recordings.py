"""Synthetic recordings: each digit has its own sine wave, each speaker its own octave."""

import wave
from pathlib import Path

import numpy as np


def write_recordings(folder: Path, *, takes: int = 2, rate: int = 8000) -> None:
    for speaker, octave in (("ann", 1), ("bob", 2)):
        for digit in range(10):
            for take in range(takes):
                time = np.arange(rate // 8 + 100 * digit) / rate
                sound = np.sin(2 * np.pi * octave * (150 + 60 * digit) * time) * (0.5 + 0.1 * take)
                with wave.open(str(folder / f"{digit}_{speaker}_{take}.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(rate)
                    file.writeframes((sound * 2**14).astype("<i2").tobytes())
