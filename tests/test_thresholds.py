"""The trained threshold is the optimum, compared with independent computations."""

import warnings
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from counts import THRESHOLDS, confusion
from errors import ConfigurationError, ModelError, NotConvergedError, UsageError

N = len(THRESHOLDS)
CONSTRAINED = ["precision_at_recall_0.95", "recall_at_precision_.5", "iou_score_at_recall_0.999"]


def exactly(name, tp, fp, fn, tn):
    """The textbook metric in exact arithmetic; the Matthews coefficient as its signed square."""

    def over(a, b):
        return Fraction(a, b) if b else Fraction(0)

    precision, recall, specificity = over(tp, tp + fp), over(tp, tp + fn), over(tn, tn + fp)
    covariance, accuracy = tp * tn - fp * fn, over(tp + tn, tp + tn + fp + fn)
    return {
        "iou_score": over(tp, tp + fp + fn),
        "f1_score": over(2 * precision * recall, precision + recall),
        "f2_score": over(5 * precision * recall, 4 * precision + recall),
        "precision": precision,
        "recall": recall,
        "binary_accuracy_tfkeras": accuracy,
        "binary_accuracy_sm": accuracy,
        "balanced_accuracy": (recall + specificity) / 2,
        "matthews_corrcoef": over(covariance * abs(covariance), (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
    }[name]


def reaches_level(name, tp, fp, fn, tn):
    """Whether a metric's constraint holds, in exact arithmetic."""
    if "_at_" not in name:
        return True
    constraint, _, level = name.partition("_at_")[2].partition("_")
    return exactly(constraint, tp, fp, fn, tn) >= Fraction(level)


def histogram_of(p, truth):
    """Histogram of one class from probabilities and truth, computed by plain NumPy."""
    bins = np.searchsorted(THRESHOLDS, np.asarray(p, np.float32))
    return np.stack([np.bincount(bins[np.asarray(truth) == value], minlength=N + 1) for value in (0, 1)])


def pixels(inside, outside):
    """Histogram of one class from {probability: number of pixels} inside and outside the mask."""
    histogram = np.zeros((2, N + 1), np.int64)
    for truth, numbers in ((0, outside), (1, inside)):
        histogram[truth, np.searchsorted(THRESHOLDS, np.array([*numbers], np.float32))] = [*numbers.values()]
    return histogram


def train(histogram, metric="iou_score"):
    return models.train_prediction_threshold(histogram, "class0", models.class_metric(metric), lambda *_: None)[0]


def sparse_histogram(draw):
    """Draw a histogram with few filled bins: it has plateaus and ties, and often single pixels."""
    pixels = st.one_of(st.integers(0, 3), st.integers(0, 10**5))
    rows = draw(st.lists(st.tuples(st.integers(0, N), pixels, pixels), min_size=1, max_size=8))
    histogram = np.zeros((2, N + 1), np.int64)
    for k, outside, inside in rows:
        histogram[:, k] += outside, inside
    for truth in (0, 1):
        histogram[truth, draw(st.integers(0, N))] += 1
    return histogram


def stretches(histogram, low=0, high=N - 1):
    """(first, last, exact counts) of every stretch of thresholds between which no bin is filled."""
    filled = np.flatnonzero(histogram.sum(axis=0))
    starts = [low, *filled[(filled > low) & (filled <= high)].tolist()]
    for start, end in zip(starts, [*(start - 1 for start in starts[1:]), high], strict=True):
        (fp, tp), (tn, fn) = (
            part.sum(axis=1).tolist() for part in (histogram[:, start + 1 :], histogram[:, : start + 1])
        )
        yield start, end, (tp, fp, fn, tn)


def value_of(k):
    return Fraction(float(THRESHOLDS[k]))


# ---------------------------------------------------------------------------------------------------------------
# The optimum


@given(st.data(), st.sampled_from([*models.CLASS_METRICS, *CONSTRAINED]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_trained_threshold_is_the_exact_optimum(data, name, bounded):
    histogram = sparse_histogram(data.draw)
    low, high = sorted(data.draw(st.tuples(*2 * [st.integers(0, N - 1)]))) if bounded else (0, N - 1)
    runs, best = [], None  # runs: first and last of the best stretches, joined where they touch
    for first, last, counts in stretches(histogram, low, high):
        value = exactly(name.partition("_at_")[0], *counts)
        if not reaches_level(name, *counts) or (runs and value < best):
            continue
        if runs and value == best:
            runs.append([runs.pop()[0] if runs[-1][1] == first - 1 else first, last])
        else:
            runs, best = [[first, last]], value
    with pytest.MonkeyPatch.context() as patch:
        if bounded:
            patch.setattr(models, "OPT_BOUNDS", [float(THRESHOLDS[low]), float(THRESHOLDS[high])])
        if not runs:
            with pytest.raises(ModelError, match="does not reach"):
                train(histogram, name)
            return
        trained = train(histogram, name)
    width = max(value_of(last) - value_of(first) for first, last in runs)
    first, last = next(run for run in runs if value_of(run[1]) - value_of(run[0]) == width)
    assert trained.best_stretch == (float(THRESHOLDS[first]), float(THRESHOLDS[last]))
    assert first <= trained.index <= last
    middle = (value_of(first) + value_of(last)) / 2
    off = abs(value_of(trained.index) - middle)
    assert trained.index == first or abs(value_of(trained.index - 1) - middle) > off
    assert trained.index == last or abs(value_of(trained.index + 1) - middle) >= off

    if name == "matthews_corrcoef":
        assert abs(trained.metric) * trained.metric == pytest.approx(float(best), rel=1e-9, abs=1e-12)
    else:
        assert trained.metric == pytest.approx(float(best), abs=1e-12)
    assert trained.x == THRESHOLDS[trained.index] == np.float32(trained.x)
    assert 0 < trained.x < 1
    assert trained.history[-1] == (trained.x, trained.metric)
    assert trained.nfev == len(trained.history)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_iou_and_f1_have_the_same_threshold(data):
    histogram = sparse_histogram(data.draw)
    assert train(histogram, "iou_score").x == train(histogram, "f1_score").x


def test_metrics_that_differ_only_by_rounding_are_equal():
    # The balanced accuracy is (0.8 + 0.9) / 2 below 0.2, and (0.7 + 1) / 2 from there to 0.9.
    assert 0.8 + 0.9 > 0.7 + 1
    histogram = pixels({0.9: 7, 0.2: 1, 0.0: 2}, {0.2: 1, 0.0: 9})
    low, high = train(histogram, "balanced_accuracy").best_stretch
    assert low < 1e-9 and high > 0.89


def test_the_widest_stretch_spans_the_largest_range_not_the_most_thresholds():
    histogram = pixels({0.4: 2, 2**-20: 2}, {0.3: 4})  # IoU 1/2 from 2**-40 to 2**-20 and from 0.3 to 0.4
    assert train(histogram).x == pytest.approx(0.35, abs=1e-5)
    histogram = pixels({0.9: 2, 0.4: 2}, {0.85: 4})  # IoU 1/2 from 2**-40 to 0.4 and from 0.85 to 0.9
    assert train(histogram).x == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("shift", [-20, -8, 0, 14])
def test_the_optimum_is_found_for_shifted_logits(shift):
    rng = np.random.default_rng(2)
    truth = rng.random(20000) < 0.1
    p = (1 / (1 + np.exp(-(rng.normal(np.where(truth, 1, -1), 1.5) + shift)))).astype(np.float32)
    trained = train(histogram_of(p, truth))
    order = np.argsort(-p, kind="stable")
    tp, ends = np.cumsum(truth[order]), np.append(np.diff(p[order]) != 0, True)  # with everything from p[order] up
    iou = tp / (truth.sum() + np.arange(1, len(p) + 1) - tp)
    above = p > np.float32(trained.x)
    assert trained.metric == np.sum(truth & above) / np.sum(truth | above)
    assert iou[ends].max() - 2e-5 <= trained.metric <= iou[ends].max()
    assert not trained.warnings


def test_every_threshold_agrees_with_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.random(4000) < 0.2
    p = np.where(truth, rng.beta(3, 2, 4000), rng.beta(1, 4, 4000)).astype(np.float32)
    metric = models.class_metric("precision_at_recall_0.9")
    trained, curve = models.train_prediction_threshold(histogram_of(p, truth), "class0", metric, lambda *_: None)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, p)
    assert trained.metric == pytest.approx(precision[recall >= 0.9].max(), abs=1e-12)
    assert trained.metric_at_half == pytest.approx(sklearn.metrics.precision_score(truth, p > 0.5), abs=1e-12)
    assert trained.allowed_at_half == (sklearn.metrics.recall_score(truth, p > 0.5) >= 0.9)
    for k in (0, 20000, 66637, 90000, N - 1):
        predicted = p > THRESHOLDS[k]
        cells = curve.tn[k], curve.fp[k], curve.fn[k], curve.tp[k]
        assert cells == tuple(sklearn.metrics.confusion_matrix(truth, predicted).ravel())
        reference = {
            "iou_score": sklearn.metrics.jaccard_score(truth, predicted, zero_division=0),
            "f1_score": sklearn.metrics.f1_score(truth, predicted, zero_division=0),
            "f2_score": sklearn.metrics.fbeta_score(truth, predicted, beta=2, zero_division=0),
            "precision": sklearn.metrics.precision_score(truth, predicted, zero_division=0),
            "recall": sklearn.metrics.recall_score(truth, predicted),
            "binary_accuracy_tfkeras": sklearn.metrics.accuracy_score(truth, predicted),
            "binary_accuracy_sm": sklearn.metrics.accuracy_score(truth, predicted),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, predicted),
            "matthews_corrcoef": sklearn.metrics.matthews_corrcoef(truth, predicted),
        }
        ours = {
            name: metric(curve.tp, curve.fp, curve.fn, curve.tn)[k] for name, metric in models.CLASS_METRICS.items()
        }
        assert ours == pytest.approx(reference, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# Names, levels, and the rule for metrics


def test_the_level_is_reached_exactly():
    for pixels_above, allowed in ((19, True), (18, False)):  # recall is 19 / 20 at the higher probability, then less
        trained = train(
            pixels({0.9: pixels_above, 0.3: 20 - pixels_above}, {0.6: 1, 0.01: 9}), "precision_at_recall_0.95"
        )
        assert (trained.x > 0.6) == allowed
        assert trained.metric == pytest.approx(1.0 if allowed else 20 / 21, abs=1e-12)


def test_a_level_that_is_not_reached_is_an_error_that_names_the_highest(monkeypatch):
    histogram = pixels({0.6: 70, 0.25: 25, 0.0: 5}, {0.125: 900})
    with pytest.raises(
        ModelError, match=r"class0: recall .*_\.951 at any threshold: .* highest is 0\.95, at 9\.\S+e-13"
    ):
        train(histogram, "iou_score_at_recall_.951")
    monkeypatch.setattr(models, "OPT_BOUNDS", [0.5, 1])
    with pytest.raises(ModelError, match=r"highest is 0\.333333, at 0\.5;"):  # rounded down, so that it can be reached
        train(pixels({0.9: 1, 0.3: 2}, {0.1: 9}), "precision_at_recall_0.5")
    with pytest.raises(ModelError, match=r"class0: recall .* within OPT_BOUNDS.* highest is 0\.7, at 0\.5; widen them"):
        train(histogram, "precision_at_recall_0.95")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("accuracy", [*models.CLASS_METRICS, "precision_at_recall_<level>", "iou_score_at_recall_<level>"]),
        ("", ["iou_score"]),
        ("f1_score_at_recall_0.9", ["recall_at_precision_<level>"]),
        ("precision_at_recall", ["precision_at_recall_<level>"]),
        ("binary_cross_entropy", ["does not depend on a threshold"]),
        *(
            (f"precision_at_recall_{level}", ["between 0 and 1", "precision_at_recall_0.95"])
            for level in ["", "0.0", "1", "95", "-0.5", "1e-3", "0,9", "٠.٩"]
        ),
    ],
)
def test_a_name_that_is_no_metric_is_an_error(name, words):
    with pytest.raises(UsageError) as error:
        models.class_metric(name)
    assert all(word in str(error.value) for word in ["--optimizing-class-metric", *words])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("f1", "f1_score"),
        ("F1-score", "f1_score"),
        ("dice", "f1_score"),
        ("dice_coefficient", "f1_score"),
        ("iou", "iou_score"),
        ("IoU", "iou_score"),
        ("jaccard", "iou_score"),
        ("accuracy", "binary_accuracy_sm"),
        ("mcc", "matthews_corrcoef"),
        ("precision_at_recall", "precision_at_recall_<level>"),
    ],
)
def test_another_name_suggests_the_metric_that_is_meant(name, meant):
    with pytest.raises(UsageError, match=f"did you mean {meant}\\?"):
        models.class_metric(name)


