"""sglang's benchmark of one batch loads no plugins; run by us it does, in the processes that it spawns too."""

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test installs it")

import forked

BALANCER = "from sglang.srt.layers.moe import waterfill; print(waterfill.WaterfillBalancer.__module__, flush=True)"
AS_SGLANG_HAS_IT = f"import sglang.benchmark.one_batch\n{BALANCER}"
BENCHMARK = f"""
import argparse, multiprocessing, os, sys
def rank():
    {BALANCER}
def cli_main():
    from sglang.srt.server_args import ServerArgs
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args()
    ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
    ServerArgs.from_cli_args(parsed)
    rank()
    process = multiprocessing.get_context("spawn").Process(target=rank)
    process.start(); process.join()
    print(os.environ["WATERFILL_RS_TIMEOUT_US"], process.exitcode)
"""
RUN = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("waterfill_rs.sglang.with_plugins", run_name="__main__", alter_sys=True)
"""


OLDER = BENCHMARK.replace("def cli_main():", "if __name__ == '__main__':")
"""As sglang's before 0.5.15."""


def run(folder, *arguments, **environment):
    (folder / "a_benchmark.py").write_text(BENCHMARK)
    (folder / "an_older_benchmark.py").write_text(OLDER)
    (folder / "no_benchmark.py").write_text("")
    (folder / "lacks_a_package.py").write_text("import no_such_package")
    path = {"PYTHONPATH": f"{folder}:{forked.os.environ.get('PYTHONPATH', '')}"}
    return forked.run(RUN, str(folder), *arguments, **path, **environment)


def test_sglangs_own_way_has_no_plugin_even_where_required():
    """If this fails, sglang has a hook there: use it, and tell in docs/operators.md."""
    done = forked.run(AS_SGLANG_HAS_IT, WATERFILL_RS_REQUIRE="1")
    assert done.stdout.split() == ["sglang.srt.layers.moe.waterfill"], done.stderr[-2000:]


@pytest.mark.parametrize("module", ["a_benchmark", "an_older_benchmark"])
def test_run_by_us_every_process_has_ours_and_flags_are_known(module, tmp_path):
    flags = ["--model-path", "dummy", "--device", "cpu", "--waterfill-rs-timeout-us", "77"]
    done = run(tmp_path, module, *flags)
    ours = "waterfill_rs.sglang.balancer"
    assert done.stdout.split() == [ours, ours, "77", "0"], done.stderr[-3000:]


@pytest.mark.parametrize(
    "arguments, environment, text",
    [
        (["no_benchmark"], {}, "no_benchmark runs nothing"),
        (["sglang.bench_one_batch"], {}, "sglang.benchmark.one_batch is there from 0.5.15 on"),
        (["lacks_a_package"], {}, "No module named 'no_such_package'"),
        (["a_benchmark"], {"SGLANG_PLUGINS": ","}, "sglang did not load waterfill-rs"),
        ([], {}, "give a module"),
    ],
)
def test_what_cannot_be_run_so_is_told(tmp_path, arguments, environment, text):
    done = run(tmp_path, *arguments, **environment)
    assert done.returncode == 1 and text in done.stderr and not done.stdout
