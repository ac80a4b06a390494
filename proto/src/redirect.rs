//! How a coordinator that does not lead says so: UNAVAILABLE with a `google.rpc.ErrorInfo` of reason [`NOT_LEADING`]
//! and, for clients that do not decode details, the same in the answer's metadata.

/// Metadata key with the value [`STANDBY`].
pub const ROLE: &str = "arcface-role";
/// The coordinator that answered stands by.
pub const STANDBY: &str = "standby";
/// Metadata key, in the answer and in the `ErrorInfo`: `HOST:PORT` of the leader. Absent while nobody leads.
pub const LEADER: &str = "arcface-leader";
/// Reason of the `ErrorInfo`.
pub const NOT_LEADING: &str = "NOT_LEADING";
/// Domain of the `ErrorInfo`.
pub const DOMAIN: &str = "arcface";
