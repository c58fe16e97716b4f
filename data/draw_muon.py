"""Draw the README's validation losses against wall time on one H100, as an SVG.

    uv run --with matplotlib data/draw_muon.py data/muon.svg

Medians of three seeds; the README names machine, date and settings.
"""

import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("this needs matplotlib: uv run --with matplotlib ..., or pip install matplotlib")

# Seconds for 1,200 steps, without evaluation, and the validation loss after every 100 steps.
MEASURED = {
    "nanoGPT": (45.9, [2.754, 2.042, 1.553, 1.161, 0.924, 0.748, 0.615, 0.522, 0.456, 0.409,
                       0.381, 0.362]),
    "Hugging Face Llama, AdamW": (54.7, [2.555, 1.547, 1.022, 0.649, 0.476, 0.376, 0.311, 0.264,
                                         0.231, 0.206, 0.191, 0.182]),
    "ours, AdamW": (45.1, [2.469, 1.528, 1.106, 0.844, 0.654, 0.496, 0.385, 0.323, 0.279, 0.248,
                           0.229, 0.217]),
    "ours, Muon": (48.4, [2.087, 1.294, 0.827, 0.562, 0.421, 0.339, 0.286, 0.237, 0.201, 0.172,
                          0.153, 0.141]),
}


def draw(picture: Path) -> None:
    """Write `picture`."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, (seconds, losses) in MEASURED.items():
        times = [seconds * (n + 1) / len(losses) for n in range(len(losses))]
        axes.plot(times, losses, "o-", markersize=3, label=name)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats/token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
