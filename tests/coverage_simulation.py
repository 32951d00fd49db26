"""Simulate how often the confidence intervals cover the truth.

.venv/bin/python tests/coverage_simulation.py [--worlds 1000]

The sandbox's network is run on every slice of its brain at five exposures. A stack consists of five neighbouring slices
that the network was not trained on, at one exposure: near copies of each other. All these stacks are the population, so
the truth is known. A world is a random sample of the stacks. A threshold is trained on it, and what confidence.py says
about this threshold is compared with the pooled population.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in the tool

import numpy as np  # noqa: E402
import yaml  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_sandbox import DATASET_ID, MODEL_ID, read_split  # noqa: E402

import confidence  # noqa: E402
from counts import confusion  # noqa: E402

EXPOSURES = (0.92, 0.96, 1.0, 1.04, 1.08)
SLICES = 5  # per stack
# A shorter list of thresholds than the tool's, so that a world takes milliseconds: evenly spaced logits, with 0.5.
THRESHOLDS = (1 / (1 + np.exp(-np.linspace(-14, 14, 401)))).astype(np.float32)
STEP = 4  # every fourth threshold is coarse


class Population(NamedTuple):
    """Histograms of all slices. The last axes are (classes, 2, len(THRESHOLDS) + 1).

    stacks : int64 array, shape (stacks, SLICES, ...)
    slices : int64 array, shape (exposures, slices, ...)
        All slices of the brain in order, also those that the network was trained on.
    """

    stacks: np.ndarray
    slices: np.ndarray


def population(sandbox, exposures=EXPOSURES):
    """Run the sandbox's network on its images at several exposures; returns a Population."""
    from network import build_network, import_tensorflow

    import_tensorflow()
    dataset, model = sandbox / "datasets" / DATASET_ID, sandbox / "models" / MODEL_ID
    parts = [(split, *read_split(dataset / split)) for split in ("train", "validation", "test")]
    images, masks = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    names = [(path.stem, split) for split, *_ in parts for path in sorted((dataset / split / "images").iterdir())]
    numbers = np.array([int(re.search("-([0-9]+)_crop", name)[1]) for name, _ in names])
    unseen = {number for number, (_, split) in zip(numbers, names, strict=True) if split != "train"}
    in_order, slice_of = np.unique(numbers, return_inverse=True)
    config = yaml.safe_load((model / "config.yaml").read_text())["train_config"]
    network = build_network(config, masks.shape[-1], images.shape[2:0:-1], model / "model.hdf5")

    slices = np.zeros((len(exposures), len(in_order), masks.shape[-1], 2, len(THRESHOLDS) + 1), np.int64)
    for e, exposure in enumerate(exposures):
        exposed = np.clip(np.floor(images * 255 * exposure), 0, 255) / 255
        probabilities = network.predict(exposed.astype(np.float32), batch_size=60, verbose=0)
        bins = np.searchsorted(THRESHOLDS, probabilities)
        for i, c, truth in np.ndindex(len(images), *slices.shape[2:4]):
            of_crop = bins[i, ..., c][masks[i, ..., c] == truth]
            slices[e, slice_of[i], c, truth] += np.bincount(of_crop, minlength=len(THRESHOLDS) + 1)
    first = [i for i, number in enumerate(in_order) if unseen >= set(range(number, number + SLICES))]
    stacks = np.concatenate([slices[:, i : i + SLICES] for i in first])
    return Population(stacks, slices)


def coarse(histograms):
    return np.add.reduceat(histograms, np.r_[0, np.arange(1, len(THRESHOLDS) + 1, STEP)], axis=-1)


def trained(metric, histogram):
    """The index of the best threshold."""
    counts = confusion(histogram)
    value = np.where(metric.allowed(*counts), metric(*counts), -1)
    return int(value.argmax())


