"""The two figures of a result: the metric over all thresholds, and slices with hits, misses and false alarms.

The same input gives the same bytes on every machine. pyplot is not used: it looks for a screen.
"""

import functools
import io
import logging
import math
import os
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from counts import BLOCK_STEP, BLOCK_THRESHOLDS, HALF, THRESHOLDS
from models import CLASS_METRICS
from results import interval_text, label, number_text, shortened, signed, threshold_text, unsigned

# matplotlib is imported where it draws, because its import fails where it cannot read the user's matplotlibrc: that is
# to cost a figure, not the result. It then reads these two.
os.environ["MPLBACKEND"] = "agg"  # a notebook sets one that may be missing here
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that cannot be written

# Colours of Okabe and Ito, which colour-blind people can distinguish. Line style differs too, for print without colour.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
# The slices are marked with these colours: red, green, blue, and the opacity over the slice.
OUTCOMES = {  # without colour, a false alarm is dark, a hit grey, a miss light
    "hit: predicted and in the mask": (86, 180, 233, 0.7),
    "miss: in the mask only": (240, 228, 66, 0.9),
    "false alarm: predicted only": (160, 44, 0, 0.85),
}
CHANGES = {  # of the outcome at 0.5: first to none of the outcomes, then to each in their order
    "false alarm gone": (0, 170, 80, 1),
    "new hit": (0, 220, 255, 1),
    "new miss": (255, 160, 0, 1),
    "new false alarm": (255, 0, 0, 1),
}
MARKS = np.array([(0, 0, 0, 0), *OUTCOMES.values(), *CHANGES.values()])  # the first is for none of the outcomes
# A palette holds 256 colours. The slice shines through a mark, but with less contrast: fewer colours of a mark will do.
LEVELS = np.maximum(np.rint(160 * (1 - MARKS[:, 3])), 1).astype(int)  # of each mark, from over black to over white
FIRST = np.cumsum(LEVELS) - LEVELS  # where the colours of each mark begin
WHITE = int(LEVELS[0]) - 1
SHADES = [np.linspace(0, 255, number)[:, None] for number in LEVELS]
PALETTE = np.concatenate([grey * (1 - mark[3]) + mark[:3] * mark[3] for grey, mark in zip(SHADES, MARKS, strict=True)])
SHOWN_PIXELS = 4_900_000  # at most, in all panels of slices together: keeps the file below 5 MB even for noisy images
PANEL_SIDE = 384  # pixels; a panel of slices is at most this wide and high
GROWN_SIDE = 300  # pixels; small slices are enlarged up to this, so that six of them fit side by side on a screen
COLUMN = 190  # pixels; room for the numbers of a slice where a panel is narrower
LINE, GAP = 20, 8  # pixels: the height of a line of text, and what lies between panels
COMPRESSION = 1  # of PNG: faster than the default, and hardly larger

