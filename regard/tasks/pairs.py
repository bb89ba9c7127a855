"""Tasks that map a source text to a target text: the common base of paraphrasing and summarising."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Pattern, Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import Paths, names_of, overlap_note, printable
from regard.tasks.overlap import overlap
from regard.tasks.protocol import (
    EVALUATION,
    IGNORED,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import held_out_groups, in_epochs, spread
from regard.tasks.tables import read_table
from regard.tasks.tokenizer import BYTES, create_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A source text, its target, and its group, which is never divided between training and held-out data."""

    source: str
    target: str
    group: str


class TextPairsTask(Task):
    """Write the target text from the source text, which is the memory.

    The decoder reads a start token and the target; its targets are the target and an end token. Sources longer than
    `source_length` are cut; pairs whose target does not fit in `length` are left out and counted. The score is that of
    texts generated from the start token alone.

    Subclasses define :meth:`read`, :meth:`judge`, `by` and the lengths.

    Attributes:
        by: what `Pair.group` is, in words.
        lengths: default lengths of source and target.
    """

    pattern = Pattern.CAUSAL_CROSS
    objective = "next-token"
    by: str
    lengths: tuple[int, int]

    def __init__(
        self,
        *,
        data: Paths | None = None,
        validation: Paths | None = None,
        source: str = "source",
        target: str = "target",
        tokenizer: str = "bytes",
        length: int | None = None,
        source_length: int | None = None,
        held_out: float = 0.1,
        evaluation_items: int = 64,
        seed: int = 0,
    ) -> None:
        self.length = check_integer("length", self.lengths[1] if length is None else length, 2, 1 << 16)
        given = self.lengths[0] if source_length is None else source_length
        self.memory_length: int = check_integer("source_length", given, 1, 1 << 16)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        check_fraction("held_out", held_out, 0.01, 0.5)

        self._notes: list[str] = []
        self._own = data is not None
        if data is not None:
            self._named = names_of(data)
            pairs = self._read_table(data, source, target)
        elif validation is not None:
            raise Unsupported(f"validation for {self.name} without data", supported="both, or neither")
        else:
            self._named, pairs = self.read()
        training, scored = self._split(pairs, validation, source, target, held_out)

        texts, held = ([t.encode() for p in pairs for t in (p.source, p.target)] for pairs in (training, scored))
        self.overlap = overlap(texts, held)
        self.tokenizer = create_tokenizer(tokenizer, texts)
        self.memory_vocab_size: int = self.tokenizer.vocab_size
        self._start, self._end = self.memory_vocab_size, self.memory_vocab_size + 1
        self.vocab_size: int = self.memory_vocab_size + 2
        self.stop_tokens = (self._end,)
        self.generates: int = self.length
        self._training, self._held_out = self._encode("training", training), self._encode("held-out", scored)
        self._scored = spread(len(self._held_out), evaluation_items)
        targets = [self._held_out[i][0].target for i in self._scored]
        others = counter_generator(self.seed, 0, EVALUATION).integers(0, len(self._training), len(targets))
        drawn = [self._training[i][0].target for i in others]
        copies = [self.simple(self._held_out[i][0].source) for i in self._scored]
        self._rules = [
            Baseline(name, np.array([(self.judge(text, t), 1.0) for text, t in zip(texts, targets, strict=True)]))
            for name, texts in ((self.simple_name, copies), ("a target drawn from training", drawn))
        ]
        self.chance = self._rules[1].score
        self.baseline: Baseline | None = max(self._rules, key=lambda rule: rule.score)

    def read(self) -> tuple[str, list[Pair]]:
        """The default data: their name and their pairs."""
        raise NotImplementedError

    def judge(self, generated: str, reference: str) -> float:
        """Score of one generated text, 0 to 100."""
        raise NotImplementedError

    @property
    def simple_name(self) -> str:
        """The rule of :meth:`simple`, in words."""
        return "the source itself"

    def simple(self, source: str) -> str:
        """The target that a simple rule derives from a source."""
        return source

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        chosen = in_epochs(np.arange(len(self._training)), step, seed, batch_size)
        return self._batch([self._training[i] for i in chosen])

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            yield self._batch([self._held_out[i] for i in self._scored[rows]])

    def score_generated(
        self, tokens: Int[Tensor, "b n"], batch: Batch
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The score of each generated text up to its end token, with weight 1."""
        scores = [
            self.judge(self._decode(row), self._decode(target))
            for row, target in zip(tokens.tolist(), batch.targets.tolist(), strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores), dtype=torch.float64)

    def describe(self) -> str:
        rules = "; ".join(f"{rule.name}: {rule.score:.1f}" for rule in self._rules)
        tokens = f" ({self.memory_vocab_size} tokens)" if self.memory_vocab_size != BYTES else ""
        lines = [
            f"{self.name}: {self._named}, tokenizer {self.tokenizer.name}{tokens}",
            f"up to {self.length} tokens are written from up to {self.memory_length} of the source",
            f"training: {counted(len(self._training), 'pair')}; held out: {len(self._held_out):,}, {len(self._scored)} of them "
            "scored",
            f"split: {self._rule}",
            str(self.overlap),
            f"scored in {self.metric} (0 to 100, mean of the texts) on what is generated; {rules}",
        ]
        lines += [f"note: {note}" for note in self._notes]
        first = self._training[0][0]
        return "\n".join(
            [*lines, f"sample: {printable(first.source[:200])}", f"target: {printable(first.target[:200])}"]
        )

    def _read_table(self, data: Paths, source: str, target: str) -> list[Pair]:
        names = ("source", "target") if (source, target) == ("source", "target") else ()
        table = read_table(data, names=names)
        if source == target:
            raise Unsupported(f"source={source} and target={target}", supported="two columns")
        texts = zip(table.texts(source, "source"), table.texts(target, "target"), strict=True)
        pairs = [Pair(one, other, one) for one, other in texts]
        whole = [bool(pair.source.strip() and pair.target.strip()) for pair in pairs]
        self._notes += [*table.notes, *table.left_out(whole, "a source or a target")]
        return list(compress(pairs, whole))

    def _split(
        self, pairs: list[Pair], validation: Paths | None, source: str, target: str, share: float
    ) -> tuple[list[Pair], list[Pair]]:
        distinct = self._distinct(pairs)
        if validation is not None:
            scored = self._distinct(self._read_table(validation, source, target))
            known, sources = {pair.source for pair in distinct}, {pair.source for pair in scored}
            self.shared: int = sum(pair.source in known for pair in scored)
            training = [pair for pair in distinct if self.scored is not None or pair.source not in sources]
            self._rule = "held-out pairs as given"
            if not scored:
                raise Unsupported(f"{names_of(validation)}, which holds no pairs", supported="held-out pairs")
            if not training:
                raise Unsupported(
                    f"held-out data that holds all of the training data: {names_of(validation)}",
                    supported="separate held-out pairs, or no validation: a part is then split off",
                )
            if self.scored is None and (shared := [pair for pair in distinct if pair.source in sources]):
                self._notes.append(overlap_note(len(shared), "pair", validation, shared[0].source))
            return training, scored
        sizes = Counter(pair.group for pair in distinct)
        if len(sizes) < 2:
            raise Unsupported(
                f"{self._named} with {counted(len(sizes), 'different source')}",
                supported="2 or more, to train on and to hold out",
            )
        groups = held_out_groups(sizes, share, self.seed)
        scored = [pair for pair in distinct if pair.group in groups]
        sources = {pair.source for pair in scored}
        training = [pair for pair in distinct if pair.group not in groups and pair.source not in sources]
        if left := len(distinct) - len(scored) - len(training):
            self._notes.append(f"{counted(left, 'training pair')} whose source is also held out left out")
        by = "source text" if self._own else self.by
        named = "" if self._own or len(groups) > 8 else f": {', '.join(sorted(groups))}"
        self._rule = f"by {by}, {len(scored) / len(distinct):.1%} of the pairs held out (seed {self.seed}){named}"
        return training, scored

    def _distinct(self, pairs: list[Pair]) -> list[Pair]:
        distinct = list({(pair.source, pair.target): pair for pair in reversed(pairs)}.values())[::-1]
        if repeated := len(pairs) - len(distinct):
            self._notes.append(f"{counted(repeated, 'repeated pair')} left out")
        return distinct

    def _encode(self, part: str, pairs: list[Pair]) -> list[tuple[Pair, np.ndarray, np.ndarray]]:
        """The pairs that fit, with their tokens; raises Unsupported when too few are left."""
        sources = self.tokenizer.encode_each([pair.source.encode() for pair in pairs])
        targets = self.tokenizer.encode_each([pair.target.encode() for pair in pairs])
        kept = [
            (pair, s[: self.memory_length], t)
            for pair, s, t in zip(pairs, sources, targets, strict=True)
            if len(t) < self.length
        ]
        if not kept:
            raise Unsupported(
                f"length={self.length}, in which no {part} target fits",
                supported="a token more than the targets have",
                nearest=f"length={max(map(len, targets)) + 1}",
            )
        if left := len(pairs) - len(kept):
            told = counted(left, f"{part} pair")
            self._notes.append(f"{told} whose target has {self.length} tokens or more left out")
        if cut := sum(len(s) > self.memory_length for s in sources):
            told = counted(cut, f"{part} source")
            self._notes.append(f"{told} cut after {self.memory_length} tokens")
        return kept

    def _batch(self, chosen: list[tuple[Pair, np.ndarray, np.ndarray]]) -> Batch:
        inputs = np.zeros((len(chosen), self.length), dtype=np.int64)
        targets = np.full((len(chosen), self.length), IGNORED, dtype=np.int64)
        memory = np.zeros((len(chosen), self.memory_length), dtype=np.int64)
        lengths = np.array([[len(s), len(t)] for _, s, t in chosen])
        inputs[:, 0] = self._start
        for row, (_, s, t) in enumerate(chosen):
            inputs[row, 1 : 1 + len(t)] = t
            targets[row, : len(t)] = t
            targets[row, len(t)] = self._end
            memory[row, : len(s)] = s
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(np.arange(self.length) <= lengths[:, 1:]),
            memory=torch.from_numpy(memory),
            memory_valid=torch.from_numpy(np.arange(self.memory_length) < lengths[:, :1]),
        )

    def _decode(self, tokens: list[int]) -> str:
        """Decode tokens up to the end token, without start tokens and ignored positions."""
        before = tokens[: tokens.index(self._end)] if self._end in tokens else tokens
        return self.tokenizer.decode([token for token in before if 0 <= token < self.memory_vocab_size])
