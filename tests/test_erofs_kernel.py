"""What the EROFS writer makes, read by others: the kernel's own EROFS, and fsck.erofs of erofs-utils 1.9.

The reference is a Node tree of everything EROFS can hold, and a directory on disk both as it is and through an image
that mkfs.erofs made of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.erofs import indexes
from erofs_builder.erofs.flat import write_flat
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.model import Extent, Node
from erofs_builder.payload import Form
from mounts import mount_erofs, mountinfo, umount2
from mounts.syscalls import MNT_DETACH
from tests.support import erofs_utils, odd_tree
from tests.support.odd_tree import ACL, CAPABILITY
from tests.support.sample_blobs import SampleBlob
from tests.support.treediff import compare, scan
from tests.support.walk_nodes import walk

pytestmark = pytest.mark.root
SKIPPABLE = b"\x50\x2a\x4d\x18"
FRAME_HEADER_MAX = 14
forms = pytest.mark.parametrize("form", Form, ids=lambda form: form.value)


@contextlib.contextmanager
def mounted(source: Path, devices: list[Path], target: Path) -> Iterator[Path]:
    """A file-backed mount of files that are complete; gone at the end whatever happens."""
    target.mkdir(exist_ok=True)
    try:
        mount_erofs(source, devices, ["cache_strategy=disabled"], target)
        yield target
    finally:
        while any(mount.target == str(target) for mount in mountinfo("erofs")):
            umount2(target, MNT_DETACH)


@contextlib.contextmanager
def served(root: Node, form: Form, samples: list[SampleBlob], place: Path) -> Iterator[Path]:
    """The tree written in a form, with a device per blob, and mounted."""
    place.mkdir(exist_ok=True)
    metadata = write_metadata(root, form, [sample.blob for sample in samples])
    (place / "metadata").write_bytes(metadata.erofs)
    devices = []
    for number, sample in enumerate(samples):
        if sample.blob in metadata.blobs:
            devices.append(place / f"blob-{number}")
            devices[-1].write_bytes(sample.encoded if form is Form.ENCODED else sample.decoded)
    with mounted(place / "metadata", devices, place / "mnt") as target:
        yield target


def flat_file(root: Node, form: Form, samples: list[SampleBlob], path: Path) -> Path:
    encoded = {sample.blob: bytes(sample.encoded) for sample in samples}
    with open(path, "wb") as out:
        write_flat(root, form, list(encoded), lambda blob: io.BytesIO(encoded[blob]), out)
    return path


@pytest.fixture(scope="module")
def odd() -> odd_tree.OddTree:
    return odd_tree.build(entries=50_000)


@forms
def test_kernel_reads_everything(odd: odd_tree.OddTree, form: Form, tmp_path: Path) -> None:
    with served(odd.root, form, odd.samples, tmp_path) as target:
        assert compare(odd.expected(), scan(target)) == []


@forms
def test_kernel_reads_the_flat_file_alone(odd: odd_tree.OddTree, form: Form, tmp_path: Path) -> None:
    flat = flat_file(odd.root, form, odd.samples, tmp_path / "flat.erofs")
    with mounted(flat, [], tmp_path / "mnt") as target:
        assert compare(odd.expected(), scan(target)) == []


def test_kernel_reads_large_logical_clusters(
    odd: odd_tree.OddTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "SMALL_CLUSTERS_MAX", 0)
    with served(odd.root, Form.ENCODED, odd.samples, tmp_path) as target:
        assert compare(odd.expected(), scan(target)) == []


@forms
def test_kernel_reads_single_blocks_in_any_order(odd: odd_tree.OddTree, form: Form, tmp_path: Path) -> None:
    generator = random.Random(5)
    with served(odd.root, form, odd.samples, tmp_path) as target:
        children = odd.root.children
        assert children is not None
        for name in (b"data", b"sparse"):
            files = sorted((children[name].children or {}).items())
            for _ in range(300):
                file, node = generator.choice(files)
                content = odd.contents[id(node)]
                offset, length = generator.randrange(len(content)), generator.choice((1, 100, 4096, 70_000))
                with open(target / os.fsdecode(name) / os.fsdecode(file), "rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                    found = os.pread(stream.fileno(), length, offset)
                assert found == content[offset : offset + length], (file, offset, length)


@forms
def test_fsck_decodes_the_flat_file(odd: odd_tree.OddTree, form: Form, tmp_path: Path) -> None:
    flat = flat_file(odd.root, form, odd.samples, tmp_path / "flat.erofs")
    erofs_utils.run("fsck.erofs", "--extract", flat)


@forms
def test_fsck_extracts_what_the_flat_file_holds(form: Form, tmp_path: Path) -> None:
    """Of the odd tree, what ext4 and fsck.erofs can hold.

    fsck.erofs 1.9 drops a hole at the end of a chunk-based file, stops at an empty extended attribute (in mkfs.erofs'
    images too), and changes owners after it has set capabilities and ACLs: attributes are left to the kernel's tests.
    """
    tree = odd_tree.build(entries=10)
    children = tree.root.children
    assert children is not None
    if form is Form.DECODED:
        for name in (b"only-hole", b"hole-of-one", b"hole-last", b"hole-between"):
            del (children[b"sparse"].children or {})[name]
    for name in [name for name in children[b"owners and times"].children or {} if b"253402300799" in name]:
        del (children[b"owners and times"].children or {})[name]
    for name in (b"large", b"many", b"again"):
        del (children[b"attributes"].children or {})[name]
    flat = flat_file(tree.root, form, tree.samples, tmp_path / "flat.erofs")
    erofs_utils.run("fsck.erofs", f"--extract={tmp_path / 'out'}", "--force", flat)
    assert compare(tree.expected(), scan(tmp_path / "out"), ignored_fields=["xattrs"]) == []


@forms
def test_fsck_and_dump_read_metadata_with_its_devices(odd: odd_tree.OddTree, form: Form, tmp_path: Path) -> None:
    with served(odd.root, form, odd.samples, tmp_path):
        devices = [f"--device={path}" for path in sorted(tmp_path.glob("blob-*"))]
        erofs_utils.run("fsck.erofs", *devices, tmp_path / "metadata")
        shown = erofs_utils.run("dump.erofs", "-s", *devices, tmp_path / "metadata")
    assert "sb_csum mtime xattr_filter" in shown
    assert ("zstd" in shown) == (form is Form.ENCODED)


def test_kernel_refuses_rotten_frames(tmp_path: Path) -> None:
    """One flipped bit in each frame, as a disk may do it after all was verified: errors, and no wrong byte."""
    tree = odd_tree.build(entries=10)
    generator = random.Random(4)
    for sample in tree.samples:
        for frame in sample.blob.table or ():
            end = sample.encoded.rfind(SKIPPABLE, frame.encoded_offset, frame.encoded_offset + frame.encoded_size)
            place = generator.randrange(frame.encoded_offset + FRAME_HEADER_MAX, end)
            sample.encoded[place] ^= 1 << generator.randrange(8)
    refused, whole = 0, tree.expected()
    with served(tree.root, Form.ENCODED, tree.samples, tmp_path) as target:
        for path, entry in scan(target).items():
            expected = whole[path]
            if expected.kind == "file" and expected.content != entry.content:
                assert entry.content is not None and entry.content.startswith("unreadable"), path
                refused += 1
    assert refused > 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on disk: real programs and texts, and one of each kind."""
    root = tmp_path_factory.mktemp("source") / "root"
    for name in ("/usr/share/perl5", "/usr/lib/python3/dist-packages", "/usr/share/zoneinfo", "/usr/include/linux"):
        if Path(name).is_dir():
            shutil.copytree(name, root / name[1:], symlinks=True)
    odd = root / "odd"
    odd.mkdir(parents=True)
    (odd / "file").write_bytes(random.Random(8).randbytes(300_000))
    os.link(odd / "file", odd / "hard link")
    os.setxattr(odd / "file", "security.capability", CAPABILITY)
    os.setxattr(odd, "system.posix_acl_default", ACL)
    os.mkfifo(odd / "pipe")
    os.mknod(odd / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (odd / "symlink").symlink_to("x" * 300)
    os.chown(odd / "null", 100_000, 70_000)
    os.utime(odd / "file", ns=(0, -1_500_000_000))
    return root


@forms
def test_a_directory_on_disk_reads_as_it_is(directory: Path, form: Form, tmp_path: Path) -> None:
    sample = SampleBlob()
    root = walk(directory, sample)
    sample.finish()
    image = tmp_path / "mkfs.erofs"
    # Its compact inodes lose the nanoseconds.
    erofs_utils.run("mkfs.erofs", "-x1", "-Eforce-inode-extended", "--quiet", image, directory)
    with served(root, form, [sample], tmp_path / "ours") as ours, mounted(image, [], tmp_path / "theirs") as theirs:
        actual = scan(ours)
        assert compare(scan(directory), actual) == []
        assert compare(scan(theirs), actual) == []


@forms
def test_files_of_several_gigabytes(form: Form, tmp_path: Path) -> None:
    """Five gigabytes of one frame again and again, and as much hole between two data frames, read here and there."""
    sample = SampleBlob()
    unit = random.Random(9).randbytes(4096) * 256
    extents = sample.add_frames(unit, len(unit))
    sample.finish()
    hole = Extent(None, 0, 0, 5 << 30)
    children = {
        b"dense": Node(stat.S_IFREG | 0o644, size=5000 << 20, extents=extents * 5000),
        b"sparse": Node(stat.S_IFREG | 0o644, size=(5 << 30) + (2 << 20), extents=(*extents, hole, *extents)),
    }
    root = Node(stat.S_IFDIR | 0o755, children=children)
    with served(root, form, [sample], tmp_path) as target:
        for offset in (0, 4096, (4 << 30) - 4096, (4 << 30) + 12345, (5000 << 20) - 5000):
            with open(target / "dense", "rb") as file:
                expected = (unit + unit)[offset % len(unit) :][:5000]
                assert os.pread(file.fileno(), 5000, offset) == expected
        with open(target / "sparse", "rb") as file:
            end = (1 << 20) + (5 << 30)
            assert os.pread(file.fileno(), 10_000, 1000) == unit[1000:11_000]
            assert os.pread(file.fileno(), 1 << 20, 1 << 20) == bytes(1 << 20)
            assert os.pread(file.fileno(), 1 << 20, 3 << 30) == bytes(1 << 20)
            assert os.pread(file.fileno(), 8192, end - 4096) == bytes(4096) + unit[:4096]
            assert os.pread(file.fileno(), 1 << 20, end) == unit
