//! What travels between ranks: the hello of a connection, the header before each piece of a tensor, and the control
//! frames that say how a rank is. Fixed sizes, little endian; decoding never panics. Knows no sockets.

use std::fmt;

/// Which call a message belongs to; both ends must agree on all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The operation, see [`Operation`].
    pub operation: Operation,
    /// Element kind, as [`super::reduce::code`] numbers it.
    pub kind: u8,
    /// Reduction or root.
    pub detail: u32,
    /// Step of the ring.
    pub step: u32,
    /// Counter of collective calls.
    pub sequence: u64,
    /// Bytes of the whole tensor.
    pub total: u64,
    /// Bytes that follow this header.
    pub payload: u64,
}

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// `all_reduce`.
    AllReduce = 1,
    /// `all_gather`.
    AllGather = 2,
    /// `reduce_scatter`.
    ReduceScatter = 3,
    /// `broadcast`.
    Broadcast = 4,
    /// `barrier`.
    Barrier = 5,
}

impl Operation {
    /// Its name in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        let all = [
            Self::AllReduce,
            Self::AllGather,
            Self::ReduceScatter,
            Self::Broadcast,
            Self::Barrier,
        ];
        all.into_iter().find(|operation| *operation as u8 == byte)
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            detail,
            step,
            sequence,
            total,
            payload,
            ..
        } = self;
        let name = self.operation.name();
        write!(
            f,
            "{name} number {sequence} of {total} bytes (kind {kind}, argument {detail}, step {step} with {payload} bytes)"
        )
    }
}

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 40;
const HEADER_MAGIC: [u8; 4] = *b"AFR1";

impl Header {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&HEADER_MAGIC);
        out[4] = self.operation as u8;
        out[5] = self.kind;
        out[8..12].copy_from_slice(&self.detail.to_le_bytes());
        out[12..16].copy_from_slice(&self.step.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.total.to_le_bytes());
        out[32..40].copy_from_slice(&self.payload.to_le_bytes());
        out
    }

    /// From bytes; `None` if they are no header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        (bytes[0..4] == HEADER_MAGIC).then_some(())?;
        Some(Self {
            operation: Operation::from_byte(bytes[4])?,
            kind: bytes[5],
            detail: u32_at(bytes, 8),
            step: u32_at(bytes, 12),
            sequence: u64_at(bytes, 16),
            total: u64_at(bytes, 24),
            payload: u64_at(bytes, 32),
        })
    }
}

/// What one rank tells another outside of the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// It is done and closes its connections; not a failure.
    Goodbye,
    /// Its communicator failed.
    Abort(Verdict),
    /// It has waited for rank `on` for a while.
    Waiting {
        /// The rank it waits for; itself if it does not know for whom.
        on: u32,
    },
}

/// Who is to blame for the end of a communicator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The rank.
    pub culprit: u32,
    /// What it did.
    pub fault: Fault,
    /// In words; cut to what a frame holds.
    pub text: String,
}

/// What a culprit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is gone.
    Lost,
    /// It was silent for this many milliseconds.
    Silent {
        /// How long.
        waited_ms: u64,
    },
    /// It made another call.
    Mismatch,
}

/// Bytes of a [`Control`] frame.
pub const CONTROL_BYTES: usize = 272;
const TEXT_AT: usize = 16;

impl Control {
    /// As bytes.
    pub fn encode(&self) -> [u8; CONTROL_BYTES] {
        let mut out = [0; CONTROL_BYTES];
        match self {
            Self::Goodbye => out[0] = 1,
            Self::Waiting { on } => {
                out[0] = 2;
                out[4..8].copy_from_slice(&on.to_le_bytes());
            }
            Self::Abort(verdict) => {
                out[0] = 3;
                let (fault, waited_ms) = match verdict.fault {
                    Fault::Lost => (0, 0),
                    Fault::Silent { waited_ms } => (1, waited_ms),
                    Fault::Mismatch => (2, 0),
                };
                out[1] = fault;
                out[4..8].copy_from_slice(&verdict.culprit.to_le_bytes());
                out[8..16].copy_from_slice(&waited_ms.to_le_bytes());
                let text = verdict.text.as_bytes();
                let length = text.len().min(CONTROL_BYTES - TEXT_AT);
                out[TEXT_AT..TEXT_AT + length].copy_from_slice(&text[..length]);
            }
        }
        out
    }

