"""How far a trained threshold can be trusted: intervals, the gain, what to expect on new images, guaranteed recall.

Everything is computed from counts per block. A block is a part of the images that can be taken as independent of the
other parts. docs/confidence.md says what is assumed and how it was checked.
"""

import functools
import math
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit, ndtr, stdtrit

from counts import confusion
from models import CLASS_METRICS, ratio, widest_stretch

LEVEL = 0.95  # of the intervals
REPLICATES = 2000  # of the bootstrap
SEED = 20200321  # fixed, so that a rerun gives the same intervals
FEWEST_BLOCKS = 5  # with fewer, no interval covers what it promises
MOST_BLOCKS = 256  # so that the memory for their counts does not grow with the number of images
END = 0.01  # the metrics of single stacks are taken for END to 1 - END, because 0 and 1 have no logit
ROUNDING = 1e-9  # 10 * (1 - 0.9) is less than 1 in float64
NO_STACK = "images of no named stack"
RUNS = 20  # number of runs of neighbouring slices, if there are too few stacks

# ---------------------------------------------------------------------------------------------------------------
# Blocks


@dataclass(frozen=True)
class Blocks:
    """Which block each image belongs to."""

    labels: np.ndarray  # (images,) int64: the block of each image, 0 to number - 1; every block has an image
    number: int  # at most MOST_BLOCKS
    kind: str  # "stacks", "groups of stacks" or "runs of neighbouring slices"
    names: list  # of each block: the stack's name, "stack_1 to stack_9" or "stack_1 run 3"
    speaks_of: str  # what intervals from these blocks hold for: the end of a sentence
    warnings: list  # sentences about names of stacks and images that do not fit together


def blocks_of(names, stacks, all_names=None):
    """Divide images into blocks: stacks, or, if there are too few stacks, runs of neighbouring slices.

    Slices of one stack resemble each other, and crops of one slice even more. So the unit is the stack. With fewer than
    FEWEST_BLOCKS stacks, each is cut into runs of neighbouring slices, RUNS in all if there are enough slices. All
    crops of a slice stay together. More than MOST_BLOCKS stacks are joined, in natural order, to MOST_BLOCKS groups.

    Parameters
    ----------
    names : sequence of str
        The names of all images used, in any order. A name begins with the name of its stack.
    stacks : list of str
        What `dataset_config.dataset_split` names for this split. Case, Unicode form, a folder before a stack's name and
        the ending of a file after it may differ from the images' where no other stack can be meant. Images of none of
        the stacks count as one more stack, because nothing tells them apart.
    all_names : sequence of str, optional
        The names of all images of the split, of which `names` are a part: only a stack without any is warned of.

    Returns
    -------
    Blocks
    """
    stacks = sorted({stack for stack in stacks if stack})
    known = {}
    for stack in stacks:
        known.setdefault(_plain(stack), []).append(stack)
    fitting = {name: _stacks_that_fit(name, known) for name in all_names or names}
    images_of = {}
    for image, name in enumerate(names):
        images_of.setdefault(fitting[name][0] if fitting[name] else NO_STACK, []).append(image)
    warnings = _name_warnings(names, stacks, fitting)
    ordered = sorted(images_of, key=lambda stack: (stack == NO_STACK, _natural_order(stack)))
    if len(ordered) < FEWEST_BLOCKS:
        return _runs(names, images_of, ordered, bool(stacks), warnings)
    number = min(len(ordered), MOST_BLOCKS)
    labels, members = np.zeros(len(names), np.int64), [[] for _ in range(number)]
    for rank, stack in enumerate(ordered):
        block = rank * number // len(ordered)
        labels[images_of[stack]] = block
        members[block].append(stack)
    return Blocks(
        labels=labels,
        number=number,
        kind="stacks" if number == len(ordered) else "groups of stacks",
        names=[here[0] if len(here) == 1 else f"{here[0]} to {here[-1]}" for here in members],
        speaks_of=f"further stacks of the same kind as these {len(ordered)}",
        warnings=warnings,
    )


