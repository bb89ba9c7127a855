"""Speculative decoding of transformers models: their caches are cut back, or the model is refused."""

import pytest
import torch

import regard
from regard import Unsupported
from regard.models.speculation import ModelDraft, PromptLookup, Speculation

transformers = pytest.importorskip("transformers")
from regard.integrations.transformers.speculation import ReadCausalModel  # noqa: E402


def llama(seed, layers=2):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=24, num_hidden_layers=layers, initializer_range=0.3, eos_token_id=None, **sizes
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("draft", ["a model", "a lookup"])
def test_the_likeliest_text_is_that_of_generate(draft):
    target = llama(0)
    ids = torch.randint(24, (1, 9))
    alone = target.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 9:]
    proposes = PromptLookup() if draft == "a lookup" else ModelDraft(ReadCausalModel(llama(1, 1)))
    speculation = Speculation(ReadCausalModel(target), proposes, count=3)
    found = [int(token) for token in speculation.stream(ids, 30)]
    assert found == alone.tolist()
    assert speculation.counts.kept < speculation.counts.proposed, "nothing was ever cut back"


def test_a_cache_that_cannot_be_cut_is_refused():
    target = llama(0)
    regard.swap(target, "gated_linear")
    speculation = Speculation(ReadCausalModel(target), PromptLookup())
    with pytest.raises(Unsupported, match="cannot be cut back"):
        next(speculation.stream(torch.randint(24, (1, 9)), 5))
