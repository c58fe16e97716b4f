"""Draw the README's tables of speed as bars, as an SVG.

    uv run --with matplotlib data/draw_speed.py data/speed.svg

The figures are those of the README, which names machine, date and command of each. A bar's
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
    "BPE training, 200 MB of stories": {"ours": 2.38, "rustbpe": 9.35},
    "BPE training, 240 MB of C": {"ours": 5.35, "rustbpe": 22.29},
    "BPE training, 48 MB of Python": {"ours": 1.95, "rustbpe": 4.67, "tokenizers": 9.18},
    "BPE training, 20 MB of English": {"ours": 1.33, "rustbpe": 1.23, "tokenizers": 3.70},
    "Encoding, 200 MB of stories": {"ours": 2.81, "tiktoken": 10.00},
    "Encoding, 240 MB of C": {"ours": 5.35, "tiktoken": 28.78},
    "Encoding, 48 MB of Python": {"ours": 1.62, "tiktoken": 3.90},
    "Encoding, 20 MB of English": {"ours": 0.90, "tiktoken": 1.25},
    "Training step, 8 x 768": {"ours": 1 / 696786, "transformers": 1 / 575318},
    "Training step, 24 x 1024": {"ours": 1 / 168412, "transformers": 1 / 134371},
    "Training step, 24 x 1024, batch 32": {"ours": 1 / 194649, "transformers": 1 / 154512},
    "Writing on a GPU, 8 x 768": {"ours": 1 / 993, "transformers": 1 / 121},
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
