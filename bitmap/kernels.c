/* SPDX-License-Identifier: Apache-2.0 */
/* Word kernels: scalar, AVX2 and AVX-512 with vector popcount.
 *
 * Each form is one function per kernel, compiled for its instruction set by an attribute, and
 * picked at run time by what the processor reports. The scalar form is the reference and what other
 * architectures use. Counting in AVX2 looks the bits of each half byte up in a register (pshufb)
 * and adds the bytes of 8 up (psadbw): it keeps pace with memory, which the scalar count without a
 * popcnt instruction does not. */
#include "bitmap/kernels.h"

#include <stdbool.h>

static uint64_t scalar_or_count(uint64_t *dst, const uint64_t *a, const uint64_t *b, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        dst[i] = a[i] | b[i];
        sum += (uint64_t)__builtin_popcountll(dst[i]);
    }
    return sum;
}

static uint64_t scalar_copy_count(uint64_t *dst, const uint64_t *a, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        dst[i] = a[i];
        sum += (uint64_t)__builtin_popcountll(a[i]);
    }
    return sum;
}

static uint64_t scalar_count(const uint64_t *a, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (uint64_t)__builtin_popcountll(a[i]);
    return sum;
}

static size_t scalar_first_set(const uint64_t *a, size_t n)
{
    size_t i = 0;
    while (i < n && !a[i])
        i++;
    return i;
}

/* In the low half: bit i is set where bit 2i or 2i + 1 of w is. */
static uint64_t halve_word(uint64_t w)
{
    w = (w | w >> 1) & 0x5555555555555555;
    w = (w | w >> 1) & 0x3333333333333333;
    w = (w | w >> 2) & 0x0f0f0f0f0f0f0f0f;
    w = (w | w >> 4) & 0x00ff00ff00ff00ff;
    w = (w | w >> 8) & 0x0000ffff0000ffff;
    return (w | w >> 16) & 0xffffffff;
}

/* Each bit of the low half of w, twice. */
static uint64_t double_word(uint64_t w)
{
    w = (w | w << 16) & 0x0000ffff0000ffff;
    w = (w | w << 8) & 0x00ff00ff00ff00ff;
    w = (w | w << 4) & 0x0f0f0f0f0f0f0f0f;
    w = (w | w << 2) & 0x3333333333333333;
    w = (w | w << 1) & 0x5555555555555555;
    return w | w << 1;
}

static void scalar_halve(uint64_t *to, const uint64_t *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = halve_word(from[2 * i]) | halve_word(from[2 * i + 1]) << 32;
}

static void scalar_twice(uint64_t *to, const uint64_t *from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        to[2 * i] = double_word(from[i] & 0xffffffff);
        to[2 * i + 1] = double_word(from[i] >> 32);
    }
}

static const struct bitmap_kernels scalar = {
    "scalar",     scalar_or_count,  scalar_or_count, scalar_copy_count,
    scalar_count, scalar_first_set, scalar_halve,    scalar_twice,
};

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

/* Add the number of bits of each 8 bytes of v to the four sums. */
AVX2 static inline __m256i avx2_add_bits(__m256i sums, __m256i v)
{
    const __m256i bits = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1,
                                          2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(0x0f);
    __m256i lo = _mm256_shuffle_epi8(bits, _mm256_and_si256(v, low));
    __m256i hi = _mm256_shuffle_epi8(bits, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    __m256i bytes = _mm256_add_epi8(lo, hi);
    return _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
}

AVX2 static inline uint64_t avx2_total(__m256i v)
{
    return (uint64_t)_mm256_extract_epi64(v, 0) + (uint64_t)_mm256_extract_epi64(v, 1) +
           (uint64_t)_mm256_extract_epi64(v, 2) + (uint64_t)_mm256_extract_epi64(v, 3);
}

AVX2 static inline __m256i avx2_load(const uint64_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

AVX2 static inline void avx2_store(uint64_t *p, __m256i v)
{
    _mm256_storeu_si256((__m256i *)p, v);
}

AVX2 static uint64_t avx2_or_count(uint64_t *dst, const uint64_t *a, const uint64_t *b, size_t n)
{
    __m256i sums = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 8) {
        __m256i v = _mm256_or_si256(avx2_load(a + i), avx2_load(b + i));
        __m256i w = _mm256_or_si256(avx2_load(a + i + 4), avx2_load(b + i + 4));
        avx2_store(dst + i, v);
        avx2_store(dst + i + 4, w);
        sums = avx2_add_bits(avx2_add_bits(sums, v), w);
    }
    return avx2_total(sums);
}

/* A store past the caches saves reading the line first. The fence: who finds the page published
 * finds its words. */
AVX2 static uint64_t avx2_or_count_new(uint64_t *dst, const uint64_t *a, const uint64_t *b,
                                       size_t n)
{
    __m256i sums = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 8) {
        __m256i v = _mm256_or_si256(avx2_load(a + i), avx2_load(b + i));
        __m256i w = _mm256_or_si256(avx2_load(a + i + 4), avx2_load(b + i + 4));
        _mm256_stream_si256((__m256i *)(dst + i), v);
        _mm256_stream_si256((__m256i *)(dst + i + 4), w);
        sums = avx2_add_bits(avx2_add_bits(sums, v), w);
    }
    _mm_sfence();
    return avx2_total(sums);
}

