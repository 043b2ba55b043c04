"""From what a user writes to the store that it names."""

from pathlib import Path

from cluster.errors import UserError
from ingest.store.clients import BUCKETS, WEB, is_bucket
from ingest.store.object_store import ObjectStore
from ingest.store.posix import PosixStore
from ingest.store.store import Store


def open_store(path: str | Path) -> Store:
    """The store at a folder, in a bucket (`s3://bucket/prefix`, `gs://…`, `az://…`), or, to read only, at
    `https://…`. Nothing is read or written yet.

    Raises:
        UserError: it is empty, a URL of another kind, or names no bucket.
    """
    if path == "":  # a shell's variable without a value: it would be the current folder
        raise UserError("the name of a dataset is empty: say where it is, or is to be")
    if isinstance(path, Path) or "://" not in path:
        return PosixStore(Path(path))
    if not path.startswith(BUCKETS + WEB):
        raise UserError(
            f"{path} is no place for a dataset: use a folder, s3://bucket/prefix, gs://bucket/prefix, "
            "az://container/prefix, or, to read only, https://host/path"
        )
    return ObjectStore(path)


def absolute(store: Store) -> str:
    """The store's folder or URL, to open it by on another machine, whatever the working directory there."""
    return str(store.root.resolve()) if isinstance(store.root, Path) else store.root


def home_of(store: Store, name: str) -> tuple[Store, str]:
    """The store that a file of a dataset is in, and its name there.

    A dataset's own files have names relative to its store. A tar that others made, and that is used where it
    lies, is named by its absolute path or by its URL in a bucket. Other URLs are no such names: a dataset
    of a stranger must not make us ask whatever web server it names.
    """
    if name.startswith("/"):
        return PosixStore(Path("/")), name[1:]
    if is_bucket(name):
        folder, _, file = name.rpartition("/")
        return open_store(folder), file
    return store, name


def name_of(path: str) -> str:
    """The last part of a dataset's folder or URL."""
    root = open_store(path).root
    return root.resolve().name if isinstance(root, Path) else root.rpartition("/")[2]
