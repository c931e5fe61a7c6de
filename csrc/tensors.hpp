// Tensors as they come from Python, checked before a kernel sees them: a wrong call is an error, never a wrong read.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace genssd {

namespace nb = nanobind;
using Array = nb::ndarray<nb::device::cpu>;
using MaybeArray = std::optional<Array>;

inline std::string shape_of(const Array& a) {
  std::string text = "[";
  for (std::size_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

inline std::int64_t blocks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

inline std::int64_t stride0(const Array& a) {
  return a.shape(0) > 1 ? a.stride(0) : static_cast<std::int64_t>(a.shape(1));
}

// One operator's arguments: every message names the operator and the argument.
class Arguments {
 public:
  explicit Arguments(const char* function) : function_(function) {}

  [[noreturn]] void fail(const std::string& why) const {
    throw std::invalid_argument(std::string(function_) + ": " + why);
  }
  void require(bool holds, const std::string& why) const {
    if (!holds) fail(why);
  }

  // -1 in a shape stands for any size.
  void shape(const Array& a, const char* name, std::initializer_list<std::int64_t> wanted) const {
    bool same = a.ndim() == wanted.size();
    std::string text;
    std::size_t i = 0;
    for (const std::int64_t size : wanted) {
      same = same && (size < 0 || size == static_cast<std::int64_t>(a.shape(i)));
      text += (i++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    }
    if (!same) fail(std::string(name) + " must be [" + text + "], not " + shape_of(a));
  }

  // Contiguous in its last axes, from `free` on; the strides of those before are the caller's.
  void contiguous(const Array& a, const char* name, std::size_t free = 0) const {
    if (a.size() == 0) return;
    std::int64_t stride = 1;
    for (std::size_t i = a.ndim(); i-- > free;) {
      if (a.shape(i) > 1 && a.stride(i) != stride)
        fail(std::string(name) + " must be contiguous" + (free ? " in all axes but the first" : ""));
      stride *= static_cast<std::int64_t>(a.shape(i));
    }
  }

  template <typename T>
  void dtype(const Array& a, const char* name, const char* wanted) const {
    if (a.dtype() != nb::dtype<T>()) fail(std::string(name) + " must be " + wanted);
  }

  Type type(const Array& a, const char* name) const {
    if (a.dtype() == nb::dtype<float>()) return Type::kFloat;
    if (a.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1})
      return Type::kBFloat16;
    if (a.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
      return Type::kFloat16;
    fail(std::string(name) + " must be float32, bfloat16 or float16");
  }

  void same_type(const Array& a, const char* name, const Array& as, const char* other) const {
    if (a.dtype() != as.dtype()) fail(std::string(name) + " and " + other + " must have one dtype");
  }

  template <typename T>
  T* indices(const Array& a, const char* name, std::int64_t count) const {
    dtype<T>(a, name, sizeof(T) == 8 ? "int64" : "int32");
    shape(a, name, {count});
    contiguous(a, name);
    return static_cast<T*>(a.data());
  }

  float* floats(const Array& a, const char* name, std::initializer_list<std::int64_t> wanted) const {
    dtype<float>(a, name, "float32");
    shape(a, name, wanted);
    contiguous(a, name);
    return static_cast<float*>(a.data());
  }

  // A vector of the dtype of x, or null.
  const void* vector(const MaybeArray& a, const char* name, std::int64_t count, const Array& x, const char* of) const {
    if (!a) return nullptr;
    same_type(*a, name, x, of);
    shape(*a, name, {count});
    contiguous(*a, name);
    return a->data();
  }

  // [outputs, inputs] with free rows, or packed: [panels, cells of a row, kPanel, values of a cell].
  Weight weight(const Array& a, std::int64_t outputs, std::int64_t inputs, const Array& x, const char* of) const {
    same_type(a, "weight", x, of);
    if (a.ndim() != 4) {
      shape(a, "weight", {outputs, inputs});
      contiguous(a, "weight", 1);
      return {a.data(), stride0(a)};
    }
    const std::int64_t values = type(a, "weight") == Type::kBFloat16 ? 2 : 1;
    shape(a, "weight", {blocks(outputs, kPanel), blocks(inputs, values), kPanel, values});
    contiguous(a, "weight");
    return {a.data(), 0};
  }

  const Kernels& kernels() const {
    const Kernels* found = genssd::kernels();
    if (!found) fail("there is no native kernel for this processor");
    return *found;
  }

 private:
  const char* function_;
};

}  // namespace genssd
