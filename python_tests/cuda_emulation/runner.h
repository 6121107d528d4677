// The main() of an emulation program: RUNNER NAME DIRECTORY key=value ...
//
// Runs the kernel NAME on the arrays in DIRECTORY/*.in and writes DIRECTORY/*.out. It is run once
// for each of `orders` seeds, which must give the same bits.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <map>

#include "common/dtype.h"
#include "cuda_emulation.h"

namespace runner {

// Memory of exactly so many bytes, for AddressSanitizer to guard.
class Array {
 public:
  explicit Array(size_t bytes) : data_(static_cast<char*>(std::malloc(bytes))), bytes_(bytes) {}
  Array(const Array&) = delete;
  ~Array() {
    emulation::Stores::memory.erase(data_);
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
    std::free(data_);
  }
  char* data() const {
    return data_;
  }
  size_t bytes() const {
    return bytes_;
  }
  void written() const { // by kernels
    emulation::Stores::memory[data_] = bytes_;
  }

 private:
  char* data_;
  size_t bytes_;
};

class Run {
 public:
  Run(std::string directory, const std::map<std::string, std::string>& values)
      : directory_(std::move(directory)), values_(values) {}

  int64_t integer(const std::string& name) const {
    return std::stoll(values_.at(name));
  }
  double real(const std::string& name) const {
    return std::stod(values_.at(name));
  }
  oodk::DType dtype() const {
    return oodk::DType(integer("dtype"));
  }
  size_t out_size() const { // of the type that half precision is accumulated in
    return dtype() == oodk::DType::f64 ? 8 : 4;
  }
  size_t in_size() const {
    constexpr size_t sizes[] = {8, 4, 2, 2};
    return sizes[int(dtype())];
  }

  // The file's contents from `skip` bytes on; what comes before must not be read.
  template <typename T = void>
  const T* input(const std::string& name, size_t skip = 0) {
    const std::string bytes = contents(directory_ + "/" + name + ".in");
    const Array& array = arrays_.try_emplace(name, bytes.size()).first->second;
    std::memcpy(array.data(), bytes.data(), bytes.size());
    ASAN_POISON_MEMORY_REGION(array.data(), skip / 8 * 8);
    return reinterpret_cast<const T*>(array.data() + skip);
  }
  // Rows of logits: the file as it is, from `offset` values on, or, where they are `far`, row after
  // row of it, `stride` values apart in memory that is only reserved.
  const void* logits() {
    if (!values_.contains("far"))
      return input("logits", integer("offset") * in_size());
    const size_t row = integer("width") * in_size(), step = integer("stride") * in_size();
    const char* const file = input<char>("logits");
    char* const data = static_cast<char*>(mmap(nullptr, integer("rows") * step,
        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (data == MAP_FAILED)
      throw std::runtime_error("no address space");
    for (int64_t r = 0; r < integer("rows"); ++r)
      std::memcpy(data + r * step, file + r * row, row);
    return data;
  }
  template <typename T = void>
  T* output(const std::string& name, size_t bytes, unsigned char fill = emulation::poison) {
    const Array& array = outputs_.try_emplace(name, bytes).first->second;
    array.written();
    std::memset(array.data(), fill, bytes);
    return reinterpret_cast<T*>(array.data());
  }
  int64_t* indices(const std::string& name, size_t size) { // which may be -1, all ones
    return output<int64_t>(name, size * sizeof(int64_t), 0x5a);
  }

  // Writes the outputs, or, after the first run, holds them against what that wrote.
  void finish(bool first) const {
    std::ofstream launched(directory_ + "/launches.txt");
    for (const emulation::Launch& l : emulation::launches)
      launched << l.kernel << ' ' << l.block.x << ' ' << l.shared << '\n';
    for (const auto& [name, array] : outputs_) {
      const std::string path = directory_ + "/" + name + ".out";
      if (first) {
        std::ofstream(path, std::ios::binary).write(array.data(), std::streamsize(array.bytes()));
        continue;
      }
      const std::string before = contents(path);
      if (before.compare(0, before.size(), array.data(), array.bytes()) != 0)
        throw std::runtime_error("the order of the threads changes " + name);
    }
  }

 private:
  static std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file)
      throw std::runtime_error("no file " + path);
    std::string bytes(size_t(file.tellg()), '\0');
    file.seekg(0).read(bytes.data(), std::streamsize(bytes.size()));
    return bytes;
  }

  std::string directory_;
  const std::map<std::string, std::string>& values_;
  std::map<std::string, Array> arrays_, outputs_;
};

using Kernels = std::map<std::string, void (*)(Run&)>;

inline int run(int argc, char** argv, const Kernels& kernels) {
  try {
    std::map<std::string, std::string> values;
    for (int i = 3; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t equals = argument.find('=');
      values[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
    emulation::settings.processors = std::stoi(values.at("processors"));
    for (int seed = 0; seed < std::stoi(values.at("orders")); ++seed) {
      emulation::settings.seed = unsigned(seed);
      Run run(argv[2], values);
      kernels.at(argv[1])(run);
      run.finish(seed == 0);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

} // namespace runner
