"""How much is at work at once: pieces of what would be too large as a whole. Fixed functions of shapes, so that they
change no number, and plans can count with them."""

# O outputs, I inputs of a linear

from __future__ import annotations

from itertools import pairwise

CPU_BATCH_TOKENS = 2048  # measured on one core: larger batches are no faster
DEVICE_BATCH_TOKENS = 16384  # fills one GPU with a block of an 8B model
# Numbers in one piece of logits. On a GPU half a GiB in float32, assumption. On a CPU 8 MiB, that stay in its cache and
# make room for the next: with 32 MiB the head took 1.6 times as long, and the heap grew (builtin:pystdlib).
DEVICE_LOGITS, CPU_LOGITS = 1 << 27, 1 << 21
# That pass the head together on a CPU, however large the vocabulary: for each piece all its weights pass as well.
HEAD_TOKENS = 64
RANKED_AT_ONCE = 1 << 24  # scores; assumption: a GPU is full with far fewer
COLUMNS_AT_ONCE = 4096  # of a Gram matrix in float64: all of one with 28,672 inputs take 6 GiB
WEIGHTS_AT_ONCE = 1 << 25  # that are solved for: 4096 x 4096 and a little more; a GPU is full with fewer


def batch_tokens(on_gpu: bool) -> int:
    """Of a batch of every forward pass over a text, unless one sample has more."""
    return DEVICE_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS


def tokens_at_once(vocabulary: int, on_gpu: bool) -> int:
    """Whose logits are held at once, at most."""
    return max(1, DEVICE_LOGITS // vocabulary) if on_gpu else max(HEAD_TOKENS, CPU_LOGITS // vocabulary)


def pieces_of_logits(tokens: int, vocabulary: int, on_gpu: bool) -> tuple[int, int]:
    """Windows, and tokens of each, whose logits are held at once: a fixed function of the shapes."""
    most = tokens_at_once(vocabulary, on_gpu)
    return (most // tokens, tokens) if tokens <= most else (1, most)


def column_parts(columns: int) -> int:
    """Into how many parts, as even as can be, a matrix is cut that becomes float64."""
    return max(1, -(-columns // COLUMNS_AT_ONCE))


def row_pieces(outputs: int, inputs: int) -> list[slice]:
    """The rows of a weight that are solved for at once: all, but of large ones even pieces, whose number is a function
    of the shape alone. Rows are problems of their own, so that only memory depends on it, and when each piece ends."""
    count = min(outputs, max(1, -(-outputs * inputs // WEIGHTS_AT_ONCE)))
    cuts = [outputs * piece // count for piece in range(count + 1)] if count else []
    return [slice(*ends) for ends in pairwise(cuts)]


def solving_bytes(outputs: int, inputs: int) -> int:
    """While float64 iterates, which takes the most: the scaled Gram matrix, and of the rows that are solved for at once
    five float64 and a bool; beside them either a sixth, or columns of the Gram matrix and a product with only these."""
    columns, rows = -(-inputs // column_parts(inputs)), -(-outputs // len(row_pieces(outputs, inputs)))
    corrected = columns * inputs + (columns * rows if columns < inputs else 0)
    return 8 * inputs**2 + 8 * max(corrected, rows * inputs) + 41 * rows * inputs
