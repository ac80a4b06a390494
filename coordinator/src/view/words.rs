//! States, times and what happened, in words: as the command line prints them and the status page shows them. Pure.

use arcface_proto::{timestamp as wire_time, v1};
use std::time::{Duration, UNIX_EPOCH};

/// Name of a job's state: `running`.
pub fn job_state(state: v1::JobState) -> &'static str {
    match state {
        v1::JobState::Unspecified => "unknown",
        v1::JobState::Queued => "queued",
        v1::JobState::Starting => "starting",
        v1::JobState::Running => "running",
        v1::JobState::Recovering => "recovering",
        v1::JobState::Cancelling => "cancelling",
        v1::JobState::Succeeded => "succeeded",
        v1::JobState::Failed => "failed",
        v1::JobState::Cancelled => "cancelled",
    }
}

/// Name of a node's state: `healthy`.
pub fn node_state(state: v1::NodeState) -> &'static str {
    match state {
        v1::NodeState::Unspecified => "unknown",
        v1::NodeState::Healthy => "healthy",
        v1::NodeState::Suspect => "suspect",
        v1::NodeState::Lost => "lost",
        v1::NodeState::Draining => "draining",
    }
}

/// Where a checkpoint lies in its job's `location`, as other programs name it.
pub fn checkpoint_url(location: &str, manifest: &v1::CheckpointManifest) -> String {
    format!("{}/{}", location.trim_end_matches('/'), manifest.directory)
}

/// A time as `2026-11-24T10:15:00Z`; empty for one that no calendar has.
pub fn timestamp(time: &prost_types::Timestamp) -> String {
    // Year 9999, the last that RFC 3339 can write.
    const LAST_MS: u64 = 253_402_300_799_000;
    let ms = wire_time::to_unix_ms(time);
    if ms > LAST_MS {
        return String::new();
    }
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

/// Text from elsewhere with control characters replaced: it cannot move a terminal's cursor or break a table.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// A count with its noun: `1 step`, `12 steps`.
pub fn count(number: u64, noun: &str) -> String {
    if number == 1 {
        format!("1 {noun}")
    } else {
        format!("{number} {noun}s")
    }
}

/// A recovery on one line: what died, when that was seen and, once training goes on, from where and after how long.
pub fn recovery(recovery: &v1::Recovery) -> String {
    let mut line = format!(
        "{}: detected after {:.1} s",
        clean(&recovery.reason),
        recovery.detected_s
    );
    match recovery.resumed_step {
        Some(step) if recovery.from_memory => line.push_str(&format!(", resumed from memory at step {step}")),
        Some(step) => line.push_str(&format!(", resumed from step {step}")),
        None => line.push_str(", recovering"),
    }
    if let Some(lost) = recovery.lost_steps {
        line.push_str(&format!(", {} lost", count(lost, "step")));
    }
    if let Some(total) = recovery.total_s {
        line.push_str(&format!(", back after {total:.1} s"));
    }
    line
}

/// A straggler on one line.
pub fn straggler(straggler: &v1::Straggler) -> String {
    let v1::Straggler {
        rank,
        node,
        cause,
        ratio,
        over,
    } = straggler;
    let node = clean(node);
    match over {
        true => format!("rank {rank} on {node} keeps up again"),
        false => format!(
            "rank {rank} on {node} holds up the others: {ratio:.1} times their own time a step, by {}",
            match cause.as_str() {
                "input" => "waiting for data".into(),
                cause => clean(cause),
            }
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_outside_the_calendar_are_empty() {
        assert_eq!(
            timestamp(&wire_time::from_unix_ms(1_795_000_000_000)),
            "2026-11-18T11:06:40Z"
        );
        assert_eq!(
            timestamp(&prost_types::Timestamp {
                seconds: 300_000_000_000,
                nanos: 0
            }),
            ""
        );
        assert_eq!(
            timestamp(&prost_types::Timestamp {
                seconds: -5,
                nanos: 0
            }),
            "1970-01-01T00:00:00Z"
        );
    }

    #[test]
    fn a_recovery_tells_its_story_as_far_as_it_is_known() {
        let mut happened = v1::Recovery {
            reason: "rank 1 on node-2 was killed by signal 9".into(),
            detected_s: 0.84,
            ..Default::default()
        };
        assert_eq!(
            recovery(&happened),
            "rank 1 on node-2 was killed by signal 9: detected after 0.8 s, recovering"
        );
        (happened.resumed_step, happened.lost_steps, happened.total_s) = (Some(400), Some(12), Some(8.31));
        assert_eq!(
            recovery(&happened),
            "rank 1 on node-2 was killed by signal 9: detected after 0.8 s, resumed from step 400, 12 steps lost, back after 8.3 s"
        );
        happened.from_memory = true;
        assert_eq!(
            recovery(&happened),
            "rank 1 on node-2 was killed by signal 9: detected after 0.8 s, resumed from memory at step 400, 12 steps lost, back after 8.3 s"
        );
    }
}
