"""The quality benchmark goes on from its own earlier run, and from no other."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
PATH = Path(__file__).parent.parent / "examples" / "benchmarks" / "quality.py"


@pytest.fixture
def quality(tmp_path, jargon_test, less_text, monkeypatch):
    """Runs the script on two texts of one name: the rows of quality.json."""
    spec = importlib.util.spec_from_file_location("quality", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = jargon_test.read_text("utf-8")
    texts = [tmp_path / part / "text.txt" for part in ("one", "two")]
    for number, path in enumerate(texts):
        path.parent.mkdir()
        path.write_text(text[number * 4000 : (number + 1) * 4000], "utf-8")

    def run(*flags):
        arguments = ["--num-samples", 4, "--seq-length", 32, "--max-windows", 2]
        arguments += ["--calibration", less_text, "--text", *texts, "--repairs", "none"]
        arguments += ["--sparsities", 0.5, "--output", tmp_path / "out", "--selectors", *flags]
        monkeypatch.setattr("sys.argv", ["quality.py", *map(str, arguments)])
        module.main()
        return json.loads((tmp_path / "out" / "quality.json").read_text())["rows"]

    run.texts, run.module = [str(path) for path in texts], module
    return run


def test_a_run_goes_on_from_one_with_its_settings_alone(quality, monkeypatch, capsys):
    first = quality("magnitude")
    assert [list(row["excess_loss"]) for row in first] == [quality.texts]
    assert len(set(first[0]["excess_loss"].values())) == 2
    rows = quality("magnitude", "random")
    assert rows[:1] == first and [row["selector"] for row in rows] == ["magnitude", "random"]

    monkeypatch.setattr(quality.module, "load", lambda _: 1 / 0)
    for changes in (
        ("--model", "another"),
        ("--text", quality.texts[0]),
        ("--calibration", quality.texts[0]),
        ("--num-samples", 8),
        ("--seq-length", 16),
        ("--max-windows", 3),
    ):
        with pytest.raises(SystemExit) as error:
            quality("magnitude", *changes)
        assert error.value.code == 2
        assert "quality.json is of another run" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        quality("magnitude")
