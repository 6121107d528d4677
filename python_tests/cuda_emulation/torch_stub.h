// Stands in for libtorch where the bindings of the CUDA ops run without a GPU.
//
// The stable ABI is a list of C functions: here are those that the bindings call. A tensor is sizes,
// strides and an address; those of a CUDA device have an address that nothing may read or write. What
// is allocated, copied or waited for is noted (`events`), as are launches (cuda_emulation.h).
#pragma once

#include <cstdarg>
#include <map>
#include <memory>
#include <sstream>

#include "cuda_emulation.h"
#include "stable.h"

namespace stub {

constexpr int kCpu = 0, kCuda = 1;

struct FakeTensor {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
  int device; // -1: CPU
  char* data;
  std::shared_ptr<std::vector<char>> contents; // if they are known

  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes)
      n *= size;
    return n;
  }
  bool contiguous() const {
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= sizes[i])
      if (sizes[i] != 1 && strides[i] != step && numel() > 0)
        return false;
    return true;
  }
};

struct Event {
  std::string kind;
  int64_t bytes;
  int device; // of what is meant
  int current; // device
};
inline std::vector<Event> events;

inline void note(const char* kind, int64_t bytes, int device) {
  events.push_back({kind, bytes, device, emulation::device});
}

inline int64_t item_size(int32_t dtype) {
  using torch::headeronly::ScalarType;
  switch (ScalarType(dtype)) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short: return 2;
    default: return 1;
  }
}

inline FakeTensor* of(AtenTensorHandle handle) {
  return reinterpret_cast<FakeTensor*>(handle);
}
inline AtenTensorHandle handle(FakeTensor tensor) {
  return reinterpret_cast<AtenTensorHandle>(new FakeTensor(std::move(tensor)));
}

inline uintptr_t next_address = uintptr_t(1) << 62; // no such memory

inline FakeTensor allocate(const std::vector<int64_t>& sizes, int32_t dtype, int device) {
  FakeTensor t{sizes, std::vector<int64_t>(sizes.size()), dtype, device, nullptr, nullptr};
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) {
    if (sizes[i] < 0)
      throw std::runtime_error("a tensor of negative size");
    t.strides[i] = step;
  }
  int64_t bytes;
  if (__builtin_mul_overflow(step, item_size(dtype), &bytes))
    throw std::runtime_error("a tensor of more than 2^63 bytes");
  if (device < 0) {
    t.contents = std::make_shared<std::vector<char>>(size_t(bytes));
    t.data = t.contents->data();
  } else if (t.numel() > 0) {
    t.data = reinterpret_cast<char*>(next_address);
    next_address += (uintptr_t(bytes) + 511) / 512 * 512;
  }
  return t;
}

// A copy of the values, in order.
inline FakeTensor copied(const FakeTensor& from, int device) {
  FakeTensor t = allocate(from.sizes, from.dtype, device);
  if (from.contents)
    t.contents = from.contents;
  if (device < 0)
    t.data = t.contents->data();
  return t;
}

