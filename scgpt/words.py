"""Words of the command line to what they mean, for argparse: paths, sizes, counts, seeds."""
import argparse
from pathlib import Path


def path(word: str) -> Path:
    """A path on this machine that is not empty."""
    if not word:
        raise argparse.ArgumentTypeError("the path is empty")
    if "://" in word:   # as a path, s3://bucket would become the folder s3: beside us
        raise argparse.ArgumentTypeError(f"'{word}' is a URL: give a path on this machine, and copy what is made")
    return Path(word)


def size(word: str) -> int:
    """Bytes, such as 5GB."""
    from scgpt.config import parse_bytes

    n_bytes = parse_bytes(word)
    if not n_bytes:
        raise argparse.ArgumentTypeError(f"'{word}' is no size: give a number, or one with a unit, such as 5GB")
    return n_bytes


def count(word: str) -> int:
    """1 or more."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"'{word}' is no whole number of 1 or more")
    return int(word)


def seed(word: str) -> int:
    """0 or more, below 2^63."""
    if not word.isdecimal() or int(word) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"'{word}' is no whole number of 0 or more, below 2^63")
    return int(word)
