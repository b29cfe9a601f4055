"""From packages to text archives: files collected, chosen, and packed in the order of a hash.

    unpacked/files/PACKAGE/00 ... ff wanted files, in 256 buckets by the first byte of their key
    unpacked/chosen.txt             a line a file that is kept, in order: its part, split and name
    text/part-1-of-7.tar.xz         the kept files of the first part: val/..., train/...

A file's key is the sha256 of "package/path", and everything happens in the order of keys, so the
result depends on nothing else: neither on the order of packages nor on the number of processes.
Each of the three steps leaves nothing half-made, and is not repeated once it is made.
"""

import hashlib
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import threading
from collections import Counter
from multiprocessing import get_context, parent_process

from tqdm import tqdm

from data.source_code import copies
from data.source_code.packages import LARGEST_FILE, fetch, files_of
from data.source_code.selection import refusal, wanted
from leangpt.system.errors import UserError
from leangpt.system.whole_files import written_whole
from leangpt.text.sources import gpt2_encoding

BUCKETS = [f"{number:02x}" for number in range(256)]
FEWEST_SHINGLES = 8  # a file with fewer different ones has too little of its own
LENGTHS = struct.Struct("<II")  # of a name and of a text, before both, in a bucket


def make_archives(packages, folder, settings):
    """Write folder/text/part-*.tar.xz, or find them made -> their paths, in order."""
    unpacked, text = folder / "unpacked", folder / "text"
    identity = {
        "packages": {each.name: each.version for each in packages},
        "val_tokens": settings.val_tokens,
        "part_mb": settings.part_mb,
    }
    try:
        if json.loads((text / "made.json").read_text()) != identity:
            raise UserError(
                f"{text} was made with other settings: delete it and {unpacked} to start again"
            )
        return sorted(text.glob("part-*.tar.xz"), key=part_number)
    except FileNotFoundError:
        pass
    for package in packages:
        if not (unpacked / "files" / package.name).is_dir():
            collect(
                package,
                fetch(package, unpacked / "packages", settings.packages),
                unpacked / "files" / package.name,
            )
    chosen, counts = unpacked / "chosen.txt", unpacked / "chosen.json"
    if not counts.is_file() or json.loads(counts.read_text())["identity"] != identity:
        for old in text.glob("part-*.tar.xz"):
            old.unlink()
        choose(packages, unpacked, settings, identity)
    parts = json.loads(counts.read_text())["parts"]
    paths = [text / f"part-{number}-of-{parts}.tar.xz" for number in range(1, parts + 1)]
    missing = [path for path in paths if not path.is_file()]
    with processes(min(settings.processes, max(1, len(missing)))) as pool:
        jobs = [(path, chosen, unpacked / "files", [p.name for p in packages]) for path in missing]
        for path in tqdm(pool.imap(_pack, jobs), "packing", len(jobs), unit="part", disable=None):
            say(f"packed {path.name}: {path.stat().st_size / 1e6:.1f} MB")
    with written_whole(text / "made.json") as temporary:
        temporary.write_text(json.dumps(identity, indent=2))
    return paths


def say(text):
    """A line, above the progress bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


def processes(count, prepare=None, *arguments):
    """A pool of processes that each call prepare(*arguments) first, and end with this one."""
    return get_context("spawn").Pool(count, _start_process, (prepare, *arguments))


def _start_process(prepare, *arguments):
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def part_number(path):
    """7 of part-7-of-9.tar.xz."""
    return int(path.name.split("-")[1])


def key_of(name):
    """What files are ordered by: the sha256 of "package/path", as hex."""
    return hashlib.sha256(name.encode()).hexdigest()


# ---- collecting ---------------------------------------------------------------------------------


def collect(package, deb, folder):
    """Write every wanted file of a package into its bucket of `folder`, with a count of refusals.

    Line ends become plain newlines. The folder appears when it is complete.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    counts = Counter()
    files = {bucket: open(temporary / bucket, "wb") for bucket in BUCKETS}
    try:
        found = files_of(deb, package.archive)
        for path, read in tqdm(found, package.name, unit=" files", disable=None, leave=False):
            counts["files"] += 1
            if not wanted(path):
                continue
            content = read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            counts["named as text"] += 1
            reason = "too large" if len(content) > LARGEST_FILE else refusal(content)
            if reason:
                counts[reason] += 1
                continue
            name = f"{package.name}/{path}"
            encoded = name.encode("utf-8", "replace")
            files[key_of(name)[:2]].write(
                LENGTHS.pack(len(encoded), len(content)) + encoded + content
            )
            counts["collected"] += 1
            counts["bytes"] += len(content)
    finally:
        for file in files.values():
            file.close()
    (temporary / "counts.json").write_text(json.dumps(counts))
    os.replace(temporary, folder)
    left_out = ", ".join(
        f"{count:,} {reason}"
        for reason, count in counts.most_common()
        if reason not in ("files", "named as text", "collected", "bytes")
    )
    say(
        f"collected {package.name}: {counts['collected']:,} of {counts['files']:,} files, "
        f"{counts['bytes'] / 1e6:.0f} MB; left out: {left_out or 'none'}"
    )


