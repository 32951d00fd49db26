"""The figures: everything is drawn at the right place, for any number of classes, any names and sizes."""

import hashlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import figures
import models
from confidence import Confidence, GuaranteedRecall, StackResult
from counts import THRESHOLDS
from results import ClassResult

T = THRESHOLDS.astype(np.float64)
ODD_NAMES = [r"fibre $\alpha", "$_{", "100%_{}", "crack\n\udcff\t", "Größe Ω", "裂纹", "a" * 300, "", "^\\", "$x$"]
NOTE = "The 95 % intervals are computed from how 11 stacks differ. They hold for further stacks like these. " * 3


def index_of(threshold):
    return int(np.abs(T - threshold).argmin())


def bump(centre, width, height):
    return height * np.exp(-(((T - centre) / width) ** 2))


def result(name="class0", folder="class_0", metric=None, x=None, guaranteed=None, stacks=(), warned=(), **confidence):
    """A ClassResult whose metric is the one given, else a bump at 0.6, with the threshold at its peak, or at x."""
    metric = bump(0.6, 0.2, 0.8) if metric is None else metric
    index = int(np.argmax(metric)) if x is None else index_of(x)
    x, value, at_half = float(T[index]), float(metric[index]), float(metric[index_of(0.5)])
    at_blocks = metric[::64]
    pixels = np.full(len(T), 12345)
    curve = models.ClassCurve(
        tp=pixels, fp=pixels, fn=0 * pixels, tn=pixels, metric=metric, precision=T**0.5, recall=1 - T**3
    )
    trained = models.TrainedThreshold(
        index=index, x=x, metric=value, metric_at_half=at_half, allowed_at_half=True, best_stretch=(x, x),
        success=True, status=0, message="Solution found.", nfev=1, history=[(x, value)], warnings=list(warned),
    )  # fmt: skip
    values = {
        "blocks": 11,
        "worth": 11.0,
        "reason": None,
        "x_interval": (0.95 * x, x + 0.02 * (1 - x)),
        "metric_interval": (0.9 * value, min(1.1 * value, 1.0)),
        "expected_metric": 0.97 * value,
        "gain": value - at_half,
        "gain_interval": (value - at_half - 0.01, value - at_half + 0.02),
        "gain_unclear": False,
        "next_stack_interval": (0.6 * value, min(1.2 * value, 1.0)),
        "why_no_next_stack": None,
        "constraint_value": None,
        "constraint_interval": None,
        "band_low": 0.9 * at_blocks,
        "band_high": np.minimum(1.1 * at_blocks, 1),
    }
    return ClassResult(name, folder, trained, curve, Confidence(**values | confidence), guaranteed, list(stacks), "stacks")


NOTHING = dict.fromkeys(
    [
        "x_interval",
        "metric_interval",
        "expected_metric",
        "gain_interval",
        "next_stack_interval",
        "band_low",
        "band_high",
    ]
) | {"reason": "too few stacks", "why_no_next_stack": "these are runs"}


def stack(name, own_x, own_metric, x_without=0.6, metric_without=0.8):
    return StackResult(name, 5, 1000, own_metric, 0.5, own_x, own_metric, x_without, metric_without)


def draw(results, metric_name="iou_score", title="title"):
    return figures.draw_curves(results, metric_name, title, NOTE)


