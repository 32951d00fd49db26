"""Hostile and broken content in a bucket: nothing is executed, memory stays bounded, and one clean line names it."""

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import (
    MODEL,
    SCRIPT,
    SPLIT,
    arguments,
    assert_one_error_line,
    results,
    run_tool,
    thresholds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_gcp_utils import listing_stub

import train_segmentation_model_prediction_thresholds as script
from gcp_utils import Blob, BucketError, open_bucket
from image_utils import DatasetError, decode_image, pair_images_and_masks

EXPECTED = (DatasetError, BucketError)
MEGABYTES = 300  # what no case may take more
ARGS = script.parse_arguments(arguments("bucket"))


@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    """A folder of the test's own, where nothing but bucket and tmp may be afterwards, and bounded memory and time."""
    monkeypatch.chdir(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
    before, start = memory("VmRSS"), time.monotonic()
    yield
    assert memory("VmHWM") - before < MEGABYTES
    assert time.monotonic() - start < 60
    assert {path.name for path in tmp_path.iterdir()} <= {"bucket", "tmp", "no_tensorflow", "counted"}


def memory(kind):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def error_line(call, capsys, *words):
    """What the user reads of the error that a call must raise."""
    with pytest.raises(EXPECTED) as caught:
        call()
    capsys.readouterr()
    script.fail(3, caught.value)
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.removesuffix("\n")
    assert line.startswith("error: ") and line.isprintable() and len(line) < 2500
    for word in words:
        assert word in line
    return line


# ---------------------------------------------------------------------------------------------------------------
# Names

REFUSED_NAMES = {
    "climbing out": f"{SPLIT}/images/../../../../etc/passwd.png",
    "climbing out at the end": f"{SPLIT}/images/..",
    "an empty part": f"{SPLIT}/images//etc/passwd.png",
    "a dot part": f"{SPLIT}/images/./x.png",
    "an escape sequence": f"{SPLIT}/images/\x1b]0;owned\x07\x1b[2J.png",
    "a C1 escape": f"{SPLIT}/images/\x9b2J.png",
    "a newline": f"{SPLIT}/images/x.png\nerror: all is well.png",
    "a carriage return": f"{SPLIT}/images/x\rerror: all is well.png",
    "a null byte": f"{SPLIT}/images/x.png\0.png",
    "a delete character": f"{SPLIT}/images/\x7f\x7f\x7f.png",
    "text, not an image": f"{SPLIT}/images/x.png.exe",
    "no ending": f"{SPLIT}/images/png",
    "an ending with a space": f"{SPLIT}/images/x.png ",
    "a right-to-left override": f"{SPLIT}/images/\u202egnp.x",
    "a full-width dot": f"{SPLIT}/images/x\uff0epng",
    "a mask without a class": f"{SPLIT}/masks/x.png",
    "a mask too deep": f"{SPLIT}/masks/class_0/class_1/x.png",
    "a very long name": f"{SPLIT}/images/{'x' * 900}.png",
    "a name that is a format string": f"{SPLIT}/images/{{0.__class__}}%s%n.png",
    "another case": f"{SPLIT}/images/A.png",
    "another normal form": f"{SPLIT}/images/a\u0301.png",
}


def pair(names, monkeypatch, tmp_path):
    with listing_stub(names) as (url, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        bucket = open_bucket("gs://bucket", tmp_path / "tmp/objects")
        return pair_images_and_masks(bucket.list(SPLIT), SPLIT, bucket.url)


@pytest.mark.parametrize("what", REFUSED_NAMES)
def test_hostile_names_are_named_in_one_clean_line(what, monkeypatch, tmp_path, capsys):
    name = REFUSED_NAMES[what]
    names = [f"{SPLIT}/images/a.png", f"{SPLIT}/masks/class_0/a.png", name]
    # The last part, as it may be shown: without what a terminal obeys.
    shown = name.rpartition("/")[2].split("\n")[0].encode("unicode_escape").decode() if name.isascii() else ""
    error_line(lambda: pair(names, monkeypatch, tmp_path), capsys, "gs://bucket", shown)


ODD_BUT_FINE = [
    "A.png",
    "a.PNG",
    "\u0430.png",  # Cyrillic
    "a\u0301.png",
    "\u00e1.png",
    "a..png",
    "$(touch owned).png",
    "`touch owned`.png",
    "; touch owned;.png",
    "%2e%2e%2fx.png",
    "x\\..\\x.png",
    "C:\\x.png",
    "-rf.png",
    "$\\frac{.png",
    "x" * 240 + ".png",
]


def test_odd_names_that_are_fine_are_kept_apart(monkeypatch, tmp_path):
    names = [f"{SPLIT}/{part}/{name}" for part in ("images", "masks/class_0") for name in ["a.png", *ODD_BUT_FINE]]
    _, samples = pair(names, monkeypatch, tmp_path)
    assert [sample.name for sample in samples] == sorted(["a.png", *ODD_BUT_FINE])


def test_too_many_classes_are_refused(monkeypatch, tmp_path, capsys):
    names = [f"{SPLIT}/images/a.png", *(f"{SPLIT}/masks/{number}/a.png" for number in range(20_000))]
    error_line(lambda: pair(names, monkeypatch, tmp_path), capsys, "20,000", "classes")


@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"\x1b[2J.png", b"\xed\xa0\x80.png"])
def test_hostile_names_in_a_directory(name, tmp_path, capsys):
    folder = tmp_path / "bucket" / SPLIT / "images"
    folder.mkdir(parents=True)
    Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"x")
    bucket = open_bucket("bucket", tmp_path / "tmp/objects")
    error_line(lambda: bucket.list(SPLIT), capsys, "refused as a name")


