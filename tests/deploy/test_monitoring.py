"""Dashboard, rules and their page: that Prometheus takes them, and that all of them are of today.

What the queries find is seen with a live server: tests/e2e/test_dashboard.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from deploy.grafana.build import DASHBOARD, PAGE, RULES, build, page
from deploy.grafana.panels import ROWS
from tests.deploy.project import ROOT

ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]


def test_the_dashboard_and_its_page_are_built_anew() -> None:
    again = "run `python -m deploy.grafana.build`"
    assert DASHBOARD.read_text() == build(), again
    assert PAGE.read_text() == page(), again


def test_panels_lie_side_by_side() -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in panels] == [panel.title for row in ROWS.values() for panel in row]
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


@pytest.mark.parametrize("file", ["prometheus.yml", "router.yml"])
def test_promtool_checks_the_configuration(promtool: Any, file: str) -> None:
    assert "SUCCESS" in promtool("check", "config", f"deploy/prometheus/{file}")


def test_promtool_tests_the_alerts(promtool: Any) -> None:
    promtool("test", "rules", "deploy/prometheus/rules_test.yml")


@pytest.mark.parametrize("alert", [alert["alert"] for alert in ALERTS])
def test_each_alert_has_a_test_that_sees_it_fail(promtool: Any, tmp_path: Path, alert: str) -> None:
    """Without the alert its test must fail."""
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        group["rules"] = [rule for rule in group["rules"] if rule.get("alert") != alert]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "rules_test.yml").write_text((RULES.parent / "rules_test.yml").read_text())
    assert alert in promtool("test", "rules", tmp_path / "rules_test.yml", fails=True)


def test_alerts_say_what_to_do_and_dashboards_name_no_other() -> None:
    names = {alert["alert"] for alert in ALERTS}
    for alert in ALERTS:
        assert set(alert["annotations"]) == {"when", "summary", "action"}
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
    told = " ".join(panel.tells for row in ROWS.values() for panel in row)
    told += " ".join(alert["annotations"]["action"] for alert in ALERTS)
    told += (ROOT / "docs/deploy.md").read_text()
    assert set(re.findall(r"\bLongreach[A-Z]\w+", told)) <= names
