"""The folder a conversion works in: artifacts appear whole, under a fingerprint, or not at all.

OUT.work/                     beside OUT, on the same file system, so that renames are atomic
  lock                        held (flock) while a process works here; the kernel frees it on kill
  discards                    while --overwrite throws away what an earlier run left
  replaces_out                this conversion was started with --overwrite
  NAME.partial/               an artifact being written; thrown away by the next run
  NAME/  ...  fingerprint.json   a finished artifact and the named parts it was made from
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hireconvert.errors import InputError, UsageError

try:
    import fcntl
except ImportError:  # Windows: two conversions of one OUT are then not kept apart
    fcntl = None  # type: ignore[assignment]

FINGERPRINT = "fingerprint.json"
LOCK = "lock"
REPLACES_OUT = "replaces_out"
DISCARDS = "discards"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Fingerprint = Mapping[str, Any]


def work_folder(out: Path) -> Path:
    """OUT.work, beside OUT."""
    return out.with_name(out.name + ".work")


def flatten(parts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}: the form in which fingerprints are compared and named."""
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(found: Fingerprint, expected: Fingerprint) -> list[str]:
    """One line per named part that differs, empty when the two fingerprints agree."""
    # Through JSON, so that a tuple and the list it was saved as are one value.
    found_flat = flatten(json.loads(json.dumps(found)))
    expected_flat = flatten(json.loads(json.dumps(expected)))
    lines = []
    for key in sorted(found_flat.keys() | expected_flat.keys()):
        was, now = (json.dumps(side.get(key, "absent")) for side in (found_flat, expected_flat))
        if was != now:
            lines.append(f"{key}: found {was}, expected {now}")
    return lines


def fsync_path(path: Path) -> None:
    """Make one file or directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Make every file below `folder`, and every directory that names one, durable."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            fsync_path(path)
    fsync_path(folder)


def file_sha256(path: Path) -> str:
    """The SHA-256 of one file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def rename_durably(source: Path, target: Path) -> None:
    """Rename and make both directories' entries survive a power cut."""
    source.rename(target)
    fsync_path(target.parent)
    if source.parent != target.parent:
        fsync_path(source.parent)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, keys in the order given, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_atomically(path: Path, content: bytes) -> None:
    """Write one file so that it appears whole or not at all; an older one is replaced."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        fsync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def full_disk_is_input_error(where: Path) -> Iterator[None]:
    """Turn a write that finds no room, in space, quota or file size, into an InputError."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers wrap the OSError of a failed write in types of their own.
        wrapped = re.search(r"\(os error (\d+)\)", str(error))
        number = int(wrapped[1]) if wrapped else getattr(error, "errno", None)
        if number not in NO_ROOM:
            raise
        raise InputError(
            f"the disk is full: a file below {where} could not be written "
            f"({os.strerror(number)}). Free some space, then run the same command with --resume; "
            "finished stages are kept."
        ) from error


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raise InputError when the disk that will hold `folder` has less than `needed_bytes` free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"not enough disk space at {existing}: the conversion needs about "
            f"{needed_bytes / 1e9:.2f} GB there, {free / 1e9:.2f} GB are free. Free some space or "
            "choose another OUT."
        )


