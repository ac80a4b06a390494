//! Faults that are planted in what stands beside the coordinator: the store, the agents, the ranks.

/// A fault of a test double.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Double {
    /// Request ids that an earlier coordinator stored are not found.
    RequestIdsForgotten,
    /// The store takes what a replaced coordinator writes.
    NoEpochCompare,
    /// Agents obey whoever speaks.
    AgentForgetsEpoch,
    /// Every shard but the first begins a class too late.
    ClassSplitOffByOne,
}

impl Double {
    /// Every one.
    pub const ALL: [Self; 4] = [
        Self::RequestIdsForgotten,
        Self::NoEpochCompare,
        Self::AgentForgetsEpoch,
        Self::ClassSplitOffByOne,
    ];
}
