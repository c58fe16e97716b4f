"""What scratchformer.py promises, as tests: the same chapters, in the same order.

    pytest                  everything but the measurements; some minutes on two cores
    pytest -k merges        the tests whose names mention merges
    pytest -m "not slow"    without those that start several processes or train for long

Examples worked by hand stand in the docstrings. Within a chapter here stand properties of any
input, then an independent oracle (tiktoken, tokenizers, torch.nn, transformers), then
mistakes: one line on standard error, exit status 2, nothing written.
"""

import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import doctest
import html.parser
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import scratchformer
from scratchformer import (
    END_OF_TEXT,
    OPTIMIZERS,
    PRETOKEN_PATTERN,
    BPETokenizer,
    DataConfig,
    GradScaler,
    KVCache,
    LlamaConfig,
    ModelConfig,
    Muon,
    OptimizerConfig,
    RMSNorm,
    StaticCache,
    TokenFile,
    Tokenizer,
    Transformer,
    TransformerWithLoss,
    UserError,
    ValidationSet,
    adamw_naive,
    atomic_write,
    attention_naive,
    build_vocab,
    bytes_to_text,
    check_config,
    checkpoints_in,
    chunked_loss,
    count_files,
    count_pretokens,
    cross_entropy,
    encode_file,
    find_pretokens,
    generate,
    generate_naive,
    generate_texts,
    get_batch,
    gradient_norm,
    input_files,
    learn_merges,
    learn_merges_naive,
    load_batches,
    load_checkpoint,
    load_hf_model,
    local_params,
    main,
    make_adamw,
    make_scaled_adamw,
    model_from_checkpoint,
    muon_naive,
    open_tokens,
    orthogonalize,
    pretokenize,
    random_numbers,
    safe_pieces,
    sample,
    save_checkpoint,
    shuffle_windows,
    softmax,
    special_token_pattern,
    split_files,
    stream_text,
    take_local_gradients,
    text_to_bytes,
    to_hf,
    token_probabilities,
    tokenizer_to_json,
    train_bpe,
    train_model,
    validation_loss,
)  # fmt: skip

FILE = Path(scratchformer.__file__)
DATA = FILE.parent / "data"
CPU = torch.device("cpu")
slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has nothing of this kind")

hypothesis.settings.register_profile(
    "scratchformer", deadline=None, derandomize=True, max_examples=30,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
hypothesis.settings.load_profile("scratchformer")
torch.set_num_threads(1)  # tiny tensors: a second thread only gets in the way

# Every kind of white space, what looks like it (U+001C to U+001F, U+200B, U+180E), the
# contractions, letters with marks, digits that are not 0 to 9, special tokens and their
# beginnings, and bytes that are no UTF-8.
FRAGMENTS = [
    *" \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u3000",
    " ", " ", "  ", "   ", " \n", "\r\n", "\n\n\n", "'s", "'S", "'ll", "'", "a", "b", "aaaa",
    "the", "Ωmega", "é", "e\u0301", "漢字", "7", "2026", "١", "½", "!", "...", "_", "😀",
    "\u200d", "\0", "<a>", "<a", "a>", "<a> <b>", "end of text",
]  # fmt: skip
BROKEN_BYTES = ["\udc80", "\udcff", "\udcc3", "\udcf0\udc9f"]
# GPT-4's pattern as first published, in tiktoken; also that of Llama 3.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<a>", "<a> <b>", "end of text", "a>b", " <b>"]
# The libraries know different versions of Unicode. Characters assigned in Unicode 3.2
# (2002) are the same kind for all of them.
long_known = st.characters(exclude_categories=["Cs", "Cn"]).filter(
    lambda character: unicodedata.ucd_3_2_0.category(character) != "Cn"
)
texts = st.lists(st.sampled_from(FRAGMENTS) | long_known, max_size=30).map("".join)
any_texts = st.lists(
    st.sampled_from(FRAGMENTS + BROKEN_BYTES) | st.text(max_size=3), max_size=30
)
any_texts = any_texts.map(lambda parts: bytes_to_text(text_to_bytes("".join(parts))))
special_sets = st.lists(st.sampled_from(SPECIALS), unique=True)

TINY = [
    "--num_layers 2 --d_model 32 --num_heads 2 --d_ff 48 --context_length 64 "
    "--batch_size 4 --warmup_steps 4 --lr 3e-3 --log_interval 1 --device cpu",
    "--quiet",
]
TINY_MODEL = ModelConfig(
    vocab_size=61, context_length=24, num_layers=2, d_model=32, num_heads=4, d_ff=40
)


def shell_words(argv):
    """The words of a command line that is given in pieces, as a shell would split them."""
    split = [shlex.split(piece) if isinstance(piece, str) else [str(piece)] for piece in argv]
    return list(itertools.chain(*split))


def default_signals():
    """Undo what our own parent ignores: a shell that starts us with & ignores Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def process(*argv, processes=0, env=None, file=FILE):
    """The command line of scratchformer.py and its environment, under torchrun if asked for."""
    torchrun = [f"-m torch.distributed.run --standalone --nproc_per_node={processes}"]
    start = [sys.executable, *(torchrun if processes else []), file, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **(env or {})}
    options = {"preexec_fn": default_signals} if os.name == "posix" else {}
    return {"args": shell_words(start), "env": environment, **options}


def run(*argv, stdin=b"", **options):
    """A finished process of scratchformer.py, with its output as bytes."""
    return subprocess.run(
        **process(*argv, **options), input=stdin, capture_output=True, timeout=300
    )


def do(*argv):
    """Run a command in this process; it must succeed."""
    assert main(shell_words(argv)) == 0


def snapshot(folder):
    """All files but marks of directories, which are empty."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {path: path.read_bytes() for path in files if path.name != ".scratchformer"}


def refused(capsys, folder, *argv):
    """The line with which a command refuses: one, status 2, and nothing written in `folder`."""
    before = snapshot(folder)
    capsys.readouterr()
    assert main(shell_words(argv)) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("scratchformer: error: ") and error.count("\n") == 1
    assert snapshot(folder) == before
    return error


def write(path, content):
    """`path`, with `content` (text or bytes) in it."""
    path.write_bytes(content if isinstance(content, bytes) else text_to_bytes(content))
    return path


def metrics(folder, *keys):
    """The rows of metrics.jsonl as tuples of `keys`; what a row lacks is None."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rows = sorted({row["step"]: row for row in rows}.items())  # the last row of a step counts
    return [tuple(row.get(key) for key in keys) for _, row in rows]


def toy_text(seed, sentences):
    """Sentences that a small model learns: only nouns, colours and verbs are open."""
    choose = random.Random(seed).choice
    nouns, colours, verbs = (
        ("cat", "dog", "hen", "cow"),
        ("red", "blue"),
        ("sees", "likes", "helps"),
    )

    def sentence():
        return f"The {choose(colours)} {choose(nouns)} {choose(verbs)} the {choose(nouns)}.\n"

    return "".join(sentence() + END_OF_TEXT for _ in range(sentences))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with text, tokenizer, token files and a trained run, made by the commands."""
    folder = tmp_path_factory.mktemp("toy")
    write(folder / "train.txt", toy_text(1, 2000))
    write(folder / "valid.txt", toy_text(2, 200))
    write(folder / "special.txt", END_OF_TEXT + "\n")
    do(
        f"bpe-train --file_path {folder / 'train.txt'} --vocab_size 280 "
        f"--special_tokens_path {folder / 'special.txt'} "
        f"--tokenizer_out_path {folder / 'tokenizer.json'} --quiet"
    )
    for name in ("train", "valid"):
        do(
            f"bpe-encode --dataset_path {folder / name}.txt --out_path {folder / name}.bin "
            f"--tokenizer_path {folder / 'tokenizer.json'} --quiet"
        )
    do(
        "train",
        *training(folder, folder / "run"),
        f"--max_steps 150 --valid_tokens {folder / 'valid.bin'} --eval_interval 50 "
        "--save_interval 50 --keep_checkpoints 2",
    )
    return folder


def training(folder, outdir):
    """Flags of `train` for a tiny model on the toy data."""
    return [
        *TINY,
        f"--train_tokens {folder / 'train.bin'} --tokenizer_path {folder / 'tokenizer.json'} "
        f"--outdir {outdir}",
    ]


def pretokenize_with(pattern, text):
    """Pre-tokens by any pattern. What lies between its matches are pre-tokens, too."""
    borders = [0, *(b for match in regex.finditer(pattern, text) for b in match.span())]
    pieces = [text[a:b] for a, b in zip(borders, [*borders[1:], len(text)])]
    return [piece for piece in pieces if piece]


def parts(text, specials, pattern=PRETOKEN_PATTERN):
    """All pre-tokens and special tokens of a text, in order: the definition."""
    *pieces, last = special_token_pattern(specials).split(text)
    found = []
    for piece, special in zip(pieces[::2], pieces[1::2]):
        found += pretokenize_with(pattern, piece) + [special]
    return found + pretokenize_with(pattern, last)


def count_words(text, specials=(), pattern=PRETOKEN_PATTERN):
    """How often each pre-token occurs that is no special token."""
    words = [word for word in parts(text, specials, pattern) if word not in specials]
    return Counter(map(text_to_bytes, words))


def tokenizer_from(text, num_merges, specials=(), pattern=PRETOKEN_PATTERN):
    """A tokenizer with merges learned from `text`."""
    merges = learn_merges(count_words(text, [], pattern), num_merges)
    return Tokenizer(build_vocab(merges, []), merges, list(specials), pattern)


def plain_ids(tokenizer, text, specials=()):
    """The ids of a text by chapter 3: split it, then merge each word on its own."""
    plain = BPETokenizer(tokenizer.merges)
    ids = ([tokenizer.special_tokens[part]] if part in specials
           else plain.encode_pretoken(text_to_bytes(part))
           for part in parts(text, specials, *tokenizer.patterns))  # fmt: skip
    return list(itertools.chain(*ids))


def cl100k_pattern():
    """GPT-4's pattern as tiktoken has it, rewritten for speed."""
    with pytest.MonkeyPatch.context() as patch:  # without this, it downloads the vocabulary
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        return openai_public.cl100k_base()["pat_str"]


# ======================================================================================
# 1. PRE-TOKENIZATION
#
# Against the published pattern, as tiktoken has it.
# ======================================================================================


@given(texts)
def test_pretokens_are_tiktokens(text):
    assert pretokenize(text) == regex.findall(r50k_pat_str, text)
    assert "".join(pretokenize(text)) == text
    # tiktoken's present form of GPT-4's pattern takes whitespace at the end of a text as one
    # piece, even if it contains line breaks. Elsewhere it is the one first published.
    text += "."
    assert regex.findall(GPT4_PATTERN, text) == regex.findall(cl100k_pattern(), text)


# ======================================================================================
# 2. LEARNING MERGES
#
# Against tokenizers where ties don't decide; chapter 8 compares the fast form with this one.
# ======================================================================================


small_words = st.text("ab", min_size=1, max_size=12) | st.text(
    "abcé漢 \udcff\0", min_size=1, max_size=6
)


corpora = st.dictionaries(small_words.map(text_to_bytes), st.integers(1, 4), max_size=12)


@given(corpora, st.randoms())
def test_merges_do_not_depend_on_the_order_of_words(counts, rng):
    shuffled = list(counts.items())
    rng.shuffle(shuffled)
    assert learn_merges_naive(dict(shuffled), 30) == learn_merges_naive(counts, 30)


def test_tokenizers_learns_the_same_where_ties_do_not_decide():
    # In the beginnings of one word ("ab", "abc", "abcd", ...) no two pairs are equally
    # frequent, whatever is merged; several such words get counts far apart.
    words = ["abcdefg", "hijklmn", "éopq", "ßrstu"]
    counts = {
        word[:n]: 5**i * n for i, word in enumerate(words) for n in range(1, len(word) + 1)
    }
    text = "\n".join(itertools.chain(*([word] * count for word, count in counts.items())))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    ours = [[scratchformer.token_to_unicode(token) for token in pair]
            for pair in learn_merges_naive(count_pretokens(text), 14)]  # fmt: skip
    assert json.loads(theirs.to_str())["model"]["merges"] == ours and len(ours) == 14


# ======================================================================================
# 3. THE TOKENIZER
#
# Ids are compared with tiktoken's and those of the full tokenizer, on any text.
# ======================================================================================


SAMPLE = "".join(
    random.Random(3).choices([*FRAGMENTS, " the end", " of the text", "aab"], k=4000)
)


OURS = tokenizer_from(SAMPLE, 150, SPECIALS)


OURS_GPT4 = tokenizer_from(SAMPLE, 150, SPECIALS, GPT4_PATTERN)


def tiktoken_of(tokenizer, specials):
    ranks = {
        token: i
        for i, token in tokenizer.vocab.items()
        if i not in tokenizer.special_tokens.values()
    }
    return tiktoken.Encoding(
        "ours", pat_str=tokenizer.patterns[0], mergeable_ranks=ranks, special_tokens=specials
    )


@given(texts)
def test_the_plain_tokenizers_ids_are_tiktokens_and_those_of_the_full_one(text):
    text += f"{END_OF_TEXT}the {text}"
    plain, full = BPETokenizer(OURS.merges), Tokenizer(
        build_vocab(OURS.merges, []), OURS.merges, [END_OF_TEXT])
    ids = plain.encode(text)
    assert ids == full.encode(text)
    oracle = tiktoken_of(full, full.special_tokens)
    assert ids == oracle.encode(text, allowed_special="all")
    assert plain.decode(ids) == text


# ======================================================================================
# 4. DATA
#
# A batch is a pure function of seed, step and row, wherever the tokens come from.
# ======================================================================================


def token_file(path, ids, metadata=None, dtype="<u2"):
    """`path`, holding `ids`, with `metadata` in the JSON file beside it."""
    np.array(ids, dtype).tofile(path)
    if metadata is not None:
        write(Path(f"{path}.json"), json.dumps(metadata))
    return path


def test_rows_are_stretches_of_the_tokens_and_targets_are_one_token_later(tmp_path):
    """In memory, in a file as chapter 4 reads it, and in chapter 14's token files."""
    path, ids = token_file(tmp_path / "a", range(500, 600)), np.arange(500, 600)
    for tokens in (ids, np.memmap(path, "<u2", mode="r"), open_tokens(path, 1000).ids):
        inputs, targets = get_batch(tokens, 5, seed=1, indices=range(3, 10))
        assert inputs.shape == targets.shape == (7, 5) and inputs.dtype == torch.int64
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(5))
        assert torch.equal(targets, inputs + 1) and len(inputs[:, 0].unique()) > 1
        assert torch.equal(inputs, get_batch(ids, 5, 1, range(3, 10))[0])


def test_a_batch_is_a_function_of_seed_and_window_indices():
    def inputs(seed, indices):
        return get_batch(np.arange(900), 5, seed, indices)[0]

    batch = inputs(3, range(64, 72))
    assert torch.equal(batch, inputs(3, range(64, 72)))
    assert not torch.equal(batch, inputs(3, range(72, 80)))
    assert not torch.equal(batch, inputs(4, range(64, 72)))
    # A row doesn't depend on how many there are before or after it.
    assert torch.equal(batch[2:5], inputs(3, range(66, 69)))


@given(st.integers(2, 300), st.integers(1, 20), st.integers(0, 2**32), st.integers(0, 9))
def test_an_epoch_has_every_window_once_end_to_end(num_tokens, T, seed, epoch):
    assume(num_tokens >= 2 * T)
    starts = sorted(shuffle_windows(seed, epoch, num_tokens, T).tolist())
    assert len(starts) == num_tokens // T - 1
    assert starts == list(range(starts[0], starts[0] + len(starts) * T, T))
    assert starts[0] >= 0 and starts[-1] + T + 1 <= num_tokens
    assert num_tokens - (len(starts) * T + 1) < 2 * T  # no more than this is left out


def test_epochs_differ_in_order_and_offset_and_all_offsets_occur():
    epochs = [shuffle_windows(1, epoch, 104, 10) for epoch in range(200)]
    assert len({tuple(np.argsort(starts)) for starts in epochs}) > 190
    assert {int(min(starts)) for starts in epochs} == set(range(10))


def test_batches_cross_from_one_epoch_into_the_next():
    per_epoch = 104 // 10 - 1
    inputs, _ = get_batch(np.arange(104), 10, 1, range(per_epoch - 2, per_epoch + 2))
    expected = [*shuffle_windows(1, 0, 104, 10)[-2:], *shuffle_windows(1, 1, 104, 10)[:2]]
    assert inputs[:, 0].tolist() == expected


def test_fewer_tokens_than_two_windows_are_refused():
    with pytest.raises(ValueError, match="fewer than two windows"):
        get_batch(np.arange(9), 5, 1, range(1))
    assert get_batch(np.arange(10), 5, 1, range(1))[0].shape == (1, 5)


