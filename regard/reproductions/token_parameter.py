"""TokenFormer (Wang et al., arXiv 2410.23168): a model that grows by parameter tokens continues from where it was.

The paper (table of the authors' repository, OpenWebText2): a model grown from 354M to 757M parameters and trained for
60k more iterations has a perplexity of 10.9; a Transformer of that size trained from scratch has 12.0 after 60k and
10.5 after 600k iterations.

Here: bytes of Python's standard library in windows of 128, 2 layers of width 64 with 4 heads; the q, k, v and output
projections have 32 parameter tokens and the feed-forward 128; they are trained for 400 steps, then with twice as many
tokens for 150 steps more. The comparisons are the large model from scratch for 150 and for 550 steps, the small one for
150 more, and the small one for 550 steps of a single schedule, which shows whether the larger size helps here at all.
New keys are zero and tau is kept, so that growth alone does not change the outputs; with tau = sqrt(n), as in the
authors' code, it does. After growth all weights are trained, the schedule restarts, and the optimizer's state is not
carried over. Norms have no weights; positions are rotary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import Context, create_layer
from regard.contract import Result
from regard.layers.linear import make_linear
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import BIGRAMS, cached_task, fit, score
from regard.tasks import Task

TRAINING = {"before": 400, "after": 150, "batch_size": 32, "learning_rate": 3e-3, "items": 64}
DIM, HEADS, LAYERS, SMALL = 64, 4, 2, 32


class TokenFormer(nn.Module):
    """A language model whose projections are all attention to parameter tokens.

    Args:
        tokens: parameter tokens of each attention projection; the feed-forward has four times as many.
        tau_mode: `tau_mode` of the parameter attention.
    """

    def __init__(self, vocab_size: int, tokens: int, tau_mode: str) -> None:
        super().__init__()
        own: dict[str, Any] = {"tau_mode": tau_mode, "num_layers": LAYERS}
        self.embedding = nn.Embedding(vocab_size, DIM)
        projections: dict[str, Any] = {"linear": "token_parameter", "linear_options": own | {"num_tokens": tokens}}
        self.attention = nn.ModuleList(
            create_layer("softmax", DIM, HEADS, positions="rotary", **projections) for _ in range(LAYERS)
        )
        self.feed_forward = nn.ModuleList(
            make_linear(DIM, DIM, kind="token_parameter", num_tokens=4 * tokens, **own) for _ in range(LAYERS)
        )
        self.head = make_linear(DIM, vocab_size)

    def forward(self, ids: Tensor, *, context: Context | None = None) -> Result:
        x = self.embedding(ids)
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = x + attention(F.layer_norm(x, (DIM,)), context=context).output
            x = x + feed_forward(F.layer_norm(x, (DIM,)))
        return Result(self.head(F.layer_norm(x, (DIM,))))


@torch.no_grad()
def grown(model: TokenFormer, vocab_size: int, tau_mode: str) -> TokenFormer:
    """Return the model with twice as many parameter tokens; new ones have zero keys and random values."""
    larger = TokenFormer(vocab_size, 2 * SMALL, tau_mode)
    for (name, new), old in zip(larger.named_parameters(), model.parameters(), strict=True):
        if name.endswith("key_tokens"):
            new.zero_()
        new[: len(old)] = old
    for tau, old_tau in zip(larger.buffers(), model.buffers(), strict=True):
        tau.copy_(old_tau)  # tau as before growth
    return larger


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the loss of a model grown, trained from scratch or continued, and how far growth alone moved its loss."""
    task = cached_task("text", length=128, evaluation_items=setting["items"])
    vocab, how, before, after = task.vocab_size or 0, setting["how"], setting["before"], setting["after"]
    if how.startswith(("scratch", "small")):
        steps = after if how == "scratch, short" else before + after
        tokens = SMALL if how == "small, long" else 2 * SMALL
        return finish(TokenFormer(vocab, tokens, "fixed"), task, setting, seed, steps)
    tau_mode = "sqrt_n" if how == "grown, sqrt_n" else "fixed"
    model = TokenFormer(vocab, SMALL, tau_mode)
    if not fit(model, task, setting, seed, steps=before):
        return {"loss": math.nan, "jump": math.nan}
    loss = score(model, task)["loss"]
    if how == "continued":
        return finish(model, task, setting, seed + 1000, after)
    model = grown(model, vocab, tau_mode)
    return {"jump": abs(score(model, task)["loss"] - loss), **finish(model, task, setting, seed + 1000, after)}


def finish(model: TokenFormer, task: Task, setting: Setting, seed: int, steps: int) -> dict[str, float]:
    """Train a model further; return its loss, nan if it diverged."""
    return {"loss": score(model, task)["loss"] if fit(model, task, setting, seed, steps=steps) else math.nan}


REPRODUCTION = Reproduction(
    name="token_parameter",
    mechanisms=("token_parameter",),
    claim=(
        "A grown model goes on from where it stood: perplexity 10.9 after 60k iterations where one from scratch has 12.0 (the "
        "authors' table)."
    ),
    instead=(
        "Loss in nats on code bytes, 2 layers of width 64: 400 steps small and 150 grown to twice the parameter tokens, "
        "against 150 and 550 steps large from scratch, 150 more steps small, and 550 small."
    ),
    settings={
        how: TRAINING | {"how": how}
        for how in ("grown", "grown, sqrt_n", "continued", "scratch, short", "scratch, long", "small, long")
    },
    run_cell=run_cell,
    checks=(
        Check("growing with tau kept changes the loss by less than 1e-5", measured("grown", "jump"), below=1e-5),
        Check("growing with sqrt(n) changes it by more than 1e-3", measured("grown, sqrt_n", "jump"), above=1e-3),
        Check("scratch loses at equal large steps", minus("scratch, short", "grown", "loss"), above=0.0),
        Check("within 0.05 nats of scratch at equal steps in all", minus("grown", "scratch, long", "loss"), below=0.05),
        Check("not worse than going on without growth", minus("grown", "continued", "loss"), below=0.0),
    ),
    needs=(
        Check("scratch, long learns more than bigrams (2.49 nats)", measured("scratch, long", "loss"), below=BIGRAMS),
        Check(
            "the larger size is worth 0.02 nats at equal steps",
            minus("small, long", "scratch, long", "loss"),
            above=0.02,
        ),
    ),
    left_out=(
        "a Transformer of linear layers from scratch: its 12.0 and 10.5 are of another model, which differs by more than growth",
        "124M to 1.4B parameters in several steps: one growth to twice the tokens is tried",
        "a cost of attention that does not grow with the model: the width stays the same by construction",
    ),
    smoke={"before": 2, "after": 2, "batch_size": 2, "items": 4},
    seconds=45,
)
