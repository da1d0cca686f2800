"""Where the files of a checkpoint come from: a folder, or a repository of the Hugging Face Hub.

For a repository, one commit is looked up first, and all files are taken from this commit. huggingface_hub downloads
only the requested files, into its cache. If the hub cannot be reached, only the cache is used.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

from xglm_core.errors import BackendError, CheckpointError, InputError

# Repeated from huggingface_hub: what counts as a folder must not depend on whether it is installed.
_REPO_ID = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))(\w[\w.-]*/)?\w([\w.-]*\w)?(?<!\.git)", re.ASCII)

_REFUSALS = (401, 403, 404)  # These answers are final. After any other error, the cache is tried.

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # A full disk, or quota; Windows has no quotas.


class HubOptions(TypedDict, total=False):
    """The keyword arguments `**hub` of all functions that load by name. For folders, only `subfolder` has an effect.

    Attributes:
        subfolder: the folder of the files within the folder or repository; None or "" means the top.
        revision: a branch, tag or commit of the repository; None means "main".
        cache_dir: the folder for downloads; None means the cache of huggingface_hub, which `HF_HOME` moves.
        token: a token for private and gated repositories; None means the one of `hf auth login`, False means none.
        local_files_only: use only the cache, without a connection; `HF_HUB_OFFLINE=1` does the same.
        force_download: download files even if the cache has them.
    """

    subfolder: str | None
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool


class Source(Protocol):
    """The files of a checkpoint, in a folder or a repository."""

    @property
    def place(self) -> str:
        """The name in messages."""

    @property
    def names(self) -> frozenset[str]:
        """The names of all files."""

    @property
    def folder(self) -> Path | None:
        """The folder of the fetched files; None before the first."""

    def fetch(self, required: Sequence[str], optional: Iterable[str] = ()) -> Path:
        """Fetches files; returns the folder that they are in.

        Args:
            required: the files that are needed, at least one. In a local folder, their readers notice missing ones.
            optional: files to fetch if they exist.

        Raises:
            CheckpointError: a repository lacks a required file, or the download failed.
        """


def find_source(
    name: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Source:
    """The files of a folder or of a repository.

    A name that exists on disk is never looked up on the hub. Neither is a name that cannot be the id of a repository:
    "./name", "/name", "~", more than two parts between slashes, or any `Path`.

    Args:
        name: a folder, or the id of a repository, e.g. "facebook/xglm-564M".
        subfolder, revision, cache_dir, token, local_files_only, force_download: see `HubOptions`.

    Raises:
        CheckpointError: there is neither a folder nor a repository of this name; or neither the hub nor the cache has
            the revision.
        BackendError: huggingface_hub is needed but not installed.
        InputError: `force_download` and `local_files_only` are both set.
    """
    if os.path.isdir(name):
        folder = Path(name, subfolder or "")
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder, which `subfolder` names within {name}")
        return _Folder(folder)
    if os.path.isfile(name):
        raise CheckpointError(
            f"{name}: is a file, expected the folder that it is in, with config.json; give {Path(name).parent}"
        )
    if not isinstance(name, str) or not _REPO_ID.fullmatch(name) or os.path.exists(name):
        raise CheckpointError(
            f"{name}: no such folder; expected a checkpoint folder with config.json and model.safetensors, or the name "
            "of a repository on the Hugging Face Hub, such as facebook/xglm-564M"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BackendError(
            f"{name}: no such folder here; if it is a repository on the Hugging Face Hub, huggingface_hub is needed to "
            "load it, not installed here; run: pip install 'xglm[hub]'"
        )
    if force_download and local_files_only:
        raise InputError("force_download and local_files_only are both True, but nothing is downloaded with the latter")
    within = (subfolder or "").strip("/")
    return _Repository(
        name, f"{within}/" if within else "", revision or "main", cache_dir, token, local_files_only, force_download
    )


class _Folder:
    """The files of a folder; see `Source`."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self.folder = folder

    @property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.folder.iterdir())

    def fetch(self, required: Sequence[str], optional: Iterable[str] = ()) -> Path:
        return self.folder


