"""Intervals that hold what they promise: blocks, bootstrap, gain, expected metric and guaranteed recall."""

import subprocess
import sys

import coverage_simulation
import numpy as np
import pytest
from conftest import ROOT
from coverage_simulation import STEP, THRESHOLDS, coarse, trained, worlds_of_one_stack, worlds_of_stacks
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control import SemanticSegmentationController

import confidence
import counts
from models import class_metric

IOU = class_metric("iou_score")
LAST = len(THRESHOLDS) - 1


def members(blocks, names):
    """The images of each block."""
    return [
        {name for name, label in zip(names, blocks.labels, strict=True) if label == k} for k in range(blocks.number)
    ]


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


def assess(blocks, metric=IOU, index=None, low=0, high=LAST):
    histogram = blocks.sum(axis=0)
    index = trained(metric, histogram) if index is None else index
    return confidence.assess(THRESHOLDS, histogram, coarse(blocks), metric, index, low, high)


# ---------------------------------------------------------------------------------------------------------------
# Blocks


def test_stacks_are_the_blocks_and_the_longest_name_that_fits_is_the_stack():
    stacks = [f"stack_{i}" for i in (1, 10, 100, 2, 3)] + ["stack_1_b"]
    names = [f"{stack}-{i:04d}_crop{k}.tif" for stack in stacks for i in range(3) for k in range(2)]
    blocks = confidence.blocks_of(names, stacks)
    assert (blocks.number, blocks.kind) == (6, "stacks")
    assert {frozenset(block) for block in members(blocks, names)} == {
        frozenset(name for name in names if name.startswith(f"{stack}-")) for stack in stacks
    }
    assert "stacks" in blocks.speaks_of


def test_a_block_does_not_depend_on_the_order_of_the_names():
    names = [f"s{k}-{i}.png" for k in range(7) for i in range(4)]
    stacks = [f"s{k}" for k in range(7)]
    in_order = dict(zip(names, confidence.blocks_of(names, stacks).labels, strict=True))
    shuffled = names[::3] + names[1::3] + names[2::3]
    assert dict(zip(shuffled, confidence.blocks_of(shuffled, stacks[::-1]).labels, strict=True)) == in_order


@pytest.mark.parametrize(
    "name",
    [
        "{stack}-{i}_crop{k}.tif",
        "{stack}_slice_{i}_pos_class_0_crop{k}.png",
        "{stack}.{i}_crop{k}.tif",
        "{stack}_crop{k}.{i}_crop{k}.tif",  # a user's script puts it before every dot
        "{stack}-{i}_tile_{k}.png",
    ],
)
def test_few_stacks_are_cut_into_runs_of_neighbouring_slices(name):
    names = [name.format(stack=stack, i=i, k=k) for stack in ("a", "b") for i in range(30) for k in range(3)]
    blocks = confidence.blocks_of(names, ["a", "b"])
    assert (blocks.number, blocks.kind) == (20, "runs of neighbouring slices")
    expected = [
        {name.format(stack=stack, i=i, k=k) for i in range(first, first + 3) for k in range(3)}
        for stack in ("a", "b")
        for first in range(0, 30, 3)  # 2 before 10
    ]
    assert members(blocks, names) == expected
    assert "these 2 stacks, not of others" in blocks.speaks_of


def test_runs_are_shared_out_by_the_number_of_slices_and_end_at_stacks():
    names = [f"long-{i}.png" for i in range(90)] + [f"short-{i}.png" for i in range(10)] + ["one-0.png"]
    blocks = confidence.blocks_of(names, ["long", "short", "one"])
    assert blocks.number == 20
    of = {name.split("-")[0]: set() for name in names}
    for name, label in zip(names, blocks.labels, strict=True):
        of[name.split("-")[0]].add(label)
    assert [len(of[stack]) for stack in ("long", "short", "one")] == [17, 2, 1]
    assert not (of["long"] & of["short"] or of["long"] & of["one"] or of["short"] & of["one"])
    assert max(np.bincount(blocks.labels)) - min(np.bincount(blocks.labels)[blocks.labels[:100]]) <= 1


@pytest.mark.parametrize("stacks", [[], ["elsewhere"] * 9])
def test_without_stacks_the_whole_is_cut_in_the_order_of_names(stacks):
    names = [f"image_{i}.png" for i in range(41)]
    blocks = confidence.blocks_of(names, stacks)
    assert (blocks.number, blocks.kind) == (20, "runs of neighbouring slices")
    assert (np.diff(blocks.labels) >= 0).all()
    assert set(np.bincount(blocks.labels)) == {2, 3}
    assert ("none of the stacks that are named" if stacks else "no stacks are named") in blocks.speaks_of