def decode(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def panels(results, metric_name="iou_score", title="title"):
    """The figure and its panels' axes, laid out as in the PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(figures.STYLE):
        figure = figures.curves_figure(results, metric_name, title, NOTE)
        with warnings.catch_warnings(action="ignore"):  # glyphs that are missing
            FigureCanvasAgg(figure).draw()
    return figure, figure.axes


def is_drawn(color, png, figure, axes, x, y):
    """Which of the 3 x 3 pixels around a point, in coordinates of the axes, have a colour given as #RRGGBB."""
    column, up = axes.transData.transform((x, y))
    row = len(picture := decode(png)) - up
    pixels = picture[round(row) - 1 : round(row) + 2, round(column) - 1 : round(column) + 2].reshape(-1, 3)
    return np.abs(pixels - [int(color[i : i + 2], 16) for i in (1, 3, 5)]).sum(axis=1) < 30


def line(axes, label):
    return next(artist for artist in axes.lines if artist.get_label() == label)


# The curves


@pytest.mark.parametrize(("classes", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (12, 3, 4)])
def test_every_class_has_a_panel_and_no_text_overlaps_another_or_the_edge(classes, rows, columns):
    from matplotlib.text import Text

    # Long names everywhere, the widest tick labels, and every entry of the legend.
    guaranteed = GuaranteedRecall(0.95, 0.1, 0.2, 0.98, 30, None)
    unclear = {"gain_interval": (-0.00029, 0.00071), "gain_unclear": True, "worth": 4.6}
    metric = bump(0.6, 0.2, 0.0007)
    results = [result("class10", "m" * 80, metric, None, guaranteed, [stack("a", 0.5, 0.0006)], **unclear)] * classes
    figure, axes = panels(results, "precision_at_recall_0.95", "long title " * 40)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    places = [one.get_position() for one in axes]
    assert len(places) == classes
    assert len({round(place.x0, 6) for place in places}) == columns
    assert len({round(place.y0, 6) for place in places}) == rows
    assert len(texts) > 15 * classes
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert not [texts[k] for k in range(i) if box.overlaps(boxes[k])], text


@pytest.mark.parametrize("x", [0.6, 1e-4])
def test_the_curve_is_drawn_at_its_place(x):
    metric = np.where(T < 0.3, 0.4, 0.7)
    metric[index_of(x)] = 0.9  # a peak of one threshold
    shown = result(metric=metric, next_stack_interval=None)
    figure, (axes,) = panels([shown])
    drawn_x, drawn_y = line(axes, "IoU").get_data()
    coarse = [k for k in range(0, len(T), 64) if drawn_x[0] <= T[k] <= drawn_x[-1]]
    assert len(coarse) > 500 and (np.interp(T[coarse], drawn_x, drawn_y) == metric[coarse]).all()
    assert (shown.trained.x, 0.9) in zip(drawn_x, drawn_y, strict=True)
    png = draw([shown])
    assert is_drawn(figures.VERMILLION, png, figure, axes, shown.trained.x, 0.9).all()
    assert is_drawn(figures.BLUE, png, figure, axes, 0.02, 0.4).any()
    assert not is_drawn(figures.BLUE, png, figure, axes, 0.02, 0.5).any()


@pytest.mark.parametrize("x", [2.0**-40, 1e-5, 0.002, 0.998, 1 - 2.0**-24])
def test_the_axis_reaches_as_far_as_a_threshold_close_to_an_end(x):
    logit = np.log(T / (1 - T))
    shown = result(metric=0.8 * np.exp(-(((logit - logit[index_of(x)]) / 0.3) ** 2)), next_stack_interval=None)
    figure, (axes,) = panels([shown])
    at = line(axes, "trained threshold").get_xdata()[0]
    box = axes.get_window_extent()
    column = axes.transData.transform((at, 0))[0]
    assert min(column - box.x0, box.x1 - column) > 5
    half = axes.transData.transform((line(axes, "threshold 0.5").get_xdata()[0], 0))[0]
    assert box.x0 < half < box.x1
    assert is_drawn(figures.VERMILLION, draw([shown]), figure, axes, at, 0.8).all()
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(ticks) <= 8 and "0.5" in ticks and "logit" in axes.get_xlabel()
    assert [float(tick) for tick in ticks] == list(axes.get_xticks())


@pytest.mark.parametrize("height", [0.0004, 0.15, 0.93, 1.0])
def test_a_curve_fills_its_panel(height):
    _, (axes,) = panels([result(metric=bump(0.6, 0.2, height))])
    bottom, top = axes.get_ylim()
    assert (height - bottom) / (top - bottom) > 0.3
    assert top >= min(1.1 * height, 1)
    assert [float(label.get_text()) for label in axes.get_yticklabels()] == pytest.approx(list(axes.get_yticks()))


def test_panels_have_the_same_vertical_axis_except_where_a_curve_would_be_flat():
    heights = 0.5, 0.9, 0.01
    _, axes = panels([result(metric=bump(0.6, 0.2, height)) for height in heights])
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[2].get_ylim()[1] < 0.05
    assert [one.get_ylabel() for one in axes] == ["IoU", "IoU", "IoU (another scale)"]


def test_what_belongs_to_the_intervals_is_drawn():
    guaranteed = GuaranteedRecall(0.9, 0.2, 0.5, 0.97, 11, None)
    stacks = [stack("a", 0.25, 0.4), stack("b", 0.75, 0.9), StackResult("c", 5, 0, *6 * [None])]
    shown = result(guaranteed=guaranteed, stacks=stacks, x_interval=(0.3, 0.9), next_stack_interval=(0.35, 0.95))
    figure, (axes,) = panels([shown], "precision_at_recall_0.9")
    low, high = axes.patches[0].get_extents().transformed(axes.transData.inverted()).intervalx
    assert (low, high) == pytest.approx((0.3, 0.9))
    band = axes.collections[0].get_paths()[0].vertices
    at = len(T[::64]) // 2
    for y in (shown.confidence.band_low[at], shown.confidence.band_high[at]):
        assert np.isclose(band, (T[::64][at], y)).all(axis=1).any()
    assert line(axes, "threshold 0.5").get_xdata()[0] == 0.5
    assert line(axes, "recall asked for").get_ydata()[0] == 0.9
    assert line(axes, "recall 0.9 guaranteed").get_xdata()[0] == 0.2
    assert np.transpose(line(axes, "stacks, each at its own best").get_data()).tolist() == [[0.25, 0.4], [0.75, 0.9]]
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar == pytest.approx(np.array([[shown.trained.x, 0.35], [shown.trained.x, 0.95]]))
    x, y = line(axes, "recall").get_data()
    assert np.allclose(y, np.interp(x, T, shown.curve.recall), atol=0.03)
    labels = [artist.get_label() for artist in axes.lines]
    assert labels.count("precision") == 1  # the metric is not drawn twice
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"recall", "recall asked for", "next stack (95 % range)", "its 95 % interval"} < set(legend)