AVX2 static uint64_t avx2_copy_count(uint64_t *dst, const uint64_t *a, size_t n)
{
    __m256i sums = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 4) {
        __m256i v = avx2_load(a + i);
        avx2_store(dst + i, v);
        sums = avx2_add_bits(sums, v);
    }
    return avx2_total(sums);
}

AVX2 static uint64_t avx2_count(const uint64_t *a, size_t n)
{
    __m256i sums = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 4)
        sums = avx2_add_bits(sums, avx2_load(a + i));
    return avx2_total(sums);
}

AVX2 static size_t avx2_first_set(const uint64_t *a, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i v = _mm256_or_si256(avx2_load(a + i), avx2_load(a + i + 4));
        if (!_mm256_testz_si256(v, v))
            break;
    }
    while (i < n && !a[i])
        i++;
    return i;
}

/* As halve_word, for each 16 bits. */
AVX2 static inline __m256i avx2_halve_16(__m256i v)
{
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_srli_epi16(v, 1)), _mm256_set1_epi8(0x55));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_srli_epi16(v, 1)), _mm256_set1_epi8(0x33));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_srli_epi16(v, 2)), _mm256_set1_epi8(0x0f));
    return _mm256_and_si256(_mm256_or_si256(v, _mm256_srli_epi16(v, 4)), _mm256_set1_epi16(0xff));
}

/* Packing works on each half of a register by itself: the quarters are put in order after it. */
AVX2 static void avx2_halve(uint64_t *to, const uint64_t *from, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        __m256i lo = avx2_halve_16(avx2_load(from + 2 * i));
        __m256i hi = avx2_halve_16(avx2_load(from + 2 * i + 4));
        avx2_store(to + i, _mm256_permute4x64_epi64(_mm256_packus_epi16(lo, hi), 0xd8));
    }
    scalar_halve(to + i, from + 2 * i, n - i);
}

/* As double_word, for each byte; they lie in 16 bits each. */
AVX2 static inline __m256i avx2_double_16(__m256i v)
{
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(0x0f));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 2)), _mm256_set1_epi8(0x33));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 1)), _mm256_set1_epi8(0x55));
    return _mm256_or_si256(v, _mm256_slli_epi16(v, 1));
}

AVX2 static void avx2_twice(uint64_t *to, const uint64_t *from, size_t n)
{
    size_t i = 0;
    for (; i + 2 <= n; i += 2) {
        __m128i v = _mm_loadu_si128((const __m128i *)(const void *)(from + i));
        avx2_store(to + 2 * i, avx2_double_16(_mm256_cvtepu8_epi16(v)));
    }
    scalar_twice(to + 2 * i, from + i, n - i);
}

static const struct bitmap_kernels avx2 = {
    "avx2",     avx2_or_count,  avx2_or_count_new, avx2_copy_count,
    avx2_count, avx2_first_set, avx2_halve,        avx2_twice,
};

#define AVX512 __attribute__((target("avx512f,avx512vpopcntdq")))

AVX512 static uint64_t avx512_or_count(uint64_t *dst, const uint64_t *a, const uint64_t *b,
                                       size_t n)
{
    __m512i sums = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 8) {
        __m512i v = _mm512_or_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        _mm512_storeu_si512(dst + i, v);
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(v));
    }
    return (uint64_t)_mm512_reduce_add_epi64(sums);
}

AVX512 static uint64_t avx512_or_count_new(uint64_t *dst, const uint64_t *a, const uint64_t *b,
                                           size_t n)
{
    __m512i sums = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 8) {
        __m512i v = _mm512_or_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        _mm512_stream_si512((__m512i *)(void *)(dst + i), v);
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(v));
    }
    _mm_sfence();
    return (uint64_t)_mm512_reduce_add_epi64(sums);
}

AVX512 static uint64_t avx512_copy_count(uint64_t *dst, const uint64_t *a, size_t n)
{
    __m512i sums = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 8) {
        __m512i v = _mm512_loadu_si512(a + i);
        _mm512_storeu_si512(dst + i, v);
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(v));
    }
    return (uint64_t)_mm512_reduce_add_epi64(sums);
}

AVX512 static uint64_t avx512_count(const uint64_t *a, size_t n)
{
    __m512i sums = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 8)
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(_mm512_loadu_si512(a + i)));
    return (uint64_t)_mm512_reduce_add_epi64(sums);
}

/* What is as fast with AVX2, which every such processor has, is taken from there. */
static const struct bitmap_kernels avx512 = {
    "avx512",     avx512_or_count, avx512_or_count_new, avx512_copy_count,
    avx512_count, avx2_first_set,  avx2_halve,          avx2_twice,
};

static bool have_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}

static bool have_avx512(void)
{
    return have_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512vpopcntdq");
}

const struct bitmap_kernels *bitmap_kernels(void)
{
    return have_avx512() ? &avx512 : have_avx2() ? &avx2 : &scalar;
}

const struct bitmap_kernels *bitmap_kernels_nth(unsigned i)
{
    switch (i) {
    case 0:
        return &scalar;
    case 1:
        return have_avx2() ? &avx2 : NULL;
    case 2:
        return have_avx512() ? &avx512 : NULL;
    default:
        return NULL;
    }
}
#else
const struct bitmap_kernels *bitmap_kernels(void)
{
    return &scalar;
}

const struct bitmap_kernels *bitmap_kernels_nth(unsigned i)
{
    return i ? NULL : &scalar;
}
#endif
