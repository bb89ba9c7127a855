"""A decoder-only language model with any mechanism in any layer.

Pre-norm residual blocks with RMSNorm and SwiGLU, as in Llama (Touvron et al., arXiv 2302.13971)::

    model = LanguageModel(LanguageModelConfig(vocab_size=256, plan=["gated_linear"] * 3 + ["softmax"]))
    logits = model(ids).output                              # (B, N, vocab)
    new = model.generate(prompt, 100, temperature=0.8, top_p=0.9)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Loss, Mask, Pattern, Result, State, Unsupported, at_least, state_field
from regard.core.precision import wide
from regard.core.ragged import gathering
from regard.engines.linear import FrozenWeights
from regard.layers.checks import given_context
from regard.layers.embedding import make_embedding, tied_logits
from regard.layers.feed_forward import dropout
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm
from regard.models.blocks import Block
from regard.models.evaluating import evaluation_mode
from regard.models.exits import apply_head, joint_loss, make_exits, run_with_exits
from regard.models.generation import Read, generate, generate_stream
from regard.models.inputs import check_ids, embed_tokens, right_padded_mask
from regard.models.insertion import Insertion
from regard.models.layer_plan import keeps_state, read_plan
from regard.models.losses import add_losses, auxiliary_loss
from regard.models.placing import input_positions, make_input_positions, place_input
from regard.models.stack import LayersConfig, Stack

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.protocol import Task

IGNORED = -100
"""The target that is ignored in the loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class LanguageModelConfig(LayersConfig):
    """The configuration of a :class:`LanguageModel`.

    Attributes:
        vocab_size: number of tokens.
        dim: width of the residual stream.
        plan: a mechanism for all layers, or a list with a name or (name, options) for each layer. The options
            ``positions``, ``feed_forward``, ``num_heads``, ``head_dim`` and ``num_kv_heads`` override those below;
            ``feed_forward_kind`` is ``swiglu`` (the default), ``gelu``, ``bilinear`` (a gate without an activation),
            ``mixture_of_experts`` (`feed_forward` is then the width of each expert) or a projection such as
            ``token_parameter``; ``feed_forward_options`` are the network's options (``bias`` for the first three; see
            also :class:`regard.layers.feed_forward.MixtureOfExperts`). :mod:`regard.models.plans` has plans from
            papers.
        num_layers: number of layers; a single name is repeated as often (4 times when None), a list has to be as long.
        num_heads, head_dim, num_kv_heads: heads of every layer; as in :func:`regard.create_layer`.
        feed_forward: hidden width of feed-forward networks that have one; 8/3 of `dim` (4 times `dim` for ``gelu``)
            when None, 0 for blocks without a network.
        positions: a scheme of :mod:`regard.positions`, or ``auto``: rotary where a mechanism accepts it, none for
            recurrences with gates, sinusoidal at the input if otherwise no layer would know the order of its tokens.
        position_options: options of that scheme.
        max_length: number of learned positions, or of positions that sequential encodings can represent.
        dropout: dropout probability of the embedding and of each residual branch.
        tie_embeddings: whether the output projection reuses the embedding table (with logits scaled by dim^-0.5).
        norm: a norm of :func:`regard.layers.norms.make_norm`, such as ``rms`` or ``rms:1e-5``.
        embedding_norm: a norm of the embedding with its positions; ``none`` by default.
        embedding_dim: width of the embedding table, followed by a projection to `dim` (factorised embeddings, ALBERT,
            arXiv 1909.11942); when None, the width is `dim`, without a projection. A tied output uses the same factors.
        loss_weights: weight of each auxiliary loss by name. The defaults are those of papers or public code for
            sequential positions (0.1), ``commitment`` (1e-4) and ``reconstruction`` (1), and 0.01 for all others.
        stack: how the blocks are stacked: a :class:`regard.models.stack.StackConfig`, or a mapping of its options.
    """

    vocab_size: int
    dim: int = 256
    plan: Any = "softmax"
    num_layers: int | None = None
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    tie_embeddings: bool = False
    embedding_norm: str = "none"
    embedding_dim: int | None = None
    serves: ClassVar = ((Pattern.CAUSAL_SELF, "next-token"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("vocab_size", self.vocab_size, 1)
        object.__setattr__(self, "plan", read_plan(self.plan, self.num_layers))
        object.__setattr__(self, "num_layers", len(self.plan))

    @classmethod
    def for_task(cls, task: Task, plan: Any, **sizes: Any) -> LanguageModelConfig:
        """Return the config for a task (the hook of :func:`regard.models.registry.config_for`)."""
        return cls(task.vocab_size or 0, plan=plan, **sizes)


@dataclass(frozen=True)
class ModelState(State):
    """The state of a model for each sequence: the state of each layer, and the number of tokens read.

    Inserted tokens (landmarks) are not counted in `length`.
    """

    layers: tuple[Any, ...]
    length: Int[Tensor, " b"] = state_field()


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, output projection; see :class:`LanguageModelConfig`."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.insertion = Insertion.of_plan(config.plan, config.vocab_size)
        # The embedding has entries of size 1, as large as the branches' outputs: with 0.02 the first layers drown out
        # the tokens, and a small model does not learn to copy or recall in thousands of steps.
        tokens = config.vocab_size + self.insertion.extra_tokens
        self.embedding = make_embedding(tokens, config.dim, config.embedding_dim)
        scheme = input_positions(config.plan, config.positions)
        self.positions = make_input_positions(scheme, config)
        self.embedding_norm = make_norm(config.embedding_norm, config.dim)
        self.blocks = Stack([Block(entry, config, Pattern.CAUSAL_SELF) for entry in config.plan], config.stack)
        self.norm = make_norm(config.norm, config.dim)
        self.exits = make_exits(config)
        self.head = None if config.tie_embeddings else make_linear(config.dim, config.vocab_size)

    def forward(
        self, ids: Int[Tensor, "b n"], *, context: Context | None = None, state: ModelState | None = None
    ) -> Result:
        """Compute the logits of each next token.

        Args:
            ids: tokens, padded anywhere or packed, as `context.mask` says.
            context: mask, positions, roles, generator, progress; ``want={"state"}`` starts a state.
            state: the state to continue from; the result then has the new state. A packed call has one row per
                document.

        Returns:
            output (B, N, vocab_size), zero at padding; state; auxiliary losses summed over the layers; extras as lists
            with one entry for each layer that has them, in the layers' right-padded layout. The extras of exits are in
            the layout of `ids`, see :func:`regard.models.exits.run_with_exits` (in training they are logits).
        """
        return apply_head(self.features(ids, context=context, state=state), self.logits, self.exits)

    def logits(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b vocab"]:
        """Apply the output projection."""
        if self.head is not None:
            return self.head(features)
        return tied_logits(features, self.embedding, self.config.vocab_size)

    def features(
        self, ids: Int[Tensor, "b n"], *, context: Context | None = None, state: ModelState | None = None
    ) -> Result:
        """Like :meth:`forward`, but before the output projection: (B, N, dim)."""
        context = given_context(context)
        check_ids(ids)
        layout = gathering(context.mask, ids.shape[0], ids.shape[1], ids.device)
        ids = layout.gather(ids, axis=1)  # right-padded, a row for each sequence
        rows, n = ids.shape
        new = torch.full((rows,), n, device=ids.device) if layout.lengths is None else layout.lengths
        past = torch.zeros_like(new) if state is None else state.length
        inner = context
        if not (context.mask is None and context.positions is None and context.roles is None):
            inner = context.replace(
                mask=right_padded_mask(context.mask, layout),
                positions=None if context.positions is None else layout.gather(context.positions, axis=1),
                roles=None if context.roles is None else layout.gather(context.roles, axis=1),
            )
        inserted = self.insertion.insert(ids, past, new, inner)
        x, inner, losses = self.embed(inserted.ids, None if state is None else past, inserted.context)
        states = [None] * len(self.blocks) if state is None else state.layers
        result = run_with_exits(
            self.blocks,
            self.exits,
            self.norm,
            self.logits,
            x,
            inner,
            states,
            place=lambda x: layout.scatter(inserted.drop(x), axis=1),
        )
        add_losses(result.losses, losses)
        wanted = state is not None or "state" in context.want
        result.state = ModelState(result.state, past + new) if wanted else None
        return result

    def embed(
        self, ids: Int[Tensor, "b n"], past: Int[Tensor, " b"] | None, context: Context
    ) -> tuple[Float[Tensor, "b n c"], Context, dict[str, Loss]]:
        """Embed tokens at positions after `past` tokens; also return the layers' context and the positions' losses."""
        x = embed_tokens(self.embedding, ids)
        losses: dict[str, Loss] = {}
        if self.positions is not None:
            rank = torch.arange(ids.shape[1], device=ids.device)[None]
            where = context.positions
            if where is None:
                where = rank if past is None else rank + past[:, None]
            if context.mask is not None and context.mask.lengths is not None:
                where = torch.where(rank < context.mask.lengths[:, None], where, 0)
            movable = past is None and context.positions is None
            x, context, losses = place_input(self.positions, x, where, context, movable=movable)
        x = self.embedding_norm(x)
        x = dropout(x, self.config.dropout, training=self.training, generator=context.generator)
        return x, context, losses

    def loss(
        self, ids: Int[Tensor, "b n"], targets: Int[Tensor, "b n"] | None = None, *, context: Context | None = None
    ) -> Float[Tensor, ""]:
        """Mean cross entropy of the targets in nats (including the exits' losses), plus weighted auxiliary losses.

        Args:
            targets: the token to predict at each position, -100 for none; the sequence's next valid token when None.
        """
        return next_token_loss(partial(self, ids), self.config.loss_weights, ids, targets, context)

    def generate(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        beams: int = 1,
        length_penalty: float | None = None,
        use_state: bool | None = None,
        **options: Any,
    ) -> Int[Tensor, "b new"]:
        """Generate tokens by sampling (with the options of :meth:`generate_stream`) or by beam search.

        Args:
            beams: number of hypotheses that a beam search keeps; 1 for no beam search. A beam search does not sample.
            length_penalty: a beam search ranks hypotheses by the sum of their log-probabilities divided by
                ``new tokens ** length_penalty``; 1 when None.
        """
        options |= {"beams": beams, "length_penalty": length_penalty, "use_state": self._uses_state(use_state)}
        return generate(self.reader(options["use_state"]), ids, max_new_tokens, **options)

    def generate_stream(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        mask: Mask | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
        use_state: bool | None = None,
    ) -> Iterator[Int[Tensor, " b"]]:
        """Continue prompts; yields the next token of every row until all have stopped.

        The prompt is read once; then each token takes one step from the state. Dropout is off.

        Args:
            ids: prompts, at least one token each; padded anywhere or packed, as `mask` says.
            temperature: logits are divided by the temperature before sampling; 0 takes the likeliest token.
            top_k: sample among the k likeliest tokens.
            top_p: sample among the likeliest tokens that together reach this probability (nucleus sampling,
                arXiv 1904.09751).
            stop_tokens: a row stops after one of these tokens, and repeats it until all other rows have stopped too.
            generator: random generator for sampling.
            use_state: if False, the whole sequence is read again for each token; when None, if a mechanism has no state.
        """
        use_state = self._uses_state(use_state)
        return generate_stream(
            self.reader(use_state),
            ids,
            max_new_tokens,
            mask=mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            generator=generator,
            use_state=use_state,
        )

    def _uses_state(self, asked: bool | None) -> bool:
        return keeps_state(self.config.plan) if asked is None else asked

    def reader(self, use_state: bool = True) -> Read:
        """Return a function that reads tokens for :mod:`regard.models.generation`, without dropout.

        The function keeps packed copies of the weights for as long as it lives.
        """
        weights, modules = FrozenWeights(), list(self.modules())
        want = frozenset({"state"} if use_state else ())

        def read(ids: Tensor, last: Tensor, mask: Mask | None, state: Any) -> tuple[Tensor, Any]:
            with evaluation_mode(self, modules), weights:
                result = self.features(ids, context=Context(mask=mask, want=want), state=state)
                x = result.output  # (B, N, C)
                x = x[:, 0] if x.shape[1] == 1 else x[torch.arange(len(last), device=last.device), last]
                return self.logits(x), result.state

        return read


def next_token_loss(
    run: Callable[..., Result],
    weights: Mapping[str, float],
    ids: Int[Tensor, "b n"],
    targets: Int[Tensor, "b n"] | None,
    context: Context | None,
) -> Float[Tensor, ""]:
    """Compute the loss of the model that `run` calls with a context, see :meth:`LanguageModel.loss`."""
    if targets is None:
        targets = next_tokens(ids, None if context is None else context.mask)
    if targets.shape != ids.shape:
        raise Unsupported(
            f"targets of shape {tuple(targets.shape)} for ids of shape {tuple(ids.shape)}",
            supported="a target for each token, -100 for none",
        )
    result = run(context=context)
    return joint_loss(result, partial(mean_nats, targets=targets)) + auxiliary_loss(result.losses, weights)


def mean_nats(logits: Float[Tensor, "b n vocab"], targets: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean cross entropy of the targets that are not -100, in at least float32; 0 when there are none."""
    logits = wide(logits)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return nats / (targets != IGNORED).sum().clamp(min=1)


def next_tokens(ids: Int[Tensor, "b n"], mask: Mask | None = None) -> Int[Tensor, "b n"]:
    """Return the target at each position: the sequence's next valid token, -100 at the last token and at padding."""
    layout = gathering(mask, ids.shape[0], ids.shape[1], ids.device)
    dense = layout.gather(ids, axis=1)
    following = F.pad(dense, (0, 1), value=IGNORED)[:, 1:]
    if layout.lengths is not None:
        rank = torch.arange(dense.shape[1], device=ids.device)
        following = following.where(rank < layout.lengths[:, None] - 1, IGNORED)
    # Scattering fills padding with 0, which is a token id: shift the targets so that 0 means ignored meanwhile.
    return layout.scatter(following - IGNORED, axis=1) + IGNORED
