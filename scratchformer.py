"""Scratchformer: build a language model from scratch, in one file you can read.

The file contains a byte-level BPE tokenizer (trainer and encoder), a
Transformer with RoPE, SwiGLU and RMSNorm, a memory-mapped data loader, and a
training loop that runs on a laptop, on one GPU, or on many GPUs with FSDP. It
needs Python 3.10 and three packages (pip install torch regex numpy); a few
extras need more and say so.

Start with this, in a clone of the repository. It takes a minute or two:

    python scratchformer.py demo

The demo trains a tokenizer and a small model on the bundled stories (simple
ones, made by a program), evaluates the model, and writes a story with it.
`demo --text_path DIR` does the same with your own text. It shows each of the
commands that it runs:

    split        hold out part of your own text, to test on    chapter 14
    bpe-train    learn a vocabulary from text                  chapters 1 to 4
    bpe-encode   turn text into a file of token ids            chapters 3 and 4
    train        train a Transformer on token files            chapters 5 to 12
    eval         evaluate a model on token files or text       chapter 12
    generate     write text with a trained model               chapter 8

One more, `export`, converts a model for Hugging Face transformers (chapter 13).
Every command explains its flags: python scratchformer.py COMMAND --help
"""

# How to read this file
# ---------------------
# From top to bottom. Chapters marked * tell the whole story, each idea in its plainest form:
# text becomes numbers, a model learns to predict the next number, and the model writes text.
# The other chapters make it fast, distributed and convenient; skip them the first time.
# (Search for "# PART TWO" to find chapter 5.)
#
#   PART ONE: TEXT
#    1 * Pre-tokenization      splitting text into words before anything is learned
#    2 * Learning merges       byte-pair encoding: which byte sequences become tokens
#    3 * The tokenizer         from text to token ids and back
#    4   Tokenizing corpora    the same results, hundreds of times faster
#   PART TWO: THE MODEL
#    5 * Data                  token files, and which tokens the model sees at each step
#    6 * The Transformer       RMSNorm, RoPE, attention, SwiGLU, and how they stack
#    7 * Training              loss, gradients, AdamW, and a complete training loop
#    8 * Generation            sampling text; the KV cache
#   PART THREE: SCALE
#    9   Faster steps          mixed precision, the fused loss, Muon, compilation, CUDA graphs
#   10   Many devices          data parallel and FSDP
#   11   Checkpoints           saving a run so that it can resume exactly
#   12   The training run      the training loop with everything switched on
#   PART FOUR: IN USE
#   13   Hugging Face          converting models to and from the Llama format
#   14   Command line          the commands, and the demo
#
# Tensor shapes use one letter per dimension:
#   B batch (sequences)    T time (position in the sequence)    D model width (d_model)
#   H attention heads      K width of one head, D / H           F MLP width (d_ff)
#   V vocabulary size      G key/value heads, often H
#   S cached positions (chapter 8)
# (In code, F is torch.nn.functional, as in F.softmax.)
#
# A comment that starts with WHY gives the reason for a choice; TRAP warns of a mistake that is
# easy to make there. Lines that start with >>> are examples, which the tests in
# test_scratchformer.py run. (Most of these imports serve the later chapters.)

from __future__ import annotations

import argparse
import codecs
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import heapq
import importlib
import inspect
import itertools
import json
import lzma
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import regex

__version__ = "0.1.0"


# ========================================================================================
# PART ONE: TEXT
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

# GPT-2's pattern. At each position the first alternative that matches wins: an English
# contraction; letters, digits or punctuation, each with one optional space in front; or
# whitespace. A space belongs to the word that follows it, so most words need no separate token
# for the space. So of several spaces before a word, `\s+(?!\S)` takes all but the last, as
# `(?!\S)` forbids a non-space right after the match: "a  b" becomes "a", " ", " b". The last
# `\s+` takes what is left, such as a newline before a word. (\p{L} is any letter in Unicode and
# \p{N} any numeric character. Python's `re` doesn't know these classes; the package `regex`
# does.)
PRETOKEN_PATTERN = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
# GPT-4's pattern takes digits in groups of at most three, a word may start with any one
# punctuation mark or space, not just a space, and line breaks stay with the punctuation or
# whitespace in front of them. (As first published in OpenAI's tiktoken, and
# used by Llama 3.)
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class UserError(ValueError):
    """An error the user can fix. The command line prints its message as a single line."""


def pretokenize(text: str, pattern: str = PRETOKEN_PATTERN) -> list[str]:
    """Split `text` into pre-tokens. Joining them reproduces `text`.

    >>> pretokenize("It's 3 o'clock,  isn't it?")
    ['It', "'s", ' 3', ' o', "'", 'clock', ',', ' ', ' isn', "'t", ' it', '?']
    """
    pieces, end = [], 0
    for match in regex.finditer(pattern, text):
        # GPT-2's pattern matches everything. Other patterns may leave gaps: keep their text.
        pieces += [text[end : match.start()], match[0]]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


# Tokens are made of bytes, not characters. In UTF-8, "a" is one byte, "é" two and "漢" three.
# There are only 256 possible bytes, and all text is made of them, so no character is unknown.


def bytes_to_text(data: bytes) -> str:
    """The text of UTF-8 `data`, which may contain invalid bytes.

    Python's "surrogateescape" turns each invalid byte into one of 128 *surrogates*, U+DC80 to
    U+DCFF, code points that valid text doesn't use.

    >>> bytes_to_text(b"caf\\xc3\\xa9 \\xff")
    'café \\udcff'
    """
    return data.decode("utf-8", "surrogateescape")


def text_to_bytes(text: str) -> bytes:
    """The UTF-8 bytes of `text`; the inverse of `bytes_to_text`.

    Raises UserError for a surrogate that `bytes_to_text` doesn't make, since UTF-8 has no bytes
    for it.

    >>> list(text_to_bytes("aé"))
    [97, 195, 169]
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise UserError(f"the text contains {surrogate!r}, a lone surrogate") from None


# A *special token* marks something that is not text, such as the end of a document. It gets
# a single id, however long its text is, and is cut out before the pattern sees the text.


def special_token_pattern(special_tokens: Iterable[str]) -> re.Pattern:
    """A pattern that finds special tokens, preferring the longest match.

    >>> special_token_pattern(["<a>", "<a><b>"]).findall("x<a><b>y<a>")
    ['<a><b>', '<a>']
    """
    longest_first = sorted(special_tokens, key=len, reverse=True)
    # Without special tokens: a pattern that never matches. (\A makes it give up at once.)
    return re.compile("|".join(map(re.escape, longest_first)) or r"\A(?!)")


def count_pretokens(
    text: str, special_tokens: Sequence[str] = (), pattern: str = PRETOKEN_PATTERN
) -> Counter[bytes]:
    """How often each pre-token occurs in `text`. Special tokens act only as separators.

    >>> sorted(count_pretokens("to be or<end>not to be", ["<end>"]).items())
    [(b' be', 2), (b' or', 1), (b' to', 1), (b'not', 1), (b'to', 1)]
    """
    counts: Counter[bytes] = Counter()
    for document in special_token_pattern(special_tokens).split(text):
        counts.update(map(text_to_bytes, pretokenize(document, pattern)))
    return counts


# Exercises
# 1. `pretokenize(" 2024 24,000")` gives " 2024", " 24", "," and "000". Predict what it gives
#    with GPT4_PATTERN, then try it. Which numbers stay one pre-token under each pattern?
# 2. Remove `\s+(?!\S)|` from PRETOKEN_PATTERN and split "a  b". Which pre-token gets the second
#    space now? What would that mean for the word " b"?


# ----------------------------------------------------------------------------------------
# 2. Learning merges
#
# Which byte sequences deserve a token of their own? Byte-pair encoding answers greedily:
# start with the 256 single bytes, find the pair of adjacent tokens that occurs most often,
# make that pair a new token, and repeat until the vocabulary is full.
# (Sennrich et al. 2016, arXiv 1508.07909, Algorithm 1)
#
# This is the paper's algorithm, complete but slow. Chapter 4 finds exactly the same merges
# hundreds of times faster.
# ----------------------------------------------------------------------------------------

Merge = tuple[bytes, bytes]  # two tokens that become one


def merge_pair(tokens: list, pair: tuple, merged: Any) -> list:
    """`tokens` with each occurrence of `pair`, from left to right, replaced by `merged`.

    >>> merge_pair(["a", "a", "a", "b"], ("a", "a"), "aa")
    ['aa', 'a', 'b']
    """
    left, right = pair
    result: list = []
    for token in tokens:
        if token == right and result and result[-1] == left:
            result[-1] = merged  # this isn't `left`, so it won't be merged again
        else:
            result.append(token)
    return result


def learn_merges_naive(pretoken_counts: dict[bytes, int], num_merges: int) -> list[Merge]:
    """Up to `num_merges` merges, in the order learned; fewer if no pair is left.

    A worked example. At first "es" and "st" both occur 6 + 3 = 9 times. The tie goes to the
    lexicographically greatest pair, and b"s" > b"e", so "st" is merged first. Then
    "e" + "st" occurs 9 times. Then "lo" and "ow" occur 5 + 2 + 1 = 8 times each, and
    b"o" > b"l".

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
        words = [(merge_pair(tokens, best, best[0] + best[1]), n) for tokens, n in words]
    return merges


def build_vocab(merges: Sequence[Merge], special_tokens: Sequence[str]) -> dict[int, bytes]:
    """The vocabulary, id to bytes: 256 bytes, merges in the order learned, special tokens.

    >>> vocab = build_vocab([(b"s", b"t"), (b"e", b"st")], ["<end>"])
    >>> vocab[101], vocab[256], vocab[257], vocab[258]
    (b'e', b'st', b'est', b'<end>')
    """
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += map(text_to_bytes, special_tokens)
    return dict(enumerate(tokens))


# Exercises
# 1. Choose by count alone: `max(pair_counts, key=pair_counts.get)`. The example's first merge
#    is now (b"e", b"s"), which happened to be counted first.
# 2. Which merge comes fifth in the example? Work it out by hand, then check.


# ----------------------------------------------------------------------------------------
# 3. The tokenizer
#
# A trained tokenizer is a vocabulary and a list of merges. To *encode* text, split it into
# pre-tokens, and in each of them apply the merges in the order they were learned. To
# *decode* ids, look up their bytes and join them. (Sennrich et al. 2016, section 3.2)
#
# This is a complete tokenizer. Lines marked "chapter 4" hand long texts to that chapter's
# faster code, which gives the same ids: ignore them for now. Tokenizers are saved as Hugging
# Face's tokenizer.json, so other libraries can read ours and we can read theirs. Chapter 4 has
# the details of that file, and checks.
# ----------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"  # the special token between documents, named as in GPT-2
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>")  # and in Llama 3


class Tokenizer:
    """Byte-level BPE: text to token ids, and back to the same bytes.

    `vocab` maps ids to bytes. `merges` are pairs of tokens in the order learned. Special
    tokens may be in `vocab` already; the others get the next free ids. `pattern` splits text
    into pre-tokens. Raises UserError if the arguments contradict each other.

    Two things exist only for tokenizers made by others. With `ignore_merges`, as in Llama 3, a
    pre-token that is in the vocabulary takes its id without any merges. And bytes that a
    vocabulary lacks are skipped; ours have all 256.

    A worked example with three merges. "then" starts as the bytes t, h, e, n. Merge 0
    makes th, e, n; merge 1 makes the, n; merge 2 looks for h + e and finds none.

    >>> merges = [(b"t", b"h"), (b"th", b"e"), (b"h", b"e")]
    >>> tokenizer = Tokenizer(build_vocab(merges, []), merges, ["<|endoftext|>"])
    >>> tokenizer.encode("then<|endoftext|>he")  # "the" is 257, n is byte 110, "he" is 258
    [257, 110, 259, 258]
    >>> tokenizer.decode([257, 110, 259])
    'then<|endoftext|>'
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: Sequence[Merge],
        special_tokens: Sequence[str] | None = None,
        pattern: str = PRETOKEN_PATTERN,
        ignore_merges: bool = False,
    ):
        check_special_tokens(special_tokens or [])  # these checks are in chapter 4
        check_pattern(pattern)
        self.vocab, self.merges, self.pattern = dict(vocab), list(merges), pattern
        self.ignore_merges = ignore_merges
        # Reversed, because the last entry of a dict wins: of two ids with the same bytes, use
        # the first. (There are two only if a special token repeats an ordinary one. Then both
        # mean the ordinary token.)
        self.token_to_id = {token: i for i, token in reversed(self.vocab.items())}
        check_merges(self.merges, self.token_to_id)
        self.special_tokens: dict[str, int] = {}
        for token in special_tokens or []:
            data = text_to_bytes(token)
            # Its id if it has one, else the next free one.
            i = self.token_to_id.setdefault(data, max(self.vocab) + 1)
            self.vocab[i], self.special_tokens[token] = data, i
        self.vocab_size = max(self.vocab) + 1
        self.special_pattern = special_token_pattern(self.special_tokens)
        # The merges in terms of ids, ((left, right), merged). The *rank* of a pair is its
        # index in this list: the lower, the earlier it was learned.
        id_of = self.token_to_id
        self.id_merges = [((id_of[left], id_of[right]), id_of[left + right])
                          for left, right in self.merges]
        self.merge_rank = {pair: rank for rank, (pair, _) in enumerate(self.id_merges)}
        # Words repeat, so remember the most recent ones.
        self.encode_pretoken = functools.lru_cache(maxsize=1 << 11)(self.apply_merges)

    def apply_merges(self, word: bytes) -> tuple[int, ...]:
        """The ids of one pre-token: apply the merge of lowest rank until none applies.

        This replays learning: it goes through the merges in the order learned. A merge creates
        only pairs that contain the new token, and those were learned later. For example,
        "t" + "h" creates "th" + "e", whose rank is higher.
        """
        if self.ignore_merges and word in self.token_to_id:
            return (self.token_to_id[word],)
        if len(word) > MAX_NAIVE:  # 256 bytes
            return self.fast.encode_word(word)  # chapter 4
        single_bytes = [bytes([byte]) for byte in word]
        ids = [self.token_to_id[byte] for byte in single_bytes if byte in self.token_to_id]
        no_rank = len(self.merges)
        while len(ids) > 1:
            rank = min([self.merge_rank.get(pair, no_rank) for pair in zip(ids, ids[1:])])
            if rank == no_rank:
                break
            pair, merged = self.id_merges[rank]
            ids = merge_pair(ids, pair, merged)
        return tuple(ids)

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens in it are treated like any other text."""
        if len(text) >= LONG_TEXT:  # 16,384 characters
            return self.fast.encode(text, special=False).tolist()  # chapter 4
        ids: list[int] = []
        for pretoken in pretokenize(text, self.pattern):
            ids += self.encode_pretoken(text_to_bytes(pretoken))
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens in it become their own ids."""
        if len(text) >= LONG_TEXT:
            return self.fast.encode(text).tolist()  # chapter 4
        ids, end = [], 0
        for match in self.special_pattern.finditer(text):
            ids += self.encode_ordinary(text[end : match.start()])
            ids.append(self.special_tokens[match[0]])
            end = match.end()
        return ids + self.encode_ordinary(text[end:])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these tokens, joined. Raises UserError for an unknown id."""
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            size = self.vocab_size
            raise UserError(f"id {error} is not in the vocabulary of {size} entries") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD.

        TRAP: decode ids together, not one by one. The bytes of a character can be spread over
        several tokens, and only the joined bytes are valid.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # The rest of the class serves files and later chapters.

    def encode_iterable(self, chunks: Iterable[str]) -> Iterator[int]:
        """Yields the ids of the joined chunks, holding only a little text in memory.

        `for token_id in tokenizer.encode_iterable(open(path, newline="")): ...` reads a file of
        any size. (Without newline="", Python turns \\r\\n into \\n.)
        """
        for text in safe_pieces(chunks, self.pattern, self.special_tokens):  # chapter 4
            yield from self.encode(text)

    @functools.cached_property
    def fast(self) -> FastEncoder:
        """Chapter 4's encoder for this tokenizer: the same ids, for long texts."""
        return FastEncoder(self)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, which `tokenizers.Tokenizer.from_file` reads as well."""
        write_json(path, tokenizer_to_json(self))  # chapter 4

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, ours or another library's byte-level BPE.

        Many such files add tokens around each text (a "post-processor", for instance one that
        starts every text with <s>). Those are not added here. Raises UserError for files that
        are damaged or need something this class lacks, and says what.
        """
        return tokenizer_from_json(read_json(path, "tokenizer.json"), path)  # chapter 4

    @property
    def eot_id(self) -> int | None:
        """The id of the special token that ends a text, if there is one."""
        ids = map(self.special_tokens.get, END_OF_TEXT_NAMES)
        return next((i for i in ids if i is not None), None)

    @property
    def dtype(self) -> str:
        """How token files store ids: as little-endian integers of 16 bits, or 32 if needed."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    def fingerprint(self) -> str:
        """A hash of everything that determines the ids: are two tokenizers the same?"""
        return hashlib.sha256(json.dumps(tokenizer_to_json(self)).encode()).hexdigest()

    def __reduce__(self) -> tuple:  # makes it picklable, for other processes
        specials = list(self.special_tokens)
        return Tokenizer, (self.vocab, self.merges, specials, self.pattern, self.ignore_merges)


# Exercises
# 1. In `apply_merges`, apply the leftmost pair that has a merge instead of the one of lowest
#    rank. With the merges h + e and t + h, in this order, which ids does "the" get now?
# 2. Encode "Ünï" with the tokenizer of the example, then decode the ids one by one and all
#    together.


# ----------------------------------------------------------------------------------------
# 4. Tokenizing corpora
#
# This chapter can wait; continue at "# PART TWO". It computes what chapters 1 to 3 compute, on
# gigabytes of text. (Its second half is files, processes, progress and flags, none of it about
# language: the tokenizer's commands need that before PyTorch is imported.)
#
# Four ideas make it fast. Learn merges without recounting: a merge changes only the words that
# contain the pair. Apply merges that can't affect each other in one batch. Do the work once per
# *distinct* word, since text repeats itself. And process a megabyte at a time with numpy,
# instead of a word at a time in Python. Tests check that the results equal those of chapters 1
# to 3, on arbitrary bytes. "Word" means pre-token.
# ----------------------------------------------------------------------------------------

import numpy as np

CHUNK = 1 << 20  # bytes, or characters, processed at a time
LONG_TEXT = 1 << 14  # `Tokenizer.encode` uses this chapter for texts of at least this length
MAX_NAIVE = 256  # `Tokenizer.apply_merges` uses it for words longer than this
MASK_32 = (1 << 32) - 1


def run_starts(values: np.ndarray) -> np.ndarray:
    """Whether each value differs from the one before it; bool [N].

    >>> run_starts(np.array([7, 7, 3, 7])).tolist()
    [True, False, True, True]
    """
    starts = np.ones(len(values), bool)
    starts[1:] = values[1:] != values[:-1]
    return starts


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The concatenation of the ranges starts[i], ..., starts[i] + lengths[i] - 1.

    >>> ragged_indices(np.array([10, 5]), np.array([2, 3])).tolist()
    [10, 11, 5, 6, 7]
    """
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


# Learning merges without recounting
# ----------------------------------


