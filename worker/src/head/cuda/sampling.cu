// Which classes of a shard take part in a step: all positives, and the negatives with the smallest keys, as many as are
// wanted (sampling.rs). In rising order, the same list as there.
//
// A class's key is a function of (seed, step, class), so it is formed wherever it is asked for and never stored. The key of
// the last negative is found digit by digit, the highest first: 8 times `count_digits` over all classes and
// `choose_digit` over 256 counts. Keys differ, so what is not above it is exactly the number that was wanted. Then three
// passes write the list: counts by chunk, their running sum, the classes. All sums are of whole numbers: atomics on those
// change no result.

#include "common.cuh"

constexpr u32 DIGITS = 256;
// Classes that a block writes in one go, in its threads' order.
constexpr i64 CHUNK = 2048;

// What the passes leave for each other.
struct Selection {
    u64 last;       // the digits of the last negative's key that are known
    u64 remaining;  // of the negatives with these digits, which one it is (from 1); 0: no negatives are wanted
    u64 positives;
    u64 chosen;     // how long the list is
};

namespace {

// random.rs, `mix`: SplitMix64's output function.
__device__ u64 mix(u64 z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ bool takes_part(u64 draws, u64 lo, const u8* positive, const Selection& selection, i64 local) {
    return positive[local] || (selection.remaining != 0 && mix(draws ^ (lo + local)) <= selection.last);
}

// The part of a chunk that is this thread's.
struct Part {
    i64 begin;
    i64 end;
};

__device__ Part part_of(i64 chunk, i64 classes) {
    const i64 each = CHUNK / blockDim.x;
    const i64 begin = chunk * CHUNK + threadIdx.x * each;
    return {begin < classes ? begin : classes, begin + each < classes ? begin + each : classes};
}

} // namespace

// By sample its class, counted from the shard's first `lo`; -1 where it is on another rank, or no class. A thread a sample.
KERNEL head_local_classes(const i64* labels, i64 samples, i64 lo, i64 classes, i64* local) {
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 sample = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; sample < samples; sample += all) {
        const i64 label = labels[sample];
        local[sample] = label >= lo && label < lo + classes ? label - lo : -1;
    }
}

// Sets the flags of the samples' own classes; `local` is counted from the shard's first, -1 where it is on another rank.
// All flags are 0 before. A thread a sample.
KERNEL head_mark_positives(const i64* local, i64 samples, u8* positive) {
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 sample = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; sample < samples; sample += all) {
        if (local[sample] >= 0) {
            positive[local[sample]] = 1; // whoever else writes there writes the same
        }
    }
}

// Counts the negatives by the digit of their key at `digit` (7 the highest .. 0), among those whose higher digits are the
// known ones. `draws` is that of random.rs for the step, `lo` the shard's first class. `counts` [256] are 0 before.
KERNEL head_count_digits(u64 draws, u64 lo, i64 classes, const u8* positive, const Selection* selection, int digit,
                         u32* counts) {
    __shared__ u32 parts[DIGITS];
    for (u32 i = threadIdx.x; i < DIGITS; i += blockDim.x) {
        parts[i] = 0;
    }
    __syncthreads();
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 local = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; local < classes; local += all) {
        const u64 key = mix(draws ^ (lo + local));
        const bool known = digit == 7 || (key ^ selection->last) >> (8 * digit + 8) == 0;
        if (!positive[local] && known) {
            atomicAdd(&parts[key >> (8 * digit) & (DIGITS - 1)], 1u);
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < DIGITS; i += blockDim.x) {
        if (parts[i] != 0) {
            atomicAdd(&counts[i], parts[i]);
        }
    }
}

