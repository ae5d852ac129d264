"""Names that others chose, in texts of ours: an error shows a key or a path without obeying it, and not 50 MB of it."""

from __future__ import annotations

from collections.abc import Collection

LONGEST = 4000
"""Characters of a whole message."""


def plain(text: object, most: int = LONGEST) -> str:
    """`text` on a terminal: control characters and halves of surrogates escaped, cut in the middle beyond `most`.

    Line breaks of ours stay; carriage returns, escapes and right-to-left marks do not.
    """
    given = str(text)
    if len(given) > most:
        half = most // 2
        given = f"{given[:half]} ... {len(given) - 2 * half} characters ... {given[-half:]}"
    if given.isascii() and given.isprintable():
        return given
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in given)


def named(name: object, most: int = 200) -> str:
    """A name on one line."""
    return plain(name, most).replace("\n", "\\n")


def listing(names: Collection[str], most: int = 8) -> str:
    """The first of them in their order, and how many more there are."""
    items = sorted(names)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(named(item) for item in items[:most]) + more


def shown(value: object, most: int = 60) -> str:
    """The repr of what a file held, cut: of containers only what they are, for theirs may be endless."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    return named(repr(value[: 2 * most] if isinstance(value, (str, bytes)) else value), most)
