"""sglang's own scheduler actor, made by a real Ray on the CPU: as ``--use-ray`` makes it, but for its GPU.

``test_flags.py`` has what needs no Ray.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")
pytest.importorskip("ray", reason="Ray is not installed: uv pip install ray, where it may be")

import forked

SERVER = """
import json, sys
from pathlib import Path
import ray
# Before the flags are parsed: no actor inherits what they set.
ray.init(address="local", num_cpus=1, include_dashboard=False)
import cpu_server
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import PortArgs, prepare_server_args
folder, *flags = sys.argv[1:]
Path(folder, "config.json").write_text(json.dumps(cpu_server.CONFIG))
arguments = prepare_server_args(["--model-path", folder, *cpu_server.FLAGS, *flags])
from sglang.srt.ray.scheduler_actor import SchedulerActor

class Ports:  # Given to an actor, they bring what there is no GPU for.
    def __init__(self, prepare):
        self.prepare, self.ports = prepare, PortArgs.init_new(arguments)
    def __reduce__(self):
        return lambda prepare, ports: prepare() or ports, (self.prepare, self.ports)

def stand_in():
    import cpu_server
    cpu_server._stand_in()

def another_balancer():
    from sglang.srt.layers.moe import waterfill
    waterfill.WaterfillBalancer = type("Other", (), {"expand_topk": lambda self, output: output})

def what_it_has(actor):
    import inside
    model = actor.scheduler.tp_worker.model_runner.model
    routers = [m for m in model.modules() if getattr(m, "enable_waterfill", False)]
    balancers = [type(router.waterfill_balancer).__module__ for router in routers]
    return inside.what_it_has(actor.scheduler.server_args) | {"balancers": balancers}

ranks = dict(gpu_id=0, tp_rank=0, pp_rank=0, dp_rank=0)
make = SchedulerActor.options(num_cpus=0).remote
actor = make(server_args=arguments, port_args=Ports(stand_in), **ranks)
told = {"has": ray.get(actor.__ray_call__.remote(what_it_has))}
actor = make(port_args=Ports(another_balancer), server_args=arguments, **ranks)
try:
    ray.get(actor.get_info.remote())
except ray.exceptions.RayActorError as error:  # sglang ends the server with it.
    told["error"] = str(error)
ray.shutdown()
print(json.dumps(told))
"""


def test_an_actor_serves_with_us_or_ends_with_the_reasons(tmp_path):
    flags = ["--use-ray", "--enable-waterfill", "--waterfill-rs", "rust"]
    flags += ["--waterfill-rs-timeout-us", "77"]
    path = os.pathsep.join(
        [str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    )
    done = forked.run(SERVER, str(tmp_path), *flags, RAY_AUTH_MODE="disabled", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["has"] == {
        "model": str(tmp_path),
        "balancer": "waterfill_rs.sglang.balancer",
        "balancers": ["waterfill_rs.sglang.balancer"] * 2,
        "variables": {"WATERFILL_RS": "rust", "WATERFILL_RS_TIMEOUT_US": "77"},
    }
    assert "WaterfillBalancer.expand_topk takes ('output',)" in told["error"]
