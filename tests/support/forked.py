"""Runs code in processes that have loaded what sglang builds on, and nothing of sglang or of ours.

sglang takes 20 to 40 s to import, nearly all of it for torch and other packages. One process of Python's own
``forkserver`` imports those once, and is forked for each run: there sglang is imported anew, in the order in which
the code asks for it, in a second or two.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

# Only for speed: a name that is not there is passed over.
BENEATH_SGLANG = [
    "torch",
    "torch._dynamo",
    "torch._inductor.lowering",
    "torch._inductor.codegen.cpp",
    "torch._inductor.codegen.triton",
    "torch._inductor.kernel.flex.flex_attention",
    "torch.distributed",
    "torch.utils.cpp_extension",
    "triton",
    "triton_kernels",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.processing_utils",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "flashinfer",
    "compressed_tensors",
    "networkx",
    "scipy.special",
    "IPython",
    "aiohttp",
    "fastapi",
    "uvicorn",
    "gguf",
    "mistral_common",
    "pydantic_extra_types",
    "zmq",
    "jsonschema",
    "msgspec",
    "soundfile",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(BENEATH_SGLANG)


def run(code, *arguments, timeout_s=300, **environment):
    """As ``subprocess.run`` of ``python -c CODE ARGUMENTS``, its output captured as text.

    ``environment``: over this process's, whose WATERFILL* variables are left out.
    """
    everything = {k: v for k, v in os.environ.items() if not k.startswith("WATERFILL")}
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = _context.Process(
            target=_execute, args=(code, arguments, everything | environment, outputs)
        )
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, timeout_s, *(o.read_text() for o in outputs))
        told = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess([code, *arguments], process.exitcode, *told)


def _execute(code, arguments, environment, outputs):
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)
