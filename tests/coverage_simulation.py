"""Simulate how often the intervals of confidence.py hold the truth.

.venv/bin/python tests/coverage_simulation.py [--worlds 400]

A world is a random sample of a population of stacks. A threshold is trained on it, and what confidence.py says about
this threshold is compared with the population. Ten populations are synthetic, of 3,000 stacks each. One comes from
`make sandbox`: its network is run on every slice of its brain at five exposures, and a stack consists of five
neighbouring slices that the network was not trained on, at one exposure: near copies of each other.
"""

import argparse
import os
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in the tool

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from scipy.special import ndtr  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_sandbox import DATASET_ID, MODEL_ID, read_split  # noqa: E402

import confidence  # noqa: E402
from counts import confusion  # noqa: E402

# A shorter list of thresholds than the tool's, so that a world takes milliseconds: denser around 0.5, which is in it.
LOGITS = np.sinh(np.linspace(-3.33, 3.33, 201))
THRESHOLDS = (1 / (1 + np.exp(-LOGITS))).astype(np.float32)
STEP = 2  # every second threshold is coarse

# Differences from the stacks of `synthetic_stacks` by default.
POPULATIONS = {
    "equal stacks": {},
    "unequal sizes": {"pixels_spread": 1.2},
    "rare cracks": {"part": 0.002, "part_spread": 1.5},
    "rare cracks, small ones harder": {"part": 0.002, "part_spread": 1.5, "harder": 0.15},
    "one in ten of another kind": {"other_kind": 0.1},
    "flat curve": {"apart": 9.0, "width": 1.0, "wrong": 0.06},
    "peaked curve": {"apart": 1.6, "width": 0.35, "shift": 0.18, "skill": 0.036},
    "IoU about 0.1": {"apart": 1.2, "part": 0.03},
    "IoU about 0.4": {"apart": 2.0},
    "IoU about 0.98": {"apart": 12.0, "wrong": 0.01},
}


def synthetic_stacks(
    pixels_spread=0.0,  # of the logarithm of a stack's 20,000 pixels; every spread is a standard deviation over stacks
    part=0.2,  # of the pixels in the class, median
    part_spread=0.0,  # of the logarithm of this part
    harder=0.0,  # how much worse the network is on stacks with little of the class
    other_kind=0.0,  # part of the stacks whose logits are lower by 3
    apart=3.0,  # distance between the mean logits inside and outside the class
    width=1.3,  # standard deviation of the logits around these means
    shift=0.6,  # spread of a stack's mean logit
    skill=0.12,  # spread of the logarithm of the distance
    wrong=0.03,  # part of the class with logits as if outside, median: what errors in the masks do
):
    """Histograms of 3,000 stacks with one slice and one class, whose logits are normal inside and outside the class.

    Returns an int64 array, shape (3000, 1, 1, 2, len(THRESHOLDS) + 1).
    """
    rng = np.random.default_rng(1)
    normal = rng.normal(0, 1, (5, 3000))
    pixels = 20_000 * np.exp(pixels_spread * normal[0])
    inside = pixels * np.minimum(part * np.exp(part_spread * normal[1]), 0.3)
    middle = shift * normal[2] - 3 * (rng.random(3000) < other_kind)
    half_apart = apart / 2 * np.exp(skill * normal[3] + harder * normal[1])
    as_outside = np.minimum(wrong * np.exp(0.5 * normal[4]), 0.5)[:, None]

    def bins(mean):
        below = np.pad(ndtr((LOGITS - mean[:, None]) / width), ((0, 0), (1, 0)))
        return np.diff(below, axis=1, append=1)

    of_outside, of_inside = bins(middle - half_apart), bins(middle + half_apart)
    of_class = (1 - as_outside) * of_inside + as_outside * of_outside
    expected = np.stack([(pixels - inside)[:, None] * of_outside, inside[:, None] * of_class], axis=1)
    return rng.poisson(expected)[:, None, None]


EXPOSURES = (0.92, 0.96, 1.0, 1.04, 1.08)
SLICES = 5  # per stack of the sandbox


