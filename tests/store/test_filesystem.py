"""File systems that lack what a store needs: a small C library changes what the operating system answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rethink_prune.store.filesystem import check_file_system
from rethink_prune.store.store import Store

# Loaded before the C library: LACKS names what this file system does not do.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int lacks(const char *what) { const char *set = getenv("LACKS"); return set && !strcmp(set, what); }

int flock(int fd, int operation) {
    if (lacks("locks")) { errno = ENOLCK; return -1; }     /* as NFS without its lock service */
    if (lacks("flock")) { errno = ENOSYS; return -1; }     /* as FUSE without flock */
    if (lacks("sight")) return 0;                          /* says yes to everybody */
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, operation);
}

int rename(const char *from, const char *to) {
    if (lacks("rename")) { errno = EOPNOTSUPP; return -1; }
    if (lacks("atomicity")) {                              /* as object stores: copies, then deletes */
        char content[64];
        int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_TRUNC);
        ssize_t size = read(in, content, sizeof content);
        if (write(out, content, size) != size) return -1;
        close(in); close(out);
        return unlink(from);
    }
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""
PREPARE = """
import sys
from pathlib import Path
from rethink_prune.errors import UserError
from rethink_prune.store.store import Store
try:
    Store(Path(sys.argv[1])).prepare()
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("nothing", ""),
        ("locks", "has no file locks (No locks available)"),
        ("flock", "has no file locks (Function not implemented)"),
        ("sight", "hides file locks from other processes"),
        ("rename", "cannot rename files (Operation not supported)"),
        ("atomicity", "does not replace a file at once"),
    ],
)
def test_what_a_file_system_lacks_is_one_line_at_the_start(
    tmp_path: Path, shim: Path, lacks: str, message: str
) -> None:
    root = tmp_path / "store"
    Store(root).prepare()  # format.json, which an earlier start wrote, is left alone
    environment = {**os.environ, "LD_PRELOAD": str(shim), "LACKS": lacks}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, root], env=environment, capture_output=True, text=True, check=False
    )
    expected = f"{root}/stages: its file system {message}; name a folder on another file system with store.root=...\n"
    assert (done.returncode, done.stderr) == ((1, expected) if message else (0, ""))
    assert list((root / "stages").iterdir()) == [], "nothing is left behind"


def test_many_may_check_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(check_file_system, [tmp_path] * 64))
    assert list(tmp_path.iterdir()) == []
