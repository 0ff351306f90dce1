"""The kernels' threads: where some can't be started, and where a task fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sirius_runtime.kernels import build
from sirius_runtime.kernels.build import InstructionSet, compiler
from tests.support.kernels import require

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")

PROGRAM = r"""
#include <dlfcn.h>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <stdexcept>
#include <vector>
#include "threads.h"

static int room = 1 << 30;  // threads that there is room for

typedef void* Begin(void*);

extern "C" int pthread_create(pthread_t* id, const pthread_attr_t* with, Begin* f, void* x) {
  typedef int (*Create)(pthread_t*, const pthread_attr_t*, Begin*, void*);
  static const Create create = (Create)dlsym(RTLD_NEXT, "pthread_create");
  return room-- > 0 ? create(id, with, f, x) : EAGAIN;
}

static int threads() {
  const auto all = std::filesystem::directory_iterator("/proc/self/task");
  return int(std::distance(begin(all), end(all)));
}

// Whether each of 1000 tasks runs once.
static bool all_run(int asked) {
  std::vector<std::atomic<int>> runs(1000);
  sirius::parallel(1000, asked, [&](size_t task) { runs[task]++; });
  for (auto& run : runs)
    if (run != 1) return false;
  return true;
}

// Tasks that last until all of `count` run at once, or a while; the one of that number throws.
static void throws(int count, size_t which) {
  std::atomic<int> began{0};
  sirius::parallel(count, count, [&](size_t task) {
    began++;
    for (int turns = 0; began < count && turns < 2000; turns++)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (task == which) throw std::bad_alloc();
  });
}

int cannot_be_started() {
  room = 0;
  if (!all_run(5) || threads() != 1) return 1;
  room = 2;
  if (!all_run(5) || threads() != 3) return 2;
  room = 9;
  if (!all_run(5) || threads() != 5) return 3;
  return 0;
}

int too_many() {
  if (!all_run(0) || !all_run(-7) || threads() != 1) return 1;
  if (!all_run(100000) || threads() > sirius::MOST_THREADS) return 2;
  return 0;
}

int failures() {
  for (size_t which = 0; which < 3; which++) {
    bool caught = false;
    try {
      throws(3, which);
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    if (!caught || !all_run(3) || threads() != 3) return 1 + int(which);
  }
  return 0;
}

int main(int, char** words) {
  if (!strcmp(words[1], "cannot be started")) return cannot_be_started();
  return !strcmp(words[1], "too many") ? too_many() : failures();
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require(InstructionSet.PORTABLE)
    folder = tmp_path_factory.mktemp("program")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [compiler()[0], "-std=c++17", "-pthread", "-I", str(build._SOURCES), "-ldl"]
    made = [*command, str(folder / "main.cpp"), "-o", str(folder / "main")]
    subprocess.run(made, check=True, timeout=120)
    return folder / "main"


@pytest.mark.parametrize("case", ["cannot be started", "too many", "failures"])
def test_threads(program: Path, case: str) -> None:
    """Threads that can't be started are done without, and started when there is room again; there
    are never more than MOST_THREADS; what a task throws, on whatever thread, ends the call alone.
    """
    assert subprocess.run([program, case], timeout=120).returncode == 0


@pytest.mark.gate
def test_memory_that_runs_out_in_a_helper_is_an_error() -> None:
    """Tasks of attention need about 100 MB each for such heads, and there are 60 in all."""
    require(InstructionSet.PORTABLE)
    script = """
import resource, torch, sirius_runtime.operators
from pathlib import Path
torch.set_num_threads(3)
D = 1 << 20
q, k, cache = torch.ones(1, 4, 1, D), torch.ones(1, 4, 1, D), torch.zeros(1, 1, 4, 1, D)
at, mask = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64)
def attend(size):
    part = [tensor[..., :size].contiguous() for tensor in (q, k, k, cache, cache)]
    return torch.ops.sirius.cached_attention(*part, at, at, at[0], mask, 0, 1.0, None, None)
assert attend(8).eq(1).all()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
args = [q, k, k, cache, cache, at, at, at[0], mask, 0, 1.0, None, None]
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), most))
try:
    torch.ops.sirius.cached_attention(*args)
except MemoryError as error:
    assert "sirius::cached_attention" in str(error), error
else:
    raise SystemExit("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert torch.ops.sirius.cached_attention(*args).eq(1).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
