"""How far a trained threshold can be trusted: intervals, the gain, what to expect on new images, guaranteed recall.

Everything is computed from counts per block. A block is a part of the images that can be taken as independent of the
other parts. docs/confidence.md says what is assumed and how it was checked.
"""

import functools
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from counts import confusion

LEVEL = 0.95  # of the intervals
REPLICATES = 2000  # of the bootstrap
SEED = 20200321
FEWEST_BLOCKS = 5  # with fewer, no interval covers what it promises
MOST_BLOCKS = 256  # so that the memory for their counts does not grow with the number of images
RUNS = 20  # number of runs of neighbouring slices, if there are too few stacks

# ---------------------------------------------------------------------------------------------------------------
# Blocks


@dataclass(frozen=True)
class Blocks:
    """Which block each image belongs to.

    Attributes
    ----------
    labels : int64 array, shape (images,)
        The block of each image, 0 to number - 1; every block has at least one image.
    number : int
        At most MOST_BLOCKS.
    kind : str
        What the blocks are: "stacks", "groups of stacks" or "runs of neighbouring slices".
    names : list of str, length number
        The stack's name; for runs "stack_1 run 3", for groups "stack_1 to stack_9".
    speaks_of : str
        What intervals from these blocks apply to, as the end of a sentence "Intervals ... speak of ...".
    warnings : list of str
        Sentences about names of stacks and images that do not fit together.
    """

    labels: np.ndarray
    number: int
    kind: str
    names: list
    speaks_of: str
    warnings: list


def blocks_of(names, stacks, all_names=None):
    """Divide images into blocks: stacks, or, if there are too few stacks, runs of neighbouring slices.

    Slices of one stack resemble each other, and crops of one slice even more. So the unit is the stack. With fewer than
    FEWEST_BLOCKS stacks, each is cut into runs of neighbouring slices, RUNS in all if there are enough slices; all
    crops of a slice stay together. More than MOST_BLOCKS stacks are joined to MOST_BLOCKS groups of stacks that follow
    each other in natural order.

    Parameters
    ----------
    names : sequence of str
        The names of all images used, in any order. A name begins with the name of its stack.
    stacks : list of str, or anything
        What `dataset_config.dataset_split` names for this split. Stacks without images are ignored, and so is
        everything that is not a text. Images that belong to none of the stacks count as one more stack, because nothing
        tells them apart.

    all_names : sequence of str, optional
        The names of all images of the split, where `names` are a subset of them: a stack without an image is warned of
        only if it has none in the whole split.

    Returns
    -------
    Blocks
    """
    stacks = stacks if isinstance(stacks, (list, tuple)) else []
    stacks = {stack for stack in stacks if isinstance(stack, str) and stack}
    lengths = sorted({len(stack) for stack in stacks}, reverse=True)  # the longest name that fits is the stack's
    images_of = {}
    for image, name in enumerate(names):
        beginnings = (name[:length] for length in lengths)
        stack = next((stack for stack in beginnings if stack in stacks and _ends_a_word(stack, name)), None)
        images_of.setdefault(stack, []).append(image)

    ordered = sorted(images_of, key=lambda stack: (stack is None, natural_order(stack or "")))
    labels = np.zeros(len(names), np.int64)
    if len(ordered) >= FEWEST_BLOCKS:
        number = min(len(ordered), MOST_BLOCKS)
        for rank, stack in enumerate(ordered):
            labels[images_of[stack]] = rank * number // len(ordered)
        kind = "stacks" if number == len(ordered) else "groups of stacks"
        names = [str(name) for name in range(number)]
        return Blocks(labels, number, kind, names, f"further stacks of the same kind as these {len(ordered)}", [])

    slices_of = {stack: {} for stack in ordered}
    for stack, images in images_of.items():
        for image in images:
            slices_of[stack].setdefault(_slice_of(names[image]), []).append(image)
    number = 0
    runs = _runs_per_stack([len(slices_of[stack]) for stack in ordered])
    for stack, runs_here in zip(ordered, runs, strict=True):
        slices = sorted(slices_of[stack], key=natural_order)
        for rank, slice_ in enumerate(slices):
            labels[slices_of[stack][slice_]] = number + rank * runs_here // len(slices)
        number += runs_here
    if ordered == [None]:
        of = "images like these, taken in the order of their names, as no stacks are named"
    elif len(ordered) == 1:
        of = "slices of this one stack, not of others"
    else:
        of = f"slices of these {len(ordered)} stacks, not of others"
    return Blocks(
        labels, number, "runs of neighbouring slices", [str(name) for name in range(number)], f"further {of}", []
    )


