"""Scratchformer: build a language model from scratch, in one file you can read.

It contains a byte-level BPE tokenizer, a Transformer with RoPE, SwiGLU and
RMSNorm, a memory-mapped data loader, and a training loop for a laptop, one GPU,
or many GPUs with FSDP. It needs Python 3.10 and three packages (pip install
torch regex numpy). To start, in a clone of the repository:

    python scratchformer.py demo

This trains a tokenizer and a small model on the bundled synthetic stories, and
generates a story, in about two minutes. `demo --text_path DIR` does this with
your own text. All commands, each of which explains its flags with --help:

    split        hold out part of your own text for validation
    bpe-train    learn a vocabulary from text
    bpe-encode   turn text into a file of token ids
    train        train a Transformer on token files
    eval         evaluate a model on token files or text
    generate     generate text with a trained model
    export       convert a model for Hugging Face transformers
    demo         run most of the above
"""

# How to read this file
# ---------------------
# Part One is a complete language model, in plain Python and PyTorch: from a string of text to a
# generated story. Read it from the top. Nothing in it depends on what comes later.
#
#   PART ONE: A LANGUAGE MODEL                 PART TWO: SPEED
#    1  Pre-tokenization                        8  Tokenizing corpora
#    2  Learning merges                         9  Faster steps
#    3  The tokenizer                          10  Muon
#    4  Data                                   11  Faster generation
#    5  The Transformer                        PART THREE: LONG RUNS ON MANY DEVICES
#    6  Training                               12  Many devices
#    7  Generation                             13  Checkpoints
#                                              14  The training run
#   PART FOUR: IN USE
#   15  Published models                       16  Command line
#
# A comment that starts with WHY gives the reason for a choice; TRAP warns of a mistake that is
# easy to make there. Lines that start with >>> are examples, which the tests run.

from __future__ import annotations

import sys

# Skip these lines; they only save time. Importing PyTorch takes seconds, and for commands that
# don't use it, a stub replaces it: an object that returns itself for any attribute.
NO_PYTORCH = {"-h", "bpe-train", "bpe-encode", "split"}
if __name__ != "scratchformer" and ("--help" in sys.argv or {*sys.argv[1:2]} & NO_PYTORCH):
    sys.modules["torch"] = sys.modules["torch.nn"] = type("Stub", (), {
        "__getattr__": lambda self, name: self, "__mro_entries__": lambda self, bases: (),
        "__call__": lambda self, *args, **_: args[0] if args else self})()  # fmt: skip

# ========================================================================================
# PART ONE: A LANGUAGE MODEL
#
# A language model reads the beginning of a text and predicts what comes next. Chapters 1 to 3
# turn text into numbers and back, 4 cuts them into examples, 5 builds the model, 6 trains it,
# and 7 generates a story. After a minute of training on two million characters of synthetic
# stories, the last function of Part One, which does all of this in 20 lines, returns:
#
#     Once there was a friendly child named Leo who had a merry golden deer. Her true friend
#     Pepper, a shy lamb, enjoyed hiking and painting bees. On Monday morning, Anna saw a yellow
#     kite in a new clock near the tiny bin.
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 1. Pre-tokenization
#
# A model computes with numbers, so text must become a list of integers. One integer per
# character makes long lists, and one per word needs an unbounded vocabulary. Byte-pair
# encoding (BPE, next chapter) is the middle ground: its *tokens* are byte sequences that
# occur often, from single bytes up to whole words.
#
# First, a regular expression splits the text into *pre-tokens*, roughly words. A token never
# crosses the boundary of a pre-token, so " dog", " dog." and " dog!" share the token " dog"
# instead of becoming three unrelated ones. (Radford et al. 2019, GPT-2, section 2.2)
# ----------------------------------------------------------------------------------------

from collections import Counter

import regex  # like Python's `re`, but it knows \p{L}, any letter, and \p{N}, any digit

# GPT-2's pattern. At each position the first alternative that matches wins: an English
# contraction; letters, digits or punctuation, each with one optional space in front; or
# whitespace. So a space belongs to the word that follows it and needs no token of its own.
#
# `\s+(?!\S)` is for several spaces in a row. `(?!\S)` means: no visible character comes next.
# So before a word, the match backs up by one and leaves the last space for the word: "a   b"
# becomes "a", "  ", " b". The last `\s+` takes what is left: a newline before a word.
PRETOKEN_PATTERN = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)

END_OF_TEXT = "<|endoftext|>"  # stands between documents, such as stories


def pretokenize(text: str) -> list[str]:
    """Split `text` into pre-tokens. Joining them gives `text` again.

    >>> pretokenize("It's 3 o'clock,  isn't it?")
    ['It', "'s", ' 3', ' o', "'", 'clock', ',', ' ', ' isn', "'t", ' it', '?']
    """
    return regex.findall(PRETOKEN_PATTERN, text)


# Tokens are made of bytes, not characters. In UTF-8, "a" is one byte, "é" two and "漢" three.
# There are only 256 possible bytes, and all text is made of them, so no character is unknown.


def count_pretokens(text: str) -> Counter[bytes]:
    """How often each pre-token occurs in `text`, as UTF-8 bytes. END_OF_TEXT isn't counted.

    >>> count_pretokens("to be<|endoftext|>to be or not to be").most_common(3)
    [(b' be', 3), (b'to', 2), (b' or', 1)]
    """
    counts: Counter[bytes] = Counter()
    for document in text.split(END_OF_TEXT):
        counts.update(pretoken.encode("utf-8") for pretoken in pretokenize(document))
    return counts


# Exercises
# 1. Predict what `pretokenize(" 2024 24,000")` gives, then try it.
# 2. Remove `\s+(?!\S)|` from PRETOKEN_PATTERN and split "a  b". Which pre-token gets the second
#    space now? What would that mean for the word " b"?


# ----------------------------------------------------------------------------------------
# 2. Learning merges
#
# Which byte sequences deserve a token of their own? Byte-pair encoding answers greedily:
# start with the 256 single bytes, find the pair of adjacent tokens that occurs most often,
# make that pair a new token, and repeat until the vocabulary has the size you want.
# (Sennrich et al. 2016, arXiv 1508.07909, Algorithm 1)
# ----------------------------------------------------------------------------------------

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Merge = tuple[bytes, bytes]  # two tokens that become one


def merge_pair(tokens: Sequence[bytes], pair: Merge) -> list[bytes]:
    """`tokens` with each occurrence of `pair`, from left to right, joined into one token.

    >>> merge_pair([b"l", b"o", b"w", b"l", b"o"], (b"l", b"o"))
    [b'lo', b'w', b'lo']
    >>> merge_pair([b"a", b"a", b"a"], (b"a", b"a"))
    [b'aa', b'a']
    """
    result: list[bytes] = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            result.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


def learn_merges_naive(pretoken_counts: Mapping[bytes, int], num_merges: int) -> list[Merge]:
    """Up to `num_merges` merges, in the order learned; fewer if no pair is left.

    Here are five words, with how often each occurs, and the pairs that are merged. A blank
    means that the word stays as it was.

        start             merge s + t       merge e + st      merge o + w    merge l + ow

        l o w        5                                        l ow           low
        l o w e r    2                                        l ow e r       low e r
        n e w e s t  6    n e w e st        n e w est
        w i d e s t  3    w i d e st        w i d est
        s l o w      1                                        s l ow         s low

    At first "es" and "st" both occur 6 + 3 = 9 times. Of equally frequent pairs, the
    lexicographically greatest is merged: "st", since "s" comes after "e". Then "e" + "st"
    occurs 9 times. Then "lo" and "ow" occur 5 + 2 + 1 = 8 times each, and "o" comes after "l".

    >>> words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3, b"slow": 1}
    >>> learn_merges_naive(words, 4)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w'), (b'l', b'ow')]
    """
    words = [([bytes([byte]) for byte in word], n) for word, n in pretoken_counts.items()]
    merges: list[Merge] = []
    while len(merges) < num_merges:
        pair_counts: Counter[Merge] = Counter()
        for tokens, n in words:
            for pair in zip(tokens, tokens[1:]):
                pair_counts[pair] += n
        if not pair_counts:
            break  # every word is a single token
        # WHY the pair is part of the key: ties are common. By count alone the winner would be
        # whichever pair came first, and the same text in another order would give another
        # tokenizer. Any fixed rule will do; this one takes the greatest pair.
        best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        merges.append(best)
        words = [(merge_pair(tokens, best), n) for tokens, n in words]
    return merges


# Exercises
# 1. Choose by count alone: `max(pair_counts, key=pair_counts.get)`. The example's first merge
#    is now (b"e", b"s"), which happened to be counted first.
# 2. Which merge comes fifth in the example? Work it out by hand, then check.


# ----------------------------------------------------------------------------------------
# 3. The tokenizer
#
# A trained tokenizer is a list of merges. To *encode* text, split it into pre-tokens, split
# each of those into bytes, and apply the merges in the order in which they were learned. To
# *decode* ids, look up their bytes and join them. (Sennrich et al. 2016, section 3.2)
#
# One more token is neither a byte nor learned. A *special token* marks something that isn't
# text; ours, END_OF_TEXT, marks the end of a document. It has a single id, and is cut out
# before the pattern sees the text.
# ----------------------------------------------------------------------------------------


class BPETokenizer:
    """Byte-level BPE: text to token ids, and back to the same text.

    Ids 0 to 255 are the single bytes, 256 + i is the token that merge i makes, and the last id
    is END_OF_TEXT.

    A worked example with three merges. "then" starts as the bytes t, h, e, n. Merge 0 makes
    th, e, n; merge 1 makes the, n; merge 2 looks for h + e and finds none. So "then" is the
    token of merge 1, id 257, and the byte n, id 110.

    >>> tokenizer = BPETokenizer([(b"t", b"h"), (b"th", b"e"), (b"h", b"e")])
    >>> tokenizer.encode("then<|endoftext|>he")  # 259 is END_OF_TEXT, 258 is "he"
    [257, 110, 259, 258]
    >>> tokenizer.decode([257, 110, 259])
    'then<|endoftext|>'
    """

    def __init__(self, merges: Sequence[Merge]):
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [left + right for left, right in merges]
        self.eot_id = len(tokens)
        tokens.append(END_OF_TEXT.encode("utf-8"))
        self.vocab_size = len(tokens)
        self.vocab = dict(enumerate(tokens))  # id to bytes
        self.id_of = {token: i for i, token in enumerate(tokens)}  # and bytes to id
        # The *rank* of a pair is its place in the list of merges: the lower, the earlier.
        self.rank_of = {pair: rank for rank, pair in enumerate(merges)}
        self.cache: dict[bytes, list[int]] = {}  # the ids of pre-tokens seen before

    def encode_pretoken(self, pretoken: bytes) -> list[int]:
        """The ids of one pre-token. Merge the lowest-ranked pair until no pair has a rank.

        This applies the merges in the order learned. Going by rank never has to go back to an
        earlier merge: the pairs that a merge creates contain its new token, which no other
        merge makes, so they were learned later. "t" + "h", for example, creates "th" + "e".
        """
        tokens = [bytes([byte]) for byte in pretoken]
        while True:
            pairs = [pair for pair in zip(tokens, tokens[1:]) if pair in self.rank_of]
            if not pairs:
                return [self.id_of[token] for token in tokens]
            tokens = merge_pair(tokens, min(pairs, key=self.rank_of.__getitem__))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. END_OF_TEXT in it becomes its own id."""
        ids: list[int] = []
        for i, document in enumerate(text.split(END_OF_TEXT)):
            if i > 0:
                ids.append(self.eot_id)
            for pretoken in pretokenize(document):
                data = pretoken.encode("utf-8")
                if data not in self.cache:  # words repeat
                    self.cache[data] = self.encode_pretoken(data)
                ids += self.cache[data]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD.

        TRAP: decode ids together, not one by one. The bytes of a character can be spread over
        several tokens, and only the joined bytes are valid.
        """
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


# Exercises
# 1. In `encode_pretoken`, merge the leftmost pair that has a rank, `pairs[0]`, instead of the
#    one of lowest rank. With the merges h + e and t + h, in this order, which ids does "the"
#    get now?
# 2. Encode "Ünï" with the tokenizer of the example, then decode the ids one by one and all
#    together.


# ----------------------------------------------------------------------------------------
# 4. Data
#
# A corpus is one long sequence of token ids. We cut *windows* of T + 1 tokens out of it; T, the
# *context length*, is how much text the model sees at once. One window is T training examples:
# after its first token comes its second, after its first two comes its third, and so on. So the
# inputs are a window without its last token, the targets are the same window one token later,
# and B windows are a *batch*. A training *step* processes one batch, and an *epoch* is one pass
# over the corpus: every window once, in random order. The order depends only on the seed, so
# the same seed always gives the same batches.
# ----------------------------------------------------------------------------------------

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The ids can be in any array: np.array(tokenizer.encode(text)); or, if they are too many to fit
# in memory, np.memmap("train.bin", "<u2", mode="r"), a file of two bytes per id that stays on
# disk until a part of it is read.


def cut_windows(
    tokens: np.ndarray, starts: Iterable[int], context_length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [B, T], of the windows that begin at `starts`.

    >>> inputs, targets = cut_windows(np.array([10, 11, 12, 13, 14, 15]), [0, 2], 3)
    >>> inputs
    tensor([[10, 11, 12],
            [12, 13, 14]])
    >>> targets
    tensor([[11, 12, 13],
            [13, 14, 15]])
    """
    rows = [tokens[start : start + context_length + 1] for start in starts]
    windows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, T) each


@functools.lru_cache(2)  # keep two results: a batch may straddle two epochs
def shuffle_windows(seed: int, epoch: int, num_tokens: int, context_length: int) -> np.ndarray:
    """The positions where the windows of one epoch begin, in random order; an array of int64.

    The windows lie end to end: the last target of one is the first input of the next. The first
    begins at a random offset below T, so that most epochs cut the text at different places.
    Here are the inputs for 29 tokens and T = 5. The offset is 4 in epoch 0 and 2 in epoch 1:

        epoch 0    ....[ 4- 8][ 9-13][14-18][19-23].....
        epoch 1    ..[ 2- 6][ 7-11][12-16][17-21].......

    Every epoch has 29 // 5 - 1 = 4 windows. That many always fit: with the largest offset, 4,
    the targets of the fourth end at 4 + 4 * 5 = 24, and a fifth would end at 29, one too far.

    >>> shuffle_windows(0, 0, 29, 5).tolist(), shuffle_windows(0, 1, 29, 5).tolist()
    ([14, 4, 9, 19], [7, 17, 2, 12])
    """
    rng = np.random.default_rng([seed, epoch])  # the same two numbers, the same order
    offset = rng.integers(context_length)
    return offset + context_length * rng.permutation(num_tokens // context_length - 1)


def get_batch(
    tokens: np.ndarray, context_length: int, seed: int, indices: range
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [B, T], of the windows with these indices.

    Windows are numbered from 0 in the order in which training sees them, across epochs. With B
    windows per batch, step s sees s * B, ..., s * B + B - 1. WHY numbers: with the seed, they
    are enough to reproduce any batch of a run.

    A window may start in the middle of a document and run into the next one. From the
    END_OF_TEXT between them, the model can learn that they are unrelated.
    """
    num_windows = len(tokens) // context_length - 1  # per epoch
    if num_windows < 1:
        raise ValueError(f"{len(tokens)} tokens are fewer than two windows of {context_length}")
    starts = []
    for i in indices:
        epoch, index = divmod(i, num_windows)
        starts.append(shuffle_windows(seed, epoch, len(tokens), context_length)[index])
    return cut_windows(tokens, starts, context_length)


# Exercises
# 1. Encode some text, take `get_batch(tokens, 64, 1, range(2))`, and decode one row of inputs
#    and of targets (`inputs[0].tolist()`): the same text, one token apart.
# 2. Sample with replacement, as many projects do: let every window start at a random place,
#    `np.random.default_rng(1).integers(len(tokens) - T, size=B)`. In one epoch, what fraction
#    of the tokens does the model then never see? (Close to 1 / e.)


# ----------------------------------------------------------------------------------------
# 5. The Transformer
#
# We need a function from T tokens to a prediction of each next token. Look up a vector of D
# numbers for every token, then pass it through a stack of identical blocks, each of which adds
# two updates to it: attention mixes in information from earlier tokens; an MLP (multilayer
# perceptron: matrices and a nonlinearity) works on each position separately. At the end, a
# matrix turns each vector into V scores, the *logits*, one per possible token.
# (Vaswani et al. 2017, arXiv 1706.03762, with the changes of Llama: Touvron et al. 2023,
# arXiv 2302.13971, section 2.2)
# ----------------------------------------------------------------------------------------

import dataclasses
import math

# The parts of PyTorch that we use: a Tensor is an array of numbers. An nn.Parameter is a tensor
# to be learned. An nn.Module is a function with parameters; calling it runs its `forward`. It
# may contain other modules. A parameter's name says where it is: blocks.0.attention.qkv.weight.
# nn.Embedding(V, D) is a table with one row of D numbers per token. nn.Linear(a, b) multiplies
# by a matrix (a *matmul*): a vector of `a` numbers becomes one of `b` numbers. (It stores the
# matrix as [b, a] and computes x @ W.T; formulas here just say x @ W.)
#
# Shapes use one letter per dimension, here and in the rest of the file:
#
#   B batch (sequences)        D model width (d_model)      H attention heads, explained below
#   T time (positions)         F MLP width (d_ff)           K width of one head, D / H
#   V vocabulary
#
# (In code, F is torch.nn.functional, as in F.softmax, and .T transposes a matrix.) Functions
# named ..._naive are for reading; tests check faster equivalents against them.


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension. The shape stays the same.

    The entries of every vector come out with a mean square of 1 (before `weight` scales them),
    so no layer has to cope with very large or small inputs. `eps` avoids a division by 0.
    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    Worked example: the mean square of 3 and 4 is 12.5, and 3 / sqrt(12.5) = 0.8485.

    >>> RMSNorm(2)(torch.tensor([3.0, 4.0])).data
    tensor([0.8485, 1.1314])
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # TRAP: use float32. GPUs are faster with 16 bits per number, but in one such format,
        # float16, squares overflow, and the other, bfloat16, has too few digits for a mean.
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (x_float * scale * self.weight).type_as(x)


# Attention
# ---------
# Attention is a soft dictionary lookup. From the vector x of each position, three matrices
# produce three vectors: a *query* q = x @ W_q, what the position is looking for; a *key*, what
# it can be found by; and a *value*, what it has to contribute. How well does a key match a
# query? Take the dot product. Vectors that point the same way have a large one,
# (1, 2) . (2, 4) = 10; perpendicular vectors have (1, 2) . (-2, 1) = 0; opposite ones have a
# negative one. So for vectors of similar length the dot product measures similarity. Training
# makes a query and a key that belong together point the same way.
#
# Softmax turns the scores into fractions that add up to 1, and each position takes the average
# of all values weighted by them, so mostly of those whose keys match its query.


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last dimension: positive numbers that add up to 1.

    Subtracting the maximum first doesn't change the result and keeps exp from overflowing.

    >>> softmax(torch.tensor([1.0, 2.0, 3.0]).log())  # exp undoes log: 1, 2, 3 over 6
    tensor([0.1667, 0.3333, 0.5000])
    """
    exp = (x - x.amax(-1, keepdim=True)).exp()
    return exp / exp.sum(-1, keepdim=True)


def attention_naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q @ k.T / sqrt(K)) @ v for q, k, v [..., T, K]; shaped like q.

    Where `mask` [T, T] is False, a query (row) doesn't see a key (column). None stands for the
    *causal* mask, the lower triangle: position t sees positions 0 to t. That lets us train on
    all positions of a window at once, since none of them can see the token it should predict.
    WHY sqrt(K): the dot product of two vectors of K random entries of about 1 or -1 is a sum of
    K terms of random sign, typically about sqrt(K). At K = 64 that's 8, and exp(8) is 3,000
    times exp(0): the softmax would give nearly all weight to one position.
    Source: Vaswani et al. 2017, equation 1.

    Worked example: scores ln 1, ln 2 and ln 3 give weights 1 : 2 : 3. The values are 6, 3 and
    0. Row 0 sees only 6. Row 1 is (1 * 6 + 2 * 3) / 3 = 4. Row 2 is (6 + 6 + 0) / 6 = 2.

    >>> torch.ones(3, 3).tril().bool()  # the causal mask
    tensor([[ True, False, False],
            [ True,  True, False],
            [ True,  True,  True]])
    >>> q, k = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]]).log()
    >>> v = torch.tensor([[6.0], [3.0], [0.0]])
    >>> attention_naive(q, k, v).round(decimals=3)
    tensor([[6.],
            [4.],
            [2.]])
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, T)
    if mask is None:
        mask = torch.ones_like(scores).tril().bool()
    scores = scores.masked_fill(~mask, -math.inf)  # softmax makes these 0
    return softmax(scores) @ v  # (..., T, K)


# Rotary position embedding (RoPE)
# --------------------------------
# Dot products don't know where in the text a key is: the score is the same whether the key is
# one word back or a page back. RoPE fixes that by rotating queries and keys. Treat a vector
# of K numbers as K/2 points in the plane, and rotate each by an angle proportional to the
# position. Rotating two points by the same angle doesn't change their dot product. So turning
# one by 5 steps and the other by 3 has the effect of turning the first by 2 (turn both back by
# 3): a score depends on how far apart two tokens are, and not on where in the text they are.


def rope_frequencies(head_dim: int, theta: float = 10000.0) -> Tensor:
    """The angle, in radians, by which each pair rotates from one position to the next; [K/2].

    Pair i rotates by theta^(-2i / K): the first pairs fast, the last ones slowly, like the
    hands of a clock. Fast pairs distinguish nearby positions, slow ones distant ones.

    >>> rope_frequencies(4)  # theta^0, theta^(-1/2)
    tensor([1.0000, 0.0100])
    """
    return theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)


def rope_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine of all angles, float32 [2, T, K/2], for positions [T].

    TRAP: multiply positions in float32. bfloat16, with 8 significant bits, makes 257 a 256.
    """
    angles = positions.float()[:, None] * frequencies  # (T, K/2)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (a, b) = (x[2i], x[2i+1]) of x [..., K] counterclockwise.

    The pair becomes (a cos - b sin, b cos + a sin); `rope` [2, ..., K/2] holds cos and sin.
    Source: Su et al. 2021, RoFormer (arXiv 2104.09864), equation 34.

    At position 0 nothing rotates. At position 1, the pair (1, 0) rotates by one radian, to
    (cos 1, sin 1). A query at position 5 has the same score with a key at 3 as one at 9 with 7:

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> apply_rope(x, rope_table(torch.tensor([0, 1]), rope_frequencies(2)))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    >>> def rotate(x, position):
    ...     return apply_rope(x, rope_table(torch.tensor([position]), rope_frequencies(4)))
    >>> q, k = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]])
    >>> rotate(q, 5) @ rotate(k, 3).T, rotate(q, 9) @ rotate(k, 7).T, q @ k.T
    (tensor([[9.1544]]), tensor([[9.1544]]), tensor([[24.]]))
    """
    cos, sin = rope
    a, b = x[..., 0::2], x[..., 1::2]  # (..., K/2) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


# Multi-head attention
# --------------------
# One softmax gives one weighted average. So attention is done H times side by side. Each *head*
# has queries, keys and values of its own, of width K = D / H, and can look for something
# different, such as the previous word or the latest name. H heads of width D / H cost as much
# as one of width D. One more matrix combines their outputs, H * K = D numbers.


@dataclasses.dataclass
class ModelConfig:
    """The sizes of a model and some constants: its *hyperparameters*, chosen, not learned."""

    vocab_size: int = 0  # V: the size of the vocabulary
    context_length: int = 256  # the maximum sequence length, in tokens
    num_layers: int = 4  # the number of blocks
    d_model: int = 128  # D: the width of the model, the length of each token's vector
    num_heads: int = 4  # H: attention heads
    d_ff: int = 352  # F: the width inside SwiGLU, about 8/3 of d_model
    num_kv_heads: int = 0  # G: heads of keys and values; 0: as many as num_heads
    head_dim: int = 0  # K: the width of one head; 0: d_model / num_heads
    qk_norm: bool = True  # normalize queries and keys
    tie_embeddings: bool = False  # use one matrix for the embedding and the output
    rope_theta: float = 10000.0  # the base of RoPE: a larger one means slower rotations
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    architecture: str = "llama"  # stored with a model: rename it if you change the code

    def __post_init__(self) -> None:
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.d_model // self.num_heads


class Projection(nn.Linear):
    """A matrix, [..., d_in] to [..., d_out]; or several, whose outputs are concatenated.

    WHY several: one large matmul is faster than several small ones for the same input. The
    entries start as random numbers of standard deviation 0.02, as in GPT-2.
    """

    def __init__(self, d_in: int, *d_outs: int):
        super().__init__(d_in, sum(d_outs), bias=False)
        self.d_outs = d_outs
        nn.init.normal_(self.weight, std=0.02)


# The type of `attention` below. Chapter 7 puts another function in its place, which remembers
# the keys and values of earlier tokens.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention_naive` for each head, faster: q, k, v [B, T, H, K] -> [B, T, H, K].

    FlashAttention (Dao et al. 2022, arXiv 2205.14135) never stores the T x T scores. If k and v
    have fewer heads than q, G instead of H, each of them serves H / G heads of q.
    """
    if k.shape[2] < q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return out.transpose(1, 2)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention: [B, T, D] -> [B, T, D].

        x (B, T, D) -> q, k, v (B, T, H, K) -> softmax(...) @ v (B, T, H, K) -> (B, T, D)

    With `qk_norm`, the lengths of queries and keys are weights, so that they don't grow so much
    that softmax picks a single token and learns no more. (Henry et al. 2020, arXiv 2010.04245)
    Keys and values may have only G < H heads: chapter 7 keeps those of all tokens, and fewer
    take less memory. (Ainslie et al. 2023, arXiv 2305.13245: grouped-query attention, GQA)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, K, G = config.d_model, config.num_heads, config.head_dim, config.num_kv_heads
        self.head_dim = K
        self.qkv = Projection(D, H * K, G * K, G * K)
        norm = RMSNorm if config.qk_norm else nn.Identity  # which returns its input
        self.query_norm, self.key_norm = norm(K, config.norm_eps), norm(K, config.norm_eps)
        self.output = Projection(H * K, D)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = attention) -> Tensor:
        """`rope` [2, T, 1, K/2]: the 1 stands for all heads, which rotate alike."""
        q, k, v = self.qkv(x).split(self.qkv.d_outs, dim=-1)
        q = q.unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = k.unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        v = v.unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        q = apply_rope(self.query_norm(q), rope)
        k = apply_rope(self.key_norm(k), rope)
        out = attend(q, k, v)  # (B, T, H, K)
        return self.output(out.flatten(2))  # (B, T, H * K) to (B, T, D)


