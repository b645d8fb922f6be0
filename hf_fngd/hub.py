"""Save a config to a folder, load it from a folder or the Hub, push it, as ``GenerationConfig`` does.

Only ``fngd_config.json`` is read and written (and a card, in a repository that has none), so a config may
live beside a model without touching the model's own ``config.json``.
"""

import abc
import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG_NAME = "fngd_config.json"
LIBRARY_NAME = "hf-fngd"
MAX_BYTES = 2**18
"""The largest config file that is read or written, in bytes. A real one has some hundred."""
MAX_PATH = 4096
"""The longest name, subfolder or revision, in characters, as on Linux."""


class HubMixin(abc.ABC):
    """Gives a config class ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    @abc.abstractmethod
    def to_json_string(self) -> str:
        """Write the config as the text of a JSON file."""

    def _file_text(self) -> str:
        text = self.to_json_string()
        if len(text.encode()) > MAX_BYTES:
            raise ValueError(
                f"{CONFIG_NAME} would be larger than {MAX_BYTES} bytes, which is the most that is read: select modules "
                "by a regular expression in place of long lists"
            )
        return text

    @classmethod
    @abc.abstractmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a config from the content of a JSON file; ``overrides`` replace what it says."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load a config from a local folder, a ``.json`` file or a repository on the Hub.

        What exists on disk wins over a repository of the same name. Without a network, or with
        ``HF_HUB_OFFLINE=1``, a repository's file comes from the local cache.

        Args:
            name_or_path: A folder that holds ``fngd_config.json``, the path of a ``.json`` file, or the id
                of a repository such as ``"user/repo"``.
            subfolder: Folder inside the folder or the repository, relative, with forward slashes.
            revision: Branch, tag or commit of the repository; None is the main branch.
            cache_dir: Folder of the Hub's cache; None is the usual one.
            token: Access token for a private repository; None or True use the stored login, False uses none.
            local_files_only: Look into the cache only, and never ask the Hub.
            force_download: Download the file again even where the cache has it.
            **overrides: Arguments that replace the file's.

        Returns:
            The config, validated.

        Raises:
            OSError: The file was not found, could not be fetched, is larger than 256 KiB or is no JSON object.
                The message says what was looked for and what to do.
            ValueError: A value in the file, an override or another argument is not acceptable.
            TypeError: A value in the file, an override or another argument has the wrong type.
        """
        name_or_path = _text("name_or_path", name_or_path)
        if not name_or_path:
            raise ValueError("name_or_path is empty: give a folder, a .json file or a repository's id")
        folder = _safe_subfolder(subfolder)
        if revision is not None:
            _check_revision(revision)
        if cache_dir is not None:
            cache_dir = _text("cache_dir", cache_dir)
        if token is not None and not isinstance(token, str | bool):
            raise TypeError(f"token must be None, True, False or a string, got a {type(token).__name__}")
        for key, flag in (("local_files_only", local_files_only), ("force_download", force_download)):
            if not isinstance(flag, bool):
                raise TypeError(f"{key} must be True or False, got a {type(flag).__name__}")
        path = Path(name_or_path)
        if path.is_file():
            if folder or path.suffix != ".json":
                raise OSError(f"{path} is a file: only a .json file is read, and without a subfolder")
            file = path
        elif path.is_dir():
            file = path / folder / CONFIG_NAME
            if not file.is_file():
                raise OSError(
                    f"there is no {CONFIG_NAME} in the folder {file.parent}: "
                    "write one with save_pretrained, or correct the path or the subfolder"
                )
        else:
            file = _fetch(
                name_or_path,
                f"{folder}/{CONFIG_NAME}" if folder else CONFIG_NAME,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        values = _read(file)
        try:
            return cls.from_dict(values, **overrides)
        except (TypeError, ValueError) as error:
            error.add_note(f"The config was read from {file}")
            raise

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Path:
        """Write ``fngd_config.json`` into a folder, whole or not at all.

        Args:
            save_directory: The folder; it is created where it does not exist.
            push_to_hub: Push the config to the Hub as well.
            **kwargs: Arguments of :meth:`push_to_hub`; ``repo_id`` is the folder's name unless given.

        Returns:
            The path of the file.

        Raises:
            NotADirectoryError: ``save_directory`` is a file.
            TypeError: There are ``kwargs``, and nothing is pushed.
            ValueError: A value is not acceptable, or the file would be too large to be read again.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"{', '.join(kwargs)}: only accepted together with push_to_hub=True")
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file: save_pretrained takes the folder to write into")
        text = self._file_text()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        # A file of its own beside the target: os.replace is atomic only within one file system.
        unfinished = folder / f".{CONFIG_NAME}.{uuid.uuid4().hex}"
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload FNGD config",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload ``fngd_config.json`` to a repository on the Hub, in one commit.

        The repository is created where it does not exist. One that has no ``README.md`` gets a short card; a
        card that is there, and every other file, is left alone.

        Args:
            repo_id: The repository, ``"user/repo"``, or ``"repo"`` in the user's own namespace.
            commit_message: Message of the commit.
            private: Whether a repository that is created here is private; None is the account's default.
            token: Access token with the right to write; None or True use the stored login.
            revision: Branch to commit to, created where it does not exist; None is the main branch.
            create_pr: Open a pull request against ``revision`` in place of a commit to it.

        Returns:
            The commit, as the Hub reports it.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The Hub refused, for want of a login for instance.
        """
        text = self._file_text()
        api = HfApi(token=token, library_name=LIBRARY_NAME)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = {CONFIG_NAME: text}
        if not api.file_exists(repo_id, "README.md", revision=revision):
            files["README.md"] = _card(type(self).__name__, repo_id, text)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content.encode()) for name, content in files.items()],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _text(key: str, value: object) -> str:
    """Return a path or a name as a string that can be one.

    Raises:
        TypeError: It is neither a string nor a path.
        ValueError: It is too long, or holds a character that neither a path nor a name may hold.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{key} must be a string or a path, got a {type(value).__name__}")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"{key} must be a string or a path of strings, not of {type(text).__name__}")
    if len(text) > MAX_PATH:
        raise ValueError(f"{key} must have at most {MAX_PATH} characters, got {len(text)}")
    if any(character < " " or "\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{key} must have no control characters and be valid Unicode, got {text[:80]!r}")
    return text


def _safe_subfolder(subfolder: str) -> str:
    """Normalize a subfolder, refusing what could leave the folder or the repository; "" is the top."""
    text = _text("subfolder", subfolder)
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or PureWindowsPath(text).drive:
        raise ValueError(f"subfolder must be a relative path with forward slashes and without '..', got {text[:80]!r}")
    return "" if path == PurePosixPath() else str(path)


def _check_revision(revision: str) -> None:
    """Refuse what git refuses in a name and what could leave the cache, where a branch is a path.

    Raises:
        TypeError: The revision is no string.
        ValueError: The revision cannot be a branch, a tag or a commit.
    """
    if not isinstance(revision, str):
        raise TypeError(f"revision must be None or a string, got a {type(revision).__name__}")
    text = _text("revision", revision)
    if not text or ".." in text or text.startswith("/") or any(character in " \\~^:?*[" for character in text):
        raise ValueError(
            f"revision must be the name of a branch or a tag, or a commit's hash, without '..', spaces or any of "
            f"\\ ~ ^ : ? * [, got {text[:80]!r}"
        )


def _fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
    force_download: bool,
) -> Path:
    """Return the cached path of a repository's file, downloading it first where that is needed and allowed.

    Raises:
        OSError: With what was looked for, and the way out.
    """
    shown = repo_id if len(repo_id) <= 200 else repo_id[:200] + "..."
    wanted = f"{filename} of {shown!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
                library_name=LIBRARY_NAME,
            )
        )
    except GatedRepoError as error:
        raise OSError(
            f"{wanted}: access to this repository must be granted first. Ask for it on "
            f"{constants.ENDPOINT}/{repo_id}, then log in with `hf auth login` or pass token"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{wanted}: there is no such local folder or .json file, and no such repository on "
            f"{constants.ENDPOINT}. Correct the name; for a private repository log in with "
            "`hf auth login` or pass token"
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{wanted}: the repository has no such branch, tag or commit. See {constants.ENDPOINT}/{repo_id}"
        ) from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, so it goes first
        raise OSError(
            f"{wanted}: there is no such local folder or .json file, the file is not in the Hub's cache "
            f"{cache_dir or constants.HF_HUB_CACHE}, and the Hub was not reached or not to be asked. "
            "Connect, leave local_files_only and HF_HUB_OFFLINE unset and try again, or give a local folder"
        ) from error
    except EntryNotFoundError as error:
        raise OSError(
            f"{wanted}: the repository has no such file. Correct subfolder or revision, "
            "or upload a config with push_to_hub"
        ) from error
    except ValueError as error:  # a name that is no repository's id, or options that exclude each other
        raise OSError(f"{wanted}: there is no such local folder or .json file, and {error}") from error
    # The transport's own errors, whose library is not the same in every version of huggingface_hub.
    except Exception as error:
        raise OSError(f"{wanted}: could not be fetched from {constants.ENDPOINT}: {error}") from error


def _read(file: Path) -> Mapping[str, Any]:
    """Read a JSON object from a file that may come from anyone.

    Raises:
        OSError: The file cannot be read, is too large, no JSON object, or has a key twice.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise OSError(f"{file} is larger than {MAX_BYTES} bytes: this is no {CONFIG_NAME}")
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{file} is not a valid JSON file: {error}") from error
    if not isinstance(values, dict):
        raise OSError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary of a JSON object; Python itself would take the last of equal keys and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} is there more than once")
    return values


def _card(class_name: str, repo_id: str, text: str) -> str:
    """Write the card of a repository that holds a config: what it is and how to use it, and no claims."""
    metadata = ModelCardData(library_name=LIBRARY_NAME, tags=["hf_fngd", "optimizer-config"]).to_yaml()
    card = ModelCard(
        f"""---
{metadata}
---

# {repo_id}

`{CONFIG_NAME}` holds settings of FNGD, the inverse-free fast natural gradient descent of
[arXiv 2403.03473](https://arxiv.org/abs/2403.03473), as implemented by the Python package `{LIBRARY_NAME}`.

```python
from hf_fngd import FNGD, {class_name}

config = {class_name}.from_pretrained("{repo_id}")
optimizer = FNGD.from_config(model, config)
```

The settings:

```json
{text.rstrip()}
```

This card was generated together with the settings. It reports no training results.
"""
    )
    return str(card)
