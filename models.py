"""The science: class metrics, and the training of thresholds on counts."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment, minimize_scalar

from counts import HALF, THRESHOLDS, confusion
from errors import ConfigurationError, ModelError, NotConvergedError, UsageError

# The settings of scipy.optimize.minimize_scalar; the result records them. If a class does not converge, raise maxiter
# or the tolerance.
OPT_BOUNDS = [0.0, 1.0]  # lowest and highest threshold
OPT_METHOD = "bounded"  # or "brent" or "golden"
OPT_TOL = 1e-4  # on the threshold: absolute for bounded, relative for brent and golden
OPT_OPTIONS = {"maxiter": 500}  # maxiter, disp, and xatol (bounded) or xtol (brent, golden) instead of OPT_TOL


# ---------------------------------------------------------------------------------------------------------------
# Class metrics


def ratio(numerator, denominator):
    """numerator / denominator of two arrays of one shape, as float64, with 0 / 0 = 0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator != 0)


def matthews_corrcoef(tp, fp, fn, tn):
    """Correlation between mask and prediction (Matthews, 1975), in [-1, 1]; 0 if one of them is constant."""
    tp, fp, fn, tn = (count.astype(np.float64) for count in (tp, fp, fn, tn))  # products of int64 would overflow
    return ratio(tp * tn - fp * fn, np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn))


# To add a metric, add a line. A metric is a function of four arrays of one shape, with numbers of pixels: true
# positives, false positives, false negatives, true negatives. It returns an array of that shape. Larger is better.
# Divide with `ratio`, because 0 / 0 is 0 here.
CLASS_METRICS = {
    "iou_score": lambda tp, fp, fn, tn: ratio(tp, tp + fp + fn),
    "f1_score": lambda tp, fp, fn, tn: ratio(2 * tp, 2 * tp + fp + fn),
    "f2_score": lambda tp, fp, fn, tn: ratio(5 * tp, 5 * tp + fp + 4 * fn),
    "precision": lambda tp, fp, fn, tn: ratio(tp, tp + fp),
    "recall": lambda tp, fp, fn, tn: ratio(tp, tp + fn),
    "binary_accuracy_tfkeras": lambda tp, fp, fn, tn: ratio(tp + tn, tp + fp + fn + tn),
    "binary_accuracy_sm": lambda tp, fp, fn, tn: ratio(tp + tn, tp + fp + fn + tn),
    "balanced_accuracy": lambda tp, fp, fn, tn: (ratio(tp, tp + fn) + ratio(tn, tn + fp)) / 2,
    "matthews_corrcoef": matthews_corrcoef,
}

# Name without its level: the metric to make best, and the metric that must reach the level.
CONSTRAINED_METRICS = {
    "precision_at_recall": ("precision", "recall"),
    "recall_at_precision": ("recall", "precision"),
    "iou_score_at_recall": ("iou_score", "recall"),
}
METRIC_NAMES = [*CLASS_METRICS, *(f"{name}_<level>" for name in CONSTRAINED_METRICS)]

# Words in other names that people use for a metric.
ALSO_CALLED = {
    "f1": "f1_score",
    "dice": "f1_score",
    "iou": "iou_score",
    "jaccard": "iou_score",
    "sensitivity": "recall",
    "balanced": "balanced_accuracy",
    "accuracy": "binary_accuracy_sm",
    "mcc": "matthews_corrcoef",
}


class ClassMetric(NamedTuple):
    """A class metric to make best; with a constraint, only where a second metric reaches a level."""

    name: str
    value: Callable  # the metric, as described above CLASS_METRICS
    constraint: Callable | None = None  # the second metric
    level: float | None = None  # what the second metric must reach, in (0, 1)
    constraint_name: str | None = None  # of the second metric

    def __call__(self, tp, fp, fn, tn):
        """The metric as a float64 array, whether its constraint holds or not."""
        return self.value(tp, fp, fn, tn)

    def allowed(self, tp, fp, fn, tn):
        """Whether the second metric reaches the level, as a bool array; all true without a constraint."""
        if self.constraint is None:
            return np.ones(np.shape(tp), bool)
        return self.constraint(tp, fp, fn, tn) >= self.level


