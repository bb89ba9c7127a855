"""Models that take a retrofit: causal language models of transformers, looked at before anything is trained."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.integrations.swap import reader_of, swap
from regard.models.blocks import evaluation_mode
from regard.models.weights import weights_digest
from regard.retrofit.inserting import inserts_tokens, rebuilt

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SAME = 1e-3
"""Largest difference of logits, as a share of the largest, between a model and its copy with regard's softmax."""
AHEAD = 1e-5
"""Change of logits, likewise, above which a token has read one after it; a causal model's is rounding, if any."""


@dataclass(frozen=True)
class Layer:
    """An attention module of a model: its number among them, and its path."""

    number: int
    path: str


@dataclass(frozen=True)
class Host:
    """A causal language model, in evaluation mode and without gradients, and what is known of it.

    Attributes:
        model: of transformers.
        tokenizer: of transformers; None where there is none.
        name: as a report names it.
        layers: its attention modules, in order.
    """

    model: Any
    tokenizer: Any
    name: str
    layers: tuple[Layer, ...]

    @property
    def longest(self) -> int | None:
        """Tokens that its positions reach; None where nothing says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model and its tokenizer as transformers does: a GGUF file becomes a folder of safetensors."""
        self.model.save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def attention(self, number: int) -> nn.Module:
        """The attention module of a layer."""
        return self.model.get_submodule(self.layers[number].path)

    def body(self, ids: Int[Tensor, "b n"]) -> None:
        """Run all layers, without the logits."""
        self.model.base_model(ids, use_cache=False)

    def copy_with(self, numbers: Sequence[int], mechanism: str, seed: int) -> tuple[Any, list[str]]:
        """A copy with another mechanism in some layers, and the names of its new parameters; the seed is of their values."""
        if inserts_tokens(mechanism):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made, new = rebuilt(self, numbers, mechanism)
            return made.eval(), new
        made = copy.deepcopy(self.model).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            report = swap(made, {self.layers[number].path: mechanism for number in numbers})
        return made.eval(), report.learned

    @contextmanager
    def with_attention(self, modules: Mapping[int, nn.Module]) -> Iterator[None]:
        """Within the context its layers have the attention modules of another model."""
        own = {number: self.attention(number) for number in modules}
        try:
            for number, module in modules.items():
                self.model.set_submodule(self.layers[number].path, module)
            yield
        finally:
            for number, module in own.items():
                self.model.set_submodule(self.layers[number].path, module)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of its settings and weights."""
        config = {k: v for k, v in self.model.config.to_dict().items() if not k.startswith(("_", "transformers"))}
        described = json.dumps(config, sort_keys=True, default=str) + weights_digest(self.model)
        return hashlib.sha256(described.encode()).hexdigest()[:12]


def open_host(model: Any, tokenizer: Any = None) -> Host:
    """The host of a model or of a folder (or GGUF file) that holds one, after a look at what would go wrong.

    Args:
        model: a causal language model of transformers, which is copied; a folder of its `save_pretrained`; or a GGUF file.
        tokenizer: of transformers; the folder's when None.

    Raises:
        Unsupported: for what is no such model, for quantized or shared weights, adapters, and models swapped before.
    """
    if isinstance(model, (str, os.PathLike)):
        name = Path(model).name or str(model)
        opened, tokenizer = _open_folder(Path(model), tokenizer)
    else:
        name, opened = type(model).__name__, model
    _check_kind(opened)
    layers = tuple(
        Layer(number, path)
        for number, path in enumerate(path for path, module in opened.named_modules() if reader_of(module) is not None)
    )
    if not layers:
        raise Unsupported(
            f"a retrofit of a {type(opened).__name__}, which has no attention modules that are known",
            supported="causal language models of transformers that dispatch through its attention interface",
        )
    _check_shared(opened, layers)
    own = copy.deepcopy(opened) if opened is model else opened
    return Host(own.eval().requires_grad_(False), tokenizer, name, layers)


def _open_folder(path: Path, tokenizer: Any) -> tuple[Any, Any]:
    from regard.compression.folders import is_compressed
    from regard.integrations.transformers.folders import find_files, has_tokenizer, load_model, load_tokenizer

    if is_compressed(path):
        raise Unsupported(f"{path}, which is compressed", supported="a model in floating point")
    model = load_model(path)
    if find_files(path)[1]:
        model = _without_quantizer(model)
    if tokenizer is None and has_tokenizer(path):
        tokenizer = load_tokenizer(path)
    return model, tokenizer


def _without_quantizer(model: Any) -> Any:
    """The model of a GGUF file, whose weights are floating-point numbers by now, as one that can be saved."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _check_kind(model: Any) -> None:
    from transformers import PreTrainedModel

    from regard.integrations.transformers import RECORD

    what = f"a retrofit of a {type(model).__name__}"
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise Unsupported(what, supported="causal language models of transformers, or a folder that holds one")
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise Unsupported(f"{what}, which is no causal language model", supported="causal language models")
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        raise Unsupported(f"{what} with quantized weights", supported="weights in floating point")
    if hasattr(model, "peft_config"):
        raise Unsupported(
            f"{what} with adapters", supported="whole weights", nearest="merge_and_unload() of the adapters"
        )
    if getattr(model.config, RECORD, None) is not None:
        raise Unsupported(
            f"{what} whose attention was swapped before", supported="the original", nearest="regard.unswap(model)"
        )


