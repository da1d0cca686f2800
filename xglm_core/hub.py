"""Where the files of a checkpoint come from: a folder, or a repository of the Hugging Face Hub.

Of a repository, one commit is looked up first, and all files are those of this commit. Only the files asked for are
downloaded, by huggingface_hub, into its cache. Where the hub cannot be asked, the cache is all that there is.
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

# As huggingface_hub has it; said here again, as what counts as a folder must not depend on its being installed.
_REPO_ID = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))(\w[\w.-]*/)?\w([\w.-]*\w)?(?<!\.git)", re.ASCII)

_REFUSALS = (401, 403, 404)  # Answers that are final; of any other error, the cache may help out.

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # The disk, or the user's share; Windows has no shares.


class HubOptions(TypedDict, total=False):
    """The keyword arguments `**hub` of everything that loads by name. Only `subfolder` has an effect on folders.

    Attributes:
        subfolder: where the files are within the folder or repository; None or "" for its top.
        revision: branch, tag or commit of the repository; None means "main".
        cache_dir: where downloads are kept; None means the cache of huggingface_hub, which `HF_HOME` moves.
        token: for private and gated repositories; None means the one that `hf auth login` stored, False none.
        local_files_only: use the cache alone, without a connection; `HF_HUB_OFFLINE=1` does the same.
        force_download: download files although the cache has them.
    """

    subfolder: str | None
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool


class Source(Protocol):
    """The files of a checkpoint, wherever they are."""

    @property
    def place(self) -> str:
        """What messages call it."""

    @property
    def names(self) -> frozenset[str]:
        """The files that there are."""

    @property
    def folder(self) -> Path | None:
        """Where files are that have been fetched; None before the first."""

    def fetch(self, required: Sequence[str], optional: Iterable[str] = ()) -> Path:
        """Sees to it that files are in a folder, which is returned.

        Args:
            required: files that are needed, at least one. Of a folder, it is left to their readers to miss them.
            optional: files to fetch if there are such.

        Raises:
            CheckpointError: a repository does not have a file that is required, or the download failed.
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

    What is there on disk is never looked up on the hub, nor is what cannot be the id of a repository: "./name",
    "/name", "~", more than two names with slashes between them, or any `Path`.

    Args:
        name: a folder, or the id of a repository, e.g. "facebook/xglm-564M".
        subfolder, revision, cache_dir, token, local_files_only, force_download: see `HubOptions`.

    Raises:
        CheckpointError: it is neither, or neither the hub nor the cache can give the revision.
        BackendError: huggingface_hub is needed and not installed.
        InputError: files are to be downloaded without a connection.
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
        self._prefix = prefix  # Of the names in the repository: empty, or a folder with a slash at its end.
        self._revision = revision
        self._cache = Path(HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
        self._token = token
        self._force = force_download
        self.folder: Path | None = None
        # Why the hub cannot be asked, if so.
        self._unreachable = "local_files_only is True" if local_files_only else None
        if not local_files_only:
            try:
                info = HfApi(token=token).model_info(repo, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
                self._commit = str(info.sha)
                names = (file.rfilename for file in info.siblings or ())
                self.names = frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
                return
            except Exception as error:  # Which ones depends on the library that huggingface_hub speaks HTTP with.
                if _status(error) in _REFUSALS:
                    raise self._explained(error) from None
                self._unreachable = _one_line(error)
        if force_download:
            raise CheckpointError(f"{repo}: force_download needs the hub, which cannot be reached: {self._unreachable}")
        try:
            folder = Path(snapshot_download(repo, revision=revision, cache_dir=self._cache, local_files_only=True))
        except FileNotFoundError:  # Among them `LocalEntryNotFoundError`.
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
                # From this the cache knows which commit the revision is, and finds it there without a connection.
                self._download(name, self._revision, force=False)
                self.folder = path.parent
        return path.parent

    def _download(self, name: str, revision: str, *, force: bool) -> Path:
        """Has a file in the cache, with a progress bar if that takes a download; returns where it is."""
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
        """What huggingface_hub raised, in one line."""
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
    """The HTTP status of an answer that is the reason of an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: Exception) -> str:
    """The first sentences of an error, which may have many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