def test_a_link_to_a_file_outside_leaks_nothing(tmp_path, capsys):
    folder = tmp_path / "bucket" / SPLIT / "images"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to("/etc/passwd")
    bucket = open_bucket("bucket", tmp_path / "tmp/objects")
    (blob,) = bucket.list(SPLIT)
    line = error_line(lambda: decode_image(bucket.read(blob), bucket.url(blob.name), (9, 9), ("L",)), capsys, "a.png")
    assert "root" not in line


# ---------------------------------------------------------------------------------------------------------------
# YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{of}'] * 10)}]\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{of}'] * 10)}]}}\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CALL = "!!python/object/apply:os.system ['touch owned']"
HOSTILE_YAML = {
    "a Python call": f"dataset_config: {CALL}",
    "a Python call in a key": f"dataset_config: {{? {CALL} : 1}}",
    "a Python call elsewhere": f"dataset_config: {{target_size: [9, 9]}}\nother: {CALL}",
    "a Python name": "dataset_config: {target_size: !!python/name:os.system }",
    "a Python module": "dataset_config: !!python/module:antigravity ",
    "a Python object": "dataset_config: !!python/object/new:subprocess.Popen [[touch, owned]]",
    "an unknown tag": "dataset_config: !<tag:example.com,2000:x> {target_size: [9, 9]}",
    "nested without end": "dataset_config: " + "[" * 20_000,
    "nested and closed": "dataset_config: " + "[" * 400 + "]" * 400,
    "nested mappings": "dataset_config: " + "{a: " * 20_000,
    "nested lists in lines": "dataset_config:\n" + "".join(" " * n + "-\n" for n in range(600)),
    "aliases of aliases": f"{LAUGHS}dataset_config: {{target_size: *i}}",
    "merges of merges": f"{MERGES}dataset_config: *i",
    "a list that holds itself": "dataset_config: &a {target_size: [9, 9], b: [*a]}",
    "a key that holds itself": "&a ? *a : 1",
    "a huge integer": f"dataset_config: {{target_size: [{'9' * 5000}, 9]}}",
    "a huge hexadecimal integer": f"dataset_config: {{target_size: [9, 9], x: 0x{'f' * 200_000}}}",
    "a huge sexagesimal integer": f"dataset_config: {{target_size: [9, 9], x: 1{':59' * 80_000}}}",
    "a date that is none": "dataset_config: {target_size: 2001-99-99}",
    "a date by force": "dataset_config: {target_size: !!timestamp never}",
    "an empty integer": 'dataset_config: {target_size: !!int ""}',
    "a truth value by force": "dataset_config: {target_size: !!bool perhaps}",
    "a binary that is none": "dataset_config: {target_size: !!binary '%%%'}",
    "keys that cannot be": "dataset_config: {[a, b]: 1}",
    "not UTF-8": b"dataset_config: \xff\xfe\x00",
    "control characters": "dataset_config: {target_size: \x1b[2J}",
    "an escape sequence in a value": r'dataset_config: {target_size: "\e[2J\e]0;owned\a\u202e\n\r"}',
    "an escape sequence in a tag": 'dataset_config: !<\\x1b[2J> "x"',
    "a null byte": "dataset_config:\0 {target_size: [9, 9]}",
    "several documents": "dataset_config: {target_size: [9, 9]}\n---\nx: 1",
    "nothing": "",
    "a list": "- dataset_config",
    "a section that is a text": "dataset_config: target_size",
    "no target_size": "dataset_config: {size: [9, 9]}",
    "one number": "dataset_config: {target_size: 9}",
    "three numbers": "dataset_config: {target_size: [9, 9, 1]}",
    "a negative number": "dataset_config: {target_size: [-9, 9]}",
    "zero": "dataset_config: {target_size: [0, 9]}",
    "NaN": "dataset_config: {target_size: [.nan, 9]}",
    "infinity": "dataset_config: {target_size: [.inf, 9]}",
    "a fraction": "dataset_config: {target_size: [9.0, 9]}",
    "truth values": "dataset_config: {target_size: [true, true]}",
    "dates": "dataset_config: {target_size: [2001-01-01, 2001-01-01]}",
    "texts": "dataset_config: {target_size: ['9', '9']}",
    "a huge size": "dataset_config: {target_size: [1000000, 1000000]}",
    "a long list": f"dataset_config: {{target_size: [{'9, ' * 9000}]}}",
}


