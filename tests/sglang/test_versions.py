"""The contract on every sglang in the folders that WATERFILL_SGLANGS lists: ``make test-versions``.

A version runs over the newest one's dependencies, but for transformers and tokenizers, which it is given as it
asks for them (folders ``transformers-X`` and ``tokenizers-X`` beside its own).
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDERS = [Path(f) for f in os.environ.get("WATERFILL_SGLANGS", "").split(os.pathsep) if f]
REPORT = os.environ.get("WATERFILL_VERSIONS_REPORT")
CHECKS = [
    "classes_are_ours_under_every_name",
    "deterministic_inference_takes_own_counts",
    "draft_model_has_an_exchange_of_its_own",
    "elastic_ep_leaves_sglangs_own",
    "experts_that_do_not_divide_are_refused",
    "flags_are_in_help_and_travel_to_children",
    "hash_router_expands",
    "hash_router_expands_nothing_on_an_idle_rank",
    "hash_router_gives_padded_rows_no_shared_row",
    "hash_router_refuses_to_run_before_preparation",
    "live_counts_of_two_ranks_give_the_optimum",
    "mega_moe_rank_without_rows_of_others_is_left_alone",
    "mega_moe_rank_without_rows_posts",
    "mega_moe_two_ranks_stay_in_step",
    "metrics_are_pushed_after_sglangs",
    "off_leaves_sglang_untouched",
    "other_models_are_left_alone",
    "overlap_ends_with_the_call",
    "overlap_follows_weights",
    "overlap_gives_what_an_unfused_layer_gives",
    "overlap_is_for_all_ranks_or_none",
    "overlap_is_for_decode_and_prefill_as_the_rule_says",
    "overlap_is_not_for_all",
    "overlap_is_not_for_what_a_prefill_graph_may_run",
    "overlap_is_not_where_fused_was_asked_for",
    "overlap_of_two_batches_gives_the_same",
    "overlap_owns_no_memory",
    "overlap_reads_fp8_blocks",
    "overlap_refuses_figures_of_another_machine",
    "overlap_that_cannot_be_made_ends_no_server",
    "recorder_counts_before_dispatch_in_mode_auto",
    "recorder_takes_counts_with_a_shared_slot",
    "recorder_takes_them_in_normal_mode",
    "redundant_experts_are_counted_or_refused",
    "redundant_experts_are_spread_where_ids_are_mapped",
    "redundant_experts_are_swapped_in_eplbs_maps",
    "redundant_experts_before_and_after_a_rebalance",
    "redundant_experts_come_after_primary_replicas",
    "redundant_experts_have_live_replicas_through_a_rebalance",
    "redundant_experts_of_a_draft_model_keep_their_replicas",
    "two_batches_are_levelled_one_by_one",
    "v3_router_expands_nothing_on_an_idle_rank",
    "v3_router_gives_padded_rows_no_shared_row",
    "v3_router_through_the_same_balancer",
]

pytestmark = pytest.mark.skipif(
    not FOLDERS, reason="WATERFILL_SGLANGS names no sglang: make test-versions does"
)


def overlays(folder):
    """Folders that this sglang needs before the installed packages."""
    (metadata,) = folder.glob("sglang-*.dist-info/METADATA")
    (transformers,) = re.findall(r"^Requires-Dist: transformers==(\S+)", metadata.read_text(), re.M)
    beside = folder.with_name(f"transformers-{transformers}")
    return [beside, *folder.parent.glob("tokenizers-*")] if beside.exists() else []


def probe(folder, backend):
    import waterfill_rs

    package = Path(waterfill_rs.__file__).parents[1]
    path = os.pathsep.join(map(str, [folder, *overlays(folder), package]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WATERFILL_RS")}
    environment |= {"PYTHONPATH": path, "WATERFILL_RS": backend}
    script = Path(__file__).parents[1] / "support" / "version_probe.py"
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script, report],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(report.read_text())


@functools.cache
def report_of(folder):
    """Both processes of one version: on and off."""
    report = probe(folder, "auto")
    report["checks"] |= probe(folder, "off")["checks"]
    if REPORT:
        path = Path(REPORT)
        path.parent.mkdir(parents=True, exist_ok=True)
        all_reports = json.loads(path.read_text()) if path.exists() else {}
        all_reports[report["version"]] = report["checks"]
        path.write_text(json.dumps(all_reports, indent=1))
    return report


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_that_sglang_and_all_was_checked(folder):
    report = report_of(folder)
    assert Path(report["folder"]).parent == folder.resolve()
    assert sorted(report["checks"]) == CHECKS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_contract(folder, check):
    outcome = report_of(folder)["checks"][check]
    if outcome == "none":
        pytest.skip("this version's hash router has no Waterfill")
    assert outcome in ("ok", "refused"), outcome
