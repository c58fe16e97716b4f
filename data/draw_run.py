"""Draw a training run's loss against its steps, with the entropy floor, as an SVG.

    uv run --with matplotlib data/draw_run.py out/demo/run out/demo/loss.svg

Reads metrics.jsonl. The floor is known for generated stories only (make_stories.py); it is
stated per byte and drawn per token, at the bytes per token of the validation file.
"""

import json
import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("this needs matplotlib: uv run --with matplotlib ..., or pip install matplotlib")


def draw(run: Path, picture: Path, floor: float | None = None) -> None:
    """Write `picture` from the metrics of the run in the directory `run`.

    `floor`, in nats per byte, is the loss that no model can be expected to beat.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    valid = [(row["step"], row["valid_loss"]) for row in rows if "valid_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9bb7d4", label="training batches")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="#1f4e79", label="validation file")
    if floor:
        last = rows[-1]
        per_token = floor * last["valid_loss"] / last["nats_per_byte"]
        axes.axhline(per_token, color="#b03a2e", ls="--", label="floor")
    axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: draw_run.py RUN_FOLDER PICTURE.svg [FLOOR_NATS_PER_BYTE]")
    draw(Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:]))
