"""Who may ask, and which folders may be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpt_dist.commands.serve.access import Token, folder_below, is_local_name, refuse_bad_name
from bpt_dist.commands.serve.limits import Refused
from bpt_dist.errors import ConfigError

SECRET = "0123456789abcdef-secret"


@pytest.fixture
def token(tmp_path: Path) -> Token:
    (tmp_path / "token").write_text(SECRET + "\n")
    return Token.read(tmp_path / "token")


@pytest.mark.parametrize(
    ("header", "passes"),
    [(f"Bearer {SECRET}", True), (f"bearer  {SECRET}", True), (f"Basic {SECRET}", False), (SECRET, False), ("", False),
     (f"Bearer {SECRET}x", False), (f"Bearer {SECRET[:-1]}", False), ("Bearer ", False), ("Bearer \xff\xfe", False)],
)  # fmt: skip
def test_only_the_token_passes(token: Token, header: str, passes: bool) -> None:
    assert token.is_given_by(header.encode("latin-1")) is passes
    assert SECRET not in repr(token)
    assert SECRET not in str(vars(token).keys())


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words of a token", b"\xff" * 20, b"a" * 5000, b"line one of it\nline two"]
)
def test_a_file_that_holds_no_token_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match="is not one line of 16 to 4096 printable") as refused:
        Token.read(tmp_path / "token")
    assert content == b"" or content.decode("latin-1") not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Token.read(tmp_path / "none")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert is_local_name(host.encode())


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example", "", "[", "\xff", "::1"]
)
def test_other_names(host: str) -> None:
    assert not is_local_name(host.encode("latin-1"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("root/a/b", "outside", "rooted"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "round").symlink_to(tmp_path / "root" / "round")
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    return tmp_path / "root"


def test_folders_below_the_root(root: Path) -> None:
    for given, found in (("a", "a"), ("a/b", "a/b"), ("a/../a/b/", "a/b"), ("in/b", "a/b"), (".", ".")):
        assert folder_below(root, given) == root / found
        assert folder_below(root.parent / "link", given) == root / found


@pytest.mark.parametrize("given", ["..", "../rooted", "a/../../outside", "out", "/etc", "a/../../root/../outside", "//etc"])
def test_folders_that_leave_the_root_are_refused(root: Path, given: str) -> None:
    with pytest.raises(Refused) as refused:
        folder_below(root, given)
    assert refused.value.status == 403


def test_an_absolute_path_is_refused_even_below_the_root(root: Path) -> None:
    with pytest.raises(Refused) as refused:
        folder_below(root, str(root / "a"))
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [("none", 404), ("round", 404), ("x" * 5000, 404), ("\ud800", 404), ("a\0b", 422), ("", 422), (3, 422), (None, 422)],
    ids=range(8),
)
def test_folders_that_are_not_there(root: Path, given: object, status: int) -> None:
    with pytest.raises(Refused) as refused:
        folder_below(root, given)
    assert refused.value.status == status
    assert str(root) not in refused.value.message


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", "ä", "a" * 101, "a\n", "\0"])
def test_names_that_no_task_may_have(name: str) -> None:
    refuse_bad_name("reviews-2.b_C")
    with pytest.raises(Refused):
        refuse_bad_name(name)
