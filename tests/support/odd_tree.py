"""A tree of everything that EROFS can hold and that no ordinary image has, with what a mount of it must show."""

from __future__ import annotations

import hashlib
import random
import stat
import struct
from dataclasses import dataclass, field

from erofs_builder import fingerprint
from erofs_builder.frames import BLOCK
from erofs_builder.model import Extent, Node
from tests.support.sample_blobs import FRAME, SampleBlob
from tests.support.treediff import Entry

# VFS_CAP_REVISION_2 with cap_net_raw, effective; the kernel hands it out only if it is well-formed.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
_ACL_UNDEFINED = 0xFFFFFFFF
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (0x01, 7, _ACL_UNDEFINED),
        (0x02, 5, 1234),
        (0x04, 5, _ACL_UNDEFINED),
        (0x10, 5, _ACL_UNDEFINED),
        (0x20, 4, _ACL_UNDEFINED),
    )
)
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass
class OddTree:
    """The tree, its two blobs (the second one's files come first), and the bytes of each file by node."""

    root: Node
    samples: list[SampleBlob]
    contents: dict[int, bytes] = field(default_factory=dict)

    def expected(self) -> dict[bytes, Entry]:
        """What treediff.scan of a mount gives."""
        found: dict[bytes, Entry] = {}
        names: dict[int, list[bytes]] = {}
        pending = [(b"", self.root)]
        while pending:
            path, node = pending.pop()
            found[path or b"."] = self._entry(node)
            if not node.is_dir:
                names.setdefault(id(node), []).append(path)
            for name, child in (node.children or {}).items():
                pending.append((path + b"/" + name if path else name, child))
        for paths in names.values():
            for path in paths:
                found[path].links, found[path].nlink = min(paths), len(paths)
                if path != min(paths):
                    found[path].content = None
        return found

    def _entry(self, node: Node) -> Entry:
        kind = stat.S_IFMT(node.mode)
        return Entry(
            kind=_KINDS[kind],
            mode=oct(stat.S_IMODE(node.mode)),
            owner=f"{node.uid & 0xFFFFFFFF}:{node.gid & 0xFFFFFFFF}",
            mtime=node.mtime * 1_000_000_000 + node.mtime_nsec,
            size=node.size if kind == stat.S_IFREG else None,
            rdev=node.rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else None,
            target=node.target if kind == stat.S_IFLNK else None,
            xattrs=dict(node.xattrs),
            content=hashlib.sha256(self.contents.get(id(node), b"")).hexdigest() if kind == stat.S_IFREG else None,
        )


def build(entries: int = 3000, far: int = 40 << 20) -> OddTree:
    """The tree; `entries` is the size of its largest directory, `far` that of its large holes, in bytes."""
    tree = OddTree(_directory(), [SampleBlob(), SampleBlob()])
    children = tree.root.children
    assert children is not None
    children[b"names"] = _names()
    children[b"many"] = _directory(**{f"entry-{number:06}": _file() for number in range(entries)})
    children[b"dirs"] = _block_sized_directories()
    children[b"links"] = _links()
    children[b"special"] = _specials()
    children[b"attributes"] = _attributes()
    children[b"owners and times"] = _owners_and_times()
    children[b"data"] = _data(tree)
    children[b"sparse"] = _sparse(tree, far)
    for sample in tree.samples:
        sample.finish()
    return tree


def _file(mode: int = 0o644, uid: int = 0, gid: int = 0) -> Node:
    return Node(stat.S_IFREG | mode, uid, gid, mtime=1_700_000_000)


def _directory(**children: Node) -> Node:
    named = {name.encode(): child for name, child in children.items()}
    return Node(stat.S_IFDIR | 0o755, mtime=1_700_000_000, children=named)


def _names() -> Node:
    names = [b"!", b"+", b"-", b".hidden", b"...", b"a b\n", b"\xff\xfe", "größe".encode(), b"x" * 255, b"y" * 254]
    directory = _directory()
    directory.children = {name: _file() for name in names}
    directory.children[b"\x01dir"] = _directory(deeper=_directory(deepest=_directory()))
    return directory


