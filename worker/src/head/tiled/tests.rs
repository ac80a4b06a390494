//! The tiled head as every head of its kind (`../suite.rs`), and what is its own: instructions and threads.

use super::*;
use crate::{
    collective::TcpCollective,
    head::suite::{self, Case, Make, Subject, config, train},
};
use proptest::prelude::*;

fn tiled(
    config: &HeadConfig,
    (rank, world_size): (u32, u32),
    isa: Isa,
    format: Format,
    threads: usize,
) -> TiledHead {
    let sampler = RandomNegatives {
        seed: config.seed,
        rate: config.sample_rate,
    };
    TiledHead::on(config, rank, world_size, Box::new(sampler), isa, format, threads)
}

fn with(isa: Isa, format: Format) -> impl Fn(&HeadConfig, u32, u32) -> Box<dyn Head> + Sync {
    move |config, rank, world_size| Box::new(tiled(config, (rank, world_size), isa, format, 2))
}

fn subject(make: Make<'_>, half: bool) -> Subject<'_> {
    Subject {
        make,
        name: "tiled",
        half: half.then_some(suite::BF16_TOLERANCE),
    }
}

/// With the best instructions and products of f32.
fn usual(test: impl Fn(Subject<'_>)) {
    test(subject(&with(Isa::best(), Format::F32), false));
}

/// With products of bf16: by vectors, where the machine has them, and by tiles.
fn half(test: impl Fn(Subject<'_>)) {
    for isa in multiplying_bf16() {
        let make = with(isa, Format::Bf16);
        test(Subject {
            name: isa.name(),
            ..subject(&make, true)
        });
    }
}

fn multiplying_bf16() -> Vec<Isa> {
    let own = Isa::all().into_iter().filter(|isa| isa.multiplies_bf16());
    #[cfg(target_arch = "x86_64")]
    let own = own.chain([Isa::with_tiles()]);
    own.collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn tiled_equals_plain(case in suite::cases()) {
        usual(|subject| suite::check(&case, subject));
    }
}

#[test]
fn edges_equal_plain() {
    for isa in Isa::all() {
        let make = with(isa, Format::F32);
        suite::edges_equal_plain(Subject {
            name: isa.name(),
            ..subject(&make, false)
        });
    }
}

#[test]
fn a_sum_that_vanishes_is_shifted() {
    usual(suite::a_sum_that_vanishes_is_shifted);
}

#[test]
fn magface_equals_plain() {
    usual(suite::magface_equals_plain);
}

#[test]
fn adaface_equals_plain() {
    usual(suite::adaface_equals_plain);
}

#[test]
fn bf16_equals_plain() {
    half(suite::bf16_equals_plain);
}

#[test]
fn lazy_sgd_equals_dense() {
    usual(suite::lazy_sgd_equals_dense);
}

#[test]
fn state_round_trips() {
    usual(suite::state_round_trips);
}

#[test]
fn bad_batches_are_refused() {
    usual(suite::bad_batches_are_refused);
}

#[test]
fn not_a_number_is_not_hidden() {
    usual(suite::not_a_number_is_not_hidden);
    half(suite::not_a_number_is_not_hidden);
}

/// Kept terms are those that the update would have made: with room for none, for some and for all of them, whole heads and sampled ones.
#[test]
fn kept_terms_change_no_bit() {
    let half = multiplying_bf16().into_iter().map(|isa| (isa, Format::Bf16));
    let of_f32 = Isa::all().into_iter().map(|isa| (isa, Format::F32));
    for (isa, format) in half.chain(of_f32) {
        for sample_rate in [1.0, 0.4] {
            let config = HeadConfig {
                sample_rate,
                ..config(1003, 40)
            };
            let labels: Vec<i64> = (0..30).map(|i| i * 31).collect();
            let case = Case::new(config, &labels, &[30]);
            let run = |room| {
                let mut head = tiled(&case.config, (0, 1), isa, format, 2);
                head.threads.kept = kept::Kept::new(room);
                train(&mut head, &mut TcpCollective::alone(), &case)
            };
            let none = run(0);
            for room in [50_000, 1 << 20] {
                let some = run(room);
                assert_eq!(
                    none.state,
                    some.state,
                    "{} {format:?} {sample_rate} {room}",
                    isa.name()
                );
            }
        }
    }
}

/// The same bits whatever the number of threads; every instruction set near the same.
#[test]
fn threads_do_not_change_a_bit() {
    let half = multiplying_bf16().into_iter().map(|isa| (isa, Format::Bf16));
    for (isa, format) in half.chain([(Isa::best(), Format::F32)]) {
        for sample_rate in [1.0, 0.4] {
            let config = HeadConfig {
                sample_rate,
                ..config(5003, 32)
            };
            let labels: Vec<i64> = (0..30).map(|i| i * 101).collect();
            let case = Case::new(config, &labels, &[30]);
            let run = |threads| {
                let mut head = tiled(&case.config, (0, 1), isa, format, threads);
                train(&mut head, &mut TcpCollective::alone(), &case)
            };
            let one = run(1);
            for threads in [2, 3, 7] {
                let other = run(threads);
                for ((a, b), (c, d)) in one.micros.iter().zip(&other.micros) {
                    assert_eq!((a, b), (c, d), "{threads} threads");
                }
                assert_eq!(one.state, other.state, "{threads} threads");
            }
        }
    }
}
