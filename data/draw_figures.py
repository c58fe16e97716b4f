"""Draw the figures of scratchformer.py as SVGs, from what its own functions compute.

    python data/draw_figures.py              all, into data/figures: two minutes on a CPU
    python data/draw_figures.py rope muon    only these

Two of them, attention and loss, need a trained model, which takes nearly all of the time. Two
more, speed and muon_time, show measurements of data/results.md. A test redraws the others and
compares them with the files: if it fails after a change of scratchformer.py, run this again.

All lines and text have the color of the text around the figure, so a page that includes the
SVG sets `color` and, if it likes, the variables --accent and --accent2. Shown by itself, a
figure has colors of its own, light or dark.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
import scratchformer as sf

STYLE = """
svg.figure:root { color: #1f2328; background: #fff }
@media (prefers-color-scheme: dark) { svg.figure:root {
  color: #e6edf3; background: #0d1117; --accent: #6cb0ff; --accent2: #f0a070 } }
svg.figure { max-width: 100%; height: auto }
svg.figure text { font: 13px sans-serif; fill: currentColor }
svg.figure .code { font-family: monospace }
svg.figure .small { font-size: 11px }
svg.figure .bold { font-weight: bold }
svg.figure .mid { text-anchor: middle }
svg.figure .end { text-anchor: end }
svg.figure .line { fill: none; stroke: currentColor; stroke-width: 1.2 }
svg.figure .thick { stroke-width: 3 }
svg.figure .dash { stroke-dasharray: 4 3 }
svg.figure .dots { stroke-dasharray: 1.5 4; stroke-linecap: round }
svg.figure .faint { opacity: .5 }
svg.figure .one { stroke: var(--accent, #1f6feb) }
svg.figure .two { stroke: var(--accent2, #b5541c) }
svg.figure .shaded { fill: var(--accent, #1f6feb); fill-opacity: .3 }
svg.figure .pale { fill: currentColor; fill-opacity: .1 }
svg.figure .ink { fill: currentColor }
svg.figure .cell { fill: currentColor; stroke: currentColor; stroke-opacity: .4 }
"""
RING, DOT = "line two", "line one ink"  # styles of circles


def number(x: float) -> str:
    """`x` with at most two decimals, and never "-0"."""
    return f"{round(float(x), 2) + 0:g}"


class Drawing:
    """An SVG, 640 units wide. A `style` is one or more of the classes above."""

    def __init__(self, title: str, height: int):
        self.title, self.height, self.parts = title, height, list[str]()

    def add(self, element: str, style: str, content: Any = "", **attributes: Any) -> None:
        values = {k.replace("_", "-"): v if isinstance(v, str) else number(v)
                  for k, v in attributes.items()}
        start = " ".join([element, *(f'{k}="{v}"' for k, v in values.items())])
        part = f'<{start} class="{style}">{escape(str(content), quote=False)}</{element}>'
        if part not in self.parts:  # so that a loop may repeat a label
            self.parts.append(part)

    def text(self, x: float, y: float, content: Any, style: str = "", **more: Any) -> None:
        self.add("text", style, content, x=x, y=y, **more)

    def box(
        self, x: float, y: float, width: float, height: float, style: str = "line", **more: Any
    ) -> None:
        self.add("rect", style, x=x, y=y, width=width, height=height, **more)

    def circle(self, x: float, y: float, r: float, style: str = "line") -> None:
        self.add("circle", style, cx=x, cy=y, r=r)

    def path(self, points: Iterable[Sequence[float]], style: str = "line") -> None:
        """A line from point to point."""
        self.add("path", style, d="M" + "L".join(" ".join(map(number, xy)) for xy in points))

    def arrow(self, *points: Sequence[float], style: str = "line") -> None:
        """A line from point to point, with a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        length = math.dist((x0, y0), (x, y))
        a, b = (x - x0) / length, (y - y0) / length  # the direction of the end
        self.path(points, style)
        self.path([(x - 7 * a + 3.5 * b, y - 7 * b - 3.5 * a), (x, y),
                   (x - 7 * a - 3.5 * b, y - 7 * b + 3.5 * a)], style)

    def key(self, x: float, y: float, style: str, content: str) -> None:
        """An entry of a legend: a dot if `style` is one of a dot, else a line."""
        if style in (RING, DOT):
            self.circle(x + 34, y - 4, 3, style)
        else:
            self.path([(x, y - 4), (x + 40, y - 4)], style)
        self.text(x + 50, y, content)

    def axes(
        self, top: float, height: float, x_ticks: Sequence[float], y_ticks: Sequence[float],
        x_label: str, y_label: str, log: bool = False,
    ) -> Callable[[float, float], tuple[float, float]]:
        """Axes from the first tick to the last. Returns the function from numbers to places."""
        left, width, bottom = 64, 556, top + height
        scale = math.log if log else float
        low, high = scale(y_ticks[0]), scale(y_ticks[-1])

        def place(x: float, y: float) -> tuple[float, float]:
            return (left + width * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
                    bottom - height * (scale(y) - low) / (high - low))

        self.path([(left, top), (left, bottom), (left + width, bottom)])
        for x, label in [(place(tick, y_ticks[0])[0], f"{tick:,g}") for tick in x_ticks]:
            self.path([(x, bottom), (x, bottom + 4)])
            self.text(x, bottom + 18, label, "mid")
        for y, label in [(place(x_ticks[0], tick)[1], f"{tick:g}") for tick in y_ticks]:
            self.path([(left - 4, y), (left, y)])
            self.text(left - 8, y + 4, label, "end")
        self.text(left + width / 2, bottom + 36, x_label, "mid")
        self.text(left - 30, top - 14, y_label)
        return place

    def finish(self, caption: str) -> str:
        """The text of the SVG."""
        size = f'width="640" height="{self.height}" viewBox="0 0 640 {self.height}"'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" role="img" {size}>',
            f"<title>{escape(self.title)}</title>", f"<desc>{escape(caption)}</desc>",
            f"<style>{STYLE}</style>", *self.parts, "</svg>", ""])


# Text and data
# -------------


def merges() -> str:
    """Chapter 2: five words, and the four merges of the example."""
    drawing = Drawing("Four merges", 236)
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3, b"slow": 1}
    tokens_of = {word: [bytes([byte]) for byte in word] for word in words}
    drawing.text(30, 24, "count", "small end")
    for row, count in enumerate(words.values()):
        drawing.text(30, 81 + 34 * row, count, "end")
    for column, pair in enumerate([None, *sf.learn_merges_naive(words, 4)]):
        x0 = 46 + 120 * column
        if pair is None:
            drawing.text(x0, 24, "start: bytes", "bold")
        else:
            count = sum(n for word, n in words.items()
                        for found in zip(tokens_of[word], tokens_of[word][1:]) if found == pair)
            left, right = (token.decode() for token in pair)
            drawing.text(x0, 24, f"merge {left} + {right}", "bold")
            drawing.text(x0, 44, f"occurs {count} times", "small")
        for row, (word, before) in enumerate(tokens_of.items()):
            x, y = x0, 64 + 34 * row
            tokens_of[word] = after = sf.merge_pair(before, pair) if pair else before
            faint = " faint" if pair and after == before else ""
            for token in after:
                new = pair and token == b"".join(pair)
                width = 8 * len(token) + 7
                drawing.box(x, y, width, 25, "line shaded one" if new else "line" + faint)
                drawing.text(x + width / 2, y + 17, token.decode(), "code mid" + faint)
                x += width + 2
    return drawing.finish(
        "Five words, each with how often it occurs. Each merge joins the most frequent pair of "
        "adjacent tokens, counted over all words; the new token is shaded, and words that stay "
        "as they were are pale.")


def windows() -> str:
    """Chapter 4: the windows of two epochs, and the first batch."""
    drawing, N, T, B = Drawing("Windows over a stream of tokens", 336), 29, 5, 2
    tokens = np.arange(N)  # each token is its own position
    per_epoch = len(sf.shuffle_windows(0, 0, N, T))
    drawing.text(8, 20, f"The corpus: {N} tokens, by position", "bold")
    for position in range(N):
        drawing.box(8 + 21.5 * position, 30, 21.5, 24)
        drawing.text(18.8 + 21.5 * position, 46, position, "small mid")
    for epoch in range(2):
        y, numbers = 70 + 62 * epoch, range(epoch * per_epoch, (epoch + 1) * per_epoch)
        drawing.text(8, y + 14, f"Epoch {epoch}: windows {numbers[0]} to {numbers[-1]}; the "
                     "numbers give the order in which training sees them", "bold")
        for i in numbers:
            start = sf.get_batch(tokens, T, 0, range(i, i + 1))[0][0, 0].item()
            style = "line shaded one" if i < B else "line"
            drawing.box(9.5 + 21.5 * start, y + 22, 21.5 * T - 3, 24, style)
            drawing.text(8 + 21.5 * (start + T / 2), y + 38, f"window {i}", "mid small")
            below = y + 50 + 4 * (start // T % 2)  # side by side, so that none hides another
            drawing.path([(10 + 21.5 * start, below), (6 + 21.5 * (start + T + 1), below)])
    drawing.text(8, 204, f"Box: the inputs, T = {T} tokens. Line: the whole window, T + 1 "
                 "tokens, for the last target.", "small")
    drawing.text(8, 238, f"Step 0: a batch of B = {B} windows", "bold")
    inputs, targets = sf.get_batch(tokens, T, 0, range(B))
    for x, name, ids, style in ((90, "inputs", inputs, "line shaded one"),
                                (350, "targets", targets, "line")):
        drawing.text(x, 260, f"{name} (B, T)")
        for (row, column), position in np.ndenumerate(ids.numpy()):
            drawing.text(8, 284 + 32 * row, f"window {row}")
            drawing.box(x + 40 * column, 266 + 32 * row, 40, 26, style)
            drawing.text(x + 20 + 40 * column, 284 + 32 * row, position, "mid")
    return drawing.finish(
        f"A window has T + 1 = {T + 1} tokens: T inputs, and the target of each, the token "
        "after it. The inputs of all windows lie end to end, from an offset that differs "
        f"between epochs; their order is random. The first {B} (shaded) are the first batch.")


# The Transformer
# ---------------


def block_shapes() -> dict[str, str]:
    """The shape of what leaves each part of a model and, after "to ", of what enters it.

    In this model every letter has a size of its own, so that a size says which letter it is.
    """
    B, T, H, G, K, F, V = 5, 3, 6, 2, 4, 7, 11
    letters = {B: "B", T: "T", H: "H", G: "G", K: "K", H * K: "D", F: "F", V: "V"}
    config = sf.ModelConfig(V, T, 1, H * K, H, F, num_kv_heads=G)
    model, shapes = sf.Transformer(config), dict[str, str]()

    def note(name: str, module: torch.nn.Module, args: tuple, out: Tensor) -> None:
        for key, x in ("to " + name, args[0]), (name, out):
            shapes[key] = f"({', '.join(letters.get(size, '?') for size in x.shape)})"

    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(note, name))
    model(torch.zeros(B, T, dtype=torch.int64))
    shapes["logits"] = shapes.pop("")  # the name of the model itself
    return shapes


def block() -> str:
    """Chapter 5: the residual stream and what a block adds to it."""
    drawing, shape = Drawing("The residual stream and a block", 458), block_shapes()

    def label(x: float, y: float, name: str) -> None:
        drawing.text(x, y, shape.get(name, name), "code small mid")

    def flow(names: str, *points: Sequence[float]) -> None:
        """An arrow with what flows there: above the line and, after semicolons, below it."""
        drawing.arrow(*points)
        (x0, _), (x, y) = points[-2:]
        for i, name in enumerate(names.split("; ")):
            label((x0 + x) / 2, y - 8 + 14 * i + 10 * (i > 0), name)

    for y, height, what in ((98, 136, "Attention looks at earlier tokens"),
                            (260, 132, "The MLP works on each position separately")):
        drawing.box(96, y, 538, height, "line dash faint")
        drawing.text(110, y + 72, what, "bold")
    for left, y, width, *lines in (
        (30, 60, 88, "embedding"), (114, 126, 76, "RMSNorm"), (264, 126, 108, "W_q, W_k, W_v"),
        (480, 126, 120, "q, k: RMSNorm,", "then RoPE"), (260, 204, 84, "W_output"),
        (460, 204, 160, "each of H heads:", "softmax(q kᵀ / √K) v"),
        (114, 292, 76, "RMSNorm"), (264, 292, 108, "W_gate, W_up"),
        (480, 292, 120, "silu(gate) * up"), (260, 362, 84, "W_down"),
    ):
        drawing.box(left, y - 20, width, 40, "line pale")
        for i, line in enumerate(lines):
            drawing.text(left + width / 2, y + 5 + 16 * i - 8 * (len(lines) - 1), line, "mid")
    flow("", (74, 24), (74, 40))
    flow("", (74, 126), (114, 126))
    flow("blocks.0.attention_norm", (190, 126), (264, 126))
    key, query = "blocks.0.attention.key_norm", "blocks.0.attention.query_norm"
    shape["q"] = "q " + shape[query]
    flow(f"q; k, v each; {key}", (372, 126), (480, 126))
    flow("", (540, 146), (540, 184))
    flow(query, (460, 204), (344, 204))
    flow("blocks.0.attention.output", (260, 204), (86, 204))
    flow("", (74, 292), (114, 292))
    flow("blocks.0.mlp_norm", (190, 292), (264, 292))
    flow("gate, up each; to blocks.0.mlp.down", (372, 292), (480, 292))
    flow("to blocks.0.mlp.down", (540, 312), (540, 362), (344, 362))
    flow("blocks.0.mlp.down", (260, 362), (86, 362))
    for top, bottom in ((80, 193), (215, 351), (373, 408)):  # the stream
        drawing.path([(74, top), (74, bottom)], "line thick one")
    drawing.arrow((74, 408), (74, 424), style="line thick one")
    for y in (204, 362):
        drawing.circle(74, y, 11)
        drawing.text(74, y + 5, "+", "mid bold")
    drawing.text(74, 18, "token ids", "mid")
    drawing.text(36, 444, "more blocks,  then RMSNorm and lm_head: a logit per possible token,")
    for x, y, name in ((140, 18, "to embedding"), (152, 89, "embedding"),
                       (124, 414, "blocks.0"), (480, 444, "logits")):
        label(x, y, name)
    return drawing.finish(
        "The residual stream (thick) carries one vector of D numbers per token. The two parts "
        "of a block, attention and the MLP, each read a normalized copy and add what they "
        "compute; labels give the shapes. By default, k and v have as "
        "many heads as q: G = H.")


def rope() -> str:
    """Chapter 5: hands of a clock at a few positions, and scores against the distance."""
    drawing, K = Drawing("RoPE: positions as rotations", 486), 32
    frequencies = sf.rope_frequencies(K)
    x = torch.tensor([1.0, 0.0]).repeat(K // 2)  # each pair (1, 0)
    drawing.text(8, 20, "position", "bold")
    for column, position in enumerate((0, 1, 2, 3, 10, 100)):
        cx, table = 196 + 82 * column, sf.rope_table(torch.tensor([position]), frequencies)
        drawing.text(cx, 20, position, "mid bold")
        hands = sf.apply_rope(x[None], table).view(-1, 2).tolist()
        for cy, pair in ((62, 0), (132, 4), (202, 8)):
            cos, sin = hands[pair]
            drawing.circle(cx, cy, 28, "line faint")
            drawing.path([(cx, cy), (cx + 28, cy)], "line faint dash")
            drawing.arrow((cx, cy), (cx + 26 * cos, cy - 26 * sin), style="line thick one")
            drawing.text(8, cy - 4, f"pair {pair}", "bold")
            drawing.text(8, cy + 13, f"turns by {frequencies[pair]:.2g} radian", "small")
            drawing.text(8, cy + 27, "per position", "small")

    def score(query: int, key: int) -> float:
        table = sf.rope_table(torch.tensor([query, key]), frequencies)
        q, k = sf.apply_rope(torch.stack([x, x]), table)
        return (q @ k).item()

    place = drawing.axes(286, 150, range(0, 61, 10), (0, 4, 8, 12, 16),
                         "distance: position of the query - position of the key",
                         "score: query · key, with all pairs of both (1, 0)")
    drawing.path([place(d, score(d, 0)) for d in range(61)], "line one")
    for d in range(0, 61, 2):
        drawing.circle(*place(d, score(500 + d, 500)), 3, RING)
    drawing.key(230, 396, "line one", "key at position 0")
    drawing.key(230, 418, RING, "key at position 500")
    return drawing.finish(
        f"Each pair of a query's or key's K = {K} numbers turns with the position like a hand "
        "of a clock, the first pairs fast, later ones slowly. Here each pair is (1, 0) at "
        "position 0, in the query and in the key. Their score depends on the distance only: it "
        "is the same for a key at 0 and one at 500.")


class Run(NamedTuple):
    """A small model, and how its training went."""

    config: sf.OptimizerConfig
    tokenizer: sf.BPETokenizer
    model: sf.Transformer
    losses: list[float]  # of every step
    valid: list[float]  # the validation loss, every 25 steps


def train() -> Run:
    """Train the model of `story_from_text` on the bundled stories."""
    train_text, valid_text = ((DATA / f"stories-{part}.txt").read_text(encoding="utf-8")
                              for part in ("train", "valid"))
    merges = sf.learn_merges_naive(sf.count_pretokens(train_text), 1024 - 257)
    tokenizer = sf.BPETokenizer(merges)
    tokens = [np.array(tokenizer.encode(text)) for text in (train_text, valid_text)]
    torch.manual_seed(1)
    model = sf.Transformer(sf.ModelConfig(
        tokenizer.vocab_size, 128, num_layers=2, d_model=128, num_heads=4, d_ff=352))
    config, valid = sf.OptimizerConfig(max_steps=300, lr=5e-3), list[float]()
    measure = sf.validation_loss

    def measure_and_note(*args: Any) -> float:
        valid.append(measure(*args))
        return valid[-1]

    with patch.object(sf, "validation_loss", measure_and_note):
        losses = sf.train_model(model, *tokens, config, batch_size=16, eval_interval=25)
    return Run(config, tokenizer, model, losses, valid)


def weights_of(model: sf.Transformer, ids: Sequence[int]) -> Tensor:
    """The attention weights of every head, [layers, H, T, T]."""
    found = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        identity = torch.eye(len(ids))  # as values, so that the result is the weights
        weights = sf.attention_naive(q.transpose(1, 2), k.transpose(1, 2), identity)
        found.append(weights[0])
        return sf.attention(q, k, v)

    x, rope = model.embedding(torch.tensor([ids])), model.rope[:, : len(ids), None]
    for layer in model.blocks:
        x = layer(x, rope, attend)
    return torch.stack(found)


@torch.no_grad()
def attention(run: Run) -> str:
    """Chapter 5: the weights of two heads of a trained model."""
    drawing, size = Drawing("Attention weights of two heads", 410), 15
    sentence = "Long ago there was a helpful child called Emma who had a monkey."
    ids = run.tokenizer.encode(sentence)
    words = [run.tokenizer.decode([i]).strip() for i in ids]
    weights, T = weights_of(run.model, ids), len(ids)
    to_name = weights[:, :, -1, words.index("Emma")]  # (layers, H): from the last row
    pieces = slice(words.index("m") + 1, T - 1)  # of "monkey", but the first
    to_verb = weights[:, :, pieces, words.index("had")].mean(-1)
    for x, what, score in ((46, "at the period, it looks at the name", to_name),
                           (366, "within monkey, it looks at the verb had", to_verb)):
        layer, head = divmod(int(score.argmax()), score.shape[1])
        drawing.text(x, 18, f"block {layer}, head {head}", "bold")
        drawing.text(x, 36, what)
        for row, word in enumerate(words):
            across, down = x + size * row, 88 + size * row
            drawing.text(x - 6, down + 12, word, "end small")
            drawing.text(across + 11, 84, word, "small",
                         transform=f"rotate(-90 {across + 11} 84)")
            for column in range(row + 1):
                drawing.box(x + size * column, down, size, size, "cell",
                            fill_opacity=weights[layer, head, row, column])
            for i in (row, row + 1):  # hatch the upper triangle
                d, y = size * min(i, T - 1 - row), 88 + size * i
                drawing.path([(across + size, y), (across + size + d, y - d)], "line faint")
        drawing.box(x, 88 + size * (T - 1), size * T, size, "line thick")
    drawing.text(8, 391, "weight")
    for x, w in ((64, 0), (126, 0.25), (188, 0.5), (250, 0.75), (312, 1)):
        drawing.box(x, 379, size, size, "cell", fill_opacity=w)
        drawing.text(x + 20, 391, f"{w:g}")
    drawing.path([(386, 394), (401, 379)], "line faint")
    drawing.text(408, 391, "later tokens: hidden by the mask")
    p = run.model(torch.tensor([ids]))[0, -1].softmax(-1)
    she, her = (p[run.tokenizer.encode(word)[0]].item() for word in (" She", " Her"))
    return drawing.finish(
        "Each row is a token (monkey is five), and its squares show the weight it gives to "
        "itself and to earlier tokens. In the rows on, k, e and y, the right head puts "
        f"{to_verb.max():.2f} on had, on average. In the framed row, the left head puts "
        f"{to_name.max():.2f} on Emma, and the model predicts that She ({she:.0%}) or Her "
        f"({her:.0%}) comes next.")


# Training and generation
# -----------------------


def learning_rate() -> str:
    """Chapter 6: warmup and decay of a run of 300 steps."""
    drawing = Drawing("Warmup and decay of the learning rate", 262)
    config = sf.OptimizerConfig(max_steps=300, lr=5e-3)
    place = drawing.axes(36, 170, range(0, 301, 50), np.linspace(0, 0.005, 6).tolist(),
                         "step", "learning rate")
    points = [place(s, sf.learning_rate(s, config)) for s in range(config.max_steps + 1)]
    drawing.path(points, "line thick one")
    x, y = points[config.warmup_steps]
    drawing.path([(x, y), (x, 206)], "line dash")
    middle = points[config.warmup_steps // 2]
    drawing.arrow((150, middle[1]), (middle[0] + 4, middle[1]))
    drawing.text(156, middle[1] + 4, "linear warmup")
    drawing.text(x + 8, 196, f"warmup_steps = {config.warmup_steps}")
    drawing.text(x + 8, y - 8, f"peak: lr = {config.lr:g}")
    drawing.text(340, 88, "linear decay")
    drawing.text(620, 164, f"min_lr = {config.min_lr:g}", "end")
    return drawing.finish(
        f"Over the first {config.warmup_steps} of {config.max_steps} steps the learning rate "
        "rises in a straight line to its peak. From there it falls in a straight line to "
        "min_lr, which it reaches at the end.")


def loss(run: Run) -> str:
    """Chapter 6: training and validation loss against the entropy floor."""
    drawing = Drawing("The loss of a run, and the entropy floor", 372)
    facts = json.loads((DATA / "stories-valid.txt.json").read_text(encoding="utf-8"))
    text = (DATA / "stories-valid.txt").read_text(encoding="utf-8")
    num_bytes = len(text.replace(sf.END_OF_TEXT, "").encode())
    per_token = num_bytes / len(run.tokenizer.encode(text))
    per_byte = facts["floor_nats_per_byte"]
    floor = per_byte * per_token
    last = run.config.max_steps
    place = drawing.axes(36, 280, range(0, last + 1, 50), (0.5, 1, 2, 4, 8), "step",
                         "loss, nats per token (logarithmic scale)", log=True)
    drawing.path([place(i + 1, y) for i, y in enumerate(run.losses)], "line faint")
    for i, y in enumerate(run.valid):
        drawing.circle(*place(25 * (i + 1), y), 3, DOT)
    drawing.path([place(0, floor), place(last, floor)], "line two dash")
    drawing.text(300, place(0, floor)[1] + 16, f"entropy floor: {floor:.3f}")
    drawing.key(330, 64, "line faint", "training: each batch")
    drawing.key(330, 88, DOT, "validation: stories held out")
    return drawing.finish(
        f"Both losses fall together, fast at first; validation ends at {run.valid[-1]:.2f} "
        "nats per token. No model can be expected to get below the entropy floor of these "
        "stories, which is known because their generator knows the probability of each choice "
        f"it makes: {per_byte:.4f} nats per byte at {per_token:.2f} bytes per token.")


def tokens_computed(generate: Callable) -> list[int]:
    """How many tokens the model processes for each of three new ones; the prompt has three."""
    model, counts = sf.Transformer(sf.ModelConfig(8, 16, 1, 8, 2, 8)), list[int]()
    model.embedding.register_forward_hook(lambda _, args, x: counts.append(args[0].shape[1]))
    list(generate(model, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)))
    return counts


def cache() -> str:
    """Chapter 7: what is computed for each new token, with and without the KV cache."""
    drawing = Drawing("The key-value cache", 262)
    words = ["Once", "upon", "a", "time", "there", "was"]
    computed, kept, predicted = "line shaded one", "line pale", "line dots"
    for x, title, generate in ((8, "generate_naive: without a cache", sf.generate_naive),
                               (332, "generate: with the KV cache", sf.generate)):
        drawing.text(x, 20, title, "bold")
        counts = tokens_computed(generate)
        for row, count in enumerate(counts):
            y, length = 36 + 48 * row, 3 + row
            for column, word in enumerate(words[: length + 1]):
                style = kept if column < length - count else computed
                style = predicted if column == length else style
                center = x + 50 * column + 24
                drawing.box(center - 23, y, 46, 38, style)
                drawing.text(center, y + (17 if style == kept else 23), word, "mid")
                if style == kept:
                    drawing.text(center, y + 32, "k v", "mid code small")
        total = " + ".join(map(str, counts))
        drawing.text(x, 198, f"computed: {total} = {sum(counts)} tokens")
    for x, style, text in ((8, computed, "computed, all of the model"),
                           (222, kept, "in the cache: only key and value"),
                           (460, predicted, "predicted next")):
        drawing.box(x, 224, 28, 22, style)
        drawing.text(x + 36, 240, text, "small")
    return drawing.finish(
        "Three steps of generation, one per row, after the prompt Once upon a. Without a "
        "cache, each step computes all tokens again; the cache keeps the key and the value of "
        "each token in every block, so that a step computes only the newest token.")


# Optimizers and devices
# ----------------------


def muon() -> str:
    """Chapter 10: what `orthogonalize` does to the singular values of a gradient."""
    drawing = Drawing("Singular values of an update, before and after Muon", 324)
    torch.manual_seed(1)
    text = (DATA / "stories-valid.txt").read_text(encoding="utf-8")[:20000]
    tokens = np.array(sf.BPETokenizer([]).encode(text))
    model = sf.Transformer(sf.ModelConfig(257, 64, 2, 64, 4, 176))
    inputs, targets = sf.get_batch(tokens, 64, 1, range(8))
    sf.cross_entropy(model(inputs), targets).mean().backward()
    update = model.blocks[0].mlp.down.weight.grad
    update = update / update.norm()
    U, before, Vt = torch.linalg.svd(update, full_matrices=False)
    after = (U.T @ sf.orthogonalize(update[None])[0] @ Vt.T).diagonal()
    n = len(before)
    place = drawing.axes(36, 230, range(0, n + 1, 8), (0.0001, 0.001, 0.01, 0.1, 1, 2),
                         "direction, in the order of the singular values before",
                         "singular value (logarithmic scale)", log=True)
    for y, name, values, style in ((118, "after orthogonalize", after, DOT),
                                   (140, "before", before, RING)):
        drawing.key(380, y, style, name)
        for i, value in enumerate(values.tolist()):
            drawing.circle(*place(i + 1, value), 3, style)
    rows, columns = update.shape
    return drawing.finish(
        f"The singular values of a gradient of {rows} x {columns} entries, scaled to norm 1 "
        f"(rings), fall from {before[0]:.2f} to {before[-1]:.4f}: a few directions dominate. "
        f"Afterwards (dots) all are between {after.min():.2f} and {after.max():.2f}.")


def bytes_per_parameter() -> list[int]:
    """The bytes of a parameter, its gradient, and AdamW's m and v."""
    model = sf.Transformer(sf.ModelConfig(8, 8, 1, 8, 2, 8))
    w = model.lm_head.weight
    w.grad = torch.ones(8, 8)
    optimizer = sf.make_adamw(model.parameters(), sf.OptimizerConfig())
    optimizer.step()
    m_and_v = [x for x in optimizer.state[w].values() if x.shape == w.shape]
    return [x.element_size() for x in (w, w.grad, *m_and_v)]


def processes() -> str:
    """Chapter 12: what each of four processes holds and sends."""
    drawing, n = Drawing("Data parallel and FSDP on four processes", 502), 4
    sizes = bytes_per_parameter()

    def section(top: float, title: str, sharded: bool, *messages: str) -> None:
        each = sum(sizes) // n if sharded else sum(sizes)
        drawing.text(8, top, title, "bold")
        drawing.text(632, top, f"held by each: {each} bytes per parameter", "end")
        drawing.text(8, top + 48, "numbers of", "small")
        drawing.text(8, top + 60, f"{sizes[0]} bytes each:", "small")
        for rank in range(n):
            left = 96 + 136 * rank
            drawing.box(left, top + 14, 128, 132)
            drawing.text(left + 64, top + 31, f"process {rank}", "mid bold")
            drawing.text(left + 64, top + 48, f"rows {2 * rank}, {2 * rank + 1}", "mid small")
            for i, name in enumerate(("parameters", "gradients", "m", "v")):
                drawing.text(8, top + 79 + 19 * i, name)
                for shard in range(n):
                    held = not sharded or shard == rank
                    if held or i < 2:
                        drawing.box(left + 10 + 27 * shard, top + 68 + 19 * i, 27, 14,
                                    "line shaded one" if held else "line dots faint")
            drawing.arrow((left + 52, top + 148), (left + 52, top + 174))
            drawing.arrow((left + 76, top + 174), (left + 76, top + 148))
        drawing.path([(140, top + 176), (588, top + 176)], "line thick")
        for i, message in enumerate(messages):
            drawing.text(364, top + 194 + 17 * i, message, "mid")

    section(20, "Data parallel: each process holds everything", False,
            "all-reduce: each sends all its gradients, and gets the mean of all four")
    section(262, "FSDP: each process holds one shard in four", True,
            "all-gather: each sends its shard of the parameters, and gets the other three",
            "reduce-scatter: each sends all its gradients, and gets its shard of the mean",
            "(dashed: there only while needed)")
    return drawing.finish(
        "Four processes share the rows of a batch. In data parallel training each holds all "
        "parameters, gradients and AdamW's m and v; under FSDP it holds a quarter of each "
        "(shaded) and, for a short time, the rest of the parameters and gradients (dashed).")


# Measurements of results.md, which names machine, date and settings
# ------------------------------------------------------------------

# Seconds: ours first. (1 / tokens per second, where results.md has those.)
SPEED = {
    "BPE training, 200 MB of stories": {"ours": 2.28, "rustbpe": 15.39},
    "BPE training, 240 MB of C": {"ours": 7.80, "rustbpe": 46.94},
    "BPE training, 48 MB of Python": {"ours": 3.06, "rustbpe": 8.98, "tokenizers": 15.28},
    "BPE training, 20 MB of English": {"ours": 1.74, "rustbpe": 2.51, "tokenizers": 5.39},
    "Encoding, 200 MB of stories": {"ours": 4.04, "tiktoken": 20.72},
    "Encoding, 240 MB of C": {"ours": 7.50, "tiktoken": 63.97},
    "Encoding, 48 MB of Python": {"ours": 2.15, "tiktoken": 9.28},
    "Encoding, 20 MB of English": {"ours": 1.23, "tiktoken": 2.45},
    "Training step, 8 x 768": {"ours": 1 / 686414, "transformers": 1 / 573390},
    "Training step, 24 x 1024": {"ours": 1 / 168493, "transformers": 1 / 134355},
    "Training step, 24 x 1024, batch 32": {"ours": 1 / 193791, "transformers": 1 / 154325},
    "Generation on a GPU, 8 x 768": {"ours": 1 / 1115, "transformers": 1 / 126},
}
# Seconds for 1,200 steps, without evaluation, and the validation loss after every 100 steps.
LOSS_AGAINST_TIME = {
    "nanoGPT": ("line dots", 43.6, [
        4.417, 3.737, 3.292, 2.995, 2.711, 2.442, 2.207, 2.051, 1.949, 1.882, 1.835, 1.805]),
    "Hugging Face Llama, AdamW": ("line dash two", 48.6, [
        4.089, 3.528, 2.857, 2.418, 2.185, 2.042, 1.933, 1.851, 1.781, 1.729, 1.694, 1.675]),
    "ours, AdamW": ("line", 44.3, [
        3.722, 3.016, 2.334, 2.015, 1.872, 1.781, 1.698, 1.639, 1.580, 1.538, 1.511, 1.496]),
    "ours, Muon": ("line thick one", 47.7, [
        3.351, 2.201, 1.907, 1.751, 1.667, 1.614, 1.543, 1.501, 1.449, 1.411, 1.385, 1.369]),
    "nanochat": ("line thick dots two", 46.8, [
        3.254, 2.050, 1.739, 1.618, 1.538, 1.488, 1.434, 1.397, 1.362, 1.332, 1.319, 1.306]),
    "ours, Muon, five changes": ("line one", 51.1, [
        2.772, 1.897, 1.712, 1.615, 1.566, 1.516, 1.460, 1.416, 1.375, 1.335, 1.311, 1.297]),
}


def speed() -> str:
    """The speed of other tools relative to ours."""
    drawing, y = Drawing("Speed of Scratchformer and of other tools", 606), 12
    for work, seconds in SPEED.items():
        drawing.text(232, y + 7 + 8 * len(seconds), work, "end small")
        for name, time in seconds.items():
            length = 300 * seconds["ours"] / time
            drawing.box(240, y, length, 14, f"line {'shaded one' if name == 'ours' else ''}")
            drawing.text(246 + length, y + 11, f"{name} {length / 300:.2f}", "small")
            y += 18
        y += 10
    return drawing.finish(
        "Speed relative to ours (shaded): the longer the bar, the faster the tool.")


def muon_time() -> str:
    """Validation losses against seconds of training on one H200."""
    drawing = Drawing("Validation loss against seconds of training", 332)
    place = drawing.axes(36, 240, range(0, 56, 5), (1.25, 1.5, 2, 3, 4, 5),
                         "seconds of training",
                         "validation loss, nats per token (logarithmic scale)", log=True)
    for i, (name, (style, seconds, losses)) in enumerate(LOSS_AGAINST_TIME.items()):
        drawing.path([place(seconds * (n + 1) / len(losses), y)
                      for n, y in enumerate(losses)], style)
        drawing.key(370, 56 + 22 * i, style, name)
    return drawing.finish(
        "Validation losses in 1,200 steps on C source, against seconds on one H200. With Muon, "
        "ours reaches the final loss of nanoGPT in a third of its time, and that of Hugging "
        "Face's Llama in two fifths.")


COMPUTED = [merges, windows, block, rope, learning_rate, cache, muon, processes]
TRAINED, MEASURED = [attention, loss], [speed, muon_time]


def draw(names: Sequence[str], folder: Path) -> None:
    """Write the figures of these names; all, if there are none."""
    folder.mkdir(exist_ok=True)
    chosen = [f for f in COMPUTED + TRAINED + MEASURED if f.__name__ in names or not names]
    if unknown := set(names) - {f.__name__ for f in chosen}:
        sys.exit(f"no such figure: {', '.join(unknown)}")
    run = train() if set(chosen) & set(TRAINED) else None
    for figure in chosen:
        svg = figure(run) if figure in TRAINED else figure()
        (folder / f"{figure.__name__}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    draw(sys.argv[1:], DATA / "figures")
