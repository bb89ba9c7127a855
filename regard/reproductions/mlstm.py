"""xLSTM (Beck et al., arXiv 2405.04517): a matrix memory with exponential gating recalls more pairs than one without.

The paper (section 4): at recalling up to 256 pairs in 2048 tokens xLSTM is the best of the models that are not
Transformers, and both the matrix memory and the exponential gates improve language models.

Here: 16 pairs and 32 queries in 128 tokens, 2 layers of width 64 with one head of 8 key features, so that the state is
the bottleneck. The control is gated linear attention with one gate a head: the same memory and forget gate without
input gate and normaliser. All have a short convolution, as the paper's block has. Softmax is the upper end and is not
judged.
"""

from regard.reproductions.framework.judging import Check, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, language_model, trained_score

TRAINING = {"steps": 700, "batch_size": 64, "learning_rate": 3e-3, "items": 512}
SHAPE = {"head_dim": 8, "value_dim": 64, "short_convolution": 4}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    task = cached_task("recall", length=128, pairs=16, queries=32, vocab_size=64, evaluation_items=setting["items"])
    model = language_model(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=1)
    return trained_score(model, task, setting, seed)


REPRODUCTION = Reproduction(
    name="mlstm",
    mechanisms=("mlstm",),
    claim="A matrix memory with exponential gating recalls more than other recurrent memories (section 4).",
    instead=(
        "Recall of 16 pairs, accuracy: mLSTM against the same memory and forget gate without input gate and normaliser. "
        "Two layers of width 64, 8 key features, 700 steps; no 256 pairs, no language model."
    ),
    settings={
        "mlstm": TRAINING | {"mixer": "mlstm", "options": SHAPE},
        "gated_linear": TRAINING | {"mixer": "gated_linear", "options": SHAPE | {"gate": "scalar"}},
        "softmax": TRAINING | {"mixer": "softmax", "options": SHAPE},
    },
    run_cell=run_cell,
    checks=(Check("mLSTM above gated linear", minus("mlstm", "gated_linear"), above=0.0),),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seconds=45,
)
