"""Weight files: what is written is read back, and whatever is wrong changes nothing and says so."""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from vgg_fast.models import ARCHITECTURES
from vgg_fast.models.weights import PUBLISHED, SUFFIXES, WeightsError, load_weights, read_weights, save_weights


def network(classes: int = 5, seed: int = 0) -> nn.Sequential:
    """Every kind of tensor a VGG has, in 40 kB: convolution, batch-norm with statistics, dense."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, classes))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model[1].num_batches_tracked.fill_(7)
    return model


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_refused(model: nn.Module, source: Any, message: str) -> None:
    """Loading fails with this message, and every tensor of the model has the bits it had."""
    before = copy_of(model)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, source)
    assert same(copy_of(model), before)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    model = network(seed=1)
    save_weights(model, path)
    twin = network(seed=2)
    load_weights(twin, path)
    assert same(copy_of(twin), copy_of(model))
    assert os.listdir(tmp_path) == [path.name]
    # Tensors in a file of ours are read by PyTorch and safetensors themselves as well.
    assert same(read_weights(str(path)), copy_of(model))


def test_dtype_and_device_are_the_models(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_weights({k: v.half() if v.is_floating_point() else v for k, v in network().state_dict().items()}, path)
    model = network(seed=2)
    load_weights(model, path)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, network()[0].weight.half().float())


def test_old_pth_format(tmp_path: Path) -> None:
    """The published VGG files are in the format before torch 1.6, without the batch-norms' counters."""
    path = tmp_path / "old.pth"
    state = {k: v for k, v in network().state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    model = network(seed=2)
    load_weights(model, path)
    assert torch.equal(model[0].weight, state["0.weight"])
    assert torch.equal(model[1].running_var, state["1.running_var"])
    assert model[1].num_batches_tracked == 7
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(network(), path, r"old\.pth.*damaged or truncated")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_views_and_shared_tensors_are_stored_small_and_apart(tmp_path: Path, suffix: str) -> None:
    large = torch.arange(1e6)
    state = {"view": large[:10], "again": large[:10], "transposed": torch.arange(6.0).reshape(2, 3).t()}
    path = tmp_path / f"w{suffix}"
    save_weights(state, path)
    assert path.stat().st_size < 10_000
    assert same(read_weights(path), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"weights{suffix}"
    save_weights(network(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    size = path.stat().st_size
    assert_refused(network(seed=2), path, rf"weights\{suffix}.*damaged or truncated \({size} bytes\)")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_something_else_entirely(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"<!DOCTYPE html><title>404</title>" * 50)
    assert_refused(network(), path, rf"weights\{suffix}")


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    assert_refused(network(), tmp_path / "no.pth", r"no\.pth: no such file")
    assert_refused(network(), tmp_path, r"ends in \.pth, \.pt, \.safetensors")
    assert_refused(network(), "w.h5", r"vgg-fast convert")
    (tmp_path / "folder.pth").mkdir()
    assert_refused(network(), tmp_path / "folder.pth", "no such file")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_code_from_a_file_runs(tmp_path: Path) -> None:
    path, trace = tmp_path / "bomb.pth", tmp_path / "exploded"
    torch.save({"0.weight": Bomb(trace)}, path)
    assert_refused(network(), path, r"bomb\.pth.*more than tensors")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: network(), r"save model\.state_dict\(\), not the model"),
        (lambda: {"state_dict": network().state_dict(), "epoch": 3}, r"checkpoint.*\(state_dict, epoch\)"),
        (lambda: [torch.ones(2)], r"found list"),
        (lambda: {}, r"missing.*the file is empty"),
        (lambda: {f"module.{k}": v for k, v in network().state_dict().items()}, r"model\.module\.state_dict\(\)"),
        (lambda: network(classes=9).state_dict(), r"4\.weight: \(9, 288\) in the file, \(5, 288\) in the model"),
        (lambda: {**network().state_dict(), "more": torch.ones(1)}, r"1 unexpected: more"),
        (lambda: {k: v for k, v in network().state_dict().items() if k != "4.bias"}, r"1 missing: 4\.bias"),
        (lambda: {**network().state_dict(), "4.bias": torch.ones(5, dtype=torch.int32)}, r"4\.bias: torch\.int32"),
        (lambda: {**network().state_dict(), "4.bias": torch.ones(5, dtype=torch.cfloat)}, r"4\.bias: torch\.complex64"),
    ],
    ids=["module", "checkpoint", "list", "empty", "ddp", "classes", "unexpected", "missing", "integers", "complex"],
)
def test_contents_that_do_not_fit(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "other.pth"
    torch.save(content(), path)
    assert_refused(network(seed=2), path, rf"other\.pth.*{message}")


def test_model_without_storage(tmp_path: Path) -> None:
    save_weights(network(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"meta device.*to_empty"):
        load_weights(network().to("meta"), tmp_path / "w.pth")


# Writing


def test_existing_files_are_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(seed=1), path)
    before = path.read_bytes()
    with pytest.raises(WeightsError, match=r"w\.safetensors exists.*force"):
        save_weights(network(seed=2), path)
    assert path.read_bytes() == before
    save_weights(network(seed=2), path, force=True)
    assert same(read_weights(path), copy_of(network(seed=2)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    save_weights(network(), path)
    before = path.read_bytes()
    # As on a full disk: the operating system refuses to write more than 10 kB to a file (Python ignores SIGXFSZ).
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match="cannot be written"):
            save_weights(network(seed=2), path, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"ends in"):
        save_weights(network(), tmp_path / "w.bin")
    with pytest.raises(WeightsError, match=r"cannot save 'epoch'.*int"):
        save_weights({"epoch": 3}, tmp_path / "w.pth")  # type: ignore[dict-item]
    with pytest.raises(WeightsError, match="cannot be written"):
        save_weights(network(), tmp_path / "no" / "folder" / "w.pth")
    assert not list(tmp_path.iterdir())


# URLs


class Server(BaseHTTPRequestHandler):
    """Serves FILES; a path that begins with /cut promises the whole file and breaks off in the middle."""

    FILES: ClassVar[dict[str, bytes]] = {}
    REQUESTS: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.removeprefix("/cut")
        self.REQUESTS.append(self.path)
        if path not in self.FILES:
            self.send_error(404)
            return
        content = self.FILES[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if path == self.path else content[: len(content) // 2])

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine, with torch.hub's cache in an empty folder."""
    Server.FILES, Server.REQUESTS = {}, []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    previous = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        torch.hub.set_dir(previous)
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def cached(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "hub").rglob("*") if p.is_file())


def publish(path: str, seed: int = 1, suffix: str = ".pth") -> str:
    """Put a network on the server; ``{}`` in the path becomes the first 8 digits of its hash, which are returned."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"published{suffix}"
        save_weights(network(seed=seed), file)
        content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    Server.FILES[path.format(digest[:8])] = content
    return digest


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_download_with_the_hash_in_the_name(tmp_path: Path, server: str, suffix: str) -> None:
    digest = publish("/models/net-{}" + suffix, suffix=suffix)
    name = f"net-{digest[:8]}{suffix}"
    for _ in range(2):
        model = network(seed=2)
        load_weights(model, f"{server}/models/{name}", progress=False)
        assert same(copy_of(model), copy_of(network(seed=1)))
        assert cached(tmp_path) == [name]
    assert len(Server.REQUESTS) == 1  # the second time from the cache


@pytest.mark.parametrize("name", ["net-00000000.pth", "cut/net-{}.pth"])
def test_download_with_a_wrong_hash(tmp_path: Path, server: str, name: str) -> None:
    digest = publish("/net-{}.pth")
    Server.FILES["/net-00000000.pth"] = Server.FILES[f"/net-{digest[:8]}.pth"]
    url = f"{server}/{name.format(digest[:8])}"
    expected = digest[:8] if "cut" in name else "00000000"
    assert_refused(network(seed=2), url, rf"{url}: download failed, nothing was kept.*{expected}|{url}.*IncompleteRead")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_download_that_breaks_off_without_a_hash(tmp_path: Path, server: str, suffix: str) -> None:
    publish("/net" + suffix, suffix=suffix)
    assert_refused(network(seed=2), f"{server}/cut/net{suffix}", rf"{server}/cut/net\{suffix}")
    assert cached(tmp_path) == []
    load_weights(network(seed=2), f"{server}/net{suffix}", progress=False)
    assert len(cached(tmp_path)) == 1


def test_download_that_is_not_there(tmp_path: Path, server: str) -> None:
    assert_refused(network(), f"{server}/no.pth", r"no\.pth: download failed.*404")
    assert_refused(network(), "http://127.0.0.1:9/no.pth", r"no\.pth: download failed")
    assert_refused(network(), f"{server}/page.html", r"ends in \.pth")
    assert_refused(network(), "ftp://127.0.0.1/w.pth", r"ftp://, only from http, https and file")
    assert cached(tmp_path) == []


def test_a_spoiled_cache_is_noticed_and_renewed(tmp_path: Path, server: str) -> None:
    digest = publish("/net-{}.pth")
    url = f"{server}/net-{digest[:8]}.pth"
    load_weights(network(), url, progress=False)
    file = tmp_path / "hub" / "checkpoints" / f"net-{digest[:8]}.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a weight: the file still parses
    file.write_bytes(content)
    model = network(seed=2)
    with pytest.warns(UserWarning, match=r"wrong or truncated.*downloading it again"):
        load_weights(model, url, progress=False)
    assert same(copy_of(model), copy_of(network(seed=1)))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_equal_names_on_two_servers_are_two_files(server: str) -> None:
    publish("/a/model.pth", seed=1)
    publish("/b/model.pth", seed=2)
    assert same(read_weights(f"{server}/a/model.pth", progress=False), copy_of(network(seed=1)))
    assert same(read_weights(f"{server}/b/model.pth", progress=False), copy_of(network(seed=2)))


def test_hash_given_in_the_url(tmp_path: Path, server: str) -> None:
    digest = publish("/model-20240131.pth")  # a date, which the convention would take for a hash
    url = f"{server}/model-20240131.pth"
    assert_refused(network(), url, "20240131")
    assert same(read_weights(f"{url}#sha256={digest}", progress=False), copy_of(network(seed=1)))
    assert_refused(network(), f"{url}#sha256=ff{digest[2:]}", "download failed")
    assert len(cached(tmp_path)) == 1


def test_file_urls(tmp_path: Path) -> None:
    folder = tmp_path / "with blank"
    folder.mkdir()
    plain = folder / "w.safetensors"
    save_weights(network(), plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    good, bad = folder / f"w-{digest[:8]}.safetensors", folder / "w-00000000.safetensors"
    plain.rename(good)
    bad.write_bytes(good.read_bytes())
    model = network(seed=2)
    load_weights(model, good.as_uri())
    assert same(copy_of(model), copy_of(network()))
    assert_refused(model, bad.as_uri(), f"wrong or truncated.*sha256 is {digest}, expected 00000000")
    good.write_bytes(good.read_bytes()[:-1])
    assert_refused(model, good.as_uri(), f"wrong or truncated.*expected {digest[:8]}")
    assert_refused(model, (folder / "no.pth").as_uri(), "no such file")


def test_hash_of_a_published_file_given_as_a_path(tmp_path: Path) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    save_weights(network(), path)
    assert_refused(network(), path, r"vgg16-397923af\.pth .*: wrong or truncated file.*expected 397923af")
    # Any other name is the user's own business.
    path.rename(tmp_path / "mine-397923af.pth")
    load_weights(network(), tmp_path / "mine-397923af.pth")


def test_the_table_of_published_files_is_complete() -> None:
    assert set(PUBLISHED) == set(ARCHITECTURES)
    for arch, files in PUBLISHED.items():
        assert "IMAGENET1K_V1" in files
        assert all(file.startswith(arch) and file.endswith(".pth") for file in files.values())
