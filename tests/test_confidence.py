"""Intervals that hold what they promise: blocks, bootstrap, gain, the next stack, the stacks, guaranteed recall."""

import unicodedata

import coverage_simulation
import numpy as np
import pytest
from coverage_simulation import POPULATIONS, STEP, THRESHOLDS, coarse, synthetic_stacks, worlds_of_stacks
from mapie.risk_control import SemanticSegmentationController
from scipy import stats
from scipy.special import expit, logit

import confidence
import counts
from models import class_metric

IOU = class_metric("iou_score")
LAST = len(THRESHOLDS) - 1
HALF = int(np.searchsorted(THRESHOLDS, 0.5))


def logits_to_blocks(logits, truth):
    """Histograms, (blocks, 2, len(THRESHOLDS) + 1), of float (blocks, pixels) logits and their truth."""
    bins = np.searchsorted(THRESHOLDS, (1 / (1 + np.exp(-logits))).astype(np.float32))
    size = len(THRESHOLDS) + 1
    return np.array(
        [[np.bincount(b[t == side], minlength=size) for side in (0, 1)] for b, t in zip(bins, truth, strict=True)]
    )


def noisy_blocks(number, seed=0, spread=0.7, pixels=3000):
    """Blocks that differ in how sure the network is and how common the class is."""
    rng = np.random.default_rng(seed)
    truth = rng.random((number, pixels)) < rng.uniform(0.1, 0.4, (number, 1))
    logits = rng.normal(np.where(truth, 1.5, -1.5), 1.5) + rng.normal(0, spread, (number, 1))
    return logits_to_blocks(logits, truth)


def trained(blocks, metric=IOU):
    return coverage_simulation.trained(metric, counts.confusion(blocks.sum(axis=0)))


def assess(blocks, metric=IOU, index=None, low=0, high=LAST, kind="stacks"):
    index = trained(blocks, metric) if index is None else index
    return confidence.assess(THRESHOLDS, blocks.sum(axis=0), coarse(blocks), metric, index, low, high, kind)


# Blocks


def test_stacks_are_the_blocks():
    stacks = [f"stack_{i}" for i in (1, 2, 3, 10, 100)]
    names = [f"{stack}-{i:04d}_crop{k}.tif" for i in range(3) for k in range(2) for stack in stacks]
    blocks = confidence.blocks_of(names, stacks[::-1])
    assert (blocks.number, blocks.kind, blocks.names, blocks.warnings) == (5, "stacks", stacks, [])
    assert blocks.labels.tolist() == 6 * [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["{stack}-{i}_crop{k}.tif", "{stack}_slice_{i}_pos_class_0_crop{k}.png"])
def test_few_stacks_are_cut_into_runs_of_neighbouring_slices(name):
    names = [name.format(stack=stack, i=i, k=k) for stack in ("a", "b") for i in range(30) for k in range(3)]
    blocks = confidence.blocks_of(names, ["a", "b"])
    assert (blocks.number, blocks.kind, blocks.names[11]) == (20, "runs of neighbouring slices", "b run 2")
    assert blocks.labels.tolist() == [10 * stack + i // 3 for stack in range(2) for i in range(30) for _ in range(3)]
    assert "between these, of these 2 stacks, not of others" in blocks.speaks_of
    names = [f"long-{i}.png" for i in range(90)] + [f"short-{i}.png" for i in range(10)]
    assert len(set(confidence.blocks_of(names, ["long", "short"]).labels[:90])) == 18  # in proportion to the slices


def test_without_stacks_the_whole_is_cut_in_the_order_of_names():
    blocks = confidence.blocks_of([f"image_{i}.png" for i in range(41)], [])
    assert (blocks.number, set(np.bincount(blocks.labels))) == (20, {2, 3})
    assert (np.diff(blocks.labels) >= 0).all()
    assert "no stacks are named" in blocks.speaks_of and not blocks.warnings


def test_more_stacks_than_blocks_are_put_together_evenly():
    stacks = [f"s{i}" for i in range(1000)]
    blocks = confidence.blocks_of([f"{stack}-0.png" for stack in stacks], stacks)
    assert (blocks.number, blocks.kind, set(np.bincount(blocks.labels))) == (256, "groups of stacks", {3, 4})
    assert (np.diff(blocks.labels) >= 0).all() and blocks.names[0] == "s0 to s3" and "these 1000" in blocks.speaks_of


def test_names_that_do_not_fit_together_are_named():
    stacks = ["a_1", "b", "b_c", "d", "e", "f", "g"]
    names = [f"{stack}-{i}.png" for stack in ("a_1", "b", "b_c", "d", "e", "a_10", "bone") for i in range(2)]
    blocks = confidence.blocks_of(names, stacks)
    assert blocks.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]  # b_c: the longest name that fits
    absent, strangers, ambiguous = blocks.warnings
    assert "2 stacks without an image (f, g)" in absent
    assert "4 images (a_10-0.png, a_10-1.png, bone-0.png and 1 more)" in strangers and "one more stack" in strangers
    assert "2 images (b_c-0.png fits b_c and b, " in ambiguous
    of_a_subset = confidence.blocks_of(names, stacks, [*names, "f-0.png"]).warnings
    assert "1 stack without an image (g)" in of_a_subset[0]


