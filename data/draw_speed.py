"""Draw the README's tables of speed as bars, as an SVG.

    uv run --with matplotlib data/draw_speed.py data/speed.svg

The figures are those of the README, which names machine, date and command of each. A bar's
length is the speed relative to ours, so that longer than 1 is faster than this file.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

# What was done, and seconds or milliseconds it took: ours first.
MEASURED = {
    "BPE training, 200 MB of stories": {"ours": 3.35, "rustbpe": 8.21, "tokenizers": 17.17},
    "BPE training, 20 MB of English": {"ours": 2.15, "rustbpe": 0.97, "tokenizers": 2.45},
    "Encoding, 200 MB of stories": {"ours": 3.02, "tiktoken": 13.47, "tokenizers": 41.68},
    "Encoding, 20 MB of English": {"ours": 1.45, "tiktoken": 0.90, "tokenizers": 4.18},
    "Training step, 8 x 768": {"ours": 47.89, "transformers": 56.46},
    "Training step, 24 x 1024": {"ours": 49.11, "transformers": 60.37},
    "Training step, 24 x 1024, batch 32": {"ours": 170.0, "transformers": 210.76},
    "Writing on a CPU, 8 x 768": {"ours": 1 / 61.0, "transformers": 1 / 35.5},
    "Writing on a GPU, 8 x 768": {"ours": 1 / 1135, "transformers": 1 / 143},
}


def draw(picture: Path) -> None:
    """Write `picture`."""
    figure, axes = plt.subplots(figsize=(7, 6.1), layout="constrained")
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
    axes.set(xlabel="speed, ours = 1", xlim=(0, 2.8))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: draw_speed.py PICTURE.svg")
    draw(Path(sys.argv[1]))
