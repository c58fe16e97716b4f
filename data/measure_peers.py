"""Measure Scratchformer beside other tools, in turns: python data/measure_peers.py [WHAT ...]

WHAT is "tokenizing" (whole processes: start, read the text, work, write the file), "steps" (one
training step, beside the Llama of transformers) or "generation"; all three by default. The
peers get what makes them fastest. SCRATCHFORMER_CORPUS="a.txt b.txt" adds your own texts,
SCRATCHFORMER_SHAPES="small medium" chooses models. Nothing is asserted, except that outputs are
equal.
"""

import copy
import gc
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import make_stories

import scratchformer
from scratchformer import (
    END_OF_TEXT,
    PRETOKEN_PATTERN,
    GradScaler,
    LlamaConfig,
    ProcessConfig,
    Transformer,
    build_model,
    generate_texts,
    gradient_norm,
    local_params,
    make_autocast,
    model_from_checkpoint,
    pick_device,
    pick_dtype,
    take_local_gradients,
    to_hf,
)

FILE = Path(scratchformer.__file__)

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


def measure_tokenizing() -> None:
    corpora = [Path(path) for path in os.environ.get("SCRATCHFORMER_CORPUS", "").split()]
    with tempfile.TemporaryDirectory() as folder:
        stories = Path(folder) / "stories.txt"
        make_stories.write_stories(stories, 200, 0)
        for corpus in [*corpora, stories]:
            measure_peers(corpus, Path(folder), 10_000)


# The same model as `transformers` builds it, on this machine's device: `train --compile` of
# the README's shapes on a GPU, the demo's on a CPU. SCRATCHFORMER_SHAPES="small medium"
# chooses some. Both steps take the same batches, clip, and use the fused AdamW.

STEP_SHAPES = {  # layers, d_model, heads, d_ff, context, sequences, vocabulary
    "demo": (1, 128, 4, 256, 512, 4, 1536),
    "small": (8, 768, 16, 2048, 512, 64, 50304),
    "medium": (24, 1024, 16, 2752, 1024, 8, 50304),
    "medium_b32": (24, 1024, 16, 2752, 1024, 32, 50304),
}


def chosen_shapes(cuda, cpu):
    names = cuda if torch.cuda.is_available() else cpu
    return os.environ.get("SCRATCHFORMER_SHAPES", names).split()


def their_llama(config, like=None):
    """The Llama of transformers that has our shape, and the weights of `like`."""
    import transformers

    content = scratchformer.config_to_hf(config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**content))
    if like:
        theirs.load_state_dict(to_hf(like.state_dict(), config))
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
    config = LlamaConfig(V, T, layers, d_model, heads, d_ff)
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    autocast = make_autocast(device, dtype)
    torch.compiler.reset()
    gc.collect()  # the last model, so that it does not count as this one's memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if kind == "ours":
        model = build_model(config, 1, device, dtype, ProcessConfig(compile=compiled))
        loss_of = model
    else:
        model = their_llama(config).to(device)

        def loss_of(x, y):
            logits = model(input_ids=x, use_cache=False).logits
            return F.cross_entropy(logits.view(-1, V).float(), y.view(-1))

        loss_of = torch.compile(loss_of) if compiled else loss_of
    params, scaler = local_params(model), GradScaler(device, torch.float32)
    optimizer = torch.optim.AdamW(params.values(), fused=True)
    tokens = torch.randint(V, (B, T + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def ours():
        with autocast:
            loss = loss_of(x, y)
        loss.backward()
        take_local_gradients(params)
        scaler.step(optimizer, gradient_norm(params) / scaler.loss_scale, 1.0)
        optimizer.zero_grad()

    def theirs():
        with autocast:
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    taken = milliseconds(ours if kind == "ours" else theirs, 30)
    gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
    return taken, gib


def measure_steps() -> None:
    for shape in chosen_shapes("small medium medium_b32", "demo"):
        for compiled in [True] if torch.cuda.is_available() else [False, True]:
            for kind in ["transformers", "ours"] * (1 if torch.cuda.is_available() else 3):
                taken, gib = measure_step(kind, shape, compiled)
                tokens = STEP_SHAPES[shape][4] * STEP_SHAPES[shape][5] / taken * 1e3
                print(f"\n  {shape:11}{'compiled' if compiled else 'eager':9}{kind:13}"
                      f"{taken:8.2f} ms {tokens:10,.0f} tok/s {gib:6.2f} GiB", end="")


def measure_generation() -> None:
    """512 tokens after 16, the likeliest each time; the weights and the texts are the same."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    for shape in chosen_shapes("small", "small"):
        layers, d_model, heads, d_ff, _, _, V = STEP_SHAPES[shape]
        config = LlamaConfig(V, 1024, layers, d_model, heads, d_ff)
        model = Transformer(config).eval()
        theirs = their_llama(config, model).eval()
        angles = copy.deepcopy(theirs.model.rotary_emb)  # what bfloat16 would spoil
        theirs = theirs.to(device, dtype)
        theirs.model.rotary_emb = angles.to(device)
        state = {"model": model.state_dict(), "model_config": vars(config), "path": "memory"}
        model = model_from_checkpoint(state, device, dtype)
        prompt = list(range(100, 116))
        given, texts = torch.tensor([prompt], device=device), {}

        def ours(model=model, given=given, texts=texts):
            texts["ours"] = sum(generate_texts(model, given, 512, temperature=0), [])

        @torch.no_grad()
        def peer(theirs=theirs, given=given, texts=texts):
            out = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                  max_new_tokens=512, min_new_tokens=512, pad_token_id=0)
            texts["transformers"] = out[0, 16:].tolist()

        for name, run in [("transformers", peer), ("ours", ours)] * 2:
            print(f"\n  {shape} {name:13}{512e3 / milliseconds(run, 3):8.1f} tokens/s", end="")
        same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"]))
        print(f"\n  {same} of 512 ids alike", end="")


if __name__ == "__main__":
    kinds = {"tokenizing": measure_tokenizing, "steps": measure_steps,
             "generation": measure_generation}  # fmt: skip
    for what in sys.argv[1:] or kinds:
        kinds[what]()
    print()
