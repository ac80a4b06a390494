//! `arcface-coordinator`: parse, run, exit code.

fn main() {}
