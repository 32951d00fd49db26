"""The trained threshold is the optimum, compared with independent computations."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from counts import THRESHOLDS, confusion
from errors import ConfigurationError, ModelError, NotConvergedError, UsageError

N = len(THRESHOLDS)
T = THRESHOLDS.astype(np.float64)
CONSTRAINED = ["precision_at_recall_0.95", "recall_at_precision_.5", "iou_score_at_recall_0.999"]


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


def some_network(seed=3):
    """Probabilities and truth of 2,000 pixels."""
    rng = np.random.default_rng(seed)
    truth = rng.random(2000) < 0.3
    return np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)), truth


def train(histogram, metric="iou_score", on_evaluation=lambda *_: None):
    return models.train_prediction_threshold(histogram, "class0", models.class_metric(metric), on_evaluation)[0]


def sparse_histogram(draw):
    """Draw a histogram with few filled bins: it has plateaus and ties, and often single pixels."""
    number = st.one_of(st.integers(0, 3), st.integers(0, 10**5))
    rows = draw(st.lists(st.tuples(st.integers(0, N), number, number), min_size=1, max_size=8))
    histogram = np.zeros((2, N + 1), np.int64)
    for k, outside, inside in rows:
        histogram[:, k] += outside, inside
    for truth in (0, 1):
        histogram[truth, draw(st.integers(0, N))] += 1
    return histogram


# ---------------------------------------------------------------------------------------------------------------
# The optimum


@given(st.data(), st.sampled_from([*models.CLASS_METRICS, *CONSTRAINED]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_trained_threshold_is_the_exact_optimum(data, name, bounded):
    histogram = sparse_histogram(data.draw)
    low, high = sorted(data.draw(st.tuples(*2 * [st.integers(0, N - 1)]))) if bounded else (0, N - 1)
    tn, fn = histogram.cumsum(axis=1)[:, :-1]
    (negatives, positives), metric = histogram.sum(axis=1), models.class_metric(name)
    counts = positives - fn, negatives - tn, fn, tn
    values = np.where(metric.allowed(*counts), metric(*counts), -np.inf)[low : high + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "OPT_BOUNDS", [T[low], T[high]] if bounded else [0.0, 1.0])
        if values.max() == -np.inf:
            with pytest.raises(ModelError, match="does not reach"):
                train(histogram, name)
            return
        trained = train(histogram, name)
    best = low + np.flatnonzero(values >= values.max() - 1e-14)
    stretches = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(stretches, key=lambda stretch: T[stretch[-1]] - T[stretch[0]])  # the first, if there are several
    assert trained.best_stretch == (T[widest[0]], T[widest[-1]])
    assert trained.index == widest[np.argmin(np.abs(T[widest] - np.mean(trained.best_stretch)))]
    assert trained.metric == values[trained.index - low]
    assert trained.x == THRESHOLDS[trained.index] == np.float32(trained.x)
    assert 0 < trained.x < 1
    assert trained.history[-1] == (trained.x, trained.metric)


def test_metrics_that_differ_only_by_rounding_are_equal():
    # The balanced accuracy is (0.8 + 0.9) / 2 below 0.2, and (0.7 + 1) / 2 from there to 0.9.
    assert 0.8 + 0.9 > 0.7 + 1
    histogram = pixels({0.9: 7, 0.2: 1, 0.0: 2}, {0.2: 1, 0.0: 9})
    low, high = train(histogram, "balanced_accuracy").best_stretch
    assert low < 1e-9 and high > 0.89


def test_the_correlation_of_billions_of_pixels():
    counts = np.array([[4], [1], [1], [4]]) * 10**9  # their products are no int64
    assert models.matthews_corrcoef(*counts) == pytest.approx(0.6)


def test_the_widest_stretch_spans_the_largest_range_not_the_most_thresholds():
    histogram = pixels({0.4: 2, 2**-20: 2}, {0.3: 4})  # IoU 1/2 from 2**-40 to 2**-20 and from 0.3 to 0.4
    assert train(histogram).x == pytest.approx(0.35, abs=1e-5)
    first, last = models.widest_stretch(np.arange(6), np.array([[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0]], bool))
    assert first.tolist() == [0, 3] and last.tolist() == [1, 4]  # of equally wide ones the lowest


@pytest.mark.parametrize("shift", [-20, 0, 14])
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


# ---------------------------------------------------------------------------------------------------------------
# Names and levels


def test_the_level_is_reached_exactly():
    for number, allowed in ((19, True), (18, False)):  # recall is 19 / 20 at the higher probability, then less
        trained = train(pixels({0.9: number, 0.3: 20 - number}, {0.6: 1, 0.01: 9}), "precision_at_recall_0.95")
        assert (trained.x > 0.6) == allowed
        assert trained.metric == pytest.approx(1.0 if allowed else 20 / 21, abs=1e-12)


def test_a_level_that_is_not_reached_is_an_error_that_names_the_highest(monkeypatch):
    histogram = pixels({0.6: 70, 0.25: 25, 0.0: 5}, {0.125: 900})
    with pytest.raises(ModelError, match=r"class0: recall .*_\.951 .*\[0\.0, 1\.0\]: the highest is 0\.95, at 9\."):
        train(histogram, "iou_score_at_recall_.951")
    monkeypatch.setattr(models, "OPT_BOUNDS", [0.5, 1])
    with pytest.raises(ModelError, match=r"highest is 0\.333333, at 0\.5;"):  # rounded down, so that it can be reached
        train(pixels({0.9: 1, 0.3: 2}, {0.1: 9}), "precision_at_recall_0.5")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", [*models.CLASS_METRICS, "precision_at_recall_<level>", "iou_score_at_recall_<level>"]),
        ("f1_score_at_recall_0.9", ["recall_at_precision_<level>"]),
        ("binary_cross_entropy", ["does not depend on a threshold"]),
        ("F1-score", ["did you mean f1_score?"]),
        ("dice_coefficient", ["did you mean f1_score?"]),
        ("IoU", ["did you mean iou_score?"]),
        ("accuracy", ["did you mean binary_accuracy_sm?"]),
        ("mcc", ["did you mean matthews_corrcoef?"]),
        *((f"precision_at_recall_{level}", ["between 0 and 1", "_0.95"]) for level in ["", "0.0", "1", "-0.5", "0,9"]),
    ],
)
def test_a_name_that_is_no_metric_is_an_error_that_says_what_is_one(name, words):
    with pytest.raises(UsageError) as error:
        models.class_metric(name)
    assert all(word in str(error.value) for word in ["--optimizing-class-metric", *words])


def test_a_line_adds_a_metric(monkeypatch):
    specificity = {"specificity": lambda tp, fp, fn, tn: models.ratio(tn, tn + fp)}
    monkeypatch.setattr(models, "CLASS_METRICS", {**models.CLASS_METRICS, **specificity})
    trained = train(pixels({0.9: 4, 0.3: 2}, {0.6: 1, 0.1: 9}), "specificity")
    assert trained.metric == 1 and trained.metric_at_half == 0.9 and trained.x > 0.6


# ---------------------------------------------------------------------------------------------------------------
# minimize_scalar and its settings


def configure(monkeypatch, **configuration):
    for name, value in configuration.items():
        monkeypatch.setattr(models, name, value)


@pytest.mark.parametrize("method", ["bounded", "brent", "golden"])
@pytest.mark.parametrize("bounds", [[0, 1], [0.2, 0.4], [0.0, 1e-9], [0.9999, 1.0], [0.5, 0.5], [T[0], T[1]]], ids=str)
def test_every_method_works_with_all_bounds_and_shows_each_evaluation(method, bounds, monkeypatch):
    configure(monkeypatch, OPT_METHOD=method, OPT_BOUNDS=bounds)
    within = (bounds[0] <= T) & (bounds[1] >= T)
    p, truth = some_network()
    for histogram in (histogram_of(p, truth), histogram_of(p.round(), truth), histogram_of(np.full(2000, 0.3), truth)):
        shown = []
        trained = train(histogram, on_evaluation=lambda *evaluation, shown=shown: shown.append(evaluation))
        iou = models.CLASS_METRICS["iou_score"](*confusion(histogram))
        assert trained.metric == iou[within].max()
        assert 2 <= len(trained.history) < 120 and list(trained.outcome.values())[:2] == [True, 0]
        assert all(t in T[within] and m == iou[t == T] for t, m in trained.history)
        first = T[within][0] + (3 - 5**0.5) / 2 * np.ptp(T[within])  # that a bounded search tries; here, the nearest
        assert method != "bounded" or trained.history[0][0] == T[within][np.abs(T[within] - first).argmin()]
        assert shown == [(n, *point) for n, point in enumerate(trained.history)]


def test_the_search_keeps_to_thresholds_that_reach_the_level():
    trained = train(histogram_of(*some_network(5)), "precision_at_recall_0.9")
    assert trained.history[-2][0] == pytest.approx(trained.x, abs=0.01)  # precision alone is best at the upper end


@pytest.mark.parametrize("method", ["bounded", "brent", "golden"])
def test_the_tolerance_and_the_options_reach_the_method(method, monkeypatch):
    histogram, evaluations = histogram_of([0.2, 0.4, 0.3, 0.7], [0, 0, 1, 1]), []
    for tol in (0.1, 1e-5):
        option = {"bounded": "xatol"}.get(method, "xtol")
        configure(monkeypatch, OPT_METHOD=method, OPT_TOL=0.01, OPT_OPTIONS={option: tol, "maxiter": 400})
        evaluations.append(len(train(histogram).history))
        configure(monkeypatch, OPT_TOL=tol, OPT_OPTIONS={})
        evaluations.append(len(train(histogram).history))
    assert evaluations[0] == evaluations[1] < evaluations[2] == evaluations[3]
    configure(monkeypatch, OPT_OPTIONS={"maxiter": 2})
    with pytest.raises(NotConvergedError, match=r"class0.*maxiter.*OPT_TOL.*models.py"):
        train(histogram)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("OPT_BOUNDS", bounds) for bounds in ([0.6, 0.4], [-0.1, 1], [0, 1.1], [0.0, 0.0], [0.50001, 0.50001])),
        ("OPT_METHOD", "powell"),
        *(("OPT_OPTIONS", options) for options in ({"xtol": 1e-3}, {"max_iter": 500})),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(name, value, monkeypatch):
    configure(monkeypatch, **{name: value})
    with pytest.raises(ConfigurationError, match=f"models.py, {name} "):
        models.optimisation_range()


# ---------------------------------------------------------------------------------------------------------------
# What makes a result impossible or doubtful


def test_untrainable_classes_are_named():
    for truth, words in (([0, 0], "no pixel"), ([1, 1], "every pixel")):
        counts = SimpleNamespace(histogram=histogram_of([0.2, 0.7], truth)[None], images=1)
        with pytest.raises(ModelError, match=f"class0 .class_a. .*{words}"):
            models.check_trainable(counts, ["class0 (class_a)"])


def swapped(fit, class_pixels=1000):
    """Warnings for channels that fit the masks as in `fit`: rows of IoUs, one a channel, for equally large masks."""
    fit = np.array(fit)
    overlap = np.round(2 * class_pixels * fit / (1 + fit)).astype(int)  # of two areas of `class_pixels`
    of_class = pixels({0.9: class_pixels // 2, 0.1: class_pixels // 2}, {0.9: class_pixels // 2})
    counts = SimpleNamespace(histogram=np.stack([of_class] * len(fit)), overlap=overlap)
    folders = [f"class_{i}" for i in range(len(fit))]
    return models.swapped_classes(counts, [f"class{i} ({folder})" for i, folder in enumerate(folders)], folders)


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
        [[0.05, 0.4], [0.0, 0.3]],  # a class within another one, and the network finds only the inner one
        [[0.3, 0.6], [0.6, 0.5]],  # a little better
        [[0.05, 0.2], [0.1, 0.01]],  # all fit badly
    ],
)
def test_classes_that_overlap_or_are_hard_are_not_called_swapped(fit):
    assert swapped(fit) == []


CAUSES = {
    "bounds": "OPT_BOUNDS",
    "perfect": "right in every pixel",
    "useless": "does not lead to a useful threshold",
    "inverted": "seem to be inverted",
    "not found": "does not find this class",
}
GOOD = {0.9: 80, 0.6: 15, 0.2: 5}, {0.95: 2, 0.5: 8, 0.1: 90, 0.01: 900}
USEFUL = ("iou_score", "f2_score", "binary_accuracy_sm", "balanced_accuracy", "matthews_corrcoef")


@pytest.mark.parametrize(
    ("cause", "metric", "bounds", "histogram"),
    [
        *((None, name, [0, 1], pixels(*GOOD)) for name in (*USEFUL, *CONSTRAINED[:2])),
        # precision is higher where recall does not reach the level
        (None, "precision_at_recall_0.95", [0, 1], pixels({0.9: 80, 0.6: 20}, {0.7: 10, 0.1: 900})),
        (None, "iou_score", [0.5001, 0.5003], pixels(*GOOD)),  # bounds within the optimum's stretch
        ("bounds", "iou_score", [0.7, 1], pixels(*GOOD)),
        ("bounds", "iou_score", [0.999, 1], pixels(*GOOD)),  # where the mask is empty
        ("perfect", "iou_score", [0, 1], pixels({0.6: 100}, {0.1: 900})),
        ("inverted", "iou_score", [0, 1], pixels(*GOOD[::-1])),
        (None, "iou_score", [0, 1], pixels({0.99: 100}, {0.995: 500, 0.9: 400})),  # bad, but not inverted
        ("useless", "recall", [0, 1], pixels(*GOOD)),  # everything is in the mask
        ("useless", "recall", [0, 1], pixels({0.9: 80, 0.04: 20}, {0.05: 300, 1e-4: 150, 0.0: 450})),
        ("useless", "iou_score", [0, 1], pixels({0.9: 500, 0.1: 480}, {0.5: 20})),
        ("useless", "binary_accuracy_tfkeras", [0, 1], pixels({0.3: 10}, {0.4: 990})),  # the mask is empty
        ("useless", "precision", [0, 1], pixels({0.999: 1, 0.9: 499, 0.5: 500}, {0.7: 100, 0.1: 1000})),  # nearly so
        ("not found", "iou_score", [0, 1], pixels({0.0: 995, 0.7: 5}, {0.5: 900})),
    ],
)
def test_a_warning_names_its_cause_and_no_other(cause, metric, bounds, histogram, monkeypatch):
    configure(monkeypatch, OPT_BOUNDS=bounds)
    said = " ".join(train(histogram, metric).warnings)
    assert [name for name, words in CAUSES.items() if words in said] == ([cause] if cause else []), said
    assert metric != "recall" or "and 100 % of the other" in said or "100 % of the class and 50 % of the other" in said
    assert said.startswith("class0: " if cause else "") and bool(said) == bool(cause)