def _block_sized_directories() -> Node:
    # Data of exactly one block, one byte more and less, and a tail too long to lie behind the inode.
    directory = _directory()
    assert directory.children is not None
    for size in (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, BLOCK - 30, 2 * BLOCK - 20):
        left = size - 2 * 12 - 3
        child = _directory()
        assert child.children is not None
        number = 0
        while left > 0:
            length = min(left - 12, 100) if left < 240 else 100
            child.children[f"{number:03}".encode().ljust(length, b"n")] = _file()
            left -= 12 + length
            number += 1
        directory.children[str(size).encode()] = child
    return directory


def _links() -> Node:
    shared = _file()
    symlink = Node(stat.S_IFLNK | 0o777, mtime=1, target=b"/nowhere")
    directory = _directory(one=shared, two=shared, inner=_directory(three=shared), link=symlink, other=symlink)
    assert directory.children is not None
    for length in (1, 60, 3000, 4031, 4032, 4033, 4064, 4065, 4095):
        directory.children[f"to-{length}".encode()] = Node(stat.S_IFLNK | 0o777, target=b"t" * length)
    return directory


def _specials() -> Node:
    device = Node(stat.S_IFBLK | 0o660, gid=6, rdev=(259, 1048575))
    return _directory(
        null=Node(stat.S_IFCHR | 0o666, rdev=(1, 3)),
        high=Node(stat.S_IFCHR | 0o600, rdev=(4095, 256)),
        whiteout_like=Node(stat.S_IFCHR, rdev=(0, 0)),
        disk=device,
        same_disk=device,
        pipe=Node(stat.S_IFIFO | 0o622),
        socket=Node(stat.S_IFSOCK | 0o777),
        setuid=_file(0o6755),
        sticky=Node(stat.S_IFDIR | 0o1777, children={}),
    )


def _attributes() -> Node:
    plain, shared = _file(), {b"security.selinux": b"system_u:object_r:bin_t:s0\0", b"user.common": b"x" * 500}
    plain.xattrs = {b"user.binary": bytes(range(256)), b"user.empty": b"", b"user." + b"n" * 250: b"long name"}
    capable = _file(0o755)
    capable.xattrs = {b"security.capability": CAPABILITY, **shared}
    listed = _file()
    listed.xattrs = {b"system.posix_acl_access": ACL, **shared}
    large = _file()
    large.xattrs = {b"user.large": b"L" * 65535, **shared}
    many, again = _file(), _file()
    many.xattrs = {f"user.shared-{number}".encode(): b"%d" % number for number in range(300)}
    again.xattrs = dict(many.xattrs)
    inherited = _directory(inside=_file())
    inherited.xattrs = {b"system.posix_acl_default": ACL, b"trusted.overlay.opaque": b"y"}
    symlink = Node(stat.S_IFLNK | 0o777, target=b"t", xattrs={b"trusted.note": b"on a symlink"})
    pipe = Node(stat.S_IFIFO | 0o600, xattrs={b"trusted.note": b"on a pipe", b"security.x": b"y"})
    return _directory(
        plain=plain,
        capable=capable,
        listed=listed,
        large=large,
        many=many,
        again=again,
        inherited=inherited,
        symlink=symlink,
        pipe=pipe,
    )


def _owners_and_times() -> Node:
    owners = (0, 1, 65535, 65536, 1 << 31, (1 << 32) - 2)
    times = (0, -1, -1_000_000_000, 1 << 31, 1 << 33, 253402300799)
    directory = _directory()
    assert directory.children is not None
    for owner in owners:
        directory.children[f"uid-{owner}".encode()] = _file(uid=owner)
        directory.children[f"gid-{owner}".encode()] = _file(gid=owner)
    for seconds in times:
        for nanoseconds in (0, 1, 999_999_999):
            name = f"mtime {seconds} {nanoseconds}".encode()
            directory.children[name] = Node(stat.S_IFREG | 0o600, mtime=seconds, mtime_nsec=nanoseconds)
    return directory


