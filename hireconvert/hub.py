"""Model repositories on the Hugging Face Hub: what they hold, their headers, their files."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from hireconvert.errors import HubError, InputError
from hireconvert.headers import TensorHeader, make_header

# httpx or httpx2, whichever huggingface_hub was built on; the base of every transport failure.
TransportError: type[Exception] = HfHubHTTPError.__bases__[0]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a causal LM needs beside its weights. Pickles match none of these; code only with trust.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*")
TEMPLATES = "additional_chat_templates"  # the only folder that a tokenizer reads
CODE_FILES = ("*.py",)
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors")


@dataclass(frozen=True)
class HubRepo:
    """A repository at one commit; `files` is None when the Hub cannot be asked (offline)."""

    repo_id: str
    revision: str | None
    commit: str | None
    files: tuple[str, ...] | None

    @property
    def label(self) -> str:
        """The id with the revision asked for, as messages name it."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


def locate(repo_id: str, revision: str | None) -> HubRepo:
    """The repository's commit and the files at its top; without a network only its name.

    Raises HubError when the Hub answers that it is absent, gated or has no such revision.
    """
    repo = HubRepo(repo_id, revision, None, None)
    try:
        with hub_errors(repo):
            info = HfApi().model_info(repo_id, revision=revision)
    except Unreachable:
        return repo
    names = tuple(sorted(file.rfilename for file in info.siblings or ()))
    return HubRepo(repo_id, revision, info.sha, names)


def download(repo: HubRepo, patterns: tuple[str, ...]) -> Path:
    """Folder in the Hub's cache holding the repository's files that match `patterns`.

    Raises HubError, also when the network is down and the cache does not hold them all.
    """
    wanted, ignored = list(patterns), ["*/*"]  # a pattern's * matches / too
    if repo.files is not None:
        wanted, ignored = [name for name in repo.files if _is_wanted(name, patterns)], []
    with hub_errors(repo):
        folder = Path(
            snapshot_download(
                repo.repo_id,
                revision=repo.revision,
                allow_patterns=wanted,
                ignore_patterns=ignored,
                local_files_only=repo.files is None,
            )
        )
    if repo.commit is not None and folder.name != repo.commit:
        raise HubError(
            f"{repo.label} moved from commit {repo.commit} to {folder.name} while it was being "
            "downloaded. Run the command again, or pin a commit with --revision."
        )
    return folder


def _is_wanted(name: str, patterns: tuple[str, ...]) -> bool:
    top, _, _ = name.rpartition("/")
    return top in ("", TEMPLATES) and any(fnmatchcase(name, pattern) for pattern in patterns)


def remote_headers(repo: HubRepo) -> dict[str, TensorHeader]:
    """Every tensor's header, by reading only the first bytes of each weight file."""
    with hub_errors(repo):
        found = HfApi().get_safetensors_metadata(repo.repo_id, revision=repo.commit)
    headers = {}
    for file, metadata in found.files_metadata.items():
        for name, tensor in metadata.tensors.items():
            try:
                headers[name] = make_header(
                    tensor.dtype, list(tensor.shape), list(tensor.data_offsets), file
                )
            except (ValueError, TypeError) as error:
                raise InputError(f"the header of {file} is corrupt: {error}") from error
    return headers


class Unreachable(HubError):
    """The Hub could not be asked at all; what the cache holds may still do."""


@contextmanager
def hub_errors(repo: HubRepo) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError (InputError for corrupt weights)."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo.repo_id} is gated: its authors ask for your agreement first. Accept the terms "
            f"at https://huggingface.co/{repo.repo_id}, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{repo.repo_id} has no revision {repo.revision!r}. Expected a branch, a tag or a "
            "commit that its Files page on the Hub shows."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no model {repo.repo_id!r}, or it is private, and no local folder of "
            "that name exists. Check the spelling; for a private model run `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise Unreachable(_unreachable(repo)) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo.label} lacks a file it lists: {_first_line(error)}") from error
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise InputError(f"{repo.label}: {_first_line(error)}") from error
    except HFValidationError as error:
        raise HubError(f"{repo.repo_id!r} is not a Hub id: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        raise HubError(
            f"the Hub refused to serve {repo.label}: {_first_line(error)}. Try again later."
        ) from error
    except TransportError as error:
        raise Unreachable(_unreachable(repo)) from error


def _unreachable(repo: HubRepo) -> str:
    return (
        f"the Hub cannot be reached and {repo.label} is not (completely) in the local cache; no "
        "local folder of that name exists either. Check the network (and HF_HUB_OFFLINE), or give "
        "a local folder of safetensors or a GGUF file."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
