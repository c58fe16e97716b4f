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
    "BPE training, 200 MB of stories": {"ours": 3.25, "rustbpe": 6.35, "tokenizers": 18.4},
    "BPE training, 20 MB of English": {"ours": 2.24, "rustbpe": 0.93, "tokenizers": 2.51},
    "Encoding, 200 MB of stories": {"ours": 3.39, "tiktoken": 11.5, "tokenizers": 41.3},
    "Encoding, 20 MB of English": {"ours": 1.39, "tiktoken": 0.95, "tokenizers": 5.17},
    "Training step, 8 x 768": {"ours": 48.73, "transformers": 57.34},
    "Training step, 24 x 1024": {"ours": 49.89, "transformers": 60.82},
    "Training step, 24 x 1024, batch 32": {"ours": 172.3, "transformers": 213.65},
}


def draw(picture: Path) -> None:
    """Write `picture`."""
    figure, axes = plt.subplots(figsize=(7, 5.2), layout="constrained")
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
