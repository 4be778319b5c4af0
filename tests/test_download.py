"""Downloads, from a local server: whole and valid, or not there at all."""

import dataclasses
import http.server
import threading
from unittest import mock

import pytest
import torch
from helpers import hopper_file

import smac_offline_to_online as smac


@pytest.fixture
def serve():
    """serve(body, length, status) -> URL of a file that comes with these, whatever its real length."""
    servers = []

    def start(body, length=None, status=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/data.hdf5"

    yield start
    for server in servers:
        server.shutdown(), server.server_close()


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return hopper_file(tmp_path_factory.mktemp("served") / "a.hdf5", episodes=2).read_bytes()


def test_a_whole_file_arrives(serve, body, tmp_path):
    path = tmp_path / "new" / "hopper.hdf5"
    smac.download(serve(body), path)
    assert path.read_bytes() == body
    assert list(path.parent.iterdir()) == [path]


def broken(url, path):
    with pytest.raises(smac.BadInput) as problem:
        smac.download(url, path)
    assert url in str(problem.value) and str(path) in str(problem.value)
    assert list(path.parent.iterdir()) == []


def test_a_connection_that_breaks_leaves_nothing(serve, body, tmp_path):
    broken(serve(body[: len(body) // 2], length=len(body)), tmp_path / "a.hdf5")


@pytest.mark.parametrize("status", [404, 500])
def test_an_error_of_the_server_leaves_nothing(serve, body, tmp_path, status):
    broken(serve(body, status=status), tmp_path / "a.hdf5")


@pytest.mark.parametrize("page", [b"", b"<html>please log in</html>" * 100])
def test_what_is_not_hdf5_leaves_nothing(serve, tmp_path, page):
    broken(serve(page), tmp_path / "a.hdf5")


def test_a_server_that_is_not_there_leaves_nothing(tmp_path):
    broken("http://127.0.0.1:9/data.hdf5", tmp_path / "a.hdf5")


def test_a_file_from_before_outlives_a_failed_download(serve, tmp_path):
    path = tmp_path / "a.hdf5"
    path.write_bytes(b"before")
    with pytest.raises(smac.BadInput):
        smac.download(serve(b"", length=10), path)
    assert path.read_bytes() == b"before"


def test_two_runs_that_fetch_at_once_do_not_disturb_each_other(serve, body, tmp_path, monkeypatch):
    fetch, url, path = torch.hub.download_url_to_file, serve(body), tmp_path / "a.hdf5"

    def overtaken(*given):
        fetch(*given)
        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        with mock.patch("os.getpid", return_value=1):  # another run begins later and ends first
            smac.download(url, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", overtaken)
    smac.download(url, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == body


def test_a_file_in_place_of_the_dataset_folder_is_refused(serve, body, tmp_path):
    (tmp_path / "datasets").write_text("")
    with pytest.raises(smac.BadInput, match="Cannot download"):
        smac.download(serve(body), tmp_path / "datasets" / "a.hdf5")


def test_a_task_without_a_file_fetches_its_own(serve, body, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    url = serve(body).removesuffix("data.hdf5")
    task = dataclasses.replace(smac.TASKS["hopper-medium-v2"], url=url)
    raw = smac.read_dataset(task, None)
    assert [p.name for p in tmp_path.iterdir()] == ["hopper_medium-v2.hdf5"] and raw["actions"].shape[1] == 3
