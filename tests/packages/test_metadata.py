"""What a package index shows: complete, and taken by it."""

import email
import subprocess
import sys
import tarfile

import pytest
from release import DIST, VERSION, sdist


@pytest.fixture(scope="module")
def metadata():
    with tarfile.open(sdist()) as archive:
        text = archive.extractfile(f"waterfill_rs-{VERSION}/PKG-INFO").read().decode()
    return email.message_from_string(text)


def test_twine_takes_every_file():
    pytest.importorskip("twine", reason="make test-packages installs it")
    sdist()
    files = sorted(DIST.iterdir())
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == len(files), done.stdout


@pytest.mark.parametrize(
    "field", ["Author", "Keywords", "Summary", "License-Expression", "Requires-Python"]
)
def test_metadata_has(metadata, field):
    assert metadata[field]


def test_classifiers_agree_with_the_other_fields(metadata):
    classifiers = metadata.get_all("Classifier")
    assert "Operating System :: POSIX :: Linux" in classifiers
    assert "Programming Language :: Rust" in classifiers
    assert "Programming Language :: Python :: 3.10" in classifiers
    assert metadata["Requires-Python"] == ">=3.10"
    # An index refuses a licence classifier beside a licence expression.
    assert not any(classifier.startswith("License ::") for classifier in classifiers)


def test_nothing_is_required_without_an_extra(metadata):
    assert metadata.get_all("Provides-Extra") == ["plot"]
    assert [name for name in metadata.get_all("Requires-Dist") if "extra ==" not in name] == []
