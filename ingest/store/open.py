"""From what a user writes to the store that it names."""

from pathlib import Path

from cluster.errors import UserError
from ingest.store.posix import PosixStore
from ingest.store.store import Store


def open_store(path: str | Path) -> Store:
    """The store at a folder, or at `s3://bucket/prefix`. Nothing is read or written yet.

    Raises:
        UserError: it is a URL of another kind, or s3fs is not installed.
    """
    if isinstance(path, Path) or "://" not in path:
        return PosixStore(Path(path))
    if not path.startswith("s3://"):
        raise UserError(f"{path} is no place for a dataset: use a folder, or s3://bucket/prefix")
    try:
        from ingest.store.s3 import S3Store
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs {error.name}, which is not installed: python -m pip install s3fs"
        ) from error
    return S3Store(path)


def absolute(store: Store) -> str:
    """The store's folder or URL, to open it by on another machine, whatever the working directory there."""
    return str(store.root.resolve()) if isinstance(store.root, Path) else store.root


def home_of(store: Store, name: str) -> tuple[Store, str]:
    """The store that a file of a dataset is in, and its name there.

    A dataset's own files have names relative to its store. A tar that others made, and that is used where it
    lies, is named by its absolute path or `s3://` URL.
    """
    if name.startswith("/"):
        return PosixStore(Path("/")), name[1:]
    if name.startswith("s3://"):
        folder, _, file = name.rpartition("/")
        return open_store(folder), file
    return store, name


def name_of(path: str) -> str:
    """The last part of a dataset's folder or URL."""
    root = open_store(path).root
    return root.resolve().name if isinstance(root, Path) else root.rpartition("/")[2]