def write_config(tmp_path, name, content):
    path = tmp_path / "bucket" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_bucket("bucket", tmp_path / "tmp/objects")


def target_size(bucket):
    return script.read_target_size(script.read_config(bucket, "config.yaml", "dataset_config"), "bucket/config.yaml")


@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_hostile_yaml(what, tmp_path, capsys):
    bucket = write_config(tmp_path, "config.yaml", HOSTILE_YAML[what])
    error_line(lambda: target_size(bucket), capsys, "bucket/config.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "dataset_config: {target_size: [1, 1], target_size: [9, 9]}",
        "dataset_config: {target_size: [9, 9], x: .nan, y: 2001-01-01, z: !!set {a, b}, 1: 2, 2001-01-01: 3, ~: 4}",
        "x: &x {target_size: [9, 9]}\ndataset_config: {<<: *x}",
        'dataset_config: {target_size: [9, 9], x: "\\ud800\\e[2J"}',
        "\ufeffdataset_config: {target_size: [9, 9]}",
    ],
)
def test_odd_yaml_that_is_fine(content, tmp_path):
    bucket = write_config(tmp_path, "config.yaml", content)
    assert target_size(bucket) == [9, 9]
    config = script.read_config(bucket, "config.yaml", "dataset_config")
    text = yaml.dump({"dataset_config": config}, Dumper=script.PlainDumper, allow_unicode=True).encode()
    assert b"\x1b" not in text
    assert yaml.safe_load(text)["dataset_config"]["target_size"] == [9, 9]
    weights = Blob("model.hdf5", 1, "1")
    script.Inference([], [], [9, 9], {"segmentation_model": config}, weights).counts_path()


def test_a_configuration_of_100_megabytes_is_not_read(tmp_path, capsys):
    bucket = write_config(tmp_path, "config.yaml", "")
    os.truncate(tmp_path / "bucket/config.yaml", 100_000_000)
    error_line(lambda: target_size(bucket), capsys, "bucket/config.yaml has 100,000,000 bytes")


@pytest.mark.parametrize("seed", ["many", -1, 2**32, 1.0, float("nan"), True, [1], {"a": 1}, "\x1b[2J" * 99])
def test_shuffle_seeds_of_a_wrong_type(seed, capsys):
    config = {"validation_data_shuffle_seed": seed}
    error_line(lambda: script.subset_seed(ARGS, config), capsys, "shuffle seed", "config.yaml")


# ---------------------------------------------------------------------------------------------------------------
# Images

WIDTH, HEIGHT = SIZE = (48, 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


def encoded(pixels=PIXELS, kind="PNG", mode=None, **options):
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=WIDTH, height=HEIGHT, depth=8, colour=0, interlace=0, data=None, before=b""):
    raw = b"".join(b"\0" + row.tobytes() for row in PIXELS) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def text_chunk(size):
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size)))


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]


def several_pages(kind, **options):
    file = io.BytesIO()
    page = Image.fromarray(PIXELS)
    page.save(file, kind, save_all=True, append_images=[Image.fromarray(255 - PIXELS)], **options)
    return file.getvalue()


