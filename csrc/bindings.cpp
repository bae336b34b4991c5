// The pybind11 module `_C`: tensor views, build facts, and one function per op and device.
// No logic. Ops are listed by CMake from the file names in csrc/cpu and csrc/cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "build_config.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/tensor.h"
#include "op_headers.inc"

namespace py = pybind11;
using fewstep::DType;
using fewstep::TensorView;

namespace {

TensorView make_view(std::uintptr_t data, DType dtype, const std::vector<std::int64_t>& sizes,
                     const std::vector<std::int64_t>& strides) {
    FEWSTEP_CHECK(sizes.size() == strides.size() && sizes.size() <= fewstep::kMaxDims,
                  "TensorView: expected at most ", fewstep::kMaxDims,
                  " dimensions and as many strides, got ", sizes.size(), " and ", strides.size());
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.ndim = static_cast<int>(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        view.sizes[i] = sizes[i];
        view.strides[i] = strides[i];
    }
    return view;
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

PYBIND11_MODULE(_C, m) {
    m.doc() = "fewstep native kernels (torch-free)";

    py::enum_<DType>(m, "DType")
        .value("float64", DType::kFloat64)
        .value("float32", DType::kFloat32)
        .value("bfloat16", DType::kBFloat16)
        .value("float16", DType::kFloat16)
        .value("int8", DType::kInt8)
        .value("uint8", DType::kUInt8)
        .value("int32", DType::kInt32)
        .value("int64", DType::kInt64)
        .value("bool", DType::kBool);
    py::class_<TensorView>(m, "TensorView").def(py::init(&make_view));

    m.def("build_info", &build_info);
    m.def("cpu_isa", [] { return fewstep::cpu::name(fewstep::cpu::isa()); });

    py::module_ cpu = m.def_submodule("cpu");
    py::module_ cuda = m.def_submodule("cuda");
#define FEWSTEP_BIND(device, op) \
    device.def(#op, &fewstep::device::op, py::call_guard<py::gil_scoped_release>());
#include "op_bindings.inc"
}
