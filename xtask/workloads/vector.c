/* Vectors: SSE2, AES, SHA, AVX2. */
#include "workloads.h"
#include <cpuid.h>
#include <immintrin.h>

static int has_aes(void) { return __builtin_cpu_supports("aes"); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_sha(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

static float left[64][64], right[64][64], product[64][64];

static uint64_t fill_and_sum(int fill) {
    uint64_t sum = 0;
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 64; j++) {
            if (fill)
                left[i][j] = i - j, right[i][j] = i + j * 2;
            sum = sum * 31 + (int64_t)product[i][j];
        }
    return sum;
}

static uint64_t matrix_sse(uint64_t n) {
    fill_and_sum(1);
    while (n--)
        for (int i = 0; i < 64; i++)
            for (int j = 0; j < 64; j += 4) {
                __m128 sum = _mm_setzero_ps();
                for (int k = 0; k < 64; k++)
                    sum = _mm_add_ps(sum, _mm_mul_ps(_mm_set1_ps(left[i][k]), _mm_loadu_ps(&right[k][j])));
                _mm_storeu_ps(&product[i][j], sum);
            }
    return fill_and_sum(0);
}

static uint64_t bytes_sse(uint64_t n) {
    static uint8_t data[16384];
    uint64_t s = 9;
    for (unsigned i = 0; i < sizeof data; i++)
        data[i] = next_number(&s);
    __m128i total = _mm_setzero_si128();
    while (n--)
        for (unsigned i = 0; i < sizeof data; i += 16) {
            __m128i v = _mm_loadu_si128((const __m128i *)(data + i));
            __m128i w = _mm_avg_epu8(_mm_adds_epu8(v, _mm_set1_epi8(3)), _mm_shuffle_epi32(v, 0x1B));
            total = _mm_add_epi64(total, _mm_sad_epu8(w, _mm_max_epu8(v, _mm_set1_epi8(77))));
        }
    return _mm_cvtsi128_si64(total);
}

__attribute__((target("aes"))) static uint64_t aes(uint64_t n) {
    __m128i v[4] = {_mm_set1_epi32(1), _mm_set1_epi32(2), _mm_set1_epi32(3), _mm_set1_epi32(4)};
    __m128i key = _mm_set_epi64x(0x0123456789ABCDEF, 0x1357);
    n *= 100;
    while (n--)
        for (int i = 0; i < 10; i++) {
            for (int k = 0; k < 4; k++)
                v[k] = _mm_aesenc_si128(v[k], key);
            key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
        }
    return _mm_cvtsi128_si64(_mm_xor_si128(_mm_xor_si128(v[0], v[1]), _mm_xor_si128(v[2], v[3])));
}

__attribute__((target("sha,sse4.1"))) static uint64_t sha(uint64_t n) {
    __m128i a = _mm_set1_epi32(7), b = _mm_set1_epi32(9), w = _mm_set_epi64x(3, 5);
    n *= 100;
    while (n--)
        for (int i = 0; i < 8; i++) {
            a = _mm_sha256rnds2_epu32(a, b, w);
            b = _mm_sha256rnds2_epu32(b, a, _mm_shuffle_epi32(w, 0x0E));
            w = _mm_sha256msg1_epu32(w, a);
        }
    return _mm_cvtsi128_si64(_mm_xor_si128(a, b));
}

__attribute__((target("avx2,fma"))) static uint64_t matrix_avx2(uint64_t n) {
    fill_and_sum(1);
    while (n--)
        for (int i = 0; i < 64; i++)
            for (int j = 0; j < 64; j += 8) {
                __m256 sum = _mm256_setzero_ps();
                for (int k = 0; k < 64; k++)
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(left[i][k]), _mm256_loadu_ps(&right[k][j]), sum);
                _mm256_storeu_ps(&product[i][j], sum);
            }
    return fill_and_sum(0);
}

__attribute__((target("avx2"))) static uint64_t integers_avx2(uint64_t n) {
    static uint32_t data[4096];
    uint64_t s = 8;
    for (int i = 0; i < 4096; i++)
        data[i] = next_number(&s);
    __m256i sum = _mm256_setzero_si256();
    while (n--)
        for (int i = 0; i < 4096; i += 8) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(data + i));
            __m256i w = _mm256_permutevar8x32_epi32(v, _mm256_and_si256(sum, _mm256_set1_epi32(7)));
            sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(w, _mm256_srlv_epi32(v, _mm256_set1_epi32(3))));
        }
    return _mm256_extract_epi64(sum, 1) ^ _mm256_extract_epi64(sum, 2);
}

const struct workload vector[] = {
    {"sse2", "matrix-sse", matrix_sse}, {"sse2", "bytes-sse2", bytes_sse}, {"aes-sha", "aes", aes, has_aes},
    {"aes-sha", "sha", sha, has_sha}, {"avx2", "matrix-avx2", matrix_avx2, has_avx2},
    {"avx2", "integers-avx2", integers_avx2, has_avx2}, {0},
};
