"""The JUnit report, read back by an XML parser."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from edgebake.reports import junit
from edgebake.result import Result


def _root(results: list[Result]) -> ElementTree.Element:
    return ElementTree.fromstring(junit.render(results, title="edgebake build").encode())


def test_a_case_per_verdict(results: list[Result]) -> None:
    root = _root(results)
    assert [suite.get("name") for suite in root] == [result.unit for result in results]
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("11", "2", "1", "5")
    failing = root[1]
    names = [case.get("name") for case in failing.iter("testcase")]
    assert names == ["parity.sqnr_db of last_hidden_state", "delegated", "size.mib", "task.top1 of logits"]
    failure = failing.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == "parity.sqnr_db of last_hidden_state: 18.244 dB, limit at least 25 dB"
    skipped = failing.find("testcase/skipped")
    assert skipped is not None
    assert "20 labelled samples" in (skipped.get("message") or "")
    assert root[0].get("time") == "41.250"


def test_a_broken_stage_is_an_error_and_an_optional_toolchain_is_skipped(failed: Result, missing: Result) -> None:
    broken, optional, needed = _root([failed, missing, replace(missing, optional=False)])
    assert broken.find("testcase/error") is not None
    assert optional.find("testcase/skipped") is not None
    assert needed.find("testcase/error") is not None


def test_an_artifact_without_limits_is_one_passing_case(passing: Result) -> None:
    (suite,) = _root([replace(passing, verdicts=())])
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("1", "0", "0")


def test_hostile_strings_are_legal_xml(nasty: Result) -> None:
    text = junit.render([nasty], title="\x00\ud800\ufffe]]>")
    root = ElementTree.fromstring(text.encode())
    assert root.get("name") == "]]>"
    assert "\x1b" not in text
    assert "<script" not in text
    assert root.find(".//failure") is not None