def judge(metric, blocks, truth):
    """Compare what confidence.py says about one class in one world with the truth.

    Parameters
    ----------
    metric : models.ClassMetric
    blocks : int64 array, shape (blocks, 2, len(THRESHOLDS) + 1)
    truth : int64 array, shape (2, len(THRESHOLDS) + 1)
        Histogram of the population.

    Returns
    -------
    dict of float
        metric, threshold, gain: 1 if the interval contains the truth, 0 if not, NaN without an interval. width: of the
        metric's interval. bias, expected bias: of the metric seen and of the expected metric.
    """
    histogram = blocks.sum(axis=0)
    index = trained(metric, histogram)
    half = int(np.searchsorted(THRESHOLDS, 0.5))
    said = confidence.assess(THRESHOLDS, histogram, coarse(blocks), metric, index, 0, len(THRESHOLDS) - 1)
    true, sample = metric(*confusion(truth)), metric(*confusion(histogram))
    best = trained(metric, truth)
    # Most of a world's deviation is chance and not an effect of choosing: it is also found at the population's best.
    chance = float(sample[best] - true[best])

    def holds(interval, value):
        return np.nan if interval is None else float(interval[0] <= value <= interval[1])

    return {
        "metric": holds(said.metric_interval, true[index]),
        "width": said.metric_interval[1] - said.metric_interval[0],
        "threshold": holds(said.x_interval, THRESHOLDS[best]),
        "gain": holds(said.gain_interval, true[index] - true[half]),
        "bias": sample[index] - true[index] - chance,
        "expected bias": said.expected_metric - true[index] - chance,
    }


def averages(judged):
    return {key: float(np.nanmean([one[key] for one in judged])) for key in judged[0]}


def worlds_of_stacks(pictures, metric, number, worlds, single_images=False):
    """Averages over `worlds` worlds of `number` stacks, and over all classes.

    A block is a stack, or a single image if `single_images`.
    """
    rng = np.random.default_rng(number)
    stacks = pictures.stacks if single_images else pictures.stacks.sum(axis=1)
    truth = pictures.stacks.sum(axis=(0, 1))
    judged = []
    for _ in range(worlds):
        drawn = stacks[rng.integers(0, len(stacks), number)]
        drawn = drawn.reshape(-1, *truth.shape)
        judged += [judge(metric, drawn[:, c], truth[c]) for c in range(len(truth))]
    return averages(judged)


def worlds_of_one_stack(pictures, metric, worlds, slices=40):
    """The same for worlds of one stack, where a block is a run of neighbouring slices.

    The stack is every second of 80 neighbouring slices at one exposure. Returns two averages: the first compares with
    all slices of the brain at all exposures, the second with the slices between those of the stack.
    """
    rng = np.random.default_rng(slices)
    exposures, length = pictures.slices.shape[:2]
    everything = pictures.slices.sum(axis=(0, 1))
    names = [f"stack_slice_{i:03d}.png" for i in range(slices)]
    blocks = confidence.blocks_of(names, ["stack"])
    elsewhere, same = [], []
    for _ in range(worlds):
        start = rng.integers(0, length - 2 * slices + 1)
        whole = pictures.slices[rng.integers(exposures), start : start + 2 * slices]
        drawn = np.zeros((blocks.number, *whole.shape[1:]), np.int64)
        np.add.at(drawn, blocks.labels, whole[::2])
        for c in range(len(everything)):
            elsewhere.append(judge(metric, drawn[:, c], everything[c]))
            same.append(judge(metric, drawn[:, c], whole[1::2, c].sum(axis=0)))
    return averages(elsewhere), averages(same)


def print_table(pictures, metric, worlds):
    print(f"\n{metric.name}, {worlds:,} worlds per row, three classes each\n")
    print(
        "| world | metric covered | mean width | covered with single images as blocks | threshold covered "
        "| gain covered | bias of the metric seen | of the expected one |\n" + "| --- " * 8 + "|"
    )

    def row(name, said, single=""):
        print(
            f"| {name} | {said['metric']:.1%} | {said['width']:.3f} | {single} | {said['threshold']:.1%} | "
            f"{said['gain']:.1%} | {said['bias']:+.4f} | {said['expected bias']:+.4f} |",
            flush=True,
        )

    for number in (5, 10, 20, 50):
        single = worlds_of_stacks(pictures, metric, number, worlds // 10, single_images=True)["metric"]
        row(f"{number} stacks", worlds_of_stacks(pictures, metric, number, worlds), f"{single:.0%}")
    elsewhere, same = worlds_of_one_stack(pictures, metric, worlds)
    row("one stack of 40 slices, judged by all stacks", elsewhere)
    row("the same, judged by the slices in between", same)


def main():
    import models

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=1000, help="number of worlds per row (default: 1000)")
    parser.add_argument("--metric", default="iou_score", help="a class metric (default: iou_score)")
    options = parser.parse_args()
    print_table(population(ROOT / "sandbox"), models.class_metric(options.metric), options.worlds)


if __name__ == "__main__":
    main()
