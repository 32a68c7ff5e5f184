"""Flattening: whiteouts, replacement, hard links across layers, missing and symlinked parents, deduplication."""

from __future__ import annotations

import stat

import pytest

from erofs_builder.errors import FormatError, UnsupportedError
from erofs_builder.model import Node
from erofs_builder.tree import flatten, walk
from tests.support.nodes import build, content, decoded_blobs, see_nodes
from tests.support.tars import Tar


def flat(*tars: Tar) -> Node:
    return flatten([build(bytes(tar))[0] for tar in tars])


def paths(root: Node) -> list[str]:
    return [path.decode() for path, _ in walk(root)][1:]


def at(root: Node, path: str) -> Node:
    return dict(walk(root))[path.encode()]


def lower() -> Tar:
    tar = Tar().add("d", "dir", uid=3, mtime=9).add("d/a", data=b"a").add("d/sub", "dir").add("d/sub/x", data=b"x")
    return tar.add("f", data=b"lower").add("l", "symlink", linkname="d")


def test_whiteout_of_file_and_directory() -> None:
    assert paths(flat(lower(), Tar().add(".wh.f").add("d/.wh.sub"))) == ["d", "d/a", "l"]


def test_whiteout_of_nothing() -> None:
    assert paths(flat(lower(), Tar().add(".wh.none").add("none/.wh.x").add("f/.wh.x"))) == paths(flat(lower()))


@pytest.mark.parametrize("first", [True, False])
def test_opaque_anywhere_in_the_layer(first: bool) -> None:
    upper = Tar()
    if first:
        upper.add("d/.wh..wh..opq")
    upper.add("d", "dir", uid=5).add("d/new", data=b"n").add("d/sub", "dir").add("d/sub/y", data=b"y")
    if not first:
        upper.add("d/.wh..wh..opq")
    root = flat(lower(), upper)
    assert paths(root) == ["d", "d/new", "d/sub", "d/sub/y", "f", "l"]
    assert at(root, "d").uid == 5


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_spares_what_its_own_layer_brings(first: bool) -> None:
    upper = Tar()
    if first:
        upper.add(".wh.d").add(".wh.f")
    upper.add("d", "dir").add("d/new", data=b"n").add("f", data=b"upper")
    if not first:
        upper.add(".wh.d").add(".wh.f")
    root = flat(lower(), upper)
    assert paths(root) == ["d", "d/new", "f", "l"]
    assert at(root, "f").size == 5


def test_a_whiteout_spares_a_directory_that_its_layer_needs() -> None:
    root = flat(lower(), Tar().add("d/sub/new", data=b"n").add(".wh.d"))
    assert paths(root) == ["d", "d/sub", "d/sub/new", "f", "l"]
    root = flat(lower(), Tar().add(".wh.d").add("d/sub/new", data=b"n"))
    assert paths(root) == ["d", "d/sub", "d/sub/new", "f", "l"]
    root = flat(lower(), Tar().add("l/new", data=b"n").add(".wh.l"))
    assert paths(root) == ["d", "d/a", "d/new", "d/sub", "d/sub/x", "f"]


def test_aufs_files_and_lowest_whiteouts_are_dropped() -> None:
    root = flat(
        lower().add(".wh.f").add(".wh..wh.plnk", "dir").add(".wh..wh.plnk/1.2", data=b"x").add("d/.wh..wh..opq"),
        Tar().add(".wh..wh.aufs"),
    )
    assert paths(root) == paths(flat(lower()))


def test_file_replaces_directory_and_back() -> None:
    second = Tar().add("d", data=b"file")
    assert paths(flat(lower(), second)) == ["d", "f", "l"]
    third = Tar().add("d", "dir").add("d/again", data=b"x")
    assert paths(flat(lower(), second, third)) == ["d", "d/again", "f", "l"]
    assert paths(flat(lower(), Tar().add("f", "dir").add("f/in", "fifo")))[-3:] == ["f", "f/in", "l"]


def test_directory_over_directory_keeps_children_and_takes_the_rest() -> None:
    upper = Tar().add("d", "dir", mode=0o700, uid=8, mtime=77, pax_headers={"SCHILY.xattr.user.k": "v"})
    root = flat(lower(), upper)
    assert paths(root) == paths(flat(lower()))
    node = at(root, "d")
    assert (node.mode, node.uid, node.mtime, node.xattrs) == (stat.S_IFDIR | 0o700, 8, 77, {b"user.k": b"v"})


def test_a_layer_can_be_flattened_again() -> None:
    built = [build(bytes(tar)) for tar in (lower(), Tar().add("d", "dir", uid=9).add("g", data=b"lower").add("z"))]
    layers = [layer for layer, _ in built]
    decoded_form = decoded_blobs(built)
    before = see_nodes(flatten(layers[:1]), decoded_form), see_nodes(flatten(layers[1:]), decoded_form)
    flatten(layers)
    assert (see_nodes(flatten(layers[:1]), decoded_form), see_nodes(flatten(layers[1:]), decoded_form)) == before


def test_hard_links_within_and_across_layers() -> None:
    first = lower().add("h", "link", linkname="f")
    second = Tar().add("d/h2", "link", linkname="./f").add("h3", "link", linkname="/l/a")
    root = flat(first, second)
    assert at(root, "h") is at(root, "f") is at(root, "d/h2")
    assert at(root, "h3") is at(root, "d/a")


