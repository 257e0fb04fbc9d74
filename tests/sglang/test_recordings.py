"""Recordings that sglang's own recorder writes beside a draft model (MTP, EAGLE), read by replay's reader."""

import types
from contextlib import ExitStack

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import torch
from inside import EXPERTS, RANKS

from waterfill_rs.replay import dumps

LAYERS, TOKENS, TOP_K = 3, 12, 4
TARGET, DRAFT = (41, 42), (38, 39, 40, 41, 42)
MODES = {
    "per_token": dict(expert_distribution_recorder_mode="per_token", moe_a2a_backend="deepep"),
    "per_pass": dict(
        expert_distribution_recorder_mode="per_pass",
        moe_a2a_backend="deepep",
        deepep_mode="normal",
    ),
    "low latency": dict(
        expert_distribution_recorder_mode="per_pass",
        moe_a2a_backend="deepep",
        deepep_mode="low_latency",
    ),
}


def ids_of(rank, pass_id, layer):
    generator = torch.Generator().manual_seed(rank * 1000 + pass_id * 10 + layer)
    return torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices.int()


def counts_of(rank, pass_id, layer):
    return torch.bincount(ids_of(rank, pass_id, layer).flatten(), minlength=EXPERTS)


def batch():
    """What the recorder reads of a forward batch."""
    return types.SimpleNamespace(
        input_ids=torch.arange(TOKENS),
        positions=torch.arange(TOKENS),
        extend_seq_lens_cpu=[TOKENS],
        forward_mode=types.SimpleNamespace(value=2),
    )


def metadata():
    return types.SimpleNamespace(
        num_layers=LAYERS,
        num_logical_experts=EXPERTS,
        num_physical_experts=EXPERTS,
        num_local_physical_experts=EXPERTS // RANKS,
        physical_to_logical_map=torch.arange(EXPERTS).repeat(LAYERS, 1),
        ep_size=RANKS,
    )


def route(recorder, rank, pass_id, layer):
    """What the model's layer tells the recorder: its own routing, and what it received in low latency."""
    recorder.on_select_experts(ids_of(rank, pass_id, layer))
    if hasattr(recorder._single_pass_gatherers["primary"], "_elastic_ep_enabled"):
        local = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        received = sum(counts_of(source, pass_id, layer) for source in range(RANKS))
        recorder.on_deepep_dispatch_low_latency(received[local].int())


def record(recorder, rank):
    """Passes of the target, layer 0 dense, and of a draft, whose layers sglang keeps from the recorder."""
    recorder.start_record()
    for pass_id in DRAFT:
        draft = recorder.with_forward_pass(pass_id, batch())
        with draft, recorder.disable_this_region(), recorder.with_current_layer(0):
            recorder.on_select_experts(ids_of(rank, pass_id, 7))
        if pass_id not in TARGET:
            continue
        with recorder.with_forward_pass(pass_id, batch()):
            for layer in range(1, LAYERS):
                with recorder.with_current_layer(layer):
                    route(recorder, rank, pass_id, layer)
    recorder.dump_record()


@pytest.mark.parametrize("mode", MODES)
def test_a_recording_beside_a_draft_model_is_the_targets(sglang, monkeypatch, tmp_path, mode):
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path))
    recording = sglang.recording
    monkeypatch.setattr(recording, "get_device", lambda: "cpu")
    if hasattr(recording, "get_device_namespace"):
        on_cpu = types.SimpleNamespace(device="cpu")
        monkeypatch.setattr(recording, "get_device_namespace", lambda: on_cpu)
    if hasattr(recording, "get_schedule"):
        schedule = types.SimpleNamespace(chunked_prefill_size=TOKENS)
        monkeypatch.setattr(recording, "get_schedule", lambda: schedule)
    with ExitStack() as stack:
        stack.enter_context(sglang.moe.override(**MODES[mode]))
        for rank in range(RANKS):
            record(recording._ExpertDistributionRecorderReal(metadata(), rank), rank)
    assert len(list(tmp_path.iterdir())) == RANKS
    read = dumps.read([tmp_path], None, None if mode == "per_token" else TOP_K)
    assert (read.ranks, read.experts, read.top_k, read.mappings) == (RANKS, EXPERTS, TOP_K, None)
    assert sorted(read.passes) == list(TARGET)
    empty = RANKS * len(DRAFT)
    assert any(f"{empty} of {empty + RANKS * 2} records" in note for note in read.notes)
    for pass_id in TARGET:
        for layer in range(1, LAYERS):
            own = [counts_of(rank, pass_id, layer) for rank in range(RANKS)]
            if mode == "per_token":
                for rank, ids in enumerate(read.passes[pass_id]):
                    assert torch.equal(ids[layer, :, :TOP_K], ids_of(rank, pass_id, layer))
                    assert (ids[0] == -1).all() and (ids[layer, :, TOP_K:] == -1).all()
            elif mode == "per_pass":
                assert torch.equal(read.passes[pass_id][:, layer].long(), torch.stack(own))
            else:
                assert read.passes[pass_id][:, layer].tolist() == [sum(own).tolist()]
