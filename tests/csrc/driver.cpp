// Calls every C function of csrc on buffers of exactly the size they may touch, in all types and
// layouts and with several threads, and prints a line with a hash for each result.
//
// Built with sanitizers it finds accesses outside and undefined behaviour; built for several
// instruction sets its output has to stay the same. Exits with 1 if a call fails or succeeds
// against expectation, or if a result depends on the number of threads. With the argument "overrun"
// it reads one element too many instead, which a sanitizer has to notice.
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "activation_gap.h"
#include "apply_shift.h"
#include "edit_values.h"
#include "float16_arrays.h"
#include "float_types.h"
#include "largest_magnitude.h"
#include "linear_cross_entropy.h"
#include "magnitude_threshold.h"
#include "masked_sgd.h"
#include "masked_sgd_product.h"
#include "matrix.h"
#include "philox_words.h"
#include "random_mask.h"
#include "status.h"
#include "ties_merge.h"

namespace {

using pyeditfast::kBFloat16;
using pyeditfast::kFloat16;
using pyeditfast::kFloat32;

const int kTypes[] = {kFloat32, kBFloat16, kFloat16};
const int kThreads[] = {1, 3};
const float kInfinity = std::numeric_limits<float>::infinity();
const float kNaN = std::numeric_limits<float>::quiet_NaN();

bool failed = false;
char message[200];

[[noreturn]] void stop(const std::string& text) {
    std::fprintf(stderr, "%s\n", text.c_str());
    std::exit(1);
}

struct Random {
    std::uint64_t state;

    std::uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<std::uint32_t>(state >> 33);
    }

    // Mostly near 0, some zeros, large and tiny ones, infinities and NaN.
    float number() {
        const std::uint32_t kind = next() % 100;
        const float uniform = static_cast<float>(next()) / 2147483648.0f - 0.5f;
        if (kind < 10) return 0.0f;
        if (kind == 10) return -0.0f;
        if (kind == 11) return kInfinity;
        if (kind == 12) return -kInfinity;
        if (kind == 13) return kNaN;
        if (kind == 14) return uniform * 1e38f;
        if (kind == 15) return uniform * 1e-40f;
        return uniform;
    }
};

enum Layout { kRows, kPadded, kColumns, kSpread };
const Layout kLayouts[] = {kRows, kPadded, kColumns, kSpread};

// A matrix in memory of its own that ends with its last element.
class Matrix {
public:
    Matrix(std::int64_t rows, std::int64_t columns, int type, Layout layout, std::uint64_t seed) {
        std::int64_t row_stride = columns, column_stride = 1;
        if (layout == kPadded) row_stride = columns + 3;
        if (layout == kColumns) row_stride = 1, column_stride = rows + 1;
        if (layout == kSpread) row_stride = 2 * columns + 1, column_stride = 2;
        length_ = (rows - 1) * row_stride + (columns - 1) * column_stride + 1;
        const std::size_t size = static_cast<std::size_t>(pyeditfast::element_size(type));
        void* memory = std::malloc(static_cast<std::size_t>(length_) * size);
        if (memory == nullptr) stop("no memory");
        bytes_.reset(static_cast<unsigned char*>(memory));
        value_ = {bytes_.get(), row_stride, column_stride, type};
        Random random = {seed};
        for (std::int64_t i = 0; i < length_; ++i) set(i, random.number());
    }

    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    const pyeditfast_matrix* get() const { return &value_; }

    // A hash of all memory, NaN counted as one value: which NaN it is depends on the processor.
    std::uint64_t hash() const {
        std::uint64_t result = 1469598103934665603u;
        for (std::int64_t i = 0; i < length_; ++i) {
            const float value = at(i);
            const std::uint32_t bits = value != value ? 0x7FC00000u : pyeditfast::as_bits(value);
            result = (result ^ bits) * 1099511628211u;
        }
        return result;
    }

private:
    struct Free {
        void operator()(unsigned char* bytes) const { std::free(bytes); }
    };

