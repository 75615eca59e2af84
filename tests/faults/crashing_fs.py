"""A file system that crashes at the n-th call, and the disks a power loss at that moment may leave behind.

It makes every call on the real disk too (the code under test reads back) and models what is durable: bytes
of a file after `fsync` of the file, entries of a directory after `fsync` of the directory. Everything else
may be lost, kept, or kept in another order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from bpt_dist.storage.files import Content, OsFiles, pieces_of


class Crash(BaseException):
    """The process is gone; not an Exception, so nobody handles it."""


@dataclass
class FileNode:
    data: bytes
    durable: bytes | None = None


@dataclass
class DirNode:
    entries: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, **changes: Node | None) -> None:
        _apply(self.entries, changes)
        self.pending.append(changes)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.entries), []


Node = FileNode | DirNode


def _apply(entries: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class CrashingFiles(OsFiles):
    """Real calls below `root`, counted; Crash is raised before call `crash_at`, or `after` it."""

    def __init__(self, root: Path, crash_at: int | None = None, *, after: bool = False) -> None:
        self.root, self.crash_at, self.after = root, crash_at, after
        self.calls = 0
        self.tree = _read_tree(root)

    def mkdir(self, path: Path) -> None:
        self._call(super().mkdir, path, lambda: self._parent(path).change(**{path.name: DirNode()}))

    def write(self, path: Path, data: Content) -> None:
        self._call(
            lambda p: OsFiles.write(self, p, data),
            path,
            lambda: self._parent(path).change(**{path.name: FileNode(b"".join(pieces_of(data)))}),
        )

    def fsync(self, path: Path) -> None:
        self._call(super().fsync, path, lambda: self._sync(path))

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent, "one rename inside one directory is what file systems keep atomic"
        self._call(lambda _: OsFiles.rename(self, source, target), source, lambda: self._rename(source, target))

    def unlink(self, path: Path) -> None:
        self._call(super().unlink, path, lambda: self._parent(path).change(**{path.name: None}))

    def rmdir(self, path: Path) -> None:
        self._call(super().rmdir, path, lambda: self._parent(path).change(**{path.name: None}))

    def after_power_loss(self, target: Path, rng: random.Random) -> None:
        """Write into `target` one of the disks that the calls so far allow."""
        _materialise(self.tree, target, rng)

    def _call(self, action, path, note) -> None:
        self.calls += 1
        if self.calls == self.crash_at and not self.after:
            raise Crash
        action(path)
        note()
        if self.calls == self.crash_at:
            raise Crash

    def _sync(self, path: Path) -> None:
        node = self._node(path)
        if isinstance(node, DirNode):
            node.sync()
        else:
            node.durable = node.data

    def _rename(self, source: Path, target: Path) -> None:
        parent = self._parent(source)
        parent.change(**{target.name: parent.entries[source.name], source.name: None})

    def _parent(self, path: Path) -> DirNode:
        node = self._node(path.parent)
        assert isinstance(node, DirNode)
        return node

    def _node(self, path: Path) -> Node:
        node: Node = self.tree
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, DirNode)
            node = node.entries[name]
        return node


def _read_tree(path: Path) -> DirNode:
    tree = DirNode()
    for child in path.iterdir():
        tree.entries[child.name] = _read_tree(child) if child.is_dir() else _durable(child.read_bytes())
    tree.sync()
    return tree


def _durable(data: bytes) -> FileNode:
    return FileNode(data, data)


def _materialise(node: DirNode, target: Path, rng: random.Random) -> None:
    target.mkdir(exist_ok=True)
    entries = dict(node.durable)
    kept = [changes for changes in node.pending if rng.random() < 0.5]
    rng.shuffle(kept)
    for changes in kept:
        _apply(entries, changes)
    for name, child in entries.items():
        if isinstance(child, DirNode):
            _materialise(child, target / name, rng)
        else:
            (target / name).write_bytes(_bytes_left(child, rng))


def _bytes_left(file: FileNode, rng: random.Random) -> bytes:
    if file.durable is not None:
        return file.durable
    cut = rng.randrange(len(file.data) + 1)
    return rng.choice([b"", file.data[:cut], file.data[:cut] + bytes(len(file.data) - cut), file.data])