def test_a_line_adds_a_metric(monkeypatch):
    specificity = {"specificity": lambda tp, fp, fn, tn: models.ratio(tn, tn + fp)}
    monkeypatch.setattr(models, "CLASS_METRICS", {**models.CLASS_METRICS, **specificity})
    trained = train(pixels({0.9: 4, 0.3: 2}, {0.6: 1, 0.1: 9}), "specificity")
    assert trained.metric == 1 and trained.metric_at_half == 0.9 and trained.x > 0.6


# ---------------------------------------------------------------------------------------------------------------
# minimize_scalar and its configuration


def configure(monkeypatch, **configuration):
    for name, value in configuration.items():
        monkeypatch.setattr(models, name, value)


ONE_STEP = [[float(THRESHOLDS[k]), float(THRESHOLDS[k + 1])] for k in (0, 1000, 66000, N - 2)]


@pytest.mark.parametrize("method", ["bounded", "brent", "golden"])
@pytest.mark.parametrize("bounds", [[0, 1], [0.2, 0.4], [0.0, 1e-9], [0.9999, 1.0], [0.5, 0.5], *ONE_STEP], ids=str)
def test_every_method_works_with_all_bounds(method, bounds, monkeypatch):
    configure(monkeypatch, OPT_METHOD=method, OPT_BOUNDS=bounds)
    rng = np.random.default_rng(3)
    truth = rng.random(2000) < 0.3
    networks = {
        "good": np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)),
        "saturated": np.where(truth, rng.beta(0.05, 0.01, 2000), rng.beta(0.01, 0.05, 2000)),
        "constant": np.full(2000, 0.3),
    }
    thresholds = THRESHOLDS.astype(np.float64)
    within = (thresholds >= bounds[0]) & (thresholds <= bounds[1])
    for p in networks.values():
        histogram = histogram_of(p, truth)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained = train(histogram)
        iou = models.CLASS_METRICS["iou_score"](*confusion(histogram))
        assert trained.metric == iou[within].max()
        assert bounds[0] <= trained.x <= bounds[1]
        assert (trained.success, type(trained.status)) == (True, int)
        assert 2 <= trained.nfev == len(trained.history) < 120
        assert all(t in thresholds[within] and m == iou[thresholds == t] for t, m in trained.history)


