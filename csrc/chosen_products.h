// Some of the products of two lists of vectors.
//
// Of a matrix product of which a random part is asked for, a dense one computes the rest too; here
// each number is a sum of its own, which costs more than it does there but only where it is wanted.
#pragma once

#include <cstdint>

namespace pyeditfast {

// One of the right vectors is a bit of a word.
constexpr int kChoices = 32;

// Says whether the processor has the vectors that this is written for. Without them it gives the
// same bits, slowly.
bool chosen_products_are_fast();

// `count` vectors, `stride` numbers from one to the next.
struct Vectors {
    const float* data;
    std::int64_t stride;
    std::int64_t count;
};

// sums[l * sums_stride + r] += the product of left vector l and right vector r over their first
// `length` numbers, for each bit r of chosen[l * chosen_stride]; there are up to kChoices right
// vectors. The products are taken by fused multiply-adds in 16 parts, whose order is fixed.
void add_chosen_products(float* sums, std::int64_t sums_stride, const Vectors& left,
                         const Vectors& right, std::int64_t length, const std::uint32_t* chosen,
                         std::int64_t chosen_stride);

}  // namespace pyeditfast
