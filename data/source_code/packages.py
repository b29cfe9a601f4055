"""The Debian packages (version 12, bookworm) whose source text is used: pins, fetching, reading.

Every package is `Architecture: all`, pinned by version and sha256. linux-doc-6.1 is not among
them: its pages are rendered from files that linux-source-6.1 has.
"""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from leangpt.system.errors import UserError
from leangpt.system.whole_files import written_whole


@dataclass(frozen=True)
class Package:
    """A Debian package: its name, version, the sha256 of its .deb file, and where its source is.

    archive: how the path of the one archive in it ends that is read; "": its files are plain.
    """

    name: str
    version: str
    sha256: str
    archive: str = ""

    @property
    def file_name(self):
        """As apt names it: the colon of an epoch is written %3a."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


PACKAGES = (
    Package("linux-source-6.1", "6.1.176-1",
            "9305d1a151b8e83dcb88aa11361e7b9513f0c252bdf7f5647e4542762d99c094",
            "linux-source-6.1.tar.xz"),
    Package("gcc-12-source", "12.2.0-14+deb12u1",
            "8f2a5411028dfe216aeb6346b926df0cc7471f375c6a375bf180fbf279af02a1",
            "gcc-12.2.0-dfsg.tar.xz"),
    Package("openjdk-17-source", "17.0.19+10-1~deb12u2",
            "2591b37131025f872f057be99467b45f7fa2aed928c8d779208db9c3239e1190",
            "lib/src.zip"),
    Package("golang-1.19-src", "1.19.8-2",
            "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a"),
    Package("rust-src", "1.63.0+dfsg1-2",
            "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25"),
    Package("fpc-source-3.2.2", "3.2.2+dfsg-20",
            "db7cddd08cd891678dc8273a0b0fe3c88a50b15bb16e940d107aa886a5184a12"),
    Package("emacs-el", "1:28.2+1-15+deb12u4",
            "d07939c0e5b9f150211f5bcf85fb37f812a3710f1ec1e74a6237d12e3bade559"),
    Package("erlang-src", "1:25.2.3+dfsg-1+deb12u4",
            "52fc8fbd533e0d094514ba54ff7b7a3244b2cf02a4905cf36dfeccb346d3479b"),
    Package("binutils-source", "2.40-2",
            "4c03b0d0508f8134200ec083e4dbb81b906efbfa0d7a2bdb7aa0c120aabda246",
            "binutils-2.40.tar.xz"),
    Package("gdb-source", "13.1-3",
            "337bff2adcf544f59c01d1f4119aa1b15074d4470b298ddfadfc92972bddc4cb",
            "gdb.tar.xz"),
    Package("glibc-source", "2.36-9+deb12u14",
            "8e9f57b1df23396b05cf5b1561fd83bd53dc01b86432fd2dc75ab7b48645c3b2",
            "glibc-2.36.tar.xz"),
    Package("sbcl-source", "2:2.2.9-1",
            "908656efc0892047dba4f32bddd38388cd4f590c2e149c90f757afc97388cd38"),
    Package("openjfx-source", "11.0.11+1-3",
            "a8de0bec39f5fd7825d513893cd13876c1e8e4733b998fa9d0de0671afcc66b4",
            "src.zip"),
)  # fmt: skip
LARGEST_FILE = 1 << 20  # bytes; a larger one is a table, whatever its name says


# ---- getting the .deb files ---------------------------------------------------------------------


def fetch(package, cache, folder=None):
    """The path of a package's .deb: from `folder` if given, else from the cache or through apt.

    Raises UserError where it cannot be had, or is another file than the one that is pinned.
    """
    if folder is not None:
        path = Path(folder) / package.file_name
        if not path.is_file():
            raise UserError(f"--packages={folder} has no {package.file_name}")
        if _sha256(path) != package.sha256:
            raise UserError(
                f"{path} is not the file that is pinned: its sha256 is not {package.sha256}"
            )
        return path
    path = Path(cache) / package.file_name
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"{package.name}={package.version}"
        try:
            done = subprocess.run(
                ["apt-get", "download", "--quiet", wanted],
                cwd=temporary,
                capture_output=True,
                text=True,
            )
            problem = (done.stderr.strip().splitlines() or ["apt-get said nothing"])[-1]
        except OSError as error:
            problem = f"apt-get: {error.strerror}"
        found = Path(temporary) / package.file_name
        if not found.is_file():
            raise UserError(
                f"{wanted} cannot be had through apt ({problem}); a later update may "
                "have replaced it: fetch the pinned files from Debian's snapshot "
                f"archive ({package.file_name}, ...) and give --packages=FOLDER"
            )
        if _sha256(found) != package.sha256:
            raise UserError(f"{wanted} from apt is not the file that is pinned: its sha256 differs")
        with written_whole(path) as whole:
            shutil.copyfile(found, whole)
    return path


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading them -------------------------------------------------------------------------------


def files_of(deb, archive=""):
    """Yield (path, read) for every regular file of a .deb of at most LARGEST_FILE bytes.

    archive: Package.archive. path: the file's place in the package or, where `archive` names one,
    in that. read(): its bytes, once, before the next file is asked for. Nothing is unpacked on the
    disk but a zip archive, and no archive is ever whole in memory. Raises UserError for a file
    that is not a package, or lacks the archive.
    """
    try:
        with open(deb, "rb") as file:
            data, length = _data_member(file)
            with tarfile.open(fileobj=_Slice(data, length), mode="r|*") as tar:
                yield from _walk_one_of(tar, archive) if archive else _walk(tar)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{deb} is not a Debian package that can be read: {error}") from error


def _data_member(file):
    """An open .deb, which is an `ar` archive -> (file standing at its data.tar, bytes of that)."""
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError("no ar archive")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return file, size
        file.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError("it has no data.tar")


class _Slice(io.RawIOBase):
    """The next `length` bytes of an open file, as a file."""

    def __init__(self, file, length):
        self.file, self.left = file, length

    def read(self, count=-1):
        content = self.file.read(self.left if count < 0 else min(count, self.left))
        self.left -= len(content)
        return content


def _walk_one_of(tar, archive):
    for member in tar:
        if member.isfile() and member.name.endswith(archive):
            if archive.endswith(".zip"):
                yield from _walk_zip(tar.extractfile(member))
            else:
                with tarfile.open(fileobj=tar.extractfile(member), mode="r|*") as inner:
                    yield from _walk(inner)
            return
    raise tarfile.ReadError(f"it has no {archive}")


def _walk(tar):
    for member in tar:
        path = member.name.removeprefix("./")
        if not member.isfile() or member.size > LARGEST_FILE:
            continue
        if path.endswith(".gz"):
            yield path[:-3], lambda: _gunzip(tar.extractfile(member).read())  # noqa: B023
        else:
            yield path, lambda: tar.extractfile(member).read()  # noqa: B023


def _walk_zip(stream):
    with contextlib.ExitStack() as stack:  # a zip file is read from its end: it must be a file
        spooled = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(stream, spooled, 1 << 20)
        archive = stack.enter_context(zipfile.ZipFile(spooled))
        for item in archive.infolist():
            if not item.is_dir() and item.file_size <= LARGEST_FILE:
                yield item.filename, lambda: archive.read(item)  # noqa: B023


def _gunzip(content):
    """The bytes of a .gz file, cut one byte past LARGEST_FILE, where it is refused as too large."""
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        return file.read(LARGEST_FILE + 1)
