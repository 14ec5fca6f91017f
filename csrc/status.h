// What every function of csrc returns, and how it says what went wrong.
#pragma once

#include <cstddef>
#include <cstdio>

namespace pyeditfast {

enum Status : int {
    kOk = 0,
    kInvalidArgument = 1,
    kSystemError = 2,
};

// Writes a message into the caller's buffer, cut to its size, and hands the status back.
template <typename... Arguments>
inline int fail(Status status, char* message, std::size_t message_size, const char* format,
                Arguments... arguments) {
    if (message != nullptr && message_size > 0) {
        std::snprintf(message, message_size, format, arguments...);
    }
    return status;
}

}  // namespace pyeditfast