// Takes the digit of the last negative's key from the counts, and sets them to 0 for the next. `wanted` is the number of
// classes, int(rate * classes); if there are more positives than that, just these. One thread.
KERNEL head_choose_digit(u32* counts, i64 classes, u64 wanted, int digit, Selection* selection) {
    if (blockIdx.x != 0 || threadIdx.x != 0) {
        return;
    }
    if (digit == 7) {
        u64 negatives = 0;
        for (u32 i = 0; i < DIGITS; ++i) {
            negatives += counts[i];
        }
        const u64 positives = static_cast<u64>(classes) - negatives;
        selection->last = 0;
        selection->remaining = wanted > positives ? wanted - positives : 0;
        selection->positives = positives;
    }
    u64 before = 0;
    bool found = selection->remaining == 0;
    for (u32 i = 0; i < DIGITS; ++i) {
        if (!found && before + counts[i] >= selection->remaining) {
            selection->last |= static_cast<u64>(i) << (8 * digit);
            selection->remaining -= before;
            found = true;
        }
        before += counts[i];
        counts[i] = 0;
    }
}

// By chunk of 2048 classes, how many take part.
KERNEL head_count_chosen(u64 draws, u64 lo, i64 classes, const u8* positive, const Selection* selection, u32* chunks) {
    for (i64 chunk = blockIdx.x; chunk * CHUNK < classes; chunk += gridDim.x) {
        const Part part = part_of(chunk, classes);
        u32 count = 0;
        for (i64 local = part.begin; local < part.end; ++local) {
            count += takes_part(draws, lo, positive, *selection, local);
        }
        u32 total;
        block_scan(count, total);
        if (threadIdx.x == 0) {
            chunks[chunk] = total;
        }
    }
}

// Turns the counts into where each chunk's classes begin in the list, and notes its length. One block.
KERNEL head_sum_chunks(u32* chunks, i64 count, Selection* selection) {
    if (blockIdx.x != 0) {
        return;
    }
    const i64 each = (count + blockDim.x - 1) / blockDim.x;
    const i64 begin = threadIdx.x * each;
    u32 sum = 0;
    for (i64 chunk = begin; chunk < begin + each && chunk < count; ++chunk) {
        sum += chunks[chunk];
    }
    u32 total;
    u32 before = block_scan(sum, total);
    for (i64 chunk = begin; chunk < begin + each && chunk < count; ++chunk) {
        const u32 own = chunks[chunk];
        chunks[chunk] = before;
        before += own;
    }
    if (threadIdx.x == 0) {
        selection->chosen = total;
    }
}

// Writes the list: the classes that take part, counted from the shard's first, rising.
KERNEL head_write_chosen(u64 draws, u64 lo, i64 classes, const u8* positive, const Selection* selection,
                         const u32* chunks, u32* chosen) {
    for (i64 chunk = blockIdx.x; chunk * CHUNK < classes; chunk += gridDim.x) {
        const Part part = part_of(chunk, classes);
        u32 count = 0;
        for (i64 local = part.begin; local < part.end; ++local) {
            count += takes_part(draws, lo, positive, *selection, local);
        }
        u32 total;
        u32 at = chunks[chunk] + block_scan(count, total);
        for (i64 local = part.begin; local < part.end; ++local) {
            if (takes_part(draws, lo, positive, *selection, local)) {
                chosen[at++] = static_cast<u32>(local);
            }
        }
    }
}

// By sample the column of its own class in the list, -1 where that is on another rank. A thread a sample.
KERNEL head_find_columns(const u32* chosen, const Selection* selection, const i64* local, i64 samples, i64* column) {
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 sample = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; sample < samples; sample += all) {
        const i64 place = place_of(chosen, static_cast<i64>(selection->chosen), local[sample]);
        column[sample] = local[sample] < 0 ? -1 : place;
    }
}

// Sets the flags of the classes of a list. What head_count_chosen makes of the flags of several lists, where no negatives
// are wanted, is the list of all that are in any. A thread a class of the list.
KERNEL head_mark_chosen(const u32* chosen, i64 count, u8* taken) {
    const i64 all = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 place = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; place < count; place += all) {
        taken[chosen[place]] = 1;
    }
}