    /// From bytes; `None` if they are no control frame.
    pub fn decode(bytes: &[u8; CONTROL_BYTES]) -> Option<Self> {
        match bytes[0] {
            1 => Some(Self::Goodbye),
            2 => Some(Self::Waiting { on: u32_at(bytes, 4) }),
            3 => {
                let fault = match bytes[1] {
                    0 => Fault::Lost,
                    1 => Fault::Silent {
                        waited_ms: u64_at(bytes, 8),
                    },
                    2 => Fault::Mismatch,
                    _ => return None,
                };
                let text = String::from_utf8_lossy(&bytes[TEXT_AT..]);
                Some(Self::Abort(Verdict {
                    culprit: u32_at(bytes, 4),
                    fault,
                    text: text.trim_end_matches(['\0', '\u{fffd}']).to_owned(),
                }))
            }
            _ => None,
        }
    }
}

/// First message on a connection: who calls whom, in which job and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub role: Role,
    /// Rank that dials.
    pub from: u32,
    /// Rank that it means to reach.
    pub to: u32,
    /// Ranks in the world.
    pub world_size: u32,
    /// Generation.
    pub generation: u64,
    /// Digest of job and generation.
    pub session: [u8; 32],
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Control frames, both ways.
    Control = 1,
    /// Tensors, to the next rank of the ring.
    Data = 2,
}

/// Bytes of a [`Hello`].
pub const HELLO_BYTES: usize = 64;
const HELLO_MAGIC: [u8; 8] = *b"ARCFRNG1";

impl Hello {
    /// As bytes.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        out[0..8].copy_from_slice(&HELLO_MAGIC);
        out[8] = self.role as u8;
        out[12..16].copy_from_slice(&self.from.to_le_bytes());
        out[16..20].copy_from_slice(&self.to.to_le_bytes());
        out[20..24].copy_from_slice(&self.world_size.to_le_bytes());
        out[24..32].copy_from_slice(&self.generation.to_le_bytes());
        out[32..64].copy_from_slice(&self.session);
        out
    }

    /// From bytes; `None` if they are no hello.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        (bytes[0..8] == HELLO_MAGIC).then_some(())?;
        let mut session = [0; 32];
        session.copy_from_slice(&bytes[32..64]);
        Some(Self {
            role: match bytes[8] {
                1 => Role::Control,
                2 => Role::Data,
                _ => return None,
            },
            from: u32_at(bytes, 12),
            to: u32_at(bytes, 16),
            world_size: u32_at(bytes, 20),
            generation: u64_at(bytes, 24),
            session,
        })
    }
}

/// Answer to a [`Hello`] that was accepted.
pub const WELCOME: [u8; 8] = *b"WELCOME1";

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), CONTROL_BYTES)) {
            let _ = Control::decode(bytes.as_slice().try_into().expect("its length"));
            let _ = Header::decode(bytes[..HEADER_BYTES].try_into().expect("its length"));
            let _ = Hello::decode(bytes[..HELLO_BYTES].try_into().expect("its length"));
        }
    }

    #[test]
    fn messages_round_trip() {
        let header = Header {
            operation: Operation::ReduceScatter,
            kind: 6,
            detail: 1,
            step: 2,
            sequence: 1 << 40,
            total: 3 << 33,
            payload: 77,
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        let hello = Hello {
            role: Role::Data,
            from: 3,
            to: 0,
            world_size: 4,
            generation: 9,
            session: [7; 32],
        };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        let abort = Control::Abort(Verdict {
            culprit: 2,
            fault: Fault::Silent { waited_ms: 1500 },
            text: "no word".to_owned(),
        });
        for control in [Control::Goodbye, Control::Waiting { on: 5 }, abort] {
            assert_eq!(Control::decode(&control.encode()), Some(control));
        }
    }
}
