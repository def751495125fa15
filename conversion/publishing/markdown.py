"""What files, options and the Hub say, inside of Markdown: as text, never as markup."""

import re
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


# What can begin or end markup within a line; also of bare links, which need no brackets.
MARKUP = re.compile(r"[\\`*_\[\]<>#|~&$@]|:(?=//)|(?<=www)\.", flags=re.I)


def environment() -> Environment:
    """Where every value of a template is escaped, unless a filter below has made markup of it."""
    made = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=True, finalize=escape)
    made.filters |= {"url": url, "python": python, "fenced": fenced}
    return made


def escape(value: Any) -> Markup:
    """A value as one line of text. What cannot be seen, such as a line break, becomes a space."""
    if hasattr(value, "__html__"):
        return value
    seen = "".join(character if character.isprintable() else " " for character in str(value))
    return Markup(MARKUP.sub(r"\\\g<0>", " ".join(seen.split())))


def url(value: str) -> Markup:
    """The address of a link; `/` stays."""
    return Markup(quote(value, errors="replace"))


def python(value: str) -> Markup:
    """A text as a literal of Python, in double quotes unless there are quotes in it."""
    literal = repr(value)
    return Markup(literal if {"'", '"'} & {*value} else f'"{literal[1:-1]}"')


def fenced(value: str, language: str) -> Markup:
    """A block of code, in a fence that is longer than any in it."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", value))]))
    return Markup(f"{fence}{language}\n{value}\n{fence}")
