"""Everything that EROFS can hold, complete and without a daemon: the writer's bytes and this kernel, nothing between.

As one flat file and as metadata with a device for each blob, also with the large logical clusters of large files.
"""

import errno
import pickle
import shutil
from pathlib import Path

BOOTS = ("reads",)
PRODUCT = False
LIMIT = 600


def host(host):
    """The odd tree in the cell's form, and what treediff has to find in it."""
    return host.once(f"oddities-{host.cell.form}", lambda folder: _make(folder, host.cell.form))


def _make(folder, form_name):
    import io

    from erofs_builder.erofs import indexes
    from erofs_builder.erofs.flat import write_flat
    from erofs_builder.erofs.writer import write_metadata
    from erofs_builder.payload import Form
    from tests.support import odd_tree

    form = Form(form_name)
    tree = odd_tree.build(entries=500, far=17 << 20)  # still a directory of several blocks, holes of several extents
    encoded = {sample.blob: bytes(sample.encoded) for sample in tree.samples}
    with open(folder / "flat", "wb") as out:
        write_flat(tree.root, form, list(encoded), lambda blob: io.BytesIO(encoded[blob]), out)
    common = indexes.SMALL_CLUSTERS_MAX
    indexes.SMALL_CLUSTERS_MAX = 1 << 62
    (folder / "small").write_bytes(write_metadata(tree.root, form, list(encoded)).erofs)
    indexes.SMALL_CLUSTERS_MAX = 0
    (folder / "large").write_bytes(write_metadata(tree.root, form, list(encoded)).erofs)
    indexes.SMALL_CLUSTERS_MAX = common
    for number, sample in enumerate(tree.samples):
        (folder / f"blob-{number}").write_bytes(sample.encoded if form is Form.ENCODED else sample.decoded)
    (folder / "expected").write_bytes(pickle.dumps(tree.expected()))
    return {"made": str(folder)}


def reads(guest):
    """Mount each and compare everything."""
    from lib import DISK, expect, run

    from tests.support.treediff import compare, scan

    made = DISK / "made"
    shutil.copytree(guest.task["made"], made)
    expected = pickle.loads((made / "expected").read_bytes())
    devices = sorted(made.glob("blob-*"))
    target = Path("/run/mnt")
    target.mkdir()
    for metadata, blobs in (("flat", []), ("small", devices), ("large", devices)):
        with guest.step(f"mount {metadata}"):
            guest.fact(f"{metadata} mounted from", _mount(made / metadata, blobs, target))
        with guest.step(f"every path of {metadata}"):
            differences = compare(expected, scan(target))
            expect(not differences, f"{len(differences)} differences, first: {differences[:3]}")
        run("umount", target)
        run("losetup", "--detach-all")


def _mount(source, devices, target):
    """Mount files as they are, or through loop devices where the kernel takes block devices only."""
    from lib import run

    from mounts import mount_erofs

    options = ["ro", "cache_strategy=disabled"]
    try:
        mount_erofs(source, devices, options, target)
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise
    else:
        return "files"
    loops = [run("losetup", "--find", "--show", "--read-only", path).stdout.strip() for path in (source, *devices)]
    mount_erofs(loops[0], loops[1:], options, target)
    return "loop devices"
