"""Inode numbers are unique and mean the same as long as the mount lives; names form a tree."""

from hypothesis import given
from hypothesis import strategies as st

from ckptfs._daemon.attachment.inodes import MOUNT_ROOT, Tree, ordinal_of
from ckptfs._model.manifest import ListedFile, Listing, Manifest, build_manifest

ATTACHED_NS = 10**18

_paths = st.lists(st.sampled_from("abc\u00e9"), min_size=1, max_size=4).map("/".join)
_manifests = st.builds(
    lambda files, directories: build_manifest(Listing(files, directories)),
    st.lists(st.builds(ListedFile, _paths, st.integers(0, 9), st.integers(1, 99)), max_size=15),
    st.lists(_paths, max_size=4),
)


@given(_manifests, st.integers(1, 2**31))
def test_tree_gives_every_path_its_own_inode(manifest: Manifest, ordinal: int) -> None:
    tree, again = Tree(ordinal, manifest, ATTACHED_NS), Tree(ordinal, manifest, ATTACHED_NS)
    inodes = {tree.root.inode}
    for index, path in [
        *((-1, path) for path in manifest.directories),
        *((index, file.path) for index, file in enumerate(manifest.files)),
    ]:
        node, same = tree.root, again.root
        for component in path.encode().split(b"/"):
            assert node.is_directory
            node, same = node.children[component], same.children[component]
            assert node.name == component
        assert node.index == index
        assert node.is_directory is (index < 0)
        assert tree.node(node.inode) is node
        assert same.inode == node.inode
        inodes.add(node.inode)
        if index >= 0:
            listed = manifest.files[index]
            assert (node.size, node.mtime_ns) == (listed.size, listed.mtime_ns)
            assert not node.children
    assert len(inodes) == 1 + len(manifest.directories) + len(manifest.files)
    assert {ordinal_of(inode) for inode in inodes} == {ordinal}
    assert MOUNT_ROOT not in inodes
    assert all(0 < inode < 2**64 for inode in inodes)
    base = ordinal << 32
    for unknown in (base, base + len(inodes) + 1, base + 2**32 - 1):
        assert tree.node(unknown) is None


@given(_manifests)
def test_tree_directories_have_links_and_times_of_their_content(manifest: Manifest) -> None:
    tree = Tree(1, manifest, ATTACHED_NS)
    for path in ("", *manifest.directories):
        node = tree.root
        for component in filter(None, path.encode().split(b"/")):
            node = node.children[component]
        prefix = f"{path}/" if path else ""
        below = [f.mtime_ns for f in manifest.files if f.path.startswith(prefix)]
        assert node.mtime_ns == max(below, default=ATTACHED_NS)
        subdirectories = [d for d in manifest.directories if d.rpartition("/")[0] == path]
        assert node.subdirectories == len(subdirectories)


def test_tree_of_two_attachments_shares_no_inode() -> None:
    manifest = build_manifest(Listing([ListedFile("a", 1, 1)], []))
    first, second = Tree(1, manifest, 1), Tree(2, manifest, 1)
    assert first.root.inode != second.root.inode
    assert first.root.children[b"a"].inode != second.root.children[b"a"].inode


def test_tree_file_without_a_time_has_the_attach_time() -> None:
    manifest = build_manifest(Listing([ListedFile("a", 1, 0)], []))
    assert Tree(1, manifest, ATTACHED_NS).root.children[b"a"].mtime_ns == ATTACHED_NS


def test_tree_file_of_the_root_can_be_replaced_and_removed() -> None:
    files = [ListedFile("a", 1, 1), ListedFile("sub/a", 2, 2)]
    tree = Tree(3, build_manifest(Listing(files, [])), ATTACHED_NS)
    old, nested = tree.root.children[b"a"], tree.root.children[b"sub"].children[b"a"]
    new = tree.replace(ListedFile("a", 5, 7), 2)
    assert tree.root.children[b"a"] is new
    assert (new.size, new.mtime_ns, new.index, new.parent) == (5, 7, 2, tree.root)
    assert new.inode not in (old.inode, nested.inode)
    assert [tree.node(node.inode) for node in (old, new, nested)] == [old, new, nested]
    more = tree.replace(ListedFile("b", 1, 0), 3)
    assert more.mtime_ns == tree.root.mtime_ns
    assert tree.remove("a") is new
    assert tree.remove("a") is None
    assert tree.remove("sub") is None  # a directory
    assert tree.root.children.keys() == {b"sub", b"b"}
    assert tree.node(new.inode) is new  # it may still be open
