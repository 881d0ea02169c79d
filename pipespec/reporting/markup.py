"""HTML as text that cannot be broken by what stands in it: all that is not `Html` is escaped."""

from __future__ import annotations

import html
from typing import Any

from pipespec.results.metadata import plain
from pipespec.results.reading import to_json


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. Children that are not `Html` are escaped; attributes always are.

    `class_` is written `class`, and an underscore within a name as a hyphen. An attribute that is
    None or False is left out, one that is True has no value.
    """
    written = "".join(
        f" {_name(key)}" if value is True else f' {_name(key)}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """The children one after another."""
    return Html("".join(_escaped(child) for child in children))


def embedded(data: Any, identifier: str | None = None) -> Html:
    """Data for the page's script. No text in it can end the element: `<` is written as an escape,
    and so is all that is not ASCII. A number that is not finite becomes null."""
    text = to_json(plain(data)).replace("<", "\\u003c")
    return tag("script", Html(text), type="application/json", id=identifier)


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _escaped(child: object) -> str:
    return child if isinstance(child, Html) else html.escape(str(child))
