/* Sums over positions of each channel. */
#include "native.h"

#define CHANNELS_AT_ONCE 128  /* their sums stay in the first cache */
#define POSITIONS_AT_ONCE 256 /* added up in float32, and then in float64 */
#define FEWEST_AT_ONCE 8      /* fewer are as fast one by one */
#define NARROW 64             /* strips of so many positions, or less, are added up side by side */

static inline float from_float(float value) { return value; }

static inline float from_bfloat16(uint16_t value)
{
    union { uint32_t bits; float value; } wide = {(uint32_t)value << 16};
    return wide.value;
}

static inline float from_half(uint16_t value)
{
    uint32_t magnitude = value & 0x7fff, exponent = value & 0x7c00;
    union { uint32_t bits; float value; } wide = {magnitude << 13};
    if (exponent == 0) /* subnormal, but no float32 on the way is: some programs have those flushed to 0 */
        wide.value = (float)magnitude * 0x1p-24f;
    else
        wide.bits += exponent == 0x7c00 ? 0x70000000 : 0x38000000;
    wide.bits |= (uint32_t)(value & 0x8000) << 16;
    return wide.value;
}

/* Sums are of deviations from a channel's first value. */
static void finish(const Slot *slot, int64_t channel, double first, double sum, double squares, float *mean,
                   float *variance)
{
    double average = sum * slot->cells->share, spread = squares * slot->cells->share - average * average;
    mean[channel] = (float)(first - slot->anchor[channel] + average);
    if (variance)
        variance[channel] = spread < 0 ? 0 : (float)spread;
}

/* Returns where the cell begins that is the first of the row in which the first sample's is, and that one's place. */
static int64_t first_cell(const Cells *cells, long long turn, int64_t *place)
{
    int64_t position = turn % cells->positions * cells->turning % cells->positions, base = 0;
    const int64_t *axis = cells->axis;
    *place = 0;
    for (int64_t i = 0; i < cells->axes; i++) {
        int64_t size = axis[0], parts = axis[1], part = axis[2 + position % size];
        position /= size;
        if (i < cells->axes - cells->rowed)
            base += axis[2 + size + part];
        else
            *place = *place * parts + part;
        axis += 2 + size + parts;
    }
    return base;
}

