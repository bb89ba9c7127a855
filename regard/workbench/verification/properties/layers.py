"""The properties of the equality matrix for a mechanism's layer, including projections, caches and padding."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from regard.contract import Context, Kind, Mask, Pattern
from regard.create import build_layer
from regard.integrations.export import export, export_onnx
from regard.workbench.verification.properties.base import (
    Broken,
    NotApplicable,
    Property,
    exactly,
    relative_error,
    worst,
)
from regard.workbench.verification.properties.forms import in_threads
from regard.workbench.verification.properties.visibility import padded_layouts
from regard.workbench.verification.subjects import Subject

DIM, HEADS, MEMORY_DIM = 16, 2, 12


class LayerSubject:
    """A layer with the subject's mechanism and random weights (none left at zero), and sequences for it."""

    def __init__(self, subject: Subject, dtype: torch.dtype) -> None:
        self.subject, self.dtype = subject, dtype
        self.cross = subject.pattern.cross
        options = {"memory_dim": MEMORY_DIM} if self.cross and subject.card.kind is Kind.ATTENTION else {}
        if subject.on_grid and "axes" in inspect.signature(subject.card.module or object).parameters:
            options["axes"] = 2
        heads = {"num_heads": HEADS, **subject.options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            layer = build_layer(subject.card, DIM, pattern=subject.pattern, **options, **heads)
            self.layer = layer.to(dtype)
            for parameter in self.layer.parameters():
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.layer.eval()
        self.memory_dim = MEMORY_DIM if options else DIM

    def x(self, n: int, batch: int = 2, seed: int = 0) -> Tensor:
        """Tokens (batch, n, DIM), the same for the same seed and sizes."""
        generator = torch.Generator().manual_seed(100 + seed)
        return torch.randn(batch, n, DIM, generator=generator, dtype=torch.float64).to(self.dtype)

    def memory(self, m: int = 9, batch: int = 2) -> Tensor:
        """Memory tokens (batch, m, memory_dim), always the same."""
        generator = torch.Generator().manual_seed(200)
        return torch.randn(batch, m, self.memory_dim, generator=generator, dtype=torch.float64).to(self.dtype)

    def roles(self, n: int, batch: int = 2) -> Tensor | None:
        """Roles (batch, n), if the mechanism has any."""
        card = self.subject.card
        if card.sample_context is None:
            return None
        rng = torch.Generator().manual_seed(300)
        return card.sample_context(rng, batch=batch, n=n, m=n, pattern=self.subject.pattern).get("roles")

    def context(self, n: int, roles: Tensor | None = None, **more: Any) -> Context:
        """A context for `n` tokens, with fixed random draws and training progress past all warm-ups."""
        more = {"generator": torch.Generator().manual_seed(400), **more}
        return Context(grid=self.subject.grid(n), roles=roles, progress=1000.0, **more)

    def __call__(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        state: Any = None,
        layer: nn.Module | None = None,
        **context: Any,
    ) -> Any:
        module = self.layer if layer is None else layer
        return module(x, memory, context=self.context(x.shape[1], **context), state=state)


def _whole(layer: LayerSubject, n: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    x, roles = layer.x(n), layer.roles(9 if layer.cross else n)
    memory = layer.memory() if layer.cross else None
    return x, memory, roles, layer(x, memory, roles=roles).output


def _pooled(subject: Subject) -> bool:
    return subject.output_axis() is None


def _spread(x: Tensor, valid: Tensor, fill: float = float("nan")) -> Tensor:
    """Place the first tokens of each row at its valid positions, and the fill value elsewhere."""
    spread = x.new_full((*valid.shape, *x.shape[2:]), fill)
    for row, places in enumerate(valid):
        spread[row, places] = x[row, : int(places.sum())]
    return spread


def layer_padding(subject: Subject, dtype: torch.dtype) -> float:
    """Rows padded left, right and inside, with NaN in the padding, equal each row alone."""
    if subject.on_grid:
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    counts, total = (9, 4), 12
    x = layer.x(9)
    memory = layer.memory() if layer.cross else None
    roles = layer.roles(9)
    errors = []
    for valid in padded_layouts(torch.tensor(counts), total).values():
        mask = Mask(valid=valid)
        given = None if roles is None else _spread(roles, valid, 0)
        masks: dict[str, Any] = {"mask": mask} | ({"memory_mask": mask} if memory is not None else {})
        keys = None if memory is None else _spread(memory, valid)
        found = layer(_spread(x, valid), keys, roles=given, **masks).output
        for row, count in enumerate(counts):
            one = slice(row, row + 1)
            alone = None if memory is None else memory[one, :count]
            expected = layer(x[one, :count], alone, roles=None if roles is None else roles[one, :count]).output
            errors.append(relative_error(found[one] if _pooled(subject) else found[one, valid[row]], expected))
    return worst(errors)


def layer_decoding(subject: Subject, dtype: torch.dtype) -> float:
    """A prompt, a few more tokens, then single tokens equal the whole; in cross patterns memory is absorbed once."""
    if not subject.layer_decodes:
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    if layer.cross and not hasattr(layer.layer, "encode_memory"):
        raise NotApplicable
    x, memory, roles, expected = _whole(layer, 11)
    state: Any = None
    outputs = []
    if layer.cross:
        state = layer.layer.encode_memory(memory, context=Context(roles=roles))  # type: ignore[arg-type]
    for start, end in itertools.pairwise((0, 4, 7, 8, 9, 10, 11)):
        some = slice(start, end)
        now = None if roles is None or layer.cross else roles[:, some]
        result = layer(x[:, some], state=state, roles=now, want=frozenset({"state"}))
        outputs.append(result.output)
        state = result.state
    error = relative_error(torch.cat(outputs, 1), expected)
    saved = load(save({k: t.contiguous() for k, t in state.tensors().items()}))
    again = state.with_tensors(saved).select(torch.tensor([1, 1]))
    exactly(again.nbytes == state.nbytes, "a selected state has another size")
    return error


def layer_ragged(subject: Subject, dtype: torch.dtype) -> float:
    """Padded rows of unequal length, then single tokens, equal each row alone."""
    if not subject.layer_decodes:
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    if layer.cross and not hasattr(layer.layer, "encode_memory"):
        raise NotApplicable
    counts, most, more = (11, 2), 11, 4
    lengths, want = torch.tensor(counts), frozenset({"state"})
    layouts = padded_layouts(lengths, most + 2)
    valid = layouts["inside"] if dtype is torch.float64 else layouts["right"]
    mask = Mask(valid=valid) if dtype is torch.float64 else Mask(lengths=lengths)
    read = layer.memory(most) if layer.cross else layer.x(most)
    after, roles = layer.x(more, seed=1), layer.roles(most if layer.cross else most + more)
    begun = None if roles is None else _spread(roles[:, :most], valid, 0)
    if layer.cross:
        state = layer.layer.encode_memory(_spread(read, valid), context=Context(roles=begun, memory_mask=mask))
    else:
        state = layer(_spread(read, valid), roles=begun, mask=mask, want=want).state
    outputs = []
    for t in range(more):
        now = None if roles is None or layer.cross else roles[:, most + t : most + t + 1]
        result = layer(after[:, t : t + 1], state=state, roles=now)
        outputs.append(result.output)
        state = result.state
    found, errors = torch.cat(outputs, 1), []
    for row, count in enumerate(counts):
        one = slice(row, row + 1)
        own = None if roles is None else torch.cat([roles[one, :count], roles[one, most:]], 1)
        if layer.cross:
            expected = layer(after[one], read[one, :count], roles=own).output
        else:
            expected = layer(torch.cat([read[one, :count], after[one]], 1), roles=own).output[:, count:]
        errors.append(relative_error(found[one], expected))
    return worst(errors)


def layer_packing(subject: Subject, dtype: torch.dtype) -> float:
    """Packed documents through the layer equal each document alone."""
    if subject.pattern.cross or subject.on_grid:
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    x, roles = layer.x(13, batch=1), layer.roles(13, batch=1)
    borders = torch.tensor([0, 5, 5, 13])
    found = layer(x, roles=roles, mask=Mask(cu_seqlens=borders, max_length=8)).output
    errors = []
    for d, part in enumerate((slice(0, 5), slice(5, 13))):
        expected = layer(x[:, part], roles=None if roles is None else roles[:, part]).output
        own = found[2 * d : 2 * d + 1] if _pooled(subject) else found[:, part]
        errors.append(relative_error(own, expected))
    return worst(errors)


def layer_causality(subject: Subject, dtype: torch.dtype) -> float:
    """The change in the outputs before a token when that token and all later ones are replaced."""
    if not subject.pattern.causal or _pooled(subject):
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    x, memory, roles, before = _whole(layer, 12)
    altered = x.clone()
    altered[:, 5:] = 10 * layer.x(12, seed=4)[:, 5:]
    return relative_error(layer(altered, memory, roles=roles).output[:, :5], before[:, :5])


def layer_save(subject: Subject, dtype: torch.dtype) -> float:
    """Weights saved as safetensors and loaded strictly into a new layer give the same output; a call changes neither
    weights nor inputs."""
    layer = LayerSubject(subject, dtype)
    x, memory, roles, expected = _whole(layer, 10)
    weights = load(save({k: t.contiguous() for k, t in layer.layer.state_dict().items()}))
    fresh = LayerSubject(dataclasses.replace(subject, seed=subject.seed + 1), dtype)
    exactly(relative_error(fresh(x, memory, roles=roles).output, expected) > 0, "weights do not change the output")
    fresh.layer.load_state_dict(weights)
    error = relative_error(fresh(x, memory, roles=roles).output, expected)
    for name, weight in fresh.layer.state_dict().items():
        exactly(torch.equal(weight, weights[name]), f"a call changes {name} in place")
    exactly(torch.equal(x, layer.x(10)), "a call changes its input in place")
    exactly(memory is None or torch.equal(memory, layer.memory()), "a call changes its memory in place")
    return error


def layer_gradients(subject: Subject, dtype: torch.dtype) -> float:
    """Every parameter, the memory and the input receive finite gradients.

    In a cross pattern whose mechanism has no input along the queries' axis (a learned query), the output does not
    depend on the queries' sequence.
    """
    layer = LayerSubject(subject, dtype)
    layer.layer.train()
    x = layer.x(10).requires_grad_()
    memory = layer.memory().requires_grad_() if layer.cross else None
    result = layer(x, memory, roles=layer.roles(9 if layer.cross else 10))
    loss = result.output.square().sum() + sum(total / count for total, count in result.losses.values())
    loss.backward()
    reads_queries = not layer.cross or any("n" in a for n, a in subject.card.inputs.items() if not n.endswith("?"))
    for name, sequence, read in (("input", x, reads_queries), ("memory", memory, layer.cross and subject.reads_memory)):
        if read:
            gradient = None if sequence is None else sequence.grad
            exactly(gradient is not None and torch.isfinite(gradient).all(), f"the {name}'s gradient is not finite")
    for name, parameter in layer.layer.named_parameters():
        if parameter.grad is None:
            raise Broken(f"parameter {name} receives no gradient")
        exactly(torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite")
    return 0.0


def sequences(layer: LayerSubject, n: int, **more: Any) -> tuple[tuple[Tensor, ...], Context]:
    """A sequence of n tokens and a slightly longer memory, with a context for making a program (no generator)."""
    m = n + 3 if layer.cross else n
    inputs = (layer.x(n), layer.memory(m)) if layer.cross else (layer.x(n),)
    return inputs, layer.context(n, layer.roles(m), generator=None, **more)


def drawing_alike(*calls: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A function that returns the results of all `calls`, each of which draws the same numbers from PyTorch's generator."""

    def call_all(*arguments: Any, **options: Any) -> list[Any]:
        found = []
        with torch.random.fork_rng(devices=[]):
            for call in calls:
                torch.manual_seed(0)
                found.append(call(*arguments, **options))
        return found

    return call_all


def layer_compile(subject: Subject, dtype: torch.dtype, backend: str = "aot_eager") -> float:
    """The difference between the layer compiled without a graph break and the eager one."""
    layer = LayerSubject(subject, dtype)
    inputs, context = sequences(layer, 10)

    def call(inputs: tuple[Tensor, ...], context: Context) -> Tensor:
        return layer.layer(*inputs, context=context).output

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    return relative_error(*drawing_alike(compiled, call)(inputs, context))


def layer_recompile(subject: Subject, dtype: torch.dtype, backend: str = "aot_eager") -> float:
    """Compiled without a graph break, at three lengths, with a padded row; a state then continues as in eager mode."""
    if subject.on_grid:
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    want = frozenset({"state"} if subject.layer_decodes and not layer.cross else ())

    def call(inputs: tuple[Tensor, ...], context: Context) -> tuple[Tensor, Any]:
        result = layer.layer(*inputs, context=context)
        return result.output, result.state if want else None

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    errors = []
    for n in (10, 17, 6):
        inputs, context = sequences(layer, n, mask=Mask(lengths=torch.tensor([n, 4])), want=want)
        (found, after), (expected, wanted) = drawing_alike(compiled, call)(inputs, context)
        errors.append(relative_error(found, expected))
        if want:  # states may differ in their empty slots
            errors.append(relative_error(*(layer.layer.step(inputs[0][:, 0], state)[0] for state in (after, wanted))))
    return worst(errors)


def _one_length(subject: Subject) -> bool:
    """Whether a program serves only the length of its example, according to the card or because it works on a grid."""
    return subject.on_grid or subject.waives("layer_lengths")


def layer_export(subject: Subject, dtype: torch.dtype) -> float:
    """An exported program at its example's length, for mechanisms whose program does not serve every length."""
    if not _one_length(subject):
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    inputs, context = sequences(layer, 10)
    program = export(layer.layer, *inputs, context=context, lengths=False).module()
    found, expected = drawing_alike(program, layer.layer)(*inputs, context=context)
    return relative_error(found.output, expected.output)


def layer_lengths(subject: Subject, dtype: torch.dtype) -> float:
    """One exported program on shorter and longer sequences than its example, past a mechanism's block size."""
    if subject.on_grid:
        raise NotApplicable
    layer = LayerSubject(subject, dtype)
    inputs, context = sequences(layer, 20)
    program = export(layer.layer, *inputs, context=context).module()
    errors = []
    for n in (10, 150):
        inputs, context = sequences(layer, n)
        found, expected = drawing_alike(program, layer.layer)(*inputs, context=context)
        errors.append(relative_error(found.output, expected.output))
    return worst(errors)


def layer_onnx(subject: Subject, dtype: torch.dtype) -> float:
    """The layer in ONNX Runtime at the example's length; in causal-self, or else in the first of its patterns."""
    patterns = subject.card.patterns
    first = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in patterns else patterns[0]
    if subject.pattern is not first or importlib.util.find_spec("onnxruntime") is None:
        raise NotApplicable
    import onnxruntime

    layer = LayerSubject(subject, dtype)
    inputs, context = sequences(layer, 20)
    expected = layer.layer(*inputs, context=context).output
    if not torch.equal(layer.layer(*inputs, context=context).output, expected):  # it draws, as ONNX Runtime does not
        raise NotApplicable
    program = export_onnx(layer.layer, *inputs, context=context, lengths=False, optimize=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    tensors = (x for x in (*inputs, context.roles) if x is not None)
    given = {x.name: t.numpy() for x, t in zip(session.get_inputs(), tensors, strict=True)}
    return relative_error(torch.from_numpy(session.run(None, given)[0]), expected)


def layer_low_precision(subject: Subject, dtype: torch.dtype) -> float:
    """The layer runs in bfloat16, keeps its dtype and stays finite."""
    layer = LayerSubject(subject, dtype)
    _, _, _, output = _whole(layer, 10)
    exactly(output.dtype == dtype, f"output of {output.dtype} for {dtype}")
    return exactly(torch.isfinite(output).all(), "output is not finite")


def layer_threads(subject: Subject, dtype: torch.dtype) -> float:
    """Concurrent calls of one layer from several threads give the results of sequential calls."""
    layer = LayerSubject(subject, dtype)
    memory = layer.memory() if layer.cross else None

    def work(n: int) -> list[Tensor]:
        x, roles = layer.x(n, seed=n), layer.roles(9 if layer.cross else n)
        return [layer(x, memory, roles=roles).output]

    return in_threads(work, (12, 10, 6, 6))


DOUBLE_SINGLE = (torch.float64, torch.float32)

LAYER_PROPERTIES = [
    Property("layer_padding", "the layer on padded rows equals each row alone", layer_padding, DOUBLE_SINGLE, "layer"),
    Property("layer_decoding", "a prompt, a piece and steps equal the whole", layer_decoding, DOUBLE_SINGLE, "layer"),
    Property("layer_ragged", "padded rows, then steps, equal each row alone", layer_ragged, DOUBLE_SINGLE, "layer"),
    Property("layer_packing", "packed documents equal separate ones", layer_packing, (torch.float64,), "layer"),
    Property("layer_causality", "later tokens have no effect", layer_causality, (torch.float64,), "layer"),
    Property(
        "layer_save",
        "weights round-trip through safetensors, and a call changes neither them nor its input",
        layer_save,
        (torch.float64,),
        "layer",
    ),
    Property(
        "layer_gradient", "every parameter receives a finite gradient", layer_gradients, (torch.float64,), "layer"
    ),
    Property(
        "layer_compile",
        "compiled without a graph break equals eager",
        layer_compile,
        (torch.float64,),
        "layer",
    ),
    Property(
        "layer_recompile", "compiled at three lengths, padded, equals eager", layer_recompile, (torch.float64,), "layer"
    ),
    Property("layer_export", "torch.export gives the same output", layer_export, (torch.float64,), "layer", False),
    Property(
        "layer_lengths", "one exported program serves every length", layer_lengths, (torch.float64,), "layer", False
    ),
    Property("layer_onnx", "ONNX Runtime gives the same output", layer_onnx, (torch.float32,), "layer", False),
    Property(
        "layer_threads",
        "calls from several threads do not disturb each other",
        layer_threads,
        (torch.float64,),
        "layer",
    ),
    Property("layer_dtype", "bfloat16 runs and stays finite", layer_low_precision, (torch.bfloat16,), "layer"),
]

__all__ = ["LAYER_PROPERTIES", "LayerSubject"]
