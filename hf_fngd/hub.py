"""Save a config to a folder, load it from a folder or the Hub, push it, as ``GenerationConfig`` does.

It has a file of its own, so it may live beside a model and the model's ``config.json``.
"""

import abc
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

CONFIG_NAME = "fngd_config.json"
LIBRARY_NAME = "hf-fngd"
MAX_BYTES = 2**18
"""The largest config file that is read or written, in bytes. A real one has some hundred."""

HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
"""The arguments of `HubMixin.from_pretrained` that are no arguments of FNGD's."""

_CARD = """---
library_name: hf-fngd
tags:
- hf_fngd
- optimizer-config
---

# {repo_id}

Settings of FNGD, an optimizer for the Hugging Face Trainer in the package `hf-fngd`. This card reports no results.

```python
from hf_fngd import FNGD, {class_name}

optimizer = FNGD.from_config(model, {class_name}.from_pretrained("{repo_id}"))
```

```json
{text}
```
"""


class HubMixin(abc.ABC):
    """Gives a config class ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    @abc.abstractmethod
    def to_json_string(self) -> str:
        """Write the config as the text of a JSON file."""

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
        """Load a config from a folder that holds ``fngd_config.json``, a ``.json`` file, or a repository on the Hub.

        What exists on disk wins over a repository of the same name. ``subfolder`` is relative to the folder or the
        repository, with forward slashes; the other options are those of `huggingface_hub.hf_hub_download`.
        ``overrides`` are arguments of FNGD, and replace the file's.

        Raises:
            OSError: the file was not found, could not be fetched, is too large or is no JSON object.
            ValueError, TypeError: a value in the file, an override or the subfolder is not acceptable.
        """
        folder = PurePosixPath(subfolder)
        if folder.is_absolute() or ".." in folder.parts or "\\" in subfolder:
            raise ValueError(f"subfolder must be relative, with forward slashes and without '..', got {subfolder!r}")
        file = Path(name_or_path)
        if file.is_file():
            if subfolder or file.suffix != ".json":
                raise OSError(f"{file} is a file: only a .json file is read, and without a subfolder")
        elif file.is_dir():
            file = file / folder / CONFIG_NAME
            if not file.is_file():
                raise OSError(
                    f"there is no {CONFIG_NAME} in the folder {file.parent}: write one with save_pretrained, or "
                    "correct the path or the subfolder"
                )
        else:
            options = {"revision": revision, "cache_dir": cache_dir, "token": token, "library_name": LIBRARY_NAME}
            options |= {"local_files_only": local_files_only, "force_download": force_download}
            file = _fetch(os.fspath(name_or_path), str(folder / CONFIG_NAME), options)
        values = _read(file)
        try:
            return cls.from_dict(values, **overrides)
        except (TypeError, ValueError) as error:
            error.add_note(f"The config was read from {file}")
            raise

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Path:
        """Write ``fngd_config.json`` into a folder, whole or not at all, and return its path.

        The folder is created where it does not exist. ``kwargs`` are those of the method `push_to_hub`, for
        ``push_to_hub=True``; ``repo_id`` is the folder's name unless given.

        Raises:
            NotADirectoryError, TypeError, ValueError: ``save_directory`` is a file; nothing is pushed, and there are
                ``kwargs``; the file would be too large to be read again.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"{', '.join(kwargs)}: only accepted together with push_to_hub=True")
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file: save_pretrained takes the folder to write into")
        text = self._file_text()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        # Beside the target, as os.replace is atomic only within one file system.
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
        """Upload ``fngd_config.json`` to a repository on the Hub, in one commit, and return it.

        Repository and branch are created where they do not exist. A repository without a ``README.md`` gets a short
        card; every other file is left alone. The arguments are those of `huggingface_hub.HfApi.create_repo` and
        `huggingface_hub.HfApi.create_commit`.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refused, for want of a login for instance.
        """
        text = self._file_text()
        api = HfApi(token=token, library_name=LIBRARY_NAME)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = {CONFIG_NAME: text}
        if not api.file_exists(repo_id, "README.md", revision=revision):
            files["README.md"] = _CARD.format(repo_id=repo_id, class_name=type(self).__name__, text=text.rstrip())
        added = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
        return api.create_commit(repo_id, added, commit_message=commit_message, revision=revision, create_pr=create_pr)

    def _file_text(self) -> str:
        text = self.to_json_string()
        if len(text.encode()) > MAX_BYTES:
            raise ValueError(
                f"{CONFIG_NAME} would be larger than {MAX_BYTES} bytes, which is the most that is read: select modules "
                "by a regular expression in place of long lists"
            )
        return text


def _fetch(repo_id: str, filename: str, options: dict[str, Any]) -> Path:
    """A repository's file, in the Hub's cache."""
    revision = f" at revision {options['revision']!r}" if options["revision"] else ""
    missing = f"{filename} of {repo_id[:200]!r}{revision}: there is no such local folder or .json file"
    try:
        return Path(hf_hub_download(repo_id, filename, **options))
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{missing}, the file is not in the Hub's cache, and the Hub was not reached or not to be asked. Connect, "
            "leave local_files_only and HF_HUB_OFFLINE unset and try again, or give a local folder"
        ) from error
    except Exception as error:  # the transport's own errors are not the same in all versions of huggingface_hub
        raise OSError(f"{missing}, and the Hub says: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file that may come from anyone."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise OSError(f"{file} is larger than {MAX_BYTES} bytes: this is no {CONFIG_NAME}")
    try:
        values = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{file} is not a valid JSON file: {error}") from error
    if not isinstance(values, dict):
        raise OSError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):  # of which Python itself would take the last and say nothing
        raise ValueError("a key is there more than once")
    return dict(pairs)
