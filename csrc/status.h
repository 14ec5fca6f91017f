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

// Where a function writes what went wrong.
struct Message {
    char* text;
    std::size_t size;
};

// Writes a message into the caller's buffer, cut to its size, and hands the status back.
template <typename... Arguments>
inline int fail(Status status, Message message, const char* format, Arguments... arguments) {
    if (message.text != nullptr && message.size > 0) {
        std::snprintf(message.text, message.size, format, arguments...);
    }
    return status;
}

}  // namespace pyeditfast
