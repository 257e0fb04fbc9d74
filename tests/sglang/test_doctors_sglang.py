"""What the doctor says of sglang, beside the real one."""

import json

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked
from test_doctor import OURS, check, fake_distribution

from waterfill_rs.operate import checks, doctor

AS_SGLANG_READS_IT = """
import json, os, sys
from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins_by_group
loads = []
for value in json.loads(sys.argv[1]):
    os.environ["SGLANG_PLUGINS"] = value
    loads.append("waterfill_rs" in load_plugins_by_group(GENERAL_PLUGINS_GROUP))
print(json.dumps(loads))
"""


def test_sglang_loads_us_exactly_where_the_doctor_says_so():
    values = ["", " ", ",", " , ", "\n", "waterfill_rs", " waterfill_rs ,", "other,waterfill_rs"]
    values += ["waterfill-rs", "WATERFILL_RS", "'waterfill_rs'", "waterfill_rs;other", "none"]
    done = forked.run(AS_SGLANG_READS_IT, json.dumps(values))
    assert done.returncode == 0, done.stderr[-2000:]
    told = [checks.plugin([OURS], [], {"SGLANG_PLUGINS": value}).severity for value in values]
    assert json.loads(done.stdout.splitlines()[-1]) == [level != "fail" for level in told]


OTHER_PLUGIN = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry
    HookRegistry.apply_hooks = classmethod(lambda cls: None)
    layer = "sglang.srt.models.deepseek_v2.DeepseekV2MoE.forward"
    HookRegistry.register(layer, lambda forward, *args, **kwargs: forward(*args, **kwargs))
"""


def test_the_real_hooks_in_place_and_not(tmp_path):
    fake_distribution(tmp_path, "other-plugin", "1.0", "other = other_plugin:register")
    (tmp_path / "other_plugin.py").write_text(OTHER_PLUGIN)
    look = "import runpy; runpy.run_module('waterfill_rs.sglang.loaded_hooks', run_name='__main__')"
    beside = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"

    def loaded(code, **variables):
        done = forked.run(code, SGLANG_PLUGINS="", **variables)
        return done.returncode, done.stdout, done.stderr

    ours, other = loaded(look), loaded(beside + look)
    check(doctor.hooks(lambda: ours, enabled=True), "ok", "in place")
    check(doctor.hooks(lambda: other, enabled=True), "fail", "WaterfillBalancer")
    check(doctor.overlap(lambda: ours), "ok", "beside dispatch")
    check(doctor.overlap(lambda: other), "warn", "another plugin hooks", "DeepseekV2MoE.forward")
    wrong = loaded(look, WATERFILL_RS="none")
    check(doctor.hooks(lambda: wrong, enabled=True), "fail", "WATERFILL_RS='none'")