def test_every_evaluation_is_shown_and_uses_the_nearest_threshold(monkeypatch):
    asked, shown, original = [], [], scipy.optimize.minimize_scalar

    def spy(objective, **configuration):
        return original(lambda x: asked.append(x) or objective(x), **configuration)

    monkeypatch.setattr(scipy.optimize, "minimize_scalar", spy)
    configure(monkeypatch, OPT_TOL=1e-7)  # finer than the list
    rng = np.random.default_rng(4)
    truth = rng.random(2000) < 0.3
    histogram = histogram_of(np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)), truth)
    trained, curve = models.train_prediction_threshold(
        histogram, "class0", models.class_metric("f1_score"), lambda *evaluation: shown.append(evaluation)
    )
    nearest = [int(np.argmin(np.abs(THRESHOLDS - np.float64(x)))) for x in asked]
    assert trained.history[:-1] == [(THRESHOLDS[k], curve.metric[k]) for k in nearest]
    assert shown == [(n, *point) for n, point in enumerate(trained.history)]


def test_the_search_keeps_to_thresholds_that_reach_the_level():
    rng = np.random.default_rng(5)
    truth = rng.random(2000) < 0.3
    histogram = histogram_of(np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)), truth)
    trained = train(histogram, "precision_at_recall_0.9")
    assert trained.history[-2][0] == pytest.approx(trained.x, abs=0.01)  # precision alone is best at the upper end