def test_images_of_no_named_stack_count_as_one_more():
    names = [f"{stack}-{i}.png" for stack in "abcdexyz" for i in range(2)]
    blocks = confidence.blocks_of(names, list("abcde"))
    assert blocks.number == 6
    assert members(blocks, names)[-1] == {name for name in names if name[0] in "xyz"}


def test_a_stack_does_not_take_the_images_of_a_longer_name():
    names = [f"{stack}-{i}.png" for stack in ("a_1", "b", "c", "d", "a_10", "bone") for i in range(2)]
    blocks = confidence.blocks_of(names, ["a_1", "b", "c", "d"])
    assert members(blocks, names)[-1] == {"a_10-0.png", "a_10-1.png", "bone-0.png", "bone-1.png"}


def test_more_stacks_than_blocks_are_put_together_evenly():
    stacks = [f"s{i}" for i in range(1000)]
    blocks = confidence.blocks_of([f"{stack}-0.png" for stack in stacks], stacks)
    assert blocks.number == 256
    assert set(np.bincount(blocks.labels)) == {3, 4}
    assert (np.diff(blocks.labels) >= 0).all()
    assert blocks.kind == "groups of stacks"


def test_fewer_slices_than_runs():
    blocks = confidence.blocks_of(["a-1_crop0.png", "a-1_crop1.png", "a-2_crop0.png"], ["a"])
    assert (blocks.number, blocks.labels.tolist()) == (2, [0, 0, 1])
    assert confidence.blocks_of(["only.png"], []).number == 1


@given(st.lists(st.text(max_size=12), min_size=1, max_size=60, unique=True), st.lists(st.text(max_size=4), max_size=9))
@settings(max_examples=60, deadline=None)
def test_any_names_at_all(names, stacks):
    blocks = confidence.blocks_of(names, stacks)
    assert sorted(set(blocks.labels.tolist())) == list(range(blocks.number))


# ---------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize(
    "name", ["iou_score", "binary_accuracy_tfkeras", "matthews_corrcoef", "precision_at_recall_0.8"]
)
@pytest.mark.parametrize("number", [5, 20])
def test_every_interval_contains_the_value_it_belongs_to(name, number):
    metric = class_metric(name)
    for seed in range(4):
        blocks = noisy_blocks(number, seed)
        index = trained(metric, blocks.sum(axis=0))
        said = assess(blocks, metric)
        curve = metric(*counts.confusion(blocks.sum(axis=0)))
        assert said.reason is None and said.blocks == number
        assert said.x_interval[0] <= THRESHOLDS[index] <= said.x_interval[1]
        assert -1 <= said.metric_interval[0] <= said.expected_metric <= curve[index] <= said.metric_interval[1] <= 1
        assert said.metric_interval[0] < said.metric_interval[1]
        if said.gain is not None:
            assert said.gain == curve[index] - curve[np.searchsorted(THRESHOLDS, 0.5)]
            assert said.gain_interval[0] <= said.gain <= said.gain_interval[1]
            assert said.gain_unclear == (said.gain_interval[0] <= 0)
        assert (said.band_low <= curve[::STEP]).all() and (curve[::STEP] <= said.band_high).all()


def test_more_blocks_tell_more():
    few, many = assess(noisy_blocks(5)), assess(noisy_blocks(200))
    for interval in ("x_interval", "metric_interval", "gain_interval"):
        (a, b), (c, d) = getattr(few, interval), getattr(many, interval)
        assert d - c < (b - a) / 2


def test_the_same_numbers_again_and_in_any_order_of_blocks():
    blocks = noisy_blocks(12)
    assert assess(blocks).metric_interval == assess(blocks).metric_interval
    turned = assess(blocks[::-1])
    assert turned.metric_interval == pytest.approx(assess(blocks).metric_interval, abs=0.02)


def test_equal_blocks_leave_nothing_to_doubt():
    blocks = np.repeat(noisy_blocks(1), 8, axis=0)
    said = assess(blocks)
    x = float(THRESHOLDS[trained(IOU, blocks.sum(axis=0))])
    assert said.x_interval == (x, x)
    assert said.metric_interval[1] - said.metric_interval[0] < 1e-12
    assert said.gain_interval == pytest.approx((said.gain, said.gain))
    assert said.expected_metric == pytest.approx(IOU(*counts.confusion(blocks.sum(axis=0))).max())


@pytest.mark.parametrize("number", [1, 4])
def test_too_few_blocks_are_said_to_be_too_few(number):
    said = assess(noisy_blocks(number))
    assert (
        said.x_interval is said.metric_interval is said.gain_interval is said.expected_metric is said.band_low is None
    )
    assert said.blocks == number and "5 stacks" in said.reason and str(number) in said.reason
    assert said.gain >= 0 and not said.gain_unclear


