"""Compressed models in folders: safetensors and JSON, no pickle.

    model.safetensors     the weights, codes as they are, with a copy of the record; compressed.safetensors for models
                          that only regard can read, so that other libraries refuse to load them
    config.json           the model's config, as its library writes it; for a transformers model with codes also what
                          from_pretrained needs, if :mod:`regard.integrations.transformers` was imported
    compression.json      the record: the kind of model, which layers are quantized and how, the sizes of pruned layers
                          that the config cannot express, how tokens are dropped, and the report (None where a model
                          was not compressed, but has learned which tokens to drop)
    model.onnx, model.pt2 an exported program of the model, if the recipe exports

A model of regard can also be loaded by :func:`regard.models.from_pretrained`, since its ``config.json`` says what is
quantized and what is left of each layer; models that drop tokens are refused there.
Each file is replaced atomically, the record last, so that an interrupted save is noticed.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from regard.compression.layers import comes_from_transformers
from regard.compression.programs import Program, remove_programs
from regard.compression.pruning.records import restore, structure
from regard.compression.tokens.applied import TRAINED, add_choosers, all_tokens, put_on, tokens_record
from regard.compression.tokens.trained import ChoosingTransformer
from regard.contract import Unsupported, an_instance
from regard.core.files import write_atomically, write_text_atomically
from regard.integrations.conv1d import conv1d_as_linear
from regard.integrations.timm_places import is_of_timm, timm_folders
from regard.layers.quantized import quantized_record, restore_layers
from regard.models import save_pretrained
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.pretrained import CONFIG, TOKENS, read_pretrained
from regard.models.registry import MODELS
from regard.models.vision.tnt import TNT
from regard.models.vision.vit import VisionTransformer
from regard.models.weights import distinct_tensors, load_tensors, read_tensors
from regard.version import VERSION

if TYPE_CHECKING:
    from regard.compression.compress import Compressed

RECORD, WEIGHTS = "compression.json", "model.safetensors"
OWN_WEIGHTS = "compressed.safetensors"
"""Weights that transformers and timm cannot read: under the usual name they would use random weights instead."""
OWN_TIMM = "compressed_by_regard"
"""A made-up architecture name in ``config.json``, which timm refuses for the same reason."""
LIBRARIES = ("regard", "transformers", "timm", "other")
OWN_HOSTS = {VisionTransformer: "vit_t", TNT: "tnt_s"}
"""Models of regard that may choose their patches, and a name under which an ImageModel builds them."""
BESIDE = ("training.json", "tokenizer.json")
"""Files of a `regard train` folder that a compressed model still needs."""


def library_of(model: nn.Module) -> str:
    """The library that a model comes from: ``regard``, ``transformers``, ``timm`` or ``other``."""
    model = _inside(model)
    name = type(model).__name__
    if name in MODELS and type(model) is MODELS[name][0]:
        return "regard"
    if comes_from_transformers(model):
        return "transformers"
    return "timm" if hasattr(model, "pretrained_cfg") and type(model).__module__.startswith("timm.") else "other"


def save_compressed(compressed: Compressed, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Write a compressed model to a folder.

    Args:
        folder: created if missing; existing files of a save are replaced one by one.
        tokenizer: a tokenizer of transformers, written next to the model.

    Raises:
        Unsupported: if the model cannot be written.
    """
    _write(compressed.model, Path(folder), compressed.report.as_dict(), tokenizer, compressed.program)


def save_choosing(model: ChoosingTransformer, folder: str | os.PathLike[str]) -> None:
    """Write a vision transformer that has learned which patches to keep; see :meth:`ChoosingTransformer.save`."""
    whole: nn.Module = model
    name = next((name for kind, name in OWN_HOSTS.items() if isinstance(model.model, kind)), None)
    if name is not None:
        config = model.model.config
        task = {"image_size", "channels", "num_classes"}
        options = {name: value for name, value in asdict(config).items() if name not in task}
        with torch.device("meta"):
            whole = ImageModel(
                ImageModelConfig(name, model.num_classes, config.grid, config.patch, config.channels, options)
            )
        whole.backbone = model
    _write(whole, Path(folder), None)