/* Sums up one sample: with channels side by side in memory, or strips of positions, or neither. */
#define DEFINE_SUMS(TYPE, LOAD)                                                                                        \
    FOR_EACH_PROCESSOR static void channels_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)      \
    {                                                                                                                  \
        const Cells *cells = slot->cells;                                                                              \
        double origin[CHANNELS_AT_ONCE], sum[CHANNELS_AT_ONCE], squares[CHANNELS_AT_ONCE];                             \
        for (int64_t first = 0; first < cells->channels; first += CHANNELS_AT_ONCE) {                                  \
            int64_t left = cells->channels - first, width = left < CHANNELS_AT_ONCE ? left : CHANNELS_AT_ONCE;         \
            for (int64_t c = 0; c < width; c++) {                                                                      \
                origin[c] = LOAD(x[first + c]);                                                                        \
                sum[c] = squares[c] = 0;                                                                               \
            }                                                                                                          \
            for (const int64_t *strip = cells->strip; strip < cells->strip + cells->strips; strip++)                   \
                for (int64_t i = 0; i < cells->length; i++) {                                                          \
                    const TYPE *here = x + *strip + i * cells->step + first;                                           \
                    for (int64_t c = 0; c < width; c++) {                                                              \
                        double deviation = LOAD(here[c]) - origin[c];                                                  \
                        sum[c] += deviation;                                                                           \
                        squares[c] += deviation * deviation;                                                           \
                    }                                                                                                  \
                }                                                                                                      \
            for (int64_t c = 0; c < width; c++)                                                                        \
                finish(slot, first + c, origin[c], sum[c], squares[c], mean, variance);                                \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    FOR_EACH_PROCESSOR static void strips_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)        \
    {                                                                                                                  \
        const Cells *cells = slot->cells;                                                                              \
        for (int64_t c = 0; c < cells->channels; c++, x += cells->apart) {                                             \
            float origin = LOAD(*x);                                                                                   \
            double sum = 0, squares = 0;                                                                               \
            for (const int64_t *strip = cells->strip; strip < cells->strip + cells->strips; strip++)                   \
                for (int64_t first = 0; first < cells->length; first += POSITIONS_AT_ONCE) {                           \
                    int64_t left = cells->length - first, count = left < POSITIONS_AT_ONCE ? left : POSITIONS_AT_ONCE; \
                    const TYPE *here = x + *strip + first;                                                             \
                    float few = 0, few_squares = 0;                                                                    \
                    _Pragma("omp simd reduction(+ : few)")                                                             \
                    for (int64_t i = 0; i < count; i++)                                                                \
                        few += LOAD(here[i]) - origin;                                                                 \
                    float middle = few / (float)count; /* the origin may be far off, and float32 is short */           \
                    _Pragma("omp simd reduction(+ : few_squares)")                                                     \
                    for (int64_t i = 0; i < count; i++) {                                                              \
                        float deviation = LOAD(here[i]) - origin - middle;                                             \
                        few_squares += deviation * deviation;                                                          \
                    }                                                                                                  \
                    sum += few;                                                                                        \
                    squares += few_squares + (double)middle * (2 * (double)few - (double)count * middle);              \
                }                                                                                                      \
            finish(slot, c, origin, sum, squares, mean, variance);                                                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    FOR_EACH_PROCESSOR static void narrow_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)        \
    {                                                                                                                  \
        const Cells *cells = slot->cells;                                                                              \
        const int64_t length = cells->length, together = POSITIONS_AT_ONCE / length;                                   \
        const int64_t *const end = cells->strip + cells->strips;                                                       \
        for (int64_t c = 0; c < cells->channels; c++, x += cells->apart) {                                             \
            float origin = LOAD(*x);                                                                                   \
            double sum = 0, squares = 0;                                                                               \
            for (const int64_t *strip = cells->strip, *next; strip < end; strip = next) {                              \
                next = end - strip < together ? end : strip + together;                                                \
                float sums[NARROW] = {0}, few = 0, few_squares = 0, count = (float)((next - strip) * length);          \
                for (const int64_t *here = strip; here < next; here++)                                                 \
                    for (int64_t i = 0; i < length; i++)                                                               \
                        sums[i] += LOAD(x[*here + i]) - origin;                                                        \
                for (int64_t i = 0; i < length; i++) {                                                                 \
                    few += sums[i];                                                                                    \
                    sums[i] = 0;                                                                                       \
                }                                                                                                      \
                float middle = few / count;                                                                            \
                for (const int64_t *here = strip; here < next; here++)                                                 \
                    for (int64_t i = 0; i < length; i++) {                                                             \
                        float deviation = LOAD(x[*here + i]) - origin - middle;                                        \
                        sums[i] += deviation * deviation;                                                              \
                    }                                                                                                  \
                for (int64_t i = 0; i < length; i++)                                                                   \
                    few_squares += sums[i];                                                                            \
                sum += few;                                                                                            \
                squares += few_squares + (double)middle * (2 * (double)few - (double)count * middle);                  \
            }                                                                                                          \
            finish(slot, c, origin, sum, squares, mean, variance);                                                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void positions_##LOAD(const Slot *slot, const TYPE *x, float *mean, float *variance)                        \
    {                                                                                                                  \
        const Cells *cells = slot->cells;                                                                              \
        for (int64_t c = 0; c < cells->channels; c++, x += cells->apart) {                                             \
            double origin = LOAD(*x), sum = 0, squares = 0;                                                            \
            for (const int64_t *strip = cells->strip; strip < cells->strip + cells->strips; strip++)                   \
                for (int64_t i = 0; i < cells->length; i++) {                                                          \
                    double deviation = LOAD(x[*strip + i * cells->step]) - origin;                                     \
                    sum += deviation;                                                                                  \
                    squares += deviation * deviation;                                                                  \
                }                                                                                                      \
            finish(slot, c, origin, sum, squares, mean, variance);                                                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void samples_##LOAD(const Slot *slot, const TYPE *x, long long turn)                                        \
    {                                                                                                                  \
        const Cells *cells = slot->cells;                                                                              \
        const int strips = cells->step == 1 && cells->length >= FEWEST_AT_ONCE;                                        \
        const int narrow = strips && cells->length <= NARROW && cells->strips > 1;                                     \
        void (*const sums)(const Slot *, const TYPE *, float *, float *) =                                             \
            cells->apart == 1 ? channels_##LOAD : narrow ? narrow_##LOAD : strips ? strips_##LOAD : positions_##LOAD;  \
        int64_t place, base = first_cell(cells, turn, &place);                                                         \
        for (int64_t n = 0; n < cells->samples; n++) {                                                                 \
            const TYPE *sample = x + n * cells->outer + base + (place + n * cells->hop) % cells->row * cells->behind;  \
            float *mean = slot->mean + n * slot->row;                                                                  \
            float *variance = slot->variance ? slot->variance + n * slot->row : NULL;                                  \
            sums(slot, sample, mean, variance);                                                                        \
        }                                                                                                              \
    }

DEFINE_SUMS(float, from_float)
DEFINE_SUMS(uint16_t, from_bfloat16)
DEFINE_SUMS(uint16_t, from_half)

void sum_up(const Slot *slot, const void *x, int kind, long long turn)
{
    if (kind == FLOAT32)
        samples_from_float(slot, x, turn);
    else if (kind == BFLOAT16)
        samples_from_bfloat16(slot, x, turn);
    else
        samples_from_half(slot, x, turn);
}
