"""Give FNGD's config randomized bad values, files and names, and look whether each error is a clear one.

    python -m tests.attacks.bad_configs --count 1000 --seed 0

An error is clear if it is a ValueError, TypeError or OSError, names the argument or the file in a message of readable
length, comes in bounded time and memory, and if nothing was executed, written or sent. What is not is listed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from torch import nn

from hf_fngd import FNGD, FNGDConfig, hub
from hf_fngd.hub import CONFIG_NAME
from tests.attacks import bad_values

TIME_LIMIT = 0.5  # seconds of the processor, a multiple of what the slowest takes
GIVE_UP = 5.0
MEMORY_LIMIT = 2**26
LONGEST_MESSAGE = 1000
SECRET = "the content of another file"
COMMIT = "a" * 40
FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "pickle.find_class",
    "ctypes.",
)
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")


@dataclass
class Case:
    """One attack.

    Attributes:
        what: for the list.
        run: makes it; has to raise.
        names: the error or the warning has to contain one of these.
        warns: whether a warning will do, for a key that a later version may know.
        seconds: of the processor, that the error may take.
    """

    what: str
    run: Callable[[], Any]
    names: tuple[str, ...]
    warns: bool = False
    seconds: float = TIME_LIMIT


class _Late(BaseException):
    """Takes far too long."""


class Watch:
    """Notes what the interpreter reports of commands, connections, unpickling and writing, while active."""

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        forbidden = event.startswith(FORBIDDEN) and event not in HARMLESS
        if event == "open":
            path, _, flags = args
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
            forbidden = bool(flags & writes) and not str(path).endswith(".pyc") and ".pyc." not in str(path)
        if forbidden:
            self.seen.append(f"{event}{args}"[:200])


WATCH = Watch()


class Place:
    """A folder with what the attacks need: a cached repository, a file that is nobody's business, odd files."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache, self.counter = root, root / "cache", itertools.count()
        self.secret, self.target = root / "secret" / "private.txt", root / "executed"
        self.secret.parent.mkdir()
        self.secret.write_text(SECRET)
        snapshot = self.cache / "models--user--repo" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (snapshot / CONFIG_NAME).write_text(FNGDConfig().to_json_string())
        (self.cache / "models--user--repo" / "refs").mkdir()
        (self.cache / "models--user--repo" / "refs" / "main").write_text(COMMIT)
        (root / "loop").symlink_to(root / "loop")

    def folder(self, content: bytes) -> Path:
        """A new folder with a config of that content."""
        folder = self.root / f"folder-{next(self.counter)}"
        folder.mkdir()
        (folder / CONFIG_NAME).write_bytes(content)
        return folder

    def odd_folder(self, of: random.Random) -> Path:
        """A new folder whose config is no regular file, or a link to one that is no config."""
        folder = self.folder(b"")
        file = folder / CONFIG_NAME
        file.unlink()
        make: list[Callable[[], Any]] = [lambda: file.mkdir(), lambda: os.mkfifo(file)]
        targets = [self.secret, "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd", file, "nowhere", self.root]
        make += [lambda target=target: file.symlink_to(target) for target in targets]
        of.choice(make)()
        return folder


def model() -> nn.Module:
    """A model whose module names are long enough for a pattern to go astray in."""
    return nn.ModuleDict({"a" * 60 + "!": nn.Linear(2, 2), "fc1": nn.Linear(2, 2)})


def both(key: str, value: Any) -> None:
    """The config and the optimizer have to refuse a value in the same words.

    Raises:
        AssertionError: they do not.
    """
    network, errors = model(), []
    for make in (lambda: FNGDConfig(**{key: value}), lambda: FNGD(network, **{key: value})):
        try:
            make()
        except (TypeError, ValueError) as error:
            errors.append(error)
    assert len(errors) == 2, f"only one of config and optimizer raised: {errors}"
    assert all(type(module) in (nn.ModuleDict, nn.Linear) for module in network.modules())
    assert type(errors[0]) is type(errors[1]), errors
    assert str(errors[0]) == str(errors[1]), errors
    raise errors[0]


