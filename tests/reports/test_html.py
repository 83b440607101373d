"""The HTML report, read back by an HTML parser."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from edgebake.reports import html
from edgebake.reports._rows import COLUMNS
from edgebake.result import Result

VOID = {"meta"}
ALLOWED = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "span", "dl", "dt", "dd"}
ALLOWED |= {"table", "thead", "tbody", "tr", "th", "td", "caption", "details", "summary"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(results: list[Result]) -> _Reader:
    reader = _Reader()
    reader.feed(html.render(results, title="edgebake <build>"))
    assert reader.open == []
    return reader


def test_a_well_formed_document_with_every_artifact(results: list[Result]) -> None:
    reader = _read(results)
    text = " ".join(reader.text)
    assert set(reader.tags) <= ALLOWED
    assert text.count("all numbers") == 5
    for words in ("31.2 dB", "not measured", "the error begins at encoder.layer.3", "GatherND", "edgebake <build>"):
        assert words in text


def test_it_needs_nothing_else(results: list[Result]) -> None:
    text = html.render(results, title="t")
    assert not any(
        word in text for word in ("<script", "<link", "src=", "href=", "url(", "@import", "http://", "https://")
    )
    assert "default-src 'none'" in text


def test_hostile_strings_are_text(nasty: Result) -> None:
    reader = _read([nasty])
    assert set(reader.tags) <= ALLOWED
    assert reader.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope", "colspan"}
    assert "<script>alert(1)</script>" in " ".join(reader.text)
    assert not any(ord(c) < 32 and c != "\n" for c in "".join(reader.text))


def test_light_and_dark() -> None:
    assert "prefers-color-scheme: dark" in html.render([], title="t")


def test_a_narrow_screen_reads_every_cell_after_the_name_of_its_column() -> None:
    text = html.render([], title="t")
    assert "COLUMN_NAMES" not in text
    for place, name in enumerate(COLUMNS[2:], 3):
        assert f'td:nth-child({place})::before {{ content: "{name} "' in text


def test_stages_stand_in_the_order_of_a_build(passing: Result) -> None:
    stages = {name: {"state": "ran", "seconds": 1.0} for name in ("lower", "validate", "load", "deliver", "trace")}
    result = replace(passing, stages={}, measurements={**passing.measurements, "stages": stages})
    text = " ".join(_read([result]).text)
    found = [text.rindex(f" {name} ") for name in ("load", "trace", "lower", "validate", "deliver")]
    assert found == sorted(found)


def test_operators_are_counted_by_unit(failing: Result) -> None:
    text = " ".join(_read([failing]).text)
    for words in ("Operators by unit", "36 operators (FullyConnected 36)", "1,234,567", "98,304 bytes in a call"):
        assert words in text
