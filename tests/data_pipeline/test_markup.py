from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.markup import Html, join, tag


@given(st.text(), st.text())
def test_text_never_becomes_markup(text: str, value: str) -> None:
    drawn = tag("p", text, title=value)
    assert drawn.count("<") == drawn.count(">") == 2
    assert drawn.startswith('<p title="')
    assert drawn.removeprefix('<p title="').partition('"')[2] == f">{join([text])}</p>"


def test_markup_is_taken_as_it_is_and_pieces_put_together_by_hand_are_text() -> None:
    inner = tag("b", "1 < 2")
    assert tag("p", inner, " & ", class_="note", data_from=None) == '<p class="note"><b>1 &lt; 2</b> &amp; </p>'
    assert isinstance(join([inner, "x"]), Html)
    assert tag("p", inner + "x") == "<p>&lt;b&gt;1 &amp;lt; 2&lt;/b&gt;x</p>"
