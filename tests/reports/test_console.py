"""The console report: width, pipes, terminals, hostile strings."""

from __future__ import annotations

from io import BytesIO, StringIO, TextIOWrapper

from rich.cells import cell_len
from rich.console import Console

from edgebake.reports import console
from edgebake.result import Result


def _shown(results: list[Result], **options: object) -> str:
    out = StringIO()
    console.show(results, Console(file=out, **options), title="t")  # type: ignore[arg-type]
    return out.getvalue()


def test_fits_100_columns(results: list[Result]) -> None:
    text = console.render(results, title="edgebake build")
    assert max(cell_len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text


def test_a_row_per_artifact_under_its_component(results: list[Result]) -> None:
    lines = console.render(results, title="edgebake build").splitlines()
    assert lines[0] == "edgebake build"
    assert [line for line in lines if line.endswith("/model")] == ["minilm-l6/model", "mobilenet-v2/model"]
    starts = [line.split()[:2] for line in lines if line[:1] not in ("", " ")]
    assert ["pass", "executorch-xnnpack"] in starts
    assert ["FAIL", "onnx-qnn"] in starts
    assert ["not", "executorch-coreml"] in starts
    assert ["FAILED", "onnx-cpu"] in starts
    assert ["toolchain", "executorch-mediatek"] in starts


def test_columns_stand_below_their_heads(passing: Result) -> None:
    _, _, _, head, first, second, *_ = console.render([passing], title="x").splitlines()
    for name, cell in (("parity", "31.2 dB"), ("size MiB", "21.9"), ("speedup", "×2.44")):
        assert head.index(name) == first.index(cell)
    assert head.index("parity") == second.index("cos 0.99963")


def test_the_last_line_counts_what_was_not_measured(results: list[Result]) -> None:
    lines = console.render(results, title="x").splitlines()
    assert lines[-1].endswith("; 4 limits were not measured")
    assert lines[-2].startswith("stages  load 2 ran, 2 stored; reference")


def test_a_pipe_gets_neither_colour_nor_broken_lines(results: list[Result]) -> None:
    text = _shown(results, force_terminal=False, width=40)
    assert "\x1b" not in text
    assert "limit at least 25 dB" in text
    assert text.splitlines()[1:] == console.render(results, title="x").splitlines()[1:]


def test_a_terminal_gets_colour(results: list[Result]) -> None:
    assert "\x1b[" in _shown(results, force_terminal=True, width=100, color_system="standard")


def test_a_narrow_terminal_gets_stacked_rows(results: list[Result]) -> None:
    text = _shown(results, force_terminal=True, width=60, color_system=None)
    assert "    parity  31.2 dB, cos 0.99963" in text
    assert max(cell_len(line) for line in text.splitlines()) <= 60


def test_an_ascii_stream_does_not_break(results: list[Result], nasty: Result) -> None:
    raw = BytesIO()
    stream = TextIOWrapper(raw, encoding="ascii")
    console.show([*results, nasty], Console(file=stream, width=100), title="naïve")
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "x2.44" in text
    assert "0.988-0.997" in text


def test_hostile_strings_are_printed_as_text(nasty: Result) -> None:
    text = console.render([nasty], title="x\x1b[2J")
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    assert "[bold]x[/]" in " ".join(text.split())
    assert "\u202e" not in text
    assert "3 dB, limit at least 25 dB" in " ".join(text.split())


def test_no_results_are_still_a_report() -> None:
    assert console.render([], title="t").splitlines() == ["t", "", "0 passed; no limit was judged"]
