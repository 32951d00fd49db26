"""Reading and checking the command line and the two config.yaml in the bucket."""

import argparse
import re
import reprlib

import yaml

from errors import ConfigurationError, UsageError

MAX_BYTES = 2**22  # of a config.yaml; some list every image
MAX_EDGE = 2**14  # pixels
SUBSET_SEED = 1234  # where neither the arguments nor train_config give one
FOLDER_FORMS = {1: "the name of a folder", 2: "<dataset ID>/<split>"}  # by the number of folders


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the line breaks of description and epilog."""


class ArgumentParser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print the usage and end the process."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message):
        raise UsageError(f"{message}; see --help")


def text(given):
    """A `type=` for argparse: a text that can be put into the result."""
    if re.search("[\ud800-\udfff]", given):  # what Python makes of bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"must be text in UTF-8, not {given!r}")
    return given


def number(kind, low, high, above_low=False):
    """Make a `type=` for argparse: a number from `low` to `high`, without `low` itself if `above_low`."""

    def parse(given):
        value = kind(given)
        if not low <= value <= high or (above_low and value == low):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above_low else 'at least'} {low} and at most {high}, not {given}"
            )
        return value

    parse.__name__ = kind.__name__  # argparse shows it: "invalid int value"
    return parse


def folders(depth):
    """Make a `type=` for argparse: a path of `depth` folder names."""

    def parse(given):
        path = given.strip("/")
        if not path or path.count("/") != depth - 1:
            raise argparse.ArgumentTypeError(f"must be {FOLDER_FORMS[depth]}, not {given!r}")
        return path

    return parse


def read_config(bucket, name, section, warn):
    """Read one section of a YAML file in the bucket.

    Parameters
    ----------
    bucket : as gcp_utils.open_bucket gives
    name : str
        The file's name in the bucket.
    section : str
        A key at the file's top: dataset_config or train_config.
    warn : callable
        Is called with a sentence for each key that occurs twice in one mapping.

    Returns
    -------
    dict
        The names in `dataset_split` are texts, exactly as they are written in the file. A Python tuple is a list.

    Raises
    ------
    ConfigurationError
        The file is not valid YAML, is far too large for a configuration, or has no such section.
    BucketError
        The file is missing or cannot be read.
    """
    url, blob = bucket.url(name), bucket.stat(name)
    if blob.size > MAX_BYTES:
        raise ConfigurationError(
            f"{url} has {blob.size:,} bytes, too many for a configuration: put the right file there"
        )
    content = bucket.read(blob)
    try:
        loader = Loader(content)
        config = loader.get_single_data()
        as_written = yaml.load(content, Loader=yaml.CBaseLoader)
    except Exception as error:  # PyYAML's constructors of numbers and dates raise exceptions of many types
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ConfigurationError(f"{url} is not valid YAML, correct it: {reason}") from error
    for key in loader.repeated_keys:
        warn(f"{url}, line {key.start_mark.line + 1}: {key.value} is there twice: the last one counts")
    if not isinstance(config, dict) or not isinstance(config.get(section), dict):
        raise ConfigurationError(f"{url} needs a section {section}: with keys and values below it")
    texts = as_written.get(section, {})
    if "dataset_split" in texts:  # its names may look like numbers or dates: 0010, 12:30, no
        config[section]["dataset_split"] = texts["dataset_split"]
    return config[section]


class Loader(yaml.CSafeLoader):
    """Loads plain values, also where Python has dumped a tuple, and keeps the nodes of keys that are there twice."""

    def __init__(self, content):
        super().__init__(content)
        self.repeated_keys = []

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if str(key.value) in keys:
                self.repeated_keys.append(key)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)

    def refuse_python(self, kind, node):
        """The constructor for a kind of value that only Python has."""
        raise yaml.constructor.ConstructorError(
            f"line {node.start_mark.line + 1}: !!python/{kind} is Python's: write plain values; in Python, dump "
            "dict(x) instead of an OrderedDict, and x.item() or x.tolist() instead of numpy's types"
        )


Loader.add_multi_constructor("tag:yaml.org,2002:python/", Loader.refuse_python)
Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.construct_yaml_seq)
Loader.add_constructor("tag:yaml.org,2002:python/unicode", Loader.construct_yaml_str)


def target_size(dataset_config, url):
    """The size of every image and mask of a dataset: a list [width, height], in pixels, each from 1 to MAX_EDGE.

    Raises ConfigurationError, which names the file by its `url`.
    """
    size = dataset_config.get("target_size")
    allowed = range(1, MAX_EDGE + 1)
    if isinstance(size, list) and len(size) == 2 and all(type(edge) is int and edge in allowed for edge in size):
        return size
    hint = ""
    if isinstance(size, list | str):  # such as [512.0, 512.0], ["512", "512"] or 512 x 512
        meant = [int(edge) for edge in re.findall(r"(?<![\w.-])(\d{1,9})(?:\.0*)?(?![\w.])", str(size))]
        hint = f": write target_size: {meant}" if len(meant) == 2 and all(edge in allowed for edge in meant) else ""
    raise ConfigurationError(
        f"{url} needs target_size: [width, height], integers from 1 to {MAX_EDGE}, not {reprlib.repr(size)}{hint}"
    )


def stacks(dataset_config, split, warn):
    """The names of the stacks in a split, exactly as they are written in the file; an empty list if it names none.

    Calls `warn` with a sentence if `dataset_split` has another form than {split: list of names}.
    """
    splits = dataset_config.get("dataset_split", {split: []})
    names = splits.get(split) if isinstance(splits, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    warn(
        f"dataset_split in the dataset's config.yaml has no list of stacks for {split}, so the intervals rest on runs "
        f"of slices: write dataset_split: {{{split}: [<stack>, <stack>, ...]}}"
    )
    return []


def subset_seed(train_config, split, seed):
    """The seed for drawing the subset, from 0 to 2**32 - 1.

    It is `seed`, from the command line, or if that is None the one in train_config for a split with validation or test
    in its name, or else SUBSET_SEED. Raises ConfigurationError if the one in train_config is not such an integer.
    """
    for name in ("validation", "test"):
        if seed is None and name in split:
            seed = train_config.get(f"{name}_data_shuffle_seed")
    if seed is None:
        seed = SUBSET_SEED
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ConfigurationError(
            f"the shuffle seed {reprlib.repr(seed)} in the model's config.yaml must be an integer, 0 to 4294967295"
        )
    return seed