def _runs(names, images_of, ordered, named, warnings):
    """Blocks that are runs of neighbouring slices of the stacks in `ordered`; `images_of` holds their images."""
    of_images = [[_slice_of(names[image]) for image in images_of[stack]] for stack in ordered]
    in_order = [sorted(set(slices), key=_natural_order) for slices in of_images]
    runs_of = _runs_per_stack([len(slices) for slices in in_order])
    labels, run_names = np.zeros(len(names), np.int64), []
    for stack, of_image, slices, runs in zip(ordered, of_images, in_order, runs_of, strict=True):
        block_of = {name: len(run_names) + rank * runs // len(slices) for rank, name in enumerate(slices)}
        labels[images_of[stack]] = [block_of[name] for name in of_image]
        run_names += [f"{stack} run {run + 1}" for run in range(runs)]
    these = "this one stack" if len(ordered) == 1 else f"these {len(ordered)} stacks"
    speaks_of = f"slices that lie between these, of {these}, not of others"
    if ordered == [NO_STACK]:
        why = "none of the stacks that are named has an image" if named else "no stacks are named"
        speaks_of = f"images that lie between these in the order of their names, as {why}"
    return Blocks(labels, len(run_names), "runs of neighbouring slices", run_names, speaks_of, warnings)


def _stacks_that_fit(name, known):
    """The stacks with whose name the name of an image begins, the longest first; `known` holds them by plain name.

    Plain names are compared. Of several stacks with one plain name, only those fit that are written as the image is.
    """
    plain, fitting = _plain(name), []
    for length in range(len(plain), 0, -1):
        alike = known.get(plain[:length], [])
        if alike and _ends_a_word(plain, length):
            fitting += [stack for stack in alike if len(alike) == 1 or name.startswith(stack)]
    return fitting


def _plain(name):
    """A name without folder and ending, and without differences of case and Unicode form."""
    name = re.sub(r"\.(tiff?|png)$", "", re.split(r"[/\\]", name)[-1], flags=re.IGNORECASE)
    return unicodedata.normalize("NFC", name).casefold()


def _name_warnings(names, stacks, fitting):
    """Sentences about stacks without an image, images of no named stack, and images that several stacks fit."""
    with_images = {stack for found in fitting.values() for stack in found[:1]}
    absent = [stack for stack in stacks if stack not in with_images]
    strangers = [name for name in names if stacks and not fitting[name]]
    ambiguous = [f"{name} fits {' and '.join(fitting[name])}" for name in names if len(fitting[name]) > 1]
    causes = (
        ("names {} without an image", "stack", absent, "the intervals rest on the other stacks only"),
        ("names no stack for {}", "image", strangers, "they count as one more stack: right only if they come from one"),
        ("names several stacks for {}", "image", ambiguous, "the longest name counts: right only if it is the stack's"),
    )
    sentences = []
    for what, kind, found, meaning in causes:
        if found:
            number = f"{len(found):,} {kind}{'s' * (len(found) > 1)}"
            examples = ", ".join(found[:3]) + f" and {len(found) - 3:,} more" * (len(found) > 3)
            sentences.append(f"dataset_split {what.format(number)} ({examples}): {meaning}; check the names")
    return sentences


def _natural_order(text):
    """A key to sort names by, which puts slice_2 before slice_10."""
    parts = re.split("([0-9]+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def _ends_a_word(name, length):
    """Whether a word or number ends after so many characters: stack_1 is not the stack of stack_10-0003."""
    around = name[length - 1 : length + 1]
    return len(around) < 2 or not (around.isdigit() or around.isalpha())


def _slice_of(name):
    """The name without the part that differs between crops of a slice, such as `_crop3` or `_pos_class_0_crop3`."""
    return re.sub(r"(_(pos|neg)_class_[^-_.]+)?[-_. ](crop|tile|patch)[-_]?[0-9]+", "", name, flags=re.IGNORECASE)


def _runs_per_stack(slices):
    """The number of runs to cut each stack into: in proportion to its slices, at least 1; RUNS in all if possible."""
    runs = [1] * len(slices)
    while sum(runs) < min(RUNS, sum(slices)):
        longest = max(range(len(slices)), key=lambda i: slices[i] / runs[i])
        runs[longest] += 1
    return runs


# ---------------------------------------------------------------------------------------------------------------
# Counts of the blocks


class Columns(NamedTuple):
    """The counts of each block at some of the thresholds."""

    counts: np.ndarray  # (4, blocks, P) float64: tp, fp, fn, tn
    points: np.ndarray  # (P,) int: indices of these thresholds, increasing, in the list of thresholds
    coarse: np.ndarray  # (C,) int: indices of the coarse ones
    thresholds: np.ndarray  # (N,) float32: the list
    within: np.ndarray  # int: the columns among which the threshold may be chosen
    x: int  # the column of the trained threshold
    half: int  # the column of 0.5


def _coarse(thresholds, block_histograms):
    """Indices of the coarse thresholds, those at which the blocks were counted, in the list of thresholds."""
    number = block_histograms.shape[-1] - 1
    return np.arange(number) * -(-len(thresholds) // number)


def _columns(thresholds, histogram, block_histograms, index, low, high, fewer=False):
    """The Columns at the trained threshold, at 0.5, and at all coarse thresholds, or some 350 of them if `fewer`.

    The other arguments are those of `assess`. Between two coarse thresholds, the pixels of a block are assumed to be
    spread as those of all blocks together are, inside and outside the class separately. So the blocks add up to the
    counts of all images exactly.
    """
    half, coarse = int(np.searchsorted(thresholds, 0.5)), _coarse(thresholds, block_histograms)
    points = coarse
    if fewer:  # all near the trained one, where replicates choose, and some everywhere
        near = np.searchsorted(coarse, index)
        points = [*coarse[:: -(-len(coarse) // 256)], *coarse[max(near - 48, 0) : near + 49]]
    points = np.unique([*points, index, half])
    ends = np.append(coarse, histogram.shape[1] - 1)
    left = np.searchsorted(coarse, points, side="right") - 1  # the last coarse threshold up to the point
    below = np.cumsum(histogram, axis=1)
    before, between = below[:, points] - below[:, ends[left]], below[:, ends[left + 1]] - below[:, ends[left]]
    part = ratio(before, between)
    below = np.cumsum(block_histograms, axis=2, dtype=np.float64)
    negative = below[:, :, left] + part * block_histograms[:, :, left + 1]  # bin left + 1 is that above the threshold
    positive = below[:, :, -1:] - negative
    counts = np.stack([positive[:, 1], positive[:, 0], negative[:, 1], negative[:, 0]])
    within = np.flatnonzero((points >= low) & (points <= high))
    return Columns(counts, points, coarse, thresholds, within, *np.searchsorted(points, [index, half]))


def _best_columns(values, counts, metric, columns):
    """The columns in which each row's metric is best, chosen as in the training.

    `values`, shape (rows, P), is the metric of `counts`, shape (4, rows, P), in `columns`. Only those within the bounds
    count where the metric's constraint holds; if it holds nowhere, those that come closest to its level.

    Returns three int arrays, shape (rows,): the first and the last of these columns, and the index of the threshold in
    the middle between them.
    """
    choice = values[:, columns.within]
    if metric.constraint is not None:
        counts = counts[:, :, columns.within]
        allowed = metric.allowed(*counts)
        nowhere = ~allowed.any(axis=1)
        choice = np.where(allowed, choice, -np.inf)
        choice[nowhere] = metric.constraint(*counts[:, nowhere])
    best = choice == choice.max(axis=1, keepdims=True)
    thresholds = columns.thresholds[columns.points].astype(np.float64)
    first, last = (columns.within[ends] for ends in widest_stretch(thresholds[columns.within], best))
    return first, last, np.searchsorted(columns.thresholds, (thresholds[first] + thresholds[last]) / 2)


# ---------------------------------------------------------------------------------------------------------------
# Intervals


@dataclass(frozen=True)
class Confidence:
    """What the blocks say about one class.

    Intervals are pairs of floats with the level LEVEL. All but the range for the next stack contain their value.
    """

    blocks: int  # those that contain pixels inside the class and outside it; intervals rest on them
    worth: float | None  # how many blocks with equally many pixels of the class they are worth; None if none has any
    gain: float | None  # metric at x minus metric at 0.5; None if 0.5 does not meet the metric's constraint
    constraint_value: float | None  # the constraint's metric at x; None if the metric has no constraint
    why_no_interval: str | None  # why all of the following intervals are None; None if they are not
    why_no_next_stack: str | None  # None if there is a range for the next stack
    x_interval: tuple | None = None  # of the trained threshold x; both limits are in the list of thresholds
    metric_interval: tuple | None = None  # of the class metric at x
    expected_metric: float | None = None  # metric at x, corrected because x was chosen on the same images
    gain_interval: tuple | None = None
    constraint_interval: tuple | None = None
    next_stack_interval: tuple | None = None  # the range for the metric of one new stack at x
    band_low: np.ndarray | None = None  # (C,) float64: the limits of the metric at every coarse threshold
    band_high: np.ndarray | None = None

    @property
    def gain_unclear(self):
        """Whether the gain's interval contains 0: x is not shown to be better than 0.5."""
        return self.gain_interval is not None and self.gain_interval[0] <= 0 <= self.gain_interval[1]


def assess(thresholds, histogram, block_histograms, metric, index, low, high, kind="stacks"):
    """Intervals of a trained threshold, its metric and its gain over 0.5, and what to expect on new images.

    Parameters
    ----------
    thresholds : float32 array, shape (N,), increasing, with 0.5
    histogram : integer array, shape (2, N + 1)
        Pixels per truth (0 outside the mask, 1 inside) and bin: bin k holds (thresholds[k - 1], thresholds[k]].
    block_histograms : integer array, shape (blocks, 2, C + 1)
        The same per block, in the bins of every s-th threshold, thresholds[::s], C in all.
    metric : models.ClassMetric
    index : int
        The trained threshold is thresholds[index].
    low, high : int
        It was chosen among thresholds[low : high + 1].
    kind : str
        Blocks.kind.

    Returns
    -------
    Confidence
    """
    counts = confusion(histogram)
    half, full = int(np.searchsorted(thresholds, 0.5)), metric(*counts)
    blocks = int(block_histograms.any(axis=2).all(axis=1).sum())
    inside = block_histograms[:, 1].sum(axis=1).astype(np.float64)
    reason = _why_no_interval(metric, blocks, len(block_histograms), kind)
    of_runs = f"the images are divided into {kind}, which say nothing about one new stack"
    known = Confidence(
        blocks=blocks,
        worth=float(inside.sum() ** 2 / (inside**2).sum()) if inside.any() else None,
        gain=float(full[index] - full[half]) if metric.allowed(*counts)[half] else None,
        constraint_value=float(metric.constraint(*counts)[index]) if metric.constraint else None,
        why_no_interval=reason,
        why_no_next_stack=reason or (None if kind == "stacks" else of_runs),
    )
    if reason:
        return known
    columns = _columns(thresholds, histogram, block_histograms, index, low, high, fewer=True)
    return replace(known, **_intervals(columns, counts, metric, known))


def _why_no_interval(metric, blocks, all_blocks, kind):
    if metric.name in ("precision", "recall"):
        return (
            f"{metric.name} alone is best at an end of the list of thresholds, whatever the images, so that no "
            f"interval holds: use {metric.name}_at_{'recall' if metric.name == 'precision' else 'precision'}_<level>"
        )
    if blocks >= FEWEST_BLOCKS:
        return None
    here = f"here {'is' if blocks == 1 else 'are'} {blocks}" + (f" of {all_blocks}" if blocks < all_blocks else "")
    return (
        f"an interval needs {FEWEST_BLOCKS} {kind} that contain pixels of the class and other pixels, {here}: use "
        f"images of {FEWEST_BLOCKS} stacks with the class, or of {FEWEST_BLOCKS} slices for an interval that speaks "
        "only of their stacks"
    )


def _intervals(columns, counts, metric, known):
    """The fields that Confidence has besides those `known`, from a bootstrap over blocks (Efron, 1979).

    Each replicate draws as many blocks as there are, with replacement, adds up their counts, and chooses a threshold.
    A replicate's best metric compares with that of all images at its threshold as our metric compares with that of all
    possible images. So the mean of the difference is the optimism of our metric (Efron, 1983), and its spread gives the
    intervals of metric, gain and constraint. Those of the threshold and of the curve are percentiles. `counts`
    are those of all images at every threshold.
    """
    points, coarse, full = columns.points, columns.coarse, metric(*counts)
    at_x, at_half = full[points[[columns.x, columns.half]]]
    values, first, middle, chosen = _replicates(columns, metric)
    own = metric(*chosen)  # of each replicate, at its own threshold
    pooled = full[points[first]]  # of all images, at that threshold
    optimism = max(float(np.mean(own - pooled - (values[:, columns.x] - at_x))), 0.0)

    limits = _percentiles(middle, points[columns.x], known.worth)
    found = {
        "x_interval": tuple(float(columns.thresholds[limit]) for limit in limits),
        "metric_interval": _interval(own, pooled, at_x, optimism, known, _scale(full)),
        "expected_metric": float(at_x) - optimism,
    }
    if known.gain is not None:
        gains = own - values[:, columns.half], pooled - at_half
        found["gain_interval"] = _interval(*gains, known.gain, optimism, known, (np.asarray, np.asarray))
    if metric.constraint is not None:
        reached = metric.constraint(*counts)
        pair = metric.constraint(*chosen), reached[points[first]]
        found["constraint_interval"] = _interval(*pair, known.constraint_value, 0.0, known, _scale(reached))
    if known.why_no_next_stack is None:
        found["next_stack_interval"] = _next_stack(columns.counts[..., columns.x], metric)
    # Between the points, the distance of the band from the curve is interpolated, so that the band follows the curve.
    limits = _percentiles(values.T, full[points], known.worth)
    band_low, band_high = (full[coarse] + np.interp(coarse, points, limit - full[points]) for limit in limits)
    return {**found, "band_low": band_low, "band_high": band_high}


def _weights(blocks):
    """How often each block is drawn in each replicate: float64 whole numbers, shape (REPLICATES, blocks).

    Over all replicates, every block is drawn equally often: this balanced bootstrap (Davison, Hinkley and Schechtman,
    1986) makes the means over replicates less random. RandomState's numbers are the same in every version of numpy and
    on every machine.
    """
    draws = np.random.RandomState(SEED).permutation(np.repeat(np.arange(blocks), REPLICATES)).reshape(REPLICATES, -1)
    rows = np.arange(REPLICATES)[:, None] * blocks
    return np.bincount((rows + draws).ravel(), minlength=REPLICATES * blocks).reshape(REPLICATES, -1).astype(np.float64)


def _replicates(columns, metric):
    """The metric of every replicate in every column, and what it chooses among them.

    Replicates in which no pixel, or every pixel, is of the class say nothing about its threshold and are left out.

    Returns the metric, shape (replicates, P), the first column and the middle of `_best_columns`, shape (replicates,),
    and the counts in that column, shape (4, replicates).
    """
    tp, fp, fn, tn = columns.counts[..., :1]
    weights = _weights(len(tp))
    totals = weights @ np.stack([tp + fn, fp + tn])
    telling = (totals > 0).all(axis=(0, 2))
    counts = weights[telling] @ columns.counts
    values = metric(*counts)
    first, _, middle = _best_columns(values, counts, metric, columns)
    return values, first, middle, counts[:, np.arange(len(first)), first]


def _scale(values, end=1e-6):
    """Functions to a scale on which a metric spreads evenly, and back, given many of its values.

    It is the logit for a metric in [0, 1], and the logit of (1 + value) / 2 for one in [-1, 1]: no limit is outside the
    range then. The logit is taken of `end` to 1 - `end`, which stand for what is beyond. Any other metric stays as it
    is.
    """
    if values.min() < -1 or values.max() > 1:
        return np.asarray, np.asarray
    lowest = -1 if values.min() < 0 else 0
    width = 1 - lowest
    return (
        lambda value: logit(np.clip((value - lowest) / width, end, 1 - end)),
        lambda value: expit(value) * width + lowest,
    )


def _interval(own, pooled, value, optimism, known, scale):
    """The interval of a number at a threshold that was chosen on the same images.

    `own` and `pooled`, shape (replicates,), are the number of each replicate at the threshold that it chose, and that
    of all images there. On `scale` the interval goes from (value - optimism) - t s to value + t s. The spread s is the
    standard deviation of own - pooled, times sqrt(m / (m - 1)) for m blocks. Student's t has max(k - 1, 1) degrees of
    freedom for blocks that are worth k: `known` holds m and k.
    """
    to_scale, from_scale = scale
    spread = np.std(to_scale(own) - to_scale(pooled)) * math.sqrt(known.blocks / (known.blocks - 1))
    reach = stdtrit(max(known.worth - 1, 1), (1 + LEVEL) / 2) * spread
    lower = from_scale(to_scale(value - optimism) - reach)
    upper = from_scale(to_scale(value) + reach)
    return float(min(lower, value - optimism)), float(max(upper, value))


def _percentiles(replicates, value, worth):
    """Lower and upper percentile along the last axis, moved if necessary so that they enclose the value itself.

    Percentiles of few blocks are too narrow. So for blocks that are worth k, the tails are widened by Student's t and
    by sqrt(k / (k - 1)) (Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician, 2015).
    """
    k = max(worth, 2)
    tail = ndtr(-math.sqrt(k / (k - 1)) * stdtrit(k - 1, (1 + LEVEL) / 2))
    last = replicates.shape[-1] - 1
    lower, upper = int(tail * last), last - int(tail * last)
    ordered = np.sort(replicates)
    return np.minimum(ordered[..., lower], value), np.maximum(ordered[..., upper], value)


def _next_stack(counts, metric):
    """The range for the metric of one new stack.

    On the logit scale it is mean -+ t s sqrt(1 + 1 / m), with mean and standard deviation s of the metrics of the m
    stacks that contain the class, and Student's t with m - 1 degrees of freedom. A metric closer than END to 0 or 1
    counts as END or 1 - END, because a stack without any hit has no logit; a limit beyond is 0 or 1. `counts`, shape
    (4, blocks), are those at the trained threshold.
    """
    own = metric(*counts[:, counts[0] + counts[2] > 0])
    to_scale, from_scale = _scale(own, END)
    scaled, m = to_scale(own), len(own)
    reach = stdtrit(m - 1, (1 + LEVEL) / 2) * scaled.std(ddof=1) * math.sqrt(1 + 1 / m)
    limits = scaled.mean() + reach * np.array([-1, 1])
    limits[limits <= to_scale(-np.inf)], limits[limits >= to_scale(np.inf)] = -np.inf, np.inf
    return tuple(from_scale(limits).tolist())


# ---------------------------------------------------------------------------------------------------------------
# The stacks themselves


class StackResult(NamedTuple):
    """One stack and one class; None where undefined."""

    stack: str
    images: int
    pixels: int  # of the class
    metric: float | None  # at the trained threshold
    metric_at_half: float | None
    own_x: float | None  # the stack's own best threshold
    own_metric: float | None  # and its metric there
    x_without: float | None  # the threshold and the pooled metric that all other stacks give
    metric_without: float | None


def stack_results(thresholds, histogram, block_histograms, blocks, metric, index, low, high):
    """What each stack does at the trained threshold, and what the others would give without it.

    `blocks` is a Blocks, the other arguments are those of `assess`. Thresholds are chosen among the trained one, 0.5
    and the coarse ones. Returns a list of StackResult: lowest metric first, stacks without the class last.
    """
    columns = _columns(thresholds, histogram, block_histograms, index, low, high)
    rest = columns.counts.sum(axis=1, keepdims=True) - columns.counts
    images, pixels = np.bincount(blocks.labels), block_histograms[:, 1].sum(axis=1)
    at_x, at_half = (np.where(pixels, metric(*columns.counts[..., k]), None) for k in (columns.x, columns.half))
    own, without = (_trained(counts, metric, columns) for counts in (columns.counts, rest))
    fields = blocks.names, images.tolist(), pixels.tolist(), at_x, at_half, *own, *without
    stacks = [StackResult(*values) for values in zip(*fields, strict=True)]
    return sorted(stacks, key=lambda stack: (stack.metric is None, stack.metric))


def _trained(counts, metric, columns):
    """The best threshold of each row of counts, and the metric there, as two lists.

    The trained threshold is kept where it is one of the best. The lists hold None where the constraint holds nowhere,
    or no pixel or every pixel is of the class.
    """
    values = metric(*counts)
    first, last, middle = _best_columns(values, counts, metric, columns)
    rows = np.arange(len(values))
    tp, fp, fn, tn = counts[:, rows, first]
    valid = metric.allowed(tp, fp, fn, tn) & (tp + fn > 0) & (fp + tn > 0)
    kept = (first <= columns.x) & (columns.x <= last)
    x = columns.thresholds[np.where(kept, columns.points[columns.x], middle)].astype(np.float64)
    return [np.where(valid, of_row, None).tolist() for of_row in (x, values[rows, first])]


# ---------------------------------------------------------------------------------------------------------------
# Guaranteed recall


class GuaranteedRecall(NamedTuple):
    """The threshold at which a new block of the same kind keeps at least `level` of its class pixels, on average."""

    level: float
    blocks: int  # those that contain the class: the guarantee rests on them, and is for new blocks that contain it
    reason: str | None = None  # why nothing can be guaranteed, and the following is None
    threshold: float | None = None
    precision: float | None = None  # of all images at that threshold
    recall: float | None = None  # of all images at that threshold: what the guarantee costs on top of the level


def guarantee_recall(thresholds, histogram, block_histograms, level, low, high, block_names):
    """The largest threshold with a guaranteed recall, by conformal risk control.

    It is the largest coarse threshold with (sum over the blocks of the miss rate + 1) / (blocks + 1) <= 1 - level
    (Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", 2022, theorem 1). Blocks without a pixel of
    the class have no miss rate and are left out. `level` is the recall to guarantee, in (0, 1), `block_names` is
    Blocks.names, the other arguments are those of `assess`. Returns a GuaranteedRecall.
    """
    tp, _, fn, _ = confusion(block_histograms)
    holding = np.flatnonzero(tp[:, 0] + fn[:, 0])
    blocks = len(holding)
    answer = functools.partial(GuaranteedRecall, level, blocks)
    allowance = (1 - level) * (blocks + 1) - 1 + ROUNDING  # upper limit of the sum of the blocks' miss rates
    if allowance < 0:
        needed = math.ceil(level / (1 - level) - ROUNDING)
        return answer(
            f"a recall of {level:g} needs {needed} stacks (or runs of slices) that contain the class, here are {blocks}"
        )
    coarse = _coarse(thresholds, block_histograms)
    within = np.flatnonzero((coarse >= low) & (coarse <= high))
    missed = (fn[holding] / (tp + fn)[holding])[:, within]
    if not len(within):
        return answer("no threshold at which blocks are counted lies within OPT_BOUNDS")
    worst = int(np.argmax(missed[:, 0]))
    if missed[worst, 0] > 1 - level + ROUNDING:
        return answer(
            f"{block_names[holding[worst]]} misses {missed[worst, 0]:.1%} of its pixels of the class even at the "
            f"lowest threshold, and the guarantee holds only where none misses more than {1 - level:.1%} there"
        )
    kept = np.flatnonzero(missed.sum(axis=0) <= allowance)
    if not len(kept):
        return answer(f"even at the lowest threshold too much of the class is missed for a recall of {level:g}")
    position = coarse[within[kept[-1]]]
    counts = [count[position] for count in confusion(histogram)]
    precision, recall = (float(CLASS_METRICS[name](*counts)) for name in ("precision", "recall"))
    return answer(None, float(thresholds[position]), precision, recall)
