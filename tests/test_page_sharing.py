"""Which domain a mount shares page cache in, and what is recorded of it; that kernels do it is vm-tests' to show."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.erofs.layout import BLOCK, Superblock
from erofs_builder.erofs.sharing import announce_fingerprints
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.layer import Options
from erofs_builder.payload import Form
from loader.cache.ready import boot_id
from loader.cache.state import ImageRecord, MountRecord, State
from loader.cli.loader_serve import CHOICE, resolved
from loader.config import Config, load_config
from loader.convert.convert import Request, convert
from loader.errors import KernelSupportError, NotFoundError, UsageError
from loader.planes import canary
from loader.planes.canary import CanaryFailed, CanaryImage, check_sharing
from loader.probe import Finding, probe_one
from loader.registry.config import RegistryConfig
from loader.worker.images import canonical
from loader.worker.sharing import OFF, PageSharing, owner_domain
from tests.support import odd_tree
from tests.support.daemon import Daemon, make_tree, read_all

IMAGE = Digest.of(b"image")
ON = Options(fingerprints=1, threads=1)


@pytest.fixture(scope="module")
def carrying() -> bytes:
    """Metadata with fingerprints."""
    odd = odd_tree.build(5)
    return write_metadata(odd.root, Form.DECODED, [sample.blob for sample in odd.samples]).erofs


@pytest.fixture(scope="module")
def bare() -> bytes:
    """Metadata without."""
    return write_metadata(odd_tree._directory(), Form.DECODED, []).erofs


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("debian", "@docker.io/library"),
        ("docker://docker.io/alice/app:1", "@docker.io/alice"),
        (f"docker://ghcr.io/org/team/app@{IMAGE}", "@ghcr.io/org/team"),
        ("docker://[::1]:5000/app:1", "@[::1]:5000/app"),
        ("", f"@{IMAGE}"),
    ],
)
def test_owners(name: str, domain: str) -> None:
    assert owner_domain(canonical(name) if name else "", IMAGE) == domain


def test_owners_of_files_and_long_names(tmp_path: Path) -> None:
    names = [f"oci:{tmp_path}/a", f"oci:{tmp_path}/b", f"oci-archive:{tmp_path}/a,b.tar"]
    names.append(f"docker://r.example/{'x' * 220}/y")
    domains = [owner_domain(canonical(name), IMAGE) for name in names]
    assert len(set(domains)) == 4
    assert all(re.fullmatch("@[0-9a-f]{64}", domain) for domain in domains)
    assert owner_domain(canonical(f"oci:{tmp_path}/a:tag"), IMAGE) == domains[0]


def test_policies(carrying: bytes, bare: bytes, tmp_path: Path) -> None:
    auto, named, off = (PageSharing(policy, tmp_path) for policy in ("auto", "fleet", "off"))
    assert auto.domain(Form.ENCODED, carrying, "docker://r.example/a/b:1", IMAGE) == "@r.example/a"
    assert named.domain(Form.ENCODED, carrying, "docker://r.example/a/b:1", IMAGE) == "fleet"
    assert named.domain(Form.ENCODED, carrying, "docker://r.example/a/b:1", IMAGE, "auto") == "@r.example/a"
    assert off.domain(Form.ENCODED, carrying, "docker://r.example/a/b:1", IMAGE, "auto") is None
    assert off.domain(Form.ENCODED, carrying, "docker://r.example/a/b:1", IMAGE) is None
    assert auto.domain(Form.DECODED, carrying, "docker://r.example/a/b:1", IMAGE) is None
    assert auto.again(Form.DECODED, carrying, "mine") is None
    with pytest.raises(UsageError, match="decoded"):
        auto.domain(Form.DECODED, carrying, "", IMAGE, "mine")
    assert auto.domain(Form.ENCODED, bare, "docker://r.example/a/b:1", IMAGE) is None
    assert auto.domain(Form.ENCODED, carrying, "", IMAGE, "mine") == "mine"
    assert auto.domain(Form.ENCODED, carrying, "", IMAGE, OFF) is None
    with pytest.raises(KernelSupportError):
        off.domain(Form.ENCODED, carrying, "", IMAGE, "mine")
    with pytest.raises(NotFoundError, match="fingerprints"):
        auto.domain(Form.ENCODED, bare, "", IMAGE, "mine")
    for name in ("@r.example/a", "a,b", "", "a b", "x" * 101, "é"):
        if name:
            with pytest.raises(UsageError):
                auto.domain(Form.ENCODED, carrying, "", IMAGE, name)
    assert [pages.again(Form.ENCODED, carrying, "mine") for pages in (auto, named, off)] == ["mine", "mine", None]
    assert auto.again(Form.ENCODED, bare, "mine") is None and auto.again(Form.ENCODED, carrying, None) is None


def test_the_copy_is_beside_the_payload_and_made_again_when_it_is_not_right(carrying: bytes, tmp_path: Path) -> None:
    payload = tmp_path / "encoded.payload"
    payload.write_bytes(carrying)
    pages = PageSharing("auto", tmp_path)
    copy = pages.announced(payload)
    assert copy == tmp_path / "encoded.shared"
    assert copy.read_bytes() == announce_fingerprints(carrying) + carrying[BLOCK:]
    assert Superblock.unpack_from(copy.read_bytes()).xattr_prefix_count == 1
    before = copy.stat().st_ino
    assert pages.announced(payload).stat().st_ino == before
    copy.write_bytes(bytes(len(carrying)))  # torn by a crash
    assert pages.announced(payload).read_bytes()[:BLOCK] == announce_fingerprints(carrying)
    assert payload.read_bytes() == carrying


def test_the_domain_is_recorded_where_earlier_versions_do_not_look(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    state.add_image(ImageRecord(IMAGE, "n", "s", 1, ()), Form.ENCODED, IMAGE)
    mount = MountRecord("/a", IMAGE, Form.ENCODED, "fanotify", None, 1.0, "boot", "@r.example/a")
    plain = MountRecord("/b", IMAGE, Form.ENCODED, "fanotify", None, 2.0, "boot")
    state.add_mount(mount)
    state.add_mount(plain)
    assert state.mounts() == [mount, plain]
    state.remove_mount("/a")
    state.add_mount(MountRecord("/a", IMAGE, Form.ENCODED, "fanotify", None, 1.0, "boot"))
    assert [record.domain for record in state.mounts()] == [None, None]
    state.close()
    database = sqlite3.connect(tmp_path / "state.db")
    assert len(database.execute("SELECT * FROM mounts").fetchone()) == 7
    assert database.execute("PRAGMA user_version").fetchone() == (1,)
    database.execute("DROP TABLE page_domains")
    database.close()
    assert len(State(tmp_path / "state.db").mounts()) == 2


def test_configuration(tmp_path: Path) -> None:
    assert Config().page_domain == "auto"
    file = tmp_path / "config.toml"
    for value in ("auto", "off", "fleet-7/prod"):
        file.write_text(f'page_domain = "{value}"\n')
        assert load_config(file, {}).page_domain == value
    for value in ('"@a"', '"a,b"', "7", '""'):
        file.write_text(f"page_domain = {value}\n")
        with pytest.raises(UsageError, match="page_domain"):
            load_config(file, {})


@pytest.mark.parametrize(("shares", "policy"), [(True, "fleet"), (False, "off")])
def test_a_kernel_that_cannot_share_is_not_asked_to(
    shares: bool, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Finding("fanotify", Form.ENCODED, True, 0.0, shares=shares)
    monkeypatch.setattr("loader.cli.loader_serve.choose", lambda *_: found)
    config = Config(root=tmp_path, page_domain="fleet")
    assert resolved(config).page_domain == policy
    monkeypatch.setattr("loader.cli.loader_serve.choose", lambda *_: pytest.fail("what was found is kept"))
    assert resolved(config).page_domain == policy


Reads = dict[str, tuple[bool, bool]]  # mount → asked, failed


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ({"one": (True, False), "two": (False, False), "other": (True, True)}, None),
        ({"one": (True, False), "two": (True, True), "other": (True, True)}, "to itself"),
        ({"one": (True, False), "two": (False, False), "other": (False, False)}, "another domain"),
        ({"one": (True, True), "two": (False, False), "other": (True, True)}, "an error"),
    ],
)
def test_what_a_canary_sees(reads: Reads, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = CanaryImage.make(Form.ENCODED)

    def read(path: Path, serve: object, *, refuse: bool) -> tuple[bool, bool, bytes]:
        return (*reads[path.parent.name], image.files[path.name])

    monkeypatch.setattr(canary, "_read", read)
    targets = (tmp_path / "one", tmp_path / "two", tmp_path / "other")
    if message is None:
        check_sharing(image, targets, lambda refuse: True)
        return
    with pytest.raises(CanaryFailed, match=message):
        check_sharing(image, targets, lambda refuse: True)


@pytest.mark.root
def test_probe_says_whether_pages_are_shared(tmp_path: Path) -> None:
    for form in Form:
        finding = probe_one(tmp_path, "fanotify", form)
        assert finding.works
        assert finding.shares == (finding.not_shared is None)
        expected = "PAGE_CACHE_SHARE" if form is Form.ENCODED else "the encoded form"
        assert finding.shares or expected in str(finding.not_shared)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
@pytest.mark.timeout(240)
def test_a_kernel_that_refuses_to_share_still_mounts(tmp_path: Path) -> None:
    """What was found at boot says that images share; this kernel refuses the option, or shares."""
    digests = make_tree(tmp_path / "tree")
    for name, options in (("one", ON), ("bare", Options(threads=1))):
        convert(Request(f"rootfs:{tmp_path / 'tree'}", f"oci:{tmp_path / name}:1", options=options), RegistryConfig())
    (tmp_path / "root").mkdir()
    choice = {"boot": boot_id().hex(), "plane": "fanotify", "form": "encoded", "shares": True}
    (tmp_path / "root" / CHOICE).write_text(json.dumps(choice))
    with Daemon(tmp_path, "--form", "encoded") as daemon:
        assert daemon.command("status")["page_domain"] == "auto"
        assert read_all(daemon.mount(f"oci:{tmp_path}/one:1")) == digests
        shares = "domain" in daemon.command("mount", f"oci:{tmp_path}/one:1", str(tmp_path / "mnt"))
        for name in ("asked", "other"):
            (tmp_path / name).mkdir()
        asked = daemon.run("mount", f"oci:{tmp_path}/one:1", str(tmp_path / "asked"), "--domain", "mine")
        assert asked.returncode == (0 if shares else 13), asked.stderr
        bare = daemon.run("mount", f"oci:{tmp_path}/bare:1", str(tmp_path / "other"), "--domain", "yours")
        assert bare.returncode == 10 and "--fingerprints" in bare.stderr
        if not shares:
            assert "page cache is not shared in @" in daemon.log.read_text()
