// evenkeel_check: random cases through every build of the kernels. See native/README.md.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string>

#include <unistd.h>

#include "../threads.hpp"
#include "depthwise.hpp"
#include "huge.hpp"
#include "run.hpp"

// The sanitizers' own, where there are any.
extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

using namespace evenkeel;
using namespace evenkeel::check;

const char usage[] =
    "evenkeel_check [--cases N] [--seed S] [--case K] [--mistake NAME]   random cases\n"
    "evenkeel_check --huge                                               over 2^31 values\n";

struct Options {
  std::uint64_t cases = 300, seed = 1, first = 0;
  Mistake mistake = Mistake::none;
  bool huge = false;
};

char at_work[1024];  // what is said of a case that ends the process

void say_where() {
  if (write(STDERR_FILENO, at_work, std::strlen(at_work)) < 0) return;
  at_work[0] = 0;
}

void on_signal(int number) {
  say_where();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

void watch() {
  std::signal(SIGABRT, on_signal);  // how UndefinedBehaviorSanitizer ends
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback(say_where);
    return;
  }
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(number, on_signal);
}

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "evenkeel_check: %s\n%s", why.c_str(), usage);
  std::exit(2);
}

Mistake mistake_named(const std::string& name) {
  const std::map<std::string, Mistake> names{
      {"mean", Mistake::mean}, {"m2", Mistake::m2},         {"y", Mistake::y},
      {"sum", Mistake::sum},   {"dx", Mistake::dx},         {"dresidual", Mistake::dresidual},
      {"before", Mistake::before}, {"behind", Mistake::behind}, {"address", Mistake::address}};
  const auto found = names.find(name);
  if (found == names.end()) stop("unknown mistake '" + name + "'");
  return found->second;
}

Options read(int count, char** words) {
  Options o;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--huge") {
      o.huge = true;
      continue;
    }
    if (i + 1 == count) stop("unknown word, or one without its value: '" + word + "'");
    const std::string value = words[++i];
    if (word == "--mistake") {
      o.mistake = mistake_named(value);
      continue;
    }
    char* end = nullptr;
    const std::uint64_t number = std::strtoull(value.c_str(), &end, 10);
    if (value.empty() || *end) stop(word + " takes a number, not '" + value + "'");
    if (word == "--cases") {
      o.cases = number;
    } else if (word == "--seed") {
      o.seed = number;
    } else if (word == "--case") {
      o.first = number, o.cases = 1;
    } else {
      stop("unknown word '" + word + "'");
    }
  }
  return o;
}

int random_cases(const Options& o) {
  const Builds builds = builds_here();
  if (builds.names.empty()) stop("no kernels that this processor runs were built");
  std::map<std::string, int> counts;
  for (std::uint64_t k = o.first; k < o.first + o.cases; ++k) {
    const Case c = draw(o.seed, k, builds);
    const std::string text = describe(c);
    std::snprintf(at_work, sizeof at_work, "\nIN evenkeel_check %s\n", text.c_str());
    try {
      run_case(c, o.mistake);
      depthwise_case(o.seed, k, builds);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "WRONG: %s\n%s", error.what(), at_work);
      return 1;
    }
    ++counts[c.instructions + ' ' + name_of(c.type)];
  }
  at_work[0] = 0;
  for (const auto& [what, n] : counts) std::printf("%6d cases right: %s\n", n, what.c_str());
  std::printf("seed %llu, %s\n", static_cast<unsigned long long>(o.seed), pool_name());
  return 0;
}

}  // namespace

int main(int count, char** words) {
  watch();
  const Options options = read(count, words);
  return options.huge ? huge_cases() : random_cases(options);
}
