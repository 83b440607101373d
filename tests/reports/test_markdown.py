"""The Markdown report, read back by a Markdown parser."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebake.reports import markdown
from edgebake.result import Result

markdown_it = pytest.importorskip("markdown_it")


def _html(text: str) -> str:
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return str(parser.render(text))


def test_a_table_per_component_with_a_row_per_artifact(results: list[Result]) -> None:
    html = _html(markdown.render(results, title="edgebake build"))
    assert html.count("<table>") == 2
    assert html.count("<tr>") == 2 + 5
    assert "<h2>edgebake build</h2>" in html
    assert "✅ pass<br>executed" in html
    assert "the error begins at encoder.layer.3.attention.output" in html
    assert "4 limits were not measured" in html
    rows = re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
    assert {row.count("<td>") + row.count("<th>") for row in rows} == {8}


def test_hostile_strings_add_no_markup(nasty: Result) -> None:
    html = _html(markdown.render([nasty], title="# t | <b>"))
    assert "<script" not in html
    assert "<a " not in html
    assert "<code>" not in html
    assert "\x1b" not in html
    assert html.count("<tr>") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a|b" in html


def test_no_mention_and_no_bare_link_is_left(nasty: Result) -> None:
    text = markdown.render([nasty], title="t")
    assert "@" not in text
    assert "https:" not in text


@given(st.text(alphabet=st.sampled_from("ab|`*_[]()<>&#~\\!$@-\n\x1b:/.hpstw"), max_size=30))
def test_text_survives_and_stays_text(text: str) -> None:
    escaped = markdown.escaped(text)
    html = _html(f"x{escaped}x")
    assert re.sub(r"&(?:amp|lt|gt|quot);|[^<]", "", html) == "<<"  # <p> and </p> only
    assert "\n" not in escaped
