r"""IA-RED²: small policies decide for each image which patches a vision transformer keeps.

Pan et al., arXiv 2106.12620. The blocks are divided into groups; before group i an interpreter scores the tokens x (B,
N, C) that are still kept, with the class token at position 0 and m the mask of kept tokens:

    x' = LN(x * m),   q = W_q x'_0 + b_q,   k_j = W_k x'_j + b_k      (W_q of a learned policy token, with `query="policy"`)
    p_j = m_j mean_h sigmoid(q_h . k_jh / sqrt(d))

Before training p_j is `START` for every patch that is alive, whatever the image and the width, so that a threshold
below that keeps all patches. A patch stays if p_j > `threshold` (in training, also by a draw with probability p_j); the
class token always stays, and removed tokens do not come back. A head that averages patches averages those that stay.
There, so that some do, the patch with the highest score always stays, too, and is no part of the decision. Policies
learn by REINFORCE with the greedy decision û as the baseline: with c(u) the share of tokens that stays,

    R(u) = b_i (1 - c(u)^2) where the class is right, -tau where it is wrong
    loss = -(R(u) - R(û)) log pi(u),   pi(u) = prod over the patches alive of p_j^u_j (1 - p_j)^(1 - u_j)

b_i, the share of the blocks in group i and later groups, is the released code's ``benefit``, whose use in training
was not published; ``error_penalty`` is tau. The curriculum (:func:`train_interpreters`) goes group by group: first the
policy with everything else frozen, then the blocks from that group on, under the decisions so far.

At inference tokens are really removed, more in some rows than in others (:meth:`InterpretedTransformer.forward`): the
blocks of this project get the rows packed one after the other, without padding, those of timm padded to the longest row
and masked. :meth:`InterpretedTransformer.forward_masked` computes all tokens under masks, as in the paper's training; both
give the same logits.

Any layers can be inside, as all of them honour masks, but those that read the grid of all patches. The class token of
the paper is the first of the model's class tokens; a distillation token stays too, and is no part of a decision.
Without a class token the query is the policy token. Rotary positions and those of SeqPE stay with the tokens; layers
that count ranks (``alibi``, windows, recurrences) count the tokens that are left, and agent attention fills its grid
with them row by row. In TNT, interpreters read the sentences, and the words of a patch leave with its sentence.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.compression.tokens.phases import Batches, Phase, run_phases
from regard.compression.tokens.trained import ChoosingTransformer
from regard.contract import Unsupported, at_least, one_of
from regard.core.precision import wide
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

QUERIES = ("class", "policy")
RELEASED = re.compile(r"groups\.(?P<group>\d+)\.(?:agent\.qk|block_list\.(?P<number>\d+))\.(?P<part>.+)")
"""Names of the official code inside a group: its interpreter's projection, and copies of its blocks."""
SURE = 1e-6
"""Distance from 0 and 1 at which probabilities are clamped before the logarithm."""
START = 0.65
"""Keep probability of every patch before training. A policy that starts by dropping most patches may never return."""


