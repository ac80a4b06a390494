//! Shows that the simulation finds what it is there to find: every fault that is planted must break a rule.

use crate::{double::Double, run::Outcome, search};
use arcface_coordinator::planted::Bug;

/// Seeds that a fault may hide for.
const PATIENCE: u64 = 2_000;

#[test]
fn every_planted_fault_is_found() {
    let bugs = Bug::ALL.into_iter().map(|bug| format!("{bug:?}"));
    let doubles = Double::ALL.into_iter().map(|double| format!("{double:?}"));
    let mut hidden = Vec::new();
    for fault in bugs.chain(doubles) {
        match search(PATIENCE, &fault) {
            Err((seed, Outcome { violations, .. })) => {
                println!("{fault}: found by seed {seed}: {}", violations.join("; "));
            }
            Ok(seeds) => hidden.push(format!("{fault} ({seeds} seeds)")),
        }
    }
    assert!(hidden.is_empty(), "not found: {}", hidden.join(", "));
}
