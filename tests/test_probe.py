"""probe: canaries on this kernel, and what each failure is said to mean."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from loader import probe
from loader.errors import KernelSupportError
from loader.planes import canary, needs
from loader.planes.canary import CanaryFailed, CanaryImage, check_reads
from loader.planes.needs import ANOTHER_KERNEL, OTHER_FORM, explain
from mounts import mountinfo


def failure(step: str, number: int | None, text: str = "no") -> CanaryFailed:
    return CanaryFailed(step, text, OSError(number, text) if number else None)


@pytest.mark.parametrize(
    ("plane", "form", "failed", "names"),
    [
        ("fanotify", Form.ENCODED, failure("group", errno.EPERM), "CAP_SYS_ADMIN"),
        ("fanotify", Form.ENCODED, failure("group", errno.ENOSYS), "CONFIG_FANOTIFY_ACCESS_PERMISSIONS"),
        ("fanotify", Form.ENCODED, failure("mark", errno.EINVAL), "FAN_PRE_ACCESS"),
        ("fanotify", Form.ENCODED, failure("mark", errno.EOPNOTSUPP), "file system with pre-content events"),
        ("fanotify", Form.DECODED, failure("mount", errno.ENODEV), "CONFIG_EROFS_FS"),
        ("fanotify", Form.DECODED, failure("mount", errno.ENOTBLK), "CONFIG_EROFS_FS_BACKED_BY_FILE"),
        ("fanotify", Form.ENCODED, failure("mount", errno.EOPNOTSUPP), "CONFIG_EROFS_FS_ZIP_ZSTD"),
        ("cachefiles", Form.ENCODED, failure("device", errno.ENOENT), "CONFIG_CACHEFILES"),
        ("cachefiles", Form.ENCODED, failure("device", errno.EBUSY), "another daemon"),
        ("cachefiles", Form.DECODED, failure("bind", errno.EOPNOTSUPP), "CONFIG_CACHEFILES_ONDEMAND"),
        ("cachefiles", Form.DECODED, failure("fsid", errno.EOPNOTSUPP), "CONFIG_EROFS_FS_ONDEMAND"),
        ("cachefiles", Form.DECODED, failure("mount", errno.ENOENT), "CONFIG_EROFS_FS_ONDEMAND"),
        ("cachefiles", Form.ENCODED, failure("mount", errno.EINVAL, "unsupported algorithms"), "ZIP_ZSTD"),
        ("cachefiles", Form.DECODED, failure("read", None, "wrong bytes"), "wrong bytes"),
    ],
)
def test_failures_are_explained(plane: str, form: Form, failed: CanaryFailed, names: str, tmp_path: Path) -> None:
    missing = explain(failed, plane, form, tmp_path)
    assert names in missing.what
    assert missing.remedy


@pytest.mark.parametrize(
    ("running", "advice"),
    [("6.12.117", "modprobe"), ("7.1.7-rc1", "modprobe"), ("7.1.8", "6.14"), ("7.3.4+deb13-cloud", "6.14")],
)
def test_a_module_is_not_advised_where_it_cannot_help(
    running: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tuple(os.uname())
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*numbers[:2], running, *numbers[3:])))
    missing = explain(failure("device", errno.ENOENT), "cachefiles", Form.DECODED, tmp_path)
    assert advice in missing.remedy
    assert ("modprobe" in missing.remedy) == (advice == "modprobe")


@pytest.mark.parametrize(("built", "advised"), [("=y", True), (" is not set", False)])
def test_a_module_is_not_advised_where_the_kernel_was_built_without_the_mode(
    built: str, advised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's own kernels: they have the module, which then helps nobody."""
    monkeypatch.setattr(needs, "release", lambda: (6, 1, 192))
    monkeypatch.setattr(Path, "read_text", lambda path: f"CONFIG_CACHEFILES=m\nCONFIG_CACHEFILES_ONDEMAND{built}\n")
    missing = explain(failure("device", errno.ENOENT), "cachefiles", Form.DECODED, tmp_path)
    assert ("modprobe" in missing.remedy) is advised
    assert ("on-demand mode" in missing.what) is not advised


def finding(plane: str, form: Form, remedy: str | None) -> probe.Finding:
    """Of a combination that works, or that lacks something with this remedy."""
    return probe.Finding(plane, form, remedy is None, 0.1, remedy and f"what {plane} needs", remedy)