def read_bucket(bucket, folder, names):
    """The files of one bucket of all packages -> [(key, name, text as bytes)], by key."""
    found = []
    for package in names:
        with open(folder / package / bucket, "rb") as file:
            while header := file.read(LENGTHS.size):
                name_length, length = LENGTHS.unpack(header)
                name = file.read(name_length).decode()
                found.append((key_of(name), name, file.read(length)))
    return sorted(found)


# ---- choosing -----------------------------------------------------------------------------------


def choose(packages, unpacked, settings, identity):
    """Decide which collected files are kept, and write unpacked/chosen.txt and chosen.json.

    In the order of keys: a file is dropped as an exact copy of an earlier one, then as a near-copy
    of what is kept. The first ones kept, `val_tokens` tokens of them, are for validation; from
    there on a file that is near one of these is dropped too.
    """
    encoding = gpt2_encoding()
    hashes, seen, validation = set(), copies.Seen(), []
    index, val_tokens, part, part_bytes = None, 0, 1, 0
    counts, sizes = Counter(), Counter()
    with written_whole(unpacked / "chosen.txt") as temporary, open(temporary, "w") as file:
        for number, bucket in enumerate(tqdm(BUCKETS, "choosing", unit="bucket", disable=None)):
            if number % 64 == 0:
                say(f"choosing among the collected files: {number} of {len(BUCKETS)} buckets done")
            for _, name, text in read_bucket(
                bucket, unpacked / "files", [p.name for p in packages]
            ):
                digest = hashlib.sha256(text).digest()[:16]
                if digest in hashes:
                    counts["exact copies"] += 1
                    continue
                hashes.add(digest)
                shingles = copies.shingles(text)
                if len(shingles) < FEWEST_SHINGLES:
                    counts["too few lines of their own"] += 1
                elif seen.share(shingles) >= copies.SEEN_SHARE:
                    counts["near-copies"] += 1
                elif index is not None and index.near(shingles):
                    counts["near a validation file"] += 1
                else:
                    seen.add(shingles)
                    split = "train" if val_tokens >= settings.val_tokens else "val"
                    if split == "val":
                        val_tokens += len(encoding.encode_ordinary(text.decode())) + 1
                        validation.append(shingles)
                        if val_tokens >= settings.val_tokens:
                            index = copies.Validation(validation)
                    if part_bytes > settings.part_mb * 1e6:
                        part, part_bytes = part + 1, 0
                    part_bytes += len(text)
                    file.write(f"{part}\t{split}\t{name}\n")
                    counts[split] += 1
                    sizes[split] += len(text)
    if index is None or not counts["train"]:
        raise UserError(
            f"the packages hold {val_tokens:,} tokens of validation text and "
            f"{counts['train']} files for training: too few for "
            f"val_tokens={settings.val_tokens}"
        )
    with written_whole(unpacked / "chosen.json") as temporary:
        temporary.write_text(
            json.dumps(
                {"identity": identity, "files": counts, "bytes": sizes, "parts": part}, indent=2
            )
        )
    say(
        "chosen: "
        + ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        + f"; {sizes['val'] / 1e6:.0f} MB of validation and {sizes['train'] / 1e6:.0f} MB of "
        f"training text in {part} parts"
    )


# ---- packing ------------------------------------------------------------------------------------


def _pack(job):
    return pack(*job)


def pack(path, chosen, folder, names):
    """Write one part: the files that chosen.txt gives its number -> its path.

    Inside, they lie by name and not by key, so that related ones are neighbours: a tenth smaller.
    """
    number, splits = str(part_number(path)), {}
    with open(chosen) as file:
        for line in file:
            part, split, name = line.rstrip("\n").split("\t")
            if part == number:
                splits[name] = split
    buckets = sorted({key_of(name)[:2] for name in splits})
    files = [
        (name, text)
        for bucket in buckets
        for _, name, text in read_bucket(bucket, folder, names)
        if name in splits
    ]
    with written_whole(path) as temporary, tarfile.open(temporary, "w:xz", preset=3) as tar:
        for name, text in sorted(files):
            member = tarfile.TarInfo(f"{splits[name]}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


def read_part(path):
    """A part's files in the order of their keys, validation first: [(split, text), ...]. Raises
    UserError for a broken archive."""
    files = []
    try:
        with tarfile.open(path, "r|xz") as tar:
            for member in tar:
                split, _, name = member.name.partition("/")
                files.append((key_of(name), split, tar.extractfile(member).read().decode()))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): make it again") from error
    return [(split, text) for _, split, text in sorted(files)]
