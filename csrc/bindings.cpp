// The pybind11 module `_C`: tensor views, build facts, and one function per op and device.
// No logic. Ops are listed by CMake from the file names in csrc/cpu and csrc/cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "build_config.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/dlpack.h"
#include "fewstep/tensor.h"
#include "op_headers.inc"

namespace py = pybind11;
using fewstep::TensorView;
namespace dlpack = fewstep::dlpack;

namespace {

// What `read_tensors` was given: torch.Tensor, and its functions. `_C` itself knows no torch.
PyTypeObject* tensor_type = nullptr;
const dlpack::ExchangeTable* exchange = nullptr;

void read_tensors(const py::type& type, const py::capsule& table) {
    const auto* given =
        static_cast<dlpack::ExchangeTable*>(PyCapsule_GetPointer(table.ptr(), dlpack::kCapsule));
    if (given == nullptr) throw py::error_already_set();
    while (given != nullptr && given->version.major != dlpack::kMajor) given = given->previous;
    FEWSTEP_CHECK(given != nullptr && given->tensor_from_object != nullptr,
                  "read_tensors: expected functions of DLPack ", dlpack::kMajor,
                  ".x that read a tensor, got none");
    exchange = given;
    tensor_type = reinterpret_cast<PyTypeObject*>(py::type(type).release().ptr());
}

py::dict build_info() {
    py::dict info;
    info["version"] = FEWSTEP_VERSION;
    info["cuda"] = static_cast<bool>(FEWSTEP_HAS_CUDA);
    info["cuda_reason"] = FEWSTEP_CUDA_REASON;
    info["cuda_architectures"] = FEWSTEP_CUDA_ARCHITECTURES;
    info["compiler"] = __VERSION__;
    return info;
}

}  // namespace

// A tensor where a kernel takes a view; None where it takes a pointer to one.
namespace pybind11::detail {
template <>
class type_caster<TensorView> {
  public:
    static constexpr auto name = const_name("Tensor");
    template <typename T>
    using cast_op_type = pybind11::detail::cast_op_type<T>;

    bool load(handle source, bool) {
        given_ = !source.is_none();
        if (!given_) return true;
        if (tensor_type == nullptr || !PyType_IsSubtype(Py_TYPE(source.ptr()), tensor_type)) {
            return false;
        }
        dlpack::Tensor tensor;
        if (exchange->tensor_from_object(source.ptr(), &tensor) != 0) throw error_already_set();
        view_ = dlpack::view(tensor);
        return true;
    }

    operator TensorView*() { return given_ ? &view_ : nullptr; }
    operator TensorView&() {
        if (!given_) throw reference_cast_error();
        return view_;
    }

  private:
    TensorView view_;
    bool given_ = false;
};
}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
    m.doc() = "fewstep native kernels (torch-free)";

    m.def("build_info", &build_info);
    m.def("read_tensors", &read_tensors);
    m.def("cpu_isa", [] { return fewstep::cpu::name(fewstep::cpu::isa()); });

    py::module_ cpu = m.def_submodule("cpu");
    py::module_ cuda = m.def_submodule("cuda");
#define FEWSTEP_BIND(device, op) \
    device.def(#op, &fewstep::device::op, py::call_guard<py::gil_scoped_release>());
#include "op_bindings.inc"
}