def test_only_blocks_that_hold_the_class_count():
    blocks = noisy_blocks(30)
    blocks[4:, 0] += blocks[4:, 1]
    blocks[4:, 1] = 0
    said = assess(blocks)
    assert said.blocks == 4 and said.metric_interval is None and "4 of 30" in said.reason
    blocks = noisy_blocks(30)
    blocks[5:, 0] += blocks[5:, 1]
    blocks[5:, 1] = 0
    said = assess(blocks)
    assert said.blocks == 5 and said.metric_interval[0] < said.metric_interval[1]


def test_a_threshold_that_is_a_half_gains_nothing():
    half = int(np.searchsorted(THRESHOLDS, 0.5))
    said = assess(noisy_blocks(20), index=half)
    assert said.gain == 0 and said.gain_unclear
    # Where the network is far off, 0.5 is no match.
    rng = np.random.default_rng(5)
    truth = rng.random((20, 3000)) < 0.3
    shifted = logits_to_blocks(rng.normal(np.where(truth, 4.5, 1.5), 1.0) + rng.normal(0, 0.2, (20, 1)), truth)
    said = assess(shifted)
    assert said.gain > 0.1 and said.gain_interval[0] > 0 and not said.gain_unclear


def test_gain_unclear_over_a_half_that_breaks_the_constraint():
    metric = class_metric("precision_at_recall_0.95")
    blocks = noisy_blocks(20)
    said = assess(blocks, metric)
    assert said.gain is said.gain_interval is None and not said.gain_unclear
    assert said.metric_interval is not None


def test_replicates_keep_to_the_bounds():
    low, high = int(np.searchsorted(THRESHOLDS, 0.7)), int(np.searchsorted(THRESHOLDS, 0.9))
    blocks = noisy_blocks(9)
    said = assess(blocks, index=low, low=low, high=high)
    assert THRESHOLDS[low] == said.x_interval[0] <= said.x_interval[1] <= THRESHOLDS[high]
    said = assess(blocks, index=80, low=40, high=80)  # the best lies above
    assert THRESHOLDS[40] <= said.x_interval[0] <= said.x_interval[1] == THRESHOLDS[80]
    said = assess(blocks, index=low + 1, low=low + 1, high=low + 1)  # not even a coarse threshold within
    assert said.x_interval == (THRESHOLDS[low + 1], THRESHOLDS[low + 1])


def test_a_threshold_between_coarse_ones_is_taken_where_its_pixels_are():
    # With blocks in proportion to each other interpolation is exact, so it agrees with counts on every threshold.
    blocks = noisy_blocks(1) * np.array([1, 2, 3, 4, 5, 6, 7])[:, None, None]
    histogram = blocks.sum(axis=0)
    for index in (150, 200, 201, 202, 203, 243):
        interpolated = confidence.assess(THRESHOLDS, histogram, coarse(blocks), IOU, index, index, index)
        exact = confidence.assess(THRESHOLDS, histogram, blocks, IOU, index, index, index)
        assert interpolated.metric_interval == pytest.approx(exact.metric_interval, abs=1e-9)
        assert interpolated.gain_interval == pytest.approx(exact.gain_interval, abs=1e-9)
        value = IOU(*counts.confusion(histogram))[index]
        assert interpolated.metric_interval == pytest.approx((value, value), abs=1e-6)  # all blocks are alike


def test_on_the_tools_own_thresholds():
    rng = np.random.default_rng(2)
    blocks = np.zeros((6, 2, len(counts.THRESHOLDS) + 1), np.int64)
    for b, side in np.ndindex(6, 2):
        p = 1 / (1 + np.exp(-rng.normal(4 * side - 8 + b / 4, 1.5, 2000)))  # a network that hardly dares
        np.add.at(blocks[b, side], np.searchsorted(counts.THRESHOLDS, p.astype(np.float32)), 1)
    edges = np.r_[0, np.arange(1, len(counts.THRESHOLDS) + 1, counts.BLOCK_STEP)]
    histogram, in_blocks = blocks.sum(axis=0), np.add.reduceat(blocks, edges, axis=-1)
    assert in_blocks.shape[2] == len(counts.BLOCK_THRESHOLDS) + 1
    last = len(counts.THRESHOLDS) - 1
    index = trained(IOU, histogram)
    said = confidence.assess(counts.THRESHOLDS, histogram, in_blocks, IOU, index, 0, last)
    assert said.x_interval[0] <= counts.THRESHOLDS[index] <= said.x_interval[1] < 0.5
    assert np.isin(np.float32(said.x_interval), counts.THRESHOLDS).all()
    assert said.band_low.shape == counts.BLOCK_THRESHOLDS.shape
    assert said.gain_interval[0] > 0.1


def test_neither_tensorflow_nor_models_is_needed():
    code = "import sys, confidence; sys.exit(any(name in sys.modules for name in ('tensorflow', 'models', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------------------------
