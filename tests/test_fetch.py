import argparse
import email.utils
import hashlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from pipeline import archives, download, fetch, recipe
from tests.web_server import Site

ROOT = Path(__file__).parent.parent
BODY = random.Random(0).randbytes(300_000)
PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body></body></html>"


def sha(body):
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Site().running() as site:
        yield site


@pytest.fixture
def waits(monkeypatch):
    """Seconds that a download slept between two tries; it does not sleep them."""
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    return slept


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def get(urls, expected=None, target="file.bin"):
    target = Path(target)
    url = download.download([urls] if isinstance(urls, str) else urls, target, expected or download.Expected())
    assert not list(target.parent.glob("*.part*"))
    return target.read_bytes(), url


def known(body=BODY):
    return download.Expected(len(body), sha(body))


def begin(url, body, validator):
    """Leave a part behind, as a killed download does."""
    Path("file.bin.part").write_bytes(body)
    Path("file.bin.part.json").write_text(json.dumps({"url": url, "validator": validator}))


@pytest.mark.usefixtures("here")
class TestDownload:
    def test_a_file_comes_whole(self, site, waits):
        url = site.put("/file", BODY)
        assert get(url, known()) == (BODY, url)
        assert site.sent == [len(BODY)]
        assert site.encodings == ["identity"]  # a compressed file would have other sizes and ranges
        assert waits == []

    def test_a_file_whose_length_nobody_says(self, site, waits):
        url = site.put("/file", BODY, length=False, ranges=False)
        assert get(url, known())[0] == BODY
        with pytest.raises(ValueError, match=rf"\({url}: does not say where the file ends, 5 times in a row"):
            get(url)

    def test_a_length_that_is_said_when_more_is_asked_for(self, site, waits):
        assert get(site.put("/file", BODY, length=False))[0] == BODY
        assert site.requests == [("/file", None), ("/file", f"bytes={len(BODY)}-")]

    def test_chunks_say_where_the_file_ends(self, site, waits):
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:1000], BODY[1000:], b""))
        headers = {"Transfer-Encoding": "chunked"}
        url = site.put("/file", chunked, length=False, etag=None, headers=headers, cuts=[200_000])
        assert get(url)[0] == BODY
        assert site.sent == [200_000, len(chunked)]

    def test_what_lies_there_stays_until_the_new_one_is_whole(self, site, waits):
        Path("file.bin").write_bytes(b"old")
        with pytest.raises(ValueError, match="no address gave it"):
            get(site.put("/file", BODY), known(b"another"))
        assert Path("file.bin").read_bytes() == b"old"
        assert get(site.put("/file", BODY), known())[0] == BODY

    def test_cut_connections_go_on_where_they_were(self, site, waits):
        url = site.put("/file", BODY, cuts=[100_000, 50_000, 30_000])
        assert get(url)[0] == BODY
        assert [path for path, _ in site.requests] == ["/file"] * 4
        starts = [int(asked.removeprefix("bytes=").rstrip("-")) for _, asked in site.requests[1:]]
        for start, sent in zip(starts, (100_000, 150_000, 180_000), strict=True):
            assert sent - 3 * download.CHUNK < start <= sent
        assert sum(site.sent) <= len(BODY) + 3 * download.CHUNK

    def test_a_cut_that_looks_like_an_end(self, site, waits):
        url = site.put("/file", BODY, length=False, cuts=[50_000])
        begin(url, BODY[:100_000], site.files["/file"].etag)
        assert get(url)[0] == BODY
        assert [asked for _, asked in site.requests] == ["bytes=100000-", "bytes=150000-"]

    def test_a_first_cut_that_looks_like_an_end(self, site, waits):
        url = site.put("/file", BODY, length=False, cuts=[50_000])
        assert get(url)[0] == BODY
        assert [asked for _, asked in site.requests] == [None, "bytes=50000-"]

    def test_more_cuts_than_tries_do_not_matter_while_bytes_come(self, site, waits):
        assert get(site.put("/file", BODY, cuts=[25_000] * (2 * download.TRIES)))[0] == BODY
        assert waits == [1] * (2 * download.TRIES)

    def test_a_source_that_brings_nothing_is_given_up(self, site, waits):
        url = site.put("/file", BODY, cuts=[0] * 50)
        with pytest.raises(
            ValueError, match=rf"file.bin: no address gave it \({url}: the connection was cut .*5 times"
        ):
            get(url)
        assert len(site.requests) == download.TRIES
        assert waits == [2, 4, 8, 16]

    def test_a_server_that_ignores_the_range_starts_again(self, site, waits):
        url = site.put("/file", BODY, ranges=False, cuts=[200_000])
        assert get(url, known())[0] == BODY
        assert site.requests[1][1] is not None
        assert site.sent == [200_000, len(BODY)]

    def test_a_new_version_is_not_joined_to_the_old_part(self, site, waits):
        url = site.put("/file", BODY)
        begin(url, b"x" * 1000, '"old version"')
        assert get(url)[0] == BODY  # If-Range fails: the answer is the whole file
        assert site.requests == [("/file", "bytes=1000-")]

    def test_without_a_validator_or_checksum_nothing_is_joined(self, site, waits):
        url = site.put("/file", BODY, etag=None)
        begin(url, b"x" * 1000, None)
        assert get(url)[0] == BODY
        assert site.requests == [("/file", None)]

    def test_a_weak_etag_is_none(self, site, waits):
        url = site.put("/file", BODY, etag='W/"weak"', cuts=[100_000])
        assert get(url)[0] == BODY
        assert site.requests == [("/file", None), ("/file", None)]

    def test_a_part_of_another_file_is_found_by_the_checksum(self, site, waits):
        url = site.put("/file", BODY)
        begin("http://elsewhere", b"x" * 1000, None)
        assert get(url, known())[0] == BODY
        assert [asked for _, asked in site.requests] == ["bytes=1000-", None]

    def test_a_whole_part_asks_for_nothing(self, site, waits):
        url = site.put("/file", BODY)
        begin(url, BODY, None)
        assert get(url, known())[0] == BODY
        assert site.requests == []

    def test_416_on_a_whole_part_is_the_end(self, site, waits):
        url = site.put("/file", BODY)
        begin(url, BODY, site.files["/file"].etag)
        assert get(url)[0] == BODY
        assert site.requests == [("/file", f"bytes={len(BODY)}-")]
        assert sum(site.sent) == 0

    def test_416_on_a_stale_part_starts_again(self, site, waits):
        url = site.put("/file", BODY)
        begin(url, b"x" * (len(BODY) + 5), site.files["/file"].etag)
        assert get(url)[0] == BODY
        assert [asked for _, asked in site.requests] == [f"bytes={len(BODY) + 5}-", None]

    def test_429_and_503_wait_as_long_as_they_say(self, site, waits):
        later = email.utils.formatdate(time.time() + 60, usegmt=True)
        answers = [(429, {"Retry-After": "7"}), (503, {"Retry-After": later}), (429, {}), (500, {})]
        assert get(site.put("/file", BODY, answers=answers))[0] == BODY
        assert waits[0] == 7
        assert 55 < waits[1] <= 60
        assert waits[2:] == [8, 16]

    def test_a_server_really_is_left_alone_so_long(self, site):
        started = time.monotonic()
        assert get(site.put("/file", BODY, answers=[(429, {"Retry-After": "1"})]))[0] == BODY
        assert time.monotonic() - started >= 1

    def test_a_server_that_stays_busy_or_asks_too_much_is_passed_over(self, site, waits):
        busy = site.put("/busy", BODY, answers=[(429, {"Retry-After": "1"})] * 50)
        patient = site.put("/patient", BODY, answers=[(429, {"Retry-After": "3600"})])
        good = site.put("/good", BODY)
        assert get([busy, patient, good], known()) == (BODY, good)
        assert [path for path, _ in site.requests] == ["/busy"] * 5 + ["/patient", "/good"]
        assert waits == [1] * 4

    @pytest.mark.parametrize("wrong", [BODY[:-1], BODY[:-1] + bytes([BODY[-1] ^ 1])], ids=["size", "checksum"])
    def test_wrong_bytes_are_removed_and_the_next_mirror_tried(self, site, waits, wrong, capsys):
        bad, good = site.put("/bad", wrong), site.put("/good", BODY)
        assert get([bad, good], known()) == (BODY, good)
        assert [path for path, _ in site.requests] == ["/bad", "/good"]
        assert f"{bad}: " in capsys.readouterr().err
        with pytest.raises(ValueError, match=rf"no address gave it \({bad}: .*not .*put the file there by hand"):
            get(bad, known(), "other.bin")
        assert list(Path().glob("other.bin*")) == []

    def test_mirrors_in_their_order_and_only_as_far_as_needed(self, site, waits):
        urls = [site.address + "/gone", site.put("/one", BODY), site.put("/two", BODY)]
        assert get(urls, known()) == (BODY, urls[1])
        assert [path for path, _ in site.requests] == ["/gone", "/one"]

    def test_a_mirror_goes_on_where_another_was_cut_if_the_checksum_will_tell(self, site, waits):
        first, second = site.put("/one", BODY, cuts=[200_000] + [0] * 50), site.put("/two", BODY, etag='"other"')
        assert get([first, second], known()) == (BODY, second)
        assert site.requests[-1][0] == "/two"
        assert site.sent[-1] <= 100_000 + download.CHUNK

    def test_nobody_listens(self, here, waits):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(ValueError, match=r"no connection, or it was cut .*refused.*5 times in a row"):
                get(f"http://127.0.0.1:{unused.getsockname()[1]}/file")

    @pytest.mark.parametrize(
        ("kind", "before"), [("text/html; charset=utf-8", b"<!-- -->"), ("application/octet-stream", b"\n")]
    )
    def test_a_page_instead_of_the_file_is_named_and_not_kept(self, site, waits, kind, before):
        url = site.put("/file", before + PAGE, headers={"Content-Type": kind})
        page = r'sent a web page \("Google Drive - Virus scan warning"\) instead of the file'
        with pytest.raises(ValueError, match=page):
            get(url)
        with pytest.raises(ValueError, match=page):
            get(url, known())
        assert list(Path().iterdir()) == []

    def test_a_rest_that_begins_like_a_page_is_none(self, site, waits):
        body = BODY[:1000] + PAGE + BODY
        url = site.put("/file", body)
        begin(url, body[:1000], site.files["/file"].etag)
        assert get(url)[0] == body
        assert site.requests == [("/file", "bytes=1000-")]

    def test_a_rest_that_was_not_asked_for_is_not_appended(self, site, waits):
        assert get(site.put("/file", BODY, cuts=[200_000], shift=[7]))[0] == BODY
        assert [bool(asked) for _, asked in site.requests] == [False, True, False]

    @pytest.mark.parametrize("other", [PAGE, BODY + b"more"], ids=["page", "size"])
    def test_what_is_seen_to_be_wrong_at_once_does_not_cost_the_part(self, site, waits, other):
        drive, mirror = site.put("/drive", other, ranges=False), site.put("/mirror", BODY)
        begin(mirror, BODY[:200_000], site.files["/mirror"].etag)
        assert get([drive, mirror], known()) == (BODY, mirror)
        assert site.requests[-1] == ("/mirror", "bytes=200000-")
        assert site.sent[-1] == 100_000


