"""What scratchformer.py promises, as tests: the same chapters, in the same order.

    pytest                  everything but the measurements; some minutes on two cores
    pytest -k merges        the tests whose names mention merges
    pytest -m "not slow"    without those that start several processes or train for long

Within a chapter stand an example worked by hand, then properties of any input, then an
independent oracle (tiktoken, tokenizers, torch.nn, transformers), then mistakes: one line
on standard error, exit status 2, nothing written.
"""

import copy
import dataclasses
import gc
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import scratchformer
from scratchformer import (
    END_OF_TEXT,
    HELD_SPACE,
    MOMENTS,
    PRETOKEN_PATTERN,
    Batches,
    DataConfig,
    DeviceConfig,
    LearningConfig,
    LinearCrossEntropy,
    ModelConfig,
    ProcessConfig,
    RMSNorm,
    Span,
    Stepper,
    SwiGLU,
    TokenFiles,
    Tokenizer,
    Transformer,
    UserError,
    World,
    adamw_reference,
    apply_rope,
    attention_reference,
    checkpoints_in,
    count_files,
    cross_entropy,
    decode_text,
    encode_file,
    encode_text,
    evaluate,
    find_pretokens,
    generate,
    last_cut,
    learn_merges,
    learn_merges_plainly,
    learning_rate,
    llama_weights,
    load_checkpoint,
    load_llama,
    main,
    make_optimizer,
    model_from_checkpoint,
    pretokens_of_piece,
    sample,
    save_checkpoint,
    space_pieces,
    spans,
    stream_text,
    train_bpe,
    use_all_cores,
    whole_file,
)  # fmt: skip

FILE = Path(scratchformer.__file__)
DATA = FILE.parent / "data"
CPU = torch.device("cpu")
slow = pytest.mark.slow