class Interpreter(nn.Module):
    """Scores of tokens before a group of blocks.

    Args:
        dim: width of the tokens.
        num_heads: number of heads that the scores are averaged over.
        query: ``class``, the class token, or ``policy``, a learned token.
    """

    def __init__(self, dim: int, num_heads: int, query: str = "class") -> None:
        super().__init__()
        one_of("query", query, QUERIES)
        if dim % num_heads:
            raise Unsupported(f"{num_heads} heads of a width of {dim}", supported="a divisor of the width")
        self.num_heads = num_heads
        self.norm = LayerNorm(dim, parametric=False)
        self.query: Any = make_linear(dim, dim, bias=True)
        self.key: Any = make_linear(dim, dim, bias=True)
        self._start()
        self.policy = nn.Parameter(torch.zeros(dim)) if query == "policy" else None
        if self.policy is not None:
            nn.init.normal_(self.policy)  # of the size of normed tokens

    @torch.no_grad()
    def _start(self) -> None:
        """Give every token the probability `START`, whatever the tokens are.

        All keys are one constant vector. Queries keep their random weights, from which heads and keys learn apart, but
        without the part along that vector, so that no score depends on them yet.
        """
        weight = self.query.weight.unflatten(0, (self.num_heads, -1))  # (heads, d, C), a view
        weight -= weight.mean(1, keepdim=True)
        self.key.weight.zero_()
        level = math.sqrt(math.log(START / (1 - START)) * weight.shape[1] ** -0.5)
        for linear in (self.query, self.key):
            linear.bias.fill_(level)

    def forward(self, x: Float[Tensor, "b n c"], alive: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Keep probabilities: in (0, 1) for live tokens, 0 for the others."""
        x = self.norm(torch.where(alive[..., None], x, 0))
        asking = x[:, :1] if self.policy is None else self.policy.to(x.dtype).expand(len(x), 1, -1)
        query, key = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(asking), self.key(x))
        )
        scores = wide(query @ key.mT * query.shape[-1] ** -0.5).sigmoid().mean(1)[:, 0]
        return torch.where(alive, scores, 0)


@dataclass(frozen=True)
class Decision:
    """The decision before a group.

    Attributes:
        scores: p (B, N), 0 for tokens that were removed before.
        stays: u (B, N); always True for class tokens.
        open: mask of the tokens that were decided about: those that were left, without the ones that stay always.
    """

    scores: Float[Tensor, "b n"]
    stays: Bool[Tensor, "b n"]
    open: Bool[Tensor, "b n"]

    @property
    def share(self) -> Float[Tensor, " b"]:
        """c, as a share of all tokens, including class tokens."""
        return self.stays.to(self.scores.dtype).mean(1)

    @property
    def log_probability(self) -> Float[Tensor, " b"]:
        """Log probability of the decision, over the patches that it is about."""
        p = self.scores.clamp(SURE, 1 - SURE)
        each = torch.where(self.stays, p.log(), (1 - p).log())
        return torch.where(self.open, each, 0).sum(1)


class InterpretedTransformer(ChoosingTransformer):
    """A vision transformer with an interpreter before each group of its blocks.

    Args:
        model: :class:`regard.models.vision.vit.VisionTransformer`, :class:`regard.models.vision.tnt.TNT`, or timm's
            `VisionTransformer` of plain blocks, whose head reads a class token or averages the patches; it is shared, not
            copied.
        groups: number of blocks in each group, or the number of equal groups.
        query: query of the interpreters, see :class:`Interpreter`; ``policy`` in a model without a class token.
        threshold: score above which a patch stays; a higher threshold removes more. It may be changed at any time.

    Raises:
        Unsupported: for other models, and for groups that do not match the blocks.
    """

    method, choosers = "ia_red2", "interpreters"

    def __init__(
        self, model: nn.Module, groups: int | Sequence[int] = 3, *, query: str = "class", threshold: float = 0.5
    ) -> None:
        super().__init__(model)
        depth = len(self.host.blocks)
        if isinstance(groups, int):
            at_least("groups", groups, 1)
            sizes = [depth // groups] * groups
        else:
            sizes = list(groups)
        if sum(sizes) != depth or min(sizes) < 1:
            raise Unsupported(
                f"groups={groups} of {depth} blocks", supported=f"sizes that add up to {depth}, or a divisor"
            )
        if query == "class" and not self.host.class_token:
            raise Unsupported(
                "a query of the class token in a model without one",
                supported="query='policy'",
                nearest="query='policy'",
            )
        self.sizes, self.threshold = sizes, threshold
        self.interpreters = nn.ModuleList(Interpreter(self.host.width, self.host.heads, query) for _ in sizes)

    @property
    def options(self) -> dict[str, Any]:
        query = QUERIES[self.interpreters[0].policy is not None]
        return {"groups": self.sizes, "query": query, "threshold": self.threshold}

    @property
    def benefits(self) -> list[float]:
        """The share of the blocks in each group and later groups."""
        return [sum(self.sizes[i:]) / sum(self.sizes) for i in range(len(self.sizes))]

    def group(self, number: int) -> list[Any]:
        """The blocks of a group."""
        first = sum(self.sizes[:number])
        return self.host.blocks[first : first + self.sizes[number]]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x, context = self.host.embed(x)
        (alive, places), count = self._all_of(x), x.shape[1]
        for number in range(len(self.sizes)):
            stays = self.decide(number, x, alive).stays
            x, alive, places = self.host.run_kept(self.group(number), x, context, stays, places)
        self.keep(x, alive, places, count)
        return self.host.logits(self.host.norm(x), alive)

    def forward_masked(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        groups: int | None = None,
        sampled: int | None = None,
        stays: Sequence[Bool[Tensor, "b n"]] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "b k"], list[Decision]]:
        """Logits with all tokens computed, and the decisions.

        Args:
            images: (B, C, H, W).
            groups: the number of groups, from the first, that decide; later ones use the last decision. All when None.
            sampled: the group that draws its decision at random; the others are greedy.
            stays: for each deciding group, the tokens that stay, overriding its interpreter.
            generator: source of random draws.
        """
        x, context = self.host.embed(images)
        alive, places = self._all_of(x)
        decisions = list[Decision]()
        deciding = len(self.sizes) if groups is None else groups
        for number in range(len(self.sizes)):
            if number < deciding:
                made = self.decide(number, x, alive, sampled=number == sampled, generator=generator)
                decisions.append(made if stays is None else replace(made, stays=stays[number] & alive))
                alive = decisions[-1].stays
            kept = torch.where(alive[..., None], x, 0)
            x = self.host.run(self.group(number), kept, context, alive=alive, places=places)
        return self.host.logits(self.host.norm(x), alive), decisions

    def decide(
        self,
        number: int,
        x: Float[Tensor, "b n c"],
        alive: Bool[Tensor, "b n"],
        *,
        sampled: bool = False,
        generator: torch.Generator | None = None,
    ) -> Decision:
        """The decision before a group: greedy, or sampled."""
        scores = self.interpreters[number](self.host.vectors(x), alive)
        if sampled:
            level = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=scores.dtype)
        else:
            level = torch.full_like(scores, self.threshold)
        known = scores.detach()
        about = alive & (torch.arange(x.shape[1], device=x.device) >= self.host.protected)
        if self.host.averages:
            best = torch.where(about, known, -1).argmax(1, keepdim=True)
            about = about.scatter(1, best, False)
        return Decision(scores, alive & (~about | (known > level)), about)

    def heat_map(self, images: Float[Tensor, "b c h w"], group: int = 1) -> Float[Tensor, "b rows columns"]:
        """Scores of the patches before a group, at their grid positions; 0 for patches that were removed before."""
        count = len(self.sizes)
        if group not in range(count):
            raise Unsupported(
                f"the scores before group {group} of {count}",
                supported=f"groups 0 to {count - 1}",
                nearest=f"group={count - 1}",
            )
        _, decisions = self.forward_masked(images, groups=group + 1)
        return decisions[group].scores[:, self.host.protected :].unflatten(1, self.host.grid(images))

    def usage(self, decisions: Sequence[Decision]) -> Float[Tensor, " b"]:
        """The share of the blocks' work that is left, ignoring the quadratic part of attention.

        Groups after those of the decisions use the last one.
        """
        made = list(decisions)
        made += made[-1:] * (len(self.sizes) - len(made))
        saved = [(1 - each.share) * size / sum(self.sizes) for each, size in zip(made, self.sizes, strict=True)]
        return 1 - torch.stack(saved).sum(0)

    def translate(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights of the official code's `PerBlock_VisionTransformer`, with a query of the class token.

        Its interpreters project to queries, keys and a third part that is never used, which is left out here. A whole
        state dict repeats each block inside its group; these copies, if there are any, must equal the blocks. The number
        of an interpreter's heads, 6 in that code, is in no checkpoint: here it is the model's.
        """
        backbone = {name: value for name, value in weights.items() if not name.startswith("groups.")}
        found = dict[str, Tensor]()
        for name, value in weights.items():
            if name in backbone:
                continue
            matched = RELEASED.match(name)
            if matched is None:
                raise Unsupported(f"weights with {name}", supported="weights of PerBlock_VisionTransformer")
            group, number, part = int(matched["group"]), matched["number"], matched["part"]
            if number is None:
                if len(value) != 3 * self.host.width:
                    raise Unsupported(
                        f"weights with {name} of {tuple(value.shape)}",
                        supported=f"{3 * self.host.width} rows: queries, keys and an unused third part",
                    )
                found[f"{group}.query.{part}"], found[f"{group}.key.{part}"], _ = value.chunk(3)
                continue
            original = backbone.get(f"blocks.{sum(self.sizes[:group]) + int(number)}.{part}")
            if original is None or not torch.equal(original, value):
                raise Unsupported(
                    f"weights with {name} other than those of its block in groups of {self.sizes}",
                    supported="groups of the sizes that the weights were trained with",
                )
        return backbone, found

    @staticmethod
    def _all_of(x: Float[Tensor, "b n c"]) -> tuple[Bool[Tensor, "b n"], Int[Tensor, "b n"]]:
        """The mask and the places of all tokens."""
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return alive, torch.arange(x.shape[1], device=x.device).expand(len(x), -1)


def reward(
    decision: Decision, right: Bool[Tensor, " b"], benefit: float = 1.0, error_penalty: float = 1.0
) -> Float[Tensor, " b"]:
    """R(u) of each image: `benefit` times 1 - c^2 where its class is right, else minus `error_penalty`."""
    return torch.where(right, benefit * (1 - decision.share.square()), -error_penalty)


def policy_loss(
    model: InterpretedTransformer,
    images: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    group: int,
    *,
    error_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ""], list[Decision]]:
    """REINFORCE loss for the interpreter of a group, with the greedy decision as the baseline, averaged over the
    images; also returns the greedy decisions."""
    with torch.no_grad():
        logits, greedy = model.forward_masked(images, groups=group + 1)
    drawn_logits, drawn = model.forward_masked(images, groups=group + 1, sampled=group, generator=generator)
    benefit = model.benefits[group]
    gained, expected = (
        reward(decisions[group], found.argmax(-1) == labels, benefit, error_penalty)
        for found, decisions in ((drawn_logits, drawn), (logits, greedy))
    )
    return -((gained - expected).detach() * drawn[group].log_probability).mean(), greedy