# ======================================================================================
# 5. THE TRANSFORMER
#
# Each part against the formula or PyTorch's own, the whole against transformers' Llama.
# ======================================================================================


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_ids(*shape, seed=0):
    """Ids for TINY_MODEL."""
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(seed=0, config=TINY_MODEL, scale=3.0):
    """A model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = TransformerWithLoss(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02 * scale) if p.dim() == 2 else p.add_(noise(*p.shape) / 4)
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_is_torchs(dtype):
    x, norm = 900 * noise(3, 5, 7, dtype=dtype), RMSNorm(7, 1e-5)  # squares exceed float16
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x.float(), (7,), norm.weight, 1e-5)
    assert norm(x).dtype == dtype
    assert torch.allclose(norm(x).float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@given(st.lists(st.floats(-80, 80), min_size=1, max_size=8))
def test_softmax_is_torchs(numbers):
    x = torch.tensor(numbers)
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    assert torch.allclose(softmax(x + 1000), softmax(x), atol=1e-4)


@pytest.mark.parametrize("T, width", [(1, 2), (5, 4), (17, 10)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_attention_formula_equals_the_fused_kernel(T, width, dtype, causal):
    """In value and gradient."""
    results, mask = [], None if causal else torch.ones(T, T).bool()
    for attend in (
        lambda q, k, v: attention_naive(q, k, v, mask),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    ):
        leaves = [noise(2, 3, T, width, seed=i).to(dtype).requires_grad_() for i in range(3)]
        out = attend(*leaves)
        (out * noise(2, 3, T, width, seed=9, dtype=dtype)).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    tolerance = 4e-5 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_model_is_transformers_llama(kv_heads):
    import transformers

    c = dataclasses.replace(
        TINY_MODEL, num_kv_heads=kv_heads, qk_norm=False, rope_theta=500.0, norm_eps=1e-3)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=kv_heads, max_position_embeddings=c.context_length,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    ))  # fmt: skip
    model, tokens = tiny_model(config=c), random_ids(2, 24)
    llama.load_state_dict(to_hf(model.state_dict(), c), strict=True)
    with torch.no_grad():
        assert torch.allclose(model(tokens), llama.eval()(tokens).logits, atol=1e-4)


def test_weights_are_drawn_with_the_stated_deviations():
    model = Transformer(ModelConfig(500, 8, num_layers=8, d_model=64, num_heads=2, d_ff=128))
    for name, p in model.named_parameters():
        writes = re.search(r"attention.output|mlp.down", name)
        expected = 0.02 / (4 if writes else 1) if p.dim() == 2 else 0
        assert abs(p.std().item() - expected) <= 0.05 * expected, name
        assert p.dim() == 2 or torch.equal(p, torch.ones_like(p))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="25 tokens, but context_length is 24"):
        tiny_model()(torch.zeros(1, 25, dtype=torch.int64))


# ======================================================================================
# 6. TRAINING
#
# Loss, schedule and update against PyTorch's own; then the loop learns, in plain Python and in
# the command alike.
# ======================================================================================


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_is_minus_log_softmax_in_float32(dtype):
    logits, targets = noise(2, 5, 11, dtype=dtype) * 4, torch.arange(10).view(2, 5)
    expected = -softmax(logits.float()).log().gather(-1, targets[..., None])[..., 0]
    losses = cross_entropy(logits, targets)
    assert losses.dtype == torch.float32 and torch.allclose(losses, expected.flatten())


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 0.999), st.floats(0, 0.9999))
def test_the_formula_of_adamw_is_torchs(steps, weight_decay, beta1, beta2):
    generator = torch.Generator().manual_seed(steps)
    start, betas = torch.randn(5, generator=generator), (beta1, beta2)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=betas, weight_decay=weight_decay)
    ours, m, v = start, torch.zeros(5), torch.zeros(5)
    for step in range(1, steps + 1):
        theirs.grad = torch.randn(5, generator=generator)
        ours, m, v = adamw_naive(ours, theirs.grad, m, v, step, 0.1, betas, weight_decay)
        optimizer.step()
    torch.testing.assert_close(ours, theirs.data, rtol=1e-4, atol=1e-5)


def test_matrices_decay_and_norm_weights_do_not():
    model = tiny_model()
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    groups = make_adamw(model.parameters(), config).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[p] == (0.0 if "norm" in name else 0.5), name
    assert all(group["lr"] == 0.1 and group["betas"] == (0.8, 0.9) for group in groups)


@pytest.mark.parametrize("tied, trained, width, scale, table_scale", [
    (False, False, 32, 1, 1), (False, False, 192, 2.25, 2.25), (False, False, 896, 36, 36),
    (True, False, 192, 1, 2.25), (False, True, 192, 1, 1)])  # fmt: skip
def test_embeddings_learn_faster_with_the_width_unless_tied_or_trained(
    tied, trained, width, scale, table_scale
):
    model = tiny_model(config=LlamaConfig(**{
        **vars(TINY_MODEL), "d_model": width, "head_dim": 8, "tie_embeddings": tied,
        "trained": trained}))
    model.table = torch.nn.Embedding(3, 4)  # somebody's own
    weights = model.embedding.weight, model.table.weight, model.lm_head.weight
    before = [weight.detach().clone() for weight in weights]
    tokens = random_ids(4, 25)
    optimizer = make_scaled_adamw(model, local_params(model), OptimizerConfig(weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.001 * group.get("lr_scale", 1)
    loss = model(tokens[:, :-1], tokens[:, 1:]) + model.table.weight.sum()
    loss.backward()
    optimizer.step()
    moved = [(w - x).abs().max().item() for w, x in zip(weights, before)]
    # The first step of AdamW moves each entry by the rate.
    expected = [0.001 * scale, 0.001 * table_scale, 0.001]
    assert moved == pytest.approx(expected, rel=0.01)


STORIES = pytest.mark.skipif(
    not (DATA / "stories-train.txt").exists(), reason="no bundled stories")


def test_the_plain_loop_learns_and_gives_the_losses_of_the_train_command(toy, tmp_path):
    do("train", *training(toy, tmp_path), "--max_steps 60 --seed 5")
    tokens, unseen = (open_tokens(toy / f"{part}.bin").ids for part in ("train", "valid"))
    torch.manual_seed(5)
    model = Transformer(ModelConfig(280, 64, num_layers=2, d_model=32, num_heads=2, d_ff=48))
    before = validation_loss(model, unseen)
    config = OptimizerConfig(max_steps=60, lr=3e-3, warmup_steps=4)
    plain = train_model(model, tokens, unseen, config, 4, seed=5)
    losses = [loss for (loss,) in metrics(tmp_path, "train_loss")]
    assert plain == pytest.approx(losses, rel=1e-5)
    assert validation_loss(model, unseen) < before / 2
    assert not model.training  # ready for generation


# ======================================================================================
# 7. GENERATION
#
# Draws are counted; generation with a cache is compared with generation without one.
# ======================================================================================


PROMPT = [5, 17, 3]


@pytest.mark.parametrize("how, kept", [
    ({"top_k": 1}, [1]), ({"top_k": 3}, [1, 3, 0]), ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.0}, [1]), ({"top_p": 0.49}, [1]), ({"top_p": 0.6}, [1, 3]),
    ({"top_p": 0.8}, [1, 3, 0]), ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 3, "top_p": 0.55}, [1]), ({"temperature": 0}, [1]),
])  # fmt: skip
def test_top_k_and_top_p_keep_exactly_the_likeliest(how, kept):
    odds = [0.15, 0.5, 0.1, 0.2, 0.05]
    expected = [p / sum(odds[i] for i in kept) if i in kept else 0 for i, p in enumerate(odds)]
    logits = torch.tensor([odds]).log()
    p = token_probabilities(logits, **how)
    assert p[0].tolist() == pytest.approx(expected, rel=1e-6)
    ids = sample(logits.expand(20_000, -1), random_numbers(1, 1, 20_000)[0], **how)
    assert (ids.bincount(minlength=5) / 20_000).tolist() == pytest.approx(expected, abs=0.015)
    assert ids.unique().tolist() == sorted(kept)


def test_the_lowest_temperature_is_the_likeliest_token():
    logits = torch.tensor([[3.0, 88.0, -70.0, 87.0]])
    for temperature in (0, 1e-50, 1e-38, 1e-45, 1e-3):
        for u in (0.0, 0.5, 1 - 2**-24):
            assert sample(logits, torch.tensor([u]), temperature=temperature).item() == 1


def test_top_k_0_and_top_p_1_mean_off():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 9
    assert torch.equal(scratchformer.token_probabilities(logits, top_k=0, top_p=1.0),
                       scratchformer.token_probabilities(logits))  # fmt: skip


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=9), st.integers(0, 2**24 - 1))
@example([0.0] * 9, 2**24 - 1)
def test_no_impossible_token_is_drawn(logits, n):
    how = {"top_k": 2, "top_p": 0.9}
    logits = torch.tensor([logits])
    i = sample(logits, torch.tensor([n / 2**24]), **how).item()
    assert token_probabilities(logits, **how)[0, i] > 0


def text_of(function, model, prompt, count, seed=0, **how):
    """The ids that a generator of chapter 7 yields for one text."""
    u = random_numbers(seed, 1, count)
    return [int(new) for new in function(model, torch.tensor([prompt]), u, **how)]


def test_naive_generation_is_the_argmax_loop():
    model, seen, ids = tiny_model(), list(PROMPT), list(PROMPT)
    for _ in range(40):  # beyond the context, of 24: half of it stays
        seen.append(model(torch.tensor([seen]))[0, -1].argmax().item())
        ids.append(seen[-1])
        seen = seen[-13:] if len(seen) > 24 else seen
    assert [*PROMPT, *text_of(generate_naive, model, PROMPT, 40, temperature=0)] == ids
    assert len(set(ids)) > 3


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 24), st.integers(0, 9),
       st.sampled_from([{"temperature": 0}, {}, {"top_k": 20, "top_p": 0.95}]))  # fmt: skip
@hypothesis.settings(max_examples=20)
def test_text_with_a_cache_is_the_text_without(length, rows, context, seed, how):
    """Beyond the context as well, and for many texts at once."""
    config = dataclasses.replace(TINY_MODEL, context_length=context, num_kv_heads=2)
    model = tiny_model(seed, config)
    prompts = torch.arange(rows * length).view(rows, length) * 7 % 61
    u = random_numbers(seed, rows, 40)
    one, other = (torch.stack(list(function(model, prompts, u, **how)))
                  for function in (generate, generate_naive))  # fmt: skip
    assert torch.equal(one, other) and one.shape == (40, rows)


@pytest.mark.parametrize(
    "cache_type", [lambda model: KVCache(), lambda model: StaticCache(model, 3, 30)])
@pytest.mark.parametrize("borders", [[1], [7, 8, 9, 10, 24], [5, 6, 20], [24]])
def test_hidden_states_with_a_cache_equal_those_without(borders, cache_type):
    """However many tokens the model reads at a time."""
    model, tokens, steps = tiny_model(), random_ids(3, 24), []
    cache, edges = cache_type(model), [0, *borders, *range(borders[-1] + 1, 25)]
    for start, end in zip(edges, edges[1:]):
        cache.add_tokens(tokens[:, start:end])
        steps.append(model.hidden_states(tokens[:, start:end], cache))
    assert torch.allclose(torch.cat(steps, 1), model.hidden_states(tokens), atol=2e-5)


# ======================================================================================
# PART ONE
#
# Short, and complete: cut off, it learns and tells a story.
# ======================================================================================


def part_one():
    source = FILE.read_text(encoding="utf-8")
    return source[: re.search(r"^# PART TWO", source, re.M).start()]


def test_the_budget_holds():
    """Whatever comes later fits in, by making something else simpler."""
    source = FILE.read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    prose = {n for n, line in enumerate(lines, 1) if re.match(r"\s*(#|$)", line)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            most = 60 if isinstance(node, ast.FunctionDef) else 200
            assert node.end_lineno - node.lineno < most, node.name
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            prose |= {*range(node.lineno, node.end_lineno + 1)}
    assert len(lines) <= 4400 and len(lines) - len(prose) <= 2500


def test_part_one_is_short_and_uses_nothing_defined_later():
    assert part_one().count("\n") < 1250
    argv = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(argv, input=part_one(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout  # no undefined names


def test_there_is_one_loop_over_the_blocks_and_one_attention():
    """A change in one place changes training, evaluation and generation."""
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    for call in ("F.scaled_dot_product_attention", "F.cross_entropy", "block"):
        assert calls.count(call) == 1, call
    assert not any(call.endswith(".lm_head") for call in calls)  # compute_logits makes logits


@slow
@STORIES
def test_part_one_alone_tells_a_story(tmp_path):
    """Fewer steps and less text than in its docstring."""
    text = (DATA / "stories-train.txt").read_text()[:300_000]
    write(tmp_path / "text.txt", text)
    write(tmp_path / "part_one.py", part_one() + """
print(story_from_text(open("text.txt").read(), vocab_size=900, max_steps=120, temperature=0.3,
                      context_length=64, max_new_tokens=60))
