from pathlib import Path

from rethink_prune.data.memory import available_memory


def write_system(root: Path, *, cgroup: str) -> tuple[Path, Path]:
    proc, groups = root / "proc", root / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable:     8192 kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    groups.mkdir()
    return proc, groups


def write_group(group: Path, *, limit: str, used: int, cached: int) -> None:
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def test_machine_has_what_it_says(tmp_path: Path) -> None:
    proc, groups = write_system(tmp_path, cgroup="4:memory:/somewhere\n")
    assert available_memory(proc, groups) == 8192 * 1024


def test_least_of_all_groups_counts(tmp_path: Path) -> None:
    proc, groups = write_system(tmp_path, cgroup="0::/job/step\n")
    write_group(groups / "job", limit="5000", used=3000, cached=1000)
    write_group(groups / "job/step", limit="max", used=3000, cached=0)
    assert available_memory(proc, groups) == 3000


def test_this_machine_answers() -> None:
    available = available_memory()
    assert available is None or 2**20 < available < 2**50
