"""Walking a tar agrees with Python's tarfile where the tar is good, and is an error wherever it is not."""

import io
import random
import tarfile

import pytest

from sana.data import tar_members
from sana.data.sample import DataError
from sana.data.tar_members import walk
from tests.data.tars import records, tar_bytes

LONG = "folder/" + "n" * 150 + ".png"


class Dribble:
    """A stream that gives a few bytes at a time, as a network does."""

    def __init__(self, content: bytes) -> None:
        self.file = io.BytesIO(content)

    def read(self, size: int, /) -> bytes:
        return self.file.read(min(size, 700))


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "target"
    return info


def walked(content: bytes, *, stream: bool = False) -> list[tuple[str, int, bytes]]:
    file, total = (Dribble(content), None) if stream else (io.BytesIO(content), len(content))
    return [(member.name, member.offset, read()) for member, read in walk(file, "s.tar", total=total)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("stream", [False, True])
def test_members_are_those_of_tarfile(form, stream):
    members = [*records(3), ("empty.txt", b""), ("folder/é.txt", "é".encode())]
    if form != tarfile.USTAR_FORMAT:
        members.append((LONG, b"x" * 1300))
    content = tar_bytes(members, form=form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, tar.extractfile(info).read()) for info in tar]
    assert walked(content, stream=stream) == expected


def test_members_that_are_not_read_are_passed_over():
    content = tar_bytes(records(4))
    for file, total in ((io.BytesIO(content), len(content)), (Dribble(content), None)):
        names = [member.name for member, _ in walk(file, "s.tar", total=total)]
        assert names == [name for name, _ in records(4)]


@pytest.mark.parametrize("stream", [False, True])
def test_every_cut_is_an_error(stream):
    content = tar_bytes(records(2))
    end = content.rstrip(b"\0")
    whole = -(-len(end) // 512) * 512
    for length in [1, 511, 512, 600, 1024, 1500, *range(whole - 700, whole + 1, 100), whole]:
        with pytest.raises(DataError, match="s.tar"):
            walked(content[:length], stream=stream)
    assert walked(content[: whole + 512], stream=stream) == walked(content)


def test_tarfile_itself_overlooks_what_is_an_error_here():
    content = bytearray(tar_bytes(records(3)))
    second = walked(bytes(content))[1][1] - 512
    content[second + 10] ^= 0xFF  # in the header of the second member
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as tar:
        assert len(tar.getnames()) == 1
    with pytest.raises(DataError, match=f"damaged at byte {second}, behind 0000.png"):
        walked(bytes(content))


@pytest.mark.parametrize(
    ("member", "complaint"),
    [
        ("../evil.png", "a path with '..'"),
        ("a/../../evil.png", "a path with '..'"),
        ("a\\..\\evil.png", "a path with '..'"),
        ("/etc/evil.png", "an absolute path"),
        ("C:/evil.png", "an absolute path"),
        (special("evil.png", tarfile.SYMTYPE), "a symbolic link"),
        (special("evil.png", tarfile.LNKTYPE), "a hard link"),
        (special("evil.png", tarfile.CHRTYPE), "a device"),
        (special("evil.png", tarfile.FIFOTYPE), "a device"),
    ],
)
def test_unsafe_members_are_refused_by_name(member, complaint):
    with pytest.raises(DataError, match="evil.png.*" + complaint):
        walked(tar_bytes([("good.png", b"x"), (member, b"")]))


def test_a_long_name_is_checked_too():
    with pytest.raises(DataError, match="a path with '..'"):
        walked(tar_bytes([("a/" * 80 + "../x.png", b"x")], form=tarfile.PAX_FORMAT))


def test_a_member_larger_than_its_shard_is_refused_before_it_is_read():
    info = tarfile.TarInfo("0000.png")
    info.size = 1 << 29
    content = info.tobuf() + b"x" * 2048
    file = io.BytesIO(content)
    with pytest.raises(
        DataError, match="cut off inside 0000.png: the file has 2560 bytes, and the member needs 536871424"
    ):
        next(walk(file, "s.tar", total=len(content)))
    assert file.tell() == 512


def test_a_member_beyond_the_limit_is_refused_in_a_stream_as_well(monkeypatch):
    monkeypatch.setattr(tar_members, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(DataError, match=r"big.png claims 101 bytes; at most 100"):
        walked(tar_bytes([("small.png", b"x" * 100), ("big.png", b"x" * 101)]), stream=True)


def test_a_compressed_tar_is_named_as_such():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    content = file.getvalue() + b"\0" * 512
    with pytest.raises(DataError, match="is compressed"):
        walked(content)


def test_archives_behind_one_another_are_refused():
    with pytest.raises(DataError, match="goes on behind its end mark, after 0000.json"):
        walked(tar_bytes(records(1)) + tar_bytes(records(1)))


def test_leading_dots_are_left_out_and_folders_passed_over():
    folder = tarfile.TarInfo("./sub")
    folder.type = tarfile.DIRTYPE
    assert [name for name, _, _ in walked(tar_bytes([(folder, b""), ("./sub/a.png", b"x")]))] == ["sub/a.png"]


def test_a_flipped_byte_is_a_data_error_or_changes_nothing_but_content():
    content = tar_bytes([*records(2), (LONG, b"x")], form=tarfile.PAX_FORMAT)
    names = [name for name, _, _ in walked(content)]
    rng = random.Random(0)
    outcomes = {"error": 0, "read": 0}
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        try:
            assert len(walked(bytes(damaged))) == len(names)
            outcomes["read"] += 1
        except DataError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 20
