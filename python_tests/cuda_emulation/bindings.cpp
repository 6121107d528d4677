// The bindings of the CUDA ops, as they are, with a stub of torch below them and nothing launched:
// cuda_bindings.py has the compiler include torch_stub.h and every csrc/cuda/*.cu before this.
//
// Reads calls from standard input, a line each: OP OUTPUTS ARGUMENT ..., as cuda_bindings.py has them.
// Writes for each a line of JSON: the outputs or the error, and all that was asked of CUDA.
#include "torch_stub.h"

#include <iostream>

// --- planted faults -----------------------------------------------------------------------------

namespace oodk::cuda {
namespace {

__global__ void nothing(const float*) {}

const float* data(const Tensor& t) {
  return t.const_data_ptr<float>();
}
Tensor fault_default_stream(const Tensor& t) {
  const OnDevice on(t);
  launch(nothing, 1, 32, 0, nullptr, data(t));
  return t;
}
Tensor fault_no_guard(const Tensor& t) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream);
  launch(nothing, 1, 32, 0, stream, data(t));
  return t;
}
Tensor fault_waits(const Tensor& t) {
  const OnDevice on(t);
  return torch::stable::to(t, oodk::Device("cpu"));
}
Tensor fault_empty_grid(const Tensor& t) {
  const OnDevice on(t);
  launch(nothing, t.size(0) / 32, 32, 0, on.stream, data(t));
  return t;
}
Tensor fault_blocks(const Tensor& t) {
  const OnDevice on(t);
  launch(nothing, t.size(0), 32, 0, on.stream, data(t));
  return t;
}
Tensor fault_threads(const Tensor& t) { // more than there are registers for
  const OnDevice on(t);
  launch(seed_runs<float>, 1, 1024, 0, on.stream, Seeding<float>{}, 0, 1);
  return t;
}
Tensor fault_shared(const Tensor& t) { // with what is static, more than a block has
  const OnDevice on(t);
  launch(sum_deviations<float>, 1, 512, 41 << 10, on.stream, Points<float>{}, nullptr, nullptr);
  return t;
}
Tensor fault_reads_device(const Tensor& t) {
  const OnDevice on(t);
  launch(nothing, 1 + int64_t(data(t)[0]), 32, 0, on.stream, data(t));
  return t;
}

} // namespace
} // namespace oodk::cuda

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("fault_default_stream", TORCH_BOX(&oodk::cuda::fault_default_stream));
  m.impl("fault_no_guard", TORCH_BOX(&oodk::cuda::fault_no_guard));
  m.impl("fault_waits", TORCH_BOX(&oodk::cuda::fault_waits));
  m.impl("fault_empty_grid", TORCH_BOX(&oodk::cuda::fault_empty_grid));
  m.impl("fault_blocks", TORCH_BOX(&oodk::cuda::fault_blocks));
  m.impl("fault_threads", TORCH_BOX(&oodk::cuda::fault_threads));
  m.impl("fault_shared", TORCH_BOX(&oodk::cuda::fault_shared));
  m.impl("fault_reads_device", TORCH_BOX(&oodk::cuda::fault_reads_device));
}

// --- calls --------------------------------------------------------------------------------------

namespace {

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, at);)
    parts.push_back(part);
  return parts;
}

std::vector<int64_t> integers(const std::string& text) {
  std::vector<int64_t> found;
  for (const std::string& part : split(text.substr(1), 'x'))
    found.push_back(std::stoll(part));
  return found;
}

// t,DTYPE,DEVICE,BYTES BEFORE IT,SIZES,STRIDES,CONTENTS: x2x3, the last in hexadecimal or missing.
StableIValue tensor(const std::vector<std::string>& parts) {
  stub::FakeTensor t =
      stub::allocate(integers(parts.at(4)), std::stoi(parts.at(1)), std::stoi(parts.at(2)));
  t.strides = integers(parts.at(5));
  if (t.device >= 0) {
    if (t.data)
      t.data += std::stoll(parts.at(3));
    for (size_t i = 0; i < t.sizes.size(); ++i) // room up to the farthest value
      stub::next_address += uintptr_t(t.sizes[i]) * uintptr_t(t.strides[i]) * 8 / 512 * 512;
  }
  if (parts.size() > 6) {
    const std::string& hex = parts[6];
    t.contents = std::make_shared<std::vector<char>>();
    for (size_t i = 0; i < hex.size(); i += 2)
      t.contents->push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
    if (t.device < 0)
      t.data = t.contents->data();
  }
  return torch::stable::detail::from(stub::handle(std::move(t)));
}

