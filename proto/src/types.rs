//! Domain types: what is true of a value is true by construction.

use std::{fmt, ops::Range, str::FromStr};

/// Id of a job: `job-` and 12 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(String);

/// Id of a node, chosen by its worker: 1 to 128 letters, digits, `-`, `_`, `.` or `:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(String);

/// A text that is not a valid id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} id {text:?} is not valid: {expected}")]
pub struct InvalidId {
    kind: &'static str,
    text: String,
    expected: &'static str,
}

impl JobId {
    /// Job id of 48 random bits; the upper 16 bits of `random` are ignored.
    pub fn from_random(random: u64) -> Self {
        Self(format!("job-{:012x}", random & 0xffff_ffff_ffff))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JobId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let valid = text.strip_prefix("job-").is_some_and(|digits| {
            digits.len() == 12
                && digits
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        match valid {
            true => Ok(Self(text.to_owned())),
            false => Err(InvalidId {
                kind: "job",
                text: text.chars().take(64).collect(),
                expected: "it is \"job-\" and 12 hexadecimal digits",
            }),
        }
    }
}

impl NodeId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
        match (1..=128).contains(&text.len()) && text.bytes().all(allowed) {
            true => Ok(Self(text.to_owned())),
            false => Err(InvalidId {
                kind: "node",
                text: text.chars().take(64).collect(),
                expected: "it is 1 to 128 letters, digits, '-', '_', '.' or ':'",
            }),
        }
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Fencing number of a job's attempts: each restart opens the next one, and messages of older ones are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

impl Generation {
    /// The one after this.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Index of a training process in its world, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u32);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Consecutive classes `lo..hi` of the head, one rank's shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClassRange {
    /// First class.
    pub lo: u32,
    /// One past the last class.
    pub hi: u32,
}

impl ClassRange {
    /// Shard of `rank` among `world_size`: `C/W` classes, one more for the first `C mod W` ranks (Partial FC).
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn of_rank(num_classes: u32, rank: u32, world_size: u32) -> Self {
        assert!(
            rank < world_size,
            "rank {rank} is outside a world of {world_size}"
        );
        let (share, rest) = (num_classes / world_size, num_classes % world_size);
        let lo = share * rank + rank.min(rest);
        Self {
            lo,
            hi: lo + share + u32::from(rank < rest),
        }
    }

    /// Number of classes.
    pub fn len(self) -> u32 {
        self.hi - self.lo
    }

    /// True for a shard without classes (more ranks than classes).
    pub fn is_empty(self) -> bool {
        self.lo == self.hi
    }

    /// As a range of indices.
    pub fn indices(self) -> Range<u32> {
        self.lo..self.hi
    }
}

impl fmt::Display for ClassRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.lo, self.hi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_cover_all_classes_once_and_differ_by_one(classes in 0u32..10_000_000, world in 1u32..300) {
            let shards: Vec<_> = (0..world).map(|r| ClassRange::of_rank(classes, r, world)).collect();
            prop_assert_eq!(shards[0].lo, 0);
            prop_assert_eq!(shards[shards.len() - 1].hi, classes);
            prop_assert!(shards.windows(2).all(|w| w[0].hi == w[1].lo && w[0].len() >= w[1].len()));
            prop_assert!(shards[0].len() - shards[shards.len() - 1].len() <= 1);
        }

        #[test]
        fn job_ids_round_trip(random: u64) {
            let id = JobId::from_random(random);
            prop_assert_eq!(id.as_str().parse::<JobId>(), Ok(id.clone()));
        }
    }

    #[test]
    fn ids_refuse_what_would_be_a_path_or_a_label() {
        for text in [
            "",
            "job-",
            "job-12",
            "job-00000000000G",
            "../etc",
            "job-0000000000000",
        ] {
            assert!(text.parse::<JobId>().is_err(), "{text:?}");
        }
        for text in ["", "a b", "a/b", "é"] {
            assert!(text.parse::<NodeId>().is_err(), "{text:?}");
        }
        assert!("host-1.example:42_x".parse::<NodeId>().is_ok());
    }
}