""")
    done = subprocess.run([sys.executable, "part_one.py"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss, story = re.search(r"step 100: loss (\S+), .*\n([^$]*)", done.stdout).groups()
    assert float(loss) < 3 < math.log(900)
    # The last word may be cut short.
    words = re.findall(r"\w+", story)[:-1]
    known = set(re.findall(r"\w+", text))
    assert len(words) > 20 and sum(word in known for word in words) > 0.9 * len(words), story


# ======================================================================================
# 8. TOKENIZING CORPORA
#
# Everything fast must give what chapters 1 to 3 give, on any bytes.
# ======================================================================================


@given(st.binary(max_size=60) | any_texts.map(text_to_bytes))
def test_encoding_and_decoding_gives_back_any_bytes(data):
    assert OURS.decode_bytes(OURS.encode(bytes_to_text(data))) == data
    assert OURS.decode(OURS.encode(bytes_to_text(data))) == data.decode(errors="replace")


def test_an_id_outside_the_vocabulary_is_named_in_decoding():
    with pytest.raises(UserError, match="id 9999 is not in the vocabulary"):
        OURS.decode([1, 9999])


@given(texts)
def test_ids_are_tiktokens(text):
    for ours in (OURS, OURS_GPT4):
        plain = Tokenizer(ours.vocab, ours.merges, [], ours.patterns)
        assert plain.encode(text) == tiktoken_of(plain, {}).encode(text)
        ours = Tokenizer(OURS.vocab, OURS.merges, ["<a> <b>"], ours.patterns)
        oracle = tiktoken_of(ours, ours.special_tokens)
        assert ours.encode(text) == oracle.encode(text, allowed_special="all")


@given(texts)
def test_ids_are_those_of_tokenizers_on_our_file(text):
    # (tiktoken takes any one of special tokens that overlap, so it is no oracle for these.)
    for ours in (OURS, OURS_GPT4):
        oracle = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_json(ours)))
        ids = oracle.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=False)


@given(any_texts, special_sets)
@example("it\udce9's", [])  # ASCII and an invalid byte: as many bytes as characters
@example("it's we'll'd  \n'tis, '' 'r've \x0b\nend.\n  ", [])
@example("漢\u3000\u3000a'\udcff's  \n<a><a> <b>", ["<a>", "<a> <b>"])
def test_splitting_a_whole_text_is_the_pattern(text, specials):
    for pattern in (PRETOKEN_PATTERN, GPT4_PATTERN, r"\s+|the"):
        words = find_pretokens(text, Tokenizer(OURS.vocab, [], specials, pattern))
        expected = [text_to_bytes(part) for part in parts(text, specials, pattern)]
        assert words.cut(np.arange(len(words.starts))) == expected
        found = special_token_pattern(specials).split(text)[1::2]
        assert words.cut(words.special_at) == list(map(text_to_bytes, found))


def test_every_character_has_the_class_that_regex_gives_it():
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xDC80]
    classes = scratchformer.character_classes(np.array(codes))
    every = "".join(map(chr, codes))
    for pattern, kind in ((r"\p{L}", 0), (r"\p{N}", 1), (r"\s", 3)):
        assert regex.findall(pattern, every) == [
            every[i] for i in np.flatnonzero(classes == kind)]  # fmt: skip


@given(st.lists(any_texts, min_size=1, max_size=8), special_sets, st.sampled_from([1, 3, 19]))
@example(["<a>a>b<a> <b>"] * 2, SPECIALS, 1)
def test_whole_texts_get_the_plain_ids(chunks, specials, bits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratchformer.WordTable, "BITS", bits)  # few slots: words are evicted
        for pattern in (PRETOKEN_PATTERN, GPT4_PATTERN):
            tokenizer = Tokenizer(OURS.vocab, OURS.merges, specials, pattern)
            for text in chunks:  # later chunks find words of the earlier ones in the table
                assert tokenizer.encode(text) == plain_ids(tokenizer, text, specials)


def test_words_that_differ_in_a_zero_byte_or_beyond_byte_15_are_different():
    words = ["a", "a\0", "a\0\0", "\0", "", "x" * 15, "x" * 16, "x" * 15 + "\0", "x" * 271]
    text = "\n".join(" " + word for word in words for _ in range(3))
    assert OURS.encode(text) == plain_ids(OURS, text)


def test_the_encoder_forgets_and_stays_right():
    tokenizer = Tokenizer(OURS.vocab, OURS.merges)
    tokenizer.MAX_IDS = 100
    for i in range(4):
        text = " ".join(map(str, range(300 * i, 300 * i + 600))) + " " + "x" * 300
        assert tokenizer.encode(text) == plain_ids(OURS, text)
        assert tokenizer.table.size < 1000 and len(tokenizer.pool) < 5000


@posix
def test_the_encoder_is_right_in_threads_and_after_being_interrupted():
    tokenizer = tokenizer_from(SAMPLE, 150)
    texts = [" ".join(random.Random(n).sample(SAMPLE.split(), 200)) for n in range(30)]
    expected = [Tokenizer(tokenizer.vocab, tokenizer.merges).encode(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts * 4)) == expected * 4

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    for delay in range(20, 600, 20):  # microseconds
        tokenizer.forget_words()
        with contextlib.suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, delay / 1e6)
            tokenizer.encode(texts[delay % 30])
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert [tokenizer.encode(text) for text in texts[:3]] == expected[:3]
    signal.signal(signal.SIGALRM, before)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30), st.text("ab "))
def test_merges_written_by_hand_in_any_order_give_the_plain_tokens(choices, text):
    """Unlike learned merges, several may make the same token, and later ones earlier pairs."""
    tokens, merges = [b"a", b"b"], []
    for left, right in choices:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if pair not in merges and len(b"".join(pair)) < 12:
            merges.append(pair)
            tokens.append(b"".join(pair))
    tokenizer = Tokenizer(build_vocab(merges, []), merges)
    ours = [tokenizer.vocab[i] for i in tokenizer.encode(text)]
    assert ours == [tokenizer.vocab[i] for i in plain_ids(tokenizer, text)]


@pytest.mark.parametrize(
    "text", ["a" * 30_001, "ab" * 9_999 + "b", "漢" * 9_999, " " * 30_000, "\n" * 30_000 + "x"]
)
def test_ids_of_long_runs_are_tiktokens(text):
    assert OURS.encode(text) == tiktoken_of(OURS, {}).encode(text)


@given(corpora, st.integers(0, 40))
@example({b"aaaaa": 1, b"aaaaaaa": 2, b"aaa": 1}, 9)
@example({b"abababab": 2, b"bababa": 2, b"aabb": 2}, 9)
@example({}, 3)
@example(count_pretokens((DATA / "stories-valid.txt").read_text()[:30_000]), 300)
def test_the_fast_learner_finds_the_naive_merges(counts, num_merges):
    assert learn_merges(counts, num_merges) == learn_merges_naive(counts, num_merges)


@given(st.lists(any_texts, max_size=30), special_sets, st.integers(1, 200))
@example(["        <a>b0", "xy"], ["<a>", "a>b"], 9)
def test_pieces_of_texts_and_files_join_up_and_can_be_processed_alone(
    tmp_path, chunks, specials, size
):
    text = bytes_to_text(text_to_bytes("".join(chunks)))
    path = write(tmp_path / "text", text)
    for pattern in (PRETOKEN_PATTERN, GPT4_PATTERN, r"\s+|the", r"[^\s]+|\s"):
        tokenizer = Tokenizer(OURS.vocab, [], specials, pattern)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scratchformer, "CHUNK", size)
            pieces = list(split_files([path, path], tokenizer, "splitting"))
        for found, expected in (
            (list(safe_pieces([text], tokenizer, size)), text),
            ([piece for piece, _ in pieces], text + text),
        ):
            assert "".join(found) == expected and (all(found) or not text)
            alone = [part for piece in found for part in parts(piece, specials, pattern)]
            assert alone == parts(text, specials, pattern) * (len(expected) // (len(text) or 1))


def test_pieces_are_about_as_long_as_asked_and_longer_where_there_is_no_safe_split():
    text = "one two " * 50_000 + "!" * 300_000 + " three" * 50_000
    found = list(safe_pieces([text], OURS, 100_000))
    assert "".join(found) == text and len(found) >= 6
    (longest,) = [len(piece) for piece in found if len(piece) > 110_000]
    assert 300_000 <= longest < 700_000  # it holds the exclamation marks


@hypothesis.settings(max_examples=15)
@given(any_texts, any_texts, st.integers(1, 60_000))
def test_a_stream_of_chunks_gives_the_ids_of_the_whole(one, other, size):
    text = (one + "word" + other) * (200_000 // (4 + len(one + other)))
    text = bytes_to_text(text_to_bytes(text))
    chunks = (text[start : start + size] for start in range(0, len(text), size))
    assert list(OURS.encode_iterable(chunks)) == OURS.encode(text)


def test_streaming_ordinary_text_takes_less_than_a_megabyte():
    tokenizer = Tokenizer(OURS.vocab, OURS.merges)
    lines = (DATA / "stories-train.txt").read_text().splitlines(keepends=True)
    tracemalloc.start()
    for _ in tokenizer.encode_iterable(lines):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@slow
def test_counts_do_not_depend_on_workers(tmp_path):
    rng, specials = random.Random(1), SPECIALS
    paths = [write(tmp_path / str(i), "".join(rng.choices(FRAGMENTS + BROKEN_BYTES, k=3000)))
             for i in range(4)]  # fmt: skip
    expected = Counter()
    for path in paths:
        expected.update(count_words(bytes_to_text(path.read_bytes()), specials))
    for workers in (1, 2):  # with torch imported, as here, workers are spawned, not forked
        assert count_files(paths, OURS, workers) == expected  # OURS has the same specials


def test_words_that_are_overwritten_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scratchformer.WordTable, "BITS", 3)
    monkeypatch.setattr(scratchformer, "CHUNK", 2000)
    text = " ".join(map(str, range(2000))) + " the the" * 500
    assert count_files(write(tmp_path / "text", text), OURS, 1) == count_words(text)


def test_bytes_come_first_then_merges_then_special_tokens(tmp_path):
    vocab, merges = train_bpe(write(tmp_path / "text", "hug pug hugs"), 260, ["<a>", "<b>"], 1)
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert merges == [(b"u", b"g"), (b"h", b"ug")]  # ug 3; then h+ug, " "+h.. by hand
    assert [vocab[i] for i in range(256, 260)] == [b"ug", b"hug", b"<a>", b"<b>"]


@pytest.mark.parametrize("pattern", [PRETOKEN_PATTERN, GPT4_PATTERN])
def test_a_tokenizer_learns_from_a_text_or_from_files(tmp_path, pattern):
    text = "1234 12345 it's<|endoftext|>" * 20
    path = write(tmp_path / "a text", text)
    counts = count_words(text, [END_OF_TEXT], pattern)
    for source in (text, path, str(path), [path]):
        tokenizer = Tokenizer.train(source, 271, pattern=pattern)
        assert tokenizer.merges == learn_merges_naive(counts, 14)
        assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eot_id]
    tokenizer.save(tmp_path / "t")
    assert Tokenizer.load(tmp_path / "t").patterns == (pattern,)
    with pytest.raises(FileNotFoundError):
        Tokenizer.train("data/mistyped.txt", 300)
    with pytest.raises(UserError, match="text where a path belongs"):
        encode_file(tokenizer, text * 100, tmp_path / "out.bin")


def test_the_command_knows_the_end_of_a_text_unless_it_is_told_otherwise(tmp_path):
    text, out = write(tmp_path / "text", "a b"), tmp_path / "t"
    for specials, expected in (("", [END_OF_TEXT]), ("<a>\n", ["<a>"]), ("\n", [])):
        path = write(tmp_path / "specials", specials)
        do(f"bpe-train --file_path {text} --vocab_size 258 --tokenizer_out_path {out} --quiet"
           + f" --special_tokens_path {path}" * bool(specials))  # fmt: skip
        assert list(Tokenizer.load(out).special_tokens) == expected


@pytest.mark.parametrize("specials, size, words", [
    (["<a>", "<a>"], 300, "special token '<a>'"),
    (["<a>", ""], 300, "special token ''"),
    (["x"], 300, "special token 'x'"),
    (["é"], 300, "special token 'é'"),  # in a tokenizer.json this is the name of a byte
    (["<a>", "<b>"], 257, "at least 258"),
])  # fmt: skip
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, specials, size, words):
    with pytest.raises(UserError, match=words):
        train_bpe([write(tmp_path / "text", "some text")], size, specials, 1)


@slow
def test_a_file_encoded_in_parallel_is_the_texts_encoded_whole(tmp_path):
    rng = random.Random(4)
    pieces = [*FRAGMENTS, *BROKEN_BYTES, " word", " end of the text"]
    paths = [
        write(tmp_path / str(i), "".join(rng.choices(pieces, k=k)))
        for i, k in enumerate([900_000, 1, 4000])
    ]
    expected = sum((OURS.encode(bytes_to_text(path.read_bytes())) for path in paths), [])
    OURS.save(tmp_path / "tokenizer.json")
    for workers in (1, 3):
        out = tmp_path / "out.bin"
        files = " ".join(map(str, paths))
        done = run(
            f"bpe-encode --dataset_path {files} --tokenizer_path {tmp_path}/tokenizer.json "
            f"--out_path {out} --num_workers {workers}"
        )
        assert done.returncode == 0, done.stderr
        assert np.fromfile(out, "<u2").tolist() == expected
    note = json.loads((tmp_path / "out.bin.json").read_text())
    assert note["tokenizer_sha256"] == OURS.fingerprint()
    assert note["num_tokens"] == len(expected) and note["vocab_size"] == OURS.vocab_size


def test_every_file_ends_with_end_of_text_exactly_once(tmp_path):
    tokenizer = tokenizer_from("one two", 4, [END_OF_TEXT])
    texts = ["one", f"two{END_OF_TEXT}", "", "one two " * 200_000]
    paths = [write(tmp_path / str(i), text) for i, text in enumerate(texts)]
    encode_file(tokenizer, paths, tmp_path / "out", append_eot=True, num_workers=1)
    ids = np.fromfile(tmp_path / "out", "<u2")
    expected = "".join(text.removesuffix(END_OF_TEXT) + END_OF_TEXT for text in texts)
    assert ids.tolist() == tokenizer.encode(expected)
    with pytest.raises(UserError, match="append_eot needs"):
        encode_file(OURS, paths, tmp_path / "other", append_eot=True)
    assert not (tmp_path / "other").exists()


def test_marks_and_spaces_in_a_list_of_special_tokens_do_not_belong_to_them(tmp_path):
    write(tmp_path / "specials", "\ufeff<a> \r\n\n <b>\t\n")
    do(f"bpe-train --file_path {write(tmp_path / 'text', 'text')} --vocab_size 258 --quiet "
       f"--special_tokens_path {tmp_path / 'specials'} --tokenizer_out_path {tmp_path / 't'}")
    assert Tokenizer.load(tmp_path / "t").special_tokens == {"<a>": 256, "<b>": 257}


@pytest.mark.parametrize("pattern", [
    r"(?s).+", r"(?P<w>a)", r"^a", r"a$", r"\h+", r"\b", r"\w+", r"(?<=a)b", r"[[:alpha:]]+",
    r"\p{N}{1,3}+", r"(a)\1", r"[a&&b]", r"a*", r"[\p{L}--a]", r"\p{IsAlphabetic}+", r"[a-\d]",
    r"(?i:ß)+", r"(?i:\p{Lu}+)",
    # What looks far could be cut apart.
    r'"[^"]*"|[^\s"]+|\s+|"', r".+", r"(?:the|a|\s)+", r"[a-z ]+;|."])  # fmt: skip
def test_what_oniguruma_may_read_in_another_way_is_refused(pattern):
    with pytest.raises(UserError):
        Tokenizer(OURS.vocab, OURS.merges, [], pattern)


@pytest.mark.parametrize("size, width", [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_they_fit_and_four_elsewhere(tmp_path, size, width):
    vocab = {i: bytes([i]) for i in range(256)} | {size - 1: b"<last>"}
    text = write(tmp_path / "text", "a<last>")
    encode_file(Tokenizer(vocab, [], ["<last>"]), text, tmp_path / "out.bin", num_workers=1)
    data = (tmp_path / "out.bin").read_bytes()
    assert data == b"".join(i.to_bytes(width, "little") for i in (97, size - 1))


@slow
def test_killed_while_encoding_no_partial_file_and_no_process_is_left(tmp_path):
    # All words differ, which makes this slow enough to be killed.
    text = write(tmp_path / "text", " ".join(map(str, range(10**7, 10**7 + 3_000_000))))
    OURS.save(tmp_path / "tokenizer.json")
    command = (f"bpe-encode --dataset_path {text} --tokenizer_path {tmp_path}/tokenizer.json "
               f"--num_workers 2 --out_path {tmp_path}/out")  # fmt: skip
    for delay in (0.1, 0.4, 0.7, 1.0):
        encoder = subprocess.Popen(**process(command), stderr=subprocess.PIPE)
        time.sleep(delay)
        encoder.kill()
        # Workers inherit standard error: it ends when the last of them has left.
        encoder.communicate(timeout=60)
        assert encoder.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()


def test_directories_are_read_without_hidden_and_binary_files(tmp_path):
    folder = tmp_path / "src"
    for name, content in [("a.txt", b"one"), ("deep/b", b"two"), (".hidden", b"x"),
                          (".git/HEAD", b"ref"), ("deep/c.pyc", b"\xa7\r\n\0binary")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, content)
    assert input_files(folder) == [folder / "a.txt", folder / "deep" / "b"]
    (folder / "link").symlink_to(folder / "nowhere")
    # Token files, with their metadata, and directories of ours are not text.
    encode_file(OURS, folder / "a.txt", folder / "a.bin")
    scratchformer.new_directory(folder / "deep" / "ours")
    write(folder / "deep" / "ours" / "train.txt", "three")
    assert input_files(folder) == [folder / "a.txt", folder / "deep" / "b"]
    # What is named is read, whatever it is.
    assert input_files([folder / ".hidden"]) == [folder / ".hidden"]
    with pytest.raises(UserError, match="no text to read in .*nothing.txt "):
        input_files(write(tmp_path / "nothing.txt", ""))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@posix
def test_a_write_creates_directories_and_replaces_what_a_link_points_to(tmp_path):
    write(tmp_path / "target", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", tmp_path / "a" / "b"):
        with atomic_write(path) as file:
            file.write(b"new")
        assert path.read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


@posix
def test_what_is_not_a_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="not a regular file"), atomic_write(path):
            pass
    assert (tmp_path / "fifo").is_fifo() and Path("/dev/null").is_char_device()


# ======================================================================================
# 9. FASTER STEPS
#
# The same numbers as in chapter 6; what isn't finite touches nothing.
# ======================================================================================


def backward(model, seed, scale=1.0):
    """Gradients of a made-up loss."""
    tokens = random_ids(4, 13, seed=seed)
    (cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean() * scale).backward()


def update(model, optimizer, scaler, clip_grad=1.0, step=1):
    """The end of a training step, as chapter 14 has it; the gradient norm."""
    params = local_params(model)
    take_local_gradients(params)
    norm = gradient_norm(params) / scaler.loss_scale
    scaler.step(optimizer, norm, clip_grad, step)
    optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("clip_grad", [0.0, 0.05, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_scaled_step_is_clip_grad_norm_and_plain_adamw(clip_grad, dtype):
    ours, theirs, scaler = tiny_model(), tiny_model(), GradScaler(CPU, dtype)
    config = OptimizerConfig(lr=0.01, weight_decay=0.1)
    optimizer, plain = (make_adamw(model.parameters(), config) for model in (ours, theirs))
    for seed in range(5):
        backward(ours, seed, scale=scaler.loss_scale)
        backward(theirs, seed)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad or math.inf)
        plain.step()
        plain.zero_grad()
        assert torch.allclose(update(ours, optimizer, scaler, clip_grad), expected, rtol=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5) and one.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("make_optimizer", [
    lambda model: make_adamw(model.parameters(), OptimizerConfig()),
    lambda model: Muon(model, local_params(model), OptimizerConfig()),
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
], ids=["adamw", "muon", "another"])  # fmt: skip
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad, make_optimizer):
    model, scaler = tiny_model(), GradScaler(CPU, torch.float32)
    optimizer = make_optimizer(model)

    def everything():
        moments = [state for p in model.parameters() for state in optimizer.state[p].values()]
        return [x.clone() for x in (*model.parameters(), *moments) if x is not None]

    def skips():
        return scaler.skipped.item(), scaler.consecutive_skips.item()

    backward(model, 0)
    update(model, optimizer, scaler)
    before = everything()
    for in_a_row in (1, 2):
        backward(model, 1)
        model.norm.weight.grad[3] = model.blocks[0].mlp.down.weight.grad[5, 7] = bad
        assert not update(model, optimizer, scaler).isfinite()
        for one, other in zip(before, everything(), strict=True):
            assert torch.equal(one, other)
        assert skips() == (in_a_row, in_a_row)
    backward(model, 2)
    update(model, optimizer, scaler)
    assert not torch.equal(before[0], everything()[0]) and skips() == (2, 0)


def test_the_loss_scale_halves_on_overflow_and_doubles_from_time_to_time():
    model, scaler = tiny_model(), GradScaler(CPU, torch.float16)
    optimizer = make_adamw(model.parameters(), OptimizerConfig())
    scaler.GROWTH_INTERVAL, scales = 3, []
    for step, bad in enumerate((True, True, False, False, True, False, False, True, False), 1):
        backward(model, 0, scaler.loss_scale)
        if bad:
            model.norm.weight.grad[0] = math.inf
        update(model, optimizer, scaler, step=step)
        scales.append(math.log2(scaler.loss_scale.item()))
    assert scales == [15, 14, 15, 15, 14, 15, 15, 14, 15]
    # Resumed, the scale goes on; after a run in another dtype it starts anew.
    scales = [GradScaler(CPU, dtype, scale).loss_scale.item()
              for dtype in (torch.float16, torch.bfloat16) for scale in (2.0**7, 1.0)]
    assert scales == [2.0**7, 2.0**16, 1, 1]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("still", ["embedding.weight", "blocks.0.mlp.down.weight", "blocks."])
@pytest.mark.parametrize("how", ["frozen", "without a gradient"])
def test_what_is_frozen_or_has_no_gradient_is_left_alone(kind, still, how):
    model, scaler = tiny_model(), GradScaler(CPU, torch.float32)
    names = {name for name, _ in model.named_parameters() if name.startswith(still)}
    for name in names:
        model.get_parameter(name).requires_grad_(how != "frozen")
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = OptimizerConfig(lr=0.01)
    optimizer = OPTIMIZERS[kind](model, local_params(model), config, torch.float32, False)
    for seed in range(2):
        backward(model, seed)
        for name in names:
            model.get_parameter(name).grad = None
        update(model, optimizer, scaler)
    assert names == {n for n, p in model.named_parameters() if torch.equal(p, before[n])}


@pytest.mark.parametrize("rows", [1, 512, 1300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chunked_loss_is_the_plain_one_in_value_and_gradient(dtype, rows):
    x, weight = noise(rows, 12, dtype=dtype) * 3, noise(31, 12)
    targets = torch.arange(rows) * 3 % 31
    targets[rows // 3 * 2 + 1 :: 5] = -100  # left out of the mean

    def plain(x, w, t):
        return cross_entropy(x @ w.to(x.dtype).T, t).sum() / (t >= 0).sum()

    found, expected = [], []
    for leaves, loss_of in ((found, chunked_loss), (expected, plain)):
        leaves += [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        leaves.append(loss_of(*leaves, targets))
        (leaves[2] * 5).backward()
        with torch.no_grad():
            assert torch.equal(loss_of(*leaves[:2], targets), leaves[2])
    assert found[2].dtype == torch.float32
    assert torch.allclose(found[2], expected[2], rtol=1e-5)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, theirs in zip([p.grad for p in found[:2]], [p.grad for p in expected[:2]]):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that operations return meanwhile."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.sizes.extend(x.numel() for x in [result] if isinstance(x, torch.Tensor))
        return result


def test_neither_the_loss_nor_an_evaluation_holds_more_than_512_rows_of_logits(toy):
    x, weight = noise(8192, 4).requires_grad_(), noise(1000, 4).requires_grad_()
    with Sizes() as seen:
        chunked_loss(x, weight, torch.arange(8192) % 1000).backward()
    assert max(seen.sizes) == 512 * 1000
    model = TransformerWithLoss(ModelConfig(3000, 64, 1, d_model=8, num_heads=2, d_ff=8))
    with Sizes() as seen:
        ValidationSet(open_tokens(toy / "valid.bin", 3000), 64).loss(model, 16)
    assert max(seen.sizes) == 512 * 3000


def test_the_chunked_loss_sums_many_rows_in_float16():
    """4,096 rows at a time that all pull the same way: 2/3 * 40 * 4,096 are 109,227."""
    x, targets = torch.full((65536, 2), 40.0), torch.zeros(65536, dtype=torch.int64)
    grads = []
    for dtype in (torch.float16, torch.float32):
        weight = torch.zeros(3, 2, requires_grad=True)
        chunked_loss(x.to(dtype), weight, targets).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=2e-3, atol=0)


def test_the_chunked_loss_compiles_as_one():
    """A break in the graph would be no error, only slow."""
    weight, targets = noise(31, 12).requires_grad_(), torch.arange(1300) % 31
    compiled = torch.compile(chunked_loss, fullgraph=True, backend="aot_eager")
    for loss_of in (compiled, chunked_loss):
        loss_of(noise(1300, 12), weight, targets).backward()
        weight.grad.neg_()  # so that the second gradient cancels the first
    assert weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("flags, more", [("", ""), ("--optimizer muon", "--compile")])
def test_recomputed_activations_give_the_same_run(toy, tmp_path, flags, more):
    """Compiled as well."""
    for name, how in (("kept", ""), ("again", f"--activation_checkpointing {more}")):
        do("train", *training(toy, tmp_path / name), f"--max_steps 5 {flags} {how}")
    kept, again = (metrics(tmp_path / name, "train_loss") for name in ("kept", "again"))
    assert again == [pytest.approx(row, rel=1e-5) for row in kept]


@pytest.mark.parametrize("dtype, optimizer", [("bfloat16", "adamw"), ("float16", "muon")])
def test_lower_precision_learns_nearly_the_same(toy, tmp_path, dtype, optimizer):
    for name in ("float32", dtype):
        do("train", *training(toy, tmp_path / name), f"--max_steps 60 --dtype {name}",
           f"--optimizer {optimizer}")  # fmt: skip
    full, low = (metrics(tmp_path / name, "train_loss")[-1][0] for name in ("float32", dtype))
    assert low == pytest.approx(full, rel=0.03) and low != full and full < 2.5


# ======================================================================================
# 10. MUON
#
# The formula against torch's, and the optimizer against the formula.
# ======================================================================================


@pytest.mark.parametrize("clip_grad, dtype", [
    (0.0, torch.float32), (0.05, torch.float32), (0.05, torch.float16)])  # fmt: skip
def test_muon_is_its_formula_in_the_blocks_and_adamw_elsewhere(clip_grad, dtype):
    rows = {"qkv": [32, 16, 16], "output": [32], "gate_up": [40, 40], "down": [32]}
    shape = dataclasses.replace(TINY_MODEL, num_kv_heads=2, tie_embeddings=True)
    scaler, ours = GradScaler(CPU, dtype), Transformer(shape)
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(lr=0.01, weight_decay=0.1)
    optimizer = Muon(ours, local_params(ours), config)
    in_blocks = {p: rows[name.split(".")[-2]] for name, p in theirs.named_parameters()
                 if p.dim() == 2 and name.startswith("blocks.")}  # fmt: skip
    momenta = {p: torch.zeros_like(p) for p in in_blocks}
    adamw = make_adamw([p for p in theirs.parameters() if p not in in_blocks], config)
    for seed in range(4):
        backward(ours, seed, scale=scaler.loss_scale)
        backward(theirs, seed)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad or math.inf)
        for p, sizes in in_blocks.items():
            updated = [muon_naive(*matrices, 0.01, 0.1) for matrices in zip(
                p.data.split(sizes), p.grad.split(sizes), momenta[p].split(sizes))]  # fmt: skip
            p.data, momenta[p] = map(torch.cat, zip(*updated))
        adamw.step()
        theirs.zero_grad()
        update(ours, optimizer, scaler, clip_grad)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("rows, columns", [(8, 8), (6, 20), (20, 6)])
def test_the_formula_of_muon_is_torchs(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    ours = torch.randn(rows, columns, generator=generator)
    theirs, momentum = torch.nn.Parameter(ours.clone()), torch.zeros(rows, columns)
    optimizer = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        theirs.grad = torch.randn(rows, columns, generator=generator)
        before = theirs.data.clone()
        expected, momentum = muon_naive(before, theirs.grad, momentum, 0.1, 0.2)
        optimizer.step()
        # Theirs orthogonalizes in bfloat16.
        assert (theirs - expected).norm() < 0.05 * (expected - before).norm()
    assert not orthogonalize(torch.zeros(1, rows, columns)).any()


# ======================================================================================
# 11. FASTER GENERATION
#
# The texts of chapter 7: one by one, in a batch, and by CUDA graphs.
# ======================================================================================


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 9),
       st.sampled_from([{"temperature": 0}, {}, {"top_k": 20, "top_p": 0.9}]),
       st.sampled_from([1, 2, 4]))  # fmt: skip
@hypothesis.settings(max_examples=15)
def test_texts_in_a_batch_are_the_texts_one_by_one(length, B, seed, how, kv_heads):
    """Prompts shorter and longer than the context; each text stops at its own end."""
    config = dataclasses.replace(TINY_MODEL, num_kv_heads=kv_heads, tie_embeddings=True)
    model, stop_ids = tiny_model(seed, config), [3, 9]
    prompts = torch.tensor([[(row + 7 * i) % 61 for i in range(length)] for row in range(B)])
    steps = list(generate_texts(model, prompts, 45, 5, stop_ids, **how))
    for row, prompt in enumerate(prompts.tolist()):
        alone = text_of(generate_naive, model, prompt, 45, 5 + row, **how)
        end = next((n for n, i in enumerate(alone, 1) if i in stop_ids), 45)
        assert [ids[row] for ids in steps if ids[row] is not None] == alone[:end]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 20, "top_p": 0.95}])
@pytest.mark.parametrize("prompt", [[1], list(PROMPT)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_text_by_cuda_graphs_is_the_same(prompt, how, kv_heads):
    config = dataclasses.replace(TINY_MODEL, num_kv_heads=kv_heads)
    model = tiny_model(config=config).to("cuda")
    prompts, u = torch.tensor([prompt] * 3), random_numbers(7, 3, 60)
    steps = list(generate_texts(model, prompts, 60, 7, **how))  # beyond the context
    ids = generate(model, prompts.to("cuda"), u.to("cuda"), **how)
    assert steps == [step.tolist() for step in ids]


@given(any_texts)
@example("é😀")
def test_streamed_text_never_breaks_a_character(text):
    ids = OURS.encode(text)
    pieces = list(stream_text(OURS, ids))
    assert "".join(pieces) == OURS.decode(ids) and len(pieces) == len(ids) + 2
    if not any("\udc80" <= character <= "\udcff" for character in text):
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    # Bytes of no character are U+FFFD, unless they complete what the prompt has begun.
    assert "".join(stream_text(OURS, [0xC3], "a\n")) == "a\n\ufffd"
    assert text_to_bytes("".join(stream_text(OURS, [0xA9], "caf\udcc3"))) == "café".encode()


# ======================================================================================
# 12. MANY DEVICES
#
# However the same rows are spread over processes and micro-batches, the losses are the same.
# ======================================================================================


@pytest.mark.parametrize("world_size, micro_batches", [(1, 4), (2, 2), (4, 1)])
def test_any_split_over_processes_and_micro_batches_sees_the_same(world_size, micro_batches):
    tokens = TokenFile(Path("tokens"), np.arange(900), 900)
    data = DataConfig(batch_size=2, grad_accum_steps=micro_batches)
    shares = [load_batches(tokens, 5, range(6, 8), CPU, data, rank, world_size, 48)
              for rank in range(world_size)]  # fmt: skip
    for step in (6, 7):
        batches = [next(share) for _ in range(micro_batches) for share in shares]
        expected = get_batch(tokens.ids, 5, 1, range(8 * step, 8 * step + 8))
        for got, whole in zip(zip(*batches), expected, strict=True):
            assert torch.equal(torch.cat(got), whole)
    assert [list(share) for share in shares] == [[]] * world_size


SPREAD = {  # processes, flags: always 8 sequences per step
    "one": (1, "--batch_size 8 --grad_accum_steps 1"),
    "accumulated": (1, "--batch_size 2 --grad_accum_steps 4"),
    "replicated": (2, "--batch_size 2 --grad_accum_steps 2"),
    "fsdp": (2, "--batch_size 2 --grad_accum_steps 2 --fsdp"),
    "muon": (1, "--batch_size 8 --grad_accum_steps 1"),
    "muon_replicated": (2, "--batch_size 2 --grad_accum_steps 2"),
    "muon_block_by_block": (2, "--batch_size 2 --grad_accum_steps 2 --fsdp --fsdp_unit block"),
    "muon_on_four": (4, "--batch_size 1 --grad_accum_steps 2 --fsdp"),
    "muon_hybrid": (4, "--batch_size 1 --grad_accum_steps 2 --fsdp --shard_size 2"),
}
ON_ONE = {how: "muon" if how.startswith("muon") else "one" for how in SPREAD}

# What several processes do in the tests of chapters 12 to 14, one task after the other, because
# starting them takes longer than the tasks.
TASKS = """
import gc, importlib, json, os, resource, sys, torch
from scratchformer import *