@dataclass(frozen=True)
class Step:
    """A step of :func:`train_interpreters`: ``policy`` or ``blocks`` of a group, its loss, and the work left."""

    group: int
    part: str
    loss: float
    usage: float


def train_interpreters(
    model: InterpretedTransformer,
    batches: Batches,
    *,
    policy_steps: int,
    block_steps: int,
    policy_rate: float = 1e-3,
    block_rate: float = 1e-4,
    error_penalty: float = 1.0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """The paper's curriculum, in place: for each group its policy, then the blocks from that group on.

    The same call resumes from `checkpoint`, where an earlier one was stopped, and ends with the same weights. Losses of
    layers (a mixture's balance) are not part of it.

    Args:
        model: built around a trained vision transformer.
        batches: images and classes of each step, counted from 0.
        policy_steps, block_steps: number of steps for each group.
        policy_rate, block_rate: Adam's learning rates; the paper's were not published.
        error_penalty: tau; a smaller value removes more tokens, at more errors.
        seed: seed of random draws.
        checkpoint, checkpoint_every: a file, and the number of steps between saves.
        on_step: called after each step.

    Raises:
        Unsupported: for a checkpoint of another run, and a loss that is not finite.
    """
    phases = []
    for group in range(len(model.sizes)):
        policy = list(model.interpreters[group].parameters())
        blocks = [
            p for later in range(group, len(model.sizes)) for block in model.group(later) for p in block.parameters()
        ]
        blocks += [p for end in model.host.ends for p in end.parameters()]

        def of_policy(images: Tensor, labels: Tensor, group: int = group) -> tuple[Tensor, dict[str, float]]:
            loss, decisions = policy_loss(model, images, labels, group, error_penalty=error_penalty)
            return loss, {"usage": model.usage(decisions).mean().item()}

        def of_blocks(images: Tensor, labels: Tensor, group: int = group) -> tuple[Tensor, dict[str, float]]:
            logits, decisions = model.forward_masked(images, groups=group + 1)
            return F.cross_entropy(logits, labels), {"usage": model.usage(decisions).mean().item()}

        phases += [
            Phase("policy", [(policy, policy_rate)], policy_steps, of_policy),
            Phase("blocks", [(blocks, block_rate)], block_steps, of_blocks),
        ]
    run_phases(
        model,
        phases,
        batches,
        settings={"error_penalty": error_penalty, "threshold": model.threshold, "groups": model.sizes},
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        on_step=lambda phase, step, loss, told: on_step(Step(phase // 2, phases[phase].name, loss, told["usage"])),
    )
