"""Numbers of things in messages: `1 cell`, `2,500 cells`."""


def counted(number: int, thing: str, things: str | None = None) -> str:
    """A number and what it is of; `things`: the plural, where it is not `thing` with an s."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"
