r"""TransKD: a small multi-stage transformer learns its teacher's feature maps and patch embeddings.

Liu et al., arXiv 2202.13393. With F_i the map after stage i = 1..S, E_i the tokens of its patch embedding, and ' for the teacher:

*CSF*, cross selective fusion, from the coarsest map to the finest. ``r_S = BN(W F_S)``; then with ``x = BN(W F_i)`` and
y = ``r_{i+1}`` enlarged (nearest), ``h = relu(BN(W_z mean(x + y)))`` and
``(w_x, w_y) = softmax over both of (W_x h + b_x, W_y h + b_y)``, channel by channel, ``r_i = w_x x + w_y y``. F'_i is
compared with ``O_i = BN(conv3x3(r_i))``.

*PEA*, patch embedding alignment: ``A_i = W_i E_i + b_i``, compared with E'_i.

*GL-Mixer*, on the last stage before W_S: ``w_a MHSA(E) + w_c conv3(E) * sigmoid(conv3'(E))``, and + E with `add`; the
convolutions run along the tokens in row-major order.

*EA*, embedding assistant: ``A_i = u_i (W_i E_i + b_i) + v_i embed_i(F_{i-1})``, where embed_i is a patch embedding like
the teacher's, and F_0 the image.

    loss = task + feature * sum_i context(O_i, F'_i) + sum_i beta_i mean((A_i - E'_i)^2)

| paper | here |
|---|---|
| beta | ``embeddings`` |
| hcl | :func:`regard.compression.distillation.losses.context_loss` |
| omega | ``fusion``: u then v, initially 0.1, 0.2, ... |
| m | ``width`` |

Deviations: w_a and w_c start at 0.5 (the official code leaves them uninitialised). Encoders with another number of
stages use the last betas. Everything here is for training only: the student is not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression.distillation.losses import channel_loss, context_loss, place_loss, positive
from regard.contract import Unsupported, at_least, one_of
from regard.core.grids import tokens_of
from regard.layers.norms import LayerNorm
from regard.models.vision.backbone import map_of
from regard.models.vision.mit import MiT, MiTConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BETAS = (0.1, 0.1, 0.5, 1.0)
VARIANTS = ("base", "gl", "ea")
FUSIONS = ("csf", "projection", "none")
FEATURE_LOSSES = ("context", "channel", "place")
LEAST_SQUEEZED = 32


@dataclass(frozen=True)
class TransKDConfig:
    """Which parts of TransKD are used, and how.

    Attributes:
        variant: ``base`` (CSF and PEA), ``gl`` (with the GL-Mixer) or ``ea`` (with the embedding assistant).
        fusion: ``csf``, ``projection`` (1 x 1, of each map separately, as a baseline) or ``none`` (no maps are
            compared).
        features: how maps are compared: ``context``, ``channel`` or ``place``
            (:mod:`regard.compression.distillation.losses`).
        feature: weight of the loss on maps.
        embeddings: weights of the stages' embeddings, the first stage first; 0 leaves a stage out. None for the
            paper's.
        width: channels of the fused maps.
        temperature: temperature of ``channel`` and ``place``.
        heads: heads of the GL-Mixer; as many as in the student's last stage when None.
        add: whether the GL-Mixer adds the embedding itself.
        single: whether batches of one image, for which batch norm has no statistics, use a squeeze without a norm,
            with weights of its own, as in the official code; otherwise they are refused in training.
    """

    variant: str = "base"
    fusion: str = "csf"
    features: str = "context"
    feature: float = 1.0
    embeddings: tuple[float, ...] | None = None
    width: int = 64
    temperature: float = 1.0
    heads: int | None = None
    add: bool = False
    single: bool = True

    def __post_init__(self) -> None:
        one_of("variant", self.variant, VARIANTS)
        one_of("fusion", self.fusion, FUSIONS)
        one_of("features", self.features, FEATURE_LOSSES)
        at_least("feature", self.feature, 0.0)
        positive("temperature", self.temperature)
        for name in ("add", "single"):
            one_of(name, getattr(self, name), (True, False))
        for name, value in (("width", self.width), ("heads", self.heads)):
            at_least(name, 1 if value is None else value, 1)
            if isinstance(value, float):
                raise Unsupported(f"{name}={value}", supported="a whole number", nearest=f"{name}={round(value)}")
        if self.embeddings is not None:
            given = tuple(self.embeddings) if isinstance(self.embeddings, list | tuple) else ()
            if not given or not all(isinstance(each, int | float) and each >= 0 for each in given):
                raise Unsupported(
                    f"embeddings={self.embeddings!r}",
                    supported="a list of weights, one for each stage",
                    nearest=f"{BETAS}",
                )
            object.__setattr__(self, "embeddings", given)

    def betas(self, stages: int) -> tuple[float, ...]:
        """The weight of each stage's embedding."""
        if self.embeddings is None:
            return (0.0,) * (stages - len(BETAS)) + BETAS[-stages:]
        if len(self.embeddings) != stages:
            raise Unsupported(f"embeddings={self.embeddings} of {stages} stages", supported="a weight for each stage")
        return self.embeddings


