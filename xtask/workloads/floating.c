/* Scalar floating point, by SSE and by x87. */
#include "workloads.h"
#include <math.h>
#include <string.h>

static uint64_t bits(double x) {
    uint64_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

#define BODIES 5
#define N_BODY(name, number, root)                                                                           \
    static uint64_t name(uint64_t n) {                                                                       \
        static const number start[BODIES][7] = {                                                             \
            {0, 0, 0, 0, 0, 0, 39}, {4.8, -1.1, -.1, .6, 2.8, -.02, .037}, {8.3, 4.1, -.4, -1, 1.8, .008, .011}, \
            {12.8, -15.1, -.2, 1, .8, -.01, .0017}, {15.3, -25.9, .1, .9, .5, -.03, .002}};                  \
        number v[BODIES][7];                                                                                 \
        memcpy(v, start, sizeof v);                                                                          \
        n *= 100;                                                                                            \
        while (n--) {                                                                                        \
            for (int i = 0; i < BODIES; i++)                                                                 \
                for (int j = i + 1; j < BODIES; j++) {                                                       \
                    number x = v[i][0] - v[j][0], y = v[i][1] - v[j][1], z = v[i][2] - v[j][2];              \
                    number d = x * x + y * y + z * z, m = (number).001 / (d * root(d));                      \
                    v[i][3] -= x * v[j][6] * m, v[i][4] -= y * v[j][6] * m, v[i][5] -= z * v[j][6] * m;      \
                    v[j][3] += x * v[i][6] * m, v[j][4] += y * v[i][6] * m, v[j][5] += z * v[i][6] * m;      \
                }                                                                                            \
            for (int i = 0; i < BODIES; i++)                                                                 \
                for (int k = 0; k < 3; k++)                                                                  \
                    v[i][k] += (number).001 * v[i][k + 3];                                                   \
        }                                                                                                    \
        return bits(v[0][0] + v[4][2]);                                                                      \
    }

N_BODY(n_body, double, sqrt)
N_BODY(n_body_x87, long double, sqrtl)

#define MANDELBROT(name, number)                                                                             \
    static uint64_t name(uint64_t n) {                                                                       \
        uint64_t inside = 0;                                                                                 \
        while (n--)                                                                                          \
            for (int p = 0; p < 256; p++) {                                                                  \
                number cr = (p & 15) / (number)8 - (number)1.5, ci = (p >> 4) / (number)8 - 1, r = 0, i = 0; \
                int k = 0;                                                                                   \
                for (; k < 50 && r * r + i * i < 4; k++) {                                                   \
                    number t = r * r - i * i + cr;                                                           \
                    i = 2 * r * i + ci;                                                                      \
                    r = t;                                                                                   \
                }                                                                                            \
                inside += k;                                                                                 \
            }                                                                                                \
        return inside;                                                                                       \
    }

MANDELBROT(mandelbrot, float)
MANDELBROT(mandelbrot_x87, long double)

static uint64_t functions(uint64_t n) {
    double sum = 0;
    while (n--)
        for (int i = 0; i < 100; i++)
            sum += sin(i * .37) * exp(i * -.01) + log(i + 1.5) + pow(i, .3);
    return bits(sum);
}

static uint64_t conversions(uint64_t n) {
    uint64_t s = 4;
    double sum = 0;
    while (n--)
        for (int i = 0; i < 100; i++) {
            double x = (double)(int64_t)next_number(&s);
            sum += (float)x * 1e-9f + (int)(x * 1e-12);
        }
    return bits(sum);
}

static uint64_t polynomial_x87(uint64_t n) {
    long double x = .7L, sum = 0;
    while (n--)
        for (int i = 0; i < 100; i++) {
            long double p = 1;
            for (int k = 9; k > 0; k--)
                p = p * x + 1.0L / k;
            sum += p;
            x = x * .99L + .003L;
        }
    return bits(sum);
}

const struct workload floating[] = {
    {"float", "n-body", n_body}, {"float", "mandelbrot", mandelbrot}, {"float", "libm", functions},
    {"float", "conversions", conversions}, {"x87", "n-body-x87", n_body_x87},
    {"x87", "mandelbrot-x87", mandelbrot_x87}, {"x87", "polynomial-x87", polynomial_x87}, {0},
};
