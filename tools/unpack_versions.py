"""Downloads the wheels of a pinned requirements file, several versions of a package too, and unpacks each into a
folder of its own: ``FILE FOLDER``. Prints the folders of sglang, newest last, joined as in a path variable."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main(pins, folder):
    folder = Path(folder).resolve()
    sglangs = []
    for block in Path(pins).read_text().replace("\\\n", " ").splitlines():
        requirement = block.split()[0]
        target = folder / requirement.replace("==", "-")
        if not (target / "complete").exists():
            unpack(block, target)
        if requirement.startswith("sglang=="):
            sglangs.append(str(target))
    print(os.pathsep.join(sglangs))


def unpack(block, target):
    """pip takes one version of a package at a time, so each pin is a requirements file."""
    print(f"== {target.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "pin.txt").write_text(block)
        command = ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary", ":all:", "--dest", scratch]
        subprocess.run(
            [sys.executable, "-m", "pip", *command, "-r", f"{scratch}/pin.txt"], check=True
        )
        (wheel,) = Path(scratch).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(target)
    (target / "complete").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