hypothesis.settings.register_profile(
    "scratchformer", deadline=None, derandomize=True, max_examples=60,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
hypothesis.settings.load_profile("scratchformer")
THREADS = torch.get_num_threads()
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
any_texts = any_texts.map(lambda parts: decode_text(encode_text("".join(parts))))
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


def process(*argv, processes=0, env=None, file=FILE):
    """The command line of scratchformer.py and its environment, under torchrun if asked for."""
    torchrun = [f"-m torch.distributed.run --standalone --nproc_per_node={processes}"]
    start = [sys.executable, *(torchrun if processes else []), file, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **(env or {})}
    return {"args": shell_words(start), "env": environment}


def run(*argv, stdin=b"", **options):
    """A finished process of scratchformer.py, with its output as bytes."""
    return subprocess.run(
        **process(*argv, **options), input=stdin, capture_output=True, timeout=300
    )


def do(*argv):
    """Run a command in this process; it must succeed."""
    assert main(shell_words(argv)) == 0


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


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
    path.write_bytes(content if isinstance(content, bytes) else encode_text(content))
    return path


def metrics(folder, *keys):
    """The rows of metrics.jsonl as tuples of `keys`; what a row lacks is None."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple(row.get(key) for key in keys) for row in rows]


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


def tokenizer_from(text, num_merges, specials=()):
    """A tokenizer with merges learned from `text`."""
    merges = learn_merges(Counter(find_pretokens(text)), num_merges)
    tokens = [bytes([i]) for i in range(256)] + [left + right for left, right in merges]
    return Tokenizer(dict(enumerate(tokens)), merges, list(specials))


# ======================================================================================
# 0. HOUSEHOLD
#
# Files appear whole or not at all; a mistake at the keyboard costs one line, not a run.
# ======================================================================================


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_write_replaces_the_old_file_and_makes_folders(tmp_path):
    for content in (b"old", b"new"):
        with whole_file(tmp_path / "a" / "b") as file:
            file.write(content)
    assert snapshot(tmp_path / "a") == {tmp_path / "a" / "b": b"new"}


@slow
def test_a_killed_writer_never_leaves_a_partial_file(tmp_path):
    writer = """if True:
        import os, random, signal, sys, time
        from scratchformer import whole_file
        path = sys.argv[1]
        for trial in range(25):
            if not (child := os.fork()):
                for content in range(256):
                    with whole_file(path) as file:
                        for _ in range(20):
                            file.write(bytes([content]) * 20_000)
                            file.flush()
                os._exit(0)
            time.sleep(0.01 + random.random() / 20)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            content = open(path, "rb").read()
            assert len(content) == 400_000 and len(set(content)) == 1, trial
    """
    subprocess.run(
        [sys.executable, "-c", writer, tmp_path / "file"], cwd=FILE.parent, check=True
    )


def test_flags_accept_hyphens_and_underscores(tmp_path):
    write(tmp_path / "text", "to be or not to be")
    for spelled in ("--file-path --vocab-size=260 --tokenizer-out-path",
                    "--file_path --vocab_size=260 --tokenizer_out_path"):  # fmt: skip
        path, size, out = spelled.split()
        do(f"bpe-train {path} {tmp_path / 'text'} {size} {out} {tmp_path / spelled[6]} --quiet")
    assert (tmp_path / "-").read_bytes() == (tmp_path / "_").read_bytes()


@pytest.mark.parametrize("argv, suggestion", [
    ("trian", "train"),
    ("bpe_train", "bpe-train"),
    ("generate --checkpoint x --temprature 1", "--temperature"),
    ("bpe-train --file_path x --tokenizer_out_path y --vocabsize 300", "--vocab_size"),
    ("bpe-train --file_pth x --tokenizer_out_path y", "--file_path"),
    ("train --train-token x", "--train_tokens"),
])  # fmt: skip
def test_a_mistyped_name_suggests_the_right_one(capsys, tmp_path, argv, suggestion):
    assert f"did you mean {suggestion}?" in refused(capsys, tmp_path, *argv.split())


@pytest.mark.parametrize("argv", [
    *(f"train --train_tokens x {flag}" for flag in [
        "--lr nan", "--lr inf", "--lr -0.1", "--batch_size 0", "--max_steps -5", "--lr",
        "--max_steps 1.5", "--grad_accum_steps 0", "--context_length 0", "--clip_grad -1",
        "--beta2 1", "--seed -1",
        "--weight_decay nan", "--min_lr 2 --lr 1", "--save_interval 0", "--log_interval 0",
        "--warmup_steps 10 --max_steps 5", "--dtype float8", "--device tpu", "--num_layers 0",
        "--rope_theta nan", "--norm_eps -1", "--seed 99999999999999999999999999"]),
    "bpe-train --file_path x --tokenizer_out_path y --num_workers 0",
    "generate --checkpoint x --temperature -1",
    "generate --checkpoint x --top_k 0",
    "generate --checkpoint x --top_p nan",
    "generate --checkpoint x --max_new_tokens 0",
    "generate --checkpoint x --seed 99999999999999999999999999",
    "eval --checkpoint x --valid_tokens y --batch_size 0",
])  # fmt: skip
def test_a_flag_out_of_range_is_named(capsys, tmp_path, argv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.zeros(9999, np.uint16).tofile("x")
    flag = re.findall(r"--\w+", argv)[-1]
    assert flag in refused(
        capsys, tmp_path, *argv.split(), *["--vocab_size=9"][: argv.startswith("train")]
    )


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0
    for flag in [
        "train_tokens",
        "valid_tokens",
        "vocab_size",
        "context_length",
        "num_layers",
        "d_model",
        "num_heads",
        "d_ff",
        "batch_size",
        "grad_accum_steps",
        "lr",
        "min_lr",
        "weight_decay",
        "clip_grad",
        "max_steps",
        "warmup_steps",
        "log_interval",
        "save_interval",
        "compile",
        "fsdp",
        "outdir",
        "weights_only",
        "resume",
    ]:
        assert f"--{flag} " in shown
    assert "highest learning rate (default: 0.001)" in shown


def test_the_tokenizer_commands_and_help_do_not_import_torch(tmp_path):
    write(tmp_path / "torch.py", "raise SystemExit('torch was imported')")
    write(tmp_path / "1.txt", "to be or " * 99)
    write(tmp_path / "2.txt", "not to be" * 99)
    both = f"{tmp_path / '1.txt'} {tmp_path / '2.txt'}"
    tokenizer, out = tmp_path / "tokenizer.json", tmp_path / "out.bin"
    for argv in (
        "",
        "--help",
        "--version",
        "bpe-train --help",
        "bpe-encode --help",
        f"bpe-train --file_path {both} --vocab_size 270 --num_workers 2 "
        f"--tokenizer_out_path {tokenizer}",
        f"bpe-encode --dataset_path {both} --num_workers 2 --tokenizer_path {tokenizer} "
        f"--out_path {out}",
    ):
        done = run(argv, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, (argv, done.stderr)
    assert tokenizer.is_file() and out.is_file()
    assert run("train", env={"PYTHONPATH": str(tmp_path)}).stderr == b"torch was imported\n"


def test_importing_the_file_says_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import scratchformer"],
                          cwd=FILE.parent, capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ======================================================================================
# 1. TEXT TO PRE-TOKENS
#
# Every shortcut (cutting at spaces, at chunks, over processes) must give what one findall
# over the whole text gives.
# ======================================================================================


def parts(text, specials):
    """The definition: split at special tokens, and run the pattern over what is between."""
    longest_first = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    pieces = re.split(f"({longest_first})", text) if specials else [text]
    found = [regex.findall(PRETOKEN_PATTERN, piece) for piece in pieces[::2]]
    marks = [[("special", piece)] for piece in pieces[1::2]]
    return list(
        itertools.chain(*itertools.chain(*itertools.zip_longest(found, marks, fillvalue=[])))
    )


def test_an_example_of_pretokens_by_hand():
    assert find_pretokens("It's 3 o'clock!\n\n  Don't") == [
        "It", "'s", " 3", " o", "'", "clock", "!", "\n\n ", " Don", "'t",
    ]  # fmt: skip


@given(texts)
def test_the_pattern_cuts_as_tiktokens_gpt2_pattern(text):
    assert find_pretokens(text) == regex.findall(r50k_pat_str, text)


@given(any_texts)
@example(" \x1c a")
@example("a  \n b   c ")
@example("a  \n\nb\n  c\n\n d")
@example("it's\n'tis, \x0b\nend.\n")
def test_cutting_at_spaces_first_changes_no_pretoken(text):
    first, *rest = space_pieces(text)
    found = find_pretokens(first.replace(HELD_SPACE, " "))
    assert found + [p for piece in rest for p in pretokens_of_piece(piece)] == find_pretokens(
        text
    )
    assert "".join(find_pretokens(text)) == text


def test_cuts_are_found_near_the_end():
    assert last_cut("to be or not to be, that is it", []) > 20
    assert last_cut("x" * 1000, []) == 0
    assert last_cut("a b c <stop here> d e f " + "!" * 20, ["<stop here>"]) == 23


@given(any_texts, any_texts, any_texts, special_sets)
def test_a_cut_changes_nothing_whatever_stands_before_and_after(before, text, after, specials):
    text += text  # long enough to be cut somewhere
    cut = last_cut(text, specials)
    hypothesis.assume(cut)  # 0 means that there is none
    whole = parts(before + text + after, specials)
    assert parts(before + text[:cut], specials) + parts(text[cut:] + after, specials) == whole


@given(st.lists(any_texts, min_size=5, max_size=30), special_sets, st.integers(20, 200))
def test_spans_of_a_file_join_up_and_can_be_read_alone(tmp_path, pieces, specials, size):
    data = encode_text(text := decode_text(encode_text("".join(pieces))))
    found = list(spans(Span(str(write(tmp_path / "text", data)), 0, len(data)), size, specials))
    assert [span.start for span in found] == [0, *(span.end for span in found[:-1])]
    assert found[-1].end == len(data)
    assert [p for span in found for p in parts(span.read(), specials)] == parts(text, specials)


def test_spans_are_about_as_long_as_asked_and_longer_where_no_cut_is_to_be_had(tmp_path):
    text = "one two " * 50_000 + "!" * 300_000 + " three" * 50_000
    path = write(tmp_path / "text", text)
    found = list(spans(Span(str(path), 0, len(text)), 100_000, []))
    lengths = [span.end - span.start for span in found]
    assert sum(lengths) == len(text) and len(found) >= 7
    assert [length for length in lengths if length > 100_000] == [
        max(lengths)
    ]  # the exclamation
    assert 300_000 <= max(lengths) < 500_000
    assert [p for span in found for p in parts(span.read(), [])] == find_pretokens(text)


@slow
def test_counts_do_not_depend_on_workers(tmp_path):
    rng, specials = random.Random(1), SPECIALS
    paths = [write(tmp_path / str(i), "".join(rng.choices(FRAGMENTS + BROKEN_BYTES, k=3000)))
             for i in range(4)]  # fmt: skip
    expected = Counter()
    for path in paths:
        expected.update(
            p for p in parts(decode_text(path.read_bytes()), specials) if isinstance(p, str)
        )
    for workers in (1, 2, 3):
        assert count_files(paths, specials, workers) == expected
    assert count_files(tmp_path, specials, 1) == expected  # the folder stands for its files


def test_files_larger_than_a_task_are_counted_in_parts(tmp_path):
    text = "one two three\n\n" * 400_000  # 6 MB
    path = write(tmp_path / "text", text)
    assert count_files(path, [], 2) == Counter(find_pretokens(text))


# ======================================================================================
# 2. LEARNING MERGES
#
# The fast trainer has one duty: to be the plain one. The plain one has an example by hand.
# ======================================================================================

small_words = st.text("ab", min_size=1, max_size=12) | st.text(
    "abcé漢 \udcff", min_size=1, max_size=6
)
corpora = st.dictionaries(small_words, st.integers(1, 4), max_size=12)


@pytest.mark.parametrize("learn", [learn_merges_plainly, learn_merges])
def test_an_example_by_hand(learn):
    # aab twice, ab once, bbb once. Pairs: aa 2, ab 3, bb 2: "ab" wins. Now a+ab twice,
    # bb twice: a tie, and b"b" > b"a", so "bb" wins: from the left, bb+b. Then a+ab, then
    # bb+b, which occurs once. Nothing is left after that.
    learned = learn({"aab": 2, "ab": 1, "bbb": 1}, 99)
    assert learned == [(b"a", b"b"), (b"b", b"b"), (b"a", b"ab"), (b"bb", b"b")]


@given(corpora, st.integers(0, 40))
@example({"aaaaa": 1, "aaaaaaa": 2, "aaa": 1}, 9)
@example({"abababab": 2, "bababa": 2, "aabb": 2}, 9)
def test_the_fast_trainer_learns_what_the_plain_one_learns(counts, num_merges):
    assert learn_merges(counts, num_merges) == learn_merges_plainly(counts, num_merges)


@given(corpora, st.randoms())
def test_merges_do_not_depend_on_reading_order(counts, rng):
    shuffled = list(counts.items())
    rng.shuffle(shuffled)
    assert learn_merges(dict(shuffled), 30) == learn_merges(counts, 30)


@slow
def test_merges_do_not_depend_on_workers_or_the_order_of_files(tmp_path):
    rng = random.Random(2)
    paths = [
        write(tmp_path / str(i), "".join(rng.choices(FRAGMENTS, k=2000))) for i in range(3)
    ]
    expected = train_bpe(paths, 400, ["<a>"], num_workers=1)
    assert len(expected[0]) == 400
    assert train_bpe(paths[::-1], 400, ["<a>"], num_workers=2) == expected
    assert train_bpe([paths[1], paths[2], paths[0]], 400, ["<a>"], num_workers=3) == expected


def test_bytes_come_first_then_merges_then_special_tokens(tmp_path):
    vocab, merges = train_bpe(write(tmp_path / "text", "hug pug hugs"), 260, ["<a>", "<b>"], 1)
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert merges == [(b"u", b"g"), (b"h", b"ug")]  # ug 3; then h+ug, " "+h.. by hand
    assert [vocab[i] for i in range(256, 260)] == [b"ug", b"hug", b"<a>", b"<b>"]


def test_training_stops_when_no_pair_is_left_and_says_so(tmp_path, capsys):
    vocab, merges = train_bpe(write(tmp_path / "text", "aaaa"), 1000, ["<a>"], 1)
    assert merges == [(b"a", b"a"), (b"aa", b"aa")] and len(vocab) == 256 + 2 + 1
    assert "no pair is left after 2 merges" in capsys.readouterr().err


def test_no_pair_is_counted_across_a_special_token(tmp_path):
    text = "ab<a>ab<a>" * 5 + "xy"
    assert train_bpe(write(tmp_path / "text", text), 300, ["<a>"], 1)[1] == [
        (b"a", b"b"),
        (b"x", b"y"),
    ]


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
    ours = [[scratchformer.spelled(token) for token in pair]
            for pair in learn_merges(Counter(find_pretokens(text)), 14)]  # fmt: skip
    assert json.loads(theirs.to_str())["model"]["merges"] == ours and len(ours) == 14


@pytest.mark.parametrize("specials, size, words", [
    (["<a>", "<a>"], 300, "'<a>' is given 2 times"),
    (["<a>", ""], 300, "empty"),
    (["x"], 300, "one byte"),
    (["<a>", "<b>"], 257, "from 258"),
    ([], 0, "from 256"),
    ([], 1 << 40, "to 1114111"),
])  # fmt: skip
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, specials, size, words):
    with pytest.raises(UserError, match=words):
        train_bpe([write(tmp_path / "text", "some text")], size, specials, 1)


@pytest.mark.parametrize("kind", [str, Path, lambda path: [path]])
def test_files_without_text_are_named(tmp_path, kind):
    with pytest.raises(UserError, match="no text to read in .*nothing.txt$"):
        train_bpe(kind(write(tmp_path / "nothing.txt", "")), 300, [], 1)


# ======================================================================================
# 3. ENCODING AND DECODING
#
# Ids are judged by tiktoken and tokenizers, built from our own file; every way to encode
# (whole, in chunks, in parallel, long words) is judged by the whole.
# ======================================================================================

SAMPLE = "".join(
    random.Random(3).choices([*FRAGMENTS, " the end", " of the text", "aab"], k=4000)
)
OURS = tokenizer_from(SAMPLE, 150, SPECIALS)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The library `tokenizers` with the file that we save."""
    OURS.save(path := tmp_path_factory.mktemp("theirs") / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(path))


def tiktoken_of(tokenizer, specials):
    ranks = {
        token: i
        for i, token in tokenizer.vocab.items()
        if i not in tokenizer.special_tokens.values()
    }
    return tiktoken.Encoding(
        "ours", pat_str=PRETOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def test_an_example_of_encoding_by_hand():
    merges = [(b"h", b"e"), (b"t", b"he"), (b" ", b"t"), (b" t", b"he")]
    vocab = dict(
        enumerate([bytes([i]) for i in range(256)] + [left + right for left, right in merges])
    )
    tokenizer = Tokenizer(vocab, merges, ["<a>"])
    # " the": h+e is merged first, then t+he. The rest of " the" finds no merge " "+"the".
    assert tokenizer.encode("the the<a>t") == [257, 32, 257, 260, 116]
    assert tokenizer.encode_ordinary("<a>") == [60, 97, 62]
    assert tokenizer.decode([257, 32, 257, 260, 116]) == "the the<a>t"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@given(texts)
def test_ids_are_tiktokens(text):
    assert OURS.encode_ordinary(text) == tiktoken_of(OURS, {}).encode(text)


@given(texts)
def test_ids_are_tiktokens_with_a_special_token(text):
    ours = Tokenizer(OURS.vocab, OURS.merges, ["<a> <b>"])
    oracle = tiktoken_of(ours, ours.special_tokens)
    assert ours.encode(text) == oracle.encode(text, allowed_special="all")


@given(text=texts)
def test_ids_are_those_of_tokenizers_on_our_file(theirs, text):
    # (tiktoken takes any one of special tokens that overlap, so it is no oracle for these.)
    assert OURS.encode(text) == theirs.encode(text).ids
    assert OURS.decode(OURS.encode(text)) == theirs.decode(
        theirs.encode(text).ids, skip_special_tokens=False
    )


@given(st.binary(max_size=60) | any_texts.map(encode_text))
def test_any_bytes_survive(data):
    assert OURS.decode_bytes(OURS.encode(decode_text(data))) == data
    assert OURS.decode(OURS.encode(decode_text(data))) == data.decode(errors="replace")


@given(st.text("ab", max_size=400) | any_texts)
def test_long_words_merge_as_short_ones(text):
    word = encode_text(text[:512]).decode("latin-1")[:512]
    assert OURS.merge_long(word) == OURS.merge(word)


@pytest.mark.parametrize(
    "text", ["a" * 30_001, "ab" * 9_999 + "b", "漢" * 9_999, " " * 30_000, "\n" * 30_000 + "x"]
)
def test_ids_of_long_runs_are_tiktokens(text):
    assert OURS.encode_ordinary(text) == tiktoken_of(OURS, {}).encode(text)


@hypothesis.settings(max_examples=15)
@given(any_texts, any_texts, st.integers(1, 60_000))
def test_a_stream_of_chunks_gives_the_ids_of_the_whole(one, other, size):
    text = decode_text(
        encode_text((one + "word" + other) * (200_000 // (4 + len(one + other))))
    )
    chunks = (text[start : start + size] for start in range(0, len(text), size))
    assert list(OURS.encode_iterable(chunks)) == OURS.encode(text)


def test_a_stream_is_read_no_further_than_needed():
    read = []
    ids = OURS.encode_iterable(read.append(i) or "so many words " * 1000 for i in range(100))
    assert next(ids) == OURS.encode("so many")[0] and len(read) < 10


def test_a_cache_never_holds_much():
    tokenizer = Tokenizer(OURS.vocab, OURS.merges)
    tokenizer.of_piece.MAX_ENTRIES = tokenizer.of_pretoken.MAX_ENTRIES = 100
    text = " ".join(map(str, range(2000))) + " " + "x" * 10_000
    assert tokenizer.encode(text) == OURS.encode(text)
    for cache in (tokenizer.of_piece, tokenizer.of_pretoken):
        assert 0 < len(cache) <= 100 and max(map(len, cache)) <= cache.MAX_KEY


@slow
def test_a_file_encoded_in_parallel_is_the_texts_encoded_whole(tmp_path):
    rng = random.Random(4)
    pieces = [*FRAGMENTS, *BROKEN_BYTES, " word", " end of the text"]
    paths = [
        write(tmp_path / str(i), "".join(rng.choices(pieces, k=k)))
        for i, k in enumerate([900_000, 1, 4000])
    ]
    expected = sum((OURS.encode(decode_text(path.read_bytes())) for path in paths), [])
    for workers in (1, 3):
        out = tmp_path / "out.bin"
        assert encode_file(OURS, paths, out, num_workers=workers) == len(expected)
        assert np.fromfile(out, "<u2").tolist() == expected
    note = json.loads((tmp_path / "out.bin.json").read_text())
    assert note.pop("tokenizer_sha256") == OURS.fingerprint()
    assert note == {
        "dtype": "uint16",
        "vocab_size": OURS.vocab_size,
        "num_tokens": len(expected),
        "end_of_text_id": None,
        "floor_nats_per_byte": None,
    }


def test_every_file_ends_with_end_of_text_exactly_once(tmp_path):
    tokenizer = tokenizer_from("one two", 4, [END_OF_TEXT])
    paths = [write(tmp_path / "1", "one"), write(tmp_path / "2", f"two{END_OF_TEXT}")]
    encode_file(tokenizer, paths, tmp_path / "out", append_eot=True, num_workers=1)
    ids = np.fromfile(tmp_path / "out", "<u2")
    assert tokenizer.decode(ids.tolist()) == f"one{END_OF_TEXT}two{END_OF_TEXT}"
    with pytest.raises(UserError, match="append_eot needs"):
        encode_file(OURS, paths, tmp_path / "other", append_eot=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("size, width", [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_they_fit_and_four_elsewhere(tmp_path, size, width):
    vocab = {i: bytes([i]) for i in range(256)} | {size - 1: b"<last>"}
    tokenizer = Tokenizer(vocab, [], ["<last>"])
    encode_file(
        tokenizer, write(tmp_path / "text", "a<last>"), tmp_path / "out.bin", num_workers=1
    )
    data = (tmp_path / "out.bin").read_bytes()
    assert data == b"".join(i.to_bytes(width, "little") for i in (97, size - 1))
    assert TokenFiles([tmp_path / "out.bin"]).read(0, 2).tolist() == [97, size - 1]


@slow
def test_killed_while_encoding_no_partial_file_is_left(tmp_path):
    # The words differ, or a cache would make this too quick to be killed.
    text = write(tmp_path / "text", " ".join(map(str, range(10**7, 10**7 + 200_000))))
    OURS.save(tmp_path / "tokenizer.json")
    flags = [
        f"bpe-encode --dataset_path {text} --tokenizer_path {tmp_path / 'tokenizer.json'} "
        "--out_path"
    ]
    assert run(*flags, tmp_path / "whole").returncode == 0
    whole = {
        "": (tmp_path / "whole").read_bytes(),
        ".json": (tmp_path / "whole.json").read_bytes(),
    }
    rng, killed = random.Random(5), 0
    for trial in range(6):
        out = tmp_path / f"out{trial}"
        encoder = subprocess.Popen(**process(*flags, out), stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, 0.6))
        encoder.kill()
        killed += encoder.wait() == -signal.SIGKILL
        for suffix, content in whole.items():
            path = out.with_name(out.name + suffix)
            assert not path.exists() or path.read_bytes() == content
        assert out.with_name(out.name + ".json").exists() or not out.exists()
    assert killed


def test_saving_and_loading_is_the_identity(tmp_path):
    OURS.save(tmp_path / "1.json")
    again = Tokenizer.load(tmp_path / "1.json")
    again.save(tmp_path / "2.json")
    assert (again.vocab, again.merges, again.special_tokens) == (
        OURS.vocab,
        OURS.merges,
        OURS.special_tokens,
    )
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert again.fingerprint() == OURS.fingerprint()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A tokenizer that `tokenizers` trained, its special tokens first, and its file."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [SAMPLE], 420, 1, show_progress=False, special_tokens=["<s>", "<a>"]
    )
    tokenizer.save(str(path := tmp_path_factory.mktemp("foreign") / "tokenizer.json"))
    return tokenizer, path


@given(text=texts)
def test_a_tokenizer_trained_by_tokenizers_gives_the_same_ids_here(foreign, text):
    tokenizer, path = foreign
    loaded = Tokenizer.load(path)
    assert loaded.special_tokens == {"<s>": 0, "<a>": 1}
    assert loaded.encode(text) == tokenizer.encode(text).ids


def test_a_foreign_tokenizer_survives_saving(foreign, tmp_path):
    loaded = Tokenizer.load(foreign[1])
    loaded.save(tmp_path / "again.json")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
    assert again.encode(SAMPLE).ids == foreign[0].encode(SAMPLE).ids == loaded.encode(SAMPLE)


def changed(**changes):
    """Our tokenizer.json with some entries changed; a__b=x changes content["a"]["b"]."""
    content = json.loads(json.dumps(OURS.to_json()))
    for place, value in changes.items():
        *path, last = place.split("__")
        where = content
        for key in path:
            where = where[key]
        where[last] = value
    return json.dumps(content)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}}],
}
FEW = {"model__vocab": {"a": 0}, "model__merges": []}


@pytest.mark.parametrize("content, words", [
    ("{", "damaged JSON"),
    ("", "damaged JSON"),
    (b"\xff\xfe", "damaged JSON"),
    ("[]", "damaged or no tokenizer.json"),
    ("{}", "damaged or no tokenizer.json"),
    (changed(model__type="WordPiece"), "WordPiece"),
    (changed(model__type="Unigram"), "Unigram"),
    (changed(pre_tokenizer=METASPACE), "GPT-2's pattern"),
    (changed(pre_tokenizer=LLAMA3), "GPT-2's pattern"),
    (changed(pre_tokenizer=None), "GPT-2's pattern"),
    (changed(pre_tokenizer__use_regex=False), "GPT-2's pattern"),
    (changed(pre_tokenizer__add_prefix_space=True), "adds a space"),
    (changed(model__byte_fallback=True), "SentencePiece"),
    (changed(model__ignore_merges=True), "ignore_merges"),
    (changed(normalizer={"type": "NFC"}), "NFC"),
    (changed(post_processor={"type": "TemplateProcessing"}), "TemplateProcessing adds tokens"),
    (changed(model__merges=[["q", "zzz"]]), "comes before its parts"),
    (changed(model__merges=["q z"]), "lacks b'qz'"),
    (changed(model__merges=[["q"]]), "damaged"),
    (changed(**FEW), "lacks"),
    (changed(model__vocab={"▁the": 0}), "not spelled in byte letters"),
    (changed(model__vocab=None), "damaged"),
])  # fmt: skip
def test_a_tokenizer_file_of_another_kind_is_refused_with_a_reason(
    capsys, tmp_path, content, words
):
    path, text = (
        write(tmp_path / "tokenizer.json", content),
        write(tmp_path / "text", "some text"),
    )
    error = refused(
        capsys,
        tmp_path,
        f"bpe-encode --dataset_path {text} --tokenizer_path {path}",
        f"--out_path {tmp_path}/out.bin",
    )
    assert words in error and "tokenizer.json" in error


@pytest.mark.parametrize("specials", [["<a>", "<a>"], [""], ["x"]])
def test_special_tokens_that_cannot_be_are_refused(specials):
    with pytest.raises(UserError, match="special token"):
        Tokenizer(OURS.vocab, OURS.merges, specials)


def test_an_id_outside_the_vocabulary_is_named_in_decoding():
    with pytest.raises(UserError, match="id 9999 is not in the vocabulary"):
        OURS.decode([1, 9999])


# ======================================================================================
# 4. TOKENS ON DISK, AND BATCHES
#
# A batch is a function of seed, step and row; however rows are dealt out and files cut,
# they are the same rows.
# ======================================================================================


def token_file(path, ids, note=None, dtype="<u2"):
    """`path`, holding `ids`, with `note` as the description beside it."""
    np.array(ids, dtype).tofile(path)
    if note is not None:
        write(Path(f"{path}.json"), json.dumps(note))
    return path


def batches(paths, rank=0, world=1, length=5, **flags):
    return Batches(
        TokenFiles(paths, 1000), DataConfig(train_tokens=paths, **flags), length, rank, world
    )


def test_rows_are_stretches_of_the_file_and_targets_are_one_place_ahead(tmp_path):
    pair = batches([token_file(tmp_path / "a", range(500, 600))], batch_size=7).get(3, 0)
    inputs, targets = pair
    assert inputs.shape == targets.shape == (7, 5) and inputs.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(5)) and torch.equal(
        targets, inputs + 1
    )
    assert len(inputs[:, 0].unique()) > 1