def class_metric(name):
    """The ClassMetric with this name: a key of CLASS_METRICS, or a key of CONSTRAINED_METRICS with a level.

    The level is a decimal number in (0, 1) with at most 15 digits after the point, as in precision_at_recall_0.95.
    Raises UsageError if there is no such metric.
    """
    option = "--optimizing-class-metric"
    if name in CLASS_METRICS:
        return ClassMetric(name, CLASS_METRICS[name])
    form, _, level = name.rpartition("_")
    if form in CONSTRAINED_METRICS:
        if not re.fullmatch(r"0?\.[0-9]{1,15}", level) or not float(level):
            raise UsageError(f"{option} {name}: write the level as a decimal number between 0 and 1, as in {form}_0.95")
        value, constraint = CONSTRAINED_METRICS[form]
        return ClassMetric(name, CLASS_METRICS[value], CLASS_METRICS[constraint], float(level), constraint)
    if name == "binary_cross_entropy":
        raise UsageError(f"{option} binary_cross_entropy does not depend on a threshold: choose another metric")
    meant = [f"did you mean {known}? " for word, known in ALSO_CALLED.items() if word in name.lower()]
    raise UsageError(f"{option} {name!r}: {''.join(meant[:1])}choose one of {', '.join(METRIC_NAMES)}")


# ---------------------------------------------------------------------------------------------------------------
# Thresholds

TOLERANCES = {"bounded": "xatol", "brent": "xtol", "golden": "xtol"}  # what minimize_scalar calls OPT_TOL, by method
TIE = 1e-14  # metrics that differ by no more are equal: IoU and F1 have the same optima, but round differently
USELESS = 0.01  # a mask with less than this part of the class in it, or of the other pixels outside it, is of no use


@dataclass
class TrainedThreshold:
    """The trained threshold of one class. Every threshold is one of THRESHOLDS, as a float."""

    index: int  # of x in THRESHOLDS
    x: float  # the trained threshold
    metric: float  # the class metric at x: the best within OPT_BOUNDS where the constraint holds
    metric_at_half: float  # at 0.5, whether the constraint holds there or not
    best_stretch: tuple  # lowest and highest threshold of the stretch around x where the metric is the same
    outcome: dict  # success, status and message of minimize_scalar
    history: list  # (threshold, metric) of every evaluation by minimize_scalar within OPT_BOUNDS, then of x
    warnings: list  # sentences


@dataclass
class ClassCurve:
    """One class at every threshold of THRESHOLDS."""

    counts: tuple  # true positives, false positives, false negatives, true negatives: each int64, shape (N,)
    metric: np.ndarray  # (N,) float64: the class metric without its constraint


def check_trainable(counts, class_titles):
    """Raise ModelError if, in a counts.Counts, every pixel of a class is in its masks, or none is."""
    for title, (outside, inside) in zip(class_titles, counts.histogram.sum(axis=-1), strict=True):
        if not inside or not outside:
            raise ModelError(
                f"{title} cannot be trained: {'every' if inside else 'no'} pixel of the {counts.images} images used is "
                "in its masks; use other images, or more of them"
            )


def optimisation_range():
    """Indices of the first and the last of THRESHOLDS within OPT_BOUNDS.

    Raises ConfigurationError if OPT_BOUNDS, OPT_METHOD or OPT_OPTIONS cannot work.
    """
    low = int(np.searchsorted(THRESHOLDS, float(OPT_BOUNDS[0]), "left"))
    high = int(np.searchsorted(THRESHOLDS, float(OPT_BOUNDS[1]), "right")) - 1
    options = {TOLERANCES.get(OPT_METHOD), "maxiter", "disp"}
    needed = None
    if not (OPT_BOUNDS[0] >= 0 and OPT_BOUNDS[1] <= 1 and low <= high):
        needed = "OPT_BOUNDS must be [lowest, highest] threshold, from 0 to 1, and far enough apart to hold one"
    elif OPT_METHOD not in TOLERANCES:
        needed = f"OPT_METHOD must be one of {', '.join(TOLERANCES)}"
    elif not OPT_OPTIONS.keys() <= options:  # minimize_scalar would ignore it
        needed = f"OPT_OPTIONS can only hold {', '.join(sorted(options))} with {OPT_METHOD}"
    if needed:
        raise ConfigurationError(f"at the top of models.py, {needed}")
    return low, high