def test_names_that_differ_a_little_are_matched_where_no_other_can_be_meant():
    stacks = ["0010", "P01.tif", "p02", "stacks/P03", r"old\P04", unicodedata.normalize("NFD", "Löß")]
    names = ["0010-0.tif", "P01-0.tif", "P02-0.tif", "P03-0.tif", "P04-0.tif", "LÖSS-0.tif"]
    blocks = confidence.blocks_of(names, stacks)
    assert (blocks.number, blocks.warnings) == (6, [])
    both = confidence.blocks_of(["P01-0.tif", "p01-0.tif", "P01-1.tif", *"abc"], ["P01", "p01", *"abc"])
    assert (both.number, both.labels.tolist()[0] != both.labels.tolist()[1], both.warnings) == (5, True, [])


# Intervals


@pytest.mark.parametrize(
    "name", ["iou_score", "matthews_corrcoef", "precision_at_recall_0.8", "precision_at_recall_0.95"]
)
def test_every_interval_contains_the_value_it_belongs_to(name):
    metric, blocks = class_metric(name), noisy_blocks(5)
    index, said = trained(blocks, metric), assess(blocks, metric)
    curve = metric(*counts.confusion(blocks.sum(axis=0)))
    assert said.why_no_interval is None and said.blocks == 5
    assert said.x_interval[0] <= THRESHOLDS[index] <= said.x_interval[1]
    assert -1 <= said.metric_interval[0] <= said.expected_metric <= curve[index] <= said.metric_interval[1] <= 1
    assert said.gain is None or said.gain_interval[0] <= said.gain == curve[index] - curve[HALF]
    assert (said.constraint_value is None) == (said.constraint_interval is None) == (metric.constraint is None)
    assert (said.band_low <= curve[::STEP]).all() and (curve[::STEP] <= said.band_high).all()


def test_stacks_with_little_of_the_class_are_worth_less():
    equal = noisy_blocks(12)
    uneven = equal * np.array([20] + 11 * [1])[:, None, None]
    inside, said = uneven[:, 1].sum(axis=1), assess(uneven)
    assert said.blocks == 12 and 2.5 > said.worth == pytest.approx(inside.sum() ** 2 / (inside**2).sum())
    assert np.diff(said.metric_interval) > 2 * np.diff(assess(equal).metric_interval)


def test_the_range_for_the_next_stack():
    blocks, metric = noisy_blocks(12), class_metric("matthews_corrcoef")
    blocks[11, 1] = 0  # a stack without the class says nothing
    own = metric(*(count[:11, trained(blocks, metric)] for count in counts.confusion(blocks)))
    reach = stats.t.ppf(0.975, 10) * logit(own).std(ddof=1) * np.sqrt(1 + 1 / 11)
    limits = expit(logit(own).mean() + reach * np.array([-1, 1]))
    assert assess(blocks, metric).next_stack_interval == pytest.approx(limits, abs=0.003)


def test_stacks_without_a_hit_or_without_an_error_have_a_range_too():
    blocks = noisy_blocks(8)
    blocks[0, 1, 0], blocks[0, 1, 1:] = blocks[0, 1].sum(), 0
    low, high = assess(blocks).next_stack_interval
    assert 0 <= low < 0.1 and high < 0.99
    perfect = logits_to_blocks(np.tile([-5.0, 5.0], (8, 4)), np.tile([False, True], (8, 4)))
    assert assess(perfect).next_stack_interval[1] == 1


@pytest.mark.parametrize(
    ("name", "containing", "words"),
    [
        ("precision", 20, "precision_at_recall"),
        ("recall", 20, "recall_at_precision"),
        ("iou_score", 4, "5 stacks that contain pixels of the class and other pixels, here are 4 of 20"),
    ],
)
def test_where_no_interval_holds_there_is_none(name, containing, words):
    blocks = noisy_blocks(20)
    blocks[containing:, 1] = 0
    said = assess(blocks, class_metric(name))
    nothing = said.x_interval, said.metric_interval, said.gain_interval, said.expected_metric, said.next_stack_interval
    assert set(nothing) == {None} and said.band_low is None and not said.gain_unclear
    assert words in said.why_no_interval == said.why_no_next_stack and said.gain >= 0