def test_a_batch_is_a_function_of_seed_step_and_row(tmp_path):
    paths = [token_file(tmp_path / "a", range(900))]
    one, other = batches(paths, seed=3), batches(paths, seed=3)
    other.get(1, 0)
    assert torch.equal(one.get(8, 0)[0], other.get(8, 0)[0])
    assert not torch.equal(one.get(8, 0)[0], one.get(9, 0)[0])
    assert not torch.equal(one.get(8, 0)[0], batches(paths, seed=4).get(8, 0)[0])
    # Rows 0 to 3 do not depend on how many follow them.
    assert torch.equal(batches(paths, seed=3, batch_size=4).get(8, 0)[0], one.get(8, 0)[0][:4])


@pytest.mark.parametrize("world, micro_steps", [(1, 4), (2, 2), (4, 1)])
def test_any_split_over_processes_and_micro_steps_sees_the_same_rows(
    tmp_path, world, micro_steps
):
    paths = [token_file(tmp_path / "a", range(900))]
    whole = batches(paths, batch_size=8).get(6, 0)[0]
    dealt = [batches(paths, rank, world, batch_size=2).get(6, micro)[0]
             for micro in range(micro_steps) for rank in range(world)]  # fmt: skip
    assert torch.equal(torch.cat(dealt), whole)


def test_the_stream_is_the_batches_in_order(tmp_path):
    source = batches([token_file(tmp_path / "a", range(900))], batch_size=2, grad_accum_steps=3)
    expected = [source.get(step, micro) for step in (4, 5) for micro in range(3)]
    for got, (inputs, targets) in zip(source.stream(4, 6, CPU), expected, strict=True):
        assert torch.equal(got[0], inputs) and torch.equal(got[1], targets)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.data())
def test_several_files_read_as_one(tmp_path, lengths, data):
    ids, ends = list(range(sum(lengths))), [0, *itertools.accumulate(lengths)]
    paths = [
        token_file(
            tmp_path / str(i),
            ids[ends[i] : ends[i + 1]],
            dtype=("<u2", "<u4")[i % 2],
            note={"dtype": ("uint16", "uint32")[i % 2]},
        )
        for i in range(len(lengths))
    ]
    start = data.draw(st.integers(0, len(ids) - 1))
    count = data.draw(st.integers(1, len(ids) - start))
    tokens = TokenFiles(paths, 1000)
    assert len(tokens) == len(ids)
    assert tokens.read(start, count).tolist() == ids[start : start + count]


def test_every_place_is_drawn_about_equally_often(tmp_path):
    source = batches([token_file(tmp_path / "a", range(25))], length=5)  # 20 places
    counts = np.bincount(
        np.concatenate([source.row_starts(step, 0, 50) for step in range(400)])
    )
    assert (
        len(counts) == 20 and counts.min() > 900 and counts.max() < 1100
    )  # 1000, deviation 31


def test_a_file_as_nanogpt_writes_it_trains(tmp_path):
    token_file(tmp_path / "train.bin", np.random.default_rng(1).integers(0, 50, 999))
    do(
        "train",
        *TINY,
        f"--train_tokens {tmp_path / 'train.bin'} --vocab_size 50 --max_steps 4 "
        f"--outdir {tmp_path / 'run'}",
    )
    assert len(metrics(tmp_path / "run", "train_loss")) == 4


GOOD = [i % 50 for i in range(99)]


@pytest.mark.parametrize("data, note, flags, words", [
    (GOOD, None, "", "give --vocab_size"),
    ([], None, "--vocab_size 50", "0 tokens"),
    (GOOD[:64], None, "--vocab_size 50", "too few for a context_length of 64"),
    (b"odd", None, "--vocab_size 50", "damaged: 3 bytes"),
    (GOOD, {"num_tokens": 98, "vocab_size": 50}, "", "damaged"),
    (GOOD, {"dtype": "uint32", "vocab_size": 50}, "", "damaged"),
    (GOOD, {"dtype": "float7", "vocab_size": 50}, "", "float7"),
    (GOOD, {"vocab_size": "many"}, "", "many"),
    (GOOD, {"vocab_size": None}, "--vocab_size 50", "vocab_size is None"),
    (GOOD, [], "", "description"),
    (GOOD, {"vocab_size": 50}, "--vocab_size 49", "vocab_size is 49"),
])  # fmt: skip
def test_a_token_file_that_cannot_be_is_refused(capsys, tmp_path, data, note, flags, words):
    path = tmp_path / "train.bin"
    token_file(path, data if isinstance(data, list) else [], note)
    if isinstance(data, bytes):
        write(path, data)
    argv = ["train", *TINY, f"--train_tokens {path} --max_steps 9 --outdir {tmp_path / 'run'}"]
    error = refused(capsys, tmp_path, *argv, flags)
    assert words in error and "train.bin" in error


def test_an_id_outside_the_vocabulary_is_named_before_the_model_sees_it(capsys, tmp_path):
    path = token_file(tmp_path / "train.bin", [*GOOD, 50, *GOOD])
    with pytest.raises(UserError, match="holds the id 50, outside the vocabulary of 50"):
        TokenFiles([path], 50).read(90, 20)
    argv = [
        "train --vocab_size 50 --max_steps 50 --train_tokens",
        path,
        "--outdir",
        tmp_path / "run",
    ]
    assert main(shell_words([*argv, *TINY])) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not checkpoints_in(tmp_path / "run")


def test_files_of_different_tokenizers_do_not_mix(tmp_path):
    paths = [
        token_file(tmp_path / name, GOOD, {"vocab_size": 50, "tokenizer_sha256": name})
        for name in "ab"
    ]
    with pytest.raises(UserError, match="different tokenizers"):
        TokenFiles(paths)


# ======================================================================================
# 5. THE MODEL
#
# Each part against the formula or PyTorch's own, the whole against transformers' Llama.
# ======================================================================================

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny_model(seed=0, config=TINY_MODEL, scale=3.0):
    """A model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() == 2 else parameter.add_(
                noise(*parameter.shape) / 4
            )
    return model.eval()


def test_rmsnorm_by_hand():
    # The mean square of (3, 4, 0, 0) is 25 / 4, its root 2.5.
    assert torch.allclose(
        RMSNorm(4, eps=0.0)(torch.tensor([3.0, 4, 0, 0])), torch.tensor([1.2, 1.6, 0, 0])
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_is_torchs(dtype):
    x, norm = noise(3, 5, 7, dtype=dtype), RMSNorm(7, 1e-5)
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x.float(), (7,), norm.weight, 1e-5)
    assert norm(x).dtype == dtype
    assert torch.allclose(norm(x).float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rmsnorm_of_large_float16_entries_is_not_zero():
    assert torch.equal(
        RMSNorm(4)(torch.full((4,), 30_000.0, dtype=torch.float16)), torch.ones(4).half()
    )


def test_rope_turns_pairs_as_complex_numbers_turn():
    x, positions = noise(2, 3, 9, 8), torch.arange(9) + 100
    angles = positions[:, None] * 500.0 ** (-torch.arange(4) / 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.exp(1j * angles)
    assert torch.allclose(
        apply_rope(x, positions, 500.0), torch.view_as_real(turned).flatten(-2), atol=1e-4
    )


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rope_scores_depend_only_on_distance(m, n, shift):
    q, k = noise(1, 8, seed=1), noise(1, 8, seed=2)

    def score(i, j):
        return apply_rope(q, torch.tensor([i]), 1e4) @ apply_rope(k, torch.tensor([j]), 1e4).T

    assert torch.allclose(score(m, n), score(m + shift, n + shift), atol=2e-3)
    assert torch.allclose(apply_rope(q, torch.tensor([m]), 1e4).norm(), q.norm())


def test_rope_scores_do_depend_on_distance():
    q = torch.ones(1, 8)
    assert (q @ apply_rope(q, torch.tensor([5]), 1e4).T).item() < 7 < (q @ q.T).item()


@pytest.mark.parametrize("T, width", [(1, 2), (1, 6), (5, 4), (17, 10)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_attention_formula_equals_the_fused_kernel_in_value_and_gradient(
    T, width, dtype, causal
):
    ours = [noise(2, 3, T, width, seed=i).to(dtype).requires_grad_() for i in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    mask = torch.ones(T, T).tril().bool() if causal else None
    weights = noise(2, 3, T, width, seed=9, dtype=dtype)
    one, other = (
        attention_reference(*ours, mask),
        F.scaled_dot_product_attention(*theirs, is_causal=causal),
    )
    for result in (one, other):
        (result * weights).sum().backward()
    tolerance = {
        "rtol": 0,
        "atol": 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps,
    }
    assert torch.allclose(one, other, **tolerance)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x.grad, y.grad, **{**tolerance, "atol": 4 * tolerance["atol"]})


def test_swiglu_is_its_formula():
    layer, x = SwiGLU(6, 10), noise(2, 3, 6)
    gate, up = layer.gate_up.weight[:10], layer.gate_up.weight[10:]
    expected = (x @ gate.T / (1 + torch.exp(-x @ gate.T)) * (x @ up.T)) @ layer.down.weight.T
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_attention_cannot_see_the_future():
    model, tokens = (
        tiny_model(),
        torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1)),
    )
    for place in (1, 12, 23):
        other = tokens.clone()
        other[:, place:] = (other[:, place:] + 1) % 61
        one, two = model(tokens), model(other)
        assert torch.equal(one[:, :place], two[:, :place])
        assert not torch.allclose(one[:, place], two[:, place])


def test_the_past_is_seen():
    model = tiny_model()
    one, other = model(torch.tensor([[5, 6, 7, 8]])), model(torch.tensor([[4, 6, 7, 8]]))
    assert all((one - other)[0, place].abs().max() > 1e-3 for place in range(4))


@pytest.mark.parametrize("prompt", [1, 2, 7, 24])
def test_cached_logits_equal_uncached(prompt):
    model, tokens = (
        tiny_model(),
        torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(2)),
    )
    cache = model.new_cache(3, torch.float32)
    steps = [model(tokens[:, :prompt], cache=cache, start=0)]
    for place in range(prompt, 24):
        token = tokens[:, place : place + 1]
        steps.append(model(token, cache=cache, start=place))
        # The same with the place in a tensor, as a recording needs it.
        same = model(token, cache=cache, start=torch.tensor(place))
        assert torch.allclose(same, steps[-1], atol=2e-5)
    assert torch.allclose(torch.cat(steps, 1), model(tokens), atol=2e-5)


def test_a_cached_model_goes_on_with_several_tokens():
    model, cache = tiny_model(), tiny_model().new_cache(3, torch.float32)
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(2))
    parts = [tokens[:, :5], tokens[:, 5:6], tokens[:, 6:20], tokens[:, 20:]]
    starts = [0, 5, 6, 20]
    steps = [model(part, cache=cache, start=start) for part, start in zip(parts, starts)]
    assert torch.allclose(torch.cat(steps, 1), model(tokens), atol=2e-5)


def llama_of(model, **changes):
    """transformers' Llama with the weights of our model."""
    import transformers

    c = model.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            max_position_embeddings=c.context_length,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            **changes,
        )
    )
    llama.load_state_dict(llama_weights(model.state_dict(), c.num_heads), strict=True)
    return llama.eval()


