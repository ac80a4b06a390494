//! Protobuf timestamps as milliseconds since the Unix epoch: what the pure modules count in, and the JSON form
//! in files.

use prost_types::Timestamp;
use serde::{Deserialize, Deserializer, Serializer};

/// Timestamp of a number of milliseconds since the Unix epoch.
pub fn from_unix_ms(ms: u64) -> Timestamp {
    Timestamp {
        seconds: (ms / 1000) as i64,
        nanos: (ms % 1000) as i32 * 1_000_000,
    }
}

/// Milliseconds since the Unix epoch; 0 for times before it.
pub fn to_unix_ms(timestamp: &Timestamp) -> u64 {
    let millis = i128::from(timestamp.seconds) * 1000 + i128::from(timestamp.nanos) / 1_000_000;
    u64::try_from(millis).unwrap_or(0)
}

/// Serde: writes a timestamp as milliseconds since the Unix epoch, an absent one as null.
pub fn serialize<S: Serializer>(timestamp: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match timestamp {
        Some(timestamp) => serializer.serialize_some(&to_unix_ms(timestamp)),
        None => serializer.serialize_none(),
    }
}

/// Serde: the inverse of [`serialize`].
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    Ok(Option::<u64>::deserialize(deserializer)?.map(from_unix_ms))
}
