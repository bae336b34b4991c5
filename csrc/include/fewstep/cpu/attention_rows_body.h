// Rows and masks of a tile of attention; included by its bodies of foreach_isa.h. A block of scores
// is [rows, ld]; which of the two axes is queries and which is keys is the kernel's choice, so the
// functions take the strides of both.

// Rows [count, d] as accumulation-type values `ld` apart, times `scale`: where they lie, or widened
// into `scratch` with zeros past d. Rows that lie further apart are gathered too: strides of some
// kilobytes would map to one cache set. Null stays null.
template <typename T, typename Acc>
const Acc* tile_rows(const HeadRows<const T>& from, std::int64_t first, std::int64_t count,
                     std::int64_t d, std::int64_t ld, Acc scale, Acc* scratch) {
    if (from.data == nullptr) return nullptr;
    const T* rows = from.data + first * from.stride;
    if constexpr (std::is_same_v<T, Acc>) {
        if (from.stride == ld && d == ld && scale == 1) return rows;
    }
    for (std::int64_t j = 0; j < count; ++j) {
        const T* row = rows + j * from.stride;
        Acc* to = scratch + j * ld;
        for (std::int64_t i = 0; i < d; ++i) to[i] = to_acc(row[i]) * scale;
        for (std::int64_t i = d; i < ld; ++i) to[i] = 0;
    }
    return scratch;
}

// Rows [count, d] less the vector `minus`, into `to`.
template <typename T, typename Acc>
void subtract_rows(const HeadRows<const T>& from, std::int64_t first, std::int64_t count,
                   std::int64_t d, const Acc* minus, Acc* to) {
    for (std::int64_t j = 0; j < count; ++j) {
        const T* row = from.data + (first + j) * from.stride;
        for (std::int64_t i = 0; i < d; ++i) to[j * d + i] = to_acc(row[i]) - minus[i];
    }
}

// Rows [count, d] to columns: [d, ld], times `scale`; columns past `count` are zero.
template <typename T, typename Acc>
void pack_columns(const HeadRows<const T>& from, std::int64_t first, std::int64_t count,
                  std::int64_t d, std::int64_t ld, Acc scale, Acc* to) {
    const T* rows = from.data + first * from.stride;
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t m = 0; m < count; ++m) {
            to[i * ld + m] = to_acc(rows[m * from.stride + i]) * scale;
        }
        for (std::int64_t m = count; m < ld; ++m) to[i * ld + m] = 0;
    }
}

// Accumulated rows `ld` apart to where they belong; null is not wanted.
template <typename T, typename Acc>
void store_rows(const HeadRows<T>& to, std::int64_t first, std::int64_t count, std::int64_t d,
                const Acc* from, std::int64_t ld) {
    if (to.data == nullptr) return;
    for (std::int64_t j = 0; j < count; ++j) {
        T* const row = to.data + (first + j) * to.stride;
        for (std::int64_t i = 0; i < d; ++i) row[i] = Convert<T>::from(from[j * ld + i]);
    }
}

template <typename Acc, typename M, typename F>
void update_block(Acc* x, std::int64_t ld, std::int64_t rows, std::int64_t lanes, const M* mask,
                  std::int64_t row_stride, std::int64_t lane_stride, const F& f) {
    if (lane_stride == 0) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const M value = mask[r * row_stride];
            for (std::int64_t l = 0; l < lanes; ++l) x[r * ld + l] = f(x[r * ld + l], value);
        }
    } else if (lane_stride == 1) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const M* row = mask + r * row_stride;
            for (std::int64_t l = 0; l < lanes; ++l) x[r * ld + l] = f(x[r * ld + l], row[l]);
        }
    } else {  // in the order in which the mask lies
        for (std::int64_t l = 0; l < lanes; ++l) {
            const M* column = mask + l * lane_stride;
            for (std::int64_t r = 0; r < rows; ++r) {
                x[r * ld + l] = f(x[r * ld + l], column[r * row_stride]);
            }
        }
    }
}

// Whether any of these queries meets any of these keys. The first pair decides for most tiles, and
// a mask that all queries share has one row.
template <typename T>
bool meets(const Mask<T>& mask, std::int64_t queries, std::int64_t keys) {
    if (!mask) return true;
    if (mask.query == 0) queries = std::min<std::int64_t>(queries, 1);
    if (mask.key == 0) keys = std::min<std::int64_t>(keys, 1);
    constexpr acc_t<T> kNever = -std::numeric_limits<acc_t<T>>::infinity();
    for (std::int64_t i = 0; i < queries; ++i) {
        for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t at = i * mask.query + j * mask.key;
            if (mask.add != nullptr ? to_acc(mask.add[at]) != kNever : mask.allow[at] != 0) {
                return true;
            }
        }
    }
    return false;
}

// Adds a mask to a block of scores, or puts -inf where it doesn't allow them.
template <typename T, typename Acc>
void mask_block(Acc* s, std::int64_t ld, std::int64_t rows, std::int64_t lanes, const Mask<T>& mask,
                std::int64_t row_stride, std::int64_t lane_stride) {
    constexpr Acc kNever = -std::numeric_limits<Acc>::infinity();
    if (mask.add != nullptr) {
        update_block(s, ld, rows, lanes, mask.add, row_stride, lane_stride,
                     [](Acc score, T value) { return score + to_acc(value); });
    } else if (mask.allow != nullptr) {
        update_block(s, ld, rows, lanes, mask.allow, row_stride, lane_stride,
                     [](Acc score, std::uint8_t allowed) { return allowed ? score : kNever; });
    }
}