    void set(std::int64_t i, float value) {
        if (value_.type == kFloat32) {
            reinterpret_cast<float*>(bytes_.get())[i] = value;
        } else {
            reinterpret_cast<std::uint16_t*>(bytes_.get())[i] =
                value_.type == kBFloat16 ? pyeditfast::to_bfloat16(value)
                                         : pyeditfast::to_float16(value);
        }
    }

    float at(std::int64_t i) const {
        if (value_.type == kFloat32) return reinterpret_cast<const float*>(bytes_.get())[i];
        const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(bytes_.get())[i];
        return value_.type == kBFloat16 ? pyeditfast::from_bfloat16(bits)
                                        : pyeditfast::from_float16(bits);
    }

    std::int64_t length_;
    std::unique_ptr<unsigned char, Free> bytes_;
    pyeditfast_matrix value_;
};

std::uint64_t hash_of(const std::vector<float>& values) {
    std::uint64_t result = 1469598103934665603u;
    for (const float value : values) {
        const std::uint32_t bits = value != value ? 0x7FC00000u : pyeditfast::as_bits(value);
        result = (result ^ bits) * 1099511628211u;
    }
    return result;
}

// Runs work(threads), which returns a hash, for every number of threads, and prints it once.
template <typename Work>
void report(const std::string& name, const Work& work) {
    const std::uint64_t first = work(kThreads[0]);
    for (const int threads : kThreads) {
        if (work(threads) != first) stop(name + " depends on the number of threads");
    }
    std::printf("%s %016" PRIx64 "\n", name.c_str(), first);
}

void require(int status, const std::string& name) {
    if (status != pyeditfast::kOk) stop(name + " failed: " + message);
}

void refuse(int status, const std::string& expected) {
    if (status == pyeditfast::kInvalidArgument && expected == message) return;
    std::fprintf(stderr, "expected '%s', got status %d and '%s'\n", expected.c_str(), status,
                 message);
    failed = true;
}

// Every rest that does not fill a vector, every first word of a block, the carry from the lower to
// the upper half of a block's number, and any step.
void words(std::uint64_t step) {
    constexpr std::uint32_t kUntouched = 0xABABABABu;
    report("philox_words " + std::to_string(step), [=](int) {
        std::uint64_t result = 0;
        for (std::uint64_t before = 2; before < 6; ++before) {
            for (std::int64_t count = 0; count <= 70; ++count) {
                const std::uint64_t start = (std::uint64_t{1} << 34) - before * step;
                std::vector<std::uint32_t> out(90, kUntouched);
                pyeditfast::philox_words(out.data(), count, start, step, 77);
                for (std::int64_t i = 0; i < 90; ++i) {
                    const std::uint32_t word = out[static_cast<std::size_t>(i)];
                    if (i >= count && word != kUntouched) stop("philox_words writes too much");
                    result = (result ^ word) * 1099511628211u;
                }
            }
        }
        return result;
    });
    // However they are cut into calls, the words are the same.
    std::vector<std::uint32_t> whole(70), parts(70);
    pyeditfast::philox_words(whole.data(), 70, 11, step, 77);
    for (std::int64_t i = 0; i < 70; i += 7) {
        const std::uint64_t start = 11 + static_cast<std::uint64_t>(i) * step;
        pyeditfast::philox_words(parts.data() + i, 7, start, step, 77);
    }
    if (parts != whole) stop("philox_words gives parts other words than the whole");
}

