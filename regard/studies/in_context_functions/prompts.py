"""Examples as text for a pretrained language model, which predicts the label of each input from the examples before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from regard.contract import Unsupported

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int

INSTRUCTION = (
    "Each line has an input of bits and the label that an unknown Boolean function gives it. "
    "Find the function, and give the label of the last input.\n"
)


class Prompt:
    """Examples as tokens.

    Args:
        tokenizer: a tokenizer of transformers; the labels 0 and 1 must differ in their last token only.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        zero, one = (self._ids(f" {label}") for label in "01")
        if len(zero) != len(one) or zero[:-1] != one[:-1] or zero[-1] == one[-1]:
            raise Unsupported(
                "a tokenizer whose 0 and 1 differ in more than one token", supported="one token for a digit"
            )
        self.shared, self.labels = zero[:-1], (zero[-1], one[-1])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def read(self, x: Int[np.ndarray, "m n"], y: Int[np.ndarray, " m"]) -> tuple[list[int], list[int]]:
        """Token ids of all examples with their labels, and the positions that predict the labels.

        At each of these positions a causal model predicts the same as for a prompt that ends there.
        """
        ids, asked = list(self.tokenizer(INSTRUCTION)["input_ids"]), []
        for bits, label in zip(x.tolist(), y.tolist(), strict=True):
            shown = " ".join("1" if bit > 0 else "0" for bit in bits)
            ids += self._ids(f"\nInput: {shown}\nLabel:") + self.shared
            asked.append(len(ids) - 1)
            ids.append(self.labels[label > 0])
        return ids, asked


@torch.no_grad()
def ask(
    model: Any, tokenizer: Any, x: Int[np.ndarray, "b m n"], y: Int[np.ndarray, "b m"]
) -> Float[torch.Tensor, "b m"]:
    """Log odds of label 1 against 0 by a model of transformers, for each example given the examples before it."""
    words, found = Prompt(tokenizer), []
    for each in zip(x, y, strict=True):
        ids, asked = words.read(*each)
        logits = model(torch.tensor([ids])).logits[0, asked].float()
        found.append(logits[:, words.labels[1]] - logits[:, words.labels[0]])
    return torch.stack(found)
