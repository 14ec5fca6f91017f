// Where the CUDA functions of csrc put their work.
#pragma once

extern "C" {

// A CUDA stream, cudaStream_t or CUstream, of a device. Work is only queued: nothing waits for it.
struct pyeditfast_stream {
    int device;
    void* handle;
};

}  // extern "C"
