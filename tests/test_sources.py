"""Where the bytes come from: web servers, pipes, S3, tables; and shards that change while a run reads them."""

import functools
import http.server
import io
import os
import re
import socketserver
import threading
import time
from types import SimpleNamespace

import boto3
import datasets
import pytest
from harness import ALONE
from moto.server import ThreadedMotoServer
from shards import encode, load_index, noise_image, sample, write_shard

import sdxl_data
import train_sdxl_lora as trainer

KEYS = [f"s{i}" for i in range(12)]
wait = time.sleep  # the trainer's own is switched off below


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of four samples in a folder."""
    folder = tmp_path_factory.mktemp("shards")
    for n in range(3):
        each = [sample(key, png=encode(noise_image(int(key[1:])))) for key in KEYS[4 * n : 4 * n + 4]]
        write_shard(folder / f"train-{n}.tar", each)
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(trainer.time, "sleep", lambda seconds: None)


def delivered(index, tmp_path, workers=0):
    """{image id: pixels} and the ids in the order of three steps of the stream."""
    mix = sdxl_data.ClassMix(index, "random")
    batches = sdxl_data.MicroBatches(sdxl_data.SamplePlan(index, mix, "random", 1, 4), 3, 4, 0, 1)
    dataset = sdxl_data.ImageDataset(index, 1, 8, "random_ar", False, "box", str(tmp_path))
    loader = sdxl_data.make_loader(dataset, batches, workers, False)
    return [(key, p.numpy().tobytes()) for b in loader for key, p in zip(b["keys"], b["pixels"])]


# ---- web servers


LOCK = threading.Lock()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; by ranges or whole; every nth request ends in an error or a cut connection."""

    ranges, fail_every, requests, heads, delay = True, 0, 0, 0, 0
    waiting, most_waiting = 0, 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        type(self).requests += 1
        with LOCK:
            type(self).waiting += 1
            type(self).most_waiting = max(self.waiting, self.most_waiting)
        wait(self.delay)
        with LOCK:
            type(self).waiting -= 1
        data = (self.folder / self.path.lstrip("/")).read_bytes()
        failing = self.fail_every and self.requests % self.fail_every == 0
        if failing and self.requests // self.fail_every % 2:
            self.send_error(503)
            return
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, part = 200, data
        if found and self.ranges:
            end = int(found[2]) + 1 if found[2] else len(data)
            status, part = 206, data[int(found[1]) : end]
        self.send_response(status)
        self.send_header("Content-Length", len(part))
        self.send_header("ETag", f'"{hash(data)}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {found[1]}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if failing and self.command == "GET" else part)
        self.close_connection = bool(failing)

    def do_HEAD(self):
        type(self).heads += 1
        data = (self.folder / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", len(data))
        self.send_header("ETag", f'"{hash(data)}"')
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()


@pytest.fixture
def serve(shards):
    servers = []

    def start(folder=shards, **options):
        handler = type("H", (Handler,), {"folder": folder} | options)
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/train-{{0..2}}.tar", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["ranges", "whole", "failing", "failing whole", "pipe"])
def test_every_source_gives_the_stream_of_the_local_files(shards, serve, tmp_path, source, workers):
    local = load_index([str(shards)], tmp_path / "local")
    if source == "pipe":
        patterns = [f"pipe:cat {shards}/train-{{0..2}}.tar"]
    else:
        options = {"ranges": "whole" not in source, "fail_every": 10 if "failing" in source else 0}
        patterns = [serve(**options)[0]]
    index = load_index(patterns, tmp_path / "remote")
    assert index.fingerprint() == local.fingerprint()
    stream = delivered(index, tmp_path / "remote", workers)
    assert len(stream) == 12
    assert stream == delivered(local, tmp_path / "local", workers)


def test_a_batch_is_read_at_the_same_time(serve, tmp_path):
    url, handler = serve(delay=0.1)
    index = load_index([url], tmp_path)
    dataset = sdxl_data.ImageDataset(index, 1, 8, "center", False, "box", tmp_path)
    requests = [(i, -1, 0, i) for i in range(12)]
    dataset.__getitems__(requests[:3])
    handler.most_waiting = 0
    batch = dataset.__getitems__(requests)
    assert 3 < handler.most_waiting <= sdxl_data.IO_THREADS
    assert [item["keys"] for item in batch] == KEYS


def test_a_run_remembers_more_shards_than_a_batch_touches(serve, tmp_path):
    """Once each is known, a read is one request, however many shards lie between two reads of the same."""
    folder = tmp_path / "served"
    folder.mkdir()
    for n in range(40):
        write_shard(folder / f"train-{n}.tar", [sample(f"k{n}", png=encode(noise_image(n)))])
    url, handler = serve(folder)
    index = load_index([url.replace("{0..2}", "{0..39}")], tmp_path)
    dataset = sdxl_data.ImageDataset(index, 1, 8, "center", False, "box", tmp_path)
    first = [dataset.read(index.row(i)) for i in range(40)]
    handler.requests = handler.heads = 0
    assert [dataset.read(index.row(i)) for i in range(40)] == first
    assert (handler.requests, handler.heads) == (40, 0)


def test_a_server_that_fails_for_good_ends_the_run_with_its_url(serve, tmp_path):
    url, handler = serve()
    index = load_index([url], tmp_path)
    handler.fail_every = 1
    with pytest.raises(OSError, match=re.escape("http://127.0.0.1") + r".*train-\d.tar.* after 7 tries"):
        delivered(index, tmp_path)


def test_a_shard_that_is_not_there_is_one_line_with_its_url(serve, tmp_path):
    url, _ = serve()
    with pytest.raises(sdxl_data.InputError, match="--train_shards: http.*train-9.tar"):
        load_index([url.replace("{0..2}", "9")], tmp_path)


def test_a_pipe_that_fails_names_its_command(tmp_path):
    with pytest.raises(sdxl_data.InputError, match="--train_shards: pipe:cat /nowhere.*exit status 1"):
        load_index(["pipe:cat /nowhere"], tmp_path)
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_processes_that_want_the_same_shard_copy_it_once(shards, tmp_path):
    count = tmp_path / "count"
    command = f"pipe:echo x >> {count}; cat {shards}/train-0.tar"
    threads = [threading.Thread(target=sdxl_data.Shard, args=(command, tmp_path)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == "x\n"


@pytest.fixture(scope="module")
def bucket(shards):
    """s3://pokefa with the shards in it, on a moto server."""
    server = ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="pokefa")
    for path in shards.glob("*.tar"):
        client.upload_file(str(path), "pokefa", f"data/{path.name}")
    yield
    patch.undo()
    server.stop()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pattern", ["s3://pokefa/data", "s3://pokefa/data/train-{0..2}.tar"])
def test_a_bucket_gives_the_stream_of_the_local_files(shards, bucket, tmp_path, pattern, workers):
    local = load_index([str(shards)], tmp_path / "local")
    index = load_index([pattern], tmp_path / "remote")
    assert index.fingerprint() == local.fingerprint()
    assert delivered(index, tmp_path, workers) == delivered(local, tmp_path, workers)


# ---- shards that change


def test_a_local_shard_that_changes_during_the_run_is_an_error(shards, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes((shards / "train-0.tar").read_bytes())
    index = load_index([str(path)], tmp_path)
    dataset = sdxl_data.ImageDataset(index, 1, 8, "center", False, "box")
    dataset.read(index.row(0))
    time_ = os.stat(path).st_mtime_ns
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(time_ + 10**9, time_ + 10**9))
    with pytest.raises(OSError, match="a.tar: changed during the run"):
        dataset.read(index.row(1))


def test_a_remote_shard_that_changes_during_the_run_is_an_error(shards, serve, tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    for n in range(3):
        (folder / f"train-{n}.tar").write_bytes((shards / f"train-{n}.tar").read_bytes())
    index = load_index([serve(folder)[0]], tmp_path)
    dataset = sdxl_data.ImageDataset(index, 1, 8, "center", False, "box", tmp_path)
    dataset.read(index.row(0))
    (folder / "train-0.tar").write_bytes((shards / "train-0.tar").read_bytes().replace(b"drawing", b"DRAWING"))
    dataset.read(index.row(1))  # asked at most once a minute
    monkeypatch.setattr(sdxl_data, "STAMP_SECONDS", -1)
    with pytest.raises(OSError, match="train-0.tar: changed during the run"):
        dataset.read(index.row(1))


# ---- tables of the datasets library


@pytest.mark.parametrize("kept_as", ["save_to_disk", "parquet"])
def test_a_dataset_enters_the_same_stream(tmp_path, kept_as, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    pictures = [noise_image(i) for i in range(6)]
    captions = [f"caption {i}" for i in range(5)] + [" "]
    labels = [["Mew"], ["Mew", "Pichu"], [], None, ["Pichu"], []]
    table = datasets.Dataset.from_dict(
        {"picture": pictures, "caption": captions, "species_list": labels},
        datasets.Features(
            {
                "picture": datasets.Image(),
                "caption": datasets.Value("string"),
                "species_list": datasets.List(datasets.Value("string")),
            }
        ),
    )
    if kept_as == "parquet":
        (tmp_path / "d").mkdir()
        table.to_parquet(tmp_path / "d/train.parquet")
    else:
        table.save_to_disk(tmp_path / "d")
    flags = {"dataset_config_name": None, "train_data_dir": None, "image_column": "picture"}
    flags |= {"dataset_name": str(tmp_path / "d"), "caption_column": "caption", "train_shards": None}
    args = SimpleNamespace(
        **flags, cache_dir=None, output_dir=tmp_path, class_key="species_list", aesthetic_key="ae_aesthetic",
        max_bad_fraction=0.2, max_train_samples=None, min_image_size=None, trigger_word=None, val_fraction=None,
        instance_prompt=None,
    )  # fmt: skip

    @functools.wraps(trainer.load_index)
    def load():
        return trainer.load_index(ALONE, args, "--dataset_name", seed=1)[0]

    index = load()
    assert [index.row(i)["labels"] for i in range(5)] == [["mew"], ["mew", "pichu"], [], [], ["pichu"]]
    assert [(d["key"], d["reason"]) for d in index.damage] == [("row 5", "no caption")]
    dataset = sdxl_data.ImageDataset(index, 1, 8, "center", False, "box")
    for i in range(5):
        assert dataset.open(index.row(i), (8, 8))[0].tobytes() == pictures[i].tobytes()
    args.max_train_samples = 2
    assert len(load()) == 2
    args.caption_column = "text"
    with pytest.raises(sdxl_data.InputError, match="--caption_column: .* has columns picture, caption, species_list"):
        load()


def test_a_download_that_is_cut_short_is_repeated(tmp_path, monkeypatch):
    whole = bytes(range(256)) * 40
    answers = [whole[:5000], whole[:-1], whole]
    monkeypatch.setattr(sdxl_data.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answers.pop(0)))
    monkeypatch.setattr(sdxl_data.time, "sleep", lambda seconds: None)
    copy = sdxl_data.copy_shard("https://host/a.tar", f"{len(whole)} tag", tmp_path)
    with open(copy, "rb") as file:
        assert file.read() == whole
    assert answers == []
