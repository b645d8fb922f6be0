"""Values, files and names that no config may accept, drawn at random."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_fngd.checks import MAX_CHARACTERS, MAX_NAMES
from hf_fngd.config import FNGDConfig
from hf_fngd.hub import MAX_BYTES
from hf_fngd.layers.base import layer_type_names
from hf_fngd.settings import Settings, setting_names
from hf_fngd.updates import FALLBACK_RULES, UPDATES
from hf_fngd.weights.base import policy_names

ARGUMENTS = setting_names()
CHOICES = {"sharing": policy_names(), "update": UPDATES, "fallback": list(FALLBACK_RULES)}
MODULES = ("target_modules", "exclude_modules")
INTEGERS = ("coefficient_steps", "memory_budget")
BELOW_ONE = ("momentum", "beta2")
ABOVE_ZERO = ("damping", "eps")


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def nested(of: random.Random, depth: int) -> Any:
    value: Any = of.choice([0, "x", None, math.nan])
    for _ in range(depth):
        value = of.choice([[value], {"a": value}, [value, value]])
    return value


def huge(of: random.Random) -> int:
    return of.choice([-1, 1]) * 10 ** of.choice([20, 400, 5000, 100_000])


def wrong_type(of: random.Random) -> Any:
    """What none of the arguments takes, whatever its type."""
    return of.choice(
        [
            lambda: {},
            lambda: {"a": nested(of, 3)},
            lambda: [nested(of, of.randint(1, 40))],
            lambda: [huge(of)],
            lambda: 1j,
            lambda: b"muon",
            lambda: bytearray(of.randint(0, 10**6)),
            lambda: {1, 2},
            lambda: object(),
            lambda: print,
            lambda: torch.tensor(0.5),
            lambda: torch.zeros(of.randint(2, 10**6)),
            lambda: Path("/etc/passwd"),
            lambda: range(10 ** of.randint(1, 30)),
            lambda: iter(()),
        ]
    )()


def misspelt(of: random.Random, word: str) -> str:
    place = of.randrange(len(word))
    return of.choice(
        [
            word[:place] + word[place + 1 :],
            word[:place] + word[place] * 2 + word[place + 1 :],
            word[:place] + of.choice("xq_0") + word[place + 1 :],
            word.upper(),
            word + of.choice([" ", "\n", "\0", "s", "\u200b"]),
            " " + word,
            word[0] + "\u0435" + word[2:],
            word * of.choice([2, 1000, 100_000]),
            f"__import__('os').{word}",
        ]
    )


def hostile_pattern(of: random.Random) -> str:
    """A regular expression that takes very long to match, if nothing is done against it."""
    one, two, many = of.choice("ab."), of.choice([r"\w", "[a-z]", "a", "(?:a)"]), of.randint(25, 200)
    return of.choice(
        [
            f"({two}+)+{one}!",
            f"(?:{two}*)*b",
            f"({two}|{two}{two})+!",
            f"(?:{two}+{two}+)+y",
            f"^(?:(?:{two}+)?)+$",
            f"{two}?" * many + two * many,
            f"{two}*" * many + "!",
            f"(.*{one}){{{many}}}",
            f"(?=({two}+)+b).*",
            f"(?<=a)(?:{one}|{two}{{1,{many}}})*b",
            f"(?P<n>{two}*)(?:(?P=n){two}*)+!",
            "(?i)" + "[\0-\U0010ffff]" * many * 5,
            "[\u0100-\uffff]" * many * 5,
        ]
    )


def bad_pattern(of: random.Random) -> str:
    """One that does not compile, would take very much memory to, or is no pattern of a readable length."""
    one, many = of.choice("ab."), of.randint(25, 200)
    return of.choice(
        [
            "(" * of.randint(1, 4000),
            "(" * 4000 + ")" * 4000,
            "*" + one,
            "[" + one,
            "a{" + "9" * many + "}",
            f"(?:^){{{10 ** of.randint(7, 9)}}}a",
            f"(?:(?:{one}{{0,{many}}}){{0,{many}}}){{0,{10 * many}}}!",
            "(?P<x",
            "(?P<a>a)(?P<a>b",
            r"\1",
            "a**",
            "a" * of.randint(MAX_CHARACTERS + 1, 10**6),
            "",
        ]
    )


def bad_modules(of: random.Random) -> Any:
    return of.choice(
        [
            lambda: bad_pattern(of),
            lambda: bad_pattern(of),
            lambda: bad_pattern(of),
            lambda: ["fc1", of.choice([0, None, b"fc2", ["fc2"], math.nan, huge(of)])],
            lambda: ("fc1", ""),
            lambda: ["a"] * of.randint(MAX_NAMES + 1, 10 * MAX_NAMES),
            lambda: ["a" * of.randint(MAX_CHARACTERS + 1, 10**6)],
            lambda: of.choice([True, 0, 1.5, math.inf]),
        ]
    )()


def bad_value(of: random.Random, key: str) -> Any:
    """A value that ``key`` must not take."""
    if key in MODULES:
        return wrong_type(of) if of.random() < 0.2 else bad_modules(of)
    if of.random() < 0.3:
        return wrong_type(of)
    unset = [] if Settings.__dataclass_fields__[key].default is None else [None]
    if key in CHOICES:
        names = CHOICES[key]
        value = of.choice([misspelt(of, of.choice(names)), misspelt(of, of.choice(names)), "", None, 0, True])
        return value if value not in names else ""
    if key == "layer_types":
        name = of.choice(layer_type_names())
        return of.choice([name, [], [misspelt(of, name) + "x"], [name, None], [[name]], {name: 1}, True])
    if key == "strict":
        return of.choice([0, 1, None, "true", "False", math.nan, huge(of)])
    if key in INTEGERS:
        return of.choice([0, -huge(random.Random(0)), 2**63, 1.0, "10", True, math.nan, math.inf])
    refused = [math.nan, math.inf, -math.inf, 10**400, -(10**400), "0.1", True, -1e-9, -1, "NaN", *unset]
    refused += [1, 1.0, 1e300] if key in BELOW_ONE else []
    refused += [0, 0.0, -0.0] if key in ABOVE_ZERO else []
    return of.choice(refused)


def bad_version(of: random.Random) -> Any:
    text = [
        "",
        "1",
        "v1.0",
        "3.0",
        "99.1",
        "0.1",
        "1.0.0",
        "-1.0",
        "1.0\n",
        "1e0",
        "\u0661.0",
        "9" * 10**5 + ".0",
        "nan",
    ]
    return of.choice([*text, 1, 1.0, None, True, [], {"major": 1}, nested(of, 20), huge(of)])


def bad_content(of: random.Random, key: str, target: Path) -> bytes:
    """Bytes that are no config file at all."""
    good = FNGDConfig().to_json_string()
    line = json.dumps({key: json.loads(good)[key]})[1:-1]
    place = of.randrange(1, len(good) - 2)
    ours = good.encode()
    return of.choice(
        [
            lambda: b"",
            lambda: b" \n\t",
            lambda: ours[:place],  # half a file
            lambda: ours[:place] + b"\xff\xfe" + ours[place:],
            lambda: ours[:place] + b"\0" + ours[place:],
            lambda: ours + b"{}",
            lambda: ours.replace(b'"', b"'"),
            lambda: b"// comment\n" + ours,
            lambda: ours.rstrip()[:-1].rstrip() + b",}",
            lambda: f"{good.rstrip()[:-2]}, {line}\n}}".encode(),  # a key twice
            lambda: f'{{"{key}": {{"a": 1, "a": 2}}}}'.encode(),
            lambda: f'{{"{key}": {"9" * of.choice([5000, 10**6 - 100])}}}'.encode(),
            lambda: f'{{"{key}": {"[" * 100_000}{"]" * 100_000}}}'.encode(),
            lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            lambda: b"[" * of.randint(10**3, MAX_BYTES),
            lambda: ours + b" " * MAX_BYTES * of.choice([1, 64]),
            lambda: b"{" + b'"a": 0, ' * of.randint(MAX_BYTES // 8, MAX_BYTES),
            lambda: pickle.dumps(Payload(target), protocol=of.randint(0, 5)),
            lambda: pickle.dumps(Payload(target)) + ours,
            lambda: of.choice([b"null", b"true", b"3", b"NaN", b'"lr"', b"[]", b'[{"lr": 1}]', b"-Infinity"]),
            lambda: f"lr: 0.1\n{key}: 1\n".encode(),
            lambda: f"!!python/object/apply:os.system ['touch {target}']".encode(),
            lambda: of.randbytes(of.randint(1, 10**5)),
        ]
    )()


def bad_path_arguments(of: random.Random, secret: Path) -> tuple[str, dict[str, Any]]:
    """An argument of from_pretrained, and arguments of which it is the one to be refused."""
    outside = of.choice(["..", "../..", "a/../../b", "/etc", str(secret.parent), "a\\..\\b", "../" * 500])
    odd: list[Any] = ["a\0b", "\ud800", "x" * 10**6, b"a", 5, 1.5, ["a"], object()]
    options: dict[str, list[Any]] = {
        "name_or_path": [*odd, None],
        "subfolder": [*odd, None, outside],
        "revision": [*odd, outside, "a b", "x~1", "v9", "-" * 40, "refs/../../x", "b" * 40],
        "cache_dir": odd,
    }
    key = of.choice(list(options))
    return key, {key: of.choice(options[key])}


def unreadable_names(of: random.Random, root: Path, secret: Path) -> str:
    """A name that is neither a folder with a config, a .json file nor a cached repository."""
    return of.choice(
        [
            str(root / "nowhere"),
            str(root / "nowhere.json"),
            "../../../../../../etc",
            "/etc/passwd",
            "/dev/zero",
            "/proc/self/mem",
            str(secret),
            "~/config.json",
            "user/other",
            "a/b/c",
            "user/re po",
            "user/repo@main",
            "file:///etc/passwd",
            "http://localhost:1/x",
            "--help",
            "$(touch x)",
            "x" * 300,
            "user/" + "r" * 200,
            f"{root}/loop",
        ]
    )


def misspelt_key(of: random.Random) -> str:
    while True:
        key = misspelt(of, of.choice(ARGUMENTS))
        if key not in ARGUMENTS:
            return key
