"""What a run's record says beside its numbers reaches the summary and the structured data."""

from dataclasses import replace
from typing import Any

import pytest
from builders import random_profile

import moescope
from moescope.viz.structured import analysis_data
from moescope.viz.summary import summary_text


def _remarks(*settings: dict[str, Any]) -> tuple[str, ...]:
    profile = random_profile(1)
    run = profile.runs[0]
    runs = tuple(replace(run, uuid=f"{i}", settings=one) for i, one in enumerate(settings))
    report = moescope.analyze(replace(profile, runs=runs))
    assert analysis_data(report)["metadata"]["remarks"] == list(report.remarks)
    words = " ".join(summary_text(report).split())
    for remark in report.remarks:
        assert remark in words
    return report.remarks


def test_a_plain_run_has_none() -> None:
    assert _remarks({"seed": 0}) == ()


def test_runs_add_up() -> None:
    verified = {"against": "vLLM's own capture", "requests": 3, "token_layers": 1200, "differences": 0}
    remarks = _remarks(
        {"verified": verified, "skipped_by_prefix_cache": 40},
        {"verified": verified | {"requests": 2}, "skipped_long_prompts": 5, "skipped_by_prefix_cache": 2},
    )
    assert remarks == (
        "verified: 5 requests, 2,400 choices of a token in a layer, id by id against vLLM's own capture: no difference",
        "42 prompt tokens came from the engine's prefix cache and were not routed",
        "5 prompts were left out because they are too long",
    )


@pytest.mark.parametrize("forged", [{"verified": 3}, {"verified": {"requests": "many"}}, {"skipped_long_prompts": "x"}])
def test_forged_settings_say_nothing(forged: dict[str, Any]) -> None:
    assert _remarks(forged) == ()
