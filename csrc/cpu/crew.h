// Threads that share the work of an encoder's ops, and whom nobody waits for that has not begun.
//
// OpenMP's region ends when each of its threads has been there. On a core that another process uses a thread comes some
// milliseconds late, which is longer than a region takes: two threads beside one busy process took five times as long as
// on a quiet machine. Here the caller works too, takes all pieces that nobody else has taken, and waits for those alone
// that are being worked on.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define LBFAST_FORKS
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lbfast::crew {

constexpr std::chrono::microseconds kPatience{100};  // of waiting awake: between two ops of a model less goes by

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// True once ready() is; false when patience is at an end.
template <typename Ready>
bool soon(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) {
        return true;
      }
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Crew {
 public:
  // This process's, never destroyed: its threads may be anywhere when a process ends. A fork has none of its parent's.
  static Crew& here() {
    static std::atomic<Crew*>& crew = made();
    return *crew.load(std::memory_order_acquire);
  }

  // work(state) by the caller and by up to `others` threads, those that come before the caller is done with it. What one
  // of them throws, the caller throws, after all are out of it.
  void share(int64_t others, void (*work)(void*), void* state) {
    Job job{work, state, others};
    int64_t asleep = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      hire(others);
      jobs_.push_back(&job);
      wanted_.store(others, std::memory_order_relaxed);
      posted_.fetch_add(1, std::memory_order_release);
      asleep = std::min(asleep_, others - awake_);
    }
    for (; asleep > 0; --asleep) {
      wake_.notify_one();
    }
    job.run();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    if (!crew::soon([&] { return job.inside.load(std::memory_order_acquire) == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return job.inside.load(std::memory_order_acquire) == 0; });
    }
    const std::lock_guard<std::mutex> lock(mutex_);  // whoever was the last in it has let go of it
    if (job.failure) {
      std::rethrow_exception(job.failure);
    }
  }

 private:
  struct Job {
    void (*work)(void*);
    void* state;
    int64_t seats;
    std::atomic<int64_t> inside{0};
    std::exception_ptr failure = nullptr;
    std::mutex failing{};

    void run() {
      try {
        work(state);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing);
        failure = std::current_exception();
      }
    }
  };

  static std::atomic<Crew*>& made() {
    static std::atomic<Crew*> crew{new Crew};
#if defined(LBFAST_FORKS)
    pthread_atfork(nullptr, nullptr, [] { crew.store(new Crew, std::memory_order_release); });
#endif
    return crew;
  }

  // Under the mutex: as many threads as that. Signals are left to threads that Python knows, but for those that a thread's
  // own faults raise.
  void hire(int64_t threads) {
    if (hired_ >= threads) {
      return;
    }
#if defined(LBFAST_FORKS)
    sigset_t others, before;
    sigfillset(&others);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS}) {
      sigdelset(&others, own);
    }
    pthread_sigmask(SIG_SETMASK, &others, &before);
#endif
    try {
      for (; hired_ < threads; ++hired_) {
        std::thread([this, place = hired_] { serve(place); }).detach();
      }
    } catch (...) {  // the machine has no more: those that there are do it
    }
#if defined(LBFAST_FORKS)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  // The thread hired as number `place`: it waits awake where the last job wanted as many.
  [[noreturn]] void serve(int64_t place) {
    for (;;) {
      const uint64_t seen = posted_.load(std::memory_order_acquire);
      if (Job* job = take()) {
        job->run();
        const std::lock_guard<std::mutex> lock(mutex_);
        if (job->inside.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          done_.notify_all();
        }
        continue;
      }
      const auto news = [&] { return posted_.load(std::memory_order_acquire) != seen; };
      bool told = false;
      if (place < wanted_.load(std::memory_order_relaxed)) {
        ++awake_;
        told = crew::soon(news);
        --awake_;
      }
      if (!told) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, news);
        --asleep_;
      }
    }
  }

  Job* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Job* job : jobs_) {
      if (job->seats > 0) {
        --job->seats;
        job->inside.fetch_add(1, std::memory_order_acq_rel);
        return job;
      }
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> posted_{0};
  std::atomic<int64_t> wanted_{0}, awake_{0};
  int64_t hired_ = 0, asleep_ = 0;
};

inline const bool ready = (Crew::here(), true);  // when the library is loaded: no fork falls into its making

// work(next) on up to PyTorch's number of threads, each of which takes pieces from 0 to count - 1 as long as there are:
// for (int64_t i = next++; i < count; i = next++). `blas`: work calls PyTorch's products, which would bring threads of
// their own but in a region of OpenMP.
template <typename Work>
void share(int64_t count, const Work& work, bool blas = false) {
  struct State {
    const Work& work;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } state{work, count};
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1) {
    work(state.next);
  } else if (blas) {
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(state.next); });
  } else {
    const auto call = [](void* of) {
      auto* mine = static_cast<State*>(of);
      if (mine->next.load() < mine->count) {  // else it is late
        mine->work(mine->next);
      }
    };
    Crew::here().share(threads - 1, call, &state);
  }
}

}  // namespace lbfast::crew
