"""Draw the tables of speed in data/results.md as bars, as an SVG.

    uv run --with matplotlib data/draw_speed.py data/speed.svg

The figures are those of results.md, which names machine, date and command of each. A bar's
length is the speed relative to ours, so that longer than 1 is faster than this file.
"""

import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("this needs matplotlib: uv run --with matplotlib ..., or pip install matplotlib")

# What was done, and the time it took: ours first.
MEASURED = {
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
    "Writing on a GPU, 8 x 768": {"ours": 1 / 1115, "transformers": 1 / 126},
}


def draw(picture: Path) -> None:
    """Write `picture`."""
    figure, axes = plt.subplots(figsize=(7, 7.5), layout="constrained")
    place, ticks = 0.0, []
    for work, taken in MEASURED.items():
        ticks.append((place + (len(taken) - 1) / 2, work))
        for name, time in taken.items():
            speed = taken["ours"] / time
            axes.barh(place, speed, color="#1f4e79" if name == "ours" else "#9bb7d4")
            axes.text(speed + 0.02, place, f"{name} {speed:.2f}", va="center", fontsize=8)
            place += 1
        place += 0.7
    axes.axvline(1, color="#b03a2e", ls="--", lw=1)
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axes.set(xlabel="speed, ours = 1", xlim=(0, 1.3))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: draw_speed.py PICTURE.svg")
    draw(Path(sys.argv[1]))