CPU = torch.device("cpu")

def build(*shape):
    flags = ProcessConfig(fsdp=True)
    return build_model(LlamaConfig(*shape), 1, CPU, torch.float32, flags)

def run(status, argv, module="scratchformer"):
    argv = [word.replace("RANK", os.environ["RANK"]) for word in argv]
    assert (found := importlib.import_module(module).main(argv)) == status, (found, argv)

def peak_memory():
    with process_group(CPU):
        peaks = []
        # Process 0 draws all parameters, so the others are measured. The first model also loads
        # what FSDP needs, and the last is whole: process 3 alone makes it.
        for layers, fsdp in ((1, True), (24, True), (24, False)):
            if fsdp or get_rank() == 3:
                shape = 1000, 16, layers, 512, 4, 1376
                model = build(*shape) if fsdp else Transformer(ModelConfig(*shape))
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                del model
    if get_rank():
        print("kB", *(peak - peaks[0] for peak in peaks[1:]))

def steps_of_fsdp():
    with process_group(CPU):
        model = build(64, 16, 2, 32, 4, 64)
        params, scaler = local_params(model), GradScaler(CPU, torch.float32)
        optimizer = make_scaled_adamw(model, params, OptimizerConfig())
        tokens = torch.ones(2, 16, dtype=torch.int64)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            set_gradient_sync(model, True)
            model(tokens, tokens).backward()
            take_local_gradients(params)
            scaler.step(optimizer, gradient_norm(params), 1.0)
            optimizer.zero_grad(), model.zero_grad()
            if step in (29, 59):
                gc.collect()
                print(f"process {get_rank()} objects", len(gc.get_objects()))
        del model, params, optimizer

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each task meets at a port of its own
with open(sys.argv[1]) as tasks:
    for port, task, *arguments in json.load(tasks):
        os.environ["MASTER_PORT"] = str(port)
        globals()[task](*arguments)
        print("done", flush=True)
"""


def free_ports(count):
    """Below those that the system gives to outgoing connections."""
    ports = []
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("", port := random.SystemRandom().randrange(10_000, 32_000)))
            ports.append(port)
    return ports


def start_tasks(folder, world_size, *tasks, path=""):
    """Let `world_size` processes under torchrun do all `tasks`. Modules may be at `path`."""
    tasks = [[port, *task] for port, task in zip(free_ports(len(tasks)), tasks, strict=True)]
    script = write(folder / "tasks.py", TASKS)
    todo = write(folder / f"tasks{world_size}.json", json.dumps(tasks))
    env = {"PYTHONPATH": f"{FILE.parent}:{path}"}
    return subprocess.Popen(
        **process(todo, processes=world_size, file=script, env=env),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def end_tasks(started, done, status):
    """What they printed, once `done` tasks have succeeded."""
    out, error = started.communicate(timeout=300)
    assert started.returncode == status and out.count(b"done") == done, error.decode()
    assert b"terminate called" not in error
    return out.decode(), error.decode()


def spread_training(toy, outdir, how, *flags):
    """The command for 30 steps, spread as `how` says. Shards aren't all of the same size."""
    argv = ["train", *training(toy, outdir), SPREAD[how][1], "--max_steps 30 --d_ff 45",
            "--num_kv_heads 1 --tie_embeddings --save_interval 15",
            f"--optimizer {'muon' if how.startswith('muon') else 'adamw'}",
            f"--valid_tokens {toy / 'valid.bin'}", *flags]  # fmt: skip
    return shell_words(argv)


def copy_interrupted(before, after):
    """A run as it was after 15 steps."""
    shutil.copytree(before, after)
    (after / "step_000030.pt").unlink()
    return after


@pytest.fixture(scope="module")
def spread(toy, tmp_path_factory):
    """The same run, spread in each way: a folder of run folders. Other processes than 0 get
    another outdir, as on other machines: a folder "1" and so on beside it."""
    folder = tmp_path_factory.mktemp("spread") / "0"
    folder.mkdir()
    for how, (world_size, _) in SPREAD.items():
        if world_size == 1:
            do(*spread_training(toy, folder / how, how))
    return folder


def spread_tasks(toy, spread, processes, resumed, *more):
    """The tasks of `processes` processes. The last is to resume the run `resumed`."""
    names = [how for how in SPREAD if SPREAD[how][0] == processes]
    tasks = [["run", 0, spread_training(toy, spread.parent / "RANK" / how, how)]
             for how in names]  # fmt: skip
    outdir = copy_interrupted(spread / ON_ONE[resumed], spread / f"{ON_ONE[resumed]}_{resumed}")
    outdir = spread.parent / "RANK" / outdir.name
    return [*tasks, ["run", 0, spread_training(toy, outdir, resumed, "--resume")], *more]


@pytest.fixture(scope="module")
def two_processes(toy, spread):
    """What two processes print that train, resume, and are stopped by a signal."""
    argv = shell_words(["train", *training(toy, spread / "stopped"), "--max_steps 5000 --fsdp"])
    tasks = spread_tasks(
        toy, spread, 2, "fsdp", ["steps_of_fsdp"], ["run", 128 + signal.SIGTERM, argv])
    started = start_tasks(spread, 2, *tasks)
    wait_for(started, spread / "stopped", 5)
    started.send_signal(signal.SIGTERM)
    return end_tasks(started, 2 * len(tasks), status=1)


@pytest.fixture(scope="module")
def four_processes(toy, spread):
    """What four processes print that train, resume, and at last make a mistake."""
    argv = ["train", "--train_tokens", "missing.bin", "--outdir", str(spread / "mistake")]
    tasks = spread_tasks(toy, spread, 4, "muon_hybrid", ["peak_memory"], ["run", 2, argv])
    return end_tasks(start_tasks(spread, 4, *tasks), 4 * len(tasks) - 4, status=1)


def close_rows(rows, expected, tolerance=1e-5):
    for row, other in zip(rows, expected, strict=True):
        assert [x for x in row if x is not None] == pytest.approx(
            [x for x in other if x is not None], rel=tolerance)


@slow
@pytest.mark.parametrize("how", [how for how in SPREAD if how != ON_ONE[how]])
def test_two_ranks_learn_what_one_rank_learns(spread, how, request):
    world_size = SPREAD[how][0]
    if world_size > 1:
        request.getfixturevalue({2: "two_processes", 4: "four_processes"}[world_size])
    columns = ["step", "train_loss", "valid_loss", "grad_norm"]
    rows, one = (metrics(spread / which, *columns) for which in (how, ON_ONE[how]))
    assert len(rows) == 30 and rows[-1][2] < 4
    tolerance = 1e-4 if ON_ONE[how] == "muon" else 1e-5  # small singular values are noisy
    close_rows([row[:3] for row in rows], [row[:3] for row in one], tolerance)
    close_rows([row[3:] for row in rows], [row[3:] for row in one], 100 * tolerance)


@slow
def test_steps_of_fsdp_leave_nothing_behind(two_processes):
    early, late = map(int, re.findall(r"process 0 objects (\d+)", two_processes[0]))
    assert late - early < 30  # objects of Python, in 30 steps; one for each would be a leak


@slow
def test_fsdp_starts_with_its_shards_and_one_whole_tensor(four_processes):
    four = max(map(int, re.findall(r"kB (\d+)", four_processes[0])))
    one = int(re.search(r"kB \d+ (\d+)", four_processes[0])[1])
    # 73 million weights more are 292 MB; a quarter of them, and whole tensors of up to 6 MB.
    assert one > 280_000 and four < 0.33 * one, (one, four)


@slow
def test_a_mistake_under_torchrun_is_told_once(four_processes):
    error = four_processes[1]
    assert error.count("scratchformer: error: ") == 1 and 'scratchformer.py", line' not in error
    assert re.search("scratchformer: error: .*missing.bin", error)