class _Repository:
    """The files of one commit of a repository; see `Source` and `HubOptions`."""

    def __init__(
        self,
        repo: str,
        prefix: str,
        revision: str,
        cache_dir: str | os.PathLike[str] | None,
        token: str | bool | None,
        local_files_only: bool,
        force_download: bool,
    ) -> None:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT

        self.place = repo
        self._prefix = prefix  # Begins all names in the repository: empty, or a folder with a slash at its end.
        self._revision = revision
        self._cache = Path(HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
        self._token = token
        self._force = force_download
        self.folder: Path | None = None
        # The reason why the hub cannot be reached, or None.
        self._unreachable = "local_files_only is True" if local_files_only else None
        if not local_files_only:
            try:
                info = HfApi(token=token).model_info(repo, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
                self._commit = str(info.sha)
                names = (file.rfilename for file in info.siblings or ())
                self.names = frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
                return
            except Exception as error:  # The types depend on huggingface_hub's HTTP library.
                if _status(error) in _REFUSALS:
                    raise self._explained(error) from None
                self._unreachable = _one_line(error)
        if force_download:
            raise CheckpointError(f"{repo}: force_download needs the hub, which cannot be reached: {self._unreachable}")
        try:
            folder = Path(snapshot_download(repo, revision=revision, cache_dir=self._cache, local_files_only=True))
        except FileNotFoundError:  # Includes `LocalEntryNotFoundError`.
            raise self._not_cached(f"the revision {revision!r}") from None
        self._commit = folder.name
        folder /= prefix
        self.names = frozenset(entry.name for entry in folder.iterdir()) if folder.is_dir() else frozenset()
        self.folder = folder

    def fetch(self, required: Sequence[str], optional: Iterable[str] = ()) -> Path:
        for name in required:
            if name not in self.names:
                raise self._not_cached(name) if self._unreachable else self._not_there(name)
        for name in (*required, *(name for name in optional if name in self.names)):
            path = self._download(name, self._commit, force=self._force)
            if self.folder is None:
                # This tells the cache which commit the revision is, so that it is found without a connection.
                self._download(name, self._revision, force=False)
                self.folder = path.parent
        return path.parent

    def _download(self, name: str, revision: str, *, force: bool) -> Path:
        """Downloads a file unless the cache has it, with a progress bar; returns its path."""
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(
                self.place,
                self._prefix + name,
                revision=revision,
                cache_dir=self._cache,
                token=self._token,
                local_files_only=bool(self._unreachable),
                force_download=force,
            )
        except Exception as error:  # See above.
            raise self._explained(error, name) from None
        return Path(path)

    def _not_there(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.place}: the repository has no {self._prefix}{name} in its revision {self._revision!r}; check the "
            "name, or give another `revision`"
        )

    def _not_cached(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.place}: no such folder here, and {what} of the repository of that name is not in the cache "
            f"{self._cache}, while the hub cannot be reached: {self._unreachable}"
        )

    def _explained(self, error: Exception, file: str = "") -> CheckpointError:
        """Turns an error of huggingface_hub into one of ours, in one line."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            reason = "a gated repository; ask for access on its page, then give `token`, or run: hf auth login"
        elif isinstance(error, RepositoryNotFoundError):
            reason = (
                "no such folder here, and no such repository on the hub, or a private one; check the name, or give "
                "`token`, or run: hf auth login"
            )
        elif isinstance(error, RevisionNotFoundError):
            reason = f"the repository has no revision {self._revision!r}; expected a branch, a tag or a commit"
        elif _status(error) in (401, 403):
            reason = "the hub refuses the token; give another `token`, or run: hf auth login"
        elif isinstance(error, OSError) and error.errno in _FULL:
            reason = f"no space left in {self._cache} for {file}; make room, or give another `cache_dir`"
        else:
            reason = f"{file} could not be downloaded: {_one_line(error)}; try again, complete files are kept"
        return CheckpointError(f"{self.place}: {reason}")


def _status(error: Exception) -> int | None:
    """The HTTP status of the answer that caused an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: Exception) -> str:
    """The beginning of an error's message, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