# The MLP and the block
# ---------------------


class SwiGLU(nn.Module):
    """(silu(x @ W_gate) * (x @ W_up)) @ W_down: [B, T, D] -> [B, T, D].

    Attention only averages values; this computes something new from what it gathered, at each
    position separately. silu(z) = z / (1 + exp(-z)) is near 0 for very negative z and near z
    for large z. So the gate scales each of F numbers, some down to nearly nothing.
    WHY something nonlinear: without it, consecutive matrix products would collapse into one.
    WHY a gate: in Shazeer's experiments, gated MLPs did better than others.
    WHY F is about 8/3 D: the three matrices then have as many entries as the original
    Transformer's two matrices of D x 4 D.
    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Projection(config.d_model, config.d_ff, config.d_ff)
        self.down = Projection(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)  # (B, T, D)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream: [B, T, D] -> [B, T, D].

        x --+-------------------------+--> + --+------------------+--> + -->
            +--> norm --> attention --+        +--> norm --> mlp --+

    The *residual stream* is x: from the first block to the last it's only ever added to, like
    a shared notebook. Each part reads a normalized copy and writes down its correction. WHY: a
    block then only has to learn what to change, and what earlier blocks found is still there.
    (He et al. 2015, arXiv 1512.03385; Xiong et al. 2020, arXiv 2002.04745: the norms)
    WHY several blocks: in "Tim met Ann. Tim", one block can note at each word which word came
    before it: at "met", "Tim". The next block can look, at the second "Tim", for a word with
    that note, and finds "met". (Olsson et al. 2022, arXiv 2209.11895: induction heads)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = MultiHeadAttention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        # Make the two matrices that write to the stream smaller. WHY: adding up n = 2 *
        # num_layers independent updates makes the variance n times as large. With each divided
        # by sqrt(n), the sum is equally large at any depth, at initialization.
        for matrix in (self.attention.output, self.mlp.down):  # (Radford et al. 2019, 2.3)
            matrix.weight.data /= math.sqrt(2 * config.num_layers)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = attention) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.mlp(self.mlp_norm(x))


# The model
# ---------


def compute_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The scores of all tokens, [..., V], for vectors [..., D] and the output matrix [V, D].

    WHY a function of its own: training, evaluation and generation all get their logits here, so
    that a change, such as a limit on logits, is made once.
    """
    return F.linear(x, weight)  # x @ weight.T


class Transformer(nn.Module):
    """Token ids, int64 [B, T], to logits [B, T, V], for T up to context_length."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        # lm_head ("language model head", not an attention head) produces the logits. It starts
        # with small values, so that to an untrained model all tokens are about equally likely.
        self.lm_head = Projection(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            # WHY: in small models V * D is a large part of all parameters. (Press & Wolf 2017)
            self.lm_head.weight = self.embedding.weight
        # A buffer is a tensor that belongs to the model but isn't learned. persistent=False: it
        # isn't saved with the model.
        self.rope: Tensor
        self.register_buffer("rope", self.make_rope(), persistent=False)

    def make_rope(self) -> Tensor:
        """The cosines and sines of all positions, [2, context_length, K/2]."""
        frequencies = rope_frequencies(self.config.head_dim, self.config.rope_theta)
        return rope_table(torch.arange(self.config.context_length), frequencies)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last block, normalized: [B, T] -> [B, T, D].

        (Without a `cache`, which chapter 7 adds, positions are 0 to T - 1.)
        """
        T = tokens.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens, but context_length is {self.config.context_length}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions
        rope = self.rope[:, positions, None]  # (2, T, 1, K/2)
        x = self.embedding(tokens)  # (B, T, D)
        for i, block in enumerate(self.blocks):
            attend = attention if cache is None else cache.attention_in(i)
            x = block(x, rope, attend)  # (B, T, D)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return compute_logits(self.hidden_states(tokens), self.lm_head.weight)  # (B, T, V)


# Exercises
# 1. Make `apply_rope` return x unchanged and call `story_from_text`, the last function of Part
#    One. The model still learns, but ends at a clearly higher loss: the causal mask is all
#    that tells it about order.
# 2. How many parameters does a model with 2 blocks, D = 128, H = 4, F = 256 and V = 1024 have,
#    with and without tie_embeddings, and with num_kv_heads = 1? Work it out, then count.


# ----------------------------------------------------------------------------------------
# 6. Training
#
# How does the model get good at predicting the next token? Measure how wrong it is (the
# *loss*), compute the derivative of the loss with respect to every parameter (the *gradient*),
# move all parameters a little the opposite way, and repeat. The loss is cross-entropy, the
# optimizer (which decides how parameters move) is AdamW, and the learning rate rises and falls
# over the run. (Loshchilov & Hutter 2019, arXiv 1711.05101: AdamW, algorithm 2)
# ----------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """How surprised the model is by each target token: -log(softmax(logits)[target]).

    One number for each target, float32 [N], for logits [..., V] and N targets int64 [...]. If
    the model gave the target probability p, the loss is -log p: 0 for certainty, 0.69 for a
    coin flip, ln V for a model that knows nothing. The unit is the *nat* (0.69 nats are one
    bit). exp(mean loss) is the *perplexity*: a loss of 2.3 means a perplexity of 10, which is
    like guessing uniformly among 10 tokens.

    >>> logits, targets = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([1, 0])
    >>> -softmax(logits)[[0, 1], targets].log()  # written out
    tensor([0.1269, 0.6931])
    >>> cross_entropy(logits, targets)
    tensor([0.1269, 0.6931])
    """
    # TRAP: use float32. A sum of 50,000 exponentials in half precision would be inexact.
    logits = logits.flatten(0, -2).float()  # (N, V)
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


# Gradient descent
# ----------------
# The gradient of a parameter w, `w.grad`, is the derivative of the loss with respect to w: how
# fast the loss rises as w increases. To lower the loss, move against it: w -= lr * w.grad. The
# *learning rate* `lr` is how far to go.
#
# Where do gradients come from? While PyTorch computes the loss, it records every operation and
# keeps what it needs to differentiate it (the *activations*, most of the memory that training
# uses). `loss.backward()` walks this record backwards and applies the chain rule at each
# operation. This is backpropagation. It takes about twice the work of computing the loss: for
# each matmul, the derivatives with respect to its input and to its matrix are a matmul each.


@torch.no_grad()  # don't record what happens in here
def gradient_descent_step(parameters: Iterable[Tensor], lr: float) -> None:
    """One step of plain gradient descent.

    >>> w = nn.Parameter(torch.tensor(3.0))
    >>> loss = (w - 5) ** 2  # smallest at w = 5
    >>> loss.backward()  # w.grad = 2 * (w - 5)
    >>> w.grad
    tensor(-4.)
    >>> gradient_descent_step([w], lr=0.1)  # 3 - 0.1 * -4
    >>> w.data
    tensor(3.4000)
    """
    for w in parameters:
        if w.grad is not None:  # None: the loss doesn't depend on w
            w -= lr * w.grad


# AdamW improves on this in three ways. It averages gradients over recent steps, since each
# batch alone gives a noisy one: `m` becomes 0.9 * m + 0.1 * grad. It divides by the gradient's
# typical size, sqrt(v), where `v` is a running average of its square, so that parameters with
# small gradients move as fast as the others. And it pulls every matrix towards 0 a little
# (weight decay), so that only entries that stay useful stay large.


def adamw_naive(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor,
    step: int, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of AdamW, written out: the new weight, m and v. `step` counts from 1.

    m and v start at 0, and m_hat and v_hat correct that bias: after one step m is 0.1 * grad,
    and dividing it by 1 - 0.9 gives grad. A parameter whose gradient hardly changes moves by
    about lr per step, no matter how large the gradient is. Worked example: the first step is lr
    times the sign, whether the gradient is 5 or 0.05.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> adamw_naive(one, torch.tensor([5.0, 0.05]), zero, zero, 1, 0.1, (0.9, 0.95), 0.0)[0]
    tensor([0.9000, 0.9000])
    """
    m = betas[0] * m + (1 - betas[0]) * grad  # first moment: the mean of recent gradients
    v = betas[1] * v + (1 - betas[1]) * grad**2  # second moment: the mean of their squares
    m_hat = m / (1 - betas[0] ** step)
    v_hat = v / (1 - betas[1] ** step)
    weight = weight - lr * weight_decay * weight - lr * m_hat / (v_hat.sqrt() + eps)
    return weight, m, v


@dataclasses.dataclass
class OptimizerConfig:
    """The hyperparameters of training"""

    max_steps: int = 5000  # optimizer steps
    lr: float = 1e-3  # the peak learning rate
    min_lr: float = 0.0  # the learning rate at the end
    warmup_steps: int | None = None  # steps of linear warmup; None: a tenth, at most 200
    weight_decay: float = 0.1  # how strongly matrices are pulled towards zero
    beta1: float = 0.9  # decay rate of AdamW's first moment
    beta2: float = 0.95  # decay rate of AdamW's second moment
    clip_grad: float = 1.0  # clip the gradient to this norm; 0: no clipping

    def __post_init__(self) -> None:
        if self.warmup_steps is None:
            self.warmup_steps = min(200, self.max_steps // 10)


def make_adamw(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's AdamW. (Fused: it updates all parameters in one operation.)

    Only matrices decay, the embedding among them. Norm weights start at 1, and pulling them
    towards 0 would shrink the whole input of a layer.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """The learning rate at `step` (from 0): linear warmup, then linear decay to min_lr.

    WHY warm up: AdamW's first steps move every parameter by about lr, however small its
    gradient is, in directions that only a few batches have chosen. WHY decay: large steps
    bounce between the walls of a valley; small ones at the end settle. (Bergsma et al. 2025,
    arXiv 2502.15938, recommend linear decay to 0.)

    >>> config = OptimizerConfig(max_steps=6, lr=1.0, min_lr=0.1, warmup_steps=2)
    >>> [round(learning_rate(step, config), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]

    Warmup gives 1/2 and 2/2; step 4 is halfway from 2 to 6, hence 0.55. (Step 6, where min_lr
    is reached, is one past the last.)
    """
    warmup = config.warmup_steps or 0
    if step < warmup:
        return config.lr * (step + 1) / warmup
    fraction = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))
    return config.lr + fraction * (config.min_lr - config.lr)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor,
    lr: float, clip_grad: float = 1.0,
) -> Tensor:
    """One update of the parameters. Returns the loss, a scalar tensor in nats per token.

    Clipping scales all gradients down if their norm, the square root of the sum of all their
    squares, is above `clip_grad`: one odd batch then can't undo many good steps (Pascanu et
    al. 2013, arXiv 1211.5063, algorithm 1).
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = cross_entropy(model(inputs), targets).mean()
    loss.backward()  # fills p.grad for every parameter p
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)  # 0: no limit
    optimizer.step()
    optimizer.zero_grad()  # or the next backward() would add to these gradients
    return loss.detach()


# Validation
# ----------
# A model that is trained on the same text for a long time starts to memorize it: the loss on
# that text keeps falling while the loss on new text stalls or rises. This is *overfitting*. To
# notice it, hold out some text and measure the loss there, the validation loss.
# In the first epoch all text is new to the model, and both losses fall together.


@torch.no_grad()
def validation_loss(model: Transformer, tokens: np.ndarray) -> float:
    """The mean loss over all full, non-overlapping windows of `tokens`."""
    was_training = model.training
    model.eval()  # evaluation mode; matters for layers such as dropout, which we don't have
    T = model.config.context_length
    windows = [cut_windows(tokens, [i], T) for i in range(0, len(tokens) - T, T)]
    losses = [cross_entropy(model(inputs), targets).mean() for inputs, targets in windows]
    model.train(was_training)
    return torch.stack(losses).mean().item()


def train_model(
    model: Transformer, train_tokens: np.ndarray, valid_tokens: np.ndarray,
    config: OptimizerConfig, batch_size: int, seed: int = 1, eval_interval: int = 100,
) -> list[float]:
    """Train `model` and return the loss of every step: the whole training loop.

    A model that has seen "0 1 2 0 1 2 ..." often enough knows what comes next. It starts near
    ln 3 = 1.10, like guessing among three tokens, and ends near 0:

    >>> _ = torch.manual_seed(1)
    >>> tokens = np.array([0, 1, 2] * 40)
    >>> model = Transformer(ModelConfig(
    ...     vocab_size=3, context_length=8, num_layers=1, d_model=16, num_heads=2, d_ff=32))
    >>> config = OptimizerConfig(max_steps=60, lr=0.01)
    >>> losses = train_model(model, tokens, tokens, config, batch_size=4, eval_interval=1000)
    >>> round(losses[0], 1), losses[-1] < 0.1
    (1.1, True)
    """
    optimizer = make_adamw(model.parameters(), config)
    losses: list[float] = []
    model.train()
    for step in range(config.max_steps):
        indices = range(step * batch_size, (step + 1) * batch_size)
        inputs, targets = get_batch(train_tokens, model.config.context_length, seed, indices)
        lr = learning_rate(step, config)
        loss = train_step(model, optimizer, inputs, targets, lr, config.clip_grad)
        losses.append(loss.item())
        if (step + 1) % eval_interval == 0:
            valid = validation_loss(model, valid_tokens)
            print(f"step {step + 1}: loss {losses[-1]:.4f}, validation loss {valid:.4f}")
    model.eval()
    return losses


# Exercises
# 1. Replace `optimizer.step()` with `gradient_descent_step(model.parameters(), lr)` and try
#    lr=0.1, 0.5 and 2. Even at the best of them the loss falls far more slowly.
# 2. Cut train_tokens down to `train_tokens[:3000]` and train for 500 steps, hundreds of epochs.
#    The loss falls to almost 0, and the validation loss rises: overfitting.


# ----------------------------------------------------------------------------------------
# 7. Generation
#
# How does a model that scores next tokens tell a story? Sample the next token from its
# predictions, append it, and repeat. That is all, and it's slow: for each new token, the
# model reads the whole text again. The key-value cache fixes that. (Fan et al. 2018, arXiv
# 1805.04833: top-k; Holtzman et al. 2020, arXiv 1904.09751, section 3.1: top-p or nucleus)
# ----------------------------------------------------------------------------------------


def token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """softmax(logits / temperature), with unlikely tokens removed; [B, V] for logits [B, V].

    A temperature below 1 makes likely tokens even more likely; 0 leaves only the most likely,
    which is called greedy decoding.
    top_k keeps the k most likely tokens (including ties; 0: all). top_p keeps the most likely
    tokens that together reach probability p, at least one.

    Worked example: at temperature 0.5 the ratio of any two probabilities is squared. At
    temperature 1 token 1 has 67%, so it alone reaches top_p=0.5.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
    >>> token_probabilities(logits), token_probabilities(logits, temperature=0.5)
    (tensor([[0.0900, 0.6652, 0.2447]]), tensor([[0.0159, 0.8668, 0.1173]]))
    >>> token_probabilities(logits, top_k=2), token_probabilities(logits, top_p=0.5)
    (tensor([[0.0000, 0.7311, 0.2689]]), tensor([[0., 1., 0.]]))
    """
    logits = logits.float()
    if temperature < 1e-9:  # or exactly 0
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    # Subtracting the maximum changes no probability, and a small temperature can't overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(descending=True)  # (B, V) each
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # the probability of all more likely tokens
        to_remove = before >= top_p  # they reach top_p without this one
        to_remove[:, 0] = False
        ordered = ordered.masked_fill(to_remove, -math.inf)
        logits = logits.scatter(-1, ids, ordered)  # undo the sort: each goes back to its id
    return logits.softmax(-1)


def sample(logits: Tensor, u: Tensor, **sampling: Any) -> Tensor:
    """The next ids, int64 [B], for logits [B, V] and random numbers u [B] from 0 to 1.

    WHY u comes from outside: the same u gives the same ids, here and in faster versions.

    Lay the probabilities end to end: they fill the line from 0 to 1. A random point on it falls
    on token i with probability p[i]. `sampling` goes to `token_probabilities`.

        token 0     token 1        token 2
        |-- 9% --|------ 67% ------|---- 24% ----|
        0       0.09       ^      0.76           1
                        u = 0.5: token 1

    >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
    >>> [sample(logits, torch.tensor([u])).item() for u in (0.05, 0.5, 0.9)]
    [0, 1, 2]
    """
    ends = token_probabilities(logits, **sampling).cumsum(-1)  # (B, V): where each ends
    # The last one should end at 1, but rounding may move it a little: hence the product.
    point = u[:, None] * ends[:, -1:]  # (B, 1)
    return (ends <= point).sum(-1)  # how many end before the point


def random_numbers(seed: int, batch_size: int, count: int) -> Tensor:
    """`count` numbers from 0 to 1 for each of B sequences; [B, count].

    WHY row n uses seed + n: then a text doesn't depend on what is generated beside it.
    """
    generators = [torch.Generator().manual_seed(seed + n) for n in range(batch_size)]
    return torch.stack([torch.rand(count, generator=generator) for generator in generators])


@torch.no_grad()
def generate_naive(
    model: Transformer, prompts: Tensor, u: Tensor, **sampling: Any
) -> Iterator[Tensor]:
    """Yield the next ids of B sequences, int64 [B], N times.

    `prompts` [B, T] are their first tokens, and `u` [B, N] holds a random number for each new
    token. The model sees at most context_length tokens. When there are more, it continues with
    the newest token and half a context before it. (Half, so that this doesn't happen at each
    token: `generate`, below, has to compute all of them again.)
    """
    limit = model.config.context_length
    tokens = prompts[:, -limit:]  # what the model sees, (B, T)
    for step in range(u.shape[1]):
        logits = model(tokens)[:, -1]  # (B, V): the scores after the last token
        new = sample(logits, u[:, step], **sampling)  # (B,)
        yield new
        tokens = torch.cat([tokens, new[:, None]], dim=1)  # (B, T + 1)
        if tokens.shape[1] > limit:
            tokens = tokens[:, -(limit // 2 + 1) :]


# The key-value cache
# -------------------
# Attention is the only place where a token looks at others, and all it needs from an earlier
# token is the key and the value. Those never change: in all blocks they depend on the tokens
# before, not on later ones, because no token looks ahead. So keep them, and let the model
# compute only the newest token. Attention still looks at all earlier keys, but everything else
# then costs the same for every token, however long the text is:
#
#     computed           in the cache before that       predicted
#     Once upon a        nothing                        time
#     time               Once upon a                    there
#     there              Once upon a time               was
#
# When the text outgrows the context, the oldest tokens are dropped, and the cache is no longer
# valid, since keys and values depend on all tokens before. So it's cleared, and half a context
# is computed again.


class KVCache:
    """The keys and values of all S tokens so far, in every block.

    To process T more tokens:

        cache.add_tokens(tokens)                records them and their positions
        model.hidden_states(tokens, cache)      runs the blocks on these T tokens only
            cache.attention_in(0)(q, k, v)      block 0: adds k and v to those it has, and
                                                lets the T queries attend to all of them
            cache.attention_in(1)(q, k, v)      block 1, and so on
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.length = 0  # S
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}  # by block: [B, S, G, K] each

    def add_tokens(self, tokens: Tensor) -> None:
        """Record the next tokens [B, T], which the model will process."""
        S, T = self.length, tokens.shape[1]
        self.tokens: Tensor = torch.cat([self.tokens, tokens], 1) if S > 0 else tokens
        self.positions = torch.arange(S, S + T, device=tokens.device)
        self.length = S + T

    def add_keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v [B, T, G, K] of the new tokens. Returns those of all tokens."""
        if layer in self.keys_values:
            past_k, past_v = self.keys_values[layer]
            k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        self.keys_values[layer] = k, v
        return k, v

    def attention_in(self, layer: int, mask: Tensor | None = None) -> Attend:
        """What replaces `attention` in block `layer`. `mask`: instead of the causal one."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = self.add_keys_values(layer, k, v)  # (B, S + T, G, K)
            causal = torch.arange(k.shape[1], device=k.device) <= self.positions[:, None]
            return attention(q, k, v, causal if mask is None else mask)  # mask: (T, S + T)

        return attend