def _check_shared(model: Any, layers: Sequence[Layer]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in layers:
        for name, parameter in model.get_submodule(layer.path).named_parameters():
            if len(names[id(parameter)]) > 1:
                raise Unsupported(
                    f"a retrofit of layers with shared weights ({' = '.join(names[id(parameter)])})",
                    supported="layers with weights of their own",
                )
            if not parameter.is_floating_point():
                raise Unsupported(
                    f"a retrofit of {layer.path}.{name} in {parameter.dtype}", supported="weights in floating point"
                )


@torch.no_grad()
def check_attention(host: Host, ids: Int[Tensor, "b n"], mechanism: str) -> None:
    """Raise Unsupported where the model's attention is not what the new one would learn to stand for.

    Args:
        ids: a block of text, as long as those of the training.
    """
    with evaluation_mode(host.model):
        expected = host.model(ids, use_cache=False).logits
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % host.model.get_input_embeddings().num_embeddings
        ahead = (host.model(other, use_cache=False).logits - expected)[:, :-1]
        if float(ahead.abs().max() / expected.abs().max()) > AHEAD:
            raise Unsupported(
                f"a retrofit of a {type(host.model).__name__} whose tokens read those after them",
                supported="causal language models",
                nearest="regard.swap and regard.training.distillation_loss, for encoders",
            )
        made, _ = host.copy_with(range(len(host.layers)), "softmax", 0)
        found = made(ids, use_cache=False).logits
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= SAME:
            raise Unsupported(
                f"a {type(host.model).__name__} whose attention is not softmax of its queries and keys (with it the logits "
                f"differ by {difference:.2g} of the largest)",
                supported="models that regard.swap(model, 'softmax') leaves as they are",
            )
        if inserts_tokens(mechanism):
            made, _ = rebuilt(host, (), mechanism)
            difference = float((made(ids, use_cache=False).logits - expected).abs().max() / expected.abs().max())
            if not difference <= SAME:
                raise Unsupported(
                    f"a {type(host.model).__name__} as a language model of regard, whose logits differ by {difference:.2g} of the largest",
                    supported="models of the kind of Llama",
                )
        made, _ = host.copy_with(range(len(host.layers)), mechanism, 0)
        made(ids, use_cache=False)  # refuses masks that the mechanism cannot honour


def log_likelihoods(logits: Float[Tensor, "b n v"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n-1"]:
    """Log likelihood of each token but the first, given those before it, in nats."""
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
