r"""Sequential position encoding: a small transformer reads the digits of a position (Li et al., arXiv 2506.13277).

A position p below P_max is written in base b with k digits, padded with zeros on the left, where k is the number of
digits of P_max - 1; a position on n axes is written axis after axis, with L = n k digits. The encoder E is

    h = Tok[digit] + Pos[place] (+ Axis[axis]),   then a vector CLS without a place, last
    h = h + attention(norm(h)),   h = h + W_2 gelu(W_1 norm(h))        (twice; causal: the last token sees all digits)
    E(p) = W_out norm(h_CLS) / temperature

so that every position below P_max has a vector, and close positions share their leading digits. With
``(e^q, e^k) = split(W E(p))``, there is a scheme for each place where the vectors are used:

================ ======================================= ==========================================================
scheme           paper's name                            effect
================ ======================================= ==========================================================
``seqpe``        input_add                               x + E(p), at the model's input
``seqpe_mul``    attn_mul (its choice for images)        q * e^q, k * e^k
``seqpe_add``    attn_add                                q + e^q, k + e^k
``seqpe_scalar`` attn_scalar (its choice for text)       scores (q k^T + s e^q (e^k)^T) / sqrt(D)
================ ======================================= ==========================================================

Scores are added by widening queries and keys to ``sqrt(2) [q, sqrt(s) e^q]`` and ``[k, sqrt(s) e^k]``: a mechanism
whose scale is the inverse root of the width then computes exactly these scores, and the keys can be cached.

In training, two losses keep order among positions that the task has not seen (weights 0.1 in the models):

- ``position_contrast``: cross entropy over E(p) . E(c_j), where the label is the candidate closest to p. Candidates are
  uniform, or partly edits of p's digits (if farther away than the closest candidate), or all from one window.
- ``position_transfer``: the similarities softmax(A A^T) of offsets O within the block of the call, A = E(O), teach the
  similarities of the same offsets elsewhere, A' = E(s + O), by the symmetric KL divergence for each head, averaged over
  all elements.

In a share of the training calls (`shift`) the block is moved to a random start; these calls have no transfer loss.

Deviations: one start for each call, where the authors use several for parts of a batch; draws are made in the process,
from the call's generator; the range is divided into equal parts with one pivot each, instead of a shuffled pass;
candidates that equal the pivot or another candidate are masked instead of being drawn again.

A class token has no position on the grid. A model learns a vector for it that stands in for E(p) (`before` of
:meth:`SequentialEncoding.prepare`), as :mod:`regard.models.vision.vit` does.
"""

from regard.positions.seqpe.definition import DigitEncoder, closest_loss, digit_count, to_digits, transfer_loss
from regard.positions.seqpe.encoding import SequentialEncoding
from regard.positions.seqpe.schemes import Seqpe, SeqpeAdd, SeqpeMul, SeqpeScalar

__all__ = [
    "DigitEncoder",
    "Seqpe",
    "SeqpeAdd",
    "SeqpeMul",
    "SeqpeScalar",
    "SequentialEncoding",
    "closest_loss",
    "digit_count",
    "to_digits",
    "transfer_loss",
]