DPI = 200  # drawn for three classes side by side, 11 inches wide
PRINTED_DPI = 300  # written into the file: printed at this resolution, these 11 inches are the 7.6 of a page
STYLE = {
    "font.size": 8,
    "text.parse_math": False,  # the name of a folder may have a $ in it
    "text.hinting": "none",  # takes time, and cannot be seen at this resolution
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def draw(results, counts, metric, title, note):
    """Draw both figures. One that cannot be drawn, because of what else is set or installed here, costs a warning only.

    `counts` is a counts.Counts, the other arguments are those of `draw_curves`. Returns a dictionary of PNGs, by the
    ends of their names, and a list of warnings.
    """
    titles = [f"{result.title}, threshold {threshold_text(result.trained.x)}" for result in results]
    indices = [result.trained.index for result in results]
    files, problems = {}, []
    for ending, function, given in (
        (".png", draw_curves, (results, metric, title, note)),
        ("_slices.png", draw_slices, (counts.shown, indices, titles, f"{title}: best {metric.name}")),
    ):
        try:
            files[ending] = function(*given)
        except Exception as error:
            problems.append(
                f"the figure model_thresholds_<timestamp>{ending} cannot be drawn, all else is uploaded: {error!r}"
            )
    return files, problems


# ---------------------------------------------------------------------------------------------------------------
# The curves


def draw_curves(results, metric, title, note):
    """Draw the metric of every class over the threshold, with its confidence band, and the trained threshold.

    `results` holds a results.ClassResult for each panel, at least one. Precision and recall are drawn too, and the
    level of a constraint. `note` is a text below the title: where the intervals come from. Returns a PNG.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):  # whatever the user's matplotlibrc says
        canvas = FigureCanvasAgg(curves_figure(results, metric, title, note))
        canvas.draw()
    return _png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), dpi=(PRINTED_DPI, PRINTED_DPI))


def _png(page, **options):
    file = io.BytesIO()
    page.save(file, "PNG", compress_level=COMPRESSION, **options)
    return file.getvalue()


def curves_figure(results, metric, title, note):
    """The matplotlib figure of `draw_curves`."""
    from matplotlib.figure import Figure

    columns = len(results) if len(results) <= 3 else min(4, math.ceil(math.sqrt(len(results))))
    rows = math.ceil(len(results) / columns)
    wide, high = (2.9, 2.1) if len(results) > 1 else (6.2, 3.2)
    left, right, above, below = 0.65, 0.25, 0.95, 0.4  # room around a panel; all is in inches
    width = columns * (left + wide + right)
    head = [_fitted(title, 8, width - 0.9), *textwrap.wrap(note, int(14 * width))]
    in_row = max(3, 2 * columns)  # entries of the legend, of 11 at most
    head_high, legend_high = 0.12 * (1 + len(head)), 0.15 + 0.16 * math.ceil(11 / in_row)
    height = head_high + rows * (above + high + below) + legend_high
    # By hand, because matplotlib's constrained layout takes 6 % of a rerun with 3 classes, and more with more.
    edges = {
        "left": left / width,
        "right": 1 - right / width,
        "top": 1 - (head_high + above) / height,
        "bottom": (legend_high + below) / height,
        "wspace": (left + right) / wide,
        "hspace": (above + below) / high,
    }
    figure = Figure((width, height), DPI)
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges)
    shared = _vertical_range(results, metric)
    entries = {}
    for axes, result in zip(panels.flat, results, strict=False):
        _draw_panel(axes, result, metric)
        _set_axes(axes, result, metric, shared)
        _write_numbers(axes, result, metric, wide + right)
        entries |= {entry.get_label(): entry for entry in axes.get_legend_handles_labels()[0]}
    for empty in panels.flat[len(results) :]:
        empty.remove()
    figure.suptitle("\n".join(head), x=0.4 / width, y=1 - 0.1 / height, ha="left", va="top", size=8)
    style = {"frameon": False, "handlelength": 2.6, "columnspacing": 1.6}
    figure.legend(handles=entries.values(), loc="lower center", ncols=in_row, **style)
    return figure


def _draw_panel(axes, result, metric):
    """Draw the curves, points and ranges of a class."""
    trained, curve, confidence = result.trained, result.curve, result.confidence
    guaranteed = result.guaranteed_recall
    drawn = np.union1d(range(0, len(THRESHOLDS), BLOCK_STEP), trained.index)
    x = THRESHOLDS[drawn].astype(float)

    axes.plot(x, curve.metric[drawn], color=BLUE, lw=1.8, zorder=3, label=label(metric))
    if confidence.band_low is not None:
        band = confidence.band_low, confidence.band_high
        axes.fill_between(BLOCK_THRESHOLDS, *band, color=BLUE, alpha=0.25, lw=0, label="its 95 % confidence band")
    axes.axvline(trained.x, color=VERMILLION, lw=1.1, label="trained threshold")
    if confidence.x_interval is not None:
        axes.axvspan(*confidence.x_interval, color=VERMILLION, alpha=0.15, lw=0, label="its 95 % interval")
    axes.axvline(0.5, color="0.45", lw=0.9, ls=(0, (1, 1.5)), label="threshold 0.5")
    for name, color, style in (("precision", GREEN, (0, (5, 2))), ("recall", PURPLE, (0, (6, 1.5, 1, 1.5)))):
        if name != label(metric):
            weight = 1.5 if name == metric.constraint_name else 0.9
            values = CLASS_METRICS[name](*(count[drawn] for count in curve.counts))
            axes.plot(x, values, color=color, lw=weight, ls=style, label=name)
    if metric.constraint:
        wanted = f"{metric.constraint_name} asked for"
        axes.axhline(metric.level, color="black", lw=0.9, ls=(0, (4, 2, 1, 2)), label=wanted)
    if guaranteed and not guaranteed.reason:
        kept = f"recall {guaranteed.level:g} guaranteed"
        axes.axvline(guaranteed.threshold, color=PURPLE, lw=1.1, ls=(0, (3, 1)), label=kept)
    if own_bests := _own_bests(result):
        name = f"{result.kind.split()[0]}, each at its own best"
        style = {"color": "black", "alpha": 0.6, "mec": "none", "ms": 2.4, "zorder": 3.5}
        axes.plot(*zip(*own_bests, strict=True), "o", label=name, **style)
    if confidence.next_stack_interval is not None:
        ends = [trained.x] * 2, confidence.next_stack_interval
        axes.plot(*ends, "-_", color="black", lw=1, ms=6, label="next stack (95 % range)")
    axes.plot(trained.x, trained.metric, "o", color=VERMILLION, mec="black", mew=0.6, ms=4.5, zorder=4)


def _own_bests(result):
    """For each stack of a class with pixels of it: its own best threshold, and its metric there."""
    return [(stack.own_x, stack.own_metric) for stack in result.stacks if stack.own_x is not None]


def _set_axes(axes, result, metric, shared):
    """Set the scales and ranges of both axes. Panels share that of the metric, except where a curve would be flat.

    On a linear axis, a trained threshold close to 0 or 1 would lie on the frame: a logit axis spreads these thresholds.
    """
    if 0.02 <= result.trained.x <= 0.98:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks(np.linspace(0, 1, 5))
        axes.set_xlabel("threshold", labelpad=2)
    else:
        shown = [result.trained.x, *(result.confidence.x_interval or ()), *(x for x, _ in _own_bests(result))]
        axes.set_xscale("logit")
        axes.set_xlim(min(*shown, 1e-4) / 4, 1 - (1 - max(*shown, 1 - 1e-4)) / 4)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.minorticks_off()
        axes.set_xlabel("threshold (logit scale)", labelpad=2)
    bottom, top = _vertical_range([result], metric)
    own = top - bottom < 0.2 * (shared[1] - shared[0])
    bottom, top = (bottom, top) if own else shared
    margin = 0.02 * (top - bottom)
    axes.set_ylim(bottom - margin * (bottom > 0), top + margin)
    axes.set_ylabel(label(metric) + " (another scale)" * own)
    axes.xaxis.set_major_formatter("{x:.10g}")
    axes.yaxis.set_major_formatter("{x:.10g}")


def _vertical_range(results, metric):
    """0 to 1, or the lower or upper part of it where all that matters lies in that part."""
    level = metric.level
    matters = [] if level is None else [level]
    for result in results:
        matters += [result.trained.metric, float(np.median(result.curve.metric))]
        matters += [best for _, best in _own_bests(result)]
        matters += result.confidence.metric_interval or ()
        matters += result.confidence.next_stack_interval or ()
    if min(matters) > 0.9:
        return 1 - max(1.1 * (1 - min(matters)), 0.001), 1
    return 0, max(1.1 * max(matters), 0.001) if max(matters) < 0.2 else 1


def _write_numbers(axes, result, metric, wide):
    """Write name and numbers of a class above its panel, in at most `wide` inches."""
    trained, confidence = result.trained, result.confidence
    tp, _, fn, _ = result.curve.counts
    values = trained.metric, trained.metric_at_half, confidence.expected_metric
    at_x, at_half, expected = map(result.metric_text, values)
    gain = number_text(confidence.gain, confidence.gain_interval, signed)
    doubt = ", unclear" * confidence.gain_unclear + " (0.5 does not reach the level)" * (confidence.gain is None)
    lines = [
        f"threshold {result.x_text(trained.x)}{_in_brackets(confidence.x_interval, threshold_text)}",
        f"{label(metric)} {at_x}{_in_brackets(confidence.metric_interval)}; {at_half} at 0.5",
        f"gain {gain}{_in_brackets(confidence.gain_interval, signed)}{doubt}",
        f"expected {expected}; next stack {interval_text(confidence.next_stack_interval)}",
        f"{tp[0] + fn[0]:,} positives{f' in {result.worth_text}' if result.worth_text else ''}",
    ]
    title = _fitted(result.title, 9, wide, bold=True)
    axes.set_title(title, loc="left", y=1, size=9, weight="bold", pad=9 + 9 * len(lines))
    text = "\n".join(_fitted(line, 7.5, wide) for line in lines)
    axes.annotate(text, (0, 1), (0, 5.5), xycoords="axes fraction", textcoords="offset points", size=7.5)


def _in_brackets(limits, form=unsigned):
    return f" ({interval_text(limits, form)})" if limits else ""


def _fitted(text, points, inches, bold=False):
    """The text, without its middle where it is too wide for a figure of curves."""
    return _drawable(text, 0.98 * inches * DPI, _font(points * DPI / 72, bold))


# ---------------------------------------------------------------------------------------------------------------
# The slices


def draw_slices(shown, indices, titles, title):
    """Draw slices side by side, with a row per class, and hits, misses and false alarms in colour.

    What differs from the prediction at 0.5 has a colour of its own, and stands above the panel in numbers. `shown`
    holds at least one counts.ShownSlice, all of the same shape; one that was chosen for two classes is drawn once, and
    one without any pixel of a class, true or predicted, only if there are no others. `indices` holds those of the
    trained thresholds in THRESHOLDS, `titles` what to write above the rows, one a class. Returns a PNG.
    """
    different = list({one.name: one for one in shown}.values())
    slices = [one for one in different if one.truth.any() or (one.bins > indices).any()] or different
    height, width = slices[0].image.shape
    side = min(PANEL_SIDE, math.isqrt(SHOWN_PIXELS // (len(slices) * len(titles))))
    shrink, grow = math.ceil(max(height, width) / side), max(min(side, GROWN_SIDE) // max(height, width), 1)
    high, wide = (math.ceil(length / shrink) * grow for length in (height, width))
    top, row, column = GAP + 4 * LINE + GAP, 2 * LINE + high + GAP, max(wide, COLUMN) + GAP
    page = Image.new("L", (max(GAP + len(slices) * column, 1020), top + len(titles) * row), WHITE)
    room = page.width - 2 * GAP
    _write(page, GAP, GAP, title, room, size=15)
    _draw_legend(page)
    for i, one in enumerate(slices):
        _write(page, GAP + i * column, GAP + 3 * LINE, one.name, column - GAP)
    for k, index in enumerate(indices):
        y = top + k * row
        _write(page, GAP, y, titles[k], room, bold=True)
        for i, one in enumerate(slices):
            masks = one.truth[..., k], one.bins[..., k] > index, one.bins[..., k] > HALF
            _write(page, GAP + i * column, y + LINE, change_text(*masks), column - GAP, size=12)
            panel = Image.fromarray(_panel(one.image, *masks, shrink))
            page.paste(panel.resize((wide, high), Image.Resampling.NEAREST), (GAP + i * column, y + 2 * LINE))
    page.putpalette(np.rint(PALETTE).astype(np.uint8).tobytes())
    return _png(page)


def _draw_legend(page):
    """Draw two lines: the outcomes, and below them what differs from the outcome at 0.5."""
    changed = "changed from threshold 0.5 (numbers: more or fewer pixels):  "
    for y, before, entries, first in ((GAP + LINE, "", OUTCOMES, 1), (GAP + 2 * LINE, changed, CHANGES, 4)):
        x = GAP + _write(page, GAP, y, before, page.width)
        for mark, name in enumerate(entries, first):
            page.paste(int(FIRST[mark] + LEVELS[mark] // 2), (x, y + 4, x + 12, y + 16))
            x += 20 + _write(page, x + 20, y, name, page.width) + 24


def _write(page, x, y, text, room, size=13, bold=False):
    """Write a line of text, at most `room` pixels wide; returns its width."""
    font = _font(size, bold)
    text = _drawable(text, room, font)
    ImageDraw.Draw(page).text((x, y + LINE / 2), text, fill=0, font=font, anchor="lm")
    return math.ceil(font.getlength(text))


def change_text(truth, prediction, at_half):
    """What differs from the prediction at 0.5, in numbers of pixels. The masks are bool arrays of one shape."""
    if not (truth | prediction | at_half).any():
        return "class not here"
    hits, false_alarms = (
        np.count_nonzero(prediction & part) - np.count_nonzero(at_half & part) for part in (truth, ~truth)
    )
    return f"hits {hits:+,}, false alarms {false_alarms:+,}" if hits or false_alarms else "as at 0.5"


def _panel(image, truth, prediction, at_half, shrink):
    """A slice with one class marked, in colours of PALETTE: uint8, (ceil(height / shrink), ceil(width / shrink))."""
    outcome, before = (_outcomes(truth, predicted, shrink) for predicted in (prediction, at_half))
    grey = np.asarray(Image.fromarray(image).reduce(shrink))
    mark = outcome + 4 * (outcome != before)
    return (FIRST[mark] + LEVELS[mark] * grey // 256).astype(np.uint8)


def _outcomes(truth, prediction, shrink):
    """The most frequent outcome in each cell of shrink x shrink pixels; none only if no pixel of the cell has one.

    So thin cracks remain visible. Of equally frequent ones, a miss comes before a false alarm, and that before a hit.
    Returns uint8, shape (ceil(height / shrink), ceil(width / shrink)): 0 for none, then in the order of OUTCOMES.
    """
    shares = [
        np.asarray(Image.fromarray(pixels.astype(np.float32)).reduce(shrink))
        for pixels in (truth & ~prediction, prediction & ~truth, truth & prediction)  # argmax prefers the earlier
    ]
    outcome = np.array([2, 3, 1], np.uint8)[np.argmax(shares, axis=0)]
    return np.where(np.any(shares, axis=0), outcome, 0)


@functools.cache
def _font(size, bold):
    """The font of both figures, for Pillow."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _drawable(text, room, font):
    """The text, with escapes for characters that the font lacks, and without its middle if it is wider than `room`."""
    from matplotlib.font_manager import get_font

    glyphs = get_font(font.path)
    text = "".join(c if glyphs.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)
    return shortened(text, room, font.getlength)
