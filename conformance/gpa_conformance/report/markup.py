"""HTML from values: everything that is not built here is escaped, and the page needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from gpa_conformance.report.facts import STATE_SIGNS, STATE_WORDS
from gpa_conformance.results import Status


class Html(str):
    """Markup that is already safe; any other value is text."""

    __slots__ = ()


class Column(NamedTuple):
    """number: right-aligned. tight: never wrapped."""

    name: str
    number: bool = False
    tight: bool = False


def text(value: object) -> Html:
    """A value as text; `Html` stays what it is."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def element(tag: str, content: object, css: str = "", **attributes: str) -> Html:
    """One element around `content`."""
    named = {**({"class": css} if css else {}), **attributes}
    inside = "".join(f' {name.replace("_", "-")}="{escape(value)}"' for name, value in named.items())
    return Html(f"<{tag}{inside}>{text(content)}</{tag}>")


def join(parts: Iterable[object], separator: str = "\n") -> Html:
    return Html(separator.join(text(part) for part in parts))


def section(title: str, *parts: object, name: str) -> Html:
    """A part of the page with its heading; nothing if all its parts are empty."""
    filled = [part for part in parts if part]
    if not filled:
        return Html("")
    heading = element("h2", title, id=f"{name}-title")
    return element("section", join([heading, *filled]), id=name, aria_labelledby=f"{name}-title")


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[object]], marks: Sequence[str] = ()) -> Html:
    """A table that scrolls inside its box. The first cell of a row is its header; marks: a class per row."""
    head = "".join(element("th", each.name, _css(each), scope="col") for each in columns)
    body = []
    for index, row in enumerate(rows):
        cells = [
            element("td", cell, _css(column)) if number else element("th", cell, _css(column), scope="row")
            for number, (cell, column) in enumerate(zip(row, columns, strict=True))
        ]
        mark = marks[index] if index < len(marks) else ""
        body.append(element("tr", join(cells, ""), mark))
    whole = Html(
        f"<table>{element('caption', caption)}<thead><tr>{head}</tr></thead><tbody>{join(body)}</tbody></table>"
    )
    return element("div", whole, "scroll", tabindex="0", role="region", aria_label=caption)


def facts(lines: Iterable[tuple[object, object]]) -> Html:
    """Names and values."""
    pairs = [join((element("dt", name), element("dd", value)), "") for name, value in lines]
    return element("dl", join(pairs), "facts")


def state(status: Status) -> Html:
    """A status in words, with its sign and colour."""
    sign = element("span", STATE_SIGNS[status], aria_hidden="true")
    return element("span", Html(f"{sign} {STATE_WORDS[status]}"), f"state {status}")


def figure(title: str, caption: str, svg: str) -> Html:
    """A plot and the words under it."""
    words = join((element("b", title), caption), "")
    return element("figure", join((Html(svg), element("figcaption", words))))


def page(title: str, body: object) -> str:
    """The whole document: no script, no font, no address outside of it."""
    css = (files("gpa_conformance.report") / "page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n{text(body)}\n</body>\n</html>\n"
    )


def _css(column: Column) -> str:
    return "number" if column.number else "tight" if column.tight else ""