def population(sandbox):
    """Run the sandbox's network on its images at several exposures; returns the histograms as two int64 arrays.

    The stacks have the shape (stacks, SLICES, classes, 2, len(THRESHOLDS) + 1). The slices, (exposures, slices,
    classes, ...), are all those of the brain in order, also those that the network was trained on.
    """
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

    slices = np.zeros((len(EXPOSURES), len(in_order), masks.shape[-1], 2, len(THRESHOLDS) + 1), np.int64)
    for e, exposure in enumerate(EXPOSURES):
        exposed = np.clip(np.floor(images * 255 * exposure), 0, 255) / 255
        probabilities = network.predict(exposed.astype(np.float32), batch_size=60, verbose=0)
        bins = np.searchsorted(THRESHOLDS, probabilities)
        for i, c, truth in np.ndindex(len(images), *slices.shape[2:4]):
            of_crop = bins[i, ..., c][masks[i, ..., c] == truth]
            slices[e, slice_of[i], c, truth] += np.bincount(of_crop, minlength=len(THRESHOLDS) + 1)
    first = [i for i, number in enumerate(in_order) if unseen >= set(range(number, number + SLICES))]
    return np.concatenate([slices[:, i : i + SLICES] for i in first]), slices


def coarse(histograms):
    return np.add.reduceat(histograms, np.r_[0, np.arange(1, len(THRESHOLDS) + 1, STEP)], axis=-1)


def trained(metric, counts):
    """The index of the best threshold."""
    value = np.where(metric.allowed(*counts), metric(*counts), -1)
    return int(value.argmax())


def truth_of(stacks):
    """The counts of a whole population, and of its stacks that contain the class; `stacks` holds their histograms."""
    return confusion(stacks.sum(axis=0)), confusion(stacks[stacks[:, 1].any(axis=1)])


def judge(metric, blocks, truth):
    """Compare what confidence.py says about one class in one world with the truth, which is that of `truth_of`.

    `blocks`, shape (blocks, 2, len(THRESHOLDS) + 1), holds the histograms of the world's blocks. Returns a dictionary:
    for metric, threshold, gain and constraint 1 if the interval contains the truth, 0 if not, NaN without an interval;
    for the next stack the part of the population's stacks whose metric is in its range; what the blocks are worth; the
    width of the metric's interval; and the biases of the metric seen and of the expected metric.
    """
    whole, with_class = truth
    histogram, half = blocks.sum(axis=0), int(np.searchsorted(THRESHOLDS, 0.5))
    index, best = trained(metric, confusion(histogram)), trained(metric, whole)
    said = confidence.assess(THRESHOLDS, histogram, coarse(blocks), metric, index, 0, len(THRESHOLDS) - 1)
    true, sample = metric(*whole), metric(*confusion(histogram))
    # Most of a world's deviation is chance and not an effect of choosing: it is also found at the population's best.
    chance = float(sample[best] - true[best])
    own = metric(*(count[:, index] for count in with_class))
    reached = (metric.constraint or metric)(*whole)[index]

    def holds(interval, value):
        return np.nan if interval is None else np.mean((interval[0] <= value) & (value <= interval[1]))

    return {
        "metric": holds(said.metric_interval, true[index]),
        "next stack": holds(said.next_stack_interval, own),
        "threshold": holds(said.x_interval, THRESHOLDS[best]),
        "gain": holds(said.gain_interval, true[index] - true[half]),
        "constraint": holds(said.constraint_interval, reached),
        "worth": said.worth,
        "width": said.metric_interval[1] - said.metric_interval[0],
        "bias": sample[index] - true[index] - chance,
        "expected bias": said.expected_metric - true[index] - chance,
    }


def averages(judged):
    """Mean and standard error of each number; `judged` holds a list of dictionaries, one a class, for each world."""
    found = {}
    for key in judged[0][0]:
        of_worlds = np.array([np.mean([one[key] for one in world]) for world in judged], float)
        found[key] = float(of_worlds.mean()), float(of_worlds.std() / np.sqrt(len(of_worlds)))
    return found