@dataclass
class Stages:
    """The intermediate tensors of a mix transformer, the first stage first.

    Attributes:
        inputs: input of each stage (B, C_{i-1}, H, W): the image, and then the map of the previous stage.
        embeddings: embeddings of its patches (B, N_i, C_i), before its blocks.
        maps: its output after the norm (B, C_i, H_i, W_i).
    """

    inputs: list[Float[Tensor, "b c h w"]] = field(default_factory=list)
    embeddings: list[Float[Tensor, "b n c"]] = field(default_factory=list)
    maps: list[Float[Tensor, "b c h w"]] = field(default_factory=list)


def name_of(model: nn.Module) -> str:
    """The name of the backbone in a model, such as "unet_nano", or else of the model's type."""
    return str(getattr(getattr(model, "config", None), "backbone", None) or type(model).__name__)


def encoder_of(model: nn.Module) -> MiT:
    """The mix transformer in a model; raises Unsupported if it has none, or several."""
    found = [module for module in model.modules() if isinstance(module, MiT)]
    if len(found) != 1:
        raise Unsupported(
            f"transkd with {name_of(model)}, which does not have the stages of a mix transformer",
            supported="segformer_nano, segformer_b0 to b2, mit_nano, mit_b0 to b2, with any widths and mechanism",
            nearest="--distil response",
        )
    return found[0]