def tiff(tags, data=b""):
    """A little-endian TIFF of one directory; tags are (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


BASE_TAGS = {256: (4, 1, WIDTH), 257: (4, 1, HEIGHT), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}


def odd_tiff(tags, data=bytes(4096)):
    return tiff([(tag, *value) for tag, value in (BASE_TAGS | tags).items()], data)


PNG, TIFF = encoded(), encoded(kind="TIFF")
MIDDLE = len(PNG) // 2
BOMB = np.zeros((8192, 8192), np.uint8)
HOSTILE_IMAGES = {
    "a PNG bomb": ("x.png", lambda: encoded(BOMB)),
    "a TIFF bomb": ("x.tif", lambda: encoded(BOMB, "TIFF", compression="tiff_adobe_deflate")),
    "a PNG that claims 2^31 pixels a side": ("x.png", lambda: png(2**31 - 1, 2**31 - 1)),
    "a TIFF that claims 2^31 pixels a side": (
        "x.tif", lambda: odd_tiff({256: (4, 1, 2**31 - 1), 257: (4, 1, 2**31 - 1)})
    ),
    "a PNG of no width": ("x.png", lambda: png(0, HEIGHT)),
    "a PNG of no height": ("x.png", lambda: png(WIDTH, 0)),
    "a TIFF of no size": ("x.tif", lambda: odd_tiff({256: (4, 1, 0), 257: (4, 1, 0)})),
    "a text chunk of 50 MB": ("x.png", lambda: png(before=text_chunk(50_000_000))),
    "500 text chunks of 1 MB": ("x.png", lambda: png(before=text_chunk(1_000_000) * 500)),
    "a colour profile of 500 MB": (
        "x.png", lambda: png(before=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(500_000_000), 1)), data=b"")
    ),
    "pixels that are too few": ("x.png", lambda: png(data=b"\0" * 99)),
    "a bad zlib stream": ("x.png", lambda: PNG.replace(zlib.compress(b"")[:2], b"\xff\xff", 1)[:-40]),
    "a flipped bit in the pixels": ("x.png", lambda: flipped(PNG, MIDDLE)),
    "a flipped bit in the header": ("x.png", lambda: flipped(PNG, 18)),
    "a flipped bit in the last checksum": ("x.png", lambda: flipped(PNG, len(PNG) - 14)),
    "no IEND": ("x.png", lambda: PNG[:-12]),
    "no pixels": ("x.png", lambda: PNG[:33] + PNG[-12:]),
    "nothing but the signature": ("x.png", lambda: PNG[:8]),
    "one byte": ("x.png", lambda: b"\x89"),
    "a chunk longer than the file": ("x.png", lambda: PNG[:33] + b"\x7f\xff\xff\xffIDAT" + PNG[41:]),
    "a TIFF by content": ("x.png", lambda: TIFF),
    "a PNG by content": ("x.tiff", lambda: PNG),
    "a JPEG by content": ("x.png", lambda: encoded(kind="JPEG")),
    "a GIF by content": ("x.tif", lambda: encoded(kind="GIF")),
    "an EPS by content": ("x.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n(owned) (w) file\n"),
    "an SVG by content": ("x.png", lambda: b"<svg><script>owned</script></svg>"),
    "16 bits": ("x.png", lambda: encoded(PIXELS.astype(np.uint16) * 256)),
    "16 bits in a TIFF": ("x.tif", lambda: encoded(PIXELS.astype(np.uint16) * 256, "TIFF")),
    "float": ("x.tif", lambda: encoded(PIXELS.astype(np.float32), "TIFF")),
    "32-bit integers": ("x.tif", lambda: encoded(PIXELS.astype(np.int32), "TIFF")),
    "colour": ("x.png", lambda: encoded(mode="RGB")),
    "a palette": ("x.png", lambda: encoded(mode="P")),
    "alpha": ("x.png", lambda: encoded(mode="LA")),
    "CMYK": ("x.tif", lambda: encoded(kind="TIFF", mode="CMYK")),
    "one bit": ("x.png", lambda: encoded(mode="1")),
    "an animation": ("x.png", lambda: several_pages("PNG")),
    "two pages": ("x.tif", lambda: several_pages("TIFF")),
    "another size": ("x.png", lambda: encoded(PIXELS[:-1])),
    "turned by 90 degrees": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={274: 6})),
    "a TIFF without strips": ("x.tif", lambda: odd_tiff({})),
    "strips beyond the file": ("x.tif", lambda: odd_tiff({273: (4, 1, 2**31), 278: (4, 1, HEIGHT), 279: (4, 1, 1536)})),
    "2^30 strips": ("x.tif", lambda: odd_tiff({273: (4, 2**30, 8), 278: (4, 1, 1), 279: (4, 2**30, 8)})),
    "tiles of 2^30 pixels": (
        "x.tif",
        lambda: odd_tiff({259: (3, 1, 8), 322: (4, 1, 2**15), 323: (4, 1, 2**15), 324: (4, 1, 200), 325: (4, 1, 99)}),
    ),
    "tiles of no size": (
        "x.tif", lambda: odd_tiff({322: (4, 1, 0), 323: (4, 1, 0), 324: (4, 1, 200), 325: (4, 1, 99)})
    ),
    "an unknown compression": (
        "x.tif", lambda: odd_tiff({259: (3, 1, 4711), 273: (4, 1, 200), 278: (4, 1, HEIGHT), 279: (4, 1, 1536)})
    ),
    "JPEG in a TIFF, and no JPEG": (
        "x.tif", lambda: odd_tiff({259: (3, 1, 7), 273: (4, 1, 200), 278: (4, 1, HEIGHT), 279: (4, 1, 1536)})
    ),
    "2^16 samples a pixel": ("x.tif", lambda: odd_tiff({277: (3, 1, 65535), 273: (4, 1, 200), 279: (4, 1, 1536)})),
    "a directory that is its own next": ("x.tif", lambda: TIFF[:4] + struct.pack("<I", 4) + TIFF[8:]),
    "a directory beyond the file": ("x.tif", lambda: TIFF[:4] + struct.pack("<I", 2**32 - 1) + TIFF[8:]),
    "tags of a wrong type": ("x.tif", lambda: odd_tiff({256: (2, 4, 0x41414141), 257: (12, 1, 8)})),
    **{
        f"a PNG cut after {share} %": ("x.png", lambda share=share: PNG[: len(PNG) * share // 100])
        for share in (1, 10, 50, 90, 99)
    },
    **{
        f"a TIFF cut after {share} %": ("x.tif", lambda share=share: TIFF[: len(TIFF) * share // 100])
        for share in (1, 10, 50, 90)
    },
    **{
        f"a {name} TIFF cut in the middle": (
            "x.tif", lambda name=name: (data := encoded(kind="TIFF", compression=name))[: len(data) // 2]
        )
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    },
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_IMAGES)
def test_hostile_images(what, capfd, recwarn):
    name, make = HOSTILE_IMAGES[what]
    data = make()
    Path("/proc/self/clear_refs").write_text("5")  # what it took to make it does not count
    before = memory("VmRSS")
    with pytest.raises(DatasetError) as caught:
        decode_image(data, f"gs://bucket/{name}", SIZE, modes=("L",))
    assert memory("VmHWM") - before < 100
    Path("/proc/self/clear_refs").write_text("5")
    noise = capfd.readouterr()
    assert noise == ("", "") or "JPEG" in what  # libtiff's JPEG decoder cannot be silenced
    script.fail(3, caught.value)
    line = capfd.readouterr().err
    assert line.startswith(f"error: gs://bucket/{name} ") and line[:-1].isprintable() and len(line) < 600
    assert "BytesIO" not in line


def test_the_libraries_say_nothing_of_their_own(tmp_path):
    """pytest turns their warnings off, so this needs a process."""
    (tmp_path / "bucket").mkdir()
    for number, data in enumerate((TIFF[:100], TIFF[: len(TIFF) // 2], odd_tiff({256: (2, 4, 0x41414141)}), PNG[:99])):
        (tmp_path / f"bucket/{number}.tif").write_bytes(data)
    code = """
