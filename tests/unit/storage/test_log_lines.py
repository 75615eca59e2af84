"""Lines of the log name the run and the stage; the screen shows them once, and never through a progress bar."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from bpt_dist.errors import Stopped
from bpt_dist.storage.log_lines import ELSEWHERE, ScreenHandler, enter_stage, lines_of_run, place
from bpt_dist.storage.run_directory import RunDirectory

log = logging.getLogger("bpt_dist.test")


@pytest.fixture
def handler() -> Iterator[ScreenHandler]:
    made = ScreenHandler("rank 1: ", ends_reported=True)
    log.addHandler(made)
    log.setLevel(logging.INFO)
    yield made
    log.removeHandler(made)


def test_lines_name_run_and_stage_until_the_run_ends(handler: ScreenHandler, capsys: pytest.CaptureFixture[str]) -> None:
    log.info("before")
    with lines_of_run("2/6 bpt-s0"):
        log.info("opened")
        enter_stage("source")
        log.info("step %d", 3)
    log.info("after")
    assert capsys.readouterr().err.splitlines() == [
        "rank 1: before",
        "rank 1: 2/6 bpt-s0 | opened",
        "rank 1: 2/6 bpt-s0 | source | step 3",
        "rank 1: after",
    ]
    assert place() == ""


def test_a_line_goes_where_standard_error_is_now(handler: ScreenHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    above_the_bar = io.StringIO()  # rich puts such a stream in place while it draws a bar
    monkeypatch.setattr(sys, "stderr", above_the_bar)
    log.info("a line")
    assert above_the_bar.getvalue() == "rank 1: a line\n"


def test_what_the_end_of_the_job_reports_is_not_shown_before(handler: ScreenHandler, capsys: pytest.CaptureFixture[str]) -> None:
    log.info("stopped: why", extra=ELSEWHERE)
    assert capsys.readouterr().err == ""
    handler.ends_reported = False
    log.info("stopped: why", extra=ELSEWHERE)
    assert capsys.readouterr().err == "rank 1: stopped: why\n"


def test_the_last_words_of_a_watchdog_are_shown(handler: ScreenHandler, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends the process at once: nothing after it would print them."""
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with RunDirectory.open("{}", "f", lambda old: [], tmp_path / "a-s0") as run:
            run.status("failed", "no progress for 128 s")
    finally:
        root.removeHandler(handler)
    assert "rank 1: failed: no progress for 128 s" in capsys.readouterr().err


def test_the_file_of_a_rank_has_the_same_lines(tmp_path) -> None:
    with pytest.raises(Stopped), lines_of_run("1/2 a-s0"), RunDirectory.open("{}", "f", lambda old: [], tmp_path / "a-s0") as run:
        run.status("running", stage="target/mood")
        raise Stopped("stopped on request")
    lines = (tmp_path / "a-s0" / "logs" / "rank-0.log").read_text().splitlines()
    assert [line.partition("run_directory: ")[2] for line in lines] == [
        f"1/2 a-s0 | created {tmp_path / 'a-s0'}",
        "1/2 a-s0 | target/mood | running",
        "1/2 a-s0 | target/mood | stopped: stopped on request",
    ]