def test_the_model_is_transformers_llama():
    model = tiny_model(config=dataclasses.replace(TINY_MODEL, rope_theta=500.0, norm_eps=1e-3))
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(model(tokens), llama_of(model)(tokens).logits, atol=1e-4)


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(TINY_MODEL, vocab_size=1000))
    tokens = torch.randint(1000, (8, 25), generator=torch.Generator().manual_seed(4))
    assert (
        abs(cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).item() - math.log(1000)) < 0.05
    )


def test_weights_are_drawn_with_the_stated_deviations():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(500, 8, num_layers=8, d_model=64, num_heads=2, d_ff=128))
    for name, parameter in model.named_parameters():
        writes = re.search(r"attention.output|swiglu.down", name)
        expected = 0.02 / (4 if writes else 1) if parameter.dim() == 2 else 0
        assert abs(parameter.std().item() - expected) <= 0.05 * expected, name


def test_the_model_knows_nothing_of_processes():
    source = FILE.read_text(encoding="utf-8")
    chapter = source[source.index("\n# 5. THE MODEL") : source.index("\n# 6. LEARNING")]
    assert not re.search(
        r"\b(rank|world|mesh|environ|distributed|DTensor|shard\w*)\b", chapter, re.I
    )
    assert "class Transformer" in chapter


@pytest.mark.parametrize("changes, words", [
    ({"d_model": 33}, "divisible by num_heads: 33 / 4"),
    ({"d_model": 36}, "must be even"),
    ({"num_layers": 0}, "num_layers must be at least 1"),
    ({"rope_theta": math.nan}, "rope_theta must be"),
])  # fmt: skip
def test_a_shape_that_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY_MODEL, **changes)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(UserError, match="25 tokens are more than context_length 24"):
        tiny_model()(torch.zeros(1, 25, dtype=torch.int64))


# ======================================================================================
# 6. LEARNING
#
# Loss, schedule and update against PyTorch's plain forms; what is not finite touches
# nothing.
# ======================================================================================


def test_cross_entropy_by_hand():
    # Odds 1 : 3, so probability 1/4 for id 0 and 3/4 for id 1.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    loss = cross_entropy(logits, torch.tensor([[0, 1]]))
    assert math.isclose(loss.item(), (math.log(4) + math.log(4 / 3)) / 2, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_is_torchs_computed_in_float32(dtype):
    logits, targets = noise(2, 5, 11, dtype=dtype) * 4, torch.arange(10).view(2, 5)
    targets[0, 3] = -100
    expected = (
        -logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    )
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected[targets >= 0].mean())


@pytest.mark.parametrize("rows", [1, 512, 1300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_by_rows_is_that_of_all_logits(dtype, rows):
    x, weight = noise(rows, 12, dtype=dtype) * 3, noise(31, 12)
    targets = torch.arange(rows) * 3 % 31
    middle, right = rows // 2, weight[targets[rows // 2]]
    x[middle] = right * 10 / right.norm() ** 2  # here the model is nearly certain, and right
    found, expected = [], []
    for leaves, loss_of in (
        (found, LinearCrossEntropy.apply),
        (expected, lambda x, w, t: cross_entropy(x @ w.to(x.dtype).T, t)),
    ):
        leaves += [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        leaves.append(loss_of(*leaves, targets))
        (leaves[2] * 5).backward()
    assert found[2].dtype == torch.float32
    assert torch.allclose(found[2], expected[2], rtol=1e-5)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, theirs in zip([p.grad for p in found[:2]], [p.grad for p in expected[:2]]):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    ours, theirs = (leaves[0].grad[middle] for leaves in (found, expected))
    assert (ours - theirs).norm() <= 2 * tolerance * theirs.norm()


def test_the_loss_by_rows_holds_few_logits_at_a_time():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            sizes.extend(x.numel() for x in [result] if isinstance(x, torch.Tensor))
            return result

    x, weight = noise(8192, 4).requires_grad_(), noise(1000, 4).requires_grad_()
    with Sizes():
        LinearCrossEntropy.apply(x, weight, torch.arange(8192) % 1000).backward()
    assert max(sizes) == 512 * 1000


def test_the_loss_by_rows_sums_many_rows_in_float16():
    """4,096 rows at a time that all pull the same way: 2/3 * 40 * 4,096 are 109,227."""
    x, targets = torch.full((65536, 2), 40.0), torch.zeros(65536, dtype=torch.int64)
    grads = []
    for dtype in (torch.float16, torch.float32):
        weight = torch.zeros(3, 2, requires_grad=True)
        LinearCrossEntropy.apply(x.to(dtype), weight, targets).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=2e-3, atol=0)


def test_the_loss_by_rows_compiles_as_one():
    """A break in the graph would be no error, only slow."""
    x, weight, targets = noise(1300, 12), noise(31, 12), torch.arange(1300) % 31
    compiled = torch.compile(LinearCrossEntropy.apply, fullgraph=True, backend="aot_eager")
    grads = []
    for loss_of in (compiled, LinearCrossEntropy.apply):
        leaf = weight.clone().requires_grad_()
        loss_of(x, leaf, targets).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none")
def test_the_loss_by_rows_is_torchs_own():
    x, weight, targets = noise(8, 12), noise(31, 12), torch.arange(8) * 3
    theirs = F.linear_cross_entropy(x, weight, targets)
    assert torch.allclose(LinearCrossEntropy.apply(x, weight, targets), theirs)


def test_a_model_given_targets_returns_their_loss():
    tokens = torch.randint(61, (4, 13), generator=torch.Generator().manual_seed(3))
    model = tiny_model()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_the_schedule_is_the_table():
    got = [learning_rate(step, 8.0, 2.0, 4, 10) for step in range(12)]
    # Warm-up by quarters; then 5 + 3 cos(pi n / 6).
    table = [2, 4, 6, 8, 8, 7.598, 6.5, 5, 3.5, 2.402, 2, 2]
    assert got == pytest.approx(table, abs=5e-4)
    assert learning_rate(0, 8.0, 2.0, 0, 10) == 8.0


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 0.999), st.floats(0, 0.9999))
def test_the_formula_of_adamw_is_torchs(steps, decay, beta1, beta2):
    generator = torch.Generator().manual_seed(steps)
    start = torch.randn(5, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(beta1, beta2), weight_decay=decay)
    ours, mean, square = start, torch.zeros(5), torch.zeros(5)
    for step in range(1, steps + 1):
        theirs.grad = torch.randn(5, generator=generator)
        ours, mean, square = adamw_reference(
            ours, theirs.grad, mean, square, step, 0.1, (beta1, beta2), decay
        )
        optimizer.step()
    torch.testing.assert_close(ours, theirs.data, rtol=1e-4, atol=1e-5)


def test_matrices_decay_and_gains_do_not():
    model = tiny_model()
    optimizer = make_optimizer(
        list(model.parameters()),
        LearningConfig(lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9),
        CPU,
    )
    decays = {
        p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name: decays[p] for name, p in model.named_parameters()} == {
        name: 0.0 if "norm" in name else 0.5 for name, _ in model.named_parameters()
    }
    assert all(
        group["lr"] == 0.1 and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups
    )


def one_update(model, seed, scale=1.0):
    """Gradients of a made-up loss."""
    tokens = torch.randint(61, (4, 13), generator=torch.Generator().manual_seed(seed))
    (cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * scale).backward()


def stepper_for(model, config, fused, scaled=False):
    """A stepper on the CPU; not fused: with the optimizer of a device without that kernel."""
    stepper = Stepper(model, config, CPU, scaled)
    if not fused:
        parameters = list(model.parameters())
        stepper.optimizer = make_optimizer(parameters, config, torch.device("mps"))
    return stepper


@pytest.mark.parametrize("clip_grad", [0.0, 0.05, 1e9])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_the_stepper_is_clip_grad_norm_and_plain_adamw(clip_grad, scaled, fused):
    ours, theirs = tiny_model(), tiny_model()
    config = LearningConfig(lr=0.01, clip_grad=clip_grad, weight_decay=0.1)
    stepper = stepper_for(ours, config, fused, scaled)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)
    for seed in range(5):
        one_update(ours, seed, scale=stepper.scale)
        one_update(theirs, seed)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad or math.inf)
        plain.step()
        plain.zero_grad()
        assert torch.allclose(stepper.step(), expected, rtol=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5) and one.grad is None
    assert stepper.state()["skipped"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad, clip_grad, fused):
    model = tiny_model()
    stepper = stepper_for(model, LearningConfig(clip_grad=clip_grad), fused)

    def everything():
        moments = [
            stepper.optimizer.state[p][key]
            for p in model.parameters()
            for key in (*MOMENTS, "step")
        ]
        return [tensor.clone() for tensor in (*model.parameters(), *moments)]

    one_update(model, 0)
    stepper.step()
    before = everything()
    for in_a_row in (1, 2):
        one_update(model, 1)
        model.norm.weight.grad[3] = bad
        assert not stepper.step().isfinite()
        assert all(
            torch.equal(one, other) for one, other in zip(before, everything(), strict=True)
        )
        assert stepper.state()["skipped"] == stepper.state()["skipped_in_a_row"] == in_a_row
    one_update(model, 2)
    stepper.step()
    assert not torch.equal(before[0], everything()[0])
    assert (stepper.state()["skipped"], stepper.state()["skipped_in_a_row"]) == (2, 0)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_many_good_steps():
    model = tiny_model()
    stepper = Stepper(model, LearningConfig(), CPU, scaled=True)
    stepper.GROWTH_STEPS, scales = 3, []
    for bad in (True, True, False, False, True, False, False, False, False):
        one_update(model, 0, stepper.scale)
        if bad:
            model.norm.weight.grad[0] = math.inf
        stepper.step()
        scales.append(math.log2(stepper.scale.item()))
    assert scales == [15, 14, 14, 14, 13, 13, 13, 14, 14]


# ======================================================================================
# 7. GENERATING TEXT
#
# Against a loop without a cache; draws are counted.
# ======================================================================================

PROMPT = [5, 17, 3]


def frequencies(logits, draws=20_000, **how):
    generator = torch.Generator().manual_seed(1)
    ids = sample(torch.tensor([logits]).expand(draws, -1), generator=generator, **how)
    return (torch.bincount(ids, minlength=len(logits)) / draws).tolist()


