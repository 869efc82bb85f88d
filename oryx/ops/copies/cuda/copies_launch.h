// Launcher of copies that run together (../copies.h). No torch header.
#pragma once

#include <cstdint>

constexpr int kOryxCopies = 24;    // of one launch at most
constexpr int kOryxCopyWords = 6;  // of a copy: addresses written and read; bytes from row to row of either; bytes of a row; rows

struct CUstream_st;

// A cudaError_t. `copies` is on the host.
extern "C" int oryx_copy_together(const int64_t* copies, int count, CUstream_st* stream);
