"""Artifacts appear whole under a fingerprint, or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hireconvert import workspace
from hireconvert.errors import InputError, UsageError
from hireconvert.workspace import Workspace, differences, open_workspace, publish, require_disk

PRINT = {"model": "abc", "recipe": {"seed": 0, "ffn": {"keep": 0.5}}, "threads": 2}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build(space: Workspace, name: str, text: str = "x") -> None:
    with space.building(name, PRINT) as folder:
        (folder / "data.txt").write_text(text)


def test_artifact_has_its_final_name_only_when_complete(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    with space.building("tokens", PRINT) as folder:
        (folder / "data.txt").write_text("x")
        assert not space.path("tokens").exists()
        assert folder.name == "tokens.partial"
    assert json.loads((tmp_path / "tokens" / "fingerprint.json").read_text()) == PRINT
    assert space.is_done("tokens", PRINT)
    assert not (tmp_path / "tokens.partial").exists()


def test_failed_artifact_is_not_done_and_its_rest_is_thrown_away(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    with pytest.raises(RuntimeError, match="boom"), space.building("tokens", PRINT) as folder:
        (folder / "stale.txt").write_text("x")
        raise RuntimeError("boom")
    assert not space.is_done("tokens", PRINT)
    assert names(tmp_path) == []
    build(space, "tokens")
    assert names(tmp_path / "tokens") == ["data.txt", "fingerprint.json"]


def test_mismatch_names_every_part_found_and_expected(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    build(space, "predictors/layer_003")
    other = {"model": "abc", "recipe": {"seed": 1, "ffn": {"keep": 0.25}}, "device": "cpu"}
    with pytest.raises(InputError) as caught:
        space.is_done("predictors/layer_003", other)
    message = str(caught.value)
    assert 'device: found "absent", expected "cpu"' in message
    assert "recipe.ffn.keep: found 0.5, expected 0.25" in message
    assert "recipe.seed: found 0, expected 1" in message
    assert 'threads: found 2, expected "absent"' in message
    assert "model" not in message.split(":\n", 1)[1]
    assert "--overwrite" in message


def test_differences_sees_types_but_not_tuple_against_list() -> None:
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert differences({"a": 1}, {"a": True}) == ["a: found 1, expected true"]
    assert differences({"a": {}}, {"a": None}) == ["a: found {}, expected null"]


def test_artifact_without_fingerprint_fails_closed(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    build(space, "tokens")
    (tmp_path / "tokens" / "fingerprint.json").write_text('{"model": ')
    with pytest.raises(InputError, match=r"no readable fingerprint\.json"):
        space.is_done("tokens", PRINT)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        Exception("No space left on device (os error 28)"),  # as the tokenizers package raises it
    ],
)
def test_full_disk_is_the_users_to_mend(tmp_path: Path, error: Exception) -> None:
    def convert(raised: Exception) -> None:
        out = tmp_path / "out"
        with open_workspace(out, resume=True, overwrite=False) as space:
            if not space.is_done("tokens", PRINT):
                build(space, "tokens")
            raise raised

    with pytest.raises(InputError, match=r"disk is full.*--resume"):
        convert(error)
    assert (tmp_path / "out.work" / "tokens").is_dir()
    with pytest.raises(PermissionError):
        convert(PermissionError(errno.EACCES, "no"))


def test_require_disk_names_needed_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000_000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)
    require_disk(tmp_path / "not" / "there", 2_000_000_000)
    with pytest.raises(InputError, match=r"3\.00 GB there, 2\.00 GB are free"):
        require_disk(tmp_path / "not" / "there", 3_000_000_000)


def test_filled_out_needs_a_flag(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open_workspace(out, resume=False, overwrite=False):
        pass
    (out / "mine.txt").write_text("x")
    with (
        pytest.raises(UsageError, match=r"not empty.*--overwrite.*--resume"),
        open_workspace(out, resume=False, overwrite=False),
    ):
        pass
    assert (out / "mine.txt").read_text() == "x"
    assert not (tmp_path / "out.work").exists()


def test_flags_and_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UsageError, match="is a file"),
        open_workspace(tmp_path / "file", resume=False, overwrite=True),
    ):
        pass
    with (
        pytest.raises(UsageError, match="contradict"),
        open_workspace(tmp_path / "out", resume=True, overwrite=True),
    ):
        pass


def test_leftover_work_needs_a_flag(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_workspace(out, resume=False, overwrite=False) as space:
        build(space, "tokens")
    with (
        pytest.raises(UsageError, match=r"unfinished.*--resume.*--overwrite"),
        open_workspace(out, resume=False, overwrite=False),
    ):
        pass
    with open_workspace(out, resume=True, overwrite=False) as space:
        assert space.is_done("tokens", PRINT)
        assert not space.replaces_out
    with open_workspace(out, resume=False, overwrite=True) as space:
        assert not space.is_done("tokens", PRINT)
        build(space, "tokens")
    with open_workspace(out, resume=True, overwrite=False) as space:
        assert space.replaces_out


def test_two_processes_do_not_share_a_work_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\n"
            "from hireconvert.workspace import open_workspace\n"
            f"with open_workspace(pathlib.Path({str(out)!r}), resume=False, overwrite=False):\n"
            "    print('held', flush=True)\n"
            "    sys.stdin.read()\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdin is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UsageError, match="another hireconvert process"),
            open_workspace(out, resume=True, overwrite=False),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with open_workspace(out, resume=True, overwrite=False):
        pass


def test_publish_replaces_by_renames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with open_workspace(out, resume=False, overwrite=True) as space:
        build(space, "export", "new")
        publish(space.path("export"), out)
        assert (out / "data.txt").read_text() == "new"
        assert not (out / "old.txt").exists()
        space.remove()
    assert names(tmp_path) == ["out"]
