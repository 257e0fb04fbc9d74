"""Each wheel runs where its name says: machine, glibc, shared libraries, instructions."""

import email
import os
import re
import zipfile
from pathlib import Path

import pytest
from release import ARCHITECTURES, ROOT, VERSION, output, wheel

LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "libgcc_s.so.1"}
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def library(architecture, tmp_path_factory):
    """The wheel's one shared library, unpacked."""
    with zipfile.ZipFile(wheel(architecture)) as archive:
        names = [name for name in archive.namelist() if ".so" in name]
        assert names == ["waterfill_rs/_native.abi3.so"]
        return archive.extract(names[0], tmp_path_factory.mktemp(architecture))


def test_library_is_for_the_machine_of_the_tag(architecture, library):
    machine = re.search(r"Machine: +(.+)", output("readelf", "-hW", library))[1]
    assert machine == ARCHITECTURES[architecture]


def test_no_symbol_is_newer_than_glibc_2_28(library):
    needed = re.findall(r"Name: GLIBC_([0-9.]+)", output("readelf", "-VW", library))
    versions = {tuple(map(int, version.split("."))) for version in needed}
    assert versions and max(versions) <= (2, 28), sorted(versions)


def test_library_needs_nothing_but_glibc(architecture, library):
    needed = re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-dW", library))
    assert needed and set(needed) <= LIBRARIES | {LOADERS[architecture]}, needed
    assert "RUNPATH" not in output("readelf", "-dW", library)


def test_library_names_no_folder_of_the_machine_that_built_it(library):
    code = Path(library).read_bytes()
    cargo = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    assert b"cargo/registry/src/" in code
    assert [folder for folder in (cargo, ROOT) if bytes(folder) in code] == []


def test_pages_are_as_large_as_the_kernels_of_the_machine_have_them(architecture, library):
    loads = re.findall(r"LOAD.* (0x[0-9a-f]+)$", output("readelf", "-lW", library), re.MULTILINE)
    page = {"x86_64": 0x1000, "aarch64": 0x10000}[architecture]
    assert loads and all(int(size, 16) >= page for size in loads), loads


def test_x86_64_has_no_instruction_beyond_the_baseline(architecture, library):
    if architecture != "x86_64":
        pytest.skip("x86_64 alone has registers that tell")
    code = output("objdump", "-d", "--no-show-raw-insn", library)
    assert "%xmm" in code
    beyond = re.findall(r"^.*(?:%[yz]mm|\t(?:v[a-z]\w+|popcnt|pshufb|pmulld)\s).*$", code, re.M)
    assert beyond == []


def test_wheel_has_every_python_file_of_the_package(architecture):
    files = [p for p in (ROOT / "python").rglob("*.py*") if "__pycache__" not in p.parts]
    with zipfile.ZipFile(wheel(architecture)) as archive:
        assert {str(p.relative_to(ROOT / "python")) for p in files} <= set(archive.namelist())


def test_wheel_has_the_package_its_types_and_licence_and_is_small(architecture):
    made = wheel(architecture)
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        tags = email.message_from_bytes(
            archive.read(f"waterfill_rs-{VERSION}.dist-info/WHEEL")
        ).get_all("Tag")
    assert tags == [f"cp310-abi3-manylinux_2_28_{architecture}"]
    info = f"waterfill_rs-{VERSION}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
    assert {"waterfill_rs/py.typed", "waterfill_rs/_native.pyi"} <= names
    assert {name.split("/")[0] for name in names} == {"waterfill_rs", info}
    assert made.stat().st_size < MOST_BYTES
