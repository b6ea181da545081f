#include "replay.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/python_variable.h>

namespace resnet_kernels {

void Replay::empty(int64_t slot, std::vector<int64_t> sizes, std::vector<int64_t> strides, at::ScalarType dtype,
                   at::Device device) {
  steps_.push_back({Empty{slot, std::move(sizes), std::move(strides), at::TensorOptions().dtype(dtype).device(device)}, {}});
}

void Replay::view(int64_t slot, int64_t base, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset) {
  steps_.push_back({View{slot, base, std::move(sizes), std::move(strides), offset}, {}});
}

void Replay::call(py::object function, std::vector<py::object> arguments, std::vector<int64_t> slots, py::tuple names,
                  std::vector<int64_t> results) {
  TORCH_CHECK(arguments.size() == slots.size() && names.size() <= slots.size(), "a slot or -1 for each argument");
  steps_.push_back({Call{std::move(function), std::move(arguments), std::move(slots), std::move(names), std::move(results)}, {}});
}

void Replay::launch(std::string name, uintptr_t function, unsigned grid, unsigned threads, unsigned shared,
                    const std::vector<std::tuple<int64_t, int64_t, uint64_t>>& parameters) {
  Launch step{std::move(name), reinterpret_cast<void*>(function), grid, threads, shared, {}};
  for (const auto& [slot, offset, bits] : parameters) step.parameters.push_back({slot, offset, bits});
  steps_.push_back({std::move(step), {}});
}

void Replay::release(std::vector<int64_t> slots) {
  TORCH_CHECK(!steps_.empty(), "expected a step before what it releases");
  steps_.back().dead = std::move(slots);
}

void Replay::run(const Empty& step, Slots& slots, void*) const {
  slots[step.slot] = at::empty_strided(step.sizes, step.strides, step.options);
}

void Replay::run(const View& step, Slots& slots, void*) const {
  const at::Tensor& base = slots[step.base];
  slots[step.slot] = at::as_strided(base, step.sizes, step.strides, base.storage_offset() + step.offset);
}

void Replay::run(const Call& step, Slots& slots, void*) const {
  std::vector<py::object> arguments = step.arguments;
  std::vector<PyObject*> values;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (step.slots[i] >= 0) arguments[i] = py::cast(slots[step.slots[i]]);
    values.push_back(arguments[i].ptr());
  }
  const size_t positional = values.size() - step.names.size();
  const auto found = py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(step.function.ptr(), values.data(), positional, step.names.ptr()));
  if (!found) throw py::error_already_set();
  if (THPVariable_Check(found.ptr())) {
    if (step.results[0] >= 0) slots[step.results[0]] = py::cast<at::Tensor>(found);
    return;
  }
  size_t i = 0;
  for (const int64_t slot : step.results) {
    if (slot >= 0) slots[slot] = py::cast<at::Tensor>(found[py::int_(i)]);
    ++i;
  }
}

void Replay::run(const Launch& step, Slots& slots, void* stream) const {
  if (step.grid == 0) return;
  std::vector<uint64_t> values;
  values.reserve(step.parameters.size());
  std::vector<void*> parameters;
  parameters.reserve(step.parameters.size());
  for (const Parameter& p : step.parameters) {
    values.push_back(p.slot < 0 ? p.bits : reinterpret_cast<uint64_t>(slots[p.slot].data_ptr()) + p.offset);
    parameters.push_back(&values.back());
  }
  const int error = launch_(step.function, step.grid, 1, 1, step.threads, 1, 1, step.shared, stream, parameters.data(), nullptr);
  TORCH_CHECK(error == 0, step.name, ": cuLaunchKernel returned ", error, " for a grid of ", step.grid, ", ", step.threads,
              " threads, ", step.shared, " bytes of shared memory");
}

std::vector<at::Tensor> Replay::run(const std::vector<at::Tensor>& given, uintptr_t stream) const {
  Slots slots(given);
  slots.resize(count_);
  for (const Step& step : steps_) {
    std::visit([&](const auto& what) { run(what, slots, reinterpret_cast<void*>(stream)); }, step.what);
    for (const int64_t slot : step.dead) slots[slot].reset();
  }
  std::vector<at::Tensor> results;
  for (const int64_t slot : results_) results.push_back(slots[slot]);
  return results;
}

}  // namespace resnet_kernels
