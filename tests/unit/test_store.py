"""A store behaves alike on a local disk and on S3, here a real server's."""

import os
import pickle
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet import store as stores
from raydet.errors import RaydetError
from raydet.recipe import load
from raydet.store import Store, above, inside, join, write_file
from tests.s3 import serve


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A root that holds nothing yet."""
    return str(tmp_path / "data") if request.param == "local" else request.getfixturevalue("s3").uri(tmp_path.name)


FILES = {"a.txt": b"0123456789", "sub/b.jpg": b"b" * 100, "sub/deep/ü 1%#?.bin": b"", "z": bytes(range(256))}


@pytest.fixture
def filled(root):
    store = Store(root)
    for name, content in FILES.items():
        store.write(name, content)
    return store


def test_what_is_written_is_read(filled):
    assert {name: filled.read(name) for name in FILES} == FILES
    assert filled.text("a.txt") == "0123456789"
    filled.write("a.txt", memoryview(b"other"))
    assert filled.read("a.txt") == b"other"


def test_more_than_a_part_of_an_upload(root):
    content = os.urandom(11_000_000)
    Store(root).write("large", content)
    assert Store(root).read("large") == content
    assert Store(root).read("large", 10_999_990, 10) == content[-10:]


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (0, 0), (3, 4), (9, 1), (10, 0)])
def test_a_part_is_read(filled, offset, length):
    assert filled.read("a.txt", offset, length) == FILES["a.txt"][offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (8, 5), (10, 1), (99, 3)])
def test_a_part_beyond_the_end_is_an_error(filled, offset, length):
    with pytest.raises(RaydetError, match=rf"a\.txt.*: ends before byte {offset + length}$"):
        filled.read("a.txt", offset, length)


def test_files_are_listed_with_their_sizes_in_order(filled):
    def sizes(*arguments, **options):
        return [(name, size) for name, (size, _) in filled.files(*arguments, **options).items()]

    everything = sorted((name, len(content)) for name, content in FILES.items())
    assert sizes(recursive=True) == everything
    assert sizes() == [("a.txt", 10), ("z", 256)]
    assert sizes("sub") == [("b.jpg", 100)]
    assert sizes("sub", recursive=True) == [("b.jpg", 100), ("deep/ü 1%#?.bin", 0)]
    assert all(changed > 1.7e18 for _, changed in filled.files().values()), "nanoseconds"


def test_more_files_than_a_page_of_a_listing(tmp_path, s3):
    (s3.folder / tmp_path.name).mkdir()
    for number in range(1100):
        (s3.folder / tmp_path.name / f"{number:05d}").touch()
    assert list(Store(s3.uri(tmp_path.name)).files()) == [f"{number:05d}" for number in range(1100)]


def test_kind(root):
    store = Store(root)
    assert store.kind() == ""
    store.write("sub/a", b"a")
    assert [store.kind(name) for name in ("", "sub", "sub/a", "su", "sub/a/b")] == ["folder", "folder", "file", "", ""]


@pytest.mark.parametrize("folder", ["sub", "", ".", "sub/deep", "with space"])
def test_below(filled, folder):
    filled.write(f"{folder}/file" if folder else "file", b"here")
    below = filled.below(folder)
    assert below.read("file") == b"here"
    assert "file" in below.files()


def test_a_store_travels_to_other_processes(filled):
    assert pickle.loads(pickle.dumps(filled)).read("a.txt") == FILES["a.txt"]


def test_messages_name_the_whole_address(root):
    store = Store(root)
    address = root.partition("?")[0]
    for call, what in (
        (lambda: store.read("sub/no.jpg"), "/sub/no.jpg"),
        (lambda: store.read("sub/no.jpg", 0, 5), "/sub/no.jpg"),
        (lambda: store.text("no.txt"), "/no.txt"),
        (lambda: store.files("no"), "/no"),
        (store.files, ""),
    ):
        with pytest.raises(RaydetError) as error:
            call()
        assert str(error.value).startswith(address + what)
    store.write("latin.txt", "ü".encode("latin-1"))
    with pytest.raises(RaydetError, match=r"latin\.txt.* is not text in UTF-8"):
        store.text("latin.txt")


def test_a_part_of_an_open_file_is_one_request(tmp_path, s3):
    store = Store(s3.uri(tmp_path.name))
    store.write("shard", bytes(range(100)))
    store.read("shard", 0, 1)
    before = len(s3.requests)
    assert [store.read("shard", start, 2) for start in (5, 50, 98)] == [b"\x05\x06", b"23", b"bc"]
    assert s3.requests[before:] == [f"GET /bucket/{tmp_path.name}/shard"] * 3


def test_a_store_that_fails_now_and_then_is_asked_again(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(stores, "RETRY_AFTER_S", (0.0, 0.0))
    store = Store(s3.uri(tmp_path.name))
    for call in (
        lambda: store.write("a", b"content"),
        lambda: store.read("a"),
        lambda: store.read("a", 3, 2),
        store.files,
    ):
        s3.failures = 2
        call()
        assert s3.failures == 0
    s3.failures = 1000
    try:
        with pytest.raises(RaydetError, match=rf"^s3://bucket/{tmp_path.name}/a\?.*: cannot be reached \(.+\)$"):
            store.read("a")
    finally:
        s3.failures = 0


def test_the_server_is_also_found_by_the_environment(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.endpoint}")
    Store(f"s3://bucket/{tmp_path.name}").write("a", b"a")
    assert Store(f"s3://bucket/{tmp_path.name}?region=eu-west-1").read("a") == b"a"
    assert (s3.folder / tmp_path.name / "a").is_file()


@pytest.mark.parametrize("root", ["ftp://host/data", "s3://bucket/a?regoin=x"])
def test_what_is_no_store(root):
    with pytest.raises(RaydetError, match="no store that pyarrow can open") as error:
        Store(root)
    assert str(error.value).startswith(root)


def test_local_folders_may_be_relative_or_at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Store("data").write("a", b"a")
    assert Store("~/data").path("a") == Store(tmp_path / "data").path("a") == str(tmp_path / "data/a")


def test_a_file_is_never_seen_half_written(tmp_path):
    store = Store(tmp_path)
    store.write("a", b"whole")
    with pytest.raises(TypeError):
        store.write("a", 7)
    assert store.read("a") == b"whole"
    assert list(store.files()) == ["a"], "nothing is left beside it"


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RaydetError, match=r"file/a: cannot be written \(.+\)"):
        Store(tmp_path / "file").write("a", b"")


def test_links_to_nothing_are_no_files(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "itself").symlink_to("itself")
    assert list(Store(tmp_path).files()) == ["a", "link"]
    assert Store(tmp_path).dead_links() == ["dangling", "itself"]


def test_links_to_folders_are_followed_but_not_back(tmp_path):
    for name in ("data/a/1", "data/b/2", "data/b/deep/3", "other/4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in {
        "data/a/there": "../../other",
        "data/a/itself": ".",
        "data/b/deep/up": "..",
        "data/b/above": tmp_path,
        "other/back": "../data/a",
    }.items():
        (tmp_path / link).symlink_to(target)
    assert list(Store(tmp_path / "data").files(recursive=True)) == ["a/1", "a/there/4", "b/2", "b/deep/3"]


HIDDEN = (
    ".name",
    "._a.jpg",
    ".ipynb_checkpoints/a.jpg",
    "@eaDir/a.jpg",
    ".Trash-1000/files/a.jpg",
    "__MACOSX/a",
    "a/.b/c",
)


def test_what_is_hidden_is_not_listed_but_on_request(filled):
    for name in HIDDEN:
        filled.write(name, b"")
    assert filled.files(recursive=True).keys() == FILES.keys()
    assert filled.files(recursive=True, hidden=True).keys() == {*FILES, *HIDDEN}
    assert list(filled.files(".ipynb_checkpoints")) == ["a.jpg"]  # it was asked for


@pytest.mark.parametrize(
    ("name", "path"),
    [("a.jpg", "a.jpg"), ("sub/./a.jpg", "sub/a.jpg"), ("sub\\a.jpg", "sub/a.jpg"), ("12:30.jpg", "12:30.jpg")],
)
def test_names_below_a_folder(name, path):
    assert inside(name) == path


@given(st.text("ab.~/\\: ü\n-", min_size=1))
@settings(deadline=None)
def test_a_name_below_a_folder_is_a_path_in_its_shortest_form(name):
    try:
        path = inside(name)
    except ValueError:
        return
    assert path == str(PurePosixPath(name.replace("\\", "/")))
    assert not path.startswith("/")
    assert ".." not in path.split("/")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b", "C:\\a.jpg", "s3://bucket/a", "\\\\host\\a"])
def test_names_that_lead_out_of_a_folder(name):
    with pytest.raises(ValueError, match="leaves the folder of images" if name else "is empty"):
        inside(name)


def test_a_folder_is_removed_with_all_that_is_in_it(filled):
    filled.remove("sub")
    assert list(filled.files(recursive=True)) == ["a.txt", "z"]
    filled.remove("sub")
    filled.remove()
    assert filled.kind() == ""


def test_a_file_is_written_by_its_path_or_address(filled):
    place = join(filled.root, "sub/new.txt")
    write_file(place, b"new")
    assert filled.text("sub/new.txt") == "new"
    folder, name = above(place)
    assert (Store(folder).root, name) == (filled.below("sub").root, "new.txt")


def test_arrow_s_own_file_system_reads_the_same(filled):
    files, path = filled.arrow("sub/b.jpg")
    with files.open_input_file(path) as file:
        assert file.read() == FILES["sub/b.jpg"]


def test_a_recipe_is_read_by_its_path_or_address(root):
    write_file(join(root, "mine.yaml"), b"train: {epochs: 7}")
    recipe = load(join(root, "mine.yaml"))
    assert (recipe.name, recipe.train.epochs) == ("mine", 7)
    with pytest.raises(RaydetError, match="is neither a recipe of raydet nor a YAML file"):
        load(join(root, "yours.yaml"))