// Every float16 number, what lies next to it and halfway to its neighbour, against the conversion of
// one number; then every rest that does not fill a vector.
void float16_conversions() {
    constexpr std::uint32_t kCodes = 1u << 16;
    std::vector<std::uint16_t> codes(kCodes), narrow(kCodes);
    for (std::uint32_t code = 0; code < kCodes; ++code) {
        codes[code] = static_cast<std::uint16_t>(code);
    }
    std::vector<float> wide(kCodes);
    pyeditfast::widen_float16(wide.data(), codes.data(), kCodes);
    for (std::uint32_t code = 0; code < kCodes; ++code) {
        const float one = pyeditfast::from_float16(codes[code]);
        const bool same = pyeditfast::as_bits(wide[code]) == pyeditfast::as_bits(one);
        if (!same && (wide[code] == wide[code] || one == one)) stop("widen_float16");
    }
    // The last three are around half of float16's last place in normal numbers.
    for (const std::uint32_t beside : {0u, 1u, 0xFFFFFFFFu, 0x0FFFu, 0x1000u, 0x1001u}) {
        std::vector<float> moved(kCodes);
        for (std::uint32_t code = 0; code < kCodes; ++code) {
            moved[code] = pyeditfast::as_float(pyeditfast::as_bits(wide[code]) + beside);
        }
        pyeditfast::narrow_to_float16(narrow.data(), moved.data(), kCodes);
        for (std::uint32_t code = 0; code < kCodes; ++code) {
            const bool nan = moved[code] != moved[code];
            if (!nan && narrow[code] != pyeditfast::to_float16(moved[code])) {
                stop("narrow_to_float16");
            }
            if (nan && (narrow[code] & 0x7FFFu) <= 0x7C00u) stop("narrow_to_float16 loses a NaN");
        }
    }
    // Numbers below the normal ones differ by 2^-24; halfway between them lies an odd 2^-25.
    for (std::uint32_t step = 0; step < 4096; ++step) {
        const float number = static_cast<float>(step) * 0x1p-25f;
        const float around[] = {number, number * (1 + 0x1p-23f), number * (1 - 0x1p-23f)};
        std::uint16_t found[3];
        pyeditfast::narrow_to_float16(found, around, 3);
        for (int i = 0; i < 3; ++i) {
            if (found[i] != pyeditfast::to_float16(around[i])) stop("narrow_to_float16, subnormal");
        }
    }
    constexpr std::uint16_t kUntouched = 0xABABu;
    for (std::size_t count = 0; count <= 40; ++count) {
        std::vector<std::uint16_t> out(60, kUntouched);
        const std::vector<float> in(wide.begin() + 0x3C00, wide.begin() + 0x3C00 + count);
        pyeditfast::narrow_to_float16(out.data(), in.data(), static_cast<std::int64_t>(count));
        const std::vector<std::uint16_t> back(out.begin(), out.begin() + count);
        std::vector<float> again(count);
        pyeditfast::widen_float16(again.data(), back.data(), static_cast<std::int64_t>(count));
        if (again != in) stop("float16 conversions leave out a number");
        for (std::size_t i = count; i < out.size(); ++i) {
            if (out[i] != kUntouched) stop("narrow_to_float16 writes too much");
        }
    }
}

void random_functions(std::int64_t numel) {
    report("random_uniform " + std::to_string(numel), [=](int threads) {
        std::vector<float> out(static_cast<std::size_t>(numel));
        require(pyeditfast_random_uniform(out.data(), numel, 77, (std::int64_t{1} << 32) - 1000,
                                          threads, message, sizeof message),
                "random_uniform");
        return hash_of(out);
    });
    report("random_mask " + std::to_string(numel), [=](int threads) {
        std::vector<std::uint8_t> out(static_cast<std::size_t>(numel));
        require(pyeditfast_random_mask(out.data(), numel, 77, 0.2f, 5, threads, message,
                                       sizeof message),
                "random_mask");
        return hash_of(std::vector<float>(out.begin(), out.end()));
    });
}

