//! What failures are called, for people and as a class.

use super::{Exit, FailureKind};

/// Class and words of an exit.
pub(super) fn describe(name: &str, exit: &Exit) -> (FailureKind, String) {
    if exit.stalled_ms.is_some() {
        return (FailureKind::Hang, format!("{name} hung: {}", exit.last_error));
    }
    let mut reason = match (exit.signal, exit.code) {
        _ if exit.requested => format!("{name} was stopped by its agent"),
        (Some(signal), _) => format!("{name} was killed by signal {signal}"),
        (None, Some(code)) => format!("{name} exited with {code}"),
        (None, None) => format!("{name} ended in an unknown way"),
    };
    if !exit.last_error.is_empty() {
        reason.push_str(": ");
        reason.push_str(&exit.last_error);
    }
    let kind = match is_out_of_memory(&exit.last_error) {
        true => FailureKind::Oom,
        false => FailureKind::Crash,
    };
    (kind, reason)
}

/// The words of libtorch (CPU and CUDA) and of Rust's allocator.
pub(super) fn is_out_of_memory(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    ["out of memory", "can't allocate memory", "memory allocation of"]
        .iter()
        .any(|words| text.contains(words))
}

/// "rank 1", "ranks 0, 1".
pub(super) fn rank_list(ranks: &[String]) -> String {
    let plural = if ranks.len() == 1 { "" } else { "s" };
    format!("rank{plural} {}", ranks.join(", "))
}
