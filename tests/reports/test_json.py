"""The JSON report: versioned, strict, whole."""

from __future__ import annotations

import json as stdlib_json
import math
from dataclasses import replace
from pathlib import Path

from edgebake.reports import json
from edgebake.result import Result


def test_the_document_holds_every_result(results: list[Result]) -> None:
    found = stdlib_json.loads(json.render(results, title="t"))
    assert (found["version"], found["title"]) == (1, "t")
    assert found["artifacts"] == {"fail": 1, "failed": 1, "not measured": 1, "pass": 1, "toolchain missing": 1}
    assert found["limits"] == {"pass": 3, "fail": 2, "not measured": 4}
    assert (found["exit_code"], found["exit_code_strict"]) == (4, 4)
    assert [r["state"] for r in found["results"]] == [r.state for r in results]
    first = found["results"][0]
    assert first["verdicts"][0] == {
        "limit": "parity.sqnr_db",
        "state": "pass",
        "value": 31.27,
        "bound": 25,
        "subject": "last_hidden_state",
        "reason": "",
    }
    assert first["measurements"] == stdlib_json.loads(stdlib_json.dumps(results[0].measurements))
    assert found["results"][3]["failure"]["log"] == "logs/mobilenet-v2/lower.log"
    assert found["results"][3]["failure"]["problems"][0]["fix"].startswith("give this module")


def test_numbers_that_json_lacks_are_null(passing: Result) -> None:
    odd = replace(passing, measurements={"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}}, folder=Path("dist/x"))
    (found,) = stdlib_json.loads(json.render([odd], title="t"))["results"]
    assert found["measurements"] == {"a": [None, None, 1.5], "b": {"c": None}}
    assert found["folder"] == "dist/x"


def test_hostile_strings_stay_ascii(nasty: Result) -> None:
    text = json.render([nasty], title="\udc80")
    assert text.isascii()
    assert "\x1b" not in text
    assert stdlib_json.loads(text)["results"][0]["unit"] == nasty.unit