def natural_order(text):
    """A key to sort names by, which puts slice_2 before slice_10."""
    parts = re.split("([0-9]+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def _ends_a_word(stack, name):
    """Whether a word or number in the name ends with the stack's name: stack_1 is not the stack of stack_10-0003."""
    following = name[len(stack) : len(stack) + 1]
    same_number = stack[-1].isdigit() and following.isdigit()
    same_word = stack[-1].isalpha() and following.isalpha()
    return not same_number and not same_word


def _slice_of(name):
    """The name without the part that differs between crops of a slice, such as `_crop3` or `_pos_class_0_crop3`."""
    return re.sub(r"(_(pos|neg)_class_[^-_.]+)?[-_. ](crop|tile|patch)[-_]?[0-9]+", "", name, flags=re.IGNORECASE)


def _runs_per_stack(slices):
    """The number of runs to cut each stack into: in proportion to its slices, at least 1; RUNS in all if possible."""
    runs = [1] * len(slices)
    while sum(runs) < min(RUNS, sum(slices)):
        longest = max(range(len(slices)), key=lambda i: Fraction(slices[i], runs[i]))
        runs[longest] += 1
    return runs


# ---------------------------------------------------------------------------------------------------------------
# Intervals


@dataclass(frozen=True)
class Confidence:
    """What the blocks say about one class. Intervals have the level LEVEL, and each contains its value.

    Attributes
    ----------
    blocks : int
        Number of blocks that the intervals rest on: those that contain pixels inside the class and outside it.
    worth : float or None
        How many blocks with equally many pixels of the class they are worth (Kish); None without such a block.
    reason : str or None
        Why there are no intervals and no expected metric; None if there are.
    x_interval : (float, float) or None
        Of the trained threshold; both limits are in the list of thresholds.
    metric_interval : (float, float) or None
        Of the class metric at the trained threshold.
    expected_metric : float or None
        The class metric at the trained threshold, corrected because the threshold was chosen on the same images.
    gain : float or None
        The class metric at the trained threshold minus the class metric at 0.5; None if 0.5 does not meet the metric's
        constraint.
    gain_interval : (float, float) or None
    gain_unclear : bool
        Whether the gain's interval contains 0: then the threshold is not shown to be better than 0.5.
    next_stack_interval : (float, float) or None
        The range for the class metric of one new stack at the trained threshold.
    why_no_next_stack : str or None
        Why there is no such range; None if there is.
    constraint_value : float or None
        The metric of the constraint at the trained threshold; None if the metric has no constraint.
    constraint_interval : (float, float) or None
        Of the constraint's metric at the trained threshold.
    band_low, band_high : float64 arrays, shape (C,), or None
        The limits of the class metric at every coarse threshold; None if there are no intervals.
    """

    blocks: int
    worth: float | None
    reason: str | None
    x_interval: tuple | None
    metric_interval: tuple | None
    expected_metric: float | None
    gain: float | None
    gain_interval: tuple | None
    gain_unclear: bool
    next_stack_interval: tuple | None
    why_no_next_stack: str | None
    constraint_value: float | None
    constraint_interval: tuple | None
    band_low: np.ndarray | None
    band_high: np.ndarray | None


def assess(thresholds, histogram, block_histograms, metric, index, low, high, kind="stacks"):
    """Intervals of a trained threshold, its metric and its gain over 0.5, and what to expect on new images.

    A bootstrap over blocks (Efron, 1979): each replicate draws as many blocks as there are, with replacement, adds up
    their counts, and chooses a threshold. The intervals of threshold and gain and the band are percentiles, with tails
    that are widened for few blocks (Hesterberg, "What Teachers Should Know About the Bootstrap", The American
    Statistician 69, 2015). The best metric of a replicate minus the metric of all images at that threshold is the
    optimism of a metric whose threshold was chosen on the same images (Efron, 1983). Its mean gives the expected
    metric, and its spread the metric's interval. Replicates in which no pixel, or every pixel, is of the class say
    nothing about its threshold and are left out.

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
    coarse = np.arange(block_histograms.shape[2] - 1) * _stride(thresholds, block_histograms)
    half = int(np.searchsorted(thresholds, 0.5))
    counts = confusion(histogram)
    full = metric(*counts)
    at_x, at_half = float(full[index]), float(full[half])
    gain = at_x - at_half if bool(metric.allowed(*(count[half : half + 1] for count in counts))[0]) else None
    blocks = int(block_histograms.any(axis=2).all(axis=1).sum())
    if blocks < FEWEST_BLOCKS:
        return Confidence(
            blocks=blocks,
            worth=None,
            reason=_too_few(blocks, len(block_histograms)),
            x_interval=None,
            metric_interval=None,
            expected_metric=None,
            gain=gain,
            gain_interval=None,
            gain_unclear=False,
            next_stack_interval=None,
            why_no_next_stack="not yet",
            constraint_value=None,
            constraint_interval=None,
            band_low=None,
            band_high=None,
        )

    points = np.unique(np.concatenate([_points_to_try(coarse, index), [index, half]]))
    x_column, half_column = np.searchsorted(points, [index, half])
    values, chosen, chosen_values = _replicates(histogram, block_histograms, coarse, points, metric, low, high)
    tail = _tail(blocks)

    # A replicate's best compares with all images at that threshold as our metric compares with all possible images.
    optimism = float(np.mean(chosen_values - full[chosen] - (values[:, x_column] - at_x)))
    expected = at_x - max(optimism, 0.0)
    metric_interval = _limits_of_the_best(chosen_values, full[chosen], at_x, expected, blocks, full.min() < 0)
    x_low, x_high = _limits(chosen, tail, index)
    gain_interval = None
    if gain is not None:
        gain_interval = _limits(values[:, x_column] - values[:, half_column], tail, gain)
        gain_interval = (float(gain_interval[0]) - (at_x - expected), float(gain_interval[1]))

    # Between the points, the distance of the band from the curve is interpolated, so that the band follows the curve.
    limits = _limits(values.T, tail, full[points])
    band_low, band_high = (full[coarse] + np.interp(coarse, points, limit - full[points]) for limit in limits)
    return Confidence(
        blocks=blocks,
        worth=None,
        reason=None,
        x_interval=(float(thresholds[x_low]), float(thresholds[x_high])),
        metric_interval=metric_interval,
        expected_metric=expected,
        gain=gain,
        gain_interval=gain_interval,
        gain_unclear=gain_interval is not None and gain_interval[0] <= 0,
        next_stack_interval=None,
        why_no_next_stack="not yet",
        constraint_value=None,
        constraint_interval=None,
        band_low=band_low,
        band_high=band_high,
    )


def _too_few(blocks, of):
    here = f"here {'is' if blocks == 1 else 'are'} {blocks}" + (f" of {of}" if blocks < of else "")
    return (
        f"an interval needs {FEWEST_BLOCKS} blocks that contain pixels of the class and other pixels, {here}: use "
        f"images of {FEWEST_BLOCKS} stacks with the class, or of {FEWEST_BLOCKS} slices for an interval that speaks "
        "only of their stacks"
    )


def _stride(thresholds, block_histograms):
    """The step in the list of thresholds from one coarse threshold to the next."""
    return -(-len(thresholds) // (block_histograms.shape[2] - 1))


def _points_to_try(coarse, index):
    """Some 350 coarse thresholds: all near the trained threshold, where replicates choose, and some everywhere."""
    near = np.searchsorted(coarse, index)
    return np.concatenate([coarse[:: -(-len(coarse) // 256)], coarse[max(near - 48, 0) : near + 49]])


@functools.lru_cache(maxsize=1)
def _weights(blocks):
    """How often each block is drawn in each replicate; over all replicates, every block is drawn equally often.

    This balanced bootstrap (Davison, Hinkley and Schechtman, 1986) makes the means over replicates less random.
    RandomState's numbers are the same in every version of numpy and on every machine.

    Returns
    -------
    float64 array, shape (REPLICATES, blocks)
        Whole numbers; each row adds up to `blocks`.
    """
    draws = np.random.RandomState(SEED).permutation(np.repeat(np.arange(blocks), REPLICATES)).reshape(REPLICATES, -1)
    rows = np.arange(REPLICATES)[:, None] * blocks
    return np.bincount((rows + draws).ravel(), minlength=REPLICATES * blocks).reshape(REPLICATES, -1).astype(np.float64)


def _replicates(histogram, block_histograms, coarse, points, metric, low, high):
    """The metric of every replicate at some thresholds, and the threshold that it chooses.

    Parameters
    ----------
    coarse : int array, shape (C,)
        Positions of the coarse thresholds in the list of thresholds.
    points : increasing int array, shape (P,)
        Positions to evaluate. Between two coarse thresholds, the pixels of a block are assumed to be spread as those of
        all blocks are, for each truth. So the blocks add up to the counts of all images exactly.

    Returns
    -------
    values : float64 array, shape (replicates, P)
    chosen : int array, shape (replicates,)
        Position of the threshold that a replicate chooses. As in the training, it is the middle of the widest stretch
        of the best allowed thresholds, but widths are counted in positions. If no threshold meets the constraint, it is
        chosen from those that come closest.
    chosen_values : float64 array, shape (replicates,)
        The replicate's metric at the lowest threshold of that stretch.
    """
    weights = _weights(len(block_histograms))
    tp, fp, fn, tn = confusion(block_histograms)
    positives, negatives = weights @ (tp + fn)[:, 0].astype(np.float64), weights @ (fp + tn)[:, 0].astype(np.float64)
    telling = (positives > 0) & (negatives > 0)
    weights, positives, negatives = weights[telling], positives[telling, None], negatives[telling, None]

    # `left`: the last coarse threshold up to the point. `part`: of the pixels between that one and the next coarse
    # threshold, the part below the point.
    left = np.searchsorted(coarse, points, side="right") - 1
    ends = np.append(coarse, histogram.shape[1] - 1)
    below = np.cumsum(histogram, axis=1)
    inside, before = below[:, ends[left + 1]] - below[:, ends[left]], below[:, points] - below[:, ends[left]]
    part = np.divide(before, inside, out=np.zeros(inside.shape), where=inside > 0)
    between = np.flatnonzero(points > coarse[left])

    def at_points(above, part):
        """(replicates, P): pixels above each point, for one truth, from the blocks' pixels above coarse thresholds."""
        above = np.pad(above, ((0, 0), (0, 1))).astype(np.float64)  # nothing is above the end of the list
        drawn = chunk @ above[:, left]
        drawn[:, between] -= part[between] * (drawn[:, between] - chunk @ above[:, left[between] + 1])
        return drawn

    inside_bounds = np.flatnonzero((points >= low) & (points <= high))
    values = np.empty((len(points), len(weights))).T  # column by column, as `_limits` will read it
    chosen, chosen_values = [], []
    for start in range(0, len(weights), 200):  # few enough for the arrays to fit into a processor's cache
        rows = slice(start, start + 200)
        chunk = weights[rows]
        tp_drawn, fp_drawn = at_points(tp, part[1]), at_points(fp, part[0])
        counts = (tp_drawn, fp_drawn, positives[rows] - tp_drawn, negatives[rows] - fp_drawn)
        values[rows] = metric(*counts)
        choice = values[rows][:, inside_bounds]
        if metric.constraint is not None:
            within = [count[:, inside_bounds] for count in counts]
            allowed = metric.allowed(*within)
            choice = np.where(allowed, choice, -np.inf)
            none = ~allowed.any(axis=1)
            choice[none] = metric.constraint(*within)[none]
        first, last = _widest_stretches(choice == choice.max(axis=1, keepdims=True), points[inside_bounds])
        chosen.append((points[inside_bounds][first] + points[inside_bounds][last]) // 2)
        chosen_values.append(values[rows][np.arange(len(chunk)), inside_bounds[first]])
    return values, np.concatenate(chosen), np.concatenate(chosen_values)


def _widest_stretches(best, positions):
    """First and last column of the widest run of true values in each row; the first one if several are equally wide.

    Parameters
    ----------
    best : bool array, shape (rows, n), at least one true in each row
    positions : increasing int array, shape (n,)
        The positions of the columns, which give the widths.

    Returns
    -------
    first, last : int arrays, shape (rows,)
    """
    row, column = np.nonzero(best)
    starts = np.flatnonzero(np.diff(row, prepend=-1) | (np.diff(column, prepend=-2) != 1))
    ends = np.append(starts[1:], len(row)) - 1
    width = positions[column[ends]] - positions[column[starts]]
    order = np.lexsort((column[starts], -width, row[starts]))
    widest = order[np.searchsorted(row[starts][order], np.arange(len(best)))]
    return column[starts[widest]], column[ends[widest]]


def _limits_of_the_best(best, of_all, metric, expected, blocks, signed):
    """The interval of a metric whose threshold was chosen on the same images.

    Student's t with the spread of `best` around `of_all`, on the logit scale: there the distribution of a metric is
    more symmetric, and no limit is outside [0, 1]. A metric in [-1, 1] takes Fisher's z, the logit for that range. The
    lower limit is computed from the expected metric, the upper limit from the metric itself.

    Parameters
    ----------
    best, of_all : float64 arrays, shape (replicates,)
        Each replicate's metric at the threshold that it chose, and the metric of all images there.
    metric, expected : float
    blocks : int
    signed : bool
        Whether the metric lies in [-1, 1] instead of [0, 1].

    Returns
    -------
    (float, float)
    """
    from scipy.special import stdtrit

    def stretched(value):
        value = value if signed else 2 * value - 1
        return np.arctanh(np.clip(value, -1 + 1e-6, 1 - 1e-6))

    def back(value):
        return float(np.tanh(value) if signed else (np.tanh(value) + 1) / 2)

    spread = np.std(stretched(best) - stretched(of_all)) * math.sqrt(blocks / (blocks - 1))
    reach = stdtrit(blocks - 1, (1 + LEVEL) / 2) * spread
    return min(back(stretched(expected) - reach), expected), max(back(stretched(metric) + reach), metric)


def _tail(blocks):
    """The probability in each tail, widened by Student's t and n / (n - 1), because percentiles are too narrow."""
    from scipy.special import ndtr, stdtrit  # not at the top: a first run imports scipy while the network runs

    return float(ndtr(-math.sqrt(blocks / (blocks - 1)) * stdtrit(blocks - 1, (1 + LEVEL) / 2)))


def _limits(replicates, tail, value):
    """Lower and upper percentile along the last axis, moved if necessary so that they enclose the value itself."""
    last = replicates.shape[-1] - 1
    k = int(tail * last)
    ordered = np.partition(replicates, [k, last - k], axis=-1)
    return np.minimum(ordered[..., k], value), np.maximum(ordered[..., last - k], value)


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
    """What each stack does at the trained threshold, and without it.

    Parameters
    ----------
    thresholds, histogram, block_histograms, metric, index, low, high
        As in `assess`.
    blocks : Blocks

    Returns
    -------
    list of StackResult
        Worst metric first; stacks without the class last.
    """
    return []


# ---------------------------------------------------------------------------------------------------------------
# Guaranteed recall


@dataclass(frozen=True)
class GuaranteedRecall:
    """The threshold at which a new block of the same kind keeps at least `level` of its class pixels, on average.

    Attributes
    ----------
    level : float
    threshold : float or None
        None if nothing can be guaranteed; `reason` says why.
    precision : float or None
        The precision of all images at that threshold.
    recall : float or None
        The recall of all images at that threshold.
    blocks : int
        Number of blocks that contain the class. The guarantee rests on them and is for new blocks that contain it.
    reason : str or None
    """

    level: float
    threshold: float | None
    precision: float | None
    recall: float | None
    blocks: int
    reason: str | None


def guarantee_recall(thresholds, histogram, block_histograms, level, low, high, block_names):
    """The largest threshold with a guaranteed recall, by conformal risk control.

    It is the largest coarse threshold with (sum over the blocks of the miss rate + 1) / (blocks + 1) <= 1 - level
    (Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", 2022, theorem 1). Blocks without a pixel of
    the class have no miss rate and are left out.

    Parameters
    ----------
    thresholds, histogram, block_histograms, low, high
        As in `assess`.
    level : float
        The recall to guarantee, in (0, 1).
    block_names : list of str
        Blocks.names.

    Returns
    -------
    GuaranteedRecall
    """
    # Exactly the decimal number that was asked for: with floats, 10 * (1 - 0.9) is less than 1.
    level = float(level)
    lost = 1 - Fraction(repr(level))
    tp, fp, fn, _ = confusion(block_histograms)
    holding = tp[:, 0] + fn[:, 0] > 0
    blocks = int(holding.sum())

    def none(reason):
        return GuaranteedRecall(level, None, None, None, blocks, reason)

    allowance = float(lost * (blocks + 1) - 1)  # upper limit of the sum of the blocks' miss rates
    if allowance < 0:
        needed = math.ceil((1 - lost) / lost)
        return none(f"a guaranteed recall of {level:g} needs {needed} blocks that contain the class, here are {blocks}")
    missed = np.sum(fn[holding] / (tp + fn)[holding], axis=0)
    coarse = np.arange(len(missed)) * _stride(thresholds, block_histograms)
    kept = np.flatnonzero((missed <= allowance) & (coarse >= low) & (coarse <= high))
    if not len(kept):
        return none(
            f"the blocks miss too much for a guaranteed recall of {level:g} even at the lowest threshold allowed"
        )
    position = coarse[kept[-1]]
    tp, fp, fn, _ = (int(count[position]) for count in confusion(histogram))
    precision = tp / (tp + fp) if tp + fp else 0.0
    return GuaranteedRecall(level, float(thresholds[position]), precision, tp / (tp + fn), blocks, None)
