"""The quality table's command from end to end, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.table import main

pytestmark = pytest.mark.engine


def test_one_command_makes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, table, picture = tmp_path / "table.json", tmp_path / "table.md", tmp_path / "plot.png"
    arguments = ["embedded", "--tokens", "600", "--documents", "1", "--policies", "snapkv", "random,seed=3"]
    arguments += [
        "--budgets",
        "1/2,200,5000",
        "--output",
        str(output),
        "--markdown",
        str(table),
        "--plot",
        str(picture),
    ]
    assert main([*arguments, "--max-model-len", "1024"]) == 0
    result = json.loads(output.read_text())
    cells = {(cell["policy"], cell["budget"], cell["setting"]): cell for cell in result["cells"]}
    assert len(cells) == (1 + 2 * 3) * 2
    dense = cells["none", "100%", "unknown"]
    assert (dense["kl"], dense["kept"], dense["tasks"]["continuation"]["score"]) == (0, 1, 1)
    for (policy, budget, setting), cell in cells.items():
        assert set(cell["tasks"]) == {"passkey", "multi-key"} | ({"continuation"} if setting == "unknown" else set())
        if budget == "5000":  # not compacted: as without a policy
            assert cell["kl"] < 0.05 and cell["kept"] == 1
        elif policy != "none":
            limit = 0.5 if budget == "50%" else 200 / 500
            assert 0 < cell["kl"] < 5 and 0.2 < cell["kept"] <= limit
    assert cells["random,seed=3", "200", "unknown"]["kl"] > cells["snapkv", "50%", "known"]["kl"]
    assert result["command"].startswith("python -m benchmarks.quality.table embedded --tokens 600")
    assert str(tmp_path) not in output.read_text() and "--output table.json" in result["command"]
    assert table.read_text() in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