def test_the_numbers_of_a_class_stand_above_its_panel():
    shown = result("class7", "cracks", x=0.61234, x_interval=(0.6, 0.65), metric_interval=(0.65, 0.7875), worth=4.61)
    figure, (axes,) = panels([shown], "f1_score")
    text = "\n".join(text.get_text() for text in axes.texts)
    for part in [
        "class7 (cracks)",
        "0.612 (0.600 to 0.650)",
        "F1 0.80 (0.65 to 0.79)",
        "0.77 expected on new images; next stack 0.48 to 0.96",
        "12,345 positives in 11 stacks, worth 4.6",
    ]:
        assert part in text
    assert axes.get_ylabel() == "F1" and axes.get_xlabel() == "threshold"
    assert NOTE.split() == figure.get_suptitle().split()[1:]


def test_without_an_interval_there_is_no_band():
    figure, (axes,) = panels([result(**NOTHING)])
    assert not axes.patches and not axes.collections and not axes.containers
    assert "[" not in "".join(text.get_text() for text in axes.texts)
    assert not any("95" in text.get_text() for text in figure.legends[0].get_texts())


def test_names_are_drawn_literally():
    results = [result(f"class{i}", name) for i, name in enumerate(ODD_NAMES)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(results, title=r"$\frac{model}$ 裂纹 \udcff")
    _, axes = panels(results)
    titles = [one.texts[0].get_text() for one in axes]
    assert titles[0] == r"class0 (fibre $\alpha)" and titles[9] == "class9 ($x$)"
    assert titles[6].startswith("class6 (aaa") and titles[6].endswith("aaa)") and "…" in titles[6]
    assert not any(text.get_parse_math() for one in axes for text in one.texts)


def draw_both():
    """Hashes of both figures by the ends of their names, and the number of warnings."""
    files, problems = figures.draw([result()], SimpleNamespace(shown=[shown_slice()]), "iou_score", "title", NOTE)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, len(problems)


@pytest.mark.parametrize("place", ["config", "here"])
def test_the_users_matplotlib_settings_change_nothing_or_cost_one_figure(tmp_path, place):
    settings = {"config": tmp_path / "matplotlib", "here": tmp_path}[place]
    settings.mkdir(exist_ok=True)
    (settings / "matplotlibrc").write_bytes("# Größe\nfont.size: 30\naxes.facecolor: black".encode("latin-1"))
    process = subprocess.run(
        [sys.executable, "-c", "import test_figures; print(test_figures.draw_both())"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parent}:{Path(figures.__file__).parent}",
            "XDG_CONFIG_HOME": str(tmp_path),
            "MPLBACKEND": "a_notebook",
        },
        capture_output=True,
        text=True,
    )
    assert not process.stderr
    files, problems = draw_both()
    if place == "here":  # matplotlib reads this one first, whatever is set
        del files[".png"]
        problems = 1
    assert process.stdout == f"{(files, problems)}\n"


