// An emulated product of 8-bit rows as Python calls it (tests/cuda_gemm8.py).
#pragma once

#include <exception>
#include <string>

#include "fewstep/product_arguments.h"

// Calls run(arguments) with tensors in the order of the contract, an empty one where `present` says
// so; returns an error or null.
template <typename Run>
const char* run_product(const fewstep::TensorView* views, const bool* present,
                        const char* activation, const Run& run) {
    static std::string message;
    const auto optional = [&](int i) { return present[i] ? &views[i] : nullptr; };
    try {
        const std::string name = activation;
        run({views[0], optional(1), views[2], views[3], optional(4), optional(5), optional(6),
             nullptr, 0, name, optional(7), optional(8), nullptr, views[9]});
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}