void element_functions(std::int64_t rows, std::int64_t columns, int type, Layout layout) {
    const std::string name = std::to_string(rows) + "x" + std::to_string(columns) + " type " +
                             std::to_string(type) + " layout " + std::to_string(layout);
    const Layout other = layout == kRows ? kColumns : kRows;
    const Matrix main(rows, columns, type, layout, 1), grad(rows, columns, kFloat32, other, 2);
    const Matrix side(rows, columns, type, other, 3), third(rows, columns, kBFloat16, kSpread, 4);

    for (const bool clamped : {false, true}) {
        report("masked_sgd " + name, [&](int threads) {
            const Matrix weight(rows, columns, type, layout, 5);
            require(pyeditfast_masked_sgd(weight.get(), grad.get(), clamped ? main.get() : nullptr,
                                          rows, columns, 9, 0.4f, 12345, 0.3f, 0.1f, 0.2f, threads,
                                          message, sizeof message),
                    "masked_sgd");
            return weight.hash();
        });
    }
    const std::int64_t numel = rows * columns;
    for (const std::int64_t k : {std::int64_t{1}, (numel + 1) / 2, numel}) {
        for (const Matrix* base : {static_cast<const Matrix*>(nullptr), &side}) {
            report("magnitude_threshold " + name, [&](int threads) {
                std::vector<float> out(1);
                require(pyeditfast_magnitude_threshold(
                            main.get(), base == nullptr ? nullptr : base->get(), rows, columns, k,
                            out.data(), threads, message, sizeof message),
                        "magnitude_threshold");
                return hash_of(out);
            });
        }
    }
    for (const Matrix* each : {&main, &side, &third, &grad}) {
        report("largest_magnitude " + name, [&](int threads) {
            std::vector<float> out(1);
            require(pyeditfast_largest_magnitude(each->get(), rows, columns, out.data(), threads,
                                                 message, sizeof message),
                    "largest_magnitude");
            return hash_of(out);
        });
    }
    report("ties_merge " + name, [&](int threads) {
        const Matrix out(rows, columns, type, other, 6);
        const std::vector<pyeditfast_matrix> sides = {*side.get(), *third.get(), *grad.get()};
        const std::vector<float> thresholds = {0.1f, 0.2f, 0.0f}, weights = {0.5f, 0.3f, 0.7f};
        require(pyeditfast_ties_merge(out.get(), main.get(), sides.data(), thresholds.data(),
                                      weights.data(), 3, rows, columns, threads, message,
                                      sizeof message),
                "ties_merge");
        return out.hash();
    });
    for (const int rounding : {0, 1, 2}) {
        if (rounding == 1 && type == kFloat32) continue;
        report("apply_shift " + name, [&](int threads) {
            const Matrix weight(rows, columns, type, layout, 7);
            const Matrix remainder(rows, columns, type, layout, 8);
            require(pyeditfast_apply_shift(weight.get(), grad.get(),
                                           rounding == 2 ? remainder.get() : nullptr, rows, columns,
                                           rounding, 3, 1000, threads, message, sizeof message),
                    "apply_shift");
            return weight.hash() ^ remainder.hash();
        });
    }
}

void row_functions(std::int64_t rows, std::int64_t columns, int type, Layout layout) {
    const std::string name = std::to_string(rows) + "x" + std::to_string(columns) + " type " +
                             std::to_string(type) + " layout " + std::to_string(layout);
    const Layout other = layout == kRows ? kColumns : kRows;
    const Matrix main(rows, columns, type, layout, 1), side(rows, columns, kFloat32, other, 2);
    for (int activation = 0; activation < 5; ++activation) {
        report("activation_gap " + name, [&](int threads) {
            std::vector<float> gaps(static_cast<std::size_t>(rows));
            require(pyeditfast_activation_gap(main.get(), side.get(), rows, columns, activation,
                                              gaps.data(), threads, message, sizeof message),
                    "activation_gap");
            return hash_of(gaps);
        });
    }
    const std::int64_t d_out = columns / 2 + 1;
    const Matrix grads(rows, d_out, kBFloat16, other, 3);
    Random random = {4};
    std::vector<float> mean, scale;
    for (std::int64_t i = 0; i < columns + d_out; ++i) {
        mean.push_back(static_cast<float>(random.next() % 100) / 100.0f);
        scale.push_back(static_cast<float>(random.next() % 100) / 10.0f);
    }
    report("edit_values " + name, [&](int threads) {
        const Matrix values(rows, d_out, type, layout, 5);
        require(pyeditfast_edit_values(values.get(), main.get(), grads.get(), mean.data(),
                                       scale.data(), rows, columns, d_out, 0.5f, threads, message,
                                       sizeof message),
                "edit_values");
        return values.hash();
    });
}

