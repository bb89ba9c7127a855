"""An encoder-decoder with any mechanism in the encoder, the decoder and between them.

Pre-norm blocks in the order of the Transformer (Vaswani et al., arXiv 1706.03762): the encoder mixes the memory; each
decoder layer mixes the tokens so far, then reads the memory, then applies its feed-forward network::

    model = EncoderDecoder(EncoderDecoderConfig(vocab_size=96, memory_vocab_size=96, cross_plan="linear"))
    logits = model(ids, memory).output                      # (B, N, vocab); ids begin with a start token
    answer = model.generate(start, 40, memory=memory, stop_tokens=[2], beams=4)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.contract import Context, Loss, Mask, Pattern, Result, State, Unsupported, at_least
from regard.core.ragged import Gathering, gathering, inner_mask, right_padded
from regard.engines.linear import FrozenWeights
from regard.layers.checks import check_memory_mask, given_context
from regard.layers.embedding import make_embedding, tied_logits
from regard.layers.feed_forward import dropout
from regard.layers.linear import make_linear
from regard.layers.norms import make_norm
from regard.layers.patches import FeatureEmbedding
from regard.models.blocks import Block, check_sequences
from regard.models.evaluating import evaluation_mode
from regard.models.exits import apply_head, make_exits, run_with_exits
from regard.models.generation import generate, generate_stream
from regard.models.inputs import check_ids, embed_tokens
from regard.models.language_model import ModelState, next_token_loss
from regard.models.layer_plan import Plan, check_plan, keeps_state, read_plan
from regard.models.losses import add_losses
from regard.models.placing import input_positions, make_input_positions, place_input
from regard.models.stack import LayersConfig, Stack

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.tasks.protocol import Task


@dataclass(frozen=True)
class EncoderDecoderConfig(LayersConfig):
    """The configuration of an :class:`EncoderDecoder`.

    Attributes:
        vocab_size: number of tokens of the decoder.
        memory_vocab_size: number of tokens of the memory; None when the memory is floats.
        memory_features: width of a memory of floats; None when the memory is tokens. Exactly one of the two is given.
        dim: width of the decoder's residual stream, and of the encoder's unless `encoder_dim` is given.
        encoder_plan: noncausal-self mechanisms, as for `plan` of :class:`regard.models.LanguageModelConfig`.
        decoder_plan: causal-self mechanisms of the decoder's layers.
        cross_plan: causal-cross mechanisms of the decoder's layers. Its option ``feed_forward`` is that of the layer; its
            option ``memory_layers`` says how many of the encoder's last layers the layer reads (1 by default), each
            through the encoder's norm (arXiv 2207.13955, 2005.14187). The layer then sees as many tokens for each
            token of the memory, side by side from lower to higher layer, all with its position.
        num_layers: depth of the decoder; when None, the length of a plan given as a list, else 4.
        encoder_layers: depth of the encoder; when None, the length of a plan given as a list, else the decoder's depth.
        encoder_dim: width of the encoder's residual stream; `dim` when None.
        positions: a scheme of :mod:`regard.positions`, for both sequences and the self layers, or ``auto``: sinusoidal
            at both inputs, which lets the decoder align itself with the memory, and in the self layers as in
            :class:`regard.models.LanguageModelConfig`. Cross layers have none unless their plan names one.
        position_options, max_length: as in :class:`regard.models.LanguageModelConfig`; each side has its own positions.
        num_heads, head_dim, num_kv_heads, feed_forward, dropout, tie_embeddings, norm, embedding_dim, loss_weights, stack:
            as in :class:`regard.models.LanguageModelConfig`; the tied embedding is the decoder's; `stack` applies to
            both stacks, but its exits only to the decoder.
    """

    vocab_size: int
    memory_vocab_size: int | None = None
    memory_features: int | None = None
    dim: int = 256
    encoder_plan: Any = "softmax"
    decoder_plan: Any = "softmax"
    cross_plan: Any = "softmax"
    num_layers: int | None = None
    encoder_layers: int | None = None
    encoder_dim: int | None = None
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    tie_embeddings: bool = False
    embedding_dim: int | None = None
    serves: ClassVar = ((Pattern.CAUSAL_CROSS, "next-token"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("vocab_size", self.vocab_size, 1)
        if self.encoder_dim is not None:
            at_least("encoder_dim", self.encoder_dim, 1)
        if (self.memory_vocab_size is None) == (self.memory_features is None):
            raise Unsupported(
                f"memory_vocab_size={self.memory_vocab_size} and memory_features={self.memory_features}",
                supported="memory_vocab_size for tokens or memory_features for floats, and None for the other",
            )
        layers = count_layers(self.num_layers, self.decoder_plan, self.cross_plan)
        encoder_layers = count_layers(self.encoder_layers, self.encoder_plan, default=layers)
        for name, count, pattern, where in (
            ("encoder_plan", encoder_layers, Pattern.NONCAUSAL_SELF, "an encoder"),
            ("decoder_plan", layers, Pattern.CAUSAL_SELF, "the decoder of an encoder-decoder"),
            ("cross_plan", layers, Pattern.CAUSAL_CROSS, "the cross layers of an encoder-decoder"),
        ):
            plan = read_plan(getattr(self, name), count)
            check_plan(plan, pattern, where)
            object.__setattr__(self, name, plan)
        object.__setattr__(self, "num_layers", layers)
        object.__setattr__(self, "encoder_layers", encoder_layers)

    @classmethod
    def for_task(cls, task: Task, plan: Any, *, positions: str, **sizes: Any) -> EncoderDecoderConfig:
        """Return the config for a task, see :func:`regard.models.registry.config_for`; `plan` is the cross layers'."""
        return cls(task.vocab_size or 0, task.memory_vocab_size, task.memory_features, cross_plan=plan, **sizes)


