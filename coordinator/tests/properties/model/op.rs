//! The operations that random lives are made of.

/// What can happen. Numbers choose among what is there.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Time passes, and the coordinator looks at its clock.
    Wait(u64),
    /// The planner is asked for every job that waits.
    Schedule,
    /// An agent reads its next command.
    Deliver(usize),
    /// An agent tells of the exits that it has not told yet.
    TellExits(usize),
    /// A heartbeat arrives.
    Beat(usize),
    /// A stream breaks; what was on its way is lost.
    Disconnect(usize),
    /// An agent joins.
    Join(usize),
    /// A node loses its power and gets it back.
    PowerCycle(usize),
    /// A process dies.
    Die(usize),
    /// A process asks for its peers, and says that its set-up is done if they have all come.
    Started(usize),
    /// All generations that can finish a step do.
    Train,
    /// A rank reports a checkpoint complete, of this many steps more than the last.
    Commit(usize, u64),
    /// The same, late: the generation is older by so many.
    LateCommit(usize, u64, u64),
    /// A process trained to its end.
    Finish(usize),
    /// A process fails and says why.
    Error(usize, bool),
    /// Somebody cancels.
    Cancel(usize),
    /// A node is drained, or not any more.
    Drain(usize, bool),
    /// The coordinator starts again from what it stored.
    Restart,
}

impl Op {
    /// Three bytes are an operation: cheap to make, and to shrink.
    pub fn of([kind, a, b]: [u8; 3]) -> Self {
        let (index, number) = (a as usize, u64::from(b));
        match kind {
            0..=39 => Self::Deliver(index),
            40..=64 => Self::Started(index),
            65..=89 => Self::Schedule,
            90..=119 => Self::Beat(index),
            120..=139 => Self::Train,
            140..=154 => Self::TellExits(index),
            155..=169 => Self::Join(index),
            170..=184 => Self::Wait(number * 40),
            185..=196 => Self::Commit(index, number % 8),
            197..=203 => Self::LateCommit(index, number % 8, 1 + number % 3),
            204..=211 => Self::Disconnect(index),
            212..=219 => Self::Die(index),
            220..=225 => Self::Wait(number * 400),
            226..=231 => Self::PowerCycle(index),
            232..=237 => Self::Finish(index),
            238..=242 => Self::Error(index, b < 20),
            243..=246 => Self::Restart,
            247..=250 => Self::Drain(index, b < 128),
            _ => Self::Cancel(index),
        }
    }
}