inline void call(const std::string& op, StableIValue* stack) {
  using torch::stable::Tensor;
  using torch::stable::detail::to;
  const auto give = [&](FakeTensor t) {
    stack[0] = torch::stable::detail::from(handle(std::move(t)));
  };
  if (op == "aten::empty") {
    const auto sizes = to<std::vector<int64_t>>(stack[0]);
    const auto dtype = to<std::optional<torch::headeronly::ScalarType>>(stack[1]);
    const auto device = to<std::optional<torch::stable::Device>>(stack[3]).value();
    const int index = device.is_cpu() ? -1 : device.index();
    FakeTensor t = allocate(sizes, int32_t(dtype.value()), index);
    if (index >= 0)
      note("empty", t.numel() * item_size(t.dtype), index);
    give(std::move(t));
  } else if (op == "aten::contiguous") {
    const Tensor self = to<Tensor>(stack[0]);
    const FakeTensor& t = *of(self.get());
    if (!t.contiguous())
      note("copy", t.numel() * item_size(t.dtype), t.device);
    give(t.contiguous() ? t : copied(t, t.device));
  } else if (op == "aten::to") {
    const Tensor self = to<Tensor>(stack[0]);
    FakeTensor t = *of(self.get());
    const auto dtype = to<std::optional<torch::headeronly::ScalarType>>(stack[1]);
    const auto device = to<std::optional<torch::stable::Device>>(stack[3]);
    const int index = !device ? t.device : device->is_cpu() ? -1 : device->index();
    if (index != t.device) { // between host and device: somebody waits
      note(index < 0 ? "to host" : "to device", t.numel() * item_size(t.dtype), t.device);
      t = copied(t, index);
    }
    if (dtype && int32_t(*dtype) != t.dtype) {
      note("copy", t.numel() * item_size(int32_t(*dtype)), t.device);
      t = allocate(t.sizes, int32_t(*dtype), t.device);
    }
    give(std::move(t));
  } else if (op == "aten::copy_") {
    const Tensor self = to<Tensor>(stack[0]), from = to<Tensor>(stack[1]);
    note("copy", from.numel() * item_size(int32_t(from.scalar_type())), of(self.get())->device);
    give(*of(self.get()));
  } else {
    throw std::runtime_error("the stub of torch does not know " + op);
  }
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
inline std::map<std::string, Boxed> ops; // of key CUDA
inline bool of_cuda = false;

inline std::string last_error;
template <typename F>
AOTITorchError guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

} // namespace stub

namespace oodk {
void throw_value_error(const std::string& message) {
  throw std::invalid_argument("ValueError: " + message);
}
void throw_type_error(const std::string& message) {
  throw std::invalid_argument("TypeError: " + message);
}
} // namespace oodk

extern "C" {

#define STUB_CODE(name, value) \
  int32_t name() {             \
    return int32_t(value);     \
  }
STUB_CODE(aoti_torch_device_type_cpu, stub::kCpu)
STUB_CODE(aoti_torch_device_type_cuda, stub::kCuda)
STUB_CODE(aoti_torch_device_type_meta, 2)
STUB_CODE(aoti_torch_device_type_mps, 3)
STUB_CODE(aoti_torch_device_type_xpu, 4)
STUB_CODE(aoti_torch_device_type_privateuse1, 5)
#define STUB_DTYPE(name, type) \
  STUB_CODE(aoti_torch_dtype_##name, torch::headeronly::ScalarType::type)
STUB_DTYPE(uint8, Byte)
STUB_DTYPE(uint16, UInt16)
STUB_DTYPE(uint32, UInt32)
STUB_DTYPE(uint64, UInt64)
STUB_DTYPE(int8, Char)
STUB_DTYPE(int16, Short)
STUB_DTYPE(int32, Int)
STUB_DTYPE(int64, Long)
STUB_DTYPE(float16, Half)
STUB_DTYPE(bfloat16, BFloat16)
STUB_DTYPE(float32, Float)
STUB_DTYPE(float64, Double)
STUB_DTYPE(bool, Bool)
STUB_DTYPE(complex32, ComplexHalf)
STUB_DTYPE(complex64, ComplexFloat)
STUB_DTYPE(complex128, ComplexDouble)
STUB_DTYPE(float8_e5m2, Float8_e5m2)
STUB_DTYPE(float8_e4m3fn, Float8_e4m3fn)
STUB_DTYPE(float8_e5m2fnuz, Float8_e5m2fnuz)
STUB_DTYPE(float8_e4m3fnuz, Float8_e4m3fnuz)
STUB_CODE(aoti_torch_layout_strided, 0)
STUB_CODE(aoti_torch_layout_sparse_coo, 1)
STUB_CODE(aoti_torch_layout_sparse_csr, 2)
STUB_CODE(aoti_torch_layout_sparse_csc, 3)
STUB_CODE(aoti_torch_layout_sparse_bsr, 4)
STUB_CODE(aoti_torch_layout_sparse_bsc, 5)
STUB_CODE(aoti_torch_layout__mkldnn, 6)
STUB_CODE(aoti_torch_layout_jagged, 7)
STUB_CODE(aoti_torch_memory_format_contiguous_format, 0)
STUB_CODE(aoti_torch_memory_format_preserve_format, 1)
STUB_CODE(aoti_torch_memory_format_channels_last, 2)
STUB_CODE(aoti_torch_memory_format_channels_last_3d, 3)
#undef STUB_DTYPE
#undef STUB_CODE

uint64_t aoti_torch_abi_version() {
  return TORCH_ABI_VERSION;
}

// Tensors.
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle* to) {
  *to = stub::handle(*stub::of(from));
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete stub::of(t);
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* dim) {
  *dim = int64_t(stub::of(t)->sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* numel) {
  *numel = stub::of(t)->numel();
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** sizes) {
  *sizes = stub::of(t)->sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* size) {
  const auto& sizes = stub::of(t)->sizes;
  return stub::guarded([&] { *size = sizes.at(size_t(d < 0 ? d + int64_t(sizes.size()) : d)); });
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** strides) {
  *strides = stub::of(t)->strides.data();
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* stride) {
  const auto& strides = stub::of(t)->strides;
  return stub::guarded(
      [&] { *stride = strides.at(size_t(d < 0 ? d + int64_t(strides.size()) : d)); });
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* dtype) {
  *dtype = stub::of(t)->dtype;
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t* type) {
  *type = stub::of(t)->device < 0 ? stub::kCpu : stub::kCuda;
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t* index) {
  *index = stub::of(t)->device;
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool* contiguous) {
  *contiguous = stub::of(t)->contiguous();
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** data) {
  *data = stub::of(t)->data;
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** data) {
  *data = stub::of(t)->data;
  return 0;
}

// Devices: the current stream of each has an address of its own.
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(emulation::device));
  emulation::device = index;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int* const before = reinterpret_cast<int*>(guard);
  emulation::device = *before;
  delete before;
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = reinterpret_cast<void*>(uintptr_t(1000 + index));
  return 0;
}
AOTITorchError torch_parse_device_string(const char* text, uint32_t* type, int32_t* index) {
  *type = std::string(text) == "cpu" ? stub::kCpu : stub::kCuda;
  *index = *type == stub::kCpu ? -1 : 0;
  return 0;
}