@torch.no_grad()
def generate(
    model: Transformer, prompts: Tensor, u: Tensor, cache: KVCache | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """`generate_naive` with a cache, new or given but empty: the same ids, up to rounding."""
    limit = model.config.context_length
    cache = cache or KVCache()
    new = prompts[:, -limit:]  # what to process next, (B, T)
    for step in range(u.shape[1]):
        if cache.length + new.shape[1] > limit:
            new = torch.cat([cache.tokens, new], dim=1)[:, -(limit // 2 + 1) :]
            cache.clear()
        cache.add_tokens(new)
        x = model.hidden_states(new, cache)[:, -1]  # (B, D), after the last token
        logits = compute_logits(x, model.lm_head.weight)  # (B, V)
        new = sample(logits, u[:, step], **sampling)[:, None]  # (B, 1)
        yield new[:, 0]


# Exercises
# 1. Call `story_from_text`, below, with temperature 0.3, 0.7 and 2, several stories each, with
#    seed 1, 2 and 3: one alone may mislead. Which stories are dull, and which fall apart?
# 2. Add min-p (Nguyen et al. 2024, arXiv 2407.01082): keep the tokens whose probability is at
#    least a fraction p of the most likely token's. One parameter, and two lines beside top_k's.


# All of it
# ---------


def story_from_text(
    text: str, prompt: str = "Once", vocab_size: int = 1024, max_steps: int = 300,
    seed: int = 1, context_length: int = 128, batch_size: int = 16, lr: float = 5e-3,
    temperature: float = 0.7, max_new_tokens: int = 200,
) -> str:
    """All of it: learn to write like `text`, then continue the prompt.

    `text` should be a megabyte or more of simple text, with END_OF_TEXT between documents. The
    last 5% is held out for validation. This takes a minute on two CPU cores:

        print(story_from_text(open("data/stories-train.txt").read()))

        1,900,568 characters are 552,382 tokens
        step 100: loss 1.3095, validation loss 1.3073
        step 200: loss 0.9527, validation loss 0.9631
        step 300: loss 0.8188, validation loss 0.8553
    """
    merges = learn_merges_naive(count_pretokens(text), vocab_size - 257)  # bytes, END_OF_TEXT
    tokenizer = BPETokenizer(merges)
    tokens = np.array(tokenizer.encode(text))
    num_valid = len(tokens) // 20
    print(f"{len(text):,} characters are {len(tokens):,} tokens")

    torch.manual_seed(seed)  # the same initial parameters each time
    model = Transformer(ModelConfig(
        tokenizer.vocab_size, context_length, num_layers=2, d_model=128, num_heads=4, d_ff=352))
    config = OptimizerConfig(max_steps=max_steps, lr=lr)
    train_model(model, tokens[:-num_valid], tokens[-num_valid:], config, batch_size, seed)

    prompts = torch.tensor([tokenizer.encode(prompt)])  # (1, T)
    u = random_numbers(seed, 1, max_new_tokens)
    new_ids = [int(new) for new in generate(model, prompts, u, temperature=temperature)]
    return prompt + tokenizer.decode(new_ids).split(END_OF_TEXT)[0]


# You have read a complete language model. What follows computes the same thing faster, on many
# devices, without losing work, and makes it convenient.


# ========================================================================================
# PART TWO: SPEED
#
# The same merges, ids, losses and texts as in Part One, up to rounding, many times faster. Only
# Muon does something else: it's another optimizer.
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 8. Tokenizing corpora
#
# How do chapters 1 to 3 work on gigabytes of text? Four ideas make them fast. Learn merges
# without recounting: a merge changes only the words (pre-tokens) that contain the pair. Apply
# merges that can't affect each other in one batch. Do the work once per *distinct* word, since
# text repeats itself. And process a large piece at a time with numpy, not a word at a time in
# Python. `Tokenizer` also takes any pattern, bytes and special tokens.
# ----------------------------------------------------------------------------------------

import bisect
import codecs
import contextlib
import datetime
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import typing
import unicodedata
from collections.abc import Collection, Generator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

CHUNK = 1 << 19  # characters processed at a time
TwoArrays = tuple[np.ndarray, np.ndarray]
Paths = str | Path | Sequence[str | Path]  # a file or directory, or several


def run_starts(values: np.ndarray) -> np.ndarray:
    """Whether each value differs from the one before it; bool [N]."""
    starts = np.ones(len(values), bool)
    starts[1:] = values[1:] != values[:-1]
    return starts


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All ranges, joined: starts [10, 5] and lengths [2, 3] give [10, 11, 5, 6, 7]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


# Learning merges without recounting
# ----------------------------------


class PairIndex:
    """Words as linked lists of tokens, and for each pair of neighbors: count and positions.

    In plain Python, this would be a dictionary from pair to the set of words that contain it.
    With arrays, many merges take a few numpy calls. Every byte of every word has a position p:
    `token[p]` is the token there, `prev[p]` and `next[p]` are the positions of its neighbors.
    Merging a pair at p writes the new token to p and unlinks the position after it, marked x
    here. These are "low" and "slow", separated by -1, before and after merging l + o into 256:

        p        0   1   2   3   4   5   6   7   8   9
        token   -1   l   o   w  -1   s   l   o   w  -1
                -1 256   x   w  -1   s 256   x   w  -1

    Each distinct pair has a number: `pair_at[p]` is that of (token at p, token after p), or -1
    if one of them is a separator. Pair n is (left[n], right[n]) and occurs count[n] times;
    `positions[start[n] : start[n + 1]]` are the positions where it occurred when it was new.
    """

    def __init__(self, words: Iterable[bytes], counts: Iterable[int]):
        data = np.frombuffer(b"\0".join([b"", *words, b""]), np.uint8)
        lengths = np.array([0, *map(len, words)])
        self.token, size = data.astype(np.int64), len(data)
        self.token[np.cumsum(lengths + 1) - 1] = -1
        # WHY 32 bits for positions and pairs: this index is the largest thing in memory.
        self.prev = np.arange(-1, size - 1, dtype=np.int32)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.weight = np.repeat(np.array([0, *counts]), lengths + 1)
        # At first there are fewer than `size` pairs. Merging at a position creates at most two,
        # and unlinks one position. (np.zeros takes no memory until it is written.)
        self.left, self.right, self.count, self.start = np.zeros((4, 3 * size + 2), np.int64)
        self.positions = np.zeros(3 * size, np.int32)
        self.pair_at = np.full(size, -1, np.int32)
        self.num_pairs = 0
        pos = np.flatnonzero((self.token[:-1] >= 0) & (self.token[1:] >= 0)).astype(np.int32)
        # WHY 16 bits: numpy sorts such integers in linear time.
        pos = pos[(data[pos] * np.uint16(256) + data[pos + 1]).argsort(kind="stable")]
        self.add_pairs(self.token[pos] << 32 | self.token[pos + 1], pos)

    def add_pairs(self, pairs: np.ndarray, positions: np.ndarray) -> range:
        """Number these pairs, each left << 32 | right, sorted. Returns the numbers."""
        is_first = run_starts(pairs)
        starts, first = np.flatnonzero(is_first), self.num_pairs
        self.num_pairs += len(starts)
        created, used = slice(first, self.num_pairs), self.start[first]
        self.left[created], self.right[created] = np.divmod(pairs[starts], 1 << 32)
        self.positions[used : used + len(positions)] = positions
        self.start[created] = used + starts
        self.start[self.num_pairs] = used + len(positions)
        self.pair_at[positions] = is_first.cumsum(dtype=np.int32) + (first - 1)
        self.count[created] = np.add.reduceat(self.weight[positions], starts)
        return range(first, self.num_pairs)

    def occurrences(self, pairs: Sequence[int]) -> TwoArrays:
        """Where these pairs occur, without overlaps, and which one: an index into `pairs`."""
        numbers = np.array(pairs)
        first, lengths = self.start[numbers], self.start[numbers + 1] - self.start[numbers]
        pos = self.positions[ragged_indices(first, lengths)]
        pair_index = np.repeat(np.arange(len(pairs)), lengths)
        unchanged = self.pair_at[pos] == numbers[pair_index]  # earlier merges have changed some
        pos, pair_index = pos[unchanged], pair_index[unchanged]
        keep = without_overlaps(pos, self.next[pos])
        return pos[keep], pair_index[keep]

    def pairs_around(self, pos: np.ndarray, next_pos: np.ndarray, new: np.ndarray) -> TwoArrays:
        """The sorted pairs of `new` tokens at `pos` and their neighbors, and where they are."""
        prev_pos = self.prev[pos]
        x, y = self.token[prev_pos], self.token[next_pos]
        # A new token has a higher id than all others. If x is new, (x, new) is in (new, y).
        is_left, is_right = (x >= 0) & (x < new.min()), y >= 0
        pairs = np.concatenate([(x << 32 | new)[is_left], (new << 32 | y)[is_right]])
        order = pairs.argsort(kind="stable")
        return pairs[order], np.concatenate([prev_pos[is_left], pos[is_right]])[order]

    def select_independent(self, pairs: Sequence[int], new: int) -> TwoArrays:
        """Positions where to merge pairs[i] into the token `new` + i, and the i of each.

        `pairs` have the highest counts, in descending order. As many are taken as can be merged
        together with the result of merging one after the other. The examples are chapter 2's.
        """
        # First: a pair may not begin with the token that an earlier one ends with, or the
        # reverse. Merging l + o would leave fewer occurrences of o + w.
        left, right = self.left[pairs], self.right[pairs]
        shares = (left[:, None] == right) | (right[:, None] == left)  # [earlier, later]
        shares_with_earlier = np.triu(shares, 1).any(axis=0)
        pairs = pairs[: int(np.append(shares_with_earlier, True).argmax())]
        # Second: earlier merges may not create a pair that occurs at least as often as the next
        # one. s + t creates e + st, 9 times, and that comes before o + w, 8 times. No pair that
        # merge i creates occurs more than highest[i] times (less if a neighbor is merged, too).
        pos, pair_index = self.occurrences(pairs)
        created, positions = self.pairs_around(pos, self.next[self.next[pos]], new + pair_index)
        is_first, highest = run_starts(created), np.zeros(len(pairs))
        counts = np.bincount(is_first.cumsum() - 1, self.weight[positions])
        created_by = np.maximum(*np.divmod(created[is_first], 1 << 32)) - new
        np.maximum.at(highest, created_by, counts)
        is_next = self.count[pairs[1:]] > np.maximum.accumulate(highest)[:-1]
        taken = pair_index <= int(np.append(is_next, False).argmin())
        return pos[taken], pair_index[taken]

    def merge(self, pairs: Sequence[int], new: int) -> tuple[int, range]:
        """Merge the first of `pairs` that are independent. Returns how many, and new pairs."""
        pos, pair_index = self.select_independent(pairs, new)
        num_merged, tokens = int(pair_index.max()) + 1, new + pair_index
        # The pairs on both sides disappear. (In "abab" both are the same pair: count it once.
        # At the end of a word, its number is -1; count[-1] is never read.)
        right, weight = self.next[pos], self.weight[pos]
        np.subtract.at(self.count, self.pair_at[right], weight)
        self.pair_at[right] = -1
        np.subtract.at(self.count, self.pair_at[self.prev[pos]], weight)
        self.count[pairs[:num_merged]] = 0
        self.token[pos], self.pair_at[pos] = tokens, -1
        self.next[pos] = self.next[right]
        self.prev[self.next[pos]] = pos
        return num_merged, self.add_pairs(*self.pairs_around(pos, self.next[pos], tokens))


def without_overlaps(left_pos: np.ndarray, right_pos: np.ndarray) -> np.ndarray:
    """Which pairs to merge, of those with tokens at left_pos[i] and right_pos[i], ascending."""
    # Pairs overlap in a run of equal tokens. "aaaa" has three: merge the first and the third.
    index, starts_run = np.arange(len(left_pos)), np.ones(len(left_pos), bool)
    starts_run[1:] = right_pos[:-1] != left_pos[1:]
    first_of_run = np.maximum.accumulate(np.where(starts_run, index, 0))
    return (index - first_of_run) % 2 == 0


def learn_merges(pretoken_counts: dict[bytes, int], num_merges: int) -> list[Merge]:
    """The merges of `learn_merges_naive`, in a fraction of the time.

    Pairs wait in a sorted queue, whose last entry is the best: the highest count, and among
    equals the greatest pair. An entry goes stale when another merge consumes some of the pair's
    occurrences; then it is put back with its current count. (A count never grows: a pair
    contains the newest token when it is created, and later merges only take occurrences away.)
    Most pairs are never merged, so the queue holds only those above a threshold, which is
    halved whenever the queue is empty. The best pairs are merged together, often tens.
    """
    index = PairIndex(pretoken_counts, pretoken_counts.values())
    tokens = [bytes([byte]) for byte in range(256)]
    merges: list[Merge] = []
    queue: list[tuple[int, bytes, bytes, int]] = []
    threshold, num_merged = int(index.count[: index.num_pairs].max(initial=0)) + 1, 1

    def entry(pair: int) -> tuple[int, bytes, bytes, int]:
        return int(index.count[pair]), tokens[index.left[pair]], tokens[index.right[pair]], pair

    progress = Progress("merging", num_merges, "merges")
    while len(merges) < num_merges and (queue or threshold > 1):
        if not queue:
            threshold //= 2
            frequent = np.flatnonzero(index.count[: index.num_pairs] >= threshold)
            queue = sorted(map(entry, frequent.tolist()))
        batch: list[int] = []
        limit = min(2 * num_merged, num_merges - len(merges))  # twice as many as last time
        while queue and len(batch) < limit:
            count, _, _, pair = queue.pop()
            if index.count[pair] == count:
                batch.append(pair)
            elif index.count[pair] >= threshold:
                bisect.insort(queue, entry(pair))
        if batch:
            num_merged, created = index.merge(batch, len(tokens))
            for pair in batch[:num_merged]:
                merges.append((tokens[index.left[pair]], tokens[index.right[pair]]))
                tokens.append(b"".join(merges[-1]))
            for pair in [*batch[num_merged:], *created]:
                if index.count[pair] >= threshold:
                    bisect.insort(queue, entry(pair))
        progress.update(len(merges))
    progress.close()
    return merges


# Splitting without a regular expression
# --------------------------------------
# With GPT-2's pattern, a pre-token starts where the class of character changes, with three
# exceptions. (Any other pattern goes through the regular expression, several times slower.)

LETTER, NUMBER, OTHER, SPACE, SPECIAL, UNKNOWN = range(6)
CLASS_OF_CODE = np.full(0x110000, UNKNOWN, np.uint8)  # of every code point, once it is known


def bytes_to_text(data: bytes) -> str:
    """The text of UTF-8 `data`. Each invalid byte becomes a *surrogate*, U+DC80 to U+DCFF."""
    return data.decode("utf-8", "surrogateescape")


def text_to_bytes(text: str) -> bytes:
    """The UTF-8 bytes of `text`; the inverse of `bytes_to_text`."""
    return text.encode("utf-8", "surrogateescape")


def special_token_pattern(special_tokens: Iterable[str]) -> re.Pattern:
    """A pattern that finds special tokens, preferring the longest match, as its group 1."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    # Without special tokens: a pattern that never matches. (\A makes it give up at once.)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"\A(?!)") + ")")


def character_classes(codes: np.ndarray) -> np.ndarray:
    """The class of each code point; uint8 [N]."""
    classes = CLASS_OF_CODE.take(codes)
    if (unknown := codes[classes == UNKNOWN]).size:
        # Ask the regex package, so that its patterns and we agree on Unicode.
        unknown = np.unique(unknown)
        characters = "".join(map(chr, unknown.tolist()))
        kinds = np.full(len(unknown), OTHER)
        for pattern, kind in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)):
            kinds[[match.start() for match in regex.finditer(pattern, characters)]] = kind
        CLASS_OF_CODE[unknown] = kinds  # at once: another thread may be reading
        classes = CLASS_OF_CODE.take(codes)
    return classes


def find_gpt2_pretokens(codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Whether a pre-token of GPT-2's pattern starts at each of these code points; bool [N].

    >>> codes = np.array(list(map(ord, "it's  24!")))
    >>> starts = find_gpt2_pretokens(codes, character_classes(codes))
    >>> "".join("^" if start else "." for start in starts)
    '^.^.^^..^'
    """
    space, changes = classes == SPACE, classes[1:] != classes[:-1]
    start = np.ones(len(codes) + 3, bool)  # three more, for start[at + 3] below
    # 1. What follows a space doesn't start a pre-token, since the space has started it.
    start[1 : len(codes)] = changes & (space[1:] | (codes[:-1] != ord(" ")))
    # 2. The last whitespace before a visible character (a class below SPACE) starts one.
    start[1 : max(1, len(codes) - 1)] |= space[1:-1] & space[:-2] & (classes[2:] < SPACE)
    # 3. An apostrophe that starts a pre-token may start a contraction: 's 't 'm 'd 'll 've 're.
    at = np.flatnonzero((codes == ord("'")) & start[: len(codes)])
    padded = np.append(codes, np.zeros(2, codes.dtype))
    next1, next2 = padded[at + 1], padded[at + 2]
    one_letter = np.isin(next1, [ord(letter) for letter in "stmd"])
    two_letters = (next1 == ord("l")) & (next2 == ord("l"))
    two_letters |= np.isin(next1, [ord("v"), ord("r")]) & (next2 == ord("e"))
    start[at[one_letter | two_letters] + 1] = False
    start[at[one_letter] + 2] = True
    start[at[two_letters] + 3] = True
    return start[: len(codes)]


class Pretokens(typing.NamedTuple):
    """The UTF-8 bytes of a text, and the pre-tokens and special tokens in it, in order."""

    data: bytes
    starts: np.ndarray  # where each starts in `data`; int64 [N]
    lengths: np.ndarray  # in bytes; int64 [N]
    special_at: np.ndarray  # which of them are special tokens; int64

    def cut(self, indices: np.ndarray) -> list[bytes]:
        """The pre-tokens with these indices."""
        spans = zip(self.starts[indices].tolist(), self.lengths[indices].tolist())
        return [self.data[start : start + length] for start, length in spans]


def split_text(text: str, patterns: Iterable[str]) -> list[str]:
    """The pre-tokens of `text`, and empty strings. Each pattern splits what the last one left.

    What lies between matches is a pre-token, too: `split` returns both, for a group.
    """
    parts = [text]
    for pattern in patterns:
        parts = [x for part in parts for x in regex.split(f"({pattern})", part)]
    return parts


def find_pretokens(text: str, tokenizer: Tokenizer) -> Pretokens:
    """All pre-tokens and special tokens of `text`, which is normalized first."""
    pieces = tokenizer.normalized_pieces(text)  # text, special token, text, ..., text
    text, ends = "".join(pieces), np.cumsum(list(map(len, pieces)))
    special_starts, special_ends = ends[:-1:2], ends[1::2]
    data = text_to_bytes(text)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_start = np.zeros(len(text) + 1, bool)  # the last one is the end of the text
    if tokenizer.patterns == (PRETOKEN_PATTERN,):
        # Inside special tokens nothing starts, and code points are ignored.
        codes_outside, classes = codes.copy(), character_classes(codes)
        inside = ragged_indices(special_starts, special_ends - special_starts)
        codes_outside[inside], classes[inside] = 0, SPECIAL
        is_start[:-1] = find_gpt2_pretokens(codes_outside, classes)
    else:
        for start, piece in zip([0, *special_ends.tolist()], pieces[::2]):
            parts = split_text(piece, tokenizer.patterns)
            is_start[start + np.cumsum([0, *map(len, parts)])] = True
    is_start[special_starts] = is_start[special_ends] = True
    starts = np.flatnonzero(is_start[:-1])
    special_at = np.searchsorted(starts, special_starts)
    if len(text) < len(data):  # from characters to bytes; an escaped byte is one byte
        sizes = np.uint8(1) + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
        starts = np.cumsum(sizes, dtype=np.int64)[starts] - sizes[starts]
    return Pretokens(data, starts, np.diff(starts, append=len(data)), special_at)


# Looking up all words of a chunk at once
# ---------------------------------------
# A Python dictionary from word to ids takes several times as long as everything else here.
# Instead, a word of up to 15 bytes, with its length, is packed into two 64-bit integers, its
# key, so that one numpy comparison compares all N words of a chunk with those in a table.

MAX_SHORT = 15
# Row n masks the first n of 16 bytes, as two little-endian integers.
KEY_MASK = np.where(np.arange(16) < np.arange(17)[:, None], 255, 0).astype("u1").view("<u8")
HASH_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, arbitrary


def word_keys(words: Pretokens) -> np.ndarray:
    """Bytes 0 to 7 of each word; bytes 8 to 14, with its length as top byte; uint64 [N, 2]."""
    # A view of the padded bytes, with an item of 16 bytes starting at every byte.
    items = np.ndarray(len(words.data) + 1, "V16", words.data + bytes(16), strides=(1,))
    lengths = np.minimum(words.lengths, MAX_SHORT + 1)  # keys of longer words are never used
    keys = items[words.starts].view("<u8").reshape(-1, 2) & KEY_MASK.take(lengths, axis=0)
    keys[:, 1] |= lengths.astype(np.uint64) << np.uint64(56)
    return keys


class WordTable:
    """Gives each distinct word a number, the next free one when it is first seen.

    A word's hash determines its slot. A word already there is evicted and, when it reappears,
    gets another number. So a word can have several numbers, but a number always means one word.
    A dictionary keeps longer words, which are rare, and special tokens, which come first.
    """

    BITS = 18

    def __init__(self, special_tokens: Iterable[str]):
        # A free slot has the key (0, 0), which isn't a word's, since it contains the length.
        self.keys = np.zeros((1 << self.BITS, 2), np.uint64)
        self.numbers = np.zeros(1 << self.BITS, np.int64)
        self.others = {text_to_bytes(token): n for n, token in enumerate(special_tokens)}
        self.size = len(self.others)

    def lookup(self, words: Pretokens) -> TwoArrays:
        """The number of each word, int64 [N], and for each new word one of its indices."""
        keys, in_table = word_keys(words), words.lengths <= MAX_SHORT
        in_table[words.special_at] = False
        hashes = (keys[:, 0] * HASH_FACTORS[0] ^ keys[:, 1]) * HASH_FACTORS[1]
        slots = (hashes >> np.uint64(64 - self.BITS)).astype(np.int64)
        numbers, equal = self.numbers.take(slots), self.keys.take(slots, axis=0) == keys
        missing = np.flatnonzero(~(equal[:, 0] & equal[:, 1]) & in_table)
        # Sorting by hash puts equal words side by side; each group gets the next number.
        # (Where two words have the same hash, one may get two numbers, which is harmless.)
        missing = missing[hashes[missing].argsort()]
        is_first = run_starts(keys[missing, 0]) | run_starts(keys[missing, 1])
        numbers[missing] = self.size - 1 + np.cumsum(is_first)
        new = missing[is_first]
        # TRAP: new words may share a slot. The last one wins, the same in both arrays.
        self.keys[slots[new]], self.numbers[slots[new]] = keys[new], numbers[new]
        self.size += len(new)
        new_others: list[int] = []
        at = np.flatnonzero(~in_table)
        for i, word in zip(at.tolist(), words.cut(at)):
            numbers[i] = self.others.setdefault(word, self.size)
            if numbers[i] == self.size:
                new_others.append(i)
                self.size += 1
        return numbers, np.append(new, np.array(new_others, np.int64))


# Errors, messages, and files that are never half-written
# -------------------------------------------------------


class UserError(ValueError):
    """An error the user can fix. The command line prints its message as a single line."""


def error_message(error: BaseException) -> str:
    """What to tell the user about an error, in one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or error}"
    return str(error).replace("\n", " ")


def log(text: str) -> None:
    """Tell the user something, on standard error: standard output is for results."""
    if Progress.enabled and get_rank() == 0:
        print_error(text + "\n")


def print_error(text: str) -> None:
    """Write to standard error, or nowhere if that fails: a lost log must not end a run."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:  # a closed pipe or terminal, a full disk
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


class Progress:
    """One line on the terminal: fraction done, rate, time left. Silent if not a terminal."""

    enabled = True  # --quiet sets it to False

    def __init__(self, label: str, total: float, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.shown = self.enabled and get_rank() == 0 and sys.stderr.isatty()
        self.start = self.last = time.monotonic()

    def update(self, done: float) -> None:
        now = time.monotonic()
        if not self.shown or now - self.last < 0.1:
            return
        self.last, rate = now, done / (now - self.start)
        left = datetime.timedelta(seconds=round((self.total - done) / rate if rate else 0))
        line = f"{self.label} {done / self.total:4.0%}  {rate:,.1f} {self.unit}/s  {left} left"
        print_error(f"\r{line:<79}")

    def close(self) -> None:
        if self.shown:
            print_error("\r" + " " * 79 + "\r")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file that appears at `path` complete, or not at all if the block raises."""
    path = Path(os.path.realpath(path))  # replace the target of a symbolic link
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rename a temporary file beside it at the end: on POSIX that is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # TRAP: without fsync, a power failure can leave the new name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


OUR_DIRECTORY = ".scratchformer"  # a file that marks directories of outputs


def new_directory(path: Path) -> None:
    """Make a directory for outputs, which `input_files` skips, or raise UserError."""
    if path.is_dir() and any(path.glob("[!.]*")):
        raise UserError(f"{path} isn't empty: give another --outdir; train --resume continues")
    path.mkdir(parents=True, exist_ok=True)
    (path / OUR_DIRECTORY).touch()


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Raise UserError if a file that will be written is one that is read."""
    for output, path in itertools.product(outputs, inputs):
        if path and output.exists() and output.samefile(path):
            raise UserError(f"{output} is an input: choose another place for the output")


def json_bytes(content: Any) -> bytes:
    """`content` as indented JSON."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


@contextlib.contextmanager
def file_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Turn any failure while reading a file into one line: PATH is not a valid KIND: why."""
    try:
        yield
    except Exception as error:  # a damaged file can fail in dozens of ways
        if isinstance(error, OSError) and error.filename:
            raise  # a missing or unreadable file is reported as such
        why = str(error) if isinstance(error, UserError) else f"it is damaged ({error!r})"
        raise UserError(f"{path} is not a valid {kind}: {why}") from None


def read_json(path: str | Path, kind: str) -> Any:
    """The content of a JSON file. `kind` names it in error messages."""
    with file_errors(path, kind):
        return json.loads(Path(path).read_bytes())


# The full tokenizer
# ------------------


def build_vocab(merges: Sequence[Merge], special_tokens: Sequence[str]) -> dict[int, bytes]:
    """The vocabulary, id to bytes: 256 bytes, merges in the order learned, special tokens."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += map(text_to_bytes, special_tokens)
    return dict(enumerate(tokens))


# The syntax that means the same to the regex package and to the `tokenizers` library, and that
# never looks far: only runs of one kind, such as letters or spaces, can be long. (What differs:
# \w, \b, \h, ^, $, (?s), (?P<name>), sets inside sets, and + after {1,3}.)
PATTERN_SYNTAX = regex.compile(r"""(?x)
    (?: \\p\{[A-Z][a-z]*\} | \\[sSdrnt] | \\\W                                  # a character
    | \[ (?!\^) (?:\\[pP]\{[A-Z][a-z]*\}|\\[drnt]|\\\W|(?!&&|--|-\\)[^\\\[\] ])+ \]
    | \[\^ (?:\\[pP]\{[A-Z][a-z]*\}|\\[sdrnt]|\\\W|(?!&&|--|-\\)[^\\\[\]])+ \]
      (?: (?![*+{]) | (?<=\\s[^\[]*) )                                     # one of several
    | \(\?[=!](?:\\[sSd]|\[[^\\\[\]]+\]|[^\\()[\].?*+])\)                   # one comes next
    | \(\?: | \(\?i:['|a-z\[\]]*\) | \)(?![*+{]) | \| | [*+?] | \{\d+,?\d*\}(?![+?])
    | (?!\.[*+{])[^\\()[\]{}^$*+?|]
    )*""")


def check_pattern(pattern: str) -> None:
    """Raise UserError unless `pattern` means the same to us and to `tokenizers`."""
    good = PATTERN_SYNTAX.match(pattern).end()  # type: ignore[union-attr]
    if good < len(pattern):
        raise UserError(f"{pattern[good:][:9]!r} in the pattern {pattern!r} may mean something "
                        r"else to tokenizers: use [], (?:), (?i:), \p{..}, \s, |, * + ? {m,n}")
    if regex.fullmatch(pattern, ""):
        raise UserError(f"the pattern {pattern!r} matches an empty string")


class Merges:
    """Merges by ids: the merge of rank n makes the token new[n]."""

    def __init__(self, merges: Sequence[Merge], id_of: Mapping[bytes, int]):
        ids = np.array([(id_of[left], id_of[right], id_of[left + right])
                        for left, right in merges], np.int64).reshape(-1, 3)
        # Both ids of a pair in one integer, sorted for binary search. The last is a sentinel.
        pairs = np.append(ids[:, 0] << 32 | ids[:, 1], np.iinfo(np.int64).max)
        self.rank_of_pair, self.pairs = np.argsort(pairs), np.sort(pairs)
        self.new, self.none = ids[:, 2], len(ids)  # `none`: the rank of a pair without a merge
        # Llama 3's list has several merges for a token, in an order of its own. So a merge can
        # create a pair of lower rank, which comes before the same merge further to the right.
        first_use = np.full(max(id_of.values()) + 1, self.none)
        np.minimum.at(first_use, ids[:, :2], np.arange(self.none)[:, None])
        self.in_order = first_use[self.new] > np.arange(self.none)

    def ranks(self, ids: np.ndarray, word: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """The rank of the pair at each `pos` and pos + 1; `none` if these are two words."""
        next_pos = np.minimum(pos + 1, len(ids) - 1)
        pairs = ids[pos] << 32 | ids[next_pos]
        found = self.pairs.searchsorted(pairs)
        one_word = (word[pos] == word[next_pos]) & (pos != next_pos)
        has_rank = (self.pairs[found] == pairs) & one_word
        return np.where(has_rank, self.rank_of_pair[found], self.none)


encoding_lock = threading.Lock()  # a cache of words is for one thread at a time


class Tokenizer:
    """The fast `BPETokenizer`: for any bytes and pattern, also for third-party tokenizers.

    Special tokens may be in `vocab` already; the others get the next free ids. Each pattern of
    a list splits the pieces that the last one made. For third-party tokenizers only: with
    `ignore_merges`, as in Llama 3, a pre-token that is in the vocabulary takes its id without
    any merges; `normalizer`, NFC or NFKC, replaces characters by equivalent ones first, so that
    decoding doesn't give them back; bytes the vocabulary lacks are skipped.
    """

    MAX_IDS = 1 << 20  # when the cache of words holds more, it is emptied

    def __init__(
        self, vocab: dict[int, bytes], merges: Sequence[Merge],
        special_tokens: Iterable[str] | None = None,
        pattern: str | Sequence[str] = PRETOKEN_PATTERN, ignore_merges: bool = False,
        normalizer: str | None = None,
    ):
        self.vocab, self.merges, self.normalizer = dict(vocab), list(merges), normalizer
        self.patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        self.ignore_merges = ignore_merges
        self.source = b""  # the file that `load` read, if any, which `save` writes again
        self.start_ids: list[int] = []  # what the file puts in front of a text, such as <s>
        # Reversed, so that the first id wins if a special token repeats an ordinary one.
        self.id_of = {token: i for i, token in reversed(self.vocab.items())}
        self.merge_table = Merges(self.merges, self.id_of)
        self.special_tokens: dict[str, int] = {}
        for token in special_tokens or []:
            data = text_to_bytes(token)
            if len(token) < 2 or token in self.special_tokens:
                raise UserError(f"special token {token!r} must be unique, not one character")
            if data not in self.id_of:
                self.id_of[data] = max(self.vocab) + 1
            self.special_tokens[token] = self.id_of[data]
            self.vocab[self.id_of[data]] = data
        for pattern in self.patterns:
            check_pattern(pattern)
        self.special_pattern = special_token_pattern(self.special_tokens)
        self.vocab_size = max(self.vocab) + 1
        # The id of the token that ends a text, as GPT-2 and as Llama 3 call it, if any.
        self.eot_id = self.special_tokens.get(
            END_OF_TEXT, self.special_tokens.get("<|end_of_text|>"))
        self.dtype = "<u2" if self.vocab_size <= 1 << 16 else "<u4"  # of ids in token files
        self.byte_ids = np.array([self.id_of.get(bytes([byte]), -1) for byte in range(256)])
        self.forget_words()

    def forget_words(self) -> None:
        """Empty the cache. In it, word number n has the ids pool[start[n] : start[n + 1]]."""
        self.table = WordTable(self.special_tokens)
        self.pool = np.array([*self.special_tokens.values()], np.int32)
        self.start = np.arange(len(self.pool) + 1)

    def encode(self, text: str, add_start: bool = False) -> list[int]:
        """The ids of `text`. Special tokens in it become their own ids.

        With `add_start`, the tokenizer's `start_ids` come first.
        """
        pieces = [self.encode_piece(piece) for piece in safe_pieces([text], self, CHUNK)]
        return self.start_ids * add_start + np.concatenate(pieces).tolist()

    def encode_iterable(self, chunks: Iterable[str]) -> Iterator[int]:
        """Yields the ids of the joined chunks, holding only a little text in memory."""
        # TRAP: open a file with newline="", or Python turns \r\n into \n.
        for text in safe_pieces(chunks, self, 1 << 13):
            yield from self.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these tokens, joined."""
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as key:
            raise UserError(f"id {key} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @classmethod
    def train(
        cls, source: Paths, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,),
        pattern: str = PRETOKEN_PATTERN,
    ) -> Tokenizer:
        """A tokenizer learned from a text, or from files and directories: see `train_bpe`."""
        vocab, merges = train_bpe(source, vocab_size, special_tokens, None, pattern)
        return cls(vocab, merges, special_tokens, pattern)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, which `tokenizers.Tokenizer.from_file` reads as well."""
        with atomic_write(path) as file:
            file.write(self.source or json_bytes(tokenizer_to_json(self)))  # chapter 15

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, ours or another library's byte-level BPE."""
        return tokenizer_from_json(Path(path).read_bytes(), path)  # chapter 15

    def fingerprint(self) -> str:
        """A hash of everything that determines the ids: are two tokenizers the same?"""
        content = [sorted(self.vocab.items()), self.merges, sorted(self.special_tokens.items()),
                   self.patterns, self.ignore_merges, self.normalizer]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def normalized_pieces(self, text: str) -> list[str]:
        """`text`, normalized, cut at special tokens, which are at the odd places."""
        pieces = self.special_pattern.split(text)
        if self.normalizer and not text.isascii():
            form: Any = self.normalizer
            pieces[::2] = [unicodedata.normalize(form, piece) for piece in pieces[::2]]
        return pieces

    def pretokenize(self, text: str) -> list[bytes]:
        """The pre-tokens and special tokens of `text`, normalized."""
        words = find_pretokens(text, self)
        return words.cut(np.arange(len(words.starts)))

    def encode_piece(self, text: str) -> np.ndarray:
        """The ids of a text that is small enough to be processed at once; int32 [N]."""
        words = find_pretokens(text, self)
        with encoding_lock:  # one thread at a time
            try:
                if len(self.pool) > self.MAX_IDS:
                    self.forget_words()
                numbers, new = self.table.lookup(words)
                if len(new):
                    ids, lengths = self.encode_words(words, new)
                    self.start = np.append(self.start, len(self.pool) + np.cumsum(lengths))
                    self.pool = np.append(self.pool, ids.astype(np.int32))
                starts, ends = self.start.take(numbers), self.start.take(numbers + 1)
                return self.pool.take(ragged_indices(starts, ends - starts))
            except BaseException:  # Ctrl-C, say, between a word's number and its ids
                self.forget_words()
                raise

    def encode_words(self, words: Pretokens, indices: np.ndarray) -> TwoArrays:
        """The ids of some words, concatenated, and how many each has.

        The ids of all words are in one flat array, and `word` tells which word each belongs to.
        Every round applies, in each word, the merge of lowest rank wherever it occurs (or only
        the first time, see `Merges`), until no merge is left. With merges th, the, he:

            ids    t h e n t h      word    0 0 0 0 1 1      before the first round
                   th e n th                0 0 0 1          word 1 is done
                   the n                    0 0              word 0 is done
        """
        lengths = words.lengths[indices]
        done_ids, done_words = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        if self.ignore_merges:  # some words are one token without any merge
            cut = words.cut(indices)
            whole = {n: self.id_of[word] for n, word in enumerate(cut) if word in self.id_of}
            done_ids.append(np.array([*whole.values()], np.int64))
            done_words.append(np.array([*whole], np.int64))
            lengths[done_words[-1]] = 0
        word = np.repeat(np.arange(len(indices)), lengths)
        data = np.frombuffer(words.data, np.uint8)
        ids = self.byte_ids[data[ragged_indices(words.starts[indices], lengths)]]
        ids, word = ids[ids >= 0], word[ids >= 0]  # drop bytes that no token stands for
        table = self.merge_table
        ranks = table.ranks(ids, word, np.arange(len(ids)))
        while len(ids):
            starts = np.flatnonzero(run_starts(word))
            lowest = np.minimum.reduceat(ranks, starts)
            lowest = np.repeat(lowest, np.diff(starts, append=len(ids)))
            is_done = lowest == table.none
            done_ids.append(ids[is_done])
            done_words.append(word[is_done])
            pos = np.flatnonzero((ranks == lowest) & ~is_done)
            pos = pos[without_overlaps(pos, pos + 1)]
            pos = pos[table.in_order[ranks[pos]] | run_starts(word[pos])]  # or only the first
            ids[pos] = table.new[ranks[pos]]
            keep = ~is_done
            keep[pos + 1] = False
            new_pos = np.cumsum(keep)[pos] - 1  # where the merged tokens are after the removal
            ids, word, ranks = ids[keep], word[keep], ranks[keep]
            changed = np.append(new_pos[new_pos > 0] - 1, new_pos)
            ranks[changed] = table.ranks(ids, word, changed)
        all_ids, all_words = np.concatenate(done_ids), np.concatenate(done_words)
        order = all_words.argsort(kind="stable")
        return all_ids[order], np.bincount(all_words, minlength=len(indices))


# Files larger than memory
# ------------------------
# Files are cut into pieces that can be processed independently, so that memory stays small and
# every CPU core can help. A cut is safe where the pre-tokens on both sides stay the same. In
# most patterns, none contains a letter or digit followed by a space or punctuation mark, so a
# cut after a word is safe: "one two|, three". We try a few words' ends, from the last one.


def last_safe_split(text: str, tokenizer: Tokenizer) -> int:
    """The last position where `text`, which began at one, can be cut whatever follows, or 0."""
    near = max(64, *map(len, tokenizer.special_tokens), 0)
    end = max(0, len(text) - near)
    word_ends = r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}\p{M}])"  # (?r) searches backwards
    for match in itertools.islice(regex.finditer(word_ends, text, endpos=end), 1000):
        cut = match.start()
        left, right = text[max(0, cut - near) : cut], text[cut : cut + near]
        parts = [tokenizer.pretokenize(part) for part in (left, right, left + right)]
        if parts[0] + parts[1] == parts[2]:
            return cut
    found = tokenizer.special_pattern.finditer(text)
    return max([match.end() for match in found if match.start() < end], default=0)


def safe_pieces(chunks: Iterable[str], tokenizer: Tokenizer, size: int) -> Iterator[str]:
    """The text of `chunks` in pieces of about `size` characters, to be encoded one by one."""
    text, wanted = "", size
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            text += chunk[start : start + size]
            if len(text) >= wanted:
                cut = last_safe_split(text, tokenizer)
                if cut:
                    yield text[:cut]
                text = text[cut:]
                wanted = max(size, 2 * len(text))  # doubling keeps the search time linear
    yield text


def input_files(paths: Paths) -> list[Path]:
    """The text files to read: in directories, what isn't hidden, binary or made by us."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files: list[Path] = []
    for path in map(Path, given):
        if "\n" in str(path) or len(str(path)) > 4096:
            raise UserError(f"a text where a path belongs: {str(path)[:40]!r}...")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        ours = {file.parent for file in found if file.name == OUR_DIRECTORY}
        found = [file for file in found if not ours & {*file.parents}
                 and (file.is_file() or file == path)
                 and not any(part[0] == "." for part in file.parts[len(path.parts) :])]
        binary = {file for file in found if is_binary(file)}
        metadata = {Path(f"{file}.json") for file in binary}  # of those that are token files
        if path in binary and min(metadata).is_file():
            raise UserError(f"{path} is a token file, not text")
        skipped = binary - {path}  # what is named is read
        if skipped or ours:
            log(f"skipping binary files and what we made, such as {min(skipped | ours)}")
        files += [file for file in found if file not in metadata | skipped]
    if not any(path.stat().st_size for path in files):
        raise UserError(f"no text to read in {', '.join(map(str, given))} (hidden and binary "
                        "files, and directories that we have made, are skipped)")
    return files


def is_binary(path: Path) -> bool:
    """Whether there is a NUL byte in the first 8,000: the test that git uses."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8000)


Piece = tuple[str, bool]  # text, and whether it's the last of its file


def split_files(files: Sequence[Path], tokenizer: Tokenizer, label: str) -> Iterator[Piece]:
    """Yields pieces of about CHUNK characters that add up to the files, and shows progress."""
    done, total = 0, sum(path.stat().st_size for path in files)
    progress = Progress(label, total / 1e6, "MB")
    for path in files:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            chunks = iter(functools.partial(file.read, CHUNK), "")
            texts: Any = itertools.chain(safe_pieces(chunks, tokenizer, CHUNK), [None])
            for text, following in itertools.pairwise(texts):
                yield text, following is None
                progress.update((done + file.buffer.tell()) / 1e6)  # type: ignore[attr-defined]
        done += path.stat().st_size
    progress.close()


# Files on many cores
# -------------------
# On Linux, count the cores that this process is allowed to use.
NUM_CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
worker_function: Callable  # in a worker process, what to call for every task


def start_worker(function: Callable) -> None:
    """What a worker process does first. It gets the function once, with all that it needs."""
    global worker_function, encoding_lock
    worker_function = function
    encoding_lock = threading.Lock()  # a thread of the parent may hold the other one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    parent: Any = multiprocessing.parent_process()  # if it is killed, don't wait forever
    threading.Thread(target=lambda: [parent.join(), os._exit(1)], daemon=True).start()


def call_worker_function(task: Any) -> Any:
    """What a worker process does for every task."""
    return worker_function(task)


def map_on_cores(
    function: Callable, tasks: Iterable, files: list[Path], num_workers: int | None
) -> Iterator[Any]:
    """Yields `function(task)` for each task, in order, computed in several processes."""
    # WHY fork: the new process starts at once and shares our memory. TRAP: forking is unsafe on
    # macOS, and after PyTorch has started threads. "spawn" runs the main script again instead:
    # if that isn't this file, do it only when asked (below `if __name__ == "__main__":`).
    fork = sys.platform == "linux" and "torch._C" not in sys.modules
    main_file = getattr(sys.modules["__main__"], "__file__", "")
    if num_workers is None:
        # Less than 4 MB would be done before another process is ready.
        size = sum(path.stat().st_size for path in files)
        num_workers = min(NUM_CORES, size // (8 * CHUNK)) * (fork or main_file == __file__)
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("fork" if fork else "spawn")
    try:
        with ProcessPoolExecutor(num_workers, context, start_worker, (function,)) as pool:
            running: list[Future] = []  # or waiting
            for task in tasks:
                running.append(pool.submit(call_worker_function, task))
                if len(running) > num_workers:
                    yield running.pop(0).result()
            yield from (future.result() for future in running)
    except futures.BrokenExecutor:
        raise UserError("a worker process died: is there enough memory?") from None


def count_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Counter[bytes]:
    """How often each pre-token occurs in some parts of files."""
    table = WordTable(tokenizer.special_tokens)
    seen = list(table.others)  # seen[n] is the word with number n
    counts = np.zeros(len(seen), np.int64)
    for text, _ in pieces:
        words = find_pretokens(text, tokenizer)
        numbers, new = table.lookup(words)
        seen += words.cut(new)
        counts = np.append(counts, np.zeros(len(new), np.int64))
        counts += np.bincount(numbers, minlength=len(counts))
    totals: Counter[bytes] = Counter()
    ordinary = slice(len(tokenizer.special_tokens), None)
    for word, count in zip(seen[ordinary], counts[ordinary].tolist()):
        totals[word] += count
    return totals


def count_files(paths: Paths, tokenizer: Tokenizer, num_workers: int | None) -> Counter[bytes]:
    """`count_pretokens` of text files of any size."""
    files, counts = input_files(paths), Counter[bytes]()
    pieces = split_files(files, tokenizer, "counting")
    # Use few, large tasks, since most words are in the result of every task.
    tasks = iter(lambda: list(itertools.islice(pieces, 10)), [])
    count = functools.partial(count_pieces, tokenizer=tokenizer)
    for result in map_on_cores(count, tasks, files, num_workers):
        counts.update(result)
    return counts


def train_bpe(
    source: Paths, vocab_size: int, special_tokens: Sequence[str],
    num_workers: int | None = None, pattern: str = PRETOKEN_PATTERN,
) -> tuple[dict[int, bytes], list[Merge]]:
    """A vocabulary of at most `vocab_size` tokens, and its merges in the order learned.

    `source` is a file or a directory, or several, or a text: a string with a line break, or of
    more than 255 characters.
    """
    num_fixed = 256 + len(special_tokens)
    if vocab_size < num_fixed:
        raise UserError(f"vocab_size must be at least {num_fixed}: bytes and special tokens")
    splitter = Tokenizer(build_vocab([], special_tokens), [], special_tokens, pattern)
    if isinstance(source, str) and ("\n" in source or len(source) > 255):
        pieces = safe_pieces([source], splitter, CHUNK)
        counts = count_pieces(((piece, False) for piece in pieces), splitter)
    else:
        counts = count_files(source, splitter, num_workers)
    merges = learn_merges(counts, vocab_size - num_fixed)
    return build_vocab(merges, special_tokens), merges


def encode_part(piece: Piece, tokenizer: Tokenizer, append_eot: bool) -> bytes:
    """The ids of a part of a file, as they are stored in a token file."""
    text, is_last = piece
    ids = tokenizer.encode_piece(text)
    if append_eot and is_last and ids[-1:].tolist() != [tokenizer.eot_id]:
        ids = np.append(ids, np.array([tokenizer.eot_id]))
    return ids.astype(tokenizer.dtype).tobytes()


def encode_file(
    tokenizer: Tokenizer, dataset_path: Paths, out_path: str | Path,
    append_eot: bool = False, num_workers: int | None = None,
) -> int:
    """Encode text files into the token file `out_path`; returns the number of tokens.

    A token file is raw ids without a header, little-endian uint16, or uint32 if the vocabulary
    has more than 65,536 entries. Its metadata is in `out_path`.json. With `append_eot`, each
    input file that does not end with the end-of-text token gets one.
    """
    files, dtype = input_files(dataset_path), np.dtype(tokenizer.dtype)
    if append_eot and tokenizer.eot_id is None:
        raise UserError(f"append_eot needs the special token {END_OF_TEXT} in the tokenizer")
    pieces = split_files(files, tokenizer, "encoding")
    encode = functools.partial(encode_part, tokenizer=tokenizer, append_eot=append_eot)
    with atomic_write(out_path) as out:
        for ids in map_on_cores(encode, pieces, files, num_workers):
            out.write(ids)
        num_tokens = out.tell() // dtype.itemsize
        # TRAP: write the metadata first; the token file appears at the end of this block. If we
        # are killed in between, an old token file doesn't fit its metadata: `train` says so.
        with atomic_write(f"{out_path}.json") as metadata:
            metadata.write(json_bytes({
                "dtype": dtype.name, "vocab_size": tokenizer.vocab_size,
                "num_tokens": num_tokens, "tokenizer_sha256": tokenizer.fingerprint()}))
    return num_tokens


# Exercises
# 1. Set WordTable.BITS to 4. `bpe-encode` gets slower, and its result stays the same. Why?
# 2. Let `entry` in `learn_merges` return -index.left[pair] and -index.right[pair] instead of
#    the two tokens. Predict the merges of chapter 2's example, then check.


# ----------------------------------------------------------------------------------------
# 9. Faster steps
#
# How does the same step take less time and memory on one device? Matmuls in half precision run
# several times faster on a GPU; the logits, the largest tensor of all, are never stored whole;
# torch.compile merges small operations; activations can be computed twice instead of stored.
# The results are the same, up to rounding. A *kernel* is a program that a GPU runs, and the
# *host* is the CPU that launches it. (Micikevicius et al. 2018, arXiv 1710.03740: mixed
# precision; Chen et al. 2016, arXiv 1604.06174: activation checkpointing)
# ----------------------------------------------------------------------------------------

import shutil


@dataclasses.dataclass(kw_only=True)
class DeviceConfig:
    """Devices"""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # device to compute on
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of matmuls


# float32 has 24 significant bits. bfloat16 has only 8, but the same range; float16 has 11 and
# a small range, 6e-8 to 65,504. So parameters stay in float32, where a small update isn't
# rounded away, and `torch.autocast` converts the inputs of matmuls on the fly.
def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matmuls. "auto": bfloat16 where the GPU has it; float32 on a CPU."""
    cuda = device.type == "cuda"
    has_bfloat16 = cuda and torch.cuda.is_bf16_supported(False)
    if name == "auto":
        name = "bfloat16" if has_bfloat16 else "float16" if cuda else "float32"
    # What stays float32 on a GPU uses TF32: matmuls round their inputs to 11 bits.
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    return getattr(torch, name)


def make_autocast(device: torch.device, dtype: torch.dtype, fsdp: bool = False) -> Any:
    """A context for matmuls in `dtype`. Off for float32 and for FSDP, which casts by itself."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not fsdp)


class GradScaler:
    """Skips steps whose gradients are inf or NaN, and keeps float16 gradients in range.

    Many gradients are below 6e-8, where float16 has no numbers left. So the loss is multiplied
    by a large power of two, and the gradients are divided by it. If they overflow, the step is
    skipped and the scale halved; it doubles every 2,000 steps. For other dtypes it is 1.
    WHY not `if grad_norm.isfinite(): optimizer.step()`: it makes the host wait for the GPU.
    Fused AdamW doesn't: it divides gradients by `grad_scale`, and skips if `found_inf` is 1.
    WHY not torch.amp.GradScaler: under FSDP (chapter 12) it sees one process's shards only, so
    one process would skip a step that the others take.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, dtype: torch.dtype, loss_scale: float = 1.0):
        self.is_float16 = dtype == torch.float16
        first = loss_scale if loss_scale > 1 else 2.0**16  # 1: saved with another dtype
        self.loss_scale = torch.tensor(first if self.is_float16 else 1.0, device=device)
        self.skipped, self.consecutive_skips = torch.zeros(2, device=device)

    @torch.no_grad()
    def step(self, optimizer: Any, grad_norm: Tensor, clip_grad: float, step: int = 1) -> None:
        """Unscale and clip the gradients, then step. `grad_norm` is their unscaled norm."""
        found_inf, divisor = (~grad_norm.isfinite()).float(), self.loss_scale
        if clip_grad:
            divisor = divisor * (grad_norm / clip_grad).clamp(min=1.0)
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = divisor, found_inf
            optimizer.step()
        elif not found_inf.item():  # an optimizer that you have added
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p.grad is not None:
                    p.grad /= divisor
            optimizer.step()
        self.skipped = self.skipped + found_inf
        self.consecutive_skips = (self.consecutive_skips + 1) * found_inf  # a good step: 0
        if self.is_float16:
            factor = 1.0 if step % self.GROWTH_INTERVAL else 2.0
            self.loss_scale = self.loss_scale * torch.where(found_inf > 0, 0.5, factor)


def chunk_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses of R rows of x [R, D], divided by 16."""
    # TRAP: in float16, a gradient that sums over thousands of rows may exceed 65,504. The
    # division by their number, in `backward`, comes too late. Hence the 16.
    return cross_entropy(compute_logits(x, weight), targets).sum() / 16


class ChunkedLoss(torch.autograd.Function):
    """cross_entropy(compute_logits(x, weight), targets).mean(), with few logits at a time.

    `forward` computes the logits of R rows, differentiates their loss right away, and discards
    them. So `backward` only has to scale the gradients. (A torch.autograd.Function is an
    operation that brings its own derivative. Hsu et al. 2024, Liger, arXiv 2410.10989)
    x [N, D], weight [V, D], targets int64 [N], where -100 is ignored; a float32 scalar.

    >>> weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)  # odds 1 : 3
    >>> loss = ChunkedLoss.apply(torch.ones(1, 1), weight, torch.tensor([1]), True)
    >>> loss.backward()
    >>> weight.grad  # p, less 1 at the target: 1/4 and 3/4 - 1
    tensor([[ 0.2500],
            [-0.2500]])
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_grad: bool) -> Tensor:
        matrix, total = weight.to(x.dtype), torch.zeros((), device=x.device)
        grad_x, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        # Few enough rows for a CPU's caches, enough to keep a GPU busy; and at most 16 chunks,
        # because torch.compile unrolls the loop.
        size = max(512 if x.device.type == "cpu" else 4096, -(-len(x) // 16))
        for x_chunk, target in zip(x.split(size), targets.split(size)):
            if with_grad:
                differentiate = torch.func.grad_and_value(chunk_loss, argnums=(0, 1))
                (grad_x_chunk, grad_matrix), loss = differentiate(x_chunk, matrix, target)
                grad_x.append(grad_x_chunk)  # (R, D)
                grad_weight += grad_matrix  # (V, D)
            else:
                loss = chunk_loss(x_chunk, matrix, target)
            total += loss
        scale = 16 / (targets >= 0).sum().clamp(min=1)
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, scale)
        return total * scale

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight, scale = ctx.saved_tensors
        return grad_x * (grad_loss * scale), grad_weight * (grad_loss * scale), None, None


def chunked_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of targets [B, T] for hidden states x [B, T, D]."""
    return ChunkedLoss.apply(x.flatten(0, -2), weight, targets.flatten(),
                             torch.is_grad_enabled())


@dataclasses.dataclass
class LlamaConfig(ModelConfig):
    """Model"""

    rope_scaling: list[float] | None = None
    # Llama 3.1's RoPE scaling: factor, low and high frequency factor, original context
    trained: bool = False  # whether it began as a model from a Hugging Face directory


class TransformerWithLoss(Transformer):
    """The model that the commands run: given targets [B, T], it returns their mean loss."""

    loss_function = staticmethod(chunked_loss)

    def make_rope(self) -> Tensor:
        c = self.config
        frequencies = rope_frequencies(c.head_dim, c.rope_theta)
        if scaling := getattr(c, "rope_scaling", None):
            frequencies = llama3_rope_scaling(frequencies, scaling)  # chapter 15
        return rope_table(torch.arange(c.context_length), frequencies)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.hidden_states(tokens)  # (B, T, D)
        if targets is None:
            return compute_logits(x, self.lm_head.weight)  # (B, T, V)
        return self.loss_function(x, self.lm_head.weight, targets)


def has_compiler() -> bool:
    """Whether torch.compile will find a C or C++ compiler."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "gcc", "clang")))


def make_faster(model: TransformerWithLoss, speed: ProcessConfig, per_block: bool) -> None:
    """Checkpoint activations and compile: the model as a whole, or each block on its own."""
    if speed.activation_checkpointing:
        from torch.utils.checkpoint import checkpoint
        # Each block keeps only its input, and the backward pass runs the block again. Saves
        # most of the memory for activations, for a third more computation.
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if speed.compile and per_block:
        for block in model.blocks:
            block.compile()  # all blocks share one compilation
        model.loss_function = torch.compile(chunked_loss)
    elif speed.compile:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]


def without_compiling() -> Any:
    """A context in which compiled code runs as plain Python: for shapes that occur once."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()  # nothing is compiled; the import would take seconds
    return torch.compiler.set_stance("force_eager")


# Exercise: Train a small model (--num_layers 1 --d_model 64) with --dtype float16 on a CPU and
# GROWTH_INTERVAL = 20. Print `loss_scale` in `step`: it doubles, and halves at an overflow.


# ----------------------------------------------------------------------------------------
# 10. Muon
#
# AdamW treats a matrix as a bag of separate numbers. But a matrix acts on vectors. Its gradient
# and AdamW's update have a few large singular values and many small ones: a few directions
# dominate, and along all others the matrix hardly changes. Muon makes the singular values of
# the update nearly equal, so that rare directions are learned as fast as common ones. Where we
# compared them (data/results.md), Muon reached AdamW's final loss in two thirds of the steps,
# each 8% longer. It's for the matrices of the blocks. AdamW still learns the norm weights,
# lm_head (it does better there), and the embedding, whose rows are used alone. (Jordan et al.
# 2024, kellerjordan.github.io/posts/muon; Bernstein & Newhouse 2024, arXiv 2409.20325: of all
# updates that lengthen no vector by more than some factor, this one lowers the loss fastest)
# ----------------------------------------------------------------------------------------


def orthogonalize(x: Tensor) -> Tensor:
    """The matrices x [N, rows, columns], with all singular values moved close to 1.

    If x = U @ diag(s) @ V.T, then x @ x.T @ x = U @ diag(s^3) @ V.T. So matmuls alone apply a
    polynomial to the singular values: a * s + b * s^3 + c * s^5. Each round makes small ones
    3.4 times as large. Five with Jordan's a, b and c, a Newton-Schulz iteration, bring all that
    are above 0.01 between about 0.7 and 1.2, even in bfloat16.

    This update stretches (1, 1) by 3.9 and (1, -1) by 0.1; afterwards both by roughly 1:

    >>> update = torch.tensor([[[2.0, 1.9], [1.9, 2.0]]])
    >>> torch.linalg.svdvals(update), torch.linalg.svdvals(orthogonalize(update))
    (tensor([[3.9000, 0.1000]]), tensor([[0.9718, 0.6968]]))
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]  # multiply on the side where the square is smaller
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(5):
        square = x.mT @ x if tall else x @ x.mT  # (N, n, n), n = min(rows, columns)
        # a * identity + b * square + c * square @ square
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        x = x @ factor if tall else factor @ x
    return x


def make_scaled_adamw(model: Any, params: dict, config: OptimizerConfig) -> torch.optim.AdamW:
    """`make_adamw`, with a higher learning rate for embeddings in a model wider than 128.

    `params` maps each parameter to the tensor to update: itself, or its shard (chapter 12).
    `Trainer.step` multiplies a group's learning rate by its lr_scale.
    WHY: a matrix adds up d_model products, which change together, so --lr has to fall as the
    width grows. A lookup touches a single row. In theory, the ratio of their rates grows with
    the width. (Yang et al. 2022, arXiv 2203.03466, table 3) We measured larger ones: the best
    we tried were 1 at a width of 128, and 30 (AdamW) and 33 (Muon) at 768 (data/results.md).
    Wider models get 36, untried; an embedding that others trained, or that is lm_head's, 1.
    """
    trained = getattr(model.config, "trained", False)
    scale = 1.0 if trained else min(max(1.0, model.config.d_model / 128), 6.0) ** 2
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    tables.discard(model.lm_head.weight)
    optimizer = make_adamw([x for p, x in params.items() if p not in tables], config)
    optimizer.add_param_group({
        "params": [x for p, x in params.items() if p in tables],
        "weight_decay": config.weight_decay / scale, "lr_scale": scale})
    return optimizer


MUON_DECAY = 0.95  # of the momentum, as beta1 is of AdamW's m


def muon_naive(
    weight: Tensor, grad: Tensor, momentum: Tensor, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One update of Muon for one matrix, written out: the new weight and the new momentum.

    The momentum is AdamW's m. The update mixes in the gradient once more (Nesterov momentum).
    WHY 0.2 * sqrt(max(rows, columns)): U @ V.T has min(rows, columns) singular values of 1, so
    its entries have a magnitude of about 1 / sqrt(max(rows, columns)), and those of AdamW's
    updates, in practice, about 0.2 (not 1, because gradients change sign). With this factor, lr
    and weight_decay mean what they mean for AdamW. (Liu et al. 2025, arXiv 2502.16982, 2.2)
    """
    momentum = MUON_DECAY * momentum + (1 - MUON_DECAY) * grad
    update = orthogonalize((MUON_DECAY * momentum + (1 - MUON_DECAY) * grad)[None])[0]
    update = 0.2 * math.sqrt(max(weight.shape)) * update
    return weight - lr * (weight_decay * weight + update), momentum


class Muon(torch.optim.AdamW):
    """`muon_naive` for the matrices of the blocks, AdamW for all other parameters.

    `params` maps each parameter to the tensor that the optimizer updates: the parameter itself,
    or, under FSDP, this process's shard of it (`local_params`, chapter 12). Layers of the same
    shape, such as all mlp.down, are one group of parameters, a *stack*: their matrices are
    orthogonalized together, in the precision `dtype`.
    """

    def __init__(
        self, model: Any, params: dict[Any, Any], config: OptimizerConfig,
        dtype: torch.dtype = torch.float32, compiled: bool = False,
    ):
        stacks: dict[Any, Any] = {}
        others = dict(params)
        for layer in model.blocks.modules():
            if isinstance(layer, Projection) and layer.weight in others:
                stack = stacks.setdefault((layer.d_outs, layer.in_features), {
                    "params": [], "weight_decay": config.weight_decay,
                    "d_outs": list(layer.d_outs)})
                stack["params"].append(others.pop(layer.weight))
        groups = make_scaled_adamw(model, others, config).param_groups
        super().__init__([*groups, *stacks.values()], lr=config.lr, fused=True)
        for weight in (weight for stack in stacks.values() for weight in stack["params"]):
            self.state[weight]["exp_avg"] = torch.zeros_like(weight)  # the momentum
        self.dtype = dtype
        if compiled:  # fewer passes over memory
            for name in ("update_momenta", "apply_update"):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # AdamW skips parameters without a gradient, and so do we. The matrices are among
            # its parameters: we update them, drop their gradients, and let it do the rest.
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if "d_outs" in group and weights:
                found_inf = getattr(self, "found_inf", weights[0].new_zeros(()))
                divisor = getattr(self, "grad_scale", weights[0].new_ones(()))
                grads = [weight.grad for weight in weights]
                momenta = [self.state[weight]["exp_avg"] for weight in weights]
                updates = self.update_momenta(grads, momenta, divisor, found_inf)
                updates = self.orthogonalize_all(updates, group["d_outs"])
                scale = 0.2 * math.sqrt(max(group["d_outs"][0], updates.shape[2]))
                lr = group["lr"] * (1 - found_inf)
                self.apply_update(weights, updates, scale, lr, group["weight_decay"])
                for weight in weights:
                    weight.grad = None
        super().step()

    def update_momenta(
        self, grads: list, momenta: list, divisor: Tensor, found_inf: Tensor
    ) -> Tensor:
        """Update the momentum buffers. Returns updates [N, rows, columns]."""
        updates = []
        for grad, momentum in zip(grads, momenta):
            # On overflow: averaging the momentum with itself leaves it unchanged.
            grad = torch.where(found_inf > 0, momentum, grad / divisor)
            momentum.lerp_(grad, 1 - MUON_DECAY)
            updates.append(grad.lerp(momentum, MUON_DECAY).to(self.dtype))
        return torch.stack(updates)

    def orthogonalize_all(self, updates: Tensor, d_outs: list[int]) -> Tensor:
        """`orthogonalize` each matrix (qkv has three) of N layers [N, sum(d_outs), d_in]."""
        if len(set(d_outs)) == 1:  # all at once
            matrices = updates.reshape(-1, d_outs[0], updates.shape[2])
            return orthogonalize(matrices).view_as(updates)
        return torch.cat([orthogonalize(x) for x in updates.split(d_outs, dim=1)], dim=1)

    def apply_update(
        self, weights: list, updates: Tensor, scale: float, lr: Tensor, weight_decay: float
    ) -> None:
        """Move the weights; not at all if `lr` is 0."""
        for weight, update in zip(weights, updates):
            weight.sub_(lr * (weight_decay * weight + scale * update))


# Exercise: Return `x` from `orthogonalize` at once and train the demo's model again; then `x`
# as large as an orthogonal matrix, of norm sqrt(min(rows, columns)). Is Muon's gain left?


# ----------------------------------------------------------------------------------------
# 11. Faster generation
#
# What bounds the speed of `generate`? Each token takes hundreds of kernels. A GPU finishes them
# in less time than the host needs to launch them one by one. And when the host reads an id, it
# waits until the GPU has computed it, and then the GPU waits for the host. So launch all of a
# step's kernels at once, as a CUDA graph, and read the ids of many steps together.
# (gpt-fast, github.com/pytorch-labs/gpt-fast, did the former for PyTorch models)
# ----------------------------------------------------------------------------------------


class StaticCache(KVCache):
    """A `KVCache` for B texts, allocated once: the plain one copies it all to append some."""

    def __init__(self, model: Transformer, batch_size: int, size: int):
        c, weight = model.config, model.lm_head.weight
        # TRAP: empty memory may hold NaN; the weight 0 of an unseen column times NaN is NaN.
        shape = (c.num_layers, batch_size, size, c.num_kv_heads, c.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.all_tokens = torch.zeros(batch_size, size, dtype=torch.int64, device=weight.device)
        self.columns = torch.arange(size, device=weight.device)
        super().__init__()

    def add_tokens(self, tokens: Tensor) -> None:
        S, self.length = self.length, self.length + tokens.shape[1]
        self.positions = self.columns[S : self.length]
        self.all_tokens[:, S : self.length] = tokens
        self.tokens = self.all_tokens[:, : self.length]

    def add_keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer][:, self.positions] = k
        self.values[layer][:, self.positions] = v
        S = self.tokens.shape[1]
        return self.keys[layer][:, :S], self.values[layer][:, :S]


class CUDAGraphModel:
    """A model that computes single tokens by replaying a CUDA graph.

    A CUDA graph is a recording of kernel launches, which one launch replays: the same kernels
    on the same memory. So what changes, tokens and position, is kept in tensors that stay where
    they are, and the result is overwritten by the next call.
    """

    def __init__(self, model: Transformer):
        self.model, self.config, self.lm_head = model, model.config, model.lm_head
        self.graph: torch.cuda.CUDAGraph | None = None

    def hidden_states(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        """The same as the model's. The cache must be the same in every call."""
        if tokens.shape[1] > 1:
            return self.model.hidden_states(tokens, cache)
        if self.graph is None:
            self.new, self.position = tokens.clone(), cache.positions.clone()
        self.new.copy_(tokens)
        self.position.copy_(cache.positions)
        # Attend to all columns: their number can't change, and the mask hides the empty ones.
        filled, cache.tokens, cache.positions = cache.tokens, cache.all_tokens, self.position
        with torch.cuda.device(tokens.device):
            if self.graph is None:
                self.model.hidden_states(self.new, cache)  # initializes libraries
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):
                    self.x = self.model.hidden_states(self.new, cache)
            self.graph.replay()  # recording alone computes nothing
        cache.tokens = filled
        return self.x


def generate_texts(
    model: Transformer, prompts: Tensor, max_new_tokens: int, seed: int = 0,
    stop_ids: Collection[int] = (), **sampling: Any,
) -> Iterator[list[int | None]]:
    """`generate` with seed + n for text n: each step's ids, None for texts that have ended."""
    B, device = len(prompts), model.rope.device
    size = min(model.config.context_length, prompts.shape[1] + max_new_tokens)
    runner: Any = CUDAGraphModel(model) if device.type == "cuda" else model
    burst = 16 if device.type == "cuda" else 1  # how many steps' ids the host reads together
    u = random_numbers(seed, B, max_new_tokens).to(device)
    steps = generate(runner, prompts.to(device), u, StaticCache(model, B, size), **sampling)
    ended = [False] * B
    while some_steps := list(itertools.islice(steps, burst)):
        for ids in torch.stack(some_steps).tolist():
            yield [None if end else i for i, end in zip(ids, ended)]
            ended = [end or i in stop_ids for i, end in zip(ids, ended)]
            if all(ended):
                return


def stream_text(
    tokenizer: BPETokenizer | Tokenizer, ids: Iterable[int], prompt: str = ""
) -> Iterator[str]:
    """`prompt` and the text of `ids`, in whole characters: their bytes may come one by one."""
    valid = text_to_bytes(prompt).decode("utf-8", "replace") == prompt  # or cut mid-character
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if valid else "surrogateescape")
    yield decoder.decode(text_to_bytes(prompt))
    for token in ids:
        yield decoder.decode(tokenizer.vocab[token])
    yield decoder.decode(b"", final=True)


# Exercise: On a GPU, time `generate_texts`, without stop_ids, with `burst` 1 and with 16.


# ========================================================================================
# PART THREE: LONG RUNS ON MANY DEVICES
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 12. Many devices
#
# How do several devices train one model? *Data parallel*: each process holds the whole
# model, sees different rows of the batch, and all average their gradients before the update.
# FSDP, fully sharded data parallel: each process holds only a shard of every parameter, gathers
# the rest when a matmul needs it, and drops it afterwards. A parameter costs 16 bytes
# (4 itself, 4 its gradient, 8 AdamW's m and v), but a matmul only needs its value, 2 to 4.
# On eight GPUs: torchrun --nproc_per_node=8 scratchformer.py train ..., with --fsdp if a model
# and its optimizer don't fit on one. (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section
# 5; Zhao et al. 2023, FSDP, arXiv 2304.11277)
# ----------------------------------------------------------------------------------------

import gc
import traceback

# `torchrun` starts several copies of a program, *processes*, and tells each its place in
# environment variables: RANK, its number; WORLD_SIZE, how many there are; LOCAL_RANK and
# LOCAL_WORLD_SIZE, the same on this machine alone. A *collective* is an operation that every
# process must call, in the same order, or all wait forever: all_reduce gives every process the
# sum of all their tensors, and broadcast gives every process one process's tensor.


@dataclasses.dataclass(kw_only=True)
class ProcessConfig(DeviceConfig):
    """Devices, speed, and processes (start several with torchrun)"""

    compile: bool = False  # fuse kernels with torch.compile: slower start, faster steps
    activation_checkpointing: bool = False  # compute activations twice to save memory
    fsdp: bool = False  # shard parameters, gradients and optimizer state over the processes
    fsdp_unit: Literal["auto", "model", "block"] = "auto"
    # what FSDP gathers at once; auto: the model up to 10^9 parameters, else a block
    shard_size: int = 0  # processes that share one replica (those of a node, say); 0: all


def check_processes(processes: ProcessConfig) -> None:
    """Raise UserError if these flags don't fit this machine or what torchrun started."""
    if not processes.fsdp and (processes.shard_size or processes.fsdp_unit != "auto"):
        raise UserError("each of --shard_size and --fsdp_unit needs --fsdp")
    if processes.shard_size and get_world_size() % processes.shard_size:
        raise UserError(f"--shard_size doesn't divide {get_world_size()} processes")
    if processes.compile and not has_compiler():
        raise UserError("--compile needs a C++ compiler, such as g++")


def get_rank() -> int:
    """This process's number among all that torchrun started, from 0."""
    return int(os.environ.get("RANK", 0))


def get_world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def pick_device(kind: str) -> torch.device:
    """This process's device: its own GPU if there is CUDA, else the CPU."""
    cuda = torch.cuda.is_available()
    if kind == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
    if kind == "cpu" or not cuda:  # WHY no "mps", a Mac's GPU: we couldn't test it
        return torch.device("cpu")
    gpus, local_size = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_size > gpus:
        raise UserError(f"{local_size} processes on a machine with {gpus} CUDA devices")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun has started, if any, and leave them cleanly."""
    if "RANK" not in os.environ:
        yield
        return
    # NCCL carries gradients between GPUs, gloo small decisions between CPUs: for those, the
    # host doesn't wait for the GPU. WHY an hour: all wait while process 0 writes a file.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(hours=1))
    try:
        yield
    except BaseException as error:
        if get_rank() > 0:
            time.sleep(5)  # process 0 tells an error that all have; torchrun ends this sleep
        if not isinstance(error, (UserError, OSError)):
            traceback.print_exc()
        print_error(f"scratchformer: error: process {get_rank()}: {error_message(error)}\n")
        # WHY not leave cleanly: the others may be waiting for this process. torchrun ends them.
        os._exit(2)
    # TRAP: while something holds the group, or others still communicate, leaving it aborts some
    # CPU runs at exit: "terminate called without an active exception".
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def broadcast(value: Any) -> Any:
    """Process 0's `value`, on every process."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes. Collective: every rank must call this."""
    value = value.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def load_batches(
    tokens: TokenFile, context_length: int, steps: range, device: torch.device,
    data: DataConfig, rank: int = 0, world_size: int = 1, first_window: int = 0,
) -> Generator:
    """Yield this process's micro-batches of all `steps`.

    A step may have several *micro-batches*, whose gradients add up (chapter 14). Of each one,
    every process takes the next batch_size windows. For example, eight windows, two at a time:

                         process 0    process 1
        micro-batch 0    0, 1         2, 3
        micro-batch 1    4, 5         6, 7
    """
    for micro_batch in range(len(steps) * data.grad_accum_steps):  # of all steps
        first = first_window + (micro_batch * world_size + rank) * data.batch_size
        indices = range(first, first + data.batch_size)
        batch = get_batch(tokens.ids, context_length, data.seed, indices)
        tokens.check(torch.stack(batch))
        # Pinned memory lets the copy to a GPU run while the GPU computes the step before.
        pinned = [x.pin_memory() if device.type == "cuda" else x for x in batch]
        yield [x.to(device, non_blocking=True) for x in pinned]


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes. (FSDP has done so already.)

    WHY this makes many devices learn what one does: the mean over all rows is the mean of the
    means over equal shares of them. The means of 1, 2, 3, 4 and 5, 6, 7, 8 are 2.5 and 6.5.
    """
    if get_world_size() == 1 or is_fsdp(model):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.nn.utils.parameters_to_vector(grads)  # one message is faster than many
    torch.distributed.all_reduce(flat)
    torch.nn.utils.vector_to_parameters(flat / get_world_size(), grads)


# FSDP
# ----


def is_fsdp(module: nn.Module) -> bool:
    """Whether `module` has been sharded by `fully_shard`."""
    return hasattr(module, "set_requires_gradient_sync")


def shard_model(
    model: Transformer, device: torch.device, dtype: torch.dtype, per_block: bool,
    shard_size: int = 0,
) -> None:
    """Shard every weight over all processes, or over groups of `shard_size`.

    The latter is HSDP, hybrid sharded data parallel: the model is sharded within a group (the
    GPUs of a node, say) and replicated across groups.
    A *unit* is what is gathered at once. The model as one unit is fastest: each unit costs the
    host some milliseconds per micro-batch. Block by block, only one block's weights are whole
    at any time, so N devices hold a model nearly N times as large as one device can.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    shard_size = shard_size or get_world_size()
    grid = {"replicate": get_world_size() // shard_size, "shard": shard_size}
    if grid["replicate"] == 1:  # TRAP: a dimension of size 1 made some CPU runs crash at exit
        del grid["replicate"]
    mesh = torch.distributed.init_device_mesh(
        device.type, tuple(grid.values()), mesh_dim_names=tuple(grid))
    # Weights are gathered in `dtype`, gradients summed in float32. TRAP: by default FSDP also
    # casts the inputs of a unit, and so the RoPE table, which must stay float32.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for unit in [*model.blocks, model] if per_block else [model]:
        # The last unit holds the head, which the backward pass needs at once: keep it gathered.
        sharded: Any = fully_shard(
            unit, mesh=mesh, mp_policy=policy, reshard_after_forward=unit is not model)
        if device.type == "cpu":  # TRAP: for an average, gloo in torch 2.8 returns the sum
            sharded.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: Any, last: bool) -> None:
    """Let FSDP average gradients after the last micro-batch only: faster, but more memory."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(last)
        if not is_fsdp(model.blocks[0]):
            model.set_reshard_after_backward(last)  # one unit stays gathered in between


@torch.no_grad()
def local_shard(tensor: Any) -> Any:
    """The part of a tensor that this process holds: a shard under FSDP, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_params(model: nn.Module) -> dict[Any, Any]:
    """For each parameter that isn't frozen, what this process holds of it. Call after sharding.

    TRAP: fused AdamW leaks Python objects in each step (pytorch issue 188174) for FSDP's
    DTensors, tensors that know of all their shards. So the optimizer gets these plain ones.
    """
    return {p: local_shard(p) for p in model.parameters() if p.requires_grad}


def shard_group(params: dict[Any, Any]) -> Any:
    """The processes that hold one copy of the weights together; None if each holds a copy."""
    mesh = getattr(next(iter(params)), "device_mesh", None)
    return mesh.get_group("shard") if mesh else None


class ShardedMuon(Muon):
    """Muon under FSDP, where each of n processes holds some rows of every matrix, or none.

    An *all-to-all*, in which every process sends different data to every other, makes whole
    matrices, a share of them for each process; a second one turns them back into rows. Here
    each of two processes has one half of the rows of the matrices A and B:

                     before      after the first all-to-all
        process 0    A0, B0      A0, A1: all of A
        process 1    A1, B1      B0, B1: all of B
    """

    def __init__(self, model: nn.Module, params: dict[Any, Any], *args: Any):
        super().__init__(model, params, *args)
        self.group = shard_group(params)

    def orthogonalize_all(self, updates: Tensor, d_outs: list[int]) -> Tensor:
        n, rows = torch.distributed.get_world_size(self.group), sum(d_outs)
        count, held, _ = updates.shape  # how many layers, and how many rows of each we hold
        size = -(-rows // n)  # rows per process, at most
        # Zeros make the number of layers divisible by n, M for each process, and the number
        # of rows the same on all: (n * M, size, columns).
        updates = F.pad(updates, (0, 0, 0, size - held, 0, -count % n))
        received = torch.empty_like(updates)
        torch.distributed.all_to_all_single(received, updates, group=self.group)
        whole = received.unflatten(0, (n, -1))  # (n, M, size, columns): from n processes
        whole = whole.transpose(0, 1).flatten(1, 2)[:, :rows]  # (M, rows, columns)
        whole = super().orthogonalize_all(whole, d_outs)
        whole = F.pad(whole, (0, 0, 0, n * size - rows))  # (M, n * size, columns)
        updates = whole.unflatten(1, (n, size)).transpose(0, 1)  # (n, M, size, columns)
        updates = updates.flatten(0, 1).contiguous()  # (n * M, size, columns)
        torch.distributed.all_to_all_single(received, updates, group=self.group)
        return received[:count, :held]


def take_local_gradients(params: dict[Any, Any]) -> None:
    """Hand the gradients of all parameters to the plain tensors of `local_params`."""
    for p, local in params.items():
        # The data too, because FSDP may give a shard new memory in the first forward pass.
        local.data, local.grad = local_shard(p), local_shard(p.grad)


def gradient_norm(params: dict[Any, Any]) -> Tensor:
    """The norm of all gradients of the model, a scalar, the same on every process."""
    norm = torch.nn.utils.get_total_norm(
        [local.grad for local in params.values() if local.grad is not None])
    if group := shard_group(params):  # so far this is the norm of one process's shards
        square = norm.square()
        torch.distributed.all_reduce(square, group=group)
        norm = square.sqrt()
    return norm


def distribute(whole: Tensor | None, like: Any) -> Tensor:
    """Collective: what this process holds of process 0's tensor, which is sharded as `like`."""
    options = {"dtype": like.dtype, "device": like.device}
    whole = torch.empty(like.shape, **options) if whole is None else whole.to(**options)
    if get_world_size() > 1:
        torch.distributed.broadcast(whole, 0)
    if not hasattr(like, "device_mesh"):
        return whole
    shards = whole.chunk(like.device_mesh.shape[-1])  # rows; this is how FSDP splits, too
    index = like.device_mesh.get_local_rank("shard")
    return shards[index] if index < len(shards) else whole[:0]  # fewer rows than processes


def build_model(
    config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype,
    processes: ProcessConfig, weights: Mapping[str, Tensor] | None = None,
) -> TransformerWithLoss:
    """Collective: the model, ready to train, with process 0's `weights` or with new ones."""
    with torch.device("meta"):  # shapes without numbers
        model = TransformerWithLoss(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    fsdp = processes.fsdp and get_world_size() > 1  # one process has nothing to shard
    unit = processes.fsdp_unit
    per_block = fsdp and (unit == "block" or unit == "auto" and num_parameters > 1e9)
    make_faster(model, processes, per_block)
    if fsdp:
        shard_model(model, device, dtype, per_block, processes.shard_size)
    elif dtype != torch.float32:
        # WHY: autocast would leave the embedding, and with it the residual stream, in float32.
        model.embedding.register_forward_hook(lambda module, args, x: x.to(dtype))
    model.to_empty(device=device)  # memory for what this process holds
    if config.tie_embeddings:  # TRAP: to_empty unties them
        model.lm_head.weight = model.embedding.weight
    if weights is None and get_rank() == 0:
        torch.manual_seed(seed)  # on the host: the same for any number of processes
        weights = TransformerWithLoss(config).state_dict()
    # One parameter after the other: no process but 0 holds more than its shards and one whole.
    for name, p in model.named_parameters():
        local_shard(p.data).copy_(distribute(None if weights is None else weights[name], p))
    model.rope = model.make_rope().to(device)
    return model


# Exercise: Run the demo's `train` with --device cpu and another --outdir; then also with
# `torchrun --nproc_per_node=2`, half the --batch_size and a third one. Compare the losses.


# ----------------------------------------------------------------------------------------
# 13. Checkpoints
#
# What must be saved so that a run can resume as if it had never stopped? The parameters, the
# optimizer's state (AdamW's m and v), and how many windows it has seen (chapter 4). A
# checkpoint holds whole tensors under the names of the plain model, so it can be loaded on any
# number of processes.
# ----------------------------------------------------------------------------------------

import zipfile

BEST = "best.pt"  # what --keep_best keeps; not one of `checkpoints_in`, so it's never pruned


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state`, tensors and plain types, to `path`: complete or not at all."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # PyTorch's own for a full disk
        raise UserError(f"{path} could not be written: {error}") from None


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the newest last. Files of other names are ignored."""
    found = [p for p in directory.glob("*") if re.fullmatch(r"step_\d{6,}\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def read_checkpoint(path: Path) -> dict:
    """The state saved in `path`. Never runs code in it. Tensors are mapped: read when used."""
    with file_errors(path, "checkpoint"):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if missing := {"model", "model_config", "step"} - set(state):
            raise UserError(f"it has no {min(missing)}")
        return {**state, "path": str(path)}


def load_checkpoint(path: str | Path) -> dict:
    """The state in `path`; the newest in a directory; or a Hugging Face model."""
    path = Path(path)
    if (path / "config.json").is_file():
        return load_hf_model(path)  # chapter 15
    candidates = checkpoints_in(path) if path.is_dir() else [path]
    if not candidates:
        raise UserError(f"no checkpoint (step_NNNNNN.pt) in {path}")
    return read_checkpoint(candidates[-1])


def model_from_checkpoint(
    state: dict, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
) -> TransformerWithLoss:
    """The model of a loaded checkpoint, for inference, with any context_length."""
    with file_errors(state["path"], "checkpoint"), torch.device("meta"):
        config = config_from_dict(state["model_config"])
        config.context_length = context_length or config.context_length
        model = TransformerWithLoss(config)
        weights = {k: w.to(device, dtype) for k, w in state["model"].items()}
        model.load_state_dict(weights, assign=True, strict=not config.tie_embeddings)
        if config.tie_embeddings:
            model.lm_head.weight = model.embedding.weight
    model.rope = model.make_rope().to(device)  # in float32, whatever `dtype` is
    return model.eval()


def gather_state(model: nn.Module, params: dict, optimizer: Any) -> dict:
    """Collective: parameters and, given an `optimizer`, its state, whole, on process 0.

    The state is found by its name and the parameter's: result["optimizer"]["exp_avg"][name].
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict] = {}

    def gather(into: dict, name: str, tensor: Any) -> None:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if get_rank() == 0:
            into[name] = whole.to("cpu", copy=True)

    for name, p in model.named_parameters():
        gather(weights, name, p.detach())
        local: Any = params.get(p)  # has no optimizer state if it's frozen or had no gradient
        for key, value in (optimizer.state.get(local, {}) if optimizer else {}).items():
            into = moments.setdefault(key, {})
            if value.shape == local.shape:
                moment = torch.empty_like(p)  # sharded as p is
                local_shard(moment).copy_(value)
                gather(into, name, moment)
            else:  # a count of steps
                into[name] = value.cpu()
    return {"model": weights, "optimizer": moments} if optimizer else {"model": weights}


def restore_optimizer(saved: dict, model: nn.Module, params: dict, optimizer: Any) -> None:
    """Collective: put `gather_state`'s optimizer state back. Only process 0 has `saved`."""
    dims: dict = broadcast({key: {name: x.dim() for name, x in by_name.items()}
                            for key, by_name in saved.items()})
    for name, p in model.named_parameters():
        local = params.get(p)
        for key in (key for key in dims if local is not None and name in dims[key]):
            like = p if dims[key][name] else torch.zeros((), device=p.device)
            # TRAP: `saved` is mapped from a file, which may be deleted: hence clone.
            optimizer.state[local][key] = distribute(saved.get(key, {}).get(name), like).clone()


# Exercise: Start a run with --save_interval 100, kill it with `kill -9` after the first
# checkpoint, and resume it. On a CPU, the losses are those of an unbroken run, digit by digit.


# ----------------------------------------------------------------------------------------
# 14. The training run
#
# What does the loop of chapter 6 become with everything that chapters 9 to 13 add? The
# training step is still one piece, `Trainer.step`. The loop, `run_training`, logs, evaluates,
# saves, and stops when asked to. The command `train`, at the end, reads the files and builds
# what the loop needs. New here are *micro-batches*: gradients add up, so four small batches one
# after the other are one large batch that wouldn't have fit into memory. (Goyal et al. 2017,
# arXiv 1706.02677, section 3: what to average)
# ----------------------------------------------------------------------------------------

import lzma


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """Data"""

    train_tokens: Path | None = None  # token file to train on (required unless resuming)
    valid_tokens: Path | None = None  # token file to evaluate the loss on
    tokenizer_path: Path | None = None  # tokenizer of these files: copied to outdir
    sequence_length: int = 0  # T: --context_length; a loaded model's own may be larger
    batch_size: int = 16  # sequences per process and micro-batch
    grad_accum_steps: int = 1  # micro-batches per optimizer step
    seed: int = 1  # random seed of initial parameters and batches


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """Run"""

    optimizer: str = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest
    outdir: Path = Path("out/run")  # directory for checkpoints, metrics and tokenizer
    resume: bool = False  # continue outdir's run, if any; flags not given keep its values
    log_interval: int = 10  # steps between lines of the log
    eval_interval: int = 250  # steps between evaluations on valid_tokens
    eval_windows: int = 1024  # windows of valid_tokens to evaluate on; 0: all
    save_interval: int = 1000  # steps between checkpoints
    keep_checkpoints: int = 3  # newest checkpoints kept; 0: all
    keep_best: bool = False  # keep the parameters with the lowest validation loss: best.pt
    weights_only: bool = False  # last checkpoint without optimizer: smaller, but can't resume
    init_from: Path | None = None  # model to start from: checkpoint, run, Hugging Face model


# What --optimizer can be: functions of the model, the tensors to update (`local_params`), the
# configuration, the precision for Muon, and whether to compile.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda model, params, config, *how: make_scaled_adamw(model, params, config),
    "muon": lambda model, *how: (ShardedMuon if is_fsdp(model) else Muon)(model, *how),
}


class Trainer:
    """A model and what trains it, on one process or on several."""

    def __init__(
        self, config: ModelConfig, data: DataConfig, optim: OptimizerConfig, optimizer: str,
        processes: ProcessConfig, device: torch.device, dtype: torch.dtype,
        weights: Mapping[str, Tensor] | None = None, loss_scale: float = 1.0,
    ):
        self.data, self.optim, self.device = data, optim, device
        self.T = data.sequence_length or config.context_length
        self.model = build_model(config, data.seed, device, dtype, processes, weights)
        self.params = local_params(self.model)
        precision = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.optimizer = OPTIMIZERS[optimizer](
            self.model, self.params, optim, precision, processes.compile)
        self.scaler = GradScaler(device, dtype, loss_scale)
        self.autocast = make_autocast(device, dtype, is_fsdp(self.model))
        self.windows_per_step = data.batch_size * data.grad_accum_steps * get_world_size()
        self.tokens_per_step = self.windows_per_step * self.T

    def step(self, step: int, batches: Iterator) -> tuple[Tensor, Tensor]:
        """One update of the parameters, step 1, 2, ...; the loss and the gradient norm."""
        model, optimizer, scaler = self.model, self.optimizer, self.scaler
        optim, count = self.optim, self.data.grad_accum_steps
        # If you add dropout: a resumed run draws what an unbroken one does.
        torch.manual_seed(hash((self.data.seed, step, get_rank())))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, optim) * group.get("lr_scale", 1)
        total_loss = torch.zeros((), device=self.device)
        for micro_batch in range(count):
            inputs, targets = next(batches)  # (B, T) each
            set_gradient_sync(model, last=micro_batch == count - 1)
            with self.autocast:
                loss = model(inputs, targets) / count  # the sum of these is the step's mean
            (loss * scaler.loss_scale).backward()
            total_loss += loss.detach()
        average_gradients(model)
        take_local_gradients(self.params)
        grad_norm = gradient_norm(self.params) / scaler.loss_scale
        scaler.step(optimizer, grad_norm, optim.clip_grad, step)  # unscale, clip, update
        optimizer.zero_grad()
        model.zero_grad()  # under FSDP these aren't the optimizer's
        return total_loss, grad_norm

    def state(self, weights_only: bool, **numbers: Any) -> dict:
        """Collective: what to save. Whole tensors on process 0, none elsewhere."""
        state = gather_state(self.model, self.params, None if weights_only else self.optimizer)
        return {**state, "model_config": vars(self.model.config),
                "loss_scale": self.scaler.loss_scale.item(), **numbers}


def run_training(
    trainer: Trainer, run: RunConfig, tokens: TokenFile, valid: ValidationSet | None,
    start: dict, signals: list[int],
) -> int:
    """Train from start["step"] to the last step or a signal. Returns the last step."""
    first_step, max_steps = start["step"], trainer.optim.max_steps
    rows, first_window = trainer.windows_per_step, start["windows"]
    batches = load_batches(
        tokens, trainer.T, range(first_step, max_steps), trainer.device, trainer.data,
        get_rank(), get_world_size(), first_window)
    # Of each step since the last line of the log; the times without evaluation and saving.
    losses: list[Tensor] = []
    seconds: list[np.ndarray] = []
    best_loss = start["best_loss"]
    for step in range(first_step + 1, max_steps + 1):
        began, first, last = clocks(), step == first_step + 1, step == max_steps
        loss, grad_norm = trainer.step(step, batches)
        losses.append(loss)
        logging = last or step <= 2 or step % run.log_interval == 0
        signaled = sum_over_processes(torch.tensor(len(signals))).item() > 0  # on any process
        evaluating = last or step % run.eval_interval == 0
        saving = last or signaled or step % run.save_interval == 0
        if first or logging or evaluating or saving:
            loss.item()  # wait for the GPU before looking at the clock
        seconds.append(clocks() - began)
        record: dict[str, Any] = {"step": step}
        windows = first_window + (step - first_step) * rows
        states: dict[str, dict] = {}  # to be saved, by file name
        if logging:
            record |= log_training(trainer, step, windows * trainer.T, losses, grad_norm,
                                   seconds, len(tokens.ids))
            losses = []
        if logging or first:  # the first step compiles and allocates: leave it out
            seconds = []
        if valid and evaluating:
            valid_loss = valid.loss(trainer.model, trainer.data.batch_size, trainer.autocast)
            report = valid.report(valid_loss)
            log(f"step {step}: {show_numbers(report)}")
            record |= report
            if run.keep_best and valid_loss < best_loss:
                states[BEST] = trainer.state(True, step=step, **report)
                best_loss = valid_loss
        if saving:
            states[f"step_{step:06d}.pt"] = trainer.state(
                last and run.weights_only, step=step, windows=windows)
        if get_rank() == 0:
            if len(record) > 1:
                # After a run was killed and resumed, some steps occur twice: the last counts.
                with open(run.outdir / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json_line(record) + "\n")
            for name, state in states.items():
                save_checkpoint(run.outdir / name, {**state, **start["about"]})
            for old in checkpoints_in(run.outdir)[: -run.keep_checkpoints]:  # none for 0
                old.unlink()
        if signaled:
            break
    return step


# Token files
# -----------


class TokenFile(typing.NamedTuple):
    """A file of token ids, and what is known about it."""

    path: Path
    ids: np.ndarray  # an np.memmap, as in chapter 4: it's read when used
    vocab_size: int
    tokenizer_sha256: str | None = None

    def check(self, ids: Any) -> None:
        """Refuse ids outside the vocabulary. TRAP: on a GPU they kill the process unnamed."""
        if ids.max() >= self.vocab_size:
            raise UserError(f"{self.path} holds the id {ids.max()}, outside the vocabulary of "
                            f"{self.vocab_size}: another tokenizer made it")


def open_tokens(path: Path, vocab_size: int = 0) -> TokenFile:
    """The token file at `path`. `vocab_size` 0 takes the metadata's; a larger one is fine."""
    description = Path(f"{path}.json")  # which nanoGPT's files don't have
    if not description.is_file() and not is_binary(path):
        raise UserError(f"{path} is text, not a token file: encode it with bpe-encode")
    with file_errors(path, "token file"):
        metadata = read_json(description, "metadata file") if description.is_file() else {}
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[metadata.get("dtype", "uint16")])
        ids = np.memmap(path, dtype, mode="r")
        if metadata.get("num_tokens", len(ids)) != len(ids):
            raise UserError(f"it has {len(ids)} tokens, not {metadata['num_tokens']}")
        if not metadata and len(ids) > 99 and not ids[1:10000:2].max() >> 4:
            raise UserError("it looks like uint32, which needs metadata beside it")
        needed = metadata.get("vocab_size", 0)
        if not vocab_size and not needed or vocab_size and vocab_size < needed:
            raise UserError(f"--vocab_size is {vocab_size}, but it must be {needed or 'given'}")
    return TokenFile(path, ids, vocab_size or needed, metadata.get("tokenizer_sha256"))


# Evaluation
# ----------


class ValidationSet:
    """Windows to evaluate models on: all, end to end, or `limit` of them, spread evenly."""

    def __init__(
        self, tokens: TokenFile, context_length: int, limit: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        if len(tokens.ids) < 2:
            raise UserError(f"{tokens.path} holds only {len(tokens.ids)} token")
        self.tokens, self.tokenizer = tokens, tokenizer
        self.T = min(context_length, len(tokens.ids) - 1)
        self.starts = np.arange(0, len(tokens.ids) - 1, self.T)  # the last may be shorter
        if limit and limit < len(self.starts):
            at = np.linspace(0, len(self.starts) - 1, limit).round().astype(int)
            self.starts = self.starts[at]
        self.num_tokens = sum(len(window) - 1 for window in self.windows())
        self.num_bytes = sum(map(len, self.texts()))  # 0 if unknown

    def windows(self) -> Iterator[np.ndarray]:
        """Yields int64 [T + 1], or less at the end, with ids that are in the vocabulary."""
        for start in self.starts:
            window = self.tokens.ids[start : start + self.T + 1].astype(np.int64)
            self.tokens.check(window)
            yield window

    def texts(self) -> Iterator[bytes]:
        """Yields the text of the targets of each window, without end-of-text tokens."""
        if self.tokenizer:
            no_text = {self.tokenizer.eot_id, *self.tokenizer.start_ids}
            for window in self.windows():
                ids = [i for i in window[1:].tolist() if i not in no_text]
                yield self.tokenizer.decode_bytes(ids)

    @torch.no_grad()
    def loss(self, model: Any, batch_size: int, autocast: Any = None) -> float:
        """Collective: the mean loss of all tokens, in nats, for any number of processes."""
        rank, world_size, training = get_rank(), get_world_size(), model.training
        sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        model.eval()  # switches off dropout, if somebody adds it
        progress, windows = Progress("evaluating", self.num_tokens, "tokens"), self.windows()
        while rows := list(itertools.islice(windows, batch_size * world_size)):
            # Every process must take part in every forward pass, if need be with a fake row.
            mine = rows[rank::world_size]
            batch = [torch.from_numpy(row) for row in mine or rows[:1]]
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
            padded = padded.to(model.rope.device)
            inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]  # (B, T) each
            with autocast or contextlib.nullcontext(), without_compiling():
                loss = model(inputs, targets).item()  # of all targets but -100
            sums += torch.tensor([loss, 1.0]) * sum(len(row) - 1 for row in mine)
            progress.label = f"evaluating: loss {sums[0] / sums[1]:.3f} so far, "
            progress.update(sums[1].item() * world_size)
        progress.close()
        if is_fsdp(model):  # without a backward pass, the last unit has stayed gathered
            model.reshard()
        model.train(training)
        nats, count = sum_over_processes(sums).tolist()
        return nats / count

    def report(
        self, loss: float, compare: bool = False, floor: float | None = None
    ) -> dict[str, float]:
        """A loss per token in other units.

        WHY per byte: bytes are the same for all tokenizers, while a small vocabulary has short
        tokens that are easy to guess. `compare` adds what lzma makes of this text, by finding
        repetitions: a good model beats it. `floor` is the entropy of a synthetic text.
        """
        result = {"valid_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.num_bytes:
            nats = loss * self.num_tokens / self.num_bytes
            result |= {"nats_per_byte": nats, "bits_per_byte": nats / math.log(2)}
            if floor:
                result["percent_above_floor"] = 100 * (nats / floor - 1)
            if compare:
                xz = lzma.LZMACompressor(preset=6 | lzma.PRESET_EXTREME)
                size = sum(len(xz.compress(part)) for part in self.texts()) + len(xz.flush())
                result["lzma_bits_per_byte"] = 8 * size / self.num_bytes
        return result


def clocks() -> np.ndarray:
    """Seconds on the wall, and seconds of CPU that the threads of this process have used."""
    return np.array([time.monotonic(), time.process_time()])


def log_training(
    trainer: Trainer, step: int, seen: int, losses: list, grad_norm: Tensor,
    seconds: list[np.ndarray], num_tokens: int,
) -> dict:
    """Collective: log a line about the last steps. Returns it as a row of metrics.jsonl."""
    max_steps, (wall, cpu) = trainer.optim.max_steps, np.mean(seconds, 0)
    loss = sum_over_processes(torch.stack(losses).mean()).item() / get_world_size()
    record = {"tokens_seen": seen, "epochs": seen / num_tokens, "train_loss": loss,
              "lr": trainer.optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
              "tokens_per_second": round(trainer.tokens_per_step / wall),
              "skipped_steps": int(trainer.scaler.skipped)}
    if trainer.scaler.consecutive_skips >= 10:  # too many to be bad luck
        raise UserError(f"step {step}: gradients have not been finite for some time: try a "
                        "smaller --lr or another --dtype")
    line = f"step {step:>6}/{max_steps}  {show_numbers(record)}"
    threads = torch.get_num_threads()
    if len(seconds) > 2:  # the first steps say little about the others
        left = datetime.timedelta(seconds=round(wall * (max_steps - step)))
        line += f"  {left} left"
        # PyTorch's threads spin while they wait for each other: on cores of their own they are
        # busy all the time, and if another program takes one core, all of them wait for it.
        if trainer.device.type == "cpu" and threads > 1 and cpu < 0.8 * threads * wall:
            line += "  (another program uses the CPU: faster with OMP_NUM_THREADS=1 python ...)"
    log(line)
    return record


def show_numbers(record: dict) -> str:
    """The numbers in `record` that aren't 0, as text for people."""
    return "  ".join(f"{name} {x:,}" if isinstance(x, int) else f"{name} {x:.4g}"
                     for name, x in record.items() if x)


def json_line(record: dict) -> str:
    """`record` as one line. JSON has no NaN and no infinity: they become null."""
    return json.dumps({name: None if isinstance(x, float) and not math.isfinite(x) else x
                       for name, x in record.items()})


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """The numbers of signals received: Ctrl-C, SIGTERM, SIGHUP. The third one exits."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if not received and get_rank() == 0:  # TRAP: no print: it may interrupt one
            os.write(2, b"stopping after this step; Ctrl-C twice to quit without saving\n")
        received.append(number)
        if len(received) > 2:  # torchrun may pass on the terminal's first Ctrl-C
            os._exit(128 + number)

    # Windows has no SIGHUP. Signals that are ignored stay ignored: that's how nohup works.
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    with contextlib.ExitStack() as stack:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, handle))
        yield received


# The command
# -----------


def load_tokenizer(
    path: Path | None, checkpoint: str | None, hashes: dict, vocab_size: int
) -> Tokenizer | None:
    """The tokenizer at `path`, or the copy that training left beside `checkpoint`, if any.

    Raises UserError if `hashes` differ: ids of another tokenizer look like any others.
    """
    if not path and checkpoint:
        folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
        path = next(folder.glob("tokenizer.json"), None)
    tokenizer = Tokenizer.load(path) if path else None
    hashes = {**hashes, path: tokenizer.fingerprint() if tokenizer else None}
    known = [name for name, value in hashes.items() if value]
    for name in known:
        if hashes[name] != hashes[known[0]]:
            raise UserError(f"{name} was made with a different tokenizer from {known[0]}")
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path} has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    return tokenizer


def load_start(run: RunConfig) -> dict:
    """What training starts from: a state to resume, a model's weights, or only a step, 0."""
    if checkpoints_in(run.outdir):
        state = read_checkpoint(checkpoints_in(run.outdir)[-1])
        if "optimizer" not in state:
            raise UserError(f"{state['path']} has no optimizer state: start from it with "
                            "--init_from, or remove it")
        best = read_checkpoint(run.outdir / BEST) if (run.outdir / BEST).is_file() else {}
        return {**state, "best_loss": best.get("valid_loss", math.inf)}
    if run.resume:
        log(f"no checkpoint to resume from in {run.outdir}: starting fresh")
    state = load_checkpoint(run.init_from) if run.init_from else {}
    return {**state, "step": 0, "windows": 0, "run": {}, "best_loss": math.inf}


def resolve_model_config(given: dict, model: LlamaConfig, start: dict) -> LlamaConfig:
    """The configuration of the model in `start`, if there is one and the user's flags agree."""
    if "model_config" not in start:
        return model
    config = config_from_dict(start["model_config"] | {"trained": bool(start.get("hf_files"))})
    for name in vars(config).keys() & given.keys() - {"context_length"}:
        if given[name] not in (getattr(config, name), 0):
            raise UserError(f"--{name} is {given[name]}, but the model in {start['path']} has "
                            f"{getattr(config, name)}")
    return config


def lock_outdir(run: RunConfig) -> typing.TextIO:
    """Make outdir; refuse one that holds anything but a run to resume, or that is in use."""
    ours = (run.outdir / OUR_DIRECTORY).exists() and not (run.outdir / "config.json").exists()
    if not run.resume or not (ours or checkpoints_in(run.outdir)):
        new_directory(run.outdir)
    lock = open(run.outdir / OUR_DIRECTORY, "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
    except BlockingIOError:
        raise UserError(f"another run is writing to {run.outdir}") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return lock


def open_data(
    start: dict, data: DataConfig, config: LlamaConfig, run: RunConfig
) -> tuple[TokenFile, ValidationSet | None, Tokenizer | None]:
    """Training data, validation data, tokenizer. Raises UserError unless all fit each other."""
    if not data.train_tokens:
        raise UserError("--train_tokens is required: a token file to learn from")
    tokens = open_tokens(Path(data.train_tokens), config.vocab_size)
    T = data.sequence_length
    if len(tokens.ids) < 2 * T:
        raise UserError(f"{tokens.path} holds {len(tokens.ids)} tokens, fewer than two windows "
                        f"of --context_length {T}: bring more text")
    valid_tokens, valid, tokenizer = tokens, None, None
    if data.valid_tokens:
        valid_tokens = open_tokens(Path(data.valid_tokens), tokens.vocab_size)
    if get_rank() == 0:  # it alone reads the tokenizer
        hashes: dict = {file.path: file.tokenizer_sha256 for file in (tokens, valid_tokens)}
        hashes[start.get("path")] = start.get("tokenizer_sha256")
        tokenizer = load_tokenizer(
            data.tokenizer_path, start.get("path"), hashes, tokens.vocab_size)
    if data.valid_tokens:
        valid = ValidationSet(valid_tokens, T, run.eval_windows, tokenizer)
    return tokens, valid, tokenizer


def train(
    given: dict, data: DataConfig, model: LlamaConfig, optim: OptimizerConfig,
    run: RunConfig, processes: ProcessConfig,
) -> int:
    """Train a Transformer on token files. Under torchrun, on many devices."""
    check_processes(processes)
    device = pick_device(processes.device)
    dtype = pick_dtype(processes.dtype, device)
    # Only process 0 needs outdir, init_from and the tokenizer: it tells the others about them.
    with contextlib.ExitStack() as stack:
        saved: dict = {}
        if get_rank() == 0:
            stack.enter_context(lock_outdir(run))
            saved = load_start(run)
        stack.enter_context(process_group(device))
        signals = stack.enter_context(catch_signals())
        start = broadcast({k: x for k, x in saved.items() if k not in ("model", "optimizer")})
        old_flags = start.get("run", {})
        for flags in (data, optim, run):  # what isn't given keeps its value
            for name in vars(flags).keys() & old_flags.keys() - given.keys():
                setattr(flags, name, old_flags[name])
            check_config(flags)
        config = resolve_model_config(given, model, start)
        T = given.get("context_length", data.sequence_length or config.context_length)
        if data.sequence_length not in (0, T):
            raise UserError(f"this run has --context_length {data.sequence_length}")
        data.sequence_length, config.context_length = T, max(T, config.context_length)
        if start["step"] >= optim.max_steps:
            log(f"nothing left to do: {run.outdir} holds a checkpoint of step {start['step']}, "
                f"and --max_steps is {optim.max_steps}")
            return 0
        tokens, valid, tokenizer = open_data(start, data, config, run)
        config.vocab_size = tokens.vocab_size
        check_config(config)
        trainer = Trainer(config, data, optim, run.optimizer, processes, device, dtype,
                          saved.get("model"), start.get("loss_scale", 1.0))
        if old_flags.get("optimizer") == run.optimizer:  # another one starts anew
            restore_optimizer(saved.get("optimizer", {}), trainer.model, trainer.params,
                              trainer.optimizer)
        saved.clear()  # frees its tensors
        new_flags = {name: str(value.absolute()) if isinstance(value, Path) else value
                     for flags in (data, optim, run) for name, value in vars(flags).items()
                     if name not in ("outdir", "resume", "init_from", "tokenizer_path")}
        for name in old_flags.keys() & new_flags.keys():
            if (old := old_flags[name]) != new_flags[name]:
                log(f"changed since the checkpoint: {name} {old} -> {new_flags[name]}")
        start["about"] = {"run": new_flags, "hf_files": start.get("hf_files", {}),
                          "tokenizer_sha256": (tokens.tokenizer_sha256
                                               or tokenizer and tokenizer.fingerprint())}
        if tokenizer:  # only process 0 has it
            tokenizer.save(run.outdir / "tokenizer.json")
        log(f"{device}, {dtype}, processes: {get_world_size()}, parameters: "
            f"{sum(p.numel() for p in trainer.model.parameters()):,}, tokens per step: "
            f"{trainer.tokens_per_step:,}, first learning rate: "
            f"{learning_rate(start['step'], optim):.3g}, in {run.outdir}")
        if run_training(trainer, run, tokens, valid, start, signals) < optim.max_steps:
            log("stopped by a signal; to continue: python scratchformer.py train --resume "
                f"--outdir {run.outdir}")
            return 128 + (signals or [signal.SIGTERM])[0]  # empty if another process got it
        return 0


# Exercise: Leave out `/ count` in `step` and train with --grad_accum_steps 4. Loss and gradient
# norm are four times as large. Why does the model learn nearly as before?


# ========================================================================================
# PART FOUR: IN USE
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 15. Published models
#
# We exchange tokenizers and models with other tools as files of Hugging Face: tokenizer.json,
# and a directory with config.json and model.safetensors. Our architecture is Qwen3's (Llama's
# without qk_norm), so only names and the order of some rows differ. We rotate pairs of
# neighbors (2i, 2i+1), as the RoPE paper does; Hugging Face rotates (i, i + K/2). Reordering
# the rows of the query and key matrices makes up for it: both are reordered alike, so their dot
# products stay the same. (transformers, modeling_llama.py: rotate_half, apply_rotary_pos_emb)
# ----------------------------------------------------------------------------------------

# JSON can't hold arbitrary bytes, so GPT-2 writes each byte as a visible character (encoder.py,
# bytes_to_unicode). Printable Latin-1 bytes stand for themselves. The others, such as the space
# and control characters, take U+0100, U+0101, ... in order. A space becomes "Ġ".
BYTE_TO_UNICODE = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
UNPRINTABLE = [byte for byte in range(256) if byte not in BYTE_TO_UNICODE]
BYTE_TO_UNICODE |= {byte: chr(256 + i) for i, byte in enumerate(UNPRINTABLE)}
UNICODE_TO_BYTE = {ord(character): byte for byte, character in BYTE_TO_UNICODE.items()}


def token_to_unicode(token: bytes) -> str:
    """A token as it is spelled in a tokenizer.json: "Ġthe" for b" the"."""
    return "".join(BYTE_TO_UNICODE[byte] for byte in token)


def unicode_to_token(name: str) -> bytes:
    """The inverse of `token_to_unicode`."""
    return name.translate(UNICODE_TO_BYTE).encode("latin-1")


def tokenizer_to_json(tokenizer: Tokenizer) -> dict:
    """The content of the tokenizer.json for `tokenizer`."""
    specials = dict(sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]))
    ordinary = tokenizer.vocab.keys() - set(specials.values())
    vocab = {token_to_unicode(tokenizer.vocab[i]): i for i in sorted(ordinary)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False} for pattern in tokenizer.patterns]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags, "special": True}
                         for token, i in specials.items()],
        "normalizer": tokenizer.normalizer and {"type": tokenizer.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": tokenizer.ignore_merges,
                  "vocab": vocab | specials,
                  "merges": [[*map(token_to_unicode, merge)] for merge in tokenizer.merges]},
    }


def tokenizer_from_json(source: bytes, path: str | Path) -> Tokenizer:
    """The tokenizer described by `source`, the content of the tokenizer.json at `path`."""
    supported = {"type": "BPE", "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "byte_fallback": None, "dropout": None}
    with file_errors(path, "tokenizer.json"):
        content = json.loads(source)
        model, added_tokens = content["model"], content["added_tokens"]
        for key, value in supported.items():
            if (model.get(key) or value) != value:
                raise UserError(f"its {key} is {model[key]!r}")
        steps = steps_of(content, "normalizer", "normalizers")
        normalizer = [step.get("type") for step in steps]
        if normalizer not in ([], ["NFC"], ["NFKC"]):
            raise UserError(f"its normalizer is {content['normalizer']}, not NFC or NFKC")
        for token in added_tokens:
            if (token.get("single_word") or token.get("lstrip") or token.get("rstrip")
                    or normalizer and token.get("normalized")):
                raise UserError(f"token {token['content']!r} also matches something else")
        specials = {token["content"]: token["id"] for token in added_tokens}
        token_of = {name: unicode_to_token(name) for name in model["vocab"]
                    if name not in specials}
        vocab = {model["vocab"][name]: token for name, token in token_of.items()}
        vocab |= {i: text_to_bytes(token) for token, i in specials.items()}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge
                 for merge in model["merges"]]
        merges = [(token_of[left], token_of[right]) for left, right in pairs]
        tokenizer = Tokenizer(vocab, merges, specials, patterns_from_json(content),
                              bool(model.get("ignore_merges")), *normalizer)
        tokenizer.source = source
        for step in steps_of(content, "post_processor", "processors"):
            template = step.get("single", [])  # special tokens, the text, more special tokens
            for item in itertools.takewhile(lambda item: "SpecialToken" in item, template):
                tokenizer.start_ids += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        return tokenizer


def steps_of(content: dict, name: str, names: str) -> list[dict]:
    """What a normalizer, pre-tokenizer or post-processor does: one step or a Sequence."""
    step = content.get(name) or {"type": "Sequence", names: []}
    return step[names] if step["type"] == "Sequence" else [step]


def patterns_from_json(content: dict) -> list[str]:
    """The patterns of a tokenizer.json. Raises UserError if it splits by anything else."""
    patterns, steps = [], steps_of(content, "pre_tokenizer", "pretokenizers")
    for step in steps:
        kind, use_regex = step["type"], step.get("use_regex", True)
        if kind == "Split" and "Regex" in step["pattern"] and (
                step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            patterns.append(step["pattern"]["Regex"])
            # What "Removed" removes is what the pattern doesn't match: it should match all.
            every_kind = "".join(map(chr, range(1 << 14)))
            if step["invert"] and regex.sub(patterns[-1], "", every_kind):
                raise UserError(f"its pre-tokenizer removes text: {step}")
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            patterns += [PRETOKEN_PATTERN] if use_regex else []
        else:
            raise UserError(f"its pre-tokenizer has a step that we don't know: {step}")
    if not patterns or steps[-1]["type"] != "ByteLevel":
        raise UserError(f"its pre-tokenizer is {content.get('pre_tokenizer')}")
    return patterns


# The Hugging Face matrices which, concatenated by rows, are our matrix of this name.
HF_NAMES = {
    "embedding": ["model.embed_tokens"], "norm": ["model.norm"], "lm_head": ["lm_head"],
    "attention_norm": ["input_layernorm"], "mlp_norm": ["post_attention_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.output": ["self_attn.o_proj"],
    "attention.query_norm": ["self_attn.q_norm"], "attention.key_norm": ["self_attn.k_norm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"],
}
ROTARY_WEIGHTS = tuple(f"{x}.weight" for x in ("q_proj", "k_proj", "q_norm", "k_norm"))
# Our fields and their names in config.json.
HF_FIELDS = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers", "d_model": "hidden_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "d_ff": "intermediate_size", "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
}
HF_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Files that stay with a published model as they are, also when it's trained further.
HF_FILES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja",
            "special_tokens_map.json")
HF_ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings")
# What config.json must say, since our architecture supports nothing else.
HF_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def llama3_rope_scaling(frequencies: Tensor, scaling: list[float]) -> Tensor:
    """Llama 3.1's way to a longer context: slow rotations become `factor` times slower.

    Pairs that turn fewer than `low` times within the original context saw few angles in
    training, and a longer text would show them new ones. Those that turn more than `high`
    times stay as they are; in between, the two are blended.
    (github.com/meta-llama/llama-models, models/llama3/model.py: apply_scaling)
    """
    factor, low, high, original_context = scaling
    turns = original_context * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def hf_names(name: str) -> list[str]:
    """Hugging Face's names for a matrix of ours, such as "blocks.7.mlp.gate_up.weight"."""
    [(prefix, part)] = re.findall(r"(blocks\.\d+\.|)(.+)\.weight", name)
    prefix = prefix.replace("blocks", "model.layers")
    return [f"{prefix}{theirs}.weight" for theirs in HF_NAMES[part]]


def interleaved_to_half_split(weight: Tensor, head_dim: int, inverse: bool = False) -> Tensor:
    """Rows of a query or key matrix [H * K, ...], reordered from our pairs to Hugging Face's.

    Within each head, row 2i goes to i, and row 2i + 1 to i + K/2. `inverse` undoes this.
    """
    pairs = (-1, 2, head_dim // 2) if inverse else (-1, head_dim // 2, 2)
    return weight.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def to_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names, with its order of rows."""
    with torch.device("meta"):
        layers = dict(Transformer(config).named_modules())
    result = {}
    for name, weight in weights.items():
        sizes = getattr(layers[name.removesuffix(".weight")], "d_outs", len(weight))
        for theirs, part in zip(hf_names(name), weight.split(sizes)):
            if theirs.endswith(ROTARY_WEIGHTS):
                part = interleaved_to_half_split(part, config.head_dim)
            result[theirs] = part
    return result


def from_hf(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`, as float32. Raises UserError unless the weights fit `config`."""
    # Old files also hold RoPE's frequencies.
    weights = {name: x for name, x in weights.items() if not name.endswith("inv_freq")}
    with torch.device("meta"):  # only names and shapes matter
        model = dict(Transformer(config).named_parameters())
    expected = {name: tuple(x.shape) for name, x in to_hf(model, config).items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(f"its {name} has the shape {found.get(name)}, but its config.json "
                            f"means {expected.get(name)}")
    for name, weight in weights.items():
        if name.endswith(ROTARY_WEIGHTS):
            weights[name] = interleaved_to_half_split(weight, config.head_dim, inverse=True)
    return {name: torch.cat([weights[part].float() for part in hf_names(name)])
            for name in model}


def config_to_hf(config: LlamaConfig) -> dict:
    """The config.json that makes `transformers` build our architecture."""
    scaling = config.rope_scaling
    name = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **HF_REQUIRED,
        **{theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()},
        "rope_scaling": scaling and {
            "rope_type": "llama3", **dict(zip(HF_ROPE_SCALING, scaling)),
            "original_max_position_embeddings": int(scaling[3])},
    }


def config_from_hf(content: dict) -> LlamaConfig:
    """Our configuration for a config.json. Raises UserError for another architecture."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    found = {
        "num_key_value_heads": content.get("num_attention_heads"), "rope_theta": 10000.0,
        "tie_word_embeddings": False, "rope_type": rope.get("type", "default"), "head_dim": 0,
        **{name: value for name, value in {**content, **rope}.items() if value is not None},
    }
    scaled = found["rope_type"] == "llama3"
    qwen3 = found["model_type"] == "qwen3"
    required = {**HF_REQUIRED, "model_type": "qwen3" if qwen3 else "llama",
                "rope_type": "llama3" if scaled else "default", "use_sliding_window": False}
    for name, value in required.items():
        if found.get(name, value) != value:
            raise UserError(f"its {name} is {found[name]!r}, but we need {value!r}")
    fields = {ours: found[theirs] for ours, theirs in HF_FIELDS.items()} | {"qk_norm": qwen3}
    if scaled:
        fields["rope_scaling"] = [float(rope[name]) for name in HF_ROPE_SCALING]
    return config_from_dict(fields)


def load_hf_model(directory: Path) -> dict:
    """A model saved by `transformers`, as a checkpoint without optimizer state."""
    import safetensors.torch
    content = read_json(directory / "config.json", "config.json of a model")
    with file_errors(directory, "Llama model"):
        config = config_from_hf(content)
        # Like transformers: one file of this name, or those that the index names.
        names = ["model.safetensors"]
        if not (directory / names[0]).is_file():
            index = read_json(directory / f"{names[0]}.index.json", "index of weights")
            names = sorted(set(index["weight_map"].values()))
        weights = {name: weight for file in names
                   for name, weight in safetensors.torch.load_file(directory / file).items()}
        # As in transformers 5: two different matrices aren't tied, and one is enough for both.
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if config.tie_embeddings and head in weights:
            weights.setdefault(embedding, weights[head])
            config.tie_embeddings = torch.equal(weights[embedding], weights[head])
            if config.tie_embeddings:
                del weights[head]
        weights = from_hf(weights, config)
        files = {name: (directory / name).read_bytes().decode() for name in HF_FILES
                 if (directory / name).is_file()}
        ids = {name: content[name] for name in HF_SPECIAL_IDS if name in content}
        ids |= json.loads(files.get("generation_config.json", "{}"))
        files["generation_config.json"] = json.dumps(ids, indent=2)
    return {"model": weights, "model_config": vars(config), "step": 0, "path": str(directory),
            "hf_files": files}


def export(
    saved: SavedModel,
    outdir: Path,  # directory for the files
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",  # type of the parameters
) -> None:
    """Write a directory that transformers loads with from_pretrained. Needs safetensors."""
    import safetensors.torch
    new_directory(outdir)
    state, model, tokenizer = saved.load()
    config, eot = model.config, tokenizer.eot_id
    if config.architecture != "llama":
        raise UserError(f"transformers has no architecture {config.architecture!r}")
    weights = {name: weight.to(getattr(torch, dtype), copy=True)
               for name, weight in to_hf(state["model"], config).items()}
    with atomic_write(outdir / "model.safetensors") as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))
    tokenizer.save(outdir / "tokenizer.json")
    eot_token = None if eot is None else tokenizer.decode([eot])
    files = state.get("hf_files") or {
        "generation_config.json": json.dumps(dict.fromkeys(HF_SPECIAL_IDS, eot)),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.context_length,
            "model_input_names": ["input_ids", "attention_mask"],
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), eot_token)})}
    ids = json.loads(files["generation_config.json"])
    ids = {name: ids.get(name) for name in HF_SPECIAL_IDS}
    files["config.json"] = json.dumps(
        {**config_to_hf(config), **ids, "torch_dtype": dtype}, indent=2)
    for name, text in files.items():
        with atomic_write(outdir / name) as file:
            file.write(text.encode())


# Exercise: Make `interleaved_to_half_split` return its argument. transformers loads the model
# without complaint, but its logits are wrong. There is no error message; a dozen tests fail.


# ----------------------------------------------------------------------------------------
# 16. Command line
#
# A command is a function, and its parameters are its flags: a flag's name, type and default
# come from the parameter, its help from the comment beside it. (A parameter that is a dataclass
# stands for its fields.) To add a command, write a function and add it to COMMANDS. The exit
# status is 0 if all went well, 2 for an error the user can fix, and 128 + n after signal n.
# ----------------------------------------------------------------------------------------

import argparse
import inspect
import shlex
import warnings

NOT_FLAGS = ("given", "architecture", "sequence_length", "rope_scaling", "trained")
# Numbers must be at least 0, and integers at least 1, except for these.
MAY_BE_0 = ("vocab_size", "num_kv_heads", "head_dim", "warmup_steps", "shard_size", "seed",
            "eval_windows", "keep_checkpoints", "top_k", "sequence_length")


def check_config(c: Any) -> None:
    """Raise UserError if a number among flags or fields is out of range, or two contradict."""
    for name, value in vars(c).items():
        if type(value) in (int, float):
            least = int(type(value) is int and name not in MAY_BE_0)
            most = {"beta1": 0.9999, "beta2": 0.99999, "top_p": 1.0}.get(
                name, 1 << 24 if isinstance(c, LlamaConfig) else 1 << 32)
            if not least <= value <= most:
                raise UserError(f"--{name} must be from {least} to {most}, not {value}")
    if isinstance(c, OptimizerConfig) and c.min_lr > c.lr:
        raise UserError(f"--min_lr must be at most --lr: {c.min_lr} > {c.lr}")
    if isinstance(c, LlamaConfig):
        if c.num_heads % c.num_kv_heads:
            raise UserError(f"num_heads must be divisible by num_kv_heads: {c.num_heads} / "
                            f"{c.num_kv_heads}")
        if c.head_dim % 2 or c.head_dim == c.d_model // c.num_heads != c.d_model / c.num_heads:
            raise UserError("head_dim, or else d_model / num_heads, must be even, for RoPE: "
                            f"{c.head_dim}, {c.d_model} / {c.num_heads}")


def config_from_dict(fields: dict) -> LlamaConfig:
    """The configuration that a file holds. Raises UserError if it isn't one of ours."""
    with file_errors("its configuration", "one for this model"):
        if fields.get("architecture", ModelConfig.architecture) != ModelConfig.architecture:
            raise UserError(f"it is {fields['architecture']!r}, but scratchformer.py isn't")
        config = LlamaConfig(**fields)
        check_config(config)
    return config


def flag_comments(owner: Any) -> dict[str, str]:
    """The comment beside or below each parameter of a function or field of a dataclass."""
    source = Path(__file__).read_text(encoding="utf-8")  # inspect.getsource parses all of it
    comments = {}
    for part in reversed(getattr(owner, "__mro__", [owner, object])[:-1]):
        body = re.split(rf"\n(?:class|def) {part.__name__}\b", source)[1].split("\n\n\n")[0]
        for flag in re.finditer(r"(?m)^    (\w+): .*\n(    # .*\n)*", body + "\n"):
            comments[flag[1]] = " ".join(re.findall("# (.*)", flag[0]))
    return comments


def add_flags(parser: Any, owner: Any) -> None:
    """Make the parameters of a function, or the fields of a dataclass, flags of `parser`."""
    kinds, comments = typing.get_type_hints(owner), flag_comments(owner)
    for name, parameter in inspect.signature(owner).parameters.items():
        if dataclasses.is_dataclass(kinds[name]):
            add_flags(parser.add_argument_group(kinds[name].__doc__), kinds[name])
        elif name not in NOT_FLAGS:
            kind, default = parameter.annotation.removesuffix(" | None"), parameter.default
            required = default is parameter.empty
            note = " (required)" if required else f" (default: {default})" if default else ""
            options: dict[str, Any] = {"help": comments[name] + note, "required": required}
            if kind == "bool":
                options["action"] = argparse.BooleanOptionalAction
            elif name == "optimizer" or kind.startswith("Literal"):
                options["choices"] = typing.get_args(kinds[name]) or OPTIMIZERS
            else:
                if kind.startswith("list"):  # repeating the flag appends
                    options |= {"action": "extend", "nargs": "+"}
                kind = kind.removeprefix("list[").removesuffix("]")
                types = {"int": int, "float": float, "str": str}
                options |= {"type": types.get(kind, Path), "metavar": kind.upper()}
            parser.add_argument(f"--{name}", **options)


def parse_flags(name: str, command: Callable, argv: list[str]) -> tuple[dict, dict]:
    """The flags in `argv` by name, and the arguments for `command`, whose `given` they are."""
    def error(message: str) -> NoReturn:  # one line
        raise UserError(f"{message} (see --help)")

    parser: Any = argparse.ArgumentParser(
        f"scratchformer {name}", "%(prog)s [flags]", command.__doc__, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    parser.error = error
    add_flags(parser, command)
    parser.add_argument("--quiet", action="store_true", help="print errors and results only")
    flags = parser.parse_args(argv)
    check_config(flags)
    given = vars(flags)
    kinds: dict[str, Any] = typing.get_type_hints(command)
    arguments = {key: x for key, x in {**given, "given": given}.items() if key in kinds}
    for key, kind in kinds.items():
        if hasattr(kind, "__dataclass_fields__"):
            fields = kind.__dataclass_fields__.keys() & given.keys()
            arguments[key] = kind(**{field: given[field] for field in fields})
            check_config(arguments[key])
    return given, arguments


def bpe_train(
    file_path: list[Path],  # text files, or directories of them
    tokenizer_out_path: Path,  # where to write the tokenizer.json
    vocab_size: int = 50304,  # size of the vocabulary, bytes and special tokens included
    special_tokens_path: Path | None = None,  # special tokens, one per line (<|endoftext|>)
    num_workers: int | None = None,  # processes (default: one per core)
) -> None:
    """Learn a byte-level BPE vocabulary from text."""
    start, specials = time.monotonic(), [END_OF_TEXT]
    if special_tokens_path:
        with file_errors(special_tokens_path, "list of special tokens"):
            lines = special_tokens_path.read_text(encoding="utf-8-sig").splitlines()
            specials = [line.strip() for line in lines if line.strip()]
    check_outputs([tokenizer_out_path], [*input_files(file_path), special_tokens_path])
    with atomic_write(tokenizer_out_path) as out:  # first: a bad path fails early
        vocab, merges = train_bpe(file_path, vocab_size, specials, num_workers)
        out.write(json_bytes(tokenizer_to_json(Tokenizer(vocab, merges, specials))))
    log(f"{tokenizer_out_path}: {len(vocab)}/{vocab_size} ids, {time.monotonic() - start:.1f}s")


def bpe_encode(
    dataset_path: list[Path],  # text files, or directories of them
    tokenizer_path: Path,  # a tokenizer.json
    out_path: Path,  # where to write the token file and, next to it, its metadata
    append_eot: bool = False,  # end every input file with the end-of-text token
    num_workers: int | None = None,  # processes (default: one per core)
) -> None:
    """Turn text into a file of token ids."""
    start, files = time.monotonic(), input_files(dataset_path)
    check_outputs([out_path, Path(f"{out_path}.json")], [*files, tokenizer_path])
    tokens = encode_file(Tokenizer.load(tokenizer_path), files,
                         out_path, append_eot, num_workers)
    log(f"{out_path}: {tokens:,} tokens, {time.monotonic() - start:.1f} s")


@dataclasses.dataclass
class SavedModel:
    """Model"""

    checkpoint: Path  # a checkpoint, a run's directory, or a Hugging Face model
    tokenizer_path: Path | None = None  # tokenizer.json (default: beside the checkpoint)

    def load(self, *options: Any, tokens: TokenFile | None = None) -> tuple[dict, Any, Any]:
        """The checkpoint; its model, given `options`; the tokenizer, which made `tokens`."""
        best = self.checkpoint / BEST
        state = load_checkpoint(best if best.is_file() else self.checkpoint)
        if best.is_file():
            log(f"taking {best}: step {state['step']} had the lowest validation loss")
        model = model_from_checkpoint(state, *options)
        hashes = {self.checkpoint: state.get("tokenizer_sha256")}
        if tokens:
            hashes[tokens.path] = tokens.tokenizer_sha256
        tokenizer = load_tokenizer(
            self.tokenizer_path, state["path"], hashes, model.config.vocab_size)
        if not tokens and not tokenizer:
            raise UserError(f"no tokenizer beside {self.checkpoint}: give --tokenizer_path")
        return state, model, tokenizer


def evaluate_command(
    saved: SavedModel,
    devices: DeviceConfig,
    valid_tokens: Path | None = None,  # token file to evaluate on
    text_path: list[Path] | None = None,  # text files to evaluate on, instead
    context_length: int | None = None,  # tokens per window (default: the model's)
    eval_windows: int = 1024,  # windows to evaluate on; 0: all
    floor_nats_per_byte: float | None = None,  # entropy of a synthetic text, to compare with
) -> None:
    """Measure a model's loss on token files or on text."""
    if bool(valid_tokens) == bool(text_path):
        raise UserError("give either --valid_tokens or --text_path")
    device = pick_device(devices.device)
    autocast = make_autocast(device, pick_dtype(devices.dtype, device))
    tokens = open_tokens(valid_tokens, 1 << 32) if valid_tokens else None
    _, model, tokenizer = saved.load(device, torch.float32, context_length, tokens=tokens)
    if tokens:
        tokens = tokens._replace(vocab_size=model.config.vocab_size)
    else:
        ids = []
        for path in input_files(text_path or []):
            pieces = safe_pieces([bytes_to_text(path.read_bytes())], tokenizer, CHUNK)
            ids += [np.array(tokenizer.start_ids, np.int32)]
            ids += map(tokenizer.encode_piece, pieces)
        tokens = TokenFile(Path("text"), np.concatenate(ids), model.config.vocab_size)
    valid = ValidationSet(tokens, model.config.context_length, eval_windows, tokenizer)
    loss = valid.loss(model, max(1, 2048 // valid.T), autocast)  # small, to show a loss soon
    report = valid.report(loss, True, floor_nats_per_byte)
    log(show_numbers(report))
    print(json_line(report))


def generate_command(
    saved: SavedModel,
    devices: DeviceConfig,
    prompt: str = "",  # text to continue (default: none, the beginning of a document)
    max_new_tokens: int = 256,  # maximum number of new tokens
    num_samples: int = 1,  # how many texts
    temperature: float = 0.8,  # 0: always the most likely token; 1: unmodified
    top_k: int | None = None,  # sample from the k most likely tokens
    top_p: float | None = None,  # sample from the most likely tokens that together reach p
    seed: int | None = None,  # the same seed gives the same text; the next text uses seed + 1
) -> None:
    """Generate text with a trained model."""
    device = pick_device(devices.device)
    dtype = pick_dtype(devices.dtype, device)
    state, model, tokenizer = saved.load(device, dtype)
    # The model's vocabulary may be larger than the tokenizer's: leave out what has no text.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[: tokenizer.vocab_size].detach())
    generation = json.loads(state.get("hf_files", {}).get("generation_config.json", "{}"))
    stop = generation.get("eos_token_id", tokenizer.eot_id)  # a number, a list or None
    stop_ids = stop if isinstance(stop, list) else [stop]
    seed = torch.seed() % 2**32 if seed is None else seed
    prompt = bytes_to_text(text_to_bytes(prompt))  # it holds bytes if the locale isn't UTF-8
    ids = tokenizer.encode(prompt, add_start=True) or [tokenizer.eot_id]
    if None in ids:
        raise UserError("the prompt is empty, and the tokenizer has no end-of-text token")
    for first in range(0, num_samples, 64):
        prompts = torch.tensor([ids] * min(64, num_samples - first))
        new = generate_texts(model, prompts, max_new_tokens, seed + first, stop_ids,
                             temperature=temperature, top_k=top_k, top_p=top_p)
        # One text is printed token by token; several one after another, when all are complete.
        columns: Any = zip(*new) if len(prompts) > 1 else [(ids[0] for ids in new)]
        for number, column in enumerate(columns, first + 1):
            if num_samples > 1:
                print(f"--- sample {number} of {num_samples} ---")
            shown = (i for i in column if i is not None and i not in stop_ids)
            for piece in stream_text(tokenizer, shown, prompt):
                print(piece, end="", flush=True)
            print()


PART = 2048  # characters


def split_parts(file: typing.TextIO) -> Iterator[str]:
    """The documents in a file, each with its end-of-text token; long ones in several parts."""
    end_of_document = re.compile(re.escape(END_OF_TEXT) + r"\r?\n?")
    text = more = file.read(4 * PART)
    while text:
        if more and len(text) < 2 * PART:
            more = file.read(4 * PART)
            text += more
        end = end_of_document.search(text, 0, PART + len(END_OF_TEXT) + 1)
        last_line = text.rfind("\n", 0, PART) + 1 if len(text) > PART else len(text)
        cut = end.end() if end else last_line or PART
        yield text[:cut]
        text = text[cut:]


def split(
    text_path: list[Path],  # text files, or directories of them
    outdir: Path,  # new directory for train.txt and valid.txt
) -> None:
    """Split text into training text and validation text, a tenth of it.

    The hash of a document decides, so it stays on its side when others come or go, and copies
    of it are all on that side. Documents of more than 2,048 characters are split into parts.
    """
    files = input_files(text_path)
    new_directory(outdir)
    with (atomic_write(outdir / "train.txt") as train,
          atomic_write(outdir / "valid.txt") as valid):
        for path in files:
            unfinished = None  # where the last part is, if its document has not ended
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
                for part in filter(str.strip, split_parts(file)):
                    data = text_to_bytes(part)
                    document = data.strip().removesuffix(END_OF_TEXT.encode()).strip()
                    is_valid = hashlib.sha256(document).digest()[0] < 26  # of 256
                    side = valid if is_valid else train
                    if unfinished not in (None, side):
                        unfinished.write(END_OF_TEXT.encode())
                    side.write(data)
                    unfinished = None if part.rstrip().endswith(END_OF_TEXT) else side
            if unfinished:
                unfinished.write(END_OF_TEXT.encode())
        if not (train.tell() and valid.tell()):
            raise UserError("too little text for training and validation: bring 100 kB or more")
        log(f"training: {train.tell() / 1e6:,.2f} MB, validation: {valid.tell() / 1e6:,.2f} MB")


def choose_size(megabytes: float, minutes: float, device: str) -> tuple[int, str]:
    """A vocabulary size, and flags of `train`, for a text and the minutes there are.

    A larger model learns more per token, is slower, and overfits little text. The best number
    of parameters, here the cube of the depth, grows with the square root of the time (Hoffmann
    et al. 2022, arXiv 2203.15556); take more if four passes over the text leave time.
    """
    minutes *= 1400 if device == "cuda" else 1  # now minutes of two CPU cores
    depth = max(1.9 * minutes ** (1 / 6), 1.6 * (minutes / megabytes) ** 0.375)
    depth = max(2, round(min(4 * megabytes**0.25, depth)))
    return 256 * depth**2, (
        f"--num_layers {depth} --d_model {64 * depth} --num_heads {depth} --d_ff {176 * depth} "
        f"--context_length {256 if depth < 5 else 512} --batch_size {4 * depth} "
        f"--optimizer muon --lr {min(0.01, 0.024 / depth):.1g}")


def demo(
    text_path: list[Path] | None = None,  # files or directories (default: the bundled stories)
    minutes: float | None = None,  # with --text_path: about how long to train (default: 5)
    outdir: Path | None = None,  # directory for its files (default: out/demo, or out/text)
    max_steps: int | None = None,  # optimizer steps (default: 1000, or as --minutes allow)
) -> int:
    """Run the whole pipeline on the bundled stories or your own text, showing each command."""
    out = outdir or Path("out/text" if text_path else "out/demo")
    if minutes and not text_path:
        raise UserError("--minutes needs --text_path")
    for command in demo_commands(text_path, minutes or 5.0, max_steps, out):
        log(f"\n$ python scratchformer.py {command}")
        if status := main(shlex.split(command) + ["--quiet"] * (not Progress.enabled)):
            return status
    return 0


def demo_commands(
    text_path: list[Path] | None, minutes: float, max_steps: int | None, out: Path
) -> Iterator[str]:
    """Yields the demo's commands, in order. Each is run before the next one is asked for."""
    here, data = (shlex.quote(str(path)) for path in (out, Path(__file__).parent / "data"))
    if text_path:
        yield f"split --text_path {shlex.join(map(str, text_path))} --outdir {here}"
        megabytes, device = (out / "train.txt").stat().st_size / 1e6, pick_device("auto").type
        vocab_size, flags = choose_size(megabytes, minutes, device)
        flags += " --compile" * (device == "cuda" and has_compiler())  # 2.5 times as fast
        texts, prompt, compare = f"{here}/", "''", " --eval_windows 128"
        log(f"\n{megabytes:.1f} MB of text, {minutes:g} minutes, {device}: expect its words, "
            "names and layout, but little sense. More text and more time give more.")
    else:
        new_directory(out)
        texts, prompt, compare = f"{data}/stories-", "Once", " --floor_nats_per_byte 0.191796"
        vocab_size, steps = 1536, max_steps or 1000
        flags = ("--context_length 512 --num_layers 1 --d_model 128 --num_heads 4 --d_ff 256 "
                 "--batch_size 4 --optimizer muon --lr 1e-2 --min_lr 1e-5 --log_interval 50 "
                 f"--eval_interval 500 --warmup_steps {steps // 40}")
    tokenizer = f"{here}/tokenizer.json"
    yield (f"bpe-train --file_path {texts}train.txt --vocab_size {vocab_size} "
           f"--tokenizer_out_path {tokenizer}")
    for part in ("train", "valid"):
        yield (f"bpe-encode --dataset_path {texts}{part}.txt --tokenizer_path {tokenizer} "
               f"--out_path {here}/{part}.bin --append_eot")
    train = (f"train --train_tokens {here}/train.bin --valid_tokens {here}/valid.bin "
             f"--tokenizer_path {tokenizer} {flags}")
    if text_path:
        yield f"{train} --outdir {here}/speed_test --max_steps 8 --eval_windows 8"
        last = json.loads((out / "speed_test" / "metrics.jsonl").read_text().splitlines()[-1])
        tokens = 60 * minutes * last["tokens_per_second"] * 0.9  # the rest is for evaluation
        # Up to about four epochs are as good as new text (Muennighoff et al. 2023, arXiv
        # 2305.16264), and in our runs more gained little.
        tokens = min(tokens, 4 * last["tokens_seen"] / last["epochs"])
        steps = max_steps or round(tokens * last["step"] / last["tokens_seen"]) or 1
        train += (f" --keep_best --eval_windows 128 --eval_interval {steps // 10 or 1} "
                  f"--log_interval {steps // 40 or 1}")
    yield f"{train} --outdir {here}/run --max_steps {steps}"
    yield f"eval --checkpoint {here}/run --valid_tokens {here}/valid.bin{compare}"
    yield f"generate --checkpoint {here}/run --prompt {prompt} --seed 1"
    log(f"""
To generate something else, to train longer, or to evaluate on another text:
    python scratchformer.py generate --checkpoint {here}/run --prompt "The next"
    python scratchformer.py train --resume --outdir {here}/run --max_steps {2 * steps}
    python scratchformer.py eval --checkpoint {here}/run --text_path {texts}valid.txt""")


COMMANDS: dict[str, Callable] = {
    "bpe-train": bpe_train, "bpe-encode": bpe_encode, "train": train, "eval": evaluate_command,
    "generate": generate_command, "export": export, "split": split, "demo": demo,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv`, without the program's name. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # any bytes pass through
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    name = argv[0]
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
        if name != "train" and get_world_size() != 1:
            raise UserError(f"{name} is one process: start it without torchrun")
        given, arguments = parse_flags(name, COMMANDS[name], argv[1:])
        Progress.enabled = "quiet" not in given
        if not Progress.enabled:
            warnings.simplefilter("ignore")  # of libraries
        return COMMANDS[name](**arguments) or 0
    except BrokenPipeError:  # whoever reads our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, ModuleNotFoundError) as error:
        if get_rank() == 0:  # under torchrun, only rank 0 prints
            print_error(f"scratchformer: error: {error_message(error)}\n")
        return 2
    except RuntimeError as error:  # as PyTorch tells it
        if "memory" not in str(error):
            raise
        print_error(f"scratchformer: error: out of memory: {error_message(error)[:200]}\n")
        return 2
    except KeyboardInterrupt:
        print_error("interrupted\n")
        return 130


# Exercise: Add a command that prints `tokenizer.decode_bytes([i])` for each id of a text: a
# function of tokenizer_path and text, each with a comment beside it, and an entry in COMMANDS.

if __name__ == "__main__":
    sys.exit(main())