@pytest.mark.parametrize("flags, words", [
    ("--fsdp_unit block", "--fsdp"), ("--shard_size 2", "--fsdp"),
    ("--compile", "C++ compiler"),
    pytest.param("--device cuda", "no CUDA device", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a CUDA device")),
])  # fmt: skip
def test_what_is_not_there_is_refused(toy, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler either
    monkeypatch.delenv("CXX", raising=False)
    argv = ["train", *training(toy, tmp_path / "run"), "--max_steps 9", flags]
    assert words in refused(capsys, tmp_path, *argv)


# ======================================================================================
# 13. CHECKPOINTS
#
# Complete or refused; the same file whoever wrote it; nothing in it is ever executed.
# ======================================================================================


def same_state(one, other, tolerance=0.0):
    """Whether weights and moments are equal, to the bit or within `tolerance`."""
    assert one["optimizer"].keys() == other["optimizer"].keys()
    for left, right in [(one["model"], other["model"])] + [
        (one["optimizer"][key], other["optimizer"][key]) for key in one["optimizer"]
    ]:
        assert left.keys() == right.keys()
        for key in left:
            x, y = torch.as_tensor(left[key]), torch.as_tensor(right[key])
            assert torch.allclose(x, y, rtol=0, atol=tolerance), key
    return True


def test_a_model_loaded_in_bfloat16_keeps_the_angles_of_rope(toy):
    state = load_checkpoint(toy / "run")
    model = model_from_checkpoint(state, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.rope, model_from_checkpoint(state).rope)
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def names_of(checkpoints):
    return [path.name for path in checkpoints]


def test_the_newest_checkpoints_are_kept_or_all_and_nothing_of_another_name(toy, tmp_path):
    assert names_of(checkpoints_in(toy / "run")) == ["step_000100.pt", "step_000150.pt"]
    flags = [*training(toy, tmp_path), "--save_interval 1 --resume"]
    do("train", *flags, "--max_steps 4 --keep_checkpoints 0")
    assert names_of(checkpoints_in(tmp_path)) == [f"step_00000{n}.pt" for n in range(1, 5)]
    others = ["step_000004_best.pt", "step_000004-v2.pt", "step_best.pt", "step_7.pt"]
    for name in others:
        shutil.copy(tmp_path / "step_000004.pt", tmp_path / name)
    do("train", *flags, "--max_steps 6 --keep_checkpoints 1")
    assert {*names_of(tmp_path.glob("*.pt"))} == {*others, "step_000006.pt"}


def test_a_damaged_newest_checkpoint_is_named_and_nothing_is_lost(toy, tmp_path, capsys):
    do("train", *training(toy, tmp_path), "--max_steps 6 --save_interval 3")
    rows, newest = metrics(tmp_path, *EXACT), tmp_path / "step_000006.pt"
    os.truncate(newest, 9999)
    again = ["train", *training(toy, tmp_path), "--max_steps 6 --resume --keep_checkpoints 1"]
    assert "step_000006.pt is not a valid checkpoint" in refused(capsys, tmp_path, *again)
    newest.unlink()
    do(*again)
    assert names_of(checkpoints_in(tmp_path)) == ["step_000006.pt"]
    assert load_checkpoint(tmp_path)["step"] == 6 and metrics(tmp_path, *EXACT) == rows


@slow
@pytest.mark.parametrize("how", ["fsdp", "muon_on_four", "muon_hybrid"])
def test_fsdp_writes_the_checkpoint_that_one_process_writes(
    spread, two_processes, four_processes, how
):
    one, other = (load_checkpoint(spread / which) for which in (ON_ONE[how], how))
    assert same_state(one, other, tolerance=1e-3)
    assert one.keys() == other.keys() and one["optimizer"]["step"] == other["optimizer"]["step"]
    model_from_checkpoint(other)


@slow
@pytest.mark.parametrize("before, after", [
    ("fsdp", "one"), ("one", "fsdp"), ("muon_replicated", "muon"), ("muon", "muon_hybrid")])
def test_a_run_resumes_on_another_number_of_processes(
    toy, spread, two_processes, four_processes, before, after
):
    outdir = spread / f"{before}_{after}"
    if SPREAD[after][0] == 1:  # the others have resumed already
        do(*spread_training(toy, copy_interrupted(spread / before, outdir), after, "--resume"))
    columns = ["step", "train_loss", "valid_loss"]
    rows, one = (metrics(folder, *columns) for folder in (outdir, spread / ON_ONE[after]))
    close_rows(rows, one, 1e-4 if ON_ONE[after] == "muon" else 1e-5)


def test_the_last_checkpoint_can_be_weights_only(toy, tmp_path, capsys):
    do("train", *training(toy, tmp_path), "--max_steps 6 --save_interval 2 --weights_only")
    states = [load_checkpoint(path) for path in checkpoints_in(tmp_path)]
    assert ["optimizer" in state for state in states] == [True, True, False]
    longer = ["train", *training(toy, tmp_path), "--max_steps 8 --resume"]
    assert "step_000006.pt has no optimizer state" in refused(capsys, tmp_path, *longer)
    (tmp_path / "step_000006.pt").unlink()
    do(*longer)
    assert metrics(tmp_path, "step") == [(step,) for step in range(1, 9)]


SMALL_STATE = {"model": {"w": torch.arange(50.0)}, "model_config": {"vocab_size": 5}, "step": 3}


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    save_checkpoint(path := tmp_path_factory.mktemp("small") / "step_000003.pt", SMALL_STATE)
    return path.read_bytes()


def test_a_truncated_checkpoint_is_refused(small_checkpoint, tmp_path):
    for length in [*range(0, len(small_checkpoint), 50), len(small_checkpoint) - 1]:
        with pytest.raises(UserError, match="is not a valid checkpoint"):
            load_checkpoint(write(tmp_path / f"{length}.pt", small_checkpoint[:length]))


def test_a_flipped_byte_is_noticed_or_harmless(small_checkpoint, tmp_path):
    noticed, path = 0, tmp_path / "flipped.pt"
    for place in range(0, len(small_checkpoint), 3):
        damaged = bytearray(small_checkpoint)
        damaged[place] ^= 0xFF
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        try:
            state = load_checkpoint(write(path, bytes(damaged)))
        except UserError:
            noticed += 1
        else:  # padding, a date
            assert torch.equal(state["model"]["w"], SMALL_STATE["model"]["w"]), place
            assert {**state, "model": 0} == {**SMALL_STATE, "model": 0, "path": str(path)}
    assert noticed > 200


class Code:
    """Unpickled, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("dump", [torch.save, pickle.dump, lambda x, file: torch.save(
    x, file, _use_new_zipfile_serialization=False)])  # fmt: skip
def test_code_in_a_checkpoint_is_refused_and_not_run(toy, tmp_path, capsys, dump):
    with open(tmp_path / "step_000001.pt", "wb") as file:
        dump({**SMALL_STATE, "extra": Code(str(tmp_path / "executed"))}, file)
    argv = f"eval --checkpoint {tmp_path} --valid_tokens {toy / 'valid.bin'}"
    assert "step_000001.pt" in refused(capsys, tmp_path, argv)
    pickle.loads(pickle.dumps(Code(str(tmp_path / "executed")))).close()
    assert (tmp_path / "executed").exists()  # as it would have been


@pytest.mark.parametrize("state", [
    {**SMALL_STATE, "model_config": dataclasses.asdict(TINY_MODEL)},  # other weights
    {**SMALL_STATE, "model_config": {"layers": 3}},
    {**SMALL_STATE, "model_config": {**dataclasses.asdict(TINY_MODEL), "d_model": None}},
    [1, 2],
])  # fmt: skip
def test_a_checkpoint_of_another_kind_is_refused(toy, tmp_path, capsys, state):
    save_checkpoint(tmp_path / "step_000001.pt", state)
    for argv in (f"eval --valid_tokens {toy / 'valid.bin'}", "generate --prompt x"):
        error = refused(capsys, tmp_path, argv, f"--checkpoint {tmp_path}")
        assert "step_000001.pt" in error


@posix
def test_a_full_disk_leaves_the_earlier_checkpoint(toy, tmp_path, capsys):
    flags = [*training(toy, tmp_path), "--save_interval 2"]
    do("train", *flags, "--max_steps 4")
    import resource

    before, limits = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be larger
    try:
        status = main(shell_words(["train", *flags, "--max_steps 400 --resume"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "could not be written" in error
    assert snapshot(tmp_path).keys() == before.keys() and load_checkpoint(tmp_path)["step"] == 4


# ======================================================================================
# 14. THE TRAINING RUN
#
# A run is its flags and its data: when it was interrupted leaves no trace.
# ======================================================================================


GOOD = [i % 50 for i in range(99)]


@pytest.mark.parametrize("data, metadata, flags, words", [
    (GOOD, None, "", "--vocab_size"), (b"some text", None, "--vocab_size 50", "is text"),
    (GOOD, None, "--vocab_size 50", "fewer than two windows"),
    (b"\0dd", None, "--vocab_size 50", "not a valid token file"),
    (GOOD, {"num_tokens": 98, "vocab_size": 50}, "", "99 tokens, not 98"),
    (GOOD, {"dtype": "uint32", "vocab_size": 50}, "", "not a valid token file"),
    (GOOD, {"dtype": "float7", "vocab_size": 50}, "", "float7"),
    (GOOD, {"vocab_size": 50}, "--vocab_size 49", "50"),
])  # fmt: skip
def test_a_bad_token_file_is_refused(capsys, tmp_path, data, metadata, flags, words):
    path = token_file(tmp_path / "train.bin", data if data == GOOD else [], metadata)
    if isinstance(data, bytes):
        write(path, data)
    argv = ["train", *TINY, f"--train_tokens {path} --max_steps 9 --outdir {tmp_path / 'run'}"]
    error = refused(capsys, tmp_path, *argv, flags)
    assert words in error and "train.bin" in error


def test_a_file_of_uint32_without_metadata_is_refused(tmp_path):
    ids = np.random.default_rng(1).integers(0, 100_000, 5000)
    with pytest.raises(UserError, match="uint32"):
        open_tokens(token_file(tmp_path / "tokens", ids, dtype="<u4"), 1 << 17)
    token_file(tmp_path / "tokens", ids, {"dtype": "uint32", "vocab_size": 100_000}, "<u4")
    assert open_tokens(tmp_path / "tokens").ids.tolist() == ids.tolist()


def test_an_id_outside_the_vocabulary_is_named_before_the_model_sees_it(capsys, tmp_path):
    path = token_file(tmp_path / "train.bin", [*GOOD, 50, *GOOD])
    argv = ["train --vocab_size 50 --max_steps 50 --train_tokens", path, *TINY]
    assert main(shell_words([*argv, f"--outdir {tmp_path / 'run'}"])) == 2
    error = capsys.readouterr().err
    assert "train.bin holds the id 50, outside the vocabulary of 50" in error
    assert error.count("\n") == 1 and not checkpoints_in(tmp_path / "run")


def test_ids_that_the_tokenizer_lacks_are_refused_before_the_run(toy, tmp_path, capsys):
    """As of a vocabulary that was rounded up: how many bytes would they be?"""
    path = token_file(tmp_path / "valid.bin", [*GOOD, *range(99), 290])
    argv = ["train", *training(toy, tmp_path / "run"), "--vocab_size 300 --valid_tokens", path]
    assert "id 290 is not in the vocabulary of 280" in refused(capsys, tmp_path, *argv)


EXACT = ["step", "train_loss", "valid_loss", "lr", "grad_norm"]


def loud(argv):
    return [word for word in shell_words(argv) if word != "--quiet"]


def wait_for(trainer, outdir, step):
    """Until the metrics of a training process have reached `step`."""
    path = outdir / "metrics.jsonl"
    while trainer.poll() is None:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended before step {step}: {trainer.communicate()}")


@slow
def test_resumed_run_equals_unbroken_run(toy, tmp_path):
    """Killed, stopped, and meanwhile there's a second run for the same outdir."""
    flags = ["--max_steps 100 --d_model 48 --batch_size 16 --log_interval 1 --optimizer muon",
             f"--valid_tokens {toy / 'valid.bin'} --eval_interval 40 --save_interval 10"]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    do("train", *training(toy, unbroken), *flags)
    again = ["train", *training(toy, broken), *flags, "--resume"]
    for step, number, status in ((15, signal.SIGKILL, -9), (42, signal.SIGTERM, 143)):
        trainer = subprocess.Popen(**process(*again))
        wait_for(trainer, broken, step)
        # A deleted checkpoint that is still mapped would keep its space on the disk.
        maps = Path(f"/proc/{trainer.pid}/maps").read_text()
        assert "python" in maps and "step_0000" not in maps
        assert main(shell_words(again)) == 2
        trainer.send_signal(number)
        assert trainer.wait() == status
        newest = load_checkpoint(broken)["step"]
        assert newest >= step - 10 and (status < 0 or newest >= step)
    do(*again)
    assert metrics(broken, *EXACT) == metrics(unbroken, *EXACT)
    assert same_state(load_checkpoint(broken), load_checkpoint(unbroken))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_with_any_optimizer_resumes_bit_for_bit(toy, tmp_path, optimizer):
    flags = [f"--optimizer {optimizer} --save_interval 5 --max_steps 9 --log_interval 1"]
    do("train", *training(toy, tmp_path / "unbroken"), *flags)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    (tmp_path / "broken" / "step_000009.pt").unlink()
    do("train", *training(toy, tmp_path / "broken"), *flags, "--resume")
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    assert same_state(load_checkpoint(broken), load_checkpoint(unbroken))
    assert metrics(broken, *EXACT) == metrics(unbroken, *EXACT)


@posix
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_ends_the_run_unless_it_is_ignored(toy, tmp_path, number):
    """SIGHUP is ignored under nohup; here all but `number` are."""
    number = getattr(signal, number)
    kinds = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in kinds if kind != number}

    def send():
        while not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.01)
        for kind in (*before, number):
            os.kill(os.getpid(), kind)

    sender = threading.Thread(target=send)
    sender.start()
    argv = ["train", *training(toy, tmp_path), "--max_steps 99999"]
    assert main(shell_words(argv)) == 128 + number
    sender.join()
    assert load_checkpoint(tmp_path)["step"] == metrics(tmp_path, "step")[-1][0] < 99999
    for kind, handler in before.items():
        assert signal.signal(kind, handler) == signal.SIG_IGN


@slow
def test_only_process_0_needs_to_see_outdir_and_a_signal_stops_all(spread, two_processes):
    assert not (spread.parent / "1").exists()
    assert load_checkpoint(spread / "stopped")["step"] >= 5


def test_a_finished_run_is_resumed_to_no_effect_and_says_so(toy, tmp_path, capsys):
    shutil.copytree(toy / "run", tmp_path / "run")
    before = snapshot(tmp_path)
    do("train", *loud(training(toy, tmp_path / "run")), "--max_steps 150 --resume")
    error = capsys.readouterr().err
    assert "nothing left to do" in error and "step 150" in error and "tok/s" not in error
    assert snapshot(tmp_path) == before


def test_files_of_another_run_are_not_overwritten(toy, tmp_path, capsys):
    flags = ["train", *training(toy, tmp_path), "--max_steps 6"]
    do(*flags)
    assert "isn't empty" in refused(capsys, tmp_path, *flags)
    (tmp_path / "step_000006.pt").unlink()
    assert "isn't empty" in refused(capsys, tmp_path, *flags)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    do(*flags, "--resume")  # killed before its first checkpoint, it begins again
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)  # nothing is lost
    assert len(metrics(tmp_path, "step")) == 6


@pytest.mark.parametrize("flag", ["", "--resume"])
def test_a_directory_that_is_not_a_run_is_left_as_it_is(toy, tmp_path, capsys, flag):
    (tmp_path / "texts").mkdir()
    text = write(tmp_path / "texts" / "tokenizer.json", "{}")
    argv = ["train", *training(toy, tmp_path / "texts"), "--max_steps 9", flag]
    assert "isn't empty" in refused(capsys, tmp_path, *argv)
    assert input_files(tmp_path) == [text]  # it isn't marked as ours


def test_resume_needs_no_other_flag_and_what_is_given_instead_is_said(toy, tmp_path, capsys):
    do("train", *training(toy, tmp_path), f"--max_steps 8 --valid_tokens {toy / 'valid.bin'} "
       "--eval_interval 3 --save_interval 4 --keep_best --log_interval 4")  # fmt: skip
    unbroken = metrics(tmp_path, *EXACT)
    (tmp_path / "step_000008.pt").unlink()  # as if killed before it was written
    resume = f"train --resume --outdir {tmp_path} --device cpu"
    do(resume)
    assert metrics(tmp_path, *EXACT) == unbroken
    assert load_checkpoint(tmp_path)["model_config"]["d_model"] == 32
    assert "changed" not in capsys.readouterr().err
    do(resume, "--max_steps 9 --no-keep_best --lr 1e-5")
    error = capsys.readouterr().err
    for change in ("max_steps 8 -> 9", "keep_best True -> False", "lr 0.003 -> 1e-05"):
        assert change in error
    contradiction = [resume, "--max_steps 10 --num_layers 3"]
    assert "--num_layers is 3" in refused(capsys, tmp_path, *contradiction)


def test_another_batch_size_on_resume_neither_skips_nor_repeats_windows(toy, tmp_path):
    flags = training(toy, tmp_path)
    do("train", *flags, "--max_steps 6")
    do("train", *flags, "--max_steps 8 --batch_size 8 --resume")
    assert load_checkpoint(tmp_path)["windows"] == 6 * 4 + 2 * 8
    seen, epochs = metrics(tmp_path, "tokens_seen", "epochs")[-1]
    assert seen == 40 * 64 and epochs == seen / len(open_tokens(toy / "train.bin").ids)
    tokens, data = open_tokens(toy / "train.bin"), DataConfig(batch_size=8)
    inputs, targets = next(load_batches(tokens, 64, range(6, 8), CPU, data, 0, 1, 24))
    expected = get_batch(tokens.ids, 64, 1, range(24, 32))
    assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])


def test_a_run_resumes_with_another_optimizer_and_says_so(toy, tmp_path, capsys):
    argv = [*loud(training(toy, tmp_path)), "--warmup_steps 2"]
    do("train", *argv, "--max_steps 4")
    for steps, old, new in ((6, "adamw", "muon"), (8, "muon", "adamw")):
        do("train", *argv, f"--max_steps {steps} --optimizer {new} --resume")
        assert f"optimizer {old} -> {new}" in capsys.readouterr().err
        moments = load_checkpoint(tmp_path)["optimizer"]["exp_avg_sq"]
        assert ("blocks.0.mlp.down.weight" in moments) == (new == "adamw")
        assert "lm_head.weight" in moments
    losses = [loss for (loss,) in metrics(tmp_path, "train_loss")]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_a_tokenizer_other_than_the_models_is_refused(toy, tmp_path, capsys):
    """In training, resuming, evaluation, generation and export."""
    other = tokenizer_from(toy_text(3, 99), 20, [END_OF_TEXT])
    other.save(tmp_path / "other.json")
    encode_file(other, toy / "valid.txt", tmp_path / "other.bin")
    do("train", *training(toy, tmp_path / "run"), "--max_steps 4")
    new = ["train --max_steps 5", *training(toy, tmp_path / "new")]
    of_other = f"train --max_steps 5 --train_tokens {tmp_path / 'other.bin'}"
    for argv in (
        [*new, f"--valid_tokens {tmp_path / 'other.bin'}"],
        [*new, f"--tokenizer_path {tmp_path / 'other.json'}"],
        [of_other, *TINY, f"--resume --vocab_size 280 --outdir {tmp_path / 'run'}"],
        [of_other, *TINY, f"--init_from {tmp_path / 'run'} --outdir {tmp_path / 'new'}"],
        [f"eval --checkpoint {toy / 'run'} --valid_tokens {tmp_path / 'other.bin'}"],
        *([f"{command} --checkpoint {tmp_path / 'run'}",
           f"--tokenizer_path {tmp_path / 'other.json'}"]
          for command in (f"eval --valid_tokens {toy / 'valid.bin'}", "generate --prompt x",
                          f"export --outdir {tmp_path / 'new'}")),
    ):  # fmt: skip
        assert "different tokenizer" in refused(capsys, tmp_path, *argv), argv


def test_the_log_shows_the_mean_loss_since_the_last_line(toy, tmp_path):
    for name, interval in (("each", 1), ("mean", 3)):
        flags = f"--max_steps 7 --log_interval {interval}"
        do("train", *training(toy, tmp_path / name), flags)
    each = [loss for (loss,) in metrics(tmp_path / "each", "train_loss")]
    expected = [*each[:2], each[2], sum(each[3:6]) / 3, each[6]]
    found = [loss for (loss,) in metrics(tmp_path / "mean", "train_loss")]
    assert found == pytest.approx(expected, rel=1e-5)
    seen, epochs = metrics(tmp_path / "mean", "tokens_seen", "epochs")[-1]
    num_tokens = len(open_tokens(toy / "train.bin").ids)
    assert seen == 7 * 4 * 64 and epochs == pytest.approx(seen / num_tokens)


