import os
import sqlite3
import threading
from dataclasses import replace

import pytest

from gen import library
from gen.errors import GenError
from gen.library import Entry


def entry(**changes) -> Entry:
    fields = {
        "id": library.new_id(),
        "created": 1_700_000_000.0,
        "model": "pixart-sigma",
        "weights": "toy",
        "fingerprint": "0123456789ab",
        "seed": 7,
        "prompt": "a red cube",
        "path": library.home() / "outputs" / "picture.png",
        "width": 64,
        "height": 96,
        "seconds": 1.5,
        "peak_bytes": 1000,
        "toy": True,
        "recipe": {"request": {"model": "pixart-sigma", "inputs": {"steps": 20}}},
    }
    return Entry(**(fields | changes))


def add(one: Entry) -> Entry:
    with library.adding() as insert:
        insert(one)
    return one


def test_looking_at_nothing_creates_nothing():
    assert library.search() == []
    assert not library.home().exists()


def test_a_row_comes_back_as_it_went_in():
    one = add(entry())
    assert library.get(one.id) == one
    assert library.get(one.id).request == {"model": "pixart-sigma", "inputs": {"steps": 20}}


def test_the_largest_seed_fits():
    one = add(entry(seed=2**63 - 1))
    assert library.get(one.id).seed == 2**63 - 1


def test_paths_follow_when_the_home_is_moved(monkeypatch):
    one = add(entry())
    outside = add(entry(path=library.home().parent / "elsewhere.png"))
    moved = library.home().rename(library.home().parent / "moved")
    monkeypatch.setenv("GEN_HOME", str(moved))
    assert library.get(one.id).path == moved / "outputs" / "picture.png"
    assert library.get(outside.id).path == outside.path


def test_search_is_newest_first_and_needs_every_word():
    old = add(entry(created=1.0, prompt="a red cube on a blue ground"))
    new = add(entry(created=2.0, prompt="a BLUE ball"))
    other = add(entry(created=3.0, prompt="a green cone", model="dit"))
    assert [one.id for one in library.search()] == [other.id, new.id, old.id]
    assert [one.id for one in library.search("blue")] == [new.id, old.id]
    assert [one.id for one in library.search("blue red")] == [old.id]
    assert [one.id for one in library.search(model="dit")] == [other.id]
    assert [one.id for one in library.search(limit=1)] == [other.id]
    assert library.search("purple") == []


def test_search_finds_seeds_and_ids_too():
    one = add(entry(seed=1234))
    add(entry(seed=12345))
    assert [found.id for found in library.search("1234")] == [one.id]
    assert [found.id for found in library.search(one.id)] == [one.id]


@pytest.mark.parametrize("text", ["100%", "under_score", "back\\slash", "quote's", '"'])
def test_search_takes_every_character_literally(text):
    one = add(entry(prompt=f"a cube {text}"))
    add(entry(prompt="a cube 1000 underXscore backslash quotes"))
    assert [found.id for found in library.search(text)] == [one.id]


def test_a_failing_body_leaves_no_row():
    one = entry()
    with pytest.raises(KeyboardInterrupt), library.adding() as insert:
        insert(one)
        raise KeyboardInterrupt
    assert not library.holds(one.path)


def test_deleting_removes_row_and_file_and_forgives_a_file_that_is_gone():
    one = entry()
    one.path.parent.mkdir(parents=True)
    one.path.write_bytes(b"png")
    add(one)
    gone = add(entry(path=one.path.with_name("gone.png")))
    library.delete(one.id)
    library.delete(gone.id)
    assert not one.path.exists()
    assert library.search() == []
    with pytest.raises(GenError) as caught:
        library.delete(one.id)
    assert caught.value.code == "not_found"


def test_files_beside_the_own_one_go_with_it_and_older_rows_have_one():
    one = add(entry(files={"glb": "picture.glb", "png": "picture.png"}))
    folder = one.path.parent
    assert library.get(one.id).paths == {"glb": folder / "picture.glb", "png": folder / "picture.png"}
    folder.mkdir(parents=True)
    for path in one.paths.values():
        path.touch()
    library.delete(one.id)
    assert list(folder.iterdir()) == []
    assert entry().paths == {"png": entry().path}