def by_value(of: random.Random, place: Place, key: str) -> Case:
    """A bad value, by any of the ways in which one can come in."""
    value = bad_values.bad_value(of, key)
    what = f"{key} = a {type(value).__name__} {value if isinstance(value, str | float) else ''!s:.60}"
    empty, text = place.folder(b"{}"), ""
    routes: dict[str, Callable[[], Any]] = {
        "config and optimizer": lambda: both(key, value),
        "from_dict": lambda: FNGDConfig.from_dict({key: value}),
        "override": lambda: FNGDConfig.from_dict({}, **{key: value}),
        "preset": lambda: FNGDConfig.load("paper", **{key: value}),
        "optimizer": lambda: FNGD.from_config(model(), FNGDConfig(), **{key: value}),
        "file and override": lambda: FNGDConfig.from_pretrained(empty, **{key: value}),
    }
    # repr, since json has no int of many digits; a tuple would become a list, which may be right.
    with contextlib.suppress(TypeError, ValueError):
        text = json.dumps({**FNGDConfig().to_dict(), key: value})
        if json.loads(text)[key] == value or value != value:
            folder = place.folder(text.encode())
            routes["file"] = routes["named file"] = lambda: FNGDConfig.from_pretrained(folder)
    name = of.choice(list(routes))
    too_large = name.endswith("file") and len(text) > hub.MAX_BYTES
    return Case(f"{what} by {name}", routes[name], (CONFIG_NAME if too_large else key,))


def by_pattern(of: random.Random, place: Place, key: str) -> Case:
    """A pattern that takes long to match: an error, or layers that it selects, in bounded time."""
    pattern, key = bad_values.hostile_pattern(of), of.choice(bad_values.MODULES)

    def run() -> None:
        FNGD(model(), **{key: pattern})
        raise ValueError(f"{key} selects layers")

    # No match of a name takes longer than a second.
    return Case(f"{key} = {pattern[:60]!r}", run, (key, "regular expression"), seconds=4.0)


def by_file(of: random.Random, place: Place, key: str) -> Case:
    """A file that is no config."""
    if of.random() < 0.15:
        folder = place.odd_folder(of)
        return Case(f"odd file in {folder.name}", lambda: FNGDConfig.from_pretrained(folder), (CONFIG_NAME,))
    content = bad_values.bad_content(of, key, place.target)
    folder = place.folder(content)
    where = of.choice([folder, folder / CONFIG_NAME])
    return Case(f"file {content[:60]!r}", lambda: FNGDConfig.from_pretrained(where), (CONFIG_NAME,))


def by_version(of: random.Random, place: Place, key: str) -> Case:
    version = bad_values.bad_version(of)
    what = f"config_version of type {type(version).__name__}"
    return Case(what, lambda: FNGDConfig.from_dict({"config_version": version}), ("config_version",))


def by_key(of: random.Random, place: Place, key: str) -> Case:
    """A name that is none: a warning where it comes from a file, an error where it comes from the caller."""
    name = bad_values.misspelt_key(of)
    shown = tuple({name[:20], ascii(name)[1:20], repr(name)[1:20]})
    if of.random() < 0.5:
        folder = place.folder(json.dumps({name: bad_values.nested(of, 5)}).encode())
        return Case(f"key {name[:40]!r}", lambda: FNGDConfig.from_pretrained(folder), (*shown, CONFIG_NAME), warns=True)
    return Case(f"argument {name[:40]!r}", lambda: FNGDConfig.preset("paper", **{name: 1}), shown)


