// The products of chosen_products.h on one instruction set: included once for each, in a namespace
// of its own that has Lanes and kAtOnce. No include guard.

// The products of one left vector and kCount right ones, which `places` numbers.
template <int kCount>
PYEDITFAST_PRODUCTS_TARGET void add_products(float* sums, const float* left, const float* right,
                                             std::int64_t stride, std::int64_t length,
                                             const int* places) {
    const float* from[kCount];
    Lanes parts[kCount];
    for (int i = 0; i < kCount; ++i) {
        from[i] = right + places[i] * stride;
        parts[i] = Lanes::zero();
    }
    std::int64_t t = 0;
    for (; t + kLanes <= length; t += kLanes) {
        const Lanes factor = Lanes::load(left + t);
        for (int i = 0; i < kCount; ++i) parts[i].add_product(factor, Lanes::load(from[i] + t));
    }
    if (t < length) {
        const int rest = static_cast<int>(length - t);
        const Lanes factor = Lanes::load_first(left + t, rest);
        for (int i = 0; i < kCount; ++i) {
            parts[i].add_product(factor, Lanes::load_first(from[i] + t, rest));
        }
    }
    for (int i = 0; i < kCount; ++i) sums[places[i]] += parts[i].sum();
}

// The same for `count` right vectors, kCount at most.
template <int kCount>
PYEDITFAST_PRODUCTS_TARGET void add_up_to(int count, float* sums, const float* left,
                                          const float* right, std::int64_t stride,
                                          std::int64_t length, const int* places) {
    if constexpr (kCount > 1) {
        if (count < kCount) {
            add_up_to<kCount - 1>(count, sums, left, right, stride, length, places);
            return;
        }
    }
    add_products<kCount>(sums, left, right, stride, length, places);
}

PYEDITFAST_PRODUCTS_TARGET void add_chosen_products(float* sums, std::int64_t sums_stride,
                                                    const Vectors& left, const Vectors& right,
                                                    std::int64_t length,
                                                    const std::uint32_t* chosen,
                                                    std::int64_t chosen_stride) {
    for (std::int64_t line = 0; line < left.count; ++line) {
        alignas(64) int places[kChoices];
        const int count = places_of(places, chosen[line * chosen_stride]);
        const float* factors = left.data + line * left.stride;
        float* to = sums + line * sums_stride;
        int first = 0;
        for (; first + kAtOnce < count; first += kAtOnce) {
            add_products<kAtOnce>(to, factors, right.data, right.stride, length, places + first);
        }
        if (first < count) {
            add_up_to<kAtOnce>(count - first, to, factors, right.data, right.stride, length,
                               places + first);
        }
    }
}
