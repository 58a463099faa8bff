// The operator for Python, past the parsing of its schema, which takes longer than a small
// attention does. Arguments that are not plain, and those that the operator refuses, are left to
// the caller.
#include "call.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "operators.h"

namespace attn_kd {
namespace {

using at::Tensor;

// Thrown for arguments that only the schema's parser would understand.
struct NotPlain {};

// Whether this is how the operator refuses arguments, and not, say, a lack of memory.
bool is_refusal(const c10::Error& error) {
  return dynamic_cast<const c10::ValueError*>(&error) ||
         dynamic_cast<const c10::TypeError*>(&error) ||
         dynamic_cast<const c10::NotImplementedError*>(&error);
}

OptionalTensor tensor_or_none(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  if (!THPVariable_CheckExact(object)) throw NotPlain{};
  return THPVariable_Unpack(object);
}

Tensor tensor(PyObject* object) {
  const OptionalTensor x = tensor_or_none(object);
  if (!x.has_value()) throw NotPlain{};
  return *x;
}

double number(PyObject* object) {
  if (!PyFloat_Check(object)) throw NotPlain{};
  return PyFloat_AS_DOUBLE(object);
}

std::optional<double> number_or_none(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional<double>(number(object));
}

std::string_view text(PyObject* object) {
  Py_ssize_t length = 0;
  const char* data = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &length) : nullptr;
  if (data == nullptr) throw NotPlain{};
  return {data, static_cast<size_t>(length)};
}

// The value of a call that wants the divergence alone: of width 0.
Tensor no_value(const Tensor& key) {
  if (key.dim() != 4) throw NotPlain{};
  return at::empty({key.size(0), key.size(1), key.size(2), 0}, key.options());
}

// Of a call that wants the output: a value of width 0 is a mistake.
Tensor checked_value(Tensor value) {
  if (value.numel() == 0) throw NotPlain{};
  return value;
}

ForwardResults call(PyObject* const* args) {
  const Tensor query = tensor(args[0]), key = tensor(args[1]);
  if (!query.is_cpu() || at::impl::torch_function_mode_enabled()) throw NotPlain{};
  const OptionalTensor given_value = tensor_or_none(args[2]);
  const Tensor value = given_value ? checked_value(*given_value) : no_value(key);
  const OptionalTensor teacher_query = tensor_or_none(args[3]),
                       teacher_key = tensor_or_none(args[4]), teacher_lse = tensor_or_none(args[5]),
                       attn_mask = tensor_or_none(args[6]), dropout_seed = tensor_or_none(args[7]);
  const auto scale = number_or_none(args[8]), teacher_scale = number_or_none(args[9]);
  const auto divergence = text(args[10]), head_reduction = text(args[11]);
  const double dropout_p = number(args[12]);
  const pybind11::gil_scoped_release no_gil;
  return forward_operator().call(query, key, value, teacher_query, teacher_key, teacher_lse,
                                 attn_mask, dropout_seed, scale, teacher_scale, divergence,
                                 head_reduction, dropout_p);
}

constexpr Py_ssize_t kArguments = 13;

PyObject* attention_kl(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kArguments) {
    PyErr_Format(PyExc_TypeError, "attention_kl takes %zd arguments, got %zd", kArguments, count);
    return nullptr;
  }
  HANDLE_TH_ERRORS
  try {
    ForwardResults results = call(args);
    pybind11::tuple python(3);
    PyTuple_SET_ITEM(python.ptr(), 0, THPVariable_Wrap(std::move(std::get<0>(results))));
    PyTuple_SET_ITEM(python.ptr(), 1, THPVariable_Wrap(std::move(std::get<1>(results))));
    PyTuple_SET_ITEM(python.ptr(), 2, THPVariable_Wrap(std::move(std::get<2>(results))));
    return python.release().ptr();
  } catch (const c10::Error& error) {
    if (!is_refusal(error)) throw;
  } catch (const NotPlain&) {
    PyErr_Clear();
  }
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

constexpr const char* kDoc =
    "attention_kl(query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask, "
    "dropout_seed, scale, teacher_scale, divergence, head_reduction, dropout_p)\n\n"
    "Output, kl and lse of torch.ops.attn_kd.attention_kl_forward on CPU tensors, or "
    "NotImplemented where it refuses or the arguments are of unusual types. Without a value the "
    "divergence is computed alone.";

}  // namespace

void define_call(pybind11::module& m) {
  static std::array<PyMethodDef, 2> methods{
      {{"attention_kl", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&attention_kl)),
        METH_FASTCALL, kDoc},
       {nullptr, nullptr, 0, nullptr}}};
  if (PyModule_AddFunctions(m.ptr(), methods.data()) != 0) throw pybind11::error_already_set();
}

}  // namespace attn_kd