def findings(*remedies: str | None) -> list[probe.Finding]:
    """One for each combination, in order of preference."""
    return [finding(*one, remedy) for one, remedy in zip(probe.COMBINATIONS, remedies, strict=True)]


@pytest.mark.parametrize(
    ("remedies", "advice"),
    [
        ((None, "modprobe", None, "modprobe"), None),
        ((OTHER_FORM, "modprobe", None, "modprobe"), None),
        ((ANOTHER_KERNEL, None, ANOTHER_KERNEL, None), None),
        ((ANOTHER_KERNEL, OTHER_FORM, ANOTHER_KERNEL, None), None),
        (("--root", None, "--root", None), "--root"),
        ((ANOTHER_KERNEL,) * 4, ANOTHER_KERNEL),
        ((ANOTHER_KERNEL, OTHER_FORM, ANOTHER_KERNEL, ANOTHER_KERNEL), ANOTHER_KERNEL),
        ((ANOTHER_KERNEL, "modprobe", ANOTHER_KERNEL, "modprobe"), "modprobe"),
    ],
)
def test_there_is_one_remedy_and_only_where_one_is_needed(remedies: tuple[str | None, ...], advice: str | None) -> None:
    assert probe.remedy(findings(*remedies)) == advice


def test_no_support_names_every_need() -> None:
    error = probe.no_support(findings(*[ANOTHER_KERNEL] * 4))
    assert error.exit_code == 13
    assert "fanotify, encoded: needs what fanotify needs" in str(error)
    assert "cachefiles, decoded: needs what cachefiles needs" in str(error)
    assert error.hint == ANOTHER_KERNEL


@pytest.mark.parametrize("works", [True, False])
def test_the_other_plane_is_named_only_if_it_works(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe_one(root: Path, plane: str, form: Form) -> probe.Finding:
        return finding(plane, form, None if works and plane == "fanotify" else ANOTHER_KERNEL)

    monkeypatch.setattr(probe, "probe_one", probe_one)
    with pytest.raises(KernelSupportError) as caught:
        probe.choose(tmp_path, "cachefiles")
    assert caught.value.hint == ("the fanotify plane with the encoded form works here" if works else ANOTHER_KERNEL)


def test_the_canary_image_is_the_same_every_time() -> None:
    for form in Form:
        assert CanaryImage.make(form) == CanaryImage.make(form)


def test_a_reader_that_is_not_asked_about_is_noticed(tmp_path: Path) -> None:
    image = CanaryImage.make(Form.DECODED)
    (tmp_path / "large").write_bytes(image.files["large"])
    with pytest.raises(CanaryFailed, match="without asking"):
        check_reads(image, tmp_path, lambda refuse: False)
    with pytest.raises(CanaryFailed, match="refused read gave data"):
        check_reads(image, tmp_path, lambda refuse: True)


def test_wrong_bytes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = CanaryImage.make(Form.DECODED)
    monkeypatch.setattr(canary, "_read", lambda path, serve, refuse: (True, refuse, bytes(len(image.files["large"]))))
    with pytest.raises(CanaryFailed, match="wrong bytes"):
        check_reads(image, tmp_path, lambda refuse: True)


@pytest.mark.root
def test_probe_finds_what_works(tmp_path: Path) -> None:
    found = {(item.plane, item.form): item for item in probe.probe(tmp_path / "root")}
    assert set(found) == set(probe.COMBINATIONS)
    for item in found.values():
        assert item.works or (item.missing and item.remedy and item.detail)
        assert item.to_json()["works"] is item.works
    assert list((tmp_path / "root").iterdir()) == []
    assert not any(mount.target.startswith(str(tmp_path)) for mount in mountinfo("erofs"))


@pytest.mark.root
def test_choose_takes_the_first_that_works(tmp_path: Path) -> None:
    working = [(item.plane, item.form) for item in probe.probe(tmp_path) if item.works]
    if not working:
        with pytest.raises(KernelSupportError):
            probe.choose(tmp_path)
        return
    found = probe.choose(tmp_path)
    assert (found.plane, found.form) == working[0]
    plane, form = working[-1]
    found = probe.choose(tmp_path, plane, form.value)
    assert (found.plane, found.form) == (plane, form)


@pytest.mark.root
def test_a_file_system_without_pre_content_events() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        with pytest.raises(KernelSupportError) as caught:
            probe.choose(Path(directory), "fanotify", "decoded")
    assert "tmpfs" in str(caught.value)
    assert caught.value.hint is not None and "--root" in caught.value.hint