# Guaranteed recall


def guarantee(blocks, level, low=0, high=LAST):
    return confidence.guarantee_recall(
        THRESHOLDS, blocks.sum(axis=0), coarse(blocks), level, low, high, [str(b) for b in range(len(blocks))]
    )


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_guaranteed_recall_is_mapies(level, seed):
    rng = np.random.default_rng(seed)
    number, side = 15, 24
    truth = rng.random((number, 1, side, side)) < 0.3
    logits = rng.normal(np.where(truth, 1.5, -1.5), 1.5) + rng.normal(0, 0.7, (number, 1, 1, 1))
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    mapie = SemanticSegmentationController(
        predict_function=lambda pictures: pictures,
        risk="recall",
        method="crc",
        target_level=level,
        predict_params=THRESHOLDS[::STEP],
    )
    mapie.calibrate(probabilities, truth.reshape(number, -1).astype(int))
    said = guarantee(logits_to_blocks(logits.reshape(number, -1), truth.reshape(number, -1)), level)
    assert said.threshold == mapie.best_predict_param[0]
    assert said.blocks == number and said.reason is None
    positive = probabilities > said.threshold
    assert said.precision == pytest.approx((positive & truth).sum() / positive.sum())


def test_the_guarantee_holds_for_a_new_block():
    blocks, level, number = noisy_blocks(400, seed=3, spread=1.0, pixels=400), 0.8, 12
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(300):
        *drawn, new = rng.permutation(len(blocks))[: number + 1]
        position = np.searchsorted(THRESHOLDS, guarantee(blocks[drawn], level).threshold)
        tp, _, fn, _ = (count[position] for count in counts.confusion(blocks[new]))
        kept.append(tp / (tp + fn))
    error = np.std(kept) / np.sqrt(len(kept))
    assert level - 3 * error < np.mean(kept) < level + 0.08  # and it gives away no more than 1 / (blocks + 1)


@pytest.mark.parametrize(("level", "needed"), [(0.9, 9), (0.5, 1), (0.95, 19), (0.8, 4)])
def test_a_guarantee_needs_enough_blocks(level, needed):
    # Nothing is ever missed: with as many blocks as needed, 9 for 0.9, the bound is met exactly.
    def perfect(number):
        return logits_to_blocks(np.tile([-5.0, 12.0], (number, 4)), np.tile([False, True], (number, 4)))

    said = guarantee(perfect(needed), level)
    assert said.threshold is not None and said.precision == 1 and said.reason is None
    if needed > 1:
        said = guarantee(perfect(needed - 1), level)
        assert said.threshold is said.precision is None
        assert str(needed) in said.reason and str(needed - 1) in said.reason


def test_blocks_without_the_class_guarantee_nothing():
    blocks = noisy_blocks(40)
    blocks[30:, 1] = 0
    said = guarantee(blocks, 0.9)
    assert (said.blocks, said.threshold) == (30, guarantee(blocks[:30], 0.9).threshold)


def test_a_guarantee_keeps_to_the_bounds():
    blocks = noisy_blocks(40)
    free = guarantee(blocks, 0.9)
    position = int(np.searchsorted(THRESHOLDS, free.threshold))
    assert guarantee(blocks, 0.9, high=position - 1).threshold < free.threshold
    assert guarantee(blocks, 0.9, low=position).threshold == free.threshold
    said = guarantee(blocks, 0.9, low=position + 1)
    assert said.threshold is None and "lowest threshold" in said.reason


# ---------------------------------------------------------------------------------------------------------------
# Do they hold? The whole simulation: tests/coverage_simulation.py


@pytest.fixture(scope="module")
def pictures(sandbox):
    return coverage_simulation.population(sandbox)


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 10, 20])
def test_intervals_cover_what_they_promise(pictures, number):
    said = worlds_of_stacks(pictures, IOU, number, worlds=30)
    # Three standard errors of 30 worlds below what the whole simulation gives; quartiles would cover 50 %.
    assert 0.84 <= said["metric"] <= 1
    assert 0.78 <= said["threshold"] <= 1
    assert 0.82 <= said["gain"] <= 1
    # The whole simulation leaves less than half of the bias; so few worlds can tell that it becomes smaller.
    assert abs(said["expected bias"]) < 0.75 * said["bias"]


@pytest.mark.slow
def test_single_images_would_promise_too_much(pictures):
    assert worlds_of_stacks(pictures, IOU, 10, worlds=10, single_images=True)["metric"] < 0.85


@pytest.mark.slow
def test_one_stack_says_nothing_of_others(pictures):
    elsewhere, same = worlds_of_one_stack(pictures, IOU, worlds=12)
    assert elsewhere["metric"] < 0.5 < 0.9 < same["metric"]
