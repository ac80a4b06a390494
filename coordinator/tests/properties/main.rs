//! The rules of the control plane, under any order of events: random lives of a cluster whose coordinator does what the
//! pure modules say. A failure is shrunk to the few operations that matter.
//!
//! `PROPTEST_CASES` sets the number of cases.

mod model;

use arcface_proto::types::ClassRange;
use model::{Cluster, Op, is_partition};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};

const CASES: u32 = 20_000;
const MOST_OPERATIONS: usize = 200;

fn config(cases: u32) -> Config {
    Config {
        cases: std::env::var("PROPTEST_CASES").map_or(cases, |text| text.parse().expect("PROPTEST_CASES")),
        failure_persistence: None,
        ..Config::default()
    }
}

fn lives() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(any::<[u8; 3]>().prop_map(Op::of), 1..=MOST_OPERATIONS)
}

/// One life, and the fair weather after it.
fn live(ops: &[Op], split: fn(u32, u32, u32) -> ClassRange) -> Result<(), String> {
    let mut cluster = Cluster::new(split);
    for node in 0..model::NODES {
        cluster.act(Op::Join(node))?;
    }
    ops.iter().try_for_each(|op| cluster.act(*op))?;
    cluster.settle()
}

/// How many cases hold; the first that does not, shrunk, with what it broke.
fn search(cases: u32, split: fn(u32, u32, u32) -> ClassRange) -> Result<u32, (u32, String)> {
    let mut tried = 0;
    let counter = std::cell::Cell::new(0);
    let failed = std::cell::Cell::new(false);
    let outcome = TestRunner::new(config(cases)).run(&lives(), |ops| {
        let lived = live(&ops, split).map_err(TestCaseError::fail);
        if !failed.get() {
            counter.set(counter.get() + 1);
            failed.set(lived.is_err());
        }
        lived
    });
    tried += counter.get();
    match outcome {
        Ok(()) => Ok(tried),
        Err(TestError::Fail(reason, ops)) => Err((tried, format!("{reason}, after {ops:?}"))),
        Err(TestError::Abort(reason)) => Err((tried, reason.to_string())),
    }
}

#[test]
fn no_rule_is_broken_by_any_order_of_events() {
    match search(CASES, ClassRange::of_rank) {
        Ok(cases) => println!("{cases} lives of up to {MOST_OPERATIONS} operations"),
        Err((case, broken)) => panic!("case {case}: {broken}"),
    }
}

/// Found by chance: the job stayed `starting`, because the coordinator that knew of the rank's start was gone.
#[test]
fn a_rank_that_ended_well_had_started() {
    let ops = [
        Op::Deliver(0),
        Op::Wait(1520),
        Op::Beat(21),
        Op::Schedule,
        Op::Deliver(198),
        Op::Deliver(204),
        Op::Finish(0),
        Op::Restart,
    ];
    assert_eq!(live(&ops, ClassRange::of_rank), Ok(()));
}

proptest! {
    #![proptest_config(config(2_000))]

    #[test]
    fn class_shards_are_a_partition(num_classes in 0u32..5_000_000, world_size in 1u32..4096) {
        prop_assert_eq!(is_partition(num_classes, world_size, ClassRange::of_rank), Ok(()));
    }
}

#[test]
fn a_split_that_is_off_by_one_is_found() {
    let off_by_one = |num_classes, rank, world_size| {
        let mut range = ClassRange::of_rank(num_classes, rank, world_size);
        range.hi -= u32::from(rank + 1 == world_size);
        range
    };
    let (case, broken) = search(2_000, off_by_one).expect_err("a fault");
    assert!(broken.contains("I7"), "{broken}");
    println!("a split that is off by one: found by case {case}: {broken}");
}

#[cfg(feature = "planted-bugs")]
#[test]
fn planted_faults_of_the_pure_core_are_found() {
    use arcface_coordinator::planted::{Bug, plant};
    for bug in [Bug::NoGenerationCompare, Bug::CancelLostToRestart, Bug::NoFence] {
        plant(Some(bug));
        let outcome = search(CASES, ClassRange::of_rank);
        plant(None);
        match outcome {
            Err((case, broken)) => println!("{bug:?}: found by case {case}: {broken}"),
            Ok(cases) => panic!("{bug:?} was not found in {cases} cases"),
        }
    }
}
