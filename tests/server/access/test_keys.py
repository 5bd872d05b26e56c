"""Entries of the file of keys: what they say, what is wrong with them, and who finds them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from server.access import watch
from server.access.keys import Key, digest_of, find_key, new_key, parse_key, read_keys
from server.access.watch import EVERY, KeyFile
from server.errors import StartError

HASH = "sha256:" + "ab" * 32


def write(file: Path, *lines: str) -> Path:
    file.write_text("".join(line + "\n" for line in lines))
    return file


def test_a_new_key_is_found_by_its_secret_alone() -> None:
    (first, alice), (second, bob) = new_key("alice", requests=5), new_key("bob")
    assert find_key([alice, bob], first) is alice and find_key([alice, bob], second) is bob
    for wrong in ("", "x", first[:-1], first + "x", alice.line(), alice.digest.hex(), "\udcff"):
        assert find_key([alice, bob], wrong) is None


def test_keys_are_long_and_random() -> None:
    made = {new_key("a")[0] for _ in range(100)}
    assert len(made) == 100 and all(len(key) == 46 and key.startswith("lr-") for key in made)  # 43 of 6 bits


def test_the_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all keys, whichever it is."""
    entries = [Key(name, digest_of(name)) for name in "abc"]
    compared: list[bytes] = []
    compare = secrets.compare_digest

    def seen(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare(a, b)

    monkeypatch.setattr(secrets, "compare_digest", seen)
    assert find_key(entries, "a") is entries[0]
    assert compared == [key.digest for key in entries]


@pytest.mark.parametrize(
    "line, key",
    [
        (f"a {HASH}", Key("a", b"\xab" * 32)),
        (f"  a-b.c_9   {HASH}  ", Key("a-b.c_9", b"\xab" * 32)),
        (f"a {HASH} for=metrics,console requests=60", Key("a", b"\xab" * 32, ("metrics", "console"), 60)),
        (f"a {HASH} concurrent=2 tokens=1000 cache=own",
         Key("a", b"\xab" * 32, tokens=1000, concurrent=2, own_cache=True)),
    ],
)  # fmt: skip
def test_an_entry_is_read_and_written(line: str, key: Key) -> None:
    assert parse_key(line) == key == parse_key(key.line())


@pytest.mark.parametrize(
    "line, told",
    [
        ("a", "an entry is: NAME"),
        (f"ä {HASH}", "a name has 1 to 64"),
        (f"(unknown) {HASH}", "a name has 1 to 64"),
        ("a sha256:abc", "an entry is: NAME"),
        ("a lr-secret", "an entry is: NAME"),
        (f"a {HASH} for=api,root", "for=root: allowed are api, metrics, console, admin"),
        (f"a {HASH} requests=0", "requests= takes a whole number above 0"),
        (f"a {HASH} tokens=many", "tokens= takes a whole number"),
        (f"a {HASH} tokens=1 tokens=2", "tokens= is there twice"),
        (f"a {HASH} cache=shared", "cache= may be: own"),
        (f"a {HASH} color=red", "color= isn't known"),
    ],
)
def test_a_wrong_entry_is_told_with_its_line_and_never_with_its_secret(line: str, told: str, tmp_path: Path) -> None:
    file = write(tmp_path / "keys", "# all keys", "", line)
    with pytest.raises(StartError) as caught:
        read_keys(file)
    assert told in str(caught.value) and f"{file}, line 3:" in str(caught.value)
    assert "abab" not in str(caught.value) and "lr-secret" not in str(caught.value)


@pytest.mark.parametrize("lines", [[f"a {HASH}", f"b {HASH}"], [f"a {HASH}", f"a sha256:{'cd' * 32}"]])
def test_names_and_keys_are_there_once(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"line 2: .* there twice"):
        read_keys(write(tmp_path / "keys", *lines))


def test_files_that_are_no_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(StartError, match="holds no key: make one"):
        read_keys(write(tmp_path / "empty", "# none"))
    open_to_all = write(tmp_path / "open", f"a {HASH}")
    open_to_all.chmod(0o666)
    with pytest.raises(StartError, match="everybody may write it"):
        read_keys(open_to_all)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(StartError, match="not UTF-8"):
        read_keys(tmp_path / "binary")


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = 0.0, []
    monkeypatch.setattr(watch.logger, "error", lambda text, *args: told.append(text % args))
    file = write(tmp_path / "keys", f"a {HASH}")
    watched = KeyFile(file, lambda: now)
    write(file, f"a {HASH}", f"b sha256:{'cd' * 32}")
    assert [key.name for key in watched.keys] == ["a"]  # not a look at the disk each request
    now += EVERY
    assert [key.name for key in watched.keys] == ["a", "b"]
    write(file, "nonsense")
    now += EVERY
    assert [key.name for key in watched.keys] == ["a", "b"] and "line 1" in told[0] and "stay as they were" in told[0]
    # As Kubernetes does: the new file takes the place of the old.
    os.replace(write(tmp_path / "new", f"c sha256:{'ef' * 32}"), file)
    now += EVERY
    assert [key.name for key in watched.keys] == ["c"]
    file.unlink()
    now += EVERY
    assert [key.name for key in watched.keys] == ["c"] and "No such file" in told[-1]
