"""The report as JUnit XML: a suite per artifact, a case per verdict, so that CI systems list missed limits by name."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from edgebake.reports._rows import row_of, verdict_text
from edgebake.reports._text import plain
from edgebake.result import Result
from edgebake.types import Verdict


def render(results: Sequence[Result], *, title: str) -> str:
    """``testsuites`` as the Jenkins and GitLab readers take it; a limit that was not measured is skipped."""
    root = ElementTree.Element("testsuites", name=plain(title))
    for result in results:
        _suite(root, result)
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(root: ElementTree.Element, result: Result) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=plain(result.unit), time=f"{result.seconds:.3f}")
    if result.failure is not None or not result.verdicts:
        _built(_case(suite, result, "build"), result)
    for verdict in result.verdicts:
        _judged(_case(suite, result, _name(verdict)), verdict)
    cases = list(suite)
    suite.set("tests", str(len(cases)))
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(tag) is not None for case in cases)))
    out = ElementTree.SubElement(suite, "system-out")
    out.text = "\n".join(f"{line.label}: {line.text}" for line in row_of(result).lines)


def _case(suite: ElementTree.Element, result: Result, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=plain(result.unit), name=name)


def _name(verdict: Verdict) -> str:
    return plain(f"{verdict.limit} of {verdict.subject}" if verdict.subject else verdict.limit)


def _judged(case: ElementTree.Element, verdict: Verdict) -> None:
    text = plain(verdict_text(verdict))
    if verdict.state == "fail":
        ElementTree.SubElement(case, "failure", message=text, type=plain(verdict.limit)).text = text
    elif verdict.state == "not measured":
        ElementTree.SubElement(case, "skipped", message=text)


def _built(case: ElementTree.Element, result: Result) -> None:
    if result.failure is None:
        return
    told = "\n".join(plain(problem) for problem in result.failure.problems)
    head = plain(result.failure.problems[0].what) if result.failure.problems else "failed"
    if result.optional and result.state == "toolchain missing":
        ElementTree.SubElement(case, "skipped", message=head)
    else:
        ElementTree.SubElement(case, "error", message=head, type=plain(result.failure.stage)).text = told