def test_the_best_weights_are_kept(tmp_path, capsys):
    """Training on noise, in files as nanoGPT writes them: the loss soon only rises."""
    ids = np.random.default_rng(1).integers(0, 50, 700)
    train = token_file(tmp_path / "train.bin", ids[:200])
    valid = token_file(tmp_path / "valid.bin", ids[200:])
    run = tmp_path / "run"
    flags = [*TINY, f"--train_tokens {train} --valid_tokens {valid} --vocab_size 50",
             f"--outdir {run} --eval_interval 10 --keep_best --keep_checkpoints 1 --resume"]
    for max_steps in (50, 60):  # resumed, it remembers the best loss
        do("train", *flags, f"--max_steps {max_steps}")
    losses = dict(row for row in metrics(run, "step", "valid_loss") if row[1])
    best = min(losses, key=losses.get)
    # It is no step_N.pt: never deleted as old, never resumed from.
    assert names_of(checkpoints_in(run)) == ["step_000060.pt"]
    state = load_checkpoint(run / "best.pt")
    assert state["step"] == best < 40 and "optimizer" not in state
    do(f"eval --checkpoint {run / 'best.pt'} --valid_tokens {valid} --device cpu")
    shown = json.loads(capsys.readouterr().out)
    assert shown["valid_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert "bits_per_byte" not in shown  # there's no tokenizer


def test_evaluation_is_without_dropout_and_leaves_the_model_as_it_was(toy):
    """Whoever adds dropout gets one validation loss, and a model that still drops."""
    class Dropping(TransformerWithLoss):
        def forward(self, *args):
            modes.append(self.training)
            return super().forward(*args)

    modes, tokens = [], open_tokens(toy / "valid.bin")
    model = Dropping(dataclasses.replace(TINY_MODEL, vocab_size=280))
    valid = ValidationSet(tokens, model.config.context_length, limit=4)
    valid.loss(model, 16)
    validation_loss(model, tokens.ids[:100])
    assert modes and not any(modes) and model.training
    valid.loss(model.eval(), 16)
    assert not model.training


@pytest.mark.parametrize("length, batch_size", [(65, 16), (300, 1), (130, 16)])
def test_evaluation_computes_no_empty_rows(toy, tmp_path, length, batch_size):
    class Counting(TransformerWithLoss):
        def forward(self, tokens, targets):
            rows.append(len(tokens))
            return super().forward(tokens, targets)

    rows, model = [], Counting(LlamaConfig(280, 64, 1, 16, 2, 16))
    ids = np.fromfile(toy / "valid.bin", "<u2")[:length]
    valid = ValidationSet(TokenFile(tmp_path, ids, 280), 64)
    valid.loss(model, batch_size)
    assert sum(rows) == len(valid.starts) == math.ceil((length - 1) / 64)


def test_bits_per_byte_by_hand(tmp_path):
    """Tokens of one byte, and a loss of ln 2; but END_OF_TEXT is no text."""
    about = {"vocab_size": 257}
    path = token_file(tmp_path / "t.bin", [9, *[*b"aab", 256] * 500], about)
    valid = ValidationSet(open_tokens(path), 16, 0, tokenizer_from("", 0, [END_OF_TEXT]))
    result = valid.report(loss=math.log(2), compare=True, floor=0.5)
    assert (result["perplexity"], result["bits_per_byte"]) == pytest.approx((2, 4 / 3))
    assert result["lzma_bits_per_byte"] < 0.5  # some 80 bytes of header and little else
    assert result["percent_above_floor"] == pytest.approx(400 / 3 * math.log(2) / 0.5 - 100)
    without_text = ValidationSet(open_tokens(path, 300), 16).report(1.0, compare=True)
    assert without_text.keys() == {"valid_loss", "perplexity"}


def test_windows_to_evaluate_on_are_end_to_end_or_spread_evenly(tmp_path):
    tokens = open_tokens(token_file(tmp_path / "t.bin", range(12)), 12)
    assert ValidationSet(tokens, 2).starts.tolist() == [0, 2, 4, 6, 8, 10]
    assert ValidationSet(tokens, 2, 3).starts.tolist() == [0, 4, 10]


@pytest.mark.parametrize("length, T", [
    (2, 64), (20, 64), (65, 64), (66, 64), (None, 64), (None, 7), (None, 200)])  # fmt: skip
def test_the_loss_is_the_mean_over_all_tokens(toy, tmp_path, length, T):
    """Of the tail too, of a text shorter than one window, and with any context length."""
    model = model_from_checkpoint(load_checkpoint(toy / "run"), context_length=T)
    ids = np.fromfile(toy / "valid.bin", "<u2")[:length]
    tokens = open_tokens(token_file(tmp_path / "t.bin", ids, {"vocab_size": 280}))
    total, ids = 0.0, torch.from_numpy(ids.astype(np.int64))
    for start in range(0, len(ids) - 1, T):
        window = ids[None, start : start + T + 1]
        total += cross_entropy(model(window[:, :-1]), window[:, 1:]).sum().item()
    for batch_size in (1, 3, 16):
        found = ValidationSet(tokens, T).loss(model, batch_size)
        assert found == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_eval_gives_the_figures_that_training_gave_of_tokens_and_of_their_text(toy, capsys):
    for flag in ("--valid_tokens", "--text_path"):
        path = toy / ("valid.bin" if flag == "--valid_tokens" else "valid.txt")
        do(f"eval --checkpoint {toy / 'run'}", flag, f"{path} --device cpu --quiet")
        shown = json.loads(capsys.readouterr().out)
        *names, lzma = ["valid_loss", "perplexity", "nats_per_byte", "bits_per_byte",
                        "lzma_bits_per_byte"]
        assert list(shown) == [*names, lzma]
        last = metrics(toy / "run", *names)[-1]
        assert [shown[name] for name in names] == pytest.approx(list(last), rel=1e-6)
        assert shown["bits_per_byte"] < shown[lzma]


def test_the_model_learns_all_but_what_cannot_be_known(toy):
    ids = np.fromfile(toy / "valid.bin", "<u2")
    floor = 200 * math.log(2 * 4 * 3 * 4) / len(ids)  # nats per token: 200 sentences of 96
    loss = metrics(toy / "run", "valid_loss")[-1][0]
    assert 0.95 * floor < loss < 1.4 * floor
    assert metrics(toy / "run", "train_loss")[0][0] == pytest.approx(math.log(280), rel=0.03)


def test_a_run_that_is_not_finite_stops_and_names_the_step(toy, tmp_path, capsys):
    flags = [*training(toy, tmp_path), "--max_steps 100 --lr 1e9 --save_interval 5"]
    assert main(shell_words(["train", *flags])) == 2
    error = capsys.readouterr().err
    assert re.search(r"not been finite", error) and error.count("\n") == 1
    assert 10 <= len(metrics(tmp_path, "step")) < 30  # in JSON, NaN is null
    assert all(p.isfinite().all() for p in load_checkpoint(tmp_path)["model"].values())


# ======================================================================================
# 15. PUBLISHED MODELS
#
# Files made by others, and ours in the hands of the libraries they are meant for.
# ======================================================================================


def test_saving_and_loading_is_the_identity(tmp_path):
    other = Tokenizer(OURS.vocab, OURS.merges, None, [r"\d", "b+"], True, "NFKC")
    for tokenizer in (OURS, OURS_GPT4, other):
        tokenizer.save(tmp_path / "1.json")
        again = Tokenizer.load(tmp_path / "1.json")
        again.save(tmp_path / "2.json")
        assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
        assert again.fingerprint() == tokenizer.fingerprint()
        for name in ("vocab", "merges", "special_tokens", "patterns", "ignore_merges",
                     "normalizer"):  # fmt: skip
            assert getattr(again, name) == getattr(tokenizer, name)


def test_the_layout_of_a_file_does_not_change_the_fingerprint(tmp_path):
    content = json.loads(json.dumps(tokenizer_to_json(OURS)))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    write(tmp_path / "other.json", json.dumps(dict(reversed(content.items())), indent=7))
    assert Tokenizer.load(tmp_path / "other.json").fingerprint() == OURS.fingerprint()


PUBLISHED = ["qwen3", "gpt-oss", "deepseek-v3"]


@pytest.fixture(scope="module")
def published():
    """Theirs and ours of the excerpts of published files in data/tokenizers."""
    paths = [DATA / "tokenizers" / f"{name}.json" for name in PUBLISHED]
    return [(tokenizers.Tokenizer.from_file(str(path)), Tokenizer.load(path)) for path in paths]


@given(text=texts)
@example(text="cafe\u0301 漢字、です <think>12345\n\n'LL don't  HTTPServer's aaaa<|im_start|>")
@example(text="ninininini ababababa nananananan")
def test_published_tokenizers_give_the_same_ids_here(published, text):
    for theirs, ours in published:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids == list(ours.encode_iterable(text))
        assert ours.decode(ids) == "".join(ours.normalized_pieces(text))


@given(st.lists(texts, min_size=1, max_size=40), st.integers(20, 200))
def test_pieces_of_a_text_have_the_ids_of_published_tokenizers(published, chunks, size):
    text = "word".join(chunks)
    for _, ours in published:
        pieces = list(safe_pieces(chunks_of(text, 7), ours, size))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in ours.encode_piece(piece).tolist()] == (
            ours.encode_piece(text).tolist())


def chunks_of(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


def test_a_published_file_is_saved_as_it_was(tmp_path):
    for name in PUBLISHED:
        path = DATA / "tokenizers" / f"{name}.json"
        Tokenizer.load(path).save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def foreign_tokenizer(
    folder, name, pre_tokenizer, specials=("<s>", "<a>"), alphabet=ALPHABET, **changes
):
    """A tokenizer trained by `tokenizers`, its special tokens first, as theirs and as ours."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(**changes))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    theirs.train_from_iterator([SAMPLE], tokenizers.trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=list(specials),
        initial_alphabet=alphabet))  # fmt: skip
    bos = specials[0]
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, theirs.token_to_id(bos))])
    theirs.save(str(folder / f"{name}.json"))
    return theirs, Tokenizer.load(folder / f"{name}.json")


QWEN_PATTERN = GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Tokenizers of the kinds that GPT-2, Llama 3, Qwen, GPT-4 and SmolLM use."""
    folder, steps = tmp_path_factory.mktemp("foreign"), tokenizers.pre_tokenizers
    byte_level = steps.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(pattern, *how):
        return steps.Sequence([steps.Split(tokenizers.Regex(pattern), *(how or ["isolated"])),
                               steps.ByteLevel(add_prefix_space=False, use_regex=False)])

    def digits(one_by_one):
        return steps.Sequence([steps.Digits(individual_digits=one_by_one), byte_level])

    return [
        foreign_tokenizer(folder, "gpt2", byte_level),
        foreign_tokenizer(folder, "llama3", split(GPT4_PATTERN), ignore_merges=True),
        foreign_tokenizer(folder, "qwen", split(QWEN_PATTERN)),
        foreign_tokenizer(folder, "gpt4", split(GPT4_PATTERN, "removed", True)),
        foreign_tokenizer(folder, "smollm", digits(True)),
        # Like the real one, it knows only the bytes that occur where it was trained.
        foreign_tokenizer(folder, "smollm_few", digits(True), alphabet=[]),
        foreign_tokenizer(folder, "digits", digits(False)),
    ]


@given(text=texts)
@example(text="   12  3\n 4")
def test_tokenizers_made_by_others_give_the_same_ids_here(foreign, text):
    lacking = [sum(len(token) == 1 for token in ours.id_of) < 256 for _, ours in foreign]
    assert lacking[5] and not lacking[4]
    for theirs, ours in foreign:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_tokenizers_made_by_others_survive_saving(foreign, tmp_path):
    for theirs, ours in foreign:
        ours.save(tmp_path / "again.json")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
        ids = theirs.encode(SAMPLE).ids  # with <s> in front
        assert again.encode(SAMPLE).ids == ids == ours.encode(SAMPLE, add_start=True)
        assert ours.encode(SAMPLE) == ids[1:]


def changed(**changes):
    """Our tokenizer.json with some entries changed; a__b=x changes content["a"]["b"]."""
    content = json.loads(json.dumps(tokenizer_to_json(OURS)))
    for place, value in changes.items():
        *path, last = place.split("__")
        where = content
        for key in path:
            where = where[key]
        where[last] = value
    return json.dumps(content)


def split_on(pattern, behavior="Isolated"):
    split = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.mark.parametrize("content, words", [
    ("{", "damaged"),
    (b"\xff\xfe", "damaged"),
    (changed(model__type="WordPiece"), "WordPiece"),
    (changed(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "pre-tokenizer"),
    (changed(pre_tokenizer=split_on({"String": " "})), "pre-tokenizer"),
    (changed(pre_tokenizer=split_on({"Regex": "a"}, "Removed")), "pre-tokenizer"),
    (changed(pre_tokenizer=split_on({"Regex": "[z-a]"})), "bad character range"),
    (changed(pre_tokenizer=split_on({"Regex": "a*"})), "empty string"),
    (changed(model__byte_fallback=True), "byte_fallback"),
    (changed(normalizer={"type": "NFD"}), "NFD"),
    (changed(model__merges=[["q", "zzz"]]), "zzz"),
    (changed(model__merges=["q z"]), "b'qz'"),
    (changed(model__vocab={"▁the": 0}), "damaged"),
])  # fmt: skip
def test_a_tokenizer_file_of_another_kind_is_refused_with_a_reason(
    capsys, tmp_path, content, words
):
    path = write(tmp_path / "tokenizer.json", content)
    text = write(tmp_path / "text", "some text")
    error = refused(capsys, tmp_path, f"bpe-encode --dataset_path {text}",
                    f"--tokenizer_path {path} --out_path {tmp_path}/out.bin")  # fmt: skip
    assert words in error and "tokenizer.json is not a valid tokenizer.json: " in error


@pytest.fixture(scope="module")
def exported(toy):
    """Our model, and the folder read by transformers: ours, theirs, their tokenizer."""
    import transformers

    do(f"export --checkpoint {toy / 'run'} --outdir {toy / 'exported'} --quiet")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(toy / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "exported")
    return model_from_checkpoint(load_checkpoint(toy / "run")), theirs.eval(), tokenizer


def test_transformers_gives_the_same_logits(exported):
    ours, theirs, _ = exported
    tokens = torch.randint(280, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


def test_transformers_stops_at_the_end_of_text(exported, toy):
    _, theirs, tokenizer = exported
    prompt = tokenizer("The red", return_tensors="pt")
    text = tokenizer.decode(theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    assert re.fullmatch(rf"The red \w+ \w+ the \w+\.\n{re.escape(END_OF_TEXT)}", text), text


@given(text=texts)
def test_autotokenizer_gives_the_same_ids(exported, toy, text):
    text += END_OF_TEXT + "The cow"
    assert exported[2](text)["input_ids"] == Tokenizer.load(toy / "tokenizer.json").encode(text)


def test_what_is_exported_can_be_read_back_to_the_bit(exported, toy):
    ours, back = load_checkpoint(toy / "run"), load_hf_model(toy / "exported")
    assert back["model_config"] == ours["model_config"]
    assert list(back["model"]) == list(ours["model"])
    for name, weight in ours["model"].items():
        assert torch.equal(weight, back["model"][name]), name


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
LLAMAS = {
    "like SmolLM2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "like Llama 3.2": {"num_key_value_heads": 2, "tie_word_embeddings": True,
                       "rope_parameters": LLAMA3_ROPE},
    "plain": {},
    "like Qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24,
                   "tie_word_embeddings": True},
}  # fmt: skip


def save_llama(folder, dtype=torch.float32, **changes):
    """A Llama or Qwen3 with random weights, saved by transformers in several files."""
    import transformers

    torch.manual_seed(5)
    llama = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(changes.pop("model_type", "llama"), **{
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 72,
            "num_hidden_layers": 3, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 256,
            "bos_token_id": 270, "eos_token_id": [271, 272], **changes,
            "rope_parameters": changes.get("rope_parameters", {"rope_type": "default",
                                                               "rope_theta": 500.0}),
        })
    )  # fmt: skip
    with torch.no_grad():
        for p in llama.parameters():
            p *= 8 if p.dim() == 2 else torch.rand(len(p)) + 0.5
    llama.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return llama.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama_folder")
    llama = save_llama(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, llama


def hf_weights(folder):
    from safetensors.torch import load_file

    files = folder.glob("*.safetensors")
    return {name: weight for file in files for name, weight in load_file(file).items()}


@pytest.mark.parametrize("kind, dtype", [
    *((kind, torch.float32) for kind in LLAMAS), ("like Llama 3.2", torch.bfloat16),
])  # fmt: skip
def test_a_llama_made_by_transformers_is_the_same_model_here_and_goes_back_to_the_bit(
    toy, tmp_path, kind, dtype
):
    import transformers

    llama = save_llama(tmp_path, dtype, **LLAMAS[kind])
    is_llama = llama.config.model_type == "llama"
    (tmp_path / "stray.safetensors").write_bytes(b"not one that the index names")
    ours = model_from_checkpoint(load_hf_model(tmp_path))
    assert sum(p.numel() for p in ours.parameters()) == llama.num_parameters()
    tokens = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), llama(tokens).logits, atol=1e-4)
        count = 200 if kind == "like Llama 3.2" else 20
        theirs = llama.generate(tokens[:1, :9], max_new_tokens=count, do_sample=False,
                                eos_token_id=None, pad_token_id=0)  # fmt: skip
    text = text_of(generate, ours, tokens[0, :9].tolist(), count, temperature=0)
    assert text == theirs[0, 9:].tolist()
    (tmp_path / "stray.safetensors").unlink()
    out, name = tmp_path / "out", str(dtype).removeprefix("torch.")
    do(f"export --checkpoint {tmp_path} --outdir {out} --dtype {name} --quiet",
       f"--tokenizer_path {toy / 'tokenizer.json'}")
    before, after = hf_weights(tmp_path), hf_weights(out)
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert weight.dtype == after[key].dtype and torch.equal(weight, after[key]), key
    # What transformers understands of it is what it wrote itself.
    one, other = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (tmp_path, out))
    for content in (one, other) if is_llama else ():
        del content["_name_or_path"]
    assert one == other if is_llama else other.items() <= {**one, **other}.items()
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, llama(tokens).logits)


# The config.json files of meta-llama/Llama-3.2-1B and Qwen/Qwen3-0.6B.
REAL = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True}
REAL_CONFIGS = [
    {**REAL, "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0,
     "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048,
     "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
     "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
     "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
     "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"},
     "rope_theta": 500000.0, "torch_dtype": "bfloat16", "use_cache": True,
     "vocab_size": 128256},
    {**REAL, "architectures": ["Qwen3ForCausalLM"], "attention_dropout": 0.0,
     "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024,
     "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
     "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
     "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
     "rope_theta": 1000000, "sliding_window": None, "torch_dtype": "bfloat16",
     "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
]  # fmt: skip


@pytest.mark.parametrize("content", REAL_CONFIGS, ids=["Llama 3.2", "Qwen3"])
def test_published_models_cut_down_have_the_logits_of_transformers(tmp_path, content):
    import transformers

    config = scratchformer.config_from_hf(content)
    for ours, theirs in scratchformer.HF_FIELDS.items():
        assert getattr(config, ours) == content[theirs]
    cut = {"hidden_size": content["hidden_size"] // 16, "intermediate_size": 96,
           "num_hidden_layers": 2, "vocab_size": 300}  # fmt: skip
    write(tmp_path / "config.json", json.dumps(content | cut))
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(300, (2, 150))
    for written in (content | cut, json.loads((tmp_path / "config.json").read_text())):
        write(tmp_path / "config.json", json.dumps(written))
        ours = model_from_checkpoint(load_checkpoint(tmp_path))
        with torch.no_grad():
            assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("change", ["another head", "only a head", "two rope entries"])