import pathlib, sys, image_utils
for path in sorted(pathlib.Path("bucket").iterdir()):
    try:
        image_utils.decode_image(path.read_bytes(), path.name, (48, 32), ("L",))
    except image_utils.DatasetError:
        print("refused")
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("refused\n" * 4, "")


def interlaced():
    """A PNG in seven passes (Adam7), which Pillow does not write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = (row for y, x, dy, dx in passes for row in PIXELS[y::dy, x::dx])
    return png(interlace=1, data=b"".join(b"\0" + row.tobytes() for row in rows))


FINE_IMAGES = {
    "made by hand": ("x.png", png),
    "interlaced": ("x.png", interlaced),
    "in capitals": ("x.PNG", lambda: PNG),
    "a comment": ("x.png", lambda: encoded(pnginfo=comment())),
    "bytes after the end": ("x.png", lambda: PNG + b"<?php owned ?>"),
    "TIFF": ("x.tiff", lambda: TIFF),
    "BigTIFF": ("x.tif", lambda: encoded(kind="TIFF", big_tiff=True)),
    "LZW": ("x.tif", lambda: encoded(kind="TIFF", compression="tiff_lzw")),
    "deflate": ("x.tif", lambda: encoded(kind="TIFF", compression="tiff_adobe_deflate")),
    "packbits": ("x.tif", lambda: encoded(kind="TIFF", compression="packbits")),
    "in tiles": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={322: 16, 323: 16})),
}


def comment():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "\x1b[2J" * 100, zip=True)
    return info


@pytest.mark.parametrize("what", FINE_IMAGES)
def test_odd_images_that_are_fine(what):
    name, make = FINE_IMAGES[what]
    np.testing.assert_array_equal(decode_image(make(), f"gs://bucket/{name}", SIZE, modes=("L",)), PIXELS)


# ---------------------------------------------------------------------------------------------------------------
# Whole runs


def limited(*given, cwd, **environment):
    """Run the script where it gets no more than 4 GB of addresses."""
    return subprocess.run(
        [sys.executable, SCRIPT, *given],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)),
    )


def spoil(name, content):
    def change(bucket):
        path = bucket / name
        if path.exists():
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


DATASET_CONFIG = "datasets/dataset-tiny/config.yaml"
HOSTILE_RUNS = {
    "a Python call": (spoil(DATASET_CONFIG, f"dataset_config: {CALL}"), 3, DATASET_CONFIG),
    "merges of merges": (spoil(DATASET_CONFIG, f"{MERGES}dataset_config: *i"), 3, DATASET_CONFIG),
    "100 MB": (lambda bucket: os.truncate(bucket / MODEL / "config.yaml", 100_000_000), 3, f"{MODEL}/config.yaml"),
    "an escape sequence in a value": (
        spoil(DATASET_CONFIG, r'dataset_config: {target_size: "\e]0;owned\a\e[2J\nerror: none"}'), 3, DATASET_CONFIG
    ),
    "an escape sequence in a seed": (
        spoil(f"{MODEL}/config.yaml", r'train_config: {validation_data_shuffle_seed: "\e[2J\r"}'), 3, "shuffle seed"
    ),
    "an escape sequence in a name": (spoil(f"{SPLIT}/images/\x1b[2J\x07.png", b"x"), 4, "images/\\x1b[2J\\x07.png"),
    "a newline in a name": (spoil(f"{SPLIT}/images/a\nerror: b.png", b"x"), 4, "images/a\\nerror: b.png"),
    "a name that is not UTF-8": (spoil(f"{SPLIT}/images/\udcff.png", b"x"), 4, "\\udcff.png"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_RUNS)
def test_a_run_on_hostile_content_ends_with_one_clean_line(what, counted, no_tensorflow):
    change, code, words = HOSTILE_RUNS[what]
    change(counted / "bucket")
    before = sorted((counted / "bucket").rglob("*"))
    process = limited(*arguments("bucket"), cwd=counted, PYTHONPATH=str(no_tensorflow))
    assert_one_error_line(process, code, words)
    assert (process.stderr + process.stdout).replace("\n", "").isprintable()
    assert sorted((counted / "bucket").rglob("*")) == before


def test_a_run_on_odd_content_gives_the_same_result_and_stays_clean(tiny_bucket, counted_template, tmp_path):
    """Steering characters in folder names and YAML, a screen that knows no Unicode."""
    (tiny_bucket / SPLIT / "masks/class_1").rename(tiny_bucket / SPLIT / "masks/class_1\u202e $\\frac{ \u4e2d")
    config = yaml.safe_load((tiny_bucket / MODEL / "config.yaml").read_text())
    config["train_config"]["note"] = "\x1b[2J\ud800"
    (tiny_bucket / MODEL / "config.yaml").write_text(yaml.safe_dump(config))
    process = run_tool(
        *arguments("bucket", batch_size=4, message="\x1b]0;owned\x07"), cwd=tmp_path, PYTHONIOENCODING="latin-1"
    )
    assert process.returncode == 0, process.stderr
    assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
    assert (process.stdout + process.stderr).replace("\n", "").isprintable()
    (text,) = (path.read_text() for path in (tiny_bucket / MODEL).glob("model_thresholds_*.yaml"))
    assert "\x1b" not in text
    (result,) = results(tiny_bucket)
    assert result["metadata"]["message"] == "\x1b]0;owned\x07"
    assert thresholds(result) == thresholds(results(counted_template[0] / "bucket")[0])


# ---------------------------------------------------------------------------------------------------------------
# Fuzzing

fuzzed = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
kinds = st.sampled_from(["flip", "cut", "repeat", "insert"])
mutations = st.lists(st.tuples(st.floats(0, 1), kinds, st.binary(max_size=9)), min_size=1, max_size=4)


def mutate(data, steps):
    for where, how, extra in steps:
        position = int(where * (len(data) - 1))
        match how:
            case "flip":
                data = data[:position] + bytes(b ^ 0x55 for b in extra) + data[position + len(extra) :]
            case "cut":
                data = data[:position] + data[position + 8 * len(extra) :]
            case "repeat":
                data = data[:position] + data[position // 2 :]
            case "insert":
                data = data[:position] + extra + data[position:]
        data = data or b"\0"
    return data


def attempt(call):
    """Call; whatever is raised must be an error of ours, which is shown in one line."""
    try:
        return call()
    except EXPECTED as error:
        assert "error: " + script.printable(error) == f"error: {script.printable(str(error))}"
        assert str(error)
        return None


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes what image_utils does about them
@fuzzed
@given(st.sampled_from(sorted(FINE_IMAGES)), mutations)
def test_fuzz_images(what, steps):
    name, make = FINE_IMAGES[what]
    data = mutate(make(), steps)
    pixels = attempt(lambda: decode_image(data, f"gs://bucket/{name}", SIZE, modes=("L",)))
    if pixels is not None:
        assert (pixels.shape, pixels.dtype) == ((HEIGHT, WIDTH), np.uint8)
        if name.lower().endswith("png") and steps[0][1] != "insert":  # a PNG carries checksums
            np.testing.assert_array_equal(pixels, PIXELS)


class OneFile:
    """As much of a bucket as read_config needs."""

    def __init__(self, data):
        self.data = data

    def stat(self, name):
        return Blob(name, len(self.data), "1")

    def read(self, blob):
        return self.data

    def url(self, name):
        return f"gs://bucket/{name}"


soup = st.text(alphabet="a:&*[]{}-?!<>|'\" \n\t0123456789.e~%@`\\", max_size=60).map(str.encode)
seeds = [text.encode() for text in map(str, HOSTILE_YAML.values()) if len(text) < 1000]


@fuzzed
@given(st.binary(max_size=99) | st.builds(mutate, st.sampled_from(seeds), mutations) | soup)
def test_fuzz_yaml(data):
    bucket = OneFile(b"dataset_config: " + data if b"dataset_config" not in data else data)
    size = attempt(lambda: target_size(bucket))
    assert size is None or (len(size) == 2 and all(0 < edge <= 2**14 for edge in size))
    config = attempt(lambda: script.read_config(bucket, "config.yaml", "dataset_config"))
    if config is not None:  # it goes into names and results without an error
        script.Inference([], [], [9, 9], {"segmentation_model": config}, Blob("model.hdf5", 1, "1")).counts_path()
        text = yaml.dump(config, Dumper=script.PlainDumper, allow_unicode=True).encode()
        assert len(text) < 10_000_000


parts = st.sampled_from(["images", "masks", "class_0", "class_1", "a.png", "b.tif", ".x", "c", "", "\x1b", "a.PNG"])
paths = st.lists(parts | st.text(max_size=6), min_size=1, max_size=4).map("/".join)


@fuzzed
@given(st.lists(paths, max_size=12, unique=True))
def test_fuzz_listings(names):
    blobs = [Blob(f"{SPLIT}/{name}", 5, "1") for name in names]
    paired = attempt(lambda: pair_images_and_masks(blobs, SPLIT, lambda name: f"gs://bucket/{name}"))
    if paired:
        class_folders, samples = paired
        for sample in samples:
            assert sample.image.name == f"{SPLIT}/images/{sample.name}"
            expected = [f"{SPLIT}/masks/{folder}/{sample.name}" for folder in class_folders]
            assert [mask.name for mask in sample.masks] == expected