def test_draws_follow_the_softmax():
    logits = [math.log(p) for p in (0.5, 0.2, 0.15, 0.1, 0.05)]
    # 20,000 draws: a deviation of at most 0.0035.
    assert frequencies(logits) == pytest.approx([0.5, 0.2, 0.15, 0.1, 0.05], abs=0.015)
    squares = [0.25, 0.04, 0.0225, 0.01, 0.0025]
    assert frequencies(logits, temperature=0.5) == pytest.approx(
        [x / 0.325 for x in squares], abs=0.015
    )


@pytest.mark.parametrize("how, kept", [
    ({"top_k": 1}, [1]), ({"top_k": 3}, [1, 3, 0]), ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.0}, [1]), ({"top_p": 0.49}, [1]), ({"top_p": 0.6}, [1, 3]),
    ({"top_p": 0.8}, [1, 3, 0]), ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 3, "top_p": 0.55}, [1]), ({"temperature": 0}, [1]),
])  # fmt: skip
def test_top_k_and_top_p_keep_exactly_the_likeliest(how, kept):
    odds = [0.15, 0.5, 0.1, 0.2, 0.05]
    expected = [p / sum(odds[i] for i in kept) if i in kept else 0 for i, p in enumerate(odds)]
    got = frequencies([math.log(p) for p in odds], **how)
    assert got == pytest.approx(expected, abs=0.015)
    assert [i for i, share in enumerate(got) if share] == sorted(kept)


def test_greedy_text_is_the_argmax_loop_without_a_cache():
    model, ids = tiny_model(), list(PROMPT)
    for _ in range(21):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert [*PROMPT, *generate(model, PROMPT, 21, temperature=0)] == ids and len(set(ids)) > 3


def test_a_drawn_text_is_the_loop_without_a_cache():
    model, ids = tiny_model(), list(PROMPT)
    one, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(21):
        ids += sample(model(torch.tensor([ids]))[:, -1], 0.9, 20, 0.95, one).tolist()
    assert [*PROMPT, *generate(model, PROMPT, 21, 0.9, 20, 0.95, generator=other)] == ids


def test_a_recording_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="CUDA device, not on cpu"):
        next(generate(tiny_model(), PROMPT, 5, record=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("drawing", [{"temperature": 0}, {"top_k": 20, "top_p": 0.95}])
@pytest.mark.parametrize("prompt", [[1], list(PROMPT)])
def test_a_recorded_text_is_the_same(prompt, drawing):
    model = tiny_model().to("cuda")
    ours, recorded = (
        list(generate(model, prompt, 60, record=record, **drawing,
                      generator=torch.Generator("cuda").manual_seed(7)))
        for record in (False, True)
    )
    assert ours == recorded and len(set(ours)) > 3  # 60: beyond the context


def test_a_seed_repeats_and_another_does_not():
    def text(seed):
        return list(
            generate(tiny_model(), PROMPT, 20, generator=torch.Generator().manual_seed(seed))
        )

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("context", [1, 2, 7, 24])
@pytest.mark.parametrize("prompt", [1, 24, 60])
def test_texts_longer_than_the_context_keep_going(context, prompt):
    model = tiny_model(config=dataclasses.replace(TINY_MODEL, context_length=context))
    ids = [(7 * i) % 61 for i in range(prompt)]
    new = list(generate(model, ids, 70, temperature=0))
    assert len(new) == 70
    # The first id is the likeliest after the last `context` ids.
    assert new[0] == model(torch.tensor([ids[-context:]]))[0, -1].argmax().item()


def test_text_stops_after_the_end_token():
    whole = list(generate(tiny_model(), PROMPT, 20, temperature=0))
    end = whole[4]
    assert (
        list(generate(tiny_model(), PROMPT, 20, 0, eos_id=end)) == whole[: whole.index(end) + 1]
    )


@pytest.mark.parametrize("rows, width", [(64, 6), (50, 3), (7, 5), (192, 2)])
def test_a_product_on_all_cores_is_the_plain_product(rows, width):
    layer = torch.nn.Linear(width, rows, bias=False)
    use_all_cores(model := torch.nn.Sequential(layer))
    for shape in [(1, 1, width), (1, 4, width), (3, 1, width)]:
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), x @ layer.weight.T)


@given(any_texts)
def test_streamed_text_never_breaks_a_character(text):
    ids = OURS.encode(text)
    pieces = list(stream_text(OURS, ids))
    assert "".join(pieces) == OURS.decode(ids)
    if not any("\udc80" <= character <= "\udcff" for character in text):
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_a_character_comes_when_its_last_byte_does():
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    assert list(stream_text(tokenizer, "é😀".encode())) == ["", "é", "", "", "", "😀", ""]
    assert list(stream_text(tokenizer, b"a\xf0\x9f"))[-1] == "\ufffd"


@pytest.mark.parametrize("prompt", [[], [61], [-1]])
def test_a_prompt_outside_the_vocabulary_is_refused(prompt):
    with pytest.raises(UserError, match="ids from 0 to 60"):
        next(generate(tiny_model(), prompt, 5))


# ======================================================================================
# 8. MANY DEVICES
#
# However the same rows are spread over processes and micro-steps, the losses are the same.
# ======================================================================================

SPREAD = {  # processes, flags: always 8 sequences per step
    "one": (0, "--batch_size 8"),
    "accumulated": (0, "--batch_size 2 --grad_accum_steps 4"),
    "replicated": (2, "--batch_size 2 --grad_accum_steps 2"),
    "fsdp": (2, "--batch_size 2 --grad_accum_steps 2 --fsdp"),
    "block_by_block": (2, "--batch_size 2 --grad_accum_steps 2 --fsdp --fsdp_unit block"),
    "hybrid": (4, "--batch_size 1 --grad_accum_steps 2 --fsdp --shard_size 2"),
}


def spread_training(toy, outdir, how, *flags):
    """Train 50 steps, spread as `how` says."""
    processes, spread = SPREAD[how]
    valid = f"--valid_tokens {toy / 'valid.bin'}"
    argv = [
        "train",
        *training(toy, outdir),
        spread,
        "--max_steps 50 --save_interval 25",
        valid,
        *flags,
    ]
    if processes:
        done = run(*argv, processes=processes)
        assert done.returncode == 0 and b"terminate called" not in done.stderr, done.stderr
    else:
        do(*argv)


@pytest.fixture(scope="module")
def spread(toy, tmp_path_factory):
    """The same run, spread in each way: a folder of run folders."""
    folder = tmp_path_factory.mktemp("spread")
    for how in SPREAD:
        spread_training(toy, folder / how, how)
    return folder


def close_rows(rows, expected, tolerance=1e-5):
    for row, other in zip(rows, expected, strict=True):
        assert [x for x in row if x is not None] == pytest.approx(
            [x for x in other if x is not None], rel=tolerance
        )


@slow
@pytest.mark.parametrize("how", list(SPREAD)[1:])
def test_two_ranks_learn_what_one_rank_learns(spread, how):
    columns = ["step", "train_loss", "valid_loss", "grad_norm"]
    rows = metrics(spread / how, *columns)
    assert len(rows) == 50 and rows[-1][2] < 3
    close_rows(
        [row[:3] for row in rows], [row[:3] for row in metrics(spread / "one", *columns)]
    )
    close_rows(
        [row[3:] for row in rows], [row[3:] for row in metrics(spread / "one", *columns)], 1e-3
    )


@slow
def test_a_run_says_its_global_batch_and_how_it_came_about(toy, tmp_path):
    argv = [*training(toy, tmp_path), "--max_steps 4 --grad_accum_steps 3"]
    error = run("train", *[word for word in argv if word != "--quiet"]).stderr.decode()
    assert (
        "12 sequences = 768 tokens per step: batch_size 4 x grad_accum_steps 3 x processes 1"
        in error
    )
    assert re.search(r"step +4/4  loss \d\.\d{4}  lr \S+  norm \S+  \S+ tok/s", error)


@pytest.mark.parametrize("flags", ["", "--compile"])
def test_recomputed_activations_give_the_same_run(toy, tmp_path, flags):
    for name, more in (("kept", ""), ("again", "--activation_checkpointing")):
        do("train", *training(toy, tmp_path / name), f"--max_steps 5 {flags} {more}")
    kept, again = (metrics(tmp_path / name, "train_loss") for name in ("kept", "again"))
    assert again == [pytest.approx(row, rel=1e-5) for row in kept]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_learns_nearly_the_same(toy, tmp_path, dtype):
    for name in ("float32", dtype):
        do("train", *training(toy, tmp_path / name), f"--max_steps 60 --dtype {name}")
    full, low = (metrics(tmp_path / name, "train_loss")[-1][0] for name in ("float32", dtype))
    assert low == pytest.approx(full, rel=0.03) and low != full and full < 2.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(toy, tmp_path, capsys):
    assert "no CUDA device" in refused(
        capsys,
        tmp_path,
        "train",
        *training(toy, tmp_path / "run"),
        "--max_steps 9 --device cuda",
    )


STEPS_OF_FSDP = """
import gc, torch
from scratchformer import *

with World(DeviceConfig(device="cpu"), ProcessConfig(fsdp=True)) as world:
    model = Transformer(ModelConfig(64, 16, 2, 32, 4, 64))
    world.shard(model)
    stepper = Stepper(model, LearningConfig(), world.device, False)
    tokens = torch.ones(2, 16, dtype=torch.int64)
    for step in range(60):
        stepper.optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        world.before_backward(model, True)
        model(tokens, tokens).backward()
        stepper.step()
        if step in (29, 59):
            gc.collect()
            print("objects", len(gc.get_objects()))
"""


@slow
def test_steps_of_fsdp_leave_nothing_behind(tmp_path):
    script = write(tmp_path / "steps.py", STEPS_OF_FSDP.encode())
    done = run(processes=1, file=script, env={"PYTHONPATH": str(FILE.parent)})
    assert done.returncode == 0, done.stderr
    early, late = map(int, re.findall(rb"objects (\d+)", done.stdout))
    assert late - early < 30  # objects of Python, in 30 steps; one for each would be a leak


def test_fsdp_without_torchrun_is_refused(toy, tmp_path, capsys):
    flags = [*training(toy, tmp_path / "run"), "--max_steps 9 --fsdp"]
    assert "torchrun" in refused(capsys, tmp_path, "train", *flags)


@pytest.mark.parametrize("flag", ["--fsdp_unit block", "--shard_size 2"])
def test_a_flag_of_fsdp_without_fsdp_is_refused(toy, tmp_path, capsys, flag):
    flags = [*training(toy, tmp_path / "run"), "--max_steps 9", flag]
    assert "needs --fsdp" in refused(capsys, tmp_path, "train", *flags)


@slow
def test_a_mistake_under_torchrun_is_told_once(tmp_path):
    done = run(f"train --train_tokens {tmp_path / 'missing.bin'} --device cpu", processes=2)
    assert done.returncode and done.stderr.count(b"scratchformer: error: ") == 1
    assert b"missing.bin" in done.stderr


# ======================================================================================
# 9. CHECKPOINTS
#
# Whole or refused; the same file whoever wrote it; nothing in it is ever executed.
# ======================================================================================


def same_state(one, other, tolerance=0.0):
    """Whether weights and moments are equal, to the bit or within `tolerance`."""
    for left, right in [(one["model"], other["model"])] + [
        (one["optimizer"][key], other["optimizer"][key]) for key in MOMENTS
    ]:
        assert left.keys() == right.keys()
        for key in left:
            assert torch.allclose(left[key], right[key], rtol=0, atol=tolerance), key
    return True


def test_a_checkpoint_is_tensors_and_plain_types(toy):
    state = torch.load(toy / "run" / "step_000150.pt", weights_only=True)
    model = Transformer(ModelConfig(**state["model_config"]))
    assert state["step"] == 150 and list(state["model"]) == [
        name for name, _ in model.named_parameters()
    ]
    assert {p.dtype for p in state["model"].values()} == {torch.float32}


def test_a_model_survives_saving_and_loading(tmp_path):
    model, tokens = tiny_model(), torch.tensor([[1, 2, 3]])
    save_checkpoint(
        tmp_path / "step_000003.pt",
        {
            "model": dict(model.named_parameters()),
            "model_config": dataclasses.asdict(model.config),
            "step": 3,
        },
    )
    for path in (tmp_path, tmp_path / "step_000003.pt"):
        assert torch.equal(model_from_checkpoint(load_checkpoint(path))(tokens), model(tokens))


def test_a_model_loaded_in_bfloat16_keeps_the_angles_of_rope(toy):
    state = load_checkpoint(toy / "run")
    model = model_from_checkpoint(state, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.table, model_from_checkpoint(state).table)
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_all_checkpoints_are_kept_if_asked_for(toy, tmp_path):
    flags = "--max_steps 4 --save_interval 1 --keep_checkpoints 0"
    do("train", *training(toy, tmp_path), flags)
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        f"step_{step:06d}.pt" for step in range(1, 5)
    ]


def test_what_a_killed_process_left_behind_is_cleared_away(toy, tmp_path):
    left_over = write(tmp_path / ".step_000007.pt.4711.tmp", b"half a checkpoint")
    do("train", *training(toy, tmp_path), "--max_steps 4")
    assert not left_over.exists()