@pytest.mark.parametrize("kind", ["runs of neighbouring slices", "groups of stacks"])
def test_what_is_no_stack_says_nothing_about_the_next_one(kind):
    said = assess(noisy_blocks(20), kind=kind)
    assert said.next_stack_interval is None and said.metric_interval
    assert kind in said.why_no_next_stack


def test_a_gain_is_clear_or_unclear_or_none():
    said = assess(noisy_blocks(20), index=HALF)
    assert said.gain == 0 and said.gain_unclear
    rng = np.random.default_rng(5)
    truth = rng.random((20, 3000)) < 0.3
    said = assess(logits_to_blocks(rng.normal(np.where(truth, 4.5, 1.5), 1.0), truth))
    assert said.gain > 0.1 and said.gain_interval[0] > 0 and not said.gain_unclear  # the network is far off at 0.5
    said = assess(noisy_blocks(20), class_metric("precision_at_recall_0.95"))  # 0.5 does not reach the level
    assert said.gain is said.gain_interval is None and not said.gain_unclear and said.metric_interval


def test_replicates_keep_to_the_bounds():
    for bounds, nearest in (([0.7, 0.9], 0), ([0.1, 0.3], 1)):
        low, high = np.searchsorted(THRESHOLDS, bounds)
        said = assess(noisy_blocks(9), index=(low, high)[nearest], low=low, high=high)
        assert THRESHOLDS[low] <= said.x_interval[0] <= said.x_interval[1] <= THRESHOLDS[high]
        assert said.x_interval[nearest] == THRESHOLDS[(low, high)[nearest]]


def test_replicates_without_the_class_say_nothing():
    blocks = np.zeros((205, 2, LAST + 2), np.int64)
    blocks[:5], blocks[5:, 0, 0] = noisy_blocks(5), 1  # one replicate in 160 draws none of the first five
    assert np.diff(assess(blocks).metric_interval) < 1.5 * np.diff(assess(blocks[:5]).metric_interval)


def test_a_replicate_that_reaches_the_level_nowhere_comes_as_close_as_it_can():
    blocks = np.zeros((8, 2, LAST + 2), np.int64)
    low, high = np.searchsorted(THRESHOLDS, [0.7, 0.9])
    blocks[:, 1, high], blocks[:, 0, high], blocks[:, 0, low] = 80, range(16, 24), 900
    said = assess(blocks, class_metric("recall_at_precision_0.8"))  # half of the replicates reach 0.79 only
    assert said.x_interval[0] > 0.69 and said.constraint_interval[0] < 0.8


# The stacks themselves


def stack_results(blocks, metric=IOU, index=None):
    index, number = trained(blocks, metric) if index is None else index, len(blocks)
    of = confidence.Blocks(np.arange(number), number, "stacks", [str(b) for b in range(number)], "", [])
    return confidence.stack_results(THRESHOLDS, blocks.sum(axis=0), blocks, of, metric, index, 0, LAST)


@pytest.mark.parametrize("name", ["iou_score", "precision_at_recall_0.8"])
def test_what_each_stack_does_and_what_the_others_would_do_without_it(name):
    blocks, metric = noisy_blocks(9), class_metric(name)
    blocks[4, 0] += blocks[4, 1]
    blocks[4, 1] = 0  # no pixel of the class, but false positives
    index, stacks = trained(blocks, metric), stack_results(blocks, metric)
    *with_class, without = stacks
    assert [one.metric for one in with_class] == sorted(one.metric for one in with_class)
    assert without[:7] == ("4", 1, 0, None, None, None, None) and without.x_without is not None
    for one in stacks:
        b = int(one.stack)
        rest = np.delete(blocks, b, axis=0)
        at = trained(rest, metric)
        assert one.x_without == THRESHOLDS[at]
        assert one.metric_without == pytest.approx(metric(*counts.confusion(rest.sum(axis=0)))[at])
        if one is not without:
            own = metric(*counts.confusion(blocks[b]))
            best = trained(blocks[b : b + 1], metric)
            seen = one.pixels, one.metric, one.metric_at_half, one.own_x, one.own_metric
            assert seen == pytest.approx((blocks[b, 1].sum(), own[index], own[HALF], THRESHOLDS[best], own[best]))


