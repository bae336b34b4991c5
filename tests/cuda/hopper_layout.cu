// Compares hopper_layout.h with CuTe's layouts of the same things, on the host. Prints what
// differs.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "fewstep/cuda/hopper_layout.h"

using namespace cute;
namespace ours = fewstep::cuda;

int failures = 0;

void expect(bool equal, const char* what, int a, int b) {
    if (!equal && failures++ < 20) std::printf("%s differs at %d, %d\n", what, a, b);
}

// Thread and value to an element of a 64 x N matrix, numbered down its columns.
template <class Layout>
void compare_fragment(const char* what, Layout layout, int values) {
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < values; ++i) {
            const int row = ours::accumulator_row(thread, i);
            const int column = ours::accumulator_column(thread, i);
            expect(int(layout(thread, i)) == row + 64 * column, what, thread, i);
        }
    }
}

template <int kRows, int kColumns>
void compare_tiles() {
    const auto k_major = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<bfloat16_t>{},
                                       Shape<Int<kRows>, Int<kColumns>>{});
    const auto mn_major = tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<bfloat16_t>{},
                                        Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{});
    const auto k_plain = as_position_independent_swizzle_layout(k_major);
    const auto mn_plain = as_position_independent_swizzle_layout(mn_major);
    for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
            const int offset = ours::tile_offset(row, column, kRows);
            expect(2 * int(k_plain(row, column)) == offset, "K-major tile", row, column);
            expect(2 * int(mn_plain(column, row)) == offset, "MN-major tile", row, column);
        }
    }
    // Where one instruction's 16 columns or rows begin; the swizzle leaves the first row in place.
    for (int k = 0; k < kColumns / ours::kStepK; ++k) {
        expect(2 * int(k_plain(0, k * ours::kStepK)) == ours::columns_step(k, kRows),
               "columns_step", k, kRows);
    }
    for (int k = 0; k < kRows / ours::kStepK; ++k) {
        expect(2 * int(mn_plain(0, k * ours::kStepK)) == ours::rows_step(k), "rows_step", k, 0);
    }
    // The canonical layouts that a descriptor names, ((8, n), (8, k)) : ((1, leading), (8, stride))
    // in units of 16 bytes for MN-major operands, have these strides.
    const std::uint64_t bits = ours::matrix_descriptor(0, kRows * ours::kRowBytes);
    const GmmaDescriptor theirs = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(
        make_tensor(make_smem_ptr(static_cast<bfloat16_t*>(nullptr)),
                    composition(mn_major, make_shape(Int<kColumns>{}, Int<16>{}))));
    constexpr std::uint64_t kAddress = 0x3fff;
    constexpr std::uint64_t kLeading = kAddress << 16;
    const std::uint64_t compared = ~(kAddress | (kColumns > 64 ? 0 : kLeading));
    expect((theirs.desc_ & compared) == (bits & compared), "MN-major descriptor", kRows, kColumns);
    const GmmaDescriptor scores = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(
        make_tensor(make_smem_ptr(static_cast<bfloat16_t*>(nullptr)),
                    composition(k_major, make_shape(Int<kRows>{}, Int<16>{}))));
    const std::uint64_t k_compared = ~(kAddress | kLeading);
    expect((scores.desc_ & k_compared) == (bits & k_compared), "K-major descriptor", kRows,
           kColumns);
}

// Bytes of a left operand of 64 x 32 in registers, four in each.
void compare_mixed() {
    const SM90::GMMA::ALayout_64x32 layout;
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < 16; ++i) {
            const int row = ours::accumulator_row(thread, i / 4 % 2 * 2);
            const int column = ours::mixed_column(thread, i / 4) + i % 4;
            expect(int(layout(thread, i)) == row + 64 * column, "bytes in registers", thread, i);
        }
    }
}

void compare_half_rows() {
    const auto rows = as_position_independent_swizzle_layout(
        tile_to_shape(SM90::GMMA::Layout_K_SW64_Atom<std::uint8_t>{}, Shape<_64, _64>{}));
    for (int row = 0; row < 64; ++row) {
        for (int at = 0; at < 64; ++at) {
            expect(int(rows(row, at)) == ours::half_row_offset(row, at), "rows of 64 bytes", row,
                   at);
        }
    }
}

int main() {
    compare_fragment("accumulator of 64 x 128", SM90::GMMA::CLayout_64x128{}, 64);
    compare_fragment("accumulator of 64 x 96", SM90::GMMA::CLayout_64x96{}, 48);
    compare_fragment("left operand in registers", SM90::GMMA::ALayout_64x16{}, 8);
    compare_mixed();
    compare_half_rows();
    compare_tiles<128, 64>();
    compare_tiles<128, 128>();
    compare_tiles<112, 128>();
    compare_tiles<96, 128>();
    compare_tiles<64, 64>();
    std::printf(failures == 0 ? "all equal\n" : "%d differ\n", failures);
    return failures != 0;
}
