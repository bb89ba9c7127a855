"""The benchmark's published results: the constants of its index, its leaderboards, its efficiency lengths.

Source: its repository (Shark-NLP/CAB at 0e49696: scripts/compositional_index, README). Its data are not those of this
study's presets, so compare only differences between models, and their signs.
"""

from __future__ import annotations

from pathlib import Path

from regard.contract import Pattern, Unsupported
from regard.studies.cab.index import Metric, Scores, ScoresOf, Standard, indices

NS, CS, NC, CC = Pattern

_CONSTANTS: dict[Pattern, dict[str, tuple[str, str, float, float]]] = {
    NS: {
        "FastSpeech 2 MCD": ("TTS", "down", 3.4245, 0.06832),
        "FastSpeech 2 MSD": ("TTS", "down", 1.97429, 0.0361768),
        "Transformer-TTS MCD": ("TTS", "down", 4.06947, 0.09422),
        "Transformer-TTS MSD": ("TTS", "down", 2.19021, 0.03866),
        "R-1": ("Sum", "up", 34.88667, 1.39697),
        "R-2": ("Sum", "up", 6.79333, 1.41078),
        "R-L": ("Sum", "up", 31.96889, 1.31499),
        "PSNR": ("SR", "up", 23.20800, 0.27499),
        "SSIM": ("SR", "up", 0.67580, 0.01557),
        "MLM PPL": ("MLM", "down", 36.29200, 62.30827),
    },
    CS: {
        "Transformer-TTS MCD": ("TTS", "down", 4.08325, 0.04529),
        "Transformer-TTS MSD": ("TTS", "down", 2.20085, 0.01372),
        "R-1": ("Sum", "up", 32.95750, 1.92754),
        "R-2": ("Sum", "up", 6.09250, 0.41007),
        "R-L": ("Sum", "up", 30.25750, 1.61951),
        "LM PPL": ("LM", "down", 22.26000, 8.29944),
    },
    NC: {
        "CD-l1": ("PCC", "down", 7.70250, 0.64789),
        "CD-l2": ("PCC", "down", 0.24775, 0.03366),
        "F-score": ("PCC", "up", 0.76250, 0.03906),
        "ETT MSE": ("LSTF", "down", 1.18933, 0.05615),
        "ETT MAE": ("LSTF", "down", 0.80625, 0.02193),
        "ECL MSE": ("LSTF", "down", 0.47575, 0.01057),
        "ECL MAE": ("LSTF", "down", 0.51100, 0.00601),
        "Weather MSE": ("LSTF", "down", 0.62025, 0.18948),
        "Weather MAE": ("LSTF", "down", 0.58075, 0.10312),
    },
    CC: {
        "Transformer-TTS MCD": ("TTS", "down", 5.50370, 1.29239),
        "Transformer-TTS MSD": ("TTS", "down", 2.62780, 0.42726),
        "R-1": ("Sum", "up", 31.35000, 3.77103),
        "R-2": ("Sum", "up", 5.26000, 1.26028),
        "R-L": ("Sum", "up", 28.80000, 3.28638),
    },
}

METRICS: dict[Pattern, tuple[Metric, ...]] = {
    pattern: tuple(Metric(name, task, way == "up") for name, (task, way, *_) in told.items())
    for pattern, told in _CONSTANTS.items()
}
STANDARDS: dict[Pattern, dict[str, Standard]] = {
    pattern: {name: Standard(mean, deviation) for name, (*_, mean, deviation) in told.items()}
    for pattern, told in _CONSTANTS.items()
}

