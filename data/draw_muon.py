"""Draw the validation losses of data/results.md against wall time on one H100, as an SVG.

    uv run --with matplotlib data/draw_muon.py data/muon.svg

One seed; results.md names machine, date and settings.
"""

import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("this needs matplotlib: uv run --with matplotlib ..., or pip install matplotlib")

# Seconds for 800 steps, without evaluation, and the validation loss after every 50 steps.
MEASURED = {
    "nanoGPT": (30.8, [
        4.842, 4.358, 3.923, 3.599, 3.386, 3.209, 3.070, 2.944,
        2.825, 2.719, 2.622, 2.525, 2.446, 2.381, 2.336, 2.291]),
    "Hugging Face Llama, AdamW": (36.8, [
        5.037, 4.016, 3.661, 3.410, 3.171, 2.927, 2.679, 2.489,
        2.324, 2.220, 2.127, 2.060, 2.000, 1.957, 1.925, 1.908]),
    "ours, AdamW": (29.4, [
        4.694, 3.924, 3.583, 3.345, 3.140, 2.946, 2.741, 2.559,
        2.392, 2.261, 2.148, 2.067, 2.001, 1.950, 1.910, 1.892]),
    "ours, Muon": (32.0, [
        4.441, 3.719, 3.286, 3.040, 2.822, 2.570, 2.302, 2.084,
        1.934, 1.844, 1.769, 1.708, 1.663, 1.621, 1.591, 1.575]),
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
