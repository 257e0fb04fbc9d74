"""The workflow that publishes: it calls commands that exist, keeps no token, and pins what it runs."""

import re

import pytest
from release import ROOT, VERSION

yaml = pytest.importorskip("yaml", reason="make test-packages installs it")


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_runs_on_tags_of_versions_alone(workflow):
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)


def test_make_targets_exist(workflow):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    called = [
        target
        for step in steps(workflow)
        for target in re.findall(r"make (\S+)", step.get("run", ""))
    ]
    assert called and set(called) <= targets


def test_actions_are_pinned_by_commit(workflow):
    uses = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in uses)


def test_only_publishing_may_ask_for_a_token_and_none_is_kept(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert "permissions" not in jobs["build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"] == "pypi" and jobs["publish"]["needs"] == "build"
    assert "secrets." not in (ROOT / ".github/workflows/publish.yml").read_text()


def test_publishing_builds_nothing(workflow):
    assert all("run" not in step for step in workflow["jobs"]["publish"]["steps"])