def manifest(monkeypatch, **assets):
    """Assets of one file each: name -> (path, urls, body whose checksum is published or None, into)."""
    tree = {
        name: {
            "about": f"the {name}",
            "licence": "MIT-0",
            "use": f"{name}=yes",
            "files": [
                {
                    "path": path,
                    "urls": urls,
                    "size": len(body) if body else None,
                    "sha256": sha(body) if body else None,
                    "into": into,
                }
            ],
        }
        for name, (path, urls, body, into) in assets.items()
    }
    file = Path("assets.yaml").absolute()
    file.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(fetch, "ASSETS", file)


def tool(*arguments):
    parser = argparse.ArgumentParser()
    fetch.add_arguments(parser)
    return fetch.main(parser.parse_args(arguments))


def zipped(members):
    with zipfile.ZipFile("made.zip", "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    body = Path("made.zip").read_bytes()
    Path("made.zip").unlink()
    return body


@pytest.mark.usefixtures("here", "waits")
class TestTool:
    def test_the_licence_comes_before_the_download_and_the_key_after(self, site, monkeypatch, capsys):
        manifest(monkeypatch, one=("sub/one.bin", [site.put("/one", BODY)], BODY, None))
        shown = []

        def watched(*given):
            shown.append(capsys.readouterr().out)
            return download.download(*given)

        monkeypatch.setattr(fetch, "download", watched)
        assert tool("one") == 0
        assert "one: the one. Licence: MIT-0." in shown[0]
        assert "one is here: one=yes" in capsys.readouterr().out
        assert Path("data/sub/one.bin").read_bytes() == BODY

    def test_what_is_here_is_not_fetched_again(self, site, monkeypatch):
        manifest(monkeypatch, one=("one.bin", [site.put("/one", BODY)], None, None))
        assert tool("one") == tool("one") == 0
        assert len(site.requests) == 1

    def test_the_first_download_is_recorded_and_another_one_refused(self, site, monkeypatch):
        url = site.put("/one", BODY)
        manifest(monkeypatch, one=("one.bin", [url], None, None))
        tool("one")
        lock = json.loads(Path("data/assets.lock.json").read_text())
        assert lock == {
            "one.bin": {"size": len(BODY), "sha256": sha(BODY), "url": url, "date": time.strftime("%Y-%m-%d")}
        }
        for changed in (BODY[::-1], BODY + b"more"):
            Path("data/one.bin").unlink(missing_ok=True)
            site.put("/one", changed)
            with pytest.raises(
                ValueError, match=r"recorded on .* from http.*; if a new version is wanted, delete its entry"
            ):
                tool("one")
            assert not Path("data/one.bin").exists()
        Path("data/assets.lock.json").unlink()
        assert tool("one") == 0
        assert Path("data/one.bin").read_bytes() == BODY + b"more"

    def test_a_cut_that_looks_like_an_end_is_not_recorded(self, site, monkeypatch):
        body = json.dumps(["an expert"] * 1000).encode()
        cut = site.put("/cut", body, length=False, etag=None, cuts=[5000] * 2)
        manifest(monkeypatch, one=("one.json", [cut], None, None))
        with pytest.raises(ValueError, match=rf"{cut}: sent the wrong bytes \(no whole JSON: .*char"):
            tool("one")
        assert not list(Path("data").glob("*.json*"))
        manifest(monkeypatch, one=("one.json", [cut, site.put("/whole", body, length=False)], None, None))
        assert tool("one") == 0
        assert Path("data/one.json").read_bytes() == body
        assert json.loads(fetch.LOCK.read_text())["one.json"]["sha256"] == sha(body)

    def test_half_a_file_brought_by_hand_is_not_recorded(self, monkeypatch):
        manifest(monkeypatch, one=("one.json", ["http://x"], None, None))
        Path("data").mkdir()
        Path("data/one.json").write_text('["an expert", "an')
        with pytest.raises(ValueError, match=r"one.json is not the file that it should be \(no whole JSON: .*delete"):
            tool("one", "--offline")
        assert not fetch.LOCK.exists()

    def test_a_published_checksum_holds_from_the_first_time(self, site, monkeypatch):
        manifest(monkeypatch, one=("one.bin", [site.put("/one", BODY[::-1])], BODY, None))
        with pytest.raises(ValueError, match=r"sent the wrong bytes \(SHA-256 .*, as assets.yaml has it"):
            tool("one")
        assert not Path("data/assets.lock.json").exists()

    def test_offline_opens_no_socket_and_says_what_is_missing(self, site, monkeypatch, capsys):
        manifest(
            monkeypatch,
            one=("one.bin", [site.put("/one", BODY)], BODY, None),
            two=("two.bin", [site.put("/two", BODY)], None, None),
            three=("three.bin", [site.put("/three", BODY)], None, None),
        )
        Path("data").mkdir()
        Path("data/one.bin").write_bytes(BODY)

        def forbidden(*_, **__):
            raise AssertionError("a socket was opened")

        monkeypatch.setattr(socket, "socket", forbidden)
        with pytest.raises(AssertionError, match="a socket was opened"):
            tool("two")
        capsys.readouterr()
        assert tool("one", "--offline") == 0
        assert tool("one", "two", "three", "--offline") == 1
        said = capsys.readouterr().out
        assert "data/two.bin is missing" in said
        assert "data/three.bin is missing" in said
        assert "data/one.bin" not in said
        assert tool() == tool("--verify") == 0
        with pytest.raises(ValueError, match="name what has to be here"):
            tool("--offline")

    def test_a_file_brought_by_hand_is_checked_or_recorded(self, site, monkeypatch):
        manifest(monkeypatch, one=("one.bin", ["http://x"], BODY, None), two=("two.bin", ["http://x"], None, None))
        Path("data").mkdir()
        Path("data/one.bin").write_bytes(BODY[::-1])
        Path("data/two.bin").write_bytes(BODY)
        with pytest.raises(
            ValueError, match=r"data/one.bin is not the file that it should be \(SHA-256.*delete or rename"
        ):
            tool("one")
        assert Path("data/one.bin").read_bytes() == BODY[::-1]
        assert tool("two") == 0
        assert json.loads(Path("data/assets.lock.json").read_text())["two.bin"]["url"] is None

    def test_verify_finds_a_changed_byte(self, site, monkeypatch, capsys):
        manifest(
            monkeypatch,
            one=("one.bin", [site.put("/one", BODY)], BODY, None),
            two=("two.bin", [site.put("/two", BODY)], None, None),
        )
        tool("two")
        assert tool("--verify") == 0
        assert tool("--verify", "one") == 1
        assert "data/one.bin is missing" in capsys.readouterr().out
        Path("data/two.bin").write_bytes(BODY[::-1])
        assert tool("two") == 0  # of the same size: only --verify reads it again
        assert tool("--verify") == 1
        assert "two: data/two.bin is wrong: SHA-256" in capsys.readouterr().out
        assert len(site.requests) == 1

    def test_the_list_says_what_is_here(self, site, monkeypatch, capsys):
        manifest(
            monkeypatch,
            one=("one.bin", [site.put("/one", BODY)], BODY, None),
            two=("two.bin", [site.put("/two", BODY)], None, None),
        )
        tool("one")
        Path("data/two.bin.part").write_bytes(BODY[:1000])
        capsys.readouterr()
        assert tool() == 0
        one, two = (line for line in capsys.readouterr().out.splitlines() if "the " in line)
        assert [cell.strip() for cell in one.split("│")] == ["one", "the one", "300 kB", "MIT-0", "here"]
        assert [cell.strip() for cell in two.split("│")] == [
            "two",
            "the two",
            "not known",
            "MIT-0",
            "0 of 1 files and 1 kB",
        ]
        Path("data/one.bin").write_bytes(b"short")
        tool()
        assert "wrong, see --verify" in capsys.readouterr().out

    def test_an_unknown_name(self, monkeypatch):
        with pytest.raises(ValueError, match="no 'webshp-small'; did you mean 'webshop-small'"):
            tool("webshp-small")

    def test_two_at_once_do_not_write_one_part(self, site, monkeypatch):
        manifest(monkeypatch, one=("one.bin", [site.put("/one", BODY)], BODY, None))
        with fetch._alone(), pytest.raises(ValueError, match="Another process fetches into"):
            tool("one")

    def test_an_archive_is_unpacked_beside_what_is_there(self, site, monkeypatch, capsys):
        body = zipped({"a/one.txt": "one", "a/b/two.txt": "two", "three.txt": "three"})
        manifest(monkeypatch, games=("games.zip", [site.put("/games", body)], None, "games"))
        Path("data/games/a").mkdir(parents=True)
        Path("data/games/mine.txt").write_text("mine")
        Path("data/games/a/one.txt").write_text("one")
        before = Path("data/games/a/one.txt").stat().st_mtime_ns
        assert tool("games") == 0
        assert Path("data/games/a/b/two.txt").read_text() == "two"
        assert Path("data/games/mine.txt").read_text() == "mine"
        assert Path("data/games/a/one.txt").stat().st_mtime_ns == before
        assert tool("--verify") == 0
        Path("data/games/three.txt").unlink()
        assert tool("--verify") == 1
        tool()
        assert "here, not all unpacked" in capsys.readouterr().out
        assert tool("games", "--offline") == 0
        Path("data/games/three.txt").write_text("THREE")
        assert tool("--verify") == 1
        assert "data/games/three.txt is missing or was changed" in capsys.readouterr().out
        Path("data/games/three.txt").write_text("another file")
        with pytest.raises(ValueError, match=r"three.txt is not what the archive has there; delete or rename it"):
            tool("games")

    def test_a_file_that_is_no_archive_is_not_recorded(self, site, monkeypatch):
        manifest(monkeypatch, games=("games.zip", [site.put("/games", BODY)], None, "games"))
        with pytest.raises(ValueError, match=r"games.zip is no whole zip archive .*; delete it and fetch it again"):
            tool("games")
        assert not Path("data/assets.lock.json").exists()

    @pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "/tmp/outside.txt", "..\\outside.txt"])
    def test_an_archive_stays_in_its_folder(self, name):
        Path("bad.zip").write_bytes(zipped({"fine.txt": "fine", name: "bad"}))
        with pytest.raises(ValueError, match=r"leads out of the folder; not unpacked"):
            archives.unpack(Path("bad.zip"), Path("into"))
        assert not Path("into").exists()
        assert not Path("outside.txt").exists()

    def test_an_archive_follows_no_link(self):
        Path("into").mkdir()
        Path("elsewhere").mkdir()
        Path("into/link").symlink_to(Path("elsewhere").absolute())
        Path("bad.zip").write_bytes(zipped({"link/file.txt": "bad"}))
        with pytest.raises(ValueError, match="leads out of into through a link"):
            archives.unpack(Path("bad.zip"), Path("into"))
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        Path("bad.zip").write_bytes(zipped({link: "/etc"}))
        with pytest.raises(ValueError, match="leads out of the folder"):
            archives.unpack(Path("bad.zip"), Path("into"))
        assert list(Path("elsewhere").iterdir()) == []