def swapped_classes(counts, class_titles, class_folders):
    """Warn of channels of the network that fit the masks of another class far better than those of their own.

    Each channel is compared with each folder of masks by their IoU at 0.5, and each is given the folder that makes the
    sum of the IoUs largest. A warning needs a new folder that fits at least twice as well as the channel's own and by
    0.2 better, and no channel that fits its new folder worse than its own. So classes that contain each other, and a
    network that finds only one of them, raise none. `counts` is a counts.Counts. Returns a list of sentences.
    """
    predicted = counts.histogram[:, :, HALF + 1 :].sum(axis=(1, 2))
    masks = counts.histogram[:, 1].sum(axis=1)
    fit = ratio(counts.overlap, predicted[:, None] + masks - counts.overlap)
    own, (channels, given) = np.diag(fit), linear_sum_assignment(fit, maximize=True)
    best = fit[channels, given]
    if (best < own).any():
        return []
    return [
        f"{class_titles[i]}: at 0.5 this channel of the network fits the masks in {class_folders[given[i]]} (IoU "
        f"{best[i]:.2f}) far better than its own (IoU {own[i]:.2f}): the folders seem to be in another order than when "
        "the model was trained; channels take the class folders in sorted order, so check their names"
        for i in np.flatnonzero((best >= 2 * own) & (best >= own + 0.2))
    ]


def train_prediction_threshold(histogram, class_name, metric, on_evaluation):
    """Train the threshold of one class with `scipy.optimize.minimize_scalar` on 1 - metric.

    Parameters
    ----------
    histogram : int64 array, shape (2, N + 1)
        One class of `Counts.histogram`, with at least one pixel in the mask and one outside.
    class_name : str
        For messages.
    metric : ClassMetric
    on_evaluation : callable taking (number of the evaluation, threshold, metric)
        Is called at every evaluation; the first has number 0.

    Returns
    -------
    TrainedThreshold, ClassCurve

    Raises
    ------
    ConfigurationError
        From `optimisation_range`.
    ModelError
        The metric's constraint holds at no threshold within OPT_BOUNDS.
    NotConvergedError
        minimize_scalar did not converge.
    """
    low, high = optimisation_range()
    counts = confusion(histogram)
    values, allowed = metric(*counts), metric.allowed(*counts)
    candidates = allowed.copy()
    candidates[:low] = candidates[high + 1 :] = False
    if not candidates.any():
        raise _level_not_reached(metric, class_name, counts, low, high)

    loss = 1 - values
    if metric.constraint:  # below the level, worse than at any allowed threshold, and worse the farther below
        short = metric.level - metric.constraint(*counts)
        loss[~allowed] = 1 - values.min() + short[~allowed]
    history = []

    def evaluate(k):
        history.append((float(THRESHOLDS[k]), float(values[k])))
        on_evaluation(len(history) - 1, *history[-1])
        return loss[k]

    # minimize_scalar may find a local optimum only. The counts give the metric at every threshold, so the threshold
    # reported is the exact optimum among them all; it is the last evaluation in the history.
    outcome = _minimize(evaluate, class_name, low, high, worst=loss.max() + 1)
    best = candidates & (values >= values[candidates].max() - TIE)
    [first], [last] = widest_stretch(THRESHOLDS, best[None])
    stretch = THRESHOLDS[first : last + 1].astype(np.float64)
    index = int(first) + _nearest(stretch, (stretch[0] + stretch[-1]) / 2)
    evaluate(index)

    doubt = _doubt(counts, values, metric, allowed, best, index, low)
    trained = TrainedThreshold(
        index=index,
        x=float(THRESHOLDS[index]),
        metric=float(values[index]),
        metric_at_half=float(values[HALF]),
        best_stretch=(float(THRESHOLDS[first]), float(THRESHOLDS[last])),
        outcome=outcome,
        history=history,
        warnings=[f"{class_name}: {doubt}"] if doubt else [],
    )
    return trained, ClassCurve(counts, values)


def _minimize(evaluate, class_name, low, high, worst):
    """Run minimize_scalar over THRESHOLDS[low] to THRESHOLDS[high], with the settings at the top of this file.

    `evaluate` takes an index and returns the loss there. `worst` is a loss above all of them. Returns a dictionary with
    success, status (0 if the method has none) and message of minimize_scalar.
    """
    thresholds = THRESHOLDS[low : high + 1].astype(np.float64)
    start, end = thresholds[[0, -1]]

    def objective(x):
        return evaluate(low + _nearest(thresholds, x)) if start <= x <= end else worst

    if OPT_METHOD == "bounded":
        within = {"bounds": (start, end)}
    else:  # brent and golden take no bounds, but stay in a bracket: three points, the middle one better than the others
        within = {"bracket": (np.nextafter(start, -1), (start + end) / 2, np.nextafter(end, 2))}
    options = {TOLERANCES[OPT_METHOD]: OPT_TOL, **OPT_OPTIONS}
    result = minimize_scalar(objective, method=OPT_METHOD, options=options, **within)
    message = " ".join(result.message.split())
    if not result.success:
        raise NotConvergedError(
            f"{class_name}: minimize_scalar did not converge ({message}); raise maxiter in OPT_OPTIONS, or OPT_TOL, at "
            "the top of models.py and run again"
        )
    return {"success": bool(result.success), "status": result.get("status", 0), "message": message}