@pytest.mark.parametrize("method", ["bounded", "brent", "golden"])
def test_the_tolerance_and_the_options_reach_the_method(method, monkeypatch):
    tolerance = {"bounded": "xatol"}.get(method, "xtol")
    histogram = histogram_of([0.2, 0.4, 0.3, 0.7], [0, 0, 1, 1])
    evaluations = {}
    for tol in (0.1, 1e-5):
        configure(monkeypatch, OPT_METHOD=method, OPT_TOL=0.01, OPT_OPTIONS={tolerance: tol, "maxiter": 400})
        evaluations[f"{tolerance} {tol}"] = train(histogram).nfev
        configure(monkeypatch, OPT_TOL=tol, OPT_OPTIONS={})
        evaluations[f"OPT_TOL {tol}"] = train(histogram).nfev
    coarse, coarse_too, fine, fine_too = evaluations.values()
    assert coarse == coarse_too < fine == fine_too
    configure(monkeypatch, OPT_OPTIONS={"maxiter": 2})
    with pytest.raises(NotConvergedError, match="class0.*maxiter.*OPT_TOL.*models.py"):
        train(histogram)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("OPT_BOUNDS", bounds) for bounds in (None, [0.5], [0, 0.5, 1], ["0", "1"], [float("nan"), 1], [-0.1, 1])),
        *(("OPT_BOUNDS", bounds) for bounds in ([0.6, 0.4], [0.0, 0.0], [1.0, 1.0], [0.50001, 0.50001])),
        *(("OPT_METHOD", method) for method in ("powell", None, ["bounded"])),
        *(("OPT_TOL", tol) for tol in (-1e-4, float("nan"), "1e-4", None)),
        *(("OPT_OPTIONS", options) for options in (None, ["maxiter"], {"maxiter": 0}, {"maxiter": 10.5})),
        *(("OPT_OPTIONS", options) for options in ({"xtol": 1e-3}, {"xatol": -1}, {"max_iter": 500}, {1: 2})),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_named(name, value, monkeypatch):
    monkeypatch.setattr(models, name, value)
    with pytest.raises(ConfigurationError, match=f"{name} = .*models.py"):
        models.optimisation_range()


