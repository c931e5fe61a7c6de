// Tensors as they come from Python, checked before a kernel reads them: a wrong call is an error, never a wrong read.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "dispatch.hpp"
#include "kernels.hpp"

namespace genssd {

namespace nb = nanobind;
using Array = nb::ndarray<nb::device::cpu>;
using MaybeArray = std::optional<Array>;

inline std::int64_t size_of(const Array& a, std::size_t axis) { return static_cast<std::int64_t>(a.shape(axis)); }

inline std::string shape_text(const Array& a) {
  std::string text = "[";
  for (std::size_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

inline std::int64_t ceil_div(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Returns the stride of a matrix from row to row, which is its width where it has at most one row.
inline std::int64_t row_stride(const Array& a) { return a.shape(0) > 1 ? a.stride(0) : size_of(a, 1); }

// Checks of one operator's arguments. Every error names the operator and the argument.
class Arguments {
 public:
  explicit Arguments(const char* function) : function_(function) {}

  [[noreturn]] void fail(const std::string& why) const {
    throw std::invalid_argument(std::string(function_) + ": " + why);
  }

  void require(bool condition, const std::string& why) const {
    if (!condition) fail(why);
  }

  // Checks a shape, in which -1 stands for any size.
  void shape(const Array& a, const char* name, std::initializer_list<std::int64_t> expected) const {
    bool matches = a.ndim() == expected.size();
    std::string text;
    std::size_t i = 0;
    for (const std::int64_t size : expected) {
      matches = matches && (size < 0 || size == size_of(a, i));
      text += (i++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    }
    if (!matches) fail(std::string(name) + " must be [" + text + "], not " + shape_text(a));
  }

  // Checks that a tensor is contiguous in its axes from `first_axis` on; those before may have any stride.
  void contiguous(const Array& a, const char* name, std::size_t first_axis = 0) const {
    if (a.size() == 0) return;
    std::int64_t stride = 1;
    for (std::size_t i = a.ndim(); i-- > first_axis;) {
      if (a.shape(i) > 1 && a.stride(i) != stride)
        fail(std::string(name) + " must be contiguous" + (first_axis ? " in all axes but the first" : ""));
      stride *= size_of(a, i);
    }
  }

  template <typename T>
  void dtype(const Array& a, const char* name, const char* expected) const {
    if (a.dtype() != nb::dtype<T>()) fail(std::string(name) + " must be " + expected);
  }

  // Returns the dtype of a tensor that a kernel computes with.
  DType float_dtype(const Array& a, const char* name) const {
    if (a.dtype() == nb::dtype<float>()) return DType::kFloat32;
    if (a.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1})
      return DType::kBFloat16;
    if (a.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
      return DType::kFloat16;
    fail(std::string(name) + " must be float32, bfloat16 or float16");
  }

  void same_dtype(const Array& a, const char* name, const Array& other, const char* other_name) const {
    if (a.dtype() != other.dtype()) fail(std::string(name) + " and " + other_name + " must have one dtype");
  }

  // Returns the data of a contiguous vector of int32 or int64.
  template <typename T>
  T* integers(const Array& a, const char* name, std::int64_t count) const {
    dtype<T>(a, name, sizeof(T) == 8 ? "int64" : "int32");
    shape(a, name, {count});
    contiguous(a, name);
    return static_cast<T*>(a.data());
  }

  // Returns the data of a contiguous float32 tensor.
  float* floats(const Array& a, const char* name, std::initializer_list<std::int64_t> expected) const {
    dtype<float>(a, name, "float32");
    shape(a, name, expected);
    contiguous(a, name);
    return static_cast<float*>(a.data());
  }

  // Returns the data of a contiguous vector of the dtype of another tensor, or null where there is no vector.
  const void* vector(const MaybeArray& a, const char* name, std::int64_t count, const Array& other,
                     const char* other_name) const {
    if (!a) return nullptr;
    same_dtype(*a, name, other, other_name);
    shape(*a, name, {count});
    contiguous(*a, name);
    return a->data();
  }

  // Returns a weight: [outputs, inputs] with any stride between rows, or packed [panels, cells of a row, kPanelWidth,
  // values of a cell].
  Weight weight(const Array& a, std::int64_t outputs, std::int64_t inputs, const Array& other,
                const char* other_name) const {
    same_dtype(a, "weight", other, other_name);
    if (a.ndim() != 4) {
      shape(a, "weight", {outputs, inputs});
      contiguous(a, "weight", 1);
      return {a.data(), row_stride(a)};
    }
    const std::int64_t values = values_of_cell(a, "weight");
    shape(a, "weight", {ceil_div(outputs, kPanelWidth), ceil_div(inputs, values), kPanelWidth, values});
    contiguous(a, "weight");
    return {a.data(), 0};
  }

  // Checks keys against the values [pages, page_size, kv_heads, head_dim] beside them: packed [pages, kv_heads, cells
  // of a key, page_size, values of a cell], contiguous.
  void keys(const Array& a, const char* name, const Array& values) const {
    const std::int64_t in_cell = values_of_cell(values, "v_pages");
    shape(
        a, name,
        {size_of(values, 0), size_of(values, 2), ceil_div(size_of(values, 3), in_cell), size_of(values, 1), in_cell});
    contiguous(a, name);
  }

  const Kernels& kernels() const {
    const Kernels* kernels = active_kernels();
    if (!kernels) fail("there is no native kernel for this processor");
    return *kernels;
  }

 private:
  // Returns how many values a cell of a packed tensor holds (see dot.hpp).
  std::int64_t values_of_cell(const Array& a, const char* name) const {
    return float_dtype(a, name) == DType::kBFloat16 ? 2 : 1;
  }

  const char* function_;
};

}  // namespace genssd
