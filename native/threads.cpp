#include "threads.hpp"

#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace evenkeel {
namespace {

// libgomp's entry point; libomp and libiomp5 export it too. We link none of them: a second OpenMP
// runtime beside torch's would bring a second pool, and the two would fight for the cores.
struct OpenMP {
  void (*run)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*team)() = nullptr;
  int (*nested)() = nullptr;
  std::string path = "own threads";
};

#if defined(__linux__)
int look(dl_phdr_info* info, size_t, void* data) {
  auto& found = *static_cast<std::string*>(data);
  const char* path = info->dlpi_name;
  const char* file = std::strrchr(path, '/');
  file = file ? file + 1 : path;
  for (const char* name : {"libgomp", "libomp", "libiomp5"}) {
    if (std::strncmp(file, name, std::strlen(name)) != 0) continue;
    // Others bring runtimes of their own (scikit-learn does): torch's is in torch's folder.
    if (found.empty() || std::strstr(path, "/torch")) found = path;
  }
  return 0;
}
#endif

OpenMP find() {
  OpenMP omp;
#if defined(__linux__)
  std::string path;
  dl_iterate_phdr(look, &path);
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library) {
    omp.run = reinterpret_cast<decltype(omp.run)>(dlsym(library, "GOMP_parallel"));
    omp.thread = reinterpret_cast<decltype(omp.thread)>(dlsym(library, "omp_get_thread_num"));
    omp.team = reinterpret_cast<decltype(omp.team)>(dlsym(library, "omp_get_num_threads"));
    omp.nested = reinterpret_cast<decltype(omp.nested)>(dlsym(library, "omp_in_parallel"));
    if (omp.run && omp.thread && omp.team && omp.nested) {
      omp.path = path;
    } else {
      omp.run = nullptr;
    }
  }
#endif
  return omp;
}

const OpenMP& openmp() {
  static const OpenMP omp = find();
  return omp;
}

struct Team {
  const std::function<void(Index)>* body;
  Index tasks;
};

void member(void* data) {
  const Team& team = *static_cast<Team*>(data);
  const OpenMP& omp = openmp();
  // Neighbours to one thread: what the processor fetches ahead, beyond the end of a task, is then not
  // what another thread is about to write.
  const Index member = omp.thread(), all = omp.team();
  for (Index i = team.tasks * member / all; i < team.tasks * (member + 1) / all; ++i) (*team.body)(i);
}

}  // namespace

void parallel(Index tasks, int threads, const std::function<void(Index)>& body) {
  const OpenMP& omp = openmp();
  const Index members = tasks < threads ? tasks : threads;
  if (members <= 1 || (omp.run && omp.nested())) {
    for (Index task = 0; task < tasks; ++task) body(task);
    return;
  }
  if (omp.run) {
    Team team{&body, tasks};
    omp.run(member, &team, static_cast<unsigned>(members), 0);
    return;
  }
  std::atomic<Index> next{0};
  auto work = [&] {
    for (Index task = next++; task < tasks; task = next++) body(task);
  };
  std::vector<std::thread> others;
  for (Index i = 1; i < members; ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}

const char* pool_name() { return openmp().path.c_str(); }

}  // namespace evenkeel
