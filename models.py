"""The science: class metrics, and the training of thresholds on counts."""

import itertools
import math
import numbers
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from counts import THRESHOLDS, confusion
from errors import ConfigurationError, ModelError, NotConvergedError, UsageError, first_line

# The settings of scipy.optimize.minimize_scalar; the result records them. If a class does not converge, raise maxiter
# or the tolerance.
OPT_BOUNDS = [0.0, 1.0]  # lowest and highest threshold
OPT_METHOD = "bounded"  # or "brent" or "golden"
OPT_TOL = 1e-4  # on the threshold: absolute for bounded, relative for brent and golden
OPT_OPTIONS = {"maxiter": 500}  # maxiter, disp, and xatol (bounded) or xtol (brent, golden) instead of OPT_TOL


# ---------------------------------------------------------------------------------------------------------------
# Class metrics


def ratio(numerator, denominator):
    """numerator / denominator, with 0 / 0 = 0: a float64 array for arrays, a Fraction for Python integers."""
    if isinstance(denominator, np.ndarray):
        return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)
    return Fraction(numerator, denominator) if denominator else Fraction(0)


def matthews_corrcoef(tp, fp, fn, tn):
    """Correlation between mask and prediction (Matthews, 1975), in [-1, 1]; 0 if one of them is constant."""
    if isinstance(tp, np.ndarray):
        tp, fp, fn, tn = (count.astype(np.float64) for count in (tp, fp, fn, tn))
        return ratio(tp * tn - fp * fn, np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn))
    # The root may be irrational, but it need only be good enough to compare: with counts below 2**63, two different
    # squares differ by at least 2**-512, so roots rounded down to 640 bits have the order of the exact ones.
    covariance, product = tp * tn - fp * fn, (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    root = Fraction(math.isqrt((covariance**2 << 1280) // (product or 1)), 1 << 640)
    return root if covariance >= 0 else -root


# To add a metric, add a line. A metric is a function of four numbers of pixels: true positives, false positives, false
# negatives, true negatives. Larger is better, and 0 / 0 is 0: use `ratio` to divide. A metric must not change its
# arguments, and must work in two ways:
# - for arrays of one shape, int64 or (in the bootstrap) float64, it returns a finite float64 array of that shape;
# - for Python integers it returns the same value exactly, as a Fraction (`ratio` gives one): this compares thresholds
#   whose metrics are equal in float64.
# If a metric breaks this rule, the run ends with an error before the network runs (`check_metric`).
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


class ClassMetric(NamedTuple):
    """A class metric to make best; with a constraint, only where a second metric reaches a level.

    Attributes
    ----------
    name : str
        The name for `class_metric`.
    value : callable
        The metric, as described above CLASS_METRICS.
    constraint : callable or None
        The second metric.
    level : Fraction or None
        What the second metric must reach, in (0, 1): exactly the decimal number in the name.
    constraint_name : str or None
        The name of the second metric.
    """

    name: str
    value: Callable
    constraint: Callable | None = None
    level: Fraction | None = None
    constraint_name: str | None = None

    def __call__(self, tp, fp, fn, tn):
        """The metric, whether its constraint holds or not: a float64 array for arrays, exact for Python integers."""
        return self.value(tp, fp, fn, tn)

    def allowed(self, tp, fp, fn, tn):
        """Whether the second metric reaches the level: a bool array for arrays, a bool for Python integers."""
        if not isinstance(tp, np.ndarray):
            return self.constraint is None or self.constraint(tp, fp, fn, tn) >= self.level
        if self.constraint is None:
            return np.ones(tp.shape, bool)
        reached, level = self.constraint(tp, fp, fn, tn), float(self.level)
        allowed = reached >= level
        if tp.dtype.kind == "i":  # so close to the level that rounding decides, exact arithmetic does
            near = np.abs(reached - level) < 1e-15
            values, which = _exact(self.constraint, np.stack([tp, fp, fn, tn])[:, near])
            allowed[near] = np.array([value >= self.level for value in values], bool)[which]
        return allowed


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
        if not re.fullmatch(r"0?\.[0-9]{1,15}", level) or not Fraction(level):
            raise UsageError(f"{option} {name}: write the level as a decimal number between 0 and 1, as in {form}_0.95")
        value, constraint = CONSTRAINED_METRICS[form]
        return ClassMetric(name, CLASS_METRICS[value], CLASS_METRICS[constraint], Fraction(level), constraint)
    if name == "binary_cross_entropy":
        raise UsageError(f"{option} binary_cross_entropy does not depend on a threshold: choose another metric")
    raise UsageError(f"{option} {name!r}: choose one of {', '.join(METRIC_NAMES)}")


def check_metric(metric):
    """Try a ClassMetric on small counts; raise ConfigurationError if it breaks the rule above CLASS_METRICS."""
    counts = np.array(list(itertools.product([0, 1, 7], repeat=4)), np.int64).T  # (4, 81), with every 0 / 0
    for function in filter(None, (metric.value, metric.constraint)):
        values = _values(metric, function, counts)
        _values(metric, function, counts.reshape(4, 9, 9).astype(np.float64))
        for value, whole in zip(values, counts.T.tolist(), strict=True):
            try:
                exact = function(*whole)
            except Exception as error:
                raise _broken(metric, f"with the Python integers {whole} it raises {error!r}") from error
            if not isinstance(exact, numbers.Real) or not abs(exact - value) < 1e-9:
                raise _broken(metric, f"with {whole} it is {exact!r} for Python integers and {value!r} for arrays")


def _values(metric, function, counts):
    """The metric of int64 or float64 counts, shape (4, ...); raises ConfigurationError if it breaks the rule."""
    given = counts.copy()
    try:
        with np.errstate(all="ignore"):
            values = function(*given)
    except Exception as error:
        raise _broken(metric, f"with {counts.dtype} arrays it raises {error!r}") from error
    if not isinstance(values, np.ndarray) or values.dtype != np.float64 or values.shape != counts.shape[1:]:
        got = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else reprlib.repr(values)
        raise _broken(metric, f"for {counts.dtype} arrays of shape {counts.shape[1:]} it returns {got}")
    if not np.isfinite(values).all():
        at = counts[:, ~np.isfinite(values)][:, 0].tolist()
        raise _broken(metric, f"it is {values[~np.isfinite(values)][0]} for tp, fp, fn, tn = {at}")
    if (given != counts).any():
        raise _broken(metric, "it changes its arguments")
    return values


def _broken(metric, how):
    return ConfigurationError(
        f"the class metric {metric.name} breaks the rule above CLASS_METRICS in models.py: {first_line(how)}; it must "
        "return a finite float64 array of the counts' shape for arrays, the same value for Python integers, and 0 for "
        "0 / 0 (`ratio` divides so)"
    )


def _exact(function, counts):
    """A metric of int64 counts in exact arithmetic, computed only once for neighbours with equal counts.

    Parameters
    ----------
    function : callable
        A metric, as described above CLASS_METRICS.
    counts : int64 array, shape (4, n)

    Returns
    -------
    values : list of Fraction
    which : integer array, shape (n,)
        The metric of column i is `values[which[i]]`.
    """
    new = np.append(True, (counts[:, 1:] != counts[:, :-1]).any(axis=0))[: counts.shape[1]]
    return [function(*column) for column in counts[:, new].T.tolist()], np.cumsum(new) - 1


# ---------------------------------------------------------------------------------------------------------------
# Thresholds

# The methods of minimize_scalar with their options; the first one is the tolerance.
OPTIONS_OF_METHODS = {
    "bounded": ("xatol", "maxiter", "disp"),
    "brent": ("xtol", "maxiter", "disp"),
    "golden": ("xtol", "maxiter", "disp"),
}

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

    def refuse(name, value, why):
        raise ConfigurationError(f"{name} = {reprlib.repr(value)} at the top of models.py: {why}")

    def from_0_to_1(value):  # false for NaN; only types that the YAML of the result can hold
        return type(value) in (int, float) and 0 <= value <= 1

    if not isinstance(OPT_BOUNDS, list | tuple) or len(OPT_BOUNDS) != 2 or not all(map(from_0_to_1, OPT_BOUNDS)):
        refuse("OPT_BOUNDS", OPT_BOUNDS, "it must be two numbers from 0 to 1, [lowest, highest]")
    if OPT_BOUNDS[0] > OPT_BOUNDS[1]:
        refuse("OPT_BOUNDS", OPT_BOUNDS, "the first is above the second")
    low = int(np.searchsorted(THRESHOLDS, float(OPT_BOUNDS[0]), "left"))
    high = int(np.searchsorted(THRESHOLDS, float(OPT_BOUNDS[1]), "right")) - 1
    if low > high:
        around = " and ".join(str(THRESHOLDS[k]) for k in (high, low) if 0 <= k < len(THRESHOLDS))
        refuse("OPT_BOUNDS", OPT_BOUNDS, f"no threshold lies within them; widen them: the nearest are {around}")

    if not isinstance(OPT_METHOD, str) or OPT_METHOD not in OPTIONS_OF_METHODS:
        refuse("OPT_METHOD", OPT_METHOD, f"it must be one of {', '.join(OPTIONS_OF_METHODS)}")
    if not from_0_to_1(OPT_TOL):
        refuse("OPT_TOL", OPT_TOL, "it must be a number from 0 to 1")
    if not isinstance(OPT_OPTIONS, dict):
        refuse("OPT_OPTIONS", OPT_OPTIONS, "it must be a dictionary")
    for name, value in OPT_OPTIONS.items():
        known = OPTIONS_OF_METHODS[OPT_METHOD]
        if name not in known:
            refuse("OPT_OPTIONS", OPT_OPTIONS, f"the method {OPT_METHOD} has only the options {', '.join(known)}")
        if name == "maxiter" and not (type(value) is int and value > 0):
            refuse("OPT_OPTIONS", OPT_OPTIONS, "maxiter must be a whole number, 1 or more")
        if name in ("xatol", "xtol") and not from_0_to_1(value):
            refuse("OPT_OPTIONS", OPT_OPTIONS, f"{name} must be a number from 0 to 1")
        if name == "disp" and not (isinstance(value, int) and 0 <= value <= 3):
            refuse("OPT_OPTIONS", OPT_OPTIONS, "disp must be 0, 1, 2 or 3")
    return low, high


def swapped_classes(counts, class_titles, class_folders):
    """Sentences for channels of the network that fit another class's masks far better than their own.

    Parameters
    ----------
    counts : counts.Counts
    class_titles, class_folders : list of str

    Returns
    -------
    list of str
    """
    return []


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
        From `optimisation_range`, or for a metric that breaks the rule above CLASS_METRICS.
    ModelError
        The metric's constraint holds at no threshold within OPT_BOUNDS.
    NotConvergedError
        minimize_scalar did not converge.
    """
    low, high = optimisation_range()
    counts = np.stack(confusion(histogram))
    values = _values(metric, metric.value, counts)
    allowed = metric.allowed(*counts)
    if not allowed[low : high + 1].any():
        raise _level_not_reached(metric, class_name, counts, allowed, low, high)

    loss = 1 - values
    if metric.constraint:  # below the level, worse than at any allowed threshold, and worse the farther below
        short = float(metric.level) - metric.constraint(*counts)
        loss[~allowed] = 1 - values.min() + short[~allowed].clip(min=0)
    history = []

    def evaluate(k):
        history.append((float(THRESHOLDS[k]), float(values[k])))
        on_evaluation(len(history) - 1, *history[-1])
        return loss[k]

    # minimize_scalar may find a local optimum only. The counts give the metric at every threshold, so the threshold
    # reported is the exact optimum among them all; it is the last evaluation in the history.
    search = _minimize(evaluate, class_name, low, high, worst=loss.max() + 1)
    best = best_thresholds(metric, counts, values, allowed, low, high)
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
    curve = ClassCurve(
        *counts,
        metric=values,
        precision=CLASS_METRICS["precision"](*counts),
        recall=CLASS_METRICS["recall"](*counts),
    )
    return trained, curve


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


def best_thresholds(metric, counts, values, allowed, low, high):
    """Find the allowed thresholds from `low` to `high` at which the metric is best.

    Different metrics can be equal in float64, and IoU and F1, which have the same optima, are not rounded in the same
    way. So the thresholds that are best in float64, or nearly so, are compared again in exact arithmetic.

    Parameters
    ----------
    metric : ClassMetric
    counts : int64 array, shape (4, N)
        tp, fp, fn, tn at every threshold.
    values : float64 array, shape (N,)
        The metric of the counts.
    allowed : bool array, shape (N,)
        True where the metric's constraint holds; at least once from `low` to `high`.
    low, high : int
        Indices of the first and the last threshold to consider.

    Returns
    -------
    bool array, shape (N,)
        True at the best thresholds; at least one is.
    """
    candidates = np.flatnonzero(allowed[low : high + 1]) + low
    highest = values[candidates].max()
    candidates = candidates[values[candidates] >= highest - 1e-14 * max(1, abs(highest))]
    exact, which = _exact(metric.value, counts[:, candidates])
    highest = max(exact)
    best = np.zeros(len(values), bool)
    best[candidates] = np.array([value == highest for value in exact])[which]
    return best


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
    k = low + int(np.argmax(metric.constraint(*counts)[low : high + 1]))
    highest = math.floor(10**6 * metric.constraint(*counts[:, k].tolist())) / 10**6  # rounded down: a level that works
    where, widen = ("within OPT_BOUNDS", "widen them, or ") if allowed.any() else ("at any threshold", "")
    return ModelError(
        f"{class_name}: {metric.constraint_name} does not reach the level of {metric.name} {where}: the highest is "
        f"{highest}, at {THRESHOLDS[k]!s}; {widen}ask for a lower level, or train another model"
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