LEADERBOARD: dict[Pattern, dict[str, dict[str, float]]] = {
    NS: {
        "local": {"TTS": 0.362, "Sum": 2.617, "SR": 0.421, "MLM": 0.515},
        "cosformer": {"TTS": 0.516, "Sum": -0.190, "SR": 1.042, "MLM": 0.498},
        "long_short": {"TTS": 0.572, "Sum": -0.322, "SR": 0.298, "MLM": 0.528},
        "softmax": {"TTS": -0.301, "Sum": -0.246, "SR": -0.077, "MLM": 0.527},
        "lara": {"TTS": -0.639, "Sum": -0.522, "SR": 0.554, "MLM": 0.479},
        "performer": {"TTS": -0.282, "Sum": -0.088, "SR": 0.439, "MLM": -1.211},
        "nystrom": {"TTS": -2.011, "Sum": -0.321, "SR": 0.088, "MLM": 0.481},
        "probsparse": {"TTS": 0.705, "Sum": -0.246, "SR": -0.697, "MLM": -2.408},
        "abc": {"TTS": 0.043, "Sum": -0.678, "SR": -2.525, "MLM": 0.414},
        "s4d": {"TTS": 1.035, "SR": 0.457, "MLM": 0.176},
    },
    CS: {
        "s4d": {"TTS": 1.030, "Sum": 1.143, "LM": 0.780},
        "long_short": {"TTS": 0.701, "Sum": 0.340, "LM": 0.812},
        "local": {"TTS": -1.361, "Sum": 0.337, "LM": 0.305},
        "abc": {"TTS": 0.707, "Sum": -1.461, "LM": -1.117},
        "softmax": {"TTS": -0.047, "Sum": 0.784},
    },
    NC: {
        "softmax": {"PCC": 0.449, "LSTF": 0.744},
        "abc": {"PCC": 0.573, "LSTF": -0.164},
        "performer": {"PCC": 0.473, "LSTF": -0.445},
        "cosformer": {"PCC": -1.496, "LSTF": -0.135},
    },
    CC: {
        "softmax": {"TTS": 1.047, "Sum": 0.867},
        "abc": {"TTS": -0.112, "Sum": 0.228},
        "performer": {"TTS": -0.935, "Sum": -1.094},
    },
}
"""Published index by pattern, mechanism and task."""

EFFICIENCY: dict[str, tuple[int, int]] = {
    "performer": (2361, 37),
    "lara": (2541, 68),
    "abc": (1877, 70),
    "nystrom": (3045, 94),
    "cosformer": (2539, 164),
    "probsparse": (3450, 281),
    "long_short": (5652, 342),
    "s4d": (6011, 949),
    "local": (4195, 1169),
}
"""Efficiency lengths of time and of memory, on the authors' GPU."""


def read_scores(path: str | Path) -> dict[Pattern, Scores]:
    """Read one model's scores in the benchmark's format: a line for each pattern, numbers in the order of its metrics.

    Raises:
        Unsupported: for a file that cannot be read or has another format.
    """
    try:
        lines = [line.split() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
        rows = [[float(word) for word in line] for line in lines]
    except (OSError, ValueError) as error:
        raise Unsupported(
            f"scores in {str(path)!r} ({error})", supported="four lines of numbers; data for a task as LM=novel.txt"
        ) from error
    wanted = [len(METRICS[pattern]) for pattern in Pattern]
    if [len(row) for row in rows] != wanted:
        raise Unsupported(
            f"scores in {str(path)!r} with {', '.join(str(len(row)) for row in rows) or 'no'} numbers a line",
            supported="a line for each pattern, "
            + "; ".join(
                f"{pattern.value}: " + ", ".join(f"{one.task} {one.name}" for one in METRICS[pattern])
                for pattern in Pattern
            ),
        )
    return {
        pattern: {one.name: value for one, value in zip(METRICS[pattern], row, strict=True)}
        for pattern, row in zip(Pattern, rows, strict=True)
    }


def published_index(scores: dict[Pattern, Scores]) -> ScoresOf:
    """The index of each task and the average, in each pattern, by the published constants."""
    return {
        pattern.value: indices({"it": scores[pattern]}, METRICS[pattern], STANDARDS[pattern])["it"]
        for pattern in scores
    }