def test_a_stack_that_changes_nothing_moves_nothing():
    saturated = np.zeros((6, 2, LAST + 2), np.int64)
    saturated[:, 0, 0], saturated[:, 1, -1], saturated[:, 0, -1] = 90, 10, 1  # every threshold is as good
    assert {one.x_without for one in stack_results(saturated, index=HALF + 1)} == {float(THRESHOLDS[HALF + 1])}


# Guaranteed recall


def guarantee(blocks, level, low=0, high=LAST):
    names = [f"stack {b}" for b in range(len(blocks))]
    return confidence.guarantee_recall(THRESHOLDS, blocks.sum(axis=0), coarse(blocks), level, low, high, names)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_guaranteed_recall_is_mapies(level):
    rng = np.random.default_rng(1)
    truth = rng.random((15, 400)) < 0.3
    logits = rng.normal(np.where(truth, 1.5, -1.5), 1.5) + rng.normal(0, 0.7, (15, 1))
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    mapie = SemanticSegmentationController(
        lambda pictures: pictures, risk="recall", method="crc", target_level=level, predict_params=THRESHOLDS[::STEP]
    )
    mapie.calibrate(probabilities.reshape(15, 1, 20, 20), truth.astype(int))
    said, positive = guarantee(logits_to_blocks(logits, truth), level), probabilities > mapie.best_predict_param[0]
    assert said.threshold == mapie.best_predict_param[0]
    assert said.precision == pytest.approx((positive & truth).sum() / positive.sum())
    assert said.recall == pytest.approx((positive & truth).sum() / truth.sum())


def test_a_guarantee_needs_enough_blocks():
    # Nothing is ever missed: with as many blocks as 0.9 needs, the bound is met exactly.
    perfect = logits_to_blocks(np.tile([-5.0, 12.0], (10, 4)), np.tile([False, True], (10, 4)))
    perfect[9, 1] = 0  # a stack without the class guarantees nothing
    said = guarantee(perfect, 0.9)
    assert said.threshold is not None and said.blocks == 9 and said.precision == said.recall == 1
    said = guarantee(perfect[1:], 0.9)
    assert said.threshold is said.precision is said.recall is None
    assert "needs 9 " in said.reason and "here are 8" in said.reason


def test_a_stack_that_is_missed_at_every_threshold_is_named():
    # The theorem needs that no block misses more than 1 - level at the lowest threshold. All together miss little.
    blocks = noisy_blocks(60)
    assert guarantee(blocks, 0.9).threshold
    blocks[17, 1, 0] += blocks[17, 1].sum() // 4
    said = guarantee(blocks, 0.9)
    assert said.threshold is None and said.reason.startswith("stack 17 misses 20.0% ")
    assert guarantee(blocks, 0.75).threshold


def test_a_guarantee_keeps_to_the_bounds():
    blocks = noisy_blocks(40)
    position = int(np.searchsorted(THRESHOLDS, guarantee(blocks, 0.9).threshold))
    assert guarantee(blocks, 0.9, high=position - 1).threshold < THRESHOLDS[position]
    assert "lowest threshold" in guarantee(blocks, 0.9, low=position + 1).reason


# Do they hold? The whole simulation: tests/coverage_simulation.py


def test_intervals_of_uneven_stacks_cover_what_they_promise():
    for name in ("rare cracks", "unequal sizes"):
        said = worlds_of_stacks(synthetic_stacks(**POPULATIONS[name]), IOU, 12, worlds=150)
        # With Student's t for 12 blocks instead of those that they are worth, 90 % and 90 % are covered.
        assert 0.935 <= said["metric"][0] <= 1
        assert 0.9 <= said["next stack"][0] <= 0.97
        assert abs(said["expected bias"][0]) < 0.75 * said["bias"][0]


@pytest.mark.slow
def test_intervals_of_a_real_network_cover_what_they_promise_where_blocks_are_stacks(sandbox):
    stacks, slices = coverage_simulation.population(sandbox)
    said = worlds_of_stacks(stacks, IOU, 10, worlds=30)
    # Three standard errors of 30 worlds below what the whole simulation gives; quartiles would cover 50 %.
    assert said["metric"][0] >= 0.84 and said["threshold"][0] >= 0.78 and said["gain"][0] >= 0.82
    assert worlds_of_stacks(stacks, IOU, 10, worlds=10, single_images=True)["metric"][0] < 0.85
    everywhere, between, _ = coverage_simulation.worlds_of_one_stack(slices, IOU, worlds=12)
    assert everywhere["metric"][0] < 0.5 < 0.9 < between["metric"][0]
