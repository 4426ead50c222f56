"""How what is right is made wrong: values of other kinds and sizes, bytes, JSON, YAML."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

WORDS = (
    "",
    " ",
    "~",
    "none",
    "auto",
    "null",
    "yes",
    "0x10",
    "1e400",
    "2:4",
    "0:0",
    "9999:9999",
    "window:0",
    "window:9999",
    "re:",
    "re:(",
    "re:.*",
    "builtin:",
    "builtin:pystdlib",
    "builtin:../x",
    "file:",
    "file:/dev/null",
    "os:system",
    "no_such_module:f",
    "..",
    ".",
    "/",
    "~",
    "~nobody_at_all/x",
    "../../escape",
    "a/b",
    "-",
    "--json",
    "[bold]x[/bold]",
    "%s{0}",
    "a\x00b",
    "a\nb",
    "\x1b[31m",
    "ünï\u2028\u202e\ufeff",
    "\U0001f600" * 9,
    "x" * 300,
    "y/" * 3000,
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 64, 65, 10**6, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 0.999999999, 1e-9, 5e-324, 1e30, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)


def odd_value(chance: random.Random, depth: int = 0) -> Any:
    """A value of any kind that may be wrong wherever it stands."""
    draw = chance.random()
    if draw < 0.4:
        return chance.choice(NUMBERS)
    if draw < 0.75:
        return chance.choice(WORDS)
    if draw < 0.85 or depth > 2:
        return chance.choice([None, True, False])
    if draw < 0.95:
        return [odd_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    keys = ("choice", "loguniform", "uniform", "x", "", "q_proj", "re:.*")
    return {chance.choice(keys): odd_value(chance, depth + 1) for _ in range(chance.randrange(3))}


def paths_in(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values within plain data, its own left out."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in ((*path, key), *paths_in(value, (*path, key)))]


def change_data(chance: random.Random, data: Any, times: int) -> Any:
    """Plain data with so many values replaced, removed, renamed or doubled, in place."""
    for _ in range(times):
        places = paths_in(data)
        if not places:
            break
        *above, last = chance.choice(places)
        holder = data
        for key in above:
            holder = holder[key]
        how = chance.random()
        if how < 0.65:
            holder[last] = odd_value(chance)
        elif how < 0.8:
            del holder[last]
        elif isinstance(holder, dict):
            value = holder.pop(last) if how < 0.9 else holder[last]
            holder[near_name(chance, str(last))] = value
        else:
            holder.append(holder[last])
    return data


def near_name(chance: random.Random, name: str) -> str:
    """A slip of the pen."""
    place = chance.randrange(len(name) + 1)
    return chance.choice(
        [name[:place] + name[place + 1 :], name[:place] + "x" + name[place:], name.upper(), name + " ", ""]
    )


def change_bytes(chance: random.Random, content: bytes, times: int) -> bytes:
    """So many bytes or stretches of bytes flipped, removed, put in or doubled."""
    data = bytearray(content)
    for _ in range(times):
        place = chance.randrange(len(data) + 1)
        size = chance.choice([1, 1, 1, 2, 4, 8, 40])
        how = chance.randrange(5)
        if how == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif how == 1:
            del data[place : place + size]
        elif how == 2:
            data[place:place] = chance.randbytes(size)
        elif how == 3:
            data[place:place] = data[max(0, place - size) : place]
        else:
            data[place : place + size] = chance.choice([b"\0", b"\xff", b"{", b"\n", b"9"]) * size
    return bytes(data)


def damaged(chance: random.Random, content: bytes) -> bytes:
    """A file that was cut off, emptied, or changed in a few places, most often near its ends."""
    ways: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: content[: chance.randrange(len(content) + 1)],
        lambda: content[chance.randrange(min(64, len(content) + 1)) :],
        lambda: change_bytes(chance, content, chance.randint(1, 6)),
        lambda: change_bytes(chance, content[:64], 2) + content[64:],
        lambda: content[:-64] + change_bytes(chance, content[-64:], 2),
        lambda: content + chance.randbytes(16),
        lambda: chance.randbytes(chance.randrange(200)),
    ]
    return chance.choice(ways)()
