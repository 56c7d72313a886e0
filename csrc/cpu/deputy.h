// A thread that computes in another one's place, for a process that was forked.
#pragma once

#include <condition_variable>
#include <future>
#include <mutex>
#include <thread>
#include <utility>

namespace kd {

// It stays from call to call, since OpenMP gives every thread that opens regions a team of its own,
// to be made anew for a new one. It is never taken down: the process may end while it waits.
class Deputy {
 public:
  Deputy() {
    std::thread([this] { serve(); }).detach();
  }
  Deputy(const Deputy&) = delete;
  Deputy& operator=(const Deputy&) = delete;

  // Returns when the work is done; an exception comes back to the caller.
  template <class Work>
  void run(Work work) {
    std::packaged_task<void()> task(std::move(work));
    std::future<void> done = task.get_future();
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      task_ = std::move(task);
    }
    arrival_.notify_one();
    done.get();
  }

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> hold(mutex_);
      arrival_.wait(hold, [this] { return task_.valid(); });
      std::packaged_task<void()> task = std::move(task_);
      hold.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable arrival_;
  std::packaged_task<void()> task_;
};

}  // namespace kd
