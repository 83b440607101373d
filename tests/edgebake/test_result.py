"""The state of a result and the exit code of several."""

from __future__ import annotations

from edgebake.errors import EXIT_LIMIT, EXIT_NOT_MEASURED, EXIT_OK
from edgebake.reports._rows import row_of, summary
from edgebake.result import Result, exit_code
from edgebake.types import Verdict

LOADS = Verdict(limit="structure.loads", state="pass")
UNKNOWN = Verdict(limit="parity.cosine", subject="y", state="not measured", bound=0.9, reason="nothing here runs it")


def result(*verdicts: Verdict) -> Result:
    return Result(unit="a/model@t#fp32", recipe="a", component="model", target="t", scheme="fp32", verdicts=verdicts)


def test_a_file_that_loads_has_passed_no_limit() -> None:
    unmeasured = result(UNKNOWN, LOADS)
    assert unmeasured.state == "not measured"
    assert (exit_code([unmeasured]), exit_code([unmeasured], strict=True)) == (EXIT_OK, EXIT_NOT_MEASURED)
    assert summary([unmeasured]) == "0 passed, 1 not measured; 1 limit was not measured"
    assert result(UNKNOWN, LOADS, Verdict(limit="size.mib", state="pass", value=1.0, bound=2.0)).state == "pass"


def test_a_file_that_does_not_hold_what_it_promised_fails_without_any_limit() -> None:
    broken = result(UNKNOWN, Verdict(limit="structure.weights", state="fail", reason="they are others"))
    assert (broken.state, exit_code([broken])) == ("fail", EXIT_LIMIT)


def test_without_limits_it_is_said_that_there_are_none_whatever_the_file_holds() -> None:
    free = result(LOADS)
    assert free.state == "not measured"
    assert [line.text for line in row_of(free).lines if line.label == "unmeasured"] == ["the recipe sets no limits"]
    assert summary([free]) == "0 passed, 1 not measured; no limit was judged"