def test_only_the_newest_checkpoints_are_kept(toy):
    assert [path.name for path in checkpoints_in(toy / "run")] == [
        "step_000100.pt",
        "step_000150.pt",
    ]
    assert load_checkpoint(toy / "run")["step"] == 150


@slow
def test_fsdp_writes_the_checkpoint_that_one_process_writes(spread):
    one, other = (load_checkpoint(spread / how) for how in ("one", "fsdp"))
    assert same_state(one, other, tolerance=1e-3)
    assert one.keys() == other.keys() and one["optimizer"]["step"] == other["optimizer"]["step"]
    model_from_checkpoint(other)


@slow
@pytest.mark.parametrize("before, after", [("fsdp", "one"), ("one", "fsdp")])
def test_a_run_goes_on_on_another_number_of_processes(toy, spread, tmp_path, before, after):
    shutil.copytree(spread / before, tmp_path / "run")
    (tmp_path / "run" / "step_000050.pt").unlink()
    spread_training(toy, tmp_path / "run", after, "--resume")
    rows = metrics(tmp_path / "run", "step", "train_loss", "valid_loss")
    close_rows(rows, metrics(spread / "one", "step", "train_loss", "valid_loss"))


def test_the_last_checkpoint_can_be_weights_only(toy, tmp_path):
    do("train", *training(toy, tmp_path), "--max_steps 6 --save_interval 2 --weights_only")
    states = [load_checkpoint(path) for path in checkpoints_in(tmp_path)]
    assert ["optimizer" in state for state in states] == [True, True, False]
    # Training cannot go on from the last one, so it does from the one before.
    rows = metrics(tmp_path, "step", "train_loss")
    do("train", *training(toy, tmp_path), "--max_steps 6 --save_interval 2 --resume")
    assert metrics(tmp_path, "step", "train_loss") == rows and "optimizer" in load_checkpoint(
        tmp_path
    )


SMALL_STATE = {"model": {"w": torch.arange(50.0)}, "model_config": {"vocab_size": 5}, "step": 3}


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    save_checkpoint(path := tmp_path_factory.mktemp("small") / "step_000003.pt", SMALL_STATE)
    return path.read_bytes()


def test_a_truncated_checkpoint_is_refused(small_checkpoint, tmp_path):
    for length in [*range(0, len(small_checkpoint), 50), len(small_checkpoint) - 1]:
        with pytest.raises(
            UserError, match="no checkpoint, or only a part|damaged|more than tensors"
        ):
            load_checkpoint(write(tmp_path / f"{length}.pt", small_checkpoint[:length]))


def test_a_flipped_byte_is_noticed_or_harmless(small_checkpoint, tmp_path):
    noticed = 0
    for place in range(0, len(small_checkpoint), 3):
        damaged = bytearray(small_checkpoint)
        damaged[place] ^= 0xFF
        path = write(tmp_path / f"{place}.pt", bytes(damaged))
        try:
            state = load_checkpoint(path)
        except UserError:
            noticed += 1
        else:  # padding, a date
            assert torch.equal(state["model"]["w"], SMALL_STATE["model"]["w"]), place
            assert {**state, "model": 0} == {**SMALL_STATE, "model": 0, "path": str(path)}, (
                place
            )
        path.unlink()
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
    error = refused(
        capsys, tmp_path, f"eval --checkpoint {tmp_path} --valid_tokens {toy / 'valid.bin'}"
    )
    assert "step_000001.pt" in error
    assert pickle.loads(pickle.dumps(Code(str(tmp_path / "executed")))) is not None
    assert (tmp_path / "executed").exists()  # as it would have been


def other_state(kind):
    state = {**SMALL_STATE, "model_config": dataclasses.asdict(TINY_MODEL)}
    if kind == "another shape":
        return {
            **state,
            "model": dict(
                tiny_model(config=dataclasses.replace(TINY_MODEL, d_ff=8)).named_parameters()
            ),
        }
    if kind == "another config":
        return {**state, "model_config": {"layers": 3}}
    return [1, 2]


@pytest.mark.parametrize("kind", ["another shape", "another config", "a list"])
def test_a_checkpoint_of_another_kind_is_refused(toy, tmp_path, capsys, kind):
    save_checkpoint(tmp_path / "step_000001.pt", other_state(kind))
    for command, flag, value in (
        ("eval", "--valid_tokens", toy / "valid.bin"),
        ("generate", "--prompt", "x"),
    ):
        assert "step_000001.pt" in refused(
            capsys, tmp_path, command, f"--checkpoint {tmp_path}", flag, value
        )


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("hello", "world")
    with pytest.raises(UserError, match=r"a\.pt"):
        load_checkpoint(tmp_path / "a.pt")