def by_name(of: random.Random, place: Place, key: str) -> Case:
    """What from_pretrained is called with."""
    if of.random() < 0.4:
        name = bad_values.unreadable_names(of, place.root, place.secret)
        run = of.choice([FNGDConfig.from_pretrained, FNGDConfig.load])
        return Case(f"name {name[:60]!r}", lambda: run(name, cache_dir=place.cache), (name[:60],))
    if of.random() < 0.1:
        preset = of.choice([None, "Paper", ["paper"], {}, 3, b"paper", "x" * 10**6])
        return Case("preset", lambda: FNGDConfig.preset(preset), ("preset",))
    key, arguments = bad_values.bad_path_arguments(of, place.secret)
    arguments = {"name_or_path": "user/repo", "cache_dir": place.cache, **arguments}
    value = arguments[key]
    # Of the Hub's client and of pathlib: what they say need not name the argument.
    names = ("", *([value] if isinstance(value, str) else []))
    return Case(f"{key} = {value!r:.60}", lambda: FNGDConfig.from_pretrained(**arguments), names)


WAYS = (by_value, by_value, by_pattern, by_value, by_file, by_file, by_version, by_key, by_name)


def cases(count: int, seed: int, place: Place) -> Iterator[Case]:
    """Every way in turn; every argument in turn."""
    for number in range(count):
        of = random.Random(f"{seed}-{number}")
        yield WAYS[number % len(WAYS)](of, place, bad_values.ARGUMENTS[(number // 3) % len(bad_values.ARGUMENTS)])


def fault(case: Case, place: Place) -> str | None:
    """What is wrong with the error that a case gets; None where it is clear."""

    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, GIVE_UP)
    start, WATCH.seen = time.process_time(), []
    raised: BaseException | None = None
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            WATCH.active = True
            try:
                case.run()
            except BaseException as error:
                raised = error
        seconds = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        WATCH.active = False
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
    if isinstance(raised, _Late):
        return f"no answer in {GIVE_UP} s"
    if place.target.exists():
        return "a command was executed"
    if WATCH.seen:
        return f"side effects: {WATCH.seen[:3]}"
    if seconds > case.seconds:  # once more, without the tracing of memory
        start = time.process_time()
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
        seconds = time.process_time() - start
    if seconds > case.seconds or peak > MEMORY_LIMIT:
        return f"took {seconds:.2f} s and {peak / 2**20:.0f} MiB"
    told = " ".join(str(warning.message) for warning in caught)
    if raised is None:
        return None if case.warns and any(name in told for name in case.names) else f"accepted; warnings: {told!r}"
    if not isinstance(raised, ValueError | TypeError | OSError):
        return f"{type(raised).__name__}: {str(raised)[:200]}"
    if told:
        return f"warnings beside the error: {told[:200]!r}"
    text = " ".join([str(raised), *getattr(raised, "__notes__", [])])
    if not any(name in text for name in case.names):
        return f"does not name {' or '.join(case.names)[:80]}: {text[:200]}"
    if SECRET in text:
        return "shows the content of another file"
    if len(text) > LONGEST_MESSAGE + len(str(place.root)) and not any(len(name) > 200 for name in case.names):
        return f"a message of {len(text)} characters"
    return None


def attack(count: int, seed: int) -> list[tuple[str, str]]:
    """The cases whose error was not clear, and why."""
    root = Path(tempfile.mkdtemp())
    try:
        place = Place(root)
        for warm_up in (root / "nowhere", "user/other"):  # modules that are imported at their first use
            with contextlib.suppress(OSError):
                FNGDConfig.from_pretrained(warm_up, cache_dir=place.cache)
        return [(case.what, found) for case in cases(count, seed, place) if (found := fault(case, place))]
    finally:
        shutil.rmtree(root)


def main() -> int:
    """Return 0 where every error was clear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    others = attack(args.count, args.seed)
    for what, reason in others:
        print(f"{what!r}: {reason!r}"[:500])
    print(f"{args.count} bad configs, {args.count - len(others)} clear errors, {len(others)} others")
    return 1 if others else 0


sys.addaudithook(WATCH)

if __name__ == "__main__":
    sys.exit(main())
