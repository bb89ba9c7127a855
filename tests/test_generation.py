"""Acceptance of the language model: every causal mechanism trains on text and generates through its state."""

import pytest
import torch
from support import ALL

from regard import get_mechanism, list_mechanisms
from regard.contract import Kind, Pattern
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.generation import sample
from regard.tasks import create_task
from regard.training import TrainConfig, train

CAUSAL = [n for n in list_mechanisms(pattern=Pattern.CAUSAL_SELF) if get_mechanism(n).kind is not Kind.PROJECTION]
PLANS: dict[str, list] = {name: [name] * (2 if ALL else 1) for name in CAUSAL}
PLANS |= {
    "token_parameter projections": [("softmax", {"linear": "token_parameter"})] * (2 if ALL else 1),
    "hybrid": ["gated_linear", "local", "softmax"],
}


@pytest.fixture(scope="module")
def text():
    return create_task("text", length=32, evaluation_items=8)


def drawing():
    return torch.Generator().manual_seed(1)


def check_generation(model, prompt, tokens, temperature):
    """Assert that generating through the state gives the tokens that rereading the whole sequence each time would."""
    through_state = model.generate(prompt, tokens, temperature=temperature, generator=drawing())
    assert through_state.shape == (2, tokens)
    logits = model(torch.cat([prompt, through_state], 1)).output[:, prompt.shape[1] - 1 : -1]
    generator = drawing()
    whole = [sample(now, temperature=temperature, generator=generator) for now in logits.unbind(1)]
    assert torch.equal(through_state, torch.stack(whole, 1))
    return through_state


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_generation_through_the_state_equals_recomputing(plan, text):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(text.vocab_size, dim=32, plan=plan, num_heads=2))
    history = train(model, text, TrainConfig(steps=12, batch_size=4, learning_rate=1e-2, measure_memory=False))
    assert history.finished and history.final_loss < history.curve[0].loss - 0.5
    prompt = text.training_batch(0, 1, 2).inputs[:, :30]
    # greedy text of a barely trained model may repeat itself; sampled text does not, and shows any drift of the logits
    drawn = check_generation(model.double().eval(), prompt, 110, 1.0)  # past blocks and windows of 32, 64 and 128
    assert drawn.unique().numel() > 10


def test_the_likeliest_text_through_the_state_is_that_of_recomputing(text):
    model = LanguageModel(LanguageModelConfig(text.vocab_size, dim=32, plan=PLANS["hybrid"], num_heads=2))
    check_generation(model.double().eval(), text.training_batch(0, 1, 2).inputs[:, :30], 40, 0.0)