# The slices


def shown_slice(name="slice_0", truth=True, probability=0.55):
    """A counts.ShownSlice of 64 x 64 pixels and one class: a square with this probability, in the mask or not."""
    square = np.zeros((64, 64, 1), bool)
    square[10:20, 10:20] = True
    bins = np.where(square, index_of(probability), 0).astype(np.int32)
    return SimpleNamespace(
        class_index=0,
        name=name,
        block=0,
        pixels=100,
        image=np.zeros((64, 64), np.uint8),
        truth=square & truth,
        bins=bins,
    )


def test_each_slice_is_shown_once_and_empty_ones_only_where_there_are_no_others():
    one, empty = shown_slice("a"), shown_slice("b", truth=False, probability=0.01)
    shown = figures.slices(SimpleNamespace(shown=[one, empty, one]), [index_of(0.6)])
    assert [slice.name for slice in shown] == ["a"]
    assert not shown[0].prediction.any() and shown[0].at_half.sum() == 100
    at_half = shown_slice(probability=0.5)  # not above
    assert not figures.slices(SimpleNamespace(shown=[at_half]), [index_of(0.4)])[0].at_half.any()
    assert [slice.name for slice in figures.slices(SimpleNamespace(shown=[empty, empty]), [index_of(0.6)])] == ["b"]


def tint(outcome, grey):
    """The colour of an outcome (0 hit, 1 miss, 2 false alarm) over a grey level of the image."""
    color, opacity = list(figures.OUTCOMES.values())[outcome]
    return opacity * np.array(color) + (1 - opacity) * grey


def positions(picture, color):
    """Rows and columns of the pixels of a colour, give or take the palette's step of grey."""
    return np.argwhere((np.abs(picture - color) <= 2).all(axis=-1))


def marked(size=(256, 256), grey=12, name="slice_0"):
    """A hit of 20 x 10 pixels, a miss of 5 x 10 right of it, a false alarm of 20 x 3 below it; the same at 0.5."""
    truth, prediction = np.zeros((*size, 1), bool), np.zeros((*size, 1), bool)
    truth[50:70, 30:40] = prediction[50:70, 30:40] = True
    truth[50:55, 40:50] = True
    prediction[70:90, 30:33] = True
    return figures.Slice(name, np.full(size, grey, np.uint8), truth, prediction, prediction)


def test_hits_misses_and_false_alarms_are_drawn_at_their_places():
    picture = decode(figures.draw_slices([marked()], ["class0"], "title"))
    hits, misses, false_alarms = (positions(picture, tint(i, 12)) for i in range(3))
    assert (len(hits), len(misses), len(false_alarms)) == (20 * 10, 5 * 10, 20 * 3)
    corner = hits.min(axis=0)
    assert (misses.min(axis=0) - corner).tolist() == [0, 10]
    assert (false_alarms.min(axis=0) - corner).tolist() == [20, 0]
    slice_corner = corner - (50, 30)
    assert np.abs(picture[tuple(slice_corner)] - 12).max() <= 2
    assert (picture[tuple(slice_corner - 1)] == 255).all()