@contextmanager
def recorded(encoder: MiT) -> Iterator[Stages]:
    """Record the stages of the calls within the context; only the last call is kept."""
    stages = Stages()

    def begin(_: nn.Module, given: tuple[Any, ...]) -> None:
        for found in (stages.inputs, stages.embeddings, stages.maps):
            found.clear()

    def keep(_: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        result, grid = made
        stages.inputs.append(given[0])
        stages.maps.append(map_of(result.output, grid))

    hooks = [encoder.stages[0].register_forward_pre_hook(begin)]
    for stage in encoder.stages:
        hooks.append(stage.embedding_norm.register_forward_hook(lambda _, __, made: stages.embeddings.append(made)))  # type: ignore[union-attr]
        hooks.append(stage.register_forward_hook(keep))
    try:
        yield stages
    finally:
        for hook in hooks:
            hook.remove()


class TransKD(nn.Module):
    """The modules, separate from the student, that make its stages comparable with the teacher's.

    Args:
        student, teacher: configs of their encoders, with the same number of stages and the same strides.
        config: see :class:`TransKDConfig`.
    """

    def __init__(self, student: MiTConfig, teacher: MiTConfig, config: TransKDConfig | None = None) -> None:
        super().__init__()
        if student.strides != teacher.strides:
            raise Unsupported(
                f"a student whose maps have strides {student.strides} with a teacher of {teacher.strides}",
                supported="as many stages of the same strides",
            )
        self.config = TransKDConfig() if config is None else config
        stages = len(student.widths)
        self.betas = self.config.betas(stages)
        pairs = list(zip(student.widths, teacher.widths, strict=True))
        self.fusions: nn.ModuleList | None = None
        if self.config.fusion == "csf":
            width, single = self.config.width, self.config.single
            self.fusions = nn.ModuleList(
                SelectiveFusion(own, width, told, below=number < stages - 1, single=single)
                for number, (own, told) in enumerate(pairs)
            )
        elif self.config.fusion == "projection":
            self.fusions = nn.ModuleList(_normed(own, told, 1) for own, told in pairs)
        self.alignments = nn.ModuleList(nn.Linear(own, told) for own, told in pairs)
        self.mixer = None
        if self.config.variant == "gl":
            self.mixer = GLMixer(student.widths[-1], self.config.heads or student.heads[-1], add=self.config.add)
        self.assistants: nn.ModuleList | None = None
        if self.config.variant == "ea":
            before, strides = (student.channels, *student.widths[:-1]), (student.patch,) + (2,) * (stages - 1)
            self.assistants = nn.ModuleList(
                OverlappingEmbedding(*sizes) for sizes in zip(before, teacher.widths, strides, strict=True)
            )
            self.fusion = nn.Parameter(0.1 * torch.arange(1.0, 2 * stages + 1))

    def forward(self, student: Stages) -> tuple[list[Float[Tensor, "b c h w"]], list[Float[Tensor, "b n c"]]]:
        """Maps and embeddings with the teacher's widths, the first stage first; no maps without a fusion."""
        return self.fuse(student.maps), self.align(student)

    def fuse(self, maps: Sequence[Float[Tensor, "b c h w"]]) -> list[Float[Tensor, "b c h w"]]:
        """O_i of all stages."""
        if self.fusions is None:
            return []
        if self.config.fusion == "projection":
            return [fusion(x) for fusion, x in zip(self.fusions, maps, strict=True)]
        found, below = [], None
        for fusion, x in zip(reversed(self.fusions), reversed(maps), strict=True):
            output, below = fusion(x, below)
            found.append(output)
        return found[::-1]

    def align(self, student: Stages) -> list[Float[Tensor, "b n c"]]:
        """A_i of all stages."""
        embeddings = list(student.embeddings)
        if self.mixer is not None:
            embeddings[-1] = self.mixer(embeddings[-1])
        found = [linear(x) for linear, x in zip(self.alignments, embeddings, strict=True)]
        if self.assistants is None:
            return found
        assisted = [embed(x) for embed, x in zip(self.assistants, student.inputs, strict=True)]
        own, beside = self.fusion.chunk(2)
        return [u * x + v * y for u, x, v, y in zip(own, found, beside, assisted, strict=True)]

    def loss(self, student: Stages, teacher: Stages) -> Float[Tensor, ""]:
        """The loss to add to the task's loss."""
        maps, embeddings = self(student)
        found = embeddings[0].new_zeros(())
        if maps and self.config.feature:
            found = found + self.config.feature * self._compare(maps, teacher.maps)
        for beta, own, told in zip(self.betas, embeddings, teacher.embeddings, strict=True):
            if beta:
                found = found + beta * F.mse_loss(own, told.detach())
        return found

    def _compare(self, maps: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        if self.config.features == "context":
            return context_loss(maps, teachers)
        loss = partial(
            channel_loss if self.config.features == "channel" else place_loss, temperature=self.config.temperature
        )
        return torch.stack([loss(*pair) for pair in zip(maps, teachers, strict=True)]).sum()


class SelectiveFusion(nn.Module):
    """CSF of one stage.

    Args:
        channels: channels of the student's map.
        width: m, channels of the fused map.
        teacher: channels of the teacher's map.
        below: whether there is a coarser stage to fuse with.
        single: as in :class:`TransKDConfig`.
    """

    def __init__(self, channels: int, width: int, teacher: int, *, below: bool, single: bool = True) -> None:
        super().__init__()
        self.reduce, self.widen = _normed(channels, width, 1), _normed(width, teacher, 3)
        self.squeeze = self.squeeze_single = self.branches = None
        if below:
            squeezed = max(width // 16, LEAST_SQUEEZED)
            self.squeeze = nn.Sequential(nn.Linear(width, squeezed, bias=False), nn.BatchNorm1d(squeezed), nn.ReLU())
            if single:
                self.squeeze_single = nn.Sequential(nn.Linear(width, squeezed, bias=False), nn.ReLU())
            self.branches = nn.ModuleList(nn.Linear(squeezed, width) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "b c h w"], below: Float[Tensor, "b m h2 w2"] | None = None
    ) -> tuple[Float[Tensor, "b t h w"], Float[Tensor, "b m h w"]]:
        """The map to compare with the teacher's, and the fused map for the next stage."""
        x = self.reduce(x)
        if below is not None:
            y = F.interpolate(below, x.shape[2:], mode="nearest")
            w = self.weights(x, y)
            x = w[0] * x + w[1] * y
        return self.widen(x), x

    def weights(self, x: Float[Tensor, "b m h w"], y: Float[Tensor, "b m h w"]) -> Float[Tensor, "2 b m 1 1"]:
        """Weights of x and of y in each channel, which sum to 1."""
        assert self.squeeze is not None and self.branches is not None
        squeeze = self.squeeze
        if len(x) == 1:
            if self.squeeze_single is not None:
                squeeze = self.squeeze_single
            elif self.training:
                raise Unsupported(
                    "a batch of one image with single=False, whose norm has nothing to norm by",
                    supported="two images or more, or single=True",
                    nearest="single=True",
                )
        squeezed = squeeze((x + y).mean((2, 3)))
        return torch.stack([branch(squeezed) for branch in self.branches]).softmax(0)[..., None, None]


class GLMixer(nn.Module):
    """Attention between all tokens, and a gated convolution along them: (B, N, C) to (B, N, C).

    Args:
        width: C.
        heads: a divisor of C.
        add: whether the tokens themselves are added.
    """

    def __init__(self, width: int, heads: int, *, add: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise Unsupported(f"heads={heads} of width {width}", supported="a divisor of the width", nearest="heads=1")
        self.heads, self.add = heads, add
        self.inputs, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.convolution, self.gate = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.attention_share, self.convolution_share = (nn.Parameter(torch.tensor(0.5)) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = self.inputs(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        columns = x.mT
        local = (self.convolution(columns) * self.gate(columns).sigmoid()).mT
        mixed = self.attention_share * attended + self.convolution_share * local
        return mixed + x if self.add else mixed


class OverlappingEmbedding(nn.Module):
    """A patch embedding like the one at the start of the teacher's stages: (B, C, H, W) to (B, N, width).

    Args:
        channels, width: C, and the width of a token.
        stride: stride of its windows, which are 2 stride - 1 pixels wide.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 2 * stride - 1, stride, stride - 1)
        self.norm = LayerNorm(width)
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out")
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n width"]:
        return self.norm(tokens_of(self.convolution(x)))


def coarse_cross_entropy(
    logits: Float[Tensor, "b k h w"],
    labels: Int[Tensor, "b h2 w2"],
    class_weights: Float[Tensor, " k"] | None = None,
    *,
    ignore: int = -100,
) -> Float[Tensor, ""]:
    """The paper's own task loss: cross entropy of coarse logits, with the labels reduced to their size (nearest).

    Args:
        class_weights: weight of each class; the mean is weighted by those of the pixels.
        ignore: a label that does not count.
    """
    reduced = F.interpolate(labels[:, None].double(), logits.shape[2:], mode="nearest-exact")[:, 0].long()
    return F.cross_entropy(logits, reduced, class_weights, ignore_index=ignore)


def _normed(channels: int, width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))