class Workspace:
    """The artifacts below one folder. Use `open_workspace` for a locked one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Where the finished artifact `name` lies ("predictors/layer_003" is a name too)."""
        return self.root / name

    def is_done(self, name: str, fingerprint: Fingerprint) -> bool:
        """Whether `name` is finished and was made from exactly these parts.

        Raises InputError naming every part that differs when it was made from others.
        """
        folder = self.path(name)
        if not folder.is_dir():
            return False
        try:
            found = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder} has no readable {FINGERPRINT} ({error}), so it cannot be resumed. Run "
                "again with --overwrite to start afresh."
            ) from error
        lines = differences(found, fingerprint)
        if lines:
            raise InputError(
                f"cannot resume: `{name}` in {self.root} was made from something else:\n  "
                + "\n  ".join(lines)
                + "\nRun with what was found, or with --overwrite to start afresh."
            )
        return True

    def note_replacement(self) -> None:
        """Remember, for a later --resume, that OUT was to be replaced."""
        (self.root / REPLACES_OUT).touch()

    @property
    def replaces_out(self) -> bool:
        """Whether the conversion in progress here was started with --overwrite."""
        return (self.root / REPLACES_OUT).exists()

    @contextmanager
    def building(self, name: str, fingerprint: Fingerprint) -> Iterator[Path]:
        """Give an empty folder to write `name` into; it becomes `name` unless an error leaves."""
        final = self.path(name)
        partial = final.with_name(final.name + ".partial")
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            write_json(partial / FINGERPRINT, fingerprint)
            fsync_tree(partial)
            rename_durably(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def discard(self, name: str) -> None:
        """Remove `name`, finished or not, if it is there."""
        path = self.path(name)
        doomed = path.with_name(path.name + ".partial")
        shutil.rmtree(doomed, ignore_errors=True)
        if path.exists():
            # Under its final name a folder is whole or absent, also while it is removed.
            path.rename(doomed)
            shutil.rmtree(doomed)

    def clear(self) -> None:
        """Remove every artifact, finished or not, but keep the lock."""
        for path in sorted(self.root.iterdir()):
            if path.name in (LOCK, DISCARDS):
                continue
            if path.is_dir() and not path.is_symlink():
                self.discard(path.name.removesuffix(".partial"))
            else:
                path.unlink(missing_ok=True)  # it went with the artifact of its name

    def remove(self) -> None:
        """Remove the whole work folder, lock last."""
        self.clear()
        (self.root / LOCK).unlink(missing_ok=True)
        self.root.rmdir()


def check_out_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError unless OUT may be written under the given flags."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: give one of them.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"OUT {out} is a file; name a folder that does not exist yet.")
    if resume or overwrite:
        return
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"OUT {out} is not empty. Name another folder, give --overwrite to replace it (at the "
            "very end, once the new one is complete), or --resume to continue."
        )
    work = work_folder(out)
    if work.is_dir() and any(path.name != LOCK for path in work.iterdir()):
        raise UsageError(
            f"an unfinished conversion lies in {work}. Give --resume to continue it or --overwrite "
            "to throw it away."
        )


@contextmanager
def open_workspace(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Workspace]:
    """Give the locked work folder of OUT, emptied under `overwrite`.

    Raises UsageError when the flags forbid it or another process works there.
    """
    check_out_folder(out, resume=resume, overwrite=overwrite)
    work = work_folder(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / LOCK).open("a+")
    except OSError as error:
        raise InputError(
            f"cannot write beside OUT, in {work.parent}: {error.strerror}. Choose an OUT in a "
            "folder you may write to."
        ) from error
    with lock:
        _take_lock(lock.fileno(), work)
        workspace = Workspace(work)
        if overwrite:
            (work / DISCARDS).touch()
        if (work / DISCARDS).exists():  # now, or by a run that was killed while clearing
            workspace.clear()
            workspace.note_replacement()
            (work / DISCARDS).unlink()
        try:
            with full_disk_is_input_error(work):
                yield workspace
        finally:
            # A run that got nowhere leaves nothing for the next one to ask about.
            if work.is_dir() and {path.name for path in work.iterdir()} <= {LOCK, REPLACES_OUT}:
                workspace.remove()


def _take_lock(handle: int, work: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another hireconvert process is working in {work}. Wait for it, stop it, or choose "
            "another OUT."
        ) from error


def publish(finished: Path, out: Path) -> None:
    """Make the complete folder `finished` appear as `out`, replacing an older `out` by renames.

    The older one is moved aside first and deleted last, so at no time is `out` half-written.
    """
    fsync_tree(finished)
    aside = work_folder(out) / "replaced"
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        rename_durably(out, aside)
    rename_durably(finished, out)
    shutil.rmtree(aside, ignore_errors=True)