def test_a_link_keeps_the_old_file_when_its_target_is_replaced() -> None:
    root = flat(lower().add("h", "link", linkname="f"), Tar().add("f", data=b"new one"))
    assert (at(root, "h").size, at(root, "f").size) == (5, 7)
    root = flat(lower().add("h", "link", linkname="f").add("f", data=b"new one"))
    assert (at(root, "h").size, at(root, "f").size) == (5, 7)


def test_a_link_to_a_symlink_is_the_symlink() -> None:
    root = flat(lower().add("h", "link", linkname="l"))
    assert at(root, "h") is at(root, "l")


def test_a_link_to_itself_changes_nothing() -> None:
    assert paths(flat(lower().add("f", "link", linkname="f"))) == paths(flat(lower()))


@pytest.mark.parametrize(("target", "message"), [("gone", "does not exist"), ("d", "is a directory"), ("f/x", "exist")])
def test_bad_links(target: str, message: str) -> None:
    with pytest.raises(FormatError, match=f"^h: hard link to .*{message}"):
        flat(lower().add("h", "link", linkname=target))


def test_missing_parents_take_after_their_parent() -> None:
    root = flat(Tar().add("d", "dir", uid=3, gid=4, mtime=9, mode=0o700).add("d/m/n/f"))
    for path in ("d/m", "d/m/n"):
        node = at(root, path)
        assert (node.mode, node.uid, node.gid, node.mtime) == (stat.S_IFDIR | 0o755, 3, 4, 9)


def test_missing_parents_are_corrected_by_a_later_entry() -> None:
    root = flat(Tar().add("m/f").add("m", "dir", mode=0o711, mtime=4))
    assert (at(root, "m").mode & 0o777, at(root, "m").mtime, paths(root)) == (0o711, 4, ["m", "m/f"])


def test_names_are_confined() -> None:
    root = flat(Tar().add("../../x").add("/abs").add("./a/./b/../c").add("d/../../../y"))
    assert paths(root) == ["a", "a/c", "abs", "x", "y"]


@pytest.mark.parametrize("target", ["/etc", "../../../etc", "etc", "./etc/../etc/", "/../etc"])
def test_symlinked_parents_stay_inside(target: str) -> None:
    root = flat(Tar().add("etc", "dir").add("s", "symlink", linkname=target).add("s/f").add("s/new/g"))
    assert paths(root) == ["etc", "etc/f", "etc/new", "etc/new/g", "s"]


def test_a_symlink_into_nothing_makes_the_directory() -> None:
    assert paths(flat(Tar().add("s", "symlink", linkname="/run/x").add("s/f"))) == ["run", "run/x", "run/x/f", "s"]


def test_a_symlink_replaced_by_a_directory() -> None:
    upper = Tar().add("l", "dir").add("l/new")
    assert paths(flat(lower(), upper)) == ["d", "d/a", "d/sub", "d/sub/x", "f", "l", "l/new"]


def test_a_parent_turned_symlink_within_a_layer() -> None:
    tar = Tar().add("p", "dir").add("p/one").add("q", "dir").add("p", "symlink", linkname="q").add("p/two")
    assert paths(flat(tar)) == ["p", "q", "q/two"]


def test_symlink_loops_and_files_as_parents() -> None:
    loop = Tar().add("a", "symlink", linkname="b").add("b", "symlink", linkname="a").add("a/f")
    with pytest.raises(FormatError, match="a/f: too many symlinks"):
        flat(loop)
    with pytest.raises(FormatError, match="f/x: f in its path is not a directory"):
        flat(lower().add("f/x"))


def test_duplicates_last_wins() -> None:
    root = flat(Tar().add("f", data=b"one").add("f", "fifo").add("f", data=b"three"))
    assert (paths(root), at(root, "f").size) == (["f"], 5)


def test_the_root_entry() -> None:
    assert flat(Tar().add("x")).mode == stat.S_IFDIR | 0o755
    root = flat(Tar().add("./", "dir", mode=0o1777, uid=2, mtime=6), Tar().add("x"))
    assert (root.mode, root.uid, root.mtime) == (stat.S_IFDIR | 0o1777, 2, 6)
    with pytest.raises(UnsupportedError, match="root"):
        flat(Tar().add("/", "symlink", linkname="x"))


def test_equal_content_is_read_from_the_lowest_layer() -> None:
    big = b"".join(number.to_bytes(4, "big") * 1024 for number in range(400))
    first = Tar().add("pad", data=b"p").add("small", data=b"same").add("big", data=big)
    second = Tar().add("copy", data=b"same").add("again", "link", linkname="copy").add("big2", data=big + b"more")
    built = [build(bytes(tar)) for tar in (first, second)]
    root = flatten([layer for layer, _ in built])
    lowest, upper = built[0][0].blob, built[1][0].blob
    assert at(root, "copy").extents == at(root, "small").extents
    assert at(root, "again") is at(root, "copy")
    blobs = [extent.blob for extent in at(root, "big2").extents]
    assert blobs[:-1] == [lowest] * (len(blobs) - 1)
    assert blobs[-1] is upper
    decoded_form = decoded_blobs(built)
    assert content(at(root, "big2"), decoded_form) == big + b"more"
    assert content(at(root, "copy"), decoded_form) == b"same"