def test_what_changed_from_one_half_is_marked_and_counted():
    shown = marked()
    at_half = np.zeros_like(shown.truth)
    at_half[50:60, 30:40] = True  # half of the hits
    at_half[100:107, 30:40] = True  # false alarms that are gone
    at_half[50:52, 40:50] = True  # hits that are misses now
    shown = shown._replace(at_half=at_half)
    picture = decode(figures.draw_slices([shown], ["class0"], "title"))
    legend = 12 * 12
    sizes = {name: len(positions(picture, color)) - legend for name, color in figures.CHANGES.items()}
    assert sizes == {"false alarm gone": 70, "new hit": 100, "new miss": 20, "new false alarm": 60}
    assert figures.change(shown, 0) == "hits +80, false alarms -10"
    assert figures.change(marked(), 0) == "as at 0.5"


def test_rows_are_classes_and_columns_are_slices():
    shape = 100, 80
    slices = []
    for i in range(3):
        mask = np.zeros((*shape, 2), bool)
        mask[:, :, i % 2] = True
        slices.append(figures.Slice(f"slice {i}", np.full(shape, 40 * i, np.uint8), mask, *2 * [np.ones_like(mask)]))
    picture = decode(figures.draw_slices(slices, ["a", "b"], "title"))
    place = {}
    for i in range(3):
        for outcome in (0, 2):
            found = positions(picture, tint(outcome, 40 * i))
            assert len(found) == 300 * 240  # enlarged three times
            place[i, outcome] = found.mean(axis=0)
    rows, columns = ({key: means[axis] for key, means in place.items()} for axis in (0, 1))
    assert rows[0, 0] == rows[1, 2] == rows[2, 0] < rows[0, 2] == rows[1, 0] == rows[2, 2]
    assert columns[0, 0] == columns[0, 2] < columns[1, 0] == columns[1, 2] < columns[2, 0] == columns[2, 2]


def test_without_colour_a_false_alarm_is_darker_than_a_hit_and_a_miss_lighter():
    def lightness(color):
        return np.array(color) @ [0.299, 0.587, 0.114]

    hit, miss, false_alarm = ([lightness(tint(i, grey)) for grey in range(256)] for i in range(3))
    assert max(false_alarm) + 8 < min(hit) and max(hit) + 4 < min(miss)
    of_changes = {name: lightness(color) for name, color in figures.CHANGES.items()}
    assert of_changes["new false alarm"] + 50 < of_changes["new hit"] < of_changes["new miss"] - 30


def test_cracks_one_pixel_wide_have_no_gaps_in_large_slices():
    truth = np.zeros((2048, 2048, 1), bool)
    truth[777] = True
    truth[np.arange(2048), np.arange(2048)] = True
    truth[1500, 3] = True
    shown = figures.Slice("s", np.full((2048, 2048), 12, np.uint8), truth, *2 * [np.zeros_like(truth)])
    picture = decode(figures.draw_slices([shown], ["a"], "title"))
    found = positions(picture, tint(1, 12))
    top, left = found.min(axis=0)
    mask = np.zeros((342, 342), bool)
    mask[tuple((found - (top, left)).T)] = True
    assert mask[777 // 6].all() and mask.diagonal().all() and mask[1500 // 6, 0]
    assert len(found) == 342 + 342 - 1 + 1


def test_twelve_classes_of_noisy_images_and_odd_names_stay_below_4_mb():
    rng, side = np.random.default_rng(0), 512
    masks = (rng.random((3, side // 32, side // 32, 12)) < 0.3).repeat(32, axis=1).repeat(32, axis=2)
    slices = [
        figures.Slice(name, rng.normal(128, 40, (side, side)).clip(0, 255).astype(np.uint8), *masks)
        for name in ["$", "裂纹.tif", "x" * 400, "a\nb", "\udcff", ""]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = figures.draw_slices(slices, [*ODD_NAMES, "k", "l"], "m" * 900)
    assert len(png) < 4_000_000
    assert decode(png).shape[1] > 6 * 190


def test_the_same_input_gives_the_same_bytes():
    assert draw([result()]) == draw([result()])
    assert figures.draw_slices([marked()], ["a"], "t") == figures.draw_slices([marked()], ["a"], "t")
    assert figures.draw_slices([marked()], ["a"], "t") != figures.draw_slices([marked(grey=99)], ["a"], "t")
