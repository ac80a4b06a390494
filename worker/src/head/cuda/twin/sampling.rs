//! The choice of classes, on the CPU.
//!
//! It needs `unsafe` for the same reason as the folder's head.
#![allow(unsafe_code)]

use crate::kernels::twin::Launch;

/// As in sampling.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Selection {
    last: u64,
    remaining: u64,
    positives: u64,
    chosen: u64,
}

unsafe extern "C" {
    fn head_mark_positives(local: *const i64, samples: i64, positive: *mut u8);
    fn head_count_digits(
        draws: u64,
        lo: u64,
        classes: i64,
        positive: *const u8,
        selection: *const Selection,
        digit: i32,
        counts: *mut u32,
    );
    fn head_choose_digit(counts: *mut u32, classes: i64, wanted: u64, digit: i32, selection: *mut Selection);
    fn head_count_chosen(
        draws: u64,
        lo: u64,
        classes: i64,
        positive: *const u8,
        selection: *const Selection,
        chunks: *mut u32,
    );
    fn head_sum_chunks(chunks: *mut u32, count: i64, selection: *mut Selection);
    fn head_write_chosen(
        draws: u64,
        lo: u64,
        classes: i64,
        positive: *const u8,
        selection: *const Selection,
        chunks: *const u32,
        chosen: *mut u32,
    );
    fn head_find_columns(
        chosen: *const u32,
        selection: *const Selection,
        local: *const i64,
        samples: i64,
        column: *mut i64,
    );
}

/// The classes of a shard that take part in a step, and each sample's column among them. `local`: by sample its class,
/// counted from the shard's first `lo`, or -1.
pub fn sample(
    launch: Launch,
    draws: u64,
    lo: u32,
    classes: usize,
    wanted: u64,
    local: &[i64],
) -> (Vec<u32>, Vec<i64>) {
    /// As in sampling.cu.
    const CHUNK: usize = 2048;
    assert!(local.iter().all(|class| *class < classes as i64));
    let (samples, count, lo) = (local.len() as i64, classes as i64, u64::from(lo));
    let mut positive = vec![0u8; classes];
    let mut counts = [0u32; 256];
    let mut selection = Selection::default();
    let mut chunks = vec![0u32; classes.div_ceil(CHUNK)];
    // One more than fit, to see that it is not written to.
    let mut chosen = vec![u32::MAX; classes + 1];
    let mut columns = vec![7i64; local.len()];
    let (flags, digits, state) = (positive.as_mut_ptr(), counts.as_mut_ptr(), &raw mut selection);
    let (sums, list, column) = (chunks.as_mut_ptr(), chosen.as_mut_ptr(), columns.as_mut_ptr());
    // SAFETY: all buffers are as long as the kernels' comments ask: a flag a class, 256 counts, a sum a chunk, at most
    // all classes in the list, a column a sample.
    launch.run(|| unsafe { head_mark_positives(local.as_ptr(), samples, flags) });
    for digit in (0..8).rev() {
        // SAFETY: as above.
        launch.run(|| unsafe { head_count_digits(draws, lo, count, flags, state, digit, digits) });
        // SAFETY: as above.
        launch.run(|| unsafe { head_choose_digit(digits, count, wanted, digit, state) });
    }
    // SAFETY: as above.
    launch.run(|| unsafe { head_count_chosen(draws, lo, count, flags, state, sums) });
    let one = Launch { grid: 1, ..launch };
    let chunk_count = classes.div_ceil(CHUNK) as i64;
    // SAFETY: as above.
    one.run(|| unsafe { head_sum_chunks(sums, chunk_count, state) });
    // SAFETY: as above.
    launch.run(|| unsafe { head_write_chosen(draws, lo, count, flags, state, sums, list) });
    // SAFETY: as above.
    launch.run(|| unsafe { head_find_columns(list, state, local.as_ptr(), samples, column) });
    let positives = positive.iter().filter(|flag| **flag == 1).count() as u64;
    assert_eq!(selection.positives, positives);
    assert_eq!(counts, [0; 256], "left as they are wanted by the next step");
    let beyond = chosen.split_off(selection.chosen as usize);
    assert!(beyond.iter().all(|class| *class == u32::MAX));
    (chosen, columns)
}