def test_a_killed_fetch_goes_on_with_the_bytes_that_it_had(site, here, monkeypatch):
    gate = threading.Event()
    url = site.put("/one", BODY, gate=gate)
    manifest(monkeypatch, one=("one.bin", [url], None, None))
    script = (
        "import sys; from pathlib import Path; from pipeline import __main__, fetch; "
        "fetch.ASSETS = Path('assets.yaml'); sys.exit(__main__.main(['fetch', 'one']))"
    )
    command = [sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    part = here / "data" / "one.bin.part"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not part.exists() or part.stat().st_size < 100_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    assert 100_000 <= kept < len(BODY)
    assert not (here / "data" / "one.bin").exists()
    gate.set()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (here / "data" / "one.bin").read_bytes() == BODY
    assert site.requests == [("/one", None), ("/one", f"bytes={kept}-")]
    assert site.sent[1] == len(BODY) - kept


class TestAssets:
    def test_the_list_is_well_formed(self):
        for name, asset in fetch.load().items():
            for file in asset.files:
                assert all(url.startswith("https://") for url in file.urls), name
                assert len(set(file.urls)) == len(file.urls), name

    def test_a_path_is_one_file_wherever_it_is_named(self):
        seen = {}
        for asset in fetch.load().values():
            for file in asset.files:
                facts = (file.urls, file.size, file.sha256)
                assert seen.setdefault(file.path, facts) == facts

    def test_the_keys_that_it_names_read_the_files_that_it_fetches(self):
        for name, asset in fetch.load().items():
            env = name.partition("-")[0]
            recipe.load("tiny", [f"env={env}", *asset.use.split()])
            named = Path(asset.use.split()[-1].partition("=")[2])
            for file in asset.files:
                assert named in (file.place, file.place.parent, fetch.DATA / (file.into or "")), name

    @pytest.mark.parametrize(
        "wrong", [{"path": "../x"}, {"path": "/x"}, {"sha256": "abc"}, {"urls": []}, {"mirror": 1}]
    )
    def test_a_malformed_list_is_one_sentence(self, here, monkeypatch, wrong):
        manifest(monkeypatch, one=("one.bin", ["http://x"], None, None))
        tree = yaml.safe_load(Path("assets.yaml").read_text())
        tree["one"]["files"][0].update(wrong)
        Path("assets.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(ValueError, match=rf"assets.yaml: one.files.0.{next(iter(wrong))}: "):
            fetch.load()

    def test_every_command_that_is_advised_exists(self):
        files = [*ROOT.glob("*.md"), ROOT / "data/README.md", *ROOT.glob("envs/**/*.py"), *ROOT.glob("pipeline/*.py")]
        advised = {
            name
            for file in files
            for name in re.findall(r'pipeline fetch (?:"\s*")?([a-z][a-z-]+)', file.read_text("utf-8"))
        }
        assert {"sciworld-splits", "alfworld-games", "webshop-full"} <= advised
        assert advised <= set(fetch.load())
