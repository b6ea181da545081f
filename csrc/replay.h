// Recorded steps, done again: memory, views, launches, and calls of what Python knows. Slots are tensors: the first ones
// are given, each of the others is made by one step. resnet_kernels/backends/triton/replay.py adds the steps.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace resnet_kernels {

// What cuLaunchKernel is: function, grid, block, shared memory, stream, parameters, nothing more.
using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                             void**);

// Hidden, as pybind11 is.
class __attribute__((visibility("hidden"))) Replay {
 public:
  // A pointer: the slot's first element and so many bytes. slot < 0: a number, its bits from the lowest byte on.
  struct Parameter {
    int64_t slot, offset;
    uint64_t bits;
  };

  Replay(int64_t slots, uintptr_t launch, std::vector<int64_t> results)
      : count_(slots), launch_(reinterpret_cast<LaunchKernel>(launch)), results_(std::move(results)) {}

  void empty(int64_t slot, std::vector<int64_t> sizes, std::vector<int64_t> strides, at::ScalarType dtype,
             at::Device device);
  // offset: elements from the base's first.
  void view(int64_t slot, int64_t base, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset);
  // slots: per argument the slot that stands for it, or -1. names: of the last arguments. results: slots, or -1.
  void call(py::object function, std::vector<py::object> arguments, std::vector<int64_t> slots, py::tuple names,
            std::vector<int64_t> results);
  void launch(std::string name, uintptr_t function, unsigned grid, unsigned threads, unsigned shared,
              const std::vector<std::tuple<int64_t, int64_t, uint64_t>>& parameters);
  // What the last step is the last to use.
  void release(std::vector<int64_t> slots);

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& given, uintptr_t stream) const;

 private:
  struct Empty {
    int64_t slot;
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
  };
  struct View {
    int64_t slot, base;
    std::vector<int64_t> sizes, strides;
    int64_t offset;
  };
  struct Call {
    py::object function;
    std::vector<py::object> arguments;
    std::vector<int64_t> slots;
    py::tuple names;
    std::vector<int64_t> results;
  };
  struct Launch {
    std::string name;
    void* function;
    unsigned grid, threads, shared;
    std::vector<Parameter> parameters;
  };
  struct Step {
    std::variant<Empty, View, Call, Launch> what;
    std::vector<int64_t> dead;
  };
  using Slots = std::vector<at::Tensor>;

  void run(const Empty& step, Slots& slots, void* stream) const;
  void run(const View& step, Slots& slots, void* stream) const;
  void run(const Call& step, Slots& slots, void* stream) const;
  void run(const Launch& step, Slots& slots, void* stream) const;

  int64_t count_;
  LaunchKernel launch_;
  std::vector<int64_t> results_;
  std::vector<Step> steps_;
};

}  // namespace resnet_kernels