def _content_node(tree: OddTree, content: bytes, extents: tuple[Extent, ...]) -> Node:
    node = _file()
    node.size, node.extents = len(content), extents
    if node.size % 3 == 1:  # nothing that is seen of a file depends on whether it has one
        node.fingerprint = hashlib.sha256(content).digest()[: fingerprint.SIZE]
    if node.size % 3 == 2:
        node.xattrs = {b"user.size": b"%d" % node.size, b"user.common": b"x" * 500}
        node.fingerprint = hashlib.sha256(content).digest()[: fingerprint.SIZE]
    tree.contents[id(node)] = content
    return node


def _data(tree: OddTree) -> Node:
    generator = random.Random(1)
    first, second = tree.samples
    directory = _directory()
    children = directory.children
    assert children is not None
    for size in (1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 100_000):
        noise, text = generator.randbytes(size), (b"some text, " * (size // 11 + 1))[:size]
        for label, content in (("noise", noise), ("text", text)):
            children[f"packed-{label}-{size}".encode()] = _content_node(tree, content, first.add_packed(content))
            children[f"alone-{label}-{size}".encode()] = _content_node(tree, content, second.add_frames(content))
    for size in (FRAME, FRAME + 1, 2 * FRAME + 4000, 3 * FRAME + BLOCK, 3 * FRAME + BLOCK + 1):
        for label, content in (("noise", generator.randbytes(size)), ("text", bytes(range(251)) * (size // 251 + 1))):
            content = content[:size]
            children[f"large-{label}-{size}".encode()] = _content_node(tree, content, second.add_frames(content))
    _shared_frames(tree, children, generator)
    return directory


def _shared_frames(tree: OddTree, children: dict[bytes, Node], generator: random.Random) -> None:
    """Files that repeat a frame, that end before it does, or that take frames of both blobs."""
    first, second = tree.samples
    noise, text = generator.randbytes(FRAME), (b"lorem ipsum " * FRAME)[:FRAME]
    (of_noise,), (of_text,) = first.add_frames(noise), second.add_frames(text)
    children[b"repeated"] = _content_node(tree, text * 5 + noise, (of_text,) * 5 + (of_noise,))
    children[b"alternating"] = _content_node(tree, (text + noise) * 3, (of_text, of_noise) * 3)
    for length in (1, BLOCK, BLOCK + 1, FRAME - BLOCK, FRAME - 1):
        short = of_noise._replace(length=length)
        children[f"prefix-{length}".encode()] = _content_node(tree, noise[:length], (short,))
        content = text + noise[:length]
        children[f"prefix-behind-{length}".encode()] = _content_node(tree, content, (of_text, short))


def _sparse(tree: OddTree, far: int) -> Node:
    generator = random.Random(2)
    sample = tree.samples[0]
    data = generator.randbytes(2 * FRAME)
    extents = sample.add_frames(data)
    directory = _directory()
    children = directory.children
    assert children is not None

    def hole(length: int) -> Extent:
        return Extent(None, 0, 0, length)

    children[b"only-hole"] = _content_node(tree, bytes(far + 5), (hole(far + 5),))
    children[b"hole-of-one"] = _content_node(tree, bytes(1), (hole(1),))
    children[b"hole-first"] = _content_node(tree, bytes(far) + data, (hole(far), *extents))
    children[b"hole-last"] = _content_node(tree, data + bytes(far + 77), (*extents, hole(far + 77)))
    pieces = (extents[0], hole(BLOCK), extents[1], hole(5 * BLOCK + 9))
    content = data[:FRAME] + bytes(BLOCK) + data[FRAME:] + bytes(5 * BLOCK + 9)
    children[b"hole-between"] = _content_node(tree, content, pieces)
    return directory
