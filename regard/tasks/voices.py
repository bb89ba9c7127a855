"""Spoken digits: synthesised by espeak-ng, from the package espeakng-loader (GPL-3), or from a folder of recordings."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float

RATE, HOP, WINDOW, MELS = 8000, 64, 256, 40
"""Samples per second, samples between frames and per frame, number of mel bands."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en+m1", "en+m3", "en+f2", "en+f4")
INSTALL = "pip install --no-deps espeakng-loader"
RECORDING = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)\.wav")
RETRIEVAL, UTF8, CALLBACK = (
    1,
    1,
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p),
)

Takes = Mapping[tuple[int, str], list[Tensor]]
"""Log-mel frames (frames, MELS) of each take, by digit and speaker."""


@functools.cache
def spoken_digits(folder: str | None) -> Takes:
    """Ten digits by several speakers: four voices of espeak-ng, or the recordings in a folder.

    Args:
        folder: folder with files named digit_speaker_take.wav, as in the free spoken digit dataset; 16 bits, one
            channel.

    Raises:
        Unsupported: without the package, and for folders that lack a digit of a speaker.
    """
    found: dict[tuple[int, str], list[Tensor]] = {}
    if folder is None:
        for digit, speaker, samples, rate in _said():
            found[digit, speaker] = [log_mel(samples, rate)]
        return found
    place = Path(folder)
    files = sorted(place.glob("*.wav"))
    matches = [(path, match) for path in files if (match := RECORDING.fullmatch(path.name))]
    if not matches:
        raise Unsupported(
            f"data={folder} without recordings",
            supported="a folder of files named DIGIT_SPEAKER_TAKE.wav, as 7_ann_0.wav",
        )
    for path, match in sorted(matches, key=lambda pair: int(pair[1]["take"])):
        samples, rate = _read_wave(path)
        found.setdefault((int(match["digit"]), match["speaker"]), []).append(log_mel(samples, rate))
    speakers = {speaker for _, speaker in found}
    lacking = [
        f"{digit} of {speaker}" for speaker in sorted(speakers) for digit in range(10) if (digit, speaker) not in found
    ]
    if lacking:
        raise Unsupported(f"data={folder} without {lacking[0]}", supported="all ten digits of each speaker")
    return found


def log_mel(samples: Float[Tensor, " n"], rate: int) -> Float[Tensor, "frames m"]:
    """Natural logarithms of the mel band energies, with silence at both ends removed."""
    x = samples.double()
    count = round(len(x) * RATE / rate)
    if count != len(x):
        kept = torch.fft.rfft(x)[: count // 2 + 1]
        x = torch.fft.irfft(kept, count) * (count / len(x))
    loud = (x.abs() > 0.02 * x.abs().max()).nonzero()
    x = x[int(loud[0]) : int(loud[-1]) + 1] if len(loud) else x
    x = torch.nn.functional.pad(x, (0, max(WINDOW - len(x), 0)))
    power = (
        torch.stft(x, WINDOW, HOP, window=torch.hann_window(WINDOW, dtype=x.dtype), return_complex=True).abs().square()
    )
    return (power.mT @ _bands().mT).clamp(min=1e-6).log().float()


@functools.cache
def _bands() -> Float[Tensor, "m f"]:
    """Triangular filters, evenly spread on the mel scale."""
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)

    def mel(hertz: Tensor) -> Tensor:
        return 2595 * (1 + hertz / 700).log10()

    edges = torch.linspace(0, float(mel(torch.tensor(RATE / 2))), MELS + 2, dtype=torch.float64)
    at = mel(frequencies)
    rising = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def _read_wave(path: Path) -> tuple[Tensor, int]:
    """The samples of a recording, from -1 to 1, and how many there are in a second."""
    try:
        with wave.open(str(path)) as file:
            bits, channels, count = 8 * file.getsampwidth(), file.getnchannels(), file.getnframes()
            if (bits, channels) != (16, 1):
                raise wave.Error(f"{bits} bits and {channels} channels")
            if not count:
                raise wave.Error("no samples")
            content = file.readframes(count)
            if len(content) < 2 * count:
                raise wave.Error(f"it ends after {len(content) // 2:,} of {count:,} samples")
            return torch.from_numpy(np.frombuffer(content, "<i2").astype(np.float64) / 2**15), file.getframerate()
    except EOFError:
        why = "it ends within its header"
    except (wave.Error, OSError) as error:
        why = str(error)
    raise Unsupported(f"{path}, which cannot be read ({why})", supported="WAV of 16 bits and one channel")


def _said() -> list[tuple[int, str, Tensor, int]]:
    """Digits synthesised by espeak-ng: digit, voice, samples, samples per second."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise Unsupported(
            "speech without the package espeakng-loader, which says the digits",
            supported="data=FOLDER of recordings",
            nearest=INSTALL,
        )
    import espeakng_loader

    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    heard: list[np.ndarray] = []

    def hear(samples: ctypes._Pointer[ctypes.c_short], count: int, _: object) -> int:
        if samples and count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    listener = CALLBACK(hear)
    rate = library.espeak_Initialize(RETRIEVAL, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise Unsupported("espeak-ng, which does not start", supported="data=FOLDER of recordings", nearest=INSTALL)
    library.espeak_SetSynthCallback(listener)
    found = []
    for voice in VOICES:
        library.espeak_SetVoiceByName(voice.encode())
        for digit, word in enumerate(WORDS):
            heard.clear()
            text = word.encode()
            library.espeak_Synth(text, len(text) + 1, 0, 0, 0, UTF8, None, None)
            library.espeak_Synchronize()
            found.append((digit, voice, torch.from_numpy(np.concatenate(heard).astype(np.float64) / 2**15), rate))
    library.espeak_Terminate()
    return found