def test_contradictions_are_resolved_as_transformers_does(tmp_path, change):
    import transformers
    from safetensors.torch import save_file

    save_llama(tmp_path / "saved", tie_word_embeddings=True)
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    weights = hf_weights(tmp_path / "saved")
    embedding = weights["model.embed_tokens.weight"]
    if change == "another head":
        weights["lm_head.weight"] = embedding + 1
    elif change == "only a head":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    else:
        content |= {"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 300.0}, "rope_theta": 7.0}
    folder = tmp_path / "changed"
    folder.mkdir()
    write(folder / "config.json", json.dumps(content))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, tokens = model_from_checkpoint(load_checkpoint(folder)), torch.arange(200)[None]
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


def test_what_belongs_to_a_model_survives_training_it_further(toy, tmp_path, capsys):
    """End-of-text ids, chat template, tokenizer with its beginning token, context length."""
    import transformers

    save_llama(tmp_path / "model", vocab_size=280, eos_token_id=[279, 5])
    source = json.loads((toy / "tokenizer.json").read_text())
    source["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [279],
                                         "tokens": [END_OF_TEXT]}}}  # fmt: skip
    source["added_tokens"][0]["special"] = False
    files = {"tokenizer.json": json.dumps(source), "chat_template.jinja": "{{ messages }}\r\n",
             "generation_config.json": '{"do_sample": true}',
             "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast",
                                                  "eos_token": END_OF_TEXT})}  # fmt: skip
    for name, text in files.items():
        write(tmp_path / "model" / name, text)
    do(f"train --init_from {tmp_path / 'model'} --train_tokens {toy / 'train.bin'} --quiet",
       "--context_length 32 --batch_size 2 --max_steps 2 --warmup_steps 1 --device cpu",
       f"--outdir {tmp_path / 'run'}")
    do(f"export --checkpoint {tmp_path / 'run'} --outdir {tmp_path / 'out'} --quiet")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"]
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        before, after = ((tmp_path / place / name).read_bytes() for place in ("model", "out"))
        assert before == after
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.max_position_embeddings == 256
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == [279, 5]
    # The beginning token is in front of what is evaluated and continued.
    ids = torch.tensor([[279, *Tokenizer.load(toy / "tokenizer.json").encode("The cat")]])
    write(tmp_path / "text", "The cat")
    do(f"eval --checkpoint {tmp_path / 'out'} --text_path {tmp_path / 'text'} --device cpu")
    shown = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
        assert shown["valid_loss"] == pytest.approx(loss, rel=1e-4)
        expected = theirs.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    do(f"generate --checkpoint {tmp_path / 'out'} --prompt 'The cat' --temperature 0",
       "--max_new_tokens 5 --device cpu")
    text = Tokenizer.load(toy / "tokenizer.json").decode(expected[1:].tolist())
    assert capsys.readouterr().out.rstrip("\n") == text.removesuffix(END_OF_TEXT).rstrip("\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_heads_store_no_scores_on_a_gpu(dtype):
    q, k, v = (torch.randn(1, 8192, heads, 64, device="cuda", dtype=dtype, requires_grad=True)
               for heads in (8, 2, 2))  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scratchformer.attention(q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 8192 * 8192 * 2 / 4


def test_training_goes_on_from_a_llama_folder(toy, exported, tmp_path):
    steps = f"--max_steps 3 --lr 1e-9 --min_lr 0 --valid_tokens {toy / 'valid.bin'}"
    data = f"--train_tokens {toy / 'train.bin'} --outdir {tmp_path} --device cpu --quiet"
    do(f"train {data} --init_from {toy / 'exported'} --batch_size 4 --warmup_steps 1 {steps}")
    before, after = (metrics(path, "valid_loss")[-1][0] for path in (toy / "run", tmp_path))
    assert after == pytest.approx(before, rel=1e-4)
    assert (tmp_path / "tokenizer.json").read_bytes() == (toy / "tokenizer.json").read_bytes()
    # Its embedding isn't new, neither now nor when the run goes on.
    do(f"train --resume --outdir {tmp_path} --max_steps 4 --device cpu --quiet")
    trained = [load_checkpoint(x)["model_config"]["trained"] for x in (toy / "run", tmp_path)]
    assert trained == [False, True]


def test_eval_and_generate_read_a_llama_folder(toy, exported, capsys):
    for checkpoint in (toy / "run", toy / "exported"):
        do(f"eval --checkpoint {checkpoint} --text_path {toy / 'valid.txt'} --device cpu")
        do(f"generate --checkpoint {checkpoint} --prompt The --seed 3 --device cpu")
    lines = capsys.readouterr().out.splitlines()
    half = len(lines) // 2
    assert lines[:half] == lines[half:] and lines[0].startswith("{")


@pytest.mark.parametrize("change, words", [
    ({"num_key_value_heads": 2}, "k_proj.weight has the shape (32, 32), but"),
    ({"num_hidden_layers": 2}, "model.layers.2"),
    ({"num_hidden_layers": 4}, "model.layers.3"),
    ({"vocab_size": "300"}, "not a valid Llama model"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "factor"),
    ({"attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"hidden_act": "gelu"}, "'gelu'"),
])  # fmt: skip
def test_a_llama_of_another_kind_is_refused_with_the_reason(
    llama_folder, tmp_path, capsys, change, words
):
    folder = shutil.copytree(llama_folder[0], tmp_path / "llama")
    content = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", json.dumps(content | change))
    write(tmp_path / "text", "some text")
    error = refused(
        capsys, tmp_path, f"eval --checkpoint {folder} --text_path {tmp_path / 'text'}"
    )
    assert words in error and str(folder) in error


def test_a_missing_file_of_weights_is_named(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder[0], tmp_path / "llama")
    for name in (sorted(folder.glob("*.safetensors"))[1].name, "model.safetensors.index.json"):
        (folder / name).unlink()
        with pytest.raises((UserError, OSError), match=re.escape(name)):
            load_hf_model(folder)


def test_an_export_never_hides_a_model(toy, exported, tmp_path, capsys):
    for folder in (toy / "run", toy / "exported"):
        argv = f"export --checkpoint {folder} --outdir {folder}"
        assert "isn't empty" in refused(capsys, toy, argv)


def test_ids_that_the_tokenizer_lacks_are_not_written(toy, tmp_path, capsysbinary):
    """A model with a larger vocabulary than the tokenizer's 280, sure of an id beyond it."""
    import transformers

    llama = save_llama(tmp_path, vocab_size=400, tie_word_embeddings=True)
    with torch.no_grad():
        llama.model.embed_tokens.weight[300:] *= 5
    transformers.LlamaForCausalLM.save_pretrained(llama, tmp_path)
    shutil.copy(toy / "tokenizer.json", tmp_path)
    given = f"--checkpoint {tmp_path} --device cpu --quiet"
    do(f"generate {given} --prompt The --max_new_tokens 30 --num_samples 2 --seed 1")
    assert b"The" in capsysbinary.readouterr().out
    data = f"--train_tokens {toy / 'train.bin'} --outdir {tmp_path / 'run'} --batch_size 1"
    do(f"train --init_from {tmp_path} {data} --max_steps 2 --warmup_steps 1 --device cpu",
       "--context_length 16")
    # The model keeps its context length when it's trained on shorter windows.
    state = load_checkpoint(tmp_path / "run")
    assert state["run"]["sequence_length"] == 16
    assert state["model_config"]["context_length"] == 256


def test_a_shape_that_contradicts_init_from_is_refused(toy, exported, tmp_path, capsys):
    flags = f"--train_tokens {toy / 'train.bin'} --outdir {tmp_path / 'run'}"
    argv = f"train {flags} --init_from {toy / 'exported'} --num_layers 4"  # the default
    assert "--num_layers is 4" in refused(capsys, tmp_path, argv)


# ======================================================================================
# 16. COMMAND LINE
#
# What a person types, and what a person mistypes.
# ======================================================================================


@pytest.mark.parametrize("changes, words", [
    ({"d_model": 34, "head_dim": 0}, "must be even"),
    ({"d_model": 36, "head_dim": 0}, "must be even"),
    ({"d_model": 1 << 25}, "d_model must be from 1 to"),
    ({"num_kv_heads": 3}, "divisible by num_kv_heads: 4 / 3"),
    ({"num_layers": 0}, "num_layers must be from 1"),
    ({"rope_theta": math.nan}, "rope_theta must be"),
])  # fmt: skip
def test_an_impossible_shape_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        check_config(LlamaConfig(**{**vars(TINY_MODEL), **changes}))


@pytest.mark.parametrize("argv", [
    *(f"train --train_tokens x --vocab_size 9 {flag}" for flag in [
        "--lr nan", "--lr inf", "--lr -0.1", "--batch_size 0", "--lr", "--max_steps 1.5",
        "--dtype float8", "--nothing 1"]),
    "bpe-train --file_path x --tokenizer_out_path y --num_workers 0",
    "generate --checkpoint x --temperature -1",
    "generate --checkpoint x --seed 99999999999999999999999999",
])  # fmt: skip
def test_a_flag_out_of_range_is_named(capsys, tmp_path, argv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.zeros(9999, np.uint16).tofile("x")
    assert re.findall(r"--\w+", argv)[-1] in refused(capsys, tmp_path, argv)


@pytest.mark.parametrize("command", ["", *scratchformer.COMMANDS])
def test_help_shows_every_flag_with_its_comment_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):  # argparse leaves after --help
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    if command == "train":
        shown = " ".join(text.split())
        assert "--lr FLOAT the peak learning rate (default: 0.001)" in shown
        flags = """train_tokens valid_tokens vocab_size context_length num_layers d_model
            num_heads d_ff batch_size grad_accum_steps lr min_lr weight_decay clip_grad
            max_steps warmup_steps log_interval save_interval compile fsdp outdir weights_only
            resume"""
        assert all(re.search(rf"--{flag}[ ,]", shown) for flag in flags.split())


def test_the_tokenizer_commands_and_help_do_not_import_torch(tmp_path):
    write(tmp_path / "torch.py", "raise SystemExit('torch was imported')")
    text = write(tmp_path / "1.txt", "to be or " * 99)
    tokenizer, out = tmp_path / "tokenizer.json", tmp_path / "out.bin"
    for argv in (
        "--help", "bpe-encode --help",
        f"bpe-train --file_path {text} --vocab_size 270 --tokenizer_out_path {tokenizer}",
        f"bpe-encode --dataset_path {text} --tokenizer_path {tokenizer} --out_path {out}",
    ):  # fmt: skip
        done = run(argv, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, (argv, done.stderr)
    assert tokenizer.is_file() and out.is_file()
    assert run("train", env={"PYTHONPATH": str(tmp_path)}).stderr == b"torch was imported\n"


def test_a_value_may_look_like_a_flag_and_files_add_up():
    def parse(name, *argv):
        return scratchformer.parse_flags(name, scratchformer.COMMANDS[name], argv)[1]

    for prompt in ("-- Hello", "--no-space\nbelow"):
        assert parse("generate", "--checkpoint", "x", f"--prompt={prompt}")["prompt"] == prompt
    argv = "--file_path a b --file_path c --tokenizer_out_path t --vocab_size=400"
    arguments = parse("bpe-train", *argv.split())
    assert arguments["file_path"] == [Path("a"), Path("b"), Path("c")]
    assert arguments["vocab_size"] == 400 and "num_workers" not in arguments


@posix
def test_a_lost_log_ends_no_command(tmp_path):
    """A full disk, or a reader that has gone."""
    text = write(tmp_path / "text.txt", toy_text(1, 30))
    for number, to in enumerate(["2>/dev/full", "2>&1 | true"]):
        argv = process("bpe-train --vocab_size 280 --file_path", text, "--tokenizer_out_path",
                       out := tmp_path / f"{number}.json")  # fmt: skip
        command = f"set -o pipefail; {shlex.join(map(str, argv['args']))} {to}"
        done = subprocess.run(["bash", "-c", command], env=argv["env"], capture_output=True)
        assert done.returncode == 0 and out.is_file() and b"Traceback" not in done.stderr


def test_a_seed_writes_the_same_text_again(toy, capsysbinary):
    outputs = []
    for seed in (1, 1, 2):
        do(f"generate --checkpoint {toy / 'run'} --prompt The --seed {seed} --device cpu",
           "--max_new_tokens 30 --num_samples 3 --temperature 1")  # fmt: skip
        outputs.append(capsysbinary.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].count(b"---\nThe") == 3 and END_OF_TEXT.encode() not in outputs[0]


@slow
def test_a_prompt_of_any_bytes_comes_back_as_it_is(toy):
    """Not UTF-8, where the locale knows ASCII only."""
    prompt = b"\xff " + "é漢\r\n".encode()
    argv = process("generate --max_new_tokens 5 --device cpu --seed 1 --checkpoint",
                   toy / "run", "--prompt")  # fmt: skip
    env = {**argv["env"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*argv["args"], prompt], env=env, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.startswith(prompt)


TRAIN = ("train --train_tokens {toy}/train.bin --outdir {tmp}/run --max_steps 9 --device cpu "
         "--num_layers 1 --d_model 32 --num_heads 2 --batch_size 2 ")  # fmt: skip
BPE = "bpe-train --vocab_size 280 --tokenizer_out_path {tmp}/out.json --file_path "
ENCODE = ("bpe-encode --tokenizer_path {toy}/tokenizer.json --out_path {tmp}/out.bin "
          "--dataset_path ")  # fmt: skip
EVAL = "eval --device cpu --checkpoint "


@pytest.mark.parametrize("argv, words", [
    (BPE + "{tmp}/missing", "missing"),
    (BPE + "{tmp}/empty", "no text"),
    (BPE + "{toy}/train.txt --vocab_size 256 --special_tokens_path {toy}/special.txt", "257"),
    (BPE + "{toy}/train.txt --special_tokens_path {tmp}/twice", "special token '<a>' must"),
    (BPE + "{toy}/train.txt --special_tokens_path {tmp}/latin1", "latin1"),
    (BPE + "{toy}/train.txt --tokenizer_out_path {tmp}", "{tmp}"),
    ("train --device cpu --train_tokens {tmp}/empty --vocab_size 9", "empty"),
    (TRAIN + "--valid_tokens {tmp}/one.bin", "one.bin"),
    (TRAIN + "--vocab_size 279", "--vocab_size is 279"),
    (TRAIN + "--d_model 4294967296", "--d_model must be"),
    (TRAIN + "--d_model 8000000 --d_ff 8000000", "out of memory"),
    (TRAIN + "--context_length 16 --train_tokens {tmp}/vast.bin", "vocab_size must be"),
    (TRAIN + "--outdir {tmp}/empty/run", "empty"),
    (EVAL + "{tmp}/missing --valid_tokens {toy}/valid.bin", "missing"),
    (EVAL + "{tmp} --valid_tokens {toy}/valid.bin", "no checkpoint"),
    (EVAL + "{toy}/run", "--valid_tokens or --text_path"),
    (EVAL + "{toy}/run --valid_tokens {toy}/valid.txt", "valid.txt is text, not a token file"),
    (EVAL + "{toy}/run --text_path {toy}/valid.bin", "valid.bin is a token file, not text"),
    (BPE + "{tmp}/tiny --tokenizer_out_path {tmp}/tiny", "tiny is an input"),
    (ENCODE + "{tmp}/tiny --tokenizer_path {toy}/tokenizer.json --out_path {tmp}/tiny",
     "tiny is an input"),
    (ENCODE + "{tmp}/tiny --tokenizer_path {tmp}/other.json --out_path {tmp}/other",
     "other.json is an input"),
    ("split --text_path {tmp}/text --outdir {tmp}/text", "isn't empty"),
    (TRAIN + "--outdir {tmp}/llama", "isn't empty"),
    ("split --text_path {tmp}/tiny --outdir {tmp}/new", "too little text"),
    ("demo --minutes 5", "--minutes needs --text_path"),
    (EVAL + "{toy}/run --valid_tokens {tmp}/high.bin", "id 300, outside the vocabulary"),
    ("generate --device cpu --prompt x --checkpoint {tmp}/lonely", "--tokenizer_path"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_writes_nothing(toy, tmp_path, capsys, argv, words):
    write(tmp_path / "empty", b"")
    write(tmp_path / "twice", "<a>\n<b>\n<a>\n")
    write(tmp_path / "latin1", b"<caf\xe9>\n")
    write(tmp_path / "tiny", b"x")
    for name in ("text", "llama"):
        (tmp_path / name).mkdir()
    write(tmp_path / "text" / "train.txt", "A document.\n" * 99)
    write(tmp_path / "llama" / "config.json", "{}")
    token_file(tmp_path / "high.bin", [300, *GOOD])
    token_file(tmp_path / "one.bin", [7])
    token_file(tmp_path / "vast.bin", GOOD, {"vocab_size": 10**20})
    tokenizer_from("other text", 44).save(tmp_path / "other.json")
    (tmp_path / "lonely").mkdir()
    shutil.copy(toy / "run" / "step_000150.pt", tmp_path / "lonely")
    words = words.format(tmp=tmp_path)
    assert words in refused(capsys, tmp_path, *argv.format(toy=toy, tmp=tmp_path).split())


def test_a_split_is_by_document_and_stays_when_documents_come(tmp_path):
    def sides(*numbers):
        for number in numbers:
            write(tmp_path / "text" / f"{number}.txt", f"Document {number}.\n" * 9)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        do(f"split --text_path {tmp_path / 'text'} --outdir {tmp_path / 'out'} --quiet")
        texts = [(tmp_path / "out" / f"{name}.txt").read_text() for name in ("train", "valid")]
        return [set(text.split(END_OF_TEXT)) - {""} for text in texts]

    (tmp_path / "text").mkdir()
    train, valid = sides(*range(200))
    assert len(train | valid) == 200 and not train & valid and 10 <= len(valid) <= 32
    more = sides(*range(200, 300))
    assert train < more[0] and valid < more[1]
    write(tmp_path / "text" / "copies.txt", END_OF_TEXT.join(sorted(valid)[:3]))
    assert sides(0) == more  # a copy is where its original is


@given(st.lists(st.sampled_from(["a", "b\n", "\n", END_OF_TEXT, "c" * 9]), max_size=30))
def test_the_parts_of_a_file_are_the_file(monkeypatch, pieces):
    monkeypatch.setattr(scratchformer, "PART", 8)
    parts = list(scratchformer.split_parts(io.StringIO("".join(pieces), newline="")))
    assert "".join(parts) == "".join(pieces)
    assert all(END_OF_TEXT not in part.strip().removesuffix(END_OF_TEXT) for part in parts)
    assert all(len(part) < 8 + len(END_OF_TEXT) + 9 for part in parts)


def test_no_end_of_text_is_torn_and_documents_stay_without_line_breaks(tmp_path):
    sides = []
    for first in ("", "Another document." + END_OF_TEXT):
        text = first + "".join(chr(97 + n % 26) * (2020 + n) + END_OF_TEXT for n in range(90))
        write(tmp_path / "text", text)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        do(f"split --text_path {tmp_path / 'text'} --outdir {tmp_path / 'out'} --quiet")
        texts = [(tmp_path / "out" / f"{name}.txt").read_text() for name in ("train", "valid")]
        assert not any("<|" in part or "|>" in part for text in texts
                       for part in text.split(END_OF_TEXT))  # fmt: skip
        sides.append([set(text.split(END_OF_TEXT)) - {""} for text in texts])
    assert all(one <= other for one, other in zip(*sides))


@slow
def test_the_demo_on_your_own_text(tmp_path):
    """Every command that it shows works when typed, and gives the same model."""
    (tmp_path / "my text").mkdir()
    write(tmp_path / "my text" / "one.txt", toy_text(3, 400))
    out = tmp_path / "out"
    done = run("demo --max_steps 12 --outdir", out, "--text_path", tmp_path / "my text")
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^\$ python scratchformer.py (.*)", done.stderr.decode(), re.M)
    assert [line.split()[0] for line in shown] == [
        "split", "bpe-train", "bpe-encode", "bpe-encode", "train", "train", "eval", "generate"]
    result = json.loads(done.stdout.split(b"\n")[0])
    assert result["valid_loss"] > 0 and result["lzma_bits_per_byte"] > 0
    out.rename(tmp_path / "first")
    for line in shown:
        do(line)
    assert same_state(load_checkpoint(out / "run"), load_checkpoint(tmp_path / "first" / "run"))


@pytest.fixture(scope="module")
def make_stories():
    if not (DATA / "make_stories.py").exists():
        pytest.skip("no data/make_stories.py")
    spec = importlib.util.spec_from_file_location("make_stories", DATA / "make_stories.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_stated_nats_are_the_sum_over_all_choices(make_stories, tmp_path):
    class Witness(make_stories.Teller):
        surprise = 0.0

        def choose(self, hat):
            option = super().choose(hat)
            self.surprise += math.log(len(hat) / sum(other == option for _, other in hat))
            return option

    facts = make_stories.write_stories(tmp_path / "stories.txt", 0.05, seed=7)
    witness = Witness(7)
    stories = [make_stories.tell(witness) for _ in range(facts["stories"])]
    text = "".join(story + make_stories.SEPARATOR for story in stories)
    assert (tmp_path / "stories.txt").read_text() == text
    assert facts["bytes"] == len(text.encode()) >= 50_000
    assert facts["nats"] == pytest.approx(witness.surprise) and witness.surprise > 1000
    size = len(text.replace(END_OF_TEXT, ""))
    assert facts["floor_nats_per_byte"] == pytest.approx(witness.surprise / size, rel=1e-4)
    assert json.loads((tmp_path / "stories.txt.json").read_text()) == facts


@STORIES
def test_no_story_to_validate_on_is_in_the_training_stories():
    texts = [(DATA / f"stories-{name}.txt").read_text() for name in ("train", "valid")]
    train, valid = ([s.strip() for s in t.split(END_OF_TEXT) if s.strip()] for t in texts)
    assert len(valid) > 100 and not set(train) & set(valid)
    assert (DATA / "special_tokens.txt").read_text().splitlines() == [END_OF_TEXT]


@STORIES
def test_the_bundled_stories_are_what_the_script_writes(make_stories, tmp_path):
    megabytes, seed = make_stories.BUNDLED["stories-valid.txt"]
    make_stories.write_stories(tmp_path / "stories-valid.txt", megabytes, seed)
    for name in ("stories-valid.txt", "stories-valid.txt.json"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_one_process_commands_are_refused_under_torchrun(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in ("eval --valid_tokens x", "generate", "export --outdir y"):
        assert "without torchrun" in refused(capsys, tmp_path, argv, "--checkpoint x")


@slow
@STORIES
def test_the_demo_on_the_bundled_stories(tmp_path):
    done = run(f"demo --outdir {tmp_path} --max_steps 20")
    assert done.returncode == 0, done.stderr
    result, story = done.stdout.split(b"\n", 1)
    assert json.loads(result)["percent_above_floor"] > 0
    assert story.startswith(b"Once")


def test_the_demo_leaves_alone_what_it_did_not_make(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "step_000007.pt", "somebody's work")
    assert "isn't empty" in refused(capsys, tmp_path, f"demo --outdir {tmp_path}")


# ======================================================================================
# TEN CHANGES OF TEN LINES
#
# Each patch in data/changes is right on every path: training, evaluation, generation with a
# cache, resuming, two processes.
# ======================================================================================

CHANGES = sorted(path.stem for path in (DATA / "changes").glob("*.patch"))
CHANGE_FLAGS = {"windows": "--window 5", "lion": "--optimizer lion"}


@pytest.fixture(scope="module")
def changed_files(tmp_path_factory):
    """A module of each changed file, by the name of the change, and their folder."""
    folder, modules = tmp_path_factory.mktemp("changes"), {}
    for name in CHANGES:
        shutil.copy(FILE, folder / "scratchformer.py")
        patch = DATA / "changes" / f"{name}.patch"
        done = subprocess.run(["git", "apply", patch], cwd=folder, capture_output=True)
        assert done.returncode == 0, f"{patch} no longer applies: {done.stderr}"
        file = (folder / "scratchformer.py").rename(folder / f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, file)
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return folder, modules


def changed_model(module, name):
    """A model with large parameters, those that start at 0 too."""
    fields = {"documents": {"end_of_text": 61 - 7}, "windows": {"window": 5}}.get(name, {})
    torch.manual_seed(3)
    model = module.TransformerWithLoss(module.LlamaConfig(
        61, 24, num_layers=3, d_model=32, num_heads=4, d_ff=40, num_kv_heads=2, **fields))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.06) if p.dim() == 2 else p.add_(noise(*p.shape) / 2)
    return model.eval()


def test_changes_are_at_most_ten_lines_in_two_places():
    assert len(CHANGES) == 12
    for name in set(CHANGES) - {"together"}:
        patch = (DATA / "changes" / f"{name}.patch").read_text(encoding="utf-8")
        lines = patch[patch.index("\n@@") :].splitlines()
        assert max(sum(line.startswith(sign) for line in lines) for sign in "+-") <= 10, name
        assert len(set(re.findall(r"(?m)^@@ [^@]+@@ (.*)", patch))) <= 2, name


def recorded_logits(module, function, model, prompts, draws, *args):
    """The logits [N, B, V] from which `function` draws, where the draws are given."""
    found, left = [], iter(draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample",
                      lambda logits, u, **_: (found.append(logits), next(left).clone())[1])
        for _ in function(model, prompts, *args):
            pass
    return torch.stack(found)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_generates_with_a_cache_as_without(changed_files, name):
    """Logits for given ids: with end-of-text in the prompt, beyond the context, in a batch."""
    module = changed_files[1][name]
    model = changed_model(module, name)
    prompts = torch.tensor([[7, 1, 2, 3, 4, 7, 5, 6, 9, 8], [9, 1, 2, 7, 4, 5, 6, 9, 8, 7]])
    draws = torch.randint(61, (40, 2), generator=torch.Generator().manual_seed(4))
    draws[::9] = 7
    u = torch.zeros(2, 40)
    naive = recorded_logits(module, module.generate_naive, model, prompts, draws, u)
    for function, how in ((module.generate, u), (module.generate_texts, 40)):
        cached = recorded_logits(module, function, model, prompts, draws, how)
        torch.testing.assert_close(cached, naive, rtol=1e-4, atol=1e-4)
    for row in (0, 1):
        alone = recorded_logits(module, module.generate, model, prompts[row : row + 1],
                                draws[:, row : row + 1], u[:1])
        torch.testing.assert_close(alone[:, 0], naive[:, row], rtol=1e-4, atol=1e-4)


def changed_training(toy, outdir, name, *flags):
    shape = ("--num_layers 2 --d_model 16 --num_heads 2 --d_ff 24 --context_length 24 "
             "--batch_size 4 --warmup_steps 2 --lr 3e-3 --log_interval 1 --device cpu --quiet")
    data = f"--train_tokens {toy / 'train.bin'} --valid_tokens {toy / 'valid.bin'}"
    run = f"--max_steps 8 --save_interval 4 --eval_windows 20 --outdir {outdir}"
    return shell_words(["train", shape, CHANGE_FLAGS.get(name, ""), data, run, *flags])


@pytest.fixture(scope="module")
def changed_runs(changed_files, toy, tmp_path_factory):
    """A run of eight steps of each changed file: a folder of run folders."""
    folder = tmp_path_factory.mktemp("changed_runs")
    for name, module in changed_files[1].items():
        assert module.main(changed_training(toy, folder / name, name)) == 0
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_trains_evaluates_and_resumes(
    changed_files, changed_runs, toy, tmp_path, name, capsys
):
    module, unbroken, broken = changed_files[1][name], changed_runs / name, tmp_path / "run"
    shutil.copytree(unbroken, broken)
    (broken / "step_000008.pt").unlink()
    assert module.main(changed_training(toy, broken, name, "--resume")) == 0
    assert same_state(load_checkpoint(broken), load_checkpoint(unbroken))
    losses = [loss for (loss,) in metrics(unbroken, "train_loss")]
    assert losses == [loss for (loss,) in metrics(broken, "train_loss")]
    assert losses[-1] < losses[0]
    capsys.readouterr()
    flags = f"--checkpoint {unbroken} --valid_tokens {toy / 'valid.bin'} --device cpu --quiet"
    assert module.main(shell_words(["eval --eval_windows 20", flags])) == 0
    shown = json.loads(capsys.readouterr().out)["valid_loss"]
    assert shown == pytest.approx(metrics(unbroken, "valid_loss")[-1][0], rel=1e-6)
    # The plain loop does the same. (It has AdamW only, and draws dropout's masks otherwise.)
    if name not in ("lion", "dropout"):
        tokens = np.fromfile(toy / "train.bin", "<u2")
        config = load_checkpoint(unbroken)["model_config"]
        torch.manual_seed(1)
        model = module.Transformer(module.LlamaConfig(**config))
        optim = module.OptimizerConfig(max_steps=8, lr=3e-3, warmup_steps=2)
        plain = module.train_model(model, tokens, tokens, optim, batch_size=4)
        assert plain == pytest.approx(losses, rel=1e-5)
    # Other versions of the file refuse what means something else to them.
    status = main(shell_words(["eval --eval_windows 20", flags]))
    assert status == (0 if name in ("lion", "stable_decay", "z_loss") else 2)
    words = "'dropout'" if name == "dropout" else "but scratchformer.py isn't"
    assert not status or words in capsys.readouterr().err


def test_each_change_makes_a_difference(changed_runs, toy, tmp_path):
    assert main(changed_training(toy, tmp_path / "run", "")) == 0
    unchanged = metrics(tmp_path / "run", "train_loss")
    assert not [x for x in CHANGES if metrics(changed_runs / x, "train_loss") == unchanged]


@slow
def test_changed_files_learn_on_two_processes_as_on_one(
    changed_files, changed_runs, toy, tmp_path
):
    """Two processes draw other masks of dropout than one: each change but that."""
    names, flags = [x for x in CHANGES if x != "dropout"], "--batch_size 2 --fsdp"
    tasks = [["run", 0, changed_training(toy, tmp_path / name, name, flags), name]
             for name in names]  # fmt: skip
    end_tasks(start_tasks(tmp_path, 2, *tasks, path=changed_files[0]), 2 * len(tasks), 0)
    columns = ["step", "train_loss", "valid_loss"]
    for name in names:
        two, one = (metrics(folder / name, *columns) for folder in (tmp_path, changed_runs))
        close_rows(two, one, 1e-4)


# ======================================================================================
# AROUND THE FILE
#
# Commands in the README parse as they stand, its Python example runs, and links point at what
# they name. Figures show what functions compute, the page has every line, the notebook runs.
# Every exercise has a solution, whose change applies and whose examples run.
# ======================================================================================


README = FILE.parent / "README.md"
README = README.read_text(encoding="utf-8") if README.is_file() else ""
SOLUTIONS = (DATA / "solutions.md").read_text(encoding="utf-8")
with_readme = pytest.mark.skipif(not README, reason="no README.md beside the file")
LINES = FILE.read_text(encoding="utf-8").splitlines()
RULE = "# " + "-" * 88
HEADS = {m[1]: number for number, line in enumerate(LINES, 1)
         if LINES[number - 2] == RULE and (m := re.match(r"# (\d+)\. ", line))}  # fmt: skip


def commands_in(text):
    """The flags of every scratchformer.py command in the indented blocks of a page."""
    text = re.sub(r" \\\n +", " ", text)
    blocks = re.findall(r"^ {4,}(.*scratchformer\.py [a-z].*)$", text, re.M)
    return [shlex.split(line.split("scratchformer.py ", 1)[1]) for line in blocks]


@pytest.mark.parametrize("argv", commands_in(README + SOLUTIONS), ids=" ".join)
def test_a_command_of_the_readme_or_of_a_solution_parses(argv):
    scratchformer.parse_flags(argv[0], scratchformer.COMMANDS[argv[0]], argv[1:])


@with_readme
def test_the_readme_shows_every_command():
    assert {argv[0] for argv in commands_in(README)} == set(scratchformer.COMMANDS)


@with_readme
def test_links_of_the_readme_point_at_the_chapters_they_name():
    links = re.findall(r"\[(\d+)\. [^]]*\]\(scratchformer\.py#L(\d+)\)", README)
    found = {number: int(line) for number, line in links}
    assert found == HEADS, "python data/link_readme.py corrects them"


@with_readme
@pytest.mark.parametrize("page", ["README.md", "data/results.md", "data/solutions.md"])
def test_links_lead_to_files_and_sections_that_are_there(page):
    text = (FILE.parent / page).read_text(encoding="utf-8")
    for path, section in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", text):
        target = (FILE.parent / page).parent / path if path else FILE.parent / page
        assert target.exists(), path
        if section and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert section in [title.lower().replace(" ", "-") for title in titles]


@with_readme
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(FILE.parent / "data")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert code.count("max_steps=300") == 1
    exec(code.replace("max_steps=300", "max_steps=2"), {})
    assert capsys.readouterr().out.startswith("Once there was")
    do("eval", "--checkpoint", "out/mine", "--text_path", "data/stories-valid.txt",
       "--eval_windows", 1)


DRAW_FIGURES = FILE.parent / "data" / "draw_figures.py"
FIGURES = sorted((FILE.parent / "data" / "figures").glob("*.svg"))


@with_readme
def test_figures_show_what_the_functions_compute(tmp_path):
    spec = importlib.util.spec_from_file_location("draw_figures", DRAW_FIGURES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    untrained = [figure.__name__ for figure in module.COMPUTED + module.MEASURED]
    module.draw(untrained, tmp_path)
    for path in tmp_path.iterdir():
        new, old = (re.split(r"(\d+\.?\d*)", (folder / path.name).read_text(encoding="utf-8"))
                    for folder in (tmp_path, FIGURES[0].parent))
        hint = f"python data/draw_figures.py {path.stem} draws it again"
        assert new[::2] == old[::2], hint
        new, old = (np.array(x[1::2], float) for x in (new, old))  # machines round differently
        np.testing.assert_allclose(new, old, atol=0.1, err_msg=hint)
    trained = [figure.__name__ for figure in module.TRAINED]
    assert {path.stem for path in FIGURES} == {*untrained, *trained}


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_small_xml_with_a_title_and_a_caption(path):
    root = xml.etree.ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == space + "svg" and root.get("class") == "figure"
    assert root.findtext(space + "title") and root.findtext(space + "desc")
    assert path.stat().st_size < 60_000
class PageReader(html.parser.HTMLParser):
    """The lines of scratchformer.py that a page shows, its anchors, and what it refers to."""

    def __init__(self, page):
        super().__init__()
        self.lines, self.anchors, self.links, self.loaded, self.depth = [], [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors += [attributes["id"]] if "id" in attributes else []
        (self.links if tag == "a" else self.loaded).extend(
            attributes[name] for name in ("href", "src", "srcset") if name in attributes)
        if self.depth or (attributes.get("class") or "").split()[:1] == ["l"]:
            self.lines += [""] if not self.depth else []
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= self.depth > 0

    def handle_data(self, data):
        if self.depth:
            self.lines[-1] += data


@with_readme
def test_the_page_shows_every_line_once_and_loads_nothing(tmp_path):
    pytest.importorskip("pygments")
    path = tmp_path / "page.html"
    subprocess.run([sys.executable, FILE.parent / "data/make_page.py", path], check=True)
    text = path.read_text(encoding="utf-8")
    page = PageReader(text)
    assert page.lines == LINES
    assert len(page.anchors) == len(set(page.anchors))
    inner = {link[1:] for link in page.links if link.startswith("#")} - {""}
    assert inner <= set(page.anchors)
    assert {f"chapter-{number}" for number in HEADS} <= inner
    assert {link[:8] for link in page.links if link[0] != "#"} == {"https://"}
    assert page.loaded == ["data:,"] and not re.search(r"url\((?!#)|@import|fetch\(", text)
    assert len(text.encode()) <= 2_000_000
NOTEBOOK = DATA / "start.ipynb"


def test_the_notebook_has_few_cells_and_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 25
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    for name in ("scratchformer.py", "data"):
        (tmp_path / name).symlink_to(FILE.parent / name)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    settings = notebook.cells[1]
    assert settings.source.count("STEPS = 300") == 1
    settings.source = settings.source.replace("STEPS = 300", "STEPS = 2")
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=folder).execute()  # fmt: skip
    text = "".join(output.get("text", "") for cell in notebook.cells
                   for output in cell.get("outputs", []))  # fmt: skip
    # A notebook goes on after a command that failed.
    assert "scratchformer: error" not in text and "Traceback" not in text
    assert "bits_per_byte" in text and "\nOne day" in text
SOLUTION_OF = dict(
    re.findall(r"<summary>(.*?)</summary>(.*?)</details>", SOLUTIONS, re.S))  # fmt: skip


def exercises():
    """The name of each exercise in the file, such as "Chapter 1, exercise 2"."""
    names, ends = [], [*HEADS.values(), len(LINES)][1:]
    for (chapter, start), end in zip(HEADS.items(), ends):
        lines = "\n".join(LINES[start:end])
        (text,) = re.findall(r"^# Exercise(?:s|:.*)\n(?:# .*\n)*", lines, re.M)
        numbers = re.findall(r"^# (\d+)\. ", text, re.M)
        names += [f"Chapter {chapter}, exercise {n}".rstrip() for n in numbers or [""]]
    return names


def test_every_exercise_has_a_solution_in_the_files_order():
    assert re.findall(r"<summary>(.*?)</summary>", SOLUTIONS) == exercises()


@pytest.mark.parametrize("name", SOLUTION_OF)
def test_a_solution_changes_lines_that_are_there_and_its_examples_run(
    name, tmp_path, monkeypatch
):
    text, source, module = SOLUTION_OF[name], FILE.read_text(encoding="utf-8"), scratchformer
    changes = re.findall(r"^```diff\n(.*?)^```", text, re.M | re.S)
    examples = "\n".join(re.findall(r"^```python\n(>>>.*?)^```", text, re.M | re.S))
    for change in changes:
        lines = change.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs)
                    for signs in (" -", " +"))  # fmt: skip
        assert source.count(old) == 1, f"not once in {FILE.name}:\n{old}"
        source = source.replace(old, new)
    if changes and examples:
        file = tmp_path / "solution.py"
        file.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("solution", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "solution", module)
        spec.loader.exec_module(module)
    monkeypatch.chdir(FILE.parent)
    test = doctest.DocTestParser().get_doctest(examples, dict(vars(module)), name, None, 0)
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not runner.run(test, out=report.write).failed, report.getvalue()


# Each test gets the mark of its chapter, so that `pytest -m chapter7` runs one chapter's tests.
TESTS = Path(__file__).read_text(encoding="utf-8").splitlines()
chapter_at = list(itertools.accumulate(
    ((m := re.match(r"# (\d+)\. [A-Z -]+$", line)) and m[1] for line in TESTS),
    lambda before, here: here or before))  # fmt: skip
for name, test in list(globals().items()):
    if name.startswith("test_") and (chapter := chapter_at[test.__code__.co_firstlineno - 1]):
        getattr(pytest.mark, f"chapter{chapter}")(test)
