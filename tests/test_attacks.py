"""Opening a file runs nothing, writes nothing and reaches nothing: every format, under an audit hook."""

import pytest
from attacks import Job, audited

PLANTED = (
    "writes",
    "writes_by_descriptor",
    "removes",
    "starts_a_process",
    "calls_the_shell",
    "connects",
    "imports",
    "unpickles",
    "loads_a_library",
    "reads_elsewhere",
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What the hook notes of openers that misbehave, each on a file of its own."""
    jobs = []
    for name in (*PLANTED, "dies", "takes_memory", "reads"):
        folder = tmp_path_factory.mktemp("planted")
        (folder / "forbidden").mkdir()
        (folder / "forbidden" / "secret").write_text("secret")
        (folder / "file").write_text("x")
        jobs.append(Job(name, folder / "file", opener=f"planted:{name}"))
    return audited(jobs, warm=("planted",), forbidden=tuple(job.path.parent / "forbidden" for job in jobs))


@pytest.mark.parametrize("name", PLANTED)
def test_the_hook_notes_a_planted_violation(planted, name):
    """Negative control: an opener that does what opening must not is noted, each kind."""
    assert planted[name].violations


def test_the_hook_notes_nothing_where_a_file_is_read(planted):
    """Negative control the other way: reading the file itself is no violation."""
    assert planted["reads"].violations == ()
    assert planted["reads"].said == "bytes"


def test_a_child_that_dies_costs_only_its_job(planted):
    """A dead child is reported as such, and the jobs after it were still carried out."""
    assert planted["dies"].said.startswith("DIED")
    assert planted["takes_memory"].said == "int"


def test_memory_is_measured(planted):
    """The growth of 300 MiB is seen, and none where a file is read."""
    assert planted["takes_memory"].mebibytes >= 290
    assert planted["reads"].mebibytes < 50