def worlds_of_stacks(stacks, metric, number, worlds, single_images=False):
    """Averages over `worlds` worlds of `number` stacks with an interval. A block is a stack, or a single image.

    `stacks` is an int64 array, shape (stacks, slices, classes, 2, len(THRESHOLDS) + 1).
    """
    rng = np.random.default_rng(number)
    whole, judged = stacks.sum(axis=1), []
    truths = [truth_of(whole[:, c]) for c in range(whole.shape[1])]
    while len(judged) < worlds:
        drawn = rng.integers(0, len(stacks), number)
        blocks = stacks[drawn].reshape(-1, *stacks.shape[2:]) if single_images else whole[drawn]
        if blocks.any(axis=-1).all(axis=-1).sum(axis=0).min() >= confidence.FEWEST_BLOCKS:
            judged.append([judge(metric, blocks[:, c], truth) for c, truth in enumerate(truths)])
    return averages(judged)


def worlds_of_one_stack(slices, metric, worlds, number=40):
    """The same for worlds of one stack, where a block is a run of neighbouring slices.

    The stack is every second of 80 neighbouring slices at one exposure. Returns three averages, which compare with all
    slices of the brain at all exposures, with the slices between those of the stack, and with the next 40 slices.
    """
    rng = np.random.default_rng(number)
    blocks = confidence.blocks_of([f"stack_slice_{i:03d}.png" for i in range(number)], ["stack"])
    everywhere = slices.reshape(-1, *slices.shape[2:])
    judged = [], [], []
    for _ in range(worlds):
        exposure, start = rng.integers(len(slices)), rng.integers(slices.shape[1] - 3 * number + 1)
        near = slices[exposure, start : start + 3 * number]
        drawn = np.zeros((blocks.number, *near.shape[1:]), np.int64)
        np.add.at(drawn, blocks.labels, near[: 2 * number : 2])
        for of_world, truth in zip(judged, (everywhere, near[1 : 2 * number : 2], near[2 * number :]), strict=True):
            of_world.append([judge(metric, drawn[:, c], truth_of(truth[:, c])) for c in range(drawn.shape[1])])
    return [averages(of_world) for of_world in judged]


def print_table(stacks, slices, metric, worlds):
    """Print what `worlds` worlds a row give; `stacks` and `slices` are those of the sandbox."""
    print(f"\n{metric.name}, {worlds} worlds a cell, with the standard error of the mean over worlds")
    for name, kind in POPULATIONS.items():
        for number in (7, 12, 20, 50):
            print_row(f"{name}, {number} stacks", worlds_of_stacks(synthetic_stacks(**kind), metric, number, worlds))
    for number in (5, 10, 20, 50):
        print_row(f"sandbox, {number} stacks", worlds_of_stacks(stacks, metric, number, worlds))
    single = worlds_of_stacks(stacks, metric, 10, max(worlds // 10, 1), single_images=True)
    print_row("sandbox, 10 stacks, single images as blocks", single)
    where = "by all stacks", "by the slices between", "by the next 40 slices"
    for name, said in zip(where, worlds_of_one_stack(slices, metric, worlds), strict=True):
        print_row(f"one stack of 40 slices, judged {name}", said)


def print_row(name, said):
    percent = ("metric", "next stack", "threshold", "gain", "constraint")
    cells = [f"{key} {said[key][0]:.1%} ± {said[key][1]:.1%}" for key in percent if np.isfinite(said[key][0])]
    cells += [f"{key} {mean:.4g}" for key, (mean, _) in said.items() if key not in percent]
    print(f"{name}: {', '.join(cells)}", flush=True)


def main():
    import models

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=400, help="number of worlds per row (default: 400)")
    parser.add_argument("--metric", default="iou_score", help="a class metric (default: iou_score)")
    options = parser.parse_args()
    print_table(*population(ROOT / "sandbox"), models.class_metric(options.metric), options.worlds)


if __name__ == "__main__":
    main()
