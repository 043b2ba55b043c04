"""What datasets rely on, of every store alike; then what only one of them can do wrong."""

import errno
import hashlib
import os
import pickle
import ssl
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trustme

from cluster.errors import UserError
from cluster.output_trouble import trouble
from ingest.store import object_requests, object_store
from ingest.store.open import home_of, open_store
from ingest.store.posix import PosixStore
from ingest.store.store import Entry


@pytest.fixture(params=["posix", "bucket", "google_bucket", "azure_container"])
def store(request, tmp_path):
    if request.param == "posix":
        return open_store(tmp_path / "deep" / "out")
    return open_store(f"{request.getfixturevalue(request.param)}/deep/out/")


def publish(store, name, data):
    with store.draft(name.partition(".")[0]) as draft:
        draft.file.write(data)
        draft.publish(name, hashlib.sha256(data).hexdigest())


def names(store, folder):
    return [entry.name for entry in store.list(folder)]


@pytest.mark.slow
def test_a_file_is_read_whole_by_range_and_as_a_file(store):
    store.prepare()
    data = bytes(range(256)) * 40
    publish(store, "shards/0/a-1.tar", data)
    assert store.read("shards/0/a-1.tar") == data
    assert store.size("shards/0/a-1.tar") == len(data)
    for offset, size in (
        (0, 5),
        (100, 0),
        (9_000, 5_000),
        (len(data), 3),
        (len(data) + 9, 3),
        (0, len(data)),
    ):
        assert store.read_range("shards/0/a-1.tar", offset, size) == data[offset : offset + size]
    with store.open("shards/0/a-1.tar") as file:
        assert file.seek(-10, os.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(300)
        assert file.read(7) == data[300:307]
        assert file.tell() == 307


def test_parquet_is_read_from_every_store(store):
    table = pa.table({"a": range(10_000), "b": [str(n) for n in range(10_000)]})
    with store.draft("x") as draft:
        pq.write_table(table, draft.file, row_group_size=1000)
        draft.file.seek(0)
        draft.publish("x.parquet", hashlib.file_digest(draft.file, "sha256").hexdigest())
    with store.open("x.parquet") as file, pq.ParquetFile(file) as parquet:
        assert parquet.read_row_group(7, columns=["b"])["b"][0].as_py() == "7000"
        assert parquet.read().equals(table)


def test_what_is_absent_is_not_found(store):
    for look in (store.read, store.size, store.open):
        with pytest.raises(FileNotFoundError):
            look("commits/7.json")
    with pytest.raises(FileNotFoundError):
        store.read_range("commits/7.json", 0, 4)
    assert not store.exists("commits/7.json")
    assert names(store, "commits") == list(store.unfinished("commits")) == []
    store.create_if_absent("commits/7.json", b"x")
    assert store.exists("commits/7.json")
    assert not store.exists("commits")


def test_many_files_come_in_the_order_of_their_names(store):
    for number in (3, 1, 40):
        store.create_if_absent(f"commits/{number}.json", b"%d" % number)
    asked = [f"commits/{number}.json" for number in range(50)]
    there = {1: b"1", 3: b"3", 40: b"40"}
    assert list(store.read_many(asked)) == [there.get(number) for number in range(50)]


def test_first_creation_stands(store):
    assert store.create_if_absent("deep/name.json", b"first") == b"first"
    assert store.create_if_absent("deep/name.json", b"second") == b"first"
    assert store.create_if_absent("deep/name.json", b"first") == b"first"
    assert names(store, "deep") == ["deep/name.json"]


def test_D3_of_many_creators_one_wins_and_all_read_it_whole(store):
    gate, seen = threading.Barrier(12), []

    def create(number):
        gate.wait()
        seen.append(store.create_if_absent("name", bytes([number]) * 50_000))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1
    assert len(seen) == 12
    assert seen[0] == store.read("name") == seen[0][:1] * 50_000


def test_a_name_moves_to_new_content(store):
    store.replace("DATASET.json", b"old")
    store.replace("DATASET.json", b"new")
    assert store.read("DATASET.json") == b"new"


def test_lists_have_sizes_times_and_no_neighbours(store):
    for name in (
        "commits/b.json",
        "commits/a.json",
        "commits2/c.json",
        "shards/0/x-1.tar",
        "shards/1/y-1.tar",
    ):
        publish(store, name, name.encode())
    assert names(store, "commits") == ["commits/a.json", "commits/b.json"]
    (first, second) = store.list("shards")
    assert (first.name, first.bytes, second.name) == ("shards/0/x-1.tar", 16, "shards/1/y-1.tar")
    assert abs(first.modified - Path("/proc/self").stat().st_mtime) < 3600


def test_deleting_is_final_and_may_be_repeated(store):
    publish(store, "shards/0/x-1.tar", b"x")
    (entry,) = store.list("shards")
    store.delete(entry)
    store.delete(entry)
    assert names(store, "shards") == []


def test_D3_a_draft_that_is_not_published_is_nowhere(store):
    with pytest.raises(ZeroDivisionError), store.draft("shards/0/x") as draft:
        draft.file.write(b"x" * 100)
        raise ZeroDivisionError
    assert names(store, "shards") == list(store.unfinished("shards")) == []


def test_draft_that_does_not_read_back_is_not_published(store):
    with store.draft("final") as draft:
        draft.file.write(b"other")
        with pytest.raises(OSError, match=r"does not (read|give) back"):
            draft.publish("final.tar", hashlib.sha256(b"meant").hexdigest())
    assert not store.exists("final.tar")


def test_publishing_the_same_again_changes_nothing(store):
    for _ in range(2):
        publish(store, "shards/0/x-1.tar", b"same")
    assert store.read("shards/0/x-1.tar") == b"same"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_store_crosses_processes(store):
    store.create_if_absent("name", b"data")
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert copy == store
    assert copy.read("name") == b"data"
    child = os.fork()
    if not child:
        os._exit(store.read("name") != b"data")
    assert os.waitpid(child, 0)[1] == 0


def test_a_place_of_another_kind_is_refused():
    with pytest.raises(UserError, match="use a folder, s3://bucket/prefix, gs://bucket/prefix"):
        open_store("ftp://bucket/prefix")
    for scheme in ("s3", "gs", "az", "https"):
        with pytest.raises(UserError, match=rf"names no bucket: use {scheme}://"):
            open_store(f"{scheme}://")


def test_a_dataset_names_files_of_buckets_and_no_other_addresses(tmp_path):
    own = open_store(tmp_path)
    for scheme in ("s3", "gs", "az"):
        home, name = home_of(own, f"{scheme}://bucket/tars/a.tar")
        assert (home.root, name) == (f"{scheme}://bucket/tars", "a.tar")
    assert home_of(own, "http://169.254.169.254/latest") == (own, "http://169.254.169.254/latest")


def test_a_web_server_without_ranges_and_a_bucket_elsewhere_are_told_at_once(monkeypatch):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(301 if "bucket" in self.path else 200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"the whole")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=r"refused get: .*Range request not supported"):
            open_store(f"{url}/set").read_range("name", 2, 5)
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "ENDPOINT_URL": url}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        with pytest.raises(UserError, match=r"refused get: .*incorrectly configured region"):
            open_store("s3://bucket-in-another-region/set").read("name")
        server.shutdown()


