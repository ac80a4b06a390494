//! `arcface-worker`: the agent of a node (`--join`), one training rank (`rank`, started by the agent) and the
//! offline tools.

fn main() {}
