"""Bars: on a terminal, in a log, and switched off."""

import re
import sys

import pytest
from tiny_models import batches, tiny_model
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import grail_hf
from grail_hf.runtime.progress import Bar


def run(bar):
    with bar:
        for number in range(1000):
            bar.set_postfix_str(f"step {number}")
            bar.update()


def test_a_log_gets_lines(capsys):
    run(Bar(total=1000, shown=True, desc="Working", unit="step", parts=4))
    err = capsys.readouterr().err
    first, *lines = err.splitlines()
    assert "\r" not in err and err.endswith("\n")
    assert "Working:   0%" in first
    assert [re.search(r"(\d+)/1000", line)[1] for line in lines] == ["250", "500", "750", "1000"]
    assert "step 249" in lines[0]


def test_a_log_shows_how_far_work_came_that_stopped(capsys):
    with Bar(total=100, shown=True, parts=2) as bar:
        bar.update(30)
    assert "30/100" in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(Bar(total=1000, shown=True))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.count("\r") > 1000  # each step's name is shown at once


@pytest.mark.parametrize("how", ["shown", "transformers"])
def test_there_is_none_where_it_is_not_wanted(capsys, how):
    try:
        if how == "transformers":
            disable_progress_bar()
        run(Bar(total=1000, shown=how != "shown"))
    finally:
        enable_progress_bar()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_a_log_gets_a_line_for_each_decoder_layer(capsys, allocation):
    model = tiny_model("qwen3", num_hidden_layers=6)
    grail_hf.compress(model, calibration=batches(), sparsity=0.3, allocation=allocation)
    lines = capsys.readouterr().err.splitlines()
    number = 1 + (allocation == "error")
    assert 6 * number <= len(lines) <= 8 * number
