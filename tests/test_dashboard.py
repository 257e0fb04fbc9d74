"""The dashboard and the operator's page speak of the metrics that there are, and of all of them."""

import json
import re
from pathlib import Path

import waterfill_rs.sglang.metrics as metrics
from waterfill_rs.config import BACKEND_VARIABLE
from waterfill_rs.operate.checks import VARIABLES

DOCS = Path(__file__).parents[1] / "docs"
NAME = re.compile(r"sglang:waterfill_\w+")
METRICS = set(NAME.findall(Path(metrics.__file__).read_text()))


def test_each_panel_asks_for_metrics_that_there_are():
    dashboard = json.loads((DOCS / "grafana-waterfill.json").read_text())
    asked = {
        name.removesuffix("_bucket")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in NAME.findall(target["expr"])
    }
    assert asked == METRICS and len(METRICS) == 9


def test_the_operators_page_has_every_metric_and_variable():
    page = (DOCS / "operators.md").read_text()
    assert set(NAME.findall(page)) == METRICS
    assert set(re.findall(rf"{BACKEND_VARIABLE}\w*", page)) == set(VARIABLES)