def test_who_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(object_requests, "MOST_TRIES", 1)
    with pytest.raises(OSError, match="get failed 1 times") as caught:
        open_store("http://127.0.0.1:1/set").read("name")
    told = trouble(caught.value)
    assert str(told).startswith("cannot read or write http://127.0.0.1:1/set/name: get failed 1 times")


def test_s3_with_a_certificate_of_its_own(monkeypatch, tmp_path):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for name, value in {"Content-Length": "4", "ETag": '"x"', "Last-Modified": formatdate()}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, *_):
            pass

    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}"
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "ENDPOINT_URL": url}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        assert open_store("s3://bucket-behind-tls/set").read("name") == b"data"
        server.shutdown()


def test_missing_credentials_are_one_sentence_everywhere(monkeypatch):
    monkeypatch.setattr(object_requests, "FIRST_PAUSE_SECONDS", 0.002)
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"no credentials for gs://.*: set GOOGLE_APPLICATION_CREDENTIALS"):
        open_store("gs://bucket-without-credentials/x").prepare()
    with pytest.raises(UserError, match=r"az://.* cannot be used: .*: set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container-without-account/x").prepare()


def test_s3_without_botocore_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(UserError, match=r"needs botocore.*not installed: python -m pip install botocore"):
        open_store("s3://bucket/prefix").read("name")


