"""What tests of language models of many kinds have in common."""

from pathlib import Path

import torch

from regard import Context
from regard.models import LanguageModel, from_pretrained, save_pretrained


def check_decodes_as_it_reads_and_comes_back_from_disk(
    model: LanguageModel, ids: torch.Tensor, prompt: int, folder: Path
) -> None:
    """A prompt, then token by token, equals the whole; and so does the model when it has been saved and loaded."""
    whole = model(ids).output
    state = model(ids[:, :prompt], context=Context(want=frozenset({"state"}))).state
    for t in range(prompt, ids.shape[1]):
        result = model(ids[:, t : t + 1], state=state)
        torch.testing.assert_close(result.output[:, 0], whole[:, t])
        state = result.state
    save_pretrained(model, folder)
    assert torch.equal(from_pretrained(folder)(ids).output, whole)
