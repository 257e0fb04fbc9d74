"""sglang's own scheduler process started on the CPU: with us, switched off, and as if we were not installed.

A tiny DeepSeek V3 of random weights (``--device cpu --load-format dummy``) does not get there by itself. Building the
model, 0.5.23 ends at the rotary embedding's kernel (CUDA's or vLLM's), then at DeepEP, which asks for a CUDA device; with
two ranks before that, at NCCL's communicator; with ``SGLANG_USE_CPU_ENGINE=1`` at ``sgl_kernel``, which asks for libcuda.
So the kernel and DeepEP's dispatcher are stood in for, and one rank starts whole. A first batch would end in the CPU's
attention backend, which cannot be padded.
"""

import json
import re
import tempfile

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked

START = """
import json, sys, threading
import cpu_server
scheduler = cpu_server.start(sys.argv[1], "--enable-waterfill")
model = scheduler.tp_worker.model_runner.model
routers = [m for m in model.modules() if getattr(m, "enable_waterfill", False)]
import torch
from sglang.srt.plugins.hook_registry import HookRegistry
print(json.dumps({
    "balancers": [type(router.waterfill_balancer).__module__ for router in routers],
    "expanded": [
        list(router.forward_native(torch.zeros(5, 256), torch.randn(5, 16)).topk_ids.shape) for router in routers
    ],
    "hooks": sorted(HookRegistry._hooks),
    # But those of pools, which come with the work: sglang has one or none when it is looked at.
    "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith("ThreadPoolExecutor")),
    "modules": sorted(name for name in sys.modules if name.startswith(("sglang", "torch", "triton"))),
}))
sys.stdout.flush()
import os
os._exit(0)  # The scheduler's own threads and sockets have no end but its signals.
"""


LAYERS = """
import json, sys
import cpu_server
scheduler = cpu_server.start(sys.argv[1], "--enable-waterfill")
model = scheduler.tp_worker.model_runner.model
import torch
from overlap_layers import Experts, batch
found = []
for layer in model.model.layers:
    moe = layer.mlp
    if not hasattr(moe, "topk"):
        continue
    moe.__dict__["stand_in"] = Experts(moe.experts, None)
    moe.topk.forward = moe.topk.forward_native
    choice = moe.topk.waterfill_balancer.overlap.choice
    hidden = torch.randn(6, moe.config.hidden_size).bfloat16()
    outputs = []
    for choice.forced in ("overlap", "fused"):
        outputs.append(moe(hidden, batch(6)).float())
    beside, fused = outputs
    widths = [ids.shape[1] for ids, _ in moe.stand_in.seen]
    found.append([widths, float((beside - fused).abs().max() / fused.abs().max())])
print(json.dumps(found))
sys.stdout.flush()
import os
os._exit(0)
"""


MAPS = """
import json, sys
import cpu_server
scheduler = cpu_server.start(sys.argv[1], "--enable-waterfill", *sys.argv[2:])
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
model = scheduler.tp_worker.model_runner.model
print(json.dumps({
    "map": get_global_expert_location_metadata().physical_to_logical_map.tolist(),
    "experts": [layer.mlp.experts.num_local_experts for layer in model.model.layers if hasattr(layer.mlp, "topk")],
}))
sys.stdout.flush()
import os
os._exit(0)
"""


def test_the_map_that_the_scheduler_loads_weights_by_has_primary_replicas_first(tmp_path):
    row = [7, 3, 3, *range(16), 0]
    placed = tmp_path / "placed.json"
    placed.write_text(json.dumps({"physical_to_logical_map": [row] * 3}))
    flags = ["--ep-num-redundant-experts", "4", "--init-expert-location", str(placed)]
    done = forked.run(MAPS, str(tmp_path), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["experts"] == [21, 21], "the shared expert's with them"
    for of_layer in found["map"]:
        assert sorted(of_layer) == sorted(row) and sorted(of_layer[:16]) == list(range(16))
    theirs = forked.run(MAPS, str(tmp_path), *flags, WATERFILL_RS_REPLICAS="sglang")
    assert json.loads(theirs.stdout.splitlines()[-1])["map"] == [row] * 3


def test_layers_of_the_scheduler_give_the_same_both_ways(tmp_path):
    """Layer by layer of the loaded model, not token by token: DeepEP has no form for the CPU."""
    done = forked.run(LAYERS, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [widths for widths, _ in found] == [[4, 5]] * 2
    assert all(difference < 0.01 for _, difference in found), found
    assert "shared experts: beside dispatch in decode" in done.stderr
    asked = forked.run(LAYERS, str(tmp_path), WATERFILL_RS_SHARED="fused")
    assert "shared experts: fused, as asked" in asked.stderr


def start(folder, **environment):
    """What the process then has, and its log without what differs between any two starts."""
    # A cold cache for each: where torch's compiler finds sglang's functions compiled, it loads 59 modules fewer.
    cache = tempfile.mkdtemp(dir=folder)
    done = forked.run(START, str(folder), TORCHINDUCTOR_CACHE_DIR=cache, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [re.sub(r"^\[[-\d :]+|-?[\d.]+ (GB|s)\b", "", line) for line in done.stderr.splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), log


def test_the_scheduler_starts_with_us_and_is_sglangs_without(tmp_path):
    on, told = start(tmp_path)
    assert on["balancers"] == ["waterfill_rs.sglang.balancer"] * 2
    assert on["expanded"] == [[5, 5], [5, 5]]
    (line,) = (line for line in told if "waterfill-rs" in line)
    assert "active: 2 MoE layers on cpu, exchange solo, because there is one rank" in line
    assert "shared experts: beside dispatch in decode" in line

    off, off_told = start(tmp_path, WATERFILL_RS="off")
    without, without_told = start(tmp_path, SGLANG_PLUGINS="none")
    assert off["balancers"] == ["sglang.srt.layers.moe.waterfill"] * 2
    arguments = [f"sglang.srt.server_args.ServerArgs.{name}_cli_args" for name in ("add", "from")]
    assert off.pop("hooks") == arguments and without.pop("hooks") == []
    assert off == without
    assert off_told == without_told
