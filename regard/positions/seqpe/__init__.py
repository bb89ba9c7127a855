r"""Sequential position encoding: a small transformer reads the digits of a position (Li et al., arXiv 2506.13277).

A position p below P_max is written in base b with k digits, zeros on the left, k being the number of digits of P_max - 1; a
position of n axes is written axis after axis, L = n k digits. The encoder E is

    h = Tok[digit] + Pos[place] (+ Axis[axis]),   then a vector CLS without a place, last
    h = h + attention(norm(h)),   h = h + W_2 gelu(W_1 norm(h))        (twice; causal: the last token sees all digits)
    E(p) = W_out norm(h_CLS) / temperature

so that any position below P_max has a vector, and close ones are written alike at the front. What becomes of it, with
``(e^q, e^k) = split(W E(p))``, has a name for each place:

================ ======================================= ==========================================================
scheme           paper's name                            effect
================ ======================================= ==========================================================
``seqpe``        input_add                               x + E(p), at the model's input
``seqpe_mul``    attn_mul (its choice for images)        q * e^q, k * e^k
``seqpe_add``    attn_add                                q + e^q, k + e^k
``seqpe_scalar`` attn_scalar (its choice for text)       scores (q k^T + s e^q (e^k)^T) / sqrt(D)
================ ======================================= ==========================================================

Scores are added by widening: ``sqrt(2) [q, sqrt(s) e^q]`` and ``[k, sqrt(s) e^k]``, on which a mechanism whose scale is
the inverse root of the width computes exactly these, and which a cache of keys can keep.

While training, two losses keep order among positions that the task has not seen (weights 0.1 in the models):

- ``position_contrast``: cross entropy over E(p) . E(c_j), the label being the candidate closest to p. Candidates are
  uniform, or in part edits of p's digits (where these are farther than the closest), or all from one window.
- ``position_transfer``: the similarities softmax(A A^T) of offsets O within the block of the call, A = E(O), are what
  those of the same offsets elsewhere, A' = E(s + O), learn from: KL both ways, mean over all elements, for each head.

In a share of the training calls (`shift`) the block is moved to a random start, and then nothing is transferred.

Deviations: one start for each call where the authors use several for parts of a batch; draws are in the process, from
the call's generator; a pivot for each of as many equal parts of the range instead of a shuffled pass; candidates that
are the pivot or a repetition get no weight instead of being drawn again; a class token is the host's affair.
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
