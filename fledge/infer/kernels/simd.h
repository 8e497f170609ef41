// Vectors as the kernels need them: the widest that the compiler was allowed to use, and plain loops elsewhere.
//
// Bytes: `I32` holds LANES sums; `dot` adds to lane i the products of its four weight bytes (unsigned) with the four
// activation bytes (signed) that all lanes share. Every path gives the same integers, so results never depend on the
// machine. Floats: `F32` holds 16 lanes whatever the machine (GCC vector extension), `fma` rounds once only where the
// machine can.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fledge {

constexpr int FLOATS = 16;
typedef float F32 __attribute__((vector_size(4 * FLOATS)));
typedef float F32Loose __attribute__((vector_size(4 * FLOATS), aligned(4)));
typedef int32_t I32x16 __attribute__((vector_size(4 * FLOATS)));

inline F32 load(const float* from) { return *reinterpret_cast<const F32Loose*>(from); }
inline void store(float* to, F32 x) { *reinterpret_cast<F32Loose*>(to) = x; }
inline F32 fill(float x) { return x - F32{}; }

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// Eight lanes and then four, so that the order of additions is the same on every machine.
inline float sum(F32 x) {
  float lane[FLOATS];
  store(lane, x);
  for (int width = FLOATS / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

#if defined(__AVX512VNNI__)

constexpr int LANES = 16;
typedef __m512i I32;
typedef __m512i Bytes;
inline I32 zero() { return _mm512_setzero_si512(); }
inline Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Bytes shared(const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
}
inline I32 dot(I32 acc, Bytes weights, Bytes four) { return _mm512_dpbusd_epi32(acc, weights, four); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline void store(int32_t* to, I32 x) { _mm512_storeu_si512(to, x); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }

#elif defined(__AVX2__)

constexpr int LANES = 8;
typedef __m256i I32;
typedef __m256i Bytes;
inline I32 zero() { return _mm256_setzero_si256(); }
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
inline void store(int32_t* to, I32 x) { _mm256_storeu_si256((__m256i*)to, x); }
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
inline void store(int32_t* to, I32 x) { std::memcpy(to, x.lane, sizeof x.lane); }
inline Bytes low_nibbles(Bytes x) {
  for (auto& byte : x.byte) byte &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (auto& byte : x.byte) byte >>= 4;
  return x;
}

#endif

}  // namespace fledge