class PairIndex:
    """Words as linked lists of tokens, and for each pair of neighbors: count and positions.

    In plain Python one would keep a dictionary from pair to the set of words that contain it.
    This is the same idea in arrays, so that many merges take a few numpy calls.

    Every byte of every word has a position. `token[p]` is the token there, `prev[p]` and
    `next[p]` are the positions of its neighbors. Merging a pair at p writes the new token to
    p and unlinks the position after it. Here are "low" and "slow", and what merging l + o into
    token 256 leaves. A token -1 separates words; x marks the positions that are unlinked.

        p        0   1   2   3   4   5   6   7   8   9
        token   -1   l   o   w  -1   s   l   o   w  -1
                -1 256   x   w  -1   s 256   x   w  -1

    Each distinct pair has a number: `pair_at[p]` is that of (token at p, token after p), or -1
    if one of them is a separator. Pair n is (left[n], right[n]) and occurs count[n] times;
    `positions[start[n] : start[n + 1]]` are the positions where it occurred when it was new.

    >>> index = PairIndex([b"low", b"slow"], [5, 2])
    >>> lo = int(index.pair_at[1])
    >>> int(index.count[lo]), index.occurrences([lo])[0].tolist()
    (7, [1, 6])
    >>> _, created = index.merge([lo], 256)  # now s + 256 occurs twice, 256 + w seven times
    >>> [(int(index.left[n]), int(index.right[n]), int(index.count[n])) for n in created]
    [(115, 256, 2), (256, 119, 7)]
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
        # Preallocate for all pairs. There are fewer than `size` at first, and merging at one
        # position creates at most two pairs and unlinks one position. (The system supplies
        # memory for np.zeros only when it is first written.)
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
        self.left[created], self.right[created] = pairs[starts] >> 32, pairs[starts] & MASK_32
        self.positions[used : used + len(positions)] = positions
        self.start[created] = used + starts
        self.start[self.num_pairs] = used + len(positions)
        self.pair_at[positions] = is_first.cumsum(dtype=np.int32) + (first - 1)
        self.count[created] = np.add.reduceat(self.weight[positions], starts)
        return range(first, self.num_pairs)

    def occurrences(self, pairs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where these pairs occur, without overlaps, and which one: an index into `pairs`."""
        numbers = np.array(pairs)
        first, lengths = self.start[numbers], self.start[numbers + 1] - self.start[numbers]
        pos = self.positions[ragged_indices(first, lengths)]
        pair_index = np.repeat(np.arange(len(pairs)), lengths)
        unchanged = self.pair_at[pos] == numbers[pair_index]  # earlier merges have changed some
        pos, pair_index = pos[unchanged], pair_index[unchanged]
        keep = without_overlaps(pos, self.next[pos])
        return pos[keep], pair_index[keep]

    def pairs_around(
        self, pos: np.ndarray, next_pos: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pairs that new `tokens` at `pos` form with their neighbors; and where they are.

        The pairs are sorted. If both tokens of a pair are new, it's in the result only once.
        """
        prev_pos = self.prev[pos]
        x, y = self.token[prev_pos], self.token[next_pos]
        is_new = x >= tokens.min()  # new tokens have the highest ids
        is_left, is_right = (x >= 0) & ~is_new, y >= 0
        pairs = np.concatenate([(x << 32 | tokens)[is_left], (tokens << 32 | y)[is_right]])
        order = pairs.argsort(kind="stable")
        return pairs[order], np.concatenate([prev_pos[is_left], pos[is_right]])[order]

    def select_independent(
        self, pairs: Sequence[int], new: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where to merge pairs[0] into the token `new`, pairs[1] into `new` + 1, and so on.

        `pairs` are those with the highest counts, in descending order. Only as many are taken
        as can be merged together with the result of merging one after the other. Two things
        end this, shown with words of chapter 2:

        - A pair begins with the token that an earlier one ends with, or the reverse. Merging
          l + o first would leave fewer occurrences of o + w.
        - Earlier merges create a pair that occurs at least as often as the next pair. s + t
          creates e + st, 9 times, and that comes before o + w, 8 times.

        Returns positions, and for each the index of its pair in `pairs`.
        """
        # First: which pair shares a token with an earlier one? Keep those before the first.
        left, right = self.left[pairs], self.right[pairs]
        shares = (left[:, None] == right) | (right[:, None] == left)  # [earlier, later]
        shares_with_earlier = np.triu(shares, 1).any(axis=0)
        pairs = pairs[: int(np.append(shares_with_earlier, True).argmax())]
        # Second: merge i makes the token new + i, and so pairs of this token and a neighbor.
        # How often does the most frequent of them occur? At most highest[i] times: less often
        # if the neighbor is merged as well.
        pos, pair_index = self.occurrences(pairs)
        created, positions = self.pairs_around(pos, self.next[self.next[pos]], new + pair_index)
        is_first, highest = run_starts(created), np.zeros(len(pairs))
        counts = np.bincount(is_first.cumsum() - 1, self.weight[positions])
        created_by = np.maximum(created >> 32, created & MASK_32)[is_first] - new
        np.maximum.at(highest, created_by, counts)
        # The next pair in the list comes next only if it is more frequent than all of these.
        is_next = self.count[pairs[1:]] > np.maximum.accumulate(highest)[:-1]
        taken = pair_index <= int(np.append(is_next, False).argmin())
        return pos[taken], pair_index[taken]

    def merge(self, pairs: Sequence[int], new: int) -> tuple[int, range]:
        """Merge the first of `pairs` that are independent. Returns how many, and new pairs."""
        pos, pair_index = self.select_independent(pairs, new)
        num_merged, tokens = int(pair_index.max()) + 1, new + pair_index
        # The pairs on both sides disappear. (In "abab" both are the same pair: count it
        # once. At the end of a word the number is -1; count[-1] is never read.)
        right, weight = self.next[pos], self.weight[pos]
        np.subtract.at(self.count, self.pair_at[right], weight)
        self.pair_at[right] = -1
        np.subtract.at(self.count, self.pair_at[self.prev[pos]], weight)
        self.count[pairs[:num_merged]] = 0
        # Write the new tokens and unlink the right ones.
        self.token[pos], self.pair_at[pos] = tokens, -1
        self.next[pos] = self.next[right]
        self.prev[self.next[pos]] = pos
        return num_merged, self.add_pairs(*self.pairs_around(pos, self.next[pos], tokens))


def without_overlaps(left_pos: np.ndarray, right_pos: np.ndarray) -> np.ndarray:
    """Which pairs to merge, of those with tokens at left_pos[i] and right_pos[i], ascending.

    Pairs overlap in a run of equal tokens. "aaaa" has three: merge the first and the third.

    >>> without_overlaps(np.array([0, 1, 2, 7]), np.array([1, 2, 3, 8])).tolist()
    [True, False, True, True]
    """
    index, starts_run = np.arange(len(left_pos)), np.ones(len(left_pos), bool)
    starts_run[1:] = right_pos[:-1] != left_pos[1:]
    first_of_run = np.maximum.accumulate(np.where(starts_run, index, 0))
    return (index - first_of_run) % 2 == 0


def tie_break_key(token: bytes) -> tuple[int, ...]:
    """A key that sorts tokens in reverse order, for a heap, whose top is its smallest entry.

    >>> sorted([b"a", b"ab", b"b"], key=tie_break_key)
    [b'b', b'ab', b'a']
    """
    return (*(-byte for byte in token), 1)  # 1, so that "a" sorts after "ab"


def learn_merges(pretoken_counts: dict[bytes, int], num_merges: int) -> list[Merge]:
    """The merges of `learn_merges_naive`, in a fraction of the time.

    Pairs wait in a max-heap keyed by count. An entry goes stale when another merge
    consumes some of the pair's occurrences; then it is put back with its current count. (A
    count never grows: a pair contains the newest token when it is created, and later merges
    only take occurrences away.) Most pairs are rare and are never merged. So the heap holds
    only pairs above a threshold, which is halved whenever the heap is empty. The top pairs of
    the heap are merged together, as many as are independent: often tens, on a large
    corpus.

    >>> words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3, b"slow": 1}
    >>> learn_merges(words, 4)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w'), (b'l', b'ow')]
    """
    index = PairIndex(pretoken_counts, pretoken_counts.values())
    tokens = [bytes([byte]) for byte in range(256)]
    tie_keys = [tie_break_key(token) for token in tokens]
    merges: list[Merge] = []
    heap: list[tuple] = []
    threshold, num_merged = int(index.count[: index.num_pairs].max(initial=0)) + 1, 1

    def push(pairs: Iterable[int]) -> None:
        for pair in pairs:
            if (count := int(index.count[pair])) >= threshold:
                keys = tie_keys[index.left[pair]], tie_keys[index.right[pair]]
                heapq.heappush(heap, (-count, *keys, pair))

    progress = Progress("merging", num_merges, "merges")
    while len(merges) < num_merges and (heap or threshold > 1):
        if not heap:
            threshold = max(1, threshold // 2)
            push(np.flatnonzero(index.count[: index.num_pairs] >= threshold).tolist())
        # Try twice as many as were merged together last time.
        batch: list[int] = []
        limit = min(2 * num_merged, num_merges - len(merges))
        while heap and len(batch) < limit:
            negative_count, *_, pair = heapq.heappop(heap)
            if index.count[pair] == -negative_count:
                batch.append(pair)
            else:
                push([pair])
        if batch:
            num_merged, created = index.merge(batch, len(tokens))
            for pair in batch[:num_merged]:
                merges.append((tokens[index.left[pair]], tokens[index.right[pair]]))
                tokens.append(b"".join(merges[-1]))
                tie_keys.append(tie_break_key(tokens[-1]))
            counts = index.count[created.start : created.stop]
            push(created.start + np.flatnonzero(counts >= threshold))
            push(batch[num_merged:])
        progress.update(len(merges))
    progress.close()
    return merges


# Splitting without a regular expression
# --------------------------------------
# For GPT-2's pattern it is enough to know the class of each character: a pre-token starts
# where the class changes, with three exceptions. N is the number of characters. (Any other
# pattern goes through the regular expression, several times slower: see `find_pretokens`.)

LETTER, NUMBER, OTHER, SPACE, SPECIAL, UNKNOWN = range(6)
CLASS_OF_CODE = np.full(0x110000, UNKNOWN, np.uint8)  # of every code point


def classify(codes: Iterable[int]) -> None:
    """Fill in CLASS_OF_CODE, asking the regex package so that both agree on Unicode."""
    characters = "".join(map(chr, codes))
    # Start with OTHER for all, since `.` matches any character.
    for pattern, c in {".": OTHER, r"\p{L}": LETTER, r"\p{N}": NUMBER, r"\s": SPACE}.items():
        found = regex.findall(pattern, characters, regex.DOTALL)
        CLASS_OF_CODE[list(map(ord, found))] = c


classify(range(128))


def character_classes(codes: np.ndarray) -> np.ndarray:
    """The class of each code point; uint8 [N]."""
    classes = CLASS_OF_CODE.take(codes)
    unknown = classes == UNKNOWN
    if unknown.any():
        classify(set(codes[unknown].tolist()))
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
    # A pre-token starts where the class changes, with three exceptions.
    # 1. What follows a space doesn't start a pre-token, since the space has started it.
    start[1 : len(codes)] = changes & (space[1:] | (codes[:-1] != ord(" ")))
    # 2. The last whitespace before a word starts one, even inside a run of whitespace. (The
    #    classes below SPACE are letters, numbers and others.)
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
    """The UTF-8 bytes of a text, and the pre-tokens in it."""

    data: bytes
    starts: np.ndarray  # where each starts in `data`; int64 [N]
    lengths: np.ndarray  # in bytes; int64 [N]
    special_at: np.ndarray  # which of them are special tokens; int64
    special_tokens: list[str]  # and which tokens these are

    def cut(self, indices: np.ndarray) -> list[bytes]:
        """The pre-tokens with these indices."""
        spans = zip(self.starts[indices].tolist(), self.lengths[indices].tolist())
        return [self.data[start : start + length] for start, length in spans]


def find_pretokens(text: str, pattern: str, special_pattern: re.Pattern) -> Pretokens:
    """All pre-tokens and special tokens of `text`, in order."""
    data = text_to_bytes(text)
    if text.isascii():  # one byte per character
        codes = np.frombuffer(data, np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    matches = list(special_pattern.finditer(text))
    edges = np.array([edge for match in matches for edge in match.span()], np.int64)
    edges = edges.reshape(-1, 2)  # the start and the end of each special token
    if pattern == PRETOKEN_PATTERN:
        # Inside special tokens nothing starts, and code points are ignored.
        codes_outside, classes = codes.copy(), character_classes(codes)
        inside = ragged_indices(edges[:, 0], edges[:, 1] - edges[:, 0])
        codes_outside[inside], classes[inside] = 0, SPECIAL
        is_start = find_gpt2_pretokens(codes_outside, classes)
        is_start[edges[edges < len(codes)]] = True
        starts = np.flatnonzero(is_start)
    else:
        borders, end = [0, *edges.flat], 0
        # The text before each special token, and after the last one.
        for start, next_end in [*edges.tolist(), (len(text), 0)]:
            for match in regex.finditer(pattern, text[end:start]):
                borders += [end + match.start(), end + match.end()]
            end = next_end
        starts = np.unique(np.array(borders, np.int64))
        starts = starts[starts < len(text)]
    special_at = np.searchsorted(starts, edges[:, 0])
    if len(text) < len(data):  # from characters to bytes; an escaped byte is one byte
        sizes = np.uint8(1) + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
        starts = np.cumsum(sizes, dtype=np.int64)[starts] - sizes[starts]
    lengths = np.diff(starts, append=len(data))
    return Pretokens(data, starts, lengths, special_at, [match[0] for match in matches])


# Looking up all words of a chunk at once
# ---------------------------------------
# A Python dictionary from word to ids would do, one word at a time; that takes several times
# as long as everything else here. Instead, a word of up to 15 bytes, with its length, is packed
# into two 64-bit integers, its key, so that one numpy comparison compares all words of a chunk
# with those in a table. N is the number of words.

MAX_SHORT = 15
# Row n masks the first n of 16 bytes, as two little-endian integers.
KEY_MASK = np.where(np.arange(16) < np.arange(17)[:, None], 255, 0).astype("u1").view("<u8")
HASH_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, arbitrary


def word_keys(words: Pretokens) -> np.ndarray:
    """Bytes 0 to 7 of each word; bytes 8 to 14, with the length in the top byte; uint64 [N, 2].

    Words of more than 15 bytes count as 16 bytes long; their keys are never used.
    """
    padded = words.data + bytes(16)
    # A view of the same memory, with an item of 16 bytes starting at every byte.
    items = np.ndarray(len(words.data) + 1, "V16", padded, strides=(1,))
    lengths = np.minimum(words.lengths, MAX_SHORT + 1)
    keys = items[words.starts].view("<u8").reshape(-1, 2) & KEY_MASK.take(lengths, axis=0)
    keys[:, 1] |= lengths.astype(np.uint64) << np.uint64(56)
    return keys


class WordTable:
    """Gives each distinct word a number, the next free one when it is first seen.

    A word's hash determines the slot where it is stored. If another word is there, that one is
    evicted; when it reappears, it gets another number. So a word can have several numbers, but
    a number always means one word. Words longer than 15 bytes are rare: they're kept in a
    dictionary.
    """

    BITS = 18

    def __init__(self, size: int = 0):
        # A free slot has the key (0, 0), which isn't a word's, since it contains the length.
        self.keys = np.zeros((1 << self.BITS, 2), np.uint64)
        self.numbers = np.zeros(1 << self.BITS, np.int64)
        self.long_words: dict[bytes, int] = {}
        self.size = size

    def lookup(self, words: Pretokens) -> tuple[np.ndarray, np.ndarray]:
        """The number of each word, int64 [N], and the indices of words that are new.

        If a new word occurs several times, one of its indices is in the second result.
        """
        keys, is_long = word_keys(words), words.lengths > MAX_SHORT
        hashes = (keys[:, 0] * HASH_FACTORS[0] ^ keys[:, 1]) * HASH_FACTORS[1]
        slots = (hashes >> np.uint64(64 - self.BITS)).astype(np.int64)
        numbers, equal = self.numbers.take(slots), self.keys.take(slots, axis=0) == keys
        missing = np.flatnonzero(~(equal[:, 0] & equal[:, 1] | is_long))
        # Sorting by hash puts equal words side by side; each group gets the next number. (If
        # two words have the same hash, one may get two numbers: harmless.)
        missing = missing[hashes[missing].argsort()]
        is_first = run_starts(keys[missing, 0]) | run_starts(keys[missing, 1])
        numbers[missing] = self.size - 1 + np.cumsum(is_first)
        new = missing[is_first]
        # TRAP: new words may share a slot. The last one wins, the same in both arrays.
        self.keys[slots[new]], self.numbers[slots[new]] = keys[new], numbers[new]
        self.size += len(new)
        new_long: list[int] = []
        at = np.flatnonzero(is_long)
        for i, word in zip(at.tolist(), words.cut(at)):
            if word not in self.long_words:
                self.long_words[word] = self.size + len(new_long)
                new_long.append(i)
            numbers[i] = self.long_words[word]
        self.size += len(new_long)
        return numbers, np.append(new, np.array(new_long, np.int64))


# Encoding
# --------


def merge_levels(id_merges: Sequence[tuple[tuple[int, int], int]]) -> list[int]:
    """Gives consecutive merges the same level if they never compete for a token.

    "t" + "h" and "h" + "e" do, since "the" has only one h; there the order matters. In general,
    two merges compete if one begins with a token that the other ends with. "th" + "e" needs the
    result of "t" + "h", but doesn't compete with it: both may be in one level, which then takes
    two rounds of `encode_words`. Tens of merges share a level.

    >>> th, the, he = 256, 257, 258  # as in chapter 3, and then i + n
    >>> merge_levels([((116, 104), th), ((th, 101), the), ((104, 101), he), ((105, 110), 259)])
    [0, 0, 1, 1]
    """
    level, levels = 0, []
    lefts: set[int] = set()
    rights: set[int] = set()
    for (left, right), _ in id_merges:
        if left in rights or right in lefts:
            level, lefts, rights = level + 1, set(), set()
        lefts.add(left)
        rights.add(right)
        levels.append(level)
    return levels


class FastEncoder:
    """Encodes long texts: the ids of `Tokenizer.encode`, by looking up whole words."""

    MAX_IDS = 1 << 20  # when the cache holds more, it is cleared

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, merges = tokenizer, tokenizer.id_merges
        pairs = np.array([pair for pair, _ in merges], np.int64).reshape(-1, 2)
        # Both ids of a pair in one integer, sorted for binary search. The last is a sentinel.
        keys = np.append(pairs[:, 0] << 32 | pairs[:, 1], np.iinfo(np.int64).max)
        self.rank_of_pair, self.pairs = keys.argsort(), np.sort(keys)
        self.merged_ids = np.array([merged for _, merged in merges], np.int64)
        self.no_merge = len(merges)  # the rank and the level of a pair that has no merge
        self.levels = np.array([*merge_levels(merges), self.no_merge])
        id_of = tokenizer.token_to_id
        self.byte_ids = np.array([id_of.get(bytes([b]), -1) for b in range(256)])
        self.clear()

    def clear(self) -> None:
        """Forget all words. Word number n has the ids pool[start[n] : start[n + 1]]."""
        specials = list(self.tokenizer.special_tokens.values())
        self.table = WordTable(size=len(specials))  # the first numbers are special tokens
        self.pool = np.array(specials, np.int32)
        self.start = np.arange(len(specials) + 1)
        self.special_numbers = {s: n for n, s in enumerate(self.tokenizer.special_tokens)}

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """The ids of `text`, int32 [N]; with `special`, special tokens are recognized."""
        specials = self.tokenizer.special_tokens if special else {}
        pattern = special_token_pattern(specials)
        pieces = safe_pieces([text], self.tokenizer.pattern, specials, CHUNK)
        return np.concatenate([self.encode_piece(piece, pattern) for piece in pieces])

    def encode_piece(self, text: str, special_pattern: re.Pattern) -> np.ndarray:
        """The ids of a text that is small enough to be processed at once."""
        if len(self.pool) > self.MAX_IDS:
            self.clear()
        words = find_pretokens(text, self.tokenizer.pattern, special_pattern)
        numbers, new = self.table.lookup(words)
        if len(new):
            ids, lengths = self.encode_words(words, new)
            self.start = np.append(self.start, len(self.pool) + np.cumsum(lengths))
            self.pool = np.append(self.pool, ids.astype(np.int32))
        numbers[words.special_at] = [self.special_numbers[t] for t in words.special_tokens]
        starts, ends = self.start.take(numbers), self.start.take(numbers + 1)
        return self.pool.take(ragged_indices(starts, ends - starts))

    def encode_words(
        self, words: Pretokens, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of some words, concatenated, and how many each has.

        The ids of all words are in one flat array, and `word` tells which word each belongs
        to. In every round all merges of a word's lowest level are applied. A word without
        any merge left is done. With the merges th, the, he:

            ids    t h e n t h      word    0 0 0 0 1 1      before the first round
                   th e n th                0 0 0 1          word 1 is done
                   the n                    0 0              word 0 is done

        Each round passes over whole words, so a single word of a megabyte, which takes
        hundreds of rounds, takes seconds.
        """
        empty, lengths = np.empty(0, np.int64), words.lengths[indices]
        done_ids, done_words = [empty], [empty]
        if self.tokenizer.ignore_merges:  # some words are one token without any merge
            id_of, cut = self.tokenizer.token_to_id, words.cut(indices)
            whole = {n: id_of[word] for n, word in enumerate(cut) if word in id_of}
            done_ids.append(np.array([*whole.values()], np.int64))
            done_words.append(np.array([*whole], np.int64))
            lengths[done_words[-1]] = 0
        word = np.repeat(np.arange(len(indices)), lengths)
        data = np.frombuffer(words.data, np.uint8)
        ids = self.byte_ids[data[ragged_indices(words.starts[indices], lengths)]]
        ids, word = ids[ids >= 0], word[ids >= 0]  # drop bytes that no token stands for
        ranks = self.pair_ranks(ids, word, np.arange(len(ids)))
        while len(ids):
            levels, starts = self.levels[ranks], np.flatnonzero(run_starts(word))
            lowest = np.minimum.reduceat(levels, starts)
            lowest = np.repeat(lowest, np.diff(starts, append=len(ids)))
            is_done = lowest == self.no_merge
            done_ids.append(ids[is_done])
            done_words.append(word[is_done])
            pos = np.flatnonzero((levels == lowest) & ~is_done)
            pos = pos[without_overlaps(pos, pos + 1)]
            ids[pos] = self.merged_ids[ranks[pos]]
            keep = ~is_done
            keep[pos + 1] = False
            new_pos = np.cumsum(keep)[pos] - 1  # where the merged tokens are after the removal
            ids, word, ranks = ids[keep], word[keep], ranks[keep]
            changed = np.append(new_pos[new_pos > 0] - 1, new_pos)
            ranks[changed] = self.pair_ranks(ids, word, changed)
        all_ids, all_words = np.concatenate(done_ids), np.concatenate(done_words)
        order = all_words.argsort(kind="stable")
        return all_ids[order], np.bincount(all_words, minlength=len(indices))

    def encode_word(self, word: bytes) -> tuple[int, ...]:
        """The ids of one word."""
        words = Pretokens(word, np.array([0]), np.array([len(word)]), np.array([]), [])
        return tuple(self.encode_words(words, np.array([0]))[0].tolist())

    def pair_ranks(self, ids: np.ndarray, word: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """The rank of the pair at each `pos` and pos + 1; no rank if these are two words."""
        next_pos = np.minimum(pos + 1, len(ids) - 1)
        pairs = ids[pos] << 32 | ids[next_pos]
        found = self.pairs.searchsorted(pairs)
        one_word = (word[pos] == word[next_pos]) & (pos != next_pos)
        has_rank = (self.pairs[found] == pairs) & one_word
        return np.where(has_rank, self.rank_of_pair[found], self.no_merge)


# Files larger than memory
# ------------------------

# Files are read in parts that can be processed independently, so that memory stays small and
# every CPU core can help. In the patterns of chapter 1, no pre-token contains a letter or digit
# followed by something that is neither, and nothing before that point depends on what comes
# after. So "one two|, three" may be cut before any space or punctuation that follows a word.
# For any other pattern only the end of a special token is safe. (?r) searches from the end.
SAFE_SPLIT = r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}])"


def last_safe_split(text: str, pattern: str, special_tokens: Iterable[str]) -> int:
    """The last position where `text` can be cut, whatever comes before and after it; else 0.

    >>> last_safe_split("one two, three four", PRETOKEN_PATTERN, [])
    14
    """
    specials = list(special_tokens)
    finder = SAFE_SPLIT
    if pattern not in (PRETOKEN_PATTERN, GPT4_PATTERN):
        finder = f"(?r)(?<={special_token_pattern(specials).pattern})"
    # Both ends of `text` may hold part of a special token, or of a character of four bytes. And
    # a special token that ends at the cut may begin one margin before it.
    margin = max([4, *(len(text_to_bytes(token)) for token in specials)])

    def crossed(p: int) -> bool:  # does a special token begin before p and end after it?
        return any(text.find(s, max(0, p - len(s) + 1), p + len(s) - 1) >= 0 for s in specials)

    start, end = 2 * margin, max(0, len(text) - margin)
    for match in regex.finditer(finder, text, pos=start, endpos=end):
        cut = match.start()
        # TRAP: special tokens can overlap. With <a> and a>b, "<a>b" is parsed as <a>, then b.
        # There the end of a>b isn't a safe place, since something crosses its start.
        lengths = [len(token) for token in specials if text.endswith(token, 0, cut)]
        if not crossed(cut) and not crossed(cut - max(lengths, default=0)):
            return cut
    return 0


def safe_pieces(
    chunks: Iterable[str], pattern: str, special_tokens: Iterable[str], size: int = 1 << 13
) -> Iterator[str]:
    """The text of `chunks` in pieces of about `size` characters, to be encoded one by one."""
    text, wanted = "", size
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            text += chunk[start : start + size]
            if len(text) >= wanted:
                cut = last_safe_split(text, pattern, special_tokens)
                if cut:
                    yield text[:cut]
                text = text[cut:]
                wanted = max(size, 2 * len(text))  # doubling keeps the total search time linear
    yield text


class FileSpan(typing.NamedTuple):
    """A part of a text file, in bytes, that can be processed independently."""

    path: str
    start: int
    end: int

    def read(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return bytes_to_text(file.read(self.end - self.start))


def split_file(
    whole: FileSpan, pattern: str, special_tokens: Sequence[str], size: int = CHUNK
) -> Iterator[FileSpan]:
    """`whole` in spans of about `size` bytes; longer where no safe split point exists.

    Only a window before each border is read. It may begin inside a character, with
    continuation bytes (0x80 to 0xBF) that belong to what comes before.
    """
    window, start, border = 1 << 16, whole.start, whole.start + size
    with open(whole.path, "rb") as file:
        while border < whole.end:
            low = max(start, border - window)
            file.seek(low)
            data = file.read(border - low)
            text = bytes_to_text(data.lstrip(bytes(range(0x80, 0xC0))))
            if cut := last_safe_split(text, pattern, special_tokens):
                end = border - len(text_to_bytes(text[cut:]))
                yield FileSpan(whole.path, start, end)
                start, border = end, end + size
            else:
                border += window // 2
    yield FileSpan(whole.path, start, whole.end)


def input_files(paths: str | Path | Sequence[str | Path]) -> list[FileSpan]:
    """The text files to read, each as one span.

    Directories are searched recursively, without hidden files and directories (such as .git)
    and without binary files.
    """
    files, given = [], [paths] if isinstance(paths, (str, Path)) else list(paths)
    for path in map(Path, given):
        found = [path]
        if path.is_dir():
            everything = sorted(p for p in path.rglob("*") if p.is_file())
            visible = [p for p in everything
                       if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            found = [p for p in visible if not is_binary(p)]
            if len(found) < len(everything):
                log(f"{path}: {len(found)} text files; skipped "
                    f"{len(everything) - len(visible)} hidden and "
                    f"{len(visible) - len(found)} binary ones")
        elif Path(f"{path}.json").is_file() and is_binary(path):
            raise UserError(f"{path} is a token file, not text")
        files += [FileSpan(str(p), 0, p.stat().st_size) for p in found]
    if not sum(file.end for file in files):
        raise UserError(f"no text to read in {', '.join(map(str, given))}")
    return files


def is_binary(path: Path) -> bool:
    """Whether there is a NUL byte in the first 8,000: the test that git uses."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8000)


# Many cores, and progress
# ------------------------


def available_cores() -> int:
    """The number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bounded_map(
    executor: Executor, function: Callable, tasks: Iterable, limit: int
) -> Iterator[Any]:
    """Yields `function(task)` in order, with at most `limit` tasks running or waiting."""
    pending: deque[Future] = deque()
    for task in tasks:
        pending.append(executor.submit(function, task))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


worker_function: Callable  # in a worker process, what to call for every task


def start_worker(function: Callable) -> None:
    """What a worker process does first. It gets the function once, with all that it needs."""
    global worker_function
    worker_function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    parent = multiprocessing.parent_process()
    assert parent

    def exit_with_parent() -> None:  # it would otherwise wait forever if the parent is killed
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def call_worker_function(task: Any) -> Any:
    """What a worker process does for every task."""
    return worker_function(task)


def map_on_cores(
    function: Callable, spans: Sequence[FileSpan], num_workers: int | None
) -> Iterator[Any]:
    """Yields `function(span)` for each span, in order, computed in several processes.

    None means one process per core, or no extra process for less than 8 MB, which would be
    done before another process is ready.
    """
    if num_workers is None:
        large = sum(span.end - span.start for span in spans) >= 8 * CHUNK
        num_workers = available_cores() if large else 1
    if num_workers < 1:
        raise UserError(f"num_workers must be at least 1, not {num_workers}")
    num_workers = min(num_workers, len(spans))
    if num_workers == 1:
        yield from map(function, spans)
        return
    # WHY fork: the new process starts at once and shares our memory. TRAP: forking is unsafe on
    # macOS, and after PyTorch has started threads. Then "spawn" imports this file again.
    fork = sys.platform == "linux" and "torch" not in sys.modules
    context = multiprocessing.get_context("fork" if fork else "spawn")
    try:
        with ProcessPoolExecutor(num_workers, context, start_worker, (function,)) as pool:
            yield from bounded_map(pool, call_worker_function, spans, 2 * num_workers)
    except BrokenExecutor:
        raise UserError("a worker process died: is there enough memory?") from None


def count_span(
    whole: FileSpan, pattern: str, special_tokens: Sequence[str]
) -> dict[bytes, int]:
    """How often each pre-token occurs in a part of a file."""
    special_pattern = special_token_pattern(special_tokens)
    table, counts = WordTable(), np.zeros(0, np.int64)
    seen: list[bytes] = []
    for span in split_file(whole, pattern, special_tokens):
        words = find_pretokens(span.read(), pattern, special_pattern)
        numbers, new = table.lookup(words)
        seen += words.cut(new)  # seen[n] is the word with number n
        numbers = np.delete(numbers, words.special_at)
        counts = np.append(counts, np.zeros(len(new), np.int64))
        counts += np.bincount(numbers, minlength=len(counts))
    totals: Counter[bytes] = Counter()
    for word, count in zip(seen, counts.tolist()):
        totals[word] += count
    return {word: count for word, count in totals.items() if count}


def count_files(
    paths: str | Path | Sequence[str | Path],
    special_tokens: Sequence[str],
    num_workers: int | None = None,
    pattern: str = PRETOKEN_PATTERN,
) -> Counter[bytes]:
    """`count_pretokens` of text files of any size."""
    files, counts = input_files(paths), Counter[bytes]()
    total, done = sum(file.end for file in files), 0.0
    # Use few, large tasks, since most words are in the result of every task.
    size = min(max(total // (num_workers or available_cores()), 4 * CHUNK), 32 * CHUNK)
    spans = [s for file in files for s in split_file(file, pattern, special_tokens, size)]
    count = functools.partial(count_span, pattern=pattern, special_tokens=special_tokens)
    progress = Progress("counting", total / 1e6, "MB")
    for span, result in zip(spans, map_on_cores(count, spans, num_workers)):
        for word, n in result.items():
            counts[word] += n
        progress.update(done := done + (span.end - span.start) / 1e6)
    progress.close()
    return counts


def log(text: str) -> None:
    """Tell the user something, on standard error: standard output is for results."""
    if Progress.enabled and is_main_process():
        print_error(text + "\n")


def print_error(text: str) -> None:
    """Write to standard error, or nowhere if that fails: a lost log must not end a run."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:  # a closed pipe or terminal, a full disk
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour.

    >>> format_duration(59.7), format_duration(3725)
    ('1:00', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class Progress:
    """One line on the terminal: fraction done, rate, time left. Silent if not a terminal."""

    enabled = True  # --quiet sets it to False

    def __init__(self, label: str, total: float, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.shown = self.enabled and sys.stderr.isatty()
        self.start = self.last = time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if not self.shown or now - self.last < 0.1:
            return
        self.last, rate = now, done / max(now - self.start, 1e-9)
        left = format_duration((self.total - done) / rate if rate else 0.0)
        line = f"{self.label} {done / self.total:4.0%}  {rate:,.1f} {self.unit}/s{note}"
        print_error(f"\r{f'{line}  {left} left':<79}")

    def close(self) -> None:
        if self.shown:
            print_error("\r" + " " * 79 + "\r")


# Training on files and encoding files
# ------------------------------------


def train_bpe(
    input_path: str | Path | Sequence[str | Path],
    vocab_size: int,
    special_tokens: Sequence[str],
    num_workers: int | None = None,
    pattern: str = PRETOKEN_PATTERN,
) -> tuple[dict[int, bytes], list[Merge]]:
    """A vocabulary of at most `vocab_size` tokens, and its merges in the order learned.

    `input_path` is a text file, a directory, or a list of them. The vocabulary is smaller,
    with a message, if no pair is left to merge. The result does not depend on `num_workers`
    or on the order of the files. Raises UserError for a vocabulary too small for bytes and
    special tokens, a bad special token or pattern, and files without text.
    """
    check_special_tokens(special_tokens)
    check_pattern(pattern)
    num_fixed = 256 + len(special_tokens)
    if not num_fixed <= vocab_size < 1 << 31:
        raise UserError(f"vocab_size must be from {num_fixed} (256 bytes and "
                        f"{len(special_tokens)} special tokens) to 2^31 - 1, not {vocab_size}")
    counts = count_files(input_path, special_tokens, num_workers, pattern)
    merges = learn_merges(counts, vocab_size - num_fixed)
    if num_fixed + len(merges) < vocab_size:
        log(f"no pair is left after {len(merges)} merges: the vocabulary has "
            f"{num_fixed + len(merges)} tokens, not {vocab_size}")
    return build_vocab(merges, special_tokens), merges


def encode_span(span: FileSpan, tokenizer: Tokenizer) -> bytes:
    """The ids of a part of a file, as they are stored in a token file."""
    return tokenizer.fast.encode(span.read()).astype(tokenizer.dtype).tobytes()


def encode_file(
    tokenizer: Tokenizer,
    dataset_path: str | Path | Sequence[str | Path],
    out_path: str | Path,
    append_eot: bool = False,
    num_workers: int | None = None,
) -> int:
    """Encode text files into the token file `out_path`; returns the number of tokens.

    A token file is raw ids without a header, little-endian uint16, or uint32 if the vocabulary
    has more than 65,536 entries. Its metadata is written next to it, to `out_path`.json. With
    `append_eot`, each input file that does not end with the end-of-text token gets one.
    """
    files, specials = input_files(dataset_path), list(tokenizer.special_tokens)
    eot_id = tokenizer.eot_id
    if append_eot and eot_id is None:
        raise UserError(f"append_eot needs the special token {END_OF_TEXT} in the tokenizer")
    dtype = np.dtype(tokenizer.dtype)
    eot = np.array([eot_id], dtype).tobytes() if append_eot else b""
    spans = [s for file in files for s in split_file(file, tokenizer.pattern, specials)]
    encode = functools.partial(encode_span, tokenizer=tokenizer)
    results = map_on_cores(encode, spans, num_workers)
    progress = Progress("encoding", sum(file.end for file in files) / 1e6, "MB")
    ends, done, num_tokens = {(file.path, file.end) for file in files}, 0.0, 0
    text_bytes = sum(file.end for file in files)  # without end-of-text tokens
    with atomic_write(out_path) as out:
        for span, ids in zip(spans, results):
            out.write(ids)
            if eot_id is not None:
                num_eot = np.count_nonzero(np.frombuffer(ids, dtype) == eot_id)
                text_bytes -= int(num_eot) * len(tokenizer.vocab[eot_id])
            if (span.path, span.end) in ends and not ids.endswith(eot):
                out.write(eot)
            done += (span.end - span.start) / 1e6
            num_tokens = out.tell() // dtype.itemsize
            progress.update(done, f"  {num_tokens / 1e6:,.1f} M tokens")
        progress.close()
        # TRAP: the metadata must be in place before the token file, which is renamed at the
        # end of this block. If we are killed in between, an old token file of another length
        # no longer fits the metadata, and `train` says so.
        write_json(f"{out_path}.json", {
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "num_tokens": num_tokens,
            "end_of_text_id": eot_id,
            "tokenizer_sha256": tokenizer.fingerprint(),
            "floor_nats_per_byte": entropy_floor(files, text_bytes),
        })
    return num_tokens


def entropy_floor(files: Sequence[FileSpan], text_bytes: int) -> float | None:
    """The entropy floor stated in a .json file beside each text file, if all have one.

    The bundled stories come from data/make_stories.py, which draws every word with a known
    probability p and adds up -log p. On new stories no model can be expected to have a lower
    loss than that. The unit is chapter 7's, nats, but per byte of text instead of per token.
    """
    nats = 0.0
    for file in files:
        description = Path(file.path + ".json")
        stated = read_json(description, "corpus description") if description.is_file() else {}
        if not isinstance(stated, dict) or "nats_per_byte" not in stated:
            return None
        nats += stated["nats_per_byte"] * file.end
    return nats / max(text_bytes, 1)


# Checks, tokenizer.json, and files that are never half-written
# -------------------------------------------------------------


def check_special_tokens(special_tokens: Sequence[str]) -> None:
    """Raise UserError for a special token that is empty, repeated, or a single byte."""
    for token, count in Counter(special_tokens).items():
        if not token:
            raise UserError("a special token is empty: remove it from the list")
        if count > 1:
            raise UserError(f"special token {token!r} is listed {count} times: list it once")
        if len(text_to_bytes(token)) == 1:
            raise UserError(f"special token {token!r} is one byte, and bytes have ids already")


def check_pattern(pattern: str) -> None:
    """Raise UserError for a pattern that does not compile or matches the empty string."""
    try:
        matches_empty = regex.compile(pattern).match("") is not None
    except regex.error as error:
        raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if matches_empty:
        raise UserError(f"pattern {pattern!r} matches the empty string: use + instead of *")


def check_merges(merges: Sequence[Merge], token_to_id: dict[bytes, int]) -> None:
    """Raise UserError unless every merge joins two earlier tokens and all have ids."""
    known = {bytes([byte]) for byte in range(256)} & token_to_id.keys()
    for left, right in merges:
        if left not in known or right not in known:
            raise UserError(f"merge {left!r} + {right!r} comes before its parts are made")
        known.add(left + right)
    if missing := known - token_to_id.keys():
        raise UserError(f"the vocabulary lacks {min(missing)!r}, which is a merge")
    if len(set(merges)) < len(merges):
        raise UserError("a merge is listed twice")


# The tokenizer.json format. JSON can't hold arbitrary bytes, so GPT-2 writes each byte as a
# visible character.


def bytes_to_unicode() -> dict[int, str]:
    """The character that stands for each byte in a tokenizer.json (GPT-2's encoder.py).

    Printable Latin-1 bytes stand for themselves. The others, such as the space and control
    characters, take U+0100, U+0101, ... in order. A space becomes "Ġ".
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_UNICODE = bytes_to_unicode()
UNICODE_TO_BYTE = {character: byte for byte, character in BYTE_TO_UNICODE.items()}


def token_to_unicode(token: bytes) -> str:
    """A token as it is spelled in a tokenizer.json.

    >>> token_to_unicode(b" the")
    'Ġthe'
    """
    return token.decode("latin-1").translate(BYTE_TO_UNICODE)


def unicode_to_token(name: str) -> bytes:
    """The inverse of `token_to_unicode`."""
    try:
        return bytes([UNICODE_TO_BYTE[character] for character in name])
    except KeyError:
        message = f"token {name!r} has characters outside GPT-2's byte alphabet"
        raise UserError(message) from None


def tokenizer_to_json(tokenizer: Tokenizer) -> dict:
    """The content of the tokenizer.json for `tokenizer`."""
    names = {i: token_to_unicode(token) for i, token in tokenizer.vocab.items()}
    specials = {i: token for token, i in sorted(tokenizer.special_tokens.items())}
    names |= specials
    if repeated := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UserError(f"special token {repeated[0]!r} collides with another token")
    is_gpt2 = tokenizer.pattern == PRETOKEN_PATTERN
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer = {**byte_level, "use_regex": is_gpt2}
    if not is_gpt2:
        split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern},
                 "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, pre_tokenizer]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": specials[i], **flags, "special": True}
                         for i in sorted(specials)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": {names[i]: i for i in sorted(names)},
            "merges": [list(map(token_to_unicode, merge)) for merge in tokenizer.merges],
        },
    }


def tokenizer_from_json(content: Any, path: str | Path) -> Tokenizer:
    """The tokenizer described by the content of the tokenizer.json at `path`."""
    with file_errors(path, "tokenizer.json"):
        check_supported(content)
        specials = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        vocab = {i: text_to_bytes(name) if name in specials else unicode_to_token(name)
                 for name, i in content["model"]["vocab"].items()}
        vocab |= {i: text_to_bytes(token) for token, i in specials.items()}
        if not all(type(i) is int and 0 <= i < 1 << 31 for i in vocab):
            raise UserError("an id is not an integer from 0 to 2^31 - 1")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge
                 for merge in content["model"]["merges"]]
        merges = [(unicode_to_token(left), unicode_to_token(right)) for left, right in pairs]
        return Tokenizer(vocab, merges, list(specials), pattern_from_json(content),
                         bool(content["model"].get("ignore_merges")))


def pattern_from_json(content: dict) -> str:
    """The pattern of a tokenizer.json. Raises UserError if it isn't one regular expression."""
    whole = content.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers") or [whole]
    step_types = [step.get("type") for step in steps]
    use_regex = steps[-1].get("use_regex", True)
    if steps[-1].get("add_prefix_space"):
        raise UserError("its pre-tokenizer adds a space before the text")
    if step_types == ["ByteLevel"] and use_regex:
        return PRETOKEN_PATTERN
    if step_types == ["Split", "ByteLevel"] and not use_regex:
        pieces_stay = steps[0]["behavior"] == "Isolated" and not steps[0].get("invert")
        if pieces_stay and "Regex" in steps[0]["pattern"]:
            return steps[0]["pattern"]["Regex"]
    if step_types == ["Digits", "ByteLevel"] and use_regex:
        # Digits are split off first, one by one or as a run; then GPT-2's pattern sees each
        # piece alone, so whitespace before a digit behaves like whitespace at the end.
        digits = r"\p{N}" if steps[0].get("individual_digits") else r"\p{N}+"
        return PRETOKEN_PATTERN.replace(r" ?\p{N}+", digits).replace(
            r"\s+(?!\S)", r"\s+(?![^\s\p{N}])")
    raise UserError(f"its pre-tokenizer is {whole}, not ByteLevel, alone or after one Split on "
                    "a regular expression or Digits")


def check_supported(content: Any) -> None:
    """Raise UserError if a tokenizer.json does something that `Tokenizer` does not."""
    model, after = content["model"], content.get("post_processor") or {}
    after_types = {step.get("type", "ByteLevel") for step in after.get("processors", [after])}
    unsupported = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    reasons = [
        (model.get("type", "BPE") != "BPE", f"its model is {model.get('type')}, not BPE"),
        *((model.get(key), f"its {key} is {model.get(key)!r}") for key in unsupported),
        (model.get("byte_fallback"), "it is a SentencePiece conversion (byte_fallback)"),
        (content.get("normalizer"), f"it normalizes text: {content.get('normalizer')}"),
        (after_types - {"ByteLevel", "TemplateProcessing"},
         f"its post-processor is {after_types}"),
        *((entry.get("single_word") or entry.get("lstrip") or entry.get("rstrip"),
           f"added token {entry['content']!r} also matches spaces around it")
          for entry in content["added_tokens"]),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise UserError(reason)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file that appears at `path` complete, or not at all.

    The bytes go to a temporary file in the same directory, which is renamed at the end:
    renaming is atomic on POSIX. If the block raises, whatever was at `path` stays. Missing
    directories are created. A symbolic link is followed: its target is replaced. Raises
    UserError if `path` is a directory, a device or a pipe.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
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


def json_bytes(content: Any) -> bytes:
    """`content` as indented JSON."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json_bytes(content))


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


# The tokenizer's commands
# ------------------------
# A command is a function whose parameters are dataclasses. Each dataclass becomes a
# group of command-line flags with its docstring as the heading, and each field one flag.


def flag(
    default: Any, help: str, at_least: float = -math.inf, at_most: float = math.inf
) -> Any:
    """A dataclass field that is also a command-line flag. `...` as default means required."""
    default_value = {} if default is ... else {"default": default}
    metadata = {"help": help, "range": (at_least, at_most)}
    return dataclasses.field(**default_value, metadata=metadata)


class Config:
    """Base class of the dataclasses that are filled from flags. Checks ranges."""

    given: dict[str, Any] | None = None  # the user's flags; None: not made from flags

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, (least, most) = getattr(self, field.name), field.metadata["range"]
            kinds: Any = {"int": int, "float": (int, float)}.get(str(field.type), object)
            if not isinstance(value, kinds) and value is not field.default:
                raise UserError(f"{field.name} is {value!r}, not a number of type {field.type}")
            if isinstance(value, (int, float)) and not (
                abs(value) < (2**63 if isinstance(value, int) else math.inf)
                and least <= value <= most
            ):
                need = f"at least {least}" if math.isinf(most) else f"from {least} to {most}"
                raise UserError(f"--{field.name} must be {need}, not {value}")


@dataclasses.dataclass(kw_only=True)
class BPETrainConfig(Config):
    """Vocabulary"""

    file_path: list[Path] = flag(..., "text files, or directories of them")
    vocab_size: int = flag(50304, "size of the vocabulary, bytes and special tokens included")
    special_tokens_path: Path | None = flag(None, "file of special tokens, one per line")
    pattern: str = flag("gpt2", "how to split text: gpt2, gpt4, or a regular expression")
    tokenizer_out_path: Path = flag(..., "where to write the tokenizer.json")
    num_workers: int | None = flag(None, "processes (default: one per core)", 1)


@dataclasses.dataclass(kw_only=True)
class BPEEncodeConfig(Config):
    """Encoding"""

    dataset_path: list[Path] = flag(..., "text files, or directories of them")
    tokenizer_path: Path = flag(..., "a tokenizer.json")
    out_path: Path = flag(..., "where to write the token file and, next to it, its metadata")
    append_eot: bool = flag(False, f"end every input file with {END_OF_TEXT}")
    num_workers: int | None = flag(None, "processes (default: one per core)", 1)


def read_special_tokens(path: Path | None) -> list[str]:
    """The special tokens in a file, one per line."""
    if path is None:
        return []
    with file_errors(path, "list of special tokens"):
        lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        tokens = lines.removesuffix("\n").split("\n") if lines else []
        check_special_tokens(tokens)
    return tokens


def bpe_train(config: BPETrainConfig) -> None:
    """Learn a byte-level BPE vocabulary from text."""
    start, specials = time.monotonic(), read_special_tokens(config.special_tokens_path)
    named = {"gpt2": PRETOKEN_PATTERN, "gpt4": GPT4_PATTERN}
    pattern = named.get(config.pattern, config.pattern)
    with atomic_write(config.tokenizer_out_path) as out:  # first: a bad path fails early
        vocab, merges = train_bpe(config.file_path, config.vocab_size, specials,
                                  config.num_workers, pattern)
        out.write(json_bytes(tokenizer_to_json(Tokenizer(vocab, merges, specials, pattern))))
    longest = max(map(b"".join, merges), key=len, default=b"").decode(errors="replace")
    log(f"{config.tokenizer_out_path}: {len(vocab)} entries, {len(merges)} merges, "
        f"longest {longest!r}, {time.monotonic() - start:.1f} s")


def bpe_encode(config: BPEEncodeConfig) -> None:
    """Turn text into a file of token ids."""
    start, files = time.monotonic(), input_files(config.dataset_path)
    tokenizer = Tokenizer.load(config.tokenizer_path)
    tokens = encode_file(tokenizer, [file.path for file in files], config.out_path,
                         config.append_eot, config.num_workers)
    size = sum(file.end for file in files)
    seconds = time.monotonic() - start
    log(f"{config.out_path}: {tokens:,} tokens, {size / max(tokens, 1):.2f} bytes per token, "
        f"{seconds:.1f} s, {size / seconds / 1e6:.1f} MB/s")


COMMANDS: dict[str, Callable] = {"bpe-train": bpe_train, "bpe-encode": bpe_encode}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest what was meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def add_field(self, group: Any, field: dataclasses.Field, kind: Any) -> None:
        """Make one field of a dataclass, whose type is `kind`, a flag."""
        required = field.default is dataclasses.MISSING
        text = field.metadata["help"].replace("%", "%%")
        if required:
            text += " (required)"
        elif field.default not in (None, False, ""):
            text += f" (default: {field.default})"
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        metavar = {int: "N", Path: "PATH"}
        options: dict[str, Any] = {"type": kind, "metavar": metavar.get(kind, "X")}
        if kind is bool:
            options = {"action": "store_true"}
            group.add_argument("--no_" + field.name, dest=field.name, action="store_false",
                               help=argparse.SUPPRESS)
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is list:
            element = typing.get_args(kind)[0]
            options = {"action": "extend", "type": element, "nargs": "+",
                       "metavar": metavar.get(element, "X")}  # repeating the flag appends
        group.add_argument("--" + field.name, required=required, help=text, **options)

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The flags in `argv`. Hyphens count as underscores; mistyped names get a hint."""
        known = [name for action in self._actions for name in action.option_strings]
        words = []
        for word in argv:
            if match := re.fullmatch(r"--(\w[\w-]*)(=.*)?", word, re.DOTALL):  # else a value
                name = "--" + match[1].replace("-", "_")
                if name not in known:
                    self.error(f"unknown flag {name}{did_you_mean(name, known)}")
                word = name + (match[2] or "")
            words.append(word)
        return vars(self.parse_args(words))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for a mistyped name.

    >>> did_you_mean("trian", ["train", "eval"])
    ', did you mean train?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def parse_flags(
    command_name: str, command: Callable, argv: list[str]
) -> tuple[list[Config], bool]:
    """The dataclasses that `command` takes, filled from `argv`; and whether --quiet was given.

    >>> @dataclasses.dataclass
    ... class Greeting(Config):
    ...     name: str = flag("you", "whom to greet")
    >>> def greet(greeting: Greeting): "Say hello."
    >>> parse_flags("greet", greet, ["--name", "Ann"])
    ([Greeting(name='Ann')], False)
    """
    parameters = typing.get_type_hints(command)
    config_types = [kind for name, kind in parameters.items() if name != "return"]
    parser = Parser(f"scratchformer {command_name}", "%(prog)s [flags]",
                    inspect.getdoc(command), allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for config_type in config_types:
        group = parser.add_argument_group(config_type.__doc__)
        types_of_fields = typing.get_type_hints(config_type)
        for field in dataclasses.fields(config_type):
            parser.add_field(group, field, types_of_fields[field.name])
    parser.add_argument("--quiet", action="store_true", help="print errors and results only")
    given = parser.parse(argv)  # the flags in argv; dataclasses know the defaults of the rest
    configs = []
    for config_type in config_types:
        names = {field.name for field in dataclasses.fields(config_type)}
        values = {name: value for name, value in given.items() if name in names}
        configs.append(config_type(**values))
        configs[-1].given = values
    return configs, "quiet" in given


def error_message(error: Exception) -> str:
    """What to tell the user about an error, in one line.

    >>> error_message(OSError(2, "No such file or directory", "text.txt"))
    'text.txt: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or error}"
    return str(error).replace("\n", " ")


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv`, without the program's name. Returns the exit status.

    0 means success, 2 a user error, and 128 + n that signal n has stopped the command.
    """
    argv = sys.argv[1:] if argv is None else argv
    Progress.enabled = True
    for name in ("stdin", "stdout", "stderr"):
        stream: Any = getattr(sys, name) or open(os.devnull, "r+")  # None: it was closed
        if hasattr(stream, "reconfigure"):  # any bytes pass through
            errors = "backslashreplace" if name == "stderr" else "surrogateescape"
            stream.reconfigure(encoding="utf-8", errors=errors)
        setattr(sys, name, stream)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if argv[0] == "--version":
        print(f"scratchformer {__version__}")
        return 0
    name = argv[0]
    try:
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS) or ": choose one of " + ", ".join(COMMANDS)
            raise UserError(f"unknown command {name!r}{hint}")
        if name != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"{name} is one process: start it without torchrun")
        configs, quiet = parse_flags(name, COMMANDS[name], argv[1:])
        Progress.enabled = not quiet
        return COMMANDS[name](*configs) or 0
    except BrokenPipeError:  # whoever reads our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        message = error_message(error)
    except KeyboardInterrupt:
        print_error("interrupted\n")
        return 130
    if is_main_process():  # under torchrun, only rank 0 prints
        print_error(f"scratchformer: error: {message}\n")
    return 2


# Exercises
# 1. Set WordTable.BITS to 4, so that words keep evicting each other. `bpe-encode` gets slower,
#    and its result stays the same. Why?
# 2. Let `tie_break_key` return `tuple(token)`: the smallest pair now wins a tie. On which of
#    the chapter's examples does `learn_merges` now differ from `learn_merges_naive`?
# 3. Train on the bundled stories with --vocab_size 300, 600, 1200 and 2400, encode, and compare
#    the bytes per token that bpe-encode prints: 1.5, 2.6, 3.7 and 4.2. Beyond 1,814 entries
#    nothing changes, because every word of these stories is one token.

# The tokenizer's commands (chapter 4) run here, and so does --help: they don't need PyTorch,
# which takes seconds to import.
if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] in (*COMMANDS, "-h", "--help", "help", "--version"):
        sys.exit(main())


# ========================================================================================
# PART TWO: THE MODEL
#
# A language model reads token ids and gives a probability to every token that could come
# next. Chapters 5 to 8 cut batches out of a corpus, build the model, train it, and let it
# write. All of it is plain PyTorch on a CPU; speed and other devices are Part Three.
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 5. Data
#
# A corpus on disk is one long sequence of token ids. We cut windows of T + 1 tokens out of
# it. One window is T training examples: after its first token comes its second, after its
# first two comes its third, and so on. So the inputs are a window without its last token,
# the targets are the same window one token later, and B windows are a batch.
#
# A *step* of training looks at one batch, and an *epoch* is one pass over the corpus: every
# window once, in random order. The order depends only on the seed. So an interrupted run has no
# random state to save, and each step looks at the same windows however many devices share the
# work (chapter 10).
# ----------------------------------------------------------------------------------------

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

# A token file (chapter 4) is nothing but ids, two bytes each unless the vocabulary is very
# large. numpy (chapter 4 has imported it as np) makes it an array that stays on disk until a
# part of it is read, so a corpus may be larger than memory. With a file that the demo makes:
#
#     tokens = np.memmap("out/demo/train.bin", "<u2", mode="r")  # <u2: two bytes, unsigned
#
# Functions below also take a `TokenDataset` (chapter 12), which slices like such an array, and
# checks what it reads.


def cut_windows(
    tokens: np.ndarray | TokenDataset, starts: Iterable[int], context_length: int
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


def windows_per_epoch(num_tokens: int, context_length: int) -> int:
    """How many windows an epoch has: one fewer than fit, unless only one fits.

    The space that this leaves lets `shuffle_windows` begin at a random offset.
    """
    return max(1, (num_tokens - 1) // context_length - 1)


@functools.lru_cache(2)
def shuffle_windows(seed: int, epoch: int, num_tokens: int, context_length: int) -> np.ndarray:
    """Where the windows of one epoch begin, in random order; int64 [windows per epoch].

    The windows lie end to end: the last target of one is the first input of the next. The first
    begins at a random offset, so most epochs cut the text at different points. Here are the
    inputs for 29 tokens and T = 5. The offset is 8 in epoch 0 and 2 in epoch 1:

        epoch 0    ........[ 8-12][13-17][18-22][23-27].
        epoch 1    ..[ 2- 6][ 7-11][12-16][17-21].......

    (Four windows take 20 inputs and one more token for the last target, 21 of 29 tokens. So the
    offset can be 0 to 8. Up to 2 * T tokens of the text are left out of an epoch.)

    >>> shuffle_windows(1, 0, 29, 5).tolist(), shuffle_windows(1, 1, 29, 5).tolist()
    ([18, 13, 8, 23], [12, 17, 7, 2])
    """
    num_windows = windows_per_epoch(num_tokens, context_length)
    # Philox makes random bits from a key and a counter, like a hash function: the same on every
    # machine. (Salmon et al. 2011) Sorting random numbers gives a random order.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_windows + 1)
    offset = int(bits[0]) % (num_tokens - num_windows * context_length)
    return offset + context_length * bits[1:].argsort()


def get_batch(
    tokens: np.ndarray | TokenDataset, context_length: int, seed: int, indices: range
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [B, T], of the windows with these indices.

    Windows are numbered from 0 in the order in which a run sees them, across epochs. With B
    windows per batch, step s sees s * B, ..., s * B + B - 1.

    A window may start in the middle of a document and run into the next one. From the
    end-of-text token between them, the model can tell that they are unrelated.
    """
    N, T = len(tokens), context_length
    starts = []
    for i in indices:
        epoch, index = divmod(i, windows_per_epoch(N, T))
        starts.append(shuffle_windows(seed, epoch, N, T)[index])
    return cut_windows(tokens, starts, T)


# Exercises
# 1. With `tokens` from the beginning of this chapter, take `get_batch(tokens, 64, 1, range(2))`
#    and Tokenizer.load("out/demo/tokenizer.json"). Print `tokenizer.decode(inputs[0].tolist())`
#    and the same for targets: the same text, one token apart.
# 2. Sample with replacement, as many projects do: let every window start at a random place,
#    `np.random.default_rng(1).integers(len(tokens) - T, size=B)`. In one epoch, what fraction
#    of the tokens does the model then never see? (Close to 1 / e.)


# ----------------------------------------------------------------------------------------
# 6. The Transformer
#
# Which function maps T tokens to a prediction of each next token? Look up a vector of D numbers
# for every token. Then pass it through a stack of identical blocks, each of which adds two
# updates to it: attention mixes in what earlier tokens have to say; an MLP (multilayer
# perceptron: matrices and something nonlinear) works on each position separately. At the end, a
# matrix turns each vector into V scores, the logits, one per possible token.
# (Vaswani et al. 2017, arXiv 1706.03762, with the changes of Llama: Touvron et al. 2023,
# arXiv 2302.13971, section 2.2)
#
# Shapes: B batch, T time, D model width, H heads (G for keys and values), K head width, F MLP
# width, V vocabulary.
# ----------------------------------------------------------------------------------------

# The parts of PyTorch that we use: a Tensor is an array of numbers. An nn.Parameter is a tensor
# to be learned. An nn.Module is a function with parameters, its own and those of the modules in
# it, which have names such as blocks.0.attention.qkv.weight; calling a module runs `forward`.
# nn.Embedding(V, D) is a table with one row of D numbers per token. nn.Linear(a, b) multiplies
# by a matrix (a *matmul*): rows of `a` numbers become rows of `b`. (It stores the matrix as
# [b, a] and computes x @ W.T; formulas here just say x @ W. bias=False: it adds nothing.)
#
# Functions named ..._reference are for reading; the tests check PyTorch's faster equivalents
# against them.


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension. The shape stays the same.

    The entries of every vector come out with a mean square of 1 (before `weight` scales them),
    so no layer has to cope with inputs that are much larger or smaller than usual. `eps`, tiny,
    avoids a division by 0.
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
        # TRAP: float32 inside. In chapter 9 x may be a tensor of 16-bit numbers, whose squares
        # would overflow or be rounded to two digits.
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (x_float * scale * self.weight).type_as(x)


# Attention
# ---------
# Attention is a soft dictionary look-up. Every position makes three vectors: a *query*, what
# it is looking for; a *key*, what it can be found by; and a *value*, what it has to say. How
# well does a key match a query? Take the dot product. Vectors that point the same way have a
# large one, (1, 2) . (2, 4) = 10; perpendicular vectors have (1, 2) . (-2, 1) = 0;
# opposite ones a negative one. So for vectors of similar length the dot product measures
# similarity. Training makes a query and a key that belong together point the same way.
#
# Softmax turns the scores into fractions that add up to 1, and each position takes the average
# of all values weighted by them: mostly of those whose keys match its query.


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last dimension: positive numbers that add up to 1.

    Subtracting the maximum first doesn't change the result and keeps exp from overflowing.

    >>> softmax(torch.tensor([1.0, 2.0, 3.0]).log())  # exp undoes log: 1, 2, 3 over 6
    tensor([0.1667, 0.3333, 0.5000])
    """
    exp = (x - x.amax(-1, keepdim=True)).exp()
    return exp / exp.sum(-1, keepdim=True)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(q @ k.T / sqrt(K)) @ v for q, k, v [..., T, K].

    Positions where `attn_mask` [T, T] is False are masked out. The causal mask is the lower
    triangle: position t sees positions 0 to t. That lets us train on all positions of a
    window at once, since none of them can see the token it should predict.
    WHY sqrt(K): the dot product of two vectors of K random entries of about 1 or -1 is a sum of
    K terms of random sign, typically about sqrt(K). With scores that large, the softmax would
    give all weight to one position, and small changes would change nothing: the model would
    barely learn (chapter 7: the gradient would be nearly 0).
    Source: Vaswani et al. 2017, equation 1.

    Worked example: scores ln 1, ln 2 and ln 3 give weights 1 : 2 : 3. Row 0 sees only 6.
    Row 1 is (1 * 6 + 2 * 3) / 3 = 4. Row 2 is (1 * 6 + 2 * 3 + 3 * 0) / 6 = 2.

    >>> causal_mask = torch.ones(3, 3).tril().bool()
    >>> causal_mask
    tensor([[ True, False, False],
            [ True,  True, False],
            [ True,  True,  True]])
    >>> q, k = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]]).log()
    >>> v = torch.tensor([[6.0], [3.0], [0.0]])
    >>> attention_reference(q, k, v, causal_mask).round(decimals=3)
    tensor([[6.],
            [4.],
            [2.]])
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, T)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)  # softmax makes these 0
    return softmax(scores) @ v  # (..., T, K)


# Rotary position embedding (RoPE)
# --------------------------------
# Dot products don't know where in the text a key is: a query gives it the same score whether it
# is one word back or a page back. RoPE fixes that by rotating queries and keys. Treat a vector
# of K numbers as K/2 points in the plane, and rotate each by an angle proportional to the
# position. The dot product of two rotated points depends on the difference of their angles. So
# a score now depends on how far apart two tokens are, and not on where in the text they are.


def make_rope_cache(
    positions: Tensor, head_dim: int, theta: float, scaling: Sequence[float] | None = None
) -> Tensor:
    """Cosine and sine of all angles, float32 [2, T, K/2] for positions [T].

    (Positions may have any shape: [B, T] gives [2, B, T, K/2].)

    Pair i rotates by the angle position * theta^(-2i / K), where theta is a constant, usually
    10,000: the first pairs rotate fast, the last ones slowly, like the hands of a clock. Fast
    pairs distinguish nearby positions, slow ones distant ones.
    TRAP: float32. With the 16-bit numbers of chapter 9, position 257 may be rounded to 256.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = theta**-exponents  # (K/2,)
    if scaling:  # Llama 3.1's, see chapter 13
        frequencies = llama3_rope_scaling(frequencies, *scaling)
    angles = positions.float()[..., None] * frequencies  # (..., K/2)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, rope_cache: Tensor) -> Tensor:
    """Rotate each pair (a, b) = (x[2i], x[2i+1]) of x [..., K] counterclockwise.

    The pair becomes (a cos - b sin, b cos + a sin). The shape stays the same.
    Source: Su et al. 2021, RoFormer (arXiv 2104.09864), equation 34.
    """
    cos, sin = rope_cache
    a, b = x[..., 0::2], x[..., 1::2]  # (..., K/2) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


def apply_rope(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """x [..., T, K] with its pairs rotated by positions [T]; [B, T] if each row has its own.

    For experiments; the model computes rope_cache once and calls `apply_rotary` itself.

    For example, one pair at two positions: position 0 doesn't rotate, position 1 rotates by one
    radian, to (cos 1, sin 1).

    >>> apply_rope(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    if positions.dim() == 2 and x.dim() == 4:  # x is (B, H, T, K)
        positions = positions[:, None]  # (B, 1, T): the same for all heads
    return apply_rotary(x, make_rope_cache(positions, x.shape[-1], theta))


AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention_reference` with a causal mask, for all heads at once: [B, H, T, K].

    This calls PyTorch's function, which never stores T x T scores. k and v may have fewer heads
    than q, see below.
    """
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class Attention(nn.Module):
    """Causal multi-head self-attention: [B, T, D] -> [B, T, D].

    WHY heads: one softmax gives one weighted average. H attentions of width K = D / H cost as
    much as one of width D, and each can look for something different: the previous word, the
    subject of the sentence, the last name that was mentioned.
    Keys and values may have G < H heads, each shared by H / G query heads. WHY: generation
    keeps all keys and values of a text in memory (chapter 8). This makes them, and the
    matrices that compute them, H / G times smaller, at little cost in quality. (Ainslie et
    al. 2023, arXiv 2305.13245: grouped-query attention)
    """

    def __init__(self, config: ModelConfig):  # all sizes of a model: see "The model" below
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        # WHY one matrix for q, k and v: one large matmul is faster than three small ones.
        self.qkv = nn.Linear(config.d_model, qkv_width, bias=False)
        # Combines what the heads have found.
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, rope_cache: Tensor | None = None,
        attend: AttentionFunction = causal_attention,
    ) -> Tensor:
        """rope_cache [2, T, K/2] or [2, B, T, K/2]; None: no RoPE. Chapter 8 swaps `attend`."""
        B, T, D = x.shape
        H, G = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).view(B, T, H + 2 * G, D // H)
        q, k, v = heads.split([H, G, G], dim=2)  # (B, T, H, K), (B, T, G, K), (B, T, G, K)
        if rope_cache is not None:
            # All heads rotate by the same angles.
            rope_cache = rope_cache.unsqueeze(-2)  # (2, T, 1, K/2) or (2, B, T, 1, K/2)
            q, k = apply_rotary(q, rope_cache), apply_rotary(k, rope_cache)
        # Attention wants the heads in front: (B, H, T, K).
        attn_out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.output(attn_out.transpose(1, 2).reshape(B, T, D))


# The MLP and the block
# ---------------------


def silu(z: Tensor) -> Tensor:
    """z * sigmoid(z) = z / (1 + exp(-z)): near 0 for very negative z, near z for large z.

    >>> silu(torch.tensor([-10.0, 0.0, 1.0, 10.0]))
    tensor([-4.5398e-04,  0.0000e+00,  7.3106e-01,  9.9995e+00])
    """
    return z * torch.sigmoid(z)


class SwiGLU(nn.Module):
    """(silu(x @ W_gate) * (x @ W_up)) @ W_down: [B, T, D] -> [B, T, D].

    Attention moves information between positions; this works on each position separately. The
    gate scales each of F hidden numbers, some down to nearly nothing.
    WHY something nonlinear: without it, consecutive matrix products would collapse into one.
    WHY a gate: in Shazeer's experiments, MLPs with one beat those with plain nonlinearities.
    WHY F is about 8/3 D: three matrices of that size hold as many weights as the two of a
    classic MLP of width 4 D. (The demo takes 2 D, to be fast.)
    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)  # both matrices in one
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)  # (B, T, D); F.silu is `silu` in one operation


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream: [B, T, D] -> [B, T, D].

    The *residual stream* is x: from the first block to the last it's only ever added to, like
    a shared notebook. Each part reads a normalized copy and writes down its correction. WHY:
    what the model learns from, the gradient (chapter 7), flows back through additions
    unchanged, so that deep stacks of blocks can be trained at all (Xiong et al. 2020, arXiv
    2002.04745).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, x: Tensor, rope_cache: Tensor | None = None,
        attend: AttentionFunction = causal_attention,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope_cache, attend)
        return x + self.mlp(self.mlp_norm(x))


# The model
# ---------
# These numbers define the shape of a model; they're some of its *hyperparameters*, which are
# chosen rather than learned. Read them as a plain dataclass:
# flag(default, help, at_least, at_most) declares a field that is also a command-line flag,
# `Config` (chapter 4) checks the ranges, and the docstring is the heading in --help.


@dataclasses.dataclass
class ModelConfig(Config):
    """Model"""

    vocab_size: int = flag(0, "size of the vocabulary; 0: take it from the token file", 0)
    context_length: int = flag(512, "maximum sequence length, in tokens", 1, 2**22)
    num_layers: int = flag(8, "number of blocks", 1, 1000)
    d_model: int = flag(768, "width of the model: the length of each token's vector", 1)
    num_heads: int = flag(16, "attention heads", 1)
    d_ff: int = flag(2048, "width inside SwiGLU, about 8/3 of d_model", 1)
    rope_theta: float = flag(10000.0, "base of RoPE; larger means slower rotations", 1.0)
    norm_eps: float = flag(1e-5, "added to the mean square in RMSNorm", 0.0)
    num_kv_heads: int = flag(0, "key/value heads; 0: as many as num_heads", 0)
    tie_embeddings: bool = flag(False, "one matrix for the embedding and the output")
    rope_scaling: list[float] | None = flag(
        None, "RoPE scaling of Llama 3.1: factor, low and high frequency factor, "
        "original context")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        check_shape(self)  # chapter 14: an error if these numbers contradict each other

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


def initial_weight(name: str, like: Tensor, num_layers: int, seed: int) -> Tensor:
    """The initial values of parameter `name`, shaped `like`: 1 for norms, else random.

    Random numbers are normal with standard deviation 0.02, as in GPT-2.

    The two matrices of a block that write to the residual stream get 0.02 / sqrt(n), where n is
    the number of such writes, 2 * num_layers. Variances of independent numbers add, so the sum
    of all writes has the same size in models of any depth (Radford et al. 2019, section 2.3).

    The weights of lm_head (the matrix that makes the logits; not an attention head) are small
    as well, so logits are near 0: an untrained model gives all tokens similar probabilities.

    Each tensor has a random generator of its own, seeded by (seed, name). WHY: chapter 10 makes
    the same weights on any number of devices, one tensor at a time.
    """
    if like.dim() == 1:  # TRAP: a bias, if you add one, should start at 0
        return torch.ones(like.shape, device=like.device)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "big"))
    std = 0.02
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * num_layers)
    return torch.randn(like.shape, generator=generator, device=like.device).mul_(std)


class Transformer(nn.Module):
    """Tokens, int64 [B, T], to logits [B, T, V], for T up to context_length."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        if config.vocab_size < 1:
            raise UserError(f"vocab_size must be at least 1, not {config.vocab_size}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()
        # A buffer is a tensor that belongs to the model but isn't learned. With
        # persistent=False it isn't saved either. (The first line is for type checkers.)
        self.rope_cache: Tensor
        self.register_buffer("rope_cache", torch.empty(0), persistent=False)
        # Chapter 10 builds models on the "meta" device, without numbers, and fills them later.
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    def tie_weights(self) -> None:
        """With tie_embeddings, embedding and output are one matrix: V * D fewer weights.

        In small models that's a large part of all weights. (Press & Wolf 2017, arXiv
        1608.05859)
        """
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Reinitialize all weights."""
        for name, weight in self.named_parameters():
            weight.copy_(initial_weight(name, weight, self.config.num_layers, seed))
        self.init_rope()

    def init_rope(self) -> None:
        """Compute the rotations of all positions."""
        c, device = self.config, self.norm.weight.device
        positions = torch.arange(c.context_length, device=device)
        self.rope_cache = make_rope_cache(  # (2, T, K/2)
            positions, c.head_dim, c.rope_theta, c.rope_scaling)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """The residual stream after the last block, normalized: [B, T] -> [B, T, D]."""
        T, limit = tokens.shape[1], self.config.context_length
        if limit < T:
            raise UserError(f"{T} tokens are more than context_length {limit}")
        x = self.embedding(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, self.rope_cache[:, :T])  # (B, T, D)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.hidden_states(tokens))  # (B, T, V)


# Exercises
# 1. Make `apply_rotary` return x unchanged and train as at the end of chapter 7. The model
#    still learns, but ends at a clearly higher loss: only the causal mask gives a hint of the
#    order of earlier tokens.
# 2. How many weights does the demo's model have (1 block, D = 128, H = 4, F = 256, V = 1536),
#    with and without tie_embeddings, and with num_kv_heads = 1? Work it out, then count.


# ----------------------------------------------------------------------------------------
# 7. Training
#
# How does the model get good at predicting the next token? Measure how wrong it is (the
# loss), compute for every weight how the loss grows with it (the gradient), move all weights a
# little the opposite way, and repeat. The chapter ends with a complete training loop.
#
# The loss is cross-entropy, the optimizer (which decides how weights move) is AdamW, and the
# learning rate rises and falls over the run. (Loshchilov & Hutter 2019, arXiv 1711.05101:
# AdamW, algorithm 2)
# ----------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """How surprised the model is by the target token, on average: -log softmax(logits)[target].

    logits [..., V], targets int64 [...]; a scalar. Targets of -100 are ignored, as in
    F.cross_entropy (chapter 12 pads with them).

    If the model gave the target token probability p, the loss is -log p: 0 for certainty, 0.69
    for a coin flip, ln V for a model that knows nothing. The unit is the *nat* (0.69 nats are
    one bit). exp(loss) is the *perplexity*: a loss of 2.3 means a perplexity of 10, which is
    like guessing uniformly among 10 tokens.

    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # ln 4: a uniform guess
    tensor(1.3863)
    >>> logits, targets = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([1, 0])
    >>> -softmax(logits)[[0, 1], targets].log().mean()  # written out
    tensor(0.4100)
    >>> cross_entropy(logits, targets)
    tensor(0.4100)
    """
    # TRAP: float32. A sum of 50,000 exponentials in 16 bits (chapter 9) would be inexact.
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


# Gradient descent
# ----------------
# The gradient of a weight, `w.grad`, says how much the loss grows if that weight grows. To
# lower the loss, move against it: w -= lr * w.grad. The *learning rate* `lr` is how far to go.
#
# Where do gradients come from? While PyTorch computes the loss, it records every operation and
# keeps what it needs to differentiate it (the *activations*, most of the memory that training
# uses).
# `loss.backward()` then walks this record backwards and applies the chain rule at each
# operation. This is backpropagation: one pass gives the gradients of all weights, for about
# twice the work of computing the loss.


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
        if w.grad is not None:  # None: w is frozen (not trained), or doesn't affect the loss
            w -= lr * w.grad


# AdamW improves on this in three ways. It averages gradients over recent steps (`m`), since
# each batch alone gives a noisy one. It divides by the gradient's typical size, sqrt(v), where
# `v` is a running average of its square, so that weights with small gradients move as fast as
# the others. And it pulls every matrix towards 0 a little (weight decay), so that only weights
# which keep being useful stay large.


def adamw_reference(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor,
    step: int, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of AdamW, written out: the new weight, m and v. `step` counts from 1.

    m and v start at 0, and m_hat and v_hat correct for that: after one step m is 0.1 * grad,
    and dividing it by 1 - 0.9 gives grad. A weight whose gradient hardly changes moves by about
    lr per step, no matter how large the gradient is. Worked example: the first step is lr times
    the sign, whether the gradient is 5 or 0.05.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> adamw_reference(one, torch.tensor([5.0, 0.05]), zero, zero, 1, 0.1, (0.9, 0.95), 0.0)[0]
    tensor([0.9000, 0.9000])
    """
    m = betas[0] * m + (1 - betas[0]) * grad  # first moment: the mean of recent gradients
    v = betas[1] * v + (1 - betas[1]) * grad**2  # second moment: the mean of their squares
    m_hat = m / (1 - betas[0] ** step)
    v_hat = v / (1 - betas[1] ** step)
    weight = weight - lr * weight_decay * weight - lr * m_hat / (v_hat.sqrt() + eps)
    return weight, m, v


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig(Config):
    """Optimization"""

    max_steps: int = flag(5000, "optimizer steps", 1)
    lr: float = flag(1e-3, "peak learning rate", 0.0)
    min_lr: float = flag(None, "learning rate at the end (default: a tenth of --lr)", 0.0)
    warmup_steps: int = flag(
        None, "steps of linear warmup (default: 200, at most a tenth of all steps)", 0)
    weight_decay: float = flag(0.1, "how strongly matrices are pulled towards zero", 0.0)
    beta1: float = flag(0.9, "decay rate of AdamW's first moment", 0.0, 0.9999)
    beta2: float = flag(0.95, "decay rate of AdamW's second moment", 0.0, 0.99999)
    clip_grad: float = flag(1.0, "clip the gradient to this norm; 0: no clipping", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr is None:
            self.min_lr = self.lr / 10
        if self.warmup_steps is None:
            self.warmup_steps = min(200, self.max_steps // 10)
        check_schedule(self)  # chapter 14


def make_optimizer(
    parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool | None = None
) -> torch.optim.AdamW:
    """PyTorch's AdamW. It skips parameters without a gradient, such as frozen ones.

    Only matrices decay, the embedding among them. Norm weights start at 1, and pulling them
    towards 0 would shrink the whole input of a layer.
    `fused` updates all weights in one operation.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() == 2]
    others = [p for p in parameters if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused)


def learning_rate(
    step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int
) -> float:
    """The learning rate of `step` (from 0): linear warmup, then linear decay to min_lr.

    WHY warm up: AdamW divides by sqrt(v), and at first v is estimated from only a few
    gradients. WHY decay: large steps bounce between the walls of a valley; small ones at the
    end settle. (Bergsma et al. 2025, arXiv 2502.15938, recommend linear decay to 0. The demo
    nearly does that; the default ends at a tenth of the peak, a common choice.)

    >>> [round(learning_rate(step, 1.0, 0.1, 2, 6), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]

    Worked example: warmup gives 1/2 and 2/2; step 4 is halfway from 2 to 6, hence 0.55. (Step
    6, where min_lr is reached, is one past the last.)
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return max_lr + progress * (min_lr - max_lr)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor,
    lr: float, clip_grad: float = 1.0,
) -> Tensor:
    """One update of the weights. Returns the loss, a scalar tensor in nats per token.

    Clipping scales all gradients down if their norm, the square root of the sum of all their
    squares, is above `clip_grad`: one odd batch then can't undo many good steps (Pascanu et
    al. 2013, arXiv 1211.5063, algorithm 1).
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = cross_entropy(model(inputs), targets)
    loss.backward()  # fills p.grad for every parameter p
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)  # 0: no limit
    optimizer.step()
    optimizer.zero_grad()  # or the next backward() would add to these gradients
    return loss.detach()


# Validation
# ----------
# A model that is trained on the same text for a long time starts to memorize it: the loss on
# that text keeps falling while the loss on new text stalls or rises. This is *overfitting*. To
# notice it, keep some text out of training and measure the loss there, the validation loss.
# In the first epoch all text is new to the model, and both losses fall together.


@torch.no_grad()
def validation_loss(model: Transformer, tokens: np.ndarray | TokenDataset) -> float:
    """The mean loss over all full, non-overlapping windows of `tokens`."""
    model.eval()  # evaluation mode; matters for layers such as dropout, which we don't have
    T = model.config.context_length
    windows = [cut_windows(tokens, [i], T) for i in range(0, len(tokens) - T, T)]
    losses = [cross_entropy(model(inputs), targets) for inputs, targets in windows]
    model.train()
    return torch.stack(losses).mean().item()


def train_model(
    model: Transformer,
    train_tokens: np.ndarray | TokenDataset,
    valid_tokens: np.ndarray | TokenDataset,
    config: OptimizerConfig,
    batch_size: int,
    seed: int = 1,
    eval_interval: int = 100,
) -> list[float]:
    """Train `model` and return the loss of every step. This is all there is to it.

    A model that has seen "0 1 2 0 1 2 ..." often enough knows what comes next. It starts near
    ln 3 = 1.10, like guessing among three tokens, and ends near 0:

    >>> tokens = np.array([0, 1, 2] * 40)
    >>> model = Transformer(ModelConfig(
    ...     vocab_size=3, context_length=8, num_layers=1, d_model=16, num_heads=2, d_ff=32))
    >>> config = OptimizerConfig(max_steps=60, lr=0.01)
    >>> losses = train_model(model, tokens, tokens, config, batch_size=4, eval_interval=1000)
    >>> round(losses[0], 1), losses[-1] < 0.1
    (1.1, True)
    """
    optimizer = make_optimizer(model.parameters(), config)
    T, losses = model.config.context_length, []
    for step in range(config.max_steps):
        indices = range(step * batch_size, (step + 1) * batch_size)
        inputs, targets = get_batch(train_tokens, T, seed, indices)  # (B, T) each
        lr = learning_rate(
            step, config.lr, config.min_lr, config.warmup_steps, config.max_steps)
        loss = train_step(model, optimizer, inputs, targets, lr, config.clip_grad)
        losses.append(loss.item())
        if (step + 1) % eval_interval == 0:
            valid = validation_loss(model, valid_tokens)
            print(f"step {step + 1}: loss {losses[-1]:.4f}, validation loss {valid:.4f}")
    return losses


# To see it learn from stories, run this (two minutes; the demo makes the files):
#
#     from scratchformer import *  # np included
#     tokenizer = Tokenizer.load("out/demo/tokenizer.json")
#     train_tokens, valid_tokens = (
#         np.memmap(f"out/demo/{name}.bin", "<u2", mode="r") for name in ("train", "valid"))
#     model = Transformer(ModelConfig(
#         tokenizer.vocab_size, context_length=256, num_layers=2, d_model=128,
#         num_heads=4, d_ff=256))
#     config = OptimizerConfig(max_steps=500, lr=3e-3)
#     train_model(model, train_tokens, valid_tokens, config, batch_size=8)
#
# The loss starts at ln 1536 = 7.3, that of a uniform guess. The validation loss is 1.8 after
# 100 steps and 0.93 after 500. It's that low because a simple program made the stories
# (data/make_stories.py). And now the model writes sentences (next chapter).
#
# Exercises
# 1. Replace `optimizer.step()` with `gradient_descent_step(model.parameters(), lr)` and try
#    lr=0.1, 0.5 and 2. Even at the best of them the loss falls far more slowly.
# 2. Cut train_tokens down to `train_tokens[:3000]` and train for 500 steps, hundreds of epochs.
#    The loss falls to almost 0, and the validation loss rises: overfitting.


# ----------------------------------------------------------------------------------------
# 8. Generation
#
# How does a model that scores next tokens write a story? Draw the next token from its
# predictions, append it, and repeat. That is all, and it's slow: for each new token, the
# model reads the whole text again. The last section fixes this with a key-value cache.
# (Holtzman et al. 2020, arXiv 1904.09751, section 3.1: top-p; Fan et al. 2018, arXiv
# 1805.04833: top-k)
# ----------------------------------------------------------------------------------------


def token_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    suppressed: Tensor | None = None,
) -> Tensor:
    """softmax(logits / temperature), with unlikely tokens removed; [B, V] for logits [B, V].

    A temperature below 1 makes likely tokens even more likely; 0 leaves only the most likely.
    top_k keeps the k most likely tokens (including ties). top_p keeps the most likely tokens
    that together reach probability p, at least one. `suppressed` holds ids that must never be
    sampled.

    Worked example: at temperature 0.5 the ratio of any two probabilities is squared. For
    top_p=0.5: in descending order they are 67%, 24% and 9%, and the first alone, token 1,
    reaches 0.5.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
    >>> token_probabilities(logits), token_probabilities(logits, temperature=0.5)
    (tensor([[0.0900, 0.6652, 0.2447]]), tensor([[0.0159, 0.8668, 0.1173]]))
    >>> token_probabilities(logits, top_k=2), token_probabilities(logits, top_p=0.5)
    (tensor([[0.0000, 0.7311, 0.2689]]), tensor([[0., 1., 0.]]))
    """
    # torch.multinomial raises an error for NaN, and chapter 12 samples from models during
    # training, even if it fails.
    logits = logits.float().nan_to_num()
    if suppressed is not None:
        logits = logits.index_fill(-1, suppressed, -math.inf)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    # Subtracting the maximum changes no probability, and a small temperature can't overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None:
        ordered, ids = logits.sort(descending=True)  # (B, V) each
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # the probability of all more likely tokens
        to_remove = before >= top_p  # they reach top_p without this one
        to_remove[:, 0] = False
        ordered = ordered.masked_fill(to_remove, -math.inf)
        logits = logits.scatter(-1, ids, ordered)  # undo the sort: each goes back to its id
    return logits.softmax(-1)


def sample(
    logits: Tensor, generator: torch.Generator | None = None, **sampling: Any
) -> Tensor:
    """Ids drawn at random, int64 [B], for logits [B, V]; `sampling` as above.

    >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0)
    tensor([1])
    """
    p = token_probabilities(logits, **sampling)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raise UserError for an empty prompt or ids outside the vocabulary."""
    if not prompt_ids or min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise UserError(f"a prompt needs ids from 0 to {vocab_size - 1}, at least one")


@torch.no_grad()
def generate_naive(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    **sampling: Any,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue the prompt; stop after one of `eos_ids`.

    `eos_ids` (end of sequence) is usually [tokenizer.eot_id]. `sampling` goes to `sample`. The
    model sees only the last context_length tokens.
    """
    check_prompt(prompt_ids, model.config.vocab_size)
    ids, device = list(prompt_ids), model.rope_cache.device
    for _ in range(max_new_tokens):
        tokens = torch.tensor([ids[-model.config.context_length :]], device=device)  # (1, T)
        logits = model(tokens)[:, -1]  # (1, V): the prediction after the last token
        ids.append(int(sample(logits, **sampling)))
        yield ids[-1]
        if ids[-1] in eos_ids:
            return


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids`, piece by piece as they come, in whole characters.

    A character of several bytes may be spread over several tokens: its bytes wait here.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


# To let the model of chapter 7 write, add this to the lines at the end of that chapter:
#
#     ids = generate_naive(model, tokenizer.encode("Once"), 150, temperature=0.8)
#     for text in stream_text(tokenizer, ids):
#         print(text, end="", flush=True)

# The key-value cache
# -------------------
# Attention is the only place where a token looks at others, and all it needs from an earlier
# token is the key and the value. Those never change, because no token looks ahead. So keep
# them, and let the model read nothing but the new token. Attention still looks at all earlier
# keys, but everything else then costs the same for every token, however long the text is.

KVCache = list[tuple[Tensor, Tensor]]  # for each block the keys and values, (1, G, S, K) each


def empty_cache(model: Transformer) -> KVCache:
    """The cache of a model that has read nothing: S is 0."""
    c, weight = model.config, model.embedding.weight
    nothing = weight.new_empty(1, c.num_kv_heads, 0, c.head_dim)
    return [(nothing, nothing)] * c.num_layers


def hidden_states_cached(model: Transformer, tokens: Tensor, kv_cache: KVCache) -> Tensor:
    """`Transformer.hidden_states` of the tokens [1, T] that follow the S tokens in `kv_cache`.

    The same loop over the blocks, but in block i, `attend` puts the earlier keys and values in
    front of the new ones. The new ones are added to the cache.
    """
    T, S, device = tokens.shape[1], kv_cache[0][0].shape[2], tokens.device
    # Row t is the token at position S + t, which sees positions (columns) up to that. With two
    # in the cache and two new ones: [[True, True, True, False], [True, True, True, True]].
    attn_mask = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(S)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = kv_cache[i]  # (1, G, S, K) each
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)  # (1, G, S + T, K)
        kv_cache[i] = k, v
        grouped = k.shape[1] < q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=grouped)

    x, rope_cache = model.embedding(tokens), model.rope_cache[:, S : S + T]
    for i, block in enumerate(model.blocks):
        x = block(x, rope_cache, functools.partial(attend, i))  # (1, T, D)
    return model.norm(x)


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    **sampling: Any,
) -> Iterator[int]:
    """`generate_naive` with a cache: given the same random numbers, the same ids.

    (Up to rounding, which rarely decides between two tokens.) Once the context is full the
    texts differ: here the model reads the second half of the context again and continues from
    there.
    """
    check_prompt(prompt_ids, model.config.vocab_size)
    ids, device, limit = list(prompt_ids), model.rope_cache.device, model.config.context_length
    new, num_cached, kv_cache = ids[-limit:], 0, empty_cache(model)
    for _ in range(max_new_tokens):
        if num_cached + len(new) > limit:
            # Start again, at position 0, with half of the context and the newest token.
            new, num_cached, kv_cache = ids[-(limit // 2 + 1) :], 0, empty_cache(model)
        tokens = torch.tensor([new], device=device)  # (1, T): the prompt, later one token
        hidden = hidden_states_cached(model, tokens, kv_cache)
        num_cached += len(new)
        new = sample(model.lm_head(hidden[:, -1]), **sampling).tolist()
        ids += new
        yield new[0]
        if new[0] in eos_ids:
            return


# Exercises
# 1. Let the demo's model write (scratchformer.py generate --checkpoint out/demo/run --prompt
#    Once) at --temperature 0, 0.8 and 2. At 0 the story is always the same, at 0.8 it changes
#    with the seed, and at 2 its grammar falls apart.
# 2. Add min-p (Nguyen et al. 2024, arXiv 2407.01082): keep the tokens whose probability is at
#    least a fraction p of the most likely token's. One parameter, and two lines beside top_k's.


# ========================================================================================
# PART THREE: SCALE
#
# Part Two is complete: it trains and it writes. Chapters 9 to 12 do the same faster, on many
# devices, and without losing work when something fails. Each piece is a layer on top of Part
# Two and is tested to give the same numbers, up to rounding. (Muon is another optimizer.)
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 9. Faster steps
#
# How does the same step take less time and memory on one device? Matmuls in 16 bits run
# several times faster on a GPU; the logits, the largest tensor of all, are never stored
# whole; torch.compile merges small operations; activations can be recomputed instead of
# stored. For generation, the bottleneck is overhead per token. All of this computes the same
# results, up to rounding, except for Muon: an optimizer that learns more in each step.
# This chapter can wait. Two terms: a *kernel* is a program that a GPU runs, and the *host*
# is the CPU that launches it.
# (Micikevicius et al. 2018, arXiv 1710.03740: mixed precision; Hsu et al. 2024, Liger
# Kernel, arXiv 2410.10989: fused loss; Chen et al. 2016, arXiv 1604.06174: recomputation)
# ----------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class DeviceConfig(Config):
    """Devices"""

    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "device to compute on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "precision of matmuls")


# Mixed precision
# ---------------
# float32 has 24 significant bits. bfloat16 has only 8, but the same range; float16 has 11 and
# a small range, 6e-8 to 65,504. GPUs multiply 16-bit matrices several times faster. So weights
# stay in float32, where a small update isn't rounded away, and `torch.autocast` converts the
# inputs of matmuls to 16 bits on the fly.


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matmuls. "auto": bfloat16 where the GPU has it; float32 on a CPU."""
    cuda = device.type == "cuda"
    has_bfloat16 = cuda and torch.cuda.is_bf16_supported(False)
    if name == "auto":
        name = "bfloat16" if has_bfloat16 else "float16" if cuda else "float32"
    if name == "bfloat16" and cuda and not has_bfloat16:
        raise UserError("this GPU doesn't support bfloat16: use --dtype float16 or float32")
    # What stays float32 on a GPU uses TF32: matmuls round their inputs to 11 bits.
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    return getattr(torch, name)


def make_autocast(device: torch.device, dtype: torch.dtype, fsdp: bool = False) -> Any:
    """A context for matmuls in `dtype`. Off for float32 and for FSDP, which casts by itself."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not fsdp)


class GradScaler:
    """Keeps float16 gradients in range, and skips steps whose gradients are inf or NaN.

    Many gradients are below 6e-8, where float16 has no numbers left. So the loss is multiplied
    by a large power of two before backward, and the gradients are divided by it afterwards. If
    they overflow, the step is skipped and the scale halved; after 2,000 good steps in a row
    it's doubled. For other dtypes the scale stays 1. With clipping, this is

        if grad_norm.isfinite():
            grad /= scale * max(1, grad_norm / clip_grad)
            optimizer.step()

    but this `if` makes the host wait for the GPU. The fused AdamW kernel doesn't: it divides
    gradients by `optimizer.grad_scale`, and does nothing if `optimizer.found_inf` is 1. And in
    `step`, x * (1 - found_inf) means: 0 if the step is skipped, else x.
    WHY not torch.amp.GradScaler: under FSDP (chapter 10) it sees one process's shards only, so
    one process would skip a step that the others take.
    """

    GROWTH_INTERVAL = 2000
    MAX_CONSECUTIVE_SKIPS = 10  # too many to be bad luck: chapter 12 stops the run
    STATE = ("loss_scale", "good_steps", "skipped", "consecutive_skips")

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.loss_scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good_steps, self.skipped, self.consecutive_skips = torch.zeros(3, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.loss_scale

    @torch.no_grad()
    def step(self, optimizer: Any, grad_norm: Tensor, clip_grad: float) -> None:
        """Unscale and clip the gradients, then step. `grad_norm` is their unscaled norm."""
        found_inf, divisor = (~grad_norm.isfinite()).float(), self.loss_scale
        if clip_grad:
            divisor = divisor * (grad_norm / clip_grad).clamp(min=1.0)
        if optimizer.defaults["fused"]:
            optimizer.grad_scale, optimizer.found_inf = divisor, found_inf
            optimizer.step()
        elif not found_inf.item():  # on a device without that kernel
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p.grad is not None:
                    p.grad /= divisor
            optimizer.step()
        self.skipped = self.skipped + found_inf
        self.consecutive_skips = (self.consecutive_skips + 1) * found_inf  # a good step: 0
        if self.enabled:
            self.good_steps = (self.good_steps + 1) * (1 - found_inf)  # a skipped step: 0
            grow = (self.good_steps >= self.GROWTH_INTERVAL).float()
            # Double it if `grow` is 1, halve it if found_inf is 1 (never both).
            self.loss_scale = self.loss_scale * (1 + grow) * (1 - 0.5 * found_inf)
            self.good_steps = self.good_steps * (1 - grow)

    def state_dict(self) -> dict[str, float]:
        return {key: getattr(self, key).item() for key in self.STATE}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for key in self.STATE:
            setattr(self, key, torch.full_like(self.loss_scale, state[key]))


# The fused loss
# --------------


class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(x @ weight.T, targets), with the logits of R rows of x at a time.

    WHY: the logits [B * T, V] are often the largest tensor of a step. But their gradient is
    known as soon as they are:

        d loss / d logits[v] = (softmax(logits)[v] - (1 if v == target else 0)) / N

    So compute the logits of R rows, turn them into the gradients of `x` and `weight` right
    away, and discard them. This is an operation whose derivative we write ourselves: `forward`
    keeps in `ctx` what `backward` needs, and `backward` turns the derivative with respect to
    the result into one for each input. (Second derivatives aren't supported.)

    x [N, D], weight [V, D], targets int64 [N]; the loss is a float32 scalar. Worked example:
    logits 0 and ln 3 mean 1/4 and 3/4; the target is the second, 3/4 - 1 = -1/4.

    >>> weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    >>> loss = LinearCrossEntropy.apply(torch.ones(1, 1), weight, torch.tensor([1]), True)
    >>> loss.backward()
    >>> weight.grad
    tensor([[ 0.2500],
            [-0.2500]])
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, with_grad: bool
    ) -> Tensor:
        matrix, loss_sum = weight.to(x.dtype), torch.zeros((), device=x.device)
        grad_x, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        # Few enough rows for a CPU's caches, enough to keep a GPU busy; and at most 16 parts,
        # because torch.compile unrolls the loop.
        size = max(512 if x.device.type == "cpu" else 4096, -(-len(x) // 16))
        for x_part, target in zip(x.split(size), targets[:, None].split(size)):
            mask, target = target >= 0, target.clamp(min=0)  # (R, 1); False for -100
            log_p = (x_part @ matrix.T).log_softmax(-1, dtype=torch.float32)  # (R, V)
            log_p_target = log_p.gather(-1, target)  # (R, 1)
            loss_sum -= (log_p_target * mask).sum()
            if with_grad:
                grad = log_p.exp_().to(x.dtype)  # (R, V)
                # The target's is p - 1. Subtract in float32: in bfloat16, p = 0.999 is 1.
                grad.scatter_(-1, target, (log_p_target.exp() - 1).to(x.dtype))
                grad_x.append((grad @ matrix) * mask)  # (R, D)
                # TRAP: a sum over thousands of rows may exceed float16's 65,504. The division
                # by their number, in `backward`, comes too late. Hence the 256 (a power of
                # two, so that it costs no precision).
                grad_weight += grad.T @ (x_part * mask / 256)  # (V, D)
        num_targets = (targets >= 0).sum().clamp(min=1)
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, num_targets)
        return loss_sum / num_targets

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight, num_targets = ctx.saved_tensors
        scale = grad_loss / num_targets
        return grad_x * scale, grad_weight * (256 * scale), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cross_entropy(x @ weight.T, targets) for x [B, T, D], without storing all logits."""
    x, targets = x.flatten(0, -2), targets.flatten()
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class TransformerWithLoss(Transformer):
    """A Transformer that, given targets [B, T], returns their mean loss instead of logits."""

    loss_function = staticmethod(linear_cross_entropy)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.hidden_states(tokens)  # (B, T, D)
        if targets is None:
            return self.lm_head(x)
        return self.loss_function(x, self.lm_head.weight, targets)


# Muon
# ----
# AdamW treats a matrix as a bag of separate numbers. But a matrix acts on vectors. Its
# gradient has a few large singular values and many small ones: a few directions dominate the
# update, and along all others the matrix hardly changes. Muon makes the singular values of the
# update nearly equal, so that rare directions are learned as fast as common ones. The same loss
# then takes fewer steps. (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Bernstein &
# Newhouse 2024, arXiv 2409.20325: why it's steepest descent under the spectral norm)
#
# It's for the matrices of the blocks. AdamW still learns the norm weights, the embedding and
# lm_head. The last two are tables with one row per token, and each row is used on its own.


@dataclasses.dataclass(kw_only=True)
class RunOptimizerConfig(OptimizerConfig):
    """Optimization"""

    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: Muon for the matrices of the blocks, AdamW for the rest")


def orthogonalize(x: Tensor) -> Tensor:
    """The matrices x [N, rows, columns], with all singular values moved close to 1.

    If x = U @ diag(s) @ V.T, then x @ x.T @ x = U @ diag(s^3) @ V.T. So matmuls alone apply a
    polynomial to the singular values, here a * s + b * s^3 + c * s^5. With these coefficients,
    five rounds lift everything above 0.01 to about 0.7 to 1.2, and that is close enough. This
    is a Newton-Schulz iteration, and 16 bits are enough for it. Source of a, b and c: Jordan et
    al. 2024.

    Worked example: this update stretches (1, 1) by 3.9 and (1, -1) by 0.1; afterwards
    both by roughly 1.

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


def muon_reference(
    weight: Tensor, grad: Tensor, momentum: Tensor, lr: float, weight_decay: float,
    decay: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """One update of Muon for one matrix, written out: the new weight and the new momentum.

    The momentum is AdamW's m, and `decay` is its beta1. The update mixes in the gradient once
    more (Nesterov momentum).
    WHY 0.2 * sqrt(max(rows, columns)): the entries of U @ V.T have a magnitude of about
    1 / sqrt(max(rows, columns)), and those of AdamW's updates, in practice, about 0.2 (not 1,
    because gradients change sign). With this factor, lr and weight_decay mean what they mean
    for AdamW.
    Source: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
    """
    momentum = decay * momentum + (1 - decay) * grad
    update = orthogonalize((decay * momentum + (1 - decay) * grad)[None])[0]
    update = 0.2 * math.sqrt(max(weight.shape)) * update
    return weight - lr * (weight_decay * weight + update), momentum


def momentum_decay(step: int) -> float:
    """Muon's decay rate at `step` (from 0): rises from 0.85 to 0.95 in the first 300 steps.

    WHY: early on the loss falls so fast that older gradients no longer point downhill.
    Source: Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt.

    >>> momentum_decay(0), round(momentum_decay(150), 3), momentum_decay(1000)
    (0.85, 0.9, 0.95)
    """
    return min(0.95, 0.85 + 0.1 * step / 300)


def split_sizes(name: str, weight: Tensor) -> list[int]:
    """How many rows each matrix in a weight has: one large weight may hold several matrices.

    >>> split_sizes("blocks.0.attention.qkv.weight", torch.empty(12, 4))
    [4, 4, 4]
    """
    rows = len(weight)
    if name.endswith("qkv.weight"):
        width = weight.shape[1]
        return [width, (rows - width) // 2, (rows - width) // 2]
    return [rows // 2] * 2 if name.endswith("gate_up.weight") else [rows]


class Muon(torch.optim.AdamW):
    """`muon_reference` for the matrices of the blocks, AdamW for all other parameters.

    `params` maps each parameter to the tensor that the optimizer updates: the parameter itself,
    or, under FSDP, this process's shard of it (`local_params`, chapter 10).

    Corresponding weights of all blocks, such as all mlp.down, are one group of parameters, a
    *stack*: matrices of the same shape are orthogonalized together. Its "rows" are the
    `split_sizes` of such a weight: [D, D, D] for attention.qkv.

    As in fused AdamW, gradients are divided by the attribute `grad_scale`, and nothing changes
    if `found_inf` is 1: GradScaler sets both. `dtype` is the precision of `orthogonalize`.
    """

    def __init__(
        self, model: nn.Module, params: dict[Any, Any], config: OptimizerConfig,
        dtype: torch.dtype = torch.float32, fused: bool | None = None, compiled: bool = False,
    ):
        stacks: dict[str, Any] = {}  # the same weight of all blocks, by name: mlp.down.weight
        others = dict(params)
        for name, p in model.named_parameters():
            if p in params and p.dim() == 2 and name.startswith("blocks."):
                stack = stacks.setdefault(name.split(".", 2)[2], {
                    "params": [], "weight_decay": config.weight_decay, "momentum": 0.95,
                    "rows": split_sizes(name, p)})
                stack["params"].append(others.pop(p))
        groups = make_optimizer(others.values(), config, fused).param_groups
        super().__init__([*groups, *stacks.values()], lr=config.lr, fused=fused)
        for stack in stacks.values():
            for weight in stack["params"]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)  # the momentum
        self.dtype = dtype
        if compiled:  # fewer passes over memory
            compile_static = functools.partial(torch.compile, dynamic=False)
            self.update_momenta = compile_static(self.update_momenta)  # type: ignore[method-assign]
            self.apply_update = compile_static(self.apply_update)  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # AdamW skips parameters without a gradient, and so do we. The matrices are among
            # its parameters: we update them, drop their gradients, and let it do the rest.
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if "rows" in group and weights:
                found_inf = getattr(self, "found_inf", weights[0].new_zeros(()))
                divisor = getattr(self, "grad_scale", weights[0].new_ones(()))
                rows, grads = group["rows"], [weight.grad for weight in weights]
                momenta = [self.state[weight]["exp_avg"] for weight in weights]
                # TRAP: a Python number would be compiled in as a constant, and each new value
                # compiled again.
                decay = weights[0].new_full((), group["momentum"])
                updates = self.update_momenta(grads, momenta, decay, divisor, found_inf)
                updates = self.orthogonalize_all(updates, rows)
                scale = 0.2 * math.sqrt(max(rows[0], updates.shape[2]))
                lr = group["lr"] * (1 - found_inf)
                self.apply_update(weights, updates, scale, lr, group["weight_decay"])
                for weight in weights:
                    weight.grad = None
        super().step()

    def update_momenta(
        self, grads: list[Any], momenta: list[Tensor], decay: Tensor, divisor: Tensor,
        found_inf: Tensor,
    ) -> Tensor:
        """Update the momentum buffers. Returns updates [N, rows, columns]."""
        updates = []
        for grad, momentum in zip(grads, momenta):
            # On overflow, use the momentum itself as the gradient: averaging it with itself
            # leaves it unchanged.
            grad = torch.where(found_inf > 0, momentum, grad / divisor)
            momentum.lerp_(grad, 1 - decay)  # decay * momentum + (1 - decay) * grad
            updates.append(grad.lerp(momentum, decay).to(self.dtype))
        return torch.stack(updates)

    def orthogonalize_all(self, updates: Tensor, rows: list[int]) -> Tensor:
        """`orthogonalize` for every matrix in N weights [N, rows, columns]."""
        if len(set(rows)) == 1:  # all at once
            matrices = updates.reshape(-1, rows[0], updates.shape[2])
            return orthogonalize(matrices).view_as(updates)
        return torch.cat([orthogonalize(x) for x in updates.split(rows, dim=1)], dim=1)

    def apply_update(
        self, weights: list[Tensor], updates: Tensor, scale: float, lr: Tensor,
        weight_decay: float,
    ) -> None:
        """Move the weights; not at all if `lr` is 0."""
        for weight, update in zip(weights, updates):
            weight.sub_(lr * (weight_decay * weight + scale * update))


# Recomputation and compilation
# -----------------------------


def checkpoint_activations(model: Transformer) -> None:
    """Let each block keep only its input; the backward pass runs the block again.

    Saves most of the memory for activations, for a third more computation.
    """
    for block in model.blocks:
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def compile_model(model: TransformerWithLoss, per_block: bool) -> None:
    """Let torch.compile fuse operations: the model as a whole, or each block on its own."""
    if per_block:
        for block in model.blocks:
            block.compile()  # all blocks share one compilation
        model.loss_function = torch.compile(linear_cross_entropy)
    else:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]


def without_compiling() -> Any:
    """A context in which compiled code runs as plain Python: for shapes that occur only once.

    A *stance* tells torch.compile what to do when it meets a new shape; the default compiles.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()  # nothing is compiled; the import would take seconds
    return torch.compiler.set_stance("force_eager")


# Faster generation
# -----------------
# Chapter 8's cache is for one text, and it's copied for every token. To read many texts at once
# and to keep a GPU busy, its memory should be allocated once.


class CachedModel:
    """`hidden_states_cached` for B texts of different lengths, without copying the cache.

    The cache has room for `size` tokens per text (default: context_length), and `attend` writes
    the new keys and values to their places in it.
    """

    def __init__(self, model: Transformer, batch_size: int = 1, size: int | None = None):
        self.model, self.size, c = model, size or model.config.context_length, model.config
        shape = (c.num_layers, 2, batch_size, self.size, c.num_kv_heads, c.head_dim)
        weight = model.embedding.weight
        # TRAP: zeros, not empty. Masked positions have weight 0, but 0 times the NaN of
        # uninitialized memory is NaN.
        self.kv_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, S: int | None = None) -> Tensor:
        """Hidden states [B, T, D] of `tokens` [B, T] at `positions` [B, T] of their texts.

        Each token sees positions up to its own, among the first S (default: those filled).
        """
        S = S or int(positions.max()) + 1
        model, device = self.model, tokens.device
        positions, rows = positions.to(device), torch.arange(len(tokens), device=device)
        visible = positions[:, None, :, None] >= torch.arange(S, device=device)  # (B, 1, T, S)
        # Numbers to add to the scores: a boolean mask would be converted in every block.
        attn_mask = torch.where(visible, 0.0, -math.inf).to(self.kv_cache.dtype)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = self.kv_cache[i]  # (B, size, G, K) each
            # Token t of text b goes to position positions[b, t] of row b.
            k_cache[rows[:, None], positions] = k.transpose(1, 2)  # (B, T, G, K)
            v_cache[rows[:, None], positions] = v.transpose(1, 2)
            k, v = k_cache[:, :S].transpose(1, 2), v_cache[:, :S].transpose(1, 2)
            grouped = k.shape[1] < q.shape[1]
            # TRAP: not is_causal=True, which would let a single query see key 0 only.
            return F.scaled_dot_product_attention(  # (B, H, T, K)
                q, k, v, attn_mask, enable_gqa=grouped)

        rope_cache = model.rope_cache[:, positions]  # (2, B, T, K/2)
        x = model.embedding(tokens)  # (B, T, D)
        for i, block in enumerate(model.blocks):
            x = block(x, rope_cache, functools.partial(attend, i))  # (B, T, D)
        return model.norm(x)


def sample_rows(
    logits: Tensor, generators: Sequence[torch.Generator] | None = None, **sampling: Any
) -> Tensor:
    """`sample`, with a generator for each row.

    torch.multinomial would have to be called for each row, and it makes the CPU wait for a GPU.
    What it does is this: give every id i a waiting time with the exponential distribution of
    rate p[i], which is e[i] / p[i] if e[i] has rate 1. The first to arrive is i with
    probability p[i]. The smallest e / p is the largest p / e. (This is the Gumbel-max trick
    without the logarithm.)
    """
    p = token_probabilities(logits, **sampling)  # (B, V)
    if sampling.get("temperature") == 0:  # p is 1 for one id: no race is needed
        return p.argmax(-1)
    e = torch.empty_like(p)
    for row, generator in zip(e, generators or itertools.repeat(None)):
        row.exponential_(generator=generator)
    return (p / e).argmax(-1)


class CUDAGraphDecoder(CachedModel):
    """A `CachedModel` that replays one decoding step as a single CUDA graph; CUDA only.

    WHY: one token takes hundreds of kernels. The GPU finishes them in less time than the host
    needs to launch them one by one. A CUDA graph is a recording of these launches, which one
    launch replays: the same kernels on the same memory. So what changes, token and position,
    is passed in tensors, and the result is overwritten by the next call.
    """

    def __init__(self, model: Transformer, batch_size: int = 1, size: int | None = None):
        super().__init__(model, batch_size, size)
        if (device := self.kv_cache.device).type != "cuda":
            raise UserError(f"CUDA graphs need a model on a CUDA device, not on {device.type}")
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tokens, self.positions = torch.zeros(
            (2, batch_size, 1), dtype=torch.int64, device=device)

    def __call__(self, tokens: Tensor, positions: Tensor, S: int | None = None) -> Tensor:
        if tokens.shape[1] > 1:
            return super().__call__(tokens, positions)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        with torch.cuda.device(self.kv_cache.device):
            if self.graph is None:
                # Attend to the whole cache: to read the last position here, the CPU would wait
                # for the GPU, and the mask hides what isn't filled. Warm up before recording,
                # because a first call includes lazy initialization.
                super().__call__(self.tokens, self.positions, self.size)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):
                    self.hidden = super().__call__(self.tokens, self.positions, self.size)
            self.graph.replay()  # recording alone computes nothing
        return self.hidden


@torch.no_grad()
def next_ids(
    cached_model: CachedModel, prompts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator] | None = None, **sampling: Any,
) -> Iterator[Tensor]:
    """Yields the next id of each of B texts, int64 [B], without end.

    They all begin at position 0. Short ones are padded at the end; no token sees the padding,
    because it comes later, and new tokens overwrite it in the cache.
    """
    model = cached_model.model
    limit, device = model.config.context_length, model.rope_cache.device
    windows = [list(prompt[-limit:]) for prompt in prompts]  # what the model sees of each text
    while True:
        lengths = torch.tensor([len(window) for window in windows])
        T = int(lengths.max())
        tokens = torch.tensor([window + [0] * (T - len(window)) for window in windows])
        positions = torch.arange(T).expand(len(windows), T)  # (B, T)
        hidden = cached_model(tokens.to(device), positions)  # (B, T, D)
        hidden = hidden[torch.arange(len(windows)), lengths - 1]  # (B, D)
        drawn: list[Tensor] = []
        positions = lengths[:, None].to(device)  # (B, 1)
        while True:
            # TRAP: nothing in this loop reads a number from a GPU, which would make the CPU
            # wait for it.
            drawn.append(sample_rows(model.lm_head(hidden), generators, **sampling))
            yield drawn[-1]
            if (S := T + len(drawn)) > limit:
                break
            hidden = cached_model(drawn[-1][:, None], positions, S)[:, 0]  # (B, D)
            positions = positions + 1
        # Keep half of the context. The positions change, so nothing cached is valid.
        for window, new in zip(windows, torch.stack(drawn, 1).tolist()):
            window += new
            if len(window) > limit:
                del window[: -(limit // 2 + 1)]


def delayed_read(tensors: Iterable[Tensor]) -> Iterator[list]:
    """Yields each GPU tensor as a list, after the work for the next one has been launched.

    WHY: reading a tensor makes the CPU wait until the GPU has computed it. This way, the GPU
    always has work queued while the CPU does other things.
    """
    unread: Any = None
    for tensor in itertools.chain(tensors, [None]):
        if unread:
            copy, copied = unread
            copied.synchronize()
            yield copy.tolist()
        if tensor is not None:
            unread = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
            unread[1].record()  # happens when the GPU has done all of the above


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    generators: Sequence[torch.Generator] | None = None,
    cached_model: CachedModel | None = None,
    **sampling: Any,
) -> Iterator[list[int | None]]:
    """`generate` for many texts: yields the next id of each, or None once a text has ended.

    A batch takes little more time than one text, since both read all weights once per token. Up
    to rounding, each row is the text that it would be on its own, given a generator per row.
    `cached_model` is a cache to reuse, or a faster one.
    """
    for prompt in prompts:
        check_prompt(prompt, model.config.vocab_size)
    cached_model = cached_model or CachedModel(model, len(prompts))
    steps = itertools.islice(
        next_ids(cached_model, prompts, generators, **sampling), max_new_tokens)
    ended = [False] * len(prompts)
    for ids in delayed_read(steps) if model.rope_cache.is_cuda else map(Tensor.tolist, steps):
        yield [None if end else i for end, i in zip(ended, ids)]
        ended = [end or i in eos_ids for end, i in zip(ended, ids)]  # the others go on
        if all(ended):
            return


def linear_on_all_cores(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, on all cores of a CPU even if `x` is a single row.

    One token needs every weight once, so the speed of memory is the limit. PyTorch multiplies
    a single float32 row by a matrix on one core, but spreads a batch of matmuls over all. So
    we slice the matrix into a batch. (In bfloat16, F.linear uses all cores itself.)
    """
    if x.numel() > x.shape[-1] or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight)
    slices = math.gcd(len(weight), 64)
    parts = weight.view(slices, -1, x.shape[-1]).transpose(1, 2)  # (slices, D, rows)
    return torch.bmm(x.reshape(1, 1, -1).expand(slices, 1, -1), parts).view(*x.shape[:-1], -1)


def use_all_cores(model: nn.Module) -> None:
    """Replace all nn.Linear by `linear_on_all_cores`, in a model that only generates."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            matmul = functools.partial(linear_on_all_cores, weight=layer.weight)
            layer.forward = matmul  # type: ignore[method-assign]


# Exercises
# 1. Train with --dtype float16 on a CPU and with GROWTH_INTERVAL = 20. Print `loss_scale` in
#    `step`: it doubles until something overflows, halves, and tries again.
# 2. In LinearCrossEntropy drop the 256 and train in float16 with a batch of 65,536 tokens that
#    are all alike: the gradient overflows, and a test of LinearCrossEntropy fails.


# ----------------------------------------------------------------------------------------
# 10. Many devices
#
# How do several devices train one model? *Data parallel*: each process holds the whole
# model, sees different rows of the batch, and all average their gradients before the update.
# FSDP, fully sharded data parallel: each process also holds just a shard of every weight,
# gathers the rest when a matmul needs it, and drops it afterwards. A parameter costs 16 bytes
# (4 itself, 4 its gradient, 8 AdamW's m and v), but a matmul only needs its value, 2 to 4.
#
# On eight GPUs: torchrun --nproc_per_node=8 scratchformer.py train ..., with --fsdp if a model
# and its optimizer don't fit on one. --batch_size counts sequences per process.
#
# This chapter can wait. (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 5; Zhao et
# al. 2023, FSDP, arXiv 2304.11277)
# ----------------------------------------------------------------------------------------

# `torchrun` starts several copies of a program, *processes*, and tells each its place in
# environment variables: RANK, its number; WORLD_SIZE, how many there are; LOCAL_RANK and
# LOCAL_WORLD_SIZE, the same on this machine alone. A *collective* is an operation that every
# process must call, in the same order, or all wait forever: all_reduce gives every process the
# sum of all their tensors, broadcast gives every process one process's tensor, and a barrier
# waits until all are there. NCCL carries them out between GPUs, gloo between CPUs.


@dataclasses.dataclass(kw_only=True)
class ProcessConfig(Config):
    """Speed, memory and processes (start several with torchrun)"""

    compile: bool = flag(False, "fuse kernels with torch.compile: slower start, faster steps")
    activation_checkpointing: bool = flag(
        False, "recompute activations in the backward pass instead of storing them")
    fsdp: bool = flag(False, "shard weights, gradients and optimizer state over the processes")
    fsdp_unit: Literal["auto", "model", "block"] = flag(
        "auto", "what FSDP gathers at once; auto: the model up to 10^9 weights, else a block")
    shard_size: int = flag(
        0, "processes that share one replica (those of a node, say); 0: all", 0)

    def check(self) -> None:
        """Raise UserError if these flags don't fit the processes that torchrun started."""
        if self.fsdp and "RANK" not in os.environ:
            raise UserError("--fsdp needs torchrun: "
                            "torchrun --nproc_per_node=N scratchformer.py ...")
        if self.fsdp_unit != "auto" and not self.fsdp:
            raise UserError(f"--fsdp_unit {self.fsdp_unit} needs --fsdp")
        if self.shard_size and (not self.fsdp or get_world_size() % self.shard_size):
            raise UserError(f"--shard_size {self.shard_size} needs --fsdp and a number of "
                            f"processes that it divides, not {get_world_size()}")
        if self.compile and not has_compiler():
            raise UserError("--compile needs a C++ compiler, such as g++")


def has_compiler() -> bool:
    """Whether torch.compile will find a C or C++ compiler."""
    compilers = os.environ.get("CXX", "g++"), "clang++", "gcc", "clang"
    return any(map(shutil.which, compilers))


def get_rank() -> int:
    """This process's number among all that torchrun started, from 0."""
    return int(os.environ.get("RANK", 0))


def get_world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def pick_device(kind: str) -> torch.device:
    """This process's device: its own GPU if there is CUDA, else the CPU; "mps" if asked for."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if cuda else "cpu"
    if kind == "mps" and (not mps or "RANK" in os.environ):
        raise UserError("--device mps: there is none here, or torchrun started this process")
    if kind != "cuda":
        return torch.device(kind)
    if not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if (local_size := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > gpus:
        raise UserError(f"{local_size} processes on a machine with {gpus} CUDA devices: "
                        "start at most one for each")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


# Communication
# -------------


class SharedError(UserError):
    """An error that all processes know of and raise together."""


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun has started, if any, and shut down cleanly."""
    if "RANK" not in os.environ:
        yield
        return
    # Two backends: gradients travel over NCCL. Small decisions travel over gloo, which doesn't
    # make the host wait for the GPU.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except BaseException as error:
        if get_world_size() > 1 and not isinstance(error, SharedError):
            # The others may be waiting for this process in a collective, so a clean shutdown
            # would hang. Say why and exit; torchrun then ends the others.
            if not isinstance(error, UserError):
                traceback.print_exc()
            print_error(f"scratchformer: error: process {get_rank()}: {error}\n")
            os._exit(2 if isinstance(error, UserError) else 1)
        raise
    finally:
        # TRAP: a plain destroy_process_group() aborts some CPU runs at exit ("terminate called
        # without an active exception"). Whatever holds the group must be gone first, and
        # nobody may leave while others still communicate.
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def on_every_process(function: Callable[[], Any]) -> Any:
    """function(), on every process. If it raises UserError or OSError anywhere, all raise."""
    if not torch.distributed.is_initialized():
        return function()
    result, message = None, None
    try:
        result = function()
    except (UserError, OSError) as error:
        message = error_message(error)
    messages: list[Any] = [None] * get_world_size()
    torch.distributed.all_gather_object(messages, message)
    if any(messages):
        raise SharedError(next(filter(None, messages)))
    return result


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


def any_process(condition: Any) -> bool:
    """Whether `condition` is true on any process, so that all of them act alike."""
    return sum_over_processes(torch.tensor(int(bool(condition)))).item() > 0


def wait_for_main(future: Future | None) -> None:
    """Collective: wait until process 0's `future` is done, whether or not it succeeds.

    WHY in rounds: a collective that takes ten minutes times out.
    """
    while any_process(future and concurrent.futures.wait([future], 5).not_done):
        pass


# Data parallel
# -------------


def load_batches(
    tokens: np.ndarray | TokenDataset, context_length: int, steps: range, device: torch.device,
    batch_size: int, grad_accum_steps: int = 1, seed: int = 1, rank: int = 0,
    world_size: int = 1,
) -> Generator:
    """Yield this process's micro-batches of all `steps`, loaded ahead of time by a thread.

    A step may have several *micro-steps*, whose gradients add up (chapter 12). All windows of a
    run are numbered (chapter 5), and in every micro-step each process takes the next batch_size
    of them. For example, a step of eight windows, two at a time:

                        process 0    process 1
        micro-step 0    0, 1         2, 3
        micro-step 1    4, 5         6, 7
    """

    def load(task: tuple[int, int]) -> list[Tensor]:
        step, micro_step = task
        first = ((step * grad_accum_steps + micro_step) * world_size + rank) * batch_size
        indices = range(first, first + batch_size)
        batch = get_batch(tokens, context_length, seed, indices)  # (B, T) each
        # Pinned memory lets the copy to a GPU run while the GPU computes.
        return [x.pin_memory() if device.type == "cuda" else x for x in batch]

    tasks = ((step, micro_step) for step in steps  # itertools.product would store them all
             for micro_step in range(grad_accum_steps))
    with ThreadPoolExecutor(1) as executor:
        for batch in bounded_map(executor, load, tasks, 3):
            yield [x.to(device, non_blocking=True) for x in batch]


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes. (FSDP has done so already.)

    WHY this makes many devices learn what one does: the mean over all rows is the mean of the
    means over equal shares of them. For example, eight rows on two processes:

    >>> loss_of_row = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    >>> [share.mean().item() for share in loss_of_row.chunk(2)], loss_of_row.mean().item()
    ([2.5, 6.5], 4.5)
    """
    if get_world_size() == 1 or is_fsdp(model):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    # One long message is faster than many short ones.
    flat = torch.nn.utils.parameters_to_vector(grads)
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
    GPUs of a node, say) and replicated across groups. The *mesh* arranges the processes in one
    row, or for HSDP in one row per group.

    A *unit* is what is gathered at once. The model as one unit is fastest: each unit costs the
    host some milliseconds per micro-step. Block by block, only one block's weights are whole
    at any time, so N devices hold a model nearly N times as large as one device can.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size, make_mesh = get_world_size(), torch.distributed.init_device_mesh
    if shard_size in (0, size):
        # TRAP: don't make this mesh two-dimensional with one dimension of size 1. That makes
        # more process groups, which made some CPU runs crash at exit.
        mesh = make_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        grid = (size // shard_size, shard_size)
        mesh = make_mesh(device.type, grid, mesh_dim_names=("replicate", "shard"))
    # Weights are gathered in `dtype`, gradients summed in float32. TRAP: by default FSDP also
    # casts the inputs of a unit, and so the RoPE cache, which must stay float32.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for unit in [*model.blocks, model] if per_block else [model]:
        # The last unit holds the head, which the backward pass needs at once: keep it gathered.
        sharded: Any = fully_shard(
            unit, mesh=mesh, mp_policy=policy, reshard_after_forward=unit is not model)
        if device.type == "cpu":
            # TRAP: asked for an average, gloo in torch 2.8 returns the sum.
            sharded.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: Any, last: bool) -> None:
    """Tell FSDP whether this is the step's last micro-step, after which gradients are averaged.

    Until then each process accumulates its own, which takes fewer messages and more memory.
    """
    if is_fsdp(model):
        model.set_requires_gradient_sync(last)
        if not is_fsdp(model.blocks[0]):
            model.set_reshard_after_backward(last)  # one unit stays gathered in between


def reshard(model: Any) -> None:
    """Drop weights that a forward pass without a backward pass has left gathered."""
    if is_fsdp(model):
        model.reshard()


@torch.no_grad()
def local_shard(tensor: Any) -> Any:
    """The part of a tensor that this process holds: a shard under FSDP, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_params(model: nn.Module) -> dict[Any, Any]:
    """For each parameter that isn't frozen, what this process holds of it.

    TRAP: FSDP's parameters are DTensors, tensors that know of all their shards, and fused
    AdamW leaks Python objects for each of them in each step (pytorch issue 188174). So the
    optimizer gets these plain tensors instead. Call it after sharding, which replaces all
    parameters.
    """
    return {p: local_shard(p) for p in model.parameters() if p.requires_grad}


def shard_group(params: dict[Any, Any]) -> Any:
    """The processes that hold one copy of the weights together; None if each holds a copy."""
    mesh = getattr(next(iter(params)), "device_mesh", None)
    return mesh.get_group("shard") if mesh else None


class DistributedMuon(Muon):
    """Muon on n processes, each of which orthogonalizes the matrices of some of the blocks.

    Without FSDP every process has all matrices: it takes its share of them, and an all-gather
    collects the results. Under FSDP a process holds some rows of every matrix, possibly none.
    In an *all-to-all* every process sends different data to every other. One makes whole
    matrices, a share of them for each process, and another one turns them back into rows. With
    two processes and the weights A and B, of which each process has one half of the rows:

                     before      after the first all-to-all
        process 0    A0, B0      A0, A1: all of A
        process 1    A1, B1      B0, B1: all of B
    """

    def __init__(self, model: nn.Module, params: dict[Any, Any], *args: Any):
        super().__init__(model, params, *args)
        self.group = shard_group(params)

    def orthogonalize_all(self, updates: Tensor, rows: list[int]) -> Tensor:
        n, total = torch.distributed.get_world_size(self.group), sum(rows)
        count, held, _ = updates.shape  # how many weights, and how many rows of each we hold
        size = total if self.group is None else -(-total // n)  # rows per process, at most
        # Zeros make the number of weights divisible by n, M for each process, and the number
        # of rows the same on all: (n * M, size, columns).
        updates = F.pad(updates, (0, 0, 0, size - held, 0, -count % n))
        received = torch.empty_like(updates)
        if self.group is None:
            share = super().orthogonalize_all(updates.chunk(n)[get_rank()], rows)
            torch.distributed.all_gather_into_tensor(received, share)
            return received[:count]
        torch.distributed.all_to_all_single(received, updates, group=self.group)
        # A part of our M weights has come from each process.
        whole = received.unflatten(0, (n, -1))  # (n, M, size, columns)
        whole = whole.transpose(0, 1).flatten(1, 2)[:, :total]  # (M, total, columns)
        whole = super().orthogonalize_all(whole, rows)
        # And the same way back.
        whole = F.pad(whole, (0, 0, 0, n * size - total))  # (M, n * size, columns)
        updates = whole.unflatten(1, (n, size)).transpose(0, 1)  # (n, M, size, columns)
        updates = updates.flatten(0, 1).contiguous()  # (n * M, size, columns)
        torch.distributed.all_to_all_single(received, updates, group=self.group)
        return received[:count, :held]


@torch.no_grad()
def take_local_gradients(params: dict[Any, Any]) -> None:
    """Hand the gradients of all parameters to the plain tensors of `local_params`."""
    for p, local in params.items():
        # The data too, because FSDP may give a shard new memory in the first forward pass.
        local.data, local.grad = local_shard(p), local_shard(p.grad)


@torch.no_grad()
def gradient_norm(params: dict[Any, Any]) -> Tensor:
    """The norm of all gradients of the model, a scalar, the same on every process."""
    norm = torch.nn.utils.get_total_norm(
        [local.grad for local in params.values() if local.grad is not None])
    if group := shard_group(params):  # so far this is the norm of one process's shards
        square = norm.square()
        torch.distributed.all_reduce(square, group=group)
        norm = square.sqrt()
    return norm


@torch.no_grad()
def distribute(whole: Tensor | None, like: Any, from_main: bool = False) -> Tensor:
    """What this process holds of a tensor: its shard if the parameter `like` is sharded.

    Every process has the `whole` tensor. Or with `from_main` only process 0 has it and sends it
    to the others: they give None, and this is a collective.
    """
    options = {"dtype": like.dtype, "device": like.device}
    whole = torch.empty(like.shape, **options) if whole is None else whole.to(**options)
    if from_main and get_world_size() > 1:
        torch.distributed.broadcast(whole, 0)
    if not hasattr(like, "device_mesh"):
        return whole
    shards = whole.chunk(like.device_mesh.shape[-1])  # rows; this is how FSDP splits, too
    index = like.device_mesh.get_local_rank("shard")
    return shards[index] if index < len(shards) else whole[:0]  # fewer rows than processes


def build_model(
    config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype,
    process_config: ProcessConfig,
) -> TransformerWithLoss:
    """The model, with initial weights, ready to train on all processes. The order matters.

    No process ever holds more than its shards and one whole tensor, so the model may be larger
    than a device. Each tensor has its own random generator: the weights are the same for any
    number of processes.
    """
    with torch.device("meta"):  # shapes without numbers
        model = TransformerWithLoss(config)
    num_weights = sum(p.numel() for p in model.parameters())
    fsdp = process_config.fsdp and get_world_size() > 1  # one process has nothing to shard
    unit = process_config.fsdp_unit
    per_block = fsdp and (unit == "block" or unit == "auto" and num_weights > 1e9)
    if process_config.activation_checkpointing:
        checkpoint_activations(model)
    if process_config.compile:
        compile_model(model, per_block)
    if fsdp:
        shard_model(model, device, dtype, per_block, process_config.shard_size)
    elif dtype != torch.float32:
        # WHY: autocast would leave the embedding in float32, and with it the residual stream,
        # which would take twice the memory. (FSDP casts it as well.)
        model.embedding.register_forward_hook(lambda module, args, x: x.to(dtype))
    model.to_empty(device=device)  # memory for what this process holds
    model.tie_weights()  # TRAP: to_empty unties them, giving each name a tensor of its own
    for name, p in model.named_parameters():
        initial = initial_weight(name, p, config.num_layers, seed)
        local_shard(p.data).copy_(distribute(initial, p))
    model.init_rope()
    return model


# Exercises
# 1. Run the demo's `train` command with `torchrun --nproc_per_node=2`, half the --batch_size,
#    --device cpu and another --outdir. The losses are those of one process, with --fsdp and
#    without.
# 2. Make `average_gradients` return at once. Each process now learns from its own rows alone,
#    and the models drift apart: a test of this chapter fails.


# ----------------------------------------------------------------------------------------
# 11. Checkpoints
#
# What must be saved so that a run can resume as if it had never stopped? The weights, the
# optimizer's m and v, and the step: batches are a function of the step (chapter 5). A
# checkpoint holds whole tensors under the names of the plain model, so it can be loaded on
# any number of processes; the loader reshards them. Training waits only for the copy to
# host memory; files are written in the background.
#
# This chapter can wait: it adds nothing to the model.
# ----------------------------------------------------------------------------------------

ADAM_STATE = ("exp_avg", "exp_avg_sq")  # PyTorch's names for m and v; Muon has only m
BEST = "best.pt"  # what --keep_best keeps; not one of `checkpoints_in`, so it's never pruned


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state`, tensors and plain types, to `path`: complete or not at all.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     state = {"model": {"w": torch.ones(2)}, "model_config": {}, "step": 7}
    ...     save_checkpoint(f"{directory}/step_000007.pt", state)
    ...     load_checkpoint(directory)["model"]["w"].tolist(), os.listdir(directory)
    ([1.0, 1.0], ['step_000007.pt'])
    """
    with atomic_write(path) as file:
        torch.save(state, file)


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the newest last. Files of other names are ignored."""
    found = [p for p in directory.glob("*") if re.fullmatch(r"step_\d{6,}\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


CHECKPOINT_TYPES: dict[str, Any] = {
    "step": int, "run": dict, "progress": dict, "special_ids": dict,
    "tokenizer_sha256": (str, type(None)),
}


def load_checkpoint(path: str | Path) -> dict:
    """The state saved in `path`, or in the newest checkpoint of the directory `path`.

    Verifies checksums, then memory-maps the tensors, which are read when used. Raises UserError
    if the file is missing, damaged or something else. Never runs code from the file.
    """
    path = Path(path)
    if path.is_dir():
        if not (found := checkpoints_in(path)):
            raise UserError(f"no checkpoint (step_NNNNNN.pt) in {path}")
        path = found[-1]
    with file_errors(path, "checkpoint"):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = {"model", "model_config", "step"} - set(state)
        if missing:
            raise UserError(f"it has no {' or '.join(sorted(missing))}")
        check_types(state, CHECKPOINT_TYPES)
        return {**migrate_checkpoint(state), "path": str(path)}


OLD_NAMES = {r"^head\.": "lm_head.", "swiglu": "mlp", "^stepper$": "scaler",
             "^scale$": "loss_scale", "skipped_in_a_row": "consecutive_skips"}


def migrate_checkpoint(state: Any) -> Any:
    """A checkpoint's state under today's names. Earlier versions of this file had others."""
    if not isinstance(state, dict):
        return state
    for old, new in OLD_NAMES.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return {name: migrate_checkpoint(value) for name, value in state.items()}


def model_from_checkpoint(
    state: dict, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
) -> TransformerWithLoss:
    """The model of a loaded checkpoint, for inference.

    No weight depends on context_length, so it may differ from training.
    """
    with file_errors(state["path"], "checkpoint"), torch.device("meta"):
        config = ModelConfig(**state["model_config"])
        config.context_length = context_length or config.context_length
        model = TransformerWithLoss(config)
        weights = {k: w.to(device, dtype) for k, w in state["model"].items()}
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["embedding.weight"]
        model.load_state_dict(weights, assign=True)
        if bad := [k for k, w in state["model"].items() if not w.isfinite().all()]:
            raise UserError(f"{bad[0]} is not finite")
        model.tie_weights()
    model.init_rope()  # in float32, whatever `dtype` is
    return model.eval()


# Saving
# ------


def gather_state(
    model: nn.Module, params: dict[Any, Any], optimizer: Any, weights_only: bool = False
) -> dict:
    """Collective: weights and optimizer state, whole, on process 0's host; nothing elsewhere.

    `params` are the `local_params` that the optimizer updates.
    """
    weights: dict[str, Tensor] = {}
    adam: dict[str, dict] = {key: {} for key in (*ADAM_STATE, "step")}

    def gather(into: dict, name: str, tensor: Any) -> None:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if get_rank() == 0:
            into[name] = whole.to("cpu", copy=True)

    for name, p in model.named_parameters():
        gather(weights, name, p.detach())
        # A parameter that's frozen, or never got a gradient, has no optimizer state.
        if not weights_only and (state := optimizer.state.get(params.get(p))):
            if "step" in state:
                adam["step"][name] = state["step"].item()
            for key in (key for key in ADAM_STATE if key in state):
                moment = torch.empty_like(p)  # sharded as p is
                local_shard(moment).copy_(state[key])
                gather(adam[key], name, moment)
    return {"model": weights} if weights_only else {"model": weights, "optimizer": adam}


def write_checkpoint(outdir: Path, state: dict, keep: int, name: str = "") -> None:
    """Save `state` in `outdir`, then delete all but the newest `keep` checkpoints, if not 0."""
    try:
        save_checkpoint(outdir / (name or f"step_{state['step']:06d}.pt"), state)
        for old in checkpoints_in(outdir)[:-keep] if keep else []:
            old.unlink()
    except Exception as error:
        complete = ", ".join(path.name for path in checkpoints_in(outdir)) or "none"
        free = shutil.disk_usage(outdir).free / 1e6
        raise UserError(f"a checkpoint could not be written in {outdir} ({error}; "
                        f"{free:,.1f} MB free); complete ones: {complete}") from None


def check_optimizer_state(state: dict) -> None:
    """Raise an error if the optimizer state in a checkpoint is damaged."""
    m, v, steps = (state["optimizer"][key] for key in (*ADAM_STATE, "step"))
    numbers = [*steps.values(), *map(state["scaler"].get, GradScaler.STATE)]
    good = m.keys() >= v.keys() == steps.keys()
    good &= all(type(x) in (int, float) and abs(x) < 1e18 for x in numbers)
    good &= all(x.shape == state["model"][name].shape and x.isfinite().all()
                for name, x in [*m.items(), *v.items()])
    if not good:
        raise UserError("its optimizer state is damaged")


def load_newest(outdir: Path) -> dict | None:
    """The newest checkpoint that isn't damaged, or None. UserError if all of them are."""
    problem = None
    for path in reversed(checkpoints_in(outdir)):
        try:
            state = load_checkpoint(path)
            model_from_checkpoint(state)  # raises UserError if weights and shape don't match
            if "optimizer" in state:
                with file_errors(path, "checkpoint"):
                    check_optimizer_state(state)
            return state
        except UserError as error:
            log(f"{error}: trying the checkpoint before it")
            problem = problem or error
    if problem:
        raise problem
    return None


def restore_state(
    saved: dict | None, model: nn.Module, params: dict[Any, Any], optimizer: Any
) -> None:
    """Collective: put a checkpoint back, tensor by tensor. Only process 0 has `saved`.

    A state without optimizer, as from --init_from, restores the weights only.
    """
    content: dict = saved or {"model": {}}
    adam: dict = content.get("optimizer") or {key: {} for key in (*ADAM_STATE, "step")}
    steps, names = broadcast((adam["step"], {key: list(adam[key]) for key in ADAM_STATE}))
    for name, p in model.named_parameters():
        weight = content["model"].get(name)
        local_shard(p.data).copy_(distribute(weight, p, from_main=True))
        local = params.get(p)
        by_muon = bool(optimizer.state.get(local))  # its matrices have a state from the start
        keys = ADAM_STATE[:1] if by_muon else ADAM_STATE
        if local is None or any(name not in names[key] for key in keys):
            continue  # frozen, or without a saved state: the optimizer begins a new one
        # TRAP: `saved` is mapped from a file, which may be deleted: hence clone.
        moments = {
            key: distribute(adam[key].get(name), p, from_main=True).clone() for key in keys}
        if not by_muon:  # the fused kernel counts steps on the device, as float32
            moments["step"] = torch.full((), float(steps[name]), device=p.device)
        optimizer.state[local] = moments


# Exercises
# 1. Start a run with --save_interval 100, kill it with `kill -9` after the first checkpoint,
#    and start it again with --resume. On a CPU the losses in metrics.jsonl are, digit by digit,
#    those of a run that never stopped.
# 2. Make `restore_state` leave m and v at zero. A resumed run still learns, but its losses are
#    not those of an unbroken one: a test fails.


# ----------------------------------------------------------------------------------------
# 12. The training run
#
# What does the loop of chapter 7 become with everything that chapters 9 to 11 add? The
# training step is still one piece, `Trainer.step`: forward, backward, average, clip,
# update. Around it, the loop in `Trainer.run` logs, evaluates, saves, and stops when asked to.
# What they call comes after them.
#
# New here are *micro-steps*: gradients add up, so four small batches one after the other
# are one large batch that wouldn't have fit into memory. (Goyal et al. 2017, arXiv
# 1706.02677, section 3: what to average) This chapter can wait if chapter 7 is enough.
# ----------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class DataConfig(Config):
    """Data"""

    train_tokens: list[Path] | None = flag(
        None, "token files to train on, read as one sequence (required unless resuming)")
    valid_tokens: list[Path] | None = flag(None, "token files to evaluate the loss on")
    tokenizer_path: Path | None = flag(
        None, "tokenizer of these files: copied to outdir, needed for samples")
    batch_size: int = flag(64, "sequences per process and micro-step", 1)
    grad_accum_steps: int = flag(1, "micro-steps per optimizer step", 1)
    seed: int = flag(1, "random seed of initial weights and batches", 0, 2**32)


@dataclasses.dataclass(kw_only=True)
class RunConfig(Config):
    """Run"""

    outdir: Path = flag(Path("out/run"), "directory for checkpoints, metrics and tokenizer")
    resume: bool = flag(False, "resume from the newest checkpoint in outdir, if there is one; "
                        "data, learning and run flags that you don't give keep that run's "
                        "values (--no_NAME turns a switch off)")
    log_interval: int = flag(10, "steps between lines of the log", 1)
    eval_interval: int = flag(250, "steps between evaluations on valid_tokens", 1)
    eval_windows: int = flag(1024, "windows of valid_tokens to evaluate on; 0: all", 0)
    save_interval: int = flag(1000, "steps between checkpoints", 1)
    keep_checkpoints: int = flag(3, "newest checkpoints kept; 0: all", 0)
    keep_best: bool = flag(False, "keep the weights with the lowest validation loss: best.pt")
    weights_only: bool = flag(
        False, "last checkpoint without optimizer: a third of the size; can't be resumed")
    sample_interval: int = flag(0, "steps between samples of text; 0: none", 0)
    tensorboard: bool = flag(False, "write the metrics for TensorBoard as well, to outdir")
    init_from: Path | None = flag(
        None, "start from the weights and shape of a model: a checkpoint, a run's directory, "
        "or a Hugging Face Llama directory")


# The run
# -------

# What a resumed run must know to log as if it had never stopped: the sum of the losses since
# the last line of the log, and the best validation loss.
INITIAL_PROGRESS = {"loss_sum": 0.0, "num_losses": 0, "best_loss": math.inf, "best_step": 0}


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """One training run. Every process has one; only process 0's touches `outdir`."""

    model_config: ModelConfig
    data: DataConfig
    optim: RunOptimizerConfig
    run_config: RunConfig
    processes: ProcessConfig
    device: torch.device
    dtype: torch.dtype
    tokens: TokenDataset
    valid: ValidationSet | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        data = self.data
        self.model = build_model(
            self.model_config, data.seed, self.device, self.dtype, self.processes)
        self.params = local_params(self.model)
        fused, compiled = self.device.type != "mps", self.processes.compile
        self.optimizer: torch.optim.AdamW
        if self.optim.optimizer == "adamw":
            self.optimizer = make_optimizer(self.params.values(), self.optim, fused)
        else:
            optimizer_class = DistributedMuon if get_world_size() > 1 else Muon
            precision = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
            self.optimizer = optimizer_class(
                self.model, self.params, self.optim, precision, fused, compiled)
        self.scaler = GradScaler(self.device, enabled=self.dtype == torch.float16)
        self.autocast = make_autocast(self.device, self.dtype, is_fsdp(self.model))
        rows = data.batch_size * data.grad_accum_steps * get_world_size()
        self.tokens_per_step = rows * self.model_config.context_length
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.run_flags = {"rows_per_step": rows, "dtype": self.dtype_name}
        self.run_flags |= flags_to_save(self.processes, data, self.optim, self.run_config)
        self.progress: dict[str, Any] = dict(INITIAL_PROGRESS)
        self.writer = ThreadPoolExecutor(1)
        self.pending_write: Future | None = None

    def step(self, step: int, batches: Iterator) -> tuple[Tensor, Tensor]:
        """One update of the weights, step 1, 2, ...; the loss and the gradient norm."""
        model, optimizer, scaler = self.model, self.optimizer, self.scaler
        optim, micro_steps = self.optim, self.data.grad_accum_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step - 1, optim.lr, optim.min_lr, optim.warmup_steps, optim.max_steps)
            group["momentum"] = momentum_decay(step - 1)  # Muon's; AdamW ignores it
        total_loss = torch.zeros((), device=self.device)
        for micro_step in range(micro_steps):
            inputs, targets = next(batches)  # (B, T) each
            set_gradient_sync(model, last=micro_step == micro_steps - 1)
            with self.autocast:
                # The mean over the step is the sum of these means, each divided by micro_steps.
                loss = model(inputs, targets) / micro_steps
            scaler.scale(loss).backward()
            total_loss += loss.detach()
        average_gradients(model)
        take_local_gradients(self.params)
        grad_norm = gradient_norm(self.params) / scaler.loss_scale
        scaler.step(optimizer, grad_norm, optim.clip_grad)  # unscale, clip, update
        optimizer.zero_grad()
        model.zero_grad()  # under FSDP these aren't the optimizer's
        return total_loss, grad_norm

    def run(self, first_step: int, signals: list[int]) -> int:
        """Train from `first_step` to the last step or a signal; the exit status."""
        run_config, data, max_steps = self.run_config, self.data, self.optim.max_steps
        self.log_setup(first_step)
        metrics = (Metrics(run_config.outdir, first_step, run_config.tensorboard)
                   if is_main_process() else None)
        batches = load_batches(
            self.tokens, self.model_config.context_length, range(first_step, max_steps),
            self.device, data.batch_size, data.grad_accum_steps, data.seed, get_rank(),
            get_world_size())
        # Speed is measured since step `timed_from`, without evaluation and saving. The first
        # step compiles and allocates, so the clock starts again after it.
        seconds, timed_from = 0.0, first_step
        step, problem = first_step, None
        for step in range(first_step + 1, max_steps + 1):
            start, last, record = time.monotonic(), step == max_steps, {}
            loss, grad_norm = self.step(step, batches)
            self.progress["loss_sum"] += loss
            self.progress["num_losses"] += 1
            logged = last or step <= 2 or step % run_config.log_interval == 0
            if logged or step == first_step + 1:
                loss.item()  # wait for the GPU before looking at the clock
            seconds += time.monotonic() - start
            if logged:
                record = self.log_step(step, grad_norm, step - timed_from, seconds)
            if logged or step == first_step + 1:
                seconds, timed_from = 0.0, step
            if self.valid and (last or step % run_config.eval_interval == 0):
                record |= self.evaluate(step, signals)
            if run_config.sample_interval and step % run_config.sample_interval == 0:
                self.log_sample(step)
            if metrics and record:
                metrics.write(record)
            # Whatever ends the run on one process ends it on all, and the weights are saved.
            problem = self.find_problem(step, logged)
            stopping = any_process(signals or problem)
            is_due = last or stopping or step % run_config.save_interval == 0
            is_best = run_config.keep_best and self.progress["best_step"] == step
            if is_due or is_best:
                self.save(step, is_due, is_best)
            if stopping:
                break
        batches.close()
        self.finish(problem)
        if step < max_steps:
            log(f"stopped by a signal after step {step}; continue with --resume")
            # `signals` is empty if another process got the signal.
            return 128 + (signals[0] if signals else signal.SIGTERM)
        return 0

    def save(self, step: int, is_due: bool, is_best: bool) -> None:
        """Collective: write a checkpoint if `is_due`, the weights as BEST if `is_best`.

        Only the copy to host memory happens here; a thread of process 0 writes the files.
        """
        run_config = self.run_config
        weights_only = not is_due or run_config.weights_only and step == self.optim.max_steps
        state = gather_state(self.model, self.params, self.optimizer, weights_only)
        state |= {"model_config": vars(self.model_config), "step": step,
                  "scaler": self.scaler.state_dict(), "run": self.run_flags,
                  "progress": {**self.progress, "loss_sum": self.mean_loss_sum()},
                  "tokenizer_sha256": self.tokens.tokenizer_sha256 or (
                      self.tokenizer and self.tokenizer.fingerprint())}

        def write() -> None:
            if is_best:
                weights = {name: x for name, x in state.items() if name != "optimizer"}
                write_checkpoint(run_config.outdir, weights, run_config.keep_checkpoints, BEST)
            if is_due:
                write_checkpoint(run_config.outdir, state, run_config.keep_checkpoints)

        wait_for_main(self.pending_write)  # at most one copy of the state waits for the disk
        if is_main_process():
            self.pending_write = self.writer.submit(write)

    def restore(self, saved: dict, start: dict) -> None:
        """Collective: continue from a checkpoint, or start with its weights.

        Process 0 has it in `saved`. All processes have `start`, the same without tensors.
        """
        restore_state(saved, self.model, self.params, self.optimizer)
        if "scaler" in start:
            self.scaler.load_state_dict(start["scaler"])
        with file_errors(start["path"], "checkpoint"):
            self.progress |= {name: type(INITIAL_PROGRESS[name])(value)
                              for name, value in start.get("progress", {}).items()}
        old, new = {"optimizer": "adamw", **start.get("run", {})}, self.run_flags
        changed = [f"{name} {old[name]} -> {new[name]}" for name in new
                   if name in old and str(old[name]) != str(new[name])]
        if changed:
            log("changed since the checkpoint: " + ", ".join(changed))

    def find_problem(self, step: int, logged: bool) -> BaseException | None:
        """What must end the run, if anything: a failed save, or too many skipped updates."""
        write = self.pending_write
        if write and write.done() and (error := write.exception()):
            return error
        # Asking the scaler waits for the GPU; a step that is logged has waited already.
        skips = int(self.scaler.consecutive_skips) if logged else 0
        if skips < self.scaler.MAX_CONSECUTIVE_SKIPS:
            return None
        first = step - skips + 1
        return UserError(f"loss or gradients have not been finite since step {first}: the "
                         "weights are as they were then; try a smaller --lr or another --dtype")

    def finish(self, problem: BaseException | None) -> None:
        """Collective: wait for the last save, and raise what has ended the run, if anything."""
        wait_for_main(self.pending_write)

        def check() -> None:
            if self.pending_write:
                self.pending_write.result()
            if problem:
                raise problem

        on_every_process(check)

    def mean_loss_sum(self) -> float:
        """Collective: the sum of the losses since the last log, averaged over processes."""
        loss_sum = torch.as_tensor(self.progress["loss_sum"], device=self.device)
        return sum_over_processes(loss_sum).item() / get_world_size()

    def log_step(self, step: int, grad_norm: Tensor, steps: int, seconds: float) -> dict:
        """Log a line about the last `steps` steps. Returns it as a row of metrics.jsonl."""
        seen = step * self.tokens_per_step
        seconds_left = seconds / steps * (self.optim.max_steps - step)
        rate = steps * self.tokens_per_step / max(seconds, 1e-9)
        record = {"step": step, "tokens_seen": seen, "epochs": seen / len(self.tokens),
                  "train_loss": self.mean_loss_sum() / self.progress["num_losses"],
                  "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
                  "tokens_per_second": round(rate, 1),
                  "skipped_steps": int(self.scaler.skipped)}
        self.progress |= {"loss_sum": 0.0, "num_losses": 0}
        line = (f"step {step:>6}/{self.optim.max_steps}  {seen / 1e6:,.1f}M tokens, "
                f"{record['epochs']:.2f} epochs  loss {record['train_loss']:.4f}  "
                f"lr {record['lr']:.2e}  norm {record['grad_norm']:.3f}  {rate:,.0f} tok/s")
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            peaks = [PEAK_TFLOPS[gpu] for gpu in PEAK_TFLOPS if re.search(rf"\b{gpu}\b", name)]
            if peaks and self.dtype != torch.float32:
                tflops = rate * flops_per_token(self.model_config) / 1e12
                record["mfu"] = round(tflops / peaks[0] / get_world_size(), 4)
                line += f"  MFU {record['mfu']:.1%}"
            record["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            line += f"  {record['memory_gib']:.1f} GiB"
        if record["skipped_steps"]:
            line += f"  {record['skipped_steps']} skipped"
        log(f"{line}  {format_duration(seconds_left)} left")
        if step == 2 and seconds_left > 24 * 3600:
            log(f"at this speed the run takes {seconds_left / 3600:,.0f} hours; smaller "
                "--num_layers, --d_model, --d_ff, --context_length or --batch_size or fewer "
                "--max_steps shorten it")
        return record

    def evaluate(self, step: int, signals: list[int]) -> dict:
        """A row with the loss on valid_tokens; {} if a signal has been received."""
        run_config, progress = self.run_config, self.progress
        assert self.valid
        loss = self.valid.loss(self.model, self.data.batch_size, self.autocast, signals)
        if loss is None:
            return {}
        compare = step == self.optim.max_steps and is_main_process()
        report, text = self.valid.report(loss, compare)
        log(f"step {step}: valid {text}")
        if loss < progress["best_loss"]:
            progress |= {"best_loss": loss, "best_step": step}
        elif step - progress["best_step"] == 3 * run_config.eval_interval:
            log(f"the validation loss has not fallen since step {progress['best_step']}: the "
                "model may be memorizing; more text, fewer steps or a smaller model would help"
                f"{'' if run_config.keep_best else ', and --keep_best keeps the best weights'}")
        return {"step": step, **report, "best_valid_loss": progress["best_loss"]}

    def log_sample(self, step: int) -> None:
        """Collective: a short text by the model as it is now."""
        assert (tokenizer := self.tokenizer)
        eot_ids = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        self.model.eval()
        with self.autocast, without_compiling():
            # No cache: under FSDP only calling the model gathers its weights.
            unknown = unknown_ids(tokenizer, self.model_config.vocab_size)
            ids = list(generate_naive(
                self.model, eot_ids or tokenizer.encode("\n"), 100, eot_ids, temperature=0.8,
                generator=torch.Generator(self.device).manual_seed(1),
                suppressed=unknown.to(self.device)))
        reshard(self.model)
        self.model.train()
        log(f"--- sample at step {step} ---\n{tokenizer.decode(ids)}\n---")

    def log_setup(self, first_step: int) -> None:
        """Two lines about the run."""
        size, data, kind = get_world_size(), self.data, self.device.type
        names = {"cpu": f"CPU, {torch.get_num_threads()} threads", "mps": "Apple GPU"}
        name = names.get(kind) or torch.cuda.get_device_name(self.device)
        how = f"{'FSDP' if self.processes.fsdp else 'data parallel'} on {size}"
        num_weights = sum(p.numel() for p in self.model.parameters())
        log(f"{name}, {self.dtype_name}{', compiled' * self.processes.compile}, "
            f"{how if size > 1 else 'one process'}: {num_weights:,} weights in "
            f"{self.run_config.outdir}, steps {first_step} to {self.optim.max_steps}")
        log(f"{self.run_flags['rows_per_step']} sequences = {self.tokens_per_step:,} tokens "
            f"per step: batch_size {data.batch_size} x grad_accum_steps "
            f"{data.grad_accum_steps} x processes {size}")


# Token files
# -----------
# A `TokenDataset` is an array of ids that stays on disk until a slice of it is read, like the
# np.memmap of chapter 5. Most of its lines check that files are what they claim to be.

METADATA_TYPES: dict[str, Any] = {
    "dtype": str, "vocab_size": int, "num_tokens": int,
    "floor_nats_per_byte": (float, type(None)), "tokenizer_sha256": (str, type(None)),
}


def check_types(content: dict, expected: dict[str, Any]) -> None:
    """Raise UserError if an entry isn't of its expected type."""
    for key, value in content.items():
        if not isinstance(value, expected.get(key, object)):
            raise UserError(f"{key} is {value!r}")


def load_metadata(token_file: Path) -> dict:
    """What NAME.bin.json says about NAME.bin; {} if there's none, as for nanoGPT's files."""
    path, kind = Path(f"{token_file}.json"), "metadata file"
    if not path.is_file():
        return {}
    metadata = read_json(path, kind)
    with file_errors(path, kind):
        check_types(metadata, METADATA_TYPES)
        if (dtype := metadata.get("dtype", "uint16")) not in ("uint16", "uint32"):
            raise UserError(f"dtype is {dtype!r}, not uint16 or uint32")
    return metadata


def check_same_tokenizer(hashes: dict[Any, str | None]) -> None:
    """Raise UserError if two of these hashes, by name, differ. None means unknown.

    Ids of another tokenizer look like any others; the model would just predict them badly.
    """
    known = [name for name, value in hashes.items() if value]
    for name in known:
        if hashes[name] != hashes[known[0]]:
            raise UserError(f"{name} was made with a different tokenizer from {known[0]}")


def is_text(path: Path) -> bool:
    """Whether a file begins with 100 characters of UTF-8, none of them zero.

    Token files hardly ever do: half of the bytes of small ids are zero.
    """
    with open(path, "rb") as file, contextlib.suppress(UnicodeDecodeError):
        start = codecs.getincrementaldecoder("utf-8")().decode(file.read(8000))
        return len(start) >= 100 and "\0" not in start
    return False


class TokenDataset:
    """Token files as one long array of ids: `dataset[start:stop]` reads them from disk.

    Ids are uint16 unless the metadata says otherwise. `vocab_size` 0 takes the metadata's; a
    larger one is fine and only costs memory. Raises UserError if a file is cut short or if
    the files contradict their metadata or each other.
    """

    def __init__(self, paths: Sequence[str | Path], vocab_size: int = 0):
        self.paths = [Path(path) for path in paths]
        names, metadata = ", ".join(map(str, paths)), [load_metadata(p) for p in self.paths]
        self.dtypes = [np.dtype(m.get("dtype", "uint16")).newbyteorder("<") for m in metadata]
        lengths = []
        # Held open, so that a file replaced during training doesn't change what we read.
        self.files = [open(path, "rb") for path in self.paths]
        for path, file, dtype, stated in zip(self.paths, self.files, self.dtypes, metadata):
            if "num_tokens" not in stated and is_text(path):
                raise UserError(f"{path} is text, not a token file: encode it with bpe-encode")
            length, rest = divmod(size := os.fstat(file.fileno()).st_size, dtype.itemsize)
            if rest or stated.get("num_tokens", length) != length:
                raise UserError(f"{path} is damaged: {size} bytes don't match its metadata")
            lengths.append(length)
        self.lengths, self.ends = lengths, np.cumsum(lengths)  # `ends` in the whole sequence
        sizes = {m["vocab_size"] for m in metadata if "vocab_size" in m}
        if len(sizes) > 1 or vocab_size and sizes and vocab_size < max(sizes):
            raise UserError(f"vocab_size is {vocab_size or 'not given'}, but {names} state "
                            f"{' and '.join(map(str, sorted(sizes)))}")
        self.vocab_size = vocab_size or next(iter(sizes), 0)
        if not self.vocab_size:
            raise UserError(f"{self.paths[0]} has no metadata: give --vocab_size")
        if len({m.get("tokenizer_sha256") for m in metadata}) > 1:
            raise UserError(f"{names} were encoded by different tokenizers")
        self.tokenizer_sha256 = metadata[0].get("tokenizer_sha256")
        # The entropy of generated text (chapter 4), the loss that no model can be expected to
        # beat. It isn't known for other text, or for a mix.
        self.floor = metadata[0].get("floor_nats_per_byte") if len(metadata) == 1 else None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def check_length(self, context_length: int) -> None:
        """Raise UserError if the dataset is too short for one window."""
        if len(self) <= context_length:
            raise UserError(f"{self.paths[0]} holds {len(self)} tokens, too few for a "
                            f"context_length of {context_length}: that takes "
                            f"{context_length + 1}")

    def check_ids(self, first: int, stride: int) -> None:
        """Read every `stride`-th chunk, to find bad ids now and not at the first evaluation."""
        for start in range(first * CHUNK, len(self), stride * CHUNK):
            _ = self[start : start + CHUNK]  # raises for a bad id

    def __getitem__(self, window: slice) -> np.ndarray:
        """The ids of a slice, int64. Raises UserError if one is outside the vocabulary."""
        start, stop, _ = window.indices(len(self))
        parts = [np.empty(0, np.int64)]
        for file, dtype, end, length in zip(self.files, self.dtypes, self.ends, self.lengths):
            if start < end and start < stop:
                # WHY a new map for each read: all that has been read through one map counts as
                # this process's memory, in the end the whole file.
                with file_errors(file.name, "token file"):
                    mapped = np.memmap(file, dtype, mode="r", shape=(length,))
                offset = length - (end - start)  # of `start` in this file
                parts.append(mapped[offset : offset + stop - start].astype(np.int64))
                start += len(parts[-1])
        ids = np.concatenate(parts)
        # TRAP: on a GPU, an id outside the embedding triggers a device-side assert that names
        # neither the file nor the id and kills the process.
        if ids.max(initial=0) >= self.vocab_size:
            raise UserError(f"{self.paths[0]} holds the id {ids.max()}, outside the vocabulary "
                            f"of {self.vocab_size}: another tokenizer made it")
        return ids


# Evaluation
# ----------


class ValidationSet:
    """Windows of tokens to evaluate models on, and what a loss on them means.

    All windows, end to end, or `limit` of them, spread evenly. The last may be shorter, so that
    all tokens but the first are predicted once. For example, with 12 tokens and a context of
    2, they begin at 0, 2, 4, 6, 8 and 10; three of them at 0, 4 and 10. Raises UserError if
    there are fewer than two tokens, or ids that `tokenizer` lacks.
    """

    def __init__(
        self, tokens: TokenDataset, context_length: int, limit: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        tokens.check_length(1)
        self.tokens, self.T, self.text = tokens, min(context_length, len(tokens) - 1), b""
        self.starts = np.arange(0, len(tokens) - 1, self.T)
        if limit and limit < len(self.starts):
            at = np.linspace(0, len(self.starts) - 1, limit).round().astype(int)
            self.starts = self.starts[at]
        ids = np.concatenate([self.tokens[i + 1 : i + self.T + 1] for i in self.starts])
        if tokenizer:
            with file_errors(tokens.paths[0], "token file of this tokenizer"):
                self.text = tokenizer.decode_bytes(ids[ids != tokenizer.eot_id].tolist())
        self.bytes_per_token = len(self.text) / len(ids)  # 0 if unknown
        counts = np.bincount(ids)
        shares = counts[counts > 0] / len(ids)
        self.unigram_loss = -float((shares * np.log(shares)).sum())

    @torch.no_grad()
    def loss(
        self, model: TransformerWithLoss, batch_size: int, autocast: Any = None,
        signals: Sequence[int] = (),
    ) -> float | None:
        """Collective: the mean loss of all tokens, in nats; None if `signals` isn't empty.

        It doesn't depend on batch_size or the number of processes.
        """
        rank, world_size, training = get_rank(), get_world_size(), model.training
        sums, stopped = torch.zeros(2, dtype=torch.float64), False  # nats, tokens
        model.eval()  # switches off dropout, if somebody adds it
        for first in range(0, len(self.starts), batch_size * world_size):
            # Every process must take part in every forward pass, with tensors of the same
            # shape. Unfilled positions stay -100, which the loss skips.
            windows = torch.full((batch_size, self.T + 1), -100)
            mine = self.starts[first + rank : first + batch_size * world_size : world_size]
            for row, start in zip(windows, mine):
                ids = torch.from_numpy(self.tokens[start : start + self.T + 1])
                row[: len(ids)] = ids
            windows = windows.to(model.rope_cache.device)
            inputs, targets = windows[:, :-1].clamp(min=0), windows[:, 1:]  # (B, T) each
            with autocast or contextlib.nullcontext(), without_compiling():
                loss = model(inputs, targets)
            count = int((targets >= 0).sum())
            sums += torch.tensor([loss.item() * count, count])
            if stopped := any_process(signals):
                break
        reshard(model)
        model.train(training)
        nats, count = sum_over_processes(sums).tolist()
        return None if stopped else nats / count

    def report(self, loss: float, compare: bool = False) -> tuple[dict[str, float], str]:
        """A loss per token in other units: as a dictionary, and as text for the log.

        WHY per byte: a small vocabulary has short tokens that are easy to guess, so losses per
        token can't be compared between tokenizers. Bytes are the same for all.

        If `compare`, also what two simple models of this text reach. A unigram model knows how
        often each token occurs in it and nothing else. lzma, the method of xz, finds
        repetitions. A language model that has learned something beats the first clearly; one
        that beats the second knows more than this text's own repetitions.
        """
        result = {"valid_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        text = f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.2f}"
        if self.text:
            nats, bits = loss / self.bytes_per_token, loss / self.bytes_per_token / math.log(2)
            result |= {"nats_per_byte": nats, "bits_per_byte": bits}
            text += f", {nats:.4f} nats = {bits:.4f} bits per byte"
            if floor := self.tokens.floor:
                result["floor_nats_per_byte"] = floor
                text += f"; the floor is {floor:.4f} nats, this is {nats / floor - 1:+.1%}"
        if compare:
            result["unigram_loss"] = self.unigram_loss
            text += f"\nbaselines: token frequencies alone {self.unigram_loss:.4f} nats"
        if compare and self.text:
            bits = self.unigram_loss / self.bytes_per_token / math.log(2)
            # Preset 9 is 6 with a larger dictionary: no gain below 8 MiB, and more memory.
            size = len(lzma.compress(self.text, preset=6 | lzma.PRESET_EXTREME))
            lzma_bits = 8 * size / len(self.text)
            result |= {"unigram_bits_per_byte": bits, "lzma_bits_per_byte": lzma_bits}
            text += f" = {bits:.4f} bits per byte, lzma {lzma_bits:.4f} bits per byte"
        return result, text


def unknown_ids(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Ids of the model that the tokenizer lacks. They have no text, so they are never drawn.

    A model's vocabulary is often padded to a multiple of 64 or so, for faster matmuls.
    """
    ids = [i for i in range(vocab_size) if i not in tokenizer.vocab]
    return torch.tensor(ids, dtype=torch.int64)


# Logging
# -------


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of one token's forward and backward pass.

    6 for each weight in a matmul (2 forward, 4 backward), and 6 * T * D per block for attention
    (Chowdhery et al. 2022, PaLM, appendix B, halved, since the mask hides half of the scores).
    Worked example: one block of width 2 with d_ff 3 has 4 * 4 + 3 * 6 = 34 weights, the head
    5 * 2, tied or not, and attention counts as 7 * 2: 6 * (34 + 10 + 14) = 348.

    >>> flops_per_token(ModelConfig(5, 7, num_layers=1, d_model=2, num_heads=1, d_ff=3))
    348
    """
    c = config
    kv_width = c.num_kv_heads * c.head_dim
    block = 2 * c.d_model**2 + 2 * c.d_model * kv_width + 3 * c.d_model * c.d_ff
    attention = c.num_layers * c.context_length * c.d_model
    return 6 * (c.num_layers * block + c.vocab_size * c.d_model + attention)


# Peak TFLOP/s of dense bfloat16 matmuls, from the vendors' data sheets. The log shows what
# fraction of it the model's arithmetic uses: MFU, model FLOPs utilization.
PEAK_TFLOPS = {
    "A100": 312, "A10G": 70, "A40": 150, "B200": 2250, "H100 NVL": 835, "H100 PCIe": 756,
    "H100": 989, "H200": 989, "L4": 121, "L40": 181, "L40S": 362, "RTX 3090": 71,
    "RTX 4090": 165, "RTX 5090": 210,
}


def flags_to_save(*configs: Config) -> dict:
    """Flags as plain values with absolute paths, for a checkpoint, by name."""
    omitted = ("given", "outdir", "resume", "tokenizer_path")  # outdir has a copy of the last
    flags = {name: value for config in configs for name, value in vars(config).items()
             if name not in omitted}
    return json.loads(json.dumps(flags, default=lambda path: str(path.absolute())))


def restore_flags(state: dict, *configs: Config) -> None:
    """Fill in the flags that the user didn't pass from a checkpoint's run."""
    saved = state.get("run", {})
    with file_errors(state["path"], "checkpoint"):
        check_types(saved, dict.fromkeys(("train_tokens", "valid_tokens"), list | None))
        for config in configs:
            passed = {"given", *(saved if config.given is None else config.given)}
            if "lr" in passed:
                passed.add("min_lr")  # a tenth of it
            for name in vars(config).keys() & saved.keys() - passed:
                setattr(config, name, saved[name])
            config.__post_init__()


def import_optional(module: str, package: str) -> Any:
    """An optional module. Raises UserError that names its package if that's missing."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)
    raise UserError(f"this needs the package {package}: pip install {package}, or "
                    f"uv run --with {package} scratchformer.py ...")


def json_line(record: dict) -> str:
    """`record` as one line. JSON has no NaN and no infinity: they become null."""
    return json.dumps({name: None if isinstance(x, float) and not math.isfinite(x) else x
                       for name, x in record.items()})


class Metrics:
    """metrics.jsonl: one JSON object per logged step, as if no run had been interrupted."""

    def __init__(self, outdir: Path, last_step: int, tensorboard: bool):
        """Keep what an interrupted run wrote up to `last_step`, and drop what came after."""
        self.path, self.board, kept = outdir / "metrics.jsonl", None, []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else []:
            with contextlib.suppress(Exception):  # the last line of a killed run is cut short
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + b"\n")
        with atomic_write(self.path) as file:
            file.writelines(kept)
        if tensorboard:
            module = import_optional("torch.utils.tensorboard", "tensorboard")
            self.board = module.SummaryWriter(str(outdir), purge_step=last_step + 1)

    def write(self, record: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_line(record) + "\n")
        except OSError as error:  # a full disk, which may have room again later
            log(f"{self.path}: {error.strerror}")
        if self.board:
            for name in record.keys() - {"step"}:
                self.board.add_scalar(name, record[name], record["step"])
            self.board.flush()


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """The numbers of signals received: Ctrl-C, SIGTERM, SIGHUP. A second Ctrl-C exits."""
    received: list[int] = []

    def listen(reader: int) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if not received:
                    start = time.monotonic()
                    log("stopping after this step; Ctrl-C again to quit without saving")
                # torchrun and the terminal may both pass on one Ctrl-C: hence one second.
                elif number[0] == signal.SIGINT and time.monotonic() - start > 1:
                    os._exit(128 + number[0])
                received.append(number[0])

    # Signals that are ignored stay ignored: that's how nohup works.
    before = {number: signal.signal(number, lambda *_: None) for number in signal.Signals
              if number.name in ("SIGINT", "SIGTERM", "SIGHUP")
              and signal.getsignal(number) != signal.SIG_IGN}
    # WHY a thread: Python runs a handler between two of its own instructions, and one
    # backward pass can take a minute. The number of the signal arrives in the pipe at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=listen, args=(reader,), daemon=True).start()
    try:
        yield received
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)


# Exercises
# 1. Leave out `/ micro_steps` in `step` and train with --grad_accum_steps 4. Loss and gradient
#    norm are four times what they were, yet the model learns nearly as before, because clipping
#    and AdamW both divide the factor out. Only the log shows it: the loss starts at 4 ln V.
# 2. Log the norm of the weights beside that of the gradients: one line in `log_step`. It grows
#    while the model learns.


# ========================================================================================
# PART FOUR: IN USE
# ========================================================================================

# ----------------------------------------------------------------------------------------
# 13. Hugging Face
#
# How does a model trained here run in other tools, and how do we load models trained elsewhere?
# Our architecture is Llama's, so only names and the order of some rows differ. We rotate pairs
# of neighbors (2i, 2i+1), as the RoPE paper does; Hugging Face's Llama rotates (i, i + K/2).
# Reordering the rows of the query and key matrices makes up for it: both are reordered alike,
# so their dot products stay the same.
# (transformers, modeling_llama.py: rotate_half, apply_rotary_pos_emb)
#
# This chapter can wait. (Chapter 6 uses one function of it, for models of Llama 3.1.)
# ----------------------------------------------------------------------------------------

# The Hugging Face matrices which, concatenated by rows, are our matrix of this name.
HF_NAMES = {
    "embedding": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.output": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
ROTARY_WEIGHTS = ("q_proj.weight", "k_proj.weight")
# Our fields and their names in config.json.
HF_FIELDS = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers", "d_model": "hidden_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What config.json must say, since our architecture supports nothing else.
HF_REQUIRED = {
    "model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
}
HF_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HF_ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings")


def llama3_rope_scaling(
    frequencies: Tensor, factor: float, low: float, high: float, original_context: float
) -> Tensor:
    """Llama 3.1's way to a longer context: slow rotations become `factor` times slower.

    Pairs that turn fewer than `low` times within the original context saw few angles in
    training, and a longer text would show them new ones. Those that turn more than `high`
    times stay as they are; in between, the two are blended. (Source:
    github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling; transformers
    calls it rope_type "llama3".)
    """
    turns = original_context * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def hf_names(name: str) -> list[str]:
    """The Hugging Face names of our matrix `name`.

    >>> hf_names("blocks.7.mlp.gate_up.weight")
    ['model.layers.7.mlp.gate_proj.weight', 'model.layers.7.mlp.up_proj.weight']
    """
    part, prefix = name.removesuffix(".weight"), ""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", part):
        prefix, part = f"model.layers.{match[1]}.", match[2]
    return [f"{prefix}{theirs}.weight" for theirs in HF_NAMES[part]]


def interleaved_to_half_split(weight: Tensor, head_dim: int, inverse: bool = False) -> Tensor:
    """Rows of a query or key matrix [H * K, D], reordered from our pairs to Hugging Face's.

    Within each head, row 2i goes to i, and row 2i + 1 to i + K/2. `inverse` undoes this.

    >>> interleaved_to_half_split(torch.arange(4.0)[:, None], 4)[:, 0]
    tensor([0., 2., 1., 3.])
    """
    pairs = (-1, 2, head_dim // 2) if inverse else (-1, head_dim // 2, 2)
    return weight.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def to_hf(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names, with its order of rows."""
    result = {}
    for name, weight in weights.items():
        for theirs, part in zip(hf_names(name), weight.split(split_sizes(name, weight))):
            if theirs.endswith(ROTARY_WEIGHTS):
                part = interleaved_to_half_split(part, config.head_dim)
            result[theirs] = part
    return result


def from_hf(files: dict[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's weights under our names, in our order, as float32.

    `files` maps each of its names to an open file. Raises UserError, before any weight is
    read, if these aren't exactly the weights of such a model.
    """
    with torch.device("meta"):  # only names and shapes matter
        model: dict[str, Any] = dict(Transformer(config).named_parameters())
    expected = to_hf(model, config)
    for theirs, weight in expected.items():
        if theirs not in files:
            raise UserError(f"it has no {theirs}")
        stored, shape = files[theirs].get_slice(theirs), list(weight.shape)
        if stored.get_shape() != shape:
            raise UserError(f"its {theirs} is {stored.get_shape()}, but config.json needs "
                            f"{shape}")
        if stored.get_dtype() not in ("F32", "BF16", "F16"):
            raise UserError(f"its {theirs} is quantized ({stored.get_dtype()})")
    # Some files hold a tied matrix twice, and old ones RoPE's frequencies. Both are ignored.
    if extra := sorted(name for name in files.keys() - expected.keys() - {"lm_head.weight"}
                       if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"its {extra[0]} has no place in our architecture")

    def read(theirs: str) -> Tensor:
        weight = files[theirs].get_tensor(theirs).float()
        if theirs.endswith(ROTARY_WEIGHTS):
            weight = interleaved_to_half_split(weight, config.head_dim, inverse=True)
        return weight

    return {name: torch.cat([read(theirs) for theirs in hf_names(name)]) for name in model}


def config_to_hf(config: ModelConfig, special_ids: dict, dtype: str) -> dict:
    """The config.json that makes `transformers` build our architecture."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := config.rope_scaling:
        rope = dict(zip(HF_ROPE_SCALING, [*scaling[:3], int(scaling[3])]), rope_type="llama3")
    return {
        "architectures": ["LlamaForCausalLM"],
        **HF_REQUIRED,
        **{theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()},
        "head_dim": config.head_dim,
        # For transformers from version 5, and for older ones and other programs.
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_scaling": rope if scaling else None,
        **special_ids,
        "dtype": dtype,  # today's name
        "torch_dtype": dtype,
    }


def config_from_hf(content: dict) -> ModelConfig:
    """Our configuration for a config.json. Raises UserError for another architecture."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    found = {
        "model_type": "unknown", "num_key_value_heads": content.get("num_attention_heads"),
        "tie_word_embeddings": False, "rope_theta": 10000.0,
        "rope_type": rope.get("type", "default"),
        **{name: value for name, value in {**content, **rope}.items() if value is not None},
    }
    fields: dict[str, Any] = {}
    if found["rope_type"] == "llama3":
        fields["rope_scaling"] = [float(rope[name]) for name in HF_ROPE_SCALING]
    required = {**HF_REQUIRED, "rope_type": "llama3" if fields else "default",
                "partial_rotary_factor": 1.0, "quantization_config": None}
    for name, value in required.items():
        if found.get(name, value) != value:
            raise UserError(f"its {name} is {found[name]!r}, but we need {value!r}")
    for ours, theirs in HF_FIELDS.items():
        value, kind = found.get(theirs), typing.get_type_hints(ModelConfig)[ours]
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise UserError(f"its {theirs} is {value!r}, not of type {kind.__name__}")
        fields[ours] = value
    config = ModelConfig(**fields)
    if found.get("head_dim", config.head_dim) != config.head_dim:
        raise UserError(f"its head_dim is {found['head_dim']}, where hidden_size / "
                        f"num_attention_heads is {config.head_dim}")
    return config


def load_hf_model(directory: Path) -> dict:
    """A model saved by `transformers`, as a checkpoint without optimizer state."""
    safetensors = import_optional("safetensors", "safetensors")
    content = read_json(directory / "config.json", "config.json of a model")
    with file_errors(directory, "Llama model"):
        config = config_from_hf(content)
        # Like transformers: one file of this name, or those that the index names.
        names, index = ["model.safetensors"], directory / "model.safetensors.index.json"
        if not (directory / names[0]).is_file() and index.is_file():
            names = sorted(set(read_json(index, "index of weights")["weight_map"].values()))
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise UserError(f"it has no {missing[0]}")
        opened = [safetensors.safe_open(directory / name, "pt") for name in names]
        weights = from_hf({key: file for file in opened for key in file.keys()},  # noqa: SIM118
                          config)
        if (generation := directory / "generation_config.json").is_file():
            content |= read_json(generation, "generation_config.json")
        special_ids = {key: content[key] for key in HF_SPECIAL_IDS
                       if content.get(key) is not None}
    return {"model": weights, "model_config": dataclasses.asdict(config), "step": 0,
            "path": str(directory), "special_ids": special_ids}


def save_hf_model(state: dict, tokenizer: Tokenizer, outdir: Path, dtype: str) -> None:
    """Write a checkpoint as a directory that from_pretrained loads, tokenizer included."""
    save = import_optional("safetensors.torch", "safetensors").save
    config = ModelConfig(**state["model_config"])
    weights = {name: weight.to(getattr(torch, dtype)).contiguous().clone()
               for name, weight in to_hf(state["model"], config).items()}
    with atomic_write(outdir / "model.safetensors") as file:
        file.write(save(weights, {"format": "pt"}))
    eot, ids = tokenizer.eot_id, state.get("special_ids")
    if ids is None:
        ids = {} if eot is None else dict.fromkeys(HF_SPECIAL_IDS, eot)
    write_json(outdir / "config.json", config_to_hf(config, ids, dtype))
    write_json(outdir / "generation_config.json", {"_from_model_config": True, **ids})
    tokenizer.save(outdir / "tokenizer.json")
    names = {i: token for token, i in tokenizer.special_tokens.items()}
    first_ids = {key: i[0] if isinstance(i, list) else i for key, i in ids.items()}
    write_json(outdir / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
        **{key.removesuffix("_id"): names[i] for key, i in first_ids.items() if i in names},
    })


# Exercises
# 1. Make `interleaved_to_half_split` return its argument. transformers loads the model without
#    complaint, and its logits are wrong: a test fails where no error message appears.
# 2. Export with --dtype bfloat16 and compare the logits of some text with ours: they differ by
#    about 1%, as one expects from 8 significant bits.


# ----------------------------------------------------------------------------------------
# 14. Command line
#
# How do you run all this? A command is a function, its parameters are dataclasses, and
# their fields are the flags: type, default and help of a flag are in one place. To add a
# command, write a function and add it to COMMANDS. The exit status is 0 if all went well,
# 2 for an error the user can fix, and 128 + n after signal n.
#
# The last command, `demo`, runs most of the others. This chapter can wait.
# ----------------------------------------------------------------------------------------


def load_any_checkpoint(path: Path) -> dict:
    """A checkpoint, a run's newest one, or the model in a Hugging Face Llama directory."""
    return load_hf_model(path) if (path / "config.json").is_file() else load_checkpoint(path)


def find_tokenizer(checkpoint: Path) -> Path | None:
    """The copy of the tokenizer in the checkpoint's directory, if training left one there."""
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "tokenizer.json"
    return path if path.is_file() else None


# train
# -----


def check_shape(c: ModelConfig) -> None:
    """Raise UserError if the fields of a ModelConfig contradict each other."""
    if c.num_heads % c.num_kv_heads:
        raise UserError(f"num_heads must be divisible by num_kv_heads: {c.num_heads} / "
                        f"{c.num_kv_heads}")
    if (r := c.rope_scaling) and not (len(r) == 4 and min(r) > 0 and r[1] < r[2]):
        raise UserError(f"rope_scaling must be four numbers above 0, the second below the "
                        f"third, not {r}")
    shape = f"{c.d_model} / {c.num_heads}"
    if c.d_model % c.num_heads:
        raise UserError(f"d_model must be divisible by num_heads: {shape}")
    if c.head_dim % 2:
        raise UserError("the head size d_model / num_heads must be even, because RoPE "
                        f"rotates pairs: {shape} = {c.head_dim}")


def check_schedule(c: OptimizerConfig) -> None:
    """Raise UserError if the fields of an OptimizerConfig contradict each other."""
    if c.min_lr > c.lr:
        raise UserError(f"--min_lr must be at most --lr: {c.min_lr} > {c.lr}")
    if c.warmup_steps > c.max_steps:
        raise UserError(f"--warmup_steps {c.warmup_steps} exceed --max_steps {c.max_steps}")


class ModelFlags(ModelConfig):
    """Model"""

    def __init__(self, **given: Any):
        # Only the flags that the user passed. The others get their values later: from the model
        # that training starts from, or from ModelConfig's defaults.
        self.given = given


# Vocabulary and model for a text: the last row whose requirements (MB of text, and minutes on a
# CPU or on a GPU) are met. A larger model learns more per token and is slower; on little text
# it memorizes.
PRESETS = """
MB   CPU  GPU  vocab_size context_length num_layers d_model num_heads d_ff batch_size lr
0    0    0    1024       256            2          128     4         352  8          1e-2
1    0    0    2048       256            4          128     4         352  8          1e-2
3    20   0    4096       256            4          256     8         704  16         6e-3
10   180  0    8192       512            6          384     6         1024 16         4e-3
50   inf  5    16384      512            8          512     8         1408 32         3e-3
200  inf  20   32768      512            8          768     12        2048 64         2e-3
"""

PRESET_FLAGS = ("context_length", "num_layers", "d_model", "num_heads", "d_ff", "batch_size")


def choose_preset(megabytes: float, minutes: float, device: str) -> dict[str, str]:
    """The last line of PRESETS whose minimum text and minutes are met, by name.

    >>> choose_preset(4.0, 60, "cpu")["d_model"], choose_preset(4.0, 5, "cpu")["d_model"]
    ('256', '128')
    """
    names, *lines = (line.split() for line in PRESETS.strip().splitlines())
    sizes = [dict(zip(names, line)) for line in lines]
    column = "GPU" if device == "cuda" else "CPU"
    return [size for size in sizes
            if float(size["MB"]) <= megabytes and float(size[column]) <= minutes][-1]


def small_defaults(given: Collection[str]) -> dict[str, int]:
    """A smaller shape and batch size, for a CPU; {} if any of these flags is `given`.

    >>> small_defaults(["vocab_size"])["num_layers"], small_defaults(["num_layers"])
    (4, {})
    """
    preset = choose_preset(1.0, 0.0, "cpu")
    small = {name: int(preset[name]) for name in PRESET_FLAGS}
    return {} if {*small, "num_kv_heads"} & {*given} else small


def load_initial_state(run: RunConfig) -> dict:
    """What training starts from: a state to resume, a model's weights, or {}. Process 0 only.

    Raises UserError rather than mix a fresh run with the files of another.
    """
    logs = [path for path in run.outdir.glob("metrics.jsonl") if path.stat().st_size]
    if not run.resume and (found := logs + checkpoints_in(run.outdir)):
        raise UserError(f"{run.outdir} holds {found[-1].name}: continue it with --resume, or "
                        f"choose another --outdir")
    if run.resume:
        if state := load_newest(run.outdir):
            return {**state, "resumable": "optimizer" in state}
        log(f"no checkpoint to resume from in {run.outdir}: starting fresh")
    if not run.init_from:
        return {}
    state = load_any_checkpoint(run.init_from)
    model_from_checkpoint(state)  # raises UserError if weights and shape don't match
    kept = {"model", "model_config", "path", "tokenizer_sha256"} & state.keys()
    return {"step": 0, **{name: state[name] for name in kept}}


def resolve_model_config(passed: dict, start: dict) -> ModelConfig:
    """The shape in `passed`, the user's flags, or the model's in `start`, if they agree.

    context_length may differ for --init_from, because no weight depends on it.

    >>> start = {"model_config": vars(ModelConfig(500, 64, 2, 32, 2, 64)), "step": 0}
    >>> config = resolve_model_config({"context_length": 128, "num_layers": 2}, start)
    >>> config.context_length, config.d_model
    (128, 32)
    """
    automatic = (("vocab_size", 0), ("num_kv_heads", 0))
    passed = {k: v for k, v in passed.items() if (k, v) not in automatic}
    if not start:
        return ModelConfig(**passed)
    shape = vars(ModelConfig(**start["model_config"]))  # old checkpoints lack newer fields
    for name, value in passed.items():
        if value != shape[name] and (name != "context_length" or start["step"]):
            raise UserError(f"--{name} is {value}, but the model in {start['path']} has "
                            f"{shape[name]}")
    return ModelConfig(**{**shape, **passed})


def load_tokenizer(path: Path | None, hashes: dict, vocab_size: int) -> Tokenizer | None:
    """The tokenizer at `path`, if any. Raises UserError if another made what has `hashes`."""
    tokenizer = Tokenizer.load(path) if path else None
    check_same_tokenizer({**hashes, path: tokenizer.fingerprint() if tokenizer else None})
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path} has more ids than the model: {tokenizer.vocab_size}, not "
                        f"{vocab_size}")
    return tokenizer


def prepare_outdir(
    outdir: Path, tokenizer: Tokenizer | None, stack: contextlib.ExitStack
) -> None:
    """Make outdir, with a copy of the tokenizer. Only process 0 does anything.

    Raises UserError if another run uses outdir; no other can until `stack` is closed.
    """
    if not is_main_process():
        return
    outdir.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        import fcntl

        stack.callback(os.close, directory := os.open(outdir, os.O_RDONLY))
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except BlockingIOError:
            raise UserError(f"another run is writing to {outdir}") from None
        except OSError:  # a file system without locks
            pass
    for leftover in outdir.glob(".*.pt.*.tmp"):  # by a process that was killed
        leftover.unlink()
    if tokenizer:
        tokenizer.save(outdir / "tokenizer.json")


def open_run(
    start: dict, data: DataConfig, model_flags: ModelFlags, optim: RunOptimizerConfig,
    run: RunConfig, device: torch.device,
) -> tuple[ModelConfig, TokenDataset, ValidationSet | None, Tokenizer | None]:
    """Resolve the flags and open the files: shape, training data, validation data, tokenizer.

    Only process 0 gets the tokenizer. Raises UserError unless all of them fit each other.
    """
    passed, small = model_flags.given or {}, dict[str, int]()
    if start.get("step"):
        restore_flags(start, data, optim, run)
    elif not start and device.type == "cpu":
        small = small_defaults({*passed, *(data.given or ())})
        data.batch_size = small.pop("batch_size", data.batch_size)
    config = resolve_model_config({**passed, **small}, start)
    if not data.train_tokens:
        raise UserError("--train_tokens is required: token files to learn from")
    tokens, valid, tokenizer = TokenDataset(data.train_tokens, config.vocab_size), None, None
    tokens.check_length(config.context_length)
    config.vocab_size = tokens.vocab_size
    datasets = [tokens]
    if data.valid_tokens:
        datasets.append(TokenDataset(data.valid_tokens, config.vocab_size))
    for dataset in datasets:
        dataset.check_ids(get_rank(), get_world_size())
    # Process 0 alone reads and writes outdir, and reads init_from and the tokenizer; it tells
    # the others what it found. Token files are read by all.
    if is_main_process():
        path = data.tokenizer_path or (start and find_tokenizer(Path(start["path"])))
        if run.sample_interval and not path:
            raise UserError("--sample_interval needs --tokenizer_path")
        hashes: dict[Any, Any] = {x.paths[0]: x.tokenizer_sha256 for x in datasets}
        hashes[start.get("path")] = start.get("tokenizer_sha256")
        tokenizer = load_tokenizer(path or None, hashes, config.vocab_size)
    if data.valid_tokens:
        valid = ValidationSet(datasets[1], config.context_length, run.eval_windows, tokenizer)
    if small:
        flags = " ".join(f"--{name} {value}" for name, value in small.items())
        log(f"on a CPU the defaults are small: {flags} --batch_size {data.batch_size}")
    return config, tokens, valid, tokenizer


def train(
    data: DataConfig, model_flags: ModelFlags, optim: RunOptimizerConfig, run: RunConfig,
    devices: DeviceConfig, processes: ProcessConfig,
) -> int:
    """Train a Transformer on token files. Under torchrun, on many devices.

    On a CPU, if neither the model's shape nor --batch_size is given, both are small.
    """
    use_cuda = devices.device != "cpu" and torch.cuda.is_available()
    with (
        process_group(torch.device("cuda" if use_cuda else "cpu")),
        catch_signals() as signals,
        contextlib.ExitStack() as stack,
    ):
        on_every_process(processes.check)
        device = on_every_process(lambda: pick_device(devices.device))
        dtype = on_every_process(lambda: pick_dtype(devices.dtype, device))
        saved = on_every_process(lambda: load_initial_state(run) if is_main_process() else {})
        start = broadcast({k: x for k, x in saved.items() if k not in ("model", "optimizer")})
        config, tokens, valid, tokenizer = on_every_process(
            lambda: open_run(start, data, model_flags, optim, run, device))
        if (first_step := start.get("step", 0)) >= optim.max_steps:
            log(f"nothing left to do: {run.outdir} holds a checkpoint of step {first_step}, "
                f"and --max_steps is {optim.max_steps}")
            return 0
        if first_step and not start["resumable"]:
            raise SharedError(f"{start['path']} has no optimizer state (--weights_only): start "
                              "from it with --init_from, or remove it")
        on_every_process(lambda: prepare_outdir(run.outdir, tokenizer, stack))
        trainer = Trainer(
            model_config=config, data=data, optim=optim, run_config=run, processes=processes,
            device=device, dtype=dtype, tokens=tokens, valid=valid,
            tokenizer=broadcast(tokenizer))
        if start:
            trainer.restore(saved, start)
        saved = None  # frees its tensors
        return trainer.run(first_step, signals)


# eval, generate, export
# ----------------------


@dataclasses.dataclass(kw_only=True)
class SavedModelConfig(Config):
    """Model"""

    checkpoint: Path = flag(
        ..., "a checkpoint, a run's directory, or a Hugging Face Llama directory")
    tokenizer_path: Path | None = flag(None, "tokenizer.json (default: beside the checkpoint)")

    def load(
        self, *options: Any, need_tokenizer: bool = True
    ) -> tuple[dict, TransformerWithLoss, Any]:
        """The checkpoint; its model, given `options`; and the tokenizer, perhaps None."""
        state = load_any_checkpoint(self.checkpoint)
        model = model_from_checkpoint(state, *options)
        path = self.tokenizer_path or find_tokenizer(self.checkpoint)
        if need_tokenizer and not path:
            raise UserError(f"no tokenizer beside {self.checkpoint}: give --tokenizer_path")
        hashes = {self.checkpoint: state.get("tokenizer_sha256")}
        return state, model, load_tokenizer(path, hashes, model.config.vocab_size)


@dataclasses.dataclass(kw_only=True)
class EvalConfig(SavedModelConfig):
    """Evaluation"""

    valid_tokens: list[Path] | None = flag(None, "token files to evaluate on")
    text_path: list[Path] | None = flag(None, "text files to evaluate on, instead")
    context_length: int | None = flag(None, "tokens per window (default: the model's)", 1)
    batch_size: int = flag(16, "sequences at a time", 1)
    eval_windows: int = flag(1024, "windows to evaluate on; 0: all", 0)


def evaluate_command(config: EvalConfig, devices: DeviceConfig) -> None:
    """Measure a model's loss on token files or on text."""
    if bool(config.valid_tokens) == bool(config.text_path):
        raise UserError("give either --valid_tokens or --text_path")
    device = pick_device(devices.device)
    autocast = make_autocast(device, pick_dtype(devices.dtype, device))
    state, model, tokenizer = config.load(
        device, torch.float32, config.context_length, need_tokenizer=bool(config.text_path))
    with tempfile.TemporaryDirectory() as directory:
        paths = config.valid_tokens or [Path(directory) / "text.bin"]
        if config.text_path:
            encode_file(tokenizer, config.text_path, paths[0])
        tokens = TokenDataset(paths, model.config.vocab_size)
        made_by = state.get("tokenizer_sha256") or (tokenizer and tokenizer.fingerprint())
        check_same_tokenizer(
            {tokens.paths[0]: tokens.tokenizer_sha256, config.checkpoint: made_by})
        valid = ValidationSet(
            tokens, model.config.context_length, config.eval_windows, tokenizer)
        loss = valid.loss(model, config.batch_size, autocast)
        assert loss is not None  # no signal stops it
        report, text = valid.report(loss, compare=True)
    log(text)
    print(json_line(report))


@dataclasses.dataclass(kw_only=True)
class GenerateConfig(SavedModelConfig):
    """Text"""

    prompt: str | None = flag(None, "text to continue (default: from standard input)")
    prompt_path: Path | None = flag(None, "file with one prompt per line")
    max_new_tokens: int = flag(256, "maximum number of new tokens", 1)
    num_samples: int = flag(1, "samples per prompt", 1)
    batch_size: int = flag(64, "samples to generate at the same time", 1)
    context_length: int | None = flag(None, "context window (default: the model's)", 1)
    temperature: float = flag(0.8, "0: always the most likely token; 1: unmodified", 0.0)
    top_k: int | None = flag(None, "sample from the k most likely tokens", 1)
    top_p: float | None = flag(
        None, "sample from the most likely tokens that together reach p", 0.0, 1.0)
    seed: int | None = flag(
        None, "the same seed gives the same text; the next text uses seed + 1", 0, 2**32)


def read_prompts(config: GenerateConfig) -> Iterator[list[str]]:
    """From the flags; or line by line from a terminal, or all of standard input."""
    if config.prompt is not None and config.prompt_path:
        raise UserError("give either --prompt or --prompt_path")
    if config.prompt is not None:
        yield [config.prompt]
    elif config.prompt_path:
        with open(config.prompt_path, encoding="utf-8", errors="replace") as file:
            yield [line.removesuffix("\n") for line in file]
    elif sys.stdin.isatty():
        log("type a prompt (Ctrl-D to quit)")
        print("> ", end="", file=sys.stderr, flush=True)
        while line := sys.stdin.readline():
            yield [line.rstrip("\n")]
            print("> ", end="", file=sys.stderr, flush=True)
    else:
        yield [sys.stdin.read().removesuffix("\n")]  # `echo` adds a newline


def generate_command(config: GenerateConfig, devices: DeviceConfig) -> None:
    """Write text with a trained model."""
    device = pick_device(devices.device)
    dtype = pick_dtype(devices.dtype, device)
    state, model, tokenizer = config.load(device, dtype, config.context_length)
    use_all_cores(model)
    decoder = CUDAGraphDecoder if device.type == "cuda" else CachedModel
    eot = tokenizer.eot_id
    eos = state.get("special_ids", {}).get("eos_token_id", eot)  # a number, a list or None
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    sampling: dict[str, Any] = {
        "eos_ids": eos_ids, "temperature": config.temperature, "top_k": config.top_k,
        "top_p": config.top_p,
        "suppressed": unknown_ids(tokenizer, model.config.vocab_size).to(device)}
    seeds = itertools.count(torch.seed() % 2**32 if config.seed is None else config.seed)
    for prompts in read_prompts(config):
        texts = [prompt for prompt in prompts for _ in range(config.num_samples)]
        for first in range(0, len(texts), config.batch_size):
            batch = texts[first : first + config.batch_size]
            rows = [tokenizer.encode(p) or ([] if eot is None else [eot]) for p in batch]
            size = min(model.config.context_length,
                       max(map(len, rows)) + config.max_new_tokens)  # of the cache
            generators = [torch.Generator(device).manual_seed(next(seeds)) for _ in rows]
            new = generate_batch(model, rows, config.max_new_tokens, generators=generators,
                                 cached_model=decoder(model, len(rows), size), **sampling)
            # A single text is printed token by token. Several are printed one after the other,
            # when all are complete.
            columns: Any = zip(*new) if len(rows) > 1 else [(ids[0] for ids in new)]
            for number, (prompt, ids) in enumerate(zip(batch, columns), first + 1):
                if len(texts) > 1:
                    print(f"--- sample {number} of {len(texts)} ---")
                print(prompt, end="", flush=True)
                shown = (i for i in ids if i is not None and i not in eos_ids)
                for text in stream_text(tokenizer, shown):
                    print(text, end="", flush=True)
                print()


@dataclasses.dataclass(kw_only=True)
class ExportConfig(SavedModelConfig):
    """Export"""

    outdir: Path = flag(..., "directory for the files")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "type of the weights")


def export(config: ExportConfig) -> None:
    """Write a directory that transformers loads with from_pretrained."""
    if checkpoints_in(config.outdir) or config.outdir.resolve() == config.checkpoint.resolve():
        raise UserError(f"{config.outdir} holds a model that the export would hide: choose "
                        f"another --outdir")
    state, _, tokenizer = config.load()
    save_hf_model(state, tokenizer, config.outdir, config.dtype)
    log(f"{config.outdir}: load it with AutoModelForCausalLM.from_pretrained")


# split, demo
# -----------


@dataclasses.dataclass(kw_only=True)
class SplitConfig(Config):
    """Text"""

    text_path: list[Path] = flag(..., "text files, or directories of them")
    outdir: Path = flag(..., "directory for train.txt, valid.txt and special_tokens.txt")


def split_documents(text: str, size: int) -> list[str]:
    """The documents in `text`; where one is longer than `size`, parts of it, cut after lines.

    >>> split_documents("one\\ntwo\\nthree<|endoftext|>four", 8)
    ['one\\ntwo\\n', 'three', 'four']
    """
    part = re.compile(rf"(?s).{{1,{size}}}(?:(?<=\n)|\Z)|.{{1,{size}}}")
    return [found for document in text.split(END_OF_TEXT) if document.strip()
            for found in part.findall(document)]


def split(config: SplitConfig) -> None:
    """Split text into training documents and validation documents, a tenth of them.

    The hash of a document decides, so it stays on its side when others come or go, and copies
    of it are all on that side. Long documents, such as novels, are split into parts.
    """
    files = input_files(config.text_path)
    size = min(1 << 14, sum(file.end for file in files) // 40 + 1)
    counts = [0, 0]
    with (atomic_write(config.outdir / "train.txt") as train,
          atomic_write(config.outdir / "valid.txt") as valid):
        for document in (d for file in files for d in split_documents(file.read(), size)):
            data = text_to_bytes(document)
            side = hashlib.sha256(data).digest()[0] < 26  # of 256
            (train, valid)[side].write(data + END_OF_TEXT.encode())
            counts[side] += 1
        if not all(counts):
            raise UserError(f"too little text: {counts[0]} training documents and {counts[1]} "
                            "validation documents")
        log(f"training: {counts[0]:,} documents, {train.tell() / 1e6:,.2f} MB; "
            f"validation: {counts[1]:,} documents, {valid.tell() / 1e6:,.2f} MB")
    (config.outdir / "special_tokens.txt").write_text(END_OF_TEXT + "\n")


@dataclasses.dataclass(kw_only=True)
class DemoConfig(Config):
    """Demo"""

    text_path: list[Path] | None = flag(
        None, "your own text, files or directories (default: the bundled stories)")
    minutes: float | None = flag(
        None, "with --text_path: how long to train, at most (default: 5)", 0.1)
    outdir: Path | None = flag(
        None, "directory for its files (default: out/demo, or out/text)")
    max_steps: int | None = flag(
        None, "optimizer steps (default: 720, or as many as --minutes allow)", 1)


DEMO_FLAGS = (
    "--context_length 512 --num_layers 1 --d_model 128 --num_heads 4 --d_ff 256 --batch_size 4 "
    "--optimizer muon --lr 1e-2 --min_lr 1e-5 --log_interval 50 --eval_interval 400")


def demo(config: DemoConfig) -> int:
    """Run the whole pipeline on the bundled stories or your own text, showing each command."""
    out = config.outdir or Path("out/text" if config.text_path else "out/demo")
    if config.minutes and not config.text_path:
        raise UserError("--minutes needs --text_path")
    mark = out / ".made_by_demo"  # what an earlier demo made may be replaced
    if not mark.is_file() and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} contains files that no demo made: give another --outdir")
    if config.text_path and (found := checkpoints_in(out / "run")):
        raise UserError(f"{found[-1]} is a model of your text: give another --outdir, or "
                        f"continue it with train --resume --outdir {out / 'run'}")
    write_json(mark, {})
    for old in (out / "run", out / "trial"):
        for path in (*checkpoints_in(old), old / BEST, old / "metrics.jsonl"):
            path.unlink(missing_ok=True)
    quiet = ["--quiet"] * (not Progress.enabled)
    for command in demo_commands(config, out):
        argv = shlex.split(command)
        log("\n$ python scratchformer.py " + shlex.join(argv))
        if argv[0].startswith("bpe-"):  # a process without PyTorch can fork (chapter 4)
            status = subprocess.call([sys.executable, __file__, *argv, *quiet])
        else:
            status = main(argv + quiet)
        if status:
            return status
    return 0


def demo_commands(config: DemoConfig, out: Path) -> Iterator[str]:
    """Yields the demo's commands, in order. Each is run before the next one is asked for."""
    here, own_text = shlex.quote(str(out)), config.text_path
    if own_text:
        yield f"split --text_path {shlex.join(map(str, own_text))} --outdir {here}"
        minutes, device = config.minutes or 5.0, pick_device("auto").type
        megabytes = (out / "train.txt").stat().st_size / 1e6
        size = choose_preset(megabytes, minutes, device)
        log(f"\n{megabytes:.1f} MB, {minutes:g} minutes, {device}: {size['num_layers']} blocks "
            f"of width {size['d_model']}; a few steps show how fast it is")
        flags = " ".join(f"--{name} {size[name]}" for name in (*PRESET_FLAGS, "lr"))
        flags, vocab_size = f"{flags} --optimizer muon", size["vocab_size"]
        if device == "cuda" and has_compiler():  # on an H100, 2.5 times as fast
            flags += " --compile"
        source, texts, model, prompt = here, f"{here}/", f"{here}/run/{BEST}", "''"
    else:
        data = Path(__file__).parent / "data"
        if not data.is_dir():
            raise UserError("the demo's stories aren't installed: run it in a clone of the "
                            "source")
        source, flags, vocab_size = shlex.quote(str(data)), DEMO_FLAGS, "1536"
        texts, model, prompt = f"{source}/stories-", f"{here}/run", "Once"
    tokenizer = f"{here}/tokenizer.json"
    yield (f"bpe-train --file_path {texts}train.txt --vocab_size {vocab_size} "
           f"--special_tokens_path {source}/special_tokens.txt "
           f"--tokenizer_out_path {tokenizer}")
    for part in ("train", "valid"):
        yield (f"bpe-encode --dataset_path {texts}{part}.txt --tokenizer_path {tokenizer} "
               f"--out_path {here}/{part}.bin --append_eot")
    train = (f"train --train_tokens {here}/train.bin --valid_tokens {here}/valid.bin "
             f"--tokenizer_path {tokenizer} {flags}")
    if own_text:
        yield f"{train} --outdir {here}/trial --max_steps 8 --eval_windows 8"
        last = json.loads((out / "trial" / "metrics.jsonl").read_text().splitlines()[-1])
        tokens = 60 * minutes * last["tokens_per_second"] * 0.9  # the rest is for evaluation
        # Up to about four epochs are as good as new text (Muennighoff et al. 2023, arXiv
        # 2305.16264), and in our runs more than six gained nothing (README): take five.
        tokens = min(tokens, 5 * last["tokens_seen"] / last["epochs"])
        steps = config.max_steps or round(tokens * last["step"] / last["tokens_seen"]) or 1
        train += (f" --keep_best --eval_windows 128 --eval_interval {steps // 10 or 1} "
                  f"--log_interval {steps // 40 or 1}")
    else:
        steps = config.max_steps or 720
        train += f" --warmup_steps {steps // 40}"
    yield f"{train} --outdir {here}/run --max_steps {steps}"
    yield f"eval --checkpoint {model} --valid_tokens {here}/valid.bin"
    yield f"generate --checkpoint {model} --prompt {prompt} --seed 1"


COMMANDS |= {"train": train, "eval": evaluate_command, "generate": generate_command,
             "export": export, "split": split, "demo": demo}

# Exercises
# 1. Add a command that shows how a text is split: a dataclass with --tokenizer_path and --text,
#    a function of three lines that prints `tokenizer.decode_bytes([i])` for each id, and an
#    entry in COMMANDS. --help and suggestions for mistyped flags are there already.
# 2. Run `demo --max_steps 400` with another --outdir. The whole schedule shrinks with it. How
#    far above the floor does the model end, compared with the 720 steps of the demo?

if __name__ == "__main__":
    sys.exit(main())