def test_untrainable_classes_are_named():
    for truth, words in (([0, 0], "no pixel"), ([1, 1], "every pixel")):
        counts = SimpleNamespace(histogram=histogram_of([0.2, 0.7], truth)[None], images=1)
        with pytest.raises(ModelError, match=f"class0 .class_a. .*{words}"):
            models.check_trainable(counts, ["class0 (class_a)"])


def swapped(fit, class_pixels=1000):
    """Warnings for channels that fit the masks as in `fit`: rows of IoUs, one a channel, for equally large masks."""
    fit = np.array(fit)
    overlap = np.round(2 * class_pixels * fit / (1 + fit)).astype(int)  # of two areas of `class_pixels`
    histogram = np.stack(
        [pixels({0.9: class_pixels // 2, 0.1: class_pixels // 2}, {0.9: class_pixels // 2})] * len(fit)
    )
    folders = [f"class_{i}" for i in range(len(fit))]
    titles = [f"class{i} ({folder})" for i, folder in enumerate(folders)]
    return models.swapped_classes(SimpleNamespace(histogram=histogram, overlap=overlap), titles, folders)


def test_folders_in_another_order_than_the_channels_are_named():
    first, second = swapped([[0.26, 0.85, 0.0], [0.7, 0.1, 0.0], [0.0, 0.0, 0.9]])
    assert first.startswith("class0 (class_0): ") and "class_1 (IoU 0.85)" in first and "0.26" in first
    assert second.startswith("class1 (class_1): ") and "class_0 (IoU 0.70)" in second
    assert len(swapped([[0.1, 0.6, 0.0], [0.0, 0.1, 0.6], [0.6, 0.0, 0.1]])) == 3  # class_10 comes before class_2
    assert len(swapped([[0.05, 0.8], [0.0, 0.0]])) == 1  # the other class is not found at all


@pytest.mark.parametrize(
    "fit",
    [
        [[0.8, 0.1], [0.1, 0.8]],
        [[0.0, 0.0], [0.0, 0.0]],  # nothing is found at 0.5
        [[0.3, 0.6], [0.0, 0.7]],  # a class within another one, and the network finds only the inner one
        [[0.05, 0.4], [0.0, 0.3]],  # the same, and the inner one is found a little better by the wrong channel
        [[0.3, 0.6], [0.6, 0.5]],  # a little better
        [[0.05, 0.2], [0.1, 0.01]],  # all fit badly
        [[0.9]],
    ],
)
def test_classes_that_overlap_or_are_hard_are_not_called_swapped(fit):
    assert swapped(fit) == []


# ---------------------------------------------------------------------------------------------------------------
# Warnings

CAUSES = {
    "bounds": "OPT_BOUNDS",
    "perfect": "right in every pixel",
    "everything": "% of the pixels outside the class",
    "inverted": "seem to be inverted",
    "nothing": "mask is empty",
    "little": "% of the class",
    "not found": "does not find this class",
}


GOOD = {0.9: 80, 0.6: 15, 0.2: 5}, {0.95: 2, 0.5: 8, 0.1: 90, 0.01: 900}


@pytest.mark.parametrize(
    ("cause", "metric", "bounds", "histogram"),
    [
        *((None, name, [0, 1], pixels(*GOOD)) for name in models.CLASS_METRICS if name not in ("recall", "precision")),
        *((None, name, [0, 1], pixels(*GOOD)) for name in ("precision_at_recall_0.95", "recall_at_precision_0.5")),
        # precision is higher where recall does not reach the level
        (None, "precision_at_recall_0.95", [0, 1], pixels({0.9: 80, 0.6: 20}, {0.7: 10, 0.1: 900})),
        (None, "iou_score", [0.5, 0.6], pixels(*GOOD)),  # bounds that hold the optimum
        (None, "iou_score", [0.5001, 0.5003], pixels(*GOOD)),  # bounds within the optimum's stretch
        ("bounds", "iou_score", [0.7, 1], pixels(*GOOD)),
        ("bounds", "iou_score", [0, 0.3], pixels(*GOOD)),
        ("bounds", "iou_score", [0.999, 1], pixels(*GOOD)),  # where the mask is empty
        ("perfect", "iou_score", [0, 1], pixels({0.6: 100}, {0.1: 900})),
        ("perfect", "iou_score", [0, 1], pixels({1.0: 100}, {0.0: 900})),
        ("perfect", "recall", [0, 1], pixels({0.6: 100}, {0.1: 900})),
        ("inverted", "iou_score", [0, 1], pixels(*GOOD[::-1])),
        ("inverted", "precision_at_recall_0.95", [0, 1], pixels({0.9: 4, 0.1: 96}, {0.95: 30, 0.4: 20})),
        (None, "iou_score", [0, 1], pixels({0.99: 100}, {0.995: 500, 0.9: 400})),  # bad, but not inverted
        ("everything", "recall", [0, 1], pixels(*GOOD)),
        ("everything", "recall", [0, 1], pixels({0.9: 80, 0.04: 20}, {0.05: 300, 1e-4: 150, 0.0: 450})),
        ("everything", "iou_score", [0, 1], pixels({0.9: 500, 0.1: 480}, {0.5: 20})),
        ("everything", "recall_at_precision_0.3", [0, 1], pixels({0.9: 40, 0.2: 60}, {0.7: 200})),
        ("nothing", "binary_accuracy_tfkeras", [0, 1], pixels({0.3: 10}, {0.4: 990})),
        ("little", "precision", [0, 1], pixels({0.999: 1, 0.9: 499, 0.5: 500}, {0.7: 100, 0.1: 1000})),
        ("not found", "iou_score", [0, 1], pixels({0.0: 100}, {0.5: 900})),
        ("not found", "iou_score", [0, 1], pixels({0.0: 995, 0.7: 5}, {0.5: 900})),
    ],
)
def test_a_warning_names_its_cause_and_no_other(cause, metric, bounds, histogram, monkeypatch):
    configure(monkeypatch, OPT_BOUNDS=bounds)
    given = " ".join(train(histogram, metric).warnings)
    assert [name for name, words in CAUSES.items() if words in given] == ([cause] if cause else []), given
    assert bool(given) == bool(cause)
    assert given.startswith("class0: " if cause else "")