def test_a_library_of_before_there_were_several_files_is_read(tmp_path):
    library.home().mkdir()
    with sqlite3.connect(library.home() / "library.sqlite3") as db:
        library.migrate(db, library.MIGRATIONS[:2])
        old = entry()
        row = vars(old) | {"path": "outputs/picture.png", "recipe": "{}"}
        del row["files"]
        db.execute(
            f"INSERT INTO results ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()]
        )
    assert library.get(old.id).paths == {"png": old.path}


def test_typical_is_the_median_of_the_same_work():
    for loading, seconds in ((0.5, 1.5), (0, 9.0), (0, 2.0)):
        recipe = {"request": {"inputs": {"steps": 20}}, "seconds": {"loading": loading}}
        add(entry(seconds=seconds, peak_bytes=int(seconds), recipe=recipe))
    add(entry(seconds=100.0, width=128))
    work = {"width": 64, "height": 96, "steps": 20}
    assert library.typical("pixart-sigma", "toy", work, 128) == library.Typical(0.5, 2.0, 2)
    assert library.typical("pixart-sigma", "toy", {"width": 64, "height": 96, "steps": 21}, 128) is None


def test_many_threads_may_add_at_once():
    entries = [entry() for _ in range(16)]
    threads = [threading.Thread(target=add, args=(one,)) for one in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.id for one in library.search(limit=99)} == {one.id for one in entries}


def test_migrations_are_applied_once_and_in_order():
    db = sqlite3.connect(":memory:", isolation_level=None)
    library.migrate(db, ("CREATE TABLE a (x)",))
    library.migrate(db, ("CREATE TABLE a (x)", "INSERT INTO a VALUES (1)"))
    library.migrate(db, ("CREATE TABLE a (x)", "INSERT INTO a VALUES (1)"))
    assert db.execute("SELECT * FROM a").fetchall() == [(1,)]
    assert [number for number, _ in db.execute("SELECT * FROM migrations")] == [1, 2]


def test_a_migration_that_fails_changes_nothing():
    db = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        library.migrate(db, ("CREATE TABLE a (x)", "NONSENSE"))
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == []


def test_the_first_migration_is_still_what_libraries_in_the_wild_have():
    import hashlib

    digest = hashlib.sha256(" ".join(library.MIGRATIONS[0].split()).encode()).hexdigest()
    assert digest[:16] == "cdcab68a0e7ae86d", "a migration that was released is never edited: append another"


def test_a_library_of_a_newer_program_is_refused():
    add(entry())
    with sqlite3.connect(library.home() / "library.sqlite3") as db:
        db.execute("INSERT INTO migrations VALUES (999, 0)")
    with pytest.raises(GenError, match="newer") as caught:
        library.search()
    assert "GEN_HOME" in caught.value.hint


def test_a_damaged_library_is_named():
    library.home().mkdir(parents=True)
    (library.home() / "library.sqlite3").write_bytes(b"this is no database" * 100)
    with pytest.raises(GenError, match=r"library\.sqlite3 is damaged"):
        library.search()


def test_a_home_that_is_a_file_cannot_be_written_to():
    library.home().parent.mkdir(exist_ok=True)
    library.home().write_text("in the way")
    with pytest.raises(GenError) as caught:
        library.prepare()
    assert caught.value.code == "output_not_writable"


def test_a_full_disk_is_said_to_be_full():
    """SQLite's own limit on pages gives the very error that a full disk gives."""
    add(entry())
    with pytest.raises(GenError) as caught, library._open() as db, library._transaction(db):
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        db.execute("CREATE TABLE large AS SELECT zeroblob(1000000)")
    assert caught.value.code == "disk_full"


def test_bugs_are_written_down(monkeypatch):
    try:
        raise RuntimeError("a bug of this test")
    except RuntimeError as error:
        path = library.log_bug(error)
    assert path is not None
    assert path.parent == library.home() / "logs"
    assert "a bug of this test" in path.read_text()
    assert "Traceback" in path.read_text()
    monkeypatch.setenv("GEN_HOME", os.devnull)
    assert library.log_bug(error := RuntimeError("x")) is None, error


def test_entries_are_plain_json():
    import json

    one = add(entry())
    assert json.loads(json.dumps(library.get(one.id).to_json()))["path"] == str(one.path)
    assert replace(one, seed=8).seed == 8