StableIValue argument(const std::string& text) {
  using torch::stable::detail::from;
  if (text == "n")
    return from(std::nullopt);
  if (text[0] == '?')
    return from(new StableIValue(argument(text.substr(1))));
  const std::vector<std::string> parts = split(text, ',');
  const std::string& kind = parts[0];
  if (kind == "t")
    return tensor(parts);
  if (kind == "i")
    return from(int64_t(std::stoll(parts.at(1))));
  if (kind == "d")
    return from(std::stod(parts.at(1)));
  if (kind == "b")
    return from(parts.at(1) == "1");
  if (kind == "s")
    return from(parts.at(1));
  std::vector<int64_t> whole;
  std::vector<double> real;
  for (size_t i = 1; i < parts.size(); ++i)
    kind == "li" ? whole.push_back(std::stoll(parts[i])) : real.push_back(std::stod(parts[i]));
  return kind == "li" ? from(whole) : from(real);
}

template <typename Items, typename F>
std::string joined(const Items& items, const F& f) {
  std::string text;
  for (const auto& item : items)
    text += (text.empty() ? "" : ", ") + f(item);
  return "[" + text + "]";
}
const auto number = [](auto x) { return std::to_string(x); };
std::string triple(uint3 x) {
  return joined(std::array{x.x, x.y, x.z}, number);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text)
    out += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c == '\n' ? ' ' : c};
  return out + "\"";
}

void answer(const std::string& line) {
  std::istringstream in(line);
  std::string op, text, error;
  uint64_t outputs;
  in >> op >> outputs;
  std::vector<StableIValue> stack;
  while (in >> text)
    stack.push_back(argument(text));
  const uint64_t inputs = stack.size();
  stack.resize(std::max(inputs, outputs));
  emulation::launches.clear();
  stub::events.clear();
  emulation::device = 0;
  std::vector<std::string> given;
  try {
    stub::ops.at(op)(stack.data(), inputs, outputs);
    for (uint64_t i = 0; i < outputs; ++i) {
      const auto t = torch::stable::detail::to<torch::stable::Tensor>(stack[i]);
      const stub::FakeTensor& fake = *stub::of(t.get());
      given.push_back("[" + std::to_string(fake.dtype) + ", " + std::to_string(fake.device) + ", " +
          joined(fake.sizes, number) + "]");
    }
  } catch (const std::exception& found) {
    error = found.what() + (stub::last_error.empty() ? "" : " " + stub::last_error);
    stub::last_error.clear();
  }
  std::cout << "{\"error\": " << quoted(error)
            << ", \"outputs\": " << joined(given, [](const std::string& s) { return s; })
            << ", \"device\": " << emulation::device << ", \"launches\": "
            << joined(emulation::launches,
                   [](const emulation::Launch& l) {
                     return "[" + std::to_string(l.kernel) + ", " + triple(l.grid) + ", " +
                         triple(l.block) + ", " + std::to_string(l.shared) + ", " +
                         std::to_string(uintptr_t(l.stream)) + ", " + std::to_string(l.device) +
                         "]";
                   })
            << ", \"events\": "
            << joined(stub::events,
                   [](const stub::Event& e) {
                     return "[" + quoted(e.kind) + ", " + std::to_string(e.bytes) + ", " +
                         std::to_string(e.device) + ", " + std::to_string(e.current) + "]";
                   })
            << "}" << std::endl;
}

} // namespace

int main(int argc, char** argv) {
  emulation::settings.processors = argc > 1 ? std::stoi(argv[1]) : 132;
  emulation::settings.execute = false;
  std::string names;
  for (const auto& [name, function] : stub::ops)
    names += (names.empty() ? "" : " ") + name;
  std::cout << names << std::endl;
  for (std::string line; std::getline(std::cin, line);)
    answer(line);
}