def count_layers(given: int | None, *plans: Any, default: int = 4) -> int:
    """Return the number of layers of plans of one depth: `given`, else the first list's length, else `default`."""
    if given is not None:
        return given
    return next((len(plan) for plan in plans if not isinstance(plan, str)), default)


@dataclass(frozen=True)
class EncodedMemory(State):
    """The encoder's output for a memory: right-padded tokens, and each row's valid length (None when all are valid).

    The features of a token are the outputs of the last layers side by side, as many as some cross layer reads.
    """

    tokens: Float[Tensor, "b m c"]
    lengths: Int[Tensor, " b"] | None = None
    positions: Int[Tensor, "b m"] | None = None

    @property
    def mask(self) -> Mask | None:
        """The mask for layers that read the memory; None when all tokens are valid."""
        if self.lengths is None:
            return None
        return right_padded(self.lengths, self.tokens.shape[1])


class EncoderDecoder(nn.Module):
    """Embeddings, encoder blocks, decoder blocks, norms, output projection; see :class:`EncoderDecoderConfig`."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.dim if config.encoder_dim is None else config.encoder_dim
        of_encoder = replace(config, dim=width)
        self.memory_embedding: nn.Module
        if config.memory_vocab_size is not None:
            self.memory_embedding = make_embedding(config.memory_vocab_size, width, config.embedding_dim)
        else:
            self.memory_embedding = FeatureEmbedding(config.memory_features or 0, width)
        self.embedding = make_embedding(config.vocab_size, config.dim, config.embedding_dim)
        self.memory_positions = self._input_positions(config.encoder_plan, of_encoder)
        self.positions = self._input_positions(config.decoder_plan, config)
        encoder_blocks = [Block(entry, of_encoder, Pattern.NONCAUSAL_SELF) for entry in config.encoder_plan]
        self.encoder_blocks = Stack(
            encoder_blocks, replace(config.stack, exits=(), exit_rule=None, exit_heads="shared")
        )
        check_sequences(encoder_blocks, "an encoder-decoder, which has no grids", supported="layers for sequences")
        self.encoder_norm = make_norm(config.norm, width)
        blocks: list[Block] = []
        for own, cross in zip(config.decoder_plan, config.cross_plan, strict=True):
            blocks.append(Block(own, config, Pattern.CAUSAL_SELF, feed_forward=0))
            blocks.append(
                Block(cross, config, Pattern.CAUSAL_CROSS, memory_dim=width, memory_layers=config.encoder_layers or 0)
            )
        self.memory_layers = max(block.memory_layers for block in blocks if block.cross)
        self.blocks = Stack(blocks, config.stack, blocks_in_layer=2)
        self.norm = make_norm(config.norm, config.dim)
        self.exits = make_exits(config)
        self.head = None if config.tie_embeddings else make_linear(config.dim, config.vocab_size)

    @staticmethod
    def _input_positions(plan: Plan, config: EncoderDecoderConfig) -> Any:
        scheme = input_positions(plan, "sinusoidal" if config.positions == "auto" else config.positions)
        return make_input_positions(scheme, config)

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        memory: Int[Tensor, "b m"] | Float[Tensor, "b m f"] | None = None,
        *,
        context: Context | None = None,
        state: ModelState | None = None,
    ) -> Result:
        """Compute the logits of each next token.

        Args:
            ids: tokens of the decoder, padded anywhere or packed, as `context.mask` says.
            memory: tokens or features, padded anywhere or packed, as `context.memory_mask` says; None when `state` has
                absorbed the memory. With packed ids, the memory has one sequence per document.
            context: masks and positions of both sequences, generator, progress; ``want={"state"}`` starts a state.
            state: the state to continue from; the result then has the new state.

        Returns:
            output (B, N, vocab_size), zero at padding; state; auxiliary losses summed over the layers of encoder and
            decoder; extras of the decoder as lists with one entry for each layer that has them, and extras of exits as
            in :meth:`regard.models.LanguageModel.forward`.
        """
        return apply_head(self.features(ids, memory, context=context, state=state), self.logits, self.exits)

    def logits(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b vocab"]:
        """Apply the output projection."""
        if self.head is not None:
            return self.head(features)
        return tied_logits(features, self.embedding, self.config.vocab_size)

    def features(
        self,
        ids: Int[Tensor, "b n"],
        memory: Tensor | None = None,
        *,
        context: Context | None = None,
        state: ModelState | None = None,
    ) -> Result:
        """Like :meth:`forward`, but before the output projection: (B, N, dim)."""
        context = given_context(context)
        if (memory is None) == (state is None):
            raise Unsupported(
                f"{'no' if memory is None else 'a'} memory {'without' if state is None else 'together with'} a state",
                supported="memory, or a state that has absorbed it",
                nearest="state=model.encode_memory(memory)",
            )
        if memory is None:
            if context.memory_mask is not None or context.memory_positions is not None:
                raise Unsupported("a mask or positions of a memory that is not given", supported="memory_mask=None")
            return self._decode(ids, context, state)
        losses: dict[str, Loss] = {}
        encoded = self._encode(memory, context, losses)
        result = self._decode(ids, context, encoded)
        add_losses(losses, result.losses)
        result.losses = losses
        return result

    def encode_memory(self, memory: Tensor, *, context: Context | None = None) -> ModelState:
        """Encode the memory and let every cross layer absorb it once; returns the state to decode from.

        Args:
            memory: as in :meth:`forward`, with `context.memory_mask`.
        """
        encoded = self._encode(memory, given_context(context), {})
        inner = Context(memory_mask=encoded.mask, memory_positions=encoded.positions)
        states = [
            block.encode_memory(encoded.tokens, context=inner) if block.cross else None  # type: ignore[operator]
            for block in self.blocks
        ]
        length = torch.zeros(encoded.tokens.shape[0], dtype=torch.int64, device=memory.device)
        return ModelState(tuple(states), length)

    def _encode(self, memory: Tensor, context: Context, losses: dict[str, Loss]) -> EncodedMemory:
        axes = 2 if self.config.memory_features is None else 3
        if memory.ndim != axes or memory.is_floating_point() != (axes == 3) or memory.dtype == torch.bool:
            expected = "integers (B, M)" if axes == 2 else f"floats (B, M, {self.config.memory_features})"
            raise Unsupported(f"memory of dtype {memory.dtype} and shape {tuple(memory.shape)}", supported=expected)
        check_memory_mask(context)
        layout = gathering(context.memory_mask, memory.shape[0], memory.shape[1], memory.device)
        where = None if context.memory_positions is None else layout.gather(context.memory_positions, axis=1)
        x = embed_tokens(self.memory_embedding, layout.gather(memory, axis=1))  # right-padded, a row for each sequence
        inner = Context(
            mask=inner_mask(layout), positions=where, generator=context.generator, progress=context.progress
        )
        x, inner, placed = self._placed(self.memory_positions, x, layout, None, inner)
        x = dropout(x, self.config.dropout, training=self.training, generator=context.generator)
        hidden, others = self.encoder_blocks.run_last(self.memory_layers, x, inner)
        add_losses(losses, placed)
        add_losses(losses, others)
        return EncodedMemory(torch.cat([self.encoder_norm(x) for x in hidden], -1), layout.lengths, where)

    def _decode(self, ids: Int[Tensor, "b n"], context: Context, source: EncodedMemory | ModelState | None) -> Result:
        check_ids(ids)
        _check_context(context)
        layout = gathering(context.mask, ids.shape[0], ids.shape[1], ids.device)
        ids = layout.gather(ids, axis=1)  # right-padded, a row for each sequence
        rows, n = ids.shape
        encoded = source if isinstance(source, EncodedMemory) else None
        state = source if isinstance(source, ModelState) else None
        others = encoded.tokens.shape[0] if encoded is not None else rows if state is None else state.length.shape[0]
        if others != rows:
            raise Unsupported(
                f"{rows} sequences of ids with {others} of the memory", supported="one memory for each sequence"
            )
        new = torch.full((rows,), n, device=ids.device) if layout.lengths is None else layout.lengths
        past = torch.zeros_like(new) if state is None else state.length
        where = None if context.positions is None else layout.gather(context.positions, axis=1)
        wanted = state is not None or "state" in context.want
        inner = context.replace(
            mask=inner_mask(layout),
            memory_mask=None if encoded is None else encoded.mask,
            positions=where,
            memory_positions=None if encoded is None else encoded.positions,
            want=context.want | ({"state"} if wanted else set()),
        )
        x, inner, losses = self._placed(
            self.positions, embed_tokens(self.embedding, ids), layout, None if state is None else past, inner
        )
        x = dropout(x, self.config.dropout, training=self.training, generator=context.generator)
        states = [None] * len(self.blocks) if state is None else state.layers
        tokens = None if encoded is None else encoded.tokens
        result = run_with_exits(
            self.blocks,
            self.exits,
            self.norm,
            self.logits,
            x,
            inner,
            states,
            tokens,
            place=lambda x: layout.scatter(x, axis=1),
        )
        add_losses(result.losses, losses)
        result.state = ModelState(result.state, past + new) if wanted else None
        return result

    @staticmethod
    def _placed(
        scheme: Any, x: Tensor, layout: Gathering, past: Tensor | None, context: Context
    ) -> tuple[Tensor, Context, dict[str, Loss]]:
        """Call `place_input` on right-padded embeddings; positions are ranks after `past` tokens unless given."""
        if scheme is None:
            return x, context, {}
        rank, where = torch.arange(x.shape[1], device=x.device)[None], context.positions
        if where is None:
            where = rank if past is None else rank + past[:, None]
        if layout.lengths is not None:
            where = torch.where(rank < layout.lengths[:, None], where, 0)
        return place_input(scheme, x, where, context, movable=past is None and context.positions is None)

    def loss(
        self,
        ids: Int[Tensor, "b n"],
        memory: Tensor,
        targets: Int[Tensor, "b n"] | None = None,
        *,
        context: Context | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross entropy of the targets in nats (including the exits' losses), plus weighted auxiliary losses.

        Args:
            targets: the token to predict at each position, -100 for none; the sequence's next valid token when None.
        """
        return next_token_loss(partial(self, ids, memory), self.config.loss_weights, ids, targets, context)

    def generate(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        memory: Tensor,
        memory_mask: Mask | None = None,
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
        reader = _Reader(self, memory, memory_mask, options["use_state"])
        options["state"] = reader.start
        return generate(reader, ids, max_new_tokens, **options)

    def generate_stream(
        self,
        ids: Int[Tensor, "b n"],
        max_new_tokens: int,
        *,
        memory: Tensor,
        memory_mask: Mask | None = None,
        mask: Mask | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
        use_state: bool | None = None,
    ) -> Iterator[Int[Tensor, " b"]]:
        """Continue prompts (usually a start token each); yields the next token of every row until all have stopped.

        The memory is encoded and absorbed once, and the prompt is read once; then each token takes one step from the
        state. Dropout is off.

        Args:
            ids: prompts, at least one token each; padded anywhere or packed, as `mask` says.
            memory: the memory of each prompt, with `memory_mask`.
            temperature, top_k, top_p, stop_tokens, generator: as in
                :meth:`regard.models.LanguageModel.generate_stream`.
            use_state: if False, the encoded memory and the whole sequence are read again for each token; when None, if a
                mechanism of the decoder has no state.
        """
        use_state = self._uses_state(use_state)
        reader = _Reader(self, memory, memory_mask, use_state)
        return generate_stream(
            reader,
            ids,
            max_new_tokens,
            state=reader.start,
            mask=mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            generator=generator,
            use_state=use_state,
        )

    def _uses_state(self, asked: bool | None) -> bool:
        return keeps_state(self.config.decoder_plan, self.config.cross_plan) if asked is None else asked


class _Reader:
    """Reads tokens for :mod:`regard.models.generation`, starting from an encoded memory or a state that absorbed it."""

    def __init__(self, model: EncoderDecoder, memory: Tensor, memory_mask: Mask | None, use_state: bool) -> None:
        self.model, self.weights = model, FrozenWeights()
        context = Context(memory_mask=memory_mask)
        self.start: ModelState | EncodedMemory
        with torch.no_grad(), evaluation_mode(model), self.weights:
            self.start = (
                model.encode_memory(memory, context=context) if use_state else model._encode(memory, context, {})
            )

    def __call__(self, ids: Tensor, last: Tensor, mask: Mask | None, state: Any) -> tuple[Tensor, Any]:
        with evaluation_mode(self.model), self.weights:
            result = self.model._decode(ids, Context(mask=mask), state)
            return self.model.logits(result.output[torch.arange(len(last), device=last.device), last]), result.state


def _check_context(context: Context) -> None:
    mask = context.mask
    pairs = mask is not None and (mask.bias is not None or mask.blocks is not None)
    for what, given in (("a grid", context.grid is not None), ("a bias or a block mask", pairs)):
        if given:
            raise Unsupported(f"{what} in an encoder-decoder", supported="padding, packing and positions")