// Lists and strings.
AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* list) {
  *list = reinterpret_cast<StableListHandle>(new std::vector<StableIValue>);
  return 0;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue value) {
  reinterpret_cast<std::vector<StableIValue>*>(list)->push_back(value);
  return 0;
}
AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = reinterpret_cast<std::vector<StableIValue>*>(list)->size();
  return 0;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* value) {
  return stub::guarded([&] { *value = reinterpret_cast<std::vector<StableIValue>*>(list)->at(i); });
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete reinterpret_cast<std::vector<StableIValue>*>(list);
  return 0;
}
AOTITorchError torch_new_string_handle(const char* data, size_t length, StringHandle* text) {
  *text = reinterpret_cast<StringHandle>(new std::string(data, length));
  return 0;
}
AOTITorchError torch_string_length(StringHandle text, size_t* length) {
  *length = reinterpret_cast<std::string*>(text)->size();
  return 0;
}
AOTITorchError torch_string_c_str(StringHandle text, const char** data) {
  *data = reinterpret_cast<std::string*>(text)->c_str();
  return 0;
}
AOTITorchError torch_delete_string(StringHandle text) {
  delete reinterpret_cast<std::string*>(text);
  return 0;
}

// The library.
AOTITorchError aoti_torch_library_init_impl(
    const char*, const char* key, const char*, uint32_t, TorchLibraryHandle*) {
  stub::of_cuda = std::string(key) == "CUDA";
  return 0;
}
AOTITorchError aoti_torch_library_init_def(
    const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_init_fragment(
    const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) {
  return 0;
}
AOTITorchError torch_library_impl(
    TorchLibraryHandle, const char* name, stub::Boxed function, uint64_t) {
  if (stub::of_cuda)
    stub::ops[name] = function;
  return 0;
}
AOTITorchError torch_call_dispatcher(const char* op, const char*, StableIValue* stack, uint64_t) {
  return stub::guarded([&] { stub::call(op, stack); });
}

} // extern "C"