// `biased` heads also leave a gap between their rows.
void head_function(std::int64_t rows, std::int64_t width, std::int64_t vocabulary, Layout layout,
                   bool biased) {
    const std::string name = "linear_cross_entropy " + std::to_string(rows) + " x " +
                             std::to_string(width) + " x " + std::to_string(vocabulary) +
                             " layout " + std::to_string(layout) + (biased ? " biased" : "");
    Random random = {7};
    const auto uniform = [&] { return static_cast<float>(random.next()) / 2147483648.0f - 0.5f; };
    const std::int64_t stride = biased ? width + 5 : width;
    std::vector<float> head(static_cast<std::size_t>((vocabulary - 1) * stride + width));
    std::vector<float> bias(static_cast<std::size_t>(vocabulary));
    for (float& number : head) number = uniform();
    for (float& number : bias) number = uniform();
    std::vector<std::int64_t> targets(static_cast<std::size_t>(rows));
    for (std::int64_t& target : targets) target = random.next() % vocabulary;
    const Matrix hidden(rows, width, kFloat32, layout, 8);
    const pyeditfast_matrix weight = {head.data(), stride, 1, kFloat32};
    report(name, [&](int threads) {
        std::vector<float> losses(static_cast<std::size_t>(rows));
        std::vector<float> grads(static_cast<std::size_t>(rows * width));
        require(pyeditfast_linear_cross_entropy(hidden.get(), &weight,
                                                biased ? bias.data() : nullptr, targets.data(),
                                                rows, width, vocabulary, losses.data(),
                                                grads.data(), threads, message, sizeof message),
                "linear_cross_entropy");
        losses.insert(losses.end(), grads.begin(), grads.end());
        return hash_of(losses);
    });
}

void product_function(std::int64_t rows, std::int64_t columns, std::int64_t tokens, int type,
                      Layout layout) {
    const std::string name = "masked_sgd_product " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " x " + std::to_string(tokens) + " type " +
                             std::to_string(type) + " layout " + std::to_string(layout);
    Random random = {7};
    const auto uniform = [&] { return static_cast<float>(random.next()) / 2147483648.0f - 0.5f; };
    // Vectors side by side, so that one that is read too far reads the next one, and the last none.
    std::vector<float> grads(static_cast<std::size_t>(rows * tokens));
    std::vector<float> inputs(static_cast<std::size_t>(columns * tokens));
    for (float& number : grads) number = uniform();
    for (float& number : inputs) number = uniform();
    const pyeditfast_matrix left = {grads.data(), tokens, 1, kFloat32};
    const pyeditfast_matrix right = {inputs.data(), tokens, 1, kFloat32};
    const Matrix main(rows, columns, type, layout, 1);
    for (const bool clamped : {false, true}) {
        report(name + (clamped ? " clamped" : ""), [&](int threads) {
            const Matrix weight(rows, columns, type, layout, 5);
            require(pyeditfast_masked_sgd_product(weight.get(), &left, &right,
                                                  clamped ? main.get() : nullptr, rows, columns,
                                                  tokens, 9, 0.3f, 12345, 0.3f, 0.1f, 0.2f,
                                                  threads, message, sizeof message),
                    "masked_sgd_product");
            return weight.hash();
        });
    }
}