def _write(
    model: nn.Module, place: Path, report: dict[str, Any] | None, tokenizer: Any = None, program: Program | None = None
) -> None:
    library, inside = library_of(model), _inside(model)
    if library == "transformers":
        from regard.integrations.transformers import check_record

        check_record(inside)
    record = {
        "regard": VERSION,
        "library": library,
        "architecture": _architecture(inside, library),
        "structure": structure(inside),
        "quantized": quantized_record(model),
        "tokens": tokens_record(model),
        "report": report,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    for name in (RECORD, WEIGHTS, OWN_WEIGHTS):
        (place / name).unlink(missing_ok=True)
    remove_programs(place)
    with all_tokens(model):
        if library == "regard":
            save_pretrained(model, place, tokens=record["tokens"])
        else:
            tensors = {name: tensor.contiguous() for name, tensor in distinct_tensors(model).items()}
            metadata = {"format": "pt", "quantized": json.dumps(record["quantized"])}
            plain = loads_elsewhere(record)
            write_atomically(
                place / (WEIGHTS if plain else OWN_WEIGHTS), lambda path: save_file(tensors, path, metadata=metadata)
            )
            if library == "transformers":
                codes = {} if record["structure"] else record["quantized"]
                _write_transformers(model, tokenizer, place, codes)
            elif "options" in record["architecture"]:
                timm_folders().write_config(inside, place, None if plain else OWN_TIMM)
    if program is not None:
        program.save(place)
    write_text_atomically(place / RECORD, text)


def loads_elsewhere(record: Mapping[str, Any]) -> bool:
    """Return whether the model's own library can load it from its folder, by the record of :func:`read_record`."""
    own = record["quantized"] or record.get("structure") or _chooses(record.get("tokens"))
    return record["library"] != "other" and not own


def _chooses(tokens: Mapping[str, Any] | None) -> bool:
    """Return whether a record of tokens is of a method with small networks of its own."""
    return tokens is not None and tokens.get("method") in TRAINED


def _inside(model: nn.Module) -> nn.Module:
    """The model of a library inside one that chooses its patches; other models as they are."""
    return model.model if isinstance(model, ChoosingTransformer) else model


def load_compressed(folder: str | os.PathLike[str], *, into: nn.Module | None = None) -> nn.Module:
    """Load the model that :func:`save_compressed` wrote, or one with fewer tokens of
    :func:`regard.models.save_pretrained`, in evaluation mode.

    Args:
        into: a floating-point model of the same architecture, which becomes the compressed one; built from the folder
            when None, which works for models of regard, transformers and timm.

    Raises:
        Unsupported: for an incomplete folder, or files of different saves.
    """
    place = Path(folder)
    if into is None and not is_compressed(place) and _is_of_choosing(place):
        return load_own(place)
    record = read_record(place)
    if record["library"] == "regard" and into is None:
        return load_own(place)
    weights = place / OWN_WEIGHTS
    if not weights.is_file():  # earlier versions used one name for all
        weights = place / WEIGHTS
    tensors, metadata = read_tensors(weights)
    if "quantized" in metadata and json.loads(metadata["quantized"]) != record["quantized"]:
        raise Unsupported(f"{RECORD} and {weights.name} of different saves in {folder}", supported="files of one save")
    model = _build(place, record) if into is None else into
    with conv1d_as_linear(model):
        if record.get("structure"):
            restore(model, record["structure"], source=str(place / RECORD))
        model = add_choosers(model, record.get("tokens"), source=str(place / RECORD))
        restore_layers(model, record["quantized"], source=str(place / RECORD))
    load_tensors(model, tensors, source=str(weights))
    if record["library"] == "transformers":
        from regard.integrations.transformers.fused import fuse_layers

        fuse_layers(model)
    return _with_tokens(model.eval(), record.get("tokens"), place / RECORD)


def _is_of_choosing(place: Path) -> bool:
    """Return whether a folder of :func:`regard.models.save_pretrained` has a model with small networks of its own."""
    try:
        return _chooses(json.loads((place / CONFIG).read_text(encoding="utf-8")).get(TOKENS))
    except (OSError, ValueError, AttributeError):
        return False


def load_own(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model of regard, compressed or not, in evaluation mode; see :func:`regard.models.from_pretrained`."""
    source = Path(folder) / CONFIG

    def prepare(model: nn.Module, tokens: Mapping[str, Any] | None) -> None:
        add_choosers(model, tokens, source=str(source))

    return _with_tokens(*read_pretrained(folder, prepare, device=device), source)


def _with_tokens(model: nn.Module, record: dict[str, Any] | None, source: Path) -> nn.Module:
    if record is not None and not _chooses(record):
        put_on(model, record, source=str(source))
    return model


def load_causal_model(
    place: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, supported: str | None = None
) -> Any:
    """Load a causal language model of transformers from a folder, compressed or not, or from a GGUF file; in evaluation
    mode. Models whose layers :func:`regard.integrations.transformers.fuse_layers` knows are fused, and on a CPU attend to
    prompts by ``regard:softmax``.

    Args:
        device, dtype: device and dtype of the weights.
        supported: what to suggest in the error for other places.

    Raises:
        Unsupported: for other places, for files that lack some of the weights, and for a compressed model on a device
            other than the CPU or in a dtype other than float32.
    """
    from regard.integrations.transformers.folders import SUPPORTED, load_model, quietly

    if not is_compressed(place):
        found = load_model(place, dtype=dtype, supported=supported or SUPPORTED).to(device)
        _use_kernels(found)
        return found
    check_place(device, dtype)
    with quietly():
        model: Any = load_compressed(place)
    if library_of(model) != "transformers" or not model.can_generate():
        raise Unsupported(f"text from {an_instance(model)}, as {place} holds", supported=supported or SUPPORTED)
    _use_kernels(model)
    return model


def _use_kernels(model: Any) -> None:
    """Fuse a transformers model, and let it attend by regard's softmax where it would by torch's on a CPU."""
    from regard.integrations.transformers.attending import PREFIX
    from regard.integrations.transformers.fused import fuse_layers
    from regard.integrations.transformers.fused.decoders import SOFTMAX
    from regard.integrations.transformers.fused.snapshot import is_known

    fuse_layers(model)
    by_softmax = model.config._attn_implementation in SOFTMAX and model.device.type == "cpu"
    if by_softmax and any(map(is_known, model.modules())):
        model.set_attn_implementation(f"{PREFIX}softmax")


def check_place(device: str, dtype: torch.dtype) -> None:
    """Raise Unsupported for a compressed model on a device other than the CPU or in a dtype other than float32."""
    if device != "cpu":
        raise Unsupported(f"a compressed model on {device}", supported="the processor", nearest="--device cpu")
    if dtype != torch.float32:
        raise Unsupported(f"a compressed model in {str(dtype)[6:]}", supported="float32", nearest="float32")


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``compression.json`` of a folder; raises Unsupported if there is none."""
    place = Path(folder)
    if not (place / RECORD).is_file():
        half = any((place / name).is_file() for name in (WEIGHTS, OWN_WEIGHTS))
        raise Unsupported(
            f"{folder} without {RECORD}" + (", perhaps of a save that was stopped" if half else ""),
            supported="a folder written by `regard compress` or Compressed.save",
        )
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if not {"library", "architecture", "quantized", "report"} <= set(record):
            raise ValueError("parts are missing")
    except (ValueError, TypeError) as error:
        raise Unsupported(
            f"{place / RECORD}, which cannot be read ({error})", supported="a file of `regard compress`"
        ) from None
    return record


def is_compressed(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has a compressed model."""
    return (Path(folder) / RECORD).is_file()


def check_no_tokens(place: Path, asked: str) -> None:
    """Raise Unsupported if a folder's recipe has a step ``tokens``, beside which `asked` cannot be done."""
    record = read_record(place) if is_compressed(place) else {}
    if record.get("tokens") is None:
        return
    recipe = record["report"]["recipe"]
    rest = " + ".join(step for step in recipe.split(" + ") if step.partition(":")[0] != "tokens")
    raise Unsupported(
        f"{asked} of {place}, whose recipe ({recipe}) has a step tokens already",
        supported="folders of recipes without this step, and models that are not compressed",
        nearest=f'regard compress ORIGINAL --recipe "{rest}" --output FOLDER' if rest else "the original model",
    )


def is_of_transformers(place: Path) -> bool:
    """Return whether a folder or file has a transformers model, compressed or not; False for folders of `regard train`.

    Raises:
        Unsupported: for a ``config.json`` or ``compression.json`` that cannot be read.
    """
    if is_compressed(place):
        return bool(read_record(place)["library"] == "transformers")
    if (place / BESIDE[0]).is_file():
        return False
    if place.suffix == ".gguf" or any(place.glob("*.gguf")):
        return True
    config = place / "config.json"
    if not config.is_file():
        return False
    try:
        return "model_type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise Unsupported(f"{config}, which cannot be read ({error})", supported="a file of save_pretrained") from None


def library_of_place(place: Path) -> str:
    """The library of the model in a folder or file, compressed or not; ``regard`` if not known to be of another."""
    if is_compressed(place):
        return str(read_record(place)["library"])
    if is_of_timm(place):
        return "timm"
    return "transformers" if is_of_transformers(place) else "regard"


def copy_training(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copy the other files that `regard evaluate`, `generate` and `predict` read to the compressed model's folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in BESIDE:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(folder) / name)


def _architecture(model: Any, library: str) -> Any:
    if library != "timm":
        return {"name": type(model).__name__}
    try:
        found = timm_folders().arguments(model)
    except Unsupported:  # such a model is loaded into one that the user has built
        return {"name": model.pretrained_cfg.get("architecture"), "num_classes": getattr(model, "num_classes", None)}
    return {"name": found.pop("architecture"), **found}


def _write_transformers(model: Any, tokenizer: Any, place: Path, codes: Mapping[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if codes:
        from regard.integrations.transformers.quantized import METHOD

        config.dtype = torch.float32  # for the layers without codes; the codes have scales of another dtype
        config.quantization_config = {"quant_method": METHOD, "weights": OWN_WEIGHTS, "layers": codes}
    config.save_pretrained(place)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)


def _build(place: Path, record: dict[str, Any]) -> nn.Module:
    library, architecture = record["library"], record["architecture"]
    nearest = "load_compressed(folder, into=model)"
    name = str(architecture.get("name"))
    if library == "transformers" and re.fullmatch(r"[A-Za-z]\w*", name):
        import transformers
        from transformers.initialization import no_init_weights

        from regard.integrations.transformers import RegardForCausalLM  # the import also restores swapped models

        made = RegardForCausalLM if name == RegardForCausalLM.__name__ else getattr(transformers, name, None)
        if isinstance(made, type) and issubclass(made, transformers.PreTrainedModel):
            config = transformers.AutoConfig.from_pretrained(place)
            vars(config).pop("quantization_config", None)  # read by transformers where it loads the codes itself
            with torch.random.fork_rng(devices=[]), no_init_weights():
                built: Any = made(config).float()
            built.tie_weights()  # skipped by the constructor without weight initialisation
            return built
    if library == "timm":
        folders = timm_folders()
        if folders.timm.is_model(name):
            options = architecture.get("options") or {"num_classes": architecture.get("num_classes")}
            made = folders.built(name, options, architecture.get("swapped") or {})
            folders.read_config(made, place)
            return made
    raise Unsupported(
        f"building a {name} of {library}", supported="models of regard, transformers and timm", nearest=nearest
    )