@slow
def test_a_full_disk_leaves_the_earlier_checkpoint(toy, tmp_path):
    flags = [*training(toy, tmp_path), "--save_interval 2"]
    do("train", *flags, "--max_steps 4")
    before = snapshot(tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(
        **process("train", *flags, "--max_steps 400 --resume"),
        preexec_fn=limit,
        capture_output=True,
    )
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert b"could not be written" in done.stderr and b"step_000004.pt" in done.stderr
    assert snapshot(tmp_path).keys() == before.keys() and load_checkpoint(tmp_path)["step"] == 4


# ======================================================================================
# 10. THE TRAINING LOOP
#
# A run is its flags and its data: when it was interrupted leaves no trace.
# ======================================================================================

EXACT = ["step", "train_loss", "valid_loss", "lr", "grad_norm"]


def wait_for(trainer, outdir, step):
    """Until the metrics of a training process have reached `step`."""
    path = outdir / "metrics.jsonl"
    while trainer.poll() is None:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended before step {step}")


@slow
def test_resumed_run_equals_unbroken_run(toy, tmp_path):
    flags = [
        "--max_steps 100 --d_model 48 --batch_size 16 --log_interval 3 "
        f"--valid_tokens {toy / 'valid.bin'} --eval_interval 40 --save_interval 10"
    ]
    assert run("train", *training(toy, tmp_path / "unbroken"), *flags).returncode == 0
    rng, broken = random.Random(6), tmp_path / "broken"
    for step, number, status in [
        (15, signal.SIGKILL, -9),
        (33, signal.SIGTERM, 143),
        (48, signal.SIGKILL, -9),
        (70, signal.SIGINT, 130),
    ]:
        trainer = subprocess.Popen(
            **process("train", *training(toy, broken), *flags, "--resume")
        )
        wait_for(trainer, broken, step)
        time.sleep(rng.random() / 20)
        trainer.send_signal(number)
        assert trainer.wait() == status
        newest = load_checkpoint(broken)["step"]
        assert newest >= step - 10 and (status < 0 or newest >= step)
    assert run("train", *training(toy, broken), *flags, "--resume").returncode == 0
    assert metrics(broken, *EXACT) == metrics(tmp_path / "unbroken", *EXACT)
    assert same_state(load_checkpoint(broken), load_checkpoint(tmp_path / "unbroken"))


@slow
def test_a_signal_under_torchrun_saves_and_ends_both_processes(toy, tmp_path):
    flags = [*training(toy, tmp_path), "--max_steps 5000 --fsdp --save_interval 1000"]
    trainer = subprocess.Popen(**process("train", *flags, processes=2), stderr=subprocess.PIPE)
    wait_for(trainer, tmp_path, 5)
    trainer.send_signal(signal.SIGTERM)
    _, error = trainer.communicate(timeout=60)
    assert trainer.returncode and b"terminate called" not in error
    assert load_checkpoint(tmp_path)["step"] >= 5


def test_a_finished_run_is_resumed_to_no_effect(toy, tmp_path):
    shutil.copytree(toy / "run", tmp_path / "run")
    before = snapshot(tmp_path)
    do("train", *training(toy, tmp_path / "run"), "--max_steps 150 --resume")
    assert snapshot(tmp_path) == before


def test_a_longer_run_goes_on_from_a_finished_one(toy, tmp_path):
    do("train", *training(toy, tmp_path), "--max_steps 8")
    do("train", *training(toy, tmp_path), "--max_steps 12 --resume")
    assert metrics(tmp_path, "step") == [(step,) for step in range(1, 13)]


def test_resume_starts_fresh_where_there_is_nothing_and_says_so(toy, tmp_path, capsys):
    argv = [word for word in training(toy, tmp_path) if word != "--quiet"]
    do("train", *argv, "--max_steps 4 --resume")
    assert "starting fresh" in capsys.readouterr().err and len(metrics(tmp_path, "step")) == 4


def test_a_changed_learning_rate_is_said(toy, tmp_path, capsys):
    do("train", *training(toy, tmp_path), "--max_steps 4")
    argv = [word for word in training(toy, tmp_path) if word != "--quiet"]
    do("train", *argv, "--max_steps 6 --lr 0.001 --resume")
    assert "lr 0.003 -> 0.001" in capsys.readouterr().err


def test_the_loss_is_the_mean_over_fixed_windows(toy):
    model = model_from_checkpoint(load_checkpoint(toy / "run"))
    tokens, T = TokenFiles([toy / "valid.bin"]), 64
    ids = torch.from_numpy(tokens.read(0, len(tokens)))
    with torch.no_grad():
        nats = [
            -model(ids[None, i : i + T])[0]
            .log_softmax(-1)
            .gather(1, ids[i + 1 : i + T + 1, None])
            .mean()
            for i in range(0, len(ids) - T, T)
        ]
    with World(DeviceConfig(device="cpu")) as world:
        for batch_size in (1, 3, 16, 1000):
            result = evaluate(model, tokens, T, batch_size, 0, world)
            assert result["valid_loss"] == pytest.approx(
                torch.stack(nats).mean().item(), rel=1e-6
            )
    assert len(nats) > 20 and len({round(x.item(), 3) for x in nats}) > 10


def test_eval_gives_the_figure_that_training_gave(toy, capsys):
    do(f"eval --checkpoint {toy / 'run'} --valid_tokens {toy / 'valid.bin'} --device cpu")
    shown = json.loads(capsys.readouterr().out)
    assert shown["valid_loss"] == pytest.approx(
        metrics(toy / "run", "valid_loss")[-1][0], rel=1e-6
    )
    assert shown["perplexity"] == pytest.approx(math.exp(shown["valid_loss"]))
    assert shown["bits_per_byte"] == pytest.approx(shown["nats_per_byte"] / math.log(2))


def test_eval_of_text_is_eval_of_its_tokens(toy, capsys):
    results = []
    for flag in ("--valid_tokens", "--text_path"):
        path = toy / ("valid.bin" if flag == "--valid_tokens" else "valid.txt")
        do(f"eval --checkpoint {toy / 'run'}", flag, f"{path} --device cpu --quiet")
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


def test_the_model_learns_all_but_what_cannot_be_known(toy):
    ids = np.fromfile(toy / "valid.bin", "<u2")
    shares = np.bincount(ids)[np.unique(ids)] / len(ids)
    unigram = -(shares * np.log(shares)).sum()
    floor = 200 * math.log(2 * 4 * 3 * 4) / len(ids)  # nats per token: 200 sentences of 96
    loss = metrics(toy / "run", "valid_loss")[-1][0]
    assert 0.95 * floor < loss < 1.3 * floor < unigram / 2
    assert metrics(toy / "run", "train_loss")[0][0] == pytest.approx(math.log(280), rel=0.03)


def test_a_run_that_is_not_finite_stops_and_names_the_step(toy, tmp_path, capsys):
    flags = [*training(toy, tmp_path), "--max_steps 100 --lr 1e+30 --save_interval 5"]
    assert main(shell_words(["train", *flags])) == 2
    error = capsys.readouterr().err
    assert re.search(r"not finite since step \d+", error) and error.count("\n") == 1
    assert 10 <= len(metrics(tmp_path, "step")) < 30
    assert all(p.isfinite().all() for p in load_checkpoint(tmp_path)["model"].values())


# ======================================================================================
# 11. OTHER LIBRARIES
#
# The exported folder, in the hands of the libraries it is meant for.
# ======================================================================================


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


def test_transformers_writes_the_same_greedy_text(exported, toy):
    ours, theirs, _ = exported
    ids = Tokenizer.load(toy / "tokenizer.json").encode("The blue")
    their_ids = list(ids)
    with torch.no_grad():
        for _ in range(50):
            their_ids.append(theirs(torch.tensor([their_ids])).logits[0, -1].argmax().item())
    assert [*ids, *generate(ours, ids, 50, temperature=0)] == their_ids


def test_transformers_stops_at_the_end_of_text(exported, toy):
    _, theirs, tokenizer = exported
    prompt = tokenizer("The red", return_tensors="pt")
    text = tokenizer.decode(theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    assert re.fullmatch(rf"The red \w+ \w+ the \w+\.\n{re.escape(END_OF_TEXT)}", text), text


@given(text=texts)
def test_autotokenizer_gives_the_same_ids(exported, toy, text):
    text += END_OF_TEXT + "The cow"
    assert exported[2](text)["input_ids"] == Tokenizer.load(toy / "tokenizer.json").encode(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exported_weights_have_the_type_asked_for(toy, tmp_path, dtype):
    from safetensors.torch import load_file

    do(f"export --checkpoint {toy / 'run'} --outdir {tmp_path} --dtype {dtype} --quiet")
    assert {str(w.dtype) for w in load_file(tmp_path / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }


def test_what_is_exported_can_be_read_back_to_the_bit(exported, toy):
    ours, back = load_checkpoint(toy / "run"), load_llama(toy / "exported")
    assert back["model_config"] == ours["model_config"]
    assert list(back["model"]) == list(ours["model"])
    for name, weight in ours["model"].items():
        assert torch.equal(weight, back["model"][name]), name


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A Llama with random weights, saved by transformers in two files."""
    import transformers

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("llama_folder")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=72, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=48, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )  # fmt: skip
    llama.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, llama.eval()


def test_a_llama_made_by_transformers_gives_the_same_logits_here(llama_folder):
    folder, llama = llama_folder
    ours = model_from_checkpoint(load_llama(folder))
    tokens = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), llama(tokens).logits, atol=1e-5)


def test_training_goes_on_from_a_llama_folder(toy, exported, tmp_path):
    steps = f"--max_steps 3 --lr 1e-9 --min_lr 0 --valid_tokens {toy / 'valid.bin'}"
    data = f"--train_tokens {toy / 'train.bin'} --outdir {tmp_path} --device cpu --quiet"
    do(f"train {data} --init_from {toy / 'exported'} --batch_size 4 --warmup_steps 1 {steps}")
    before, after = (metrics(path, "valid_loss")[-1][0] for path in (toy / "run", tmp_path))
    assert after == pytest.approx(before, rel=1e-4)
    assert (tmp_path / "tokenizer.json").read_bytes() == (toy / "tokenizer.json").read_bytes()


def test_eval_and_generate_read_a_llama_folder(toy, exported, capsys):
    for checkpoint in (toy / "run", toy / "exported"):
        do(f"eval --checkpoint {checkpoint} --text_path {toy / 'valid.txt'} --device cpu")
        do(f"generate --checkpoint {checkpoint} --prompt The --seed 3 --device cpu")
    lines = capsys.readouterr().out.splitlines()
    half = len(lines) // 2
    assert lines[:half] == lines[half:] and lines[0].startswith("{")


@pytest.mark.parametrize("change, words", [
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"model_type": "gpt2", "num_attention_heads": None, "hidden_size": None}, "'gpt2'"),
    ({"hidden_act": "gelu"}, "'gelu'"),
    ({"head_dim": 16}, "head_dim"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "'llama3'"),
    ({"num_hidden_layers": 4}, "model.layers.3"),
    ({"vocab_size": None}, "damaged"),
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


def test_a_llama_folder_can_be_exported_again(exported, toy, tmp_path):
    do(f"export --checkpoint {toy / 'exported'} --outdir {tmp_path} --quiet")
    for path in (toy / "exported").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_shape_that_contradicts_init_from_is_refused(toy, exported, tmp_path, capsys):
    flags = f"--train_tokens {toy / 'train.bin'} --outdir {tmp_path / 'run'}"
    argv = f"train {flags} --init_from {toy / 'exported'} --num_layers 7"
    assert "--num_layers is 7" in refused(capsys, tmp_path, argv)


def test_tensorboard_shows_what_metrics_say(toy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last in (10, 20):  # the second time resumed
        flags = f"--max_steps {last} --save_interval 5 --log_interval 2 --resume --tensorboard"
        do("train", *training(toy, tmp_path), flags)
    events = EventAccumulator(str(tmp_path)).Reload()
    expected = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            expected.setdefault(name, []).append((record["step"], pytest.approx(value)))
    del expected["step"]
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == points, name


# ======================================================================================
# 12. THE COMMAND LINE
#
# What a person types, and what a person mistypes.
# ======================================================================================


def test_a_seed_writes_the_same_text_again(toy, capsysbinary):
    outputs = []
    for seed in (1, 1, 2):
        do(
            f"generate --checkpoint {toy / 'run'} --prompt The --seed {seed} "
            "--max_new_tokens 30 --num_samples 3 --temperature 1 --device cpu"
        )
        outputs.append(capsysbinary.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].count(b"The ") >= 3 and END_OF_TEXT.encode() not in outputs[0]


def test_greedy_text_goes_on_as_the_corpus_does(toy, capsys):
    do(
        f"generate --checkpoint {toy / 'run'} --prompt 'The red'",
        "--temperature 0 --device cpu",
    )
    assert re.fullmatch(r"The red \w+ (sees|likes|helps) the \w+\.\n+", capsys.readouterr().out)


@slow
@pytest.mark.parametrize("prompt", ["", "Ünï"])
def test_the_prompt_comes_from_standard_input(toy, prompt):
    done = run(
        f"generate --checkpoint {toy / 'run'} --max_new_tokens 5 --seed 1 --device cpu",
        stdin=prompt.encode(),
    )
    assert done.returncode == 0 and done.stderr == b""
    assert (
        done.stdout.decode().startswith(prompt) and len(done.stdout) > len(prompt.encode()) + 1
    )


@slow
def test_a_prompt_that_is_no_utf8_is_no_traceback(toy):
    done = run(
        f"generate --checkpoint {toy / 'run'} --max_new_tokens 5 --device cpu", stdin=b"\xff!"
    )
    assert b"Traceback" not in done.stderr and done.returncode in (0, 2)


@slow
def test_the_command_line_works_from_end_to_end_in_processes(tmp_path):
    text = write(tmp_path / "text.txt", toy_text(1, 300))
    special = write(tmp_path / "special.txt", END_OF_TEXT)
    tokenizer, tokens, outdir = tmp_path / "t.json", tmp_path / "t.bin", tmp_path / "run"
    for argv in (
        [
            f"bpe-train --file_path {text} --vocab_size 300 --special_tokens_path {special} "
            f"--tokenizer_out_path {tokenizer}"
        ],
        [
            f"bpe-encode --dataset_path {text} --tokenizer_path {tokenizer} "
            f"--out_path {tokens} --append_eot"
        ],
        [
            f"train --train_tokens {tokens}",
            *TINY[:-1],
            f"--max_steps 5 --outdir {outdir} --tokenizer_path {tokenizer} --sample_interval 5",
        ],
    ):
        done = run(*argv)
        assert done.returncode == 0 and done.stdout == b"" and done.stderr, done.stderr
    done = run(f"eval --checkpoint {outdir} --text_path {text} --device cpu")
    assert json.loads(done.stdout)["valid_loss"] > 0
    assert run(f"generate --checkpoint {outdir} --prompt The --device cpu").stdout.startswith(
        b"The"
    )
    done = run(f"export --checkpoint {outdir} --outdir {tmp_path / 'exported'}")
    assert done.returncode == 0 and (tmp_path / "exported" / "model.safetensors").is_file()


TRAIN = (
    "train --train_tokens {toy}/train.bin --outdir {tmp}/run --max_steps 9 --warmup_steps 1 "
    "--device cpu --num_layers 1 --d_model 32 --num_heads 2 --batch_size 2 "
)
BPE = "bpe-train --vocab_size 280 --tokenizer_out_path {tmp}/out.json --file_path "
ENCODE = (
    "bpe-encode --tokenizer_path {toy}/tokenizer.json --out_path {tmp}/out.bin --dataset_path "
)
EVAL = "eval --device cpu --checkpoint "


@pytest.mark.parametrize("argv, words", [
    (BPE + "{tmp}/missing", "missing"),
    (BPE + "{tmp}/empty", "no text"),
    (BPE + "{toy}/train.txt --vocab_size 256 --special_tokens_path {toy}/special.txt", "257"),
    (BPE + "{toy}/train.txt --special_tokens_path {tmp}/missing", "missing"),
    (BPE + "{toy}/train.txt --special_tokens_path {tmp}/twice", "'<a>' is given 2 times"),
    (BPE + "{toy}/train.txt --special_tokens_path {tmp}/blank", "special token is empty"),
    (BPE + "{toy}/train.txt --special_tokens_path {tmp}/latin1", "latin1"),
    (BPE + "{toy}/train.txt --tokenizer_out_path {tmp}/empty/out.json", "empty"),
    (BPE + "{toy}/train.txt --tokenizer_out_path {tmp}", "{tmp}"),
    (ENCODE + "{tmp}/missing", "missing"),
    (ENCODE + "{tmp}/empty", "no text"),
    (ENCODE + "{toy}/valid.txt --tokenizer_path {tmp}/missing", "missing"),
    (ENCODE + "{toy}/valid.txt --out_path {tmp}/empty/out.bin", "empty"),
    (TRAIN + "--train_tokens {tmp}/missing", "missing"),
    (TRAIN + "--train_tokens {tmp}/empty --vocab_size 9", "empty holds 0 tokens"),
    (TRAIN + "--d_model 65", "divisible"),
    (TRAIN + "--d_model 48 --num_heads 16", "must be even"),
    (TRAIN + "--context_length 999999", "too few"),
    (TRAIN + "--context_length 3000 --valid_tokens {toy}/valid.bin", "valid.bin"),
    (TRAIN + "--vocab_size 279", "vocab_size is 279"),
    (TRAIN + "--tokenizer_path {tmp}/other.json", "another tokenizer"),
    (TRAIN + "--outdir {tmp}/empty/run", "empty"),
    (TRAIN + "--outdir {tmp}/used", "--resume"),
    (TRAIN + "--outdir {tmp}/used --resume --d_model 64", "d_model 32 -> 64"),
    (EVAL + "{tmp}/missing --valid_tokens {toy}/valid.bin", "missing"),
    (EVAL + "{tmp} --valid_tokens {toy}/valid.bin", "no checkpoint"),
    (EVAL + "{tmp}/empty --valid_tokens {toy}/valid.bin", "no checkpoint"),
    (EVAL + "{toy}/run", "--valid_tokens or --text_path"),
    (EVAL + "{toy}/run --valid_tokens {tmp}/missing", "missing"),
    (EVAL + "{toy}/run --valid_tokens {tmp}/high.bin", "id 300, outside the vocabulary"),
    (EVAL + "{toy}/run --text_path {tmp}/twice", "too few for a context_length"),
    ("generate --device cpu --prompt x --checkpoint {tmp}/lonely", "--tokenizer_path"),
    ("export --outdir {tmp}/x --checkpoint {tmp}", "no checkpoint"),
    ("export --outdir {tmp}/empty/x --checkpoint {toy}/run", "empty"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_writes_nothing(toy, tmp_path, capsys, argv, words):
    write(tmp_path / "empty", b"")
    write(tmp_path / "twice", "<a>\n<b>\n<a>\n")
    write(tmp_path / "blank", "<a>\n\n<b>\n")
    write(tmp_path / "latin1", b"<caf\xe9>\n")
    token_file(tmp_path / "high.bin", [300, *GOOD])
    tokenizer_from("other text", 44).save(tmp_path / "other.json")
    shutil.copytree(toy / "run", tmp_path / "used")
    (tmp_path / "lonely").mkdir()
    shutil.copy(toy / "run" / "step_000150.pt", tmp_path / "lonely")
    words = words.format(tmp=tmp_path)
    assert words in refused(capsys, tmp_path, *argv.format(toy=toy, tmp=tmp_path).split())


# The bundled stories, and the script that made them.


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
    assert (tmp_path / "stories.txt").read_text() == text and facts["bytes"] == len(
        text.encode()
    ) >= 50_000
    assert facts["nats"] == pytest.approx(witness.surprise) and witness.surprise > 1000
    assert facts["nats_per_byte"] == pytest.approx(witness.surprise / len(text), rel=1e-4)
    assert json.loads((tmp_path / "stories.txt.json").read_text()) == facts


def test_a_seed_tells_the_same_stories(make_stories, tmp_path):
    texts = []
    for number, seed in enumerate((1, 1, 2)):
        make_stories.write_stories(tmp_path / str(number), 0.01, seed)
        texts.append((tmp_path / str(number)).read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.skipif(not (DATA / "stories-train.txt").exists(), reason="no bundled stories")
def test_no_story_to_validate_on_is_in_the_training_stories():
    train, valid = (
        [
            s.strip()
            for s in (DATA / f"stories-{name}.txt").read_text().split(END_OF_TEXT)
            if s.strip()
        ]
        for name in ("train", "valid")
    )
    assert len(valid) > 100 and not set(train) & set(valid)
    assert (DATA / "special_tokens.txt").read_text().splitlines() == [END_OF_TEXT]


@pytest.mark.skipif(not (DATA / "stories-valid.txt").exists(), reason="no bundled stories")
def test_the_bundled_stories_are_what_the_script_writes(make_stories, tmp_path):
    megabytes, seed = make_stories.BUNDLED["stories-valid.txt"]
    make_stories.write_stories(tmp_path / "stories-valid.txt", megabytes, seed)
    for name in ("stories-valid.txt", "stories-valid.txt.json"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@slow
@pytest.mark.skipif(not (DATA / "stories-train.txt").exists(), reason="no bundled stories")
def test_the_demo_runs_every_command_it_shows(tmp_path):
    done = run(f"demo --outdir {tmp_path} --max_steps 20")
    assert done.returncode == 0, done.stderr
    shown = re.findall(rb"^\$ .*scratchformer.py (\S+)", done.stderr, re.M)
    assert shown == [b"bpe-train", b"bpe-encode", b"bpe-encode", b"train", b"eval", b"generate"]
    result, story = done.stdout.split(b"\n", 1)
    assert json.loads(result)["floor_nats_per_byte"] < json.loads(result)["nats_per_byte"]
    assert story.startswith(b"Once")
    again = run(f"demo --outdir {tmp_path} --max_steps 2 --quiet")  # its own may be replaced
    assert again.returncode == 0 and again.stderr == b""
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["step_000002.pt"]


def test_the_demo_leaves_alone_what_it_did_not_make(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "step_000007.pt", "somebody's work")
    assert "no demo made" in refused(capsys, tmp_path, f"demo --outdir {tmp_path}")


def test_a_floor_is_stated_for_one_file_only(tmp_path):
    for name in "ab":
        token_file(tmp_path / name, [1, 2, 3], {"vocab_size": 5, "floor_nats_per_byte": 0.5})
    assert TokenFiles([tmp_path / "a"]).floor == 0.5
    assert TokenFiles([tmp_path / "a", tmp_path / "b"]).floor is None


# ======================================================================================
# THE README AND THE CHAPTERS
#
# Commands in the README parse as they stand, links to lines point at what they name, and all
# chapters open alike.
# ======================================================================================

README = FILE.parent / "README.md"
README = README.read_text(encoding="utf-8") if README.is_file() else ""
with_readme = pytest.mark.skipif(not README, reason="no README.md beside the file")
LINES = FILE.read_text(encoding="utf-8").splitlines()
HEADS = {m[1]: number for number, line in enumerate(LINES, 1)
         if (m := re.fullmatch(r"# (\d+)\. [A-Z ,-]+", line))}  # fmt: skip


def readme_commands():
    """The flags of every scratchformer.py command in the README's indented blocks."""
    text = re.sub(r" \\\n +", " ", README)
    blocks = re.findall(r"^ {4,}(.*scratchformer\.py .*)$", text, re.M)
    return [shlex.split(line.split("scratchformer.py ", 1)[1]) for line in blocks]


@pytest.mark.parametrize("argv", readme_commands(), ids=" ".join)
def test_a_command_of_the_readme_parses(argv):
    scratchformer.parse_flags(argv[0], scratchformer.COMMANDS[argv[0]], argv[1:])


@with_readme
def test_the_readme_shows_every_command():
    assert {argv[0] for argv in readme_commands()} == set(scratchformer.COMMANDS)


@with_readme
def test_links_of_the_readme_point_at_the_chapters_they_name():
    links = re.findall(r"\[(\d+)\. [^]]*\]\(scratchformer\.py#L(\d+)\)", README)
    assert {number: int(line) for number, line in links} == HEADS


@with_readme
def test_files_the_readme_shows_are_there():
    for path in re.findall(r"\]\(((?:data/|test_|scratch|pyproject)[^)#]*)", README):
        assert (FILE.parent / path).is_file(), path


@pytest.mark.parametrize("number", HEADS)
def test_every_chapter_opens_and_ends_alike(number):
    end = HEADS.get(str(int(number) + 1), len(LINES))
    chapter = "\n".join(LINES[HEADS[number] : end])
    fields = ["Question", "Takes", "Gives", "Idea", "Source", "Change it", "Checked by"]
    places = [re.search(rf"^# {field:11} \S", chapter, re.M).start() for field in fields]
    assert places == sorted(places)
    assert f"# Checked by  test_scratchformer.py, chapter {number}\n" in chapter
    assert "\n# Exercises\n# 1. " in chapter and ">>> " in chapter


# ======================================================================================
# PEERS: measured, printed, never asserted; left out of the normal run
#
#   uv run pytest -m peers -s
#   SCRATCHFORMER_CORPUS=book.txt uv run pytest -m peers -s      your own text as well
#
# Each line is the wall time of a whole process: start, read the text, work, write the file.
# The peers get what makes them fastest: text cut into megabytes so that all threads work.
# ======================================================================================

PEER_SETUP = """
import json, os, sys
text_path, tokenizer_path, out_path, vocab_size = *sys.argv[1:4], int(sys.argv[4])
def parts():
    text, start = open(text_path, encoding="utf-8").read(), 0
    while start < len(text):
        end = text.find("<|endoftext|>", start + (1 << 20)) % (len(text) + 1)
        yield text[start:end]
        start = end
"""
PEERS = {
    ("train", "tokenizers"): """
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.train([text_path], trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
tokenizer.save(out_path)
""",
    ("train", "rustbpe"): """
import rustbpe
tokenizer, pattern = rustbpe.Tokenizer(), sys.argv[5]
tokenizer.train_from_iterator(
    (story for part in parts() for story in part.split("<|endoftext|>")),
    vocab_size - 1, pattern=pattern)
json.dump([[list(token), rank] for token, rank in tokenizer.get_mergeable_ranks()],
    open(out_path, "w"))
""",
    ("encode", "tiktoken"): """
import numpy, tiktoken
model = json.load(open(tokenizer_path, encoding="utf-8"))
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
special = {entry["content"]: entry["id"] for entry in model["added_tokens"]}
ranks = {bytes(map(byte_of.get, token)): i for token, i in model["model"]["vocab"].items()
         if token not in special}
encoding = tiktoken.Encoding(
    "ours", pat_str=sys.argv[5], mergeable_ranks=ranks, special_tokens=special)
with open(out_path, "wb") as out:
    for ids in encoding.encode_batch(
            list(parts()), num_threads=os.cpu_count(), allowed_special="all"):
        out.write(numpy.array(ids, "<u2").tobytes())
""",
    ("encode", "tokenizers"): """
import numpy, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(tokenizer_path)
with open(out_path, "wb") as out:
    for encoding in tokenizer.encode_batch_fast(list(parts()), add_special_tokens=False):
        out.write(numpy.array(encoding.ids, "<u2").tobytes())
""",
}


def seconds_of(argv) -> float:
    start = time.perf_counter()
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_peers(corpus: Path, folder: Path, vocab_size: int) -> None:
    """Print how long training and encoding take here and elsewhere, medians of three."""
    ours, size = folder / "ours.json", corpus.stat().st_size / 1e6
    special = folder / "special"
    special.write_text(END_OF_TEXT + "\n")
    python = [sys.executable, str(FILE)]
    commands = {
        ("train", "scratchformer"): [
            *python, "bpe-train", "--file_path", corpus, "--vocab_size", str(vocab_size),
            "--special_tokens_path", special, "--tokenizer_out_path", ours],
        ("encode", "scratchformer"): [
            *python, "bpe-encode", "--dataset_path", corpus, "--tokenizer_path", ours,
            "--out_path", folder / "ours.bin"],
    }  # fmt: skip
    for (work, name), code in PEERS.items():
        if importlib.util.find_spec(name):
            commands[work, name] = [
                sys.executable, "-c", PEER_SETUP + code, corpus, ours,
                folder / f"{name}.out", str(vocab_size), PRETOKEN_PATTERN]  # fmt: skip
    times = {key: [] for key in commands}
    for _ in range(3):  # in turns, so that a noisy minute hurts all alike
        for key, argv in commands.items():
            if not (key == ("encode", "tokenizers") and times[key]):  # minutes; once is enough
                times[key].append(seconds_of(list(map(str, argv))))
    print(f"\n{corpus.name}, {size:.1f} MB, {vocab_size} entries, {os.cpu_count()} cores")
    for (work, name), taken in sorted(times.items(), reverse=True):
        middle = sorted(taken)[len(taken) // 2]
        mine = sorted(times[work, "scratchformer"])[1]
        print(f"  {work:7}{name:14}{middle:8.2f} s {size / middle:8.1f} MB/s"
              f"   {middle / mine:5.2f} x ours")  # fmt: skip
    assert (folder / "ours.bin").read_bytes() == (folder / "tiktoken.out").read_bytes()


@pytest.mark.peers
def test_speed_against_peers(make_stories, tmp_path):
    corpora = [Path(path) for path in os.environ.get("SCRATCHFORMER_CORPUS", "").split()]
    stories = tmp_path / "stories.txt"
    make_stories.write_stories(stories, 200, 0)
    for corpus in [*corpora, stories]:
        measure_peers(corpus, tmp_path, 10_000)


# The same model as `transformers` builds it, on this machine's device: `train --compile` of
# the README's shapes on a GPU, the demo's on a CPU. SCRATCHFORMER_SHAPES="small medium"
# chooses some. Both steps take the same batches, clip, and use the fused AdamW.

STEP_SHAPES = {  # layers, d_model, heads, d_ff, context, sequences, vocabulary
    "demo": (2, 128, 4, 256, 512, 4, 1536),
    "small": (8, 768, 16, 2048, 512, 64, 50304),
    "medium": (24, 1024, 16, 2752, 1024, 8, 50304),
    "medium_b32": (24, 1024, 16, 2752, 1024, 32, 50304),
}


def chosen_shapes(cuda, cpu):
    names = cuda if torch.cuda.is_available() else cpu
    return os.environ.get("SCRATCHFORMER_SHAPES", names).split()


def their_llama(config, like=None):
    """The Llama of transformers that has our shape, and the weights of `like`."""
    transformers = pytest.importorskip("transformers")
    content = scratchformer.llama_config(config, None, "float32")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**content))
    if like:
        theirs.load_state_dict(llama_weights(like.state_dict(), config.num_heads))
    return theirs


def milliseconds(step, count):
    """The median time of `step()`, after two thirds as many to warm up."""
    times = []
    for _ in range(count + count * 2 // 3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[-count:])[count // 2] * 1e3


def measure_step(kind, shape, compiled):
    """Milliseconds and peak GiB of one training step, ours or theirs."""
    layers, d_model, heads, d_ff, T, B, V = STEP_SHAPES[shape]
    config = ModelConfig(V, T, layers, d_model, heads, d_ff)
    world = World(DeviceConfig(), ProcessConfig(compile=compiled))
    torch.compiler.reset()
    gc.collect()  # the last model, so that it does not count as this one's memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if kind == "ours":
        with world.device:
            model = Transformer(config)
        world.shard(model)
        loss_of = world.loss_function(model)
    else:
        model = their_llama(config).to(world.device)

        def loss_of(x, y):
            with world.precision():
                logits = model(input_ids=x, use_cache=False).logits
            return F.cross_entropy(logits.view(-1, V).float(), y.view(-1))

        loss_of = torch.compile(loss_of) if compiled else loss_of
    stepper = Stepper(model, LearningConfig(), world.device, False)
    tokens = torch.randint(V, (B, T + 1), device=world.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def ours():
        loss_of(x, y).backward()
        stepper.step()

    def theirs():
        loss_of(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.optimizer.step()
        stepper.optimizer.zero_grad(set_to_none=True)

    taken = milliseconds(ours if kind == "ours" else theirs, 30)
    gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
    return taken, gib


@pytest.mark.peers
def test_training_step_against_peers():
    torch.set_num_threads(THREADS)
    for shape in chosen_shapes("small medium medium_b32", "demo"):
        for compiled in [True] if torch.cuda.is_available() else [False, True]:
            for kind in ["transformers", "ours"] * (1 if torch.cuda.is_available() else 3):
                taken, gib = measure_step(kind, shape, compiled)
                tokens = STEP_SHAPES[shape][4] * STEP_SHAPES[shape][5] / taken * 1e3
                print(f"\n  {shape:11}{'compiled' if compiled else 'eager':9}{kind:13}"
                      f"{taken:8.2f} ms {tokens:10,.0f} tok/s {gib:6.2f} GiB", end="")


@pytest.mark.peers
def test_generation_against_peers():
    """512 tokens after 16, the likeliest each time; the weights and the texts are the same."""
    torch.set_num_threads(THREADS)
    world = World(DeviceConfig())
    for shape in chosen_shapes("small", "small"):
        layers, d_model, heads, d_ff, _, _, V = STEP_SHAPES[shape]
        config = ModelConfig(V, 1024, layers, d_model, heads, d_ff)
        model = Transformer(config).eval()
        theirs = their_llama(config, model).eval()
        angles = copy.deepcopy(theirs.model.rotary_emb)  # what bfloat16 would spoil
        theirs = theirs.to(world.device, world.dtype)
        theirs.model.rotary_emb = angles.to(world.device)
        state = {"model": model.state_dict(), "model_config": vars(config), "path": "memory"}
        model = model_from_checkpoint(state, world.device, world.dtype)
        use_all_cores(model)
        prompt = list(range(100, 116))
        given, texts = torch.tensor([prompt], device=world.device), {}

        def ours(model=model, prompt=prompt, texts=texts):
            cuda = world.device.type == "cuda"
            texts["ours"] = list(generate(model, prompt, 512, temperature=0, record=cuda))

        @torch.no_grad()
        def peer(theirs=theirs, given=given, texts=texts):
            out = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                  max_new_tokens=512, min_new_tokens=512, pad_token_id=0)
            texts["transformers"] = out[0, 16:].tolist()

        for name, run in [("transformers", peer), ("ours", ours)] * 2:
            print(f"\n  {shape} {name:13}{512e3 / milliseconds(run, 3):8.1f} tokens/s", end="")
        same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"]))
        print(f"\n  {same} of 512 ids alike", end="")
