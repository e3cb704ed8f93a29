"""HTML whose text is escaped by construction: a plain string is text, only what `tag` has made is markup."""
from collections.abc import Iterable
from html import escape


class Html(str):
    """Markup that is whole: goes into a page as it is."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | None) -> Html:
    """An element: `tag("td", "a < b", class_="number", data_from="x")`.

    Args:
        name: of the element.
        children: a plain string is text and is escaped; Html is taken as it is.
        attributes: escaped; a `_` at the end is dropped, others become `-`; None leaves the attribute out.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
                      for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Several pieces as one."""
    return Html("".join(child if isinstance(child, Html) else escape(child, quote=False) for child in children))
