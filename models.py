"""The science: class metrics, and the training of thresholds on counts."""

import difflib
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from counts import THRESHOLDS, confusion
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
    "dice": "f1_score",
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
    """The class metric with this name.

    Parameters
    ----------
    name : str
        A key of CLASS_METRICS, or a key of CONSTRAINED_METRICS with a level: precision_at_recall_0.95. The level is a
        decimal number in (0, 1) with at most 15 digits after the point.

    Returns
    -------
    ClassMetric

    Raises
    ------
    UsageError
        There is no such metric.
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
    meant = next((known for word, known in ALSO_CALLED.items() if word in name.lower()), name.lower())
    near = difflib.get_close_matches(meant, METRIC_NAMES, n=1, cutoff=0.4)
    question = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"{option} {name!r}: {question}choose one of {', '.join(METRIC_NAMES)}")


# ---------------------------------------------------------------------------------------------------------------
# Thresholds

# The methods of minimize_scalar with their options; the first one is the tolerance.
OPTIONS_OF_METHODS = {
    "bounded": ("xatol", "maxiter", "disp"),
    "brent": ("xtol", "maxiter", "disp"),
    "golden": ("xtol", "maxiter", "disp"),
}

EQUAL = 1e-14  # metrics that differ by no more are equal: IoU and F1 have the same optima, but round differently
USELESS = 0.01  # a mask with less than this part of the class in it, or of the other pixels outside it, is of no use


@dataclass
class TrainedThreshold:
    """The trained threshold of one class. Every threshold is one of THRESHOLDS, as a float."""

    index: int  # of x in THRESHOLDS
    x: float  # the trained threshold
    metric: float  # the class metric at x: the best within OPT_BOUNDS where the constraint holds
    metric_at_half: float  # at 0.5, whether the constraint holds there or not
    allowed_at_half: bool  # whether the constraint holds at 0.5
    best_stretch: tuple  # lowest and highest threshold of the stretch around x where the metric is the same
    success: bool  # of minimize_scalar, as the next two
    status: int
    message: str
    nfev: int  # number of evaluations in the history
    history: list  # (threshold, metric) of every evaluation by minimize_scalar; the last one is x
    warnings: list  # sentences


@dataclass
class ClassCurve:
    """Counts and metrics of one class at every threshold of THRESHOLDS."""

    tp: np.ndarray  # (N,) int64; likewise fp, fn, tn
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray
    metric: np.ndarray  # (N,) float64: the class metric without its constraint
    precision: np.ndarray  # (N,) float64, in [0, 1]
    recall: np.ndarray  # (N,) float64, in [0, 1]


def check_trainable(counts, class_names):
    """Raise ModelError for a class without any pixel in its masks, or without any outside.

    Parameters
    ----------
    counts : counts.Counts
    class_names : list of str
        For messages.
    """
    for name, (outside, inside) in zip(class_names, counts.histogram.sum(axis=-1), strict=True):
        if not inside or not outside:
            raise ModelError(
                f"{name} cannot be trained: {'every' if inside else 'no'} pixel of the {counts.images} images used is "
                "in its masks; use other images, or more of them"
            )


def optimisation_range():
    """The thresholds within OPT_BOUNDS; checks OPT_BOUNDS, OPT_METHOD, OPT_TOL and OPT_OPTIONS.

    Returns
    -------
    low, high : int
        Indices of the first and the last of THRESHOLDS within OPT_BOUNDS.

    Raises
    ------
    ConfigurationError
        minimize_scalar cannot work with one of them.
    """

    def check(name, holds, needed):
        if not holds:
            value = reprlib.repr(globals()[name])
            raise ConfigurationError(f"{name} = {value} at the top of models.py must be {needed}")

    def from_0_to_1(value):  # false for NaN; only types that the YAML of the result can hold
        return type(value) in (int, float) and 0 <= value <= 1

    pair = isinstance(OPT_BOUNDS, list | tuple) and len(OPT_BOUNDS) == 2 and all(map(from_0_to_1, OPT_BOUNDS))
    check("OPT_BOUNDS", pair and OPT_BOUNDS[0] <= OPT_BOUNDS[1], "two numbers from 0 to 1, [lowest, highest]")
    low = int(np.searchsorted(THRESHOLDS, float(OPT_BOUNDS[0]), "left"))
    high = int(np.searchsorted(THRESHOLDS, float(OPT_BOUNDS[1]), "right")) - 1
    check("OPT_BOUNDS", low <= high, "farther apart: no threshold lies within them")
    check("OPT_METHOD", OPT_METHOD in list(OPTIONS_OF_METHODS), f"one of {', '.join(OPTIONS_OF_METHODS)}")
    check("OPT_TOL", from_0_to_1(OPT_TOL), "a number from 0 to 1")
    known = OPTIONS_OF_METHODS[OPT_METHOD]
    valid = isinstance(OPT_OPTIONS, dict) and OPT_OPTIONS.keys() <= set(known)
    check("OPT_OPTIONS", valid, f"a dictionary with options that {OPT_METHOD} has: {', '.join(known)}")
    maxiter = OPT_OPTIONS.get("maxiter", 1)
    check("OPT_OPTIONS", type(maxiter) is int and maxiter > 0, "with maxiter as a whole number, 1 or more")
    check("OPT_OPTIONS", from_0_to_1(OPT_OPTIONS.get(known[0], 0)), f"with {known[0]} as a number from 0 to 1")
    return low, high


def swapped_classes(counts, class_titles, class_folders):
    """Warn of channels of the network that fit the masks of another class far better than those of their own.

    Each channel is compared with each folder of masks by their IoU at 0.5. The folders are given to the channels anew
    so that the sum of the IoUs is largest. A channel is warned of if its new folder fits at least twice as well as its
    own and by 0.2 better, and if no channel fits its new folder worse than its own. So classes that contain each other,
    and a network that finds only one of them, raise no warning.

    Parameters
    ----------
    counts : counts.Counts
    class_titles, class_folders : list of str

    Returns
    -------
    list of str
    """
    from scipy.optimize import linear_sum_assignment

    predicted = counts.histogram[:, :, int(np.searchsorted(THRESHOLDS, 0.5)) + 1 :].sum(axis=(1, 2))
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
        raise _level_not_reached(metric, class_name, counts, allowed, low, high)

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
    search = _minimize(evaluate, class_name, low, high, worst=loss.max() + 1)
    best = candidates & (values >= values[candidates].max() - EQUAL)
    first, index, last = widest_stretch(best)
    evaluate(index)

    half = int(np.searchsorted(THRESHOLDS, 0.5))
    trained = TrainedThreshold(
        index=index,
        x=float(THRESHOLDS[index]),
        metric=float(values[index]),
        metric_at_half=float(values[half]),
        allowed_at_half=bool(allowed[half]),
        best_stretch=(float(THRESHOLDS[first]), float(THRESHOLDS[last])),
        success=bool(search.success),
        status=int(search.get("status", 0)),  # brent and golden give none
        message=" ".join(search.message.split()),
        nfev=len(history),
        history=history,
        warnings=_warnings(class_name, metric, counts, values, allowed, best, index, low, high),
    )
    return trained, ClassCurve(*counts, values, CLASS_METRICS["precision"](*counts), CLASS_METRICS["recall"](*counts))


def _minimize(evaluate, class_name, low, high, worst):
    """Run minimize_scalar over THRESHOLDS[low] to THRESHOLDS[high], with the settings at the top of this file.

    `evaluate` takes an index and returns the loss there. `worst` is a loss above all of them.
    """
    from scipy.optimize import minimize_scalar  # the entry script imports it before, while the network runs

    thresholds = THRESHOLDS.astype(np.float64)
    start, end = thresholds[low], thresholds[high]

    def objective(x):
        if not start <= x <= end:
            return worst
        right = int(np.searchsorted(thresholds, x))
        left = max(right - 1, low)
        return evaluate(left if x - thresholds[left] <= thresholds[right] - x else right)

    if OPT_METHOD == "bounded":
        within = {"bounds": (start, end)}
    else:  # brent and golden take no bounds, but stay in a bracket: three points, the middle one better than the others
        within = {"bracket": (np.nextafter(start, -1), (start + end) / 2, np.nextafter(end, 2))}
    options = {OPTIONS_OF_METHODS[OPT_METHOD][0]: OPT_TOL, **OPT_OPTIONS}
    result = minimize_scalar(objective, method=OPT_METHOD, options=options, **within)
    if not result.success:
        raise NotConvergedError(
            f"{class_name}: minimize_scalar did not converge ({' '.join(result.message.split())}); raise maxiter in "
            "OPT_OPTIONS, or OPT_TOL, at the top of models.py and run again"
        )
    return result


def widest_stretch(chosen):
    """Find the stretch of neighbouring chosen thresholds whose last and first threshold differ most.

    Parameters
    ----------
    chosen : bool array, shape (N,), at least one true

    Returns
    -------
    first, middle, last : int
        Indices into THRESHOLDS. Of equally wide stretches it is the lowest. `middle` is the threshold of the stretch
        nearest to the mean of first and last; of two equally near ones, the lower.
    """
    change = np.diff(chosen.astype(np.int8), prepend=0, append=0)
    firsts, lasts = np.flatnonzero(change == 1), np.flatnonzero(change == -1) - 1
    thresholds = THRESHOLDS.astype(np.float64)
    widest = np.argmax(thresholds[lasts] - thresholds[firsts])
    first, last = int(firsts[widest]), int(lasts[widest])
    stretch = thresholds[first : last + 1]
    middle = first + int(np.argmin(np.abs(stretch - (stretch[0] + stretch[-1]) / 2)))
    return first, middle, last


def _level_not_reached(metric, class_name, counts, allowed, low, high):
    reached = metric.constraint(*counts)[low : high + 1]
    highest = math.floor(10**6 * reached.max()) / 10**6  # rounded down: a level that works
    where, widen = ("within OPT_BOUNDS", "widen them, or ") if allowed.any() else ("at any threshold", "")
    return ModelError(
        f"{class_name}: {metric.constraint_name} does not reach the level of {metric.name} {where}: the highest is "
        f"{highest}, at {THRESHOLDS[low + np.argmax(reached)]!s}; {widen}ask for a lower level, or train another model"
    )


def _warnings(class_name, metric, counts, values, allowed, best, index, low, high):
    """Sentences about what makes a trained threshold doubtful: the first cause that applies."""
    tp, fp, fn, tn = counts
    positives, negatives = int(tp[0] + fn[0]), int(fp[0] + tn[0])
    if fp[index] == fn[index] == 0:
        return [
            f"{class_name}: at the trained threshold the prediction is right in every pixel; make sure that the "
            "network was not trained on these images, and did not make their masks"
        ]
    half = int(np.searchsorted(THRESHOLDS, 0.5))
    outside, inside = fp[half] / negatives, tp[half] / positives
    if outside > 0.5 and inside < outside / 4:
        return [
            f"{class_name}: at 0.5 the prediction holds {outside:.0%} of the pixels outside the masks and {inside:.0%} "
            "of those inside: the masks seem to be inverted; zero must mean outside the class"
        ]
    if tp[0] < USELESS * positives:
        return [
            f"{class_name}: only {tp[0]:,} of its {positives:,} pixels have a probability above {THRESHOLDS[0]!s}, the "
            "lowest threshold: the network does not find this class, whatever the threshold"
        ]
    k = int(np.argmax(np.where(allowed, values, -np.inf)))
    if values[k] > values[index] + 1e-12:
        return [
            f"{class_name}: OPT_BOUNDS = {OPT_BOUNDS} at the top of models.py exclude the optimum: {metric.name} is at "
            f"most {values[index]:.9g} within them, and {values[k]:.9g} at {THRESHOLDS[k]!s}; widen them"
        ]
    lowest, highest = np.flatnonzero(best)[[0, -1]]
    if tn[index] < USELESS * negatives or (lowest == low and fp[low] > fp[index]):
        k, useless = lowest, f"the mask holds {100 * fp[lowest] / negatives:.3g} % of the pixels outside the class"
    elif tp[highest] + fp[highest] == 0:
        k, useless = highest, "the mask is empty"
    elif tp[highest] < USELESS * positives:
        k, useless = highest, f"the mask holds {100 * tp[highest] / positives:.3g} % of the class"
    else:
        return []
    return [
        f"{class_name}: no threshold has a better {metric.name} than {THRESHOLDS[k]!s}, where {useless}: for this "
        "class the metric does not lead to a useful threshold; choose another metric, or train another model"
    ]
