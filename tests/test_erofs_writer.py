"""The EROFS writer and reader on trees of Nodes: what is written comes back, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import random
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erofs_builder.digest import Digest
from erofs_builder.erofs import indexes, layout
from erofs_builder.erofs.flat import write_flat
from erofs_builder.erofs.inodes import read_directory, read_inode
from erofs_builder.erofs.reader import Reader, read_superblock
from erofs_builder.erofs.source import Source
from erofs_builder.erofs.writer import Metadata, write_metadata
from erofs_builder.errors import ErofsError, IntegrityError, UnsupportedError
from erofs_builder.frames import FrameTable
from erofs_builder.model import Blob, Extent, Node
from erofs_builder.payload import Form, device_tag
from tests.support import odd_tree
from tests.support.same_nodes import differences
from tests.support.sample_blobs import SampleBlob

forms = pytest.mark.parametrize("form", Form, ids=lambda form: form.value)


@pytest.fixture(scope="module")
def odd() -> odd_tree.OddTree:
    return odd_tree.build()


def read_back(metadata: Metadata, form: Form) -> Node:
    return Reader(metadata.erofs, tables(metadata), form).read_tree()


def tables(metadata: Metadata) -> list[FrameTable]:
    return [blob.table for blob in metadata.blobs if blob.table]


def blobs_of(odd: odd_tree.OddTree) -> list[Blob]:
    return [sample.blob for sample in odd.samples]


@forms
def test_everything_comes_back(odd: odd_tree.OddTree, form: Form) -> None:
    metadata = write_metadata(odd.root, form, blobs_of(odd))
    assert len(metadata.erofs) % 65536 == 0
    assert differences(odd.root, read_back(metadata, form)) == []


@forms
def test_reading_and_writing_again_gives_the_same_bytes(odd: odd_tree.OddTree, form: Form) -> None:
    metadata = write_metadata(odd.root, form, blobs_of(odd))
    reader = Reader(metadata.erofs, tables(metadata), form)
    assert write_metadata(reader.read_tree(), form, reader.blobs).erofs == metadata.erofs


def test_large_logical_clusters_come_back(odd: odd_tree.OddTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "SMALL_CLUSTERS_MAX", 1 << 62)
    small = write_metadata(odd.root, Form.ENCODED, blobs_of(odd))
    monkeypatch.setattr(indexes, "SMALL_CLUSTERS_MAX", 0)
    metadata = write_metadata(odd.root, Form.ENCODED, blobs_of(odd))
    assert len(metadata.erofs) < len(small.erofs)
    assert differences(odd.root, read_back(metadata, Form.ENCODED)) == []


@forms
def test_order_of_children_does_not_matter(form: Form) -> None:
    def tree(names: list[bytes]) -> Node:
        children = {name: Node(stat.S_IFREG | 0o644, xattrs={b"user.name": name}) for name in names}
        return Node(stat.S_IFDIR | 0o755, children=children)

    names = [b"%d" % number for number in range(100)]
    assert write_metadata(tree(names), form, []) == write_metadata(tree(names[::-1]), form, [])


@forms
def test_devices(form: Form) -> None:
    samples = [SampleBlob() for _ in range(3)]
    root = Node(stat.S_IFDIR | 0o755, children={})
    assert root.children is not None
    for number, sample in enumerate(samples):
        extents = sample.add_frames(b"%d" % number * 5000)
        root.children[b"%d" % number] = Node(stat.S_IFREG | 0o644, size=5000, extents=extents)
        sample.finish()
    del root.children[b"1"]
    metadata = write_metadata(root, form, [sample.blob for sample in samples])
    assert metadata.blobs == [samples[0].blob, samples[2].blob]
    superblock = read_superblock(metadata.erofs, form)
    assert superblock.extra_devices == 2
    end = superblock.blocks
    for number, blob in enumerate(metadata.blobs):
        slot = layout.DEVICE_SLOT.unpack_from(metadata.erofs, 128 * (superblock.devt_slotoff + number))
        assert slot[0] == device_tag(form, blob.digest).encode()
        assert slot[2] == end
        end += slot[1]


@forms
def test_features(form: Form, odd: odd_tree.OddTree) -> None:
    superblock = read_superblock(write_metadata(odd.root, form, blobs_of(odd)).erofs, form)
    assert superblock.feature_incompat == {Form.DECODED: 0xC, Form.ENCODED: 0x2F}[form]
    assert superblock.available_compr_algs == {Form.DECODED: 0, Form.ENCODED: 8}[form]
    assert bool(superblock.packed_nid) == (form is Form.ENCODED)


def test_compact_inodes_where_they_can_say_it_all() -> None:
    children = {b"%d" % number: Node(stat.S_IFREG | 0o644, mtime=7, mtime_nsec=9) for number in range(10)}
    children[b"other"] = Node(stat.S_IFREG | 0o644, mtime=8)
    root = Node(stat.S_IFDIR | 0o755, mtime=7, mtime_nsec=9, children=children)
    erofs = write_metadata(root, Form.DECODED, []).erofs
    superblock = read_superblock(erofs, Form.DECODED)
    assert (superblock.epoch, superblock.fixed_nsec) == (7, 9)
    assert erofs[superblock.rootnid << 5] & 1 == layout.INODE_LAYOUT_COMPACT
    assert differences(root, Reader(erofs, [], Form.DECODED).read_tree()) == []


def test_decoded_files_use_the_largest_chunk() -> None:
    sample = SampleBlob()
    extents = sample.add_frames(random.Random(3).randbytes(1 << 20))
    sample.finish()
    root = Node(stat.S_IFDIR | 0o755, children={b"f": Node(stat.S_IFREG, size=1 << 20, extents=extents)})
    erofs = write_metadata(root, Form.DECODED, [sample.blob]).erofs
    superblock = read_superblock(erofs, Form.DECODED)
    source = Source(erofs)
    *_, entry = read_directory(source, superblock, read_inode(source, superblock, superblock.rootnid))
    inode = read_inode(source, superblock, entry.nid)
    assert (entry.name, inode.i_u) == (b"f", layout.CHUNK_FORMAT_INDEXES | 8)  # 256 blocks: one index for four frames


def large_file(holes: bool) -> tuple[Node, SampleBlob]:
    sample = SampleBlob()
    extents = sample.add_frames(bytes(range(256)) * 4096, 1 << 20)
    sample.finish()
    run: tuple[Extent, ...] = (Extent(None, 0, 0, 6 << 40), *extents) if holes else extents * 5000
    node = Node(stat.S_IFREG | 0o644, size=sum(extent.length for extent in run), extents=run)
    return Node(stat.S_IFDIR | 0o755, children={b"large": node}), sample


@forms
def test_files_of_more_than_4_gib(form: Form) -> None:
    root, sample = large_file(holes=False)
    metadata = write_metadata(root, form, [sample.blob])
    assert len(metadata.erofs) < 1 << 20
    assert differences(root, read_back(metadata, form)) == []


def test_holes_too_large_for_an_index() -> None:
    root, sample = large_file(holes=True)
    with pytest.raises(UnsupportedError, match="/large: a sparse file"):
        write_metadata(root, Form.ENCODED, [sample.blob])
    metadata = write_metadata(root, Form.DECODED, [sample.blob])
    assert differences(root, read_back(metadata, Form.DECODED)) == []


@forms
@pytest.mark.parametrize("size", [1, 1 << 20, 1 << 30, 1 << 50])
def test_one_hole_takes_little_whatever_its_size(form: Form, size: int) -> None:
    node = Node(stat.S_IFREG, size=size, extents=(Extent(None, 0, 0, size),))
    root = Node(stat.S_IFDIR | 0o755, children={b"hole": node})
    metadata = write_metadata(root, form, [])
    assert len(metadata.erofs) == 65536
    assert differences(root, read_back(metadata, form)) == []


UNSUPPORTED = {
    "mode": Node(0o170000),
    "mtime": Node(stat.S_IFREG, mtime=1 << 63),
    "xattr": Node(stat.S_IFREG, xattrs={b"system.nfs4_acl": b""}),
    "empty symlink": Node(stat.S_IFLNK),
    "long symlink": Node(stat.S_IFLNK, target=b"t" * 4096),
    "symlink with NUL": Node(stat.S_IFLNK, target=b"a\0b"),
    "device": Node(stat.S_IFCHR, rdev=(4096, 0)),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_erofs_cannot_express_is_named(what: str) -> None:
    inner = Node(stat.S_IFDIR | 0o755, children={b"\xff": UNSUPPORTED[what]})
    root = Node(stat.S_IFDIR | 0o755, children={b"inner": inner})
    with pytest.raises(UnsupportedError, match=r"/inner/\\xff: "):
        write_metadata(root, Form.DECODED, [])


def test_directories_have_one_name() -> None:
    twice = Node(stat.S_IFDIR | 0o755, children={})
    with pytest.raises(UnsupportedError, match="two names"):
        write_metadata(Node(stat.S_IFDIR | 0o755, children={b"a": twice, b"b": twice}), Form.DECODED, [])


@forms
def test_broken_promises_of_extents(form: Form) -> None:
    sample = SampleBlob()
    (extent,) = sample.add_frames(bytes(5000))
    sample.finish()
    for extents, size in (
        ((extent,), 4999),
        ((extent, extent), 10000),
        ((extent._replace(frame_offset=1),), 5000),
        ((extent._replace(length=8193),), 8193),
        ((extent._replace(length=0),), 0),
    ):
        root = Node(stat.S_IFDIR, children={b"f": Node(stat.S_IFREG, size=size, extents=extents)})
        with pytest.raises(ValueError, match="^/f: "):
            write_metadata(root, form, [sample.blob])
    root = Node(stat.S_IFDIR, children={b"f": Node(stat.S_IFREG, size=5000, extents=(extent,))})
    with pytest.raises(ValueError, match="not among"):
        write_metadata(root, form, [])


names = st.binary(min_size=1, max_size=20).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b".."))
attributes = st.dictionaries(
    st.sampled_from([b"user.a", b"user.b", b"security.c", b"trusted.d"]), st.binary(max_size=40), max_size=3
)
common = {
    "uid": st.integers(0, 0xFFFFFFFF),
    "gid": st.integers(0, 0xFFFFFFFF),
    "mtime": st.sampled_from([0, 5, -(1 << 63), (1 << 63) - 1]),
    "mtime_nsec": st.sampled_from([0, 999_999_999]),
    "xattrs": attributes,
}
leaves = st.one_of(
    st.builds(Node, mode=st.just(stat.S_IFREG | 0o600), **common),
    st.builds(
        Node, mode=st.just(stat.S_IFLNK | 0o777), target=st.binary(min_size=1).filter(lambda t: 0 not in t), **common
    ),
    st.builds(
        Node, mode=st.just(stat.S_IFBLK), rdev=st.tuples(st.integers(0, 4095), st.integers(0, 1048575)), **common
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.builds(
        Node, mode=st.just(stat.S_IFDIR | 0o755), children=st.dictionaries(names, inner, max_size=5), **common
    ),
    max_leaves=15,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, trees, max_size=6), st.sampled_from(Form))
def test_any_tree_comes_back(children: dict[bytes, Node], form: Form) -> None:
    # Hypothesis may draw the same object twice: for files that is a hard link, but directories have one name.
    root = Node(stat.S_IFDIR | 0o755, children=children)
    try:
        metadata = write_metadata(root, form, [])
    except UnsupportedError as error:
        assert "two names" in str(error)
        return
    assert differences(root, read_back(metadata, form)) == []


@forms
def test_flat_refuses_a_blob_that_is_not_what_its_table_says(form: Form, odd: odd_tree.OddTree) -> None:
    damaged = {sample.blob: bytearray(sample.encoded) for sample in odd.samples}
    damaged[odd.samples[1].blob][-5000] ^= 1
    with pytest.raises(IntegrityError, match=f"{odd.samples[1].blob.digest}, frame"):
        write_flat(odd.root, form, blobs_of(odd), lambda blob: io.BytesIO(damaged[blob]), io.BytesIO())


@forms
def test_flat_is_metadata_and_blobs(form: Form, odd: odd_tree.OddTree) -> None:
    out = io.BytesIO()
    encoded = {sample.blob: bytes(sample.encoded) for sample in odd.samples}
    size = write_flat(odd.root, form, blobs_of(odd), lambda blob: io.BytesIO(encoded[blob]), out)
    flat = out.getvalue()
    assert len(flat) == size == 4096 * int.from_bytes(flat[1024 + 36 : 1024 + 40], "little")
    ends = b"".join(sample.encoded if form is Form.ENCODED else sample.decoded for sample in odd.samples)
    assert flat.endswith(ends)
    with pytest.raises(ErofsError):
        read_superblock(flat[:-4096], form)


def test_uuid_follows_the_content() -> None:
    roots = [Node(stat.S_IFDIR | 0o755, uid=uid, children={}) for uid in (0, 0, 1)]
    uuids = [read_superblock(write_metadata(root, Form.DECODED, []).erofs, Form.DECODED).uuid for root in roots]
    assert uuids[0] == uuids[1] != uuids[2]


# On-disk format: these change only when what is written changes on purpose, and then every image's digest does.
GOLDEN = {
    Form.ENCODED: "80752c7f8bafe8982dde0dc14984bb166753b3fb22229fbd0b3890eebe2b8852",
    Form.DECODED: "0012fc73e6b57d2368df1dfed8fea887d1923716244f2c1a0cf77909afc2763f",
}


@forms
def test_golden(form: Form) -> None:
    link = Node(stat.S_IFLNK | 0o777, mtime=3, target=b"a")
    table = FrameTable(Digest(bytes(32)), [2, 1], [2, 3], bytes(64))
    blob = Blob(table)
    packed = [Node(stat.S_IFREG | 0o644, size=9, extents=(Extent(blob, 1, at * 4096, 9),)) for at in range(3)]
    alone = Node(stat.S_IFREG | 0o755, 1, 2, 3, 4, size=8192, extents=(Extent(blob, 0, 0, 8192),))
    alone.xattrs = {b"security.capability": odd_tree.CAPABILITY}
    children = {b"a": alone, b"link": link, **{b"%d" % number: node for number, node in enumerate(packed)}}
    metadata = write_metadata(Node(stat.S_IFDIR | 0o755, children=children), form, [blob])
    assert hashlib.sha256(metadata.erofs).hexdigest() == GOLDEN[form]
