"""Object stores by the scheme of a URL, and a client of each, of obstore's.

Credentials come from where the service's own tools look for them:

    s3://bucket      as for AWS's own tools, through botocore: environment, profiles and SSO, roles, machines;
                     so do region and endpoint
    gs://bucket      GOOGLE_APPLICATION_CREDENTIALS, what `gcloud auth application-default login` left, or the
                     machine's service account
    az://container   AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN,
                     AZURE_CLIENT_ID with its secret or token file, or the machine's identity
    https://host     none; read only
"""

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from cluster.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

BUCKETS = ("s3://", "gs://", "az://")
WEB = ("https://", "http://")
# What botocore gives is good for ten minutes, or it would have renewed it.
_CREDENTIALS_LAST = timedelta(minutes=10)

_EXIT_SECONDS, _QUIET_LOOKS = 2.0, 3

_used_in: int | None = None  # the process in which obstore's threads run


def is_bucket(text: str) -> bool:
    """Whether this names something in a bucket, which can be written to."""
    return text.startswith(BUCKETS)


def split(url: str) -> tuple[str, str]:
    """A store's URL as the bucket or web server, and the key below it.

    Raises:
        UserError: it names no bucket, or has a query.
    """
    scheme, _, path = url.partition("://")
    bucket, _, key = path.rstrip("/").partition("/")
    if not bucket:
        raise UserError(f"{url} names no bucket: use {scheme}://bucket/prefix")
    if not is_bucket(url):
        if "?" in url or "#" in url:
            raise UserError(f"{url} has a query, to which no file's name can be added: use a plain address")
        key = unquote(key)
    return f"{scheme}://{bucket}", key


def connect(root: str, client: "ClientConfig", retry: "RetryConfig") -> "ObjectStore":
    """A client of a bucket or web server, as `split` gives it; for this process and none that it forks.

    Raises:
        UserError: credentials are missing, or what is configured cannot be used.
    """
    _use_here()
    from obstore import exceptions
    from obstore.store import AzureStore, GCSStore, HTTPStore

    scheme, _, name = root.partition("://")
    # Whether a connection is encrypted is said by the endpoint's URL.
    common: dict[str, Any] = {"client_options": client | {"allow_http": True}, "retry_config": retry}
    try:
        if scheme == "s3":
            return _s3(root, name, common)
        if scheme == "gs":
            return GCSStore(name, **common)
        if scheme == "az":
            return AzureStore(name, **common)
        return HTTPStore.from_url(root, **common)
    except (exceptions.BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        account = ": set AZURE_STORAGE_ACCOUNT_NAME" if "Account must be" in reason else ""
        raise UserError(f"{root} cannot be used: {reason}{account}") from error


def missing_credentials(place: str) -> str:
    """What to do about it, for people."""
    variables = {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS",
        "az": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    }
    return f"no credentials for {place}: set {variables[place.partition('://')[0]]}"


def aws_session(place: str) -> Any:
    """A session of botocore's that has credentials.

    Raises:
        UserError: it has none, or botocore is not installed.
    """
    try:
        import botocore.exceptions
        import botocore.session
    except ModuleNotFoundError as error:
        raise UserError(
            f"{place} needs {error.name}, which is not installed: python -m pip install botocore"
        ) from error
    # It tells of every process where it found credentials, which is no news.
    logging.getLogger("botocore.credentials").setLevel(logging.WARNING)
    logging.getLogger("botocore.configprovider").setLevel(logging.WARNING)
    session = botocore.session.get_session()
    try:
        if session.get_credentials() is None:
            raise UserError(missing_credentials(place))
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"{place} cannot be used: {error}") from error
    return session


def _s3(root: str, bucket: str, common: dict[str, Any]) -> "ObjectStore":
    session = aws_session(root)
    from botocore.configprovider import ConfiguredEndpointProvider
    from obstore.store import S3Store

    endpoint = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    ).provide()
    found: Any = {"endpoint": endpoint, "region": session.get_config_variable("region")}
    if authorities := session.get_config_variable("ca_bundle"):
        common["client_options"]["root_certificate"] = Path(authorities).read_bytes()
    return S3Store(
        bucket,
        credential_provider=_renewed(session.get_credentials()),
        checksum_algorithm="SHA256",  # S3 keeps it, and some buckets take no object without one
        disable_bulk_delete=True,
        **{key: value for key, value in found.items() if value},
        **common,
    )


def _renewed(credentials: Any) -> "Callable[[], S3Credential]":
    def now() -> "S3Credential":
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }

    return now


def _use_here() -> None:
    """Make obstore work in this process, which may be the fork of one that has used it.

    Its threads do not survive a fork, it cannot start them anew, and waits for them forever. A second copy of
    the library has threads of its own.
    """
    global _used_in  # noqa: PLW0603
    if _used_in not in (None, os.getpid()):
        path = sys.modules["obstore._obstore"].__file__ or ""
        for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
            del sys.modules[name]
        # The dynamic loader knows a library by its file: a copy is another one. It has no name to clean up.
        copy = os.memfd_create("obstore")
        with Path(path).open("rb") as library:
            while os.sendfile(copy, library.fileno(), None, 1 << 30):
                pass
        loader = ExtensionFileLoader("obstore._obstore", f"/proc/self/fd/{copy}")
        spec = spec_from_file_location("obstore._obstore", loader.path, loader=loader)
        assert spec is not None
        sys.modules["obstore._obstore"] = module_from_spec(spec)
        loader.exec_module(sys.modules["obstore._obstore"])
        os.close(copy)
    if _used_in != os.getpid():
        atexit.register(_wait_for_threads, os.getpid())
    _used_in = os.getpid()


def _wait_for_threads(process: int) -> None:
    """Let obstore's threads hand over the last answer: one that does so while Python ends aborts the process
    (https://github.com/PyO3/pyo3-async-runtimes/issues/40). They sleep when they have."""
    deadline, quiet = time.monotonic() + _EXIT_SECONDS, 0
    while os.getpid() == process and quiet < _QUIET_LOOKS and time.monotonic() < deadline:
        quiet = 0 if any(map(_is_busy, Path("/proc/self/task").glob("*/stat"))) else quiet + 1
        time.sleep(0.01)


def _is_busy(thread: Path) -> bool:
    try:
        name, _, rest = thread.read_text().rpartition(") ")
    except OSError:
        return False  # it has ended
    return "(tokio" in name and not rest.startswith("S")
