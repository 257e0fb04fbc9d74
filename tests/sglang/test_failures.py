"""A plugin that fails is never a silent one, and a plugin that is off is none at all: real processes of sglang."""

import json

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked

SERVE = """
import argparse
from sglang.srt.plugins import load_plugins
{sabotage}
load_plugins()
print("loaded")
from sglang.srt.runtime_context import get_context
get_context().override_server_args(model_path="dummy").install()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
parsed = parser.parse_args(["--model-path", "dummy", "--device", "cpu", {flags}])
ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
ServerArgs.from_cli_args(parsed)
print("parsed")
from sglang.srt.model_executor.model_runner_components import moe_ep_setup
if hasattr(moe_ep_setup, "prepare_moe_topk"):
    import torch
    router = torch.nn.Module()
    router.enable_waterfill, router.waterfill_balancer = {asked}, None
    moe_ep_setup.prepare_moe_topk(model=torch.nn.ModuleList([router]), model_config=None)
print("served")
"""

SABOTAGES = {
    "register_raises": (
        "from waterfill_rs.sglang import recorder\n"
        "def replacements(seams): raise RuntimeError('nonsense')\n"
        "recorder.replacements = replacements",
        "the plugin failed: RuntimeError('nonsense')",
    ),
    "register_panics": (
        "from waterfill_rs.sglang import recorder\n"
        "class PanicException(BaseException): pass  # as pyo3's\n"
        "def replacements(seams): raise PanicException('nonsense')\n"
        "recorder.replacements = replacements",
        "a defect in the Rust core, please report it: nonsense",
    ),
    "target_missing": (
        "from sglang.srt.model_executor.model_runner_components import moe_ep_setup\n"
        "del moe_ep_setup.prepare_moe_topk",
        "no sglang.srt.model_executor.model_runner_components.moe_ep_setup.prepare_moe_topk",
    ),
    "unknown_version_that_differs": (
        "import sglang; sglang.__version__ = '0.6.0'\n"
        "from sglang.srt.layers.moe import hash_topk\n"
        "hash_topk.HashTopK._apply_waterfill = lambda self, output, phase: output",
        "sglang 0.6.0 differs from what waterfill-rs knows (0.5.12.post1 to 0.5.23): "
        "sglang.srt.layers.moe.hash_topk.HashTopK._apply_waterfill takes ('output', 'phase')",
    ),
}


def serve(sabotage="", *flags, asked=True, after="", **environment):
    code = SERVE.format(sabotage=sabotage, flags=str(flags)[1:-1], asked=asked)
    return forked.run(code + after, **environment)


@pytest.mark.parametrize("name", SABOTAGES)
def test_what_fails_is_told_where_waterfill_is_asked_for(name):
    sabotage, reason = SABOTAGES[name]
    done = serve(sabotage, "--enable-waterfill")
    assert done.returncode == 0 and "served" in done.stdout, done.stderr[-3000:]
    assert "waterfill-rs is off, sglang's own Waterfill stays" in done.stderr
    assert reason in done.stderr


@pytest.mark.parametrize("name", SABOTAGES)
def test_what_fails_ends_the_server_where_required(name):
    sabotage, reason = SABOTAGES[name]
    done = serve(sabotage, WATERFILL_RS_REQUIRE="1")
    assert done.returncode == 1 and "loaded" not in done.stdout
    assert "waterfill-rs cannot serve:" in done.stderr and reason in done.stderr


def test_what_fails_is_not_told_where_nobody_asks():
    sabotage, _ = SABOTAGES["unknown_version_that_differs"]
    done = serve(sabotage, asked=False)
    assert done.returncode == 0 and "served" in done.stdout, done.stderr[-3000:]
    assert "waterfill-rs" not in done.stderr


def test_an_unknown_version_that_fits_is_used():
    sabotage = (
        "import sglang; sglang.__version__ = '0.6.0'\n"
        "from sglang.srt.layers.moe.waterfill import WaterfillBalancer as Balancer\n"
        "def __init__(self, num_routed_experts, world_size, rank, layer_id, routed_scaling_factor=1): pass\n"
        "def expand_topk(self, topk_output, num_tokens, *, is_decode=None): pass\n"
        "Balancer.__init__, Balancer.expand_topk = __init__, expand_topk\n"
    )
    show = (
        "\nfrom sglang.srt.layers.moe import waterfill; print(waterfill.WaterfillBalancer.__name__)"
    )
    done = serve(sabotage, asked=False, after=show, WATERFILL_RS="rust")
    assert done.stdout.split() == ["loaded", "parsed", "served", "ScalingFactorBalancer"], done.stderr[-3000:]  # fmt: skip


def test_a_filter_that_leaves_us_out_makes_our_flag_an_error():
    """Without the flag nothing shows: ``waterfill-rs doctor`` looks at SGLANG_PLUGINS."""
    done = serve("", "--waterfill-rs", "rust", SGLANG_PLUGINS="waterfill-rs")
    assert done.returncode == 2 and "unrecognized arguments: --waterfill-rs" in done.stderr


def test_a_class_hooked_twice_stops_the_server_where_waterfill_is_on():
    sabotage = (
        "from sglang.srt.plugins.hook_registry import HookRegistry, HookType\n"
        "class Other: pass\n"
        "apply = HookRegistry.apply_hooks\n"
        "def late():\n"
        "    name = 'sglang.srt.layers.moe.waterfill.WaterfillBalancer'\n"
        "    HookRegistry.register(name, Other, HookType.REPLACE); apply()\n"
        "HookRegistry.apply_hooks = late"
    )
    done = serve(sabotage)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "waterfill.WaterfillBalancer is not waterfill-rs's after registration" in done.stderr


LOOK = """
import json, sys, threading
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.moe import hash_topk, topk, waterfill
from sglang.srt.model_executor.model_runner_components import moe_ep_setup
from sglang.srt.eplb import expert_distribution
from sglang.srt.plugins.hook_registry import HookRegistry
homes = [hash_topk, topk, waterfill, moe_ep_setup, expert_distribution]
print(json.dumps({
    "modules": sorted(m for m in sys.modules if m.startswith(("sglang", "torch", "triton"))),
    "threads": sorted(t.name for t in threading.enumerate()),
    "hooks": sorted(HookRegistry._hooks),
    "names": {
        f"{home.__name__}.{name}": f"{value.__module__}.{value.__qualname__}"
        for home in homes for name, value in vars(home).items() if hasattr(value, "__qualname__")
    },
}))
"""


def look(**environment):
    done = forked.run(LOOK, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_installed_and_off_is_as_not_installed():
    without, off, on = look(SGLANG_PLUGINS="none"), look(WATERFILL_RS="off"), look()
    arguments = [f"sglang.srt.server_args.ServerArgs.{n}_cli_args" for n in ("add", "from")]
    assert off.pop("hooks") == arguments and without.pop("hooks") == []
    assert len(on.pop("hooks")) == 18
    assert off["modules"] == without["modules"]
    assert off["threads"] == without["threads"] == on["threads"]
    assert off["names"] == without["names"]
    ours = {name for name, value in on["names"].items() if value != without["names"][name]}
    assert {name.rpartition(".")[2] for name in ours} == {
        "HashTopK",
        "WaterfillBalancer",
        "_DeepepNormalSinglePassGatherer",
        "_DeepepLowLatencySinglePassGatherer",
    }