def _nearest(thresholds, x):
    """The index of the threshold nearest to x, of two as near the lower; `thresholds`, float64, increase."""
    middles = (thresholds[:-1] + thresholds[1:]) / 2
    return int(np.searchsorted(middles, x))


def widest_stretch(thresholds, chosen):
    """For each row, the stretch of neighbouring chosen thresholds whose last and first threshold differ most.

    Parameters
    ----------
    thresholds : float32 array, shape (N,), increasing
    chosen : bool array, shape (rows, N), at least one true in each row

    Returns
    -------
    first, last : int arrays, shape (rows,)
        Indices. Of equally wide stretches of a row it is the lowest.
    """
    thresholds = thresholds.astype(np.float64)
    width = len(thresholds) + 2  # of a row with a false at both ends, so that no stretch goes on in the next row
    change = np.diff(np.pad(chosen, ((0, 0), (1, 1))).ravel().astype(np.int8))
    rows, first = np.divmod(np.flatnonzero(change == 1), width)
    last = np.flatnonzero(change == -1) % width - 1
    order = np.lexsort((thresholds[first] - thresholds[last], rows))  # in each row the widest first, then the lowest
    widest = order[np.unique(rows, return_index=True)[1]]
    return first[widest], last[widest]


def _level_not_reached(metric, class_name, counts, low, high):
    reached = metric.constraint(*counts)[low : high + 1]
    highest = math.floor(10**6 * reached.max()) / 10**6  # rounded down: a level that works
    return ModelError(
        f"{class_name}: {metric.constraint_name} does not reach the level of {metric.name} at any threshold within "
        f"OPT_BOUNDS = {OPT_BOUNDS}: the highest is {highest}, at {THRESHOLDS[low + np.argmax(reached)]!s}; ask for a "
        "lower level, or train another model"
    )


def _doubt(counts, values, metric, allowed, best, index, low):
    """A sentence about what makes a trained threshold doubtful, the first cause that applies; None if nothing does."""
    tp, fp, fn, tn = counts
    positives, negatives = int(tp[0] + fn[0]), int(fp[0] + tn[0])
    if fp[index] == fn[index] == 0:
        return (
            "at the trained threshold the prediction is right in every pixel; make sure that the network was not "
            "trained on these images, and did not make their masks"
        )
    outside, inside = fp[HALF] / negatives, tp[HALF] / positives
    if outside > 0.5 and inside < outside / 4:
        return (
            f"at 0.5 the prediction holds {outside:.0%} of the pixels outside the masks and {inside:.0%} of those "
            "inside: the masks seem to be inverted; zero must mean outside the class"
        )
    if tp[0] < USELESS * positives:
        return (
            f"only {tp[0]:,} of its {positives:,} pixels have a probability above {THRESHOLDS[0]!s}, the lowest "
            "threshold: the network does not find this class, whatever the threshold"
        )
    k = int(np.argmax(np.where(allowed, values, -np.inf)))
    if values[k] > values[index] + TIE:
        return (
            f"OPT_BOUNDS = {OPT_BOUNDS} at the top of models.py exclude the optimum: {metric.name} is at most "
            f"{values[index]:.9g} within them, and {values[k]:.9g} at {THRESHOLDS[k]!s}; widen them"
        )
    # Some metrics are best where nearly all of the image is in the mask, or nearly nothing of the class.
    first_best, last_best = np.flatnonzero(best)[[0, -1]]
    holds_all = tn[index] < USELESS * negatives or (first_best == low and fp[low] > fp[index])
    holds_nothing = tp[last_best] < USELESS * positives
    if not holds_all and not holds_nothing:
        return None
    k = first_best if holds_all else last_best
    return (
        f"no threshold has a better {metric.name} than {THRESHOLDS[k]!s}, where the mask holds "
        f"{100 * tp[k] / positives:.3g} % of the class and {100 * fp[k] / negatives:.3g} % of the other pixels: the "
        "metric does not lead to a useful threshold here; choose another metric, or train another model"
    )