void refusals() {
    const Matrix good(3, 4, kFloat32, kRows, 1);
    const pyeditfast_matrix null = {nullptr, 4, 1, kFloat32};
    const pyeditfast_matrix negative = {good.get()->data, -4, 1, kFloat32};
    const pyeditfast_matrix crooked = {static_cast<char*>(good.get()->data) + 2, 4, 1, kFloat32};
    const std::int64_t huge = std::int64_t{1} << 62;
    const pyeditfast_matrix wide = {good.get()->data, huge, huge, kFloat32};
    const auto step = [&](const pyeditfast_matrix* weight, const pyeditfast_matrix* grad,
                          std::int64_t rows, std::int64_t offset, char* text, std::size_t size) {
        return pyeditfast_masked_sgd(weight, grad, nullptr, rows, 4, 0, 0.5f, offset, 1.0f, 0.0f,
                                     0.0f, 1, text, size);
    };
    refuse(step(&null, good.get(), 3, 0, message, sizeof message),
           "weight is a null pointer, but has 3 x 4 elements");
    refuse(step(nullptr, good.get(), 3, 0, message, sizeof message), "weight is missing");
    refuse(step(good.get(), &negative, 3, 0, message, sizeof message),
           "grad has strides -4 and 1; 0 or more is needed (3 x 4)");
    refuse(step(good.get(), good.get(), 3, std::numeric_limits<std::int64_t>::max(), message,
                sizeof message),
           "offset must be >= 0 and offset + elements below 2^63, got offset 9223372036854775807 "
           "for 3 x 4");
    refuse(step(good.get(), good.get(), std::numeric_limits<std::int64_t>::min(), 0, message,
                sizeof message),
           "rows and columns must be >= 0 and their product below 2^60, got -9223372036854775808 "
           "and 4");
    refuse(step(good.get(), &wide, 3, 0, message, sizeof message),
           "grad has strides 4611686018427387904 and 4611686018427387904, too large for 3 x 4 "
           "elements");
    // Nothing to read: whatever the strides are.
    require(step(&wide, &wide, 0, 0, message, sizeof message), "masked_sgd without rows");
    // Without room for a message, and with too little.
    if (step(&crooked, good.get(), 3, 0, nullptr, 0) != pyeditfast::kInvalidArgument) failed = true;
    char little[8];
    const int status = step(&crooked, good.get(), 3, 0, little, sizeof little);
    std::strcpy(message, little);
    refuse(status, "weight ");
}

void overrun() {
    const Matrix matrix(3, 4, kFloat32, kRows, 1);
    float threshold;
    pyeditfast_magnitude_threshold(matrix.get(), nullptr, 1, 13, 1, &threshold, 1, message,
                                   sizeof message);
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && std::strcmp(arguments[1], "overrun") == 0) {
        overrun();
        return 0;
    }
    float16_conversions();
    for (const std::uint64_t step : {1, 2, 3, 4, 1 << 30}) words(step);
    for (const std::int64_t numel : {0, 1, 7, 4097, 140001}) random_functions(numel);
    for (const int type : kTypes) {
        for (const Layout layout : kLayouts) {
            element_functions(1, 1, type, layout);
            element_functions(3, 2051, type, layout);
            element_functions(1029, 67, type, layout);
            row_functions(1, 1, type, layout);
            row_functions(67, 2051, type, layout);
        }
    }
    for (const int type : kTypes) {
        for (const Layout layout : kLayouts) {
            product_function(1, 1, 1, type, layout);
            product_function(67, 131, 0, type, layout);
            product_function(67, 300, 29, type, layout);
            product_function(35, 259, 457, type, layout);
        }
    }
    for (const bool biased : {false, true}) {
        for (const Layout layout : kLayouts) {
            head_function(1, 1, 1, layout, biased);
            head_function(7, 67, 1031, layout, biased);
            head_function(17, 129, 600, layout, biased);
            head_function(67, 300, 1100, layout, biased);
        }
    }
    refusals();
    return failed ? 1 : 0;
}
