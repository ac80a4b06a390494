//! Faults of the control plane that tests switch on, to show that they would be found (`docs/testing.md`). Without the
//! feature `planted-bugs`, which no release has, `planted` is a constant and nothing of this is compiled in.

/// A fault that such systems have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// Messages of ranks are not compared with their job's generation.
    NoGenerationCompare,
    /// A checkpoint is committed when all parts but one are there.
    CommitBeforeLastPart,
    /// A submit is answered whether or not the store took it.
    AckBeforeStore,
    /// Expired checkpoints are deleted before the new one is committed.
    ExpireBeforeCommit,
    /// A cancel that meets a restart is answered and forgotten.
    CancelLostToRestart,
    /// The next generation starts while the old one may run.
    NoFence,
}

impl Bug {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::NoGenerationCompare,
        Self::CommitBeforeLastPart,
        Self::AckBeforeStore,
        Self::ExpireBeforeCommit,
        Self::CancelLostToRestart,
        Self::NoFence,
    ];
}

#[cfg(feature = "planted-bugs")]
std::thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Switches a fault on for this thread, and all others off.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// True while that fault is switched on.
#[cfg(feature = "planted-bugs")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// False: there are no planted faults in this build.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
