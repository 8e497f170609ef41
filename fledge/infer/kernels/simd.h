// Vectors as the kernels need them: the widest that the compiler was allowed to use, and plain loops elsewhere.
//
// Bytes: `I32` holds LANES sums; `dot` adds to lane i the products of its four weight bytes (unsigned) with the four
// activation bytes (signed) that all lanes share. Every path gives the same integers, so results never depend on the
// machine. Floats: `F32` holds 16 lanes whatever the machine (GCC vector extension), `fma` rounds once only where the
// machine can.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fledge {

#define INLINE __attribute__((always_inline))

// f(0), ..., f(N - 1) written out, each with its number known to the compiler: sums kept in an array then stay in
// registers, which a loop that is unrolled late does not achieve.
template <int N, class Body>
INLINE inline void unrolled(Body body) {
  [&]<int... i>(std::integer_sequence<int, i...>) INLINE {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// body(number), with a number from 1 to MAX known to the compiler.
template <int MAX, class Body>
inline void as_constant(int64_t number, Body body) {
  if (number == MAX) return body(std::integral_constant<int, MAX>{});
  if constexpr (MAX > 1) as_constant<MAX - 1>(number, body);
}

// body(first row, number of rows as a constant) over num_rows rows, as evenly as tiles of at most MAX allow.
template <int MAX, class Body>
inline void tiles(int64_t num_rows, Body body) {
  for (int64_t row = 0, left = (num_rows + MAX - 1) / MAX; left > 0; --left) {
    const int64_t count = (num_rows - row + left - 1) / left;
    as_constant<MAX>(count, [&](auto rows) { body(row, rows); });
    row += count;
  }
}

constexpr int FLOATS = 16;
typedef float F32 __attribute__((vector_size(4 * FLOATS)));
typedef float F32Loose __attribute__((vector_size(4 * FLOATS), aligned(4)));
typedef int32_t I32x16 __attribute__((vector_size(4 * FLOATS)));

inline F32 load(const float* from) { return *reinterpret_cast<const F32Loose*>(from); }
inline void store(float* to, F32 x) { *reinterpret_cast<F32Loose*>(to) = x; }
inline F32 fill(float x) { return x - F32{}; }

inline F32 load(const Half* from) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
  float lane[FLOATS];
  for (int i = 0; i < FLOATS; i += 8)
    _mm256_storeu_ps(lane + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  return load(lane);
#else
  float lane[FLOATS];
  for (int i = 0; i < FLOATS; ++i) {
    // Exponent and fraction move up; 2^112 sets the exponent's offset right, subnormal numbers included.
    const uint32_t bits = uint32_t(from[i].bits & 0x7fff) << 13;
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f;
    lane[i] = from[i].bits & 0x8000 ? -magnitude : magnitude;
  }
  return load(lane);
#endif
}

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// Lane i is the sum of the lanes of x[i]. Neighbours first, so that the order is the same on every machine.
inline F32 sums(const F32 (&x)[FLOATS]) {
  F32 pair[8], four[4], eight[2];
  for (int i = 0; i < 8; ++i)
    pair[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
              __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  for (int i = 0; i < 4; ++i)
    four[i] = __builtin_shufflevector(pair[2 * i], pair[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(pair[2 * i], pair[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  for (int i = 0; i < 2; ++i)
    eight[i] = __builtin_shufflevector(four[2 * i], four[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(four[2 * i], four[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  return __builtin_shufflevector(eight[0], eight[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(eight[0], eight[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

inline float sum(F32 x) {
  float lane[FLOATS];
  store(lane, x);
  for (int width = FLOATS / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// e^x for x <= 0, to two units in the last place: 2^n times a polynomial on |r| <= ln(2)/2 (Cephes, Moshier 1989). NaN
// stays NaN.
inline F32 exp(F32 x) {
  x = x < fill(-87.0f) ? fill(-87.0f) : x;
  const F32 shifted = x * fill(1.44269504f) + fill(12582912.0f);  // 1.5 x 2^23: the integer lands in the low bits
  const F32 n = shifted - fill(12582912.0f);
  const F32 r = (x - n * fill(0.693359375f)) - n * fill(-2.12194440e-4f);
  F32 p = fill(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, fill(c));
  p = fma(p * r, r, r) + fill(1.0f);
  const I32x16 power = ((I32x16)shifted - (I32x16)fill(12582912.0f) + 127) << 23;
  return p * (F32)power;
}

#if defined(__AVX512VNNI__)

constexpr int LANES = 16;
typedef __m512i I32;
typedef __m512i Bytes;
inline I32 zero() { return _mm512_setzero_si512(); }
inline I32 broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Bytes shared(const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
}
// The instruction itself: around the intrinsic, GCC copies every sum to another register, or to memory, and back.
inline I32 dot(I32 acc, Bytes weights, Bytes four) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(four));
  return acc;
}
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }

#elif defined(__AVX2__)

constexpr int LANES = 8;
typedef __m256i I32;
typedef __m256i Bytes;
inline I32 zero() { return _mm256_setzero_si256(); }
inline I32 broadcast(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes load_bytes(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline Bytes shared(const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  return _mm256_set1_epi32(word);
}
// maddubs would saturate at 16 bits; even and odd bytes apart, as 16-bit numbers, cannot.
inline I32 dot(I32 acc, Bytes weights, Bytes four) {
  const __m256i even_w = _mm256_and_si256(weights, _mm256_set1_epi16(255)), odd_w = _mm256_srli_epi16(weights, 8);
  const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), odd_x = _mm256_srai_epi16(four, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even_w, even_x));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(odd_w, odd_x));
}
inline I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }

#else

constexpr int LANES = 4;
struct I32 {
  int32_t lane[LANES];
};
struct Bytes {
  uint8_t byte[4 * LANES];
};
inline I32 zero() { return I32{}; }
inline I32 broadcast(int32_t x) { return I32{{x, x, x, x}}; }
inline Bytes load_bytes(const uint8_t* from) {
  Bytes x;
  std::memcpy(x.byte, from, sizeof x.byte);
  return x;
}
inline Bytes shared(const int8_t* four) {
  Bytes x;
  for (int i = 0; i < LANES; ++i) std::memcpy(x.byte + 4 * i, four, 4);
  return x;
}
inline I32 dot(I32 acc, Bytes weights, Bytes four) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < 4; ++j) acc.lane[i] += int32_t(weights.byte[4 * i + j]) * int8_t(four.byte[4 * i + j]);
  return acc;
}
inline I32 add(I32 a, I32 b) {
  for (int i = 0; i < LANES; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Bytes low_nibbles(Bytes x) {
  for (auto& byte : x.byte) byte &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (auto& byte : x.byte) byte >>= 4;
  return x;
}

#endif

// Sixteen sums as floats.
inline F32 to_floats(const I32 (&x)[FLOATS / LANES]) {
  I32x16 whole;
  for (int i = 0; i < FLOATS / LANES; ++i) std::memcpy((char*)&whole + i * sizeof(I32), &x[i], sizeof(I32));
  return __builtin_convertvector(whole, F32);
}

}  // namespace fledge