def test_D3_posix_name_keeps_its_content_if_the_new_one_is_not_durable(tmp_path, monkeypatch):
    store = PosixStore(tmp_path)
    store.replace("DATASET.json", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.replace("DATASET.json", b"new")
    assert store.read("DATASET.json") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["DATASET.json"]


def test_posix_drafts_left_by_a_kill_are_unfinished_writes(tmp_path):
    store = PosixStore(tmp_path)
    with store.draft("shards/0/00000001") as draft:
        draft.file.write(b"x" * 9)
        draft.file.flush()
        (entry,) = store.unfinished("shards")
        assert (names(store, "shards"), entry.bytes) == ([], 9)
        assert entry.name.startswith("shards/0/.00000001-")
    assert list(store.unfinished("shards")) == []


@pytest.mark.slow
@pytest.mark.parametrize("over", [-1, 0, 1, 5 << 20, (5 << 20) + 1])
def test_s3_uploads_in_parts_are_the_file(bucket, monkeypatch, over):
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    data = hashlib.shake_128(b"seed").digest((5 << 20) + over)
    store = open_store(bucket)
    with monkeypatch.context() as patch:
        # S3's own checksum must do: nothing is read back.
        patch.setattr(object_store.ObjectStore, "open", lambda *_: (_ for _ in ()).throw(AssertionError))
        publish(store, "shards/0/x-1.tar", data)
    assert store.read("shards/0/x-1.tar") == data
    assert list(store.unfinished("shards")) == []


def test_s3_that_keeps_other_bytes_is_found_out(bucket, monkeypatch):
    store = open_store(bucket)
    honest = object_store.ObjectStore.upload

    def torn(self, name, file, size):
        honest(self, name, file, size)
        self.replace(name, b"y" * size)

    monkeypatch.setattr(object_store.ObjectStore, "upload", torn)
    monkeypatch.setattr(object_store, "MOST_TRIES", 2)
    with pytest.raises(OSError, match="does not read back as it was uploaded"):
        publish(store, "shards/0/x-1.tar", b"x" * 50)


def test_s3_file_that_changes_while_it_is_read_is_not_mixed(bucket, monkeypatch):
    monkeypatch.setattr(object_store, "READ_AHEAD_BYTES", 10)
    store = open_store(bucket)
    store.replace("name", b"a" * 100)
    with store.open("name") as file:
        assert file.read(5) == b"aaaaa"
        store.replace("name", b"b" * 100)
        with pytest.raises(OSError, match="changed while"):
            file.seek(50)
            file.read(5)


def test_s3_mistakes_are_one_sentence(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"s3://no-such-bucket.*: there is no such bucket"):
        open_store("s3://no-such-bucket/x").prepare()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    object_requests.forget_clients()
    with pytest.raises(UserError, match=r"no credentials for s3://.*: set AWS_ACCESS_KEY_ID"):
        open_store(bucket).prepare()


def test_a_full_temporary_folder_says_so(bucket):
    full = OSError(errno.ENOSPC, "No space left on device")
    told = r"files are made before they are uploaded, is full: free some space"
    with pytest.raises(OSError, match=told), open_store(bucket).draft("x"):
        raise full


def test_s3_unfinished_uploads_are_seen_and_deleted(bucket):
    store = open_store(f"{bucket}/out")
    s3, place = boto3.client("s3"), {"Bucket": bucket[5:], "Key": "out/shards/0/00000001-x.tar"}
    upload = s3.create_multipart_upload(**place)["UploadId"]
    s3.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"x" * 70)
    (entry,) = store.unfinished("shards")
    expected = Entry(name="shards/0/00000001-x.tar", bytes=70, modified=entry.modified, upload=upload)
    assert entry == expected
    assert names(store, "shards") == []
    store.delete(entry)
    store.delete(entry)
    assert list(store.unfinished("shards")) == []
