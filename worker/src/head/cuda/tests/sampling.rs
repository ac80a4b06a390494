//! The choice of classes: exactly that of `sampling.rs`.

use super::*;
use crate::{
    head::sampling::{ClassSampler, RandomNegatives},
    random::Draws,
};
use arcface_proto::types::ClassRange;

fn check(launch: Launch, lo: u32, classes: u32, rate: f64, step: u64, local: &[i64]) {
    const SEED: u64 = 11;
    let mut positives: Vec<u32> = local
        .iter()
        .filter_map(|class| u32::try_from(*class).ok())
        .collect();
    positives.sort_unstable();
    positives.dedup();
    let shard = ClassRange { lo, hi: lo + classes };
    let mut sampler = RandomNegatives { seed: SEED, rate };
    let expected = sampler.sample(step, shard, &positives).expect("a rate below 1");
    let wanted = (rate * f64::from(classes)) as u64;
    let draws = Draws::new(SEED, Purpose::ClassSampling, step).word();
    let (chosen, columns) = twin::sample(launch, draws, lo, classes as usize, wanted, local);
    assert_eq!(
        chosen, expected,
        "{classes} classes from {lo}, rate {rate}, step {step}"
    );
    for (class, column) in local.iter().zip(columns) {
        match usize::try_from(column) {
            Ok(column) => assert_eq!(i64::from(chosen[column]), *class),
            Err(_) => assert_eq!((*class, column), (-1, -1)),
        }
    }
}

#[test]
fn the_list_is_that_of_the_cpu() {
    let mut stream = stream(4000);
    for (number, launch) in (0..96).zip(Launch::all().into_iter().cycle()) {
        // One class, less and more than a chunk, the ends of chunks.
        let sizes = [1, 2, 255, 2047, 2048, 2049, 4096, 5000];
        let classes = match number % 3 {
            0 => sizes[draw(&mut stream, 0..sizes.len())],
            _ => draw(&mut stream, 1..7000),
        };
        let samples = draw(&mut stream, 1..40);
        let local: Vec<i64> = (0..samples)
            .map(|_| draw(&mut stream, 0..classes + classes / 3 + 1) as i64)
            .map(|class| if class < classes as i64 { class } else { -1 })
            .collect();
        let rate = match number % 5 {
            0 => 0.0,
            1 => 0.999,
            _ => stream.next_uniform(),
        };
        let lo = draw(&mut stream, 0..1_000_000) as u32;
        check(launch, lo, classes as u32, rate, number, &local);
    }
}

#[test]
fn without_samples_here_or_with_more_than_wanted() {
    for launch in Launch::all() {
        check(launch, 0, 500, 0.1, 1, &[-1, -1]);
        check(launch, 7, 500, 0.01, 2, &[1, 4, 9, 16, 25, 36, 49, 499, 0, 0]);
        check(launch, 7, 10, 0.5, 3, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }
}
