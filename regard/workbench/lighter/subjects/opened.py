"""Encoders and classifiers of transformers, and vision transformers of timm, opened with a user's data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression.folders import is_compressed, load_compressed
from regard.contract import Unsupported, at_least
from regard.integrations.encoders import auto_class, frame_of, framed, masked, positions_of
from regard.integrations.timm_places import load_timm, name_of
from regard.retrofit.corpus import even_blocks
from regard.retrofit.pictures import View, read_pictures
from regard.tasks.documents import Paths, names_of
from regard.workbench.lighter.subjects.answering import Answering
from regard.workbench.lighter.subjects.base import HELD_OUT, LENGTH, MODELS, SPREAD
from regard.workbench.lighter.subjects.items import Images, Texts, Windows, classes_of, read_labelled
from regard.workbench.lighter.subjects.language import halves, read_ids
from regard.workbench.lighter.subjects.scores import ACCURACY, AGREEMENT, KEPT, MASKED, Score


def open_encoder(
    path: Path, kind: str, data: Paths | None, length: int | None, *, held_out: float = HELD_OUT
) -> Answering:
    """Open an encoder of transformers, compressed or not.

    Args:
        kind: a key of :data:`regard.integrations.encoders.CLASSES`.
        data: text; for a classifier, also texts with classes. Empty for none.
        length: tokens in a window, including special tokens; when None, :data:`LENGTH` or as many as its positions
            allow.
        held_out: share of the data that is scored. With 1, a text may be shorter than a window, and at most
            :data:`SPREAD` windows of a longer one are used.

    Raises:
        Unsupported: for missing data, data that are too short or have unknown classes, and a model without a tokenizer.
    """
    from regard.integrations.transformers.folders import has_tokenizer, load_model, load_tokenizer

    opened = _opened(path, partial(load_model, path, of=auto_class(kind), supported=MODELS))
    if data is None:
        raise Unsupported(f"{path} without data", supported=_wanted(kind))
    tokenizer = load_tokenizer(path, supported=MODELS) if data != () or has_tokenizer(path) else None
    if kind == "classes" and tokenizer is not None:
        opened = partial(_knowing_padding, opened, tokenizer)
    model = opened()
    score = _score(model, kind)
    length = _length(model, tokenizer, length)
    if data == ():
        return Answering(path.name, opened, score, None, None, tokenizer)
    labelled = read_labelled(data) if kind == "classes" else None
    if labelled is None:
        before, scored = _windows(data, tokenizer, length, held_out, hide=kind == "masked")
        described = f"{path.name} on {names_of(data)}, windows of {scored.ids.shape[1]} tokens"
        return Answering(described, opened, score, before, scored, tokenizer)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise Unsupported(
            f"texts with classes for {path}, whose tokenizer has no padding token",
            supported="a tokenizer with pad_token",
            nearest="tokenizer.pad_token = tokenizer.eos_token, then save_pretrained",
        )
    known = score is AGREEMENT
    score = ACCURACY if known else score
    numbers = classes_of(labelled, model.config) if known else None
    first, last = _shuffled(labelled, numbers, tokenizer, length, names_of(data), held_out)
    described = f"{path.name} on {len(labelled):,} texts of {names_of(data)}, {length} tokens at the most"
    return Answering(described, opened, score, first, last, tokenizer)


def open_vision(path: Path, data: Paths | None, length: int | None, *, held_out: float = HELD_OUT) -> Answering:
    """Open a vision transformer, or another timm model, compressed or not.

    Args:
        path: a folder, or ``timm:NAME``.
        data: a folder of images, optionally with a subfolder for each class. Empty for none.
        held_out: share of the data that is scored.

    Raises:
        Unsupported: if there are no images, or a length is given.
    """
    if length is not None:
        raise Unsupported(f"length={length} of a model of images", supported="no length")
    if data is None:
        raise Unsupported(
            f"{path} without images", supported="--data photos/, a folder of them, to calibrate with and to score on"
        )
    opened = _opened(path, partial(load_timm, str(path), supported=MODELS))
    model: Any = opened()
    score = AGREEMENT if model.num_classes > 1 else KEPT
    if data == ():
        return Answering(name_of(path), opened, score, None, None)
    view = View.of(model)
    pictures = read_pictures(data, None, view, batch=0 if held_out == 1 else 1, seed=0, held_out=held_out)
    if pictures.labelled and score is AGREEMENT:
        score = ACCURACY
    parts = [Images(some, view, score is ACCURACY) for some in (pictures.training, pictures.held_out)]
    described = f"{name_of(path)} on {sum(map(len, parts)):,} images of {pictures.name}"
    return Answering(described, opened, score, *parts)


def _opened(path: Path, plain: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A function that loads the model: `plain` if it is not compressed."""
    return partial(load_compressed, path) if is_compressed(path) else plain


def _knowing_padding(opened: Callable[[], nn.Module], tokenizer: Any) -> nn.Module:
    """The model, told its tokenizer's padding: causal classifiers answer at the last token before it."""
    model: Any = opened()
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return model


def _wanted(kind: str) -> str:
    texts = "my_corpus.txt, to calibrate with and to score on"
    return f"--data reviews.csv (columns text and label) or {texts}" if kind == "classes" else f"--data {texts}"


def _score(model: Any, kind: str) -> Score:
    """The score to use if right answers are not known."""
    if kind == "classes":
        config = model.config
        one = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
        return AGREEMENT if one else KEPT
    return MASKED if kind == "masked" else KEPT


def _length(model: Any, tokenizer: Any, length: int | None) -> int:
    longest = positions_of(model)
    found = min(LENGTH, longest or LENGTH) if length is None else length
    at_least("length", found, 4 if tokenizer is not None and frame_of(tokenizer) else 2)
    if longest is not None and found > longest:
        raise Unsupported(
            f"length={found} of a model of {longest} positions",
            supported=f"{longest} or less",
            nearest=f"--length {longest}",
        )
    return found


def _windows(data: Paths, tokenizer: Any, length: int, held_out: float, *, hide: bool) -> list[Windows]:
    """The text before and after the border, in windows with special tokens."""
    if hide and getattr(tokenizer, "mask_token_id", None) is None:
        raise Unsupported("an encoder whose tokenizer has no mask token", supported="a folder with its own tokenizer")
    content = length - (0 if frame_of(tokenizer) is None else 2)
    if held_out == 1:
        ids = read_ids(data, tokenizer)
        content, most = min(content, len(ids)), SPREAD
        parts = [ids[:0], ids]
    else:
        parts, most = list(halves(data, tokenizer, content)), None
    found: list[Windows] = []
    for part in parts:
        ids = framed(even_blocks(part, most or len(part) // content, content), tokenizer)
        found.append(Windows(*masked(ids, tokenizer, torch.Generator().manual_seed(0))) if hide else Windows(ids))
    return found


def _shuffled(
    labelled: Any, numbers: list[int] | None, tokenizer: Any, length: int, name: str, held_out: float
) -> list[Texts]:
    """The texts in shuffled order, split in two parts; only the second is scored."""
    border = int((1 - held_out) * len(labelled))
    if not border and held_out < 1:
        raise Unsupported(f"{name} of {len(labelled)} texts", supported="2 or more, to calibrate with and to score on")
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Texts([labelled[i] for i in some], None if numbers is None else [numbers[i] for i in some], tokenizer, length)
        for some in (order[:border], order[border:])
    ]
